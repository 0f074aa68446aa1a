"""`formarium list`: quick, since it reads cards only."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from formarium import catalogue
from formarium.cards import Card
from formarium.errors import BadInput


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise BadInput("formarium list", expected="[--task TASK] [--kind KIND] [--json]", got=message)


def run(arguments: Sequence[str]) -> int:
    parser = _Parser(prog="formarium list", add_help=False)
    parser.add_argument("--task")
    parser.add_argument("--kind")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args([*arguments])
    show(catalogue.list(task=chosen.task, kind=chosen.kind), chosen.json)
    return 0


def show(cards: Sequence[Card], as_json: bool) -> None:
    """Cards as a table of plain columns, or as JSON."""
    if as_json:
        import json

        print(json.dumps([summary(c) for c in cards], indent=1))
        return
    rows = [("system", "kind", "task", "variants", "title")]
    rows += [(c.slug, c.kind, c.task, str(len(c.published)), c.title) for c in cards]
    widths = [max(len(r[i]) for r in rows) for i in range(4)]
    for i, row in enumerate(rows):
        line = "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=False)) + "  " + row[4]
        if sys.stdout.isatty():
            line = f"\033[2m{line}\033[0m" if i == 0 else line
        print(line.rstrip())


def summary(c: Card) -> dict[str, Any]:
    """A card in a few keys, for machines."""
    return {
        "system": c.slug, "kind": c.kind, "task": c.task, "title": c.title, "summary": c.summary, "paper": dict(c.paper),
        "variants": {v.name: {"parameters": v.parameters, "published": bool(v.published)} for v in c.variants.values()},
    }  # fmt: skip
