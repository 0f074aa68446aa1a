"""SiT: Self-supervised vIsion Transformer (Atito, Awais and Kittler, arXiv 2104.03602), as its code is: group masked model learning.

Two views of each image are corrupted: rectangles are blanked, or filled from another image of the batch, until about half is gone. A
student sees the corrupted views and must say two things of them:

    L = L_c + lambda L_r,   L_r = mean |x' - x| over corrupted pixels,
    L_c = 2 t [CE(q_1 k_2^T / t) + CE(q_2 k_1^T / t)],   q: student on corrupted views, k: teacher on clean ones, both of length 1,

x' painted by a few layers from the last features, q and k by a projection of the pooled feature. The teacher is the student's moving
average and gets no gradient. Corruption happens to pixels, so any backbone whose last features lie on a grid can be student. Then a
classifier is fine-tuned: on a ViT a small MLP on the class token beside the patches' mean, on others the head they have.
Code: github.com/Sara-Ahmed/SiT.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from formarium.errors import BadInput, UnknownName
from formarium.features import Feature, Features, taps, watching
from formarium.method import Method
from formarium.methods.wrapping import Wrapped, finish, make_trunk, shapes, trunk_fields, why_not
from formarium.model import Batch, Losses, Model, Stage, Turn
from formarium.nn.drop import DropPath
from formarium.nn.init import init_transformer
from formarium.nn.views import View
from formarium.tasks.image_classification.model import ImageClassifier, Labels
from formarium.tasks.image_classification.trunks import ViT

FILLERS = ("zeros", "noise", "elsewhere")  # what corrupted rectangles hold; elsewhere: another place of the same image
LARGEST = 0.3  # side of a rectangle, as a share of the image's


# corruption ---------------------------------------------------------------------------------------------------------


def corrupt(
    clean: Tensor,
    share: float = 0.5,
    filler: str = "zeros",
    others: Tensor | None = None,
    swap: float = 0.5,
    swap_share: float = 0.3,
    align: int = 1,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Group masking: rectangles until enough of each image is covered. Returns (corrupted images, mask float [batch, 1, h, w], 1 where
    touched).

    clean: normalised [batch, channels, h, w]. share: of the pixels, at most; what is drawn lies between min(0.5, share) and it. filler:
    one of
    FILLERS. others: images to paste from, at the same places, into a share `swap` of the images, of which then swap_share is covered.
    align: corners and sides are multiples of it (the patch size: whole patches).
    """
    n, _, h, w = clean.shape
    kind = {"device": clean.device}

    def uniform() -> Tensor:
        return torch.rand(n, generator=generator, **kind)  # type: ignore[call-overload]

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), (n,), generator=generator, **kind)  # type: ignore[call-overload]

    swapped = uniform() < swap if others is not None else torch.zeros(n, dtype=torch.bool, **kind)
    most = torch.where(swapped, swap_share, share)
    goal = torch.lerp(most.clamp(max=0.5), most, uniform()) * (h * w)
    rows, columns = (torch.arange(side, **kind) for side in (h, w))
    mask, out = torch.zeros(n, h, w, dtype=torch.bool, **kind), clean
    align = max(1, align)
    while (short := mask.sum((1, 2)) < goal).any():
        top, left = (integers(0, side - align) // align * align for side in (h, w))
        height, width = (
            (torch.minimum(integers(align, int(side * LARGEST)), side - start) / align).round().long() * align
            for side, start in ((h, top), (w, left))
        )
        down = (rows >= top[:, None]) & (rows < (top + height)[:, None]) & short[:, None]
        across = (columns >= left[:, None]) & (columns < (left + width)[:, None])
        inside = down[:, :, None] & across[:, None]
        mask |= inside
        if filler == "elsewhere":
            away = [(uniform() * (side - size).clamp(min=1)).long() // align * align - start
                    for side, size, start in ((h, height, top), (w, width, left))]  # fmt: skip
            at = (rows + away[0][:, None]).clamp(0, h - 1)[:, :, None] * w + (columns + away[1][:, None]).clamp(0, w - 1)[:, None]
            moved = out.flatten(2).gather(2, at.flatten(1)[:, None].expand(-1, out.shape[1], -1)).view_as(out)
            out = torch.where(inside[:, None], moved, out)
    if filler != "elsewhere":
        fill = torch.zeros_like(clean) if filler == "zeros" else torch.empty_like(clean).normal_(generator=generator)
        out = torch.where(mask[:, None], fill, clean)
    if others is not None:
        pasted = torch.where(mask[:, None], others, clean)
        out = torch.where(swapped.view(-1, 1, 1, 1), pasted, out)
    return out, mask[:, None].to(clean.dtype)


# losses -------------------------------------------------------------------------------------------------------------


def contrastive_loss(student: Tensor, teacher: Tensor, temperature: float = 0.2) -> Tensor:
    """Each of a view's vectors must find the other view's among the batch's. student, teacher: float [2 batch, dim], view after view."""
    q, k = F.normalize(student.float(), dim=1), F.normalize(teacher.detach().float(), dim=1)
    (q1, q2), (k1, k2) = q.chunk(2), k.chunk(2)
    own = torch.arange(len(q1), device=q.device)
    return 2 * temperature * (F.cross_entropy(q1 @ k2.T / temperature, own) + F.cross_entropy(q2 @ k1.T / temperature, own))


def masked_difference(rebuilt: Tensor, clean: Tensor, mask: Tensor) -> Tensor:
    """Mean absolute difference over the corrupted pixels. mask: 1 there, [batch, 1 or channels, h, w]."""
    mask = mask.expand_as(clean)
    return ((rebuilt - clean).abs() * mask).sum() / mask.sum()


# heads --------------------------------------------------------------------------------------------------------------


def projection(dim: int, out: int, hidden: int = 4096, layers: int = 3) -> nn.Sequential:
    """Pooled feature [batch, dim] to what is compared, [batch, out]: linear layers with batch norm; ReLU after the first, then GELU."""
    if layers <= 1:
        return nn.Sequential(nn.Linear(dim, out))
    found: list[nn.Module] = [nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
    for _ in range(layers - 2):
        found += [nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden), nn.GELU()]
    return nn.Sequential(*found, nn.Linear(hidden, out), nn.BatchNorm1d(out, affine=False))


class Rebuild(nn.Module):
    """Features [batch, dim, h, w] to pixels [batch, channels, h * stride, w * stride]: three layers a token, then a patch painted by
    each."""

    def __init__(self, dim: int, channels: int, stride: tuple[int, int]):
        super().__init__()
        self.mlp = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(dim, dim), nn.GELU())))
        self.paint = nn.ConvTranspose2d(dim, channels, stride, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.paint(self.mlp(x.movedim(1, -1)).movedim(-1, 1))


def last_features(trunk: ImageClassifier) -> str:
    """The tap before the head (of several the last)."""
    found = [*taps(trunk, "*features*")]
    if not found:
        raise BadInput(type(trunk).__name__, expected="a tap before its head (*features*)", got="none")
    return found[-1]


def features(trunk: ImageClassifier, image: Tensor, place: str) -> Feature:
    """What a forward passes at a tap."""
    if isinstance(trunk, ViT):
        x, grid = trunk.embedded(image)
        for block in trunk.blocks:
            x = block(x, grid)
        return Feature(trunk.features(trunk.norm(x), grid=grid), grid, trunk.cls_token.shape[1])
    found = Features()
    with watching(trunk, {place: None}, found, {place: taps(trunk)[place]}, {}):
        nn.Module.__call__(trunk, image)
    return found[place]


class Teacher(nn.Module):
    """The moving average of a trunk and its projection: copies that hold buffers, no parameters, and drop nothing in training."""

    def __init__(self, trunk: ImageClassifier, project: nn.Module, place: str):
        super().__init__()
        self.trunk, self.project, self.place = copy.deepcopy(trunk), copy.deepcopy(project), place
        for m in self.modules():
            if isinstance(m, DropPath):
                m.rate = 0.0
            elif isinstance(m, nn.Dropout):
                m.p = 0.0
            for name, p in [*m._parameters.items()]:
                if p is not None:
                    del m._parameters[name]
                    m.register_buffer(name, p.detach().clone())

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        return self.project(features(self.trunk, image, self.place).pooled())

    @torch.no_grad()
    def follow(self, trunk: nn.Module, project: nn.Module, momentum: float) -> None:
        """momentum * self + (1 - momentum) * student, of parameters only; batch norms keep statistics of their own."""
        for mine, student in ((self.trunk, trunk), (self.project, project)):
            own = dict(mine.named_buffers())
            for name, p in student.named_parameters(remove_duplicate=False):
                own[name].lerp_(p.detach().to(own[name].dtype), 1 - momentum)


# the model ----------------------------------------------------------------------------------------------------------


class Pretext(NamedTuple):
    """contrastive: float [batch, out_dim]. reconstruction: normalised images [batch, channels, h, w]."""

    contrastive: Tensor
    reconstruction: Tensor


class SelfSupervised(Wrapped):
    """A trunk with SiT's two pretext heads, its teacher, and a classifier."""

    @dataclass(frozen=True)
    class Config(Wrapped.Config):
        num_classes: int = 0  # 0: pretext only, forward then gives its answers
        pretext: bool = True  # False: the fine-tuned classifier alone
        out_dim: int = 256
        head_hidden: int = 4096
        head_layers: int = 3
        temperature: float = 0.2
        reconstruction_weight: float = 1.0  # lambda; the authors advise 5 for small data
        momentum: float = 0.996  # of the teacher, rising to 1 by a cosine
        pretraining_share: float = 0.5  # of a fit's steps
        drop_share: float = 0.5
        swap_share: float = 0.3
        align: int = 1
        fillers: tuple[str, ...] = ("zeros",)  # one is drawn a batch
        crop_scale: tuple[float, float] = (0.2, 1.0)
        hflip: float = 0.5
        colours: float = 1.0  # strength of jitter, grey and solarisation; 0: none

    def __init__(self, config: Config, trunk: ImageClassifier | None = None):
        super().__init__(config, headless(trunk) if trunk is not None else _made(config))
        c, self.place = config, last_features(self.trunk)
        for filler in c.fillers:
            if filler not in FILLERS:
                raise UnknownName("filler", filler, FILLERS)
        (feature,) = shapes(self.trunk, [self.place])
        dim, (h, w), grid = feature.tokens.shape[2], self.image_size, feature.grid
        assert grid is not None
        self.head: nn.Module | None = None
        if isinstance(self.trunk, ViT) and c.num_classes:
            self.head = nn.Sequential(nn.Linear(2 * dim, dim), nn.GELU(), nn.Linear(dim, c.num_classes))
            init_transformer(self.head)
        if c.pretext:
            self.project = projection(dim, c.out_dim, c.head_hidden, c.head_layers)
            self.rebuild = Rebuild(dim, c.in_channels, (h // grid[0], w // grid[1]))
            init_transformer(self.project)
            init_transformer(self.rebuild)
            self.teacher = Teacher(self.trunk, self.project, self.place)
        jitter = tuple(c.colours * s for s in (0.4, 0.4, 0.2, 0.1))
        common: dict[str, Any] = {
            "crop_scale": tuple(c.crop_scale),
            "hflip": c.hflip,
            "jitter": jitter,
            "grey_probability": 0.2 * c.colours,
        }
        self.views = (View(**common), View(**common, blur_probability=0.1, solarise_probability=0.2 * c.colours))

    def forward(self, image: Tensor) -> Any:
        """Normalised image [batch, channels, height, width] to logits [batch, classes], or without classes to the pretext's answers."""
        if not self.config.num_classes:
            return self.pretext(image)
        if self.head is None:
            return self.trunk(image)
        feature = features(self.trunk, image, self.place)
        return self.head(torch.cat([feature.pooled(), feature.tokens[:, feature.prefix :].mean(1)], 1))

    def predict(self, batch: Batch) -> Labels:
        if not self.config.num_classes:
            raise BadInput("a pretext model", expected="one with classes", got="num_classes=0", fix="create it with num_classes=...")
        return super().predict(batch)

    def pretext(self, image: Tensor) -> Pretext:
        feature = features(self.trunk, image, self.place)
        return Pretext(self.project(feature.pooled()), self.rebuild(feature.map()))

    def pretraining_loss(self, batch: Batch) -> Losses:
        """Contrast and reconstruction of two corrupted views, made here."""
        c = self.config
        image = batch["image"]
        views = [self.normalise(view(image)) for view in self.views]
        pairs = []
        for clean in views:
            filler = c.fillers[int(torch.randint(len(c.fillers), ()))]
            others = clean[torch.randint(len(clean), (len(clean),), device=clean.device)]
            pairs.append(corrupt(clean, c.drop_share, filler, others, 0.5, c.swap_share, c.align))
        clean, corrupted, mask = torch.cat(views), torch.cat([p[0] for p in pairs]), torch.cat([p[1] for p in pairs])
        target, out = self.teacher(clean), self.pretext(corrupted)
        contrast = contrastive_loss(out.contrastive, target, c.temperature)
        rebuilt = masked_difference(out.reconstruction.float(), clean, mask)
        return Losses(contrast + c.reconstruction_weight * rebuilt, {"contrastive": contrast, "reconstruction": rebuilt})

    # training ---------------------------------------------------------------------------------------------------------

    def training_stages(self) -> Sequence[Stage]:
        share = self.config.pretraining_share if self.config.pretext else 0.0
        pre = Stage("pre-train", (Turn("pretraining_loss", ("trunk.*", "project.*", "rebuild.*")),), share, prepare="start_teacher")
        tune = Stage("fine-tune", (Turn("loss", ("trunk.*", "head.*")),), 1 - share)
        return ([pre] if share else []) + ([tune] if self.config.num_classes and share < 1 else [])

    def start_teacher(self) -> None:
        """The teacher starts as the student is, whatever weights that has been given."""
        self.teacher.follow(self.trunk, self.project, 0.0)

    def after_step(self, step: int, steps: int) -> None:
        super().after_step(step, steps)
        stages = self.training_stages()
        span = round(steps * stages[0].share / sum(s.share for s in stages)) if self.config.pretext else 0
        if step <= span and stages[0].prepare:
            self.teacher.follow(self.trunk, self.project, 1 - (1 - self.config.momentum) * (1 + math.cos(math.pi * (step - 1) / span)) / 2)


def headless(trunk: ImageClassifier) -> ImageClassifier:
    """A ViT without its classifier, the same weights in it; any other trunk as it is."""
    if not isinstance(trunk, ViT) or not trunk.config.num_classes:
        return trunk
    made = ViT(replace(trunk.config, num_classes=0)).to(trunk.device)
    made.load_state_dict({k: v for k, v in trunk.state_dict().items() if not k.startswith("head")})
    made.preprocessing = trunk.preprocessing
    return made


def _made(config: SelfSupervised.Config) -> ImageClassifier:
    return make_trunk(replace(config, num_classes=0) if config.trunk == "vit" else replace(config, num_classes=max(1, config.num_classes)))


class SiT(Method):
    """Options are SelfSupervised.Config's, beyond the trunk's own: out_dim, head_hidden, temperature, reconstruction_weight, momentum,
    pretraining_share, drop_share, swap_share, align, fillers, crop_scale, hflip, colours."""

    network = SelfSupervised

    def __init__(self, **options: Any):
        known = {*SelfSupervised.Config.__dataclass_fields__} - {*Wrapped.Config.__dataclass_fields__}
        for name in options:
            if name not in known:
                raise UnknownName("option of SiT", name, known)
        self.options = {"head_hidden": 512, **options}

    def needs(self, model: Model) -> str:
        if reason := why_not(model):
            return reason
        try:
            (feature,) = shapes(model, [last_features(model)])  # type: ignore[arg-type]
        except BadInput as e:
            return f"its last features lie on no grid ({e})"
        sides = zip(model.image_size, feature.grid or (), strict=True)  # type: ignore[attr-defined]
        return "" if all(side % n == 0 for side, n in sides) else f"its last features' grid {feature.grid} doesn't divide the image"

    def apply(self, model: Any, data: Any = None) -> SelfSupervised:
        """The model as a self-supervised student with its own weights, its teacher and fresh heads; `fit` then runs both stages."""
        if reason := self.needs(model):
            raise BadInput(f"SiT on {type(model).__name__}", expected="an image classifier with features on a grid", got=reason)
        config = SelfSupervised.Config(**trunk_fields(model), **self.options)
        return finish(SelfSupervised(config, model), "sit_ssl", model)
