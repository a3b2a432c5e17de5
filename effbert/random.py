"""Counter-based randomness: every draw is a pure function of (seed, what, ...), never of what was drawn before.

Sampling and shuffling take a numpy Generator over Philox, keyed by the hash of the names of the draw; dropout takes
a 63-bit key of the same kind and expands it inside the kernel (`effbert.kernels.philox`). So a candidate trained
alone, in a population, before or after a resume sees the same numbers.
"""

import contextlib
import contextvars
import hashlib
from collections.abc import Iterator

import numpy as np
import torch

_held: torch.Tensor | None = None
_drawing: contextvars.ContextVar[torch.Generator | None] = contextvars.ContextVar("dropout keys", default=None)


def key(seed: int, *what: str | int) -> int:
    """A 63-bit key for the draw named by `what`, e.g. `key(seed, "dropout", candidate, step)`."""
    text = "\x1f".join([str(int(seed)), *(str(part) for part in what)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *what: str | int) -> np.random.Generator:
    """A numpy Generator for the draw named by `what`; equal names give equal numbers."""
    return np.random.Generator(np.random.Philox(key=key(seed, *what)))


@contextlib.contextmanager
def dropout_key_in(tensor: torch.Tensor | None) -> Iterator[None]:
    """Forward passes inside take the key of their dropout from `tensor`, a 0-d int64 tensor on their device, when they
    run: a recorded step then has a new one each time. With None they draw it."""
    global _held
    outer, _held = _held, tensor
    try:
        yield
    finally:
        _held = outer


def dropout_key() -> int | torch.Tensor:
    """The key of one forward pass's dropout, of 62 bits: what `dropout_key_in` holds, else drawn by `drawn_key`."""
    return drawn_key() if _held is None else _held


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """The dropout keys that are drawn inside, by this thread, follow from `key`."""
    token = _drawing.set(torch.Generator().manual_seed(key))
    try:
        yield
    finally:
        _drawing.reset(token)


def drawn_key() -> int:
    """62 bits from the generator of `seeded`, or torch's default CPU generator."""
    return int(torch.randint(2**62, (), generator=_drawing.get()))
