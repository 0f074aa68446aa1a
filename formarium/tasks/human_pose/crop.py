"""From a whole image and a person's box to the network's input: an affine cut-out, in training augmented.

All places are pixel centres (0 .. W - 1), so that image, cut-out and heat-map are related without the half-pixel bias that Huang et al.
(CVPR 2020) found.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from formarium.nn.heatmaps import swapped
from formarium.task import Sample
from formarium.tasks.human_pose.joints import PAIRS, UPPER


def frame(box: np.ndarray, aspect: float, padding: float = 1.25) -> tuple[np.ndarray, np.ndarray]:
    """(centre, extent) of what is cut out for a box (x, y, w, h): widened to the aspect (width / height), then by the padding."""
    x, y, w, h = (float(v) for v in box)
    extent = np.array([max(w, aspect * h), max(h, w / aspect)])
    return np.array([x + w / 2, y + h / 2]), extent * padding


def matrix(centre: np.ndarray, extent: np.ndarray, size: tuple[int, int], degrees: float = 0.0) -> np.ndarray:
    """float64 [2, 3]: pixels of the image to those of the cut-out of `size` (height, width), turned by so many degrees about the centre."""
    target = np.array([size[1] - 1, size[0] - 1])
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    linear = np.diag(target / extent) @ np.array([[cos, -sin], [sin, cos]])
    return np.concatenate([linear, (target / 2 - linear @ centre)[:, None]], 1)


def cut(image: np.ndarray, m: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [*size, 3], bilinear, black outside of the image."""
    inverse = np.linalg.inv(m[:, :2])
    shift = -inverse @ m[:, 2] + 0.5 - inverse @ np.array([0.5, 0.5])  # Pillow counts from pixels' corners
    data = (*inverse[0], shift[0], *inverse[1], shift[1])
    picture = Image.fromarray(image).transform((size[1], size[0]), Image.Transform.AFFINE, data, Image.Resampling.BILINEAR)
    return np.asarray(picture)


def apply(points: np.ndarray, m: np.ndarray) -> np.ndarray:
    return points @ m[:, :2].T + m[:, 2]


class Prepare:
    """The transform of a raw sample (image, box, and where annotated keypoints) to what the batch holds.

    Recipe keys: hflip (probability), half_body (probability of a cut-out around the upper or the lower body, where more than 8 joints are
    marked), rotation (degrees, the deviation of a normal cut at twice that, 6 times of 10), rescale (the deviation of the cut-out's scale),
    shift_box (probability of a centre moved by up to a fifth of the box).
    """

    def __init__(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None):
        size = preprocessing["size"]
        self.size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
        self.padding, self.recipe = float(preprocessing.get("padding", 1.25)), recipe
        self.aspect = self.size[1] / self.size[0]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        image, box = sample["image"], np.asarray(sample["box"], dtype=np.float64)
        joints = np.asarray(sample["keypoints"], dtype=np.float64).copy() if "keypoints" in sample else None
        centre, extent = frame(box, self.aspect, self.padding)
        degrees = 0.0
        if self.recipe:
            image, centre, extent, degrees, joints = self._augment(image, box, centre, extent, joints, rng)
        m = matrix(centre, extent, self.size, degrees)
        out: Sample = {
            "id": sample.get("id", ""),
            "image": cut(image, m, self.size).transpose(2, 0, 1).astype(np.float32) / 255,
            "centre": centre.astype(np.float32),
            "extent": extent.astype(np.float32),
            "box": box.astype(np.float32),
            "box_score": np.float32(sample.get("box_score", 1.0)),
        }
        if joints is not None:
            out["keypoints"] = apply(joints[:, :2], m).astype(np.float32)
            out["visible"] = (joints[:, 2] > 0).astype(np.float32)
        if "truth" in sample:
            out["truth"] = sample["truth"]
        return out

    def _augment(
        self,
        image: np.ndarray,
        box: np.ndarray,
        centre: np.ndarray,
        extent: np.ndarray,
        joints: np.ndarray | None,
        rng: np.random.Generator,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, np.ndarray | None]:
        r = self.recipe or {}
        if rng.random() < r.get("shift_box", 0):
            centre = centre + 0.4 * (rng.random(2) - 0.5) * box[2:]
        if rng.random() < r.get("hflip", 0):
            image, width = np.ascontiguousarray(image[:, ::-1]), image.shape[1]
            centre = np.array([width - 1 - centre[0], centre[1]])
            if joints is not None:
                joints = joints[swapped(PAIRS, len(joints))]
                joints[:, 0] = width - 1 - joints[:, 0]
        if joints is not None and (joints[:, 2] > 0).sum() > 8 and rng.random() < r.get("half_body", 0):
            half = self._half(joints, rng)
            centre, extent = half if half is not None else (centre, extent)
        if scale := r.get("rescale", 0):
            extent = extent * np.clip(rng.normal() * scale + 1, 1 - scale, 1 + scale)
        degrees = 0.0
        if (turn := r.get("rotation", 0)) and rng.random() < 0.6:
            degrees = float(np.clip(rng.normal() * turn, -2 * turn, 2 * turn))
        return image, centre, extent, degrees, joints

    def _half(self, joints: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray] | None:
        """(centre, extent) around the upper or the lower body."""
        seen = joints[:, 2] > 0
        upper = np.isin(np.arange(len(joints)), UPPER)
        up, low = joints[seen & upper, :2], joints[seen & ~upper, :2]
        chosen = up if (rng.normal() < 0.5 and len(up) > 2) or len(low) <= 2 else low
        if len(chosen) < 2:
            return None
        w, h = chosen.max(0) - chosen.min(0)
        extent = np.array([max(w, self.aspect * h, 1.0), max(h, w / self.aspect, 1.0)]) * 1.5
        return chosen.mean(0), extent
