"""Stage 3's shared weights: one supernet, distilled with sampled architectures, on which candidates are scored.

Every batch trains one architecture drawn from the space (single-path), or the smallest, the largest and a drawn one
(sandwich, arXiv 1903.05134); all lie within the band. What an update did not use stays as it was. Candidates are then
scored without training.
"""

import functools
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from effbert import random
from effbert.architecture import Architecture
from effbert.config import SearchStage
from effbert.data.batches import Batch, subset
from effbert.engine import Phase, forget, train
from effbert.evaluate import evaluate_rows
from effbert.files import read_kept, write_atomic
from effbert.search.population import Evaluator, Member, Outcome, costs_of, ranking_metric, ranking_on
from effbert.search.progress import Reporter
from effbert.search.record import losses_file
from effbert.search.screen import make_screen
from effbert.search.space import ArchitectureSpace
from effbert.search.stages import load_supernet
from effbert.step import Lesson, MixedPlan, general_lesson, task_lesson
from effbert.supernet import Supernet
from effbert.workspace import Workspace, keep, model_inputs, must_finish

AT_ONCE = 16  # candidates that a worker takes to score
SUPERNET, BASE_FILE = "supernet", "architecture.json"


class Draws:
    """Which architectures each batch of a phase trains."""

    def __init__(self, workspace: Workspace, supernet: Supernet, space: ArchitectureSpace, phase: str):
        self.seed, self.supernet, self.space, self.phase = workspace.config.seed, supernet, space, phase
        self.of = functools.lru_cache(maxsize=64)(self._draw)  # asked for the loss, and again for the update
        self.ends = [space.extreme(largest) for largest in (False, True)] if _is_sandwich(workspace) else []

    def _draw(self, number: int) -> list[Architecture]:
        """Those of the phase's batch of this number."""
        drawn = self.space.sample(random.generator(self.seed, "stage3", self.phase, number))
        return list(dict.fromkeys([*self.ends, drawn]))

    def partly_used(self, numbers: Sequence[int]):
        """What the batches of one update use of the shared weights, for effbert.optim.Optimizer."""
        return self.supernet.partly_used([architecture for number in numbers for architecture in self.of(number)])

    def loss(self, lesson: Lesson, task: str | None = None) -> Callable[[Batch, int], torch.Tensor]:
        """Mean loss of a batch's architectures, from one pass of the teacher."""
        fit_dense = self.supernet.effbert.fit_dense

        def loss_of(batch: Batch, number: int) -> torch.Tensor:
            teacher, architectures = lesson.teacher_of(batch), self.of(number)
            losses = [
                lesson.shared_loss(self._trace_of(architecture, task), fit_dense)(batch, number, teacher)
                for architecture in architectures
            ]
            return sum(losses) / len(losses)

        return loss_of

    def _trace_of(self, architecture: Architecture, task: str | None):
        return lambda batch, number, targets: self.supernet.trace(*model_inputs(batch), architecture, task, targets)


def _is_sandwich(workspace: Workspace) -> bool:
    return workspace.config.weight_sharing == "sandwich"


def shared_supernet(
    workspace: Workspace, warm: Supernet, space: ArchitectureSpace, settings: SearchStage, reporter: Reporter
) -> Supernet:
    """Stage 3's supernet, kept in <run>/stage3/supernet: `warm` trained further, in place, on the corpus and then on
    all tasks; data-parallel, every process with the same architecture for its part of a batch. One that was made for
    another winner of stage 2 is made anew."""
    folder, world = workspace.folder / "stage3", workspace.world
    target = folder / SUPERNET
    folder.mkdir(exist_ok=True)
    world.on_first(_note_base, folder, str(space.base), reporter)
    phase = Phase(("stage3",), workspace.config.seed, folder / f"{SUPERNET}.pt")
    phases = phase.sub("general"), phase.sub("tasks")
    if not target.exists():
        on_step = reporter.steps("stage 3's supernet")
        general = settings.general_phase
        draws = Draws(workspace, warm, space, "general")
        result = train(
            warm,
            lambda epoch: workspace.general_plan(
                settings.general_share, general.per_device_train_batch_size, epoch, world=world
            ),
            draws.loss(general_lesson(workspace)),
            general,
            phases[0],
            device=workspace.device,
            on_step=on_step,
            partly_used=draws.partly_used,
            world=world,
        )
        must_finish(result, "stage 3's general distillation", "--stage3.general_phase.learning_rate")
        draws = Draws(workspace, warm, space, "tasks")
        losses = {name: draws.loss(task_lesson(workspace, name), name) for name in workspace.tasks}
        tasks_result = train(
            warm,
            lambda epoch: mixed_tasks(workspace, settings, epoch),
            lambda item, number: losses[item.task](item.batch, number),
            settings.task_phase,
            phases[1],
            device=workspace.device,
            on_step=on_step,
            partly_used=draws.partly_used,
            world=world,
        )
        must_finish(tasks_result, "stage 3's task distillation", "--stage3.task_phase.learning_rate")
        reporter.say(f"stage3: shared supernet distilled, last epoch's loss {tasks_result.loss:.4f}")
        tokenizer = workspace.student_tokenizer
        beside = losses_file({"general": result.losses, "tasks": tasks_result.losses})
        world.on_first(functools.partial(keep, warm, target, result, tasks_result, tokenizer=tokenizer, beside=beside))
    forget(phases)
    return load_supernet(workspace, target)


def _note_base(folder: Path, base: str, reporter: Reporter) -> None:
    """Keep which architecture the supernet is made for; delete one, whole or half made, that was for another."""
    noted = folder / BASE_FILE
    known = read_kept(noted, "makes this supernet again", "architecture", delete=folder) if noted.exists() else {}
    if known.get("architecture", base) != base:
        reporter.say(f"stage3: the supernet in {folder} is of another winner of stage 2: made anew")
        if (folder / SUPERNET).exists():
            shutil.rmtree(folder / SUPERNET)
        for file in folder.glob(f"{SUPERNET}*.pt"):
            file.unlink(missing_ok=True)
    write_atomic(noted, json.dumps({"architecture": base}))


def mixed_tasks(workspace: Workspace, settings: SearchStage, epoch: int) -> MixedPlan:
    """One epoch over a share of every task's rows."""
    config, size = workspace.config, settings.task_phase.per_device_train_batch_size
    plans = {
        name: workspace.plan(
            subset(task.train, settings.task_share), size, f"stage3 {name}", epoch, world=workspace.world
        )
        for name, task in workspace.tasks.items()
    }
    return MixedPlan(plans, config.seed, epoch, config.task_temperature)


def shared_candidates(workspace: Workspace, supernet: Supernet) -> Evaluator:
    """Evaluation of stage 3: the shared weights' score on its share of the ranking rows, without training."""
    workspace = ranking_on(workspace, workspace.config.stage3)
    task, metric = workspace.main_task, ranking_metric(workspace)

    def score(architecture: Architecture) -> dict:
        return evaluate_rows(
            lambda batch: supernet.trace(*model_inputs(batch), architecture, task.spec.name).logits,
            task,
            pad_token_id=workspace.pad_token_id,
            device=workspace.device,
        )

    def evaluate(members: Sequence[Member], share: float) -> Iterator[tuple[int, Outcome]]:
        for number, architecture in members:
            begun = time.perf_counter()
            scores = score(architecture)
            attrs = costs_of(architecture, supernet.config, workspace.config.max_length)
            attrs |= {"seconds": time.perf_counter() - begun, "tokens": 0}  # none that it was trained on
            attrs["jackknife"] = scores.pop("jackknife")[metric]
            yield number, Outcome(scores[metric], attrs | {"scores": scores})

    screen = make_screen(workspace, supernet, workspace.config.stage3)
    return Evaluator(
        lambda architectures: min(len(architectures), AT_ONCE),
        evaluate,
        screen,
        workspace.config.minimize,
        metric=metric,
    )
