"""FCOS: who is assigned what, boxes and suppression, any backbone, released names, learning."""

import pytest
import torch

import formarium
from formarium.authors import authors_of, load_state
from formarium.models.dense.fcos import assign, boxes_at, centredness, suppress
from tests.models.test_semantic_fpn import BACKBONES


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_backbone_serves_by_name(backbone):
    torch.manual_seed(0)
    model = formarium.create("fcos_micro", backbone=backbone)
    batch = model.example_batch(2)
    model.loss(batch).total.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith(("neck.lateral", "head.")))
    said = model.eval().predict(batch)
    assert said.boxes.shape[:2] == said.scores.shape == said.labels.shape


def test_a_point_is_for_the_smallest_object_it_lies_in_of_its_levels_size():
    spots = torch.tensor([[10.0, 10.0], [40.0, 40.0], [10.0, 10.0], [90.0, 90.0]])
    steps = torch.tensor([8.0, 8.0, 16.0, 8.0])
    spans = torch.tensor([[0.0, 16.0], [0.0, 64.0], [16.0, 200.0], [0.0, 64.0]])
    boxes = torch.tensor([[[0.0, 0.0, 80.0, 80.0], [4.0, 4.0, 20.0, 20.0]]])
    labels = torch.tensor([[1, 2]])
    kind, sides = assign(spots, steps, spans, boxes, labels, radius=0)
    assert kind.tolist() == [[2, 1, 1, -1]]  # inside both: the smaller, unless its sides are too short for the level; outside: none
    assert sides[0, 0].tolist() == [6, 6, 10, 10]
    kind, _ = assign(spots, steps, spans, boxes, labels, radius=1.5)
    assert kind.tolist() == [[2, 1, -1, -1]]  # near the centre only
    assert (assign(spots, steps, spans, boxes, torch.full_like(labels, -1), 0)[0] == -1).all()
    assert (assign(spots, steps, spans, boxes[:, :0], labels[:, :0], 0)[0] == -1).all()


def test_boxes_and_centredness_by_hand():
    sides = torch.tensor([[1.0, 2.0, 3.0, 2.0], [2.0, 2.0, 2.0, 2.0]])
    assert boxes_at(torch.tensor([[5.0, 5.0]]), sides[:1]).tolist() == [[4, 3, 8, 7]]
    assert centredness(sides).tolist() == pytest.approx([(1 / 3) ** 0.5, 1.0])


def test_suppression_is_within_a_class():
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 11, 11], [0, 0, 10, 10], [30, 30, 40, 40]])
    scores, labels = torch.tensor([0.5, 0.9, 0.4, 0.3]), torch.tensor([1, 1, 2, 1])
    assert suppress(boxes, scores, labels, 0.5).tolist() == [1, 2, 3]
    assert suppress(boxes[:0], scores[:0], labels[:0], 0.5).tolist() == []


def test_released_names_go_both_ways():
    model = formarium.create("fcos_micro").eval()
    theirs = authors_of("fcos").export_state(model)
    assert {"bbox_head.scales.0.scale", "bbox_head.cls_convs.0.gn.weight", "neck.fpn_convs.3.conv.weight"} <= {*theirs}
    other = formarium.create("fcos_micro").eval()
    load_state(other, theirs)
    image = model.example()
    assert all(torch.equal(a, b) for a, b in zip(model(*image), other(*image), strict=True))


def test_it_learns():
    run = formarium.fit("fcos_micro", "sample:shapes", steps=30, progress=False, validations=1)
    losses = [v for _, v in run.curve("loss")]
    assert losses[-1] < 0.8 * losses[0]
