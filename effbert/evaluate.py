"""Scores on a whole split: logits of every row first, then the task's metrics once."""

from collections.abc import Callable

import numpy as np
import torch

from effbert import metrics
from effbert.data.batches import Batch, BatchPlan
from effbert.data.encode import EncodedTask
from effbert.pace import paced


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
) -> dict[str, float | str]:
    """As `evaluate`; for classification with `more`: "roc_auc", and as "hits" which rows are answered rightly, as
    `pack_hits` gives it."""
    data = getattr(task, split)
    rows = predict(logits_of, BatchPlan(data, batch_size, pad_token_id=pad_token_id), device)
    if task.spec.kind == "spans":
        return metrics_of_spans(rows, task, split)
    logits, labels = np.stack(rows), np.asarray(data["labels"])
    if task.spec.kind == "regression":
        return metrics.compute(task.spec.metrics, logits[:, 0], labels)
    predictions = logits.argmax(axis=1)
    found = metrics.compute(task.spec.metrics, predictions, labels)
    if more:
        found |= {"roc_auc": metrics.roc_auc(logits, labels), "hits": pack_hits(predictions == labels)}
    return found


def pack_hits(hits: np.ndarray) -> str:
    """bool [rows] as text: the number of rows, then the bits in hexadecimal."""
    return f"{len(hits)}:{np.packbits(hits).tobytes().hex()}"


def unpack_hits(text: str) -> np.ndarray:
    """The inverse of `pack_hits`."""
    count, bits = text.split(":")
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), dtype=np.uint8), count=int(count)).astype(bool)


def metrics_of_spans(rows: list[np.ndarray], task: EncodedTask, split: str) -> dict[str, float]:
    """Exact match and F1 of the decoded answers, for logits [length, 2] of every window."""
    from effbert.data import squad

    examples = getattr(task.raw, split)
    answers = squad.decode_spans(
        [row[:, 0] for row in rows],
        [row[:, 1] for row in rows],
        getattr(task, split),
        examples,
        version2=task.spec.name == "squad2.0",
    )
    return metrics.squad_scores(answers, squad.references(examples))
