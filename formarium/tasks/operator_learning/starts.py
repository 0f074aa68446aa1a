"""Random starts on a line of length 2, as functions of the place, so that a finer grid gets the same start: what PROSE-PDE draws from.

Ranges are those of the released generator's starts for training. Its waves fit the length between the centres of the first and the last
cell; here they fit the whole line, so that they are periodic. Its random draws share keys; here each is a draw of its own.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LENGTH, CELLS = 2.0, 128  # of the line; of the published grid, on which a start's lowest and highest values are read

Start = Callable[[np.ndarray], np.ndarray]


def centres(points: int) -> np.ndarray:
    return (np.arange(points) + 0.5) * LENGTH / points


def closed(f: Start) -> Start:
    """f without the straight line between its ends, repeated."""
    first, last = f(np.array([0.0, LENGTH]))
    slope = (last - first) / LENGTH
    return lambda x: f(x % LENGTH) - slope * (x % LENGTH)


def spanning(f: Start, highest: float = 1.0) -> Start:
    """f moved and scaled to lie between 0 and `highest` on the published grid."""
    values = f(centres(CELLS))
    low, size = values.min(), max(np.ptp(values), 1e-9)
    return lambda x: highest * (f(x) - low) / size


def drawn_waves(rng: np.random.Generator, longest: int, picks: int) -> Start:
    """Sines between 0 and 1: `picks` wave numbers from 1 to `longest` (one that is picked twice counts double), the others constant; one in
    ten folded at zero, half of them upside down, one in ten seen through a smooth window."""
    numbers = np.arange(1, longest + 1) * np.bincount(rng.integers(longest, size=picks), minlength=longest)
    sizes, phases = rng.uniform(size=longest), rng.uniform(0, 2 * np.pi, longest)
    folded, windowed, sign = rng.random() < 0.1, rng.random() < 0.1, rng.choice([-1, 1])
    left, right, soft = rng.uniform(0.1, 0.45), rng.uniform(0.55, 0.9), 0.5

    def f(x: np.ndarray) -> np.ndarray:
        u = (sizes[:, None] * np.sin(2 * np.pi / LENGTH * numbers[:, None] * x + phases[:, None])).sum(0)
        u = sign * (np.abs(u) if folded else u)
        return u * (np.tanh((x - left) / soft) - np.tanh((x - right) / soft)) / 2 if windowed else u

    return spanning(closed(f))


def two_waves(rng: np.random.Generator, highest: float = 1.0) -> Start:
    """Two sines with one or two waves each."""
    numbers, sizes, phases = rng.integers(1, 3, 2), rng.uniform(size=2), rng.uniform(0, 2 * np.pi, 2)
    return spanning(lambda x: (sizes[:, None] * np.sin(2 * np.pi / LENGTH * numbers[:, None] * x + phases[:, None])).sum(0), highest)


def bump(rng: np.random.Generator) -> Start:
    """A bell in the middle, between 0 and 1."""
    height, middle, width = rng.uniform(9, 11), rng.uniform(0.9, 1.1), rng.uniform(0.9, 1.1)
    return spanning(closed(lambda x: np.exp(-height * (x - middle) ** 2 / (2 * width**2))))


def density(rng: np.random.Generator) -> Start:
    """A bell whose values on the published grid add up to 1."""
    middle, width = rng.uniform(0.5, 1.5), rng.uniform(0.1, 0.5)
    f = closed(lambda x: np.exp(-(((x - middle) / width) ** 2)))
    mass = f(centres(CELLS)).sum()
    return lambda x: f(x) / mass
