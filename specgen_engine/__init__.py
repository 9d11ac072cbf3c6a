"""SpecGen engine: speculative kernel generation inside SGLang (arXiv 2606.17518)."""

__version__ = "0.1.0"
