"""Samplers: which architecture a search evaluates next. `ask` proposes, `tell` says how good it was.

A sampler knows a space only through `effbert.search.space.Space`. What it asks for depends on what it was told, in
order, on what it has asked for and not been told, and on the generator it is handed: so a resumed search rebuilds it by
telling it the study once more, and naming what is still open. No sampler proposes a key twice.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from effbert.architecture import Architecture
from effbert.search.space import Space

MAX_TRIES = 10_000
SAMPLERS = ("random", "evolution", "lanas", "predictor", "released")


class SpaceExhausted(ValueError):
    """The space gave nothing but architectures that were already proposed."""


class Sampler(Protocol):
    """What a search stage needs."""

    def ask(self, rng: np.random.Generator) -> Architecture:
        """A new architecture to evaluate. Raises SpaceExhausted where none is left."""

    def asked(self, architecture: Architecture) -> None:
        """An architecture that an earlier sampler proposed and that has no value yet: it is not proposed again.

        The order of several does not matter. ValueError if it was told before.
        """

    def tell(self, architecture: Architecture, value: float | None) -> None:
        """The fitness (higher is better) of an architecture, asked for or not; None or not finite: it failed.

        A failed one is not proposed again, and nothing is learned from it. ValueError if it was told before.
        """

    def revise(self, values: Sequence[float]) -> None:
        """The fitness of every architecture that was told a finite one, in the order of telling, as it is now.

        Where fitness is a rank among all, what comes later changes it. ValueError for another number of values.
        """


def make_sampler(name: str, space: Space, initial: int | None = None, refit_every: int | None = None) -> Sampler:
    """The sampler of this name, one of SAMPLERS. None: the sampler's own default.

    initial: random architectures first; `evolution` keeps as many as its population, with a tournament of a quarter.
    refit_every: `lanas`, `predictor` and `released` learn anew every so many values.
    """
    counts = {"initial": initial, "refit_every": refit_every}
    given = {argument: count for argument, count in counts.items() if count is not None}
    if name == "random":
        return RandomSampler(space)
    if name == "evolution":
        from effbert.search.evolution import EvolutionSampler

        return EvolutionSampler(space) if initial is None else EvolutionSampler(space, initial, max(2, initial // 4))
    if name == "lanas":
        from effbert.search.partition import LanasSampler

        return LanasSampler(space, **given)
    if name == "predictor":
        from effbert.search.predictor import PredictorSampler

        return PredictorSampler(space, **given)
    if name == "released":
        from effbert.search.released import ReleasedSampler

        return ReleasedSampler(space, **given)
    raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")


class RememberingSampler(ABC):
    """What all samplers share: nothing seen is proposed again. Each kind says how it proposes and what it learns."""

    def __init__(self, space: Space):
        self.space = space
        self.seen = Seen(space)
        self._learned = 0

    def ask(self, rng: np.random.Generator) -> Architecture:
        architecture = self._propose(rng)
        self.seen.asked(architecture)
        return architecture

    def asked(self, architecture: Architecture) -> None:
        self.seen.asked(architecture)

    def tell(self, architecture: Architecture, value: float | None) -> None:
        self.seen.told(architecture)
        if not is_failed(value):
            self._learned += 1
            self._learn(architecture, float(value))

    @abstractmethod
    def _propose(self, rng: np.random.Generator) -> Architecture:
        """An architecture that was not seen; SpaceExhausted where none is left."""

    def revise(self, values: Sequence[float]) -> None:
        if len(values) != self._learned:
            raise ValueError(f"{len(values)} values to revise {self._learned} by")
        self._relearn([float(value) for value in values])

    @abstractmethod
    def _learn(self, architecture: Architecture, value: float) -> None:
        """Take note of a finite value."""

    @abstractmethod
    def _relearn(self, values: list[float]) -> None:
        """Replace all values that were learned, in their order."""

    def _sample_new(self, rng: np.random.Generator) -> Architecture:
        return self.seen.new(lambda: self.space.sample(rng))


class RandomSampler(RememberingSampler):
    """New architectures as the space draws them; the baseline that every sampler has to beat."""

    def _propose(self, rng: np.random.Generator) -> Architecture:
        return self._sample_new(rng)

    def _learn(self, architecture: Architecture, value: float) -> None:
        """Nothing: no value changes what is drawn."""

    def _relearn(self, values: list[float]) -> None:
        """Nothing either."""


class Seen:
    """The keys that were told, and those asked for and not yet told."""

    def __init__(self, space: Space):
        self._key = space.key
        self._asked: set[str] = set()
        self._told: set[str] = set()

    def __contains__(self, architecture: Architecture) -> bool:
        key = self._key(architecture)
        return key in self._told or key in self._asked

    def __len__(self) -> int:
        return len(self._told | self._asked)

    def asked(self, architecture: Architecture) -> None:
        key = self._key(architecture)
        if key in self._told:
            raise ValueError(f"asked for after it was told: {key}")
        self._asked.add(key)

    def told(self, architecture: Architecture) -> None:
        key = self._key(architecture)
        if key in self._told:
            raise ValueError(f"told twice: {key}")
        self._told.add(key)
        self._asked.discard(key)

    def new(self, draw: Callable[[], Architecture]) -> Architecture:
        """The first of at most MAX_TRIES draws that was not seen."""
        for _ in range(MAX_TRIES):
            architecture = draw()
            if architecture not in self:
                return architecture
        raise SpaceExhausted(
            f"the search space is exhausted: {MAX_TRIES:,} draws gave no new architecture beside the "
            f"{len(self):,} seen; evaluate fewer candidates or widen the space"
        )


def is_failed(value: float | None) -> bool:
    """Whether a told value stands for a failed candidate."""
    return value is None or not math.isfinite(value)
