"""The GEMM templates: exact on integers whatever the shape, padding, stride and slot; nothing left unwritten."""

import pytest
import torch
import triton
import triton.language as tl

from effbert.kernels import linear, linear_gradient
from effbert.kernels.codegen import SlotFunction
from effbert.kernels.primitives import identity


@triton.jit
def double_forward(v, x, inside):
    return v + v


@triton.jit
def double_backward(v, x, inside, g):
    return g + g, tl.zeros_like(g)


@triton.jit
def times_x_forward(v, x, inside):
    return v * x


@triton.jit
def times_x_backward(v, x, inside, g):
    return g * x, g * v


@triton.jit
def one_backward(v, x, inside, g):
    return g, tl.zeros_like(g)


def slot(forward, backward, uses_x=False, identity=False):
    return SlotFunction("", "", "", forward, backward, uses_x, uses_x, uses_x, identity, False)


DOUBLE = slot(double_forward, double_backward)
TIMES_X = slot(times_x_forward, times_x_backward, uses_x=True)
IDENTITY = slot(identity, one_backward, identity=True)


def integers(*shape, device, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randint(-2, 3, shape, generator=generator).to(device, dtype)


SHAPES = [(1, 1, 1), (5, 7, 3), (33, 40, 65), (64, 36, 20), (0, 8, 8)]


@pytest.mark.parametrize("rows, cols, depth", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_forward_is_exact_on_integers(rows, cols, depth, packed, device, dtype):
    a = integers(rows, depth + 3, device=device, dtype=dtype)[:, 1 : depth + 1]
    weight = integers(cols, depth, device=device, dtype=dtype)
    bias = integers(cols, device=device, dtype=torch.float32)
    x = integers(rows, cols + 2, device=device, dtype=dtype)
    used = linear.pack(weight, weight, dtype)[0] if packed else weight
    z, y = linear.linear_forward(a, used, bias, cols, depth, dtype, DOUBLE, TIMES_X, x, pad=packed)
    expected = 2 * a.double() @ weight.double().T + bias.double()
    assert torch.equal(z[:, :cols].double(), expected)
    assert torch.equal(y[:, :cols].double(), expected * x[:, :cols].double())
    assert not z[:, cols:].any() and not y[:, cols:].any()
    assert z.shape[1] == (linear.padded_width(cols, dtype) if packed else cols)


def zero_padded(values, packed):
    """The same as a tensor between two kernels is laid out, or as it is."""
    if not packed:
        return values
    wide = linear.padded(*values.shape, values.dtype, values.device).zero_()
    wide[:, : values.shape[1]] = values
    return wide


@pytest.mark.parametrize("rows, cols, depth", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
def test_input_gradient_is_exact_on_integers(rows, cols, depth, packed, device, dtype):
    g = integers(rows, depth + 1, device=device, dtype=dtype)[:, 1:]
    weight = integers(depth, cols, device=device, dtype=dtype)
    used = linear.pack(weight, weight, dtype)[0] if packed else weight
    v = zero_padded(integers(rows, cols, device=device, dtype=dtype), packed)
    x = integers(rows, cols + 2, device=device, dtype=dtype)
    dx = integers(rows, cols + 2, device=device, dtype=dtype, seed=1)
    before = dx.clone()
    dv, value = linear_gradient.linear_input_gradient(g, used, v, cols, depth, TIMES_X, dtype, x, dx)
    d = g.double() @ weight.double()
    x_used, v_used = x[:, :cols].double(), v[:, :cols].double()
    assert torch.equal(dv[:, :cols].double(), d * x_used)
    assert torch.equal(value[:, :cols].double(), v_used * x_used)
    assert torch.equal(dx[:, :cols].double(), before[:, :cols].double() + d * v_used)
    assert torch.equal(dx[:, cols:], before[:, cols:])
    assert not dv[:, cols:].any() and not value[:, cols:].any()


@pytest.mark.parametrize("rows, inner, channels", SHAPES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("pre", [DOUBLE, IDENTITY], ids=["slot", "identity"])
def test_all_other_gradients_are_exact_on_integers(rows, inner, channels, packed, pre, device, dtype):
    dh, middle = (zero_padded(integers(rows, inner, device=device, dtype=dtype, seed=s), packed) for s in (1, 2))
    dy = zero_padded(integers(rows, channels, device=device, dtype=dtype), packed)
    x = integers(rows, channels + 3, device=device, dtype=dtype)[:, 2 : channels + 2]
    added = integers(rows, channels, device=device, dtype=dtype, seed=3) if pre is DOUBLE else None
    weight = integers(inner, channels, device=device, dtype=dtype)
    used = linear.pack(weight, weight, dtype)[0] if packed else weight
    dx, partials = linear_gradient.linear_gradients(dh, dy, middle, used, x, inner, dtype, pre, added)
    factor = 2 if pre is DOUBLE else 1
    dh, middle, dy = dh[:, :inner].double(), middle[:, :inner].double(), dy[:, :channels].double()
    expected = dh.T @ (factor * x.double()), dh.sum(0), dy.T @ middle, dy.sum(0)
    for partial, sums in zip(partials, expected, strict=True):
        assert torch.equal(partial.double().sum(0), sums)
    assert torch.equal(dx.double(), factor * dh @ weight.double() + (0 if added is None else added.double()))


def test_weight_gradients_split_long_inputs(device, dtype):
    g = integers(200, 5, device=device, dtype=dtype)
    _, partials = linear_gradient.linear_gradients(g, g, g, g[:5], g, 5, dtype, IDENTITY)
    assert all(len(partial) > 1 for partial in partials)
    assert torch.equal(partials[0].double().sum(0), g.double().T @ g.double())


def test_slot_gradient_reads_the_incoming_gradient(device, dtype):
    v, x, g = (integers(37, 21, device=device, dtype=dtype, seed=seed) for seed in range(3))
    dv, dx = linear_gradient.slot_gradient(g, v, x, TIMES_X, dtype)
    assert torch.equal(dv, g * x) and torch.equal(dx, g * v)


def test_packing_casts_and_pads_both_slices(device):
    first = torch.randn(7, 50, device=device)[:, :33]
    second = torch.randn(33, 7, device=device)
    one, two = linear.pack(first, second, torch.float16)
    assert torch.equal(one[:, :33], first.half()) and torch.equal(two[:, :7], second.half())
    assert one.shape[1] == 64 and two.shape[1] == 32 and not one[:, 33:].any() and not two[:, 7:].any()


def test_rows_of_16_byte_multiples_are_used_in_place(device):
    assert not linear.need_packing(torch.empty(3, 540, device=device), torch.float32)
    assert linear.need_packing(torch.empty(3, 540, device=device), torch.bfloat16)
    assert linear.need_packing(torch.empty(3, 540, device=device, dtype=torch.bfloat16), torch.bfloat16)
    assert not linear.need_packing(torch.empty(3, 768, device=device, dtype=torch.bfloat16)[:, :384], torch.bfloat16)
