"""The catalogue: finds cards without importing any model; `create` imports just the one it needs."""

from __future__ import annotations

import builtins
import re
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from formarium.cards import Card, Variant, read_card
from formarium.errors import BadInput, UnknownName

if TYPE_CHECKING:
    from formarium.model import Model

_ROOT = Path(__file__).parent
_ROOMS = ("models", "lenses", "methods")


@cache
def cards() -> dict[str, Card]:
    """Every card by slug. Reads TOML files only."""
    found = {}
    for room in _ROOMS:
        for path in sorted((_ROOT / room).rglob("*.toml")):
            module = "formarium." + ".".join(path.relative_to(_ROOT).with_suffix("").parts)
            found[path.stem] = read_card(path, module)
    return dict(sorted(found.items()))


def list(task: str | None = None, kind: str | None = None) -> builtins.list[Card]:
    """All cards, optionally of one task ("image-classification") or one kind ("model", "lens", "method")."""
    if task is not None and task not in (tasks := {c.task for c in cards().values()}):
        raise UnknownName("task", task, tasks)
    if kind is not None and kind not in (kinds := ("model", "lens", "method")):
        raise UnknownName("kind", kind, kinds)
    return [c for c in cards().values() if task in (None, c.task) and kind in (None, c.kind)]


def card(name: str) -> Card:
    """The card of a system, by its slug or by the name of one of its variants."""
    if name in cards():
        return cards()[name]
    return resolve(name)[0]


def resolve(name: str) -> tuple[Card, Variant]:
    """The card and variant that carry a variant's name. A slug alone stands for its first variant."""
    all_cards = cards()
    for c in all_cards.values():
        if name in c.variants:
            return c, c.variants[name]
    if name in all_cards and all_cards[name].variants:
        c = all_cards[name]
        return c, next(iter(c.variants.values()))
    names = [*all_cards, *(v for c in all_cards.values() for v in c.variants)]
    raise UnknownName("system or variant", name, names)


def find(words: str, limit: int = 10) -> builtins.list[Card]:
    """Cards by what a person needs, best first: every word is looked for in titles, keywords, summaries and claims."""
    wanted = re.findall(r"[a-z0-9]+", words.lower())
    if not wanted:
        raise BadInput("search words", expected="at least one word", got=repr(words))
    scored = [(_score(c, wanted), c) for c in cards().values()]
    best = sorted((pair for pair in scored if pair[0] > 0), key=lambda pair: (-pair[0], pair[1].slug))
    return [c for _, c in best[:limit]]


def _score(c: Card, wanted: builtins.list[str]) -> float:
    fields_ = [
        (6.0, f"{c.slug} {' '.join(c.variants)}"),
        (4.0, " ".join(c.keywords)),
        (3.0, c.title),
        (2.0, c.task.replace("-", " ")),
        (1.5, c.summary),
        (1.0, c.claim),
        (0.5, " ".join(map(str, c.paper.values()))),
    ]
    total, hits = 0.0, 0
    for word in wanted:
        stem = word[:-1] if len(word) > 3 and word.endswith("s") else word
        gained = sum(weight for weight, text in fields_ if re.search(rf"\b{re.escape(stem)}", text.lower()))
        total += gained
        hits += gained > 0
    return total * hits / len(wanted)


def system_class(c: Card) -> Any:
    """The class behind a card; imports its module (and with it torch)."""
    return getattr(import_module(c.module), c.class_name)


def model_class(c: Card) -> Any:
    """The class of the models a card's variants name: the system itself, or what its method makes (`Method.network`).

    Raises BadInput for a lens, or a method that changes models in place.
    """
    cls = system_class(c)
    made = cls if c.kind == "model" else getattr(cls, "network", None)
    if made is None:
        raise BadInput(c.slug, expected="a model", got=f"a {c.kind}", fix=f"import it: from {c.module} import {c.class_name}")
    return made


def create(name: str, **overrides: Any) -> Model:
    """A model by its published name, with Config fields to override.

    >>> create("pvt_tiny", num_classes=10)

    The weights are freshly initialised as the paper says; `.load_authors(path)` loads the authors' checkpoint.
    Raises UnknownName for a name nothing carries, BadInput for a field the Config doesn't have.
    """
    c, variant = resolve(name)
    cls = model_class(c)
    known = {f.name for f in fields(cls.Config)}
    for key in overrides:
        if key not in known:
            raise UnknownName(f"field of {cls.__name__}.Config", key, known)
    model = cls(make_config(cls.Config, {**variant.config, **overrides}))
    model.adopt(c, variant.name, c.preprocessing_of(variant))
    return model


def make_config(config_class: Any, values: dict[str, Any]) -> Any:
    """A Config from plain data: lists (as TOML and JSON have them) become tuples, all the way down."""
    return config_class(**{k: freeze(v) for k, v in values.items()})


def freeze(value: Any) -> Any:
    return tuple(freeze(v) for v in value) if isinstance(value, (builtins.list, tuple)) else value
