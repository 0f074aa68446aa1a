"""formarium: published transformer systems, each by its own name, ready to create, train, compare and ship.

>>> import formarium
>>> model = formarium.create("pvt_tiny", num_classes=10)

The public names below are loaded on first use, so importing the package costs next to nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "list": "formarium.catalogue",
    "card": "formarium.catalogue",
    "find": "formarium.catalogue",
    "create": "formarium.catalogue",
    "trace": "formarium.features",
    "load": "formarium.engine",
    "fit": "formarium.engine",
    "predict": "formarium.engine",
    "evaluate": "formarium.engine",
    "compare": "formarium.engine",
    "bench": "formarium.engine",
    "look": "formarium.engine",
    "shrink": "formarium.engine",
    "export": "formarium.exporters",
    "verify": "formarium.engine",
}
__all__ = [
    "bench",
    "card",
    "compare",
    "create",
    "evaluate",
    "export",
    "find",
    "fit",
    "list",
    "load",
    "look",
    "predict",
    "shrink",
    "trace",
    "verify",
]

if TYPE_CHECKING:
    from collections.abc import Sequence

    from formarium.catalogue import card, create, find, list
    from formarium.engine import bench, compare, evaluate, fit, load, look, predict, shrink, verify
    from formarium.exporters import export
    from formarium.features import trace


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'formarium' has no attribute {name!r}; it offers: {', '.join(_HOMES)}")
    # not cached in globals(): `formarium.export` must stay the function once the sub-package is imported
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> Sequence[str]:
    return sorted([*globals(), *_HOMES])
