"""The final table on terminals of several widths, and off one: no number is ever cut; the winner beside each row."""

import io
import os
import shutil

import numpy as np
import pytest
from rich.console import Console

from effbert.evaluate import jackknife
from effbert.search.agreement import paired_difference
from effbert.search.record import training_files
from effbert.search.report import comparison, print_table, summarise, verdict
from effbert.search.study import Evaluation

TASKS = [f"{task} accuracy" for task in "mnli qqp qnli sst2 cola stsb mrpc rte wnli squad squad2.0".split()]
MODELS = ("teacher", "winner", "published", "plain")
ROWS = [("model", *TASKS, "parameters")]
ROWS += [(name, *(f"0.{number}{place:03}" for place in range(11)), "15,615,999") for number, name in enumerate(MODELS)]


def printed(width: int, terminal: bool) -> list[list[str]]:
    """The cells of each row on a console, its head first."""
    file = io.StringIO()
    print_table(Console(file=file, width=width, force_terminal=terminal, color_system=None), "scores", ROWS)
    lines = [line for line in file.getvalue().replace("┃", "│").splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


@pytest.mark.parametrize(("width", "terminal"), [(80, False), (300, True)])
def test_a_table_that_fits_or_is_no_terminals_is_as_it_is(width, terminal):
    assert printed(width, terminal) == [list(row) for row in ROWS]


@pytest.mark.parametrize("width", [80, 40])
def test_on_a_narrow_terminal_tasks_become_the_rows(width):
    assert printed(width, True) == [list(row) for row in zip(*ROWS, strict=True)]


def row(name, hits, repeat=0):
    """A row of the final table whose answers are right where `hits` says so; None: a row begun before parts were kept,
    with an accuracy of a half."""
    costs = dict.fromkeys(("parameters", "flops", "latency_ms", "latency_spread_ms"), 1)
    found = {"row": name, "repeat": repeat, "scores": {"accuracy": 0.5}, "architecture": "", **costs}
    if hits is None:
        return found
    hits = np.array(hits, float)
    parts = jackknife(lambda kept: hits[kept].mean(), np.zeros(len(hits)))
    return found | {"scores": {"accuracy": float(hits.mean())}, "jackknife": parts}


def test_the_winner_is_compared_on_the_same_rows():
    rows = [row("winner", [1, 1, 1, 0] * 5), row("published", [1, 0, 1, 0] * 5), row("plain BERT", None)]
    found = paired_difference(0.75, 0.5, [one["jackknife"] for one in rows[:2]])
    assert found.low < 0.25 < found.high < 0.6
    said = f"+0.2500 ({found.low:+.4f} to {found.high:+.4f}) against published, +0.2500 against plain BERT."
    assert verdict(summarise(rows, "accuracy"), rows, "accuracy") == f"The winner's accuracy: {said}"


def test_of_several_seeds_their_means_are_compared():
    answers = {"winner": ([1, 1, 1, 0], [1, 1, 0, 1]), "other": ([1, 0, 0, 0], [0, 1, 0, 1])}
    rows = [row(name, 3 * hits, repeat) for name, both in answers.items() for repeat, hits in enumerate(both)]
    parts = [np.mean([rows[first]["jackknife"], rows[first + 1]["jackknife"]], axis=0) for first in (0, 2)]
    found = paired_difference(0.75, 0.375, parts)
    said = f"The winner's accuracy: +0.3750 ({found.low:+.4f} to {found.high:+.4f}) against other."
    assert verdict(summarise(rows, "accuracy"), rows, "accuracy") == said
    lost = [*rows[:3], rows[3] | {"scores": None, "jackknife": []}]  # the other one's second repeat diverged
    assert "+0.5000 (" in verdict(summarise(lost, "accuracy"), lost, "accuracy")
    assert verdict(summarise(rows[:1], "accuracy"), rows[:1], "accuracy") == ""


def candidate(number, value, parts=None):
    return Evaluation(number, "", value, "complete", {"jackknife": parts} if parts else {})


def test_the_best_candidate_is_compared_with_the_next_ones():
    parts = [0.5, 0.52, 0.48, 0.5]
    found = [candidate(0, 0.5, parts), candidate(1, 0.51, [0.51, 0.53, 0.5, 0.5]), candidate(2, 0.4)]
    found += [candidate(number, 0.3, parts) for number in (3, 4)]
    interval = paired_difference(0.51, 0.5, (found[1].attrs["jackknife"], parts))
    said = (
        f"candidate 0 by +0.0100 ({interval.low:+.4f} to {interval.high:+.4f}), candidate 2 by +0.1100, candidate 3 by "
    )
    text = comparison(found, found[1], "pearson")
    assert text.startswith(f"candidate 1 is best with pearson 0.5100, ahead of {said}") and "candidate 4" not in text
    assert "tell nothing apart" in comparison([candidate(0, 0.5), candidate(1, 0.5)], candidate(0, 0.5))
    assert comparison(found[:1], found[0]) == "candidate 0 is best with value 0.5000"


def test_a_folder_that_another_worker_removes_meanwhile_is_passed_over(tmp_path, monkeypatch):
    for name in ("supernet", "teacher-outputs"):
        (tmp_path / name).mkdir()
    (tmp_path / "supernet" / "training.json").write_text("{}")
    scandir = os.scandir

    def vanishing(path="."):
        if str(path).endswith("teacher-outputs"):
            shutil.rmtree(path, ignore_errors=True)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanishing)
    assert training_files(tmp_path) == [tmp_path / "supernet" / "training.json"]
    assert not (tmp_path / "teacher-outputs").exists()
