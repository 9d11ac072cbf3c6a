"""`python -m specgen_engine` is `specgen`."""

from specgen_engine.cli import main

main()
