"""Projected MSE in Triton against the plain form: loss and all gradients, masks, strides, types, registration."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert import kernels
from effbert.kernels import eager, projection_loss
from effbert.kernels.library import gradients_in_place
from effbert.kernels.projection_loss import projected_mse

FACTOR = 3.0  # the loss's own gradient
WITH_GAPS = torch.tensor([[1] * 7 + [0, 0] + [1] * 2, [1] + [0] * 10])  # a gap, and a sequence of one token


def states(device, dtype, pairs=2, batch=2, length=11, width=18, teacher_width=37, scale=1.0, seed=0):
    """Student states, teacher states, weight, bias; values that `dtype` holds, weight and bias in fp32."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=scale):
        return (scale * torch.randn(*shape, generator=generator)).to(dtype).to(device)

    students = [draw(batch, length, width) for _ in range(pairs)]
    teachers = [draw(batch, length, teacher_width) for _ in range(pairs)]
    weight = draw(teacher_width, width, scale=width**-0.5).float()
    return students, teachers, weight, draw(teacher_width, scale=1.0).float()


def plain_mse(students, teachers, weight, bias, mask=None):
    """Projection in the students' type, differences in fp32: what autocast makes of it."""
    total = 0.0
    for x, target in zip(students, teachers, strict=True):
        squared = (F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).float() - target.float()).square()
        if mask is None:
            total = total + squared.mean()
        else:
            total = total + (squared * mask[..., None]).sum() / (mask.sum() * squared.shape[-1])
    return total


def loss_and_gradients(loss, students, teachers, weight, bias, mask=None, dtype=None):
    """The loss and the gradients of FACTOR times it; `dtype` converts every input first."""
    students = [x.detach().to(dtype or x.dtype).requires_grad_() for x in students]
    teachers = [t.to(dtype or t.dtype) for t in teachers]
    weight, bias = (p.detach().to(dtype or p.dtype).requires_grad_() for p in (weight, bias))
    value = loss(students, teachers, weight, bias, mask)
    return [value.detach(), *torch.autograd.grad(FACTOR * value, [*students, weight, bias])]


def check_all(check_error, inputs, mask=None, floor=4.0):
    dtype = inputs[0][0].dtype
    plain = eager.projected_mse if dtype == torch.float32 else plain_mse
    ours = loss_and_gradients(projected_mse, *inputs, mask)
    plains = loss_and_gradients(plain, *inputs, mask)
    exact = loss_and_gradients(eager.projected_mse, *inputs, mask, dtype=torch.float64)
    names = ["loss", *(f"dx{i}" for i in range(len(inputs[0]))), "dweight", "dbias"]
    for name, mine, theirs, true in zip(names, ours, plains, exact, strict=True):
        check_error(mine, theirs, true, floor=floor, what=name)
    assert ours[0].shape == () and ours[0].dtype == torch.float32
    assert [g.dtype for g in ours[1:]] == [dtype] * len(inputs[0]) + [torch.float32] * 2


@pytest.mark.parametrize("mask", [None, WITH_GAPS], ids=["all", "gaps"])
def test_loss_and_gradients_are_as_plain_pytorchs(device, dtype, mask, check_error):
    check_all(check_error, states(device, dtype), None if mask is None else mask.to(device))


@pytest.mark.parametrize("case", ["near zero", "large"])
def test_small_and_large_losses(device, dtype, case, check_error):
    students, teachers, weight, bias = states(device, dtype, 1, 1, scale=30.0 if case == "large" else 1.0)
    if case == "near zero":
        near = F.linear(students[0].double(), weight.double(), bias.double())
        teachers = [(near + 1e-3 * teachers[0].double()).to(dtype)]
    check_all(check_error, (students, teachers, weight, bias))


@settings(max_examples=5, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.integers(1, 2), st.integers(1, 17), st.integers(1, 36), st.integers(1, 36), st.integers(0, 3)
)
def test_any_shape_and_mask(pairs, batch, length, width, teacher_width, real):
    students, teachers, weight, bias = states("cpu", torch.float32, pairs, batch, length, width, teacher_width)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mask = torch.arange(batch * length).reshape(batch, length) % 4 >= real
    mask[0, 0] = True
    moved = ([x.to(device) for x in students], [t.to(device) for t in teachers], weight.to(device), bias.to(device))
    ours = loss_and_gradients(projected_mse, *moved, mask.to(device))
    exact = loss_and_gradients(eager.projected_mse, students, teachers, weight, bias, mask.double(), torch.float64)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double().cpu(), true, rtol=1e-4, atol=1e-5 * true.abs().max().item())


@pytest.mark.parametrize("kind", ["sliced", "transposed", "offset"])
def test_states_of_any_strides(device, kind):
    students, teachers, weight, bias = states(device, torch.float32)

    def changed(x):
        if kind == "sliced":
            return torch.cat((x, x + 1), dim=1)[:, : x.shape[1]]
        if kind == "transposed":
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        return torch.cat((x[..., :1], x), dim=-1)[..., 1:]

    mask = WITH_GAPS.to(device).t().contiguous().t()
    ours = projected_mse(
        [changed(students[0]), students[1]], [*map(changed, teachers)], changed(weight[None])[0], bias, mask
    )
    torch.testing.assert_close(ours, projected_mse(students, teachers, weight, bias, mask), rtol=1e-6, atol=0)


def test_teacher_states_may_have_other_types(device, dtype):
    students, teachers, weight, bias = states(device, torch.float16, 2, 1, 5)
    expected = eager.projected_mse(students, teachers, weight, bias)
    for kinds in ((dtype, dtype), (torch.float16, torch.float32)):
        mixed = [t.to(kind) for t, kind in zip(teachers, kinds, strict=True)]
        torch.testing.assert_close(projected_mse(students, mixed, weight, bias), expected, rtol=1e-3, atol=0)


def test_autocast_decides_the_type_of_the_products(device, monkeypatch):
    students, teachers, weight, bias = states(device, torch.float32, 1, 1)
    taken = []
    monkeypatch.setattr(projection_loss, "_projected_mse", lambda students, *_: taken.append(students[0].dtype))
    with torch.autocast(device.type, torch.bfloat16):
        projected_mse(students, teachers, weight, bias)
    projected_mse(students, teachers, weight, bias)
    assert taken == [torch.bfloat16, torch.float32]


def test_no_gradient_keeps_nothing(device):
    students, teachers, weight, bias = states(device, torch.float32, 1, 1)
    loss, d, column_sums, _, _ = torch.ops.effbert.projected_mse(students, teachers, weight, bias, None, False)
    assert d.numel() == column_sums.numel() == 0
    torch.testing.assert_close(loss, eager.projected_mse(students, teachers, weight, bias))


def test_masked_states_do_not_matter_and_nan_shows(device):
    students, teachers, weight, bias = states(device, torch.float32, 1, teacher_width=20)
    mask = WITH_GAPS.to(device)
    before = projected_mse(students, teachers, weight, bias, mask)
    students[0][1, 5] = 7.0
    assert projected_mse(students, teachers, weight, bias, mask) == before
    for bad in (float("nan"), float("inf")):
        teachers[0][0, 0, 0] = bad
        assert not projected_mse(students, teachers, weight, bias, mask).isfinite()


def test_no_rows_and_no_real_token_are_as_eagers(device):
    students, teachers, weight, bias = states(device, torch.float32, batch=0)
    for dtype in (torch.float32, torch.float64):
        loss, *gradients = loss_and_gradients(
            projected_mse if dtype == torch.float32 else eager.projected_mse,
            students,
            teachers,
            weight,
            bias,
            None,
            dtype,
        )
        assert loss.isnan() and gradients[0].shape == (0, 11, 18)
        assert (gradients[-2] == 0).all() and (gradients[-1] == 0).all()
    students, teachers, weight, bias = states(device, torch.float32, 1, 1)
    nothing = torch.zeros(1, 11, dtype=torch.bool, device=device)
    assert projected_mse(students, teachers, weight, bias, nothing).isnan()


def test_wrong_input_is_refused_in_one_line(device):
    students, teachers, weight, bias = states(device, torch.float32, 1, 1)
    with pytest.raises(ValueError, match="1 student states against 2"):
        kernels.projected_mse(students, teachers * 2, weight, bias, backend="triton")
    with pytest.raises(ValueError, match="0 student states against 0"):
        kernels.projected_mse([], [], weight, bias, backend="triton")
    with pytest.raises(ValueError, match="teacher tensor requires grad"):
        kernels.projected_mse(students, [teachers[0].requires_grad_()], weight, bias, backend="triton")
    with pytest.raises(TypeError, match="float64"):
        kernels.projected_mse([students[0].double()], [teachers[0].detach()], weight, bias, backend="triton")


def test_gradients_in_place_add_to_what_is_there(device):
    students, teachers, weight, bias = states(device, torch.float32, 1, 1)
    expected = loss_and_gradients(projected_mse, students, teachers, weight, bias)[-2:]
    weight.requires_grad_().grad, bias.requires_grad_().grad = torch.ones_like(weight), torch.ones_like(bias)
    with gradients_in_place():
        loss = FACTOR * projected_mse(students, teachers, weight, bias)
    loss.backward()
    for parameter, gradient in zip((weight, bias), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient + 1)


def test_registered_op_passes_opcheck_and_compiles(device):
    students, teachers, weight, bias = states(device, torch.float32, 2, 1, 3, 5, 7)
    students = [x.requires_grad_() for x in students]
    weight.requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.long, device=device)
    torch.library.opcheck(torch.ops.effbert.projected_mse.default, (students, teachers, weight, bias, mask, True))
    compiled = torch.compile(projected_mse, fullgraph=True, backend="aot_eager")
    gradients = [
        torch.autograd.grad(loss(students, teachers, weight, bias, mask), [*students, weight])
        for loss in (compiled, projected_mse)
    ]
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_dispatch_reaches_it(device):
    students, teachers, weight, bias = states(device, torch.float32, 1, 1)
    mine, plain = (
        kernels.projected_mse(students, teachers, weight, bias, backend=name) for name in ("triton", "eager")
    )
    torch.testing.assert_close(mine, plain)


@pytest.mark.parametrize("form", ["strided", "expanded"])
def test_the_bias_need_not_be_dense(device, form):
    students, teachers, weight, bias = states(device, torch.float32)
    bias = torch.stack([bias, bias + 5], 1)[:, 0] if form == "strided" else bias[2:3].expand(len(bias))
    results = [loss_and_gradients(loss, students, teachers, weight, bias) for loss in (projected_mse, plain_mse)]
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_an_fp16_difference_beyond_the_type_is_no_silent_error(device):
    students, teachers, weight, bias = states(device, torch.float16)
    teachers = [teacher.float() + 1e5 for teacher in teachers]
    loss, *gradients = loss_and_gradients(projected_mse, students, teachers, weight, bias)
    exact, *_ = loss_and_gradients(eager.projected_mse, students, teachers, weight, bias)
    torch.testing.assert_close(loss, exact, rtol=1e-3, atol=0)
    assert not torch.isfinite(gradients[0]).any()
