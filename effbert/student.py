"""Distilling one standalone student: general distillation on a share of the corpus, then on the task. The candidates of
a search and the rows of its final table go through this one function."""

from collections.abc import Callable
from dataclasses import dataclass

from effbert.config import Budget
from effbert.data.batches import subset
from effbert.engine import Phase, TrainingResult, train
from effbert.model import EffBertHeadModel
from effbert.step import general_loss, task_loss
from effbert.workspace import Workspace, model_inputs


@dataclass(frozen=True)
class Distillation:
    """What became of a student. diverged: why there is no score, or None. epochs: what `after_epoch` gave, a task epoch
    each. seconds, tokens: both phases together; the phases' checkpoints are to be forgotten once this is kept."""

    diverged: str | None
    epochs: list[dict]
    seconds: float
    tokens: int
    phases: tuple[Phase, ...]


def distil(
    workspace: Workspace,
    model: EffBertHeadModel,
    budget: Budget,
    phase: Phase,
    *,
    after_epoch: Callable[[int], dict] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> Distillation:
    """Distil `model` in place on the main task; data order and dropout follow `phase.seed` and `phase.name`."""
    phases = phase.sub("general"), phase.sub("task")
    result = warm_up(workspace, model, budget.general_share, budget.general_phase, phases[0], on_step)
    results = [result]
    if result.finished:
        task, arguments = workspace.main_task, budget.task_phase
        rows = subset(task.train, budget.task_share)
        result = train(
            model,
            lambda epoch: workspace.plan(rows, arguments.per_device_train_batch_size, "task", epoch, phase.seed),
            task_loss(
                workspace,
                task.spec.name,
                lambda batch, number, targets: model.trace(*model_inputs(batch), targets=targets),
                model.effbert.fit_dense,
            ),
            arguments,
            phases[1],
            device=workspace.device,
            after_epoch=after_epoch,
            on_step=on_step,
        )
        results.append(result)
    diverged = None
    if not result.finished:
        diverged = f"not finite at step {result.steps} of {('general', 'task')[len(results) - 1]} distillation"
    seconds, tokens = sum(r.seconds for r in results), sum(r.tokens for r in results)
    return Distillation(diverged, result.epochs, seconds, tokens, phases)


def warm_up(
    workspace: Workspace, model: EffBertHeadModel, share: float, arguments, phase: Phase, on_step=None
) -> TrainingResult:
    """General distillation of `model` in place on the first `share` of the corpus."""
    return train(
        model,
        lambda epoch: workspace.general_plan(share, arguments.per_device_train_batch_size, epoch, phase.seed),
        general_loss(
            workspace,
            lambda batch, number, targets: model.trace(*model_inputs(batch), head=False, targets=targets),
            model.effbert.fit_dense,
        ),
        arguments,
        phase,
        device=workspace.device,
        on_step=on_step,
    )
