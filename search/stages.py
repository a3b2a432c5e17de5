"""The warm-up and the three stages, each from a distilled supernet, chained without a person in between.

Stages 1 and 2 extract every candidate from the warm supernet and train it by itself; stage 3 trains one supernet with a
sampled architecture a step and scores candidates on it without training. A candidate is in the study before it starts
and its value is there before the next begins.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from effbert import random
from effbert.architecture import Architecture, count_parameters
from effbert.checkpoint import own_memory
from effbert.config import SearchStage
from effbert.data.batches import subset
from effbert.engine import Phase, forget, train
from effbert.search.progress import Reporter
from effbert.search.sampler import SpaceExhausted, make_sampler
from effbert.search.space import Space
from effbert.search.study import StageStudy
from effbert.step import MixedPlan, general_loss, task_loss
from effbert.student import distil
from effbert.supernet import Supernet, supernet_config
from effbert.workspace import Workspace, keep, model_inputs, must_finish, score


@dataclass(frozen=True)
class Outcome:
    """A candidate's value, or None and why it diverged; attrs are JSON values kept beside it. phases: whose checkpoints
    can go once the outcome is in the study."""

    value: float | None
    attrs: dict = field(default_factory=dict)
    diverged: str = ""
    phases: tuple[Phase, ...] = ()


Evaluate = Callable[[int, Architecture], Outcome]


def search_stage(
    stage: StageStudy,
    name: str,
    space: Space,
    settings: SearchStage,
    seed: int,
    evaluate: Evaluate,
    first: Architecture | None,
    reporter: Reporter,
) -> Architecture:
    """Ask, evaluate, tell, until the study holds settings.num_candidates; returns the best architecture.

    first: the architecture the stage starts from, evaluated as candidate 0. The sampler's state is rebuilt from the
    study alone. A space with fewer architectures ends the stage early. ValueError where every candidate diverged.
    """
    sampler = make_sampler(settings.sampler, space, settings.initial_samples, settings.refit_every)
    evaluations = stage.evaluations()
    for evaluation in evaluations:
        sampler.tell(Architecture.parse(evaluation.architecture), evaluation.value)
    line = reporter.stage(name, settings.num_candidates, len(evaluations))
    for number in range(len(evaluations), settings.num_candidates):
        pending = stage.pending()
        if pending is not None:
            architecture = Architecture.parse(pending.architecture)
        elif number == 0 and first is not None:
            architecture = first
        else:
            try:
                architecture = sampler.ask(random.generator(seed, name, "ask", number))
            except SpaceExhausted as exhausted:
                reporter.say(f"{name} ends after {number} candidates: {exhausted}")
                break
        if pending is None:
            stage.begin(number, str(architecture), space.key(architecture))
        outcome = evaluate(number, architecture)
        record(stage, number, outcome)
        sampler.tell(architecture, outcome.value)
        best = stage.best()
        line.advance(
            f"{outcome.diverged or f'{outcome.value:.4f}'}  {outcome.attrs['parameters']:,} parameters",
            "none" if best is None else f"{best.value:.4f} (candidate {best.number})",
        )
    line.close()
    best = stage.best()
    if best is None:
        raise ValueError(f"{name}: every candidate diverged (loss not finite): lower the learning rates of --{name}")
    return Architecture.parse(best.architecture)


def record(stage: StageStudy, number: int, outcome: Outcome) -> None:
    """Commit an outcome, and only then let its checkpoints go."""
    if outcome.value is None:
        stage.fail(number, outcome.diverged, **outcome.attrs)
    else:
        stage.complete(number, outcome.value, **outcome.attrs)
    forget(outcome.phases)


def trained_candidate(
    workspace: Workspace, supernet: Supernet, name: str, settings: SearchStage, reporter: Reporter
) -> Evaluate:
    """Evaluation of stages 1 and 2: extract, distil on shares of corpus and task; valued by its best epoch."""
    config, task = workspace.config, workspace.main_task
    metric = task.spec.metrics[0]
    folder = workspace.folder / name
    folder.mkdir(exist_ok=True)
    on_step = reporter.steps(f"{name} candidate")

    def evaluate(number: int, architecture: Architecture) -> Outcome:
        model = supernet.extract(architecture, task.spec.name).to(workspace.device)
        phase = Phase((name, number), config.seed, folder / f"candidate-{number}.pt", str(architecture))
        student = distil(
            workspace,
            model,
            settings,
            phase,
            after_epoch=lambda epoch: score(workspace, lambda batch: model.trace(*model_inputs(batch)).logits, task),
            on_step=on_step,
        )
        attrs = {
            "parameters": count_parameters(architecture, model.config).total_with_projection,
            "seconds": student.seconds,
            "tokens": student.tokens,
        }
        if student.diverged:
            return Outcome(None, attrs, student.diverged, student.phases)
        best = max(range(len(student.epochs)), key=lambda epoch: student.epochs[epoch][metric])
        attrs |= {"scores": student.epochs[best], "epochs": student.epochs, "best_epoch": best}
        return Outcome(student.epochs[best][metric], attrs, phases=student.phases)

    return evaluate


def shared_candidate(workspace: Workspace, supernet: Supernet) -> Evaluate:
    """Evaluation of stage 3: the shared weights' score on the whole ranking split, without training."""
    task = workspace.main_task

    def evaluate(number: int, architecture: Architecture) -> Outcome:
        scores = score(
            workspace,
            lambda batch: supernet.trace(*model_inputs(batch), architecture, task.spec.name).logits,
            task,
        )
        parameters = count_parameters(architecture, supernet.config).total_with_projection
        return Outcome(scores[task.spec.metrics[0]], {"parameters": parameters, "scores": scores})

    return evaluate


def warm_supernet(workspace: Workspace, reporter: Reporter) -> Supernet:
    """The supernet after general distillation with all its weights, kept in <run>/supernet."""
    config, target = workspace.config, workspace.folder / "supernet"
    phase = Phase(("supernet", "general"), config.seed, workspace.folder / "supernet.pt")
    if not target.exists():
        specs = [task.spec for task in workspace.tasks.values()]
        torch.manual_seed(random.key(config.seed, "supernet", "init"))
        base = supernet_config(workspace.student_config(), config.student.num_hidden_layers)
        supernet = Supernet(base, specs).to(workspace.device)
        reporter.say(f"supernet: general distillation, {supernet.num_parameters():,} parameters")
        result = train(
            supernet,
            lambda epoch: workspace.general_plan(1.0, config.supernet.per_device_train_batch_size, epoch),
            general_loss(
                workspace,
                lambda batch, number, targets: supernet.trace(*model_inputs(batch), targets=targets),
                supernet.effbert.fit_dense,
            ),
            config.supernet,
            phase,
            device=workspace.device,
            on_step=reporter.steps("supernet"),
        )
        must_finish(result, "the supernet's general distillation", "--supernet.learning_rate")
        rate = result.tokens / max(result.seconds, 1e-9)
        reporter.say(
            f"supernet: loss {result.loss:.4f} after {result.tokens:,} tokens in {result.seconds:.0f} s "
            f"({rate:,.0f} tokens/s)"
        )
        keep(supernet, target, result)
    forget([phase])
    return load_supernet(workspace, target)


def shared_supernet(
    workspace: Workspace, warm: Supernet, space: Space, settings: SearchStage, reporter: Reporter
) -> Supernet:
    """Stage 3's supernet, kept in <run>/stage3/supernet: `warm` trained further, in place, on the corpus and then on
    all tasks, with an architecture sampled for every batch."""
    config, folder = workspace.config, workspace.folder / "stage3"
    target = folder / "supernet"
    folder.mkdir(exist_ok=True)
    phase = Phase(("stage3",), config.seed, folder / "supernet.pt")
    phases = phase.sub("general"), phase.sub("tasks")
    if not target.exists():
        fit_dense = warm.effbert.fit_dense

        def trace_of(what: str, task: str | None = None):
            def trace(batch, number, targets):
                architecture = space.sample(random.generator(config.seed, "stage3", what, number))
                return warm.trace(*model_inputs(batch), architecture, task, targets)

            return trace

        general = settings.general_phase
        on_step = reporter.steps("stage 3's supernet")
        result = train(
            warm,
            lambda epoch: workspace.general_plan(settings.general_share, general.per_device_train_batch_size, epoch),
            general_loss(workspace, trace_of("general"), fit_dense),
            general,
            phases[0],
            device=workspace.device,
            on_step=on_step,
        )
        must_finish(result, "stage 3's general distillation", "--stage3.general_phase.learning_rate")
        losses = {name: task_loss(workspace, name, trace_of("tasks", name), fit_dense) for name in workspace.tasks}
        tasks_result = train(
            warm,
            lambda epoch: mixed_tasks(workspace, settings, epoch),
            lambda item, number: losses[item.task](item.batch, number),
            settings.task_phase,
            phases[1],
            device=workspace.device,
            on_step=on_step,
        )
        must_finish(tasks_result, "stage 3's task distillation", "--stage3.task_phase.learning_rate")
        reporter.say(f"stage3: shared supernet distilled, last epoch's loss {tasks_result.loss:.4f}")
        keep(warm, target, result, tasks_result)
    forget(phases)
    return load_supernet(workspace, target)


def mixed_tasks(workspace: Workspace, settings: SearchStage, epoch: int) -> MixedPlan:
    """One epoch over a share of every task's rows."""
    size = settings.task_phase.per_device_train_batch_size
    plans = {
        name: workspace.plan(subset(task.train, settings.task_share), size, f"stage3 {name}", epoch)
        for name, task in workspace.tasks.items()
    }
    return MixedPlan(plans, workspace.config.seed, epoch)


def load_supernet(workspace: Workspace, folder: Path) -> Supernet:
    """A supernet kept by `keep`: always read back, so that a fresh run and a resumed one go on from the same bytes."""
    return own_memory(Supernet.from_pretrained(folder)).to(workspace.device).eval()
