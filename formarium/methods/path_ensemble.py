"""Path ensemble (Chang et al., ICCV 2023, arXiv 2308.06548): a residual network seen as a sum of paths, and that sum made to work.

A pre-norm block adds two branches to its stream, so what the classifier reads is an explicit ensemble,
    z_L = z_0 + sum_l (M_l + F_l),
of 2 L + 1 paths of growing length. Each path feeds the classifier and, inside later branches, longer paths. Three things follow:
pruning drops weak paths from the sum alone (later blocks still get them), EnsembleScale weighs the sum, out = norm(sum_i s_i * p_i),
and self-distillation lets the whole ensemble teach its prefixes. In none of them does the stream between blocks change.

Any backbone's last stage is read this way: its branches where they pass a DropPath each, else a block's whole update as one path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.features import Tap, taps
from formarium.method import Method
from formarium.methods.wrapping import Wrapped, finish, target, trunk_fields, why_not
from formarium.model import Batch, Losses, Model, Stage, Turn, evaluating
from formarium.nn.drop import DropPath
from formarium.nn.spectra import high_share
from formarium.tasks.batches import batches_of, on
from formarium.tasks.image_classification.model import ImageClassifier
from formarium.tasks.image_classification.trunks import ViT

PREFIXES = (0.25, 0.5, 0.75)  # depths of the prefix ensembles that learn from the whole one
SAMPLES = 512  # of the training data, that pruning is decided on in a fit

Tail = Callable[[Tensor, list[Tensor]], Tensor]  # (the stream's end, its paths) -> what the norm and classifier get instead


# reading a residual stream ------------------------------------------------------------------------------------------


@dataclass
class Step:
    """What one block did: its candidates for the stream it got, what its DropPaths let pass, and what it gave, in its own layout."""

    tap: Tap
    given: list[Tensor] = field(default_factory=list)
    branches: list[Tensor] = field(default_factory=list)
    out: Tensor | None = None

    def start(self) -> Tensor | None:
        """The stream that the block got: the last of its inputs that looks like its output."""
        assert self.out is not None
        return next((x for x in reversed(self.given) if x.shape == self.out.shape), None)

    def paths(self, branches: int) -> list[Tensor]:
        """What the block added: its branches, or (where 0) its update as a whole."""
        assert self.out is not None
        if branches:
            return self.branches
        start = self.start()
        assert start is not None
        return [self.out - start]


@contextmanager
def _hooked(pairs: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in pairs:
            handle.remove()


def _record(blocks: Sequence[tuple[nn.Module, Tap]], last: Tap, end: Callable[[list[Step]], Tensor | None]) -> Any:
    """Hooks on some blocks that note their steps; at the last one's tap `end` may give other tokens. A context."""
    steps: list[Step] = []

    def enter(tap: Tap) -> Any:
        return lambda block, args: steps.append(Step(tap, [a for a in args if isinstance(a, Tensor)]))

    def passed(module: nn.Module, args: Any, out: Tensor) -> None:
        if steps and steps[-1].out is None:
            steps[-1].branches.append(out)

    def leave(tap: Tap, args: Any, out: Tensor) -> Tensor | None:
        steps[-1].out = out
        return end(steps) if tap is last else None

    handles: list[Any] = []
    for block, tap in blocks:
        handles.append(block.register_forward_pre_hook(enter(tap)))
        handles += [m.register_forward_hook(passed) for m in block.modules() if isinstance(m, DropPath)]
        handles.append(tap.register_forward_hook(leave))
    return _hooked(handles)


def blocks_of(trunk: nn.Module) -> list[tuple[nn.Module, Tap]]:
    """The blocks that end in a tap, with it, in the order in which the network holds them."""
    modules = dict(trunk.named_modules())
    found = [(name, tap) for name, tap in taps(trunk, "*blocks.*").items()]
    return [(modules[name], tap) for name, tap in found if name in modules and modules[name] is not tap]


@dataclass(frozen=True)
class Stream:
    """branches: of each block of the residual stream that the classifier reads, how many branches are told apart, 0 for a whole block.
    prefix_only: whether the classifier reads the class tokens alone. why: why there is no such stream, or ""."""

    branches: tuple[int, ...] = ()
    prefix_only: bool = False
    why: str = ""


@torch.no_grad()
def stream_of(trunk: ImageClassifier) -> Stream:
    """Look at one forward (on noise, in eval mode): the longest run of blocks up to the last that hand a sum on unchanged."""
    blocks = blocks_of(trunk)
    if not blocks:
        return Stream(why="it has no blocks that end in a tap")
    steps: list[Step] = []
    late: list[nn.Module] = []
    order: list[Tap] = []
    x = torch.randn(2, trunk.config.in_channels, *trunk.image_size, generator=torch.Generator().manual_seed(0)).to(trunk.device)
    handles = [tap.register_forward_hook(lambda m, a, o: order.append(m) or late.clear()) for _, tap in blocks]
    handles += [m.register_forward_hook(lambda m, a, o: late.append(m)) for m in trunk.modules() if isinstance(m, DropPath)]
    with evaluating(trunk):
        with _hooked(handles):
            plain = trunk(x)
        last, sorted_blocks = order[-1], sorted(blocks, key=lambda pair: order.index(pair[1]) if pair[1] in order else -1)
        if late or len(order) != len({*order}):
            return Stream(why="residual branches follow its last block's tap")
        if not isinstance(plain, Tensor) or plain.ndim != 2:
            return Stream(why="it gives something other than logits")
        with _asked(last), _record(sorted_blocks, last, lambda s: steps.extend(s) or torch.cat([s[-1].out, s[-1].out])):
            twice = trunk(x)
        if twice.shape != (4, plain.shape[1]) or not _near(twice[2:], plain):
            return Stream(why="what follows its last block doesn't treat the samples of a batch alike")
        branches: list[int] = []
        for step, before in zip(reversed(steps), [*reversed(steps[:-1]), None], strict=True):
            start = step.start()
            if start is None:
                break
            fits = len(step.branches) > 1 and all(b.shape == step.out.shape for b in step.branches)  # type: ignore[union-attr]
            apart = fits and _near(start + sum(step.branches), step.out)
            branches.insert(0, len(step.branches) if apart else 0)
            if before is None or before.out.shape != start.shape or not torch.equal(before.out, start):  # type: ignore[union-attr]
                break
        if not branches:
            return Stream(why="its last block doesn't keep the shape of its tokens")
        if [tap for _, tap in blocks[-len(branches) :]] != [s.tap for s in steps[-len(branches) :]]:
            return Stream(why="its blocks run in another order than they are held in")
        return Stream((*branches,), _reads_prefix_only(trunk, x, last))


@torch.no_grad()
def width(trunk: ImageClassifier, tap: Tap) -> int:
    """How many channels pass a tap; works on the meta device, too."""
    seen: list[int] = []
    hook = tap.register_forward_hook(lambda m, a, out: seen.append(out.shape[1 if tap.layout == "map" else -1]))
    with evaluating(trunk), _hooked([hook]):
        nn.Module.__call__(trunk, torch.zeros(1, trunk.config.in_channels, *trunk.image_size, device=trunk.device))
    return int(seen[-1])


def _near(a: Tensor, b: Any) -> bool:
    return bool((a - b).abs().max() <= 1e-4 * (1e-3 + b.abs().max()))


@contextmanager
def _asked(tap: Tap) -> Iterator[None]:
    """Somebody looks at this tap, so that blocks that leave out what nobody reads don't."""
    before = tap.watch
    if before is None:
        tap.watch = lambda feature: None
    try:
        yield
    finally:
        tap.watch = before


def _reads_prefix_only(trunk: ImageClassifier, x: Tensor, last: Tap) -> bool:
    if last.layout != "tokens" or not last.prefix:
        return False
    seen: list[Tensor] = []
    with torch.enable_grad(), _asked(last):
        hook = last.register_forward_hook(lambda m, a, o: seen.append(o.detach().requires_grad_()) or seen[-1])
        with _hooked([hook]):
            logits = trunk(x)
        (grad,) = torch.autograd.grad((logits * torch.randn_like(logits)).sum(), seen[0])
    return bool((grad[:, : last.prefix] != 0).any() and (grad[:, last.prefix :] == 0).all())


# the model ----------------------------------------------------------------------------------------------------------


class Paths(NamedTuple):
    """logits: float [batch, classes]. paths: of every path, the stream's start first, its tokens, float [paths, batch, tokens, dim].
    ensemble: the stream's end, their sum, float [batch, tokens, dim]."""

    logits: Tensor
    paths: Tensor
    ensemble: Tensor


class Ensemble(Wrapped):
    """A classifier whose norm and head read a pruned, weighted sum of its paths. With all weights 1 and every path kept it is the plain
    classifier, bit for bit."""

    keep: Tensor

    @dataclass(frozen=True)
    class Config(Wrapped.Config):
        branches: tuple[int, ...] = ()  # of each block in the stream's last run, see Stream; by default two a block in a ViT
        prefix_only: bool = True  # only class tokens reach the classifier, so that only they need the ensemble
        scale: bool = True  # EnsembleScale, one weight a path and channel, initially 1
        distillation: float = 0.5  # weight of what the whole ensemble teaches its prefixes, shared equally by them; 0 for none
        prune: float = 0.25  # the largest share of paths that a fit's second stage drops; 0 for no second stage
        finetune_lr: float = 1e-5  # of that stage
        finetune_share: float = 0.1  # of the first stage's steps

    def __init__(self, config: Config, trunk: ImageClassifier | None = None):
        super().__init__(config, trunk)
        blocks = blocks_of(self.trunk)
        branches = tuple(config.branches)
        if not branches and isinstance(self.trunk, ViT):
            branches = (2,) * self.trunk.config.depth
        if not 0 < len(branches) <= len(blocks):
            raise BadInput("branches", expected=f"one number for each of the last 1 to {len(blocks)} blocks", got=str(branches))
        self.branches = branches
        dim = width(self.trunk, blocks[-1][1])
        self.count = 1 + sum(max(1, n) for n in branches)
        self.kinds = ["embedding", *(k for n in branches for k in (("attention", "feed-forward") if n == 2 else ("block",) * max(1, n)))]
        self.block = [0, *(i for i, n in enumerate(branches, start=1) for _ in range(max(1, n)))]  # that a path is of, from 1
        self.scales = nn.Parameter(torch.ones(self.count, dim)) if config.scale else None
        self.register_buffer("keep", torch.ones(self.count, dtype=torch.bool))
        self._data: Any = None  # of the fit that is under way, for pruning

    @property
    def rows(self) -> int | None:
        """How many leading tokens the classifier reads; None for all."""
        last = self._blocks()[-1][1]
        return last.prefix if self.config.prefix_only and last.layout == "tokens" and last.prefix else None

    def _blocks(self) -> list[tuple[nn.Module, Tap]]:
        return blocks_of(self.trunk)[-len(self.branches) :]

    def weights(self) -> Tensor:
        """Of each path in the ensemble, float [paths, dim]: the scale where it is kept, 0 where it is pruned."""
        keep = self.keep.to(torch.float32)[:, None]
        return keep * self.scales if self.scales is not None else keep

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [batch, channels, height, width] to logits [batch, classes]."""
        if self.scales is None and bool(self.keep.all()):
            return self.trunk(image)
        delta = self.weights() - 1
        return self._run(image, lambda end, paths: self.moved(end, paths, delta))

    def _run(self, image: Tensor, tail: Tail) -> Tensor:
        """The trunk, with what `tail` makes of the stream's end and its paths in front of the last norm."""
        blocks = self._blocks()
        last = blocks[-1][1]

        def end(steps: list[Step]) -> Tensor:
            start = steps[0].start()
            assert start is not None and steps[-1].out is not None
            return tail(steps[-1].out, [start, *(p for s, n in zip(steps, self.branches, strict=True) for p in s.paths(n))])

        with _asked(last), _record(blocks, last, end):
            return self.trunk(image)

    def _along(self, weight: Tensor) -> Tensor:
        """A weight a channel, float [dim], against tokens in the stream's layout."""
        return weight[:, None, None] if self._blocks()[-1][1].layout == "map" else weight

    def moved(self, end: Tensor, paths: list[Tensor], delta: Tensor) -> Tensor:
        """end + sum_i delta_i p_i, where the classifier reads it: exactly `end` where delta is 0. delta: float [paths, dim or 1]."""
        rows = self.rows
        if rows is None:
            for p, d in zip(paths, delta, strict=True):
                end = torch.addcmul(end, p, self._along(d))
            return end
        read = torch.stack([p[:, :rows] for p in paths], 1)  # b paths rows c
        return torch.cat([end[:, :rows] + (read * delta[:, None]).sum(1), end[:, rows:]], 1)

    # prefixes ---------------------------------------------------------------------------------------------------------

    def depths(self) -> list[int]:
        """After how many blocks the prefix ensembles end."""
        blocks = len(self.branches)
        return sorted({min(max(1, round(share * blocks)), blocks - 1) for share in PREFIXES} - {0})

    def prefix_logits(self, image: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(logits of the whole ensemble, those of each prefix e_l = s_0 z_0 + the weighted paths up to block l), by one norm and head."""
        depths = self.depths()
        weights = self.weights()

        def tail(end: Tensor, paths: list[Tensor]) -> Tensor:
            whole = self.moved(end, paths, weights - 1)
            prefixes = []
            for depth in depths:
                n = sum(b <= depth for b in self.block)
                prefixes.append(self.moved(torch.zeros_like(end), paths[:n], weights[:n]))
            return torch.cat([whole, *prefixes])

        whole, *prefixes = self._run(image, tail).chunk(1 + len(depths))
        return whole, prefixes

    # training ---------------------------------------------------------------------------------------------------------

    def study(self, data: Any) -> None:
        self.trunk.study(data)
        self._data = data

    def training_stages(self) -> Sequence[Stage]:
        first = Stage("train")
        if int(self.config.prune * self.count) < 1:
            return (first,)
        turn = Turn(recipe={"lr": self.config.finetune_lr, "warmup_epochs": 0})
        return (first, Stage("prune and fine-tune", (turn,), self.config.finetune_share, prepare="prune_paths"))

    def prune_paths(self) -> None:
        """Before the second stage: paths without which training samples cost less, so that the held-out ones stay unseen."""
        if self._data is not None:
            prune(self, self._data, share=self.config.prune, split="train", by="loss", samples=SAMPLES)
            self._data = None

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"scales"}

    def loss(self, batch: Batch) -> Losses:
        """Cross entropy, and the KL divergence from each prefix's answer to the whole ensemble's, which is its teacher."""
        image = self.normalise(batch["image"])
        if not self.config.distillation or not self.depths():
            return self.classification_loss(self(image), batch)
        whole, prefixes = self.prefix_logits(image)
        own = F.cross_entropy(whole.float(), target(batch))
        teacher = whole.detach().float().log_softmax(-1)
        kl = [F.kl_div(p.float().log_softmax(-1), teacher, reduction="batchmean", log_target=True) for p in prefixes]
        taught = torch.stack(kl).mean()
        return Losses(own + self.config.distillation * taught, {"cross_entropy": own, "self_distillation": taught})

    # looking ----------------------------------------------------------------------------------------------------------

    def paths(self, image: Tensor) -> Paths:
        """Normalised image [batch, channels, height, width] to every path's unweighted tokens. Their sum is the stream's end."""
        found: list[Tensor] = []
        layout = self._blocks()[-1][1].layout

        def tail(end: Tensor, paths: list[Tensor]) -> Tensor:
            found.extend(_tokens(x, layout) for x in (end, *paths))
            return self.moved(end, paths, self.weights() - 1)

        logits = self._run(image, tail)
        return Paths(logits, torch.stack(found[1:]), found[0])


def _tokens(x: Tensor, layout: str) -> Tensor:
    if layout == "map":
        return x.flatten(2).transpose(1, 2)
    return x.flatten(1, -2) if layout == "grid" else x


# paths' influence, pruning ------------------------------------------------------------------------------------------


@torch.no_grad()
def removal(model: Ensemble, batches: Sequence[Batch], together: int = 8) -> tuple[Tensor, Tensor]:
    """(accuracy, mean cross entropy), float64 [1 + paths] each: of the model as it is, then without each path in the ensemble.

    Later blocks get the removed path all the same. A pruned path's entry is the model's own. together: ensembles in one pass of the head.
    """
    weights = model.weights()
    sums = torch.zeros(2, 1 + model.count, dtype=torch.float64)
    seen = 0
    with evaluating(model):
        for batch in batches:
            kept: list[Any] = []
            image, label = model.normalise(batch["image"]), batch["label"]

            def tail(end: Tensor, paths: list[Tensor]) -> Tensor:
                whole = model.moved(end, paths, weights - 1)
                gone = torch.eye(model.count, device=end.device, dtype=end.dtype)
                return torch.cat([whole, *(model.moved(whole, paths, -weights * gone[i][:, None]) for i in chosen)])  # noqa: B023

            for first in range(0, model.count, together):
                chosen = range(first, min(first + together, model.count))
                logits = model._run(image, tail).float().unflatten(0, (1 + len(chosen), -1))
                kept += [*logits[1:]] if kept else [*logits]
            every = torch.stack(kept)  # 1+paths b classes
            sums[0] += (every.argmax(-1) == label).double().sum(1).cpu()
            sums[1] += F.cross_entropy(every.movedim(0, 2), label[:, None].expand(-1, len(kept)), reduction="none").double().sum(0).cpu()
            seen += len(label)
    return sums[0] / seen, sums[1] / seen


def influence(model: Ensemble, data: Any, split: str = "val", samples: int = 2000) -> list[dict[str, Any]]:
    """Of each path: what it is, and by how much accuracy and cross entropy change where the ensemble lacks it.

    data: what `formarium.evaluate` takes, or batches. Keys: path, kind, block (from 1; 0 for the embedding), kept, accuracy, loss.
    """
    accuracy, loss = removal(model, _batches(model, data, split, samples))
    return [
        {
            "path": i,
            "kind": model.kinds[i],
            "block": model.block[i],
            "kept": bool(model.keep[i]),
            "accuracy": float(accuracy[1 + i] - accuracy[0]),
            "loss": float(loss[1 + i] - loss[0]),
        }
        for i in range(model.count)
    ]


def prune(
    model: Ensemble, data: Any, share: float = 0.25, split: str = "val", by: str = "accuracy", samples: int = 2000
) -> list[dict[str, Any]]:
    """Drop the paths whose removal helps, the most helpful first, measuring anew after each; at most `share` of all.

    by: "accuracy" (it must rise) or "loss" (cross entropy must fall). Returns a row for each dropped path: path, kind, block, gain.
    """
    if by not in ("accuracy", "loss"):
        raise BadInput("by", expected='"accuracy" or "loss"', got=repr(by))
    batches, dropped = _batches(model, data, split, samples), []
    for _ in range(int(share * model.count) - int((~model.keep).sum())):
        accuracy, loss = removal(model, batches)
        gain = accuracy[1:] - accuracy[0] if by == "accuracy" else loss[0] - loss[1:]
        gain[~model.keep.cpu()] = -torch.inf
        best = int(gain.argmax())
        if not gain[best] > 0:
            break
        model.keep[best] = False
        dropped.append({"path": best, "kind": model.kinds[best], "block": model.block[best], "gain": float(gain[best])})
    return dropped


@torch.no_grad()
def high_frequency_share(model: Ensemble, image: Tensor) -> tuple[float, float]:
    """How much of the patches' energy at the stream's end is not their mean: (in the plain sum, in the weighted one).

    Close to 0 where all patches look alike; the ensemble's weights may act as a high-pass filter. image: normalised [batch, ...].
    """
    last = model._blocks()[-1][1]
    paths = model.paths(image)
    weighted = torch.einsum("pbnc,pc->bnc", paths.paths, model.weights().expand(model.count, paths.paths.shape[-1]))
    plain, own = (high_share(x[:, last.prefix :]).mean().item() for x in (paths.ensemble, weighted))
    return plain, own


def _batches(model: Ensemble, data: Any, split: str, samples: int) -> list[Batch]:
    return [on(model.device, b) for b in batches_of(model, data, samples=samples, split=split)]


# making one ---------------------------------------------------------------------------------------------------------


class PathEnsemble(Method):
    """scale: EnsembleScale. distillation: weight of the self-distillation. prune: the largest share of paths a fit drops (0: none).
    finetune_lr: of the steps after pruning."""

    network = Ensemble

    def __init__(self, scale: bool = True, distillation: float = 0.5, prune: float = 0.25, finetune_lr: float = 1e-5):
        if distillation < 0 or not 0 <= prune < 1:
            raise BadInput("options", expected="distillation of 0 or more, prune from 0 to below 1", got=f"{distillation}, {prune}")
        self.options = {"scale": scale, "distillation": distillation, "prune": prune, "finetune_lr": finetune_lr}

    def needs(self, model: Model) -> str:
        return why_not(model) or stream_of(model).why  # type: ignore[arg-type]

    def apply(self, model: Any, data: Any = None) -> Ensemble:
        """The classifier as an ensemble of its paths; its weights stay, and until it is trained so do its answers. `data` isn't needed.

        Raises BadInput where its residual stream can't be read.
        """
        reason = why_not(model)
        stream = Stream(why=reason) if reason else stream_of(model)
        if stream.why:
            raise BadInput(
                f"path ensemble of {type(model).__name__}", expected="a classifier that reads a residual stream's end", got=stream.why
            )
        config = Ensemble.Config(**trunk_fields(model), branches=stream.branches, prefix_only=stream.prefix_only, **self.options)
        return finish(Ensemble(config, model), "path_ensemble", model)
