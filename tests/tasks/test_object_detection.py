import json

import numpy as np
import pytest
import torch
from PIL import Image

from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks.object_detection.augment import Prepare, shorter
from formarium.tasks.object_detection.metrics import average_precision
from formarium.tasks.object_detection.model import Detections

TASK = task_of("object-detection")


@pytest.fixture(scope="module")
def data():
    return TASK.sample("shapes")


def write_coco(root, data, count=10, **changes):
    (root / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for i in range(count):
        s = data.splits["train"][i]
        name = f"{s['image_id']:012d}.png"
        Image.fromarray(s["image"]).save(root / "images" / name)
        images.append({"id": s["image_id"], "file_name": name, "height": 64, "width": 64})
        annotations += [dict(t) for t in s["truth"]]
    categories = [{"id": i, "name": n} for i, n in enumerate(data.names) if n]
    found = {"images": images, "annotations": annotations, "categories": categories, **changes}
    (root / "shapes.json").write_text(json.dumps(found))
    return found


# reading ------------------------------------------------------------------------------------------------------------


def test_a_coco_file_gives_back_what_was_written(tmp_path, data):
    write_coco(tmp_path, data)
    read = TASK.read(tmp_path / "shapes.json")
    assert read.model_args == {"num_classes": 4} and [*read.names] == ["", "disc", "square", "triangle"]
    assert {k: len(v) for k, v in read.splits.items()} == {"train": 8, "val": 2}
    sample = read.splits["val"][0]
    same = next(s for s in (data.splits["train"][i] for i in range(10)) if s["image_id"] == sample["image_id"])
    assert (sample["image"] == same["image"]).all() and (sample["masks"] == same["masks"]).all()
    np.testing.assert_allclose(sample["boxes"], same["boxes"])
    assert sample["labels"].tolist() == same["labels"].tolist()


def test_polygons_are_filled(tmp_path, data):
    box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [8, 8, 16, 24], "segmentation": [[8, 8, 24, 8, 24, 32, 8, 32]]}
    found = write_coco(tmp_path, data, 2)
    found["annotations"] = [{**box, "id": i, "image_id": image["id"]} for i, image in enumerate(found["images"])]
    (tmp_path / "shapes.json").write_text(json.dumps(found))
    sample = TASK.read(tmp_path / "shapes.json").splits["train"][0]
    assert sample["masks"].sum() == 16 * 24 and sample["masks"][0, 8:32, 8:24].all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"annotations": []}, "an empty list"),
        ({"annotations": None}, "none called annotations"),
        ({"categories": []}, "categories"),
        ({"categories": [{"id": "cat", "name": "cat"}]}, "whole number"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 9, "bbox": [1, 1, 5, 5]}]}, "none"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [70, 1, 5, 5]}]}, "none"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": "wide"}]}, "none"),
        ({"images": [{"id": 1, "file_name": "nowhere.png"}]}, r"nowhere\.png"),
        ({"images": [{"id": 1}]}, "file_name"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, data, change, says):
    write_coco(tmp_path, data, 3, **change)
    with pytest.raises(BadInput, match=says) as caught:
        TASK.read(tmp_path / "shapes.json")
    assert "\n" not in str(caught.value)


def test_boxes_outside_unknown_categories_and_missing_images_are_left_out_and_named(tmp_path, data):
    found = write_coco(tmp_path, data)
    first, second = found["annotations"][0], found["annotations"][1]
    first["bbox"], second["category_id"] = [-50, 3, 20, 20], 55
    gone = found["images"][-1]["file_name"]
    (tmp_path / "images" / gone).unlink()
    found["annotations"].append({**found["annotations"][2], "id": 999, "bbox": [50, 50, 40, 40]})
    (tmp_path / "shapes.json").write_text(json.dumps(found))
    read = TASK.read(tmp_path / "shapes.json")
    notes = " ".join(read.notes)
    assert "outside" in notes and "category 55" in notes and gone in notes
    cut = [t["bbox"] for s in read.splits.values() for e in s.entries for t in e["truth"] if t["id"] == 999]
    assert cut == [[50, 50, 14, 14]]  # cut to the picture
    with pytest.raises(BadInput):
        TASK.read(tmp_path / "shapes.json", strict=True)


def test_crowds_are_scored_around_but_not_learnt(tmp_path, data):
    found = write_coco(tmp_path, data, 2)
    found["annotations"][0]["iscrowd"] = 1
    (tmp_path / "shapes.json").write_text(json.dumps(found))
    read = TASK.read(tmp_path / "shapes.json", masks=False)
    entries = [e for s in read.splits.values() for e in s.entries]
    crowd = next(e for e in entries if any(t["iscrowd"] for t in e["truth"]))
    assert len(crowd["labels"]) == len(crowd["truth"]) - 1


def test_corrupt_pictures_and_no_json(tmp_path, data):
    found = write_coco(tmp_path, data, 3)
    (tmp_path / "images" / found["images"][0]["file_name"]).write_bytes(b"no image")
    read = TASK.read(tmp_path / "shapes.json")
    with pytest.raises(BadInput, match="decodes"):
        _ = [s[i] for s in read.splits.values() for i in range(len(s))]
    (tmp_path / "bad.json").write_text("[")
    for path, says in [(tmp_path / "bad.json", "no valid json"), (tmp_path / "none.json", "no such path")]:
        with pytest.raises(BadInput, match=says):
            TASK.read(path)


# sample data --------------------------------------------------------------------------------------------------------


def test_scenes_are_the_same_each_time_and_their_boxes_hold_their_masks(data):
    from formarium.tasks.object_detection.sample import scene

    again = scene(np.random.default_rng([0, 64]))[0]
    assert (again == data.splits["train"][0]["image"]).all()
    labels = np.concatenate([data.splits["train"][i]["labels"] for i in range(200)])
    assert {*labels} == {1, 2, 3} and min(np.bincount(labels)[1:]) > 80
    for i in range(30):
        s = data.splits["val"][i]
        assert 1 <= len(s["labels"]) <= 3 and not (s["masks"].sum(0) > 1).any()
        for (left, top, right, bottom), m in zip(s["boxes"].astype(int), s["masks"], strict=True):
            assert m[top:bottom, left:right].sum() == m.sum() and m[top].any() and m[:, right - 1].any()
    with pytest.raises(UnknownName, match="shapes"):
        TASK.sample("shape")


# transforms ---------------------------------------------------------------------------------------------------------


def test_the_shorter_side_is_resized_within_the_longer_ones_limit():
    assert shorter((480, 640), 800, 1333) == (800, 1067) and shorter((300, 900), 800, 1333) == (444, 1333)


def test_boxes_follow_masks_through_every_augmentation(data):
    recipe = {"hflip": 0.5, "scales": [64, 80, 96], "crop": 0.5}
    for i in range(30):
        out = Prepare({"size": 96, "max_size": 160}, recipe)(data.splits["train"][i], np.random.default_rng(i))
        h, w = out["image"].shape[1:]
        assert len(out["boxes"]) == len(out["labels"]) == len(out["masks"]) and out["masks"].shape[1:] == (h, w)
        for (x, y, bw, bh), m in zip(out["boxes"], out["masks"], strict=True):
            ys, xs = np.nonzero(m)
            assert xs.min() >= (x - bw / 2) * w - 1.6 and xs.max() <= (x + bw / 2) * w + 1.6
            assert ys.min() >= (y - bh / 2) * h - 1.6 and ys.max() <= (y + bh / 2) * h + 1.6


def test_pictures_of_different_sizes_are_padded(data):
    prepare = Prepare({"size": 64, "max_size": 200})
    wide = {"image": np.full((64, 128, 3), 200, dtype=np.uint8), "id": "wide"}
    batch = TASK.collate([prepare(data.splits["train"][0], np.random.default_rng(0)), prepare(wide, np.random.default_rng(0))])
    assert batch["image"].shape == (2, 3, 64, 128) and batch["size"].tolist() == [[64, 64], [64, 128]]
    assert batch["padding"][0, :, 64:].all() and not batch["padding"][1].any() and batch["image"][0, :, :, 64:].abs().sum() == 0
    assert (batch["labels"][1] == -1).all()


# scores and files ---------------------------------------------------------------------------------------------------


def batch_of(data, count=20):
    prepare = Prepare({"size": 64, "max_size": 96})
    return TASK.collate([prepare(data.splits["val"][i], np.random.default_rng(0)) for i in range(count)])


def perfect(data, count=20, masks=True, size=48):
    from formarium.nn.mask_codes import crop_masks

    most = 4
    scores, labels, boxes = torch.zeros(count, most), torch.ones(count, most, dtype=torch.int64), torch.zeros(count, most, 4)
    inner = torch.zeros(count, most, size, size, dtype=torch.bool)
    for i in range(count):
        s = data.splits["val"][i]
        n = len(s["labels"])
        scores[i, :n], labels[i, :n], boxes[i, :n] = 0.9, torch.from_numpy(s["labels"]), torch.from_numpy(s["boxes"])
        inner[i, :n] = crop_masks(torch.from_numpy(s["masks"]), boxes[i, :n], size)
    return Detections(scores, labels, boxes, inner if masks else None)


def test_perfect_boxes_and_masks_score_one(data):
    batch = batch_of(data)
    metrics, per_sample = TASK.score([perfect(data)], [batch])
    assert (
        metrics["AP"] == pytest.approx(1)
        and metrics["found"] == 1
        and metrics["mask_AP50"] == pytest.approx(1)
        and metrics["mask_AP"] > 0.8
    )
    assert len(per_sample["found"]) == 20
    only_boxes, _ = TASK.score([perfect(data, masks=False)], [batch])
    assert only_boxes["AP"] == pytest.approx(1) and "mask_AP" not in only_boxes
    wrong = perfect(data)._replace(labels=perfect(data).labels % 3 + 1)
    assert TASK.score([wrong], [batch])[0]["AP50"] < 0.05


def test_average_precision_of_a_known_case():
    truths = [{"id": i, "image_id": 1, "category_id": 1, "bbox": [40.0 * i, 0, 10, 10], "area": 100.0, "iscrowd": 0} for i in range(2)]
    found = [
        {"image_id": 1, "category_id": 1, "bbox": [0.0, 0, 10, 10], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [20.0, 20, 10, 10], "score": 0.8},
    ]
    metrics = average_precision([1], truths, found)
    assert metrics["AP50"] == pytest.approx(51 / 101) and metrics["AR100"] == pytest.approx(0.5)  # precision 1 up to recall 0.5, 0 beyond
    assert average_precision([1, 2], truths, [])["AP"] == 0


def test_a_false_alarm_in_an_empty_picture_costs():
    truths = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [0.0, 0, 10, 10], "area": 100.0, "iscrowd": 0}]
    found = [{"image_id": i, "category_id": 1, "bbox": [0.0, 0, 10, 10], "score": s} for i, s in ((1, 0.5), (2, 0.9))]
    assert average_precision([1, 2], truths, found)["AP50"] == pytest.approx(0.5)


def test_results_are_written_as_coco_has_them(tmp_path, data):
    batch = batch_of(data, 3)
    files = TASK.write(perfect(data, 3), batch, tmp_path, data.names)
    TASK.write(perfect(data, 3), batch, tmp_path, data.names)  # once more: replaced, not doubled
    results = json.loads((tmp_path / "detections.json").read_text())
    assert len(files) == 4 and len(results) == sum(len(t) for t in batch["truth"])
    assert {*results[0]} == {"image_id", "category_id", "bbox", "score", "segmentation"}
    truth = batch["truth"][0][0]
    assert results[0]["image_id"] == truth["image_id"] and results[0]["bbox"] == truth["bbox"]
    row = TASK.rows(perfect(data, 3), batch, data.names)[0]
    assert row["count"] == len(batch["truth"][0]) and row["objects"][0]["label"] in data.names


def test_the_baseline_is_each_classs_mean_box(data):
    name, metrics = TASK.baseline(data)
    assert name == "each class's mean box" and 0 <= metrics["AP"] < 0.05


def test_pictures_and_figures(data):
    batch = batch_of(data, 5)
    picture = TASK.draw(perfect(data, 5), batch, data.names)
    assert picture.width > 1000 and len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 500
    assert len(TASK.details([perfect(data, 5)], [batch], data.names)) == 1


def test_pictures_in_memory_and_files(tmp_path, data):
    image = data.splits["train"][0]["image"]
    Image.fromarray(image).save(tmp_path / "a.png")
    assert (TASK.inputs([tmp_path / "a.png"])[0]["image"] == image).all()
    assert TASK.from_memory(image, 0)["id"] == "input 0" and TASK.is_single(image) and not TASK.is_single([image])
