"""The warm-up and the three stages, each from a distilled supernet, chained without a person in between.

A stage goes by cohorts: the sampler proposes a cohort of candidates, all are evaluated rung by rung, and the sampler is
told how they did before it proposes the next. Several workers may share a stage: each takes its part of a cohort, and
what they decide on follows from the study alone, so all decide the same. Stages 1 and 2 extract every candidate from
the warm supernet and train it (effbert.search.population), stage 3 scores candidates on weights they share
(effbert.search.shared). A candidate is in the study before it starts, and each of its values as soon as it is there.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from effbert import random
from effbert.architecture import Architecture
from effbert.checkpoint import own_memory
from effbert.config import SearchStage
from effbert.engine import Phase, TrainingResult, forget
from effbert.search.budget import fitness, ladder, survivors
from effbert.search.pareto import best_front, fronts, point
from effbert.search.population import Evaluator, Member, Outcome
from effbert.search.progress import Reporter, StageLine
from effbert.search.record import FIRST_SUPERNET, losses_file
from effbert.search.report import comparison
from effbert.search.sampler import Sampler, SpaceExhausted, make_sampler
from effbert.search.screen import DISCARDED, SCREENED, STAYS, Screen
from effbert.search.space import Space
from effbert.search.study import Evaluation, StageStudy, TakenOver
from effbert.search.workers import SHARING, Workers
from effbert.start import fresh_projection, load_start, read_weights
from effbert.student import distil_generally
from effbert.supernet import Supernet, supernet_config
from effbert.workspace import Workspace, keep, must_finish

POLL_SECONDS = 1.0  # between two looks at whether the other workers are done with a rung


def search_stage(
    stage: StageStudy,
    name: str,
    space: Space,
    settings: SearchStage,
    seed: int,
    evaluator: Evaluator,
    first: Architecture | None,
    reporter: Reporter,
    workers: Workers,
    after_cohort: Callable[[], None] = lambda: None,
) -> Architecture:
    """Cohort after cohort, until the study holds settings.num_candidates; returns the best architecture.

    first: the architecture the stage starts from, evaluated as candidate 0. after_cohort: called when one is done. The
    sampler's state is rebuilt from the study alone. A space with fewer architectures ends the stage early. Of equal
    values that which no other beats in what evaluator.minimize names is best. ValueError where no candidate has one.
    """
    sampler = make_sampler(settings.sampler, space, settings.initial_samples, settings.refit_every)
    finished = sum(evaluation.state != "running" for evaluation in stage.evaluations())
    line, points = reporter.stage(name, settings.num_candidates, finished), []
    for begin in range(0, settings.num_candidates, settings.cohort):
        numbers = range(begin, min(begin + settings.cohort, settings.num_candidates))
        with workers.turn(SHARING):
            members = propose(stage, name, space, sampler, numbers, seed, first, reporter)
        trained = run_cohort(stage, members, space, settings, evaluator, line, workers)
        cohort = [evaluation for evaluation in stage.evaluations() if evaluation.number in numbers]
        told = fitness(cohort, len(ladder(settings, len(trained))))
        for number, architecture in members:
            sampler.tell(architecture, told[number])
        if evaluator.minimize:  # what counts is how many fronts lie before a candidate, and later ones change that
            scored = [evaluation for evaluation in cohort if told[evaluation.number] is not None]
            points += [point(told[evaluation.number], evaluation, evaluator.minimize) for evaluation in scored]
            sampler.revise([-float(front) for front in fronts(points)])
        after_cohort()
        if len(members) < len(numbers):
            break
    line.close()
    evaluations = stage.evaluations()
    front = best_front(evaluations, evaluator.minimize)
    if not front:
        raise ValueError(f"{name}: {_why_none(evaluations, name)}")
    best = front[0]
    reporter.say(f"{name}: {comparison(evaluations, best, evaluator.metric)}")
    return Architecture.parse(best.architecture)


def _why_none(evaluations: Sequence[Evaluation], name: str) -> str:
    """Why no candidate has a value."""
    reasons = [e.attrs[DISCARDED] for e in evaluations if DISCARDED in e.attrs]
    if len(reasons) == len(evaluations):
        return f"every candidate was discarded before it trained (the last {reasons[-1]}): raise the limits"
    reasons = [e.attrs["reason"] for e in evaluations if "reason" in e.attrs]
    return f"every candidate that trained diverged (the last: {reasons[-1]}): lower the learning rates of --{name}"


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
    known = {e.number: Architecture.parse(e.architecture) for e in stage.evaluations() if e.number in numbers}
    members = []
    for number in numbers:
        if number in known:
            architecture = known[number]
            sampler.asked(architecture)
        else:
            known_good = {STAYS: True} if number == 0 and first is not None else {}  # where the stage starts from
            if known_good:
                architecture = first
                sampler.asked(architecture)
            else:
                try:
                    architecture = sampler.ask(random.generator(seed, name, "ask", number))
                except SpaceExhausted as exhausted:
                    reporter.say(f"{name} ends after {number} candidates: {exhausted}")
                    break
            stage.begin(number, str(architecture), space.key(architecture), **known_good)
        members.append((number, architecture))
    return members


def run_cohort(
    stage: StageStudy,
    members: Sequence[Member],
    space: Space,
    settings: SearchStage,
    evaluator: Evaluator,
    line: StageLine,
    workers: Workers,
) -> list[Member]:
    """Every rung of a cohort, from where the study says it stands: evaluate, then drop all but the best. Returns when
    all workers together are done with it: those that were not discarded before."""
    if evaluator.screen is not None:
        with workers.turn("a first look at candidates"):
            members = screened(stage, members, space, evaluator.screen, line)
    architectures, rungs = dict(members), ladder(settings, len(members)) if members else []
    keys = {number: space.key(architecture) for number, architecture in members}
    for index, rung in enumerate(rungs):
        last = rung.share == 1
        while True:
            with workers.turn(SHARING):  # also to see what is due: outside, others may report it before it is taken
                due = sorted(n for n, e in _running(stage, keys).items() if len(_rungs(e)) == index)
                taken = _part(stage, {number: architectures[number] for number in due}, evaluator, workers)
            if not due:
                break
            if not taken:
                time.sleep(POLL_SECONDS)
                line.catch_up(_ended(stage))
                continue
            with workers.turn("the teacher's outputs"):
                evaluator.prepare()
            before = _running(stage, taken)
            for number, outcome in evaluator.evaluate([(n, architectures[n]) for n in taken], rung.share):
                with workers.turn(SHARING):
                    counted = record(stage, before[number], index, rung.share, outcome, line)
                if counted and (last or outcome.diverged):
                    _show(stage, line, outcome, evaluator.metric)
        if not last:
            with workers.turn(SHARING):
                _drop(stage, keys, index, rungs[index + 1].places, rung.share, line, evaluator.minimize)
    return list(members)


def _part(stage: StageStudy, due: dict[int, Architecture], evaluator: Evaluator, workers: Workers) -> list[int]:
    """Take this worker's part of what is due, as far as nobody trains it."""
    if not due:
        return []
    room = evaluator.room(list(due.values()))
    return stage.take(list(due), min(room, math.ceil(len(due) / (len(workers.others()) + 1))))


def screened(
    stage: StageStudy, members: Sequence[Member], space: Space, screen: Screen, line: StageLine
) -> list[Member]:
    """The members of a cohort that are worth training; the others are pruned, with what was found of them. The winner
    of the stage before, always stays."""
    there = {evaluation.number: evaluation for evaluation in stage.evaluations()}
    found, keys = {}, {}
    for number, architecture in members:
        keys[number], attrs = space.key(architecture), there[number].attrs
        if SCREENED not in attrs:
            seen = {**screen.look(architecture), SCREENED: True}
            stage.note(number, **seen)
            attrs = attrs | seen
        found[number] = attrs
    gone = screen.discard(found, keys)
    for number, reason in sorted(gone.items()):
        if there[number].state == "running":
            stage.prune(number, **{DISCARDED: reason})
            line.done_one(f"candidate {number} {reason}", _ended(stage))
    return [member for member in members if member[0] not in gone]


def _drop(
    stage: StageStudy,
    keys: dict[int, str],
    rung: int,
    places: int,
    share: float,
    line: StageLine,
    minimize: Sequence[str],
) -> None:
    """Stop all but the best of a rung, where no other worker has done so."""
    there = {number: found for number, found in _running(stage, keys).items() if _rungs(found)[rung:]}
    values = {number: _rungs(found)[rung] for number, found in there.items()}
    ranks = fronts([point(values[number], found, minimize) for number, found in there.items()])
    stay = survivors(values, keys, places, dict(zip(there, ranks, strict=True)) if minimize else None)
    if len(stay) < len(values) and len(set(ranks)) == len(set(values.values())) == 1:
        told = f"{share:.2g} of the budget tells none of {len(values)} candidates apart"
        line.reporter.say(f"{told}: {len(stay)} go on by their names alone; a larger share might")
    for number in sorted(values.keys() - set(stay)):
        stage.prune(number)
        line.done_one(f"candidate {number} stops at {values[number]:.4f}, {share:.2g} of the budget", _ended(stage))


def _ended(stage: StageStudy) -> int:
    return sum(evaluation.state != "running" for evaluation in stage.evaluations())


def _running(stage: StageStudy, numbers) -> dict[int, Evaluation]:
    return {e.number: e for e in stage.evaluations() if e.state == "running" and e.number in numbers}


def _rungs(evaluation: Evaluation) -> list[float]:
    return evaluation.attrs.get("rungs", [])


def record(stage: StageStudy, before: Evaluation, rung: int, share: float, outcome: Outcome, line: StageLine) -> bool:
    """Commit what a rung gave, that share of the budget, its costs added to those of the rungs before, and only then
    let its checkpoints go.

    False where another worker has the candidate by now: this outcome is not counted.
    """
    number, attrs = before.number, dict(outcome.attrs)
    if outcome.value is not None:
        attrs["shares"] = [*before.attrs.get("shares", [])[:rung], share]
    if "seconds" in attrs:
        here = {cost: attrs[cost] for cost in ("seconds", "tokens")}
        attrs["spent"] = [*before.attrs.get("spent", [])[:rung], here]  # a commit that was cut short may hold this rung
        attrs |= {cost: sum(spent[cost] for spent in attrs["spent"]) for cost in here}
    try:
        if outcome.value is None:
            stage.fail(number, outcome.diverged, **attrs)
        elif share == 1:
            stage.complete(number, outcome.value, **attrs)
        else:
            stage.report(number, rung, outcome.value, **attrs)
    except TakenOver as lost:
        line.reporter.say(f"{lost}; its outcome here is dropped")
        return False
    forget(outcome.phases)
    return True


def _show(stage: StageStudy, line: StageLine, outcome: Outcome, metric: str) -> None:
    best = stage.best()
    line.advance(
        f"{outcome.diverged or f'{metric} {outcome.value:.4f}'}  {outcome.attrs['parameters']:,} parameters",
        "none" if best is None else f"{best.value:.4f} (candidate {best.number})",
        _ended(stage),
    )


def candidate_start(workspace: Workspace, reporter: Reporter) -> tuple[Workspace, Supernet]:
    """What the candidates of stages 1 and 2 learn from, and the warm supernet that they begin with."""
    if not workspace.config.other_corpus:
        return workspace, warm_supernet(workspace, reporter)
    first = replace(workspace, corpus=workspace.candidate_corpus)
    return first, warm_supernet(first, reporter, FIRST_SUPERNET)


def warm_supernet(workspace: Workspace, reporter: Reporter, name: str = "supernet") -> Supernet:
    """The supernet after general distillation with all its weights, or begun with those of --start_from, kept in
    <run>/<name>; data-parallel."""
    config, target, world = workspace.config, workspace.folder / name, workspace.world
    phase = Phase((name, "general"), config.seed, workspace.folder / f"{name}.pt")
    if not target.exists():
        specs = [task.spec for task in workspace.tasks.values()]
        torch.manual_seed(random.key(config.seed, "supernet", "init"))
        base = supernet_config(workspace.student_config(), config.student.num_hidden_layers)
        supernet = Supernet(base, specs).to(workspace.device)
        results = {}
        if config.start_from:
            load_start(supernet, config.start_from[0])
            note = fresh_projection(supernet.config, config.start_from[0])
            if note:
                reporter.say(note)
            reporter.say(f"{name}: that of {config.start_from[0]}, {supernet.num_parameters():,} parameters")
        else:
            results["general"] = distilled_supernet(workspace, supernet, name, phase, reporter)
        tokenizer = workspace.student_tokenizer
        beside = losses_file({part: result.losses for part, result in results.items()})
        world.on_first(partial(keep, supernet, target, *results.values(), tokenizer=tokenizer, beside=beside))
    forget([phase])
    return load_supernet(workspace, target)


def distilled_supernet(
    workspace: Workspace, supernet: Supernet, name: str, phase: Phase, reporter: Reporter
) -> TrainingResult:
    """General distillation of a supernet in place."""
    config, world = workspace.config, workspace.world
    reporter.say(f"{name}: general distillation, {supernet.num_parameters():,} parameters")
    (result,) = distil_generally(workspace, [supernet], config.supernet, [phase], reporter.steps(name), world)
    must_finish(result, f"general distillation of {name}", "--supernet.learning_rate")
    rate = result.tokens / max(result.seconds, 1e-9)
    reporter.say(
        f"{name}: loss {result.loss:.4f} after {result.tokens:,} tokens in {result.seconds:.0f} s "
        f"({rate:,.0f} tokens/s)"
    )
    return result


def load_supernet(workspace: Workspace, folder: Path) -> Supernet:
    """A supernet kept by `keep`: always read back, so that a fresh run and a resumed one go on from the same bytes.
    ValueError, in one line, where its folder is damaged."""
    try:
        supernet, _ = read_weights(Supernet, folder, str(folder), may_lack=())
    except ValueError as error:
        raise ValueError(f"{error}; delete {folder}, and the same command makes this supernet again") from error
    return own_memory(supernet).to(workspace.device).eval()
