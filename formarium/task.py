"""Task: the contract that rivals share: batches, predictions, metrics, file readers, sample data, drawing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from formarium.errors import UnknownName

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image


Sample = dict[str, Any]
Transform = Callable[[Sample, "np.random.Generator"], Sample]
BatchTransform = Callable[[dict[str, Any], "torch.Generator"], dict[str, Any]]


class Dataset(Protocol):
    """Raw samples by index: a dict of arrays (an image is uint8 or uint16 [height, width, channels]), a label where there is one, and `id`,
    a string that names the sample to a person (its path, or its place in the sample data)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


@dataclass
class Data:
    """Splits of one data set, and what a model must know to fit them (`model_args`, e.g. {"num_classes": 10})."""

    name: str
    task: str
    splits: dict[str, Dataset]  # "train" and "val", and "test" where there is one
    model_args: dict[str, Any] = field(default_factory=dict)
    names: Sequence[str] = ()  # class names, where the task has classes
    notes: list[str] = field(default_factory=list)  # what the reader saw: corrupt files by name, skipped folders
    source: dict[str, Any] = field(default_factory=dict)  # how to read it again: {"path": ...} or {"sample": ...}


class Task(Protocol):
    """What one module in `tasks/` offers, as an object called `task`."""

    name: str
    metric: str  # the headline metric's key, e.g. "accuracy"
    higher_is_better: bool
    samples: Sequence[str]  # names of the sample data it ships or generates
    recipe_keys: Sequence[str]  # recipe keys that `transform` and `augment_batch` understand
    published_defaults: Mapping[str, Any]  # of these keys, what published recipes take for granted
    demo_defaults: Mapping[str, Any]  # the same for demo recipes

    def read(self, path: str | Path, **options: Any) -> Data:
        """The data in a folder or file of the formats people have. BadInput where it can't be used."""

    def sample(self, name: str, seed: int = 0) -> Data:
        """Sample data by name; UnknownName for others."""

    def inputs(self, paths: Sequence[str | Path]) -> Dataset:
        """Unlabelled samples of files or folders, for predict."""

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        """Raw sample to what the model's batch holds; with a recipe, augmented as it says (training)."""

    def augment_batch(self, recipe: Mapping[str, Any], model_args: Mapping[str, Any]) -> BatchTransform | None:
        """What mixes samples of a batch (mixup, cutmix, label smoothing), or None where the recipe asks for none."""

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch, as the task's model contract documents it; ids as a list of strings under "id"."""

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        """(metrics by name, one array a metric of per-sample scores where the metric is a mean over samples, for bootstrapping)."""

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        """A prediction as plain data, one dict a sample, for JSON and tables."""

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        """What the trivial rival is called, and its metrics on the held-out split."""

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """More for a report: matplotlib figures by caption."""

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        """A picture of the prediction over its input, a person's view of up to 16 samples."""


TASKS = {
    "image-classification": "formarium.tasks.image_classification",
}


def task(name: str) -> Task:
    """The task of that name; imports its module."""
    if name not in TASKS:
        raise UnknownName("task", name, TASKS)
    return import_module(TASKS[name]).task
