"""bench/gpu.sh goes on when a part fails, leaves out what cannot run, and says so in its exit status."""

import os
import re
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
    (checkout / "tests/kernels/test_linear.py").write_text("import hypothesis\ndef test_it(device): ...\n")
    (checkout / "tests/kernels/test_norm.py").write_text("import torch\ndef test_it(device, dtype): ...\n")
    (checkout / "tests/kernels/test_sources.py").write_text("import torch\ndef test_it(): ...\n")
    (checkout / "tests/test_marked.py").write_text("pytestmark = pytest.mark.gpu\n")
    stand_in = tools / "python3"
    stand_in.write_text(STAND_IN)
    stand_in.chmod(0o755)

    def run(*parts, failing="nothing", hanging="nothing", minutes=9):
        environment = dict(
            os.environ,
            PATH=f"{tools}:{os.environ['PATH']}",
            CALLS=str(tmp_path / "calls"),
            OUT=str(tmp_path / "out"),
            FAILING=failing,
            HANGING=hanging,
            MINUTES=str(minutes),
        )
        command = ["bash", str(checkout / "bench/gpu.sh"), *parts]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)

    return run


@pytest.fixture
def called(tmp_path):
    """The calls that follow each other after the installation, without the warming ones beside them."""

    def called():
        calls = (tmp_path / "calls").read_text().splitlines()
        calls = [call for call in calls if not call.startswith("-c import") and "--warm-up" not in call]
        assert calls[0].startswith("-m pip install") and "--no-deps" in calls[0]
        return [call.removeprefix("-m ") for call in calls[1:]]

    return called


def test_parts_run_in_order_of_value_and_the_kernels_are_compiled_beside_them(run, called, tmp_path):
    done = run()
    gpu, kernels, step, inference, compiled, all_tests = called()
    assert done.returncode == 0, done.stderr
    assert gpu == "pytest -q -m gpu --benchmark-skip -n 8 tests/test_marked.py"
    assert all_tests == "pytest -q -n 8 tests/kernels/test_norm.py"
    assert kernels.startswith("effbert.bench.kernels --passes eager --output")
    assert compiled.startswith("effbert.bench.kernels --passes compile --output")
    assert step.startswith("effbert.bench.step --output")
    assert inference.startswith("effbert.bench.inference --runtimes gpu-graph")
    assert (
        "left out: tests/kernels/test_linear.py (hypothesis is not installed)" in (tmp_path / "out/log.txt").read_text()
    )
    assert (tmp_path / "calls").read_text().count("--warm-up") == 10


def test_parts_can_be_chosen_and_only_what_they_need_is_compiled_ahead(run, called, tmp_path):
    assert run("compiled", "step").returncode == 0
    compiled, step = called()
    assert "--passes compile" in compiled and "bench.step" in step
    assert (tmp_path / "calls").read_text().count("--warm-up") == 10
    (tmp_path / "calls").unlink()
    assert run("step", "inference").returncode == 0
    assert (tmp_path / "calls").read_text().count("--warm-up") == 1


def test_an_unknown_part_is_one_line_and_runs_nothing(run, tmp_path):
    done = run("tests", "speed")
    assert done.returncode == 2 and not (tmp_path / "calls").exists()
    assert done.stderr == "bench/gpu.sh: no part speed; parts: tests kernels step inference compiled all-tests\n"


def test_a_failing_part_does_not_stop_the_others(run, called, tmp_path):
    assert run(failing="pytest -q -m gpu").returncode == 1
    log = (tmp_path / "out/log.txt").read_text()
    assert len(called()) == 6 and "exit 3" in log and log.count("exit 0") == 6


def test_a_part_that_hangs_is_stopped(run, called, tmp_path):
    assert run(hanging="--passes eager", minutes=0).returncode == 1
    assert len(called()) == 6
    log = (tmp_path / "out/log.txt").read_text()
    assert "stopped after 3 s: python3 -m effbert.bench.kernels --passes eager" in log


def test_the_files_that_start_kernels_are_found():
    """The script goes by the name of a fixture: those files of this checkout that it finds start kernels."""
    tests = SCRIPT.parents[1] / "tests/kernels"
    found = {path.name for path in tests.glob("test_*.py") if re.search(r"(?m)^def .*\bdevice\b", path.read_text())}
    assert {"test_linear.py", "test_candidate_mlp.py", "test_score_loss.py", "test_row_block.py"} <= found
    assert not {"test_aot.py", "test_tiles.py", "test_eager.py", "test_sources.py"} & found
