#!/usr/bin/env bash
# Builds, checks and measures the KV transport on a host with two GPUs and no network. Run from the project's root:
#   OUT=results bash bench/run_kv_on_gpu_host.sh
# Needs python3 with torch, nvcc, and the folder that `python -m bench.pack_gpu_host` made (CARRY, default build/carry).
# Each step has its own log and time limit; one that fails does not stop the rest. STEPS picks some of them; BENCH_S bounds
# the benchmark, TOTAL_S everything. Rehearsal without a GPU: BACKEND=loopback STEPS="bench failures".
# Leaves in OUT: kv_transfer.json, kv_failures.json, headline.txt, and logs.tar.gz with everything else.
set -u
OUT=${OUT:-kv_results}
CARRY=${CARRY:-build/carry}
BACKEND=${BACKEND:-cuda}
BENCH_S=${BENCH_S:-230}
TOTAL_S=${TOTAL_S:-470}
STEPS=${STEPS:-build bytes bench links failures tests racecheck memcheck ncu}
PYTHON=${PYTHON:-python3}
logs=$(mktemp -d)
mkdir -p "$OUT"
export PYTHONPATH=".:$CARRY/site${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
[ -f "$CARRY/COMMIT" ] && export SPECGEN_COMMIT=${SPECGEN_COMMIT:-$(cat "$CARRY/COMMIT")}
sgl=()
[ -f "$CARRY/sgl_kernel.so" ] && sgl=(--sgl-kernel "$CARRY/sgl_kernel.so")
quick=()
[ "$BACKEND" = loopback ] && quick=(--quick)
summary=$logs/steps.txt
: >"$summary"

step() {
    local name=$1 limit=$2 start=$SECONDS status
    shift 2
    case " $STEPS " in *" $name "*) ;; *) return 0 ;; esac
    [ "$limit" -le $((TOTAL_S - SECONDS)) ] || limit=$((TOTAL_S - SECONDS))
    if [ "$limit" -lt 15 ]; then
        echo "$name not run: $TOTAL_S s are over" | tee -a "$summary"
        return 0
    fi
    timeout -k 10 "$limit" "$@" >"$logs/$name.log" 2>&1
    status=$?
    printf '%-10s status %3d %4d s of %d\n' "$name" "$status" $((SECONDS - start)) "$limit" | tee -a "$summary"
    [ "$status" -eq 0 ] || tail -n 15 "$logs/$name.log"
    return "$status"
}

nvidia-smi >"$logs/nvidia-smi.txt" 2>&1
nvidia-smi topo -m >>"$logs/nvidia-smi.txt" 2>&1
step build 60 "$PYTHON" -m bench.gpu_build --include "$CARRY/include" --jobs 16
if [ "$BACKEND" = cuda ] && ! ls specgen_engine/_kv.cpython-312*.so >/dev/null 2>&1 && ls "$CARRY"/prebuilt/_kv*.so >/dev/null 2>&1; then
    cp "$CARRY"/prebuilt/_kv*.so specgen_engine/ && echo "not built here: using the carried extension" | tee -a "$summary"
fi
gpu_tests=("$PYTHON" -m pytest tests/kv/test_gpu_copy.py -q -p no:cacheprovider --timeout 60)
# Kernels that move wrong bytes are not worth measuring: then only the sanitizers look at them.
step bytes 90 "${gpu_tests[@]}" --maxfail 10 -k test_every_byte
case $? in
1 | 124 | 137)
    STEPS="tests racecheck memcheck"
    echo "wrong bytes or a hang: nothing is measured" | tee -a "$summary"
    ;;
esac
step bench $((BENCH_S + 30)) "$PYTHON" -m bench.kv_transfer --backend "$BACKEND" --json "$OUT/kv_transfer.json" --tune \
    --budget-s "$BENCH_S" "${sgl[@]}" "${quick[@]}"
step links 30 "$PYTHON" -m bench.kv_links --json "$logs/kv_links.json"
step failures 40 "$PYTHON" -m bench.kv_failures --backend "$BACKEND" --json "$OUT/kv_failures.json"
step tests 60 "${gpu_tests[@]}" -k "not test_every_byte"
step racecheck 50 compute-sanitizer --tool racecheck --error-exitcode 9 "$PYTHON" -m bench.kv_sanitize
step memcheck 40 compute-sanitizer --tool memcheck --error-exitcode 9 "$PYTHON" -m bench.kv_sanitize
step ncu 40 ncu --clock-control none -k regex:copy_pages -c 2 --set full "$PYTHON" -m bench.kv_sanitize --mib 256
echo "--- steps"
cat "$summary"
[ -f "$OUT/kv_transfer.json" ] && "$PYTHON" -m bench.kv_headline "$OUT/kv_transfer.json" | tee "$OUT/headline.txt"
tar -C "$logs" -czf "$OUT/logs.tar.gz" . && rm -r "$logs"
