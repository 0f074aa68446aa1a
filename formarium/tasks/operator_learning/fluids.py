"""Flows on a periodic square of side 2 pi, solved spectrally: smoke in an incompressible fluid, and shallow water.

Kinds and fields are two of PROSE-FD's (its data are PDEBench's, PDEArena's and CFDBench's files, which are gigabytes): of a fluid the
velocities u, v and the smoke c are seen, of shallow water its height h alone. A field is an array [y, x], flattened to [y x] in a sample;
what a kind lacks is 0. The words say the equations and what holds at the boundary, with the numbers that were drawn.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from scipy import fft

from formarium.task import Sample
from formarium.tasks.operator_learning.solvers import runge_kutta
from formarium.tasks.operator_learning.symbols import encode_number, rounded

COUNTS = {"train": 300, "val": 60}
SIZE, DIMS, STEPS, SEEN, APART, DIGITS = 16, 3, 12, 6, 0.15, 3  # a sample has every second point of what is solved
STEP = 0.05  # of the solvers

Fields = np.ndarray


class Square:
    """Fourier derivatives of fields [..., size, size]; products lose the third of the waves that they would fold back."""

    def __init__(self, size: int):
        self.size = size
        self.kx = np.arange(size // 2 + 1)[None]
        self.ky = np.fft.fftfreq(size, 1 / size)[:, None]
        self.square = self.kx**2 + self.ky**2
        self.kept = (np.abs(self.kx) < size / 3) & (np.abs(self.ky) < size / 3)

    def waves(self, field: Fields) -> Fields:
        return fft.rfft2(field) * self.kept

    def field(self, waves: Fields) -> Fields:
        return fft.irfft2(waves, (self.size, self.size))

    def slopes(self, waves: Fields) -> tuple[Fields, Fields]:
        """Derivatives along x and along y."""
        return self.field(1j * self.kx * waves), self.field(1j * self.ky * waves)

    def velocity(self, vorticity: Fields) -> tuple[Fields, Fields]:
        """(u, v) without divergence, of vorticity v_x - u_y, all as waves but the result."""
        stream = vorticity / np.where(self.square == 0, 1, self.square)
        return self.field(1j * self.ky * stream), self.field(-1j * self.kx * stream)


def smoke(vorticity: Fields, c: Fields, eta: np.ndarray, times: np.ndarray, spread: float = 0.01) -> Fields:
    """u, v, c float64 [n, times, size, size, 3] of an incompressible fluid of density 1 with viscosity eta [n] that carries smoke c (which
    spreads a little itself), in vorticity form: w_t + U D w = eta D2 w."""
    at, thickness = Square(c.shape[-1]), np.stack([eta, np.full_like(eta, spread)])[:, :, None, None]

    def slope(state: Fields) -> Fields:
        u, v = at.velocity(state[0])
        along, across = at.slopes(state)
        return -at.waves(u * along + v * across) - thickness * at.square * state

    found = np.moveaxis(runge_kutta(at.waves(np.stack([vorticity, c])), times, slope, STEP), 1, 0)
    return np.stack([np.stack([*at.velocity(s[0]), at.field(s[1])], -1) for s in found], 1)


def water(h: Fields, g: np.ndarray, times: np.ndarray, eta: float = 0.02) -> Fields:
    """h, u, v float64 [n, times, size, size, 3] of shallow water from rest: h_t + div(h U) = 0, U_t + U D U + g D h = eta D2 U."""
    at, g = Square(h.shape[-1]), g[:, None, None]

    def slope(state: Fields) -> Fields:
        h, u, v = at.field(state)
        (_, ux, vx), (_, uy, vy) = at.slopes(state)
        out = -1j * (at.kx * at.waves(h * u) + at.ky * at.waves(h * v))
        along, across = 1j * at.kx * g * state[0], 1j * at.ky * g * state[0]
        carried = at.waves(np.stack([u * ux + v * uy, u * vx + v * vy]))
        return np.stack([out, *(-carried - np.stack([along, across]) - eta * at.square * state[1:])])

    found = np.moveaxis(runge_kutta(at.waves(np.stack([h, 0 * h, 0 * h])), times, slope, STEP), 1, 0)
    return np.stack([np.moveaxis(at.field(s), 0, -1) for s in found], 1)


# starts and samples -------------------------------------------------------------------------------------------------


def random_field(rng: np.random.Generator, size: int, longest: int) -> Fields:
    """A smooth field of waves up to `longest`, mean 0, deviation 1."""
    x = 2 * np.pi * np.arange(size) / size
    out = np.zeros((size, size))
    for kx in range(longest + 1):
        for ky in range(-longest, longest + 1):
            if 0 < kx**2 + ky**2 <= longest**2:
                out += rng.normal() * np.cos(kx * x[None] + ky * x[:, None] + rng.uniform(0, 2 * np.pi))
    return (out - out.mean()) / out.std()


def smoke_words(eta: float) -> list[str]:
    flow = f"add add dt U mul U D U sub D p mul {' '.join(encode_number(eta, DIGITS))} D2 U"
    return f"{flow} | diverg U | add dt c mul U D c -- U periodic c periodic".split()


def water_words(g: float) -> list[str]:
    return f"add dt h diverg mul h U | add add dt U mul U D U mul {' '.join(encode_number(g, DIGITS))} D h -- h periodic U periodic".split()


@lru_cache(maxsize=4)
def flows(split: str, count: int, seed: int) -> tuple[Sample, ...]:
    """`count` flows, smoke and water in turn; the first half of the frames is seen, without noise."""
    rng, t = np.random.default_rng((seed, 2, [*COUNTS].index(split))), np.arange(STEPS) * APART
    smokes, waters = -(-count // 2), count // 2
    eta = np.array([rounded(rng.uniform(0.005, 0.05), DIGITS) for _ in range(smokes)])
    spun, c = (np.stack([random_field(rng, 2 * SIZE, 2) for _ in range(smokes)]) for _ in range(2))
    found = {0: smoke(1.5 * spun, 1 + 0.5 * c, eta, t)}
    words = {0: [smoke_words(x) for x in eta]}
    if waters:
        g = np.array([rounded(rng.uniform(1, 3), DIGITS) for _ in range(waters)])
        found[1] = water(np.stack([1 + 0.1 * random_field(rng, 2 * SIZE, 2) for _ in range(waters)]), g, t)
        found[1][..., 1:] = 0  # the velocities aren't seen
        words[1] = [water_words(x) for x in g]
    out = []
    for k in range(count):
        kind, n = k % 2, k // 2
        u = found[kind][n][:, ::2, ::2].reshape(STEPS, SIZE * SIZE, DIMS).astype(np.float32)
        known = {"t": t, "u": u, "input_len": SEEN, "dims": (DIMS, 1)[kind], "words": [], "guess": words[kind][n]}
        name = ("smoke", "water")[kind]
        out.append({**known, "id": f"{split}/{name}-{k:04d}", "family": name})
    return tuple(out)
