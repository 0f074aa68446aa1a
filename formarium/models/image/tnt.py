"""Transformer in Transformer (Han et al., NeurIPS 2021, arXiv 2103.00112) and PyramidTNT (Han et al., 2022, arXiv 2201.00978).

An image is sentences (patches) made of words (sub-patches). A small transformer relates the words within each sentence; what it finds
is added to the sentence, and a larger transformer relates the sentences (eq. 4-8). For words w [n, m, c] and sentences z [1 + n, d]:

    w += MSA(LN w),  w += MLP(LN w)                                  inside each sentence
    z[1:] += LN(FC(LN(vec w))),  z += MSA(LN z),  z += MLP(LN z)     among sentences, behind a class token

PyramidTNT has a convolutional stem, four stages whose sentences merge 2 x 2, words in the first blocks of a stage only, pooled keys and
values with a learned table of relative positions, and no class token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.maps import init_convs, map_to_tokens, tokens_to_map
from formarium.nn.mlp import MLP
from formarium.nn.ops.short_attention import short_attention
from formarium.nn.positions import resize_table
from formarium.tasks.image_classification.model import ImageClassifier

Grid = tuple[int, int]
SIDE = 4  # PyramidTNT's sentences are 4 x 4 words


class WordTransformer(nn.Module):
    """The inner transformer (eq. 4-5): words attend within their sentence only.

    words: float [batch * sentences, m, dim]. Returns the same shape. PyramidTNT normalises the m words of a sentence together.
    """

    def __init__(self, dim: int, heads: int, m: int, c: TNT.Config, drop_path: float):
        super().__init__()
        self.heads, self.scale = heads, c.qk_scale
        self.span = m * dim if c.pyramid else dim
        self.norm1 = nn.LayerNorm(self.span)
        self.qkv = nn.Linear(dim, 3 * dim, bias=c.qkv_bias)
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(self.span)
        self.mlp = MLP(dim, int(dim * c.mlp_ratio))
        self.drop = DropPath(drop_path)

    def forward(self, words: Tensor) -> Tensor:
        words = words + self.drop(self.attend(self.normalised(self.norm1, words)))
        return words + self.drop(self.mlp(self.normalised(self.norm2, words)))

    def normalised(self, norm: nn.LayerNorm, words: Tensor) -> Tensor:
        return norm(words.reshape(-1, self.span)).view(words.shape)

    def attend(self, words: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(words), self.heads, 3)
        return self.out(merge_heads(short_attention(q, k, v, self.scale)))


class Fusion(nn.Module):
    """What a sentence learns from its words: LN(FC(LN(vec w))) (eq. 6). [batch * sentences, m, dim] -> [batch, sentences, out]."""

    def __init__(self, dim: int, m: int, out: int, bias: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(m * dim)
        self.linear = nn.Linear(m * dim, out, bias=bias)
        self.norm2 = nn.LayerNorm(out)

    def forward(self, words: Tensor, batch: int) -> Tensor:
        return self.norm2(self.linear(self.norm1(words.reshape(batch, -1, words.shape[1] * words.shape[2]))))


class SentenceAttention(nn.Module):
    """Attention among sentences; where reduction > 1, keys and values are the mean of reduction x reduction sentences.

    x: float [batch, sentences, dim] over `grid`; bias: float [1, heads, sentences, keys], added to the logits. Returns [batch, asked, dim],
    the answers to the first `asked` sentences (None: to all).
    """

    def __init__(self, dim: int, heads: int, reduction: int, c: TNT.Config):
        super().__init__()
        self.heads, self.reduction, self.scale = heads, reduction, c.qk_scale
        if reduction == 1:
            self.qkv = nn.Linear(dim, 3 * dim, bias=c.qkv_bias)
        else:
            self.q = nn.Linear(dim, dim, bias=c.qkv_bias)
            self.kv = nn.Linear(dim, 2 * dim, bias=c.qkv_bias)
            self.shrink = nn.Linear(dim, dim)
            self.shrink_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid, bias: Tensor | None, asked: int | None = None) -> Tensor:
        if self.reduction == 1:
            q, k, v = split_heads(self.qkv(x), self.heads, 3)
        else:
            (q,) = split_heads(self.q(x), self.heads)
            k, v = split_heads(self.kv(self.reduce(x, grid)), self.heads, 2)
        return self.out(merge_heads(F.scaled_dot_product_attention(q[:, :, :asked], k, v, attn_mask=bias, scale=self.scale)))

    def reduce(self, x: Tensor, grid: Grid) -> Tensor:
        pooled = F.avg_pool2d(tokens_to_map(x, grid), self.reduction)
        return self.shrink_norm(self.shrink(map_to_tokens(pooled)))


class SqueezeExcite(nn.Module):
    """Scale channels by a gate in (-1, 1) computed from their mean over tokens. x: float [batch, tokens, dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, dim // 4)
        self.fc2 = nn.Linear(dim // 4, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(F.relu(self.fc1(self.norm(x.mean(1, keepdim=True)))))
        return x * gate.tanh()


class Block(nn.Module):
    """A TNT block: words (unless has_words is False), their fusion into sentences, sentences.

    words: float [batch * sentences, m, word_dim]; sentences: float [batch, prefix + sentences, dim]. Returns both.
    """

    def __init__(self, stage: int, m: int, c: TNT.Config, has_words: bool, drop_path: float):
        super().__init__()
        dim, word_dim = c.dims[stage], c.word_dims[stage]
        self.prefix = int(not c.pyramid)
        self.words = WordTransformer(word_dim, c.word_heads[stage], m, c, drop_path) if has_words else None
        self.fuse = Fusion(word_dim, m, dim, bias=False) if has_words else None
        self.norm1 = nn.LayerNorm(dim)
        self.attention = SentenceAttention(dim, c.heads[stage], c.reductions[stage] if c.pyramid else 1, c)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * c.mlp_ratio))
        self.se = SqueezeExcite(dim) if c.se else None
        self.drop = DropPath(drop_path)
        self.tap = Tap(prefix=self.prefix)

    def forward(
        self, words: Tensor, sentences: Tensor, grid: Grid, bias: Tensor | None, asked: int | None = None, rest: bool = True
    ) -> tuple[Tensor, Tensor]:
        """asked: the first sentences, which somebody reads afterwards; the others stay behind unless `rest` or the tap wants them."""
        if self.words is not None and self.fuse is not None:
            words = self.words(words)
            heard = self.fuse(words, sentences.shape[0])
            if self.prefix:  # the class token has no words
                heard = F.pad(heard, (0, 0, self.prefix, 0))
            sentences = sentences + heard
        out = self.relate(sentences, grid, bias, asked)
        if asked is not None and (rest or self.tap.watch is not None):  # what was asked for is computed the same way either way
            out = torch.cat([out, self.relate(sentences, grid, bias)[:, asked:]], dim=1)
        return words, self.tap(out, grid=grid)

    def relate(self, sentences: Tensor, grid: Grid, bias: Tensor | None, asked: int | None = None) -> Tensor:
        """The outer transformer (eq. 7-8)."""
        x = sentences[:, :asked] + self.drop(self.attention(self.norm1(sentences), grid, bias, asked))
        update = self.mlp(self.norm2(x))
        if self.se is not None:
            update = update + self.se(update)
        return x + self.drop(update)


class PatchTokens(nn.Module):
    """TNT's tokeniser: words by a strided 7 x 7 convolution of each patch by itself (so that nothing crosses its border), sentences by
    fusing those words. image [batch, channels, height, width] -> words, sentences, grid; a remainder beyond whole patches is cut off."""

    def __init__(self, c: TNT.Config, image_size: Grid):
        super().__init__()
        self.patch = pair(c.patch_size)
        self.grid = (image_size[0] // self.patch[0], image_size[1] // self.patch[1])
        self.m = math.prod(math.ceil(side / c.word_stride) for side in self.patch)
        n, dim, word_dim = math.prod(self.grid), c.dims[0], c.word_dims[0]
        self.conv = nn.Conv2d(c.in_channels, word_dim, 7, stride=c.word_stride, padding=3)
        self.word_positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.m, word_dim), std=0.02))
        self.fuse = Fusion(word_dim, self.m, dim, bias=True)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + n, dim), std=0.02))
        # nothing reads it, but it is in the released weights, and in the published parameter counts
        self.unused = nn.Parameter(torch.zeros(1, n, dim), requires_grad=False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Grid]:
        (b, c), (ph, pw) = image.shape[:2], self.patch
        grid = (image.shape[2] // ph, image.shape[3] // pw)
        patches = image[:, :, : grid[0] * ph, : grid[1] * pw].reshape(b, c, grid[0], ph, grid[1], pw)
        words = self.conv(patches.permute(0, 2, 4, 1, 3, 5).reshape(-1, c, ph, pw))  # (b n) c i j
        words = map_to_tokens(words).contiguous() + self.word_positions
        sentences = self.fuse(words, b) + resize_table(self.positions[:, 1:], self.grid, grid, "bicubic")
        cls_token = (self.cls_token + self.positions[:, :1]).expand(b, -1, -1)
        return words, torch.cat([cls_token, sentences], dim=1), grid


def conv_norm_relu(in_dim: int, dim: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(in_dim, dim, 3, stride, padding=1), nn.BatchNorm2d(dim), nn.ReLU()]


class StemTokens(nn.Module):
    """PyramidTNT's tokeniser: words at stride 2, sentences of 4 x 4 words at stride 8, both by convolutions.

    image [batch, channels, height, width] -> words, sentences, grid.
    """

    def __init__(self, c: TNT.Config, image_size: Grid):
        super().__init__()
        dim, word_dim = c.dims[0], c.word_dims[0]
        self.grid, self.m = (image_size[0] // 8, image_size[1] // 8), SIDE * SIDE
        self.common = nn.Sequential(*conv_norm_relu(c.in_channels, 2 * word_dim, 2))
        self.words = nn.Sequential(*conv_norm_relu(2 * word_dim, word_dim, 1))
        self.sentences = nn.Sequential(
            *conv_norm_relu(2 * word_dim, 4 * word_dim, 2),
            *conv_norm_relu(4 * word_dim, 8 * word_dim, 2),
            *conv_norm_relu(8 * word_dim, dim, 1),
        )
        self.word_positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, self.m, word_dim), std=0.02))
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, math.prod(self.grid), dim), std=0.02))

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Grid]:
        x = self.common(image)
        sentences = self.sentences(x)
        grid = (sentences.shape[2], sentences.shape[3])
        words = self.words(x).unflatten(3, (grid[1], SIDE)).unflatten(2, (grid[0], SIDE))  # b c h i w j
        words = words.permute(0, 2, 4, 3, 5, 1).flatten(3, 4).flatten(0, 2) + self.word_positions  # (b h w) (i j) c
        sentences = map_to_tokens(sentences).contiguous() + resize_table(self.positions, self.grid, grid, "bicubic")
        return words, sentences, grid


class WordMerge(nn.Module):
    """The words of 2 x 2 sentences, 8 x 8 of them, become 4 x 4 by a strided convolution; grids of odd sides get a border of zeros."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)

    def forward(self, words: Tensor, grid: Grid) -> Tensor:
        x = self.norm(words).view(-1, *grid, SIDE, SIDE, words.shape[2])  # b h w i j c
        if grid[0] % 2 or grid[1] % 2:
            x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, grid[1] % 2, 0, grid[0] % 2))
        x = x.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 5, 4, 6, 7)  # b h w 2 i 2 j c
        x = self.conv(x.reshape(-1, 2 * SIDE, 2 * SIDE, words.shape[2]).permute(0, 3, 1, 2))
        return map_to_tokens(x).contiguous()


class SentenceMerge(nn.Module):
    """LN and a strided 3 x 3 convolution: tokens over `grid` to tokens over half of it, rounded up."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(in_dim)
        self.conv = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1)

    def forward(self, x: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
        x = self.conv(tokens_to_map(self.norm(x), grid))
        return map_to_tokens(x).contiguous(), (x.shape[2], x.shape[3])


class Stage(nn.Module):
    """Merging (from PyramidTNT's second stage on), blocks, and PyramidTNT's relative positions, one table for all blocks."""

    def __init__(self, stage: int, m: int, c: TNT.Config, grid: Grid, rates: list[float]):
        super().__init__()
        self.grid, self.reduction = grid, c.reductions[stage] if c.pyramid else 1
        self.merge_words = WordMerge(c.word_dims[stage - 1], c.word_dims[stage]) if stage else None
        self.merge_sentences = SentenceMerge(c.dims[stage - 1], c.dims[stage]) if stage else None
        table = torch.randn(1, c.heads[stage], math.prod(grid), math.prod(self.keys(grid))) if c.pyramid else None
        self.relative = nn.Parameter(table) if table is not None else None
        with_words = len(rates) if not c.pyramid else 2 if len(rates) > 6 else 1
        self.blocks = nn.ModuleList([Block(stage, m, c, j < with_words, rate) for j, rate in enumerate(rates)])
        self.words = nn.ModuleList([Tap() for _ in range(with_words)])  # what comes to each block that has words

    def forward(
        self, words: Tensor, sentences: Tensor, grid: Grid, asked: int | None = None, rest: bool = True
    ) -> tuple[Tensor, Tensor, Grid]:
        if self.merge_words is not None and self.merge_sentences is not None:
            words = self.merge_words(words, grid)
            sentences, grid = self.merge_sentences(sentences, grid)
        bias = None if self.relative is None else self.relative_on(self.relative, grid)
        for j, block in enumerate(self.blocks):
            if j < len(self.words):
                words = self.words[j](words, batch=sentences.shape[0])
            last = j == len(self.blocks) - 1
            words, sentences = block(words, sentences, grid, bias, asked if last else None, rest)
        return words, sentences, grid

    def keys(self, grid: Grid) -> Grid:
        return (grid[0] // self.reduction, grid[1] // self.reduction)

    def relative_on(self, table: Tensor, grid: Grid) -> Tensor:
        """The table [1, heads, sentences, keys] on another grid: resized over the keys, then over the sentences."""
        if all(isinstance(n, int) for n in grid) and grid == self.grid:
            return table
        heads = table.shape[1]
        table = table.flatten(1, 2).transpose(1, 2)  # 1 keys (heads sentences)
        table = resize_table(table, self.keys(self.grid), self.keys(grid), "bicubic").unflatten(2, (heads, -1))
        table = resize_table(table.permute(0, 3, 2, 1).flatten(2), self.grid, grid, "bicubic")  # 1 sentences (heads keys)
        return table.unflatten(2, (heads, -1)).transpose(1, 2)


class TNT(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        dims: tuple[int, ...] = (384,)  # of sentences, stage by stage: one stage in TNT
        word_dims: tuple[int, ...] = (24,)
        depths: tuple[int, ...] = (12,)
        heads: tuple[int, ...] = (6,)
        word_heads: tuple[int, ...] = (4,)
        mlp_ratio: float = 4.0
        qkv_bias: bool = False
        qk_scale: float | None = None  # of the logits; None: 1 / sqrt(width of a head)
        se: bool = False  # squeeze-and-excitation beside the sentences' MLP, off in every published model
        patch_size: int | tuple[int, int] = 16  # TNT: of a sentence, in pixels
        word_stride: int = 4  # TNT: between words, in pixels
        pyramid: bool = False  # PyramidTNT
        reductions: tuple[int, ...] = (4, 2, 1, 1)  # PyramidTNT: of keys and values, per side
        image_size: int | tuple[int, int] = 224  # of the position tables; they are resized for other sizes
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False  # no norm or head: forward gives the maps

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.tokeniser = (StemTokens if c.pyramid else PatchTokens)(c, self.image_size)
        self.tokens = Tap(prefix=int(not c.pyramid))
        grid, stages = self.tokeniser.grid, []
        for i, rates in enumerate(drop_path_rates(c.drop_path, c.depths)):
            grid = (-(-grid[0] // 2), -(-grid[1] // 2)) if i else grid
            stages.append(Stage(i, self.tokeniser.m, c, grid, rates))
        self.stages = nn.ModuleList(stages)
        if not c.dense:
            self.norm = nn.LayerNorm(c.dims[-1])
            self.features = Tap(prefix=int(not c.pyramid))
            self.head = nn.Linear(c.dims[-1], c.num_classes) if c.num_classes else nn.Identity()
        init_transformer(self)
        if c.pyramid:
            init_convs(self)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] (or the maps, where dense)."""
        if self.config.dense:
            return self.pyramid(image)
        if self.config.pyramid:
            sentences, grid = self._run(image)[-1]
            return self.head(self.features(self.norm(sentences), grid=grid).mean(1))
        # the head reads the class token alone: the last block needn't update the others unless somebody looks at them
        asked = None if self.config.se else 1  # squeeze-and-excitation takes the mean over all
        sentences, grid = self._run(image, asked, rest=self.features.watch is not None)[-1]
        return self.head(self.features(self.norm(sentences), grid=grid)[:, 0])

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Sentences after each stage as maps [batch, dims[i], height / stride, width / stride]: one map at the patch size in TNT, four
        at strides 8, 16, 32, 64 in PyramidTNT."""
        return tuple(tokens_to_map(x[:, -grid[0] * grid[1] :], grid) for x, grid in self._run(image))  # without the class token

    def _run(self, image: Tensor, asked: int | None = None, rest: bool = True) -> list[tuple[Tensor, Grid]]:
        words, sentences, grid = self.tokeniser(image)
        sentences, out = self.tokens(sentences, grid=grid), []
        for i, stage in enumerate(self.stages):
            last = i == len(self.stages) - 1
            words, sentences, grid = stage(words, sentences, grid, asked if last else None, rest)
            out.append((sentences, grid))
        return out

    @property
    def dynamic_size(self) -> int:
        """An exported graph takes sides that are multiples of this; PyramidTNT's one size, since tracing an open one takes minutes."""
        return 0 if self.config.pyramid else math.lcm(*pair(self.config.patch_size))

    def no_weight_decay(self) -> set[str]:
        return {"tokeniser.cls_token", "tokeniser.positions", "tokeniser.word_positions"}

    def check_size(self, height: int, width: int) -> None:
        if not self.config.pyramid:
            least_h, least_w = pair(self.config.patch_size)
            if height < least_h or width < least_w:
                raise BadInput("image size", expected=f"at least {least_h}x{least_w}", got=f"{height}x{width}", fix="resize the image")
            return
        # each stage halves the grid, rounding up, and the pooled one must have a token left
        least = max(8 * (2**i * (r - 1) + 1) for i, r in enumerate(self.config.reductions[: len(self.config.dims)]))
        if height % 8 or width % 8 or min(height, width) < least:
            raise BadInput("image size", expected=f"multiples of 8, at least {least}", got=f"{height}x{width}", fix="resize the image")


def pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
