"""Systems beside their authors' code: one module a system, that builds both from a clone of the authors' repository.

    git clone https://github.com/OWNER/NAME clones/OWNER/NAME    what a module's REPOSITORY says
    python benchmarks/speed.py --references clones               every system whose clone is there

A module has REPOSITORY = "OWNER/NAME" and `pairs(clone: Path) -> Iterator[Pair]`. Nothing of the authors' is kept here.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Pair:
    """Two callables that do the same work. name: variant and input size; mode: "forward" or "train" (a whole step, optimiser included)."""

    name: str
    mode: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


def modules() -> dict[str, Any]:
    """The module of each system, by slug."""
    return {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}


@contextmanager
def importing(*folders: Path, **stubs: Any) -> Iterator[None]:
    """The clone's folders first on the import path and stand-ins for packages that it imports and doesn't need here, for a while.

    stubs: dotted names with "__" for the dots -> a dict of what the module offers (anything else asked of it is an empty class).
    """
    before, known = list(sys.path), set(sys.modules)
    made = {name.replace("__", "."): offers for name, offers in stubs.items()}
    kept = {name: sys.modules.get(name) for name in made}
    for name, offers in made.items():
        sys.modules[name] = _stub(name, offers)
    sys.path[:0] = [str(f) for f in folders]
    try:
        yield
    finally:
        sys.path[:] = before
        for name, module in kept.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
        for name in set(sys.modules) - known:  # another clone may have modules of the same names
            found = getattr(sys.modules[name], "__file__", None) or ""
            if any(found.startswith(str(f)) for f in folders):
                del sys.modules[name]


def _stub(name: str, offers: dict[str, Any]) -> types.ModuleType:
    class Stub(types.ModuleType):
        __path__ = ()

        def __getattr__(self, attr: str) -> Any:
            if attr.startswith("__"):
                raise AttributeError(attr)
            return type(attr, (), {})

    made = Stub(name)
    for key, value in offers.items():
        setattr(made, key, value)
    return made


def forward(model: nn.Module, *inputs: Any) -> Callable[[], Any]:
    """A forward in evaluation mode, without gradient."""
    model.eval()

    def run() -> Any:
        with torch.inference_mode():
            return model(*inputs)

    return run


def step(model: nn.Module, loss: Callable[[], Tensor], lr: float = 1e-5) -> Callable[[], Any]:
    """A training step: loss, backward, AdamW."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)

    def run() -> Any:
        model.train()
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()

    return run


def squares(out: Any) -> Tensor:
    """A scalar of every tensor in an output, to start a backward from."""
    if isinstance(out, Tensor):
        return out.float().square().mean() if out.is_floating_point() else out.new_zeros((), dtype=torch.float32)
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else ()
    return sum((squares(x) for x in parts), torch.zeros(()))
