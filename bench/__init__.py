"""Benchmarks: each command measures, checks what it measured, and writes one JSON report."""
