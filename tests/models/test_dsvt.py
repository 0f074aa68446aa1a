from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.points.dsvt import Pool, Stage, rotated_sets, windows_of

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "dsvt").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    if path.stem == "dsvt_query_head":  # a part, replayed with its weights loaded strictly
        assert outcome.parameters is None and outcome.expected_parameters == 896415
    else:
        assert outcome.parameters == outcome.expected_parameters


def voxels(count: int, side: int = 48, depth: int = 1, seed: int = 0) -> torch.Tensor:
    """int64 [count, 4] (sample, z, y, x), two samples."""
    g = torch.Generator().manual_seed(seed)
    flat = torch.randperm(2 * depth * side * side, generator=g)[:count]
    return torch.stack([flat // (depth * side * side), flat % depth, flat // depth % side, flat // (depth * side) % side], 1)


@pytest.mark.parametrize(
    ("count", "tau", "window"), [(900, 36, (12, 12, 1)), (60, 5, (12, 12, 1)), (2500, 7, (8, 10, 2)), (1, 4, (6, 6, 1))]
)
def test_claim_sets_of_exactly_tau_slots_cover_every_window(count, tau, window):
    coordinates = voxels(count, depth=window[2])
    windows = windows_of(coordinates, (48, 48, window[2]), window, (3, 3, 0))
    by_y, by_x = rotated_sets(windows, window, tau)
    for sets in (by_y, by_x):
        assert sets.voxel.shape[1] == tau
        assert sorted(set(sets.voxel.flatten().tolist())) == list(range(count))
        owner = windows.window[sets.voxel]
        assert (owner == owner[:, :1]).all()  # no set crosses a window
        distinct = sets.keep.sum(1)
        for w in owner[:, 0].unique():
            sizes = distinct[owner[:, 0] == w]
            assert sizes.max() - sizes.min() <= 1
            assert len(sizes) == -(-int((windows.window == w).sum()) // tau)
        assert (sets.voxel.flatten()[sets.first] == torch.arange(count)).all()
    if count > 2 * tau:
        assert not torch.equal(by_y.voxel, by_x.voxel)


def test_sets_follow_the_formula_and_their_order():
    coordinates = torch.tensor([[0, 0, y, x] for y in range(3) for x in range(3)])
    windows = windows_of(coordinates, (12, 12, 1), (12, 12, 1), (0, 0, 0))
    by_y, by_x = rotated_sets(windows, (12, 12, 1), 6)
    ranks = [[(k * 6 + j) * 9 // 12 for j in range(6)] for k in range(2)]
    assert by_y.voxel.tolist() == ranks  # y-major is the order they were listed in
    assert by_x.voxel.tolist() == [[r % 3 * 3 + r // 3 for r in row] for row in ranks]
    assert by_y.keep.tolist()[0] == [True, False, True, True, True, False]  # ranks 0 0 1 2 3 3


def test_claim_work_grows_linearly_with_the_voxels():
    model = create("dsvt_pillar", dims=(32,), hidden=(64,), heads=(4,), depths=(2,)).eval()

    def flops(scale: int) -> int:
        """Of scale times as many windows, each as full."""
        base = voxels(600, side=36)
        parts = [base + torch.tensor([0, 0, 0, 36 * i]) for i in range(scale)]
        at = torch.cat(parts)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model.backbone(torch.zeros(len(at), 32), at, 2)
        return counter.get_total_flops()

    table = flops(1) - (flops(2) - flops(1))  # positions are embedded once a place: what doesn't grow
    assert table >= 0
    assert (flops(8) - table) == pytest.approx(8 * (flops(1) - table), rel=0.06)


def test_voxels_of_other_windows_and_samples_play_no_part_in_a_layer():
    model = create("dsvt_pillar", dims=(16,), hidden=(32,), heads=(2,), depths=(1,)).eval()
    at = torch.cat([voxels(200, side=12), voxels(150, side=12, seed=1) + torch.tensor([0, 0, 0, 24])])
    x = torch.randn(350, 16)
    with torch.no_grad():
        both, _ = model.backbone(x, at, 2)
        alone, _ = model.backbone(x[:200], at[:200], 2)
    torch.testing.assert_close(both[:200], alone)


def test_the_order_of_the_voxels_does_not_matter():
    model = create("dsvt_micro").backbone.eval()
    at = voxels(300, side=30, depth=4)
    x, order = torch.randn(300, 24), torch.randperm(300)
    with torch.no_grad():
        a, at_a = model(x, at, 2)
        b, at_b = model(x[order], at[order], 2)
    torch.testing.assert_close(a, b)
    assert torch.equal(at_a, at_b)


def test_positions_take_the_layers_windows_as_released_and_the_sets_windows_as_published():
    released = create("dsvt_pillar").backbone.stages[0]
    paper = create("dsvt_pillar", matched_positions=True).backbone.stages[0]
    assert [[released.geometry(b, i) for i in range(2)] for b in range(2)] == [[0, 1], [0, 1]]
    assert [[paper.geometry(b, i) for i in range(2)] for b in range(2)] == [[0, 0], [1, 1]]
    assert isinstance(paper, Stage) and paper.positions[1][0].window == (24, 24, 1)


def test_a_table_of_positions_gives_what_each_voxel_would():
    embed = create("dsvt_pillar").backbone.stages[0].positions[0][0].eval()
    place = torch.stack([torch.randint(12, (500,)), torch.randint(12, (500,)), torch.zeros(500, dtype=torch.int64)], 1)
    with torch.no_grad():
        torch.testing.assert_close(embed(place), torch.cat([embed(p) for p in place.split(50)]))


def test_pooling_by_the_maximum_counts_empty_slots_as_zero():
    pool = Pool(2, 2, (1, 1, 2), "maxpool")
    x = torch.tensor([[-1.0, 3.0], [-2.0, -3.0], [5.0, -1.0]])
    at = torch.tensor([[0, 0, 0, 0], [0, 1, 0, 0], [0, 2, 0, 0]])
    pooled, where = pool(x, at, (4, 4, 4))
    assert pooled.tolist() == [[-1.0, 3.0], [5.0, 0.0]]
    assert where.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]


def test_attention_pooling_is_multi_head_attention_over_slots():
    pool = Pool(16, 16, (1, 1, 4), "attention", heads=8)
    torch.nn.init.normal_(pool.slots)
    plain = torch.nn.MultiheadAttention(16, 8, batch_first=True)
    with torch.no_grad():
        plain.in_proj_weight.copy_(pool.qkv.weight)
        plain.in_proj_bias.copy_(pool.qkv.bias)
        plain.out_proj.load_state_dict(pool.out.state_dict())
        dense = torch.randn(5, 4, 16)
        most = dense.amax(1, keepdim=True)
        wanted = pool.norm(plain(most, dense + pool.slots, dense)[0] + most)[:, 0]
        torch.testing.assert_close(pool.reduce(dense), wanted)


def test_backbone_until_it_is_given_classes():
    with torch.device("meta"):
        assert create("dsvt_voxel").parameters_count == 3133824
        assert create("dsvt_pillar", num_classes=3).parameters_count > 8_000_000
        nuscenes = create("dsvt_pillar_nuscenes", num_classes=10)
        frames = create("dsvt_pillar_4f", num_classes=3)
    assert sum(p.numel() for p in nuscenes.head.parameters()) == 896415 and nuscenes.map_stride == 2
    assert frames.vfe.layers[0].linear.in_features == 6 + 6
    backbone = create("dsvt_pillar", dims=(16,), hidden=(16,), heads=(2,), depths=(1,)).eval()
    features, at = backbone(*backbone.example(2, points=50))
    assert features.shape == (100, 16) and at.shape == (100, 4)
    with pytest.raises(BadInput, match="backbone alone"):
        backbone.predict({"points": None})


def test_velocities_that_are_unknown_do_not_count():
    model = create("dsvt_micro", velocity=True, num_classes=3, head_groups=((0,), (1, 2)), code_weights=(1.0,) * 10)
    batch = model.example_batch(2)
    torch.manual_seed(0)
    plain = model.loss(batch)
    unknown = torch.full((2, 4, 2), float("nan"))
    assert torch.equal(model.loss({**batch, "boxes": torch.cat([batch["boxes"], unknown], -1)}).total, plain.total)
    known = model.loss({**batch, "boxes": torch.cat([batch["boxes"], torch.ones(2, 4, 2)], -1)})
    assert known.terms["regression"] > plain.terms["regression"]
    model.eval()
    assert model.predict(batch).boxes[0].shape[1] == 9


def test_a_perfect_head_gives_the_true_boxes_back():
    model = create("dsvt_micro", score_threshold=0.5).eval()
    batch = model.example_batch(2)
    from formarium.nn.center_head import Centers, center_targets

    origin, cell = model.frame(torch.device("cpu"))
    target = center_targets(batch["boxes"], batch["label"], (0, 1), (64, 64), origin, cell, 0.1, 1)
    maps = torch.zeros(2, 8, 64 * 64)
    maps.scatter_(2, target.cell[:, None].expand(-1, 8, -1), torch.where(target.valid[..., None], target.values, 0.0).transpose(1, 2))
    maps = maps.view(2, 8, 64, 64)
    # a heatmap of 1 at centres only, and an IoU branch that is sure
    heat = torch.where(target.heatmap == 1, 12.0, -12.0)
    out = Centers(heat, maps[:, :2], maps[:, 2:3], maps[:, 3:6], maps[:, 6:8], torch.ones(2, 1, 64, 64), None)
    model.forward_batch = lambda batch: [out]
    found = model.predict(batch)
    for i in range(2):
        real = batch["boxes"][i][batch["label"][i] >= 0]
        for box, label in zip(found.boxes[i], found.labels[i], strict=True):
            near = (real - box).abs().sum(1).argmin()
            torch.testing.assert_close(real[near], box, atol=1e-4, rtol=1e-4)
            assert batch["label"][i][near] == label
        assert 1 <= len(found.boxes[i]) <= 3
    losses = model.loss(batch)
    assert losses.terms["regression"] < 1e-4 and losses.terms["diou"] < 1e-4 and losses.terms["heatmap"] < 0.1


def test_boxes_off_the_map_are_no_targets():
    model = create("dsvt_micro")
    batch = model.example_batch(2)
    torch.manual_seed(0)
    plain = model.loss(batch)
    outside = {**batch, "boxes": batch["boxes"].clone(), "label": batch["label"].clone()}
    outside["boxes"][:, 3] = torch.tensor([40.0, 0.0, -1.0, 4.0, 2.0, 1.5, 0.0])
    outside["label"][:, 3] = 0
    assert torch.equal(model.loss(outside).total, plain.total)
    outside["boxes"][:, 3, 0] = 8.0
    assert not torch.equal(model.loss(outside).total, plain.total)


QUERIES = {"queries": 20, "query_radius": 4, "query_heads": 4, "query_hidden": 32, "point_classes": (1,), "velocity": True}


def test_perfect_queries_give_the_true_boxes_back():
    from formarium.nn.query_head import Queries, query_values

    model = create("dsvt_micro", **QUERIES, nms_thresholds=(1.0, 0.2), iou_rectifier=(0.5,), num_classes=2).eval()
    batch = model.example_batch(2)
    origin, cell = model.frame(torch.device("cpu"))
    label = batch["label"].clamp_min(0)
    values = query_values(torch.cat([batch["boxes"], torch.ones(2, 4, 2)], -1), origin, cell)
    logits = torch.full((2, 4, 2), -12.0)
    logits.scatter_(2, label[..., None], torch.where(batch["label"] >= 0, 12.0, -12.0)[..., None])
    prior = (batch["label"] >= 0).float()  # what was no proposal has no score
    model.forward_batch = lambda batch: Queries(torch.full((2, 2, 64, 64), -12.0), label, prior, logits, values, torch.ones(2, 4))
    found = model.predict(batch)
    for i in range(2):
        real = batch["label"][i] >= 0
        assert len(found.boxes[i]) == real.sum() and found.boxes[i].shape[1] == 9
        for box, which in zip(found.boxes[i], found.labels[i], strict=True):
            near = (batch["boxes"][i][real] - box[:7]).abs().sum(1).argmin()
            torch.testing.assert_close(batch["boxes"][i][real][near], box[:7], atol=1e-4, rtol=1e-4)
            assert which == batch["label"][i][real][near]
    losses = model.loss(batch)
    assert [*losses.terms] == ["heatmap", "label", "regression", "iou"]
    assert losses.terms["regression"] < 1e-4 and losses.terms["label"] < 1e-3


def test_pedestrians_are_suppressed_and_cars_are_not():
    from formarium.nn.query_head import Queries, query_values

    model = create("dsvt_micro", **QUERIES, nms_thresholds=(1.0, 0.175), num_classes=2).eval()
    box = torch.tensor([3.0, 3.0, -1.0, 1.0, 1.0, 1.5, 0.0, 0.0, 0.0])
    boxes = torch.stack([box, box + torch.tensor([0.1] + [0.0] * 8)] * 2)[None]
    label = torch.tensor([[0, 0, 1, 1]])
    origin, cell = model.frame(torch.device("cpu"))
    logits = torch.full((1, 4, 2), 2.0) - torch.arange(4)[None, :, None] * 0.1
    out = Queries(torch.zeros(1, 2, 64, 64), label, torch.ones(1, 4), logits, query_values(boxes, origin, cell), torch.ones(1, 4))
    model.forward_batch = lambda batch: out
    found = model.predict({"points": torch.zeros(1, 1, 4), "count": torch.ones(1)})
    assert found.labels[0].tolist() == [0, 0, 1]


def test_a_detectors_weights_have_the_released_names():
    from formarium.authors import authors_of

    model = create("dsvt_micro", **QUERIES)
    theirs = authors_of("dsvt").export_state(model)
    for name, shape in {
        "dense_head.decoder.self_attn.in_proj_weight": (72, 24),
        "dense_head.decoder.cross_posembed.position_embedding_head.0.weight": (24, 2, 1),
        "dense_head.heatmap_head.0.conv.weight": (24, 24, 3, 3),
        "dense_head.heatmap_head.1.bias": (2,),
        "dense_head.class_encoding.weight": (24, 2, 1),
        "dense_head.prediction_head.vel.0.1.running_var": (64,),
        "dense_head.prediction_head.heatmap.1.weight": (2, 64, 1),
        "dense_head.shared_conv.weight": (24, 48, 3, 3),
    }.items():
        assert tuple(theirs[name].shape) == shape
    assert set(authors_of("dsvt").import_state(theirs, model)) == set(model.state_dict())


def test_a_model_of_several_frames_wants_them():
    from formarium.task import task

    data = task("lidar-detection").sample("street")
    with pytest.raises(BadInput, match=r"clouds of 4 sweeps, got street, read with frames=1"):
        create("dsvt_micro", frames=4).study(data)
    moving = task("lidar-detection").sample("moving-street")
    model = create("dsvt_micro", bev_strides=(2, 2), **moving.model_args)
    model.study(moving)
    prepare, rng = task("lidar-detection").transform({}), np.random.default_rng(0)
    batch = task("lidar-detection").collate([prepare(moving.splits["train"][0], rng)])
    plain = model.loss(batch).total
    batch["points"] = batch["points"] * torch.tensor([1.0, 1, 1, 1, 0])
    assert torch.isfinite(plain) and not torch.equal(model.loss(batch).total, plain)  # the age is seen


def test_fit_pastes_until_the_recipe_says_to_stop():
    from formarium import fit
    from formarium.task import Data
    from formarium.tasks.lidar_detection.sample import Street

    street = Data("street", "lidar-detection", {"train": Street(0, 0, 4), "val": Street(0, 160, 1)}, {}, ("car", "pedestrian"))
    model, seen = create("dsvt_micro", bev_strides=(2, 2)), []
    loss = model.loss
    model.loss = lambda batch: (seen.append(int((batch["label"] >= 0).sum())), loss(batch))[1]
    recipe = {"epochs": 2, "batch_size": 2, "paste": 12, "paste_points": 1, "unpasted_epochs": 1}
    fit(model, street, recipe=recipe, precision="float32", validations=1, progress=False)
    own = sum(len(street.splits["train"][i]["label"]) for i in range(4))
    assert seen[2] + seen[3] == own < seen[0] + seen[1]


def test_points_that_cannot_be_used_are_refused():
    model = create("dsvt_micro").eval()
    points, count = model.example(2)
    with pytest.raises(BadInput, match=r"sample 1: expected points in the range.*none in it"):
        model(torch.stack([points[0], points[1] + 500]), count)
    with pytest.raises(BadInput, match=r"features = 4"):
        model(torch.cat([points, points[..., :1]], 2), count)
    with pytest.raises(BadInput, match="NaN"):
        model(points * float("nan"), count)
    with pytest.raises(BadInput, match="stages"):
        create("dsvt_micro", depths=(1,))
    with pytest.raises(BadInput, match="space"):
        create("dsvt_micro", space=(60, 64, 4))


@pytest.mark.parametrize("head", [{}, QUERIES], ids=["centres", "queries"])
def test_it_learns(head):
    from formarium.task import task

    t = task("lidar-detection")
    data = t.sample("street")
    prepare, rng = t.transform({}), np.random.default_rng(0)
    batch = t.collate([prepare(data.splits["train"][i], rng) for i in range(1)])
    torch.manual_seed(0)
    model = create("dsvt_micro", bev_strides=(2, 2), **head).train()
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    seen = []
    for _ in range(25):
        losses = model.loss(batch)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        seen.append(losses.total.item())
    assert seen[-1] < 0.4 * seen[0]
