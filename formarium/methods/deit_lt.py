"""DeiT-LT (Rangwani et al., CVPR 2024, arXiv 2404.02900): a vision transformer that learns from long-tailed data by a CNN's answers.

The class token's head learns from the labels, the distillation token's from a CNN that was trained on the same data,
    L = (1 - alpha) CE(cls, y) + alpha CE_w(dist, argmax teacher(x)).
The teacher answers the student's own, strongly augmented and mixed images (out-of-distribution distillation): it is often wrong there,
and its locality goes over to the distillation token. For the last epochs nothing is mixed and w are class-balanced weights (deferred
re-weighting), so that this head becomes the expert of rare classes and the other stays that of frequent ones. The answer is their mean.
The teacher, a small ResNet, comes first: parametric contrastive learning with a sharpness-aware step, for a flat minimum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from formarium.catalogue import make_config
from formarium.errors import BadInput, UnknownName
from formarium.features import Feature, Features, taps, watching
from formarium.method import Method
from formarium.methods.sampling import Chosen, labels_of
from formarium.methods.wrapping import Wrapped, finish, glance, trunk_fields, why_not
from formarium.model import Batch, Losses, Model, Stage, Turn, evaluating
from formarium.task import Data
from formarium.tasks.batches import batches_of, on
from formarium.tasks.image_classification.augment import batch_transform
from formarium.tasks.image_classification.model import ImageClassifier, Labels
from formarium.tasks.image_classification.trunks import ViT

DISTILLATIONS = ("hard", "soft", "none")

Fit = Callable[..., Any]  # formarium.fit


# the teacher --------------------------------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """relu(BN conv relu BN conv x + x); where it narrows the map, x is every other pixel with zeros for the new channels (He et al.)."""

    def __init__(self, in_dim: int, dim: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, dim, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(dim)
        self.conv2 = nn.Conv2d(dim, dim, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(dim)
        self.stride, self.more = stride, dim - in_dim

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.stride > 1 or self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(y + x)


class ResNet(nn.Module):
    """CIFAR's ResNet (He et al., CVPR 2016): three stages of 16, 32, 64 channels at strides 1, 2, 4; ResNet-32 with 5 blocks each.
    image [batch, channels, height, width] -> features, float [batch, 64]."""

    def __init__(self, blocks: Sequence[int], in_channels: int = 3, widths: Sequence[int] = (16, 32, 64)):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, widths[0], 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages, dim = [], widths[0]
        for i, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            stages.append(nn.ModuleList(BasicBlock(width if j else dim, width, 2 if i and not j else 1) for j in range(count)))
            dim = width
        self.stages = nn.ModuleList(stages)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(image)))
        stage: Any  # a ModuleList
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x.mean((2, 3))


class Teacher(nn.Module):
    """The ResNet with its classifier, whose rows are PaCo's centres, and (with project > 0) the projection that is contrasted.
    image -> (logits [batch, classes], projection of length 1 [batch, project] or None)."""

    def __init__(self, blocks: Sequence[int], in_channels: int, classes: int, project: int = 0):
        super().__init__()
        self.net = ResNet(blocks, in_channels)
        self.classifier = nn.Linear(64, classes)
        nn.init.kaiming_normal_(self.classifier.weight)
        self.project = nn.Linear(64, project) if project else None

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.net(image)
        return self.classifier(x), F.normalize(self.project(x), dim=1) if self.project is not None else None


def paco_loss(
    logits: Tensor, anchors: Tensor, others: Tensor, label: Tensor, labels: Tensor, prior: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Parametric contrastive learning (Cui et al., ICCV 2021): one softmax over class centres and other images.

    logits: float [batch, classes] of the centres, to which the log of `prior` [classes] is added; anchors: unit vectors [batch, dim];
    others: the same [more, dim] (keys and queue) with `labels` int64 [more]; label: int64 [batch]. The own class's centre is a positive
    of weight 1, every image of the class, anchors included, one of weight alpha.
    """
    batch, classes = logits.shape
    near = anchors @ torch.cat([anchors, others]).T / temperature
    every = torch.cat([logits + (prior + 1e-9).log(), near], 1).float()  # b (classes batch more)
    self_pairs = torch.eye(batch, every.shape[1] - classes, dtype=torch.bool, device=logits.device)
    alike = (label[:, None] == torch.cat([label, labels])) & ~self_pairs
    weight = torch.cat([F.one_hot(label, classes).float(), alpha * alike.float()], 1)
    hidden = torch.cat([self_pairs.new_zeros(batch, classes), self_pairs], 1)
    log_prob = every - every.masked_fill(hidden, -torch.inf).logsumexp(1, keepdim=True)
    return -((weight * log_prob).sum(1) / weight.sum(1)).mean()


@contextmanager
def _still_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norms that use a batch's statistics without remembering them."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [m.momentum for m in norms]
    try:
        for m in norms:
            m.momentum = 0.0
        yield
    finally:
        for m, momentum in zip(norms, before, strict=True):
            m.momentum = momentum


# the loss -----------------------------------------------------------------------------------------------------------


def class_balanced_weights(counts: Sequence[int], beta: float = 0.9999) -> Tensor:
    """(1 - beta) / (1 - beta^n_c), the inverse effective numbers (Cui et al., CVPR 2019), scaled to sum to the number of classes."""
    n = torch.tensor(counts, dtype=torch.float64)
    weights = (1 - beta) / (1 - beta**n)
    return (weights / weights.sum() * len(n)).float()


def distillation_loss(
    dist: Tensor, teacher: Tensor, kind: str = "hard", weights: Tensor | None = None, tau: float = 1.0, released: bool = False
) -> Tensor:
    """What the second head learns from the teacher. dist, teacher: logits float [batch, classes]; weights: float [classes] or None.

    hard: cross entropy with the teacher's argmax; with weights the mean is over the weights' sum, as torch has it. soft: KL at the
    temperature tau, over batch * classes. The released code weighs log-probabilities and divides them by their sum, which leaves no
    distribution (released=True); here probabilities are weighed and normalised.
    """
    if kind == "hard":
        return F.cross_entropy(dist, teacher.argmax(1), weight=weights)
    log_t = (teacher / tau).log_softmax(1)
    if weights is not None:
        log_t = log_t * weights / (log_t * weights).sum(1, keepdim=True) if released else (log_t + weights.log()).log_softmax(1)
    return F.kl_div((dist / tau).log_softmax(1), log_t, reduction="sum", log_target=True) * tau**2 / dist.numel()


# the model ----------------------------------------------------------------------------------------------------------


class Heads(NamedTuple):
    """cls, dist: logits float [batch, classes] of the class token's head and the distillation token's."""

    cls: Tensor
    dist: Tensor


class Student(Wrapped):
    """A classifier with a second head for a teacher's answers: DeiT's distillation token in a ViT, else a linear layer on the features."""

    weights: Tensor
    prior: Tensor
    queue: Tensor
    queue_label: Tensor
    deferred: Tensor

    @dataclass(frozen=True)
    class Config(Wrapped.Config):
        distillation: str = "hard"  # "hard", "soft", "none" (both heads learn from labels: the rival without a teacher)
        alpha: float = 0.5  # share of the second head's loss
        tau: float = 1.0  # temperature of "soft"
        beta: float = 0.9999  # of the class-balanced weights
        drw: float = 1100 / 1200  # the share of the student's training after which re-weighting starts; 1 for never
        mixup: float = 0.8  # until then
        cutmix: float = 1.0
        label_smoothing: float = 0.1
        out_of_distribution: bool = True  # the teacher answers mixed images; False: the images before mixing
        counts: tuple[int, ...] = ()  # training images of each class, found by `study`; with them come teacher and weights
        blocks: tuple[int, ...] = (5, 5, 5)  # of the teacher's stages: ResNet-32
        teacher_size: int = 32  # side of the images it sees
        teacher_share: float = 1 / 3  # of its training, relative to the student's
        teacher_lr: float = 0.05  # SGD's
        teacher_decay: float = 5e-4
        contrast: int = 32  # width of the contrasted projection
        queue: int = 1024
        temperature: float = 0.05
        paco_alpha: float = 0.02  # of an image of the class, beside 1 of its centre
        key_momentum: float = 0.999
        rho: float = 0.05  # how far the sharpness-aware step looks; 0 for none

    def __init__(self, config: Config, trunk: ImageClassifier | None = None):
        super().__init__(config, trunk)
        c = config
        if c.distillation not in DISTILLATIONS:
            raise UnknownName("distillation", c.distillation, DISTILLATIONS)
        self.tokens = isinstance(self.trunk, ViT) and self.trunk.config.distilled
        names = [*taps(self.trunk, "*features*")]
        if not names:
            raise BadInput(f"{type(self.trunk).__name__}", expected="a tap at its features", got="none")
        self.place = names[-1]
        if not self.tokens:
            (feature,) = glance(self.trunk, [self.place])
            assert feature is not None
            self.head_dist = nn.Linear(feature.tokens.shape[2], c.num_classes)
            nn.init.trunc_normal_(self.head_dist.weight, std=0.02)
            nn.init.zeros_(self.head_dist.bias)
        self.register_buffer("deferred", torch.zeros((), dtype=torch.bool))
        self._meet()

    def _meet(self) -> None:
        """What the class counts bring: weights, and a teacher where one is asked."""
        c = self.config
        if not c.counts:
            return
        if len(c.counts) != c.num_classes or min(c.counts) < 1:
            raise BadInput("counts", expected=f"one of at least 1 for each of {c.num_classes} classes", got=str(c.counts))
        device = next(self.trunk.parameters()).device
        self.register_buffer("weights", class_balanced_weights(c.counts, c.beta).to(device))
        self.register_buffer("prior", (torch.tensor(c.counts) / sum(c.counts)).to(device))
        if c.distillation == "none":
            return
        self.teacher = Teacher(c.blocks, c.in_channels, c.num_classes, c.contrast).to(device)
        self.key = copy.deepcopy(self.teacher).requires_grad_(False)
        self.register_buffer("queue", F.normalize(torch.randn(c.queue, c.contrast, device=device), dim=1))
        self.register_buffer("queue_label", torch.randint(c.num_classes, (c.queue,), device=device))

    @property
    def has_teacher(self) -> bool:
        return "teacher" in self._modules

    def study(self, data: Any) -> None:
        self.trunk.study(data)
        counts = class_counts(data)
        if tuple(self.config.counts) != counts:
            self.reconfigure(counts=counts)
            self._meet()

    def train(self, mode: bool = True) -> Student:
        super().train(mode)
        if self.has_teacher:  # it answers by what it remembers; its own stage wakes it up
            self.teacher.eval()
        return self

    def forward(self, image: Tensor) -> Heads:
        """Normalised image [batch, channels, height, width] to both heads' logits."""
        return self.both(image)[0]

    def both(self, image: Tensor) -> tuple[Heads, Tensor, Tensor]:
        """(both heads' logits, the features each read, float [batch, dim])."""
        logits, feature = self._trace(image)
        if self.tokens:
            trunk: Any = self.trunk
            cls, dist = feature.tokens[:, 0], feature.tokens[:, 1]
            return Heads(trunk.head(cls), trunk.head_distilled(dist)), cls, dist
        pooled = feature.pooled()
        return Heads(logits, self.head_dist(pooled)), pooled, pooled

    def _trace(self, image: Tensor) -> tuple[Tensor, Feature]:
        found = Features()
        read = {self.place: taps(self.trunk, self.place)[self.place]}
        with watching(self.trunk, dict.fromkeys(read), found, read, {}):
            return self.trunk(image), found[self.place]

    def cosine(self, image: Tensor) -> Tensor:
        """Of the two tokens behind the last norm, float [batch]; 1 where both heads read the same features."""
        _, cls, dist = self.both(image)
        return F.cosine_similarity(cls, dist, dim=1, eps=1e-6)

    def predict(self, batch: Batch) -> Labels:
        """By the mean of both heads' logits."""
        out = self.forward_batch(batch)
        logits = (out.cls.float() + out.dist.float()) / 2
        return Labels(logits.softmax(-1), logits.argmax(-1))

    # training ---------------------------------------------------------------------------------------------------------

    def training_stages(self) -> Sequence[Stage]:
        c = self.config
        student = Stage("student", (Turn("loss", ("trunk.*", "head_dist.*")),))
        if not self.has_teacher:
            return (student,)
        own = {"optimizer": "sgd", "lr": c.teacher_lr, "weight_decay": c.teacher_decay, "warmup_epochs": 0}
        return (Stage("teacher", (Turn("teacher_loss", ("teacher.*",), recipe=own),), c.teacher_share), student)

    def after_step(self, step: int, steps: int) -> None:
        super().after_step(step, steps)
        before = round(steps * self.config.teacher_share / (1 + self.config.teacher_share)) if self.has_teacher else 0
        self.deferred.fill_((step - before) / max(1, steps - before) >= self.config.drw)

    def resized(self, image: Tensor) -> Tensor:
        """An image as the teacher sees it."""
        side = self.config.teacher_size
        if image.shape[2:] == (side, side):
            return image
        return F.interpolate(image, (side, side), mode="bilinear", antialias=True, align_corners=False)

    def teacher_loss(self, batch: Batch) -> Losses:
        """The teacher's: PaCo between an image, a shifted copy seen by its averaged twin, and a queue of such; sharpness-aware."""
        if not self.has_teacher:
            raise _no_teacher()
        c = self.config
        image, label = self.resized(self.normalise(batch["image"])), batch["label"]
        self.teacher.train()
        self._average()
        with torch.no_grad():
            key = self.key.train()(_shifted(image))[1]
        others, labels = torch.cat([key, self.queue]), torch.cat([label, self.queue_label])

        def contrast(out: tuple[Tensor, Tensor]) -> Tensor:
            return paco_loss(out[0], out[1], others, label, labels, self.prior, c.temperature, c.paco_alpha)

        loss = contrast(self.teacher(image))
        if c.rho and torch.is_grad_enabled():  # the gradient that counts is taken a little uphill (Foret et al., ICLR 2021)
            moving = {n: p for n, p in self.teacher.named_parameters() if p.requires_grad}
            slopes = torch.autograd.grad(loss, [*moving.values()])
            length = torch.stack([g.norm() for g in slopes]).norm() + 1e-12
            uphill = {n: p + c.rho / length * g for (n, p), g in zip(moving.items(), slopes, strict=True)}
            with _still_statistics(self.teacher):
                loss = contrast(functional_call(self.teacher, uphill, (image,)))
        self.queue, self.queue_label = others[: c.queue].detach(), labels[: c.queue]
        self.teacher.eval()
        return Losses(loss, {"contrast": loss})

    @torch.no_grad()
    def _average(self) -> None:
        for own, mean in zip(self.teacher.parameters(), self.key.parameters(), strict=True):
            mean.lerp_(own, 1 - self.config.key_momentum)

    def mixed(self, batch: Batch) -> Mapping[str, Any]:
        """The batch under mixup or cutmix and smoothing, unless its recipe has done it."""
        c = self.config
        mix = batch_transform({"mixup": c.mixup, "cutmix": c.cutmix, "label_smoothing": c.label_smoothing}, c.num_classes)
        if mix is None or "target" in batch:
            return batch
        return mix({**batch}, torch.Generator().manual_seed(int(torch.randint(2**31, ()))))

    def loss(self, batch: Batch) -> Losses:
        """The student's. Until the re-weighting its images are mixed; then labels are labels, and rare classes weigh more."""
        c = self.config
        late = bool(self.deferred)
        own = batch if late else self.mixed(batch)
        image = self.normalise(own["image"])
        out = self(image)
        target = own["target"] if "target" in own else own["label"]
        base = F.cross_entropy(out.cls.float(), target)
        if c.distillation != "none" and not self.has_teacher:
            raise _no_teacher()
        weights = self.weights if late and c.counts else None
        if c.distillation == "none":
            taught = F.cross_entropy(out.dist.float(), own["label"] if late else target, weight=weights)
        else:
            with torch.no_grad():
                seen = image if c.out_of_distribution else self.normalise(batch["image"])
                answer = self.teacher.eval()(self.resized(seen))[0].float()
            taught = distillation_loss(out.dist.float(), answer, c.distillation, weights, c.tau)
        total = (1 - c.alpha) * base + c.alpha * taught
        return Losses(total, {"base": base, "distillation": taught})


def _no_teacher() -> BadInput:
    return BadInput("teacher", expected="one, made for the training data", got="none", fix="model.study(data), as fit does")


def _shifted(image: Tensor) -> Tensor:
    """All images moved by up to an eighth of their side, edges repeated; the engine's noise decides how far."""
    most = max(1, image.shape[-1] // 8)
    y, x = (int(v) for v in torch.randint(0, 2 * most + 1, (2,)))
    h, w = image.shape[2:]
    return F.pad(image, (most,) * 4, mode="replicate")[:, :, y : y + h, x : x + w]


# long-tailed data ---------------------------------------------------------------------------------------------------


def class_counts(data: Data) -> tuple[int, ...]:
    """Training images of each class."""
    return tuple(int(n) for n in np.bincount(labels_of(data.splits["train"]), minlength=data.model_args["num_classes"]))


def long_tailed(data: Data, factor: float = 0.01, seed: int = 0) -> Data:
    """The data with ever fewer training images a class, n_c = n_max factor^(c / (C - 1)), as CIFAR-LT has them; other splits stay balanced.

    factor: of the last class's images to the first's, above 0 to 1. Which ones stay is drawn by the seed; no class is left without any.
    """
    if not 0 < factor <= 1:
        raise BadInput("factor", expected="above 0, at most 1", got=str(factor))
    labels, classes = labels_of(data.splits["train"]), data.model_args["num_classes"]
    rng, most = np.random.default_rng(seed), len(labels) / classes
    chosen: list[int] = []
    for label in range(classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        chosen += members[: max(1, int(most * factor ** (label / max(1, classes - 1))))].tolist()
    splits = {**data.splits, "train": Chosen(data.splits["train"], sorted(chosen))}
    return replace(data, name=f"{data.name}, imbalance {factor:g}", splits=splits)


def groups(counts: Sequence[int]) -> dict[str, list[int]]:
    """Classes that are head (more than 100 images), medium and tail (fewer than 20); where one of these would be empty, by rank: of ten
    classes the first three, four and three."""
    found = {
        "head": [c for c, n in enumerate(counts) if n > 100],
        "medium": [c for c, n in enumerate(counts) if 20 <= n <= 100],
        "tail": [c for c, n in enumerate(counts) if n < 20],
    }
    if all(found.values()):
        return found
    rank, third = [int(c) for c in np.argsort(-np.asarray(counts), kind="stable")], len(counts) // 3
    return {"head": rank[:third], "medium": rank[third : len(rank) - third], "tail": rank[len(rank) - third :]}


@torch.no_grad()
def shot_accuracy(model: ImageClassifier, data: Data, counts: Sequence[int] = (), split: str = "val") -> dict[str, dict[str, float]]:
    """Held-out accuracy overall and of head, medium and tail classes, each the mean over its classes: of the model ("mean" of its heads),
    and for a Student of each head ("cls", "dist") and the tokens' cosine. counts: by default the data's training images a class."""
    said: dict[str, list[Tensor]] = {}
    labels, cosines = [], []
    with evaluating(model):
        for batch in batches_of(model, data, samples=len(data.splits[split]), split=split):
            batch = on(model.device, batch)
            labels.append(batch["label"].cpu())
            said.setdefault("mean", []).append(model.predict(batch).label.cpu())
            if isinstance(model, Student):
                out = model.forward_batch(batch)
                said.setdefault("cls", []).append(out.cls.argmax(1).cpu())
                said.setdefault("dist", []).append(out.dist.argmax(1).cpu())
                cosines.append(model.cosine(model.normalise(batch["image"])).cpu())
    label = torch.cat(labels)
    table: dict[str, dict[str, float]] = {}
    for head, answers in said.items():
        right = (torch.cat(answers) == label).double()
        each = {c: float(right[label == c].mean()) for c in label.unique().tolist()}
        rows = {name: [each[c] for c in members if c in each] for name, members in groups(counts or class_counts(data)).items()}
        table[head] = {"overall": float(right.mean())} | {name: float(np.mean(v)) for name, v in rows.items() if v}
    if cosines:
        table["mean"]["cosine"] = float(torch.cat(cosines).mean())
    return table


def compare(fit: Fit, model: ImageClassifier, data: Data, seed: int = 0, **recipe: Any) -> dict[str, dict[str, float]]:
    """Three ways to train one classifier (left as it is) on long-tailed data, by head, medium and tail accuracy: "plain" cross entropy,
    "balanced" (two heads without a teacher, the second with deferred class-balanced weights) and "deit_lt". fit: `formarium.fit`. recipe:
    of all three."""
    out = {}
    for name in ("plain", "balanced", "deit_lt"):
        made: Any = copy.deepcopy(model)
        if name != "plain":
            made = DeiTLT(distillation="none" if name == "balanced" else "hard").apply(made)
        fit(made, data, seed=seed, progress=False, validations=1, **recipe)
        out[name] = shot_accuracy(made, data)["mean"]
    return out


# making one ---------------------------------------------------------------------------------------------------------


class DeiTLT(Method):
    """Options are Student.Config's fields: distillation ("hard", "soft", "none"), drw, mixup, cutmix, blocks (of the teacher), ..."""

    network = Student

    def __init__(self, **options: Any):
        known = {*Student.Config.__dataclass_fields__} - {*Wrapped.Config.__dataclass_fields__} - {"counts"}
        for key in options:
            if key not in known:
                raise UnknownName("option", key, known)
        if options.get("distillation", "hard") not in DISTILLATIONS:
            raise UnknownName("distillation", options["distillation"], DISTILLATIONS)
        self.options = options

    def needs(self, model: Model) -> str:
        if reason := why_not(model):
            return reason
        return "" if taps(model, "*features*") else "it has no tap at its features"

    def apply(self, model: Any, data: Any = None) -> Student:
        """The classifier with a second head, its weights kept; a ViT without a distillation token gets one. `fit` then trains a teacher
        on the same data, and the student by both. data: the training data, where teacher and weights are wanted before a fit."""
        if reason := self.needs(model):
            raise BadInput(f"DeiT-LT on {type(model).__name__}", expected="an image classifier with a tap at its features", got=reason)
        trunk = with_token(model) if type(model) is ViT and not model.config.distilled else model
        made = Student(make_config(Student.Config, {**trunk_fields(trunk), **self.options}), trunk)
        if data is not None:
            made.study(data)
        return finish(made, "deit_lt", model)


def with_token(model: ViT) -> ViT:
    """The same ViT with a distillation token, a place for it and a head, all fresh."""
    made = ViT(replace(model.config, distilled=True)).to(model.device)
    own = made.state_dict()
    for name, value in model.state_dict().items():
        if own[name].shape == value.shape:
            own[name] = value
        else:  # cls_token, positions: the second entry is new
            own[name] = torch.cat([value[:, :1], own[name][:, 1:2], value[:, 1:]], 1)
    made.load_state_dict(own)
    made.names = [*model.names]
    made.set_preprocessing(model.preprocessing)
    return made.train(model.training)
