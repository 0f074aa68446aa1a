"""LightViT's parts (Huang et al., arXiv 2207.05557): a light convolutional stem, residual patch merging, a gated feed-forward network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.nn.convs import ConvBN
from formarium.nn.maps import Grid, map_to_tokens, tokens_to_map
from formarium.nn.mlp import MLP
from formarium.nn.ops.activations import gelu


class LightStem(nn.Module):
    """Tokens at stride 8 by a strided convolution, three depthwise ones (the last strided), a strided one, LayerNorm.

    image: float [batch, channels, height, width]. Returns the map at stride 4 [batch, dim / 2, h, w], tokens [batch, h w, dim] and
    their grid.
    """

    def __init__(self, in_channels: int, dim: int):
        super().__init__()
        half = dim // 2
        own = [ConvBN(half, half, 3, stride, groups=half) for stride in (1, 1, 2)]
        self.convs = nn.ModuleList([ConvBN(in_channels, half, 3, 2), *own])
        self.project = nn.Conv2d(half, dim, 3, 2, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Grid]:
        image = image.contiguous(memory_format=torch.channels_last)
        if self.training or torch.compiler.is_compiling() or image.device.type != "cpu" or torch.is_grad_enabled():
            fine, x = self.run(image)
        else:  # one image's maps stay in the cache
            fine, x = (torch.cat(part) for part in zip(*map(self.run, image.split(1)), strict=True))
        return fine, self.norm(map_to_tokens(x)), (x.shape[2], x.shape[3])

    def run(self, fine: Tensor) -> tuple[Tensor, Tensor]:
        """Image to the maps at strides 4 and 8."""
        for conv in self.convs:
            fine = gelu(conv(fine))
        return fine, self.project(fine)


class MergePatches(nn.Module):
    """Half the resolution: Linear(LN(2x2 neighbours side by side)) + Linear(their maximum). Odd maps are padded with zeros.

    x: float [batch, h w, dim]. Returns [batch, ceil(h / 2) * ceil(w / 2), out] and the new grid. `follow` takes tokens that have no
    place on the map to the new width.
    """

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduce = nn.Linear(4 * dim, out, bias=False)
        self.shortcut = nn.Linear(dim, out, bias=False)
        self.norm_follow = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, out, bias=False)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        h, w = grid
        x = tokens_to_map(x, grid)
        if not (isinstance(h, int) and isinstance(w, int) and h % 2 == w % 2 == 0):
            x = F.pad(x, (0, w % 2, 0, h % 2))
        h, w = (h + 1) // 2, (w + 1) // 2
        cells = x.permute(0, 2, 3, 1).unflatten(1, (h, 2)).unflatten(3, (w, 2))  # b h 2 w 2 c
        # neighbours in the order (0,0), (1,0), (0,1), (1,1) as (down, right)
        y = self.reduce(self.norm(cells.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)))
        return y + self.shortcut(map_to_tokens(F.max_pool2d(x, 2))), (h, w)

    def follow(self, g: Tensor) -> Tensor:
        """float [batch, tokens, dim] -> [batch, tokens, out]"""
        return self.project(self.norm_follow(g))


class BiGate(nn.Module):
    """Bi-dimensional attention: x * channel gate * token gate, both in (0, 1), with z = LN(x) and m = GELU(Linear(mean of z)):

    channel gate sigmoid(Linear(m)), token gate sigmoid(Linear([GELU(Linear(z)), m])). x: float [batch, tokens, dim].
    """

    def __init__(self, dim: int, ratio: float = 0.25):
        super().__init__()
        narrow = int(dim * ratio)
        self.norm = nn.LayerNorm(dim)
        self.mean = nn.Linear(dim, narrow)
        self.own = nn.Linear(dim, narrow)
        self.channel = nn.Linear(narrow, dim)
        self.token = nn.Linear(2 * narrow, 1)

    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        mean = F.gelu(self.mean(z.mean(1, keepdim=True)))  # b 1 narrow
        for_own, for_mean = self.token.weight.chunk(2, dim=1)  # the mean's part is the same for all tokens: no need to repeat it
        token = F.linear(F.gelu(self.own(z)), for_own) + F.linear(mean, for_mean, self.token.bias)  # b n 1
        return x * (self.channel(mean).sigmoid() * token.sigmoid())


class GatedMLP(nn.Module):
    """Linear, GELU, Linear, then the gates of BiGate. x: float [batch, tokens, dim]. Returns the same shape."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.mlp = MLP(dim, hidden)
        self.gate = BiGate(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.mlp(x))
