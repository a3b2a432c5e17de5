"""The "triton" backend: the fused ops under the names of effbert.kernels.eager, gathered from their rooms."""

from effbert.kernels.candidate_mlp import mlp, mlp_block
from effbert.kernels.flash_attention import attention, distill_attention
from effbert.kernels.logit_loss import soft_cross_entropy
from effbert.kernels.norm import dropout, dropout_add_layer_norm
from effbert.kernels.projection_loss import projected_mse
from effbert.kernels.score_loss import score_mse

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
