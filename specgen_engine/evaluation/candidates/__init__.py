"""The forms a candidate may have: told from its text, checked, and made into a ModelNew."""
