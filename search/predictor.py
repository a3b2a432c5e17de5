"""A predictor of fitness that proposes what it ranks highest: cheap ridge regressions on what was evaluated so far.

TRIED
"""

import numpy as np

from effbert.architecture import Architecture
from effbert.random import generator
from effbert.search.indicators import Indicators
from effbert.search.sampler import RememberingSampler
from effbert.search.space import Space

MEMBERS = 10
PENALTY = 0.1
RANDOM_EVERY = 5
PARENTS = 10
CANDIDATES = 64
ROUNDS = 2


class PredictorSampler(RememberingSampler):
    """Random until `initial` architectures have a value, then the best predicted; refitted every `refit_every` values.

    Every RANDOM_EVERY-th architecture stays random, by the number seen: it keeps the predictor honest about regions
    that it ruled out. ValueError unless initial >= 2 and refit_every >= 1.
    """

    def __init__(self, space: Space, initial: int = 12, refit_every: int = 2):
        if initial < 2 or refit_every < 1:
            raise ValueError(f"predictor needs initial >= 2 and refit_every >= 1; got {initial} and {refit_every}")
        super().__init__(space)
        self.initial, self.refit_every = initial, refit_every
        self._scored: list[Architecture] = []
        self._codes: list[np.ndarray] = []
        self._values: list[float] = []
        self._ensemble: Ensemble | None = None

    def _learn(self, architecture: Architecture, value: float) -> None:
        self._scored.append(architecture)
        self._codes.append(np.asarray(self.space.encode(architecture)).ravel())
        self._values.append(value)

    def _propose(self, rng: np.random.Generator) -> Architecture:
        if len(self._values) < self.initial or len(self.seen) % RANDOM_EVERY == RANDOM_EVERY - 1:
            return self._sample_new(rng)
        return self._best_predicted(rng)

    def _best_predicted(self, rng: np.random.Generator) -> Architecture:
        """The best of ROUNDS rounds of candidates.

        The first half of the first round comes from the space, its other half mutates the PARENTS best by value; each
        further round mutates the PARENTS best predicted so far.
        """
        ensemble = self._refitted()
        member = int(rng.integers(MEMBERS))
        best = np.argsort(-np.array(self._values), kind="stable")[:PARENTS]
        parents = [self._scored[index] for index in best]
        ranked: list[tuple[float, Architecture]] = []
        for round_number in range(ROUNDS):
            sampled = CANDIDATES // 2 if round_number == 0 else 0
            drawn = [self.space.sample(rng) for _ in range(sampled)]
            drawn += [self.space.mutate(parents[rng.integers(len(parents))], rng) for _ in range(CANDIDATES - sampled)]
            new = [candidate for candidate in drawn if candidate not in self.seen]
            if new:
                codes = np.array([np.asarray(self.space.encode(candidate)).ravel() for candidate in new])
                ranked += zip(ensemble.predict(codes, member), new, strict=True)
                ranked.sort(key=lambda pair: -pair[0])
                parents = [candidate for _, candidate in ranked[:PARENTS]]
        return ranked[0][1] if ranked else self._sample_new(rng)

    def _refitted(self) -> "Ensemble":
        scored = len(self._values)
        fit_on = scored - (scored - self.initial) % self.refit_every
        if self._ensemble is None or self._ensemble.fitted_on != fit_on:
            self._ensemble = Ensemble(np.array(self._codes[:fit_on]), np.array(self._values[:fit_on]))
        return self._ensemble


class Ensemble:
    """MEMBERS ridge regressions of the fitness `values` [N], as normal scores, on the indicators of `codes` [N, D].

    Each member weighs the evaluations with its own exponential draws (the Bayesian bootstrap), keyed by N alone, so
    that equal evaluations give equal members. Only the order of the values counts: one very bad value moves nothing.
    The penalty is PENALTY · D, so that it means the same for short and long encodings.
    """

    def __init__(self, codes: np.ndarray, values: np.ndarray):
        from sklearn.kernel_ridge import KernelRidge

        self.fitted_on = len(values)
        self._indicators = Indicators(codes)
        features, target = self._indicators(codes), normal_scores(values)
        kernel, ridge = features @ features.T, KernelRidge(alpha=PENALTY * codes.shape[1], kernel="precomputed")
        weights = generator(len(values), "predictor").exponential(size=(MEMBERS, len(values)))
        dual = [ridge.fit(kernel, target, sample_weight=weight).dual_coef_ for weight in weights]
        self._coefficients = np.array(dual) @ features

    def predict(self, codes: np.ndarray, member: int) -> np.ndarray:
        """[M] halfway between the mean of all members and this one, for codes [M, D]; higher is better."""
        opinions = self._indicators(codes) @ self._coefficients.T
        return (opinions.mean(axis=1) + opinions[:, member]) / 2


def normal_scores(values: np.ndarray) -> np.ndarray:
    """[N] the standard normal quantiles of the mid-ranks of `values` [N]; equal values share theirs."""
    from scipy.stats import norm, rankdata

    return norm.ppf((rankdata(values) - 0.5) / len(values))
