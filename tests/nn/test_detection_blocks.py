import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from formarium.nn.deformable_decoder import QueryAttention
from formarium.nn.image_boxes import from_corners, generalised_iou, inverse_sigmoid, iou, to_corners
from formarium.nn.mask_codes import crop_masks, decode_masks, encode_masks, paste_masks, zigzag
from formarium.nn.matching import detection_cost, hungarian, sigmoid_focal
from formarium.nn.ops.deformable_attention import DeformableAttention, deformable_attention, sampled_by_bag, sampled_by_grid
from formarium.nn.shifted_windows import shift_mask, sine_positions
from formarium.nn.token_labels import token_losses

SHAPES = [(6, 8), (3, 4), (1, 2)]


def sampling(requires_grad=True):
    g = torch.Generator().manual_seed(0)
    value = torch.randn(2, 62, 4, 8, generator=g)
    places = torch.rand(2, 5, 4, 3, 2, 2, generator=g) * 1.6 - 0.3  # some outside
    weights = torch.rand(2, 5, 4, 3, 2, generator=g)
    return [t.requires_grad_(requires_grad) for t in (value, places, weights)]


def test_the_fast_sampling_is_the_clear_one_with_its_gradients():
    outs, grads = [], []
    for op in (sampled_by_grid, sampled_by_bag):
        value, places, weights = sampling()
        out = op(value, SHAPES, places, weights)
        out.square().sum().backward()
        outs.append(out.detach())
        grads.append([t.grad for t in (value, places, weights)])
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(b, a, atol=1e-3, rtol=1e-4)


def test_sampling_at_a_pixels_centre_reads_that_pixel():
    value = torch.arange(62.0)[None, :, None, None].expand(1, 62, 1, 1).contiguous()
    places = torch.tensor([[(2 + 0.5) / 8, (3 + 0.5) / 6], [(1 + 0.5) / 4, 0.5 / 3], [0.75, 0.5]]).view(1, 1, 1, 3, 1, 2)
    weights = torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 1, 3, 1)
    for op in (sampled_by_grid, sampled_by_bag):
        assert op(value, SHAPES, places, weights).item() == pytest.approx(3 * 8 + 2 + 10 * (48 + 1) + 100 * (48 + 12 + 1))


def test_large_maps_go_by_the_bag(monkeypatch):
    from formarium.nn.ops import deformable_attention as module

    value, places, weights = sampling(False)
    calls = []
    monkeypatch.setattr(module, "sampled_by_bag", lambda *a: calls.append(1) or sampled_by_bag(*a))
    small = deformable_attention(value, SHAPES, places, weights)
    assert not calls
    monkeypatch.setattr(module, "LARGE", 10)
    torch.testing.assert_close(deformable_attention(value, SHAPES, places, weights), small, atol=1e-5, rtol=1e-5)
    assert calls


def test_at_first_heads_look_in_different_directions_and_points_ever_further():
    layer = DeformableAttention(32, heads=8, levels=2, points=3)
    offsets = layer.offsets(torch.randn(1, 1, 32)).view(8, 2, 3, 2)
    assert offsets.abs().amax(-1)[:, :, 0].allclose(torch.ones(8, 2)) and offsets.abs().amax(-1)[:, :, 2].allclose(torch.full((8, 2), 3.0))
    assert len({tuple(o.round(decimals=2).tolist()) for o in offsets[:, 0, 0]}) == 8


def test_padded_memory_counts_as_zero():
    layer = DeformableAttention(16, heads=2, levels=1, points=2)
    query, reference = torch.randn(1, 3, 16), torch.rand(1, 3, 1, 2)
    memory, padding = torch.randn(1, 12, 16), torch.zeros(1, 12, dtype=torch.bool)
    padding[:, 6:] = True
    other = memory.clone()
    other[:, 6:] += 5
    shapes = [(3, 4)]
    assert torch.equal(layer(query, reference, memory, shapes, padding), layer(query, reference, other, shapes, padding))


def test_query_attention_is_multi_head_attention_with_positions_on_queries_and_keys():
    ours, theirs = QueryAttention(16, 4), torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.qkv.weight)
        theirs.in_proj_bias.copy_(ours.qkv.bias)
    theirs.out_proj.load_state_dict(ours.out.state_dict())
    x, p = torch.randn(2, 5, 16), torch.randn(2, 5, 16)
    torch.testing.assert_close(ours(x, p), theirs(x + p, x + p, x)[0], atol=1e-5, rtol=1e-5)


# boxes and matching -------------------------------------------------------------------------------------------------


def test_overlaps_of_known_boxes():
    a = torch.tensor([[0.0, 0, 2, 2], [0, 0, 1, 1]])
    b = torch.tensor([[1.0, 1, 3, 3], [2, 2, 3, 3]])
    assert iou(a, b)[0].tolist() == pytest.approx([1 / 7, 0])
    assert generalised_iou(a, b).tolist() == pytest.approx([1 / 7 - 2 / 9, -7 / 9])
    assert generalised_iou(a, a).tolist() == [1, 1]
    boxes = torch.rand(5, 4)
    torch.testing.assert_close(from_corners(to_corners(boxes)), boxes)
    x = torch.tensor([0.2, 0.9])
    torch.testing.assert_close(inverse_sigmoid(x).sigmoid(), x)
    assert torch.isfinite(inverse_sigmoid(torch.tensor([0.0, 1.0]))).all()


def test_the_assignment_is_the_best_of_all():
    cost = torch.rand(3, 5, 3, generator=torch.Generator().manual_seed(1))
    counts = [3, 0, 2]
    which, row, column = hungarian(cost, counts)
    for i, count in enumerate(counts):
        total = cost[i, row[which == i], column[which == i]].sum().item()
        best = min(sum(cost[i, r, c].item() for c, r in enumerate(rows)) for rows in itertools.permutations(range(5), count))
        assert total == pytest.approx(best) and sorted(column[which == i].tolist()) == [*range(count)]
    assert len(hungarian(torch.rand(2, 4, 1), [0, 0])[0]) == 0


def test_the_cost_is_least_for_the_right_prediction():
    labels, targets = torch.tensor([[1, 2, -1]]), torch.tensor([[[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.2], [0, 0, 0, 0]]])
    logits = torch.full((1, 4, 3), -4.0)
    logits[0, 2, 1], logits[0, 0, 2] = 4, 4
    boxes = torch.tensor([[[0.7, 0.6, 0.3, 0.2], [0.5, 0.5, 0.1, 0.1], [0.3, 0.3, 0.2, 0.2], [0.1, 0.9, 0.1, 0.1]]])
    which, query, thing = hungarian(detection_cost(logits, boxes, labels, targets), [2])
    assert {*zip(query.tolist(), thing.tolist(), strict=True)} == {(2, 0), (0, 1)} and which.tolist() == [0, 0]


def test_focal_loss_without_focus_is_half_the_cross_entropy():
    x, t = torch.randn(10), (torch.rand(10) > 0.5).float()
    torch.testing.assert_close(sigmoid_focal(x, t, 0.5, 0.0) * 2, F.binary_cross_entropy_with_logits(x, t, reduction="none"))
    sure = sigmoid_focal(torch.tensor([6.0]), torch.tensor([1.0]))
    assert 0 < sure.item() < 1e-6


# masks --------------------------------------------------------------------------------------------------------------


def smooth_masks(count=6, size=128):
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size - 0.5
    out = []
    for _ in range(count):
        angle, radius = np.arctan2(y, x), np.hypot(x, y)
        out.append(radius < 0.35 + 0.08 * np.sin(2 * angle + rng.uniform(0, 6)) + 0.04 * np.sin(3 * angle + rng.uniform(0, 6)))
    return torch.from_numpy(np.stack(out))


def test_256_of_16384_coefficients_keep_a_mask():
    masks = smooth_masks()
    again = decode_masks(encode_masks(masks, 256), 128)
    overlap = (masks & again).sum((1, 2)) / (masks | again).sum((1, 2))
    assert overlap.min() > 0.95


def test_codes_are_scipys_cosine_transform_in_zigzag_order():
    from scipy.fft import dctn

    mask = torch.rand(1, 16, 16)
    wanted = dctn(mask[0].numpy(), norm="ortho")
    assert zigzag(16, 8) == ((0, 0), (0, 1), (1, 0), (2, 0), (1, 1), (0, 2), (0, 3), (1, 2))
    np.testing.assert_allclose(encode_masks(mask, 50)[0].numpy(), [wanted[p] for p in zigzag(16, 50)], atol=1e-5)


def test_a_mask_cut_to_its_box_and_pasted_back_is_itself():
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    y, x = torch.meshgrid(torch.arange(60), torch.arange(80), indexing="ij")
    mask[0] = ((x - 40) / 20) ** 2 + ((y - 30) / 15) ** 2 < 1
    box = torch.tensor([[21.0, 16, 60, 45]])
    back = paste_masks(crop_masks(mask, box, 64), box, 60, 80)
    assert (mask & back).sum() / (mask | back).sum() > 0.97
    assert crop_masks(mask[:0], box[:0], 64).shape == (0, 64, 64) and paste_masks(mask[:0], box[:0], 6, 8).shape == (0, 6, 8)


def test_token_labels_are_the_shares_that_masks_cover():
    masks = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    masks[0, 0, :2, :2] = True
    masks[0, 1, :2, :] = True  # behind the first on the left
    labels = torch.tensor([[2, 1]])
    right = torch.full((1, 2, 2, 3), -20.0)
    right[0, 0, 0, [0, 2]] = 20
    right[0, 0, 1, [0, 1]] = 20
    good, bad = (token_losses([t], masks, labels, torch.tensor(2.0)) for t in (right, -right))
    assert good["token_focal"] < 1e-4 and good["token_dice"] < 1e-3
    assert bad["token_focal"] > 1 and bad["token_dice"] > 0.3
    none = token_losses([right], masks, torch.tensor([[-1, -1]]), torch.tensor(1.0))
    assert none["token_focal"] > good["token_focal"]


# windows and positions ----------------------------------------------------------------------------------------------


def test_only_windows_that_the_shift_tore_are_masked():
    mask = shift_mask((8, 8), 4, 2, torch.device("cpu"))
    assert mask.shape == (4, 16, 16) and (mask[0] == 0).all() and all((m == -100).any() for m in mask[1:])
    assert torch.equal(mask, mask.transpose(1, 2))


def test_positions_are_scaled_to_the_unpadded_part():
    padding = torch.zeros(2, 4, 8, dtype=torch.bool)
    padding[1, :, 4:] = True
    p = sine_positions(padding, 16).view(2, 4, 8, 16)
    torch.testing.assert_close(p[1, :, 3], p[0, :, 7])  # the last column of either picture
    assert p.abs().max() <= 1
