"""LGViT (Xu et al., ACM Multimedia 2023, arXiv 2308.00255): exits along an image classifier, so that easy images skip its deep layers.

A head reads the raw features behind a block. Shallow heads look locally (convolutions), for what shallow features lack is not context but
shape; deep ones globally (attention over every r-th patch). Training has two stages: trunk and heads together, every other step the trunk's
own loss alone; then the trunk frozen, the heads learning from its answer and from one another. At inference a sample leaves at the first
exit that is sure enough.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput, UnknownName
from formarium.features import Feature, Features, taps, watching
from formarium.method import Method
from formarium.methods.wrapping import Wrapped, finish, shapes, target, trunk_fields, why_not
from formarium.model import Batch, Losses, Model, Stage, Turn
from formarium.nn.attention import SelfAttention
from formarium.tasks.batches import batches_of, on
from formarium.tasks.image_classification.model import ImageClassifier
from formarium.tasks.image_classification.trunks import ViT

STRATEGIES = ("confidence", "entropy", "patience", "patient_and_confident")
TEMPERATURE, PREDICTION, HETEROGENEOUS, HOMOGENEOUS = 2.0, 0.3, 0.01, 0.01  # of the second stage (section 3.3)


# the heads ----------------------------------------------------------------------------------------------------------


class LocalPerception(nn.Module):
    """1x1 convolution, (depthwise 3x3,) 1x1 convolution, each with batch norm, plus the input. tokens [batch, h w, dim] -> the same."""

    def __init__(self, dim: int, depthwise: bool):
        super().__init__()
        self.expand = nn.Conv2d(dim, dim, 1)
        self.expand_norm = nn.BatchNorm2d(dim)
        if depthwise:
            self.depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
            self.depthwise_norm = nn.BatchNorm2d(dim)
        self.project = nn.Conv2d(dim, dim, 1)
        self.project_norm = nn.BatchNorm2d(dim)
        self.local = depthwise

    def forward(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        x = tokens.transpose(1, 2).unflatten(2, grid)  # b c h w
        x = self.expand_norm(F.gelu(self.expand(x)))
        if self.local:
            x = self.depthwise_norm(F.gelu(self.depthwise(x)))
        return self.project_norm(self.project(x)).flatten(2).transpose(1, 2) + tokens


class GlobalAggregation(nn.Module):
    """Attention among every r-th patch of every r-th row. tokens [batch, h w, dim] -> [batch, ceil(h / r) ceil(w / r), dim]."""

    def __init__(self, dim: int, stride: int, heads: int = 8):
        super().__init__()
        self.stride = stride
        self.attention = SelfAttention(dim, heads if dim % heads == 0 else 1, qkv_bias=False)

    def forward(self, tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
        return self.attention(sparse(tokens, grid, self.stride))


def sparse(tokens: Tensor, grid: tuple[int, ...], stride: int) -> Tensor:
    """Every stride-th token of every stride-th row: [batch, h w, dim] -> [batch, ceil(h / stride) ceil(w / stride), dim]."""
    return tokens.unflatten(1, grid)[:, ::stride, ::stride].flatten(1, 2)


class Exit(nn.Module):
    """A head and its classifier. With class tokens the answer is theirs plus the mean of what the head makes of the patches, one classifier
    for each, averaged; without, the mean's after a LayerNorm. forward: a Feature -> (logits [batch, classes], head's tokens)."""

    def __init__(self, kind: str, dim: int, prefix: int, classes: int):
        super().__init__()
        self.prefix = prefix
        if kind.startswith("conv"):
            self.head: nn.Module = LocalPerception(dim, depthwise=kind == "conv1_1")
        else:
            self.head = GlobalAggregation(dim, int(kind.removeprefix("attention_r")))
        if not prefix:
            self.norm = nn.LayerNorm(dim)
        self.classifiers = nn.ModuleList(nn.Linear(dim, classes) for _ in range(max(1, prefix)))

    def forward(self, feature: Feature) -> tuple[Tensor, Tensor]:
        assert feature.grid is not None
        x = self.head(feature.tokens[:, self.prefix :], feature.grid)
        if not self.prefix:
            return self.classifiers[0](self.norm(x).mean(1)), x
        pooled = x.mean(1)
        answers = [classify(pooled + feature.tokens[:, i]) for i, classify in enumerate(self.classifiers)]
        return torch.stack(answers).mean(0), x


def default_heads(exits: int) -> tuple[str, ...]:
    """The paper's order for any number of exits: half local (the wider kernel first), half global (the finer stride first)."""
    local = (exits + 1) // 2
    kinds = ["conv1_1" if i < (local + 1) // 2 else "conv2_1" for i in range(local)]
    deep = exits - local
    return (*kinds, *("attention_r2" if i < (deep + 1) // 2 else "attention_r3" for i in range(deep)))


def default_places(blocks: int, exits: int) -> tuple[int, ...]:
    """Evenly from a third of the depth to one block before the end, as the paper's 4..11 of 12."""
    first, last = max(1, round(blocks / 3)), max(1, blocks - 1)
    return tuple(sorted({int(p) for p in np.linspace(first, last, exits).round()}))


# the model ----------------------------------------------------------------------------------------------------------


class Exits(NamedTuple):
    """logits: float [batch, classes] of the final classifier. exits: the same of every exit, float [exits, batch, classes]."""

    logits: Tensor
    exits: Tensor


class ExitLabels(NamedTuple):
    """probabilities, label: as Labels. layers: int64 [batch], the blocks that ran. exit: int64 [batch], which exit answered, -1 for
    none."""

    probabilities: Tensor
    label: Tensor
    layers: Tensor
    exit: Tensor


class _Stop(Exception):
    """Raised at a tap where the sample has its answer; carries it."""


class EarlyExit(Wrapped):
    """A trunk with exits. `threshold` and `strategy` may be changed at any time; they aren't weights."""

    @dataclass(frozen=True)
    class Config(Wrapped.Config):
        exits: tuple[int, ...] = (4, 5, 6, 7, 8, 9, 10, 11)  # blocks, counted from 1, that an exit follows
        heads: tuple[str, ...] = ()  # by default the paper's, by the number of exits
        strategy: str = "confidence"
        threshold: float = 0.8  # of confidence (above: leave) or entropy (below: leave)
        patience: int = 3  # exits in a row that agree (patience) or are sure (patient_and_confident)
        teacher_normalised: bool = True

    def __init__(self, config: Config, trunk: ImageClassifier | None = None):
        super().__init__(config, trunk)
        made = self.trunk
        self.strategy, self.threshold, self.patience = config.strategy, config.threshold, config.patience
        if config.strategy not in STRATEGIES:
            raise UnknownName("strategy", config.strategy, STRATEGIES)
        self.places = [*taps(made, "*blocks.*")]
        heads = config.heads or default_heads(len(config.exits))
        if len(heads) != len(config.exits) or not config.exits or not 0 < min(config.exits) <= max(config.exits) < len(self.places):
            raise BadInput(
                "exits",
                expected=f"one head an exit, at blocks 1 to {len(self.places) - 1}",
                got=f"exits {tuple(config.exits)}, heads {heads}",
            )
        read = [(f.tokens.shape[2], f.prefix) for f in shapes(made, [self.places[i - 1] for i in config.exits])]
        self.exits = nn.ModuleList(Exit(kind, dim, prefix, config.num_classes) for kind, (dim, prefix) in zip(heads, read, strict=True))
        self.kinds = heads
        self.frozen = False
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # decides whose turn it is in the first stage

    def train(self, mode: bool = True) -> EarlyExit:
        super().train(mode)
        if self.frozen:  # its batch norms and dropouts, too
            self.trunk.eval()
        return self

    def forward(self, image: Tensor) -> Exits:
        """Normalised image [batch, channels, height, width] to the logits of every classifier, exits and final one; all layers run."""
        final, read = self._trace(image)
        logits = [self.exits[i](read[self._place(i)])[0] for i in range(len(self.exits))]
        return Exits(final, torch.stack(logits))

    def _place(self, i: int) -> str:
        return self.places[self.config.exits[i] - 1]

    def _trace(self, image: Tensor, grad: bool = True) -> tuple[Tensor, Features]:
        found: Features = Features()
        names = {self._place(i): None for i in range(len(self.exits))} | {self.places[-1]: None}
        read = {name: tap for name, tap in taps(self.trunk, "*blocks.*").items() if name in names}
        with watching(self.trunk, names, found, read, {}):
            return self.trunk(image), found

    # inference --------------------------------------------------------------------------------------------------------

    def predict(self, batch: Batch) -> ExitLabels:
        """Each sample by itself, no further than it must go."""
        image = self.normalise(batch["image"])
        rows = [self.answer(image[i : i + 1]) for i in range(len(image))]
        logits = torch.cat([r[0] for r in rows]).float()
        layers, exits = (torch.tensor([r[k] for r in rows], device=image.device) for k in (1, 2))
        return ExitLabels(logits.softmax(-1), logits.argmax(-1), layers, exits)

    def answer(self, image: Tensor) -> tuple[Tensor, int, int]:
        """(logits [1, classes], blocks that ran, the exit that answered or -1) of one normalised image [1, channels, height, width]."""
        watcher = _Watcher(self)
        places = {self._place(i): i for i in range(len(self.exits))}
        all_taps = taps(self.trunk, "*blocks.*")
        before = {name: all_taps[name].watch for name in places}
        try:
            for name, i in places.items():
                all_taps[name].watch = watcher.at(i)
            return self.trunk(image), len(self.places), -1
        except _Stop as stop:
            logits, i = stop.args
            return logits, self.config.exits[i], i
        finally:
            for name, watch in before.items():
                all_taps[name].watch = watch

    # training ---------------------------------------------------------------------------------------------------------

    def training_stages(self) -> Sequence[Stage]:
        heads = (Turn("distillation", ("exits.*",)),)
        return (Stage("end to end"), Stage("self-distillation", heads, prepare="freeze_trunk"))

    def freeze_trunk(self) -> None:
        self.frozen = True
        self.train(self.training)

    def after_step(self, step: int, steps: int) -> None:
        self.steps += 1

    def loss(self, batch: Batch) -> Losses:
        """The first stage: on even steps the final classifier's cross entropy alone, on odd ones the mean of all, weighted by depth."""
        if int(self.steps) % 2 == 0:
            final = self.trunk(self.normalise(batch["image"]))
            own = _cross_entropy(final, batch)
            return Losses(own, {"final": own.detach()})
        out = self(self.normalise(batch["image"]))
        depth = len(self.places)
        terms = [_cross_entropy(x, batch) for x in out.exits]
        final = _cross_entropy(out.logits, batch)
        total = sum(w * t for w, t in zip(self.config.exits, terms, strict=True)) + depth * final
        return Losses(total / (sum(self.config.exits) + depth), {"final": final.detach(), "exits": torch.stack(terms).mean().detach()})

    def distillation(self, batch: Batch) -> Losses:
        """The second stage: the exits learn from the labels, from the final classifier's answer, from its features and the last exits'."""
        with torch.no_grad():
            teacher, read = self._trace(self.normalise(batch["image"]))
            if not self.config.teacher_normalised:
                teacher = self._unnormalised(read[self.places[-1]])
        answers, features = zip(*(head(read[self._place(i)]) for i, head in enumerate(self.exits)), strict=True)
        last = read[self.places[-1]]
        return distillation_loss(answers, features, self.kinds, teacher, last.tokens[:, last.prefix :], last.grid or (), target(batch))

    def _unnormalised(self, last: Feature) -> Tensor:
        """The final classifier on features that skipped the final norm, as the authors' second stage has it (ViT and DeiT)."""
        if not isinstance(self.trunk, ViT):
            raise BadInput("teacher_normalised", expected="True for this trunk", got="False")
        x = self.trunk.head(last.tokens[:, 0])
        return (x + self.trunk.head_distilled(last.tokens[:, 1])) / 2 if self.trunk.config.distilled else x


class _Watcher:
    """Decides at each exit whether one sample has its answer."""

    def __init__(self, model: EarlyExit):
        self.model, self.sure, self.said = model, 0, -1

    def at(self, i: int) -> Any:
        def watch(feature: Feature) -> None:
            logits, _ = self.model.exits[i](feature)
            if self.leaves(logits.float()):
                raise _Stop(logits, i)

        return watch

    def leaves(self, logits: Tensor) -> bool:
        m = self.model
        if m.strategy == "confidence":
            return logits.softmax(-1).max().item() > m.threshold
        if m.strategy == "entropy":
            return entropy(logits).item() < m.threshold
        if m.strategy == "patience":
            answer = int(logits.argmax())
            self.sure = self.sure + 1 if answer == self.said else 1
            self.said = answer
        else:
            self.sure = self.sure + 1 if entropy(logits).item() < m.threshold else 0
        return self.sure >= m.patience


def entropy(logits: Tensor) -> Tensor:
    """Of the softmax, in nats: float [..., classes] -> [...]."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


def _cross_entropy(logits: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(logits.float(), target(batch))


def distillation_loss(
    answers: Sequence[Tensor],
    features: Sequence[Tensor],
    kinds: Sequence[str],
    teacher: Tensor,
    last: Tensor,
    grid: tuple[int, ...],
    target: Tensor,
    prediction: float = PREDICTION,
    heterogeneous: float = HETEROGENEOUS,
    homogeneous: float = HOMOGENEOUS,
    temperature: float = TEMPERATURE,
) -> Losses:
    """The second stage's loss (section 3.3).

    answers: logits [batch, classes] of each exit; features: its head's tokens; kinds: its head. teacher: the final classifier's logits.
    last:
    the last block's patches [batch, h w, dim] on `grid`. target: labels int64 [batch] or float [batch, classes].
    Prediction: cross entropy and KL to the teacher at the temperature. Heterogeneous: the first and last local exit imitate the trunk's
    last
    patches, the first and last global one those it would see. Homogeneous: local exits imitate the last local one, global ones the Gram
    matrix of the last global one.
    """
    ce, kl = 0.0, 0.0
    for logits in answers:
        ce = ce + F.cross_entropy(logits.float(), target)
        log_p, log_t = (logits.float() / temperature).log_softmax(1), (teacher.float() / temperature).log_softmax(1)
        kl = kl + F.kl_div(log_p, log_t, reduction="sum", log_target=True) * temperature**2 / logits.numel()
    predicted = (1 - prediction) * ce + prediction * kl
    local = [i for i, k in enumerate(kinds) if k.startswith("conv")]
    deep = [i for i, k in enumerate(kinds) if not k.startswith("conv")]
    hetero = [(features[i], last) for i in dict.fromkeys([*local[:1], *local[-1:]])]
    strides = {i: int(kinds[i].removeprefix("attention_r")) for i in deep}
    hetero += [(features[i], sparse(last, grid, strides[i])) for i in dict.fromkeys([*deep[-1:], *deep[:1]])]
    imitate = sum((channel_kl(a, b) for a, b in hetero if a.shape == b.shape), teacher.new_zeros(()))
    alike = sum((F.mse_loss(features[i], features[local[-1]]) for i in local[:-1] if features[i].shape == features[local[-1]].shape),
                teacher.new_zeros(()))  # fmt: skip
    same_width = [i for i in deep[:-1] if features[i].shape[-1] == features[deep[-1]].shape[-1]]
    alike = alike + sum((F.mse_loss(gram(features[i]), gram(features[deep[-1]])) for i in same_width), teacher.new_zeros(()))
    total = predicted + heterogeneous * imitate + homogeneous * alike
    return Losses(total, {"prediction": predicted, "heterogeneous": imitate, "homogeneous": alike})


def channel_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL between softmaxes over channels, summed over tokens, a mean over the batch. Both float [batch, tokens, dim]."""
    return F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True)


def gram(x: Tensor) -> Tensor:
    """[batch, tokens, dim] -> [batch, dim, dim], sums over tokens of channel products."""
    return x.transpose(-1, -2) @ x


# making one ---------------------------------------------------------------------------------------------------------


class LGViT(Method):
    """exits: how many, or after which blocks (from 1). heads: one of conv1_1, conv2_1, attention_r1, _r2, _r3 an exit; by default the
    paper's order. strategy, threshold, patience: when a sample leaves (see EarlyExit.Config). target: the share of the blocks that may run
    on
    average, above 0 and at most 1; `settle` then chooses the threshold that keeps to it, on training data."""

    network = EarlyExit

    def __init__(
        self,
        exits: int | Sequence[int] = 8,
        heads: Sequence[str] = (),
        strategy: str = "confidence",
        threshold: float = 0.8,
        patience: int = 3,
        target: float | None = None,
    ):
        if target is not None and not 0 < target <= 1:
            raise BadInput("target", expected="a share of the blocks, above 0 and at most 1", got=repr(target))
        if strategy not in STRATEGIES:
            raise UnknownName("strategy", strategy, STRATEGIES)
        self.exits, self.heads, self.target = exits, tuple(heads), target
        self.options = {"strategy": strategy, "threshold": threshold, "patience": patience}

    def needs(self, model: Model) -> str:
        if reason := why_not(model):
            return reason
        return "" if len(taps(model, "*blocks.*")) > 1 else "it has fewer than two blocks with taps"

    def apply(self, model: Any, data: Any = None) -> EarlyExit:
        """The model with exits, fresh ones; its own weights stay. `fit` then trains both stages. `data` isn't needed.

        Raises BadInput where there is nowhere to put them.
        """
        if reason := self.needs(model):
            raise BadInput(f"LGViT on {type(model).__name__}", expected="an image classifier with taps behind its blocks", got=reason)
        blocks = len(taps(model, "*blocks.*"))
        places = default_places(blocks, self.exits) if isinstance(self.exits, int) else tuple(self.exits)
        config = EarlyExit.Config(**trunk_fields(model), exits=places, heads=self.heads or default_heads(len(places)), **self.options)
        return finish(EarlyExit(config, model), "lgvit", model)

    @torch.no_grad()
    def settle(self, model: EarlyExit, data: Any, samples: int = 512) -> bool:
        """The largest confidence to ask for at which no more than the target's share of the blocks runs, on training samples."""
        if self.target is None:
            return False
        model.eval()
        sure = [
            model(model.normalise(b["image"].to(model.device))).exits.float().softmax(-1).amax(-1)
            for b in batches_of(model, data, samples=samples, split="train")
        ]
        confidence = torch.cat(sure, 1)  # exits n
        blocks = torch.tensor([*model.config.exits, len(model.places)], dtype=torch.float64) / len(model.places)
        best = 0.0
        for threshold in torch.linspace(0, 1, 401, dtype=torch.float64).tolist():
            leaves = torch.cat([confidence > threshold, torch.ones_like(confidence[:1], dtype=torch.bool)])
            if blocks[leaves.int().argmax(0)].mean() > self.target:
                break
            best = threshold
        model.strategy, model.threshold = "confidence", best
        model.reconfigure(strategy="confidence", threshold=best)
        return True


# what it buys -------------------------------------------------------------------------------------------------------


def speed_accuracy(model: EarlyExit, data: Any, thresholds: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95, 1.1)) -> list[dict[str, float]]:
    """The curve: for each threshold of confidence the accuracy, the mean share of blocks that run, and milliseconds a sample (measured).

    data: what `formarium.evaluate` takes. The model's strategy and threshold are left as they were.
    """
    import time

    from formarium.task import task

    before = (model.strategy, model.threshold)
    batches = [on(model.device, b) for b in batches_of(model, data, samples=sys.maxsize)]
    rows = []
    try:
        model.eval()
        model.strategy = "confidence"
        for threshold in thresholds:
            model.threshold = threshold
            start = time.perf_counter()
            with torch.no_grad():
                said = [model.predict(b) for b in batches]
            seconds = time.perf_counter() - start
            metrics, _ = task(model.task).score(said, batches)
            layers = torch.cat([s.layers for s in said]).float()
            rows.append(
                {
                    "threshold": threshold,
                    "accuracy": metrics["accuracy"],
                    "blocks": layers.mean().item() / len(model.places),
                    "ms": 1e3 * seconds / len(layers),
                }
            )
    finally:
        model.strategy, model.threshold = before
    return rows
