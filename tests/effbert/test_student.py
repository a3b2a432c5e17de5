"""What a step of distillation keeps in memory, as it is counted and as PyTorch keeps it."""

import pytest
import torch

from effbert.data.batches import WHOLE
from effbert.distill import LossWeights, distillation_losses, score_targets
from effbert.model import EffBertConfig, new_student
from effbert.student import step_bytes
from effbert.trace import Trace

STACKED = "tanh(linear1_4(mul(linear1_4(mul(gelu(x),tanh(x)),wb1),sigmoid(x)),wb2))"


@pytest.mark.parametrize("hidden,heads,texts,length,teacher", [(192, 12, 8, 32, 384), (64, 4, 2, 128, 96)])
@pytest.mark.parametrize("mlp", [STACKED, "linear1_1(gelu(linear1_1(x,wb1)),wb2)"])
def test_a_step_keeps_no_more_than_is_counted_and_not_much_less(hidden, heads, texts, length, teacher, mlp):
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": hidden, "fit_size": teacher}
    config = EffBertConfig(architecture=", ".join([mlp] * 3), vocab_size=50, embedding_size=16, **sizes)
    assert config.hidden_dropout_prob and config.attention_probs_dropout_prob
    model, weights = new_student(config, "classification", ("a", "b")).train(), LossWeights()
    shape = texts, heads, length, teacher // heads
    states, queries, keys = (
        tuple(torch.randn(*size) for _ in range(count))
        for size, count in (((texts, length, teacher), 4), (shape, 3), (shape, 3))
    )
    target = Trace(states, queries, keys, torch.randn(texts, 2))
    ids, mask = torch.randint(5, 50, (texts, length)), torch.ones(texts, length, dtype=torch.long)
    mask[:, length - 3 :] = 0
    kept: list[torch.Tensor] = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trace = model.trace(ids, mask, torch.zeros_like(ids), targets=score_targets(target, 3, weights))
        distillation_losses(trace, target, model.effbert.fit_dense, mask, weights, "classification", None, WHOLE)
    others = {x.data_ptr() for x in (*model.parameters(), *states, *queries, *keys)}
    found = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    measured = sum(size for place, size in found.items() if place not in others)
    assert measured <= step_bytes(config, texts, length) <= 2 * measured
