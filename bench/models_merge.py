"""Put a run of bench.models beside the earlier ones: python -m bench.models_merge RUN.json bench/results/F.json

A results file holds `runs`, oldest first, each as it was written: machine, commit, command and its cases; `on` says on
how many GPUs, and whose memory the tier's lender lent. Folders of the machine are left out.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

SCHEMA = "specgen.models.runs/1"


FOLDERS = re.compile(r"/(?:dev/shm|tmp|root|home|work)/(?:[^\s'\",:]*/)?")


def merge(results: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The results with the run in its place by date; one of the same date is replaced. A single run, as bench.models
    writes it, becomes the first of a results file."""
    earlier = results.get("runs", [results] if "cases" in results else [])
    run = {**without_folders(run), "command": re.sub(r"\S*/(?=\S)", "", run["command"])}
    others = [one for one in earlier if one["machine"]["date"] != run["machine"]["date"]]
    runs = sorted([*others, run], key=lambda one: str(one["machine"]["date"]))
    return {"schema": SCHEMA, "runs": [{**one, "on": place(one)} for one in runs]}


def place(run: dict[str, Any]) -> str:
    """On how many GPUs a run was made, and what its restores read: with one GPU the lender is on the serving one."""
    gpus = int(run["machine"].get("gpus", 0))
    words = f"{gpus} GPU{'s' if gpus != 1 else ''}"
    if not any(case.endswith("tier") for case in run["cases"]):
        return words
    lender = "the serving GPU: copies within its memory, no NVLink" if gpus == 1 else "another GPU"
    return f"{words}; the tier's lender on {lender}"


def without_folders(value: Any) -> Any:
    """The same with a machine's folders left out of every text."""
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    return FOLDERS.sub("", value) if isinstance(value, str) else value


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
    print(", ".join(f"{run['machine']['date']}, {run['on']}: {' '.join(run['cases'])}" for run in merged["runs"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
