#!/usr/bin/env bash
# On a GPU host without this project installed: scores of recorded answers (bench.scores), saved after every answer.
#   OUT=DIR bash bench/run_scores_on_gpu_host.sh PACK [ONLY] [SECONDS]
# PACK is what bench/pack_scores.sh made; ONLY a regular expression on answers' paths; SECONDS for everything.
set -u
pack=$(realpath "$1") only=${2:-} seconds=${3:-225}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SPECGEN_COMMIT
SPECGEN_COMMIT=$(cat "$pack/COMMIT")
nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.used --format=csv,noheader
cd "$pack/src" && ln -sfn "$OUT" out || exit
timeout -k 5 "$seconds" python3 -m bench.scores ../traces --only "$only" --json out/scores.json \
    --budget-s $((seconds - 15)) ${SCORES_ARGS:-} 2>&1 | tee out/scores.log
