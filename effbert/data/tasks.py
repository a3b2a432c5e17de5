"""Tasks: what a task is, and one door to all of them.

A task is a train and a validation split in raw text plus a `TaskSpec` that says what a head must answer and how it is
scored. Where the rows come from (built in, GLUE, SQuAD, the user's own files) is settled in `load_task`, so nothing
downstream asks. Class labels are names; an index means something only together with the `labels` of its spec, and
`map_labels` is the one place where the names of two models meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import datasets

Kind = Literal["classification", "regression", "spans"]

BUILTIN = ("builtin-topic", "builtin-next")


@dataclass(frozen=True)
class TaskSpec:
    """What a head must answer and how it is scored.

    labels: class names in the order of the logits, () for regression and spans.
    metrics: names of `effbert.metrics`; the first one ranks candidates, higher is better. Spans have the two scores of
        `squad_scores`, all others those of `compute`.
    pair: whether a row has two texts.
    """

    name: str
    kind: Kind
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    pair: bool

    @property
    def num_labels(self) -> int:
        """Width of the head: one logit a class, 1 for regression, 2 for spans (start and end)."""
        return {"classification": len(self.labels), "regression": 1, "spans": 2}[self.kind]


@dataclass(frozen=True)
class Task:
    """Two splits with raw columns: text_a, text_b where `spec.pair`, and label (index into `spec.labels`, or float).

    Spans have id, question, context and answers instead, the last as {"text": [str], "answer_start": [int]} with
    starts in characters of the context; both lists are empty where the context holds no answer. notes: what was left
    out of the data, and why, a line each.
    """

    spec: TaskSpec
    train: datasets.Dataset
    validation: datasets.Dataset
    notes: tuple[str, ...] = ()


def load_task(
    name: str,
    data_dir: str | PathLike[str] | None = None,
    *,
    train_file: str | PathLike[str] | None = None,
    validation_file: str | PathLike[str] | None = None,
    text_columns: Sequence[str] = (),
    label_column: str = "label",
    kind: Literal["classification", "regression"] | None = None,
) -> Task:
    """A task by name, or by `train_file` and `validation_file`, where the name is the user's to choose.

    Case and hyphens in a name do not matter. GLUE and SQuAD come from `data_dir` (official layout) or, without it,
    from `datasets` by name. `text_columns`, `label_column` and `kind` are for the user's own files, see
    `effbert.data.files`. Raises ValueError for an unknown name or arguments that do not go together, and
    FileNotFoundError or ValueError, with file and line, for bad data.
    """
    from effbert.data import files, glue, squad

    if train_file is not None:
        if data_dir is not None:
            raise ValueError(
                "data_dir and train_file exclude each other: give the folder of a known task, or two files"
            )
        if validation_file is None:
            raise ValueError(f"task {name!r}: train_file needs a validation_file beside it")
        return files.load_task(name, train_file, validation_file, text_columns, label_column, kind)
    if validation_file is not None or text_columns or kind is not None:
        raise ValueError(f"task {name!r}: validation_file, text_columns and kind go with train_file, which is missing")

    wanted = plain_name(name)
    if wanted in map(plain_name, BUILTIN):
        if data_dir is not None:
            raise ValueError(f"task {name!r} is built in and reads no files: leave data_dir out")
        from effbert.data import builtin

        return builtin.load_task(next(known for known in BUILTIN if plain_name(known) == wanted))
    if wanted in glue.TASKS or wanted == "ax":
        return glue.load_task(wanted, data_dir)
    if wanted in squad.VERSIONS:
        return squad.load_task(wanted, data_dir)
    choices = [*BUILTIN, *(source.spec.name for source in glue.TASKS.values()), *squad.NAMES]
    raise ValueError(f"unknown task {name!r}; choose from {', '.join(choices)}, or give train_file for your own data")


def load_validation(
    name: str, data_dir: str | PathLike[str] | None = None
) -> tuple[TaskSpec, dict[str, datasets.Dataset], tuple[str, ...]]:
    """What a known task asks, its whole validation splits by name, MNLI's mismatched one too, and a line for each that
    is not in `data_dir`; no other rows are read, so that none need be there. "mnli-m" and "mnli-mm" have one split of
    MNLI's. Raises as `load_task` does, and where no split is there."""
    from effbert.data import glue, squad

    wanted = plain_name(name)
    if wanted in glue.TASKS or wanted in glue.HALVES:
        return glue.source_of(wanted).spec, *glue.load_validation(wanted, data_dir)
    if wanted in squad.VERSIONS:
        return squad.spec_of(wanted), {"validation": squad.load_validation(wanted, data_dir)}, ()
    task = load_task(name, data_dir)
    return task.spec, {"validation": task.validation}, ()


def scored_by(name: str, own: bool = False, kind: Kind | None = None) -> tuple[Kind, tuple[str, ...]]:
    """Kind and metrics of a task before any of its rows is read: of a known one, or of `own` files whose kind is given
    where labels are scores. ValueError for an unknown name."""
    from effbert.data import builtin, files, glue, squad

    wanted = plain_name(name)
    if own:
        kind = kind or "classification"
        return kind, files.METRICS[kind]
    if wanted in map(plain_name, BUILTIN):
        return "classification", builtin.METRICS
    spec = glue.TASKS[wanted].spec if wanted in glue.TASKS else squad.spec_of(name)
    return spec.kind, spec.metrics


def is_known(name: str) -> bool:
    """Whether a name is that of a built-in task, of GLUE or of SQuAD."""
    from effbert.data import glue, squad

    wanted = plain_name(name)
    return wanted in {*map(plain_name, BUILTIN), *glue.TASKS, *glue.HALVES, *squad.VERSIONS, "ax"}


def plain_name(name: str) -> str:
    """The name with case, hyphens and underscores taken out: `SST-2` and `sst2` are one task."""
    return name.lower().replace("-", "").replace("_", "")


def task_key(name: str) -> str:
    """What all names of one task have in common: `plain_name`, and of SQuAD's names the first."""
    from effbert.data import squad

    key = plain_name(name)
    return plain_name(squad.spec_of(key).name) if key in squad.VERSIONS else key


def map_labels(
    task_labels: Sequence[str], model_id2label: Mapping[int, str], where: str, flag: str = "--teacher_labels"
) -> list[int]:
    """For each label of a classification task, the column of the model's logits that carries the same name.

    Names are compared without regard to case, unless a set has names that differ by case alone; order never matters.
    `where` names the model in the error, `flag` what renames its labels. Raises ValueError, showing both sets, where
    they are not the same.
    """
    ids = [int(column) for column in model_id2label]
    names = [str(label) for label in model_id2label.values()]
    same = _folded(task_labels, names)
    columns = {same(label): column for label, column in zip(names, ids, strict=True)}
    if sorted(ids) != list(range(len(ids))) or len(columns) != len(ids):
        raise ValueError(f"{where}: its labels must be distinct names for columns 0 to n-1, but are {model_id2label!r}")
    if {same(label) for label in task_labels} == columns.keys():
        return [columns[same(label)] for label in task_labels]
    both = f"the task has labels {_shown(task_labels)}, {where} has {_shown(names)}"
    if len(names) == len(task_labels) and all(label.upper().startswith("LABEL_") for label in names):
        raise ValueError(f"{both}, which say nothing: name them in the order of its logits with {flag}")
    raise ValueError(f"{both}: both must have the same names ({flag} renames, in the order of its logits)")


def _folded(*label_sets: Sequence[str]):
    if all(len({label.casefold() for label in labels}) == len(labels) for labels in label_sets):
        return str.casefold
    return str


def _shown(labels: Sequence[str]) -> str:
    return "{" + ", ".join(labels) + "}"
