"""Models that train on a CPU side by side, each on cores of its own.

The one idea: the operations of a small model are too short to be shared out over cores, so where several models take
the same step, cores are shared out over the models. A thread takes its models one after the other, with its own cores
alone; where there are as many models as cores, each has one, and comes to the same as with one thread, bit for bit.
"""

import contextvars
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

from effbert.memory import free_memory

MOST = 8  # threads of one process: Python runs one at a time of them between operations
MEMORY_SHARE = 0.5  # of what is free, for what the steps under way keep; weights, optimisers and data need the rest

Item = TypeVar("Item")


class Team:
    """Threads that do the same with several items; with one or none of them, what `each` does is done in place.

    wanted: the items that there are at most. step_bytes: what work on one of them may take for its time; fewer are at
    work at once where memory has no room for all. Between calls of `each` PyTorch has all its threads.
    """

    def __init__(self, wanted: int, step_bytes: int = 0):
        self.cores = torch.get_num_threads()
        room = int(MEMORY_SHARE * free_memory(torch.device("cpu")) / step_bytes) if step_bytes else MOST
        self.size = max(1, min(self.cores, wanted, MOST, room))
        self.pool = ThreadPoolExecutor(self.size) if self.size > 1 else None

    def each(self, items: Iterable[Item], work: Callable[[Item], object]) -> None:
        """`work` of every item, with the caller's context variables, but neither its autocast nor its gradient mode.
        An error is raised once all are done with theirs, that of the first item first."""
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
        errors = [future.exception() for future in done]
        try:
            for error in errors:
                if error is not None:
                    raise error
        finally:  # an error holds this frame, which must not hold it: what its step had in memory would stay there
            del done, errors
            error = None

    def close(self) -> None:
        """End the threads, after what they are doing; what waits for them is not begun."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
