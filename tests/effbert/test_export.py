"""effbert export: folders that load where effbert is missing, ONNX files that agree, and bad input in one line."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from commands import killed_before
from effbert import export, onnx_export, standalone
from effbert.__main__ import main
from effbert.card import scores_text
from effbert.data.tasks import TaskSpec
from effbert.data.tokenizer import train_wordpiece
from effbert.evaluate import evaluate
from effbert.model import EffBertConfig, EffBertForQuestionAnswering, EffBertForSequenceClassification, EffBertModel

MIXED = "tanh(linear2_2(gelu(linear2_2(x,wb1)),wb2)), add(linear1_3(mul(linear1_3(max(x,tanh(x)),wb1),x),wb2),x)"
WORDS = ["good small fast bright", "bad big slow dark"]
WITHOUT_EFFBERT = """
import json, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "effbert":
            raise ModuleNotFoundError("effbert is not here")

sys.meta_path.insert(0, Missing())
import torch
import transformers as t

torch.set_num_threads(1)
classes, spans, again = sys.argv[1:]
ids, mask, types = torch.load(classes + "/inputs.pt")
trust = {"trust_remote_code": True}
model = t.AutoModelForSequenceClassification.from_pretrained(classes, **trust).eval()
model.save_pretrained(again)
shown = {}
with torch.no_grad():
    for name, folder in (("classes", classes), ("saved again", again)):
        model = t.AutoModelForSequenceClassification.from_pretrained(folder, **trust).eval()
        shown[name] = model(ids, mask, types).logits.tolist()
    encoder = t.AutoModel.from_pretrained(classes, **trust).eval()
    shown["encoder"] = encoder(ids, mask, types).pooler_output.tolist()
    answers = t.AutoModelForQuestionAnswering.from_pretrained(spans, **trust).eval()(ids, mask, types)
    shown["spans"] = [answers.start_logits.tolist(), answers.end_logits.tolist()]
pipe = t.pipeline("text-classification", model=classes, **trust)
shown["pipeline"] = pipe(["good fast", "big"], top_k=None)
shown["module"] = type(pipe.model).__module__
for name, folder in (("card", classes), ("card of spans", spans)):
    card = {}
    exec(open(folder + "/README.md").read().split("```python\\n")[1].split("```")[0], card)
    shown[name] = [values.tolist() for values in card["outputs"].to_tuple()]
alone = t.AutoTokenizer.from_pretrained(classes, trust_remote_code=False)
shown["alone"] = alone("A text.")["input_ids"] == card["tokenizer"]("A text.")["input_ids"]
shown["effbert"] = [name for name in sys.modules if name.split(".")[0] == "effbert"]
print(json.dumps(shown))
"""


def student(kind=EffBertForSequenceClassification, **changes):
    sizes = {"vocab_size": 60, "embedding_size": 8, "hidden_size": 24, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 40, "architecture": MIXED}
    torch.manual_seed(0)
    model = kind(EffBertConfig(**{**sizes, **changes})).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


def saved(folder, model):
    if model.config.num_labels == 2 and isinstance(model, EffBertForSequenceClassification):
        model.config.id2label, model.config.label2id = {0: "light", 1: "heavy"}, {"light": 0, "heavy": 1}
    model.save_pretrained(folder)
    train_wordpiece(WORDS, 60, min_frequency=1, max_length=40).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EFFBERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("classifier"), student(fit_size=30))


def inputs(batch=3, length=11):
    rng = np.random.default_rng(5)
    ids = torch.from_numpy(rng.integers(60, size=(batch, length)))
    lengths = torch.tensor([length, *rng.integers(1, length + 1, size=batch - 1)])
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    return ids, mask, torch.from_numpy(rng.integers(2, size=(batch, length)))


def run(*arguments):
    assert main(["export", *map(str, arguments)]) == 0


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    assert main(["export", *map(str, arguments)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("effbert: "), lines
    return lines[0]


def test_a_pipeline_takes_a_student_once_effbert_is_imported(classifier):
    from transformers import pipeline

    texts = ["good fast", "big"]
    pipe = pipeline("text-classification", model=str(classifier))
    assert type(pipe.model) is EffBertForSequenceClassification
    found = pipe(texts, top_k=None)
    with torch.no_grad():
        given = AutoTokenizer.from_pretrained(classifier)(texts, padding=True, return_tensors="pt")
        expected = pipe.model(**given).logits.softmax(-1)
    for answers, row in zip(found, expected, strict=True):
        scores = {answer["label"]: answer["score"] for answer in answers}
        assert [scores["light"], scores["heavy"]] == pytest.approx(row.tolist(), abs=1e-6)


@pytest.mark.parametrize("own_code", [False, True])
def test_a_pipeline_gives_the_number_of_a_regression(tmp_path, own_code):
    from transformers import pipeline

    model = student(num_labels=1)
    saved(tmp_path / "model", model)
    given = AutoTokenizer.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = model(**given(["good fast"], return_tensors="pt")).logits.item()
    loaded = EffBertForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    if own_code:
        loaded = standalone.plain_model(loaded, standalone.load(standalone.source(loaded.config)))
    (found,) = pipeline("text-classification", model=loaded, tokenizer=given)("good fast")
    assert found["score"] == pytest.approx(expected, abs=1e-5)
    assert expected != pytest.approx(torch.sigmoid(torch.tensor(expected)).item(), abs=1e-2)


def test_a_folder_loads_where_effbert_is_missing(classifier, tmp_path):
    questions = student(EffBertForQuestionAnswering, neighbour_padding="released", embedding_size=None)
    saved(tmp_path / "questions", questions)
    for source, target in ((classifier, "classes"), (tmp_path / "questions", "spans")):
        run(source, "--output_dir", tmp_path / target)
    torch.save(inputs(), tmp_path / "classes" / "inputs.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-I", "-c", WITHOUT_EFFBERT, *(str(tmp_path / n) for n in ("classes", "spans", "again"))],
        cwd=tmp_path,
        env={**environment, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout.splitlines()[-1])
    assert shown["effbert"] == [] and shown["module"].startswith("transformers_modules.")
    assert "Do you wish to run" not in done.stdout + done.stderr and shown["alone"]
    model = EffBertForSequenceClassification.from_pretrained(classifier).eval()
    given = partial(AutoTokenizer.from_pretrained(classifier), return_tensors="pt")
    with torch.no_grad():
        logits, pooled = model(*inputs()).logits, model.effbert(*inputs()).pooler_output
        spans = questions(*inputs())
        of_card = model(**given("A text.")).logits
        of_question = questions(**given("A question?", "A text."))
    label = model.config.id2label[of_card.argmax().item()]
    assert label in done.stdout.splitlines()
    for mine, theirs in (
        ("classes", logits),
        ("saved again", logits),
        ("encoder", pooled),
        ("spans", torch.stack((spans.start_logits, spans.end_logits))),
        ("card", of_card[None]),
        ("card of spans", torch.stack((of_question.start_logits, of_question.end_logits))),
    ):
        torch.testing.assert_close(torch.tensor(shown[mine]), theirs, rtol=0, atol=1e-5)
    assert [{row["label"] for row in rows} for rows in shown["pipeline"]] == [{"light", "heavy"}] * 2


def test_a_card_says_what_the_folder_holds(classifier, tmp_path):
    source = shutil.copytree(classifier, tmp_path / "source")
    run(source, "--output_dir", tmp_path / "out")
    before = (tmp_path / "out" / "README.md").read_text()
    model = export.load_student(source)
    assert "that classifies texts" in before and f"{model.num_parameters():,} parameters, width 24, 4 " in before
    assert "of at most 40 tokens" in before and "the logits: 0 `light`, 1 `heavy`." in before
    assert all(f"{n}. `{layer}`\n" in before for n, layer in enumerate(MIXED.split(", "), start=1))
    assert "Task" not in before and 'tokenizer("A text.", ' in before
    spec = TaskSpec("mine", "classification", ("light", "heavy"), ("accuracy",), pair=True)
    (source / "scores.json").write_text(scores_text(spec, 1200, {"accuracy": 0.75, "f1": 0.5}))
    run(source, "--output_dir", tmp_path / "scored")
    card = (tmp_path / "scored" / "README.md").read_text()
    assert "Task mine: accuracy 0.7500, f1 0.5000, on 1,200 validation rows.\n" in card
    assert 'tokenizer("A text.", "Another.", ' in card
    run(tmp_path / "scored", "--output_dir", tmp_path / "again" / "scored")
    assert (tmp_path / "again" / "scored" / "README.md").read_text() == card


@pytest.mark.parametrize("content", ["{", "[]", '{"task": "mine"}', '{"task": "a", "pair": 1, "rows": 2, "scores": 3}'])
def test_scores_that_cannot_be_read_are_one_line(classifier, tmp_path, capsys, content):
    source = shutil.copytree(classifier, tmp_path / "source")
    (source / "scores.json").write_text(content)
    assert "scores.json holds no scores" in fails(capsys, source, "--output_dir", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_longest_text_of_a_card_is_what_the_student_learnt(classifier, tmp_path):
    source = shutil.copytree(classifier, tmp_path / "source")
    for longest, told in ((24, 24), (1000, 40)):
        tokenizer = AutoTokenizer.from_pretrained(source)
        tokenizer.model_max_length = longest
        tokenizer.save_pretrained(source)
        run(source, "--output_dir", tmp_path / str(longest))
        assert f"texts of at most {told} tokens" in (tmp_path / str(longest) / "README.md").read_text()


def test_an_exported_tokenizer_neither_cuts_nor_fills_whatever_the_student_was_saved_with(classifier, tmp_path, capsys):
    source = shutil.copytree(classifier, tmp_path / "source")
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer(["good"], WORDS[1:], truncation="only_second", max_length=7, stride=1, padding="max_length")
    tokenizer.save_pretrained(source)
    assert json.loads((source / "tokenizer.json").read_text())["truncation"]["max_length"] == 7
    run(source, "--output_dir", tmp_path / "out")
    exported = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert exported.truncation is None and exported.padding is None
    assert exported.encode(WORDS[0]).ids == AutoTokenizer.from_pretrained(classifier)(WORDS[0])["input_ids"]
    (source / "tokenizer.json").write_text("{")
    assert "no tokenizer at" in fails(capsys, source, "--output_dir", tmp_path / "broken")
    tokenizer.add_tokens([f"word{number}" for number in range(300)])
    tokenizer.save_pretrained(source)
    assert "they do not belong together" in fails(capsys, source, "--output_dir", tmp_path / "broken")
    assert not (tmp_path / "broken").exists()


def test_with_effbert_its_own_classes_load_the_same_weights(classifier, tmp_path):
    run(classifier, "--output_dir", tmp_path / "out")
    own = EffBertForSequenceClassification.from_pretrained(classifier).eval()
    for trust in (None, True):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", trust_remote_code=trust).eval()
        assert type(loaded) is EffBertForSequenceClassification
        torch.testing.assert_close(loaded(*inputs()).logits, own(*inputs()).logits, rtol=0, atol=1e-6)
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is EffBertModel
    run(tmp_path / "out", "--output_dir", tmp_path / "twice")
    for name in ("config.json", "modeling_effbert.py", "model.safetensors", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "twice" / name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["out", "twice"]
    AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())  # whose code is not there


def test_a_killed_export_leaves_no_folder_and_the_same_command_makes_it(classifier, tmp_path):
    arguments = ["export", str(classifier), "--output_dir", str(tmp_path / "out")]
    killed_before("out", arguments)
    assert len(os.listdir(tmp_path)) == 1 and not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert os.listdir(tmp_path) == ["out"] and export.load_student(tmp_path / "out").config.fit_size is None


def test_an_encoder_without_pooler_and_a_folder_without_tokenizer(tmp_path, capsys):
    torch.manual_seed(0)
    config = student(output_hidden_states=True).config  # which the check of the outputs is not about
    EffBertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "model")
    run(tmp_path / "model", "--output_dir", tmp_path / "out")
    shown = capsys.readouterr().out
    assert "holds no tokenizer" in shown and "load it with add_pooling_layer=False" in shown
    card = (tmp_path / "out" / "README.md").read_text()
    assert "trust_remote_code=True, add_pooling_layer=False)" in card and "AutoTokenizer" not in card
    assert export.load_student(tmp_path / "out").pooler is None


def test_weights_that_are_not_finite_are_said_to_be_so(tmp_path, capsys):
    model = student()
    model.classifier.bias.data[0] = float("nan")
    line = fails(capsys, saved(tmp_path / "model", model), "--output_dir", tmp_path / "out")
    assert "has weights that are not finite: classifier.bias" in line and not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "dev.csv"
    path.write_text("text,label\n" + "".join(f"{WORDS[i % 2]},{('Heavy', 'light')[i % 3 == 0]}\n" for i in range(20)))
    return path


@pytest.fixture(scope="module")
def onnx_folder(classifier, rows, tmp_path_factory):
    target = tmp_path_factory.mktemp("onnx") / "new" / "out"
    scored = ("--validation_file", rows, "--text_columns", "text", "--max_length", "16")
    run(classifier, "--output_dir", target, "--format", "onnx", "--int8", *scored)
    return target


def session(path):
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def feeds(*shape):
    return {name: value.numpy() for name, value in zip(onnx_export.INPUTS, inputs(*shape), strict=True)}


def test_the_lines_of_an_onnx_folders_card_work(classifier, onnx_folder, monkeypatch):
    monkeypatch.chdir(onnx_folder.parent)
    text, card = (onnx_folder / "README.md").read_text(), {}
    exec(text.split("```python\n")[1].split("```")[0], card)
    model = EffBertForSequenceClassification.from_pretrained(classifier).eval()
    with torch.no_grad():
        expected = model(**AutoTokenizer.from_pretrained(classifier)("A text.", return_tensors="pt")).logits
    torch.testing.assert_close(torch.from_numpy(card["outputs"][0]), expected, rtol=0, atol=1e-4)
    assert "`model_int8.onnx` is read alike.\n" in text and "trust_remote_code" not in text


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (4, 7), (7, 13)])
def test_an_onnx_file_takes_any_batch_and_length(classifier, onnx_folder, shape):
    model = EffBertForSequenceClassification.from_pretrained(classifier).eval()
    (logits,) = session(onnx_folder / "model.onnx").run(["logits"], feeds(*shape))
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(logits), model(*inputs(*shape)).logits, rtol=0, atol=1e-4)


def test_what_lies_beside_an_onnx_file(classifier, onnx_folder):
    import onnx

    record = json.loads((onnx_folder / "export.json").read_text())
    assert {path.name: path.stat().st_size for path in onnx_folder.glob("*.onnx")} == record["bytes"]
    assert record["opset"] == 23 and record["difference_from_pytorch"] <= 1e-4
    proto = onnx.load(onnx_folder / "model.onnx")
    assert sum(node.op_type == "Attention" for node in proto.graph.node) == 2
    assert str(export.__file__).encode() not in (onnx_folder / "model.onnx").read_bytes()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (onnx_folder / name).read_bytes() == (classifier / name).read_bytes()
    config = json.loads((onnx_folder / "config.json").read_text())
    assert config["id2label"] == {"0": "light", "1": "heavy"} and "auto_map" not in config


def test_int8_and_its_accuracy_are_recorded_as_they_are(onnx_folder, rows):
    """Scores are counted here anew, from the files and by label names."""
    tokenizer = AutoTokenizer.from_pretrained(onnx_folder)
    record = json.loads((onnx_folder / "export.json").read_text())
    lines = [line.split(",") for line in rows.read_text().splitlines()[1:]]
    for name, file in (("fp32", "model.onnx"), ("int8", "model_int8.onnx")):
        given = tokenizer([text for text, _ in lines], padding=True, return_tensors="np")
        (logits,) = session(onnx_folder / file).run(None, {key: given[key] for key in onnx_export.INPUTS})
        answers = [("light", "heavy")[column] for column in logits.argmax(axis=1)]
        right = np.mean([answer == label.lower() for answer, (_, label) in zip(answers, lines, strict=True)])
        assert record["validation"][name]["accuracy"] == pytest.approx(right)
    validation = record["validation"]
    change = validation["int8"]["accuracy"] - validation["fp32"]["accuracy"]
    assert validation["max_length"] == 16
    assert validation["rows"] == 20 and validation["change"]["accuracy"] == pytest.approx(change)
    exact, rounded = (session(onnx_folder / f).run(None, feeds())[0] for f in ("model.onnx", "model_int8.onnx"))
    assert 0 < np.abs(exact - rounded).max() < 1 and 0 < record["int8_difference"] < 1


@pytest.mark.parametrize("kind", [EffBertModel, EffBertForQuestionAnswering])
def test_other_heads_the_oldest_opset_and_no_task(kind, tmp_path, capsys):
    one_layer = MIXED.split(", ")[1]
    model = student(kind, architecture=one_layer, position_offset=2, combine="pad", intermediate_size=96)
    saved(tmp_path / "model", model)
    run(tmp_path / "model", "--output_dir", tmp_path / "out", "--format", "onnx", "--opset", "18")
    assert "accuracy was not measured" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "export.json").read_text())["validation"] is None
    names = {EffBertModel: ["last_hidden_state", "pooler_output"]}.get(kind, ["start_logits", "end_logits"])
    found = session(tmp_path / "out" / "model.onnx").run(names, feeds(2, 38))
    with torch.no_grad():
        for mine, theirs in zip(found, model(*inputs(2, 38)).to_tuple(), strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), theirs, rtol=0, atol=1e-4)


def test_a_file_that_disagrees_is_not_left_behind(classifier, onnx_folder, tmp_path, monkeypatch, capsys):
    def other_bias(plain, path, opset):
        shutil.copyfile(onnx_folder / "model.onnx", path)
        with torch.no_grad():
            plain.classifier.bias += 1e-3

    monkeypatch.setattr(onnx_export, "to_onnx", other_bias)
    line = fails(capsys, classifier, "--output_dir", tmp_path / "out", "--format", "onnx")
    assert "differ from the model's by 1.0e-03, more than 0.0001" in line
    assert list(tmp_path.iterdir()) == []


def test_a_failure_of_the_exporter_says_what_was_in_its_way(classifier, tmp_path, monkeypatch, capsys):
    def fails_within(*args, **kwargs):
        raise RuntimeError("\x1b[96mstep 1/3\x1b[0m of exporting. Next steps: ...") from ImportError("z3 has no sat")

    monkeypatch.setattr(torch.onnx, "export", fails_within)
    line = fails(capsys, classifier, "--output_dir", tmp_path / "out", "--format", "onnx")
    assert line.endswith("cannot write opset 23: z3 has no sat") and list(tmp_path.iterdir()) == []


def test_code_that_disagrees_is_not_left_behind(classifier, tmp_path, monkeypatch, capsys):
    right = standalone.source
    monkeypatch.setattr(standalone, "source", lambda config: right(config).replace("torch.tanh(y)", "y"))
    line = fails(capsys, classifier, "--output_dir", tmp_path / "out")
    assert "modeling_effbert.py" in line and "more than 1e-05" in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("--format", "tflite"), "tflite"),
        (("--format", "onnx", "--opset", "17"), "--opset 17 is too old for this model: 18 is the oldest that works"),
        (("--format", "onnx", "--opset", "999"), "--opset 999 is unknown to onnx"),
        (("--opset", "18"), "--opset is for ONNX files: add --format onnx"),
        (("--int8",), "--int8 is for ONNX files"),
        (("--task", "mrpc"), "--task is for ONNX files"),
        (("--format", "onnx", "--data_dir", "x"), "--data_dir is the folder of a known task"),
        (("--format", "onnx", "--validation_file", "x"), "--validation_file and --text_columns go together"),
        (("--format", "onnx", "--task", "a", "--validation_file", "x"), "exclude each other"),
        (("--max_length", "9"), "--max_length is of rows to score on"),
        (("--format", "onnx", "--task", "mrpc", "--label_column", "x"), "--label_column is a column of --validation_f"),
        (("--format", "onnx", "--task", "mnlii"), "unknown task 'mnlii'"),
        (("--format", "onnx", "--validation_file", "none.csv", "--text_columns", "a"), "none.csv: no such file"),
    ],
)
def test_bad_arguments(capsys, classifier, tmp_path, arguments, words):
    assert words in fails(capsys, classifier, "--output_dir", tmp_path / "out", *arguments)
    assert list(tmp_path.iterdir()) == []


def test_rows_with_a_label_that_the_model_lacks(capsys, classifier, tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\ngood,light\nbad,dark\n")
    own = ("--validation_file", tmp_path / "dev.csv", "--text_columns", "text")
    line = fails(capsys, classifier, "--output_dir", tmp_path / "out", "--format", "onnx", *own)
    assert f"dev.csv:3: unknown label 'dark'; {classifier} has light, heavy" in line
    assert not (tmp_path / "out").exists()


def test_rows_that_lack_some_of_the_models_labels_are_scored(classifier, tmp_path):
    (tmp_path / "dev.csv").write_text("text,label\ngood,light\nbad,light\n")
    scored = ("--format", "onnx", "--validation_file", tmp_path / "dev.csv", "--text_columns", "text")
    run(classifier, "--output_dir", tmp_path / "out", *scored)
    found = json.loads((tmp_path / "out" / "export.json").read_text())["validation"]
    assert found["rows"] == 2 and found["fp32"]["accuracy"] in (0.0, 0.5, 1.0)


def test_rows_are_as_long_as_the_student_learnt_with_and_never_cut_in_silence(capsys, classifier, rows, tmp_path):
    scored = ("--format", "onnx", "--validation_file", rows, "--text_columns", "text")
    line = fails(capsys, classifier, "--output_dir", tmp_path / "out", *scored, "--max_length", "41")
    assert "the model reads texts of at most 40 tokens: --max_length 41 is too long" in line
    assert not (tmp_path / "out").exists()
    run(classifier, "--output_dir", tmp_path / "out", *scored)
    assert json.loads((tmp_path / "out" / "export.json").read_text())["validation"]["max_length"] == 40


def test_a_target_that_exists(capsys, classifier, tmp_path):
    (tmp_path / "out").mkdir()
    assert "exists already" in fails(capsys, classifier, "--output_dir", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
    assert "output_dir" in fails(capsys, classifier)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_package_that_is_missing(capsys, classifier, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = fails(capsys, classifier, "--output_dir", tmp_path / "out", "--format", "onnx")
    assert f"need the package {package}" in line and "pip install 'effbert[onnx]'" in line


def test_a_folder_that_is_no_student(capsys, tmp_path):
    target = ("--output_dir", tmp_path / "out")
    assert "no such folder" in fails(capsys, tmp_path / "none", *target)
    folder = tmp_path / "model"
    folder.mkdir()
    assert "it has no config.json" in fails(capsys, folder, *target)
    for text, words in (
        ("{", "is no configuration"),
        ("[]", "is no configuration"),
        ('{"model_type": "bert"}', "model_type 'bert', not 'effbert'"),
        ('{"model_type": "effbert"}', "one of EffBertForSequenceClassification"),
        ('{"model_type": "effbert", "architectures": ["EffBertModel"], "architecture": "gelu(x)"}', "cannot be loaded"),
    ):
        (folder / "config.json").write_text(text)
        assert words in fails(capsys, folder, *target)
    student().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    assert "cannot be loaded" in fails(capsys, folder, *target)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_the_models(capsys, tmp_path):
    from safetensors.torch import load_file, save_file

    model = student()
    model.save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    state, target = load_file(file), ("--output_dir", tmp_path / "out")
    for changed, words in (
        ({k: v for k, v in state.items() if k != "classifier.bias"}, "lacks the weights classifier.bias"),
        ({**state, "classifier.scale": torch.ones(2)}, "beyond the model's, the weights classifier.scale"),
        ({**state, "classifier.bias": torch.ones(5)}, "another size than its config.json says, the weights classifier"),
    ):
        save_file(changed, file, metadata={"format": "pt"})
        assert words in fails(capsys, tmp_path / "model", *target)
    file.write_bytes(b"no tensors")
    assert "cannot be loaded" in fails(capsys, tmp_path / "model", *target)
    model = student(architecture="linear1_2(mul(linear1_2(x,wb1),x),wb2)", combine="pad")
    model.save_pretrained(tmp_path / "model")
    assert "wb2 takes 12 channels and gets 24" in fails(capsys, tmp_path / "model", *target)


def test_rows_of_ones_own_have_the_labels_of_the_model(tmp_path, rows):
    labels = {0: "other", 1: "light", 2: "heavy"}
    model = student(id2label=labels, label2id={name: index for index, name in labels.items()})
    folder = saved(tmp_path / "model", model)
    config = export.ExportConfig("", "onnx", validation_file=str(rows), text_columns=("text",))
    found = onnx_export.load_rows(folder, config, model)[0]["validation"]
    assert found.encoded.spec.labels == ("other", "light", "heavy") and found.columns == [0, 1, 2]
    assert found.encoded.raw.validation["label"][:4] == [1, 2, 2, 1]  # "Heavy" in the file
    questions = student(EffBertForQuestionAnswering)
    with pytest.raises(ValueError, match=r"rows with labels or scores, but .* is for spans"):
        onnx_export.load_rows(folder, config, questions)


class InPlaceOfAFile:
    """The plain model, called as an ONNX file is."""

    def __init__(self, model):
        self.config = model.config
        self.plain = standalone.plain_model(model, standalone.load(standalone.source(model.config)))

    def __call__(self, *tensors):
        return self.plain(*tensors).to_tuple()


@pytest.mark.parametrize("kind", ["regression", "spans"])
def test_scores_are_those_that_effbert_gives(kind, tmp_path):
    if kind == "spans":
        answers = [{"text": "fast", "answer_start": 11}]
        question = {"id": "1", "question": "bad?", "answers": answers}
        text = json.dumps({"data": [{"paragraphs": [{"context": " ".join(WORDS), "qas": [question]}]}]})
        (tmp_path / "dev-v1.1.json").write_text(text)
        (tmp_path / "train-v1.1.json").write_text("not read")
        model, where = student(EffBertForQuestionAnswering), {"task": "squad", "data_dir": str(tmp_path)}
    else:
        (tmp_path / "dev.tsv").write_text("text\tlabel\ngood fast\t0.5\nbad\t1.5\nbig slow dark\t-2\n")
        model = student(num_labels=1)
        where = {"validation_file": str(tmp_path / "dev.tsv"), "text_columns": ("text",)}
    folder = saved(tmp_path / "model", model)
    found = onnx_export.load_rows(folder, export.ExportConfig("", "onnx", **where), model)[0]["validation"]
    own = evaluate(
        lambda batch: model.trace(batch.input_ids, batch.attention_mask, batch.token_type_ids).logits, found.encoded
    )
    scores = found.scores(InPlaceOfAFile(model))
    assert scores == pytest.approx(own) and set(scores) == set(found.encoded.spec.metrics)


def test_both_validation_splits_of_mnli_are_scored_and_no_training_rows_needed(tmp_path, capsys):
    labels = dict(enumerate(("contradiction", "entailment", "neutral")))
    model = student(architecture=MIXED.split(", ")[1], id2label=labels, label2id={v: k for k, v in labels.items()})
    folder, data = saved(tmp_path / "model", model), tmp_path / "MNLI"
    data.mkdir()
    rows = [f"good fast\tbad {word}\t{label}" for word in ("big", "small") for label in labels.values()]
    for split, count in (("matched", 6), ("mismatched", 4)):
        lines = ["sentence1\tsentence2\tgold_label", *rows[:count]]
        (data / f"dev_{split}.tsv").write_text("\n".join(lines) + "\n")
    scored = ("--format", "onnx", "--task", "mnli", "--data_dir", tmp_path)
    run(folder, "--output_dir", tmp_path / "both", *scored)
    record = json.loads((tmp_path / "both" / "export.json").read_text())
    from effbert.answers import evaluate_saved

    scores = evaluate_saved(folder, "mnli", tmp_path)
    for split, count in (("validation", 6), ("validation_mismatched", 4)):
        assert record[split]["rows"] == count and record[split]["task"] == "mnli"
        assert record[split]["fp32"]["accuracy"] == pytest.approx(scores[split]["accuracy"])
    (data / "dev_mismatched.tsv").unlink()
    capsys.readouterr()
    run(folder, "--output_dir", tmp_path / "one", *scored)
    assert "validation_mismatched is left out: there is no " in capsys.readouterr().out
    assert "validation_mismatched" not in json.loads((tmp_path / "one" / "export.json").read_text())


def test_importing_effbert_imports_no_onnx():
    code = "import sys, effbert, effbert.cli, effbert.export; print([n for n in sys.modules if n.startswith('onnx')])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "[]"
