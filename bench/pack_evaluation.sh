#!/usr/bin/env bash
# What run_evaluation_on_gpu_host.sh needs, from the commit checked out: package, benches, tests, a copy of the traces.
#   bash bench/pack_evaluation.sh PACK TRACES [LIBRARIES] [SITE] [EXTENSION]
# TRACES: a folder with scores.json and, in folders of task folders, the answers that it scores.
# LIBRARIES: CUDA C++ answers compiled before for the host's Python, as HASH.so; HASH: the first 16 digits of the SHA-256
# of main.cpp and cuda.cu, as load_inline writes them. SITE: packages that the host lacks, put on PYTHONPATH
# there; sandboxes read folders of it that are named site-packages. EXTENSION: _kv*.so for
# the host's Python, which only bench/run_pools_on_gpu_host.sh needs.
set -eu
pack=$1 traces=$2 libraries=${3:-} site=${4:-} extension=${5:-}
rm -rf "$pack/src" "$pack/traces" "$pack/site-packages" "$pack/libraries.tar.xz"
mkdir -p "$pack/src" "$pack/traces"
git rev-parse HEAD >"$pack/COMMIT"
git archive HEAD specgen_engine bench tests pyproject.toml | tar x -C "$pack/src" --exclude='bench/results/*'
mkdir -p "$pack/src/bench/results"
git show HEAD:bench/results/evaluation_H200.json >"$pack/src/bench/results/evaluation_H200.json"
python3 - "$traces" "$pack/traces" <<'P'
import json, shutil, sys
from pathlib import Path

source, target = map(Path, sys.argv[1:])
shutil.copy(source / "scores.json", target)
for name in json.loads((source / "scores.json").read_text())["answers"]:
    answer = source / name
    task = answer.parent.parent / "task.py"
    for path in (answer, task):
        to = target / path.relative_to(source)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, to)
P
[ -z "$libraries" ] || tar cJf "$pack/libraries.tar.xz" -C "$libraries" .
[ -z "$extension" ] || cp "$extension" "$pack/src/specgen_engine/"
[ -z "$site" ] || cp -r "$site" "$pack/site-packages"
find "$pack" -name __pycache__ -prune -exec rm -r {} +
du -sh "$pack"
