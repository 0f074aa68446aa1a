from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from formarium import create
from formarium.authors import authors_of, load_state
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.image.vit_comer import Levels, ThinDeformableAttention, TwoFields

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "vit_comer").glob("*.safetensors"))
FOUR = {
    "depth": 4,
    "chunks": ((0, 0), (1, 1), (2, 2), (3, 3)),
    "windows": (0, 2, 0, 0),
    **{flag: (True,) * 4 for flag in ("to_vit", "to_conv", "extracts")},
    "vit_features": "each",
}


def micro(**overrides):
    torch.manual_seed(0)
    return create("vit_comer_micro", **overrides).eval()


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters in (None, outcome.expected_parameters)


def plain_vit(model, image):
    x = model.embed(image).flatten(2).transpose(1, 2) + model.positions[:, 1:]
    grid = (image.shape[2] // 16, image.shape[3] // 16)
    for block in model.blocks:
        x = block(x, grid)
    return x.transpose(1, 2).unflatten(2, grid)


def test_claim_with_gamma_zero_the_vit_is_the_plain_vit_to_the_bit():
    model, image = micro(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(model.run(image)[0], plain_vit(model, image))
        for interaction in model.interactions:
            interaction.to_vit.gamma.fill_(0.1)
        assert not torch.allclose(model.run(image)[0], plain_vit(model, image))


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_claim_gradients_cross_in_both_directions(gamma):
    model, image = micro(gamma=gamma, vit_features="none"), torch.randn(2, 3, 64, 32)
    last, maps = model.run(image)
    first_conv, first_block = model.convs.stem[0].conv.weight, model.blocks[0].mlp.fc1.weight
    (to_conv,) = torch.autograd.grad(last.square().sum(), first_conv, retain_graph=True)
    assert bool(to_conv.abs().sum() > 0) == (gamma != 0)  # x hears of the pyramid once gamma isn't 0
    (to_block,) = torch.autograd.grad(maps[0].square().sum(), first_block)
    assert to_block.abs().sum() > 0  # c hears of the ViT always


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (160, 32)])
def test_claim_21n_tokens_on_three_levels_and_four_maps(size):
    model = micro(dense=True)
    n = size[0] * size[1] // 32**2
    seen = []
    model.interactions[1].register_forward_pre_hook(lambda m, args: seen.append(args[1]))
    with torch.no_grad():
        maps = model(torch.randn(1, 3, *size))
    assert [tuple(m.shape) for m in maps] == [(1, 48, size[0] // s, size[1] // s) for s in (4, 8, 16, 32)]
    levels = Levels.around((size[0] // 16, size[1] // 16), seen[0])
    assert [part.shape[1] for part in levels.split(seen[0])] == [16 * n, 4 * n, n]


def test_reference_points_are_pixel_centres():
    levels = Levels.around((2, 4), torch.zeros(1))
    assert levels.reference.shape == (1, 21 * 2, 1, 2)
    torch.testing.assert_close(levels.reference[0, -2:, 0], torch.tensor([[0.25, 0.5], [0.75, 0.5]]))  # the coarsest: 1 x 2


@pytest.mark.parametrize("training", [True, False])
def test_two_fields_are_two_convolutions_and_a_norm(training):
    layer = TwoFields(8).train(training)
    torch.nn.init.normal_(layer.norm.weight)
    layer.norm.running_mean.normal_()
    x = torch.randn(2, 8, 5, 6)
    both = torch.cat([layer.conv3(x[:, :4]), layer.conv5(x[:, 4:])], 1)
    norm = layer.norm
    normed = F.batch_norm(both, norm.running_mean.clone(), norm.running_var.clone(), norm.weight, norm.bias, training, 0.1, norm.eps)
    torch.testing.assert_close(layer(x), F.gelu(normed), rtol=1e-4, atol=1e-5)


def test_the_values_are_deform_ratio_times_as_wide():
    layer = ThinDeformableAttention(48, 6, 2, 0.5)
    assert layer.value.out_features == layer.out.in_features == 24
    assert layer.offsets.weight.abs().sum() == 0 and layer.offsets.bias.abs().sum() > 0


def test_what_is_added_to_the_pyramid_differs_between_segmentation_and_detection():
    image = torch.randn(1, 3, 32, 32)
    each, last = micro(**FOUR), micro(**{**FOUR, "vit_features": "last"})
    last.load_state_dict(each.state_dict())
    with torch.no_grad():
        a, b = each.pyramid(image), last.pyramid(image)
    assert not torch.allclose(a[0], b[0]) and torch.allclose(a[3], b[3])  # the coarsest gets the last chunk's either way
    with pytest.raises(BadInput, match="vit_features"):
        micro(vit_features="each")  # two chunks can't serve four levels


def test_a_chunk_without_exchange_to_the_vit_may_hold_a_spare_mrfp():
    off = {"to_vit": (False, True)}
    assert micro(**off).interactions[0].mrfp is not None and micro(**off, spare_mrfp=False).interactions[0].mrfp is None


def test_the_large_variants_names_are_those_of_its_own_code():
    model = micro(beit=True, positions=False, windows=(2, 2), bottlenecks=(1,))
    theirs = authors_of("vit_comer").export_state(model)
    for name in ("blocks.0.gamma_1", "blocks.1.attn.relative_position_bias_table", "blocks.0.attn.q_bias", "norm4.weight"):
        assert name in theirs
    for name in ("injector.gamma", "extractor.cfinter.attn.value_proj.weight", "multiconv.dwconv.dwconv6.bias"):
        assert f"interactions.0.{name}" in theirs
    assert "interactions.1.extra_extractors.0.ffn.dwconv.dwconv.weight" in theirs
    other = micro(beit=True, positions=False, windows=(2, 2), bottlenecks=(1,))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    load_state(other, {**theirs, "blocks.0.attn.relative_position_index": torch.zeros(4, 4)})
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


def test_sides_must_be_multiples_of_32():
    with pytest.raises(BadInput, match="multiples of 32"):
        micro()(torch.randn(1, 3, 48, 32))


def test_the_logits_come_from_the_mean_of_the_summed_maps():
    model, image = micro(), torch.randn(2, 3, 64, 32)
    with torch.no_grad():
        pooled = sum(m.mean((2, 3)) for m in model.pyramid(image))
        torch.testing.assert_close(model(image), model.head(pooled))


def test_initialisation_leaves_the_vit_undisturbed():
    model = micro()
    assert all(i.to_vit.gamma.abs().sum() == 0 for i in model.interactions)
    assert all(torch.equal(b.scale1, torch.ones(48)) for b in model.blocks)


def test_it_tells_large_shapes_from_small_ones_in_a_few_steps():
    torch.manual_seed(0)
    model = create("vit_comer_micro", num_classes=2).train()
    image = torch.rand(32, 3, 32, 32) * 0.3
    label = torch.arange(32) % 2
    for i in range(32):
        side = 6 if label[i] == 0 else 14
        image[i, :, 8 : 8 + side, 8 : 8 + side] += 0.6
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    first = None
    for _ in range(12):
        loss = model.loss({"image": image, "label": label}).total
        first = first or loss.item()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.5 * first
