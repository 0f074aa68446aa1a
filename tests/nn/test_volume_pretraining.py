import math

import pytest
import torch

from formarium.errors import BadInput, UnknownName
from formarium.nn.volume_pretraining import (
    Answers,
    PretextHeads,
    contrast_loss,
    damaged,
    fill,
    pretext_losses,
    random_boxes,
    rebuilder,
    turned,
)


def test_every_sample_is_turned_by_its_own_number_of_quarters():
    torch.manual_seed(0)
    image = torch.randn(16, 2, 3, 5, 5)
    out, turns = turned(image)
    assert {*turns.tolist()} == {0, 1, 2, 3}
    for x, y, k in zip(image, out, turns.tolist(), strict=True):
        assert torch.equal(y, torch.rot90(x, k, (2, 3)))
    other, turns = turned(image.movedim(2, 4), (-2, -3))
    assert torch.equal(other[0], torch.rot90(image.movedim(2, 4)[0], int(turns[0]), (2, 1)))
    with pytest.raises(BadInput, match="two sides of one length"):
        turned(torch.randn(1, 1, 4, 4, 5))


def test_boxes_are_inside_and_together_reach_a_share_that_is_uniform_up_to_the_most():
    torch.manual_seed(0)
    sides, shares = (64, 32, 32), []
    for _ in range(300):
        boxes = random_boxes(sides)
        for box in boxes:
            for b, side in zip(box, sides, strict=True):
                assert 0 <= b.start < side - int(0.05 * side) and b.start <= b.stop <= side
                assert b.stop - b.start < int(0.25 * side) and (b.stop - b.start >= int(0.05 * side) or b.stop == side)
        volumes = [math.prod(b.stop - b.start for b in box) for box in boxes]
        assert sum(volumes[:-1]) < 0.3 * math.prod(sides)
        shares.append(sum(volumes) / math.prod(sides))
    mean = sum(shares) / len(shares)
    assert mean == pytest.approx(0.15, abs=0.02) and max(shares) > 0.27 and min(shares) < 0.03
    with pytest.raises(BadInput, match="at least 8"):
        random_boxes((64, 4, 32))


def test_a_box_holds_noise_from_0_to_1_or_what_another_sample_has_there():
    x, other, box = torch.full((2, 8, 8, 8), 5.0), torch.full((2, 8, 8, 8), -7.0), (slice(1, 4), slice(2, 6), slice(0, 8))
    fill(x, [box], other)
    assert (x[(slice(None), *box)] == -7).all() and int((x == -7).sum()) == 2 * 3 * 4 * 8
    fill(x, [box, (slice(3, 3), slice(0, 2), slice(0, 2))])
    noise = x[(slice(None), *box)]
    assert noise.min() == 0 and noise.max() == 1 and int((x != 5).sum()) == noise.numel()


def test_damage_leaves_the_volume_alone_and_mixes_samples():
    torch.manual_seed(0)
    image = torch.stack([torch.full((1, 32, 32, 32), 10.0 * (i + 1)) for i in range(3)])
    before = image.clone()
    seen = [damaged(image) for _ in range(4)]
    assert torch.equal(image, before)
    lost = torch.stack(seen) != image
    assert 0 < lost.float().mean() < 0.45
    taken = torch.stack(seen)[lost]
    assert (taken >= 10).any() and ((taken >= 0) & (taken <= 1)).any() and ((taken <= 1) | (taken >= 10)).all()
    alone = damaged(image[:1])
    assert (alone[alone != 10] <= 1).all()  # nothing to swap with


def test_contrast_by_hand():
    one, other = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    z = [v / v.norm() for v in (*one, *other)]
    total = 0.0
    for i in range(6):
        alike = [math.exp(float(z[i] @ z[j]) / 0.5) for j in range(6)]
        total -= math.log(alike[(i + 3) % 6] / (sum(alike) - alike[i]))
    assert float(contrast_loss(one, other)) == pytest.approx(total / 6)
    assert contrast_loss(one, one) < contrast_loss(one, one.flip(0)) and float(contrast_loss(one[:1], other[:1])) == 0


def test_terms_are_weighted():
    answers = Answers(torch.randn(4, 4), torch.randn(4, 6), torch.zeros(4, 1, 8, 8, 8))
    total, terms = pretext_losses(answers, torch.tensor([0, 1, 2, 3]), torch.ones(4, 1, 8, 8, 8), weights=(1, 0.5, 2))
    assert float(terms["reconstruction"]) == 1
    torch.testing.assert_close(total, terms["rotation"] + 0.5 * terms["contrast"] + 2)


@pytest.mark.parametrize("upsampling", ["vae", "deconv", "large_kernel_deconv"])
@pytest.mark.parametrize("dims", [2, 3])
def test_every_upsampling_rebuilds_the_whole_volume(upsampling, dims):
    heads = PretextHeads(16, 2, upsampling, 7, dims)
    x = torch.randn(2, 16, *(2, 1, 1)[:dims])
    out = heads(x)
    assert out.turn.shape == (2, 4) and out.embedding.shape == (2, 7) and out.rebuilt.shape == (2, 2, *(64, 32, 32)[:dims])
    torch.testing.assert_close(out.turn, heads.rotation(x.flatten(2)[..., 0]))
    torch.testing.assert_close(out.embedding, heads.contrast(x.flatten(2)[..., 1]))
    with pytest.raises(UnknownName, match="vae"):
        rebuilder(16, 2, "vea")
