"""CrossViT: Cross-Attention Multi-Scale Vision Transformer (Chen, Fan, Panda, ICCV 2021, arXiv 2103.14899).

Two branches see the image in small and in large patches. After each run of ordinary blocks the branches exchange what they know through
their class tokens alone: one branch's class token, brought to the other's width, attends to the other's patches and is brought back
(eq. 3-5). One query over N tokens makes the exchange linear in N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import SelfAttention
from formarium.nn.drop import DropPath
from formarium.nn.init import init_transformer
from formarium.nn.maps import tokens_to_map
from formarium.nn.mlp import MLP
from formarium.tasks.image_classification.model import ImageClassifier


class ClassTokenAttention(nn.Module):
    """The first token attends to all (eq. 4). x: float [batch, tokens, dim]. Returns [batch, 1, dim].

    With a single query the projections of keys and values move to the query's side: q . (K x) = (K^T q) . x, and V (sum a x) = sum a (V x).
    That costs tokens * dim * heads where projecting every token would cost tokens * dim^2, and is the same function.
    """

    def __init__(self, dim: int, heads: int, qkv_bias: bool, scale: float | None = None):
        super().__init__()
        self.heads, self.scale = heads, scale or (dim // heads) ** -0.5
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        b, _, dim = x.shape
        q = self.q(x[:, 0]).view(b, self.heads, -1) * self.scale  # b h d
        scores = torch.einsum("bhd,hdc->bhc", q, self.k.weight.view(self.heads, -1, dim)) @ x.transpose(1, 2)  # b h n
        if self.k.bias is not None:
            scores = scores + (q * self.k.bias.view(self.heads, -1)).sum(-1, keepdim=True)
        seen = scores.softmax(-1) @ x  # b h c
        v = torch.einsum("bhc,hdc->bhd", seen, self.v.weight.view(self.heads, -1, dim)).flatten(1)
        return self.out(v if self.v.bias is None else v + self.v.bias).unsqueeze(1)


class CrossBlock(nn.Module):
    """Residual on the class token, without an MLP: x[:, :1] + attention(LN x) (eq. 5)."""

    def __init__(self, dim: int, heads: int, c: CrossViT.Config, drop_path: float):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=c.norm_eps)
        self.attention = ClassTokenAttention(dim, heads, c.qkv_bias, c.qk_scale)
        self.drop = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] + self.drop(self.attention(self.norm(x)))


class Block(nn.Module):
    """The ordinary pre-norm block: x + attention(LN x), then x + MLP(LN x)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool, eps: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attention = SelfAttention(dim, heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap(prefix=1)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x)))
        x = x + self.drop(self.mlp(self.norm2(x)))
        return self.tap(x, grid=grid)


class Projection(nn.Sequential):
    """LN, GELU, Linear: a class token on its way to the other branch's width, or back."""

    def __init__(self, dim: int, out: int, eps: float):
        super().__init__(nn.LayerNorm(dim, eps=eps), nn.GELU(), nn.Linear(dim, out))


class MultiScaleBlock(nn.Module):
    """Blocks on each branch, then both class tokens cross at once. Branch i's tokens [batch, 1 + patches, dims[i]] in and out."""

    def __init__(self, config: CrossViT.Config, depth: tuple[int, ...], rates: list[float]):
        super().__init__()
        c, others = config, range(len(config.dims))
        last = rates[-1] if rates else 0.0
        self.branches = nn.ModuleList(
            nn.ModuleList(
                Block(c.dims[i], c.heads[i], c.mlp_ratios[i], c.qkv_bias, c.norm_eps, rates[j]) for j in range(depth[i])
            ) for i in others
        )  # fmt: skip
        other = [(i + 1) % len(c.dims) for i in others]
        self.to_other = nn.ModuleList(Projection(c.dims[i], c.dims[other[i]], c.norm_eps) for i in others)
        self.cross = nn.ModuleList(
            nn.ModuleList(
                CrossBlock(c.dims[other[i]], c.heads[other[i]], c, last) for _ in range(max(1, depth[-1]))
            ) for i in others
        )  # fmt: skip
        self.back = nn.ModuleList(Projection(c.dims[other[i]], c.dims[i], c.norm_eps) for i in others)

    def forward(self, xs: list[Tensor], grids: list[tuple[int, int]]) -> list[Tensor]:
        run = []
        for x, blocks, grid in zip(xs, self.branches, grids, strict=True):
            for block in blocks:
                x = block(x, grid)
            run.append(x)
        out = []
        for i, x in enumerate(run):
            cls = self.to_other[i](x[:, :1])
            met = torch.cat([cls, run[(i + 1) % len(run)][:, 1:]], dim=1)
            for block in self.cross[i]:
                met = block(met)
            out.append(torch.cat([self.back[i](met), x[:, 1:]], dim=1))
        return out


def patch_embedding(in_channels: int, dim: int, patch: int, multi_conv: bool) -> nn.Module:
    """One convolution whose kernel is its stride, or (the dagger variants) three with ReLU between them, for patches of 12 and 16."""
    if not multi_conv:
        return nn.Conv2d(in_channels, dim, patch, patch)
    if patch not in (12, 16):
        raise BadInput("CrossViT multi_conv", expected="patch sizes 12 and 16", got=str(patch))
    first = nn.Conv2d(in_channels, dim // 4, 7, 4, 3)
    rest = [nn.Conv2d(dim // 4, dim // 2, 3, 3), nn.Conv2d(dim // 2, dim, 3, 1, 1)] if patch == 12 else [
        nn.Conv2d(dim // 4, dim // 2, 3, 2, 1), nn.Conv2d(dim // 2, dim, 3, 2, 1)
    ]  # fmt: skip
    return nn.Sequential(first, nn.ReLU(), rest[0], nn.ReLU(), rest[1])


class Branch(nn.Module):
    """An image at its own size to tokens: patches, class token, position table."""

    def __init__(self, in_channels: int, size: int, patch: int, dim: int, multi_conv: bool):
        super().__init__()
        self.size, self.grid = size, (size // patch, size // patch)
        self.embed = patch_embedding(in_channels, dim, patch, multi_conv)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + self.grid[0] * self.grid[1], dim), std=0.02))
        self.tokens = Tap(prefix=1)

    def forward(self, image: Tensor) -> Tensor:
        fits = all(isinstance(side, int) and side == self.size for side in image.shape[2:])
        if not fits:  # a graph of open size has no branch: resizing to the same size changes nothing
            image = F.interpolate(image, size=(self.size, self.size), mode="bicubic", align_corners=False)
        x = self.embed(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        return self.tokens(x, grid=self.grid)


class CrossViT(ImageClassifier):
    dynamic_size = True  # each branch resizes the image to its own size

    @dataclass(frozen=True)
    class Config:
        image_sizes: tuple[int, ...] = (240, 224)  # of the small-patch and the large-patch branch
        patch_sizes: tuple[int, ...] = (12, 16)
        dims: tuple[int, ...] = (96, 192)
        depths: tuple[tuple[int, ...], ...] = ((1, 4, 0),) * 3  # a multi-scale block each: blocks of either branch, crossings (0 is one)
        heads: tuple[int, ...] = (3, 3)
        mlp_ratios: tuple[float, ...] = (4, 4)
        multi_conv: bool = False
        qkv_bias: bool = True
        qk_scale: float | None = None  # of the crossings' logits; None: 1 / sqrt(width of a head)
        norm_eps: float = 1e-6
        in_channels: int = 3
        num_classes: int = 1000
        drop_path: float = 0.0
        dense: bool = False  # no heads: forward gives the branches' maps

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.branches = nn.ModuleList(
            Branch(c.in_channels, size, patch, dim, c.multi_conv)
            for size, patch, dim in zip(c.image_sizes, c.patch_sizes, c.dims, strict=True)
        )
        rates = torch.linspace(0, c.drop_path, sum(sum(d[-2:]) for d in c.depths), device="cpu").tolist()
        blocks, at = [], 0
        for depth in c.depths:  # as in the reference, a block's rates are counted by its deeper branch
            span = max(depth[:-1]) + depth[-1]
            blocks.append(MultiScaleBlock(c, depth, rates[at : at + span]))
            at += span
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.LayerNorm(dim, eps=c.norm_eps) for dim in c.dims)
        self.features = nn.ModuleList(Tap(prefix=1) for _ in c.dims)
        if not c.dense:
            self.heads = nn.ModuleList(nn.Linear(dim, c.num_classes) if c.num_classes else nn.Identity() for dim in c.dims)
        init_transformer(self)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] of any size to logits [batch, classes], the branches' mean (or the maps)."""
        if self.config.dense:
            return self.pyramid(image)
        return torch.stack(self.branch_logits(image)).mean(0)

    def branch_logits(self, image: Tensor) -> list[Tensor]:
        """Each branch's own logits [batch, classes]."""
        return [head(x[:, 0]) for head, x in zip(self.heads, self._run(image), strict=True)]

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Each branch's patches as a map [batch, dims[i], size / patch, size / patch]."""
        return tuple(tokens_to_map(x[:, 1:], b.grid) for x, b in zip(self._run(image), self.branches, strict=True))

    def _run(self, image: Tensor) -> list[Tensor]:
        xs = [branch(image) for branch in self.branches]
        grids = [branch.grid for branch in self.branches]
        for block in self.blocks:
            xs = block(xs, grids)
        return [tap(norm(x), grid=g) for tap, norm, x, g in zip(self.features, self.norms, xs, grids, strict=True)]

    def no_weight_decay(self) -> set[str]:
        return {"branches.*.cls_token", "branches.*.positions"}
