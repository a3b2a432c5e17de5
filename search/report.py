"""The final table: what each row scores and costs, on the terminal and in the winner's model card."""

import statistics

from rich.table import Table


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


def as_rich_table(table: list[dict], metric: str, length: int) -> Table:
    """For the terminal."""
    view = Table(title=f"{metric} on held-out rows; costs of the deployed model at length {length}")
    for column in ("row", metric, "parameters", "MFLOPs", "CPU ms (batch 1)"):
        view.add_column(column, justify="left" if column == "row" else "right")
    for line in table:
        view.add_row(*cells(line))
    return view


def cells(line: dict) -> tuple[str, ...]:
    """The columns of one row as text."""
    return (
        line["row"],
        score_text(line["score"], line["spread"], line["diverged"]),
        f"{line['parameters']:,}",
        f"{line['flops'] / 1e6:,.1f}",
        f"{line['latency_ms']:.2f} ± {line['latency_spread_ms']:.2f}",
    )


def as_markdown(table: list[dict], metric: str) -> str:
    """The same table in Markdown."""
    head = ("row", metric, "parameters", "MFLOPs", "CPU ms (batch 1)")
    lines = [head, ("---",) * len(head), *(cells(line) for line in table)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


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

All rows were distilled from the same teacher with the same budget, after the same warm-up:

{as_markdown(results["table"], results["metric"])}

Costs are those of the deployed model at length {results["max_length"]}: 2 FLOPs a multiply-add of linears and
attention, CPU latency as median ± quartile distance of one sequence in fp32 on {results["device"]}.

| part of the search | seconds in training loops |
| --- | --- |
{costs}
"""
