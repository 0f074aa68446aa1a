from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from formarium import create
from formarium.authors.hat import config
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.restore.hat import overlap_index
from formarium.nn.nd_windows import from_windows, to_windows
from formarium.nn.resizing import bicubic

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


@pytest.mark.slow
def test_it_beats_bicubic_on_photographs():
    import formarium

    run = formarium.fit("hat_micro", "sample:photos_x2", progress=False)
    baseline = formarium.task.task("image-restoration").baseline(formarium.task.task("image-restoration").sample("photos_x2"))[1]
    assert formarium.evaluate(run, "sample:photos_x2").metrics["psnr_y"] > baseline["psnr_y"] + 0.5
