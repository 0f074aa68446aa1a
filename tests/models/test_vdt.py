from pathlib import Path

import numpy as np
import pytest
import torch

from formarium import create, trace
from formarium.engine.records import replay
from formarium.errors import BadInput, UnknownName
from formarium.models.video.vdt import TemporalAttention
from formarium.nn.attention import SelfAttention
from formarium.tasks.video_generation.masks import CONDITIONS, condition_mask

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "vdt").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


def micro(**config):
    torch.manual_seed(0)
    return create("vdt_micro", **config).eval()


# the claim ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("condition", CONDITIONS)
def test_claim_one_set_of_weights_serves_every_mask_and_known_pixels_come_back(condition):
    model, rng = micro(sampling_steps=2), np.random.default_rng(1)
    batch = model.example_batch(2)
    mask = torch.from_numpy(np.stack([condition_mask(condition, 8, 16, 16, rng) for _ in range(2)]))
    with torch.no_grad():
        out = model.predict({**batch, "mask": mask})
    known = (mask == 0)[:, :, None]
    assert torch.equal(out.video[known], batch["video"][known])
    made = (mask == 1)[:, :, None]
    assert made.any() and not torch.equal(out.video[made], batch["video"][made]) and out.video.min() >= 0 and out.video.max() <= 1


def test_claim_where_nothing_is_generated_nothing_is_learnt():
    model = micro()
    x0 = model.encode(model.example_batch(2))
    terms = model.masked_losses(x0, torch.tensor([3, 700]), torch.randn_like(x0), torch.zeros(2, 8, 16, 16))
    assert terms["mse"].tolist() == [0, 0]


def test_claim_the_network_sees_the_known_pixels_clean_and_never_the_unknown_ones():
    model = micro(learn_sigma=False)
    x0 = model.encode(model.example_batch(1))
    other, mask, noise = x0.clone(), torch.zeros(1, 8, 16, 16), torch.randn_like(x0)
    mask[:, 4:] = 1
    other[:, 4:] = -other[:, 4:]
    t, seen = torch.tensor([999]), []
    model.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        model.masked_losses(x0, t, noise, mask)
        torch.manual_seed(0)
        a = model.sample(x0, mask, "ddim", 2)
        torch.manual_seed(0)
        b = model.sample(other, mask, "ddim", 2)
    assert torch.equal(seen[0][:, :4], x0[:, :4]) and torch.equal(a[:, 4:], b[:, 4:])
    torch.testing.assert_close(seen[0][:, 4:], model.diffusion.q_sample(x0, t, noise)[:, 4:])


def test_claim_temporal_attention_mixes_equal_places_only():
    layer, x = TemporalAttention(16, 2), torch.randn(1, 4, 6, 16)
    changed = x.clone()
    changed[0, 1, 2] += torch.randn(16)
    different = (layer(x) - layer(changed)).abs().amax((0, 1, 3)) > 1e-6
    assert different.tolist() == [i == 2 for i in range(6)]


def test_without_temporal_weights_it_is_dit_frame_by_frame():
    model = micro()
    with torch.no_grad():
        for block in model.blocks:
            block.temporal.out.weight.zero_()
            block.temporal.out.bias.zero_()
        model.times.zero_()
        x, t = model.example(1)
        frame = micro(num_frames=1, temporal=False)
        state = {k: v for k, v in model.state_dict().items() if k in frame.state_dict()}
        frame.load_state_dict(state)
        torch.testing.assert_close(model(x, t)[0], frame(x[0][:, None], t.expand(8))[:, 0])


def test_with_patches_of_one_place_temporal_attention_is_plain_attention():
    layer, plain, x = TemporalAttention(16, 2), SelfAttention(16, 2), torch.randn(2, 5, 1, 16)
    plain.load_state_dict(layer.attention.state_dict())
    torch.testing.assert_close(layer(x)[:, :, 0], layer.out(plain(layer.norm(x[:, :, 0]))))


# the objective ------------------------------------------------------------------------------------------------------


def test_every_kind_of_mask_is_drawn_one_for_each_clip():
    model = micro()
    torch.manual_seed(0)
    masks = model.draw_masks(torch.zeros(200, 8, 1, 16, 16))
    by_frame = masks.mean((2, 3))
    whole = ((by_frame == 0) | (by_frame == 1)).all(1)
    assert 0.1 < 1 - whole.float().mean() < 0.35  # spatial ones, a fifth
    patterns = {tuple(int(v) for v in row) for row in by_frame[whole].tolist()}
    assert {(0, 0, 0, 0, 1, 1, 1, 1), (1, 1, 1, 1, 0, 0, 0, 0), (0, 1, 1, 1, 0, 1, 1, 1), (1,) * 8} <= patterns
    assert {sum(p) for p in patterns} >= {7}
    assert (masks.flatten(1).sum(1) > 0).float().mean() > 0.99


def test_the_bound_moves_the_variance_alone():
    model = micro()
    x0 = model.encode(model.example_batch(2))
    terms = model.masked_losses(x0, torch.tensor([500, 20]), torch.randn_like(x0), torch.ones(2, 8, 16, 16))
    terms["vb"].sum().backward()
    channels = model.head.weight.grad.view(16, 2, -1).abs().sum((0, 2))
    assert channels[0] == 0 and channels[1] > 0
    fixed = micro(learn_sigma=False)
    assert {*fixed.masked_losses(x0, torch.tensor([1, 2]), torch.randn_like(x0), torch.ones(2, 8, 16, 16))} == {"mse"}


def test_the_paper_s_initialisation_makes_every_block_spatially_the_identity():
    model = micro(zero_init=True)
    x, t = model.example(2)
    assert not model(x, t).any() and not model.blocks[0].modulation.weight.any()


def test_labels_are_dropped_in_training_only():
    model = micro()
    t = torch.zeros(500, dtype=torch.int64)
    assert not model._labels(t).any()
    torch.manual_seed(0)
    assert 20 < int((model.train()._labels(t) == 1).sum()) < 90


# the paper's other ways to give known frames ------------------------------------------------------------------------

WAYS = ("concat", "cross", "adaln")


def shapes(model):
    return {k: tuple(v.shape) for k, v in model.state_dict().items()}


def test_concatenation_has_the_released_model_s_weights_and_the_others_their_own_beside_them():
    mask, d = shapes(micro()), 64
    more = {way: {k: v for k, v in shapes(micro(conditioning=way)).items() if k not in mask} for way in WAYS}
    assert all(mask.items() <= shapes(micro(conditioning=way)).items() for way in WAYS) and more["concat"] == {}
    linear = {f"known_embed.{fc}.{p}": (d, d) if p == "weight" else (d,) for fc in ("fc1", "fc2") for p in ("weight", "bias")}
    assert more["adaln"] == linear
    own = {"norm.weight": (d,), "norm.bias": (d,), "norm_known.weight": (d,), "norm_known.bias": (d,), "q.weight": (d, d), "q.bias": (d,)}
    own |= {"kv.weight": (2 * d, d), "kv.bias": (2 * d,), "out.weight": (d, d), "out.bias": (d,)}
    assert more["cross"] == {f"blocks.{i}.cross.{k}": v for i in range(3) for k, v in own.items()}


def test_concatenated_frames_are_the_released_network_under_the_prediction_mask():
    plain, model, x0 = micro(), micro(conditioning="concat"), torch.randn(2, 8, 1, 16, 16)
    x, t = model.example(2)
    with torch.no_grad():
        torch.testing.assert_close(model(x, t), plain(x, t)[:, 4:])
        mask, noise = torch.zeros(2, 8, 16, 16), torch.randn_like(x0)
        mask[:, 4:] = 1
        ours, masked = model.prediction_losses(x0, t, noise), plain.masked_losses(x0, t, noise, mask)
    torch.testing.assert_close(ours["mse"], 2 * masked["mse"])  # the mean is over half the frames
    torch.testing.assert_close(ours["vb"], 2 * masked["vb"])


@pytest.mark.parametrize("way", WAYS)
def test_every_known_frame_and_no_more_is_heard(way):
    model = micro(conditioning=way)
    x, t = model.example(2)
    with torch.no_grad():
        out = model(x, t)
        assert out.shape == (2, 4, 2, 16, 16)
        for frame in range(4):
            other = x.clone()
            other[0, frame, :, 12:, 12:] += 1
            change = (model(other, t) - out).abs().amax((2, 3, 4))
            assert change[0].min() > 1e-4 and change[1].max() == 0  # in every generated frame, and in no other clip
        assert model(x, t, 6).shape[1] == 2 and model(x, t, 0).shape[1] == 8
        # a concatenated frame is the same token whether it counts as known or as noisy
        assert torch.equal(model(x, t, 6), out[:, 2:]) == (way == "concat")


@pytest.mark.parametrize("way", WAYS)
def test_only_generated_frames_are_asked_of_it(way):
    model = micro(conditioning=way, known_frames=3)
    x0, t = model.encode(model.example_batch(2)), torch.tensor([500, 20])
    noise = torch.randn_like(x0)
    terms = model.prediction_losses(x0, t, noise)
    x_t = model.diffusion.q_sample(x0, t, noise)
    said = model(torch.cat([x0[:, :3], x_t[:, 3:]], 1), t)[:, :, :1]
    torch.testing.assert_close(terms["mse"], (said - x0[:, 3:]).square().mean((1, 2, 3, 4)))  # it predicts the clean clip
    elsewhere = noise.clone()
    elsewhere[:, :3] += 1
    again = model.prediction_losses(x0, t, elsewhere)
    assert torch.equal(again["mse"], terms["mse"]) and torch.equal(again["vb"], terms["vb"])
    losses = model.train().loss(model.example_batch(2))
    losses.total.backward()
    assert {*losses.terms} == {"mse", "vb"} and all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("way", WAYS)
def test_known_frames_come_back_and_unknown_ones_are_never_read(way):
    model = micro(conditioning=way)
    x0 = torch.randn(3, 8, 1, 16, 16)
    mask = torch.ones(3, 8, 16, 16)
    mask[0, :4], mask[1, :2] = 0, 0  # four frames, two, none
    other = torch.where(mask[:, :, None] == 1, torch.randn_like(x0), x0)
    with torch.no_grad():
        for sampler in ("ddim", "ddpm"):
            a, b, c = (model.sample(z, mask, sampler, 2, torch.Generator().manual_seed(s)) for z, s in ((x0, 0), (other, 0), (x0, 1)))
            assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal((a - x0) * (1 - mask[:, :, None]), torch.zeros_like(x0))
        alone = model.sample(x0[:1], mask[:1], "ddim", 2, torch.Generator().manual_seed(0))
        noise = torch.Generator().manual_seed(0)
        torch.testing.assert_close(alone, model.sample(x0, mask, "ddim", 2, noise)[:1], rtol=1e-4, atol=1e-4)
        video = model.predict(model.example_batch(2)).video
    assert torch.equal(video[:, :4], model.example_batch(2)["video"][:, :4])


def test_frames_that_are_not_the_first_ones_need_the_mask():
    model = micro(conditioning="cross")
    x0, rng = torch.randn(1, 8, 1, 16, 16), np.random.default_rng(0)
    for condition in ("backward", "interpolation", "completion"):
        mask = torch.from_numpy(condition_mask(condition, 8, 16, 16, rng))[None]
        with pytest.raises(BadInput, match=r"the first ones known.*conditioning="):
            model.sample(x0, mask)
    with pytest.raises(UnknownName, match="did you mean"):
        micro(conditioning="adapter")
    with pytest.raises(BadInput, match="known_frames: expected 1 to 7 of 8, got 8"):
        micro(conditioning="concat", known_frames=8)
    with pytest.raises(BadInput, match="known: expected 0 to 7"):
        model(*model.example(1), 8)


@pytest.mark.parametrize("way", WAYS)
def test_its_blocks_can_be_read_whatever_the_way(way):
    model = micro(conditioning=way)
    found = trace(model, model.example_batch(1), at="blocks.*")
    assert len(found) == 3 and all(f.tokens.shape[1] == (128 if way == "concat" else 64) for f in found.values())


# prediction ---------------------------------------------------------------------------------------------------------


def test_samplers_answer_to_the_seed_and_differ():
    model = micro(learn_sigma=True)
    x0, mask = model.encode(model.example_batch(1)), torch.ones(1, 8, 16, 16)
    with torch.no_grad():
        once, again, ddpm = (model.sample(x0, mask, s, 3, torch.Generator().manual_seed(5)) for s in ("ddim", "ddim", "ddpm"))
    assert torch.equal(once, again) and not torch.equal(once, ddpm)
    with pytest.raises(UnknownName, match="ddim"):
        model.sample(x0, mask, "dim")


class Halves:
    """A stand-in for an autoencoder: 2x2 pixels become the 4 channels of a latent."""

    def encode(self, x):
        return torch.nn.functional.pixel_unshuffle(x, 2)

    def decode(self, z):
        return torch.nn.functional.pixel_shuffle(z, 2)


class Distribution:
    def __init__(self, mean):
        self.mean = mean

    def sample(self):
        return self.mean


class LikeDiffusers(Halves):
    def encode(self, x):
        return type("Output", (), {"latent_dist": Distribution(super().encode(x))})()

    def decode(self, z):
        return type("Output", (), {"sample": super().decode(z)})()


@pytest.mark.parametrize("vae", [Halves(), LikeDiffusers()])
def test_it_works_on_the_latents_of_any_autoencoder(vae):
    model = micro(latent_channels=4, latent_factor=2, patch_size=2, sampling_steps=2)
    batch = model.example_batch(2)
    pixels = {k: v for k, v in batch.items() if k != "latent"}
    with pytest.raises(BadInput, match="use_vae"):
        model.predict(pixels)
    assert model.predict(batch).video.shape == (2, 8, 4, 8, 8)  # latents in, latents out
    model.use_vae(vae)
    assert torch.isfinite(model.loss(pixels).total) and not any("vae" in k for k in model.state_dict())
    out = model.predict(pixels)
    assert out.video.shape == (2, 8, 1, 16, 16) and torch.equal(out.video[:, :4], batch["video"][:, :4])
    torch.testing.assert_close(model.decode(model.encode(pixels)), batch["video"])


def test_a_latent_is_generated_where_any_of_its_pixels_is():
    model = micro(latent_channels=4, latent_factor=2, patch_size=2).use_vae(Halves())
    mask = torch.zeros(1, 8, 16, 16)
    mask[0, 3, 5, 8] = 1
    small = model.mask_of({"mask": mask}, torch.zeros(1, 8, 4, 8, 8))
    assert small.nonzero().tolist() == [[0, 3, 2, 4]]


def test_what_does_not_fit_is_refused():
    with pytest.raises(BadInput, match="works on pixels"):
        micro().use_vae(Halves())
    with pytest.raises(BadInput, match="encode and decode"):
        micro().use_vae(object())
    with pytest.raises(BadInput, match="multiple of 4"):
        micro(frame_size=18)
    with pytest.raises(UnknownName, match="sampler"):
        micro(sampler="euler")
    model = micro()
    with pytest.raises(BadInput, match="frames = 8"):
        model(*model.example(1, frames=6))
    with pytest.raises(BadInput, match="frames = 8"):
        model.predict({"video": torch.rand(1, 6, 1, 16, 16)})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vdt_micro", "vdt_concat_micro"])
def test_it_learns_to_go_on_with_a_movement(name):
    torch.manual_seed(0)
    model = create(name, depth=2, num_classes=1).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    for step in range(150):
        total = model.loss(model.example_batch(8, seed=step)).total
        optimiser.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    batch = model.eval().example_batch(16, seed=10_000)
    with torch.no_grad():
        made = model.predict(batch).video[:, 4:]
    error = (made - batch["video"][:, 4:]).square().mean()
    copied = (batch["video"][:, 3:4] - batch["video"][:, 4:]).square().mean()
    assert error < 0.8 * copied
