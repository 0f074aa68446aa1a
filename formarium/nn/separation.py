"""Separated sources against true ones: the scale-invariant ratio, the best order, one order kept along a recording, fitting levels."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import torch
from torch import Tensor

from formarium.nn.kept import kept


def si_sdr(estimate: Tensor, reference: Tensor, eps: float = 1e-8) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al. 2019), means removed: [..., samples] -> [...].

    The reference's multiple that is nearest to the estimate is the signal, what is left of the estimate the distortion.
    """
    estimate = estimate - estimate.mean(-1, keepdim=True)
    reference = reference - reference.mean(-1, keepdim=True)
    scale = (estimate * reference).sum(-1, keepdim=True) / (reference.square().sum(-1, keepdim=True) + eps)
    signal = scale * reference
    distortion = estimate - signal
    return 10 * torch.log10((signal.square().sum(-1) + eps) / (distortion.square().sum(-1) + eps))


@kept(8)
def _orders(count: int, device: torch.device) -> Tensor:
    return torch.tensor([*permutations(range(count))], device=device)


def best_order(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The assignment of sources with the largest mean score.

    scores: float [batch, n, n], of estimate i against reference j. Returns that mean, float [batch], and for each reference the estimate
    that is meant for it, int64 [batch, n].
    """
    orders = _orders(scores.shape[-1], scores.device)  # p n
    references = torch.arange(scores.shape[-1], device=scores.device)
    means = scores[:, orders, references].mean(-1)  # b p
    best, which = means.max(1)
    return best, orders[which]


def pit_si_sdr(estimates: Tensor, references: Tensor) -> tuple[Tensor, Tensor]:
    """Mean SI-SDR in dB of the best order, float [batch], and that order (see `best_order`). Both inputs [batch, n, samples]."""
    return best_order(si_sdr(estimates[:, :, None], references[:, None]))


def reorder(sources: Tensor, order: Tensor) -> Tensor:
    """[batch, n, samples] with the sources in the order [batch, n] gives."""
    return sources.gather(1, order[..., None].expand(-1, -1, sources.shape[-1]))


def fit_levels(sources: Tensor, mixture: Tensor) -> Tensor:
    """Sources [batch, n, samples], each times the factor that brings their sum nearest to the mixture [batch, samples] (least squares)."""
    unit = sources / (sources.norm(dim=2, keepdim=True) + 1e-8)
    gram = unit @ unit.transpose(1, 2)
    gram = gram + 1e-6 * torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)  # two equal sources share the mixture
    return unit * torch.linalg.solve(gram, unit @ mixture[..., None])


def in_chunks(separate: Callable[[Tensor], Tensor], mixture: Tensor, chunk: int, overlap: int) -> Tensor:
    """Separate a long mixture [batch, samples] chunk by chunk; sources [batch, n, samples].

    separate: [batch, samples] -> [batch, n, samples], whose order may differ from chunk to chunk. Neighbours share `overlap` samples (at
    least; the last chunk ends with the mixture): a chunk's sources are put in the order that correlates best with the ones before over
    the shared part, and faded in there. Cost and memory grow linearly with the length.
    """
    length = mixture.shape[1]
    if length <= chunk:
        return separate(mixture)
    starts = [*range(0, length - chunk, chunk - overlap), length - chunk]
    out = separate(mixture[:, :chunk])
    for start in starts[1:]:
        new = separate(mixture[:, start : start + chunk])
        shared = out.shape[2] - start
        old = out[:, :, start:]
        score = new[:, :, :shared] @ old.transpose(1, 2)  # b n n
        size = new[:, :, :shared].norm(dim=2)[:, :, None] * old.norm(dim=2)[:, None] + 1e-8
        new = reorder(new, best_order(score / size)[1])
        fade = torch.linspace(0, 1, shared + 2, device=new.device, dtype=new.dtype)[1:-1]
        middle = old * (1 - fade) + new[:, :, :shared] * fade
        out = torch.cat([out[:, :, :start], middle, new[:, :, shared:]], 2)
    return out
