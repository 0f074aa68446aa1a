from pathlib import Path

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
    assert len(nuscenes.head.heads) == 6 and nuscenes.map_stride == 2
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
    target = center_targets(batch["boxes"], batch["label"], (0, 1), (32, 32), origin, cell, 0.1, 1)
    maps = torch.zeros(2, 8, 32 * 32)
    maps.scatter_(2, target.cell[:, None].expand(-1, 8, -1), torch.where(target.valid[..., None], target.values, 0.0).transpose(1, 2))
    maps = maps.view(2, 8, 32, 32)
    # a heatmap of 1 at centres only, and an IoU branch that is sure
    heat = torch.where(target.heatmap == 1, 12.0, -12.0)
    out = Centers(heat, maps[:, :2], maps[:, 2:3], maps[:, 3:6], maps[:, 6:8], torch.ones(2, 1, 32, 32), None)
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


def test_it_learns():
    from formarium.task import task

    t = task("lidar-detection")
    data = t.sample("street")
    import numpy as np

    prepare, rng = t.transform({}), np.random.default_rng(0)
    batch = t.collate([prepare(data.splits["train"][i], rng) for i in range(2)])
    torch.manual_seed(0)
    model = create("dsvt_micro").train()
    optimiser = torch.optim.AdamW(model.parameters(), 5e-3)
    seen = []
    for _ in range(25):
        losses = model.loss(batch)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        seen.append(losses.total.item())
    assert seen[-1] < 0.4 * seen[0]
