"""A linear layer's forward GEMM in Triton with the elementwise work round it inside, and what its gradients share.

    z = pre(a) Wᵀ + b, and post(z, x) beside it          a [M, K], W [N, K], b [N], x [M, C]

`pre` and `post` are small functions generated from an expression (effbert.kernels.codegen) and passed as constants. So
a kernel is compiled once for a slot function, element type and alignment, whatever its sizes. The gradients are in
effbert.kernels.linear_gradient.

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
from effbert.kernels.launch import ceil_div, divisor, input_precision, launch
from effbert.kernels.primitives import identity

ROW_BYTES = 64  # rows of a tensor between two kernels are padded to a multiple of this


@triton.jit
def row_products(
    a, w, first_row, first_col, rows, cols, a_cols, w_cols, depth, stride_a, stride_w,
    PRE: tl.constexpr, PRE_IS_IDENTITY: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """pre(a) Wᵀ for one tile: a [rows, a_cols], W [cols, w_cols] -> [BLOCK_M, BLOCK_N] in fp32.

    Without what is assumed the loop might not be entered, and then NVIDIA's assembler has the products of some slots
    wait for each other on sm_90 (`aot.serialises`).
    """
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_rows = a + row.to(tl.int64)[:, None] * stride_a
    w_rows = w + col.to(tl.int64)[:, None] * stride_w
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if w.dtype.element_ty != tl.float32 or PRECISION != "ieee":
        tl.assume(depth > 0)
    for start in range(0, depth, BLOCK_K):
        at = start + k
        a_tile = tl.load(a_rows + at[None, :], mask=(row < rows)[:, None] & (at < a_cols)[None, :], other=0.0)
        w_tile = tl.load(w_rows + at[None, :], mask=(col < cols)[:, None] & (at < w_cols)[None, :], other=0.0)
        if not PRE_IS_IDENTITY:
            a_tile = PRE(a_tile.to(tl.float32), 0.0, True)
        total = tl.dot(a_tile.to(w_tile.dtype), w_tile.T, total, input_precision=PRECISION)
    return total


@triton.jit
def linear_tile(
    a, w, bias, x, z, y, first_row, first_col, rows, cols, depth, a_cols, w_cols, x_cols, stored_cols,
    stride_a, stride_w, stride_x, stride_z, stride_y,
    PRE: tl.constexpr, PRE_IS_IDENTITY: tl.constexpr, POST: tl.constexpr, USES_X: tl.constexpr,
    STORE_Z: tl.constexpr, STORE_Y: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """z [rows, cols] = pre(a) Wᵀ + bias and y = post(z, x), for one tile; either may be left out.

    z is rounded to its type before `post` reads it, so that the backward pass, which reads z back, differentiates what
    was computed. Columns from `cols` to `stored_cols` are stored as zeros.
    """
    total = row_products(
        a, w, first_row, first_col, rows, cols, a_cols, w_cols, depth, stride_a, stride_w,
        PRE, PRE_IS_IDENTITY, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    row = first_row + tl.arange(0, BLOCK_M)
    col = first_col + tl.arange(0, BLOCK_N)
    total += tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)[None, :]
    stored = (row < rows)[:, None] & (col < stored_cols)[None, :]
    total = tl.where((col < cols)[None, :], total, 0.0).to(z.dtype.element_ty)
    long_row = row.to(tl.int64)[:, None]
    if STORE_Z:
        tl.store(z + long_row * stride_z + col[None, :], total, mask=stored)
    if STORE_Y:
        inside = (col < x_cols)[None, :]
        if USES_X:
            x_at = x + long_row * stride_x + col[None, :]
            x_tile = tl.load(x_at, mask=(row < rows)[:, None] & inside, other=0.0).to(tl.float32)
        else:
            x_tile = 0.0
        value = POST(total.to(tl.float32), x_tile, inside)
        value = tl.where((col < cols)[None, :], value, 0.0)
        tl.store(y + long_row * stride_y + col[None, :], value.to(y.dtype.element_ty), mask=stored)


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
    """`linear_tile` for every tile."""
    col_tiles = tl.cdiv(stored_cols * OUT_UNIT, BLOCK_N)
    first_row = (tl.program_id(0) // col_tiles) * BLOCK_M
    first_col = (tl.program_id(0) % col_tiles) * BLOCK_N
    linear_tile(
        a, w, bias, x, z, y, first_row, first_col, rows, cols, depth,
        a_cols * A_UNIT, w_cols * W_UNIT, x_cols * X_UNIT, stored_cols * OUT_UNIT,
        stride_a * A_UNIT, stride_w * W_UNIT, stride_x * X_UNIT, stride_z * OUT_UNIT, stride_y * OUT_UNIT,
        PRE, PRE_IS_IDENTITY, POST, USES_X, STORE_Z, STORE_Y, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip


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
    statements = max((slot.statements for slot in (pre, post) if slot is not None), default=0)
    tile = tiles.choose("linear_fwd", device, dtype, statements)
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
