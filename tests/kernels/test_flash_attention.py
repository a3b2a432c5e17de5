"""Attention and its distilling form against the eager functions: values, gradients, layouts, masks, odd shapes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert.kernels import eager
from effbert.kernels import flash_attention as fused
from effbert.kernels.launch import recording
from effbert.kernels.philox import Dropout

KEY = 1234567890123456789


def draw(shape, dtype, device, seed, scale=1.0):
    """[B, H, L, D] in `dtype` as a view of [B, L, H * D], the layout that a linear layer gives."""
    batch, heads, length, width = shape
    values = torch.randn(batch, length, heads * width, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(device, dtype).unflatten(-1, (heads, width)).transpose(1, 2)


def problem(dtype, device, batch=2, heads=1, length=20, width=5, teacher_width=8, teacher_dtype=None, scale=1.0):
    """query, key, value, teacher_query, teacher_key, and a mask with padding and a gap."""
    tensors = [draw((batch, heads, length, width), dtype, device, seed, scale) for seed in range(3)]
    tensors += [draw((batch, heads, length, teacher_width), teacher_dtype or dtype, device, seed) for seed in (3, 4)]
    mask = torch.ones(batch, length, dtype=torch.long, device=device)
    mask[0, length * 2 // 3 :] = 0
    mask[0, length // 4] = 0
    return *tensors, mask


def plain_distill_attention(query, key, value, teacher_query, teacher_key, attention_mask, dropout=None, mask="real"):
    """What distill_attention means."""
    context = eager.attention(query, key, value, attention_mask, dropout)
    return context, eager.score_mse(query, key, teacher_query, teacher_key, attention_mask, mask, form="direct")


def results(function, tensors, mask, *options, wide=False, upstream=((1.0, 0.7),)):
    """Outputs, then gradients of q, k, v for each (factor of the context's gradient, gradient of the loss)."""
    tensors = [tensor.detach().double() if wide else tensor.detach() for tensor in tensors]
    leaves = [tensor.requires_grad_() for tensor in tensors[:3]]
    outputs = function(*leaves, *tensors[3:], mask, *options)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    grad = draw(leaves[2].shape, torch.float32, leaves[2].device, 9).to(leaves[2].dtype)
    gradients = []
    for factors in upstream:
        grads = [grad * factors[0], *(torch.full_like(loss, factors[1]) for loss in outputs[1:])]
        gradients += torch.autograd.grad(outputs, leaves, grads, retain_graph=len(upstream) > 1)
    return [*(output.detach() for output in outputs), *gradients]


def compare(check_error, ours, meaning, tensors, mask, *options, **settings_):
    mine = results(ours, tensors, mask, *options, **settings_)
    plain = results(meaning, tensors, mask, *options, **settings_)
    exact = results(meaning, tensors, mask, *options, wide=True, **settings_)
    for index, (one, other, truth) in enumerate(zip(mine, plain, exact, strict=True)):
        check_error(one, other, truth, what=f"result {index}")
    return mine


@pytest.mark.parametrize("mask_form", ["real", "released"])
def test_context_loss_and_gradients_are_eagers(device, dtype, check_error, mask_form):
    *tensors, mask = problem(dtype, device)
    key = KEY if mask_form == "real" else torch.tensor(KEY, device=device)
    upstream = ((1.0, 0.0), (0.0, 0.7), (1.0, 0.7))
    options = (Dropout(0.3, key, 3), mask_form)
    mine = compare(
        check_error, fused.distill_attention, plain_distill_attention, tensors, mask, *options, upstream=upstream
    )
    assert mine[1].shape == () and mine[1].dtype == torch.float32
    assert not mine[7].any() and mine[4].any()  # the loss alone does not move the values


def test_long_sequences_take_two_roles(device, dtype, check_error):
    *tensors, mask = problem(dtype, device, batch=1, length=35)
    options = (Dropout(0.3, KEY, 1), "real" if dtype == torch.float16 else "released")
    if options[1] == "released":
        tensors[3] *= 1e4  # some scores of padding, where tiles could be left out, exceed even the mask's -10000
    compare(check_error, fused.distill_attention, plain_distill_attention, tensors, mask, *options)
    compare(check_error, fused.attention, eager.attention, tensors[:3], mask)


def test_plain_attention_is_eagers(device, dtype, check_error):
    *tensors, mask = problem(dtype, device, batch=1, heads=2)
    compare(check_error, fused.attention, eager.attention, tensors[:3], None)
    compare(check_error, fused.attention, eager.attention, tensors[:3], mask, Dropout(0.1, KEY, 2))


def test_a_teacher_of_another_width_and_dtype(device, check_error):
    for width, teacher_width, teacher_dtype in ((3, 70, torch.float16), (72, 1, torch.float32)):
        *tensors, mask = problem(torch.float32, device, 1, 1, 18, width, teacher_width, teacher_dtype=teacher_dtype)
        compare(check_error, fused.distill_attention, plain_distill_attention, tensors, mask)


def test_the_loss_of_nearly_equal_scores_keeps_its_precision(device, dtype, check_error):
    query, key, value, _, _, mask = problem(dtype, device)
    noise = 1 + draw(query.shape, dtype, device, 7) * 1e-2
    tensors = (query, key, value, query * noise, key)
    mine = compare(check_error, fused.distill_attention, plain_distill_attention, tensors, mask, upstream=((0.0, 1.0),))
    assert 0 < mine[1] < 1e-3
    assert fused.distill_attention(query, key, value, query, key, mask)[1] == 0


def test_a_large_loss(device, dtype, check_error):
    *tensors, mask = problem(dtype, device, batch=1)
    tensors[3] *= 1000  # student and teacher scores are compared far below -100 too
    options = (None, "released")
    mine = compare(check_error, fused.distill_attention, plain_distill_attention, tensors, mask, *options)
    assert mine[1] > 1e5


@pytest.mark.parametrize("scale", [3, 10])
def test_large_scores_cost_gradients_in_fp32_ten_times_their_rounding_at_most(device, scale):
    *tensors, mask = problem(torch.float32, device, width=45)
    tensors = [tensors[0] * scale, tensors[1] * scale, tensors[2]]
    largest = (tensors[0].double() @ tensors[1].double().mT / 45**0.5).abs().max().item()
    assert largest > 2 * scale**2
    mine, exact = (
        results(function, tensors, mask, wide=wide)
        for function, wide in ((fused.attention, False), (eager.attention, True))
    )
    for one, truth in zip(mine, exact, strict=True):
        assert (one.double() - truth).abs().max() <= 10 * 2**-24 * largest * truth.abs().max()


def test_a_tiny_gradient_of_the_loss_survives_half_precision(device, check_error):
    query, key, value, teacher_query, teacher_key, mask = problem(torch.float16, device)
    tensors = (query * 0.05, key * 100, value, teacher_query, teacher_key)  # ds is 1e-8, dq 1e-5
    exact = results(plain_distill_attention, tensors, mask, wide=True, upstream=((0.0, 1e-6),))[2]
    mine = results(fused.distill_attention, tensors, mask, upstream=((0.0, 1e-6),))[2]
    assert (mine.double() - exact).abs().max() <= 5e-3 * exact.abs().max() + 2**-24


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    length=st.integers(1, 18),
    width=st.integers(1, 20),
    teacher_width=st.integers(1, 20),
    mask_seed=st.integers(0, 2**32 - 1),
    layout=st.sampled_from(["BLHD", "BHLD", "chunks", "sliced"]),
    mask_form=st.sampled_from(["real", "released"]),
)
@settings(max_examples=5, deadline=None, derandomize=True)
def test_any_shape_mask_and_layout(batch, heads, length, width, teacher_width, mask_seed, layout, mask_form):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    *tensors, mask = problem(torch.float32, device, batch, heads, length, width, teacher_width)
    generator = torch.Generator().manual_seed(mask_seed)
    mask = (torch.rand(batch, length, generator=generator) < 0.5).to(device)
    mask[:, torch.randint(length, (), generator=generator)] = True
    tensors = [_laid_out(tensor, layout) for tensor in tensors]
    dropout = Dropout(0.5, mask_seed, 0)
    mine = results(fused.distill_attention, tensors, mask, dropout, mask_form)
    exact = results(plain_distill_attention, tensors, mask, dropout, mask_form, wide=True)
    for one, truth in zip(mine, exact, strict=True):
        torch.testing.assert_close(one.double(), truth, rtol=1e-4, atol=1e-5)


def _laid_out(x, layout):
    """The same values with other strides."""
    batch, heads, length, width = x.shape
    if layout == "BHLD":
        return x.contiguous()
    if layout == "BLHD":
        return x
    if layout == "chunks":  # the middle third of a wider row
        wide = torch.full((batch, length, 3, heads * width), float("nan"), dtype=x.dtype, device=x.device)
        wide[:, :, 1] = x.transpose(1, 2).flatten(2)
        return wide[:, :, 1].unflatten(-1, (heads, width)).transpose(1, 2)
    wide = torch.full((batch, heads + 1, length + 2, 2 * width + 1), float("nan"), dtype=x.dtype, device=x.device)
    view = wide[:, 1:, 2:, : 2 * width : 2]
    view.copy_(x)
    return view


def test_heads_that_begin_at_odd_addresses_are_loaded_in_units(device, check_error):
    *tensors, mask = problem(torch.float32, device, 1, 4, 18, 45, 16)
    assert fused._strides(tensors[:3])[1:] == (4, True)
    assert fused._strides(tensors[3:5])[1:] == (16, False)
    assert fused._strides([tensor.contiguous() for tensor in tensors[:3]])[1:] == (1, False)
    compare(check_error, fused.distill_attention, plain_distill_attention, tensors, mask)


def test_results_are_laid_out_for_the_next_linear_layer(device):
    *tensors, mask = problem(torch.float32, device)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    context, loss = fused.distill_attention(*leaves, *tensors[3:], mask)
    flat = context.transpose(1, 2).flatten(2)
    assert flat.data_ptr() == context.data_ptr() and flat.is_contiguous()
    for gradient in torch.autograd.grad(context.sum() + loss, leaves):
        assert gradient.stride() == leaves[0].stride()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_sequence_without_a_real_token_gets_zeros_from_all_backends(device, p):
    *tensors, mask = problem(torch.float32, device)
    mask[1] = 0
    results = []
    for function in (eager.attention, fused.attention):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        context = function(*leaves, mask, Dropout(p, 7, 1))
        results.append([context, *torch.autograd.grad(context.square().sum(), leaves)])
    for plain, ours in zip(*results, strict=True):
        assert not plain[1].any() and plain[0].any()
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_without_a_mask_all_tokens_are_real(device):
    *tensors, mask = problem(torch.float32, device)
    for function in (eager.distill_attention, fused.distill_attention):
        for mine, same in zip(function(*tensors, None), function(*tensors, torch.ones_like(mask)), strict=True):
            torch.testing.assert_close(mine, same)


def test_padded_queries_attend_to_real_keys_and_an_empty_sequence_gives_zeros(device):
    *tensors, mask = problem(torch.float32, device)
    mask[1] = 0
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    context, loss = fused.distill_attention(*leaves, *tensors[3:], mask)
    expected = eager.attention(*tensors[:3], mask)
    torch.testing.assert_close(context[0], expected[0])
    alone = plain_distill_attention(*(tensor[:1] for tensor in tensors), mask[:1])[1]
    torch.testing.assert_close(loss, alone)
    gradients = torch.autograd.grad(context.sum() + loss, leaves)
    assert not context[1].any()
    for gradient in gradients:
        assert not gradient[1].any() and gradient[0].any()


def test_what_padding_holds_changes_neither_real_tokens_nor_the_loss(device):
    *tensors, mask = problem(torch.float32, device, batch=1, length=35)
    noise = (1 - mask)[:, None, :, None] * 50.0
    before = fused.distill_attention(*tensors, mask)
    after = fused.distill_attention(*(tensor + noise for tensor in tensors), mask)
    real = mask[0].bool()
    assert torch.equal(before[0][:, :, real], after[0][:, :, real]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("place", range(5))
def test_nan_and_infinity_show(device, place):
    *tensors, mask = problem(torch.float32, device, length=6)
    for number in (float("nan"), float("inf")):
        broken = [tensor.clone() for tensor in tensors]
        broken[place][1, 0, 3, 2] = number
        context, loss = fused.distill_attention(*broken, mask)
        assert torch.isfinite(loss) == (place == 2)
        assert torch.isfinite(context[1]).all() == (place > 2)
        assert torch.isfinite(context[0]).all()


@pytest.mark.parametrize("shape", [(0, 2, 4, 5), (1, 1, 1, 1), (2, 3, 1, 7)])
def test_no_rows_and_one_row(device, shape):
    tensors = [draw(shape, torch.float32, device, seed).requires_grad_(seed < 3) for seed in range(5)]
    mask = torch.ones(shape[0], shape[2], device=device)
    context, loss = fused.distill_attention(*tensors, mask)
    expected, expected_loss = plain_distill_attention(*tensors, mask)
    torch.testing.assert_close(context, expected)
    torch.testing.assert_close(loss, expected_loss, equal_nan=True)
    mine = torch.autograd.grad(context.sum() + loss, tensors[:3])
    for one, other in zip(mine, torch.autograd.grad(expected.sum() + expected_loss, tensors[:3]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_every_run_gives_the_same_bits(device):
    *tensors, mask = problem(torch.float16, device)
    first, second = (results(fused.distill_attention, tensors, mask.bool(), Dropout(0.2, KEY, 0)) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_without_gradients_nothing_is_kept(device):
    *tensors, mask = problem(torch.float32, device)
    context, loss = fused.distill_attention(*tensors, mask)
    assert context.grad_fn is None and loss.grad_fn is None
    outputs = torch.ops.effbert.distill_attention(*tensors, mask, 0.0, 0, None, 0, False, False)
    assert outputs[2].numel() == 0
    assert torch.equal(outputs[0], context)


def test_the_registered_ops_obey_torch_library(device):
    *tensors, mask = problem(torch.float32, device, batch=1, heads=1, length=5)
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    dropout = (0.2, 5, None, 1)
    torch.library.opcheck(torch.ops.effbert.attention.default, (*tensors[:3], None, *dropout, False))
    torch.library.opcheck(
        torch.ops.effbert.distill_attention.default, (*leaves, *tensors[3:], mask, *dropout, False, True)
    )


def test_compiled_steps_are_the_eager_calls(device):
    *tensors, mask = problem(torch.float32, device, batch=1, length=35)

    def step(*tensors):
        return fused.distill_attention(*tensors, mask, Dropout(0.2, 5, 1))

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    runs = [results(lambda *args, call=call: call(*args[:5]), tensors, mask) for call in (compiled, step)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_launches_are_few_and_need_no_values():
    def names(length):
        *tensors, mask = problem(torch.bfloat16, torch.device("meta"), length=length, width=45, teacher_width=64)
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
        with recording("sm_90") as launches:
            context, loss = fused.distill_attention(*leaves, *tensors[3:], mask)
            torch.autograd.backward((context, loss), (torch.empty_like(context), torch.empty_like(loss)))
        return [launch.name for launch in launches]

    forward = ["attention_fwd_kernel", "loss_mean_kernel"]
    assert names(128) == [*forward, "attention_bwd_kernel"]
    assert names(512) == [*forward, "attention_delta_kernel", "attention_bwd_kernel"]


def test_double_backward_is_refused(device):
    *tensors, mask = problem(torch.float32, device, batch=1, heads=1, length=4)
    query = tensors[0].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(fused.attention(query, *tensors[1:3], mask).sum(), query, create_graph=False)
    assert gradient.grad_fn is None
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(fused.attention(query, *tensors[1:3], mask).sum(), query, create_graph=True)
