"""The remote KV tier: evicted fork prefixes in memory that evaluators lend, as SGLang's HiCache's second level."""
