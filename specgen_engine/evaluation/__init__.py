"""Compile, check and time candidate kernels; the contract is in base.py."""
