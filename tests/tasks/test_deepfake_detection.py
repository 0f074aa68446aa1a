import json

import numpy as np
import pytest
import torch
from PIL import Image

from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks.deepfake_detection import data as reader
from formarium.tasks.deepfake_detection import metrics, prepare, sample
from formarium.tasks.deepfake_detection.model import FAKE, REAL, Verdict, verdict

task = task_of("deepfake-detection")


def clip(seed, frames=6, side=16):
    """Frame i is uniformly 10 i (so that a film tells which frames were taken), with a little noise of the seed."""
    noise = np.random.default_rng(seed).integers(0, 3, (frames, side, side, 3))
    return (10 * np.arange(frames)[:, None, None, None] + noise).astype(np.uint8)


def write_film(path, frames):
    from formarium.tasks.video_generation.data import write_mp4

    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(frames, path)


def write_frames(folder, frames):
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(folder / f"{i}.png")


@pytest.fixture
def folder(tmp_path):
    """Three videos of either class, one as a film, one as frames, one as a picture."""
    for c, name in enumerate(("real", "fake")):
        write_film(tmp_path / name / "a.mp4", clip(c))
        write_frames(tmp_path / name / "b", clip(c, frames=12))
        Image.fromarray(clip(c)[2]).save(tmp_path / name / "c.png")
    return tmp_path


# reading ------------------------------------------------------------------------------------------------------------


def test_films_frames_and_pictures_are_read(folder):
    data = task.read(folder, frames=4)
    assert data.names == ["fake", "real"] and data.model_args == {}
    assert len(data.splits["train"]) == 4 and len(data.splits["val"]) == 2
    every = [s[i] for s in data.splits.values() for i in range(len(s))]
    assert all(v["frames"].shape == (4, 16, 16, 3) and v["frames"].dtype == np.uint8 for v in every)
    assert {(v["id"].split("/")[0], v["label"]) for v in every} == {("fake", FAKE), ("real", REAL)}


def test_frames_are_spread_evenly_over_the_video(folder):
    levels = reader.frames_of(folder / "real" / "b", 3).mean((1, 2, 3)) // 10
    assert levels.tolist() == [0, 5, 11]  # of 12, numbers in names counting as numbers
    film = reader.frames_of(folder / "real" / "a.mp4", 2).mean((1, 2, 3))
    assert abs(film[0] - 1) < 4 and abs(film[1] - 51) < 4
    assert reader.frames_of(folder / "real" / "c.png", 5).shape[0] == 5  # a picture is every frame
    assert reader.evenly(2, 5).tolist() == [0, 0, 0, 0, 1]


def test_a_split_that_is_there_is_kept_and_other_spellings_are_understood(tmp_path):
    for split in ("Train", "valid"):
        for name in ("manipulated_sequences/Deepfakes", "original_sequences/youtube"):
            write_frames(tmp_path / split / name / "v1", clip(0))
    data = task.read(tmp_path)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 2, "val": 2}
    assert data.splits["val"][0]["label"] == FAKE


def test_the_challenges_metadata_is_read(tmp_path):
    for name in ("a", "b", "c", "d"):
        write_film(tmp_path / f"{name}.mp4", clip(ord(name)))
    listed = {
        f"{n}.mp4": {"label": label, "split": "train"} for n, label in zip("abcde", ("FAKE", "REAL", "FAKE", "REAL", "REAL"), strict=True)
    }
    (tmp_path / "metadata.json").write_text(json.dumps(listed))
    data = task.read(tmp_path, frames=2)
    assert len(data.splits["train"]) == len(data.splits["val"]) == 2 and "e.mp4" in data.notes[0]
    (tmp_path / "metadata.json").write_text(json.dumps({"a.mp4": {"label": "MAYBE"}}))
    with pytest.raises(BadInput, match="FAKE or REAL"):
        task.read(tmp_path)


def test_unreadable_videos_are_named_or_refused(folder):
    (folder / "fake" / "broken.mp4").write_bytes(b"not a film")
    data = task.read(folder, frames=2)
    assert "broken.mp4" in data.notes[0]
    with pytest.raises(BadInput, match=r"broken\.mp4"):
        task.read(folder, strict=True)
    with pytest.raises(BadInput, match="video that decodes"):
        reader.frames_of(folder / "fake" / "broken.mp4")


def test_what_cannot_be_used_is_said_in_one_line(tmp_path, folder):
    cases = {
        "no such path": tmp_path / "nowhere",
        "a file": folder / "real" / "a.mp4",
    }
    empty = tmp_path / "empty"
    empty.mkdir()
    cases["an empty folder"] = empty
    one = tmp_path / "one"
    write_frames(one / "real" / "v", clip(0))
    write_frames(one / "real" / "w", clip(0))
    cases["no fake ones"] = one
    other = tmp_path / "other"
    write_frames(other / "cats" / "v", clip(0))
    cases["folders cats"] = other
    bad = tmp_path / "bad"
    for name in ("real", "fake"):
        (bad / name).mkdir(parents=True)
        (bad / name / "x.mp4").write_bytes(b"?")
    cases["2 that don't"] = bad
    few = tmp_path / "few"
    for name in ("real", "fake"):
        write_frames(few / name / "v", clip(0))
    cases["got one"] = few
    for said, path in cases.items():
        with pytest.raises(BadInput, match=said) as e:
            task.read(path)
        assert "\n" not in str(e.value)
    with pytest.raises(BadInput, match="at least 1"):
        task.read(folder, frames=0)
    with pytest.raises(BadInput, match="no pictures"):
        reader.frames_of(empty)


def test_frames_of_several_sizes_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "0.png")
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "1.png")
    with pytest.raises(BadInput, match="8x8, 9x8"):
        reader.frames_of(tmp_path, 2)


def test_inputs_for_predictions(folder):
    found = task.inputs([folder / "real" / "a.mp4", folder / "fake" / "b", str(folder / "*" / "c.png")])
    assert len(found) == 4 and found[0]["frames"].shape[0] == reader.FRAMES and "label" not in found[0]
    assert len(task.inputs([folder / "real"])) == 1  # a folder with pictures in it is one video
    for wrong in ([folder / "nothing"], [], [folder / "nothing" / "*.mp4"]):
        with pytest.raises(BadInput):
            task.inputs(wrong)


def test_videos_in_memory():
    frames = clip(0, frames=40)
    assert task.is_single(frames) and not task.is_single(np.stack([frames, frames]))
    assert task.from_memory(frames, 0)["frames"].shape == (reader.FRAMES, 16, 16, 3)
    tensor = torch.from_numpy(frames[:5]).permute(0, 3, 1, 2).float() / 255
    np.testing.assert_array_equal(task.from_memory(tensor, 0)["frames"], frames[:5])
    assert task.from_memory(Image.fromarray(frames[0]), 0)["frames"].shape == (1, 16, 16, 3)
    for wrong in ("a path", np.zeros((2, 4, 4, 4)), np.full((1, 4, 4, 3), 7.0), np.zeros((1, 4, 4, 3), np.int64)):
        with pytest.raises(BadInput):
            task.from_memory(wrong, 0)


# what networks get --------------------------------------------------------------------------------------------------


def test_evaluation_takes_all_frames_and_training_draws_some():
    raw = {"frames": clip(0, frames=8, side=20), "id": "v", "label": 1}
    rng = np.random.default_rng(0)
    whole = task.transform({"size": 16})(raw, rng)["frames"]
    assert whole.shape == (8, 3, 16, 16) and whole.dtype == np.float32 and whole.min() >= 0 and whole.max() <= 1
    some = task.transform({"size": 16}, {"train_frames": 3, "hflip": 0.5})(raw, rng)["frames"]
    levels = (some.mean((1, 2, 3)) * 255 // 10).tolist()
    assert len(levels) == 3 and levels == sorted(set(levels))  # different ones, in order of time


def test_strong_augmentation_keeps_shape_and_range_and_changes_frames():
    frame = sample.clips(2, 5)[0]["frames"][0]
    rng = np.random.default_rng(0)
    changed = [prepare.strong(frame, rng) for _ in range(30)]
    assert all(c.shape == frame.shape and c.dtype == np.uint8 for c in changed)
    assert sum(not np.array_equal(c, frame) for c in changed) > 25
    for operation in (prepare._moved, prepare._equalised, prepare._sharpened, prepare._embossed, prepare._brightened, prepare._coloured):
        out = np.asarray(operation(Image.fromarray(frame), rng))
        assert out.shape == frame.shape and not np.array_equal(out, frame), operation.__name__


def test_shorter_videos_of_a_batch_give_frames_more_than_once():
    frames = [np.arange(n, dtype=np.float32)[:, None, None, None] * np.ones((1, 3, 2, 2), np.float32) for n in (4, 2)]
    batch = task.collate([{"frames": f, "id": str(i), "label": i} for i, f in enumerate(frames)])
    assert batch["frames"].shape == (2, 4, 3, 2, 2) and batch["label"].tolist() == [0, 1]
    assert batch["frames"][1, :, 0, 0, 0].tolist() == [0, 0, 0, 1]


# scores -------------------------------------------------------------------------------------------------------------


def test_the_verdict_is_the_mean_of_sigmoids():
    logits = torch.tensor([[[[2.0, -1.0]], [[0.0, 1.0]]], [[[-3.0, 2.0]], [[-3.0, 2.0]]]])  # 2 videos, 2 frames, 1 network
    v = verdict(logits)
    means = logits.sigmoid().mean((1, 2))
    assert v.label.tolist() == [FAKE, REAL]
    torch.testing.assert_close(v.fake, torch.stack([means[0, 0], 1 - means[1, 1]]))
    torch.testing.assert_close(v.probabilities.sum(1), torch.ones(2))


def verdicts(fake, label=None):
    fake = torch.tensor(fake)
    said = (fake < 0.5).long()
    return Verdict(said, fake, torch.stack([fake, 1 - fake], 1), fake[:, None].repeat(1, 3))


def test_scores_of_known_verdicts():
    got, per_sample = task.score([verdicts([0.9, 0.4, 0.6, 0.1])], [{"label": torch.tensor([0, 0, 1, 1])}])
    assert got["auc"] == pytest.approx(0.75) and got["accuracy"] == 0.5 and got["f1"] == pytest.approx(0.5)
    assert got["fake_recognised"] == 0.5 and per_sample["accuracy"].tolist() == [1, 0, 0, 1]
    perfect, _ = task.score([verdicts([0.9, 0.1])], [{"label": torch.tensor([0, 1])}])
    assert perfect["auc"] == perfect["f1"] == perfect["accuracy"] == 1
    one, _ = task.score([verdicts([0.9, 0.1])], [{"label": torch.tensor([0, 0])}])
    assert np.isnan(one["auc"]) and one["accuracy"] == 0.5 and "real_recognised" not in one


def test_rows_files_and_pictures(tmp_path):
    prediction = verdicts([0.9, 0.2])
    batch = {"frames": torch.rand(2, 3, 3, 16, 16), "label": torch.tensor([0, 0]), "id": ["x/a.mp4", "b"]}
    rows = task.rows(prediction, batch, [])
    assert rows[0] == {"id": "x/a.mp4", "label": "fake", "fake": 0.9, "frames": [0.9, 0.9, 0.9]} and rows[1]["label"] == "real"
    assert len(task.write(prediction, batch, tmp_path)) == 2 and json.loads((tmp_path / "b.json").read_text())["fake"] == 0.2
    sheet = task.draw(prediction, batch)
    other = task.draw(verdicts([0.2, 0.9]), batch)
    assert sheet.size == other.size and np.any(np.asarray(sheet) != np.asarray(other))
    shown, of = task.examples([prediction, prediction], [batch, batch])
    assert len(shown.label) == len(of["frames"]) == len(of["id"]) == 4
    assert list(task.details([prediction], [{"label": torch.tensor([0, 1])}], [])) == ["ROC curve"]
    assert task.details([prediction], [{"label": torch.tensor([0, 0])}], []) == {}


# sample data --------------------------------------------------------------------------------------------------------


def test_the_sample_data_come_from_the_seed_and_fakes_lack_grain():
    a, b = sample.clips(6, 3), sample.clips.__wrapped__(6, 3)
    assert np.array_equal(a.clips, b.clips) and a.labels.tolist() == [0, 1] * 3
    assert not np.array_equal(a.clips, sample.clips(6, 4).clips)
    middle = a.clips[:, :, 24:40, 24:40].astype(float)
    grain = np.abs(np.diff(middle, axis=3)).mean((1, 2, 3, 4))
    assert grain[a.labels == FAKE].max() < grain[a.labels == REAL].min()
    with pytest.raises(UnknownName):
        task.sample("nothing")


def test_sample_data_round_trip_through_folders(tmp_path):
    from formarium.task import Data

    made = {"train": sample.clips(4, 1), "val": sample.clips(2, 2)}
    sample.write_folders(Data("x", task.name, dict(made)), tmp_path)
    data = task.read(tmp_path, frames=sample.FRAMES)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 4, "val": 2}
    np.testing.assert_array_equal(data.splits["val"][0]["frames"], made["val"][0]["frames"])


def test_the_baseline_is_computed():
    from formarium.task import Data

    name, got = metrics.baseline(Data("x", task.name, {"train": sample.clips(16, 1), "val": sample.clips(8, 2)}))
    assert "pixels" in name and set(got) == {"auc", "accuracy", "f1"} and 0 <= got["auc"] <= 1
