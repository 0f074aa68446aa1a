"""fit, evaluate, predict, compare, bench, look, shrink, verify: what is done with any system."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "load": "formarium.engine.runs",
    "fit": "formarium.engine.fitting",
    "evaluate": "formarium.engine.evaluation",
    "predict": "formarium.engine.prediction",
    "compare": "formarium.engine.comparison",
    "bench": "formarium.engine.benchmarking",
    "look": "formarium.engine.looking",
    "shrink": "formarium.engine.shrinking",
    "verify": "formarium.engine.records",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'formarium.engine' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
