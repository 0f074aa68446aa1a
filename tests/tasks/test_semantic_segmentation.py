"""Semantic segmentation: readers, preparation, scores, sample data, pictures, bad input."""

import numpy as np
import pytest
import torch
from PIL import Image

import formarium
from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks.semantic_segmentation.metrics import confusion
from formarium.tasks.semantic_segmentation.model import IGNORE, Segments, pixel_cross_entropy
from formarium.tasks.semantic_segmentation.prepare import Prepare

TASK = task_of("semantic-segmentation")
RNG = np.random.default_rng(0)


def picture(path, size=(20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)


def mask(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)


def halves(a, b, size=(20, 30)):
    values = np.full(size, a)
    values[:, size[1] // 2 :] = b
    return values


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        picture(tmp_path / "images" / f"{i}.jpg")
        mask(tmp_path / "masks" / f"{i}.png", halves(0, 1 + i % 2))
    (tmp_path / "classes.txt").write_text("sky\nsea\nland\n")
    return tmp_path


def test_pairs_in_a_folder(folder):
    data = TASK.read(folder)
    assert data.names == ["sky", "sea", "land"] and data.model_args == {"num_classes": 3}
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 5, "val": 1}
    s = data.splits["train"][0]
    assert s["image"].shape == (20, 30, 3) and s["label"].shape == (20, 30) and set(np.unique(s["label"])) <= {0, 1, 2}
    again = TASK.read(folder)
    assert again.splits["val"].ids == data.splits["val"].ids


def test_splits_of_its_own_and_pixels_without_class(folder):
    for split in ("train", "val"):
        picture(folder / split / "images" / "a.png")
        mask(folder / split / "masks" / "a.png", halves(2, 255))
    (folder / "train" / "masks" / "a.png").unlink()
    mask(folder / "train" / "masks" / "a.png", halves(0, 255))
    data = TASK.read(folder)
    assert [*data.splits] == ["train", "val"]
    assert set(np.unique(data.splits["val"][0]["label"])) == {2, IGNORE}


def test_ade20k_where_zero_is_no_class(tmp_path):
    for ours, values in (("training", halves(0, 3)), ("validation", halves(1, 3))):
        picture(tmp_path / "images" / ours / "ADE_1.jpg")
        mask(tmp_path / "annotations" / ours / "ADE_1.png", values)
    data = TASK.read(tmp_path)
    assert data.model_args == {"num_classes": 3}
    assert set(np.unique(data.splits["train"][0]["label"])) == {IGNORE, 2} and set(np.unique(data.splits["val"][0]["label"])) == {0, 2}
    assert TASK.read(tmp_path, zero_is_no_class=False).model_args == {"num_classes": 4}


def test_cityscapes(tmp_path):
    for split in ("train", "val"):
        picture(tmp_path / "leftImg8bit" / split / "ulm" / "ulm_0_leftImg8bit.png")
        mask(tmp_path / "gtFine" / split / "ulm" / "ulm_0_gtFine_labelIds.png", halves(7, 3))
    data = TASK.read(tmp_path)
    assert len(data.names) == 19 and data.names[0] == "road"
    assert set(np.unique(data.splits["val"][0]["label"])) == {0, IGNORE}


def test_bad_input(folder, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(BadInput, match="images/ and masks/"):
        TASK.read(empty)
    with pytest.raises(BadInput, match="a folder"):
        TASK.read(empty / "nowhere")
    (folder / "masks" / "0.png").unlink()
    assert "1 pictures without a mask" in TASK.read(folder).notes[0]
    with pytest.raises(BadInput, match="a mask for every picture"):
        TASK.read(folder, strict=True)
    picture(folder / "masks" / "0.png")
    with pytest.raises(BadInput, match="one channel"):
        TASK.read(folder)
    mask(folder / "masks" / "0.png", halves(0, 1, (10, 10)))
    data = TASK.read(folder, holdout=0.9)
    with pytest.raises(BadInput, match="20x30"):
        [s[i] for s in data.splits.values() for i in range(len(s))]
    (folder / "masks" / "0.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match="can't be decoded"):
        TASK.read(folder)
    for i in range(6):
        mask(folder / "masks" / f"{i}.png", np.zeros((20, 30)))
    (folder / "classes.txt").unlink()
    with pytest.raises(BadInput, match="two classes"):
        TASK.read(folder)
    with pytest.raises(BadInput, match="picture"):
        TASK.inputs([empty])
    with pytest.raises(BadInput, match="array"):
        TASK.from_memory(3, 0)
    with pytest.raises(UnknownName):
        TASK.sample("mosaic")


def test_image_and_mask_go_through_the_same_changes():
    label = np.arange(24 * 24).reshape(24, 24) // 96
    image = np.repeat((label * 40).astype(np.uint8)[..., None], 3, -1)
    prepare = Prepare({"size": 24}, {"crop": 16, "hflip": 1.0})
    out = prepare({"id": "a", "image": image, "label": label}, np.random.default_rng(1))
    assert out["image"].shape == (3, 16, 16) and out["label"].dtype == torch.int64
    assert torch.equal((out["image"][0] * 255 / 40).round().long(), out["label"])
    out = Prepare({"size": 24}, {"crop": 40, "scale": (0.5, 0.5)})({"id": "a", "image": image, "label": label}, np.random.default_rng(1))
    assert (out["label"][12:] == IGNORE).all() and (out["image"][:, 12:] == 0).all()


def test_pictures_of_several_sizes_make_a_batch():
    ready = Prepare({"size": 24})
    rng = np.random.default_rng(0)
    samples = [ready({"id": str(h), "image": np.zeros((h, 8, 3), np.uint8), "label": np.ones((h, 8), np.int64)}, rng) for h in (8, 12)]
    batch = TASK.collate(samples)
    assert batch["image"].shape == (2, 3, 12, 8) and batch["size"].tolist() == [[8, 8], [12, 8]]
    assert (batch["label"][0, 8:] == IGNORE).all() and batch["main_class"].tolist() == [1, 1]


def test_scores_by_hand():
    true = torch.tensor([[[0, 0, 1, 1], [0, 0, 1, IGNORE]]])
    said = Segments(torch.tensor([[[0, 1, 1, 1], [0, 0, 1, 0]]]).short(), torch.ones(1, 2, 4))
    metrics, each = TASK.score([said], [{"label": true}])
    assert metrics["pixel_accuracy"] == pytest.approx(6 / 7) and metrics["miou"] == pytest.approx((3 / 4 + 3 / 4) / 2)
    assert metrics["class_accuracy"] == pytest.approx((3 / 4 + 1) / 2) and each["pixel_accuracy"].tolist() == [pytest.approx(6 / 7)]
    assert confusion(said.label[0].long(), true[0], 2).tolist() == [[3, 1], [0, 3]]
    with pytest.raises(BadInput, match="labelled data"):
        TASK.score([said], [{"image": true}])


def test_pixels_without_class_don_t_count_in_the_loss():
    logits, label = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 4, 4))
    label[0, 0] = IGNORE
    other = logits.clone()
    other[:, :, 0] += 5 * torch.randn(3, 4)
    assert torch.equal(pixel_cross_entropy(logits, label), pixel_cross_entropy(other, label))
    assert pixel_cross_entropy(logits, torch.full_like(label, IGNORE)) == 0


def test_the_sample_data_and_its_rival():
    data = TASK.sample("mosaics")
    assert len(data.splits["train"]) == 240 and data.model_args == {"num_classes": 6} == {"num_classes": len(data.names)}
    s = data.splits["val"][0]
    assert s["image"].shape == (64, 64, 3) and 2 <= len(np.unique(s["label"])) <= 4
    assert np.array_equal(TASK.sample("mosaics").splits["val"][0]["label"], s["label"])
    name, found = TASK.baseline(data)
    assert "colour" in name and 0.05 < found["miou"] < 0.4


def test_predictions_become_rows_files_and_pictures(tmp_path):
    model = formarium.create("semantic_fpn_micro").eval()
    batch = model.example_batch(3)
    with torch.no_grad():
        said = model.predict(batch)
    assert said.label.shape == said.confidence.shape == (3, 64, 64)
    rows = TASK.rows(said, batch, ["a", "b", "c", "d", "e", "f"])
    assert sum(rows[0]["shares"].values()) == pytest.approx(1, abs=1e-3) and rows[0]["main_class"] == next(iter(rows[0]["shares"]))
    paths = TASK.write(said, batch, tmp_path)
    with Image.open(paths[0]) as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), said.label[0].numpy())
    assert TASK.draw(said, batch, ["a", "b"]).size[0] > 200
    assert {*TASK.details([said], [batch], ["a", "b"])} == {"Each class"}
