"""Small Triton functions that several kernels share: the dropout mask, above all."""

import triton
import triton.language as tl

from effbert.kernels import philox

ROUNDS = tl.constexpr(philox.ROUNDS)


@triton.jit
def identity(v, x, inside):
    """The slot function that does nothing (effbert.kernels.codegen has the others)."""
    return v


@triton.jit
def identity_gradient(v, x, inside, g):
    """Its gradients of v and x."""
    return g, 0.0


@triton.jit
def dropout_key(key, KEY_IS_TENSOR: tl.constexpr):
    """The 63-bit key as an int64 scalar: passed by value, or loaded from a 0-d int64 tensor (for CUDA graphs)."""
    if KEY_IS_TENSOR:
        return tl.load(key)
    else:
        return tl.zeros([], tl.int64) + key


@triton.jit
def keep_mask(key, site, rows, first_column, THRESHOLD, COLUMNS: tl.constexpr):
    """Dropout mask [ROWS, COLUMNS] (bool, True = keep) for `rows` [ROWS] and COLUMNS columns from `first_column` on.

    first_column and COLUMNS must be multiples of 8. One Philox4x32-7 call decides eight neighbouring columns: word w's
    low half is lane 2w, its high half lane 2w + 1, as effbert.kernels.philox states.
    """
    tl.static_assert(COLUMNS % 8 == 0)
    blocks = (first_column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)
    rows = rows.to(tl.uint32)
    zeros = tl.zeros([rows.shape[0], COLUMNS // 8], tl.uint32)
    c0 = zeros + blocks[None, :]
    c1 = zeros + rows[:, None]
    c2 = zeros + site
    w0, w1, w2, w3 = tl.philox(key, c0, c1, c2, zeros, n_rounds=ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [ROWS, COLUMNS / 8, i, j] holds word 2i + j
    lanes = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(lanes, [rows.shape[0], COLUMNS]) >= THRESHOLD
