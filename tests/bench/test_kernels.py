"""The kernel benchmark: what it records, that a wrong kernel gets no time, and that the rivals compute our ops."""

import itertools
import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from effbert import kernels
from effbert.bench import kernel_cases, measure, rivals
from effbert.bench import kernels as bench
from effbert.bench.costs import Ceilings, Cost
from effbert.kernels import Dropout, eager, tiles

CPU = torch.device("cpu")
CASES = kernel_cases.all_cases(bench.QUICK)
BY_OP = {case.op: case for case in CASES}
GPU = pytest.mark.gpu


@pytest.fixture(autouse=True)
def few_numbers(monkeypatch):
    """Ceilings are measured in a test of their own."""
    monkeypatch.setattr(bench, "ceilings", lambda device, size: Ceilings(1e9, {"fp32": 1e9, "bf16": 1e9}))


@pytest.fixture
def pretend_gpu(monkeypatch):
    """Rows of the fused kernels are tried on the CPU, without graphs; returns a way to say what an op computes."""
    monkeypatch.setattr(bench, "unavailable", lambda variant, device: bench.NO_GPU if variant.graph else None)

    def stand_in(name, function):
        monkeypatch.setattr(kernels, name, lambda *args, backend: function(*args))

    return stand_in


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(bench, "device_to_measure", lambda: CPU)


def test_all_ops_are_measured_on_a_cpu_with_a_reason_where_they_cannot_be(tmp_path, capsys, on_cpu):
    output = tmp_path / "sub" / "kernels.json"
    assert bench.main(["--quick", "--passes", "eager", "--output", str(output)]) == 0
    record, table = json.loads(output.read_text()), capsys.readouterr().out
    assert {"device", "driver", "versions", "dtype", "seed", "sizes", "notes", "ceilings"} <= record.keys()
    assert record["dtype"] == "float32" and record["versions"]["torch"] == torch.__version__
    rows = {(row["case"], row["variant"]): row for row in record["rows"]}
    assert {case for case, _ in rows} == {*record["cases"], bench.SIX_LAYERS}
    for (case, variant), row in rows.items():
        assert f"{case:<32} {variant:<28}" in table
        if variant in ("eager", "reference", "gram", "bf16"):
            assert 0 < row["warm"]["quartile_1_ms"] <= row["warm"]["median_ms"] <= row["warm"]["quartile_3_ms"]
            assert row["reason"] is None and row["percent_of_roofline"] > 0
        else:
            assert variant.startswith("triton") or variant.endswith("+graph"), variant
            assert row["warm"] is None and row["reason"] == bench.NO_GPU
    medians = [rows[case.name, "eager"]["warm"]["median_ms"] for case in CASES if case.name[:-1].endswith("layer ")]
    assert len(medians) == 6
    assert rows[bench.SIX_LAYERS, "eager"]["warm"]["median_ms"] == pytest.approx(sum(medians))
    assert {target["reached"] for target in record["targets"]} == {None}
    assert record["ratios"] == {}
    assert "compile max-autotune+graph / triton+graph (warm) at least 1.4: not measured" in table


@pytest.fixture
def compiled_modes(monkeypatch):
    """torch.compile that compiles nothing, which is not what is tested here; the modes it was asked for."""
    modes = []

    def remembered(function, fullgraph, dynamic, mode):
        modes.append(mode)
        return function

    monkeypatch.setattr(torch, "compile", remembered)
    return modes


def variants_of(path, case):
    return [row["variant"] for row in json.loads(path.read_text())["rows"] if row["case"] == case]


COMPILED = ["compile", "compile+graph"]
TUNED = ["compile max-autotune", "compile max-autotune+graph"]


def test_compiled_variants_follow_the_plain_ones(tmp_path, on_cpu, compiled_modes):
    output = tmp_path / "k.json"
    bench.main(["--quick", "--ops", "soft_cross_entropy", "--output", str(output)])
    plain = ["eager", "eager+graph", "triton", "triton+graph"]
    assert variants_of(output, "soft_cross_entropy C=3") == [*plain, *COMPILED, *TUNED]
    assert compiled_modes == [None, None, bench.MAX_AUTOTUNE, bench.MAX_AUTOTUNE]
    rows = json.loads(output.read_text())["rows"]
    assert [row["variant"] for row in rows if row["warm"]] == [
        name for name in ("eager", "compile", "compile max-autotune") for _ in range(2)
    ]


def test_what_compiles_can_be_compared_alone_the_tuned_layers_first(tmp_path, on_cpu, compiled_modes):
    output = tmp_path / "k.json"
    bench.main(["--quick", "--ops", "mlp_block,score_mse", "--passes", "compile", "--output", str(output)])
    fused = ["triton", "triton+graph"]
    assert variants_of(output, "mlp_block layer 1") == [*fused, *TUNED, *COMPILED]
    assert variants_of(output, bench.SIX_LAYERS) == [*fused, *TUNED, *COMPILED]
    assert variants_of(output, "score_mse L=8") == [*fused, *COMPILED, "flex", "flex+graph", *TUNED]
    assert compiled_modes == [bench.MAX_AUTOTUNE] * 6 + [None] * 8 + [bench.MAX_AUTOTUNE] * 2
    flex = [row for row in json.loads(output.read_text())["rows"] if row["variant"] == "flex"]
    assert all("backward" in row["reason"] for row in flex)  # it has none on a CPU


def test_a_block_is_measured_with_separate_kernels_too(tmp_path, on_cpu, monkeypatch):
    output, asked = tmp_path / "k.json", []

    def mlp_block(*args, backend):
        asked.append(tiles._few)
        return eager.mlp_block(*args)

    monkeypatch.setattr(kernels, "mlp_block", mlp_block)
    monkeypatch.setattr(bench, "unavailable", lambda variant, device: "no graph" if variant.graph else None)
    bench.main(["--quick", "--ops", "mlp_block", "--passes", "eager", "--output", str(output)])
    found = variants_of(output, "mlp_block layer 1")
    assert found[-4:] == ["triton", "triton+graph", "triton separate", "triton separate+graph"]
    halves = len(asked) // 2
    assert sorted(asked) == [False] * halves + [True] * halves and not tiles._few
    assert "triton separate / triton" in json.loads(output.read_text())["ratios"]["mlp_block layer 1"]


def test_kernels_are_compiled_ahead_and_a_failure_is_told(on_cpu, monkeypatch, capsys):
    called = []

    def mlp(*args, backend):
        called.append(backend)
        return eager.mlp(*args)

    monkeypatch.setattr(kernels, "mlp", mlp)
    assert bench.main(["--quick", "--ops", "mlp", "--warm-up"]) == 0 and called == ["triton"]
    monkeypatch.setattr(kernels, "mlp", lambda *args, backend: 1 / 0)
    assert bench.main(["--quick", "--ops", "mlp", "--warm-up"]) == 1
    assert "mlp: ZeroDivisionError: division by zero" in capsys.readouterr().err


@pytest.mark.parametrize("both", [[], ["--warm-up", "--output", "k.json"]])
def test_a_file_or_nothing_to_measure(both):
    with pytest.raises(ValueError, match="one of --output FILE and --warm-up is needed"):
        bench.main(["--quick", *both])


def test_a_compilation_serves_the_calls_with_and_without_graph(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # the default takes a minute
    problem = bench.Problem(BY_OP["dropout_add_layer_norm"], kernel_cases.Setting.of(CPU))
    variant = bench.Variant("compile", "compile")
    forward = problem.forward(variant)
    assert forward is problem.forward(replace(variant, name="compile+graph", graph=True))
    assert bench._measure(problem, variant, 2).warm.median_ms > 0


def test_an_unknown_op_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no such op mpl; known: mlp_block, score_mse, "):
        bench.main(["--quick", "--ops", "mlp_block,mpl", "--output", str(tmp_path / "k.json")])


def results(case, **change):
    run = bench.Run([replace(case, **change)], bench.QUICK, CPU)
    return run, {result.variant: result for result in run.results(["eager"])}


def test_a_right_kernel_gets_a_time_and_a_ratio(pretend_gpu):
    case = BY_OP["mlp"]
    pretend_gpu("mlp", eager.mlp)
    run, rows = results(case)
    assert rows["triton"].warm.median_ms > 0 and rows["triton"].error <= 1 and not run.failed
    ratio = rows["eager"].warm.median_ms / rows["triton"].warm.median_ms
    assert run.ratios() == {"mlp": {"eager / triton": pytest.approx(ratio, abs=1e-3)}}
    reached = {(target["case"], target["variant"]): target["met"] for target in run.targets()}
    assert reached["mlp", "triton"] is (ratio >= 1) and reached["mlp", "triton+graph"] is None


def wrong_value(*args):
    return eager.mlp(*args) * 1.001


def wrong_gradient(x, *args):
    return eager.mlp(x.detach() * 2 - x, *args) + 0 * x  # the value is right, the gradient's sign is not


def not_finite(*args):
    return eager.mlp(*args) + float("nan")


@pytest.mark.parametrize("function", [wrong_value, wrong_gradient, not_finite])
def test_a_wrong_kernel_gets_no_time_and_a_reason(pretend_gpu, function):
    pretend_gpu("mlp", function)
    run, rows = results(BY_OP["mlp"])
    assert rows["triton"].warm is None and rows["triton"].error > 1
    assert rows["triton"].reason.startswith("wrong: error ")
    assert run.failed and run.ratios() == {}
    assert "wrong: error" in run.line(rows["triton"])
    assert rows["eager"].warm.median_ms > 0


def test_a_kernel_that_raises_is_recorded_and_the_others_go_on(pretend_gpu):
    def broken(*args):
        raise RuntimeError("out of shared memory\nlong story")

    pretend_gpu("mlp", broken)
    run, rows = results(BY_OP["mlp"])
    assert rows["triton"].reason == "RuntimeError: out of shared memory" and run.failed
    assert rows["eager"].warm and json.dumps(run.record())


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("op", ["score_mse", "soft_cross_entropy"])
def test_the_fused_kernels_pass_in_the_interpreter(pretend_gpu, op):
    problem = bench.Problem(BY_OP[op], kernel_cases.Setting.of(CPU))
    assert problem.error(problem.forward(bench.Variant("triton", "triton"))) <= 1


def test_sums_need_all_six_layers(pretend_gpu):
    layers = [case for case in CASES if case.op == "mlp_block" and not case.parent_slices]
    pretend_gpu("mlp_block", lambda *args: eager.mlp_block(*args) * (1 if args[-3] > 8 else 2))  # layer 6 is wrong
    run = bench.Run(layers, bench.QUICK, CPU)
    sums = {row.variant: row for row in run.results(["eager"]) if row.case == bench.SIX_LAYERS}
    assert sums["triton"].reason.startswith("wrong") and sums["triton"].warm is None
    assert sums["eager"].warm.median_ms > 0
    assert run.roofline_ms(bench.SIX_LAYERS) == pytest.approx(sum(run.roofline_ms(case.name) for case in layers))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rivals_compute_the_op_itself(case, monkeypatch):
    monkeypatch.setattr(kernel_cases, "DROPOUT", 0.0)
    problem = bench.Problem(case, kernel_cases.Setting.of(CPU))
    for name, op in (case.rivals | case.compiled_rivals).items():
        if name == "flex":  # has no backward on a CPU
            tensors = [tensor.detach() for tensor in problem.tensors]
            torch.testing.assert_close(case.forward(op, tensors), problem.plain[0], rtol=1e-5, atol=0)
        else:
            assert problem.error(lambda tensors, op=op: case.forward(op, tensors)) <= 1, name


def test_rivals_drop_as_much_as_they_should():
    torch.manual_seed(0)
    x, dropout = torch.ones(100, 100), Dropout(0.1, 1, 2)
    dropped = rivals.dropout(x, dropout)
    assert (dropped == 0).float().mean() == pytest.approx(0.1, abs=0.02)
    normed = rivals.dropout_add_layer_norm(x, torch.zeros_like(x), x[0], x[0], 1e-5, dropout)
    assert not torch.equal(normed, rivals.dropout_add_layer_norm(x, torch.zeros_like(x), x[0], x[0], 1e-5, dropout))
    heads = torch.ones(1, 1, 100, 100)
    assert rivals.attention(heads, heads, heads, x[:1], dropout).var() > 0


def test_the_published_shapes_are_the_published_ones():
    cases = {case.name: case for case in kernel_cases.all_cases(kernel_cases.Sizes())}
    assert cases["mlp_block layer 1"].shape.startswith("8192x540, 4 stacked, inner 270, tanh(")
    assert [cases[f"mlp_block layer {n}"].shape.split(", ")[2] for n in range(1, 7)] == [
        f"inner {inner}" for inner in (270, 540, 270, 270, 270, 180)
    ]
    assert cases["score_mse L=512"].shape == "16x12x512x45, teacher 64"
    assert cases["mlp_block layer 2"].cost(2).total.flops == 2 * 12 * 8192 * 540 * 540


def test_the_ceilings_of_this_machine_are_measured():
    reached = measure.ceilings(measure.device_to_measure(), 64)
    assert reached.bytes_per_second > 0 and min(reached.flops_per_second.values()) > 0
    assert {"matmul bf16 TFLOP/s", "matmul fp32 TFLOP/s", "copy GB/s"} <= measure.described(reached).keys()
    assert reached.seconds(Cost(int(reached.bytes_per_second), 0), "fp32") == pytest.approx(1, rel=1e-6)


def test_percent_of_roofline_is_of_the_cold_time():
    case = BY_OP["dropout"]
    run = bench.Run([case], bench.QUICK, CPU)
    warm, cold = (measure.Spread(median, median, median) for median in (1.0, 2.0))
    roofline = case.cost(4).total.bytes / 1e9 * 1e3
    assert run.percent_of_roofline(bench.Result("dropout", "triton", warm, cold)) == pytest.approx(50 * roofline)
    assert run.percent_of_roofline(bench.Result("dropout", "triton", warm)) == pytest.approx(100 * roofline)
    assert run.percent_of_roofline(bench.Result("dropout", "triton", reason="x")) is None


def test_targets_are_met_or_missed():
    case = next(case for case in CASES if case.op == "projected_mse")
    run = bench.Run([case], bench.QUICK, CPU)
    times = {"eager+graph": 2.0, "bf16+graph": 1.0, "triton+graph": 1.0}
    for variant, time in times.items():
        run.rows.append(bench.Result(case.name, variant, measure.Spread(time, time, time)))
    met = {(target["rival"], target["ratio"]): target["met"] for target in run.targets()}
    assert met["eager+graph", 1.8] is True and met["bf16+graph", 1.1] is False and met["eager", 1.0] is None
    assert "bf16+graph / triton+graph (warm) at least 1.1: 1.00 MISSED" in run.summary()


@GPU
def test_everything_is_measured_on_a_gpu(tmp_path):
    assert bench.main(["--quick", "--passes", "eager", "--output", str(tmp_path / "k.json")]) == 0
    record = json.loads((tmp_path / "k.json").read_text())
    assert record["dtype"] == "bfloat16" and record["driver"]
    for row in record["rows"]:
        if row["variant"].startswith("triton"):
            assert row["reason"] is None and row["warm"]["median_ms"] > 0 and row["cold"]["median_ms"] > 0
            assert row["error"] <= 1
        if row["variant"] == "triton" and row["case"] != bench.SIX_LAYERS:
            assert row["launches"] >= 1 and row["kernels_ms"] > 0 and row["extra_bytes"] > 0
    compared = itertools.chain.from_iterable(record["ratios"].values())
    assert {"eager / triton", "eager+graph / triton+graph"} <= set(compared)


VARIANTS = [
    bench.Variant("eager", "rival"),
    pytest.param(bench.Variant("compile", "compile"), marks=GPU),
    pytest.param(bench.Variant("triton", "triton"), marks=GPU),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
@pytest.mark.parametrize("number", range(len(CASES)), ids=[case.name for case in CASES])
def test_benchmark(benchmark, number, variant):
    """For pytest-benchmark's own statistics (--benchmark-only): published shapes on a GPU, tiny ones on a CPU."""
    device = measure.device_to_measure()
    sizes = kernel_cases.Sizes() if device.type == "cuda" else bench.QUICK
    problem = bench.Problem(kernel_cases.all_cases(sizes)[number], kernel_cases.Setting.of(device))
    call = problem.call(problem.forward(variant))

    def run():
        call()
        measure.synchronize(device)

    run()
    benchmark(run)
