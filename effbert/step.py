"""What a distillation compares: a teacher's outputs for a batch, and the loss of any student that gives a trace. The
teacher's part stands apart, so that one pass of it serves many students. The loops are in `effbert.engine`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from effbert import random
from effbert.data.batches import Batch, BatchPlan
from effbert.distill import LossWeights, distillation_losses, score_targets
from effbert.trace import ScoreTargets, Trace
from effbert.workspace import Workspace, model_inputs

TraceOf = Callable[[Batch, int, ScoreTargets | None], Trace]


@dataclass(frozen=True)
class Lesson:
    """What students learn from one teacher.

    teacher_of: a batch on the device -> the teacher's trace. kind: the task's, None for general distillation.
    """

    teacher_of: Callable[[Batch], Trace]
    weights: LossWeights
    num_layers: int
    kind: str | None = None

    def shared_loss(self, trace_of: TraceOf, fit_dense: nn.Linear) -> Callable[[Batch, int, Trace], torch.Tensor]:
        """A student's loss for `effbert.engine.train_together`, where the teacher's trace is shared; trace_of takes a
        batch, its number in the phase and what attention scores are compared with."""

        def loss_of(batch: Batch, number: int, teacher: Trace) -> torch.Tensor:
            student = trace_of(batch, number, score_targets(teacher, self.num_layers, self.weights))
            labels = None if self.kind is None else batch.labels
            return distillation_losses(
                student, teacher, fit_dense, batch.attention_mask, self.weights, self.kind, labels, batch.shares
            ).total

        return loss_of

    def loss(self, trace_of: TraceOf, fit_dense: nn.Linear) -> Callable[[Batch, int], torch.Tensor]:
        """The same for `effbert.engine.train`: a single student, with a teacher's pass of its own."""
        loss_of = self.shared_loss(trace_of, fit_dense)
        return lambda batch, number: loss_of(batch, number, self.teacher_of(batch))


def general_lesson(workspace: Workspace) -> Lesson:
    """General distillation: hidden states and attention scores."""
    config, teacher = workspace.config, workspace.general_teacher
    return Lesson(
        lambda batch: teacher.trace(*model_inputs(batch), head=False), config.loss, config.student.num_hidden_layers
    )


def task_lesson(workspace: Workspace, task: str) -> Lesson:
    """Task distillation from the task's own teacher: predictions too."""
    config, teacher = workspace.config, workspace.teachers[task]
    return Lesson(
        lambda batch: teacher.trace(*model_inputs(batch)),
        config.loss,
        config.student.num_hidden_layers,
        workspace.tasks[task].spec.kind,
    )


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
    """One epoch over several tasks: their batches in one order that depends on (seed, epoch) alone.

    At temperature 1 every batch of every task occurs once, so tasks weigh what they have. A higher one evens them out:
    of as many batches in all, a task of n gets a share in proportion to n^(1/temperature), at least one, and goes round
    where that is more than it has.
    """

    def __init__(self, plans: dict[str, BatchPlan], seed: int, epoch: int, temperature: float = 1.0):
        self.plans = plans
        counts = mixed_counts({task: len(plan) for task, plan in plans.items()}, temperature)
        places = [(task, index % len(plan)) for task, plan in plans.items() for index in range(counts[task])]
        order = random.generator(seed, "mixed tasks", epoch).permutation(len(places))
        self.places = [places[index] for index in order]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> TaskBatch:
        task, position = self.places[index]
        return TaskBatch(task, self.plans[task][position])


def mixed_counts(sizes: dict[str, int], temperature: float) -> dict[str, int]:
    """How many batches of each task an epoch has; see `MixedPlan`."""
    weights = {task: size ** (1 / temperature) for task, size in sizes.items()}
    scale = sum(sizes.values()) / sum(weights.values())
    return {task: max(1, round(weight * scale)) for task, weight in weights.items()}
