"""What a person sees: lines with seconds, and what the project logs."""

import io
import logging
import time
from types import SimpleNamespace

import pytest
from datasets import Dataset
from rich.console import Console
from rich.text import Text

from effbert.data.batches import BatchPlan
from effbert.pace import Standing, on_stderr, paced, time_text
from effbert.search.progress import Reporter


def test_the_projects_log_is_shown_while_the_reporter_is_open():
    output, log = io.StringIO(), logging.getLogger("effbert.kernels")
    with Reporter(Console(file=output, width=100)) as reporter:
        log.info("kernels: eager PyTorch (inputs on the CPU)")
        reporter.say("[a] line")
    log.info("afterwards")
    lines = output.getvalue().splitlines()
    assert [line.split(" s ")[1].strip() for line in lines] == [
        "kernels: eager PyTorch (inputs on the CPU)",
        "[a] line",
    ]
    assert not logging.getLogger("effbert").handlers


@pytest.fixture
def clock(monkeypatch):
    """A clock that tests set, in seconds."""
    now = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: now.now)
    return now


def said_of(steps, clock, each=10.0, terminal=False):
    """What a reporter says of Standings that come `each` seconds."""
    output = io.StringIO()
    with Reporter(Console(file=output, width=200, force_terminal=terminal, no_color=True)) as reporter:
        on_step = reporter.steps("distillation")
        for standing in steps:
            clock.now += each
            on_step(standing)
    plain = Text.from_ansi(output.getvalue()).plain
    return [line.split(" s ", 1)[1].strip() for line in plain.splitlines() if " s " in line]


def test_a_long_phase_says_where_it_is_every_half_minute(clock):
    steps = [Standing(step, 12, "general", (0.25, 0.5) if step >= 5 else ()) for step in range(1, 13)]
    assert said_of(steps, clock) == [
        "distillation, on text: step 4 of 12, 1:20 left",
        "distillation, on text: step 7 of 12, loss 0.2500 to 0.5000, 0:50 left",
        "distillation, on text: step 10 of 12, loss 0.2500 to 0.5000, 0:20 left",
    ]


def test_a_very_long_phase_says_it_a_hundred_times(clock):
    lines = said_of([Standing(step, 20_000, "general") for step in range(1, 20_001)], clock)
    assert 90 <= len(lines) <= 100


def test_what_goes_on_says_after_which_step_also_on_a_terminal(clock):
    first = [Standing(step, 50, "general") for step in (41, 42)]
    second = [Standing(step, 30, "task") for step in (1, 2)]
    third = [Standing(step, 30, "task") for step in (29, 30, 11)]  # begun anew: another model's
    expected = [
        "distillation, on text: goes on after step 40 of 50",
        "distillation, on the task: goes on after step 10 of 30",
    ]
    assert said_of([*first, *second, *third], clock, 1.0) == expected
    (line, *_) = said_of(first, clock, terminal=True)
    assert "goes on after step 40 of 50" in line


def test_a_terminal_has_the_live_line_alone(clock):
    assert not said_of([Standing(step, 12, "general") for step in range(1, 13)], clock, terminal=True)


def test_rows_that_take_long_to_read_are_said(clock, caplog, capsys):
    plan = BatchPlan(Dataset.from_dict({"input_ids": [[1] * 8] * 10}), 1, pad_token_id=0)
    with on_stderr():
        for _ in paced(plan, "reading rows"):
            clock.now += 20.0
    assert capsys.readouterr().err.splitlines() == [
        f"reading rows: batch {number} of 10, {left} left"
        for number, left in ((2, "2:40"), (4, "2:00"), (6, "1:20"), (8, "0:40"))
    ]
    for _ in paced(plan, "reading rows"):
        clock.now += 20.0
    assert not capsys.readouterr().err


@pytest.mark.parametrize("seconds,text", [(0, "0:00"), (7.9, "0:08"), (3599, "59:59"), (93790, "26:03:10")])
def test_times(seconds, text):
    assert time_text(seconds) == text
