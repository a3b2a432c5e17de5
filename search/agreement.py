"""How far two ways of ranking candidates agree, and how sure a difference between two candidates is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effbert import random
from effbert.evaluate import unpack_hits
from effbert.search.study import Evaluation

DRAWS = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval of LEVEL confidence, and how many things it rests on."""

    estimate: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.estimate:.4f} ({self.low:.4f} to {self.high:.4f}, n = {self.count})"


def kendall(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Interval:
    """Kendall's tau-b between two scores of the same candidates; interval by bootstrap over candidates.

    NaN where one side gives all the same score. ValueError for fewer than two candidates or different numbers.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"rank agreement needs two scores of at least 2 candidates, not {len(first)} and {len(second)}"
        )
    from scipy.stats import kendalltau

    a, b = np.asarray(first, float), np.asarray(second, float)
    rng = random.generator(seed, "kendall", len(a))
    drawn = []
    for _ in range(DRAWS):
        rows = rng.integers(len(a), size=len(a))
        tau = kendalltau(a[rows], b[rows]).statistic
        if np.isfinite(tau):
            drawn.append(tau)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]) if drawn else (np.nan, np.nan)
    return Interval(float(kendalltau(a, b).statistic), float(low), float(high), len(a))


def paired_difference(first: str, second: str) -> Interval:
    """How much more often the first candidate is right, from the `hits` of both on the same rows.

    Normal interval of the mean difference a row. ValueError where the rows are not the same number.
    """
    a, b = unpack_hits(first), unpack_hits(second)
    if len(a) != len(b):
        raise ValueError(f"hits on {len(a)} and on {len(b)} rows do not pair")
    difference = a.astype(float) - b
    half = 1.96 * float(difference.std(ddof=1)) / len(a) ** 0.5 if len(a) > 1 else float("nan")
    mean = float(difference.mean())
    return Interval(mean, mean - half, mean + half, len(a))


def of_rungs(evaluations: Sequence[Evaluation]) -> dict[int, Interval]:
    """By rung, counted from 0: agreement of its values with those at full budget, among candidates that have both.

    Only those that halving let through are among them, the better ones of each rung: their ranks agree less than those
    of all candidates would. Where a cohort was too small for every rung, its candidates are left out.
    """
    complete = [e.attrs["rungs"] for e in evaluations if e.state == "complete"]
    longest = max(map(len, complete), default=0)
    whole = [rungs for rungs in complete if len(rungs) == longest]
    if len(whole) < 2:
        return {}
    full = [rungs[-1] for rungs in whole]
    return {rung: kendall([rungs[rung] for rungs in whole], full) for rung in range(longest - 1)}


def of_filter(evaluations: Sequence[Evaluation], name: str) -> Interval | None:
    """Agreement of a first filter's score, kept as `name`, with full budget, among candidates that it let through; None
    for fewer than two."""
    both = [(e.attrs[name], e.value) for e in evaluations if e.state == "complete" and name in e.attrs]
    return kendall(*zip(*both, strict=True)) if len(both) > 1 else None
