"""One-to-one assignment of predictions to objects (the Hungarian algorithm), and the losses that set prediction shares."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.nn.image_boxes import generalised_iou, to_corners


def hungarian(cost: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """The assignment of least total cost in each of several matrices.

    cost: float [matrices, predictions, objects]; of matrix i only the first counts[i] columns are objects. Returns (matrix, prediction,
    object), int64 [pairs] each, matrix by matrix and in the order of the predictions; every object has a pair where predictions suffice.
    """
    from scipy.optimize import linear_sum_assignment

    table = torch.nan_to_num(cost.detach().float(), nan=1e6, posinf=1e6, neginf=-1e6).cpu().numpy()
    found = [linear_sum_assignment(table[i, :, :count]) for i, count in enumerate(counts)]
    which = torch.repeat_interleave(torch.arange(len(found)), torch.tensor([len(rows) for rows, _ in found], dtype=torch.int64))
    rows, columns = (torch.cat([torch.as_tensor(f[k], dtype=torch.int64) for f in found]) if found else which for k in (0, 1))
    return which.to(cost.device), rows.to(cost.device), columns.to(cost.device)


def detection_cost(
    logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, weights: tuple[float, float, float] = (2, 5, 2)
) -> Tensor:
    """What it costs that a prediction stands for an object (Deformable DETR): focal class, L1 and generalised IoU costs.

    logits: float [batch, queries, classes]; boxes: [batch, queries, 4], (centre, size) in [0, 1]; labels: int64 [batch, objects], below 0
    where there is none; targets: [batch, objects, 4]. weights: of the three costs. Returns float [batch, queries, objects].
    """
    with torch.no_grad():
        p = logits.float().sigmoid()
        positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
        negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
        index = labels.clamp_min(0)[:, None].expand(-1, p.shape[1], -1)
        kind = (positive - negative).gather(2, index)
        distance = torch.cdist(boxes.float(), targets.float(), p=1)
        overlap = generalised_iou(to_corners(boxes.float())[:, :, None], to_corners(targets.float())[:, None])
        return weights[0] * kind + weights[1] * distance - weights[2] * overlap


def sigmoid_focal(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """The focal loss (Lin et al., ICCV 2017) of each logit against a target in [0, 1]; same shape, no reduction."""
    p = logits.sigmoid()
    entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    miss = 1 - (p * targets + (1 - p) * (1 - targets))
    return (alpha * targets + (1 - alpha) * (1 - targets)) * entropy * miss**gamma
