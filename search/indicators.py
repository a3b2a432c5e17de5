"""Encodings as features: codes are names, not quantities, so each value that a column has shown gets an indicator."""

import numpy as np


class Indicators:
    """From codes [M, D] to float64 [M, F]: a 1 for each value that a column has, of the values it had in `codes`.

    A value that `codes` [N, D] did not show in its column sets none of that column's indicators.
    """

    def __init__(self, codes: np.ndarray):
        self._levels = [np.unique(column) for column in codes.T]

    def __call__(self, codes: np.ndarray) -> np.ndarray:
        columns = [codes[:, i, None] == levels for i, levels in enumerate(self._levels)]
        return np.concatenate(columns, axis=1).astype(float)
