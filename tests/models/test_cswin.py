from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from formarium import create
from formarium.authors import authors_of
from formarium.engine.records import read_header, replay
from formarium.models.image.cswin import Block, StripeAttention

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "cswin").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


def plain_stripes(layer: StripeAttention, qkv: torch.Tensor) -> torch.Tensor:
    """One stripe at a time, in the order of the paper."""
    b, h, w, _, dim = qkv.shape
    out = torch.zeros(b, h, w, dim)
    length, width = (w, layer.width) if layer.vertical else (h, layer.width)
    for start in range(0, length, width):
        at = (slice(None), slice(None), slice(start, start + width)) if layer.vertical else (slice(None), slice(start, start + width))
        part = qkv[at]
        q, k, v = (t.reshape(b, -1, layer.heads, dim // layer.heads).transpose(1, 2) for t in part.unbind(3))
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape((*part.shape[:3], dim))
        near = layer.lepe(part[:, :, :, 2].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        out[at] = seen + near
    return out


@pytest.mark.parametrize("vertical", [False, True])
def test_stripes_in_one_go_equal_one_at_a_time(vertical):
    torch.manual_seed(0)
    layer = StripeAttention(8, 2, 2, vertical)
    qkv = torch.randn(2, 6, 4, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(layer(qkv), plain_stripes(layer, qkv))


def test_claim_a_block_sees_exactly_a_cross():
    torch.manual_seed(0)
    block = Block(16, 4, 2, 2.0, True, 0.0).eval()
    x = torch.randn(1, 8, 8, 16)
    other = x.clone()
    other[0, 3, 6] += torch.randn(16)
    with torch.no_grad():
        moved = (block(x) - block(other)).abs().sum(-1)[0] > 0
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, :], expected[:, 6:8] = True, True  # the stripes of two that hold row 3 and column 6
    assert torch.equal(moved, expected)


def test_claim_stripes_as_wide_as_the_image_are_full_attention():
    torch.manual_seed(0)
    wide, whole = StripeAttention(8, 2, 5), StripeAttention(8, 2, None)
    whole.load_state_dict(wide.state_dict())
    upright = StripeAttention(8, 2, 5, vertical=True)
    upright.load_state_dict(wide.state_dict())
    qkv = torch.randn(1, 5, 5, 3, 8)
    with torch.no_grad():
        torch.testing.assert_close(wide(qkv), whole(qkv))
        torch.testing.assert_close(upright(qkv), whole(qkv))


def test_lepe_does_not_leak_between_stripes():
    layer = StripeAttention(4, 1, 2)
    qkv = torch.zeros(1, 4, 3, 3, 4)
    qkv[0, 1, :, 2] = 1  # values of the second row only
    with torch.no_grad():
        layer.lepe.bias.zero_()
        assert layer(qkv)[0, 2:].abs().max() == 0


def test_a_stage_one_stripe_wide_sees_everything():
    model = create("cswin_tiny_224", image_size=112)
    assert [len(s.blocks[0].attention) for s in model.stages] == [2, 2, 1, 1]
    assert [len(s.blocks[0].attention) for s in create("cswin_tiny_dense", image_size=112).stages] == [2, 2, 2, 1]


def test_dense_weights_are_the_classifiers():
    torch.manual_seed(0)
    model, dense = create("cswin_tiny_224").eval(), create("cswin_tiny_dense").eval()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(("head", "norms"))}
    dense.load_state_dict(state | {k: v for k, v in dense.state_dict().items() if k.startswith("norms")})
    image = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(dense.norms[0](model.pyramid(image)[0].permute(0, 2, 3, 1)), dense(image)[0].permute(0, 2, 3, 1))


def test_names_go_back_exactly():
    for path in RECORDS:
        header = read_header(path)
        assert {*authors_of("cswin").export_state(create(header["variant"]))} == {*header["state"]}
