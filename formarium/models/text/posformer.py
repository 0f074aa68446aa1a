r"""PosFormer: a position forest transformer for handwritten formulas (Guan et al., ECCV 2024, arXiv 2407.07764).

An image becomes features by a DenseNet; a decoder writes LaTeX from left to right and from right to left. Two ideas make it PosFormer.
The position forest (sec. 3.2): every token of a formula has an identifier, the path of upper (4) and lower (5) places that leads to it,
closed by 3. In x ^ { a _ { 1 } } the 1 has 4 5 3. A second decoder reads identifiers and foretells each next token's nesting level and
relative position; it shapes the shared features in training, and is not there at inference. Implicit attention correction (sec. 3.3):
cross-attention is lowered where earlier steps have looked, but steps whose token leaves no ink (^, _, {) don't count as having looked.
Training (eq. 11): (symbols + 0.25 levels + 0.25 positions) / 1.5. Attention correction and decoding follow CoMER and BTTR.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses, check_tensor
from formarium.nn.attention import merge_heads, split_heads
from formarium.nn.beam import KVCache, beam_search
from formarium.nn.densenet import DenseNet
from formarium.nn.drop import Dropout
from formarium.nn.sinusoids import image_waves, sinusoid_table
from formarium.tasks.formula_recognition.latex import CROHME, EOS, PAD, SOS
from formarium.tasks.formula_recognition.model import FormulaRecogniser, Formulas, bidirectional

LEVELS, PLACES, PATH = 5, 6, 5  # nesting levels 0-4; codes 0 pad, 1 start, 2 end, 3 middle, 4 upper, 5 lower; length of an identifier
MIDDLE, UPPER, LOWER = 3, 4, 5

# the position forest --------------------------------------------------------------------------------------------------


def identifiers(rows: Tensor, structure: Mapping[str, int]) -> Tensor:
    r"""Position identifiers of token rows.

    rows: int64 [..., length]; a row that begins with the end symbol runs from right to left. structure: ids of ^ _ { } [ ] \frac \sqrt.
    Returns int64 [..., length, 5]: each token's path from the formula's line down, cut or padded with 0. Raises BadInput where a row is no
    formula (a brace that never closes, a ^ without its group).
    """
    key = tuple(sorted(structure.items()))
    flat = [_forest(tuple(row), key) for row in rows.reshape(-1, rows.shape[-1]).tolist()]
    return torch.tensor(flat, dtype=torch.int64, device=rows.device).view(*rows.shape, PATH)


@lru_cache(maxsize=65536)
def _forest(row: tuple[int, ...], structure: tuple[tuple[str, int], ...]) -> list[list[int]]:
    ids = dict(structure)
    return _paths(row[::-1], ids)[::-1] if row and row[0] == EOS else _paths(row, ids)


def _paths(row: tuple[int, ...], ids: Mapping[str, int]) -> list[list[int]]:
    paths: list[list[int]] = [[] for _ in row]

    def close(opening: int, left: str, right: str, end: int) -> int:
        if opening >= end or row[opening] != ids[left]:
            raise BadInput("formula", expected=f"{left} at token {opening}", got="none", fix="give every argument in braces")
        depth = 0
        for at in range(opening, end):
            depth += (row[at] == ids[left]) - (row[at] == ids[right])
            if not depth:
                return at
        raise BadInput("formula", expected="balanced braces", got=f"a {left} at token {opening} that never closes")

    def line(at: int, end: int, prefix: list[int]) -> None:
        while at < end:
            token = row[at]
            paths[at] = [*prefix, token if token in (PAD, SOS, EOS) else MIDDLE]
            if token == ids["^"]:
                groups = [("{", "}", UPPER)]
            elif token == ids["_"]:
                groups = [("{", "}", LOWER)]
            elif token == ids[r"\frac"]:
                groups = [("{", "}", UPPER), ("{", "}", LOWER)]
            elif token == ids[r"\sqrt"]:
                index = at + 1 < end and row[at + 1] == ids["["]
                groups = [*([("[", "]", UPPER)] if index else []), ("{", "}", LOWER)]
            else:
                groups = []
            at += 1
            for left, right, place in groups:
                last = close(at, left, right, end)
                paths[at] = paths[last] = [*prefix, MIDDLE]
                line(at + 1, last, [*prefix, place])
                at = last + 1

    line(0, len(row), [])
    return [(path + [0] * PATH)[:PATH] for path in paths]


def levels_and_places(identifier: Tensor) -> tuple[Tensor, Tensor]:
    """Nesting level (0-4) and relative position (0-5: the last branch taken, or the token's own code on the line), both int64 [...]."""
    level = ((identifier != 0).sum(-1) - 1).clamp_min(0)
    return level, identifier.gather(-1, (level - 1).clamp_min(0)[..., None])[..., 0]


# attention, and its correction ----------------------------------------------------------------------------------------


class MaskedBatchNorm(nn.BatchNorm1d):
    """Batch norm over the places that aren't padding. x: float [n, channels, h, w], padding: bool [n, h, w]."""

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:  # type: ignore[override]
        if not self.training:
            scale = self.weight * (self.running_var + self.eps).rsqrt()  # type: ignore[operator]
            return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]  # type: ignore[operator]
        inside = ~padding
        last = x.movedim(1, -1)  # n h w c
        out = torch.zeros_like(last)
        out[inside] = super().forward(last[inside])
        return out.movedim(-1, 1)


class AttentionCorrection(nn.Module):
    """How much the attention of each step is lowered for what earlier steps have seen: float, shaped as attention.

    attention: the layer below's, corrected, and this layer's own, uncorrected, each float [b, heads, rows, steps, places].
    """

    def __init__(self, heads: int, channels: int, cross: bool, own: bool):
        super().__init__()
        self.heads, self.cross, self.own = heads, cross, own
        self.conv = nn.Conv2d((cross + own) * heads, channels, 5, padding=2)
        self.proj = nn.Conv2d(channels, heads, 1, bias=False)
        self.norm = MaskedBatchNorm(heads)

    def seen(self, below: Tensor, own: Tensor, inked: Tensor) -> Tensor:
        """What each step looks at, [b, maps, rows, steps, places], nothing where it wrote no ink. inked: bool [b, rows, steps]."""
        maps = torch.cat([*([below] if self.cross else []), *([own] if self.own else [])], 1)
        return maps * inked[:, None, :, :, None]

    def forward(self, coverage: Tensor, padding: Tensor) -> Tensor:
        """coverage: float [b, maps, rows, steps, places], summed over earlier steps. padding: bool [b, h, w]."""
        b, _, rows, steps, _ = coverage.shape
        maps = coverage.permute(0, 2, 3, 1, 4).flatten(0, 2).unflatten(2, padding.shape[1:])  # (b r l) maps h w
        masked = padding[:, None].expand(-1, rows * steps, -1, -1).flatten(0, 1)
        x = F.relu(self.conv(maps)).masked_fill(masked[:, None], 0.0)
        x = self.norm(self.proj(x), masked).flatten(2)
        return x.unflatten(0, (b, rows, steps)).permute(0, 3, 1, 2, 4)


class Attention(nn.Module):
    """Multi-head attention whose one projection serves queries, keys and values."""

    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.dim, self.heads, self.dropout = dim, heads, dropout
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def within(self, x: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        """Self-attention. x: float [rows, steps, dim]; mask: bool [rows, 1, steps, keys], True where a step may look."""
        q, k, v = split_heads(self.qkv(x), self.heads, 3)
        if cache is not None:
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        return self.out(merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)))

    def memory(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [b, heads, places, width] of features [b, places, dim]."""
        k, v = split_heads(F.linear(features, self.qkv.weight[self.dim :], self.qkv.bias[self.dim :]), self.heads, 2)
        return k, v

    def scores(self, x: Tensor, keys: Tensor) -> Tensor:
        """x: float [b, rows, steps, dim] to logits [b, heads, rows, steps, places]: an image's rows share its keys."""
        (q,) = split_heads(F.linear(x.flatten(1, 2), self.qkv.weight[: self.dim], self.qkv.bias[: self.dim]), self.heads)
        logits = (q * q.shape[-1] ** -0.5) @ keys.transpose(2, 3)
        return logits.unflatten(2, x.shape[1:3])

    def weights(self, scores: Tensor, padding: Tensor) -> Tensor:
        hidden = padding.flatten(1)[:, None, None, None]
        return F.dropout(scores.masked_fill(hidden, -torch.inf).softmax(-1), self.dropout, self.training)

    def gathered(self, weights: Tensor, values: Tensor) -> Tensor:
        return self.out(merge_heads(weights.flatten(2, 3) @ values)).unflatten(1, weights.shape[2:4])


class Block(nn.Module):
    """Post-norm: self-attention, corrected cross-attention, feed-forward. x: float [b, rows, steps, dim]."""

    def __init__(self, c: PosFormer.Config):
        super().__init__()
        self.self_attention = Attention(c.dim, c.heads, c.dropout)
        self.cross_attention = Attention(c.dim, c.heads, c.dropout)
        self.linear1 = nn.Linear(c.dim, c.feed_forward)
        self.linear2 = nn.Linear(c.feed_forward, c.dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c.dim) for _ in range(3))
        self.dropout = Dropout(c.dropout)
        self.tap = Tap()

    def attend(self, x: Tensor, mask: Tensor | None, cache: KVCache | None = None) -> Tensor:
        new = self.self_attention.within(x.flatten(0, 1), mask, cache).view_as(x)
        return self.norm1(x + self.dropout(new))

    def finish(self, x: Tensor, weights: Tensor, values: Tensor) -> Tensor:
        x = self.norm2(x + self.dropout(self.cross_attention.gathered(weights, values)))
        x = self.norm3(x + self.dropout(self.linear2(self.dropout(F.relu(self.linear1(x))))))
        return self.tap(x.flatten(1, 2)).view_as(x)


class Decoder(nn.Module):
    """Embedded steps over image features; layers behind the first correct their attention, all by the same weights.

    forward: steps float [b, rows, length, dim], tokens int64 [b, rows, length], features float [b, places, dim], padding bool [b, h, w]
    (h * w = places) to float [b, rows, length, dim].
    """

    positions: Tensor

    def __init__(self, c: PosFormer.Config, embed: nn.Module, inkless: tuple[int, ...]):
        super().__init__()
        self.inkless = inkless
        self.embed = embed
        self.norm = nn.LayerNorm(c.dim)
        self.register_buffer("positions", sinusoid_table(c.max_positions, c.dim), persistent=False)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.layers))
        corrected = c.cross_coverage or c.self_coverage
        self.correction = AttentionCorrection(c.heads, c.coverage_dim, c.cross_coverage, c.self_coverage) if corrected else None
        self.features = Tap()

    def inked(self, tokens: Tensor) -> Tensor:
        return torch.stack([tokens != i for i in self.inkless]).all(0)

    def forward(self, steps: Tensor, tokens: Tensor, features: Tensor, padding: Tensor) -> Tensor:
        length = tokens.shape[2]
        x = self.norm(self.embed(steps) + self.positions[:length])
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mask = causal & (tokens != PAD).flatten(0, 1)[:, None, None]  # (b r) 1 l l
        inked, below = self.inked(tokens), None
        for block in self.blocks:
            x = block.attend(x, mask)  # type: ignore[operator]
            keys, values = block.cross_attention.memory(features)  # type: ignore[union-attr,operator]
            scores = block.cross_attention.scores(x, keys)  # type: ignore[union-attr,operator]
            weights = block.cross_attention.weights(scores, padding)  # type: ignore[union-attr,operator]
            if below is not None and self.correction is not None:
                seen = self.correction.seen(below, weights, inked)
                scores = scores - self.correction(seen.cumsum(3) - seen, padding)
                weights = block.cross_attention.weights(scores, padding)  # type: ignore[union-attr,operator]
            x, below = block.finish(x, weights, values), weights  # type: ignore[operator]
        return self.features(x.flatten(1, 2)).view_as(x)


class Steps:
    """A decoder fed one token at a time: keys and values of earlier steps are kept, and what they have seen as running sums."""

    def __init__(self, decoder: Decoder, features: Tensor, padding: Tensor, rows: int):
        self.decoder, self.padding, self.rows, self.images = decoder, padding, rows, len(features)
        self.memory = [block.cross_attention.memory(features) for block in decoder.blocks]  # type: ignore[union-attr,operator]
        self.caches = [KVCache() for _ in decoder.blocks]
        self.coverage: list[Tensor | None] = [None for _ in decoder.blocks]  # each [b, maps, rows, 1, places]
        self.visible: Tensor | None = None  # bool [b rows, steps]
        self.length = 0

    def __call__(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """tokens, parents: int64 [b * rows]; returns float [b * rows, dim], the newest step's."""
        if parents is not None:
            self._reorder(parents)
        d = self.decoder
        now = (tokens != PAD)[:, None]
        self.visible = now if self.visible is None else torch.cat([self.visible, now], 1)
        tokens = tokens.view(self.images, self.rows, 1)
        x = d.norm(d.embed(tokens) + d.positions[self.length])
        inked, below = d.inked(tokens), None
        for i, block in enumerate(d.blocks):
            keys, values = self.memory[i]
            x = block.attend(x, self.visible[:, None, None], self.caches[i])  # type: ignore[operator]
            scores = block.cross_attention.scores(x, keys)  # type: ignore[union-attr,operator]
            weights = block.cross_attention.weights(scores, self.padding)  # type: ignore[union-attr,operator]
            if below is not None and d.correction is not None:
                seen = d.correction.seen(below, weights, inked)
                before = self.coverage[i]
                before = torch.zeros_like(seen) if before is None else before
                self.coverage[i] = before + seen
                weights = block.cross_attention.weights(scores - d.correction(before, self.padding), self.padding)  # type: ignore[union-attr,operator]
            x, below = block.finish(x, weights, values), weights  # type: ignore[operator]
        self.length += 1
        return d.features(x.flatten(1, 2)).flatten(0, 1)

    def _reorder(self, parents: Tensor) -> None:
        assert self.visible is not None
        self.visible = self.visible[parents]
        for cache in self.caches:
            cache.reorder(parents)
        within = parents.view(self.images, self.rows) - torch.arange(self.images, device=parents.device)[:, None] * self.rows
        for i, seen in enumerate(self.coverage):
            if seen is not None:
                index = within[:, None, :, None, None].expand(-1, seen.shape[1], -1, -1, seen.shape[4])
                self.coverage[i] = seen.gather(2, index)


# the network ----------------------------------------------------------------------------------------------------------


class Output(NamedTuple):
    """Logits of the next token of every step: symbols [b, 2, l, words], levels [b, 2, l, 5], places [b, 2, l, 6]."""

    symbols: Tensor
    levels: Tensor
    places: Tensor


class PosFormer(FormulaRecogniser):
    channel_axes = (1, None, None, None)

    @dataclass(frozen=True)
    class Config:
        vocabulary: tuple[str, ...] = CROHME  # words in the order of their ids, the first has id 3
        dim: int = 256
        growth: int = 24
        dense_layers: int = 16
        heads: int = 8
        layers: int = 3  # of each decoder
        feed_forward: int = 1024
        dropout: float = 0.3
        encoder_dropout: float = 0.2
        coverage_dim: int = 32
        cross_coverage: bool = True
        self_coverage: bool = True
        head_dim: int = 128
        max_positions: int = 500
        level_weight: float = 0.25
        place_weight: float = 0.25
        released_targets: bool = (
            False  # the last step's position target: as released (0, or the first token's), or the end symbol's own code
        )
        beams: int = 10
        max_len: int = 200
        alpha: float = 1.0
        early_stopping: bool = False
        temperature: float = 1.0

    def __init__(self, config: Config):
        super().__init__(config)
        c, words = config, len(config.vocabulary) + 3
        inkless = tuple(self.structure[w] for w in ("^", "_", "{"))
        self.encoder = DenseNet(c.growth, c.dense_layers, c.encoder_dropout)
        self.project = nn.Conv2d(self.encoder.out_channels, c.dim, 1)
        self.norm = nn.LayerNorm(c.dim)
        self.decoder = Decoder(c, nn.Sequential(nn.Embedding(words, c.dim), nn.LayerNorm(c.dim)), inkless)
        self.head = nn.Linear(c.dim, words)
        self.position_decoder = Decoder(c, nn.Sequential(nn.Linear(PATH, c.dim), nn.GELU(), nn.LayerNorm(c.dim)), inkless)
        self.level_head = nn.Sequential(nn.Linear(c.dim, c.head_dim), nn.ReLU(), nn.Linear(c.head_dim, LEVELS))
        self.place_head = nn.Sequential(nn.Linear(c.dim, c.head_dim), nn.ReLU(), nn.Linear(c.head_dim, PLACES))

    def encode(self, image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features float [b, h w, dim] and padding bool [b, h, w], h and w a sixteenth of the image's."""
        x, padding = self.encoder(image, mask)
        x = self.project(x).permute(0, 2, 3, 1)  # b h w c
        return self.norm(x + image_waves(padding, x.shape[-1])).flatten(1, 2), padding

    def forward(self, image: Tensor, mask: Tensor, rows: Tensor, identifiers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """image float [b, 1, height, width], mask bool [b, height, width] (True: padding), rows int64 [b, 2, l] (teacher-forced tokens from
        left
        to right, then from right to left, each with its start symbol), identifiers int64 [b, 2, l, 5] of those tokens; the fields of
        Output."""
        features, padding = self.encode(image, mask)
        x = self.decoder(rows, rows, features, padding)
        p = self.position_decoder(identifiers.to(features.dtype), rows, features, padding)
        return self.head(x), self.level_head(p), self.place_head(p)

    def forward_batch(self, batch: Batch) -> Output:
        rows, _ = bidirectional(batch["tokens"])
        return Output(*self(batch["image"], batch["mask"], rows, identifiers(rows, self.structure)))

    def loss(self, batch: Batch) -> Losses:
        """Cross entropies of the next symbol, its nesting level and its relative position, over both directions."""
        rows, targets = bidirectional(batch["tokens"])
        own = identifiers(rows, self.structure)
        level, place = levels_and_places(own.roll(-1, 2))  # of the next token
        if not self.config.released_targets:
            place = torch.where((targets == SOS) | (targets == EOS), targets, place)
        out = Output(*self(batch["image"], batch["mask"], rows, own))
        return forest_loss(out, targets, level, place, self.config.level_weight, self.config.place_weight)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Formulas:
        """The better of the best hypotheses of both directions, each scored by both directions."""
        self.check_image(batch["image"], batch["mask"])
        ids, scores = self.search(batch["image"], batch["mask"])
        return self.formulas(ids, scores)

    @torch.no_grad()
    def search(self, image: Tensor, mask: Tensor) -> tuple[list[list[int]], Tensor]:
        """Beam search from both ends; every hypothesis is also scored by the other direction. Ids by sample, and scores float [b]."""
        c = self.config
        features, padding = self.encode(image, mask)
        b, m = len(image), c.beams
        start = torch.tensor([SOS, EOS], device=image.device).repeat(b)  # groups: image, then direction
        end = torch.tensor([EOS, SOS], device=image.device).repeat(b)
        steps = Steps(self.decoder, features, padding, 2 * m)
        found = beam_search(
            lambda token, parents: self.head(steps(token, parents)),
            *(start, end),
            **{"beams": m, "max_len": c.max_len, "alpha": c.alpha, "early_stopping": c.early_stopping, "temperature": c.temperature},
        )
        # backwards, from the other end
        n = int(found.lengths.max())
        place = torch.arange(n, device=image.device)
        index = (found.lengths[..., None] - 1 - place).clamp_min(0)
        turned = found.tokens[..., :n].gather(2, index) if n else found.tokens[..., :0]
        turned = torch.where(place < found.lengths[..., None], turned, PAD)  # 2b m n
        rows = torch.cat([end[:, None, None].expand(-1, m, 1), turned], 2)
        targets = F.pad(turned, (0, 1)).scatter(2, found.lengths[..., None], start[:, None, None].expand(-1, m, 1))
        rows, targets = rows.view(b, 2 * m, -1), targets.view(b, 2 * m, -1)
        logits = self.head(self.decoder(rows, rows, features, padding)).float() / c.temperature
        said = -F.cross_entropy(logits.flatten(0, 2), targets.flatten(), ignore_index=PAD, reduction="none").view_as(targets)
        scores = found.scores.view(b, -1) + said.sum(2) / (rows != PAD).sum(2) ** c.alpha
        score, best = scores.max(1)
        lengths = found.lengths.view(b, -1).gather(1, best[:, None])[:, 0].tolist()
        forward = torch.where(
            (best < m)[:, None], *(x.reshape(b, 2 * m, n)[torch.arange(b), best] for x in (found.tokens[..., :n], turned))
        )
        return [row[:length] for row, length in zip(forward.tolist(), lengths, strict=True)], score

    # examples and checks ----------------------------------------------------------------------------------------------

    def example(self, batch: int = 1, size: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        h, w = size or (48, 96)
        mask = torch.zeros(batch, h, w, dtype=torch.bool, device=self.device)
        rows, _ = bidirectional(self.example_formulas(batch).to(self.device))
        return torch.rand(batch, 1, h, w, device=self.device), mask, rows, identifiers(rows, self.structure)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        return {f"{h}x{w}": self.example(1, (h, w)) for h, w in [(49, 111), (96, 32), (33, 200), (7, 5)]}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        g = torch.Generator().manual_seed(seed)
        image, mask = torch.rand(batch, 1, 48, 96, generator=g), torch.zeros(batch, 48, 96, dtype=torch.bool)
        if batch > 1:
            mask[-1, :, 64:] = True
            image[-1, :, :, 64:] = 0
        held = {"image": image, "mask": mask, "tokens": self.example_formulas(batch)}
        return {**{k: v.to(self.device) for k, v in held.items()}, "id": [f"example {i}" for i in range(batch)]}

    def check_input(self, image: Any, mask: Any, rows: Any, identifiers: Any) -> None:
        self.check_image(image, mask)
        check_tensor("rows", rows, "batch 2 length", sizes={0: len(image), 1: 2}, dtype=lambda d: d == torch.int64)
        sizes = {0: len(image), 1: 2, 2: rows.shape[2], 3: PATH}
        check_tensor("identifiers", identifiers, "batch 2 length 5", sizes=sizes, dtype=lambda d: d == torch.int64)
        words = len(self.config.vocabulary) + 3
        if rows.device.type == "cpu" and (int(rows.min()) < 0 or int(rows.max()) >= words):
            raise BadInput("rows", expected=f"token ids from 0 to {words - 1}", got=f"{int(rows.min())} to {int(rows.max())}")
        if rows.shape[2] > self.config.max_positions:
            raise BadInput("rows", expected=f"at most {self.config.max_positions} tokens", got=str(rows.shape[2]))


def forest_loss(
    out: Output, targets: Tensor, level: Tensor, place: Tensor, level_weight: float = 0.25, place_weight: float = 0.25
) -> Losses:
    """The weighted mean of three cross entropies over the steps that have a target. targets, level, place: int64 [...], 0 in targets:
    none."""
    counted = targets.flatten() != PAD
    symbols = F.cross_entropy(out.symbols.flatten(0, -2).float(), targets.flatten(), ignore_index=PAD)
    levels = F.cross_entropy(out.levels.flatten(0, -2).float()[counted], level.flatten()[counted])
    places = F.cross_entropy(out.places.flatten(0, -2).float()[counted], place.flatten()[counted])
    total = (symbols + level_weight * levels + place_weight * places) / (1 + level_weight + place_weight)
    return Losses(total, {"symbols": symbols, "levels": levels, "places": places})
