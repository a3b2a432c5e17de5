"""A teacher's outputs for a task's rows, kept on disk: on one core, 32 rows of 12 to 63 tokens of a 6×384 BERT were
read back in 60 ms where the pass took 740.

The one idea: real tokens only, in bf16, row after row in one memory-mapped file that is made as a whole before anything
reads it; so what a student sees does not depend on who came first, and a batch is a few copies. Only what the losses
read is kept: the embedding output, the mapped layers' outputs, queries and keys, and the logits.
"""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from effbert.data.batches import Batch, BatchPlan
from effbert.data.cache import dataset_fingerprint
from effbert.files import atomic_dir
from effbert.pace import paced
from effbert.teacher import Teacher, layer_map
from effbert.trace import Trace

GIGABYTE = 10**9
_VALUES, _LOGITS, _META = "values.bf16", "logits.npy", "meta.json"


class TeacherCache:
    """The traces of the first rows of a data set, from `folder`; `open_cache` makes it."""

    def __init__(self, folder: Path, meta: dict, lengths: np.ndarray):
        self.rows, self.layers, self.sizes = meta["rows"], meta["layers"], meta["sizes"]
        self._starts = _starts(lengths)
        shape = (int(self._starts[-1]), sum(self.sizes))
        self._values = np.memmap(folder / _VALUES, np.int16, "r", shape=shape)
        self._logits = torch.from_numpy(np.load(folder / _LOGITS))
        self._heads, self._per_token = meta["heads"], meta["per_token"]

    @property
    def answers(self) -> int:
        """How many tokens or rows have logits."""
        return len(self._logits)

    def trace(self, batch: Batch) -> Trace:
        """What the teacher gives for a batch of these rows, in fp32 from bf16, zero where there is padding; with one
        query, key and hidden state for each layer of the student."""
        count, length = batch.input_ids.shape
        padded = torch.zeros(count, length, sum(self.sizes), dtype=torch.int16)
        logits = torch.zeros(count, length, self._logits.shape[1]) if self._per_token else self._logits[batch.indices]
        for place, row in enumerate(batch.indices.tolist()):
            span = slice(self._starts[row], self._starts[row + 1])
            tokens = span.stop - span.start
            padded[place, :tokens] = torch.from_numpy(self._values[span].copy())
            if self._per_token:
                logits[place, :tokens] = self._logits[span]
        parts = padded.view(torch.bfloat16).float().split(self.sizes, dim=-1)
        queries, keys = (
            tuple(part.unflatten(-1, (self._heads, -1)).transpose(1, 2) for part in parts[first:last])
            for first, last in ((self.layers + 1, 2 * self.layers + 1), (2 * self.layers + 1, None))
        )
        return Trace(tuple(parts[: self.layers + 1]), queries, keys, logits)


def open_cache(
    folder: Path,
    teacher: Teacher,
    dataset,
    num_layers: int,
    inputs_of: Callable[[Batch], tuple],
    pad_token_id: int,
    limit: float,
    say: Callable[[str], None],
) -> TeacherCache | None:
    """The cache of a teacher's outputs on `dataset` (encoded rows), read from `folder` or made there.

    num_layers: of the students. inputs_of: a batch -> what the teacher reads. limit: in GB; None where it would take
    more. Its size is said before it is made. One of another teacher, or of other rows, is made anew, as is a damaged
    one. DiskFullError where it does not fit the disk, and nothing of it is left.
    """
    plan = BatchPlan(dataset, 64, pad_token_id=pad_token_id)
    lengths = plan.rows.lengths
    meta = {"data": dataset_fingerprint(dataset), **_meta(teacher, len(lengths), num_layers)}
    size = 2 * sum(meta["sizes"]) * int(lengths.sum())
    said = f"the teacher's outputs of {len(lengths):,} rows take {size / GIGABYTE:.3f} GB"
    if size > limit * GIGABYTE:
        say(f"{said}, more than --teacher_cache {limit:g}: each batch asks the teacher")
        return None
    found = _read(folder / _META)
    kept = _kept(folder, meta, lengths) if found == meta else None
    if kept is not None:
        return kept
    if found is not None:
        say(f"{folder} is {'damaged' if found == meta else 'of another teacher or other rows'}: made anew")
    say(f"{said} in {folder}")
    with atomic_dir(folder) as temporary:
        _fill(temporary, teacher, plan, num_layers, inputs_of)
        (temporary / _META).write_text(json.dumps(meta), encoding="utf-8")
    return TeacherCache(folder, meta, lengths)


def _kept(folder: Path, meta: dict, lengths: np.ndarray) -> TeacherCache | None:
    """The cache that lies in `folder`, None where its files are not there or not as large as they were made."""
    tokens = int(lengths.sum())
    try:
        cache = TeacherCache(folder, meta, lengths)
        size = (folder / _VALUES).stat().st_size
    except (OSError, ValueError, EOFError):
        return None
    whole = size == 2 * tokens * sum(meta["sizes"]) and cache.answers == (tokens if meta["per_token"] else len(lengths))
    return cache if whole else None


def _meta(teacher: Teacher, rows: int, num_layers: int) -> dict:
    digest, width = hashlib.blake2b(digest_size=16), teacher.config.hidden_size
    for parameter in teacher.parameters():
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
    return {
        "teacher": digest.hexdigest(),
        "rows": rows,
        "layers": num_layers,
        "heads": teacher.config.num_attention_heads,
        "sizes": [width] * (3 * num_layers + 1),
        "per_token": _per_token(teacher),
    }


def _per_token(teacher: Teacher) -> bool:
    """Whether its head answers for every token, as for spans."""
    return hasattr(teacher.model, "qa_outputs")


def _fill(folder: Path, teacher: Teacher, plan: BatchPlan, num_layers: int, inputs_of) -> None:
    starts = _starts(plan.rows.lengths)
    targets = layer_map(len(teacher.layers), num_layers)
    width = teacher.config.hidden_size * (3 * num_layers + 1)
    with open(folder / _VALUES, "wb") as file:  # a disk that fills up under a mapped file ends the process
        os.posix_fallocate(file.fileno(), 0, 2 * int(starts[-1]) * width)
    values = np.memmap(folder / _VALUES, np.int16, "r+", shape=(int(starts[-1]), width))
    logits = None
    for batch in paced(plan, "the teacher's outputs"):
        trace = teacher.trace(*inputs_of(batch))
        kept = [trace.hidden_states[0], *(trace.hidden_states[target + 1] for target in targets)]
        for heads in (trace.queries, trace.keys):
            kept += [heads[target].transpose(1, 2).flatten(2) for target in targets]
        flat = torch.cat(kept, dim=-1).to(torch.bfloat16).view(torch.int16).cpu().numpy()
        answers = trace.logits.float().cpu().numpy()
        if logits is None:
            logits = np.zeros(
                (int(starts[-1]) if answers.ndim == 3 else len(starts) - 1, answers.shape[-1]), np.float32
            )
        for place, row in enumerate(batch.indices.tolist()):
            span = slice(starts[row], starts[row + 1])
            tokens = span.stop - span.start
            values[span] = flat[place, :tokens]
            if answers.ndim == 3:
                logits[span] = answers[place, :tokens]
            else:
                logits[row] = answers[place]
    values.flush()
    with open(folder / _LOGITS, "wb") as file:
        np.save(file, logits)


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(lengths)))


def _read(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
