"""fit: train a model by a recipe, so that it can be interrupted anywhere and go on to the same result.

The loop is one for all: stages, each with its turns (an optimiser, a loss, the parameters it moves). Data order, augmentation and a
step's noise come from the seed and the step's number alone; the checkpoint holds everything else that a step depends on.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch.utils.data import Subset

from formarium.engine import precision as precisions
from formarium.engine import runs
from formarium.engine.evaluation import predict_all
from formarium.engine.journal import Journal
from formarium.engine.loader import NOISE, Batch, Order, Prepared, reseed, stream, to_device, training_batches
from formarium.engine.optim import Averaged
from formarium.engine.preparing import prepare
from formarium.engine.progress import Interrupted, bar, command_to_go_on, interrupts
from formarium.engine.recipes import Recipe
from formarium.engine.runs import Run
from formarium.engine.schedules import Plateau
from formarium.engine.stages import Diverged, Training, spans
from formarium.errors import BadInput
from formarium.model import Model, Stage
from formarium.task import Data, task

__all__ = ["Diverged", "Interrupted", "fit"]

LOGGED = 200  # training rows a fit leaves, at most
GLANCE = 1000  # held-out samples at most that a measurement on the way looks at; the last one takes all


def fit(
    model: str | Path | Model | Run,
    data: str | Path | Data,
    out: str | Path | None = None,
    *,
    recipe: Recipe | Mapping[str, Any] | str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    seed: int = 0,
    precision: str = "auto",
    compile: bool = False,
    snapshots: int = 0,
    validations: int = 8,
    checkpoint_seconds: float = 20.0,
    until: int | None = None,
    workers: int = 0,
    progress: bool | None = None,
    **overrides: Any,
) -> Run:
    """Train and return the run; with `out`, leave a run directory.

    model: a name (made for the data, with the recipe's drop_path), a model (trained in place), or a run or run directory (whose weights
    are the start, but for those that other data give another shape). data: a Data, a path, or "sample:NAME".
    recipe: a Recipe, its keys, or "published" or "demo"; by default the card's for that variant. Keywords override it (steps, epochs, lr,
    batch_size, ...). seed: of the weights, the order, the augmentation and the noise; how a folder is split doesn't depend on it.
    precision: "auto" (bfloat16 where native and harmless), "float32", "bfloat16". compile: torch.compile the network.
    snapshots: how many states to keep beside the first, for lenses. validations: how often the held-out metrics are measured; with a
    plateau schedule after every epoch.
    checkpoint_seconds: time between checkpoints. until: a step to stop after; the run is then whole as it stands (`stopped_at` in its
    config), and with `resume` goes on from there, to a later `until` or to its end, as if it had never stopped. workers: processes that
    read and augment. progress: False for no bar.
    Under torchrun the batch is split among the processes. `resume` goes on with the run that `out` holds, or begins it; the result is
    that of a run without interruption, bit for bit. `overwrite` replaces a run.
    Raises RunExists, BadInput, UnknownName; Diverged where the loss is no longer finite (the last checkpoint stays); Interrupted (a
    KeyboardInterrupt) after Ctrl-C, when the state is saved.
    """
    if seed < 0:
        raise BadInput("seed", expected="0 or more", got=str(seed))
    torch.manual_seed(seed)
    network, found, chosen = prepare(model, data, recipe, overrides)
    fabric = _fabric(network, precision)
    order = _order(found, chosen, seed, fabric.world_size)
    steps = chosen.total_steps(order.per_epoch)
    config = {**runs.describe(network, found), "recipe": chosen.as_dict(), "seed": seed, "steps": steps}
    journal = Journal(Path(out) if out is not None else None, fabric.is_global_zero)
    if journal.directory is not None:
        runs.claim(journal.directory, config, resume=resume, overwrite=overwrite)
        fabric.barrier()  # every process has looked before one of them writes
        if resume and journal.finished and runs.reached(journal.directory) >= min(until or steps, steps):
            return runs.load_run(journal.directory)
        journal.begin(config, overwrite and not resume)
        fabric.barrier()
    trainer = Trainer(fabric, network, found, chosen, order, steps, journal, config, workers, checkpoint_seconds)
    trainer.plan(snapshots, validations, until)
    shown = fabric.is_global_zero and progress is not False
    try:
        state = trainer.restore() if resume else None
        with _compiled(network, compile), bar(shown, network.variant, steps, trainer.step) as tick:
            trainer.train(state, tick)
        return trainer.finish(precision)
    finally:
        journal.close()


def _order(data: Data, recipe: Recipe, seed: int, world: int) -> Order:
    order = Order(len(data.splits["train"]), recipe.batch_size, seed, recipe.repeated_augmentation)
    if order.size % world:
        raise BadInput("batch_size", expected=f"a multiple of the {world} processes", got=str(order.size))
    return order


def _fabric(model: Model, precision: str) -> Fabric:
    """Lightning Fabric for one process, or for those that torchrun started."""
    accelerator = "cuda" if torch.cuda.is_available() else "cpu"
    strategy: Any = "auto"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        stages = model.training_stages()
        simple = len(stages) == 1 and [t.train for t in stages[0].turns] == [("*",)] and not (model.card and model.card.no_gradient)
        strategy = DDPStrategy(find_unused_parameters=not simple)
    kind: Any = precisions.FABRIC[precisions.resolve(precision, accelerator)]
    fabric = Fabric(
        accelerator=accelerator,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", "1")),
        strategy=strategy,
        precision=kind,
    )
    fabric.launch()
    return fabric


@contextmanager
def _compiled(network: Model, wanted: bool) -> Iterator[None]:
    """Its forward compiled, for a while."""
    if not wanted:
        yield
        return
    network.forward = torch.compile(network.forward)
    try:
        yield
    finally:
        del network.forward


# the loop -----------------------------------------------------------------------------------------------------------


class Trainer:
    """The state of a fit, and its loop."""

    def __init__(
        self, fabric: Fabric, network: Model, data: Data, recipe: Recipe, order: Order, steps: int, journal: Journal,
        config: dict[str, Any], workers: int, checkpoint_seconds: float,
    ):  # fmt: skip
        self.fabric, self.network, self.data, self.recipe, self.order, self.steps = fabric, network, data, recipe, order, steps
        self.journal, self.config, self.workers, self.checkpoint_seconds = journal, config, workers, checkpoint_seconds
        self.task = task(network.task)
        self.network.to(fabric.device)
        self.averaged = Averaged(network, recipe.ema) if recipe.ema else None
        self.plateau = Plateau(recipe, self.task.higher_is_better)
        self.step = 0  # done
        self.seconds = 0.0  # of training, over all attempts
        self.unlogged: list[dict[str, float]] = []

    def plan(self, snapshots: int, validations: int, until: int | None = None) -> None:
        if until is not None and until < 1:
            raise BadInput("until", expected="a step, 1 or more", got=str(until))
        self.until = min(until or self.steps, self.steps)
        self.stages = [*self.network.training_stages()]
        self.spans = spans(self.stages, self.steps)
        self.snapshot_steps = {round(i * self.steps / snapshots) for i in range(snapshots + 1)} if snapshots else set()
        self.validation_steps = {max(1, round(i * self.steps / validations)) for i in range(1, validations + 1)}
        if self.recipe.schedule == "plateau":
            self.validation_steps = {*range(self.order.per_epoch, self.steps, self.order.per_epoch)}
        self.validation_steps |= {self.until, self.steps}

    def train(self, state: Mapping[str, Any] | None, tick: Any) -> None:
        """All stages, from the step that the restored state is at."""
        if self.step == 0:
            self.keep_snapshot()
        with interrupts() as stopped:
            for number, (stage, span) in enumerate(zip(self.stages, self.spans, strict=True)):
                if self.step < min(span.stop, self.until):
                    self.train_stage(stage, span, state if state and state["stage"] == number else None, number, tick, stopped)

    def train_stage(self, stage: Stage, span: range, state: Any, number: int, tick: Any, stopped: Any) -> None:
        if self.step == span.start:
            self.prepare(stage, span)
        with closing(Training(self.fabric, self.network, stage, self.recipe, span, self.order.per_epoch)) as training:
            if state is not None:
                training.load(state["optimisers"])
            saved = time.monotonic()
            for batch in self.batches(range(self.step, span.stop)):
                start = time.perf_counter()
                terms = self.one_step(training, batch)
                self.seconds += time.perf_counter() - start
                self.log(terms)
                self.keep_snapshot()
                tick(terms["loss"])
                if self.step == self.until < self.steps:
                    self.save(number, training)
                    return
                stopping = self.any_process(stopped())
                if stopping or time.monotonic() - saved >= self.checkpoint_seconds:
                    self.save(number, training)
                    saved = time.monotonic()
                if stopping and self.step < self.steps:
                    raise Interrupted(f"stopped at step {self.step} of {self.steps}; {command_to_go_on(self.journal.directory)}")

    def prepare(self, stage: Stage, span: range) -> None:
        """What a stage asks for before its first step."""
        if stage.prepare:
            reseed(stream(self.order.seed, NOISE, span.start), self.fabric.device)
            getattr(self.network, stage.prepare)()
            self.network.to(self.fabric.device)

    def batches(self, steps: range) -> Iterator[Batch]:
        """This process's share of each step's batch."""
        epochs = self.steps / self.order.per_epoch
        transform = self.task.training_transform(self.network.preprocessing, self.recipe.augment, self.data, epochs)
        prepared = Prepared(self.data.splits["train"], transform, self.order.seed)
        mix = self.task.augment_batch(self.recipe.augment, self.data.model_args)
        rank, world = self.fabric.global_rank, self.fabric.world_size
        return training_batches(prepared, self.order, steps, self.task.collate, mix, rank=rank, world=world, workers=self.workers)

    def one_step(self, training: Training, batch: Batch) -> dict[str, float]:
        self.network.train()
        reseed(stream(self.order.seed, NOISE, self.step, self.fabric.global_rank), self.fabric.device)
        try:
            terms = training.step(to_device(batch, self.fabric.device), self.step, self.plateau.scale)
        except Diverged as e:
            raise Diverged(f"{e}; {self.journal.last_checkpoint}") from None
        self.step += 1
        self.network.after_step(self.step, self.steps)
        if self.averaged:
            self.averaged.update(self.network, self.step)
        return terms

    def any_process(self, wants: bool) -> bool:
        """Whether any process wants to stop, so that all stop at the same step."""
        if self.fabric.world_size == 1:
            return wants
        votes: Any = self.fabric.all_reduce(torch.tensor(float(wants), device=self.fabric.device), reduce_op="sum")
        return bool(votes > 0)

    # what is written meanwhile ----------------------------------------------------------------------------------------

    def log(self, terms: dict[str, float]) -> None:
        """Now and then a training row (the mean since the last one), and at the validation steps a held-out row."""
        self.unlogged.append(terms)
        where = {"step": self.step, "epoch": round(self.step / self.order.per_epoch, 4)}
        if self.step % max(1, self.steps // LOGGED) == 0 or self.step == self.steps:
            means = {k: sum(t.get(k, 0.0) for t in self.unlogged) / len(self.unlogged) for k in terms}
            self.unlogged = []
            self.journal.row({**where, "split": "train", **means, "seconds": round(self.seconds, 3)})
        if self.step in self.validation_steps:
            plateau = self.recipe.schedule == "plateau"
            metrics = self.measure(None if plateau or self.step == self.until else GLANCE)
            self.journal.row({**where, "split": "val", **metrics})
            if plateau and self.step % self.order.per_epoch == 0 and self.task.metric in metrics:
                self.plateau.see(metrics[self.task.metric], self.step // self.order.per_epoch)

    def keep_snapshot(self) -> None:
        if self.step in self.snapshot_steps:
            self.journal.snapshot(self.step, self.averaged.values if self.averaged else self.network.state_dict())

    def measure(self, most: int | None, precision: str | None = None) -> dict[str, float]:
        """Held-out metrics of the model (the averaged one, where there is one) on at most so many samples; the first process's, for all."""
        metrics: dict[str, float] = {}
        if self.fabric.is_global_zero:
            dataset: Any = self.data.splits["val"]
            if most is not None and len(dataset) > most:
                dataset = Subset(dataset, range(0, len(dataset), -(-len(dataset) // most)))
            how = precision or ("float32" if self.fabric._precision.precision == "32-true" else "bfloat16")
            with self.averaged_weights():
                metrics = self.task.score(*predict_all(self.network, dataset, precision=how, workers=self.workers))[0]
        return self.fabric.broadcast(metrics)

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

    # saving and going on ----------------------------------------------------------------------------------------------

    def save(self, stage: int, training: Training) -> None:
        self.journal.checkpoint(
            {
                "step": self.step,
                "stage": stage,
                "seconds": self.seconds,
                "unlogged": self.unlogged,
                "model": self.network.state_dict(),
                "averaged": self.averaged.values if self.averaged else None,
                "plateau": self.plateau.state(),
                "optimisers": training.state(),
            }
        )

    def restore(self) -> dict[str, Any] | None:
        """Take up the last checkpoint. What earlier stages prepared is prepared again, as not all of it need be in the weights."""
        state = self.journal.restore(self.fabric.device)
        if state is None:
            return None
        for stage, span in zip(self.stages, self.spans, strict=True):
            if span.start < state["step"]:
                self.prepare(stage, span)
        self.network.load_state_dict(state["model"])
        if self.averaged:
            self.averaged.values = state["averaged"]
        self.plateau.load(state["plateau"])
        self.step, self.seconds, self.unlogged = state["step"], state["seconds"], state["unlogged"]
        return state

    # the end ----------------------------------------------------------------------------------------------------------

    def finish(self, asked: str) -> Run:
        """The averaged weights become the model, the precision for prediction is settled, the run directory completed."""
        if self.averaged:
            self.network.load_state_dict(self.averaged.values)
            self.averaged = None
        self.config["precision"] = self.settle_precision(asked)
        self.network.precision = self.config["precision"]["predict"]
        last = next((row for row in reversed(self.journal.rows) if row["split"] == "val"), {})
        self.config["summary"] = {k: v for k, v in last.items() if k not in ("step", "epoch", "split")}
        self.config["seconds"] = round(self.seconds, 2)
        self.config["config"] = self.network.config_dict()  # a method may have changed its network's sizes
        if self.step < self.steps:
            self.config["stopped_at"] = self.step
        self.network.eval()
        self.journal.finish(self.config, self.network.state_dict())
        self.fabric.barrier()
        return Run(self.network, self.journal.directory, self.config, self.journal.rows, self.journal.kept)

    def settle_precision(self, asked: str) -> dict[str, Any]:
        """With "auto" in bfloat16: the held-out metric in both precisions, and float32 for prediction where bfloat16 costs too much."""
        trained = precisions.resolve(asked, self.fabric.device.type)
        said: dict[str, Any] = {"asked": asked, "train": trained, "predict": trained}
        if asked != "auto" or trained != "bfloat16":
            return said
        exact, half = (self.measure(precisions.CHECKED, p).get(self.task.metric) for p in ("float32", "bfloat16"))
        if exact is None or half is None:  # pre-training on data without labels has no such metric
            return said
        harm = (exact - half) * (1 if self.task.higher_is_better else -1)
        samples = min(precisions.CHECKED, len(self.data.splits["val"]))
        said |= {"metric": self.task.metric, "float32": exact, "bfloat16": half, "samples": samples}
        return {**said, "predict": "float32" if harm > precisions.HARM else "bfloat16"}
