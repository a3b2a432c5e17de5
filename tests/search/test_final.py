"""The final rows: one that diverges costs the others nothing, and best/ is a winner that has scores."""

import dataclasses
import json

import pytest
import torch
from datasets import concatenate_datasets
from transformers import AutoModelForSequenceClassification

from effbert.card import read_scores
from effbert.config import PRESETS
from effbert.search import final, report
from effbert.search.final import final_rows, rows
from effbert.search.progress import Reporter


@pytest.fixture
def small(workspace, tmp_path):
    """The workspace in a folder of its own, with a budget of a few steps."""
    settings = PRESETS["smoke"]().final
    task = dataclasses.replace(settings.task_phase, num_train_epochs=1)
    settings = dataclasses.replace(settings, general_share=0.02, task_share=0.05, task_phase=task, num_random=0)
    config = dataclasses.replace(workspace.config, final=settings, corpus_tokens=2000)
    return dataclasses.replace(workspace, folder=tmp_path, config=config)


def test_a_row_that_diverges_is_said_and_best_is_the_first_winner_with_scores(
    small, supernet, space, architectures, monkeypatch
):
    def initial(workspace, supernet, row, warm, on_step):
        start = real(workspace, supernet, row, warm, on_step)
        if (row.name, warm.seed) == ("winner", small.config.seed):
            with torch.no_grad():
                start.model.classifier.weight.fill_(float("nan"))
        return start

    real = final.initial_model
    monkeypatch.setattr(final, "initial_model", initial)
    small.tokenizer("a text", truncation=True, max_length=9, padding="max_length")
    lines = [line for line in rows(small, architectures[0], space) if line.name in ("winner", "published")]
    stale = small.folder / "best"  # of stages that began anew
    stale.mkdir()
    results = []
    for repeat in range(2):
        results += final_rows(small, supernet, lines, repeat, Reporter())
        assert (small.folder / "best" / "config.json").exists() == (repeat == 1)
        assert not stale.exists() or repeat == 1
    lost, published, winner, _ = results
    assert lost["scores"] is None and lost["diverged"].startswith("loss not finite at step")
    assert published["scores"] and winner["scores"] and (published["diverged"], winner["diverged"]) == ("", "")
    best = AutoModelForSequenceClassification.from_pretrained(small.folder / "best").eval()
    assert final.held_out(small, Traced(best)) == (winner["scores"], winner["jackknife"]) and lost["jackknife"] == []
    saved = json.loads((small.folder / "best" / "tokenizer.json").read_text())
    assert saved["truncation"] is None and saved["padding"] is None
    kept, spec = read_scores(small.folder / "best"), small.main_task.spec
    rows_held_out = len(small.held_out[spec.name].raw.validation)
    assert kept == {"task": spec.name, "pair": spec.pair, "rows": rows_held_out, "scores": winner["scores"]}

    table = report.summarise(results, "accuracy")
    assert [(line["row"], line["repeats"], line["diverged"]) for line in table] == [
        ("winner", 1, 1),
        ("published", 2, 0),
    ]
    assert table[0]["score"] == winner["scores"]["accuracy"] and table[0]["spread"] is None
    assert report.cells(table[0])[1] == f"{table[0]['score']:.4f} (1 diverged)"
    card = report.model_card(
        {"table": table, "results": results, "layers": [], "seconds": {}, "kind": "classification", "task": "t"}
        | {"metric": "accuracy", "seed": 5, "max_length": 8, "device": "d"}
    )
    assert f"accuracy {table[0]['score']:.4f}" in card and "seed 6" in card and "after the same warm-up" in card
    assert report.warmed_up({"start_from": ["net"]}).startswith(". They began with slices of the supernet in net, ")

    before = [json.dumps(result) for result in results]
    monkeypatch.setattr(final, "distil", lambda *more: pytest.fail("every row is finished"))
    again = [row for repeat in range(2) for row in final_rows(small, supernet, lines, repeat, Reporter())]
    assert [json.dumps(result) for result in again] == before


class Traced:
    """A loaded student, asked as held_out asks."""

    def __init__(self, model):
        self.model = model

    def trace(self, *inputs):
        return self.model(*inputs)


def test_a_row_whose_warm_up_diverges_is_no_student(small, supernet, space, architectures, monkeypatch):
    def warm_up(*arguments, **more):
        (result,) = real(*arguments, **more)
        return [dataclasses.replace(result, diverged="loss not finite at step 3")]

    real = final.warm_up
    monkeypatch.setattr(final, "warm_up", warm_up)
    plain = next(line for line in rows(small, architectures[0], space) if line.plain_width)
    (result,) = final_rows(small, supernet, [plain], 0, Reporter())
    assert result["scores"] is None and result["diverged"] == "loss not finite at step 3 of its warm-up"
    (line,) = report.summarise([result], "accuracy")
    assert (line["score"], line["repeats"], report.cells(line)[1]) == (None, 0, "diverged")
    assert result["parameters"] > 0


def test_final_rows_learn_from_all_rows_that_are_meant_for_it(small, supernet, space, architectures, monkeypatch):
    name, seen, real = small.main_task.spec.name, [], final.distil
    more = concatenate_datasets([small.main_task.train] * 2)
    held_out = {name: dataclasses.replace(small.held_out[name], train=more)}

    def spied(workspace, *rest):
        seen.append(len(workspace.main_task.train))
        return real(workspace, *rest)

    monkeypatch.setattr(final, "distil", spied)
    lines = [line for line in rows(small, architectures[0], space) if line.name == "winner"]
    final_rows(dataclasses.replace(small, held_out=held_out), supernet, lines, 0, Reporter())
    assert seen == [len(more)] and len(more) == 2 * len(small.main_task.train)
