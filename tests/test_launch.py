"""Commands that share no batches, in two processes: the first does the work, and both end with its status."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from commands import KILLED_BEFORE, Command
from effbert import cli
from effbert.__main__ import main
from effbert.architecture import PUBLISHED
from effbert.data.tokenizer import train_wordpiece
from effbert.model import EffBertConfig, new_student

ROOT = Path(__file__).resolve().parents[1]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
    ],
}


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A tiny student for two labels, and rows of its task."""
    folder = tmp_path_factory.mktemp("student")
    tokenizer = train_wordpiece(["a small model reads long words"] * 3, 60, max_length=16)
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 12, "embedding_size": 4}
    ids = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id, "max_position_embeddings": 16}
    torch.manual_seed(0)
    config = EffBertConfig(architecture="linear1_1(gelu(linear1_1(x,wb1)),wb2)", **sizes, **ids)
    new_student(config, "classification", ("good", "bad")).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "dev.csv").write_text("text,label\nsmall words,good\nlong model,bad\na word,bad\n")
    return folder


@pytest.fixture
def two(monkeypatch):
    """Runs a command in two processes that find each other; the status of each and what it printed."""

    def run(arguments, before=("", "")) -> list[tuple[int, str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        processes = []
        for rank in range(2):
            monkeypatch.setenv("RANK", str(rank))
            processes.append(Command(arguments, before[rank]))
        texts = [process.communicate(120)[0] for process in processes]
        return list(zip([process.returncode for process in processes], texts, strict=True))

    return run


def evaluate(student, *more):
    rows = ["--validation_file", str(student / "dev.csv"), "--text_columns", "text", "--device", "cpu"]
    return ["evaluate", str(student / "model"), "--task", "mine", *rows, *more]


def test_the_first_evaluates_and_the_other_ends_with_it_in_silence(student, two, tmp_path, capsys):
    assert main(evaluate(student)) == 0
    alone = capsys.readouterr().out
    file = tmp_path / "scores.json"
    assert two(evaluate(student, "--output", str(file))) == [(0, alone), (0, "")]
    assert "accuracy" in json.loads(file.read_text())["scores"]["validation"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["arch", PUBLISHED],
        ["--version"],
        ["search", "--help"],
        ["search", "--preset", "smoke", "--output_dir", "run", "--dry_run", "--flops_per_second", "1e9"],
        ["paper", "--preset", "smoke", "--output_dir", "run", "--show"],
    ],
    ids=" ".join,
)
def test_what_only_prints_is_printed_once(two, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (status, text), other = two(arguments)
    assert (status, other) == (0, (0, "")) and text and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["arch", "x"], "height 0"),
        (["predict", "mrpc=./nowhere", "--output", "glue.zip"], "nowhere"),
        (["export", "nowhere", "--output_dir", "small"], "nowhere"),
        (["import", "nowhere", "--architecture", "efficientbert", "--output_dir", "student"], "nowhere"),
        (["bench", "nothing"], "unknown 'nothing'"),
        (["nothing"], "unknown command 'nothing'"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_an_error_of_the_first_is_one_line_and_the_status_of_both(two, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (status, text), other = two(arguments)
    assert (status, other) == (2, (2, "")) and not list(tmp_path.iterdir())
    assert text.startswith("effbert: ") and words in text and text.count("\n") == 1


def test_an_error_that_nobody_foresaw_ends_both(student, two):
    fails = "import effbert.answers\ndef fails(*more, **options): raise ArithmeticError('the sum is wrong')\n"
    fails += "effbert.answers.evaluate_saved = fails"
    first, second = two(evaluate(student), (fails, ""))
    assert first[0] == second[0] == 2
    assert first[1] == "effbert: rank 0: ArithmeticError: the sum is wrong (EFFBERT_TRACEBACK=1 shows where)\n"


def test_the_other_does_not_wait_for_a_first_that_is_killed(student, two, tmp_path):
    killed = KILLED_BEFORE.format(name="scores.json")
    first, second = two(evaluate(student, "--output", str(tmp_path / "scores.json")), (killed, ""))
    assert first[0] == -signal.SIGKILL and second[0] == 2
    (line,) = [line for line in second[1].splitlines() if line.startswith("effbert: ")]  # gloo may say more
    assert "another process of this run has ended" in line


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_exports_once(student, tmp_path, launcher):
    command = ["-m", "effbert", "export", str(student / "model"), "--output_dir", str(tmp_path / "small")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher], *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(tmp_path / "small")) == 1 and (tmp_path / "small" / "config.json").is_file()


def test_commands_that_train_are_shared_and_no_others():
    assert [name for name in cli.COMMANDS if cli.is_shared([name])] == list(cli.SHARED)
    assert not cli.is_shared([]) and not cli.is_shared(["distill", "--help"])
