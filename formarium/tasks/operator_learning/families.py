"""The twenty families of one-dimensional equations of PROSE-PDE (Sun et al. 2024, arXiv 2404.12355), with solvers of our own.

A field lives on [0, 2), periodic, for times from 0 to 2; families that change faster are solved to an earlier `final` and their time is
stretched, so that u_t stands in their words with the factor 2 / final (u_tt with its square). Words are an equation's whole left-hand side,
0 on the right: `sub u_t mul + N300 E-5 u_xx` is u_t - 0.003 u_xx = 0. Numbers are drawn within a tenth of the published ones.
Where the released generator's words and fields disagree, words and fields here are those of the equation: its words of the porous medium
have the diffusion's sign turned, those of Fokker-Planck a sign of the drift; its bistable fields are solved with the threshold 0 whatever
the words say; its upwind fluxes of sine and cubic take the speed of Burgers' equation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial, reduce

import numpy as np

from formarium.task import Sample
from formarium.tasks.operator_learning import solvers
from formarium.tasks.operator_learning.starts import CELLS, LENGTH, Start, bump, centres, density, drawn_waves, two_waves
from formarium.tasks.operator_learning.symbols import Node, encode, rounded, skeleton

RANGE, SPREAD, NOISE, DIGITS = 2.0, 0.1, 0.02, 3
COUNTS = {"train": 400, "val": 80}
POINTS, STEPS, SEEN = 64, 32, 16  # of a sample: what the variant prose_pde takes
WORDS = ("x", "u_t", "u_tt", "u_x", "u_xx", "u_xxx", "u_xxxx")
X, U, UT, UTT, UX, UXX, UXXX, UXXXX = map(Node, ("x", "u_0", "u_t", "u_tt", "u_x", "u_xx", "u_xxx", "u_xxxx"))

Draw = Callable[[np.random.Generator], tuple[float, ...]]
Solver = Callable[[Sequence[Start], np.ndarray, np.ndarray, int], np.ndarray]


@dataclass(frozen=True)
class Family:
    """draw: its numbers. words: (its numbers, 2 / final) -> the left-hand side. start: a random start. final: the time that 2 stands for.
    solve: (starts, numbers [n, k], true times [t], points) -> fields [n, t, points]. sharp: fields may have shocks or layers."""

    draw: Draw
    words: Callable[..., Node]
    start: Callable[[np.random.Generator], Start]
    solve: Solver
    final: float = RANGE
    sharp: bool = False

    def tree(self, numbers: Sequence[float]) -> Node:
        return self.words(*numbers, rate=RANGE / self.final)

    def fields(self, starts: Sequence[Start], numbers: np.ndarray, times: np.ndarray, points: int) -> np.ndarray:
        """float64 [n, times, points], of stretched times from 0 to 2."""
        return self.solve(starts, np.asarray(numbers, dtype=np.float64), np.asarray(times) * self.final / RANGE, points)


def near(*usual: float) -> Draw:
    """Each number within a tenth of the usual one, of three digits."""
    return lambda rng: tuple(rounded(x * rng.uniform(1 - SPREAD, 1 + SPREAD), DIGITS) for x in usual)


# words --------------------------------------------------------------------------------------------------------------


def product(*factors: Node | float) -> Node:
    nodes = [f if isinstance(f, Node) else Node(float(f)) for f in factors]
    return nodes[0] if len(nodes) == 1 else Node("mul", (nodes[0], product(*nodes[1:])))


def added(*parts: Node) -> Node:
    return reduce(lambda a, b: Node("add", (a, b)), parts)


def less(first: Node, *parts: Node) -> Node:
    return reduce(lambda a, b: Node("sub", (a, b)), parts, first)


def of(name: str, *children: Node) -> Node:
    return Node(name, children)


def _reaction(term: Callable[..., Node]) -> Callable[..., Node]:
    """u_t - nu u_xx - rho term = 0."""
    return lambda nu, rho, *more, rate: less(product(rate, UT), product(nu, UXX), product(rho, term(*more)))


def _conservation(tilt: tuple[Node, ...], viscous: bool) -> Callable[..., Node]:
    """u_t + k tilt u_x - eps / pi u_xx = 0, or without what diffuses."""
    if viscous:
        return lambda eps, k, rate: less(added(product(rate, UT), product(k, *tilt, UX)), product(eps / np.pi, UXX))
    return lambda k, rate: added(product(rate, UT), product(k, *tilt, UX))


def _porous(m: float, rate: float) -> Node:
    bend = () if m == 2 else (of("pow", U, Node(m - 2)),)
    return less(product(rate, UT), product(m * (m - 1), *bend, of("pow2", UX)), product(m, of("pow", U, Node(m - 1)) if m > 2 else U, UXX))


def _fokker_planck(viscosity: float, rate: float) -> Node:
    force, spread = fokker_planck_numbers(viscosity)
    wave = of("mul", X, Node(KICKS))
    return less(
        added(
            product(rate, UT),
            product(force * KICKS**2, of("cos", wave), U),
            product(force * KICKS, of("sin", wave), UX),
        ),
        product(spread, UXX),
    )


def _bistable_term(a: float) -> Node:
    return product(U, of("sub", Node(1.0), U), of("sub", U, Node(a)))


# solvers ------------------------------------------------------------------------------------------------------------


def on_grid(starts: Sequence[Start], points: int) -> np.ndarray:
    return np.stack([f(centres(points)) for f in starts])


def _columns(numbers: np.ndarray) -> list[np.ndarray]:
    return [*numbers.T[:, :, None]]


def _linear(symbol: Callable[..., np.ndarray]) -> Solver:
    """By the equation's symbol: (wave numbers, numbers) -> L."""

    def solve(starts: Sequence[Start], numbers: np.ndarray, times: np.ndarray, points: int) -> np.ndarray:
        k = solvers.waves_of(points, LENGTH)
        return solvers.linear(on_grid(starts, points), times, symbol(k, *_columns(numbers)) + 0j, LENGTH)

    return solve


def _moved(split: bool) -> Solver:
    """Starts moved by speed * time, exactly; split: half to either side (d'Alembert, from rest)."""

    def solve(starts: Sequence[Start], numbers: np.ndarray, times: np.ndarray, points: int) -> np.ndarray:
        x = centres(points)
        found = []
        for f, (speed,) in zip(starts, numbers, strict=True):
            way = speed * times[:, None]
            right = f(((x - way) % LENGTH).ravel()).reshape(len(times), points)
            found.append((right + f(((x + way) % LENGTH).ravel()).reshape(len(times), points)) / 2 if split else right)
        return np.stack(found)

    return solve


def _reacting(term: Callable[..., np.ndarray]) -> Solver:
    """nu u_xx + rho term(u) by Fourier derivatives and Runge-Kutta."""

    def solve(starts: Sequence[Start], numbers: np.ndarray, times: np.ndarray, points: int) -> np.ndarray:
        nu, rho, *more = _columns(numbers)
        step = min(0.01, 2.0 / float(nu.max() * solvers.waves_of(points, LENGTH)[-1] ** 2))

        def slope(u: np.ndarray) -> np.ndarray:
            return nu * solvers.differentiate(u, 2, LENGTH) + rho * term(u, *more)

        return solvers.runge_kutta(on_grid(starts, points), times, slope, step)

    return solve


def _conserving(flux: Callable[[np.ndarray], np.ndarray], tilt: Callable[[np.ndarray], np.ndarray], viscous: bool) -> Solver:
    """By finite volumes."""

    def solve(starts: Sequence[Start], numbers: np.ndarray, times: np.ndarray, points: int) -> np.ndarray:
        eps, k = _columns(numbers) if viscous else [np.zeros((1, 1)), *_columns(numbers)]
        start = on_grid(starts, points)
        return solvers.finite_volume(start, times, lambda u: k * flux(u), lambda u: np.abs(k * tilt(u)), eps / np.pi, LENGTH)

    return solve


def _klein_gordon(starts: Sequence[Start], numbers: np.ndarray, times: np.ndarray, points: int) -> np.ndarray:
    c, m = _columns(numbers)
    squares = (c * solvers.waves_of(points, LENGTH)) ** 2 + m**2 * c**4
    return solvers.oscillating(on_grid(starts, points), times, squares)


def _sine_gordon(starts: Sequence[Start], numbers: np.ndarray, times: np.ndarray, points: int) -> np.ndarray:
    (c,) = _columns(numbers)
    return solvers.kicked_waves(on_grid(starts, points), times, lambda u: -c * np.sin(u), LENGTH, 0.002)


def _korteweg(starts: Sequence[Start], numbers: np.ndarray, times: np.ndarray, points: int) -> np.ndarray:
    """On a grid twice as fine, without the third of the waves that products would fold back."""
    (delta,) = _columns(numbers)
    fine = 2 * points
    k = solvers.waves_of(fine, LENGTH)
    kept = (1j * k) * (k < 2 / 3 * k[-1])

    def rest(v: np.ndarray) -> np.ndarray:
        return -kept * np.fft.rfft(np.fft.irfft(v, fine) ** 2) / 2

    symbol = 1j * k**3 * delta**2
    symbol[:, -1] = 0
    return coarse(solvers.integrating_factor(on_grid(starts, fine), times, symbol, rest, 1e-3), points)


def _cahn_hilliard(starts: Sequence[Start], numbers: np.ndarray, times: np.ndarray, points: int) -> np.ndarray:
    """(3 u^2 - eps^2 u_xx)_xx."""
    (eps,) = _columns(numbers)
    u = on_grid(starts, points)
    finest = 4 * (points / LENGTH) ** 2
    stiffness = 6 * 1.5 * np.abs(u).max() * finest + float(eps.max()) ** 2 * finest**2

    def slope(u: np.ndarray) -> np.ndarray:
        return solvers.second_difference(3 * u**2 - eps**2 * solvers.second_difference(u, LENGTH), LENGTH)

    return solvers.chebyshev(u, times, slope, stiffness, 2e-3)


def _porous_medium(starts: Sequence[Start], numbers: np.ndarray, times: np.ndarray, points: int) -> np.ndarray:
    """(u^m)_xx."""
    (m,) = _columns(numbers)
    u = on_grid(starts, points)
    stiffness = float((m * np.abs(u).max(1, keepdims=True) ** (m - 1)).max()) * 4 * (points / LENGTH) ** 2
    return solvers.chebyshev(u, times, lambda u: solvers.second_difference(np.abs(u) ** m, LENGTH), stiffness, 5e-4)


# a sphere of 0.1 micrometres in water at 300 K in the potential 5e-21 J cos(x / 0.1 micrometres); x in micrometres, t in seconds
BOLTZMANN, KELVIN, RADIUS, POTENTIAL, KICKS = 1.380649e-23, 300.0, 1e-7, 5e-21, 10.0


def fokker_planck_numbers(viscosity: float) -> tuple[float, float]:
    """(force, spread): the potential and the temperature over the drag (Stokes), in square micrometres a second."""
    drag = 6 * np.pi * viscosity * RADIUS * 1e-12
    return POTENTIAL / drag, BOLTZMANN * KELVIN / drag


def _drifting(starts: Sequence[Start], numbers: np.ndarray, times: np.ndarray, points: int) -> np.ndarray:
    """u_t = spread u_xx - (force KICKS sin(KICKS x) u)_x. The force jumps where the line closes: the mean of both sides is taken there."""
    faces = (np.arange(points) + 1) * LENGTH / points
    pull = np.sin(KICKS * faces)
    pull[-1] = (np.sin(KICKS * LENGTH) + np.sin(0.0)) / 2
    spreads = np.array([fokker_planck_numbers(v)[1] for v in numbers[:, 0]])
    fall = POTENTIAL / (BOLTZMANN * KELVIN) * KICKS * pull
    return solvers.drift_and_diffusion(on_grid(starts, points), times, fall, spreads, LENGTH)


def coarse(u: np.ndarray, points: int) -> np.ndarray:
    """Means over neighbouring cells: [..., points * n] to [..., points]."""
    return u.reshape(*u.shape[:-1], points, -1).mean(-1)


# the families -------------------------------------------------------------------------------------------------------

SINES = partial(drawn_waves, longest=4, picks=2)
ONE = partial(drawn_waves, longest=2, picks=1)
NU = 3e-3

FAMILIES: dict[str, Family] = {
    "heat": Family(near(NU), lambda c, rate: less(product(rate, UT), product(c, UXX)), SINES, _linear(lambda k, c: -c * k**2)),
    "porous_medium": Family(lambda rng: (float(rng.integers(2, 5)),), _porous, bump, _porous_medium, 0.1, True),
    "advection": Family(near(0.5), lambda b, rate: added(product(rate, UT), product(b, UX)), two_waves, _moved(False)),
    "kdv": Family(
        near(0.022),
        lambda d, rate: added(product(rate, UT), product(d**2, UXXX), product(U, UX)),
        partial(two_waves, highest=0.5),
        _korteweg,
        1.0,
    ),
    "fplanck": Family(near(1e-3), _fokker_planck, density, _drifting, 0.1, True),
    "diff_logisreact_1D": Family(
        near(NU, 1.0), _reaction(lambda: product(U, of("sub", Node(1.0), U))), SINES, _reacting(lambda u: u * (1 - u)), sharp=True
    ),
    "diff_linearreact_1D": Family(near(NU, 0.1), _reaction(lambda: U), SINES, _linear(lambda k, nu, rho: rho - nu * k**2)),
    "diff_bistablereact_1D": Family(
        lambda rng: (*near(NU, 1.0)(rng), rounded(rng.uniform(), DIGITS)),
        _reaction(_bistable_term),
        SINES,
        _reacting(lambda u, a: u * (1 - u) * (u - a)),
        sharp=True,
    ),
    "diff_squarelogisticreact_1D": Family(
        near(NU, 1.0),
        _reaction(lambda: of("mul", of("pow2", U), of("pow2", of("sub", Node(1.0), U)))),
        SINES,
        _reacting(lambda u: u**2 * (1 - u) ** 2),
        sharp=True,
    ),
    "burgers": Family(near(0.01, 1.0), _conservation((U,), True), SINES, _conserving(lambda u: u**2 / 2, lambda u: u, True), sharp=True),
    "conservation_linearflux": Family(
        near(0.01, 1.0), _conservation((), True), SINES, _linear(lambda k, eps, b: -1j * b * k - eps / np.pi * k**2)
    ),
    "conservation_sinflux": Family(
        near(0.01, 1.0), _conservation((of("cos", U),), True), SINES, _conserving(np.sin, np.cos, True), sharp=True
    ),
    "conservation_cubicflux": Family(
        near(0.01, 1.0), _conservation((U, U), True), SINES, _conserving(lambda u: u * u * u / 3, np.square, True), sharp=True
    ),
    "inviscid_burgers": Family(
        near(1.0), _conservation((U,), False), SINES, _conserving(lambda u: u**2 / 2, lambda u: u, False), sharp=True
    ),
    "inviscid_conservation_sinflux": Family(
        near(1.0), _conservation((of("cos", U),), False), SINES, _conserving(np.sin, np.cos, False), sharp=True
    ),
    "inviscid_conservation_cubicflux": Family(
        near(1.0), _conservation((U, U), False), SINES, _conserving(lambda u: u * u * u / 3, np.square, False), sharp=True
    ),
    "cahnhilliard_1D": Family(
        near(0.01),
        lambda eps, rate: less(added(product(rate, UT), product(eps**2, UXXXX)), product(6.0, UX, UX), product(6.0, U, UXX)),
        partial(drawn_waves, longest=2, picks=2),
        _cahn_hilliard,
        0.5,
        True,
    ),
    "wave": Family(near(0.5), lambda b, rate: less(product(rate**2, UTT), product(b**2, UXX)), two_waves, _moved(True), 1.0),
    "Klein_Gordon": Family(
        near(1.0, 0.1),
        lambda c, m, rate: added(less(product(rate**2, UTT), product(c**2, UXX)), product(m**2 * c**4, U)),
        ONE,
        _klein_gordon,
        1.0,
    ),
    "Sine_Gordon": Family(
        near(1.0),
        lambda c, rate: added(less(product(rate**2, UTT), UXX), product(c, of("sin", U))),
        ONE,
        _sine_gordon,
        1.0,
    ),
}


# samples ------------------------------------------------------------------------------------------------------------


def solved(name: str, count: int, rng: np.random.Generator, points: int = CELLS, steps: int = 2 * STEPS) -> tuple[np.ndarray, np.ndarray]:
    """(numbers [count, k], fields float64 [count, steps, points]) of a family at times 0, 2 / steps, ...: by default the published 64 times
    of 128 cells. Solved on no fewer than the published cells. name: a key of FAMILIES."""
    family = FAMILIES[name]
    numbers = np.array([family.draw(rng) for _ in range(count)])
    starts = [family.start(rng) for _ in range(count)]
    cells = points * max(1, -(-CELLS // points))
    times = np.linspace(0, RANGE, steps, endpoint=False)
    return numbers, coarse(family.fields(starts, numbers, times, cells), points)


@lru_cache(maxsize=4)
def families(split: str, count: int, seed: int) -> tuple[Sample, ...]:
    """`count` fields, families in turn, the first half of the times seen with noise; the guess is the equation without its numbers."""
    rng = np.random.default_rng((seed, 20, [*COUNTS].index(split)))
    t = np.linspace(0, RANGE, STEPS, endpoint=False)
    out: dict[int, Sample] = {}
    for first, (name, family) in enumerate(FAMILIES.items()):
        places = range(first, count, len(FAMILIES))
        if not places:
            continue
        numbers, found = solved(name, len(places), rng, POINTS, STEPS)
        for n, k in enumerate(places):
            u = found[n, :, :, None]
            words = encode([family.tree(numbers[n].tolist())], DIGITS)
            drawn = rng.standard_normal(u[:SEEN].shape)
            seen = u[:SEEN] + NOISE * np.linalg.norm(u[:SEEN]) / np.linalg.norm(drawn) * drawn
            known = {"t": t, "u": u, "seen": seen, "input_len": SEEN, "dims": 1, "words": words, "guess": skeleton(words)}
            out[k] = {**known, "id": f"{split}/{name}-{k:04d}", "family": name}
    return tuple(out[k] for k in range(count))
