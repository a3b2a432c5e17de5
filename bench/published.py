"""The ops as the published search runs them: attention probabilities and both score matrices are formed in memory. A
backend of `effbert bench search-cost`."""

import torch

from effbert.bench.modern import dropout, dropout_add_layer_norm, mlp, mlp_block, projected_mse, soft_cross_entropy
from effbert.kernels.eager import score_mse

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

_dropout = dropout


def attention(query, key, value, attention_mask=None, dropout=None) -> torch.Tensor:
    """softmax(QKᵀ/√D + mask) V step by step, with PyTorch's dropout on the probabilities."""
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if attention_mask is not None:
        scores = scores + (1.0 - attention_mask.to(scores.dtype))[:, None, None, :] * -10000.0
    return _dropout(torch.softmax(scores, dim=-1), dropout) @ value


def distill_attention(query, key, value, teacher_query, teacher_key, attention_mask, dropout=None, mask="released"):
    """`attention`, and the `score_mse` of its queries and keys from scores formed once more."""
    loss = score_mse(query, key, teacher_query, teacher_key, attention_mask, mask, "direct")
    return attention(query, key, value, attention_mask, dropout), loss
