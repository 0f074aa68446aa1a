"""DualToken-ViT: Position-aware Efficient Vision Transformer with Dual Token Fusion (Chu et al., SDM 2024, arXiv 2309.12424).

Image tokens X [h w, C] and global tokens G [7 x 7, C] run side by side through three stages (strides 8, 16, 32). In a block

    X_local = conv encoder(X)                       local information, a ConvNeXt block
    X_ga    = self-attention(step-wise down(X_local))   global information, over 49 tokens whatever the image's size
    G       = enrich(a G + (1 - a) X_ga)            token j of G belongs to cell j of the 7 x 7 map: they know their positions
    X       = X_local + attention(X_local -> G)     both fused, then a gated feed-forward network

The paper gives the structure; stem, merging and gated FFN are LightViT's (Huang et al. 2022), and the sizes are fitted to its totals.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import SelfAttention, merge_heads, split_heads
from formarium.nn.convs import ConvBN
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.light import GatedMLP, LightStem, MergePatches
from formarium.nn.maps import Grid, map_to_tokens, tokens_to_map
from formarium.nn.mlp import MLP
from formarium.nn.ops.activations import gelu
from formarium.nn.ops.feed_forward import feed_forward
from formarium.tasks.image_classification.model import ImageClassifier

EPS = 1e-6  # of the blocks' own norms


class ConvEncoder(nn.Module):
    """The local token: x + gamma * MLP(LN(depthwise 7x7(x))) (Liu et al., "A ConvNet for the 2020s"). x: float [batch, h w, dim]."""

    def __init__(self, dim: int, ratio: float, layer_scale: float, drop_path: float):
        super().__init__()
        self.local = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(dim, int(dim * ratio))
        self.gamma = nn.Parameter(torch.full((dim,), layer_scale))
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        near = self.norm(map_to_tokens(self.local(tokens_to_map(x, grid))))
        if type(self.mlp.fc1) is not nn.Linear or type(self.mlp.fc2) is not nn.Linear:  # a method has put another layer in place
            return x + self.drop(self.gamma * self.mlp(near))
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2  # gamma scales the weights, which are fewer than the activations
        return x + self.drop(feed_forward(near, fc1.weight, fc1.bias, self.gamma[:, None] * fc2.weight, self.gamma * fc2.bias))


class StepwiseDown(nn.Module):
    """`steps` times {depthwise 3x3, BN, GELU, depthwise 3x3 with stride 2, BN}, and a bilinear resize where that isn't the wanted grid.

    x: float [batch, h w, dim]. Returns [batch, grid[0] * grid[1], dim].
    """

    def __init__(self, dim: int, steps: int, grid: Grid):
        super().__init__()
        self.grid = grid
        self.look = nn.ModuleList(ConvBN(dim, dim, 3, groups=dim) for _ in range(steps))
        self.down = nn.ModuleList(ConvBN(dim, dim, 3, 2, groups=dim) for _ in range(steps))

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = tokens_to_map(x, grid)
        for look, down in zip(self.look, self.down, strict=True):
            x = down(gelu(look(x)))
        height, width = x.shape[2:]
        fits = isinstance(height, int) and isinstance(width, int) and (height, width) == self.grid
        if not fits:  # a graph of open size always resizes; to the same grid that changes nothing
            x = F.interpolate(x, self.grid, mode="bilinear", align_corners=False)
        return map_to_tokens(x)


class Enrichment(nn.Module):
    """G' = a G + (1 - a) X_ga token by token, G = G' + MLP(LN G'). a, one number a block, is sigmoid(`balance`).

    g, seen: float [batch, cells, dim]. token_mlp: "mix" (over the cells, channel by channel) or "channel" (over channels, cell by cell).
    """

    def __init__(self, dim: int, cells: int, token_mlp: str, ratio: float):
        super().__init__()
        self.mixes = token_mlp == "mix"
        self.balance = nn.Parameter(torch.zeros(1))
        self.norm = nn.LayerNorm(dim, eps=EPS)
        self.mlp = MLP(cells, cells) if self.mixes else MLP(dim, int(dim * ratio))

    def forward(self, g: Tensor, seen: Tensor) -> Tensor:
        g = self.weigh(g, seen)
        y = self.norm(g)
        return g + (self.mlp(y.transpose(1, 2)).transpose(1, 2) if self.mixes else self.mlp(y))

    def weigh(self, g: Tensor, seen: Tensor) -> Tensor:
        a = self.balance.sigmoid()
        return a * g + (1 - a) * seen


class Block(nn.Module):
    """x: float [batch, h w, dim], g: float [batch, cells, dim]. Returns both, renewed."""

    def __init__(self, c: DualTokenViT.Config, stage: int, drop_path: float):
        super().__init__()
        dim, self.heads = c.dims[stage], c.heads[stage]
        self.encoder = ConvEncoder(dim, c.conv_ratio, c.layer_scale, drop_path)
        self.down = StepwiseDown(dim, c.steps[stage], c.global_grid)
        self.norm_down = nn.LayerNorm(dim, eps=EPS)
        self.aggregate = SelfAttention(dim, self.heads, qkv_bias=False)
        self.enrich = Enrichment(dim, c.global_grid[0] * c.global_grid[1], c.token_mlp, c.token_mlp_ratio)
        self.norm_query = nn.LayerNorm(dim, eps=EPS)
        self.query = nn.Linear(dim, dim)
        self.norm_mlp = nn.LayerNorm(dim, eps=EPS)
        self.mlp = GatedMLP(dim, int(dim * c.mlp_ratios[stage]))
        self.drop = DropPath(drop_path)
        self.tap = Tap()

    def forward(self, x: Tensor, g: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        x = self.encoder(x, grid)
        g = self.enrich(g, self.see(x, grid))
        x = x + self.drop(self.broadcast(x, g))
        x = x + self.drop(self.mlp(self.norm_mlp(x)))
        return self.tap(x, grid=grid), g

    def see(self, x: Tensor, grid: Grid) -> Tensor:
        """The whole image in as many tokens as G has: X_ga, [batch, cells, dim]."""
        x = self.down(x, grid)
        return x + self.aggregate(self.norm_down(x))

    def broadcast(self, x: Tensor, g: Tensor) -> Tensor:
        """Image tokens ask, global tokens answer: they are keys and values as they are."""
        (q,), (k,) = split_heads(self.query(self.norm_query(x)), self.heads), split_heads(g, self.heads)
        return merge_heads(F.scaled_dot_product_attention(q, k, k))


class Stage(nn.Module):
    """Residual merging of 2x2 patches (not in the first stage), blocks."""

    def __init__(self, merge: MergePatches | None, blocks: list[Block]):
        super().__init__()
        self.merge = merge
        self.tokens, self.globals = Tap(), Tap()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, g: Tensor, grid: Grid, global_grid: Grid) -> tuple[Tensor, Tensor, Grid]:
        if self.merge is not None:
            x, grid = self.merge(x, grid)
            g = self.merge.follow(g)
        x, g = self.tokens(x, grid=grid), self.globals(g, grid=global_grid)
        for block in self.blocks:
            x, g = block(x, g, grid)
        return x, g, grid


class DualTokenViT(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        dims: tuple[int, ...] = (64, 128, 256)
        depths: tuple[int, ...] = (2, 6, 6)
        heads: tuple[int, ...] = (2, 4, 8)
        mlp_ratios: tuple[float, ...] = (8, 4, 4)
        conv_ratio: float = 4
        global_grid: tuple[int, int] = (7, 7)
        steps: tuple[int, ...] = (2, 1, 0)  # halvings of a stage's map on its way to the global grid (28, 14, 7 at 224 pixels)
        token_mlp: str = "mix"  # or "channel"
        token_mlp_ratio: float = 0.5  # of the channel MLP's hidden width
        layer_scale: float = 1e-6
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.token_mlp not in ("mix", "channel"):
            raise BadInput("token_mlp", expected='"mix" or "channel"', got=repr(c.token_mlp))
        rates = drop_path_rates(c.drop_path, c.depths)
        self.stem = LightStem(c.in_channels, c.dims[0])
        self.global_tokens = nn.Parameter(torch.empty(1, c.global_grid[0] * c.global_grid[1], c.dims[0]).normal_(std=0.02))
        self.stages = nn.ModuleList(
            Stage(MergePatches(c.dims[i - 1], dim) if i else None, [Block(c, i, rate) for rate in rates[i]]) for i, dim in enumerate(c.dims)
        )
        if c.dense:
            self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=EPS) for dim in c.dims)
        else:
            self.norm = nn.LayerNorm(c.dims[-1], eps=EPS)
            self.features = Tap()
            self.head = nn.Linear(c.dims[-1], c.num_classes)
        init_transformer(self)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width], any size, to logits [batch, classes] (or the pyramid, where dense)."""
        if self.config.dense:
            return self.pyramid(image)
        tokens, grid = self._run(image)[1][-1]
        return self.head(self.features(self.norm(tokens), grid=grid).mean(1))

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Four maps at strides 4, 8, 16, 32: the stem's [batch, dims[0] / 2, h, w], and the stages' [batch, dims[i], h, w]."""
        fine, stages = self._run(image)
        norms = self.norms if self.config.dense else [nn.Identity()] * len(stages)
        return (fine, *(tokens_to_map(norm(tokens), grid) for norm, (tokens, grid) in zip(norms, stages, strict=True)))

    def _run(self, image: Tensor) -> tuple[Tensor, list[tuple[Tensor, Grid]]]:
        """The stem's map at stride 4, and each stage's tokens with their grid."""
        fine, x, grid = self.stem(image)
        g, out = self.global_tokens.to(x.dtype).expand(x.shape[0], -1, -1), []
        for stage in self.stages:
            x, g, grid = stage(x, g, grid, self.config.global_grid)
            out.append((x, grid))
        return fine, out

    def no_weight_decay(self) -> set[str]:
        return {"global_tokens"}
