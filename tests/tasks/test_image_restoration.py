import numpy as np
import pytest
import torch
from PIL import Image

from formarium.errors import BadInput, UnknownName
from formarium.nn.resizing import bicubic, imresize
from formarium.nn.tiling import reflect_to_multiple, tiled
from formarium.task import task as task_of
from formarium.tasks.image_restoration import real
from formarium.tasks.image_restoration.degrade import Prepare, degrade, unit
from formarium.tasks.image_restoration.metrics import compare, luma, psnr, ssim
from formarium.tasks.image_restoration.model import Restored
from formarium.tasks.image_restoration.sample import TRAIN, VAL, photograph

TASK = task_of("image-restoration")
RNG = np.random.default_rng(0)


def photo(h=48, w=60):
    return RNG.integers(0, 255, (h, w, 3), dtype=np.uint8)


def save(path, image):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
    return path


# resizing and degradations ------------------------------------------------------------------------------------------


def test_bicubic_scores_are_those_published_for_these_photographs():
    """PSNR-Y of bicubic enlargement after bicubic shrinking, border 2, to a tenth of a decibel (LR clipped and rounded)."""
    for name, expected in {"chelsea": 35.26, "coffee": 30.69}.items():
        clean = photograph(VAL[name])
        clean = clean[: clean.shape[0] // 2 * 2, : clean.shape[1] // 2 * 2]
        small = degrade(unit(clean), {"degradation": "bicubic", "upscale": 2}, RNG)
        large = (imresize(small, *clean.shape[:2]).clip(0, 1) * 255).round().astype(np.uint8)
        assert compare(large, clean, 2)["psnr_y"] == pytest.approx(expected, abs=0.1)


def test_resizing_keeps_constants_and_lines_and_is_the_same_in_torch():
    line = np.linspace(0, 1, 64)[None, :, None].repeat(48, 0)
    small = imresize(line, 24, 32)
    np.testing.assert_allclose(small[:, 4:-4, 0], line[:24, :, 0].reshape(24, 32, 2).mean(-1)[:, 4:-4], atol=1e-9)
    np.testing.assert_allclose(imresize(np.ones((9, 7, 3)), 20, 31), 1)
    x = torch.rand(2, 3, 9, 12)
    np.testing.assert_allclose(bicubic(x, 27, 24)[0].permute(1, 2, 0), imresize(x[0].permute(1, 2, 0).numpy(), 27, 24), atol=1e-6)


def test_degradations():
    clean = unit(photo())
    noisy = degrade(clean, {"degradation": "noise", "sigma": 25}, np.random.default_rng(1))
    assert (noisy - clean).std() == pytest.approx(25 / 255, rel=0.03) and noisy.max() > 1
    assert degrade(clean, {"degradation": "bicubic", "upscale": 4}, RNG).shape == (12, 15, 3)
    smooth = unit(photograph(VAL["coffee"]))[:96, :96]
    errors = [np.abs(degrade(smooth, {"degradation": "jpeg", "quality": q}, RNG) - smooth).mean() for q in (10, 90)]
    assert errors[0] > 2 * errors[1] > 0
    with pytest.raises(UnknownName, match="noise"):
        degrade(clean, {"degradation": "nois"}, RNG)


@pytest.mark.parametrize("how", [{"degradation": "bicubic", "upscale": 2}, {"degradation": "jpeg", "quality": 30, "upscale": 1}])
def test_a_patch_is_degraded_as_in_its_whole_image(how):
    clean = photograph(TRAIN["flower"])[:160, :192]
    whole = degrade(unit(clean), how, RNG)
    prepare = Prepare(how, {"patch": 24, "flip": 0, "turn": False})
    for seed in range(6):
        out = prepare({"target": clean, "id": "x"}, np.random.default_rng(seed))
        y, x = (int(v) for v in (lambda r: (r.integers(whole.shape[0] - 23), r.integers(whole.shape[1] - 23)))(np.random.default_rng(seed)))
        scale = how["upscale"]
        np.testing.assert_array_equal(out["target"], unit(clean)[y * scale :, x * scale :][: 24 * scale, : 24 * scale].transpose(2, 0, 1))
        inside = whole[y : y + 24, x : x + 24].transpose(2, 0, 1)
        assert np.abs(out["image"] - inside).mean() < 2e-3


def test_a_patch_and_its_target_are_turned_alike():
    clean = np.kron(photo(20, 20), np.ones((2, 2, 1), dtype=np.uint8))
    pair = {"image": clean[::2, ::2], "target": clean, "id": "x"}
    prepare, seen = Prepare({"upscale": 2}, {"patch": 16}), set()
    for seed in range(20):
        out = prepare(pair, np.random.default_rng(seed))
        np.testing.assert_array_equal(out["target"][:, ::2, ::2], out["image"])
        seen.add(out["image"].tobytes())
    assert len(seen) > 10


# degradations of real photographs -----------------------------------------------------------------------------------


def test_a_real_degradation_is_the_seeds_and_differs_from_draw_to_draw():
    clean, how = unit(photograph(TRAIN["flower"])[:96, :128]), {"degradation": "real", "upscale": 4}
    drawn = [degrade(clean, how, np.random.default_rng(seed)) for seed in (0, 0, 1, 2, 3)]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert len({d.tobytes() for d in drawn}) == 4
    for image in drawn:
        assert image.shape == (24, 32, 3) and image.dtype == np.float32 and image.min() >= 0 and image.max() <= 1
        np.testing.assert_allclose(image * 255, np.round(image * 255), atol=1e-4)
    sharpness = [psnr((imresize(d, 96, 128).clip(0, 1) * 255).astype(np.uint8), (clean * 255).astype(np.uint8)) for d in drawn]
    bicubic_only = degrade(clean, {**how, "degradation": "bicubic"}, RNG)
    assert max(sharpness) < psnr((imresize(bicubic_only, 96, 128).clip(0, 1) * 255).astype(np.uint8), (clean * 255).astype(np.uint8))


@pytest.mark.parametrize("shape", [(8, 8, 3), (16, 40, 1), (4, 64, 3)])
def test_a_real_degradation_takes_any_size_and_grey(shape):
    for seed in range(12):
        image = degrade(np.random.default_rng(seed).random(shape, dtype=np.float32), {"degradation": "real", "upscale": 4}, RNG)
        assert image.shape == (shape[0] // 4, shape[1] // 4, shape[2]) and np.isfinite(image).all()


def test_kernels_have_the_published_shapes_and_sizes():
    rng = np.random.default_rng(0)
    drawn = [real.random_kernel(real.FIRST.sigma, rng) for _ in range(2000)]
    assert {len(k) for k in drawn} == {7, 9, 11, 13, 15, 17, 19, 21}
    assert max(abs(k.sum() - 1) for k in drawn) < 1e-9
    ringing = np.mean([k.min() < -1e-12 for k in drawn])  # sinc filters alone are negative anywhere
    assert 0.07 < ringing < 0.12
    even = np.mean([np.allclose(k, k.T) and np.allclose(k, k[::-1]) for k in drawn])  # round ones, and the sinc filters
    assert even == pytest.approx(0.1 + 0.9 * (0.45 + 0.12 + 0.12), abs=0.03)


def test_a_stretched_kernel_lies_along_its_angle():
    kernel = real.blur_kernel("aniso", 21, 3.0, 0.8, np.pi / 6, 1.0)
    y, x = np.mgrid[-10:11, -10:11]
    moments = np.array([[(kernel * a * b).sum() for a in (x, y)] for b in (x, y)])
    values, vectors = np.linalg.eigh(moments)
    assert np.sqrt(values) == pytest.approx([0.8, 3.0], rel=0.05)
    assert np.degrees(np.arctan2(*vectors[::-1, 1])) % 180 == pytest.approx(30, abs=1)


def test_a_sinc_filter_lets_low_frequencies_pass_and_stops_high_ones():
    spectrum = np.abs(np.fft.fft2(real.sinc_kernel(np.pi / 2, 21), (64, 64)))
    assert abs(spectrum[0, 4] - 1) < 0.15 and spectrum[0, 28] < 0.15  # an eighth and seven eighths of the highest


def test_noise_is_gaussian_or_poisson_in_colour_or_grey_in_its_range():
    grey, strengths = [], []
    flat = torch.full((1, 3, 64, 64), 0.5)
    for seed in range(200):
        noise = real.noisy(flat, real.FIRST, np.random.default_rng(seed)) - flat
        grey.append(bool((noise - noise[:, :1]).abs().max() < 1e-6))
        strengths.append(noise.std().item() * 255)
    assert np.mean(grey) == pytest.approx(0.4, abs=0.1)
    assert min(strengths) > 0.5 and max(s for s in strengths if s < 31) > 25
    shot = [real.shot_noise(torch.linspace(0, 1, 256).repeat(256, 1)[None, None] * v, np.random.default_rng(0)).std() for v in (0.25, 1.0)]
    assert shot[1] != shot[0] and shot[1] == pytest.approx(np.sqrt(0.5 / 256), rel=0.05)


def test_a_sharpened_source_changes_the_degraded_image_and_not_the_target():
    clean = photograph(TRAIN["flower"])[:128, :128]
    how = {"degradation": "real", "upscale": 4}
    outs = []
    for sharpen in (False, True):
        prepare = Prepare(how, {"patch": 16, "flip": 0, "turn": False, "sharpen": sharpen})
        outs.append(prepare({"target": clean, "id": "x"}, np.random.default_rng(3)))
    np.testing.assert_array_equal(outs[0]["target"], outs[1]["target"])
    assert np.abs(outs[0]["image"] - outs[1]["image"]).mean() > 1e-3


def test_flips_may_be_allowed_one_way_only():
    clean = photo(32, 32)
    prepare = Prepare({"upscale": 2}, {"patch": 16, "flip": (0.0, 0.5), "turn": False})
    pair = {"image": clean[::2, ::2], "target": clean, "id": "x"}
    seen = {prepare(pair, np.random.default_rng(seed))["target"].tobytes() for seed in range(12)}
    planes = unit(clean).transpose(2, 0, 1)
    assert seen == {np.ascontiguousarray(planes).tobytes(), np.ascontiguousarray(planes[:, :, ::-1]).tobytes()}


# tiles --------------------------------------------------------------------------------------------------------------


def test_tiles_give_what_the_whole_image_gives_where_the_margin_holds_the_receptive_field():
    conv = torch.nn.Conv2d(3, 3, 5, padding=2)
    enlarge = lambda x: torch.nn.functional.interpolate(conv(x), scale_factor=2)  # noqa: E731
    x = torch.rand(2, 3, 50, 37)
    with torch.no_grad():
        torch.testing.assert_close(tiled(enlarge, x, 16, 2, 2), enlarge(x))
        assert not torch.allclose(tiled(enlarge, x, 16, 0, 2), enlarge(x))
    volume = torch.nn.Conv3d(1, 2, 3, padding=1)
    v = torch.rand(1, 1, 9, 12, 10)
    with torch.no_grad():
        torch.testing.assert_close(tiled(volume, v, 5, 1), volume(v))


def test_mirroring_is_torchs_and_goes_on_where_torch_stops():
    x = torch.rand(1, 1, 5, 7)
    torch.testing.assert_close(reflect_to_multiple(x, 8), torch.nn.functional.pad(x, (0, 1, 0, 3), "reflect"))
    assert reflect_to_multiple(torch.rand(1, 1, 1, 2), 8).shape == (1, 1, 8, 8)


# folders ------------------------------------------------------------------------------------------------------------


def test_clean_images_are_split_and_degraded_as_asked(tmp_path):
    for i in range(5):
        save(tmp_path / f"{i}.png", photo())
    data = TASK.read(tmp_path, scale=3)
    assert [len(data.splits[s]) for s in ("train", "val")] == [4, 1] and data.model_args == {"upscale": 3}
    out = TASK.transform({"upscale": 3})(data.splits["val"][0], RNG)
    assert out["image"].shape == (3, 16, 20) and out["target"].shape == (3, 48, 60)
    assert TASK.read(tmp_path).model_args == {} and TASK.read(tmp_path, degradation="noise").model_args == {"upscale": 1}
    assert TASK.read(tmp_path, degradation="real").model_args == {"upscale": 4}


def test_pairs_are_matched_by_name(tmp_path):
    for split, count in (("train", 3), ("val", 1)):
        for i in range(count):
            clean = photo(40, 40)
            save(tmp_path / split / "HR" / f"{i}.png", clean)
            save(tmp_path / split / "LR" / f"{i}x2.png", clean[::2, ::2])
    data = TASK.read(tmp_path)
    assert data.model_args == {"upscale": 2} and len(data.splits["train"]) == 3
    sample = data.splits["train"][0]
    assert (sample["image"] == sample["target"][::2, ::2]).all()
    with pytest.raises(BadInput, match="4 times as large"):
        Prepare({"upscale": 4})(sample, RNG)


def _pairs(p, small, names=("a.png", "b.png")):
    for name in ("a.png", "b.png"):
        save(p / "GT" / name, photo(40, 40))
    for name in names:
        save(p / "LQ" / name, photo(*small))
    return p


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nowhere", "no such path"),
        (lambda p: p, "none in it"),
        (lambda p: save(p / "a.png", photo()), "a file"),
        (lambda p: save(p / "a.png", photo()).parent, "at least two"),
        (lambda p: _broken(p / "a.png").parent, "1 corrupt"),
        (lambda p: _pairs(p, (20, 20), ["a.png"]), "same name"),
        (lambda p: _pairs(p, (30, 30)), "whole number"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, make, says):
    with pytest.raises(BadInput, match=says) as caught:
        TASK.read(make(tmp_path))
    assert "\n" not in str(caught.value)


def _broken(path):
    path.write_bytes(b"\x89PNG")
    return path


def test_patches_larger_than_the_image_are_refused():
    with pytest.raises(BadInput, match="smaller patch"):
        Prepare({"upscale": 2, "degradation": "bicubic"}, {"patch": 64})({"target": photo(), "id": "x"}, RNG)


def test_corrupt_files_are_named_and_strict_refuses_them(tmp_path):
    for i in range(3):
        save(tmp_path / f"{i}.png", photo())
    _broken(tmp_path / "bad.png")
    assert "bad.png" in TASK.read(tmp_path).notes[0]
    with pytest.raises(BadInput, match=r"bad\.png"):
        TASK.read(tmp_path, strict=True)


# samples, scores, output --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASK.samples)
def test_samples_hold_photographs_and_their_degraded_selves(name):
    data = TASK.sample(name)
    scale = data.model_args["upscale"]
    for split in ("train", "val"):
        out = TASK.transform({"upscale": scale})(data.splits[split][0], RNG)
        assert out["target"].shape == (3, 144, 144) and out["image"].shape == (3, 144 // scale, 144 // scale)
    photographs = [{s["id"].split()[0] for s in data.splits[k].samples} for k in ("train", "val")]
    assert photographs[0].isdisjoint(photographs[1])


def test_an_unknown_sample_is_refused():
    with pytest.raises(UnknownName, match="photos_x2"):
        TASK.sample("photos_x5")


def test_psnr_and_ssim_against_known_values():
    a = np.full((32, 32, 3), 100, dtype=np.uint8)
    assert psnr(a, a + 10) == pytest.approx(20 * np.log10(25.5)) and psnr(a, a) == np.inf and ssim(a, a) == pytest.approx(1)
    assert luma(np.full((1, 1, 3), 255, dtype=np.uint8))[0, 0, 0] == pytest.approx(235) and luma(a * 0)[0, 0, 0] == 16
    c1, means = (0.01 * 255) ** 2, (100.0, 110.0)
    expected = (2 * means[0] * means[1] + c1) / (means[0] ** 2 + means[1] ** 2 + c1)
    assert ssim(a, a + 10) == pytest.approx(expected, rel=1e-6)
    bordered = a.copy()
    bordered[:2] = 0
    assert compare(bordered, a, 2)["psnr_y"] == np.inf and compare(bordered, a, 0)["psnr_y"] < 25


def test_scores_are_means_over_images_of_any_size():
    clean = torch.rand(2, 3, 24, 24)
    batches = [{"target": clean, "image": clean[..., ::2, ::2], "upscale": torch.tensor([2, 2]), "id": ["a", "b"]}]
    metrics, per_sample = TASK.score([Restored(clean)], batches)
    assert metrics["psnr_y"] == 100 and metrics["ssim_y"] == pytest.approx(1) and len(per_sample["psnr_rgb"]) == 2
    row = TASK.rows(Restored(clean), batches[0], [])[0]
    assert row["width"] == 24 and row["id"] == "a"
    assert TASK.draw(Restored(clean), batches[0]).width > 600


def test_results_are_written_as_png(tmp_path):
    image = torch.rand(1, 3, 8, 9)
    (path,) = TASK.write(Restored(image), {"id": ["folder/one.jpg"]}, tmp_path)
    np.testing.assert_allclose(np.asarray(Image.open(path)) / 255, image[0].permute(1, 2, 0), atol=0.003)
    assert path.suffix == ".png"


def test_files_and_arrays_are_inputs(tmp_path):
    save(tmp_path / "a.png", photo())
    assert {*TASK.inputs([tmp_path])[0]} == {"image", "id"}
    out = TASK.transform({"upscale": 4, "channels": 1})(TASK.from_memory(photo(), 0), RNG)
    assert out["image"].shape == (1, 48, 60) and "target" not in out
