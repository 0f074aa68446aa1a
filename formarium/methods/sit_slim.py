"""SiT, Self-slimmed Vision Transformer (Zong et al., ECCV 2022, arXiv 2111.12624): fewer and fewer tokens, none of them dropped.

Token slimming mixes the N tokens X of an image into M: X' = A^T X, A = softmax over N of s W(X), W a small MLP to M columns and s a learned
scalar (eq. 3-4), so each new token is a convex combination of all old ones. Feature recalibration distillation trains it: reverse modules,
there for training alone, spread the M tokens to N again, and these, like the logits, imitate the same network without slimming, block by
block (eq. 5-8).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.catalogue import make_config
from formarium.errors import BadInput
from formarium.features import Features, Tap, taps, watching
from formarium.method import Method
from formarium.methods.sit_slim_trunk import LVViT
from formarium.methods.wrapping import Wrapped, finish, make_trunk, target, trunk_fields, why_not
from formarium.model import Batch, Losses, Model, Stage, Turn, evaluating
from formarium.nn.init import init_transformer
from formarium.nn.mlp import MLP
from formarium.tasks.image_classification.model import ImageClassifier

TOKENS, LOGITS, TEMPERATURE = 2.0, 2.0, 1.0  # the weights of the distillation's two terms, and its temperature
STAGES = 4  # token counts that follow one another in every published model


# the modules --------------------------------------------------------------------------------------------------------


class TokenSlimming(nn.Module):
    """tokens [batch, N, dim] -> [batch, kept, dim], for any N.

    It works behind a block: `after` is that block's forward hook. The block's tokens, behind their first `prefix` ones, are slimmed; where
    the block passes on something else of which each token has its own (a TNT's words), that is mixed by the same weights.
    """

    def __init__(self, layer: Layer, kept: int, scale: float = 1.0):
        super().__init__()
        self.layer, self.active = layer, True
        self.norm = nn.LayerNorm(layer.dim)
        self.fc1 = nn.Linear(layer.dim, layer.dim // 2)
        self.fc2 = nn.Linear(layer.dim // 2, kept)
        self.scale = nn.Parameter(torch.full((1, 1, 1), scale))
        self.recording = False
        self.last: Tensor | None = None  # the slimmed tokens, while recording

    def weights(self, tokens: Tensor) -> Tensor:
        """A^T, [batch, kept, N]: rows that are non-negative and sum to 1."""
        return (self.fc2(F.gelu(self.fc1(self.norm(tokens)))) * self.scale).softmax(1).transpose(1, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.weights(tokens) @ tokens

    def after(self, block: nn.Module, args: Any, output: Any) -> Any:
        if not self.active:
            return None
        parts = [*output] if isinstance(output, tuple) else [output]
        x = parts[self.layer.index]
        mix = self.weights(x[:, self.layer.prefix :])  # b kept n
        slim = mix @ x[:, self.layer.prefix :]
        self.last = slim if self.recording else None
        parts[self.layer.index] = torch.cat([x[:, : self.layer.prefix], slim], 1)
        for i in self.layer.companions:  # (b n) ... to (b kept) ...
            parts[i] = (mix @ parts[i].reshape(*mix.shape[::2], -1)).reshape(-1, *parts[i].shape[1:])
        return tuple(parts) if isinstance(output, tuple) else parts[0]


class ReverseSlimming(nn.Module):
    """[batch, kept, dim] -> [batch, recovered, dim]: an MLP over the token axis, then x + MLP(LN x) over channels."""

    def __init__(self, dim: int, kept: int, recovered: int, ratio: int = 4):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.mlp1 = MLP(kept, ratio * recovered, recovered)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp2 = MLP(dim, ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mlp1(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.mlp2(self.norm2(x))


def recalibration_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    tokens: Sequence[Tensor],
    teacher_tokens: Sequence[Tensor],
    labels: Tensor,
    token_weight: float = TOKENS,
    logit_weight: float = LOGITS,
    temperature: float = TEMPERATURE,
) -> Losses:
    """Cross entropy + token_weight * mean over blocks of MSE(recovered tokens, teacher's) + logit_weight * KL at the temperature.

    logits: float [batch, classes]. tokens: per block float [batch, N, dim], without class tokens. labels: int64 [batch] or float
    [batch, classes].
    """
    ce = F.cross_entropy(logits.float(), labels)
    same = token_weight * sum(F.mse_loss(s, t) for s, t in zip(tokens, teacher_tokens, strict=True)) / len(tokens)
    said, meant = ((x.float() / temperature).log_softmax(1) for x in (logits, teacher_logits))
    kl = logit_weight * temperature**2 * F.kl_div(said, meant, reduction="batchmean", log_target=True)
    return Losses(ce + same + kl, {"cross_entropy": ce, "tokens": same, "logits": kl})


# which tokens a network would let us slim ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A block that passes on plain tokens. index: where they stand in its output; companions: what there is of one row a token."""

    name: str
    tokens: int  # without the prefix
    dim: int
    prefix: int
    index: int
    companions: tuple[int, ...]


@torch.no_grad()
def layers_of(trunk: ImageClassifier) -> list[Layer]:
    """Those blocks with taps, in the order of a forward on zeros (which may be on the meta device)."""
    names = [name for name, tap in taps(trunk, "*blocks.*").items() if tap.layout == "tokens"]
    outputs: dict[str, tuple[Any, ...]] = {}
    found, read = Features(), {name: tap for name, tap in taps(trunk, "*").items() if name in names}

    def keep(name: str) -> Any:
        return lambda module, args, out: outputs.__setitem__(name, out if isinstance(out, tuple) else (out,))

    hooks = [trunk.get_submodule(name).register_forward_hook(keep(name), prepend=True) for name in names]
    try:
        with evaluating(trunk), watching(trunk, dict.fromkeys(names), found, read, {}):
            nn.Module.__call__(trunk, torch.zeros(1, trunk.config.in_channels, *trunk.image_size, device=trunk.device))
    finally:
        for hook in hooks:
            hook.remove()
    out = []
    for name, feature in found.items():
        parts, (_, count, dim) = outputs[name], feature.tokens.shape
        index = next((i for i, p in enumerate(parts) if isinstance(p, Tensor) and p.shape == feature.tokens.shape), None)
        if index is not None:
            n = count - feature.prefix
            rows = tuple(i for i, p in enumerate(parts) if i != index and isinstance(p, Tensor) and p.ndim > 1 and p.shape[0] == n)
            out.append(Layer(name, n, dim, feature.prefix, index, rows))
    return out


def sequences(layers: Sequence[Layer]) -> list[list[Layer]]:
    """Blocks whose tokens have one shape belong together."""
    groups: dict[tuple[int, ...], list[Layer]] = {}
    for layer in layers:
        groups.setdefault((layer.tokens, layer.dim, layer.prefix), []).append(layer)
    return [*groups.values()]


def slimmable(trunk: ImageClassifier) -> tuple[list[list[Layer]], str]:
    """The sequences whose later blocks really run on fewer tokens, found by trying; where there are none, the reason."""
    if not any(tap.layout == "tokens" for tap in taps(trunk, "*blocks.*").values()):
        return [], "its blocks keep their tokens on a grid, which mixed tokens have no place on"
    groups, why = [], "none of its stages has two blocks on one sequence of tokens"
    for group in sequences(layers_of(trunk)):
        if len(group) > 1 and group[0].tokens > 1:
            if reason := _refuses(trunk, group[0]):
                why = f"behind {group[0].name} it needs every token in its place ({reason})"
            else:
                groups.append(group)
    return groups, "" if groups else why


@torch.no_grad()
def _refuses(trunk: ImageClassifier, layer: Layer) -> str:
    """Try half of the tokens behind one block: what breaks, or ""."""
    trial = TokenSlimming(layer, max(1, layer.tokens // 2)).to(next(trunk.parameters()).device)
    image = torch.linspace(-1, 1, 2 * trunk.config.in_channels * trunk.image_size[0] * trunk.image_size[1])
    image = image.sin().reshape(2, trunk.config.in_channels, *trunk.image_size).to(next(trunk.parameters()).device)
    hook = trunk.get_submodule(layer.name).register_forward_hook(trial.after)
    try:
        with evaluating(trunk):
            both, first = (nn.Module.__call__(trunk, x) for x in (image, image[:1]))
        same = isinstance(both, Tensor) and both.shape[0] == 2 and torch.allclose(both[:1], first, rtol=1e-3, atol=1e-4)
        return "" if same else "samples would get mixed up"
    except Exception as e:  # whatever a network says that can't do it
        return f"{type(e).__name__}: {str(e).splitlines()[0]}" if str(e) else type(e).__name__
    finally:
        hook.remove()


def plan(depth: int, share: float, stages: int = STAGES) -> tuple[tuple[int, ...], float]:
    """(blocks of each stage, ratio r), so that counts 1, r, r^2 ... leave that share of the tokens, averaged over blocks, with r as near
    the paper's 0.5 as possible and the slimmed stages as even as possible. A share out of reach gives the least there is."""
    best: tuple[tuple[float, ...], tuple[int, ...], float] | None = None
    for cuts in range(1, min(stages, depth)):
        for places in combinations(range(1, depth), cuts):
            blocks = tuple(b - a for a, b in zip((0, *places), (*places, depth), strict=True))
            ratio = _ratio(blocks, share * depth)
            score = (round(abs(ratio - 0.5), 2), max(blocks[1:]) - min(blocks[1:]), -cuts, blocks[0])
            if best is None or score < best[0]:
                best = (score, blocks, ratio)
    if best is None:
        raise BadInput("blocks", expected="at least two on one sequence of tokens", got=str(depth))
    return best[1], best[2]


def _ratio(blocks: Sequence[int], wanted: float) -> float:
    low, high = 0.02, 1.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (low, middle) if sum(b * middle**i for i, b in enumerate(blocks)) > wanted else (middle, high)
    return high


# the model ----------------------------------------------------------------------------------------------------------


class Slimmed(Wrapped):
    """A trunk with token slimming behind some of its blocks. While it learns it has reverse modules and a teacher, the trunk unslimmed;
    the last step of a fit leaves the slimmed network alone, and from then on `fit` trains it by cross entropy."""

    @dataclass(frozen=True)
    class Config(Wrapped.Config):
        trunk: str = "lv_vit"  # LV-ViT, or as in Wrapped
        places: tuple[str, ...] = ()  # blocks behind which tokens are slimmed
        shares: tuple[float, ...] = ()  # of the tokens at the start of their sequence that are left there
        reverse: bool = True  # whether there are reverse modules
        teacher: bool = False  # whether it has its teacher
        token_weight: float = TOKENS
        logit_weight: float = LOGITS
        temperature: float = TEMPERATURE
        scale: float = 1.0  # where the scalar s starts; at 1 fresh weights mix evenly, so that new tokens begin all but equal

    def __init__(self, config: Config, trunk: ImageClassifier | None = None):
        super().__init__(config, trunk if trunk is not None else fresh_trunk(config))
        known = layers_of(self.trunk)
        places = {layer.name: layer for layer in known}
        if unknown := [p for p in config.places if p not in places] or len(config.shares) != len(config.places):
            raise BadInput("places", expected=f"blocks of plain tokens ({', '.join(places)}), a share each", got=str(unknown))
        slimmed = [group for group in sequences(known) if any(layer.name in config.places for layer in group)]
        self.layers = [layer for group in slimmed or sequences(known) for layer in group]
        self.slims = nn.ModuleList(
            TokenSlimming(places[p], max(1, int(places[p].tokens * s)), config.scale)
            for p, s in zip(config.places, config.shares, strict=True)
        ).to(next(self.trunk.parameters()).device)
        for name, slim in zip(config.places, self.slims, strict=True):
            self.trunk.get_submodule(name).register_forward_hook(slim.after)
        for tap in taps(self.trunk).values():
            tap.register_forward_pre_hook(_own_grid, with_kwargs=True)
        init_transformer(self.slims)
        if config.reverse:
            self.reverse = self._reverse(slimmed)
        if config.teacher:
            self.take_teacher()

    def counts(self) -> list[int]:
        """Tokens behind each of `layers`, slimming included."""
        found = {layer.name: layer.tokens for layer in layers_of(self.trunk)}
        kept = {p: s.fc2.out_features for p, s in zip(self.config.places, self.slims, strict=True)}
        return [kept.get(layer.name, found.get(layer.name, layer.tokens)) for layer in self.layers]

    def _reverse(self, slimmed: Sequence[Sequence[Layer]]) -> nn.ModuleList:
        counts, out = dict(zip((layer.name for layer in self.layers), self.counts(), strict=True)), []
        for group in slimmed:
            lost = 0
            for layer in group:
                lost = max(lost, layer.tokens - counts[layer.name])
                out.append(ReverseSlimming(layer.dim, counts[layer.name], layer.tokens) if lost else nn.Identity())
        made = nn.ModuleList(out).to(next(self.trunk.parameters()).device)
        init_transformer(made)
        return made

    @property
    def token_share(self) -> float:
        """Tokens that the slimmed sequences' blocks read, of what they would read unslimmed."""
        if not self.config.places:
            return 1.0
        read, whole, left = 0, 0, dict(zip((layer.name for layer in self.layers), self.counts(), strict=True))
        for group in sequences(self.layers):
            entering = [group[0].tokens, *(left[layer.name] for layer in group[:-1])]
            read, whole = read + sum(entering), whole + len(group) * group[0].tokens
        return read / whole

    def tokens(self, image: Tensor, recover: bool) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the tokens behind each of `layers` without class tokens: as they are, or spread to their full number again."""
        if recover and tuple(image.shape[2:]) != self.image_size:
            h, w = self.image_size
            raise BadInput("image size in training", expected=f"{h}x{w}", got=f"{image.shape[2]}x{image.shape[3]}", fix="resize the data")
        for slim in self.slims:
            slim.recording = True
        try:
            logits, found = _read(self.trunk, [layer.name for layer in self.layers], image)
            slim_tokens = {p: slim.last for p, slim in zip(self.config.places, self.slims, strict=True) if slim.active}
            out = [slim_tokens.get(layer.name, found[layer.name].tokens[:, layer.prefix :]) for layer in self.layers]
        finally:
            for slim in self.slims:
                slim.recording, slim.last = False, None
        return logits, [back(x) for back, x in zip(self.reverse, out, strict=True)] if recover else out

    @contextmanager
    def unslimmed(self) -> Iterator[None]:
        """The trunk on all its tokens, for a while."""
        for slim in self.slims:
            slim.active = False
        try:
            yield
        finally:
            for slim in self.slims:
                slim.active = True

    # training ---------------------------------------------------------------------------------------------------------

    def training_stages(self) -> Sequence[Stage]:
        """Slimming, distilled; one created without a teacher first becomes its own. A finished one goes on by cross entropy."""
        learned = (Turn("loss", ("trunk.*", "slims.*", "reverse.*")),)
        if hasattr(self, "teacher"):
            return (Stage("slimming", learned),)
        if not hasattr(self, "reverse") or not self.config.places:
            return (Stage("train", (Turn("loss", ("trunk.*", "slims.*")),)),)
        return (Stage("teacher", (Turn("unslimmed_loss", ("trunk.*",)),)), Stage("slimming", learned, prepare="take_teacher"))

    def unslimmed_loss(self, batch: Batch) -> Losses:
        with self.unslimmed():
            return super().loss(batch)

    def take_teacher(self) -> None:
        """The trunk as it is, without slimming, frozen, becomes the teacher."""
        teacher = fresh_trunk(self.config).to(next(self.trunk.parameters()).device)
        teacher.load_state_dict(self.trunk.state_dict())
        self.teacher = teacher.requires_grad_(False).eval()
        self.reconfigure(teacher=True)

    def train(self, mode: bool = True) -> Slimmed:
        super().train(mode)
        if hasattr(self, "teacher"):
            self.teacher.eval()
        return self

    def loss(self, batch: Batch) -> Losses:
        """Feature recalibration distillation; without a teacher, cross entropy."""
        if not hasattr(self, "teacher"):
            return super().loss(batch)
        image, c = self.normalise(batch["image"]), self.config
        with torch.no_grad():
            meant, found = _read(self.teacher, [layer.name for layer in self.layers], image)
        said, tokens = self.tokens(image, recover=True)
        wanted = [found[layer.name].tokens[:, layer.prefix :] for layer in self.layers]
        return recalibration_loss(said, meant, tokens, wanted, target(batch), c.token_weight, c.logit_weight, c.temperature)

    def after_step(self, step: int, steps: int) -> None:
        super().after_step(step, steps)
        if step == steps:
            self.release()

    def release(self) -> None:
        """Leave the slimmed network alone: no reverse modules, no teacher."""
        for part in ("reverse", "teacher"):
            if hasattr(self, part):
                delattr(self, part)
        self.reconfigure(reverse=False, teacher=False)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """A state of the finished network finishes this one; what is there for training alone is left out where this one is finished."""
        parts = {name.split(".")[0] for name in state_dict}
        if not hasattr(self, "teacher") and "teacher" in parts and hasattr(self, "reverse"):
            self.take_teacher()
        if strict and "reverse" not in parts and any(True for _ in getattr(self, "reverse", nn.Identity()).parameters()):
            self.release()
        kept = {k: v for k, v in state_dict.items() if hasattr(self, k.split(".")[0])}
        return super().load_state_dict(kept, strict, assign)

    def pyramid(self, image: Tensor) -> tuple[Tensor, ...]:
        raise BadInput("a slimmed model's pyramid", expected="maps", got="tokens that belong nowhere on the image", fix="take the trunk's")


def fresh_trunk(config: Any) -> ImageClassifier:
    """The trunk that a Slimmed's config names."""
    if config.trunk != "lv_vit":
        return make_trunk(config)
    return LVViT(make_config(LVViT.Config, {**config.trunk_config, "num_classes": config.num_classes, "in_channels": config.in_channels}))


def _read(trunk: ImageClassifier, names: Sequence[str], image: Tensor) -> tuple[Tensor, Features]:
    found = Features()
    read = {name: tap for name, tap in taps(trunk, "*blocks.*").items() if name in names}
    with watching(trunk, dict.fromkeys(read), found, read, {}):
        return trunk(image), found


def _own_grid(tap: Tap, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A tap behind slimmed tokens is told of no grid, as there is none."""
    grid = kwargs.get("grid")
    if tap.watch is None or grid is None or tap.layout != "tokens" or kwargs.get("batch") is not None:
        return None
    fits = args[0].shape[1] in (tap.prefix + torch.Size(grid).numel(), tap.prefix)
    return None if fits else (args, {**kwargs, "grid": None})


# making one ---------------------------------------------------------------------------------------------------------


class SiTSlim(Method):
    """target: share of the tokens that blocks read, in (0, 1), averaged over the slimmed sequences' blocks; from it follow the stages.
    stage_blocks, keeping_ratio: the stages themselves instead, as in the paper: how many blocks run at each count, and what each
    slimming leaves of the one before. scale: where the learned scalar of the mixing weights starts; the paper's is 1, from which short
    training doesn't get far."""

    network = Slimmed

    def __init__(self, target: float = 0.5, stage_blocks: Sequence[int] = (), keeping_ratio: float = 0.5, scale: float = 50.0):
        for name, value in (("target", target), ("keeping_ratio", keeping_ratio)):
            if not 0 < value < 1:
                raise BadInput(name, expected="a share between 0 and 1", got=str(value))
        self.target, self.stage_blocks, self.keeping_ratio, self.scale = target, tuple(stage_blocks), keeping_ratio, scale

    def needs(self, model: Model) -> str:
        return why_not(model) or slimmable(model)[1]  # type: ignore[arg-type]

    def apply(self, model: Any, data: Any = None) -> Slimmed:
        """The model with token slimming, fresh, and itself as the teacher; `fit` then trains it. `data` isn't needed.

        Raises BadInput where nothing can be slimmed.
        """
        reason = why_not(model)
        groups, broken = ([], "") if reason else slimmable(model)
        if reason or not groups:
            raise BadInput(f"SiT on {type(model).__name__}", expected="blocks that can do with fewer tokens", got=reason or broken)
        places, shares = [], []
        for group in groups:
            blocks, ratio = (self.stage_blocks, self.keeping_ratio) if self.stage_blocks else plan(len(group), self.target)
            if sum(blocks) != len(group) or min(blocks) < 1:
                raise BadInput("stage_blocks", expected=f"whole numbers that sum to {len(group)}", got=str(blocks))
            cuts = [*accumulate(blocks)][:-1]
            places += [group[at - 1].name for at in cuts]
            shares += [ratio ** (i + 1) for i in range(len(cuts))]
        config = Slimmed.Config(**trunk_fields(model), places=tuple(places), shares=tuple(shares), teacher=True, scale=self.scale)
        return finish(Slimmed(config, model), "sit_slim", model)
