import numpy as np
import pytest
import torch
from PIL import Image

from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks.image_classification.augment import OPERATIONS, Prepare, batch_transform, erase, parse_randaugment, random_box
from formarium.tasks.image_classification.data import decode
from formarium.tasks.image_classification.model import Labels
from formarium.tasks.image_classification.sample import GAP, REGIONS, _parts, _region, write_folder

TASK = task_of("image-classification")
RNG = np.random.default_rng(0)


def photo(side=24, channels=3):
    return RNG.integers(0, 255, (side, side, channels), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for i in range(5):
            Image.fromarray(photo()).save(tmp_path / name / f"{i}.png")
    return tmp_path


# decoding -----------------------------------------------------------------------------------------------------------


def test_every_colour_mode_and_depth_comes_as_upright_rgb(tmp_path):
    grey16 = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    Image.fromarray(grey16).save(tmp_path / "grey16.png")
    decoded = decode(tmp_path / "grey16.png")
    assert decoded.shape == (8, 8, 3) and decoded[0, 0, 0] == 0 and decoded[-1, -1, 2] == 255
    np.testing.assert_allclose(decoded[..., 0], grey16 / 257, atol=1)

    clear = np.zeros((4, 4, 4), dtype=np.uint8)
    clear[:2] = (255, 0, 0, 255)
    for name in ("a.png", "a.webp", "a.tiff"):
        Image.fromarray(clear).save(tmp_path / name, **({"lossless": True} if name.endswith("webp") else {}))
        assert decode(tmp_path / name)[0, 0].tolist() == [255, 0, 0] and decode(tmp_path / name)[3, 3].tolist() == [255, 255, 255]

    Image.fromarray(photo()).convert("P").save(tmp_path / "palette.gif")
    Image.fromarray(photo()).convert("CMYK").save(tmp_path / "cmyk.jpg")
    Image.fromarray(photo(channels=1)[..., 0]).save(tmp_path / "grey.bmp")
    Image.fromarray(photo()).convert("1").save(tmp_path / "bits.png")
    for name in ("palette.gif", "cmyk.jpg", "grey.bmp", "bits.png"):
        assert decode(tmp_path / name).shape == (24, 24, 3) and decode(tmp_path / name).dtype == np.uint8


def test_16_bit_colour_and_floating_point_tiffs(tmp_path):
    import tifffile

    tifffile.imwrite(tmp_path / "deep.tif", np.full((6, 5, 3), 32896, dtype=np.uint16))
    assert decode(tmp_path / "deep.tif")[0, 0].tolist() == [128, 128, 128]
    tifffile.imwrite(tmp_path / "float.tif", np.full((6, 5), 0.5, dtype=np.float32))
    assert decode(tmp_path / "float.tif")[0, 0].tolist() == [128, 128, 128]


def test_a_turned_photograph_stands_upright(tmp_path):
    image = Image.fromarray(photo(side=8)).resize((10, 6))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert decode(tmp_path / "turned.jpg").shape[:2] == (10, 6)


# folders ------------------------------------------------------------------------------------------------------------


def test_a_folder_of_classes_is_split_by_the_seed(folder):
    a, b, c = TASK.read(folder), TASK.read(folder), TASK.read(folder, seed=1)
    assert a.names == ["cat", "dog"] and a.model_args == {"num_classes": 2}
    assert [len(a.splits[s]) for s in ("train", "val")] == [8, 2]
    assert a.splits["val"].paths == b.splits["val"].paths and {*a.splits["train"].paths}.isdisjoint(a.splits["val"].paths)
    assert sorted(a.splits["val"].labels) == [0, 1]
    assert any(TASK.read(folder, seed=s).splits["val"].paths != a.splits["val"].paths for s in (1, 2, 3)), c


def test_given_splits_are_kept(tmp_path):
    for split, count in [("train", 3), ("validation", 2), ("test", 1)]:
        for name in ("x", "y"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(photo()).save(tmp_path / split / name / f"{i}.jpg")
    data = TASK.read(tmp_path)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 6, "val": 4, "test": 2}


def test_corrupt_files_are_counted_and_named(folder):
    (folder / "cat" / "note.jpg").write_text("this is no image")
    whole = (folder / "dog" / "0.png").read_bytes()
    (folder / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(photo()).save(folder / "stray.png")
    data = TASK.read(folder)
    notes = " ".join(data.notes)
    assert "2 files" in notes and "cat/note.jpg" in notes and "dog/cut.png" in notes and "stray.png" in notes
    assert sum(len(s) for s in data.splits.values()) == 10
    with pytest.raises(BadInput, match=r"note\.jpg"):
        TASK.read(folder, strict=True)


def test_decoding_is_checked_in_worker_processes_where_there_are_many(folder, monkeypatch):
    from formarium.tasks.image_classification import data

    for i in range(10):
        Image.fromarray(photo()).save(folder / "cat" / f"more{i}.png")
    (folder / "cat" / "broken.png").write_bytes(b"\x89PNG broken")
    monkeypatch.setattr(data, "MANY", 16)
    assert "cat/broken.png" in TASK.read(folder).notes[0]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nowhere", "no such path"),
        (lambda p: p, "an empty folder"),
        (lambda p: _write(p / "a.txt", b"x"), "a file"),
        (lambda p: _write(p / "a" / "b.txt", b"x").parent.parent, "1 other files"),
        (lambda p: _image(p / "only" / "a.png").parent.parent, "one: only"),
        (lambda p: _write(p / "x" / "a.png", b"?").parent.parent, "1 corrupt files"),
        (lambda p: (_image(p / "a" / "1.png"), _image(p / "b" / "1.png"))[0].parent.parent, "at least two images"),
        (lambda p: _image(p / "a.png").parent, "no class folders"),
        (lambda p: _images(p, "train/a/1.png", "val/a/1.png", "val/b/1.png"), "none of b"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, make, says):
    with pytest.raises(BadInput, match=says) as caught:
        TASK.read(make(tmp_path))
    assert "\n" not in str(caught.value)


def _write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def _images(root, *names):
    for name in names:
        _image(root / name)
    return root


def _image(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(photo()).save(path)
    return path


def test_inputs_are_files_folders_and_globs(folder):
    assert len(TASK.inputs([folder])) == 10
    assert len(TASK.inputs([str(folder / "cat" / "*.png"), folder / "dog" / "0.png"])) == 6
    with pytest.raises(BadInput, match="no such path"):
        TASK.inputs([folder / "bird.png"])
    with pytest.raises(BadInput, match="can't be decoded"):
        TASK.inputs([_write(folder / "no.png", b"none")])


# sample data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASK.samples)
def test_samples_are_the_same_each_time_and_splits_share_nothing(name):
    data = TASK.sample(name)
    assert {*np.unique(data.splits["train"].labels)} == {*range(10)} == {*np.unique(data.splits["val"].labels)}
    assert data.splits["train"].images.shape[1:] == (32, 32, 3)
    seen = {i.tobytes() for i in data.splits["train"].images}
    shared = sum(i.tobytes() in seen for i in data.splits["val"].images)
    assert shared == 0
    with pytest.raises(UnknownName, match="digits"):
        TASK.sample("digit")


def test_texture_parts_do_not_touch():
    for name in REGIONS:
        region, parts = _region(name), _parts(_region(name))
        longer = max(region.shape[:2])
        assert len(parts["train"]) + GAP + len(parts["val"]) == longer
        assert all(min(p.shape[:2]) >= 40 for p in parts.values()), name


def test_samples_can_be_written_and_read_as_a_folder(tmp_path):
    data = TASK.sample("digits")
    small = type(data)(**{**data.__dict__, "splits": {k: _first(v, 30) for k, v in data.splits.items()}})
    again = TASK.read(write_folder(small, tmp_path / "digits"))
    assert len(again.splits["train"]) == 30 and (again.splits["train"][0]["image"] == decode(again.splits["train"].paths[0])).all()


def _first(arrays, count):
    return type(arrays)(arrays.images[:count], arrays.labels[:count], arrays.ids[:count])


# transforms ---------------------------------------------------------------------------------------------------------


def test_evaluation_resizes_the_shorter_side_and_takes_the_centre():
    image = np.zeros((100, 60, 3), dtype=np.uint8)
    image[45:55] = 255
    out = Prepare({"size": 30, "crop": 1.0})({"image": image}, RNG)["image"]
    assert out.shape == (3, 30, 30) and out.dtype == np.float32 and out[0, 15, 15] == 1 and out[0, 2, 2] == 0
    assert Prepare({"size": (16, 24), "crop": 0.875})({"image": image}, RNG)["image"].shape == (3, 16, 24)


def test_training_transforms_depend_on_their_generator_alone():
    recipe = {"crop_scale": (0.2, 1), "hflip": 0.5, "randaugment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5}
    prepare, sample = Prepare({"size": 32}, recipe), {"image": photo(40), "label": 1}
    one, same, other = (prepare(sample, np.random.default_rng(s))["image"] for s in (1, 1, 2))
    assert (one == same).all() and (one != other).any() and one.min() >= 0 and one.max() <= 1
    jittered = Prepare({"size": 32}, {"color_jitter": 0.4, "shift": 3})(sample, np.random.default_rng(0))
    assert jittered["image"].shape == (3, 32, 32) and jittered["label"] == 1


def test_shift_moves_and_repeats_edges():
    image = np.zeros((8, 8, 3), dtype=np.uint8)
    image[4, 4] = 255
    prepare = Prepare({"size": 8, "crop": 1.0}, {"shift": 2})
    places = {tuple(np.argwhere(prepare({"image": image}, np.random.default_rng(i))["image"][0])[0]) for i in range(80)}
    assert places == {(y, x) for y in range(2, 7) for x in range(2, 7)}


def test_every_randaugment_operation_keeps_size_and_mode():
    image = Image.fromarray(photo(20))
    for name, operation in OPERATIONS.items():
        for increasing in (False, True):
            out = operation(image, 0.9, np.random.default_rng(0), increasing)
            assert out.size == (20, 20) and out.mode == "RGB", name
    parsed = parse_randaugment("rand-m7-mstd0.5-inc1-n3")
    assert (parsed.magnitude, parsed.std, parsed.count, parsed.increasing) == (7, 0.5, 3, True)
    with pytest.raises(BadInput, match="rand-m9"):
        parse_randaugment("auto-m9")


def test_random_boxes_and_erasing_stay_inside():
    rng = np.random.default_rng(0)
    for _ in range(50):
        left, top, right, bottom = random_box(30, 50, (0.08, 1.0), (3 / 4, 4 / 3), rng)
        assert 0 <= left < right <= 50 and 0 <= top < bottom <= 30
    image = np.zeros((3, 32, 32), dtype=np.float32)
    erase(image, rng)
    assert 0.01 < (image[0] > 0).mean() < 0.45


def test_mixed_targets_sum_to_one_and_follow_the_pixels():
    batch = {"image": torch.rand(8, 3, 16, 16), "label": torch.arange(8)}
    for recipe in ({"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}):
        mix = batch_transform(recipe, 8)
        out = mix(batch, torch.Generator().manual_seed(3))
        torch.testing.assert_close(out["target"].sum(1), torch.ones(8))
        again = mix(batch, torch.Generator().manual_seed(3))
        assert torch.equal(out["image"], again["image"]) and not torch.equal(out["image"], batch["image"])
    cut = batch_transform({"cutmix": 1.0}, 8)(batch, torch.Generator().manual_seed(3))
    kept = (cut["image"] == batch["image"]).all(1).float().mean().item()
    assert cut["target"][0, 0].item() == pytest.approx(kept, abs=1e-6)
    smooth = batch_transform({"label_smoothing": 0.2}, 4)({"image": batch["image"], "label": batch["label"] % 4}, torch.Generator())
    assert smooth["target"][0].tolist() == pytest.approx([0.85, 0.05, 0.05, 0.05]) and torch.equal(smooth["image"], batch["image"])
    assert batch_transform({}, 4) is None


# scores and pictures ------------------------------------------------------------------------------------------------


def labels(probabilities):
    p = torch.tensor(probabilities)
    return Labels(p, p.argmax(-1))


def test_scores_against_hand_counted_ones():
    p = labels([[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.5, 0.4, 0.1], [0.2, 0.3, 0.5]])
    metrics, per_sample = TASK.score([p], [{"label": torch.tensor([0, 1, 0, 2])}])
    assert metrics["accuracy"] == 0.75 and per_sample["accuracy"].tolist() == [1, 0, 1, 1] and metrics["top5"] == 1
    assert metrics["log_loss"] == pytest.approx(-np.log([0.7, 0.3, 0.5, 0.5]).mean(), rel=1e-6)
    assert metrics["macro_f1"] == pytest.approx((1 + 0 + 2 / 3) / 3)


def test_rows_are_plain():
    row = TASK.rows(labels([[0.1, 0.9]]), {"id": ["a.png"]}, ["cat", "dog"])[0]
    assert row["id"] == "a.png" and row["label"] == "dog" and [t["label"] for t in row["top"]] == ["dog", "cat"]


def test_the_baseline_is_far_from_the_textures():
    name, metrics = TASK.baseline(TASK.sample("textures"))
    assert name == "logistic regression on raw pixels" and metrics["accuracy"] < 0.35


def test_pictures():
    batch = {"image": torch.rand(5, 3, 20, 30), "label": torch.tensor([0, 1, 0, 1, 0]), "id": [*"abcde"]}
    p = labels([[0.9, 0.1]] * 5)
    sheet = TASK.draw(p, batch, ["a very long name of a class", "b"])
    assert sheet.width > sheet.height and sheet.getextrema()[0][0] < 100
    assert len(TASK.details([p], [batch], ["a", "b"])) == 1
