#!/usr/bin/env bash
# Everything that wants a GPU, in parts that go in order of value: tests that need one, the benchmarks of kernels, of a
# training step and of inference, kernels beside what compiles first, all other tests of kernels.
#
#     OUT=results MINUTES=9 bench/gpu.sh                    all parts
#     OUT=results MINUTES=4 bench/gpu.sh tests kernels      these, to mend what they show before the others
#
# Results go to $OUT (default: bench/results/gpu) as they come, so a run that is cut off loses little; a part that fails
# or runs out of its time does not stop the next ones, and shows in log.txt and in the exit status.
#
# Needs torch, triton, transformers, pytest and pytest-benchmark; installs effbert alone, without its other dependencies.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
MINUTES=${MINUTES:-9}
ALL="tests kernels step inference compiled all-tests"
PARTS=("$@")
[ $# -gt 0 ] || PARTS=($ALL)
declare -A MOST=([tests]=150 [kernels]=200 [step]=80 [inference]=100 [compiled]=240 [all-tests]=120)  # seconds
OPS="mlp_block score_mse projected_mse distill_attention dropout_add_layer_norm attention soft_cross_entropy mlp dropout"
export PYTHONUNBUFFERED=1
for part in "${PARTS[@]}"; do
    if [ -z "${MOST[$part]:-}" ]; then
        echo "bench/gpu.sh: no part $part; parts: $ALL" >&2
        exit 2
    fi
done
mkdir -p "$OUT"
: >"$OUT/log.txt"
status=0

say() { echo "$*" | tee -a "$OUT/log.txt"; }

seconds_for() {  # what a part may take: its most, and what is left of the time, at least 3 seconds
    local left=$((60 * MINUTES - SECONDS))
    [ "$left" -lt "${MOST[$1]}" ] || left=${MOST[$1]}
    echo $((left > 3 ? left : 3))
}

run() {  # run SECONDS COMMAND...; ended as by Ctrl-C, at which pytest tells what has failed so far
    local seconds=$1 begun=$SECONDS code
    shift
    say "\$ $*"
    timeout --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$OUT/log.txt"
    code=${PIPESTATUS[0]}
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then
        say "stopped after $seconds s: $*"
    else
        say "exit $code after $((SECONDS - begun)) s: $*"
    fi
    [ "$code" = 0 ] || status=1
}

installed() { python3 -c "import $1" 2>/dev/null; }

warm_up() {  # compile the kernels of the benchmarks to come, a process an op, beside what goes on; Triton keeps them
    local op parts=" ${PARTS[*]} "
    if [[ $parts == *" kernels "* || $parts == *" compiled "* ]]; then
        for op in $OPS; do
            timeout 200 python3 -m effbert.bench.kernels --ops "$op" --warm-up >/dev/null 2>&1 &
        done
    fi
    if [[ $parts == *" step "* ]]; then
        timeout 200 python3 -m effbert.bench.step --warm-up >/dev/null 2>&1 &
    fi
}

runnable() {  # those of these files of tests whose libraries are here
    local file
    for file in "$@"; do
        if grep -qE '^(import|from) hypothesis' "$file" && ! installed hypothesis; then
            say "left out: $file (hypothesis is not installed)" >&2
        else
            echo "$file"
        fi
    done
}

workers=()
installed xdist && workers=(-n 8)
nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit,memory.total --format=csv 2>&1 | tee -a "$OUT/log.txt"
run 60 python3 -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
warm_up
for part in "${PARTS[@]}"; do
    [ "$part" = tests ] || wait  # nothing runs beside what is timed
    seconds=$(seconds_for "$part")
    case $part in
    tests)
        mapfile -t files < <(runnable $(grep -rlE '^[^#]*mark\.gpu' tests --include='test_*.py'))
        run "$seconds" python3 -m pytest -q -m gpu --benchmark-skip "${workers[@]}" "${files[@]}"
        ;;
    all-tests)  # of what starts kernels: those that have a device to start them on
        mapfile -t files < <(runnable $(grep -lE '^def .*\bdevice\b' tests/kernels/test_*.py))
        run "$seconds" python3 -m pytest -q "${workers[@]}" "${files[@]}"
        ;;
    kernels) run "$seconds" python3 -m effbert.bench.kernels --passes eager --output "$OUT/kernels.json" ;;
    compiled) run "$seconds" python3 -m effbert.bench.kernels --passes compile --output "$OUT/kernels-compiled.json" ;;
    step) run "$seconds" python3 -m effbert.bench.step --output "$OUT/step.json" ;;
    inference)
        run "$seconds" python3 -m effbert.bench.inference --runtimes gpu-graph gpu-bf16 gpu-fp32 --batch_sizes 1 32 \
            --models efficientbert bert-base tinybert-4 bert-equal --lengths 128 --rounds 3 --seconds 0.1 \
            --output "$OUT/inference.json"
        ;;
    esac
done
say "done after $SECONDS s, status $status"
exit "$status"
