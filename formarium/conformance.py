"""The conformance suite: what a machine can check of every system (the idea is scikit-learn's `check_estimator`).

`check("pvt")` runs it for one system, on its smallest variant, for people who add one; the tests run it for all.
Each check is a function of a card; it returns a sentence about what it saw, or raises Failed with what is wrong.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formarium import catalogue
from formarium.authors import authors_of, load_state
from formarium.cards import KINDS, Card
from formarium.catalogue import create, make_config, system_class
from formarium.errors import BadInput
from formarium.features import taps, trace
from formarium.model import Losses, Model
from formarium.task import task as task_of


class Failed(AssertionError):
    """A check that a system doesn't pass; the message says what is wrong."""


@dataclass(frozen=True)
class Checked:
    """One check's outcome: ok, what was seen or what is wrong, and how long it took."""

    system: str
    check: str
    ok: bool
    detail: str
    seconds: float


CHECKS: dict[str, Callable[[Card], str]] = {}
_KINDS: dict[str, tuple[str, ...]] = {}


def _check(*kinds: str) -> Callable[[Callable[[Card], str]], Callable[[Card], str]]:
    def register(fn: Callable[[Card], str]) -> Callable[[Card], str]:
        CHECKS[fn.__name__], _KINDS[fn.__name__] = fn, kinds
        return fn

    return register


def checks_for(card: Card) -> list[str]:
    """Names of the checks that a system of this kind goes through."""
    return [name for name in CHECKS if card.kind in _KINDS[name]]


def run(card: Card, name: str) -> Checked:
    """One check of one system."""
    start = time.perf_counter()
    try:
        ok, detail = True, CHECKS[name](card)
    except Exception as e:
        ok, detail = False, str(e) if isinstance(e, Failed) else f"{type(e).__name__}: {e}"
    return Checked(card.slug, name, ok, detail, round(time.perf_counter() - start, 3))


def check(slug: str) -> Iterator[Checked]:
    """Run the suite for one system, check by check. Raises UnknownName for a name nothing carries."""
    card = catalogue.card(slug)
    return (run(card, name) for name in checks_for(card))


def must(condition: Any, message: str) -> None:
    if not condition:
        raise Failed(message)


def smallest(card: Card, **overrides: Any) -> Model:
    """The system's micro variant in eval mode, from seed 0."""
    must(card.micro, f"the card has no variant {card.slug}_micro to test with")
    torch.manual_seed(0)
    return create(f"{card.slug}_micro", **overrides).eval()


def forward(model: Model, *inputs: Tensor) -> list[Tensor]:
    """The outputs of a forward without gradient, as a flat list."""
    from formarium.engine.records import flatten

    with torch.no_grad():
        return [*flatten(model(*inputs)).values()]


def close(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-5) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and bool(((x - y).abs().max() <= tolerance * (1 + y.abs().max())).item()) for x, y in zip(a, b, strict=True)
    )


# the card -----------------------------------------------------------------------------------------------------------


@_check(*KINDS)
def card_is_complete(card: Card) -> str:
    for name in ("title", "summary", "claim", "task"):
        must(getattr(card, name), f"the card has no {name}")
    for name in ("authors", "year", "venue"):
        must(card.paper.get(name), f"the card's paper has no {name}")
    must(card.limits, "the card says nothing of its limits (what of the paper is not here, and why)")
    must(card.kind in KINDS, f"kind is {card.kind!r}, not one of {KINDS}")
    must(card.keywords, "the card has no keywords to be found by")
    if card.kind == "model":
        must(card.published, "no variant is marked as published")
        must(card.recipe, "no published recipe")
        must(card.demo, "no demo recipe")
    must(callable(system_class(card)), f"{card.module}:{card.class_name} is no class")
    return f"{len(card.published)} published variants"


@_check("model")
def every_variant_builds_with_the_published_parameters(card: Card) -> str:
    with torch.device("meta"):
        for name, variant in card.variants.items():
            count = create(name).parameters_count
            must(variant.parameters in (None, count), f"{name} has {count} parameters, its card says {variant.parameters}")
    return f"{len(card.variants)} variants built"


@_check("lens")
def looks_into_a_model_or_says_why_not(card: Card) -> str:
    lens, model = system_class(card)(), smallest(catalogue.card("pvt"))
    if reason := lens.needs(model):
        return reason
    before = [p.clone() for p in model.parameters()]
    report = lens.look(model, [model.example_batch(16, seed=i) for i in range(4)])
    must(report.findings and all(isinstance(f, str) for f in report.findings), "the report has no findings in words")
    json.dumps(report.numbers)
    must(all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)), "looking changes the model")
    return f"{len(report.findings)} findings, {len(report.figures)} figures"


@_check("method")
def changes_a_model_or_says_why_not(card: Card) -> str:
    method, model = system_class(card)(), smallest(catalogue.card("pvt"))
    if reason := method.needs(model):
        return reason
    changed = method.apply(model).eval()
    must(isinstance(changed, Model), f"apply gives {type(changed).__name__}, not a Model")
    batch = changed.example_batch(3)
    with torch.no_grad():
        prediction = changed.predict(batch)
    must(len(task_of(changed.task).rows(prediction, batch, [])) == 3, "the changed model doesn't predict")
    return f"{type(changed).__name__} predicts"


# the network --------------------------------------------------------------------------------------------------------


@_check("model")
def gradients_reach_every_parameter(card: Card) -> str:
    model = smallest(card).train()
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for stage in model.training_stages():
        if stage.prepare:
            getattr(model, stage.prepare)()
        for turn in stage.turns:
            losses = getattr(model, turn.loss)(model.example_batch(4))
            must(isinstance(losses, Losses), f"{turn.loss} returns {type(losses).__name__}, not Losses")
            must(losses.total.ndim == 0 and bool(torch.isfinite(losses.total)), f"{turn.loss} gives {losses.total}, not a finite scalar")
            losses.total.backward()
    silent = [n for n, p in names.items() if p.grad is None and not any(fnmatchcase(n, g) for g in card.no_gradient)]
    must(not silent, f"no gradient reaches {', '.join(silent[:5])} (if that is so by design, say why in the card's [no_gradient])")
    wild = [n for n, p in names.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
    must(not wild, f"the gradient of {', '.join(wild[:5])} is not finite")
    return f"{len(names)} tensors"


@_check("model")
def samples_do_not_see_one_another(card: Card) -> str:
    model = smallest(card)
    inputs = model.example(4)
    together = forward(model, *inputs)
    reversed_ = [x.flip(0) for x in forward(model, *(x.flip(0) for x in inputs))]
    must(close(reversed_, together), "another order in the batch gives other outputs")
    alone = [torch.cat(parts) for parts in zip(*(forward(model, *(x[i : i + 1] for x in inputs)) for i in range(4)), strict=True)]
    must(close(alone, together), "a sample alone gives another output than in a batch")
    return "batch of 4, reversed, and one by one"


@_check("model")
def the_seed_decides(card: Card) -> str:
    first, second = smallest(card), smallest(card)
    must(
        all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)),
        "two models from one seed differ",
    )
    inputs = first.example(2)
    must(close(forward(first, *inputs), forward(second, *inputs), 0), "two forwards of equal models differ")
    return "same weights, same output"


@_check("model")
def other_sizes_work_or_are_refused_clearly(card: Card) -> str:
    model, seen = smallest(card), []
    for what, inputs in model.other_examples().items():
        try:
            outputs = forward(model, *inputs)
            must(all(torch.isfinite(o).all() for o in outputs), f"{what} gives values that are not finite")
            seen.append(what)
        except BadInput:
            seen.append(f"{what} refused")
    return ", ".join(seen)


@_check("model")
def bfloat16_autocast_stays_close(card: Card) -> str:
    if reason := card.demo.get("no_bfloat16", ""):
        return f"not in bfloat16: {reason}"
    model = smallest(card)
    inputs = model.example(2)
    exact = forward(model, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = [o.float() for o in forward(model, *inputs)]
    worst = max(((a - b).abs().max() / (b.abs().max() + 1e-6)).item() for a, b in zip(half, exact, strict=True))
    must(worst < 0.1, f"outputs differ by {worst:.2g} of their absmax from float32's")
    return f"within {worst:.1g} of absmax"


@_check("model")
def saving_and_loading_gives_the_same_model(card: Card) -> str:
    from safetensors.torch import load_file, save_file

    model = smallest(card)
    inputs = model.example(2)
    before = forward(model, *inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, str(path))
        cls = system_class(card)
        again = cls(make_config(cls.Config, model.config_dict())).eval()
        again.load_state_dict(load_file(path))
    must(close(forward(again, *inputs), before, 0), "the loaded model gives another output")
    return f"{len(model.state_dict())} tensors"


@_check("model")
def authors_names_round_trip(card: Card) -> str:
    model = smallest(card)
    authors = authors_of(card.slug)
    theirs = authors.export_state(model)
    must(len(theirs) == len({*theirs}) and theirs, "no names")
    other = smallest(card)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    load_state(other, theirs)
    same = all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))
    must(same, "the weights differ after ours -> theirs -> ours")
    return f"{len(theirs)} of their names"


# taps ---------------------------------------------------------------------------------------------------------------


@_check("model")
def taps_read_and_edit(card: Card) -> str:
    model = smallest(card)
    names = [*taps(model)]
    for kind, pattern in [("its tokeniser", "*tokens*"), ("its blocks", "*blocks.*"), ("the place before its head", "*features*")]:
        must(any(fnmatchcase(n, pattern) for n in names), f"no tap at {kind} ({pattern}); there are: {', '.join(names) or 'none'}")
    inputs = model.example(2)
    before = forward(model, *inputs)
    read = trace(model, inputs)
    must(close([*_flat(read.output)], before, 0), "tracing changes the output")
    missed = [n for n in names if n not in read]
    must(not missed, f"the forward never passes {', '.join(missed)}")
    for name, feature in read.items():
        tokens = feature.tokens
        must(tokens.ndim == 3 and tokens.shape[0] == 2, f"{name} gives {[*tokens.shape]}, not [batch, tokens, channels]")
        if feature.grid is not None:
            spots = torch.Size(feature.grid).numel() + feature.prefix
            must(spots == tokens.shape[1], f"{name} has {tokens.shape[1]} tokens on a grid {feature.grid} and {feature.prefix} before it")
        edited = trace(model, inputs, at=name, edit={name: lambda f: f.tokens * 1.5 + 0.5}).output
        must(not close([*_flat(edited)], before, 0), f"editing {name} changes nothing")
    must(close(forward(model, *inputs), before, 0), "a trace leaves something behind")
    return f"{len(names)} taps"


def _flat(out: Any) -> Iterator[Tensor]:
    from formarium.engine.records import flatten

    return iter(flatten(out).values())


# shipping -----------------------------------------------------------------------------------------------------------


@_check("model")
def exports_to_torch(card: Card) -> str:
    return _export(card, "torch")


@_check("model")
def exports_to_onnx(card: Card) -> str:
    return _export(card, "onnx")


def _export(card: Card, format: str) -> str:
    from formarium.exporters import export

    reason = card.demo.get(f"no_{format}_export", "")
    if reason:
        return f"not exported: {reason}"
    with tempfile.TemporaryDirectory() as folder:
        path = export(smallest(card), Path(folder) / f"model.{'onnx' if format == 'onnx' else 'pt2'}", format=format)
        must(path.stat().st_size > 0, "an empty file")
        return f"{path.stat().st_size // 1024} KiB, same output with another batch size"


# the task -----------------------------------------------------------------------------------------------------------


@_check("model")
def predicts_and_draws(card: Card) -> str:
    model, task = smallest(card), task_of(card.task)
    batch = model.example_batch(3)
    with torch.no_grad():
        prediction = model.predict(batch)
    names = task.example_names or [f"class {i}" for i in range(getattr(model.config, "num_classes", 0))]
    rows = task.rows(prediction, batch, names)
    must(len(rows) == 3, f"{len(rows)} rows for a batch of 3")
    picture = task.draw(prediction, batch, names)
    must(min(picture.size) >= 32, f"a picture of {picture.size}")
    return f"{type(prediction).__name__}, a picture of {picture.size[0]}x{picture.size[1]}"


@_check("model")
def bad_input_is_refused(card: Card) -> str:
    model = smallest(card)
    good = model.example(2)
    tried = 0
    for i, x in enumerate(good):
        wrong: dict[str, Any] = {
            "one dimension missing": x[0],
            "an empty batch": x[:0],
            "not a tensor": x.tolist(),
            "another dtype": x.to(torch.int16) if x.is_floating_point() else x.float(),
        }
        if x.is_floating_point():
            wrong["NaN"] = x.clone().index_fill_(-1, torch.tensor(0), float("nan"))
            axis = model.channel_axes[i] if i < len(model.channel_axes) else None
            if axis is not None:
                wrong["another number of channels"] = torch.cat([x, x], axis)
        for what, value in wrong.items():
            try:
                model(*(value if j == i else g for j, g in enumerate(good)))
            except BadInput:
                tried += 1
                continue
            except Exception as e:
                raise Failed(f"input {i}, {what}: {type(e).__name__} instead of BadInput: {e}") from None
            raise Failed(f"input {i}, {what}: accepted")
    return f"{tried} kinds of wrong input"


@_check("model")
def the_loss_goes_down_on_one_batch(card: Card) -> str:
    model = smallest(card).train()
    batch = model.example_batch(8)
    said = []
    for stage in model.training_stages():
        if stage.prepare:
            getattr(model, stage.prepare)()
        if len(stage.turns) > 1:
            said.append(f"{stage.name} alternates {len(stage.turns)} losses")
            continue
        turn = stage.turns[0]
        moved = [p for n, p in model.named_parameters() if p.requires_grad and any(fnmatchcase(n, g) for g in turn.train)]
        optimiser = torch.optim.AdamW(moved, lr=float(card.demo.get("lr", 1e-3)))
        seen = []
        for _ in range(12):
            total = getattr(model, turn.loss)(batch).total
            optimiser.zero_grad()
            total.backward()
            optimiser.step()
            seen.append(total.item())
        must(min(seen[-3:]) < 0.9 * seen[0], f"{turn.loss} goes from {seen[0]:.3f} to {seen[-1]:.3f} in 12 steps on one batch")
        said.append(f"{turn.loss} {seen[0]:.2f} -> {seen[-1]:.2f}")
    return ", ".join(said)
