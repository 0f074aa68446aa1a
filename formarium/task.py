"""Task: the contract that rivals share: batches, predictions, metrics, file readers, sample data, drawing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Protocol

from formarium.errors import BadInput, UnknownName

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


class Task:
    """What one package in `tasks/` offers, as an object called `task`. Subclasses set the attributes and write `transform`. The other
    methods
    are, unless a subclass says otherwise, the functions of the same name in the package's modules: `data`, `sample`, `metrics`, `draw`."""

    name: str
    metric: str  # the headline metric's key, e.g. "accuracy"
    higher_is_better: bool = True
    batch_size: int = 64  # of the fits of a comparison
    samples: Sequence[str]  # names of the sample data it ships or generates
    recipe_keys: Sequence[str] = ()  # recipe keys that `transform` and `augment_batch` understand, beyond the core ones
    published_defaults: Mapping[str, Any] = MappingProxyType({})  # of these keys, what published recipes take for granted
    demo_defaults: Mapping[str, Any] = MappingProxyType({})  # the same for demo recipes
    scored: Sequence[str] | None = None  # the keys of a batch that `score` reads, where others are too large to keep (None: all)
    class_key: str = "label"  # the key of a batch whose value sorts samples into classes, for lenses that ask what features know of them
    example_names: Sequence[str] = ()  # names to show a prediction with where there is no data set

    def part(self, module: str) -> Any:
        """A module of the task's package, imported when it is first asked for."""
        return import_module(f"{type(self).__module__}.{module}")

    # data in ----------------------------------------------------------------------------------------------------------

    def read(self, path: str | Path, **options: Any) -> Data:
        """The data in a folder or file of the formats people have. BadInput where it can't be used."""
        return self.part("data").read(path, **options)

    def sample(self, name: str, seed: int = 0) -> Data:
        """Sample data by name; UnknownName for others."""
        return self.part("sample").sample(name, seed)

    def inputs(self, paths: Sequence[str | Path]) -> Dataset:
        """Unlabelled samples of files or folders (or of texts, where a person types them), for predict."""
        return self.part("data").inputs(paths)

    def from_memory(self, value: Any, index: int) -> Sample:
        """A raw sample of what a person has in memory (array, tensor, string ...). BadInput for what it can't be."""
        if isinstance(value, Mapping):
            return {"id": f"input {index}", **value}
        raise BadInput(f"input {index}", expected="a path, or a sample as a dict", got=type(value).__name__)

    def is_single(self, value: Any) -> bool:
        """Whether what a person has in memory is one sample, rather than several."""
        return isinstance(value, Mapping)

    def transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None) -> Transform:
        """Raw sample to what the model's batch holds; with a recipe, augmented as it says (training)."""
        raise NotImplementedError

    def training_transform(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any], data: Data, epochs: float) -> Transform:
        """`transform` with a recipe, for a training of so many epochs on this data. One that changes with the epoch has `at(epoch)`, from 0
        on, which gives what is in its place then."""
        return self.transform(preprocessing, recipe)

    def augment_batch(self, recipe: Mapping[str, Any], model_args: Mapping[str, Any]) -> BatchTransform | None:
        """What mixes samples of a batch (mixup, cutmix, label smoothing), or None where the recipe asks for none."""
        return None

    def collate(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch, as the task's model contract documents it; ids as a list of strings under "id"."""
        return self.part("data").collate(samples)

    # predictions out --------------------------------------------------------------------------------------------------

    def score(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
        """(metrics by name, one array a metric of per-sample scores where the metric is a mean over samples, for bootstrapping)."""
        return self.part("metrics").score(predictions, batches)

    def rows(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
        """A prediction as plain data, one dict a sample, for JSON and tables."""
        return self.part("metrics").rows(prediction, batch, names)

    def write(self, prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
        """The prediction as files in the field's own formats, one or more a sample; the paths written. By default one JSON a sample."""
        paths = []
        for i, row in enumerate(self.rows(prediction, batch, names)):
            paths.append(folder / f"{file_stem(row.get('id', i))}.json")
            paths[-1].write_text(json.dumps(row, indent=2), encoding="utf-8")
        return paths

    def baseline(self, data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
        """What the trivial rival is called, and its metrics on the held-out split."""
        return self.part("metrics").baseline(data, seed)

    def details(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
        """More for a report: matplotlib figures by caption."""
        return {}

    def examples(self, predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[Any, Mapping[str, Any]]:
        """Of all that was predicted, the prediction and the batch that a report draws; by default the first batch."""
        return predictions[0], batches[0]

    def draw(self, prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> Image:
        """A picture of the prediction over its input, a person's view of up to 16 samples."""
        return self.part("draw").draw(prediction, batch, names)


def file_stem(name: Any) -> str:
    """A sample's name as the stem of a file: its path's parts joined, without an ending, nothing that a file system minds."""
    parts = Path(str(name)).with_suffix("").parts
    return re.sub(r"[^\w.-]+", "-", "_".join(p for p in parts if p not in ("/", "..", "."))).strip("-") or "sample"


TASKS = {
    "image-classification": "formarium.tasks.image_classification",
    "image-restoration": "formarium.tasks.image_restoration",
    "medical-segmentation": "formarium.tasks.medical_segmentation",
    "object-detection": "formarium.tasks.object_detection",
    "lidar-detection": "formarium.tasks.lidar_detection",
    "point-cloud-registration": "formarium.tasks.point_cloud_registration",
    "human-pose": "formarium.tasks.human_pose",
    "video-generation": "formarium.tasks.video_generation",
    "motion-generation": "formarium.tasks.motion_generation",
    "tabular-classification": "formarium.tasks.tabular_classification",
    "graph-prediction": "formarium.tasks.graph_prediction",
    "molecule-generation": "formarium.tasks.molecule_generation",
    "time-series-classification": "formarium.tasks.time_series_classification",
    "speech-recognition": "formarium.tasks.speech_recognition",
    "speech-separation": "formarium.tasks.speech_separation",
    "formula-recognition": "formarium.tasks.formula_recognition",
    "operator-learning": "formarium.tasks.operator_learning",
    "deepfake-detection": "formarium.tasks.deepfake_detection",
    "object-localisation": "formarium.tasks.object_localisation",
    "slide-classification": "formarium.tasks.slide_classification",
    "medical-classification": "formarium.tasks.medical_classification",
    "semantic-segmentation": "formarium.tasks.semantic_segmentation",
}


def task(name: str) -> Task:
    """The task of that name; imports its module."""
    if name not in TASKS:
        raise UnknownName("task", name, TASKS)
    return import_module(TASKS[name]).task
