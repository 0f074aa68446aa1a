"""Lens: looks into any model whose features it can read. Report: what it found, in words, numbers, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from formarium.model import Model


@dataclass
class Table:
    """Rows of plain values under named columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclass
class Report:
    """What a lens found. `numbers` is machine-readable (plain Python values); `figures` are matplotlib figures by caption."""

    title: str
    findings: list[str] = field(default_factory=list)  # sentences a person can act on
    numbers: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    figures: dict[str, Figure] = field(default_factory=dict)


class Lens:
    """The contract of every lens. Options go to the constructor; `look` does the work.

    `needs(model)` gives a sentence saying why this lens can't look into that model, or "" where it can.
    """

    def needs(self, model: Model) -> str:
        return ""

    def look(
        self,
        model: Model,
        data: Any,
        before: Model | None = None,
        snapshots: Mapping[int, Any] | None = None,
        others: Mapping[str, Model] | Sequence[Model] = (),
    ) -> Report:
        """model: the one looked into. data: the task's data (a list of samples or a loader of batches with labels).
        before: the same model before fine-tuning, where the lens compares. snapshots: step -> state dict, kept by fit.
        others: more models of the same task, where the lens compares several.
        Raises BadInput where `needs` gives a reason."""
        raise NotImplementedError
