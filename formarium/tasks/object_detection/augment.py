"""Resizing, cropping and mirroring pictures with their boxes and masks, as DETR's family does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from formarium.task import Sample


class Prepare:
    """The transform of a raw sample (image, boxes and labels, masks where annotated) to what `collate` pads and stacks.

    preprocessing: size (the shorter side, pixels), max_size (the longer side's limit). Recipe keys: hflip (probability), scales (shorter
    sides to draw one from, in place of size), crop (probability of a random crop between two resizings).
    """

    def __init__(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None):
        self.size, self.most = int(preprocessing["size"]), int(preprocessing.get("max_size", 1333))
        self.recipe = recipe

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image = sample["image"]
        height, width = image.shape[:2]
        boxes = np.asarray(sample.get("boxes", np.zeros((0, 4))), dtype=np.float64).reshape(-1, 4).copy()  # left, top, right, bottom
        labels = np.asarray(sample.get("labels", np.zeros(0)), dtype=np.int64)
        masks = sample.get("masks")
        side = self.size
        r = self.recipe or {}
        if rng.random() < r.get("hflip", 0):
            image = image[:, ::-1]
            boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
            masks = masks[:, :, ::-1] if masks is not None else None
        if rng.random() < r.get("crop", 0):
            image, boxes, labels, masks = self._crop(image, boxes, labels, masks, rng)
        if scales := r.get("scales"):
            side = int(scales[rng.integers(len(scales))])
        image, boxes, masks = resize(image, boxes, masks, shorter(image.shape[:2], side, self.most))
        h, w = image.shape[:2]
        left, top, right, bottom = (boxes / [w, h, w, h]).clip(0, 1).T
        out: Sample = {
            "id": sample.get("id", ""),
            "image": np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32) / 255,
            "original_size": np.array([height, width], dtype=np.int64),
            "boxes": np.stack([(left + right) / 2, (top + bottom) / 2, right - left, bottom - top], 1).astype(np.float32),
            "labels": labels,
        }
        if masks is not None:
            out["masks"] = np.ascontiguousarray(masks)
        for key in ("truth", "image_id"):
            if key in sample:
                out[key] = sample[key]
        return out

    def _crop(
        self, image: np.ndarray, boxes: np.ndarray, labels: np.ndarray, masks: np.ndarray | None, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """The picture at a half to three quarters of the size, of it a random part; objects that are left outside go."""
        side = int(self.size * (0.5, 0.625, 0.75)[rng.integers(3)])
        image, boxes, masks = resize(image, boxes, masks, shorter(image.shape[:2], side, 10**6))
        height, width = image.shape[:2]
        low, high = round(0.48 * self.size), round(0.75 * self.size)
        h, w = (int(rng.integers(min(low, n), min(high, n) + 1)) for n in (height, width))
        top, left = int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1))
        boxes = (boxes - [left, top, left, top]).clip(0, [w, h, w, h])
        kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        if masks is not None:
            masks = masks[:, top : top + h, left : left + w]
            kept &= masks.any((1, 2))
        return image[top : top + h, left : left + w], boxes[kept], labels[kept], masks[kept] if masks is not None else None


def shorter(size: tuple[int, ...], side: int, most: int) -> tuple[int, int]:
    """(height, width) whose shorter side is `side`, or less where the longer one would exceed `most`."""
    height, width = size[:2]
    scale = side / min(height, width)
    if round(scale * max(height, width)) > most:
        scale = most / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def resize(
    image: np.ndarray, boxes: np.ndarray, masks: np.ndarray | None, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    height, width = image.shape[:2]
    if (height, width) == size:
        return image, boxes, masks
    to = (size[1], size[0])
    resized = np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize(to, Image.Resampling.BILINEAR))
    scale = np.array([size[1] / width, size[0] / height] * 2)
    if masks is not None:
        pictures = [Image.fromarray(m.astype(np.uint8)).resize(to, Image.Resampling.NEAREST) for m in masks]
        masks = np.stack([np.asarray(p) for p in pictures]).astype(bool) if pictures else np.zeros((0, *size), dtype=bool)
    return resized, boxes * scale, masks
