"""Teacher, general distillation and distillation as commands of their own: what they leave, and what they refuse."""

import dataclasses
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from commands import Command, finished, killed_before
from effbert.__main__ import main
from effbert.answers import OwnRows, Reading, evaluate_saved, open_model
from effbert.card import read_scores
from effbert.config import DistillConfig, PretrainConfig, StudentArguments
from effbert.data.tasks import TaskSpec
from effbert.data.tokenizer import train_wordpiece
from effbert.model import EffBertConfig, EffBertModel, new_student
from effbert.parallel import World
from effbert.search import runs
from effbert.search.runs import check_sizes, finish
from effbert.start import load_head
from effbert.supernet import Supernet, head_key, supernet_config
from effbert.teacher import read_config, student_vocabulary

WORDS = "the small model reads long words about trees and rivers in every quiet town near some old stone bridge".split()
MLP = "linear1_2(gelu(linear1_2(x,wb1)),wb2)"
SIZES = ("--student.hidden_size", "24", "--student.intermediate_size", "24", "--student.embedding_size", "8")
LAYERS = ("--student.num_hidden_layers", "2")
THREE = ("--student.num_hidden_layers", "3")
SIZES += (*LAYERS, "--student.num_attention_heads", "4")


def sentence(chance, length=12):
    return " ".join(chance.choice(WORDS) for _ in range(length))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A tiny BERT without a head, text, and a task in two files."""
    folder, chance = tmp_path_factory.mktemp("given"), random.Random(1)
    tokenizer = train_wordpiece([sentence(chance) for _ in range(50)], 120, max_length=40)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, hidden_size=32, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=40,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    (folder / "text.txt").write_text("\n".join(sentence(chance, 30) + "." for _ in range(40)))
    for name in ("train", "dev"):
        rows = [(sentence(chance), chance.choice(("good", "bad"))) for _ in range(40)]
        (folder / f"{name}.csv").write_text("text,label\n" + "\n".join(",".join(row) for row in rows) + "\n")
    return folder


def common(given, teacher):
    return ["--teacher", str(teacher), "--max_length", "32", "--num_threads", "1", "--device", "cpu"]


def task(given):
    return [
        *("--task", "mine", "--train_file", str(given / "train.csv")),
        *("--validation_file", str(given / "dev.csv"), "--text_columns", "text"),
    ]


def teacher_command(given, folder, *more):
    return ["teacher", *common(given, given / "bert"), *task(given), "--output_dir", str(folder), *more]


def pretrain_command(given, folder, *more):
    text = ["--corpus", str(given / "text.txt"), "--output_dir", str(folder)]
    sizes = sizes_for(more) if "--model" in more else SIZES
    return ["pretrain", *common(given, given / "bert"), *text, *sizes, *more]


def sizes_for(more):
    """What of --student the models of a command take."""
    return SIZES if any("(" in word for word in more) else LAYERS if "teacher" in more else ()


@pytest.fixture(scope="module")
def made(given, tmp_path_factory):
    """A fine-tuned teacher and a supernet, by the commands."""
    folder = tmp_path_factory.mktemp("made")
    assert main(teacher_command(given, folder / "teacher", "--finetuning.num_train_epochs", "1")) == 0
    assert main(pretrain_command(given, folder / "net")) == 0
    return folder


def distill_command(given, made, folder, *more):
    text = [
        "--corpus",
        str(given / "text.txt"),
        "--output_dir",
        str(folder),
        "--budget.task_phase.num_train_epochs",
        "1",
    ]
    return ["distill", *common(given, made / "teacher" / "model"), *task(given), *text, *sizes_for(more), *more]


def test_a_teacher_is_fine_tuned_on_all_rows(given, made, capsys):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(made / "teacher" / "model")
    assert set(model.config.id2label.values()) == {"good", "bad"}
    results = json.loads((made / "teacher" / "results.json").read_text())
    assert results["task"] == "mine" and 0 <= results["scores"]["accuracy"] <= 1 and results["tokens"] > 0
    assert main(teacher_command(given, made / "teacher", "--finetuning.num_train_epochs", "1")) == 0
    assert "40 rows to train on, 40 held out" in capsys.readouterr().out
    assert main(teacher_command(given, made / "teacher", "--finetuning.num_train_epochs", "2")) == 2
    assert "finetuning" in capsys.readouterr().err


def test_an_encoder_with_the_head_of_another_task_is_fine_tuned_too(given, made, tmp_path, capsys):
    encoder = transformers.AutoModelForSequenceClassification.from_pretrained(
        given / "bert", num_labels=3, id2label={0: "entailment", 1: "neutral", 2: "contradiction"}
    )
    encoder.save_pretrained(tmp_path / "mnli")
    transformers.AutoTokenizer.from_pretrained(given / "bert").save_pretrained(tmp_path / "mnli")
    command = teacher_command(given, tmp_path / "run", "--finetuning.num_train_epochs", "1")
    command = [str(tmp_path / "mnli") if word == str(given / "bert") else word for word in command]
    assert main([*command, "--teacher_labels", "good", "bad"]) == 2
    assert "teacher_labels" in capsys.readouterr().err
    assert main(command) == 0
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert set(found.config.id2label.values()) == {"good", "bad"}


def test_a_supernet_and_a_single_model_are_distilled_on_text(given, made, tmp_path):
    supernet = Supernet.from_pretrained(made / "net" / "model")
    assert len(supernet.effbert.layers) == 2 and supernet.effbert.fit_dense.out_features == 32
    more = ("--model", f"{MLP}, {MLP}", "--start_from", str(made / "net" / "model"), "--training.learning_rate", "0")
    assert main(pretrain_command(given, tmp_path / "one", *more)) == 0
    one = EffBertModel.from_pretrained(tmp_path / "one" / "model", add_pooling_layer=False)
    mine, source = one.layers[1].mlps[0].dense2.weight, supernet.effbert.layers[1].mlps[0].dense2.weight
    torch.testing.assert_close(mine, source[:, :12], rtol=0, atol=0)
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    assert results["models"]["model"]["architecture"] == f"{MLP}, {MLP}"


@pytest.mark.parametrize(
    ("model", "hidden"), [("bert-2x16x20", 16), (f"{MLP}, {MLP}", 24), ("teacher", 8)], ids=["plain", "slices", "small"]
)
def test_a_model_is_distilled_and_scored(given, made, tmp_path, model, hidden):
    more = {
        "teacher": ["--params", "2500"],
        f"{MLP}, {MLP}": ["--start_from", str(made / "net" / "model"), "--seeds", "2"],
    }
    command = distill_command(given, made, tmp_path / "run", "--model", model, *more.get(model, ()))
    assert main(command) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metric"] == "accuracy"
    own = results["models"]["model"]
    assert len(own["seeds"]) == (2 if "(" in model else 1) and (own["spread"] is None) == ("(" not in model)
    found = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run" / "model")
    assert found.config.hidden_size == hidden and found.config.fit_size is None
    assert found.num_parameters() == own["seeds"][0]["parameters"]
    assert set(found.config.id2label.values()) == {"good", "bad"}
    took = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    spec = TaskSpec("mine", "classification", ("good", "bad"), ("accuracy",), False)
    assert found.config.max_position_embeddings == 40  # of which those from 32 on have learnt nothing
    assert open_model(tmp_path / "run" / "model", spec, Reading()).max_length == 32
    assert open_model(tmp_path / "run" / "model", spec, Reading(max_length=40)).max_length == 40
    assert took == {name: own["seeds"][0][name] for name in ("seconds", "tokens")} and took["tokens"] > 0
    kept = {"task": "mine", "pair": False, "rows": 40, "scores": own["seeds"][0]["scores"]}
    assert read_scores(tmp_path / "run" / "model") == kept


SHORT = (("per_device_train_batch_size", "8"), ("learning_rate", "2e-2"), ("num_train_epochs", "4"))
BEST = (("load_best_model_at_end",), ("eval_steps", "2"), *SHORT)


def phase_flags(name, flags):
    return [word for field, *value in flags for word in (f"--{name}.{field}", *value)]


def test_a_teacher_and_a_student_end_as_at_their_best_step(given, made, tmp_path, capsys):
    """Five steps an epoch, scored after the second, fourth and last of each; half of the labels can be learnt."""
    chance, own = random.Random(5), tmp_path / "given"
    shutil.copytree(given, own)
    for name in ("train", "dev"):
        told = [(sentence(chance, 6), chance.choice(("good", "bad")), chance.random() < 0.7) for _ in range(40)]
        rows = [f"{text} {WORDS[5 if (label == 'good') == knows else 9]},{label}" for text, label, knows in told]
        (own / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
    given, found = own, {}
    for name, pairs in {"best": BEST, "last": SHORT}.items():
        flags = phase_flags("finetuning", pairs)
        assert main(teacher_command(given, tmp_path / f"teacher-{name}", *flags)) == 0
        results = json.loads((tmp_path / f"teacher-{name}" / "results.json").read_text())
        command = distill_command(given, made, tmp_path / f"student-{name}", "--model", "bert-2x16x20")
        place = command.index("--budget.task_phase.num_train_epochs")
        command[place : place + 2] = phase_flags("budget.task_phase", pairs)
        assert main(command) == 0
        students = json.loads((tmp_path / f"student-{name}" / "results.json").read_text())
        (seed,) = students["models"]["model"]["seeds"]
        means = (sum(scores.values()) / len(scores) for scores in (results["scores"], seed["scores"]))
        found[name] = *means, seed.get("best_step")
    best, last = found["best"], found["last"]
    assert best[0] >= last[0] and best[1] >= last[1] and best[:2] != last[:2] and last[2] is None
    assert best[2] % 5 in (0, 2, 4) and 0 < best[2] <= 20


@pytest.mark.parametrize(
    ("command", "phase"),
    [
        ("search", "supernet"),
        ("search", "teacher_model.pretraining"),
        ("search", "stage1.task_phase"),
        ("search", "stage3.general_phase"),
        ("search", "final.general_phase"),
        ("pretrain", "training"),
        ("distill", "budget.general_phase"),
        ("paper", "pretraining"),
    ],
)
def test_a_phase_that_nothing_scores_has_no_best_step(command, phase, tmp_path, capsys):
    model = ["--model", "tinybert6"] if command == "distill" else []
    assert main([command, *model, "--output_dir", str(tmp_path / "run"), f"--{phase}.load_best_model_at_end"]) == 2
    said = capsys.readouterr().err
    assert f"{phase.rpartition('.')[2]}.load_best_model_at_end" in said and "leave it out" in said


def test_efficientbert_plus_begins_with_the_head_that_the_tasks_shared(given, made, tmp_path, monkeypatch, capsys):
    model = f"{MLP}, {MLP}"
    saved = Supernet.from_pretrained(made / "net" / "model")
    torch.manual_seed(3)
    spec = TaskSpec("mine", "classification", ("bad", "good"), ("accuracy",), False)
    other = TaskSpec("other", "classification", ("bad", "good"), ("accuracy",), False)
    shared = Supernet(saved.config, [spec, other])
    shared.save_pretrained(tmp_path / "shared")
    begin = ["--start_from", str(tmp_path / "shared"), "--budget.task_phase.learning_rate", "0"]
    begin += ["--budget.general_phase.num_train_epochs", "0", "--model", model]
    heads = {}
    for name in ("other", model):
        monkeypatch.setattr(runs, "PLUS", name)
        assert main(distill_command(given, made, tmp_path / f"run{len(heads)}", *begin)) == 0
        heads[name] = load_file(tmp_path / f"run{len(heads)}" / "model" / "model.safetensors")
    weights = shared.state_dict()
    for name in ("weight", "bias"):
        assert torch.equal(heads[model][f"classifier.{name}"], weights[f"heads.{head_key('mine')}.{name}"])
    assert torch.equal(heads[model]["effbert.pooler.weight"], weights["effbert.pooler.weight"])
    assert not torch.equal(heads["other"]["classifier.weight"], heads[model]["classifier.weight"])
    student = new_student(supernet_config(saved.config, 2), "classification", ("good", "bad"))
    turned = dataclasses.replace(spec, labels=("good", "bad"))
    assert load_head(student, str(tmp_path / "shared"), turned) == "mine"  # by the names of labels
    assert torch.equal(student.classifier.weight, weights[f"heads.{head_key('mine')}.weight"].flip(0))
    for other in (dataclasses.replace(spec, name="wnli"), dataclasses.replace(spec, labels=("good", "ugly"))):
        assert load_head(student, str(tmp_path / "shared"), other) == ""  # qnli's is not there, and an unknown label
    assert load_head(student, str(made / "net" / "model"), spec) == ""
    begin[1] = str(made / "net" / "model")
    capsys.readouterr()
    assert main(distill_command(given, made, tmp_path / "none", *begin)) == 2  # PLUS is `model` by now
    assert "has learnt no tasks" in capsys.readouterr().err and not (tmp_path / "none").exists()
    begin[1] = str(tmp_path / "run1" / "model")  # a student of it has a head of its own
    assert main(distill_command(given, made, tmp_path / "more", *begin)) == 0


class Counted(World):
    """A process of two that counts what it does together with the other one."""

    def __init__(self):
        super().__init__(rank=1, size=2)
        object.__setattr__(self, "met", [])

    def on_first(self, function, *arguments):
        self.met.append("on_first")

    def any(self, flags):
        self.met.append("any")
        return list(flags)


def test_a_process_that_is_late_waits_for_the_same_as_the_others(tmp_path):
    met = []
    for late in (False, True):
        workspace = types.SimpleNamespace(folder=tmp_path / str(late), world=Counted())
        workspace.folder.mkdir()
        if late:  # the first process was there before
            (workspace.folder / "results.json").write_text("{}")
        try:
            finish(workspace, dict, lambda text: None)
        except FileNotFoundError:
            assert not late  # nobody wrote them here
        met.append(workspace.world.met)
    assert met[0] == met[1] and met[0]


def test_an_imported_or_deployed_student_goes_on(given, made, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(distill_command(given, made, first, "--model", "bert-2x16")) == 0
    more = ("--start_from", str(first / "model"), "--budget.general_phase.num_train_epochs", "0")
    command = distill_command(given, made, second, *more, "--budget.task_phase.learning_rate", "0")
    assert main([word.replace("text.txt", "no.txt") for word in command]) == 0  # no text is read
    before, after = (
        transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model").effbert.layers.state_dict()
        for folder in (first, second)
    )
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=0, atol=0)


def test_models_that_learn_together_are_those_that_learn_alone(given, made, tmp_path):
    net, models = str(made / "net" / "model"), (f"{MLP}, {MLP}", "bert-2x16")
    both, alone = tmp_path / "both", tmp_path / "alone"
    assert main(pretrain_command(given, both / "text", "--model", *models)) == 0
    starts = [str(both / "text" / f"model-{number}") for number in (1, 2)]
    assert main(distill_command(given, made, both / "task", "--model", *models, "--start_from", *starts)) == 0
    assert main(pretrain_command(given, alone / "text", "--model", models[1])) == 0
    start = ("--start_from", str(alone / "text" / "model"))
    assert main(distill_command(given, made, alone / "task", "--model", models[1], *start)) == 0
    together, by_itself = (
        transformers.AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
        for folder in (both / "task" / "model-2", alone / "task" / "model")
    )
    for name, tensor in by_itself.items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-6)
    assert main(distill_command(given, made, tmp_path / "net", "--model", *models, "--start_from", net)) == 2


TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "effbert",
]  # fmt: skip


def agree(one, other):
    """Saved models have the same weights, but for rounding."""
    states = [load_file(folder / "model.safetensors") for folder in (one, other)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-5)


def test_two_processes_distil_as_one_with_the_double_batch(given, made, tmp_path):
    more = ["--model", f"{MLP}, {MLP}", "--start_from", str(made / "net" / "model"), "--teacher_cache", "0"]
    more += ["--student.hidden_dropout_prob", "0", "--student.attention_probs_dropout_prob", "0"]

    def command(folder, size):
        sizes = [f"--budget.{phase}_phase.per_device_train_batch_size" for phase in ("general", "task")]
        return distill_command(given, made, folder, *more, sizes[0], size, sizes[1], size)

    subprocess.run([*TORCHRUN, *command(tmp_path / "two", "4")], check=True)
    assert main(command(tmp_path / "one", "8")) == 0
    agree(tmp_path / "two" / "model", tmp_path / "one" / "model")


def test_two_processes_of_accelerate_fine_tune_as_one_with_the_double_batch(given, tmp_path):
    def command(folder, size):
        more = ["--finetuning.per_device_train_batch_size", size, *phase_flags("finetuning", BEST[:2])]
        more += ["--finetuning.num_train_epochs", "1"]
        return [str(bert) if word == str(given / "bert") else word for word in teacher_command(given, folder, *more)]

    bert = tmp_path / "bert"  # without dropout, which each process draws for itself
    shutil.copytree(given / "bert", bert)
    config = json.loads((bert / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (bert / "config.json").write_text(json.dumps(config))

    settings = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", *settings]
    subprocess.run([*launch, "-m", "effbert", *command(tmp_path / "two", "4")], check=True)
    assert main(command(tmp_path / "one", "8")) == 0
    agree(tmp_path / "two" / "model", tmp_path / "one" / "model")


def test_two_processes_distil_a_supernet_on_text_as_one_with_the_double_batch(given, tmp_path):
    def command(folder, size):
        fixed = ("--student.hidden_dropout_prob", "0", "--student.attention_probs_dropout_prob", "0")
        return pretrain_command(given, folder, "--training.per_device_train_batch_size", size, *fixed)

    subprocess.run([*TORCHRUN, *command(tmp_path / "two", "4")], check=True)
    assert main(command(tmp_path / "one", "8")) == 0
    agree(tmp_path / "two" / "model", tmp_path / "one" / "model")


COMMANDS = ["search", "teacher", "pretrain", "distill", "paper", "arch", "import", "report", "evaluate", "predict"]
COMMANDS += ["export"]


@pytest.mark.parametrize("command", COMMANDS)
def test_torchrun_takes_no_flag_for_its_own(command, capsys):
    """It reads the whole command line, and abbreviations of its options as these."""
    from torch.distributed.run import get_args_parser

    with pytest.raises(SystemExit):
        main([command, "--help"])
    flags = set(re.findall(r"--[a-z0-9_.]+", capsys.readouterr().out))
    assert len(flags) > 1
    theirs = get_args_parser()._option_string_actions
    assert not {flag for flag in flags for other in theirs if other.startswith(flag) and flag != "--help"}


@pytest.mark.parametrize(("size", "said"), [(None, "tokens are not the teacher's"), (90, "it has vocab_size")])
def test_a_student_of_another_vocabulary_is_refused(given, made, tmp_path, capsys, size, said):
    first, other, run = tmp_path / "first", tmp_path / "other", tmp_path / "run"
    assert main(distill_command(given, made, first, "--model", "bert-2x16")) == 0
    words = [sentence(random.Random(5))[::-1] for _ in range(50)]  # of the same letters
    tokenizer = train_wordpiece(words, 120, max_length=40)
    known = transformers.AutoTokenizer.from_pretrained(given / "bert")
    config = transformers.BertConfig(
        vocab_size=size or len(known), pad_token_id=tokenizer.pad_token_id, hidden_size=32, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=40, id2label={0: "good", 1: "bad"},
    )  # fmt: skip
    if size:
        tokenizer = train_wordpiece(words, size, max_length=40)
    transformers.BertForSequenceClassification(config).save_pretrained(other)
    tokenizer.save_pretrained(other)
    capsys.readouterr()
    command = distill_command(given, made, run, "--start_from", str(first / "model"))
    assert main([str(other) if word == str(made / "teacher" / "model") else word for word in command]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not run.exists() or not [entry for entry in run.iterdir() if not entry.name.startswith(".")]


def interrupted(command, seconds):
    """Run a command, kill it after a while; whether it had ended by itself."""
    process = Command(command, quiet=True)
    try:
        return process.wait(seconds) == 0
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return False


def test_killed_again_and_again_it_ends_with_the_same_weights(given, made, tmp_path):
    more = ("--model", f"{MLP}, {MLP}", "--start_from", str(made / "net" / "model"), "--seeds", "2")
    begun = time.monotonic()
    finished(distill_command(given, made, tmp_path / "whole", *more))
    whole = time.monotonic() - begun
    for part in (0.7, 0.9):
        interrupted(distill_command(given, made, tmp_path / "cut", *more), part * whole)
    assert interrupted(distill_command(given, made, tmp_path / "cut", *more), 20 * whole)
    found = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut")]
    scores = [[seed["scores"] for seed in results["models"]["model"]["seeds"]] for results in found]
    assert scores[0] == scores[1]
    states = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "cut")]
    assert states[0] == states[1]
    assert not list((tmp_path / "cut").glob("*.pt"))


@pytest.mark.parametrize(("command", "name"), [(teacher_command, "teacher"), (pretrain_command, "net")])
def test_a_teacher_or_supernet_killed_before_it_is_kept_is_the_same_in_the_end(given, made, tmp_path, command, name):
    more = ("--finetuning.num_train_epochs", "1") if name == "teacher" else ()
    arguments = command(given, tmp_path / "run", *more)
    killed_before("model", arguments)
    assert not (tmp_path / "run" / "model").exists() and list((tmp_path / "run").glob(".partial-*"))
    assert main(arguments) == 0
    files = [folder / "model" / "model.safetensors" for folder in (tmp_path / "run", made / name)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".partial-")]
    assert not list((tmp_path / "run").glob("*.pt"))


def test_log_lines_call_a_model_by_its_name_or_its_folder():
    names = ("bert-2x16", f"{MLP}, {MLP}", "", "bert-2x8", "bert-2x8")
    folders = [f"model-{number}" for number in range(1, 6)]
    assert runs.said_names(names) == dict(zip(folders, ("bert-2x16", *folders[1:]), strict=True))
    assert runs.said_names((f"{MLP}, {MLP}",)) == {"model": "model"}
    assert runs.said_names(names[:2], ("a", "b")) == {"model-1": "a", "model-2": "b"}


def poisoned(model_folder, folder):
    """A copy of a saved model whose first weights are no numbers, so that what begins with it diverges."""
    shutil.copytree(model_folder, folder)
    state = load_file(folder / "model.safetensors")
    first = next(iter(state))
    save_file(state | {first: state[first] * float("nan")}, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_model_that_diverges_is_said_and_the_others_go_on(given, made, tmp_path, capsys):
    net, bad = made / "net" / "model", poisoned(made / "net" / "model", tmp_path / "bad")
    more = ("--model", f"{MLP}, {MLP}", f"{MLP}, {MLP}", "--start_from", str(bad), str(net), "--seeds", "2")
    command = distill_command(given, made, tmp_path / "run", *more)
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "model-1, seed 0: loss not finite at step" in said and "model-1: accuracy diverged over 2 seeds" in said
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    first, second = results["models"].values()
    assert (first["score"], first["diverged"], second["diverged"]) == (None, 2, 0)
    assert [seed["scores"] for seed in first["seeds"]] == [None, None] and 0 <= second["score"] <= 1
    assert not (tmp_path / "run" / "model-1").exists() and (tmp_path / "run" / "model-2").is_dir()
    assert main(command) == 0 and not list((tmp_path / "run").glob("*.pt"))

    more = ("--model", f"{MLP}, {MLP}", "--start_from", str(bad))
    for _ in range(2):
        assert main(distill_command(given, made, tmp_path / "none", *more)) == 2
        assert "no model is left: loss not finite at step" in capsys.readouterr().err


def test_general_distillation_goes_on_without_a_model_that_diverges(given, made, tmp_path, capsys):
    net, bad = made / "net" / "model", poisoned(made / "net" / "model", tmp_path / "bad")
    more = ("--model", f"{MLP}, {MLP}", f"{MLP}, {MLP}", "--start_from", str(bad), str(net))
    command = pretrain_command(given, tmp_path / "run", *more)
    assert main(command) == 0
    first, second = json.loads((tmp_path / "run" / "results.json").read_text())["models"].values()
    assert first["diverged"].startswith("loss not finite") and "diverged" not in second and second["tokens"] > 0
    assert not (tmp_path / "run" / "model-1").exists() and (tmp_path / "run" / "model-2").is_dir()
    before = (tmp_path / "run" / "model-2" / "model.safetensors").stat().st_mtime_ns
    assert main(command) == 0  # which computes nothing
    assert (tmp_path / "run" / "model-2" / "model.safetensors").stat().st_mtime_ns == before
    assert "no model is left" not in capsys.readouterr().err
    more = ("--model", f"{MLP}, {MLP}", "--start_from", str(bad))
    assert main(pretrain_command(given, tmp_path / "none", *more)) == 2
    assert "no model is left: loss not finite at step" in capsys.readouterr().err


def test_the_model_kept_is_of_the_first_seed_that_did_not_diverge(given, made, tmp_path, monkeypatch):
    def distil(workspace, students, *more):
        found = real(workspace, students, *more)
        lost = [dataclasses.replace(result, diverged="lost") for result in found]
        return lost if students[0].phase.seed == 0 else found

    real = runs.distil
    monkeypatch.setattr(runs, "distil", distil)
    more = ("--model", f"{MLP}, {MLP}", "--start_from", str(made / "net" / "model"), "--seeds", "2")
    assert main(distill_command(given, made, tmp_path / "run", *more)) == 0
    (model,) = json.loads((tmp_path / "run" / "results.json").read_text())["models"].values()
    lost, kept = model["seeds"]
    assert (lost["scores"], lost["diverged"], kept["diverged"]) == (None, "lost", "")
    assert model["score"] == kept["scores"]["accuracy"] and model["spread"] is None
    rows = OwnRows(validation_file=str(given / "dev.csv"), text_columns=("text",))
    assert evaluate_saved(tmp_path / "run" / "model", "mine", own=rows)["validation"]["accuracy"] == model["score"]


def test_a_student_never_lies_there_without_its_scores(given, made, tmp_path, monkeypatch):
    def die(path, text):
        raise OSError(f"killed before {path.name}")

    monkeypatch.setattr(runs, "write_atomic", die)
    command = distill_command(given, made, tmp_path / "run", "--model", f"{MLP}, {MLP}")
    assert main([*command, "--start_from", str(made / "net" / "model")]) == 2
    assert read_scores(tmp_path / "run" / "model")["scores"]


def test_a_run_is_told_by_what_its_paths_hold(given, made, tmp_path, monkeypatch, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(made, moved / "made")
    more = ("--model", f"{MLP}, {MLP}", "--start_from", str(made / "net" / "model"))
    assert main(distill_command(given, made, tmp_path / "run", *more)) == 0
    before = (tmp_path / "run" / "results.json").read_bytes()
    monkeypatch.chdir(moved)
    more = (*more[:-1], "made/net/../net/model")
    assert main(distill_command(given, Path("made"), tmp_path / "run", *more)) == 0
    assert (tmp_path / "run" / "results.json").read_bytes() == before
    bad = poisoned(made / "net" / "model", tmp_path / "bad")
    assert main(distill_command(given, made, tmp_path / "run", *more[:-1], str(bad))) == 2
    assert "what --start_from names at place 1 changed since this run began" in capsys.readouterr().err
    assert main(distill_command(given, made, tmp_path / "run", *more[:2])) == 2
    assert "what --start_from names at place 1 changed since this run began" in capsys.readouterr().err


def test_a_teacher_sized_down_learns_beside_others(given, made, tmp_path):
    more = ("--model", "teacher", "bert-2x16", "--params", "2500")
    assert main(pretrain_command(given, tmp_path / "run", *more)) == 0
    models = json.loads((tmp_path / "run" / "results.json").read_text())["models"]
    assert list(models) == ["model-1", "model-2"]
    sizes = [EffBertModel.from_pretrained(tmp_path / "run" / name).config.hidden_size for name in models]
    assert sizes == [8, 16]


@pytest.mark.parametrize(
    ("models", "more", "said"),
    [
        (["bert-2x16"], ["hidden_size", "24"], "--student.hidden_size 24 would do nothing: --model bert-2x16 has 16;"),
        (["bert-2x16"], ["embedding_size", "8"], "--model bert-2x16 has none; leave it out"),
        (["bert-2x16", "bert-2x8"], ["intermediate_size", "24"], "bert-2x16 has 64, --model bert-2x8 has 32;"),
        (["bert-2x16"], ["num_hidden_layers", "4"], "--model bert-2x16 has 2;"),
        ([f"{MLP}, {MLP}"], ["hidden_size", "24", "num_hidden_layers", "4"], "the architecture has 2;"),
        (
            [f"{MLP}, {MLP}"],
            ["hidden_size", "24", "num_attention_heads", "3"],
            "num_attention_heads 3 would do nothing: the architecture has 4, as the teacher;",
        ),
        (["teacher"], ["hidden_size", "24", "num_hidden_layers", "2"], "--model teacher has 8;"),
    ],
)
@pytest.mark.parametrize("command", ["pretrain", "distill"])
def test_a_size_that_no_model_takes_is_refused(given, tmp_path, capsys, command, models, more, said):
    sizes = [f"--student.{word}" if number % 2 == 0 else word for number, word in enumerate(more)]
    params = ["--params", "2500"] if "teacher" in models else []
    run = ["--output_dir", str(tmp_path / "run"), "--model", *models, *params, *sizes]
    assert main([command, *common(given, given / "bert"), *run]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_student_that_goes_on_has_its_sizes(given, tmp_path):
    vocabulary = student_vocabulary(read_config(given / "bert"))
    sizes = {"hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 24}
    EffBertConfig(architecture=MLP, **sizes, **vocabulary).save_pretrained(tmp_path)
    run = {"output_dir": "", "teacher": str(given / "bert"), "start_from": (str(tmp_path),)}
    check_sizes(DistillConfig(**run, student=StudentArguments(hidden_size=24, hidden_dropout_prob=0.3)))
    with pytest.raises(ValueError, match=f"hidden_size 32 would do nothing: {tmp_path} has 24; leave it out"):
        check_sizes(DistillConfig(**run, student=StudentArguments(hidden_size=32)))


def test_a_size_that_one_of_the_models_takes_is_none_too_many(given):
    run = {"output_dir": "", "teacher": str(given / "bert"), "model": (f"{MLP}, {MLP}", "bert-2x16")}
    sizes = StudentArguments(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    check_sizes(PretrainConfig(**run, student=sizes))
    check_sizes(PretrainConfig(**{**run, "model": ("supernet",)}, student=sizes))


def test_what_does_not_go_together_is_one_line_and_leaves_nothing(given, made, tmp_path, capsys):
    other = tmp_path / "other"
    tokenizer = train_wordpiece([sentence(random.Random(3)) for _ in range(50)], 90, max_length=40)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer) + 3, pad_token_id=tokenizer.pad_token_id, hidden_size=32, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=64, max_position_embeddings=40,
    )  # fmt: skip
    transformers.BertForSequenceClassification(config).save_pretrained(other)
    tokenizer.save_pretrained(other)
    net, run, text = str(made / "net" / "model"), tmp_path / "run", f"{MLP}, {MLP}"
    distill = distill_command(given, made, run)
    holed = without(made / "teacher" / "model", tmp_path / "holed", "encoder.layer.0.attention.self.query.weight")
    for file in (made / "teacher" / "model").glob("tokenizer*"):
        shutil.copy(file, holed)
    spoilt = shutil.copytree(made / "teacher" / "model", tmp_path / "spoilt")
    weights = load_file(spoilt / "model.safetensors")
    next(weights[name] for name in weights if name.endswith("embeddings.LayerNorm.bias"))[2] = float("inf")
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    no_head, strange, holed, spoilt = (
        [str(teacher) if word == str(made / "teacher" / "model") else word for word in distill]
        for teacher in (given / "bert", other, holed, spoilt)
    )
    for command, said in (
        (distill, "nothing to distil: give --model, or --start_from"),
        ([*distill, "--start_from", net], "is a supernet, of which any model is slices: name one with --model"),
        ([*distill, "--start_from", str(tmp_path / "nowhere")], "no such folder"),
        ([*distill, "--start_from", str(given / "bert")], "a model of type 'bert', neither a student nor a supernet"),
        ([*distill, "--model", "teacher"], "--model teacher needs --params"),
        ([*distill, "--model", "bert-2x16", "--params", "9"], "--params is for --model teacher"),
        (pretrain_command(given, run, "--params", "9"), "--params is for --model teacher"),
        ([*distill, "--model", "bert-2x16", "bert-4x16"], "need as many layers"),
        ([*distill, "--model", "bert-2x16", "--start_from", "a", "b"], "--start_from names 2 folders for 1 models"),
        ([*distill, "--model", "bert-3x16"], "--model bert-3x16 has 3 layers and needs a teacher with a multiple of"),
        ([*distill, "--model", "efficientbert-plusplus"], "has 12 layers and needs a teacher with a multiple of them"),
        ([*distill, "--model", f"{text}, {MLP}"], "the architecture has 3 layers and needs a teacher with a multiple"),
        ([*distill, "--model", "teacher", "--params", "9"], "--params 9: the teacher sized down to 6 layers has from"),
        ([*distill, "--model", "teacher", "--params", "9999", *THREE], "num_hidden_layers should be one of 1, 2, 4"),
        ([*distill, "--model", "bert-2x18"], "as the teacher's, 4, among which a width of 18 does not divide: nearest"),
        ([*distill, "--model", "bert-2x18"], "--model bert-2x18: its attention heads"),
        ([*distill, "--model", "bert-2x18"], "nearest widths that do: 16 and 20\n"),
        ([*distill, "--model", "bert-2x3"], "nearest widths that do: 4\n"),
        (
            [*distill, "--model", text, "--student.hidden_size", "22"],
            "(--student.hidden_size): its attention heads are",
        ),
        ([*distill, "--model", "bert-2x16", "--start_from", net], "does not fit the teacher and the model"),
        ([*no_head, "--model", "bert-2x16"], "has no head for mine (classification): make one with effbert teacher"),
        ([*holed, *SIZES, "--model", text], "its weights lack bert.encoder.layer.0.attention.self.query.weight, which"),
        ([*spoilt, *SIZES, "--model", text], "has weights that are not finite: bert.embeddings.LayerNorm.bias"),
        ([*strange, *SIZES, "--model", text, "--start_from", net], "it has vocab_size"),
        (
            [
                word
                for word in [*distill, "--model", text]
                if word not in ("--teacher", str(made / "teacher" / "model"))
            ],
            "--teacher is missing",
        ),
    ):
        capsys.readouterr()
        assert main(command) == 2, said
        shown, error = capsys.readouterr()
        assert said in error and error.count("\n") == 1 and "corpus:" not in shown
        assert not run.exists() or not [entry for entry in run.iterdir() if not entry.name.startswith(".")], said


def without(folder, other, *names):
    """A copy of a saved model that lacks the weights with these names, and has no tokenizer."""
    shutil.copytree(folder, other, ignore=shutil.ignore_patterns("tokenizer*"))
    state = load_file(other / "model.safetensors")
    kept = {name: tensor for name, tensor in state.items() if not name.endswith(names)}
    save_file(kept, other / "model.safetensors", {"format": "pt"})
    return other


def of_another_teacher(folder, other, width=20):
    """A copy of a saved model as another teacher's width leaves it."""
    shutil.copytree(folder, other)
    state = load_file(other / "model.safetensors")
    for name in [name for name in state if "fit_dense" in name]:
        state[name] = torch.ones(width, *state[name].shape[1:])
    save_file(state, other / "model.safetensors", {"format": "pt"})
    config = json.loads((other / "config.json").read_text()) | {"fit_size": width}
    (other / "config.json").write_text(json.dumps(config))
    return other


def test_a_projection_to_another_teachers_width_is_begun_anew(given, made, tmp_path, capsys):
    net, still = made / "net" / "model", ("--training.learning_rate", "0")
    more = ("--model", f"{MLP}, {MLP}", *still, "--start_from")
    for number, start in enumerate((net, of_another_teacher(net, tmp_path / "other"))):
        capsys.readouterr()
        assert main(pretrain_command(given, tmp_path / f"run-{number}", *more, str(start))) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "fit_dense" in line]
    assert len(said) == 1 and f"{start}: its projection (fit_dense) is for a teacher of width 20, this one" in said[0]
    same, other = (load_file(tmp_path / f"run-{number}" / "model" / "model.safetensors") for number in range(2))
    assert same.keys() == other.keys() and other["fit_dense.weight"].shape == (32, 24)
    for name, tensor in same.items():
        assert torch.equal(tensor, other[name]) == ("fit_dense" not in name), name
    student = of_another_teacher(tmp_path / "run-0" / "model", tmp_path / "student")
    more = ("--start_from", str(student), "--seeds", "2")
    assert main(distill_command(given, made, tmp_path / "run", *more)) == 0
    assert capsys.readouterr().out.count("this one has 32: it begins with fresh weights") == 1


def test_weights_that_a_start_lacks_are_told_before_a_folder_is_taken(given, made, tmp_path, capsys):
    net, run = made / "net" / "model", tmp_path / "run"
    broken = shutil.copytree(net, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{trunc")
    lacking = without(net, tmp_path / "lacking", "layers.1.mlps.0.dense2.weight")
    resized = shutil.copytree(net, tmp_path / "resized")
    config = json.loads((net / "config.json").read_text()) | {"embedding_size": 6}
    (resized / "config.json").write_text(json.dumps(config))
    other = ("--student.embedding_size", "6")
    longer = shutil.copytree(net, tmp_path / "longer")
    more = {"effbert.layers.5.more.weight": torch.ones(2)}
    save_file(load_file(net / "model.safetensors") | more, longer / "model.safetensors", metadata={"format": "pt"})
    for start, said, sizes in (
        (broken, "its weights cannot be read", SIZES),
        (lacking, "its weights lack effbert.layers.1.mlps.0.dense2.weight, which its config.json asks for", SIZES),
        (resized, "weights of another size than its config.json says: effbert.", (*SIZES[:4], *other, *SIZES[6:])),
        (longer, "its weights hold effbert.layers.5.more.weight, which its config.json does not know", SIZES),
    ):
        more = ["--model", f"{MLP}, {MLP}", "--start_from", str(start), "--corpus", str(given / "text.txt")]
        assert main(["pretrain", *common(given, given / "bert"), *sizes, *more, "--output_dir", str(run)]) == 2
        error = capsys.readouterr().err
        assert f"--start_from {start}" in error and said in error and error.count("\n") == 1 and not run.exists()
    more = ("--model", f"{MLP}, {MLP}", "--start_from", str(without(net, tmp_path / "fewer", "fit_dense.bias")))
    assert main(pretrain_command(given, run, *more)) == 0


def test_a_search_empties_its_folder_where_the_supernet_it_begins_with_will_not_do(given, made, tmp_path, capsys):
    start = without(made / "net" / "model", tmp_path / "lacking", "position_embeddings.weight")
    run, files = tmp_path / "run", ["--corpus", str(given / "text.txt"), *task(given), "--tasks"]
    more = ["--preset", "smoke", *common(given, given / "bert"), *SIZES, *files, "--output_dir", str(run)]
    assert main(["search", *more, "--start_from", str(start)]) == 2
    assert "its weights lack effbert.embeddings.position_embeddings.weight" in capsys.readouterr().err
    assert not run.exists()


@pytest.mark.parametrize("command", ["pretrain", "distill"])
def test_widths_at_which_an_expression_does_not_run_are_refused(given, tmp_path, capsys, command):
    mixed = "linear1_1(relu(mul(linear1_1(x,wb1),x)),wb2)"
    wide = [("48" if SIZES[place - 1] == "--student.intermediate_size" else word) for place, word in enumerate(SIZES)]
    run = [*common(given, given / "bert"), *wide, "--output_dir", str(tmp_path / "run")]
    assert main([command, *run, "--model", f"{MLP}, {mixed}"]) == 2
    error = capsys.readouterr().err
    assert "the architecture, layer 2: " in error and "takes 48 channels and gets 24" in error
    assert error.count("\n") == 1 and not (tmp_path / "run").exists()


@pytest.mark.parametrize("model", ["tinybert6", "efficientbert-tinybert6", "efficientbert", "bert-6x312"])
def test_named_models_with_wide_inner_layers_go_on(tmp_path, model):
    sizes = {"hidden_size": 768, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 3072}
    if model == "bert-6x312":
        sizes |= {"hidden_size": 312}
    transformers.BertConfig(**sizes).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()  # of which nothing is read
    check_sizes(PretrainConfig(output_dir="", teacher=str(tmp_path), model=(model,)))


def test_own_rows_and_the_folder_of_known_tasks_exclude_each_other(given, tmp_path, capsys):
    command = teacher_command(given, tmp_path / "run", "--data_dir", "glue")
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "--data_dir glue and --train_file exclude each other" in said and said.count("\n") == 1
