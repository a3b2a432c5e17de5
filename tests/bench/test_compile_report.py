"""The compile report: every op is built and judged, its numbers follow from the hardware table, and failures are named.

Compiling needs a process without TRITON_INTERPRET: one child makes the reduced report.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from effbert.bench import compile_report, costs, meta_cases
from effbert.bench.hardware import GPUS, LIMITS, blocks_per_multiprocessor
from effbert.kernels.aot import TARGETS, Built
from effbert.kernels.dispatch import OPS

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys

for name in ("tyro", "optuna", "datasets", "rich"):
    sys.modules[name] = None  # the report runs where these are not installed
import json

from effbert.bench.compile_report import main, search_compilations

path = sys.argv[1]
status = main(["--reduced", "--output", path + "/report.json"])
print(json.dumps({"status": status, "search": search_compilations(3, "sm_90", "bf16", timed=1)}))
"""


@pytest.fixture(scope="module")
def reduced(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "made"
    variables = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join([*filter(None, sys.path), str(ROOT)])
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    return {**json.loads(last), "table": "\n".join(table), "report": json.loads((folder / "report.json").read_text())}


def test_no_kernel_of_any_op_spills_or_misses_matrix_instructions(reduced):
    assert reduced["report"]["problems"] == [] and reduced["status"] == 0
    assert "no spills, matrix instructions in every low-precision product, all fit" in reduced["table"]


def test_every_op_is_there_with_its_kernels_and_costs(reduced):
    report = reduced["report"]
    kernels = {row["key"]: row for row in report["kernels"]}
    for architecture in ("sm_90", "gfx942"):
        cases = [case for case in report["cases"] if case["architecture"] == architecture]
        assert {case["op"] for case in cases} == set(OPS)
        for case in cases:
            assert sum(case["kernels"].values()) == case["launches"] >= 2, case["op"]  # forward and backward
            assert {kernels[key]["architecture"] for key in case["kernels"]} == {architecture}
            gpus = [gpu.name for gpu in GPUS if gpu.architecture == architecture]
            assert list(case["roofline_us"]) == gpus and case["bytes"] > 0
        products = {
            row["kernel"] for row in report["kernels"] if row["products"] and row["architecture"] == architecture
        }
        assert {"linear_fwd_kernel", "linear_dgrad_kernel", "linear_gradients_kernel"} < products
        whole_rows = {"row_block_fwd_kernel", "row_block_bwd_kernel"}
        assert products & whole_rows == (whole_rows if architecture == "sm_90" else set())
    assert all(row["registers"] > 0 and row["blocks_per_multiprocessor"] > 0 for row in kernels.values())
    assert not [row["first_case"] for row in report["kernels"] if row["serialised"]]
    assert set(report["versions"]) == {"python", "torch", "triton"} and set(report["limits"]) == {"sm_90", "gfx942"}


def test_a_search_is_counted_in_compilations_and_timed(reduced):
    search = reduced["search"]
    counts = list(search["compilations"].values())
    assert list(search["compilations"]) == ["1", "3"] and 0 < counts[0] < counts[1]
    both = list(search["with_row_blocks"].values())
    assert all(one < two for one, two in zip(counts, both, strict=True))
    assert sum(search["by_kernel"].values()) == counts[1] and search["distinct_mlps"] <= 18
    assert not [name for name in search["by_kernel"] if name.startswith("row_block")]
    assert search["seconds"]["median"] > 0.01  # compiled anew, not read from a cache


def built(**changes) -> Built:
    values = {
        "key": "k",
        "architecture": "sm_90",
        "name": "some_kernel",
        "registers": 128,
        "stack": 0,
        "shared": 0,
        "tensor_memory": 0,
        "warps": 4,
        "products": (),
        "matrix_instructions": (),
        "assembly": "",
        "seconds": 1.0,
    }
    return Built(**values | changes)


@pytest.mark.parametrize(
    "changes,blocks",
    [
        ({}, 4),  # 512 // 128 warps a scheduler
        ({"registers": 129}, 3),  # given out in eights: 136
        ({"registers": 255, "warps": 8}, 1),
        ({"registers": 255, "warps": 16}, 0),
        ({"registers": 16, "warps": 1}, 32),  # slots for blocks
        ({"registers": 16}, 16),  # 64 warps
        ({"registers": 16, "shared": 227 * 1024}, 1),
        ({"registers": 16, "shared": 227 * 1024 + 1}, 0),
        ({"registers": 16, "shared": 100 * 1024, "architecture": "sm_80"}, 1),
        ({"registers": 16, "shared": 32 * 1024, "architecture": "gfx942"}, 2),
        ({"registers": 16, "architecture": "gfx942"}, 8),  # 32 wavefronts
        ({"registers": 16, "tensor_memory": 256, "architecture": "sm_100"}, 2),
    ],
)
def test_occupancy_is_what_the_scarcest_resource_admits(changes, blocks):
    assert blocks_per_multiprocessor(built(**changes)) == blocks


@pytest.mark.parametrize(
    "changes,words",
    [
        ({}, None),
        ({"stack": 40}, "40 bytes spilled"),
        ({"products": ("bf16",), "matrix_instructions": ("wgmma",)}, None),
        ({"products": ("bf16",)}, "bf16 products without matrix instructions"),
        ({"products": ("fp32", "tf32")}, "tf32 products without matrix instructions"),
        ({"products": ("fp32",)}, None),
        ({"shared": 300_000}, "does not fit"),
    ],
)
def test_what_fails_the_report_is_named(changes, words):
    case = meta_cases.Case("mlp", "8192x540", None, None, "some text")
    found = list(compile_report.problems(compile_report.kernel_row(built(**changes), "bf16", [case])))
    assert len(found) == (words is not None)
    if words:
        assert words in found[0] and found[0].startswith("some_kernel (sm_90 bf16, mlp 8192x540 some text): ")


def test_a_report_with_problems_has_status_1_and_is_written_all_the_same(monkeypatch, capsys, tmp_path):
    case = meta_cases.Case("mlp", "8x8", None, lambda itemsize: costs.mlp(8, 8, 8, itemsize))
    rows = [compile_report.kernel_row(built(stack=8), "bf16", [case])]
    report = {
        "cases": [compile_report.case_row(case, "sm_90", "bf16", {"k": 2})],
        "kernels": rows,
        "problems": ["some_kernel"],
    }
    monkeypatch.setattr(compile_report, "report", lambda *arguments: report)
    assert compile_report.main(["--output", str(tmp_path / "new" / "report.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == ["problems: 1, in 1 compilations", "some_kernel"]
    assert json.loads((tmp_path / "new" / "report.json").read_text())["kernels"][0]["stack"] == 8


def test_roofline_takes_the_longer_of_bytes_and_products():
    case = meta_cases.Case(
        "x", "", None, lambda itemsize: costs.Passes(costs.Cost(4_800_000, 0), costs.Cost(0, 989_400_000))
    )
    row = compile_report.case_row(case, "sm_90", "autocast", {})
    assert row["roofline_us"] == {"H200": 2.0, "H100": round(1e6 * (4.8e6 / 3.35e12 + 1e-6), 2)}
    assert {gpu.architecture for gpu in GPUS} == set(LIMITS) == set(TARGETS)


def test_the_full_set_covers_all_structures_and_the_published_expressions():
    cases = meta_cases.cases()
    texts = list(dict.fromkeys(case.expression for case in cases if case.op == "mlp_block"))
    assert len(texts) == 30 and len({text.split("linear")[1][:3] for text in texts}) == 16
    assert {case.op for case in cases} == set(OPS)


def test_the_full_set_covers_head_sizes_to_128_equal_and_different_each_case_once():
    cases, pairs, odd = meta_cases.cases(), meta_cases.HEAD_SIZES, meta_cases.ODD_HEAD_SIZES
    assert {(45, 64), (16, 16), (32, 64), (96, 96), (128, 64), (128, 128)} <= set(pairs)
    shapes = [case.shape for case in cases if case.op == "score_mse"]
    some = (
        "64x12x128x45 teacher 64",
        "16x12x512x30 teacher 64",
        "64x12x128x128 teacher 128",
        "128x12x64x63 teacher 39",
    )
    for shape in some:
        forms = {found.removeprefix(shape) for found in shapes if found.startswith(shape)}
        assert forms == {" direct real", " gram real", " direct released"}
    assert len(shapes) == len(set(shapes)) == 3 * 3 * len(pairs + odd)
    alone = [case.shape for case in cases if case.op == "attention"]
    assert len(alone) == len(set(alone)) == 3 * len({student for student, _ in pairs})


@pytest.mark.parametrize(
    "arguments,words",
    [
        (["--architectures", "sm_90,sm_75"], "unknown architecture 'sm_75': one of sm_80, sm_90, sm_100, gfx942"),
        (["--dtypes", "fp8"], "unknown dtype 'fp8': one of bf16, fp16, fp32, tf32, autocast"),
        (["--expressions", "-1"], "--expressions"),
        (["--candidates", "many"], "'many' is no number"),
        (["--reduce"], "--reduce"),
    ],
)
def test_bad_arguments_are_one_line(arguments, words):
    with pytest.raises(ValueError) as failure:
        compile_report.main(arguments)
    assert words in str(failure.value) and "\n" not in str(failure.value)


def test_the_interpreter_is_refused_in_a_line(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 keeps kernels from being compiled"):
        compile_report.main(["--reduced"])
