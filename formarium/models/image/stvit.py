"""Vision Transformer with Super Token Sampling (Huang et al., CVPR 2023, arXiv 2211.11167).

Global attention early in the network, made cheap: pixels X [N, C] are softly gathered into N / (h w) super tokens, these attend to one
another, and the result is spread back over the pixels with the same weights,

    STA(X) = Q A(S) S,   S = Qn^T X,   Q = softmax(X S0^T / sqrt(C)),   Qn = Q over its column sums          (eq. 2-7)

where S0 is the mean of each h x w cell and a pixel's weights go to the 3x3 super tokens around its own cell only, so Q has nine entries a
pixel, whatever the size of the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import merge_heads
from formarium.nn.depthwise import ResidualDepthwise
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.maps import Pointwise
from formarium.tasks.image_classification.model import ImageClassifier


def neighbours(x: Tensor) -> Tensor:
    """The 3x3 neighbourhood of every cell, row-major, zeros beyond the border: [b, rows, columns, c] -> [b, rows, columns, 9, c]."""
    rows, columns = x.shape[1:3]
    x = F.pad(x, (0, 0, 1, 1, 1, 1))
    return torch.stack([x[:, i : i + rows, j : j + columns] for i in range(3) for j in range(3)], 3)


def scatter_neighbours(x: Tensor) -> Tensor:
    """The adjoint of `neighbours`: each cell's nine entries are added to the cells they belong to; what lies beyond the border is lost.

    [b, rows, columns, 9, c] -> [b, rows, columns, c].
    """
    shifted = [F.pad(part, (0, 0, n % 3, 2 - n % 3, n // 3, 2 - n // 3)) for n, part in enumerate(x.unbind(3))]
    total = shifted[0]
    for part in shifted[1:]:
        total = total + part
    return total[:, 1:-1, 1:-1]


class SuperTokenAttention(nn.Module):
    """Super token attention (section 3.2). x: float [b, height, width, dim], any size. Returns the same shape.

    size: pixels (height, width) of a super token's cell; (1, 1) is plain global attention. The image is padded with zeros on the right
    and at the bottom to whole cells. iterations: how often the weights are estimated. The weights carry no gradient unless
    `association_gradient`.
    """

    def __init__(self, c: STViT.Config, stage: int):
        super().__init__()
        dim, size = c.dims[stage], c.super_tokens[stage]
        self.heads, self.iterations, self.association_gradient = c.heads[stage], c.iterations[stage], c.association_gradient
        if dim % self.heads:
            raise BadInput("STViT attention", expected=f"a width that {self.heads} heads divide", got=str(dim))
        self.size = (size, size) if isinstance(size, int) else size
        self.scale = c.qk_scale or (dim // self.heads) ** -0.5
        self.qkv = Pointwise(dim, 3 * dim, bias=c.qkv_bias)
        self.out = Pointwise(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        if self.size == (1, 1):
            return self.attend(x)
        height, width = x.shape[1:3]
        pixels = self.cells(x)
        association = self.associate(pixels)
        spread = association @ neighbours(self.attend(self.sample(pixels, association)))  # b rows columns (h w) c
        out = spread.unflatten(3, self.size).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return out[:, :height, :width] if out.shape[1:3] != x.shape[1:3] else out

    def cells(self, x: Tensor) -> Tensor:
        """Pixels by their cell: [b, height, width, c] -> [b, rows, columns, h w, c]."""
        (height, width), (h, w) = x.shape[1:3], self.size
        below, right = -height % h, -width % w
        if below or right:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        return x.unflatten(1, (-1, h)).unflatten(3, (-1, w)).transpose(2, 3).flatten(3, 4)

    def associate(self, pixels: Tensor) -> Tensor:
        """Q, the weights of each pixel for the nine super tokens around it: [b, rows, columns, h w, 9], the nine summing to 1.

        A neighbour beyond the border has affinity 0 and takes its share of the weight out of the image.
        """
        if not self.association_gradient:
            pixels = pixels.detach()
        tokens = pixels.mean(3)
        for i in range(self.iterations):
            affinity = pixels @ neighbours(tokens).transpose(3, 4) * pixels.shape[-1] ** -0.5
            association = affinity.softmax(-1)
            if i < self.iterations - 1:
                tokens = self.sample(pixels, association)
        return association

    def sample(self, pixels: Tensor, association: Tensor) -> Tensor:
        """Super tokens [b, rows, columns, c]: weighted means of the pixels around them."""
        total = scatter_neighbours(association.sum(3)[..., None])
        return scatter_neighbours(association.transpose(3, 4) @ pixels) / (total + 1e-12)

    def attend(self, x: Tensor) -> Tensor:
        """Multi-head self-attention among all tokens of a grid [b, rows, columns, c]."""
        grid = x.shape[1:3]
        qkv = self.qkv(x.flatten(1, 2))
        q, k, v = (t.transpose(1, 2) for t in qkv.unflatten(2, (self.heads, 3, -1)).unbind(3))  # b heads n width
        out = merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale))
        return self.out(out).unflatten(1, grid)


class ConvMLP(nn.Module):
    """Linear, GELU, u + depthwise 3x3 of u, Linear. x: float [b, height, width, dim]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = Pointwise(dim, hidden)
        self.local = ResidualDepthwise(hidden)
        self.fc2 = Pointwise(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.local(F.gelu(self.fc1(x))))


class Block(nn.Module):
    """x + depthwise(x), the positions; x + STA(LN x); x + ConvMLP(BN x). x: float [b, height, width, dim]."""

    def __init__(self, c: STViT.Config, stage: int, drop_path: float):
        super().__init__()
        dim = c.dims[stage]
        self.positions = ResidualDepthwise(dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attention = SuperTokenAttention(c, stage)
        self.norm2 = nn.BatchNorm2d(dim)
        self.mlp = ConvMLP(dim, int(dim * c.mlp_ratio))
        self.drop = DropPath(drop_path)
        self.scale1 = self.scale2 = None
        if c.layer_scales[stage]:
            self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), c.layer_scale_init)) for _ in range(2))
        self.tap = Tap("grid")

    def forward(self, x: Tensor) -> Tensor:
        x = self.positions(x)
        mixed = self.attention(self.norm1(x))
        x = x + self.drop(mixed if self.scale1 is None else self.scale1 * mixed)
        fed = self.mlp(self.norm2(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        x = x + self.drop(fed if self.scale2 is None else self.scale2 * fed)
        return self.tap(x)


def stem(in_channels: int, dim: int) -> nn.Sequential:
    """Four 3x3 convolutions, each with GELU and then BatchNorm, to a map at stride 4."""
    layers: list[nn.Module] = []
    for source, out, stride in ((in_channels, dim // 2, 2), (dim // 2, dim // 2, 1), (dim // 2, dim, 2), (dim, dim, 1)):
        layers += [nn.Conv2d(source, out, 3, stride, 1), nn.GELU(), nn.BatchNorm2d(out)]
    return nn.Sequential(*layers)


def merge(dim: int, out: int) -> nn.Sequential:
    """A strided 3x3 convolution with BatchNorm, to half the resolution."""
    return nn.Sequential(nn.Conv2d(dim, out, 3, 2, 1), nn.BatchNorm2d(out))


class Stage(nn.Module):
    """Embedding (the stem, or a merge), then blocks. A map [b, in_dim, H, W] in, a grid [b, h, w, dim] out."""

    def __init__(self, embed: nn.Module, blocks: list[Block]):
        super().__init__()
        self.embed = embed
        self.tokens = Tap("grid")
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.embed(x).permute(0, 2, 3, 1))
        for block in self.blocks:
            x = block(x)
        return x


class STViT(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        dims: tuple[int, ...] = (64, 128, 320, 512)
        depths: tuple[int, ...] = (3, 5, 9, 3)
        heads: tuple[int, ...] = (1, 2, 5, 8)
        super_tokens: tuple[int | tuple[int, int], ...] = (8, 4, 1, 1)  # pixels of a cell, one side or (height, width)
        iterations: tuple[int, ...] = (1, 1, 1, 1)
        mlp_ratio: float = 4.0
        projection: int = 1024  # width before the head
        qkv_bias: bool = True
        qk_scale: float | None = None  # 1 / sqrt(head width) where None
        layer_scales: tuple[bool, ...] = (False, False, False, False)
        layer_scale_init: float = 1e-6
        association_gradient: bool = False
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False  # no projection or head: forward gives the pyramid

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        rates = drop_path_rates(c.drop_path, c.depths)
        self.stages = nn.ModuleList(
            Stage(merge(c.dims[i - 1], dim) if i else stem(c.in_channels, dim), [Block(c, i, rate) for rate in rates[i]])
            for i, dim in enumerate(c.dims)
        )
        if not c.dense:
            self.projection = Pointwise(c.dims[-1], c.projection)
            self.norm = nn.BatchNorm2d(c.projection)
            self.features = Tap("map")
            self.head = nn.Linear(c.projection, c.num_classes)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] (or the pyramid, where dense)."""
        if self.config.dense:
            return self.pyramid(image)
        x = self.projection(self._run(image)[-1]).permute(0, 3, 1, 2)
        return self.head(self.features(F.silu(self.norm(x))).mean((2, 3)))

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Maps [batch, dims[i], h, w] at strides 4, 8, 16, 32, sides rounded up."""
        return tuple(x.permute(0, 3, 1, 2) for x in self._run(image))

    def _run(self, image: Tensor) -> list[Tensor]:
        out, x = [], image.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            out.append(stage(x))
            x = out[-1].permute(0, 3, 1, 2)
        return out
