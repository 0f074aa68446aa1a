"""Solvers of one-dimensional equations, periodic, many fields at once.

Fields are float64 [n, points], an equation's numbers [n, 1], results [n, times, points].
Cells are [i, i + 1) * length / points; a value stands for its cell's centre. Each is the textbook method named in its docstring.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

Slope = Callable[[np.ndarray], np.ndarray]


def waves_of(points: int, length: float) -> np.ndarray:
    """Angular wave numbers float [points // 2 + 1] of a real field's Fourier coefficients."""
    return 2 * np.pi / length * np.arange(points // 2 + 1)


def differentiate(u: np.ndarray, order: int, length: float) -> np.ndarray:
    """A derivative of fields [..., points] by Fourier; the highest wave has no odd one on an even grid."""
    n = u.shape[-1]
    factor = (1j * waves_of(n, length)) ** order
    if order % 2 and n % 2 == 0:
        factor[-1] = 0
    return np.fft.irfft(np.fft.rfft(u) * factor, n)


def linear(u: np.ndarray, times: np.ndarray, symbol: np.ndarray, length: float) -> np.ndarray:
    """u_t = L u exactly, wave by wave. symbol: complex [n, points // 2 + 1], L of each wave."""
    return np.fft.irfft(np.fft.rfft(u)[:, None] * np.exp(symbol[:, None] * times[None, :, None]), u.shape[-1])


def oscillating(u: np.ndarray, times: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """u_tt = L u from rest exactly, wave by wave. squares: float [n, points // 2 + 1], -L of each wave, its frequency squared."""
    return np.fft.irfft(np.fft.rfft(u)[:, None] * np.cos(np.sqrt(squares)[:, None] * times[None, :, None]), u.shape[-1])


def rk4(u: np.ndarray, h: float, slope: Slope) -> np.ndarray:
    """u a step h later, where u_t = slope(u), by the classical fourth-order Runge-Kutta method."""
    k1 = slope(u)
    k2 = slope(u + h / 2 * k1)
    k3 = slope(u + h / 2 * k2)
    return u + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(u + h * k3))


def runge_kutta(u: np.ndarray, times: np.ndarray, slope: Slope, step: float) -> np.ndarray:
    """u_t = slope(u) by the classical fourth-order method, steps of at most `step`."""
    out = [u]
    for a, b in pairwise(times):
        count = max(1, int(np.ceil((b - a) / step - 1e-9)))
        h = (b - a) / count
        for _ in range(count):
            u = rk4(u, h, slope)
        out.append(u)
    return np.stack(out, 1)


def integrating_factor(u: np.ndarray, times: np.ndarray, symbol: np.ndarray, rest: Slope, step: float) -> np.ndarray:
    """u_t = L u + rest(u): L exactly wave by wave, the rest by the fourth-order Runge-Kutta method. symbol: complex [n, waves].

    rest: Fourier coefficients of u to those of the rest.
    """
    n, out, v = u.shape[-1], [u], np.fft.rfft(u)
    for a, b in pairwise(times):
        count = max(1, int(np.ceil((b - a) / step - 1e-9)))
        h = (b - a) / count
        half = np.exp(symbol * h / 2)
        for _ in range(count):
            k1 = rest(v)
            k2 = rest(half * (v + h / 2 * k1))
            k3 = rest(half * v + h / 2 * k2)
            k4 = rest(half * (half * v + h * k3))
            v = half * (half * (v + h / 6 * k1) + h / 3 * (k2 + k3)) + h / 6 * k4
        out.append(np.fft.irfft(v, n))
    return np.stack(out, 1)


def kicked_waves(u: np.ndarray, times: np.ndarray, force: Slope, length: float, step: float) -> np.ndarray:
    """u_tt = u_xx + force(u) from rest: kicks by the force between free waves that are exact (Strang splitting, second order)."""
    n, k, out = u.shape[-1], waves_of(u.shape[-1], length), [u]
    speed = np.zeros_like(u)
    for a, b in pairwise(times):
        count = max(1, int(np.ceil((b - a) / step - 1e-9)))
        h = (b - a) / count
        turn, over = np.cos(k * h), h * np.sinc(k * h / np.pi)  # sin(k h) / k
        for _ in range(count):
            speed = speed + h / 2 * force(u)
            p, q = np.fft.rfft(u), np.fft.rfft(speed)
            u = np.fft.irfft(turn * p + over * q, n)
            speed = np.fft.irfft(turn * q - k * np.sin(k * h) * p, n) + h / 2 * force(u)
        out.append(u)
    return np.stack(out, 1)


# stiff diffusion ----------------------------------------------------------------------------------------------------


def second_difference(u: np.ndarray, length: float) -> np.ndarray:
    """u_xx of fields [..., points] by central differences."""
    out = -2 * u
    out[..., 1:] += u[..., :-1]
    out[..., :-1] += u[..., 1:]
    out[..., 0] += u[..., -1]
    out[..., -1] += u[..., 0]
    out *= (u.shape[-1] / length) ** 2
    return out


def chebyshev(u: np.ndarray, times: np.ndarray, slope: Slope, stiffness: float, step: float) -> np.ndarray:
    """u_t = slope(u) by the second-order Runge-Kutta-Chebyshev method (Sommeijer, Shampine, Verwer 1998).

    stiffness: the slope's eigenvalues lie between minus this and 0. As many stages are taken as make a step stable.
    """
    out = [u]
    for a, b in pairwise(times):
        count = max(1, int(np.ceil((b - a) / step - 1e-9)))
        h = (b - a) / count
        stages = max(2, int(np.ceil(np.sqrt(1 + 1.54 * h * stiffness))))
        for _ in range(count):
            u = _chebyshev_step(u, h, slope, stages)
        out.append(u)
    return np.stack(out, 1)


def _chebyshev_step(u: np.ndarray, h: float, slope: Slope, s: int) -> np.ndarray:
    w0 = 1 + 2 / 13 / s**2
    t, first, second = np.zeros(s + 1), np.zeros(s + 1), np.zeros(s + 1)  # Chebyshev polynomials at w0, and two derivatives
    t[:2], first[1] = (1, w0), 1
    for j in range(2, s + 1):
        t[j] = 2 * w0 * t[j - 1] - t[j - 2]
        first[j] = 2 * t[j - 1] + 2 * w0 * first[j - 1] - first[j - 2]
        second[j] = 4 * first[j - 1] + 2 * w0 * second[j - 1] - second[j - 2]
    w1 = first[s] / second[s]
    b = np.ones(s + 1)
    b[2:] = second[2:] / first[2:] ** 2
    b[:2] = b[2]
    before, start = u, slope(u)
    now = u + b[1] * w1 * h * start
    for j in range(2, s + 1):
        mu, nu, nudge = 2 * b[j] * w0 / b[j - 1], -b[j] / b[j - 2], 2 * b[j] * w1 / b[j - 1]
        drag = -(1 - b[j - 1] * t[j - 1]) * nudge
        before, now = now, (1 - mu - nu) * u + mu * now + nu * before + nudge * h * slope(now) + drag * h * start
    return now


# conservation laws --------------------------------------------------------------------------------------------------


def finite_volume(
    u: np.ndarray, times: np.ndarray, flux: Slope, speed: Slope, diffusion: np.ndarray | float, length: float, courant: float = 0.4
) -> np.ndarray:
    """u_t + flux(u)_x = diffusion u_xx for cell means: linear pieces with the monotonised central limiter, the local Lax-Friedrichs flux,
    three stages that keep total variation down (Shu, Osher 1988). speed: |flux'|. No value leaves the start's range by more than rounding.
    """
    width = length / u.shape[-1]
    fastest = float(speed(np.linspace(u.min(), u.max(), 257)[None] + 0 * u[:, :1]).max())
    step = courant / (fastest / width + 2 * float(np.max(diffusion)) / width**2 + 1e-12)

    def slope(u: np.ndarray) -> np.ndarray:
        cells = np.concatenate([u[..., -2:], u, u[..., :2]], -1)
        rise = np.diff(cells)
        left, right, cells = rise[..., :-1], rise[..., 1:], cells[..., 1:-1]
        gentle = np.minimum(2 * np.minimum(np.abs(left), np.abs(right)), np.abs(left + right) / 2)
        tilt = np.where(left * right > 0, np.sign(left) * gentle, 0) / 2
        below, above = (cells + tilt)[..., :-1], (cells - tilt)[..., 1:]  # at each face, from its left and from its right
        pull = np.maximum(speed(below), speed(above))
        through = (flux(below) + flux(above) - pull * (above - below)) / 2 - diffusion * rise[..., 1:-1] / width
        return -np.diff(through) / width

    out = [u]
    for a, b in pairwise(times):
        count = max(1, int(np.ceil((b - a) / step - 1e-9)))
        h = (b - a) / count
        for _ in range(count):
            v = u + h * slope(u)
            v = (3 * u + v + h * slope(v)) / 4
            u = (u + 2 * (v + h * slope(v))) / 3
        out.append(u)
    return np.stack(out, 1)


def drift_and_diffusion(u: np.ndarray, times: np.ndarray, fall: np.ndarray, spread: np.ndarray, length: float) -> np.ndarray:
    """u_t = spread (u_x - fall u)_x for cell means: what flows between two cells is exact for a steady flow between them (Scharfetter,
    Gummel 1969), and the linear system it makes is solved by its exponential.

    fall: float [points], the force over the spread at each cell's right face. spread: float [n], one factor a field.
    """
    from scipy.linalg import expm

    points = u.shape[-1]
    width = length / points
    z = fall * width
    small = np.abs(z) < 1e-6
    safe = np.where(small, 1.0, z)
    out_rate, back_rate = np.where(small, 1 + z / 2, -safe / np.expm1(-safe)), np.where(small, 1 - z / 2, safe / np.expm1(safe))
    here, there = np.arange(points), (np.arange(points) + 1) % points
    rates = np.zeros((points, points))  # d u / d t = rates u
    np.add.at(rates, (here, here), -out_rate)
    np.add.at(rates, (there, here), out_rate)
    np.add.at(rates, (there, there), -back_rate)
    np.add.at(rates, (here, there), back_rate)
    rates /= width**2
    found = np.empty((len(u), len(times), points))
    for i, start in enumerate(u):
        state, at, advance, last = start, 0.0, None, None
        for j, t in enumerate(times):
            if t > at:
                if last is None or abs(t - at - last) > 1e-12:
                    last = t - at
                    advance = expm(rates * float(spread[i]) * last)
                state, at = advance @ state, t
            found[i, j] = state
    return found
