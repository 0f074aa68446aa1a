"""Fields on a line with known equations: four families of partial differential equations, periodic in x over 2 pi, solved spectrally."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise

import numpy as np

from formarium.task import Sample
from formarium.tasks.operator_learning.solvers import rk4
from formarium.tasks.operator_learning.symbols import Node, disturb, encode, rounded, skeleton

COUNTS = {"train": 600, "val": 120}
GRID, STEPS, SEEN, RANGE, NOISE, DIGITS = 32, 48, 16, 3.0, 0.02, 2
WORDS = ("u_x", "u_xx")
U, UX, UXX = Node("u_0"), Node("u_x"), Node("u_xx")


def _mul(*factors: Node | float) -> Node:
    nodes = [f if isinstance(f, Node) else Node(float(f)) for f in factors]
    return nodes[0] if len(nodes) == 1 else Node("mul", (nodes[0], _mul(*nodes[1:])))


def _fisher(a: float, r: float) -> Node:
    """Fisher's: u_t = a u_xx + r u (1 - u)."""
    return Node("add", (_mul(a, UXX), Node("sub", (_mul(r, U), _mul(r, Node("pow2", (U,)))))))


# family -> (right-hand side u_t as a tree of its numbers, their ranges, whether u starts between 0 and 1)
FAMILIES: dict[str, tuple[Callable[..., Node], tuple[tuple[float, float], ...], bool]] = {
    "heat": (lambda a: _mul(a, UXX), ((0.05, 0.3),), False),
    "advection": (lambda a: Node("neg", (_mul(a, UX),)), ((0.3, 1.5),), False),
    "burgers": (lambda a: Node("sub", (_mul(a, UXX), _mul(U, UX))), ((0.08, 0.25),), False),
    "fisher": (_fisher, ((0.02, 0.1), (0.5, 1.5)), True),
}


def derivative(u: np.ndarray, order: int) -> np.ndarray:
    """Of fields [..., grid] over a period of 2 pi, by Fourier."""
    n = u.shape[-1]
    k = np.fft.rfftfreq(n, 1 / n)
    factor = (1j * k) ** order
    if order % 2 and n % 2 == 0:
        factor[-1] = 0  # the highest wave has no odd derivative on this grid
    return np.fft.irfft(np.fft.rfft(u) * factor, n)


def slope(tree: Node, u: np.ndarray) -> np.ndarray:
    """u_t of fields [..., grid] by a right-hand side. KeyError for a variable other than u_0 and its first four derivatives."""
    return tree.evaluate({"u_0": u, **{"u_" + "x" * i: derivative(u, i) for i in range(1, 5)}})


Slope = Callable[[np.ndarray], np.ndarray]

# the same right-hand sides for many fields [n, grid] at once, their numbers [n, 1]
SLOPES: dict[str, Callable[..., np.ndarray]] = {
    "heat": lambda u, a: a * derivative(u, 2),
    "advection": lambda u, a: -a * derivative(u, 1),
    "burgers": lambda u, a: a * derivative(u, 2) - u * derivative(u, 1),
    "fisher": lambda u, a, r: a * derivative(u, 2) + r * u * (1 - u),
}


def solve(slope_of: Slope, start: np.ndarray, times: np.ndarray, substeps: int = 4) -> np.ndarray:
    """Fields [times, ..., grid] from starts [..., grid] by the fourth-order Runge-Kutta method."""
    out, u = [start], start
    for a, b in pairwise(times):
        h = (b - a) / substeps
        for _ in range(substeps):
            u = rk4(u, h, slope_of)
        out.append(u)
    return np.stack(out)


@lru_cache(maxsize=4)
def fields(split: str, count: int, seed: int) -> tuple[Sample, ...]:
    """`count` fields, families in turn: smooth random starts, numbers rounded to what the words can say, the first part seen with noise."""
    rng = np.random.default_rng((seed, 7, [*COUNTS].index(split)))
    t = np.linspace(0, RANGE, STEPS)
    out: dict[int, Sample] = {}
    for first, (family, (make, ranges, unit)) in enumerate(FAMILIES.items()):
        places = range(first, count, len(FAMILIES))
        numbers = np.array([[rounded(rng.uniform(*r), DIGITS) for r in ranges] for _ in places])
        start = _starts(len(places), unit, rng)
        found = solve(partial(_apply, SLOPES[family], numbers), start, t)  # steps n grid
        for n, k in enumerate(places):
            u = found[:, n, :, None]  # steps grid 1
            words = encode([make(*numbers[n].tolist())], DIGITS)
            drawn = rng.standard_normal(u[:SEEN].shape)
            seen = u[:SEEN] + NOISE * np.linalg.norm(u[:SEEN]) / np.linalg.norm(drawn) * drawn
            known = {"t": t, "u": u, "seen": seen, "input_len": SEEN, "dims": 1, "words": words, "guess": disturb(skeleton(words), rng)}
            out[k] = {**known, "id": f"{split}/{family}-{k:04d}", "family": family}
    return tuple(out[k] for k in range(count))


def _apply(slope_of: Callable[..., np.ndarray], numbers: np.ndarray, u: np.ndarray) -> np.ndarray:
    return slope_of(u, *(column[:, None] for column in numbers.T))


def _starts(count: int, unit: bool, rng: np.random.Generator) -> np.ndarray:
    """Smooth random fields [count, grid] of three waves, between -1 and 1, or (unit) 0.1 and 0.9."""
    x = np.arange(GRID) * 2 * np.pi / GRID
    waves = sum(rng.normal(size=(count, 1)) / m * np.sin(m * x + rng.uniform(0, 2 * np.pi, (count, 1))) for m in (1, 2, 3))
    waves = waves / np.abs(waves).max(1, keepdims=True)
    return 0.5 + 0.4 * waves if unit else waves
