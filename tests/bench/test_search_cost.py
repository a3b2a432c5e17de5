"""The comparison of procedures: modes differ in what they say and in nothing else; a small one runs to its table."""

import dataclasses
import json
import types

import pytest
import torch

from effbert.bench import modern, published, search_cost
from effbert.bench.search_cost import MODES, configured, place_of_best, told
from effbert.config import PRESETS
from effbert.kernels import eager

SHAPE = (2, 3, 7, 5)


@pytest.mark.parametrize("backend", [modern, published])
def test_backends_compute_what_eager_does(backend):
    torch.manual_seed(0)
    mask = torch.ones(2, 7, dtype=torch.int64)
    mask[1, 4:] = 0
    query, key, value, teacher_query, teacher_key = (torch.randn(SHAPE) for _ in range(5))
    ours = backend.distill_attention(query, key, value, teacher_query, teacher_key, mask, None, "real")
    expected = eager.distill_attention(query, key, value, teacher_query, teacher_key, mask, None, "real")
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_a_modes_process_is_one_alone_whoever_started_the_comparison(tmp_path, monkeypatch):
    def run(command, env, check):
        started.append(env["WORLD_SIZE"])
        return types.SimpleNamespace(returncode=0)

    started = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(search_cost.subprocess, "run", run)
    search_cost._in_own_process("eager", tmp_path, [], None)
    assert started == ["1"]


def test_modes_change_the_settings_they_name():
    config = PRESETS["smoke"]()
    published_config = configured(config, MODES["published"])
    assert published_config.population == 1 and published_config.pad_to_max_length
    assert published_config.loss.loss_mask == "released" and published_config.stage1.rungs == (1.0,)
    assert not published_config.stage1.task_phase.bf16
    assert published_config.ranking_metric == configured(config, MODES["modern"]).ranking_metric == "task"
    again = configured(config, MODES["published again"])
    assert again.seed == config.seed + 1 and dataclasses.replace(again, seed=config.seed) == published_config
    ours = configured(config, MODES["ours"])
    assert ours.ranking_metric == config.ranking_metric == "roc_auc"
    assert ours.population == 0 and not ours.pad_to_max_length and ours.stage1.rungs == config.stage1.rungs
    assert dataclasses.replace(ours, stage1=configured(config, MODES["ours full"]).stage1) == configured(
        config, MODES["ours full"]
    )


ALL = ("published", "ours", "ours full", "ours full again")


@pytest.fixture
def quick(monkeypatch):
    """Four modes, in this process, at the smallest sizes."""
    base = PRESETS["smoke"]()
    stage = dataclasses.replace(base.stage1, general_share=0.1, task_share=0.2)
    monkeypatch.setitem(PRESETS, "quick", lambda: dataclasses.replace(base, tasks=(), stage1=stage))
    monkeypatch.setattr(search_cost, "MODES", {name: MODES[name] for name in ALL})

    def here(mode, folder, arguments, preset):
        if not search_cost._file(folder, mode).exists():
            search_cost.main(["--mode", mode, "--preset", preset, *arguments])

    monkeypatch.setattr(search_cost, "_in_own_process", here)


@pytest.mark.parametrize(
    "more", [["--stage1.filter", "parameters"], ["--max_latency_ms", "9"], ["--minimize", "flops"]]
)
def test_what_would_leave_candidates_untrained_or_rank_them_otherwise_is_refused(quick, tmp_path, more):
    command = ["--preset", "quick", "--candidates", "3", "--output_dir", str(tmp_path / "run"), *more]
    with pytest.raises(ValueError, match="trains a whole list of candidates by one metric: leave out"):
        search_cost.main(command)
    assert not (tmp_path / "run").exists()


def test_it_runs_to_its_table_and_runs_nothing_twice(quick, tmp_path, capsys):
    command = ["--preset", "quick", "--candidates", "3", "--output_dir", str(tmp_path / "run")]
    assert search_cost.main(command) == 0
    path = tmp_path / "run" / "search-cost.json"
    result = json.loads(path.read_text())
    assert tuple(result["modes"]) == ALL and len(result["candidates"]) == 3
    assert result["agreement"]["ours against ours at another seed"]["count"] == 3
    for mode in result["modes"].values():
        assert mode["seconds_each"] == pytest.approx(mode["seconds"] / 3) and mode["peak_memory"] > 0
    values = {name: mode["values"] for name, mode in result["modes"].items()}
    assert None not in values["published"] and None not in values["ours full"] and None in values["ours"]
    for full, halved in zip(values["ours full"], values["ours"], strict=True):
        assert halved is None or halved == full  # what reaches the last rung is trained as without halving
    for name, metric in (("published", "accuracy"), ("ours full", "roc_auc")):
        assert values[name] == [scores[metric] for scores in result["modes"][name]["scores"]]
    assert result["agreement"]["ours full again, both by roc_auc"]["count"] == 3
    assert "ours, both by roc_auc" not in result["agreement"]  # whose scores are those of several rungs
    assert [len(rungs) for rungs in result["modes"]["ours full"]["rungs"]] == [1, 1, 1]
    assert sorted(len(rungs) for rungs in result["modes"]["ours"]["rungs"]) == [1, 2, 2]
    assert result["ratios"]["published"] == 1 and set(result["agreement"]) >= {"ours", "ours full"}
    assert result["agreement"]["ours full"]["count"] == 3 and result["agreement"]["ours full"]["low"] is None
    assert result["places"]["published"] == 1 and 1 <= result["places"]["ours"] <= 3
    shown = capsys.readouterr().out
    assert "agreement with the published values" in shown and "ours full, both by roc_auc: " in shown
    assert "ours against ours at another seed: " in shown
    before = path.stat().st_mtime_ns, (tmp_path / "run" / "modes" / "ours.json").stat().st_mtime_ns
    assert search_cost.main(command) == 0
    assert (tmp_path / "run" / "modes" / "ours.json").stat().st_mtime_ns == before[1]
    with pytest.raises(ValueError, match="holds a comparison with other settings"):
        search_cost.main([*command, "--seed", "3"])


def test_a_halved_list_is_ranked_by_what_a_sampler_is_told():
    states = ["complete", "pruned", "pruned", "failed", "failed"]
    mode = {"values": [0.9, *[None] * 4], "rungs": [[0.5, 0.9], [0.4], [0.45], [], [0.6]], "states": states}
    assert told(mode) == [0.9, pytest.approx(0.8), pytest.approx(0.85), None, None]
    assert place_of_best([0.1, 0.3, 0.2, 0.4, 0.5], told(mode)) == 5
    assert place_of_best([None, 0.3], [0.5, None]) is None is place_of_best([0.1], [None])


@pytest.mark.parametrize("count", ["1", "x", "-3"])
def test_a_senseless_number_of_candidates_is_refused(count):
    with pytest.raises(ValueError, match=f"--candidates {count}: give a number of at least 2"):
        search_cost.main(["--preset", "smoke", "--candidates", count, "--output_dir", "nowhere"])


def test_without_a_folder_it_says_so():
    with pytest.raises(ValueError, match="needs --output_dir"):
        search_cost.main(["--preset", "smoke"])


def test_the_folder_of_a_run_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"^{tmp_path} holds a run: give the comparison"):
        search_cost.main(["--preset", "smoke", "--output_dir", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_mode_that_is_none_and_a_folder_without_a_plan_are_said(tmp_path):
    command = ["--preset", "smoke", "--output_dir", str(tmp_path)]
    with pytest.raises(ValueError, match="--mode fast: one of published"):
        search_cost.main([*command, "--mode", "fast"])
    with pytest.raises(ValueError, match="holds no comparison yet"):
        search_cost.main([*command, "--mode", "ours"])
