"""Training many candidates at once: each has its own copy of the warm supernet's weights it uses, all take the same
batches in step, and the teacher reads each batch once for all of them.

Because the batches are the same, so are the rows that candidates are scored on: `jackknife` keeps each one's value
without this or that part of them, and two candidates are compared part by part (effbert.search.agreement).
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from effbert import kernels
from effbert.architecture import Architecture, Dimensions, count_flops, count_parameters
from effbert.config import Budget, SearchStage
from effbert.data.batches import Batch, subset
from effbert.engine import Phase
from effbert.evaluate import evaluate_rows
from effbert.memory import free_memory
from effbert.search.budget import cut
from effbert.search.progress import Reporter
from effbert.search.record import LOSSES
from effbert.search.screen import Screen, make_screen
from effbert.student import Distillation, Student, distil
from effbert.supernet import Supernet
from effbert.teacher_cache import open_cache
from effbert.trace import Trace
from effbert.workspace import Say, Workspace, model_inputs

BYTES_A_PARAMETER = 16  # fp32 weight, gradient and both moments of AdamW
MEMORY_SHARE = 0.5  # of what is free, for weights and optimiser; activations, data and caches need the rest


@dataclass(frozen=True)
class Outcome:
    """A candidate's value, or None and why it diverged; attrs are JSON values kept beside it. phases: whose checkpoints
    can go once the outcome is in the study."""

    value: float | None
    attrs: dict = field(default_factory=dict)
    diverged: str = ""
    phases: tuple[Phase, ...] = ()


Member = tuple[int, Architecture]  # a candidate's number and architecture


@dataclass(frozen=True)
class Evaluator:
    """How a stage scores candidates. room: how many of these it evaluates at once. evaluate: with a share of the
    budget, the outcomes as they come. screen: who is not evaluated at all. minimize: costs that count beside the value
    (effbert.search.pareto). prepare: called in a turn of this worker before it evaluates, for what is made once.
    metric: what the values are."""

    room: Callable[[Sequence[Architecture]], int]
    evaluate: Callable[[Sequence[Member], float], Iterable[tuple[int, Outcome]]]
    screen: Screen | None = None
    minimize: tuple[str, ...] = ()
    prepare: Callable[[], object] = lambda: None
    metric: str = "value"


def trained_candidates(
    workspace: Workspace, supernet: Supernet, name: str, settings: SearchStage, reporter: Reporter
) -> Evaluator:
    """Evaluation of stages 1 and 2: extract, distil together with a share of the stage's budget. The value is that of
    the last epoch, or with the whole budget and `scored_epochs` "all" of the best.
    """
    folder, workspace = workspace.folder / name, ranking_on(workspace, settings)
    folder.mkdir(exist_ok=True)
    kept = functools.cache(lambda: kept_teacher(workspace, settings, reporter.say))
    metric = ranking_metric(workspace)

    def evaluate(group: Sequence[Member], share: float) -> list[tuple[int, Outcome]]:
        budget, last_epoch = cut(settings, share), settings.task_phase.num_train_epochs - 1
        scored_from = 0 if share == 1 and settings.scored_epochs == "all" else last_epoch
        students = [_student(workspace, supernet, name, member, share, folder, scored_from) for member in group]
        on_step = reporter.steps(f"{name} candidates, {len(group)} at once")
        with kernels.few_compilations():
            distilled = distil(workspace, students, budget, on_step, teacher_of=kept())
        length = workspace.config.max_length
        return [
            (number, outcome(result, metric, costs_of(architecture, supernet.config, length), share))
            for (number, architecture), result in zip(group, distilled, strict=True)
        ]

    screen = make_screen(workspace, supernet, settings)
    return Evaluator(
        lambda architectures: population_size(workspace, supernet, architectures),
        evaluate,
        screen,
        workspace.config.minimize,
        kept,
        metric,
    )


def ranking_metric(workspace: Workspace) -> str:
    """Which of its scores is a candidate's value."""
    spec, asked = workspace.main_task.spec, workspace.config.ranking_metric
    return asked if asked == "roc_auc" and spec.kind == "classification" else spec.metrics[0]


def ranking_on(workspace: Workspace, settings: SearchStage) -> Workspace:
    """The workspace with the rows that rank a stage's candidates as the main task's validation rows."""
    task = workspace.main_task.ranked_on(settings.ranking_share)
    return replace(workspace, tasks={**workspace.tasks, task.spec.name: task})


KEPT_TEACHER = "teacher-outputs"


def kept_teacher(workspace: Workspace, settings: Budget, say: Say) -> Callable[[Batch], Trace] | None:
    """The teacher's traces of the task's rows that a budget trains on, read back from <run>/teacher-outputs; None where
    each batch had better ask the teacher: on a GPU, with losses over padding, or where they are too large."""
    config, task = workspace.config, workspace.main_task
    if workspace.device.type != "cpu" or not config.teacher_cache or config.loss.loss_mask != "real":
        return None
    cache = open_cache(
        workspace.folder / KEPT_TEACHER,
        workspace.teachers[task.spec.name],
        subset(task.train, settings.task_share),
        config.student.num_hidden_layers,
        model_inputs,
        workspace.pad_token_id,
        config.teacher_cache,
        say,
    )
    return None if cache is None else cache.trace


def _student(
    workspace: Workspace, supernet: Supernet, name: str, member: Member, share: float, folder: Path, first_scored: int
) -> Student:
    (number, architecture), task = member, workspace.main_task
    model = supernet.extract(architecture, task.spec.name).to(workspace.device)
    file = folder / f"{_STEM}{number}-{share:.4g}.pt"
    phase = Phase((name, number, f"{share:.4g}"), workspace.config.seed, file, str(architecture))

    def after_epoch(epoch: int) -> dict:
        if epoch < first_scored:
            return {}
        return evaluate_rows(
            lambda batch: model.trace(*model_inputs(batch)).logits,
            task,
            pad_token_id=workspace.pad_token_id,
            device=workspace.device,
        )

    return Student(model, phase, after_epoch)


_STEM = "candidate-"


def remove_stale(folder: Path, open_numbers: Iterable[int]) -> None:
    """Delete the checkpoints that a killed process left of candidates whose outcome is in the study."""
    going = tuple(f"{_STEM}{number}-" for number in open_numbers)
    for file in folder.glob(f"{_STEM}*.pt"):
        if not file.name.startswith(going):
            file.unlink(missing_ok=True)


def costs_of(architecture: Architecture, dims: Dimensions, length: int) -> dict[str, int]:
    """Parameters as the band counts them, with the projection, without pooler and head; FLOPs of a text of `length`
    tokens without either."""
    return {
        "parameters": count_parameters(architecture, dims).total_with_projection,
        "flops": count_flops(architecture, dims, length).total,
    }


def outcome(result: Distillation, metric: str, costs: dict[str, int], share: float = 1.0) -> Outcome:
    """What a distillation with that share of the budget says of a candidate: its best epoch by `metric`, the first of
    equals. Its losses are placed by the share of each phase's whole budget that was spent."""
    losses = {
        part: [(float(f"{share * place:.4g}"), loss) for place, loss in kept] for part, kept in result.losses.items()
    }
    attrs = {**costs, "seconds": result.seconds, "tokens": result.tokens, LOSSES: losses}
    if result.diverged:
        return Outcome(None, attrs, result.diverged, result.phases)
    best = max((e for e in range(len(result.epochs)) if result.epochs[e]), key=lambda e: result.epochs[e][metric])
    epochs = [{name: value for name, value in epoch.items() if name != "jackknife"} for epoch in result.epochs]
    attrs |= {"scores": epochs[best], "epochs": [epoch for epoch in epochs if epoch], "best_epoch": best}
    attrs["jackknife"] = result.epochs[best]["jackknife"][metric]
    return Outcome(epochs[best][metric], attrs, phases=result.phases)


def population_size(workspace: Workspace, supernet: Supernet, architectures: Sequence[Architecture]) -> int:
    """How many of them train at once: --population, or as many as memory has room for; at least one.

    Where memory does not suffice after all, the training loop goes on with half of them.
    """
    largest = max(count_parameters(a, supernet.config).total_with_projection for a in architectures)
    return min(len(architectures), room_for(workspace.device, largest, workspace.config.population))


def room_for(device: torch.device, parameters: int, wanted: int = 0) -> int:
    """How many models of so many parameters MEMORY_SHARE of the free memory holds in training: at least one, and at
    most `wanted` unless that is 0."""
    return room_in(free_memory(device), parameters, wanted)


def room_in(memory: float, parameters: int, wanted: int = 0) -> int:
    """The same for so many bytes of free memory."""
    room = max(1, int(MEMORY_SHARE * memory / (BYTES_A_PARAMETER * parameters)))
    return min(room, wanted or room)
