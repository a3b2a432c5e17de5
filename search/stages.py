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
from effbert.config import SearchStage, SharedStage
from effbert.data.batches import subset
from effbert.engine import Phase, forget, train
from effbert.files import atomic_dir
from effbert.search.progress import Reporter
from effbert.search.sampler import make_sampler
from effbert.search.space import Space
from effbert.search.study import StageStudy
from effbert.step import MixedPlan, general_loss, task_loss
from effbert.supernet import Supernet, supernet_config
from effbert.workspace import Workspace, model_inputs, score


@dataclass(frozen=True)
class Outcome:
    """Value of a candidate (None: it diverged) and what else is worth keeping, as JSON values."""

    value: float | None
    attrs: dict = field(default_factory=dict)


def search_stage(
    stage: StageStudy,
    name: str,
    space: Space,
    settings: SearchStage | SharedStage,
    seed: int,
    evaluate: Callable[[int, Architecture], Outcome],
    first: Architecture | None,
    reporter: Reporter,
) -> Architecture:
    """Ask, evaluate, tell, until the study holds settings.num_candidates; returns the best architecture.

    first: the architecture the stage starts from, evaluated as candidate 0. The sampler's state is rebuilt from the
    study alone. ValueError where every candidate diverged.
    """
    sampler = make_sampler(settings.sampler, space, initial=settings.initial_samples, refit_every=settings.refit_every)
    evaluations = stage.evaluations()
    for evaluation in evaluations:
        sampler.tell(Architecture.parse(evaluation.architecture), evaluation.value)
    reporter.start(name, settings.num_candidates, len(evaluations))
    try:
        for number in range(len(evaluations), settings.num_candidates):
            pending = stage.pending()
            if pending is not None:
                architecture = Architecture.parse(pending.architecture)
            else:
                is_first = number == 0 and first is not None
                architecture = first if is_first else sampler.ask(random.generator(seed, name, "ask", number))
                stage.begin(number, str(architecture), space.key(architecture))
            outcome = evaluate(number, architecture)
            if outcome.value is None:
                stage.fail(number, outcome.attrs["reason"])
            else:
                stage.complete(number, outcome.value, **outcome.attrs)
            sampler.tell(architecture, outcome.value)
            told = "diverged" if outcome.value is None else f"{outcome.value:.4f}"
            best = stage.best()
            reporter.advance(
                f"{told}  {outcome.attrs.get('parameters', 0):,} parameters",
                "none" if best is None else f"{best.value:.4f} (candidate {best.number})",
            )
    finally:
        reporter.stop()
    best = stage.best()
    if best is None:
        raise ValueError(f"{name}: every candidate diverged (non-finite loss): lower the learning rates of this stage")
    return Architecture.parse(best.architecture)


def warm_supernet(workspace: Workspace, reporter: Reporter) -> Supernet:
    """The supernet after general distillation with all its weights, kept in <run>/supernet."""
    config, target = workspace.config, workspace.folder / "supernet"
    if not target.exists():
        specs = [task.spec for task in workspace.tasks.values()]
        torch.manual_seed(random.key(config.seed, "supernet", "init"))
        base = supernet_config(workspace.student_config(), config.student.num_hidden_layers)
        supernet = Supernet(base, specs).to(workspace.device)
        phase = Phase(("supernet", "general"), config.seed, workspace.folder / "supernet.pt")
        reporter.say(f"supernet: general distillation, {supernet.num_parameters():,} parameters")
        result = train(
            supernet,
            lambda epoch: workspace.general_plan(1.0, config.supernet.per_device_train_batch_size, epoch),
            general_loss(
                workspace, lambda batch, number: supernet.trace(*model_inputs(batch)), supernet.effbert.fit_dense
            ),
            config.supernet,
            phase,
            device=workspace.device,
        )
        if not result.finished:
            raise ValueError("the supernet diverged (non-finite loss): lower --supernet.learning_rate")
        reporter.say(
            f"supernet: loss {result.loss:.4f} after {result.tokens:,} tokens in {result.seconds:.0f} s "
            f"({result.tokens / result.seconds:,.0f} tokens/s)"
        )
        save_model(supernet, target)
        forget([phase])
    return own_memory(Supernet.from_pretrained(target)).to(workspace.device).eval()


def save_model(model, target: Path) -> None:
    """A transformers model folder, all or nothing."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(target) as temporary:
        model.save_pretrained(temporary)


def trained_candidate(workspace: Workspace, supernet: Supernet, name: str, settings: SearchStage):
    """Evaluation of stages 1 and 2: extract, distil on shares of corpus and task; valued by its best epoch."""
    config, task = workspace.config, workspace.main_task
    folder = workspace.folder / name
    folder.mkdir(exist_ok=True)

    def evaluate(number: int, architecture: Architecture) -> Outcome:
        model = supernet.extract(architecture, task.spec.name).to(workspace.device)
        parameters = count_parameters(architecture, model.config).total_with_projection
        phase = Phase((name, number), config.seed, folder / f"candidate-{number}.pt", str(architecture))
        phases = [phase.sub("general"), phase.sub("task")]
        result, epochs = distil(
            workspace,
            model,
            phases,
            settings.general_share,
            settings.general_phase,
            settings.task_share,
            settings.task_phase,
        )
        forget(phases)
        if result is not None:
            return Outcome(None, {"reason": result, "parameters": parameters})
        metric = task.spec.metrics[0]
        best = max(range(len(epochs)), key=lambda epoch: epochs[epoch][metric])
        attrs = {"parameters": parameters, "scores": epochs[best], "epochs": epochs, "best_epoch": best}
        return Outcome(epochs[best][metric], attrs)

    return evaluate


def distil(workspace, model, phases, general_share, general, task_share, task_arguments, seed=None, score_epochs=True):
    """General, then task distillation of a standalone student, in place.

    Returns (None, scores on the ranking rows after each epoch of the task), or (what diverged, []).
    """
    task = workspace.main_task
    seed = workspace.config.seed if seed is None else seed
    fit_dense = model.effbert.fit_dense
    general_result = train(
        model,
        lambda epoch: workspace.plan(
            subset(workspace.corpus, general_share), general.per_device_train_batch_size, "general", epoch, seed
        ),
        general_loss(workspace, lambda batch, number: model.trace(*model_inputs(batch), head=False), fit_dense),
        general,
        phases[0],
        device=workspace.device,
    )
    if not general_result.finished:
        return f"non-finite loss at step {general_result.steps} of general distillation", []
    rows = subset(task.train, task_share)
    task_result = train(
        model,
        lambda epoch: workspace.plan(rows, task_arguments.per_device_train_batch_size, "task", epoch, seed),
        task_loss(workspace, task.spec.name, lambda batch, number: model.trace(*model_inputs(batch)), fit_dense),
        task_arguments,
        phases[1],
        device=workspace.device,
        after_epoch=lambda epoch: (
            score(workspace, lambda batch: model.trace(*model_inputs(batch)).logits, task) if score_epochs else {}
        ),
    )
    if not task_result.finished:
        return f"non-finite loss at step {task_result.steps} of task distillation", []
    return None, task_result.epochs


def shared_supernet(
    workspace: Workspace, warm: Supernet, space: Space, settings: SharedStage, reporter: Reporter
) -> Supernet:
    """Stage 3's supernet: from the warm one, general distillation then all tasks, a sampled architecture a step."""
    config, target = workspace.config, workspace.folder / "stage3" / "supernet"
    if target.exists():
        return own_memory(Supernet.from_pretrained(target)).to(workspace.device).eval()
    folder = workspace.folder / "stage3"
    folder.mkdir(exist_ok=True)
    supernet = warm
    phase = Phase(("stage3",), config.seed, folder / "supernet.pt")
    phases = [phase.sub("general"), phase.sub("tasks")]
    fit_dense = supernet.effbert.fit_dense

    def sampled(what: str, number: int) -> Architecture:
        return space.sample(random.generator(config.seed, "stage3", what, number))

    general, task_arguments = settings.general_phase, settings.task_phase
    result = train(
        supernet,
        lambda epoch: workspace.general_plan(settings.general_share, general.per_device_train_batch_size, epoch),
        general_loss(
            workspace,
            lambda batch, number: supernet.trace(*model_inputs(batch), sampled("general", number)),
            fit_dense,
        ),
        general,
        phases[0],
        device=workspace.device,
    )
    losses = {
        name: task_loss(
            workspace,
            name,
            lambda batch, number, name=name: supernet.trace(*model_inputs(batch), sampled("tasks", number), name),
            fit_dense,
        )
        for name in workspace.tasks
    }
    size = task_arguments.per_device_train_batch_size

    def mixed(epoch: int) -> MixedPlan:
        plans = {
            name: workspace.plan(subset(task.train, settings.task_share), size, f"stage3 {name}", epoch)
            for name, task in workspace.tasks.items()
        }
        return MixedPlan(plans, config.seed, epoch)

    if result.finished:
        result = train(
            supernet,
            mixed,
            lambda item, number: losses[item.task](item.batch, number),
            task_arguments,
            phases[1],
            device=workspace.device,
        )
    if not result.finished:
        raise ValueError("stage 3: the shared supernet diverged (non-finite loss): lower its learning rates")
    reporter.say(f"stage 3: shared supernet distilled, last epoch's loss {result.loss:.4f}")
    save_model(supernet, target)
    forget(phases)
    return supernet.eval()


def shared_candidate(workspace: Workspace, supernet: Supernet):
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
