"""The distillation losses: attention scores, projected hidden states, predictions (DESIGN of the published method, §3).

One function takes the student's and the teacher's `Trace` and gives the weighted sum and its parts as device scalars.
`loss_mask="real"` runs all of them over real tokens only; "released" is the published form.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from effbert import kernels
from effbert.data.batches import WHOLE, Shares
from effbert.teacher import layer_map
from effbert.trace import ScoreTargets, Trace


@dataclass(frozen=True)
class LossWeights:
    """How the parts add up.

    attention, hidden, prediction: weights of the three parts, 1 as published. Over real tokens the attention part is
        larger than the published one by about padded length / real length. In a trial on the built-in topic task (the
        published architecture at 6×64, one seed, held-out accuracy) prediction weights of 1, 10 and 30 gave 0.595,
        0.587 and 0.582; at prediction weight 10 and a fifth of that budget, attention weights of 0.3, 1 and 3 gave
        0.391, 0.413 and 0.417: nothing that speaks against 1. A teacher with large scores wants less attention.
    temperature: t of the soft cross entropy.
    loss_mask: "real" or "released".
    score_form: "auto", "direct" or "gram" (effbert.kernels.score_mse).
    """

    attention: float = 1.0
    hidden: float = 1.0
    prediction: float = 1.0
    temperature: float = 1.0
    loss_mask: Literal["real", "released"] = "real"
    score_form: Literal["auto", "direct", "gram"] = "auto"

    def __post_init__(self):
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be above 0")


@dataclass(frozen=True)
class Losses:
    """Weighted total and unweighted parts, 0-d tensors on the student's device; prediction is None without a head."""

    total: torch.Tensor
    attention: torch.Tensor
    hidden: torch.Tensor
    prediction: torch.Tensor | None = None


def score_targets(teacher: Trace, num_layers: int, weights: LossWeights) -> ScoreTargets | None:
    """What a student of `num_layers` compares its scores with while it runs; None where `weights` ask for one form of
    the loss, which is then computed by itself."""
    if weights.score_form != "auto":
        return None
    targets = layer_map(len(teacher.queries), num_layers)
    queries, keys = (tuple(tensors[target] for target in targets) for tensors in (teacher.queries, teacher.keys))
    return ScoreTargets(queries, keys, weights.loss_mask)


def attention_loss(student: Trace, teacher: Trace, attention_mask: torch.Tensor, weights: LossWeights) -> torch.Tensor:
    """Σ over student layers of the score MSE with the mapped teacher layer; the student's own sum where it has it."""
    if student.score_losses:
        return sum(student.score_losses)
    targets = layer_map(len(teacher.queries), len(student.queries))
    return sum(
        kernels.score_mse(
            student.queries[index],
            student.keys[index],
            teacher.queries[target],
            teacher.keys[target],
            attention_mask,
            weights.loss_mask,
            weights.score_form,
        )
        for index, target in enumerate(targets)
    )


def hidden_loss(
    student: Trace, teacher: Trace, fit_dense: torch.nn.Linear, attention_mask: torch.Tensor, weights: LossWeights
) -> torch.Tensor:
    """MSE of the projected embedding output, plus each layer's projected output against its mapped teacher layer."""
    targets = layer_map(len(teacher.queries), len(student.queries))
    teacher_states = [teacher.hidden_states[0], *(teacher.hidden_states[target + 1] for target in targets)]
    mask = attention_mask if weights.loss_mask == "real" else None
    return kernels.projected_mse(student.hidden_states, teacher_states, fit_dense.weight, fit_dense.bias, mask)


def prediction_loss(
    kind: str,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    labels: torch.Tensor | None,
    attention_mask: torch.Tensor,
    weights: LossWeights,
) -> torch.Tensor:
    """Classification: soft cross entropy, mean over B × C. Regression: MSE to `labels` [B]. Spans [B, L, 2]: start plus
    end, mean over the real positions; in the released form over B × L, with position 0 left out on both sides.
    """
    if kind == "regression":
        return F.mse_loss(student_logits[:, 0].float(), labels.float())
    if kind == "classification":
        return kernels.soft_cross_entropy(student_logits, teacher_logits, weights.temperature)
    mask = attention_mask
    released = weights.loss_mask == "released"
    if released:
        mask = mask.clone()
        mask[:, 0] = 0
    return sum(
        kernels.soft_cross_entropy(
            student_logits[..., side], teacher_logits[..., side], weights.temperature, mask, not released
        )
        for side in (0, 1)
    )


def distillation_losses(
    student: Trace,
    teacher: Trace,
    fit_dense: torch.nn.Linear,
    attention_mask: torch.Tensor,
    weights: LossWeights,
    kind: str | None = None,
    labels: torch.Tensor | None = None,
    shares: Shares = WHOLE,
) -> Losses:
    """General distillation (attention + hidden), plus the prediction part where the task's `kind` is given.

    shares: of a part of a batch, which weigh each part of the total by what its mean runs over, so that the totals of
    all parts of a batch add up to that of the batch.
    """
    real = weights.loss_mask == "real"
    pairs, tokens = (shares.pairs, shares.tokens) if real else (shares.rows, shares.rows)
    attention = attention_loss(student, teacher, attention_mask, weights)
    hidden = hidden_loss(student, teacher, fit_dense, attention_mask, weights)
    total = weights.attention * pairs * attention + weights.hidden * tokens * hidden
    if kind is None:
        return Losses(total, attention, hidden)
    prediction = prediction_loss(kind, student.logits, teacher.logits, labels, attention_mask, weights)
    total = total + weights.prediction * (tokens if kind == "spans" else shares.rows) * prediction
    return Losses(total, attention, hidden, prediction)
