"""What every op must cost at least: bytes that have to move, FLOPs of matrix products, and the time these take.

The one idea: an op reads its inputs once and writes its outputs once in each pass, and nothing kept between the passes
is counted, so the roofline depends on the op and its shape alone, never on how a backend computes it. FLOPs are those
of matrix products, 2 for each multiply-add; elementwise work counts as free. A loss needs one pass: its gradients can
be formed while the inputs are on chip.

Shapes as in effbert.kernels: M tokens (rows), C hidden size, E inner width, B sequences, H heads, L positions, D and T
head sizes of student and teacher, W teacher width. `itemsize` is the bytes of an element; masks and keys are int64.
"""

from collections.abc import Mapping
from dataclasses import dataclass

MASK_ITEMSIZE = 8


@dataclass(frozen=True)
class Cost:
    """Bytes moved to or from memory, and FLOPs of matrix products."""

    bytes: int
    flops: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


@dataclass(frozen=True)
class Passes:
    """The least cost of an op's forward and of its backward; a loss has all of it in forward, gradients included."""

    forward: Cost
    backward: Cost

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: int) -> "Passes":
        return sum((self for _ in range(times - 1)), self)

    @property
    def total(self) -> Cost:
        """Forward and backward together."""
        return self.forward + self.backward

    def seconds(self, ceilings: "Ceilings", dtype: str) -> float:
        """Roofline time: each pass takes the longer of its bytes at full bandwidth and its FLOPs at full rate."""
        return sum(ceilings.seconds(cost, dtype) for cost in (self.forward, self.backward))


@dataclass(frozen=True)
class Ceilings:
    """What a device can do: bytes a second, and matrix-product FLOPs a second by type (bf16, fp16, tf32, fp32)."""

    bytes_per_second: float
    flops_per_second: Mapping[str, float]

    def seconds(self, cost: Cost, dtype: str) -> float:
        """Least time of `cost` with operands of `dtype`; where its rate is unknown, what the bytes take."""
        rate = self.flops_per_second.get(dtype)
        return max(cost.bytes / self.bytes_per_second, cost.flops / rate if rate else 0.0)


NOTHING = Cost(0, 0)


def dropout(rows: int, columns: int, itemsize: int) -> Passes:
    """x in, y out; dy in, dx out."""
    both = Cost(2 * rows * columns * itemsize, 0)
    return Passes(both, both)


def dropout_add_layer_norm(rows: int, columns: int, itemsize: int) -> Passes:
    """Forward x, residual in, y out (3·M·C); backward x, residual, dy in, dx, dresidual out (5·M·C); vectors of C."""
    x, vector = rows * columns * itemsize, columns * itemsize
    return Passes(Cost(3 * x + 2 * vector, 0), Cost(5 * x + 3 * vector, 0))


def mlp(rows: int, hidden: int, inner: int, itemsize: int) -> Passes:
    """Forward 4·M·C·E FLOPs, x and the weights' slices in, y out; backward twice the FLOPs, x, dy and the slices in, dx
    and the slices' gradients out. What lies between the two products is not counted: it may stay on chip.
    """
    x, weights = rows * hidden * itemsize, (2 * hidden * inner + inner + hidden) * itemsize
    flops = 4 * rows * hidden * inner
    return Passes(Cost(2 * x + weights, flops), Cost(3 * x + 2 * weights, 2 * flops))


def mlp_block(rows: int, hidden: int, inner: int, itemsize: int) -> Passes:
    """As `mlp`, with LayerNorm's weight and bias: the residual is x itself, so nothing else moves."""
    vectors = 2 * hidden * itemsize
    return mlp(rows, hidden, inner, itemsize) + Passes(Cost(vectors, 0), Cost(2 * vectors, 0))


def attention(batch: int, heads: int, length: int, head_size: int, itemsize: int) -> Passes:
    """Forward 2 products of 2·B·H·L²·D, Q, K, V, mask in, O out; backward 5 products (the scores once more, dV, dP, dQ,
    dK: L×L is never kept), Q, K, V, dO, mask in, dQ, dK, dV out.
    """
    x, product = _heads(batch, heads, length, head_size, itemsize)
    mask = batch * length * MASK_ITEMSIZE
    return Passes(Cost(4 * x + mask, 2 * product), Cost(7 * x + mask, 5 * product))


def distill_attention(
    batch: int, heads: int, length: int, head_size: int, teacher_head_size: int, itemsize: int
) -> Passes:
    """`attention`, plus the teacher's Q, K and its scores (2·B·H·L²·T) in each pass: the loss's gradient joins dS."""
    t, product = _heads(batch, heads, length, teacher_head_size, itemsize)
    teacher = Cost(2 * t, product)
    return attention(batch, heads, length, head_size, itemsize) + Passes(teacher, teacher)


def score_mse(batch: int, heads: int, length: int, head_size: int, teacher_head_size: int, itemsize: int) -> Passes:
    """One pass: the Q, K of both and the mask in, the student's dQ, dK out. FLOPs of the cheaper form: direct
    2·B·H·L²·((D + T) + 2·D), Gram 2·B·H·L·(2·(D + T)² + 2·(D + T)·D).
    """
    x, _ = _heads(batch, heads, length, head_size, itemsize)
    t, _ = _heads(batch, heads, length, teacher_head_size, itemsize)
    both = head_size + teacher_head_size
    direct = length**2 * (both + 2 * head_size)
    gram = length * (2 * both**2 + 2 * both * head_size)
    moved = 4 * x + 2 * t + batch * length * MASK_ITEMSIZE
    return Passes(Cost(moved, 2 * batch * heads * min(direct, gram)), NOTHING)


def projected_mse(pairs: int, rows: int, hidden: int, teacher_width: int, itemsize: int) -> Passes:
    """One pass over all pairs: x, t, weight, bias in, dx and the gradients of weight and bias out; 3 products of
    2·M·C·W a pair (the projection, dx, the weight's gradient).
    """
    weights = (hidden + 1) * teacher_width * itemsize
    moved = pairs * rows * (2 * hidden + teacher_width) * itemsize + 2 * weights
    return Passes(Cost(moved, 3 * pairs * 2 * rows * hidden * teacher_width), NOTHING)


def soft_cross_entropy(rows: int, classes: int, itemsize: int) -> Passes:
    """One pass: both logits in, the student's gradient out."""
    return Passes(Cost(3 * rows * classes * itemsize, 0), NOTHING)


def _heads(batch: int, heads: int, length: int, head_size: int, itemsize: int) -> tuple[int, int]:
    """Bytes of one [B, H, L, D] tensor, and FLOPs of one product of L×D with D×L a head."""
    return batch * heads * length * head_size * itemsize, 2 * batch * heads * length**2 * head_size
