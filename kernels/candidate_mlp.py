"""Candidate MLPs f(x) = post(W2 · mid(W1 · pre(x) + b1, x) + b2, x), alone and as a block, forward and backward.

    mlp_block    LayerNorm(x + Dropout(f(x)))      x [..., C], W1 [I, C], b1 [I], W2 [C, I], b2 [C], inner width E <= I

Stages forward: pre, first GEMM and mid; second GEMM; post, dropout, residual and LayerNorm. Backward: the last stage's;
the second GEMM's input gradient and mid's; the first one's, and both weight gradients with their bias gradients; and
the sum of all partial sums, straight into the used slice of the parent's gradient where `gradients_in_place` allows it.

With rows enough (effbert.kernels.row_block) that is one launch forward and three backward, of which the first is the
last stage's, the second GEMM's and, where pre does nothing, the first GEMM's input gradient. With fewer it is three and
four; and one forward where a row fits on the chip (effbert.kernels.whole_block).
Where weights are of another type than the computation, or their rows start at odd addresses, one more launch packs both
slices.

Kept for backward: the two pre-activations h [M, E] and y [M, C], the input, mean and reciprocal deviation of each row,
and the packed weights (small). mid(h, x), pre(x), post(y, x), the dropout mask and the normalised rows are computed
again.
"""

import torch
from torch import Tensor

from effbert.kernels import tiles
from effbert.kernels.codegen import SlotFunction, SlotFunctions, slot_functions
from effbert.kernels.expression import Expression
from effbert.kernels.launch import compute_dtype, dense
from effbert.kernels.library import FusedOp, gradient_of
from effbert.kernels.linear import linear_forward, need_packing, pack, padded_width
from effbert.kernels.linear_gradient import linear_gradients, linear_input_gradient, slot_gradient
from effbert.kernels.norm import Unchanged, as_rows, norm_backward, norm_forward, pieces
from effbert.kernels.philox import Dropout, split
from effbert.kernels.reduction import reduce_partials
from effbert.kernels.row_block import row_block_backward, row_block_forward
from effbert.kernels.whole_block import whole_block_forward


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    expression: Expression,
    inner_width: int,
    combine: str = "truncate",
) -> Tensor:
    """One candidate MLP f(x) for x [..., C], as effbert.kernels.eager.mlp; the result has the computation's dtype."""
    return _mlp(x, weight1, bias1, weight2, bias2, expression.text, inner_width, combine, compute_dtype(x))


def mlp_block(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expression: Expression,
    inner_width: int,
    eps: float,
    dropout: Dropout | None = None,
    combine: str = "truncate",
) -> Tensor:
    """LayerNorm(x + Dropout(f(x))), as effbert.kernels.eager.mlp_block; the result has the computation's dtype."""
    return _mlp_block(
        x, weight1, bias1, weight2, bias2, norm_weight, norm_bias,
        expression.text, inner_width, eps, *split(dropout), combine, compute_dtype(x),
    )  # fmt: skip


class _Weights:
    """Both weight slices as the kernels read them: packed copies where they are needed, else views of the parents."""

    def __init__(self, weight1: Tensor, weight2: Tensor, width: int, dtype: torch.dtype, packed: list[Tensor] | None):
        views = weight1[:width], weight2[:, :width]
        if packed is None:
            wanted = any(need_packing(view, dtype) for view in views)
            packed = pack(*views, dtype) if wanted else [weight1.new_empty(0, dtype=dtype) for _ in views]
        self.packed = list(packed)
        self.first, self.second = packed if packed[0].numel() else views


def _gemms(x, weights: _Weights, bias1, bias2, slots, width, dtype, keep_h, post=None, keep_y=True, pad=True):
    """h [M, E] (None unless keep_h), then y = W2 mid(h, x) + b2 [M, C] and post(y, x); x [M, C]."""
    h, middle = linear_forward(
        x, weights.first, bias1, width, x.shape[1], dtype, slots.pre, slots.mid, x, keep_z=keep_h
    )  # fmt: skip
    y, value = linear_forward(middle, weights.second, bias2, x.shape[1], width, dtype, None, post, x, pad, keep_y)
    return h, y, value


def _second_gradient(dy, dx, x, h, weights: _Weights, slots, width, dtype):
    """dx, dh [M, E] and mid(h, x) from the gradient dy [M, C] of the second GEMM's output.

    dx [M, C], overwritten: what x has got already; None for nothing.
    """
    if dx is None and slots.mid.uses_x:
        dx = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    return dx, *linear_input_gradient(dy, weights.second, h, width, x.shape[1], slots.mid, dtype, x, dx)


def _weight_gradients(partials, parameters, width, in_place: bool) -> list[Tensor | None]:
    """Gradients of W1, b1, W2, b2 and whatever follows, from their partial sums.

    in_place adds them to `.grad` of the parameters, of the first three only to the slice used, and gives None for each.
    """
    if in_place:
        gradients = [gradient_of(parameter) for parameter in parameters]
    else:
        sliced = width < len(parameters[0])
        gradients = [
            (torch.zeros_like if sliced and place < 3 else torch.empty_like)(
                parameter, memory_format=torch.contiguous_format
            )
            for place, parameter in enumerate(parameters)
        ]
    weight1, bias1, weight2, *others = gradients
    reduce_partials(partials, [weight1[:width], bias1[:width], weight2[:, :width], *others], accumulate=in_place)
    return [None] * len(parameters) if in_place else gradients


def _mlp_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    expression: str,
    inner_width: int,
    combine: str,
    dtype: torch.dtype,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots, weights = slot_functions(expression, combine), _Weights(weight1, weight2, inner_width, dtype, None)
    bias1, bias2 = dense(bias1), dense(bias2)
    if slots.post.is_identity:
        h, value, y = _gemms(as_rows(x), weights, bias1, bias2, slots, inner_width, dtype, need_grad, pad=False)
    else:
        keep_y = need_grad and slots.post.backward_uses_value
        h, y, value = _gemms(
            as_rows(x), weights, bias1, bias2, slots, inner_width, dtype, need_grad, slots.post, keep_y, pad=False
        )
    return value.view(x.shape), *_kept(need_grad, x, dtype, h, y, *weights.packed)


def _kept(need_grad: bool, x: Tensor, dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor]:
    """The tensors, but empty ones in place of those that are None, and of all of them where no gradient is needed."""
    return [x.new_empty(0, dtype=dtype) if tensor is None or not need_grad else tensor for tensor in tensors]


def _mlp_backward(
    grads, kept, x, weight1, bias1, weight2, bias2, expression, inner_width, combine, dtype, need_grad, in_place=False
):
    slots, rows, (h, y, *packed) = slot_functions(expression, combine), as_rows(x), kept
    dy, dx = as_rows(grads[0]), None
    if not slots.post.is_identity:
        dy, dx = slot_gradient(dy, y, rows, slots.post, dtype)
    weights = _Weights(weight1, weight2, inner_width, dtype, packed)
    dx, dh, middle = _second_gradient(dy, dx, rows, h, weights, slots, inner_width, dtype)
    dx, partials = linear_gradients(dh, dy, middle, weights.first, rows, inner_width, dtype, slots.pre, dx)
    parameters = [weight1, bias1, weight2, bias2]
    return [dx.view(x.shape), *_weight_gradients(partials, parameters, inner_width, in_place)]


def _mlp_block_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    expression: str,
    inner_width: int,
    eps: float,
    p: float,
    key: int,
    key_tensor: Tensor | None,
    site: int,
    combine: str,
    dtype: torch.dtype,
    need_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots, rows = slot_functions(expression, combine), as_rows(x)
    weights = _Weights(weight1, weight2, inner_width, dtype, None)
    bias1, bias2, norm_weight, norm_bias = map(dense, (bias1, bias2, norm_weight, norm_bias))
    dropout = (p, key, key_tensor, site)
    tile = tiles.choose("mlp_block", x.device, dtype, x.shape[-1])
    if tile:
        out, h, y, mean, rstd = whole_block_forward(
            rows, weights.first, bias1, weights.second, bias2, norm_weight, norm_bias, inner_width, eps, dropout, slots,
            dtype, need_grad, tile,
        )  # fmt: skip
    elif tile := _rows_tile("row_block_fwd", rows, dtype, slots.pre, slots.mid, slots.post):
        out, h, y, mean, rstd = row_block_forward(
            rows, weights.first, bias1, weights.second, bias2, norm_weight, norm_bias, inner_width, eps, dropout, slots,
            _last(slots), dtype, need_grad, tile,
        )  # fmt: skip
    else:
        h, y, _ = _gemms(rows, weights, bias1, bias2, slots, inner_width, dtype, need_grad)
        out, mean, rstd = norm_forward(y, rows, norm_weight, norm_bias, eps, *dropout, dtype, _last(slots))
    return out.view(x.shape), *_kept(need_grad, x, dtype, h, y, *weights.packed), mean, rstd


def _rows_tile(kernel: str, rows: Tensor, dtype: torch.dtype, *slots: SlotFunction) -> dict[str, int]:
    """The tile of a kernel that takes whole rows; {} for separate kernels."""
    cols = sum(pieces(padded_width(rows.shape[1], dtype)))
    return tiles.choose_rows(kernel, rows.device, dtype, max(slot.statements for slot in slots), len(rows), cols)


def _last(slots: SlotFunctions):
    """The post slot as the LayerNorm kernels take it; one and the same for all that do nothing."""
    return Unchanged if slots.post.is_identity else slots.post


def _mlp_block_backward(
    grads,
    kept,
    x,
    weight1,
    bias1,
    weight2,
    bias2,
    norm_weight,
    norm_bias,
    expression,
    inner_width,
    eps,
    p,
    key,
    key_tensor,
    site,
    combine,
    dtype,
    need_grad,
    in_place=False,
):
    slots, rows, (h, y, *packed, mean, rstd) = slot_functions(expression, combine), as_rows(x), kept
    weights = _Weights(weight1, weight2, inner_width, dtype, packed)
    dropout, grad_out = (p, key, key_tensor, site), as_rows(grads[0])
    tile, scale = _rows_tile("row_block_bwd", rows, dtype, slots.mid, slots.post), dense(norm_weight)
    finished = bool(tile) and slots.pre.is_identity
    if tile:
        dy, dx, dh, middle, norm_partials = row_block_backward(
            grad_out, y, rows, scale, mean, rstd, dropout, _last(slots), h, weights.first, weights.second,
            inner_width, slots.mid, finished, dtype, tile,
        )  # fmt: skip
    else:
        dy, dx, norm_partials = norm_backward(
            grad_out, y, rows, scale, mean, rstd, *dropout, _last(slots)
        )  # fmt: skip
        dx, dh, middle = _second_gradient(dy, dx, rows, h, weights, slots, inner_width, dtype)
    dx, partials = linear_gradients(dh, dy, middle, weights.first, rows, inner_width, dtype, slots.pre, dx, finished)
    parameters = [weight1, bias1, weight2, bias2, norm_weight, norm_bias]
    gradients = _weight_gradients([*partials, *norm_partials], parameters, inner_width, in_place)
    return [dx.view(x.shape), *gradients]


def _fake_kept(x, weight1, weight2, width, dtype, need_grad, y_width):
    """h, y (of `y_width` columns, 0 for none) and both packed weights as `_kept` gives them, empty."""
    if not need_grad:
        return [x.new_empty(0, dtype=dtype) for _ in range(4)]
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    shapes = [(rows, padded_width(width, dtype)), (rows, y_width) if y_width else (0,), (0,), (0,)]
    if any(need_packing(view, dtype) for view in (weight1[:width], weight2[:, :width])):
        shapes[2:] = (width, padded_width(channels, dtype)), (channels, padded_width(width, dtype))
    return [x.new_empty(shape, dtype=dtype) for shape in shapes]


def _mlp_fake(x, weight1, bias1, weight2, bias2, expression, inner_width, combine, dtype, need_grad):
    keep_y = slot_functions(expression, combine).post.backward_uses_value
    kept = _fake_kept(x, weight1, weight2, inner_width, dtype, need_grad, keep_y * x.shape[-1])
    return x.new_empty(x.shape, dtype=dtype), *kept


def _mlp_block_fake(x, weight1, bias1, weight2, bias2, norm_weight, norm_bias, expression, inner_width, *others):
    dtype, need_grad = others[-2:]
    kept = _fake_kept(x, weight1, weight2, inner_width, dtype, need_grad, padded_width(x.shape[-1], dtype))
    statistics = [x.new_empty(x.numel() // x.shape[-1], dtype=torch.float32) for _ in range(2)]
    return x.new_empty(x.shape, dtype=dtype), *kept, *statistics


def _backward_fake(tensors: int):
    def fake(grads, kept, *args):
        return [torch.empty_like(arg, memory_format=torch.contiguous_format) for arg in args[:tensors]]

    return fake


_WEIGHTS = ("weight1", "bias1", "weight2", "bias2")
_NORM = ("norm_weight", "norm_bias")
_mlp = FusedOp(
    "mlp",
    _mlp_forward,
    _mlp_fake,
    _mlp_backward,
    _backward_fake(5),
    differentiable=("x", *_WEIGHTS),
    in_place=_WEIGHTS,
)
_mlp_block = FusedOp(
    "mlp_block",
    _mlp_block_forward,
    _mlp_block_fake,
    _mlp_block_backward,
    _backward_fake(7),
    differentiable=("x", *_WEIGHTS, *_NORM),
    in_place=(*_WEIGHTS, *_NORM),
)
