"""Attention, alone or with the distillation loss on its raw scores, forward and backward, in one pass over the scores.

    attention          context = dropout(softmax(S)) V,  S = Q Kᵀ / √D        Q, K, V [B, H, L, D]
    distill_attention  the same, and the mean squared difference of S and T    T = Q' K'ᵀ / √D',  Q', K' [B, H, L, D']

A tile of S is made once, on chip, and serves both: the online softmax takes it, and so does the difference from the
teacher's tile. Nothing of size L × L is ever in memory. Plain attention is the same kernels with HAS_TEACHER off.

Kept for backward: the context, the log-sum-exp of each row [B, H, L] (fp32, to base 2; +inf for a row without any key)
and 2 / count, where the loss is a mean over `count` entries. Backward forms each tile of S and the dropout mask again:

    dS = P (mask dP - delta) + 2 dloss / count (S - T),    dP = dO Vᵀ,    delta = rowsum(dO O) = rowsum(P mask dP)
    dQ = dS K / √D,    dK = dSᵀ Q / √D,    dV = (mask P)ᵀ dO          mask: 0 or 1 / (1 - p)

P is formed from the log-sum-exp, so its relative error is that of the largest score, 6e-8 of it absolutely. In fp32,
with scores in the hundreds, gradients are off by up to ten times that, relative to the largest; keeping P itself would
cost less. Once one key has all the weight, gradients are nearly zero and mostly rounding noise. In half precision
rounding the inputs costs more.

T is formed again too. Keeping S - T would write and read L × L numbers; finishing the loss's gradients in the forward
pass would need two more products there, a second role for dK, and dQ and dK written once more and read back. One more
product in the backward pass reads only Q' and K': at D' = 64 in bf16 a quarter of the bytes of an fp32 S - T that is
written and read where L = 128, a sixteenth where L = 512.

Each gradient has one owner, so there are no atomics. Programs of the key role own a block of dK and dV and walk over
the queries; those of the query role own a block of dQ and walk over the keys; both are in one grid. A sequence that
fits into one block of keys needs no query role: a key program then has whole rows of dS, so it stores dQ as it goes,
and delta too is a sum over its own tile.

Heads of 45 begin at odd addresses, where only loads of single elements are allowed. But rows of 12 such heads are 540
elements, a multiple of 4: so a tile begins at the last multiple of 4 before its head, is loaded 4 elements at a time,
and the neighbours' columns are set to zero. Q, K, V and dO of a head are all shifted alike, hence products are the same
and results come out shifted too, until the store undoes it.

A sequence without any real token gets zeros, as scaled_dot_product_attention gives, and sends no gradient back.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbert.kernels import philox, tiles
from effbert.kernels.launch import ceil_div, compute_dtype, divisor, input_precision, launch
from effbert.kernels.library import FusedOp
from effbert.kernels.loss_mean import loss_mean
from effbert.kernels.philox import Dropout
from effbert.kernels.primitives import dropout_key, keep_mask
from effbert.kernels.score_loss import score_difference

LOG2E = tl.constexpr(math.log2(math.e))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: Dropout | None = None,
) -> Tensor:
    """dropout(softmax(QKᵀ/√D)) V for query, key, value [B, H, L, D], D <= 128 -> the same; masked keys weigh nothing.

    As effbert.kernels.eager.attention, for fp32, fp16 and bf16, with any strides of the first three dimensions. The
    result is laid out as [B, L, H, D], so `.transpose(1, 2).flatten(2)` is a view of it; so are the gradients.
    """
    query, key, value = _in_one_dtype(query, key, value)
    return _attention(query, key, value, attention_mask, *philox.split(dropout))


def distill_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    attention_mask: Tensor | None,
    dropout: Dropout | None = None,
    mask: str = "real",
) -> tuple[Tensor, Tensor]:
    """`attention(query, key, value, ...)` and `score_mse(query, key, teacher_query, teacher_key, ...)` in one pass.

    teacher_query and teacher_key are [B, H, L, D'], D' <= 128, of a dtype of their own, and get no gradient. The loss
    is a 0-d fp32 tensor; an attention_mask of None means that all tokens are real.
    """
    query, key, value = _in_one_dtype(query, key, value)
    wider = torch.promote_types(teacher_query.dtype, teacher_key.dtype)
    teacher_query, teacher_key = teacher_query.to(wider), teacher_key.to(wider)
    return _distill_attention(
        query, key, value, teacher_query, teacher_key, attention_mask, *philox.split(dropout), mask == "released"
    )


def _in_one_dtype(*tensors: Tensor) -> list[Tensor]:
    """All in the dtype to compute in: autocast's where that is on."""
    dtype = compute_dtype(tensors[0])
    return [tensor if tensor.dtype == dtype else tensor.to(dtype) for tensor in tensors]


@triton.jit
def _head(
    tensor, batch, head, batch_stride, head_stride, WIDTH: tl.constexpr, UNIT: tl.constexpr, SHIFTED: tl.constexpr
):
    """Where one head begins; SHIFTED: rounded down to a unit. Strides are in units, `head_stride` then unused."""
    if SHIFTED:
        return tensor + batch * batch_stride * UNIT + head * WIDTH // UNIT * UNIT
    else:
        return tensor + batch * batch_stride * UNIT + head.to(tl.int64) * head_stride * UNIT


@triton.jit
def _rows_at(start, first, STRIDE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers [ROWS, BLOCK] to rows from `first` on; a constant stride makes most of an address an immediate."""
    row = tl.arange(0, ROWS)
    if STRIDE >= 2**24:
        row = row.to(tl.int64)
    return start + tl.cast(first, tl.int64) * STRIDE + (row[:, None] * STRIDE + tl.arange(0, BLOCK)[None, :])


@triton.jit
def _load_rows(
    start, first, length, shift, STRIDE: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, SHIFTED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows [ROWS, BLOCK] of one head [length, WIDTH], which is columns shift to shift + WIDTH; zeros outside."""
    column = tl.arange(0, BLOCK)
    end = (shift + WIDTH + UNIT - 1) // UNIT * UNIT
    inside = (tl.arange(0, ROWS) < length - first)[:, None] & (column < end)[None, :]
    tile = tl.load(_rows_at(start, first, STRIDE, ROWS, BLOCK), mask=inside, other=0.0)
    if SHIFTED:
        tile = tl.where(((column >= shift) & (column < shift + WIDTH))[None, :], tile, 0.0)
    return tile


@triton.jit
def _store_rows(
    tensor, batch, head, first, length, shift, tile,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Store [ROWS, BLOCK] rows of one head, which begins in column `shift`, into `tensor` [B, L, HEADS, WIDTH]."""
    column = tl.arange(0, BLOCK)
    start = tensor + (batch * length * HEADS + head) * WIDTH - shift
    inside = (column >= shift) & (column < shift + WIDTH)
    inside = (tl.arange(0, ROWS) < length - first)[:, None] & inside[None, :]
    tl.store(_rows_at(start, first, HEADS * WIDTH, ROWS, BLOCK), tile.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _mask_word(mask, first, length):
    """Which of 64 tokens from `first` on are real, as the bits of one int64."""
    index = tl.arange(0, 64)
    real = tl.load(mask + first + index, mask=index < length - first, other=0) != 0
    return tl.sum(real.to(tl.int64) << index)


@triton.jit
def _real_tokens(mask, first, length, HAS_MASK: tl.constexpr, COUNT: tl.constexpr):
    """Which of COUNT <= 128 tokens from `first` on are inside the sequence and, with a mask, kept by it (bool).

    The mask goes through words that all threads share: loaded as it is, in the layout of a tile's columns, it would
    take 32 registers of each thread.
    """
    index = tl.arange(0, COUNT)
    real = index < length - first
    if HAS_MASK:
        word = _mask_word(mask, first, length)
        if COUNT > 64:
            word = tl.where(index < 64, word, _mask_word(mask, first + 64, length))
        real = ((word >> (index % 64)) & 1) != 0
    return real


@triton.jit
def _keys_end(mask, length, HAS_MASK: tl.constexpr, ALL_KEYS: tl.constexpr):
    """One past the last key that anything attends to: keys beyond are padding, and whole tiles of them are left out."""
    end = length
    if HAS_MASK and not ALL_KEYS:
        end = 0
        for first in range(0, length, 128):
            tokens = first + tl.arange(0, 128)
            real = tl.load(mask + tokens, mask=tokens < length, other=0) != 0
            end = tl.maximum(end, tl.max(tl.where(real, tokens + 1, 0)))
    return end


@triton.jit(
    do_not_specialize=[
        "length", "threshold", "key_of_step", "site",
        "q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head",
        "tq_batch", "tq_head", "tk_batch", "tk_head", "mask_batch",
    ]
)  # fmt: skip
def attention_fwd_kernel(
    q, k, v, tq, tk, mask, context, lse, partials, length, threshold, key_of_step, site,
    q_batch, q_head, k_batch, k_head, v_batch, v_head,
    tq_batch, tq_head, tk_batch, tk_head, mask_batch,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, TQ_ROW: tl.constexpr, TK_ROW: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, UNIT: tl.constexpr, SHIFTED: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr, TEACHER_SCALE: tl.constexpr, TEACHER_UNIT: tl.constexpr, TEACHER_SHIFTED: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TEACHER: tl.constexpr, RELEASED: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    KEY_IS_TENSOR: tl.constexpr, KEEP: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """context (and lse) for BLOCK_M queries of one head, with their part of the loss and of its count.

    q, k, v [B, H, L, WIDTH], tq, tk [B, H, L, TEACHER_WIDTH], mask [B, L]; strides in units. context [B, L, H, WIDTH],
    lse [B, H, L], partials [2, programs]: sums of squares, then how many entries they are of (unless RELEASED: all).
    """
    blocks = tl.cdiv(length, BLOCK_M)
    head = tl.program_id(0) // blocks
    first_query = (tl.program_id(0) % blocks) * BLOCK_M
    b, h = (head // HEADS).to(tl.int64), head % HEADS
    shift = h * WIDTH % UNIT if SHIFTED else 0
    if HAS_MASK:
        mask += b * mask_batch
    k = _head(k, b, h, k_batch, k_head, WIDTH, UNIT, SHIFTED)
    v = _head(v, b, h, v_batch, v_head, WIDTH, UNIT, SHIFTED)
    queries = first_query + tl.arange(0, BLOCK_M)
    head_rows = head.to(tl.int64) * length
    q = _head(q, b, h, q_batch, q_head, WIDTH, UNIT, SHIFTED)
    q_tile = _load_rows(  # [BM, BD]
        q, first_query, length,
        shift, Q_ROW, WIDTH, UNIT, SHIFTED, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    if HAS_TEACHER:
        teacher_shift = h * TEACHER_WIDTH % TEACHER_UNIT if TEACHER_SHIFTED else 0
        tq = _head(tq, b, h, tq_batch, tq_head, TEACHER_WIDTH, TEACHER_UNIT, TEACHER_SHIFTED)
        tk = _head(tk, b, h, tk_batch, tk_head, TEACHER_WIDTH, TEACHER_UNIT, TEACHER_SHIFTED)
        tq_tile = _load_rows(  # [BM, BT]
            tq, first_query, length,
            teacher_shift, TQ_ROW, TEACHER_WIDTH, TEACHER_UNIT, TEACHER_SHIFTED, BLOCK_M, BLOCK_T,
        )  # fmt: skip
        real_query = _real_tokens(mask, first_query, length, HAS_MASK, BLOCK_M)
        squares = tl.zeros([BLOCK_M], tl.float32)
        real_keys = 0
    if HAS_DROPOUT:
        step = dropout_key(key_of_step, KEY_IS_TENSOR)

    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for first_key in range(0, _keys_end(mask, length, HAS_MASK, HAS_TEACHER and RELEASED), BLOCK_N):
        real_key = _real_tokens(mask, first_key, length, HAS_MASK, BLOCK_N)
        k_tile = _load_rows(  # [BN, BD]
            k, first_key, length,
            shift, K_ROW, WIDTH, UNIT, SHIFTED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * SCALE  # [BM, BN]
        if HAS_TEACHER:
            tk_tile = _load_rows(  # [BN, BT]
                tk, first_key, length,
                teacher_shift, TK_ROW, TEACHER_WIDTH, TEACHER_UNIT, TEACHER_SHIFTED, BLOCK_N, BLOCK_T,
            )  # fmt: skip
            target = tl.dot(tq_tile, tl.trans(tk_tile), input_precision=TEACHER_PRECISION) * TEACHER_SCALE
            difference, _ = score_difference(scores, target, real_query[:, None], real_key[None, :], RELEASED)
            squares += tl.sum(difference * difference, axis=1)
            real_keys += tl.sum(real_key.to(tl.int32))
        scores = tl.where(real_key[None, :], scores * LOG2E, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        finite = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(scores - finite[:, None])
        decay = tl.exp2(highest - finite)
        total = total * decay + tl.sum(p, axis=1)
        if HAS_DROPOUT:
            p = tl.where(keep_mask(step, site, head_rows + queries, first_key, threshold, BLOCK_N), p, 0.0)
        v_tile = _load_rows(  # [BN, BD]
            v, first_key, length,
            shift, V_ROW, WIDTH, UNIT, SHIFTED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        result = tl.dot(p.to(v_tile.dtype), v_tile, result * decay[:, None], input_precision=PRECISION)
        highest = higher

    keep_scale = 65536.0 / (65536 - threshold)
    result *= tl.where(total == 0, 0.0, keep_scale / total)[:, None]
    _store_rows(context, b, h, first_query, length, shift, result, HEADS, WIDTH, BLOCK_M, BLOCK_D)
    if KEEP:
        row_lse = tl.where(total == 0, float("inf"), highest + tl.log2(total))
        tl.store(lse + head_rows + queries, row_lse, mask=queries < length)
    if HAS_TEACHER:
        tl.store(partials + tl.program_id(0), tl.sum(squares))
        if not RELEASED:
            count = tl.sum(real_query.to(tl.int32)).to(tl.float32) * real_keys
            tl.store(partials + tl.num_programs(0) + tl.program_id(0), count)


@triton.jit(do_not_specialize=["length", "g_batch", "g_head", "c_batch", "c_head"])
def attention_delta_kernel(
    grad, context, delta, length, g_batch, g_head, c_batch, c_head, G_ROW: tl.constexpr, C_ROW: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, UNIT: tl.constexpr, SHIFTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta [B, H, L] = rowsum(grad * context), both [B, H, L, WIDTH], for BLOCK_M queries of one head."""
    blocks = tl.cdiv(length, BLOCK_M)
    head = tl.program_id(0) // blocks
    b, h = (head // HEADS).to(tl.int64), head % HEADS
    shift = h * WIDTH % UNIT if SHIFTED else 0
    first_query = (tl.program_id(0) % blocks) * BLOCK_M
    queries = first_query + tl.arange(0, BLOCK_M)
    grad = _head(grad, b, h, g_batch, g_head, WIDTH, UNIT, SHIFTED)
    g_tile = _load_rows(
        grad, first_query, length,
        shift, G_ROW, WIDTH, UNIT, SHIFTED, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    context = _head(context, b, h, c_batch, c_head, WIDTH, UNIT, SHIFTED)
    c_tile = _load_rows(
        context, first_query, length,
        shift, C_ROW, WIDTH, UNIT, SHIFTED, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    rows = tl.sum(g_tile.to(tl.float32) * c_tile.to(tl.float32), axis=1)
    tl.store(delta + head.to(tl.int64) * length + queries, rows, mask=queries < length)


@triton.jit
def _gradient_tile(
    q_tile, k_tile, v_tile, g_tile, tq_tile, tk_tile, lse, delta, real_query, real_key,
    loss_scale, step, site, rows, first_key, threshold,
    SCALE: tl.constexpr, TEACHER_SCALE: tl.constexpr, HAS_TEACHER: tl.constexpr, RELEASED: tl.constexpr,
    HAS_DROPOUT: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Probabilities after dropout, still unscaled, and gradient of the scores for one tile: [BN, BM], transposed."""
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION) * SCALE  # [BN, BM]
    if HAS_TEACHER:
        target = tl.dot(tk_tile, tl.trans(tq_tile), input_precision=TEACHER_PRECISION) * TEACHER_SCALE
        difference, passes = score_difference(scores, target, real_query[None, :], real_key[:, None], RELEASED)
        difference = tl.where(passes, loss_scale * difference, 0.0)
    p = tl.exp2(tl.where(real_key[:, None], scores * LOG2E, float("-inf")) - lse[None, :])
    dropped = p
    dp = tl.dot(v_tile, tl.trans(g_tile), input_precision=PRECISION)  # [BN, BM]
    if HAS_DROPOUT:
        keep = tl.trans(keep_mask(step, site, rows, first_key, threshold, BLOCK_N))
        dropped = tl.where(keep, p, 0.0)
        dp = tl.where(keep, dp * (65536.0 / (65536 - threshold)), 0.0)
    if WHOLE:
        delta = tl.sum(p * dp, axis=0)
    ds = p * (dp - delta[None, :])
    if HAS_TEACHER:
        ds += difference
    return dropped, ds


@triton.jit
def _rounded(ds, dtype: tl.constexpr):
    """ds in `dtype` as an operand of tl.dot, and what to multiply the product with.

    The loss's share of ds is its difference times 2 / count, 1e-7 for a batch: fp16 has no such numbers, so its tiles
    are brought to 1 first. bf16 and fp32 have the range.
    """
    if dtype == tl.float16:
        largest = tl.max(tl.abs(ds))
        factor = tl.where(largest == 0, 1.0, largest)
        return (ds / factor).to(dtype), factor
    else:
        return ds.to(dtype), 1.0


@triton.jit
def _add_product(a, factor, b, total, PRECISION: tl.constexpr):
    """total + factor · a b; the factor is 1 but for fp16."""
    if a.dtype == tl.float16:
        return total + tl.dot(a, b, input_precision=PRECISION) * factor
    else:
        return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit(
    do_not_specialize=[
        "length", "threshold", "key_of_step", "site",
        "q_batch", "q_head", "k_batch", "k_head", "v_batch", "v_head",
        "g_batch", "g_head", "tq_batch", "tq_head", "tk_batch", "tk_head", "mask_batch",
    ]
)  # fmt: skip
def attention_bwd_kernel(
    q, k, v, g, tq, tk, mask, lse, delta, grad_loss, slope, dq, dk, dv, length, threshold, key_of_step, site,
    q_batch, q_head, k_batch, k_head, v_batch, v_head,
    g_batch, g_head, tq_batch, tq_head, tk_batch, tk_head, mask_batch,
    Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr, G_ROW: tl.constexpr,
    TQ_ROW: tl.constexpr, TK_ROW: tl.constexpr,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, SCALE: tl.constexpr, UNIT: tl.constexpr, SHIFTED: tl.constexpr,
    TEACHER_WIDTH: tl.constexpr, TEACHER_SCALE: tl.constexpr, TEACHER_UNIT: tl.constexpr, TEACHER_SHIFTED: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_TEACHER: tl.constexpr, RELEASED: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    KEY_IS_TENSOR: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """dk and dv for BLOCK_N keys of one head, or dq for BLOCK_M of its queries; WHOLE (BLOCK_N >= length): all three.

    g [B, H, L, WIDTH]: gradient of the context; delta [B, H, L]: read unless WHOLE; grad_loss, slope (2 / count): 0-d;
    dq, dk, dv [B, L, H, WIDTH]; the rest as in attention_fwd_kernel.
    """
    key_blocks = tl.cdiv(length, BLOCK_N)
    roles = key_blocks if WHOLE else key_blocks + tl.cdiv(length, BLOCK_M)
    head = tl.program_id(0) // roles
    role = tl.program_id(0) % roles
    b, h = (head // HEADS).to(tl.int64), head % HEADS
    shift = h * WIDTH % UNIT if SHIFTED else 0
    if HAS_MASK:
        mask += b * mask_batch
    q = _head(q, b, h, q_batch, q_head, WIDTH, UNIT, SHIFTED)
    k = _head(k, b, h, k_batch, k_head, WIDTH, UNIT, SHIFTED)
    v = _head(v, b, h, v_batch, v_head, WIDTH, UNIT, SHIFTED)
    g = _head(g, b, h, g_batch, g_head, WIDTH, UNIT, SHIFTED)
    head_rows = head.to(tl.int64) * length
    step, loss_scale = 0, 0.0
    if HAS_TEACHER:
        teacher_shift = h * TEACHER_WIDTH % TEACHER_UNIT if TEACHER_SHIFTED else 0
        tq = _head(tq, b, h, tq_batch, tq_head, TEACHER_WIDTH, TEACHER_UNIT, TEACHER_SHIFTED)
        tk = _head(tk, b, h, tk_batch, tk_head, TEACHER_WIDTH, TEACHER_UNIT, TEACHER_SHIFTED)
        loss_scale = tl.load(grad_loss) * tl.load(slope)
    if HAS_DROPOUT:
        step = dropout_key(key_of_step, KEY_IS_TENSOR)

    if role < key_blocks:
        first_key = role * BLOCK_N
        real_key = _real_tokens(mask, first_key, length, HAS_MASK, BLOCK_N)
        k_tile = _load_rows(  # [BN, BD]
            k, first_key, length,
            shift, K_ROW, WIDTH, UNIT, SHIFTED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        v_tile = _load_rows(  # [BN, BD]
            v, first_key, length,
            shift, V_ROW, WIDTH, UNIT, SHIFTED, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        tk_tile = k_tile
        if HAS_TEACHER:
            tk_tile = _load_rows(  # [BN, BT]
                tk, first_key, length,
                teacher_shift, TK_ROW, TEACHER_WIDTH, TEACHER_UNIT, TEACHER_SHIFTED, BLOCK_N, BLOCK_T,
            )  # fmt: skip
        dk_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv_tile = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        # Without it products wait for each other on sm_90 (effbert.kernels.aot.serialises); with it wide heads spill.
        if BLOCK_D <= 64:
            tl.assume(length > 0)
        for first_query in range(0, length, BLOCK_M):
            queries = first_query + tl.arange(0, BLOCK_M)
            q_tile = _load_rows(  # [BM, BD]
                q, first_query, length,
                shift, Q_ROW, WIDTH, UNIT, SHIFTED, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            g_tile = _load_rows(  # [BM, BD]
                g, first_query, length,
                shift, G_ROW, WIDTH, UNIT, SHIFTED, BLOCK_M, BLOCK_D,
            )  # fmt: skip
            row_lse = tl.load(lse + head_rows + queries, mask=queries < length, other=float("inf"))
            row_delta = row_lse
            if not WHOLE:
                row_delta = tl.load(delta + head_rows + queries, mask=queries < length, other=0.0)
            tq_tile, real_query = q_tile, queries < length
            if HAS_TEACHER:
                tq_tile = _load_rows(  # [BM, BT]
                    tq, first_query, length,
                    teacher_shift, TQ_ROW, TEACHER_WIDTH, TEACHER_UNIT, TEACHER_SHIFTED, BLOCK_M, BLOCK_T,
                )  # fmt: skip
                real_query = _real_tokens(mask, first_query, length, HAS_MASK, BLOCK_M)
            dropped, ds = _gradient_tile(
                q_tile, k_tile, v_tile, g_tile, tq_tile, tk_tile, row_lse, row_delta, real_query, real_key,
                loss_scale, step, site, head_rows + queries, first_key, threshold, SCALE, TEACHER_SCALE,
                HAS_TEACHER, RELEASED, HAS_DROPOUT, WHOLE, PRECISION, TEACHER_PRECISION, BLOCK_N,
            )  # fmt: skip
            dv_tile = tl.dot(dropped.to(g_tile.dtype), g_tile, dv_tile, input_precision=PRECISION)
            ds, factor = _rounded(ds, q_tile.dtype)
            dk_tile = _add_product(ds, factor, q_tile, dk_tile, PRECISION)
            if WHOLE:
                dq_tile = tl.dot(tl.trans(ds), k_tile, input_precision=PRECISION) * (factor * SCALE)  # [BM, BD]
                _store_rows(dq, b, h, first_query, length, shift, dq_tile, HEADS, WIDTH, BLOCK_M, BLOCK_D)
        keep_scale = 65536.0 / (65536 - threshold)
        _store_rows(dk, b, h, first_key, length, shift, dk_tile * SCALE, HEADS, WIDTH, BLOCK_N, BLOCK_D)
        _store_rows(dv, b, h, first_key, length, shift, dv_tile * keep_scale, HEADS, WIDTH, BLOCK_N, BLOCK_D)
    elif not WHOLE:
        first_query = (role - key_blocks) * BLOCK_M
        queries = first_query + tl.arange(0, BLOCK_M)
        q_tile = _load_rows(  # [BM, BD]
            q, first_query, length,
            shift, Q_ROW, WIDTH, UNIT, SHIFTED, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        g_tile = _load_rows(  # [BM, BD]
            g, first_query, length,
            shift, G_ROW, WIDTH, UNIT, SHIFTED, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        row_lse = tl.load(lse + head_rows + queries, mask=queries < length, other=float("inf"))
        row_delta = tl.load(delta + head_rows + queries, mask=queries < length, other=0.0)
        tq_tile, real_query = q_tile, queries < length
        if HAS_TEACHER:
            tq_tile = _load_rows(  # [BM, BT]
                tq, first_query, length,
                teacher_shift, TQ_ROW, TEACHER_WIDTH, TEACHER_UNIT, TEACHER_SHIFTED, BLOCK_M, BLOCK_T,
            )  # fmt: skip
            real_query = _real_tokens(mask, first_query, length, HAS_MASK, BLOCK_M)
        dq_tile = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first_key in range(0, _keys_end(mask, length, HAS_MASK, HAS_TEACHER and RELEASED), BLOCK_N):
            real_key = _real_tokens(mask, first_key, length, HAS_MASK, BLOCK_N)
            k_tile = _load_rows(  # [BN, BD]
                k, first_key, length,
                shift, K_ROW, WIDTH, UNIT, SHIFTED, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            v_tile = _load_rows(  # [BN, BD]
                v, first_key, length,
                shift, V_ROW, WIDTH, UNIT, SHIFTED, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            tk_tile = k_tile
            if HAS_TEACHER:
                tk_tile = _load_rows(  # [BN, BT]
                    tk, first_key, length,
                    teacher_shift, TK_ROW, TEACHER_WIDTH, TEACHER_UNIT, TEACHER_SHIFTED, BLOCK_N, BLOCK_T,
                )  # fmt: skip
            _, ds = _gradient_tile(
                q_tile, k_tile, v_tile, g_tile, tq_tile, tk_tile, row_lse, row_delta, real_query, real_key,
                loss_scale, step, site, head_rows + queries, first_key, threshold, SCALE, TEACHER_SCALE,
                HAS_TEACHER, RELEASED, HAS_DROPOUT, WHOLE, PRECISION, TEACHER_PRECISION, BLOCK_N,
            )  # fmt: skip
            ds, factor = _rounded(ds, k_tile.dtype)
            dq_tile = _add_product(tl.trans(ds), factor, k_tile, dq_tile, PRECISION)
        _store_rows(dq, b, h, first_query, length, shift, dq_tile * SCALE, HEADS, WIDTH, BLOCK_M, BLOCK_D)


def _launch_forward(query, key, value, teacher, attention_mask, dropout, released: bool, keep: bool):
    """Launch the forward kernel: context, lse (empty unless `keep`) and, with a teacher, partials of the loss."""
    batch, heads, length, _ = query.shape
    context, lse = _like_context(query), _float(batch, heads, length if keep else 0, device=query.device)
    operands = _Operands([query, key, value], teacher, attention_mask, dropout, released)
    tile = tiles.choose(operands.name("attention_fwd"), query.device, query.dtype, length)
    programs = batch * heads * ceil_div(length, tile["BLOCK_M"])
    partials = _float(2, programs, device=query.device) if teacher else None
    launch(
        attention_fwd_kernel, (programs,),
        *operands.tensors, context, lse, partials, length, *operands.scalars,
        KEEP=keep, **operands.constants, **tile,
    )  # fmt: skip
    return context, lse, partials


def _launch_backward(
    grad, context, lse, query, key, value, teacher, attention_mask, dropout, released, loss=(None, None)
):
    """Launch the backward kernels: gradients of query, key and value. loss: its gradient, and 2 / its count, 0-d."""
    batch, heads, length, _ = query.shape
    gradients = [_like_context(query) for _ in range(3)]
    operands = _Operands([query, key, value, grad], teacher, attention_mask, dropout, released)
    tile = tiles.choose(operands.name("attention_bwd"), query.device, query.dtype, length)
    whole = length <= tile["BLOCK_N"]
    blocks = ceil_div(length, tile["BLOCK_N"]) + (0 if whole else ceil_div(length, tile["BLOCK_M"]))
    delta = None if whole else _delta(operands.tensors[3], _dense(context))
    launch(
        attention_bwd_kernel, (batch * heads * blocks,),
        *operands.tensors, lse, delta, *loss, *gradients, length, *operands.scalars,
        WHOLE=whole, **operands.constants, **tile,
    )  # fmt: skip
    return gradients


def _delta(grad: Tensor, context: Tensor) -> Tensor:
    """rowsum(grad * context) in fp32, [B, H, L]."""
    batch, heads, length, width = context.shape
    delta = _float(batch, heads, length, device=context.device)
    strides, unit, shifted = _strides([grad, context])
    tile = tiles.choose("attention_delta", context.device, context.dtype, width)
    programs = batch * heads * ceil_div(length, tile["BLOCK_M"])
    launch(
        attention_delta_kernel, (programs,), grad, context, delta, length, *strides,
        HEADS=heads, G_ROW=grad.stride(2), C_ROW=context.stride(2), WIDTH=width, UNIT=unit,
        SHIFTED=shifted, BLOCK_D=_block(width), **tile,
    )  # fmt: skip
    return delta


class _Operands:
    """What both kernels take: tensors with contiguous columns, their strides in units, and constants."""

    def __init__(self, student: list[Tensor], teacher: list[Tensor], attention_mask, dropout, released: bool):
        p, key, key_tensor, site = dropout
        width, teacher_width = student[0].shape[-1], teacher[0].shape[-1] if teacher else 1
        student, teacher = [[_dense(tensor) for tensor in tensors] for tensors in (student, teacher)]
        mask = None if attention_mask is None else _dense(attention_mask)
        strides, unit, shifted = _strides(student)
        teacher_strides, teacher_unit, teacher_shifted = _strides(teacher) if teacher else ([0] * 4, 1, False)
        threshold = philox.threshold(p)
        self.tensors = [*student, *(teacher or (None, None)), mask]
        self.scalars = [threshold, key if key_tensor is None else key_tensor, site, *strides, *teacher_strides]
        self.scalars.append(0 if mask is None else mask.stride(0))
        self.wide = max(width, teacher_width) > 64
        self.constants = {
            "HEADS": student[0].shape[1],
            "SCALE": width**-0.5,
            "TEACHER_SCALE": teacher_width**-0.5,
            "WIDTH": width,
            "TEACHER_WIDTH": teacher_width,
            "UNIT": unit,
            "TEACHER_UNIT": teacher_unit,
            "SHIFTED": shifted,
            "TEACHER_SHIFTED": teacher_shifted,
            "HAS_MASK": mask is not None,
            "HAS_TEACHER": bool(teacher),
            "RELEASED": released,
            "HAS_DROPOUT": threshold > 0,
            "KEY_IS_TENSOR": key_tensor is not None,
            "PRECISION": input_precision(student[0].dtype),
            "TEACHER_PRECISION": input_precision(teacher[0].dtype) if teacher else "ieee",
            "BLOCK_D": _block(width),
            "BLOCK_T": _block(teacher_width),
            "TQ_ROW": 0,
            "TK_ROW": 0,
        }
        named = dict(zip(("Q_ROW", "K_ROW", "V_ROW", "G_ROW"), student, strict=False))
        named |= zip(("TQ_ROW", "TK_ROW"), teacher, strict=False)
        self.constants |= {name: tensor.stride(2) for name, tensor in named.items()}

    def name(self, kernel: str) -> str:
        """Under which name the tiles of `kernel` are found: head sizes above 64 have their own."""
        return f"{kernel}_wide" if self.wide else kernel


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensors: list[Tensor]) -> tuple[list[int], int, bool]:
    """Strides of batch and head of each tensor in units, the unit, and whether heads begin inside of a unit.

    The unit is what batches and rows begin at multiples of, and heads too where they can.
    """
    _, heads, _, width = tensors[0].shape
    batches, starts, rows = zip(*(tensor.stride()[:3] for tensor in tensors), strict=True)
    room = _block(width) - width + 1
    unit = divisor(*batches, *rows, heads * width, limit=min(16, 1 << room.bit_length() - 1))
    shifted = all(start == width for start in starts) and width % unit > 0
    if not shifted:
        unit = divisor(*batches, *starts, *rows)
    strides = [stride // unit for pair in zip(batches, starts, strict=True) for stride in pair]
    return strides, unit, shifted


def _block(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _float(*shape: int, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)


def _like_context(query: Tensor) -> Tensor:
    """[B, H, L, D], empty, laid out as [B, L, H, D]."""
    batch, heads, length, width = query.shape
    return torch.empty((batch, length, heads, width), dtype=query.dtype, device=query.device).transpose(1, 2)


def _attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    p: float,
    dropout_key: int,
    dropout_key_tensor: Tensor | None,
    site: int,
    need_grad: bool,
) -> tuple[Tensor, Tensor]:
    dropout = p, dropout_key, dropout_key_tensor, site
    context, lse, _ = _launch_forward(query, key, value, [], attention_mask, dropout, False, need_grad)
    return context, lse


def _attention_fake(query, key, value, attention_mask, p, dropout_key, dropout_key_tensor, site, need_grad):
    batch, heads, length, _ = query.shape
    return _like_context(query), _float(batch, heads, length if need_grad else 0, device=query.device)


def _attention_backward(
    grads, kept, query, key, value, attention_mask, p, dropout_key, dropout_key_tensor, site, need_grad
):
    dropout = p, dropout_key, dropout_key_tensor, site
    return _launch_backward(grads[0], *kept, query, key, value, [], attention_mask, dropout, False)


def _gradients_fake(grads, kept, query, *_):
    return [_like_context(query) for _ in range(3)]


def _distill_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    attention_mask: Tensor | None,
    p: float,
    dropout_key: int,
    dropout_key_tensor: Tensor | None,
    site: int,
    released: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    dropout, teacher = (p, dropout_key, dropout_key_tensor, site), [teacher_query, teacher_key]
    context, lse, partials = _launch_forward(query, key, value, teacher, attention_mask, dropout, released, need_grad)
    sums, counts = partials.unbind()
    loss, slope = loss_mean(sums, None if released else counts, batch * heads * length**2, 1, 2.0)
    return context, loss, lse, slope


def _distill_attention_fake(
    query, key, value, teacher_query, teacher_key, attention_mask,
    p, dropout_key, dropout_key_tensor, site, released, need_grad,
):  # fmt: skip
    context, lse = _attention_fake(query, key, value, attention_mask, p, dropout_key, None, site, need_grad)
    return context, _float(device=query.device), lse, _float(device=query.device)


def _distill_attention_backward(
    grads, kept, query, key, value, teacher_query, teacher_key, attention_mask,
    p, dropout_key, dropout_key_tensor, site, released, need_grad,
):  # fmt: skip
    (grad, grad_loss), (context, _, lse, slope) = grads, kept
    dropout, teacher = (p, dropout_key, dropout_key_tensor, site), [teacher_query, teacher_key]
    return _launch_backward(
        grad, context, lse, query, key, value, teacher, attention_mask, dropout, released, (grad_loss, slope)
    )


_DIFFERENTIABLE = ("query", "key", "value")
_attention = FusedOp(
    "attention",
    _attention_forward,
    _attention_fake,
    _attention_backward,
    _gradients_fake,
    _DIFFERENTIABLE,
    keep_results=True,
)
_distill_attention = FusedOp(
    "distill_attention",
    _distill_attention_forward,
    _distill_attention_fake,
    _distill_attention_backward,
    _gradients_fake,
    _DIFFERENTIABLE,
    results=2,
    keep_results=True,
)
