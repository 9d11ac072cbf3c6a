#!/usr/bin/env bash
# Builds, checks and measures the KV transport on a host with two GPUs and no network. Run from the project's root:
#   OUT=results bash bench/run_kv_on_gpu_host.sh
# Needs python3 with torch, nvcc, and the folder that `python -m bench.pack_gpu_host` made (CARRY, default build/carry).
# Each step has its own log and time limit; one that fails does not stop the rest. STEPS picks some of them; BENCH_S bounds
# the benchmark, TOTAL_S everything. Rehearsal without a GPU: BACKEND=loopback STEPS="bench failures".
# NIXL and Mooncake (packed with --peers) have a process each, with our rows for the same pages: a crash there costs no more.
# Leaves in OUT: kv_transfer.json, kv_nixl.json, kv_mooncake.json, kv_failures.json, headline.txt, logs.tar.gz with the rest.
set -u
OUT=${OUT:-kv_results}
CARRY=${CARRY:-build/carry}
BACKEND=${BACKEND:-cuda}
BENCH_S=${BENCH_S:-230}
TOTAL_S=${TOTAL_S:-470}
STEPS=${STEPS:-build bytes nixl mooncake bench links failures tests sanitizers ncu}
PEERS_S=${PEERS_S:-40}
SANITIZE_S=${SANITIZE_S:-240}
BENCH_ARGS=${BENCH_ARGS:---tune}
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
step bytes 90 "${gpu_tests[@]}" --maxfail 10 -k "test_every_byte or test_every_path or test_a_mixed"
case $? in
1 | 124 | 137)
    STEPS="${ON_WRONG_BYTES:-tests sanitizers}"
    echo "wrong bytes or a hang: only $STEPS" | tee -a "$summary"
    ;;
esac
if [ -f "$CARRY/peers.tar.xz" ] && [ ! -d "$logs/peers" ]; then
    mkdir "$logs/peers" && tar -C "$logs/peers" -xJf "$CARRY/peers.tar.xz"
fi
for library in nixl mooncake; do
    step "$library" $((PEERS_S + 25)) env PYTHONPATH="$PYTHONPATH:$logs/peers" \
        LD_LIBRARY_PATH="${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}/usr/local/cuda/lib64:$logs/peers/nixl_cu13.libs" \
        "$PYTHON" -m bench.kv_transfer --backend "$BACKEND" --json "$OUT/kv_$library.json" --libraries "$library" \
        --groups paths peers --only single sweep --chunk-kib 2 32 --skip layer-first --most-mib 64 --no-curve \
        --budget-s "$PEERS_S" "${sgl[@]}" "${quick[@]}"
done
rm -rf "$logs/peers"
# shellcheck disable=SC2086
step bench $((BENCH_S + 30)) "$PYTHON" -m bench.kv_transfer --backend "$BACKEND" --json "$OUT/kv_transfer.json" \
    --budget-s "$BENCH_S" --groups ours paths others both decode $BENCH_ARGS "${sgl[@]}" "${quick[@]}"
step links 30 "$PYTHON" -m bench.kv_links --json "$logs/kv_links.json"
step failures 40 "$PYTHON" -m bench.kv_failures --backend "$BACKEND" --json "$OUT/kv_failures.json"
step tests 60 "${gpu_tests[@]}" -k "not test_every_byte and not test_every_path and not test_a_mixed"
# The tests themselves, each tool on a GPU of its own; a pace can't be kept under them, and lenders' processes aren't followed.
sanitize() {
    CUDA_VISIBLE_DEVICES=$2 step "$1" "$SANITIZE_S" compute-sanitizer --tool "$1" --error-exitcode 9 "${our_kernels[@]}" \
        "$PYTHON" -m pytest tests/kv/test_gpu_copy.py -q -p no:cacheprovider --timeout 90 -k "not pace and not promises"
}
case " $STEPS " in *" sanitizers "*)
    our_kernels=() # torch's own need no look: the option that leaves them out has had several names
    for option in --kernel-regex --kernel-name --filter; do
        compute-sanitizer --help 2>&1 | grep -q -- "$option" && our_kernels=("$option" kns=_pages) && break
    done
    echo "sanitizers look at ${our_kernels[*]:-every kernel}" | tee -a "$summary"
    STEPS="$STEPS memcheck racecheck"
    sanitize memcheck 0 &
    sanitize racecheck 1
    wait
    ;;
esac
step ncu 40 ncu --clock-control none -k regex:copy_pages -c 2 --set full "$PYTHON" -m bench.kv_sanitize --mib 256
echo "--- steps"
cat "$summary"
for report in nixl mooncake transfer; do
    [ -f "$OUT/kv_$report.json" ] && "$PYTHON" -m bench.kv_headline "$OUT/kv_$report.json"
done >"$OUT/headline.txt"
tail -c 9000 "$OUT/headline.txt"
tar -C "$logs" -czf "$OUT/logs.tar.gz" . && rm -r "$logs"
