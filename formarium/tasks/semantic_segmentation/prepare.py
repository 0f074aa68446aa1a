"""From a raw sample to what a batch holds: resizing, random scale, crop, flip and colour, padding to the batch's largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from formarium.task import Sample
from formarium.tasks.image_classification.augment import jitter
from formarium.tasks.image_classification.data import array_to_rgb
from formarium.tasks.semantic_segmentation.model import IGNORE


class Prepare:
    """preprocessing: size, the shorter side that a picture is resized to where `resize` is true (else it keeps its own).
    recipe (training): scale, (low, high) of a random factor; crop, the side of a random square (512), padded where the picture is smaller;
    hflip, its probability; color_jitter, its strength."""

    def __init__(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None):
        self.preprocessing, self.recipe = preprocessing, recipe

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = Image.fromarray(array_to_rgb(sample["image"]))
        label = sample.get("label")
        factor = 1.0
        if self.preprocessing.get("resize"):
            side = self.preprocessing["size"]
            factor = (side if isinstance(side, int) else min(side)) / min(image.size)
        r = self.recipe or {}
        if r.get("scale"):
            low, high = r["scale"]
            factor *= float(np.exp(rng.uniform(np.log(low), np.log(high))))
        if factor != 1:
            size = tuple(max(1, round(s * factor)) for s in image.size)
            image = image.resize(size, Image.Resampling.BILINEAR)
            if label is not None:
                label = np.asarray(Image.fromarray(label.astype(np.int32)).resize(size, Image.Resampling.NEAREST)).astype(np.int64)
        if r.get("color_jitter"):
            image = jitter(image, float(r["color_jitter"]), rng)
        values = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 255
        if r.get("crop"):
            values, label = _cropped(values, label, int(r["crop"]), rng)
        if r.get("hflip") and rng.random() < r["hflip"]:
            values = values[:, :, ::-1]
            label = None if label is None else label[:, ::-1]
        out: Sample = {"id": sample["id"], "image": torch.from_numpy(np.ascontiguousarray(values))}
        if label is not None:
            out["label"] = torch.from_numpy(np.ascontiguousarray(label).astype(np.int64))
        return out


def _cropped(values: np.ndarray, label: np.ndarray | None, side: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray | None]:
    h, w = values.shape[1:]
    if h < side or w < side:
        more = (max(0, side - h), max(0, side - w))
        values = np.pad(values, ((0, 0), (0, more[0]), (0, more[1])))
        label = None if label is None else np.pad(label, ((0, more[0]), (0, more[1])), constant_values=IGNORE)
        h, w = values.shape[1:]
    y, x = (int(rng.integers(0, s - side + 1)) for s in (h, w))
    return values[:, y : y + side, x : x + side], None if label is None else label[y : y + side, x : x + side]


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """See model.py for what a batch holds."""
    sizes = torch.tensor([[*s["image"].shape[1:]] for s in samples])
    h, w = (int(v) for v in sizes.amax(0))
    image = torch.zeros(len(samples), 3, h, w)
    batch: dict[str, Any] = {"image": image, "size": sizes, "id": [s["id"] for s in samples]}
    for i, s in enumerate(samples):
        image[i, :, : sizes[i, 0], : sizes[i, 1]] = s["image"]
    if all("label" in s for s in samples):
        label = torch.full((len(samples), h, w), IGNORE)
        for i, s in enumerate(samples):
            label[i, : sizes[i, 0], : sizes[i, 1]] = s["label"]
        batch["label"] = label
        batch["main_class"] = torch.stack([_most(x) for x in label])
    return batch


def _most(label: torch.Tensor) -> torch.Tensor:
    known = label[label != IGNORE]
    return known.bincount().argmax() if known.numel() else torch.zeros((), dtype=torch.int64)
