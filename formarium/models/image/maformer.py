"""MAFormer: A Transformer Network with Multi-scale Attention Fusion for Visual Recognition (Wang et al., 2022, arXiv 2209.01620).

In the two high-resolution stages a block has two streams over the same map X [N, C] (N = h w):

    local    X_L = MLP(LN L) + L,  L = window attention(LN X) + X
    global   X_G = W_d LN(X) + P       W_d [M, N]: each of M = N / 2 global tokens is a learned combination of all places (GLD)
    fusion   X_L + Proj(softmax(Q K^T / sqrt d) V),  Q from X_L, K and V from X_G

so every local token reads the whole image at N M, not N N, attention entries. The two last stages are plain transformer blocks.
The paper gives the structure; how the parts are put together is our reading.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import SelfAttention, merge_heads, split_heads
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.maps import Grid, map_to_tokens, run_stages, tokens_to_map
from formarium.nn.mlp import MLP
from formarium.nn.nd_windows import WindowAttention
from formarium.nn.positions import resize_table
from formarium.tasks.image_classification.model import ImageClassifier

FUSIONS = ("attention", "scalar", "none")


class GlobalPositions(nn.Module):
    """P: a learned table [side, side, dim], one a stage, resized (bilinearly) to the stage's M global tokens. Returns [1, M, dim]."""

    def __init__(self, dim: int, side: int, grid: Grid):
        super().__init__()
        self.side, self.grid = side, grid
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, side * side, dim), std=0.02))

    def forward(self) -> Tensor:
        return resize_table(self.table, (self.side, self.side), self.grid)


class GlobalDownsampling(nn.Module):
    """GLD: a fully connected layer along the token axis, plus P.

    x: float [batch, h w, dim] over `grid` = (h, w); a map of another grid than `trained` is resized to it first, as the layer has a
    column for each place. positions: float [1, M, dim]. Returns [batch, M, dim], row-major over `self.grid`.
    """

    def __init__(self, trained: Grid, reduced: Grid):
        super().__init__()
        self.trained, self.grid = trained, reduced
        self.reduce = nn.Linear(trained[0] * trained[1], reduced[0] * reduced[1])

    def forward(self, x: Tensor, positions: Tensor, grid: Grid) -> Tensor:
        if grid != self.trained:
            x = map_to_tokens(F.interpolate(tokens_to_map(x, grid), self.trained, mode="bilinear", align_corners=False))
        b, n, c = x.shape
        flat = x.transpose(0, 1).reshape(n, b * c)  # one product for all samples and channels
        y = torch.addmm(self.reduce.bias[:, None], self.reduce.weight, flat).unflatten(1, (b, c)).transpose(0, 1)
        return y + positions


class AttentionFusion(nn.Module):
    """Every local token reads the global ones: Proj(attention(Q from LN(local), K and V from LN(global))).

    local: float [batch, N, dim], globals: float [batch, M, dim]. Returns [batch, N, dim]. Proj starts at zero: the block is its
    local stream then.
    """

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm_local, self.norm_global = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.q, self.kv = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, local: Tensor, globals: Tensor) -> Tensor:
        (q,) = split_heads(self.q(self.norm_local(local)), self.heads)
        k, v = split_heads(self.kv(self.norm_global(globals)), self.heads, 2)
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class MAFBlock(nn.Module):
    """Multi-scale attention fusion. x: float [batch, h w, dim], positions: float [1, M, dim]. Returns the shape of x.

    fusion "attention" (the paper's choice); "scalar": a X_L + b up(X_G) with two learned numbers, the weaker alternative it reports;
    "none": the local stream alone.
    """

    def __init__(self, c: MAFormer.Config, stage: int, trained: Grid, reduced: Grid, drop_path: float):
        super().__init__()
        dim, self.window, self.fusion = c.dims[stage], c.window, c.fusion
        self.norm1 = nn.LayerNorm(dim)
        self.attention = WindowAttention(dim, (c.window, c.window), c.heads[stage])
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * c.mlp_ratio))
        if c.fusion != "none":
            self.gld = GlobalDownsampling(trained, reduced)
        if c.fusion == "attention":
            self.fuse = AttentionFusion(dim, c.heads[stage])
        if c.fusion == "scalar":
            self.scales = nn.Parameter(torch.tensor([1.0, 0.0]))
        self.drop = DropPath(drop_path)
        self.tap = Tap()

    def forward(self, x: Tensor, grid: Grid, positions: Tensor | None = None) -> Tensor:
        normed = self.norm1(x)
        local = self.local(x, normed, grid)
        if positions is not None:
            local = self.merge(local, self.gld(normed, positions, grid), grid)
        return self.tap(local, grid=grid)

    def local(self, x: Tensor, normed: Tensor, grid: Grid) -> Tensor:
        """X_L, [batch, h w, dim]; maps that windows don't fill are padded with zeros, which take part, as in Swin."""
        h, w = grid
        down, right = -h % self.window, -w % self.window
        y = normed.unflatten(1, grid)
        if down or right:
            y = F.pad(y, (0, 0, 0, right, 0, down))
        y = self.attention(y)[:, :h, :w].flatten(1, 2)
        x = x + self.drop(y)
        return x + self.drop(self.mlp(self.norm2(x)))

    def merge(self, local: Tensor, globals: Tensor, grid: Grid) -> Tensor:
        if self.fusion == "attention":
            return local + self.drop(self.fuse(local, globals))
        up = F.interpolate(tokens_to_map(globals, self.gld.grid), grid, mode="bilinear", align_corners=False)
        return self.scales[0] * local + self.scales[1] * map_to_tokens(up)


class Block(nn.Module):
    """Pre-norm: x + attention(LN x), then x + MLP(LN x). x: float [batch, h w, dim]."""

    def __init__(self, c: MAFormer.Config, stage: int, drop_path: float):
        super().__init__()
        dim = c.dims[stage]
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention = SelfAttention(dim, c.heads[stage])
        self.mlp = MLP(dim, int(dim * c.mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        return self.tap(x + self.drop(self.mlp(self.norm2(x))), grid=grid)


class Stage(nn.Module):
    """Strided convolution with LayerNorm, blocks. A map [batch, in_dim, h, w] to tokens and their grid."""

    def __init__(self, embed: nn.Conv2d, blocks: list[nn.Module], positions: GlobalPositions | None):
        super().__init__()
        self.positions = positions
        self.embed, self.norm = embed, nn.LayerNorm(embed.out_channels)
        self.tokens = Tap()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = self.embed(x)
        grid = (x.shape[2], x.shape[3])
        x = self.tokens(self.norm(map_to_tokens(x)), grid=grid)
        positions = () if self.positions is None else (self.positions(),)
        for block in self.blocks:
            x = block(x, grid, *positions)
        return x, grid


class MAFormer(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        dims: tuple[int, ...] = (64, 128, 256, 512)
        depths: tuple[int, ...] = (2, 2, 6, 2)
        heads: tuple[int, ...] = (2, 4, 8, 16)
        window: int = 7
        mlp_ratio: float = 4
        global_ratio: float = 0.5  # M / N
        maf_stages: tuple[int, ...] = (0, 1)  # whose blocks fuse two streams
        fusion: str = "attention"  # or "scalar", or "none"
        table_side: int = 28  # of the table of places, before it is resized to M
        stem_stride: int = 4
        image_size: int | tuple[int, int] = 224  # that the layers along the token axis are made for; other maps are resized for them
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False

    def __init__(self, config: Config):
        super().__init__(config)
        c, stages = config, []
        if c.fusion not in FUSIONS:
            raise BadInput("fusion", expected=" or ".join(map(repr, FUSIONS)), got=repr(c.fusion))
        rates = drop_path_rates(c.drop_path, c.depths)
        grid = self.image_size
        for i, dim in enumerate(c.dims):
            stride = 2 if i else c.stem_stride
            grid = ((grid[0] - 1) // stride + 1, (grid[1] - 1) // stride + 1)
            embed = nn.Conv2d(c.dims[i - 1], dim, 3, 2, 1) if i else nn.Conv2d(c.in_channels, dim, 7, stride, 3)
            if i in c.maf_stages:
                reduced = (max(1, int(grid[0] * c.global_ratio)), grid[1])  # M tokens
                blocks: list[nn.Module] = [MAFBlock(c, i, grid, reduced, rate) for rate in rates[i]]
                positions = None if c.fusion == "none" else GlobalPositions(dim, c.table_side, reduced)
                stages.append(Stage(embed, blocks, positions))
            else:
                stages.append(Stage(embed, [Block(c, i, rate) for rate in rates[i]], None))
        self.stages = nn.ModuleList(stages)
        if not c.dense:
            self.norm = nn.LayerNorm(c.dims[-1])
            self.features = Tap()
            self.head = nn.Linear(c.dims[-1], c.num_classes)
        init_transformer(self)
        for module in self.modules():
            if isinstance(module, AttentionFusion):
                nn.init.zeros_(module.out.weight)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] (or the pyramid, where dense)."""
        if self.config.dense:
            return self.pyramid(image)
        tokens, grid = run_stages(self.stages, image)[-1]
        return self.head(self.features(self.norm(tokens), grid=grid).mean(1))

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Four maps [batch, dims[i], h, w] at strides 4, 8, 16, 32."""
        return tuple(tokens_to_map(tokens, grid) for tokens, grid in run_stages(self.stages, image))

    def no_weight_decay(self) -> set[str]:
        return {"*.positions.table", "*.attention.table"}
