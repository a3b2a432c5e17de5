"""Candidates trained at once: each comes out as it would alone, from one pass of the teacher, in groups that fit."""

import dataclasses

import numpy as np
import pytest
import torch

from effbert.engine import Phase
from effbert.search import population
from effbert.search.progress import Reporter
from effbert.student import Distillation, Student, distil


@pytest.fixture
def budget(workspace):
    return dataclasses.replace(workspace.config.stage1, general_share=0.5, task_share=0.6)


def student(workspace, supernet, architecture, number):
    model = supernet.extract(architecture, workspace.main_task.spec.name)
    return Student(model, Phase(("test", number), workspace.config.seed))


def test_a_candidate_trained_in_a_population_is_the_one_trained_alone(workspace, supernet, architectures, budget):
    assert workspace.config.student.hidden_dropout_prob == 0.1
    numbered = list(enumerate(architectures))
    calls, encoder = [], workspace.general_teacher.encoder
    hook = encoder.register_forward_hook(lambda *_: calls.append(1))
    together = [student(workspace, supernet, architecture, number) for number, architecture in numbered]
    results = distil(workspace, together, budget)
    shared_passes = len(calls)
    for (number, architecture), mine, result in zip(numbered, together, results, strict=True):
        calls.clear()
        alone = student(workspace, supernet, architecture, number)
        (expected,) = distil(workspace, [alone], budget)
        assert len(calls) == shared_passes
        assert result.tokens == expected.tokens and not result.diverged
        for name, weight in alone.model.state_dict().items():
            torch.testing.assert_close(mine.model.state_dict()[name], weight, rtol=0, atol=1e-6, msg=name)
    hook.remove()
    steps = len(workspace.general_plan(0.5, 32, 0)) + len(workspace.plan(range_of(workspace, 0.6), 16, "task", 0))
    assert steps >= 20


def range_of(workspace, share):
    return workspace.main_task.train.select(range(round(share * len(workspace.main_task.train))))


def test_students_of_different_seeds_cannot_share_batches(workspace, supernet, architectures, budget):
    one, other = (student(workspace, supernet, architectures[0], 0) for _ in range(2))
    other = dataclasses.replace(other, phase=Phase(("test", 0), 7))
    with pytest.raises(ValueError, match=r"need one seed, not \[0, 7\]"):
        distil(workspace, [one, other], budget)


def evaluated(workspace, supernet, architectures, share=0.5, **changes):
    workspace = dataclasses.replace(workspace, config=dataclasses.replace(workspace.config, **changes))
    evaluator = population.trained_candidates(workspace, supernet, "stage1", workspace.config.stage1, Reporter())
    members, room = list(enumerate(architectures)), evaluator.room(architectures)
    groups = [members[first : first + room] for first in range(0, len(members), room)]
    return {number: outcome for group in groups for number, outcome in evaluator.evaluate(group, share)}


def test_values_do_not_depend_on_how_many_train_at_once(workspace, supernet, architectures):
    expected = evaluated(workspace, supernet, architectures)
    assert list(expected) == [0, 1, 2]
    for size in (1, 2):
        found = evaluated(workspace, supernet, architectures, population=size)
        for number, outcome in expected.items():
            assert found[number].value == outcome.value
            assert found[number].attrs["losses"] == outcome.attrs["losses"]
            assert found[number].attrs["jackknife"] == outcome.attrs["jackknife"]
    for outcome in expected.values():
        assert outcome.attrs["scores"]["roc_auc"] == outcome.value
        assert np.mean(outcome.attrs["jackknife"]) == pytest.approx(outcome.value, abs=0.01)
        assert outcome.attrs["flops"] > outcome.attrs["parameters"] > 0
        assert {part: kept[-1][0] for part, kept in outcome.attrs["losses"].items()} == {"general": 0.5, "task": 0.5}
        assert outcome.attrs["tokens"] > 0 and outcome.attrs["seconds"] > 0 and len(outcome.phases) == 2


def test_candidates_may_be_ranked_by_the_tasks_metric_as_published(workspace, supernet, architectures):
    by_area = evaluated(workspace, supernet, architectures[:1])[0]
    by_task = evaluated(workspace, supernet, architectures[:1], ranking_metric="task")[0]
    assert by_task.value == by_task.attrs["scores"]["accuracy"] != by_area.value
    assert np.mean(by_task.attrs["jackknife"]) == pytest.approx(by_task.value, abs=0.01)
    assert by_task.attrs["scores"].keys() == by_area.attrs["scores"].keys() == {"accuracy", "roc_auc"}


def test_the_last_epoch_counts_or_the_best_of_all(workspace, supernet, architectures):
    stage, found = workspace.config.stage1, {}
    phase = dataclasses.replace(stage.task_phase, num_train_epochs=2)
    for scored in ("last", "all"):
        settings = dataclasses.replace(stage, task_phase=phase, scored_epochs=scored)
        found[scored] = evaluated(workspace, supernet, architectures[:1], share=1.0, stage1=settings)[0]
    epochs = found["all"].attrs["epochs"]
    assert len(epochs) == 2 and found["last"].attrs["epochs"] == epochs[1:]
    assert found["last"].value == epochs[1]["roc_auc"]
    assert found["all"].value == max(epoch["roc_auc"] for epoch in epochs)


def test_a_stage_may_rank_on_a_part_of_the_rows(workspace, supernet, architectures, monkeypatch):
    scored, evaluate_rows = [], population.evaluate_rows

    def noted(logits_of, task, **options):
        scored.append(task.validation["labels"])
        return evaluate_rows(logits_of, task, **options)

    monkeypatch.setattr(population, "evaluate_rows", noted)
    whole = evaluated(workspace, supernet, architectures)
    rows = scored.pop()
    scored.clear()
    settings = dataclasses.replace(workspace.config.stage1, ranking_share=0.25)
    some = evaluated(workspace, supernet, architectures, stage1=settings)
    assert scored and all(labels == rows[: round(0.25 * len(rows))] for labels in map(list, scored))
    for number, outcome in some.items():
        assert outcome.attrs["tokens"] == whole[number].attrs["tokens"]  # trained alike, scored on fewer


def test_the_population_is_what_was_asked_for_or_what_memory_holds(workspace, supernet, architectures, monkeypatch):
    def size(count, free, asked=0):
        monkeypatch.setattr(population, "free_memory", lambda device: free)
        config = dataclasses.replace(workspace.config, population=asked)
        return population.population_size(
            dataclasses.replace(workspace, config=config), supernet, architectures[:1] * count
        )

    enough = 10**12
    each = 2 * 16 * 78_751
    assert size(8, enough) == 8 and size(8, enough, asked=3) == 3
    assert 2 <= size(8, 3 * each) <= 3  # K larger than memory: as many as fit
    assert size(8, 3 * each, asked=8) == size(8, 3 * each)
    assert size(8, 10) == 1


def test_a_candidate_that_diverged_has_no_value():
    result = Distillation("loss not finite at step 20 of task distillation", [], 1.0, 5, ())
    outcome = population.outcome(result, "accuracy", {"parameters": 7})
    assert outcome.value is None and outcome.diverged == result.diverged and outcome.attrs["parameters"] == 7
