"""Model: a network with its objective and its way of predicting. Writers of models think single-device; the engine distributes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from formarium.cards import Card
from formarium.errors import BadInput

Batch = Mapping[str, Any]  # tensors by name; each task documents shapes, dtypes and ranges


@dataclass
class Losses:
    """Named terms as in the paper, and their weighted total (a scalar that backward() starts from)."""

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Turn:
    """One optimiser's share of a step: which of the model's methods gives the loss, which parameters it moves."""

    loss: str = "loss"  # a method of the model: batch -> Losses
    train: tuple[str, ...] = ("*",)  # globs over parameter names
    repeats: int = 1  # how often per step (a critic's five, say)
    recipe: Mapping[str, Any] = field(default_factory=dict)  # what differs from the fit's recipe (lr, betas, ...)


@dataclass(frozen=True)
class Stage:
    """A part of training with its own turns. A plain model has one stage of one turn; a GAN one stage of two turns; a
    codebook-then-prior model two stages. `prepare`, where given, names a method that is called once, before the stage."""

    name: str = "train"
    turns: tuple[Turn, ...] = (Turn(),)
    share: float = 1.0  # of the fit's steps, relative to the other stages
    prepare: str = ""


class Model(nn.Module):
    """The contract of every model: a frozen Config and three verbs.

    `forward` tensors in, a tensor or NamedTuple of tensors out, free of Python side effects, so that torch.compile, torch.export
        and ONNX take it as it is;
    `loss(batch) -> Losses` what it learns from;
    `predict(batch) -> Prediction` what a person gets.

    Subclasses set `task`, define `Config`, and call `super().__init__(config)` first.
    """

    task: ClassVar[str]
    # per input of `forward`, the axis whose size the network fixes (None: none), for the conformance suite's wrong inputs
    channel_axes: ClassVar[tuple[int | None, ...]] = (1,)
    # whether an exported graph can leave height and width open: True for any, a number for multiples of it
    dynamic_size: bool | int = False

    @dataclass(frozen=True)
    class Config:
        pass

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.card: Card | None = None
        self.variant: str = ""
        self.names: list[str] = []  # of the classes it was fitted to, where its task has classes
        self.changes: list[dict[str, Any]] = []  # by methods that changed it in place: {"method": slug, "options": {...}}, in order
        self.precision: str = ""  # what its fit found harmless to predict in, where it was fitted here

    # what a model may say of itself -------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Losses:
        raise NotImplementedError(f"{type(self).__name__}.loss")

    def predict(self, batch: Batch) -> Any:
        raise NotImplementedError(f"{type(self).__name__}.predict")

    def training_stages(self) -> Sequence[Stage]:
        """How it trains; by default one stage that moves every parameter by `loss`."""
        return (Stage(),)

    def study(self, data: Any) -> None:
        """What is found out from the training data before the weights are trained: shapelets, statistics, class priors. `fit` calls it
        once,
        with the task's Data; what it finds goes into buffers, and what decides shapes into `self.config` (by `reconfigure`), so that the
        saved
        model is whole. It must find the same from the same data."""

    def after_step(self, step: int, steps: int) -> None:
        """Called after each optimiser step, the `step`-th (from 1) of `steps`: for averaged teachers, schedules, codebooks that are
        revived."""

    def no_weight_decay(self) -> set[str]:
        """Globs of parameters that weight decay leaves alone, beyond the vectors and biases it never touches."""
        return set()

    def example(self, batch: int = 1, **size: Any) -> tuple[Tensor, ...]:
        """Random inputs that `forward` takes: for export, benchmarks and tests."""
        raise NotImplementedError(f"{type(self).__name__}.example")

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        """Inputs of other sizes than its own, by a word for each: a forward works on them or refuses them with BadInput."""
        return {}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        """A random batch of the task, labels included, that `loss` and `predict` take."""
        raise NotImplementedError(f"{type(self).__name__}.example_batch")

    def check_input(self, *args: Any) -> None:
        """Raise BadInput where `forward`'s arguments can't be right. Called before each eager forward."""

    # what every model gets ----------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():  # torch.compile and torch.export see the bare network
            self.check_input(*args, *kwargs.values())
        return super().__call__(*args, **kwargs)

    def adopt(self, card: Card, variant: str, preprocessing: Mapping[str, Any]) -> None:
        """Remember which card and variant this model is; tasks' base classes take their preprocessing from here."""
        self.card, self.variant, self.preprocessing = card, variant, dict(preprocessing)

    def reconfigure(self, **changes: Any) -> None:
        """Change the Config to what `study` found, e.g. how many shapelets there are; the caller rebuilds what depends on it."""
        self.config = replace(self.config, **changes)

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def parameters_count(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def config_dict(self) -> dict[str, Any]:
        return asdict(self.config)

    def load_authors(self, path: str | Path, skip: Sequence[str] = ()) -> Model:
        """Load the checkpoint that the paper's authors released, under their names for things; returns self.

        path: .safetensors, or a torch file read with weights_only=True (a pickle that would run code is refused).
        skip: globs over our parameter names to leave as initialised, e.g. ("head.*",) for another number of classes.
        Raises BadCheckpoint, naming the keys or shapes that don't fit.
        """
        from formarium.authors import load_authors

        load_authors(self, path, skip=skip)
        return self


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards as it was."""
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, was in training.items():
            module.training = was


def check_tensor(
    name: str, x: Any, shape: str, *, sizes: Mapping[int, int] | None = None, dtype: Callable[[torch.dtype], bool] | None = None
) -> None:
    """Raise BadInput unless x is a finite, non-empty tensor of the rank that `shape` spells ("batch 3 height width").

    sizes: dimension -> the size it must have. dtype: a predicate, by default any floating point.
    """
    words = shape.split()
    wanted = f"a float tensor [{', '.join(words)}]" if dtype is None else f"a tensor [{', '.join(words)}]"
    if not isinstance(x, Tensor):
        raise BadInput(name, expected=wanted, got=type(x).__name__)
    got = f"{str(x.dtype).removeprefix('torch.')} {[*x.shape]}"
    if x.ndim != len(words):
        raise BadInput(name, expected=wanted, got=got, fix="add a batch dimension" if x.ndim == len(words) - 1 else "")
    for dim, size in (sizes or {}).items():
        if x.shape[dim] != size:
            raise BadInput(name, expected=f"{wanted} with {words[dim]} = {size}", got=got)
    if not (dtype or (lambda d: d.is_floating_point))(x.dtype):
        raise BadInput(name, expected=wanted, got=got, fix="convert it with .float()" if dtype is None else "")
    if x.numel() == 0:
        raise BadInput(name, expected=f"{wanted}, not empty", got=got)
    if x.device.type != "cpu" or not x.is_floating_point() or math.isfinite(x.detach().sum()):  # on a GPU the look would stall it
        return  # a sum of finite values may overflow, one of others is never finite
    if bad := int((~torch.isfinite(x)).sum()):
        raise BadInput(name, expected="finite values", got=f"{bad} NaN or infinite of {x.numel()}")
