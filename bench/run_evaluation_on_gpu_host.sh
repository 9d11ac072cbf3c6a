#!/usr/bin/env bash
# On a GPU host without this project installed: the evaluation's figures, each step with its own limit.
#   OUT=DIR bash bench/run_evaluation_on_gpu_host.sh PACK [SECONDS]
# PACK is what bench/pack_evaluation.sh made; SECONDS for everything. STEPS picks some of the steps and their order:
#   cancel  the GPU's test of cancelling at every stage, alone
#   tests   the rest of tests/evaluation/test_cuda.py, and the GPU's exploits
#   twice   30 answers that the scores call correct, 10 of them CUDA C++, in one pool and then in another
#   storm   500 evaluations, every fifth faulty, as many as fit
#   contexts  what making CUDA contexts takes, one and several at once
#   profile one Triton answer under ncu; says which sandbox the candidate was in
#   cute    a CuTe DSL candidate; skipped, and said so, where the package cutlass is missing
#   rate    Triton and CUDA C++ answers in a pool, then in loops of fresh processes, both at once
#   judge   answers without a row in the packed report, against scores.json
# A step's limit: CANCEL_S, TESTS_S, TWICE_S, STORM_S, CONTEXTS_S, PROFILE_S, CUTE_S, RATE_LIMIT_S, JUDGE_S; none goes on
# past SECONDS, one that fails or is cut off stops no other. Answers whose compiled library is in PACK are not compiled: a
# stand-in for ninja puts the library in its place, for the fresh processes too. EXTRA_PATH: folders of more packages, such
# as CuTe DSL's; a sandbox reads those named site-packages. DEVICE=cpu is a rehearsal. Leaves in OUT:
# evaluation.json and evaluation_storm.json (both written after every verdict), contexts.json, profile_ncu.json,
# cute.json, and all.log, what every step printed.
set -u
pack=$(realpath "$1") total=${2:-580}
DEVICE=${DEVICE:-cuda:0} STEPS=${STEPS:-cancel tests twice storm profile cute rate} LABEL=${LABEL:-$(date +%F)}
LIGHT_WORKERS=${LIGHT_WORKERS:-4} WORKERS=${WORKERS:-6} STORM_WORKERS=${STORM_WORKERS:-8}
HOST_FOLDER=${HOST_FOLDER:-/opt/specgen-evaluation}
export OUT PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SPECGEN_COMMIT PYTHONPATH="$pack/src:$pack/site-packages${EXTRA_PATH:+:$EXTRA_PATH}"
SPECGEN_COMMIT=$(cat "$pack/COMMIT")
mkdir -p "$OUT"
OUT=$(realpath "$OUT")
cd "$pack/src" || exit
ln -sfn "$OUT" out
ln -sfn ../traces traces
last=$(mktemp)  # what the last step printed
: >>out/all.log
gpu() { nvidia-smi --query-gpu="$1" --format=csv,noheader 2>/dev/null || echo "no nvidia-smi"; }
gpu name,driver_version,clocks.sm,memory.used

# The stand-in lies where a sandbox may read.
if [ -f "$pack/libraries.tar.xz" ]; then
    mkdir -p "$HOST_FOLDER/libraries" "$HOST_FOLDER/bin"
    tar xf "$pack/libraries.tar.xz" -C "$HOST_FOLDER/libraries"
    cat >"$HOST_FOLDER/bin/ninja" <<NINJA
#!/bin/sh
[ "\$1" = --version ] && exec $(command -v ninja) --version
key=\$(cat main.cpp cuda.cu 2>/dev/null | sha256sum | cut -c1-16)
if [ -e $HOST_FOLDER/libraries/\$key.so ]; then cp $HOST_FOLDER/libraries/\$key.so \$(sed -n 's/^default //p' build.ninja); exit 0; fi
exec $(command -v ninja) "\$@"
NINJA
    chmod +x "$HOST_FOLDER/bin/ninja"
    export PATH="$HOST_FOLDER/bin:$PATH"
fi

step() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 start=$SECONDS from
    shift 2
    limit=$(left "$limit")
    : >"$last"
    if [ "$limit" -lt 15 ]; then
        echo "$name not run: $total s are over"
        return 0
    fi
    echo "=== $name" >>out/all.log
    from=$(stat -c %s out/all.log)
    timeout -k 5 "$limit" "$@" >>out/all.log 2>&1
    local status=$?
    for _ in 1 2 3 4 5 6 7 8 9 10; do  # workers of a step that was cut off go by themselves
        pgrep -f worker_main >/dev/null || break
        sleep 0.5
    done
    echo "$name: status $status, $((SECONDS - start)) s of $limit; at $SECONDS s; GPU $(gpu memory.used)"
    tail -c +$((from + 1)) out/all.log >"$last"
}

left() { # SECONDS: so many, or what is left of all
    echo $(($1 <= total - SECONDS ? $1 : total - SECONDS))
}
bench=(python3 -m bench.evaluation traces --scores traces/scores.json --json out/evaluation.json --label "$LABEL")
bench+=(--device "$DEVICE" --light-workers "$LIGHT_WORKERS" --workers "$WORKERS")
bench+=(--resume bench/results/evaluation_H200.json)
run_judge() {
    local limit
    limit=$(left "${JUDGE_S:-95}")
    step judge "$limit" "${bench[@]}" --budget-s $((limit - 15))
    grep -h ' s, sandbox' "$last"
}
run_rate() {
    step rate "${RATE_LIMIT_S:-170}" "${bench[@]}" --throughput 60 --rate-s "${RATE_S:-20}" \
        --cuda-rate-s "${CUDA_RATE_S:-60}" --fresh-s "${FRESH_S:-20}" --builds "$HOST_FOLDER/builds"
    grep -hE '^(triton|cuda|torch) ' "$last"
}
run_twice() {
    local limit
    limit=$(left "${TWICE_S:-200}")
    step twice "$limit" "${bench[@]}" --twice "${TWICE:-30}" --budget-s $((limit - 20)) --builds "$HOST_FOLDER/builds"
    grep -h ' s, sandbox' "$last"
    sed -n '/"two_runs"/,$p' "$last" | head -c 2500
}
run_storm() {
    local limit
    limit=$(left "${STORM_S:-120}")
    step storm "$limit" python3 -m bench.evaluation_storm --json out/evaluation_storm.json \
        --evaluations "${STORM_EVALUATIONS:-500}" --device "$DEVICE" --workers "$STORM_WORKERS" --seconds $((limit - 25))
    tail -c 1500 "$last"
}
run_contexts() {
    step contexts "${CONTEXTS_S:-75}" python3 -m bench.evaluation_contexts --json out/contexts.json --device "$DEVICE"
    cut -c 1-400 "$last"
}
pytest=(python3 -m pytest -m gpu -q -rA -p no:cacheprovider --timeout 90)
run_cancel() {
    step cancel "${CANCEL_S:-90}" "${pytest[@]}" tests/evaluation/test_cuda.py -k cancelled
    grep -E '^(PASSED|FAILED|ERROR|E  )|passed|failed|skipped' "$last" | head -n 12
}
run_tests() {
    step tests "${TESTS_S:-100}" "${pytest[@]}" tests/evaluation/test_cuda.py tests/exploits/test_exploits.py \
        -k "not cancelled"
    grep -E '^(PASSED|FAILED|ERROR|E  )|passed|failed|skipped' "$last" | cut -c 1-300 | head -n 25
}
run_profile() {
    local answer=ours/rmsnorm_residual/iter-1/final.md
    [ "$DEVICE" != cpu ] || answer=ours/cpu_row_softmax/iter-1/final.md
    step profile "${PROFILE_S:-45}" python3 -m bench.profiles traces "$answer" --tools "${TOOLS:-ncu}" \
        --json out/profile_ncu.json --device "$DEVICE" --profile-s $((${PROFILE_S:-45} - 10))
    python3 - <<'P'
import json

for row in json.load(open("out/profile_ncu.json"))["profiles"]:
    made = row["profile"] or {}
    print("profile:", row["status"], "candidate timed in", row["sandbox"], "| profiled by", made.get("tool"), end=" ")
    print("in", made.get("sandbox"), "|", made.get("reason") or "as asked")
P
    tail -n 20 "$last"
}
run_cute() {
    local formats=tests/evaluation/formats
    step cute "${CUTE_S:-45}" python3 -m bench.evaluation_one $formats/kernelbench/scaled_softmax.py \
        $formats/candidates/scaled_softmax_cute.py --device "$DEVICE" --needs cutlass --json out/cute.json
    tail -n 3 "$last" | cut -c 1-1500
}
trap 'rm -f "$last"' EXIT
mkdir -p "$HOST_FOLDER/builds"
for name in $STEPS; do
    "run_$name"
done
gpu memory.used,clocks.sm
echo "workers left: $(pgrep -cf worker_main)"
echo "over after $SECONDS s"
