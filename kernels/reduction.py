"""Sums of partial gradients: the second stage of every deterministic reduction, one launch for a whole backward pass.

The one idea: each program takes the same number of elements of one job, as a tile of parts by columns, whatever the
job's shape is. Many parts of a short vector (LayerNorm) and few parts of a large matrix (a weight) then keep the whole
GPU busy alike, and the order of every sum is fixed by its shape: no atomics, the same bits on every run.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbert.kernels import tiles
from effbert.kernels.launch import divisor, launch

JOBS = 8  # of one launch
HEIGHTS = (8, 32, 128)  # parts of a tile; few, since each combination of them is a compilation


def reduce_partials(partials: Sequence[Tensor], targets: Sequence[Tensor], accumulate: bool) -> None:
    """Store the sum over S of each partial [S, rows, cols] or [S, n] into its target [rows, cols] or [n].

    With `accumulate`, add it to what the target holds. partials: fp32, contiguous; S may differ, 0 gives 0. targets:
    any floating dtype and row stride (a slice of a parent's gradient), contiguous columns. One launch for up to JOBS.
    ValueError where a target has not the shape of its partial or its columns are not contiguous.
    """
    for partial, target in zip(partials, targets, strict=True):
        if partial.shape[1:] != target.shape or target.stride(-1) != 1:
            raise ValueError(
                f"reduce_partials: target {list(target.shape)} with strides {target.stride()} for partial sums "
                f"{list(partial.shape)}: it must have their last dimensions and contiguous columns"
            )
    for first in range(0, len(partials), JOBS):
        _launch(partials[first : first + JOBS], targets[first : first + JOBS], accumulate)


@triton.jit
def reduce_partials_kernel(
    partials, targets, parts, sizes, cols, strides,
    ACCUMULATE: tl.constexpr, UNITS: tl.constexpr, HEIGHTS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Job j sums partials[j] [parts, size] into targets[j] [size / cols, cols]; programs go to the jobs in order.

    A tile is [HEIGHTS[j], BLOCK / HEIGHTS[j]]. The integers are `_marked`; sizes[j] is divided by UNITS[j].
    """
    first = 0
    for job in tl.static_range(COUNT):
        size = unmarked(sizes[job]) * UNITS[job]
        blocks = tl.cdiv(size, BLOCK // HEIGHTS[job])
        block = tl.program_id(0) - first
        if (block >= 0) & (block < blocks):
            reduce_block(
                partials[job], targets[job], block, unmarked(parts[job]), size.to(tl.int64), unmarked(cols[job]),
                unmarked(strides[job]), ACCUMULATE, HEIGHTS[job], BLOCK // HEIGHTS[job],
            )  # fmt: skip
        first += blocks


@triton.jit
def reduce_block(
    partial, target, block, parts, size, cols, stride,
    ACCUMULATE: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """WIDTH elements of one target: the sum over all parts, HEIGHT at a time."""
    at = block * WIDTH + tl.arange(0, WIDTH)
    part = tl.arange(0, HEIGHT)
    real = at < size
    pointers = partial + part.to(tl.int64)[:, None] * size + at[None, :]
    total = tl.zeros([HEIGHT, WIDTH], tl.float32)
    for start in range(0, parts, HEIGHT):
        total += tl.load(pointers, mask=(part < parts - start)[:, None] & real[None, :], other=0.0)
        pointers += HEIGHT * size
    value = tl.sum(total, axis=0)
    row = at // cols
    pointers = target + row.to(tl.int64) * stride + (at - row * cols)
    if ACCUMULATE:
        value += tl.load(pointers, mask=real, other=0.0).to(tl.float32)
    tl.store(pointers, value.to(target.dtype.element_ty), mask=real)


@triton.jit
def unmarked(number):
    """The inverse of `_marked`."""
    return (number - 3) >> 1


def _marked(numbers) -> tuple[int, ...]:
    """Odd numbers above 1 in their place: Triton compiles anew for 1 and multiples of 16, in tuples unconditionally."""
    return tuple(2 * number + 3 for number in numbers)


def _launch(partials, targets, accumulate) -> None:
    tile = tiles.choose("reduce", targets[0].device, torch.float32, 0)
    parts = [len(partial) for partial in partials]
    sizes = [target.numel() for target in targets]
    units = tuple(divisor(size, limit=4) for size in sizes)
    heights = tuple(next((height for height in HEIGHTS if count <= height), HEIGHTS[-1]) for count in parts)
    programs = sum(-(-size // (tile["BLOCK"] // height)) for size, height in zip(sizes, heights, strict=True))
    launch(
        reduce_partials_kernel, (programs,), tuple(partials), tuple(targets), _marked(parts),
        _marked(size // unit for size, unit in zip(sizes, units, strict=True)),
        _marked(target.shape[-1] for target in targets), _marked(target.stride(0) for target in targets),
        ACCUMULATE=accumulate, UNITS=units, HEIGHTS=heights, COUNT=len(units), **tile,
    )  # fmt: skip
