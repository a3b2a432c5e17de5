"""The command line: bad input is one line and status 2 before anything is computed; help and arch work."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import transformers
from datasets import Dataset

from effbert import cli, pace
from effbert.__main__ import main
from effbert.architecture import PUBLISHED
from effbert.data.batches import BatchPlan
from effbert.pace import paced

ROOT = Path(__file__).resolve().parents[1]


def fails(capsys, *arguments) -> str:
    """Run a command that must fail; returns its one line."""
    assert main(list(arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("effbert: "), lines
    return lines[0]


def smoke(tmp_path, *more):
    return ("search", "--preset", "smoke", "--output_dir", str(tmp_path / "run"), *more)


def test_arch_prints_the_published_counts(capsys):
    assert main(["arch", PUBLISHED, "--sizes_of", "efficientbert"]) == 0
    text = capsys.readouterr().out
    assert "15,737,724" in text and "15,615,999" in text


def test_help_and_version(capsys):
    assert main(["--help"]) == 0 and main(["--version"]) == 0
    assert "effbert search --preset demo" in capsys.readouterr().out
    for command in ("search", "arch"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    assert "--stage1.num_candidates" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text,words",
    [
        ("softmax(linear1_1(gelu(linear1_1(x,wb1)),wb2))", "softmax"),
        ("linear1_1(gelu(linear1_1(x,wb1)),wb2", "column"),
        ("linear1_1(gelu(linear1_1(x,wb1)),wb2))", "column"),
        ("linear1_1(gelu(linear1_1(x,wb1)),wb2) relu", "column"),
        ("add(x)", "add"),
        ("linear1_1(gelu(linear1_1(x,wb3)),wb2)", "wb3"),
        ("relu(" * 10_000 + "x" + ")" * 10_000, "deep"),
        ("", "empty"),
    ],
)
def test_an_architecture_that_is_none(capsys, text, words):
    assert words in fails(capsys, "arch", text)


@pytest.mark.parametrize(
    ("command", "said"), [("search", "stopped; the same command goes on from here"), ("arch", "stopped")]
)
def test_a_stopped_command_goes_on_only_where_it_keeps_what_it_did(capsys, monkeypatch, command, said):
    def stopped(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, command, stopped)
    assert main([command]) == 130 and capsys.readouterr().err == f"effbert: {said}\n"


def stopped_early(folder: Path, *program: str) -> tuple[int, str]:
    """Exit status and stderr of a process that gets SIGINT while it imports transformers, which never ends here."""
    stub, reached = folder / "transformers.py", folder / "reached"
    stub.write_text(f"import pathlib, time\npathlib.Path({str(reached)!r}).touch()\ntime.sleep(600)\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    usual = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    process = subprocess.Popen(
        [sys.executable, *program], env=environment, cwd=folder, stderr=subprocess.PIPE, text=True, preexec_fn=usual
    )
    try:
        for _ in range(1200):
            if reached.exists() or process.poll() is not None:
                break
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        return process.wait(60), process.stderr.read()
    finally:
        process.kill()
        process.stderr.close()


def test_ctrl_c_while_the_libraries_are_imported_is_one_line(tmp_path):
    script = tmp_path / "bin" / "effbert"  # as pip writes it
    script.parent.mkdir()
    script.write_text("import sys\nfrom effbert.__main__ import main\nsys.exit(main())\n")
    for program in (("-m", "effbert"), (str(script),)):
        assert stopped_early(tmp_path, *program, "search", "--preset", "demo") == (130, "effbert: stopped\n")
        (tmp_path / "reached").unlink()


def test_a_program_that_imports_the_package_keeps_its_own_ctrl_c(tmp_path):
    status, said = stopped_early(tmp_path, "-c", "import effbert")
    assert status == -signal.SIGINT and said.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize("command", ["kernels", "bench"])
def test_a_command_of_commands_lists_them(capsys, command):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith(f"effbert {command} WORD, one of ")


@pytest.mark.parametrize("command", ["evaluate", "predict"])
def test_commands_whose_stdout_is_their_result_say_on_stderr_how_far_they_are(capsys, monkeypatch, command):
    def read(arguments):
        plan = BatchPlan(Dataset.from_dict({"input_ids": [[1]] * 3}), 1, pad_token_id=0)
        print(len(list(paced(plan, "reading rows"))))

    monkeypatch.setattr(pace, "SECONDS", -1.0)
    monkeypatch.setattr(pace, "SHARE", 0.0)
    monkeypatch.setattr(f"effbert.answers.main_{command}", read)
    assert main([command]) == 0
    said = capsys.readouterr()
    assert said.out == "3\n" and "reading rows: batch 2 of 3, 0:00 left" in said.err


@pytest.mark.parametrize("word", cli.BENCHMARKS)
def test_the_help_of_a_benchmark_is_headed_by_its_own_name_once(capsys, word):
    with pytest.raises(SystemExit) as ended:
        main(["bench", word, "--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and shown.startswith(f"usage: effbert bench {word} ") and shown.count("usage:") == 1
    assert "A progressive search" not in shown


@pytest.mark.parametrize(
    "arguments,words",
    [
        (("nonsense",), "one of search, "),
        (("bench", "step"), "one of --output FILE and --warm-up is needed (effbert bench step --help lists the"),
        (("bench", "forecast", "--gpus", "H200"), "unrecognized arguments: --gpus H200 (effbert bench forecast --help"),
        (("bench", "step", "--output", "x", "--smal"), "unrecognized arguments: --smal (effbert bench step --help"),
        (("kernels",), "a word is missing: one of show"),
        (("kernels", "sow"), "unknown 'sow': one of show"),
        (("kernels", "show", "x"), "height"),
        (("kernels", "show", "linear(gelu(linear(x,wb1)),wb2)"), "linear without its structure"),
        (
            ("kernels", "show", "linear1_1(gelu(linear1_1(x,wb1)),wb2)", "--ptx", "sm_75"),
            "sm_80, sm_90, sm_100, gfx942",
        ),
        (("bench", "compile"), "unknown 'compile': one of compile-report"),
        (("bench", "compile-report", "--dtypes", "fp8"), "unknown dtype 'fp8': one of bf16"),
        (("bench", "compile-report", "--reduced", "--reduced"), "--reduced is given 2 times"),
        (
            ("search", "--preset", "big", "--output_dir", "x"),
            "unknown preset 'big': one of demo, smoke, paper, paper-fast",
        ),
        (("search", "--preset", "demo"), "--output_dir"),
        (("search", "--preset"), "--preset needs a value"),
        (("search", "--preset", "demo", "--output_dir", "x", "--sede", "1"), "--seed"),
        (("search", "--preset", "demo", "--output_dir", "x", "--seed", "one"), "seed"),
        (("search", "--preset", "demo", "--seed", "1", "--output_dir", "x", "--seed=2"), "--seed is given 2 times"),
        (("search", "--output-dir", "x", "--output_dir", "y"), "--output_dir is given 2 times"),
        (("search", "--preset", "demo", "--output_dir", "x", "--loss.loss_mask", "all"), "loss_mask"),
        (("search", "--preset", "demo", "--output_dir", "x", "--supernet.learning_rate", "-1"), "learning_rate"),
        (
            ("search", "--preset", "demo", "--output_dir", "x", "--stage1.task_phase.weight_decay", "nan"),
            "--stage1.task_phase.weight_decay nan: it must be a number",
        ),
        (
            ("search", "--preset", "demo", "--output_dir", "x", "--loss.attention", "nan"),
            "--loss.attention nan: it must be a number",
        ),
        (
            ("search", "--preset", "smoke", "--output_dir", "x", "--agreement_candidates", "50"),
            "agreement_candidates is 50: they are stage 3's, of which there are 4",
        ),
        (
            ("search", "--preset", "smoke", "--output_dir", "x", "--student.intermediate_size", "64"),
            "student.intermediate_size is 64, above the hidden_size of 32",
        ),
    ],
)
def test_arguments_that_cannot_be_read(capsys, arguments, words):
    assert words in fails(capsys, *arguments)


def test_an_empty_parameter_band(capsys, tmp_path):
    line = fails(capsys, *smoke(tmp_path, "--min_params", "1", "--max_params", "2"))
    assert "smallest" in line or "nearest" in line


def test_an_unknown_task_and_missing_or_empty_data(capsys, tmp_path):
    assert "builtin-topic" in fails(capsys, *smoke(tmp_path, "--task", "mnlii"))
    assert "no such folder" in fails(capsys, *smoke(tmp_path, "--task", "mrpc", "--data_dir", str(tmp_path / "none")))
    (tmp_path / "MRPC").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "MRPC" / f"{name}.tsv").write_text("")
    assert "empty" in fails(capsys, *smoke(tmp_path, "--task", "mrpc", "--data_dir", str(tmp_path), "--tasks"))


def own_task(tmp_path, train, validation="text,label\na,yes\nb,no\n"):
    for name, content in (("train.csv", train), ("dev.csv", validation)):
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    files = ("--train_file", str(tmp_path / "train.csv"), "--validation_file", str(tmp_path / "dev.csv"))
    return smoke(tmp_path, "--task", "own", "--tasks", "--text_columns", "text", *("--label_column", "label"), *files)


@pytest.mark.parametrize(
    "train,validation,words",
    [
        ("text,label\na,yes\nb,no,more\n", None, "train.csv:3"),
        ("text,label\na,yes\nb,no\n", "text,label\na,maybe\n", "maybe"),
        (b"text,label\n\xff\xfe,yes\n", None, "UTF-8"),
        ("", None, "empty"),
    ],
)
def test_rows_that_cannot_be_used_are_named_by_line(capsys, tmp_path, train, validation, words):
    arguments = own_task(tmp_path, train, validation) if validation else own_task(tmp_path, train)
    assert words in fails(capsys, *arguments)


def test_a_corpus_that_is_missing_empty_or_not_text(capsys, tmp_path):
    assert "no such file" in fails(capsys, *smoke(tmp_path, "--corpus", str(tmp_path / "none.txt")))
    assert "no corpus at ./none:en" in fails(capsys, *smoke(tmp_path, "--corpus", "builtin", "./none:en"))
    (tmp_path / "empty.txt").write_text("")
    assert "empty" in fails(capsys, *smoke(tmp_path, "--corpus", str(tmp_path / "empty.txt")))
    (tmp_path / "bytes.txt").write_bytes(b"fine\n\xff\xfe\n")
    assert "UTF-8" in fails(capsys, *smoke(tmp_path, "--corpus", str(tmp_path / "bytes.txt")))


def test_a_teacher_that_cannot_serve(capsys, tmp_path):
    folder = tmp_path / "teacher"
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 32}
    config = transformers.BertConfig(**sizes, num_hidden_layers=6)
    config.save_pretrained(folder)
    assert "no weights" in fails(capsys, *smoke(tmp_path, "--teacher", str(folder)))
    model = transformers.BertForSequenceClassification(config)
    model.config.id2label = {0: "good", 1: "bad"}
    model.save_pretrained(folder)
    line = fails(capsys, *smoke(tmp_path, "--teacher", str(folder)))
    assert "good, bad" in line and "internet" in line
    line = fails(capsys, *smoke(tmp_path, "--teacher", str(folder), "--student.num_attention_heads", "2"))
    assert "4 attention heads" in line
    line = fails(capsys, *smoke(tmp_path, "--teacher", str(folder), "--student.num_hidden_layers", "4"))
    assert "6 layers cannot be divided among 4" in line


def test_an_output_dir_that_holds_something_else_or_cannot_be_written(capsys, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    assert "thesis.txt" in fails(capsys, *smoke(tmp_path))
    assert (tmp_path / "run" / "thesis.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    line = fails(capsys, "search", "--preset", "smoke", "--output_dir", str(tmp_path / "file" / "run"))
    assert "output_dir" in line


def test_a_failed_start_leaves_nothing_that_blocks_a_corrected_one(capsys, tmp_path):
    band = ("--min_params", "1", "--max_params", "2")
    for arguments in (("--task", "mnlii"), band, ("--corpus", "none.txt"), band):
        assert "another configuration" not in fails(capsys, *smoke(tmp_path, *arguments))
        assert not (tmp_path / "run").exists()
    (tmp_path / "mine").mkdir()
    for folder, left in (("mine", True), ("of/runs", False)):
        fails(capsys, "search", "--preset", "smoke", "--task", "mnlii", "--output_dir", str(tmp_path / folder))
        assert (tmp_path / folder).exists() == left and sorted(tmp_path.iterdir()) == [tmp_path / "mine"]
    assert not list((tmp_path / "mine").iterdir())


@pytest.mark.parametrize(
    "limits,words",
    [
        (("--params", "9000", "--max_params", "10000"), "leave out --min_params and --max_params"),
        (("--min_params", "90000", "--max_params", "80000"), "--min_params 90,000 is above --max_params 80,000"),
        (("--min_params", "-1"), "min_params is -1"),
    ],
)
@pytest.mark.parametrize("command", ["search", "paper"])
def test_limits_that_contradict_each_other_are_refused_before_anything_is_read(
    capsys, tmp_path, monkeypatch, command, limits, words
):
    monkeypatch.setattr("effbert.search.run.RunFolder", None)
    more = ("--teacher", "none", "--corpus", "none", "--preset", "paper-fast") if command == "paper" else ()
    arguments = (command, *more, "--output_dir", str(tmp_path / "run"), *limits)
    assert words in fails(capsys, *arguments) and not (tmp_path / "run").exists()


def test_python_m_works_from_the_root_beside_another_package_called_kernels(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '0.9'\ndef get_kernel(): ...\n")
    metadata = tmp_path / "kernels-0.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.9\n")
    result = subprocess.run(
        [sys.executable, "-m", "effbert", "arch", PUBLISHED],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0 and "15,737,724" in result.stdout, result.stderr


def test_kernels_show_prints_the_generated_functions(capsys):
    text = "relu(linear1_2(tanh(linear1_2(add(x,sigmoid(x)),wb1)),wb2))"
    assert main(["kernels", "show", text]) == 0
    printed = capsys.readouterr().out
    assert printed.count("@triton.jit") == 6
    assert "# pre, add(x,sigmoid(x))" in printed and "# mid, tanh(h)" in printed and "# post, relu(y)" in printed


def test_kernels_show_ptx_prints_each_kernel_below_its_resources():
    text = "linear1_4(gelu(linear1_4(x,wb1)),wb2)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "effbert", "kernels", "show", text, "--ptx", "sm_90"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    heads = [line for line in result.stdout.splitlines() if line.startswith("// ") and " on sm_90" in line]
    assert heads[1].startswith("// linear_fwd_kernel on sm_90") and heads[1].endswith("bytes of shared memory, wgmma")
    assert result.stdout.count(".entry linear_fwd_kernel") == sum("linear_fwd" in head for head in heads) > 0
    assert all(" registers, 0 bytes of stack, " in head for head in heads)


def test_kernels_show_ptx_cannot_build_under_the_interpreter(capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    text = "linear1_4(gelu(linear1_4(x,wb1)),wb2)"
    assert "TRITON_INTERPRET=1 keeps" in fails(capsys, "kernels", "show", text, "--ptx", "sm_90")


def test_presets_are_values_that_serialise():
    from effbert.config import PRESETS, as_dict

    for make in PRESETS.values():
        assert json.loads(json.dumps(as_dict(make()))) == as_dict(make())
