import pytest
import torch
import torch.nn.functional as F
from torch import nn

from formarium import create
from formarium.errors import BadInput
from formarium.models.image.maformer import AttentionFusion, Block, GlobalDownsampling, GlobalPositions, MAFBlock


def block(fusion: str = "attention", alive: bool = True) -> MAFBlock:
    """The first block of a small network: 16x16 tokens, windows of 4x4; its projections as after training."""
    torch.manual_seed(0)
    made = create("maformer_micro", fusion=fusion).stages[0].blocks[0].eval()
    if alive:
        for m in made.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=0.2)
        if fusion == "scalar":
            nn.init.constant_(made.scales, 0.5)
    return made


def call(made: MAFBlock, x: torch.Tensor) -> torch.Tensor:
    return made(x, (16, 16), *([] if made.fusion == "none" else [torch.zeros(1, 128, x.shape[-1])]))


def reach(made: MAFBlock) -> torch.Tensor:
    """Which tokens [16, 16] the output at (1, 2) depends on."""
    x = torch.randn(1, 256, 24, requires_grad=True)
    call(made, x)[0, 1 * 16 + 2, 5].backward()
    return (x.grad[0].abs().sum(-1) > 0).view(16, 16)


@pytest.mark.parametrize("fusion", ["attention", "scalar"])
def test_claim_a_token_depends_on_tokens_outside_its_window(fusion):
    assert reach(block(fusion)).all()


def test_claim_without_the_global_stream_it_does_not():
    seen = reach(block("none"))
    assert seen[:4, :4].all() and seen.sum() == 16


@pytest.mark.parametrize(("stage", "n"), [(0, 56 * 56), (1, 28 * 28)])
def test_claim_fusion_costs_half_of_full_attention(stage, n, monkeypatch):
    """N M entries with M = N / 2: 3136 x 1568 and 784 x 392."""
    made = create("maformer_s", depths=(1, 1, 1, 1)).eval().stages[stage].blocks[0]
    assert made.gld.reduce.weight.shape == (n // 2, n)
    assert made.gld.grid == ((28, 56), (14, 28))[stage]
    sizes, plain = [], F.scaled_dot_product_attention

    def counted(q, k, v):
        sizes.append((q.shape[2], k.shape[2]))
        return plain(q, k, v)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    side = int(n**0.5)
    with torch.no_grad():
        made.merge(torch.randn(1, n, made.norm1.weight.numel()), torch.randn(1, n // 2, made.norm1.weight.numel()), (side, side))
    assert sizes == [(n, n // 2)]


def test_claim_the_block_starts_as_its_local_stream():
    fused, x = block(alive=False), torch.randn(2, 256, 24)
    torch.testing.assert_close(call(fused, x), fused.local(x, fused.norm1(x), (16, 16)))
    scalar = block("scalar", alive=False)
    torch.testing.assert_close(call(scalar, x), scalar.local(x, scalar.norm1(x), (16, 16)))


def test_claim_the_order_of_global_tokens_makes_no_difference():
    torch.manual_seed(0)
    fusion = AttentionFusion(24, 2).eval()
    local, far = torch.randn(2, 40, 24), torch.randn(2, 20, 24)
    torch.testing.assert_close(fusion(local, far[:, torch.randperm(20)]), fusion(local, far), rtol=1e-4, atol=1e-5)


def test_claim_a_corner_learns_of_the_opposite_one():
    """Have two marks in opposite corners the same colour? Read out at one corner: windows alone stay at chance."""
    marks = torch.randint(2, (256, 2), generator=torch.Generator().manual_seed(0)).float() * 2 - 1
    x = torch.zeros(256, 64, 24)
    x[:, 0, :12], x[:, 63, :12] = marks[:, :1], marks[:, 1:]
    x[:, 0, 12:], x[:, 63, 12:] = -marks[:, :1], -marks[:, 1:]
    same = (marks[:, 0] == marks[:, 1]).long()
    scores = {}
    for fusion in ("attention", "none"):
        torch.manual_seed(0)
        made = create("maformer_micro", fusion=fusion, image_size=16).stages[0].blocks[0]
        places = [] if fusion == "none" else [torch.zeros(1, 32, 24)]
        head = nn.Sequential(nn.Linear(24, 32), nn.GELU(), nn.Linear(32, 2))
        optimiser = torch.optim.AdamW([*made.parameters(), *head.parameters()], lr=1e-2)
        for _ in range(60):
            chosen = torch.randint(256, (32,))
            loss = F.cross_entropy(head(made(x[chosen], (8, 8), *places)[:, 0]), same[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        with torch.no_grad():
            scores[fusion] = (head(made(x[:64], (8, 8), *places)[:, 0]).argmax(1) == same[:64]).float().mean().item()
    assert scores["attention"] > 0.95 and scores["none"] < 0.7


def test_a_global_token_is_a_combination_of_all_places_plus_its_own():
    torch.manual_seed(0)
    gld, places = GlobalDownsampling((4, 6), (2, 6)), GlobalPositions(8, 2, (2, 6))
    nn.init.normal_(gld.reduce.bias)
    x = torch.randn(3, 24, 8)
    table = F.interpolate(places.table.view(1, 2, 2, 8).permute(0, 3, 1, 2), (2, 6), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(gld(x, places(), (4, 6)), gld.reduce(x.transpose(1, 2)).transpose(1, 2) + table)
    wide = torch.randn(1, 70, 8)  # another map is resized first
    small = F.interpolate(wide.transpose(1, 2).unflatten(2, (7, 10)), (4, 6), mode="bilinear").flatten(2).transpose(1, 2)
    torch.testing.assert_close(gld(wide, places(), (7, 10)), gld(small, places(), (4, 6)))


def test_only_the_first_two_stages_fuse():
    with torch.device("meta"):
        model = create("maformer_l")
    assert [{type(b) for b in s.blocks} for s in model.stages] == [{MAFBlock}, {MAFBlock}, {Block}, {Block}]
    assert [len(s.blocks) for s in model.stages] == [2, 2, 19, 2]


def test_sizes_are_near_the_published_ones():
    for name, parameters in [("maformer_s", 23e6), ("maformer_b", 53e6), ("maformer_l", 105e6)]:
        with torch.device("meta"):
            count = create(name).parameters_count
        assert abs(count / parameters - 1) < 0.13


def test_other_sizes_and_the_pyramid():
    model = create("maformer_s_pyramid", depths=(1, 1, 1, 1)).eval()
    with torch.no_grad():
        maps = model(torch.rand(1, 3, 96, 160))
    assert [tuple(m.shape) for m in maps] == [(1, c, 96 // s, 160 // s) for c, s in zip((64, 128, 256, 512), (4, 8, 16, 32), strict=True)]
    assert not hasattr(model, "head")


def test_maps_that_windows_do_not_fill_are_padded_with_zeros():
    made, x = block("none"), torch.randn(1, 30, 24)
    y = F.pad(made.norm1(x).view(1, 5, 6, 24), (0, 0, 0, 2, 0, 3))
    y = x + made.attention(y)[:, :5, :6].reshape(1, 30, 24)
    torch.testing.assert_close(made(x, (5, 6)), y + made.mlp(made.norm2(y)))


def test_an_unknown_fusion_is_refused():
    with pytest.raises(BadInput, match="fusion"):
        create("maformer_micro", fusion="sum")


def test_tables_escape_weight_decay():
    from fnmatch import fnmatchcase

    model = create("maformer_micro")
    globs = model.no_weight_decay()
    free = {n for n, _ in model.named_parameters() if any(fnmatchcase(n, g) for g in globs)}
    assert free == {f"stages.{i}.{n}" for i in (0, 1) for n in ("blocks.0.attention.table", "positions.table")}
