import sys

import numpy as np
import pytest
import torch
from PIL import Image

from formarium.errors import BadInput, MissingExtra, UnknownName
from formarium.task import task as task_of
from formarium.tasks.video_generation.data import Prepare, collate, decode, write_gif, write_mp4
from formarium.tasks.video_generation.masks import CONDITIONS, block_mask, completion_mask, condition_mask
from formarium.tasks.video_generation.metrics import clip_features, copy_nearest, frechet
from formarium.tasks.video_generation.model import Videos
from formarium.tasks.video_generation.sample import bounced

TASK = task_of("video-generation")
RNG = np.random.default_rng(0)
MODEL = {"size": 16, "num_frames": 8, "channels": 3, "condition": "prediction"}


def clip(frames=8, height=32, width=48):
    """A bright square that moves to the right on grey."""
    video = np.full((frames, height, width, 3), 90, np.uint8)
    for i, frame in enumerate(video):
        frame[8:24, 2 * i : 2 * i + 16] = (230, 60, 20)
    return video


def frames_in(folder, video):
    folder.mkdir(parents=True)
    for i, frame in enumerate(video):
        Image.fromarray(frame).save(folder / f"{i}.png")
    return folder


# reading and writing ------------------------------------------------------------------------------------------------


def test_films_come_back_as_they_went(tmp_path):
    video = clip()
    for path in (write_gif(video, tmp_path / "a.gif"), write_mp4(video, tmp_path / "a.mp4"), frames_in(tmp_path / "frames", video)):
        again = decode(path)
        assert again.shape == video.shape and again.dtype == np.uint8
        assert np.abs(again.astype(int) - video).mean() < 6, path
    odd = write_mp4(clip(height=31, width=47), tmp_path / "odd.mp4")
    assert decode(odd).shape == (8, 30, 46, 3)


def test_frames_are_in_the_order_of_their_numbers(tmp_path):
    folder = tmp_path / "f"
    folder.mkdir()
    for i in (10, 9, 1):
        Image.fromarray(np.full((8, 8, 3), i * 10, np.uint8)).save(folder / f"frame{i}.png")
    assert decode(folder)[:, 0, 0, 0].tolist() == [10, 90, 100]


def test_a_folder_of_videos(tmp_path):
    for i in range(4):
        write_gif(clip(20), tmp_path / f"v{i}.gif")
    frames_in(tmp_path / "frames", clip(9))
    write_gif(clip(3), tmp_path / "short.gif")
    (tmp_path / "broken.mp4").write_bytes(b"no film")
    data = TASK.read(tmp_path, num_frames=8, size=16, condition="interpolation")
    sizes = {k: len(v) for k, v in data.splits.items()}
    assert (
        sum(sizes.values()) in (4 * 2 + 1,)
        and sizes["val"] in (1, 2)
        and data.model_args == {"num_frames": 8, "channels": 3, "frame_size": 16}
    )
    notes = " ".join(data.notes)
    assert "short.gif" in notes and "broken.mp4" in notes
    sample = data.splits["train"][0]
    assert sample["video"].shape == (8, 32, 48, 3) and sample["condition"] == "interpolation"
    strided = TASK.read(tmp_path, num_frames=8, stride=2)
    assert len(strided.splits["train"]) == 3 and strided.model_args == {"num_frames": 8, "channels": 3}
    batch = collate([Prepare(MODEL)(sample, RNG)])
    assert batch["video"].shape == (1, 8, 3, 16, 16) and batch["mask"][0, :, 0, 0].tolist() == [0, 1, 1, 1, 0, 1, 1, 1]


def test_one_video_is_split_in_time_and_given_splits_are_kept(tmp_path):
    write_gif(clip(40, 16, 120), tmp_path / "long.gif")
    data = TASK.read(tmp_path / "long.gif", num_frames=8)
    assert [s["id"] for s in data.splits["val"]] == ["long.gif:32"] and len(data.splits["train"]) == 4
    root = tmp_path / "given"
    for split, count in (("train", 2), ("validation", 1)):
        (root / split).mkdir(parents=True)
        for i in range(count):
            write_gif(clip(), root / split / f"{i}.gif")
    assert {k: len(v) for k, v in TASK.read(root, num_frames=8).splits.items()} == {"train": 2, "val": 1}


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nowhere", "no such path"),
        (lambda p: p, "none in it"),
        (lambda p: write_gif(clip(5), p / "a.gif").parent, "at least 8 frames, got at most 5"),
        (lambda p: write_gif(clip(9), p / "a.gif").parent, "none for train"),
        (lambda p: ((p / "a.mp4").write_bytes(b"x" * 99), p)[1], "that decodes|that decode"),
        (lambda p: (frames_in(p / "f", clip()), Image.new("RGB", (9, 9)).save(p / "f" / "9.png"), p)[2], "one size"),
    ],
)
def test_bad_folders_are_refused_in_one_line(tmp_path, make, says):
    with pytest.raises(BadInput, match=says) as caught:
        TASK.read(make(tmp_path), num_frames=8)
    assert "\n" not in str(caught.value)


def test_without_av_films_need_a_package_and_gifs_do_not(tmp_path, monkeypatch):
    write_gif(clip(), tmp_path / "a.gif")
    (tmp_path / "a.mp4").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtra, match="av"):
        decode(tmp_path / "a.mp4")
    assert len(decode(tmp_path / "a.gif")) == 8


# what people have in memory -----------------------------------------------------------------------------------------


def test_clips_in_memory():
    video = clip()
    same = [
        TASK.from_memory(x, 0)["video"] for x in (video, video / 255, torch.from_numpy(video / 255).permute(0, 3, 1, 2), {"video": video})
    ]
    assert all((x == video).all() for x in same) and TASK.is_single(video) and not TASK.is_single(video[None])
    assert TASK.from_memory(video[..., 0], 0)["video"].shape == (8, 32, 48, 1)
    for wrong in (3, video[0, 0], np.zeros((8, 9, 9, 2)), video.astype(float), {"clip": video}):
        with pytest.raises(BadInput):
            TASK.from_memory(wrong, 0)


def test_what_is_missing_of_a_clip_is_generated(tmp_path):
    Image.fromarray(clip()[0]).save(tmp_path / "one.png")
    write_gif(clip(3), tmp_path / "three.gif")
    given = TASK.inputs([tmp_path / "one.png", tmp_path / "three.gif"])
    batch = collate([Prepare(MODEL)(given[i], RNG) for i in range(2)])
    assert batch["mask"][:, :, 0, 0].sum(1).tolist() == [7, 5] and batch["video"].shape == (2, 8, 3, 16, 16)
    with pytest.raises(BadInput, match="8 frames"):
        Prepare(MODEL, {})({"video": clip(3), "id": "x"}, RNG)  # not so in training
    with pytest.raises(BadInput, match="no such path"):
        TASK.inputs([tmp_path / "two.png"])


def test_frames_are_scaled_cropped_and_coloured():
    grey = Prepare({**MODEL, "channels": 1})({"video": clip()}, RNG)["video"]
    assert grey.shape == (8, 1, 16, 16) and grey.dtype == np.float32 and grey.min() >= 0 and grey.max() <= 1
    rgb = Prepare(MODEL)({"video": clip()[..., :1]}, RNG)["video"]
    assert (rgb[:, 0] == rgb[:, 2]).all()
    mirrored = Prepare(MODEL, {"hflip": 1.0})({"video": clip()}, np.random.default_rng(0))["video"]
    np.testing.assert_allclose(mirrored[..., ::-1], Prepare(MODEL)({"video": clip()}, RNG)["video"])
    with pytest.raises(BadInput, match="mask"):
        Prepare(MODEL)({"video": clip(), "mask": np.zeros((8, 4, 4))}, RNG)


# masks --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frames", [2, 4, 16])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_condition_gives_a_mask_of_zeros_and_ones(condition, frames):
    for seed in range(20):
        mask = condition_mask(condition, frames, 12, 10, np.random.default_rng(seed))
        assert mask.shape == (frames, 12, 10) and mask.dtype == np.float32 and {*np.unique(mask)} <= {0.0, 1.0}
        if condition not in ("random",):
            assert mask.any(), seed


def test_masks_are_what_their_names_say():
    frame = lambda name, **k: condition_mask(name, 8, 4, 4, np.random.default_rng(0), **k)[:, 0, 0].tolist()  # noqa: E731
    assert frame("prediction") == [0, 0, 0, 0, 1, 1, 1, 1] and frame("prediction", known=2) == [0, 0, 1, 1, 1, 1, 1, 1]
    assert frame("backward", known=3) == [1, 1, 1, 1, 1, 0, 0, 0] and frame("interpolation") == [0, 1, 1, 1, 0, 1, 1, 1]
    assert frame("unconditional") == [1] * 8 and sum(frame("animation")) == 7
    with pytest.raises(UnknownName, match="prediction"):
        condition_mask("predict", 8, 4, 4, RNG)
    with pytest.raises(BadInput, match="1 to 7"):
        condition_mask("prediction", 8, 4, 4, RNG, known=8)


def test_blocks_cover_about_the_area_asked_for():
    covered = [block_mask(16, 16, np.random.default_rng(i)).mean() for i in range(50)]
    assert 0.4 < np.mean(covered) < 0.53 and max(covered) <= 0.54
    mask = completion_mask(16, 8, 8, np.random.default_rng(3))
    shown = mask.any((1, 2))
    assert shown[3:13].all() and all((m == mask[8]).all() for m in mask[shown])


# sample data and scores ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASK.samples)
def test_samples_are_the_same_each_time_and_move(name):
    data = TASK.sample(name)
    train, val = data.splits["train"], data.splits["val"]
    assert train[0]["video"].shape == (8, 16, 16, 1) and len(val) == 120 and data is TASK.sample(name)
    moved = [np.abs(np.diff(val[i]["video"].astype(int), axis=0)).sum() for i in range(20)]
    assert min(moved) > 0
    with pytest.raises(UnknownName, match="shapes"):
        TASK.sample("shape")


def test_things_bounce_off_walls():
    path = bounced(np.array([1.0, 5.0]), np.array([-1.0, 2.0]), 0, 6, 5)
    assert path.tolist() == [[1, 5], [0, 5], [1, 3], [2, 1], [3, 1]]


def test_scores_against_known_values():
    true = torch.zeros(2, 8, 1, 16, 16)
    mask = torch.zeros(2, 8, 16, 16)
    mask[:, 4:] = 1
    made = true.clone()
    made[0, 4:] = 0.1
    made[1, :4] = 0.7  # known frames don't count
    metrics, per_sample = TASK.score([Videos(made, mask)], [{"video": true, "mask": mask}])
    assert per_sample["psnr"].tolist() == pytest.approx([20, 60], rel=1e-4) and per_sample["mse"].tolist() == pytest.approx([0.01, 0])
    assert per_sample["ssim"][1] == pytest.approx(1) and per_sample["ssim"][0] < 0.1 and metrics["psnr"] == pytest.approx(40, rel=1e-4)
    assert "frechet" not in metrics
    a, b = RNG.standard_normal((4000, 3)), RNG.standard_normal((4000, 3)) + np.array([2.0, 0, 0])
    assert frechet(a, b) == pytest.approx(4, rel=0.1) and clip_features(true.numpy()).shape == (2, 16)


def test_the_rival_copies_the_nearest_known_pixel():
    video = np.arange(8, dtype=np.float32)[:, None, None, None].repeat(2, 2)  # frame t has value t
    mask = np.ones((8, 2, 1), np.float32)
    mask[[0, 4]] = 0
    assert copy_nearest(video, mask, video * 0 - 1)[:, 0, 0, 0].tolist() == [0, 0, 0, 4, 4, 4, 4, 4]
    assert copy_nearest(video, np.ones((8, 2, 1)), video * 0 - 1).max() == -1


def test_the_baseline_is_far_from_perfect():
    name, metrics = TASK.baseline(TASK.sample("shapes"))
    assert name == "copying the nearest known frame" and 10 < metrics["psnr"] < 16 and metrics["frechet"] > 1


def test_files_rows_and_pictures(tmp_path):
    prepare = Prepare({**MODEL, "channels": 1})
    batch = collate([prepare({"video": clip(), "id": f"a/b {i}.mp4"}, RNG) for i in range(2)])
    prediction = Videos(batch["video"], batch["mask"])
    paths = TASK.write(prediction, batch, tmp_path)
    assert sorted(p.suffix for p in paths) == [".gif", ".gif", ".mp4", ".mp4"] and decode(paths[0]).shape == (8, 64, 64, 3)
    assert TASK.rows(prediction, batch, [])[0]["generated"] == [4, 5, 6, 7]
    sheet = TASK.draw(prediction, batch)
    assert sheet.width > sheet.height and (0, 120, 100) in {c for _, c in sheet.getcolors(1 << 20)}
    latent = Videos(torch.randn(1, 8, 4, 8, 8), torch.ones(1, 8, 8, 8))
    assert TASK.draw(latent, {"id": ["z"]}).width > 300
