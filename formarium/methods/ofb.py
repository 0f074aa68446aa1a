"""Once for Both (Ye et al., CVPR 2024, arXiv 2403.15835): one search finds how important each unit is and how many of them stay.

Heads, their widths, MLPs' hidden units and (of a ViT) the embedding's channels are gated by a bi-mask of importance and sparsity
(ofb_space.py) while the weights train. An adaptive one-hot loss drives each module to one size, a budget term the whole to its target,
and a growing share of the tokens is masked and painted again, so that the shrinking network keeps a rich representation. Then the network
is cut for good: gates are folded into the weights, dropped rows and columns removed, and what is left is fine-tuned.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput, FormariumError, UnknownName
from formarium.features import Feature, Features, taps, watching
from formarium.method import Method
from formarium.methods.ofb_space import GatedLinear, LivingDepthwise, Space, attention_cells, embedding_cells, hidden_cells
from formarium.methods.wrapping import Wrapped, finish, shapes, trunk_fields, why_not
from formarium.model import Batch, Losses, Model, Stage, Turn, evaluating
from formarium.tasks.image_classification.model import ImageClassifier
from formarium.tasks.image_classification.trunks import ViT

MODES = ("joint", "heads", "channels", "")  # of attention: heads and widths together, one of them, nothing
ONE_HOT, BUDGET = 0.5, 5.0  # weights of the one-hot losses and of the budget's
SCORES = {"attention": 4e-4, "mlp": 1e-4, "embedding": 1e-4}  # of the sum of importance, in the one-hot loss
MOST, LEAST, WARMUP = 0.99, 0.1, 0.4  # w at the start and after the warm-up, that part of the search
KEPT = (0.95, 0.75)  # of the tokens, likewise
ROUNDS = 30  # compressions in a search
DEAD = -1e4  # a dead size's log share, where sizes are decided on
WINDOW = 47  # pixels: where the masked image's targets are normalised


# modules that can be narrowed ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """An MLP or attention module: its projections in (name, how many times the units side by side), the one out, depthwise convolutions."""

    name: str
    kind: str  # "mlp" or "attention"
    size: tuple[int, int]  # heads, width
    into: tuple[tuple[str, int], ...]
    out: str
    depthwise: tuple[str, ...]


def unit_of(name: str, module: nn.Module) -> Unit | None:
    """What a module looks like to the search; None where it isn't made as these are."""
    parts = dict(module.named_children())
    linear = {k: m for k, m in parts.items() if isinstance(m, nn.Linear)}
    if {"fc1", "fc2"} <= {*linear} and linear["fc1"].out_features == linear["fc2"].in_features:
        kind, size, into, out = "mlp", (1, linear["fc1"].out_features), (("fc1", 1),), "fc2"
    else:
        heads, final = getattr(module, "heads", 0), linear.get("out")
        names = next((n for n in (("qkv",), ("q", "kv"), ("q", "k", "v")) if {*n} <= {*linear}), ())
        if not isinstance(heads, int) or heads < 1 or final is None or not names or final.in_features % heads:
            return None
        into = tuple((n, len(n)) for n in names)
        if any(linear[n].out_features != p * final.in_features for n, p in into):
            return None
        kind, size, out = "attention", (heads, final.in_features // heads), "out"
    units = size[0] * size[1]
    local = tuple(k for k, m in parts.items() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels == m.out_channels == units)
    return Unit(name, kind, size, into, out, local)


@torch.no_grad()
def cut(module: nn.Module, unit: Unit, kept: Tensor) -> None:
    """Leave these units alone, int64 [heads, width]. The logits' scale stays that of the full width."""
    index, (count, width) = kept.flatten(), kept.shape
    total = unit.size[0] * unit.size[1]
    for name, parts in unit.into:
        layer: Any = getattr(module, name)
        rows = (torch.arange(parts, device=index.device)[:, None] * total + index).flatten()
        layer.weight = nn.Parameter(layer.weight[rows])
        layer.bias = None if layer.bias is None else nn.Parameter(layer.bias[rows])
        layer.out_features = len(rows)
    if unit.kind == "attention":
        module.heads = count  # type: ignore[assignment]
        if getattr(module, "scale", None) is None and width != unit.size[1]:  # else 1 / sqrt(width) would change the logits
            query: Any = getattr(module, unit.into[0][0])
            for p in (query.weight, query.bias):
                if p is not None:
                    p[: len(index)] *= math.sqrt(width / unit.size[1])
    last: Any = getattr(module, unit.out)
    last.weight, last.in_features = nn.Parameter(last.weight[:, index]), len(index)
    for name in unit.depthwise:
        conv: Any = getattr(module, name)
        conv.weight = nn.Parameter(conv.weight[index])
        conv.bias = None if conv.bias is None else nn.Parameter(conv.bias[index])
        conv.groups = conv.in_channels = conv.out_channels = len(index)


def gated(module: nn.Module, unit: Unit, space: Space) -> None:
    """Put the gates on its projections."""
    for name, parts in unit.into:
        setattr(module, name, GatedLinear(getattr(module, name), space, parts))
    for name in unit.depthwise:
        setattr(module, name, LivingDepthwise(getattr(module, name), space))


@torch.no_grad()
def fold(module: nn.Module, unit: Unit) -> None:
    """The gates into the weights, for good."""
    for name, _ in unit.into:
        layer: Any = getattr(module, name)
        weight, bias = layer.folded()
        plain = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
        plain.weight, plain.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        setattr(module, name, plain)
    for name in unit.depthwise:
        living: Any = getattr(module, name)
        weight, bias = living.folded()
        size = (living.in_channels, living.out_channels, living.kernel_size, living.stride, living.padding, living.dilation, living.groups)
        conv = nn.Conv2d(*size, bias=bias is not None, padding_mode=living.padding_mode, device="meta")
        conv.weight, conv.bias = nn.Parameter(weight), None if bias is None else nn.Parameter(bias)
        setattr(module, name, conv)


@torch.no_grad()
def narrowable(trunk: ImageClassifier) -> tuple[dict[str, Unit], dict[str, str]]:
    """Modules that gates really reach and that compute the same with dropped units as without them, found by trying each on what it is
    given in a forward; and for attention the mode that this is so in."""
    found = {name: u for name, m in trunk.named_modules() if (u := unit_of(name, m)) and u.size[0] * u.size[1] >= 4}
    given: dict[str, tuple[Any, Any]] = {}

    def keep(name: str) -> Any:
        return lambda module, args, kwargs: given.setdefault(name, (args, kwargs)) and None

    hooks = [trunk.get_submodule(name).register_forward_pre_hook(keep(name), with_kwargs=True) for name in found]
    image = torch.linspace(-1, 1, trunk.config.in_channels * math.prod(trunk.image_size), device=trunk.device)
    units, modes = {}, {}
    with evaluating(trunk):
        try:
            nn.Module.__call__(trunk, (37 * image).sin().reshape(1, trunk.config.in_channels, *trunk.image_size))
        finally:
            for hook in hooks:
                hook.remove()
        for name in given:
            unit, module = found[name], trunk.get_submodule(name)
            modes_to_try = ("joint", "channels") if unit.kind == "attention" else ("joint",)
            mode = next((m for m in modes_to_try if _agrees(module, unit, m, *given[name])), None)
            if mode is not None:
                units[name], modes[name] = unit, mode
    return units, modes


def _agrees(module: nn.Module, unit: Unit, mode: str, args: Any, kwargs: Any) -> bool:
    heads, width = unit.size
    count = max(1, heads // 2) if mode == "joint" else heads
    kept = torch.arange(heads * width, device=next(module.parameters()).device).view(unit.size)[heads - count :, : max(1, width // 2)]
    dropped = torch.ones(heads * width, dtype=torch.bool, device=kept.device).index_fill_(0, kept.flatten(), False)
    small, masked = copy.deepcopy(module), copy.deepcopy(module)
    space = Space(unit.size, (heads,), (width,)).to(kept.device)
    space.score.copy_(torch.linspace(-1, 1, heads * width).view(unit.size).masked_fill_(dropped.view(unit.size).cpu(), -math.inf))
    space.w = 1.0
    try:
        gated(masked, unit, space)
        for name, parts in unit.into:
            gate = space.gate().flatten().repeat(parts)
            layer = getattr(small, name)
            layer.weight.mul_(gate[:, None])
            if layer.bias is not None:
                layer.bias.mul_(gate)
        cut(small, unit, kept)
        a, b, plain = small(*args, **kwargs), masked(*args, **kwargs), module(*args, **kwargs)
        return bool(torch.allclose(a, b, rtol=1e-3, atol=1e-5) and a.shape == plain.shape and (a - plain).abs().max() > 0)
    except Exception:  # a module that can't do with other sizes says so in many ways
        return False


# the objective's other parts ----------------------------------------------------------------------------------------


def reconstruction_loss(image: Tensor, painted: Tensor, masked: Tensor) -> Tensor:
    """L1 between painted pixels and the image normalised by its local mean and variance, on masked pixels alone.

    image, painted: float [batch, channels, height, width]. masked: float [batch, rows, columns], 1 where a token was masked.
    """
    count = box_sum(torch.ones_like(image[:1, :1]))
    mean, square = box_sum(image) / count, box_sum(image**2) / count
    variance = ((square - mean**2) * (count / (count - 1))).clamp_min(0)
    wanted = (image - mean) / (variance + 1e-6).sqrt()
    where = F.interpolate(masked[:, None], size=image.shape[2:])
    return ((wanted - painted).abs() * where).sum() / (where.sum() + 1e-5) / image.shape[1]


def box_sum(x: Tensor) -> Tensor:
    """Sums over WINDOW x WINDOW pixels around each, zeros outside; along one axis, then the other. float [batch, channels, h, w]."""
    x = F.avg_pool2d(x, (WINDOW, 1), 1, (WINDOW // 2, 0), divisor_override=1)
    return F.avg_pool2d(x, (1, WINDOW), 1, (0, WINDOW // 2), divisor_override=1)


def masked_tokens(noise: Tensor, keep: float) -> Tensor:
    """noise: float [batch, tokens]. 1 for all but the int(tokens * keep) tokens of least noise, float [batch, tokens]."""
    return (noise.argsort(1).argsort(1) >= int(noise.shape[1] * keep)).to(noise.dtype)


# the model ----------------------------------------------------------------------------------------------------------


class Searched(Wrapped):
    """A trunk whose modules' sizes are searched, or (config.sizes) one that has the sizes found. While searching, `spaces` are those of the
    embedding, where it is searched, and of `units`."""

    sizes: Tensor
    progress: Tensor

    @dataclass(frozen=True)
    class Config(Wrapped.Config):
        units: tuple[str, ...] = ()  # the modules that may be narrowed; by default a ViT's attentions and MLPs
        modes: tuple[str, ...] = ()  # of each unit: what is searched of it; by default as `attention` and `mlp` say
        attention: str = "joint"  # heads and their widths jointly, "heads", "channels", or "" for neither
        mlp: bool = True
        embedding: bool = False  # a ViT's embedding channels, too; its blocks then aren't pre-norm during the search
        embedded: bool = False  # an embedding that isn't searched still has its logit, as in the authors' network
        patches: int = 0  # logits of candidate shares of tokens, which the authors' network has and doesn't use
        masking: bool = True  # whether tokens are masked and painted again
        even: bool = False  # numbers of heads are even, as the authors have it, which leaves an odd one out
        target: float = 0.5  # share of the parameters to be left
        target_gflops: float = 0.0  # a ViT's budget in GFLOPs instead, as the paper counts them
        alpha_scale: float = 1.0  # of the logits: above 1, few steps decide what the paper's many do
        sizes: tuple[tuple[int, int], ...] = ()  # heads and width of every unit: found, the search is over
        width: int = 0  # of the embedding that was found

    def __init__(self, config: Config, trunk: ImageClassifier | None = None):
        super().__init__(config, trunk)
        c, made = config, self.trunk
        if c.attention not in MODES:
            raise UnknownName("attention", c.attention, MODES)
        if (c.embedding or c.embedded or c.target_gflops) and not isinstance(made, ViT):
            raise BadInput("embedding and target_gflops", expected="a ViT, whose alone they are", got=f"a {type(made).__name__}")
        if not c.units and not isinstance(made, ViT):
            found, able = narrowable(made)
            self.reconfigure(units=tuple(found), modes=tuple(_mode(u, able[n], c.attention) for n, u in found.items()))
            c = self.config
        names = c.units or tuple(f"blocks.{i}.{part}" for i in range(made.config.depth) for part in ("attention", "mlp"))
        known = {name: unit_of(name, made.get_submodule(name)) if name in dict(made.named_modules()) else None for name in names}
        if wrong := [name for name, unit in known.items() if unit is None]:
            raise BadInput("units", expected="attention modules and MLPs", got=", ".join(wrong))
        self.units = [u for u in known.values() if u is not None]
        self.full = sum(p.numel() for p in made.parameters())
        start = [(1, made.config.dim)] if isinstance(made, ViT) else [(0, 0)]
        self.register_buffer("sizes", torch.tensor([*start, *(u.size for u in self.units)]))
        self.register_buffer("progress", torch.zeros(()))
        self.keep = 1.0  # of the tokens in the search's training
        self.searching = not c.sizes
        if not self.searching:
            self._narrow_to([(1, c.width or made.config.dim) if isinstance(made, ViT) else (0, 0), *c.sizes])
            return
        modes = c.modes or tuple(("joint" if c.mlp else "") if u.kind == "mlp" else c.attention for u in self.units)
        self.spaces = nn.ModuleList(self._space(u, mode) for u, mode in zip(self.units, modes, strict=True))
        if c.embedding or c.embedded:
            size = (1, made.config.dim)
            cells = embedding_cells(size[1]) if c.embedding else (size[1],)
            self.embedding = Space(size, (1,), cells, "units" if c.embedding else "", c.alpha_scale)
        for unit, space in zip(self.units, self.spaces, strict=True):
            if space.searched:
                gated(made.get_submodule(unit.name), unit, space)
        if c.patches:
            self.alpha_patch = nn.Parameter(torch.ones(1, c.patches) if c.patches == 1 else torch.rand(1, c.patches))
        if c.masking:
            token, final = shapes(made, self._places())
            assert token.grid is not None and final.grid is not None
            self.mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, token.tokens.shape[2]), std=0.02))
            side = self.image_size[0] // final.grid[0]
            paint = nn.Conv2d(final.tokens.shape[2], side**2 * c.in_channels, 1)
            self.decoder = nn.Sequential(paint, nn.PixelShuffle(side))
        self.to(next(made.parameters()).device)

    def _space(self, unit: Unit, mode: str) -> Space:
        heads, width, scored = (unit.size[0],), (unit.size[1],), {"joint": "units", "heads": "heads", "channels": "channels"}.get(mode, "")
        if mode and unit.kind == "mlp":
            width = hidden_cells(unit.size[1])
        elif mode:
            cells = attention_cells(*unit.size, even=self.config.even)
            heads = cells[0] if mode != "channels" else heads
            width = cells[1] if mode != "heads" else width
        return Space(unit.size, heads, width, scored, self.config.alpha_scale)

    def _places(self) -> list[str]:
        """The taps where tokens are masked, and where they are painted from."""
        return places(self.trunk)

    # forward ----------------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor) -> Tensor:
        """Normalised image [batch, channels, height, width] to logits [batch, classes]; gated while the search is on."""
        return self.embedded(image, None)[0] if self.searching and self.config.embedding else self.trunk(image)

    def _embedding_searched(self) -> bool:
        return self.searching and self.config.embedding and int(self.embedding.alive.sum()) > 1

    def search(self, image: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of an image whose masked tokens (float [batch, tokens], 1 for masked) are replaced, and the image painted again."""
        first, last = self._places()
        if self.config.embedding:
            logits, final = self.embedded(image, masked)
        else:
            found, every = Features(), taps(self.trunk)

            def edit(feature: Feature) -> Tensor:
                head, rest = feature.tokens[:, : feature.prefix], feature.tokens[:, feature.prefix :]
                return torch.cat([head, torch.where(masked[..., None] > 0, self.mask_token.to(rest.dtype), rest)], 1)

            with watching(self.trunk, {first: None, last: None}, found, {last: every[last]}, {first: edit}):
                logits = self.trunk(image)
            final = found[last]
        return logits, self.decoder(final.map())

    def embedded(self, image: Tensor, masked: Tensor | None) -> tuple[Tensor, Feature]:
        """A ViT whose embedding is searched. Every token is gated alike, and blocks work on the normalised stream: x = LN x; x + f(x)."""
        trunk: Any = self.trunk
        gate, prefix = self.embedding.gate()[0], trunk.cls_token.shape[1]
        x, grid = trunk.embedded(image)
        if masked is not None:
            x = torch.cat([x[:, :prefix], torch.where(masked[..., None] > 0, self.mask_token, x[:, prefix:])], 1)
        x, whole = x * gate, self._embedding_searched()
        for block in trunk.blocks:
            if whole:
                x = self._norm(block.norm1, x, gate)
                x = x + block.drop(block.attention(x))
                x = self._norm(block.norm2, x, gate)
                x = block.tap(x + block.drop(block.mlp(x)), grid=grid)
            else:
                x = x + block.drop(block.attention(self._norm(block.norm1, x, gate)))
                x = block.tap(x + block.drop(block.mlp(self._norm(block.norm2, x, gate))), grid=grid)
        x = trunk.features(self._norm(trunk.norm, x, gate), grid=grid)
        logits = trunk.head(x[:, 0])
        if trunk.config.distilled:
            logits = (logits + trunk.head_distilled(x[:, 1])) / 2
        return logits, Feature(x, grid, prefix)

    def _norm(self, norm: Any, x: Tensor, gate: Tensor) -> Tensor:
        """LayerNorm over those channels that are still there."""
        there = gate.detach() != 0
        if bool(there.all()):
            return norm(x)
        n = there.sum()
        mean = (x * there).sum(-1, keepdim=True) / n
        centred = (x - mean) * there
        return (centred * (centred.square().sum(-1, keepdim=True) / n + norm.eps).rsqrt() * norm.weight + norm.bias) * there

    # the objective ----------------------------------------------------------------------------------------------------

    def named_spaces(self) -> Iterator[tuple[str, Space]]:
        """(kind, space) of every module."""
        if hasattr(self, "embedding"):
            yield "embedding", self.embedding
        for unit, space in zip(self.units, self.spaces, strict=True):
            yield unit.kind, space  # type: ignore[misc]

    def one_hot_losses(self) -> dict[str, Tensor]:
        """The sums of the adaptive one-hot losses, by kind of module."""
        sums = {kind: self.progress.new_zeros(()) for kind in SCORES}
        for kind, space in self.named_spaces():
            sums[kind] = sums[kind] + space.one_hot_loss(SCORES[kind])
        return sums

    def _per_unit(self, unit: Unit) -> int:
        """Parameters that go with one unit."""
        module: Any = self.trunk.get_submodule(unit.name)
        into = sum(parts * (getattr(module, n).in_features + (getattr(module, n).bias is not None)) for n, parts in unit.into)
        local = [getattr(module, n) for n in unit.depthwise]
        return into + getattr(module, unit.out).out_features + sum(m.weight[0].numel() + (m.bias is not None) for m in local)

    def _fixed(self) -> int:
        """Parameters of the trunk that no unit's size decides."""
        return self.full - sum(self._per_unit(u) * u.size[0] * u.size[1] for u in self.units)

    def parameters_left(self) -> Tensor:
        """Of the trunk, as the masks have it now, differentiable."""
        left = self.progress.new_tensor(self._fixed())
        for unit, space in zip(self.units, self.spaces, strict=True):
            left = left + self._per_unit(unit) * space.mask().sum()  # type: ignore[operator]
        return left * self.embedding.mask().mean() if self.config.embedding else left

    def least(self) -> float:
        """The smallest share of the parameters that the sizes to choose from can leave."""
        left = self._fixed()
        for unit, space in zip(self.units, self.spaces, strict=True):
            left += self._per_unit(unit) * min(space.heads) * min(space.widths)  # type: ignore[operator, arg-type]
        narrowest = min(self.embedding.widths) / max(self.embedding.widths) if self.config.embedding else 1.0
        return left / self.full * narrowest

    def gflops(self) -> tuple[float, Tensor]:
        """(of the full ViT, as the masks have it now) as the authors count: multiply-adds, softmax and bias terms."""
        trunk: Any = self.trunk
        n, dim, side = math.prod(trunk.grid), trunk.config.dim, trunk.config.patch_size
        there = self.embedding.mask().sum() if hasattr(self, "embedding") else self.progress.new_tensor(dim)
        full: float = n * dim * 3 * side**2 + dim * trunk.config.num_classes + 2.0 * dim * n * trunk.config.depth
        now = n * there * 3 * side**2 + there * trunk.config.num_classes + 2.0 * dim * n * trunk.config.depth
        for unit, space in zip(self.units, self.spaces, strict=True):
            sd, (heads, width) = space.mask().sum(), unit.size  # type: ignore[operator]
            if unit.kind == "attention":
                full += n * (4 * dim * dim + 4 * dim) + 2 * heads * n * n * width + 6 * heads * n * n
                now = (
                    now
                    + n * (4 * there * sd + 3 * sd + there)
                    + 2 * n * n * sd
                    + 6 * (heads if space.alive.all() else space.extent()[0]) * n * n
                )  # type: ignore
            else:
                full += n * (2 * dim * width + dim + width)
                now = now + n * (2 * there * sd + there + sd)
        return full / 1e9, now / 1e9

    def budget_loss(self) -> Tensor:
        """The square of how far off the target is, as a share of the full network."""
        if self.config.target_gflops:
            full, now = self.gflops()
            return ((now - self.config.target_gflops) / full) ** 2
        return (self.parameters_left() / self.full - self.config.target) ** 2

    def search_loss(self, batch: Batch) -> Losses:
        """Cross entropy, one-hot losses, budget, and the reconstruction scaled to the cross entropy's value."""
        image = self.normalise(batch["image"])
        if self.config.masking and self.keep < 1:
            token = self._token_grid(image)
            masked = masked_tokens(torch.rand(len(image), math.prod(token), device=image.device), self.keep)
            logits, painted = self.search(image, masked)
            paint = reconstruction_loss(image, painted, masked.unflatten(1, token))
        else:
            logits, paint = self(image), None
        loss = self.classification_loss(logits, batch).total
        one_hot, budget = self.one_hot_losses(), self.budget_loss()
        total = loss + ONE_HOT * sum(one_hot.values()) + BUDGET * budget
        terms = {"cross_entropy": loss, **{f"one_hot_{k}": v for k, v in one_hot.items()}, "budget": budget}
        if paint is not None:
            total = total + (loss / paint.clamp_min(1e-8)).detach() * paint
            terms["reconstruction"] = paint
        return Losses(total, terms)

    def _token_grid(self, image: Tensor) -> tuple[int, int]:
        size = tuple(image.shape[2:])
        if getattr(self, "_grid_of", None) != size:
            if size != self.image_size:
                raise BadInput("image size in the search", expected=str(self.image_size), got=str(size), fix="resize the data")
            grid = shapes(self.trunk, self._places()[:1])[0].grid
            assert grid is not None
            self._grid_of, self._grid = size, (grid[0], grid[1])
        return self._grid

    # training ---------------------------------------------------------------------------------------------------------

    def training_stages(self) -> Sequence[Stage]:
        """Search and fine-tuning, half of the steps each; a network that was found trains as any other."""
        if not self.searching:
            return (Stage("train"),)
        return (Stage("search", (Turn("search_loss"),)), Stage("fine-tune", (Turn("loss", ("trunk.*",)),), prepare="narrow"))

    def set_progress(self, done: float) -> None:
        """How far the search is, 0 to 1: decides w and the share of tokens that are kept."""
        self.progress.fill_(min(1.0, done))
        part = min(1.0, done / WARMUP)
        self.keep = KEPT[0] + (KEPT[1] - KEPT[0]) * part
        self.set_w(MOST + (LEAST - MOST) * part)

    def set_w(self, w: float) -> None:
        """The weight of importance against sparsity, everywhere."""
        for _, space in self.named_spaces():
            space.w = w

    def after_step(self, step: int, steps: int) -> None:
        super().after_step(step, steps)
        search = max(1, round(steps / 2))
        if self.searching:
            self.set_progress(step / search)
            if step % max(1, search // ROUNDS) == 0:
                self.compress()

    def compress(self) -> bool:
        """Cells with too small a share die, everywhere. Whether every module has one size left."""
        return all([space.compress() for _, space in self.named_spaces()])

    @torch.no_grad()
    def decide(self) -> list[tuple[int, int]]:
        """Sizes for the embedding and every unit: the likeliest that keep to the budget; dead ones where living ones alone can't."""
        width = 0
        if isinstance(self.trunk, ViT):
            shares = self.embedding.shares() if self.config.embedding else None
            width = self.trunk.config.dim if shares is None else self.embedding.widths[int(shares.argmax())]
        embedding = width / self.trunk.config.dim if width else 1.0  # type: ignore[union-attr]
        budget = self._parameter_budget() / embedding - self._fixed()

        counts, logs = [], []
        for space in self.spaces:
            assert isinstance(space, Space)
            counts.append(torch.tensor([[float(h * w) for w in space.widths] for h in space.heads]))
            logs.append(space.shares().log().clamp_min(DEAD).cpu())
        costs = [self._per_unit(unit) * count for unit, count in zip(self.units, counts, strict=True)]

        def choose(price: float) -> list[int]:
            return [int((log - price * cost).argmax()) for log, cost in zip(logs, costs, strict=True)]

        def spent(cells: Sequence[int]) -> float:
            return sum(cost.flatten()[cell].item() for cost, cell in zip(costs, cells, strict=True))

        low, high = 0.0, 1e3 / max(1, self.full)
        while spent(choose(high)) > budget and high < 1e6:
            high *= 4
        for _ in range(40 if spent(choose(low)) > budget else 0):
            middle = (low + high) / 2
            low, high = (low, middle) if spent(choose(middle)) <= budget else (middle, high)
        cells = choose(high if spent(choose(low)) > budget else low)
        # what of the budget a choice of this kind can't use goes to the likeliest larger sizes that fit
        larger = sorted(((log.flatten()[k].item(), i, k) for i, log in enumerate(logs) for k in range(log.numel())), reverse=True)
        for log, i, k in larger:
            cost = costs[i].flatten()
            if log > DEAD and 0 < cost[k] - cost[cells[i]] <= budget - spent(cells):
                cells[i] = k
        sizes = []
        for space, cell in zip(self.spaces, cells, strict=True):
            a, b = divmod(cell, len(space.widths))  # type: ignore[arg-type]
            sizes.append((space.heads[a], space.widths[b]))  # type: ignore[index]
        return [(1, width) if width else (0, 0), *sizes]

    def _parameter_budget(self) -> float:
        if not self.config.target_gflops:
            return self.config.target * self.full
        return min(1.0, self.config.target_gflops / self.gflops()[0]) * self.full

    def narrow(self) -> None:
        """End the search: cut the trunk to the sizes decided on, gates folded, and drop all that was there for the search."""
        if self.searching:
            self._narrow_to(self.decide())

    @torch.no_grad()
    def _narrow_to(self, sizes: Sequence[tuple[int, int]]) -> None:
        """sizes: heads and width, of the embedding (or (0, 0)) and every unit."""
        for i, (unit, (heads, width)) in enumerate(zip(self.units, sizes[1:], strict=True)):
            module = self.trunk.get_submodule(unit.name)
            now = (int(self.sizes[i + 1, 0]), int(self.sizes[i + 1, 1]))
            device = next(module.parameters()).device
            kept = torch.arange(now[0] * now[1]).view(now)[:heads, :width]
            if self.searching:
                space: Any = self.spaces[i]
                kept = space.kept(heads, width)
                if space.searched:
                    fold(module, unit)
            if (heads, width) != unit.size:
                cut(module, unit, kept.to(device))
        if isinstance(self.trunk, ViT):
            dim = self.trunk.config.dim
            keep = torch.arange(dim)[: sizes[0][1]]
            if self.searching and self.config.embedding:
                keep = self.embedding.kept(1, sizes[0][1])[0]
                self._fold_embedding()
            if len(keep) < dim:
                narrow_embedding(self.trunk, keep.to(self.trunk.embed.weight.device))
        self.sizes.copy_(torch.tensor(sizes))
        for part in ("spaces", "embedding", "alpha_patch", "mask_token", "decoder"):
            if hasattr(self, part):
                delattr(self, part)
        self.searching, self.keep = False, 1.0
        self.reconfigure(sizes=tuple(map(tuple, sizes[1:])), width=sizes[0][1])

    def _fold_embedding(self) -> None:
        gate, trunk = self.embedding.gate()[0], self.trunk
        assert isinstance(trunk, ViT)
        trunk.embed.weight.mul_(gate[:, None, None, None])
        for p in (trunk.embed.bias, trunk.cls_token, trunk.positions):
            assert p is not None
            p.mul_(gate)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The state of a network that was found makes this one as small; averages of the search are left out of it."""
        if self.searching and not any(name.startswith("spaces.") for name in state_dict):
            self._narrow_to([(int(h), int(w)) for h, w in state_dict["sizes"]])
        own = self.state_dict()
        kept = {k: v for k, v in state_dict.items() if self.searching or k in own}
        return super().load_state_dict(kept, strict, assign)

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"*.score", "mask_token"}


@torch.no_grad()
def narrow_embedding(trunk: ViT, keep: Tensor) -> None:
    """Leave these channels of a ViT's residual stream alone."""
    for layer in [trunk.norm, *(n for block in trunk.blocks for n in (block.norm1, block.norm2))]:
        layer.weight, layer.bias = nn.Parameter(layer.weight[keep]), nn.Parameter(layer.bias[keep])
        layer.normalized_shape = (len(keep),)
    trunk.embed.weight, trunk.embed.out_channels = nn.Parameter(trunk.embed.weight[keep]), len(keep)
    trunk.embed.bias = None if trunk.embed.bias is None else nn.Parameter(trunk.embed.bias[keep])
    trunk.cls_token, trunk.positions = nn.Parameter(trunk.cls_token[..., keep]), nn.Parameter(trunk.positions[..., keep])
    heads = [trunk.head, *([trunk.head_distilled] if trunk.config.distilled else [])]
    for layer in [*heads, *(x for b in trunk.blocks for x in (b.attention.qkv, b.mlp.fc1))]:  # read the stream
        layer.weight, layer.in_features = nn.Parameter(layer.weight[:, keep]), len(keep)
    for layer in [x for b in trunk.blocks for x in (b.attention.out, b.mlp.fc2)]:  # add to it
        layer.weight, layer.bias, layer.out_features = nn.Parameter(layer.weight[keep]), nn.Parameter(layer.bias[keep]), len(keep)


def places(trunk: ImageClassifier) -> list[str]:
    """The first tap behind a tokeniser and the last before the head."""
    return [next(iter(taps(trunk, "*tokens*"))), [*taps(trunk, "*features*")][-1]]


# making one ---------------------------------------------------------------------------------------------------------


class OFB(Method):
    """target: share of the parameters that is left, in (0, 1). attention: what is searched of it ("joint", "heads", "channels" or "").
    embedding: whether a ViT's embedding is searched, too, as in the paper. alpha_scale: of the sizes' logits; the paper's is 1 for
    100 epochs of ImageNet, and a short search needs more."""

    network = Searched

    def __init__(self, target: float = 0.5, attention: str = "joint", embedding: bool = False, alpha_scale: float = 20.0):
        if not 0 < target < 1:
            raise BadInput("target", expected="a share between 0 and 1", got=str(target))
        if attention not in MODES:
            raise UnknownName("attention", attention, MODES)
        self.target, self.attention, self.embedding, self.alpha_scale = target, attention, embedding, alpha_scale

    def needs(self, model: Model) -> str:
        if reason := why_not(model):
            return reason
        if self.embedding and not isinstance(model, ViT):
            return "its embedding isn't a plain ViT's, whose channels alone can be searched"
        units, _ = narrowable(model)  # type: ignore[arg-type]
        return "" if units else "it has no attention or MLP made of plain projections, which could be narrowed"

    def apply(self, model: Any, data: Any = None) -> Searched:
        """The model with gates on whatever can be narrowed; `fit` then searches, cuts it to the target and fine-tunes. `data` isn't needed.

        Raises BadInput where nothing can be narrowed.
        """
        if reason := self.needs(model):
            raise BadInput(f"OFB on {type(model).__name__}", expected="an image classifier with attention or MLPs", got=reason)
        units, modes = narrowable(model)
        asked = [_mode(unit, modes[name], self.attention) for name, unit in units.items()]
        config = Searched.Config(
            **trunk_fields(model),
            units=tuple(units),
            modes=tuple(asked),
            attention=self.attention,
            embedding=self.embedding,
            target=self.target,
            alpha_scale=self.alpha_scale,
            masking=paintable(model),
        )
        made = Searched(config, model)
        if (least := made.least()) > self.target:
            warnings.warn(
                f"OFB can leave {least:.3f} of {type(model).__name__}'s parameters at least: {self.target:g} is out of reach", stacklevel=2
            )
        return finish(made, "ofb", model)


def _mode(unit: Unit, able: str, asked: str) -> str:
    """What is searched of a unit: what was asked for, as far as it is able to."""
    if unit.kind == "mlp" or asked == "joint" or asked == able:
        return able
    return "" if able == "channels" and asked == "heads" else asked


def paintable(trunk: ImageClassifier) -> bool:
    """Whether its first tokens can be masked and the image painted from its last features."""
    try:
        first, last = shapes(trunk, places(trunk))
    except (FormariumError, StopIteration, IndexError):
        return False
    (h, w), sides = trunk.image_size, (first.grid, last.grid)
    whole = all(g is not None and h % g[0] == 0 and w % g[1] == 0 for g in sides)
    return whole and last.grid is not None and h // last.grid[0] == w // last.grid[1]
