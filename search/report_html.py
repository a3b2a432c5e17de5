"""The report of a run as one HTML page that needs nothing else: `effbert report RUN`, finished or still under way.

The one idea: the page is a function of the run's folder. Each section is a function of what the folder tells, and says
in words what is not there yet. No script, no font, no address: figures are SVG in the page, light or dark as the reader
has it.
"""

import json
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from effbert.architecture import Architecture, Dimensions, mlp_parameters
from effbert.data.tasks import scored_by
from effbert.errors import first_line
from effbert.files import write_atomic
from effbert.kernels.expression import ExpressionError
from effbert.search import pareto, report
from effbert.search.figures import Chart, Point, bars, best_so_far, escape, intervals, tag, tree
from effbert.search.record import AGREEMENT, FIRST_SUPERNET, LOSSES, STAGES, Plan, Record, read_record
from effbert.search.screen import DISCARDED
from effbert.search.study import Evaluation

REPORT_FILE = "report.html"

_STAGE_NAMES = {"stage1": "Stage 1: coarse", "stage2": "Stage 2: operations", "stage3": "Stage 3: fine"}
_NOTES = {
    "progress": "Stage 1 changes expressions and linear structures together, stage 2 the expressions alone, stage 3 "
    "the linear structures, scored on weights that its candidates share. Values of different stages do not compare.",
    "front": "Candidates with the whole budget; one is dominated where another costs no more and is worth no less.",
    "rungs": "A cohort is trained on a share of the budget, its best then on a larger one.",
    "curves": "A loss is the mean of up to ten steps, over the share of the phase's whole budget that was spent by "
    "then. The curve of a candidate that stopped early, or failed, is that of its last rung, over less data; on such a "
    "rung it is scored after its last epoch only.",
}
_STATES = {"complete": "●", "pruned": "○", "discarded": "–", "failed": "×", "running": "◌"}
_WORDS = {
    "complete": "whole budget",
    "pruned": "stopped early",
    "discarded": "discarded before training",
    "failed": "failed",
    "running": "under way",
}
_PHASES = {"general": "on text", "task": "on the task", "tasks": "on all tasks"}
_LAYERS = ("pruned", "failed", "running", "complete")  # of lines, from the lowest
_COSTS = {"parameters": "parameters", "flops": "FLOPs of one sequence", "latency_ms": "latency, ms"}
_COST_ORDER = ("teacher", FIRST_SUPERNET, "supernet", "stage1", "stage2", "stage3", "final")
_TOP = 10


def write_report(folder: str | Path, output: str | Path | None = None, storage: str = "") -> Path:
    """Write the report of the run, or plan, in `folder`, to <folder>/report.html if `output` is None; returns where.

    storage: URL of the run's database, where its configuration keeps it without the password.

    ValueError, in one line, where the folder holds no run, a file of it is damaged, or `output` can be no file.
    """
    path = Path(folder) / REPORT_FILE if output is None else Path(output)
    try:
        record = read_record(folder, storage)
        if path.is_dir() or not path.parent.is_dir():
            raise ValueError(f"{path}: give a file name in a folder that exists as --output")
        text = page(record)
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(
            f"{folder}: no page can be drawn of this run, a file of it may be damaged: {reason}"
        ) from error
    write_atomic(path, text)
    return path


@dataclass(frozen=True)
class Candidate:
    """An evaluation as the figures need it.

    score: its value, or while it has none the one on its last rung. rungs: (share of the budget, value) in order.
    epochs: the metric after each epoch. losses: (share of the budget, loss) of each phase of its last rung.
    """

    evaluation: Evaluation
    score: float | None
    rungs: list[tuple[float, float]]
    epochs: list[float]
    losses: dict[str, list[Point]]

    @property
    def kind(self) -> str:
        """What became of it: its state, or that it was discarded before it trained."""
        return "discarded" if DISCARDED in self.evaluation.attrs else self.evaluation.state

    @property
    def hint(self) -> str:
        """One line about it."""
        score = "no value" if self.score is None else f"{self.score:.4f}"
        if self.evaluation.state != "complete" and self.rungs:
            score += f" at {self.rungs[-1][0]:.0%} of the budget"
        parameters = _finite(self.evaluation.attrs.get("parameters"))
        return f"candidate {self.evaluation.number}: {score}" + (
            f", {parameters:,.0f} parameters" if parameters else ""
        )


def page(record: Record) -> str:
    """The report as HTML."""
    metric, ranking = metrics_of(record)
    stages = {name: candidates(record, name, ranking) for name in STAGES}
    sections: list[tuple[str, str, str]] = [
        ("final", "Final comparison", final_section(record, metric)),
        ("winner", "The winner, layer by layer", winner_section(record, stages)),
        ("progress", "Candidates and the best so far", _each("progress", stages, record, ranking, progress)),
        ("front", "Pareto front: value against cost", _each("front", stages, record, ranking, fronts)),
        ("rungs", "Who reached which rung", _each("rungs", stages, record, ranking, survival)),
        ("agreement", "Do early values predict late ones?", agreement_section(record)),
        ("curves", "Learning curves", _each("curves", stages, record, ranking, curves, _more_curves(record))),
        ("cost", "Where the time went", cost_section(record)),
        ("settings", "Environment and configuration", settings_section(record, metric, ranking)),
    ]
    title = f"effbert: search on {record.config.get('task', 'a task')}"
    links = "".join(tag("a", escape(head), href=f"#{name}") for name, head, _ in sections)
    body = "".join(tag("section", tag("h2", escape(head)), content, id=name) for name, head, content in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body><header><h1>{escape(title)}</h1>{summary(record, stages, metric, ranking)}<nav>{links}</nav></header>\n"
        f"<main>{body}</main></body></html>\n"
    )


def metrics_of(record: Record) -> tuple[str, str]:
    """The task's metric, as the results name it, before there are any as the first of the candidates' scores, and
    before there are those as the task's name tells; and the one that ranks them."""
    evaluations = (evaluation for found in record.stages.values() for evaluation in found)
    scores = next((list(scores) for scores in (e.attrs.get("scores") for e in evaluations) if scores), None)
    scores = scores or _scores_of(record.config)
    metric = scores[0] if record.results is None else str(record.results.get("metric", "value"))
    ranking = record.config.get("ranking_metric")
    return metric, ranking if ranking in scores else metric


def _scores_of(config: dict) -> list[str]:
    """Names of the scores that a candidate of this search will have, the task's metric first."""
    try:
        kind, metrics = scored_by(str(config.get("task", "")), bool(config.get("train_file")), config.get("task_kind"))
    except ValueError:  # a task that this version does not know
        return ["value"]
    return [*metrics, "roc_auc"] if kind == "classification" else list(metrics)


def candidates(record: Record, stage: str, metric: str) -> list[Candidate]:
    """The candidates of a stage, with the share of the budget that each of their values was reached with."""
    found = []
    for evaluation in record.stages[stage]:
        rungs = list(zip(evaluation.attrs.get("shares") or [], evaluation.attrs.get("rungs") or [], strict=False))
        last = rungs[-1][1] if rungs else None
        epochs = [_finite(scores.get(metric)) for scores in evaluation.attrs.get("epochs") or []]
        score = last if evaluation.value is None else evaluation.value
        losses = evaluation.attrs.get(LOSSES) or {}
        found.append(Candidate(evaluation, score, rungs, [value for value in epochs if value is not None], losses))
    return found


def summary(record: Record, stages: dict[str, list[Candidate]], metric: str, ranking: str) -> str:
    """How far the run is, and its outcome in a few numbers."""
    finished = [c for found in stages.values() for c in found if c.evaluation.state != "running"]
    planned = sum((record.config.get(name) or {}).get("num_candidates", 0) for name in stages)
    rows = {row["row"]: row for row in final_rows(record, metric)}
    origin, _, best = winner_of(record, stages)
    tiles = []
    if "winner" in rows:
        tiles.append((f"{metric} of the winner, held out", _of_row(rows["winner"])))
        tiles.append(("its parameters, deployed", f"{rows['winner']['parameters']:,.0f}"))
    elif best is not None:
        tiles.append((f"{ranking}, {origin}", f"{best.score:.4f}"))
        tiles.append(("its parameters", _whole(best.evaluation.attrs.get("parameters"))))
    of = f" of {planned:,}" if planned else ""
    tiles.append(("candidates evaluated", f"{len(finished):,}{of}"))
    tiles.append(
        (
            "training and stage 3's scoring",
            _duration(sum(seconds for _, parts, _ in costs(record) for seconds, _ in parts)),
        )
    )
    cells = "".join(tag("div", tag("dt", escape(name)), tag("dd", escape(value))) for name, value in tiles)
    return tag("p", escape(state(record, stages)), class_="state") + tag("dl", cells, class_="tiles")


def state(record: Record, stages: dict[str, list[Candidate]]) -> str:
    """One line: finished, or where the run stands."""
    if record.results is not None:
        return f"Finished {record.results.get('finished', '')}."
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.changed))
    plan = record.plan
    if plan is not None and plan.winner:
        told = f"{plan.left} of {plan.steps} steps of its plan are left" if plan.left else "so is its plan"
        return f"The search is finished, {told}. Last change {at}."
    if record.final:
        return f"Not finished: {len(record.final)} rows of the final table are done. Last change {at}."
    alone = record.stages.get(AGREEMENT)
    if alone:
        done, planned = sum(e.state != "running" for e in alone), record.config.get("agreement_candidates", "?")
        return f"Not finished: of {planned} candidates of stage 3 that train alone {done} are done. Last change {at}."
    begun = [name for name, found in stages.items() if found]
    if not begun:
        return f"Not finished: no candidate has been proposed yet. Last change {at}."
    done = sum(candidate.evaluation.state != "running" for candidate in stages[begun[-1]])
    planned = (record.config.get(begun[-1]) or {}).get("num_candidates", "?")
    failed = sum(candidate.evaluation.state == "failed" for candidate in stages[begun[-1]])
    lost = f", {failed} of which failed" if failed else ""
    return f"Not finished: {begun[-1]}, {done} of {planned} candidates{lost}. Last change {at}."


def winner_of(record: Record, stages: dict[str, list[Candidate]]) -> tuple[str, str, Candidate | None]:
    """(where from, architecture text, candidate) of the winner, or of the best candidate of the latest stage so far;
    empty text where no candidate is complete. The candidate is None where the results name the winner."""
    if record.results is not None and record.results.get("winner"):
        return "winner of the search", str(record.results["winner"]), None
    if record.plan is not None and record.plan.winner:
        return "winner of the search", record.plan.winner, None
    for name in reversed(stages):
        front = pareto.best_front([c.evaluation for c in stages[name]], record.config.get("minimize") or ())
        if front:
            best = next(candidate for candidate in stages[name] if candidate.evaluation is front[0])
            return f"best of {name} so far", best.evaluation.architecture, best
    return "", "", None


def final_rows(record: Record, metric: str) -> list[dict]:
    """The final table: from the results, or of the rows that are done."""
    if record.results is not None:
        return record.results.get("table") or []
    return report.summarise([row for row in record.final if not row["scores"] or metric in row["scores"]], metric)


def _of_row(row: dict) -> str:
    return report.score_text(row["score"], row["spread"], row.get("diverged", 0))


def final_section(record: Record, metric: str) -> str:
    """The final table and its scores side by side; of a plan its table."""
    if record.plan is not None:
        return plan_section(record.plan)
    rows = final_rows(record, metric)
    if not rows:
        return _missing("The final table is made after the last stage: none of its rows is there yet.")
    note = "" if record.results is not None else _missing("Not finished: rows are missing, the teacher's among them.")
    marks = [
        (row["row"], row["score"], row["score"] - (row["spread"] or 0), row["score"] + (row["spread"] or 0))
        for row in rows
        if row["score"] is not None
    ]
    repeats = max(row["repeats"] + row.get("diverged", 0) for row in rows)
    spread = "mean ± standard deviation" if repeats > 1 else "one run each"
    picture = ""
    if marks:
        about = f"{metric} of {len(marks)} rows on held-out rows"
        picture = tag(
            "figure", intervals("final-scores", "Scores of the final table", about, marks, metric, strong="winner")
        )
    cells = [
        (
            row["row"],
            _of_row(row),
            _whole(row.get("parameters")),
            _scaled(row.get("flops"), 1e6),
            _scaled(row.get("latency_ms"), 1, 2),
        )
        for row in rows
    ]
    head = ("row", metric, "parameters", "MFLOPs", "CPU ms (batch 1)")
    task_phase = record.config.get("final", {}).get("task_phase", {})
    chosen = report.chosen_by(task_phase.get("load_best_model_at_end", False))
    caption = f"{metric} on held-out rows{chosen}, {spread}; costs of the deployed model"
    return (
        note
        + tag(
            "p",
            "Every student was distilled from the same teacher with the same budget. ",
            escape(report.verdict(rows, (record.results or {}).get("results") or record.final, metric)),
        )
        + tag("div", picture, _table(caption, head, cells), class_="figures")
    )


def plan_section(plan: Plan) -> str:
    """Winner and rivals on every task."""
    if not plan.results:
        return _missing("The plan distils winner and rivals on every task: the table comes after the last of them.")
    head, *lines = report.plan_rows(plan.results["tasks"])
    chosen = report.chosen_by(plan.results.get("chosen_by_these_rows", False))
    return _table(f"scores on {report.OFFICIAL}{chosen}", head, lines)


def winner_section(record: Record, stages: dict[str, list[Candidate]]) -> str:
    """Every layer of the winner as a tree."""
    origin, text, candidate = winner_of(record, stages)
    sizes = record.config.get("student") or {}
    if not text:
        return _missing("No candidate has got the whole budget yet.")
    try:
        architecture = Architecture.parse(text)
        dims = Dimensions(hidden_size=sizes["hidden_size"], intermediate_size=sizes["intermediate_size"])
    except (ExpressionError, KeyError) as error:
        return _missing(f"It cannot be drawn ({error}): {text}")
    which = origin if candidate is None else f"{origin}, candidate {candidate.evaluation.number}"
    cards = []
    for number, layer in enumerate(architecture.layers, start=1):
        stacks, inner = layer.structure.stacks, layer.structure.inner_width(dims.intermediate_size)
        times = f"{stacks} in a row" if stacks > 1 else "1"
        facts = (
            f"MLPs: {times}, inner width {inner} of {dims.intermediate_size}, "
            f"{mlp_parameters(layer.structure, dims):,} parameters"
        )
        title = f"Layer {number}: {layer}"
        picture = tree(f"layer-{number}", title, facts, layer, dims.hidden_size, inner)
        cards.append(
            tag("figure", tag("h3", f"Layer {number}"), picture, tag("figcaption", escape(facts), _code(layer)))
        )
    note = (
        "Read from below: x comes in, W1 and W2 are the linears with their widths; a sheet for each MLP of the layer."
    )
    return tag("p", escape(f"{which[0].upper()}{which[1:]}. {note}")) + tag("div", *cards, class_="figures trees")


def progress(name: str, stage: list[Candidate], record: Record, metric: str) -> str:
    """Every candidate of a stage, the best so far as a line, and the best ones as a table."""
    scored = [candidate for candidate in stage if candidate.score is not None]
    complete = [candidate for candidate in scored if candidate.evaluation.state == "complete"]
    counts = Counter(candidate.kind for candidate in stage)
    legend = "".join(_key(kind, f"{counts[kind]} {_WORDS[kind]}") for kind in _STATES if counts[kind])
    if not scored:
        return _missing(_no_value(stage)) + tag("p", legend) + _reasons(stage)
    chart = Chart(
        [candidate.evaluation.number for candidate in stage],
        [candidate.score for candidate in scored],
        "candidate",
        metric,
        whole=True,
    )
    for kind in ("pruned", "running", "complete"):
        _put(chart, [c for c in scored if c.evaluation.state == kind], kind)
    failed = [candidate for candidate in stage if candidate.evaluation.state == "failed"]
    chart.crosses([c.evaluation.number for c in failed], "failed", [c.hint for c in failed])
    said, compared = f"{len(stage)} candidates, none with the whole budget yet", ""
    if complete:
        best = max(complete, key=lambda candidate: candidate.score)
        stairs = best_so_far((c.evaluation.number, c.score) for c in complete)
        chart.lines([[*stairs, (stage[-1].evaluation.number, best.score)]], "best")
        chart.label((best.evaluation.number, best.score), f"{best.score:.4f}")
        said = f"{len(stage)} candidates, best {best.score:.4f}, candidate {best.evaluation.number}"
        told = report.comparison([candidate.evaluation for candidate in complete], best.evaluation, metric)
        compared = tag("p", escape(f"{told[0].upper()}{told[1:]}."))
    picture = chart.svg(f"{name}-progress", f"{_STAGE_NAMES.get(name, name)}: {metric} of every candidate", said)
    legend += _key("best", "best so far", "━") if complete else ""
    return _figures([(picture, legend)]) + compared + _reasons(stage) + _best_table(complete, metric)


def _no_value(stage: list[Candidate]) -> str:
    if any(candidate.evaluation.state == "running" for candidate in stage):
        return f"{len(stage)} candidates are begun, none has a value yet."
    return f"Of {len(stage)} candidates none has a value."


def _reasons(stage: list[Candidate]) -> str:
    """Why candidates failed or were discarded, the commonest reasons; one of those that differ in numbers alone."""
    alike: dict[str, list[str]] = {}
    for candidate in stage:
        attrs, reason = candidate.evaluation.attrs, ""
        if candidate.kind == "failed":
            reason = f"failed: {attrs.get('reason', 'no reason given')}"
        elif candidate.kind == "discarded":
            reason = f"discarded before training: {str(attrs[DISCARDED]).rpartition(', ')[2]}"
        if reason:
            alike.setdefault(re.sub(r"\d[\d.e+-]*", "", reason), []).append(reason)
    common = sorted(alike.values(), key=len, reverse=True)[:4]
    told = [f"{len(found)} {found[0]}{', the first of them' if len(set(found)) > 1 else ''}" for found in common]
    rest = sum(map(len, alike.values())) - sum(map(len, common))
    return "".join(tag("p", escape(line)) for line in [*told, *([f"{rest} for other reasons"] if rest else [])])


def _best_table(complete: list[Candidate], metric: str) -> str:
    if not complete:
        return ""
    ranked = sorted(complete, key=lambda candidate: (-candidate.score, candidate.evaluation.number))[:_TOP]
    rows = [_cells(candidate) for candidate in ranked]
    title = f"The best {len(ranked)} of {len(complete)} with the whole budget"
    return _details(title, _table(title, ("candidate", metric, "parameters", "MFLOPs", "architecture"), rows))


def _cells(candidate: Candidate) -> tuple:
    own = candidate.evaluation
    return (
        own.number,
        f"{candidate.score:.4f}",
        _whole(own.attrs.get("parameters")),
        _scaled(own.attrs.get("flops"), 1e6),
        own.architecture,
    )


def fronts(name: str, stage: list[Candidate], record: Record, metric: str) -> str:
    """Value against each cost that is recorded, with the candidates that no other beats."""
    complete = [candidate for candidate in stage if candidate.evaluation.state == "complete"]
    if not complete:
        return _missing("No candidate has got the whole budget yet.")
    parts = [_front(name, cost, complete, metric) for cost in _COSTS]
    return "".join(parts) or _missing("No cost was recorded beside the values.")


def _front(name: str, cost: str, complete: list[Candidate], metric: str) -> str:
    known = [c for c in complete if _finite(c.evaluation.attrs.get(cost)) is not None]
    points = [(float(c.evaluation.attrs[cost]), c.score) for c in known]
    costs_seen = {x for x, _ in points}
    if not points:
        return ""
    if len(costs_seen) == 1:
        number = f"{costs_seen.pop():,.6g}" if cost == "latency_ms" else f"{costs_seen.pop():,.0f}"
        return _missing(f"The same for all {len(points)} candidates: {number} {_COSTS[cost]}.")
    chosen = sorted(pareto.best([(-x, y) for x, y in points]), key=points.__getitem__)
    chart = Chart([x for x, _ in points], [y for _, y in points], _COSTS[cost], metric)
    dominated = sorted(set(range(len(points))) - set(chosen))
    chart.dots([points[index] for index in dominated], "dominated", [known[index].hint for index in dominated])
    stairs = best_so_far(points[index] for index in chosen)
    chart.lines([[*stairs, (max(costs_seen), stairs[-1][1])]], "front")
    chart.dots([points[index] for index in chosen], "front", [known[index].hint for index in chosen], radius=4)
    for index in reversed(chosen):
        chart.label(points[index], str(known[index].evaluation.number))
    said = f"{len(chosen)} of {len(points)} candidates are dominated by no other in {metric} and {_COSTS[cost]}"
    title = f"{_STAGE_NAMES.get(name, name)}: {metric} against {_COSTS[cost]}"
    legend = _key("front", f"{len(chosen)} on the front, with their numbers", "●")
    legend += _key("dominated", f"{len(dominated)} dominated", "●")
    table = _table(
        said, ("candidate", metric, "parameters", "MFLOPs", "architecture"), [_cells(known[i]) for i in chosen]
    )
    picture = _figures([(chart.svg(f"{name}-front-{cost}", title, said), legend)])
    return tag("div", picture, _details("The front as a table", table))


def survival(name: str, stage: list[Candidate], record: Record, metric: str) -> str:
    """How many candidates reached each rung, and what they were worth there."""
    shares = sorted({share for candidate in stage for share, _ in candidate.rungs})
    planned = (record.config.get(name) or {}).get("rungs") or [1.0]
    if len(planned) < 2:
        return _missing("One rung: every candidate gets the whole budget.")
    if not shares:
        return _missing(_no_value(stage))
    labels = [f"{share:.0%}" for share in shares]
    rows = []
    for share, label in zip(shares, labels, strict=True):
        here = [c for c in stage if share in dict(c.rungs)]
        values = [dict(c.rungs)[share] for c in here]
        stopped = Counter(c.evaluation.state for c in here if c.rungs[-1][0] == share)
        went_on = len(here) - sum(stopped.values()) + stopped["complete"]
        parts = [(went_on, "complete"), (stopped["pruned"], "pruned"), (stopped["failed"], "failed")]
        parts.append((stopped["running"], "running"))
        value = f"{len(here)} reached it · median {statistics.median(values):.4f} · best {max(values):.4f}"
        rows.append((label, value, [(count, kind) for count, kind in parts if count]))
    reached = ", ".join(f"{row[0]}: {row[1]}" for row in rows)
    title = _STAGE_NAMES.get(name, name)
    counts = bars(f"{name}-rungs", f"{title}: candidates on each rung", reached, rows)
    places = {share: place for place, share in enumerate(shares)}
    chart = Chart((), [v for c in stage for _, v in c.rungs], "share of the budget", metric, x_names=labels)
    for kind in _LAYERS:
        lines = [[(places[share], value) for share, value in c.rungs] for c in stage if c.evaluation.state == kind]
        chart.lines([line for line in lines if len(line) > 1], kind)
        chart.dots([point for line in lines for point in line], kind, radius=1.8)
    values = chart.svg(f"{name}-rung-values", f"{title}: {metric} on each rung", reached)
    legend = _key("complete", "went on, or has the whole budget") + _key("pruned", "stopped there")
    return _figures(
        [(counts, legend), (values, "A line for each candidate, through its values on the rungs it reached.")]
    )


def agreement_section(record: Record) -> str:
    """Rank agreement with its intervals."""
    if not record.agreement:
        return _missing("No rank agreement is recorded in this run (agreement.json is not there).")
    cells, marks = [], []
    for entry in record.agreement:
        estimate, low, high = (_finite(entry.get(name)) for name in ("kendall", "low", "high"))
        label = f"{entry.get('stage', '')}: {entry.get('what', '')}"
        count = entry.get("candidates", "–")
        tau = "too few" if count in (0, 1) else _scaled(estimate, 1, 3)
        cells.append((label, tau, _scaled(low, 1, 3), _scaled(high, 1, 3), count))
        if None not in (estimate, low, high):
            marks.append((label, estimate, low, high))
    note = (
        "Kendall's τ between two rankings of the same candidates: 1 the same order, 0 no relation, -1 the reverse. "
        "An interval across 0 leaves it open whether the cheap ranking says anything. Those that went on, or were let "
        "through, are the better ones, whose ranks agree less than those of all candidates would."
    )
    picture = ""
    if marks:
        said = "; ".join(f"{label} {estimate:.2f} ({low:.2f} to {high:.2f})" for label, estimate, low, high in marks)
        ends = (min(-0.1, *(low for _, _, low, _ in marks)), 1.0)
        picture = tag("figure", intervals("rank-agreement", "Rank agreement", said, marks, "Kendall's τ", ends))
    head = ("rankings compared", "τ", "low", "high", "candidates")
    table = _table("Rank agreement with its intervals", head, cells)
    return tag("p", escape(note)) + tag("div", picture, table, class_="figures")


def curves(name: str, stage: list[Candidate], record: Record, metric: str) -> str:
    """Loss and metric of candidates as they trained, a line for each; and the loss of a supernet of the stage's own."""
    figures, note = _supernet_curves(record, f"{name}/supernet"), ""
    complete = [candidate for candidate in stage if candidate.evaluation.state == "complete"]
    best = max(complete, key=lambda candidate: candidate.score, default=None)
    if figures:
        note = _missing("Candidates are scored without training, on the weights of this supernet.")
    for phase in dict.fromkeys(phase for candidate in stage for phase, points in candidate.losses.items() if points):
        figures.append(_candidate_losses(name, phase, stage, best))
    if any(len(candidate.epochs) > 1 for candidate in stage):
        figures.append(_epochs(name, [candidate for candidate in stage if len(candidate.epochs) > 1], best, metric))
    return note + _figures(figures) if figures else _missing("No loss and no score after several epochs is recorded.")


def _candidate_losses(name: str, phase: str, stage: list[Candidate], best: Candidate | None) -> tuple[str, str]:
    trained = [candidate for candidate in stage if candidate.losses.get(phase)]
    lines = [(f"thin {c.evaluation.state}", c.losses[phase]) for c in trained]
    said, told = f"{len(trained)} candidates", best is not None and bool(best.losses.get(phase))
    if told:
        lines.append(("best", best.losses[phase]))
        said += f"; the best, candidate {best.evaluation.number}: {_from_to(best.losses[phase])}"
    picture = _losses(f"{name}-losses", _STAGE_NAMES.get(name, name), phase, said, lines)
    return picture, _lines_key(trained, best if told else None)


def _epochs(name: str, trained: list[Candidate], best: Candidate | None, metric: str) -> tuple[str, str]:
    lines = {c.evaluation.number: [(epoch, v) for epoch, v in enumerate(c.epochs, start=1)] for c in trained}
    points = [point for line in lines.values() for point in line]
    chart = Chart([x for x, _ in points], [y for _, y in points], "epoch on the task", metric, whole=True)
    for kind in _LAYERS:
        chart.lines([lines[c.evaluation.number] for c in trained if c.evaluation.state == kind], f"thin {kind}")
    said, best = f"{len(trained)} candidates", best if best in trained else None
    if best is not None:
        line = lines[best.evaluation.number]
        chart.lines([line], "best")
        chart.dots(line, "best", [f"candidate {best.evaluation.number}, epoch {x}: {y:.4f}" for x, y in line], radius=3)
        said += f"; the best, candidate {best.evaluation.number}: " + ", ".join(f"{y:.4f}" for _, y in line)
    title = f"{_STAGE_NAMES.get(name, name)}: {metric} after each epoch"
    return chart.svg(f"{name}-curves", title, said), _lines_key(trained, best)


def _lines_key(drawn: list[Candidate], best: Candidate | None) -> str:
    """What the lines of candidates are, of those kinds that there are."""
    states = {candidate.evaluation.state for candidate in drawn}
    legend = "".join(_key(kind, _WORDS[kind], "━") for kind in _STATES if kind in states)
    return legend + (_key("best", f"candidate {best.evaluation.number}, the best", "━") if best is not None else "")


def _more_curves(record: Record) -> dict[str, str]:
    """The losses of what is no candidate: of warm-up supernets, and of the rows of the final table."""
    warm = [figure for name in (FIRST_SUPERNET, "supernet") for figure in _supernet_curves(record, name)]
    final = _final_curves(record)
    return {
        "Warm-up: the supernet": _figures(warm) if warm else _missing("No loss of the warm-up is there."),
        "Final rows": _figures(final) if final else _missing("No loss of a final row is there."),
    }


def _supernet_curves(record: Record, folder: str) -> list[tuple[str, str]]:
    name = folder.replace("/", "-")
    return [
        (_losses(f"{name}-losses", folder, phase, _from_to(points), [("complete", points)]), "")
        for phase, points in record.losses.get(folder, {}).items()
        if points
    ]


def _final_curves(record: Record) -> list[tuple[str, str]]:
    rows = [row for row in record.final or (record.results or {}).get("results") or [] if row.get(LOSSES)]
    rows.sort(key=lambda row: row["row"] == "winner")  # on top
    figures = []
    for phase in dict.fromkeys(phase for row in rows for phase, points in row[LOSSES].items() if points):
        drawn = [(row["row"], row[LOSSES][phase]) for row in rows if row[LOSSES].get(phase)]
        said = "; ".join(f"{row}: {_from_to(points)}" for row, points in drawn)
        lines = [("best" if row == "winner" else "complete", points) for row, points in drawn]
        picture = _losses("final-losses", "Final rows", phase, said, lines)
        figures.append((picture, _key("best", "winner", "━") + _key("complete", "the other rows", "━")))
    return figures


def _losses(name: str, whose: str, phase: str, said: str, lines: Sequence[tuple[str, Sequence[Point]]]) -> str:
    """Losses of a phase over the share of the budget, a line of its class each. What failed is cut off above all
    others."""
    steady = [y for kind, points in lines for _, y in points if not kind.endswith("failed")]
    values = steady or [y for _, points in lines for _, y in points]
    top = max(values)
    where = _PHASES.get(phase, phase)
    chart = Chart((0, 1), values, "share of the phase's budget", f"loss {where}")
    for layer in (*(f"thin {kind}" for kind in _LAYERS), "complete", "best"):
        drawn = [[(x, min(y, top)) for x, y in points] for kind, points in lines if kind == layer]
        chart.lines([line for line in drawn if len(line) > 1], layer)
        chart.dots([line[0] for line in drawn if len(line) == 1], layer, radius=1.8)
    return chart.svg(f"{name}-{phase}", f"{whose}: training loss {where}", said)


def _from_to(points: Sequence[Point]) -> str:
    return f"from {points[0][1]:.4g} to {points[-1][1]:.4g}"


def costs(record: Record) -> list[tuple[str, list[tuple[float, str]], int]]:
    """(part of the run, its seconds as (seconds, what became of it), its tokens), in the order of the run."""
    found = [
        (name, [(_finite(training.get("seconds")) or 0.0, "complete")], training.get("tokens") or 0)
        for name, training in record.training.items()
    ]
    for name, stage in record.stages.items():
        seconds = {kind: 0.0 for kind in _STATES}
        for evaluation in stage:
            seconds[evaluation.state] += _finite(evaluation.attrs.get("seconds")) or 0.0
        tokens = sum(evaluation.attrs.get("tokens") or 0 for evaluation in stage)
        if any(seconds.values()):
            found.append((f"{name} candidates", [(value, kind) for kind, value in seconds.items() if value], tokens))
    rows = record.final or (record.results or {}).get("results") or []
    final = sum(_finite(row.get("seconds")) or 0.0 for row in rows)
    if final:
        found.append(("final rows", [(final, "complete")], 0))
    order = {name: place for place, name in enumerate(_COST_ORDER)}
    return sorted(found, key=lambda part: order.get(re.split("[/ ]", part[0])[0], len(order)))


def cost_section(record: Record) -> str:
    """Seconds in training loops and of untrained candidates' scores by part, and what became of them."""
    parts = costs(record)
    if not parts:
        return _missing("No training has ended yet.")
    total = sum(seconds for _, split, _ in parts for seconds, _ in split)
    rows, cells = [], []
    for name, split, tokens in parts:
        seconds = sum(value for value, _ in split)
        share = f"{seconds / total:.0%}" if total else "–"
        rows.append((name, f"{_duration(seconds)} · {share}", split))
        spent = {kind: value for value, kind in split}
        lost = [f"{spent[kind]:,.0f}" if kind in spent else "–" for kind in ("pruned", "failed")]
        cells.append((name, f"{seconds:,.1f}", share, *lost, f"{tokens:,}" if tokens else "–"))
    cells.append(("all", f"{total:,.1f}", "100%", "", "", ""))
    said = "; ".join(f"{name} {value}" for name, value, _ in rows)
    kinds = {kind for _, split, _ in parts for _, kind in split}
    legend = "".join(_key(kind, _WORDS[kind], "■") for kind in _STATES if kind in kinds) if len(kinds) > 1 else ""
    head = ("part", "seconds", "share", "of them on stopped ones", "on failed ones", "tokens")
    note = (
        "Seconds inside training loops, and of scoring where candidates are scored untrained; reading and encoding "
        "data is not in them."
    )
    if record.plan is not None:
        note += " They are the search's; the plan's other steps have theirs in their own folders."
    return (
        tag("p", escape(note))
        + _figures([(bars("cost-parts", "Time by part of the run", said, rows), legend)])
        + _details("In numbers", _table("Time by part of the run", head, cells))
    )


def settings_section(record: Record, metric: str, ranking: str) -> str:
    """What the run was begun with, and on what it ran."""
    results, config = record.results or (record.plan and record.plan.results) or {}, record.config
    where, unknown = record.machine | results, "not recorded"
    versions = ", ".join(f"{name} {version}" for name, version in (where.get("versions") or {}).items())
    rows = [
        ("task", config.get("task", "–")),
        ("metric", metric),
        ("what ranks candidates", ranking),
        ("seed", config.get("seed", "–")),
        ("repeats of the final rows", config.get("seeds", "–")),
        ("longest text, tokens", config.get("max_length", "–")),
        ("teacher", config.get("teacher") or "trained in this run"),
        ("device of the latencies", where.get("device") or unknown),
        ("versions", versions or unknown),
        ("finished", results.get("finished") or "not yet"),
    ]
    text = json.dumps(config, indent=2, ensure_ascii=False)
    return _table("Environment", ("what", "value"), rows) + _details("Whole configuration", tag("pre", escape(text)))


def _each(
    name: str,
    stages: dict[str, list[Candidate]],
    record: Record,
    metric: str,
    part: Callable[[str, list[Candidate], Record, str], str],
    more: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """A section with a part for every stage, side by side, below a note; more: further parts, by title."""
    contents = {
        _STAGE_NAMES.get(stage, stage): part(stage, found, record, metric)
        if found
        else _missing("This stage has not begun.")
        for stage, found in stages.items()
    }
    articles = [tag("article", tag("h3", escape(title)), content) for title, content in {**contents, **more}.items()]
    return tag("p", escape(_NOTES[name])) + tag("div", *articles, class_="stages")


def _put(chart: Chart, found: list[Candidate], kind: str) -> None:
    chart.dots([(c.evaluation.number, c.score) for c in found], kind, [c.hint for c in found])


def _figures(figures: Iterable[tuple[str, str]]) -> str:
    return tag(
        "div",
        *(tag("figure", picture, tag("figcaption", caption) if caption else "") for picture, caption in figures),
        class_="figures",
    )


def _key(kind: str, text: str, sign: str = "") -> str:
    mark = tag("b", sign or _STATES[kind], class_=f"key {kind}", aria_hidden="true")
    return tag("span", mark, " ", escape(text), class_="legend")


def _table(caption: str, head: Sequence[str], rows: Iterable[Sequence]) -> str:
    top = tag("tr", *(tag("th", escape(name), scope="col") for name in head))
    lines = [
        tag("tr", tag("th", escape(first), scope="row"), *(_cell(str(cell)) for cell in rest)) for first, *rest in rows
    ]
    table = tag("table", tag("caption", escape(caption)), tag("thead", top), tag("tbody", *lines))
    return tag("div", table, class_="scroll", tabindex=0, role="region", aria_label=caption)


def _cell(text: str) -> str:
    number = text[:1].isdigit() or text[:1] in ("", "-", "+", "–")
    return tag("td", escape(text)) if number else tag("td", escape(text), class_="text")


def _details(title: str, content: str) -> str:
    return tag("details", tag("summary", escape(title)), content)


def _missing(text: str) -> str:
    return tag("p", escape(text), class_="missing")


def _code(text: object) -> str:
    return tag("code", escape(text))


def _finite(value: object) -> float | None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if number else None


def _whole(value: object) -> str:
    return _scaled(value, 1, 0)


def _scaled(value: object, unit: float, decimals: int = 1) -> str:
    number = _finite(value)
    return "–" if number is None else f"{number / unit:,.{decimals}f}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


_STYLE = """
:root{--bg:#fff;--ink:#1b1f24;--soft:#59636e;--line:#d5dae0;--card:#f6f8fa;--main:#1f5fbf;--best:#c2410c;--dim:#98a2ad;
--bad:#b42318}
@media(prefers-color-scheme:dark){:root{--bg:#14171b;--ink:#e6e9ed;--soft:#a3adb8;--line:#363d45;--card:#1c2127;
--main:#7fb2ff;--best:#ff9d5c;--dim:#6d7885;--bad:#ff8a80}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1200px;padding:1rem;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
h1{font-size:1.5rem;margin:.2rem 0}h2{font-size:1.2rem;margin:0 0 .5rem}h3{font-size:1rem;margin:0 0 .4rem}
p{margin:.3rem 0 .8rem}
section{border-top:1px solid var(--line);padding:1.2rem 0}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem;margin:.8rem 0}a{color:var(--main)}
.state{font-weight:600}.missing{color:var(--soft);font-style:italic}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:.6rem;margin:.6rem 0}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.5rem .8rem}
.tiles dt{color:var(--soft);font-size:.85rem}.tiles dd{margin:0;font-size:1.3rem;font-weight:600}
.stages{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:1.5rem}
.stages article{min-width:0}
.figures{display:flex;flex-wrap:wrap;gap:1rem}
.figures figure{flex:1 1 300px;max-width:460px;min-width:0;margin:0}
.trees{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,270px),1fr))}
.trees figure{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:.7rem}
.trees code{display:block;overflow-wrap:anywhere;font-size:.8rem}
figcaption{color:var(--soft);font-size:.85rem}
.legend{display:inline-block;margin-right:1rem}
.scroll{overflow-x:auto;max-width:100%;margin:.6rem 0}
table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
#settings th,#settings td{text-align:left;white-space:normal}
caption{text-align:left;color:var(--soft);padding-bottom:.3rem}
th,td{padding:.25rem .7rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td.text{text-align:left}thead th{color:var(--soft)}tbody th{font-weight:500}
summary{cursor:pointer;color:var(--main)}
pre{overflow-x:auto;background:var(--card);padding:.7rem;border-radius:8px;font-size:.8rem}
svg{display:block;width:100%;height:auto;margin:0 auto}
svg text{font-family:inherit;font-size:11px;fill:var(--ink)}svg .tick{fill:var(--soft);font-size:10.5px}
svg .mark{font-weight:600;paint-order:stroke;stroke:var(--bg);stroke-width:3px}
.axis{stroke:var(--soft);fill:none}.grid{stroke:var(--line);fill:none;stroke-dasharray:2 3}
svg circle{fill:var(--main)}svg polyline{fill:none;stroke:var(--main);stroke-width:1;stroke-opacity:.55}
g.complete circle{fill-opacity:.75}
g.pruned circle{fill:none;stroke:var(--dim)}g.pruned polyline{stroke:var(--dim)}
g.running circle{fill:none;stroke:var(--best);stroke-dasharray:1.5 1.5}g.running polyline{stroke:var(--best)}
g.failed path{stroke:var(--bad);stroke-width:1.6;fill:none}g.failed circle{fill:var(--bad)}
g.failed polyline{stroke:var(--bad)}
g.thin polyline{stroke-opacity:.3}
g.best polyline,g.front polyline{stroke:var(--best);stroke-width:1.8;stroke-opacity:1}
g.front circle,g.best circle{fill:var(--best)}g.dominated circle{fill:var(--dim);fill-opacity:.7}
.bar{fill:var(--main)}.bar.pruned{fill:var(--dim)}.bar.failed{fill:var(--bad)}.bar.running{fill:var(--best)}
.interval{stroke:var(--main);stroke-width:2.5}.strong .interval{stroke:var(--best)}.strong circle{fill:var(--best)}
.strong text{font-weight:600}
.sheet{fill:var(--bg);stroke:var(--line)}.edge{stroke:var(--soft);fill:none}
.node rect{fill:var(--card);stroke:var(--soft)}.node.linear rect{stroke:var(--main);stroke-width:2}
.node.leaf rect{stroke-dasharray:3 2}
.key{color:var(--main)}.key.best,.key.front,.key.running{color:var(--best)}.key.pruned,.key.dominated,.key.discarded{color:var(--dim)}
.key.failed{color:var(--bad)}
@media print{body{max-width:none}details{display:block}}
"""
