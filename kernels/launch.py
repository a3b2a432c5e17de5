"""Where every Triton kernel starts: one function launches it, and the same function can note it down instead.

Noting down lets the compile report and the tests build exactly the kernels that an op would launch, for any
architecture, on a machine that has none: run the op on meta tensors inside `recording`.
"""

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

INTERPRETED = "interpreter"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Launch:
    """One launch as noted by `recording`: the kernel, its grid, its arguments and the compiler's options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]

    @property
    def name(self) -> str:
        """Name of the kernel function."""
        return self.kernel.__name__


@dataclass
class _Recording:
    architecture: str
    multiprocessors: int
    launches: list[Launch]


_recording: _Recording | None = None
_NOTHING = contextlib.nullcontext()


def launch(
    kernel,
    grid: tuple[int, ...],
    *args,
    num_warps: int = 4,
    num_stages: int = 2,
    maxnreg: int | None = None,
    **constants,
) -> None:
    """Start `kernel` (a @triton.jit function) over `grid`; an empty grid starts nothing.

    args are its runtime arguments in order, `constants` its tl.constexpr parameters by name. maxnreg: the most
    registers of a thread, on NVIDIA alone; by default its assembler weighs them against programs at once.
    """
    if 0 in grid:
        return
    options = dict(num_warps=num_warps, num_stages=num_stages)
    if maxnreg is not None:
        options["maxnreg"] = maxnreg
    if _recording is not None:
        names = [name for name in kernel.arg_names if name not in constants]
        arguments = dict(zip(names, args, strict=True)) | constants
        _recording.launches.append(Launch(kernel, grid, arguments, options))
        return
    with _on_device_of(args):
        kernel[grid](*args, **options, **constants)


def _on_device_of(args):
    """Inside, CUDA's current device is that of the tensors: Triton launches on the current one in any case."""
    if _gpus() > 1:
        firsts = (arg[0] if isinstance(arg, tuple) else arg for arg in args)
        tensor = next(first for first in firsts if isinstance(first, torch.Tensor))
        if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
            return torch.cuda.device(tensor.get_device())
    return _NOTHING


@functools.cache
def _gpus() -> int:
    return torch.cuda.device_count()


@contextlib.contextmanager
def recording(architecture: str, multiprocessors: int = 132) -> Iterator[list[Launch]]:
    """Inside, nothing runs: launches are appended to the list, as they would be on `architecture` ("sm_90", "gfx942").

    Not for several threads at once.
    """
    global _recording
    outer, _recording = _recording, _Recording(architecture, multiprocessors, [])
    try:
        yield _recording.launches
    finally:
        _recording = outer


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1 when they were imported)."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", ... of a GPU, "interpreter" for the CPU."""
    if _recording is not None:
        return _recording.architecture
    return INTERPRETED if device.type == "cpu" else _architecture(device)


def multiprocessors(device: torch.device) -> int:
    """Streaming multiprocessors (compute units) of a GPU; 2 for the interpreter, so that split loops are exercised."""
    if _recording is not None:
        return _recording.multiprocessors
    return 2 if device.type == "cpu" else _properties(device).multi_processor_count


@functools.cache
def _properties(device: torch.device):
    return torch.cuda.get_device_properties(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    properties = _properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What an op on `x` computes in, and the type of its result: autocast's where that is on, else x's own."""
    kind = autocast_kind(x.device)
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def autocast_kind(device: torch.device) -> str:
    """The device type whose autocast holds; for meta tensors, which have none, the CPU's, which is always there."""
    return "cpu" if device.type == "meta" else device.type


def input_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies operands of `dtype`: "tf32" for fp32 where PyTorch's switch allows it, else "ieee"."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def divisor(*sizes: int, limit: int = 16) -> int:
    """The largest power of two, at most `limit`, that divides every size: what a kernel may assume of its strides.

    Kernels take strides divided by this unit and multiply them by it again, a tl.constexpr: so the compiler sees that
    rows of 540 half-precision elements start at multiples of 8 bytes and loads 8 bytes at a time, with one compilation
    for all widths of the same alignment.
    """
    unit = limit
    for size in sizes:
        while size % unit:
            unit //= 2
    return unit


def dense(vector: torch.Tensor) -> torch.Tensor:
    """A vector as the kernels read it, its elements side by side: itself, or a copy of a strided or expanded one."""
    return vector if vector.stride(0) == 1 else vector.contiguous()
