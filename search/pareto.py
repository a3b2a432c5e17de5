"""Several objectives: who is better than whom where no single number says so. The one idea: peel off the points that no
other beats, then those that only they beat, and so on (non-dominated sorting)."""

from collections.abc import Sequence

import numpy as np

from effbert.search.study import Evaluation

COSTS = {"parameters": "parameters", "flops": "flops", "latency": "latency_ms"}  # --minimize -> beside a candidate


def fronts(points: Sequence[Sequence[float]]) -> list[int]:
    """The front of each point, 0 for the best; more is better in every coordinate. Equal points share theirs."""
    values = np.asarray(points, float)
    found, left, front = np.full(len(values), -1), np.arange(len(values)), 0
    while len(left):
        first = _unbeaten(values[left])
        found[left[first]] = front
        left, front = left[~first], front + 1
    return found.tolist()


def best(points: Sequence[Sequence[float]]) -> list[int]:
    """Indices, rising, of the points that no other beats; of equal points the first."""
    if not len(points):
        return []
    first = {tuple(points[index]): index for index in np.flatnonzero(_unbeaten(np.asarray(points, float)))[::-1]}
    return sorted(map(int, first.values()))


def _unbeaten(values: np.ndarray) -> np.ndarray:
    no_worse = (values[:, None] >= values[None]).all(-1)
    better = no_worse & (values[:, None] > values[None]).any(-1)
    return ~better.any(0)


def point(value: float, evaluation: Evaluation, minimize: Sequence[str]) -> tuple[float, ...]:
    """A candidate's value and, negative, what it costs by each name of `minimize`."""
    return (value, *(-evaluation.attrs[COSTS[name]] for name in minimize))


def best_front(evaluations: Sequence[Evaluation], minimize: Sequence[str]) -> list[Evaluation]:
    """The complete candidates that no other beats, the highest value first; of equal points the first."""
    complete = [evaluation for evaluation in evaluations if evaluation.state == "complete"]
    chosen = best([point(evaluation.value, evaluation, minimize) for evaluation in complete])
    return sorted((complete[index] for index in chosen), key=lambda evaluation: (-evaluation.value, evaluation.number))
