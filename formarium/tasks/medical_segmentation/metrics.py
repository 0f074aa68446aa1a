"""Dice and the 95% Hausdorff distance (MONAI's numbers), predictions as plain rows, and the trivial rival.

Where neither mask has a voxel, Dice is 1 and the distance 0; where only one has, Dice is 0 and the distance the image's diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from formarium.errors import BadInput
from formarium.task import Data
from formarium.tasks.medical_segmentation.model import Rebuilt, region_masks
from formarium.tasks.medical_segmentation.prepare import Prepare


def dice(a: np.ndarray, b: np.ndarray) -> float:
    """2 |a & b| / (|a| + |b|) of two bool arrays."""
    total = int(a.sum()) + int(b.sum())
    return 2 * int((a & b).sum()) / total if total else 1.0


def hausdorff95(a: np.ndarray, b: np.ndarray, spacing: Sequence[float] | None = None) -> float:
    """The larger of both directions' 95th percentiles of surface distances, in units of `spacing` (voxels by default).

    a, b: bool [*spatial]. A mask's surface are its voxels with a face at another value or at the image's edge.
    """
    from scipy.ndimage import binary_erosion
    from scipy.spatial import KDTree

    step = np.ones(a.ndim) if spacing is None else np.asarray(spacing, dtype=np.float64)
    if not a.any() or not b.any():
        return 0.0 if a.any() == b.any() else float(np.linalg.norm(step * a.shape))
    edges = []
    for mask in (a, b):
        inside = tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(mask))
        cut = np.pad(mask[inside], 1)  # erosion takes what lies beyond for background
        edges.append((np.argwhere(cut & ~binary_erosion(cut)) - 1 + [s.start for s in inside]) * step)
    ways = (KDTree(edges[1]).query(edges[0])[0], KDTree(edges[0]).query(edges[1])[0])
    return float(max(np.percentile(d, 95) for d in ways))


def truth(label: torch.Tensor, regions: Sequence[Sequence[int]], count: int) -> np.ndarray:
    """bool [masks, *spatial] of one label volume: regions, or the classes 1 .. count."""
    return region_masks(label[None], regions or [[v] for v in range(1, count + 1)])[0].cpu().numpy()


def spacing_of(batch: Mapping[str, Any], index: int, dims: int) -> np.ndarray | None:
    """Millimetres between voxels along each axis."""
    if "affine" not in batch:
        return None
    return np.linalg.norm(batch["affine"][index][:3, :dims].cpu().numpy(), axis=0)


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """dice, and hausdorff95 in millimetres (voxels, where files say nothing): means over regions and cases; and each of them by region.

    Of an encoder in pre-training: reconstruction, the mean absolute error, and rotation, the share of turns told right.
    Raises BadInput for volumes without masks.
    """
    if predictions and isinstance(predictions[0], Rebuilt):
        errors = np.concatenate([_errors(p).numpy() for p in predictions])
        right = np.concatenate([(p.turn == p.turns).float().cpu().numpy() for p in predictions])
        return {"reconstruction": float(errors.mean()), "rotation": float(right.mean())}, {"reconstruction": errors, "rotation": right}
    if any("label" not in batch for batch in batches):
        raise BadInput("volumes to score on", expected="their masks", got="none")
    cases = []
    for prediction, batch in zip(predictions, batches, strict=True):
        for i, masks in enumerate(prediction.mask.cpu().numpy()):
            real = truth(batch["label"][i], _regions(batch, i), len(masks))
            step = spacing_of(batch, i, masks[0].ndim)
            cases.append([(dice(m, t), hausdorff95(m, t, step)) for m, t in zip(masks, real, strict=True)])
    values = np.array(cases)  # cases masks 2
    per_sample = {"dice": values[..., 0].mean(1), "hausdorff95": values[..., 1].mean(1)}
    for r in range(values.shape[1]):
        per_sample |= {f"dice_{r + 1}": values[:, r, 0], f"hausdorff95_{r + 1}": values[:, r, 1]}
    return {k: float(v.mean()) for k, v in per_sample.items()}, per_sample


def _errors(prediction: Rebuilt) -> torch.Tensor:
    """Mean absolute error of each rebuilt volume, float [batch] on the CPU."""
    return (prediction.image.float() - prediction.whole.float()).abs().flatten(1).mean(1).detach().cpu()


def _regions(batch: Mapping[str, Any], index: int) -> Sequence[Sequence[int]]:
    return batch["regions"][index] if "regions" in batch else ()


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a case: id, each region's volume in millilitres (voxels, where files say nothing), and its Dice where the mask is known."""
    out: list[dict[str, Any]] = []
    ids = batch.get("id") or [str(i) for i in range(len(prediction[0]))]
    if isinstance(prediction, Rebuilt):
        errors = _errors(prediction).tolist()
        turns = zip(prediction.turn.tolist(), prediction.turns.tolist(), strict=True)
        return [
            {"id": i, "reconstruction": round(e, 4), "turned": f"{90 * t} degrees", "said": f"{90 * s} degrees"}
            for i, e, (s, t) in zip(ids, errors, turns, strict=True)
        ]
    for i, masks in enumerate(prediction.mask.cpu().numpy()):
        known = [*names] if len(names) == len(masks) else [f"region {r + 1}" for r in range(len(masks))]
        step = spacing_of(batch, i, masks[0].ndim)
        unit, size = ("voxels", 1.0) if step is None or len(step) < 3 else ("ml", float(np.prod(step)) / 1000)
        row: dict[str, Any] = {"id": ids[i]}
        row |= {f"{n} ({unit})": round(float(m.sum()) * size, 3) for n, m in zip(known, masks, strict=True)}
        if "label" in batch and "regions" in batch:
            real = truth(batch["label"][i], _regions(batch, i), len(masks))
            row |= {f"dice {n}": round(dice(m, t), 4) for n, m, t in zip(known, masks, real, strict=True)}
        out.append(row)
    return out


def baseline(data: Data, seed: int = 0, most: int = 12, levels: int = 24) -> tuple[str, dict[str, float]]:
    """For each region the one channel, threshold and side of it that is best on training cases (at most `most`); scored on "val"."""
    regions, channels = data.model_args["regions"], data.model_args["in_channels"]
    count = len(regions) or data.model_args["out_channels"] - 1
    prepare, rng = Prepare({}), np.random.default_rng(seed)

    def cases(split: str, chosen: Sequence[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        found = [prepare(data.splits[split][int(i)], rng) for i in chosen]
        return [(s["image"], truth(torch.from_numpy(s["label"]), regions, count)) for s in found]

    train = cases("train", rng.permutation(len(data.splits["train"]))[:most])
    cuts = np.linspace(-1.5, 3.5, levels)
    rules = [(c, t, side) for c in range(channels) for t in cuts for side in (1, -1)]

    def masks(image: np.ndarray, rule: tuple[int, float, int]) -> np.ndarray:
        channel, cut, side = rule
        return (side * image[channel] > side * cut) & (image[channel] != 0)

    best = []
    for r in range(count):
        scores = [np.mean([dice(masks(image, rule), real[r]) for image, real in train]) for rule in rules]
        best.append(rules[int(np.argmax(scores))])
    held = cases("val", range(len(data.splits["val"])))
    values = np.array([[dice(masks(image, rule), real[r]) for r, rule in enumerate(best)] for image, real in held])
    by_region = {f"dice_{r + 1}": float(v) for r, v in enumerate(values.mean(0))}
    return "best threshold on one channel", {"dice": float(values.mean()), **by_region}
