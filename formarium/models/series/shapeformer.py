"""ShapeFormer (Le et al., KDD 2024, arXiv 2405.14608): a transformer over shapelets for multivariate time series classification.

Shapelets, pieces of training series that tell one class from the rest, are found before training (tasks/.../shapelets.py). Each one then
looks for its best match in a series, near to where it came from, and the difference between the two becomes a token:

    token_i = Linear_i(match) - Linear'_i(shapelet_i)          (eq. 10-11)

One branch attends among these class-specific tokens, another among convolutional tokens of the whole series; a linear layer reads
both. The shapelets and their weights are trained with the network. Key names and numbers follow github.com/xuanmay2701/shapeformer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.drop import Dropout
from formarium.tasks.time_series_classification.model import Match, SeriesClassifier
from formarium.tasks.time_series_classification.shapelets import discover

Span = tuple[int, int, int, int]  # start, end, channel, class


class NormedAttention(nn.Module):
    """Attention without biases, at the scale dim^-1/2 (of all heads together), with a LayerNorm in place of the output projection."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        return self.norm(merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))


class Block(nn.Module):
    """x + attention, times `weight`, LayerNorm, + feed-forward, LayerNorm, times `weight`. x: [batch, tokens, dim]; weight: [tokens, 1] or
    nothing. `asked` is what is attended from and to, where that isn't x (with positions added)."""

    def __init__(self, dim: int, hidden: int, heads: int, dropout: float):
        super().__init__()
        self.attention = NormedAttention(dim, heads)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.drop = Dropout(dropout)
        self.tap = Tap()

    def forward(self, x: Tensor, asked: Tensor | None = None, weight: Tensor | None = None) -> Tensor:
        x = x + self.attention(x if asked is None else asked)
        x = self.norm1(x if weight is None else x * weight)
        x = self.norm2(x + self.drop(self.fc2(self.drop(F.relu(self.fc1(x))))))
        return self.tap(x if weight is None else x * weight)


class ConvTokens(nn.Module):
    """The generic branch's tokens: a convolution along time, one across all channels. [batch, channels, length] -> [batch, length, dim]."""

    def __init__(self, channels: int, dim: int, kernel: int):
        super().__init__()
        self.pad = ((kernel - 1) // 2, kernel // 2)  # an even kernel has one more on the right
        self.time, self.time_norm = nn.Conv2d(1, dim, (1, kernel)), nn.BatchNorm2d(dim)
        self.across, self.across_norm = nn.Conv2d(dim, dim, (channels, 1)), nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.time_norm(self.time(F.pad(x, self.pad).unsqueeze(1))))  # b d c t
        return F.gelu(self.across_norm(self.across(x))).squeeze(2).transpose(1, 2)


class ShapeletFilter(nn.Module):
    """The difference of each shapelet and its best match in a series: [batch, channels, length] -> [batch, shapelets, dim].

    All shapelets and their layers lie in one tensor each, one behind the other, as they are of different lengths.
    complexity: of each shapelet as it was found; it isn't trained.
    """

    complexity: Tensor

    def __init__(self, spans: tuple[Span, ...], length: int, dim: int, search: int, most_complex: float):
        super().__init__()
        start, end, channel, _ = np.array(spans).T
        self.sizes, self.longest, self.most_complex = (end - start).tolist(), int((end - start).max()), most_complex
        first, last = np.maximum(start - search, 0), np.minimum(end + search, length)
        self.values = nn.Parameter(torch.randn(sum(self.sizes)))
        bounds = torch.cat([torch.full((n,), n**-0.5) for n in self.sizes])
        for name in ("match", "own"):
            self.register_parameter(f"{name}_weight", nn.Parameter((2 * torch.rand(len(bounds), dim) - 1) * bounds[:, None]))
            of_each = torch.tensor([n**-0.5 for n in self.sizes])[:, None]
            self.register_parameter(f"{name}_bias", nn.Parameter((2 * torch.rand(len(spans), dim) - 1) * of_each))
        self.register_buffer("complexity", torch.ones(len(spans)))
        # tables: where each shapelet's values lie, and the stretch of the series that it searches
        at = np.arange(self.longest)
        inside = at < (end - start)[:, None]  # n l
        offset = np.cumsum([0, *self.sizes[:-1]])
        self._table("place", np.where(inside, offset[:, None] + at, sum(self.sizes)))  # n l: the padding lies behind the values
        self._table("inside", inside)
        positions = (last - first) - (end - start) + 1
        reach = int(positions.max()) + self.longest - 1
        self._table("stretch", np.minimum(first[:, None] + np.arange(reach), length - 1))  # n r
        self._table("beyond", np.arange(int(positions.max())) >= positions[:, None])  # n p
        self._table("channel", channel)
        self._table("first", first)

    def _table(self, name: str, value: np.ndarray) -> None:
        self.register_buffer(name, torch.from_numpy(value.copy()), persistent=False)

    def set_values(self, values: list[Any]) -> None:
        """Take shapelets as they were found, each [its length]."""
        pieces = [torch.as_tensor(np.asarray(v), dtype=torch.float32) for v in values]
        with torch.no_grad():
            self.values.copy_(torch.cat(pieces))
            self.complexity.copy_(torch.stack([(p[1:] - p[:-1]).square().sum().sqrt() + 0.001 for p in pieces]))

    def padded(self, flat: Tensor) -> Tensor:
        """Flat values [all points, ...] as [shapelets, longest, ...], zeros behind a shapelet's own."""
        return torch.cat([flat, flat.new_zeros(1, *flat.shape[1:])])[self.place]

    def search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Where each shapelet fits best, as an offset into its stretch, int64 [batch, shapelets], and the distance there. No gradient:
        the mean squared difference times how many times more complex one is than the other, at most `most_complex` times."""
        with torch.no_grad():
            values = self.padded(self.values).float()  # n l
            count = self.inside.sum(1)[:, None]  # n 1
            centre = (values.sum(1, keepdim=True) / count) * self.inside
            stretch = x.float()[:, self.channel[:, None], self.stretch] - centre[:, :1]  # b n r
            shape = ((values - centre) * self.inside)[:, None]  # n 1 l
            mask = self.inside[:, None].to(shape.dtype)
            n = len(shape)
            # |w - s|^2 = |w|^2 - 2 w s + |s|^2 over all places at once, around the shapelet's own mean, where the numbers are small
            squared = F.conv1d(stretch.square(), mask, groups=n) - 2 * F.conv1d(stretch, shape, groups=n) + shape.square().sum(2)
            steps = (stretch[..., 1:] - stretch[..., :-1]).square()
            rough = F.conv1d(F.pad(steps, (0, 1)), F.pad(mask[..., 1:], (0, 1)), groups=n) + 0.001  # b n p
            own = self.complexity[:, None].to(rough.dtype)
            ratio = (torch.maximum(rough, own) / torch.minimum(rough, own)).clamp_max(self.most_complex)
            distance = (squared.clamp_min(0) * ratio / count).masked_fill(self.beyond, torch.inf)
            best = distance.min(2)
        return best.indices, best.values

    def forward(self, x: Tensor) -> Tensor:
        at = self.search(x)[0]  # b n
        points = (self.first + at).unsqueeze(2) + torch.arange(self.longest, device=x.device)  # b n l
        match = x[:, self.channel].gather(2, points.clamp_max(x.shape[2] - 1)) * self.inside
        tokens = torch.einsum("bnl,nld->bnd", match, self.padded(self.match_weight)) + self.match_bias
        own = torch.einsum("nl,nld->nd", self.padded(self.values), self.padded(self.own_weight)) + self.own_bias
        return tokens - own


class ShapeFormer(SeriesClassifier):
    channel_axes = (1,)

    @dataclass(frozen=True)
    class Config:
        channels: int = 6
        length: int = 100
        num_classes: int = 4
        shapelets: tuple[Span, ...] = ()  # start, end, channel, class of each; () lays `per_class` of them out evenly
        per_class: int = 10
        window: int = 100  # discovery: how far from its place a candidate is looked for
        points: float = 0.2  # discovery: the share of a series' points that are important
        released_gain: bool = False  # discovery: rate candidates as the released code does, not as the paper does
        search: int = 50  # the network: how far from its place a shapelet is looked for
        most_complex: float = 3.0
        dim: int = 128
        generic_dim: int = 48
        hidden: int = 256
        heads: int = 4
        kernel: int = 8
        dropout: float = 0.4
        read: int = 0  # the shapelet whose token is classified: the first, as released
        read_best: bool = False  # discovery sets `read` to the shapelet of greatest gain, as the paper has it
        standardise: bool = False  # channels to mean 0 and deviation 1, as measured by discovery
        studied: bool = False  # whether `shapelets` were found in data
        patch: int = 64  # of the released code's unused layers
        patch_dim: int = 48  # of the released code's unused layers

    def __init__(self, config: Config):
        super().__init__(config)
        if config.length < 5:
            raise BadInput("series", expected="at least 5 points", got=str(config.length))
        self._build()

    def _build(self) -> None:
        c, self.spans = self.config, self.config.shapelets or laid_out(self.config)
        start, end, channel, _ = np.array(self.spans).T
        self.conv = ConvTokens(c.channels, c.generic_dim, c.kernel)
        self.positions = nn.Parameter(torch.empty(c.length, c.generic_dim).uniform_(-0.02, 0.02))
        self.generic_tokens = Tap()
        self.filter = ShapeletFilter(self.spans, c.length, c.dim, c.search, c.most_complex)
        for name, place in (("channel", channel), ("start", start), ("end", end)):
            self.add_module(f"{name}_position", nn.Linear(int(place.max()) + 1, c.dim))
            self.register_buffer(f"{name}_place", torch.from_numpy(place.copy()), persistent=False)
        self.weights = nn.Parameter(torch.ones(len(self.spans)))
        self.shapelet_tokens = Tap()
        generic = Block(c.generic_dim, c.hidden, c.heads, c.dropout)
        self.blocks = nn.ModuleDict({"generic": generic, "shapelets": Block(c.dim, c.hidden, c.heads, c.dropout)})
        self.drop = Dropout(c.dropout)
        self.features = Tap()
        self.head = nn.Linear(c.dim + c.generic_dim, c.num_classes)
        # the released weights hold layers that nothing reads
        patches = math.ceil(c.length / c.patch)
        self.unused = nn.ModuleDict(
            {
                "patch": nn.Linear(c.patch, c.generic_dim),
                "patch_position": nn.Linear(c.channels + patches, c.patch_dim),
                "head": nn.Linear(c.dim, c.num_classes),
                "merge": nn.Linear(c.generic_dim, c.generic_dim // 2),
            }
        )

    # discovery --------------------------------------------------------------------------------------------------------

    def study(self, data: Any) -> None:
        """Find the shapelets in the training series, unless the model has found some before. Places go into the Config, values,
        complexities and weights (the softmax of 20 times the gain, times their number) into the model. The rest of the network is made
        anew."""
        if self.config.studied:
            return
        train = data.splits["train"]
        samples = [train[i] for i in range(len(train))]
        x, label = np.stack([s["series"] for s in samples]).astype(np.float64), np.array([s["label"] for s in samples])
        c = self.config
        if x.shape[1:] != (c.channels, c.length):
            raise BadInput(
                data.name, expected=f"series of {c.channels} channels and {c.length} points", got=f"{x.shape[1]} and {x.shape[2]}"
            )
        if c.standardise:
            mean, std = x.mean((0, 2), keepdims=True)[0], x.std((0, 2), keepdims=True)[0]
            std = np.where(std > 1e-8, std, 1.0)
            self.mean.copy_(torch.from_numpy(mean))
            self.std.copy_(torch.from_numpy(std))
            x = (x - mean) / std
        found = discover(x, label, c.per_class, c.window, c.points, c.released_gain)
        best = max(range(len(found)), key=lambda i: (round(found[i].gain, 9), found[i].gap)) if c.read_best else c.read
        spans = tuple((s.start, s.end, s.channel, s.label) for s in found)
        self.reconfigure(shapelets=spans, read=best, studied=True)
        device = self.device
        self._build()
        self.filter.set_values([x[s.series, s.channel, s.start : s.end] for s in found])
        gain = torch.tensor([s.gain for s in found])
        with torch.no_grad():
            self.weights.copy_((20 * gain).softmax(0) * len(gain))
        self.to(device)

    # the network ------------------------------------------------------------------------------------------------------

    def forward(self, series: Tensor) -> Tensor:
        """Normalised series [batch, channels, length] to logits [batch, classes]."""
        generic, specific = self.generic(series), self.specific(series)
        return self.head(self.features(torch.cat([specific, generic], 1).unsqueeze(1)).squeeze(1))

    def generic(self, series: Tensor) -> Tensor:
        """What the series is like as a whole: [batch, generic_dim]."""
        x = self.generic_tokens(self.conv(series))  # b t d
        return self.blocks["generic"](x, self.drop(x + self.positions)).mean(1)

    def specific(self, series: Tensor) -> Tensor:
        """How it differs from the shapelets: [batch, dim], the token of shapelet `read`."""
        places = {"channel": self.channel_place, "start": self.start_place, "end": self.end_place}
        x = self.shapelet_tokens(self.filter(series), **places)  # b n d
        for name, place in places.items():
            layer = getattr(self, f"{name}_position")
            x = x + layer.weight.T[place] + layer.bias  # a one-hot place through a linear layer
        return self.blocks["shapelets"](x, weight=self.weights[:, None])[:, self.config.read]

    def matches(self, series: Tensor) -> list[list[Match]]:
        at, distance = self.filter.search(series)
        start = self.filter.first + at
        out = []
        for starts, far in zip(start.tolist(), distance.tolist(), strict=True):
            rows = [Match(s[2], a, a + s[1] - s[0], s[3], d) for a, d, s in zip(starts, far, self.spans, strict=True)]
            out.append(sorted(rows, key=lambda m: m.distance))
        return out

    def no_weight_decay(self) -> set[str]:
        return {"positions"}


def laid_out(c: ShapeFormer.Config) -> tuple[Span, ...]:
    """Places for shapelets that no data have decided: a tenth of the length each, spread over time and channels."""
    count, size = c.per_class * c.num_classes, max(3, c.length // 10)
    starts = np.linspace(0, c.length - size, count).astype(int).tolist()
    return tuple((s, s + size + i % 2 * (s + size < c.length), i % c.channels, i // c.per_class) for i, s in enumerate(starts))
