"""Task: the contract that rivals share: batches, predictions, metrics, file readers, sample data, drawing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from formarium.errors import UnknownName

if TYPE_CHECKING:
    from PIL.Image import Image


class Dataset(Protocol):
    """Samples by index. A sample is a dict of tensors (and ids); `collate` makes batches of them.

    `set_epoch` seeds the epoch's augmentation: sample i of epoch e is the same in every run and on every worker."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def set_epoch(self, epoch: int) -> None: ...


@dataclass
class Data:
    """Splits of one data set, and what a model must know to fit them (`model_args`, e.g. {"num_classes": 10})."""

    name: str
    splits: dict[str, Dataset]  # "train", "val", and "test" where there is one
    model_args: dict[str, Any] = field(default_factory=dict)
    names: Sequence[str] = ()  # class names, where the task has classes
    notes: list[str] = field(default_factory=list)  # what the reader saw: corrupt files, skipped folders
    source: dict[str, Any] = field(default_factory=dict)  # how to read it again: {"path": ...} or {"sample": ...}


class Task(Protocol):
    """One module in `tasks/` offers an object of this shape, called `task`."""

    name: str
    metric: str  # the headline metric's key, e.g. "accuracy"
    higher_is_better: bool
    samples: Sequence[str]  # names of the sample data it ships or generates

    def read(self, path: str | Path, **options: Any) -> Data: ...
    def sample(self, name: str, **options: Any) -> Data: ...
    def collate(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]: ...
    def evaluate(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> dict[str, float]: ...
    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image: ...
    def augment(self, recipe: Mapping[str, Any]) -> Callable[[dict[str, Any], Any], dict[str, Any]] | None: ...


TASKS = {
    "image-classification": "formarium.tasks.image_classification",
}


def task(name: str) -> Task:
    """The task of that name; imports its module."""
    if name not in TASKS:
        raise UnknownName("task", name, TASKS)
    return import_module(TASKS[name]).task
