"""FCOS (Tian et al., ICCV 2019, arXiv 1904.01355; TPAMI 2020) on any image backbone.

Detection without anchors: each point of a feature pyramid (P3 to P7 in the paper) says the class of the object it lies in, its distances to
the object's four sides, and how central it is. A point serves the smallest object that it lies centrally in and whose size its level is
for;
scores are class times centredness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.features import Tap
from formarium.model import Batch, Losses
from formarium.nn.fpn import FPN, group_norm
from formarium.nn.image_boxes import generalised_iou, iou, to_corners
from formarium.nn.matching import sigmoid_focal
from formarium.tasks.image_classification.backbones import make_backbone, padded_to, pyramid_channels
from formarium.tasks.object_detection.model import Detections, Detector

FAR = 1e8


class Points(NamedTuple):
    """What each point says, all levels in a row. logits: [batch, points, classes]; sides: [batch, points, 4], distances to left, top,
    right and bottom in pixels; centredness: [batch, points], a logit."""

    logits: Tensor
    sides: Tensor
    centredness: Tensor


class Head(nn.Module):
    """Two towers of 3x3 convolutions with group norm, shared by all levels; class from one, sides (times a learned scale a level) and
    centredness from the other."""

    def __init__(self, levels: int, dim: int, classes: int, convs: int = 4, prior: float = 0.01):
        super().__init__()

        def tower() -> nn.Sequential:
            made: list[nn.Module] = []
            for _ in range(convs):
                made += [nn.Conv2d(dim, dim, 3, padding=1), group_norm(dim), nn.ReLU()]
            return nn.Sequential(*made)

        self.class_tower, self.box_tower = tower(), tower()
        self.classify = nn.Conv2d(dim, classes, 3, padding=1)
        self.measure = nn.Conv2d(dim, 4, 3, padding=1)
        self.centre = nn.Conv2d(dim, 1, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(levels))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        nn.init.constant_(self.classify.bias, -math.log((1 - prior) / prior))  # type: ignore[arg-type]

    def forward(self, maps: list[Tensor], strides: list[int]) -> Points:
        found = []
        for i, x in enumerate(maps):
            kind, box = self.class_tower(x), self.box_tower(x)
            sides = F.relu(self.measure(box) * self.scales[i]) * strides[i]  # in units of the stride, as the released code with its norms
            found.append([t.flatten(2).transpose(1, 2) for t in (self.classify(kind), sides, self.centre(box))])
        logits, sides, centre = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return Points(logits, sides, centre[..., 0])


class FCOS(Detector):
    @dataclass(frozen=True)
    class Config:
        backbone: str = "pvt_tiny"  # a variant of the catalogue, "vit" or "swin"
        backbone_config: Mapping[str, Any] = field(default_factory=dict)  # what differs from that variant's config
        first: int = 1  # the pyramid's maps from here on are used: its stride 8
        extra: int = 2  # levels beyond the pyramid's last map
        dim: int = 256
        convs: int = 4
        ranges: tuple[float, ...] = (64, 128, 256, 512)  # the largest distance that each level but the last is for, in pixels
        radius: float = 1.5  # of the centre that counts as inside, in strides (0: the whole box)
        multiple: int = 32  # sides are padded to multiples of this
        score_threshold: float = 0.05
        nms: float = 0.6  # overlap above which the weaker of two boxes of a class falls
        num_classes: int = 91

    def __init__(self, config: Config):
        super().__init__(config)
        c = config
        self.backbone = make_backbone(c.backbone, c.backbone_config)
        channels = pyramid_channels(self.backbone)
        self.first = min(c.first, len(channels) - 1)
        self.neck = FPN(channels[self.first :], c.dim, c.extra)
        self.features = Tap()
        self.head = Head(len(channels) - self.first + c.extra, c.dim, c.num_classes, c.convs)

    # the network ------------------------------------------------------------------------------------------------------

    def forward(self, image: Tensor, padding: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised image [batch, 3, height, width], any size, zeros under the padding mask [batch, height, width]. Gives `Points`."""
        return tuple(self.head(*self._maps(image)))

    def _maps(self, image: Tensor) -> tuple[list[Tensor], list[int]]:
        x = padded_to(image, self.config.multiple)
        maps = self.neck(self.backbone.pyramid(x)[self.first :])
        grid = (maps[0].shape[2], maps[0].shape[3])
        maps[0] = self.features(maps[0].flatten(2).transpose(1, 2), grid=grid).transpose(1, 2).unflatten(2, grid)
        return maps, [max(1, round(x.shape[3] / m.shape[3])) for m in maps]

    def places(self, maps: list[Tensor], strides: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(x, y) of every point in pixels [points, 2], the middle of its cell; its stride [points]; the distances it is for [points, 2]."""
        spots, steps, spans = [], [], []
        limits = [0.0, *self.config.ranges[: len(maps) - 1]]
        limits = [*limits, *(limits[-1:] * (len(maps) - len(limits))), FAR]
        for i, (m, stride) in enumerate(zip(maps, strides, strict=True)):
            y, x = torch.meshgrid(*(torch.arange(n, device=m.device) for n in m.shape[2:]), indexing="ij")
            spots.append((torch.stack([x, y], -1).flatten(0, 1) + 0.5) * stride)
            steps.append(m.new_full((len(spots[-1]),), stride))
            spans.append(m.new_tensor([limits[i], limits[i + 1]]).expand(len(spots[-1]), 2))
        return torch.cat(spots), torch.cat(steps), torch.cat(spans)

    # the objective ----------------------------------------------------------------------------------------------------

    def loss(self, batch: Batch) -> Losses:
        """Focal loss of the class, 1 - GIoU of the box weighted by centredness, cross entropy of centredness; sums over points by the
        number of those that have an object (eq. 2)."""
        maps, strides = self._maps(self.prepared(batch))
        said = self.head(maps, strides)
        spots, steps, spans = self.places(maps, strides)
        scale = batch["size"].flip(1).repeat(1, 2)[:, None]
        kind, sides = assign(spots, steps, spans, to_corners(batch["boxes"]) * scale, batch["labels"], self.config.radius)
        has = kind >= 0
        count = has.sum().clamp_min(1)
        wanted = F.one_hot(kind.clamp_min(0), self.config.num_classes) * has[..., None]
        focal = sigmoid_focal(said.logits.float(), wanted.float()).sum() / count
        true = centredness(sides[has])
        at = spots.expand(len(has), -1, -1)[has]
        overlap = generalised_iou(boxes_at(at, said.sides.float()[has]), boxes_at(at, sides[has]))
        box = ((1 - overlap) * true).sum() / true.sum().clamp_min(1e-6)
        centre = F.binary_cross_entropy_with_logits(said.centredness.float()[has], true, reduction="sum") / count
        return Losses(focal + box + centre, {"focal": focal, "giou": box, "centredness": centre})

    # prediction -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(self, batch: Batch, most: int = 100, before: int = 1000) -> Detections:
        """The likeliest `before` points and classes, after suppression within each class, at most `most`, best first."""
        maps, strides = self._maps(self.prepared(batch))
        said = self.head(maps, strides)
        spots, _, _ = self.places(maps, strides)
        scores = (said.logits.float().sigmoid() * said.centredness.float().sigmoid()[..., None]).sqrt()
        size = batch["size"].flip(1).repeat(1, 2)
        stretch = batch["original_size"].flip(1).repeat(1, 2) / size
        rows = []
        for i in range(len(scores)):
            best, index = scores[i].flatten().topk(min(before, scores[i].numel()))
            point, label = index // scores.shape[2], index % scores.shape[2]
            boxes = boxes_at(spots[point], said.sides[i].float()[point]).clamp_min(0).minimum(size[i])
            good = (best > self.config.score_threshold) & (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
            kept = suppress(boxes[good], best[good], label[good], self.config.nms)[:most]
            rows.append((best[good][kept], label[good][kept], boxes[good][kept] * stretch[i]))
        longest = max(1, *(len(r[0]) for r in rows))
        score, label, box = (
            torch.stack([F.pad(r[k], (0, 0) * (r[k].ndim - 1) + (0, longest - len(r[k]))) for r in rows]) for k in range(3)
        )
        return Detections(score, label, box)

    def no_weight_decay(self) -> set[str]:
        return {f"backbone.{g}" for g in self.backbone.no_weight_decay()} | {"head.scales"}


def boxes_at(spots: Tensor, sides: Tensor) -> Tensor:
    """Points [..., 2] and distances to left, top, right, bottom [..., 4] -> corner boxes [..., 4]."""
    return torch.cat([spots - sides[..., :2], spots + sides[..., 2:]], -1)


def centredness(sides: Tensor) -> Tensor:
    """sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)) of distances [n, 4], 0 to 1 (eq. 3)."""
    across, down = sides[:, 0::2], sides[:, 1::2]
    return (across.amin(1) / across.amax(1).clamp_min(1e-6) * down.amin(1) / down.amax(1).clamp_min(1e-6)).clamp_min(0).sqrt()


@torch.no_grad()
def assign(spots: Tensor, steps: Tensor, spans: Tensor, boxes: Tensor, labels: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    """Which object each point is for (section 3.2): the smallest of those it lies in (near whose centre it lies, with a radius in strides)
    and
    whose farthest side is within the distances its level is for.

    spots: [points, 2]; steps: [points]; spans: [points, 2]; boxes: corners in pixels [batch, objects, 4]; labels: int64 [batch, objects],
    -1 for none. Returns its class, int64 [batch, points] (-1: none), and its distances to that object's sides [batch, points, 4].
    """
    if boxes.shape[1] == 0:
        none = torch.full((len(boxes), len(spots)), -1, dtype=torch.int64, device=spots.device)
        return none, spots.new_zeros(len(boxes), len(spots), 4)
    at = spots[None, :, None]
    sides = torch.cat([at - boxes[:, None, :, :2], boxes[:, None, :, 2:] - at], -1)  # batch points objects 4
    inside = sides.amin(-1) > 0
    if radius > 0:
        middle = (boxes[..., :2] + boxes[..., 2:])[:, None] / 2
        inside &= ((at - middle).abs() < radius * steps[None, :, None, None]).all(-1)
    far = sides.amax(-1)
    fits = inside & (far > spans[None, :, None, 0]) & (far <= spans[None, :, None, 1]) & (labels >= 0)[:, None]
    extent = (boxes[..., 2:] - boxes[..., :2]).prod(-1)[:, None].expand_as(far)
    area, which = extent.masked_fill(~fits, FAR**2).min(-1)
    kind = labels.gather(1, which).masked_fill(area >= FAR**2, -1)
    return kind, sides.gather(2, which[..., None, None].expand(-1, -1, 1, 4))[:, :, 0]


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, threshold: float) -> Tensor:
    """Greedy non-maximum suppression within each class: indices of the corner boxes [n, 4] kept, best score first."""
    order = scores.argsort(descending=True, stable=True)
    b, kind = boxes[order], labels[order]
    beats = ((iou(b[:, None], b[None])[0] > threshold) & (kind[:, None] == kind[None])).triu(1).cpu()
    alive = torch.ones(len(order), dtype=torch.bool)
    for i in range(len(order)):
        if alive[i]:
            alive &= ~beats[i]
    return order[alive.to(order.device)]
