"""SG-Former: Self-guided Transformer with Evolving Token Reallocation (Ren et al., ICCV 2023, arXiv 2308.12216).

Attention at full resolution over few keys, and the network itself says where these are worth spending. Blocks of a stage alternate:

    hybrid-scale attention  half of the heads see all of the map shrunk r times, half a window; how much attention a place receives,
                            from both, is its significance S
    self-guided attention   tokens are sorted by S; the lowest quarter is merged in groups of f1 tokens, the middle half by f2, the
                            highest quarter by f3 (f1 > f2 > f3), so that salient regions keep more keys

S is estimated anew by every hybrid block, so the allocation evolves with depth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import SelfAttention, merge_heads, split_heads
from formarium.nn.depthwise import ResidualDepthwise
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.maps import Grid, init_convs, map_to_tokens, run_stages, tokens_to_map
from formarium.nn.positions import resize_table
from formarium.tasks.image_classification.model import ImageClassifier


class LocalPositions(nn.Module):
    """A depthwise 3x3 convolution of a linear map of the tokens, added to what attention gives. x: float [b, h w, dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return map_to_tokens(self.conv(tokens_to_map(self.linear(x), grid)))


class HybridScaleAttention(nn.Module):
    """x: float [b, h w, dim], any grid -> the same shape, and the significance [b, h, w] (no gradient).

    Keys of the first half of the heads: the map shrunk by a convolution with kernel = stride = reduction. Of the second half: the
    pixels of the same window. A map that cells or windows don't divide is padded with zeros on the right and at the bottom; windows
    don't attend to padding. Without padding a sample's significance sums to (area of a cell) + (number of windows).
    """

    def __init__(self, dim: int, heads: int, reduction: int, window: int = 7, qkv_bias: bool = True, qk_scale: float | None = None):
        super().__init__()
        self.heads, self.reduction, self.window = _half(dim, heads), reduction, window
        self.scale = qk_scale or (dim // heads) ** -0.5
        self.shrink = nn.Conv2d(dim, dim, reduction, reduction)
        self.shrink_norm = nn.LayerNorm(dim)
        self.kv = nn.Linear(dim, dim, bias=qkv_bias)
        self.q_qkv = nn.Linear(dim, 2 * dim, bias=qkv_bias)  # the global heads' q, the local heads' q, k, v
        self.positions = LocalPositions(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        fused = self.q_qkv(x)
        width = x.shape[2] // 2
        far, seen_far = self.far(fused[..., :width], x, grid)
        near, seen_near = self.near(fused[..., width:].unflatten(1, grid))
        out = self.out(torch.cat([far, near], -1) + self.positions(x, grid))
        return out, (seen_far + seen_near).detach()

    def far(self, q: Tensor, x: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        """Attention to the shrunken map [b, h w, dim / 2], and what each place receives [b, h, w]: its cell's share."""
        r = self.reduction
        cells = _pad(x.unflatten(1, grid), r).unflatten(1, (-1, r)).unflatten(3, (-1, r)).transpose(2, 3)  # b rows columns r r dim
        # kernel = stride: the convolution is one matrix product
        small = F.linear(cells.flatten(3), self.shrink.weight.permute(0, 2, 3, 1).flatten(1), self.shrink.bias)
        keys = F.gelu(self.shrink_norm(small.flatten(1, 2)))
        (q,), (k, v) = split_heads(q, self.heads), split_heads(self.kv(keys), self.heads, 2)
        attention = (q * self.scale @ k.transpose(2, 3)).softmax(-1)  # b heads (h w) cells
        received = attention.detach().mean(1).mean(1).unflatten(1, small.shape[1:3])
        received = received.repeat_interleave(r, 1).repeat_interleave(r, 2)[:, : grid[0], : grid[1]]
        return merge_heads(attention @ v), received

    def near(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Attention inside windows of a grid of q, k, v [b, h, w, 3 dim / 2]: [b, h w, dim / 2], and what each place receives [b, h, w]."""
        (h, w), size = qkv.shape[1:3], self.window
        x = _pad(qkv, size)
        rows, columns = x.shape[1] // size, x.shape[2] // size
        windows = x.unflatten(1, (rows, size)).unflatten(3, (columns, size)).transpose(2, 3).reshape(-1, size * size, x.shape[3])
        q, k, v = split_heads(windows, self.heads, 3)
        affinity = q * self.scale @ k.transpose(2, 3)  # (b rows columns) heads size^2 size^2
        if x.shape == qkv.shape:
            attention = affinity.softmax(-1)
            received = attention.detach().mean(1).mean(1)
        else:
            real = _pad(torch.ones(1, h, w, 1, dtype=torch.bool, device=x.device), size)
            real = real.unflatten(1, (rows, size)).unflatten(3, (columns, size)).transpose(2, 3).reshape(rows * columns, 1, size * size)
            real = real.repeat(len(x), 1, 1)
            attention = affinity.masked_fill(~real[:, None], float("-inf")).softmax(-1)
            queries = real.transpose(1, 2).to(attention.dtype)
            received = (attention.detach().mean(1) * queries).sum(1) / queries.sum(1)

        def back(y: Tensor) -> Tensor:
            return y.reshape(-1, rows, columns, size, size, y.shape[-1]).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :h, :w]

        return back(merge_heads(attention @ v)).flatten(1, 2), back(received[..., None])[..., 0]


class SelfGuidedAttention(nn.Module):
    """x: float [b, h w, dim] and its significance [b, h, w], any grid -> [b, h w, dim].

    groups: how many tokens become one, from the least significant part to the most: three parts of a quarter, a half and a quarter of
    the tokens, or two halves. Groups are consecutive in order of significance, a learned weighting over their tokens merges them; a last
    group that isn't full repeats its last token. Half of the heads see keys of the row-major map, half of the column-major one: the two
    differ in how ties are ordered and in their projections.
    """

    def __init__(self, dim: int, heads: int, groups: tuple[int, ...], qkv_bias: bool = True, qk_scale: float | None = None):
        super().__init__()
        self.heads, self.groups = heads, groups
        if len(groups) not in (2, 3) or min(groups) < 1:
            raise BadInput("SG-Former groups", expected="two or three numbers of tokens", got=str(groups))
        self.half = _half(dim, heads)
        self.scale = qk_scale or (dim // heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv_rows = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv_columns = nn.Linear(dim, dim, bias=qkv_bias)
        self.merge = nn.ModuleList(nn.Linear(size, 1) for size in groups)
        self.positions = LocalPositions(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid, significance: Tensor) -> Tensor:
        by_rows, by_columns = self.keys(x, significance)
        (q,) = split_heads(self.q(x), self.heads)
        pairs = split_heads(self.kv_rows(by_rows), self.half, 2), split_heads(self.kv_columns(by_columns), self.half, 2)
        k, v = (torch.cat(pair, 1) for pair in zip(*pairs, strict=True))
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(merge_heads(attended) + self.positions(x, grid))

    def keys(self, x: Tensor, significance: Tensor) -> tuple[Tensor, Tensor]:
        """The merged tokens in either order, each [b, keys, dim]."""
        b, h, w = significance.shape
        rows = ascending(significance.flatten(1))
        columns = ascending(significance.transpose(1, 2).flatten(1))  # c h + r stands for the place r w + c
        order = torch.stack([rows, columns % h * w + columns // h], 1)  # b 2 (h w)
        parts = [self._members(order, i) for i in range(len(self.groups))]
        start = torch.arange(b, device=x.device)[:, None] * (h * w)
        flat = torch.cat([part.flatten(1) for part in parts], 1) + start
        tokens = x.flatten(0, 1).index_select(0, flat.flatten()).view(b, -1, x.shape[2])
        merged = []
        for part, layer in zip(tokens.split([p.shape[1] * p.shape[2] for p in parts], 1), self.merge, strict=True):
            groups = part.view(b, 2, -1, layer.in_features, x.shape[2])  # b 2 groups size dim
            merged.append((layer.weight @ groups)[..., 0, :] + layer.bias)
        by_rows, by_columns = torch.cat(merged, 2).unbind(1)
        return by_rows, by_columns

    def _members(self, order: Tensor, part: int) -> Tensor:
        """Places of the part's tokens, whole groups of them: int64 [b, 2, groups * size]."""
        n, size = order.shape[2], self.groups[part]
        ends = (0, n // 4, n // 4 * 3, n) if len(self.groups) == 3 else (0, n // 2, n)
        members = order[:, :, ends[part] : ends[part + 1]]
        lacking = -members.shape[2] % size
        return torch.cat([members, members[:, :, -1:].expand(-1, -1, lacking)], 2) if lacking else members


class GlobalAttention(SelfAttention):
    """Multi-head self-attention with local positions. x: float [b, h w, dim]. Returns the same shape."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True, qk_scale: float | None = None):
        super().__init__(dim, heads, qkv_bias)
        self.scale = qk_scale or (dim // heads) ** -0.5
        self.positions = LocalPositions(dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        attended = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        return self.out(merge_heads(attended) + self.positions(x, grid))


class ConvMLP(nn.Module):
    """Linear, u + depthwise 3x3 of u, GELU, Linear. x: float [b, h w, dim]."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.local = ResidualDepthwise(hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        return self.fc2(F.gelu(self.local(self.fc1(x).unflatten(1, grid))).flatten(1, 2))


class Block(nn.Module):
    """x + attention(LN x), then x + MLP(LN x). x: float [b, h w, dim]. A hybrid block makes the significance, a guided one takes it."""

    def __init__(self, c: SGFormer.Config, stage: int, index: int, drop_path: float):
        super().__init__()
        dim, heads, options = c.dims[stage], c.heads[stage], (c.qkv_bias, c.qk_scale)
        self.norm1 = nn.LayerNorm(dim, eps=c.norm_eps)
        if c.reductions[stage] == 1:
            self.attention: nn.Module = GlobalAttention(dim, heads, *options)
        elif index % 2 and stage < len(c.dims) - 1:
            self.attention = SelfGuidedAttention(dim, heads, c.groups[stage], *options)
        else:
            self.attention = HybridScaleAttention(dim, heads, c.reductions[stage], c.window, *options)
        self.norm2 = nn.LayerNorm(dim, eps=c.norm_eps)
        self.mlp = ConvMLP(dim, int(dim * c.mlp_ratios[stage]))
        self.drop = DropPath(drop_path)
        self.tap = Tap()

    def forward(self, x: Tensor, grid: Grid, significance: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = self.norm1(x)
        if isinstance(self.attention, SelfGuidedAttention):
            y, significance = self.attention(y, grid, significance), None
        elif isinstance(self.attention, HybridScaleAttention):
            y, significance = self.attention(y, grid)
        else:
            y = self.attention(y, grid)
        x = x + self.drop(y)
        x = x + self.drop(self.mlp(self.norm2(x), grid))
        return self.tap(x, grid=grid), significance


def stem(in_channels: int, dim: int) -> nn.Sequential:
    """A map at stride 4: three 3x3 convolutions, each with a norm over the whole map, GELU between them."""
    layers: list[nn.Module] = []
    for source, stride in ((in_channels, 2), (dim, 1), (dim, 2)):
        layers += [nn.Conv2d(source, dim, 3, stride, 1, bias=False), nn.GroupNorm(1, dim), nn.GELU()]
    return nn.Sequential(*layers[:-1])


def merging(dim: int, out: int) -> nn.Sequential:
    """Half the resolution: pointwise, depthwise 3x3 strided, pointwise, each with a norm over the whole map, GELU between them."""
    shrink = nn.Conv2d(out, out, 3, 2, 1, groups=out, bias=False)
    layers = (nn.Conv2d(dim, out, 1, bias=False), shrink, nn.Conv2d(out, out, 1, bias=False))
    return nn.Sequential(*[m for layer in layers for m in (layer, nn.GroupNorm(1, out), nn.GELU())][:-1])


class Stage(nn.Module):
    """Embedding, blocks, LayerNorm. A map [b, in_dim, H, W] in, tokens [b, h w, dim] and their grid (h, w) out.

    positions, in the first stage: a learned table [1, h w, dim] of this grid, which starts as sines and cosines.
    """

    def __init__(self, c: SGFormer.Config, index: int, rates: list[float]):
        super().__init__()
        dim = c.dims[index]
        self.embed = merging(c.dims[index - 1], dim) if index else stem(c.in_channels, dim)
        self.embed_norm = None if index else nn.LayerNorm(dim)
        self.grid = (c.image_size // 4,) * 2
        self.positions = None if index else nn.Parameter(sine_table(self.grid, dim))
        self.tokens = Tap()
        self.blocks = nn.ModuleList(Block(c, index, j, rate) for j, rate in enumerate(rates))
        self.norm = nn.LayerNorm(dim, eps=c.norm_eps)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = self.embed(x)
        grid = (x.shape[2], x.shape[3])
        x = map_to_tokens(x)
        if self.embed_norm is not None and self.positions is not None:
            x = self.embed_norm(x) + resize_table(self.positions, self.grid, grid)
        x = self.tokens(x, grid=grid)
        significance = None
        for block in self.blocks:
            x, significance = block(x, grid, significance)
        return self.norm(x), grid


class SGFormer(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        dims: tuple[int, ...] = (64, 128, 256, 512)
        depths: tuple[int, ...] = (2, 4, 16, 1)
        heads: tuple[int, ...] = (2, 4, 8, 16)
        reductions: tuple[int, ...] = (8, 4, 2, 1)  # of the map in hybrid-scale attention; 1: plain attention in the whole stage
        groups: tuple[tuple[int, ...], ...] = ((196, 56, 28), (49, 14, 7), (2, 1), ())  # f1, f2, f3 in self-guided attention
        window: int = 7
        mlp_ratios: tuple[float, ...] = (4, 4, 4, 4)
        qkv_bias: bool = True
        qk_scale: float | None = None  # 1 / sqrt(head width) where None
        norm_eps: float = 1e-6
        image_size: int = 224  # of the position table, which is resized for others
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        rates = drop_path_rates(c.drop_path, c.depths)
        self.stages = nn.ModuleList(Stage(c, i, rates[i]) for i in range(len(c.dims)))
        if not c.dense:
            self.features = Tap()
            self.head = nn.Linear(c.dims[-1], c.num_classes)
        init_transformer(self)
        init_convs(self)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width], any size, to logits [batch, classes] (or the pyramid, where dense)."""
        if self.config.dense:
            return self.pyramid(image)
        tokens, grid = run_stages(self.stages, image)[-1]
        return self.head(self.features(tokens, grid=grid).mean(1))

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Normalised maps [batch, dims[i], h, w] at strides 4, 8, 16, 32, sides rounded up."""
        return tuple(tokens_to_map(tokens, grid) for tokens, grid in run_stages(self.stages, image))


def sine_table(grid: Grid, dim: int) -> Tensor:
    """float [1, h w, dim]: sines, then cosines of the column in the first half of the channels, of the row in the second."""
    if dim % 4:
        raise BadInput("SG-Former width", expected="a multiple of 4 in the first stage", got=str(dim))
    rates = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * rates for n in grid)
    codes = [torch.cat([angle.sin(), angle.cos()], -1) for angle in (columns, rows)]
    table = torch.cat([codes[0].expand(grid[0], -1, -1), codes[1][:, None].expand(-1, grid[1], -1)], -1)
    return table.flatten(0, 1)[None].float()


def ascending(x: Tensor) -> Tensor:
    """Places of float [b, n] in ascending order, ties in order of place; an exported graph may order ties otherwise."""
    return (x.sort(1) if torch.compiler.is_exporting() else x.sort(dim=1, stable=True)).indices


def _half(dim: int, heads: int) -> int:
    if heads % 2 or dim % heads:
        raise BadInput("SG-Former heads", expected=f"an even number that divides the width {dim}", got=str(heads))
    return heads // 2


def _pad(x: Tensor, size: int) -> Tensor:
    """A grid [b, h, w, c] with zeros on the right and at the bottom, to sides that are multiples of size."""
    below, right = -x.shape[1] % size, -x.shape[2] % size
    return F.pad(x, (0, 0, 0, right, 0, below)) if below or right else x
