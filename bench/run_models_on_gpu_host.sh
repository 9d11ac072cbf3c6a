#!/usr/bin/env bash
# Checks GLM-5 and DeepSeek-V4 on a host with one or two GPUs and no network. Run from the project's root:
#   OUT=results CASES="glm5-small:plain" bash bench/run_models_on_gpu_host.sh
# Needs python3 with torch, and in CARRY (default build/carry_models) what `python -m bench.models_pack` made, and in
# SITE SGLang 0.5.17 with its dependencies. Leaves in OUT: models.json, logs.tar.gz and kernels.tar.xz.
# Ends at most BUDGET_S + 25 s after its start, and the packing of kernels (some 10 s) later; WARM=1 only starts the
# servers, so that their kernels lie in CACHE.
set -u
OUT=${OUT:-models_results}
CARRY=${CARRY:-build/carry_models}
SITE=${SITE:-site}
CASES=${CASES:-glm5-small:invariant-tier@0 deepseek-v4-small:plain@0 deepseek-v4-small:tier@0 deepseek-v4-small:mtp-accepted@0 deepseek-v4-small:fp32-head@0}
# What was never reached comes first; what is timed waits until nothing else runs.
STEPS=${STEPS:-smoke forks storm restores slowdown}
[ -z "${WARM:-}" ] || STEPS=smoke
BUDGET_S=${BUDGET_S:-285}
PYTHON=${PYTHON:-python3}
# Kernels that servers compile at their first start (two minutes): kept in CACHE, and taken from CARRY/kernels.tar.xz.
# They are found again where SITE and CACHE are the same paths as when they were compiled.
CACHE=${CACHE:-/tmp/specgen_cache}
mkdir -p "$OUT" "$CACHE"
logs=$(mktemp -d)
[ ! -f "$CARRY/kernels.tar.xz" ] || tar -C "$CACHE" --skip-old-files -xJf "$CARRY/kernels.tar.xz"
touch "$logs/begun"
export PYTHONPATH=".:$CARRY/site:$SITE" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
export FLASHINFER_WORKSPACE_BASE=$CACHE/flashinfer TRITON_CACHE_DIR=$CACHE/triton TVM_FFI_CACHE_DIR=$CACHE/tvm
export TORCHINDUCTOR_CACHE_DIR=$CACHE/inductor CUDA_CACHE_PATH=$CACHE/nv XDG_CACHE_HOME=$CACHE/xdg
export SGLANG_DG_CACHE_DIR=$CACHE/deep_gemm SGLANG_JIT_DEEPGEMM_PRECOMPILE=0 SPECGEN_COMMIT=$(cat "$CARRY/COMMIT")
cp "$CARRY"/prebuilt/_kv*.so specgen_engine/ 2>/dev/null
nvidia-smi >"$logs/nvidia-smi.txt" 2>&1
# shellcheck disable=SC2086 # lists of words
timeout -k 5 $((BUDGET_S + 20)) "$PYTHON" -m bench.models --json "$OUT/models.json" --logs "$logs" --cases $CASES \
    --steps $STEPS --budget-s "$BUDGET_S" >"$logs/bench.log" 2>&1
status=$?
echo "bench.models: status $status, $SECONDS s"
tail -n 60 "$logs/bench.log" | cut -c1-700
for log in "$logs"/server_*.log; do echo "--- ${log##*/}"; grep -E "Error|error:|specgen:|memory leak|not found|undefined" "$log" | tail -n 5 | cut -c1-300; done
echo "kernels compiled in this run: $(find "$CACHE" -newer "$logs/begun" \( -name '*.so' -o -name '*.cubin' \) | wc -l)"
tar -C "$logs" -czf "$OUT/logs.tar.gz" .
XZ_OPT="-T0 -3" tar -C "$CACHE" -cJf "$OUT/kernels.tar.xz" .
exit $status
