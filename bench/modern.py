"""The ops as a good engineer writes them today without kernels of their own: PyTorch's fused attention and its own
dropout, the score loss from both score matrices. A backend of `effbert bench search-cost`."""

from effbert.bench.rivals import attention, dropout, dropout_add_layer_norm, mlp_block
from effbert.kernels.eager import mlp, projected_mse, score_mse, soft_cross_entropy

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


def distill_attention(query, key, value, teacher_query, teacher_key, attention_mask, dropout=None, mask="real"):
    """`attention`, and the `score_mse` of its queries and keys beside it."""
    loss = score_mse(query, key, teacher_query, teacher_key, attention_mask, mask, "direct")
    return attention(query, key, value, attention_mask, dropout), loss
