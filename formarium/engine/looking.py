"""look: a lens on a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from formarium.catalogue import card as card_of
from formarium.catalogue import system_class
from formarium.engine.evaluation import split_of
from formarium.engine.runs import Run, as_model, as_run, data_for
from formarium.errors import BadInput, UnknownName
from formarium.lens import Lens, Report
from formarium.model import Model
from formarium.task import Data


def look(
    model: str | Path | Model | Run,
    lens: str | Lens,
    data: str | Path | Data,
    *,
    split: str = "val",
    before: str | Path | Model | Run | None = None,
    others: Mapping[str, str | Path | Model | Run] | None = None,
    **options: Any,
) -> Report:
    """What a lens (by slug, or ready made) finds in a model on one split of labelled data.

    model: a model, a run (which brings the snapshots that its fit kept), a run directory, or a name (fresh weights). data: a Data, a path,
    or "sample:NAME". before: the model before fine-tuning, where the lens compares. others: more models of the task, by a name
    for each, where it compares several. options: the lens's own, where it is given by slug.
    The model's mode is left as it was.
    Raises UnknownName for a lens or option nothing carries, BadInput where the lens can't look into that model or the split isn't there.
    """
    run = as_run(model)
    network, lens = run.model, _lens(lens, options)
    if reason := lens.needs(network):
        raise BadInput(f"{type(lens).__name__} on {network.variant}", expected="a model it can look into", got=reason)
    found = data_for(network, data)
    seen = replace(found, splits={**found.splits, "val": split_of(found, split)})  # the lens draws its samples itself
    was = network.training
    try:
        more = {name: as_model(other).eval() for name, other in (others or {}).items()}
        earlier = as_model(before).eval() if before is not None else None
        return lens.look(network.eval(), seen, before=earlier, snapshots=run.snapshots() or None, others=more)
    finally:
        network.train(was)


def _lens(lens: str | Lens, options: dict[str, Any]) -> Lens:
    if isinstance(lens, Lens):
        if options:
            raise BadInput("options", expected="a lens by slug to go with them", got=f"{', '.join(options)} and a ready-made lens")
        return lens
    card = card_of(lens)
    if card.kind != "lens":
        raise BadInput(lens, expected="a lens", got=f"a {card.kind}")
    made = system_class(card)
    known = inspect.signature(made).parameters
    for key in options:
        if key not in known:
            raise UnknownName(f"option of {card.slug}", key, known)
    return made(**options)
