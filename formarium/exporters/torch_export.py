"""torch.export: a .pt2 file that PyTorch loads without this package (`torch.export.load(path).module()`)."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formarium.exporters import Plan, Run, as_text, from_text

EXTRA = "formarium.json"  # the file's name inside the .pt2 archive


def require(check: bool) -> None:
    """Nothing beyond torch."""


def program(plan: Plan) -> torch.export.ExportedProgram:
    """The captured graph. A dimension that can't be left open is an error here, never silently fixed."""
    steps = {"height": plan.size_step, "width": plan.size_step}
    dims = {
        name: torch.export.Dim(name) * steps[name] if steps.get(name, 1) > 1 else torch.export.Dim.DYNAMIC
        for d in plan.open
        for name in d.values()
    }
    shapes = tuple({dim: dims[name] for dim, name in d.items()} for d in plan.open)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(plan.network, plan.example, dynamic_shapes=(shapes,), strict=False)


def write(plan: Plan, path: Path) -> None:
    torch.export.save(program(plan), path, extra_files={EXTRA: json.dumps(as_text(plan.metadata))})


def runner(path: Path) -> Run:
    module = torch.export.load(path).module()

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        with torch.no_grad():
            out = module(*inputs)
        return [out] if isinstance(out, Tensor) else [*out]

    return run


def metadata(path: Path) -> dict[str, Any]:
    extra = {EXTRA: ""}
    torch.export.load(path, extra_files=extra)
    return from_text(json.loads(extra[EXTRA] or "{}"))
