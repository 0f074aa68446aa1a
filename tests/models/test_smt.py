from pathlib import Path

import pytest
import torch

from formarium import create, trace
from formarium.engine.records import replay
from formarium.models.image.smt import LocallyEnhancedAttention, ScaleAwareModulation

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "smt").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


@pytest.fixture
def mixer():
    torch.manual_seed(0)
    return ScaleAwareModulation(16, 4, 2, True).eval()


def test_claim_head_i_sees_exactly_3_plus_2i_pixels(mixer):
    for i, conv in enumerate(mixer.mixed):
        x = torch.zeros(1, 4, 21, 21, requires_grad=True)
        conv(x)[0, 0, 10, 10].backward()
        rows, columns = x.grad[0, 0].nonzero(as_tuple=True)
        assert rows.unique().numel() == columns.unique().numel() == 3 + 2 * i
        assert x.grad[0, 1:].abs().sum() == 0  # depthwise


def test_claim_aggregation_joins_one_channel_of_every_head(mixer):
    """Silencing head i's channel g changes the widened channels of group g only (before the dense convolution)."""
    seen = []
    mixer.gather.register_forward_hook(lambda m, args, out: seen.append(out))
    x = torch.randn(1, 36, 16)
    mixer.modulator(x, (6, 6))
    for i, conv in enumerate(mixer.mixed):
        for g in range(4):
            keep_weight, keep_bias = conv.weight.data[g].clone(), conv.bias.data[g].clone()
            conv.weight.data[g], conv.bias.data[g] = 0, 0
            mixer.modulator(x, (6, 6))
            conv.weight.data[g], conv.bias.data[g] = keep_weight, keep_bias
            moved = (seen[-1] - seen[0]).abs().amax((0, 2, 3)).nonzero().flatten().tolist()
            assert moved == [*range(8 * g, 8 * g + 8)], f"head {i}, channel {g}"


def test_claim_linear_in_v_for_a_fixed_modulator(mixer):
    x = torch.randn(2, 36, 16)
    plain = mixer(x, (6, 6)) - mixer.out.bias
    mixer.v.weight.data *= 3
    mixer.v.bias.data *= 3
    torch.testing.assert_close(mixer(x, (6, 6)) - mixer.out.bias, 3 * plain)


def test_stage_three_alternates():
    model = create("smt_t")
    kinds = [[type(b.mixer) for b in s.blocks] for s in model.stages]
    assert kinds[0] == [ScaleAwareModulation] * 2
    assert kinds[2] == [ScaleAwareModulation, LocallyEnhancedAttention] * 4
    assert kinds[3] == [LocallyEnhancedAttention]


def test_dense_gives_normalised_maps_and_the_classifier_the_same():
    torch.manual_seed(0)
    model = create("smt_micro").eval()
    dense = create("smt_micro", dense=True).eval()
    dense.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head")})
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for a, b, stride in zip(dense(image), model.pyramid(image), (4, 8, 16, 32), strict=True):
            torch.testing.assert_close(a, b)
            assert a.shape[2:] == (64 // stride, 96 // stride)
            torch.testing.assert_close(a.mean(1), torch.zeros_like(a.mean(1)), atol=1e-5, rtol=0)


def test_layer_scale_starts_at_its_value():
    model = create("smt_micro", layer_scale=1e-4)
    assert all((b.scale1 == 1e-4).all() and (b.scale2 == 1e-4).all() for s in model.stages for b in s.blocks)


def test_channels_last_views_move_no_memory():
    features = trace(create("smt_micro").eval(), torch.rand(1, 3, 32, 32), at="stages.*.tokens")
    assert [f.grid for f in features.values()] == [(8, 8), (4, 4), (2, 2), (1, 1)]
