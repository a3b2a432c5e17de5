"""Several processes that train one model, as torchrun starts them: one process a GPU, or gloo processes on CPUs.

The one idea: every process runs the whole program on the same draws. In a data-parallel phase each takes its rows of
the same batch, weighted by its share of what a loss averages over (effbert.data.batches.Shares), and between backward
and optimiser the gradients are added up: so all hold the gradient of the whole batch, clip by its norm and stay equal.
Nothing hangs on autograd's hooks, since the kernels add to `.grad` themselves. What must happen once, such as writing a
file, training candidates or a whole command that shares no batches, happens on rank 0 while the others wait.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import TypeVar

import torch
import torch.distributed as dist

from effbert.errors import first_line
from effbert.memory import out_of_memory

WAITING = timedelta(days=365)  # a rank waits that long for another; one that has died is noticed at once
BUCKET = 2**23  # elements added up at once

_Result = TypeVar("_Result")
_store = None  # torchrun's: it outlives the processes


class RankError(OSError):
    """One rank failed, or another rank has ended; the message is one line."""


@dataclass(frozen=True)
class World:
    """The processes of a run, and which one this is; all methods but `is_first` are called by all of them alike.

    rank: of 0 to size - 1. local_rank: among those of this machine, and the number of its GPU.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def wait(self) -> None:
        """Until every rank is here."""
        self.any([])

    def on_first(self, function: Callable[..., _Result], *arguments) -> _Result:
        """function(*arguments) on rank 0, however long it takes; every rank gets its result (which pickles)."""
        result = [function(*arguments) if self.is_first else None]
        if self.size > 1:
            with _others():
                dist.broadcast_object_list(result, src=0)
        return result[0]

    def first_then_all(self, function: Callable[[], _Result]) -> _Result:
        """function() on rank 0, and then on every other rank, which finds on disk what rank 0 made: each its own."""
        if self.is_first:
            result = function()
        self.wait()
        return result if self.is_first else function()

    def any(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag, whether it is set on some rank; every rank gives equally many. No GPU is waited for."""
        if self.size == 1:
            return list(flags)
        votes = torch.tensor([False, *flags], dtype=torch.uint8)
        with _others():
            dist.all_reduce(votes, op=dist.ReduceOp.MAX)
        return votes[1:].bool().tolist()

    def check_same(self, value: object, message: str) -> None:
        """ValueError with `message` and every rank's value, where these differ."""
        if self.size == 1:
            return
        values: list = [None] * self.size
        with _others():
            dist.all_gather_object(values, value)
        if any(other != values[0] for other in values):
            raise ValueError(f"{message}: {', '.join(f'rank {rank} {found}' for rank, found in enumerate(values))}")

    def add_up(self, parameters: Sequence[torch.nn.Parameter], *more: torch.Tensor) -> None:
        """Sum gradients, and further tensors in place, over the ranks.

        A parameter that no rank has a gradient of stays without one; one that some rank has is zero on the others.
        Every rank ends with the same bits. All tensors are on this rank's device.
        """
        if self.size == 1:
            return
        used = self.any([parameter.grad is not None for parameter in parameters])
        for parameter in (parameter for parameter, wanted in zip(parameters, used, strict=True) if wanted):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for bucket in buckets([*gradients, *more]):
            flat = torch.cat([tensor.flatten() for tensor in bucket])
            group = _group_for(flat.device.type)
            with _others():
                dist.all_reduce(flat, group=group)
            for tensor, total in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(total.view_as(tensor))


ALONE = World()


def buckets(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Neighbours of one dtype, up to BUCKET elements together, or a larger one alone."""
    bucket: list[torch.Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(map(torch.numel, [*bucket, tensor])) > BUCKET):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun's environment names, `ALONE` without one; any error of a rank becomes a one-line OSError
    or ValueError. After an error the group is left open: the process ends, and by that the others learn of it."""
    global _store
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    try:
        _store, rank, size = next(dist.rendezvous("env://"))
        dist.init_process_group("gloo", store=_store, rank=rank, world_size=size, timeout=WAITING)
        world = World(rank, size, int(os.environ.get("LOCAL_RANK", rank)))
        yield world
        world.wait()
    except (OSError, ValueError):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        text = f"rank {os.environ.get('RANK')}: {type(error).__name__}: {error}"
        raise RankError(f"{text} (EFFBERT_TRACEBACK=1 shows where)") from error
    _group_for.cache_clear()
    dist.destroy_process_group()
    _store = None


def may_speak() -> bool:
    """Whether this process is to say how the run ended: of several that fail, the first to ask."""
    try:
        return _store is None or _store.add("told", 1) == 1
    except RuntimeError:  # the store is gone, and with it whoever could have told
        return True


@cache
def _group_for(device: str):
    """The process group that adds up tensors on "cpu" or "cuda"; every rank asks for it at the same moment."""
    return dist.new_group(backend="nccl") if device == "cuda" else None


@contextmanager
def _others() -> Iterator[None]:
    """What the backends raise when a peer is gone, or was never reached, becomes one line."""
    try:
        yield
    except RuntimeError as error:
        if out_of_memory(error):
            raise
        raise RankError(
            f"another process of this run has ended or cannot be reached ({first_line(error)}); "
            "the same command goes on from here"
        ) from error
