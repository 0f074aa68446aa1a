"""Once for Both's search spaces: which sizes a module may get, and how each of its units is gated while they are searched.

A module's units (hidden units, channels of heads, embedding channels) have scores s; candidate sizes ("cells") have logits alpha.
With p the softmax over the cells that are alive, the unit of rank j is covered by m_j = sum of p over the cells whose prefix holds j, and
is gated by

    w sigmoid(s) + (1 - w) m_rank        w falls from 0.99 to 0.1: importance first, sparsity later
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

THRESHOLD = 0.2  # a cell dies when its share is at most this over the number of cells alive


class Space(nn.Module):
    """Sizes (heads, width) of a module with so many heads of some width; one head for MLPs and embeddings.

    heads, widths: the candidates, rising. scored: "units", "heads" or "channels" have scores of their own, or "" where nothing is searched.
    alpha: float [cells of heads, cells of widths]; score: float [heads, width], one of them 1 where that isn't scored.
    """

    alive: Tensor
    cells: Tensor

    def __init__(self, size: tuple[int, int], heads: Sequence[int], widths: Sequence[int], scored: str = "units", scale: float = 1.0):
        super().__init__()
        self.size, self.heads, self.widths, self.scale = size, tuple(heads), tuple(widths), scale
        self.alpha = nn.Parameter(torch.rand(len(heads), len(widths)))
        if scored:
            shape = (1 if scored == "channels" else size[0], 1 if scored == "heads" else size[1])
            self.score = nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.2))
        self.searched, self.w = bool(scored), 0.99
        self.register_buffer("alive", torch.ones(len(heads), len(widths), dtype=torch.bool))
        covers = [torch.arange(most)[None, :] < torch.tensor(cells)[:, None] for most, cells in zip(size, (heads, widths), strict=True)]
        self.register_buffer("cells", (covers[0][:, :, None, None] & covers[1][None, None]).float(), persistent=False)  # a heads b width

    def shares(self) -> Tensor:
        """p: float [cells of heads, cells of widths], 0 for dead cells."""
        return (self.scale * self.alpha).masked_fill(~self.alive, -math.inf).flatten().softmax(0).view_as(self.alpha)

    def mask(self) -> Tensor:
        """m by rank, float [heads, width]: in [0, 1], never rising along either."""
        return torch.einsum("ab,ahbd->hd", self.shares(), self.cells)

    def ranks(self) -> tuple[Tensor, Tensor]:
        """Each head's rank by the sum of its units' importance, [heads], and each unit's inside its head by score, [heads, width]."""
        score = self.score.detach().expand(self.size)
        heads = self.score.detach().sigmoid().sum(1).expand(self.size[0])
        first = heads.argsort(descending=True, stable=True).argsort()
        return first, score.argsort(dim=1, descending=True, stable=True).argsort(1)

    def gate(self, w: float | None = None) -> Tensor:
        """What units are multiplied by, float [heads, width]; units that no living cell covers get 0."""
        if not self.searched:
            return self.alpha.new_ones(self.size)
        w = self.w if w is None else w
        heads, units = self.ranks()
        m = self.mask()[heads].gather(1, units)
        return (w * self.score.sigmoid() + (1 - w) * m) * (m > 0)

    def one_hot_loss(self, weight: float) -> Tensor:
        """The adaptive one-hot loss: entropy(p) + tan(pi / 2 - pi r) / n + weight * sum of sigmoid(s), over the n living cells.

        r, the variance of p over that of a one-hot, is in [0, 1]; the tangent is +inf at 0 and falls below 0 from 0.5 on. 0 where one
        cell is left.
        """
        n = int(self.alive.sum())
        if n == 1 or not self.searched:
            return self.alpha.new_zeros(())
        p = self.shares()[self.alive]
        r = ((p - p.mean()) ** 2).sum() / (1 - 1 / n)
        entropy = -(p * p.clamp_min(1e-38).log()).sum()
        return entropy + torch.tan(math.pi / 2 - math.pi * r.clamp(1e-6, 1 - 1e-6)) / n + weight * self.score.sigmoid().sum()

    @torch.no_grad()
    def compress(self, threshold: float = THRESHOLD) -> bool:
        """Cells with too small a share die. Whether one is left."""
        n = int(self.alive.sum())
        if n > 1 and self.searched:
            self.alive.copy_(self.shares() > threshold / n)
        return int(self.alive.sum()) == 1

    def extent(self) -> tuple[int, int]:
        """Heads and width of the largest living cells."""
        a, b = self.alive.any(1).nonzero().max(), self.alive.any(0).nonzero().max()
        return self.heads[int(a)], self.widths[int(b)]

    @torch.no_grad()
    def kept(self, heads: int, width: int) -> Tensor:
        """Which units a size keeps, the best first: int64 [heads, width], indices into heads * width units."""
        if not self.searched:
            return torch.arange(self.size[0] * self.size[1]).view(self.size)[:heads, :width]
        first, units = self.ranks()
        best = first.argsort()[:heads]
        return best[:, None] * self.size[1] + units.argsort(1)[best, :width]


class GatedLinear(nn.Linear):
    """A Linear whose outputs are gated by a Space, folded into its weights: `parts` times the units, side by side."""

    def __init__(self, linear: nn.Linear, space: Space, parts: int):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.space, self.parts = [space], parts  # in a list, so that it isn't a sub-module twice

    def folded(self) -> tuple[Tensor, Tensor | None]:
        gate = self.space[0].gate().flatten().repeat(self.parts)
        return self.weight * gate[:, None], None if self.bias is None else self.bias * gate

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, *self.folded())


class LivingDepthwise(nn.Conv2d):
    """A depthwise convolution of gated units, whose bias goes with them."""

    def __init__(self, conv: nn.Conv2d, space: Space):
        nn.Module.__init__(self)
        self.__dict__.update({k: v for k, v in conv.__dict__.items() if not k.startswith("_") and k != "training"})
        self._reversed_padding_repeated_twice = conv._reversed_padding_repeated_twice
        self.weight, self.bias = conv.weight, conv.bias
        self.space = [space]

    def folded(self) -> tuple[Tensor, Tensor | None]:
        return self.weight, None if self.bias is None else self.bias * (self.space[0].gate().flatten() != 0)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, *self.folded())


def attention_cells(heads: int, width: int, even: bool = True) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The paper's: an even number of heads, a quarter of the width to all of it. Where not `even`, odd numbers stay whole, too."""
    step = 2 if even or (heads % 2 == 0 and heads > 1) else 1
    widths = tuple(int(width * (i / width)) for i in range(max(1, width // 4), width + 1, max(width // 8, 1)))
    return tuple(range(step, heads + 1, step)) or (heads,), widths if even or widths[-1] == width else (*widths, width)


def hidden_cells(hidden: int) -> tuple[int, ...]:
    """A quarter of an MLP's hidden units to all of them."""
    cells = tuple(int(hidden * (i / hidden)) for i in range(max(1, hidden // 4), hidden + 1, max(1, hidden // 8)))
    return cells if cells[-1] == hidden else (*cells, hidden)


def embedding_cells(dim: int) -> tuple[int, ...]:
    """Half of the embedding's channels to all of them."""
    return tuple(int(dim * (i / dim)) for i in range(dim // 2, dim + 1, max(1, min(dim // 32, 12))))
