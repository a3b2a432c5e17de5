"""The last step of a loss that is a mean: the sums of many programs become one number, and what its gradient is times.

Sums are added in a fixed order by one program, so a loss is the same on every run, and the count of what was averaged
stays on the device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbert.kernels.launch import launch


def loss_mean(sums: Tensor, counts: Tensor | None, count: int, width: int, slope: float) -> tuple[Tensor, Tensor]:
    """sum(sums) / n and slope / n as 0-d fp32 tensors, n = width · sum(counts), or width · count where counts is None.

    sums, counts: fp32 vectors of any length, contiguous.
    """
    loss, scale = (torch.empty((), dtype=torch.float32, device=sums.device) for _ in range(2))
    launch(
        loss_mean_kernel, (1,), sums, sums if counts is None else counts, loss, scale,
        sums.numel(), 0 if counts is None else counts.numel(), float(count), float(width), slope,
        HAS_COUNTS=counts is not None, BLOCK=1024,
    )  # fmt: skip
    return loss, scale


@triton.jit(do_not_specialize=["number_of_sums", "number_of_counts"])
def loss_mean_kernel(
    sums, counts, loss, scale, number_of_sums, number_of_counts, count, width, slope,
    HAS_COUNTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: sums [number_of_sums] and counts [number_of_counts] -> loss [] and scale []."""
    if HAS_COUNTS:
        count = vector_sum(counts, number_of_counts, BLOCK)
    store_mean(vector_sum(sums, number_of_sums, BLOCK), count * width, slope, loss, scale)


@triton.jit
def store_mean(total, n, slope, loss, scale):
    """loss = total / n and scale = slope / n; n = 0 gives NaN or infinity, as PyTorch's means do."""
    n += tl.zeros([], tl.float32)  # a tensor, whose division by zero is IEEE's also in the interpreter
    tl.store(loss, total / n)
    tl.store(scale, slope / n)


@triton.jit
def vector_sum(values, length, BLOCK: tl.constexpr):
    """Sum of fp32 values [length]."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(values + at, mask=at < length, other=0.0)
    return tl.sum(total)
