"""The head of every report, for the benches: the package's own."""

from specgen_engine.observability.machine import commit, describe_machine, new_report, write_report

__all__ = ["commit", "describe_machine", "new_report", "write_report"]
