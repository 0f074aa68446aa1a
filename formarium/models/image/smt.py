"""Scale-Aware Modulation Meet Transformer (Lin et al., ICCV 2023, arXiv 2307.08579).

Early stages mix tokens by *modulation*: a value v is multiplied by a modulator that convolutions of growing kernels made (multi-head mixed
convolution), after channels of every head were brought together and mixed (scale-aware aggregation). The last stage mixes by attention,
and stage 3 alternates the two ("evolutionary hybrid"), as dependencies grow from local to global.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.maps import Grid, init_convs, map_to_tokens, run_stages, tokens_to_map
from formarium.tasks.image_classification.model import ImageClassifier


class ScaleAwareModulation(nn.Module):
    """x: float [batch, h w, dim]. Returns the same shape: out(modulator * v) (section 3.1).

    Head i of `heads` sees a depthwise convolution of kernel 3 + 2i. Aggregation: channel g of all heads forms group g; a grouped 1x1
    convolution widens each group by `expand`, and a dense one brings the width back.
    """

    def __init__(self, dim: int, heads: int, expand: int, qkv_bias: bool):
        super().__init__()
        if dim % heads:
            raise BadInput("SMT modulation", expected=f"a width that {heads} heads divide", got=str(dim))
        group = dim // heads
        self.heads = heads
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.s = nn.Linear(dim, dim, bias=qkv_bias)
        self.mixed = nn.ModuleList(nn.Conv2d(group, group, 3 + 2 * i, padding=1 + i, groups=group) for i in range(heads))
        self.gather = nn.Conv2d(dim, dim * expand, 1, groups=group)
        self.norm = nn.BatchNorm2d(dim * expand)
        self.reduce = nn.Conv2d(dim * expand, dim, 1)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return self.out(map_to_tokens(self.modulator(x, grid)) * self.v(x))

    def modulator(self, x: Tensor, grid: Grid) -> Tensor:
        """The map [batch, dim, h, w] that multiplies v."""
        parts = tokens_to_map(self.s(x), grid).chunk(self.heads, dim=1)
        scales = torch.stack([conv(part) for conv, part in zip(self.mixed, parts, strict=True)], dim=2)  # b group heads h w
        return self.reduce(F.gelu(self.norm(self.gather(scales.flatten(1, 2)))))


class LocallyEnhancedAttention(nn.Module):
    """Multi-head self-attention plus a depthwise 3x3 convolution of v. x: float [batch, h w, dim]. Returns the same shape."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.local = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        kv = self.kv(x)
        (q,), (k, v) = split_heads(self.q(x), self.heads), split_heads(kv, self.heads, 2)
        near = map_to_tokens(self.local(tokens_to_map(kv.chunk(2, dim=-1)[1], grid)))
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)) + near)


class ConvMLP(nn.Module):
    """Linear, x + depthwise 3x3, GELU, Linear."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.local = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.fc1(x)
        return self.fc2(F.gelu(x + map_to_tokens(self.local(tokens_to_map(x, grid)))))


class Block(nn.Module):
    """Pre-norm: x + mixer(LN x), then x + MLP(LN x), each scaled per channel where `layer_scale` is given."""

    def __init__(self, dim: int, mixer: nn.Module, mlp_ratio: float, drop_path: float, layer_scale: float | None):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.mixer = mixer
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvMLP(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        self.scale1 = self.scale2 = None
        if layer_scale is not None:
            self.scale1, self.scale2 = (nn.Parameter(torch.full((dim,), layer_scale)) for _ in range(2))
        self.tap = Tap()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        mixed = self.mixer(self.norm1(x), grid)
        x = x + self.drop(mixed if self.scale1 is None else self.scale1 * mixed)
        fed = self.mlp(self.norm2(x), grid)
        x = x + self.drop(fed if self.scale2 is None else self.scale2 * fed)
        return self.tap(x, grid=grid)


class Stem(nn.Sequential):
    """A map at stride 4: strided convolution, BatchNorm, ReLU, convolution with kernel = stride = 2."""

    def __init__(self, in_channels: int, dim: int, kernel: int):
        conv = nn.Conv2d(in_channels, dim, kernel, 2, padding=3 if kernel == 7 else 1, bias=False)
        super().__init__(conv, nn.BatchNorm2d(dim), nn.ReLU(), nn.Conv2d(dim, dim, 2, 2))


class Stage(nn.Module):
    """Embedding at half the resolution (a quarter in the first stage), blocks, LayerNorm. A map in; tokens and grid out."""

    def __init__(self, embed: nn.Module, dim: int, blocks: list[Block]):
        super().__init__()
        self.embed = embed
        self.embed_norm = nn.LayerNorm(dim)
        self.tokens = Tap()
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = self.embed(x)
        grid = (x.shape[2], x.shape[3])
        x = self.tokens(self.embed_norm(map_to_tokens(x)), grid=grid)
        for block in self.blocks:
            x = block(x, grid)
        return self.norm(x), grid


class SMT(ImageClassifier):
    dynamic_size = True

    @dataclass(frozen=True)
    class Config:
        dims: tuple[int, ...] = (64, 128, 256, 512)
        depths: tuple[int, ...] = (2, 2, 8, 1)
        modulation_heads: tuple[int, ...] = (4, 4, 4, -1)
        attention_heads: tuple[int, ...] = (-1, -1, 8, 16)
        modulates: tuple[bool, ...] = (True, True, True, False)  # a stage's mixer; in the third, odd blocks attend all the same
        mlp_ratios: tuple[float, ...] = (4, 4, 4, 2)
        expand: int = 2
        stem_kernel: int = 3
        qkv_bias: bool = True
        layer_scale: float | None = None
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False

    def __init__(self, config: Config):
        super().__init__(config)
        c, stages = config, []
        rates = drop_path_rates(c.drop_path, c.depths)
        for i, dim in enumerate(c.dims):
            embed = nn.Conv2d(c.dims[i - 1], dim, 3, 2, 1) if i else Stem(c.in_channels, dim, c.stem_kernel)
            blocks = [Block(dim, self._mixer(i, j), c.mlp_ratios[i], rates[i][j], c.layer_scale) for j in range(c.depths[i])]
            stages.append(Stage(embed, dim, blocks))
        self.stages = nn.ModuleList(stages)
        if not c.dense:
            self.features = Tap()
            self.head = nn.Linear(c.dims[-1], c.num_classes)
        init_transformer(self)
        init_convs(self)

    def _mixer(self, stage: int, block: int) -> nn.Module:
        c = self.config
        if c.modulates[stage] and not (stage == 2 and block % 2):
            return ScaleAwareModulation(c.dims[stage], c.modulation_heads[stage], c.expand, c.qkv_bias)
        return LocallyEnhancedAttention(c.dims[stage], c.attention_heads[stage], c.qkv_bias)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] (or the pyramid, where dense)."""
        if self.config.dense:
            return self.pyramid(image)
        tokens, grid = run_stages(self.stages, image)[-1]
        return self.head(self.features(tokens, grid=grid).mean(1))

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Normalised maps [batch, dims[i], h, w] at strides 4, 8, 16, 32."""
        return tuple(tokens_to_map(tokens, grid) for tokens, grid in run_stages(self.stages, image))

    def check_size(self, height: int, width: int) -> None:
        if min(height, width) < 8:
            raise BadInput("image size", expected="at least 8x8", got=f"{height}x{width}", fix="resize the image")
