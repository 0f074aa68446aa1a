from pathlib import Path

import numpy as np
import pytest
import torch

from formarium import create
from formarium.authors import authors_of
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.human.mogo import RelativeAttention, distance_codes, shift

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "mogo").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


def micro(**config):
    torch.manual_seed(0)
    model = create("mogo_micro", **config).eval()
    with torch.no_grad():  # an untrained network of small weights says nearly the same of everything
        for p in model.parameters():
            p.mul_(2.0)
        if model.config.part != "transformer":
            for level in model.tokeniser.quantiser.levels:
                level.codebook.normal_()
    return model


# the claim ----------------------------------------------------------------------------------------------------------


def test_claim_a_step_knows_earlier_steps_only():
    model = micro()
    text, codes = model.example(2, 9)
    other = codes.clone()
    other[:, 5:] = (other[:, 5:] + 1) % model.config.codes
    with torch.no_grad():
        a, b = model(text, codes), model(text, other)
    assert a.shape == (2, 11, 64, 3)
    torch.testing.assert_close(a[:, : 5 + 2], b[:, : 5 + 2])  # two prefixes and five steps
    assert not torch.allclose(a[:, 7:], b[:, 7:])


def test_claim_a_level_knows_no_deeper_level():
    model = micro()
    text, codes = model.example(2, 9)
    other = codes.clone()
    other[..., 2] = (other[..., 2] + 1) % model.config.codes
    with torch.no_grad():
        a, b = model(text, codes), model(text, other)
    assert torch.equal(a[..., :2], b[..., :2]) and not torch.allclose(a[..., 2], b[..., 2])


def test_claim_one_forward_gives_all_levels_of_the_next_step():
    model = micro()
    text, codes = model.example(2, 0)
    calls = []
    model.head.register_forward_hook(lambda m, i, o: calls.append(i[0].shape[1]))
    with torch.no_grad():
        list(model.stream(text, 6))
    assert calls == [2] * 3 + [1] * 15  # the prefixes once, then one place a level and step
    assert codes.shape[1] == 0 and model(text, codes).shape == (2, 2, 64, 3)


@pytest.mark.parametrize("pre_norm", [False, True])
def test_streaming_with_kept_keys_equals_recomputation(pre_norm):
    model = micro(pre_norm=pre_norm)
    text, _ = model.example(3)
    with torch.no_grad():
        streamed = torch.stack([*model.stream(text, 12, temperature=0)], 1)
        past = torch.zeros(3, 0, 3, dtype=torch.int64)
        for _ in range(12):
            past = torch.cat([past, model(text, past)[:, -1].argmax(1)[:, None]], 1)
        assert torch.equal(streamed, past)
        assert len(past.unique()) > 3
        prefix, tokens = model._embed(text, past)
        whole, _ = model._logits(prefix, tokens)
        first, caches = model._logits(prefix, tokens[:, :, :5])
        rest, _ = model._logits(prefix[:, :, :0], tokens[:, :, 5:], caches)
        torch.testing.assert_close(torch.cat([first, rest], 1), whole, atol=1e-4, rtol=1e-4)


def test_attention_by_distance_is_what_its_formula_says():
    torch.manual_seed(0)
    c = create("mogo_micro").config
    layer, n, w = RelativeAttention(c).eval(), 6, c.dim // c.heads
    x, u, v = torch.randn(1, n, c.dim), torch.randn(c.heads, w), torch.randn(c.heads, w)
    codes = distance_codes(n, c.dim, x.device, x.dtype)
    out, _ = layer(x, codes, u, v)
    q, k, value = (part.view(n, c.heads, w) for part in layer.qkv(x)[0].chunk(3, -1))
    r = layer.distance(codes).view(n, c.heads, w)
    said = torch.zeros(n, c.heads, w)
    for h in range(c.heads):
        for i in range(n):
            scores = torch.stack([(q[i, h] + u[h]) @ k[j, h] + (q[i, h] + v[h]) @ r[n - 1 - (i - j), h] for j in range(i + 1)]) / w**0.5
            said[i, h] = scores.softmax(0) @ value[: i + 1, h]
    torch.testing.assert_close(out[0], layer.out(said.flatten(1)))


def test_shift_brings_each_key_to_its_distance():
    scores = torch.arange(4, -1, -1.0).expand(1, 1, 3, 5)  # the score of a distance is the distance
    moved = shift(scores)[0, 0]
    for i in range(3):
        at = 2 + i  # the queries are the last three of five steps
        assert moved[i, : at + 1].tolist() == [float(at - j) for j in range(at + 1)]


# two stages ---------------------------------------------------------------------------------------------------------


def test_the_stages_share_no_parameter_and_move_all_that_counts():
    model = create("mogo_micro")
    from fnmatch import fnmatchcase

    tokeniser, transformer = model.training_stages()
    names = {n for n, _ in model.named_parameters()}
    moved = [{n for n in names if any(fnmatchcase(n, g) for g in s.turns[0].train)} for s in (tokeniser, transformer)]
    assert not moved[0] & moved[1] and moved[0] | moved[1] == names
    assert [s.name for s in create("mogo_micro", part="transformer").training_stages()] == ["transformer"]


def test_the_second_stage_leaves_the_tokeniser_alone():
    model = create("mogo_micro").train()
    batch = model.example_batch(4)
    model.tokeniser_loss(batch)  # fills the codebooks
    before = {k: v.clone() for k, v in model.tokeniser.state_dict().items()}
    model.transformer_loss(batch).total.backward()
    assert all(torch.equal(v, before[k]) for k, v in model.tokeniser.state_dict().items())
    assert all(p.grad is None for p in model.tokeniser.parameters()) and model.tokeniser.training


def test_what_comes_after_a_motion_s_end_does_not_count():
    model = micro(corruption=0.0)
    batch = model.example_batch(2)
    batch["length"] = torch.tensor([20, 12])
    longer = {**batch, "motion": torch.nn.functional.pad(batch["motion"], (0, 0, 0, 7))}
    with torch.no_grad():
        for name in ("tokeniser_loss", "transformer_loss"):
            torch.testing.assert_close(getattr(model, name)(batch).total, getattr(model, name)(longer).total, atol=1e-4, rtol=1e-3)


def test_half_of_the_past_is_told_wrong_in_training_only():
    model, seen = micro(corruption=0.5, dropout=0.0), []
    batch = model.example_batch(8)
    model.code_embed.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        codes = model.tokeniser.codes(model.normalised(batch))[:, :-1]
        model.transformer_loss(batch)
        model.train().transformer_loss(batch)
    assert torch.equal(seen[0], codes) and 0.4 < (seen[1] != codes).float().mean() < 0.6


# prediction ---------------------------------------------------------------------------------------------------------


def test_motions_are_as_long_as_asked_and_answer_to_the_seed():
    model = micro()
    batch = {"caption": ["a person walks", "someone jumps"], "length": torch.tensor([9, 15]), "id": ["a", "b"]}
    with torch.no_grad():
        torch.manual_seed(1)
        one = model.predict(batch)
        torch.manual_seed(1)
        same, other = model.predict(batch), model.predict(batch)
    assert one.motion.shape == (2, 15, 263) and one.joints.shape == (2, 15, 22, 3) and one.reconstruction.shape == (2, 0, 263)
    assert not one.motion[0, 9:].any() and not one.joints[0, 9:].any()
    assert torch.equal(one.motion, same.motion) and not torch.equal(one.motion, other.motion)


def test_motions_of_a_batch_are_decoded_apart():
    model = micro()
    codes = torch.randint(64, (2, 15, 3))
    with torch.no_grad():
        both = model.spoken(codes, torch.tensor([9, 15]))
        alone = model.spoken(codes[:1], torch.tensor([9]))
    torch.testing.assert_close(both[:1, :9], alone, atol=1e-5, rtol=1e-4)


def test_a_transformer_alone_borrows_a_tokeniser():
    whole, spoken = micro(), micro(part="transformer")
    batch = whole.example_batch(2)
    with pytest.raises(BadInput, match="use_tokeniser"):
        spoken.predict(batch)
    count = spoken.parameters_count
    assert spoken.use_tokeniser(whole).predict(batch).reconstruction.shape == batch["motion"].shape
    assert spoken.parameters_count == count and torch.isfinite(spoken.loss(batch).total)
    with pytest.raises(BadInput, match="64 codes"):
        spoken.use_tokeniser(micro(codes=32))
    alone = micro(part="tokeniser")
    assert torch.equal((p := alone.predict(batch)).motion, p.reconstruction)
    assert alone(alone.normalised(batch)).shape == batch["motion"].shape


def test_any_text_encoder_can_be_given():
    model = micro()
    batch = {"caption": ["walks", "jumps"], "length": torch.tensor([8, 8])}
    own = model.text_of(batch)
    assert own.shape == (2, 32) and torch.equal(own, micro().text_of(batch))
    model.use_text_encoder(lambda captions: torch.full((len(captions), 32), 0.5))
    assert (model.text_of(batch) == 0.5).all() and model.predict(batch).motion.shape == (2, 8, 263)
    with pytest.raises(BadInput, match="32"):
        model.use_text_encoder(lambda captions: torch.zeros(len(captions), 7))


def test_study_finds_the_statistics_of_the_features():
    from formarium.task import task

    model = create("mogo_micro")
    data = task("motion-generation").sample("actions")
    model.study(data)
    frames = np.concatenate([data.splits["train"][i]["motion"] for i in range(480)])
    np.testing.assert_allclose(model.mean.numpy(), frames.mean(0), atol=1e-3)
    assert len(model.std[4:67].unique()) == 1 and (model.std > 0).all()


# what the authors' files look like ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [{}, {"down": 2, "norm": "LN", "activation": "silu"}, {"shared_codebook": True}, {"norm": "BN", "conv_depth": 1}]
)
def test_their_names_whatever_the_depth(config):
    model = micro(**config)
    theirs = authors_of("mogo").export_state(model)
    again = authors_of("mogo").import_state(theirs, model)
    own = model.state_dict()
    assert {*again} == {*own} and all(torch.equal(again[k], own[k]) for k in own if not k.endswith(("total", "count")))
    down = model.config.down
    assert f"encoder.model.{2 + down}.weight" in theirs and f"decoder.model.{4 + down}.bias" in theirs and "xls.0.r_w_bias" in theirs


def test_down_sampling_keeps_the_length():
    model = micro(stride=2, down=2)
    batch = model.example_batch(2)
    assert model.tokeniser.codes(model.normalised(batch)).shape[1] == -(-batch["motion"].shape[1] // 4)
    assert model.predict(batch).motion.shape == batch["motion"].shape


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="3 levels"):
        micro(layers=(1, 1))
    with pytest.raises(BadInput, match="norm"):
        micro(norm="IN")
    with pytest.raises(BadInput, match="part"):
        micro(part="vq")
    model = micro()
    with pytest.raises(BadInput, match="codes"):
        model(torch.randn(1, 32), torch.full((1, 3, 3), 99))
    with pytest.raises(BadInput, match="one tensor"):
        model(torch.randn(1, 32))
    with pytest.raises(BadInput, match="at least 1 frame"):
        model.predict({"caption": ["x"], "length": torch.tensor([0])})
    with pytest.raises(BadInput, match="263"):
        model.loss({"motion": torch.randn(1, 9, 60), "length": torch.tensor([9]), "caption": ["x"]})


def test_it_learns_codes_and_then_to_speak_them():
    torch.manual_seed(0)
    model, seen = create("mogo_micro").train(), {}
    batches = [model.example_batch(8, seed=i) for i in range(4)]
    for stage, steps in zip(model.training_stages(), (40, 30), strict=True):
        turn = stage.turns[0]
        prefixes = tuple(g.rstrip("*") for g in turn.train)
        optimiser = torch.optim.AdamW([p for n, p in model.named_parameters() if n.startswith(prefixes)], lr=2e-3)
        for step in range(steps):
            losses = getattr(model, turn.loss)(batches[step % 4])
            optimiser.zero_grad()
            losses.total.backward()
            optimiser.step()
            seen.setdefault(stage.name, []).append(losses.total.item())
    assert np.mean(seen["tokeniser"][-5:]) < 0.6 * seen["tokeniser"][0] and np.mean(seen["transformer"][-5:]) < 0.9 * seen["transformer"][0]
