"""Saved models on official layouts: scores, the GLUE server's zip, SQuAD's answers, and what is refused."""

import copy
import csv
import json
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification, BertConfig
from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

import effbert.answers
from commands import killed_before
from effbert.__main__ import main
from effbert.answers import (
    OwnRows,
    Reading,
    SavedModel,
    Unfinished,
    evaluate_saved,
    main_evaluate,
    named_models,
    open_model,
    predict_glue,
    predict_rows,
    predict_squad,
)
from effbert.data import files, glue, squad
from effbert.data.tokenizer import train_wordpiece
from effbert.metrics import compute
from effbert.model import EffBertConfig, new_student
from effbert.teacher import _auto_class

ROOT = Path(__file__).resolve().parents[2]
WORDS = "the red fox runs over a hill while a dog sleeps and nobody wrote it in 1843".split()
TINY = "linear1_1(gelu(linear1_1(x,wb1)),wb2)"


def text(seed: int, words: int = 6) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, words))


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([" ".join(WORDS)] * 3, 120, max_length=64)


def spec_of(task: str):
    return squad.spec_of(task) if task.startswith("squad") else glue.source_of(task).spec


def save_bert(folder: Path, task: str, tokenizer, seed: int = 0, labels=None, **changes) -> str:
    """A tiny BERT with large weights and centred logits, so that its answers differ from row to row."""
    spec = spec_of(task)
    names = labels or {"regression": ("score",), "spans": ("start", "end")}.get(spec.kind, spec.labels)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    usual = {"max_position_embeddings": 64, "initializer_range": 0.5, "id2label": dict(enumerate(names)), **sizes}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = BertConfig(**{**ids, **usual, **changes})
    torch.manual_seed(seed)
    model = _auto_class(spec.kind).from_config(config).eval()
    if spec.kind == "classification":
        inputs = tokenizer([text(n) for n in range(20)], padding=True, return_tensors="pt")
        with torch.no_grad():
            model.classifier.bias -= model(**inputs).logits.mean(dim=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_glue(root: Path, task: str, split: str, rows: int = 12) -> Path:
    """A file of the split in the official layout, with texts that a tiny vocabulary knows."""
    source = glue.source_of(task)
    test = split.startswith("test")
    columns = [source.number, *source.texts] if test else [*(source.header or source.texts), source.label]
    columns = list(dict.fromkeys(columns))
    lines = [] if source.header and not test else ["\t".join(columns)]
    for n in range(rows):
        code = source.codes[n % len(source.codes)] if source.codes else f"{n % 6}.5"
        fields = {source.number: str(n), source.label: code}
        fields |= {name: text(100 * place + n) for place, name in enumerate(source.texts)}
        lines.append("\t".join(fields.get(column, "x") for column in columns))
    path = root / source.folder / source.splits[split].files[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_squad(root: Path, version: str, name: str = "dev") -> Path:
    rows = [{"id": "a", "question": text(1, 3), "answers": [{"text": "red fox", "answer_start": 4}]}]
    if version == "2.0":
        rows.append({"id": "b", "question": text(2, 3), "answers": [], "is_impossible": True})
    context = "the red fox runs over a hill while a dog sleeps " * 6
    content = {"version": version, "data": [{"title": "t", "paragraphs": [{"context": context, "qas": rows}]}]}
    root.mkdir(exist_ok=True)
    path = root / f"{name}-v{version}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("EFFBERT_CACHE", str(tmp_path_factory.mktemp("cache")))


def one_by_one(folder: str, task: str, rows, tokenizer) -> np.ndarray:
    """Logits of a model fed by hand, a row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    pairs = zip(rows["text_a"], rows["text_b"] if spec_of(task).pair else [None] * len(rows), strict=True)
    with torch.inference_mode():
        return np.concatenate([model(**tokenizer(a, b, return_tensors="pt")).logits.numpy() for a, b in pairs])


@pytest.mark.parametrize("task", ["cola", "mrpc", "sts-b"])
def test_scores_are_those_of_the_rows_fed_by_hand(task, tmp_path, tokenizer):
    folder = save_bert(tmp_path / "model", task, tokenizer)
    write_glue(tmp_path, task, "validation", 20)
    rows = glue.load_split(task, "validation", tmp_path)
    logits = one_by_one(folder, task, rows, tokenizer)
    predictions = logits[:, 0] if task == "sts-b" else logits.argmax(axis=1)
    wanted = compute(spec_of(task).metrics, predictions, np.asarray(rows["label"][:]))
    found = evaluate_saved(folder, task, tmp_path, Reading(per_device_eval_batch_size=3))["validation"]
    assert found == pytest.approx(wanted | {"rows": 20}, abs=1e-5)
    assert len(set(predictions.tolist())) > 1


def save_other(folder: Path, family: str, tokenizer, labels, **changes) -> str:
    """A tiny classifier of another family, with large weights; `family` as in transformers' class names."""
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 16}
    own = {"DistilBert": {"n_layers": 1, "n_heads": 2, "dim": 16, "hidden_dim": 16}}
    usual = {
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "init_std": 0.5,
        "id2label": dict(enumerate(labels)),
    }
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    config = getattr(transformers, f"{family}Config")(**{**ids, **usual, **own.get(family, sizes), **changes})
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("family", ["DistilBert", "MPNet", "DebertaV2"])
def test_a_model_without_segments_is_scored(family, tmp_path, tokenizer, capsys):
    if family == "MPNet":  # its positions count from 2, whatever the config says of padding
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = "[UNK]"
        assert tokenizer.pad_token_id == 1
    folder = save_other(tmp_path / "model", family, tokenizer, spec_of("mrpc").labels)
    write_glue(tmp_path, "mrpc", "validation", 20)
    rows = glue.load_split("mrpc", "validation", tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    encoded = tokenizer(list(rows["text_a"]), list(rows["text_b"]), padding=True, return_tensors="pt")
    with torch.inference_mode():
        logits = model(encoded["input_ids"], encoded["attention_mask"]).logits.numpy()
    found = open_model(folder, spec_of("mrpc"), Reading()).logits(rows, "validation")[1]
    np.testing.assert_allclose(np.stack(found), logits, atol=1e-5)
    assert main(["evaluate", folder, "--task", "mrpc", "--data_dir", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("mrpc validation rows 20\n")
    longest = 62 if family == "MPNet" else 64
    with pytest.raises(ValueError, match=f"texts of at most {longest} tokens: --max_length 65 is too long"):
        open_model(folder, spec_of("mrpc"), Reading(max_length=65))


def test_a_model_that_does_not_say_how_long_texts_may_be_is_refused(tmp_path, tokenizer, capsys):
    folder = save_other(tmp_path / "model", "DistilBert", tokenizer, spec_of("mrpc").labels)
    config = transformers.FunnelConfig(vocab_size=len(tokenizer), id2label=dict(enumerate(spec_of("mrpc").labels)))
    config.architectures = ["FunnelForSequenceClassification"]
    config.save_pretrained(folder)
    write_glue(tmp_path, "mrpc", "validation")
    capsys.readouterr()
    for more in ((), ("--max_length", "32")):
        said = fails(capsys, "evaluate", folder, "--task", "mrpc", "--data_dir", tmp_path, *more)
        assert "a funnel model cannot be read: its config should have max_position_embeddings" in said


def test_labels_meet_by_name_not_by_place(tmp_path, tokenizer):
    write_glue(tmp_path, "mrpc", "validation", 20)
    there = save_bert(tmp_path / "there", "mrpc", tokenizer)
    back = save_bert(tmp_path / "back", "mrpc", tokenizer, labels=("EQUIVALENT", "not_equivalent"))
    bare = save_bert(tmp_path / "bare", "mrpc", tokenizer, labels=("LABEL_0", "LABEL_1"))
    named = Reading(labels=("equivalent", "not_equivalent"))
    accuracy = [
        evaluate_saved(folder, "mrpc", tmp_path, reading)["validation"]["accuracy"]
        for folder, reading in ((there, Reading()), (back, Reading()), (bare, named))
    ]
    assert accuracy[0] == pytest.approx(1 - accuracy[1]) and accuracy[1] == accuracy[2]
    with pytest.raises(ValueError, match=r"LABEL_0, LABEL_1\}, which say nothing: .* with --labels"):
        open_model(bare, spec_of("mrpc"), Reading())
    with pytest.raises(ValueError, match=r"--labels has 3 names, and model .* 2 logits"):
        open_model(bare, spec_of("mrpc"), Reading(labels=("a", "b", "c")))


def test_mnli_is_scored_on_both_validation_splits_by_a_student_of_ours(tmp_path, tokenizer):
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "embedding_size": 8}
    config = EffBertConfig(architecture=TINY, vocab_size=len(tokenizer), initializer_range=0.5, **sizes)
    torch.manual_seed(0)
    new_student(config, "classification", spec_of("mnli").labels).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    write_glue(tmp_path, "mnli", "test")
    with pytest.raises(FileNotFoundError, match=r"dev_matched.tsv: no such file"):
        evaluate_saved(tmp_path / "student", "mnli", tmp_path)
    said = []
    matched = write_glue(tmp_path, "mnli", "validation", 9)
    alone = evaluate_saved(tmp_path / "student", "mnli", tmp_path, say=said.append)
    mismatched = write_glue(tmp_path, "mnli", "validation_mismatched", 6)
    scores = evaluate_saved(tmp_path / "student", "mnli", tmp_path, say=said.append)
    assert alone == {"validation": scores["validation"]}
    assert said == [f"task mnli: validation_mismatched is left out: there is no {mismatched}"]
    for task, split in (("mnli-m", "validation"), ("MNLI-mm", "validation_mismatched")):
        assert evaluate_saved(tmp_path / "student", task, tmp_path) == {split: scores[split]}
    matched.unlink()
    assert list(evaluate_saved(tmp_path / "student", "mnli", tmp_path, say=said.append)) == ["validation_mismatched"]
    assert said[1:] == [f"task mnli: validation is left out: there is no {matched}"]
    assert {split: values["rows"] for split, values in scores.items()} == {
        "validation": 9,
        "validation_mismatched": 6,
    }
    assert all(set(values) == {"accuracy", "rows"} for values in scores.values())


def write_rows(path: Path, labels, rows: int = 20) -> str:
    """A CSV with two columns of text and one of labels, taken in turn."""
    lines = [f"{text(n)},{text(100 + n)},{labels[n % len(labels)]}" for n in range(rows)]
    path.write_text("\n".join(["one,two,verdict", *lines]) + "\n")
    return str(path)


@pytest.mark.parametrize("task", ["mrpc", "sts-b", "cola"])
def test_own_rows_are_scored_with_the_labels_of_the_model(task, tmp_path, tokenizer):
    folder, spec = save_bert(tmp_path / "model", task, tokenizer), spec_of(task)
    labels = spec.labels[::-1] or ("1.5", "4", "0.25")  # classes come in another order than the model's
    file = write_rows(tmp_path / "own.csv", labels)
    columns = ("one", "two") if spec.pair else ("one",)
    rows = files.load_task("mine", file, file, columns, "verdict", "regression" if task == "sts-b" else None).validation
    logits = one_by_one(folder, task, rows, tokenizer)
    if task == "sts-b":
        wanted = compute(("pearson", "spearman"), logits[:, 0], np.asarray(rows["label"][:]))
    else:
        known = [sorted(spec.labels).index(label) for label in spec.labels]
        columns_of_model = np.asarray(known)[logits.argmax(axis=1)]
        wanted = compute(("accuracy", "mcc"), columns_of_model, np.asarray(rows["label"][:]))
    own = OwnRows(file, columns, "verdict")
    assert evaluate_saved(folder, "mine", own=own)["validation"] == pytest.approx(wanted | {"rows": 20}, abs=1e-5)


def test_own_rows_may_lack_labels_and_the_models_may_be_named(tmp_path, tokenizer):
    folder = save_bert(tmp_path / "model", "mnli", tokenizer, labels=("LABEL_0", "LABEL_1", "LABEL_2"))
    own = OwnRows(write_rows(tmp_path / "own.csv", ("maybe",)), ("one", "two"), "verdict")
    parts = [
        evaluate_saved(folder, "mine", reading=Reading(labels=labels), own=own)["validation"]["accuracy"]
        for labels in (("maybe", "no", "yes"), ("no", "maybe", "yes"), ("no", "yes", "maybe"))
    ]
    assert sum(parts) == pytest.approx(1) and len(set(parts)) > 1


@pytest.mark.parametrize(
    ("trained", "label", "more", "says"),
    [
        ("mrpc", "Art", {}, r"own.csv:2: unknown label 'Art'; model .* has not_equivalent, equivalent$"),
        ("sts-b", "Art", {}, "own.csv:2: label 'Art' should be a finite number"),
        ("mrpc", "1", {"task_kind": "regression"}, "with 2 outputs: task mine needs .* head with one output"),
        ("sts-b", "1", {"task_kind": "classification"}, "with 1 outputs: task mine needs .* head with 2 labels"),
        ("squad", "1", {}, "is BertForQuestionAnswering: task mine needs a sequence classification head"),
        ("mrpc", "1", {"text_columns": ()}, "text_columns takes one or two column names, not 0"),
        ("mrpc", "1", {"text_columns": ("body",)}, "own.csv:2: no column 'body'; there are one, two, verdict"),
    ],
)
def test_own_rows_that_do_not_go_with_the_model(trained, label, more, says, tmp_path, tokenizer):
    folder = save_bert(tmp_path / "model", trained, tokenizer)
    file = write_rows(tmp_path / "own.csv", (label,))
    own = OwnRows(**{"validation_file": file, "text_columns": ("one",), "label_column": "verdict", **more})
    with pytest.raises(ValueError, match=says) as caught:
        evaluate_saved(folder, "mine", own=own)
    assert "\n" not in str(caught.value)


def test_own_rows_need_a_name_of_their_own(tmp_path, tokenizer):
    folder = save_bert(tmp_path / "model", "mrpc", tokenizer)
    own = OwnRows(write_rows(tmp_path / "own.csv", ("equivalent",)), ("one",), "verdict")
    for task in ("squad", "MRPC", "mnli-mm"):
        with pytest.raises(ValueError, match=f"{task} is a known task: give --task a name of yours"):
            evaluate_saved(folder, task, own=own)


def read_answers(path: Path) -> list[dict[str, str]]:
    """Rows of a file of answers, read without effbert, values as text."""
    content = path.read_text()
    if path.suffix == ".json":
        found = json.loads(content)
    elif path.suffix == ".jsonl":
        found = [json.loads(line) for line in content.splitlines()]
    else:
        plain = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
        found = list(csv.DictReader(content.splitlines(), **plain))
    return [{name: str(value) for name, value in row.items()} for row in found]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
@pytest.mark.parametrize("task", ["mrpc", "cola", "sts-b"])
def test_own_rows_are_answered_one_by_one_in_their_order(task, suffix, tmp_path, tokenizer, capsys):
    names = {"mrpc": ("not the same", 'the same, "or so"'), "cola": ("schön", "other")}.get(task)
    folder, pair = save_bert(tmp_path / "model", task, tokenizer, labels=names), spec_of(task).pair
    rows = [{"two": text(100 + n, 3 + n % 7), "id": n, "one": text(n, 3 + n % 5)} for n in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    columns = ("one", "two") if pair else ("one",)
    arguments = ["predict", folder, "--predict_file", tmp_path / "rows.jsonl", "--text_columns", *columns]
    command = [str(word) for word in (*arguments, "--output", tmp_path / f"out{suffix}")]
    assert main([*command, "--per_device_eval_batch_size", "3"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / f'out{suffix}'}: 20 rows\n"
    found = read_answers(tmp_path / f"out{suffix}")
    texts = {f"text_{place}": [row[column] for row in rows] for place, column in zip("ab", columns, strict=False)}
    logits = one_by_one(folder, task, Sized(texts), tokenizer)
    if task == "sts-b":
        assert [float(row["value"]) for row in found] == pytest.approx(logits[:, 0], abs=1e-5)
        assert all(set(row) == {"value"} for row in found)
    else:
        shares = torch.tensor(logits).softmax(-1).max(dim=-1).values
        assert [row["label"] for row in found] == [names[place] for place in logits.argmax(axis=1)]
        assert [float(row["probability"]) for row in found] == pytest.approx(shares.tolist(), abs=1e-5)
        assert len({row["label"] for row in found}) == 2
    assert "exists already: remove it" in fails(capsys, *command)


class Sized(dict):
    """Columns of texts, as long as each of them."""

    def __len__(self):
        return len(self["text_a"])


def test_a_killed_answer_to_own_rows_leaves_no_file(tmp_path, tokenizer):
    folder = save_bert(tmp_path / "model", "cola", tokenizer)
    own = ("--predict_file", write_rows(tmp_path / "own.csv", ("a",)), "--text_columns", "one")
    command = ["predict", folder, *own, "--output", str(tmp_path / "out.csv")]
    killed_before("out.csv", command)
    assert not (tmp_path / "out.csv").exists()
    assert main(command) == 0 and len(read_answers(tmp_path / "out.csv")) == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out.csv", "own.csv"]


@pytest.mark.parametrize(
    ("trained", "content", "more", "says"),
    [
        ("cola", "body\na b\n", {}, r"rows.csv:2: no column 'one'; there are body"),
        ("cola", "", {}, "rows.csv: the file is empty"),
        ("cola", "one\n", {}, "rows.csv: there are no rows"),
        ("cola", "one\na\n", {"text_columns": ("one", "one")}, "text columns must be different, but are one, one"),
        ("cola", "one\na\n", {"text_columns": ("a", "b", "c")}, "takes one or two column names, not 3"),
        ("cola", None, {}, "rows.csv: no such file"),
        ("squad", "one\na\n", {}, "is BertForQuestionAnswering: task rows.csv needs a sequence classification head"),
        (
            "cola",
            "one\na\n",
            {"reading": Reading(labels=("a", "b", "c"))},
            "--labels has 3 names, and model .* 2 logits",
        ),
        ("cola", "one\na\n", {"reading": Reading(labels=("a\tb", "c"))}, "out.tsv: a label holds a tab or a line end"),
    ],
)
def test_own_rows_that_cannot_be_answered(trained, content, more, says, tmp_path, tokenizer):
    folder = save_bert(tmp_path / "model", trained, tokenizer)
    if content is not None:
        (tmp_path / "rows.csv").write_text(content)
    given = {"text_columns": ("one",), "output": tmp_path / "out.tsv", **more}
    with pytest.raises((ValueError, FileNotFoundError), match=says) as caught:
        predict_rows(folder, tmp_path / "rows.csv", **given)
    assert "\n" not in str(caught.value) and not (tmp_path / "out.tsv").exists()


def oracle(self: SavedModel, rows, name):
    """Logits of a model that knows the first answer, and sees at token 0 where there is none."""
    encoded = squad.encode_spans(rows, self.tokenizer, self.max_length)
    logits = [np.zeros((len(window["input_ids"]), 2), np.float32) for window in encoded]
    for values, window in zip(logits, encoded, strict=True):
        values[window["start_positions"], 0] = values[window["end_positions"], 1] = 5.0
    return encoded, logits


@pytest.mark.parametrize("task", ["squad", "squad2.0"])
def test_squad_scores_of_a_model_that_knows(task, tmp_path, tokenizer, monkeypatch):
    write_squad(tmp_path / "data", "2.0" if task == "squad2.0" else "1.1")
    folder = save_bert(tmp_path / "model", task, tokenizer)
    real = evaluate_saved(folder, task, tmp_path / "data")["validation"]
    monkeypatch.setattr(SavedModel, "logits", oracle)
    known = evaluate_saved(folder, task, tmp_path / "data")["validation"]
    assert real.keys() == known.keys() and known["f1"] == 1 and real["f1"] < 1
    if task == "squad2.0":
        assert (known["HasAns_exact"], known["NoAns_exact"], known["best_exact"], known["total"]) == (1, 1, 1, 2)
        strict = evaluate_saved(folder, task, tmp_path / "data", null_threshold=-100.0)["validation"]
        assert (strict["HasAns_exact"], strict["NoAns_exact"]) == (0, 1)


def test_windows_are_those_that_are_asked_for(tmp_path, tokenizer):
    """And part of what a prediction that was killed is known by; a task without windows has none."""
    write_squad(tmp_path, "1.1")
    folder = save_bert(tmp_path / "model", "squad", tokenizer)
    rows = squad.load_validation("squad", tmp_path)
    readings = [Reading(doc_stride=stride, max_query_length=question) for stride in (0, 7) for question in (0, 2)]
    found = []
    for reading in readings:
        model = open_model(folder, spec_of("squad"), reading)
        encoded, logits = model.logits(rows, "validation")
        wanted = squad.encode_spans(rows, tokenizer, 64, reading.doc_stride, reading.max_query_length)
        assert encoded["input_ids"] == wanted["input_ids"] and len(logits) == len(wanted)
        found.append(model.fingerprint())
    assert len(set(found)) == 4
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"doc_stride": 7, "max_query_length": 2}))
    noted = [open_model(folder, spec_of("squad"), reading).windows() for reading in (Reading(), Reading(doc_stride=5))]
    assert noted == [{"doc_stride": stride, "max_query_length": 2} for stride in (7, 5)]  # as it learnt, unless told
    other = save_bert(tmp_path / "other", "rte", tokenizer)
    assert len({open_model(other, spec_of("rte"), reading).fingerprint() for reading in readings}) == 1


@pytest.mark.parametrize("task", ["squad", "rte"])
def test_a_teacher_is_read_as_long_as_it_learnt_with(task, tmp_path, tokenizer, capsys):
    """With windows that no others would fit, and more than its tokenizer advises."""
    longer = copy.deepcopy(tokenizer)
    longer.model_max_length = 256
    folder = save_bert(tmp_path / "bert", task, longer, max_position_embeddings=512)
    for name in ("train", "dev"):
        write_squad(tmp_path / "data", "1.1", name)
    for name in ("train", "validation"):
        write_glue(tmp_path / "data", "rte", name)
    data = ["--task", task, "--data_dir", str(tmp_path / "data"), "--device", "cpu"]
    windows = ["--doc_stride", "330"] if task == "squad" else []
    sizes = ["--max_length", "400", "--finetuning.num_train_epochs", "1", "--output_dir", str(tmp_path / "run")]
    assert main(["teacher", "--teacher", folder, *data, *windows, *sizes]) == 0
    model = open_model(tmp_path / "run" / "model", spec_of(task), Reading())
    assert model.max_length == 400
    assert main(["evaluate", str(tmp_path / "run" / "model"), *data]) == 0
    assert open_model(tmp_path / "run" / "model", spec_of(task), Reading(max_length=24)).max_length == 24


def everything(tmp_path, tokenizer) -> dict[str, str]:
    """Test files of all tasks, and a model for each."""
    models = {}
    for task in [*glue.TASKS, "ax"]:
        for split in glue.source_of(task).results:
            write_glue(tmp_path, task, split, 5)
        kind = "mnli" if task == "ax" else task
        models[task] = save_bert(tmp_path / "models" / kind, kind, tokenizer, seed=len(models))
    return models


def test_the_zip_has_the_servers_files_and_spellings(tmp_path, tokenizer):
    models = everything(tmp_path, tokenizer)
    output = predict_glue(models, tmp_path / "glue.zip", tmp_path, say=lambda line: None)
    with zipfile.ZipFile(output) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    assert set(files) == {f"{name}.tsv" for name in "AX CoLA MNLI-m MNLI-mm MRPC QNLI QQP RTE SST-2 STS-B WNLI".split()}
    spellings = {"MNLI-m.tsv": {"entailment", "neutral", "contradiction"}, "RTE.tsv": {"entailment", "not_entailment"}}
    for file, content in files.items():
        header, *rows = content.splitlines()
        assert header == "index\tprediction" and [row.split("\t")[0] for row in rows] == list("01234")
        task = next(task for task in models if file in glue.source_of(task).results.values())
        source = glue.source_of(task)
        split = next(split for split, name in source.results.items() if name == file)
        logits = one_by_one(models[task], task, glue.load_split(task, split, tmp_path), tokenizer)
        found = [row.split("\t")[1] for row in rows]
        if file == "STS-B.tsv":
            assert [float(score) for score in found] == pytest.approx(logits[:, 0].clip(0, 5), abs=1e-3)
        else:
            assert found == [source.codes[column] for column in logits.argmax(axis=1)]
            assert set(found) <= spellings.get(file, {*"01", *spellings["MNLI-m.tsv"], "not_entailment"})
    again = predict_glue(models, tmp_path / "again.zip", tmp_path, say=lambda line: None)
    assert again.read_bytes() == output.read_bytes()
    assert not list(tmp_path.glob("*.unfinished"))


def test_mnlis_halves_are_files_of_their_own(tmp_path, tokenizer, capsys):
    folder = save_bert(tmp_path / "model", "mnli", tokenizer)
    for split in ("test", "test_mismatched"):
        write_glue(tmp_path, "mnli", split, 5)
    files = {}
    for name, task in (("whole", "mnli"), ("matched", "mnli-m"), ("mismatched", "MNLI-mm")):
        arguments = ["predict", f"{task}={folder}", "--data_dir", str(tmp_path)]
        assert main([*arguments, "--output", str(tmp_path / f"{name}.zip")]) == 0
        with zipfile.ZipFile(tmp_path / f"{name}.zip") as archive:
            files[name] = {file: archive.read(file) for file in archive.namelist()}
    assert files["whole"] == files["matched"] | files["mismatched"]
    assert (list(files["matched"]), list(files["mismatched"])) == (["MNLI-m.tsv"], ["MNLI-mm.tsv"])
    capsys.readouterr()
    twice = ("predict", f"mnli={folder}", f"mnli-mm={folder}", "--output", tmp_path / "twice.zip")
    assert "MNLI-mm.tsv has two models: give mnli, or mnli-m and mnli-mm" in fails(capsys, *twice)


def test_a_config_that_asks_for_tuples_changes_no_answer(tmp_path, tokenizer):
    write_glue(tmp_path, "rte", "validation", 8)
    folder = save_bert(tmp_path / "model", "rte", tokenizer)
    scores = evaluate_saved(folder, "rte", tmp_path)
    file = Path(folder) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"return_dict": False}))
    assert evaluate_saved(folder, "rte", tmp_path) == scores


def test_nan_is_no_answer(tmp_path, tokenizer):
    for split in ("validation", "test"):
        write_glue(tmp_path, "rte", split, 8)
    folder = save_bert(tmp_path / "model", "rte", tokenizer)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.classifier.bias.data[1] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"not finite: classifier\.bias"):
        evaluate_saved(folder, "rte", tmp_path)
    model.classifier.bias.data[1] = 0
    model.bert.embeddings.LayerNorm.weight.data.fill_(3e38)  # finite, but what it makes is not
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match="its logits are NaN for 8 of the 8 rows of"):
        evaluate_saved(folder, "rte", tmp_path)
    with pytest.raises(ValueError, match="its logits are NaN for 8 of the 8 rows of"):
        predict_glue({"rte": folder}, tmp_path / "glue.zip", tmp_path, say=lambda line: None)
    assert not (tmp_path / "glue.zip").exists()


def test_a_score_outside_the_scale_is_cut_to_it(tmp_path, tokenizer, monkeypatch):
    write_glue(tmp_path, "sts-b", "test", 3)
    folder = save_bert(tmp_path / "model", "sts-b", tokenizer)
    values = [np.array([value], np.float32) for value in (-0.7, 2.3456, 5.01)]
    monkeypatch.setattr(SavedModel, "logits", lambda self, rows, name: (None, values))
    output = predict_glue({"sts-b": folder}, tmp_path / "glue.zip", tmp_path, say=lambda line: None)
    content = zipfile.ZipFile(output).read("STS-B.tsv").decode()
    assert content == "index\tprediction\n0\t0.000\n1\t2.346\n2\t5.000\n"


def test_scores_that_are_interrupted_go_on_with_the_next_split(tmp_path, tokenizer, monkeypatch, capsys):
    folder = save_bert(tmp_path / "model", "mnli", tokenizer)
    write_glue(tmp_path, "mnli", "validation", 9)
    write_glue(tmp_path, "mnli", "validation_mismatched", 6)
    arguments = [str(folder), "--task", "mnli", "--data_dir", str(tmp_path), "--output", str(tmp_path / "a.json")]
    main_evaluate(arguments)
    whole = (tmp_path / "a.json").read_bytes()
    arguments[-1] = str(output := tmp_path / "b.json")
    read, asked = SavedModel.logits, []

    def logits(self, rows, split):
        asked.append(split)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return read(self, rows, split)

    monkeypatch.setattr(SavedModel, "logits", logits)
    with pytest.raises(KeyboardInterrupt):
        main_evaluate(arguments)
    assert not output.exists()
    main_evaluate(arguments)
    assert asked == ["validation", *["validation_mismatched"] * 2] and output.read_bytes() == whole
    assert "mnli validation: 9 rows, kept from before" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.glob("b*")) == ["b.json"]


KILLED = """
import json, os, signal, sys
from effbert.answers import predict_glue
models, data, output = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
predict_glue(models, output, data, say=lambda line: "MRPC" in line and os.kill(os.getpid(), signal.SIGKILL))
"""


def test_a_killed_command_goes_on_with_the_next_task(tmp_path, tokenizer, monkeypatch):
    models = {}
    for task in ("cola", "mrpc", "rte"):
        write_glue(tmp_path, task, "test", 5)
        models[task] = save_bert(tmp_path / "models" / task, task, tokenizer, seed=len(models))
    whole = predict_glue(models, tmp_path / "whole.zip", tmp_path, say=lambda line: None).read_bytes()
    output = tmp_path / "glue.zip"
    arguments = [sys.executable, "-c", KILLED, json.dumps(models), str(tmp_path), str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert subprocess.run(arguments, env=environment, capture_output=True).returncode == -signal.SIGKILL
    assert not output.exists() and (tmp_path / "glue.zip.unfinished").is_dir()

    asked = []
    load = effbert.answers.load_model
    monkeypatch.setattr(
        effbert.answers, "load_model", lambda folder, *rest: asked.append(folder) or load(folder, *rest)
    )
    said = []
    save_bert(tmp_path / "models" / "cola", "cola", tokenizer, seed=9)  # another model: its answers are not kept
    assert predict_glue(models, output, tmp_path, say=said.append) == output
    assert asked == [models["cola"], models["rte"]]
    assert said == ["CoLA.tsv: 5 rows", "MRPC.tsv: 5 rows, kept from before", "RTE.tsv: 5 rows"]
    parts = [zipfile.ZipFile(path) for path in (output, tmp_path / "whole.zip")]
    assert all(len({part.read(name) for part in parts}) == 1 for name in ("MRPC.tsv", "RTE.tsv"))
    assert not (tmp_path / "glue.zip.unfinished").exists()
    save_bert(tmp_path / "models" / "cola", "cola", tokenizer, seed=0)
    assert predict_glue(models, tmp_path / "same.zip", tmp_path, say=said.append).read_bytes() == whole


def test_squads_answers_odds_and_best(tmp_path, tokenizer, monkeypatch):
    path = write_squad(tmp_path / "data", "2.0")
    folder = save_bert(tmp_path / "model", "squad2.0", tokenizer)
    monkeypatch.setattr(SavedModel, "logits", oracle)
    files = {name: tmp_path / f"{name}.json" for name in ("output", "null_odds", "n_best")}

    def predict(task="squad2.0", **settings):
        predict_squad(folder, task, data_dir=tmp_path / "data", say=lambda line: None, **settings)
        found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
        for file in files.values():
            file.unlink(missing_ok=True)
        return found

    found = predict(**files, n_best_size=3)
    assert found["output"] == {"a": "red fox", "b": ""}
    assert found["null_odds"] == {"a": pytest.approx(-10.0), "b": pytest.approx(10.0)}
    assert found["n_best"]["b"][0]["text"] == "" and len(found["n_best"]["b"]) == 4
    first = found["n_best"]["a"][0]
    assert first["text"] == "red fox" and first["score"] == pytest.approx(10.0) and first["probability"] > 0.9
    assert sum(entry["probability"] for entry in found["n_best"]["a"]) == pytest.approx(1)
    assert predict(output=files["output"], null_threshold=11.0)["output"]["b"] != ""
    other = path.rename(tmp_path / "other.json")
    assert predict(output=files["output"], predict_file=str(other)).keys() == {"output"}
    write_squad(tmp_path / "data", "1.1")
    found = predict("squad", output=files["output"], n_best=files["n_best"])
    assert found["output"] == {"a": "red fox"} and all(entry["text"] for entry in found["n_best"]["a"])
    with pytest.raises(ValueError, match="--null_odds: every question of task squad has an answer"):
        predict("squad", **files)
    with pytest.raises(ValueError, match="it is for squad2"):
        predict("squad", output=files["output"], null_threshold=3.0)
    for task in ("squad", "mrpc"):
        with pytest.raises(ValueError, match="it is for squad2"):
            evaluate_saved(folder, task, tmp_path / "data", null_threshold=3.0)


def test_a_killed_squad_prediction_asks_the_model_for_nothing_again(tmp_path, tokenizer, monkeypatch):
    write_squad(tmp_path / "data", "2.0")
    folder = save_bert(tmp_path / "model", "squad2.0", tokenizer)
    output = tmp_path / "out" / "answers.json"
    output.parent.mkdir()

    def arguments(path):
        return ["predict", folder, "--task", "squad2.0", "--data_dir", str(tmp_path / "data"), "--output", str(path)]

    killed_before("answers.json", arguments(output))
    assert not output.exists() and (output.parent / "answers.json.unfinished").is_dir()
    assert main(arguments(tmp_path / "whole.json")) == 0
    monkeypatch.setattr(SavedModel, "logits", lambda *more: pytest.fail("its answers were kept"))
    assert main(arguments(output)) == 0
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert list(output.parent.iterdir()) == [output]


def test_a_file_beside_the_answers_is_replaced_only_where_the_same_command_began_it(tmp_path, tokenizer, capsys):
    write_squad(tmp_path / "data", "2.0")
    folder = save_bert(tmp_path / "model", "squad2.0", tokenizer)
    data = ("--task", "squad2.0", "--data_dir", str(tmp_path / "data"))
    odds, best = tmp_path / "odds.json", tmp_path / "best.json"
    command = ["predict", folder, *data, "--output", str(tmp_path / "answers.json"), "--null_odds", str(odds)]
    killed_before("odds.json", [*command, "--n_best", str(best)])
    killed_before("answers.json", [*command, "--n_best", str(best)])
    assert odds.exists() and best.exists()
    other = tmp_path / "other.json"
    other.write_text("mine")
    capsys.readouterr()
    assert f"--n_best {other} exists already" in fails(capsys, *command, "--n_best", other)
    assert "there is no folder" in fails(capsys, *command, "--n_best", tmp_path / "nowhere" / "best.json")
    assert other.read_text() == "mine"
    assert main([*command, "--n_best", str(best)]) == 0
    assert json.loads(odds.read_text()).keys() == json.loads(best.read_text()).keys() == {"a", "b"}


def test_a_file_is_refused_where_another_command_was_killed_before_it_wrote_any(tmp_path, tokenizer, capsys):
    write_squad(tmp_path / "data", "2.0")
    folder = save_bert(tmp_path / "model", "squad2.0", tokenizer)
    data = ("--task", "squad2.0", "--data_dir", str(tmp_path / "data"))
    command = ["predict", folder, *data, "--output", str(tmp_path / "answers.json")]
    killed_before("answers.json", command)
    capsys.readouterr()
    for flag in ("--null_odds", "--n_best"):
        (tmp_path / "mine.json").write_text("mine")
        assert f"{flag} {tmp_path / 'mine.json'} exists already" in fails(
            capsys, *command, flag, tmp_path / "mine.json"
        )
        assert (tmp_path / "mine.json").read_text() == "mine"


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]", b"{}", b'{"key": 1}', b"[" * 100_000])
def test_what_is_kept_but_cannot_be_read_is_made_again(content, tmp_path):
    done = Unfinished(tmp_path / "answers.json")
    assert done.text("answers", "key", lambda: "text") == ("text", False)
    assert done.text("answers", "key", lambda: pytest.fail("it was kept")) == ("text", True)
    for name in ("answers", "beside"):
        (done.folder / name).write_bytes(content)
    assert done.beside == []
    assert done.text("answers", "key", lambda: "again") == ("again", False)


@pytest.mark.parametrize(("task", "name"), [("rte", "answers.zip"), ("squad", "answers.json")])
def test_a_file_in_the_place_of_the_folder_for_what_is_done_is_refused(task, name, tmp_path, capsys):
    output = tmp_path / name
    (tmp_path / f"{name}.unfinished").write_text("")
    said = fails(capsys, "predict", "model", "--task", task, "--output", output)
    assert f"{output}.unfinished should be a folder, for what is done so far, and is a file: remove it" in said


@pytest.mark.parametrize(
    ("family", "says", "task", "read"),
    [
        ("effbert", 300, "squad", 300), ("effbert", 24, "mrpc", 24), ("effbert", 900, "mrpc", 512),
        ("effbert", None, "mrpc", 128), ("bert", 512, "mrpc", 128), ("bert", 512, "squad", 384),
        ("bert", 300, "squad", 300), ("bert", None, "squad", 384),
    ],
)  # fmt: skip
def test_texts_are_as_long_as_a_student_learnt_with(family, says, task, read, tokenizer, tmp_path):
    """says: what the tokenizer says; None for nothing. The models have 512 positions."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.model_max_length = VERY_LARGE_INTEGER if says is None else says
    if family == "bert":
        save_bert(tmp_path / "model", task, tokenizer, max_position_embeddings=512)
    else:
        config = EffBertConfig(
            vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, embedding_size=8, num_attention_heads=2,
            architecture=TINY, max_position_embeddings=512, pad_token_id=tokenizer.pad_token_id,
      )  # fmt: skip
        spec = spec_of(task)
        new_student(config, spec.kind, spec.labels).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
    assert open_model(tmp_path / "model", spec_of(task), Reading()).max_length == read
    assert open_model(tmp_path / "model", spec_of(task), Reading(max_length=40)).max_length == 40


@pytest.mark.parametrize(
    ("task", "trained", "reading", "says"),
    [
        ("mrpc", "sts-b", {}, "BertForSequenceClassification with 1 outputs: task mrpc needs .* with 2 labels"),
        ("sts-b", "mrpc", {}, "with 2 outputs: task sts-b needs a sequence classification head with one output"),
        ("squad", "mrpc", {}, "task squad needs a question answering head"),
        ("mrpc", "squad", {}, "is BertForQuestionAnswering: task mrpc needs a sequence classification head"),
        ("rte", "mrpc", {}, r"has labels \{entailment, not_entailment\}, model .*--labels renames"),
        ("mrpc", "mrpc", {"max_length": 65}, "the model reads texts of at most 64 tokens: --max_length 65 is too long"),
        ("mrpc", "mrpc", {"max_length": 4}, "max_length 4 leaves no room for text"),
        ("mrpc", "mrpc", {"device": "gpu"}, "--device gpu"),
        ("squad", "squad", {"doc_stride": 50}, "doc_stride is 50, but windows of max_length 64 hold 45 tokens"),
    ],
)
def test_a_model_that_cannot_answer_is_refused(task, trained, reading, says, tmp_path, tokenizer):
    folder = save_bert(tmp_path / "model", trained, tokenizer)
    if task.startswith("squad"):
        write_squad(tmp_path, "1.1")
    else:
        write_glue(tmp_path, task, "validation")
    with pytest.raises(ValueError, match=says) as caught:
        evaluate_saved(folder, task, tmp_path, Reading(**reading))
    assert "\n" not in str(caught.value)


def fails(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_commands(capsys, tmp_path, tokenizer):
    folder = save_bert(tmp_path / "model", "rte", tokenizer)
    write_glue(tmp_path, "rte", "validation", 4)
    write_glue(tmp_path, "rte", "test", 4)
    data = ("--data_dir", tmp_path)
    evaluate = ("evaluate", folder, "--task", "rte", *data, "--output", tmp_path / "scores.json")
    assert main([str(argument) for argument in evaluate]) == 0
    shown = capsys.readouterr().out.splitlines()
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]["validation"]
    assert shown == [f"rte validation accuracy {scores['accuracy']:.4f}", "rte validation rows 4"]
    assert "scores.json exists already: remove it" in fails(capsys, *evaluate)
    file = write_rows(tmp_path / "own.csv", spec_of("rte").labels)
    own = ("--validation_file", file, "--text_columns", "one", "two", "--label_column", "verdict")
    evaluate = ("evaluate", folder, "--task", "mine", *own, "--output", tmp_path / "own.json")
    assert main([str(argument) for argument in evaluate]) == 0
    names = [line.split()[:3] for line in capsys.readouterr().out.splitlines()]
    assert names == [["mine", "validation", name] for name in ("accuracy", "mcc", "rows")]
    assert json.loads((tmp_path / "own.json").read_text())["validation_file"] == file
    predict = ("predict", f"rte={folder}", *data, "--output", tmp_path / "glue.zip")
    assert main([str(argument) for argument in predict]) == 0
    assert capsys.readouterr().out == "RTE.tsv: 4 rows\n"
    assert zipfile.ZipFile(tmp_path / "glue.zip").namelist() == ["RTE.tsv"]
    assert "glue.zip exists already: remove it" in fails(capsys, *predict)
    assert "holds neither QNLI/ nor test.tsv" in fails(
        capsys, "predict", f"qnli={folder}", *data, "--output", tmp_path / "qnli.zip"
    )


OWN = ("--predict_file", "rows.csv", "--text_columns", "one", "two")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("predict", "--output", "x.zip"), "predict needs a model: TASK=FOLDER"),
        (("predict", "model", "--output", "x.zip"), "'model': write TASK=FOLDER"),
        (("predict", "rte=a", "RTE=b", "--output", "x.zip"), "task RTE has two models"),
        (("predict", "a", "b", "--task", "rte", "--output", "x.zip"), "--task rte is for one model"),
        (("predict", "rte=a", "--output", "x.tsv"), "the GLUE server takes a .zip"),
        (("predict", "rte=a", "--output", "nowhere/x.zip"), "there is no folder nowhere"),
        (("predict", "rte=a", "--output", "/proc/x.zip"), "/proc"),
        (("predict", "rte=a", "--output", "x.zip", "--n_best", "n.json"), "are for SQuAD"),
        (("predict", "squad=a", "--output", "x.zip"), "--output x.zip: SQuAD's scripts take a .json"),
        (("predict", "a", "--task", "squad", "--output", "x"), "--output x: SQuAD's scripts take a .json"),
        (("predict", "squad=a", "--output", "x.json", "--n_best", "n"), "--n_best n: SQuAD's scripts take a .json"),
        (("predict", "rte=a", "--output", "x.zip", "--predict_file", "r.csv"), "or for rows of your own with --text_c"),
        (("predict", "a", "--output", "x.csv", "--predict_file", "r.csv"), "for rows of your own --predict_file and"),
        (("predict", "a", "--output", "x.csv", "--text_columns", "t"), "your own rows: give --predict_file too"),
        (("predict", "a", *OWN, "--output", "x.csv", "--task", "mine"), "--task and --data_dir are for known tasks"),
        (("predict", "a", *OWN, "--output", "x.csv", "--data_dir", "."), "--task and --data_dir are for known tasks"),
        (
            ("predict", "a", *OWN, "--output", "x.csv", "--n_best", "n.json"),
            "and --n_best_size are for SQuAD: leave them out",
        ),
        (("predict", "a", "b", *OWN, "--output", "x.csv"), "answered by one model, named first: 2 are"),
        (("predict", *OWN, "--output", "x.csv"), "answered by one model, named first: 0 are"),
        (
            ("predict", "./a", *OWN, "--output", "x.txt"),
            "the suffix must say the format, one of .csv, .tsv, .json, .jsonl",
        ),
        (("predict", "./a", *OWN, "--output", "no/x.csv"), "there is no folder no"),
        (("predict", "./a", *OWN, "--output", "x.csv"), "model ./a: no such folder"),
        (("predict", "squad=a", "rte=b", "--output", "x.json"), "predict it without other tasks"),
        (("predict", "squad=a", "--output", "x.json", "--n_best", "x.json"), "needs a name of its own"),
        (("predict", "squad=a", "--output", "x.json", "--n_best_size", "0"), "--n_best_size 0"),
        (
            ("predict", "rte=a", "qnli=b", "--output", "x.zip", "--labels", "x", "y"),
            "the columns of one model, and there",
        ),
        (("predict", "mrcp=a", "--output", "x.zip"), "unknown GLUE task 'mrcp'"),
        (("predict", "rte=./absent", "--output", "x.zip"), "model ./absent: no such folder"),
        (("evaluate", "a", "--task", "mrcp"), "unknown task 'mrcp'"),
        (("evaluate", "a", "--task", "ax", "--data_dir", "."), "ax has test rows only"),
        (("evaluate", "a", "--task", "rte", "--output", "nowhere/x.json"), "there is no folder nowhere"),
        (("evaluate", "a", "--task", "mine", "--text_columns", "t"), "are for --validation_file: give it too"),
        (("evaluate", "a", "--task", "mine", "--label_column", "l"), "are for --validation_file: give it too"),
        (("evaluate", "a", "--task", "mine", "--task_kind", "regression"), "are for --validation_file: give it too"),
        (
            ("evaluate", "a", "--task", "rte", "--data_dir", ".", "--validation_file", "x.csv"),
            "--data_dir and --validation_file exclude each other",
        ),
        (("evaluate", "a", "--task", "rte", "--per_device_eval_batch_size", "0"), "it must be at least 1"),
        (("evaluate", "a", "--task", "squad", "--doc_stride", "-1"), "--doc_stride -1: it must be at least 0"),
        (("predict", "squad=a", "--output", "x", "--max_query_length", "-1"), "--max_query_length -1"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert says in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_models_are_named_by_task_or_alone():
    assert named_models(["SST-2=a", "mrpc=b=c"], "") == {"sst2": "a", "mrpc": "b=c"}
    assert named_models(["runs/a=1"], "STS-B") == {"stsb": "runs/a=1"}
