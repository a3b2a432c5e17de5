"""Raw tasks to token ids, cached on disk. The one idea: whatever a task asks, its rows become unpadded id lists plus
numbers to compare against, and nothing after this file knows text."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from effbert.data.batches import subset
from effbert.data.cache import cached, dataset_fingerprint, tokenizer_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from effbert.data.tasks import Task, TaskSpec

WINDOWS = ("doc_stride", "max_query_length")  # settings of a spans task, and what a model's config keeps of them
_PIECE = 10_000


@dataclass(frozen=True)
class EncodedTask:
    """The splits of a task as ids: `input_ids`, `token_type_ids` if the tokenizer makes them, and `labels` (int64, or
    float32 for regression) in the order of the rows of `raw`. Spans: one row a window, as `squad.encode_spans` says.
    """

    raw: "Task"
    train: "Dataset"
    validation: "Dataset"

    @property
    def spec(self) -> "TaskSpec":
        """What the task asks."""
        return self.raw.spec

    def ranked_on(self, share: float) -> "EncodedTask":
        """The task with the first `share` of its validation rows, one at least; of spans, of its questions."""
        if share == 1:
            return self
        rows = subset(self.raw.validation, share)
        validation = self.validation
        if self.spec.kind == "spans":
            windows = np.searchsorted(validation["example_index"], len(rows))  # in the order of the questions
            validation = subset(validation, int(windows))
        else:
            validation = subset(validation, len(rows))
        return EncodedTask(replace(self.raw, validation=rows), self.train, validation)


def encode_task(
    task: "Task",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    cache_dir: str | Path | None = None,
    *,
    doc_stride: int = 0,
    max_query_length: int = 0,
) -> EncodedTask:
    """`task` in ids of `tokenizer`, at most `max_length` a row; of a pair the longer text is cut first.

    doc_stride, max_query_length: of the windows of a span task, as `squad.encode_spans` says; other tasks have none.
    Raises ValueError if a split is empty or `max_length` leaves no room for text, and as `squad.check_windows` does.
    """
    windows = {"doc_stride": doc_stride, "max_query_length": max_query_length}
    splits = (
        encode_split(getattr(task, name), task.spec, tokenizer, max_length, cache_dir, **windows, name=name)
        for name in ("train", "validation")
    )
    return EncodedTask(task, *splits)


def encode_split(
    dataset: "Dataset",
    spec: "TaskSpec",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    cache_dir: str | Path | None = None,
    *,
    doc_stride: int = 0,
    max_query_length: int = 0,
    name: str,
) -> "Dataset":
    """One split of a task, called `name` in errors, as `encode_task` encodes it."""
    room = max_length - tokenizer.num_special_tokens_to_add(pair=spec.pair)
    if room < 1 + spec.pair:
        raise ValueError(f"max_length {max_length} leaves no room for text between the special tokens")
    if len(dataset) == 0:
        raise ValueError(f"task {spec.name}: the {name} split is empty")
    windows = (doc_stride, max_query_length) if spec.kind == "spans" else (0,)  # so entries of other tasks stay valid
    key = ("task", spec.kind, dataset_fingerprint(dataset), tokenizer_fingerprint(tokenizer), max_length, *windows)
    return cached(key, lambda: _pieces(dataset, spec, tokenizer, max_length, windows), cache_dir)


def _pieces(
    dataset: "Dataset",
    spec: "TaskSpec",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    windows: tuple[int, ...],
):
    if spec.kind == "spans":
        from effbert.data.squad import encode_spans

        yield encode_spans(dataset, tokenizer, max_length, *windows)
        return
    for rows in dataset.iter(_PIECE):
        yield _encode_rows(rows, spec, tokenizer, max_length)


def _encode_rows(rows: dict, spec: "TaskSpec", tokenizer: "PreTrainedTokenizerBase", max_length: int) -> "Dataset":
    from datasets import Dataset, Features, List, Value

    encoded = tokenizer(
        rows["text_a"],
        rows["text_b"] if spec.pair else None,
        truncation="longest_first",
        max_length=max_length,
        return_attention_mask=False,
    )
    columns = {"input_ids": encoded["input_ids"]}
    features = {"input_ids": List(Value("int32"))}
    if "token_type_ids" in encoded:
        columns["token_type_ids"] = encoded["token_type_ids"]
        features["token_type_ids"] = List(Value("int8"))
    columns["labels"] = rows["label"]
    features["labels"] = Value("float32" if spec.kind == "regression" else "int64")
    return Dataset.from_dict(columns, features=Features(features))
