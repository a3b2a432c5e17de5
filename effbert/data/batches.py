"""Padded batches of an encoded data set, by number. The one idea: an epoch is a plan, drawn at once from (seed, name,
epoch), so that batch i is the same for every candidate and can be fetched without its predecessors; rows of similar
length share a batch, and a batch is padded to one of a few lengths only. Ids are views into the Arrow file, which
stays memory-mapped."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from effbert.random import generator

if TYPE_CHECKING:
    from datasets import Dataset

_WINDOW = 64  # batches among which rows are grouped by length


class Shares(NamedTuple):
    """What a part of a batch has of the whole: of its rows, of its real tokens, and of the pairs of real tokens of one
    row. A loss that is a mean over one of these, times the share, summed over the parts, is the whole batch's."""

    rows: float = 1.0
    tokens: float = 1.0
    pairs: float = 1.0


WHOLE = Shares()


@dataclass(frozen=True)
class Batch:
    """B rows padded to length L. Without labels or positions those fields are None.

    input_ids, attention_mask (1 = keep), token_type_ids: int64 [B, L]. labels: int64 or float32 [B].
    start_positions, end_positions: int64 [B]. indices: rows of the data set [B]. tokens: ids that are no padding, those
    of the whole batch where this is a part of one. shares: how large a part.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor
    labels: torch.Tensor | None
    start_positions: torch.Tensor | None
    end_positions: torch.Tensor | None
    indices: np.ndarray
    tokens: int
    shares: Shares = WHOLE

    def to(self, device: torch.device | str) -> "Batch":
        fields = {name: value for name, value in vars(self).items()}
        moved = {n: v.to(device, non_blocking=True) if isinstance(v, torch.Tensor) else v for n, v in fields.items()}
        return Batch(**moved)


class Tokens(NamedTuple):
    """Ids in an epoch: without padding, and with."""

    real: int
    padded: int


class Rows:
    """Random access to the ids and labels of a data set, by numpy views of its Arrow memory: make once, plan often.

    In memory are the lengths, 4 bytes a row; the plan of an epoch adds 7 where a batch has 64 rows, more where it has
    fewer.
    """

    def __init__(self, dataset: "Dataset"):
        self._views = {}
        for name in ("input_ids", "token_type_ids"):
            if name in dataset.column_names:
                self._views[name] = _Ragged(dataset, name)
        self.lengths = self._views["input_ids"].lengths()
        self.values = {
            name: _numbers(dataset, name)
            for name in ("labels", "start_positions", "end_positions")
            if name in dataset.column_names
        }

    def __len__(self) -> int:
        return len(self.lengths)

    def batch(self, indices: np.ndarray, length: int, pad_token_id: int) -> Batch:
        """The rows `indices`, padded to `length`."""
        shape = (len(indices), length)
        lengths = self.lengths[indices].astype(np.int64)
        input_ids = np.full(shape, pad_token_id, dtype=np.int64)
        self._views["input_ids"].fill(input_ids, indices)
        token_type_ids = np.zeros(shape, dtype=np.int64)
        if "token_type_ids" in self._views:
            self._views["token_type_ids"].fill(token_type_ids, indices)
        mask = np.arange(length) < lengths[:, None]
        values = {name: torch.from_numpy(column[indices]) for name, column in self.values.items()}
        return Batch(
            input_ids=torch.from_numpy(input_ids),
            attention_mask=torch.from_numpy(mask.astype(np.int64)),
            token_type_ids=torch.from_numpy(token_type_ids),
            labels=values.get("labels"),
            start_positions=values.get("start_positions"),
            end_positions=values.get("end_positions"),
            indices=indices.astype(np.int64),
            tokens=int(lengths.sum()),
        )


class BatchPlan(Sequence[Batch]):
    """The batches of one epoch: `plan[i]` is batch i, `len(plan)` the steps, `plan.tokens` ids real and padded.

    Every row occurs once (with `drop_last` the rows of an incomplete batch are left out, others each epoch). Without a
    seed rows go by length, in their order within a length. Raises ValueError if a row is longer than the last bucket.

    part (r, n) makes `plan[i]` the r-th of n parts of batch i, which is then n times batch_size rows large. Parts
    differ by a row at most and are padded alike; where rows are fewer than parts, some hold one row without a share.
    """

    def __init__(
        self,
        dataset: "Dataset | Rows",
        batch_size: int,
        *,
        pad_token_id: int,
        seed: int | None = None,
        name: str = "",
        epoch: int = 0,
        buckets: Sequence[int] | None = None,
        drop_last: bool = False,
        part: tuple[int, int] = (0, 1),
    ):
        self.rows = dataset if isinstance(dataset, Rows) else Rows(dataset)
        if len(self.rows) == 0:
            raise ValueError("no batches: the data set has no rows")
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} should be at least 1")
        longest = int(self.rows.lengths.max())
        self.buckets = np.asarray(length_buckets(longest) if buckets is None else sorted(buckets))
        if longest > self.buckets[-1]:
            raise ValueError(f"a row of {longest} ids does not fit the longest bucket, {self.buckets[-1]}")
        self._pad_token_id = pad_token_id
        self._part = part
        self._batches = self._draw(batch_size * part[1], seed, name, epoch, drop_last)
        longest = np.array([self.rows.lengths[batch].max() for batch in self._batches], np.int64)
        self._lengths = self.buckets[np.searchsorted(self.buckets, longest)]
        self.tokens = Tokens(
            real=int(sum(self.rows.lengths[batch].sum() for batch in self._batches)),
            padded=sum(int(length) * len(batch) for length, batch in zip(self._lengths, self._batches, strict=True)),
        )

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, i: int) -> Batch:
        whole, (number, parts) = self._batches[i], self._part
        if parts == 1:
            return self.rows.batch(whole, int(self._lengths[i]), self._pad_token_id)
        mine = np.array_split(whole, parts)[number]
        batch = self.rows.batch(mine if len(mine) else whole[:1], int(self._lengths[i]), self._pad_token_id)
        return replace(batch, tokens=int(self.rows.lengths[whole].sum()), shares=self._shares(mine, whole))

    def _shares(self, mine: np.ndarray, whole: np.ndarray) -> Shares:
        lengths, all_lengths = (self.rows.lengths[rows].astype(np.int64) for rows in (mine, whole))
        return Shares(
            len(mine) / len(whole),
            float(lengths.sum() / all_lengths.sum()),
            float((lengths**2).sum() / (all_lengths**2).sum()),
        )

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))

    def _draw(self, batch_size: int, seed: int | None, name: str, epoch: int, drop_last: bool) -> list[np.ndarray]:
        rng = None if seed is None else generator(seed, "shuffle", name, epoch)
        order = np.arange(len(self.rows), dtype=np.int32 if len(self.rows) < 2**31 else np.int64)
        if rng is not None:
            rng.shuffle(order)
        if drop_last:
            order = order[: len(order) // batch_size * batch_size]
        window = len(order) if rng is None else _WINDOW * batch_size
        batches = []
        for start in range(0, len(order), max(window, 1)):
            part = order[start : start + window]
            buckets = np.searchsorted(self.buckets, self.rows.lengths[part])
            part = part[np.argsort(buckets, kind="stable")]
            batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
        return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]


def length_buckets(max_length: int) -> tuple[int, ...]:
    """Lengths to pad to: 16, 32, 48, 64, 96, 128, 192, ... below `max_length`, and that itself."""
    steps = sorted(factor << shift for factor in (2, 3) for shift in range(3, max_length.bit_length()))
    return (*(length for length in steps if length < max_length and length != 24), max_length)


def subset(dataset: "Dataset", size: int | float, *, first: bool = True) -> "Dataset":
    """The first (or last) rows: `size` of them if an int, that share of them (at least one) if a float in (0, 1]."""
    rows = size if isinstance(size, int) else max(1, round(size * len(dataset)))
    if rows < 1 or rows > len(dataset) or (isinstance(size, float) and not 0 < size <= 1):
        raise ValueError(f"cannot take {size} of {len(dataset)} rows: give a share in (0, 1] or a number of rows")
    return dataset.select(range(rows) if first else range(len(dataset) - rows, len(dataset)))


class _Ragged:
    """A list column: row i of the data set is a stretch of a chunk's values. Values and offsets stay memory-mapped."""

    def __init__(self, dataset: "Dataset", name: str):
        chunks = dataset.data.table.column(name).chunks
        self._values = [chunk.values.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks]
        self._ends = np.cumsum([len(chunk) for chunk in chunks], dtype=np.int64)
        self._rows = _row_numbers(dataset)

    def lengths(self) -> np.ndarray:
        """Of every row, int32."""
        found = [np.diff(offsets) for offsets in self._offsets]
        return (np.concatenate(found) if found else np.zeros(0, np.int32))[self._rows]

    def fill(self, padded: np.ndarray, indices: np.ndarray) -> None:
        rows = indices if isinstance(self._rows, slice) else self._rows[indices]
        chunks = np.searchsorted(self._ends, rows, side="right")
        for line, row, chunk in zip(padded, rows.tolist(), chunks.tolist(), strict=True):
            place = row - (int(self._ends[chunk - 1]) if chunk else 0)
            start, end = self._offsets[chunk][place : place + 2]
            line[: end - start] = self._values[chunk][start:end]


def _numbers(dataset: "Dataset", name: str) -> np.ndarray:
    values = dataset.data.table.column(name).to_numpy()[_row_numbers(dataset)]
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int64)


def _row_numbers(dataset: "Dataset") -> np.ndarray | slice:
    return slice(None) if dataset._indices is None else dataset._indices.column(0).to_numpy()
