"""GLUE: the nine tasks (https://gluebenchmark.com), from `datasets` by name or from a folder in the official layout.

Both ways give the same rows under the same label names, those of `nyu-mll/glue`. The one idea is the table `TASKS`:
what differs between tasks is data, so one reader serves all nine. For MNLI the validation split is the matched one.
MRPC and QQP are ranked by accuracy, not F1: always answering "yes" already has an F1 of 0.8 on MRPC, so F1 would put a
candidate that learnt nothing above many that did; it is reported beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from effbert.data.files import class_index, score, tab_separated, text_dataset, wrong_width
from effbert.data.tasks import Task, TaskSpec, plain_name

HUB = "nyu-mll/glue"


@dataclass(frozen=True)
class Source:
    """Where a task's columns are: by `datasets` name (`hub_texts`) and in the official TSV (`texts`, `label`).

    codes: how the TSV writes each label, in the order of `spec.labels`.
    header: the columns of a file that has no header line.
    broken_rows: the official file has rows cut in two by a line break inside a text.
    """

    spec: TaskSpec
    folder: str
    hub_texts: tuple[str, ...]
    texts: tuple[str, ...]
    label: str
    codes: tuple[str, ...] = ("0", "1")
    dev: str = "dev.tsv"
    header: tuple[str, ...] = ()
    broken_rows: bool = False


def _source(
    name: str,
    folder: str,
    labels: tuple[str, ...],
    texts: tuple[str, ...],
    label: str = "label",
    metrics: tuple[str, ...] = ("accuracy",),
    hub_texts: tuple[str, ...] | None = None,
    **layout,
) -> Source:
    spec = TaskSpec(name, "classification" if labels else "regression", labels, metrics, len(texts) == 2)
    return Source(spec, folder, hub_texts or texts, texts, label, **layout)


_PAIR = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_ENTAILMENT = ("entailment", "not_entailment")
_NLI = ("entailment", "neutral", "contradiction")
_COLA_COLUMNS = ("source", "label", "original", "sentence")

TASKS = {
    plain_name(source.spec.name): source
    for source in (
        _source("cola", "CoLA", ("unacceptable", "acceptable"), ("sentence",), metrics=("mcc",), header=_COLA_COLUMNS),
        _source("sst-2", "SST-2", ("negative", "positive"), ("sentence",)),
        _source(
            *("mrpc", "MRPC", ("not_equivalent", "equivalent"), ("#1 String", "#2 String"), "Quality"),
            metrics=("accuracy", "f1"),
            hub_texts=_PAIR,
        ),
        _source("rte", "RTE", _ENTAILMENT, _PAIR, codes=_ENTAILMENT),
        _source("sts-b", "STS-B", (), _PAIR, "score", ("pearson", "spearman"), codes=()),
        _source("wnli", "WNLI", ("not_entailment", "entailment"), _PAIR),
        _source(
            *("mnli", "MNLI", _NLI, _PAIR, "gold_label"),
            hub_texts=("premise", "hypothesis"),
            codes=_NLI,
            dev="dev_matched.tsv",
        ),
        _source("qnli", "QNLI", _ENTAILMENT, ("question", "sentence"), codes=_ENTAILMENT),
        _source(
            *("qqp", "QQP", ("not_duplicate", "duplicate"), _QUESTIONS, "is_duplicate", ("accuracy", "f1")),
            broken_rows=True,
        ),
    )
}


def load_task(name: str, data_dir: str | PathLike[str] | None = None) -> Task:
    """A GLUE task, from `data_dir` if given (the folder that holds `MRPC/`, or that folder itself), else by name.

    STS-B labels are floats from 0 to 5. Raises ValueError for an unknown name; FileNotFoundError or ValueError, with
    file and line, for missing or bad files; FileNotFoundError where the data cannot be fetched.
    """
    key = plain_name(name)
    if key not in TASKS:
        raise ValueError(f"unknown GLUE task {name!r}; choose from {', '.join(s.spec.name for s in TASKS.values())}")
    source = TASKS[key]
    if data_dir is None:
        return _from_hub(key, source)
    folder = _folder(Path(data_dir), source)
    splits = (text_dataset(source.spec, list(_rows(folder / file, source))) for file in ("train.tsv", source.dev))
    return Task(source.spec, *splits)


def fetch(path: str, config: str | None = None):
    """`datasets.load_dataset`, with one line for the person at the keyboard where it cannot be had."""
    import datasets

    try:
        return datasets.load_dataset(path, config)
    except Exception as error:  # the layers below raise kinds of their own, down to those of the HTTP client
        what = f"{path} {config}" if config else path
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise FileNotFoundError(
            f"{what} could not be fetched, give data_dir with the official files ({reason})"
        ) from error


def _from_hub(config: str, source: Source) -> Task:
    splits = fetch(HUB, config)
    validation = "validation_matched" if config == "mnli" else "validation"
    return Task(source.spec, *(_hub_split(splits[split], source) for split in ("train", validation)))


def _hub_split(split, source: Source):
    texts = [split[column] for column in source.hub_texts]
    labels = split["label"]
    if source.spec.kind == "classification":
        names = split.features["label"].names
        index = [class_index(name, source.spec.labels, f"{HUB} {source.spec.name}") for name in names]
        labels = [index[label] for label in labels]
    return text_dataset(source.spec, list(zip(texts[0], texts[-1], labels, strict=True)))


def _folder(root: Path, source: Source) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir {root}: no such folder")
    for child in sorted(root.iterdir()):
        if child.is_dir() and plain_name(child.name) == plain_name(source.folder):
            return child
    if (root / "train.tsv").exists():
        return root
    raise FileNotFoundError(f"data_dir {root}: holds neither {source.folder}/ nor train.tsv and {source.dev}")


def _rows(path: Path, source: Source) -> Iterator[tuple[str, str, int | float]]:
    lines = tab_separated(path)
    header = list(source.header) or lines.pop(0)[1]
    for column in (*source.texts, source.label):
        if column not in header:
            raise ValueError(f"{path}:1: no column {column!r}; the header has {', '.join(header)}")
    if not lines:
        raise ValueError(f"{path}: there are no rows below the header")
    *texts, label = (header.index(column) for column in (*source.texts, source.label))
    for line, fields in _mended(lines, len(header)) if source.broken_rows else lines:
        if len(fields) != len(header):
            raise wrong_width(path, line, len(fields), len(header))
        yield fields[texts[0]], fields[texts[-1]], _label(fields[label], source, f"{path}:{line}")


def _label(text: str, source: Source, where: str) -> int | float:
    return class_index(text, source.codes, where) if source.codes else score(text, where)


def _mended(lines: list[tuple[int, list[str]]], width: int) -> Iterator[tuple[int, list[str]]]:
    """Rows whose text a line break cut in two, made whole: short lines are joined where they add up to `width`."""
    position = 0
    while position < len(lines):
        line, fields = lines[position]
        joined, taken = list(fields), 1
        while len(joined) < width and position + taken < len(lines):
            more = lines[position + taken][1]
            joined[-1:] = [f"{joined[-1]} {more[0]}", *more[1:]]
            taken += 1
        if taken > 1 and len(joined) == width:
            yield line, joined
            position += taken
        else:
            yield line, fields
            position += 1
