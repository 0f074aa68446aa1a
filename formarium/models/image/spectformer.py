"""SpectFormer: Frequency and Attention Is What You Need in a Vision Transformer (Patro et al., WACV 2025, arXiv 2304.06446).

Spectral blocks first, attention blocks after them. A spectral gate multiplies the spectrum of the token map by learned complex weights,

    SGN(X) = irfft2(K * rfft2(X)),                                                                              (section 3.1)

one circular convolution per channel with a kernel as large as the map; attention then mixes what these filters found. The plain form is
a ViT of one resolution whose first alpha blocks are spectral; the hierarchical one ("H") a pyramid whose first two stages are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses
from formarium.nn.attention import SelfAttention, merge_heads, split_heads
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.global_filter import GlobalFilter
from formarium.nn.init import init_transformer
from formarium.nn.maps import Grid, init_convs, map_to_tokens, tokens_to_map
from formarium.nn.mlp import MLP
from formarium.nn.positions import resize_table
from formarium.nn.token_labelling import NO_BOX, Box, mix_tokens, random_box, token_label_loss
from formarium.tasks.image_classification.model import ImageClassifier


class ConvMLP(nn.Module):
    """Linear, depthwise 3x3, GELU, Linear. x: float [b, h w, dim]. Returns the same shape."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.local = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.local(tokens_to_map(self.fc1(x), grid))
        return self.fc2(F.gelu(map_to_tokens(x)))


class Block(nn.Module):
    """Pre-norm, with a spectral gate or attention as mixer. x: float [b, h w, dim]. Returns the same shape.

    x + mixer(LN x), then x + MLP(LN x); the plain form's spectral block has one residual around both: x + MLP(LN mixer(LN x)).
    """

    def __init__(self, c: SpectFormer.Config, stage: int, spectral: bool, grid: Grid, drop_path: float):
        super().__init__()
        dim, hidden = c.dims[stage], int(c.dims[stage] * c.mlp_ratios[stage])
        self.spectral, self.one_residual, self.hierarchical = spectral, spectral and not c.hierarchical, c.hierarchical
        self.norm1 = nn.LayerNorm(dim, eps=c.norm_eps)
        self.mixer = GlobalFilter(dim, grid) if spectral else SelfAttention(dim, c.heads[stage])
        self.norm2 = nn.LayerNorm(dim, eps=c.norm_eps)
        self.mlp = ConvMLP(dim, hidden) if c.hierarchical else MLP(dim, hidden)
        self.drop = DropPath(drop_path)
        self.tap = Tap()

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        mixed = self.norm1(x)
        mixed = self.mixer(mixed.unflatten(1, grid)).flatten(1, 2) if self.spectral else self.mixer(mixed)
        if self.one_residual:
            return self.tap(x + self.drop(self._feed(mixed, grid)), grid=grid)
        x = x + self.drop(mixed)
        return self.tap(x + self.drop(self._feed(x, grid)), grid=grid)

    def _feed(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.norm2(x)
        return self.mlp(x, grid) if self.hierarchical else self.mlp(x)


class ClassBlock(nn.Module):
    """The first token attends to all, itself included, and is fed forward; the others stay. x: float [b, 1 + h w, dim]."""

    def __init__(self, dim: int, heads: int, hidden: int, eps: float):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=eps), nn.LayerNorm(dim, eps=eps)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.mlp = MLP(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        (q,), (k, v) = split_heads(self.q(y[:, :1]), self.heads), split_heads(self.kv(y), self.heads, 2)
        first = x[:, :1] + self.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))
        first = first + self.mlp(self.norm2(first))
        return torch.cat([first, x[:, 1:]], dim=1)


class Stage(nn.Module):
    """Embedding with its norm (or, in the plain form, its position table), blocks; `norm` is applied by the network.

    forward: a map [b, in_dim, H, W] to tokens [b, h w, dim] and their grid (h, w). mix swaps a box of the embedded tokens.
    """

    def __init__(self, c: SpectFormer.Config, stage: int, embed: nn.Module, grid: Grid, rates: list[float]):
        super().__init__()
        dim = c.dims[stage]
        self.grid = grid
        self.embed = embed
        self.embed_norm = nn.LayerNorm(dim) if c.hierarchical else None
        self.positions = None if c.hierarchical else nn.Parameter(nn.init.trunc_normal_(torch.empty(1, grid[0] * grid[1], dim), std=0.02))
        self.tokens = Tap()
        self.blocks = nn.ModuleList(Block(c, stage, j < c.spectral[stage], grid, rate) for j, rate in enumerate(rates))
        self.norm = nn.LayerNorm(dim, eps=c.norm_eps)

    def forward(self, x: Tensor, mix: Box = NO_BOX, scale: int = 1) -> tuple[Tensor, Grid]:
        x = self.embed(x)
        grid = (x.shape[2], x.shape[3])
        x = map_to_tokens(x)
        if self.embed_norm is not None:
            x = self.embed_norm(x)
        if self.positions is not None:
            x = x + resize_table(self.positions, self.grid, grid)
        if mix != NO_BOX:
            x = mix_tokens(x.unflatten(1, grid), mix, scale).flatten(1, 2)
        x = self.tokens(x, grid=grid)
        for block in self.blocks:
            x = block(x, grid)
        return x, grid


class PatchEmbedding(nn.Conv2d):
    """A convolution whose kernel is its stride, as one matrix product: an image [b, in, H, W] to a map [b, dim, H / patch, W / patch]."""

    def __init__(self, in_channels: int, dim: int, patch: int):
        super().__init__(in_channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        p = self.kernel_size[0]
        x = x[..., : x.shape[2] // p * p, : x.shape[3] // p * p].unflatten(3, (-1, p)).unflatten(2, (-1, p))  # b c h p w p
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3)  # b h w (c p p)
        return F.linear(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def stem(in_channels: int, hidden: int, dim: int) -> nn.Sequential:
    """A map at stride 4: 7x7 strided, two 3x3, each with BatchNorm and ReLU, then 3x3 strided."""
    layers: list[nn.Module] = []
    for source, kernel, stride in ((in_channels, 7, 2), (hidden, 3, 1), (hidden, 3, 1)):
        layers += [nn.Conv2d(source, hidden, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(hidden, dim, 3, 2, 1))


class SpectFormer(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        dims: tuple[int, ...] = (384,)  # one stage, or those of the pyramid
        depths: tuple[int, ...] = (12,)
        heads: tuple[int, ...] = (6,)
        mlp_ratios: tuple[float, ...] = (4.0,)
        spectral: tuple[int, ...] = (4,)  # how many of a stage's blocks, the first ones, are spectral (alpha)
        hierarchical: bool = False
        patch_size: int = 16  # plain form
        stem_dim: int = 32  # hierarchical form
        token_label: bool = False  # hierarchical form: a second head on every token, trained by token labelling with MixToken
        token_weight: float = 0.5  # of the token's loss
        class_weight: float = 1.0
        norm_eps: float = 1e-6
        image_size: int = 224  # that the filters and the position table are made for; they are interpolated for others
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False

    def __init__(self, config: Config):
        super().__init__(config)
        c, stages, side = config, [], config.image_size
        if c.token_label and not c.hierarchical:
            raise BadInput("SpectFormer token labelling", expected="the hierarchical form", got="hierarchical=False")
        rates = drop_path_rates(c.drop_path, c.depths)
        for i, dim in enumerate(c.dims):
            if not c.hierarchical:
                embed: nn.Module = PatchEmbedding(c.in_channels, dim, c.patch_size)
                side = side // c.patch_size
            else:
                embed = nn.Conv2d(c.dims[i - 1], dim, 3, 2, 1) if i else stem(c.in_channels, c.stem_dim, dim)
                side = -(-side // (2 if i else 4))
            stages.append(Stage(c, i, embed, (side, side), rates[i]))
        self.stages = nn.ModuleList(stages)
        if not c.dense:
            width = c.dims[-1]
            hidden = int(width * c.mlp_ratios[-1])
            self.class_blocks = nn.ModuleList([ClassBlock(width, c.heads[-1], hidden, c.norm_eps)] if c.hierarchical else [])
            self.features = Tap(prefix=int(c.hierarchical))
            self.head = nn.Linear(width, c.num_classes)
            self.token_head = nn.Linear(width, c.num_classes) if c.token_label else None
        init_transformer(self)
        if c.hierarchical:
            init_convs(self)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] (or the pyramid, where dense).

        With token labels: the class token's logits plus half the largest of the tokens', class by class.
        """
        if self.config.dense:
            return self.pyramid(image)
        if not self.config.hierarchical:
            x, grid = self._run(image)[-1]
            return self.head(self.features(x, grid=grid).mean(1))
        logits, token_logits, _ = self.token_outputs(image)
        return logits if token_logits is None else logits + 0.5 * token_logits.amax(1)

    def token_outputs(self, image: Tensor, box: Box = NO_BOX) -> tuple[Tensor, Tensor | None, Grid]:
        """Hierarchical form: class logits [b, classes], token logits [b, h w, classes] where there is a token head, and (h, w).

        box, in tokens of the last stage: what MixToken swaps; the token logits come back with it swapped back.
        """
        tokens, grid = self._run(image, box, last=False)[-1]
        x = torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1)
        for block in self.class_blocks:
            x = block(x)
        x = self.features(self.stages[-1].norm(x), grid=grid)
        if self.token_head is None:
            return self.head(x[:, 0]), None, grid
        token_logits = mix_tokens(self.token_head(x[:, 1:]).unflatten(1, grid), box).flatten(1, 2)
        return self.head(x[:, 0]), token_logits, grid

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy; with token labels, class and token cross entropy under MixToken (in training).

        batch: the task's; beside it `token_target`, float [b, classes, h w] (rows of the last stage's grid), where an annotator's maps
        are at hand. Without it each token learns the image's target.
        """
        if not self.config.token_label or self.config.dense:
            return super().loss(batch)
        c, image = self.config, self.normalise(batch["image"])
        self.check_input(image)
        target = batch["target"] if "target" in batch else F.one_hot(batch["label"], c.num_classes).float()
        box = random_box(self._last_grid(*image.shape[2:])) if self.training and len(image) > 1 else NO_BOX
        logits, token_logits, grid = self.token_outputs(image, box)
        labels = batch.get("token_target")
        if labels is not None and tuple(labels.shape[1:]) != (c.num_classes, grid[0] * grid[1]):
            expected = f"[batch, {c.num_classes}, {grid[0] * grid[1]}], a map of {grid[0]}x{grid[1]}"
            raise BadInput("token_target", expected=expected, got=f"{[*labels.shape]}", fix="resize the annotator's map")
        assert token_logits is not None
        total, cls, tokens = token_label_loss(logits.float(), token_logits.float(), target, labels, box, c.token_weight, c.class_weight)
        return Losses(total, {"cross_entropy": cls, "token_cross_entropy": tokens})

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Normalised maps [batch, dims[i], h, w], at strides 4, 8, 16, 32; the plain form has one, at its patch size."""
        return tuple(tokens_to_map(tokens, grid) for tokens, grid in self._run(image))

    def _run(self, image: Tensor, mix: Box = NO_BOX, last: bool = True) -> list[tuple[Tensor, Grid]]:
        """Each stage's tokens and grid, normalised (the last one's only where `last`)."""
        out, x = [], image.contiguous(memory_format=torch.channels_last) if self.config.hierarchical else image
        for i, stage in enumerate(self.stages):
            end = i == len(self.stages) - 1
            tokens, grid = stage(x, *(() if i else (mix, 2 ** (len(self.stages) - 1))))
            tokens = stage.norm(tokens) if last or not end else tokens
            out.append((tokens, grid))
            x = tokens if end else tokens_to_map(tokens, grid)
        return out

    def _last_grid(self, height: int, width: int) -> Grid:
        stride = 2 ** (len(self.stages) + 1)
        return -(-height // stride), -(-width // stride)

    def no_weight_decay(self) -> set[str]:
        return {"stages.0.positions"}

    def check_size(self, height: int, width: int) -> None:
        patch = self.config.patch_size
        if not self.config.hierarchical and min(height, width) < patch:
            raise BadInput("image size", expected=f"at least {patch}x{patch}", got=f"{height}x{width}", fix="resize the image")
