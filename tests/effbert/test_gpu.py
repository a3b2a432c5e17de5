"""On a GPU the same step gives the same numbers: masks to the bit, losses and gradients to fp32 rounding."""

import pytest
import torch

from effbert.distill import LossWeights, distillation_losses
from effbert.kernels import Dropout, philox

pytestmark = pytest.mark.gpu


def test_dropout_masks_are_those_of_the_cpu():
    dropout = Dropout(0.1, 0x1234567890ABCDEF >> 1, 9)
    assert torch.equal(philox.keep_mask((77, 541), dropout, "cuda").cpu(), philox.keep_mask((77, 541), dropout))


def test_losses_and_gradients_are_those_of_the_cpu(parity):
    outcomes = []
    for device in ("cpu", "cuda"):
        supernet, teacher = parity.supernet().to(device), parity.teacher().to(device)
        inputs = [x.to(device) for x in parity.inputs]
        student = supernet.trace(*inputs, parity.architectures["released_tail"], "mnli")
        losses = distillation_losses(
            student, teacher.trace(*inputs), supernet.effbert.fit_dense, inputs[1], LossWeights(), "classification"
        )
        losses.total.backward()
        gradients = {name: p.grad.cpu() for name, p in supernet.named_parameters() if p.grad is not None}
        outcomes.append((losses.total.item(), gradients))
    (cpu_loss, cpu), (gpu_loss, gpu) = outcomes
    assert gpu_loss == pytest.approx(cpu_loss, rel=1e-5)
    assert cpu.keys() == gpu.keys()
    for name, gradient in cpu.items():
        torch.testing.assert_close(gpu[name], gradient, rtol=1e-3, atol=1e-5)
