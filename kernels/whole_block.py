"""The forward pass of a whole MLP block as one kernel: both GEMMs, all three slots, dropout, residual and LayerNorm.

    out = LN(x + Dropout(post(y, x))), y = mid(h, x) W2ᵀ + b2, h = pre(x) W1ᵀ + b1     x [M, C], h [M, E], y [M, C]

A program owns BLOCK_M whole rows. It walks over the inner width in steps: a piece of h, its mid, and the products of
that piece with all of W2's rows, which stay in registers until the end as two powers of two, HEAD and TAIL (as
effbert.kernels.norm). So mid(h, x) never leaves the chip, and y and h only where a backward pass needs them.

What decides where it wins: the weights are read by every program, M / BLOCK_M times 4 C E bytes in half precision, from
L2. Separate kernels read them as often but also write and read mid(h, x) and y, and read x once per 64 columns.
Registers bound it: BLOCK_M · (HEAD + TAIL) fp32 sums, and x beside them at the end. Built for sm_90 with 64 rows
(triton 3.9, `linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2)`), 256 columns take 160 registers, 360 spill 528 bytes a
thread and 540 spill 1,656; so effbert.kernels.tiles gives it rows of up to 256 columns in half precision, and
everything else goes to the separate kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbert.kernels.launch import ceil_div, divisor, input_precision, launch
from effbert.kernels.linear import padded_width, row_products, slot_function
from effbert.kernels.norm import load_tile, load_vector, mask_arguments, pieces, store_tile
from effbert.kernels.primitives import dropout_key, keep_mask


@triton.jit
def add_products(
    total, middle, w2, at, in_piece, channels, stride, FIRST: tl.constexpr, COLS: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """total [BM, COLS] + middle [BM, BLOCK_E] times columns `at` of rows FIRST.. of W2."""
    col = FIRST + tl.arange(0, COLS)
    pointers = w2 + col.to(tl.int64)[:, None] * stride + at[None, :]
    tile = tl.load(pointers, mask=(col < channels)[:, None] & in_piece[None, :], other=0.0)
    return tl.dot(middle.to(tile.dtype), tile.T, total, input_precision=PRECISION)


@triton.jit
def finished_sum(
    total, bias, x, y, row, rows, channels, y_cols, stride_x, key, site, threshold, scale,
    POST: tl.constexpr, HAS_DROPOUT: tl.constexpr, STORE: tl.constexpr, FIRST: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """z [BM, COLS] = x + Dropout(post(y, x)) from the products, 0 outside; stores y."""
    col = FIRST + tl.arange(0, COLS)
    inside = (col < channels)[None, :]
    total += load_vector(bias, col, channels)
    value = tl.where(inside, total, 0.0).to(y.dtype.element_ty)
    if STORE:
        store_tile(y, value, row, col, rows, y_cols, y_cols)
    x_tile = load_tile(x, row, col, rows, channels, stride_x)
    added = POST(value.to(tl.float32), x_tile, inside)
    if HAS_DROPOUT:
        added *= tl.where(keep_mask(key, site, row, FIRST, threshold, COLS), scale, 0.0)
    return tl.where(inside, x_tile + added, 0.0)


@triton.jit
def centred(z, average, channels, FIRST: tl.constexpr, COLS: tl.constexpr):
    """z less its row's average, 0 outside."""
    return tl.where((FIRST + tl.arange(0, COLS) < channels)[None, :], z - average[:, None], 0.0)


@triton.jit
def store_normalised(
    out, centre, reciprocal, weight, bias, row, rows, channels, FIRST: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """Columns FIRST to FIRST + COLS of the result."""
    col = FIRST + tl.arange(0, COLS)
    value = centre * reciprocal[:, None] * load_vector(weight, col, channels) + load_vector(bias, col, channels)
    store_tile(out, value, row, col, rows, channels, channels)


@triton.jit(
    do_not_specialize=[
        "key", "site", "threshold", "rows", "channels", "width", "w1_cols", "w2_cols", "h_cols", "y_cols",
        "stride_x", "stride_w1", "stride_w2",
    ]
)  # fmt: skip
def mlp_block_fwd_kernel(
    x, w1, b1, w2, b2, norm_weight, norm_bias, h, y, out, mean, rstd, key, site, threshold, scale, eps,
    rows, channels, width, w1_cols, w2_cols, h_cols, y_cols, stride_x, stride_w1, stride_w2,
    PRE: tl.constexpr, PRE_IS_IDENTITY: tl.constexpr, MID: tl.constexpr, MID_USES_X: tl.constexpr, POST: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, KEY_IS_TENSOR: tl.constexpr, STORE: tl.constexpr, PRECISION: tl.constexpr,
    X_UNIT: tl.constexpr, W1_UNIT: tl.constexpr, W2_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows of out [rows, channels]; mean and rstd [rows]; with STORE also h and y (padded)."""
    channels *= X_UNIT
    stride_x *= X_UNIT
    h_cols *= OUT_UNIT
    y_cols *= OUT_UNIT
    first_row = tl.program_id(0) * BLOCK_M
    row = (tl.zeros([], tl.int64) + first_row) + tl.arange(0, BLOCK_M)
    head = tl.zeros([BLOCK_M, HEAD], tl.float32)
    if TAIL:
        tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
    for start in range(0, h_cols, BLOCK_E):
        at = start + tl.arange(0, BLOCK_E)
        piece = row_products(
            x, w1, first_row, start, rows, width, channels, w1_cols * W1_UNIT, channels,
            stride_x, stride_w1 * W1_UNIT, PRE, PRE_IS_IDENTITY, PRECISION, BLOCK_M, BLOCK_E, BLOCK_K,
        )  # fmt: skip
        piece += load_vector(b1, at, width)
        real = (at < width)[None, :]
        piece = tl.where(real, piece, 0.0).to(h.dtype.element_ty)
        if STORE:
            store_tile(h, piece, row, at, rows, h_cols, h_cols)
        inside = (at < channels)[None, :]
        if MID_USES_X:
            x_tile = load_tile(x, row, at, rows, channels, stride_x)
        else:
            x_tile = 0.0
        middle = tl.where(real, MID(piece.to(tl.float32), x_tile, inside), 0.0).to(h.dtype.element_ty)
        in_piece = at < w2_cols * W2_UNIT
        head = add_products(head, middle, w2, at, in_piece, channels, stride_w2 * W2_UNIT, 0, HEAD, PRECISION)
        if TAIL:
            tail = add_products(tail, middle, w2, at, in_piece, channels, stride_w2 * W2_UNIT, HEAD, TAIL, PRECISION)

    key = dropout_key(key, KEY_IS_TENSOR)
    head = finished_sum(
        head, b2, x, y, row, rows, channels, y_cols, stride_x, key, site, threshold, scale,
        POST, HAS_DROPOUT, STORE, 0, HEAD,
    )  # fmt: skip
    average = tl.sum(head, axis=1)
    if TAIL:
        tail = finished_sum(
            tail, b2, x, y, row, rows, channels, y_cols, stride_x, key, site, threshold, scale,
            POST, HAS_DROPOUT, STORE, HEAD, TAIL,
        )  # fmt: skip
        average += tl.sum(tail, axis=1)
    average /= channels
    head = centred(head, average, channels, 0, HEAD)
    variance = tl.sum(head * head, axis=1)
    if TAIL:
        tail = centred(tail, average, channels, HEAD, TAIL)
        variance += tl.sum(tail * tail, axis=1)
    reciprocal = tl.rsqrt(variance / channels + eps)
    tl.store(mean + row, average, mask=row < rows)
    tl.store(rstd + row, reciprocal, mask=row < rows)
    store_normalised(out, head, reciprocal, norm_weight, norm_bias, row, rows, channels, 0, HEAD)
    if TAIL:
        store_normalised(out, tail, reciprocal, norm_weight, norm_bias, row, rows, channels, HEAD, TAIL)


def whole_block_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    width: int,
    eps: float,
    dropout: tuple,
    slots,
    dtype: torch.dtype,
    keep: bool,
    tile: dict[str, int],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """out [M, C], h and y (padded; None unless `keep`), mean and rstd [M] for the backward pass.

    x [M, C]; weight1 [>= width, >= C] and weight2 [C, >= width] as packed, zeros beyond; `dropout` as `philox.split`
    gives it.
    """
    rows, channels = x.shape
    device = x.device
    h_cols, y_cols = padded_width(width, dtype), padded_width(channels, dtype)
    out = torch.empty(rows, channels, dtype=dtype, device=device)
    h = torch.empty(rows, h_cols, dtype=dtype, device=device) if keep else None
    y = torch.empty(rows, y_cols, dtype=dtype, device=device) if keep else None
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    mask, has_dropout = mask_arguments(*dropout)
    head, tail = pieces(channels)
    x_unit, out_unit = divisor(channels, x.stride(0)), divisor(h_cols, y_cols)
    w1_unit = divisor(weight1.shape[1], weight1.stride(0))
    w2_unit = divisor(weight2.shape[1], weight2.stride(0))
    launch(
        mlp_block_fwd_kernel, (ceil_div(rows, tile["BLOCK_M"]),),
        x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, out if h is None else h, out if y is None else y,
        out, mean, rstd, *mask, eps, rows, channels // x_unit, width,
        weight1.shape[1] // w1_unit, weight2.shape[1] // w2_unit, h_cols // out_unit, y_cols // out_unit,
        x.stride(0) // x_unit, weight1.stride(0) // w1_unit, weight2.stride(0) // w2_unit,
        PRE=slot_function(slots.pre), PRE_IS_IDENTITY=slots.pre.is_identity, MID=slots.mid.forward,
        MID_USES_X=slots.mid.uses_x, POST=slot_function(slots.post), HAS_DROPOUT=has_dropout,
        KEY_IS_TENSOR=dropout[2] is not None, STORE=keep, PRECISION=input_precision(dtype),
        X_UNIT=x_unit, W1_UNIT=w1_unit, W2_UNIT=w2_unit, OUT_UNIT=out_unit, HEAD=head, TAIL=tail, **tile,
    )  # fmt: skip
    return out, h, y, mean, rstd
