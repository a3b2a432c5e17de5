"""Kernels start on the device of their tensors, whatever CUDA's current device is."""

import contextlib

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effbert.kernels import launch


@pytest.fixture
def devices(monkeypatch):
    """A machine of two GPUs, of which the first is the current one; gives the list that says what is."""
    current = [0]

    @contextlib.contextmanager
    def device(index):
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(launch, "_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", device)
    return current


@pytest.mark.parametrize("name, nested, expected", [("cuda:1", False, 1), ("cuda:1", True, 1), ("cuda:0", False, 0)])
def test_a_kernel_starts_on_the_gpu_of_its_tensors(name, nested, expected, devices):
    started = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: started.append((grid, devices[-1]))

    with FakeTensorMode():
        tensor = torch.empty(3, device=name)
    launch.launch(Kernel(), (2,), 7, (tensor, tensor) if nested else tensor)
    launch.launch(Kernel(), (0,), tensor)
    assert started == [((2,), expected)] and devices == [0]
