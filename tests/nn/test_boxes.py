import math

import numpy as np
import pytest
import torch

from formarium.nn.ops.boxes import corners_bev, iou_3d_pairs, iou_bev, iou_bev_pairs, nms_bev, overlap_bev


def box(x=0.0, y=0.0, dx=2.0, dy=1.0, yaw=0.0, z=0.0, dz=1.0):
    return torch.tensor([[x, y, z, dx, dy, dz, yaw]])


@pytest.mark.parametrize(
    ("a", "b", "area"),
    [
        (box(), box(), 2.0),
        (box(), box(x=1.0), 1.0),
        (box(), box(x=5.0), 0.0),
        (box(), box(yaw=math.pi / 2), 1.0),
        (box(dx=2, dy=2), box(dx=2, dy=2, yaw=math.pi / 4), 8 * (math.sqrt(2) - 1)),  # a regular octagon
        (box(dx=10, dy=10), box(yaw=0.3), 2.0),  # one inside the other
        (box(x=1000.0, y=-500.0), box(x=1001.0, y=-500.0), 1.0),
    ],
)
def test_overlaps_that_are_known(a, b, area):
    assert overlap_bev(a, b).item() == pytest.approx(area, abs=1e-3)
    assert overlap_bev(b, a).item() == pytest.approx(area, abs=1e-3)


def test_overlap_against_counted_points():
    rng = np.random.default_rng(0)
    spots = torch.from_numpy(rng.uniform(-4, 4, (40000, 2))).float()
    boxes = torch.from_numpy(rng.uniform([-1, -1, 0, 1, 1, 1, -3], [1, 1, 0, 4, 3, 1, 3], (12, 7))).float()

    def holds(b):
        c, s = b[6].cos(), b[6].sin()
        d = spots - b[:2]
        return ((d[:, 0] * c + d[:, 1] * s).abs() <= b[3] / 2) & ((d[:, 1] * c - d[:, 0] * s).abs() <= b[4] / 2)

    for a, b in zip(boxes[:6], boxes[6:], strict=True):
        counted = (holds(a) & holds(b)).float().mean().item() * 64
        assert overlap_bev(a[None], b[None]).item() == pytest.approx(counted, abs=0.12)


def test_iou():
    assert iou_bev_pairs(box(), box(x=1.0)).item() == pytest.approx(1 / 3, abs=1e-4)
    assert iou_3d_pairs(box(), box(z=0.5)).item() == pytest.approx(1 / 3, abs=1e-4)
    assert iou_3d_pairs(box(), box(z=2.0)).item() == 0
    many = torch.cat([box(), box(x=1.0), box(x=50.0)])
    assert iou_bev(many, many).diagonal().tolist() == pytest.approx([1, 1, 1], abs=1e-4)
    assert iou_bev(many[:0], many).shape == (0, 3)


def test_corners_turn_counter_clockwise():
    torch.testing.assert_close(corners_bev(box(yaw=math.pi / 2))[0, 0], torch.tensor([-0.5, 1.0]), atol=1e-6, rtol=0)


def test_suppression_is_greedy():
    boxes = torch.cat([box(), box(x=0.8), box(x=1.6), box(x=9.0)])
    scores = torch.tensor([0.6, 0.9, 0.7, 0.1])
    assert nms_bev(boxes, scores, 0.3).tolist() == [1, 3]
    assert nms_bev(boxes, scores, 0.5).tolist() == [1, 2, 0, 3]
    assert nms_bev(boxes, scores, 0.5, most=1).tolist() == [1]
    assert nms_bev(boxes[:0], scores[:0], 0.5).tolist() == []
