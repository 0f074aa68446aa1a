"""From raw images and volumes to what a batch holds, augmented for training.

Raw samples hold `image`, uint8 [height, width, 3], or `volume`, [height, width, depth] of any type. Preprocessing keys: size, crop,
interpolation of images (as image classification has them; for volumes, size is height and width), depth (slices of a volume).
Recipe keys: crop_scale, crop_ratio, hflip, shift for both ranks; randaugment, color_jitter, random_erasing for images; intensity_scale and
intensity_shift (values times 1 +- a, plus +- b) for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from formarium.task import Sample
from formarium.tasks.image_classification.augment import Prepare as PrepareImage
from formarium.tasks.image_classification.augment import random_box


@dataclass
class Prepare:
    """sample["image"]: float32 in [0, 1], [3, height, width] or [1, height, width, depth]; sample["rank"]: 2 or 3."""

    preprocessing: Mapping[str, Any]
    recipe: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.images = PrepareImage(self.preprocessing, self.recipe)
        self.depth = int(self.preprocessing.get("depth", self.images.size[0] // 2))

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if "volume" not in sample:
            out = self.images(sample, rng)
            return {**out, "image": self._intensity(out["image"], rng), "rank": 2}
        rest = {k: v for k, v in sample.items() if k != "volume"}
        return {**rest, "image": self._intensity(self._volume(sample["volume"], rng), rng), "rank": 3}

    def _volume(self, raw: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One channel at evaluation or training size; a random crop is of height and width, all slices alike."""
        r, size = self.recipe or {}, (*self.images.size, self.depth)
        values = unit(raw)
        if r.get("crop_scale"):
            left, top, right, bottom = map(round, random_box(*values.shape[:2], r["crop_scale"], r.get("crop_ratio", (3 / 4, 4 / 3)), rng))
            values = values[top : max(bottom, top + 1), left : max(right, left + 1)]
        values = resize(values, size)
        if reach := int(r.get("shift") or 0):
            dy, dx = rng.integers(-reach, reach + 1, size=2)
            rows, columns = (np.arange(n) + d for n, d in ((size[0], dy), (size[1], dx)))
            values = values[rows.clip(0, size[0] - 1)[:, None], columns.clip(0, size[1] - 1)]  # edges repeat
        if r.get("hflip") and rng.random() < r["hflip"]:
            values = values[:, ::-1]
        return np.ascontiguousarray(values)[None]

    def _intensity(self, values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        r = self.recipe or {}
        scale, shift = float(r.get("intensity_scale") or 0), float(r.get("intensity_shift") or 0)
        if not (scale or shift):
            return values
        changed = values * rng.uniform(1 - scale, 1 + scale) + rng.uniform(-shift, shift)
        return changed.clip(0, 1).astype(np.float32)


def unit(values: np.ndarray) -> np.ndarray:
    """Intensities as float32 in [0, 1]: 8-bit ones over 255, others that aren't in [0, 1] from their 0.5th to their 99.5th percentile."""
    if values.dtype == np.uint8:
        return values.astype(np.float32) * np.float32(1 / 255)
    values = values.astype(np.float32)
    if values.min() >= 0 and values.max() <= 1:
        return values
    low, high = np.percentile(values, (0.5, 99.5))
    return ((values - low) / max(high - low, 1e-6)).clip(0, 1).astype(np.float32)


def resize(values: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Trilinear, averaging first along axes that shrink by whole factors: [h, w, d] -> size."""
    if values.shape == size:
        return values
    x = torch.from_numpy(np.ascontiguousarray(values))[None, None]
    factors = tuple(max(1, old // new) for old, new in zip(values.shape, size, strict=True))
    if max(factors) > 1:
        x = F.avg_pool3d(x, factors, factors)
    return F.interpolate(x, size=size, mode="trilinear", align_corners=False)[0, 0].numpy()


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents, from transformed samples: a tensor of one rank, a list where both were drawn."""
    images = [torch.from_numpy(np.ascontiguousarray(s["image"])) for s in samples]
    ranks = [int(s["rank"]) for s in samples]
    batch: dict[str, Any] = {
        "image": torch.stack(images) if len({*ranks}) == 1 else images,
        "rank": torch.tensor(ranks),
        "id": [s["id"] for s in samples],
    }
    if "label" in samples[0]:
        batch["label"] = torch.tensor([s["label"] for s in samples], dtype=torch.int64)
    return batch
