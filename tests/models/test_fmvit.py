import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from formarium import create, load
from formarium.catalogue import card
from formarium.engine.runs import save
from formarium.errors import BadInput
from formarium.models.image.fmvit import ConvMixer, FrequencyMixer
from formarium.nn.reparameterised import PlainConv, RepConv


def trained(module: nn.Module) -> nn.Module:
    """BatchNorms with gains, shifts and statistics as after training."""
    torch.manual_seed(0)
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return module.eval()


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-4 * b.abs().max())


@pytest.fixture(scope="module")
def model():
    return trained(create("fmvit_micro"))


@pytest.fixture(scope="module")
def mixer():
    from formarium.models.image.fmvit import FMViT, Rep

    return trained(FrequencyMixer(Rep(FMViT.Config(group_widths=(12, 4))), 48, 2, 12))


def test_claim_fusing_is_exact_and_layers_become_one_convolution_each(model):
    image = torch.randn(2, 3, 32, 32)
    plain = model(image)  # with gradients: branch by branch
    with torch.no_grad():
        cached = model(image)
    fused = copy.deepcopy(model)
    reps = sum(isinstance(m, RepConv) for m in model.modules())
    assert fused.fuse() is fused and fused.config.fused
    assert not any(isinstance(m, RepConv) for m in fused.modules())
    assert sum(isinstance(m, PlainConv) for m in fused.modules()) == reps
    assert fused.parameters_count < 0.7 * model.parameters_count
    assert len([*fused.modules()]) < len([*model.modules()]) / 3
    assert close(cached, plain) and close(fused(image), plain)


def test_claim_fusing_is_exact_in_double_precision(model):
    double = copy.deepcopy(model).double()
    image = torch.randn(1, 3, 48, 32, dtype=torch.float64)
    plain = double(image)
    assert (double.fuse()(image) - plain).abs().max() < 1e-10 * plain.abs().max()


@pytest.mark.parametrize("name", ["fmvit_t", "fmvit_s", "fmvit_b", "fmvit_l"])
def test_claim_parameters_fall_to_the_deployment_figures(name):
    with torch.device("meta"):
        assert create(name, fused=True).parameters_count == card("fmvit").variants[name].published["parameters_fused"]


def test_fuse_leaves_the_network_that_its_config_builds():
    model = create("fmvit_t", depths=(1, 1, 1, 1))
    built = create("fmvit_t", depths=(1, 1, 1, 1), fused=True)
    fused = model.fuse()
    assert {k: v.shape for k, v in fused.state_dict().items()} == {k: v.shape for k, v in built.state_dict().items()}
    assert fused.config == built.config
    assert fused.fuse() is fused  # nothing left to do


def test_the_deployment_form_saves_and_loads(model, tmp_path):
    fused = copy.deepcopy(model).fuse()
    save(fused, tmp_path / "run")
    again = load(tmp_path / "run")
    assert again.config.fused and again.parameters_count == fused.parameters_count
    image = torch.randn(1, 3, 32, 32)
    assert close(again(image), model(image))


def test_the_deployment_form_is_a_graph(model):
    fused = copy.deepcopy(model).fuse()
    image = torch.randn(2, 3, 32, 32)
    graph = torch.export.export(fused, (image,)).module()
    assert close(graph(image), model(image))


def test_claim_far_pixels_move_the_low_third_only(mixer):
    y = torch.randn(1, 48, 32, 32)
    far = y.clone()
    far[:, :, 30, 30] += 1
    with torch.no_grad():
        change = (mixer.mix(y) - mixer.mix(far)).abs()[0, :, 3, 3]
    low, mid, high = change.split(mixer.widths)
    assert low.max() > 0 and mid.max() == high.max() == 0
    near = y.clone()
    near[:, :, 4, 4] += 1
    with torch.no_grad():
        change = (mixer.mix(y) - mixer.mix(near)).abs()[0, :, 3, 3]
    assert all(part.max() > 0 for part in change.split(mixer.widths))


def test_claim_a_checkerboard_passes_the_middle_band_by(mixer):
    x = torch.randn(1, 12, 16, 16)
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
    with torch.no_grad():
        torch.testing.assert_close(mixer.band(x + board), mixer.band(x), rtol=1e-4, atol=1e-5)
        assert (mixer.high(x + board) - mixer.high(x)).abs().max() > 0.1


def test_the_middle_band_takes_odd_sides(mixer):
    x = torch.randn(1, 12, 7, 5)
    assert mixer.band(x).shape == x.shape
    half = mixer.band(x)
    torch.testing.assert_close(half[..., 0, 0], half[..., 1, 1])  # nearest


def test_attention_is_over_averaged_keys_with_heads_of_a_width(mixer):
    low, x = mixer.low, torch.randn(1, 24, 8, 8)
    q, k, v = low.q(x), low.k(F.avg_pool2d(x, 2)), low.v(F.avg_pool2d(x, 2))
    q, k, v = (t.flatten(2).unflatten(1, (2, 12)).transpose(2, 3) for t in (q, k, v))
    y = (q @ k.mT / 12**0.5).softmax(-1) @ v
    torch.testing.assert_close(low(x), low.out(y.transpose(2, 3).reshape(1, 24, 8, 8)), rtol=1e-4, atol=1e-4)


def test_blocks_stand_where_the_reading_puts_them():
    with torch.device("meta"):
        found = {}
        for name in ("fmvit_t", "fmvit_s", "fmvit_b", "fmvit_l"):
            model = create(name, fused=True)
            found[name] = [[j + 1 for j, b in enumerate(s.blocks) if isinstance(b.mixer, FrequencyMixer)] for s in model.stages]
            assert all(isinstance(b.mixer, (FrequencyMixer, ConvMixer)) for s in model.stages for b in s.blocks)
    assert found == {
        "fmvit_t": [[], [2], [3, 6], [2]],
        "fmvit_s": [[], [4], [5, 10], [3]],
        "fmvit_b": [[], [4], [5, 10, 15, 20], [3]],
        "fmvit_l": [[], [4], [5, 10, 15, 20, 25, 30], [3]],
    }


def test_no_layernorm_anywhere(model):
    assert not any(isinstance(m, nn.LayerNorm) for m in model.modules())


def test_sizes_are_multiples_of_32():
    model = create("fmvit_t", depths=(1, 1, 1, 1)).eval()
    assert model.size_step == 32
    with pytest.raises(BadInput, match="multiples of 32"):
        model(torch.rand(1, 3, 224, 230))
    with torch.no_grad():
        maps = model.pyramid(torch.rand(2, 3, 64, 96))
    assert [tuple(m.shape) for m in maps] == [(2, c, 64 // s, 96 // s) for c, s in zip((48, 96, 192, 384), (4, 8, 16, 32), strict=True)]


def test_the_dense_variants_have_no_head():
    with torch.device("meta"):
        whole, dense = create("fmvit_t"), create("fmvit_t_pyramid")
    assert whole.parameters_count - dense.parameters_count == 384 * 1000 + 1000 + 2 * 384


def test_wrong_widths_are_refused():
    with pytest.raises(BadInput, match="width"):
        create("fmvit_t", dims=(40, 96, 192, 384))


def test_it_learns_and_fusing_keeps_its_predictions():
    torch.manual_seed(0)
    model = create("fmvit_micro", num_classes=2).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    image, label = torch.rand(16, 3, 32, 32) * 0.3, torch.arange(16) % 2
    image[label == 1, :, ::2] += 0.6  # stripes against as much light in columns
    image[label == 0, :, :, ::2] += 0.6
    losses = []
    for _ in range(20):
        loss = model.loss({"image": image, "label": label}).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    model.eval()
    with torch.no_grad():
        before = model.predict({"image": image})
        after = model.fuse().predict({"image": image})
    assert torch.equal(before.label, after.label)
    torch.testing.assert_close(before.probabilities, after.probabilities, rtol=1e-3, atol=1e-4)
