#!/usr/bin/env bash
# On a GPU host without this project installed: the evaluation's figures, each step with its own limit.
#   OUT=DIR bash bench/run_evaluation_on_gpu_host.sh PACK [SECONDS]
# PACK is what bench/pack_evaluation.sh made; SECONDS for everything. STEPS picks some of the steps and their order:
#   judge  answers without a row in the packed report, against scores.json
#   rate   Triton and CUDA C++ answers in a pool, then in loops of fresh processes, both at once; builds are kept for "twice"
#   twice  30 answers that the scores call correct, 10 of them CUDA C++, in one pool and then in another
#   storm  150 evaluations, every fifth faulty, as many as fit
#   tests  tests/evaluation/test_cuda.py and the GPU's exploits
#   profile  one Triton answer under ncu, the candidate confined
# A step's limit: JUDGE_S, RATE_LIMIT_S, TWICE_S, STORM_S, TESTS_S, PROFILE_S. Answers whose compiled library is in PACK
# are not compiled: a stand-in for ninja puts the library in its place, for the fresh processes too. DEVICE=cpu is a
# rehearsal. Leaves in OUT: evaluation.json and evaluation_storm.json (both written after every verdict),
# profile_ncu.json, *.log.
set -u
pack=$(realpath "$1") total=${2:-580}
DEVICE=${DEVICE:-cuda:0} STEPS=${STEPS:-judge rate twice storm tests profile} LABEL=${LABEL:-$(date +%F)}
LIGHT_WORKERS=${LIGHT_WORKERS:-4} WORKERS=${WORKERS:-8} HOST_FOLDER=${HOST_FOLDER:-/opt/specgen-evaluation}
export OUT PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 SPECGEN_COMMIT PYTHONPATH="$pack/src:$pack/site"
SPECGEN_COMMIT=$(cat "$pack/COMMIT")
OUT=$(realpath "$OUT")
cd "$pack/src" || exit
ln -sfn "$OUT" out
ln -sfn ../traces traces
nvidia-smi --query-gpu=name,driver_version,clocks.sm,memory.used --format=csv,noheader

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

step() { # NAME SECONDS COMMAND...: a step that fails does not stop the rest
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    [ "$limit" -le $((total - SECONDS)) ] || limit=$((total - SECONDS))
    if [ "$limit" -lt 15 ]; then
        echo "$name not run: $total s are over"
        return 0
    fi
    timeout -k 5 "$limit" "$@" >"out/$name.log" 2>&1
    echo "$name: status $?, $((SECONDS - start)) s of $limit; at $SECONDS s"
}

bench=(python3 -m bench.evaluation traces --scores traces/scores.json --json out/evaluation.json --label "$LABEL")
bench+=(--device "$DEVICE" --light-workers "$LIGHT_WORKERS" --workers "$WORKERS")
bench+=(--resume bench/results/evaluation_H200.json)
run_judge() {
    step judge "${JUDGE_S:-95}" "${bench[@]}" --budget-s $((${JUDGE_S:-95} - 15))
    grep -h ' s, sandbox' out/judge.log
}
run_rate() {
    step rate "${RATE_LIMIT_S:-170}" "${bench[@]}" --throughput 60 --rate-s "${RATE_S:-20}" \
        --cuda-rate-s "${CUDA_RATE_S:-60}" --fresh-s "${FRESH_S:-20}" --builds "$HOST_FOLDER/builds"
    grep -hE '^(triton|cuda) ' out/rate.log
}
run_twice() {
    local limit=${TWICE_S:-110}
    step twice "$limit" "${bench[@]}" --twice "${TWICE:-30}" --budget-s $((limit - 20)) --builds "$HOST_FOLDER/builds"
    grep -h ' s, sandbox' out/twice.log
    sed -n '/^{/,$p' out/twice.log | head -c 6000
}
run_storm() {
    step storm "${STORM_S:-85}" python3 -m bench.evaluation_storm --json out/evaluation_storm.json --evaluations 150 \
        --device "$DEVICE" --workers "$LIGHT_WORKERS" --seconds $((${STORM_S:-85} - 25))
    tail -c 1500 out/storm.log
}
run_tests() {
    step tests "${TESTS_S:-100}" python3 -m pytest tests/evaluation/test_cuda.py tests/exploits/test_exploits.py -m gpu -q \
        -p no:cacheprovider --timeout 60
    tail -n 25 out/tests.log
}
run_profile() {
    local answer=ours/rmsnorm_residual/iter-1/final.md
    [ "$DEVICE" != cpu ] || answer=ours/cpu_row_softmax/iter-1/final.md
    step profile "${PROFILE_S:-45}" python3 -m bench.profiles traces "$answer" --tools "${TOOLS:-ncu}" \
        --json out/profile_ncu.json --device "$DEVICE" --profile-s $((${PROFILE_S:-45} - 10))
    tail -n 20 out/profile.log
}
mkdir -p "$HOST_FOLDER/builds"
for name in $STEPS; do
    "run_$name"
done
nvidia-smi --query-gpu=memory.used,clocks.sm --format=csv,noheader
pgrep -cf worker_main
rm -f out
echo "over after $SECONDS s"
