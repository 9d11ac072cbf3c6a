#!/usr/bin/env bash
# Plays bench.end_to_end on a host without network. Run from the project's root:
#   OUT=results SITE=site CARRY=packed bash bench/run_end_to_end_on_gpu_host.sh
# CARRY holds what `python -m bench.e2e_pack` made, SITE SGLang 0.5.17 with its dependencies. TRACES: folders below
# CARRY/traces. It ends within LIMIT_S; what can't be done by then is left out and said. Leaves in OUT: end_to_end.json (a
# row as soon as its search ends), end_to_end.md, logs.tar.gz, kernels.tar.xz. Where the tokenizer's package is: the same
# command with --resume, --budget-s 0 and --scores fills in the oracle and draws the figure. ARGS="--resume CARRY/F --again
# specgen" plays specgen anew beside F's other rows. STEP=overhead runs bench.overhead instead.
set -u
OUT=${OUT:-end_to_end_results}
CARRY=${CARRY:-build/carry_e2e}
SITE=${SITE:-site}
MODEL=${MODEL:-qwen3-8b}
GPUS=${GPUS:-serve=0,eval=1}
TRACES=${TRACES:-ours/cross_entropy ours/layernorm_gelu ours/linear_bias_relu ours/rmsnorm_residual ours/softmax_long ours/swiglu glm51/fp8_gemm glm51/paged_attention}
CONFIGURATIONS=${CONFIGURATIONS:-sequential specgen}
SEARCHES=${SEARCHES:-8}
LIMIT_S=${LIMIT_S:-500}
WARM_S=${WARM_S:-120}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
logs=$(mktemp -d)
cp "$CARRY"/prebuilt/_kv*.so specgen_engine/ || exit 1
export PYTHONPATH=".:$CARRY/site:$SITE" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
# Kernels that the engine compiles at its first start (80 s): kept in CACHE, and taken from CARRY/kernels.tar.xz if there.
CACHE=${CACHE:-/tmp/specgen_cache}
mkdir -p "$CACHE"
[ ! -f "$CARRY/kernels.tar.xz" ] || tar -C "$CACHE" -xJf "$CARRY/kernels.tar.xz"
export FLASHINFER_WORKSPACE_BASE=$CACHE/flashinfer TRITON_CACHE_DIR=$CACHE/triton TVM_FFI_CACHE_DIR=$CACHE/tvm
export XDG_CACHE_HOME=$CACHE/xdg SPECGEN_COMMIT=$(cat "$CARRY/COMMIT")
if [ "${STEP:-}" = overhead ]; then
    # shellcheck disable=SC2086
    timeout -k 10 "$LIMIT_S" "$PYTHON" -m bench.overhead --json "$OUT/overhead.json" --model "$CARRY/$MODEL" --gpus "${OVERHEAD_GPUS:-0}" \
        --budget-s $((LIMIT_S - 180 > 20 ? LIMIT_S - 180 : 20)) ${ARGS:-} 2>&1 | tee "$OUT/overhead.log"
    exit "${PIPESTATUS[0]}"
fi
# While the server starts: one trivial CUDA extension, so that nvcc and torch's headers are in the host's file cache. The
# first CUDA candidates took 38-73 s to compile without; its build is no candidate's, and all configurations gain alike.
timeout -k 5 "$WARM_S" "$PYTHON" - "$logs/warm_build" >"$logs/warm_build.log" 2>&1 <<'PYTHON' &
import os, sys, time
from torch.utils.cpp_extension import load_inline
started = time.monotonic()
os.makedirs(sys.argv[1])
source = "#include <torch/extension.h>\n__global__ void none() {}\nvoid warm() { none<<<1, 1>>>(); }"
load_inline("specgen_warm", "void warm();", source, functions=["warm"], build_directory=sys.argv[1])
print(f"nvcc and torch's headers read: {time.monotonic() - started:.0f} s")
PYTHON
warm=$!
# shellcheck disable=SC2086
folders=$(for trace in $TRACES; do echo "$CARRY/traces/$trace"; done)
# shellcheck disable=SC2086
timeout -k 10 "$LIMIT_S" "$PYTHON" -m bench.end_to_end --traces $folders --gpus "$GPUS" --model "$CARRY/$MODEL" \
    --searches "$SEARCHES" --json "$OUT/end_to_end.json" --markdown "$OUT/end_to_end.md" --configurations $CONFIGURATIONS \
    --budget-s $((LIMIT_S - 25)) --logs "$logs" ${ARGS:-} 2>&1 | tee "$logs/bench.log"
wait "$warm"
tail -n 1 "$logs/warm_build.log"
rm -rf "$logs/warm_build"
for log in "$logs"/server_*.log; do echo "--- $log"; grep -E "specgen|Error|Traceback" "$log" | tail -n 6 | cut -c1-300; done
[ -f "$CARRY/kernels.tar.xz" ] || tar -C "$CACHE" -cJf "$OUT/kernels.tar.xz" .
tar -C "$logs" -czf "$OUT/logs.tar.gz" .
