"""Models side by side: who does what in which thread, with how many cores, and what an error leaves."""

import contextvars
import gc
import threading
import time
import weakref

import pytest
import torch

from effbert import random, threads
from effbert.kernels import dispatch, use_backend
from effbert.threads import MOST, Team


@pytest.fixture
def team():
    """Makes teams, and ends them; PyTorch has as many threads afterwards as before."""
    before, made = torch.get_num_threads(), []

    def make(cores, wanted, step_bytes=0):
        torch.set_num_threads(cores)
        made.append(Team(wanted, step_bytes))
        return made[-1]

    yield make
    for each in made:
        each.close()
    torch.set_num_threads(before)


@pytest.mark.parametrize("cores,wanted,size,own", [(2, 5, 2, 1), (4, 3, 3, 1), (8, 2, 2, 4), (40, 99, MOST, 5)])
def test_cores_are_shared_out_over_the_threads_and_all_are_back_afterwards(team, cores, wanted, size, own):
    threads, meet = {}, threading.Barrier(size)

    def work(item):
        meet.wait(60)  # so that no thread takes two
        threads[item] = threading.get_ident(), torch.get_num_threads()

    mine = team(cores, wanted)
    mine.each(range(size), work)
    idents, counts = zip(*threads.values(), strict=True)
    assert len(set(idents)) == size and threading.get_ident() not in idents and set(counts) == {own}
    assert torch.get_num_threads() == cores
    mine.each([7], work := lambda item: threads.update({item: (threading.get_ident(), torch.get_num_threads())}))
    assert threads[7][0] != threading.get_ident() and threads[7][1] == own  # its last bits do not depend on the others


@pytest.mark.parametrize("cores,wanted", [(1, 5), (4, 1)])
def test_one_core_or_one_item_needs_no_thread(team, cores, wanted):
    seen = []
    team(cores, wanted).each([3, 1, 2], lambda item: seen.append((item, threading.get_ident())))
    assert seen == [(item, threading.get_ident()) for item in (3, 1, 2)]


def test_an_error_comes_after_all_are_done_and_is_the_first_items(team):
    done = []

    def work(item):
        done.append(item)
        if item in (1, 3):
            raise MemoryError(f"no room for {item}")

    mine = team(2, 5)
    with pytest.raises(MemoryError, match="no room for 1"):
        mine.each(range(5), work)
    assert sorted(done) == [0, 1, 2, 3, 4] and torch.get_num_threads() == 2
    mine.each([6], work)
    assert done[-1] == 6


def test_what_a_failed_step_had_in_memory_is_free_once_its_error_is_dealt_with(team):
    kept = []

    def work(item):
        tensor = torch.ones(1000)
        kept.append(weakref.ref(tensor))
        raise MemoryError

    mine = team(2, 2)
    gc.disable()
    try:
        with pytest.raises(MemoryError):
            mine.each([0, 1], work)
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("share,size", [(0.0, 4), (0.1, 4), (0.4, 2), (3.0, 1)])
def test_there_are_no_more_threads_than_memory_holds_steps(team, monkeypatch, share, size):
    monkeypatch.setattr(threads, "free_memory", lambda device: 2_000_000)
    mine = team(4, 5, int(share * 1_000_000))
    assert mine.size == size and (mine.pool is None) == (size == 1)


def test_the_end_does_not_wait_for_what_was_not_begun(team):
    begun = []

    def work(item):
        begun.append(item)
        time.sleep(0.2)

    mine = team(2, 2)
    futures = [mine.pool.submit(work, item) for item in range(50)]
    mine.close()
    assert len(begun) < 10 and any(future.cancelled() for future in futures)


def test_what_the_caller_has_set_holds_in_the_threads(team):
    variable = contextvars.ContextVar("of a test", default=0)
    variable.set(5)
    seen = []
    with use_backend("eager"):
        team(2, 2).each([0, 1], lambda item: seen.append((variable.get(), dispatch.current())))
    assert seen == [(5, "eager")] * 2


def test_dropout_keys_follow_a_threads_own_seed(team):
    def keys(seed):
        with random.seeded(seed):
            return [random.drawn_key() for _ in range(200)]

    expected, found = {seed: keys(seed) for seed in range(4)}, {}
    team(4, 4).each(range(4), lambda seed: found.update({seed: keys(seed)}))
    assert found == expected and expected[0] != expected[1]
    torch.manual_seed(3)
    assert random.drawn_key() == expected[3][0]  # outside of it: torch's own
