"""LaNAS (arXiv 1906.06832), the sampler that the published search names: learned splits of what was evaluated so far.

The evaluated architectures are split at their median fitness, again and again; at each split a classifier learns to
tell the good half from the bad one by their encodings. A leaf is a region of the space with a mean fitness and a number
of visits. The next architecture comes from the leaf with the highest upper confidence bound: of a batch of new ones,
half drawn from the space and half mutated from the leaf's own, the one that most probably lies in the leaf.

An encoding is read column by column as codes, one indicator for each value seen, not as quantities: logistic regression
on the indicators told good from bad better than boosted trees and forests did in the coarse space, and searched the
synthetic objective of the tests as well as boosted trees at a fraction of their time.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from effbert.architecture import Architecture
from effbert.search.indicators import Indicators
from effbert.search.sampler import RememberingSampler
from effbert.search.space import Space

EXPLORATION = 0.3
CANDIDATES = 32
LEAF_SIZE = 10


class PartitionSampler(RememberingSampler):
    """Random until `initial` architectures have a value, then from what is learned of them anew every `refit_every`."""

    def __init__(self, space: Space, initial: int = 80, refit_every: int = 10):
        if initial < 2 or refit_every < 1:
            raise ValueError(
                f"lanas and released need initial >= 2 and refit_every >= 1; got {initial} and {refit_every}"
            )
        super().__init__(space)
        self.initial, self.refit_every = initial, refit_every
        self._scored: list[Architecture] = []
        self._codes: list[np.ndarray] = []
        self._values: list[float] = []
        self._model, self._fitted_on = None, 0  # what `_fit` made, and of how many values

    def _propose(self, rng: np.random.Generator) -> Architecture:
        return self._sample_new(rng) if len(self._values) < self.initial else self._from_model(rng)

    @abstractmethod
    def _from_model(self, rng: np.random.Generator) -> Architecture:
        """A new architecture from the region that promises most."""

    @abstractmethod
    def _fit(self, codes: np.ndarray, values: np.ndarray) -> Any:
        """What `_from_model` wants to know of `codes` [N, D] with fitness `values` [N]."""

    def _learn(self, architecture: Architecture, value: float) -> None:
        self._scored.append(architecture)
        self._codes.append(np.asarray(self.space.encode(architecture)).ravel())
        self._values.append(value)

    def _relearn(self, values: list[float]) -> None:
        self._values, self._model = values, None

    def _refitted(self) -> Any:
        """What `_fit` makes of the first values, as many as were there when it was last due."""
        scored = len(self._values)
        fit_on = scored - (scored - self.initial) % self.refit_every
        if self._model is None or self._fitted_on != fit_on:
            self._model = self._fit(np.array(self._codes[:fit_on]), np.array(self._values[:fit_on]))
            self._fitted_on = fit_on
        return self._model


class LanasSampler(PartitionSampler):
    """Proposals come from the leaf of `Partition` with the highest upper confidence bound.

    `fallbacks` counts the proposals for which no candidate was classified into the chosen leaf; the one that came
    closest was proposed instead; it counts since this object was made.
    """

    def __init__(self, space: Space, initial: int = 80, refit_every: int = 10):
        super().__init__(space, initial, refit_every)
        self.fallbacks = 0

    def _fit(self, codes: np.ndarray, values: np.ndarray) -> "Partition":
        return Partition(codes, values)

    def _from_model(self, rng: np.random.Generator) -> Architecture:
        partition = self._refitted()
        values, codes = np.array(self._values), np.array(self._codes)
        leaf_of = np.concatenate([partition.fitted_leaf_of, partition.leaf_of(codes[self._fitted_on :])])
        leaf = best_leaf(values, leaf_of, len(partition.paths))
        members = np.flatnonzero(leaf_of == leaf)
        candidates = list(self._candidates(members, rng))
        codes = np.array([np.asarray(self.space.encode(candidate)).ravel() for candidate in candidates])
        inside = partition.leaf_of(codes) == leaf
        self.fallbacks += not inside.any()
        likelihood = partition.log_likelihood(codes, leaf)
        return candidates[int(np.argmax(np.where(inside | ~inside.any(), likelihood, -np.inf)))]

    def _candidates(self, members: np.ndarray, rng: np.random.Generator) -> Iterator[Architecture]:
        """At least one new architecture, at most CANDIDATES."""
        found = 0
        for number in range(CANDIDATES):
            if number % 2:
                drawn = self.space.sample(rng)
            else:
                drawn = self.space.mutate(self._scored[members[rng.integers(len(members))]], rng)
            if drawn not in self.seen:
                found += 1
                yield drawn
        if not found:
            yield self._sample_new(rng)


def best_leaf(values: np.ndarray, leaf_of: np.ndarray, leaves: int) -> int:
    """The leaf [of `leaves`] with the highest mean of `values` [N] plus the exploration term of UCB1.

    The term is EXPLORATION · std(values) · sqrt(2 ln N / visits), visits the number of evaluations in the leaf [N leaf
    numbers in `leaf_of`]; every leaf has at least one. Ties go to the first, the one of the better halves.
    """
    visits = np.bincount(leaf_of, minlength=leaves)
    means = np.bincount(leaf_of, weights=values, minlength=leaves) / visits
    bonus = EXPLORATION * values.std() * np.sqrt(2 * math.log(len(values)) / visits)
    return int(np.argmax(means + bonus))


def split_at_median(values: np.ndarray) -> np.ndarray:
    """bool [N], the good half: at or above the median, or only above where nothing lies below; all True for equals."""
    good = values >= np.median(values)
    above = values > np.median(values)
    return above if good.all() and above.any() else good


@dataclass
class Partition:
    """The tree of splits over `codes` [N, D] with fitness `values` [N].

    A node whose halves would hold fewer than LEAF_SIZE is a leaf, and so is one of equal values; only the root is split
    however few there are. `paths` [leaves] lists the (split, good or bad) decisions that lead to each leaf.
    """

    codes: np.ndarray
    values: np.ndarray
    paths: list[tuple[tuple[int, bool], ...]] = field(default_factory=list, init=False)
    fitted_leaf_of: np.ndarray = field(init=False)
    _weights: list[np.ndarray] = field(default_factory=list, init=False)
    _indicators: Indicators = field(init=False)

    def __post_init__(self):
        self._indicators = Indicators(self.codes)
        self.fitted_leaf_of = np.zeros(len(self.values), dtype=int)
        self._grow(self._indicators(self.codes), np.arange(len(self.values)), ())

    def leaf_of(self, codes: np.ndarray) -> np.ndarray:
        """The leaf number [M] that the classifiers send each encoding [M, D] to."""
        good = self._logits(codes) > 0
        leaf_of = np.zeros(len(codes), dtype=int)
        for leaf, path in enumerate(self.paths):
            reached = np.ones(len(codes), dtype=bool)
            for split, side in path:
                reached &= good[:, split] == side
            leaf_of[reached] = leaf
        return leaf_of

    def log_likelihood(self, codes: np.ndarray, leaf: int) -> np.ndarray:
        """[M] log of the product of the classifiers' probabilities along the path to `leaf`, for codes [M, D]."""
        logits = self._logits(codes)
        total = np.zeros(len(codes))
        for split, side in self.paths[leaf]:
            total -= np.logaddexp(0, -logits[:, split] if side else logits[:, split])
        return total

    def _grow(self, features: np.ndarray, members: np.ndarray, path: tuple[tuple[int, bool], ...]) -> None:
        good = split_at_median(self.values[members])
        if good.all() or (path and len(members) < 2 * LEAF_SIZE):
            self.fitted_leaf_of[members] = len(self.paths)
            self.paths.append(path)
            return
        split = len(self._weights)
        self._weights.append(_fit(features[members], good))
        self._grow(features, members[good], (*path, (split, True)))
        self._grow(features, members[~good], (*path, (split, False)))

    def _logits(self, codes: np.ndarray) -> np.ndarray:
        """[M, splits]; positive means good."""
        if not self._weights or not len(codes):
            return np.zeros((len(codes), len(self._weights)))
        weights = np.array(self._weights)
        return self._indicators(codes) @ weights[:, :-1].T + weights[:, -1]


def _fit(features: np.ndarray, good: np.ndarray) -> np.ndarray:
    """Logistic regression with an L2 penalty; weights [F + 1] for features [M, F], the intercept last."""
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=300).fit(features, good)
    return np.append(model.coef_[0], model.intercept_[0])
