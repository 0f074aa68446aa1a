from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from formarium import create, trace
from formarium.authors import authors_of
from formarium.catalogue import card
from formarium.engine.records import read_header, replay
from formarium.errors import BadInput
from formarium.models.image.dualtoken_vit import Enrichment, StepwiseDown
from formarium.nn.attention import SelfAttention
from formarium.nn.convs import ConvBN

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "dualtoken_vit").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


def alive(module: nn.Module) -> nn.Module:
    """Layer scales and BatchNorms as after training."""
    torch.manual_seed(0)
    for name, p in module.named_parameters():
        if p.ndim == 1:
            nn.init.normal_(p, 1.0 if name.endswith("weight") else 0.0, 0.3)
    return module.eval()


@pytest.mark.parametrize(
    ("name", "published"),
    [("dualtoken_vit_t_mix", 5.8e6), ("dualtoken_vit_s_mix", 11.4e6), ("dualtoken_vit_s", 11.9e6)],
)
def test_claim_sizes_reproduce_the_published_totals(name, published):
    with torch.device("meta"):
        count = create(name).parameters_count
    assert round(100 * abs(count / published - 1)) <= 3  # percent


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_claim_attention_is_over_as_many_keys_at_every_size(size):
    model = create("dualtoken_vit_t_mix", depths=(1, 1, 1)).eval()
    seen = []
    for stage in model.stages:
        stage.blocks[0].aggregate.register_forward_hook(lambda m, args, out: seen.append(args[0].shape[1]))
        stage.blocks[0].enrich.register_forward_hook(lambda m, args, out: seen.append(out.shape[1]))
    with torch.no_grad():
        model(torch.rand(1, 3, *size))
    assert seen == [49] * 6


def test_claim_the_weighted_sum_is_one_number_and_keeps_places():
    layer = Enrichment(8, 16, "mix", 0.5)
    assert layer.balance.numel() == 1
    g, seen = torch.randn(2, 16, 8), torch.randn(2, 16, 8)
    torch.testing.assert_close(layer.weigh(g, seen), (g + seen) / 2)  # it starts in the middle

    def shifted(x):
        return x.unflatten(1, (4, 4)).roll((1, 2), (1, 2)).flatten(1, 2)

    layer.balance.data.fill_(-40.0)  # a = 0: what is seen alone
    torch.testing.assert_close(layer.weigh(g, shifted(seen)), shifted(layer.weigh(g, seen)))


def test_claim_with_a_at_one_the_image_has_no_say_in_the_global_tokens():
    model = alive(create("dualtoken_vit_micro"))
    images = torch.randn(2, 2, 3, 64, 64)
    ga, gb = (trace(model, x, at="stages.2.globals")["stages.2.globals"].tokens for x in images)
    assert not torch.allclose(ga, gb)
    for stage in model.stages:
        stage.blocks[0].enrich.balance.data.fill_(200.0)
    ga, gb = (trace(model, x, at="stages.2.globals")["stages.2.globals"].tokens for x in images)
    torch.testing.assert_close(ga, gb)


def test_claim_global_tokens_know_where_a_mark_is():
    """Which quadrant holds a mark: a linear read-out of the tokens in their places knows, one of their mean doesn't."""
    torch.manual_seed(2)
    model = create("dualtoken_vit_micro").eval()
    g = torch.Generator().manual_seed(0)
    quadrant = torch.randint(4, (300,), generator=g)
    image = torch.zeros(300, 3, 64, 64)
    for i, q in enumerate(quadrant.tolist()):
        y, x = (torch.randint(4, 20, (2,), generator=g) + 32 * torch.tensor([q // 2, q % 2])).tolist()
        image[i, :, y : y + 8, x : x + 8] = 1
    tokens = trace(model, image, at="stages.1.globals")["stages.1.globals"].tokens  # b 16 c

    def held_out(x: torch.Tensor) -> float:
        x = (x - x[:200].mean(0)) / x[:200].std(0)
        gram = x[:200].T @ x[:200] + 10 * torch.eye(x.shape[1])
        read = torch.linalg.solve(gram, x[:200].T @ F.one_hot(quadrant[:200], 4).float())
        return ((x[200:] @ read).argmax(1) == quadrant[200:]).float().mean().item()

    assert held_out(tokens.flatten(1)) > 0.85
    assert held_out(tokens.mean(1)) < 0.6


def test_a_channel_mlp_mixes_no_cells_a_mix_mlp_no_channels():
    g, seen = torch.randn(1, 16, 8), torch.randn(1, 16, 8)
    g.requires_grad_()
    for kind, cells in [("channel", 1), ("mix", 16)]:
        layer = alive(Enrichment(8, 16, kind, 0.5))
        (grad,) = torch.autograd.grad(layer(g, seen)[0, 3, 2], g)
        assert (grad.abs().sum(-1)[0] > 0).sum() == cells


def test_steps_halve_the_map_and_odd_maps_are_resized():
    down = alive(StepwiseDown(8, 2, (7, 7)))
    x = torch.randn(1, 28 * 28, 8)
    calls = []
    for conv in [*down.look, *down.down]:
        conv.register_forward_hook(lambda m, args, out: calls.append((m.conv.stride[0], *out.shape[2:])))
    assert down(x, (28, 28)).shape == (1, 49, 8)
    assert calls == [(1, 28, 28), (2, 14, 14), (1, 14, 14), (2, 7, 7)]  # local information first, then a step down
    assert down(torch.randn(1, 30 * 41, 8), (30, 41)).shape == (1, 49, 8)


def test_keys_and_values_are_the_global_tokens_themselves():
    block = create("dualtoken_vit_micro").eval().stages[0].blocks[0]
    x, g = torch.randn(1, 64, 24), torch.randn(1, 16, 24)
    q, k = (t.unflatten(-1, (2, 12)).transpose(1, 2) for t in (block.query(block.norm_query(x)), g))
    plain = ((q @ k.mT / 12**0.5).softmax(-1) @ k).transpose(1, 2).flatten(2)
    torch.testing.assert_close(block.broadcast(x, g), plain)


def test_gamma_scales_what_the_encoder_adds():
    encoder = alive(create("dualtoken_vit_micro")).stages[0].blocks[0].encoder
    x = torch.randn(2, 30, 24)
    near = encoder.local(x.transpose(1, 2).unflatten(2, (5, 6))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder(x, (5, 6)), x + encoder.gamma * encoder.mlp(encoder.norm(near)))


def test_the_block_adds_what_it_says():
    block = alive(create("dualtoken_vit_micro")).stages[1].blocks[0]
    x, g, grid = torch.randn(2, 12, 48), torch.randn(2, 16, 48), (3, 4)
    with torch.no_grad():
        local = block.encoder(x, grid)
        now = block.enrich(g, block.see(local, grid))
        y = local + block.broadcast(local, now)
        y = y + block.mlp(block.norm_mlp(y))
        out, renewed = block(x, g, grid)
    torch.testing.assert_close(out, y)
    torch.testing.assert_close(renewed, now)


def test_dense_variants_give_four_strides():
    model = create("dualtoken_vit_s_mix_pyramid", depths=(1, 1, 1)).eval()
    with torch.no_grad():
        maps = model(torch.rand(2, 3, 96, 64))
        plain = create("dualtoken_vit_micro").pyramid(torch.rand(1, 3, 70, 64))
    assert [tuple(m.shape) for m in maps] == [(2, c, 96 // s, 64 // s) for c, s in zip((32, 64, 128, 256), (4, 8, 16, 32), strict=True)]
    assert [tuple(m.shape[1:]) for m in plain] == [(12, 18, 16), (24, 9, 8), (48, 5, 4), (64, 3, 2)]


def test_names_go_back_exactly():
    theirs = authors_of("dualtoken_vit").export_state(create("dualtoken_vit_micro"))
    header = read_header(RECORDS[0])["state"]
    stem = {k for k in header if k.startswith("stem.")}
    assert stem == {k for k in theirs if k.startswith("stem.")}
    for part, at in [("merge.", "stages.1.merge."), ("mlp.", "stages.1.blocks.0.mlp.")]:
        assert {k.removeprefix(part) for k in header if k.startswith(part)} == {k.removeprefix(at) for k in theirs if k.startswith(at)}


def test_the_variants_are_what_the_card_says():
    mix, channel = (card("dualtoken_vit").variants[f"dualtoken_vit_s{k}"].config for k in ("_mix", ""))
    assert (mix["token_mlp"], channel["token_mlp"]) == ("mix", "channel")
    with pytest.raises(BadInput, match="token_mlp"):
        create("dualtoken_vit_micro", token_mlp="none")


def test_initialisation_and_weight_decay():
    model = create("dualtoken_vit_s_mix", depths=(1, 1, 1))
    assert abs(model.global_tokens.std() - 0.02) < 2e-3
    assert all(torch.equal(s.blocks[0].encoder.gamma, torch.full_like(s.blocks[0].encoder.gamma, 1e-6)) for s in model.stages)
    assert model.no_weight_decay() == {"global_tokens"}
    assert [len(s.blocks[0].down.down) for s in model.stages] == [2, 1, 0]
    block = model.stages[0].blocks[0]
    assert isinstance(block.aggregate, SelfAttention) and block.aggregate.qkv.bias is None
    assert {type(m) for m in block.down.look} == {ConvBN}


def test_it_learns():
    torch.manual_seed(0)
    model = create("dualtoken_vit_micro", num_classes=2).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    image = torch.rand(16, 3, 64, 64) * 0.3
    label = torch.arange(16) % 2
    image[label == 1, :, 8:24, 40:56] += 0.6  # by place alone
    image[label == 0, :, 40:56, 8:24] += 0.6
    losses = []
    for _ in range(12):
        loss = model.loss({"image": image, "label": label}).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]
