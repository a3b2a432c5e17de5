"""A user's own task from two files with named columns, and the careful reading that every file format here shares.

The suffix decides the format: .csv (comma, double quotes), .tsv (tab, no quoting, as GLUE writes it), .json (a list of
objects, or one under "data"), .jsonl (an object a line). Whatever is wrong in a file is reported with its line, so
that the person at the keyboard can go there.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from effbert.data.tasks import Task, TaskSpec

if TYPE_CHECKING:
    import datasets

METRICS = {"classification": ("accuracy", "mcc"), "regression": ("pearson", "spearman")}
Rows = Iterator[tuple[str, dict[str, Any]]]  # where the row lies ("file:line"), the row by column


def load_task(
    name: str,
    train_file: str | PathLike[str],
    validation_file: str | PathLike[str],
    text_columns: Sequence[str],
    label_column: str = "label",
    kind: Literal["classification", "regression"] | None = None,
) -> Task:
    """One or two text columns and a label column make a task called `name`; other columns are left alone.

    Labels are names: the strings of the train file, sorted (1 in JSON is "1", true is "True"). Labels that are all
    numbers, not all of them whole, are neither assumed to be classes nor to be scores: `kind` must say so. With
    kind="regression" labels are finite floats. Raises FileNotFoundError or ValueError, with file and line.
    """
    _check_columns(name, text_columns, label_column)
    train, validation = (
        list(_fields(Path(file), text_columns, label_column)) for file in (train_file, validation_file)
    )
    if kind is None:
        _refuse_scores(train_file, [label for *_, label in train])
    labels = () if kind == "regression" else tuple(sorted({label for *_, label in train}))
    if len(labels) == 1:
        raise ValueError(f"{train_file}: every row has the label {labels[0]!r}; a task needs at least two labels")
    spec = _spec(name, text_columns, labels)
    return Task(spec, *(_labelled(spec, rows) for rows in (train, validation)))


def own_spec(
    name: str, text_columns: Sequence[str], label_column: str | None = "label", labels: Sequence[str] = ()
) -> TaskSpec:
    """What a task in one's own files asks where its labels are known without a train file; none for scores. ValueError
    where the columns do not do, as in `load_task`. label_column: None where the files have none."""
    _check_columns(name, text_columns, label_column)
    return _spec(name, text_columns, labels)


def load_split(
    spec: TaskSpec,
    path: str | PathLike[str],
    text_columns: Sequence[str],
    label_column: str = "label",
    known: str = "known labels are",
) -> datasets.Dataset:
    """One file of an `own_spec`, with the columns of `Task`; its labels may be in other case. `known` stands before the
    labels where one is none of them; raises as `load_task` does."""
    return _labelled(spec, list(_fields(Path(path), text_columns, label_column)), known, any_case=True)


def load_texts(spec: TaskSpec, path: str | PathLike[str], text_columns: Sequence[str]) -> datasets.Dataset:
    """The texts of one file of an `own_spec`, with a label 0 for each row, which says nothing; raises as `load_task`
    does."""
    return text_dataset(spec, [(text_a, text_b, 0) for _, text_a, text_b, _ in _fields(Path(path), text_columns, None)])


def inner(root: Path, name: str) -> Path:
    """The folder called `name`, in any case, in `root`; `root` itself where there is none."""
    return next((child for child in sorted(root.iterdir()) if child.is_dir() and child.name.lower() == name), root)


def text_dataset(spec: TaskSpec, rows: Sequence[tuple[str, str, int | float]]) -> datasets.Dataset:
    """(text_a, text_b, label) rows as a Dataset with the columns of `Task`; text_b is left out unless `spec.pair`."""
    from datasets import Dataset, Features, Value

    label_type = "int64" if spec.kind == "classification" else "float32"
    columns = {
        "text_a": [row[0] for row in rows],
        "text_b": [row[1] for row in rows],
        "label": [row[2] for row in rows],
    }
    types = {"text_a": Value("string"), "text_b": Value("string"), "label": Value(label_type)}
    if not spec.pair:
        del columns["text_b"], types["text_b"]
    return Dataset.from_dict(columns, features=Features(types))


def class_index(
    label: str, labels: Sequence[str], where: str, known: str = "known labels are", any_case: bool = False
) -> int:
    """The index of a label; with any_case in other case too, where only one is spelt so. ValueError with `where` and,
    after `known`, the labels if it is none of them."""
    if label in labels:
        return labels.index(label)
    alike = [index for index, other in enumerate(labels) if any_case and other.casefold() == label.casefold()]
    if len(alike) != 1:
        raise ValueError(f"{where}: unknown label {label!r}; {known} {', '.join(labels)}")
    return alike[0]


def score(label: str, where: str) -> float:
    """A regression label as a finite float; ValueError with `where` otherwise."""
    number = _number(label)
    if number is None:
        raise ValueError(f"{where}: label {label!r} should be a finite number")
    return number


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, line ends as they are, without a byte order mark.

    Raises FileNotFoundError for no such file; ValueError for an empty one, and, with line and byte offset, for bytes
    that are not UTF-8.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise ValueError(f"{path}:{line}: {byte} is not UTF-8; save the file as UTF-8") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty")
    return text


def tab_separated(path: Path) -> list[tuple[int, list[str]]]:
    """(line number, fields) of every line of a TSV file without quoting; empty lines at the end are dropped."""
    lines = read_text(path).rstrip("\r\n").split("\n")
    return [(number, line.removesuffix("\r").split("\t")) for number, line in enumerate(lines, 1)]


def refuse_half(text: str, where: str) -> None:
    """ValueError with `where` for a text with half of a character, which JSON can escape and no file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise ValueError(f"{where} holds {half}, half of a character: write both halves, or none") from None


def wrong_width(path: Path, line: int, found: int, expected: int) -> ValueError:
    """The error for a row that has `found` columns where `expected` are due."""
    return ValueError(f"{path}:{line}: {found} columns, expected {expected}")


def _fields(path: Path, text_columns: Sequence[str], label_column: str | None) -> Iterator[tuple[str, str, str, str]]:
    """(where, text_a, text_b or "", label) of every row, all as strings; the label is "" without a column for it."""
    readers = {".csv": _comma_rows, ".tsv": _tab_rows, ".json": _json_rows, ".jsonl": _json_line_rows}
    if path.suffix.lower() not in readers:
        raise ValueError(f"{path}: the suffix must say the format, one of {', '.join(readers)}")
    count, unlabelled = 0, []
    for where, row in readers[path.suffix.lower()](path):
        count += 1
        for column in (*text_columns, *([] if label_column is None else [label_column])):
            if column not in row:
                hint = _other_separator(path, list(row))
                raise ValueError(f"{where}: no column {column!r}; there are {', '.join(row)}{hint}")
        texts = [row[column] for column in text_columns]
        for column, text in zip(text_columns, texts, strict=True):
            if not isinstance(text, str):
                raise ValueError(f"{where}: column {column!r} should hold text, not {json.dumps(text)[:40]}")
            refuse_half(text, f"{where}: column {column!r}")
        label = None if label_column is None else _label(row[label_column], f"{where}: column {label_column!r}")
        if label == "":
            unlabelled.append(
                f"{where}: column {label_column!r} should hold a label, not {json.dumps(row[label_column])}"
            )
        yield where, texts[0], texts[1] if len(texts) == 2 else "", label or ""
    if not count:
        raise ValueError(f"{path}: there are no rows")
    if unlabelled:
        raise ValueError(f"{unlabelled[0]}: rows without one: {len(unlabelled):,} of {count:,}")


def _label(label: Any, where: str) -> str:
    """As text; "" where there is none."""
    if label is None:
        return ""
    endless = isinstance(label, float) and not math.isfinite(label)  # NaN, which JSON lacks and Python reads
    if isinstance(label, (list, dict)) or endless:
        raise ValueError(f"{where} should hold a label, not {json.dumps(label)[:40]}")
    refuse_half(str(label), where)
    return str(label)


def _other_separator(path: Path, header: Sequence[str]) -> str:
    """What to add to an error about columns where the header is one column that something else seems to separate."""
    usual = {".csv": ",", ".tsv": "\t"}.get(path.suffix.lower())
    found = [mark for mark in ";\t|," if mark != usual and len(header) == 1 and mark in header[0]]
    if usual is None or not found:
        return ""
    return f"; the header seems to be separated by {found[0]!r}: write commas in .csv, or tabs in .tsv"


def _comma_rows(path: Path) -> Rows:
    text = read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    usual = csv.field_size_limit(len(text))  # 131,072 characters, of all readers of this process
    try:
        line, rows = 1, []
        for fields in reader:
            if fields:
                rows.append((line, fields))
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: not a CSV row: {error}") from None
    finally:
        csv.field_size_limit(usual)
    return _under_header(path, rows)


def _tab_rows(path: Path) -> Rows:
    return _under_header(path, tab_separated(path))


def _under_header(path: Path, rows: Sequence[tuple[int, list[str]]]) -> Rows:
    (first, header), *rest = rows
    if len(set(header)) < len(header):
        raise ValueError(f"{path}:{first}: a column name occurs twice: {', '.join(header)}")
    for line, fields in rest:
        if len(fields) != len(header):
            error = wrong_width(path, line, len(fields), len(header))
            raise ValueError(f"{error}{_other_separator(path, header)}")
        yield f"{path}:{line}", dict(zip(header, fields, strict=True))


def parse_json(path: Path, text: str, first_line: int = 1) -> Any:
    """`text` of the file as JSON, where it begins at `first_line`; ValueError with line and column."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}:{line}: not JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{path}:{first_line}: not JSON that can be read: nested too deep") from None
    except ValueError as error:  # a number of too many digits; Python advises behind the semicolon
        reason = str(error).partition(";")[0]
        raise ValueError(f"{path}:{first_line}: not JSON that can be read: {reason}") from None


def _json_rows(path: Path) -> Rows:
    content = parse_json(path, read_text(path))
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f'{path}: should hold a list of objects, or {{"data": [...]}}')
    for number, row in enumerate(rows, 1):
        yield _json_row(f"{path}: row {number}", row)


def _json_line_rows(path: Path) -> Rows:
    for line, text in enumerate(read_text(path).split("\n"), 1):
        if text.strip():
            yield _json_row(f"{path}:{line}", parse_json(path, text, line))


def _json_row(where: str, row: Any) -> tuple[str, dict[str, Any]]:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: should be an object, not {json.dumps(row)[:40]}")
    return where, row


def _number(label: str) -> float | None:
    try:
        number = float(label)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def _refuse_scores(path: str | PathLike[str], labels: Sequence[str]) -> None:
    numbers = [_number(label) for label in labels]
    if all(number is not None for number in numbers) and not all(number.is_integer() for number in numbers):
        raise ValueError(
            f"{path}: labels are numbers like {labels[0]}: scores or classes? give --task_kind regression or "
            "classification, in Python kind='regression' or 'classification'"
        )


def _check_columns(name: str, text_columns: Sequence[str], label_column: str | None) -> None:
    if not 1 <= len(text_columns) <= 2:
        raise ValueError(f"task {name!r}: text_columns takes one or two column names, not {len(text_columns)}")
    wanted = [*text_columns, *([] if label_column is None else [label_column])]
    if len(set(wanted)) < len(wanted):
        columns = "text columns" if label_column is None else "text and label columns"
        raise ValueError(f"task {name!r}: {columns} must be different, but are {', '.join(wanted)}")


def _spec(name: str, text_columns: Sequence[str], labels: Sequence[str]) -> TaskSpec:
    kind = "classification" if labels else "regression"
    return TaskSpec(name, kind, tuple(labels), METRICS[kind], len(text_columns) == 2)


def _labelled(
    spec: TaskSpec,
    rows: Sequence[tuple[str, str, str, str]],
    known: str = "known labels are",
    any_case: bool = False,
) -> datasets.Dataset:
    def value(label: str, where: str) -> int | float:
        if spec.kind == "regression":
            return score(label, where)
        return class_index(label, spec.labels, where, known, any_case)

    return text_dataset(spec, [(text_a, text_b, value(label, where)) for where, text_a, text_b, label in rows])
