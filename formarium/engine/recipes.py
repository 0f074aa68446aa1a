"""Recipes: how a model is trained, as data. Published ones are the papers', demo ones fit the sample data; both stand in the cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from formarium.cards import Card, Variant
from formarium.catalogue import freeze, resolve
from formarium.errors import BadInput, UnknownName
from formarium.model import Model
from formarium.task import task as task_of

OPTIMIZERS = ("adamw", "adam", "sgd")
CLIP_MODES = ("norm", "agc")
SCHEDULES = ("cosine", "constant", "poly", "step", "exponential", "noam", "wsd", "one_cycle", "plateau")


@dataclass(frozen=True)
class Recipe:
    """steps, where given, wins over epochs. Learning rates are for the whole batch: all its parts, all processes."""

    optimizer: str = "adamw"  # adamw, adam, sgd
    epochs: float = 20
    steps: int | None = None
    batch_size: int = 64
    accumulate: int = 1  # parts that each process works its batch through in
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_epochs: float = 0
    warmup_lr: float = 1e-6
    schedule: str = "cosine"  # behind the warm-up: cosine, constant, poly, step, exponential, noam, wsd, one_cycle, plateau
    milestones: tuple[float, ...] = ()  # step: the shares of the run, 0 to 1, at which the rate is multiplied by factor
    factor: float = 0.1  # of step, of exponential (every epoch) and of plateau
    power: float = 1.0  # of poly (1: a straight line) and noam (0.5: the inverse square root)
    decay_share: float = 0.2  # wsd (warm-up, stable, decay): the last share of the run, in which the rate falls by a cosine
    hold_epochs: float = 0  # noam: epochs at the peak; plateau: epochs before the first cut
    patience: int = 10  # plateau: epochs without a better held-out metric that it bears
    cycle_momentum: tuple[float, float] | None = None  # one_cycle: momentum, or Adam's first beta, at either end and at the peak
    lr_shares: Mapping[str, float] = field(default_factory=dict)  # of parameters by globs of their names, as {"*.offsets.*": 0.1}
    weight_decay: float = 0.05
    layer_decay: float = 1.0  # each block's learning rate is this share of the next one's (Bao et al., BEiT); the head's is lr
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9  # sgd's
    clip_grad: float | None = None
    clip_mode: str = "norm"  # or "agc": adaptive, a share of each weight's own norm
    ema: float | None = None  # decay of the averaged weights, which are then the model
    drop_path: float | None = None  # None: as the model's config has it
    repeated_augmentation: int = 1  # copies of a sample in an epoch, each augmented anew (Hoffer et al. 2020)
    augment: Mapping[str, Any] = field(default_factory=dict)  # the task's own keys

    def total_steps(self, per_epoch: int) -> int:
        return self.steps if self.steps is not None else max(1, round(self.epochs * per_epoch))

    def with_(self, **changes: Any) -> Recipe:
        """The same recipe but for some of the keys above. Raises BadInput for a value that can't be."""
        changed = replace(self, **changes)
        _check(changed)
        return changed

    def as_dict(self) -> dict[str, Any]:
        flat = asdict(self)
        return {**{k: v for k, v in flat.items() if k != "augment"}, **flat["augment"]}


_CORE = {f.name for f in fields(Recipe)} - {"augment"}
_NOT_RECIPE = {"backbones", "variant", "baseline", "margin", "example", "data"}


def make_recipe(values: Mapping[str, Any], task: str) -> Recipe:
    """A Recipe from plain keys: the core ones above and the task's own. UnknownName for any other, BadInput for a value that can't be."""
    own = {*task_of(task).recipe_keys} - _CORE
    for key in values:
        if key not in _CORE and key not in own:
            raise UnknownName("recipe key", key, [*_CORE, *own])
    values = {k: freeze(v) for k, v in values.items()}
    recipe = Recipe(**{k: v for k, v in values.items() if k in _CORE}, augment={k: v for k, v in values.items() if k in own})
    _check(recipe)
    return recipe


def recipe_for(system: str | Card | Model, variant: Variant | None = None, kind: str | None = None, **overrides: Any) -> Recipe:
    """The card's recipe for a variant, with overrides; an override of None leaves the card's value.

    system: a variant's name, a model, or a card (with its variant). kind: "published" or "demo"; by default published for published
    variants and demo for the others. A published learning rate is scaled with the batch size, where that is overridden and the rate
    isn't. Raises UnknownName for a name or key nothing carries, BadInput for a value that can't be.
    """
    card, variant = _card_of(system, variant)
    task = task_of(card.task_of(variant))
    overrides = {k: v for k, v in overrides.items() if v is not None}
    if kind is None:
        kind = "published" if variant is not None and variant.published else "demo"
    if kind == "published":
        values = {**task.published_defaults, **(card.recipe_of(variant) if variant else card.recipe)}
        if "batch_size" in overrides and "lr" not in overrides and {"lr", "batch_size"} <= {*values}:
            values["lr"] = values["lr"] * overrides["batch_size"] / values["batch_size"]
    elif kind == "demo":
        values = {**task.demo_defaults, **{k: v for k, v in card.demo.items() if k not in _NOT_RECIPE and not k.startswith("no_")}}
        values |= variant.recipe if variant is not None and not variant.published else {}
    else:
        raise BadInput("recipe", expected="published or demo", got=repr(kind))
    if "epochs" in overrides and "steps" not in overrides:
        values.pop("steps", None)
    return make_recipe({**values, **overrides}, task.name)


def _card_of(system: str | Card | Model, variant: Variant | None) -> tuple[Card, Variant | None]:
    if isinstance(system, Card):
        return system, variant
    if isinstance(system, str):
        return resolve(system)
    if system.card is None:
        raise BadInput("model", expected="one made by formarium.create", got=type(system).__name__)
    return system.card, system.card.variants.get(system.variant)


def _check(recipe: Recipe) -> None:
    for key in ("epochs", "batch_size", "accumulate", "repeated_augmentation", "lr"):
        _must(recipe, key, lambda v: v > 0, "more than 0")
    for key in ("min_lr", "warmup_epochs", "warmup_lr", "weight_decay", "momentum", "hold_epochs", "patience"):
        _must(recipe, key, lambda v: v >= 0, "at least 0")
    for key in ("factor", "power"):
        _must(recipe, key, lambda v: v > 0, "more than 0")
    for key in ("layer_decay", "decay_share"):
        _must(recipe, key, lambda v: 0 < v <= 1, "above 0 and at most 1")
    for key in ("batch_size", "accumulate", "repeated_augmentation", "steps"):
        if (value := getattr(recipe, key)) is not None and (value != int(value) or value < 1):
            raise BadInput(f"recipe key {key}", expected="a whole number, at least 1", got=str(value))
    for key, most in (("ema", 1.0), ("drop_path", 1.0), ("clip_grad", float("inf"))):
        if getattr(recipe, key) is not None:
            _must(recipe, key, lambda v, most=most: 0 <= v < most, f"from 0 to below {most:g}")
    if (recipe.schedule == "step" and not recipe.milestones) or not all(0 < m < 1 for m in recipe.milestones):
        raise BadInput("recipe key milestones", expected="shares of the run between 0 and 1", got=str(recipe.milestones))
    for key, known in (("optimizer", OPTIMIZERS), ("clip_mode", CLIP_MODES), ("schedule", SCHEDULES)):
        if getattr(recipe, key) not in known:
            raise UnknownName(key, str(getattr(recipe, key)), known)


def _must(recipe: Recipe, key: str, holds: Any, expected: str) -> None:
    value = getattr(recipe, key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not holds(value):
        raise BadInput(f"recipe key {key}", expected=f"a number, {expected}", got=repr(value))
