"""What lidar detection's training adds to a sweep: pasted objects, earlier sweeps; and when it stops."""

import numpy as np
import pytest
import torch

from formarium.engine.loader import Order, Prepared, training_batches
from formarium.errors import BadInput
from formarium.nn.ops.boxes import iou_bev
from formarium.task import Data, task
from formarium.tasks.lidar_detection.data import Prepare, prepare_training
from formarium.tasks.lidar_detection.frames import earlier, join_frames
from formarium.tasks.lidar_detection.paste import Objects, by_class, collect, inside, paste
from formarium.tasks.lidar_detection.sample import Street, scene

TASK = task("lidar-detection")
NAMES = ("car", "pedestrian")


def street(scenes: int = 6) -> Data:
    return Data("street", "lidar-detection", {"train": Street(0, 0, scenes), "val": Street(0, 160, 2)}, {}, NAMES)


def made(boxes, label, each=3) -> Objects:
    """Objects with `each` points on a vertical line through their centre, of intensity 9."""
    boxes = np.array(boxes, dtype=np.float32)
    clouds = [np.stack([np.r_[b[:2], b[2] + dz, 9] for dz in np.linspace(-0.3, 0.3, each)]).astype(np.float32) for b in boxes]
    return Objects(np.concatenate(clouds), np.arange(0, each * len(boxes) + 1, each), boxes, np.array(label))


# pasted objects -------------------------------------------------------------------------------------------------------


def test_points_in_turned_boxes():
    box = np.array([[1.0, 2.0, 0.0, 4.0, 2.0, 1.0, np.pi / 2]])  # four metres along y
    points = np.array([[1, 3.9, 0.4], [1, 4.1, 0], [1.9, 2, 0], [2.1, 2, 0], [1, 2, 0.6], [-9, 2, 0]], dtype=np.float32)
    assert inside(points, box)[:, 0].tolist() == [True, False, True, False, False, False]
    assert inside(points, np.zeros((0, 7))).shape == (6, 0)


def test_the_objects_are_those_of_the_training_sweeps_with_enough_points():
    data = street()
    few, many = (collect(data.splits["train"], [least, least]) for least in (1, 20))
    assert len(many) < len(few) <= sum(len(data.splits["train"][i]["label"]) for i in range(6))
    for i in range(len(many)):
        own = many.of(i)
        assert len(own) >= 20 and inside(own, many.boxes[i : i + 1]).all()
    counted = collect(data.splits["train"], [20, 5])
    assert min(len(counted.of(i)) for i in np.flatnonzero(counted.label == 1)) < 20
    with pytest.raises(BadInput, match="objects with points"):
        collect(data.splits["train"], [10**6, 10**6])


def test_pasted_objects_bring_their_points_and_push_out_those_in_their_place():
    objects = made([[10, 0, 0, 4, 2, 1.5, 0.3]], [0])
    points = np.array([[10, 0, 0.2, 1], [0, 0, 0, 1]], dtype=np.float32)
    box = np.array([[0, 0, 0, 1, 1, 1, 0]], dtype=np.float32)
    p, b, label = paste(points, box, np.array([1]), objects, [3, 0], np.random.default_rng(0))
    assert b.shape == (2, 7) and label.tolist() == [1, 0]
    assert len(p) == 4 and (p[:, 3] == 9).sum() == 3 and (p[p[:, 3] == 1][:, 0] == 0).all()
    np.testing.assert_allclose(p[p[:, 3] == 9], objects.of(0))


def test_what_collides_is_left_out():
    rng = np.random.default_rng(0)
    there = np.array([[0, 0, 0, 4, 2, 1.5, 0]], dtype=np.float32)
    points, label = np.zeros((1, 4), dtype=np.float32) + 50, np.array([0])
    # turned by 45 degrees this box's bounds overlap the other's, the box itself doesn't
    clear, touching = [[3.0, 2.0, 0, 4, 0.5, 1, -np.pi / 4]], [[2.2, 1.0, 0, 4, 0.5, 1, -np.pi / 4]]
    assert len(paste(points, there, label, made(clear, [1]), [0, 1], rng)[1]) == 2
    assert len(paste(points, there, label, made(touching, [1]), [0, 1], rng)[1]) == 1
    twins = made([[20, 0, 0, 4, 2, 1, 0], [21, 0, 0, 4, 2, 1, 0]], [1, 1])
    assert len(paste(points, there, label, twins, [0, 2], rng)[1]) == 1  # both of a pair that overlaps
    assert len(paste(points, there, label, twins, [0, 1], rng)[1]) == 2
    across = made([[20, 0, 0, 4, 2, 1, 0], [21, 0, 0, 4, 2, 1, 0]], [0, 1])
    assert paste(points, there, label, across, [2, 1], rng)[2].tolist() == [0, 0]  # the first class was there first


def test_sweeps_are_filled_up_to_the_number_that_is_wanted():
    data = street(40)
    objects, rng = collect(data.splits["train"], [5, 5]), np.random.default_rng(0)
    seen = []
    for i in range(12):
        s = data.splits["train"][i]
        _, boxes, label = paste(s["points"], s["boxes"], s["label"], objects, [7, 9], rng)
        n = [int((label == c).sum()) for c in (0, 1)]
        own = [int((s["label"] == c).sum()) for c in (0, 1)]
        assert own[0] <= n[0] <= max(7, own[0]) and own[1] <= n[1] <= max(9, own[1])
        overlap = iou_bev(torch.from_numpy(boxes), torch.from_numpy(boxes)).fill_diagonal_(0)
        assert overlap[:, len(s["boxes"]) :].max() == 0
        seen.append(n[1] - own[1])
    assert np.mean(seen) > 2
    full = paste(s["points"], s["boxes"], s["label"], objects, [0, 0], rng)
    assert full[0] is s["points"] and full[1] is s["boxes"]


def test_numbers_go_by_the_names_of_classes():
    assert by_class(4, NAMES, "paste") == [4, 4]
    assert by_class({"Car": 15, "Pedestrian": 10}, NAMES, "paste") == [15, 10]
    assert by_class({"Car": 15, "other": 2}, NAMES, "paste") == [15, 2]
    for bad, match in (({"car": 3}, "a number for pedestrian"), (1.5, "whole numbers"), (-1, "at least 0"), ("many", "whole")):
        with pytest.raises(BadInput, match=match):
            by_class(bad, NAMES, "paste")


def test_pasting_ends_and_then_all_augmentation():
    data = street()
    recipe = {"flip": 0.5, "rotation": 0.7, "scaling": (0.9, 1.1), "paste": 12, "unpasted_epochs": 4, "plain_epochs": 1}
    transform = prepare_training(recipe, data, 10)
    sample = data.splits["train"][0]

    def seen(epoch):
        out = transform.at(epoch)(sample, np.random.default_rng(epoch))
        return len(out["label"]) > len(sample["label"]), not np.array_equal(out["points"].numpy(), sample["points"])

    assert [seen(e) for e in range(10)] == [(True, True)] * 6 + [(False, True)] * 3 + [(False, False)]
    only = prepare_training({"paste": 12}, data, 2.5)
    assert all(only.at(e) is only for e in range(3))
    kept = prepare_training({"flip": 0.5, "plain_epochs": 3}, data, 5)
    assert [kept.at(e) is kept for e in range(5)] == [True, True, False, False, False]


def test_batches_of_a_training_follow_the_epochs():
    data = street(4)
    transform = TASK.training_transform({}, {"paste": 12, "paste_points": 1, "unpasted_epochs": 1}, data, 2)
    order = Order(4, 2, seed=0)
    prepared = Prepared(data.splits["train"], transform, 0)
    counts = [int((b["label"] >= 0).sum()) for b in training_batches(prepared, order, range(4), TASK.collate)]
    own = sum(len(data.splits["train"][i]["label"]) for i in range(4))
    assert counts[2] + counts[3] == own < counts[0] + counts[1]
    again = [int((b["label"] >= 0).sum()) for b in training_batches(prepared, order, range(4), TASK.collate)]
    assert again == counts


def test_boxes_without_points_are_left_out_of_training_only():
    sample = {"points": np.zeros((3, 4)), "boxes": np.array([[0, 0, 0, 1, 1, 1, 0], [9, 0, 0, 1, 1, 1, 0.0]]), "label": [0, 1], "id": "a"}
    rng = np.random.default_rng(0)
    assert Prepare({"min_points": 1})(sample, rng)["label"].tolist() == [0]
    assert Prepare({"min_points": 4})(sample, rng)["boxes"].shape == (0, 7)
    assert Prepare()(sample, rng)["label"].tolist() == [0, 1]


# several sweeps -------------------------------------------------------------------------------------------------------


def test_earlier_sweeps_land_where_they_are_now():
    now, then = np.eye(4), np.eye(4)
    now[:2, 3], then[:2, 3] = [5, 0], [3, 1]  # the sensor moved two metres ahead and one to the right
    turn = np.pi / 2
    then[:2, :2] = [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    wall = np.array([[20.0, 4, 1, 0.5]], dtype=np.float32)  # in the world
    seen = [np.concatenate([(np.linalg.inv(p) @ [20, 4, 1, 1])[:3], [0.5]])[None].astype(np.float32) for p in (now, then)]
    joined = join_frames(seen, [now, then], [0.0, 0.1])
    np.testing.assert_allclose(joined[0, :4], [15, 4, 1, 0.5], atol=1e-5)
    np.testing.assert_allclose(joined[1, :3], joined[0, :3], atol=1e-5)
    np.testing.assert_allclose(joined[:, 4], [0, 0.1])
    still = join_frames([wall, np.array([[0.5, 0.5, 0, 0], [0.5, 2, 0, 0]], dtype=np.float32)], None, [0, 0.1])
    assert still[:, 1].tolist() == [4, 2]  # of earlier sweeps nothing within a metre of the sensor


def test_what_comes_before_a_sweep_is_of_its_own_sequence():
    assert earlier(["a_1", "a_2", "a_10", "b_1"], 2) == [[0, 0], [0, 0], [1, 0], [3, 3]]


def write(root, poses="", times="", count=6):
    (root / "points").mkdir(parents=True)
    (root / "labels").mkdir()
    for i in range(count):
        np.array([[10 + i, 5, 0, 0.5], [20, 5, 0, i]], dtype="<f4").tofile(root / "points" / f"{i:03}.bin")
        if i:  # the first has no labels: still it comes before the second
            (root / "labels" / f"{i:03}.txt").write_text("10 5 0 4 2 1.5 0 car\n")
    for name, text in (("poses", poses), ("times", times)):
        if text:
            (root / f"{name}.txt").write_text(text)
    return root


def test_a_folder_is_read_with_earlier_sweeps(tmp_path):
    lines = "\n".join(f"1 0 0 {2 * i} 0 1 0 0 0 0 1 0" for i in range(6))  # two metres ahead each time
    root = write(tmp_path / "set", lines, "0\n0.1\n0.25\n0.4\n0.5\n0.6\n")
    data = TASK.read(root, frames=3)
    assert data.model_args == {"num_classes": 1, "point_features": 5, "frames": 3} and data.source["options"]["frames"] == 3
    train, val = data.splits["train"], data.splits["val"]
    assert [train[i]["id"] for i in range(4)] == [f"points/00{i}.bin" for i in (1, 2, 3, 4)]
    assert val[0]["id"] == "points/005.bin"
    points = train[1]["points"]  # sweeps 2, 1 and 0
    np.testing.assert_allclose(points[:, 0], [12, 20, 9, 18, 6, 16])
    np.testing.assert_allclose(points[:, 4], [0, 0, 0.15, 0.15, 0.25, 0.25], atol=1e-6)
    first = train[0]["points"]  # sweeps 1, 0 and 0 again
    np.testing.assert_allclose(first[:, 4], [0, 0, 0.1, 0.1, 0.1, 0.1], atol=1e-6)
    plain = TASK.read(write(tmp_path / "plain"), frames=2)
    assert "stand still" in plain.notes[-1]
    np.testing.assert_allclose(plain.splits["train"][0]["points"][:, 4], [0, 0, 0.1, 0.1], atol=1e-6)


def test_poses_and_times_that_cannot_be_used_say_so(tmp_path):
    for i, (poses, times, match) in enumerate(
        [
            ("1 0 0 0 0 1 0 0 0 0 1 0\n", "", "a line for each of 6 sweeps, got 1"),
            ("1 0 0\n" * 6, "", "12 or 16 numbers"),
            ("2 0 0 0 0 1 0 0 0 0 1 0\n" * 6, "", "a rotation and a shift"),
            ("one 0 0 0 0 1 0 0 0 0 1 0\n" * 6, "", "numbers"),
            ("", "0\n0.1\n", "a time for each of 6"),
            ("", "0\nnan\n0\n0\n0\n0\n", "finite"),
        ]
    ):
        with pytest.raises(BadInput, match=match):
            TASK.read(write(tmp_path / str(i), poses, times), frames=2)
    with pytest.raises(BadInput, match="1 or more"):
        TASK.read(tmp_path / "0", frames=0)


def test_the_moving_street_moves():
    data = TASK.sample("moving-street")
    sample = data.splits["train"][0]
    assert sample["points"].shape[1] == 5 and sample["boxes"].shape[1] == 9 and data.model_args["frames"] == 4
    np.testing.assert_allclose(np.unique(sample["points"][:, 4]), [0, 0.1, 0.2, 0.3], atol=1e-6)
    latest, boxes, label = scene(0, 0)
    now = sample["points"][sample["points"][:, 4] == 0]
    np.testing.assert_array_equal(now[:, :4], latest)
    np.testing.assert_array_equal(sample["boxes"][:, :7], boxes)
    ahead = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1)
    speed = (sample["boxes"][:, 7:] * ahead).sum(1)
    assert ((speed[label == 1] >= 0.8) & (speed[label == 1] <= 1.8)).all() and speed[label == 0].max() > 4
    there = here = 0  # what moves was behind: its earlier points lie where its box was
    for i in range(5):
        sample = data.splits["train"][i]
        old = sample["points"][np.isclose(sample["points"][:, 4], 0.3)]
        fast = sample["boxes"][np.hypot(*sample["boxes"][:, 7:].T) > 4]
        behind = fast[:, :7] + 0.1 * np.array([0, 0, 0, 1, 1, 1, 0])
        behind[:, :2] -= 0.3 * fast[:, 7:]
        there, here = there + inside(old, behind).sum(), here + inside(old, fast).sum()
    assert there > 1.5 * here
