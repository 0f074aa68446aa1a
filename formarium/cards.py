"""Card: what a person must know of a system, as data. A TOML file beside the code; reading it imports no model."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KINDS = ("model", "lens", "method")


@dataclass(frozen=True)
class Variant:
    """A published size or setting of a system (or, where `published` is empty, one for tests and demonstrations)."""

    name: str
    config: Mapping[str, Any]
    published: Mapping[str, Any] = field(default_factory=dict)  # parameters, flops, scores as the paper or repository states
    preprocessing: Mapping[str, Any] = field(default_factory=dict)  # what differs from the card's
    recipe: Mapping[str, Any] = field(default_factory=dict)  # what differs from the card's
    base: str = ""  # the variant whose config this one starts from
    task: str = ""  # where it isn't the card's

    @property
    def parameters(self) -> int | None:
        return self.published.get("parameters")


@dataclass(frozen=True)
class Card:
    """One system: its paper, task, claim, limits, variants, preprocessing and recipes."""

    slug: str
    title: str
    kind: str
    task: str
    summary: str  # what a person would choose it for, in a sentence or two
    claim: str  # one sentence that a test can refute
    limits: tuple[str, ...]  # what of the paper is not here, and why
    paper: Mapping[str, Any]  # authors, year, venue, arxiv
    reference: Mapping[str, Any]  # repo, commit, license, entry
    variants: Mapping[str, Variant]
    keywords: tuple[str, ...]
    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any]  # the published training recipe
    demo: Mapping[str, Any]  # the recipe for the sample data, its baseline and margin
    no_gradient: Mapping[str, str]  # parameter glob -> why it gets no gradient
    module: str  # formarium.models.image.pvt
    class_name: str

    @property
    def published(self) -> dict[str, Variant]:
        return {name: v for name, v in self.variants.items() if v.published}

    @property
    def micro(self) -> Variant | None:
        """The variant for tests and demonstrations, by convention SLUG_micro."""
        return self.variants.get(f"{self.slug}_micro")

    def task_of(self, variant: Variant | None) -> str:
        return (variant.task if variant else "") or self.task

    def preprocessing_of(self, variant: Variant) -> dict[str, Any]:
        return {**self.preprocessing, **variant.preprocessing}

    def recipe_of(self, variant: Variant) -> dict[str, Any]:
        return {**self.recipe, **variant.recipe}


def read_card(path: Path, module: str) -> Card:
    """The card in a TOML file; `module` is the import path of the code beside it."""
    data = tomllib.loads(path.read_text(encoding="utf-8"))
    limits = data.get("limits", ())
    return Card(
        slug=path.stem,
        title=data["title"],
        kind=data["kind"],
        task=data["task"],
        summary=data.get("summary", ""),
        claim=data["claim"],
        limits=(limits,) if isinstance(limits, str) else tuple(limits),
        paper=data.get("paper", {}),
        reference=data.get("reference", {}),
        variants=_variants(data.get("variants", {}), path),
        keywords=tuple(data.get("keywords", ())),
        preprocessing=data.get("preprocessing", {}),
        recipe=data.get("recipe", {}),
        demo=data.get("demo", {}),
        no_gradient=data.get("no_gradient", {}),
        module=module,
        class_name=data["class"],
    )


def _variants(table: Mapping[str, Any], path: Path) -> dict[str, Variant]:
    out: dict[str, Variant] = {}
    for name, entry in table.items():
        base = entry.get("base", "")
        if base and base not in out:
            raise ValueError(f"{path}: variant {name} starts from {base}, which doesn't stand above it")
        inherited = out[base] if base else None
        out[name] = Variant(
            name,
            config={**(inherited.config if inherited else {}), **entry.get("config", {})},
            published=entry.get("published", {}),
            preprocessing={**(inherited.preprocessing if inherited else {}), **entry.get("preprocessing", {})},
            recipe={**(inherited.recipe if inherited else {}), **entry.get("recipe", {})},
            base=base,
            task=entry.get("task", inherited.task if inherited else ""),
        )
    return out
