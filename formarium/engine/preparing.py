"""What a fit is about to train, on what, and how, from the many things a person may give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formarium.catalogue import create, model_class, resolve
from formarium.engine import runs
from formarium.engine.evaluation import split_of
from formarium.engine.recipes import Recipe, make_recipe, recipe_for
from formarium.engine.runs import Run, as_data, as_run, data_for, must_fit
from formarium.errors import BadInput, UnknownName
from formarium.model import Model
from formarium.task import Data

Asked = Recipe | Mapping[str, Any] | str | None


def prepare(
    model: str | Path | Model | Run, data: str | Path | Data, recipe: Asked, overrides: Mapping[str, Any]
) -> tuple[Model, Data, Recipe]:
    """The model (made for the data, unless it was given), the data, the recipe. See `fit` for what may be given."""
    name = _catalogue_name(model)
    start = None if name else as_run(model)
    if start is not None and start.model.card is None:
        raise BadInput("model", expected="one made by formarium.create", got=type(start.model).__name__)
    card, variant = resolve(name) if start is None else (start.model.card, start.model.card.variants.get(start.model.variant))  # type: ignore[union-attr]
    assert card is not None
    overrides = {k: v for k, v in overrides.items() if v is not None}
    task = card.task_of(variant) if start is None else start.model.task
    if isinstance(recipe, Recipe):
        chosen = make_recipe({**recipe.as_dict(), **overrides}, task)
    else:
        kind, keys = (recipe, {}) if isinstance(recipe, str) else (None, recipe or {})
        chosen = recipe_for(card, variant, kind, **{**keys, **overrides})
    found = as_data(data, task) if start is None else data_for(start.model, data)
    for split in ("train", "val"):
        split_of(found, split)
    fields = model_class(card).Config.__dataclass_fields__
    args = {k: v for k, v in found.model_args.items() if k in fields}
    if chosen.drop_path is not None and "drop_path" in fields:
        args["drop_path"] = chosen.drop_path
    if isinstance(model, Model):
        network = model
        if overrides.get("drop_path") not in (None, getattr(model.config, "drop_path", None)):
            raise BadInput("drop_path", expected="the model's own", got="another", fix="give it to formarium.create")
    else:
        network = create(name, **args) if start is None else _continued(start, args)
    must_fit(network, found)
    network.study(found)
    network.names = [*found.names]
    network.fitted_on = {"name": found.name, **found.source}  # type: ignore[assignment]
    return network, found, chosen


def _catalogue_name(model: Any) -> str:
    """The name where that is what was given, "" where it is something that has weights."""
    if not isinstance(model, str) or (Path(model) / runs.CONFIG).exists() or model.startswith("hf://"):
        return ""
    try:
        resolve(model)
    except UnknownName:
        if "/" not in model and not Path(model).exists():
            raise
        return ""
    return model


def _continued(start: Run, args: Mapping[str, Any]) -> Model:
    """A run's model made anew for other data: its weights wherever the shapes agree."""
    network = runs.build(start.config or runs.describe(start.model), **args)
    own = network.state_dict()
    network.load_state_dict({k: v for k, v in start.model.state_dict().items() if k in own and own[k].shape == v.shape}, strict=False)
    return network
