"""Gated class-attention with cascaded feature drift compensation (Cotogni et al., 2022, arXiv 2211.12292): classes learned task by task.

No image of an earlier task is kept. The backbone gives patch features; one class-attention block, shared by all tasks, reads them once a
task, with the task's own class token and its own gates, a = sigmoid(s E0[t]) on channels and h = sigmoid(s E2[t]) on hidden units:
    q = (W_q (x_cls a)) a,  k = (W_k (X a)) a,  v = W_v (X a),  c += (W_p (softmax(q k^T) v a)) a,
    c += W_2 (gelu(W_1 (LN(c) a)) h) a,
then a head of its own classes. s grows within each epoch until gates are 0 or 1; weights between channels that an earlier task's gates
have opened get no gradient (as in HAT), so what that task computes from given features stays, bit by bit. The features drift, as the
backbone learns on: with each task a projector learns to map the new features back to those of the task before, and at inference task c's
features go through all projectors since, newest first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from formarium.catalogue import make_config
from formarium.errors import BadInput, UnknownName
from formarium.features import Features, Tap, taps, watching
from formarium.method import Method
from formarium.methods.sampling import of_classes
from formarium.methods.wrapping import Wrapped, finish, shapes, trunk_fields, why_not
from formarium.model import Batch, Losses, Model, Stage, Turn, evaluating
from formarium.nn.drop import DropPath, drop_path_rates
from formarium.nn.gpsa import GatedPositionalAttention
from formarium.nn.init import init_transformer
from formarium.nn.mlp import MLP
from formarium.task import Data
from formarium.tasks.batches import batches_of, on
from formarium.tasks.image_classification.model import ImageClassifier, Labels

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
COSH_LIMIT, EMBEDDING_LIMIT = 50.0, 6.0  # of HAT's embedding gradients
OPEN = 3.0  # standard deviations by which a projector that starts as the identity lifts its units above the ReLU's corner

Fit = Callable[..., Any]  # formarium.fit


# the paper's backbone -----------------------------------------------------------------------------------------------


class ConViTBlock(nn.Module):
    """x + GPSA(LN x), then x + MLP(LN x). x: float [batch, h w, dim]."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, qkv_bias: bool, locality: float, drop_path: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = GatedPositionalAttention(dim, heads, qkv_bias, locality)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.drop = DropPath(drop_path)
        self.tap = Tap()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop(self.attention(self.norm1(x), grid))
        return self.tap(x + self.drop(self.mlp(self.norm2(x))), grid=grid)


class ConViT(ImageClassifier):
    """ConViT's positional blocks (d'Ascoli et al., ICML 2021) without its class token, norm and head: it gives patch features."""

    @dataclass(frozen=True)
    class Config:
        image_size: int | tuple[int, int] = 32
        patch_size: int = 4
        dim: int = 384
        depth: int = 5
        heads: int = 12
        mlp_ratio: float = 4
        qkv_bias: bool = False
        locality: float = 1.0
        in_channels: int = 3
        num_classes: int = 0
        drop_path: float = 0.0
        dense: bool = False

    def __init__(self, config: Config):
        super().__init__(config)
        c, (height, width) = config, self.image_size
        self.embed = nn.Conv2d(c.in_channels, c.dim, c.patch_size, c.patch_size)
        self.positions = nn.Parameter(torch.zeros(1, (height // c.patch_size) * (width // c.patch_size), c.dim))
        self.tokens = Tap()
        rates = drop_path_rates(c.drop_path, (c.depth + 1,))[0]
        self.blocks = nn.ModuleList(ConViTBlock(c.dim, c.heads, c.mlp_ratio, c.qkv_bias, c.locality, r) for r in rates[: c.depth])
        self.features = Tap()
        init_transformer(self)
        nn.init.trunc_normal_(self.positions, std=0.02)
        for block in self.blocks:
            block.attention.look_at_neighbours()

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [batch, channels, height, width] to patch features [batch, h w, dim]."""
        x = self.embed(image)
        grid = (x.shape[2], x.shape[3])
        x = self.tokens(x.flatten(2).transpose(1, 2) + self.positions, grid=grid)
        for block in self.blocks:
            x = block(x, grid)
        return self.features(x, grid=grid)

    def no_weight_decay(self) -> set[str]:
        return {"positions"}

    def check_size(self, height: int, width: int) -> None:
        if (height, width) != self.image_size:
            raise BadInput("image size", expected="{}x{}".format(*self.image_size), got=f"{height}x{width}", fix="resize the image")


# the block all tasks share ------------------------------------------------------------------------------------------


class _Held(torch.autograd.Function):
    """The identity, whose gradient passes where `free` is 1."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, free: Tensor) -> Tensor:
        ctx.save_for_backward(free)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad * ctx.saved_tensors[0], None


def protected(weight: Tensor, out: Tensor, inner: Tensor | None = None) -> Tensor:
    """The same values, but no gradient where both masks (float of 0 and 1; rows, columns) are 1."""
    held: Any = _Held.apply(weight, 1 - (out if inner is None else torch.outer(out, inner)))
    return held


class GatedClassAttention(nn.Module):
    """One class token reads patches, both gated; the token alone is updated.

    token: float [batch, dim]; patches [batch, tokens, dim]; a: gates [dim]; h: gates [hidden]. With a single query the keys' projection
    folds into the query, and the values' goes behind the average, so that no projection sees every patch.
    """

    def __init__(self, dim: int, heads: int, mlp_ratio: float = 4, qkv_bias: bool = False):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.q, self.k, self.v = (nn.Linear(dim, dim, bias=qkv_bias) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        init_transformer(self)

    def weights(self, used: tuple[Tensor, Tensor] | None) -> tuple[Tensor, ...]:
        """Of q, k, v, out, fc1 and fc2, and the last three's biases. used: masks [dim], [hidden] of channels that earlier tasks have
        opened, between which no gradient passes; or None."""
        matrices = [layer.weight for layer in (self.q, self.k, self.v, self.out, self.fc1, self.fc2)]
        biases = [layer.bias for layer in (self.out, self.fc1, self.fc2)]
        if used is None:
            return (*matrices, *biases)
        m0, m2 = used
        sides = [(m0, m0)] * 4 + [(m2, m0), (m0, m2)]
        own = [protected(w, rows, columns) for w, (rows, columns) in zip(matrices, sides, strict=True)]
        return (*own, *(protected(b, m) for b, m in zip(biases, (m0, m2, m0), strict=True)))

    def forward(self, token: Tensor, patches: Tensor, a: Tensor, h: Tensor, weights: tuple[Tensor, ...] | None = None) -> Tensor:
        """patches: already normalised by norm1. weights: as `weights` gives them, where they are asked for once for several tasks."""
        wq, wk, wv, wo, w1, w2, bo, b1, b2 = weights or self.weights(None)
        n = self.norm1(token)
        x = torch.cat([n[:, None], patches], 1)
        q = F.linear(n * a, wq, self.q.bias) * a * a * (wq.shape[0] // self.heads) ** -0.5  # the keys' output gate, too
        asked = torch.einsum("bhd,hdc->bhc", q.unflatten(1, (self.heads, -1)), wk.unflatten(0, (self.heads, -1))) * a
        seen = (asked @ x.transpose(1, 2)).softmax(-1) @ x  # a key bias would move all logits alike
        v = torch.einsum("bhc,hdc->bhd", seen * a, wv.unflatten(0, (self.heads, -1))).flatten(1)
        v = v if self.v.bias is None else v + self.v.bias
        token = token + F.linear(v * a, wo, bo) * a
        return token + F.linear(F.gelu(F.linear(self.norm2(token) * a, w1, b1)) * h, w2, b2) * a


class Projector(nn.Module):
    """Linear, LayerNorm over channels and tokens together, ReLU, Linear: a newer backbone's features as the older one's.
    x: float [batch, tokens, dim]. Returns the same shape."""

    def __init__(self, dim: int, tokens: int):
        super().__init__()
        self.expand = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm((tokens, dim))
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(F.relu(self.norm(self.expand(x))))

    @torch.no_grad()
    def start_at(self, x: Tensor) -> None:
        """Give x back as well as it can: all units of the ReLU open, the last layer fitted to x by least squares."""
        nn.init.eye_(self.expand.weight)
        nn.init.zeros_(self.expand.bias)
        nn.init.ones_(self.norm.weight)
        nn.init.constant_(self.norm.bias, OPEN)
        inner = F.relu(self.norm(self.expand(x))).flatten(0, 1).double()
        ones, wanted = inner.new_ones(len(inner), 1), x.flatten(0, 1).double()
        a = torch.cat([inner - OPEN, ones], 1)
        ridge = 1e-4 * len(a) * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
        w = torch.linalg.solve(a.T @ a + ridge, a.T @ wanted)
        self.project.weight.copy_(w[:-1].T)
        self.project.bias.copy_(w[-1] - OPEN * w[:-1].sum(0))


# HAT's gates --------------------------------------------------------------------------------------------------------


def annealed(step: int, steps: int, smax: float) -> float:
    """s of a step (from 0) of an epoch: from 1 / smax towards smax."""
    return 1 / smax + (smax - 1 / smax) * step / steps


def gradient_factor(embedding: Tensor, s: float, smax: float, limit: float = COSH_LIMIT) -> Tensor:
    """What an embedding's gradient is multiplied by, to undo what a steep sigmoid does to it."""
    return smax / s * (torch.cosh((s * embedding).clamp(-limit, limit)) + 1) / (torch.cosh(embedding) + 1)


def gate(embedding: Tensor, s: float) -> Tensor:
    return torch.sigmoid(s * embedding)


def sparsity(gates: Sequence[Tensor], used: Sequence[Tensor] | None) -> Tensor:
    """The share of channels that gates open, of those no earlier task has opened."""
    free = [torch.ones_like(g) for g in gates] if used is None else [1 - m for m in used]
    return sum((g * f).sum() for g, f in zip(gates, free, strict=True)) / sum(f.sum() for f in free)  # type: ignore[return-value]


# the model ----------------------------------------------------------------------------------------------------------


class Answer(NamedTuple):
    """logits: float [batch, classes of the tasks so far]. gate, hidden_gate: float [dim], [hidden] of the newest task. features: the
    backbone's patches, float [batch, tokens, dim]."""

    logits: Tensor
    gate: Tensor
    hidden_gate: Tensor
    features: Tensor


class Continual(Wrapped):
    """A backbone and what the tasks learned so far own. A fit goes through all tasks of its data, a stage each."""

    used0: Tensor
    used2: Tensor
    current: Tensor
    steps: Tensor
    history: Tensor
    aware: Tensor

    @dataclass(frozen=True)
    class Config(Wrapped.Config):
        trunk: str = "convit"  # the paper's, or as in Wrapped
        first_task: int = 10  # classes
        increment: int = 10  # classes of each later task, or what is left
        num_tasks: int = 10
        seen: int = 1  # tasks that have a token, head and projector; a fit makes them all
        order: tuple[int, ...] = ()  # labels in the order they are learned in; by default as they are numbered
        heads: int = 12
        mlp_ratio: float = 4
        qkv_bias: bool = False
        blocks: int = 1  # class-attention blocks
        smax: float = 800
        gate_weight: float = 0.05
        drift_weight: float = 0.001
        gate_std: float = 1.0  # of the embeddings as they are drawn; a short fit decides which gates open only where it is small
        first_share: float = 1.0  # of the first task's training, relative to a later one's
        later_lr: float = 0.0  # of the tasks after the first, so that the backbone drifts less; 0: the recipe's
        faithful_start: bool = (
            False  # a projector begins as (nearly) the identity, as a fit finds it, not as drawn, which takes long to learn
        )
        protect: bool = True  # earlier tasks' weights; False to see what gates alone do
        memory: bool = False  # the last task's backbone is at hand, as in a fit

    def __init__(self, config: Config, trunk: ImageClassifier | None = None):
        if trunk is None and config.trunk == "convit":
            trunk = ConViT(make_config(ConViT.Config, {**config.trunk_config, "in_channels": config.in_channels}))
        super().__init__(config, trunk)
        c = config
        sizes = task_sizes(c)
        if not 1 <= c.seen <= len(sizes):
            raise BadInput("seen", expected=f"1 to {len(sizes)} tasks", got=str(c.seen))
        if c.order and sorted(c.order) != [*range(c.num_classes)]:
            raise BadInput("order", expected=f"each of 0 to {c.num_classes - 1} once", got=str(c.order))
        self.sizes = sizes
        self.place = [*taps(self.trunk, "*features*")][-1]
        feature = shapes(self.trunk, [self.place])[0]
        self.dim, self.count = feature.tokens.shape[2], feature.tokens.shape[1] - feature.prefix
        if self.dim % c.heads:
            raise BadInput("heads", expected=f"a divisor of the features' {self.dim} channels", got=str(c.heads))
        hidden = int(self.dim * c.mlp_ratio)
        self.attention = nn.ModuleList(GatedClassAttention(self.dim, c.heads, c.mlp_ratio, c.qkv_bias) for _ in range(c.blocks))
        self.gates0 = nn.Parameter(torch.randn(c.num_tasks, self.dim) * c.gate_std)
        self.gates2 = nn.Parameter(torch.randn(c.num_tasks, hidden) * c.gate_std)
        self.class_tokens, self.norms, self.classifiers = nn.ParameterList(), nn.ModuleList(), nn.ModuleList()
        self.projectors = nn.ModuleList()
        self.register_buffer("used0", torch.zeros(self.dim))
        self.register_buffer("used2", torch.zeros(hidden))
        self.register_buffer("current", torch.tensor(c.seen - 1))  # the newest one
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of it
        self.register_buffer("history", torch.full((c.num_tasks, c.num_tasks), -1.0))  # held-out accuracy: after task i, of task j
        self.register_buffer("aware", torch.full((c.num_tasks, c.num_tasks), -1.0))  # the same where the task is told
        self._grow()
        self._data: Data | None = None

    def _grow(self) -> None:
        """Tokens, heads and projectors of all `seen` tasks, and room for the last backbone."""
        c, device = self.config, self.gates0.device
        for t in range(len(self.class_tokens), c.seen):
            self.class_tokens.append(nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, self.dim, device=device), std=0.02)))
            self.norms.append(nn.LayerNorm(self.dim, device=device))
            self.classifiers.append(nn.Linear(self.dim, self.sizes[t], device=device))
            if t:
                self.projectors.append(Projector(self.dim, self.count).to(device))
        if c.memory:
            self._remember()

    # forward ----------------------------------------------------------------------------------------------------------

    @property
    def order(self) -> list[int]:
        return [*self.config.order] or [*range(self.config.num_classes)]

    def classes(self, task: int) -> list[int]:
        """The labels of a task."""
        start = sum(self.sizes[:task])
        return self.order[start : start + self.sizes[task]]

    def features(self, image: Tensor) -> Tensor:
        """The backbone's patches, float [batch, tokens, dim]."""
        found = Features()
        read = {self.place: taps(self.trunk, self.place)[self.place]}
        with watching(self.trunk, dict.fromkeys(read), found, read, {}):
            self.trunk(image)
        return found[self.place].tokens[:, found[self.place].prefix :]

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [batch, channels, height, width] to logits [batch, classes of all tasks so far], in the order of learning."""
        return self.answer(image).logits

    def gate_pair(self, task: int, s: float, compensate: bool = False) -> tuple[Tensor, Tensor]:
        """A task's gates; those of a finished one are 0 or 1. compensate: the embeddings' gradients are multiplied by HAT's factor."""
        if task < int(self.current):
            a, h = ((s * table[task].detach() > 0).to(table.dtype) for table in (self.gates0, self.gates2))
            return a, h
        own = [self.gates0[task], self.gates2[task]]
        if compensate:
            own = [(e - e.detach()) * gradient_factor(e.detach(), s, self.config.smax) + e.detach() for e in own]
        return gate(own[0], s), gate(own[1], s)

    def cascade(self, features: Tensor, task: int) -> Tensor:
        """Today's features as those of the backbone that `task` was learned on: its successors' projectors, newest first."""
        for i in range(int(self.current) - 1, task - 1, -1):
            features = self.projectors[i](features)
        return features

    def answer(self, image: Tensor, s: float | None = None, project: bool = True, compensate: bool = False) -> Answer:
        """All tasks so far, one after another. s: of the gates (smax by default); project: whether old tasks' features are mapped back."""
        x = self.features(image)
        tokens, (a, h) = self.read(x, self.config.smax if s is None else s, project, compensate)
        logits = [self.classifiers[t](self.norms[t](token)) for t, token in enumerate(tokens)]
        return Answer(torch.cat(logits, 1), a, h, x)

    def read(self, x: Tensor, s: float, project: bool = True, compensate: bool = False) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
        """(each task's class token behind the attention, float [batch, dim]; the newest one's gates) for features x."""
        newest = int(self.current)
        guarded = self.config.protect and torch.is_grad_enabled() and newest > 0
        used = (self.used0, self.used2) if guarded else None
        blocks: Any = self.attention
        weights = [block.weights(used) for block in blocks]
        tokens: list[Tensor] = []
        mapped, normed = x, [block.norm1(x) for block in blocks]
        for t in range(newest, -1, -1):  # newest first, so that each projector runs once
            if project and t < newest:
                mapped = self.projectors[t](mapped)
                normed = [block.norm1(mapped) for block in blocks]
            a, h = self.gate_pair(t, s, compensate)
            if t == newest:
                own = (a, h)
            token = self.class_tokens[t][:, 0].expand(x.shape[0], -1)
            for block, patches, own_weights in zip(blocks, normed, weights, strict=True):
                token = block(token, patches, a, h, own_weights)
            tokens.insert(0, token)
        return tokens, own

    def predict(self, batch: Batch) -> Labels:
        """Over all classes of the data, those not learned yet with probability 0; nobody says which task an image is of."""
        logits = self.forward_batch(batch).float()
        full = logits.new_full((len(logits), self.config.num_classes), -torch.inf)
        full[:, self.order[: logits.shape[1]]] = logits
        return Labels(full.softmax(-1), full.argmax(-1))

    def check_size(self, height: int, width: int) -> None:
        if (height, width) != self.image_size:  # the projectors' norms are of its tokens
            raise BadInput("image size", expected="{}x{}".format(*self.image_size), got=f"{height}x{width}", fix="resize the image")

    # training ---------------------------------------------------------------------------------------------------------

    def study(self, data: Any) -> None:
        """Make room for all tasks of the data; the first begins."""
        self.trunk.study(data)
        self._data = data
        tasks = len(self.sizes)
        if not (self.config.memory and self.config.seen == tasks):
            self.reconfigure(seen=tasks, memory=True)
            self._grow()
        self.current.fill_(-1)

    def training_stages(self) -> Sequence[Stage]:
        later = {"lr": self.config.later_lr} if self.config.later_lr else {}
        turns = [(Turn("loss", recipe=later if t else {}),) for t in range(self.config.seen)]
        return [Stage(f"task {t + 1}", turn, 1.0 if t else self.config.first_share, prepare="begin_task") for t, turn in enumerate(turns)]

    def train(self, mode: bool = True) -> Continual:
        """After the first task the backbone's norms rest: batch norms keep the statistics they have."""
        super().train(mode)
        if int(self.current) > 0:
            for module in self.trunk.modules():
                if isinstance(module, NORMS):
                    module.eval()
        return self

    def begin_task(self) -> None:
        """Close the last task (its gates are cut to 0 and 1, its backbone is remembered, it is measured), free what the next one trains."""
        t = int(self.current) + 1
        if t >= self.config.seen:
            raise BadInput("tasks", expected=f"at most {self.config.seen}", got=str(t + 1))
        if t:
            self._measure()
            with torch.no_grad():
                for used, table in ((self.used0, self.gates0), (self.used2, self.gates2)):
                    used.copy_(torch.maximum(used, (gate(table[t - 1], self.config.smax) > 0.5).to(used.dtype)))
            if self.config.memory:
                self._remember()
            if self.config.faithful_start and self._data is not None:
                self.projectors[t - 1].start_at(self._first_look(t))  # type: ignore[operator]
        self.current.fill_(t)
        self.steps.zero_()
        for owned in (self.class_tokens, self.norms, self.classifiers):
            for i, part in enumerate(owned):
                part.requires_grad_(i == t)
        for i, part in enumerate(self.projectors):
            part.requires_grad_(i == t - 1)
        for module in (*self.trunk.modules(), *self.attention.modules()):
            if isinstance(module, NORMS):
                module.requires_grad_(t == 0)
        self.train(self.training)

    @torch.no_grad()
    def _first_look(self, task: int) -> Tensor:
        """Features of a task's own training images before it is learned, float [images, tokens, dim]."""
        data: Any = self._data
        own = of_classes(data.splits["train"], self.classes(task))
        batches = batches_of(self, own, samples=min(256, len(own)), batch_size=64)
        with evaluating(self):
            return torch.cat([self.features(self.normalise(on(self.device, b)["image"])) for b in batches])

    def _remember(self) -> None:
        """The backbone as it is, as buffers: no parameters, but saved with them."""
        for name, value in self.trunk.state_dict().items():
            self.register_buffer("last_" + name.replace(".", "/"), value.detach().clone())

    def remembered(self, image: Tensor) -> Tensor:
        """The last task's backbone's patches."""
        state = {n.removeprefix("last_").replace("/", "."): b for n, b in self.named_buffers(recurse=False) if n.startswith("last_")}
        found = Features()
        read = {self.place: taps(self.trunk, self.place)[self.place]}
        with torch.no_grad(), evaluating(self.trunk), watching(self.trunk, dict.fromkeys(read), found, read, {}):
            functional_call(self.trunk, state, (image,))
        return found[self.place].tokens[:, found[self.place].prefix :]

    def loss(self, batch: Batch) -> Losses:
        """On the batch's images of the current task, and no others: binary cross entropy over all classes so far, the newest task's gates'
        sparsity, and (from the second task on) how far the projected features are from the last backbone's."""
        c, t = self.config, max(0, int(self.current))
        position = torch.full((c.num_classes,), -1, dtype=torch.int64)
        position[self.order] = torch.arange(c.num_classes)
        place = position.to(batch["label"].device)[batch["label"]]
        start = sum(self.sizes[:t])
        mine = (place >= start) & (place < start + self.sizes[t])
        if int(mine.sum()) < 2:  # nothing to learn from; batch norms want two
            nothing = self.class_tokens[t].sum() * 0
            return Losses(nothing, {"classification": nothing.detach()})
        samples = len(self._data.splits["train"]) if self._data is not None else 10 * len(place)
        epoch = max(1, samples // len(place))
        s = annealed(int(self.steps) % epoch, epoch, c.smax)
        image = self.normalise(batch["image"][mine])
        out = self.answer(image, s, project=False, compensate=True)
        wanted = F.one_hot(place[mine], out.logits.shape[1]).to(out.logits.dtype)
        own = F.binary_cross_entropy_with_logits(out.logits, wanted)
        open_ = sparsity((out.gate, out.hidden_gate), (self.used0, self.used2) if t else None)
        terms = {"classification": own, "gates": open_}
        total = own + c.gate_weight * open_
        if t and c.memory:
            terms["drift"] = torch.linalg.vector_norm(self.remembered(image) - self.projectors[t - 1](out.features))
            total = total + c.drift_weight * terms["drift"]
        return Losses(total, terms)

    def after_step(self, step: int, steps: int) -> None:
        super().after_step(step, steps)
        self.steps += 1
        with torch.no_grad():
            self.gates0.clamp_(-EMBEDDING_LIMIT, EMBEDDING_LIMIT)
            self.gates2.clamp_(-EMBEDDING_LIMIT, EMBEDDING_LIMIT)

    def no_weight_decay(self) -> set[str]:
        """What is protected must not decay either: theirs decays a little (1e-6)."""
        return super().no_weight_decay() | {"attention.*", "class_tokens.*", "gates0", "gates2"}

    @torch.no_grad()
    def _measure(self) -> None:
        """Held-out accuracy of every task so far, into `history` and `aware`."""
        if self._data is None or int(self.current) < 0:
            return
        said = accuracies(self, self._data, range(int(self.current) + 1))
        self.history[int(self.current), : len(said[0])] = torch.tensor(said[0])
        self.aware[int(self.current), : len(said[1])] = torch.tensor(said[1])


def task_sizes(c: Any) -> list[int]:
    """Classes of each task."""
    rest = c.num_classes - c.first_task
    if c.first_task < 1 or c.increment < 1 or rest < 0:
        raise BadInput("tasks", expected=f"1 to {c.num_classes} classes in the first one", got=f"{c.first_task}, then {c.increment} each")
    sizes = [c.first_task, *([c.increment] * (rest // c.increment)), *([rest % c.increment] if rest % c.increment else [])]
    if len(sizes) > c.num_tasks:
        raise BadInput("num_tasks", expected=f"at least {len(sizes)} for {c.num_classes} classes", got=str(c.num_tasks))
    return sizes


# what is forgotten --------------------------------------------------------------------------------------------------


@torch.no_grad()
def accuracies(
    model: ImageClassifier, data: Data, tasks: Sequence[int], classes: Any = None, split: str = "val"
) -> tuple[list[float], list[float]]:
    """(of each task's held-out images the accuracy among all classes, the same among the task's own). classes: a task's labels, by default
    as the Continual model has them."""
    own = classes or model.classes  # type: ignore[attr-defined]
    agnostic, aware = [], []
    with evaluating(model):
        for t in tasks:
            held = of_classes(data.splits[split], own(t))
            batches = [on(model.device, b) for b in batches_of(model, held, samples=len(held), batch_size=256)]
            right = told = 0
            for batch in batches:
                p = model.predict(batch).probabilities
                right += int((p.argmax(1) == batch["label"]).sum())
                mine = torch.tensor(own(t), device=p.device)
                told += int((mine[p[:, mine].argmax(1)] == batch["label"]).sum())
            agnostic.append(right / len(held))
            aware.append(told / len(held))
    return agnostic, aware


def summary(history: Sequence[Sequence[float]], aware: Sequence[Sequence[float]], sizes: Sequence[int]) -> dict[str, float]:
    """The field's figures from the accuracies of task j after task i (rows i): average_incremental (mean over i of the accuracy on all
    classes so far), last, task_aware (last, with the task told), forgetting (mean over old tasks of the best accuracy less the last)."""
    n = len(history)

    def over(row: Sequence[float], i: int) -> float:
        return sum(a * s for a, s in zip(row[: i + 1], sizes, strict=False)) / sum(sizes[: i + 1])

    lost = [max(history[i][j] for i in range(j, n)) - history[-1][j] for j in range(n - 1)]
    return {
        "average_incremental": sum(over(row, i) for i, row in enumerate(history)) / n,
        "last": over(history[-1], n - 1),
        "task_aware": over(aware[-1], n - 1),
        "forgetting": sum(lost) / len(lost) if lost else 0.0,
    }


def report(model: Continual, data: Data) -> dict[str, float]:
    """What a fit on these data has learned and forgotten; see `summary`. The last task is measured here, the others were on the way."""
    if int(model.current) < 0 or (model.history[: int(model.current), 0] < 0).any():
        raise BadInput("model", expected="one that a fit took through its tasks", got="one that was not measured on the way")
    before, model._data = model._data, data
    model._measure()
    model._data = before
    n = int(model.current) + 1
    return summary(model.history[:n, :n].tolist(), model.aware[:n, :n].tolist(), model.sizes)


def fine_tuned(
    fit: Fit, model: ImageClassifier, data: Data, tasks: Sequence[Sequence[int]], seed: int = 0, **recipe: Any
) -> dict[str, float]:
    """The rival: the classifier (changed in place) fitted to one task after another, with one head and nothing against forgetting. fit:
    `formarium.fit`."""
    history, aware = [], []
    for t in range(len(tasks)):
        part = replace(data, splits={**data.splits, "train": of_classes(data.splits["train"], tasks[t])})
        fit(model, part, seed=seed, progress=False, validations=1, **recipe)
        rows = accuracies(model, data, range(t + 1), classes=lambda i: [*tasks[i]])
        history.append(rows[0] + [-1.0] * (len(tasks) - t - 1))
        aware.append(rows[1] + [-1.0] * (len(tasks) - t - 1))
    return summary(history, aware, [len(t) for t in tasks])


# making one ---------------------------------------------------------------------------------------------------------


class GatedContinual(Method):
    """first_task, increment: classes of the first and of each later task. Other options are Continual.Config's fields (smax, gate_weight,
    drift_weight, order, heads, ...)."""

    network = Continual

    def __init__(self, first_task: int = 2, increment: int = 2, **options: Any):
        known = {*Continual.Config.__dataclass_fields__} - {*Wrapped.Config.__dataclass_fields__} - {"seen", "memory"}
        for key in options:
            if key not in known:
                raise UnknownName("option", key, known)
        self.options = {"first_task": first_task, "increment": increment, **options}

    def needs(self, model: Model) -> str:
        if reason := why_not(model):
            return reason
        places = [*taps(model, "*features*")]
        if not places:
            return "it has no tap at its features"
        try:
            shapes(model, places[-1:])  # type: ignore[arg-type]
        except BadInput as e:
            return f"its features are no grid of patches ({e})"
        return ""

    def apply(self, model: Any, data: Any = None) -> Continual:
        """The classifier's backbone with class-attention for tasks; its own head rests. `fit` then goes through the tasks. data: the
        training data, where room for all tasks is wanted before a fit.

        Raises BadInput where its features lie on no grid.
        """
        if reason := self.needs(model):
            raise BadInput(
                f"gated class-attention on {type(model).__name__}", expected="a classifier whose features are patches", got=reason
            )
        feature = shapes(model, [[*taps(model, "*features*")][-1]])[0]
        dim, classes = feature.tokens.shape[2], model.config.num_classes
        own = {"heads": next(h for h in (12, 8, 6, 4, 3, 2, 1) if dim % h == 0), **self.options}
        own.setdefault("num_tasks", 1 + math.ceil((classes - own["first_task"]) / own["increment"]))
        made = Continual(make_config(Continual.Config, {**trunk_fields(model), **own}), model)
        if data is not None:
            made.study(data)
        return finish(made, "gated_class_attention", model)
