"""First filters: scores that cost almost nothing and say which candidates are worth training at all.

They discard the worst of a cohort and never crown: what is left competes by training. All look at the slices that a
candidate would start from, on one batch of text and without a gradient. How far a filter agrees with training is
measured in every run that uses one (effbert.search.agreement).

    parameters    the count alone
    w-pca         parameters times principal components (arXiv 2504.15983)
    supernet      minus the distillation loss of the warm supernet's slices
"""

from collections.abc import Callable

import torch

from effbert import kernels
from effbert.architecture import Architecture, count_parameters
from effbert.kernels import eager
from effbert.model import MLP
from effbert.step import general_lesson
from effbert.supernet import Supernet
from effbert.workspace import Workspace, model_inputs

SHARE_OF_VARIANCE = 0.99

Score = Callable[[Architecture], float]


def make_filter(name: str, workspace: Workspace, supernet: Supernet) -> Score | None:
    """The filter of this name, higher is better; None for "none"."""
    if name == "none":
        return None
    if name == "parameters":
        return lambda architecture: float(count_parameters(architecture, supernet.config).total_with_projection)
    batch = _batch(workspace)
    if name == "w-pca":
        return lambda architecture: w_pca(supernet, architecture, batch)
    if name == "supernet":
        return _shared_loss(workspace, supernet, batch)
    raise ValueError(f"unknown filter {name!r}: one of none, parameters, w-pca, supernet")


def _batch(workspace: Workspace):
    size = workspace.config.supernet.per_device_train_batch_size
    return workspace.general_plan(1.0, size, 0)[0].to(workspace.device)


@torch.no_grad()
def w_pca(supernet: Supernet, architecture: Architecture, batch) -> float:
    """Parameters times the principal components, summed over all MLPs, that carry SHARE_OF_VARIANCE of the variance of
    their inner activations W1 pre(x) + b1 over the real tokens of a batch."""
    counts: list[int] = []
    real = batch.attention_mask.bool()

    def count(mlp: MLP, arguments, _) -> None:
        x, expression, width, _ = arguments
        weights = mlp.dense1.weight, mlp.dense1.bias, mlp.dense2.weight, mlp.dense2.bias
        inner = eager.mlp(x, *weights, up_to_first_linear(expression), width, mlp.config.combine)
        counts.append(components(inner[real].float(), SHARE_OF_VARIANCE))

    hooks = [m.register_forward_hook(count) for m in supernet.modules() if isinstance(m, MLP)]
    try:
        supernet.trace(*model_inputs(batch), architecture)
    finally:
        for hook in hooks:
            hook.remove()
    return float(sum(counts)) * count_parameters(architecture, supernet.config).total_with_projection


def up_to_first_linear(expression: kernels.Expression) -> kernels.Expression:
    """The part of an MLP's expression that ends with its first linear."""
    (first,) = (node for node in expression.nodes if node.op == "linear" and node.args[1].op == "wb1")
    return kernels.Expression(first)


def components(values: torch.Tensor, share: float) -> int:
    """The fewest principal components of values [T, E] that carry `share` of their variance; 0 where there is none."""
    variances = torch.linalg.svdvals(values - values.mean(dim=0)).double().square()
    total = variances.sum()
    return int((variances.cumsum(0) < share * total).sum()) + 1 if total > 0 else 0


def _shared_loss(workspace: Workspace, supernet: Supernet, batch) -> Score:
    lesson = general_lesson(workspace)
    with torch.no_grad():
        teacher = lesson.teacher_of(batch)

    @torch.no_grad()
    def score(architecture: Architecture) -> float:
        def trace_of(batch, number, targets):
            return supernet.trace(*model_inputs(batch), architecture, targets=targets)

        return -float(lesson.shared_loss(trace_of, supernet.effbert.fit_dense)(batch, 0, teacher))

    return score
