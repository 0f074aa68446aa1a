"""Recipes: how a model is trained, as data. Published ones are the papers', demo ones fit the sample data; both stand in the cards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from formarium.cards import Card, Variant
from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of


@dataclass(frozen=True)
class Recipe:
    """steps, where given, wins over epochs. Learning rates are for the whole (accumulated, all processes') batch."""

    optimizer: str = "adamw"  # adamw, adam, sgd
    epochs: float = 20
    steps: int | None = None
    batch_size: int = 64
    accumulate: int = 1  # parts a batch is worked through in
    lr: float = 1e-3
    min_lr: float = 1e-5
    warmup_epochs: float = 0
    warmup_lr: float = 1e-6
    weight_decay: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9  # sgd's
    clip_grad: float | None = None
    clip_mode: str = "norm"  # or "agc": adaptive, a share of each weight's own norm
    ema: float | None = None  # decay of the averaged weights, which are then the model
    drop_path: float | None = None
    augment: Mapping[str, Any] = field(default_factory=dict)  # the task's own keys

    def total_steps(self, per_epoch: int) -> int:
        return self.steps if self.steps is not None else max(1, round(self.epochs * per_epoch))

    def as_dict(self) -> dict[str, Any]:
        flat = asdict(self)
        return {**{k: v for k, v in flat.items() if k != "augment"}, **flat["augment"]}


_CORE = {f.name for f in fields(Recipe)} - {"augment"}
_NOT_RECIPE = {"variant", "baseline", "margin", "example", "data"}


def make_recipe(values: Mapping[str, Any], task: str) -> Recipe:
    """A Recipe from plain keys: the core ones above and the task's own. UnknownName for any other."""
    own = task_of(task).recipe_keys
    for key in values:
        if key not in _CORE and key not in own:
            raise UnknownName("recipe key", key, [*_CORE, *own])
    core: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in _CORE}
    recipe = Recipe(**core, augment={k: v for k, v in values.items() if k in own})
    for key in ("batch_size", "accumulate", "epochs"):
        if getattr(recipe, key) <= 0:
            raise BadInput(f"recipe key {key}", expected="a positive number", got=str(getattr(recipe, key)))
    if recipe.steps is not None and recipe.steps < 1:
        raise BadInput("recipe key steps", expected="a positive number", got=str(recipe.steps))
    return recipe


def recipe_for(card: Card, variant: Variant | None, kind: str | None = None, **overrides: Any) -> Recipe:
    """The card's recipe for a variant, with overrides.

    kind: "published" or "demo"; by default published for published variants and demo for the others. A published learning rate is
    scaled with the batch size, where that is overridden and the rate isn't.
    """
    task = task_of(card.task)
    if kind is None:
        kind = "published" if variant is not None and variant.published else "demo"
    if kind == "published":
        values = {**task.published_defaults, **(card.recipe_of(variant) if variant else card.recipe)}
        if "batch_size" in overrides and "lr" not in overrides and "lr" in values:
            values["lr"] = values["lr"] * overrides["batch_size"] / values["batch_size"]
    else:
        kept = {k: v for k, v in card.demo.items() if k not in _NOT_RECIPE and not k.startswith("no_")}
        values = {**task.demo_defaults, **kept}
    if overrides.get("epochs") is not None and "steps" not in overrides:
        values.pop("steps", None)
    return make_recipe({**values, **{k: v for k, v in overrides.items() if v is not None}}, card.task)


def with_steps(recipe: Recipe, steps: int) -> Recipe:
    return replace(recipe, steps=steps)
