"""EfficientViT: Memory Efficient Vision Transformer with Cascaded Group Attention (Liu et al., CVPR 2023, arXiv 2305.07027).

A block is a "sandwich": one attention, which memory bounds, between two feed-forward networks and two depthwise convolutions, which
arithmetic bounds. Each
head of the attention gets its own slice of the channels, and adds what the head before it found (the cascade, eq. 2-4). Attention runs in
windows of 7 x 7 tokens at strides 16, 32, 64. Every convolution carries a BatchNorm that inference folds away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses
from formarium.nn.convs import ConvBN, fuse
from formarium.nn.windows import from_groups, to_groups
from formarium.tasks.image_classification.model import ImageClassifier


class CascadedGroupAttention(nn.Module):
    """x: float [windows, side^2, dim], tokens of square windows. Returns the same shape (before the residual).

    Head i sees its own chunk of the channels plus head i-1's output. Queries pass a depthwise convolution over the window. The bias of
    a pair of tokens is learned by absolute offset (|dy|, |dx|).
    """

    def __init__(self, dim: int, key_dim: int, heads: int, side: int, kernels: tuple[int, ...]):
        super().__init__()
        width = int(dim / (key_dim * heads) * key_dim)
        self.key_dim, self.side = key_dim, side
        self.qkv = nn.ModuleList(ConvBN(dim // heads, 2 * key_dim + width) for _ in range(heads))
        self.local = nn.ModuleList(ConvBN(key_dim, key_dim, kernels[i], groups=key_dim) for i in range(heads))
        self.out = ConvBN(width * heads, dim, gain=0.0)
        self.biases = nn.Parameter(torch.zeros(heads, side * side))
        place = torch.arange(side)
        y, x = (t.reshape(-1) for t in torch.meshgrid(place, place, indexing="ij"))
        index = (y[:, None] - y[None]).abs() * side + (x[:, None] - x[None]).abs()
        self.register_buffer("index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (
            self.out(F.relu(torch.cat(self.heads(x), dim=-1)).unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2))
            .permute(0, 2, 3, 1)
            .flatten(1, 2)
        )

    def heads(self, x: Tensor) -> list[Tensor]:
        """Each head's output [windows, side^2, width], in the order of the cascade."""
        bias = self.biases[:, self.index]  # h n n
        out: list[Tensor] = []
        for i, chunk in enumerate(x.chunk(len(self.qkv), dim=-1)):
            fed = chunk if i == 0 else chunk + out[-1]
            qkv = self.qkv[i](fed.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2))
            q = self.local[i](qkv[:, : self.key_dim]).permute(0, 2, 3, 1).flatten(1, 2)
            k, v = qkv[:, self.key_dim :].permute(0, 2, 3, 1).flatten(1, 2).split([self.key_dim, qkv.shape[1] - 2 * self.key_dim], dim=-1)
            scores = torch.baddbmm(bias[i], q, k.transpose(1, 2), alpha=self.key_dim**-0.5)
            out.append(scores.softmax(-1) @ v)
        return out


class WindowAttention(nn.Module):
    """Cascaded group attention inside windows of a map [batch, dim, h, w], plus the map itself.

    Maps that windows don't fill are padded at the bottom and right with zeros, which take part in the softmax, as released.
    """

    def __init__(self, dim: int, key_dim: int, heads: int, side: int, kernels: tuple[int, ...]):
        super().__init__()
        self.attention = CascadedGroupAttention(dim, key_dim, heads, side, kernels)

    def forward(self, x: Tensor) -> Tensor:
        side, (h, w) = self.attention.side, x.shape[2:]
        grid = x.permute(0, 2, 3, 1)
        if (h, w) == (side, side):
            seen = self.attention(grid.flatten(1, 2)).unflatten(1, (side, side))
        else:
            padded = F.pad(grid, (0, 0, 0, -w % side, 0, -h % side))
            seen = from_groups(self.attention(to_groups(padded, side)), side, padded.shape[1], padded.shape[2])[:, :h, :w]
        return x + seen.permute(0, 3, 1, 2)


class FFN(nn.Module):
    """x + ConvBN(ReLU(ConvBN(x))), 1x1 convolutions to twice the width and back."""

    def __init__(self, dim: int):
        super().__init__()
        self.widen = ConvBN(dim, 2 * dim)
        self.narrow = ConvBN(2 * dim, dim, gain=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.relu(self.widen(x)))


class Local(nn.Sequential):
    """A residual depthwise 3x3 convolution, then an FFN."""

    def __init__(self, dim: int):
        super().__init__(ConvBN(dim, dim, 3, groups=dim, residual=True, gain=0.0), FFN(dim))


class Block(nn.Module):
    """The sandwich: local, FFN, attention, local, FFN. x: float [batch, dim, h, w]."""

    def __init__(self, dim: int, key_dim: int, heads: int, side: int, kernels: tuple[int, ...]):
        super().__init__()
        self.before = Local(dim)
        self.mixer = WindowAttention(dim, key_dim, heads, side, kernels)
        self.after = Local(dim)
        self.tap = Tap("map")

    def forward(self, x: Tensor) -> Tensor:
        return self.tap(self.after(self.mixer(self.before(x))))


class Down(nn.Module):
    """To half the resolution: local at the old width, an inverted bottleneck with squeeze-excite, local at the new width."""

    def __init__(self, dim: int, out: int):
        super().__init__()
        self.before = Local(dim)
        self.widen = ConvBN(dim, 4 * dim)
        self.stride = ConvBN(4 * dim, 4 * dim, 3, 2, groups=4 * dim)
        self.squeeze, self.excite = nn.Conv2d(4 * dim, dim, 1), nn.Conv2d(dim, 4 * dim, 1)
        self.narrow = ConvBN(4 * dim, out)
        self.after = Local(out)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stride(F.relu(self.widen(self.before(x)))))
        gate = self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.after(self.narrow(x * gate))


class Stage(nn.Module):
    """Down-sampling where given, then blocks. A map in, a map out."""

    def __init__(self, down: Down | None, blocks: list[Block]):
        super().__init__()
        self.down = down
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        if self.down is not None:
            x = self.down(x)
        for block in self.blocks:
            x = block(x)
        return x


class Head(nn.Sequential):
    """BatchNorm, Linear."""

    def __init__(self, dim: int, classes: int):
        super().__init__(nn.BatchNorm1d(dim), nn.Linear(dim, classes))
        nn.init.trunc_normal_(self[1].weight, std=0.02)
        nn.init.zeros_(self[1].bias)


class Distilled(NamedTuple):
    """Training outputs with a distillation head, float [batch, classes] each: the classifier's and the distilled one's."""

    logits: Tensor
    distilled: Tensor


class EfficientViT(ImageClassifier):
    @dataclass(frozen=True)
    class Config:
        dims: tuple[int, ...] = (64, 128, 192)
        depths: tuple[int, ...] = (1, 2, 3)
        heads: tuple[int, ...] = (4, 4, 4)
        key_dims: tuple[int, ...] = (16, 16, 16)
        windows: tuple[int, ...] = (7, 7, 7)
        kernels: tuple[int, ...] = (5, 5, 5, 5)  # of the query's convolution, by head
        stem_convs: int = 4  # strided convolutions: the stride is 2^stem_convs
        image_size: int = 224  # a window is no larger than a stage's map at this size
        in_channels: int = 3
        num_classes: int = 1000
        dense: bool = False  # no head; windows keep their full size whatever the map's
        distillation: bool = False  # a second head that learns from a teacher
        distillation_type: str = "hard"  # or "soft"
        distillation_alpha: float = 0.5
        distillation_tau: float = 1.0

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        widths = [c.in_channels, *(c.dims[0] // 2 ** (c.stem_convs - 1 - i) for i in range(c.stem_convs))]
        convs = [ConvBN(widths[i], widths[i + 1], 3, 2) for i in range(c.stem_convs)]
        self.stem = nn.ModuleList(convs)
        self.tokens = Tap("map")
        side, stages = c.image_size // 2**c.stem_convs, []
        for i, dim in enumerate(c.dims):
            if i:
                side = (side - 1) // 2 + 1
            window = c.windows[i] if c.dense else min(c.windows[i], side)
            blocks = [Block(dim, c.key_dims[i], c.heads[i], window, c.kernels) for _ in range(c.depths[i])]
            stages.append(Stage(Down(c.dims[i - 1], dim) if i else None, blocks))
        self.stages = nn.ModuleList(stages)
        if not c.dense:
            self.features = Tap("map")
            self.head = Head(c.dims[-1], c.num_classes)
            if c.distillation:
                self.distilled_head = Head(c.dims[-1], c.num_classes)

    def forward(self, image: Tensor) -> Tensor | Distilled | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] (or the pyramid, where dense).

        With a distillation head: both heads' logits in training, their mean in evaluation.
        """
        if self.config.dense:
            return self.pyramid(image)
        x = self.features(self._run(image)[-1]).mean((2, 3))
        if not self.config.distillation:
            return self.head(x)
        both = Distilled(self.head(x), self.distilled_head(x))
        return both if self.training else (both.logits + both.distilled) / 2

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """Maps [batch, dims[i], h, w] at strides 16, 32, 64."""
        return tuple(self._run(image))

    def _run(self, image: Tensor) -> list[Tensor]:
        x = image.contiguous(memory_format=torch.channels_last)
        for i, conv in enumerate(self.stem):
            x = conv(x if i == 0 else F.relu(x))
        x, out = self.tokens(x), []
        for stage in self.stages:
            x = stage(x)
            out.append(x)
        return out

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy; with a distillation head (1 - alpha) of it plus alpha times the distance to batch["teacher_logits"] [batch,
        classes]: cross entropy with the teacher's choice (hard), or KL divergence at temperature tau (soft), as in DeiT."""
        out = self.forward_batch(batch)
        if not isinstance(out, Distilled):
            return self.classification_loss(out, batch)
        c = self.config
        if "teacher_logits" not in batch:
            raise BadInput(
                "batch", expected='"teacher_logits" for the distillation head', got="none", fix="or create it with distillation=False"
            )
        base, teacher = self.classification_loss(out.logits, batch).total, batch["teacher_logits"]
        if c.distillation_type == "soft":
            own, theirs = (F.log_softmax(x.float() / c.distillation_tau, dim=1) for x in (out.distilled, teacher))
            distance = F.kl_div(own, theirs, reduction="sum", log_target=True) * c.distillation_tau**2 / own.numel()
        else:
            distance = F.cross_entropy(out.distilled.float(), teacher.argmax(1))
        total = (1 - c.distillation_alpha) * base + c.distillation_alpha * distance
        return Losses(total, {"cross_entropy": base, "distillation": distance})

    def fuse(self) -> nn.Module:
        """A copy for inference with every BatchNorm of a convolution folded into it: the same function, fewer parameters."""
        return fuse(self)

    def no_weight_decay(self) -> set[str]:
        return {"*.biases"}

    def check_size(self, height: int, width: int) -> None:
        least = 2 ** (self.config.stem_convs - 1)
        if min(height, width) < least:
            raise BadInput("image size", expected=f"at least {least}x{least}", got=f"{height}x{width}", fix="resize the image")
