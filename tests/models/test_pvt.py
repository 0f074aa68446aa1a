import math
from pathlib import Path

import pytest
import torch
from torch import nn

from formarium import create, trace
from formarium.engine.records import replay
from formarium.models.image.pvt import SpatialReductionAttention
from formarium.nn.attention import SelfAttention

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "pvt").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


def test_claim_every_stage_attends_to_49_keys_at_224():
    model = create("pvt_tiny").eval()
    keys = []
    for stage in model.stages:
        stage.blocks[0].attention.kv.register_forward_pre_hook(lambda m, args: keys.append(args[0].shape[1]))
    with torch.no_grad():
        model(torch.rand(1, 3, 224, 224))
    assert keys == [49, 49, 49, 50]  # the last one has the class token beside them


def test_claim_the_cost_of_attention_falls_with_the_square_of_the_reduction():
    from torch.utils.flop_counter import FlopCounterMode

    x, grid = torch.rand(1, 32 * 32, 64), (32, 32)
    q = torch.rand(1, 1, 32 * 32, 64)

    def flops(reduction: int) -> int:
        layer = SpatialReductionAttention(64, 1, reduction)
        keys = layer.reduce(x, grid).shape[1]
        with FlopCounterMode(display=False) as counter:
            (q @ torch.rand(1, 1, 64, keys)) @ torch.rand(1, 1, keys, 64)
        return counter.get_total_flops()

    assert flops(1) == 16 * flops(4) == 64 * flops(8)


def test_without_reduction_it_is_plain_attention():
    ours, plain = SpatialReductionAttention(64, 4, 1), SelfAttention(64, 4)
    with torch.no_grad():
        plain.qkv.weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        plain.qkv.bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
    plain.out.load_state_dict(ours.out.state_dict())
    x = torch.randn(2, 30, 64)
    torch.testing.assert_close(ours(x, (5, 6)), plain(x))


def test_a_patch_embedding_sees_its_own_patch_only():
    model = create("pvt_tiny").eval()
    image = torch.rand(1, 3, 64, 64)
    other = image.clone()
    other[..., 4:8, 8:12] += 1
    change = [trace(model, x, at="stages.0.tokens")["stages.0.tokens"].map() for x in (image, other)]
    moved = (change[0] - change[1]).abs().sum(1)[0].nonzero().tolist()
    assert moved == [[1, 2]]


def test_the_classifier_gives_a_pyramid_too():
    model = create("pvt_tiny", num_classes=3).eval()
    with torch.no_grad():
        maps = model.pyramid(torch.rand(2, 3, 96, 64))
    assert [tuple(m.shape) for m in maps] == [(2, c, 96 // s, 64 // s) for c, s in zip((64, 128, 320, 512), (4, 8, 16, 32), strict=True)]


def test_only_the_class_token_escapes_weight_decay():
    assert create("pvt_micro").no_weight_decay() == {"cls_token"}


def test_drop_path_rises_linearly_over_all_blocks():
    model = create("pvt_tiny", drop_path=0.7)
    rates = [b.drop.rate for s in model.stages for b in s.blocks]
    assert all(math.isclose(r, 0.1 * i, abs_tol=1e-9) for i, r in enumerate(rates))


def test_initialisation():
    model = create("pvt_tiny")
    weights = torch.cat([m.weight.flatten() for m in model.modules() if isinstance(m, nn.Linear)])
    assert abs(weights.std().item() - 0.02) < 1e-3 and weights.abs().max() <= 2
