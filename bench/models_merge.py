"""Put a run of bench.models beside the earlier ones: python -m bench.models_merge RUN.json bench/results/F.json

A results file holds `runs`, oldest first, each whole as it was written: machine, commit, command and its cases.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

SCHEMA = "specgen.models.runs/1"


def merge(results: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The results with the run in its place by date; one of the same date is replaced. Folders are left out of the
    command. A single run, as bench.models writes it, becomes the first of a results file."""
    earlier = results.get("runs", [results] if "cases" in results else [])
    run = {**run, "command": re.sub(r"\S*/(?=\S)", "", run["command"])}
    others = [one for one in earlier if one["machine"]["date"] != run["machine"]["date"]]
    return {"schema": SCHEMA, "runs": sorted([*others, run], key=lambda one: str(one["machine"]["date"]))}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.models_merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("results", type=Path)
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    merged = merge(results, json.loads(args.run.read_text()))
    args.results.write_text(json.dumps(merged, indent=1) + "\n")
    print(", ".join(f"{run['machine']['date']}: {' '.join(run['cases'])}" for run in merged["runs"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
