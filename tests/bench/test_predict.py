"""The prediction counts kernels, bytes and FLOPs as they are, alike for PyTorch's ops and ours."""

import json

import pytest
import torch

from effbert import kernels
from effbert.bench import predict
from effbert.bench.costs import Cost
from effbert.bench.hardware import GPUS
from effbert.bench.kernel_cases import QUICK, Sizes, all_cases
from effbert.bench.kernels import SIX_LAYERS

LAUNCH_COST = predict.launch_cost
BF16 = predict._MetaSetting(torch.device("meta"), torch.bfloat16, None)
H200 = next(gpu for gpu in GPUS if gpu.name == "H200")


def test_pytorch_kernels_are_counted_and_views_are_not():
    x, w, b = (torch.empty(*shape, dtype=torch.bfloat16, device="meta") for shape in ((8, 4), (6, 4), (6,)))
    counted = predict.eager_costs(lambda: torch.nn.functional.linear(x, w, b).t()[:2].view(2, 8).detach() + 1)
    assert counted == [Cost(2 * (8 * 4 + 6 * 4 + 6 + 8 * 6), 2 * 8 * 4 * 6), Cost(2 * (2 * 8 + 2 * 8), 0)]


def test_a_broadcast_tensor_counts_what_there_is_of_it():
    row = torch.empty(1, 4, device="meta").expand(100, 4)
    assert predict.eager_costs(lambda: row * 2) == [Cost(4 * (4 + 400), 0)]


def test_our_launches_count_what_they_read_and_multiply():
    (mlp,) = (case for case in all_cases(QUICK) if case.name == "mlp")
    rows = {row.variant: row for row in predict.predictions([mlp], H200, predict.Assumptions()) if row.case == "mlp"}
    tokens, hidden = QUICK.rows, QUICK.hidden
    inner = int(mlp.shape.split("inner ")[1].split(",")[0])
    assert rows["triton"].flops == rows["eager"].flops == 3 * 2 * 2 * tokens * hidden * inner
    assert rows["triton"].kernels < rows["eager"].kernels
    assert rows["triton"].roofline_us == rows["eager"].roofline_us < rows["triton"].microseconds


def test_a_block_of_whole_rows_counts_every_tensor_once_and_all_products(monkeypatch):
    """By hand for one block of 8192 rows of 540, inner width 270, in bf16: padded to 544 and 288 between kernels."""
    (block,) = (case for case in all_cases(Sizes()) if case.name == "mlp_block layer 3")
    found = []
    monkeypatch.setattr(predict, "launch_cost", lambda launch: found.append(launch) or LAUNCH_COST(launch))
    costs = predict.fused_costs(predict._call(block, BF16, kernels.mlp_block), H200)
    by_name = dict(zip((launch.name for launch in found), costs, strict=True))
    rows, x, y, h = 8192, 2 * 8192 * 540, 2 * 8192 * 544, 2 * 8192 * 288
    weight1, weight2, vector, statistics = 2 * 270 * 544, 2 * 540 * 288, 2 * 540, 8 * rows
    product = 2 * rows * 540 * 270
    forward = 2 * x + y + 2 * h + weight1 + weight2 + 3 * vector + 2 * 270 + statistics
    assert by_name["row_block_fwd_kernel"] == Cost(forward, 2 * product)
    partials = 4 * 2 * 128 * 540
    backward = 3 * x + 2 * y + 3 * h + weight1 + weight2 + vector + statistics + partials
    assert by_name["row_block_bwd_kernel"] == Cost(backward, 2 * product)
    sums = 5 * 4 * (2 * 540 * 270 + 540 + 270)
    assert by_name["linear_gradients_kernel"] == Cost(x + y + 2 * h + sums, 2 * product)
    assert sum(cost.flops for cost in costs) == 6 * product


def test_time_is_the_longer_of_bytes_and_flops_and_a_start():
    costs = [Cost(4_800_000, 0), Cost(0, 989_400_000)]
    time = predict.seconds(costs, H200, predict.Assumptions(bandwidth=0.5, products=0.1, start_us=3.0))
    assert time == pytest.approx(2e-6 + 10e-6 + 2 * 3e-6)


def test_every_op_is_predicted_and_the_six_layers_are_summed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "Sizes", lambda: QUICK)
    output = tmp_path / "deep" / "predicted.json"
    assert predict.main(["--gpu", "B200", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["gpu"] == "B200" and result["assumptions"]["bandwidth"] == 0.75
    rows = {(row["case"], row["variant"]): row for row in result["rows"]}
    assert {case.name for case in all_cases(QUICK)} < {case for case, _ in rows}
    layers = [f"mlp_block layer {number}" for number in range(1, 7)]
    for variant in ("triton", "eager"):
        total = sum(rows[layer, variant]["microseconds"] for layer in layers)
        assert rows[SIX_LAYERS, variant]["microseconds"] == pytest.approx(total)
    shown = capsys.readouterr().out
    assert "Predicted, not measured: B200" in shown and "2.3" in shown


def test_an_unknown_gpu_is_named():
    with pytest.raises(ValueError, match="--gpu H300: no such data sheet; known: A100, H200"):
        predict.main(["--gpu", "H300"])


def test_without_triton_it_is_one_line(monkeypatch):
    monkeypatch.setattr(predict, "why_not_triton", lambda device: "triton is not installed: pip install it")
    with pytest.raises(
        ValueError, match=r"^bench predict counts what the fused kernels launch: triton is not installed"
    ):
        predict.main(["--gpu", "H200"])
