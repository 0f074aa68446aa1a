"""compare: the main job. Fit every candidate under one budget on your data, and say which is best inside your limits."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from threadpoolctl import threadpool_limits

import formarium
from formarium import catalogue
from formarium.cards import Card, Variant
from formarium.engine import runs
from formarium.engine.benchmarking import bench, cost
from formarium.engine.evaluation import Evaluation, evaluate, interval, resampled_means
from formarium.engine.looking import look
from formarium.engine.trials import Trial, run_all, run_on_ray, rungs, share
from formarium.errors import BadInput, NoCandidates, UnknownName
from formarium.report import page
from formarium.task import Data
from formarium.task import task as task_of

# The nominal machine of time budgets: two ordinary cores. A training step costs three forwards.
NOMINAL_FLOPS, NOMINAL_BYTES, NOMINAL_OPERATION = 5e10, 4e9, 2e-5


@dataclass
class Comparison:
    """rows: one dict a candidate, best first. winner: the best one's run (None where all failed). results: all of it, as written."""

    rows: list[dict[str, Any]]
    winner: runs.Run | None
    results: dict[str, Any]
    out: Path
    section: page.Section = field(repr=False, default_factory=page.Section)


def compare(
    data: str | Path | Data,
    *,
    systems: Sequence[str] | None = None,
    task: str = "image-classification",
    scale: str = "micro",
    budget: str = "10m",
    max_params: int | None = None,
    max_latency: float | None = None,
    seeds: int = 1,
    seed: int = 0,
    out: str | Path = "runs/compare",
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    precision: str = "auto",
    workers: int = 0,
    jobs: int | None = None,
    engine: str = "local",
    stop_early: bool = True,
    lens: str = "sufo",
    batch_size: int | None = None,
    progress: bool | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Fit, evaluate and measure every candidate for a task, under one budget, and write report.html, results.json and the winner's run.

    data: a folder, "sample:NAME" or a Data. systems: slugs or variant names (all of the task by default). scale: "micro" (each system's
    small variant) or "published" (the smallest published one). budget: "20ep" epochs, "2000steps", or a time ("10m", "2h", "90s") that
    a fixed cost model turns into the same number of steps for all. stop_early: successive halving; of more than three candidates the lower
    half is stopped after a quarter of the steps, half of the rest after half of them (never within an epoch). engine: "local", or "ray" for
    Ray Tune (ASHA, on the cluster Ray is connected to or a local one; pip install 'formarium[scale]'). max_params, max_latency (ms, one
    sample, here): limits. seeds: repeats.
    batch_size: of every fit (by default the task's). jobs: fits at a time, each with one thread (by default one a core at micro scale, one
    in all otherwise).
    lens: what looks into the winner ("" for none). say: called with a line of progress.
    Raises NoCandidates, BadInput, UnknownName, RunExists.
    """
    if scale == "micro" and not torch.cuda.is_available() and torch.get_num_threads() > 1:
        given = dict(locals())
        with one_thread():  # small models gain nothing from several, and the fits get a core each
            return compare(given.pop("data"), **given)
    parse_budget(budget)
    if engine not in ("local", "ray"):
        raise UnknownName("engine", engine, ("local", "ray"))
    chosen = candidates_for(task, systems, scale)
    batch_size = batch_size or task_of(task).batch_size
    folder = Path(out)
    asked = {
        "data": str(data) if not isinstance(data, Data) else data.name,
        "systems": [*(systems or [])],
        "scale": scale,
        "budget": budget,
        "stop_early": stop_early,
    }
    found = runs.as_data(data, task, strict=strict, seed=seed) if not isinstance(data, Data) else data
    _claim(folder, resume, overwrite, {**asked, "seeds": seeds, "seed": seed, "fingerprint": fingerprint(found)})
    for note in found.notes:
        say(note)
    made = [_Candidate.make(card, variant, found) for card, variant in chosen]
    kept, dropped = _within(made, max_params, max_latency)
    per_epoch = max(1, len(found.splits["train"]) // batch_size)
    steps = plan(budget, kept, found, seeds, batch_size, stop_early)
    epochs = steps / per_epoch
    say(f"{len(kept)} candidates, {steps} steps of {batch_size} each ({epochs:.1f} epochs)")
    jobs = jobs or (min(os.cpu_count() or 1, len(kept) * seeds) if scale == "micro" and not torch.cuda.is_available() else 1)
    trials = [
        Trial(c.slug, s, found, folder, steps, epochs, batch_size, precision, workers) for c in kept for s in range(seed, seed + seeds)
    ]
    ladder = rungs(steps, len(kept), per_epoch, stop_early)
    fitted = run_on_ray(trials, ladder, jobs, say) if engine == "ray" else run_all(trials, ladder, jobs, progress, say)
    rows: list[dict[str, Any]] = []
    evaluations: dict[str, list[Evaluation]] = {}
    for c in kept:
        scored = [_scored(fitted[c.slug, s], folder, found, workers) for s in range(seed, seed + seeds)]
        evaluations[c.slug] = [e for _, e in scored if e is not None]
        rows.append(_merged(c, [row for row, _ in scored], evaluations[c.slug], folder, seed))
    return _conclude(found, folder, asked, rows, dropped, evaluations, steps, epochs, seeds, seed, batch_size, lens, say)


@contextmanager
def one_thread() -> Iterator[None]:
    """torch and the numerical libraries below it compute in one thread for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(before)


# candidates ---------------------------------------------------------------------------------------------------------


def candidates_for(task_name: str, systems: Sequence[str] | None, scale: str) -> list[tuple[Card, Variant]]:
    """(card, variant) of every system asked for, or of every model of the task. UnknownName for typos, NoCandidates where none is left."""
    if scale not in ("micro", "published"):
        raise BadInput("scale", expected="micro or published", got=repr(scale))
    cards = catalogue.list(task=task_name, kind="model")
    if not systems:
        return [(c, smallest(c, scale)) for c in cards]
    chosen = []
    for name in systems:
        card, variant = catalogue.resolve(name)
        if card.kind != "model" or card.task != task_name:
            raise BadInput(name, expected=f"a model for {task_name}", got=f"a {card.kind} for {card.task}")
        chosen.append((card, smallest(card, scale) if name == card.slug else variant))
    return chosen


def smallest(card: Card, scale: str) -> Variant:
    """The micro variant, or the smallest published one that has an objective of its own."""
    if scale == "micro" and card.micro is not None:
        return card.micro
    trainable = [v for v in card.published.values() if not v.config.get("dense")]
    if not trainable:
        raise NoCandidates(f"{card.slug} has no variant to train at scale {scale!r}")
    return min(trainable, key=lambda v: v.parameters or 10**18)


@dataclass
class _Candidate:
    card: Card
    variant: Variant
    args: dict[str, Any]
    parameters: int
    step_seconds: float  # nominal, a sample's training step
    latency: float | None = None

    @property
    def slug(self) -> str:
        return self.variant.name

    @staticmethod
    def make(card: Card, variant: Variant, data: Data) -> _Candidate:
        torch.manual_seed(0)
        model = catalogue.create(variant.name, **data.model_args).eval()
        flops, moved = cost(model, model.example(1))
        per_sample = 3 * (flops / NOMINAL_FLOPS + moved.bytes / NOMINAL_BYTES)
        return _Candidate(
            card, variant, dict(data.model_args), model.parameters_count, per_sample + 3 * moved.operations * NOMINAL_OPERATION / 64
        )


def _within(made: list[_Candidate], max_params: int | None, max_latency: float | None) -> tuple[list[_Candidate], list[dict[str, Any]]]:
    kept, dropped = [], []
    for c in made:
        if max_params is not None and c.parameters > max_params:
            dropped.append({"variant": c.slug, "why": f"{c.parameters:,} parameters, over {max_params:,}"})
            continue
        if max_latency is not None:
            c.latency = bench(catalogue.create(c.slug, **c.args), batch=1, repeats=10, seconds=2).latency_ms
            if c.latency > max_latency:
                dropped.append({"variant": c.slug, "why": f"{c.latency:.1f} ms, over {max_latency:g} ms"})
                continue
        kept.append(c)
    if not kept:
        why = "; ".join(f"{d['variant']} has {d['why']}" for d in dropped)
        raise NoCandidates(f"the limits leave no system to compare: {why}")
    return kept, dropped


# the budget ---------------------------------------------------------------------------------------------------------


def parse_budget(budget: str) -> tuple[float, str]:
    """("20ep") -> (20.0, "ep"). BadInput for what is no budget."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ep|epochs?|steps?|s|m|min|h)", budget.strip().lower())
    if not match or float(match[1]) <= 0:
        raise BadInput("budget", expected='"20ep", "2000steps" or a time such as "10m"', got=repr(budget))
    return float(match[1]), match[2]


def plan(budget: str, candidates: Sequence[_Candidate], data: Data, seeds: int, batch_size: int, stop_early: bool = False) -> int:
    """Optimiser steps for every candidate that isn't stopped early, the same for all and on any machine."""
    amount, unit = parse_budget(budget)
    per_epoch = max(1, len(data.splits["train"]) // batch_size)
    if unit.startswith("ep"):
        return max(1, round(amount * per_epoch))
    if unit.startswith("step"):
        return max(1, round(amount))
    seconds = amount * {"s": 1, "m": 60, "min": 60, "h": 3600}[unit]
    together = seeds * batch_size * sum(c.step_seconds for c in candidates)
    mean = together / len(candidates)
    steps = bisect_right(range(1, 10**7), seconds, key=lambda n: n * mean * share(n, len(candidates), per_epoch, stop_early))
    if steps < 1:
        raise BadInput("budget", expected=f"at least {together:.0f}s, one step for each candidate", got=budget)
    return steps


# results ------------------------------------------------------------------------------------------------------------


def _scored(row: dict[str, Any], folder: Path, data: Data, workers: int) -> tuple[dict[str, Any], Evaluation | None]:
    if "error" in row:
        return row, None
    run = runs.load_run(folder / row["path"])
    evaluation = evaluate(run, data, bootstrap=0, workers=workers)
    return {**row, "metrics": evaluation.metrics, "seconds": run.config["seconds"]}, evaluation


def _merged(c: _Candidate, scored: list[dict[str, Any]], evaluations: list[Evaluation], folder: Path, seed: int) -> dict[str, Any]:
    """One row a candidate: means over seeds, the interval over held-out samples (each sample's score averaged over the seeds)."""
    good = [row for row in scored if "metrics" in row]
    row: dict[str, Any] = {
        "system": c.card.slug, "variant": c.slug, "parameters": c.parameters, "seconds": round(sum(r["seconds"] for r in scored), 2),
        "ok": bool(good), "steps": min((r["steps"] for r in good), default=0),
        "error": next((r["error"] for r in scored if "error" in r), None),
    }  # fmt: skip
    if not good:
        return row
    measured = bench(folder / good[0]["path"], batch=32, repeats=15, seconds=1.5).as_dict()
    row |= {
        "metrics": {k: float(np.mean([r["metrics"][k] for r in good])) for k in good[0]["metrics"]},
        "intervals": {k: interval(np.mean([e.per_sample[k] for e in evaluations], axis=0), seed=seed) for k in evaluations[0].per_sample},
        "seeds": [{"seed": r["seed"], **r["metrics"]} for r in good],
        **{k: measured.get(k) for k in ("flops", "latency_ms", "throughput", "peak_memory", "of_peak", "precision")},
        "run": good[0]["path"],
    }
    return row


# the conclusion -----------------------------------------------------------------------------------------------------


def _conclude(
    data: Data, folder: Path, asked: dict[str, Any], rows: list[dict[str, Any]], dropped: list[dict[str, Any]],
    evaluations: dict[str, list[Evaluation]], steps: int, epochs: float, seeds: int, seed: int, batch_size: int, lens: str,
    say: Callable[[str], None],
) -> Comparison:  # fmt: skip
    task_ = task_of(data.task)
    key, sign = task_.metric, 1 if task_.higher_is_better else -1
    rows.sort(key=lambda r: (not r["ok"], -r["steps"], -sign * r["metrics"][key] if r["ok"] else 0, r["parameters"]))
    name, baseline = task_.baseline(data, seed)
    for i, row in enumerate(rows):
        row["rank"] = i + 1 if row["ok"] else None
        row["stopped"] = row["ok"] and row["steps"] < steps
        row["beats_baseline"] = sign * row["metrics"][key] > sign * baseline[key] if row["ok"] else False
    good = [r for r in rows if r["ok"]]
    winner = None
    if good:
        shutil.rmtree(folder / "winner", ignore_errors=True)
        shutil.copytree(folder / good[0]["run"], folder / "winner", ignore=shutil.ignore_patterns("checkpoint", "row.json"))
        winner = runs.load_run(folder / "winner")
    results = {
        "formarium": formarium.__version__,
        "task": data.task,
        "data": {"name": data.name, **data.source, "classes": [*data.names], "sizes": {k: len(v) for k, v in data.splits.items()},
                 "fingerprint": fingerprint(data), "notes": data.notes},
        "asked": asked,
        "budget": {"asked": asked["budget"], "steps": steps, "batch_size": batch_size, "epochs": round(epochs, 3),
                   "samples": steps * batch_size},
        "metric": key,
        "higher_is_better": task_.higher_is_better,
        "seeds": [*range(seed, seed + seeds)],
        "baseline": {"name": name, **baseline},
        "stopped": [r["variant"] for r in good if r["stopped"]],
        "below_baseline": [r["variant"] for r in good if not r["beats_baseline"]],
        "winner": good[0]["variant"] if good else None,
        "lead": _lead(good, evaluations, key, seed, sign),
        "dropped": dropped,
        "candidates": rows,
        "machine": machine(),
        "command": shlex.join(["formarium", *sys.argv[1:]]) if Path(sys.argv[0]).name.startswith("formarium") else "formarium.compare(...)",
    }  # fmt: skip
    section = page.Section(title=data.name, results=results, folder=folder)
    if winner is not None:
        best = evaluations[good[0]["variant"]][0]
        section.curves = {r["variant"]: [*runs.read_metrics(folder / r["run"] / runs.METRICS)] for r in good}
        section.figures |= task_.details(best.predictions, best.batches, data.names)
        section.picture = task_.draw(*task_.examples(best.predictions, best.batches), data.names)
        if lens:
            say(f"looking into {good[0]['variant']} with {lens}")
            section.look = _look(winner, lens, data, {r["variant"]: folder / r["run"] for r in good[1:3]})
    comparison = Comparison(rows, winner, results, folder, section)
    runs.write_json(folder / "results.json", results)
    page.write(folder / "report.html", f"Which design is best for {data.name}?", [section])
    return comparison


def _lead(good: list[dict[str, Any]], evaluations: dict[str, list[Evaluation]], key: str, seed: int, sign: int) -> dict[str, Any] | None:
    """The winner against the runner-up on the same held-out samples, by paired bootstrap."""
    if len(good) < 2 or key not in evaluations[good[0]["variant"]][0].per_sample:
        return None
    first, second = (np.mean([e.per_sample[key] for e in evaluations[r["variant"]]], axis=0) for r in good[:2])
    differences = resampled_means(sign * (first - second)[None], 2000, seed)[0]
    low, high = np.quantile(differences, [0.025, 0.975])
    return {
        "over": good[1]["variant"],
        "difference": float(sign * (first - second).mean()),
        "low": float(low),
        "high": float(high),
        "clear": bool(low > 0),
    }


def _look(winner: runs.Run, lens: str, data: Data, others: Mapping[str, Path]) -> Any:
    """The lens's report on the winner beside the next two; where it can't look, a report that says so."""
    from formarium.lens import Report

    try:
        snapshots = winner.snapshots()
        before = None
        if snapshots:
            before = runs.build(winner.config)
            before.load_state_dict(snapshots[min(snapshots)])
        return look(winner, lens, data, before=before.eval() if before is not None else None, others=others)
    except (BadInput, UnknownName) as e:
        return Report(lens, [f"{lens} could not look into the winner: {e}"])


def fingerprint(data: Data) -> str:
    """A hash of what the data holds: sample names and labels of every split, and the arrays of up to 64 samples of each."""
    h = hashlib.sha256()
    for split, dataset in sorted(data.splits.items()):
        h.update(f"{split}{len(dataset)}".encode())
        for i in np.linspace(0, len(dataset) - 1, min(64, len(dataset))).astype(int):
            sample = dataset[int(i)]
            for key in sorted(sample):
                value = sample[key]
                if hasattr(value, "tobytes"):
                    h.update(f"{key}{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
                elif torch.is_tensor(value):
                    h.update(f"{key}{value.dtype}{[*value.shape]}".encode() + value.detach().cpu().contiguous().numpy().tobytes())
                else:
                    h.update(f"{key}{value}".encode())
    return h.hexdigest()[:16]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "processor": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": torch.__version__,
        "python": platform.python_version(), "system": platform.system(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }  # fmt: skip


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _claim(folder: Path, resume: bool, overwrite: bool, asked: Mapping[str, Any]) -> None:
    """Take the output directory, or say why not; what was asked is kept, so that only the same comparison can be gone on with."""
    begun = folder / "compare.json"
    if folder.exists() and any(folder.iterdir()):
        if not begun.exists():
            raise runs.RunExists(f"{folder} holds other files, and no comparison; give another directory with --out")
        if not (resume or overwrite):
            raise runs.RunExists(
                f"{folder} already holds a comparison; resume it, overwrite it, or give another directory (--resume, --overwrite, --out)"
            )
        if resume and json.loads(begun.read_text(encoding="utf-8")) != json.loads(json.dumps(asked)):
            raise runs.RunExists(
                f"{folder} holds another comparison (other data, systems, budget or seeds); overwrite it or use another directory"
            )
        if not resume:
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(begun, asked)


def demo(out: str | Path = "runs/demo", *, overwrite: bool = False, resume: bool = False, budget: str | None = None, seed: int = 0,
         progress: bool | None = None, say: Callable[[str], None] = lambda text: None) -> list[Comparison]:  # fmt: skip
    """The main job on the sample data: every image backbone's micro variant, on handwritten digits and on textures, one report."""
    folder = Path(out)
    samples = task_of("image-classification").samples
    _claim(folder, resume, overwrite, {"demo": [*samples], "budget": budget, "seed": seed})
    comparisons = []
    for name in samples:
        say(f"\n{name}")
        comparisons.append(
            compare(
                f"sample:{name}",
                out=folder / name,
                budget=budget or DEMO_BUDGET[name],
                seed=seed,
                resume=resume,
                progress=progress,
                say=say,
            )
        )
    results = {c.section.title: c.results for c in comparisons}
    beaten: dict[str, list[bool]] = {}
    for c in comparisons:
        for row in c.rows:
            if not row["stopped"]:
                beaten.setdefault(row["variant"], []).append(bool(row["beats_baseline"]))
    never = sorted(v for v, wins in beaten.items() if not any(wins))
    best = max(comparisons[0].rows, key=lambda r: _mean_score(r["variant"], comparisons))["variant"]
    where = next(c for c in reversed(comparisons) if c.winner is not None)
    shutil.rmtree(folder / "winner", ignore_errors=True)
    source = where.out / next(r["run"] for r in where.rows if r["variant"] == best)
    shutil.copytree(source, folder / "winner", ignore=shutil.ignore_patterns("checkpoint", "row.json"))
    overall = {"winner": best, "never_beat_the_baseline": never, "winner_run": f"the one fitted on {where.section.title}"}
    runs.write_json(folder / "results.json", {"overall": overall, **results})
    lead = f"{best} has the best mean accuracy over both data sets. Of those that were fitted to the end of either, " + (
        f"these beat logistic regression on raw pixels on neither: {', '.join(never)}." if never
        else "every one beats logistic regression on raw pixels on at least one of them."
    )  # fmt: skip
    title = f"{len(comparisons[0].rows)} image backbones under one budget"
    page.write(folder / "report.html", title, [replace(c.section) for c in comparisons], lead)
    say(lead)
    return comparisons


DEMO_BUDGET = {"digits": "3ep", "textures": "5ep"}


def _mean_score(variant: str, comparisons: Sequence[Comparison]) -> float:
    scores = [r["metrics"][c.results["metric"]] for c in comparisons for r in c.rows if r["variant"] == variant and r["ok"]]
    return sum(scores) / len(comparisons) if scores else -1.0
