"""GLUE: the nine tasks (https://gluebenchmark.com), from `datasets` by name or from a folder in the official layout.

Both ways give the same rows under the same label names, those of `nyu-mll/glue`. The one idea is the table `TASKS`:
what differs between tasks is data, so one reader serves all nine, and the diagnostic set beside them. For MNLI the
validation split is the matched one; `load_split` gives every other split, test rows too, which have no labels.
MRPC and QQP are ranked by accuracy, not F1: always answering "yes" already has an F1 of 0.8 on MRPC, so F1 would put a
candidate that learnt nothing above many that did; it is reported beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from effbert.data.files import class_index, inner, score, tab_separated, text_dataset, wrong_width
from effbert.data.tasks import Task, TaskSpec, plain_name

if TYPE_CHECKING:
    import datasets

HUB = "nyu-mll/glue"


class Split(NamedTuple):
    """Where a split's rows are: the names its TSV may have, and its name in `datasets`."""

    files: tuple[str, ...]
    hub: str


_SPLITS = {
    "train": Split(("train.tsv",), "train"),
    "validation": Split(("dev.tsv",), "validation"),
    "test": Split(("test.tsv",), "test"),
}


@dataclass(frozen=True)
class Source:
    """Where a task's columns are: by `datasets` name (`hub_texts`) and in the official TSV (`texts`, `label`).

    codes: how the TSV, and the server that scores test rows, write each label, in the order of `spec.labels`.
    splits: for each split the TSV's names, of which one should be there, and its name in `datasets`.
    number: the column of a test file that numbers its rows.
    results: the file in which the server expects the predictions for each test split.
    header: the columns of a train or dev file that has no header line (the test file has one).
    broken_rows: the official file has rows cut in two by a line break inside a text.
    """

    spec: TaskSpec
    folder: str
    hub_texts: tuple[str, ...]
    texts: tuple[str, ...]
    label: str
    codes: tuple[str, ...] = ("0", "1")
    splits: Mapping[str, Split] = field(default_factory=lambda: _SPLITS)
    number: str = "index"
    results: Mapping[str, str] = field(default_factory=dict)
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
    layout.setdefault("results", {"test": f"{folder}.tsv"})
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
            splits={
                "train": Split(("train.tsv",), "train"),
                "validation": Split(("dev_matched.tsv",), "validation_matched"),
                "validation_mismatched": Split(("dev_mismatched.tsv",), "validation_mismatched"),
                "test": Split(("test_matched.tsv",), "test_matched"),
                "test_mismatched": Split(("test_mismatched.tsv",), "test_mismatched"),
            },
            results={"test": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"},
        ),
        _source("qnli", "QNLI", _ENTAILMENT, ("question", "sentence"), codes=_ENTAILMENT),
        _source(
            *("qqp", "QQP", ("not_duplicate", "duplicate"), _QUESTIONS, "is_duplicate", ("accuracy", "f1")),
            number="id",
            broken_rows=True,
        ),
    )
}

# The diagnostic set: test rows alone, answered by a model of MNLI. The official download puts it at
# diagnostic/diagnostic.tsv (columns index, sentence1, sentence2); the copy that `datasets` was made from is AX.tsv.
AX = Source(
    replace(TASKS["mnli"].spec, name="ax"),
    "AX",
    ("premise", "hypothesis"),
    _PAIR,
    "gold_label",
    _NLI,
    splits={"test": Split(("diagnostic.tsv", "AX.tsv", "test.tsv"), "test")},
    results={"test": "AX.tsv"},
)


def _half(validation: str, test: str) -> Source:
    mnli = TASKS["mnli"]
    return replace(
        mnli, splits={name: mnli.splits[name] for name in (validation, test)}, results={test: mnli.results[test]}
    )


# MNLI's halves as the GLUE server and the released students' authors call them: rows to answer, none to learn from.
HALVES = {
    "mnlim": _half("validation", "test"),
    "mnlimm": _half("validation_mismatched", "test_mismatched"),
}


def source_of(name: str) -> Source:
    """The source of a GLUE task, of MNLI's halves "mnli-m" and "mnli-mm", or of the diagnostic set, "ax"; ValueError
    for an unknown name."""
    key = plain_name(name)
    if key == "ax":
        return AX
    if key in HALVES:
        return HALVES[key]
    if key not in TASKS:
        raise ValueError(f"unknown GLUE task {name!r}; choose from {', '.join(s.spec.name for s in TASKS.values())}")
    return TASKS[key]


def load_split(name: str, split: str, data_dir: str | PathLike[str] | None = None):
    """One split of what `source_of` knows as rows text_a, text_b (where there are two), label; no other is read.

    split: "train", "validation", "test", for MNLI "validation_mismatched" and "test_mismatched" too. Test rows have
    label -1 and a column "index", the number under which the server knows them. Raises as `load_task` does.
    """
    source = source_of(name)
    if split not in source.splits:
        raise ValueError(f"task {source.spec.name} has no split {split!r}; it has {', '.join(source.splits)}")
    if data_dir is None:
        return _hub_split(fetch(HUB, plain_name(source.spec.name)), split, source)
    return _file_split(_folder(Path(data_dir), source, split), split, source)


def load_validation(
    name: str, data_dir: str | PathLike[str] | None = None
) -> tuple[dict[str, datasets.Dataset], tuple[str, ...]]:
    """The validation splits of a task by name, of which MNLI has two: those that are there, and a line for each that is
    not. Raises as `load_task` does, and where none is there."""
    source = source_of(name)
    splits = [split for split in source.splits if split.startswith("validation")]
    absent = {}
    if data_dir is not None:
        folder = _folder(Path(data_dir), source, splits[0])
        paths = {split: _path(folder, split, source) for split in splits}
        absent = {split: path for split, path in paths.items() if not path.exists()}
    there = [split for split in splits if split not in absent] or splits
    notes = (f"task {name}: {split} is left out: there is no {path}" for split, path in absent.items())
    return {split: load_split(name, split, data_dir) for split in there}, tuple(notes)


def load_task(name: str, data_dir: str | PathLike[str] | None = None) -> Task:
    """A GLUE task, from `data_dir` if given (the folder that holds `MRPC/`, or that folder itself), else by name.

    STS-B labels are floats from 0 to 5. Raises ValueError for an unknown name; FileNotFoundError or ValueError, with
    file and line, for missing or bad files; FileNotFoundError where the data cannot be fetched.
    """
    source = source_of(name)
    if "train" not in source.splits:
        raise ValueError(f"task {source.spec.name} has test rows only: predict them with a model of MNLI")
    if data_dir is None:
        splits = fetch(HUB, plain_name(source.spec.name))
        return Task(source.spec, *(_hub_split(splits, split, source) for split in ("train", "validation")))
    folder = _folder(Path(data_dir), source, "train")
    return Task(source.spec, *(_file_split(folder, split, source) for split in ("train", "validation")))


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


def _hub_split(splits, split: str, source: Source):
    rows = splits[source.splits[split].hub]
    texts = [rows[column] for column in source.hub_texts]
    if split.startswith("test"):
        return _unlabelled(source, list(zip(texts[0], texts[-1], strict=True)), rows["idx"])
    labels = rows["label"]
    if source.spec.kind == "classification":
        names = rows.features["label"].names
        index = [class_index(name, source.spec.labels, f"{HUB} {source.spec.name}") for name in names]
        labels = [index[label] for label in labels]
    return text_dataset(source.spec, list(zip(texts[0], texts[-1], labels, strict=True)))


def _file_split(folder: Path, split: str, source: Source):
    path = _path(folder, split, source)
    if not split.startswith("test"):
        return text_dataset(source.spec, list(_rows(path, source)))
    texts, numbers = [], []
    for number, *pair in _test_rows(path, source):
        texts.append(pair)
        numbers.append(number)
    return _unlabelled(source, texts, numbers)


def _path(folder: Path, split: str, source: Source) -> Path:
    names = source.splits[split].files
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def _unlabelled(source: Source, texts: Sequence[Sequence[str]], numbers: Sequence[int]):
    rows = text_dataset(source.spec, [(first, second, -1) for first, second in texts])
    return rows.add_column("index", list(numbers))


def _folder(root: Path, source: Source, split: str) -> Path:
    """The task's folder in `root`, or `root` itself where it holds a file of the split."""
    if not root.is_dir():
        raise FileNotFoundError(f"data_dir {root}: no such folder")
    root = inner(root, "glue")
    names = {plain_name(source.folder), *({"diagnostic"} if source is AX else ())}
    for child in sorted(root.iterdir()):
        if child.is_dir() and plain_name(child.name) in names:
            return child
    files = [name for other in source.splits.values() for name in other.files]
    if any((root / name).exists() for name in files):
        return root
    wanted = " or ".join(source.splits[split].files)
    raise FileNotFoundError(f"data_dir {root}: holds neither {source.folder}/ nor {wanted}")


def _rows(path: Path, source: Source) -> Iterator[tuple[str, str, int | float]]:
    """Two texts (the same twice where a row has one) and the label."""
    for where, fields in _fields(path, source, (*source.texts, source.label), source.header):
        yield fields[0], fields[-2], _label(fields[-1], source, where)


def _test_rows(path: Path, source: Source) -> Iterator[tuple[int, str, str]]:
    """The row's number and two texts (the same twice where a row has one)."""
    for where, fields in _fields(path, source, (source.number, *source.texts)):
        if not fields[0].isdecimal():
            raise ValueError(f"{where}: the row's number should be a whole number, not {fields[0]!r}")
        yield int(fields[0]), fields[1], fields[-1]


def _fields(
    path: Path, source: Source, columns: Sequence[str], header: Sequence[str] = ()
) -> Iterator[tuple[str, list[str]]]:
    """Where each row lies ("file:line"), and its fields in the order of `columns`."""
    lines = tab_separated(path)
    header = list(header) or lines.pop(0)[1]
    for column in columns:
        if column not in header:
            raise ValueError(f"{path}:1: no column {column!r}; the header has {', '.join(header)}")
    if not lines:
        raise ValueError(f"{path}: there are no rows below the header")
    places = [header.index(column) for column in columns]
    for line, fields in _mended(lines, len(header)) if source.broken_rows else lines:
        if len(fields) != len(header):
            raise wrong_width(path, line, len(fields), len(header))
        yield f"{path}:{line}", [fields[place] for place in places]


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
