"""shrink: make a fitted model smaller or faster by a method, and say what that bought and what it cost, side by side."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as save_bytes
from torch.utils.data import Subset

from formarium.catalogue import cards, system_class
from formarium.engine.benchmarking import timed
from formarium.engine.evaluation import evaluate, split_of
from formarium.engine.fitting import fit
from formarium.engine.loader import placed_batches, to_device
from formarium.engine.recipes import recipe_for
from formarium.engine.runs import Run, as_run, data_for, save
from formarium.errors import BadInput, FormariumError, UnknownName
from formarium.method import Method
from formarium.model import Model, evaluating
from formarium.task import Data, task

TIMED = 32  # held-out samples that latency is measured on


@dataclass(frozen=True)
class Size:
    """One side of the comparison. bytes: of the weights as saved. latency_ms: the median time to predict one held-out sample.
    throughput: samples a second, in one batch of TIMED. metrics: on the held-out split."""

    parameters: int
    bytes: int
    latency_ms: float
    throughput: float
    metrics: Mapping[str, float]


@dataclass
class Shrunk:
    """run: the smaller model's. before, after: what they take and score. method: its slug."""

    run: Run
    before: Size
    after: Size
    method: str
    metric: str

    def rows(self) -> list[dict[str, Any]]:
        """The comparison as plain rows: what, before, after, and the ratio after / before (for the metric, the difference)."""
        a, b = self.before, self.after
        out = [
            {"what": name, "before": x, "after": y, "ratio": y / x if x else float("nan")}
            for name, x, y in (
                ("parameters", a.parameters, b.parameters), ("bytes", a.bytes, b.bytes),
                ("latency_ms", a.latency_ms, b.latency_ms), ("throughput", a.throughput, b.throughput),
            )
        ]  # fmt: skip
        return [*out, *({"what": k, "before": a.metrics[k], "after": v, "difference": v - a.metrics[k]} for k, v in b.metrics.items())]


def shrink(
    model: str | Path | Model | Run,
    method: str | Method,
    data: str | Path | Data,
    *,
    target: float | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    epochs: float | None = None,
    steps: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    recipe: Mapping[str, Any] | None = None,
    **options: Any,
) -> Shrunk:
    """Apply a method to a copy of a fitted model, train the result where the method trains, and measure both on the held-out split.

    model: a run, a run directory or a fitted model; the name of a variant is fitted by its recipe first. method: a slug (sit_slim, ofb,
    llm_int8, lgvit ...) or a ready-made Method. target: how much to keep, as the method counts it (a share in (0, 1): ofb of the
    parameters, sit_slim of the tokens' cost; lgvit of the blocks that run); by default the method's own.
    out: a run directory for the result, which `formarium.load` takes. epochs, steps, recipe: of the training. options: the method's.
    Raises UnknownName for a method or option nothing carries, BadInput where the method can't change that model; RunExists.
    """
    slug, made = _method(method, target, options)
    run = as_run(model)
    fresh = isinstance(model, str) and run.path is None
    if fresh:
        run = fit(model, data, seed=seed, progress=progress)
    network = run.model
    if reason := made.needs(network):
        raise BadInput(f"{slug} on {network.variant or type(network).__name__}", expected="a model it can change", got=reason)
    found = data_for(network, data)
    before = measure(network, found)
    torch.manual_seed(seed)
    changed = made.apply(deepcopy(network), found)
    if type(made).network is None:  # nothing to train
        done = Run(changed.eval())
        if out is not None:
            done.path = save(done, out, overwrite=overwrite)
    else:
        card = cards()[slug]
        chosen = recipe_for(card, card.micro, **{**(recipe or {}), **{k: v for k, v in (("epochs", epochs), ("steps", steps)) if v}})
        done = fit(changed, found, out, recipe=chosen, overwrite=overwrite, seed=seed, progress=progress)
        if made.settle(done.model, found):
            done.config = {**done.config, "config": done.model.config_dict()}
            if out is not None:
                save(done, out, overwrite=True)
    return Shrunk(done, before, measure(done.model, found), slug, task(network.task).metric)


def measure(model: Model, data: Data, split: str = "val") -> Size:
    """What a model takes and scores, as it predicts (so that layers skipped for easy samples count as skipped)."""
    own, held = task(model.task), split_of(data, split)
    few: Any = Subset(held, range(min(TIMED, len(held))))  # type: ignore[arg-type]

    def batches(size: int) -> list[Any]:
        out = []
        for _, batch in placed_batches(few, own.transform(model.preprocessing), own.collate, size, 0):
            if isinstance(batch, FormariumError):  # a sample that can't be read
                raise batch
            out.append(to_device(batch, model.device))
        return out

    (together,), singles = batches(TIMED), batches(1)
    turn = cycle(singles)
    with evaluating(model), torch.inference_mode():
        several = timed(lambda: model.predict(together), 3, math.inf, model.device)
        single = timed(lambda: model.predict(next(turn)), len(singles), math.inf, model.device)
    return Size(
        parameters=model.parameters_count,
        bytes=len(save_bytes({k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()})),
        latency_ms=1e3 * statistics.median(single),
        throughput=len(few) / statistics.median(several),
        metrics=evaluate(model, data, split, bootstrap=0).metrics,
    )


def _method(method: str | Method, target: float | None, options: dict[str, Any]) -> tuple[str, Method]:
    if isinstance(method, Method):
        if options or target is not None:
            raise BadInput("options", expected="a method by slug to go with them", got="a ready-made method")
        found = [c.slug for c in cards().values() if c.kind == "method" and system_class(c) is type(method)]
        return (found or [type(method).__name__])[0], method
    known = {c.slug: c for c in cards().values() if c.kind == "method"}
    if method not in known:
        raise UnknownName("method", method, known)
    cls = system_class(known[method])
    takes = inspect.signature(cls).parameters
    if target is not None:
        if "target" not in takes:
            raise BadInput(f"target of {method}", expected="no target: it has none to aim at", got=f"{target:g}")
        options = {**options, "target": target}
    for key in options:
        if key not in takes:
            raise UnknownName(f"option of {method}", key, takes)
    return method, cls(**options)
