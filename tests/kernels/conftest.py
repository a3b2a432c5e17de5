"""What tests of kernels share: where they run, poisoned memory, and the rule that bounds an error.

On a machine without a GPU Triton's interpreter runs the kernels, in fp32 and fp16 (its bf16 products are wrong); on one
with a GPU the same tests run there, with bf16 added.
"""

import pytest
import torch

GPU = torch.cuda.is_available()
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if GPU else (torch.float32, torch.float16)


@pytest.fixture
def device():
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


def _poisoned(function):
    def empty(*args, **kwargs):
        tensor = function(*args, **kwargs)
        if tensor.device.type == "meta" or type(tensor) is not torch.Tensor:
            return tensor
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 113)

    return empty


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch):
    """torch.empty gives NaN: a kernel that leaves an element unwritten, or reads one, is seen."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))


def check_error(
    ours: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, floor: float | None = None, what: str = ""
):
    """The rule: the largest error of ours is at most twice that of plain PyTorch in the same type, plus a floor.

    exact: the same in float64. The floor is `floor` units of roundoff of our dtype at the largest exact value: 4, but
    32 in fp32, where the order of a long sum whose terms cancel moves that many.
    """
    if floor is None:
        floor = 32.0 if ours.dtype == torch.float32 else 4.0
    assert ours.shape == exact.shape, (what, ours.shape, exact.shape)
    assert torch.isfinite(ours).all(), f"{what}: not finite"
    if ours.numel() == 0:
        return
    exact = exact.to(ours.device)
    mine = (ours.double() - exact).abs().max().item()
    theirs = (plain.double() - exact).abs().max().item()
    allowed = 2 * theirs + floor * torch.finfo(ours.dtype).eps * exact.abs().max().item()
    assert mine <= allowed, f"{what}: error {mine:.3e}, plain {theirs:.3e}, allowed {allowed:.3e}"


@pytest.fixture(name="check_error")
def check_error_fixture():
    return check_error
