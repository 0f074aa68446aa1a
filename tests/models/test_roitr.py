from pathlib import Path

import pytest
import torch

from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.points.roitr import (
    Around,
    PPFAttention,
    SelfLayer,
    circle_loss,
    fine_loss,
    match_nodes,
    mutual_matches,
    node_overlaps,
    patches,
)
from formarium.nn.rigid import move, random_rotations

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "roitr").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters in (None, outcome.expected_parameters)


def moved(batch: dict, side: str, rotation: torch.Tensor, shift: torch.Tensor) -> dict:
    points = batch[side] @ rotation.T + shift
    mask = (torch.arange(points.shape[1]) < batch[f"{side}_count"][:, None])[..., None]
    return {**batch, side: points * mask, f"{side}_normals": batch[f"{side}_normals"] @ rotation.T}


@pytest.mark.parametrize("seed", range(4))
def test_claim_descriptors_are_the_same_under_any_rigid_motion(seed):
    torch.manual_seed(seed)
    model = create("roitr_micro").eval()
    batch = model.example_batch(2)
    g = torch.Generator().manual_seed(seed)
    turned = moved(batch, "source", random_rotations(1, g)[0], torch.randn(3, generator=g))
    turned = moved(turned, "target", random_rotations(1, g)[0], torch.randn(3, generator=g))
    with torch.no_grad():
        a, b = model.forward_batch(batch), model.forward_batch(turned)
    for name in ("source_node_features", "target_node_features", "source_features", "target_features"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-4, rtol=1e-4)
    assert (a.source_nodes - b.source_nodes).abs().max() > 0.01  # the points did move


def test_claim_correspondences_move_with_the_clouds():
    model = create("roitr_micro", confidence=0.0).eval()
    batch = model.example_batch(1)
    rotation, shift = random_rotations(1, torch.Generator().manual_seed(3))[0], torch.tensor([0.5, -1.0, 2.0])
    a, b = model.predict(batch), model.predict(moved(batch, "source", rotation, shift))
    n = min(len(a.source[0]), len(b.source[0]))
    assert n > 50 and abs(len(a.source[0]) - len(b.source[0])) <= 0.02 * n
    expected = {tuple(p) for p in (a.source[0] @ rotation.T + shift).mul(1e3).round().int().tolist()}
    found = {tuple(p) for p in b.source[0].mul(1e3).round().int().tolist()}
    assert len(expected & found) > 0.7 * len(expected)  # rounding may part the rest


def test_normals_that_are_flipped_in_one_cloud_break_it():
    model = create("roitr_micro").eval()
    batch = model.example_batch(1)
    with torch.no_grad():
        a = model.forward_batch(batch)
        b = model.forward_batch({**batch, "source_normals": batch["source_normals"] * torch.tensor([1.0, -1, 1])})
    assert (a.source_features - b.source_features).abs().max() > 1e-3


def test_the_position_of_superpoints_reaches_the_other_cloud():
    model = create("roitr_micro").eval()
    batch = model.example_batch(1)
    with torch.no_grad():
        before = model.forward_batch(batch).source_node_features
        for block in model.transformer.blocks:
            if isinstance(block, SelfLayer):
                for p in block.position_ffn.norm.parameters():
                    p.zero_()
        after = model.forward_batch(batch).source_node_features
    assert (before - after).abs().max() > 1e-4


def test_folded_positions_equal_the_plain_ones():
    torch.manual_seed(0)
    layer = PPFAttention(3, 10, 8, 2)
    x, near, ppf = torch.randn(2, 12, 3), torch.randint(12, (2, 5, 4)), torch.rand(2, 5, 4, 4)
    query = torch.randint(12, (2, 5))
    inner = layer.inner(x)
    e = layer.embed(ppf)
    b = torch.arange(2)[:, None]
    own = inner[b, query]
    q = layer.q(own).view(2, 5, 1, 2, 4)
    k = (layer.k(inner)[b[..., None], near] + layer.p(e)).view(2, 5, 4, 2, 4)
    v = (layer.v(inner)[b[..., None], near] + layer.vp(e)).view(2, 5, 4, 2, 4)
    share = ((q * k).sum(4) / 2).softmax(2)
    wanted = layer.outer(layer.norm(layer.out((share[..., None] * v).sum(2).flatten(2)) + own))
    torch.testing.assert_close(layer(x, query, Around(near, ppf, None)), wanted)
    some = torch.ones(2, 5, 4, dtype=torch.bool)
    some[..., 2:] = False
    short = layer(x, query, Around(near[..., :2], ppf[:, :, :2], None))
    torch.testing.assert_close(layer(x, query, Around(near, ppf, some)), short)


def test_published_sizes():
    with torch.device("meta"):
        assert create("roitr_3dmatch").parameters_count == 10102531
        assert create("roitr_4dmatch").parameters_count == 40259075


def test_points_go_to_their_nearest_superpoint():
    points = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0.3, 0, 0], [1.0, 0, 0], [0.9, 0, 0]])
    found = patches(points, points[[0, 3]], 2)
    assert found.index[0].tolist() == [0, 1] and found.mask.all()
    assert sorted(found.index[1].tolist()) == [3, 4]
    wide = patches(points, points[[0, 3]], 5)
    assert wide.mask.sum(1).tolist() == [3, 2]


def test_overlaps_are_shares_of_points_that_meet():
    a = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [5.0, 0, 0], [5.1, 0, 0]])
    b = torch.tensor([[0.01, 0, 0], [7.0, 0, 0], [0.02, 0.3, 0]])
    t, s = patches(a, a[[0, 2]], 4), patches(b, b[[0, 1]], 4)
    pairs, overlap = node_overlaps(a, b, t, s, 0.05)
    assert pairs.tolist() == [[0, 0]] and overlap.item() == pytest.approx(0.5)


def test_matching_superpoints():
    target, source = torch.eye(4)[:3], torch.eye(4)[[2, 0, 3]]
    t, s, score = match_nodes(target, source, 2, None)
    assert sorted(zip(t.tolist(), s.tolist(), strict=True)) == [(0, 1), (2, 0)] and (score[:-1] >= score[1:]).all()
    t, s, _ = match_nodes(target, source, 1, 0.75)
    assert sorted(zip(t.tolist(), s.tolist(), strict=True)) == [(0, 1), (2, 0)]  # all below the distance
    assert len(match_nodes(target, source, 5, 0.75)[0]) == 5  # and never fewer than asked for


def test_mutual_matches():
    scores = torch.tensor([[[0.9, 0.2, 0.0], [0.8, 0.3, 0.01], [0.1, 0.0, 0.6]]])
    yes = torch.ones(1, 3, dtype=torch.bool)
    assert [*zip(*(x.tolist() for x in mutual_matches(scores, yes, yes, 1, True, 0.05)), strict=True)] == [(0, 0, 0), (0, 2, 2)]
    assert len(mutual_matches(scores, yes, yes, 1, False, 0.05)[0]) == 4
    assert len(mutual_matches(scores, yes & torch.tensor([True, True, False]), yes, 1, True, 0.05)[0]) == 1
    assert len(mutual_matches(scores, yes, yes, 1, True, 0.7)[0]) == 1


def test_losses_fall_where_matches_are_right():
    c = create("roitr_micro").config
    pairs, overlap = torch.tensor([[0, 0], [1, 1], [2, 2]]), torch.tensor([0.5, 0.9, 0.3])
    right = circle_loss(torch.eye(3), torch.eye(3), pairs, overlap, c)
    wrong = circle_loss(torch.eye(3), torch.eye(3)[[1, 2, 0]], pairs, overlap, c)
    assert right < 0.1 < wrong
    alone = circle_loss(torch.eye(3), torch.eye(3), pairs[:0], overlap[:0], c)
    assert alone == 0
    plan = torch.full((1, 3, 3), -5.0)
    points, mask = torch.tensor([[[0.0, 0, 0], [1.0, 0, 0]]]), torch.ones(1, 2, dtype=torch.bool)
    plan[0, 0, 0] = plan[0, 1, 2] = plan[0, 2, 1] = -0.5  # one pair, and one each that has nobody
    assert fine_loss(plan, points, points + torch.tensor([[[0.0, 0, 0], [9.0, 0, 0]]]), mask, mask, 0.05) == 0.5


def test_true_descriptors_register_exactly():
    """With the points' own places as descriptors, the rest of the way to the motion is right."""
    for estimator in ("ransac", "svd"):
        model = create("roitr_micro", estimator=estimator, confidence=0.2).eval()
        batch = model.example_batch(2)
        half = model.example_points // 2
        for k in ("source", "source_normals"):
            batch[k] = batch[k][:, :half]
        batch["source_count"] = torch.full((2,), half)
        batch["target"] = move(batch["transform"], batch["source"])
        batch["target_normals"] = batch["source_normals"] @ batch["transform"][:, :3, :3].transpose(1, 2)
        batch["target_count"] = batch["source_count"]
        forward = model.forward_batch

        def places(batch, forward=forward):
            out = forward(batch)
            lift = torch.linspace(-3, 3, 30)[:, None, None]

            def code(x):  # a smooth code of places
                return torch.cat([torch.exp(-((x[..., i : i + 1] - lift[:, 0, 0] / 4) ** 2) * 400) for i in range(3)], -1) * 12

            unit = torch.nn.functional.normalize
            nodes = unit(code(out.source_nodes), dim=-1)
            features = code(batch["source"])
            return out._replace(source_node_features=nodes, target_node_features=nodes, source_features=features, target_features=features)

        model.forward_batch = places
        found = model.predict(batch)
        assert (found.transform - batch["transform"]).abs().max() < 0.1, estimator


def test_clouds_that_are_too_small_are_refused():
    model = create("roitr_micro")
    assert create("roitr_micro").least_points == 64
    inputs = list(model.example(2))
    inputs[2] = torch.tensor([63, 100])
    with pytest.raises(BadInput, match="at least 64 points in every cloud, got 63"):
        model(*inputs)
    with pytest.raises(BadInput, match="NaN"):
        model(inputs[0] * float("nan"), *inputs[1:])


def test_it_learns():
    torch.manual_seed(0)
    model = create("roitr_micro").train()
    batch = model.example_batch(2)
    optimiser = torch.optim.Adam(model.parameters(), 2e-3)
    seen = []
    for _ in range(15):
        total = model.loss(batch).total
        optimiser.zero_grad()
        total.backward()
        optimiser.step()
        seen.append(total.item())
    assert seen[-1] < 0.85 * seen[0]
