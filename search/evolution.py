"""Regularised evolution (Real et al. 2019, arXiv 1802.01548): the youngest live, the best of a few of them has a child.

The population is the last `population` architectures that were told a value, in the order of telling, so that everyone
dies of age and none of a low score: a lucky value is forgotten unless its children confirm it.
"""

from collections import deque

import numpy as np

from effbert.architecture import Architecture
from effbert.search.sampler import RememberingSampler
from effbert.search.space import Space

TRIES = 100


class EvolutionSampler(RememberingSampler):
    """Random until `population` architectures have a value, then a mutation of the winner of a tournament.

    A tournament draws `tournament` members without replacement; the highest value wins, the older of equals. Where
    TRIES children in a row are known already, the space is sampled instead. The paper keeps 100 with tournaments of 25
    for 20,000 evaluations; the defaults are meant for some hundred and keep its ratio. ValueError unless
    1 <= tournament <= population.
    """

    def __init__(self, space: Space, population: int = 20, tournament: int = 5):
        if not 1 <= tournament <= population:
            raise ValueError(f"evolution needs 1 <= tournament <= population; got {tournament} and {population}")
        super().__init__(space)
        self.population, self.tournament = population, tournament
        self._alive: deque[tuple[Architecture, float]] = deque(maxlen=population)

    def _learn(self, architecture: Architecture, value: float) -> None:
        self._alive.append((architecture, value))

    def _relearn(self, values: list[float]) -> None:
        alive = [architecture for architecture, _ in self._alive]
        self._alive.clear()
        self._alive.extend(zip(alive, values[len(values) - len(alive) :], strict=True))

    def _propose(self, rng: np.random.Generator) -> Architecture:
        if len(self._alive) == self.population:
            for _ in range(TRIES):
                child = self.space.mutate(self._winner(rng), rng)
                if child not in self.seen:
                    return child
        return self._sample_new(rng)

    def _winner(self, rng: np.random.Generator) -> Architecture:
        drawn = sorted(rng.choice(self.population, size=self.tournament, replace=False))
        return max((self._alive[index] for index in drawn), key=lambda member: member[1])[0]
