"""Scores of generated motions beside true ones, predictions as plain rows, and the trivial rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from formarium.task import Data
from formarium.tasks.frechet import frechet
from formarium.tasks.motion_generation.skeleton import to_joints


def descriptor(motion: np.ndarray) -> np.ndarray:
    """A motion's features [frames, 263] as float64 [201]: of the root's speeds and height and the joints' positions (67 numbers a frame)
    the mean, the deviation over time, and the mean absolute change. It knows what moves how far and how fast, not in which order."""
    x = motion[:, :67].astype(np.float64)
    change = np.abs(np.diff(x, axis=0)).mean(0) if len(x) > 1 else np.zeros(67)
    return np.concatenate([x.mean(0), x.std(0), 5 * change])


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """How well motions show their captions, and how like true ones they are, in the space of `descriptor`, standardised by the true
    motions:

    r_precision, r_precision_top3: share of motions whose caption's group is the nearest (among the three nearest) by the mean of its true
    motions;
        one value a motion each. matching_distance: the mean distance to the own group's.
    frechet: the Frechet distance between generated and true motions on 16 fixed random directions (from 32 motions on). diversity: the mean
        distance between generated motions, true_diversity that between true ones.
    reconstruction_mm: what the codes lose: the mean distance of joints from the true ones, root aligned (where the model has codes).
    These take the place of the scores with Guo et al.'s evaluators, which can't be shipped, and aren't comparable to them.
    """
    made, true, groups, errors = [], [], [], []
    for p, b in zip(predictions, batches, strict=True):
        for i, frames in enumerate(b["length"].tolist()):
            made.append(descriptor(p.motion[i, :frames].float().cpu().numpy()))
            true.append(descriptor(b["motion"][i, :frames].cpu().numpy()))
            groups.append((b.get("group") or b["caption"])[i])
            if p.reconstruction.shape[1]:
                errors.append(joint_error(p.reconstruction[i, :frames].float().cpu().numpy(), b["motion"][i, :frames].cpu().numpy()))
    metrics, per_sample = compare(np.stack(made), np.stack(true), groups)
    if errors:
        per_sample["reconstruction_mm"] = np.array(errors)
        metrics["reconstruction_mm"] = float(np.mean(errors))
    return metrics, per_sample


def compare(made: np.ndarray, true: np.ndarray, groups: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Scores of descriptors [motions, dims]."""
    mean, std = true.mean(0), true.std(0)
    std = np.maximum(std, 0.05 * std.max() + 1e-6)
    made, true = (made - mean) / std, (true - mean) / std
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    centres = np.stack([true[index == i].mean(0) for i in range(len(names))])
    far = np.linalg.norm(made[:, None] - centres[None], axis=-1)  # motions groups
    own = far[np.arange(len(made)), index]
    rank = (far < own[:, None]).sum(1)
    per_sample: dict[str, Any] = {
        "r_precision": (rank < 1).astype(float),
        "r_precision_top3": (rank < 3).astype(float),
        "matching_distance": own,
    }
    metrics = {name: float(values.mean()) for name, values in per_sample.items()}
    for name, points in (("diversity", made), ("true_diversity", true)):
        order = np.random.default_rng(0).permutation(len(points))
        metrics[name] = float(np.linalg.norm(points - points[order], axis=1).mean())
    if len(made) >= 32:
        directions = np.random.default_rng(0).standard_normal((made.shape[1], 16)) / np.sqrt(made.shape[1])
        metrics["frechet"] = frechet(made @ directions, true @ directions)
    return metrics, per_sample


def joint_error(a: np.ndarray, b: np.ndarray) -> float:
    """The mean distance between joints of two motions' features, in millimetres, each frame's roots on one another."""
    a, b = to_joints(a), to_joints(b)
    return float(np.linalg.norm((a - a[:, :1]) - (b - b[:, :1]), axis=-1).mean() * 1000)


def rows(prediction: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One dict a motion: id, caption, frames, seconds, and how far the root goes, in metres."""
    ids = batch.get("id") or [str(i) for i in range(len(prediction.joints))]
    captions = batch.get("caption") or [""] * len(ids)
    out = []
    for i, (name, caption) in enumerate(zip(ids, captions, strict=True)):
        frames = int(prediction.length[i])
        root = prediction.joints[i, :frames, 0].float().cpu()
        way = float((root[-1] - root[0])[[0, 2]].norm())
        out.append({"id": name, "caption": caption, "frames": frames, "seconds": round(frames / 20, 2), "travels": round(way, 3)})
    return out


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """A training motion drawn at random, whatever the caption: true to life, but deaf. Scored on "val"."""
    rng, train, val = np.random.default_rng(seed), data.splits["train"], data.splits["val"]
    samples = [val[i] for i in range(len(val))]
    true = np.stack([descriptor(s["motion"]) for s in samples])
    made = np.stack([descriptor(train[int(i)]["motion"]) for i in rng.integers(len(train), size=len(samples))])
    return "a training motion at random", compare(made, true, [s.get("group", s["caption"]) for s in samples])[0]
