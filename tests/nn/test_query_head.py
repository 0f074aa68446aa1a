import pytest
import torch
from torch import nn

from formarium.nn.query_head import LocalDecoder, Queries, QueryHead, assign, query_boxes, query_losses, query_values

ORIGIN, CELL = torch.tensor([-10.0, -20.0]), torch.tensor([0.5, 0.5])


def boxes(count: int, seed: int = 0, samples: int = 1) -> torch.Tensor:
    """[samples, count, 9] far apart in a range of 40 m."""
    g = torch.Generator().manual_seed(seed)
    out = torch.rand(samples, count, 9, generator=g)
    out[..., 0] = torch.arange(count) * 6 - 8 + out[..., 0]
    out[..., 1] = out[..., 1] * 30 - 15
    out[..., 3:6] = 1 + 3 * out[..., 3:6]
    out[..., 6] = 6 * out[..., 6] - 3
    return out


def saying(truth: torch.Tensor, label: torch.Tensor, classes: int, sure: float = 8.0) -> Queries:
    """Queries [b, q] that say exactly these boxes of these classes (label -1: of none)."""
    b, q = label.shape
    logits = torch.full((b, q, classes), -sure)
    logits.scatter_(2, label.clamp_min(0)[..., None], torch.where(label >= 0, sure, -sure)[..., None])
    dense = torch.full((b, classes, 40, 80), -sure)
    return Queries(dense, label.clamp_min(0), torch.ones(b, q), logits, query_values(truth, ORIGIN, CELL), torch.ones(b, q))


@pytest.mark.parametrize("wrap", [True, False])
def test_the_decoder_is_plain_attention_over_each_queries_neighbourhood(wrap):
    torch.manual_seed(0)
    dim, w, h, radius = 16, 5, 7, 2
    decoder = LocalDecoder(dim, 4, 32, radius, wrap).eval()
    plain = {name: nn.MultiheadAttention(dim, 4, batch_first=True) for name in ("own", "cross")}
    for name, attention in plain.items():
        ours = getattr(decoder, name)
        nn.init.normal_(ours.qkv.bias)
        attention.in_proj_weight.data, attention.in_proj_bias.data = ours.qkv.weight.data, ours.qkv.bias.data
        attention.out_proj.load_state_dict(ours.out.state_dict())
    cells, at = torch.randn(2, w * h, dim), torch.tensor([[0, 17, 34], [6, 20, 13]])
    index = torch.arange(w * h)
    places = torch.stack([index // h, index % h], 1) + 0.5
    x = cells.gather(1, at[..., None].expand(-1, -1, dim))
    with torch.no_grad():
        found = decoder(x, at, cells, (w, h), places)
        for b in range(2):
            for i in range(3):
                px, py = int(at[b, i]) // h, int(at[b, i]) % h
                keys = []
                for dx in range(-radius, radius + 1):
                    for dy in range(-radius, radius + 1):
                        flat = (px + dx) * h + py + dy
                        on_map = 0 <= px + dx < w and 0 <= py + dy < h
                        if (0 <= flat < w * h) if wrap else on_map:
                            keys.append(flat)
                position = decoder.query_position(places[at[b, i]][None])
                q = x[b, i][None, None]
                q = decoder.norm1(q + plain["own"](q + position, q + position, q + position)[0])
                k = (cells[b, keys] + decoder.key_position(places[keys]))[None]
                q = decoder.norm2(q + plain["cross"](q + position, k, k)[0])
                q = decoder.norm3(q + decoder.down(decoder.up(q).relu()))
                torch.testing.assert_close(found[b, i], q[0, 0], atol=1e-5, rtol=1e-4)


def test_what_lies_beyond_the_neighbourhood_plays_no_part():
    torch.manual_seed(0)
    decoder = LocalDecoder(8, 2, 16, 1, False).eval()
    index = torch.arange(36)
    places = torch.stack([index // 6, index % 6], 1) + 0.5
    cells, at = torch.randn(1, 36, 8), torch.tensor([[14]])  # x 2, y 2
    other = cells.clone()
    other[:, [0, 5, 11, 12, 16, 28]] += 1
    near = cells.clone()
    near[:, 21] += 1  # x 3, y 3
    with torch.no_grad():
        a, b, c = (decoder(cells[:, at[0]], at, m, (6, 6), places) for m in (cells, other, near))
    assert torch.equal(a, b) and not torch.allclose(a, c)


def test_proposals_are_peaks():
    head = QueryHead(4, 2, 3, dim=8, heads=2, hidden=8, radius=1, point_classes=(1,))
    score = torch.zeros(1, 2, 5, 5)
    score[0, :, 2, 2], score[0, :, 2, 3], score[0, :, 0, 4] = 0.9, 0.8, 0.7
    peaks = head.peaks(score)
    assert peaks[0, 0].nonzero().tolist() == [[2, 2]]  # not beside a better one, nor at the map's border
    assert torch.equal(peaks[0, 1], score[0, 1])


def test_queries_come_with_the_class_and_place_of_their_proposal():
    torch.manual_seed(0)
    head = QueryHead(4, 3, 5, dim=16, heads=2, hidden=16, radius=2, speed=False).eval()
    x = torch.randn(2, 4, 6, 9)
    with torch.no_grad():
        out = head(x)
    assert out.dense.shape == (2, 3, 9, 6) and out.logits.shape == (2, 5, 3) and out.values.shape == (2, 5, 8) and out.iou.shape == (2, 5)
    peaks = head.peaks(out.dense.sigmoid())
    for b in range(2):
        best = peaks[b].flatten().topk(5)
        torch.testing.assert_close(out.prior[b], best.values)
        assert out.label[b].tolist() == (best.indices // 54).tolist()


def test_the_published_head_has_the_released_codes_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in QueryHead(384, 10, 200, point_classes=(8, 9)).parameters()) == 896415


def test_boxes_and_values_are_each_others_inverse():
    truth = boxes(4)
    torch.testing.assert_close(query_boxes(query_values(truth, ORIGIN, CELL), ORIGIN, CELL), truth, atol=1e-5, rtol=1e-5)
    assert query_values(truth, ORIGIN, CELL)[0, 0, 2] == pytest.approx(float(truth[0, 0, 2] + truth[0, 0, 5] / 2))


def test_each_box_gets_the_query_that_says_it():
    truth = boxes(4, samples=2)
    label = torch.tensor([[0, 1, -1, 2], [-1, -1, 1, -1]])
    order = torch.tensor([3, 1, 0, 2])
    out = saying(truth[:, order], label[:, order].clamp_min(0), 3)
    sample, query, box = assign(out, truth, label, ORIGIN, CELL, torch.tensor([20.0, 40.0]), (0.15, 0.25, 0.25))
    assert sorted(zip(sample.tolist(), box.tolist(), strict=True)) == [(0, 0), (0, 1), (0, 3), (1, 2)]
    assert (order[query] == box).all()
    none = assign(out, truth, torch.full_like(label, -1), ORIGIN, CELL, torch.tensor([20.0, 40.0]), (0.15, 0.25, 0.25))
    assert not len(none[0])


def test_class_distance_and_overlap_all_count_in_the_assignment():
    truth = boxes(1)
    span = torch.tensor([20.0, 40.0])
    pair = truth.repeat(1, 2, 1)
    shifted = pair.clone()
    shifted[0, 0, 0] += 9
    tilted = pair.clone()
    tilted[0, 0, 5] *= 3
    label = torch.zeros(1, 1, dtype=torch.int64)
    both = torch.zeros(1, 2, dtype=torch.int64)
    for said, labels in ((shifted, both), (tilted, both), (pair, torch.tensor([[1, 0]]))):
        assert assign(saying(said, labels, 2), truth, label, ORIGIN, CELL, span, (0.15, 0.25, 0.25))[1].tolist() == [1]


def test_perfect_queries_cost_nothing_and_others_do():
    truth = boxes(3)
    label = torch.tensor([[0, 1, -1]])
    out = saying(truth, label, 2)
    matched = assign(out, truth, label, ORIGIN, CELL, torch.tensor([20.0, 40.0]), (0.15, 0.25, 0.25))
    args = (torch.zeros_like(out.dense), truth, label, matched, ORIGIN, CELL, (1.0, 1.0, 0.25, 0.5), (1.0,) * 10)
    terms = query_losses(out, *args)
    assert [*terms] == ["heatmap", "label", "regression", "iou"] and all(v < 1e-3 for v in terms.values())
    off = out._replace(values=out.values + 0.4)
    assert query_losses(off, *args)["regression"] == pytest.approx(0.25 * 10 * 0.4, rel=1e-3)
    unsure = out._replace(iou=torch.zeros(1, 3))
    assert query_losses(unsure, *args)["iou"] == pytest.approx(0.5, rel=1e-3)
    unknown = truth.clone()
    unknown[..., 7:] = float("nan")
    known_only = query_losses(off, args[0], unknown, *args[2:])
    assert known_only["regression"] == pytest.approx(0.25 * 8 * 0.4, rel=1e-3)
    wrong = out._replace(logits=-out.logits)
    assert query_losses(wrong, *args)["label"] > 1


def test_a_batch_without_boxes_still_has_a_loss():
    head = QueryHead(4, 2, 5, dim=16, heads=2, hidden=16, radius=1)
    out = head(torch.randn(2, 4, 8, 8))
    truth, label = torch.zeros(2, 3, 9), torch.full((2, 3), -1)
    matched = assign(out, truth, label, ORIGIN, CELL, torch.tensor([20.0, 40.0]), (0.15, 0.25, 0.25))
    terms = query_losses(out, torch.zeros_like(out.dense), truth, label, matched, ORIGIN, CELL, (1.0, 1.0, 0.25, 0.5), (1.0,) * 10)
    total = torch.stack([*terms.values()]).sum()
    total.backward()
    assert torch.isfinite(total) and terms["regression"] == 0 and terms["heatmap"] > 0
