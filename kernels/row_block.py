"""The stages of an MLP block that meet in whole rows: one kernel forward and one backward, for rows of any width.

    forward    h = W1 pre(x) + b1 and mid(h, x), then y = W2 mid + b2, then out = LN(x + Dropout(post(y, x)))
    backward   the gradients of that; then dh, through W2 and mid; then, where pre does nothing, dx, through W1

The one idea: a program owns BLOCK_M whole rows and takes the stages one after the other, with a barrier between them.
What a stage writes, the next one of the same program reads back: no other program needs it, so no launch has to come
between, and it comes from the caches. No stage keeps more in registers than its own kernel would: the products go tile
by tile of BLOCK_N columns, LayerNorm ROWS whole rows at a time, both by the functions of those kernels, so the results
have the same bits, but for the gradients of the norm's weight and bias, which are summed over other groups of rows.

It needs rows enough to give every multiprocessor its share, and its slots' functions key its compilations together:
`effbert.kernels.tiles` decides, and what it refuses goes to the separate kernels. It refuses AMD's GPUs, where the
barrier orders stores and loads of a workgroup by LLVM's memory model, but without a wait that the assembly would show,
and fp32, which is bound by its products.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbert.kernels.codegen import SlotFunction
from effbert.kernels.launch import ceil_div, divisor, input_precision, launch
from effbert.kernels.linear import linear_tile, padded_width, slot_function
from effbert.kernels.linear_gradient import first_gradient_tile, input_gradient_tile
from effbert.kernels.norm import mask_arguments, normalise_rows, normalise_rows_backward, pieces
from effbert.kernels.primitives import dropout_key, identity, identity_gradient

STAGES = tl.constexpr(3)  # rows in flight: a program has a multiprocessor to itself, and few warps to hide latency


@triton.jit(
    do_not_specialize=[
        "key", "site", "threshold", "rows", "channels", "width", "h_cols", "w1_cols", "w2_cols", "y_cols",
        "stride_x", "stride_w1", "stride_w2",
    ]
)  # fmt: skip
def row_block_fwd_kernel(
    x, w1, b1, w2, b2, norm_weight, norm_bias, h, middle, y, out, mean, rstd, key, site, threshold, scale, eps,
    rows, channels, width, h_cols, w1_cols, w2_cols, y_cols, stride_x, stride_w1, stride_w2,
    PRE: tl.constexpr, PRE_IS_IDENTITY: tl.constexpr, MID: tl.constexpr, MID_USES_X: tl.constexpr, POST: tl.constexpr,
    STORE_H: tl.constexpr, HAS_DROPOUT: tl.constexpr, KEY_IS_TENSOR: tl.constexpr, PRECISION: tl.constexpr,
    X_UNIT: tl.constexpr, W1_UNIT: tl.constexpr, W2_UNIT: tl.constexpr, H_UNIT: tl.constexpr, Y_UNIT: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of h (where STORE_H) and middle = mid(h, x) [rows, width] and y [rows, channels], padded, of out
    [rows, channels] contiguous, and of mean and rstd [rows]."""
    channels *= X_UNIT
    stride_x *= X_UNIT
    h_cols *= H_UNIT
    y_cols *= Y_UNIT
    first_row = tl.program_id(0) * BLOCK_M
    for first_col in range(0, h_cols, BLOCK_N):
        linear_tile(
            x, w1, b1, x, h, middle, first_row, first_col, rows, width, channels,
            channels, w1_cols * W1_UNIT, channels, h_cols,
            stride_x, stride_w1 * W1_UNIT, stride_x, h_cols, h_cols,
            PRE, PRE_IS_IDENTITY, MID, MID_USES_X, STORE_H, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    tl.debug_barrier()
    for first_col in range(0, y_cols, BLOCK_N):
        linear_tile(
            middle, w2, b2, x, y, y, first_row, first_col, rows, channels, width,
            h_cols, w2_cols * W2_UNIT, channels, y_cols,
            h_cols, stride_w2 * W2_UNIT, stride_x, y_cols, y_cols,
            identity, True, identity, False, True, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    tl.debug_barrier()
    first = first_row // ROWS
    normalise_rows(
        y, x, norm_weight, norm_bias, out, mean, rstd, dropout_key(key, KEY_IS_TENSOR), site, threshold, scale, eps,
        first, tl.minimum(first + BLOCK_M // ROWS, tl.cdiv(rows, ROWS)), 1,
        rows, channels, y_cols, y_cols, stride_x, POST, HAS_DROPOUT, HEAD, TAIL, ROWS, STAGES,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "key", "site", "threshold", "rows", "channels", "width", "y_cols", "h_cols", "w1_cols", "w2_cols",
        "stride_grad", "stride_x", "stride_y", "stride_h", "stride_w1", "stride_w2",
    ]
)  # fmt: skip
def row_block_bwd_kernel(
    grad_out, y, x, norm_weight, mean, rstd, h, w1, w2, dy, dx, dh, middle, partials, key, site, threshold, scale,
    rows, channels, width, y_cols, h_cols, w1_cols, w2_cols,
    stride_grad, stride_x, stride_y, stride_h, stride_w1, stride_w2,
    POST: tl.constexpr, POST_GRAD: tl.constexpr, POST_USES_X: tl.constexpr,
    MID: tl.constexpr, MID_GRAD: tl.constexpr, MID_USES_X: tl.constexpr, FINISHES: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, KEY_IS_TENSOR: tl.constexpr, PRECISION: tl.constexpr,
    X_UNIT: tl.constexpr, Y_UNIT: tl.constexpr, H_UNIT: tl.constexpr, W1_UNIT: tl.constexpr, W2_UNIT: tl.constexpr,
    HEAD: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows of dy [rows, channels] and dh, middle [rows, width] (padded), and of dx [rows, channels].

    dx lacks what comes through W1, unless FINISHES. partials [2, programs, channels], fp32, as in `norm_backward`.
    """
    channels *= X_UNIT
    stride_x *= X_UNIT
    y_cols *= Y_UNIT
    h_cols *= H_UNIT
    first_row = tl.program_id(0) * BLOCK_M
    first = first_row // ROWS
    normalise_rows_backward(
        grad_out, y, x, norm_weight, mean, rstd, dy, dx, partials,
        dropout_key(key, KEY_IS_TENSOR), site, threshold, scale,
        first, tl.minimum(first + BLOCK_M // ROWS, tl.cdiv(rows, ROWS)), 1,
        rows, channels, y_cols, stride_grad * X_UNIT, stride_y * Y_UNIT, stride_x,
        POST, POST_GRAD, POST_USES_X, HAS_DROPOUT, HEAD, TAIL, ROWS, STAGES,
    )  # fmt: skip
    tl.debug_barrier()
    for first_col in range(0, h_cols, BLOCK_N):
        input_gradient_tile(
            dy, w2, h, x, dh, dx, middle, first_row, first_col, rows, width, channels,
            y_cols, w2_cols * W2_UNIT, h_cols, channels,
            y_cols, stride_w2 * W2_UNIT, stride_h * H_UNIT, stride_x, h_cols, channels, h_cols,
            MID, MID_GRAD, MID_USES_X, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if FINISHES:
        tl.debug_barrier()
        for first_col in range(0, channels, BLOCK_N):
            first_gradient_tile(
                dh, w1, x, dx, dx, first_row, first_col, rows, width, h_cols, w1_cols * W1_UNIT, channels,
                h_cols, stride_w1 * W1_UNIT, stride_x, channels,
                identity_gradient, False, True, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


def row_block_forward(
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
    post,
    dtype: torch.dtype,
    keep_h: bool,
    tile: dict[str, int],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """out [M, C], h [M, E] (None unless `keep_h`) and y [M, C], both padded, mean and rstd [M]: what `linear_forward`,
    twice, and then `norm_forward` give.

    x [M, C], weight1 [width, >= C], weight2 [C, >= width]; `post` as the norm takes it, `dropout` as `philox.split`
    gives it.
    """
    (rows, channels), device = x.shape, x.device
    h_cols, y_cols = padded_width(width, dtype), padded_width(channels, dtype)
    h = torch.empty(rows, h_cols, dtype=dtype, device=device) if keep_h else None
    middle = torch.empty(rows, h_cols, dtype=dtype, device=device)
    y = torch.empty(rows, y_cols, dtype=dtype, device=device)
    out = torch.empty(rows, channels, dtype=dtype, device=device)
    mean, rstd = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
    mask, has_dropout = mask_arguments(*dropout)
    head, tail = pieces(channels)
    w1_unit, w2_unit = (divisor(t.shape[1], t.stride(0)) for t in (weight1, weight2))
    x_unit, h_unit, y_unit = divisor(channels, x.stride(0)), divisor(h_cols), divisor(y_cols)
    launch(
        row_block_fwd_kernel, (ceil_div(rows, tile["BLOCK_M"]),),
        x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, middle if h is None else h, middle, y, out,
        mean, rstd, *mask, eps, rows, channels // x_unit, width, h_cols // h_unit,
        weight1.shape[1] // w1_unit, weight2.shape[1] // w2_unit, y_cols // y_unit,
        x.stride(0) // x_unit, weight1.stride(0) // w1_unit, weight2.stride(0) // w2_unit,
        PRE=slot_function(slots.pre), PRE_IS_IDENTITY=slots.pre.is_identity, MID=slots.mid.forward,
        MID_USES_X=slots.mid.uses_x, POST=post.forward, STORE_H=keep_h, HAS_DROPOUT=has_dropout,
        KEY_IS_TENSOR=dropout[2] is not None, PRECISION=input_precision(dtype),
        X_UNIT=x_unit, W1_UNIT=w1_unit, W2_UNIT=w2_unit, H_UNIT=h_unit, Y_UNIT=y_unit, HEAD=head, TAIL=tail, **tile,
    )  # fmt: skip
    return out, h, y, mean, rstd


def row_block_backward(
    grad_out: Tensor,
    y: Tensor,
    x: Tensor,
    norm_weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dropout: tuple,
    post,
    h: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    width: int,
    mid: SlotFunction,
    finishes: bool,
    dtype: torch.dtype,
    tile: dict[str, int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
    """dy, dx, dh, mid(h, x) and partial sums: what `norm_backward` and then `linear_input_gradient` give.

    finishes (for a pre that does nothing): dx has the gradient through W1 too. h [M, >= width], weight1 [width, >= C],
    weight2 [C, >= width], the others as in `norm_backward`.
    """
    (rows, channels), device = x.shape, x.device
    dx = torch.empty(rows, channels, dtype=x.dtype, device=device)
    dy = torch.empty(rows, y.shape[1], dtype=dtype, device=device)
    dh, middle = (torch.empty(rows, h.shape[1], dtype=dtype, device=device) for _ in range(2))
    programs = ceil_div(rows, tile["BLOCK_M"])
    partials = torch.empty(2, programs, channels, dtype=torch.float32, device=device)
    mask, has_dropout = mask_arguments(*dropout)
    head, tail = pieces(y.shape[1])
    x_unit = divisor(channels, x.stride(0), grad_out.stride(0))
    y_unit, h_unit, w1_unit, w2_unit = (divisor(t.shape[1], t.stride(0)) for t in (y, h, weight1, weight2))
    launch(
        row_block_bwd_kernel, (programs,),
        grad_out, y, x, norm_weight, mean, rstd, h, weight1, weight2, dy, dx, dh, middle, partials, *mask,
        rows, channels // x_unit, width, y.shape[1] // y_unit, h.shape[1] // h_unit,
        weight1.shape[1] // w1_unit, weight2.shape[1] // w2_unit,
        grad_out.stride(0) // x_unit, x.stride(0) // x_unit, y.stride(0) // y_unit, h.stride(0) // h_unit,
        weight1.stride(0) // w1_unit, weight2.stride(0) // w2_unit,
        POST=post.forward, POST_GRAD=post.backward, POST_USES_X=post.uses_x,
        MID=mid.forward, MID_GRAD=mid.backward, MID_USES_X=mid.uses_x, FINISHES=finishes,
        HAS_DROPOUT=has_dropout, KEY_IS_TENSOR=dropout[2] is not None, PRECISION=input_precision(dtype),
        X_UNIT=x_unit, Y_UNIT=y_unit, H_UNIT=h_unit, W1_UNIT=w1_unit, W2_UNIT=w2_unit, HEAD=head, TAIL=tail, **tile,
    )  # fmt: skip
    return dy, dx, dh, middle, partials.unbind()
