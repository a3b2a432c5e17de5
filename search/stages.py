"""The warm-up and the three stages, each from a distilled supernet, chained without a person in between.

A stage goes by cohorts: the sampler proposes a cohort of candidates, all are evaluated rung by rung, and the sampler is
told how they did before it proposes the next. Stages 1 and 2 extract every candidate from the warm supernet and train
it; stage 3 trains one supernet with a sampled architecture a step and scores candidates on it without training. A
candidate is in the study before it starts, and each of its values as soon as it is there.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from effbert import random
from effbert.architecture import Architecture
from effbert.checkpoint import own_memory
from effbert.config import SearchStage
from effbert.data.batches import subset
from effbert.engine import Phase, forget, train
from effbert.evaluate import evaluate_rows
from effbert.search.agreement import paired_difference
from effbert.search.budget import fitness, ladder, survivors
from effbert.search.population import Evaluate, Member, Outcome, costs_of
from effbert.search.progress import Reporter, StageLine
from effbert.search.sampler import Sampler, SpaceExhausted, make_sampler
from effbert.search.space import Space
from effbert.search.study import Evaluation, StageStudy
from effbert.step import MixedPlan, general_lesson, task_lesson
from effbert.supernet import Supernet, supernet_config
from effbert.workspace import Workspace, keep, model_inputs, must_finish


def search_stage(
    stage: StageStudy,
    name: str,
    space: Space,
    settings: SearchStage,
    seed: int,
    evaluate: Evaluate,
    first: Architecture | None,
    reporter: Reporter,
    after_cohort: Callable[[], None] = lambda: None,
) -> Architecture:
    """Cohort after cohort, until the study holds settings.num_candidates; returns the best architecture.

    first: the architecture the stage starts from, evaluated as candidate 0. after_cohort: called when one is done. The
    sampler's state is rebuilt from the study alone. A space with fewer architectures ends the stage early. ValueError
    where every candidate diverged.
    """
    sampler = make_sampler(settings.sampler, space, settings.initial_samples, settings.refit_every)
    finished = sum(evaluation.state != "running" for evaluation in stage.evaluations())
    line = reporter.stage(name, settings.num_candidates, finished)
    for begin in range(0, settings.num_candidates, settings.cohort):
        numbers = range(begin, min(begin + settings.cohort, settings.num_candidates))
        members = propose(stage, name, space, sampler, numbers, seed, first, reporter)
        run_cohort(stage, members, space, settings, evaluate, line)
        cohort = [evaluation for evaluation in stage.evaluations() if evaluation.number in numbers]
        told = fitness(cohort, len(ladder(settings, len(members))))
        for number, architecture in members:
            sampler.tell(architecture, told[number])
        after_cohort()
        if len(members) < len(numbers):
            break
    line.close()
    best = stage.best()
    if best is None:
        raise ValueError(f"{name}: every candidate diverged (loss not finite): lower the learning rates of --{name}")
    reporter.say(f"{name}: {comparison(stage.evaluations(), best)}")
    return Architecture.parse(best.architecture)


def propose(
    stage: StageStudy,
    name: str,
    space: Space,
    sampler: Sampler,
    numbers: range,
    seed: int,
    first: Architecture | None,
    reporter: Reporter,
) -> list[Member]:
    """The candidates of a cohort: those the study has, then new ones, each committed as it is proposed; fewer than
    `numbers` where the space has no more."""
    known = {evaluation.number: Architecture.parse(evaluation.architecture) for evaluation in stage.evaluations()}
    members = []
    for number in numbers:
        if number in known:
            architecture = known[number]
            sampler.asked(architecture)
        else:
            if number == 0 and first is not None:
                architecture = first
                sampler.asked(architecture)
            else:
                try:
                    architecture = sampler.ask(random.generator(seed, name, "ask", number))
                except SpaceExhausted as exhausted:
                    reporter.say(f"{name} ends after {number} candidates: {exhausted}")
                    break
            stage.begin(number, str(architecture), space.key(architecture))
        members.append((number, architecture))
    return members


def run_cohort(
    stage: StageStudy,
    members: Sequence[Member],
    space: Space,
    settings: SearchStage,
    evaluate: Evaluate,
    line: StageLine,
) -> None:
    """Every rung of a cohort, from where the study says it stands: evaluate, then drop all but the best."""
    keys = {number: space.key(architecture) for number, architecture in members}
    rungs = ladder(settings, len(members))
    for index, rung in enumerate(rungs):
        last = rung is rungs[-1]
        running = _running(stage, keys)
        due = [member for member in members if member[0] in running and len(_rungs(running[member[0]])) == index]
        for number, outcome in evaluate(due, rung.share) if due else ():
            record(stage, running[number], index, last, outcome)
            if last or outcome.diverged:
                _show(stage, line, outcome)
        if not last:
            values = {number: _rungs(found)[index] for number, found in _running(stage, keys).items()}
            for number in sorted(values.keys() - set(survivors(values, keys, rungs[index + 1].places))):
                stage.prune(number)
                line.done_one(f"candidate {number} stops at {values[number]:.4f}, {rung.share:.2g} of the budget")


def _running(stage: StageStudy, numbers) -> dict[int, Evaluation]:
    return {e.number: e for e in stage.evaluations() if e.state == "running" and e.number in numbers}


def _rungs(evaluation: Evaluation) -> list[float]:
    return evaluation.attrs.get("rungs", [])


def record(stage: StageStudy, before: Evaluation, rung: int, last: bool, outcome: Outcome) -> None:
    """Commit what a rung gave, its costs added to those of the rungs before, and only then let its checkpoints go."""
    number, attrs = before.number, dict(outcome.attrs)
    for cost in ("seconds", "tokens"):
        if cost in attrs:
            attrs[cost] += before.attrs.get(cost, 0)
    if outcome.value is None:
        stage.fail(number, outcome.diverged, **attrs)
    elif last:
        stage.complete(number, outcome.value, **attrs)
    else:
        stage.report(number, rung, outcome.value, **attrs)
    forget(outcome.phases)


def _show(stage: StageStudy, line: StageLine, outcome: Outcome) -> None:
    best = stage.best()
    line.advance(
        f"{outcome.diverged or f'{outcome.value:.4f}'}  {outcome.attrs['parameters']:,} parameters",
        "none" if best is None else f"{best.value:.4f} (candidate {best.number})",
    )


def comparison(evaluations: Sequence[Evaluation], best: Evaluation) -> str:
    """The best candidate beside the second best, row by row where their answers are known."""
    others = [e for e in evaluations if e.state == "complete" and e.number != best.number]
    text = f"candidate {best.number} is best with {best.value:.4f}"
    if not others:
        return text
    second = max(others, key=lambda e: (e.value, -e.number))
    text += f", candidate {second.number} second with {second.value:.4f}"
    if "hits" in best.attrs and "hits" in second.attrs:
        text += f"; difference in accuracy {paired_difference(best.attrs['hits'], second.attrs['hits'])}"
    return text


def shared_candidates(workspace: Workspace, supernet: Supernet) -> Evaluate:
    """Evaluation of stage 3: the shared weights' score on the whole ranking split, without training."""
    task = workspace.main_task

    def score(architecture: Architecture) -> dict:
        return evaluate_rows(
            lambda batch: supernet.trace(*model_inputs(batch), architecture, task.spec.name).logits,
            task,
            pad_token_id=workspace.pad_token_id,
            device=workspace.device,
        )

    def evaluate(members: Sequence[Member], share: float) -> Iterator[tuple[int, Outcome]]:
        for number, architecture in members:
            scores = score(architecture)
            attrs = costs_of(architecture, supernet.config, workspace.config.max_length)
            if "hits" in scores:
                attrs["hits"] = scores.pop("hits")
            yield number, Outcome(scores[task.spec.metrics[0]], attrs | {"scores": scores})

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
            general_lesson(workspace).loss(
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

        def drawn(what: str, number: int) -> Architecture:
            return space.sample(random.generator(config.seed, "stage3", what, number))

        def trace_of(what: str, task: str | None = None):
            return lambda batch, number, targets: warm.trace(*model_inputs(batch), drawn(what, number), task, targets)

        def used(what: str):
            return lambda numbers: warm.partly_used([drawn(what, number) for number in numbers])

        general = settings.general_phase
        on_step = reporter.steps("stage 3's supernet")
        result = train(
            warm,
            lambda epoch: workspace.general_plan(settings.general_share, general.per_device_train_batch_size, epoch),
            general_lesson(workspace).loss(trace_of("general"), fit_dense),
            general,
            phases[0],
            device=workspace.device,
            on_step=on_step,
            partly_used=used("general"),
        )
        must_finish(result, "stage 3's general distillation", "--stage3.general_phase.learning_rate")
        losses = {
            name: task_lesson(workspace, name).loss(trace_of("tasks", name), fit_dense) for name in workspace.tasks
        }
        tasks_result = train(
            warm,
            lambda epoch: mixed_tasks(workspace, settings, epoch),
            lambda item, number: losses[item.task](item.batch, number),
            settings.task_phase,
            phases[1],
            device=workspace.device,
            on_step=on_step,
            partly_used=used("tasks"),
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
    return MixedPlan(plans, workspace.config.seed, epoch, workspace.config.task_temperature)


def load_supernet(workspace: Workspace, folder: Path) -> Supernet:
    """A supernet kept by `keep`: always read back, so that a fresh run and a resumed one go on from the same bytes."""
    return own_memory(Supernet.from_pretrained(folder)).to(workspace.device).eval()
