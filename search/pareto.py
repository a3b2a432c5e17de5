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
        here = values[left]
        no_worse = (here[:, None] >= here[None]).all(-1)
        better = no_worse & (here[:, None] > here[None]).any(-1)
        unbeaten = ~better.any(0)
        found[left[unbeaten]] = front
        left, front = left[~unbeaten], front + 1
    return found.tolist()


def point(value: float, evaluation: Evaluation, minimize: Sequence[str]) -> tuple[float, ...]:
    """A candidate's value and, negative, what it costs by each name of `minimize`."""
    return (value, *(-evaluation.attrs[COSTS[name]] for name in minimize))


def best_front(evaluations: Sequence[Evaluation], minimize: Sequence[str]) -> list[Evaluation]:
    """The complete candidates that no other beats, the highest value first; of equal points the first."""
    complete = [evaluation for evaluation in evaluations if evaluation.state == "complete"]
    points = [point(evaluation.value, evaluation, minimize) for evaluation in complete]
    first = {p: e for p, e, front in reversed(list(zip(points, complete, fronts(points), strict=True))) if front == 0}
    return sorted(first.values(), key=lambda evaluation: (-evaluation.value, evaluation.number))
