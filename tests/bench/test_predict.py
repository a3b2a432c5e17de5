"""The prediction counts kernels, bytes and FLOPs as they are, alike for PyTorch's ops and ours."""

import json

import pytest
import torch

from effbert.bench import predict
from effbert.bench.costs import Cost
from effbert.bench.hardware import GPUS
from effbert.bench.kernel_cases import QUICK, all_cases
from effbert.bench.kernels import SIX_LAYERS

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
