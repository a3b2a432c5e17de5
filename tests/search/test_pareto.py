"""Several objectives: fronts, who survives, what a sampler is told, and who joins the final table."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effbert.search.budget import survivors
from effbert.search.pareto import best, best_front, fronts, point
from effbert.search.study import Evaluation


def candidate(number, value, flops, parameters=1, state="complete"):
    return Evaluation(number, f"text {number}", value, state, {"flops": flops, "parameters": parameters})


def beats(a, b):
    return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=20))
def test_a_point_is_one_front_behind_the_worst_that_beats_it(points):
    found = fronts(points)
    for own, here in zip(found, points, strict=True):
        before = [front for front, other in zip(found, points, strict=True) if beats(other, here)]
        assert own == max(before, default=-1) + 1


@given(st.lists(st.tuples(*[st.integers(0, 4)] * 2), max_size=20))
def test_the_best_are_the_first_front_each_point_once(points):
    assert best(points) == [
        index for index, front in enumerate(fronts(points)) if front == 0 and points[index] not in points[:index]
    ]


def test_fronts_of_one_objective_are_its_order():
    values = np.random.default_rng(0).permutation(10)
    assert fronts([(value,) for value in values]) == [9 - value for value in values]


def test_costs_count_and_only_those_named():
    assert point(0.5, candidate(0, 0.5, 100, 7), ("flops",)) == (0.5, -100)
    assert point(0.5, candidate(0, 0.5, 100, 7), ("parameters", "flops")) == (0.5, -7, -100)
    with pytest.raises(KeyError):
        point(0.5, candidate(0, 0.5, 100), ("latency",))


def test_the_cheap_survive_beside_the_good():
    values, keys = {0: 0.9, 1: 0.5, 2: 0.8, 3: 0.4}, {number: str(number) for number in range(4)}
    ranks = dict(enumerate(fronts([(0.9, -10), (0.5, -1), (0.8, -20), (0.4, -5)])))
    assert survivors(values, keys, 2) == [0, 2]
    assert survivors(values, keys, 2, ranks) == [0, 1]
    assert survivors(values, keys, 3, ranks) == [0, 1, 2]


def test_the_best_front_has_the_winner_first_and_equal_points_once():
    found = [candidate(0, 0.7, 5), candidate(1, 0.9, 10), candidate(2, 0.9, 10), candidate(3, 0.6, 9)]
    found += [candidate(4, None, 1, state="failed"), candidate(5, 0.5, 1)]
    chosen = best_front(found, ("flops",))
    assert [evaluation.number for evaluation in chosen] == [1, 0, 5]
