"""Dropout masks from Philox4x32-7: a mask element is a pure function of (key, site, row, column).

One Philox call gives 128 bits, read as eight 16-bit lanes, so it decides eight neighbouring columns. The counter is
(column // 8, row, site, 0), rows being all leading dimensions flattened; lane j of a call is the low (even j) or high
(odd j) half of word j // 2, and the element is kept where lane >= round(p * 65536). Any backend that follows these
three lines drops the same elements. Seven rounds are the smallest number that passes BigCrush (Salmon et al. 2011,
"Parallel random numbers: as easy as 1, 2, 3").
"""

from typing import NamedTuple

import torch

ROUNDS = 7
_MASK = 0xFFFFFFFF
_MULTIPLY_0, _MULTIPLY_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


class Dropout(NamedTuple):
    """Dropout of probability `p` at one place: `key` names the step (63 bits), `site` the place in the model.

    A key may be a 0-d int64 tensor on the data's device instead: a captured CUDA graph then reads a new one each time.
    """

    p: float
    key: int | torch.Tensor
    site: int


def split(dropout: Dropout | None) -> tuple[float, int, torch.Tensor | None, int]:
    """(p, key, key tensor, site) as arguments of an op's schema: one of the keys is unused. None has p = 0."""
    if dropout is None:
        return 0.0, 0, None, 0
    if isinstance(dropout.key, torch.Tensor):
        return dropout.p, 0, dropout.key, dropout.site
    return dropout.p, dropout.key, None, dropout.site


def _bounded(word):
    """An int below 2**32; of a tensor, whose elements cannot outgrow 64 bits, the upper half is cut off at the end."""
    return word if isinstance(word, torch.Tensor) else word & _MASK


def philox(c0, c1, c2, c3, key: int | torch.Tensor, rounds: int = ROUNDS):
    """Philox4x32 of four counter words (ints or int64 tensors that broadcast, each below 2**32); four words back."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(rounds):
        product_0, product_1 = c0 * _MULTIPLY_0, c2 * _MULTIPLY_1  # 64 bits that may wrap into the sign
        c0, c1 = ((product_1 >> 32) ^ c1 ^ k0) & _MASK, _bounded(product_1)
        c2, c3 = ((product_0 >> 32) ^ c3 ^ k1) & _MASK, _bounded(product_0)
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1 & _MASK, c2, c3 & _MASK


def keep_mask(shape, dropout: Dropout, device=None) -> torch.Tensor:
    """Boolean mask of `shape` [..., columns], True = keep."""
    columns = shape[-1]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    blocks = -(-columns // 8)
    column_block = torch.arange(blocks, device=device)
    row = torch.arange(rows, device=device)[:, None]
    words = torch.broadcast_tensors(*philox(column_block, row, dropout.site, 0, dropout.key))
    least = threshold(dropout.p)
    kept = torch.stack([lane >= least for word in words for lane in (word & 0xFFFF, word >> 16)], dim=-1)
    return kept.view(rows, blocks * 8)[:, :columns].reshape(shape)


def threshold(p: float) -> int:
    """Lanes below this are dropped, at most 65535; the probability that is really used is threshold / 65536."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability {p}: it must be at least 0 and below 1")
    return min(round(p * 65536), 65535)


def apply(x: torch.Tensor, dropout: Dropout | None, keep: torch.Tensor | None = None) -> torch.Tensor:
    """Dropout of x [..., columns] with inverse scaling; None or p = 0 returns x itself. Where dropout is on, elements
    that `keep`, a boolean mask that broadcasts, leaves out become 0 too."""
    if dropout is None or threshold(dropout.p) == 0:
        return x
    scale, mask = 65536 / (65536 - threshold(dropout.p)), keep_mask(x.shape, dropout, x.device)
    return x * ((mask if keep is None else mask & keep).to(x.dtype) * scale)
