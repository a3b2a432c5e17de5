"""Two gloo processes under torchrun against one process with the double batch, and what becomes of a rank's death."""

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from effbert import checkpoint
from effbert.__main__ import main
from effbert.engine import Phase
from effbert.parallel import ALONE
from effbert.search.shared import Draws

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(HERE.parents[1]), "COLUMNS": "200"}

_spec = importlib.util.spec_from_file_location("ranks", HERE / "ranks.py")
ranks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ranks)


def in_two(folder: Path, *parts: str, fails: bool = False) -> str:
    """ranks.py under torchrun in two processes; returns what they printed."""
    command = [*TORCHRUN, str(HERE / "ranks.py"), str(folder), *parts]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert (result.returncode != 0) == fails, result.stderr
    return result.stdout + result.stderr


def said(output: str) -> list[str]:
    """The lines that effbert itself ends with."""
    return [line for line in output.splitlines() if line.startswith("effbert: ")]


def kept(folder: Path, part: str) -> list:
    """What each rank kept of a part."""
    return [torch.load(folder / f"{part}-{rank}.pt", weights_only=True) for rank in range(2)]


def tensors(found, path=""):
    """Every tensor in nested dicts, by its place."""
    for name, value in found.items():
        if isinstance(value, dict):
            yield from tensors(value, f"{path}{name}/")
        elif isinstance(value, torch.Tensor):
            yield f"{path}{name}", value


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run folder with tokenizer and teachers."""
    folder = tmp_path_factory.mktemp("base")
    ranks.workspace_in(folder, 4, ALONE)
    return folder


@pytest.fixture(scope="module")
def two(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "two"
    shutil.copytree(base, folder)
    output = in_two(folder, "gradients", "disagreement", "gradient", "everything", "long_phase", "killed", fails=True)
    (folder / "output").write_text(output)
    return folder


@pytest.fixture(scope="module")
def workspace(base, tmp_path_factory):
    """For one process, with the double batch."""
    folder = tmp_path_factory.mktemp("ranks") / "one"
    shutil.copytree(base, folder)
    return ranks.workspace_in(folder, 8, ALONE)


def test_two_processes_end_with_the_weights_of_one_that_has_the_double_batch(two, workspace):
    first, second = kept(two, "everything")
    one = ranks.everything(workspace)
    mine = dict(tensors(first))
    for (name, expected), (_, other) in zip(tensors(one), tensors(second), strict=True):
        assert torch.equal(mine[name], other), name
        torch.testing.assert_close(mine[name], expected, rtol=0, atol=1e-6, msg=name)
    assert {name.split("/")[0] for name in mine} == {"warm", "shared", "steps"}
    best = [load_file(folder / "best" / "model.safetensors") for folder in (two, workspace.folder)]
    assert best[0].keys() == best[1].keys()
    for name, expected in best[1].items():
        torch.testing.assert_close(best[0][name], expected, rtol=0, atol=1e-6, msg=name)
    for row, expected in zip(first["rows"], one["rows"], strict=True):
        assert (row["row"], row["scores"]) == (expected["row"], expected["scores"])
    assert first["steps"]["tokens"] == one["steps"]["tokens"]
    assert first["steps"]["loss"] == second["steps"]["loss"] == pytest.approx(one["steps"]["loss"], rel=1e-6)


def test_the_gradient_of_a_batch_in_parts_is_that_of_the_batch(two, workspace):
    one, (first, second) = ranks.gradient(workspace), kept(two, "gradient")
    assert None in one.values()
    for name, expected in one.items():
        for found in (first, second):
            if expected is None:
                assert found[name] is None, name
            else:
                largest = float(expected.abs().max())
                torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-6 * largest, msg=name)


def test_these_batches_do_not_divide_evenly(workspace):
    sizes = set()
    for plan in (workspace.general_plan(share, 8, 0) for share in (1.0, 0.52)):
        sizes |= {len(batch.indices) for batch in plan}
        assert all(len(set(batch.attention_mask.sum(dim=1).tolist())) > 1 for batch in plan if len(batch.indices) > 1)
    assert {1, 7, 8} <= sizes  # one rank has no row, one has fewer, both have as many


def test_what_no_batch_of_an_update_used_is_neither_updated_nor_decayed(two, workspace):
    steps = kept(two, "everything")[0]["steps"]
    supernet, space = ranks.fresh_supernet(workspace), ranks.space_of(workspace)
    draws = Draws(workspace, supernet, space, "general")
    architectures = [draws.of(number)[0] for number in range(4)]
    partly = supernet.partly_used(architectures)
    whole_unused = part_unused = 0
    for name, parameter in supernet.named_parameters():
        before, after = steps["before"][name], steps["after"][name]
        if match := re.match(r"effbert\.layers\.(\d+)\.mlps\.(\d+)\.", name):
            layer, stack = map(int, match.groups())
            if all(architecture.layers[layer].structure.stacks <= stack for architecture in architectures):
                assert torch.equal(before, after), name
                whole_unused += 1
                continue
        if parameter in partly:
            dimension, width = partly[parameter]
            rest = parameter.shape[dimension] - width
            assert torch.equal(before.narrow(dimension, width, rest), after.narrow(dimension, width, rest)), name
            part_unused += 1
            before, after = before.narrow(dimension, 0, width), after.narrow(dimension, 0, width)
        if not name.startswith(("heads.", "effbert.pooler.")):  # general distillation runs neither
            assert not torch.equal(before, after), name
    assert whole_unused and part_unused


def test_a_gradient_that_one_rank_has_counts_on_all_and_one_that_none_has_stays_away(two):
    for found in kept(two, "gradients"):
        used, by_one, by_none = found["gradients"]
        assert torch.equal(used, torch.full((3, 2), 3.0)) and torch.equal(by_one, torch.full((3, 2), 5.0))
        assert by_none is None and found["loss"] == 1.0


def test_ranks_that_stand_at_different_steps_are_all_told_so(two):
    line = "the processes see different checkpoints: rank 0 (0, 0), rank 1 (0, 1)"
    assert kept(two, "disagreement") == [{"told": line}] * 2


def test_a_killed_rank_ends_the_run_and_the_first_ones_checkpoint_goes_on(two, tmp_path):
    output = (two / "output").read_text()
    assert len(said(output)) <= 1 and "Signal 9" in output  # torchrun says it too, and may be faster
    folder = tmp_path / "run"
    shutil.copytree(two, folder)
    assert not list(folder.glob("killed-*"))
    assert checkpoint.load(folder / "long.pt", Phase(("long",), 0).fingerprint)["step"] == 10
    output = in_two(folder, "long_phase", "failing", fails=True)
    for found, expected in zip(kept(folder, "long_phase"), kept(two, "long_phase"), strict=True):
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
    line = "effbert: rank 1: ArithmeticError: the sum is wrong (EFFBERT_TRACEBACK=1 shows where)"
    assert said(output) == [line]  # an error of one rank ends all, and is told once


SHORT = (
    "search --preset smoke --tasks --agreement_candidates 0 --final.num_random 0 --device cpu --max_train_rows 200 "
    "--corpus_tokens 8000 --supernet.num_train_epochs 2 "
    "--stage1.num_candidates 1 --stage2.num_candidates 1 --stage3.num_candidates 1 "
    "--student.hidden_dropout_prob 0 --student.attention_probs_dropout_prob 0"
).split()
DOUBLE = {"supernet": 64, "stage3.general_phase": 64, "stage3.task_phase": 32}
DOUBLE |= {"final.general_phase": 64, "final.task_phase": 32}


def test_a_search_under_torchrun_stops_goes_on_and_finds_what_one_process_finds(tmp_path, capsys):
    folders = one, two = tmp_path / "one", tmp_path / "two"
    command = [*TORCHRUN, "-m", "effbert", *SHORT, "--output_dir", str(two)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=ENVIRONMENT, cwd=HERE.parents[1]
    )
    lines = []
    while "supernet: general distillation" not in "".join(lines[-1:]):
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert said(output) == ["effbert: stopped; the same command goes on from here"]
    assert not (two / "results.json").exists()
    again = subprocess.run(
        command, capture_output=True, text=True, env=ENVIRONMENT, cwd=HERE.parents[1], timeout=600, check=False
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("2 processes share") == 1
    sizes = [f"--{phase}.per_device_train_batch_size={size}" for phase, size in DOUBLE.items()]
    assert main([*SHORT, *sizes, "--output_dir", str(one)]) == 0
    results = [json.loads((folder / "results.json").read_text()) for folder in folders]
    assert results[0]["winner"] == results[1]["winner"]
    assert [found["processes"] for found in results] == [1, 2]
    for mine, theirs in zip(*(found["results"] for found in results), strict=True):
        assert mine["row"] == theirs["row"] and mine["scores"] == pytest.approx(theirs["scores"], abs=0.01)
    for model in ("supernet", "stage3/supernet", "best"):
        mine, theirs = (load_file(folder / model / "model.safetensors") for folder in folders)
        for name, expected in mine.items():
            torch.testing.assert_close(theirs[name], expected, rtol=0, atol=1e-4, msg=f"{model} {name}")
    capsys.readouterr()
    assert main([*SHORT, "--output_dir", str(two)]) == 2
    assert "processes: 2 there, not set here" in capsys.readouterr().err
