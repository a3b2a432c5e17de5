"""LaNAS: the published median splits, ties, small counts, exploration, and that it beats random search."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effbert.random import generator
from effbert.search.partition import LanasSampler, Partition, best_leaf, split_at_median
from effbert.search.sampler import RandomSampler

FIXTURE = json.loads((Path(__file__).parent.parent / "fixtures" / "partition_objective.json").read_text())


class Structures:
    """The space of the fixture: six ids 0 to 15 within a band of parameters."""

    costs = np.array(FIXTURE["costs"])

    def sample(self, rng):
        while True:
            ids = rng.integers(16, size=6)
            if self.fits(ids):
                return tuple(ids.tolist())

    def mutate(self, ids, rng):
        while True:
            changed = np.array(ids)
            changed[rng.integers(6)] = rng.integers(16)
            if self.fits(changed) and tuple(changed.tolist()) != ids:
                return tuple(changed.tolist())

    def encode(self, ids):
        return np.array(ids, dtype=np.float32)

    def key(self, ids):
        return str(ids)

    def fits(self, ids):
        low, high = FIXTURE["band"]
        return low <= FIXTURE["fixed"] + self.costs[ids].sum() <= high


def objective(ids):
    single = sum(row[i] for row, i in zip(FIXTURE["table"], ids, strict=True))
    return single + sum(w[ids[first] // 4][ids[second] % 4] for first, second, w in FIXTURE["pairs"])


def search(sampler, seed, count, value=objective):
    values = []
    for number in range(count):
        ids = sampler.ask(generator(seed, "ask", number))
        values.append(value(ids))
        sampler.tell(ids, values[-1])
    return np.array(values)


def medians(values, depth):
    good = split_at_median(values)
    below = [medians(values[half], depth - 1) for half in (good, ~good)] if depth else []
    return [np.median(values), *below]


@pytest.mark.parametrize(("count", "tree", "depth"), [(120, 0, 1), (120, 1, 2), (480, 0, 3)])
def test_the_splits_are_those_of_the_published_sampler(count, tree, depth):
    ours = medians(np.array(FIXTURE["values"][:count]), depth)
    published = FIXTURE["trees"][str(count)][tree]

    def same(a, b):
        return a[0] == pytest.approx(b[0], abs=6e-5) and len(a) == len(b) and all(map(same, a[1:], b[1:]))

    assert same(ours, published)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30))
def test_a_split_parts_unequal_values_into_two_halves_in_order(numbers):
    values = np.array(numbers, dtype=float)
    good = split_at_median(values)
    if len(set(numbers)) == 1:
        assert good.all()
    else:
        assert 0 < good.sum() < len(values)
        assert values[good].min() > values[~good].max()


def test_lanas_beats_random_on_the_synthetic_objective():
    scores = {LanasSampler: [], RandomSampler: []}
    for seed in (1, 2):
        runs = {kind: search(kind(Structures()), seed, 130) for kind in scores}
        assert (runs[LanasSampler][:80] == runs[RandomSampler][:80]).all()
        for kind, values in runs.items():
            scores[kind].append(values[80:].mean())
    assert np.mean(scores[LanasSampler]) > np.mean(scores[RandomSampler]) + 0.7
    assert all(np.array(scores[LanasSampler]) > np.array(scores[RandomSampler]) + 0.3)


@pytest.mark.parametrize("value", [lambda ids: 0.5, lambda ids: 0.0 if sum(ids) % 10 < 6 else objective(ids) + 9])
def test_constant_and_tied_fitness_is_searched_on(value):
    sampler = LanasSampler(Structures(), initial=20, refit_every=5)
    assert len(search(sampler, 0, 40, value)) == 40


def test_four_evaluations_and_a_refit_every_two_are_enough():
    sampler = LanasSampler(Structures(), initial=4, refit_every=2)
    search(sampler, 0, 4)
    sampler.ask(generator(0, "next"))
    assert len(sampler._model.paths) == 2 and sampler._fitted_on == 4


def test_it_refits_only_every_so_many_values_and_on_all_of_them():
    sampler = LanasSampler(Structures(), initial=20, refit_every=10)
    fitted_on = []
    for number in range(45):
        ids = sampler.ask(generator(0, "ask", number))
        fitted_on.append(sampler._fitted_on)
        sampler.tell(ids, objective(ids))
    assert fitted_on == [0] * 20 + [20] * 10 + [30] * 10 + [40] * 5


def test_failed_candidates_count_as_seen_and_not_as_values():
    sampler = LanasSampler(Structures(), initial=20)
    search(sampler, 0, 19)
    for number in range(5):
        sampler.tell(sampler.ask(generator(1, number)), None)
    sampler.ask(generator(2))
    assert sampler._model is None


def test_a_leaf_that_was_visited_often_gives_way_to_a_nearly_as_good_one():
    values = np.array([1.0, 1.0, 0.98, 0.98, 0.0, 0.0])
    leaf_of = np.array([0, 0, 1, 1, 2, 2])
    assert best_leaf(values, leaf_of, 3) == 0
    more = np.concatenate([values, np.ones(30)]), np.concatenate([leaf_of, np.zeros(30, dtype=int)])
    assert best_leaf(*more, 3) == 1


def test_a_proposal_lies_in_the_chosen_leaf_or_is_counted_as_a_fallback():
    sampler = LanasSampler(Structures(), initial=40)
    search(sampler, 0, 40)
    for number in range(10):
        before = sampler.fallbacks
        proposal = sampler.ask(generator(0, "proposal", number))
        partition = sampler._model
        leaf = best_leaf(np.array(sampler._values), partition.fitted_leaf_of, len(partition.paths))
        inside = partition.leaf_of(np.array([sampler.space.encode(proposal)]))[0] == leaf
        assert inside == (sampler.fallbacks == before)
    assert sampler.fallbacks < 10


def test_the_probabilities_of_all_leaves_sum_to_one():
    rng = generator(0, "codes")
    codes = rng.integers(16, size=(60, 6))
    partition = Partition(codes, rng.normal(size=60))
    assert len(partition.paths) > 2
    total = sum(np.exp(partition.log_likelihood(codes, leaf)) for leaf in range(len(partition.paths)))
    np.testing.assert_allclose(total, 1.0, atol=1e-12)


@pytest.mark.parametrize(("initial", "refit_every"), [(1, 10), (80, 0)])
def test_counts_that_cannot_be_split_are_refused(initial, refit_every):
    with pytest.raises(ValueError, match="initial >= 2 and refit_every >= 1"):
        LanasSampler(Structures(), initial, refit_every)
