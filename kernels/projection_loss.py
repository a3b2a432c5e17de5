"""Projected MSE in Triton: the shared projection of all layers' hidden states and their distance to the teacher's.

    loss = Σ over n pairs of Σ m ((x Wᵀ + b) - t)² / (W Σ m)     x [M, C], W [W, C], b [W], t [M, W], m [M], M = B · L

One idea: every pass over the n pairs is one grouped launch. A program finds its pair from its number and picks that
pair's tensors out of a tuple of pointers, so nothing is stacked and no table of addresses is built.

Forward: a GEMM whose epilogue adds the bias, subtracts the teacher's tile and sums the squares; the projection never
leaves the registers. Kept for backward: the difference d = m (x Wᵀ + b - t) in the states' dtype, without the factor
2 / (W Σ m), which would underflow in fp16 and is applied in fp32 later; its fp32 column sums over each block of rows,
from which db comes; the packed weight. Backward: dx = d W in one launch; dW = dᵀ x and db in a second one, as fp32
partial sums over parts of all pairs' rows, which a third adds up.

Why d is kept: with C = 540, W = 768, n = 7 and M = 8192 in bf16 each of the three GEMMs is 47.6 GFLOP, about 48 µs at
990 TFLOP/s. Forward reads x and t and writes d, 238 MB, 50 µs at 4.8 TB/s; dx and dW then move 150 and 206 MB. To form
dx in the forward pass would save one reading of d, 88 MB or 18 µs, but holds [rows, 540] in fp32 beside a tile of the
projection: 64 rows at most on a multiprocessor, so the weight is read from L2 twice as often as with 128 rows. Not to
keep d at all saves its writing and two readings, 264 MB or 55 µs, for two more GEMMs of 48 µs each.

Numerics: products are formed in the states' dtype (the weight is rounded to it once) and summed in fp32; differences,
squares and sums are fp32. eager widens everything to fp32 first, which costs the matrix units; against it the loss in
bf16 has the error of the weight's rounding, and gradients that of d's too, about 2⁻⁹ an element before summation. So
where projection and teacher differ by no more than that of themselves (in fp16 2⁻¹¹), loss and gradients are mostly
rounding. In fp16 a difference above 65,504 is infinite in d: the loss is right then, gradients are not finite.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbert.kernels import tiles
from effbert.kernels.launch import ceil_div, compute_dtype, dense, divisor, input_precision, launch, multiprocessors
from effbert.kernels.library import FusedOp, gradient_of
from effbert.kernels.linear import pack, padded_width
from effbert.kernels.loss_mean import loss_mean
from effbert.kernels.reduction import reduce_partials


def projected_mse(
    student_states: Sequence[Tensor],
    teacher_states: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Σ over pairs of MSE(x Wᵀ + b, t), a 0-d fp32 tensor: x [B, L, C], t [B, L, W], weight [W, C], bias [W].

    States of either side have one shape; every tensor may be fp32, fp16 or bf16. The products are formed in autocast's
    type where that is on, else in that of the first student state; teacher states of several types are brought to it.
    With an attention_mask [B, L] (any dtype, 1 = keep) only real tokens count. Gradients for student states, weight and
    bias. What is refused: effbert.kernels.checks.projected_mse; the rest is as in effbert.kernels.eager.
    """
    dtype = compute_dtype(student_states[0])
    students = [state.to(dtype) for state in student_states]
    if len({state.dtype for state in teacher_states}) > 1:
        teacher_states = [state.to(dtype) for state in teacher_states]
    return _projected_mse(students, list(teacher_states), weight, bias, attention_mask)


@triton.jit
def picked(pointers, index, COUNT: tl.constexpr):
    """pointers[index] of a tuple, for an index known at run time only."""
    chosen = pointers[0]
    for i in tl.static_range(1, COUNT):
        chosen = tl.where(index == i, pointers[i], chosen)
    return chosen


@triton.jit(
    do_not_specialize=[
        "rows", "cols", "depth", "packed_pitch", "d_pitch", "mask_stride", "student_stride", "teacher_stride",
    ]
)  # fmt: skip
def projected_mse_fwd_kernel(
    students, teachers, packed, bias, mask, d, sums, counts, column_sums,
    rows, cols, depth, packed_pitch, d_pitch, mask_stride, student_stride, teacher_stride,
    PAIRS: tl.constexpr, HAS_MASK: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr,
    STUDENT_UNIT: tl.constexpr, TEACHER_UNIT: tl.constexpr, PITCH_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one pair's difference: its sum of m d² and, where KEEP, m d itself and its column sums.

    Programs that share rows are neighbours, so a block of x is read from memory once. Rows and columns beyond the end
    repeat the last one in the GEMM and are dropped after it: the loop needs no mask but that of its depth.
    """
    cols = cols * TEACHER_UNIT
    depth = depth * STUDENT_UNIT
    packed_pitch = packed_pitch * PITCH_UNIT
    col_tiles = tl.cdiv(cols, BLOCK_N)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row_tile = tl.program_id(0) // col_tiles
    col_tile = tl.program_id(0) % col_tiles
    pair = row_tile // row_tiles
    first_row = (row_tile % row_tiles) * BLOCK_M
    row = first_row + tl.arange(0, BLOCK_M)
    col = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_row = tl.minimum(row, rows - 1).to(tl.int64)[:, None] * (student_stride * STUDENT_UNIT)
    x_at = picked(students, pair, PAIRS) + x_row + k[None, :]
    w_at = packed + tl.minimum(col, cols - 1).to(tl.int64)[:, None] * packed_pitch + k[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        x_tile = tl.load(x_at + start, mask=(start + k < depth)[None, :], other=0.0)
        w_tile = tl.load(w_at + start, mask=(start + k < packed_pitch)[None, :], other=0.0)
        total = tl.dot(x_tile, w_tile.T, total, input_precision=PRECISION)

    real = tl.full([BLOCK_M], 1.0, tl.float32)
    if HAS_MASK:
        real = tl.load(mask + row.to(tl.int64) * mask_stride, mask=row < rows, other=0).to(tl.float32)
        if (pair == 0) & (col_tile == 0):
            tl.store(counts + row_tile, tl.sum(real))
    teacher = picked(teachers, pair, PAIRS)
    d += pair.to(tl.int64) * rows * (d_pitch * PITCH_UNIT)
    column_sums += row_tile.to(tl.int64) * cols
    left, right = halves(total, BLOCK_M, BLOCK_N)
    quarters = halves(left, BLOCK_M, BLOCK_N // 2) + halves(right, BLOCK_M, BLOCK_N // 2)
    squares = 0.0
    for part in tl.static_range(4):
        squares += distance(
            quarters[part], teacher, bias, real, d, column_sums,
            row, (col_tile * 4 + part) * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4), rows, cols,
            teacher_stride * TEACHER_UNIT, d_pitch * PITCH_UNIT, KEEP,
        )  # fmt: skip
    tl.store(sums + tl.program_id(0), squares)


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Left and right half of a tile: what follows a GEMM takes fewer registers when it runs on one at a time."""
    return tl.split(tl.permute(tl.reshape(tile, [ROWS, 2, COLS // 2]), [0, 2, 1]))


@triton.jit
def distance(
    projection, teacher, bias, real, d, column_sums, row, col, rows, cols, teacher_stride, d_pitch, KEEP: tl.constexpr
):
    """Sum of m (projection + bias - t)² over a tile; where KEEP, m (projection + bias - t) and its column sums too."""
    long_row = row.to(tl.int64)[:, None]
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    target = tl.load(teacher + long_row * teacher_stride + col[None, :], mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    difference = tl.where(inside, projection + shift - target, 0.0)
    weighted = difference * real[:, None]
    if KEEP:
        stored = (row < rows)[:, None] & (col < d_pitch)[None, :]
        tl.store(d + long_row * d_pitch + col[None, :], weighted.to(d.dtype.element_ty), mask=stored)
        tl.store(column_sums + col, tl.sum(weighted, axis=0), mask=col < cols)
    return tl.sum(weighted * difference)


@triton.jit(do_not_specialize=["rows", "cols", "depth", "packed_pitch", "d_pitch"])
def projected_mse_dgrad_kernel(
    d, packed, scale, grad, gradients,
    rows, cols, depth, packed_pitch, d_pitch,
    PAIRS: tl.constexpr, PRECISION: tl.constexpr, COLS_UNIT: tl.constexpr, PITCH_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of one pair's dx = scale · grad · d W: d [PAIRS, rows, depth], W [depth, cols] -> [rows, cols]."""
    cols = cols * COLS_UNIT
    packed_pitch = packed_pitch * PITCH_UNIT
    d_pitch = d_pitch * PITCH_UNIT
    col_tiles = tl.cdiv(cols, BLOCK_N)
    row_tiles = tl.cdiv(rows, BLOCK_M)
    row_tile = tl.program_id(0) // col_tiles
    pair = row_tile // row_tiles
    row = (row_tile % row_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = (tl.program_id(0) % col_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    d_at = d + (pair.to(tl.int64) * rows + tl.minimum(row, rows - 1))[:, None] * d_pitch + k[None, :]
    w_at = packed + k[:, None] * packed_pitch + col[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        d_tile = tl.load(d_at + start, mask=(start + k < d_pitch)[None, :], other=0.0)
        in_w = (start + k < depth)[:, None] & (col < packed_pitch)[None, :]
        w_tile = tl.load(w_at + start * packed_pitch, mask=in_w, other=0.0)
        total = tl.dot(d_tile, w_tile, total, input_precision=PRECISION)
    total *= tl.load(scale) * tl.load(grad).to(tl.float32)
    out = picked(gradients, pair, PAIRS)
    out += row.to(tl.int64)[:, None] * cols
    left, right = halves(total, BLOCK_M, BLOCK_N)
    col = (tl.program_id(0) % col_tiles) * BLOCK_N + tl.arange(0, BLOCK_N // 2)[None, :]
    tl.store(out + col, left.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (col < cols))
    col += BLOCK_N // 2
    tl.store(out + col, right.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (col < cols))


@triton.jit(
    do_not_specialize=[
        "rows", "rows_each", "cols", "depth", "d_pitch", "student_stride", "number_of_blocks", "blocks_each",
    ]
)  # fmt: skip
def projected_mse_wgrad_kernel(
    d, students, block_sums, scale, grad, weight_partial, bias_partial,
    rows, rows_each, cols, depth, d_pitch, student_stride, number_of_blocks, blocks_each,
    PAIRS: tl.constexpr, PRECISION: tl.constexpr, STUDENT_UNIT: tl.constexpr, PITCH_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """One tile of scale · grad · dᵀ x over one part of all pairs' rows -> fp32 [parts, cols, depth].

    Programs of the first tile column also add up their part of the forward pass's column sums -> fp32 [parts, cols].
    """
    depth = depth * STUDENT_UNIT
    d_pitch = d_pitch * PITCH_UNIT
    depth_tiles = tl.cdiv(depth, BLOCK_K)
    col = (tl.program_id(0) // depth_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (tl.program_id(0) % depth_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    m = tl.arange(0, BLOCK_M)
    part = tl.program_id(1).to(tl.int64)
    first = part * rows_each
    last = tl.minimum(first + rows_each, rows.to(tl.int64) * PAIRS)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for pair in range(first // rows, tl.cdiv(last, rows)):
        begin = tl.maximum(first, pair * rows)
        left = (tl.minimum(last, pair * rows + rows) - begin).to(tl.int32)
        x_row = (begin - pair * rows + m)[:, None] * (student_stride * STUDENT_UNIT)
        x_at = picked(students, pair, PAIRS) + x_row + at[None, :]
        d_at = d + (begin + m)[:, None] * d_pitch + col[None, :]
        for start in range(0, left, BLOCK_M):
            in_rows = (start + m < left)[:, None]
            d_tile = tl.load(d_at, mask=in_rows & (col < d_pitch)[None, :], other=0.0)
            x_tile = tl.load(x_at, mask=in_rows & (at < depth)[None, :], other=0.0)
            total = tl.dot(d_tile.T, x_tile, total, input_precision=PRECISION)
            d_at += BLOCK_M * d_pitch
            x_at += BLOCK_M * (student_stride * STUDENT_UNIT)
    factor = tl.load(scale) * tl.load(grad).to(tl.float32)
    place = (part * cols + col)[:, None] * depth + at[None, :]
    tl.store(weight_partial + place, total * factor, mask=(col < cols)[:, None] & (at < depth)[None, :])
    if tl.program_id(0) % depth_tiles == 0:
        sums = tl.zeros([BLOCK_N], tl.float32)
        first_block = tl.program_id(1) * blocks_each
        last_block = tl.minimum(first_block + blocks_each, number_of_blocks)
        for start in range(first_block, last_block, SUMS):
            block = (start + tl.arange(0, SUMS))[:, None]
            in_sums = (block < last_block) & (col < cols)[None, :]
            sums += tl.sum(
                tl.load(block_sums + block.to(tl.int64) * cols + col[None, :], mask=in_sums, other=0.0), axis=0
            )
        tl.store(bias_partial + part * cols + col, sums * factor, mask=col < cols)


def _matrices(states: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """States [..., C] as [M, C] with contiguous columns and one row stride; copies only where strides forbid a view."""
    flat = [state.reshape(-1, state.shape[-1]) for state in states]
    if any(state.stride() != flat[0].stride() for state in flat) or flat[0].stride(1) != 1:
        flat = [state.contiguous() for state in flat]
    return tuple(flat)


def _empty_packed(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(len(weight), padded_width(weight.shape[1], dtype), dtype=dtype, device=weight.device)


def _empty_kept(students: Sequence[Tensor], width: int, need_grad: bool) -> tuple[Tensor, Tensor]:
    """d [n, M, padded width] and its column sums [n · row blocks, width]; both empty where no gradient is needed."""
    first, pairs = students[0], len(students)
    rows = first.numel() // max(first.shape[-1], 1)
    blocks = ceil_div(rows, _tile("fwd", first, width)["BLOCK_M"])
    shapes = ((pairs, rows, padded_width(width, first.dtype)), (pairs * blocks, width)) if need_grad else (0, 0)
    return (
        torch.empty(shapes[0], dtype=first.dtype, device=first.device),
        torch.empty(shapes[1], dtype=torch.float32, device=first.device),
    )


def _tile(kind: str, student: Tensor, cols: int) -> dict[str, int]:
    return tiles.choose(f"projected_mse_{kind}", student.device, student.dtype, cols)


def _forward(
    student_states: list[Tensor],
    teacher_states: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    attention_mask: Tensor | None,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    students, teachers, pairs = _matrices(student_states), _matrices(teacher_states), len(student_states)
    (rows, depth), cols, device, dtype = students[0].shape, len(weight), weight.device, students[0].dtype
    tile = _tile("fwd", students[0], cols)
    row_tiles, col_tiles = ceil_div(rows, tile["BLOCK_M"]), ceil_div(cols, tile["BLOCK_N"])
    programs = pairs * row_tiles * col_tiles
    packed, _ = pack(weight, weight[:0], dtype)
    d, column_sums = _empty_kept(student_states, cols, need_grad)
    sums = torch.empty(programs, dtype=torch.float32, device=device)
    masked = attention_mask is not None
    counts = torch.empty(row_tiles if masked else 0, dtype=torch.float32, device=device)
    mask = attention_mask.reshape(-1) if masked else sums
    student_unit, teacher_unit = (divisor(state.shape[1], state.stride(0)) for state in (students[0], teachers[0]))
    d_pitch = padded_width(cols, dtype)
    pitch_unit = divisor(packed.shape[1], d_pitch)
    launch(
        projected_mse_fwd_kernel, (programs,), students, teachers, packed, dense(bias), mask, d, sums, counts,
        column_sums, rows, cols // teacher_unit, depth // student_unit, packed.shape[1] // pitch_unit,
        d_pitch // pitch_unit, mask.stride(0),
        students[0].stride(0) // student_unit, teachers[0].stride(0) // teacher_unit,
        PAIRS=pairs, HAS_MASK=masked, KEEP=need_grad, PRECISION=input_precision(dtype),
        STUDENT_UNIT=student_unit, TEACHER_UNIT=teacher_unit, PITCH_UNIT=pitch_unit, **tile,
    )  # fmt: skip
    loss, scale = loss_mean(sums, counts if masked else None, rows, cols, 2.0)
    return loss, d, column_sums, packed, scale


def _fake(
    student_states: list[Tensor],
    teacher_states: list[Tensor],
    weight: Tensor,
    bias: Tensor,
    attention_mask: Tensor | None,
    need_grad: bool,
):
    loss, scale = (weight.new_empty((), dtype=torch.float32) for _ in range(2))
    kept = _empty_kept(student_states, len(weight), need_grad)
    return loss, *kept, _empty_packed(weight, student_states[0].dtype), scale


def _backward(grads, kept, student_states, teacher_states, weight, bias, *_, in_place: bool = False):
    gradients = [torch.empty(state.shape, dtype=state.dtype, device=state.device) for state in student_states]
    d, column_sums, packed, scale = kept
    _input_gradients(gradients, d, packed, scale, grads[0])
    partials = _weight_partials(_matrices(student_states), d, column_sums, scale, grads[0])
    if in_place:
        targets = [gradient_of(weight), gradient_of(bias)]
    else:
        targets = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in (weight, bias)]
    reduce_partials(partials, targets, accumulate=in_place)
    return [*gradients, *([None, None] if in_place else targets)]


def _input_gradients(gradients: list[Tensor], d: Tensor, packed: Tensor, scale: Tensor, grad: Tensor) -> None:
    """scale · grad · d W of every pair, into `gradients` (contiguous [..., C])."""
    (pairs, rows, d_pitch), depth, cols = d.shape, len(packed), gradients[0].shape[-1]
    tile = _tile("dgrad", gradients[0], cols)
    cols_unit, pitch_unit = divisor(cols), divisor(packed.shape[1], d_pitch)
    grid = (pairs * ceil_div(rows, tile["BLOCK_M"]) * ceil_div(cols, tile["BLOCK_N"]),)
    launch(
        projected_mse_dgrad_kernel, grid, d, packed, scale, grad, tuple(gradients),
        rows, cols // cols_unit, depth, packed.shape[1] // pitch_unit, d_pitch // pitch_unit,
        PAIRS=pairs, PRECISION=input_precision(d.dtype), COLS_UNIT=cols_unit, PITCH_UNIT=pitch_unit, **tile,
    )  # fmt: skip


def _weight_partials(
    students: tuple[Tensor, ...], d: Tensor, column_sums: Tensor, scale: Tensor, grad: Tensor
) -> list[Tensor]:
    """fp32 [parts, W, C] and [parts, W], which sum to the gradients of weight and bias; parts fill the GPU twice."""
    (pairs, rows, d_pitch), (blocks, cols), depth = d.shape, column_sums.shape, students[0].shape[1]
    tile = _tile("wgrad", students[0], cols)
    tiles_of_output = ceil_div(cols, tile["BLOCK_N"]) * ceil_div(depth, tile["BLOCK_K"])
    steps = ceil_div(pairs * rows, tile["BLOCK_M"])
    parts = min(steps, max(1, 2 * multiprocessors(d.device) // tiles_of_output))
    rows_each = ceil_div(steps, max(parts, 1)) * tile["BLOCK_M"]
    weight_partial = torch.empty(parts, cols, depth, dtype=torch.float32, device=d.device)
    bias_partial = torch.empty(parts, cols, dtype=torch.float32, device=d.device)
    student_unit, pitch_unit = divisor(depth, students[0].stride(0)), divisor(d_pitch)
    launch(
        projected_mse_wgrad_kernel, (tiles_of_output, parts),
        d, students, column_sums, scale, grad, weight_partial, bias_partial,
        rows, rows_each, cols, depth // student_unit, d_pitch // pitch_unit, students[0].stride(0) // student_unit,
        blocks, ceil_div(blocks, max(parts, 1)), PAIRS=pairs, PRECISION=input_precision(d.dtype),
        STUDENT_UNIT=student_unit, PITCH_UNIT=pitch_unit, SUMS=16, **tile,
    )  # fmt: skip
    return [weight_partial, bias_partial]


def _backward_fake(grads, kept, student_states, teacher_states, weight, bias, *_):
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (*student_states, weight, bias)]


_projected_mse = FusedOp(
    "projected_mse",
    _forward,
    _fake,
    _backward,
    _backward_fake,
    differentiable=("student_states", "weight", "bias"),
    in_place=("weight", "bias"),
)
