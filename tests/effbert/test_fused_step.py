"""A whole distillation step, dropout on, gives the same loss and gradients through the kernels as in plain PyTorch."""

from pathlib import Path

import pytest
import torch

from effbert import kernels
from effbert.architecture import Architecture
from effbert.distill import LossWeights, distillation_losses, score_targets
from effbert.model import EffBertConfig, EffBertModel
from effbert.supernet import FULL_STRUCTURE
from effbert.trace import Trace

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CANDIDATE = "linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2), linear2_3(gelu(linear2_3(max(x,tanh(x)),wb1)),wb2)"


def teacher_trace(batch, length):
    generator = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(DEVICE)

    heads = [[normal(batch, 2, length, 20) for _ in range(4)] for _ in range(2)]
    return Trace(tuple(normal(batch, length, 40) for _ in range(5)), tuple(heads[0]), tuple(heads[1]))


def step(backend, weights):
    torch.manual_seed(0)
    config = EffBertConfig(
        architecture=str(Architecture.uniform(FULL_STRUCTURE, 2)),
        vocab_size=50,
        embedding_size=8,
        hidden_size=24,
        intermediate_size=24,
        num_attention_heads=2,
        max_position_embeddings=16,
        fit_size=40,
    )
    model = EffBertModel(config, add_pooling_layer=False).to(DEVICE).train()
    ids = torch.randint(1, 50, (2, 11), device=DEVICE)
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    teacher = teacher_trace(*ids.shape)
    torch.manual_seed(1)  # the dropout key of this step
    with kernels.use_backend(backend), kernels.gradients_in_place():
        targets = score_targets(teacher, 2, weights)
        student = model.trace(ids, mask, architecture=Architecture.parse(CANDIDATE), targets=targets)
        loss = distillation_losses(student, teacher, model.fit_dense, mask, weights).total
        loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("weights", [LossWeights(), LossWeights(loss_mask="released"), LossWeights(score_form="gram")])
def test_a_step_through_the_kernels_is_the_step_in_plain_pytorch(weights, monkeypatch):
    monkeypatch.setenv("EFFBERT_TILES", str(Path(__file__).parents[1] / "fixtures" / "large_tiles.json"))
    expected_loss, expected = step("eager", weights)
    loss, gradients = step("triton", weights)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    for name, gradient in expected.items():
        assert (gradient is None) == (gradients[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
