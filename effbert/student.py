"""Distilling students: general distillation on a share of the corpus, then on the task. The candidates of a search,
many at once, and the rows of its final table go through the one function `distil`; a supernet learns from text only."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from torch import nn

from effbert.config import Budget
from effbert.data.batches import Batch, subset
from effbert.engine import Phase, Trainee, TrainingResult, train_together
from effbert.model import EffBertConfig, EffBertHeadModel, EffBertModel
from effbert.optim import TrainingArguments
from effbert.pace import Standing
from effbert.parallel import ALONE, World
from effbert.step import general_lesson, task_lesson
from effbert.supernet import Supernet
from effbert.trace import Trace
from effbert.workspace import Workspace, model_inputs, rank


@dataclass(frozen=True)
class Student:
    """A model to distil in place. Data order follows `phase.seed` alone, dropout `phase.seed` and `phase.name`.
    after_epoch: scores it, in eval mode, after each epoch of the task."""

    model: EffBertHeadModel
    phase: Phase
    after_epoch: Callable[[int], dict] | None = None


@dataclass(frozen=True)
class Distillation:
    """What became of a student. diverged: why there is no score, or "". epochs: what `after_epoch` gave, a task epoch
    each. seconds, tokens: both phases together; the phases' checkpoints are to be forgotten once this is kept.
    best_step: as TrainingResult's, of the task phase. losses: as TrainingResult's, of "general" and "task", where the
    student came so far."""

    diverged: str
    epochs: list[dict]
    seconds: float
    tokens: int
    phases: tuple[Phase, ...]
    best_step: int = 0
    losses: dict[str, list[tuple[float, float]]] = field(default_factory=dict)


def distil(
    workspace: Workspace,
    students: Sequence[Student],
    budget: Budget,
    on_step: Callable[[Standing], None] | None = None,
    world: World = ALONE,
    teacher_of: Callable[[Batch], Trace] | None = None,
) -> list[Distillation]:
    """Distil students of one seed on the main task, in step with each other and from one pass of the teacher.

    world: the processes that share every batch; each takes so many rows of it as the budget's batch sizes say.
    teacher_of: a batch of the task -> the teacher's trace, where that need not be asked (effbert.teacher_cache)."""
    phases = [(student.phase.sub("general"), student.phase.sub("task")) for student in students]
    general = warm_up(
        workspace,
        [Student(student.model, first) for student, (first, _) in zip(students, phases, strict=True)],
        budget.general_share,
        budget.general_phase,
        on_step,
        world,
    )
    task, arguments = workspace.main_task, budget.task_phase
    rows, lesson = subset(task.train, budget.task_share), task_lesson(workspace, task.spec.name)
    going = [place for place, result in enumerate(general) if result.finished]
    results = train_together(
        [
            Trainee(
                students[place].model,
                lesson.shared_loss(_trace_of(students[place].model), students[place].model.effbert.fit_dense),
                phases[place][1],
                students[place].after_epoch,
                partial(_rank, workspace, students[place].model),
                alike=teacher_of is None,
                step_bytes=bytes_of_step(workspace, students[place].model, arguments),
            )
            for place in going
        ],
        lambda epoch: workspace.plan(
            rows, arguments.per_device_train_batch_size, "task", epoch, _seed(students), world
        ),
        arguments,
        share=teacher_of or lesson.teacher_of,
        device=workspace.device,
        on_step=on_step,
        world=world,
    )
    task_of = dict(zip(going, results, strict=True))
    return [_joined(first, task_of.get(place), phases[place]) for place, first in enumerate(general)]


def warm_up(
    workspace: Workspace,
    students: Sequence[Student],
    share: float,
    arguments: TrainingArguments,
    on_step: Callable[[Standing], None] | None = None,
    world: World = ALONE,
) -> list[TrainingResult]:
    """General distillation in place on the first `share` of the corpus; `world` as in `distil`."""
    lesson = general_lesson(workspace)
    return train_together(
        [
            Trainee(
                student.model,
                lesson.shared_loss(_trace_of(student.model, head=False), student.model.effbert.fit_dense),
                student.phase,
                alike=True,
                step_bytes=bytes_of_step(workspace, student.model, arguments),
            )
            for student in students
        ],
        lambda epoch: workspace.general_plan(
            share, arguments.per_device_train_batch_size, epoch, _seed(students), world
        ),
        arguments,
        share=lesson.teacher_of,
        device=workspace.device,
        on_step=on_step,
        world=world,
    )


def distil_generally(
    workspace: Workspace,
    models: Sequence[Supernet | EffBertModel],
    arguments: TrainingArguments,
    phases: Sequence[Phase],
    on_step: Callable[[Standing], None] | None = None,
    world: World = ALONE,
) -> list[TrainingResult]:
    """General distillation in place, on the whole corpus, of bare encoders or of a supernet with all its weights, from
    one pass of the teacher."""
    lesson = general_lesson(workspace)

    def loss_of(encoder: EffBertModel):
        trace_of = lambda batch, number, targets: encoder.trace(*model_inputs(batch), targets=targets)  # noqa: E731
        return lesson.shared_loss(trace_of, encoder.fit_dense)

    return train_together(
        [
            Trainee(
                model,
                loss_of(getattr(model, "effbert", model)),
                phase,
                alike=True,
                step_bytes=bytes_of_step(workspace, model, arguments),
            )
            for model, phase in zip(models, phases, strict=True)
        ],
        lambda epoch: workspace.general_plan(1.0, arguments.per_device_train_batch_size, epoch, world=world),
        arguments,
        share=lesson.teacher_of,
        device=workspace.device,
        on_step=on_step,
        world=world,
    )


def step_bytes(config: EffBertConfig, texts: int, length: int) -> int:
    """What a step of distillation on so many texts of `length` tokens keeps for its backward pass in plain PyTorch, at
    most: counted with dropout, a little above what was measured of several sizes."""
    layers, width = config.num_hidden_layers, config.fit_size or 0
    layer = 30 * config.hidden_size + 4 * config.num_attention_heads * length
    return 4 * texts * length * (layers * layer + 2 * (layers + 1) * width)


def bytes_of_step(workspace: Workspace, model: nn.Module, arguments: TrainingArguments) -> int:
    """`step_bytes` of a phase with these arguments."""
    return step_bytes(model.config, arguments.per_device_train_batch_size, workspace.config.max_length)


def _rank(workspace: Workspace, model: EffBertHeadModel) -> float:
    return rank(workspace, lambda batch: model.trace(*model_inputs(batch)).logits, workspace.main_task.spec.name)


def _trace_of(model: EffBertHeadModel, head: bool = True):
    return lambda batch, number, targets: model.trace(*model_inputs(batch), head=head, targets=targets)


def _seed(students: Sequence[Student]) -> int:
    seeds = {student.phase.seed for student in students}
    if len(seeds) != 1:
        raise ValueError(f"students that learn together need one seed, not {sorted(seeds)}: it orders their data")
    return seeds.pop()


def _joined(general: TrainingResult, task: TrainingResult | None, phases: tuple[Phase, Phase]) -> Distillation:
    results = {"general": general} if task is None else {"general": general, "task": task}
    name, last = list(results.items())[-1]
    diverged = f"{last.diverged} of {name} distillation" if last.diverged else ""
    seconds, tokens = (sum(getattr(result, cost) for result in results.values()) for cost in ("seconds", "tokens"))
    losses = {name: result.losses for name, result in results.items()}
    return Distillation(diverged, last.epochs, seconds, tokens, phases, task.best_step if task else 0, losses)
