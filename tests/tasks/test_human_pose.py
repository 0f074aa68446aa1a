import json

import numpy as np
import pytest
import torch
from PIL import Image

from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks.human_pose.crop import Prepare, apply, cut, frame, matrix
from formarium.tasks.human_pose.joints import JOINTS, LIMBS
from formarium.tasks.human_pose.metrics import average_precision, oks, oks_nms
from formarium.tasks.human_pose.model import Poses

TASK = task_of("human-pose")


@pytest.fixture(scope="module")
def data():
    return TASK.sample("figures")


def write_coco(root, data, count=12, **changes):
    """The first people of the sample data as a COCO file beside its pictures."""
    (root / "images").mkdir(parents=True, exist_ok=True)
    images, annotations = {}, []
    for i in range(count):
        s = data.splits["train"][i]
        truth = s["truth"][0]
        name = f"{truth['image_id']:012d}.png"
        Image.fromarray(s["image"]).save(root / "images" / name)
        images[truth["image_id"]] = {"id": truth["image_id"], "file_name": name, "height": 144, "width": 176}
        annotations.append(dict(truth))
    found = {"images": [*images.values()], "annotations": annotations, "categories": [{"id": 1, "name": "person"}]}
    found.update(changes)
    (root / "people.json").write_text(json.dumps(found))
    return found


# reading ------------------------------------------------------------------------------------------------------------


def test_a_coco_file_is_read_and_split_by_images(tmp_path, data):
    write_coco(tmp_path, data)
    read = TASK.read(tmp_path / "people.json")
    assert len(read.splits["train"]) + len(read.splits["val"]) == 12 and read.model_args == {"num_joints": 17}
    images = [{e["truth"][0]["image_id"] for e in read.splits[s].entries} for s in ("train", "val")]
    assert images[0].isdisjoint(images[1]) and images[1]
    sample = read.splits["train"][0]
    same = next(s for s in (data.splits["train"][i] for i in range(12)) if s["truth"][0]["id"] == sample["truth"][0]["id"])
    assert (sample["image"] == same["image"]).all() and np.allclose(sample["keypoints"], same["keypoints"])


def test_named_splits_and_the_annotations_folder(tmp_path, data):
    for split in ("train2017", "val2017"):
        write_coco(tmp_path / "all" / split, data, 4)
        (tmp_path / "all" / split / "people.json").rename(tmp_path / f"person_keypoints_{split}.json")
    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / f"person_keypoints_{split}.json").rename(tmp_path / "annotations" / f"person_keypoints_{split}.json")
        (tmp_path / "all" / split / "images").rename(tmp_path / split)
    read = TASK.read(tmp_path)
    assert {k: len(v) for k, v in read.splits.items()} == {"train": 4, "val": 4}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"annotations": []}, "an empty list"),
        ({"images": None}, "none called images"),
        ({"annotations": [{"id": 1}]}, "image_id"),
        ({"annotations": [{"id": 1, "image_id": 1, "bbox": [0, 0, 9, 9], "category_id": 1, "keypoints": [1, 1, 2]}]}, "3 numbers"),
        (
            {"annotations": [{"id": 1, "image_id": 1, "bbox": [900, 0, 9, 9], "category_id": 1, "keypoints": [1, 1, 2] * 17}]},
            "none that can",
        ),
        ({"images": [{"id": 1, "file_name": "nowhere.png"}]}, "nowhere.png"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, data, change, says):
    write_coco(tmp_path, data, 3, **change)
    with pytest.raises(BadInput, match=says) as caught:
        TASK.read(tmp_path / "people.json")
    assert "\n" not in str(caught.value)


def test_no_json_no_file_no_folder(tmp_path):
    (tmp_path / "a.json").write_text("{not json")
    for path, says in [(tmp_path / "a.json", "no valid json"), (tmp_path / "b.json", "no such path")]:
        with pytest.raises(BadInput, match=says):
            TASK.read(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match="none"):
        TASK.read(tmp_path / "empty")


def test_missing_images_and_unknown_categories_are_left_out_and_named(tmp_path, data):
    found = write_coco(tmp_path, data)
    (tmp_path / "images" / found["images"][0]["file_name"]).unlink()
    found["annotations"][-1]["category_id"] = 77
    (tmp_path / "people.json").write_text(json.dumps(found))
    notes = " ".join(TASK.read(tmp_path / "people.json").notes)
    assert found["images"][0]["file_name"] in notes and "category 77" in notes
    with pytest.raises(BadInput, match="none called"):
        TASK.read(tmp_path / "people.json", strict=True)


def test_detected_boxes_take_the_place_of_annotated_ones(tmp_path, data):
    write_coco(tmp_path, data)
    val = TASK.read(tmp_path / "people.json").splits["val"]
    first = val[0]["truth"][0]
    results = [{"image_id": first["image_id"], "category_id": 1, "bbox": first["bbox"], "score": 0.7}]
    (tmp_path / "boxes.json").write_text(json.dumps(results))
    read = TASK.read(tmp_path / "people.json", boxes=tmp_path / "boxes.json")
    sample = read.splits["val"][0]
    assert sample["box_score"] == 0.7 and len(read.splits["val"]) == 1
    assert {t["id"] for t in sample["truth"]} == {e["truth"][0]["id"] for e in val.entries}  # missed people still count


def test_pictures_and_values_in_memory(tmp_path, data):
    Image.fromarray(data.splits["train"][0]["image"]).save(tmp_path / "a.png")
    one = TASK.inputs([tmp_path / "a.png"])[0]
    assert one["box"].tolist() == [0, 0, 176, 144]
    assert TASK.from_memory(one["image"], 0)["box"].tolist() == [0, 0, 176, 144]
    assert TASK.is_single(one["image"]) and TASK.is_single({"image": one["image"]}) and not TASK.is_single([one["image"]])
    with pytest.raises(BadInput, match="inside"):
        TASK.from_memory({"image": one["image"], "box": [500, 500, 3, 3]}, 0)


# sample data --------------------------------------------------------------------------------------------------------


def test_figures_are_the_same_each_time_and_their_limbs_have_fixed_lengths(data):
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 800, "val": 200}
    from formarium.tasks.human_pose.sample import pose, scene

    again = scene(np.random.default_rng([0, 17]))[0]
    assert (again == data.splits["train"][0]["image"]).all()
    poses = [pose(np.random.default_rng(i), 50, 50, 60) for i in (1, 2)]
    lengths = [np.linalg.norm(p[7] - p[5]) / np.linalg.norm(p[15] - p[13]) for p in poses]
    assert lengths[0] == pytest.approx(lengths[1]) == pytest.approx(0.17 / 0.22)
    marks = np.concatenate([data.splits["train"][i]["keypoints"][:, 2] for i in range(100)])
    assert {0, 1, 2} >= {*marks} and (marks == 2).mean() > 0.8 and (marks == 1).any()
    with pytest.raises(UnknownName, match="figures"):
        TASK.sample("figure")


def test_boxes_hold_the_marked_joints(data):
    for i in range(50):
        s = data.splits["val"][i]
        x, y, w, h = s["box"]
        seen = s["keypoints"][s["keypoints"][:, 2] > 0, :2]
        assert (seen >= [x - 1e-3, y - 1e-3]).all() and (seen <= [x + w + 1e-3, y + h + 1e-3]).all()


# cutting out --------------------------------------------------------------------------------------------------------


def test_a_frame_has_the_aspect_and_the_padding():
    centre, extent = frame(np.array([10, 20, 30, 80]), 0.75, 1.25)
    assert centre.tolist() == [25, 60] and extent.tolist() == [75, 100]


@pytest.mark.parametrize("degrees", [0, 90, 33])
def test_pixels_land_where_their_keypoints_do(degrees):
    image = np.zeros((60, 80, 3), dtype=np.uint8)
    image[28:33, 38:43] = 255
    m = matrix(np.array([44.0, 27.0]), np.array([47.0, 63.0]), (64, 48), degrees)
    out = cut(image, m, (64, 48))[..., 0].astype(float)
    ys, xs = np.mgrid[:64, :48]
    middle = np.array([(xs * out).sum(), (ys * out).sum()]) / out.sum()
    np.testing.assert_allclose(middle, apply(np.array([[40.0, 30.0]]), m)[0], atol=0.06)


def test_mirroring_swaps_sides_and_keeps_joints_on_their_pixels(data):
    sample = data.splits["train"][3]
    plain = Prepare({"size": (64, 48)})(sample, np.random.default_rng(0))
    flipped = Prepare({"size": (64, 48)}, {"hflip": 1.0})(sample, np.random.default_rng(0))
    np.testing.assert_allclose(flipped["image"], plain["image"][..., ::-1], atol=0.03)
    np.testing.assert_allclose(flipped["keypoints"][5], [47 - plain["keypoints"][6][0], plain["keypoints"][6][1]], atol=1e-3)


def test_augmentation_depends_on_its_generator_and_half_bodies_are_larger(data):
    recipe = {"hflip": 0.5, "half_body": 1.0, "rotation": 40, "rescale": 0.5, "shift_box": 0.3}
    prepare = Prepare({"size": (64, 48)}, recipe)
    one, same, other = (prepare(data.splits["train"][0], np.random.default_rng(s)) for s in (1, 1, 2))
    assert (one["image"] == same["image"]).all() and (one["image"] != other["image"]).any()
    half, whole = Prepare({"size": (64, 48)}, {"half_body": 1.0}), Prepare({"size": (64, 48)})
    pairs = [[f(data.splits["train"][i], np.random.default_rng(0))["centre"][1] for f in (half, whole)] for i in range(20)]
    moved = [a - b for a, b in pairs]
    assert min(moved) < -8 and np.mean(np.abs(moved)) > 4  # around the upper or the lower body, no longer around the middle


# scores -------------------------------------------------------------------------------------------------------------


def batch_of(data, count=20):
    prepare = Prepare({"size": (64, 48)})
    return TASK.collate([prepare(data.splits["val"][i], np.random.default_rng(0)) for i in range(count)])


def perfect(batch, shift=0.0):
    true = torch.tensor([t[0]["keypoints"] for t in batch["truth"]]).view(-1, 17, 3)
    return Poses(true[..., :2] + shift, torch.ones(true.shape[:2]), torch.ones(len(true)))


def test_true_poses_score_one_and_shifted_ones_less(data):
    batch = batch_of(data)
    metrics, per_sample = TASK.score([perfect(batch)], [batch])
    assert metrics["AP"] == metrics["AR"] == metrics["pck"] == pytest.approx(1) and len(per_sample["oks"]) == 20
    worse, _ = TASK.score([perfect(batch, 3.0)], [batch])
    assert 0 < worse["oks"] < 0.9 and worse["AP"] < 1
    worst, _ = TASK.score([perfect(batch, 500.0)], [batch])
    assert worst["AP"] == 0 == worst["pck"]


def test_oks_is_its_formula():
    true = np.zeros((1, 17, 3))
    true[0, :2, 2] = 2
    predicted = np.zeros((1, 17, 2))
    predicted[0, 0] = [3, 4]
    wanted = (np.exp(-25 / (2 * 1000 * (2 * 0.026) ** 2)) + 1) / 2
    assert oks(predicted, true, np.array([1000.0]))[0] == pytest.approx(wanted, rel=1e-6)


def test_people_found_twice_are_suppressed(data):
    true = np.array(data.splits["val"][0]["truth"][0]["keypoints"]).reshape(17, 3)[:, :2]
    poses = np.stack([true, true + 0.2, true + 60])
    assert oks_nms(poses, np.array([0.5, 0.9, 0.4]), np.full(3, 5000.0)) == [1, 2]


def test_a_hidden_person_costs_recall():
    truth = {"image_id": 5, "bbox": [0, 0, 50, 90], "area": 4500.0, "iscrowd": 0, "num_keypoints": 17, "keypoints": [10.0, 20.0, 2.0] * 17}
    truths = [{**truth, "id": 1}, {**truth, "id": 2, "keypoints": [300.0, 300.0, 2.0] * 17}]
    found = [{"image_id": 5, "keypoints": truths[0]["keypoints"], "score": 0.9}]
    assert average_precision(truths, found)["AR"] == pytest.approx(0.5)


def test_results_are_written_as_coco_has_them(tmp_path, data):
    batch = batch_of(data, 4)
    files = TASK.write(perfect(batch), batch, tmp_path)
    TASK.write(perfect(batch), batch, tmp_path)  # once more: replaced, not doubled
    results = json.loads((tmp_path / "keypoints.json").read_text())
    assert len(results) == 4 and {*results[0]} == {"image_id", "category_id", "keypoints", "score"} and len(results[0]["keypoints"]) == 51
    assert len(files) == 5 and {*TASK.rows(perfect(batch), batch, JOINTS)[0]["keypoints"]} == {*JOINTS}


def test_the_baseline_is_the_mean_pose(data):
    name, metrics = TASK.baseline(data)
    assert name == "the mean pose in each box" and 0.02 < metrics["AP"] < 0.4


def test_pictures(data):
    batch = batch_of(data, 5)
    picture = TASK.draw(perfect(batch), batch, JOINTS)
    assert picture.height > 200 and len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 100
    assert len(TASK.details([perfect(batch)], [batch], JOINTS)) == 1
    assert all(len(limb) == 2 for limb in LIMBS)
