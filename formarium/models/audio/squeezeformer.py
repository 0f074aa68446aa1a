"""Squeezeformer (Kim et al., NeurIPS 2022, arXiv 2206.00888): speech to characters by CTC.

A convolution brings log-mel frames (10 ms) to 40 ms, and blocks of attention and convolution follow, each part with one feed-forward
after it ("MF" and "CF": no macaron pair) and LayerNorms behind the residuals instead of before, where a learned scale stays. In a
temporal U-Net the middle blocks run at 80 ms, since neighbouring frames have grown alike; a skip brings the lost detail back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.drop import Dropout
from formarium.nn.kept import kept
from formarium.nn.maps import Pointwise
from formarium.nn.mlp import activated, between
from formarium.nn.time_convs import depthwise_over_time
from formarium.tasks.speech_recognition.model import SpeechRecogniser

EPS = 1e-3  # of every norm
SLAB = 1 << 20  # values of the widest map that inference works on at a time: memory just used is still at hand
NOWHERE = -1e10  # added to the logits of what is not attended to; a row of it alone gives equal weights


class Scale(nn.Module):
    """A learned scale and shift of each channel: what is left of the LayerNorm before a module. x: float [..., dim]."""

    def __init__(self, dim: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, x, self.weight)


def front(c: Squeezeformer.Config) -> nn.Module:
    return Scale(c.dim) if c.adaptive_scale else nn.LayerNorm(c.dim, eps=EPS)


@kept(16)
def relative_table(frames: int, dim: int, device: torch.device) -> Tensor:
    """Sinusoids of the offsets frames-1 ... -(frames-1), float32 [2 frames - 1, dim], sine and cosine in turn."""
    offset = torch.arange(frames - 1, -frames, -1, dtype=torch.float32, device=device)[:, None]
    rate = torch.exp(torch.arange(0, dim, 2, dtype=torch.float32, device=device) * -(math.log(10000.0) / dim))
    return torch.stack([(offset * rate).sin(), (offset * rate).cos()], -1).flatten(1)[:, :dim]


def relative_shift(x: Tensor) -> Tensor:
    """Scores by offset [b, heads, t, 2t - 1] to scores by key [b, heads, t, t]: row i reads the offsets i, i - 1, ..., i - t + 1."""
    t, n = x.shape[2:]
    return x.flatten(2)[..., t - 1 : t - 1 + t * (n - 1)].unflatten(2, (t, n - 1))[..., :t]  # each row begins one earlier than the last


@dataclass(frozen=True)
class Frames:
    """What the blocks at one frame rate need to know of their t frames.

    keep: bool [b, t], the frames that are speech; spoken: the same as float32 [b, t, 1]. hidden: float32 [b, 1, t, t], what is added to
    attention's logits: NOWHERE where query or key isn't speech. positions: float32 [2 t - 1, dim], of the relative table.
    """

    keep: Tensor
    spoken: Tensor
    hidden: Tensor
    positions: Tensor

    @staticmethod
    def of(keep: Tensor, dim: int) -> Frames:
        both = keep[:, None, :, None] & keep[:, None, None, :]
        return Frames(keep, keep[..., None].float(), (~both).float() * NOWHERE, relative_table(keep.shape[1], dim, keep.device))

    def speech(self, x: Tensor) -> Tensor:
        """x [b, t, dim], zero where it isn't speech."""
        return x * self.spoken.to(x.dtype)


class Attention(nn.Module):
    """x + softmax((q + u) k^T + shifted (q + v) p^T / sqrt(d)) v, positions p as in Transformer-XL (Dai et al. 2019).

    x: float [b, t, dim]. Frames that aren't speech see all frames alike.
    """

    def __init__(self, c: Squeezeformer.Config):
        super().__init__()
        self.heads, width = c.heads, c.dim // c.heads
        self.front = front(c)
        self.qkv = nn.Linear(c.dim, 3 * c.dim)
        self.position = nn.Linear(c.dim, c.dim, bias=False)
        self.u, self.v = nn.Parameter(torch.zeros(c.heads, width)), nn.Parameter(torch.zeros(c.heads, width))
        self.out = nn.Linear(c.dim, c.dim)
        self.drop = Dropout(c.dropout)
        bound = c.dim**-0.5
        _uniform(bound, self.qkv.weight, self.qkv.bias, self.position.weight, self.out.weight, self.out.bias)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        q, k, v = split_heads(self.qkv(self.front(x)), self.heads, 3)
        (p,) = split_heads(self.position(frames.positions)[None], self.heads)  # 1 heads 2t-1 width
        scale = q.shape[-1] ** -0.5
        by_offset = ((q + self.v[:, None]) * scale) @ p.transpose(-1, -2)
        hidden = frames.hidden if q.dtype is not torch.float16 else frames.hidden.clamp_min(torch.finfo(q.dtype).min)
        bias = relative_shift(by_offset) + hidden
        out = F.scaled_dot_product_attention(q + self.u[:, None].to(q.dtype), k, v, attn_mask=bias.to(q.dtype))
        return x + self.drop(self.out(merge_heads(out)))


class FeedForward(nn.Module):
    """x + factor * W2 swish(W1 x), four times as wide inside; the factor is 1 (0.5 in a Conformer). x: float [b, t, dim]."""

    def __init__(self, c: Squeezeformer.Config):
        super().__init__()
        self.factor = c.ff_factor
        self.front = front(c)
        self.expand, self.contract = nn.Linear(c.dim, 4 * c.dim), nn.Linear(4 * c.dim, c.dim)
        self.drop = Dropout(c.dropout)
        _uniform(c.dim**-0.5, self.expand.weight, self.expand.bias)
        _uniform((4 * c.dim) ** -0.5, self.contract.weight, self.contract.bias)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        scaled = self.front(x)
        if self.training and self.drop.p > 0:
            out = self.drop(self.contract(self.drop(F.silu(self.expand(scaled)))))
        else:
            out = between(scaled, self.expand, self.contract, "silu")
        return torch.add(x, out, alpha=self.factor)


class Convolution(nn.Module):
    """x + W2 swish(BN(depthwise(swish(W1 x)))): twice as wide inside, since swish, unlike a gated linear unit, keeps the width.

    x: float [b, t, dim]. Frames that aren't speech are zero for the convolution over time.
    """

    def __init__(self, c: Squeezeformer.Config):
        super().__init__()
        self.glu = c.glu
        width = c.dim if c.glu else 2 * c.dim
        self.front = front(c)
        self.expand = nn.Linear(c.dim, 2 * c.dim)
        self.depthwise = nn.Conv1d(width, width, c.kernel, groups=width)
        self.norm = nn.BatchNorm1d(width, eps=EPS, momentum=0.015)
        self.contract = nn.Linear(width, c.dim)
        self.drop = Dropout(c.dropout)
        _uniform(c.dim**-0.5, self.expand.weight, self.expand.bias, self.contract.weight, self.contract.bias)
        _uniform(c.kernel**-0.5, self.depthwise.weight, self.depthwise.bias)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        h = F.glu(self.expand(self.front(x))) if self.glu else activated(self.front(x), self.expand, "silu")
        h = frames.speech(h)
        h = depthwise_over_time(h, self.depthwise.weight, self.depthwise.bias)
        h = F.silu(self.norm(h.flatten(0, 1)))  # over all frames of the batch, as rows
        return x + self.drop(self.contract(h).view_as(x))


class WithFeedForward(nn.Module):
    """A module (attention or convolution), LayerNorm, a feed-forward, LayerNorm."""

    def __init__(self, first: nn.Module, c: Squeezeformer.Config):
        super().__init__()
        self.first, self.middle = first, nn.LayerNorm(c.dim, eps=EPS)
        self.feed_forward, self.norm = FeedForward(c), nn.LayerNorm(c.dim, eps=EPS)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        x = self.middle(self.first(x, frames))
        return self.norm(self.feed_forward(x, frames))


PARTS: dict[str, Any] = {
    "m": Attention,
    "f": FeedForward,
    "c": Convolution,
    "M": lambda c: WithFeedForward(Attention(c), c),
    "C": lambda c: WithFeedForward(Convolution(c), c),
}


class Block(nn.Module):
    """Modules in the order that `layout` spells: "MsCs" in a Squeezeformer, "fmcf" in a Conformer; s stands for nothing."""

    def __init__(self, c: Squeezeformer.Config, layout: str):
        super().__init__()
        self.layout = layout
        self.parts = nn.ModuleDict({str(i): PARTS[letter](c) for i, letter in enumerate(layout) if letter != "s"})
        self.norm = nn.LayerNorm(c.dim, eps=EPS) if c.block_norm else nn.Identity()
        self.tap = Tap()

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        for part in self.parts.values():
            x = part(x, frames)
        return self.tap(self.norm(x))


class Subsampling(nn.Module):
    """Log-mel frames [b, t, mels] to a quarter of them: float [b, t // 2 // 2, dim], by two convolutions of stride 2.

    Both are padded at the end only, so that output i begins at input 4 i. The second is depthwise separable in a Squeezeformer.
    """

    def __init__(self, c: Squeezeformer.Config):
        super().__init__()
        filters = c.filters or c.dim
        self.exact, self.separable = c.exact_padding, c.separable
        self.first = nn.Conv2d(1, filters, 3, 2)
        _uniform(1 / 3, self.first.weight, self.first.bias)
        if c.separable:
            self.depthwise, self.pointwise = nn.Conv2d(filters, filters, 3, 2, 2, groups=filters), Pointwise(filters, filters)
            _uniform(1 / 3, self.depthwise.weight, self.depthwise.bias)
            _uniform(filters**-0.5, self.pointwise.weight, self.pointwise.bias)
        else:
            self.second = nn.Conv2d(filters, filters, 3, 2, 2)
            _uniform((9 * filters) ** -0.5, self.second.weight, self.second.bias)
        self.project = nn.Linear(filters * (c.mels // 2 // 2), c.dim)
        _uniform(5120**-0.5, self.project.weight, self.project.bias)

    def forward(self, features: Tensor, length: Tensor) -> Tensor:
        if self.exact:
            features = features * inside(length, features.shape[1])[..., None]
        b, t, mels = features.shape
        rows = slab = t // 2 // 2
        if not (torch.is_grad_enabled() or torch.compiler.is_compiling()):
            slab = max(1, SLAB // (b * mels * self.first.out_channels))
        features = F.pad(features, (0, 1, 0, 1))
        maps = [self.maps(features, length, a, min(a + slab, rows)) for a in range(0, rows, slab)]
        return self.project((maps[0] if len(maps) == 1 else torch.cat(maps, 1)).flatten(2))

    def maps(self, features: Tensor, length: Tensor, first: int, last: int) -> Tensor:
        """Rows first to last - 1 of what is projected: float [b, last - first, mels // 4, filters], of all features, padded by one."""
        x = features[:, 4 * first : 4 * last + 3, :, None].permute(0, 3, 1, 2)  # b 1 t mels, and channels last from here on
        x = F.relu_(self.first(x))
        if self.exact:
            x = x * inside(length // 2 - 2 * first, x.shape[2])[:, None, :, None]
        mels = x.shape[3] // 2
        x = self.depthwise(x) if self.separable else self.second(x)  # padded by two on every side; wanted is one at the end
        x = x.permute(0, 2, 3, 1)[:, 1 : 1 + last - first, 1 : 1 + mels].contiguous()
        return F.relu_(self.pointwise(x) if self.separable else x)


class TimeReduction(nn.Module):
    """Half the frames: depthwise convolution, kernel 5, stride 2, padded at the end, then a pointwise one.

    x: float [b, t, dim] -> [b, ceil(t / 2), dim]; of an odd number of frames the last becomes zero, as released.
    """

    def __init__(self, c: Squeezeformer.Config):
        super().__init__()
        self.exact = c.exact_padding
        self.depthwise, self.pointwise = nn.Conv1d(c.dim, c.dim, 5, 2, groups=c.dim), nn.Linear(c.dim, c.dim)
        _uniform(5**-0.5, self.depthwise.weight, self.depthwise.bias)
        _uniform(c.dim**-0.5, self.pointwise.weight, self.pointwise.bias)

    def forward(self, x: Tensor, frames: Frames) -> Tensor:
        before = x.shape[1]
        x = F.pad(frames.speech(x).transpose(1, 2), (0, 3))
        x = self.pointwise(self.depthwise(x).transpose(1, 2))
        if self.exact:  # the last of an odd number of frames is zero in a longer batch, too
            x = x * inside(frames.keep.sum(1) // 2, x.shape[1])[..., None]
        return F.pad(x, (0, 0, 0, (before + 1) // 2 - before // 2))


def inside(length: Tensor, frames: int) -> Tensor:
    """bool [b, frames]: which frames lie within each length."""
    return torch.arange(frames, device=length.device) < length[:, None]


class Squeezeformer(SpeechRecogniser):
    @dataclass(frozen=True)
    class Config:
        dim: int = 144
        blocks: int = 16
        heads: int = 4
        kernel: int = 31  # of the convolution over time
        layout: str | tuple[str, ...] = "MsCs"  # of all blocks, or block by block
        reduce_at: tuple[int, ...] = (7,)  # blocks before which the frames are halved
        recover_at: tuple[int, ...] = (15,)  # and before which they are brought back; () leaves them halved
        filters: int = 0  # channels of the first convolutions; 0: dim
        ff_factor: float = 1.0
        glu: bool = False
        separable: bool = True
        adaptive_scale: bool = True  # else a LayerNorm before every module
        block_norm: bool = False  # a LayerNorm behind every block, beside those of "M" and "C"
        dropout: float = 0.1
        mels: int = 80
        exact_padding: bool = False  # an utterance's output doesn't depend on how far its batch is padded (released weights: it does)
        vocabulary_size: int = 128
        vocabulary: tuple[str, ...] = ()
        beam: int = 1  # prefixes of the beam search in predict; 1: greedy

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        layouts = (c.layout,) * c.blocks if isinstance(c.layout, str) else c.layout
        check_config(c, layouts)
        self.subsampling = Subsampling(c)
        self.tokens = Tap()
        self.drop = Dropout(c.dropout)
        self.norm = nn.LayerNorm(c.dim, eps=EPS)
        self.blocks = nn.ModuleList(Block(c, layout) for layout in layouts)
        self.reductions = nn.ModuleList(TimeReduction(c) for _ in c.reduce_at)
        self.recoveries = nn.ModuleList(nn.Linear(c.dim, c.dim) for _ in c.recover_at)
        self.features = Tap()
        self.head = nn.Linear(c.dim, c.vocabulary_size)
        for recovery in self.recoveries:
            nn.init.xavier_uniform_(recovery.weight)
            nn.init.zeros_(recovery.bias)
        nn.init.xavier_uniform_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor, length: Tensor) -> Tensor:
        """Log-mel features [b, t, mels] and how many of the frames count, int64 [b], to logits [b, t // 2 // 2, vocabulary]."""
        return self.head(self.encode(features, length))

    def encode(self, features: Tensor, length: Tensor) -> Tensor:
        """The same, to encoded frames of 40 ms, float [b, t // 2 // 2, dim]."""
        c = self.config
        x = self.tokens(self.subsampling(features, length))
        frames = Frames.of(inside(self._attended(length), x.shape[1]), c.dim)
        x = self.norm(self.drop(x * c.dim**0.5))
        before: list[tuple[Tensor, Frames]] = []
        depth = 0
        for i, block in enumerate(self.blocks):
            if i in c.reduce_at:
                before[depth:] = [(x, frames)]
                x = self.reductions[depth](x, frames)
                frames = Frames.of(frames.keep[:, ::2], c.dim)
                depth += 1
            if i in c.recover_at:
                depth -= 1
                skip, frames = before[depth]
                x = x.repeat_interleave(2, 1)[:, : skip.shape[1]]
                x = skip + self.recoveries[depth](x)
            x = block(x, frames)
        return self.features(x)

    def _attended(self, length: Tensor) -> Tensor:
        """Frames after subsampling that attention and convolutions take for speech."""
        if self.config.exact_padding:
            return length // 2 // 2
        return (length // 2 + 1) // 2 + 1  # up to two frames of padding, as released

    def output_length(self, length: Tensor, frames: int) -> Tensor:
        """How many of the output's frames stand for an utterance of `length` features in a batch of `frames`."""
        stride = 2 ** (len(self.config.reduce_at) - len(self.config.recover_at))
        most = frames // 2 // 2
        kept = length // 2 // 2 if self.config.exact_padding else torch.clamp((length + 3) // 4, max=most)
        return (kept + stride - 1) // stride

    @property
    def shortest(self) -> int:
        """The fewest feature frames it takes: two at its coarsest rate."""
        return 8 * 2 ** len(self.config.reduce_at)

    def no_weight_decay(self) -> set[str]:
        return {"*.u", "*.v", "*norm*", "*.middle.*"}


def _uniform(bound: float, *tensors: Tensor) -> None:
    for t in tensors:
        nn.init.uniform_(t, -bound, bound)


def check_config(c: Squeezeformer.Config, layouts: tuple[str, ...]) -> None:
    if c.dim % c.heads:
        raise BadInput("dim", expected=f"a multiple of heads = {c.heads}", got=str(c.dim))
    if len(layouts) != c.blocks or any(letter not in "fmcMCs" for layout in layouts for letter in layout):
        raise BadInput("layout", expected=f"{c.blocks} words of the letters f m c M C s", got=f"{layouts}")
    if c.recover_at and len(c.recover_at) != len(c.reduce_at):
        raise BadInput("recover_at", expected=f"as many blocks as reduce_at ({len(c.reduce_at)}), or none", got=f"{len(c.recover_at)}")
