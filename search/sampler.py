"""Samplers: which architecture a search evaluates next. `ask` proposes, `tell` says how good it was.

A sampler knows a space only through `effbert.search.space.Space`. What it asks for depends on what it was told, in
order, on what it has asked for and not been told, and on the generator it is handed: so a resumed search rebuilds it by
telling it the study once more. No sampler proposes a key twice.
"""

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from effbert.architecture import Architecture
from effbert.search.space import Space

MAX_TRIES = 10_000
SAMPLERS = ("random", "lanas")


class SpaceExhausted(ValueError):
    """The space gave nothing but architectures that were already proposed."""


class Sampler(Protocol):
    """What a search stage needs."""

    def ask(self, rng: np.random.Generator) -> Architecture:
        """A new architecture to evaluate. Raises SpaceExhausted where none is left."""

    def tell(self, architecture: Architecture, value: float | None) -> None:
        """The fitness (higher is better) of an architecture, asked for or not; None or not finite: it failed.

        A failed one is not proposed again, and nothing is learned from it. ValueError if it was told before.
        """


def make_sampler(name: str, space: Space, initial: int = 80, refit_every: int = 10) -> Sampler:
    """`random`, or `lanas` with `initial` random architectures first and a refit every `refit_every` values."""
    if name == "random":
        return RandomSampler(space)
    if name == "lanas":
        from effbert.search.partition import LanasSampler

        return LanasSampler(space, initial, refit_every)
    raise ValueError(f"unknown sampler {name!r}; known: {', '.join(SAMPLERS)}")


class RandomSampler:
    """New architectures as the space draws them; the baseline that every sampler has to beat."""

    def __init__(self, space: Space):
        self.space = space
        self.seen = Seen(space)

    def ask(self, rng: np.random.Generator) -> Architecture:
        architecture = self.seen.new(lambda: self.space.sample(rng))
        self.seen.asked(architecture)
        return architecture

    def tell(self, architecture: Architecture, value: float | None) -> None:
        self.seen.told(architecture)


class Seen:
    """The keys that were told, and those asked for and not yet told."""

    def __init__(self, space: Space):
        self._key = space.key
        self._asked: set[str] = set()
        self._told: set[str] = set()

    def __contains__(self, architecture: Architecture) -> bool:
        key = self._key(architecture)
        return key in self._told or key in self._asked

    def asked(self, architecture: Architecture) -> None:
        self._asked.add(self._key(architecture))

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
            f"{len(self._told | self._asked):,} seen; evaluate fewer candidates or widen the space"
        )


def is_failed(value: float | None) -> bool:
    """Whether a told value stands for a failed candidate."""
    return value is None or not math.isfinite(value)
