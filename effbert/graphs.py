"""A training step as CUDA graphs: what a GPU does for one shape of batch is recorded once and then started as a whole.

At the sizes of a small BERT a kernel lasts as long as Python takes to launch it, so a step launched kernel by kernel
waits for Python. Recorded are functions of tensors that stay where they are (weights, gradients, moments, the fixed
copy of a batch); numbers that change from step to step (the dropout key, the learning rate) are such tensors too. A
function runs as written the first time its shape is seen, which compiles its kernels, and is recorded the second time.

EFFBERT_CUDA_GRAPHS=0 launches steps one by one. It is no setting of a run: the same command goes on with either.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from effbert.data.batches import Batch
from effbert.errors import first_line

ENVIRONMENT = "EFFBERT_CUDA_GRAPHS"
STREAMS = 4  # on which models that train together take turns: what one leaves idle of the GPU, another uses

Record = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]


class Lane:
    """A CUDA stream and the memory of what is recorded on it, which its graphs share: they run one after the other."""

    def __init__(self, device: torch.device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    @contextlib.contextmanager
    def after(self, *others: "Lane") -> Iterator[None]:
        """What is launched inside runs on this lane, after all that the current stream and `others` were given."""
        self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
        for other in others:
            self.stream.wait_stream(other.stream)
        with torch.cuda.stream(self.stream):
            yield

    def join(self) -> None:
        """The current stream goes on after this lane."""
        torch.cuda.current_stream(self.stream.device).wait_stream(self.stream)

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Record `function` on this lane, the current one, and do its work once; its result, whose tensors every replay
        fills anew, and the replay. ValueError where it cannot be recorded; torch.OutOfMemoryError where memory does not
        suffice either without what PyTorch keeps for reuse, which a recording cannot have."""
        try:
            return self._recorded(function)
        except torch.OutOfMemoryError:
            pass
        torch.cuda.empty_cache()
        return self._recorded(function)

    def _recorded(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
        try:
            result = function()
        except BaseException as error:
            with contextlib.suppress(RuntimeError):  # the capture is broken; what broke it is what counts
                graph.capture_end()
            if isinstance(error, torch.OutOfMemoryError) or not isinstance(error, RuntimeError):
                raise
            raise ValueError(f"a step cannot be recorded ({first_line(error)}): set {ENVIRONMENT}=0") from error
        graph.capture_end()
        graph.replay()
        return result, graph.replay


_launched = False


@contextlib.contextmanager
def launches() -> Iterator[None]:
    """Inside it nothing is recorded."""
    global _launched
    before, _launched = _launched, True
    try:
        yield
    finally:
        _launched = before


def wanted() -> bool:
    """Whether steps are to be recorded, where they can be."""
    return not _launched and os.environ.get(ENVIRONMENT) != "0"


def lanes(device: torch.device, count: int) -> list[Lane]:
    """So many lanes on a GPU; none on a device that has no graphs."""
    if device.type != "cuda":
        return []
    return [Lane(device) for _ in range(count)]


class Recordings:
    """Functions by key, on one lane: run as written the first time, recorded the second, replayed from then on."""

    def __init__(self, record: Record):
        self.record = record
        self.known: dict[Hashable, tuple[Any, Callable[[], None]] | None] = {}

    def run(self, key: Hashable, function: Callable[[], Any]) -> Any:
        """What `function` returns; its tensors hold until the next run of this key."""
        if key not in self.known:
            self.known[key] = None
            return function()
        if self.known[key] is None:
            self.known[key] = self.record(function)
        else:
            self.known[key][1]()
        return self.known[key][0]


class FixedBatches:
    """Batches copied to one place for each of their shapes."""

    def __init__(self, device: torch.device):
        self.device, self.kept = device, {}

    def hold(self, batch: Batch) -> Batch:
        """The batch, with its tensors in the place of its shape, where they hold until the next of that shape."""
        key, moving = shape_of(batch), _tensors(batch)
        if key not in self.kept:
            self.kept[key] = {name: torch.empty_like(tensor, device=self.device) for name, tensor in moving.items()}
        for name, place in self.kept[key].items():  # from pinned memory, else the host waits for the step before
            pinned = self.device.type == "cuda" and moving[name].device.type == "cpu"
            place.copy_(moving[name].pin_memory() if pinned else moving[name], non_blocking=True)
        return dataclasses.replace(batch, **self.kept[key])


def shape_of(batch: Batch) -> Hashable:
    """What two batches must have in common for one recording to serve both."""
    return (*((name, *tensor.shape) for name, tensor in _tensors(batch).items()), batch.shares)


def _tensors(batch: Batch) -> dict[str, torch.Tensor]:
    return {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
