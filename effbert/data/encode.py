"""Raw tasks to token ids, cached on disk. The one idea: whatever a task asks, its rows become unpadded id lists plus
numbers to compare against, and nothing after this file knows text."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from effbert.data.cache import cached, dataset_fingerprint, tokenizer_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from effbert.data.tasks import Task, TaskSpec

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


def encode_task(
    task: "Task",
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    cache_dir: str | Path | None = None,
    *,
    stride: int | None = None,
) -> EncodedTask:
    """`task` in ids of `tokenizer`, at most `max_length` a row; of a pair the longer text is cut first.

    stride: ids shared by neighbouring windows of a span task, by default 128 or a third of `max_length`.
    Raises ValueError if a split is empty or `max_length` leaves no room for text.
    """
    splits = (
        encode_split(getattr(task, name), task.spec, tokenizer, max_length, cache_dir, stride=stride, name=name)
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
    stride: int | None = None,
    name: str,
) -> "Dataset":
    """One split of a task, called `name` in errors, as `encode_task` encodes it."""
    room = max_length - tokenizer.num_special_tokens_to_add(pair=spec.pair)
    if room < 1 + spec.pair:
        raise ValueError(f"max_length {max_length} leaves no room for text between the special tokens")
    if len(dataset) == 0:
        raise ValueError(f"task {spec.name}: the {name} split is empty")
    if spec.kind != "spans":
        stride = 0
    elif stride is None:
        stride = min(128, max_length // 3)
    key = ("task", spec.kind, dataset_fingerprint(dataset), tokenizer_fingerprint(tokenizer), max_length, stride)
    return cached(key, lambda: _pieces(dataset, spec, tokenizer, max_length, stride), cache_dir)


def _pieces(dataset: "Dataset", spec: "TaskSpec", tokenizer: "PreTrainedTokenizerBase", max_length: int, stride: int):
    if spec.kind == "spans":
        from effbert.data.squad import encode_spans

        yield encode_spans(dataset, tokenizer, max_length, stride)
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
