from pathlib import Path

import pytest
import torch

from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.image.sg_former import GlobalAttention, HybridScaleAttention, SelfGuidedAttention, sine_table

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "sg_former").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters in (None, outcome.expected_parameters)


@pytest.mark.parametrize(("side", "groups", "keys"), [(56, (196, 56, 28), 60), (28, (49, 14, 7), 60), (14, (2, 1), 147)])
def test_claim_the_number_of_keys_at_224(side, groups, keys):
    layer = SelfGuidedAttention(8, 2, groups)
    by_rows, by_columns = layer.keys(torch.randn(1, side * side, 8), torch.rand(1, side, side))
    assert by_rows.shape == by_columns.shape == (1, keys, 8)


def counting(groups=(16, 8, 4)) -> SelfGuidedAttention:
    """A merge that sums its tokens, so that a key tells which tokens are in it."""
    layer = SelfGuidedAttention(64, 2, groups)
    for merge in layer.merge:
        torch.nn.init.ones_(merge.weight)
        torch.nn.init.zeros_(merge.bias)
    return layer


def test_claim_significant_tokens_are_merged_in_smaller_groups():
    torch.manual_seed(0)
    significance = torch.rand(1, 8, 8)
    members, _ = counting().keys(torch.eye(64)[None], significance)  # a key is the sum of its tokens' unit vectors
    rank = significance.flatten().argsort().argsort()
    sizes = torch.cat([torch.full((16,), 16.0), torch.full((32,), 8.0), torch.full((16,), 4.0)])[rank]
    torch.testing.assert_close(members[0].sum(1)[members[0].argmax(0)], sizes)
    assert (members[0].sum(0) == 1).all()  # each token in one group
    groups = [sorted(rank[row > 0].tolist()) for row in members[0]]
    assert all(g == list(range(g[0], g[0] + len(g))) for g in groups)  # neighbours in order of significance


def test_claim_other_significant_tokens_give_other_groups():
    x, layer = torch.eye(64)[None], counting()
    low = torch.arange(64.0).view(1, 8, 8)
    first, second = layer.keys(x, low)[0], layer.keys(x, -low)[0]
    assert not torch.equal(first, second)
    assert first[0, 0].nonzero().flatten().tolist() == [*range(16)] and second[0, 0].nonzero().flatten().tolist() == [*range(48, 64)]


def test_a_constant_map_gives_fixed_groups_of_rows_and_of_columns():
    rows, columns = counting().keys(torch.eye(64)[None], torch.ones(1, 8, 8))
    assert rows[0, 0].nonzero().flatten().tolist() == [*range(16)]
    assert columns[0, 0].nonzero().flatten().tolist() == sorted(r * 8 + c for r in range(8) for c in range(2))


def test_a_group_that_is_not_full_repeats_its_last_token():
    layer = counting((4, 4, 4))
    members, _ = layer.keys(torch.cat([torch.eye(9), torch.zeros(9, 55)], 1)[None], torch.arange(9.0).view(1, 3, 3))
    assert members[0, :, :9].tolist()[0] == [1, 3, 0, 0, 0, 0, 0, 0, 0]  # the lowest quarter of nine is two tokens
    torch.testing.assert_close(members[0].sum(1), torch.full((3,), 4.0))


def explicit_significance(layer: HybridScaleAttention, x: torch.Tensor, h: int, w: int) -> torch.Tensor:
    """What each place of one sample receives, head by head and query by query."""
    c, heads, r, size = x.shape[2], layer.heads, layer.reduction, layer.window
    q, local = layer.q_qkv(x)[0].split([c // 2, 3 * c // 2], -1)
    padded = torch.nn.functional.pad(x[0].view(h, w, c), (0, 0, 0, -w % r, 0, -h % r))
    small = layer.shrink(padded.permute(2, 0, 1)[None])[0]
    k = layer.kv(torch.nn.functional.gelu(layer.shrink_norm(small.flatten(1).T)))[:, : c // 2]
    far, near = torch.zeros(small[0].numel()), torch.zeros(h, w)
    width, columns = c // layer.heads // 2, small.shape[2]
    windows: dict[tuple[int, int], list[int]] = {}
    for i in range(h * w):
        windows.setdefault((i // w // size, i % w // size), []).append(i)
    for head in range(heads):
        of = slice(head * width, (head + 1) * width)
        far += (q[:, of] @ k[:, of].T * layer.scale).softmax(1).mean(0) / heads
        for places in windows.values():
            lq, lk = local[places][:, of], local[places][:, c // 2 :][:, of]
            near.view(-1)[places] += (lq @ lk.T * layer.scale).softmax(1).mean(0) / heads
    cells = torch.tensor([i // w // r * columns + i % w // r for i in range(h * w)])
    return near + far[cells].view(h, w)


@pytest.mark.parametrize("grid", [(8, 8), (7, 10), (3, 2)])
def test_significance_is_the_mean_attention_received_on_any_grid(grid):
    torch.manual_seed(0)
    layer, x = HybridScaleAttention(16, 4, 4, window=4), torch.randn(2, grid[0] * grid[1], 16)
    with torch.no_grad():
        _, significance = layer(x, grid)
        for i in range(2):
            torch.testing.assert_close(significance[i], explicit_significance(layer, x[i : i + 1], *grid), atol=1e-6, rtol=1e-4)


def test_no_gradient_flows_through_the_significance():
    x = torch.randn(1, 64, 16, requires_grad=True)
    _, significance = HybridScaleAttention(16, 4, 4, window=4)(x, (8, 8))
    assert not significance.requires_grad


def test_windows_do_not_see_padding_or_one_another():
    layer = HybridScaleAttention(16, 4, 4, window=4).eval()
    qkv = torch.randn(1, 6, 6, 24)
    out, _ = layer.near(qkv)
    corner, _ = layer.near(qkv[:, 4:, 4:])
    torch.testing.assert_close(out.view(1, 6, 6, 8)[:, 4:, 4:], corner.view(1, 2, 2, 8))


def test_blocks_alternate_and_the_last_stage_attends_plainly():
    with torch.device("meta"):
        kinds = [[type(b.attention) for b in s.blocks] for s in create("sg_former_s").stages]
    assert kinds[:3] == [[HybridScaleAttention, SelfGuidedAttention] * n for n in (1, 2, 8)] and kinds[3] == [GlobalAttention]


def test_any_size_and_any_depth_run():
    model = create("sg_former_micro", depths=(3, 1, 2)).eval()
    with torch.no_grad():
        for size in ((32, 32), (45, 70), (9, 5), (1, 1)):
            assert torch.isfinite(model(torch.randn(2, 3, *size))).all()


def test_samples_keep_their_own_order():
    torch.manual_seed(0)
    model, x = create("sg_former_micro").double().eval(), torch.randn(3, 3, 40, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(x)[1:2], model(x[1:2]))


def test_dense_gives_a_pyramid():
    model = create("sg_former_s_dense", depths=(2, 2, 2, 1)).eval()
    with torch.no_grad():
        maps = model(torch.rand(1, 3, 96, 64))
    assert [tuple(m.shape) for m in maps] == [(1, c, 96 // s, 64 // s) for c, s in zip((64, 128, 256, 512), (4, 8, 16, 32), strict=True)]


def test_the_position_table_starts_as_waves():
    table = sine_table((3, 5), 8).view(3, 5, 8)
    assert torch.equal(table[0, :, :4], table[2, :, :4]) and torch.equal(table[:, 0, 4:], table[:, 4, 4:])
    angle = torch.tensor([3.0, 0.03])
    torch.testing.assert_close(table[0, 3, :4], torch.cat([angle.sin(), angle.cos()]))


def test_what_cannot_be_built_is_said():
    for bad in ({"heads": (3, 4, 4)}, {"dims": (22, 48, 96)}, {"groups": ((4,), (2, 1), ())}):
        with pytest.raises(BadInput):
            create("sg_former_micro", **bad)


def test_it_learns():
    torch.manual_seed(0)
    model = create("sg_former_micro").train()
    batch = model.example_batch(16)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(25):
        loss = model.loss(batch).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert model.eval().predict(batch).label.shape == (16,)
