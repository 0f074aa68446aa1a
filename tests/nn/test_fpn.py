"""The neck and the heads: sizes, what reaches what, one picture at a time."""

import pytest
import torch

from formarium.nn.fpn import FPN, SemanticFPNHead, UPerHead, resized

CHANNELS = (8, 12, 16, 20)


def maps(batch=2, sides=(17, 9, 5, 3)):
    torch.manual_seed(0)
    return [torch.randn(batch, c, s, s + 2, requires_grad=True) for c, s in zip(CHANNELS, sides, strict=True)]


def test_the_neck_gives_every_level_and_coarser_ones():
    out = FPN(CHANNELS, 16, extra=2)(maps())
    assert [x.shape[1] for x in out] == [16] * 6
    assert [tuple(x.shape[2:]) for x in out] == [(17, 19), (9, 11), (5, 7), (3, 5), (2, 3), (1, 2)]


def test_coarse_maps_reach_the_fine_levels_and_not_the_other_way_round():
    x = maps()
    out = FPN(CHANNELS, 16)(x)
    out[0].sum().backward(retain_graph=True)
    assert all(m.grad is not None and m.grad.abs().sum() > 0 for m in x)
    for m in x:
        m.grad = None
    out[3].sum().backward()
    assert x[0].grad is None and x[3].grad.abs().sum() > 0


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_heads_answer_at_the_finest_maps_size(levels):
    x = maps()[:levels]
    fused = SemanticFPNHead(levels, 16, 8, 5)(FPN(CHANNELS[:levels], 16)(x))
    assert fused.shape == (2, 5, 17, 19)
    assert UPerHead(CHANNELS[:levels], 16, 5)(x).shape == (2, 5, 17, 19)


def test_semantic_fpn_convolves_each_level_as_often_as_it_lies_above():
    head = SemanticFPNHead(4, 16, 8, 5)
    assert [len(convs) for convs in head.levels] == [1, 1, 2, 3]


def test_group_norms_train_on_one_picture():
    head = UPerHead(CHANNELS, 16, 5, norm="group").train()
    head([m[:1] for m in maps()]).sum().backward()
    with pytest.raises(ValueError, match="more than 1 value"):
        UPerHead(CHANNELS, 16, 5).train()([m[:1] for m in maps()])


def test_resized_leaves_the_right_size_alone():
    x = torch.randn(1, 2, 4, 4)
    assert resized(x, torch.randn(1, 9, 4, 4)) is x and resized(x, torch.randn(1, 9, 7, 5)).shape == (1, 2, 7, 5)
