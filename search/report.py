"""The final tables, of a search and of a plan: what each row scores and costs, on the terminal and in Markdown."""

import statistics
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from effbert.search.agreement import paired_difference
from effbert.search.study import Evaluation


def summarise(results: list[dict], metric: str) -> list[dict]:
    """One entry a row: mean and standard deviation of the score over the repeats that have one, None where none has;
    how many diverged; the costs of the first."""
    by_row: dict[str, list[dict]] = {}
    for result in results:
        by_row.setdefault(result["row"], []).append(result)
    table = []
    for name, repeats in by_row.items():
        scores = [result["scores"][metric] for result in repeats if result["scores"]]
        table.append(
            {
                "row": name,
                **mean_and_spread(scores),
                "repeats": len(scores),
                "diverged": len(repeats) - len(scores),
                **{key: repeats[0][key] for key in ("parameters", "flops", "latency_ms", "latency_spread_ms")},
                "architecture": repeats[0]["architecture"],
            }
        )
    return table


def mean_and_spread(scores: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation, None where there are too few."""
    mean = statistics.mean(scores) if scores else None
    return {"score": mean, "spread": statistics.stdev(scores) if len(scores) > 1 else None}


def score_text(score: float | None, spread: float | None, diverged: int) -> str:
    """A score of several repeats, some of which may have diverged."""
    if score is None:
        return "diverged"
    lost = f" ({diverged} diverged)" if diverged else ""
    return f"{score:.4f}{'' if spread is None else f' ± {spread:.4f}'}{lost}"


def verdict(table: list[dict], results: list[dict], metric: str) -> str:
    """The winner against each other row, in a sentence, with an interval for the rows they are scored on, which leaves
    out what another seed would change; of several repeats the means. "" where there is nothing to compare.
    """
    scores = {line["row"]: line["score"] for line in table if line["score"] is not None}
    if "winner" not in scores or len(scores) < 2:
        return ""
    parts = {name: _mean_parts([row for row in results if row["row"] == name]) for name in scores}
    told = [
        f"{_ahead(scores['winner'], scores[name], (parts['winner'], parts[name]))} against {name}"
        for name in scores
        if name != "winner"
    ]
    return f"The winner's {metric}: {', '.join(told)}."


def _ahead(first: float, second: float, parts: tuple[Sequence[float], Sequence[float]]) -> str:
    """How far the first score is ahead, with an interval where parts of the rows were kept of both: few rows have none.
    parts: as in `paired_difference`."""
    if not parts[0] or len(parts[0]) != len(parts[1]):
        return f"{first - second:+.4f}"
    return paired_difference(first, second, parts).as_difference


def _mean_parts(rows: list[dict]) -> list[float]:
    """The `jackknife` of a row's repeats, those that have scores, in the mean; none where one has none."""
    known = [row.get("jackknife", []) for row in rows if row["scores"]]
    return [statistics.mean(values) for values in zip(*known, strict=True)] if known and all(known) else []


NEXT = 3  # candidates that the best one is compared with


def comparison(evaluations: Sequence[Evaluation], best: Evaluation, metric: str = "value") -> str:
    """The best candidate beside the NEXT best, each time with an interval. metric: what values are."""
    others = [e for e in evaluations if e.state == "complete" and e.number != best.number]
    text = f"candidate {best.number} is best with {metric} {best.value:.4f}"
    if not others:
        return text
    if all(other.value == best.value for other in others):
        return f"{text}, as are all others ({len(others)}): their values tell nothing apart, more rows or epochs might"
    ahead = []
    for other in sorted(others, key=lambda e: (-e.value, e.number))[:NEXT]:
        parts = best.attrs.get("jackknife", []), other.attrs.get("jackknife", [])
        ahead.append(f"candidate {other.number} by {_ahead(best.value, other.value, parts)}")
    return f"{text}, ahead of {', '.join(ahead)}"


Rows = list[tuple[str, ...]]  # a table as text, its head first


UNLIMITED = 10_000  # columns of a screen


OFFICIAL = "the official validation rows"


def chosen_by(best: bool) -> str:
    """What to say after "on ... rows" where these are the rows by which a phase found its `best` step."""
    return ", by which each one's best step was chosen" if best else ""


def table_rows(table: list[dict], metric: str) -> Rows:
    """A search's final table."""
    return [("row", metric, "parameters", "MFLOPs", "CPU ms (batch 1)"), *map(cells, table)]


def cells(line: dict) -> tuple[str, ...]:
    """The columns of one row of it."""
    return (
        line["row"],
        score_text(line["score"], line["spread"], line["diverged"]),
        f"{line['parameters']:,}",
        f"{line['flops'] / 1e6:,.1f}",
        f"{line['latency_ms']:.2f} ± {line['latency_spread_ms']:.2f}",
    )


def plan_rows(tasks: list[dict]) -> Rows:
    """A plan's table, teacher and models on every task; parameters with pooler and head, of the first task."""
    first = tasks[0]
    head = ("model", *(f"{task['task']} {task['metric']}" for task in tasks), "parameters", "MFLOPs")
    teacher = first["teacher"]
    scores = (f"{task['teacher']['scores'][task['metric']]:.4f}" for task in tasks)
    lines = [head, ("teacher", *scores, f"{teacher['parameters']:,}", f"{teacher['flops'] / 1e6:,.0f}")]
    for name in first["models"]:
        found = [task["models"][name] for task in tasks]
        scores = (score_text(model["score"], model["spread"], model.get("diverged", 0)) for model in found)
        costs = found[0]["seeds"][:1]  # none of a model that diverged before
        texts = [(f"{cost['parameters']:,}", f"{cost['flops'] / 1e6:,.0f}") for cost in costs] or [("", "")]
        lines.append((name, *scores, *texts[0]))
    return lines


def markdown(rows: Rows) -> str:
    """A table in Markdown."""
    head, *lines = rows
    return "".join("| " + " | ".join(line) + " |\n" for line in [head, ("---",) * len(head), *lines])


def print_table(console: Console, title: str, rows: Rows) -> None:
    """Print a table with every cell whole: off a terminal at its full width; on one that is too narrow with rows and
    columns exchanged, if that is narrower."""
    view = rich_table(console, title, rows)
    if console.is_terminal and view.width > console.width:
        turned = rich_table(console, title, list(zip(*rows, strict=True)))
        view = min(view, turned, key=lambda table: table.width)
    console.print(view, soft_wrap=True)


def rich_table(console: Console, title: str, rows: Rows) -> Table:
    """A table as wide as its cells are, whatever the console has."""
    head, *lines = rows
    view = Table(title=title)
    for column, name in enumerate(head):
        view.add_column(name, justify="right" if column else "left")
    for line in lines:
        view.add_row(*line)
    view.width = console.measure(view, options=console.options.update(max_width=UNLIMITED)).maximum
    return view


def warmed_up(results: dict) -> str:
    """What a model card says of how rows began."""
    if not results.get("start_from"):
        return ", after the same warm-up"
    return (
        f". They began with slices of the supernet in {results['start_from'][0]}, the plain BERT with a warm-up on "
        "this run's text"
    )


def model_card(results: dict) -> str:
    """README.md of the winner's folder: what it is, how it scores, what it cost to find."""
    winner = next(line for line in results["table"] if line["row"] == "winner")
    saved = next(line for line in results["results"] if line["row"] == "winner" and line["scores"])
    layers = "\n".join(f"{number}. `{text}`" for number, text in enumerate(results["layers"], start=1))
    costs = "\n".join(f"| {part} | {seconds:.0f} |" for part, seconds in results["seconds"].items())
    auto = "AutoModelForQuestionAnswering" if results["kind"] == "spans" else "AutoModelForSequenceClassification"
    return f"""---
library_name: transformers
tags: [effbert]
---
# A small BERT found by effbert

Task {results["task"]}, {results["metric"]} {saved["scores"][results["metric"]]:.4f} on the held-out rows,
{winner["parameters"]:,} parameters, seed {results["seed"] + saved["repeat"]}.

```python
import effbert  # registers the model type
from transformers import {auto}, AutoTokenizer

model = {auto}.from_pretrained("best")
tokenizer = AutoTokenizer.from_pretrained("best")
```

Architecture, a layer a line:

{layers}

All rows were distilled from the same teacher with the same budget{warmed_up(results)}:

{markdown(table_rows(results["table"], results["metric"]))}
Costs are those of the deployed model at length {results["max_length"]}: 2 FLOPs a multiply-add of linears and
attention, CPU latency as median ± quartile distance of one sequence in fp32 on {results["device"]}.

| part of the search | seconds of training, in stage 3 of scoring |
| --- | --- |
{costs}
"""
