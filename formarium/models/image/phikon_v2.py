"""Phikon-v2 (Filiot et al. 2024, arXiv 2409.09173): a ViT-L/16 trained on 460 million histology tiles with DINOv2, and the predictors of
biomarkers that are made on its frozen features.

Tiles: x + g1 attention(LN x), then x + g2 MLP(LN x), with a learned scale g a channel; the class token after the last LayerNorm is the
tile's feature. Pre-training is DINOv2's (Oquab et al. 2023): a student sees two large and eight small crops, half of the large ones with
blocks of patches masked, and learns what its moving average, the teacher, says of another crop (DINO) and of the masked patches (iBOT),
while class tokens are kept apart (KoLeo):  total = DINO + iBOT + 0.1 KoLeo.

Slides: a bag of tile features h_i goes through attention (Ilse et al., ICML 2018), a_i = softmax_i w'(tanh(V h_i) * sigmoid(U h_i)),
and an MLP reads sum a_i h_i. Several such members, each without one fold of the slides, are averaged.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput, UnknownName
from formarium.features import Tap
from formarium.model import Batch, Losses, Stage, Turn, check_tensor
from formarium.nn.attention import SelfAttention, merge_heads, split_heads
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.init import init_transformer
from formarium.nn.mlp import MLP
from formarium.nn.multi_crop import View, make_view
from formarium.nn.schedules import StepSchedule
from formarium.nn.self_distillation import (
    PrototypeHead,
    average_into,
    block_masks,
    centred,
    cosine,
    dino_losses,
    ibot_loss,
    koleo,
    sinkhorn_knopp,
    update_centre,
    warm,
)  # fmt: skip
from formarium.tasks.image_classification.model import ImageClassifier
from formarium.tasks.slide_classification.model import SlideClassifier, SlideLabels

Grid = tuple[int, int]


@dataclass(frozen=True)
class Config:
    level: str = "tile"  # "tile": the encoder, an image classifier (without classes: features); "slide": bags of tiles or of features
    # the tile encoder
    image_size: int = 224
    patch_size: int = 16
    dim: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_ratio: float = 4
    qkv_bias: bool = True
    out_bias: bool = True
    mlp_bias: bool = True
    ffn: str = "mlp"  # or "swiglu", "identity"
    layer_scale: float | None = 1e-5  # what the scales start from; None: no scales
    registers: int = 0
    mask_token: bool = True  # learned, what hidden patches become
    norm_eps: float = 1e-6
    init_std: float = 0.02  # of linear layers at the start
    resize_offset: float = 0.1  # added to the grid before the position table's scale is taken
    resize_antialias: bool = False
    in_channels: int = 3
    num_classes: int = 0  # of tiles (0: features) or of slides (at least 2)
    drop_path: float = 0.0
    drop_path_uniform: bool = True
    dense: bool = False  # the map of the last block, no classifier
    # DINOv2
    pretraining: bool = False  # with teacher and heads; training then starts with DINOv2
    pretraining_share: float = 0.7  # of the steps
    pretraining_tiles: int = 128  # of a batch of slides, at most
    prototypes: int = 65536
    projection: tuple[int, int, int] = (2048, 256, 3)  # hidden width, bottleneck, layers
    separate_heads: bool = False  # iBOT has its own
    global_scale: tuple[float, float] = (0.32, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.32)
    local_crops: int = 8
    local_size: int = 96
    colour: float = 1.0  # of DINO's changes of colour: jitter's strength, the shares of grey and solarised crops
    upside_down: float = 0.0  # the share of crops that are flipped vertically, too
    mask_share: float = 0.5  # of the global crops
    mask_ratio: tuple[float, float] = (0.1, 0.5)
    centring: str = "centring"  # or "sinkhorn_knopp"
    student_temperature: float = 0.1
    teacher_temperature: tuple[float, float, float] = (0.04, 0.07, 0.3)  # from, to, over which share of the steps
    teacher_momentum: tuple[float, float] = (0.992, 1.0)
    weight_decay: tuple[float, float] = (0.04, 0.4)
    layer_decay: float = 0.9  # of the learning rate, from block to block downwards
    patch_rate: float = 0.2  # of the learning rate, for the patch embedding
    freeze_prototypes: float = 0.01  # the share of the steps in which they stand still
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 0.1)  # DINO, iBOT, KoLeo
    probe_lr: float = 1e-3  # of what is trained on frozen features after DINOv2 (Adam)
    # slides
    features: int = 0  # width of ready-made tile features; 0: bags of tile images, through the encoder
    attention: int = 128
    attention_temperature: float = 1.0
    tile_hidden: tuple[int, ...] = ()  # sigmoid layers before the attention
    tile_bias: bool = True
    slide_hidden: tuple[int, ...] = (128, 64)
    slide_dropout: tuple[float, ...] = ()
    activation: str = "relu"
    members: int = 1  # of the ensemble; more than one: each is trained without one fold of the slides


# the tile encoder ---------------------------------------------------------------------------------------------------


class SwiGLU(nn.Module):
    """W3 (silu(W1 x) * W2 x), hidden width two thirds of the MLP's, rounded up to a multiple of 8 (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int, bias: bool = True):
        super().__init__()
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
        self.gates = nn.Linear(dim, 2 * hidden, bias=bias)
        self.out = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.gates(x).chunk(2, -1)
        return self.out(F.silu(gate) * value)


class BareMLP(nn.Module):
    """Linear, GELU, Linear without biases."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def feed_forward(c: Config) -> nn.Module:
    hidden = int(c.dim * c.mlp_ratio)
    match c.ffn:
        case "mlp":
            return MLP(c.dim, hidden) if c.mlp_bias else BareMLP(c.dim, hidden)
        case "swiglu":
            return SwiGLU(c.dim, hidden, c.mlp_bias)
        case "identity":
            return nn.Identity()
    raise UnknownName("ffn", c.ffn, ("mlp", "swiglu", "identity"))


class Block(nn.Module):
    """x + g1 attention(LN x), then x + g2 MLP(LN x). x: float [batch, prefix + h w, dim]."""

    def __init__(self, c: Config, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.attention = SelfAttention(c.dim, c.heads, c.qkv_bias)
        if not c.out_bias:
            self.attention.out = nn.Linear(c.dim, c.dim, bias=False)
        self.norm2 = nn.LayerNorm(c.dim, eps=c.norm_eps)
        self.mlp = feed_forward(c)
        self.scaled = bool(c.layer_scale)
        if self.scaled:
            self.scale1 = nn.Parameter(torch.full((c.dim,), float(c.layer_scale or 0)))
            self.scale2 = nn.Parameter(torch.full((c.dim,), float(c.layer_scale or 0)))
        self.drop = DropPath(drop_path)
        self.tap = Tap(prefix=1 + c.registers)

    def forward(self, x: Tensor, grid: Grid | None, batch: int | None, alone: str = "") -> Tensor:
        """alone: "only" where nothing but the first token is asked for, which saves most of the work unless somebody looks at the others;
        "both" to have all, the first one computed in the same way to the last bit."""
        if not alone or type(self.attention.qkv) is not nn.Linear:
            return self.tap(self._after(x, self.attention(self.norm1(x))), grid=grid, batch=batch)
        h = self.norm1(x)
        first = self._after(x[:, :1], self._first(h))
        if alone == "only" and getattr(self.tap, "watch", None) is None:
            return first
        rest = self._after(x, self.attention(h))[:, 1:]
        return self.tap(torch.cat([first, rest], 1), grid=grid, batch=batch)

    def _after(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual branches: x and what attention gives it, y."""
        x = torch.addcmul(x, self.drop(y), self.scale1) if self.scaled else x + self.drop(y)
        y = self.mlp(self.norm2(x))
        return torch.addcmul(x, self.drop(y), self.scale2) if self.scaled else x + self.drop(y)

    def _first(self, x: Tensor) -> Tensor:
        """What attention gives the first token, [batch, 1, dim]."""
        a, dim = self.attention, x.shape[-1]
        weight, bias = a.qkv.weight, a.qkv.bias
        (q,) = split_heads(F.linear(x[:, :1], weight[:dim], None if bias is None else bias[:dim]), a.heads)
        k, v = split_heads(F.linear(x, weight[dim:], None if bias is None else bias[dim:]), a.heads, 2)
        return a.out(merge_heads(F.scaled_dot_product_attention(q, k, v)))


class Encoder(nn.Module):
    """DINOv2's vision transformer.

    image: normalised float [batch, channels, height, width], sides multiples of the patch; mask: bool [batch, h w], patches to hide.
    slides: into how many bags the taps fold the batch. Returns tokens [batch, 1 + registers + h w, dim] after the last LayerNorm and
    (h, w). alone: as of the last Block; "only" may give the class token by itself, [batch, 1, dim].
    """

    def __init__(self, c: Config):
        super().__init__()
        self.config, self.prefix = c, 1 + c.registers
        side = c.image_size // c.patch_size
        self.grid = (side, side)
        self.embed = nn.Conv2d(c.in_channels, c.dim, c.patch_size, c.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, c.dim))
        self.positions = nn.Parameter(torch.zeros(1, 1 + side * side, c.dim))
        if c.registers:
            self.register_tokens = nn.Parameter(torch.zeros(1, c.registers, c.dim))
        if c.mask_token:
            self.mask_token = nn.Parameter(torch.zeros(1, c.dim))
        self.tokens = Tap(prefix=self.prefix)
        rates = [c.drop_path] * c.depth if c.drop_path_uniform else drop_path_rates(c.drop_path, (c.depth,))[0]
        self.blocks = nn.ModuleList(Block(c, rate) for rate in rates)
        self.norm = nn.LayerNorm(c.dim, eps=c.norm_eps)
        init_transformer(self, c.init_std)
        nn.init.trunc_normal_(self.positions, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if c.registers:
            nn.init.normal_(self.register_tokens, std=1e-6)

    def forward(
        self, image: Tensor, mask: Tensor | None = None, slides: int | None = None, alone: str = ""
    ) -> tuple[Tensor, Grid]:  # fmt: skip
        x = self.embed(image)
        grid = (x.shape[2], x.shape[3])
        x = x.flatten(2).transpose(1, 2)  # b (h w) c
        if mask is not None:
            x = torch.where(mask[..., None], self.mask_token.to(x.dtype), x)  # before its position is added
        positions = self.positions_on(grid)
        x = x + positions[:, 1:]
        prefix = [(self.cls_token + positions[:, :1]).expand(x.shape[0], -1, -1)]
        if self.config.registers:
            prefix.append(self.register_tokens.expand(x.shape[0], -1, -1))
        x = torch.cat([*prefix, x], 1)
        shown = grid if slides is None else None
        x = self.tokens(x, grid=shown, batch=slides)
        for i, block in enumerate(self.blocks):
            x = block(x, shown, slides, alone if i == len(self.blocks) - 1 else "")
        return self.norm(x), grid

    def positions_on(self, grid: Grid) -> Tensor:
        """The position table [1, 1 + h w, dim] on a grid; the class token's entry is never resized."""
        if grid == self.grid:
            return self.positions
        table = self.positions[:, 1:].float().transpose(1, 2).unflatten(2, self.grid)
        offset = self.config.resize_offset
        scale = [(new + offset) / old for new, old in zip(grid, self.grid, strict=True)]
        where: dict[str, Any] = {"scale_factor": scale} if offset else {"size": grid}
        table = F.interpolate(table, mode="bicubic", antialias=self.config.resize_antialias, **where)
        return torch.cat([self.positions[:, :1], table.flatten(2).transpose(1, 2).to(self.positions.dtype)], 1)


# DINOv2 -------------------------------------------------------------------------------------------------------------


class SelfDistillation(nn.Module):
    """What DINOv2 needs beside the student: its projection heads, the teacher, the centres, and how far training has come (0 to 1)."""

    def __init__(self, c: Config, student: Encoder):
        super().__init__()
        hidden, bottleneck, layers = c.projection
        self.head = PrototypeHead(c.dim, c.prototypes, hidden, bottleneck, layers, std=c.init_std)
        self.patch_head = PrototypeHead(c.dim, c.prototypes, hidden, bottleneck, layers, std=c.init_std) if c.separate_heads else None
        self.teacher = copy.deepcopy(student)
        self.teacher_head, self.teacher_patch_head = copy.deepcopy(self.head), copy.deepcopy(self.patch_head)
        for block in self.teacher.blocks:
            block.drop = DropPath(0.0)
        for m in self.teacher.modules():  # nobody looks into the teacher
            for name, child in [*m.named_children()]:
                if isinstance(child, Tap):
                    setattr(m, name, _Untapped())
        self.register_buffer("centre", torch.zeros(1, c.prototypes))
        self.register_buffer("patch_centre", torch.zeros(1, 1, c.prototypes))
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        for p in [*self.teacher.parameters(), *self.teacher_head.parameters()]:
            p.requires_grad_(False)
        if self.teacher_patch_head is not None:
            self.teacher_patch_head.requires_grad_(False)

    def pairs(self, student: Encoder) -> list[tuple[Tensor, Tensor]]:
        """(the teacher's, the student's) parameters."""
        found = [*zip(self.teacher.parameters(), student.parameters(), strict=True)]
        found += zip(self.teacher_head.parameters(), self.head.parameters(), strict=True)
        if self.patch_head is not None and self.teacher_patch_head is not None:
            found += zip(self.teacher_patch_head.parameters(), self.patch_head.parameters(), strict=True)
        return found


class _Untapped(nn.Module):
    def forward(self, x: Tensor, **place: Any) -> Tensor:
        return x


def dinov2_losses(
    teacher_cls: Tensor, teacher_patch: Tensor, student_global: Tensor, student_local: Tensor, student_patch: Tensor, tokens: Tensor,
    masks: Tensor, student_temperature: float = 0.1, weights: Sequence[float] = (1.0, 1.0, 0.1),
) -> Losses:  # fmt: skip
    """The whole objective on what the networks said.

    teacher_cls: probabilities [2, images, K], crop by crop; teacher_patch: probabilities [masked, K]; student_*: logits, global [2, images,
    K], local [crops, images, K], patch [masked, K]; tokens: the student's class tokens of the global crops [2, images, dim], before
    the head; masks: bool [2 images, patches].
    """
    over, within = dino_losses(student_global, student_local, teacher_cls, student_temperature)
    spread = weights[2] * sum(koleo(crop) for crop in tokens)  # crop by crop, so that two views of an image never repel each other
    masked = ibot_loss(student_patch, teacher_patch, masks, student_temperature)
    total = weights[0] * (over + within) + weights[1] * masked + spread
    return Losses(total, {"dino_local": within, "dino_global": over, "koleo": spread, "ibot": masked})


class DINOv2:
    """The pre-training stage, for whatever has an `encoder`, a `config` and `images_of(batch)` (float [n, 3, h, w] in [0, 1])."""

    encoder: Encoder
    pretraining: SelfDistillation | None
    config: Any
    phase: str = ""
    _before: Sequence[tuple[Tensor, Tensor, float]] = ()
    _schedule: StepSchedule | None = None

    def make_pretraining(self) -> None:
        self.pretraining = SelfDistillation(self.config, self.encoder) if self.config.pretraining else None

    def start_pretraining(self) -> None:
        """The teacher starts as the student."""
        p = self.pretraining
        assert p is not None
        self.phase = "pre-train"
        with torch.no_grad():
            for teacher, student in p.pairs(self.encoder):
                teacher.copy_(student)
            for buffer in (p.centre, p.patch_centre, p.progress):
                buffer.zero_()
        if self._schedule is not None:
            self._schedule.off()
        moved = [q for q in [*self.encoder.parameters(), *p.head.parameters()] if q.requires_grad]
        self._schedule = StepSchedule(moved, self.set_weight_decay)
        self.train(self.training)  # type: ignore[attr-defined]

    def start_probe(self) -> None:
        """From now on the encoder is the teacher, as released, and stands still."""
        p = self.pretraining
        assert p is not None
        self.phase, self._before = "probe", ()
        if self._schedule is not None:
            self._schedule.off()
            self._schedule = None
        with torch.no_grad():
            for mine, teacher in zip(self.encoder.parameters(), p.teacher.parameters(), strict=True):
                mine.copy_(teacher)
        self.train(self.training)  # type: ignore[attr-defined]

    def set_weight_decay(self, optimiser: torch.optim.Optimizer, group: dict[str, Any]) -> None:
        """Half a cosine between the config's two; groups without weight decay stay without."""
        if group["weight_decay"] and self.pretraining is not None:
            group["weight_decay"] = cosine_at(float(self.pretraining.progress), self.config.weight_decay)

    def settle(self) -> None:
        """What never trains stays in evaluation mode."""
        if self.pretraining is not None:
            for m in (self.pretraining.teacher, self.pretraining.teacher_head, self.pretraining.teacher_patch_head):
                if m is not None:
                    m.eval()
            if self.phase == "probe":
                self.encoder.eval()

    def pretraining_loss(self, batch: Batch) -> Losses:
        """DINO on class tokens, iBOT on masked patches, KoLeo; views and masks are made here."""
        p, c = self.pretraining, self.config
        assert p is not None
        self._remember()
        images = self.images_of(batch)  # type: ignore[attr-defined]
        n = len(images)
        strength = tuple(c.colour * s for s in View.strength)
        how: dict[str, Any] = {"vertical_flip": c.upside_down, "strength": strength, "grey": 0.2 * c.colour}
        first = View(c.image_size, c.global_scale, blur=1.0, **how)
        second = View(c.image_size, c.global_scale, blur=0.1, solarise=0.2 * c.colour, **how)
        over = self.normalise(torch.cat([make_view(images, v) for v in (first, second)]))  # type: ignore[attr-defined]
        small = View(c.local_size, c.local_scale, blur=0.5, **how)
        rng = np.random.default_rng(int(torch.randint(2**31, ())))
        side = c.image_size // c.patch_size
        masks = torch.from_numpy(block_masks(2 * n, (side, side), rng, c.mask_share, c.mask_ratio)).to(images.device)
        progress = float(p.progress)
        with torch.no_grad():
            said, _ = p.teacher(over)
            cls, patches = said[:, 0], said[:, p.teacher.prefix :][masks]
            cls_logits, patch_logits = self._project(p.teacher_head, p.teacher_patch_head, cls, patches)
            cls_target, patch_target = self._targets(cls_logits, patch_logits, progress)
        seen, _ = self.encoder(over, masks)
        rows = [seen[:, 0], seen[:, self.encoder.prefix :][masks]]
        if c.local_crops:
            within = self.normalise(make_view(images.repeat(c.local_crops, 1, 1, 1), small))  # type: ignore[attr-defined]
            rows[0] = torch.cat([rows[0], self.encoder(within, alone="only")[0][:, 0]])
        logits, patch_said = self._project(p.head, p.patch_head, *rows)
        return dinov2_losses(
            cls_target.unflatten(0, (2, n)), patch_target, logits[: 2 * n].unflatten(0, (2, n)),
            logits[2 * n :].unflatten(0, (c.local_crops, n)), patch_said, seen[:, 0].unflatten(0, (2, n)), masks,
            c.student_temperature, c.loss_weights,
        )  # fmt: skip

    @staticmethod
    def _project(head: nn.Module, patch_head: nn.Module | None, cls: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        if patch_head is not None:
            return head(cls), patch_head(patches)
        both = head(torch.cat([cls, patches]))  # one product for both
        return both[: len(cls)], both[len(cls) :]

    def _targets(self, cls: Tensor, patches: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        p, (start, end, warmup) = self.pretraining, self.config.teacher_temperature
        assert p is not None
        temperature = warm_at(progress, warmup, start, end)
        if self.config.centring == "sinkhorn_knopp":
            return sinkhorn_knopp(cls, temperature), sinkhorn_knopp(patches, temperature) if len(patches) else patches
        out = centred(cls, p.centre, temperature), centred(patches, p.patch_centre[0], temperature)
        if self.training:  # type: ignore[attr-defined]
            update_centre(p.centre, cls)
            update_centre(p.patch_centre, patches)
        return out

    # what a step is followed by: rates that differ from layer to layer, and the teacher

    def rate_of(self, name: str) -> float:
        """The share of the learning rate that a parameter of the encoder gets, by its name there."""
        c = self.config
        if name.startswith("blocks."):
            return c.layer_decay ** (c.depth - int(name.split(".")[1]))
        if name.startswith("norm."):
            return 1.0
        return c.layer_decay ** (c.depth + 1) * (c.patch_rate if name.startswith("embed.") else 1.0)

    def _remember(self) -> None:
        """Weights before the step; after it, each has gone its share of the way that the optimiser took it."""
        if self.phase != "pre-train" or not self.training:  # type: ignore[attr-defined]
            return
        p = self.pretraining
        assert p is not None
        rates = [(q, self.rate_of(name)) for name, q in self.encoder.named_parameters()]
        if float(p.progress) < self.config.freeze_prototypes:
            rates += [(h.direction, 0.0) for h in (p.head, p.patch_head) if h is not None]
        self._before = [(q, q.detach().clone(), rate) for q, rate in rates if rate != 1]

    @torch.no_grad()
    def pretraining_step(self, step: int, steps: int) -> None:
        p = self.pretraining
        if p is None or self.phase != "pre-train":
            return
        for q, before, rate in self._before:
            q.copy_(torch.lerp(before, q, rate))
        self._before = ()
        span = max(1, round(steps * self.config.pretraining_share))
        momentum = cosine_at((step - 1) / span, self.config.teacher_momentum)
        teachers, students = zip(*p.pairs(self.encoder), strict=True)
        average_into(teachers, students, momentum)
        p.progress.fill_(min(1.0, step / span))

    def pretraining_stages(self, then: tuple[str, ...]) -> tuple[Stage, ...]:
        heads = ("pretraining.head.*", "pretraining.patch_head.*")
        first = Stage("pre-train", (Turn("pretraining_loss", ("encoder.*", *heads)),), self.config.pretraining_share, "start_pretraining")
        recipe = {"optimizer": "adam", "lr": self.config.probe_lr, "weight_decay": 0.0, "clip_grad": None}
        probe = Stage("probe", (Turn("loss", then, recipe=recipe),), share=1 - self.config.pretraining_share, prepare="start_probe")
        return first, probe


def cosine_at(progress: float, ends: Sequence[float]) -> float:
    return cosine(round(progress * 2**20), 2**20, ends[0], ends[1])


def warm_at(progress: float, warmup: float, start: float, end: float) -> float:
    return warm(round(progress * 2**20), round(warmup * 2**20), start, end)


# tiles --------------------------------------------------------------------------------------------------------------


class PhikonV2(DINOv2, ImageClassifier):
    """The tile encoder: features [batch, dim] of tiles, or with `num_classes` logits. With Config.level "slide" calling this class makes a
    PhikonSlides instead."""

    Config = Config  # type: ignore[misc, assignment]
    pretraining: SelfDistillation | None

    def __new__(cls, config: Config | None = None) -> Any:
        if cls is PhikonV2 and config is not None and config.level == "slide":
            return PhikonSlides(config)
        return super().__new__(cls)

    def __init__(self, config: Config):
        _check(config)
        super().__init__(config)
        self.encoder = Encoder(config)
        self.features = Tap(prefix=self.encoder.prefix)
        if config.num_classes and not config.dense:
            self.head = nn.Linear(config.dim, config.num_classes)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
        self.make_pretraining()

    def forward(self, image: Tensor, mask: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        """Normalised image [batch, channels, height, width] to logits [batch, classes], class token features [batch, dim], or the map."""
        if self.config.dense:
            return self.pyramid(image)
        x = self.class_token(image, mask)
        return self.head(x) if self.config.num_classes else x

    def class_token(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """The features of tiles, [batch, dim]."""
        if self.features.watch is not None:
            x, grid = self.encoder(image, mask, alone="both")
            return self.features(x, grid=grid)[:, 0]
        return self.encoder(image, mask, alone="only")[0][:, 0]

    def tokens_of(self, image: Tensor, mask: Tensor | None = None) -> Tensor:
        """All tokens after the last LayerNorm, [batch, 1 + registers + h w, dim]."""
        x, grid = self.encoder(image, mask)
        return self.features(x, grid=grid)

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        """The last block's patches as one map [batch, dim, h, w]."""
        x, grid = self.encoder(image)
        x = self.features(x, grid=grid)
        return (x[:, self.encoder.prefix :].transpose(1, 2).unflatten(2, grid),)

    def loss(self, batch: Batch) -> Losses:
        if self.phase != "probe":
            return super().loss(batch)
        with torch.no_grad():
            x = self.class_token(self.normalise(batch["image"]))
        return self.classification_loss(self.head(x), batch)

    def images_of(self, batch: Batch) -> Tensor:
        return batch["image"]

    def training_stages(self) -> Sequence[Stage]:
        return super().training_stages() if self.pretraining is None else self.pretraining_stages(("head.*",))

    def after_step(self, step: int, steps: int) -> None:
        self.pretraining_step(step, steps)

    def train(self, mode: bool = True) -> PhikonV2:
        super().train(mode)
        self.settle()
        return self

    def _must_classify(self) -> None:
        super()._must_classify()
        if not self.config.num_classes:
            raise BadInput("a feature extractor", expected="classes", got="num_classes=0", fix="create it with num_classes=...")

    def check_input(self, image: Any, mask: Any = None) -> None:
        super().check_input(image)
        if mask is not None:
            grid = (image.shape[2] // self.config.patch_size) * (image.shape[3] // self.config.patch_size)
            check_tensor("mask", mask, "batch patches", sizes={0: len(image), 1: grid}, dtype=lambda d: d == torch.bool)

    def check_size(self, height: int, width: int) -> None:
        check_size(height, width, self.config.patch_size)


def check_size(height: int, width: int, patch: int) -> None:
    if height % patch or width % patch or not height or not width:
        raise BadInput("image size", expected=f"multiples of {patch}", got=f"{height}x{width}", fix="resize or crop the image")


def _check(c: Config) -> None:
    if c.level not in ("tile", "slide"):
        raise UnknownName("level", c.level, ("tile", "slide"))
    if c.centring not in ("centring", "sinkhorn_knopp"):
        raise UnknownName("centring", c.centring, ("centring", "sinkhorn_knopp"))
    if c.pretraining and not c.mask_token:
        raise BadInput("mask_token", expected="true for pre-training", got="false")
    if not c.features and c.image_size % c.patch_size:
        raise BadInput("image_size", expected=f"a multiple of the patch, {c.patch_size}", got=str(c.image_size))


# slides -------------------------------------------------------------------------------------------------------------

ACTIVATIONS: Mapping[str, Any] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "gelu": nn.GELU, "tanh": nn.Tanh}


class ABMIL(nn.Module):
    """Gated attention pooling and an MLP.

    x: float [batch, tiles, features]; mask: bool [batch, tiles], which are real. Returns logits [batch, out] and attention [batch, tiles],
    summing to 1 over real tiles and 0 on others. `scores` are the attention's logits.
    """

    def __init__(self, c: Config, features: int, out: int):
        super().__init__()
        if c.activation not in ACTIVATIONS:
            raise UnknownName("activation", c.activation, ACTIVATIONS)
        if c.slide_dropout and len(c.slide_dropout) != len(c.slide_hidden):
            raise BadInput("slide_dropout", expected=f"{len(c.slide_hidden)} rates, one a hidden layer", got=str(len(c.slide_dropout)))
        widths = [features, *c.tile_hidden, c.attention]
        self.embed = nn.ModuleList(nn.Linear(a, b, bias=c.tile_bias) for a, b in pairwise(widths))
        self.value, self.gate = nn.Linear(c.attention, c.attention), nn.Linear(c.attention, c.attention)
        self.weight = nn.Linear(c.attention, 1)
        self.temperature = c.attention_temperature
        widths = [c.attention, *c.slide_hidden]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.out = nn.Linear(widths[-1], out)
        self.activation = ACTIVATIONS[c.activation]()
        self.dropout = nn.ModuleList(nn.Dropout(rate) for rate in c.slide_dropout or (0.0,) * len(c.slide_hidden))

    def embedded(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.embed):
            x = layer(x) if i == 0 else layer(x.sigmoid())
        return x

    def scores(self, h: Tensor) -> Tensor:
        """float [batch, tiles] of embedded tiles [batch, tiles, attention]."""
        return self.weight(self.value(h).tanh() * self.gate(h).sigmoid())[..., 0] / self.temperature

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        h = self.embedded(x)
        attention = self.scores(h).masked_fill(~mask, -math.inf).softmax(1)
        slide = (attention[:, None] @ h)[:, 0]
        for layer, dropout in zip(self.hidden, self.dropout, strict=True):
            slide = dropout(self.activation(layer(slide)))
        return self.out(slide), attention


class PhikonSlides(DINOv2, SlideClassifier):
    """A slide's label from its tiles: frozen encoder (or ready-made features), then one ABMIL or an ensemble of them."""

    Config = Config  # type: ignore[misc, assignment]
    pretraining: SelfDistillation | None

    def __init__(self, config: Config):
        _check(config)
        super().__init__(config)
        self.classes = max(2, config.num_classes)
        out = 1 if self.classes == 2 else self.classes
        self.pretraining = None
        if not config.features:
            self.encoder = Encoder(config)
            self.make_pretraining()
        self.features = Tap()
        width = config.features or config.dim
        self.members = nn.ModuleList(ABMIL(config, width, out) for _ in range(config.members))

    def forward(self, tiles: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Tiles [batch, tiles, channels, height, width], normalised, or features [batch, tiles, features]; mask: bool [batch, tiles], which
        are real. Returns logits [batch, members, out] (out is 1 for two classes) and attention [batch, members, tiles], 0 on padding."""
        return self.judge(self.tile_features(tiles, mask), mask)

    def tile_features(self, tiles: Tensor, mask: Tensor | None = None) -> Tensor:
        """The class token of every tile, [batch, tiles, dim]."""
        x = tiles
        if not self.config.features:
            x = self.encoder(tiles.flatten(0, 1), slides=tiles.shape[0], alone="only")[0][:, 0].unflatten(0, tiles.shape[:2])
        return self.features(x, mask=mask)

    def judge(self, features: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        answers = [member(features, mask) for member in self.members]
        return torch.stack([a[0] for a in answers], 1), torch.stack([a[1] for a in answers], 1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """float [..., classes] of logits [..., out]."""
        if self.classes > 2:
            return logits.softmax(-1)
        p = logits.sigmoid()
        return torch.cat([1 - p, p], -1)

    def predict(self, batch: Batch) -> SlideLabels:
        """The mean of the members' probabilities."""
        logits, attention = self.forward_batch(batch)
        p = self.probabilities(logits.float()).mean(1)
        return SlideLabels(p, p.argmax(-1), attention.float().mean(1))

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy of every member, on the slides that are not in the fold it leaves out. The encoder stands still."""
        tiles, mask = self.inputs_of(batch)
        with torch.set_grad_enabled(False):
            features = self.tile_features(tiles, mask)
        logits = self.judge(features, mask)[0].float()  # b members out
        label, members = batch["label"], self.config.members
        if self.classes > 2:
            each = F.cross_entropy(logits.flatten(0, 1), label.repeat_interleave(members), reduction="none").view(len(label), members)
        else:
            target = label.to(logits.dtype)[:, None].expand(-1, members)
            each = F.binary_cross_entropy_with_logits(logits[..., 0], target, reduction="none")
        weight = self.learns_from(batch).to(each)
        loss = ((each * weight).sum(0) / weight.sum(0).clamp_min(1)).sum()
        return Losses(loss, {"cross_entropy": loss / members})

    def learns_from(self, batch: Batch) -> Tensor:
        """bool [batch, members]: member m leaves out the slides of fold m. A slide's fold is decided by its patient (or its own name)."""
        names, members = batch.get("patient") or batch["id"], self.config.members
        if members == 1:
            return torch.ones(len(names), 1, dtype=torch.bool, device=batch["label"].device)
        fold = torch.tensor([fold_of(name, members) for name in names], device=batch["label"].device)
        return fold[:, None] != torch.arange(members, device=fold.device)

    def images_of(self, batch: Batch) -> Tensor:
        """Some of the batch's real tiles."""
        tiles = batch["tiles"][batch["mask"]]
        most = self.config.pretraining_tiles
        return tiles if len(tiles) <= most else tiles[torch.randperm(len(tiles), device=tiles.device)[:most]]

    def training_stages(self) -> Sequence[Stage]:
        if self.pretraining is not None:
            return self.pretraining_stages(("members.*",))
        return (Stage(turns=(Turn(train=("members.*",)),)),)

    def after_step(self, step: int, steps: int) -> None:
        self.pretraining_step(step, steps)

    def check_size(self, height: int, width: int) -> None:
        check_size(height, width, self.config.patch_size)

    def train(self, mode: bool = True) -> PhikonSlides:
        super().train(mode)
        self.settle()
        if not self.config.features and self.pretraining is None:
            self.encoder.eval()
        return self


def fold_of(name: Any, folds: int) -> int:
    """The same fold for the same name, everywhere."""
    return zlib.crc32(str(name).encode()) % folds
