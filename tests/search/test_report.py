"""The final table on terminals of several widths, and off one: no number is ever cut; the winner beside each row."""

import io
import os
import shutil

import numpy as np
import pytest
from rich.console import Console

from effbert.evaluate import pack_hits
from effbert.search.agreement import paired_difference
from effbert.search.record import training_files
from effbert.search.report import print_table, summarise, verdict

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
    costs = dict.fromkeys(("parameters", "flops", "latency_ms", "latency_spread_ms"), 1)
    packed = "" if hits is None else pack_hits(np.array(hits))
    scores = {"accuracy": 0.5 if hits is None else float(np.mean(hits))}
    return {"row": name, "repeat": repeat, "scores": scores, "hits": packed, "architecture": "", **costs}


def test_the_winner_is_compared_row_by_row_where_answers_are_known():
    rows = [row("winner", [1, 1, 1, 0]), row("published", [1, 0, 1, 0]), row("plain BERT", None)]
    found = paired_difference(rows[0]["hits"], rows[1]["hits"])
    said = f"+0.2500 against published ({found.low:+.4f} to {found.high:+.4f}), +0.2500 against plain BERT."
    assert verdict(summarise(rows, "accuracy"), rows, "accuracy") == f"The winner's accuracy: {said}"


def test_of_several_seeds_their_means_are_compared():
    rows = [row(name, hits, repeat) for repeat in range(2) for name, hits in (("winner", [1, 1]), ("other", [1, 0]))]
    assert verdict(summarise(rows, "accuracy"), rows, "accuracy") == "The winner's accuracy: +0.5000 against other."
    assert verdict(summarise(rows[:1], "accuracy"), rows[:1], "accuracy") == ""


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
