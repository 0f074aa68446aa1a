"""What every lidar detector shares: the batch it takes, its prediction, its checks; and, for those with a centre head, its loss and
decoding.

A batch holds
    points  float32 [batch, n, features], x, y, z in metres (x ahead, y left, z up), then what the sensor adds; zeros behind the last point
    count   int64 [batch], how many of the n are points
    boxes   float32 [batch, m, 7 or 9], x, y, z (centre), dx, dy, dz (full sizes along the box's axes) in metres, yaw in radians from x
            towards y, and where known vx, vy in metres a second (NaN where not); zeros where there is none  (training and evaluation)
    label   int64 [batch, m], class indices, -1 where there is no box                                       (training and evaluation)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from formarium.errors import BadInput
from formarium.model import Batch, Losses, Model, check_tensor
from formarium.nn.center_head import best_boxes, center_losses, center_targets
from formarium.nn.ops.boxes import nms_bev


class Boxes(NamedTuple):
    """One entry a sample. boxes: float32 [k, 7 or 9] as in the batch. scores: float32 [k] in [0, 1], falling within a class.
    labels: int64 [k]."""

    boxes: list[Tensor]
    scores: list[Tensor]
    labels: list[Tensor]


class LidarDetector(Model):
    """Config has at least `num_classes`, `point_features`, `point_range` and `frames` (how many sweeps a cloud is made of)."""

    task = "lidar-detection"
    channel_axes = (2, None)

    def forward_batch(self, batch: Batch) -> Any:
        return self(batch["points"], batch["count"])

    def study(self, data: Any) -> None:
        """Nothing is learnt; BadInput where clouds are made of another number of sweeps than the model's."""
        frames = data.model_args.get("frames", 1)
        if frames != self.config.frames:
            got = f"{data.name}, read with frames={frames}"
            raise BadInput(
                "data", expected=f"clouds of {self.config.frames} sweeps", got=got, fix=f"read it with frames={self.config.frames}"
            )

    def check_points(self, points: Any, count: Any) -> None:
        c = self.config
        check_tensor("points", points, "batch points features", sizes={2: c.point_features})
        check_tensor("count", count, "batch", sizes={0: len(points)}, dtype=lambda d: d in (torch.int64, torch.int32))
        if points.device.type != "cpu":  # a look would stall it
            return
        if int(count.min()) < 1 or int(count.max()) > points.shape[1]:
            raise BadInput("count", expected=f"1 to {points.shape[1]} points a sample", got=f"{int(count.min())} to {int(count.max())}")
        low, high = points.new_tensor(c.point_range[:3]), points.new_tensor(c.point_range[3:])
        inside = ((points[..., :3] >= low) & (points[..., :3] < high)).all(-1) & (torch.arange(points.shape[1]) < count[:, None])
        if empty := (~inside.any(1)).nonzero()[:, 0].tolist():
            span = ", ".join(f"{'xyz'[i]} {c.point_range[i]:g} to {c.point_range[i + 3]:g}" for i in range(3))
            fix = "are they in metres, with the sensor at the origin and z up?"
            raise BadInput(f"sample {empty[0]}", expected=f"points in the range ({span})", got="none in it", fix=fix)

    def example_points(self, batch: int = 1, points: int = 400) -> tuple[Tensor, Tensor]:
        """Points on the floor of a corner of the range, in clumps: as ragged as real ones."""
        c, g = self.config, torch.Generator().manual_seed(0)
        low, high = torch.tensor(c.point_range[:3]), torch.tensor(c.point_range[3:])
        span = (high - low).clamp_max(20.0)
        clumps = torch.rand(batch, 8, 3, generator=g).repeat_interleave(-(-points // 8), 1)[:, :points]
        xyz = (clumps + 0.04 * torch.randn(clumps.shape, generator=g)).clamp(0.01, 0.99) * span + low
        rest = torch.rand(batch, points, c.point_features - 3, generator=g)
        count = points - torch.arange(batch) % 4 * (points // 10)
        cloud = torch.cat([xyz, rest], 2) * (torch.arange(points) < count[:, None])[..., None]
        return cloud.to(self.device), count.to(self.device)

    def other_examples(self) -> dict[str, tuple[Tensor, ...]]:
        return {f"{n} points": self.example(2, points=n) for n in (10, 3000)}

    def example_batch(self, batch: int = 2, seed: int = 0) -> dict[str, Any]:
        points, count = self.example_points(batch)
        g = torch.Generator().manual_seed(seed)
        boxes = torch.zeros(batch, 4, 7)
        boxes[..., :3] = points[:, :280:70, :3].cpu()  # one a clump
        boxes[..., 3:6] = torch.tensor([4.0, 1.8, 1.6]) * (0.8 + 0.4 * torch.rand(batch, 4, 1, generator=g))
        boxes[..., 6] = 6.28 * torch.rand(batch, 4, generator=g) - 3.14
        label = torch.randint(max(1, self.config.num_classes), (batch, 4), generator=g)
        label[:, 3], boxes[:, 3] = -1, 0
        ids = [f"example {i}" for i in range(batch)]
        return {"points": points, "count": count, "boxes": boxes.to(self.device), "label": label.to(self.device), "id": ids}


class CenterDetector(LidarDetector):
    """A detector whose forward gives one Centers a head (see formarium.nn.center_head).

    Config adds `voxel_size`, `head_groups`, `velocity`, `iou_regression`, `location_weight`, `code_weights`, `gaussian_overlap`,
    `min_radius`, `max_objects`, `score_threshold`, `iou_rectifier`, `nms_thresholds`; subclasses say their map's stride in voxels.
    """

    map_stride: float = 1

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """The labels that each head answers for."""
        c = self.config
        groups = [tuple(g) for g in c.head_groups] or [tuple(range(c.num_classes))]
        return groups if sorted(sum(groups, ())) == [*range(c.num_classes)] else [tuple(range(c.num_classes))]

    def frame(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(origin, cell) of the map: float [2] each, metres along x and y."""
        c = self.config
        cell = [v * self.map_stride for v in c.voxel_size[:2]]
        return torch.tensor(c.point_range[:2], device=device), torch.tensor(cell, device=device)

    def loss(self, batch: Batch) -> Losses:
        """Heatmap focal loss, L1 of the regressed values, L1 of the expected IoU, and 1 - DIoU, summed over heads and terms."""
        self._must_detect()
        c, (origin, cell) = self.config, self.frame(batch["points"].device)
        boxes, label = self._as_known(batch["boxes"]), self._in_range(batch["boxes"], batch["label"])
        terms: dict[str, Tensor] = {}
        for classes, out in zip(self.groups, self.forward_batch(batch), strict=True):
            size = (out.heatmap.shape[2], out.heatmap.shape[3])
            target = center_targets(boxes, label, classes, size, origin, cell, c.gaussian_overlap, c.min_radius)
            found = center_losses(out, target, origin, cell, c.location_weight, c.code_weights, c.iou_regression)
            terms = {k: terms[k] + v if k in terms else v for k, v in found.items()}
        return Losses(torch.stack([*terms.values()]).sum(), terms)

    def _in_range(self, boxes: Tensor, label: Tensor) -> Tensor:
        """Labels with -1 where a box's centre lies outside of the range, as no point of the map stands for it."""
        low, high = boxes.new_tensor(self.config.point_range[:3]), boxes.new_tensor(self.config.point_range[3:])
        return label.masked_fill(~((boxes[..., :3] >= low) & (boxes[..., :3] <= high)).all(-1), -1)

    def _as_known(self, boxes: Tensor) -> Tensor:
        """Boxes with as many values as the head has, velocities NaN where they are unknown."""
        if not self.config.velocity:
            return boxes[..., :7]
        return boxes if boxes.shape[-1] == 9 else torch.cat([boxes, boxes.new_full((*boxes.shape[:-1], 2), float("nan"))], -1)

    @torch.no_grad()
    def predict(self, batch: Batch) -> Boxes:
        """The best cells of each heatmap as boxes; scores corrected by the expected IoU; rotated NMS class by class."""
        self._must_detect()
        c, (origin, cell) = self.config, self.frame(batch["points"].device)
        found: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in batch["count"]]
        low, high = (torch.tensor(c.point_range[i : i + 3], device=cell.device) for i in (0, 3))
        margin = (high - low) * cell.new_tensor([0.035, 0.035, 1.0])  # centres of boxes may lie a little outside
        for classes, out in zip(self.groups, self.forward_batch(batch), strict=True):
            boxes, scores, which, iou = best_boxes(out, origin, cell, c.max_objects)
            label = torch.tensor(classes, device=which.device)[which]
            keep = (scores > c.score_threshold) & ((boxes[..., :3] >= low - margin) & (boxes[..., :3] <= high + margin)).all(-1)
            if iou is not None:
                r = of_class(c.iou_rectifier, label, scores)
                scores = scores ** (1 - r) * iou**r
            for i in range(len(boxes)):
                k = keep[i]
                found[i] += self._suppressed(boxes[i, k], scores[i, k], label[i, k])
        width = 9 if c.velocity else 7
        none = (cell.new_zeros(0, width), cell.new_zeros(0), torch.zeros(0, dtype=torch.int64, device=cell.device))
        samples = [[torch.cat(part) for part in zip(none, *parts, strict=True)] for parts in found]
        return Boxes([s[0] for s in samples], [s[1] for s in samples], [s[2] for s in samples])

    def _suppressed(self, boxes: Tensor, scores: Tensor, label: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        c, parts = self.config, []
        for k in label.unique().tolist():
            own = (label == k).nonzero()[:, 0]
            threshold = c.nms_thresholds[min(k, len(c.nms_thresholds) - 1)]
            own = own[nms_bev(boxes[own], scores[own], threshold, c.max_objects)]
            parts.append((boxes[own], scores[own], label[own]))
        return parts

    def _must_detect(self) -> None:
        if not self.config.num_classes:
            raise BadInput("a backbone alone", expected="a detector", got="num_classes=0", fix="create it with num_classes=3, say")


def of_class(values: tuple[float, ...], label: Tensor, like: Tensor) -> Tensor:
    """Each label's value; the last is any further label's."""
    return like.new_tensor(values)[label.clamp_max(len(values) - 1)]
