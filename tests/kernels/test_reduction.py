"""Sums of partial gradients: any number of parts, shapes and targets in one launch, exact, in fixed order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert.kernels import launch
from effbert.kernels.reduction import JOBS, reduce_partials


def integers(*shape, device="cpu"):
    return torch.randint(-8, 9, shape, device=device).float()


def test_sums_of_many_shapes_are_exact_in_one_launch(device):
    shapes = [(1, 7), (3, 5, 6), (8, 4, 12), (9, 135), (40, 3, 5), (150, 33), (0, 9), (300, 1)]
    partials = [integers(*shape, device=device) for shape in shapes]
    targets = [torch.empty(shape[1:], device=device) for shape in shapes]
    reduce_partials(partials, targets, accumulate=False)
    for partial, target in zip(partials, targets, strict=True):
        assert torch.equal(target, partial.sum(dim=0))


@settings(deadline=None, max_examples=8)
@given(st.lists(st.tuples(st.integers(0, 140), st.integers(1, 3), st.integers(1, 20)), min_size=1, max_size=3))
def test_any_shape(shapes):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    partials = [integers(*shape, device=device) for shape in shapes]
    targets = [torch.empty(shape[1:], device=device) for shape in shapes]
    reduce_partials(partials, targets, accumulate=False)
    for partial, target in zip(partials, targets, strict=True):
        assert torch.equal(target, partial.sum(dim=0))


def test_targets_may_be_slices_of_several_types_and_nothing_else_is_touched(device):
    parent = torch.full((9, 20), 5.0, device=device)
    partials = [integers(6, 4, 12, device=device), integers(3, 10, device=device), integers(3, 10, device=device)]
    half, bfloat = (torch.empty(10, dtype=dtype, device=device) for dtype in (torch.float16, torch.bfloat16))
    reduce_partials(partials, [parent[2:6, 3:15], half, bfloat], accumulate=False)
    expected = torch.full((9, 20), 5.0, device=device)
    expected[2:6, 3:15] = partials[0].sum(dim=0)
    assert torch.equal(parent, expected)
    assert torch.equal(half, partials[1].sum(dim=0).half())
    assert torch.equal(bfloat, partials[2].sum(dim=0).bfloat16())


def test_accumulating_adds_to_what_is_there(device, dtype):
    partial = integers(5, 3, 8, device=device)
    parent = integers(6, 9, device=device).to(dtype)
    before = parent.clone()
    reduce_partials([partial], [parent[1:4, :8]], accumulate=True)
    before[1:4, :8] += partial.sum(dim=0).to(dtype)
    assert torch.equal(parent, before)


def test_more_jobs_than_one_launch_takes(device):
    partials = [integers(2, n + 1, device=device) for n in range(JOBS + 2)]
    targets = [torch.empty(n + 1, device=device) for n in range(JOBS + 2)]
    reduce_partials(partials, targets, accumulate=False)
    for partial, target in zip(partials, targets, strict=True):
        assert torch.equal(target, partial.sum(dim=0))


def test_the_sum_is_as_good_as_torchs_and_the_same_on_every_run(device, check_error):
    partial = torch.randn(200, 50, device=device)
    first, second = torch.empty(50, device=device), torch.empty(50, device=device)
    for target in (first, second):
        reduce_partials([partial], [target], accumulate=False)
    check_error(first, partial.sum(dim=0), partial.double().sum(dim=0))
    assert torch.equal(first, second)


def test_nan_and_infinity_reach_their_elements_alone(device):
    partial = torch.ones(4, 6, device=device)
    partial[1, 2], partial[3, 4] = float("nan"), float("inf")
    target = torch.empty(6, device=device)
    reduce_partials([partial], [target], accumulate=False)
    assert target.isnan().nonzero().tolist() == [[2]]
    assert target.isinf().nonzero().tolist() == [[4]]


def test_targets_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"target \[4\].*contiguous"):
        reduce_partials([torch.zeros(2, 5)], [torch.zeros(4)], accumulate=False)
    with pytest.raises(ValueError, match="contiguous columns"):
        reduce_partials([torch.zeros(2, 5, 4)], [torch.zeros(4, 5).t()], accumulate=False)


def test_one_launch_for_up_to_jobs_sums():
    def empty(*shape):
        return torch.empty(shape, device="meta")

    with launch.recording("sm_90") as launches:
        reduce_partials([empty(9, 4, 5)] * JOBS, [empty(4, 5)] * JOBS, accumulate=True)
        reduce_partials([], [], accumulate=False)
    assert len(launches) == 1
