"""What people run where they have no fused kernel: the rivals in the benchmarks, with the signatures of our ops.

They use the fastest ops PyTorch has (its own dropout and attention, products in the inputs' dtype, losses in fp32), so
beating them means something. Their dropout draws other numbers than ours; without dropout they compute what
effbert.kernels.eager does, up to rounding. Masked positions are real everywhere in the benchmarks, so a loss's `mask`
and `form` are not followed.
"""

import functools

import torch
import torch.nn.functional as F

from effbert.kernels import Dropout, eager
from effbert.kernels.eager import mlp, soft_cross_entropy

__all__ = [
    "attention",
    "distill_attention",
    "dropout",
    "dropout_add_layer_norm",
    "mlp",
    "mlp_block",
    "projected_mse",
    "score_mse",
    "soft_cross_entropy",
]


def dropout(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """PyTorch's dropout of probability dropout.p: the kernels that F.dropout starts on a GPU."""
    return x if dropout is None else torch.native_dropout(x, dropout.p, True)[0]


def _dropout(x: torch.Tensor, drawn: Dropout | None) -> torch.Tensor:
    return dropout(x, drawn)


def dropout_add_layer_norm(x, residual, weight, bias, eps: float, dropout: Dropout | None = None) -> torch.Tensor:
    """Three calls of PyTorch."""
    return F.layer_norm(residual + _dropout(x, dropout), weight.shape, weight, bias, eps)


def mlp_block(
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
    dropout=None,
    combine="truncate",
) -> torch.Tensor:
    """The expression op by op, then `dropout_add_layer_norm`."""
    y = eager.mlp(x, weight1, bias1, weight2, bias2, expression, inner_width, combine)
    return dropout_add_layer_norm(y, x, norm_weight, norm_bias, eps, dropout)


def attention(query, key, value, attention_mask=None, dropout: Dropout | None = None) -> torch.Tensor:
    """scaled_dot_product_attention with its own dropout."""
    keep = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, keep, 0.0 if dropout is None else dropout.p)


def distill_attention(query, key, value, teacher_query, teacher_key, attention_mask, dropout=None, mask="real"):
    """`attention`, and `materialised_score_mse` beside it."""
    loss = materialised_score_mse(query, key, teacher_query, teacher_key, attention_mask)
    return attention(query, key, value, attention_mask, dropout), loss


def materialised_score_mse(student_query, student_key, teacher_query, teacher_key, attention_mask) -> torch.Tensor:
    """Both score matrices in the inputs' dtype, masked rows zero, then the squared error in fp32."""
    real = attention_mask.to(student_query.dtype)[:, None, :, None]

    def scores(query, key):
        return (query * (real * query.shape[-1] ** -0.5)) @ (key * real).transpose(-1, -2)

    count = student_query.shape[1] * attention_mask.sum(dim=1).float().square().sum()
    student, teacher = scores(student_query, student_key), scores(teacher_query, teacher_key)
    return F.mse_loss(student.float(), teacher.float(), reduction="sum") / count


def score_mse(student_query, student_key, teacher_query, teacher_key, attention_mask, mask="real", form="auto"):
    """`materialised_score_mse`."""
    return materialised_score_mse(student_query, student_key, teacher_query, teacher_key, attention_mask)


def flex_score_mse(student_query, student_key, teacher_query, teacher_key, attention_mask) -> torch.Tensor:
    """The score loss by FlexAttention, all tokens real: with Q = [Q_S, -Q_T] and K = [K_S, K_T] a score is the
    difference, and with log(score²) as score_mod the log-sum-exp of a row is the logarithm of its sum of squares.

    The values that attention would mix are of no use here: the narrowest that is allowed.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    student_scale, teacher_scale = (query.shape[-1] ** -0.5 for query in (student_query, teacher_query))
    query = torch.cat((student_query * student_scale, teacher_query * -teacher_scale), dim=-1)
    key = torch.cat((student_key, teacher_key), dim=-1)
    value = key[..., :16].detach()
    attend = _flex_attention(query.device.type)
    _, aux = attend(query, key, value, score_mod=_log_square, scale=1.0, return_aux=AuxRequest(lse=True))
    return aux.lse.exp().sum() / (query.shape[1] * attention_mask.sum(dim=1).float().square().sum())


def _log_square(score, batch, head, row, column):
    return torch.log(score * score + 1e-20)


@functools.cache
def _flex_attention(device_type: str):
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention


def projected_mse(student_states, teacher_states, weight, bias, attention_mask=None) -> torch.Tensor:
    """As under autocast: projections in the inputs' dtype, each squared error in fp32."""
    pairs = zip(student_states, teacher_states, strict=True)
    return sum(F.mse_loss(F.linear(x, weight, bias).float(), target.float()) for x, target in pairs)


def low_precision_projected_mse(student_states, teacher_states, weight, bias) -> torch.Tensor:
    """All of it in the inputs' dtype: faster, and only a rough loss."""
    pairs = zip(student_states, teacher_states, strict=True)
    return sum(F.mse_loss(F.linear(x, weight, bias), target) for x, target in pairs)
