"""SAT, the Spatial-Aware Token (Wu et al., ICCV 2023): a classifier learns where its object is from class labels alone.

A further token asks every other one whether it is foreground. With q its query and k_j the keys of a block's tokens,

    m_j = sigmoid(mean over heads of q . k_j / sqrt(d)),        attention_ij = softmax_j(q_i . k_j / sqrt(d)) m_j

in the last blocks: tokens taken for background count less for everybody, so the classification loss teaches the token. The map is the mean
of m over those blocks. Two losses keep it from being all or nothing: the batch's mean share of foreground is tied to a constant (single
images may differ), and each place, smoothed, is pushed to 0 or 1.

On a plain ViT this is the paper's network. Other classifiers have no sequence that a token could join: there a learned query reads the
tokens that a block gives, and what it asks of them gates them, by the same losses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Feature, Features, Tap, taps, watching
from formarium.method import Method
from formarium.methods.wrapping import Wrapped, finish, glance, make_trunk, shapes, target, trunk_fields, why_not
from formarium.model import Batch, Losses, Model, Stage, Turn, evaluating
from formarium.nn.attention import merge_heads, split_heads
from formarium.tasks.image_classification.model import ImageClassifier
from formarium.tasks.image_classification.trunks import ViT
from formarium.tasks.object_localisation.model import Located, ObjectLocaliser

FEWEST_PLACES = 16  # of a grid that a query gates; a coarser one has no shapes

# the token ----------------------------------------------------------------------------------------------------------


def foreground(query: Tensor, keys: Tensor) -> Tensor:
    """The spatial token's opinion of every token: query float [batch, heads, 1, width], keys [batch, heads, tokens, width] -> m
    [batch, 1, tokens] in 0..1."""
    scores = query @ keys.transpose(-2, -1) * keys.shape[-1] ** -0.5  # b heads 1 n
    return scores.mean(1).sigmoid()


def gated_attention(q: Tensor, k: Tensor, v: Tensor, m: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) m v: rows sum to the mass that m leaves, not to 1. q, k, v: float [batch, heads, tokens, width]; m:
    [batch, 1, tokens]. A weight on a key's whole column is one on its value, so the fused operator serves."""
    return F.scaled_dot_product_attention(q, k, v * m[..., None].to(v.dtype))


def gated_block(block: Any, x: Tensor, grid: tuple[int, int], at: int, gate: bool = True) -> tuple[Tensor, Tensor]:
    """A ViT's block in which token `at` gates the attention: x float [batch, tokens, dim] -> (the same shape, m [batch, tokens]). Without
    `gate` the token is asked, and attention is plain."""
    q, k, v = split_heads(block.attention.qkv(block.norm1(x)), block.attention.heads, 3)
    m = foreground(q[:, :, at : at + 1], k)
    x = x + block.drop(block.attention.out(merge_heads(gated_attention(q, k, v, m if gate else torch.ones_like(m)))))
    return block.tap(x + block.drop(block.mlp(block.norm2(x))), grid=grid), m[:, 0]


class SpatialQuery(nn.Module):
    """What stands for the token where there is no sequence to join: it reads a block's tokens [batch, tokens, dim] by attention, and what
    it then asks of each is m, [batch, tokens] in 0..1."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
        self.kv = nn.Linear(dim, 2 * dim)
        self.query = nn.Linear(dim, dim)
        for layer in (self.kv, self.query):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        k, v = self.kv(self.norm(tokens)).chunk(2, -1)
        token = self.token.expand(len(tokens), -1, -1).to(k.dtype)
        q = self.query(token + F.scaled_dot_product_attention(token, k, v))
        return (q @ k.transpose(1, 2) * k.shape[-1] ** -0.5).sigmoid()[:, 0]


# classifying and smoothing ------------------------------------------------------------------------------------------


class PooledConvolution(nn.Conv2d):
    """A 3x3 convolution (padding 1) to classes, averaged over the map: float [batch, dim, h, w] -> [batch, classes].

    The mean of a convolution is linear in nine sums over the map, those that each tap of the kernel sees; only they are computed.
    """

    def __init__(self, dim: int, classes: int):
        super().__init__(dim, classes, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h, w = x.shape[2:]
        sums = _seen(h, x) @ x @ _seen(w, x).T  # b c 3 3
        return F.linear(sums.flatten(1) / (h * w), self.weight.flatten(1), self.bias)


def _seen(size: int, like: Tensor) -> Tensor:
    """Which places of an axis each of the three taps meets, float [3, size]: all, but for the one that lies beyond the border."""
    out = torch.ones(3, size, dtype=like.dtype, device=like.device)
    out[0, -1] = out[2, 0] = 0
    return out


def smoothing_kernel(spread: float = 6.0) -> Tensor:
    """A 3x3 kernel summing to 1, float [1, 1, 3, 3]: the square root of the outer product of a normal distribution's mass in three bins."""
    step = (2 * spread + (2 * spread + 1) / 3) / 3
    below = [0.5 * math.erf((i - 1.5) * step / math.sqrt(2)) for i in range(4)]
    mass = torch.tensor([b - a for a, b in pairwise(below)], dtype=torch.float64)
    kernel = torch.outer(mass, mass).sqrt()
    return (kernel / kernel.sum()).float()[None, None]


def area_loss(maps: Tensor, share: float) -> Tensor:
    """|the batch's mean of maps [batch, h, w] - share|: which of its images has the foreground makes no difference."""
    return (maps.mean() - share).abs()


def normalisation_loss(maps: Tensor, kernel: Tensor) -> Tensor:
    """The mean of (1 - S) S, S being maps [batch, h, w] smoothed with zeros around: least where every place is 0 or 1."""
    smooth = F.conv2d(maps[:, None], kernel, padding=1)
    return ((1 - smooth) * smooth).mean()


# the network --------------------------------------------------------------------------------------------------------


class SpatialAware(Wrapped, ObjectLocaliser):
    """A trunk that says where: the paper's network on a ViT, spatial queries behind the last blocks of any other classifier."""

    kernel: nn.Parameter

    @dataclass(frozen=True)
    class Config(Wrapped.Config):
        gated: int = 3  # of the last blocks
        mapped: int = 0  # of the last blocks whose opinions make the map, on a ViT; by default the gated ones
        area: float = 0.25  # the share of foreground; 0.35 for ImageNet
        threshold: float = 0.4
        warm_up: float = 0.0  # the share of training that the classifier has to itself; needed where the trunk isn't pre-trained

    def __init__(self, config: Config, trunk: ImageClassifier | None = None):
        if not 0 <= config.warm_up < 1 or not 0 < config.area < 1 or not 0 < config.threshold < 1:
            got = f"warm_up {config.warm_up}, area {config.area}, threshold {config.threshold}"
            raise BadInput("shares", expected="area and threshold between 0 and 1, warm_up from 0 to below 1", got=got)
        if config.gated < 0 or config.mapped < 0 or not config.gated + config.mapped:
            raise BadInput("gated", expected="1 block or more", got=str(config.gated))
        super().__init__(config, bare(trunk) if trunk is not None else make_trunk(_bare_config(config)))
        self.threshold = config.threshold
        self.kernel = nn.Parameter(smoothing_kernel(), requires_grad=False)
        own: Any = self.trunk
        if isinstance(own, ViT):
            if max(config.gated, config.mapped) > len(own.blocks):
                raise BadInput("gated", expected=f"at most the {len(own.blocks)} blocks there are", got=str(config.gated))
            dim = own.config.dim
            self.prefix = own.cls_token.shape[1]
            self.spatial_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
            self.spatial_position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))
            self.classifier = PooledConvolution(dim, config.num_classes)
            for tap in own.modules():
                if isinstance(tap, Tap) and tap is not own.tokens:
                    tap.prefix = self.prefix + 1
        else:
            self.places = gated_places(own, config.gated or config.mapped)
            read = shapes(own, self.places)
            self.grids = [f.grid for f in read]
            self.queries = nn.ModuleList(SpatialQuery(f.tokens.shape[2]) for f in read)

    def forward(self, image: Tensor) -> Located:
        """Normalised image [batch, channels, height, width] to logits [batch, classes] and the map [batch, h, w] on the finest gated
        grid."""
        logits, m = self._of_vit(image) if isinstance(self.trunk, ViT) else self._of_others(image)
        return Located(logits, mean_map(m))

    def _of_vit(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        own: Any = self.trunk
        x, grid = own.embedded(image)
        at = self.prefix
        token = (self.spatial_token + self.spatial_position).expand(len(x), -1, -1)
        x = torch.cat([x[:, :at], token.to(x.dtype), x[:, at:]], 1)  # class tokens, the spatial one, patches
        gated, mapped, maps = self.config.gated, self.config.mapped or self.config.gated, []
        for left, block in zip(range(len(own.blocks), 0, -1), own.blocks, strict=True):
            if left > max(gated, mapped):
                x = block(x, grid)
                continue
            x, m = gated_block(block, x, grid, at, left <= gated)
            if left <= mapped:
                maps.append(m[:, at + 1 :].unflatten(1, grid))
        x = own.features(own.norm(x), grid=grid)[:, at + 1 :]
        return self.classifier(x.transpose(1, 2).unflatten(2, grid)), maps

    def _of_others(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The trunk's own answer, its last blocks' tokens times 2 m: a query that knows nothing (m = 1/2) leaves them as they are."""
        maps: list[Tensor] = []

        def gate(query: nn.Module) -> Any:
            def edit(feature: Feature) -> Tensor:
                m = query(feature.tokens[:, feature.prefix :])
                assert feature.grid is not None
                maps.append(m.unflatten(1, feature.grid))
                weight = F.pad(2 * m, (feature.prefix, 0), value=1.0)
                return feature.tokens * weight[..., None].to(feature.tokens.dtype)

            return edit

        edits = {name: gate(query) for name, query in zip(self.places, self.queries, strict=True)}
        with watching(self.trunk, dict.fromkeys(edits), Features(), {}, edits):
            return self.trunk(image), maps

    # learning ---------------------------------------------------------------------------------------------------------

    def training_stages(self) -> Sequence[Stage]:
        share = self.config.warm_up
        localise = Stage("localisation", share=1 - share)
        return (Stage("classifier", (Turn("classification"),), share=share), localise) if share else (localise,)

    def classification(self, batch: Batch) -> Losses:
        """Cross entropy alone. The area loss on an untrained trunk would give a constant map."""
        loss = F.cross_entropy(self.forward_batch(batch).logits.float(), target(batch))
        return Losses(loss, {"classification": loss})

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy, area and normalisation, each with weight 1."""
        out = self.forward_batch(batch)
        return localisation_loss(out.logits, out.map, target(batch), self.config.area, self.kernel)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"spatial_token", "spatial_position", "queries.*.token"}


def localisation_loss(logits: Tensor, maps: Tensor, label: Tensor, share: float, kernel: Tensor) -> Losses:
    """logits float [batch, classes], maps [batch, h, w] in 0..1, label int64 [batch] or soft targets (section 3.3)."""
    terms = {
        "classification": F.cross_entropy(logits.float(), label),
        "area": area_loss(maps.float(), share),
        "normalisation": normalisation_loss(maps.float(), kernel),
    }
    return Losses(torch.stack([*terms.values()]).sum(), terms)


def mean_map(maps: Sequence[Tensor]) -> Tensor:
    """The mean of maps [batch, h, w] on the finest of their grids, coarser ones enlarged bilinearly."""
    size = max((m.shape[1:] for m in maps), key=lambda s: s[0] * s[1])
    alike = [m if m.shape[1:] == size else F.interpolate(m[:, None], size=size, mode="bilinear")[:, 0] for m in maps]
    return torch.stack(alike).mean(0)


# making one ---------------------------------------------------------------------------------------------------------


def bare(trunk: ImageClassifier) -> ImageClassifier:
    """A ViT without its classifier, which reads the class token; any other classifier as it is."""
    if not isinstance(trunk, ViT) or trunk.config.dense:
        return trunk
    made = type(trunk)(replace(trunk.config, dense=True)).to(trunk.device)
    own = made.state_dict()
    made.load_state_dict({k: v for k, v in trunk.state_dict().items() if k in own})
    return made


def _bare_config(config: Any) -> Any:
    return replace(config, trunk_config={**config.trunk_config, "dense": True}) if config.trunk == "vit" else config


def gated_places(trunk: ImageClassifier, count: int) -> list[str]:
    """Taps of the last `count` blocks on a grid of FEWEST_PLACES places or more; a last block whose class token alone is read further on
    isn't among them. Raises BadInput where there are none."""
    blocks = [*taps(trunk, "*blocks.*")]
    found = dict(zip(blocks, glance(trunk, blocks), strict=True))
    fine = [n for n, f in found.items() if f is not None and f.grid is not None and len(f.grid) == 2 and math.prod(f.grid) >= FEWEST_PLACES]
    if fine and fine[-1] == blocks[-1] and getattr(found[blocks[-1]], "prefix", 0):
        fine = fine[:-1]
    if not fine:
        raise BadInput(type(trunk).__name__, expected=f"blocks with taps on a grid of {FEWEST_PLACES} places or more", got="none")
    return fine[-count:]


class SAT(Method):
    """Makes a classifier localise. gated: how many of the last blocks; area: the share of an image that objects cover, on average;
    threshold: of the map, for the box; warm_up: the share of training that the classifier has to itself (0.3 without pre-training, 0
    with)."""

    network = SpatialAware

    def __init__(self, gated: int = 3, area: float = 0.25, threshold: float = 0.4, warm_up: float = 0.0):
        self.options = {"gated": gated, "area": area, "threshold": threshold, "warm_up": warm_up}

    def needs(self, model: Model) -> str:
        if reason := why_not(model):
            return reason
        if isinstance(model, ViT):
            return ""
        try:
            gated_places(model, self.options["gated"])  # type: ignore[arg-type]
        except BadInput as e:
            return str(e)
        with torch.no_grad(), evaluating(model):
            out = nn.Module.__call__(model, torch.zeros(1, model.config.in_channels, *model.image_size, device=model.device))  # type: ignore[attr-defined]
        return "" if isinstance(out, Tensor) and out.ndim == 2 else "its forward gives more than logits"

    def apply(self, model: Any, data: Any = None) -> SpatialAware:
        """The model with a spatial token (or queries), its weights kept; a ViT's classifier is replaced by the paper's. `data` isn't
        needed. Raises BadInput where there is nothing to gate."""
        if reason := self.needs(model):
            raise BadInput(f"SAT on {type(model).__name__}", expected="a classifier with blocks on a grid", got=reason)
        own: Mapping[str, Any] = trunk_fields(model)
        if isinstance(model, ViT):
            own = {**own, "trunk_config": {**own["trunk_config"], "dense": True}}
        return finish(SpatialAware(SpatialAware.Config(**own, **self.options), model), "spatial_aware_token", model)  # type: ignore[arg-type]
