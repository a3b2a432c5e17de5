"""Mixing tasks: every batch once at temperature 1, evener above it, in an order that the seed decides."""

from collections import Counter

import datasets
import pytest

from effbert.config import SearchConfig
from effbert.data.batches import BatchPlan
from effbert.step import MixedPlan, mixed_counts


def plan(rows):
    return BatchPlan(datasets.Dataset.from_dict({"input_ids": [[1, 2]] * rows}), 2, pad_token_id=0)


def tasks_of(mixed):
    return [mixed[index].task for index in range(len(mixed))]


def test_at_temperature_one_every_batch_occurs_once():
    mixed = MixedPlan({"a": plan(20), "b": plan(4)}, 3, 0)
    assert Counter(mixed.places) == Counter([("a", index) for index in range(10)] + [("b", 0), ("b", 1)])
    assert tasks_of(mixed) == tasks_of(MixedPlan({"a": plan(20), "b": plan(4)}, 3, 0))
    assert tasks_of(mixed) != tasks_of(MixedPlan({"a": plan(20), "b": plan(4)}, 3, 1))


def test_a_higher_temperature_evens_tasks_out_and_small_ones_go_round():
    assert mixed_counts({"a": 900, "b": 100}, 1.0) == {"a": 900, "b": 100}
    assert mixed_counts({"a": 900, "b": 100}, 2.0) == {"a": 750, "b": 250}
    assert mixed_counts({"a": 10_000, "b": 1}, 1.0)["b"] == 1
    mixed = MixedPlan({"a": plan(18), "b": plan(2)}, 3, 0, temperature=2.0)
    assert Counter(tasks_of(mixed)) == {"a": 8, "b": 2}
    assert [place for place in mixed.places if place[0] == "b"] == [("b", 0), ("b", 0)]


def test_a_temperature_below_one_is_refused():
    with pytest.raises(ValueError, match=r"task_temperature is 0\.5: it must be at least 1"):
        SearchConfig(output_dir="", task_temperature=0.5)
