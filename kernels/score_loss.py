"""Mean squared difference of two models' attention scores from their queries and keys alone: no L x L tensor in memory.

    loss = Σ (s_S Q_S K_Sᵀ - s_T Q_T K_Tᵀ)² / count,  s = D^-½      Q, K [B, H, L, D], any strides but the last

The idea: the loss is a scalar, so its gradients are known up to that scalar's own gradient as soon as the differences
are. One launch forms partial sums of the loss and, where a gradient is wanted, the sum's gradients for Q_S and K_S; a
second, of one program, adds the partial sums in a fixed order and divides by the count, which it also adds; backward is
one elementwise launch. Nothing waits for the host, nothing is added atomically.

Two forms of the first launch, the cheaper one by count (`gram_is_cheaper`):

direct  A program holds a block of queries and goes over the keys tile by tile: the difference, its squares, its product
        with K_S. Up to BLOCK_M positions one program has the whole head and forms both gradients from one difference;
        beyond, dK_S is left to a second set of programs that hold keys and go over the queries.
        Numerics: each product in its own dtype with fp32 sums. In the product with K_S the difference has the student's
        dtype; in fp16 its rows are scaled by powers of two, so that neither large nor tiny differences are lost.

Gram    With Q̃ = [s_S Q_S, -s_T Q_T] and K̃ = [K_S, K_T] the sum is ⟨Q̃ᵀQ̃, K̃ᵀK̃⟩, its gradients 2 s_S Q̃ (K̃ᵀK_S) for Q_S and
        2 K̃ (Q̃ᵀ s_S Q_S) for K_S. A program holds up to COLUMNS columns of both Gram matrices; Q̃ and K̃ are never formed.
        Numerics: Gram matrices are summed and kept in fp32. Where they multiply Q and K of bf16, fp16 or TF32, each is
        the sum of two parts of that type (16 bits in bf16, 22 in the others; fp16 scaled by a power of two a column).
        The value loses about 1e-7 · (Σ A_S² + Σ A_T²) / count absolutely to cancellation; a gradient is the difference
        of a student's and a teacher's term and has the parts' roundoff (2^-17 or 2^-22) of these, which stays below the
        direct form's own rounding until the two models' scores agree to about 1 %.

Kept for backward: 2 / count, and half the gradients of the undivided sum, in bf16 for a bf16 student, else in fp32.
Both have the range of fp32, so neither a large count nor large scores leave it; fp16 would be left by both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from effbert.kernels import eager, tiles
from effbert.kernels.launch import divisor, input_precision, launch
from effbert.kernels.library import FusedOp
from effbert.kernels.loss_mean import loss_mean

SCORE_FLOOR = tl.constexpr(eager.RELEASED_SCORE_FLOOR)
MASKED = tl.constexpr(eager.RELEASED_MASK)
MASK_BLOCK = 1024  # positions of a mask row that are read at a time
WHOLE_LENGTH = 128  # up to here one program has a whole head, where the tile table lets it
MIN_DOT = 16
MIN_WARPS = 4
FULL_ROWS = 64  # with fewer a tile cut to the length needs fewer warps; so many spill if warps are halved
_SIZES = [
    "student_batch", "student_head", "student_row", "teacher_batch", "teacher_head", "teacher_row",
    "mask_batch", "mask_row", "heads", "length", "student_cols", "teacher_cols",
]  # fmt: skip


def score_mse(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    attention_mask: Tensor,
    mask: str = "real",
    form: str = "auto",
) -> Tensor:
    """effbert.kernels.eager.score_mse, fused: student [B, H, L, D], teacher [B, H, L, D'], attention_mask [B, L].

    D and D' are 1 to 128, dtypes fp32, fp16 or bf16; the models may differ in both. The mask has any dtype, 0 = drop.
    Gives a 0-d fp32 tensor, with gradients for the student. form "auto" is the Gram form where `gram_is_cheaper`.
    The teacher gets no gradient. What is refused: effbert.kernels.checks.score_mse.
    """
    student_query, student_key = _of_one_dtype(student_query, student_key)
    teacher_query, teacher_key = _of_one_dtype(teacher_query, teacher_key)
    length, student_size = student_query.shape[2:]
    gram = form == "gram"
    if form == "auto" and mask == "real":
        gram = gram_is_cheaper(length, student_size, teacher_query.shape[3])
    return _score_mse(student_query, student_key, teacher_query, teacher_key, attention_mask, mask == "released", gram)


def gram_is_cheaper(length: int, student_head_size: int, teacher_head_size: int) -> bool:
    """Whether the Gram kernel does fewer multiply-adds than the direct one, forward and gradients, for one position.

    As eager.gram_is_cheaper, but counted as the kernels do them: head sizes are padded to powers of two, above
    WHOLE_LENGTH the direct form has its scores twice, and the Gram form's second products have two parts.
    """
    student, teacher = _padded(student_head_size), _padded(teacher_head_size)
    times = 1 if length <= WHOLE_LENGTH else 2
    direct = length * (times * (student + teacher) + 2 * student)
    gram = 2 * ((student + teacher) * student + teacher**2) + 2 * 2 * (student + teacher) * student
    return gram < direct


@triton.jit
def score_difference(student, teacher, queries, keys, RELEASED: tl.constexpr):
    """What one tile adds to the loss: student and teacher scores [M, N], raw products times D^-½ in fp32.

    queries and keys are bool and broadcast to [M, N]: whether a row's or column's position is real; keys may as well be
    the rows. Gives the difference, whose square is the loss, and a bool tile: where the student's score has a gradient.
    RELEASED: a masked key's scores get -10000, then whatever is at or below -100 becomes 0 on its own side, without a
    gradient; all queries count. There positions beyond the end must come as keys not real, or as queries of zeros.
    """
    if RELEASED:
        blocked = tl.where(keys, 0.0, MASKED)
        student += blocked
        teacher += blocked
        passes = (student <= SCORE_FLOOR) == 0
        difference = tl.where(passes, student, 0.0) - tl.where(teacher <= SCORE_FLOOR, 0.0, teacher)
    else:
        passes = queries & keys
        difference = tl.where(passes, student - teacher, 0.0)
    return difference, passes


@triton.jit
def _head_start(tensor, batch, head, stride_batch, stride_head, UNIT: tl.constexpr):
    """Pointer to position 0 of one head of [B, H, L, D]."""
    return tensor + batch.to(tl.int64) * (stride_batch * UNIT) + head.to(tl.int64) * (stride_head * UNIT)


@triton.jit
def _load_rows(start, row, wanted, stride, cols, first_col, UNIT: tl.constexpr, COLUMNS: tl.constexpr):
    """[ROWS, COLUMNS] from column first_col on; zero in rows not wanted and from column cols * UNIT on."""
    col = first_col + tl.arange(0, COLUMNS)
    at = start + row.to(tl.int64)[:, None] * (stride * UNIT) + col[None, :]
    return tl.load(at, mask=wanted[:, None] & (col < cols * UNIT)[None, :], other=0.0)


@triton.jit
def _store_rows(
    gradient, tile, batch, head, heads, row, length, cols, first_col, UNIT: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """tile [ROWS, COLUMNS] into rows of one head of gradient, which lies in memory as [B, L, H, D]."""
    col = first_col + tl.arange(0, COLUMNS)
    place = (batch.to(tl.int64) * length + row) * heads + head
    at = gradient + place[:, None] * (cols * UNIT) + col[None, :]
    tl.store(at, tile.to(gradient.dtype.element_ty), mask=(row < length)[:, None] & (col < cols * UNIT)[None, :])


@triton.jit
def _store_zeros(
    gradient, batch, head, heads, end, length, cols, first_col,
    UNIT: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Zeros into the blocks of rows that begin at `end` or behind it."""
    zeros = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for start in range(tl.cdiv(end, BLOCK) * BLOCK, length, BLOCK):
        row = start + tl.arange(0, BLOCK)
        _store_rows(gradient, zeros, batch, head, heads, row, length, cols, first_col, UNIT, COLUMNS)


@triton.jit
def _load_mask(mask, row, stride, length):
    """Whether each position [ROWS] is real."""
    return tl.load(mask + row.to(tl.int64) * stride, mask=row < length, other=0) != 0


@triton.jit
def _mask_extent(mask, stride, length, MASK_BLOCK: tl.constexpr):
    """One more than the last real position, and the number of real positions (fp32)."""
    end = 0
    count = 0.0
    for start in range(0, length, MASK_BLOCK):
        row = start + tl.arange(0, MASK_BLOCK)
        real = _load_mask(mask, row, stride, length)
        end = tl.maximum(end, tl.max(tl.where(real, row + 1, 0), 0))
        count += tl.sum(real.to(tl.float32), 0)
    return end, count


@triton.jit
def _store_sums(sums, counts, loss, count, batch, head, HAS_COUNTS: tl.constexpr):
    """This program's part of the loss; the first program of a sequence also its number of pairs."""
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), loss)
    if HAS_COUNTS:
        tl.store(counts + batch, count * count, mask=(tl.program_id(1) == 0) & (head == 0))


@triton.jit
def _power_of_two(peak):
    """2^-e and 2^e, 2^e the largest power of two that is at most peak; peak is fp32 and not negative."""
    exponent = tl.minimum(tl.maximum(peak.to(tl.int32, bitcast=True) >> 23, 1), 253)
    return ((254 - exponent) << 23).to(tl.float32, bitcast=True), (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _weighted_sum(weights, values, PRECISION: tl.constexpr):
    """weights [M, N] in fp32 times values [N, D], in the type of values; fp16 weights are scaled row by row."""
    if values.dtype == tl.float16:
        shrink, grow = _power_of_two(tl.max(tl.abs(weights), 1))
        return tl.dot((weights * shrink[:, None]).to(tl.float16), values) * grow[:, None]
    else:
        return tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)


@triton.jit(do_not_specialize=_SIZES)
def score_mse_direct_fwd_kernel(
    student_query, student_key, teacher_query, teacher_key, attention_mask,
    sums, counts, query_gradient, key_gradient,
    student_batch, student_head, student_row, teacher_batch, teacher_head, teacher_row,
    mask_batch, mask_row, heads, length, student_cols, teacher_cols, student_scale, teacher_scale,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_UNIT: tl.constexpr, TEACHER_UNIT: tl.constexpr,
    STUDENT_PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr, MASK_BLOCK: tl.constexpr,
    NEED_GRAD: tl.constexpr, RELEASED: tl.constexpr, WHOLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Grid [B · H, blocks of BLOCK_M positions, 1 or 2]. Index 0 of the last axis holds queries and forms loss and dQ,
    index 1 holds keys and forms dK, while the other side goes by in blocks of BLOCK_N. WHOLE: one block has all
    queries, and its program forms dK too, block by block.
    """
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    sq = _head_start(student_query, batch, head, student_batch, student_head, STUDENT_UNIT)
    sk = _head_start(student_key, batch, head, student_batch, student_head, STUDENT_UNIT)
    tq = _head_start(teacher_query, batch, head, teacher_batch, teacher_head, TEACHER_UNIT)
    tk = _head_start(teacher_key, batch, head, teacher_batch, teacher_head, TEACHER_UNIT)
    mask = attention_mask + batch.to(tl.int64) * mask_batch
    if WHOLE or tl.program_id(2) == 0:
        loss, count = _direct_block(
            sq, tq, sk, tk, student_row, teacher_row, mask, mask_row,
            query_gradient, key_gradient, batch, head, heads, length, student_cols, teacher_cols,
            student_scale, teacher_scale, STUDENT, TEACHER, STUDENT_UNIT, TEACHER_UNIT,
            STUDENT_PRECISION, TEACHER_PRECISION, MASK_BLOCK, NEED_GRAD, RELEASED, WHOLE, False, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        _store_sums(sums, counts, loss, count, batch, head, not RELEASED)
    else:
        _direct_block(
            sk, tk, sq, tq, student_row, teacher_row, mask, mask_row,
            key_gradient, query_gradient, batch, head, heads, length, student_cols, teacher_cols,
            student_scale, teacher_scale, STUDENT, TEACHER, STUDENT_UNIT, TEACHER_UNIT,
            STUDENT_PRECISION, TEACHER_PRECISION, MASK_BLOCK, NEED_GRAD, RELEASED, WHOLE, True, BLOCK_M, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _direct_block(
    own_student, own_teacher, other_student, other_teacher, student_row, teacher_row, mask, mask_row,
    own_gradient, other_gradient, batch, head, heads, length, student_cols, teacher_cols, student_scale, teacher_scale,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_UNIT: tl.constexpr, TEACHER_UNIT: tl.constexpr,
    STUDENT_PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr, MASK_BLOCK: tl.constexpr,
    NEED_GRAD: tl.constexpr, RELEASED: tl.constexpr, WHOLE: tl.constexpr, HOLDS_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store the gradient of the positions held, with WHOLE also the others'; give their part of the loss, the count."""
    first = tl.program_id(1) * BLOCK_M
    row = first + tl.arange(0, BLOCK_M)
    own_real = _load_mask(mask, row, mask_row, length)
    own_wanted = (row < length) if RELEASED else own_real
    end = length
    count = 0.0
    if not RELEASED:
        end, count = _mask_extent(mask, mask_row, length, MASK_BLOCK)
        end = tl.where(first < end, end, 0)
    own_s = _load_rows(own_student, row, own_wanted, student_row, student_cols, 0, STUDENT_UNIT, STUDENT)
    own_t = _load_rows(own_teacher, row, own_wanted, teacher_row, teacher_cols, 0, TEACHER_UNIT, TEACHER)

    loss = tl.zeros([BLOCK_M], tl.float32)
    gradient = tl.zeros([BLOCK_M, STUDENT], tl.float32)
    for start in range(0, end, BLOCK_N):
        other = start + tl.arange(0, BLOCK_N)
        other_real = _load_mask(mask, other, mask_row, length)
        other_wanted = (other < length) if RELEASED else other_real
        s = _load_rows(other_student, other, other_wanted, student_row, student_cols, 0, STUDENT_UNIT, STUDENT)
        t = _load_rows(other_teacher, other, other_wanted, teacher_row, teacher_cols, 0, TEACHER_UNIT, TEACHER)
        teacher = tl.dot(own_t, tl.trans(t), input_precision=TEACHER_PRECISION) * teacher_scale  # [BLOCK_M, BLOCK_N]
        student = tl.dot(own_s, tl.trans(s), input_precision=STUDENT_PRECISION) * student_scale
        if HOLDS_KEYS:
            difference, passes = score_difference(student, teacher, other_real[None, :], own_real[:, None], RELEASED)
        else:
            difference, passes = score_difference(student, teacher, own_real[:, None], other_real[None, :], RELEASED)
        loss += tl.sum(difference * difference, 1)
        if NEED_GRAD:
            slope = tl.where(passes, difference, 0.0)
            gradient += _weighted_sum(slope, s, STUDENT_PRECISION)
            if WHOLE:
                others = _weighted_sum(tl.trans(slope), own_s, STUDENT_PRECISION) * student_scale
                _store_rows(
                    other_gradient, others, batch, head, heads, other, length, student_cols, 0, STUDENT_UNIT, STUDENT
                )
    if NEED_GRAD:
        gradient *= student_scale
        _store_rows(own_gradient, gradient, batch, head, heads, row, length, student_cols, 0, STUDENT_UNIT, STUDENT)
        if WHOLE:
            _store_zeros(
                other_gradient, batch, head, heads, end, length, student_cols, 0, STUDENT_UNIT, STUDENT, BLOCK_N
            )
    return tl.sum(loss, 0), count


@triton.jit
def _add_products(total, left, right, PRECISION: tl.constexpr, CROSS_PRECISION: tl.constexpr):
    """total [M, N] + leftᵀ right, of left [ROWS, M] and right [ROWS, N]; in fp32 where their types differ."""
    if left.dtype == right.dtype:
        return tl.dot(tl.trans(left), right, total, input_precision=PRECISION)
    else:
        return tl.dot(tl.trans(left).to(tl.float32), right.to(tl.float32), total, input_precision=CROSS_PRECISION)


@triton.jit
def _two_parts(gram, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    """gram [M, N] in fp32 as (high + low) * grow, high and low of TYPE (TF32 where PRECISION says so), grow [N].

    In IEEE fp32 it is high alone.
    """
    grow = tl.full([gram.shape[1]], 1.0, tl.float32)
    if TYPE == tl.float16:
        shrink, grow = _power_of_two(tl.max(tl.abs(gram), 0))
        gram *= shrink[None, :]
    if TYPE == tl.float32 and PRECISION == "tf32":
        high = (gram.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)  # the 10 upper bits of 23
    else:
        high = gram.to(TYPE)
    low = (gram - high.to(tl.float32)).to(TYPE)
    return high, low, grow


@triton.jit
def _times_parts(values, high, low, grow, PRECISION: tl.constexpr):
    """values [ROWS, M] times the matrix [M, N] that `_two_parts` split, in fp32."""
    total = tl.dot(values, high, input_precision=PRECISION)
    if values.dtype != tl.float32 or PRECISION == "tf32":
        total = tl.dot(values, low, total, input_precision=PRECISION)
    if values.dtype == tl.float16:
        total *= grow[None, :]
    return total


@triton.jit(do_not_specialize=_SIZES)
def score_mse_gram_fwd_kernel(
    student_query, student_key, teacher_query, teacher_key, attention_mask,
    sums, counts, query_gradient, key_gradient,
    student_batch, student_head, student_row, teacher_batch, teacher_head, teacher_row,
    mask_batch, mask_row, heads, length, student_cols, teacher_cols, student_scale, teacher_scale,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_UNIT: tl.constexpr, TEACHER_UNIT: tl.constexpr,
    STUDENT_PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr, MASK_BLOCK: tl.constexpr,
    NEED_GRAD: tl.constexpr, CROSS_PRECISION: tl.constexpr, BLOCK: tl.constexpr,
    STUDENT_COLUMNS: tl.constexpr, TEACHER_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Grid [B · H, STUDENT / STUDENT_COLUMNS + TEACHER / TEACHER_COLUMNS]. The first programs of a head hold columns of
    Q_SᵀQ_S, Q_TᵀQ_S, K_SᵀK_S and K_TᵀK_S, the others of Q_TᵀQ_T and K_TᵀK_T. All form their share of the loss, the
    first also their columns of dQ and dK.
    """
    batch = tl.program_id(0) // heads
    head = tl.program_id(0) % heads
    sq = _head_start(student_query, batch, head, student_batch, student_head, STUDENT_UNIT)
    sk = _head_start(student_key, batch, head, student_batch, student_head, STUDENT_UNIT)
    tq = _head_start(teacher_query, batch, head, teacher_batch, teacher_head, TEACHER_UNIT)
    tk = _head_start(teacher_key, batch, head, teacher_batch, teacher_head, TEACHER_UNIT)
    mask = attention_mask + batch.to(tl.int64) * mask_batch
    end, count = _mask_extent(mask, mask_row, length, MASK_BLOCK)
    part = tl.program_id(1)

    if part < STUDENT // STUDENT_COLUMNS:
        first_col = part * STUDENT_COLUMNS
        q_ss = tl.zeros([STUDENT, STUDENT_COLUMNS], tl.float32)
        k_ss = tl.zeros([STUDENT, STUDENT_COLUMNS], tl.float32)
        q_ts = tl.zeros([TEACHER, STUDENT_COLUMNS], tl.float32)
        k_ts = tl.zeros([TEACHER, STUDENT_COLUMNS], tl.float32)
        for start in range(0, end, BLOCK):
            row = start + tl.arange(0, BLOCK)
            real = _load_mask(mask, row, mask_row, length)
            s = _load_rows(sq, row, real, student_row, student_cols, 0, STUDENT_UNIT, STUDENT)
            t = _load_rows(tq, row, real, teacher_row, teacher_cols, 0, TEACHER_UNIT, TEACHER)
            own = s
            if STUDENT != STUDENT_COLUMNS:
                own = _load_rows(sq, row, real, student_row, student_cols, first_col, STUDENT_UNIT, STUDENT_COLUMNS)
            q_ss = _add_products(q_ss, s, own, STUDENT_PRECISION, CROSS_PRECISION)
            q_ts = _add_products(q_ts, t, own, TEACHER_PRECISION, CROSS_PRECISION)
            s = _load_rows(sk, row, real, student_row, student_cols, 0, STUDENT_UNIT, STUDENT)
            t = _load_rows(tk, row, real, teacher_row, teacher_cols, 0, TEACHER_UNIT, TEACHER)
            own = s
            if STUDENT != STUDENT_COLUMNS:
                own = _load_rows(sk, row, real, student_row, student_cols, first_col, STUDENT_UNIT, STUDENT_COLUMNS)
            k_ss = _add_products(k_ss, s, own, STUDENT_PRECISION, CROSS_PRECISION)
            k_ts = _add_products(k_ts, t, own, TEACHER_PRECISION, CROSS_PRECISION)
        q_ss *= student_scale * student_scale
        q_ts *= student_scale * teacher_scale
        loss = tl.sum(q_ss * k_ss) - 2 * tl.sum(q_ts * k_ts)
        if NEED_GRAD:
            _gram_gradient(
                query_gradient, k_ss * student_scale, k_ts * teacher_scale, student_scale, sq, tq,
                student_row, teacher_row, mask, mask_row, batch, head, heads, end, length,
                student_cols, teacher_cols, first_col, STUDENT, TEACHER, STUDENT_UNIT, TEACHER_UNIT,
                STUDENT_PRECISION, TEACHER_PRECISION, STUDENT_COLUMNS, BLOCK,
            )  # fmt: skip
            _gram_gradient(
                key_gradient, q_ss, q_ts, 1.0, sk, tk,
                student_row, teacher_row, mask, mask_row, batch, head, heads, end, length,
                student_cols, teacher_cols, first_col, STUDENT, TEACHER, STUDENT_UNIT, TEACHER_UNIT,
                STUDENT_PRECISION, TEACHER_PRECISION, STUDENT_COLUMNS, BLOCK,
            )  # fmt: skip
    else:
        first_col = (part - STUDENT // STUDENT_COLUMNS) * TEACHER_COLUMNS
        q_tt = tl.zeros([TEACHER, TEACHER_COLUMNS], tl.float32)
        k_tt = tl.zeros([TEACHER, TEACHER_COLUMNS], tl.float32)
        for start in range(0, end, BLOCK):
            row = start + tl.arange(0, BLOCK)
            real = _load_mask(mask, row, mask_row, length)
            t = _load_rows(tq, row, real, teacher_row, teacher_cols, 0, TEACHER_UNIT, TEACHER)
            own = t
            if TEACHER != TEACHER_COLUMNS:
                own = _load_rows(tq, row, real, teacher_row, teacher_cols, first_col, TEACHER_UNIT, TEACHER_COLUMNS)
            q_tt = _add_products(q_tt, t, own, TEACHER_PRECISION, CROSS_PRECISION)
            t = _load_rows(tk, row, real, teacher_row, teacher_cols, 0, TEACHER_UNIT, TEACHER)
            own = t
            if TEACHER != TEACHER_COLUMNS:
                own = _load_rows(tk, row, real, teacher_row, teacher_cols, first_col, TEACHER_UNIT, TEACHER_COLUMNS)
            k_tt = _add_products(k_tt, t, own, TEACHER_PRECISION, CROSS_PRECISION)
        loss = tl.sum(q_tt * (teacher_scale * teacher_scale) * k_tt)
    _store_sums(sums, counts, loss, count, batch, head, True)


@triton.jit
def _gram_gradient(
    gradient, student_gram, teacher_gram, scale, student, teacher, student_row, teacher_row, mask, mask_row,
    batch, head, heads, end, length, student_cols, teacher_cols, first_col,
    STUDENT: tl.constexpr, TEACHER: tl.constexpr, STUDENT_UNIT: tl.constexpr, TEACHER_UNIT: tl.constexpr,
    STUDENT_PRECISION: tl.constexpr, TEACHER_PRECISION: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """scale * (student student_gram - teacher teacher_gram) into all rows of the gradient, zero in those not real."""
    s_high, s_low, s_grow = _two_parts(student_gram, student.dtype.element_ty, STUDENT_PRECISION)
    t_high, t_low, t_grow = _two_parts(teacher_gram, teacher.dtype.element_ty, TEACHER_PRECISION)
    for start in range(0, end, BLOCK):
        row = start + tl.arange(0, BLOCK)
        real = _load_mask(mask, row, mask_row, length)
        s = _load_rows(student, row, real, student_row, student_cols, 0, STUDENT_UNIT, STUDENT)
        t = _load_rows(teacher, row, real, teacher_row, teacher_cols, 0, TEACHER_UNIT, TEACHER)
        tile = _times_parts(s, s_high, s_low, s_grow, STUDENT_PRECISION)
        tile -= _times_parts(t, t_high, t_low, t_grow, TEACHER_PRECISION)
        _store_rows(
            gradient, tile * scale, batch, head, heads, row, length, student_cols, first_col, STUDENT_UNIT, COLUMNS
        )
    _store_zeros(gradient, batch, head, heads, end, length, student_cols, first_col, STUDENT_UNIT, COLUMNS, BLOCK)


@triton.jit(do_not_specialize=["units"])
def score_mse_bwd_kernel(
    kept_query, kept_key, scale, grad, query_gradient, key_gradient, units, UNIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Grid [elements / BLOCK]: both kept gradients [B, L, H, D] times grad · 2 / count, in the student's type."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < units.to(tl.int64) * UNIT
    factor = tl.load(grad).to(tl.float32) * tl.load(scale)
    query = tl.load(kept_query + at, mask=inside, other=0.0).to(tl.float32) * factor
    key = tl.load(kept_key + at, mask=inside, other=0.0).to(tl.float32) * factor
    tl.store(query_gradient + at, query.to(query_gradient.dtype.element_ty), mask=inside)
    tl.store(key_gradient + at, key.to(key_gradient.dtype.element_ty), mask=inside)


def _of_one_dtype(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    if query.dtype == key.dtype:
        return query, key
    wider = torch.promote_types(query.dtype, key.dtype)
    return query.to(wider), key.to(wider)


def _padded(size: int) -> int:
    """Rows or columns of a tile that holds `size`: a power of two, at least what tl.dot takes."""
    return max(MIN_DOT, 1 << (size - 1).bit_length())


def _alike(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both with contiguous columns and one set of strides: copies where that is not so, as it is behind projections."""
    if query.stride() == key.stride() and query.stride(3) == 1:
        return query, key
    return query.contiguous(), key.contiguous()


def _kept(student_query: Tensor, need_grad: bool) -> list[Tensor]:
    """The undivided gradients [B, L, H, D] of the student's Q and K, halved; empty."""
    batch, heads, length, size = student_query.shape
    shape = (batch, length, heads, size) if need_grad else (0,)
    dtype = torch.bfloat16 if student_query.dtype == torch.bfloat16 else torch.float32
    return [torch.empty(shape, dtype=dtype, device=student_query.device) for _ in range(2)]


def _forward(
    student_query: Tensor,
    student_key: Tensor,
    teacher_query: Tensor,
    teacher_key: Tensor,
    attention_mask: Tensor,
    released: bool,
    gram: bool,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept = _kept(student_query, need_grad)
    batch, heads, length, student_size = student_query.shape
    teacher_size = teacher_query.shape[3]
    student_query, student_key = _alike(student_query, student_key)
    teacher_query, teacher_key = _alike(teacher_query, teacher_key)
    student_strides, teacher_strides = student_query.stride()[:3], teacher_query.stride()[:3]
    student_unit, teacher_unit = divisor(student_size, *student_strides), divisor(teacher_size, *teacher_strides)
    widest = torch.promote_types(student_query.dtype, teacher_query.dtype)
    constants = dict(
        STUDENT=_padded(student_size),
        TEACHER=_padded(teacher_size),
        STUDENT_UNIT=student_unit,
        TEACHER_UNIT=teacher_unit,
        STUDENT_PRECISION=input_precision(student_query.dtype),
        TEACHER_PRECISION=input_precision(teacher_query.dtype),
        MASK_BLOCK=MASK_BLOCK,
        NEED_GRAD=need_grad,
    )
    kernel, grid, more = (_gram_launch if gram else _direct_launch)(student_query, constants, widest, released)
    sums = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=student_query.device)
    counts = None if released else sums.new_empty(batch if sums.numel() else 0)
    launch(
        kernel,
        grid,
        student_query,
        student_key,
        teacher_query,
        teacher_key,
        attention_mask,
        sums,
        counts,
        *kept,
        *(stride // student_unit for stride in student_strides),
        *(stride // teacher_unit for stride in teacher_strides),
        *attention_mask.stride(),
        heads,
        length,
        student_size // student_unit,
        teacher_size // teacher_unit,
        student_size**-0.5,
        teacher_size**-0.5,
        **constants,
        **more,
    )
    return *loss_mean(sums, counts, batch * heads * length**2, 1 if released else heads, 2.0), *kept


def _tile_size(constants: dict) -> int:
    """The size by which tiles are chosen: columns of both tiles, and `tiles.SHORT_LOADS` more where rows begin at
    multiples of less than 8 elements: the teacher's, or with a head above 64 the student's."""
    wide = max(constants["STUDENT"], constants["TEACHER"]) > 64
    short = constants["TEACHER_UNIT"] < 8 or (wide and constants["STUDENT_UNIT"] < 8)
    return constants["STUDENT"] + constants["TEACHER"] + short * tiles.SHORT_LOADS


def _direct_launch(student_query: Tensor, constants: dict, widest: torch.dtype, released: bool):
    """Kernel, grid and further constants of the direct form."""
    batch, heads, length, _ = student_query.shape
    tile = dict(tiles.choose("score_mse_direct", student_query.device, widest, _tile_size(constants)))
    area, positions = tile["BLOCK_M"] * tile["BLOCK_N"], _padded(length)
    tile["BLOCK_M"] = block = min(tile["BLOCK_M"], positions)
    tile["BLOCK_N"] = min(tile["BLOCK_N"], positions)
    if block < FULL_ROWS:
        tile["num_warps"] = max(MIN_WARPS, tile["num_warps"] * block * tile["BLOCK_N"] // area)
    whole = length <= block
    roles = 1 if whole or not constants["NEED_GRAD"] else 2
    grid = (batch * heads, -(-length // block), roles)
    return score_mse_direct_fwd_kernel, grid, dict(RELEASED=released, WHOLE=whole, **tile)


def _gram_launch(student_query: Tensor, constants: dict, widest: torch.dtype, released: bool):
    """Kernel, grid and further constants of the Gram form."""
    batch, heads, length, _ = student_query.shape
    student, teacher = constants["STUDENT"], constants["TEACHER"]
    tile = dict(tiles.choose("score_mse_gram", student_query.device, widest, _tile_size(constants)))
    columns = tile.pop("COLUMNS")
    student_columns, teacher_columns = min(student, columns), min(teacher, columns)
    grid = (batch * heads if length else 0, student // student_columns + teacher // teacher_columns)
    more = dict(
        STUDENT_COLUMNS=student_columns, TEACHER_COLUMNS=teacher_columns, CROSS_PRECISION=input_precision(widest)
    )
    return score_mse_gram_fwd_kernel, grid, more | tile


def _forward_fake(student_query, student_key, teacher_query, teacher_key, attention_mask, released, gram, need_grad):
    loss, scale = (torch.empty((), dtype=torch.float32, device=student_query.device) for _ in range(2))
    return loss, scale, *_kept(student_query, need_grad)


def _gradients(student_query: Tensor) -> list[Tensor]:
    """Two gradients [B, H, L, D] that lie in memory as [B, L, H, D], which the projections before them want."""
    batch, heads, length, size = student_query.shape
    shape = (batch, length, heads, size)
    return [
        torch.empty(shape, dtype=student_query.dtype, device=student_query.device).transpose(1, 2) for _ in range(2)
    ]  # fmt: skip


def _backward(grads, kept, student_query, *args):
    scale, kept_query, kept_key = kept
    gradients = _gradients(student_query)
    numel = kept_query.numel()
    unit = divisor(numel)
    tile = tiles.choose("score_mse_bwd", student_query.device, student_query.dtype, numel)
    grid = (-(-numel // tile["BLOCK"]),)
    launch(
        score_mse_bwd_kernel,
        grid,
        kept_query,
        kept_key,
        scale,
        grads[0],
        *gradients,
        numel // unit,
        UNIT=unit,
        **tile,
    )
    return gradients


def _backward_fake(grads, kept, student_query, *args):
    return _gradients(student_query)


_score_mse = FusedOp(
    "score_mse",
    _forward,
    _forward_fake,
    _backward,
    _backward_fake,
    differentiable=("student_query", "student_key"),
)
