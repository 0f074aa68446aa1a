"""Sample data with known equations: three families of planar systems, their numbers and starts drawn, solved with scipy, seen with
noise."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data, Sample
from formarium.tasks.operator_learning import families, fields, fluids
from formarium.tasks.operator_learning.data import Trajectories
from formarium.tasks.operator_learning.symbols import Node, disturb, encode, fluid_vocabulary, rounded, skeleton, vocabulary

COUNTS = {"train": 900, "val": 150}
STEPS, SEEN, RANGE, NOISE, SPREAD, DIGITS = 64, 24, 6.0, 0.02, 0.2, 2

U, V = Node("u_0"), Node("u_1")


def times(*factors: Node | float) -> Node:
    nodes = [f if isinstance(f, Node) else Node(float(f)) for f in factors]
    return nodes[0] if len(nodes) == 1 else Node("mul", (nodes[0], times(*nodes[1:])))


def oscillator(a: float, b: float) -> list[Node]:
    """A damped oscillator: u' = v, v' = -a u - b v."""
    return [V, Node("add", (times(-a, U), times(-b, V)))]


def predation(a: float, b: float, c: float, d: float) -> list[Node]:
    """Lotka and Volterra's prey and predators: u' = a u - b u v, v' = c u v - d v."""
    return [Node("sub", (times(a, U), times(b, U, V))), Node("sub", (times(c, U, V), times(d, V)))]


def growth(a: float, b: float, c: float, d: float) -> list[Node]:
    """Logistic growth, twice: u' = a u - b u^2, v' = c v - d v^2."""
    return [Node("sub", (times(x, s), times(y, Node("pow2", (s,))))) for x, y, s in ((a, b, U), (c, d, V))]


# family -> (its equations, its usual numbers, lowest and highest start)
FAMILIES: dict[str, tuple[Callable[..., list[Node]], tuple[float, ...], tuple[float, float]]] = {
    "oscillator": (oscillator, (4.0, 0.3), (-2.0, 2.0)),
    "predation": (predation, (1.5, 1.0, 1.0, 1.2), (0.5, 2.0)),
    "growth": (growth, (1.2, 0.6, 0.8, 0.5), (0.1, 0.6)),
}


@lru_cache(maxsize=4)
def trajectories(split: str, count: int, seed: int) -> tuple[Sample, ...]:
    """`count` trajectories, families in turn: numbers within 20 percent of the usual ones, rounded to what the words can say."""
    from scipy.integrate import solve_ivp

    rng = np.random.default_rng((seed, list(COUNTS).index(split)))
    t = np.linspace(0, RANGE, STEPS)
    out: list[Sample] = []
    for k in range(count):
        family = list(FAMILIES)[k % len(FAMILIES)]
        make, usual, (low, high) = FAMILIES[family]
        numbers = [rounded(x * rng.uniform(1 - SPREAD, 1 + SPREAD), DIGITS) for x in usual]
        start = rng.uniform(low, high, 2)
        if family == "oscillator":
            start *= 1.0 if np.linalg.norm(start) > 0.5 else 0.5 / (np.linalg.norm(start) + 1e-9)
        field = _fields[family]
        u = solve_ivp(field, (0, RANGE), start, t_eval=t, args=tuple(numbers), rtol=1e-6, atol=1e-8).y.T
        words = encode(make(*numbers), DIGITS)
        drawn = rng.standard_normal((SEEN, 2))
        seen = u[:SEEN] + NOISE * np.linalg.norm(u[:SEEN]) / np.linalg.norm(drawn) * drawn
        guess = disturb(skeleton(words), rng)
        sample = {"t": t, "u": u, "seen": seen, "input_len": SEEN, "dims": 2, "words": words, "guess": guess}
        out.append({**sample, "id": f"{split}/{family}-{k:04d}", "family": family})
    return tuple(out)


_fields: dict[str, Callable[..., Any]] = {
    "oscillator": lambda t, s, a, b: (s[1], -a * s[0] - b * s[1]),
    "predation": lambda t, s, a, b, c, d: (a * s[0] - b * s[0] * s[1], c * s[0] * s[1] - d * s[1]),
    "growth": lambda t, s, a, b, c, d: (a * s[0] - b * s[0] ** 2, c * s[1] - d * s[1] ** 2),
}


def sample(name: str, seed: int = 0) -> Data:
    """`odes`: 900 and 150 trajectories of three families in two dimensions. `pdes`: 600 and 120 fields on 32 points, four families
    (fields.py). `pdes20`: 400 and 80 fields on 64 points, all families of PROSE-PDE (families.py). `fluids`: 300 and 60 flows on 16 by 16
    points (fluids.py). Raises UnknownName for other names."""
    if name in ("pdes20", "fluids"):
        return _pdes20(seed) if name == "pdes20" else _fluids(seed)
    if name == "pdes":
        found: dict[str, Any] = {split: Trajectories([*fields.fields(split, count, seed)]) for split, count in fields.COUNTS.items()}
        args = {"vocabulary": vocabulary(1, fields.DIGITS - 1, fields.WORDS), "dims": 1, "grid": fields.GRID}
        return Data("pdes", "operator-learning", found, args, source={"sample": name})
    if name != "odes":
        raise UnknownName("sample data set", name, ("odes", "pdes", "pdes20", "fluids"))
    splits: dict[str, Any] = {split: Trajectories([*trajectories(split, count, seed)]) for split, count in COUNTS.items()}
    args = {"vocabulary": vocabulary(2, DIGITS - 1), "dims": 2}
    return Data("odes", "operator-learning", splits, args, source={"sample": name})


def pdes20_words() -> tuple[str, ...]:
    """The vocabulary of the twenty families."""
    return vocabulary(1, families.DIGITS - 1, families.WORDS)


def _pdes20(seed: int) -> Data:
    found: dict[str, Any] = {split: Trajectories([*families.families(split, n, seed)]) for split, n in families.COUNTS.items()}
    args = {"vocabulary": pdes20_words(), "dims": 1, "grid": families.POINTS}
    return Data("pdes20", "operator-learning", found, args, source={"sample": "pdes20"})


def _fluids(seed: int) -> Data:
    found: dict[str, Any] = {split: Trajectories([*fluids.flows(split, n, seed)]) for split, n in fluids.COUNTS.items()}
    args = {"vocabulary": fluid_vocabulary(), "dims": fluids.DIMS, "grid": fluids.SIZE**2}
    return Data("fluids", "operator-learning", found, args, source={"sample": "fluids"})
