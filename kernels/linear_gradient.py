"""The gradients of a linear layer in Triton, each with its slot's derivative inside the same kernel, in two launches.

    input gradient   d = g W, then (dv, dx) = slot gradient of (v, x, d)   g [M, N], W [N, K], v [M, K]
    weight gradient  dW = gᵀ pre(a), db = column sums of g                 fp32 partial sums over parts of the rows

Of the two linear layers of an MLP, the second one's input gradient comes first and alone. What is left then needs
nothing of each other: both weight gradients and the first layer's input gradient are one launch. Programs with the
longest loops, those of the weight gradients, get the lowest numbers and so start first; the short ones fill the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbert.kernels import tiles
from effbert.kernels.codegen import SlotFunction
from effbert.kernels.launch import ceil_div, divisor, input_precision, launch, multiprocessors
from effbert.kernels.linear import slot_function


@triton.jit
def column_products(
    g, w, row, col, rows, g_cols, w_cols, depth, stride_g, stride_w,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """g W for one tile of rows `row` and columns `col`: g [rows, g_cols], W [depth, w_cols] -> fp32.

    What is assumed and the last addition change no value (but the sign of a zero): without them NVIDIA's assembler has
    the products of some slots wait for each other on sm_90 (`aot.serialises`).
    """
    k = tl.arange(0, BLOCK_K)
    g_rows = g + row.to(tl.int64)[:, None] * stride_g
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tl.assume(depth > 0)
    for start in range(0, depth, BLOCK_K):
        at = start + k
        g_tile = tl.load(g_rows + at[None, :], mask=(row < rows)[:, None] & (at < g_cols)[None, :], other=0.0)
        w_at = w + at.to(tl.int64)[:, None] * stride_w + col[None, :]
        w_tile = tl.load(w_at, mask=(at < depth)[:, None] & (col < w_cols)[None, :], other=0.0)
        total = tl.dot(g_tile.to(w_tile.dtype), w_tile, total, input_precision=PRECISION)
    return total + 0.0


@triton.jit
def input_gradient_tile(
    g, w, v, x, dv, dx, value, first_row, first_col, rows, cols, depth, g_cols, w_cols, v_cols, x_cols,
    stride_g, stride_w, stride_v, stride_x, stride_dv, stride_dx, stride_value,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, USES_X: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d = g W for one tile, g [rows, depth], W [depth, cols]; then the slot's derivative at (v, x).

    dv [rows, cols] gets the gradient of v. Where the slot reads x, its gradient is added to dx [rows, x_cols] in place:
    each element by one program. value gets the slot's value again, which the weight gradient needs and the forward pass
    does not keep. dv and value have zeros in the columns of v that pad it.
    """
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    d = column_products(
        g, w, row, col, rows, g_cols, w_cols, depth, stride_g, stride_w, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    long_row = row.to(tl.int64)[:, None]
    in_v = (row < rows)[:, None] & (col < v_cols)[None, :]
    inside = (col < x_cols)[None, :]
    in_x = (row < rows)[:, None] & inside
    v_tile = tl.load(v + long_row * stride_v + col[None, :], mask=in_v, other=0.0).to(tl.float32)
    if USES_X:
        x_tile = tl.load(x + long_row * stride_x + col[None, :], mask=in_x, other=0.0).to(tl.float32)
    else:
        x_tile = 0.0
    gradient, x_gradient = BACKWARD(v_tile, x_tile, inside, d)
    real = (col < cols)[None, :]
    gradient = tl.where(real, gradient, 0.0)
    tl.store(dv + long_row * stride_dv + col[None, :], gradient.to(dv.dtype.element_ty), mask=in_v)
    if USES_X:
        dx_at = dx + long_row * stride_dx + col[None, :]
        mask = in_x & real
        x_gradient += tl.load(dx_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_at, x_gradient.to(dx.dtype.element_ty), mask=mask)
    again = tl.where(real, FORWARD(v_tile, x_tile, inside), 0.0)
    tl.store(value + long_row * stride_value + col[None, :], again.to(value.dtype.element_ty), mask=in_v)


@triton.jit(
    do_not_specialize=[
        "rows", "cols", "depth", "g_cols", "w_cols", "v_cols", "x_cols",
        "stride_g", "stride_w", "stride_v", "stride_x", "stride_dv", "stride_dx", "stride_value",
    ]
)  # fmt: skip
def linear_dgrad_kernel(
    g, w, v, x, dv, dx, value,
    rows, cols, depth, g_cols, w_cols, v_cols, x_cols,
    stride_g, stride_w, stride_v, stride_x, stride_dv, stride_dx, stride_value,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, USES_X: tl.constexpr, PRECISION: tl.constexpr,
    G_UNIT: tl.constexpr, W_UNIT: tl.constexpr, V_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`input_gradient_tile` for every tile."""
    col_tiles = tl.cdiv(v_cols * V_UNIT, BLOCK_N)
    first_row = (tl.program_id(0) // col_tiles) * BLOCK_M
    first_col = (tl.program_id(0) % col_tiles) * BLOCK_N
    input_gradient_tile(
        g, w, v, x, dv, dx, value, first_row, first_col, rows, cols, depth,
        g_cols * G_UNIT, w_cols * W_UNIT, v_cols * V_UNIT, x_cols * X_UNIT,
        stride_g * G_UNIT, stride_w * W_UNIT, stride_v * V_UNIT, stride_x * X_UNIT,
        stride_dv * V_UNIT, stride_dx * X_UNIT, stride_value * V_UNIT,
        FORWARD, BACKWARD, USES_X, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


@triton.jit
def weight_products(
    g, a, weight_partial, bias_partial, program, rows, rows_each, cols, depth, g_cols, a_cols, stride_g, stride_a,
    PRE: tl.constexpr, PRE_IS_IDENTITY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, APART: tl.constexpr,
):  # fmt: skip
    """One tile of gᵀ pre(a) over one part of the rows: g [rows, cols], a [rows, depth] -> fp32 [parts, cols, depth].

    The programs of the first tile column also sum their g over the rows: the bias gradient, fp32 [parts, cols].

    APART: a barrier after the loop, for one of two calls. The compiler would else join the ends of both, and on sm_90
    NVIDIA's assembler then has each product wait for the one before (`aot.serialises`).
    """
    depth_tiles = tl.cdiv(depth, BLOCK_K)
    all_tiles = tl.cdiv(cols, BLOCK_N) * depth_tiles
    part = program // all_tiles
    tile = program % all_tiles
    col = (tile // depth_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (tile % depth_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    last = tl.minimum(rows, (part + 1) * rows_each)
    for start in range(part * rows_each, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        in_rows = (row < last)[:, None]
        long_row = row.to(tl.int64)[:, None]
        g_tile = tl.load(g + long_row * stride_g + col[None, :], mask=in_rows & (col < g_cols)[None, :], other=0.0)
        a_tile = tl.load(a + long_row * stride_a + at[None, :], mask=in_rows & (at < a_cols)[None, :], other=0.0)
        if not PRE_IS_IDENTITY:
            a_tile = PRE(a_tile.to(tl.float32), 0.0, True)
        total = tl.dot(g_tile.T, a_tile.to(g_tile.dtype), total, input_precision=PRECISION)
        sums += tl.sum(g_tile.to(tl.float32), axis=0)
    if APART:
        tl.debug_barrier()
    place = (part.to(tl.int64) * cols + col)[:, None] * depth + at[None, :]
    tl.store(weight_partial + place, total, mask=(col < cols)[:, None] & (at < depth)[None, :])
    if tile % depth_tiles == 0:
        tl.store(bias_partial + part * cols + col, sums, mask=col < cols)


@triton.jit
def first_gradient_tile(
    dh, w, x, added, dx, first_row, first_col, rows, inner, dh_cols, w_cols, x_cols,
    stride_dh, stride_w, stride_x, stride_dx,
    PRE_BACKWARD: tl.constexpr, READS_X: tl.constexpr, ADDS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx = pre'(x) (dh W) for one tile, plus `added` where ADDS: dh [rows, inner], W [inner, x_cols]."""
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    gradient = column_products(
        dh, w, row, col, rows, dh_cols, w_cols, inner, stride_dh, stride_w, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
    )
    long_row = row.to(tl.int64)[:, None]
    mask = (row < rows)[:, None] & (col < x_cols)[None, :]
    if READS_X:
        x_tile = tl.load(x + long_row * stride_x + col[None, :], mask=mask, other=0.0).to(tl.float32)
    else:
        x_tile = gradient
    gradient, _ = PRE_BACKWARD(x_tile, 0.0, True, gradient)
    at = long_row * stride_dx + col[None, :]
    if ADDS:
        gradient += tl.load(added + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx + at, gradient.to(dx.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        "parts", "rows", "rows_each", "inner", "channels", "dh_cols", "dy_cols", "middle_cols", "w_cols", "x_cols",
        "stride_dh", "stride_dy", "stride_middle", "stride_w", "stride_x", "stride_dx",
    ]
)  # fmt: skip
def linear_gradients_kernel(
    dh, dy, middle, w, x, added, dx, weight1_partial, bias1_partial, weight2_partial, bias2_partial,
    parts, rows, rows_each, inner, channels, dh_cols, dy_cols, middle_cols, w_cols, x_cols,
    stride_dh, stride_dy, stride_middle, stride_w, stride_x, stride_dx,
    PRE: tl.constexpr, PRE_BACKWARD: tl.constexpr, PRE_IS_IDENTITY: tl.constexpr, READS_X: tl.constexpr,
    ADDS: tl.constexpr, INPUT: tl.constexpr, PRECISION: tl.constexpr,
    PAD_UNIT: tl.constexpr, DY_UNIT: tl.constexpr, W_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of dW1 = dhᵀ pre(x), of dW2 = dyᵀ middle, or, where INPUT, of dx = pre'(x) (dh W1), plus `added` if ADDS.

    dh, middle [rows, inner], dy, x, dx [rows, channels], w = W1 [inner, channels]. Weight gradients have tiles of COLS
    outputs by DEPTH inputs and take ROWS rows at a time; dx has tiles BLOCK_M by BLOCK_N.
    """
    program = tl.program_id(0)
    first = tl.cdiv(inner, COLS) * tl.cdiv(channels, DEPTH) * parts
    second = tl.cdiv(channels, COLS) * tl.cdiv(inner, DEPTH) * parts
    if program < first:
        weight_products(
            dh, x, weight1_partial, bias1_partial, program, rows, rows_each, inner, channels,
            dh_cols * PAD_UNIT, x_cols * X_UNIT, stride_dh * PAD_UNIT, stride_x * X_UNIT,
            PRE, PRE_IS_IDENTITY, PRECISION, ROWS, COLS, DEPTH, True,
        )  # fmt: skip
    elif program < first + second:
        weight_products(
            dy, middle, weight2_partial, bias2_partial, program - first, rows, rows_each, channels, inner,
            dy_cols * DY_UNIT, middle_cols * PAD_UNIT, stride_dy * DY_UNIT, stride_middle * PAD_UNIT,
            PRE, True, PRECISION, ROWS, COLS, DEPTH, False,
        )  # fmt: skip
    elif INPUT:
        program -= first + second
        col_tiles = tl.cdiv(channels, BLOCK_N)
        first_gradient_tile(
            dh, w, x, added, dx, (program // col_tiles) * BLOCK_M, (program % col_tiles) * BLOCK_N, rows, inner,
            dh_cols * PAD_UNIT, w_cols * W_UNIT, x_cols * X_UNIT,
            stride_dh * PAD_UNIT, stride_w * W_UNIT, stride_x * X_UNIT, stride_dx * X_UNIT,
            PRE_BACKWARD, READS_X, ADDS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "cols", "stride_g", "stride_v", "stride_x", "stride_dv"])
def slot_bwd_kernel(
    g, v, x, dv, dx, rows, cols, stride_g, stride_v, stride_x, stride_dv,
    BACKWARD: tl.constexpr, READS_V: tl.constexpr, USES_X: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(dv, dx) of one tile from g, v and x, all [rows, cols]: the derivative of a slot that no GEMM is next to."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    col = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (row < rows) & (col < cols * UNIT)
    g_tile = tl.load(g + row * (stride_g * UNIT) + col, mask=mask, other=0.0).to(tl.float32)
    v_tile = g_tile
    x_tile = g_tile
    if READS_V:
        v_tile = tl.load(v + row * (stride_v * UNIT) + col, mask=mask, other=0.0).to(tl.float32)
    if USES_X:
        x_tile = tl.load(x + row * (stride_x * UNIT) + col, mask=mask, other=0.0).to(tl.float32)
    v_gradient, x_gradient = BACKWARD(v_tile, x_tile, True, g_tile)
    at = row * (stride_dv * UNIT) + col
    tl.store(dv + at, v_gradient.to(dv.dtype.element_ty), mask=mask)
    if USES_X:
        tl.store(dx + at, x_gradient.to(dx.dtype.element_ty), mask=mask)


def slot_gradient(
    g: Tensor, v: Tensor, x: Tensor, slot: SlotFunction, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """(dv in `dtype`, dx in x's type or None) of slot(v, x), all [M, C], where g comes back."""
    rows, cols = g.shape
    dv = torch.empty(rows, cols, dtype=dtype, device=g.device)
    dx = torch.empty(rows, cols, dtype=x.dtype, device=g.device) if slot.uses_x else None
    strides = [t.stride(0) if t.numel() else cols for t in (g, v, x, dv)]
    unit = divisor(cols, *strides)
    tile = tiles.choose("slot_bwd", g.device, dtype, cols)
    grid = (ceil_div(rows, tile["BLOCK_M"]), ceil_div(cols, tile["BLOCK_N"]))
    launch(
        slot_bwd_kernel, grid, g, v, x, dv, dv if dx is None else dx, rows, cols // unit,
        *(stride // unit for stride in strides), BACKWARD=slot.backward, READS_V=slot.backward_uses_value,
        USES_X=slot.uses_x, UNIT=unit, **tile,
    )  # fmt: skip
    return dv, dx


def linear_input_gradient(
    g: Tensor,
    weight: Tensor,
    v: Tensor,
    cols: int,
    depth: int,
    slot: SlotFunction,
    dtype: torch.dtype,
    x: Tensor,
    dx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradient of v where slot(v, x) is multiplied by W [depth, >= cols] and g [M, >= depth] comes back; slot(v, x).

    v [M, >= cols]: both results have its width and are of `dtype`. Where the slot reads x [M, C], that gradient is
    added to dx [M, C] in place.
    """
    rows, width, device = len(v), v.shape[1], v.device
    dv, value = (torch.empty(rows, width, dtype=dtype, device=device) for _ in range(2))
    strides_x = (x.stride(0), x.stride(0) if dx is None else dx.stride(0))
    g_unit, w_unit = divisor(g.shape[1], g.stride(0)), divisor(weight.shape[1], weight.stride(0))
    v_unit, x_unit = divisor(width, v.stride(0)), divisor(x.shape[1], *strides_x)
    tile = tiles.choose("linear_dgrad", device, dtype, slot.statements)
    grid = (ceil_div(rows, tile["BLOCK_M"]) * ceil_div(width, tile["BLOCK_N"]),)
    launch(
        linear_dgrad_kernel, grid, g, weight, v, x, dv, dv if dx is None else dx, value,
        rows, cols, depth, g.shape[1] // g_unit, weight.shape[1] // w_unit,
        width // v_unit, x.shape[1] // x_unit, g.stride(0) // g_unit, weight.stride(0) // w_unit,
        v.stride(0) // v_unit, strides_x[0] // x_unit, width // v_unit, strides_x[1] // x_unit, width // v_unit,
        FORWARD=slot.forward, BACKWARD=slot.backward, USES_X=slot.uses_x, PRECISION=input_precision(dtype),
        G_UNIT=g_unit, W_UNIT=w_unit, V_UNIT=v_unit, X_UNIT=x_unit, **tile,
    )  # fmt: skip
    return dv, value


def linear_gradients(
    dh: Tensor,
    dy: Tensor,
    middle: Tensor,
    weight: Tensor,
    x: Tensor,
    inner: int,
    dtype: torch.dtype,
    pre: SlotFunction,
    added: Tensor | None = None,
    finished: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """dx of x's type, plus `added`, and fp32 partial sums [parts, ...] of the gradients of W1, b1, W2 and b2.

    Of y = W2 middle + b2 after h = W1 pre(x) + b1: dh, middle [M, >= inner], dy [M, >= C], weight [inner, >= C] is W1,
    x [M, C], `added` [M, C] contiguous: dx already, where `finished`. `effbert.kernels.reduction.reduce_partials` adds
    the partial sums up in fixed order, so with the same result on every run.
    """
    (rows, channels), device = x.shape, x.device
    dx = added if finished else torch.empty(rows, channels, dtype=x.dtype, device=device)
    pad_unit = divisor(*(size for t in (dh, middle) for size in (t.shape[1], t.stride(0))))
    dy_unit, w_unit = divisor(dy.shape[1], dy.stride(0)), divisor(weight.shape[1], weight.stride(0))
    x_unit = divisor(channels, x.stride(0))
    tile = tiles.choose("linear_gradients", device, dtype, pre.statements)
    outputs, inputs, rows_at_once = tile["COLS"], tile["DEPTH"], tile["ROWS"]
    weight_tiles = ceil_div(inner, outputs) * ceil_div(channels, inputs)
    weight_tiles += ceil_div(channels, outputs) * ceil_div(inner, inputs)
    steps = max(1, ceil_div(rows, rows_at_once))
    parts = min(steps, max(1, 2 * multiprocessors(device) // weight_tiles))
    shapes = (inner, channels), (inner,), (channels, inner), (channels,)
    partials = [torch.empty(parts, *shape, dtype=torch.float32, device=device) for shape in shapes]
    input_tiles = 0 if finished else ceil_div(rows, tile["BLOCK_M"]) * ceil_div(channels, tile["BLOCK_N"])
    launch(
        linear_gradients_kernel, (weight_tiles * parts + input_tiles,),
        dh, dy, middle, weight, x, dx if added is None else added, dx, *partials,
        parts, rows, ceil_div(steps, parts) * rows_at_once, inner, channels, dh.shape[1] // pad_unit,
        dy.shape[1] // dy_unit, middle.shape[1] // pad_unit, weight.shape[1] // w_unit, channels // x_unit,
        dh.stride(0) // pad_unit, dy.stride(0) // dy_unit, middle.stride(0) // pad_unit, weight.stride(0) // w_unit,
        x.stride(0) // x_unit, channels // x_unit,
        PRE=slot_function(pre), PRE_BACKWARD=pre.backward, PRE_IS_IDENTITY=pre.is_identity,
        READS_X=pre.backward_uses_value, ADDS=added is not None, INPUT=not finished, PRECISION=input_precision(dtype),
        PAD_UNIT=pad_unit, DY_UNIT=dy_unit, W_UNIT=w_unit, X_UNIT=x_unit, **tile,
    )  # fmt: skip
    return dx, partials
