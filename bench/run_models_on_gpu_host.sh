#!/usr/bin/env bash
# Checks GLM-5 and DeepSeek-V4 on a host with one or two GPUs and no network. Run from the project's root:
#   OUT=results CASES="glm5-small:plain" bash bench/run_models_on_gpu_host.sh
# Needs python3 with torch, and in CARRY (default build/carry_models) what `python -m bench.models_pack` made, and in
# SITE SGLang 0.5.17 with its dependencies. Leaves in OUT: models.json and logs.tar.gz.
set -u
OUT=${OUT:-models_results}
CARRY=${CARRY:-build/carry_models}
SITE=${SITE:-site}
CASES=${CASES:-glm5-small:plain@0 glm5-small:tier@0 glm5-small:mtp@0 glm5-small:tp2 deepseek-v4-small:plain@1 deepseek-v4-small:mtp@1}
STEPS=${STEPS:-smoke forks restores slowdown storm}
BUDGET_S=${BUDGET_S:-280}
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
logs=$(mktemp -d)
export PYTHONPATH=".:$CARRY/site:$SITE" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
export FLASHINFER_WORKSPACE_BASE=$logs/flashinfer TRITON_CACHE_DIR=${CACHE:-/tmp/specgen_cache}/triton
export TVM_FFI_CACHE_DIR=${CACHE:-/tmp/specgen_cache}/tvm
export SGLANG_DG_CACHE_DIR=${CACHE:-/tmp/specgen_cache}/deep_gemm SGLANG_JIT_DEEPGEMM_PRECOMPILE=0 SPECGEN_COMMIT=$(cat "$CARRY/COMMIT")
cp "$CARRY"/prebuilt/_kv*.so specgen_engine/ 2>/dev/null
nvidia-smi >"$logs/nvidia-smi.txt" 2>&1
# shellcheck disable=SC2086 # lists of words
timeout -k 5 $((BUDGET_S + 10)) "$PYTHON" -m bench.models --json "$OUT/models.json" --logs "$logs" --cases $CASES \
    --steps $STEPS --budget-s "$BUDGET_S" >"$logs/bench.log" 2>&1
status=$?
echo "bench.models: status $status, $SECONDS s"
tail -n 60 "$logs/bench.log" | cut -c1-700
for log in "$logs"/server_*.log; do echo "--- ${log##*/}"; grep -E "Error|error:|specgen:|memory leak|not found|undefined" "$log" | tail -n 5 | cut -c1-300; done
rm -rf "$logs/flashinfer"
tar -C "$logs" -czf "$OUT/logs.tar.gz" .
exit $status
