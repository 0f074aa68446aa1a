from pathlib import Path

import pytest
import torch

from formarium import create
from formarium.authors import authors_of
from formarium.engine.records import read_header, replay
from formarium.errors import BadInput
from formarium.models.image.crossformer import CrossScaleConv, GroupAttention
from formarium.nn.windows import from_groups, relative_offsets, to_groups

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "crossformer").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


@pytest.mark.parametrize(("size", "interval"), [(3, 1), (3, 2), (2, 3)])
def test_claim_groups_partition_the_tokens(size, interval):
    y, x = torch.meshgrid(torch.arange(12), torch.arange(18), indexing="ij")
    places = torch.stack([y, x], dim=-1)[None]
    groups = to_groups(places, size, interval)
    assert torch.equal(from_groups(groups, size, 12, 18, interval), places)
    spread = groups - groups[:, :1]
    assert (spread % interval == 0).all() and spread.amax() == (size - 1) * interval
    assert groups.reshape(-1, 2).unique(dim=0).shape[0] == 12 * 18


def test_claim_the_bias_depends_on_the_offset_alone():
    torch.manual_seed(0)
    layer = GroupAttention(64, 2, 7, True, True)
    with torch.no_grad():
        small, large = layer.position_bias(4), layer.position_bias(7)
    for size, bias in [(4, small), (7, large)]:
        offsets, index = relative_offsets(size)
        with torch.no_grad():
            expected = layer.bias(offsets).T[:, index]
        torch.testing.assert_close(bias, expected)
    # token (1, 2) against (3, 0) has the same bias in both
    torch.testing.assert_close(small[:, 1 * 4 + 2, 3 * 4 + 0], large[:, 1 * 7 + 2, 3 * 7 + 0])


def test_a_token_is_made_of_patches_of_every_size():
    embed = CrossScaleConv(3, 32, (4, 8, 16, 32), 4)
    assert [c.out_channels for c in embed.convs] == [16, 8, 4, 4]
    image = torch.zeros(1, 3, 64, 64, requires_grad=True)
    embed(image)[0, 8, 8].sum().backward()
    rows = image.grad.abs().sum((0, 1, 3)).nonzero().flatten()
    assert rows.numel() == 32 and rows[0] == 8 * 4 - 14


@pytest.mark.parametrize("size", [(32, 48), (45, 38)])
def test_wide_kernels_are_computed_as_the_convolutions_they_are(size):
    scales = CrossScaleConv(3, 16, (4, 8, 16, 32), 4).double()
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    parameters = (x, *scales.parameters())
    ours, plain = scales(x), torch.cat([conv(x) for conv in scales.convs], 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, plain)
    back = torch.randn_like(plain)
    for a, b in zip(torch.autograd.grad(ours, parameters, back), torch.autograd.grad(plain, parameters, back), strict=True):
        torch.testing.assert_close(a, b)


def test_padding_is_masked_so_that_it_changes_nothing():
    """A map that doesn't fill its groups gives its real tokens what attention over the real tokens alone gives."""
    torch.manual_seed(0)
    block = create("crossformer_micro").eval().stages[0].blocks[0]
    x = torch.randn(1, 6, 6, 24)
    with torch.no_grad():
        out = block.attend(x)
        corner = block.attend(x[:, :4, :4])
    torch.testing.assert_close(out[:, :4, :4], corner)


def test_each_call_decides_by_its_own_size():
    """A small map in between leaves no mark on the next large one."""
    torch.manual_seed(0)
    model = create("crossformer_micro", dense=True).eval()
    large, small = torch.rand(1, 3, 64, 64), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        before = model(large)
        model(small)
        after = model(large)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_cooling_stands_after_every_third_block_but_the_last():
    model = create("crossformer_micro", depths=(6, 4, 3), cooling=True)
    assert [[b.cooling is not None for b in s.blocks] for s in model.stages] == [
        [False, False, True, False, False, False],
        [False, False, True, False],
        [False, False, False],
    ]


def test_groups_grow_with_depth():
    sizes = [b.group for s in create("crossformer_tiny_224", group_growth="linear").stages for b in s.blocks]
    assert sizes[0] == 4 and sizes[-1] == 7 and create("crossformer_pp_small_224").stages[2].blocks[0].group == 14
    with pytest.raises(BadInput, match="linear_div"):
        create("crossformer_micro", group_growth="quadratic")


def test_names_go_back_exactly():
    for path in RECORDS:
        header = read_header(path)
        names = {k for k in header["state"] if not k.endswith(("biases", "relative_position_index", "attn_mask"))}
        assert {*authors_of("crossformer").export_state(create(header["variant"]))} == names
