"""How much training a candidate gets: synchronous halving over rungs, each a share of the whole budget.

The one idea: a cohort of candidates is trained on the first rung, and only when all of them have a value is it decided
who goes on to the next, larger one; so the outcome does not depend on who was ready first. A rung is a whole training
of its own from the same warm weights, both phases shrunk by its share and with a learning-rate schedule to its end:
what reaches the last rung is trained as if there had been no others.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from effbert.config import SearchStage
from effbert.search.study import Evaluation


@dataclass(frozen=True)
class Rung:
    """A share of the whole budget, and how many candidates of a cohort are trained with it."""

    share: float
    places: int


def ladder(settings: SearchStage, cohort: int) -> list[Rung]:
    """The rungs of a cohort of so many candidates: each costs what the first one does, with at least one candidate.

    A rung after which nobody would be dropped is left out.
    """
    counts = [max(1, round(cohort * settings.rungs[0] / share)) for share in settings.rungs]
    dropping = [here > after for here, after in itertools.pairwise(counts)] + [True]
    rungs = zip(settings.rungs, counts, dropping, strict=True)
    return [Rung(share, count) for share, count, drops in rungs if drops]


def cut(settings: SearchStage, share: float) -> SearchStage:
    """The stage's budget, both phases cut to a share of it."""
    return dataclasses.replace(
        settings, general_share=settings.general_share * share, task_share=settings.task_share * share
    )


def survivors(
    values: Mapping[int, float], keys: Mapping[int, str], count: int, fronts: Mapping[int, int] | None = None
) -> list[int]:
    """Numbers of the `count` candidates with the highest values, equal ones by key; in ascending order. With several
    objectives those of the lowest of their `fronts` come first."""
    order = fronts or dict.fromkeys(values, 0)
    ranked = sorted(values, key=lambda number: (order[number], -values[number], keys[number]))
    return sorted(ranked[:count])


def fitness(cohort: Sequence[Evaluation], rungs: int) -> dict[int, float | None]:
    """What a sampler is told of the finished candidates of one cohort, by number; None for those without any value.

    The full-budget value where there is one. A candidate that stopped earlier gets its last value plus what those that
    went on gained on average, rung by rung: values of different rungs do not compare, differences on one rung do.
    """
    values = {evaluation.number: evaluation.attrs.get("rungs", []) for evaluation in cohort}
    gains = [_mean_gain(values.values(), rung) for rung in range(rungs - 1)]
    found: dict[int, float | None] = {}
    for evaluation in cohort:
        reached = values[evaluation.number]
        if evaluation.state == "complete":
            found[evaluation.number] = evaluation.value
        elif evaluation.state == "pruned" and reached:
            found[evaluation.number] = reached[-1] + sum(gains[len(reached) - 1 :])
        else:
            found[evaluation.number] = None
    return found


def _mean_gain(values, rung: int) -> float:
    gains = [reached[rung + 1] - reached[rung] for reached in values if len(reached) > rung + 1]
    return sum(gains) / len(gains) if gains else 0.0
