#!/usr/bin/env bash
# Checks and measures the remote KV tier on a host with two GPUs and no network. Run from the project's root:
#   OUT=results bash bench/run_kv_tier_on_gpu_host.sh
# Needs python3 with torch, and in CARRY (default build/carry_tier) what `python -m bench.kv_tier_pack` made, and in
# SITE SGLang 0.5.17 with its dependencies. All servers start at once; the page tests and the check under the triton
# backend are over before the 8B servers are up, the check under flashinfer waits until the measuring is done.
# Leaves in OUT: kv_tier.json, kv_tier.png, kv_tier_check.json, kv_tier_flashinfer.json, and logs.tar.gz.
set -u
OUT=${OUT:-kv_tier_results}
CARRY=${CARRY:-build/carry_tier}
SITE=${SITE:-site}
BENCH_S=${BENCH_S:-290}
LAST_S=${LAST_S:-50}
LONGEST=${LONGEST:-64000}
ATTENTION=${ATTENTION:-triton}
MEASURE=${MEASURE:-alone crowd decodes searches} # only what these need is started, pinned and computed
STEPS=${STEPS:-tests check flashinfer bench}  # all servers of all steps start at once: with bench alone it has the host to itself
PYTHON=${PYTHON:-python3}
mkdir -p "$OUT"
logs=$(mktemp -d)
export PYTHONPATH=".:$CARRY/site:$SITE" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
# Kernels that the engine compiles at its first start (80 s): kept in CACHE, and taken from CARRY/kernels.tar.xz if there.
CACHE=${CACHE:-/tmp/specgen_cache}
mkdir -p "$CACHE"
[ ! -f "$CARRY/kernels.tar.xz" ] || tar -C "$CACHE" --skip-old-files -xJf "$CARRY/kernels.tar.xz"
export FLASHINFER_WORKSPACE_BASE=$CACHE/flashinfer TRITON_CACHE_DIR=$CACHE/triton TVM_FFI_CACHE_DIR=$CACHE/tvm
export XDG_CACHE_HOME=$CACHE/xdg SPECGEN_COMMIT=$(cat "$CARRY/COMMIT")
mkdir -p "$SITE/flashinfer/data/cutlass/tools/util/include" # what a slim bundle of FlashInfer leaves out
cp -r "$CARRY"/cutlass_util/. "$SITE/flashinfer/data/cutlass/tools/util/include/"
for model in qwen3-8b small; do cp "$CARRY/tokenizer.json" "$CARRY/$model/"; done
cp "$CARRY"/prebuilt/_kv*.so specgen_engine/ 2>/dev/null || "$PYTHON" -m bench.gpu_build --jobs 16 >"$logs/build.log" 2>&1
"$PYTHON" -c 'from specgen_engine.kv.native import _kv; print("_kv", _kv.HAS_CUDA, _kv.device_count())'
nvidia-smi >"$logs/nvidia-smi.txt" 2>&1

on() { case " $STEPS " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }
on tests && timeout -k 5 120 "$PYTHON" -m pytest tests/tier/test_pool.py tests/tier/test_two_ranks.py -q -p no:cacheprovider >"$logs/pool.log" 2>&1 &
tests=$!
on check && timeout -k 5 "$BENCH_S" "$PYTHON" -m bench.kv_tier_check --json "$OUT/kv_tier_check.json" --model "$CARRY/small" \
    --attention-backend triton --logs "$logs" >"$logs/check.log" 2>&1 &
check=$!
on flashinfer && timeout -k 5 $((BENCH_S + LAST_S)) "$PYTHON" -m bench.kv_tier_check --json "$OUT/kv_tier_flashinfer.json" \
    --model "$CARRY/small" --attention-backend triton flashinfer --logs "$logs" --wait-for "$logs/measured" >"$logs/flashinfer.log" 2>&1 &
last=$!
on bench && timeout -k 5 "$BENCH_S" "$PYTHON" -m bench.kv_tier --json "$OUT/kv_tier.json" --plot "$OUT/kv_tier.png" --model "$CARRY/qwen3-8b" \
    --attention-backend "$ATTENTION" --budget-s $((BENCH_S - 10)) --longest "$LONGEST" --measure $MEASURE --logs "$logs" --wait-for-pids $tests $check >"$logs/bench.log" 2>&1
echo "bench status $?, $SECONDS s"
touch "$logs/measured"
wait $tests; echo "page tests status $?"
wait $check; echo "check under triton status $?"
wait $last; echo "check under flashinfer status $?, $SECONDS s"
for name in pool check flashinfer bench; do echo "--- $name"; tail -n 25 "$logs/$name.log" | cut -c1-600; done
for log in "$logs"/server_*.log "$logs"/check_*.log; do echo "--- $log"; grep -E "remote KV tier|specgen:|Error|memory leak" "$log" | tail -n 4 | cut -c1-300; done
tar -C "$logs" -czf "$OUT/logs.tar.gz" .
