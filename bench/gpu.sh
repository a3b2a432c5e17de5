#!/usr/bin/env bash
# Everything that wants a GPU, in one go: the tests marked gpu, then the benchmarks. Results go to $OUT (default: here).
# Needs torch, transformers and pytest-benchmark on the machine; installs effbert alone, without its other dependencies.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-bench/results}
mkdir -p "$OUT"
python3 -m pip install --quiet --no-deps --no-build-isolation -e .
nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv | tee "$OUT/device.csv"
status=0
python3 -m pytest -m gpu tests/effbert/test_gpu.py -q 2>&1 | tee "$OUT/gpu-tests.txt" || status=$?
python3 -m effbert.bench.step --output "$OUT/step.json"
exit "$status"
