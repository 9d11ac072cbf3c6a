#!/usr/bin/env bash
# On a host with two GPUs or more, without this project installed: first what KV copies do to a timed kernel
# (bench/elastic_copies.py, about 30 s), then one recorded burst live under elastic, every static split and FIFO, and the
# same burst simulated (bench/elastic_live.py).
#   bash bench/pack_evaluation.sh PACK TRACES "" SITE EXTENSION    here; SITE: a folder that holds simpy and anyio,
#                                                                  EXTENSION: _kv*.so for the host's Python
#   OUT=DIR bash PACK/src/bench/run_pools_on_gpu_host.sh PACK [SECONDS]      there; 150 s for all by default
# The host needs Python with torch, triton, pydantic and psutil. DEVICES, COUNT, BURSTS, GAP_S, ONLY: as
# bench.elastic --live takes them; DEVICES=cuda:0,cuda:1,cuda:0,cuda:1 has two workers a GPU and is not simulated.
# A rehearsal, with synthetic candidates: DEVICES=cpu,cpu COUNT=4. Leaves in OUT: elastic_copies.{json,log},
# elastic_live.{json,log}; the log has a line a job, so that a run that is cut off says something.
set -u
pack=$(realpath "$1") total=${2:-150}
DEVICES=${DEVICES:-cuda:0,cuda:1} COUNT=${COUNT:-8} BURSTS=${BURSTS:-2} GAP_S=${GAP_S:-4}
ONLY=${ONLY:-softmax_long|swiglu|rmsnorm_residual|cross_entropy/iter-1/fork-[123]|paged_attention}
export PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SPECGEN_COMMIT PYTHONPATH="$pack/src:$pack/site-packages"
SPECGEN_COMMIT=$(cat "$pack/COMMIT")
OUT=$(realpath "${OUT:?say where the results go: OUT=DIR}")
cd "$pack/src" || exit
burst=(--traces "$pack/traces" --only "$ONLY")
[ "${DEVICES%%,*}" != cpu ] || burst=()
nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.used --format=csv,noheader 2>/dev/null
timeout -k 5 45 python3 -m bench.elastic_copies --json "$OUT/elastic_copies.json" >"$OUT/elastic_copies.log" 2>&1
echo "copies: status $?, $SECONDS s of $total"
tail -n 5 "$OUT/elastic_copies.log" | cut -c1-160
timeout -k 5 $((total - SECONDS - 5)) python3 -m bench.elastic --live --devices "$DEVICES" "${burst[@]}" \
    --count "$COUNT" --bursts "$BURSTS" --gap-s "$GAP_S" --json "$OUT/elastic_live.json" \
    >"$OUT/elastic_live.log" 2>&1
echo "burst: status $?, $SECONDS s of $total"
tail -n 60 "$OUT/elastic_live.log" | cut -c1-160
nvidia-smi --query-gpu=memory.used --format=csv,noheader 2>/dev/null
echo "over after $SECONDS s"
