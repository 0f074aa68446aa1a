"""What is done to the columns of a table before a network sees them. Arrays are [rows, columns], NaN is a missing value."""

from __future__ import annotations

import warnings

import numpy as np


def normalise(x: np.ndarray, context: int | None = None) -> np.ndarray:
    """Mean 0 and deviation 1, by the first `context` rows (by default all); cut at +-100."""
    mean, std = _moments(x[:context], ~np.isnan(x[:context]))
    return np.clip((x - mean) / (std + 1e-6), -100, 100)


def clip_outliers(x: np.ndarray, context: int | None = None, sigmas: float = 4.0) -> np.ndarray:
    """Values beyond `sigmas` deviations grow only with their logarithm.

    The bounds come from the first `context` rows, in two goes: the second leaves out what lies beyond the first bounds.
    """
    seen = x[:context]
    mean, std = _moments(seen, ~np.isnan(seen))
    with np.errstate(invalid="ignore"):
        inside = (seen <= mean + sigmas * std) & (seen >= mean - sigmas * std)
    mean, std = _moments(seen, inside)
    log = np.log1p(np.abs(x))
    x = np.maximum(x, mean - sigmas * std - log)
    return np.minimum(x, mean + sigmas * std + np.log1p(np.abs(x)))


def power_transform(x: np.ndarray, context: int) -> np.ndarray:
    """Yeo-Johnson, column by column, fitted on the first `context` rows. A column where that fails stays as it is."""
    from sklearn.preprocessing import PowerTransformer

    x = x.copy()
    with warnings.catch_warnings(), np.errstate(all="raise", under="ignore"):
        warnings.simplefilter("error")
        for column in range(x.shape[1]):
            part = x[:, column : column + 1]
            try:
                done = PowerTransformer().fit(part[:context]).transform(part)
            except (ArithmeticError, ValueError, Warning):
                continue
            if np.array_equal(np.isfinite(done), np.isfinite(part)):
                x[:, column : column + 1] = done
    return x


def varying(x: np.ndarray, context: int) -> np.ndarray:
    """Bool [columns]: those with more than one value in the first `context` rows."""
    return np.array([len(np.unique(column)) > 1 for column in x[:context].T], dtype=bool)


def _moments(x: np.ndarray, counted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and deviation (n - 1) of the counted values of each column."""
    if len(x) > 1 and counted.all():
        with np.errstate(all="ignore"):
            mean, std = x.mean(0), x.std(0, ddof=1)
        if np.isfinite(std).all():
            return mean, std
    number = counted.sum(0)
    with np.errstate(all="ignore"):
        mean = np.where(counted, x, 0).sum(0) / number
        std = np.sqrt((np.where(counted, x - mean, 0) ** 2).sum(0) / (number - 1))
    return np.nan_to_num(mean), np.nan_to_num(std)
