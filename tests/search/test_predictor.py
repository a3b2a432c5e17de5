"""The predictor: what its ensemble learns, when it is fitted anew, how much stays random, and that it pays."""

import re
from pathlib import Path

import numpy as np
import pytest

from effbert.bench.samplers import OBJECTIVE, run, synthetic
from effbert.random import generator
from effbert.search import predictor
from effbert.search.indicators import Indicators
from effbert.search.predictor import MEMBERS, RANDOM_EVERY, Ensemble, PredictorSampler, normal_scores


class Words:
    """All words of six letters out of eight."""

    def sample(self, rng):
        return tuple(rng.integers(8, size=6).tolist())

    def mutate(self, word, rng):
        at = rng.integers(6)
        return (*word[:at], (word[at] + 1 + int(rng.integers(7))) % 8, *word[at + 1 :])

    def encode(self, word):
        return np.array(word, dtype=np.float32)

    def key(self, word):
        return str(word)


def value_of(word):
    """Of which letter it is, in no order."""
    return sum((3 * letter + place) % 8 for place, letter in enumerate(word)) / 8


def words(count, seed=0):
    return generator(seed, "words").integers(8, size=(count, 6))


def test_indicators_know_the_values_they_saw():
    indicators = Indicators(np.array([[0, 5], [2, 5], [0, 7]]))
    assert indicators(np.array([[2, 7], [1, 5]])).tolist() == [[0, 1, 0, 1], [0, 0, 1, 0]]


def test_the_ensemble_ranks_words_it_has_not_seen():
    codes, fresh = words(150), words(500, seed=1)
    ensemble = Ensemble(codes, np.array([value_of(word) for word in codes]))
    truth = np.array([value_of(word) for word in fresh])
    for member in range(MEMBERS):
        assert np.corrcoef(ensemble.predict(fresh, member), truth)[0, 1] > 0.9


def test_members_differ_most_where_little_is_known():
    codes = words(200)
    codes[:, 0] = np.arange(200) < 4
    ensemble = Ensemble(codes, np.array([value_of(word) for word in codes]) + generator(0, "noise").normal(size=200))
    common, rare = words(300, seed=1), words(300, seed=1)
    common[:, 0], rare[:, 0] = 0, 1
    spread = [
        np.std([ensemble.predict(asked, member) for member in range(MEMBERS)], axis=0).mean()
        for asked in (common, rare)
    ]
    assert spread[1] > 1.1 * spread[0]


def test_only_the_order_of_the_values_counts():
    codes = words(40)
    values = np.array([value_of(word) for word in codes])
    wild = np.exp(5 * values)
    np.testing.assert_array_equal(Ensemble(codes, values).predict(codes, 0), Ensemble(codes, wild).predict(codes, 0))


def test_normal_scores_are_symmetric_and_equal_for_equals():
    scores = normal_scores(np.array([3.0, -1e9, 3.0, 7.0]))
    assert scores[0] == scores[2] and scores[1] == pytest.approx(-scores[3]) and scores[1] < scores[0] < scores[3]
    assert normal_scores(np.full(5, 2.0)).tolist() == [0.0] * 5


def test_equal_values_are_searched_on():
    sampler = PredictorSampler(Words(), initial=4)
    for number in range(20):
        sampler.tell(sampler.ask(generator(0, number)), 0.5)
    assert len(sampler.seen) == 20


def test_it_refits_only_every_so_many_values_and_on_all_of_them():
    sampler = PredictorSampler(Words(), initial=6, refit_every=4)
    fitted_on = []
    for number in range(18):
        word = sampler.ask(generator(0, number))
        sampler.tell(word, value_of(word))
        if number >= 5:
            fitted_on.append(sampler._refitted().fitted_on)
            assert sampler._refitted() is sampler._refitted()
    assert fitted_on == [6] * 4 + [10] * 4 + [14] * 4 + [18]


def test_every_so_many_is_random_by_the_number_seen_told_or_not():
    sampler = PredictorSampler(Words(), initial=4)
    for word in words(4).tolist():
        sampler.tell(tuple(word), value_of(word))
    random = []
    for number in range(4, 24):
        word = sampler.ask(generator(0, number))
        random.append(word == Words().sample(generator(0, number)))
    assert random == [number % RANDOM_EVERY == RANDOM_EVERY - 1 for number in range(4, 24)]


def test_an_open_cohort_gets_different_and_good_proposals():
    sampler = PredictorSampler(Words(), initial=60)
    for word in dict.fromkeys(map(tuple, words(60).tolist())):
        sampler.tell(word, value_of(word))
    cohort = [sampler.ask(generator(0, number)) for number in range(61, 64)]
    assert len(set(cohort)) == 3
    assert min(map(value_of, cohort)) > np.quantile([value_of(word) for word in words(2000, seed=5)], 0.97)


def test_it_needs_half_of_what_random_needs_on_the_synthetic_objective():
    """The median random search needs 69 evaluations to reach the top 1 %."""
    problem = synthetic(OBJECTIVE, 20_000)
    runs = [run(problem, "predictor", None, seed, 70) for seed in range(5)]
    reached = [int(np.argmax(np.append(values, np.inf) >= problem.threshold)) + 1 for values in runs]
    assert np.median(reached) <= 34
    assert np.mean([values.max() for values in runs]) > problem.published["best_at_300"]


@pytest.mark.parametrize(("initial", "refit_every"), [(1, 2), (16, 0)])
def test_counts_that_cannot_be_learned_from_are_refused(initial, refit_every):
    with pytest.raises(ValueError, match="initial >= 2 and refit_every >= 1"):
        PredictorSampler(Words(), initial, refit_every)


def test_sklearn_and_scipy_are_imported_only_where_they_are_used():
    source = Path(predictor.__file__).read_text()
    assert not re.search("^(import|from) (sklearn|scipy)", source, re.MULTILINE)
    assert re.search("^ +from sklearn", source, re.MULTILINE)
