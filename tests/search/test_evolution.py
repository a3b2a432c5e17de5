"""Regularised evolution: who lives, who wins a tournament, what happens where no child is new."""

import numpy as np
import pytest

from effbert.random import generator
from effbert.search.evolution import EvolutionSampler


class Numbers:
    """Whole numbers below `size`; a mutation is the next number, round in a circle."""

    def __init__(self, size=1000):
        self.size = size

    def sample(self, rng):
        return int(rng.integers(self.size))

    def mutate(self, number, rng):
        return (number + 1) % self.size

    def encode(self, number):
        return np.array([number], dtype=np.float32)

    def key(self, number):
        return str(number)


def told(values, population, tournament):
    sampler = EvolutionSampler(Numbers(), population, tournament)
    for number, value in values.items():
        sampler.tell(number, value)
    return sampler


def test_a_child_of_the_best_alive_where_everyone_takes_part():
    sampler = told({10: 0.1, 20: 0.9, 30: 0.5}, population=3, tournament=3)
    assert sampler.ask(generator(0)) == 21


def test_the_best_dies_of_age():
    sampler = told({20: 0.9, 10: 0.1, 30: 0.5, 40: 0.3}, population=3, tournament=3)
    assert sampler.ask(generator(0)) == 31


def test_age_goes_by_telling_and_failed_ones_do_not_age_the_others():
    sampler = told({20: 0.9, 10: 0.1, 50: None, 60: float("nan"), 30: 0.5}, population=3, tournament=3)
    assert sampler.ask(generator(0)) == 21


def test_of_equals_the_older_wins():
    assert told({10: 0.5, 20: 0.5}, population=2, tournament=2).ask(generator(0)) == 11


def test_a_tournament_of_one_gives_everyone_a_child_and_a_larger_one_favours_the_better():
    values = {10 * number: float(number) for number in range(10)}
    wins = {}
    for tournament in (1, 5):
        sampler = told(values, 10, tournament)
        wins[tournament] = [sampler._winner(generator(seed)) for seed in range(300)]
    assert set(wins[1]) == set(values)
    assert np.mean(wins[5]) > np.mean(wins[1]) + 15
    assert min(wins[5]) >= 40  # the best of five different ones


def test_random_until_the_population_is_full():
    sampler = told({10: 0.5}, population=2, tournament=2)
    assert sampler.ask(generator(7)) == Numbers().sample(generator(7))


def test_the_space_is_sampled_where_every_child_is_known():
    sampler = told({10: 0.5, 11: 0.4}, population=2, tournament=2)
    sampler.asked(11 + 1)
    assert sampler.ask(generator(3)) not in (10, 11, 12)


@pytest.mark.parametrize(("population", "tournament"), [(4, 5), (4, 0), (0, 0)])
def test_a_tournament_that_cannot_be_held_is_refused(population, tournament):
    with pytest.raises(ValueError, match="1 <= tournament <= population"):
        EvolutionSampler(Numbers(), population, tournament)
