"""Fork points, token-level triggers and the speculative class, inside SGLang's scheduler."""
