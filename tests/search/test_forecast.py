"""The forecast counts the batches that will be drawn and adds up what they cost; a dry run leaves nothing behind."""

import dataclasses

import pytest
import torch

from effbert.__main__ import main
from effbert.search import forecast
from effbert.search.forecast import Rates


def changed(workspace, **changes):
    return dataclasses.replace(workspace, config=dataclasses.replace(workspace.config, **changes))


def stage(workspace, **changes):
    return changed(workspace, stage1=dataclasses.replace(workspace.config.stage1, **changes))


TRAINING = Rates(0.0, 1.0, 0.0, 0.0, "test")


def parts(workspace, rates=TRAINING):
    return {part.name: part for part in forecast.of_workspace(workspace, rates)}


def test_tokens_are_those_of_the_batches_that_will_be_drawn(workspace):
    settings = workspace.config.stage1
    general = workspace.general_plan(settings.general_share, settings.general_phase.per_device_train_batch_size, 0)
    rows = workspace.main_task.train.select(range(round(settings.task_share * len(workspace.main_task.train))))
    task = workspace.plan(rows, settings.task_phase.per_device_train_batch_size, "task", 0)
    drawn = sum(batch.input_ids.numel() for plan in (general, task) for batch in plan)
    alone = stage(workspace, num_candidates=5, cohort=5, rungs=(1.0,))
    assert parts(alone)["stage1"].tokens == 5 * drawn == parts(alone)["stage1"].seconds
    longer = changed(alone, pad_to_max_length=True)
    assert parts(longer)["stage1"].tokens > 5 * drawn


def test_halving_is_forecast_rung_by_rung_and_a_small_last_cohort_too(workspace):
    tokens = {
        share: forecast.student_tokens(forecast.Drawn(workspace), forecast.cut(workspace.config.stage1, share))
        for share in (0.25, 1.0)
    }
    halved = stage(workspace, num_candidates=9, cohort=8, rungs=(0.25, 1.0))
    assert parts(halved)["stage1"].tokens == 8 * tokens[0.25] + 2 * tokens[1.0] + tokens[1.0]


def test_the_teacher_reads_once_for_all_that_train_together(workspace):
    teacher_only = Rates(1.0, 0.0, 0.0, 0.0, "test")
    base = stage(workspace, num_candidates=6, cohort=6, rungs=(1.0,))
    together, by_two = parts(base, teacher_only)["stage1"], parts(changed(base, population=2), teacher_only)["stage1"]
    assert by_two.seconds == 3 * together.seconds > 0


def test_others_of_the_front_are_forecast_where_costs_count(workspace):
    plain, front = parts(workspace)["final"], parts(changed(workspace, minimize=("flops",)))["final"]
    assert front.candidates == plain.candidates + workspace.config.final.num_front * workspace.config.seeds
    assert front.tokens > plain.tokens


def test_scoring_is_counted_for_every_candidate(workspace):
    scoring = parts(workspace, Rates(0.0, 0.0, 0.0, 1.0, "test"))
    assert scoring["stage3"].seconds == workspace.config.stage3.num_candidates * forecast.Drawn(workspace).ranking()
    assert scoring["stage1"].seconds > 0 and scoring["supernet"].seconds == 0


def test_assumed_rates_follow_the_sizes_and_measured_ones_are_times(workspace):
    sizes = workspace.config, workspace.student_config(), workspace.teacher_config
    slow, fast = forecast.assume(*sizes, 1e9, 1e9), forecast.assume(*sizes, 2e9, 1e9)
    assert (
        slow.teacher == pytest.approx(2 * fast.teacher)
        and slow.candidate == fast.candidate
        and slow.supernet > slow.candidate > slow.scoring > 0
    )
    assert slow.candidate == pytest.approx(3 * slow.scoring)
    before = workspace.general_teacher
    measured = forecast.measure(dataclasses.replace(workspace))
    assert min(measured.teacher, measured.candidate, measured.supernet, measured.scoring) > 0
    assert workspace.general_teacher is before
    text = forecast.lines_of_workspace(workspace, measured)
    assert "measured: 3 steps" in text[0] and "final distillation" in text[-1]


def test_a_dry_run_says_what_a_search_costs_and_keeps_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert main(["search", "--preset", "smoke", "--dry_run", "--flops_per_second", "1e10"]) == 0
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "assumed: 1e+10 FLOP/s" in shown and "stage3" in shown and "search 0.0" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dry_run", "--flops_per_second", "fast"], "give a number above 0"),
        (["--dry_run", "--flops_per_second", "-1"], "give a number above 0"),
        (["--output_dir", "nowhere", "--flops_per_second", "1e12"], "is for --dry_run"),
        (["--dry_run", "--max_flops", "1000"], "the nearest has"),
        (["--dry_run", "--params", "100"], "no architecture has"),
        (["--dry_run", "--params", "80000", "--max_params", "90000"], "leave out --min_params and --max_params"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert main(["search", "--preset", "smoke", *arguments]) == 2
    torch.set_num_threads(threads)
    error = capsys.readouterr().err.strip()
    assert message in error and len(error.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
