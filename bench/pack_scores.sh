#!/usr/bin/env bash
# What run_scores_on_gpu_host.sh needs, from the commit checked out: the package, the benches, a copy of TRACES.
#   bash bench/pack_scores.sh PACK TRACES...      (folders of task folders, as ../shared/traces/glm51_runs)
set -eu
pack=$1
shift
rm -rf "$pack"
mkdir -p "$pack/src" "$pack/traces"
git rev-parse HEAD >"$pack/COMMIT"
git archive HEAD specgen_engine bench | tar x -C "$pack/src" --exclude='bench/results/*'
cp -r --no-preserve=mode "$@" "$pack/traces/"
du -sh "$pack"
