"""HAT, Hybrid Attention Transformer for image restoration (Chen et al., CVPR 2023, arXiv 2205.04437; journal version arXiv 2309.05239).

Groups of hybrid blocks: window attention and a convolution with channel attention run side by side, so that every token also sees global
statistics; each group ends in an overlapping cross-attention block (OCAB), whose keys come from windows larger than the queries' own, so
that neighbouring windows exchange what they know:

    x = x + WMSA(LN x) + alpha * CAB(LN x),   x = x + MLP(LN x)                 (hybrid attention block, eq. 3)
    x = x + softmax(q k_o^T / sqrt(d) + B) v_o,  windows of k_o, v_o: (1 + gamma) M to a side, stride M   (OCAB, eq. 6)

Real-HAT is the same network, trained on images degraded as real ones are, and after that with a discriminator and a perceptual loss.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses
from formarium.nn.attention import biased_attention, merge_heads
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.mlp import MLP
from formarium.nn.nd_windows import WindowAttention, from_windows, to_windows
from formarium.nn.ops.activations import gelu
from formarium.nn.resizing import bicubic
from formarium.nn.tiling import reflect_to_multiple
from formarium.tasks.image_restoration.adversarial import AdversarialRestorer

UPSAMPLERS = ("pixelshuffle", "residual", "none")
DF2K_MEAN = (0.4488, 0.4371, 0.4040)  # RGB mean of the training images


class ChannelAttentionBlock(nn.Module):
    """CAB: 3x3 convolutions through dim / compress channels, then each channel scaled by a gate made from all channels' means.

    x: float [batch, height, width, dim]. Returns the same shape.
    """

    def __init__(self, dim: int, compress: int, squeeze: int):
        super().__init__()
        self.down = nn.Conv2d(dim, dim // compress, 3, padding=1)
        self.up = nn.Conv2d(dim // compress, dim, 3, padding=1)
        self.gate_in = nn.Conv2d(dim, dim // squeeze, 1)
        self.gate_out = nn.Conv2d(dim // squeeze, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(gelu(self.down(x.permute(0, 3, 1, 2))))  # b c h w, channels last in memory
        gate = self.gate_out(F.relu(self.gate_in(y.mean((2, 3), keepdim=True)))).sigmoid()
        return (y * gate).permute(0, 2, 3, 1)


class HybridBlock(nn.Module):
    """HAB: (shifted) window attention and CAB on the same normalised map, then an MLP. x: float [batch, height, width, dim]."""

    def __init__(self, c: HAT.Config, heads: int, shift: int, drop_path: float):
        super().__init__()
        dim, window = c.dim, c.window
        if min(sides_of(c.image_size)) <= window:  # built for images of one window: nothing to shift to
            shift, window = 0, min(sides_of(c.image_size))
        self.shift, self.conv_scale = (shift, shift), c.conv_scale
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, (window, window), heads, c.qkv_bias, c.qk_scale)
        self.channel = ChannelAttentionBlock(dim, c.compress_ratio, c.squeeze_factor)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * c.mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap("grid")

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.drop(self.attention(y, shift=self.shift)) + self.conv_scale * self.channel(y)
        x = x + self.drop(self.mlp(self.norm2(x)))
        return self.tap(x)


class OverlappingCrossAttention(nn.Module):
    """OCAB: queries from windows of M x M, keys and values from windows of M' x M' = (1 + overlap) M around them, then an MLP.

    The keys are projected before the map is padded, so beyond its border keys and values are zeros that take part in the softmax.
    x: float [batch, height, width, dim], sides multiples of M. Returns the same shape.
    """

    index: Tensor

    def __init__(self, c: HAT.Config, heads: int):
        super().__init__()
        self.window, self.heads, self.scale = c.window, heads, c.qk_scale
        self.wide = c.window + int(c.window * c.overlap_ratio)
        self.norm1 = nn.LayerNorm(c.dim)
        self.qkv = nn.Linear(c.dim, 3 * c.dim, bias=c.qkv_bias)
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty((self.window + self.wide - 1) ** 2, heads), std=0.02))
        self.out = nn.Linear(c.dim, c.dim)
        self.norm2 = nn.LayerNorm(c.dim)
        self.mlp = MLP(c.dim, int(c.dim * c.mlp_ratio))
        self.tap = Tap("grid")
        self.register_buffer("index", overlap_index(self.window, c.overlap_ratio), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.out(self.attend(self.norm1(x)))
        x = x + self.mlp(self.norm2(x))
        return self.tap(x)

    def attend(self, x: Tensor) -> Tensor:
        """Attention before its output projection, [batch, height, width, dim]."""
        h, w, c = x.shape[1:]
        qkv = self.qkv(x)
        q = to_windows(qkv[..., :c], (self.window, self.window))  # (b n) m c
        q = q.unflatten(2, (self.heads, -1)).transpose(1, 2)
        pad = (self.wide - self.window) // 2
        k, v = self.wide_windows(F.pad(qkv[..., c:], (0, 0, pad, pad, pad, pad)))
        bias = self.table[self.index.reshape(-1)].view(*self.index.shape, -1).permute(2, 0, 1)[None].to(q.dtype)
        y = biased_attention(q, k, v, bias, self.scale)
        return from_windows(merge_heads(y), (self.window, self.window), (h, w))

    def wide_windows(self, kv: Tensor) -> tuple[Tensor, Tensor]:
        """Overlapping windows of padded keys and values: two of [batch * windows, heads, M' * M', width]."""
        views = kv.unfold(1, self.wide, self.window).unfold(2, self.wide, self.window)  # b nh nw 2c M' M', no copy
        views = views.unflatten(3, (2, self.heads, -1)).permute(3, 0, 1, 2, 4, 6, 7, 5)  # 2 b nh nw heads M' M' d
        k, v = views.reshape(2, -1, self.heads, self.wide * self.wide, views.shape[-1]).unbind(0)
        return k, v


def overlap_index(window: int, overlap_ratio: float) -> Tensor:
    """Row of the offset table that each pair (query, key) has: int64 [M * M, M' * M'].

    The released code moves offsets (-(M - 1) to M' - 1) by M - M' + 1, so that some rows are negative and count from the table's end;
    weights depend on it. Offsets stay distinct.
    """
    wide = window + int(overlap_ratio * window)
    width = window + wide - 1
    steps = torch.arange(wide)[None] - torch.arange(window)[:, None] + window - wide + 1  # m M'
    rows = steps[:, None, :, None] * width + steps[None, :, None, :]
    return (rows % width**2).reshape(window * window, wide * wide)


class Group(nn.Module):
    """RHAG: hybrid blocks, one OCAB, a 3x3 convolution, and the group's input again. x: float [batch, height, width, dim]."""

    def __init__(self, c: HAT.Config, heads: int, rates: list[float]):
        super().__init__()
        self.blocks = nn.ModuleList([HybridBlock(c, heads, (i % 2) * (c.window // 2), rate) for i, rate in enumerate(rates)])
        self.overlap = OverlappingCrossAttention(c, heads)
        self.conv = residual_conv(c)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y)
        return x + self.conv(self.overlap(y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def residual_conv(c: HAT.Config) -> nn.Module:
    return nn.Conv2d(c.dim, c.dim, 3, padding=1) if c.residual_conv == "1conv" else nn.Identity()


class HAT(AdversarialRestorer):
    @dataclass(frozen=True)
    class Config:
        dim: int = 180
        depths: tuple[int, ...] = (6, 6, 6, 6, 6, 6)  # hybrid blocks of each group
        heads: tuple[int, ...] = (6, 6, 6, 6, 6, 6)
        window: int = 16
        compress_ratio: int = 3  # of CAB's convolutions
        squeeze_factor: int = 30  # of CAB's gate
        conv_scale: float = 0.01  # CAB's weight beside attention
        overlap_ratio: float = 0.5
        mlp_ratio: float = 2.0
        qkv_bias: bool = True
        qk_scale: float | None = None  # of the scores, 1 / sqrt(head width) where None
        image_size: int | tuple[int, int] = 64  # of the position table; at most one window's side means no shifts
        in_channels: int = 3
        upscale: int = 4  # a power of 2, or 3
        image_range: float = 1.0
        upsampler: str = "pixelshuffle"  # or "residual": no enlargement; "none": as released, the image unchanged
        width: int = 64  # channels where the map is enlarged
        residual_conv: str = "1conv"  # or "identity"
        absolute_positions: bool = False
        embed_norm: bool = True
        drop_path: float = 0.1
        bicubic_skip: bool = False  # not in the paper: the bicubic enlargement is added, for small networks and short training
        gan: bool = False  # Real-HAT: a discriminator, and a second stage of training with it
        discriminator_dim: int = 64
        sharpened: tuple[str, ...] = ()  # losses that see the clean image sharpened: "l1", "perceptual", "gan"
        l1_weight: float = 1.0  # these three in the second stage
        perceptual_weight: float = 1.0
        gan_weight: float = 0.1
        vgg19: str = ""  # file with torchvision's ImageNet weights, for the perceptual loss
        gan_share: float = 2 / 7  # of the steps

    def __init__(self, config: Config):
        c = config
        if c.upsampler not in UPSAMPLERS:
            raise BadInput("upsampler", expected=" or ".join(UPSAMPLERS), got=repr(c.upsampler))
        if c.upscale != 3 and c.upscale & (c.upscale - 1):
            raise BadInput("upscale", expected="1, 2, 3, 4 or 8", got=str(c.upscale))
        if c.upsampler == "residual" and c.upscale != 1:
            raise BadInput("upscale", expected="1 without an upsampler", got=str(c.upscale), fix='upsampler="pixelshuffle"')
        super().__init__(c)
        self.multiple = c.window
        self.embed = nn.Conv2d(c.in_channels, c.dim, 3, padding=1)
        self.embed_norm = nn.LayerNorm(c.dim) if c.embed_norm else nn.Identity()
        if c.absolute_positions:
            self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, math.prod(sides_of(c.image_size)), c.dim), std=0.02))
        self.tokens = Tap("grid")
        rates = drop_path_rates(c.drop_path, c.depths)
        self.groups = nn.ModuleList([Group(c, heads, rate) for heads, rate in zip(c.heads, rates, strict=True)])
        self.norm = nn.LayerNorm(c.dim)
        self.body = residual_conv(c)
        self.features = Tap("map")
        if c.upsampler == "pixelshuffle":
            self.before = nn.Conv2d(c.dim, c.width, 3, padding=1)
            self.enlarge = enlargement(c.upscale, c.width)
            self.last = nn.Conv2d(c.width, c.in_channels, 3, padding=1)
        elif c.upsampler == "residual":
            self.last = nn.Conv2d(c.dim, c.in_channels, 3, padding=1)
        mean = torch.tensor(DF2K_MEAN) if c.in_channels == 3 else torch.zeros(1)
        self.register_buffer("mean", mean.view(1, -1, 1, 1), persistent=False)
        init_transformer(self)
        if c.bicubic_skip:  # starts as bicubic, nearly
            nn.init.normal_(self.last.weight, std=1e-3)
            nn.init.zeros_(self.last.bias)
        self.add_discriminator()

    mean: Tensor

    def forward(self, image: Tensor) -> Tensor:
        """Image [batch, channels, height, width] in [0, 1] to [batch, channels, upscale * height, upscale * width], not clamped.

        Sides that aren't multiples of the window are mirrored up to one, and what was added is cut off again.
        """
        c, (h, w) = self.config, image.shape[2:]
        x = (reflect_to_multiple(image, c.window) - self.mean) * c.image_range
        shallow = self.embed(x)  # b c h w
        deep = self.features(self.body(self.deep(shallow)) + shallow)
        if c.upsampler == "pixelshuffle":
            y = self.last(self.enlarge(F.leaky_relu(self.before(deep), 0.01)))
        elif c.upsampler == "residual":
            y = x + self.last(deep)
        else:
            y = x
        y = y / c.image_range + (0 if c.bicubic_skip else self.mean)
        y = y[..., : h * c.upscale, : w * c.upscale] if c.upsampler != "none" else y[..., :h, :w]
        return y + bicubic(image, h * c.upscale, w * c.upscale) if c.bicubic_skip else y

    def deep(self, shallow: Tensor) -> Tensor:
        """The groups, on a map [batch, dim, h, w], sides multiples of the window. Returns the same shape."""
        x = self.embed_norm(shallow.permute(0, 2, 3, 1))  # b h w c
        if self.config.absolute_positions:
            x = x + self.positions.view(1, *sides_of(self.config.image_size), -1)
        x = self.tokens(x)
        for group in self.groups:
            x = group(x)
        return self.norm(x).permute(0, 3, 1, 2)

    def loss(self, batch: Batch) -> Losses:
        """L1 in RGB, as the paper trains it. Real-HAT's second stage adds a perceptual and a GAN loss (AdversarialRestorer)."""
        if self.config.upsampler == "none":
            raise BadInput(
                'upsampler "none"', expected="a network that learns", got="one that returns its input", fix='upsampler="residual"'
            )
        return super().loss(batch)

    def no_weight_decay(self) -> set[str]:
        return {"positions", "*.table"}

    def check_size(self, height: int, width: int) -> None:
        window = self.config.window
        sides = tuple(-(-side // window) * window for side in (height, width))
        if self.config.absolute_positions and sides != sides_of(self.config.image_size):
            wanted = "x".join(map(str, sides_of(self.config.image_size)))
            raise BadInput("image size", expected=f"{wanted}, as the position table has", got=f"{height}x{width}", fix="predict by tiles")


def enlargement(scale: int, width: int) -> nn.Sequential:
    """Sub-pixel convolutions: one of factor 3, or as many of factor 2 as it takes."""
    factors = [3] if scale == 3 else [2] * int(math.log2(scale))
    layers = [layer for f in factors for layer in (nn.Conv2d(width, f * f * width, 3, padding=1), nn.PixelShuffle(f))]
    return nn.Sequential(*layers)


def sides_of(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
