import math
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import formarium
import formarium.task
from formarium import card, create
from formarium.authors import authors_of, load_state
from formarium.authors.hat import config
from formarium.engine.recipes import recipe_for
from formarium.engine.records import replay
from formarium.errors import BadCheckpoint, BadInput
from formarium.models.restore.hat import overlap_index
from formarium.nn.filters import usm_sharpen
from formarium.nn.nd_windows import from_windows, to_windows
from formarium.nn.perceptual import VGGFeatures
from formarium.nn.resizing import bicubic
from formarium.task import Data
from formarium.tasks.image_restoration.data import Arrays

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "hat").glob("*.safetensors"))


@pytest.fixture(scope="module")
def micro():
    torch.manual_seed(0)
    return create("hat_micro").eval()


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


def moved(attend, pixel):
    """Which 16x16 windows of a 32x32 grid give another output when one pixel changes: bool [2, 2]."""
    x = torch.randn(1, 32, 32, 144)
    other = x.clone()
    other[0, pixel[0], pixel[1]] += 1
    with torch.no_grad():
        change = (attend(x) - attend(other)).abs().sum(-1, keepdim=True)
    return to_windows(change, (16, 16)).amax((1, 2)).view(2, 2) > 1e-7


def test_claim_an_overlapping_window_sees_24_by_24_keys_and_a_plain_one_its_own():
    model = create("hat_s_x4", depths=(1,), heads=(6,)).eval()
    overlap, plain = model.groups[0].overlap, model.groups[0].blocks[0].attention
    assert overlap.index.shape == (16 * 16, 24 * 24)
    near, far = (8, 18), (8, 20)  # third and fifth pixel right of the left window
    assert moved(overlap.attend, near).tolist() == [[True, True], [False, False]]
    assert moved(overlap.attend, far).tolist() == [[False, True], [False, False]]
    assert moved(plain, near).tolist() == [[False, True], [False, False]]


def test_without_channel_attention_a_block_is_a_swin_block():
    model = create("hat_micro", conv_scale=0.0).eval()
    block, x = model.groups[0].blocks[1], torch.randn(2, 16, 24, 30)
    with torch.no_grad():
        y = x + block.attention(block.norm1(x), shift=block.shift)
        torch.testing.assert_close(block(x), y + block.mlp(block.norm2(y)))


def test_channel_attention_scales_each_channel_by_one_gate(micro):
    cab, x = micro.groups[0].blocks[0].channel, torch.randn(1, 8, 8, 30)
    with torch.no_grad():
        ungated = cab.up(F.gelu(cab.down(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)
        gate = cab(x) / ungated
    assert gate.std((1, 2)).max() < 1e-4 and gate.min() > 0 and gate.max() < 1


def test_offsets_stay_distinct_though_some_count_from_the_end():
    index = overlap_index(16, 0.5)
    offsets = {}
    for q in range(0, 256, 17):
        for k in range(576):
            offset = (k // 24 - q // 16, k % 24 - q % 16)
            assert offsets.setdefault(int(index[q, k]), offset) == offset
    assert index.min() >= 0 and index.max() < 39**2


@pytest.mark.parametrize("upscale", [1, 2, 3, 4, 8])
def test_every_factor_gives_an_image_of_that_size(upscale):
    model = create("hat_micro", upscale=upscale).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 9, 14)).shape == (1, 3, 9 * upscale, 14 * upscale)


def test_sides_are_mirrored_to_whole_windows(micro):
    image = torch.rand(1, 3, 13, 20)
    with torch.no_grad():
        whole = micro(F.pad(image, (0, 4, 0, 3), "reflect"))[..., :26, :40]
        ours = micro(image)
    skip = bicubic(image, 26, 40) - bicubic(F.pad(image, (0, 4, 0, 3), "reflect"), 32, 48)[..., :26, :40]
    torch.testing.assert_close(ours, whole + skip, atol=1e-5, rtol=0)


def test_without_an_upsampler_it_restores_at_the_same_size_or_is_as_released():
    image = torch.rand(1, 3, 16, 16)
    learns = create("hat_micro", upscale=1, upsampler="residual", bicubic_skip=False)
    learns.loss({"image": image, "target": image}).total.backward()
    assert learns.last.weight.grad.abs().sum() > 0 and learns.last.weight.shape == (3, 30, 3, 3)
    theirs = config(
        {"window_size": 8, "upsampler": "", "upscale": 1, "embed_dim": 30, "depths": (1,), "num_heads": (2,), "squeeze_factor": 6}, {}
    )
    released = create("hat_micro", **theirs).eval()
    torch.testing.assert_close(released(image), image)
    with pytest.raises(BadInput, match="residual"):
        released.loss({"image": image, "target": image})


def test_what_cannot_be_built_or_trained_is_said():
    with pytest.raises(BadInput, match="upscale"):
        create("hat_micro", upscale=5)
    with pytest.raises(BadInput, match="32x32"):
        create("hat_micro").loss({"image": torch.rand(1, 3, 16, 16), "target": torch.rand(1, 3, 48, 48)})
    with pytest.raises(BadInput, match="position table"):
        create("hat_micro", absolute_positions=True)(torch.rand(1, 3, 40, 40))


def test_every_option_of_the_released_class_is_understood():
    theirs = dict(img_size=(32, 48), patch_size=1, in_chans=1, embed_dim=36, depths=(2,), num_heads=(3,), window_size=8, compress_ratio=2,
                  squeeze_factor=4, overlap_ratio=0.25, mlp_ratio=3, qkv_bias=False, qk_scale=0.1, ape=True, patch_norm=False, upscale=2,
                  img_range=255.0, upsampler="pixelshuffle", resi_connection="identity")  # fmt: skip
    model = create("hat_micro", **config(theirs, {})).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 1, 32, 48)).shape == (1, 1, 64, 96)
    assert model.groups[0].overlap.wide == 10 and model.mean.abs().sum() == 0 and "positions" in dict(model.named_parameters())


def test_large_images_are_restored_tile_by_tile_in_bounded_memory(micro):
    image, seen = torch.rand(1, 3, 60, 90), []
    micro.preprocessing |= {"tile": 32, "tile_margin": 8}
    hook = micro.embed.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[2:])))
    with torch.no_grad():
        tiles = micro.predict({"image": image}).image
        micro.preprocessing |= {"tile": 256}
        whole = micro.predict({"image": image}).image
    hook.remove()
    assert tiles.shape == (1, 3, 120, 180) and len(seen) == 7 and max(max(s) for s in seen[:-1]) <= 48
    assert (tiles - whole).abs().max() < 0.02 and tiles.min() >= 0 and tiles.max() <= 1


def test_windows_round_trip_in_two_and_three_dimensions():
    for window, grid in (((2, 3), (4, 9)), ((2, 3, 2), (4, 6, 4))):
        x = torch.randn(2, *grid, 5)
        cut = to_windows(x, window)
        assert torch.equal(from_windows(cut, window, grid), x)
        first = x[(0, *(slice(w) for w in window))].reshape(-1, 5)
        assert torch.equal(cut[0], first)


# Real-HAT -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def real():
    torch.manual_seed(0)
    return create("real_hat_micro").train()


def changed(before, model):
    """Which parameters moved: by the name of their network."""
    names = {n for n, p in model.named_parameters() if not torch.equal(before[n], p)}
    return {"discriminator" if n.startswith("discriminator.") else "restorer" for n in names}


def test_released_generators_load_without_a_discriminator(tmp_path, real):
    theirs = {k: v for k, v in authors_of("hat").export_state(real).items() if not k.startswith("discriminator.")}
    assert "conv_first.weight" in theirs and "layers.0.residual_group.blocks.0.conv_block.cab.0.weight" in theirs
    torch.save({"params_ema": theirs}, tmp_path / "Real_HAT_GAN_SRx4.pth")
    torch.manual_seed(1)
    other = create("real_hat_micro")
    own = {k: v.clone() for k, v in other.discriminator.state_dict().items()}
    other.load_authors(tmp_path / "Real_HAT_GAN_SRx4.pth")
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(other.eval()(image), real.eval()(image))
    assert all(torch.equal(v, own[k]) for k, v in other.discriminator.state_dict().items())
    torch.save({"params_ema": {k: v for k, v in theirs.items() if k != "conv_first.weight"}}, tmp_path / "short.pth")
    with pytest.raises(BadCheckpoint, match="embed"):
        other.load_authors(tmp_path / "short.pth")


def test_a_discriminator_has_the_references_names_too(real):
    theirs = authors_of("hat").export_state(real)
    assert {"discriminator.conv0.bias", "discriminator.conv1.weight_orig", "discriminator.conv8.weight_u"} < {*theirs}
    other = create("real_hat_micro")
    load_state(other, theirs)
    assert all(torch.equal(v, real.state_dict()[k]) for k, v in other.state_dict().items())


def test_the_network_of_real_hat_is_that_of_hat():
    for name in ("real_hat_gan_x4", "real_hat_gan_x4_sharper"):
        config, plain = (card("hat").variants[n].config for n in (name, "hat_x4"))
        own = {k for k in config if k not in ("gan", "sharpened")}
        assert {k: config[k] for k in own} == {k: plain[k] for k in own} == {"upscale": 4}
    recipe = recipe_for("real_hat_gan_x4_sharper").as_dict()
    assert (recipe["lr"], recipe["ema"], recipe["sharpen"], recipe["turn"]) == (1e-4, 0.999, True, False)
    first, second = create("real_hat_micro", gan_share=2 / 7).training_stages()
    assert recipe["steps"] * first.share == pytest.approx(1_000_000) and recipe["steps"] * second.share == pytest.approx(400_000)


def test_two_stages_first_the_restorer_alone_then_both(tmp_path):
    tiles = formarium.task.task("image-restoration").sample("photos_real_x4").splits
    data = Data("tiles", "image-restoration", {k: Arrays(s.samples[:2]) for k, s in tiles.items()}, {"upscale": 4})
    fit = {"steps": 2, "batch_size": 1, "patch": 8, "progress": False, "snapshots": 0, "validations": 1}
    torch.manual_seed(0)
    model = create("real_hat_micro", gan_share=0.5)
    start = {n: p.clone() for n, p in model.named_parameters()}
    formarium.fit(model, data, out=tmp_path / "run", until=1, **fit)
    assert changed(start, model) == {"restorer"}
    middle = {n: p.clone() for n, p in model.named_parameters()}
    with pytest.warns(UserWarning, match="without the perceptual loss"):
        run = formarium.fit(model, data, out=tmp_path / "run", resume=True, **fit)
    assert changed(middle, run.model) == {"restorer", "discriminator"}
    rows = [r for r in run.history if r["split"] == "train"]
    assert "discriminator_loss.real" in rows[-1] and "restorer_loss.perceptual" not in rows[-1]
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert formarium.load(tmp_path / "run").config.gan


def test_every_parameter_has_a_turn_and_gets_a_gradient(real):
    first, second = real.training_stages()
    reached = {}
    for turn in (*first.turns, *second.turns):
        real.zero_grad()
        getattr(real, turn.loss)(real.example_batch(2)).total.backward()
        own = {n for n, _ in real.named_parameters() if any(fnmatchcase(n, g) for g in turn.train)}
        reached[turn.loss] = {n for n in own if dict(real.named_parameters())[n].grad.abs().sum() > 0}
        assert reached[turn.loss] == own
    discriminator = {n for n, _ in real.named_parameters() if n.startswith("discriminator.")}
    assert reached["discriminator_loss"] == discriminator and not reached["restorer_loss"] & discriminator
    assert reached["loss"] == reached["restorer_loss"] == {n for n, _ in real.named_parameters()} - discriminator


def test_the_discriminator_sees_what_was_made_before_the_restorers_step(real):
    batch = real.example_batch(2)
    with torch.no_grad():
        before = real.forward_batch(batch)
    real.restorer_loss(batch).total.backward()
    with torch.no_grad():
        real.last.weight.add_(0.1)
    torch.testing.assert_close(real.made(batch), before)
    with torch.no_grad():
        assert not torch.allclose(real.made(batch), before)  # once only; then it is made anew


def test_losses_weigh_and_compare_as_published(real):
    batch = real.example_batch(2)
    losses = real.restorer_loss(batch)
    torch.testing.assert_close(losses.total, losses.terms["l1"] + 0.1 * losses.terms["gan"])
    sharp = create("real_hat_micro", sharpened=("l1", "perceptual"))
    truths = sharp.truths(batch)
    assert torch.equal(truths["gan"], batch["target"]) and torch.equal(truths["l1"], usm_sharpen(batch["target"]))
    assert not torch.equal(truths["l1"], truths["gan"]) and torch.equal(truths["perceptual"], truths["l1"])
    assert all(torch.equal(t, batch["target"]) for t in real.truths(batch).values())
    with pytest.raises(BadInput, match="perceptual"):
        create("real_hat_micro", sharpened=("vgg",))


def test_the_perceptual_loss_has_its_weights_from_a_file_or_says_so(tmp_path):
    with pytest.raises(BadInput, match=r"vgg19.*perceptual_weight=0") as caught:
        create("real_hat_micro", perceptual_weight=1.0).training_stages()
    assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="no such file"):
        create("real_hat_micro", perceptual_weight=1.0, vgg19=str(tmp_path / "vgg19.pth")).training_stages()
    torch.save(VGGFeatures().state_dict(), tmp_path / "vgg19.pth")
    model = create("real_hat_micro", perceptual_weight=1.0, vgg19=str(tmp_path / "vgg19.pth"))
    model.training_stages()
    losses = model.restorer_loss(model.example_batch(1))
    torch.testing.assert_close(losses.total, losses.terms["l1"] + losses.terms["perceptual"] + 0.1 * losses.terms["gan"])
    losses.total.backward()
    assert losses.terms["perceptual"] > 0 and model.last.weight.grad.abs().sum() > 0
    assert not any("features." in k for k in model.state_dict())  # saved with no model


def test_real_hat_restores_any_size_by_tiles(real):
    real.eval()
    image = torch.rand(1, 3, 37, 50)
    real.preprocessing |= {"tile": 24, "tile_margin": 8}
    with torch.no_grad():
        tiles = real.predict({"image": image}).image
        real.preprocessing |= {"tile": 256}
        whole = real.predict({"image": image}).image
    assert tiles.shape == whole.shape == (1, 3, 148, 200) and (tiles - whole).abs().max() < 0.02


@pytest.mark.slow
def test_real_hat_beats_bicubic_on_real_degradations_after_its_first_stage_and_both_networks_learn(tmp_path):
    data, fit = "sample:photos_real_x4", {"seed": 0, "out": tmp_path / "run", "progress": False}
    task = formarium.task.task("image-restoration")
    baseline = task.baseline(task.sample("photos_real_x4"))[1]
    run = formarium.fit("real_hat_micro", data, until=540, **fit)
    assert formarium.evaluate(run, data).metrics["psnr_y"] > baseline["psnr_y"] + 0.2
    before = {n: p.clone() for n, p in run.model.named_parameters()}
    with pytest.warns(UserWarning, match="without the perceptual loss"):
        run = formarium.fit("real_hat_micro", data, resume=True, **fit)
    assert changed(before, run.model) == {"restorer", "discriminator"}
    rows = [r for r in run.history if "discriminator_loss.loss" in r]
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    told = [r["discriminator_loss.logit_real"] - r["discriminator_loss.logit_made"] for r in rows]
    assert sum(told[-10:]) / 10 > told[0] and sum(r["discriminator_loss.loss"] for r in rows[-10:]) / 10 < 2 * math.log(2) - 0.02


@pytest.mark.slow
def test_it_beats_bicubic_on_photographs():
    run = formarium.fit("hat_micro", "sample:photos_x2", progress=False)
    baseline = formarium.task.task("image-restoration").baseline(formarium.task.task("image-restoration").sample("photos_x2"))[1]
    assert formarium.evaluate(run, "sample:photos_x2").metrics["psnr_y"] > baseline["psnr_y"] + 0.5
