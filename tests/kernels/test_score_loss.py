"""The score loss in Triton against the plain form: both algorithms, both masks, any layout, near zero and large."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert import kernels
from effbert.kernels import eager, score_loss
from effbert.kernels.launch import recording

WAYS = {"direct": ("real", "direct"), "gram": ("real", "gram"), "released": ("released", "direct")}
FACTOR = 3.0  # the loss's own gradient


def heads(generator, dtype, batch, heads, length, size, scale=1.0):
    """[B, H, L, D] as projections give it: a view of [B, L, H * D]."""
    flat = (scale * torch.randn(batch, length, heads * size, generator=generator)).to(dtype)
    return flat.view(batch, length, heads, size).transpose(1, 2)


def with_gaps(generator, batch, length):
    """Masks that are no prefixes; of several sequences the last keeps one token, not its first."""
    mask = torch.rand(batch, length, generator=generator) < 0.7
    mask[:, length // 2] = True
    if batch > 1:
        mask[-1] = torch.arange(length) == length - 1
    return mask.long()


def problem(device, dtype, batch=1, head_count=1, length=20, student=7, teacher=16, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, head_count, length)
    tensors = [heads(generator, dtype, *shape, size, scale) for size in (student, student, teacher, teacher)]
    return [t.to(device) for t in (*tensors, with_gaps(generator, batch, length))]


def near(device, dtype, distance, **shape):
    """A teacher whose scores differ from the student's by about `distance`, relative to their size."""
    query, key, _, _, mask = problem(device, dtype, student=24, teacher=24, **shape)
    noise = problem(device, torch.float32, student=24, teacher=24, seed=1, **shape)
    teacher = [(t.float() + distance * n).to(dtype) for t, n in zip((query, key), noise, strict=False)]
    return [query, key, *teacher, mask]


def loss_and_gradients(loss, tensors, way, factor=FACTOR, dtype=None):
    *tensors, mask = tensors
    query, key, *teacher = (t.detach().to(dtype or t.dtype) for t in tensors)
    query, key = query.requires_grad_(), key.requires_grad_()
    value = loss(query, key, *teacher, mask, *WAYS[way])
    return value.detach(), *torch.autograd.grad(factor * value, (query, key))


def check_all(check_error, tensors, way, factor=FACTOR, floor=None):
    ours = loss_and_gradients(score_loss.score_mse, tensors, way, factor)
    plain = loss_and_gradients(eager.score_mse, tensors, way, factor)
    exact = loss_and_gradients(eager.score_mse, tensors, way, factor, dtype=torch.float64)
    for name, *values in zip(("loss", "dQ", "dK"), ours, plain, exact, strict=True):
        check_error(*values, floor=floor, what=name)
    assert ours[0].shape == () and ours[0].dtype == torch.float32
    assert ours[1].dtype == tensors[0].dtype and ours[2].dtype == tensors[1].dtype
    return ours


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "batch,head_count,length,student,teacher",
    [
        (1, 2, 5, 45, 64),
        (2, 1, 33, 7, 16),
        (1, 1, 64, 16, 1),
        (1, 2, 1, 1, 7),
        (1, 1, 20, 128, 45),
        (1, 1, 17, 64, 128),
    ],
)
def test_loss_and_gradients_are_as_plain_pytorchs(
    device, dtype, way, batch, head_count, length, student, teacher, check_error
):
    tensors = problem(device, dtype, batch, head_count, length, student, teacher)
    _, *gradients = check_all(check_error, tensors, way)
    for gradient in gradients:  # one token's heads lie side by side, as the projection's backward wants them
        assert gradient.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    st.integers(1, 2), st.integers(1, 2), st.integers(1, 34), st.integers(1, 40), st.integers(1, 40), st.integers(0, 99)
)
def test_any_shape_and_mask(way, batch, head_count, length, student, teacher, seed):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = problem(device, torch.float32, batch, head_count, length, student, teacher, seed=seed)
    ours = loss_and_gradients(score_loss.score_mse, tensors, way)
    exact = loss_and_gradients(eager.score_mse, tensors, way, dtype=torch.float64)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=2e-5, atol=2e-5 * true.abs().max().item())


@pytest.mark.parametrize("way", WAYS)
def test_layouts_do_not_matter(device, way):
    """Contiguous heads, a slice of joint projections, strided columns, a broadcast head, masks of other types."""
    query, key, teacher_query, teacher_key, mask = problem(device, torch.float32, head_count=2, length=4)
    query = query[:, :1].expand_as(query)
    expected = loss_and_gradients(score_loss.score_mse, (query, key, teacher_query, teacher_key, mask), way)
    joint = torch.stack([t.transpose(1, 2) for t in (query, key)], dim=2).flatten(3)  # [B, L, 2, H * D]
    joint = [joint[:, :, i].unflatten(-1, query.shape[1::2]).transpose(1, 2) for i in range(2)]
    strided = [torch.stack((t, t), dim=-1)[..., 1] for t in (teacher_query, teacher_key)]
    wide_mask = torch.stack((mask, 1 - mask), dim=-1)[..., 0]
    for layout in (
        (query.contiguous(), key.contiguous(), teacher_query, teacher_key, mask.bool()),
        (*joint, *strided, wide_mask),
        (query.contiguous(), key, teacher_query.contiguous(), teacher_key, mask.to(torch.int32)),
        (query, key, teacher_query, teacher_key, mask.float()),
    ):
        for mine, reference in zip(loss_and_gradients(score_loss.score_mse, layout, way), expected, strict=True):
            assert torch.equal(mine, reference)


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("length", [20, 36])
def test_what_padding_holds_does_not_matter_and_gets_no_gradient(device, form, length):
    *tensors, mask = problem(device, torch.float32, length=length, teacher=5)
    mask[:, 6:] = 0  # whole blocks without a real token
    mask[:, 1:3] = 1
    expected = loss_and_gradients(score_loss.score_mse, (*tensors, mask), form)
    padding = (mask == 0)[:, None, :, None]
    garbage = [t.masked_fill(padding, float("nan")) for t in tensors]
    ours = loss_and_gradients(score_loss.score_mse, (*garbage, mask), form)
    for mine, reference in zip(ours, expected, strict=True):
        assert torch.equal(mine, reference)
    assert not ours[1].masked_select(padding).any() and not ours[2].masked_select(padding).any()


@pytest.mark.parametrize("way", WAYS)
def test_nan_and_infinity_in_a_real_token_show_in_the_loss(device, way):
    for value in (float("nan"), float("inf")):
        query, *others, mask = problem(device, torch.float32, length=5, student=3)
        query[0, 0, 2] = value  # position 2 is real
        assert not score_loss.score_mse(query, *others, mask, *WAYS[way]).isfinite()


@pytest.mark.parametrize("form", ["direct", "gram"])
def test_masked_sequences_count_for_nothing_and_a_batch_of_them_is_nan(device, form, check_error):
    *tensors, mask = problem(device, torch.float32, batch=2, length=6)
    mask[0], mask[1, 1:5] = 0, 1
    ours = check_all(check_error, (*tensors, mask), form)
    assert not ours[1][0].any()
    mask[:] = 0
    for mine in loss_and_gradients(score_loss.score_mse, (*tensors, mask), form):
        assert mine.isnan().all()
    assert eager.score_mse(*tensors, mask, "real", form).isnan()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", [(0, 2, 5), (2, 2, 0), (2, 0, 5)])
def test_no_rows(device, way, shape):
    tensors = [torch.randn(*shape, size, device=device) for size in (7, 7, 16, 16)]
    mask = torch.ones(shape[0], shape[2], device=device)
    loss, *gradients = loss_and_gradients(score_loss.score_mse, (*tensors, mask), way)
    assert loss.isnan() and eager.score_mse(*tensors, mask, *WAYS[way]).isnan()
    assert [g.shape for g in gradients] == [tensors[0].shape] * 2


def test_released_scores_at_or_below_the_floor_are_replaced_on_their_own_side(device, dtype, check_error):
    """Scores from -300 to 300: a share of them is replaced in the student, in the teacher, in both, in none."""
    tensors = problem(device, dtype, length=18, student=9, teacher=12, scale=8.0)
    query, key, teacher_query, teacher_key, mask = tensors
    student = query.double() @ key.double().transpose(-1, -2) / 3
    teacher = teacher_query.double() @ teacher_key.double().transpose(-1, -2) / 12**0.5
    low = (student <= -100) & mask.bool()[:, None, None], (teacher <= -100) & mask.bool()[:, None, None]
    assert (low[0] & ~low[1]).any() and (low[1] & ~low[0]).any() and not (student + 100).abs().min() < 1e-3
    check_all(check_error, tensors, "released", floor=8.0)


def test_a_released_score_that_outweighs_the_mask_counts(device, check_error):
    """120 · 100 · 1 - 10000 = 2000 is above the floor, so the masked key's score stays, with its gradient."""
    query, key, teacher = (torch.full((1, 1, 2, 1), value, device=device) for value in (120.0, 100.0, 1.0))
    mask = torch.tensor([[1, 0]], device=device)
    loss, gradient, _ = check_all(check_error, (query, key, teacher, teacher, mask), "released")
    assert loss.item() == pytest.approx((2 * (12000 - 1) ** 2 + 2 * 2000**2) / 4)
    assert gradient.all()


@pytest.mark.parametrize("form", ["direct", "gram"])
def test_a_loss_near_zero_is_within_the_stated_bounds(device, dtype, form):
    """Scores differ by 1e-3 of their size. Direct: each score's roundoff. Gram: that of the terms that cancel."""
    tensors = near(device, dtype, 1e-3)
    ours = loss_and_gradients(score_loss.score_mse, tensors, form)
    exact = loss_and_gradients(eager.score_mse, tensors, form, dtype=torch.float64)
    query, key, *_, mask = tensors
    zeros = torch.zeros_like(query)
    energy, *terms = loss_and_gradients(
        eager.score_mse, (query, key, zeros, zeros, mask), "direct", dtype=torch.float64
    )
    assert 0 < exact[0] < 1e-4 * energy  # energy: Σ A_S² / count; terms: the student's part of each gradient
    allowed = {"direct": 4e-7 * (exact[0] * energy).sqrt(), "gram": 1e-6 * energy}[form]
    assert abs(ours[0] - exact[0]) <= allowed
    parts = 2**-17 if dtype == torch.bfloat16 and form == "gram" else 1e-6
    for mine, true, term in zip(ours[1:], exact[1:], terms, strict=True):
        roundoff = torch.finfo(dtype).eps * true.abs().max()
        assert (mine.double() - true).abs().max() <= 2 * roundoff + 2 * parts * term.abs().max()


def test_equal_student_and_teacher_have_no_loss_and_no_gradient(device, dtype):
    query, key, _, _, mask = problem(device, dtype, length=20, student=24)
    for result in loss_and_gradients(score_loss.score_mse, (query, key, query, key, mask), "direct"):
        assert not result.any()
    for result in loss_and_gradients(score_loss.score_mse, (query, key, query, key, mask), "gram"):
        assert result.abs().max() < 1e-5


@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("scale,factor", [(300.0, 1e-8), (4e-4, 2.0**42)])
def test_scores_far_outside_the_range_of_fp16(device, dtype, form, scale, factor, check_error):
    """Differences of 1e5, and of 1e-7; `factor` brings the gradients into the range of fp16, as loss scaling does."""
    tensors = problem(device, dtype, length=20, student=24, teacher=30, scale=scale)
    loss, *gradients = check_all(check_error, tensors, form, factor=factor, floor=8.0)
    assert loss > 1e10 or loss < 1e-12
    assert all(g.abs().max() > 1e-3 for g in gradients)


def test_the_models_and_even_query_and_key_may_differ_in_dtype(device, check_error):
    for dtypes in ((torch.float32, torch.float16), (torch.float16, torch.float32)):
        query, key, *_, mask = problem(device, dtypes[0], length=9)
        _, _, *teacher, _ = problem(device, dtypes[1], length=9)
        for way in WAYS:
            check_all(check_error, (query, key, *teacher, mask), way)
    query, key, *teacher, mask = problem(device, torch.float32, length=6)
    check_all(check_error, (query, key.half(), teacher[0], teacher[1].half(), mask), "direct")


@pytest.mark.parametrize("way", WAYS)
def test_tf32_where_pytorchs_switch_allows_it(device, monkeypatch, way):
    tensors = problem(device, torch.float32, length=20)
    exact = loss_and_gradients(eager.score_mse, tensors, way, dtype=torch.float64)
    monkeypatch.setattr(score_loss, "input_precision", lambda dtype: "tf32")
    for mine, true in zip(loss_and_gradients(score_loss.score_mse, tensors, way), exact, strict=True):
        assert (mine - true).abs().max() <= 4 * 2**-11 * true.abs().max()


@pytest.mark.parametrize("way", WAYS)
def test_the_value_is_the_same_without_gradients_and_on_every_run(device, way):
    tensors = problem(device, torch.float32, length=34)
    first = loss_and_gradients(score_loss.score_mse, tensors, way)
    second = loss_and_gradients(score_loss.score_mse, tensors, way)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(first[0], score_loss.score_mse(*tensors, *WAYS[way]))


def test_one_of_query_and_key_may_need_the_gradient_alone(device):
    *tensors, mask = problem(device, torch.float32, length=6)
    _, expected, _ = loss_and_gradients(score_loss.score_mse, (*tensors, mask), "direct", factor=1.0)
    query, key, *teacher = tensors
    query.requires_grad_()
    score_loss.score_mse(query, key, *teacher, mask, "real", "direct").backward()
    assert torch.equal(query.grad, expected) and key.grad is None


def test_what_the_kernels_cannot_do_is_refused(device):
    query, key, teacher_query, teacher_key, mask = problem(device, torch.float32, length=5)
    with pytest.raises(ValueError, match="teacher"):
        kernels.score_mse(query, key, teacher_query, teacher_key.requires_grad_(), mask, backend="triton")
    with pytest.raises(ValueError, match="128"):
        wide = torch.randn(2, 2, 5, 129, device=device)
        kernels.score_mse(wide, wide, teacher_query, teacher_key.detach(), mask, backend="triton")
    with pytest.raises(ValueError, match="-100"):
        kernels.score_mse(query, key, teacher_query, teacher_key.detach(), mask, "released", "gram", backend="triton")
    query.requires_grad_()
    loss = score_loss.score_mse(query, key, teacher_query, teacher_key.detach(), mask)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, query, create_graph=True)


@pytest.mark.parametrize("released,gram", [(True, False), (False, True)])
def test_opcheck(device, released, gram):
    query, key, *others = problem(device, torch.float32, length=4, student=3, teacher=5)
    args = (query.requires_grad_(), key.requires_grad_(), *others, released, gram, True)
    torch.library.opcheck(torch.ops.effbert.score_mse.default, args)


def test_compiled_code_gives_the_same(device):
    tensors = problem(device, torch.float32, length=5)
    compiled = torch.compile(score_loss.score_mse, fullgraph=True, backend="aot_eager")
    expected = loss_and_gradients(score_loss.score_mse, tensors, "gram")
    for mine, eagerly in zip(loss_and_gradients(compiled, tensors, "gram"), expected, strict=True):
        assert torch.equal(mine, eagerly)


def test_the_form_is_chosen_by_what_the_tiles_do():
    assert not score_loss.gram_is_cheaper(128, 45, 64)
    assert score_loss.gram_is_cheaper(512, 45, 64)
    for sizes in ((45, 64), (64, 64), (16, 16), (128, 128)):
        chosen = [score_loss.gram_is_cheaper(length, *sizes) for length in range(1, 2048)]
        assert chosen == sorted(chosen)


@pytest.mark.parametrize("way", [*WAYS, "auto"])
def test_three_launches_and_nothing_of_length_times_length(monkeypatch, way):
    shape, sizes, length = (2, 3), [], 4096
    query, key, *teacher = (torch.empty(*shape, length, size, device="meta") for size in (45, 45, 64, 64))
    mask = torch.ones(2, length, dtype=torch.long, device="meta")
    empty = torch.empty

    def measured(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        sizes.append(tensor.numel())
        return tensor

    monkeypatch.setattr(torch, "empty", measured)
    with recording("sm_90") as launches:
        loss = score_loss.score_mse(query.requires_grad_(), key, *teacher, mask, *WAYS.get(way, ("real", "auto")))
        loss.backward()
    form = "gram" if way in ("gram", "auto") else "direct"
    names = [one.name for one in launches]
    assert names == [f"score_mse_{form}_fwd_kernel", "loss_mean_kernel", "score_mse_bwd_kernel"]
    assert max(sizes) == query.numel()


def launched(form, student, teacher, length=128):
    """The arguments of the first launch for sm_90, heads laid out as a model has them."""
    query, key, *others = (
        torch.empty(2, length, 12, size, device="meta", dtype=torch.bfloat16).transpose(1, 2)
        for size in (student, student, teacher, teacher)
    )
    with recording("sm_90") as launches:
        score_loss.score_mse(query, key, *others, torch.ones(2, length, device="meta"), "real", form)
    return launches[0].arguments | launches[0].options


# Which pairs have more short loads than a large tile has registers for is known from builds (bench/results).
@pytest.mark.parametrize(("student", "teacher"), [(63, 39), (105, 7), (25, 83), (55, 120), (96, 36)])
def test_heads_that_take_short_loads_get_smaller_tiles(student, teacher):
    for form, name in (("direct", "BLOCK_N"), ("gram", "STUDENT_COLUMNS")):
        assert launched(form, student, teacher)[name] == 16 < launched(form, 45, 64)[name]


@pytest.mark.parametrize(("length", "warps"), [(128, 8), (64, 8), (32, 4), (16, 4)])
def test_a_tile_cut_to_the_length_keeps_its_warps_down_to_64_rows(length, warps):
    assert launched("direct", 64, 64, length)["num_warps"] == warps


@pytest.mark.parametrize("way", WAYS)
def test_real_is_what_is_not_zero_and_nothing_else_has_influence(device, way):
    tensors = [torch.randn(2, 3, 9, size, device=device) for size in (5, 5, 7, 7)]
    mask = torch.ones(2, 9, dtype=torch.long, device=device)
    mask[1, 4:] = 0
    expected = eager.score_mse(*tensors, mask, *WAYS[way])
    weights = mask * torch.tensor([0.5, 2.0], device=device)[:, None]
    for function in (eager.score_mse, score_loss.score_mse):
        torch.testing.assert_close(function(*tensors, weights, *WAYS[way]), expected)
    if WAYS[way][0] == "real":
        holes = [tensor.clone() for tensor in tensors]
        for tensor in holes:
            tensor[1, :, 4:] = float("nan")
        for function in (eager.score_mse, score_loss.score_mse):
            leaf = holes[0].clone().requires_grad_()
            loss = function(leaf, *holes[1:], mask, *WAYS[way])
            torch.testing.assert_close(loss, expected)
            assert torch.isfinite(torch.autograd.grad(loss, leaf)[0]).all()
