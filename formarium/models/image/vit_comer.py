"""ViT-CoMer (Xia et al., CVPR 2024, arXiv 2403.07392): a plain, pre-trained ViT and a convolutional pyramid that inform one another.

The ViT runs in N chunks of blocks on tokens x at 1/16 of the image. Beside it runs c, three levels of tokens at 1/8, 1/16 and 1/32
(16n + 4n + n of them), made by a small CNN. Around every chunk the two exchange what they have (section 3):

    c = MRFP(c)                            depthwise 3x3 on half of the channels, 5x5 on the others
    c = c + x at the 1/16 level
    x = x + gamma * sum over levels of resize(u),    u = MSDA(LN c), u = u + FFN(LN u)       CTI to V; gamma starts at 0
    x = blocks(x)
    c = c + x at the 1/16 level;  c = q + MSDA(LN q),  c = c + FFN(LN c)  with q = LN c      CTI to C

MSDA is multi-scale deformable attention among the three levels. With gamma = 0 the ViT is left exactly as it was pre-trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.convs import ConvBN
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.maps import init_convs, map_to_tokens, tokens_to_map
from formarium.nn.ops.activations import gelu
from formarium.nn.ops.deformable_attention import DeformableAttention
from formarium.nn.positions import resize_table
from formarium.nn.vit_trunk import BEiTAttention, GridAttention, TrunkBlock
from formarium.tasks.image_classification.model import ImageClassifier

Grid = tuple[int, int]


@dataclass(frozen=True)
class Levels:
    """Where the tokens of c belong: three maps of `shapes` at 1/8, 1/16 and 1/32, one after another, row-major.

    reference: float [1, tokens, 1, 2], each token's centre as (x, y) in [0, 1] of the image.
    """

    grid: Grid  # of the level at 1/16, and of the ViT
    reference: Tensor = field(repr=False)

    @staticmethod
    def around(grid: Grid, like: Tensor) -> Levels:
        parts = []
        for h, w in _shapes(grid):
            y = (torch.arange(h, device=like.device, dtype=torch.float32) + 0.5) / h
            x = (torch.arange(w, device=like.device, dtype=torch.float32) + 0.5) / w
            parts.append(torch.stack([x.expand(h, w), y[:, None].expand(h, w)], -1).flatten(0, 1))
        return Levels(grid, torch.cat(parts)[None, :, None])

    @property
    def shapes(self) -> tuple[Grid, Grid, Grid]:
        return _shapes(self.grid)

    def split(self, c: Tensor) -> tuple[Tensor, ...]:
        """[batch, tokens, dim] to its three levels, still as tokens."""
        return c.split([h * w for h, w in self.shapes], dim=1)

    def maps(self, c: Tensor) -> list[Tensor]:
        """[batch, tokens, dim] to three maps [batch, dim, h, w], channels-last."""
        return [tokens_to_map(part, shape) for part, shape in zip(self.split(c), self.shapes, strict=True)]

    def add(self, c: Tensor, x: Tensor) -> Tensor:
        """c + x at the level of 1/16."""
        fine, same, coarse = self.split(c)
        return torch.cat([fine, same + x, coarse], 1)


def _shapes(grid: Grid) -> tuple[Grid, Grid, Grid]:
    h, w = grid
    return (2 * h, 2 * w), grid, (h // 2, w // 2)


class ThinDeformableAttention(DeformableAttention):
    """Deformable attention over three levels whose values are `ratio` times as wide as its queries."""

    def __init__(self, dim: int, heads: int, points: int, ratio: float):
        super().__init__(dim, heads, 3, points)
        self.value = nn.Linear(dim, int(dim * ratio))
        self.out = nn.Linear(int(dim * ratio), dim)
        self.reset()


class ConvFFN(nn.Module):
    """Linear, one depthwise 3x3 for all levels, GELU, Linear. c: float [batch, tokens, dim]. Returns the same shape."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.local = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, c: Tensor, levels: Levels) -> Tensor:
        local = torch.cat([map_to_tokens(self.local(m)) for m in levels.maps(self.fc1(c))], 1)
        return self.fc2(F.gelu(local))


class TwoFields(nn.Module):
    """Depthwise 3x3 on the first half of the channels, 5x5 on the second, BatchNorm, GELU: a map in, a map out.

    In inference both are one 5x5 convolution with the normalisation inside.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.conv3 = nn.Conv2d(dim // 2, dim // 2, 3, padding=1, groups=dim // 2)
        self.conv5 = nn.Conv2d(dim // 2, dim // 2, 5, padding=2, groups=dim // 2)
        self.norm = nn.BatchNorm2d(dim // 2 * 2)

    def forward(self, x: Tensor) -> Tensor:
        if self.norm.training:
            near, far = x.chunk(2, 1)
            return gelu(self.norm(torch.cat([self.conv3(near), self.conv5(far)], 1)))
        weight = torch.cat([F.pad(self.conv3.weight, (1, 1, 1, 1)), self.conv5.weight])
        bias = torch.cat([self.conv3.bias, self.conv5.bias])  # type: ignore[list-item]
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()  # type: ignore[operator]
        bias = (bias - self.norm.running_mean) * scale + self.norm.bias
        return gelu(F.conv2d(x, weight * scale[:, None, None, None], bias, padding=2, groups=len(bias)))


class MRFP(nn.Module):
    """Multi-receptive-field feature pyramid (section 3.2): Linear, two kernels a level, a second GELU, Linear; no residual."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.levels = nn.ModuleList(TwoFields(hidden) for _ in range(3))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, c: Tensor, levels: Levels) -> Tensor:
        maps = [map_to_tokens(field(m)) for field, m in zip(self.levels, levels.maps(self.fc1(c)), strict=True)]
        return self.fc2(F.gelu(torch.cat(maps, 1)))


class ToViT(nn.Module):
    """CTI to V: what the pyramid tells the ViT. x: [batch, h w, dim], c: [batch, 21n, dim]. Returns the new x."""

    def __init__(self, c: ViTCoMer.Config):
        super().__init__()
        self.query_norm, self.value_norm, self.ffn_norm = (nn.LayerNorm(c.dim, eps=1e-6) for _ in range(3))
        self.attention = ThinDeformableAttention(c.dim, c.deform_heads, c.points, c.deform_ratio)
        self.gamma = nn.Parameter(torch.full((c.dim,), float(c.gamma)))
        self.ffn = ConvFFN(c.dim, int(c.dim * c.ffn_ratio))
        self.drop = DropPath(c.drop_path)

    def forward(self, x: Tensor, c: Tensor, levels: Levels) -> Tensor:
        u = self.attention(self.query_norm(c), levels.reference, self.value_norm(c), levels.shapes)
        u = u + self.drop(self.ffn(self.ffn_norm(u), levels))
        fine, same, coarse = levels.maps(u)
        coarse = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)
        return torch.addcmul(x, map_to_tokens(F.avg_pool2d(fine, 2) + same + coarse), self.gamma)  # the mean of 2x2 is a bilinear half


class Extractor(nn.Module):
    """q + MSDA(LN q over LN v), then + FFN(LN of it). query, value: float [batch, 21n, dim]. Returns the same shape."""

    def __init__(self, c: ViTCoMer.Config):
        super().__init__()
        self.query_norm, self.value_norm = (nn.LayerNorm(c.dim, eps=1e-6) for _ in range(2))
        self.attention = ThinDeformableAttention(c.dim, c.deform_heads, c.points, c.deform_ratio)
        self.ffn = ConvFFN(c.dim, int(c.dim * c.ffn_ratio)) if c.conv_ffn else None
        self.ffn_norm = nn.LayerNorm(c.dim, eps=1e-6) if c.conv_ffn else None
        self.drop = DropPath(c.drop_path)

    def forward(self, query: Tensor, value: Tensor, levels: Levels) -> Tensor:
        c = query + self.attention(self.query_norm(query), levels.reference, self.value_norm(value), levels.shapes)
        if self.ffn is not None and self.ffn_norm is not None:
            c = c + self.drop(self.ffn(self.ffn_norm(c), levels))
        return c


class ToConv(nn.Module):
    """CTI to C: what the ViT tells the pyramid; the residual starts from the normalised c. `tail`: one of the last chunk's extra ones,
    with an FFN of its own before. x: [batch, h w, dim], c: [batch, 21n, dim]. Returns the new c."""

    def __init__(self, c: ViTCoMer.Config, extracts: bool, tail: bool = False):
        super().__init__()
        self.query_norm, self.value_norm = (nn.LayerNorm(c.dim, eps=1e-6) for _ in range(2))
        tail = tail and c.conv_ffn
        self.ffn = ConvFFN(c.dim, int(c.dim * c.ffn_ratio)) if tail else None
        self.ffn_norm = nn.LayerNorm(c.dim, eps=1e-6) if tail else None
        self.extractor = Extractor(c) if extracts else None
        self.drop = DropPath(c.drop_path)

    def forward(self, x: Tensor, c: Tensor, levels: Levels) -> Tensor:
        c = levels.add(c, x)
        if self.ffn is not None and self.ffn_norm is not None:
            c = c + self.drop(self.ffn(self.ffn_norm(c), levels))
        return c if self.extractor is None else self.extractor(self.query_norm(c), self.value_norm(c), levels)


class Interaction(nn.Module):
    """One chunk of the ViT with the exchange before and after it. forward: x [batch, h w, dim], c [batch, 21n, dim], the chunk's blocks."""

    def __init__(self, c: ViTCoMer.Config, number: int):
        super().__init__()
        to_vit, to_conv, extracts = (flags[number] for flags in (c.to_vit, c.to_conv, c.extracts))
        last = number == len(c.chunks) - 1
        self.mrfp = MRFP(c.dim, int(c.dim * c.mrfp_ratio)) if to_vit or c.spare_mrfp else None
        self.to_vit = ToViT(c) if to_vit else None
        self.to_conv = ToConv(c, extracts) if to_conv else None
        self.extra = nn.ModuleList(ToConv(c, extracts, tail=True) for _ in range(c.extra if last else 0))

    def forward(self, x: Tensor, c: Tensor, levels: Levels, blocks: list[TrunkBlock]) -> tuple[Tensor, Tensor]:
        if self.to_vit is not None:
            assert self.mrfp is not None
            c = levels.add(self.mrfp(c, levels), x)
            x = self.to_vit(x, c, levels)
        for block in blocks:
            x = block(x, levels.grid)
        for exchange in (self.to_conv, *self.extra):
            if exchange is not None:
                c = exchange(x, c, levels)
        return x, c


class Convs(nn.Module):
    """The CNN: image [batch, channels, h, w] to a map [batch, dim, h/4, w/4] and the tokens c of 1/8, 1/16 and 1/32."""

    def __init__(self, c: ViTCoMer.Config):
        super().__init__()
        w = c.conv_width
        self.stem = nn.ModuleList([ConvBN(c.in_channels, w, 3, 2), ConvBN(w, w, 3), ConvBN(w, w, 3)])
        self.down = nn.ModuleList([ConvBN(w, 2 * w, 3, 2), ConvBN(2 * w, 4 * w, 3, 2), ConvBN(4 * w, 4 * w, 3, 2)])
        self.project = nn.ModuleList(nn.Conv2d(width, c.dim, 1) for width in (w, 2 * w, 4 * w, 4 * w))
        self.level_embed = nn.Parameter(torch.randn(3, c.dim))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        y = image.contiguous(memory_format=torch.channels_last)
        for layer in self.stem:
            y = F.relu(layer(y))
        y = F.max_pool2d(y, 3, 2, 1)
        finest, tokens = self.project[0](y), []
        for layer, project, embed in zip(self.down, self.project[1:], self.level_embed, strict=True):
            y = F.relu(layer(y))
            tokens.append(map_to_tokens(project(y)) + embed)
        return finest, torch.cat(tokens, 1)


class ViTCoMer(ImageClassifier):
    """The pyramid is what it is for. Without `dense` a classifier of this library's own stands on it: the four maps, brought to 1/16 of
    the image and summed, LayerNorm-free, averaged over places, one Linear."""

    @dataclass(frozen=True)
    class Config:
        dim: int = 192
        depth: int = 12
        heads: int = 3
        mlp_ratio: float = 4
        qkv_bias: bool = True
        layer_scale: float | None = 1.0  # initial value of the ViT's residual scales (None: none)
        windows: tuple[int, ...] = ()  # a block's attention window in patches, 0 for global; empty: all global
        bottlenecks: tuple[int, ...] = ()  # blocks that end with a convolutional bottleneck
        beit: bool = False  # relative position biases, no bias of the keys
        positions: bool = True  # a learned position table
        chunks: tuple[tuple[int, int], ...] = ((0, 2), (3, 5), (6, 8), (9, 11))  # first and last block of each
        to_vit: tuple[bool, ...] = (True, True, True, True)
        to_conv: tuple[bool, ...] = (True, True, True, True)
        extracts: tuple[bool, ...] = (True, True, True, True)  # whether CTI to C attends among the levels, or only adds x
        extra: int = 4  # further exchanges to C behind the last chunk
        conv_width: int = 64
        points: int = 4
        deform_heads: int = 6
        deform_ratio: float = 1.0
        conv_ffn: bool = True
        ffn_ratio: float = 0.25
        mrfp_ratio: float = 6.0
        spare_mrfp: bool = True  # a chunk without CTI to V holds its MRFP all the same, unused
        gamma: float = 0.0  # initial value of the scale on what reaches the ViT
        vit_features: str = "each"  # added to the pyramid: of "each" chunk to its level, of the "last" to all, "none"
        image_size: int | tuple[int, int] = 224  # of the position table
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False  # forward gives the pyramid

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self._check(c)
        height, width = self.image_size
        self.grid, self.prefix = (height // 16, width // 16), 0 if c.beit else 1
        self.embed = nn.Conv2d(c.in_channels, c.dim, 16, 16)
        self.positions = nn.Parameter(torch.zeros(1, self.prefix + self.grid[0] * self.grid[1], c.dim)) if c.positions else None
        self.tokens = Tap()
        rates = drop_path_rates(c.drop_path, (c.depth,))[0]
        self.blocks = nn.ModuleList(
            TrunkBlock(c.dim, self._attention(i), c.mlp_ratio, rates[i], c.layer_scale, i in c.bottlenecks) for i in range(c.depth)
        )
        self.convs = Convs(c)
        self.interactions = nn.ModuleList(Interaction(c, i) for i in range(len(c.chunks)))
        self.up = nn.ConvTranspose2d(c.dim, c.dim, 2, 2)
        self.norms = nn.ModuleList(nn.BatchNorm2d(c.dim) for _ in range(4))
        if not c.dense:
            self.features = Tap()
            self.head = nn.Linear(c.dim, c.num_classes)
        self._initialise()

    def _check(self, c: Config) -> None:
        for name in ("to_vit", "to_conv", "extracts"):
            if len(getattr(c, name)) != len(c.chunks):
                raise BadInput(f"ViT-CoMer's {name}", expected=f"one value a chunk, {len(c.chunks)}", got=str(len(getattr(c, name))))
        if c.windows and len(c.windows) != c.depth:
            raise BadInput("ViT-CoMer's windows", expected=f"one a block, {c.depth}", got=str(len(c.windows)))
        if c.vit_features not in ("each", "last", "none") or (c.vit_features == "each" and len(c.chunks) != 4):
            raise BadInput("ViT-CoMer's vit_features", expected='"each" (of 4 chunks), "last" or "none"', got=f"{c.vit_features!r}")

    def _attention(self, block: int) -> nn.Module:
        c = self.config
        window = c.windows[block] if c.windows else 0
        if c.beit:
            return BEiTAttention(c.dim, c.heads, window or self.grid[0], c.qkv_bias)
        return GridAttention(c.dim, c.heads, window, c.qkv_bias)

    def _initialise(self) -> None:
        init_transformer(self)
        init_convs(self.convs)
        init_convs(self.interactions)
        nn.init.normal_(self.up.weight, std=(2 / (4 * self.config.dim)) ** 0.5)
        nn.init.zeros_(self.up.bias)  # type: ignore[arg-type]
        if self.positions is not None:
            nn.init.trunc_normal_(self.positions, std=0.02)
        for layer in self.modules():
            if isinstance(layer, DeformableAttention):
                layer.reset()

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width], sides multiples of 32, to logits [batch, classes] (or the pyramid)."""
        maps = self.pyramid(image)
        if self.config.dense:
            return maps
        a, b, c, d = maps
        fused = F.avg_pool2d(a, 4) + F.avg_pool2d(b, 2) + c + F.interpolate(d, scale_factor=2, mode="nearest")
        return self.head(self.features(map_to_tokens(fused), grid=(fused.shape[2], fused.shape[3])).mean(1))

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Four maps [batch, dim, height / stride, width / stride] at strides 4, 8, 16, 32, each batch-normalised."""
        return self.run(image)[1]

    def run(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The ViT's last map [batch, dim, height / 16, width / 16] and the pyramid."""
        x = self.embed(image)
        levels = Levels.around((x.shape[2], x.shape[3]), x)
        x = map_to_tokens(x)
        if self.positions is not None:
            x = x + resize_table(self.positions[:, self.prefix :], self.grid, levels.grid, mode="bicubic")
        x = self.tokens(x, grid=levels.grid)
        finest, c = self.convs(image)
        seen, blocks = [], [*self.blocks]
        for interaction, (first, last) in zip(self.interactions, self.config.chunks, strict=True):
            x, c = interaction(x, c, levels, blocks[first : last + 1])
            seen.append(tokens_to_map(x, levels.grid))
        fine, same, coarse = levels.maps(c)
        maps = (self.up(fine) + finest, fine, same, coarse)
        if self.config.vit_features != "none":
            a, b, m, d = seen if self.config.vit_features == "each" else seen[-1:] * 4
            grown = [F.interpolate(y, scale_factor=s, mode="bilinear", align_corners=False) for y, s in ((a, 4), (b, 2))]
            maps = tuple(y + z for y, z in zip(maps, (*grown, m, F.avg_pool2d(d, 2)), strict=True))
        return seen[-1], tuple(norm(y) for norm, y in zip(self.norms, maps, strict=True))

    def no_weight_decay(self) -> set[str]:
        return {"positions", "convs.level_embed", "*.bias_table"}

    def check_size(self, height: int, width: int) -> None:
        if height % 32 or width % 32:
            raise BadInput("image size", expected="multiples of 32", got=f"{height}x{width}", fix="pad or resize the image")
