import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from formarium.nn.multi_crop import View, blur, colour_jitter, luma, make_view, random_crop
from formarium.nn.schedules import StepSchedule, piecewise_linear
from formarium.nn.self_distillation import (
    PrototypeHead,
    average_into,
    block_mask,
    block_masks,
    centred,
    cosine,
    dino_losses,
    ibot_loss,
    koleo,
    sinkhorn_knopp,
    update_centre,
    warm,
)


def softmaxed(*shape):
    return torch.randn(*shape).softmax(-1)


def test_dino_never_compares_a_global_crop_with_itself():
    torch.manual_seed(0)
    student, local, teacher = torch.randn(2, 3, 8), torch.randn(4, 3, 8), softmaxed(2, 3, 8)
    over, within = dino_losses(student, local, teacher)

    def ce(t, s):
        return -(t * F.log_softmax(s / 0.1, -1)).sum(-1).mean()

    pairs = 2 + 8
    assert torch.allclose(over, (ce(teacher[0], student[1]) + ce(teacher[1], student[0])) / pairs)
    assert torch.allclose(within, sum(ce(t, s) for t in teacher for s in local) / pairs)
    alike = teacher.clone()
    alike[0] = softmaxed(3, 8)  # what the teacher says of crop 0 moves only what the student says of crop 1
    student.requires_grad_()
    (g,) = torch.autograd.grad(dino_losses(student, local, teacher)[0] - dino_losses(student, local, alike)[0], student)
    assert g[0].abs().max() < 1e-7 < g[1].abs().max()


def test_without_local_crops_only_the_global_pair_counts():
    student, teacher = torch.randn(2, 3, 8), softmaxed(2, 3, 8)
    over, within = dino_losses(student, student.new_zeros(0, 3, 8), teacher)
    assert within == 0 and over > 0


def test_ibot_weighs_images_alike_and_ignores_images_without_a_mask():
    masks = torch.zeros(4, 9, dtype=torch.bool)
    masks[0, :6], masks[2, :1] = True, True
    student, teacher = torch.randn(7, 5), softmaxed(7, 5)
    each = -(teacher * F.log_softmax(student / 0.1, -1)).sum(-1)
    assert torch.allclose(ibot_loss(student, teacher, masks), (each[:6].mean() + each[6]) / 4)
    none = ibot_loss(student[:0], teacher[:0], torch.zeros(4, 9, dtype=torch.bool))
    assert none == 0 and torch.isfinite(none)


def test_koleo_grows_when_two_class_tokens_coincide_and_is_finite():
    torch.manual_seed(0)
    x = torch.randn(6, 16)
    same = x.clone()
    same[1] = same[0]
    assert koleo(same) > koleo(x) + 1
    assert torch.allclose(koleo(x), koleo(3 * x))
    x.requires_grad_()
    koleo(x).backward()
    assert torch.isfinite(x.grad).all() and koleo(x[:1]) == 0


def test_sinkhorn_uses_all_prototypes_alike():
    q = sinkhorn_knopp(torch.randn(64, 8), 0.5, iterations=50)
    torch.testing.assert_close(q.sum(1), torch.ones(64))
    torch.testing.assert_close(q.sum(0), torch.full((8,), 8.0), rtol=1e-3, atol=1e-3)
    assert torch.isfinite(sinkhorn_knopp(torch.full((4, 3), 1e4), 0.01)).all()


def test_the_centre_follows_the_teacher_and_serves_the_next_step():
    centre, logits = torch.zeros(1, 4), torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 5)
    before = centred(logits, centre, 0.1)
    update_centre(centre, logits)
    torch.testing.assert_close(centre, 0.1 * logits[:1])
    assert not torch.equal(centred(logits, centre, 0.1), before)
    patches = torch.zeros(1, 1, 4)
    update_centre(patches, logits[:0])  # no masked patch: it stays
    assert patches.shape == (1, 1, 4) and not patches.any()


def test_the_head_is_a_cosine_with_directions_that_have_no_length():
    torch.manual_seed(0)
    head, x = PrototypeHead(12, 7, hidden=16, bottleneck=6), torch.randn(5, 12)
    out = head(x)
    assert out.abs().max() <= 1 + 1e-5 and not head.gain.requires_grad
    with torch.no_grad():
        head.direction.mul_(5)
    torch.testing.assert_close(head(x), out)
    assert isinstance(PrototypeHead(12, 7, 16, 6, layers=1).mlp, nn.Linear)
    assert any(isinstance(m, nn.BatchNorm1d) for m in PrototypeHead(12, 7, 16, 6, batch_norm=True).mlp)


@pytest.mark.parametrize("count", [0, 1, 10, 60, 98])
def test_block_masks_hide_no_more_than_asked(count):
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = block_mask((14, 14), count, rng, most=98)
        assert mask.sum() <= count
    if count >= 10:
        assert mask.sum() >= 0.5 * count


def test_half_of_the_crops_are_masked_with_ratios_over_the_range():
    rng = np.random.default_rng(0)
    masks = np.concatenate([block_masks(16, (14, 14), rng) for _ in range(10)])
    share = masks.mean(1)
    assert ((share > 0).reshape(10, 16).sum(1) == 8).all()
    assert share[share > 0].min() > 0.05 and 0.4 < share.max() <= 0.5
    a, b = (block_masks(8, (4, 4), np.random.default_rng(3)) for _ in range(2))
    assert (a == b).all()


def test_schedules():
    assert cosine(0, 10, 0.992, 1.0) == 0.992 and cosine(10, 10, 0.992, 1.0) == 1.0 and math.isclose(cosine(5, 10, 0.0, 1.0), 0.5)
    assert warm(0, 30, 0.04, 0.07) == 0.04 and math.isclose(warm(15, 30, 0.04, 0.07), 0.055) and warm(99, 30, 0.04, 0.07) == 0.07
    assert [piecewise_linear(p, (0.4, 1.0, 0.5)) for p in (0, 0.25, 0.5, 0.75, 1.0)] == pytest.approx([0.4, 0.7, 1.0, 0.75, 0.5])
    teacher, student = [torch.ones(3)], [torch.zeros(3)]
    average_into(teacher, student, 0.9)
    assert torch.allclose(teacher[0], torch.full((3,), 0.9))


def test_a_step_schedule_reaches_its_own_optimiser_and_no_other():
    class Owner(nn.Linear):
        def halve(self, optimiser, group):
            group["lr"] = optimiser.defaults["lr"] / 2

    owner, other = Owner(2, 2), nn.Linear(2, 2)
    schedule = StepSchedule(owner.parameters(), owner.halve)
    mine, theirs = (torch.optim.SGD(m.parameters(), lr=1.0) for m in (owner, other))
    for optimiser in (mine, theirs):
        optimiser.step()
    assert mine.param_groups[0]["lr"] == 0.5 and theirs.param_groups[0]["lr"] == 1.0
    schedule.off()
    mine.param_groups[0]["lr"] = 1.0
    mine.step()
    assert mine.param_groups[0]["lr"] == 1.0


# views --------------------------------------------------------------------------------------------------------------


def test_views_stay_in_range_differ_and_follow_the_seed():
    images = torch.rand(6, 3, 40, 32)
    view = View(16, (0.05, 0.32), blur=0.5, solarise=0.2, vertical_flip=0.5)
    a, b, c = (torch.manual_seed(s) and make_view(images, view) for s in (0, 0, 1))
    assert a.shape == (6, 3, 16, 16) and a.min() >= 0 and a.max() <= 1
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_crop_of_everything_is_the_image_or_its_mirror():
    images = torch.rand(8, 3, 24, 24)
    torch.manual_seed(0)
    out = random_crop(images, 24, (1.0, 1.0), ratio=1.0)
    same = [torch.allclose(o, i, atol=1e-4) for o, i in zip(out, images, strict=True)]
    mirrored = [torch.allclose(o, i.flip(-1), atol=1e-4) for o, i in zip(out, images, strict=True)]
    assert all(s or m for s, m in zip(same, mirrored, strict=True)) and any(same) and any(mirrored)


def test_a_crop_covers_the_share_of_the_area_it_should():
    ramp = torch.linspace(0, 1, 64).expand(1, 64, 64)
    images = torch.stack([ramp, ramp.transpose(1, 2), ramp], 1).view(1, 3, 64, 64).repeat(200, 1, 1, 1)
    torch.manual_seed(0)
    out = random_crop(images, 32, (0.25, 0.25), ratio=4 / 3)
    across, down = (out[:, i].amax((1, 2)) - out[:, i].amin((1, 2)) for i in (0, 1))
    assert abs((across * down).mean().item() - 0.25) < 0.03


def test_colour_moves_colour_only_and_blur_smooths():
    torch.manual_seed(0)
    images = 0.3 + 0.4 * torch.rand(4, 3, 16, 16)
    turned = colour_jitter(images, (0.0, 0.0, 0.0, 0.1))
    torch.testing.assert_close(luma(turned), luma(images), atol=2e-2, rtol=0)
    assert (turned - images).abs().max() > 0.02
    grey = images.mean(1, keepdim=True).expand(-1, 3, -1, -1)
    torch.testing.assert_close(colour_jitter(grey, (0.0, 0.0, 0.2, 0.1)), grey, atol=1e-2, rtol=0)
    smooth = blur(images, (2.0, 2.0))
    assert smooth.std() < 0.5 * images.std()
    torch.testing.assert_close(blur(torch.full((1, 3, 8, 8), 0.5), (1.0, 1.0)), torch.full((1, 3, 8, 8), 0.5))
