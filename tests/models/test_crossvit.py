from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from formarium import create
from formarium.authors import authors_of, load_state
from formarium.engine.records import read_header, replay
from formarium.models.image.crossvit import ClassTokenAttention

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "crossvit").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


def test_claim_one_query_whose_cost_is_linear_in_tokens():
    from torch.utils.flop_counter import FlopCounterMode

    layer = ClassTokenAttention(48, 3, True)

    def flops(tokens: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(torch.rand(1, tokens, 48))
        return counter.get_total_flops()

    fixed = 2 * flops(100) - flops(200)
    assert flops(400) - fixed == 4 * (flops(100) - fixed)
    assert layer(torch.rand(2, 7, 48)).shape == (2, 1, 48)


@pytest.mark.parametrize("bias", [True, False])
def test_moving_the_projections_to_the_query_changes_nothing(bias):
    torch.manual_seed(0)
    layer, x = ClassTokenAttention(24, 3, bias).double(), torch.randn(2, 9, 24, dtype=torch.float64)
    q, k, v = (p(t).unflatten(-1, (3, 8)).transpose(1, 2) for p, t in [(layer.q, x[:, :1]), (layer.k, x), (layer.v, x)])
    plain = layer.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), plain)


def test_claim_only_the_class_token_crosses():
    """With the crossings silenced, a branch's logits don't depend on the other branch."""
    torch.manual_seed(0)
    model = create("crossvit_micro").eval()
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        before = model.branch_logits(image)
        model.branches[0].embed.weight.mul_(2)
        mixed = model.branch_logits(image)
        assert not torch.equal(before[1], mixed[1])
        for block in model.blocks:
            for cross in block.cross:
                for b in cross:
                    b.attention.out.weight.zero_()
        alone = model.branch_logits(image)
        model.branches[0].embed.weight.mul_(2)
        assert torch.equal(model.branch_logits(image)[1], alone[1])


def test_claim_both_directions_are_simultaneous():
    torch.manual_seed(0)
    model = create("crossvit_micro").eval()
    block = model.blocks[0]
    xs = [torch.randn(1, 1 + b.grid[0] ** 2, d) for b, d in zip(model.branches, model.config.dims, strict=True)]
    grids = [b.grid for b in model.branches]
    with torch.no_grad():
        both = block(xs, grids)
        for p in block.cross[0].parameters():
            p.zero_()
        one = block(xs, grids)
    assert torch.equal(both[1], one[1]) and not torch.equal(both[0], one[0])


def test_a_non_square_image_is_resized_to_each_branch():
    model = create("crossvit_micro").eval()
    assert model(torch.rand(1, 3, 50, 20)).shape == (1, 10)
    assert [m.shape[2:] for m in model.pyramid(torch.rand(1, 3, 50, 20))] == [(10, 10), (4, 4)]


def test_names_go_back_exactly():
    model = create("crossvit_tiny_224")
    assert {*authors_of("crossvit").export_state(model)} == {*read_header(RECORDS[-1])["state"]}


def test_several_crossings_are_numbered_and_load():
    model = create("crossvit_micro", depths=((1, 2, 2), (1, 1, 0)))
    theirs = authors_of("crossvit").export_state(model)
    assert "blocks.0.fusion.1.1.attn.wq.weight" in theirs and "blocks.1.fusion.0.attn.wq.weight" in theirs
    load_state(create("crossvit_micro", depths=((1, 2, 2), (1, 1, 0))), theirs)
