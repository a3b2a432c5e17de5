"""Soft cross entropy in Triton against the plain form: 2 classes to a vocabulary, masks, spans, extreme logits."""

import mmap
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert import kernels
from effbert.kernels import eager
from effbert.kernels.logit_loss import soft_cross_entropy

FACTOR = 3.0  # the loss's own gradient


def logits(device, dtype, rows, classes, scale=2.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(scale * torch.randn(rows, classes, generator=generator)).to(dtype).to(device) for _ in range(2)]


def with_gaps(rows, classes, device):
    """Every third class masked, in other places in every row, and the last row down to one class."""
    mask = (torch.arange(rows * classes).reshape(rows, classes) % 3 != 1).long()
    mask[-1] = 0
    mask[-1, 0] = 1
    return mask.to(device)


def loss_and_gradient(loss, student, teacher, *options, dtype=None):
    student = student.detach().to(dtype or student.dtype).requires_grad_()
    value = loss(student, teacher.to(dtype or teacher.dtype), *options)
    return value.detach(), *torch.autograd.grad(FACTOR * value, student)


def check_both(check_error, student, teacher, *options, floor=4.0):
    ours = loss_and_gradient(soft_cross_entropy, student, teacher, *options)
    plain = loss_and_gradient(eager.soft_cross_entropy, student, teacher, *options)
    exact = loss_and_gradient(eager.soft_cross_entropy, student, teacher, *options, dtype=torch.float64)
    for name, *values in zip(("loss", "gradient"), ours, plain, exact, strict=True):
        check_error(*values, floor=floor, what=name)
    assert ours[0].shape == () and ours[0].dtype == torch.float32
    assert ours[1].dtype == student.dtype


@pytest.mark.parametrize("rows,classes", [(3, 3), (9, 2), (5, 20)])
def test_loss_and_gradient_are_as_plain_pytorchs(device, dtype, rows, classes, check_error):
    check_both(check_error, *logits(device, dtype, rows, classes), 2.0)


@pytest.mark.parametrize("mean_over_kept", [True, False])
@pytest.mark.parametrize("rows", [2, 9])
def test_masked_classes_get_no_probability(device, dtype, rows, mean_over_kept, check_error):
    mask = with_gaps(rows, 11, device)
    student, teacher = logits(device, dtype, rows, 11)
    check_both(check_error, student, teacher, 0.7, mask, mean_over_kept)
    gradient = loss_and_gradient(soft_cross_entropy, student, teacher, 0.7, mask.bool(), mean_over_kept)[1]
    assert (gradient[mask == 0] == 0).all()


def test_rows_with_no_class_left(device, check_error):
    student, teacher = logits(device, torch.float32, 3, 11)
    mask = with_gaps(3, 11, device)
    mask[1] = 0
    check_both(check_error, student, teacher, 1.0, mask)
    mask[:] = 0
    assert soft_cross_entropy(student, teacher, 1.0, mask) == eager.soft_cross_entropy(student, teacher, 1.0, mask)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(st.integers(1, 10), st.integers(1, 30), st.sampled_from([0.5, 1.0, 4.0]), st.booleans(), st.sampled_from([1, 2]))
def test_any_shape(rows, classes, temperature, masked, step):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    student, teacher = (z[:, ::step] for z in logits(device, torch.float32, rows, classes * step))
    mask = with_gaps(rows, classes, device) if masked else None
    ours = loss_and_gradient(soft_cross_entropy, student, teacher, temperature, mask)
    exact = loss_and_gradient(eager.soft_cross_entropy, student, teacher, temperature, mask, dtype=torch.float64)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-5, atol=1e-6)


def test_both_sides_of_span_logits(device, dtype, check_error):
    student, teacher = (z.reshape(5, 11, 2) for z in logits(device, dtype, 5, 22))
    mask = with_gaps(5, 11, device)
    for side in (0, 1):
        check_both(check_error, student[..., side], teacher[..., side], 1.0, mask)
    check_both(check_error, student[..., 0], teacher.transpose(0, 1).contiguous().transpose(0, 1)[..., 0].float())


def test_a_vocabulary_in_chunks(device, dtype, check_error):
    check_both(check_error, *logits(device, dtype, 2, 523, scale=5.0), 1.5)


@pytest.mark.parametrize("scale", [1e-3, 1e4])
def test_small_and_large_logits(device, dtype, scale, check_error):
    check_both(check_error, *logits(device, dtype, 5, 20, scale=scale))
    student, teacher = logits(device, dtype, 5, 20, scale=scale)
    student[:, 9] = teacher[:, 9] = 6e4  # the maximum rises late, far above what exp() can take
    check_both(check_error, student, teacher)


def test_equal_logits_have_no_gradient(device, dtype):
    student, _ = logits(device, dtype, 5, 20)
    assert (loss_and_gradient(soft_cross_entropy, student, student)[1] == 0).all()


def test_nan_and_infinity_show(device):
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in (0, 19):
            student, teacher = logits(device, torch.float32, 1, 20)
            student[0, place] = bad
            assert not soft_cross_entropy(student, teacher).isfinite()
            if bad != -float("inf"):
                student, teacher = logits(device, torch.float32, 1, 20)
                teacher[0, place] = bad
                assert not soft_cross_entropy(student, teacher).isfinite()


def test_a_class_that_the_teacher_excludes(device, check_error):
    student, teacher = logits(device, torch.float32, 5, 20)
    teacher[:, :9] = -float("inf")  # more than a whole block of columns
    check_both(check_error, student, teacher)


def test_no_rows_and_more_dimensions(device):
    assert soft_cross_entropy(*logits(device, torch.float32, 0, 3)).isnan()
    student, teacher = logits(device, torch.float32, 6, 5)
    nested = soft_cross_entropy(student.reshape(2, 3, 5), teacher.reshape(2, 3, 5))
    assert nested == soft_cross_entropy(student, teacher)


def test_wrong_input_is_refused_in_one_line(device):
    student, teacher = logits(device, torch.float32, 2, 3)
    with pytest.raises(ValueError, match="teacher tensor requires grad"):
        kernels.soft_cross_entropy(student, teacher.clone().requires_grad_(), backend="triton")
    with pytest.raises(ValueError, match=r"mask is \[3\]"):
        kernels.soft_cross_entropy(student, teacher, 1.0, torch.ones(3, device=device), backend="triton")
    with pytest.raises(TypeError, match="float64"):
        kernels.soft_cross_entropy(student.double(), teacher, backend="triton")


def test_registered_op_passes_opcheck_and_compiles(device):
    student, teacher = logits(device, torch.float32, 3, 4)
    student.requires_grad_()
    mask = with_gaps(3, 4, device)
    torch.library.opcheck(torch.ops.effbert.soft_cross_entropy.default, (student, teacher, 2.0, mask, True, True))
    compiled = torch.compile(soft_cross_entropy, fullgraph=True, backend="aot_eager")
    mine, expected = (
        torch.autograd.grad(loss(student, teacher, 2.0), student)[0] for loss in (compiled, soft_cross_entropy)
    )
    torch.testing.assert_close(mine, expected, rtol=0, atol=0)


def test_dispatch_reaches_it(device):
    student, teacher = logits(device, torch.float32, 3, 4)
    mine, plain = (kernels.soft_cross_entropy(student, teacher, backend=name) for name in ("triton", "eager"))
    torch.testing.assert_close(mine, plain)


@pytest.mark.skipif(torch.cuda.is_available() or sys.platform != "linux", reason="6 GB of which Linux gives two pages")
def test_classes_may_lie_more_than_32_bits_apart():
    step = 2**30
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE, which Python 3.11 has no name for
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (3 * step + 2), flags=flags), dtype=torch.float16)
    student = memory.as_strided((2, 4), (1, step))
    student.copy_(torch.randn(2, 4))
    teacher, mask = torch.randn(2, 4).half(), torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1]])
    torch.testing.assert_close(
        soft_cross_entropy(student, teacher, 2.0, mask), eager.soft_cross_entropy(student, teacher, 2.0, mask)
    )
