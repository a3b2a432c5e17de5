"""Kernels that take the stages of a block for whole rows: the bits of the separate kernels, exact products, edges."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert.kernels import candidate_mlp, gradients_in_place, row_block
from effbert.kernels.codegen import slot_functions
from effbert.kernels.expression import STRUCTURES, Expression
from effbert.kernels.linear import padded_width
from effbert.kernels.norm import Unchanged
from effbert.kernels.philox import Dropout, split
from effbert.search.space import random_expression

TILE = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "ROWS": 8, "num_warps": 4, "num_stages": 1}
DROPOUT = Dropout(0.3, 2**61 + 9, 5)


def normal(*shape, device, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def operands(rows, channels, inner, device, dtype):
    """x, W1, b1, W2, b2, norm weight, norm bias, and the gradient that comes back."""
    shapes = (rows, channels), (inner, channels), (inner,), (channels, inner), (channels,), (channels,), (channels,)
    return [normal(*shape, device=device, dtype=dtype, seed=seed) for seed, shape in enumerate((*shapes, shapes[0]))]


def results(together, tensors, *constants, monkeypatch):
    """The output and all gradients of a block by one path."""
    with monkeypatch.context() as patch:
        patch.setattr(candidate_mlp.tiles, "choose_rows", lambda *question: TILE if together else {})
        *tensors, gradient = tensors
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        output = candidate_mlp.mlp_block(*leaves, *constants)
        output.backward(gradient)
    return [output.detach(), *(leaf.grad for leaf in leaves)]


def check_same(one, other):
    """Equal bits where both paths have equal tiles, so in the interpreter; not of LayerNorm's weight and bias.

    The sums of those two have another order.
    """
    for place, (mine, theirs) in enumerate(zip(one, other, strict=True)):
        if place < len(one) - 2 and not mine.is_cuda:
            assert torch.equal(mine, theirs), place
        else:
            tolerance = 1e-5 if one[0].dtype == torch.float32 else 1e-2
            largest = theirs.abs().max().item() if theirs.numel() else 0.0
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance * (1 + largest))


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 70), st.integers(1, 50), st.integers(1, 40), st.booleans(), st.integers(0, 2**32))
def test_any_block_has_the_bits_of_the_separate_kernels(rows, channels, inner, half, seed):
    rng = np.random.default_rng(seed)
    expression = random_expression(STRUCTURES[rng.integers(16)], rng)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tensors = operands(rows, channels, inner, device, torch.float16 if half else torch.float32)
    width = min(inner, channels)
    constants = (expression, int(rng.integers(1, width + 1)), 1e-5, (None, DROPOUT)[rng.integers(2)])
    with pytest.MonkeyPatch.context() as monkeypatch:
        paths = [results(together, tensors, *constants, monkeypatch=monkeypatch) for together in (True, False)]
    check_same(*paths)


@pytest.mark.parametrize("pre", ["x", "max(x,tanh(x))"])
@pytest.mark.parametrize("mid, post", [("gelu({})", "{}"), ("mul({},x)", "tanh({})"), ("relu({})", "add(elu({}),x)")])
def test_every_kind_of_slot_and_odd_pitches(pre, mid, post, device, dtype, monkeypatch):
    text = post.format(f"linear1_2({mid.format(f'linear1_2({pre},wb1)')},wb2)")
    tensors = operands(37, 27, 13, device, dtype)
    wide = normal(37, 40, device=device, dtype=dtype, seed=9)
    tensors[0], tensors[-1] = wide[:, 5:32], wide.flip(0)[:, 2:29]
    constants = (Expression.parse(text), 13, 1e-5, DROPOUT)
    check_same(*(results(together, tensors, *constants, monkeypatch=monkeypatch) for together in (True, False)))


def test_one_set_of_weights_used_twice_in_place_under_autocast(device, monkeypatch):
    expression, found = Expression.parse("elu(linear1_2(gelu(linear1_2(x,wb1)),wb2))"), []
    for together in (True, False):
        x, *weights, gradient = operands(33, 20, 20, device, torch.float32)
        leaves = [tensor.requires_grad_() for tensor in (x, *weights)]
        with monkeypatch.context() as patch, gradients_in_place():
            patch.setattr(candidate_mlp.tiles, "choose_rows", lambda *question: TILE if together else {})  # noqa: B023
            with torch.autocast(device.type, torch.float16):
                output = x
                for site in (1, 2):
                    output = candidate_mlp.mlp_block(
                        output, *leaves[1:], expression, 10, 1e-5, Dropout(0.1, 7, site)
                    )  # fmt: skip
            output.backward(gradient.half())
        found.append([output.detach(), *(leaf.grad for leaf in leaves)])
    assert found[0][0].dtype == torch.float16 and all(grad.dtype == torch.float32 for grad in found[0][1:])
    check_same(*found)


@pytest.mark.parametrize("rows, channels, width", [(0, 8, 8), (1, 1, 1), (33, 40, 65), (16, 7, 3)])
def test_products_are_exact_on_integers(rows, channels, width, device, dtype):
    def integers(*shape, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-2, 3, shape, generator=generator).to(device, dtype)

    x, ones = integers(rows, channels, seed=4), torch.ones(channels, device=device)
    weight1, bias1 = integers(width, channels, seed=1), integers(width, seed=5)
    weight2, bias2 = integers(channels, width, seed=2), integers(channels, seed=3)
    slots = slot_functions("linear1_1(relu(linear1_1(x,wb1)),wb2)", "truncate")
    results = [
        row_block.row_block_forward(
            x, weight1, bias1, weight2, bias2, ones, 0 * ones, width, 1e-5, split(None), slots, Unchanged, dtype,
            keep_h, TILE,
        )
        for keep_h in (True, False)
    ]  # fmt: skip
    out, h, y, mean, rstd = results[0]
    assert results[1][1] is None and torch.equal(results[1][0], out)
    hidden = x.double() @ weight1.double().T + bias1.double()
    assert torch.equal(h[:, :width].double(), hidden) and not h[:, width:].any()
    assert h.shape == (rows, padded_width(width, dtype))
    expected = hidden.relu() @ weight2.double().T + bias2.double()
    assert torch.equal(y[:, :channels].double(), expected) and not y[:, channels:].any()
    assert y.shape == (rows, padded_width(channels, dtype)) and out.shape == (rows, channels)
    z = expected + x.double()
    torch.testing.assert_close(mean.double(), z.mean(1), rtol=1e-5, atol=1e-5)
    normalised = torch.nn.functional.layer_norm(z, (channels,), eps=1e-5)
    torch.testing.assert_close(out.double(), normalised, rtol=2e-3, atol=2e-3)
    assert torch.isfinite(rstd).all()
