"""bench/gpu.sh goes on when a part fails, leaves out what cannot run, and says so in its exit status."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "bench" / "gpu.sh"
STAND_IN = """#!/bin/bash
echo "$@" >>"$CALLS"
case "$*" in
    "-c import hypothesis") exit 1 ;;
    *"$FAILING"*) echo broken; exit 3 ;;
    *"$HANGING"*) sleep 60 ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    """Runs the script with a python3 that only notes its arguments; the exit status, the calls and the results."""
    checkout, tools = tmp_path / "checkout", tmp_path / "tools"
    for folder in (checkout / "bench", checkout / "tests/kernels", tools):
        folder.mkdir(parents=True)
    shutil.copy(SCRIPT, checkout / "bench")
    (checkout / "tests/kernels/test_linear.py").write_text("import hypothesis\n")
    (checkout / "tests/kernels/test_norm.py").write_text("import torch\n")
    (checkout / "tests/test_marked.py").write_text("pytestmark = pytest.mark.gpu\n")
    stand_in = tools / "python3"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def run(failing="nothing", hanging="nothing", minutes=9):
        environment = dict(
            os.environ,
            PATH=f"{tools}:{os.environ['PATH']}",
            CALLS=str(tmp_path / "calls"),
            OUT=str(tmp_path / "out"),
            FAILING=failing,
            HANGING=hanging,
            MINUTES=str(minutes),
        )
        command = ["bash", str(checkout / "bench/gpu.sh")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
        parts = [line for line in (tmp_path / "calls").read_text().splitlines() if not line.startswith("-c import")]
        return done.returncode, parts, (tmp_path / "out/run.txt").read_text()

    return run


def ordered(parts):
    """The calls that follow each other, without the warming ones beside them."""
    return [call for call in parts if "--no-compile" not in call]


def test_parts_run_in_order_of_value_and_the_kernels_are_compiled_beside_them(run):
    status, parts, log = run()
    install, gpu, kernel_tests, kernels, step, inference = ordered(parts)
    assert status == 0, log
    assert install.startswith("-m pip install") and "--no-deps" in install
    assert gpu == "-m pytest -q -m gpu -n 8 tests/test_marked.py"
    assert kernel_tests == "-m pytest -q -n 8 tests/kernels/test_norm.py"
    assert kernels.startswith("-m effbert.bench.kernels --output") and step.startswith("-m effbert.bench.step --output")
    assert inference.startswith("-m effbert.bench.inference --runtimes gpu-bf16")
    assert "left out: tests/kernels/test_linear.py (hypothesis is not installed)" in log
    assert len(parts) == 6 + 9


def test_a_failing_part_does_not_stop_the_others(run):
    status, parts, log = run(failing="pytest -q -m gpu")
    assert status == 1 and len(ordered(parts)) == 6
    assert "exit 3" in log and log.count("exit 0") == 5


def test_a_part_that_hangs_is_stopped(run):
    status, parts, log = run(hanging="bench.kernels --output", minutes=0)
    assert status == 1 and ordered(parts)[-2].startswith("-m effbert.bench.step")
    assert "stopped after 3 s: python3 -m effbert.bench.kernels" in log
