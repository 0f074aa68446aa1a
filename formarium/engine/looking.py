"""look: a lens on a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from formarium.catalogue import card as card_of
from formarium.catalogue import system_class
from formarium.engine.loader import evaluation_batches
from formarium.engine.runs import Run, as_data, as_model, load_run
from formarium.errors import BadInput
from formarium.lens import Lens, Report
from formarium.model import Model
from formarium.task import Data, task


def look(
    model: str | Path | Model | Run,
    lens: str | Lens,
    data: str | Path | Data,
    *,
    split: str = "val",
    before: str | Path | Model | Run | None = None,
    batch_size: int = 64,
    **options: Any,
) -> Report:
    """What a lens (by slug, or ready made) finds in a model on one split of labelled data.

    A run brings the snapshots that its fit kept. before: the model before fine-tuning, where the lens compares. options go to the lens.
    Raises BadInput where the lens can't look into that model.
    """
    run = model if isinstance(model, Run) else load_run(model) if isinstance(model, (str, Path)) and Path(model).is_dir() else None
    network = run.model if run else as_model(model)
    if isinstance(lens, str):
        card = card_of(lens)
        if card.kind != "lens":
            raise BadInput(lens, expected="a lens", got=f"a {card.kind}")
        chosen: Lens = system_class(card)(**options)
    else:
        chosen = lens
    if reason := chosen.needs(network):
        raise BadInput(f"{type(chosen).__name__} on {network.variant}", expected="a model it can look into", got=reason)
    found = as_data(data, network.task)
    task_ = task(network.task)
    batches = [*evaluation_batches(found.splits[split], task_.transform(network.preprocessing), task_.collate, batch_size)]
    for batch in batches:
        batch["names"] = [*found.names]
    snapshots = run.snapshots() if run else None
    return chosen.look(network, batches, before=as_model(before) if before is not None else None, snapshots=snapshots or None)
