"""The step benchmark runs at small sizes and records what it says it records."""

import json

import pytest
import torch

from effbert.bench import step
from effbert.kernels import dispatch


def test_the_step_benchmark_writes_every_case_with_its_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(step.torch, "compile", lambda function: function)  # compiling is not what is tested here
    step.main(["--small", "--output", str(tmp_path / "sub" / "step.json")])
    recorded = json.loads((tmp_path / "sub" / "step.json").read_text())
    spreads = {name: case for name, case in recorded["cases"].items() if "median_ms" in case}
    assert len(recorded["cases"]) == 10
    if not torch.cuda.is_available():
        assert len(spreads) == 6 and len(recorded["ratios"]) == 3
        assert recorded["cases"]["student_step triton+graph"] == {"not measured": "RuntimeError: no GPU"}
    for case in spreads.values():
        assert 0 < case["quartile_1_ms"] <= case["median_ms"] <= case["quartile_3_ms"]
    assert recorded["shapes"]["hidden_size"] == 48 and recorded["versions"]["torch"]


def test_a_part_that_fails_is_recorded_with_its_reason(monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler here\nlong story")

    monkeypatch.setattr(step.torch, "compile", broken)
    *_, recorded = step.measure_all(step.SMALL)
    assert recorded["cases"]["whole_step compile"] == {"not measured": "RuntimeError: no compiler here"}
    assert not any("compile" in name for name in recorded["ratios"])


def test_kernels_are_compiled_ahead_by_one_step(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(step.Step, "student_step", lambda self: asked.append(dispatch.current()))
    step.main(["--small", "--warm-up"])
    assert asked == ["triton"] and capsys.readouterr().out == ""
    for arguments in ([], ["--warm-up", "--output", str(tmp_path / "s.json")]):
        with pytest.raises(ValueError, match="one of --output FILE and --warm-up is needed"):
            step.main(["--small", *arguments])
