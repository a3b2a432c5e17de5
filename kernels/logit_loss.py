"""Soft cross entropy of student and teacher logits in Triton, from 2 classes to a vocabulary, gradient included.

    z_S, z_T [B, C] / t, masked classes lowered by 10000     loss = -Σ softmax(z_T) · log_softmax(z_S) / n
    dz_S = (softmax(z_S) - softmax(z_T)) / (t · n)           n = B · C, or the number of kept classes

One idea: a program walks over the columns of its rows with both running maxima, both sums of exponentials and
Σ exp(z_T - max_T) (z_S - max_S), each rescaled when a maximum rises; the loss needs no more, so one reading does, and
no logits overflow. The gradient's numerator follows in the same kernel while the rows are still in the cache. Few
classes: several rows a program. Few rows: one program does it all, one launch; else a second one adds up the sums.

Kept for backward: the numerator [B, C], between -1 and 1, bf16 for a bf16 student, else fp32 (fp16 loses the small
probabilities of a vocabulary), and the factor 1 / (t · n), fp32 on the device, as the host never knows what a mask
counts. Backward is one elementwise launch. Keeping two numbers a row and reading the logits again would move as much.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbert.kernels import eager, tiles
from effbert.kernels.launch import ceil_div, divisor, launch
from effbert.kernels.library import FusedOp
from effbert.kernels.loss_mean import loss_mean, store_mean

MASKED = tl.constexpr(eager.RELEASED_MASK)  # added to a masked class before the temperature


def soft_cross_entropy(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    mean_over_kept: bool = True,
) -> Tensor:
    """-mean over rows and classes of softmax(z_T / t) · log_softmax(z_S / t), a 0-d fp32 tensor, for logits [..., C].

    student_logits, teacher_logits: one shape, any strides, each fp32, fp16 or bf16. mask: of the same shape, any dtype,
    1 = keep. Gradients for the student's logits only. What is refused: effbert.kernels.checks.soft_cross_entropy; the
    rest is as in effbert.kernels.eager.
    """
    return _soft_cross_entropy(student_logits, teacher_logits, float(temperature), mask, mean_over_kept)


@triton.jit
def load_logits(logits, at, inside, blocked, temperature):
    """(logits + blocked) / temperature in fp32, -inf outside; [ROWS, BLOCK]."""
    value = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, tl.div_rn(value + blocked, temperature), float("-inf"))


@triton.jit
def finite_or_zero(maximum):
    """A running maximum to subtract: 0 instead of -inf, so that exp(-inf - maximum) is 0."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit(
    do_not_specialize=[
        "rows", "cols", "number_of_programs", "student_stride", "teacher_stride", "mask_stride",
    ]
)  # fmt: skip
def soft_cross_entropy_fwd_kernel(
    student, teacher, mask, numerator, sums, counts, loss, scale,
    rows, cols, count, temperature, student_stride, teacher_stride, mask_stride,
    student_step, teacher_step, mask_step,
    HAS_MASK: tl.constexpr, COUNTS_KEPT: tl.constexpr, STORE_NUMERATOR: tl.constexpr, SINGLE: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum of the losses of ROWS rows and number of their kept classes, and softmax(z_S) - softmax(z_T) where stored.

    strides are between rows, in UNITs; steps between columns (2 for one side of span logits). SINGLE: there is but one
    program, and it writes the mean itself.
    """
    cols = cols * UNIT
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    in_rows = (row < rows)[:, None]
    long_row = row.to(tl.int64)[:, None]
    student += long_row * (student_stride * UNIT)
    teacher += long_row * (teacher_stride * UNIT)
    mask += long_row * (mask_stride * UNIT)
    student_max = tl.full([ROWS], float("-inf"), tl.float32)
    teacher_max = tl.full([ROWS], float("-inf"), tl.float32)
    student_sum = tl.zeros([ROWS], tl.float32)
    teacher_sum = tl.zeros([ROWS], tl.float32)
    cross = tl.zeros([ROWS], tl.float32)
    kept = tl.zeros([ROWS], tl.float32)
    for start in range(0, cols, BLOCK):
        col = (start + tl.arange(0, BLOCK))[None, :]
        inside = in_rows & (col < cols)
        blocked = 0.0
        if HAS_MASK:
            keep = tl.load(mask + col.to(tl.int64) * mask_step, mask=inside, other=0).to(tl.float32)
            kept += tl.sum(keep, axis=1)
            blocked = (1.0 - keep) * MASKED
        z_s = load_logits(student, col.to(tl.int64) * student_step, inside, blocked, temperature)
        z_t = load_logits(teacher, col.to(tl.int64) * teacher_step, inside, blocked, temperature)
        student_top = tl.maximum(student_max, tl.max(z_s, axis=1))
        teacher_top = tl.maximum(teacher_max, tl.max(z_t, axis=1))
        student_shift = finite_or_zero(student_top)
        teacher_shift = finite_or_zero(teacher_top)
        weight = tl.exp(z_t - teacher_shift[:, None])
        shrink = tl.exp(teacher_max - teacher_shift)
        rise = tl.where(student_max == float("-inf"), 0.0, student_shift - student_max)
        shifted = z_s - student_shift[:, None]
        cross = (cross - rise * teacher_sum) * shrink + tl.sum(tl.where(inside, weight * shifted, 0.0), axis=1)
        teacher_sum = teacher_sum * shrink + tl.sum(weight, axis=1)
        student_sum = student_sum * tl.exp(student_max - student_shift) + tl.sum(tl.exp(shifted), axis=1)
        student_max = student_top
        teacher_max = teacher_top

    losses = tl.log(student_sum) - cross / teacher_sum
    total = tl.sum(tl.where(row < rows, losses, 0.0))
    if COUNTS_KEPT:
        count = tl.sum(kept)
    if SINGLE:
        store_mean(total, count, 1.0 / temperature, loss, scale)
    else:
        tl.store(sums + tl.program_id(0), total)
        if COUNTS_KEPT:
            tl.store(counts + tl.program_id(0), count)

    if STORE_NUMERATOR:
        student_shift = finite_or_zero(student_max)[:, None]
        teacher_shift = finite_or_zero(teacher_max)[:, None]
        numerator += long_row * cols
        for start in range(0, cols, BLOCK):
            col = (start + tl.arange(0, BLOCK))[None, :]
            inside = in_rows & (col < cols)
            blocked = 0.0
            if HAS_MASK:
                blocked = (
                    1.0 - tl.load(mask + col.to(tl.int64) * mask_step, mask=inside, other=0).to(tl.float32)
                ) * MASKED
            z_s = load_logits(student, col.to(tl.int64) * student_step, inside, blocked, temperature)
            z_t = load_logits(teacher, col.to(tl.int64) * teacher_step, inside, blocked, temperature)
            p_s = tl.exp(z_s - student_shift) / student_sum[:, None]
            p_t = tl.exp(z_t - teacher_shift) / teacher_sum[:, None]
            tl.store(numerator + col, (p_s - p_t).to(numerator.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length"])
def soft_cross_entropy_bwd_kernel(numerator, scale, grad, out, length, BLOCK: tl.constexpr):
    """out = numerator · scale · grad, over `length` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(numerator + at, mask=at < length, other=0.0).to(tl.float32)
    factor = tl.load(scale) * tl.load(grad).to(tl.float32)
    tl.store(out + at, (value * factor).to(out.dtype.element_ty), mask=at < length)


def _rows_of(tensor: Tensor) -> Tensor:
    """[..., C] as [rows, C]: a view, whatever the strides, where the leading dimensions allow one."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _forward(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    mask: Tensor | None,
    mean_over_kept: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    device = student_logits.device
    student, teacher = _rows_of(student_logits), _rows_of(teacher_logits)
    kept = student if mask is None else _rows_of(mask)
    rows, cols = student.shape
    tile = tiles.choose("soft_cross_entropy", device, student.dtype, cols)
    programs = ceil_div(rows, tile["ROWS"])
    counts_kept = mask is not None and mean_over_kept
    single = programs == 1
    sums = torch.empty(programs, dtype=torch.float32, device=device)
    counts = torch.empty(programs if counts_kept else 0, dtype=torch.float32, device=device)
    loss, scale = (torch.empty((), dtype=torch.float32, device=device) for _ in range(2)) if single else (sums, sums)
    numerator = _empty_numerator(student_logits, need_grad)
    unit = divisor(cols, student.stride(0), teacher.stride(0), kept.stride(0))
    launch(
        soft_cross_entropy_fwd_kernel, (programs,), student, teacher, kept, numerator, sums, counts, loss, scale,
        rows, cols // unit, float(rows * cols), temperature,
        student.stride(0) // unit, teacher.stride(0) // unit, kept.stride(0) // unit,
        student.stride(1), teacher.stride(1), kept.stride(1),
        HAS_MASK=mask is not None, COUNTS_KEPT=counts_kept, STORE_NUMERATOR=need_grad, SINGLE=single, UNIT=unit, **tile,
    )  # fmt: skip
    if not single:
        loss, scale = loss_mean(sums, counts if counts_kept else None, rows * cols, 1, 1 / temperature)
    return loss, numerator, scale


def _fake(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float,
    mask: Tensor | None,
    mean_over_kept: bool,
    need_grad: bool,
):
    loss, scale = (student_logits.new_empty((), dtype=torch.float32) for _ in range(2))
    return loss, _empty_numerator(student_logits, need_grad), scale


def _empty_numerator(student_logits: Tensor, need_grad: bool) -> Tensor:
    dtype = torch.bfloat16 if student_logits.dtype == torch.bfloat16 else torch.float32
    return torch.empty(student_logits.shape if need_grad else 0, dtype=dtype, device=student_logits.device)


def _backward(grads, kept, student_logits, *_) -> list[Tensor]:
    numerator, scale = kept
    out = torch.empty_like(numerator, dtype=student_logits.dtype)
    length = out.numel()
    launch(
        soft_cross_entropy_bwd_kernel, (ceil_div(length, 1024),), numerator, scale, grads[0], out, length, BLOCK=1024
    )
    return [out]


def _backward_fake(grads, kept, student_logits, *_) -> list[Tensor]:
    return [torch.empty_like(kept[0], dtype=student_logits.dtype)]


_soft_cross_entropy = FusedOp(
    "soft_cross_entropy", _forward, _fake, _backward, _backward_fake, differentiable=("student_logits",)
)
