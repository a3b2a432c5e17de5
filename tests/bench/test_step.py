"""The step benchmark runs at small sizes and records what it says it records."""

import json

from effbert.bench import step


def test_the_step_benchmark_writes_every_case_with_its_spread(tmp_path, monkeypatch):
    monkeypatch.setattr(step.torch, "compile", lambda function: function)  # compiling is not what is tested here
    step.main(["--small", "--output", str(tmp_path / "sub" / "step.json")])
    recorded = json.loads((tmp_path / "sub" / "step.json").read_text())
    assert len(recorded["cases"]) == 6 and len(recorded["ratios"]) == 3
    for case in recorded["cases"].values():
        assert 0 < case["quartile_1_ms"] <= case["median_ms"] <= case["quartile_3_ms"]
    assert recorded["shapes"]["hidden_size"] == 48 and recorded["versions"]["torch"]


def test_a_part_that_fails_is_recorded_with_its_reason(monkeypatch):
    def broken(function):
        raise RuntimeError("no compiler here\nlong story")

    monkeypatch.setattr(step.torch, "compile", broken)
    recorded = step.measure_all(step.SMALL)
    assert recorded["cases"]["whole_step compile"] == {"not measured": "RuntimeError: no compiler here"}
    assert recorded["ratios"] == {}
