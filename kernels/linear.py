"""The three GEMMs of a linear layer in Triton, each with the elementwise work round it inside the same kernel.

    forward          z = pre(a) Wᵀ + b, and post(z, x) beside it          a [M, K], W [N, K], b [N], x [M, C]
    input gradient   d = g W, then (dv, dx) = slot gradient of (v, x, d)   g [M, N], W [N, K], v [M, K]
    weight gradient  dW = gᵀ pre(a), db = column sums of g                 fp32 partial sums over parts of the rows

`pre`, `post` and the slot gradient are small functions generated from an expression (effbert.kernels.codegen) and
passed as constants. So a kernel is compiled once for a slot function, element type and alignment, whatever its sizes.

Alignment by design. Widths such as 540 and 270 start rows at addresses that no 16-byte load may touch. Tensors that
live only between our kernels are padded with zeros to rows of a multiple of 64 bytes (`padded_width`), so they are
loaded 16 bytes at a time: at 270 half-precision columns that is 6.7 % more bytes for a quarter of the load
instructions. Inputs and outputs of an op keep the caller's layout; their strides and widths are passed divided by a
unit that the kernel knows as a constant, so rows of 540 half-precision elements still move 8 bytes at a time.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbert.kernels import tiles
from effbert.kernels.codegen import SlotFunction
from effbert.kernels.launch import ceil_div, divisor, input_precision, launch, multiprocessors
from effbert.kernels.primitives import identity

ROW_BYTES = 64  # rows of a tensor between two kernels are padded to a multiple of this


@triton.jit
def row_products(
    a, w, first_row, first_col, rows, cols, a_cols, w_cols, depth, stride_a, stride_w,
    PRE: tl.constexpr, PRE_IS_IDENTITY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """pre(a) Wᵀ for one tile: a [rows, a_cols], W [cols, w_cols] -> [BLOCK_M, BLOCK_N] in fp32."""
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_rows = a + row.to(tl.int64)[:, None] * stride_a
    w_rows = w + col.to(tl.int64)[:, None] * stride_w
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        at = start + k
        a_tile = tl.load(a_rows + at[None, :], mask=(row < rows)[:, None] & (at < a_cols)[None, :], other=0.0)
        w_tile = tl.load(w_rows + at[None, :], mask=(col < cols)[:, None] & (at < w_cols)[None, :], other=0.0)
        if not PRE_IS_IDENTITY:
            a_tile = PRE(a_tile.to(tl.float32), 0.0, True)
        total = tl.dot(a_tile.to(w_tile.dtype), w_tile.T, total, input_precision=PRECISION)
    return total


@triton.jit(
    do_not_specialize=[
        "rows", "cols", "depth", "a_cols", "w_cols", "x_cols", "stored_cols",
        "stride_a", "stride_w", "stride_x", "stride_z", "stride_y",
    ]
)  # fmt: skip
def linear_fwd_kernel(
    a, w, bias, x, z, y,
    rows, cols, depth, a_cols, w_cols, x_cols, stored_cols, stride_a, stride_w, stride_x, stride_z, stride_y,
    PRE: tl.constexpr, PRE_IS_IDENTITY: tl.constexpr, POST: tl.constexpr, USES_X: tl.constexpr,
    STORE_Z: tl.constexpr, STORE_Y: tl.constexpr, PRECISION: tl.constexpr,
    A_UNIT: tl.constexpr, W_UNIT: tl.constexpr, X_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z [rows, cols] = pre(a) Wᵀ + bias and y = post(z, x), for one tile; either may be left out.

    z is rounded to its type before `post` reads it, so that the backward pass, which reads z back, differentiates what
    was computed. Columns from `cols` to `stored_cols` are stored as zeros.
    """
    col_tiles = tl.cdiv(stored_cols * OUT_UNIT, BLOCK_N)
    first_row = (tl.program_id(0) // col_tiles) * BLOCK_M
    first_col = (tl.program_id(0) % col_tiles) * BLOCK_N
    total = row_products(
        a, w, first_row, first_col, rows, cols, a_cols * A_UNIT, w_cols * W_UNIT, depth,
        stride_a * A_UNIT, stride_w * W_UNIT, PRE, PRE_IS_IDENTITY, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    total += tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    stored = (row < rows)[:, None] & (col < stored_cols * OUT_UNIT)[None, :]
    total = tl.where((col < cols)[None, :], total, 0.0).to(z.dtype.element_ty)
    long_row = row.to(tl.int64)[:, None]
    if STORE_Z:
        tl.store(z + long_row * (stride_z * OUT_UNIT) + col[None, :], total, mask=stored)
    if STORE_Y:
        inside = (col < x_cols * X_UNIT)[None, :]
        if USES_X:
            x_at = x + long_row * (stride_x * X_UNIT) + col[None, :]
            x_tile = tl.load(x_at, mask=(row < rows)[:, None] & inside, other=0.0).to(tl.float32)
        else:
            x_tile = 0.0
        value = POST(total.to(tl.float32), x_tile, inside)
        value = tl.where((col < cols)[None, :], value, 0.0)
        tl.store(y + long_row * (stride_y * OUT_UNIT) + col[None, :], value.to(y.dtype.element_ty), mask=stored)


@triton.jit(
    do_not_specialize=[
        "rows", "cols", "depth", "g_cols", "w_cols", "v_cols", "x_cols",
        "stride_g", "stride_w", "stride_v", "stride_x", "stride_dv", "stride_dx", "stride_value",
    ]
)  # fmt: skip
def linear_dgrad_kernel(
    g, w, v, x, added, dv, dx, value,
    rows, cols, depth, g_cols, w_cols, v_cols, x_cols,
    stride_g, stride_w, stride_v, stride_x, stride_dv, stride_dx, stride_value,
    FORWARD: tl.constexpr, BACKWARD: tl.constexpr, READS_V: tl.constexpr, USES_X: tl.constexpr, ADDS: tl.constexpr,
    STORE_VALUE: tl.constexpr, PRECISION: tl.constexpr,
    G_UNIT: tl.constexpr, W_UNIT: tl.constexpr, V_UNIT: tl.constexpr, X_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """d = g W for one tile, g [rows, depth], W [depth, cols]; then the slot's derivative at (v, x).

    dv [rows, cols] gets the gradient of v, plus `added` (laid out as dv) where ADDS. Where the slot reads x, its
    gradient is added to dx [rows, x_cols] in place: each element by one program. STORE_VALUE writes the slot's value
    again, which the weight gradient needs and the forward pass does not keep. dv and value have zeros in the columns
    of v that pad it.
    """
    col_tiles = tl.cdiv(v_cols * V_UNIT, BLOCK_N)
    first_row = (tl.program_id(0) // col_tiles) * BLOCK_M
    first_col = (tl.program_id(0) % col_tiles) * BLOCK_N
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    long_row = row.to(tl.int64)[:, None]
    g_rows = g + long_row * (stride_g * G_UNIT)
    d = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, depth, BLOCK_K):
        at = start + k
        g_tile = tl.load(g_rows + at[None, :], mask=(row < rows)[:, None] & (at < g_cols * G_UNIT)[None, :], other=0.0)
        w_at = w + at.to(tl.int64)[:, None] * (stride_w * W_UNIT) + col[None, :]
        w_tile = tl.load(w_at, mask=(at < depth)[:, None] & (col < w_cols * W_UNIT)[None, :], other=0.0)
        d = tl.dot(g_tile.to(w_tile.dtype), w_tile, d, input_precision=PRECISION)

    in_v = (row < rows)[:, None] & (col < v_cols * V_UNIT)[None, :]
    inside = (col < x_cols * X_UNIT)[None, :]
    in_x = (row < rows)[:, None] & inside
    if READS_V:
        v_tile = tl.load(v + long_row * (stride_v * V_UNIT) + col[None, :], mask=in_v, other=0.0).to(tl.float32)
    else:
        v_tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if USES_X:
        x_tile = tl.load(x + long_row * (stride_x * X_UNIT) + col[None, :], mask=in_x, other=0.0).to(tl.float32)
    else:
        x_tile = 0.0
    gradient, x_gradient = BACKWARD(v_tile, x_tile, inside, d)
    real = (col < cols)[None, :]
    gradient = tl.where(real, gradient, 0.0)
    dv_at = long_row * (stride_dv * V_UNIT) + col[None, :]
    if ADDS:
        gradient += tl.load(added + dv_at, mask=in_v, other=0.0).to(tl.float32)
    tl.store(dv + dv_at, gradient.to(dv.dtype.element_ty), mask=in_v)
    if USES_X:
        dx_at = dx + long_row * (stride_dx * X_UNIT) + col[None, :]
        mask = in_x & real
        x_gradient += tl.load(dx_at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_at, x_gradient.to(dx.dtype.element_ty), mask=mask)
    if STORE_VALUE:
        again = tl.where(real, FORWARD(v_tile, x_tile, inside), 0.0)
        value_at = value + long_row * (stride_value * V_UNIT) + col[None, :]
        tl.store(value_at, again.to(value.dtype.element_ty), mask=in_v)


@triton.jit(do_not_specialize=["rows", "rows_each", "cols", "depth", "g_cols", "a_cols", "stride_g", "stride_a"])
def linear_wgrad_kernel(
    g, a, weight_partial, bias_partial,
    rows, rows_each, cols, depth, g_cols, a_cols, stride_g, stride_a,
    PRE: tl.constexpr, PRE_IS_IDENTITY: tl.constexpr, PRECISION: tl.constexpr,
    G_UNIT: tl.constexpr, A_UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile of gᵀ pre(a) over one part of the rows: g [rows, cols], a [rows, depth] -> fp32 [parts, cols, depth].

    The programs of the first tile column also sum their g over the rows: the bias gradient, fp32 [parts, cols].
    """
    depth_tiles = tl.cdiv(depth, BLOCK_K)
    first_col = (tl.program_id(0) // depth_tiles) * BLOCK_N
    first_k = (tl.program_id(0) % depth_tiles) * BLOCK_K
    part = tl.program_id(1)
    col = first_col + tl.arange(0, BLOCK_N)
    at = first_k + tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    last = tl.minimum(rows, (part + 1) * rows_each)
    for start in range(part * rows_each, last, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        in_rows = (row < last)[:, None]
        long_row = row.to(tl.int64)[:, None]
        g_at = g + long_row * (stride_g * G_UNIT) + col[None, :]
        a_at = a + long_row * (stride_a * A_UNIT) + at[None, :]
        g_tile = tl.load(g_at, mask=in_rows & (col < g_cols * G_UNIT)[None, :], other=0.0)
        a_tile = tl.load(a_at, mask=in_rows & (at < a_cols * A_UNIT)[None, :], other=0.0)
        if not PRE_IS_IDENTITY:
            a_tile = PRE(a_tile.to(tl.float32), 0.0, True)
        total = tl.dot(g_tile.T, a_tile.to(g_tile.dtype), total, input_precision=PRECISION)
        sums += tl.sum(g_tile.to(tl.float32), axis=0)
    place = (part.to(tl.int64) * cols + col)[:, None] * depth + at[None, :]
    tl.store(weight_partial + place, total, mask=(col < cols)[:, None] & (at < depth)[None, :])
    if first_k == 0:
        tl.store(bias_partial + part * cols + col, sums, mask=col < cols)


@triton.jit(
    do_not_specialize=["first_rows", "second_rows", "first_cols", "second_cols", "stride_first", "stride_second"]
)
def pack_kernel(
    first, second, first_out, second_out,
    first_rows, second_rows, first_cols, second_cols, stride_first, stride_second, first_pitch, second_pitch,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of either weight, in the other tensor's type, with zeros up to its pitch."""
    row = tl.program_id(0)
    if row < first_rows:
        pack_row(first + row.to(tl.int64) * stride_first, first_out + row * first_pitch, first_cols, first_pitch, BLOCK)
    else:
        row -= first_rows
        at = row.to(tl.int64)
        pack_row(second + at * stride_second, second_out + at * second_pitch, second_cols, second_pitch, BLOCK)


@triton.jit
def pack_row(source, target, cols, pitch, BLOCK: tl.constexpr):
    """Copy `cols` elements and write zeros up to `pitch`."""
    for start in range(0, pitch, BLOCK):
        col = start + tl.arange(0, BLOCK)
        value = tl.load(source + col, mask=col < cols, other=0.0)
        tl.store(target + col, value.to(target.dtype.element_ty), mask=col < pitch)


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


def padded_width(cols: int, dtype: torch.dtype) -> int:
    """Columns with padding: rows of a multiple of ROW_BYTES."""
    unit = ROW_BYTES // dtype.itemsize
    return -(-cols // unit) * unit


def padded(rows: int, cols: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised [rows, padded_width(cols)] tensor for use between two kernels."""
    return torch.empty(rows, padded_width(cols, dtype), dtype=dtype, device=device)


def need_packing(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels want a copy of this weight slice: another type, or rows that do not start at 16 bytes."""
    return weight.dtype != dtype or weight.stride(1) != 1 or (weight.stride(0) * dtype.itemsize) % 16 != 0


def pack(weight1: Tensor, weight2: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Copies of both weight slices in `dtype`, each row padded with zeros, by one launch; either may have no rows."""
    weight1, weight2 = (w if w.stride(1) == 1 else w.contiguous() for w in (weight1, weight2))
    outs = [padded(*w.shape, dtype, w.device) for w in (weight1, weight2)]
    launch(
        pack_kernel, (len(weight1) + len(weight2),), weight1, weight2, *outs, len(weight1), len(weight2),
        weight1.shape[1], weight2.shape[1], weight1.stride(0), weight2.stride(0), outs[0].shape[1], outs[1].shape[1],
        BLOCK=1024,
    )  # fmt: skip
    return outs[0], outs[1]


def slot_function(slot):
    """The Triton function of a slot; one for all that do nothing, so that kernels are not compiled twice."""
    return identity if slot is None or slot.is_identity else slot.forward


def linear_forward(
    a: Tensor,
    weight: Tensor,
    bias: Tensor,
    cols: int,
    depth: int,
    dtype: torch.dtype,
    pre: SlotFunction | None = None,
    post: SlotFunction | None = None,
    x: Tensor | None = None,
    pad: bool = True,
    keep_z: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """z = pre(a) Wᵀ + b and y = post(z, x), each [M, cols], padded to `padded_width` where `pad`.

    a [M, >= depth], weight [>= cols, >= depth] (columns beyond `depth`: zero in both or absent), bias [cols], x [M, C]
    where `post` reads it. `pre` None is the identity; `post` None leaves y out, `keep_z` False leaves z out.
    """
    rows, device = len(a), a.device
    x = a if x is None else x
    width = padded_width(cols, dtype) if pad else cols
    z = torch.empty(rows, width, dtype=dtype, device=device) if keep_z or post is None else None
    y = torch.empty(rows, width, dtype=dtype, device=device) if post is not None else None
    a_unit, w_unit = divisor(a.shape[1], a.stride(0)), divisor(weight.shape[1], weight.stride(0))
    x_unit, out_unit = divisor(x.shape[1], x.stride(0)), divisor(width)
    tile = tiles.choose("linear_fwd", device, dtype, cols)
    grid = (ceil_div(rows, tile["BLOCK_M"]) * ceil_div(width, tile["BLOCK_N"]),)
    launch(
        linear_fwd_kernel, grid, a, weight, bias, x, y if z is None else z, z if y is None else y,
        rows, cols, depth, a.shape[1] // a_unit, weight.shape[1] // w_unit, x.shape[1] // x_unit, width // out_unit,
        a.stride(0) // a_unit, weight.stride(0) // w_unit, x.stride(0) // x_unit, width // out_unit, width // out_unit,
        PRE=slot_function(pre), PRE_IS_IDENTITY=pre is None or pre.is_identity, POST=slot_function(post),
        USES_X=post is not None and post.uses_x, STORE_Z=z is not None, STORE_Y=y is not None,
        PRECISION=input_precision(dtype), A_UNIT=a_unit, W_UNIT=w_unit, X_UNIT=x_unit, OUT_UNIT=out_unit, **tile,
    )  # fmt: skip
    return z, y


def linear_input_gradient(
    g: Tensor,
    weight: Tensor,
    v: Tensor,
    cols: int,
    depth: int,
    slot: SlotFunction,
    dtype: torch.dtype,
    x: Tensor | None = None,
    dx: Tensor | None = None,
    added: Tensor | None = None,
    need_value: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Gradient of v where slot(v, x) is multiplied by W [depth, >= cols] and g [M, >= depth] comes back.

    v [M, >= cols]: the result has its width. Where the slot reads x [M, C], that gradient is added to dx [M, C] in
    place. `added`, of the result's layout, is added to the result. need_value: the slot's value too, in `dtype`.
    """
    rows, width, device = len(v), v.shape[1], v.device
    x = v if x is None else x
    dv = torch.empty(rows, width, dtype=out_dtype or dtype, device=device)
    value = torch.empty(rows, width, dtype=dtype, device=device) if need_value else None
    strides_x = (x.stride(0), x.stride(0) if dx is None else dx.stride(0))
    g_unit, w_unit = divisor(g.shape[1], g.stride(0)), divisor(weight.shape[1], weight.stride(0))
    v_unit, x_unit = divisor(width, v.stride(0)), divisor(x.shape[1], *strides_x)
    tile = tiles.choose("linear_dgrad", device, dtype, slot.statements)
    grid = (ceil_div(rows, tile["BLOCK_M"]) * ceil_div(width, tile["BLOCK_N"]),)
    launch(
        linear_dgrad_kernel, grid, g, weight, v, x, dv if added is None else added, dv, dv if dx is None else dx,
        dv if value is None else value, rows, cols, depth, g.shape[1] // g_unit, weight.shape[1] // w_unit,
        width // v_unit, x.shape[1] // x_unit, g.stride(0) // g_unit, weight.stride(0) // w_unit,
        v.stride(0) // v_unit, strides_x[0] // x_unit, width // v_unit, strides_x[1] // x_unit, width // v_unit,
        FORWARD=slot.forward, BACKWARD=slot.backward, READS_V=slot.backward_uses_value or need_value,
        USES_X=slot.uses_x, ADDS=added is not None, STORE_VALUE=need_value, PRECISION=input_precision(dtype),
        G_UNIT=g_unit, W_UNIT=w_unit, V_UNIT=v_unit, X_UNIT=x_unit, **tile,
    )  # fmt: skip
    return dv, value


def linear_weight_gradient(
    g: Tensor, a: Tensor, cols: int, depth: int, dtype: torch.dtype, pre: SlotFunction | None = None
) -> tuple[Tensor, Tensor]:
    """fp32 partial sums over parts of the rows, [parts, cols, depth] of gᵀ pre(a) and [parts, cols] of g.

    `effbert.kernels.reduction.reduce_partials` adds them up: in fixed order, so the same on every run.
    """
    rows, device = len(g), g.device
    g_unit, a_unit = divisor(g.shape[1], g.stride(0)), divisor(a.shape[1], a.stride(0))
    tile = tiles.choose("linear_wgrad", device, dtype, cols)
    tiles_of_output = ceil_div(cols, tile["BLOCK_N"]) * ceil_div(depth, tile["BLOCK_K"])
    steps = max(1, ceil_div(rows, tile["BLOCK_M"]))
    parts = min(steps, max(1, 2 * multiprocessors(device) // tiles_of_output))
    rows_each = ceil_div(steps, parts) * tile["BLOCK_M"]
    weight_partial = torch.empty(parts, cols, depth, dtype=torch.float32, device=device)
    bias_partial = torch.empty(parts, cols, dtype=torch.float32, device=device)
    launch(
        linear_wgrad_kernel, (tiles_of_output, parts), g, a, weight_partial, bias_partial,
        rows, rows_each, cols, depth, g.shape[1] // g_unit, a.shape[1] // a_unit,
        g.stride(0) // g_unit, a.stride(0) // a_unit,
        PRE=slot_function(pre), PRE_IS_IDENTITY=pre is None or pre.is_identity, PRECISION=input_precision(dtype),
        G_UNIT=g_unit, A_UNIT=a_unit, **tile,
    )  # fmt: skip
    return weight_partial, bias_partial
