"""ARBEx: Attentive feature extraction with Reliability Balancing for facial Expression learning (Wasi et al. 2023, arXiv 2305.01486).

A face has two readings, one of the image (IR50) and one of its landmarks (MobileFaceNet). At three scales the landmark features ask and the
image features answer (cross-attention over the whole map); what they agree on becomes 3 x 49 tokens of a small ViT, whose class token is
the embedding e. A head gives the primary distribution p = softmax(logits / T). Where p is unsure, its confidence c = 1 - H(p) / log K being
low, it is corrected by two other opinions, weighted by how sure they are:

    s_k = sum over anchors a of softmax over all (k, a) of -|e - anchor_ka| / delta         (similarity to trainable anchors)
    a   = softmax(attention(e)), summed over anchors                                         (attention)
    r   = (s c_s + a c_a) / (c_s + c_a),   corrected = (1 - trust) p + trust (c p + (1 - c) r)

trust rises from 0 to 1 over training. What is learned from is the corrected distribution; what is predicted is the primary one, as in the
authors' evaluation, or the corrected one (correct=True), as in the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap
from formarium.model import Batch, Losses, Stage, Turn
from formarium.nn.attention import biased_attention, merge_heads, split_heads
from formarium.nn.convs import ConvBN
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.mlp import MLP
from formarium.nn.nd_windows import relative_index
from formarium.tasks.image_classification.model import ImageClassifier

# the two backbones --------------------------------------------------------------------------------------------------


class ConvAct(nn.Module):
    """Convolution, BatchNorm, PReLU. x: float [batch, dim, h, w]. Returns [batch, out, h / stride, w / stride]."""

    def __init__(self, dim: int, out: int, kernel: int = 1, stride: int = 1, groups: int = 1):
        super().__init__()
        self.layer = ConvBN(dim, out, kernel, stride, groups)
        self.act = nn.PReLU(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.layer(x))


class IRBottleneck(nn.Module):
    """BatchNorm, 3x3 convolution, PReLU, 3x3 convolution with stride, BatchNorm; beside a shortcut that skips pixels or is a 1x1 kernel."""

    def __init__(self, dim: int, out: int, stride: int):
        super().__init__()
        self.stride = stride
        self.norm = nn.BatchNorm2d(dim)
        self.expand = nn.Conv2d(dim, out, 3, padding=1, bias=False)
        self.act = nn.PReLU(out)
        self.reduce = ConvBN(out, out, 3, stride)
        self.shortcut = ConvBN(dim, out, 1, stride) if dim != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(self.act(self.expand(self.norm(x))))
        if self.shortcut is not None:
            return y + self.shortcut(x)
        return y + (x if self.stride == 1 else x[:, :, :: self.stride, :: self.stride])


class ImageBranch(nn.Module):
    """IR50 without its last stage. x: float [batch, 3, s, s]. Returns maps of dims[i] channels at s/2, s/4, s/8."""

    def __init__(self, in_channels: int, dims: tuple[int, ...], depths: tuple[int, ...]):
        super().__init__()
        self.stem = ConvAct(in_channels, dims[0], 3)
        before = (dims[0], *dims[:-1])
        self.stages = nn.ModuleList(
            nn.Sequential(*(IRBottleneck(out if j else dim, out, 1 if j else 2) for j in range(depth)))
            for dim, out, depth in zip(before, dims, depths, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class DepthwiseBottleneck(nn.Module):
    """1x1 to `hidden` channels, depthwise 3x3 with stride, 1x1 back (MobileFaceNet). residual adds the input."""

    def __init__(self, dim: int, out: int, hidden: int, stride: int = 1, residual: bool = False):
        super().__init__()
        self.residual = residual
        self.expand = ConvAct(dim, hidden)
        self.spatial = ConvAct(hidden, hidden, 3, stride, hidden)
        self.reduce = ConvBN(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(self.spatial(self.expand(x)))
        return x + y if self.residual else y


class LandmarkBranch(nn.Module):
    """MobileFaceNet without its embedding. x: float [batch, 3, s, s]. Returns maps of dims[0], dims[1], 2 dims[2] channels at s/4, s/8,
    s/16."""

    def __init__(self, in_channels: int, dims: tuple[int, ...], depths: tuple[int, ...]):
        super().__init__()
        a, b, c = dims

        def repeated(dim: int, depth: int) -> nn.Sequential:
            return nn.Sequential(*(DepthwiseBottleneck(dim, dim, 2 * dim, residual=True) for _ in range(depth)))

        first = (ConvAct(in_channels, a, 3, 2), ConvAct(a, a, 3, 1, a), DepthwiseBottleneck(a, a, 2 * a, 2), repeated(a, depths[0]))
        second = (DepthwiseBottleneck(a, b, 4 * a, 2), repeated(b, depths[1]))
        third = (DepthwiseBottleneck(b, b, 4 * b, 2), repeated(b, depths[2]), ConvAct(b, 2 * c))
        self.stages = nn.ModuleList(nn.Sequential(*s) for s in (first, second, third))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


# what they agree on -------------------------------------------------------------------------------------------------


class CrossFusion(nn.Module):
    """Landmark features ask (no projection), image features answer, over the whole map, with a learned bias for each offset.

    image, landmarks: float [batch, dim, side, side]. Returns [batch, side, side, dim]. The residual is the normalised image map, and both
    branches start small (layer scale).
    """

    index: Tensor

    def __init__(self, dim: int, heads: int, side: int, mlp_ratio: float, layer_scale: float, drop_path: float):
        super().__init__()
        self.heads = heads
        self.source_norm = nn.LayerNorm(dim)
        self.table = nn.Parameter(nn.init.trunc_normal_(torch.empty((2 * side - 1) ** 2, heads), std=0.02))
        self.kv = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.scale1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.scale2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap("grid")
        self.register_buffer("index", relative_index((side, side)), persistent=False)

    def forward(self, image: Tensor, landmarks: Tensor) -> Tensor:
        grid = image.shape[2:]
        source = self.source_norm(image.permute(0, 2, 3, 1).flatten(1, 2))  # b (h w) c
        (q,) = split_heads(landmarks.permute(0, 2, 3, 1).flatten(1, 2).contiguous(), self.heads)
        k, v = split_heads(self.kv(source), self.heads, 2)
        bias = self.table.t()[:, self.index].to(q.dtype)[None]  # 1 heads n n
        x = source + self.drop(self.scale1 * self.out(merge_heads(biased_attention(q, k, v, bias))))
        x = x + self.drop(self.scale2 * self.mlp(self.norm(x)))
        return self.tap(x.unflatten(1, grid))


class Block(nn.Module):
    """Pre-norm: x + attention(LN x), then x + MLP(LN x). x: float [batch, 1 + tokens, dim]. scores are divided by sqrt(scale_dim)."""

    def __init__(self, c: ARBEx.Config, drop_path: float):
        super().__init__()
        self.heads, self.scale = c.vit_heads, (c.dim // (c.scale_heads or c.vit_heads)) ** -0.5
        self.norm1 = nn.LayerNorm(c.dim, eps=1e-6)
        self.attention = nn.ModuleDict({"qkv": nn.Linear(c.dim, 3 * c.dim), "out": nn.Linear(c.dim, c.dim)})
        self.norm2 = nn.LayerNorm(c.dim, eps=1e-6)
        self.mlp = MLP(c.dim, int(c.dim * c.mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap(prefix=1)

    def forward(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        q, k, v = split_heads(self.attention["qkv"](self.norm1(x)), self.heads, 3)
        x = x + self.drop(self.attention["out"](merge_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale))))
        return self.tap(x + self.drop(self.mlp(self.norm2(x))), grid=grid)


# reliability balancing ----------------------------------------------------------------------------------------------


class Anchors(nn.Module):
    """Trainable points of each class in embedding space. forward: [batch, dim] -> Euclidean distances [batch, classes, anchors]."""

    def __init__(self, classes: int, anchors: int, dim: int):
        super().__init__()
        self.points = nn.Parameter(torch.zeros(classes, anchors, dim))

    def forward(self, embedding: Tensor) -> Tensor:
        """The gradient at distance 0 is 0."""
        d = torch.cdist(embedding.float(), self.points.flatten(0, 1).float(), compute_mode="donot_use_mm_for_euclid_dist")
        return d.unflatten(1, self.points.shape[:2])


class ReliabilityAttention(nn.Module):
    """A distribution over classes by attention, float [batch, dim] -> [batch, classes], rows summing to 1.

    over "batch": the samples of a batch are one sequence and attend to one another, as in the authors' code; over "sample": each is a
    sequence of its own, so that the value path is all there is and no sample sees another.
    """

    def __init__(self, classes: int, anchors: int, dim: int, heads: int = 1, over: str = "sample"):
        super().__init__()
        size = classes * anchors
        self.shape, self.over = (classes, anchors), over
        self.query, self.key, self.value = (nn.Linear(dim, size) for _ in range(3))
        self.mix = nn.MultiheadAttention(size, heads, batch_first=True)

    def forward(self, embedding: Tensor) -> Tensor:
        x = embedding[:, None] if self.over == "sample" else embedding[None]
        y, _ = self.mix(self.query(x), self.key(x), self.value(x), need_weights=False)
        return y.reshape(len(embedding), -1).float().softmax(-1).unflatten(1, self.shape).sum(-1)


def confidence(p: Tensor) -> Tensor:
    """1 - H(p) / log K, 0 for a uniform distribution and 1 for a sure one: float [batch, classes] -> [batch, 1]."""
    entropy = -(p * p.clamp_min(1e-12).log()).sum(-1, keepdim=True)
    return 1 - entropy / math.log(p.shape[-1])


def similarity(distances: Tensor, delta: float = 1.0) -> Tensor:
    """softmax(-distance / delta) over all anchors of all classes, summed by class: [batch, classes, anchors] -> [batch, classes]."""
    return (-distances / delta).flatten(1).softmax(-1).view_as(distances).sum(-1)


class Balanced(NamedTuple):
    """What reliability balancing knows of a batch; all float [batch, classes] but confidence [batch, 1] and distances
    [batch, classes, anchors]."""

    prob: Tensor
    confidence: Tensor
    distances: Tensor
    similarities: Tensor
    attention: Tensor
    correction: Tensor
    corrected: Tensor


def balance(prob: Tensor, distances: Tensor, attention: Tensor, trust: Tensor | float, delta: float = 1.0) -> Balanced:
    """Correct a primary distribution by how sure it is and how sure two other opinions are (section 3.3); rows keep summing to 1."""
    c, s = confidence(prob), similarity(distances, delta)
    # where neither is sure of anything they count alike; rounding may take a confidence of 0 below it
    weight_s, weight_a = confidence(s).clamp_min(0) + 1e-8, confidence(attention).clamp_min(0) + 1e-8
    correction = (s * weight_s + attention * weight_a) / (weight_s + weight_a)
    corrected = (1 - trust) * prob + trust * (c * prob + (1 - c) * correction)
    return Balanced(prob, c, distances, s, attention, correction, corrected)


def anchor_loss(points: Tensor) -> Tensor:
    """Minus the squared distances between the classes' anchors, over all ordered pairs, / (anchors^2 sqrt(dim)): it drives them apart.
    points: float [classes, anchors, dim]. It has no lower bound."""
    flat = points.flatten(1)
    spread = (flat - flat.mean(0)).square().sum()  # the sum over ordered pairs is 2 K times this
    return -2 * len(flat) * spread / (points.shape[1] ** 2 * math.sqrt(points.shape[2]))


def centre_loss(distances: Tensor, label: Tensor, confidence: Tensor, dim: int) -> Tensor:
    """Mean distance to the nearest anchor of one's own class, weighted by confidence, / sqrt(dim)."""
    own = distances[torch.arange(len(label), device=label.device), label].amin(1)
    return (own * confidence.view(-1)).mean() / math.sqrt(dim)


# the network --------------------------------------------------------------------------------------------------------


class Expressions(NamedTuple):
    """probabilities: float32 [batch, classes], primary or corrected as the Config says. label: int64 [batch], theirs. primary: before
    correction. confidence: [batch], of the primary distribution, 0 to 1. distances: [batch, classes, anchors], Euclidean, in embedding
    space."""

    probabilities: Tensor
    label: Tensor
    primary: Tensor
    confidence: Tensor
    distances: Tensor


class Unused(nn.Module):
    """Layers that the released code makes and never runs; here so that its checkpoints load whole."""

    def __init__(self, dim: int, depth: int, tokens: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(256, 768, 1)
        self.con1 = nn.Conv2d(256, 768, 1, bias=False)
        self.linear1 = nn.Linear(1024, 768)
        self.linear2 = nn.Linear(768, 512)
        self.mixers = nn.ModuleList(nn.Conv1d(tokens, tokens, 1) for _ in range(depth))


class ARBEx(ImageClassifier):
    """Extractor, head, anchors and attention; with num_classes 0 the extractor alone, giving embeddings [batch, dim]."""

    dynamic_size = True
    trust: Tensor
    class_weights: Tensor

    @dataclass(frozen=True)
    class Config:
        side: int = 112  # both backbones see the image at this size (nearest neighbour), whatever comes; a multiple of 16
        dims: tuple[int, ...] = (64, 128, 256)
        heads: tuple[int, ...] = (2, 4, 8)
        image_depths: tuple[int, ...] = (3, 4, 14)
        landmark_depths: tuple[int, ...] = (4, 6, 2)
        dim: int = 768
        depth: int = 2
        vit_heads: int = 8
        scale_heads: int = 0  # heads that the ViT's scale is of, by default its own; the authors' num_heads moves this alone
        mlp_ratio: float = 4
        layer_scale: float = 1e-5
        fusion_drop_path: tuple[float, ...] = (0.0, 0.125, 0.25)
        hidden: tuple[int, ...] = (384, 192, 96)
        dropout: float = 0.5
        batch_norm: bool = True
        anchors: int = 1  # a class
        attention_anchors: int = 1
        attention_heads: int = 1
        attention_over: str = "sample"  # or "batch", the authors'
        temperature: float = 1.0
        delta: float = 1.0
        most_trust: float = 1.0  # that training reaches; 0 leaves a plain classifier
        weights: tuple[float, ...] = (1.0, 1.0, 1.0)  # of the classification, anchor and centre losses
        balanced: bool = True  # classes weigh alike in the loss, however rare
        correct: bool = False  # predict gives the primary distribution, as the authors' evaluation does; True: the paper's corrected one
        frozen: tuple[str, ...] = ()  # of "image" and "landmark": pre-trained backbones that don't move
        unused_layers: bool = True
        in_channels: int = 3
        num_classes: int = 8
        drop_path: float = 0.0

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        if c.side % 16 or c.side < 16:
            raise BadInput("side", expected="a multiple of 16", got=str(c.side))
        if c.attention_over not in ("sample", "batch"):
            raise BadInput("attention_over", expected='"sample" or "batch"', got=repr(c.attention_over))
        if not {*c.frozen} <= {"image", "landmark"}:
            raise BadInput("frozen", expected='some of "image", "landmark"', got=str(c.frozen))
        a, b, d = c.dims
        self.sides = (c.side // 4, c.side // 8, c.side // 16)
        self.landmark = LandmarkBranch(c.in_channels, c.dims, c.landmark_depths)
        self.image = ImageBranch(c.in_channels, c.dims, c.image_depths)
        self.narrow = nn.Conv2d(2 * d, d, 3, padding=1)
        self.shrink = nn.ModuleList(nn.Conv2d(dim, dim, 3, 2, 1) for dim in c.dims)
        self.fusions = nn.ModuleList(
            CrossFusion(dim, heads, side, c.mlp_ratio, c.layer_scale, drop)
            for dim, heads, side, drop in zip(c.dims, c.heads, self.sides, c.fusion_drop_path, strict=True)
        )
        embed = (
            (nn.Conv2d(a, c.dim, 3, 2, 1), nn.Conv2d(c.dim, c.dim, 3, 2, 1)),
            (nn.Conv2d(b, c.dim, 3, 2, 1),),
            (nn.Conv2d(d, c.dim, 1),),
        )
        self.embed = nn.ModuleList(nn.Sequential(*layers) for layers in embed)
        tokens = 3 * self.sides[2] ** 2
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, c.dim), std=0.02))
        self.positions = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + tokens, c.dim), std=0.02))
        self.tokens = Tap(prefix=1)
        self.blocks = nn.ModuleList(Block(c, rate) for rate in drop_path_rates(c.drop_path, (c.depth,))[0])
        self.norm = nn.LayerNorm(c.dim, eps=1e-6)
        self.gate = nn.Sequential(nn.Linear(c.dim, c.dim), nn.ReLU(), nn.Linear(c.dim, c.dim), nn.Sigmoid())
        if c.unused_layers:
            self.unused = Unused(c.dim, c.depth, 1 + tokens)
        for m in (*self.blocks.modules(), *self.gate.modules()):
            if isinstance(m, nn.Linear):
                nn.init.trunc_normal_(m.weight, std=0.01)
                nn.init.zeros_(m.bias)
        self.features = Tap()
        if c.num_classes:
            self.head = classification_head(c.dim, c.hidden, c.num_classes, c.dropout, c.batch_norm)
            self.anchors = Anchors(c.num_classes, c.anchors, c.dim)
            self.attention = ReliabilityAttention(c.num_classes, c.attention_anchors, c.dim, c.attention_heads, c.attention_over)
            self.register_buffer("trust", torch.zeros(()))
            self.register_buffer("class_weights", torch.ones(c.num_classes))

    # network ----------------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [batch, 3, height, width] of any size to primary logits [batch, classes] (embeddings without classes)."""
        embedding = self.embedding(image)
        return self.head(embedding) if self.config.num_classes else embedding

    def embedding(self, image: Tensor) -> Tensor:
        """[batch, 3, height, width] -> [batch, dim]"""
        maps = self.maps(image)
        side = self.sides[2]
        tokens = [layer(m.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2) for layer, m in zip(self.embed, maps, strict=True)]
        x = torch.cat([self.cls_token.expand(image.shape[0], -1, -1), *tokens], 1)  # b (1 + 3 h w) c
        x = self.tokens(x + self.positions, grid=(3, side, side))
        for block in self.blocks:
            x = block(x, (3, side, side))
        x = self.norm(x[:, :1])
        return self.features(x * self.gate(x))[:, 0]

    def maps(self, image: Tensor) -> list[Tensor]:
        """The fused maps, [batch, side / (4, 8, 16), the same, dims[i]]."""
        side = self.config.side
        if torch.compiler.is_exporting() or tuple(image.shape[2:]) != (side, side):
            image = F.interpolate(image, size=(side, side))
        image = image.contiguous(memory_format=torch.channels_last)
        asked = self.landmark(image)
        asked[-1] = self.narrow(asked[-1])
        answers = [shrink(m) for shrink, m in zip(self.shrink, self.image(image), strict=True)]
        return [fuse(m, q) for fuse, m, q in zip(self.fusions, answers, asked, strict=True)]

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """The fused maps as [batch, dims[i], side / 4, 8, 16, the same]: of the image at the model's own size."""
        return tuple(m.permute(0, 3, 1, 2) for m in self.maps(image))

    def train(self, mode: bool = True) -> ARBEx:
        super().train(mode)
        for name in self.config.frozen:  # their batch norms, too
            getattr(self, name).eval()
        return self

    # learning ---------------------------------------------------------------------------------------------------------

    def reliability(self, embedding: Tensor, logits: Tensor, trust: Tensor | float) -> Balanced:
        """All that balancing knows of these embeddings [batch, dim] and primary logits [batch, classes]."""
        prob = (logits.float() / self.config.temperature).softmax(-1)
        return balance(prob, self.anchors(embedding), self.attention(embedding), trust, self.config.delta)

    def study(self, data: Any) -> None:
        """Weights of the classes in the loss: the inverse of how often training data have them, 1 on average over samples."""
        if not self.config.balanced or not self.config.num_classes:
            return
        train = data.splits["train"]
        labels = getattr(train, "labels", None)
        labels = [train[i]["label"] for i in range(len(train))] if labels is None else labels
        counts = np.bincount(np.asarray(labels), minlength=self.config.num_classes)
        weights = len(labels) / np.maximum(counts, 1) / (counts > 0).sum()
        self.class_weights.copy_(torch.as_tensor(weights))

    def training_stages(self) -> tuple[Stage, ...]:
        moved = ("*",)
        if self.config.frozen:
            parts = {name.split(".")[0] for name, _ in self.named_parameters()} - {*self.config.frozen}
            moved = tuple(glob for p in sorted(parts) for glob in (p, f"{p}.*"))
        return (Stage("reliability balancing", (Turn("loss", moved),)),)

    def after_step(self, step: int, steps: int) -> None:
        self.trust.fill_(self.config.most_trust * step / steps)

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy of the corrected distribution; with growing trust, anchors apart and embeddings at their class's anchors."""
        self._must_classify()
        embedding = self.embedding(self.normalise(batch["image"]))
        out = self.reliability(embedding, self.head(embedding), self.trust)
        log_p = out.corrected.clamp_min(1e-12).log()
        if "target" in batch:
            weighted = batch["target"] * self.class_weights
            classification = -(weighted * log_p).sum() / weighted.sum()
            label = batch["target"].argmax(1)
        else:
            label = batch["label"]
            classification = F.nll_loss(log_p, label, self.class_weights)
        apart = anchor_loss(self.anchors.points.float())
        centre = centre_loss(out.distances, label, out.confidence, self.config.dim)
        first, second, third = self.config.weights
        total = first * classification + self.trust * (second * apart + third * centre)
        return Losses(total, {"classification": classification, "anchor": apart, "centre": centre})

    def predict(self, batch: Batch) -> Expressions:
        """The primary distribution, or (correct=True) the one corrected with the trust that training has reached, none before it."""
        self._must_classify()
        embedding = self.embedding(self.normalise(batch["image"]))
        out = self.reliability(embedding, self.head(embedding), self.trust if self.config.correct else 0.0)
        return Expressions(out.corrected, out.corrected.argmax(-1), out.prob, out.confidence[:, 0], out.distances)

    def _must_classify(self) -> None:
        if not self.config.num_classes:
            raise BadInput("the extractor alone", expected="a classifier", got="num_classes=0", fix="create it with num_classes")

    def no_weight_decay(self) -> set[str]:
        return {"cls_token", "positions", "*.table", "anchors.points"}

    def check_size(self, height: int, width: int) -> None:
        """Any size will do; it is resized."""


def classification_head(dim: int, hidden: tuple[int, ...], classes: int, dropout: float, batch_norm: bool) -> nn.Sequential:
    """Linear, ReLU, BatchNorm, dropout for each hidden width, then Linear: float [batch, dim] -> [batch, classes]."""
    layers: list[nn.Module] = []
    for width in hidden:
        norm = [nn.BatchNorm1d(width)] if batch_norm else []
        layers += [nn.Linear(dim, width), nn.ReLU(), *norm, nn.Dropout(dropout)]
        dim = width
    return nn.Sequential(*layers, nn.Linear(dim, classes))
