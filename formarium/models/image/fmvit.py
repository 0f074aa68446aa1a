"""FMViT: A multiple-frequency mixing Vision Transformer (Tan et al., 2023, arXiv 2311.05707).

A block mixes several frequencies: low ones by attention among pooled keys, middle ones by a filter at half resolution, high ones by a
filter at full resolution. Every layer is reparameterised: it trains as a sum of grouped convolutions, each with its BatchNorm, and is
served as one convolution (`FMViT.fuse`). No LayerNorm anywhere.

Rep(x) = sum_g BN_g(Conv_g(x)) + BN(x)                              (one convolution after `fuse`)
CFB:   x + Rep1(ReLU(Rep3(x))),  x + gMLP(x)                        convolutional fusion block
FMB:   low, mid, high = Rep1(x)                                     widths C/2, C/4, C/4
       x + Rep1([low + RLMHSA(low), mid + up(Rep3(pool(mid))), high + Rep3(high)]),  x + gMLP(x)
gMLP:  Rep1(ReLU(Rep1(x)))                                          multi-group reparameterised, not the gated MLP of Liu et al.

The paper publishes the ideas and three names; all sizes and details are our reading.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.convs import ConvBN
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.maps import init_convs
from formarium.nn.reparameterised import PlainConv, RepConv
from formarium.tasks.image_classification.model import ImageClassifier


class Rep:
    """Makes the reparameterised layers of one network, in their training form or fused to one convolution each."""

    def __init__(self, c: FMViT.Config):
        self.fused, self.groups, self.widths = c.fused, c.groups, c.group_widths

    def one(self, dim: int, out: int) -> nn.Module:
        """1x1: 1, 2 and 4 groups."""
        return self._make(dim, out, 1, self.groups)

    def three(self, dim: int) -> nn.Module:
        """3x3: groups of 24 and of 8 channels."""
        if any(dim % width for width in self.widths):
            raise BadInput("FMViT width", expected=f"widths of 3x3 layers that {self.widths} divide", got=str(dim))
        return self._make(dim, dim, 3, tuple(dim // width for width in self.widths))

    def _make(self, dim: int, out: int, kernel: int, groups: tuple[int, ...]) -> nn.Module:
        return PlainConv(dim, out, kernel, math.gcd(*groups)) if self.fused else RepConv(dim, out, kernel, groups)


class GroupMLP(nn.Module):
    """gMLP: x [batch, dim, h, w] to the same shape, `ratio` times as wide in between."""

    def __init__(self, rep: Rep, dim: int, ratio: int):
        super().__init__()
        self.widen, self.narrow = rep.one(dim, ratio * dim), rep.one(ratio * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.relu(self.widen(x)))


class PooledAttention(nn.Module):
    """RLMHSA: queries at full resolution, keys and values from cells of reduction x reduction pixels averaged.

    x: float [batch, dim, h, w], sides multiples of `reduction`. Returns the same shape.
    """

    def __init__(self, rep: Rep, dim: int, reduction: int, head_width: int):
        super().__init__()
        if dim % head_width:
            raise BadInput("FMViT attention", expected=f"a width that heads of {head_width} fill", got=str(dim))
        self.heads, self.reduction = dim // head_width, reduction
        self.q, self.k, self.v, self.out = (rep.one(dim, dim) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.avg_pool2d(x, self.reduction) if self.reduction > 1 else x
        q, k, v = self._split(self.q(x)), self._split(self.k(pooled)), self._split(self.v(pooled))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # b (h w) c
        return self.out(y.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2))

    def _split(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(2, (self.heads, -1)).transpose(1, 2)


class ConvMixer(nn.Module):
    """What a CFB adds first: Rep1(ReLU(Rep3(x)))."""

    def __init__(self, rep: Rep, dim: int):
        super().__init__()
        self.local, self.out = rep.three(dim), rep.one(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.local(x)))


class FrequencyMixer(nn.Module):
    """What an FMB adds first: half of the channels low, a quarter middle, a quarter high frequencies, and their mixture."""

    def __init__(self, rep: Rep, dim: int, reduction: int, head_width: int):
        super().__init__()
        self.widths = [dim // 2, dim // 4, dim - dim // 2 - dim // 4]
        self.enter, self.out = rep.one(dim, dim), rep.one(dim, dim)
        self.low = PooledAttention(rep, self.widths[0], reduction, head_width)
        self.mid, self.high = rep.three(self.widths[1]), rep.three(self.widths[2])

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.enter(x)))

    def mix(self, y: Tensor) -> Tensor:
        """[batch, dim, h, w]: low, middle and high frequencies side by side."""
        low, mid, high = y.split(self.widths, dim=1)
        return torch.cat([low + self.low(low), mid + self.band(mid), high + self.high(high)], dim=1)

    def band(self, mid: Tensor) -> Tensor:
        """The 3x3 filter at half resolution: what lies between attention's averages and single pixels."""
        half = self.mid(F.avg_pool2d(mid, 2, ceil_mode=True))
        return F.interpolate(half, size=mid.shape[2:], mode="nearest")


class Block(nn.Module):
    """x + mixer(x), then x + gMLP(x). x: float [batch, dim, h, w]."""

    def __init__(self, mixer: nn.Module, mlp: GroupMLP, drop_path: float):
        super().__init__()
        self.mixer, self.mlp, self.drop = mixer, mlp, DropPath(drop_path)
        self.tap = Tap("map")

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.mixer(x))
        return self.tap(x + self.drop(self.mlp(x)))


class Stage(nn.Module):
    """Average of 2x2 pixels (not in the first stage), 1x1 convolution with BatchNorm, blocks."""

    def __init__(self, halve: bool, embed: nn.Module, blocks: list[Block]):
        super().__init__()
        self.halve, self.embed = halve, embed
        self.tokens = Tap("map")
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(self.embed(F.avg_pool2d(x, 2) if self.halve else x))
        for block in self.blocks:
            x = block(x)
        return x


class FMViT(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        stem: tuple[int, ...] = (64, 32, 64)  # widths; the last one twice
        stem_strides: tuple[int, ...] = (2, 1, 1, 2)
        dims: tuple[int, ...] = (96, 192, 384, 768)
        depths: tuple[int, ...] = (3, 4, 10, 3)
        mix_every: tuple[int, ...] = (0, 4, 5, 3)  # a stage's every n-th block, and its last, mixes frequencies; 0: none
        reductions: tuple[int, ...] = (8, 4, 2, 1)
        groups: tuple[int, ...] = (1, 2, 4)  # of the branches of 1x1 layers
        group_widths: tuple[int, ...] = (24, 8)  # channels of a group, in the branches of 3x3 layers
        head_width: int = 24
        mlp_ratio: int = 3  # in a CFB
        mix_mlp_ratio: int = 2  # in an FMB
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False
        fused: bool = False  # the deployment form: one convolution for each reparameterised layer

    def __init__(self, config: Config):
        super().__init__(config)
        c, rep = config, Rep(config)
        rates = drop_path_rates(c.drop_path, c.depths)
        widths = [c.in_channels, *c.stem, c.stem[-1]]
        self.stem = nn.ModuleList(ConvBN(widths[i], widths[i + 1], 3, stride) for i, stride in enumerate(c.stem_strides))
        stages, before = [], widths[-1]
        for i, dim in enumerate(c.dims):
            blocks = [self._block(rep, i, j, rate) for j, rate in enumerate(rates[i])]
            stages.append(Stage(i > 0, ConvBN(before, dim), blocks))
            before = dim
        self.stages = nn.ModuleList(stages)
        if not c.dense:
            self.norm = nn.BatchNorm2d(c.dims[-1])
            self.features = Tap("map")
            self.head = nn.Linear(c.dims[-1], c.num_classes)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        init_convs(self)

    def _block(self, rep: Rep, stage: int, block: int, drop_path: float) -> Block:
        c, dim = self.config, self.config.dims[stage]
        every = c.mix_every[stage]
        if every and ((block + 1) % every == 0 or block + 1 == c.depths[stage]):
            mixer: nn.Module = FrequencyMixer(rep, dim, c.reductions[stage], c.head_width)
            return Block(mixer, GroupMLP(rep, dim, c.mix_mlp_ratio), drop_path)
        return Block(ConvMixer(rep, dim), GroupMLP(rep, dim, c.mlp_ratio), drop_path)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width], sides multiples of 32, to logits [batch, classes] (or the pyramid)."""
        if self.config.dense:
            return self.pyramid(image)
        return self.head(self.features(self.norm(self._run(image)[-1])).mean((2, 3)))

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Four maps [batch, dims[i], height / stride, width / stride] at strides 4, 8, 16, 32."""
        return tuple(self._run(image))

    def _run(self, image: Tensor) -> list[Tensor]:
        x, out = image.contiguous(memory_format=torch.channels_last), []
        for conv in self.stem:
            x = F.relu(conv(x))
        for stage in self.stages:
            x = stage(x)
            out.append(x)
        return out

    def fuse(self) -> FMViT:
        """Replace every reparameterised layer by one convolution, in place, for deployment after training; returns self, in eval mode.

        The same function in evaluation, with fewer parameters (the plain convolutions of stem and stage starts keep their BatchNorm).
        `config.fused` says so afterwards, so that it saves, loads and exports.
        """
        self.eval()
        for parent in [*self.modules()]:
            for name, child in [*parent.named_children()]:
                if isinstance(child, RepConv):
                    setattr(parent, name, child.fuse().eval())
        self.reconfigure(fused=True)
        return self

    @property
    def size_step(self) -> int:
        """Image sides are multiples of this."""
        c = self.config
        strides = [math.prod(c.stem_strides) * 2**i for i in range(len(c.dims))]
        pooled = [stride * r for stride, r, every in zip(strides, c.reductions, c.mix_every, strict=True) if every]
        return math.lcm(*strides, *pooled)

    def check_size(self, height: int, width: int) -> None:
        step = self.size_step
        if height % step or width % step:
            raise BadInput("image size", expected=f"sides that are multiples of {step}", got=f"{height}x{width}", fix="resize or pad it")
