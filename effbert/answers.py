"""A saved model and what it answers: scores on validation rows, and files for those who score.

`effbert evaluate` scores one model on a task's whole validation splits, or on rows of one's own, and `effbert predict`
writes what the GLUE server and SQuAD's scripts take, or an answer to each row of one's own. The one idea: logits of
every row come first, in the order of the rows, from any folder that transformers can load (a student of ours or a
BERT-like model), and label names are the only thing that joins a model's columns to a task. Whatever can be refused is
refused before any row is read by a model.
"""

import csv
import io
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from effbert import metrics
from effbert.data import files, glue, squad
from effbert.data.batches import Batch, BatchPlan
from effbert.data.cache import dataset_fingerprint, tokenizer_fingerprint
from effbert.data.encode import encode_split
from effbert.data.tasks import TaskSpec, is_known, load_validation, map_labels, plain_name
from effbert.data.tokenizer import load_tokenizer
from effbert.evaluate import predict
from effbert.files import atomic_path, temporary_name, write_atomic
from effbert.teacher import check_texts, content_hash, load_model, read_config, usual_length, usual_windows
from effbert.workspace import answers, pick_device

if TYPE_CHECKING:
    from datasets import Dataset

Say = Callable[[str], None]
NULL_WITHOUT_SPAN = 1e6  # null odds of a question whose context holds no token


@dataclass(frozen=True)
class Reading:
    """How a saved model reads texts.

    Attributes:
        max_length: Longest text in tokens; 0 for what our students and teachers learnt with, as the tokenizer of the
            first and the config of the second says, and for other models 128, or 384 for SQuAD, and no more than
            tokenizer and positions allow.
        doc_stride: Tokens of context by which the windows of a long SQuAD context move on; 0 for what the model learnt
            with, as its config says, and for other models windows that share 128, or a third of max_length.
        max_query_length: Tokens kept of a SQuAD question, special ones not counted; 0 for what the model learnt with,
            and for other models 64, or a quarter of max_length.
        per_device_eval_batch_size: Rows at once.
        labels: Names for the columns of the model's logits, in their order, where its config has none.
        device: "auto" (the GPU where there is one), "cpu", "cuda" or "cuda:N".
    """

    max_length: int = 0
    doc_stride: int = 0
    max_query_length: int = 0
    per_device_eval_batch_size: int = 64
    labels: tuple[str, ...] = ()
    device: str = "auto"

    def __post_init__(self):
        least = {"max_length": 0, "doc_stride": 0, "max_query_length": 0, "per_device_eval_batch_size": 1}
        for name, minimum in least.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name} {getattr(self, name)}: it must be at least {minimum}")


@dataclass(frozen=True)
class OwnRows:
    """Rows of your own to score a model on; their labels are those of the model.

    Attributes:
        validation_file: The rows, as CSV, TSV, JSON or JSON lines; --task is then a name of your own.
        text_columns: Their one or two text columns.
        label_column: Their label column.
        task_kind: "regression" where the labels are scores; without it the model's head says.
    """

    validation_file: str = ""
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    task_kind: Literal["", "classification", "regression"] = ""

    def __post_init__(self):
        if not self.validation_file and (self.text_columns or self.label_column != "label" or self.task_kind):
            raise ValueError("--text_columns, --label_column and --task_kind are for --validation_file: give it too")


@dataclass
class SavedModel:
    """A model folder (or hub name) with the head of a task; its weights are read at first use.

    columns: for classes, which of the model's logits belongs to each of the task's labels.
    """

    folder: str
    spec: TaskSpec
    reading: Reading
    config: object
    tokenizer: object
    max_length: int
    columns: list[int] | None
    _model: torch.nn.Module | None = field(default=None, repr=False)

    def logits(self, rows: "Dataset", name: str) -> tuple["Dataset", list[np.ndarray]]:
        """The split called `name` in ids, and float32 logits for each of its rows: [num_labels] in the order of the
        task's labels, for spans [length, 2] a window. ValueError where some are NaN, which no answer follows from."""
        encoded = encode_split(rows, self.spec, self.tokenizer, self.max_length, **self.windows(), name=name)
        device = pick_device(self.reading.device)
        if self._model is None:
            self._model = load_model(self.folder, self.spec.kind, "model").to(device).eval()
        plan = BatchPlan(encoded, self.reading.per_device_eval_batch_size, pad_token_id=self.tokenizer.pad_token_id)
        found = predict(self._run, plan, device)
        wrong = sum(bool(np.isnan(logits).any()) for logits in found)
        if wrong:
            raise ValueError(
                f"{self.folder}: its logits are NaN for {wrong:,} of the {len(found):,} rows of {name}: the model "
                "diverged while it was trained, or its weights leave the range of their type"
            )
        return encoded, found

    def _run(self, batch: Batch) -> torch.Tensor:
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if "token_type_ids" in self.tokenizer.model_input_names:
            inputs["token_type_ids"] = batch.token_type_ids
        output = self._model(**inputs, return_dict=True)
        if self.spec.kind == "spans":
            return torch.stack((output.start_logits, output.end_logits), dim=-1)
        return output.logits if self.columns is None else output.logits[:, self.columns]

    def fingerprint(self) -> str:
        """A hash of all that decides its answers to a row."""
        parts = [content_hash(self.folder), tokenizer_fingerprint(self.tokenizer), self.max_length, self.columns]
        return json.dumps([*parts, self.windows()])

    def windows(self) -> dict[str, int]:
        """How contexts are cut, as `effbert.data.encode.encode_split` takes it: {} for a task without them."""
        return usual_windows(self.config, self.spec.kind, self.reading)


def open_model(folder: str | Path, spec: TaskSpec, reading: Reading) -> SavedModel:
    """A saved model for a task. ValueError or FileNotFoundError, one line, where the folder lacks a file, the model has
    no head for the task, its labels have other names, or it cannot read texts so long."""
    pick_device(reading.device)
    config = read_config(folder, "model")
    if not answers(config, spec):
        has = "/".join(config.architectures or ()) or f"a bare {config.model_type}"
        needed = {
            "classification": f"a sequence classification head with {max(2, len(spec.labels))} labels",
            "regression": "a sequence classification head with one output",
            "spans": "a question answering head",
        }[spec.kind]
        outputs = f" with {config.num_labels} outputs" if has.endswith("ForSequenceClassification") else ""
        raise ValueError(f"model {folder} is {has}{outputs}: task {spec.name} needs {needed}")
    columns = None
    if spec.kind == "classification":
        if reading.labels and len(reading.labels) != config.num_labels:
            raise ValueError(f"--labels has {len(reading.labels)} names, and model {folder} {config.num_labels} logits")
        columns = map_labels(spec.labels, label_names(config, reading), f"model {folder}", "--labels")
    tokenizer = load_tokenizer(folder)
    length = reading.max_length or usual_length(config, tokenizer, spec.kind)
    check_texts(config, tokenizer, length, "model")
    if getattr(config, "type_vocab_size", 1) < 2:
        tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    return SavedModel(str(folder), spec, reading, config, tokenizer, length, columns)


def label_names(config, reading: Reading) -> dict[int, str]:
    """The name of each of a model's logits, by its column."""
    return dict(enumerate(reading.labels)) if reading.labels else config.id2label


def evaluate_saved(
    folder: str | Path,
    task: str,
    data_dir: str | None = None,
    reading: Reading = Reading(),
    null_threshold: float = 0.0,
    own: OwnRows = OwnRows(),
    say: Say = print,
    done: "Unfinished | None" = None,
) -> dict[str, dict[str, float]]:
    """The official metrics of a saved model on each whole validation split of a task, by split and name; `say` is told
    which split is not there.

    All are fractions of 1 (the published ones are usually printed times 100). SQuAD 2.0 has all that its script prints
    (`effbert.metrics.squad2_scores`); `null_threshold` is how far no answer must be ahead. "rows" (there "total")
    counts rows or questions. `own`: rows of a task of one's own, in place of those of a known one. done:
    keeps the scores of each split, and has those of an earlier start. Raises as `open_model`,
    `effbert.data.tasks.load_validation` and `effbert.data.files.load_split` do.
    """
    if own.validation_file and data_dir:
        raise ValueError("--data_dir and --validation_file exclude each other: the rows of a known task, or your own")
    if own.validation_file and is_known(task):
        raise ValueError(f"--validation_file has your own rows, {task} is a known task: give --task a name of yours")
    refuse_threshold(null_threshold, "" if own.validation_file else task)
    if own.validation_file:
        labels = () if own.task_kind == "regression" else own_labels(folder, reading, own.task_kind)
        spec = files.own_spec(task, own.text_columns, own.label_column, labels)
        model = open_model(folder, spec, reading)
        splits = {"validation": _own_rows(model, own)}
    else:
        spec, splits, notes = load_validation(task, data_dir)
        model = open_model(folder, spec, reading)
        for note in notes:
            say(note)

    def scored(name: str, rows: "Dataset") -> dict[str, float]:
        if done is None:
            return _scores(model, rows, name, null_threshold)
        key = json.dumps([model.fingerprint(), dataset_fingerprint(rows), null_threshold])
        text, kept = done.text(name, key, lambda: json.dumps(_scores(model, rows, name, null_threshold)))
        if kept:
            say(f"{task} {name}: {len(rows):,} rows, kept from before")
        return json.loads(text)

    return {name: scored(name, rows) for name, rows in splits.items()}


def refuse_threshold(null_threshold: float, task: str) -> None:
    """ValueError where a threshold is given for another task than SQuAD 2.0."""
    version2 = plain_name(task) in squad.VERSIONS and squad.spec_of(task).name == squad.NAMES[1]
    if null_threshold and not version2:
        raise ValueError(f"--null_threshold {null_threshold}: it is for squad2.0, where a question may have no answer")


def own_labels(folder: str | Path, reading: Reading, kind: str = "") -> list[str]:
    """The labels that a model gives rows of one's own, in the order of its logits; none where it gives scores, as its
    head says unless `kind` is "classification"."""
    config = read_config(folder, "model")
    names = {} if config.num_labels == 1 and not kind else label_names(config, reading)
    return [str(names[column]) for column in sorted(names, key=int)]


def _own_rows(model: SavedModel, own: OwnRows) -> "Dataset":
    known = f"model {model.folder}, whose labels --labels renames, has"
    return files.load_split(model.spec, own.validation_file, own.text_columns, own.label_column, known)


def _scores(model: SavedModel, rows: "Dataset", name: str, null_threshold: float) -> dict[str, float]:
    encoded, logits = model.logits(rows, name)
    count = {"rows": len(rows)}
    if model.spec.kind == "spans":
        found = _spans(encoded, rows, logits, 1)
        accepted = squad.references(rows)
        texts = {key: prediction.text for key, prediction in found.items()}
        if model.spec.name == "squad":
            return metrics.squad_scores(texts, accepted, version2=False) | count
        odds = {key: prediction.null_odds for key, prediction in found.items()}
        return metrics.squad2_scores(texts, odds, accepted, null_threshold)
    values, labels = np.stack(logits), np.asarray(rows["label"][:])
    predictions = values[:, 0] if model.spec.kind == "regression" else values.argmax(axis=1)
    return metrics.compute(model.spec.metrics, predictions, labels) | count


def _spans(
    encoded: "Dataset", rows: "Dataset", logits: Sequence[np.ndarray], n_best: int
) -> dict[str, squad.Prediction]:
    starts, ends = ([values[:, side] for values in logits] for side in (0, 1))
    return squad.predict_spans(starts, ends, encoded, rows, n_best=n_best)


def check_output(path: str | Path, flag: str = "--output", own: Collection[str] = ()) -> Path:
    """`path`, where a new file can be written; ValueError or OSError, one line, where it exists or cannot be. `own`:
    files, as absolute paths, that may exist, since an earlier start of the same command wrote them."""
    path = Path(path).expanduser()
    if path.exists() and str(path.absolute()) not in own:
        raise ValueError(f"{flag} {path} exists already: remove it or choose another name")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{flag} {path}: there is no folder {path.parent}")
    probe = temporary_name(path)
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"{flag} {path}: the folder cannot be written: {error.strerror}") from error
    return path


class Unfinished:
    """What a command has done so far, in OUTPUT.unfinished/: a killed command finds there what it need not redo."""

    def __init__(self, output: Path):
        self.folder = output.with_name(f"{output.name}.unfinished")
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} should be a folder, for what is done so far, and is a file: remove it")

    def text(self, name: str, key: str, make: Callable[[], str]) -> tuple[str, bool]:
        """The text kept under `name` and `key`, and True; else what `make` gives, kept from now on, and False."""
        kept = self._read(name, dict)
        if kept.get("key") == key and isinstance(kept.get("text"), str):
            return kept["text"], True
        text = make()
        self._write(name, {"key": key, "text": text})
        return text, False

    @property
    def beside(self) -> list[str]:
        """The files beside the output that this command has begun to write, as absolute paths."""
        return self._read("beside", list)

    def begin(self, paths: Sequence[Path]) -> None:
        """Keep that these files beside the output are its own from now on."""
        self._write("beside", [*self.beside, *(str(path.absolute()) for path in paths)])

    def _read(self, name: str, kind: type):
        """What is kept under a name; an empty `kind` where nothing is that can be read."""
        try:
            kept = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError, RecursionError):
            return kind()
        return kept if isinstance(kept, kind) else kind()

    def _write(self, name: str, kept) -> None:
        self.folder.mkdir(exist_ok=True)
        write_atomic(self.folder / name, json.dumps(kept))

    def remove(self) -> None:
        """The output is there."""
        shutil.rmtree(self.folder, ignore_errors=True)


def predict_glue(
    models: Mapping[str, str | Path],
    output: str | Path,
    data_dir: str | None = None,
    reading: Reading = Reading(),
    say: Say = print,
) -> Path:
    """The zip that the GLUE server takes, with the test rows of each task answered by its model; returns its path.

    models: a folder by task ("ax" is the diagnostic set, for a model of MNLI; "mnli" gives both of its files, "mnli-m"
    and "mnli-mm" give one). In the zip each task has its official file: a header `index`, `prediction`, one row a test
    row, labels as the official training files write them, STS-B's scores within 0 to 5. Tasks that are done are kept
    beside the output until all are. ValueError where two models give one file; raises as `open_model`,
    `glue.load_split` and `check_output` do, before any model runs.
    """
    output = check_output(output)
    if output.suffix != ".zip":
        raise ValueError(f"--output {output}: the GLUE server takes a .zip")
    done, texts = Unfinished(output), {}
    if reading.labels and len(set(models.values())) > 1:
        raise ValueError(f"--labels names the columns of one model, and there are {len(set(models.values()))}")
    splits = {task: glue.source_of(task).results for task in models}
    counted = Counter(file for files in splits.values() for file in files.values())
    twice = [file for file, count in counted.items() if count > 1]
    if twice:
        raise ValueError(f"{twice[0]} has two models: give mnli, or mnli-m and mnli-mm")
    opened = {task: open_model(folder, glue.source_of(task).spec, reading) for task, folder in models.items()}
    rows = {(task, split): glue.load_split(task, split, data_dir) for task in models for split in splits[task]}
    for task in models:
        model = opened.pop(task)  # and its weights go with it
        for split, file in splits[task].items():
            part = rows[task, split]
            key = json.dumps([model.fingerprint(), dataset_fingerprint(part)])
            texts[file], kept = done.text(file, key, partial(_glue_file, model, glue.source_of(task), split, part))
            say(f"{file}: {len(part):,} rows{', kept from before' if kept else ''}")
    with atomic_path(output) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for file in sorted(texts):
            entry = zipfile.ZipInfo(file)  # without the date, which would make two equal zips differ
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, texts[file], zipfile.ZIP_DEFLATED)
    done.remove()
    return output


def _glue_file(model: SavedModel, source: glue.Source, split: str, rows: "Dataset") -> str:
    values = np.stack(model.logits(rows, split)[1])
    if source.spec.kind == "regression":
        found = [f"{value:.3f}" for value in values[:, 0].clip(0, 5)]
    else:
        found = [source.codes[label] for label in values.argmax(axis=1)]
    lines = (f"{number}\t{answer}\n" for number, answer in zip(rows["index"], found, strict=True))
    return "index\tprediction\n" + "".join(lines)


def predict_squad(
    folder: str | Path,
    task: str,
    output: str | Path,
    data_dir: str | None = None,
    reading: Reading = Reading(),
    *,
    predict_file: str | None = None,
    null_odds: str | Path | None = None,
    n_best: str | Path | None = None,
    n_best_size: int = 20,
    null_threshold: float = 0.0,
    say: Say = print,
) -> Path:
    """The JSON of answers by question id that SQuAD's scripts take; returns its path.

    The questions are those of `predict_file` (answers are not read), else of the validation split. For SQuAD 2.0 the
    answer is "" where no answer is ahead by more than `null_threshold`. null_odds: also write how far it is ahead, by
    id, which only SQuAD 2.0 has. n_best: also write, by id, the `n_best_size` best texts, with score (start + end
    logit) and probability among them; for SQuAD 2.0 with "" at its place. Raises as `predict_glue` does.
    """
    spec = squad.spec_of(task)
    version2 = spec.name == squad.NAMES[1]
    if null_odds and not version2:
        raise ValueError(f"--null_odds: every question of task {spec.name} has an answer; it is for squad2.0")
    refuse_threshold(null_threshold, spec.name)
    if n_best_size < 1:
        raise ValueError(f"--n_best_size {n_best_size}: it must be at least 1")
    wanted = {"--null_odds": null_odds, "--n_best": n_best}
    sides = {flag: Path(path).expanduser() for flag, path in wanted.items() if path}
    for flag, path in {"--output": Path(output), **sides}.items():
        if path.suffix.lower() != ".json":
            raise ValueError(f"{flag} {path}: SQuAD's scripts take a .json")
    output = check_output(output)
    done = Unfinished(output)
    if len({output, *sides.values()}) <= len(sides):
        raise ValueError(f"--output {output}: each file to be written needs a name of its own")
    for flag, path in sides.items():
        check_output(path, flag, done.beside)
    rows = squad.load_questions(predict_file) if predict_file else squad.load_validation(task, data_dir)
    model = open_model(folder, spec, reading)

    def answer() -> str:
        encoded, logits = model.logits(rows, "validation")
        found = _spans(encoded, rows, logits, n_best_size)
        return json.dumps({key: [prediction.n_best, _odds(prediction)] for key, prediction in found.items()})

    key = json.dumps([model.fingerprint(), dataset_fingerprint(rows), n_best_size])
    text, kept = done.text("answers", key, answer)
    found = json.loads(text)
    refused = {key: version2 and odds > null_threshold for key, (_, odds) in found.items()}
    best = {key: "" if refused[key] or not spans else spans[0][0] for key, (spans, _) in found.items()}
    contents = {
        "--null_odds": {key: odds for key, (_, odds) in found.items()},
        "--n_best": {key: _listed(spans, odds if version2 else None) for key, (spans, odds) in found.items()},
    }
    done.begin(list(sides.values()))
    for flag, path in sides.items():
        write_atomic(path, json.dumps(contents[flag], indent=2) + "\n")
    write_atomic(output, json.dumps(best, indent=2) + "\n")
    done.remove()
    say(f"{output}: {len(best):,} questions{', kept from before' if kept else ''}")
    return output


def _odds(prediction: squad.Prediction) -> float:
    return min(prediction.null_odds, NULL_WITHOUT_SPAN)


def _listed(spans: Sequence[Sequence], null_odds: float | None) -> list[dict[str, float | str]]:
    """Texts with scores and the softmax over them, best first; with odds also "" in its place."""
    entries = [(text, score) for text, score in spans]
    if null_odds is not None:
        entries.append(("", null_odds + (spans[0][1] if spans else 0.0)))
    entries.sort(key=lambda entry: -entry[1])
    scores = np.array([score for _, score in entries], np.float64)
    weights = np.exp(scores - scores.max()) if len(scores) else scores
    return [
        {"text": text, "score": score, "probability": float(weight / weights.sum())}
        for (text, score), weight in zip(entries, weights, strict=True)
    ]


ROW_FORMATS = (".csv", ".tsv", ".json", ".jsonl")


def predict_rows(
    folder: str | Path,
    predict_file: str | Path,
    text_columns: Sequence[str],
    output: str | Path,
    reading: Reading = Reading(),
    say: Say = print,
) -> Path:
    """What a model answers to each row of a file of one's own, in the rows' order, in the format of the output's
    suffix; returns its path. For classes the label, as the model names it, and its probability, for scores the value.

    predict_file: as `effbert.data.files` reads it; it needs no labels. Raises as `open_model`, `files.load_texts` and
    `check_output` do, before the model runs.
    """
    output = Path(output)
    if output.suffix.lower() not in ROW_FORMATS:
        raise ValueError(f"--output {output}: the suffix must say the format, one of {', '.join(ROW_FORMATS)}")
    output, name = check_output(output), Path(predict_file).name
    spec = files.own_spec(name, text_columns, None, own_labels(folder, reading))
    if spec.labels:
        _table([{"label": label} for label in spec.labels], output)  # says what is wrong with them
    model = open_model(folder, spec, reading)
    rows = files.load_texts(spec, predict_file, text_columns)
    values = np.stack(model.logits(rows, name)[1]).astype(np.float64)
    found = (
        [{"value": float(f"{value:.7g}")} for value in values[:, 0]] if not spec.labels else _likeliest(spec, values)
    )
    write_atomic(output, _table(found, output))
    say(f"{output}: {len(found):,} rows")
    return output


def _likeliest(spec: TaskSpec, logits: np.ndarray) -> list[dict[str, str | float]]:
    """The label of each row of logits [rows, labels], and its probability, to six places."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = weights / weights.sum(axis=1, keepdims=True)
    places = logits.argmax(axis=1)
    return [
        {"label": spec.labels[place], "probability": round(float(share[place]), 6)}
        for place, share in zip(places, shares, strict=True)
    ]


def _table(rows: Sequence[Mapping[str, str | float]], path: Path) -> str:
    """The text of a file of rows; ValueError where a label has what the format cannot hold."""
    suffix = path.suffix.lower()
    if suffix == ".json":
        return json.dumps(rows, indent=1, ensure_ascii=False) + "\n"
    if suffix == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = io.StringIO()
    plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None} if suffix == ".tsv" else {}
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n", **plain)
    try:
        writer.writeheader()
        writer.writerows(rows)
    except csv.Error as error:
        raise ValueError(f"--output {path}: a label holds a tab or a line end: write .csv, .json or .jsonl") from error
    return text.getvalue()


def named_models(models: Sequence[str], task: str) -> dict[str, str]:
    """The folder of each task, from arguments TASK=FOLDER, or one FOLDER with --task."""
    if task:
        if len(models) != 1:
            raise ValueError(f"--task {task} is for one model; for several write TASK=FOLDER, such as mrpc=runs/mrpc")
        return {plain_name(task): models[0]}
    found: dict[str, str] = {}
    for model in models:
        name, mark, folder = model.partition("=")
        if not mark or not name or not folder:
            raise ValueError(
                f"{model!r}: write TASK=FOLDER, such as mrpc=runs/mrpc/best, or give --task, or for rows of your own "
                "--predict_file and --text_columns"
            )
        if plain_name(name) in found:
            raise ValueError(f"task {name} has two models: give one")
        found[plain_name(name)] = folder
    return found


def main_evaluate(arguments: list[str]) -> None:
    """effbert evaluate."""
    import tyro

    from effbert.flags import parse, quiet_libraries

    @dataclass(frozen=True)
    class Arguments:
        """The official metrics of a saved model on the whole validation splits of a task, as fractions of 1.

        Attributes:
            model: Folder or name of a model with the task's head.
            task: A task of GLUE (mnli-m and mnli-mm are MNLI's halves), squad, squad2.0, a built-in one, or a name of
                your own with validation_file.
            data_dir: Folder with the official files; without it they come by name.
            null_threshold: For SQuAD 2.0, how far no answer must be ahead of the best span, in logits.
            output: JSON file to write the scores to; a killed command goes on after the split that it had scored.
        """

        model: tyro.conf.Positional[str]
        task: str
        data_dir: str = ""
        null_threshold: float = 0.0
        output: str = ""
        own: tyro.conf.OmitArgPrefixes[OwnRows] = OwnRows()
        reading: tyro.conf.OmitArgPrefixes[Reading] = Reading()

    given = parse(Arguments, arguments, "effbert evaluate")
    output = check_output(given.output) if given.output else None
    done = None if output is None else Unfinished(output)
    quiet_libraries()
    scores = evaluate_saved(
        given.model, given.task, given.data_dir or None, given.reading, given.null_threshold, given.own, done=done
    )
    for split, values in scores.items():
        for name, value in values.items():
            print(f"{given.task} {split} {name} {value if isinstance(value, int) else f'{value:.4f}'}")
    if output is not None:
        rows = {"validation_file": given.own.validation_file} if given.own.validation_file else {}
        content = {"model": given.model, "task": given.task, **rows, "scores": scores}
        write_atomic(output, json.dumps(content, indent=2) + "\n")
        done.remove()


def main_predict(arguments: list[str]) -> None:
    """effbert predict."""
    import tyro

    from effbert.flags import parse, quiet_libraries

    @dataclass(frozen=True)
    class Arguments:
        """The zip of test predictions that the GLUE server takes, the JSON of answers that SQuAD's scripts take, or
        what a model answers to rows of your own: effbert predict MODEL --predict_file rows.csv --text_columns text
        --output answers.csv.

        Attributes:
            models: TASK=FOLDER for each GLUE task, or one FOLDER with --task. mnli gives both of its files, mnli-m and
                mnli-mm give one; ax is the diagnostic set. For rows of your own one FOLDER.
            output: The .zip, for SQuAD the .json file, to write. For rows of your own .csv, .tsv, .json or .jsonl, in
                the order of the rows: label and probability, or for a regression the value.
            task: What the one FOLDER is for; rows of your own have none.
            data_dir: Folder with the official files; without it they come by name.
            predict_file: A file of SQuAD questions other than the validation split; or, with --text_columns, rows of
                your own as CSV, TSV, JSON or JSON lines, which need no labels.
            text_columns: The one or two text columns of your own rows.
            null_odds: For SQuAD 2.0, a JSON file for how far no answer is ahead, by question.
            n_best: For SQuAD, a JSON file for the best answers of each question.
            n_best_size: How many those are.
            null_threshold: For SQuAD 2.0, how far no answer must be ahead of the best span, in logits.
        """

        models: tyro.conf.Positional[tuple[str, ...]]
        output: str
        task: str = ""
        data_dir: str = ""
        predict_file: str = ""
        text_columns: tuple[str, ...] = ()
        null_odds: str = ""
        n_best: str = ""
        n_best_size: int = 20
        null_threshold: float = 0.0
        reading: tyro.conf.OmitArgPrefixes[Reading] = Reading()

        @property
        def of_squad(self) -> bool:
            """Whether a flag is given that SQuAD's answers alone have."""
            return bool(self.null_odds or self.n_best or self.n_best_size != 20 or self.null_threshold)

    given = parse(Arguments, arguments, "effbert predict")
    if given.text_columns:
        _check_own(given)
        quiet_libraries()
        predict_rows(given.models[0], given.predict_file, given.text_columns, given.output, given.reading)
    else:
        _predict_known(given)


def _predict_known(given) -> None:
    """What GLUE and SQuAD take, as the arguments of `effbert predict` say."""
    from effbert.flags import quiet_libraries

    models = named_models(given.models, given.task)
    if not models:
        raise ValueError("predict needs a model: TASK=FOLDER, such as mrpc=runs/mrpc/best, or a FOLDER with --task")
    quiet_libraries()
    spans = [task for task in models if task in squad.VERSIONS]
    if not spans:
        if given.of_squad:
            raise ValueError(f"{SQUAD_FLAGS} are for SQuAD, and no model is for it")
        if given.predict_file:
            raise ValueError("--predict_file is for SQuAD, or for rows of your own with --text_columns and no --task")
        predict_glue(models, given.output, given.data_dir or None, given.reading)
    elif len(models) > 1:
        raise ValueError("SQuAD's answers are a file of their own: predict it without other tasks")
    else:
        predict_squad(
            models[spans[0]],
            spans[0],
            given.output,
            given.data_dir or None,
            given.reading,
            predict_file=given.predict_file or None,
            null_odds=given.null_odds or None,
            n_best=given.n_best or None,
            n_best_size=given.n_best_size,
            null_threshold=given.null_threshold,
        )


SQUAD_FLAGS = "--null_odds, --null_threshold, --n_best and --n_best_size"


def _check_own(given) -> None:
    """ValueError where what is given beside --text_columns does not go with rows of one's own."""
    if not given.predict_file:
        raise ValueError("--text_columns are those of your own rows: give --predict_file too")
    if given.task or given.data_dir:
        raise ValueError("--task and --data_dir are for known tasks: leave them out, or --text_columns")
    if given.of_squad:
        raise ValueError(f"{SQUAD_FLAGS} are for SQuAD: leave them out, or --text_columns")
    if len(given.models) != 1:
        raise ValueError(f"rows of your own are answered by one model, named first: {len(given.models)} are")
