"""Samples that lie far out in a feature space, mode by mode, and the same modes in another model's space."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor

from formarium.nn.components import Components


@dataclass(frozen=True)
class Ends:
    """projected: samples on the leading components [n, k]. order: mode -> samples, farthest out first."""

    projected: np.ndarray
    order: dict[str, np.ndarray]


def ends(x: Tensor, label: np.ndarray, components: int = 2, like: Ends | None = None) -> Ends:
    """Samples by how far they lie out: at either end of each leading component, and away from their own class along these.

    like: another model's; each of its components is paired with the one of ours that goes with it best, turned to the same direction.
    """
    projected = Components.of(x).project(components if like is None else 2 * components).numpy()
    if like is not None:
        k = like.projected.shape[1]
        with np.errstate(invalid="ignore", divide="ignore"):
            related = np.nan_to_num(np.corrcoef(like.projected.T, projected.T))[:k, k:]
        pair = np.abs(related).argmax(1)
        projected = projected[:, pair] * np.where(related[np.arange(k), pair] < 0, -1, 1)
    order = {}
    for i, column in enumerate(projected.T):
        order[f"component {i + 1}, high end"] = (-column).argsort(kind="stable")
        order[f"component {i + 1}, low end"] = column.argsort(kind="stable")
    away = np.zeros(len(label))
    for c in np.unique(label):
        own = projected[label == c] - np.median(projected[label == c], 0)
        spread = np.median(np.abs(own), 0) + 0.05 * projected.std(0) + 1e-12  # robust; a class of one lies nowhere out
        away[label == c] = np.linalg.norm(own / spread, axis=1)
    return Ends(projected, {**order, "away from their class": (-away).argsort(kind="stable")})
