"""Trials: the fits of a comparison, with those that fall behind stopped early, on this machine's cores or on Ray Tune.

Successive halving (Jamieson & Talwalkar, AISTATS 2016): all candidates train to a first rung, the better half goes on to the next, and so
on; who goes on does so from its checkpoint, with the learning rate schedule of the whole fit. On Ray the same rungs are ASHA's (Li et al.,
MLSys 2020), where a trial is judged as soon as it arrives, by those that arrived before it.
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium import catalogue
from formarium.engine import runs
from formarium.engine.fitting import Interrupted, fit
from formarium.engine.recipes import recipe_for
from formarium.errors import FormariumError, MissingExtra
from formarium.task import Data
from formarium.task import task as task_of

SNAPSHOTS = 6  # of each candidate, for the lens that looks into the winner
FINALISTS = 3  # candidates that are fitted to the end, at least
FIRST_RUNG = 4  # the first rung stands at a quarter of the steps, the next at a half

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Trial:
    """One fit: a variant and a seed, and all that it needs in a process of its own."""

    variant: str
    seed: int
    data: Data
    folder: Path
    steps: int
    epochs: float
    batch_size: int
    precision: str
    workers: int

    @property
    def where(self) -> Path:
        return self.folder / "runs" / f"{self.variant}-{self.seed}"

    def run(self, until: int | None = None, progress: bool | None = None) -> Row:
        """Fit it, up to a step; a failure becomes a row of its own, and what is done already is left as it is."""
        start, goal = time.perf_counter(), min(until or self.steps, self.steps)
        row = {"variant": self.variant, "seed": self.seed, "path": str(self.where.relative_to(self.folder))}
        try:
            begun = self.where.exists()
            if runs.reached(self.where) < goal:
                card, variant = catalogue.resolve(self.variant)
                recipe = recipe_for(card, variant, steps=self.steps, batch_size=self.batch_size, warmup_epochs=0.1 * self.epochs)
                fit(
                    self.variant, self.data, self.where, recipe=recipe, resume=begun, seed=self.seed, precision=self.precision, until=until,
                    snapshots=SNAPSHOTS, validations=6, workers=self.workers, progress=progress,
                )  # fmt: skip
            return {**row, "steps": runs.reached(self.where)}
        except FormariumError as e:
            return {**row, "error": str(e), "seconds": time.perf_counter() - start}
        except (RuntimeError, ValueError) as e:  # one candidate that breaks must not take the others along
            return {**row, "error": f"{type(e).__name__}: {e}", "seconds": time.perf_counter() - start}

    def score(self, at: int) -> float:
        """Its held-out metric after so many steps, the higher the better."""
        task = task_of(self.data.task)
        found = [r for r in runs.read_metrics(self.where / runs.METRICS) if r["split"] == "val" and r["step"] == at]
        value = float(found[-1].get(task.metric, "nan")) if found else float("nan")
        return (value if task.higher_is_better else -value) if value == value else float("-inf")


def rungs(steps: int, candidates: int, per_epoch: int = 1, early: bool = True) -> list[tuple[int, int]]:
    """(step to stop at, candidates that get there), the last being (steps, finalists): halves of the field at a quarter and a half of the
    steps, though never before an epoch is over or close to the end; one rung where few enough are left, or where none are to be stopped."""
    out, left, at = [], candidates, max(steps // FIRST_RUNG, per_epoch)
    while early and left > FINALISTS and 4 * at <= 3 * steps:
        out.append((at, left))
        left, at = max(FINALISTS, -(-left // 2)), 2 * at
    return [*out, (steps, left)]


def share(steps: int, candidates: int, per_epoch: int = 1, early: bool = True) -> float:
    """The steps of all candidates together over `steps` each: what stopping early leaves of a comparison's cost, times its candidates."""
    done, total = 0, 0
    for at, left in rungs(steps, candidates, per_epoch, early):
        total += (at - done) * left
        done = at
    return total / steps


def run_all(
    trials: Sequence[Trial], ladder: Sequence[tuple[int, int]], jobs: int = 1, progress: bool | None = None, say: Say = lambda text: None
) -> dict[tuple[str, int], Row]:
    """Every trial as far as it gets, by (variant, seed): `jobs` at a time in processes with one thread each, or one after the other here.

    The variants whose mean score over their seeds is best at a rung go on to the next; a variant that fails goes no further.
    """
    rows: dict[tuple[str, int], Row] = {}
    alive = [*trials]
    with _pool(jobs) as pool:
        for i, (until, _) in enumerate(ladder):
            rows |= _together(alive, until, pool, progress, say)
            if i + 1 == len(ladder):
                break
            kept = _best(alive, rows, until, ladder[i + 1][1])
            for name in dict.fromkeys(t.variant for t in alive if t.variant not in kept):
                say(f"{name} is stopped after {until} of {ladder[-1][0]} steps")
            alive = [t for t in alive if t.variant in kept]
    return rows


def _best(trials: Sequence[Trial], rows: dict[tuple[str, int], Row], at: int, most: int) -> set[str]:
    scores: dict[str, list[float]] = {}
    for t in trials:
        failed = "error" in rows[t.variant, t.seed]
        scores.setdefault(t.variant, []).append(float("-inf") if failed else t.score(at))
    means = {name: float(np.mean(values)) for name, values in scores.items()}
    return set(sorted((n for n in means if means[n] > float("-inf")), key=lambda n: (-means[n], n))[:most])


@contextmanager
def _pool(jobs: int) -> Iterator[Executor | None]:
    if jobs <= 1:
        yield None
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield pool


def _together(trials: Sequence[Trial], until: int, pool: Executor | None, progress: bool | None, say: Say) -> dict[tuple[str, int], Row]:
    """One rung."""
    if pool is None:
        return {(t.variant, t.seed): t.run(until, progress) for t in trials}
    waiting = {pool.submit(t.run, until, False): t for t in trials}
    try:
        with _bars(trials, until, sys.stderr.isatty() if progress is None else progress) as update:
            done: dict[tuple[str, int], Row] = {}
            left = set(waiting)
            while left:
                finished, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
                update()
                for future in finished:
                    t = waiting[future]
                    done[t.variant, t.seed] = row = future.result()
                    if until == t.steps or "error" in row:
                        say(f"{t.variant} (seed {t.seed}): {row.get('error', 'fitted')}")
            return done
    except KeyboardInterrupt:
        pool.shutdown(wait=True, cancel_futures=True)  # the fits at hand save where they are
        raise Interrupted(f"stopped; the same command with --out {trials[0].folder} --resume goes on from there") from None


@contextmanager
def _bars(trials: Sequence[Trial], until: int, shown: bool) -> Iterator[Callable[[], None]]:
    """One bar a fit, moved by what the fits log."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"))
    with Progress(*columns, console=Console(stderr=True)) as bars:
        ids = {t.where: bars.add_task(t.variant, total=until, said="") for t in trials}

        def update() -> None:
            for where, id_ in ids.items():
                for row in [*runs.read_metrics(where / runs.METRICS)][-1:]:
                    bars.update(id_, completed=row["step"], said=f"loss {row['loss']:.3f}" if "loss" in row else "")

        yield update


# Ray ----------------------------------------------------------------------------------------------------------------


def run_on_ray(
    trials: Sequence[Trial], ladder: Sequence[tuple[int, int]], jobs: int = 1, say: Say = lambda text: None
) -> dict[tuple[str, int], Row]:
    """The same on Ray Tune: `jobs` trials at a time with a core (and, where there are some, a share of a GPU) each, on the cluster that Ray
    is connected to or a local one; ASHA stops those that are in the lower half at a rung. The comparison's folder must be one that every
    node sees. Raises MissingExtra where ray isn't installed.
    """
    try:
        import ray
        from ray import tune
        from ray.tune.schedulers import ASHAScheduler, FIFOScheduler
    except ImportError:
        raise MissingExtra("ray", "scale") from None
    ours = not ray.is_initialized()
    if ours:
        ray.init(num_cpus=jobs, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    first, steps = ladder[0][0], ladder[-1][0]
    scheduler: Any = FIFOScheduler()
    if len(ladder) > 1:
        scheduler = ASHAScheduler(time_attr="step", metric="score", mode="max", grace_period=first, max_t=steps, reduction_factor=2)
    gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / max(1, jobs))
    trainable = tune.with_resources(
        tune.with_parameters(_ray_trial, trials=[*trials], stops=[at for at, _ in ladder]), {"cpu": 1, "gpu": gpus}
    )
    try:
        found = tune.Tuner(
            trainable,
            param_space={"trial": tune.grid_search([*range(len(trials))])},
            tune_config=tune.TuneConfig(scheduler=scheduler, max_concurrent_trials=jobs, reuse_actors=True),
            run_config=tune.RunConfig(name="ray", storage_path=str(trials[0].folder.resolve()), verbose=0),
        ).fit()
    finally:
        if ours:
            ray.shutdown()
    rows = {}
    for result in (found[i] for i in range(len(found))):
        trial = trials[(result.config or {})["trial"]]
        row = {"variant": trial.variant, "seed": trial.seed, "path": str(trial.where.relative_to(trial.folder))}
        error, at = (result.metrics or {}).get("error") or result.error, runs.reached(trial.where)
        row |= {"error": str(error or "it left no run"), "seconds": 0.0} if error or not at else {"steps": at}
        rows[trial.variant, trial.seed] = row
        said = row.get("error") or ("fitted" if at == steps else f"stopped after {at} of {steps} steps")
        say(f"{trial.variant} (seed {trial.seed}): {said}")
    return rows


def _ray_trial(config: dict[str, Any], trials: list[Trial], stops: list[int]) -> None:
    from ray import tune

    torch.set_num_threads(1)
    trial = trials[config["trial"]]
    for until in stops:
        row = trial.run(until, progress=False)
        if "error" in row:
            tune.report({"score": float("-inf"), "step": until, "error": row["error"]})
            return
        tune.report({"score": trial.score(until), "step": until})
