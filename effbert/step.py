"""One distillation step: batch in, loss out, for any student that gives a trace. The loops are in `effbert.engine`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from effbert import random
from effbert.data.batches import Batch, BatchPlan
from effbert.distill import distillation_losses, score_targets
from effbert.trace import ScoreTargets, Trace
from effbert.workspace import Workspace, model_inputs

TraceOf = Callable[[Batch, int, ScoreTargets | None], Trace]


def general_loss(workspace: Workspace, trace_of: TraceOf, fit_dense: nn.Linear):
    """Loss of general distillation for `effbert.engine.train`; trace_of takes a batch, its number in the phase and
    what attention scores are compared with."""

    weights, num_layers = workspace.config.loss, workspace.config.student.num_hidden_layers

    def loss_of(batch: Batch, number: int) -> torch.Tensor:
        teacher = workspace.general_teacher.trace(*model_inputs(batch), head=False)
        student = trace_of(batch, number, score_targets(teacher, num_layers, weights))
        return distillation_losses(student, teacher, fit_dense, batch.attention_mask, weights).total

    return loss_of


def task_loss(workspace: Workspace, task: str, trace_of: TraceOf, fit_dense: nn.Linear):
    """Loss of task distillation from the task's own teacher."""
    weights, num_layers = workspace.config.loss, workspace.config.student.num_hidden_layers
    kind, teacher_model = workspace.tasks[task].spec.kind, workspace.teachers[task]

    def loss_of(batch: Batch, number: int) -> torch.Tensor:
        teacher = teacher_model.trace(*model_inputs(batch))
        student = trace_of(batch, number, score_targets(teacher, num_layers, weights))
        return distillation_losses(student, teacher, fit_dense, batch.attention_mask, weights, kind, batch.labels).total

    return loss_of


@dataclass(frozen=True)
class TaskBatch:
    """A batch that knows its task."""

    task: str
    batch: Batch

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return self.batch.tokens

    def to(self, device) -> "TaskBatch":
        """On `device`."""
        return TaskBatch(self.task, self.batch.to(device))


class MixedPlan:
    """One epoch over several tasks: each task's batches, all in one order that depends on (seed, epoch) alone."""

    def __init__(self, plans: dict[str, BatchPlan], seed: int, epoch: int):
        self.plans = plans
        places = [(task, index) for task, plan in plans.items() for index in range(len(plan))]
        order = random.generator(seed, "mixed tasks", epoch).permutation(len(places))
        self.places = [places[index] for index in order]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> TaskBatch:
        task, position = self.places[index]
        return TaskBatch(task, self.plans[task][position])
