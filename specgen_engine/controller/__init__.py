"""One asyncio Session a base request: forks, verdicts, the decision to end, the graft."""
