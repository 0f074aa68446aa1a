from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from formarium import create
from formarium.authors import authors_of, load_state
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.audio.mossformer import ConvProjection, joint_attention, rotate, rotations, sinusoids

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "mossformer").glob("*.safetensors"))


def micro(**changes):
    torch.manual_seed(0)
    return create("mossformer_micro", **changes).eval()


def waves(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def attention(n, group, causal=False, width=8, channels=12):
    return [waves(2, n, width, seed=i) for i in range(4)] + [waves(2, n, channels, seed=9), group, causal, nn.Identity()]


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


# the claim ----------------------------------------------------------------------------------------------------------


def test_claim_the_cost_grows_linearly_with_the_length():
    model = micro()

    def operations(frames):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(waves(1, (frames - 1) * 16 + 32))
        return counter.get_total_flops()

    assert operations(512) == 2 * operations(256) and operations(1024) == 4 * operations(256)


def test_claim_every_frame_sees_every_other():
    args = attention(24, 8)
    args[4].requires_grad_()
    joint_attention(*args)[0, 0].sum().backward()
    assert (args[4].grad[0].abs().sum(-1) > 0).all() and args[4].grad[1].abs().sum() == 0


# attention ----------------------------------------------------------------------------------------------------------


def test_one_group_without_the_linear_part_is_squared_relu_attention():
    q, lin_q, k, lin_k, v, *rest = attention(16, 16)
    ours = joint_attention(q, torch.zeros_like(lin_q), k, lin_k, v, *rest)
    torch.testing.assert_close(ours, torch.relu(q @ k.transpose(1, 2) / 16) ** 2 @ v)


@pytest.mark.parametrize("n", [5, 16, 21])
def test_attention_is_the_formula_group_by_group(n):
    q, lin_q, k, lin_k, v, group, causal, drop = attention(n, 8)
    ours = joint_attention(q, lin_q, k, lin_k, v, group, causal, drop)
    local = torch.cat([torch.relu(q[:, i : i + 8] @ k[:, i : i + 8].transpose(1, 2) / 8) ** 2 @ v[:, i : i + 8] for i in range(0, n, 8)], 1)
    torch.testing.assert_close(ours, local + lin_q @ (lin_k.transpose(1, 2) @ v) / n, atol=1e-5, rtol=1e-5)


def test_causal_attention_sees_nothing_later():
    args = attention(21, 8, causal=True)
    before = joint_attention(*args)
    for at in range(5):
        args[at] = torch.cat([args[at][:, :13], waves(2, 8, args[at].shape[-1], seed=77 + at)], 1)
    torch.testing.assert_close(joint_attention(*args)[:, :13], before[:, :13])


def test_rotary_positions_turn_pairs_and_keep_relative_products():
    cosine, sine = rotations(10, 4, torch.device("cpu"))
    q, k = waves(6).expand(10, 6), waves(6, seed=1).expand(10, 6)
    a, b = rotate(q, cosine, sine), rotate(k, cosine, sine)
    torch.testing.assert_close(a.norm(dim=-1), q.norm(dim=-1))
    torch.testing.assert_close(a[2] @ b[5], a[4] @ b[7], atol=1e-5, rtol=1e-5)
    assert torch.equal(a[:, 4:], q[:, 4:]) and torch.equal(a[0], q[0])


def test_sinusoids_are_sines_then_cosines():
    table = sinusoids(8, 5, torch.device("cpu"))
    assert table.shape == (8, 5) and table[:4, 0].abs().sum() == 0 and (table[4:, 0] == 1).all()
    torch.testing.assert_close(table[0], torch.arange(5.0).sin())


def test_every_projection_ends_in_a_convolution_over_17_frames():
    layer = ConvProjection(4, 6, 0.0).eval()
    x = waves(1, 40, 4)
    other = x.clone()
    other[0, 20] += 1
    moved = (layer(x) - layer(other)).abs().sum(-1)[0].nonzero().flatten().tolist()
    assert moved == [*range(12, 29)]


# the network --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speakers", [2, 3])
def test_any_number_of_speakers_and_any_length(speakers):
    model = micro(speakers=speakers)
    for samples in (32, 33, 1000, 1007):
        assert model(waves(1, samples)).shape == (1, samples, speakers)


@pytest.mark.parametrize(
    "changes", [{"norm": "gln"}, {"norm": "cln"}, {"norm": "bn"}, {"causal": True}, {"decoder_bias": True}, {"speakers": 3}]
)
def test_every_option_learns_and_keeps_its_weights_under_the_authors_names(changes):
    model, other = micro(**changes), micro(**changes)
    model.loss(model.example_batch(2)).total.backward()
    assert all(p.grad is not None for p in model.parameters())
    theirs = authors_of("mossformer").export_state(model)
    assert changes.get("norm") != "gln" or theirs["mask_net.norm.weight"].shape == (64, 1)
    for p in other.parameters():
        nn.init.zeros_(p)
    load_state(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_configs_that_cannot_be():
    for changes, said in (({"speakers": 1}, "2 or more"), ({"expansion": 2.0}, "expansion")):
        with pytest.raises(BadInput, match=said):
            micro(**changes)


# objective and prediction -------------------------------------------------------------------------------------------


def test_the_loss_does_not_mind_the_order_of_the_targets():
    model = micro(speakers=3)
    batch = model.example_batch(2)
    swapped = {**batch, "sources": batch["sources"][:, [2, 0, 1]]}
    torch.testing.assert_close(model.loss(swapped).total, model.loss(batch).total)


def test_mixtures_that_are_separated_well_are_left_out(monkeypatch):
    model = micro()
    batch = model.example_batch(2)
    good = batch["sources"].transpose(1, 2).clone()
    good[1] += 0.3 * waves(*good[1].shape)
    monkeypatch.setattr(model, "forward", lambda mixture: good)
    loss, ratio = model.loss(batch), model.loss(batch).terms["si_sdr"]
    assert ratio > 20 and loss.total > -15  # the mean has both, the loss the second alone


def test_voices_add_up_to_the_mixture_as_nearly_as_they_can():
    model = micro()
    batch = model.example_batch(2)
    with torch.no_grad():
        voices = model.predict(batch).sources
    assert voices.shape == batch["sources"].shape
    left = batch["mixture"] - voices.sum(1)
    assert (voices @ left[..., None]).abs().max() < 1e-2 * batch["mixture"].square().sum()


def test_long_recordings_go_in_chunks():
    model = micro()
    model.preprocessing = {"rate": 8000, "chunk": 0.5, "overlap": 0.1}
    seen = []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[1]))
    with torch.no_grad():
        voices = model.predict({"mixture": waves(1, 13000)}).sources
    assert voices.shape == (1, 2, 13000) and seen == [4000] * 4 and torch.isfinite(voices).all()


def test_it_learns_to_part_two_tones():
    torch.manual_seed(0)
    model = create("mossformer_micro", blocks=2, dim=32).train()
    g = torch.Generator().manual_seed(0)
    t = torch.arange(1600) / 8000

    def batch(n=8):
        pitch = torch.stack([150 + 100 * torch.rand(n, generator=g), 900 + 600 * torch.rand(n, generator=g)], 1)
        sources = 0.3 * torch.sin(6.2832 * (pitch[..., None] * t + torch.rand(n, 2, 1, generator=g)))
        return {"mixture": sources.sum(1), "sources": sources}

    optimiser = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(60):
        loss = model.loss(batch()).total
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimiser.step()
    assert model.eval().loss(batch()).terms["si_sdr"] > 6
