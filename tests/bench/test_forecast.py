"""The forecast for data and a GPU that are not here: it counts as a dry run does, and says what it assumes."""

import dataclasses
import json
from pathlib import Path

import pytest

from effbert.bench import forecast
from effbert.bench.hardware import GPUS
from effbert.config import paper, paper_fast
from effbert.search.forecast import duration, search_hours

RECORDED = Path(__file__).parents[2] / "bench" / "results"
H200 = next(gpu for gpu in GPUS if gpu.name == "H200")


def hours(config, **assumed):
    return search_hours(forecast.of_preset(config, H200, forecast.Assumptions(**assumed))[0])


def test_the_fast_preset_is_forecast_below_six_hours_and_says_so_in_its_file(tmp_path, capsys):
    assert forecast.main(["--gpu", "H200", "--output", str(tmp_path / "new" / "forecast.json")]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "new" / "forecast.json").read_text())
    assert "not measured" in shown and "final distillation" in shown
    fast, published = (found["presets"][name]["search_hours"] for name in ("paper-fast", "paper"))
    assert fast < 6 < published
    assert [part["name"] for part in found["presets"]["paper"]["parts"]] == [
        "teachers", "supernet-stage1", "supernet", "stage1", "stage2", "stage3", "final",
    ]  # fmt: skip
    assert found["presets"]["paper-fast"]["parts"][1]["name"] == "supernet"
    assert "left out of both: about 0.992 h of compiling kernels, 3,248 times 1.1 s" in shown
    assert found["left_out"]["compiling_kernels_hours"] == pytest.approx(0.99, abs=0.01)
    recorded = RECORDED / "forecast-h200.json"
    assert json.loads(recorded.read_text()) == found  # what README says is read off it


def test_energy_is_at_most_what_the_data_sheet_allows_and_says_so(tmp_path, capsys):
    assert forecast.main(["--gpu", "MI300X", "--output", str(tmp_path / "forecast.json")]) == 0
    shown, found = capsys.readouterr().out, json.loads((tmp_path / "forecast.json").read_text())["presets"]
    for preset in found.values():
        hours, kwh = preset["search_hours"], preset["search_kwh_at_most"]
        assert kwh == pytest.approx(0.75 * hours)
        assert f"search {hours:.3f} h and at most {kwh:.3f} kWh, final distillation" in shown
        for part in preset["parts"]:
            assert f"{duration(part['seconds'])} at most {part['seconds'] / 4800:10.3f} kWh" in shown
    assert shown.count("kWh: of the GPU alone, at 750 W, the most that its data sheet allows") == 2
    assert {gpu.name: gpu.watts for gpu in GPUS} == {"A100": 400, "H200": 700, "H100": 700, "B200": 1000, "MI300X": 750}


def test_hours_follow_the_assumed_shares():
    half = hours(paper_fast(), teaching=0.2, training=0.075)
    assert half == pytest.approx(2 * hours(paper_fast(), teaching=0.4, training=0.15))


def test_a_candidate_sees_sixteen_million_tokens_of_text():
    config = paper_fast()
    assert forecast.Declared(config).general(config.stage1.general_share, 64) == 16_000_000


def test_each_difference_of_the_presets_saves_time():
    base = paper()
    no_padding = dataclasses.replace(base, pad_to_max_length=False)
    together = dataclasses.replace(no_padding, stage1=dataclasses.replace(base.stage1, cohort=27), population=27)
    halved = dataclasses.replace(together, stage1=dataclasses.replace(together.stage1, rungs=(1 / 9, 1 / 3, 1.0)))
    times = [hours(config) for config in (base, no_padding, together, halved)]
    assert times == sorted(times, reverse=True) and len(set(times)) == len(times)


def test_an_unknown_gpu_is_one_line():
    with pytest.raises(ValueError, match="--gpu H300: no such data sheet; known: A100"):
        forecast.main(["--gpu", "H300"])


@pytest.mark.parametrize("name", ["paper", "paper-fast"])
def test_the_presets_say_what_has_to_be_given(name, capsys, tmp_path):
    from effbert.__main__ import main

    command = ["search", "--preset", name, "--output_dir", str(tmp_path / "run")]
    assert main(command) == 2
    assert "--teacher" in capsys.readouterr().err
    assert main([*command, "--teacher", "bert-base-uncased"]) == 2
    assert "--corpus" in capsys.readouterr().err
    if name == "paper":
        assert main([*command, "--teacher", "bert-base-uncased", "--corpus", "books"]) == 2
        assert "--candidate_corpus is missing" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--teacher", "./no-teacher", "--corpus", "books", "--candidate_corpus", "books"]) == 2
    assert "candidate_corpus" not in (said := capsys.readouterr().err) and "no-teacher" in said
