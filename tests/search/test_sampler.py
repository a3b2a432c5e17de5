"""All samplers: nothing twice, failures, exhaustion, and a resume by telling the study again."""

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


@given(seed=st.integers(0, 1000), stop=st.integers(0, 12), cohort=st.integers(1, 4), name=st.sampled_from(SAMPLERS))
@settings(max_examples=24, deadline=None)
def test_a_resume_with_open_candidates_goes_on_as_the_first_would_have(seed, stop, cohort, name):
    first, resumed = small(name, Letters()), small(name, Letters())
    for word, value in run(first, stop, seed):
        resumed.tell(word, value)
    members = [first.ask(generator(seed, "cohort", number)) for number in range(cohort)]
    for word in reversed(members):
        resumed.asked(word)
    for number in range(3):
        assert resumed.ask(generator(seed, "more", number)) == first.ask(generator(seed, "more", number))
    for number, word in enumerate(members):
        first.tell(word, value_of(word, number))
        resumed.tell(word, value_of(word, number))
    assert resumed.ask(generator(seed, "last")) == first.ask(generator(seed, "last"))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("count", [3, 11])
def test_revised_values_are_as_if_they_had_been_told(name, count):
    revised, fresh = small(name, Letters()), small(name, Letters())
    told = run(revised, count, seed=4)
    learned = [word for word, value in told if value is not None and value == value]
    values = [float(-sum(word) % 7) for word in learned]
    revised.revise([0.0] * len(learned))
    asked = revised.ask(generator(0, "between"))
    revised.revise(values)
    for word, value in told:
        fresh.tell(word, dict(zip(learned, values, strict=True)).get(word, value))
    fresh.asked(asked)
    for number in range(4):
        assert revised.ask(generator(5, number)) == fresh.ask(generator(5, number))
    with pytest.raises(ValueError, match=f"2 values to revise {len(learned)} by"):
        revised.revise([0.0, 1.0])


@pytest.mark.parametrize("name", SAMPLERS)
def test_an_open_candidate_is_not_proposed_and_may_be_named_again_until_it_is_told(name):
    space = Letters(3, 3)
    sampler = small(name, space)
    for word in ((0, 0, 1), (1, 0, 0), (2, 2, 2)):
        sampler.asked(word)
    keys = {space.key(sampler.ask(generator(0, "ask", number))) for number in range(16)}
    assert len(keys) == 16 and not keys & {"(0, 0, 1)", "(2, 2, 2)"}
    with pytest.raises(SpaceExhausted, match="18 seen"):
        sampler.ask(generator(0, "no more"))
    sampler.tell((0, 0, 1), 0.5)
    with pytest.raises(ValueError, match="asked for after it was told"):
        sampler.asked((1, 0, 0))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("failed", [None, float("nan"), float("-inf")])
def test_a_failed_candidate_is_not_proposed_and_teaches_nothing(name, failed):
    """Failed ones count as random draws only: where they lie makes no difference to what is asked for next."""
    space, proposals = Letters(), []
    for words in ([(5, 5, 5, 5), (5, 5, 5, 4)], [(1, 1, 1, 1), (1, 1, 1, 2)]):
        sampler = small(name, space)
        run(sampler, 12, seed=3)
        for word in words:
            assert word not in sampler.seen
            sampler.tell(word, failed)
        proposals.append([sampler.ask(generator(3, "next", number)) for number in range(6)])
        assert not {space.key(word) for word in words} & {space.key(word) for word in proposals[-1]}
    assert proposals[0] == proposals[1]


@pytest.mark.parametrize("name", SAMPLERS)
def test_without_counts_a_sampler_takes_its_own(name):
    assert make_sampler(name, Letters()).ask(generator(1)) == Letters().sample(generator(1))


def test_evolution_takes_initial_as_its_population_and_a_quarter_for_a_tournament():
    sampler = make_sampler("evolution", Letters(), initial=12)
    assert (sampler.population, sampler.tournament) == (12, 3)


@pytest.mark.parametrize(("name", "initial"), [("evolution", 1), ("lanas", 1), ("predictor", 1), ("released", 1)])
def test_one_random_architecture_is_too_few(name, initial):
    with pytest.raises(ValueError, match=f"{name}.* needs? "):
        make_sampler(name, Letters(), initial=initial)


def test_an_unknown_sampler_is_named_with_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown sampler 'best'; known: random, evolution, lanas, predictor, released"
    ):
        make_sampler("best", Letters())


def test_random_is_the_first_new_draw_of_the_space():
    space = Letters()
    assert RandomSampler(space).ask(generator(5, "a")) == space.sample(generator(5, "a"))
