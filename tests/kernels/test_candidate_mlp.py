"""Candidate MLPs through the fused kernels against plain PyTorch: outputs and every gradient, alone and as a block."""

import contextlib
import json
import threading

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.library import opcheck

from effbert.architecture import PUBLISHED, Architecture
from effbert.kernels import candidate_mlp as fused
from effbert.kernels import eager, gradients_in_place, tiles
from effbert.kernels.expression import STRUCTURES, Expression
from effbert.kernels.launch import recording
from effbert.kernels.philox import Dropout
from effbert.search.space import random_expression

NAMES = ("x", "weight1", "bias1", "weight2", "bias2", "norm_weight", "norm_bias")
PUBLISHED_LAYERS = [str(layer) for layer in Architecture.parse(PUBLISHED).layers]
FIRST = "linear1_2(gelu(linear1_2(x,wb1)),wb2)"


def drawn(count, seed=0):
    rng = np.random.default_rng(seed)
    return [str(random_expression(STRUCTURES[rng.integers(16)], rng)) for _ in range(count)]


def operands(rows, channels, intermediate, device, dtype, seed=0, scale=1.0):
    """x, W1, b1, W2, b2, norm weight, norm bias, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, by):
        return (torch.randn(*shape, generator=generator) * by).to(device, dtype)

    return [
        normal(rows, channels, by=scale),
        normal(intermediate, channels, by=channels**-0.5),
        normal(intermediate, by=0.1),
        normal(channels, intermediate, by=intermediate**-0.5),
        normal(channels, by=0.1),
        normal(channels, by=0.3) + 1,
        normal(channels, by=0.3),
    ]


def run(function, tensors, *constants):
    """Output and the gradients of all tensors, for a fixed gradient of the output."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves, *constants)
    gradient = torch.linspace(-1, 1, output.numel(), device=output.device).view(output.shape)
    output.backward(gradient.to(output.dtype))
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def compare(name, tensors, constants, check_error, floor=None):
    plain_function, ours_function = getattr(eager, name), getattr(fused, name)
    exact = run(plain_function, [tensor.double() for tensor in tensors], *constants)
    plain = run(plain_function, tensors, *constants)
    ours = run(ours_function, tensors, *constants)
    for what, mine, theirs, right in zip(("output", *NAMES), ours, plain, exact, strict=False):
        assert mine.dtype == theirs.dtype
        check_error(mine, theirs, right, floor, f"{name} {what} of {constants[0]}")


@pytest.mark.parametrize("text", [*PUBLISHED_LAYERS, *drawn(12)])
def test_mlp_equals_plain_pytorch(text, device, dtype, check_error):
    width = Expression.parse(text).structure.inner_width(24)
    tensors = operands(20, 24, 24, device, dtype)[:5]
    compare("mlp", tensors, (Expression.parse(text), width), check_error)


@pytest.mark.parametrize(
    "rows, channels, intermediate, width", [(1, 1, 1, 1), (3, 90, 90, 22), (40, 36, 36, 36), (2, 7, 9, 3)]
)
def test_mlp_takes_any_size(rows, channels, intermediate, width, device, dtype, check_error):
    text = "swish(linear1_1(mul(linear1_1(relu(x),wb1),x),wb2))"
    tensors = operands(rows, channels, intermediate, device, dtype)[:5]
    compare("mlp", tensors, (Expression.parse(text), width), check_error)


def test_mlp_of_no_rows_gives_zero_gradients(device):
    tensors = operands(0, 12, 12, device, torch.float32)[:5]
    output, *gradients = run(fused.mlp, tensors, Expression.parse(FIRST), 6)
    assert output.shape == (0, 12)
    assert all(not gradient.any() for gradient in gradients)


@pytest.mark.parametrize("combine", ["pad", "pad_released"])
@pytest.mark.parametrize("op", ["add", "mul", "max"])
def test_padding_fills_up_the_narrower_side(combine, op, device, dtype, check_error):
    expression = Expression.parse(f"linear1_1(gelu({op}(linear1_1(x,wb1),tanh(x))),wb2)")
    tensors = operands(9, 12, 20, device, dtype)[:5]
    compare("mlp", tensors, (expression, 20, combine), check_error)


def test_leading_dimensions_and_strides_do_not_matter(device):
    tensors = operands(24, 20, 20, device, torch.float32)[:5]
    expression = Expression.parse(FIRST)
    flat = run(fused.mlp, tensors, expression, 10)
    wide = torch.randn(2, 12, 31, device=device)
    wide[..., 3:23] = tensors[0].view(2, 12, 20)
    view = wide[..., 3:23].detach().requires_grad_()
    output = fused.mlp(view, *tensors[1:], expression, 10)
    assert torch.equal(output.view(24, 20), flat[0])
    transposed = tensors[0].view(2, 12, 20).transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(fused.mlp(transposed, *tensors[1:], expression, 10), output)


def test_gradients_go_straight_into_the_slice_of_the_parent(device):
    tensors = operands(24, 20, 20, device, torch.float32)[:5]
    expression = Expression.parse(FIRST)
    expected = run(fused.mlp, tensors, expression, 10)[1:]
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    for leaf in leaves[1:]:
        leaf.grad = torch.full_like(leaf, 3.0)
    before = [leaf.grad for leaf in leaves[1:]]
    with gradients_in_place():
        output = fused.mlp(*leaves, expression, 10)
    output.backward(torch.linspace(-1, 1, output.numel(), device=device).view(output.shape))
    assert torch.equal(leaves[0].grad, expected[0])
    for leaf, old, gradient in zip(leaves[1:], before, expected[1:], strict=True):
        assert leaf.grad is old
        torch.testing.assert_close(leaf.grad, gradient + 3)
    assert (leaves[1].grad[10:] == 3).all() and (leaves[3].grad[:, 10:] == 3).all()


def test_in_place_gradients_also_start_from_nothing(device):
    tensors = operands(24, 20, 20, device, torch.float32)[:5]
    expected = run(fused.mlp, tensors, Expression.parse(FIRST), 10)
    with gradients_in_place():
        got = run(fused.mlp, tensors, Expression.parse(FIRST), 10)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_two_runs_give_the_same_bits(device, dtype):
    tensors = operands(70, 20, 20, device, dtype)[:5]
    first, second = (run(fused.mlp, tensors, Expression.parse(PUBLISHED_LAYERS[3]), 10) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_not_a_number_shows(device):
    tensors = operands(40, 20, 20, device, torch.float32)[:5]
    tensors[0][7, 3] = float("nan")
    output = fused.mlp(*tensors, Expression.parse("linear1_1(relu(linear1_1(x,wb1)),wb2)"), 20)
    assert output[7].isnan().all() and not output[:7].isnan().any() and not output[8:].isnan().any()


@pytest.mark.parametrize("text", [FIRST, "tanh(linear1_2(mul(linear1_2(elu(x),wb1),x),wb2))"])
def test_mlp_passes_opcheck_and_compiles_whole(text, device):
    tensors = [tensor.requires_grad_() for tensor in operands(8, 12, 12, device, torch.float32)[:5]]
    opcheck(torch.ops.effbert.mlp.default, (*tensors, text, 6, "truncate", torch.float32, True))
    expression = Expression.parse(text)
    compiled = torch.compile(lambda *args: fused.mlp(*args, expression, 6), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(run(compiled, tensors), run(fused.mlp, tensors, expression, 6), strict=True):
        assert torch.equal(mine, theirs)


ROWS = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 16, "ELEMENTS": 128, "num_warps": 4, "num_stages": 1}
PATHS = {"separate": {}, "rows": ROWS}


@pytest.fixture(params=PATHS)
def path(request, tmp_path, monkeypatch):
    """Sends every block to separate kernels, or to those that take whole rows."""
    rules = [{"kernel": kernel, "tile": PATHS[request.param]} for kernel in ("row_block_fwd", "row_block_bwd")]
    file = tmp_path / "path.json"
    file.write_text(json.dumps({"rules": rules}))
    monkeypatch.setenv("EFFBERT_TILES", str(file))
    monkeypatch.setattr(tiles, "FILLED", 0.0)
    return request.param


def names_of_launches(dtype=torch.float32, rows=4, channels=8, width=4, text=FIRST):
    tensors = [t.to("meta").requires_grad_() for t in operands(rows, channels, channels, "cpu", dtype)]
    with recording("sm_90") as launches:
        fused.mlp_block(*tensors, Expression.parse(text), width, 1e-5).sum().backward()
    return [launch.name for launch in launches]


SEPARATE = [
    "linear_fwd_kernel", "linear_fwd_kernel", "dropout_add_layer_norm_fwd_kernel",
    "dropout_add_layer_norm_bwd_kernel", "linear_dgrad_kernel", "linear_gradients_kernel", "reduce_partials_kernel",
]  # fmt: skip
TOGETHER = [
    "row_block_fwd_kernel", "row_block_bwd_kernel", "linear_gradients_kernel", "reduce_partials_kernel",
]  # fmt: skip


def test_both_paths_are_what_they_are_called(path):
    assert names_of_launches() == (TOGETHER if path == "rows" else SEPARATE)


def test_many_rows_go_together_and_few_do_not():
    sizes = dict(dtype=torch.bfloat16, channels=544, width=272)
    assert names_of_launches(rows=8192, **sizes) == TOGETHER
    assert names_of_launches(rows=4096, **sizes) == SEPARATE


@pytest.mark.parametrize("text", [PUBLISHED_LAYERS[0], PUBLISHED_LAYERS[3], *drawn(4, seed=1)])
@pytest.mark.parametrize("dropout", [None, Dropout(0.2, 2**60 + 77, 3)])
def test_mlp_block_equals_plain_pytorch(text, dropout, path, device, dtype, check_error):
    expression = Expression.parse(text)
    width = expression.structure.inner_width(24)
    compare("mlp_block", operands(20, 24, 24, device, dtype), (expression, width, 1e-5, dropout), check_error)


def test_mlp_block_takes_its_key_from_a_tensor_too(path, device):
    tensors = operands(9, 12, 12, device, torch.float32)
    by_value, by_tensor = (
        fused.mlp_block(*tensors, Expression.parse(FIRST), 6, 1e-5, Dropout(0.5, key, 2))
        for key in (2**40 + 1, torch.tensor(2**40 + 1, device=device))
    )
    assert torch.equal(by_value, by_tensor)


def test_mlp_block_adds_gradients_in_place(path, device):
    tensors = operands(24, 20, 20, device, torch.float32)
    constants = (Expression.parse(FIRST), 10, 1e-5, Dropout(0.1, 5, 1))
    expected = run(fused.mlp_block, tensors, *constants)
    with gradients_in_place():
        got = run(fused.mlp_block, tensors, *constants)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected, strict=True))


@pytest.mark.parametrize("path", ["rows"], indirect=True)
def test_one_leaf_in_two_places_gets_both_gradients_from_autograd(path, device, monkeypatch):
    """In place, two programs would add to one `.grad` at once, which an interpreter that goes one by one hides."""
    x, weight1, _, weight2, _, norm_weight, _ = operands(6, 8, 8, device, torch.float32)
    asked = []
    backward = fused._mlp_block.backward
    monkeypatch.setattr(
        fused._mlp_block, "backward", lambda *args, **options: asked.append(options) or backward(*args, **options)
    )
    found = []
    for in_place in (False, True):
        leaf = torch.zeros(8, device=device, requires_grad=True)
        leaves = [tensor.clone().requires_grad_() for tensor in (weight1, weight2, norm_weight)]
        with gradients_in_place() if in_place else contextlib.nullcontext():
            block = fused.mlp_block(
                x, leaves[0], leaf, leaves[1], leaf, leaves[2], leaf, Expression.parse(FIRST), 8, 1e-5
            )
            block.square().sum().backward()
        found.append([leaf.grad, *(other.grad for other in leaves)])
    assert asked == [{}, {}]
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_mlp_block_passes_opcheck_and_compiles_whole(path, device):
    tensors = [tensor.requires_grad_() for tensor in operands(8, 12, 12, device, torch.float32)]
    text = PUBLISHED_LAYERS[3]
    arguments = (*tensors, text, 6, 1e-5, 0.1, 77, None, 4, "truncate", torch.float32, True)
    opcheck(torch.ops.effbert.mlp_block.default, arguments)
    constants = (Expression.parse(text), 6, 1e-5, Dropout(0.1, 77, 4))
    compiled = torch.compile(lambda *args: fused.mlp_block(*args, *constants), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(run(compiled, tensors), run(fused.mlp_block, tensors, *constants), strict=True):
        assert torch.equal(mine, theirs)


def test_autocast_computes_in_its_type_and_gives_gradients_in_the_parameters(path, device, check_error):
    tensors = operands(20, 24, 24, device, torch.float32)
    dtype = torch.float16 if device.type == "cpu" else torch.bfloat16
    constants = (Expression.parse(PUBLISHED_LAYERS[2]), 12, 1e-5)
    exact = run(eager.mlp_block, [tensor.double() for tensor in tensors], *constants)
    plain = run(eager.mlp_block, [tensor.to(dtype) for tensor in tensors], *constants)
    with torch.autocast(device.type, dtype):
        ours = run(fused.mlp_block, tensors, *constants)
    assert ours[0].dtype == dtype and all(gradient.dtype == torch.float32 for gradient in ours[1:])
    for what, mine, theirs, right in zip(("output", *NAMES), ours, plain, exact, strict=True):
        check_error(mine.to(dtype), theirs, right, what=what)


WHOLE = {"BLOCK_M": 16, "BLOCK_E": 16, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1}


@pytest.fixture
def whole_block(tmp_path, monkeypatch):
    """A file of tile rules that sends every block to the kernel that does it all."""
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps({"rules": [{"kernel": "mlp_block", "tile": WHOLE}]}))
    monkeypatch.setenv("EFFBERT_TILES", str(path))
    with recording("sm_90") as launches, torch.no_grad():
        fused.mlp_block(
            *(t.to("meta") for t in operands(4, 8, 8, "cpu", torch.float32)), Expression.parse(FIRST), 4, 1e-5
        )
    assert [launch.name for launch in launches] == ["mlp_block_fwd_kernel"]


@pytest.mark.parametrize("text", ["sigmoid(linear1_1(max(linear1_1(relu(x),wb1),x),wb2))", *drawn(2, seed=2)])
@pytest.mark.parametrize("dropout", [None, Dropout(0.2, 2**60 + 77, 3)])
def test_one_kernel_for_the_whole_block_equals_plain_pytorch(text, dropout, whole_block, device, dtype, check_error):
    expression = Expression.parse(text)
    width = expression.structure.inner_width(20)
    compare("mlp_block", operands(19, 20, 20, device, dtype), (expression, width, 1e-5, dropout), check_error)


def test_one_kernel_for_the_whole_block_takes_one_column_and_no_rows(whole_block, device, check_error):
    compare("mlp_block", operands(3, 1, 1, device, torch.float32), (Expression.parse(FIRST), 1, 1e-5), check_error)
    assert fused.mlp_block(*operands(0, 8, 8, device, torch.float32), Expression.parse(FIRST), 4, 1e-5).shape == (0, 8)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 40),
    channels=st.integers(4, 40),
    margin=st.integers(0, 3),
    parent=st.integers(0, 5),
    p=st.sampled_from([0.0, 0.25]),
    name=st.sampled_from(["mlp", "mlp_block"]),
)
def test_any_expression_width_and_stride(device, seed, rows, channels, margin, parent, p, name):
    """x and weights are views of wider tensors, so rows may begin anywhere; the weights are slices of a parent's.

    Sums may cancel to nearly nothing here, and what rounding leaves goes by their terms, which are of the order of 1.
    """
    rng = np.random.default_rng(seed)
    expression = random_expression(STRUCTURES[rng.integers(16)], rng)
    constants = [expression, expression.structure.inner_width(channels)]
    constants += [1e-5, Dropout(p, 5, 2)] if name == "mlp_block" else []
    count = 7 if name == "mlp_block" else 5
    wide = operands(rows, channels, channels + parent, device, torch.float32, seed % 1000)[:count]
    wide = [torch.nn.functional.pad(tensor, (margin, 3)) if tensor.dim() == 2 else tensor for tensor in wide]

    def of_views(function):
        def cut(tensor):
            return tensor[:, margin : tensor.shape[1] - 3] if tensor.dim() == 2 else tensor

        return lambda *leaves: function(*map(cut, leaves), *constants)

    plain, ours = of_views(getattr(eager, name)), of_views(getattr(fused, name))
    exact = run(plain, [tensor.double() for tensor in wide])
    for mine, theirs, right in zip(run(ours, wide), run(plain, wide), exact, strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        if right.numel():
            error, plain_error = ((found.double() - right).abs().max().item() for found in (mine, theirs))
            allowed = 2 * plain_error + 1e-4 * max(1.0, right.abs().max().item())
            assert error <= allowed, f"{name} of {expression}: {error:.1e}, plain {plain_error:.1e}"


@pytest.mark.parametrize("form", ["strided", "expanded"])
def test_vectors_need_not_be_dense(device, form):
    tensors = operands(24, 20, 20, device, torch.float32)
    for place, tensor in enumerate(tensors):
        if tensor.dim() == 1 and form == "strided":
            tensors[place] = torch.stack([tensor, tensor + 5], dim=1)[:, 0]
        elif tensor.dim() == 1:
            tensors[place] = tensor[3:4].expand(len(tensor))
    constants = Expression.parse(FIRST), 10, 1e-5, Dropout(0.1, 5, 2)
    results = []
    for function in (eager.mlp_block, fused.mlp_block):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = function(*leaves, *constants)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for plain, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        fused.mlp(*tensors[:5], *constants[:2]), eager.mlp(*tensors[:5], *constants[:2]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("in_place", [False, True])
def test_weights_may_be_stored_by_columns(device, in_place):
    tensors = operands(24, 20, 20, device, torch.float32)
    constants = Expression.parse(FIRST), 10, 1e-5, Dropout(0.1, 5, 2)
    expected = run(fused.mlp_block, tensors, *constants)
    leaves = [tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for tensor in tensors]
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    leaves[1].grad = torch.ones(20, 20, device=device).t().contiguous().t().mul_(2)
    leaves[1].grad = leaves[1].grad.as_strided((20, 20), (1, 20))
    with gradients_in_place() if in_place else contextlib.nullcontext():
        out = fused.mlp_block(*leaves, *constants)
    gradient = torch.linspace(-1, 1, out.numel(), device=device).view(out.shape)
    out.backward(gradient)
    torch.testing.assert_close(leaves[1].grad, expected[2] + 2)
    for leaf, right in zip([leaves[0], *leaves[2:]], [expected[1], *expected[3:]], strict=True):
        torch.testing.assert_close(leaf.grad, right)


def checkpointed(function, *args):
    return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=False)


def offloaded(function, *args):
    with torch.autograd.graph.save_on_cpu():
        return function(*args)


def copied(function, *args):
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        return function(*args)


@pytest.mark.parametrize("way", [checkpointed, offloaded, copied])
def test_gradients_in_place_reach_the_parameters_however_tensors_are_saved(device, way):
    tensors = operands(24, 20, 20, device, torch.float32)
    constants = Expression.parse(FIRST), 10, 1e-5, Dropout(0.1, 5, 2)
    expected = run(fused.mlp_block, tensors, *constants)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    with gradients_in_place():
        out = way(fused.mlp_block, *leaves, *constants)
        out.backward(torch.linspace(-1, 1, out.numel(), device=device).view(out.shape))
    for leaf, right in zip(leaves, expected[1:], strict=True):
        torch.testing.assert_close(leaf.grad, right)


def test_a_weight_with_a_gradient_hook_gets_its_gradient_from_autograd(device):
    tensors = operands(24, 20, 20, device, torch.float32)
    constants = Expression.parse(FIRST), 10, 1e-5, Dropout(0.1, 5, 2)
    expected = run(fused.mlp_block, tensors, *constants)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    leaves[1].register_hook(lambda gradient: gradient * 2)
    with gradients_in_place():
        out = fused.mlp_block(*leaves, *constants)
    out.backward(torch.linspace(-1, 1, out.numel(), device=device).view(out.shape))
    torch.testing.assert_close(leaves[1].grad, 2 * expected[2])
    torch.testing.assert_close(leaves[3].grad, expected[4])


def test_gradients_in_place_are_of_one_thread(device):
    inside, done = threading.Event(), threading.Event()

    def other():
        with gradients_in_place():
            inside.set()
            done.wait(10)

    thread = threading.Thread(target=other)
    thread.start()
    inside.wait(10)
    tensors = operands(24, 20, 20, device, torch.float32)
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    out = fused.mlp(*leaves[:5], Expression.parse(FIRST), 10)
    assert all(gradient is not None for gradient in torch.autograd.grad(out.sum(), leaves[:5]))
    done.set()
    thread.join()


def test_transforms_are_refused_in_a_line(device):
    tensors = operands(24, 20, 20, device, torch.float32)[:5]
    constants = Expression.parse(FIRST), 10

    def of_x(x):
        return fused.mlp(x, *tensors[1:], *constants)

    x = tensors[0]
    with pytest.raises(RuntimeError, match=r"mlp: the fused kernels know neither torch\.func, vmap nor forward mode"):
        torch.vmap(of_x)(torch.stack([x, x]))
    with pytest.raises(RuntimeError, match="mlp: the fused kernels know neither"):
        torch.func.jvp(of_x, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match="mlp: the fused kernels know"):
        of_x(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
    with torch.autograd.forward_ad.dual_level():
        of_x(x)  # no tangent, nothing lost
