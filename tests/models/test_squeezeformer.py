import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from formarium import create, trace
from formarium.authors import authors_of, load_state
from formarium.cards import read_card
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.audio import squeezeformer
from formarium.models.audio.squeezeformer import (
    Attention,
    Block,
    Convolution,
    FeedForward,
    Frames,
    Squeezeformer,
    relative_shift,
    relative_table,
)

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "squeezeformer").glob("*.safetensors"))


def micro(**changes):
    torch.manual_seed(0)
    return create("squeezeformer_micro", **changes).eval()


def features(batch=2, frames=90, seed=0):
    return torch.randn(batch, frames, 80, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


# the claim ----------------------------------------------------------------------------------------------------------


def test_claim_the_middle_layers_see_half_the_frames():
    read = trace(micro(), (features(frames=128), torch.tensor([128, 128])), at="blocks.*")
    assert [f.tokens.shape[1] for f in read.values()] == [32, 16, 16, 32]


@pytest.mark.parametrize("frames", [64, 90, 123, 61])
def test_claim_the_output_is_as_long_as_without_the_u_net(frames):
    x, length = features(frames=frames), torch.tensor([frames, frames])
    with torch.no_grad():
        with_it, without = micro()(x, length), micro(reduce_at=(), recover_at=())(x, length)
    assert with_it.shape == without.shape == (2, frames // 2 // 2, 29)


def test_claim_attention_inside_costs_a_quarter():
    from torch.utils.flop_counter import FlopCounterMode

    def scores(frames):
        q = torch.rand(1, 4, frames, 16)
        with FlopCounterMode(display=False) as counter:
            (q @ q.transpose(-1, -2)) @ q
        return counter.get_total_flops()

    read = trace(micro(), (features(1, 256), torch.tensor([256])), at="blocks.*")
    outside, inner = (read[f"blocks.{i}"].tokens.shape[1] for i in (0, 1))
    assert scores(outside) == 4 * scores(inner)


def test_claim_no_pre_norm_no_macaron_four_norms_a_block():
    block = create("squeezeformer_xs").blocks[0]
    kinds = [type(m) for m in block.modules()]
    assert kinds.count(nn.LayerNorm) == 4 and kinds.count(FeedForward) == 2 and kinds.count(Attention) == kinds.count(Convolution) == 1
    order = [n for n, m in block.named_modules() if isinstance(m, (Attention, Convolution, FeedForward, nn.LayerNorm))]
    assert order == [
        *("parts.0.first", "parts.0.middle", "parts.0.feed_forward", "parts.0.norm"),
        *("parts.2.first", "parts.2.middle", "parts.2.feed_forward", "parts.2.norm"),
    ]
    assert all(m.factor == 1.0 for m in block.modules() if isinstance(m, FeedForward))


# parts --------------------------------------------------------------------------------------------------------------


def test_relative_shift_reads_the_offset_of_query_and_key():
    t = 5
    by_offset = torch.arange(t - 1, -t, -1.0).expand(1, 1, t, 2 * t - 1)  # the value is the offset itself
    i, j = torch.arange(t)[:, None], torch.arange(t)
    assert torch.equal(relative_shift(by_offset)[0, 0], (i - j).float())


def test_relative_positions_are_sinusoids_of_the_offset():
    table = relative_table(4, 6, torch.device("cpu"))
    assert table.shape == (7, 6)
    torch.testing.assert_close(table[0], torch.tensor([f(3 / 10000 ** (2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]))
    torch.testing.assert_close(table[3], torch.tensor([0.0, 1, 0, 1, 0, 1]))


def test_attention_is_transformer_xl_attention_written_out():
    c = Squeezeformer.Config(dim=8, heads=2, dropout=0.0)
    torch.manual_seed(0)
    layer = Attention(c).eval()
    nn.init.normal_(layer.u), nn.init.normal_(layer.v)
    x, keep = torch.randn(1, 5, 8), torch.tensor([[True] * 4 + [False]])
    with torch.no_grad():
        ours = layer(x, Frames.of(keep, 8))
        q, k, v = layer.qkv(x).view(1, 5, 3, 2, 4).unbind(2)
        p = layer.position(relative_table(5, 8, x.device)).view(9, 2, 4)
        out = torch.zeros(5, 2, 4)
        for i, h in itertools.product(range(5), range(2)):
            logits = torch.stack([(q[0, i, h] + layer.u[h]) @ k[0, j, h] + (q[0, i, h] + layer.v[h]) @ p[4 - (i - j), h] for j in range(5)])
            hidden = torch.tensor([j == 4 or i == 4 for j in range(5)])
            weight = torch.full((5,), 0.2) if hidden.all() else (logits / 2).masked_fill(hidden, -math.inf).softmax(0)
            out[i, h] = weight @ v[0, :, h]
        written = x + layer.out(out.flatten(1)[None])
    torch.testing.assert_close(ours, written)


def test_padding_does_not_change_an_utterance():
    model = micro()
    for frames in (64, 67, 90, 93):
        alone = features(1, frames)
        padded = torch.cat([alone, 7 * torch.randn(1, 31, 80)], 1)
        with torch.no_grad():
            a, b = model(alone, torch.tensor([frames])), model(padded, torch.tensor([frames]))
        kept = model.output_length(torch.tensor([frames]), frames + 31)
        assert kept.item() == a.shape[1]
        torch.testing.assert_close(b[:, : kept.item()], a, atol=1e-5, rtol=1e-4)


def test_as_released_an_utterance_sees_two_frames_of_padding_at_most():
    model = micro(exact_padding=False)
    length = torch.tensor([64])
    one = torch.cat([features(1, 64), torch.zeros(1, 64, 80)], 1)
    other = one.clone()
    other[:, 76:] = 5.0
    with torch.no_grad():
        torch.testing.assert_close(model(one, length)[:, :16], model(other, length)[:, :16])
    assert model.output_length(torch.tensor([90, 89]), 90).tolist() == [22, 22]
    assert model._attended(torch.tensor([90, 61])).tolist() == [24, 16]


def test_the_first_convolutions_look_ahead_only():
    model = micro()
    x = features(1, 64)
    other = x.clone()
    other[:, 20] += 1
    with torch.no_grad():
        change = (model.subsampling(x, torch.tensor([64])) - model.subsampling(other, torch.tensor([64]))).abs().sum(-1)[0]
    moved = change.nonzero().flatten().tolist()
    assert moved == [4, 5]  # output i sees inputs 4 i to 4 i + 6


def test_normalisation_constants_of_the_released_networks():
    model = create("squeezeformer_micro")
    assert {m.eps for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm1d))} == {1e-3}
    assert {m.momentum for m in model.modules() if isinstance(m, nn.BatchNorm1d)} == {0.015}


def test_every_published_size_has_the_reference_s_encoder():
    published = {"xs": 9022464, "s": 18554536, "sm": 28168192, "m": 55606176, "ml": 124996608, "l": 236227840}
    for size, count in published.items():
        with torch.device("meta"):
            model = create(f"squeezeformer_{size}")
        statistics = sum(b.numel() for name, b in model.named_buffers() if "running" in name)
        head = sum(p.numel() for p in model.head.parameters())
        assert model.parameters_count - head + statistics == count, size


OPTIONS = {
    "conformer": {"layout": "fmcf", "adaptive_scale": False, "block_norm": True, "glu": True, "ff_factor": 0.5, "separable": False},
    "without a u-net": {"reduce_at": (), "recover_at": ()},
    "left halved": {"recover_at": ()},
    "twice halved": {"reduce_at": (1, 2), "recover_at": (2, 3)},
    "block by block": {"layout": ("MsCs", "msff", "cscs", "fsss")},
    "an even kernel": {"kernel": 14},
}


@pytest.mark.parametrize("what", OPTIONS)
def test_every_option_runs_learns_and_keeps_its_weights_under_the_authors_names(what):
    model = micro(**OPTIONS[what])
    losses = model.loss(model.example_batch(2))
    losses.total.backward()
    assert torch.isfinite(losses.total) and all(p.grad is not None for p in model.parameters())
    theirs = authors_of("squeezeformer").export_state(model)
    other = micro(**OPTIONS[what])
    for p in other.parameters():
        nn.init.zeros_(p)
    load_state(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_constructors_of_the_reference_are_understood():
    config = authors_of("squeezeformer").config
    theirs = {
        "encoder_subsampling": {"filters": 48}, "encoder_dmodel": 48, "encoder_num_blocks": 2, "encoder_head_size": 12,
        "encoder_num_heads": 4, "encoder_fixed_arch": None, "encoder_kernel_size": 32, "vocabulary_size": 30,
    }  # fmt: skip
    ours = config(theirs, {})
    assert ours["layout"] == "mfcf" and ours["block_norm"] and not ours["adaptive_scale"] and not ours["separable"]
    assert ours["reduce_at"] == () and ours["kernel"] == 32 and ours["ff_factor"] == 0.5
    with pytest.raises(BadInput, match="relmha"):
        config({**theirs, "encoder_mha_type": "mha"}, {})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"heads": 5}, "a multiple of heads"),
        ({"layout": "xyz"}, "letters"),
        ({"recover_at": (2, 3)}, "recover_at"),
        ({"beam": 0}, "beam"),
        ({"vocabulary": ("<blank>", "a")}, "29 symbols"),
    ],
)
def test_configs_that_cannot_be(changes, said):
    with pytest.raises(BadInput, match=said):
        micro(**changes)


# objective and prediction -------------------------------------------------------------------------------------------


def test_the_loss_is_ctc_summed_over_all_paths():
    model = micro(vocabulary_size=4)
    batch = model.example_batch(1)
    batch |= {"features": features(1, 20), "length": torch.tensor([20]), "tokens": torch.tensor([[2, 3]])}
    batch["token_length"] = torch.tensor([2])
    with torch.no_grad():
        log_probs = model.forward_batch(batch).log_softmax(-1)[0]  # 5 frames
    from formarium.nn.ctc import collapse

    paths = [p for p in itertools.product(range(4), repeat=len(log_probs)) if collapse(p) == [2, 3]]
    total = torch.logsumexp(torch.stack([log_probs[range(len(p)), list(p)].sum() for p in paths]), 0)
    torch.testing.assert_close(model.loss(batch).total, -total)


def test_a_transcript_that_no_path_can_spell_counts_nothing():
    model = micro()
    batch = model.example_batch(2)
    batch["tokens"], batch["token_length"] = torch.ones(2, 60, dtype=torch.int64), torch.tensor([60, 60])
    losses = model.loss(batch)
    losses.total.backward()
    assert losses.total == 0 and all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_greedy_and_beam_give_transcripts():
    batch = micro().example_batch(2)
    with torch.no_grad():
        greedy, beam = micro().predict(batch), micro(beam=8).predict(batch)
    for said in (greedy, beam):
        assert len(said.text) == len(said.tokens) == 2 and said.emissions.shape == (2, 24, 29)
        torch.testing.assert_close(said.emissions.sum(-1), torch.ones(2, 24))
    assert (beam.log_probability >= greedy.log_probability - 1e-4).all()


def test_it_learns_two_sounds():
    torch.manual_seed(0)
    model = create("squeezeformer_micro", dropout=0.0, dim=32, blocks=3, recover_at=(2,), vocabulary_size=3).train()
    g = torch.Generator().manual_seed(0)
    shapes = torch.randn(3, 80, generator=g)

    def batch(n=8):
        tokens = torch.randint(1, 3, (n, 3), generator=g)
        x = torch.stack(
            [torch.cat([shapes[t].expand(16, 80) if k else shapes[0].expand(8, 80) for t in row for k in (1, 0)]) for row in tokens]
        )
        length = torch.full((n,), x.shape[1])
        return {
            "features": x + 0.3 * torch.randn(x.shape, generator=g), "length": length, "tokens": tokens,
            "token_length": torch.full((n,), 3),
        }  # fmt: skip

    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(70):
        loss = model.loss(batch()).total
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
    held = batch(16)
    with torch.no_grad():
        said = model.eval().predict(held).tokens
    right = sum(s == t for s, t in zip(said, held["tokens"].tolist(), strict=True))
    assert right >= 12, (right, loss.item())


def test_the_card_and_the_code_stand_side_by_side():
    card = read_card(Path(squeezeformer.__file__).with_suffix(".toml"), squeezeformer.__name__)
    assert [*card.published] == [f"squeezeformer_{s}" for s in ("xs", "s", "sm", "m", "ml", "l")]
    assert isinstance(create("squeezeformer_micro").blocks[0], Block)
