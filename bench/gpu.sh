#!/usr/bin/env bash
# Everything that wants a GPU, in one go and in order of value: tests, then the benchmarks of kernels, of a training step
# and of inference.
# Results go to $OUT (default: bench/results/gpu) as they come, so a run that is cut off loses little; a part that fails
# or runs out of its time does not stop the next ones, and shows in run.txt and in the exit status.
#
#     OUT=results MINUTES=30 bench/gpu.sh
#
# Needs torch, triton, transformers, pytest and pytest-benchmark; installs effbert alone, without its other dependencies.
set -uo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results/gpu}
MINUTES=${MINUTES:-9}
STEP_SECONDS=80
INFERENCE_SECONDS=90
export PYTHONUNBUFFERED=1
mkdir -p "$OUT"
: >"$OUT/run.txt"
status=0

say() { echo "$*" | tee -a "$OUT/run.txt"; }

left() {  # left SECONDS_KEPT: what remains of the time, at least 3 seconds
    local seconds=$((60 * MINUTES - SECONDS - $1))
    echo $((seconds > 3 ? seconds : 3))
}

part() {  # part LOG SECONDS COMMAND...; as by Ctrl-C, at which pytest tells what has failed so far
    local log=$1 seconds=$2 begun=$SECONDS code
    shift 2
    echo "\$ $*" >>"$OUT/$log"
    timeout --signal=INT --kill-after=10 "$seconds" "$@" 2>&1 | tee -a "$OUT/$log"
    code=${PIPESTATUS[0]}
    if [ "$code" = 124 ] || [ "$code" = 137 ]; then
        say "stopped after $seconds s: $*"
    else
        say "exit $code after $((SECONDS - begun)) s: $*"
    fi
    [ "$code" = 0 ] || status=1
}

installed() { python3 -c "import $1" 2>/dev/null; }

nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit,memory.total --format=csv 2>&1 | tee -a "$OUT/run.txt"
part run.txt 60 python3 -m pip install --quiet --no-deps --no-build-isolation -e .

# The kernels that the benchmarks will run are compiled by one process an op, beside the tests; Triton keeps them.
warm=$(mktemp -d)
for op in mlp_block score_mse projected_mse distill_attention dropout_add_layer_norm attention soft_cross_entropy mlp dropout
do
    timeout 240 python3 -m effbert.bench.kernels --ops "$op" --no-compile --output "$warm/$op.json" >/dev/null 2>&1 &
done

tests=()
for file in tests/kernels/test_*.py; do
    if grep -qE '^(import|from) hypothesis' "$file" && ! installed hypothesis; then
        say "left out: $file (hypothesis is not installed)"
    else
        tests+=("$file")
    fi
done
mapfile -t marked < <(grep -rl 'mark\.gpu' tests --include='test_*.py' | grep -v '^tests/kernels/')
workers=()
installed xdist && workers=(-n 8)
part tests.txt 100 python3 -m pytest -q -m gpu "${workers[@]}" "${marked[@]}"
part tests.txt 200 python3 -m pytest -q "${workers[@]}" "${tests[@]}"
wait
rm -rf "$warm"

part kernels.txt "$(left $((STEP_SECONDS + INFERENCE_SECONDS)))" python3 -m effbert.bench.kernels --output "$OUT/kernels.json"
part step.txt "$(left "$INFERENCE_SECONDS")" python3 -m effbert.bench.step --output "$OUT/step.json"
part inference.txt "$(left 0)" python3 -m effbert.bench.inference --runtimes gpu-bf16 gpu-graph gpu-fp32 --lengths 128 \
    --output "$OUT/inference.json"
say "done after $SECONDS s, status $status"
exit "$status"
