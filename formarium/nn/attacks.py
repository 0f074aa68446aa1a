"""Adversarial perturbations of images in [0, 1], bounded in every pixel by eps (the L-infinity ball), and turns by right angles.

`loss_of` is any function of perturbed images, float [batch, channels, h, w] -> one loss a sample [batch], or their mean (a scalar).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LossOf = Callable[[Tensor], Tensor]


def uniform_noise(x: Tensor, eps: float) -> Tensor:
    """U(-eps, eps), shaped as x, from torch's generator."""
    return torch.empty_like(x).uniform_(-eps, eps)


def gradient_of(loss_of: LossOf, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The loss at clip(x + noise, 0, 1) and its gradient by the noise alone, 0 where clipping saturates; the weights get none."""
    with torch.enable_grad():
        noise = noise.detach().requires_grad_()
        loss = loss_of((x + noise).clamp(0, 1)).sum()
        (gradient,) = torch.autograd.grad(loss, noise)
    return loss.detach(), gradient


def fgsm_step(noise: Tensor, gradient: Tensor, step: float, eps: float) -> Tensor:
    """One step up the gradient's sign, back into the ball (Goodfellow et al. 2015)."""
    return (noise + step * gradient.sign()).clamp(-eps, eps)


def fast_adversary(loss_of: LossOf, x: Tensor, eps: float, step: float) -> Tensor:
    """One FGSM step from a random start (Wong, Rice, Kolter, ICLR 2020): the perturbed image in [0, 1], without a graph."""
    noise = uniform_noise(x, eps)
    _, gradient = gradient_of(loss_of, x, noise)
    return (x + fgsm_step(noise, gradient, step, eps)).clamp(0, 1).detach()


def pgd(loss_of: LossOf, x: Tensor, eps: float, step: float, iterations: int = 10, restarts: int = 1) -> Tensor:
    """Projected gradient ascent (Madry et al., ICLR 2018) from random starts; each sample keeps the perturbation of its largest loss, the
    unperturbed image included. `loss_of` must give one loss a sample, of the NORMALISED perturbed image. Returns images in [0, 1]."""
    with torch.no_grad():
        best, worst = x.clone(), loss_of(x)
    for _ in range(restarts):
        noise = (x + uniform_noise(x, eps)).clamp(0, 1) - x
        for _ in range(iterations):
            _, gradient = gradient_of(loss_of, x, noise)
            noise = (x + fgsm_step(noise, gradient, step, eps)).clamp(0, 1) - x
        with torch.no_grad():
            loss = loss_of(x + noise)
        better = loss > worst
        best, worst = torch.where(better[:, None, None, None], x + noise, best), torch.where(better, loss, worst)
    return best


def quarter_turns(x: Tensor, turns: Tensor) -> Tensor:
    """Each image turned anticlockwise by its number of quarter turns. x: float [batch, channels, h, w], square where a number is odd;
    turns: int64 [batch]."""
    out = x.clone()
    for k in (1, 2, 3):
        chosen = turns % 4 == k
        if chosen.any():
            out[chosen] = torch.rot90(x[chosen], k, (2, 3))
    return out
