"""Models that train on a CPU side by side, each on cores of its own.

The one idea: the operations of a small model are too short to be shared out over cores, so where several models take
the same step, cores are shared out over the models. A thread takes its models one after the other; PyTorch splits its
operations over its own cores alone, so what a model comes to does not depend on what else trains.
"""

import contextvars
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

MOST = 8  # threads of one process: Python runs one at a time of them between operations

Item = TypeVar("Item")


class Team:
    """Threads that do the same with several items; with one or none of them, what `each` does is done in place.

    wanted: the items that there are at most. Between calls of `each` PyTorch has all its threads.
    """

    def __init__(self, wanted: int):
        self.cores = torch.get_num_threads()
        self.size = min(self.cores, wanted, MOST)
        self.pool = ThreadPoolExecutor(self.size) if self.size > 1 else None

    def each(self, items: Iterable[Item], work: Callable[[Item], object]) -> None:
        """`work` of every item; an error is raised once all are done with theirs, that of the first item first."""
        if self.pool is None:
            for item in items:
                work(item)
            return
        torch.set_num_threads(self.cores // self.size)  # of a thread that begins now, too
        try:
            done = [self.pool.submit(contextvars.copy_context().run, work, item) for item in items]
            wait(done)
        finally:
            torch.set_num_threads(self.cores)
        for future in done:
            future.result()

    def close(self) -> None:
        """End the threads."""
        if self.pool is not None:
            self.pool.shutdown()
