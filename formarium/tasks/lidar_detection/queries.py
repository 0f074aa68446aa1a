"""Detectors with a query head (see formarium.nn.query_head): their loss and decoding, beside the centre head's."""

from __future__ import annotations

import torch

from formarium.model import Batch, Losses
from formarium.nn.center_head import center_targets
from formarium.nn.query_head import Queries, assign, query_boxes, query_losses
from formarium.tasks.lidar_detection.model import Boxes, CenterDetector, of_class


class QueryDetector(CenterDetector):
    """A detector whose forward gives Queries where `config.queries` isn't 0, and else what a CenterDetector's does.

    Config adds `queries`, `match_weights` (of class, centre and overlap) and `query_weights` (of the heatmap's, the labels', the boxes' and
    the expected IoU's terms).
    """

    def loss(self, batch: Batch) -> Losses:
        """The centre head's; or heatmap focal loss, and over the queries that boxes were assigned to one to one: focal loss of the class,
        L1 of the box, L1 of the expected IoU."""
        c = self.config
        if not c.num_classes or not c.queries:
            return super().loss(batch)
        origin, cell = self.frame(batch["points"].device)
        boxes, label = self._as_known(batch["boxes"]), self._in_range(batch["boxes"], batch["label"])
        out: Queries = self.forward_batch(batch)
        w, h = out.dense.shape[2:]
        target = center_targets(boxes, label, range(c.num_classes), (h, w), origin, cell, c.gaussian_overlap, c.min_radius)
        label = label.masked_fill(~target.valid, -1)
        matched = assign(out, boxes, label, origin, cell, cell * cell.new_tensor([w, h]), c.match_weights)
        heatmap = target.heatmap.transpose(2, 3)
        terms = query_losses(out, heatmap, boxes, label, matched, origin, cell, c.query_weights, c.code_weights)
        return Losses(torch.stack([*terms.values()]).sum(), terms)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Boxes:
        """The centre head's; or every query's box under the class it was proposed with, scored by what it says of that class times the
        proposal's score, corrected by the expected IoU; rotated NMS for the classes whose threshold is below 1."""
        c = self.config
        if not c.num_classes or not c.queries:
            return super().predict(batch)
        origin, cell = self.frame(batch["points"].device)
        out: Queries = self.forward_batch(batch)
        boxes = query_boxes(out.values.float(), origin, cell)
        scores = out.logits.float().sigmoid().gather(2, out.label[..., None])[..., 0] * out.prior
        low, high = (torch.tensor(c.point_range[i : i + 3], device=cell.device) for i in (0, 3))
        margin = (high - low) * cell.new_tensor([1 / 15, 1 / 15, 1.0])  # centres of boxes may lie a little outside
        keep = (scores > c.score_threshold) & ((boxes[..., :3] >= low - margin) & (boxes[..., :3] <= high + margin)).all(-1)
        r = of_class(c.iou_rectifier, out.label, scores)
        scores = scores ** (1 - r) * ((out.iou.float() + 1) / 2).clamp(0, 1) ** r
        found = []
        for i in range(len(boxes)):
            k = keep[i]
            parts = self._suppressed(boxes[i, k], scores[i, k], out.label[i, k])
            none = (boxes[i, :0], scores[i, :0], out.label[i, :0])
            found.append([torch.cat(part) for part in zip(none, *parts, strict=True)])
        return Boxes([f[0] for f in found], [f[1] for f in found], [f[2] for f in found])
