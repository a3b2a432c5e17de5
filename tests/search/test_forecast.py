"""The forecast counts the batches that will be drawn and adds up what they cost; a dry run leaves nothing behind."""

import dataclasses
from functools import partial

import pytest
import torch
from datasets import concatenate_datasets

from effbert import workspace as rooms
from effbert.__main__ import main
from effbert.search import forecast
from effbert.search.forecast import Power, Rates
from effbert.search.record import FIRST_SUPERNET


def changed(workspace, **changes):
    return dataclasses.replace(workspace, config=dataclasses.replace(workspace.config, **changes))


def stage(workspace, **changes):
    return changed(workspace, stage1=dataclasses.replace(workspace.config.stage1, **changes))


TRAINING = Rates(0.0, 0.0, 1.0, 0.0, 0.0, "test")


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
        share: forecast.student_tokens(forecast.Drawn(workspace), forecast.cut(workspace.config.stage1, share), True)
        for share in (0.25, 1.0)
    }
    halved = stage(workspace, num_candidates=9, cohort=8, rungs=(0.25, 1.0))
    assert parts(halved)["stage1"].tokens == 8 * tokens[0.25] + 2 * tokens[1.0] + tokens[1.0]


@pytest.mark.parametrize(("cohort", "memory", "most"), [(4, 10, 4), (8, 3, 3)])
def test_no_more_train_at_once_than_a_cohort_has_and_memory_holds(workspace, cohort, memory, most):
    config = stage(workspace, cohort=cohort).config
    said = forecast.lines(list(parts(workspace).values()), TRAINING, config, memory, 2**16)
    assert said[0] == f"test; {most} candidates train at once, 1 MiB each; memory holds {memory} candidates at once"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (59.9, "59.9 s"), (60, "1.0 min"), (359, "6.0 min"), (360, "0.100 h"), (1e6, "277.778 h")],
)
def test_times_have_a_unit_in_which_they_can_be_read(seconds, text):
    assert forecast.duration(seconds) == text


def test_the_teacher_reads_once_for_all_that_train_together(workspace):
    teacher_only = Rates(1.0, 0.0, 0.0, 0.0, 0.0, "test")
    base = stage(workspace, num_candidates=6, cohort=6, rungs=(1.0,))
    together, by_two = parts(base, teacher_only)["stage1"], parts(changed(base, population=2), teacher_only)["stage1"]
    assert by_two.seconds == 3 * together.seconds > 0


def test_others_of_the_front_are_forecast_where_costs_count(workspace):
    plain, front = parts(workspace)["final"], parts(changed(workspace, minimize=("flops",)))["final"]
    assert front.candidates == plain.candidates + workspace.config.final.num_front * workspace.config.seeds
    assert front.tokens > plain.tokens


def test_a_supernet_that_is_given_is_not_trained(workspace):
    whole, given = parts(workspace), parts(changed(workspace, start_from=("folder",)))
    assert whole["supernet"].tokens > 0 and "supernet" not in given
    assert given["final"] == whole["final"]  # where the plain BERT warms up by itself, as before


def test_what_trains_alone_is_not_filtered(workspace):
    tokens = [
        parts(changed(stage(workspace, cohort=8, filter=filter), agreement_candidates=4))["alone"].tokens
        for filter in ("none", "parameters")
    ]
    assert tokens[0] == tokens[1] > 0


def test_the_winner_of_stage_1_is_trained_in_stage_2_whatever_the_filter_says(workspace):
    def tokens(count):
        settings = dataclasses.replace(
            workspace.config.stage2, num_candidates=count, cohort=4, rungs=(1.0,), filter="parameters"
        )
        return parts(changed(workspace, stage2=settings))["stage2"].tokens

    assert tokens(4) * 2 == 3 * (tokens(8) - tokens(4))  # one and half of three, then half of four


def test_the_warm_up_of_the_plain_bert_is_counted(workspace):
    with_warm_up, without = (
        parts(changed(workspace, supernet=dataclasses.replace(workspace.config.supernet, num_train_epochs=epochs)))
        for epochs in (1, 0)
    )
    warm = with_warm_up["supernet"].tokens
    assert with_warm_up["final"].tokens - without["final"].tokens == workspace.config.seeds * warm > 0


def test_scoring_is_counted_for_every_candidate(workspace):
    scoring = parts(workspace, Rates(0.0, 0.0, 0.0, 0.0, 1.0, "test"))
    assert scoring["stage3"].seconds == workspace.config.stage3.num_candidates * forecast.Drawn(workspace).ranking(1.0)
    assert scoring["stage1"].seconds > 0 and scoring["supernet"].seconds == 0
    fewer = stage(workspace, ranking_share=0.5)
    assert parts(fewer, Rates(0.0, 0.0, 0.0, 0.0, 1.0, "test"))["stage1"].seconds < scoring["stage1"].seconds


def test_a_supernet_of_the_candidates_and_the_scores_of_best_steps_are_counted(workspace):
    half = [sequences.select(range(len(sequences) // 2)) for sequences in workspace.corpus]
    two = dataclasses.replace(changed(workspace, candidate_corpus=("other",)), candidate_corpus=half)
    one, found = parts(workspace), parts(two)
    assert list(found)[:3] == ["teachers", FIRST_SUPERNET, "supernet"] and FIRST_SUPERNET not in one
    assert found["supernet"] == one["supernet"] and 0 < found[FIRST_SUPERNET].tokens < one["supernet"].tokens
    assert found["stage1"].tokens < one["stage1"].tokens and found["final"].tokens == one["final"].tokens
    final, data = workspace.config.final, forecast.Drawn(workspace)
    best = dataclasses.replace(final.task_phase, load_best_model_at_end=True, eval_steps=10, num_train_epochs=2)
    batches_of = partial(data.batches, data.main, final.task_share)
    steps = batches_of(best.per_device_train_batch_size)
    drawn = sum(step % 10 == 0 or step == steps for step in range(1, steps + 1))
    assert forecast.times_scored(best, batches_of) == 2 * drawn > 2
    assert forecast.times_scored(final.task_phase, batches_of) == 0


def test_teachers_are_counted_with_their_scores_and_where_one_is_given_without_its_text(workspace):
    tuning, data = Rates(0.0, 1.0, 0.0, 0.0, 0.0, "test"), forecast.Drawn(workspace)
    settings = workspace.config.teacher_model
    size, name = settings.finetuning.per_device_train_batch_size, data.main
    tuned = settings.finetuning.num_train_epochs * data.task(name, 1.0, size)
    own = forecast.of_workspace(workspace, tuning)[0]
    text = settings.pretraining.num_train_epochs * data.general(1.0, settings.pretraining.per_device_train_batch_size)
    assert own == forecast.Part("teachers", 1, text + tuned, text + tuned) and min(text, tuned) > 0
    best = dataclasses.replace(settings.finetuning, load_best_model_at_end=True, eval_steps=10)
    chosen = dataclasses.replace(settings, finetuning=best, finetuning_eval_steps=(f"{name}=3",))
    given = changed(workspace, teacher="an encoder", teacher_model=chosen)
    reading = Rates(1.0, 0.0, 0.0, 0.0, 0.0, "test")
    part = forecast.of_workspace(given, reading)[0]
    steps, epochs = data.batches(name, 1.0, size), best.num_train_epochs
    scored = epochs * sum(step % 3 == 0 or step == steps for step in range(1, steps + 1))
    assert part.tokens == tuned and part.seconds == scored * data.held_out(name) > 0


def test_final_rows_are_counted_with_released_ranking_rows(workspace):
    task = workspace.main_task
    more = dataclasses.replace(task, train=concatenate_datasets([task.train, task.train]))
    held_out = dataclasses.replace(more, validation=workspace.held_out[task.spec.name].validation)
    all_rows = dataclasses.replace(workspace, held_out={task.spec.name: held_out})
    one, two = parts(workspace), parts(all_rows)
    assert two["final"].tokens > one["final"].tokens and two["stage1"] == one["stage1"]


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
    assert measured.power is None and not any("kWh" in line for line in text)
    assert "measured: 3 steps" in text[0] and "final distillation" in text[-1]


def a_reader(watts, monkeypatch):
    """A GPU that draws these one after the other, the last one for good, as far as `forecast` sees."""
    left = list(watts)
    reader = lambda: left.pop(0) if len(left) > 1 else left[0]  # noqa: E731
    monkeypatch.setattr(forecast, "power_reader", lambda device: reader)


def test_the_power_is_that_of_steps_that_have_gone_on_for_a_while(monkeypatch):
    asked = []

    def train(steps, on_step):
        asked.append(steps)
        for _ in range(steps):
            on_step(None)

    monkeypatch.setattr(forecast, "POWER_SECONDS", 6)
    a_reader([50.0, 100.0, 300.0, 600.0, 650.0, 700.0], monkeypatch)
    found = forecast.measure_power(train, 1.1, torch.device("cpu"))
    assert asked == [6] and found == Power(650.0, "measured in training")
    a_reader([640.0], monkeypatch)
    assert forecast.measure_power(train, 10.0, torch.device("cpu")).watts == 640 and asked == [6, 1]


def test_candidates_are_timed_side_by_side_as_they_train(workspace, monkeypatch):
    at_once, trained = [], forecast.train_together

    def noted(trainees, *given, **options):
        at_once.append(len(trainees))
        return trained(trainees, *given, **options)

    monkeypatch.setattr(forecast, "train_together", noted)
    for cores, cohort, size in ((2, 8, 2), (2, 1, 1)):
        monkeypatch.setattr(forecast.torch, "get_num_threads", lambda cores=cores: cores)
        config = dataclasses.replace(
            workspace.config,
            stage1=dataclasses.replace(workspace.config.stage1, cohort=cohort),
            stage2=dataclasses.replace(workspace.config.stage2, cohort=cohort),
        )
        at_once.clear()
        rates = forecast.measure(dataclasses.replace(workspace, config=config))
        assert size in at_once and max(at_once) == size and f"candidates {size} at a time" in rates.source


def test_what_trains_by_itself_costs_what_it_takes_alone(workspace):
    both = {
        name: parts(workspace, dataclasses.replace(TRAINING, alone=alone))
        for name, alone in (("same", None), ("more", 3.0))
    }
    same, more = both["same"], both["more"]
    assert more["stage1"] == same["stage1"] and more["stage3"].seconds == 3 * same["stage3"].seconds
    warm = workspace.config.seeds * same["supernet"].tokens
    assert more["final"].seconds == pytest.approx(same["final"].seconds + 2 * warm)


@pytest.mark.parametrize("why", ["diverged", "memory"])
def test_a_dry_run_whose_models_do_not_come_far_enough_is_one_line(workspace, monkeypatch, why):
    trained = forecast.train_together

    def short(trainees, plan_of, arguments, **options):
        if why == "diverged":
            (one,) = trainees
            trainees = [dataclasses.replace(one, loss_of=lambda *given: one.loss_of(*given) * float("nan"))]
        else:
            options["on_step"](None)
        return trained(trainees, plan_of, arguments, **options)

    monkeypatch.setattr(forecast, "train_together", short)
    words = "loss not finite at step" if why == "diverged" else "memory does not hold 1 at once: give --population"
    with pytest.raises(ValueError, match=f"^a dry run's .* steps tell nothing .*{words}"):
        forecast.measure(dataclasses.replace(workspace))


def test_only_a_gpu_of_nvidia_is_asked_for_its_power_and_in_milliwatts(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "power_draw", lambda device: asked.append(device) or 643_210)
    gpu = torch.device("cuda", 1)
    assert forecast.power_reader(gpu)() == 643.21 and asked == [gpu]
    assert forecast.power_reader(torch.device("cpu")) is None
    assert forecast.measure_power(None, 1.0, torch.device("cpu")) is None
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert forecast.power_reader(gpu) is None


def test_a_measured_power_gives_every_part_its_energy(workspace, monkeypatch):
    monkeypatch.setattr(forecast, "POWER_SECONDS", 0.01)
    a_reader([500.0], monkeypatch)
    rates = forecast.measure(dataclasses.replace(workspace))
    assert rates.power == Power(500.0, "measured in training")
    parts, text = forecast.of_workspace(workspace, rates), forecast.lines_of_workspace(workspace, rates)
    assert text[1] == "kWh: of the GPU alone, at 500 W, measured in training"
    for part, line in zip(parts, text[2:-1], strict=True):
        assert line.startswith(part.name) and line.endswith(f" {part.seconds / 3600 / 2:10.3f} kWh")
    hours = forecast.search_hours(parts), parts[-1].seconds / 3600
    each = [f"{forecast.duration(3600 * found)} and {found / 2:.3f} kWh" for found in hours]
    assert text[-1] == f"search {each[0]}, final distillation {each[1]}"


def test_a_gpu_that_does_not_tell_its_power_is_said_in_one_line_and_leaves_the_rest_as_it_is(workspace, monkeypatch):
    def missing():
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed or it can't be imported.\nmore")

    monkeypatch.setattr(forecast, "power_reader", lambda device: missing)
    monkeypatch.setattr(forecast, "_together", lambda workspace: 7)  # else as many as memory has room for just then
    power = forecast.measure_power(lambda steps, on_step: on_step(None), 1.0, torch.device("cpu"))
    text = forecast.lines_of_workspace(workspace, dataclasses.replace(TRAINING, power=power))
    plain = forecast.lines_of_workspace(workspace, TRAINING)
    assert text.pop(1) == (
        "no kWh: the GPU's power draw cannot be read: "
        "nvidia-ml-py does not seem to be installed or it can't be imported."
    )
    assert text == plain and not any("kWh" in line for line in plain)


def test_a_dry_run_says_what_a_search_costs_and_keeps_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert main(["search", "--preset", "smoke", "--dry_run", "--flops_per_second", "1e10"]) == 0
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "assumed: 1e+10 FLOP/s" in shown and "stage3" in shown and " s, final distillation " in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("limit", [["--max_params", "70000"], ["--min_params", "100000"]])
def test_one_end_of_the_band_alone_takes_the_other_along(limit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    assert main(["search", "--preset", "smoke", "--dry_run", "--flops_per_second", "1e10", *limit]) == 0
    torch.set_num_threads(threads)


@pytest.mark.parametrize("more", [[], ["--dry_run"]])
def test_limits_that_nothing_satisfies_are_said_before_text_is_read(more, tmp_path, monkeypatch, capsys):
    def read(*_, **__):
        raise AssertionError("text is read")

    monkeypatch.setattr(rooms, "open_corpus", read)
    folder, threads = tmp_path / "run", torch.get_num_threads()
    where = [] if more else ["--output_dir", str(folder)]
    assert main(["search", "--preset", "smoke", *where, *more, "--max_params", "100"]) == 2
    torch.set_num_threads(threads)
    assert "no architecture has" in capsys.readouterr().err and not folder.exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dry_run", "--flops_per_second", "fast"], "give a number above 0"),
        (["--dry_run", "--flops_per_second", "-1"], "give a number above 0"),
        (["--output_dir", "nowhere", "--flops_per_second", "1e12"], "is for --dry_run"),
        (["--dry_run", "--max_flops", "1000"], "the nearest has"),
        (["--dry_run", "--params", "100"], "no architecture has"),
        (["--dry_run", "--max_params", "100"], "no architecture has"),
        (["--dry_run", "--final.num_front", "-2"], "num_front is -2: it must be at least 0"),
        (["--dry_run", "--student.num_hidden_layers", "0"], "num_hidden_layers is 0: it must be at least 1"),
        (["--dry_run", "--text_columns", "a"], "--text_columns is of your own task: give its --train_file too"),
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
