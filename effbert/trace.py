"""What distillation reads from a model, teacher or student, in one forward pass."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Trace:
    """Tensors of one forward pass over B sequences of L positions.

    hidden_states: the embedding output and each layer's output, [B, L, hidden_size] each.
    queries, keys: of each layer, [B, num_attention_heads, L, head size]; raw attention scores are QKᵀ/√(head size).
    logits: [B, num_labels], for spans [B, L, 2]; None where no head was run.
    score_losses: of each layer, the 0-d score loss; empty where no `ScoreTargets` were given.
    """

    hidden_states: tuple[torch.Tensor, ...]
    queries: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    logits: torch.Tensor | None = None
    score_losses: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class ScoreTargets:
    """What a student's attention scores are compared with while they are computed, so that they are computed once.

    queries, keys: of the teacher, for each layer of the student, [B, H, L, head size]. mask: which scores count, as in
    `effbert.kernels.score_mse`.
    """

    queries: tuple[torch.Tensor, ...]
    keys: tuple[torch.Tensor, ...]
    mask: str
