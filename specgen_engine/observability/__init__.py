"""Metrics of searches, forks and evaluations."""
