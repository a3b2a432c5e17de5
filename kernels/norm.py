"""Dropout, and LayerNorm(residual + Dropout(x)) in one kernel forward and one backward: the last stage of every block.

    out = LN(z), z = residual + Dropout(post(y, residual))        y, residual, out [M, C]; weight, bias [C]

`post` is an elementwise function: none, or the last slot of an MLP's expression. Both kernels are bound by memory: they
read each input once and keep the rest in registers, in fp32; the statistics are the mean, then the mean square of the
centred row. Kept for backward: y, residual, and two fp32 numbers a row. z and the dropout mask are formed again: a
mask costs about ten integer operations an element, and keeping either would cost another pass over memory.

The one idea is the tile. A power of two would be 1024 for 540 columns, and half of all Philox calls, registers and
instructions would be spent on nothing. So a row is two powers of two, HEAD and TAIL (540 = 512 + 28 of 32, 768 = 512 +
256, 360 = 256 + 104 of 128), of which less than a third is wasted. On GPUs a program takes one row after the other, on
as few warps as its registers allow: at 540 columns one warp forward, so no sum leaves the warp, and four backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbert.kernels import philox, tiles
from effbert.kernels.launch import ceil_div, compute_dtype, dense, divisor, launch, multiprocessors
from effbert.kernels.library import FusedOp
from effbert.kernels.philox import Dropout, split
from effbert.kernels.primitives import dropout_key, identity, identity_gradient, keep_mask
from effbert.kernels.reduction import reduce_partials

MAX_COLUMNS = 8192
_SMALLEST_PIECE = 16


def dropout(x: Tensor, dropout: Dropout | None) -> Tensor:
    """Dropout of x [..., C] with inverse scaling, as effbert.kernels.eager.dropout; x itself where there is none."""
    if dropout is None or philox.threshold(dropout.p) == 0:
        return x
    return _dropout(x, *split(dropout))


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dropout: Dropout | None = None,
) -> Tensor:
    """LayerNorm(residual + Dropout(x)), as effbert.kernels.eager.dropout_add_layer_norm.

    x, residual [..., C], weight, bias [C], each of any of fp32, fp16, bf16. The result has autocast's dtype where that
    is on, else the wider of x's and residual's. ValueError above MAX_COLUMNS columns.
    """
    dtype = torch.promote_types(compute_dtype(x), compute_dtype(residual))
    return _dropout_add_layer_norm(x, residual, weight, bias, eps, *split(dropout), dtype)


class Unchanged:
    """The plain op's slot, in the form that effbert.kernels.codegen.SlotFunction gives the slots of expressions."""

    forward = identity
    backward = identity_gradient
    uses_x = False


@triton.jit
def load_tile(pointer, row, col, rows, cols, stride):
    """[ROWS, COLS] in fp32, 0 outside; row is int64."""
    at = pointer + row[:, None] * stride + col[None, :]
    return tl.load(at, mask=(row < rows)[:, None] & (col < cols)[None, :], other=0.0).to(tl.float32)


@triton.jit
def store_tile(pointer, value, row, col, rows, cols, stride):
    """Store [ROWS, COLS] in the pointer's type, nothing outside; row is int64."""
    at = pointer + row[:, None] * stride + col[None, :]
    tl.store(at, value.to(pointer.dtype.element_ty), mask=(row < rows)[:, None] & (col < cols)[None, :])


@triton.jit
def load_vector(pointer, col, cols):
    """[1, COLS] of a vector in fp32, 0 outside."""
    return tl.load(pointer + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_statistic(pointer, row, rows, block):
    """A number for each row, [ROWS, 1], or a scalar where ROWS is 1; 0 outside."""
    if row.shape[0] == 1:
        return tl.load(pointer + block)
    else:
        return tl.load(pointer + row, mask=row < rows, other=0.0)[:, None]


@triton.jit
def row_sum(tile):
    """[ROWS, 1], or a scalar where ROWS is 1: HEAD and TAIL then meet without an exchange between their layouts."""
    if tile.shape[0] == 1:
        return tl.sum(tile)
    else:
        return tl.sum(tile, axis=1, keep_dims=True)


@triton.jit
def block_sum(
    y, residual, row, rows, cols, y_cols, stride_y, stride_residual, key, site, threshold, scale,
    POST: tl.constexpr, HAS_DROPOUT: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """z (0 outside), y, the residual and what dropout multiplies with, from column FIRST on: [ROWS, COLS] in fp32."""
    col = FIRST + tl.arange(0, COLS)
    inside = (col < cols)[None, :]
    v = load_tile(y, row, col, rows, y_cols, stride_y)
    x = load_tile(residual, row, col, rows, cols, stride_residual)
    if HAS_DROPOUT:
        kept = tl.where(keep_mask(key, site, row, FIRST, threshold, COLS), scale, 0.0)
    else:
        kept = tl.full([row.shape[0], COLS], 1.0, tl.float32)
    return tl.where(inside, x + POST(v, x, inside) * kept, 0.0), v, x, kept


@triton.jit
def normalise_rows(
    y, residual, weight, bias, out, mean, rstd, key, site, threshold, scale, eps,
    first, last, step, rows, cols, y_cols, stride_y, stride_residual,
    POST: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """out [rows, cols] contiguous; mean and rstd [rows] of z; for every step-th block of ROWS rows, first to last."""
    head_col = tl.arange(0, HEAD)
    head_weight = load_vector(weight, head_col, cols)
    head_bias = load_vector(bias, head_col, cols)
    if TAIL:
        tail_col = HEAD + tl.arange(0, TAIL)
        tail_weight = load_vector(weight, tail_col, cols)
        tail_bias = load_vector(bias, tail_col, cols)
    for block in tl.range(first, last, step, num_stages=STAGES):
        row = (tl.zeros([], tl.int64) + block) * ROWS + tl.arange(0, ROWS)
        head, _, _, _ = block_sum(
            y, residual, row, rows, cols, y_cols, stride_y, stride_residual, key, site, threshold, scale,
            POST, HAS_DROPOUT, 0, HEAD,
        )  # fmt: skip
        average = row_sum(head)
        if TAIL:
            tail, _, _, _ = block_sum(
                y, residual, row, rows, cols, y_cols, stride_y, stride_residual, key, site, threshold, scale,
                POST, HAS_DROPOUT, HEAD, TAIL,
            )  # fmt: skip
            average += row_sum(tail)
        average /= cols
        head = tl.where((head_col < cols)[None, :], head - average, 0.0)
        variance = row_sum(head * head)
        if TAIL:
            tail = tl.where((tail_col < cols)[None, :], tail - average, 0.0)
            variance += row_sum(tail * tail)
        reciprocal = tl.rsqrt(variance / cols + eps)
        tl.store(mean + row[:, None], average, mask=(row < rows)[:, None])
        tl.store(rstd + row[:, None], reciprocal, mask=(row < rows)[:, None])
        store_tile(out, head * reciprocal * head_weight + head_bias, row, head_col, rows, cols, cols)
        if TAIL:
            store_tile(out, tail * reciprocal * tail_weight + tail_bias, row, tail_col, rows, cols, cols)


@triton.jit(
    do_not_specialize=["key", "site", "threshold", "rows", "cols", "y_cols", "stride_y", "stride_residual"]
)  # fmt: skip
def dropout_add_layer_norm_fwd_kernel(
    y, residual, weight, bias, out, mean, rstd, key, site, threshold, scale, eps,
    rows, cols, y_cols, stride_y, stride_residual,
    POST: tl.constexpr, HAS_DROPOUT: tl.constexpr, KEY_IS_TENSOR: tl.constexpr,
    UNIT: tl.constexpr, Y_UNIT: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`normalise_rows` by programs of which each takes every so-many-th block."""
    normalise_rows(
        y, residual, weight, bias, out, mean, rstd, dropout_key(key, KEY_IS_TENSOR), site, threshold, scale, eps,
        tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0),
        rows, cols * UNIT, y_cols * Y_UNIT, stride_y * Y_UNIT, stride_residual * UNIT,
        POST, HAS_DROPOUT, HEAD, TAIL, ROWS, 1,
    )  # fmt: skip


@triton.jit
def store_gradients(
    dy, dresidual, dz, v, x, kept, row, rows, cols, y_cols,
    POST_GRAD: tl.constexpr, USES_X: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """The gradients of y (0 outside) and of the residual, from that of z."""
    col = FIRST + tl.arange(0, COLS)
    inside = (col < cols)[None, :]
    dv, dx = POST_GRAD(v, x, inside, dz * kept)
    if USES_X:
        dz += dx
    store_tile(dy, tl.where(inside, dv, 0.0), row, col, rows, y_cols, y_cols)
    store_tile(dresidual, dz, row, col, rows, cols, cols)


@triton.jit
def store_partials(partials, dweight, dbias, col, cols):
    """The row sums of both [ROWS, COLS] tiles, as this program's row of partials [2, programs, cols]."""
    at = partials + tl.program_id(0).to(tl.int64) * cols + col
    tl.store(at, tl.sum(dweight, axis=0), mask=col < cols)
    tl.store(at + tl.num_programs(0).to(tl.int64) * cols, tl.sum(dbias, axis=0), mask=col < cols)


@triton.jit
def normalise_rows_backward(
    grad_out, y, residual, weight, mean, rstd, dy, dresidual, partials, key, site, threshold, scale,
    first, last, step, rows, cols, y_cols, stride_grad, stride_y, stride_residual,
    POST: tl.constexpr, POST_GRAD: tl.constexpr, USES_X: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dy [rows, y_cols] and dresidual [rows, cols], contiguous; for the blocks of rows of `normalise_rows`.

    partials [2, programs, cols], fp32: each program's sums over its rows of the gradients of weight and of bias. Until
    the end they are tiles [ROWS, cols], so the loop adds without exchange between threads.
    """
    head_col = tl.arange(0, HEAD)
    head_weight = load_vector(weight, head_col, cols)
    head_dweight = tl.zeros([ROWS, HEAD], tl.float32)
    head_dbias = tl.zeros([ROWS, HEAD], tl.float32)
    if TAIL:
        tail_col = HEAD + tl.arange(0, TAIL)
        tail_weight = load_vector(weight, tail_col, cols)
        tail_dweight = tl.zeros([ROWS, TAIL], tl.float32)
        tail_dbias = tl.zeros([ROWS, TAIL], tl.float32)
    for block in tl.range(first, last, step, num_stages=STAGES):
        row = (tl.zeros([], tl.int64) + block) * ROWS + tl.arange(0, ROWS)
        average = load_statistic(mean, row, rows, block)
        reciprocal = load_statistic(rstd, row, rows, block)
        head, head_v, head_x, head_kept = block_sum(
            y, residual, row, rows, cols, y_cols, stride_y, stride_residual, key, site, threshold, scale,
            POST, HAS_DROPOUT, 0, HEAD,
        )  # fmt: skip
        head = (head - average) * reciprocal
        head_g = load_tile(grad_out, row, head_col, rows, cols, stride_grad)
        head_dweight += head_g * head
        head_dbias += head_g
        head_g *= head_weight
        level = row_sum(head_g)
        slope = row_sum(head_g * head)
        if TAIL:
            tail, tail_v, tail_x, tail_kept = block_sum(
                y, residual, row, rows, cols, y_cols, stride_y, stride_residual, key, site, threshold, scale,
                POST, HAS_DROPOUT, HEAD, TAIL,
            )  # fmt: skip
            tail = (tail - average) * reciprocal
            tail_g = load_tile(grad_out, row, tail_col, rows, cols, stride_grad)
            tail_dweight += tail_g * tail
            tail_dbias += tail_g
            tail_g *= tail_weight
            level += row_sum(tail_g)
            slope += row_sum(tail_g * tail)
        level /= cols
        slope /= cols
        store_gradients(
            dy, dresidual, (head_g - level - head * slope) * reciprocal, head_v, head_x, head_kept,
            row, rows, cols, y_cols, POST_GRAD, USES_X, 0, HEAD,
        )  # fmt: skip
        if TAIL:
            store_gradients(
                dy, dresidual, (tail_g - level - tail * slope) * reciprocal, tail_v, tail_x, tail_kept,
                row, rows, cols, y_cols, POST_GRAD, USES_X, HEAD, TAIL,
            )  # fmt: skip
    store_partials(partials, head_dweight, head_dbias, head_col, cols)
    if TAIL:
        store_partials(partials, tail_dweight, tail_dbias, tail_col, cols)


@triton.jit(
    do_not_specialize=[
        "key", "site", "threshold", "rows", "cols", "y_cols", "stride_grad", "stride_y", "stride_residual"
    ]
)  # fmt: skip
def dropout_add_layer_norm_bwd_kernel(
    grad_out, y, residual, weight, mean, rstd, dy, dresidual, partials, key, site, threshold, scale,
    rows, cols, y_cols, stride_grad, stride_y, stride_residual,
    POST: tl.constexpr, POST_GRAD: tl.constexpr, USES_X: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, KEY_IS_TENSOR: tl.constexpr,
    UNIT: tl.constexpr, Y_UNIT: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """`normalise_rows_backward` by programs of which each takes every so-many-th block."""
    normalise_rows_backward(
        grad_out, y, residual, weight, mean, rstd, dy, dresidual, partials,
        dropout_key(key, KEY_IS_TENSOR), site, threshold, scale,
        tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0),
        rows, cols * UNIT, y_cols * Y_UNIT, stride_grad * UNIT, stride_y * Y_UNIT, stride_residual * UNIT,
        POST, POST_GRAD, USES_X, HAS_DROPOUT, HEAD, TAIL, ROWS, 1,
    )  # fmt: skip


@triton.jit(do_not_specialize=["key", "site", "threshold", "rows", "cols", "stride_x"])
def dropout_kernel(
    x, out, key, site, threshold, scale, rows, cols, stride_x,
    KEY_IS_TENSOR: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """One tile of out = x times dropout's factor, [rows, cols], out contiguous; its own gradient."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * COLS
    col = first + tl.arange(0, COLS)
    keep = keep_mask(dropout_key(key, KEY_IS_TENSOR), site, row, first, threshold, COLS)
    value = load_tile(x, row, col, rows, cols * UNIT, stride_x * UNIT) * tl.where(keep, scale, 0.0)
    store_tile(out, value, row, col, rows, cols * UNIT, cols * UNIT)


def norm_forward(
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    key: int,
    key_tensor: Tensor | None,
    site: int,
    dtype: torch.dtype,
    post=Unchanged,
) -> tuple[Tensor, Tensor, Tensor]:
    """out [M, C] in `dtype`, and mean and reciprocal deviation [M] of z = residual + Dropout(post(y, residual)), fp32.

    y [M, >= C] (columns from C on are ignored), residual [M, C], both with contiguous columns; p, key, key_tensor and
    site as `philox.split` gives them. ValueError above MAX_COLUMNS columns.
    """
    rows, cols = residual.shape
    device = residual.device
    out = torch.empty(rows, cols, dtype=dtype, device=device)
    mean = torch.empty(rows, dtype=torch.float32, device=device)
    rstd = torch.empty(rows, dtype=torch.float32, device=device)
    head, tail = pieces(cols)
    unit = divisor(cols, residual.stride(0))
    y_unit = divisor(y.shape[1], y.stride(0))
    mask, has_dropout = mask_arguments(p, key, key_tensor, site)
    tile = dict(tiles.choose("norm_fwd", device, dtype, head + tail))
    programs = min(ceil_div(rows, tile["ROWS"]), tile.pop("PROGRAMS") * multiprocessors(device))
    launch(
        dropout_add_layer_norm_fwd_kernel, (programs,),
        y, residual, weight, bias, out, mean, rstd, *mask, eps, rows, cols // unit, y.shape[1] // y_unit,
        y.stride(0) // y_unit, residual.stride(0) // unit, POST=post.forward, HAS_DROPOUT=has_dropout,
        KEY_IS_TENSOR=key_tensor is not None, UNIT=unit, Y_UNIT=y_unit, HEAD=head, TAIL=tail, **tile,
    )  # fmt: skip
    return out, mean, rstd


def norm_backward(
    grad_out: Tensor,
    y: Tensor,
    residual: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    p: float,
    key: int,
    key_tensor: Tensor | None,
    site: int,
    post=Unchanged,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """dy, dresidual, and fp32 partial sums [S, C] of the gradients of weight and of bias.

    grad_out [M, C]; the rest as in norm_forward. dy is contiguous with the shape and dtype of y, its columns from C on
    zero; dresidual [M, C] is contiguous in the residual's dtype. `reduce_partials` adds up the partial sums.
    """
    rows, cols = residual.shape
    device = residual.device
    dy = torch.empty(rows, y.shape[1], dtype=y.dtype, device=device)
    dresidual = torch.empty(rows, cols, dtype=residual.dtype, device=device)
    head, tail = pieces(y.shape[1])
    unit = divisor(cols, residual.stride(0), grad_out.stride(0))
    y_unit = divisor(y.shape[1], y.stride(0))
    mask, has_dropout = mask_arguments(p, key, key_tensor, site)
    tile = dict(tiles.choose("norm_bwd", device, y.dtype, head + tail))
    programs = min(ceil_div(rows, tile["ROWS"]), tile.pop("PROGRAMS") * multiprocessors(device))
    partials = torch.empty(2, programs, cols, dtype=torch.float32, device=device)
    launch(
        dropout_add_layer_norm_bwd_kernel, (programs,),
        grad_out, y, residual, weight, mean, rstd, dy, dresidual, partials, *mask, rows, cols // unit,
        y.shape[1] // y_unit, grad_out.stride(0) // unit, y.stride(0) // y_unit, residual.stride(0) // unit,
        POST=post.forward, POST_GRAD=post.backward, USES_X=post.uses_x, HAS_DROPOUT=has_dropout,
        KEY_IS_TENSOR=key_tensor is not None, UNIT=unit, Y_UNIT=y_unit, HEAD=head, TAIL=tail, **tile,
    )  # fmt: skip
    return dy, dresidual, partials.unbind()


def as_rows(x: Tensor) -> Tensor:
    """x [..., C] as [M, C] with contiguous columns: a view where that can be."""
    x = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def pieces(cols: int) -> tuple[int, int]:
    """HEAD and TAIL: powers of two, HEAD the larger, that hold `cols` columns between them; TAIL may be 0."""
    if cols > MAX_COLUMNS:
        raise ValueError(f"LayerNorm over {cols} columns: the fused kernels take at most {MAX_COLUMNS}")
    head = max(_SMALLEST_PIECE, 1 << (cols.bit_length() - 1))
    if cols <= head:
        return head, 0
    tail = max(_SMALLEST_PIECE, triton.next_power_of_2(cols - head))
    return (head, tail) if tail < head else (2 * head, 0)


def mask_arguments(p: float, key: int, key_tensor: Tensor | None, site: int) -> tuple[tuple, bool]:
    """The kernels' (key, site, threshold, scale), and whether anything is dropped."""
    threshold = philox.threshold(p)
    scale = 65536 / (65536 - threshold)
    return (key if key_tensor is None else key_tensor, site, threshold, scale), threshold > 0


def _dropout_forward(
    x: Tensor, p: float, key: int, key_tensor: Tensor | None, site: int, need_grad: bool
) -> tuple[Tensor]:
    flat = as_rows(x)
    rows, cols = flat.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    unit = divisor(cols, flat.stride(0))
    mask, _ = mask_arguments(p, key, key_tensor, site)
    tile = tiles.choose("dropout", x.device, x.dtype, cols)
    launch(
        dropout_kernel, (ceil_div(rows, tile["ROWS"]), ceil_div(cols, tile["COLS"])), flat, out, *mask,
        rows, cols // unit, flat.stride(0) // unit, KEY_IS_TENSOR=key_tensor is not None, UNIT=unit, **tile,
    )  # fmt: skip
    return (out,)


def _dropout_fake(x, p, key, key_tensor, site, need_grad):
    return (torch.empty(x.shape, dtype=x.dtype, device=x.device),)


def _dropout_backward(grads, kept, x, p, key, key_tensor, site, need_grad):
    return list(_dropout_forward(grads[0], p, key, key_tensor, site, need_grad))


def _dropout_backward_fake(grads, kept, x, p, key, key_tensor, site, need_grad):
    return [torch.empty(x.shape, dtype=x.dtype, device=x.device)]


def _forward(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    p: float,
    key: int,
    key_tensor: Tensor | None,
    site: int,
    dtype: torch.dtype,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    out, mean, rstd = norm_forward(
        as_rows(x), as_rows(residual), dense(weight), dense(bias), eps, p, key, key_tensor, site, dtype
    )  # fmt: skip
    return out.view(x.shape), mean, rstd


def _fake(x, residual, weight, bias, eps, p, key, key_tensor, site, dtype, need_grad):
    rows = x.numel() // x.shape[-1]
    statistics = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(2))
    return torch.empty(x.shape, dtype=dtype, device=x.device), *statistics


def _backward(grads, kept, x, residual, weight, bias, eps, p, key, key_tensor, site, dtype, need_grad):
    dx, dresidual, partials = norm_backward(
        as_rows(grads[0]), as_rows(x), as_rows(residual), dense(weight), *kept, p, key, key_tensor, site
    )  # fmt: skip
    gradients = [torch.empty_like(weight), torch.empty_like(bias)]
    reduce_partials(partials, gradients, accumulate=False)
    return [dx.view(x.shape), dresidual.view(x.shape), *gradients]


def _backward_fake(grads, kept, x, residual, weight, bias, *others):
    like_x = (torch.empty(x.shape, dtype=tensor.dtype, device=x.device) for tensor in (x, residual))
    return [*like_x, torch.empty_like(weight), torch.empty_like(bias)]


_dropout = FusedOp(
    "dropout", _dropout_forward, _dropout_fake, _dropout_backward, _dropout_backward_fake, differentiable=["x"]
)
_dropout_add_layer_norm = FusedOp(
    "dropout_add_layer_norm",
    _forward,
    _fake,
    _backward,
    _backward_fake,
    differentiable=["x", "residual", "weight", "bias"],
)
