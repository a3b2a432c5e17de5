"""Counter-based randomness: every draw is a pure function of (seed, what, ...), never of what was drawn before.

Sampling and shuffling take a numpy Generator over Philox, keyed by the hash of the names of the draw; dropout takes
a 63-bit key of the same kind and expands it inside the kernel (`effbert.kernels.philox`). So a candidate trained
alone, in a population, before or after a resume sees the same numbers.
"""

import hashlib

import numpy as np


def key(seed: int, *what: str | int) -> int:
    """A 63-bit key for the draw named by `what`, e.g. `key(seed, "dropout", candidate, step)`."""
    text = "\x1f".join([str(int(seed)), *(str(part) for part in what)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *what: str | int) -> np.random.Generator:
    """A numpy Generator for the draw named by `what`; equal names give equal numbers."""
    return np.random.Generator(np.random.Philox(key=key(seed, *what)))
