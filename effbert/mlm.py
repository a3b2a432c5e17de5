"""Masked language modelling: how a teacher is made where none is given.

The vocabulary-wide head runs on the masked positions only, about 15 % of the tokens. Which tokens are masked depends on
(seed, phase, batch) alone.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from effbert import random
from effbert.data.batches import Batch

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


def masked_lm_loss(model: nn.Module, batch: Batch, tokenizer, rng: np.random.Generator) -> torch.Tensor:
    """Mean cross entropy of the chosen tokens for a transformers BertForMaskedLM."""
    ids = batch.input_ids.cpu().numpy()
    maskable = batch.attention_mask.cpu().numpy().astype(bool) & ~np.isin(ids, tokenizer.all_special_ids)
    corrupted, chosen = mask_tokens(ids, maskable, tokenizer.mask_token_id, len(tokenizer), rng)
    device = batch.input_ids.device
    chosen = torch.from_numpy(chosen).to(device)
    hidden = model.bert(
        input_ids=torch.from_numpy(corrupted).to(device),
        attention_mask=batch.attention_mask,
        token_type_ids=batch.token_type_ids,
    ).last_hidden_state
    return F.cross_entropy(model.cls(hidden[chosen]), batch.input_ids[chosen])


def new_bert(config, seed: int) -> nn.Module:
    """A BertForMaskedLM with fresh weights for a transformers BertConfig."""
    from transformers import BertForMaskedLM

    torch.manual_seed(random.key(seed, "teacher", "init"))
    return BertForMaskedLM(config)
