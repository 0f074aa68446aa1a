"""Vector quantisation with codebooks that follow the data, and its residual form (Zeghidour et al. 2021, algorithm 1).

A codebook is no parameter: each code is the moving average of the vectors that chose it (van den Oord et al. 2017, appendix A), and codes
that nothing chooses are put where data are. Gradients pass straight through.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantised(NamedTuple):
    """vectors: float [batch, tokens, dim]. codes: int64 [batch, tokens, levels], -1 at levels left out. commitment: the mean square
    between vectors and the codes they chose. perplexity: exp of the entropy of the codes' use, a mean over levels; both scalars."""

    vectors: Tensor
    codes: Tensor
    commitment: Tensor
    perplexity: Tensor


class Codebook(nn.Module):
    """`codes` vectors of width `dim`. The first training batch fills it; `decay` is of the moving averages.

    In training the choice is Gumbel sampling at `temperature` (0: the nearest code), and codes whose average count falls below 1 are
    replaced by vectors of the batch, drawn at random.
    """

    def __init__(self, codes: int, dim: int, decay: float = 0.99, temperature: float = 0.0):
        super().__init__()
        self.decay, self.temperature = decay, temperature
        self.register_buffer("codebook", torch.zeros(codes, dim))
        self.register_buffer("total", torch.zeros(codes, dim))
        self.register_buffer("count", torch.zeros(codes))  # all zero: not filled yet

    codebook: Tensor
    total: Tensor
    count: Tensor

    def nearest(self, x: Tensor, temperature: float = 0.0) -> Tensor:
        """Codes of vectors [n, dim], int64 [n]."""
        distance = x.square().sum(1, keepdim=True) - 2 * x @ self.codebook.T + self.codebook.square().sum(1)
        if temperature <= 0:
            return distance.argmin(1)
        uniform = torch.rand_like(distance).clamp_min(1e-20)
        return (-distance / temperature - (-uniform.log()).clamp_min(1e-20).log()).argmax(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors [n, dim] to the codes' vectors, the codes [n] and their perplexity; in training the codebook moves after the choice."""
        if self.training and not bool(self.count.any()):
            self.fill(x.detach())
        codes = self.nearest(x.detach(), self.temperature if self.training else 0.0)
        chosen = self.codebook[codes]
        counts = torch.bincount(codes, minlength=len(self.codebook)).to(x.dtype)
        if self.training:
            self.follow(x.detach(), codes, counts)
        share = counts / counts.sum().clamp_min(1)
        return chosen, codes, (-(share * (share + 1e-7).log()).sum()).exp()

    @torch.no_grad()
    def fill(self, x: Tensor) -> None:
        """Start from vectors of a batch."""
        self.codebook.copy_(self._drawn(x))
        self.total.copy_(self.codebook)
        self.count.fill_(1)

    @torch.no_grad()
    def follow(self, x: Tensor, codes: Tensor, counts: Tensor) -> None:
        """Move each code to the average of what chose it, and revive those that nothing chooses."""
        total = torch.zeros_like(self.total).index_add_(0, codes, x.to(self.total.dtype))
        self.total.lerp_(total, 1 - self.decay)
        self.count.lerp_(counts.to(self.count.dtype), 1 - self.decay)
        used = (self.count >= 1)[:, None]
        self.codebook.copy_(torch.where(used, self.total / self.count.clamp_min(1e-6)[:, None], self._drawn(x)))

    def _drawn(self, x: Tensor) -> Tensor:
        """As many vectors of x as there are codes, each with a little noise where x has fewer."""
        wanted, there = self.codebook.shape[0], len(x)
        if there >= wanted:
            return x[torch.randperm(there, device=x.device)[:wanted]].to(self.codebook.dtype)
        out = x.repeat(-(-wanted // there), 1)[:wanted]
        return (out + torch.randn_like(out) * 0.01 / x.shape[1] ** 0.5).to(self.codebook.dtype)


class ResidualQuantiser(nn.Module):
    """`levels` codebooks, each of what those before it left over.

    shared: one codebook for all levels. dropout: how often a training batch leaves out the levels after a random one, so that the first
    ones learn as much as they can. Straight-through gradients add up over the levels, as in the released implementations.
    """

    def __init__(
        self, levels: int, codes: int, dim: int, shared: bool = False, dropout: float = 0.0, decay: float = 0.99, temperature: float = 0.0
    ):
        super().__init__()
        self.dropout = dropout
        first = Codebook(codes, dim, decay, temperature)
        self.levels = nn.ModuleList([first if shared or not i else Codebook(codes, dim, decay, temperature) for i in range(levels)])

    def forward(self, x: Tensor, levels: int | None = None) -> Quantised:
        """x float [batch, tokens, dim]. levels: how many to use; by default all, in training those that dropout leaves."""
        kept = levels or len(self.levels)
        if levels is None and self.training and torch.rand(()) < self.dropout:
            kept = int(torch.randint(1, len(self.levels) + 1, ()))
        residual, out = x, torch.zeros_like(x)
        codes, losses, perplexities = [], [], []
        for level in self.levels[:kept]:
            chosen, index, perplexity = level(residual.reshape(-1, x.shape[-1]))
            chosen = chosen.view_as(x).to(x.dtype)
            losses.append(F.mse_loss(residual, chosen))
            out = out + residual + (chosen - residual).detach()
            residual = residual - chosen
            codes.append(index.view(x.shape[:-1]))
            perplexities.append(perplexity)
        codes += [torch.full_like(codes[0], -1)] * (len(self.levels) - kept)
        return Quantised(out, torch.stack(codes, -1), torch.stack(losses).mean(), torch.stack(perplexities).mean())

    def encode(self, x: Tensor) -> Tensor:
        """The nearest codes of x [batch, tokens, dim], int64 [batch, tokens, levels], whatever the mode; nothing moves."""
        residual, codes = x.reshape(-1, x.shape[-1]), []
        for level in self.levels:
            codes.append(level.nearest(residual))
            residual = residual - level.codebook[codes[-1]]
        return torch.stack(codes, -1).view(*x.shape[:-1], len(self.levels))

    def lookup(self, codes: Tensor) -> Tensor:
        """The sum of the codes' vectors: int64 [batch, tokens, up to `levels`], -1 for none, to float [batch, tokens, dim]."""
        there = (codes >= 0)[..., None]
        picked = [level.codebook[codes[..., i].clamp_min(0)] * there[..., i, :] for i, level in enumerate(self.levels[: codes.shape[-1]])]
        return torch.stack(picked).sum(0)
