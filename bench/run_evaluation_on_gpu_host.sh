#!/usr/bin/env bash
# On a GPU host without this project installed: the evaluation's figures, each step with its own limit.
#   OUT=DIR bash bench/run_evaluation_on_gpu_host.sh PACK [SECONDS]
# PACK is what bench/pack_evaluation.sh made; SECONDS for everything. STEPS picks some of the steps:
#   judge  answers without a row in the packed report, against scores.json
#   rate   60 Triton and 60 CUDA answers, warm pool and fresh processes; the pool's verdicts are a second run of "judge"
#   storm  500 evaluations, every fifth faulty, as many as fit
#   tests  tests/evaluation/test_cuda.py and the GPU's exploits
#   profile  one Triton answer under ncu, the candidate confined
# Answers whose compiled library is in PACK are not compiled: a stand-in for ninja puts the library in its place, for the
# fresh processes too. DEVICE=cpu is a rehearsal. Leaves in OUT: evaluation.json (written after every verdict),
# evaluation_storm.json, profile_ncu.json, *.log.
set -u
pack=$(realpath "$1") total=${2:-415}
DEVICE=${DEVICE:-cuda:0} STEPS=${STEPS:-judge rate storm tests profile} LABEL=${LABEL:-$(date +%F)}
LIGHT_WORKERS=${LIGHT_WORKERS:-4} WORKERS=${WORKERS:-4} HOST_FOLDER=${HOST_FOLDER:-/opt/specgen-evaluation}
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
    case " $STEPS " in *" $name "*) ;; *) return 0 ;; esac
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
step judge 95 "${bench[@]}" --budget-s 80
grep -h ' s, sandbox' out/judge.log
step rate 210 "${bench[@]}" --throughput 60 --rate-s "${RATE_S:-58}" --fresh-s "${FRESH_S:-32}"
grep -hE '^(triton|cuda) ' out/rate.log
sed -n '/^{/,$p' out/rate.log | head -c 5000
room=$((total - SECONDS - 110))
[ "$room" -le 130 ] || room=130
step storm $((room + 20)) python3 -m bench.evaluation_storm --json out/evaluation_storm.json --evaluations 500 \
    --device "$DEVICE" --workers "$LIGHT_WORKERS" --seconds "$room"
tail -c 1500 out/storm.log
step tests 70 python3 -m pytest tests/evaluation/test_cuda.py tests/exploits/test_exploits.py -m gpu -q -p no:cacheprovider \
    --timeout 60
tail -n 25 out/tests.log
step profile 40 python3 -m bench.profiles traces ours/rmsnorm_residual/iter-1/final.md --tools ncu --json out/profile_ncu.json \
    --device "$DEVICE" --profile-s 30
tail -n 20 out/profile.log
nvidia-smi --query-gpu=memory.used,clocks.sm --format=csv,noheader
pgrep -cf worker_main
rm -f out
echo "over after $SECONDS s"
