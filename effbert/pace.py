"""Where long work stands, said seldom: every SECONDS, or every SHARE of the whole where that is longer.

The one idea: work is a share of a whole, from 0 to 1, so one clock serves steps of training and batches of rows; how
long the rest takes follows from what was done since it was begun here. Training phases say it where their `on_step`
leads (effbert.search.progress), what reads rows in the project's log.
"""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from effbert.data.batches import Batch, BatchPlan

SECONDS, SHARE = 30.0, 0.01

_log = logging.getLogger("effbert.pace")


class Standing(NamedTuple):
    """Where a training phase is after a step: `step` of `total`. part: the last of its names. losses: of each of its
    models the mean over the steps before the last read, where there was one."""

    step: int
    total: int
    part: str
    losses: tuple[float, ...] = ()


class Pace:
    """The clock of a piece of work of which `done`, a share from 0 to 1, is there as it starts."""

    def __init__(self, done: float = 0.0):
        self.first, self.begun = done, time.monotonic()
        self.said = self.begun

    def left(self, done: float) -> str | None:
        """The time left where it is time to say how much is done, else None."""
        now = time.monotonic()
        whole = (now - self.begun) / (done - self.first) if done > self.first else 0.0
        if done >= 1 or now - self.said < max(SECONDS, SHARE * whole):
            return None
        self.said = now
        return time_text(whole * (1 - done))


def time_text(seconds: float) -> str:
    """Minutes and seconds, and hours where there are some: "0:07", "59:59", "26:03:10"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, rest = divmod(minutes, 60)
    return f"{hours}:{rest:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def paced(plan: BatchPlan, what: str) -> Iterator[Batch]:
    """The batches of a plan; where they take long, the log says how far they are, by their tokens."""
    pace, done = Pace(), 0
    for number in range(len(plan)):
        batch = plan[number]
        yield batch
        done += batch.tokens
        left = pace.left(done / plan.tokens.real)
        if left is not None:
            _log.info("%s: batch %s of %s, %s left", what, f"{number + 1:,}", f"{len(plan):,}", left)


@contextmanager
def on_stderr() -> Iterator[None]:
    """Inside, what `paced` says goes to stderr: for commands whose stdout is their result."""
    handler, level = logging.StreamHandler(sys.stderr), _log.level
    _log.addHandler(handler)
    _log.setLevel(logging.INFO)
    try:
        yield
    finally:
        _log.removeHandler(handler)
        _log.setLevel(level)
