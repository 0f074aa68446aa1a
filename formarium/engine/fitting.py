"""fit: train a model by a recipe, so that it can be interrupted anywhere and go on to the same result.

The loop is one for all: stages, each with its turns (an optimiser, a loss, the parameters it moves). Data order and augmentation come from
the seed, the checkpoint holds everything else that a step depends on.
"""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy

from formarium.engine import runs
from formarium.engine.evaluation import predict_all
from formarium.engine.loader import Order, Prepared, parts, share, to_device, training_batches
from formarium.engine.optim import Averaged, clip, learning_rate, optimiser
from formarium.engine.precision import HARM, PRECISIONS, resolve
from formarium.engine.recipes import Recipe, make_recipe, recipe_for
from formarium.engine.runs import Run, as_data
from formarium.errors import BadInput, FormariumError
from formarium.model import Model, Stage
from formarium.task import Data, task


class Diverged(FormariumError):
    """The loss is no longer a finite number."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the state was saved; the message says how to go on."""


def fit(
    model: str | Model,
    data: str | Path | Data,
    out: str | Path | None = None,
    *,
    recipe: Recipe | Mapping[str, Any] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    precision: str = "auto",
    compile: bool = False,
    snapshots: int = 0,
    validations: int = 8,
    checkpoint_seconds: float = 20.0,
    workers: int = 0,
    progress: bool | None = None,
    **overrides: Any,
) -> Run:
    """Train and return the run; with `out`, leave a run directory.

    model: a name (made with the data's classes and the recipe's drop_path) or a model. data: a Data, a path, or "sample:NAME".
    recipe: a Recipe or its keys; by default the card's for that variant. Keywords override it (steps, epochs, lr, batch_size, ...).
    precision: "auto" (bfloat16 where native and harmless), "float32", "bfloat16". snapshots: how many states to keep beside the first.
    validations: how often the held-out metrics are measured. Under torchrun the global batch is split among the processes.
    Raises RunExists, BadInput, UnknownName, Diverged; Interrupted (a KeyboardInterrupt) after Ctrl-C.
    """
    torch.manual_seed(seed)
    network, found, chosen = _prepare(model, data, recipe, overrides, seed)
    order = Order(len(found.splits["train"]), chosen.batch_size, seed)
    steps = chosen.total_steps(order.per_epoch)
    fabric = _fabric(network, precision)
    directory = Path(out) if out is not None else None
    config = {**runs.describe(network, found), "recipe": chosen.as_dict(), "seed": seed, "steps": steps}
    if directory is not None and fabric.is_global_zero:
        runs.claim_directory(directory, resume, overwrite)
        if resume and (directory / runs.WEIGHTS).exists():
            done = runs.load_run(directory)
            if done.config.get("steps") == steps:
                return done
        _same_run(directory, config)
        runs.write_json(directory / runs.CONFIG, config)
    fabric.barrier()
    trainer = Trainer(fabric, network, found, chosen, order, steps, seed, directory, config, workers, validations, checkpoint_seconds)
    trainer.setup(compile, snapshots)
    if resume:
        trainer.restore()
    trainer.train(_shown(progress, fabric))
    return trainer.finish(precision)


def _prepare(model: str | Model, data: Any, recipe: Any, overrides: Mapping[str, Any], seed: int) -> tuple[Model, Data, Recipe]:
    from formarium.catalogue import create, system_class
    from formarium.catalogue import resolve as resolve_name

    if isinstance(model, Model):
        card = model.card
        if card is None:
            raise BadInput("model", expected="one made by formarium.create", got=type(model).__name__)
        variant = card.variants.get(model.variant)
    else:
        card, variant = resolve_name(model)
        if card.kind != "model":
            raise BadInput(model, expected="a model", got=f"a {card.kind}")
    if isinstance(recipe, Recipe):
        chosen = make_recipe({**recipe.as_dict(), **overrides}, card.task)
    else:
        chosen = recipe_for(card, variant, **{**(recipe or {}), **overrides})
    found = as_data(data, card.task, seed=seed)
    if not isinstance(model, Model):
        fields = system_class(card).Config.__dataclass_fields__
        args = {k: v for k, v in found.model_args.items() if k in fields}
        if chosen.drop_path and "drop_path" in fields:
            args["drop_path"] = chosen.drop_path
        model = create(model, **args)
    for key, value in found.model_args.items():
        if getattr(model.config, key, value) != value:
            raise BadInput(model.variant, expected=f"{key} = {value}, as the data has", got=str(getattr(model.config, key)))
    model.names = [*found.names]
    return model, found, chosen


def _fabric(model: Model, precision: str) -> Fabric:
    world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    several = sum(len(s.turns) for s in model.training_stages()) > 1
    strategy: Any = DDPStrategy(find_unused_parameters=several) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "auto"
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    how: Any = PRECISIONS[resolve(precision, accelerator)]
    fabric = Fabric(accelerator=accelerator, devices=world, num_nodes=nodes, strategy=strategy, precision=how)
    fabric.launch()
    return fabric


def _same_run(directory: Path, config: Mapping[str, Any]) -> None:
    """A resumed run must be the run that was begun."""
    import json

    path = directory / runs.CONFIG
    if not path.exists():
        return
    old = json.loads(path.read_text(encoding="utf-8"))
    new = json.loads(json.dumps(config, default=runs._plain))
    for key in ("system", "variant", "config", "recipe", "seed", "names", "steps"):
        if old.get(key) != new.get(key):
            raise runs.RunExists(f"{directory} holds a run with another {key}; give the same arguments to resume it, or overwrite it")


def _shown(progress: bool | None, fabric: Fabric) -> bool:
    import sys

    return fabric.is_global_zero and (sys.stderr.isatty() if progress is None else progress)


@dataclass
class Trainer:
    """The state of a fit, and its loop."""

    fabric: Fabric
    network: Model
    data: Data
    recipe: Recipe
    order: Order
    steps: int
    seed: int
    directory: Path | None
    config: dict[str, Any]
    workers: int
    validations: int
    checkpoint_seconds: float
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0  # of training so far, over all attempts

    # setting up -------------------------------------------------------------------------------------------------------

    def setup(self, compile: bool, snapshots: int) -> None:
        self.task = task(self.network.task)
        self.stages = [*self.network.training_stages()]
        shares = sum(s.share for s in self.stages)
        ends = [round(self.steps * sum(s.share for s in self.stages[: i + 1]) / shares) for i in range(len(self.stages))]
        self.spans = [*zip([0, *ends[:-1]], ends, strict=True)]
        self.network.to(self.fabric.device)
        self.optimisers = [[optimiser(self.network, self.recipe, t.train, **t.recipe) for t in s.turns] for s in self.stages]
        every = [o for group in self.optimisers for o in group]
        wrapped = self.fabric.setup(self.network, *every)
        self.wrapped, *ready = wrapped if isinstance(wrapped, tuple) else (wrapped,)
        counted = iter(ready)
        self.optimisers = [[next(counted) for _ in group] for group in self.optimisers]
        for stage in self.stages:
            for turn in stage.turns:
                self.wrapped.mark_forward_method(turn.loss)
        if compile:
            self.network.forward = torch.compile(self.network.forward)
        self.averaged = Averaged(self.network, self.recipe.ema) if self.recipe.ema else None
        self.mix = self.task.augment_batch(self.recipe.augment, self.data.model_args)
        self.snapshot_steps = {round(i * self.steps / snapshots) for i in range(snapshots + 1)} if snapshots else set()
        self.validation_steps = {max(1, round(i * self.steps / self.validations)) for i in range(1, self.validations + 1)}
        self.pending: list[dict[str, float]] = []
        self.writer: Any = None

    # saving and going on ------------------------------------------------------------------------------------------------

    def save(self) -> None:
        if self.directory is None or not self.fabric.is_global_zero:
            return
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.network.state_dict(),
            "optimisers": [[o.state_dict() for o in group] for group in self.optimisers],
            "averaged": self.averaged.values if self.averaged else None,
            "random": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "pending": self.pending,
        }
        buffer = io.BytesIO()
        torch.save(state, buffer)
        runs.write_whole(self.directory / runs.STATE, buffer.getvalue())

    def restore(self) -> None:
        if self.directory is None or not (self.directory / runs.STATE).exists():
            return
        state = torch.load(self.directory / runs.STATE, map_location=self.fabric.device, weights_only=True)
        self.step, self.seconds, self.pending = state["step"], state["seconds"], state["pending"]
        self.network.load_state_dict(state["model"])
        for group, states in zip(self.optimisers, state["optimisers"], strict=True):
            for o, s in zip(group, states, strict=True):
                o.load_state_dict(s)
        if self.averaged:
            self.averaged.values = state["averaged"]
        torch.set_rng_state(state["random"].cpu())
        if state["cuda"]:
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
        self.history = [row for row in runs.read_metrics(self.directory / runs.METRICS) if row["step"] <= self.step]
        if self.fabric.is_global_zero:  # what was logged after the checkpoint is about to happen again
            import json

            text = "".join(json.dumps(row) + "\n" for row in self.history)
            runs.write_whole(self.directory / runs.METRICS, text.encode())

    # the loop -----------------------------------------------------------------------------------------------------------

    def train(self, shown: bool) -> None:
        with _bar(shown, self.config["variant"], self.steps, self.step) as tick, _interrupts() as stopped:
            self.keep_snapshot()
            saved = time.monotonic()
            for stage, optimisers, (first, last) in zip(self.stages, self.optimisers, self.spans, strict=True):
                if self.step >= last and last < self.steps:
                    continue
                if stage.prepare and self.step <= first:
                    getattr(self.network, stage.prepare)()
                for batch in self.batches(max(first, self.step), last):
                    start = time.perf_counter()
                    terms = self.one_step(stage, optimisers, batch, self.step - first, last - first)
                    self.step += 1
                    if self.averaged:
                        self.averaged.update(self.network, self.step)
                    self.seconds += time.perf_counter() - start
                    self.log(terms)
                    self.keep_snapshot()
                    tick(terms["loss"])
                    if time.monotonic() - saved >= self.checkpoint_seconds:
                        self.save()
                        saved = time.monotonic()
                    if stopped():
                        self.save()
                        where = f"--out {self.directory} --resume" if self.directory else "out= and resume=True"
                        raise Interrupted(f"stopped at step {self.step} of {self.steps}; the same command with {where} goes on from there")

    def batches(self, first: int, last: int) -> Iterator[dict[str, Any]]:
        transform = self.task.transform(self.network.preprocessing, self.recipe.augment)
        prepared = Prepared(self.data.splits["train"], transform, self.seed)
        loaded = training_batches(prepared, self.order, first, last, self.task.collate, self.workers)
        for i, batch in enumerate(loaded):
            if self.mix is not None:
                batch = self.mix(batch, torch.Generator().manual_seed(self.seed * 1_000_003 + first + i))
            yield share(batch, self.fabric.global_rank, self.fabric.world_size)

    def one_step(self, stage: Stage, optimisers: list[Any], batch: dict[str, Any], step: int, steps: int) -> dict[str, float]:
        """Every turn once (or as often as it repeats). Returns the loss terms, averaged over the parts of the batch."""
        self.network.train()
        batch = to_device(batch, self.fabric.device)
        said: dict[str, float] = {}
        for turn, optimiser_ in zip(stage.turns, optimisers, strict=True):
            peak = turn.recipe.get("lr", self.recipe.lr)
            rate = learning_rate(self.recipe, step, steps, self.order.per_epoch, peak)
            for group in optimiser_.param_groups:
                group["lr"] = rate
            for _ in range(turn.repeats):
                optimiser_.zero_grad()
                sums: dict[str, torch.Tensor] = {}
                for part, weight in parts(batch, self.recipe.accumulate):
                    losses = getattr(self.wrapped, turn.loss)(part)
                    self.fabric.backward(losses.total * weight)
                    for name, value in {"loss": losses.total, **losses.terms}.items():
                        sums[name] = sums.get(name, 0) + value.detach() * weight
                if self.recipe.clip_grad:
                    own = [p for group in optimiser_.param_groups for p in group["params"]]
                    clip(own, self.recipe.clip_grad, self.recipe.clip_mode)
                total = self.fabric.all_reduce(torch.stack([*sums.values()]).float(), reduce_op="mean")
                values = dict(zip(sums, total.tolist(), strict=True))  # type: ignore[union-attr]
                if values["loss"] - values["loss"] != 0:
                    raise Diverged(
                        f"{turn.loss} is {values['loss']} at step {self.step + 1}; the last good state is kept (a lower lr, a longer "
                        "warm-up or clip_grad usually help)"
                    )
                optimiser_.step()
            prefix = "" if len(stage.turns) == 1 else f"{turn.loss}."
            said |= {prefix + name: value for name, value in values.items()}
            said["lr"] = rate
        said.setdefault("loss", sum(v for k, v in said.items() if k.endswith(".loss")))
        return said

    # what is written meanwhile --------------------------------------------------------------------------------------------

    def log(self, terms: dict[str, float]) -> None:
        """A training row about 200 times a fit (the mean since the last one), a held-out row at the validation steps."""
        self.pending.append(terms)
        every = max(1, self.steps // 200)
        if self.step % every == 0 or self.step == self.steps:
            means = {k: sum(t[k] for t in self.pending if k in t) / len(self.pending) for k in terms}
            self.pending = []
            epoch = self.step / self.order.per_epoch
            self.row({"step": self.step, "epoch": round(epoch, 4), "split": "train", **means, "seconds": round(self.seconds, 3)})
        if self.step in self.validation_steps or self.step == self.steps:
            metrics = self.measure(1000 if self.step < self.steps else None)
            self.row({"step": self.step, "epoch": round(self.step / self.order.per_epoch, 4), "split": "val", **metrics})

    def row(self, row: dict[str, Any]) -> None:
        self.history.append(row)
        if self.directory is None or not self.fabric.is_global_zero:
            return
        import json

        with open(self.directory / runs.METRICS, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        if self.writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.directory), purge_step=self.step)
        for key, value in row.items():
            if isinstance(value, (int, float)) and key not in ("step", "seconds", "epoch"):
                self.writer.add_scalar(f"{row['split']}/{key}", value, row["step"])

    def measure(self, most: int | None, precision: str | None = None) -> dict[str, float]:
        """Held-out metrics of the model (the averaged one, where there is one), on at most so many samples."""
        dataset = self.data.splits["val"]
        if most is not None and len(dataset) > most:
            dataset = torch.utils.data.Subset(dataset, range(0, len(dataset), -(-len(dataset) // most)))  # type: ignore[arg-type]
        how = precision or ("bfloat16" if self.fabric._precision.precision == PRECISIONS["bfloat16"] else "float32")
        random = torch.get_rng_state()
        with self.averaged_weights():
            scored = self.task.score(*predict_all(self.network, dataset, precision=how))[0]
        torch.set_rng_state(random)
        return scored

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The averaged weights in the model's place, for a while."""
        if self.averaged is None:
            yield
            return
        own = {k: v.clone() for k, v in self.network.state_dict().items()}
        self.network.load_state_dict(self.averaged.values)
        try:
            yield
        finally:
            self.network.load_state_dict(own)

    def keep_snapshot(self) -> None:
        if self.step in self.snapshot_steps and self.directory is not None and self.fabric.is_global_zero:
            runs.write_weights(self.directory / "snapshots" / f"{self.step}.safetensors", self.network.state_dict())

    # the end --------------------------------------------------------------------------------------------------------------

    def finish(self, asked: str) -> Run:
        """Averaged weights become the model; precision is settled; the run directory is completed."""
        if self.averaged:
            self.network.load_state_dict(self.averaged.values)
            self.averaged = None
        self.config["precision"] = self.settle_precision(asked)
        self.network.precision = self.config["precision"]["predict"]
        last: dict[str, Any] = next((row for row in reversed(self.history) if row["split"] == "val"), {})
        self.config["summary"] = {k: v for k, v in last.items() if k not in ("step", "epoch", "split")}
        self.config["seconds"] = round(self.seconds, 2)
        self.network.eval()
        if self.writer is not None:
            self.writer.close()
        if self.directory is not None and self.fabric.is_global_zero:
            runs.write_json(self.directory / runs.CONFIG, self.config)
            runs.write_whole(self.directory / "README.md", runs.model_card(self.config).encode())
            runs.write_weights(self.directory / runs.WEIGHTS, self.network.state_dict())
            (self.directory / runs.STATE).unlink(missing_ok=True)
        self.fabric.barrier()
        return Run(self.network, self.directory, self.config, self.history)

    def settle_precision(self, asked: str) -> dict[str, Any]:
        """With "auto" in bfloat16: the held-out metric in both precisions, and float32 for prediction where bfloat16 costs too much."""
        trained = resolve(asked, self.fabric.device.type)
        said: dict[str, Any] = {"asked": asked, "train": trained, "predict": trained}
        if asked == "auto" and trained == "bfloat16":
            exact, half = (self.measure(512, p)[self.task.metric] for p in ("float32", "bfloat16"))
            harm = (exact - half) * (1 if self.task.higher_is_better else -1)
            said |= {"metric": self.task.metric, "float32": exact, "bfloat16": half, "samples": min(512, len(self.data.splits["val"]))}
            said["predict"] = "float32" if harm > HARM else "bfloat16"
        return said


@contextmanager
def _bar(shown: bool, what: str, steps: int, done: int) -> Iterator[Any]:
    if not shown:
        yield lambda loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        job = bar.add_task(what, total=steps, completed=done, loss=float("nan"))
        yield lambda loss: bar.update(job, advance=1, loss=loss)


@contextmanager
def _interrupts() -> Iterator[Any]:
    """Ctrl-C lets the step at hand finish; a second one doesn't wait."""
    asked = False

    def on_signal(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    try:
        before = signal.signal(signal.SIGINT, on_signal)
    except ValueError:  # not in the main thread: the signal isn't ours
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
