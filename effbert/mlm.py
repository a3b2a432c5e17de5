"""Masked language modelling: how a teacher is made where none is given.

The vocabulary-wide head runs on the masked positions only, about 15 % of the tokens. Which tokens are masked depends on
(seed, epoch, batch) alone, and they are masked on the host, before a batch goes to its device.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from effbert import random
from effbert.data.batches import BatchPlan

MASKED, RANDOM, KEPT = 0.8, 0.1, 0.1  # of the chosen tokens, as in BERT
CHOSEN = 0.15


def mask_tokens(
    input_ids: np.ndarray, maskable: np.ndarray, mask_token_id: int, vocab_size: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """BERT's corruption of token ids [B, L]: (corrupted ids, chosen [B, L] bool); special tokens are not maskable."""
    draw = rng.random(input_ids.shape)
    chosen = (draw < CHOSEN) & maskable
    if maskable.any() and not chosen.any():
        chosen[np.unravel_index(np.where(maskable, draw, 2.0).argmin(), draw.shape)] = True
    how = rng.random(input_ids.shape)
    corrupted = np.where(chosen & (how < MASKED), mask_token_id, input_ids)
    replace = chosen & (how >= MASKED) & (how < MASKED + RANDOM)
    return np.where(replace, rng.integers(0, vocab_size, input_ids.shape), corrupted), chosen


@dataclass(frozen=True)
class MaskedBatch:
    """B corrupted rows padded to length L, and the N tokens to be found in them.

    input_ids, attention_mask, token_type_ids: int64 [B, L]. positions: int64 [N], where the chosen tokens are in the
    flattened rows. targets: int64 [N], what they were. tokens: ids that are no padding.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    token_type_ids: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    tokens: int

    def to(self, device: torch.device | str) -> "MaskedBatch":
        """On `device`."""
        *tensors, tokens = vars(self).values()
        return MaskedBatch(*(tensor.to(device, non_blocking=True) for tensor in tensors), tokens)


class MaskedPlan:
    """The batches of a plan, masked: what is hidden in batch i depends on (seed, epoch, i) alone."""

    def __init__(self, plan: BatchPlan, tokenizer, seed: int, epoch: int):
        self.plan, self.tokenizer, self.seed, self.epoch = plan, tokenizer, seed, epoch

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> MaskedBatch:
        batch, tokenizer = self.plan[index], self.tokenizer
        rng = random.generator(self.seed, "teacher", "mask", self.epoch, index)
        ids = batch.input_ids.numpy()
        maskable = batch.attention_mask.numpy().astype(bool) & ~np.isin(ids, tokenizer.all_special_ids)
        corrupted, chosen = mask_tokens(ids, maskable, tokenizer.mask_token_id, len(tokenizer), rng)
        positions = np.flatnonzero(chosen)
        return MaskedBatch(
            torch.from_numpy(corrupted),
            batch.attention_mask,
            batch.token_type_ids,
            torch.from_numpy(positions),
            torch.from_numpy(ids.ravel()[positions]),
            batch.tokens,
        )


def masked_lm_loss(model: nn.Module, batch: MaskedBatch) -> torch.Tensor:
    """Mean cross entropy of the chosen tokens for a transformers BertForMaskedLM; 0 where a batch has none."""
    hidden = model.bert(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, token_type_ids=batch.token_type_ids
    ).last_hidden_state
    chosen = hidden.flatten(0, 1).index_select(0, batch.positions)
    return F.cross_entropy(model.cls(chosen), batch.targets, reduction="sum") / max(1, len(batch.targets))


def new_bert(config, seed: int) -> nn.Module:
    """A BertForMaskedLM with fresh weights for a transformers BertConfig."""
    from transformers import BertForMaskedLM

    torch.manual_seed(random.key(seed, "teacher", "init"))
    return BertForMaskedLM(config)
