from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from formarium import create
from formarium.authors import authors_of
from formarium.engine.records import read_header, replay
from formarium.errors import BadInput
from formarium.models.image.efficientvit import FFN, CascadedGroupAttention, WindowAttention
from formarium.nn.convs import ConvBN

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "efficientvit").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


def alive(module: nn.Module) -> nn.Module:
    """Norms with gains and statistics as after training: initialised, residual branches are zero."""
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d)):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return module.eval()


def test_claim_the_cascade():
    """The first chunk moves every head, chunk i moves the heads from i on."""
    layer = alive(CascadedGroupAttention(32, 8, 4, 4, (5, 3, 3, 3)))
    nn.init.normal_(layer.biases)
    x = torch.randn(2, 16, 32)
    with torch.no_grad():
        before = layer.heads(x)
        for i in range(4):
            other = x.clone()
            other[..., 8 * i : 8 * i + 8] += torch.randn(8)
            moved = [not torch.equal(a, b) for a, b in zip(before, layer.heads(other), strict=True)]
            assert moved == [j >= i for j in range(4)]


def test_claim_projections_are_a_share_of_full_width_ones():
    layer = CascadedGroupAttention(64, 16, 4, 7, (5, 5, 5, 5))
    own = sum(p.conv.weight.numel() for p in layer.qkv)
    assert own == 64 * (2 * 4 * 16 + 64) // 4  # of one projection to all heads' queries, keys and values


def test_claim_folding_batchnorm_changes_nothing():
    model = alive(create("efficientvit_micro"))
    image = torch.randn(2, 3, 32, 32)
    with torch.enable_grad():
        plain = model(image)  # convolution, then normalisation
    with torch.no_grad():
        folded = model(image)
    fused = model.fuse()
    assert not any(isinstance(m, (ConvBN, nn.BatchNorm2d)) for m in fused.modules())
    assert sum(p.numel() for p in fused.parameters()) < model.parameters_count
    scale = plain.abs().max()
    assert (folded - plain).abs().max() < 1e-5 * scale and (fused(image) - plain).abs().max() < 1e-5 * scale


def test_claim_one_attention_between_two_ffns():
    block = create("efficientvit_m0").stages[0].blocks[0]
    kinds = [type(m) for m in block.modules() if isinstance(m, (FFN, WindowAttention))]
    assert kinds == [FFN, WindowAttention, FFN]


def test_folded_kernels_are_never_stale():
    model = alive(create("efficientvit_micro"))
    image = torch.randn(1, 3, 32, 32)
    other = alive(create("efficientvit_micro"))
    with torch.no_grad():
        before = model(image)
        for m in other.modules():
            if isinstance(m, nn.Conv2d):
                m.weight.mul_(1.5)
        model.load_state_dict(other.state_dict())  # in evaluation mode, after a forward
        assert not torch.allclose(model(image), before)
        torch.testing.assert_close(model(image), other(image))
    with torch.inference_mode():
        torch.testing.assert_close(model(image), other(image))


@pytest.mark.parametrize("fused", [True, False])
def test_training_is_seen_at_once(fused):
    """Scores on the way of a fit are those of the weights at that step."""
    torch.manual_seed(0)
    model = create("efficientvit_micro")
    optimiser, batch = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused), model.example_batch(8)
    for _ in range(3):
        with torch.inference_mode():
            model.eval()(batch["image"])
        model.train().loss(batch).total.backward()
        optimiser.step()
    with torch.no_grad():
        cached = model.eval()(batch["image"])
    torch.testing.assert_close(cached, model(batch["image"]))


def test_windows_are_padded_with_zeros_that_take_part():
    layer = alive(WindowAttention(16, 4, 2, 4, (3, 3)))
    x = torch.randn(1, 16, 6, 5)
    with torch.no_grad():
        out = layer(x)
        whole = layer(F.pad(x, (0, 3, 0, 2)))
        torch.testing.assert_close(out, whole[:, :, :6, :5])
    assert out.shape == x.shape


def test_biases_are_by_absolute_offset():
    layer = CascadedGroupAttention(16, 4, 2, 3, (3, 3))
    index = layer.index.view(3, 3, 3, 3)
    assert index[0, 0, 2, 1] == index[2, 1, 0, 0] == index[2, 0, 0, 1] == 2 * 3 + 1


def test_distillation():
    torch.manual_seed(0)
    batch = create("efficientvit_micro").example_batch(8)
    for kind in ("hard", "soft"):
        model = create("efficientvit_micro", distillation=True, distillation_type=kind, distillation_tau=2.0)
        with pytest.raises(BadInput, match="teacher_logits"):
            model.loss(batch)
        batch_ = {**batch, "teacher_logits": torch.randn(8, 10)}
        losses = model.loss(batch_)
        terms = losses.terms
        torch.testing.assert_close(losses.total, 0.5 * terms["cross_entropy"] + 0.5 * terms["distillation"])
        losses.total.backward()
        assert model.distilled_head[1].weight.grad.abs().sum() > 0
        model.eval()
        with torch.no_grad():
            a, b = (head(model.features(model._run(batch["image"])[-1]).mean((2, 3))) for head in (model.head, model.distilled_head))
            torch.testing.assert_close(model(batch["image"]), (a + b) / 2)


def test_dense_windows_keep_their_size():
    dense = create("efficientvit_m0_dense")
    assert [s.blocks[0].mixer.attention.side for s in dense.stages] == [7, 7, 7]
    assert [s.blocks[0].mixer.attention.side for s in create("efficientvit_m0").stages] == [7, 7, 4]
    maps = dense.eval()(torch.rand(1, 3, 96, 160))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 6, 10), (128, 3, 5), (192, 2, 3)]


def test_names_go_back_exactly():
    names = {k for k in read_header(RECORDS[0])["state"] if not k.endswith("attention_bias_idxs")}
    assert {*authors_of("efficientvit").export_state(create("efficientvit_m0"))} == names
