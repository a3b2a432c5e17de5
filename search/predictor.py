"""A predictor of fitness that proposes what it ranks highest: ridge regressions on the indicators of each encoding.

Proposals come from the space and from mutations of the best; an ensemble ranks them, half by its mean, half by one
member drawn for each proposal, so that the candidates of a cohort differ. Every fifth is random.

On the synthetic objective of `effbert.bench.samplers` (20 seeds, 300 evaluations, `bench/results`) this reached the top
1 % after 17 evaluations in the median; random search needed 44 with these seeds (69 is expected), evolution 32, LaNAS
with as few random ones first 31. Best found after 40: 2.56 against 1.72, 2.03 and 1.98; after 300: 3.13 against 2.19,
2.90 and 3.11. The mean value of evaluation 81 on is lower than LaNAS's, 2.04 against 2.33: the random fifth lies near
0.06, which leaves about 2.53 for the others.

Tried on a prototype with 16 random ones first, best after 80, 20 seeds, where 0.1 is noise. Ranked by one member 2.64,
by the mean 2.72, half and half 2.75, by the mean plus half a standard deviation 2.66. Changed from one member: normal
scores of the ranks as the target 2.76, a penalty five times as strong 2.50, extremely randomised trees 2.70 on codes
and 2.54 on indicators at twice the time, codes also read as ordered 2.79, not kept since node ids have no order. On 40
other seeds 16 random ones first needed 21.5 evaluations to the top 1 %, 12 and 10 needed 17 or 18; refitting at every
value changed nothing. On six made-up objectives over the coarse space, with noise and one seed each, it was no faster
than LaNAS with 12 first (medians 19.5 and 18); the best after 100 lay 3.57 against 3.36 standard deviations above the
mean, the mean value of 51 to 100 2.41 against 2.54: a tie at best.
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

    def _relearn(self, values: list[float]) -> None:
        self._values, self._ensemble = values, None

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
