"""Dropout, and LayerNorm(residual + Dropout(x)): values and gradients against eager, and what lies at the edges."""

import json
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert.kernels import Dropout, eager, launch, norm, philox
from effbert.kernels.reduction import reduce_partials

EPS = 1e-5
NAMES = ("out", "dx", "dresidual", "dweight", "dbias")


def inputs(rows, width, dtype, device="cpu", scale=1.0):
    """x, residual, weight, bias and an incoming gradient."""
    rows = rows if isinstance(rows, tuple) else (rows,)
    shapes = ((*rows, width), (*rows, width), (width,), (width,), (*rows, width))
    return [(torch.randn(shape, device=device) * scale).to(dtype) for shape in shapes]


def results(module, tensors, dropout=None, eps=EPS, dtype=None):
    """The output and all gradients."""
    *tensors, grad = [t if dtype is None else t.to(dtype) for t in tensors]
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = module.dropout_add_layer_norm(*leaves, eps, dropout)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def check(check_error, tensors, dropout=None, eps=EPS):
    ours = results(norm, tensors, dropout, eps)
    plain = results(eager, tensors, dropout, eps)
    exact = results(eager, tensors, dropout, eps, torch.float64)
    for name, one, other, truth in zip(NAMES, ours, plain, exact, strict=True):
        assert one.dtype == other.dtype, name
        check_error(one, other, truth, what=name)
    return ours


def drop(p, device=None):
    """Dropout with an int key, or, given a device, with its key in a tensor there."""
    key = 0x1234567890ABCDEF >> 1
    return Dropout(p, key if device is None else torch.tensor(key, device=device), 5)


@pytest.mark.parametrize("width, p", [(1, 0.0), (7, 0.1), (60, 0.5), (90, 0.0), (135, 0.1)])
def test_output_and_gradients_agree_with_eager(width, p, dtype, device, check_error):
    torch.manual_seed(width)
    check(check_error, inputs(19, width, dtype, device), drop(p, device if p == 0.5 else None))


def test_published_width(device, check_error):
    torch.manual_seed(0)
    check(check_error, inputs((1, 3), 540, torch.float32, device), drop(0.1), eps=1e-12)


@settings(deadline=None, max_examples=12)
@given(st.integers(1, 20), st.integers(2, 200), st.sampled_from([0.0, 0.3]), st.integers(0, 2**62))
def test_any_shape(rows, width, p, key):
    torch.manual_seed(rows + width)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = inputs(rows, width, torch.float32, device)
    tensors[1] += torch.linspace(-8, 8, width, device=device)  # two nearly equal columns amplify rounding
    dropout = Dropout(p, key, 2)
    exact = results(eager, tensors, dropout, 1e-5, torch.float64)
    for name, ours, truth in zip(NAMES, results(norm, tensors, dropout, 1e-5), exact, strict=True):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=1e-4, msg=name)


def test_row_after_row_as_gpus_do_it(device, check_error, monkeypatch, tmp_path):
    tile = {"ROWS": 1, "PROGRAMS": 2, "num_warps": 1}
    rules = [{"kernel": kernel, "tile": tile} for kernel in ("norm_fwd", "norm_bwd")]
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"rules": rules}))
    monkeypatch.setenv("EFFBERT_TILES", str(path))
    torch.manual_seed(3)
    check(check_error, inputs(5, 27, torch.float32, device), drop(0.25))


@pytest.mark.parametrize("rows", [(0,), (2, 0), (1,)])
def test_no_rows_and_one_row(rows, device):
    tensors = inputs(rows, 12, torch.float32, device)
    for ours, plain in zip(results(norm, tensors), results(eager, tensors), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_constant_and_large_rows(dtype, device, check_error):
    torch.manual_seed(4)
    tensors = inputs(4, 24, dtype, device)
    for tensor in tensors[:2]:
        tensor[0] = 1.0  # variance 0
        tensor[1] *= 4096.0  # its squares overflow fp16
    check(check_error, tensors)


def test_nan_stays_in_its_row_and_reaches_the_weights(device):
    tensors = inputs(10, 20, torch.float32, device)
    tensors[0][3, 5] = float("nan")
    out, dx, dresidual, dweight, dbias = results(norm, tensors, drop(0.5))
    for tensor in (out, dx, dresidual):
        assert tensor.isnan().any(dim=1).nonzero().tolist() == [[3]]
        assert tensor[3].isnan().all()
    assert dweight.isnan().all()
    assert torch.isfinite(dbias).all()


def test_dropped_nan_and_infinity_are_not_hidden(device):
    x = torch.full((1, 16), float("inf"), device=device)
    ours = norm.dropout(x, drop(0.5))
    assert torch.equal(ours.isnan(), eager.dropout(x, drop(0.5)).isnan())
    assert ours.isnan().any()


def test_mixed_types(device):
    torch.manual_seed(5)
    x, residual, weight, bias, grad = inputs(9, 30, torch.float32, device)
    ours = results(norm, [x.half(), residual, weight, bias, grad], drop(0.1))
    exact = results(eager, [x.half(), residual, weight, bias, grad], drop(0.1), dtype=torch.float64)
    assert [t.dtype for t in ours] == [torch.float32, torch.float16, *[torch.float32] * 3]
    for one, truth, tolerance in zip(ours, exact, (1e-5, 2e-3, 1e-5, 1e-5, 1e-5), strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=tolerance, atol=tolerance)


def test_autocast_decides_the_type_of_the_result(device):
    x, residual, weight, bias, _ = inputs(2, 8, torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        assert norm.dropout_add_layer_norm(x.bfloat16(), residual, weight, bias, EPS).dtype == torch.bfloat16


def test_slices_transposes_and_expanded_gradients(device):
    torch.manual_seed(6)
    base = torch.randn(4, 3, 40, device=device)
    views = [base.transpose(0, 1)[:, :, 3:23], base[:3, :, 10:30].mT.contiguous().mT.expand(4, 3, 3, 20)[0][:, :3]]
    x, residual = views[0], views[1].repeat(1, 2, 1)[:, 1:5]
    weight, bias = torch.randn(2, 20, device=device)
    grads = {}
    for module in (norm, eager):
        leaves = [t.detach().requires_grad_() for t in (x, residual, weight, bias)]
        out = module.dropout_add_layer_norm(*leaves, EPS, drop(0.2))
        (out[..., :7].sum() + out.sum(dim=-1).square().sum()).backward()
        grads[module] = [out, *(leaf.grad for leaf in leaves)]
    for ours, plain in zip(grads[norm], grads[eager], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@triton.jit
def gated(v, x, inside):
    return v * x + x + 1.0


@triton.jit
def gated_grad(v, x, inside, g):
    return g * x, g * (v + 1.0)


@triton.jit
def shifted_square(v, x, inside):
    return v * v + 2.0


@triton.jit
def shifted_square_grad(v, x, inside, g):
    return 2.0 * g * v, tl.zeros_like(g)


SLOTS = {
    "gated": (SimpleNamespace(forward=gated, backward=gated_grad, uses_x=True), lambda v, x: v * x + x + 1),
    "square": (
        SimpleNamespace(forward=shifted_square, backward=shifted_square_grad, uses_x=False),
        lambda v, x: v * v + 2,
    ),
}


@pytest.mark.parametrize("slot", SLOTS)
def test_last_stage_of_an_mlp(slot, device, dtype, check_error):
    """A slot between y and dropout, y in rows with padding of unknown content."""
    torch.manual_seed(7)
    function, formula = SLOTS[slot]
    dropout = drop(0.3)
    y, residual, weight, bias, grad = inputs(11, 45, dtype, device)
    padded = torch.full((11, 64), float("nan"), dtype=dtype, device=device)
    padded[:, :45] = y
    args = philox.split(dropout)
    out, mean, rstd = norm.norm_forward(padded, residual, weight, bias, EPS, *args, dtype, function)
    dy, dresidual, partials = norm.norm_backward(grad, padded, residual, weight, mean, rstd, *args, function)
    ours = [out, dy[:, :45], dresidual, torch.empty_like(weight), torch.empty_like(bias)]
    reduce_partials(partials, ours[3:], accumulate=False)
    assert torch.equal(dy[:, 45:], torch.zeros_like(dy[:, 45:]))

    def reference(dtype):
        y64, x64, *others = [t.detach().to(dtype).requires_grad_() for t in (y, residual, weight, bias)]
        out = eager.dropout_add_layer_norm(formula(y64, x64), x64, *others, EPS, dropout)
        out.backward(grad.to(dtype))
        return [out.detach(), *(t.grad for t in (y64, x64, *others))]

    for name, one, plain, truth in zip(NAMES, ours, reference(dtype), reference(torch.float64), strict=True):
        check_error(one, plain, truth, what=name)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_is_that_of_philox(p, dtype, device):
    torch.manual_seed(8)
    x = torch.randn(3, 3, 38, device=device).to(dtype)[..., 1:].requires_grad_()
    for dropout in (drop(p), drop(p, device)):
        keep = philox.keep_mask(x.shape, dropout, device)
        out = norm.dropout(x, dropout)
        scale = 65536 / (65536 - philox.threshold(p))
        assert torch.equal(out, (x.float() * (keep * torch.tensor(scale, device=device))).to(dtype))
        grad = torch.randn_like(out)
        (dx,) = torch.autograd.grad(out, x, grad)
        assert torch.equal(dx, norm.dropout(grad, dropout))


def test_no_dropout_is_the_input_itself():
    x = torch.randn(2, 3)
    assert norm.dropout(x, None) is x
    assert norm.dropout(x, Dropout(0.0, 1, 2)) is x


def test_two_runs_give_the_same_bits(device):
    tensors = inputs(40, 50, torch.float32, device)
    for first, second in zip(results(norm, tensors, drop(0.1)), results(norm, tensors, drop(0.1)), strict=True):
        assert torch.equal(first, second)


def test_opcheck(device):
    x, residual, weight, bias, _ = inputs((2, 2), 9, torch.float32, device)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    key = torch.tensor(3, device=device)
    dropout_arguments = (x, 0.2, 0, key, 1, True)
    torch.library.opcheck(torch.ops.effbert.dropout.default, dropout_arguments)
    arguments = (*leaves, EPS, 0.2, 7, None, 1, torch.float32, True)
    torch.library.opcheck(torch.ops.effbert.dropout_add_layer_norm.default, arguments)


def test_compiled_as_one_graph(device):
    tensors = inputs(3, 10, torch.float32, device)

    def call(x, residual, weight, bias):
        return norm.dropout(norm.dropout_add_layer_norm(x, residual, weight, bias, EPS, Dropout(0.1, 5, 6)), drop(0.2))

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    outcomes = []
    for function in (call, compiled):
        leaves = [t.clone().requires_grad_() for t in tensors[:4]]
        out = function(*leaves)
        out.backward(tensors[4])
        outcomes.append([out, *(leaf.grad for leaf in leaves)])
    for direct, graph in zip(*outcomes, strict=True):
        assert torch.equal(direct, graph)


def test_a_second_derivative_is_refused(device):
    tensors = [t.requires_grad_() for t in inputs(2, 8, torch.float32, device)[:4]]
    out = norm.dropout_add_layer_norm(*tensors, EPS)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(out.sum(), tensors[0], create_graph=True)


def test_too_many_columns_are_refused():
    x, residual, weight, bias, _ = inputs(1, norm.MAX_COLUMNS + 1, torch.float32)
    with pytest.raises(ValueError, match=f"at most {norm.MAX_COLUMNS}"):
        norm.dropout_add_layer_norm(x, residual, weight, bias, EPS)


@pytest.mark.parametrize("cols", [1, 15, 16, 17, 135, 360, 512, 540, 768, 769, 1000, 8192])
def test_a_row_is_covered_with_less_than_a_third_wasted(cols):
    head, tail = norm.pieces(cols)
    assert head + tail >= cols
    assert tail < head and all(piece & (piece - 1) == 0 for piece in (head, tail))
    assert head + tail <= 32 or 3 * (head + tail - cols) < head + tail


def test_three_launches_forward_and_backward():
    tensors = [t.to("meta").requires_grad_() for t in inputs(64, 540, torch.bfloat16)[:4]]
    with launch.recording("sm_90") as launches:
        norm.dropout_add_layer_norm(*tensors, EPS, drop(0.1)).backward(tensors[0].detach())
    assert [one.name for one in launches] == [
        "dropout_add_layer_norm_fwd_kernel",
        "dropout_add_layer_norm_bwd_kernel",
        "reduce_partials_kernel",
    ]


@pytest.mark.parametrize("form", ["strided", "expanded"])
def test_weight_and_bias_need_not_be_dense(device, form):
    tensors = list(inputs(9, 20, torch.float32, device))[:4]
    for place, tensor in enumerate(tensors):
        if tensor.dim() == 1 and form == "strided":
            tensors[place] = torch.stack([tensor, tensor + 5], 1)[:, 0]
        elif tensor.dim() == 1:
            tensors[place] = tensor[2:3].expand(len(tensor))
    found = []
    for module in (norm, eager):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = module.dropout_add_layer_norm(*leaves, EPS, drop(0.2))
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for ours, plain in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
