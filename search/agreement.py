"""How far two ways of ranking candidates agree, and how sure a difference between two candidates is."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from effbert import random
from effbert.search.study import Evaluation

DRAWS = 1000
LEVEL, NORMAL = 0.95, 1.96
FEWEST = 6  # candidates for an interval: of fewer it would hold nearly everything


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval of LEVEL confidence, and how many things it rests on."""

    estimate: float
    low: float
    high: float
    count: int

    def __str__(self) -> str:
        return f"{self.estimate:.4f} ({self.low:.4f} to {self.high:.4f}, n = {self.count})"

    @property
    def as_difference(self) -> str:
        """With its sign, without the number."""
        return f"{self.estimate:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


def kendall(first: Sequence[float], second: Sequence[float], seed: int = 0) -> Interval:
    """Kendall's tau-b between two scores of the same candidates; interval by bootstrap over candidates.

    Where every draw of the bootstrap is the same, as for a perfect order, the interval goes on that side to where it
    would end by Fisher's transformation (Bonett and Wright 2000) with one pair of candidates the other way round. NaN
    where one side gives all the same score, and an interval of NaN for fewer than FEWEST candidates. ValueError for
    fewer than two candidates or different numbers.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"rank agreement needs two scores of at least 2 candidates, not {len(first)} and {len(second)}"
        )
    from scipy.stats import kendalltau

    a, b = np.asarray(first, float), np.asarray(second, float)
    estimate = float(kendalltau(a, b).statistic)
    if len(a) < FEWEST or not np.isfinite(estimate):
        return Interval(estimate, float("nan"), float("nan"), len(a))
    rng = random.generator(seed, "kendall", len(a))
    drawn = []
    for _ in range(DRAWS):
        rows = rng.integers(len(a), size=len(a))
        tau = kendalltau(a[rows], b[rows]).statistic
        if np.isfinite(tau):
            drawn.append(tau)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if high - low < 1e-9:
        least = math.tanh(math.atanh(1 - 4 / (len(a) * (len(a) - 1))) - NORMAL * math.sqrt(0.437 / (len(a) - 4)))
        low, high = (min(low, least), high) if estimate > 0 else (low, max(high, -least))
    return Interval(estimate, float(low), float(high), len(a))


def paired_difference(first: float, second: float, parts: tuple[Sequence[float], Sequence[float]]) -> Interval:
    """How far the first of two values is ahead, both being scores on the same rows, whatever the metric.

    parts: of both, the values without each group of rows (effbert.evaluate.jackknife), from which the interval follows
    by the delete-a-group jackknife (Kott 2001) with Student's t: what both find hard moves both and widens nothing. It
    is of the rows alone; another seed would move the values too. ValueError where the groups are not the same number or
    fewer than two.
    """
    from scipy.stats import t

    a, b = (np.asarray(values, float) for values in parts)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"values without {len(a)} and without {len(b)} groups of rows do not pair")
    difference = a - b
    error = math.sqrt((len(a) - 1) / len(a) * float(((difference - difference.mean()) ** 2).sum()))
    half = float(t.ppf((1 + LEVEL) / 2, len(a) - 1)) * error
    return Interval(first - second, first - second - half, first - second + half, len(a))


def of_rungs(evaluations: Sequence[Evaluation]) -> dict[float, Interval]:
    """By share of the budget, rising: agreement of its values with those at full budget, among candidates that have
    both; where fewer than two do, NaN and their number.

    Only those that halving let through are among them, the better ones of each rung: their ranks agree less than those
    of all candidates would.
    """
    complete = [
        dict(zip(e.attrs["shares"], e.attrs["rungs"], strict=True))
        for e in evaluations
        if e.state == "complete" and len(e.attrs.get("shares", ())) == len(e.attrs["rungs"])  # older runs kept none
    ]
    found = {}
    for share in sorted({share for e in evaluations for share in e.attrs.get("shares", ()) if share < 1}):
        both = [(values[share], values[1.0]) for values in complete if share in values]
        nan = float("nan")
        found[share] = kendall(*zip(*both, strict=True)) if len(both) > 1 else Interval(nan, nan, nan, len(both))
    return found


def of_filter(evaluations: Sequence[Evaluation], name: str) -> Interval | None:
    """Agreement of a first filter's score, kept as `name`, with full budget, among candidates that it let through; None
    for fewer than two."""
    both = [(e.attrs[name], e.value) for e in evaluations if e.state == "complete" and name in e.attrs]
    return kendall(*zip(*both, strict=True)) if len(both) > 1 else None
