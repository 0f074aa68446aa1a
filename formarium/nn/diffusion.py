"""Gaussian diffusion (Ho et al. 2020; Nichol and Dhariwal 2021; Song et al. 2021): schedules, noising, losses, DDPM and DDIM sampling.

q(x_t | x_0) = N(sqrt(abar_t) x_0, 1 - abar_t). A network predicts the noise ("epsilon"), the clean sample ("start") or the velocity
v = sqrt(abar_t) eps - sqrt(1 - abar_t) x_0 ("v"); the reverse step's variance is fixed, or interpolated between its two bounds in the
log domain by a second output ("learned_range").

Steps are counted from 0 (least noise). Tables are float64 and small; they live outside modules, on each device that asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from formarium.errors import BadInput, MissingExtra, UnknownName

PREDICTIONS = ("epsilon", "start", "v")
VARIANCES = ("learned_range", "fixed_small", "fixed_large")
SCHEDULES = ("linear", "scaled_linear", "cosine")
Network = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]  # (x_t, steps int64 [batch]) -> (prediction, variance values or None)


# schedules ----------------------------------------------------------------------------------------------------------


def beta_schedule(name: str = "linear", steps: int = 1000) -> np.ndarray:
    """The noise added at each step, float64 [steps].

    "linear": 1e-4 to 0.02 at 1000 steps, scaled for other counts. "scaled_linear": linear in the square root, 0.00085 to 0.012.
    "cosine": abar follows a squared cosine, betas at most 0.999.
    """
    if steps < 1:
        raise BadInput("diffusion steps", expected="at least 1", got=str(steps))
    scale = 1000 / steps
    if name == "linear":
        return np.linspace(scale * 1e-4, min(scale * 0.02, 0.999), steps, dtype=np.float64)
    if name == "scaled_linear":
        return np.linspace((scale * 0.00085) ** 0.5, min(scale * 0.012, 0.999) ** 0.5, steps, dtype=np.float64) ** 2
    if name == "cosine":
        abar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * math.pi / 2) ** 2
        return np.minimum(1 - abar[1:] / abar[:-1], 0.999)
    raise UnknownName("noise schedule", name, SCHEDULES)


def spaced_steps(steps: int, wanted: int | str | Sequence[int]) -> list[int]:
    """Which of `steps` steps a shorter process keeps, ascending.

    wanted: a count, spread evenly from the first step to the last; "ddimN", N steps of one whole stride from 0; or counts for equal
    sections of the process ("10,15,20" or a sequence). Raises BadInput where a section has fewer steps than asked for.
    """
    if isinstance(wanted, str) and wanted.startswith("ddim"):
        count = int(wanted.removeprefix("ddim"))
        for stride in range(1, steps + 1):
            if len(range(0, steps, stride)) == count:
                return [*range(0, steps, stride)]
        raise BadInput("sampling steps", expected=f"a count that a whole stride over {steps} steps gives", got=wanted)
    counts = [int(n) for n in wanted.split(",")] if isinstance(wanted, str) else [wanted] if isinstance(wanted, int) else [*wanted]
    kept: set[int] = set()
    start = 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if not 1 <= count <= size:
            raise BadInput("sampling steps", expected=f"1 to {size} (of {steps} diffusion steps)", got=str(count))
        stride = (size - 1) / (count - 1) if count > 1 else 1
        at = 0.0
        for _ in range(count):  # summed, not multiplied: halves round as in released samplers
            kept.add(start + round(at))
            at += stride
        start += size
    return sorted(kept)


# the process --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reverse:
    """One reverse step: mean and log variance of p(x_{t-1} | x_t), and the clean sample it goes by; all shaped as x_t."""

    mean: Tensor
    log_variance: Tensor
    start: Tensor


class GaussianDiffusion:
    """A noising process and its reversal, for tensors of any rank whose first axis is the batch.

    betas: float64 [steps]. prediction, variance: what the network says, see the module. timesteps: the number that the network knows
    each step by, where this process is a spaced one (by default 0, 1, 2 ...).
    """

    def __init__(
        self, betas: np.ndarray, prediction: str = "epsilon", variance: str = "fixed_large", timesteps: Sequence[int] | None = None
    ):
        for what, value, known in (("prediction", prediction, PREDICTIONS), ("variance", variance, VARIANCES)):
            if value not in known:
                raise UnknownName(f"diffusion {what}", value, known)
        self.betas, self.prediction, self.variance = np.asarray(betas, np.float64), prediction, variance
        self.timesteps = [*(timesteps if timesteps is not None else range(len(self.betas)))]
        abar = np.cumprod(1 - self.betas)
        before = np.append(1.0, abar[:-1])
        posterior = self.betas * (1 - before) / (1 - abar)
        clipped = np.append(posterior[1], posterior[1:]) if len(posterior) > 1 else np.maximum(posterior, 1e-20)
        large = np.append(clipped[0], self.betas[1:])
        self.abar = abar
        self._tables: dict[str, np.ndarray] = {
            "abar": abar,
            "abar_before": before,
            "signal": np.sqrt(abar),
            "noise": np.sqrt(1 - abar),
            "recip": np.sqrt(1 / abar),
            "recip_minus": np.sqrt(1 / abar - 1),
            "posterior_start": self.betas * np.sqrt(before) / (1 - abar),
            "posterior_now": (1 - before) * np.sqrt(1 - self.betas) / (1 - abar),
            "log_posterior": np.log(clipped),
            "log_beta": np.log(self.betas),
            "log_large": np.log(large),
            "timesteps": np.asarray(self.timesteps),
        }
        self._placed: dict[tuple[str, torch.device], Tensor] = {}

    def __len__(self) -> int:
        return len(self.betas)

    def at(self, table: str, t: Tensor, like: Tensor) -> Tensor:
        """A table's float32 values at steps t [batch], shaped to broadcast over `like`."""
        key = (table, t.device)
        if key not in self._placed:
            self._placed[key] = torch.tensor(self._tables[table].tolist(), dtype=torch.float64, device=t.device)
        return self._placed[key][t].float().view(-1, *[1] * (like.ndim - 1))

    def spaced(self, wanted: int | str | Sequence[int]) -> GaussianDiffusion:
        """The same process in fewer steps (see `spaced_steps`), abar kept where it is looked at."""
        kept = spaced_steps(len(self), wanted)
        abar = self.abar[kept]
        return GaussianDiffusion(1 - abar / np.append(1.0, abar[:-1]), self.prediction, self.variance, [self.timesteps[i] for i in kept])

    def __deepcopy__(self, memo: Any) -> GaussianDiffusion:
        return GaussianDiffusion(self.betas, self.prediction, self.variance, self.timesteps)

    # forward

    def q_sample(self, start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t of clean samples and unit noise, t int64 [batch]."""
        return self.at("signal", t, start) * start + self.at("noise", t, start) * noise

    def q_posterior(self, start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, log variance) of q(x_{t-1} | x_t, x_0); the variance of step 0, which is none, is taken as step 1's."""
        mean = self.at("posterior_start", t, x_t) * start + self.at("posterior_now", t, x_t) * x_t
        return mean, self.at("log_posterior", t, x_t)

    def target(self, start: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What the network is to predict."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "start":
            return start
        return self.at("signal", t, start) * noise - self.at("noise", t, start) * start

    # backward

    def to_start(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean sample that a prediction stands for."""
        if self.prediction == "start":
            return prediction
        if self.prediction == "v":
            return self.at("signal", t, x_t) * x_t - self.at("noise", t, x_t) * prediction
        return self.at("recip", t, x_t) * x_t - self.at("recip_minus", t, x_t) * prediction

    def to_epsilon(self, start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise between a clean sample and x_t."""
        return (self.at("recip", t, x_t) * x_t - start) / self.at("recip_minus", t, x_t)

    def reverse(self, prediction: Tensor, values: Tensor | None, x_t: Tensor, t: Tensor, clip: bool = False) -> Reverse:
        """p(x_{t-1} | x_t) of what the network says. clip: hold the clean sample within [-1, 1]."""
        start = self.to_start(prediction, x_t, t)
        start = start.clamp(-1, 1) if clip else start
        mean, small = self.q_posterior(start, x_t, t)
        if self.variance == "learned_range":
            if values is None:
                raise BadInput("the network's output", expected="a prediction and variance values", got="a prediction alone")
            share = (values + 1) / 2
            log_variance = share * self.at("log_beta", t, x_t) + (1 - share) * small
        else:
            log_variance = (self.at("log_large", t, x_t) if self.variance == "fixed_large" else small).expand_as(x_t)
        return Reverse(mean, log_variance, start)

    # losses

    def losses(
        self, prediction: Tensor, values: Tensor | None, start: Tensor, x_t: Tensor, t: Tensor, noise: Tensor,
        weight: Tensor | None = None, bound_weight: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """One value a sample, float [batch]: "mse" of the prediction (errors times `weight`, where given), and, where the variance is
        learned, "vb", the bound's term in bits a dimension (times `bound_weight`), which moves the variance alone. Means are over all
        elements."""
        error = self.target(start, noise, t) - prediction
        terms = {"mse": (error if weight is None else error * weight).square().flatten(1).mean(1)}
        if values is not None:
            terms["vb"] = self.bound(prediction.detach(), values, start, x_t, t, bound_weight)
        return terms

    def bound(
        self, prediction: Tensor, values: Tensor | None, start: Tensor, x_t: Tensor, t: Tensor, weight: Tensor | None = None
    ) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)), at step 0 the decoder's negative log-likelihood of 8-bit values scaled to [-1, 1];
        bits a dimension, float [batch]."""
        true_mean, true_log_variance = self.q_posterior(start, x_t, t)
        p = self.reverse(prediction, values, x_t, t)
        kl = 0.5 * (
            -1 + p.log_variance - true_log_variance + (true_log_variance - p.log_variance).exp()
            + (true_mean - p.mean).square() * (-p.log_variance).exp()
        )  # fmt: skip
        nll = -discretised_log_likelihood(start, p.mean, 0.5 * p.log_variance)
        kl, nll = (kl, nll) if weight is None else (kl * weight, nll * weight)
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    # sampling

    def ddpm(self, network: Network, x: Tensor, clip: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Ancestral sampling from noise x, through every step of this process (a spaced one has fewer)."""
        for i in reversed(range(len(self))):
            t = torch.full((len(x),), i, device=x.device)
            p = self.reverse(*network(x, self.known_as(t)), x, t, clip)
            x = p.mean
            if i:
                x = x + (0.5 * p.log_variance).exp() * _noise_like(x, generator)
        return x

    def ddim(self, network: Network, x: Tensor, eta: float = 0.0, clip: bool = False, generator: torch.Generator | None = None) -> Tensor:
        """Implicit sampling (Song et al. 2021, eq. 12) from noise x: deterministic at eta = 0, of ancestral variance at eta = 1."""
        for i in reversed(range(len(self))):
            t = torch.full((len(x),), i, device=x.device)
            start = self.to_start(network(x, self.known_as(t))[0], x, t)
            start = start.clamp(-1, 1) if clip else start
            epsilon = self.to_epsilon(start, x, t)
            now, before = self.at("abar", t, x), self.at("abar_before", t, x)
            sigma = eta * ((1 - before) / (1 - now)).sqrt() * (1 - now / before).sqrt()
            x = before.sqrt() * start + (1 - before - sigma**2).clamp_min(0).sqrt() * epsilon
            if eta and i:
                x = x + sigma * _noise_like(x, generator)
        return x

    def dpm_solver(self, network: Network, x: Tensor, steps: int = 20) -> Tensor:
        """DPM-Solver++ (2M) through diffusers' scheduler. Raises MissingExtra where diffusers isn't installed."""
        try:
            from diffusers import DPMSolverMultistepScheduler
        except ImportError:
            raise MissingExtra("diffusers", "diffusion") from None
        kinds = {"epsilon": "epsilon", "start": "sample", "v": "v_prediction"}
        scheduler = DPMSolverMultistepScheduler(trained_betas=self.betas, prediction_type=kinds[self.prediction], solver_order=2)
        scheduler.set_timesteps(steps, device=x.device)
        for t in scheduler.timesteps:
            said, _ = network(x, self.known_as(t.expand(len(x)).long()))
            x = scheduler.step(said, t, x).prev_sample
        return x

    def known_as(self, t: Tensor) -> Tensor:
        """The numbers that the network knows steps t by, int64 [batch]."""
        key = ("timesteps", t.device)
        if key not in self._placed:
            self._placed[key] = torch.tensor(self.timesteps, dtype=torch.int64, device=t.device)
        return self._placed[key][t]


def _noise_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log P of 8-bit values scaled to [-1, 1] under a Gaussian cut into bins of 2/255, the outermost open; nats, shaped as x."""

    def cdf(z: Tensor) -> Tensor:  # the tanh form of the normal's
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    inverse = (-log_scale).exp()
    above, below = cdf(inverse * (x - mean + 1 / 255)), cdf(inverse * (x - mean - 1 / 255))
    inside = (above - below).clamp_min(1e-12).log()
    return torch.where(x < -0.999, above.clamp_min(1e-12).log(), torch.where(x > 0.999, (1 - below).clamp_min(1e-12).log(), inside))


# telling a network the step -----------------------------------------------------------------------------------------


def timestep_features(t: Tensor, dim: int, period: float = 10000) -> Tensor:
    """cos and sin of t at dim / 2 falling frequencies, float [batch, dim]."""
    half = dim // 2
    frequencies = torch.exp(-math.log(period) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t[:, None].float() * frequencies
    features = torch.cat([angles.cos(), angles.sin()], -1)
    return nn.functional.pad(features, (0, dim % 2))


class TimestepEmbedder(nn.Module):
    """t [batch] -> float [batch, dim]: 256 sinusoids, Linear, SiLU, Linear."""

    def __init__(self, dim: int, features: int = 256):
        super().__init__()
        self.features = features
        self.fc1, self.fc2 = nn.Linear(features, dim), nn.Linear(dim, dim)

    def forward(self, t: Tensor) -> Tensor:
        return self.fc2(nn.functional.silu(self.fc1(timestep_features(t, self.features).to(self.fc1.weight.dtype))))


# fixed position tables ----------------------------------------------------------------------------------------------


def sincos_table(positions: np.ndarray, dim: int) -> np.ndarray:
    """sin then cos of positions [n] at dim / 2 frequencies 10000^(-2i/dim): float64 [n, dim]."""
    angles = np.outer(positions.reshape(-1), 1 / 10000 ** (np.arange(dim // 2, dtype=np.float64) / (dim / 2)))
    return np.concatenate([np.sin(angles), np.cos(angles)], 1)


def sincos_grid(height: int, width: int, dim: int) -> np.ndarray:
    """Half the channels from the column, half from the row (in this order), row-major: float64 [height * width, dim]."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.concatenate([sincos_table(columns, dim // 2), sincos_table(rows, dim // 2)], 1)
