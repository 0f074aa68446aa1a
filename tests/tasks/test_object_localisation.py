import csv
import json
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image

from formarium.errors import BadInput, UnknownName
from formarium.nn.map_boxes import component_boxes, enlarge, largest_box, map_boxes, min_max
from formarium.task import task as task_of
from formarium.tasks.object_localisation.data import Prepare, parse_voc
from formarium.tasks.object_localisation.metrics import LEVELS, best_overlap, max_box_acc_v2
from formarium.tasks.object_localisation.model import Localised
from formarium.tasks.object_localisation.sample import scene

TASK = task_of("object-localisation")
RNG = np.random.default_rng(0)
NAN = float("nan")


def image(path, width=40, height=30):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(path)
    return path


# readers ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            for i in range(2):
                image(tmp_path / split / name / f"{i}.png")
    return tmp_path


def write_csv(root, rows, header=("image", "x0", "y0", "x1", "y1")):
    with (root / "boxes.csv").open("w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


VAL = [(f"val/{n}/{i}.png", 4, 3, 24, 18) for n in ("cat", "dog") for i in range(2)]


def test_a_folder_with_a_table_of_boxes(folder):
    write_csv(folder, [*VAL, ("val/dog/1.png", 0, 0, 10, 10), ("train/cat/0.png", 1, 1, 2, 2)])
    data = TASK.read(folder)
    assert data.names == ["cat", "dog"] and data.model_args == {"num_classes": 2}
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 4, "val": 4}
    assert "boxes" not in data.splits["train"][0]  # nothing learns from boxes
    assert data.splits["val"][0]["boxes"].tolist() == [[4, 3, 24, 18]]
    assert data.splits["val"][3]["boxes"].shape == (2, 4)
    ready = TASK.transform({"size": 20, "crop": 1.0})
    batch = TASK.collate([ready(data.splits["val"][i], RNG) for i in range(4)])
    assert batch["boxes"].shape == (4, 2, 4) and batch["boxes"][0, 1].isnan().all()
    torch.testing.assert_close(batch["boxes"][0, 0], torch.tensor([2.0, 2.0, 12.0, 12.0]))


def test_other_column_names_and_json_say_the_same(folder):
    write_csv(folder, VAL, ("filename", "xmin", "ymin", "xmax", "ymax"))
    first = TASK.read(folder).splits["val"]
    (folder / "boxes.csv").unlink()
    (folder / "boxes.json").write_text(json.dumps({n: [b] if i % 2 else list(b) for i, (n, *b) in enumerate(VAL)}))
    second = TASK.read(folder).splits["val"]
    for i in range(4):
        np.testing.assert_array_equal(first[i]["boxes"], second[i]["boxes"])
        assert first[i]["id"] == second[i]["id"]


def test_held_out_images_without_a_box_are_left_out_and_counted(folder):
    write_csv(folder, VAL[:3])
    data = TASK.read(folder)
    assert len(data.splits["val"]) == 3 and any("1 images of 'val' without a box" in n for n in data.notes)


def make_cub(root):
    lines = {"images": [], "image_class_labels": [], "train_test_split": [], "bounding_boxes": []}
    for i in range(1, 9):
        name = f"{1 + i % 2:03d}.Bird/{i}.jpg"
        image(root / "images" / name, 50, 40)
        lines["images"].append(f"{i} {name}")
        lines["image_class_labels"].append(f"{i} {1 + i % 2}")
        lines["train_test_split"].append(f"{i} {int(i <= 4)}")
        lines["bounding_boxes"].append(f"{i} 5.0 6.0 20.0 30.0")
    for name, rows in lines.items():
        (root / f"{name}.txt").write_text("\n".join(rows) + "\n")
    (root / "classes.txt").write_text("1 001.Black\n2 002.White\n")
    return root


def test_cub_by_its_own_files(tmp_path):
    make_cub(tmp_path / "CUB_200_2011")
    data = TASK.read(tmp_path)  # the folder that the archive unpacks into
    assert data.names == ["001.Black", "002.White"] and {k: len(v) for k, v in data.splits.items()} == {"train": 4, "val": 4}
    sample = data.splits["val"][0]
    assert sample["boxes"].tolist() == [[5, 6, 25, 36]] and sample["label"] == 1 and sample["image"].shape == (40, 50, 3)


def annotation(path, name, *boxes):
    path.parent.mkdir(parents=True, exist_ok=True)
    objects = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d in boxes
    )
    path.write_text(f"<annotation>{objects}</annotation>")


def test_imagenets_layout(tmp_path):
    for name in ("n01", "n02"):
        for i in range(2):
            image(tmp_path / "Data" / "CLS-LOC" / "train" / name / f"{name}_{i}.JPEG")
        stem = f"ILSVRC2012_val_{name}"
        image(tmp_path / "Data" / "CLS-LOC" / "val" / f"{stem}.JPEG")
        annotation(tmp_path / "Annotations" / "CLS-LOC" / "val" / f"{stem}.xml", name, (1, 2, 11, 12), (3, 3, 20, 20))
    data = TASK.read(tmp_path)
    assert data.names == ["n01", "n02"] and {k: len(v) for k, v in data.splits.items()} == {"train": 4, "val": 2}
    sample = data.splits["val"][1]
    assert sample["label"] == 1 and sample["boxes"].tolist() == [[1, 2, 11, 12], [3, 3, 20, 20]]


def test_voc_folders_without_splits_are_split_by_the_seed(tmp_path):
    for name in ("cup", "pen"):
        for i in range(5):
            image(tmp_path / name / f"{name}{i}.png")
            annotation(tmp_path / "Annotations" / f"{name}{i}.xml", name, (1, 2, 11, 12))
    a, b = TASK.read(tmp_path), TASK.read(tmp_path)
    assert {k: len(v) for k, v in a.splits.items()} == {"train": 8, "val": 2}
    assert a.splits["val"].files.paths == b.splits["val"].files.paths


def _boxes(*rows):
    return lambda root: write_csv(root, [*VAL[1:], *rows])


def _break(name, text):
    def change(root):
        make_cub(root)
        (root / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda root: None, "none of them"),
        (_boxes(("val/cat/0.png", 10, 10, 60, 20)), r"inside the image \(40 x 30 pixels\)"),
        (_boxes(("val/cat/0.png", 10, 10, 5, 20)), "x0 < x1"),
        (_boxes(("val/cat/0.png", "ten", 10, 5, 20)), "four numbers"),
        (_boxes(("val/cat/9.png", 1, 2, 3, 4)), r"boxes.csv line 5: expected images that are there, got val/cat/9.png"),
        (lambda root: write_csv(root, [], ("image", "x", "y")), "the columns"),
        (lambda root: write_csv(root, [("train/cat/0.png", 1, 1, 9, 9)]), "none for any of its 4"),
        (lambda root: (root / "boxes.json").write_text("{"), "JSON"),
        (lambda root: (root / "boxes.json").write_text("[1]"), "an object of boxes"),
        (lambda root: (root / "boxes.json").write_text('{"val/cat/0.png": [[1, 2, 3]]}'), "four numbers"),
        (_break("bounding_boxes.txt", "1 2 3\n"), "bounding_boxes.txt line 1"),
        (_break("bounding_boxes.txt", "1 1 1 9 9\n"), "none for image 2"),
        (_break("images.txt", "1 001.Bird/none.jpg\n"), "none.jpg, which is not"),
        (_break("image_class_labels.txt", "".join(f"{i} 1\n" for i in range(1, 9))), "one: 001.Black"),
        (_break("image_class_labels.txt", "".join(f"{i} 7\n" for i in range(1, 9))), "class 7"),
        (_break("train_test_split.txt", "".join(f"{i} 1\n" for i in range(1, 9))), "no 0"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(folder, change, says):
    change(folder)
    with pytest.raises(BadInput, match=says) as caught:
        TASK.read(folder)
    assert "\n" not in str(caught.value)


def test_broken_annotations_and_one_class(tmp_path):
    with pytest.raises(BadInput, match="no such path"):
        TASK.read(tmp_path / "nowhere")
    for i in range(3):
        image(tmp_path / "only" / f"{i}.png")
    annotation(tmp_path / "Annotations" / "0.xml", "only", (1, 1, 5, 5))
    with pytest.raises(BadInput, match="one: only"):
        TASK.read(tmp_path)
    annotation(tmp_path / "Annotations" / "7.xml", "only", (1, 1, 5, 5))
    with pytest.raises(BadInput, match="an image of that name"):
        TASK.read(tmp_path)
    (tmp_path / "bad.xml").write_text("<annotation>")
    with pytest.raises(BadInput, match="broken XML"):
        parse_voc(tmp_path / "bad.xml")
    (tmp_path / "bad.xml").write_text("<annotation></annotation>")
    with pytest.raises(BadInput, match="with objects"):
        parse_voc(tmp_path / "bad.xml")


# into batches -------------------------------------------------------------------------------------------------------


def test_boxes_go_with_the_image_through_squeezing_and_cutting():
    picture = np.zeros((80, 160, 3), dtype=np.uint8)
    picture[20:60, 40:120] = 255
    sample = {"image": picture, "id": "a", "label": 0, "boxes": np.array([[40.0, 20.0, 120.0, 60.0]])}
    out = Prepare({"size": 28, "crop": 0.875})(sample, RNG)  # 32 x 32, of which 28 x 28 stay
    np.testing.assert_allclose(out["boxes"], [[6, 6, 22, 22]])
    lit = np.nonzero(out["image"][0] > 0.5)
    assert (lit[1].min(), lit[0].min(), lit[1].max() + 1, lit[0].max() + 1) == (6, 6, 22, 22)
    np.testing.assert_allclose(out["visible"], [10, 5, 150, 75])
    assert out["pixels"].tolist() == [80, 160] and out["size"].tolist() == [28, 28]


def test_training_sees_no_boxes_and_moves_the_image():
    picture = RNG.integers(0, 255, (40, 40, 3), dtype=np.uint8)
    sample = {"image": picture, "id": "a", "label": 0, "boxes": np.array([[1.0, 1.0, 9.0, 9.0]])}
    prepare = Prepare({"size": 28, "crop": 0.7}, {"random_crop": True, "hflip": 0.5, "color_jitter": 0.2})
    made = [prepare(sample, np.random.default_rng(s)) for s in range(6)]
    assert all("boxes" not in m and m["image"].shape == (3, 28, 28) for m in made)
    assert len({m["image"].tobytes() for m in made}) == 6
    again = prepare(sample, np.random.default_rng(3))
    np.testing.assert_array_equal(again["image"], made[3]["image"])


def test_unlabelled_images_make_a_batch():
    ready = TASK.transform({"size": 16, "crop": 1.0})
    batch = TASK.collate([ready(TASK.from_memory(np.zeros((20, 30, 3), dtype=np.uint8), i), RNG) for i in range(2)])
    assert "label" not in batch and "boxes" not in batch and batch["visible"][0].tolist() == [0, 0, 30, 20]


# boxes of maps ------------------------------------------------------------------------------------------------------


def test_the_largest_part_gives_the_box():
    mask = np.zeros((10, 12), dtype=bool)
    mask[1:3, 1:3] = mask[5:9, 4:10] = True
    mask[3, 3] = True  # touches the first part at a corner
    assert component_boxes(mask).tolist() == [[1, 1, 4, 4], [4, 5, 10, 9]]
    assert largest_box(mask) == (4, 5, 10, 9)
    assert largest_box(np.zeros((10, 12), dtype=bool)) == (0, 0, 12, 10)
    assert component_boxes(np.zeros((3, 3), dtype=bool)).shape == (0, 4)


def test_a_map_becomes_a_box_in_pixels():
    one = torch.zeros(1, 14, 14)
    one[0, 4:8, 2:10] = 0.8
    box = map_boxes(one + 0.1, (56, 56), 0.5)
    assert (box - torch.tensor([[8.0, 16.0, 40.0, 32.0]])).abs().max() <= 1
    assert map_boxes(torch.full((1, 4, 4), 0.3), (20, 30), 0.4).tolist() == [[0, 0, 30, 20]]  # nothing stands out: all of it
    scaled = min_max(torch.rand(3, 5, 5) * 4 - 1)
    assert scaled.amin() == 0 and 0.99 < scaled.amax() <= 1
    assert enlarge(scaled, (9, 7)).shape == (3, 9, 7)


# metrics ------------------------------------------------------------------------------------------------------------


def prediction():
    """Four images of 20 x 20: right in both, right box of another class, wrong box, right box of two true ones."""
    box = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [10, 10, 20, 20], [2, 2, 8, 8]])
    truth = torch.tensor(
        [[[0, 0, 10, 10], [NAN] * 4], [[0, 0, 10, 8], [NAN] * 4], [[0, 0, 10, 10], [NAN] * 4], [[10, 10, 20, 20], [2, 2, 8, 9]]]
    )
    label = torch.tensor([0, 1, 2, 3])
    probabilities = torch.full((4, 8), 0.01)
    probabilities[:, 0] = 0.5
    probabilities[3, 3] = 0.9
    probabilities[1, 2:7] = 0.2
    maps = torch.zeros(4, 20, 20)
    for m, b in zip(maps, box.int().tolist(), strict=True):
        m[b[1] : b[3], b[0] : b[2]] = 1
    batch = {"label": label, "boxes": truth, "size": torch.tensor([[20, 20]] * 4), "pixels": torch.tensor([[40, 20]] * 4)}
    batch |= {"visible": torch.tensor([[0.0, 0, 20, 40]] * 4), "image": torch.rand(4, 3, 20, 20), "id": ["a", "b/c.png", "d", "e"]}
    return Localised(probabilities, probabilities.argmax(-1), box, maps), batch


def test_metrics_by_hand():
    said, batch = prediction()
    metrics, each = TASK.score([said], [batch])
    assert each["gt_known_loc"].tolist() == [1, 1, 0, 1] and metrics["gt_known_loc"] == 0.75
    assert each["top1_loc"].tolist() == [1, 0, 0, 1] and each["accuracy"].tolist() == [1, 0, 0, 1]
    assert each["top5_loc"].tolist() == [1, 0, 0, 1] and each["top5"].tolist() == [1, 0, 1, 1]
    assert metrics["mean_iou"] == pytest.approx((1 + 0.8 + 0 + 36 / 42) / 4)
    assert metrics["max_box_acc_v2"] == 0.75
    halves = [[type(said)(*(v[i : i + 2] for v in said)) for i in (0, 2)], [{k: v[i : i + 2] for k, v in batch.items()} for i in (0, 2)]]
    assert TASK.score(*halves)[0] == metrics


def test_max_box_acc_takes_any_part_at_the_best_threshold():
    maps = torch.zeros(1, 20, 20)
    maps[0, :16, :16] = 0.3
    maps[0, :10, :10] = 1.0
    maps[0, 12:20, 18:20] = 0.9  # another part
    said = Localised(torch.ones(1, 1), torch.zeros(1, dtype=torch.int64), torch.tensor([[0.0, 0, 16, 16]]), maps)
    batch = {"label": torch.zeros(1, dtype=torch.int64), "size": torch.tensor([[20, 20]])}
    assert max_box_acc_v2([said], [{**batch, "boxes": torch.tensor([[[0.0, 0, 10, 10]]])}]) == 1
    assert max_box_acc_v2([said], [{**batch, "boxes": torch.tensor([[[18.0, 12, 20, 20]]])}]) == 1
    assert max_box_acc_v2([said], [{**batch, "boxes": torch.tensor([[[0.0, 0, 20, 10]]])}]) == pytest.approx(2 / len(LEVELS))  # 0.5
    assert best_overlap(torch.tensor([0.0, 0, 2, 2]), torch.full((1, 4), NAN)) == 0


def test_rows_and_files_are_in_the_files_own_pixels(tmp_path):
    said, batch = prediction()
    names = [f"kind {i}" for i in range(8)]
    rows = TASK.rows(said, batch, names)
    assert rows[0]["box"] == [0, 0, 10, 20] and rows[3]["label"] == "kind 3" and rows[0]["object_share"] == 0.25
    paths = TASK.write(said, batch, tmp_path, names)
    assert {p.name for p in paths} >= {"a.xml", "a.png", "b_c.xml"} and all(p.stat().st_size for p in paths)
    name, boxes = parse_voc(tmp_path / "a.xml")
    assert name == "kind 0" and boxes.tolist() == [[0, 0, 10, 20]]
    assert ElementTree.parse(tmp_path / "a.xml").findtext("size/height") == "40"
    assert np.asarray(Image.open(tmp_path / "a.png")).shape == (40, 20)


def test_a_picture_with_and_without_truth():
    said, batch = prediction()
    assert TASK.draw(said, batch).size[0] > 500
    bare = {k: v for k, v in batch.items() if k != "boxes"}
    with_truth, without = (np.asarray(TASK.draw(said, b)) for b in (batch, bare))
    assert (with_truth != without).any()


# sample data --------------------------------------------------------------------------------------------------------


def test_sample_data_are_what_they_say():
    data = TASK.sample("textured-objects")
    train, val = data.splits["train"], data.splits["val"]
    assert (len(train), len(val)) == (1200, 300) and train.boxes is None and np.bincount(val.labels).tolist() == [75] * 4
    boxes = np.concatenate(val.boxes)
    share = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / 56**2
    assert 0.11 < share.min() < 0.15 and 0.36 < share.max() < 0.42 and boxes.min() >= 0 and boxes.max() <= 56
    assert not np.array_equal(scene(0, np.random.default_rng(1))[0], scene(0, np.random.default_rng(2))[0])
    np.testing.assert_array_equal(scene(0, np.random.default_rng(1))[0], scene(0, np.random.default_rng(1))[0])
    with pytest.raises(UnknownName):
        TASK.sample("digits")


def test_the_object_is_where_its_box_says():
    val = TASK.sample("textured-objects").splits["val"]
    gap = []
    for i in range(60):
        x0, y0, x1, y1 = val.boxes[i][0].astype(int)
        grey = val.images[i].astype(float).mean(-1)
        edges = np.abs(np.diff(grey, axis=1))[:-1, :] + np.abs(np.diff(grey, axis=0))[:, :-1]
        inside = np.zeros((56, 56), dtype=bool)
        inside[y0:y1, x0:x1] = True
        gap.append(edges[inside[:-1, :-1]].mean() > 1.5 * edges[~inside[:-1, :-1]].mean())
    assert np.mean(gap) > 0.9


def test_the_rival_is_the_best_box_in_the_middle():
    data = TASK.sample("textured-objects")
    name, metrics = TASK.baseline(data)
    assert name == "the best box in the middle" and 0.1 < metrics["gt_known_loc"] < 0.4 and metrics["accuracy"] == 0.25
    boxes = torch.from_numpy(np.stack(data.splits["val"].boxes))
    assert (best_overlap(torch.tensor([0.0, 0, 56, 56]), boxes) < 0.5).all()  # the whole image is never right
    square = (best_overlap(torch.tensor([11.0, 11, 45, 45]), boxes) >= 0.5).float().mean()
    assert metrics["gt_known_loc"] >= square
