#!/usr/bin/env bash
# Plays bench.end_to_end on a host without network. Run from the project's root:
#   OUT=results SITE=site CARRY=packed bash bench/run_end_to_end_on_gpu_host.sh
# CARRY holds what `python -m bench.e2e_pack` made, SITE SGLang 0.5.17 with its dependencies. TRACES: folders below
# CARRY/traces. Leaves in OUT: end_to_end.json (a row as soon as its search ends), logs.tar.gz, kernels.tar.xz. Where the
# tokenizer's package is: the same command with --resume and --scores fills in the oracle and draws the figure.
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
# shellcheck disable=SC2086
folders=$(for trace in $TRACES; do echo "$CARRY/traces/$trace"; done)
# shellcheck disable=SC2086
timeout -k 10 "$LIMIT_S" "$PYTHON" -m bench.end_to_end --traces $folders --gpus "$GPUS" --model "$CARRY/$MODEL" \
    --searches "$SEARCHES" --json "$OUT/end_to_end.json" --configurations $CONFIGURATIONS --logs "$logs" ${ARGS:-} 2>&1 | tee "$logs/bench.log"
for log in "$logs"/server_*.log; do echo "--- $log"; grep -E "specgen|Error|Traceback" "$log" | tail -n 6 | cut -c1-300; done
[ -f "$CARRY/kernels.tar.xz" ] || tar -C "$CACHE" -cJf "$OUT/kernels.tar.xz" .
tar -C "$logs" -czf "$OUT/logs.tar.gz" .
