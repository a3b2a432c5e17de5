"""The inference benchmark: rows with times or reasons, ratios within a round, results kept; at the smallest sizes."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from effbert.bench import contenders, inference
from effbert.bench.contenders import BASE, MODELS, OURS, OURS_PLAIN, Contender, Worker

SHAPE = ("--small", "--batch_sizes", "2", "--lengths", "8", "--rounds", "2", "--seconds", "0.01")


class InThisProcess(Contender):
    """A worker without a process of its own."""

    compiled = False

    def __init__(self, name, runtime, small, threads, folder):
        super().__init__(name, runtime, small, folder)

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    """Everything in this process, on whatever was not measured before."""
    monkeypatch.setattr(inference, "Worker", InThisProcess)
    monkeypatch.setattr(inference, "writer", lambda: ThreadPoolExecutor(1))


def run(path, *arguments):
    inference.main([*SHAPE, "--output", str(path), *map(str, arguments)])
    return json.loads(path.read_text())


def test_rows_ratios_and_a_picture(here, tmp_path, capsys):
    plot = tmp_path / "new" / "inference.svg"
    record = run(tmp_path / "r.json", "--models", OURS, OURS_PLAIN, BASE, "--runtimes", "fp32", "bf16", "--plot", plot)
    rows = {(row["model"], row["runtime"]): row for row in record["rows"]}
    assert len(rows) == 6 and record["settings"] == {"small": True, "threads": 1}
    assert record["cpu"]["name"] and record["versions"]["torch"] == torch.__version__ and record["ceilings"]
    for row in rows.values():
        assert (row["batch_size"], row["length"], row["rounds"]) == (2, 8, 2) and row["load"] >= 0
        assert 0 < row["quartile_1_ms"] <= row["median_ms"] <= row["quartile_3_ms"] and row["calls"] >= 2
        assert row["sequences_per_second"] == pytest.approx(2000 / row["median_ms"])
        assert row["peak_memory"] > 0 and row["times_base"] > 0
    assert rows[BASE, "fp32"]["times_base"] == 1
    assert rows[OURS, "fp32"]["dtype"] == "float32" and rows[OURS, "bf16"]["dtype"] == "bfloat16"
    assert 1.9 < rows[BASE, "fp32"]["file_bytes"] / rows[BASE, "bf16"]["file_bytes"] <= 2
    assert rows[OURS, "fp32"]["file_bytes"] == rows[OURS_PLAIN, "fp32"]["file_bytes"]
    for (_, runtime), row in rows.items():
        assert row["times_base_file"] == pytest.approx(rows[BASE, runtime]["file_bytes"] / row["file_bytes"])
        assert "times_base_memory" in row
    shown = capsys.readouterr().out
    assert "PyTorch, fp32: ms a call ± half the quartiles' distance (times as fast as bert-base) at batch x" in shown
    row = rows[OURS, "fp32"]
    digits, spread = (1 if row["median_ms"] < 100 else 0), (row["quartile_3_ms"] - row["quartile_1_ms"]) / 2
    assert f"{row['median_ms']:.{digits}f} ±{spread:.{digits}f} ({row['times_base']:.1f})" in shown
    own = rows[OURS, "fp32"]
    assert f" {own['file_bytes'] / 1e6:.1f} ({own['times_base_file']:.1f}) " in shown
    texts = [element.text or "" for element in ElementTree.parse(plot).iter()]
    assert f"{OURS}, bf16" in texts and not any(text.startswith(f"{BASE},") for text in texts)


def test_a_ratio_compares_turns_of_the_same_round():
    base, own = inference.Entry(BASE, rounds=[[8.0], [80.0], [8.0]]), inference.Entry(OURS, rounds=[[2.0], [20.0]])
    rows = [{"model": BASE}, {"model": OURS}]
    inference.with_ratios(rows, [base, own])
    assert [row["times_base"] for row in rows] == [1, 4]
    inference.with_ratios(rows[1:], [own])
    assert rows[1]["times_base"] is None


def test_memory_and_file_are_ratios_where_both_sides_are_known():
    def row(model, memory=None, size=None):
        sizes = {} if size is None else {"file_bytes": size}
        return {"model": model} | sizes | (memory or {})

    def bytes_of(peak):
        return {"peak_memory": 100 + peak, "memory_without_model": 100}

    rows = [row(OURS, bytes_of(30), 10), row(BASE, bytes_of(90), 70), row("tinybert-4", None, 35), row("tinybert-6")]
    rows.append(row("bert-equal", bytes_of(0), 7))  # nothing beyond the libraries was seen
    entries = [inference.Entry(one["model"]) for one in rows]
    inference.with_ratios(rows, entries)
    assert [one["times_base_memory"] for one in rows] == [3, 1, None, None, None]
    assert [one["times_base_file"] for one in rows] == [7, 1, 2, None, 10]
    alone = rows[:1]
    inference.with_ratios(alone, entries)
    assert alone[0]["times_base_memory"] is None and alone[0]["times_base_file"] is None


def test_the_table_shows_each_ratio_where_there_is_one():
    def row(length, mebibytes, **ratios):
        memory = {"peak_memory": (100 + mebibytes) * 2**20, "memory_without_model": 100 * 2**20}
        known = {"model": OURS, "runtime": "fp32", "batch_size": 1, "length": length}
        known |= {"median_ms": 5.0, "quartile_1_ms": 4.6, "quartile_3_ms": 5.2}
        return known | {"times_base": None, "file_bytes": 62_900_000} | memory | ratios

    old = row(8, 60)  # a row of a file that has no ratios but of time
    new = row(16, 90, times_base=6.0, times_base_memory=5.5, times_base_file=6.96)
    assert inference.table([old])[-1].split() == [OURS, "5.0", "±0.3", "62.9", "60"]
    assert inference.table([old, new])[-1].split() == [
        *(OURS, "5.0", "±0.3", "5.0", "±0.3", "(6.0)", "62.9", "(7.0)", "90", "(5.5)")
    ]


def test_what_is_measured_is_kept_and_added_to(here, tmp_path, monkeypatch):
    first = run(tmp_path / "r.json", "--models", BASE, "--runtimes", "fp32")
    with monkeypatch.context() as patch:
        patch.setattr(inference, "Worker", None)  # nothing is left to run
        assert run(tmp_path / "r.json", "--models", BASE, "--runtimes", "fp32") == first
    more = run(tmp_path / "r.json", "--models", OURS, "--runtimes", "fp32")
    assert {row["model"] for row in more["rows"]} == {OURS, BASE}
    assert all(row["times_base"] for row in more["rows"])  # BERT-base was measured again, beside the other
    with pytest.raises(ValueError, match=r"cannot be added to .*its settings"):
        inference.main(["--output", str(tmp_path / "r.json"), "--threads", "2"])
    (tmp_path / "r.json").write_text("[]")
    with pytest.raises(ValueError, match=r"r\.json cannot be added to"):
        run(tmp_path / "r.json")


def reasons(record):
    assert all("median_ms" not in row for row in record["rows"] if "not measured" in row)
    return {row["model"]: row.get("not measured") for row in record["rows"]}


def test_outputs_that_are_not_finite_get_no_time(here, tmp_path, monkeypatch):
    made = contenders.make

    def broken(name, runtime, small):
        model = made(name, runtime, small)
        if name == OURS:
            model.classifier.bias.data[0] = float("nan")
        return model

    monkeypatch.setattr(contenders, "make", broken)
    found = reasons(run(tmp_path / "r.json", "--models", OURS, BASE, "--runtimes", "fp32"))
    assert found == {OURS: "outputs are not finite", BASE: None}
    assert reasons(run(tmp_path / "s.json", "--models", OURS, "--runtimes", "fp32"))[OURS]
    monkeypatch.undo()
    monkeypatch.setattr(inference, "Worker", InThisProcess)
    monkeypatch.setattr(inference, "writer", lambda: ThreadPoolExecutor(1))
    assert reasons(run(tmp_path / "s.json", "--models", OURS, "--runtimes", "fp32")) == {OURS: None}  # tried again


def test_what_cannot_be_written_or_drawn_is_said_before_anything_is_measured(tmp_path):
    with pytest.raises(IsADirectoryError):
        inference.main(["--plot", str(tmp_path), "--small"])
    with pytest.raises(ValueError, match="--plot draws other models beside bert-base: --models must name both"):
        inference.main(["--models", OURS, "--plot", str(tmp_path / "p.svg"), "--small"])


def test_a_call_that_would_take_too_long_is_not_made(here, tmp_path):
    shapes = ("--batch_sizes", "1", "2", "--longest", "1e-9")
    record = run(tmp_path / "r.json", "--models", BASE, "--runtimes", "fp32", *shapes)
    small, large = record["rows"]
    assert "median_ms" in small and "a call, above --longest 1e-09" in large["not measured"]


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_without_onnx_a_row_says_what_to_install(here, tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    found = reasons(run(tmp_path / "r.json", "--models", OURS, "--runtimes", "onnx"))
    assert package in found[OURS] and "pip install 'effbert[onnx]'" in found[OURS]


def test_without_a_compiler_a_row_says_so(here, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    found = reasons(run(tmp_path / "r.json", "--models", OURS, "--runtimes", "compiled"))
    assert found[OURS].startswith("torch.compile needs a C++ compiler")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_row_says_so(here, tmp_path):
    found = reasons(run(tmp_path / "r.json", "--models", OURS, "--runtimes", "gpu-bf16"))
    assert found[OURS] == "no GPU"


def test_files_of_onnx_runtime(here, tmp_path):
    record = run(tmp_path / "r.json", "--models", OURS, OURS_PLAIN, "--runtimes", "onnx", "onnx-int8")
    assert reasons({"rows": [row for row in record["rows"] if row["model"] == OURS]}) == {OURS: None}
    sizes = {row["runtime"]: row["file_bytes"] for row in record["rows"] if row["model"] == OURS}
    assert sizes["onnx-int8"] < sizes["onnx"] / 2
    assert all(row["not measured"] == f"the file is that of {OURS}" for row in record["rows"][1::2])


def test_a_worker_and_its_death(tmp_path):
    worker = Worker(BASE, "fp32", True, 1, tmp_path)
    try:
        assert all(time > 0 for time in worker.timed(1, 8, 0.01))
        memory = worker.memory()
        assert memory["peak_memory"] > memory["memory_without_model"] > 0
        worker.process.kill()
        with pytest.raises(ValueError, match="its process died, exit status -9"):
            worker.timed(1, 8, 0.01)
    finally:
        worker.close()


def test_the_models_have_the_sizes_they_are_known_for():
    with torch.device("meta"):
        counts = {name: MODELS[name](False).num_parameters() / 1e6 for name in MODELS}
    assert counts["mobilebert-tiny"] == pytest.approx(15.75, abs=0.01)
    assert counts[BASE] == pytest.approx(109.5, abs=0.05) and counts["tinybert-6"] == pytest.approx(67, abs=0.1)
    assert counts["tinybert-4"] == pytest.approx(14.35, abs=0.05)
    assert counts["bert-equal"] == pytest.approx(counts[OURS], rel=0.03) and counts[OURS] == counts[OURS_PLAIN]


@pytest.mark.parametrize(
    ("flag", "value"), [("--rounds", "1"), ("--lengths", "513"), ("--batch_sizes", "0"), ("--threads", "0")]
)
def test_settings_that_make_no_sense(flag, value):
    with pytest.raises(ValueError, match=f"{flag} {value}: must be at least"):
        inference.main([flag, value])


def test_the_bench_needs_no_library_of_the_search():
    code = "import sys\nfor name in ('tyro', 'optuna', 'datasets'): sys.modules[name] = None\n"
    done = subprocess.run([sys.executable, "-c", f"{code}import effbert.bench.inference"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
