"""Scores of correspondences and motions as 3DMatch's benchmark has them, rows and files, and the trivial rival.

The scores are a few lines each; the packages that have them (open3d among them) bring a whole viewer, so they are our own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from formarium.nn.rigid import fit_motion, move
from formarium.task import Data, file_stem

INLIER = 0.1  # metres: a correspondence that the true motion brings so near is right
MATCHED = 0.05  # share of right correspondences from which on a pair counts as matched
REGISTERED = 0.2  # metres: root mean square error over the source up to which a pair counts as registered


def rotation_error(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Degrees between rotations [..., 3, 3]: [...]. Exact near 0 too."""
    a, b = a.double(), b.double()
    sine = (a - b).flatten(-2).norm(dim=-1) / (8**0.5)  # of half the angle
    return torch.rad2deg(2 * torch.asin(sine.clamp(0, 1)))


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """registration_recall (share of pairs with an error of at most 0.2 m), inlier_ratio (share of correspondences within 0.1 m),
    feature_matching_recall (share of pairs with an inlier ratio above 0.05), rre (degrees), rte (metres), and the number of
    correspondences.

    All are means over pairs and come with one value each.
    """
    each: dict[str, list[float]] = {
        k: [] for k in ("registration_recall", "inlier_ratio", "feature_matching_recall", "rre", "rte", "matches")
    }
    for prediction, batch in zip(predictions, batches, strict=True):
        for i, true in enumerate(batch["transform"].float().cpu()):
            said = prediction.transform[i].float().cpu()
            points = batch["source"][i, : int(batch["source_count"][i])].float().cpu()
            error = (move(said, points) - move(true, points)).norm(dim=1).square().mean().sqrt()
            source, target = prediction.source[i].float().cpu(), prediction.target[i].float().cpu()
            right = ((move(true, source) - target).norm(dim=1) < INLIER).float().mean().item() if len(source) else 0.0
            each["registration_recall"].append(float(error <= REGISTERED))
            each["inlier_ratio"].append(right)
            each["feature_matching_recall"].append(float(right > MATCHED))
            each["rre"].append(float(rotation_error(said[:3, :3], true[:3, :3])))
            each["rte"].append(float((said[:3, 3] - true[:3, 3]).norm()))
            each["matches"].append(float(len(source)))
    arrays = {k: np.array(v) for k, v in each.items()}
    return {k: float(v.mean()) for k, v in arrays.items()}, arrays


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str] = ()) -> list[dict[str, Any]]:
    """One dict a pair: id, transform (4x4, source onto target), correspondences (how many), score (their mean)."""
    out = []
    for i, motion in enumerate(prediction.transform):
        scores = prediction.scores[i]
        row = {"id": batch["id"][i] if "id" in batch else str(i), "transform": [[round(v, 6) for v in r] for r in motion.tolist()]}
        out.append({**row, "correspondences": len(scores), "score": round(float(scores.mean()), 4) if len(scores) else 0.0})
    return out


def write(prediction: Any, batch: Mapping[str, Any], folder: Path, names: Sequence[str] = ()) -> list[Path]:
    """NAME.txt with the 4x4 motion, NAME.json with it and what it rests on, NAME.npz with the correspondences (source, target, scores)."""
    paths = []
    for i, row in enumerate(rows(prediction, batch)):
        stem = file_stem(row["id"])
        text, document, arrays = (folder / f"{stem}{e}" for e in (".txt", ".json", ".npz"))
        np.savetxt(text, prediction.transform[i].double().cpu().numpy(), fmt="%.8f")
        document.write_text(json.dumps(row), encoding="utf-8")
        found = {k: getattr(prediction, k)[i].float().cpu().numpy() for k in ("source", "target", "scores")}
        np.savez(arrays, **found)
        paths += [text, document, arrays]
    return paths


# the rival ------------------------------------------------------------------------------------------------------------


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """Iterative closest points from aligned centroids, scored on "val"; its last pairs of nearest points are its correspondences."""
    from formarium.tasks.point_cloud_registration.data import Prepare, collate
    from formarium.tasks.point_cloud_registration.model import Registered

    val, prepare, rng = data.splits["val"], Prepare({"voxel": 0.0, "max_points": 1500}), np.random.default_rng(seed)
    predictions, batches = [], []
    for i in range(len(val)):
        batch = collate([prepare(val[i], rng)])
        motion, near = icp(batch["source"][0], batch["target"][0])
        source, target = batch["source"][0], batch["target"][0][near]
        distance = (move(motion, source) - target).norm(dim=1)
        close = distance < INLIER
        predictions.append(Registered(motion[None], [source[close]], [target[close]], [(-distance[close]).exp()]))
        batches.append(batch)
    return "ICP from aligned centroids", score(predictions, batches)[0]


def icp(source: torch.Tensor, target: torch.Tensor, steps: int = 30) -> tuple[torch.Tensor, torch.Tensor]:
    """The motion [4, 4] that point-to-point ICP ends at, and each source point's nearest target point under it. The farthest fifth of the
    pairs of a step don't count."""
    from scipy.spatial import cKDTree

    tree = cKDTree(target.numpy())
    motion = torch.eye(4)
    motion[:3, 3] = target.mean(0) - source.mean(0)
    for _ in range(steps):
        distance, near = tree.query(move(motion, source).numpy())
        keep = torch.from_numpy(distance <= np.quantile(distance, 0.8))
        motion = fit_motion(source[keep], target[torch.from_numpy(near)][keep])
    return motion, torch.from_numpy(tree.query(move(motion, source).numpy())[1])
