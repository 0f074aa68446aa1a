"""What happens to a volume on its way into a batch: normalisation, and in training crops, flips and changes of intensity."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from formarium.errors import BadInput
from formarium.task import Sample


def normalised(image: np.ndarray) -> np.ndarray:
    """[channels, *spatial] -> float32: each channel to mean 0 and deviation 1 over its non-zero voxels; the others stay 0."""
    out = np.zeros(image.shape, dtype=np.float32)
    for channel, values in enumerate(image):
        seen = values != 0
        if seen.any():
            inside = values[seen].astype(np.float64)
            out[channel][seen] = (inside - inside.mean()) / (inside.std() or 1.0)
    return out


class Prepare:
    """A raw sample (image, label, affine, id) to what a batch holds.

    preprocessing: channels, regions, classes, as the network has them. recipe, when training: patch (sides of a random crop; smaller
    volumes are padded with zeros), foreground (the share of crops centred on a labelled voxel), flip (probability for each axis),
    intensity_scale and intensity_shift (largest change of each channel, relative, and in deviations).
    """

    def __init__(self, preprocessing: Mapping[str, Any], recipe: Mapping[str, Any] | None = None):
        self.how, self.recipe = dict(preprocessing), None if recipe is None else dict(recipe)

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        name, raw = sample["id"], sample["image"]
        wanted = self.how.get("channels", raw.shape[0])
        if raw.shape[0] != wanted:
            raise BadInput(name, expected=f"{wanted} channels, as the network has", got=f"{raw.shape[0]}")
        out: Sample = {"id": name, "image": normalised(raw)}
        if "affine" in sample:
            out["affine"] = sample["affine"]
        if "label" in sample:
            out["label"] = self.checked(sample["label"], raw.shape[1:], name)
            out["regions"] = tuple(map(tuple, self.how.get("regions", ())))
        if self.recipe is not None:
            self.augment(out, rng)
        return out

    def checked(self, label: np.ndarray, spatial: Sequence[int], name: str) -> np.ndarray:
        if label.shape != tuple(spatial):
            raise BadInput(f"the mask of {name}", expected=f"the image's shape {[*spatial]}", got=f"{[*label.shape]}")
        regions, classes = self.how.get("regions", ()), self.how.get("classes")
        known = {0, *(v for r in regions for v in r)} if regions else {*range(classes)} if classes else None
        if known is not None and (strange := {*np.unique(label).tolist()} - known):
            said = [", ".join(map(str, sorted(values))) for values in (known, strange)]
            raise BadInput(f"the mask of {name}", expected=f"labels {said[0]}", got=said[1])
        return label.astype(np.int64)

    def augment(self, out: Sample, rng: np.random.Generator) -> None:
        recipe, spatial = self.recipe or {}, out["image"].ndim - 1
        keys = [k for k in ("image", "label") if k in out]
        patch = recipe.get("patch")
        if patch:
            sides = (patch,) * spatial if isinstance(patch, int) else tuple(patch)[:spatial]
            cut = self.crop(out, sides, recipe.get("foreground", 0.0), rng)
            for key in keys:
                out[key] = _cut(out[key], cut, sides)
        flips = [-1 - axis for axis in range(spatial) if rng.random() < recipe.get("flip", 0.5)]
        for key in keys:
            out[key] = np.ascontiguousarray(np.flip(out[key], flips))
        shape = (out["image"].shape[0], *(1,) * spatial)
        scale, shift = (recipe.get(f"intensity_{k}", 0.0) for k in ("scale", "shift"))
        if scale or shift:
            changed = out["image"] * (1 + scale * rng.uniform(-1, 1, shape)) + shift * rng.uniform(-1, 1, shape)
            out["image"] = np.where(out["image"] == 0, 0, changed).astype(np.float32)

    def crop(self, out: Sample, sides: Sequence[int], foreground: float, rng: np.random.Generator) -> list[int]:
        """Where a crop begins along each axis."""
        full = out["image"].shape[1:]
        room = [max(0, f - s) for f, s in zip(full, sides, strict=True)]
        if rng.random() < foreground and "label" in out and (places := np.flatnonzero(out["label"])).size:
            centre = np.unravel_index(int(rng.choice(places)), full)
            low = [int(c) - s // 2 + int(rng.integers(-s // 4, s // 4 + 1)) for c, s in zip(centre, sides, strict=True)]
            return [min(max(a, 0), r) for a, r in zip(low, room, strict=True)]
        return [int(rng.integers(r + 1)) for r in room]


def _cut(values: np.ndarray, low: Sequence[int], sides: Sequence[int]) -> np.ndarray:
    values = values[(..., *(slice(a, a + s) for a, s in zip(low, sides, strict=True)))]
    missing = [s - v for s, v in zip(sides, values.shape[-len(sides) :], strict=True)]
    pads = [(0, 0)] * (values.ndim - len(sides)) + [(m // 2, m - m // 2) for m in missing]
    return np.pad(values, pads)


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """The batch that `model.py` documents, from transformed samples of one shape."""
    import torch

    batch: dict[str, Any] = {"id": [s["id"] for s in samples], "image": torch.from_numpy(np.stack([s["image"] for s in samples]))}
    if "label" in samples[0]:
        batch["label"] = torch.from_numpy(np.stack([s["label"] for s in samples]))
        batch["regions"] = [s["regions"] for s in samples]
    if all("affine" in s for s in samples):
        batch["affine"] = torch.from_numpy(np.stack([np.asarray(s["affine"], dtype=np.float64) for s in samples]))
    return batch
