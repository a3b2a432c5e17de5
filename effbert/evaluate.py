"""Scores on a whole split: logits of every row first, then the task's metrics once."""

from collections.abc import Callable

import numpy as np
import torch

from effbert import metrics
from effbert.data.batches import Batch, BatchPlan
from effbert.data.encode import EncodedTask
from effbert.pace import paced

GROUPS = 40  # of rows, each of which is left out once


@torch.inference_mode()
def predict(logits_of: Callable[[Batch], torch.Tensor], plan: BatchPlan, device="cpu") -> list[np.ndarray]:
    """For every row of the plan's data, in the data's order, its logits: [num_labels], for spans [its length, 2]."""
    rows: dict[int, np.ndarray] = {}
    for batch in paced(plan, "reading rows"):
        logits = logits_of(batch.to(device)).float().cpu().numpy()
        lengths = batch.attention_mask.sum(dim=1).tolist()
        for row, values, length in zip(batch.indices.tolist(), logits, lengths, strict=True):
            rows[row] = values[:length] if values.ndim == 2 else values
    return [rows[row] for row in sorted(rows)]


def evaluate(
    logits_of: Callable[[Batch], torch.Tensor],
    task: EncodedTask,
    split: str = "validation",
    batch_size: int = 128,
    pad_token_id: int = 0,
    device="cpu",
) -> dict[str, float]:
    """The task's metrics (fractions of 1) on `split`."""
    return evaluate_rows(logits_of, task, split, batch_size, pad_token_id, device, more=False)


def evaluate_rows(
    logits_of: Callable[[Batch], torch.Tensor],
    task: EncodedTask,
    split: str = "validation",
    batch_size: int = 128,
    pad_token_id: int = 0,
    device="cpu",
    more: bool = True,
) -> dict[str, float | dict[str, list[float]]]:
    """As `evaluate`; with `more` "roc_auc" of a classification too, and as "jackknife" what `jackknife` gives for that
    and for the task's first metric."""
    data = getattr(task, split)
    rows = predict(logits_of, BatchPlan(data, batch_size, pad_token_id=pad_token_id), device)
    if task.spec.kind == "spans":
        return metrics_of_spans(rows, task, split, more)
    logits, labels = np.stack(rows), np.asarray(data["labels"])
    predictions = logits[:, 0] if task.spec.kind == "regression" else logits.argmax(axis=1)
    found = metrics.compute(task.spec.metrics, predictions, labels)
    if more:
        first = task.spec.metrics[0]
        scores = {first: lambda kept: metrics.compute((first,), predictions[kept], labels[kept])[first]}
        if task.spec.kind == "classification":
            odds = metrics.log_odds(logits)
            found["roc_auc"] = metrics.area(odds, labels)
            scores["roc_auc"] = lambda kept: metrics.area(odds[kept], labels[kept])
        found["jackknife"] = {name: jackknife(score, labels) for name, score in scores.items()}
    return found


def jackknife(score: Callable[[np.ndarray], float], labels: np.ndarray) -> list[float]:
    """The score of the rows without one of GROUPS groups of them, for each group; none for fewer than four rows.

    score: of the rows where a bool [rows] is true. The groups are the same for all who answer these rows, each as large
    as the others within one row and with its share of every label; fewer where rows are. From such values follows how
    sure any score, and any difference between two, is (effbert.search.agreement.paired_difference).
    """
    order, count = np.argsort(labels, kind="stable"), min(GROUPS, len(labels) // 2)
    if count < 2:
        return []
    group = np.empty(len(labels), dtype=np.int64)
    group[order] = np.arange(len(labels)) % count
    return [round(float(score(group != number)), 7) for number in range(count)]


def metrics_of_spans(rows: list[np.ndarray], task: EncodedTask, split: str, more: bool = False) -> dict:
    """Exact match and F1 of the decoded answers, for logits [length, 2] of every window; with `more` as in
    `evaluate_rows`, groups being of questions."""
    from effbert.data import squad

    examples, version2 = getattr(task.raw, split), task.spec.name == squad.NAMES[1]
    answers = squad.decode_spans(
        [row[:, 0] for row in rows],
        [row[:, 1] for row in rows],
        getattr(task, split),
        examples,
        version2=version2,
    )
    references = squad.references(examples)
    found = metrics.squad_scores(answers, references, version2)
    if more:
        first = task.spec.metrics[0]
        each = metrics.squad_by_question(answers, references, version2)[first]
        found["jackknife"] = {first: jackknife(lambda kept: each[kept].mean(), np.zeros(len(each)))}
    return found
