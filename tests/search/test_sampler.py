"""Samplers: nothing twice, failures, exhaustion, and a resume by telling the study again."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert.random import generator
from effbert.search.sampler import SAMPLERS, RandomSampler, SpaceExhausted, make_sampler


class Letters:
    """All words of `length` out of `letters` letters; a word and its mirror image are the same candidate."""

    def __init__(self, letters=6, length=4):
        self.letters, self.length = letters, length

    def sample(self, rng):
        return tuple(int(letter) for letter in rng.integers(self.letters, size=self.length))

    def mutate(self, word, rng):
        at = rng.integers(self.length)
        return (*word[:at], (word[at] + 1 + int(rng.integers(self.letters - 1))) % self.letters, *word[at + 1 :])

    def encode(self, word):
        return np.array(min(word, word[::-1]), dtype=np.float32)

    def key(self, word):
        return str(min(word, word[::-1]))


def small(name, space):
    return make_sampler(name, space, initial=4, refit_every=2)


def value_of(word, number):
    return None if number % 7 == 3 else float("nan") if number % 7 == 5 else float(sum(word) % 9)


def run(sampler, count, seed=0):
    told = []
    for number in range(count):
        word = sampler.ask(generator(seed, "ask", number))
        told.append((word, value_of(word, number)))
        sampler.tell(*told[-1])
    return told


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_candidate_of_a_small_space_is_proposed_once_and_then_it_says_so(name):
    space = Letters(3, 3)  # 27 words, 18 up to mirroring
    sampler = small(name, space)
    keys = [space.key(word) for word, _ in run(sampler, 18)]
    assert len(set(keys)) == 18
    with pytest.raises(SpaceExhausted, match="18 seen"):
        sampler.ask(generator(0, "ask", 18))


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_is_asked_for_and_not_told_is_not_proposed_again(name):
    space = Letters()
    sampler = small(name, space)
    run(sampler, 10)
    keys = [space.key(sampler.ask(generator(0, "same draw"))) for _ in range(5)]
    assert len(set(keys)) == 5


@pytest.mark.parametrize("name", SAMPLERS)
def test_what_was_only_told_is_not_proposed(name):
    space = Letters()
    first = small(name, space).ask(generator(0, "draw"))
    sampler = small(name, space)
    sampler.tell(first[::-1], 1.0)
    assert space.key(sampler.ask(generator(0, "draw"))) != space.key(first)


@given(seed=st.integers(0, 1000), stop=st.integers(0, 14), name=st.sampled_from(SAMPLERS))
@settings(max_examples=12, deadline=None)
def test_a_sampler_told_the_study_again_goes_on_as_the_first_would_have(seed, stop, name):
    undisturbed = run(small(name, Letters()), 15, seed)
    resumed = small(name, Letters())
    for word, value in undisturbed[:stop]:
        resumed.tell(word, value)
    for number in range(stop, 15):
        word = resumed.ask(generator(seed, "ask", number))
        assert word == undisturbed[number][0]
        resumed.tell(word, value_of(word, number))


@pytest.mark.parametrize("name", SAMPLERS)
def test_telling_the_same_candidate_twice_is_refused(name):
    sampler = small(name, Letters())
    sampler.tell((0, 1, 2, 3), 1.0)
    with pytest.raises(ValueError, match="told twice"):
        sampler.tell((3, 2, 1, 0), 1.0)


def test_an_unknown_sampler_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown sampler 'best'; known: random, lanas"):
        make_sampler("best", Letters())


def test_random_is_the_first_new_draw_of_the_space():
    space = Letters()
    assert RandomSampler(space).ask(generator(5, "a")) == space.sample(generator(5, "a"))
