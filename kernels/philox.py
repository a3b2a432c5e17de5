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


def _multiply(constant, value):
    product = value * constant  # 64 bits that may wrap into the sign: the masks below undo that
    return (product >> 32) & _MASK, product & _MASK


def philox(c0, c1, c2, c3, key: int | torch.Tensor, rounds: int = ROUNDS):
    """Philox4x32 of four counter words (ints or int64 tensors that broadcast, each below 2**32); four words back."""
    k0, k1 = key & _MASK, (key >> 32) & _MASK
    for _ in range(rounds):
        high_0, low_0 = _multiply(_MULTIPLY_0, c0)
        high_1, low_1 = _multiply(_MULTIPLY_1, c2)
        c0, c1, c2, c3 = high_1 ^ c1 ^ k0, low_1, high_0 ^ c3 ^ k1, low_0
        k0, k1 = (k0 + _WEYL_0) & _MASK, (k1 + _WEYL_1) & _MASK
    return c0, c1, c2, c3


def keep_mask(shape, dropout: Dropout, device=None) -> torch.Tensor:
    """Boolean mask of `shape` [..., columns], True = keep."""
    columns = shape[-1]
    rows = 1
    for size in shape[:-1]:
        rows *= size
    blocks = -(-columns // 8)
    column_block = torch.arange(blocks, device=device)
    row = torch.arange(rows, device=device)[:, None]
    words = torch.stack(torch.broadcast_tensors(*philox(column_block, row, dropout.site, 0, dropout.key)), dim=-1)
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=-1).view(rows, blocks * 8)
    return (lanes[:, :columns] >= threshold(dropout.p)).view(shape)


def threshold(p: float) -> int:
    """Lanes below this are dropped; the probability that is really used is threshold / 65536."""
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability {p}: it must be at least 0 and below 1")
    return round(p * 65536)


def apply(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Dropout of x [..., columns] with inverse scaling; None or p = 0 returns x itself."""
    if dropout is None or threshold(dropout.p) == 0:
        return x
    scale = 65536 / (65536 - threshold(dropout.p))
    return x * (keep_mask(x.shape, dropout, x.device).to(x.dtype) * scale)
