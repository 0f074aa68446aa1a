import json

import numpy as np
import pytest
import torch

from formarium.errors import BadInput, UnknownName
from formarium.task import task
from formarium.tasks.lidar_detection.clouds import read_cloud
from formarium.tasks.lidar_detection.data import augment, read_labels
from formarium.tasks.lidar_detection.metrics import average_precision, matched
from formarium.tasks.lidar_detection.model import Boxes

TASK = task("lidar-detection")
CLOUD = np.array([[1, 2, 3, 0.5], [4, 5, 6, 0.25], [-1, 0.5, 0, 1]], dtype=np.float32)


def write_folder(root, count=5, features=4, label="txt"):
    rng = np.random.default_rng(0)
    for sub in ("points", "labels"):
        (root / sub).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        rng.uniform(-5, 5, (50, features)).astype("<f4").tofile(root / "points" / f"{i:03}.bin")
        if label == "txt":
            (root / "labels" / f"{i:03}.txt").write_text(f"1 2 0 4 2 1.5 0.{i} car\n-3 1 0 0.7 0.6 1.7 1.5 person\n")
        else:
            document = {"boxes": [[1, 2, 0, 4, 2, 1.5, 0.5]], "labels": ["car"]}
            (root / "labels" / f"{i:03}.json").write_text(json.dumps(document))
    return root


def pcd(path, how):
    head = "# .PCD\nVERSION 0.7\nFIELDS x y z intensity\nSIZE 4 4 4 4\nTYPE F F F F\nCOUNT 1 1 1 1\nWIDTH 3\nHEIGHT 1\nPOINTS 3\n"
    body = CLOUD.tobytes() if how == "binary" else "\n".join(" ".join(map(str, p)) for p in CLOUD.tolist()).encode()
    path.write_bytes(f"{head}DATA {how}\n".encode() + body)


def ply(path, how):
    names = "".join(f"property float {n}\n" for n in ("x", "y", "z", "intensity"))
    body = "\n".join(" ".join(map(str, p)) for p in CLOUD.tolist()).encode()
    if how != "ascii":
        body = CLOUD.astype("<f4" if "little" in how else ">f4").tobytes()
    path.write_bytes(f"ply\nformat {how} 1.0\nelement vertex 3\n{names}element face 0\nend_header\n".encode() + body)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.bin", lambda p: CLOUD.tofile(p)),
        ("a.npy", lambda p: np.save(p, CLOUD.astype(np.float64))),
        ("a.pcd", lambda p: pcd(p, "ascii")),
        ("b.pcd", lambda p: pcd(p, "binary")),
        ("a.ply", lambda p: ply(p, "ascii")),
        ("b.ply", lambda p: ply(p, "binary_little_endian")),
        ("c.ply", lambda p: ply(p, "binary_big_endian")),
        ("a.xyz", lambda p: np.savetxt(p, CLOUD)),
    ],
)
def test_every_format_gives_the_same_points(tmp_path, name, write):
    write(tmp_path / name)
    cloud = read_cloud(tmp_path / name)
    np.testing.assert_allclose(cloud.values, CLOUD)
    assert cloud.columns == ("x", "y", "z", "intensity")


def test_files_that_cannot_be_used_say_so(tmp_path):
    def refused(name, content, match, **options):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(BadInput, match=match) as e:
            read_cloud(path, **options)
        assert "\n" not in str(e.value)

    refused("a.bin", CLOUD.tobytes()[:-4], "float32 points of 4 values")
    refused("b.bin", (CLOUD * np.nan).tobytes(), r"NaN or infinity in 3 of 3 points")
    refused("c.bin", b"", "at least one point")
    refused("d.pcd.bin", CLOUD.tobytes(), "float32 points of 5 values")
    refused("a.npy", b"rubbish", r"\.npy")
    refused("a.pcd", b"FIELDS x y\n", r"\.pcd")
    refused("b.pcd", b"FIELDS x y z\nSIZE 4 4 4\nTYPE F F F\nPOINTS 1\nDATA binary_compressed\n", "DATA ascii or binary")
    refused("a.ply", b"no", r"begin with ply")
    refused("a.las", b"", "a file of points")
    with pytest.raises(BadInput, match="no such file"):
        read_cloud(tmp_path / "none.bin")


def test_a_folder_is_read_and_split(tmp_path):
    data = TASK.read(write_folder(tmp_path / "set"))
    assert [*data.names] == ["car", "person"] and data.model_args == {"num_classes": 2, "point_features": 4}
    assert (len(data.splits["train"]), len(data.splits["val"])) == (4, 1)
    sample = data.splits["train"][0]
    assert sample["points"].shape == (50, 4) and sample["boxes"].shape == (2, 7) and sample["label"].tolist() == [0, 1]
    for split in ("train", "val"):
        write_folder(tmp_path / "given" / split, 2, label="json")
    data = TASK.read(tmp_path / "given")
    assert (len(data.splits["train"]), len(data.splits["val"])) == (2, 2)
    (tmp_path / "set" / "labels" / "000.txt").unlink()
    assert "without labels" in TASK.read(tmp_path / "set").notes[0]


def test_folders_that_cannot_be_used_say_so(tmp_path):
    with pytest.raises(BadInput, match="no such path"):
        TASK.read(tmp_path / "none")
    with pytest.raises(BadInput, match="no file of points"):
        TASK.read(tmp_path)
    root = write_folder(tmp_path / "set")
    label = root / "labels" / "000.txt"
    label.write_text("1 2 0 4 0 1.5 0 car\n")
    with pytest.raises(BadInput, match=r"sizes above zero, got box 0 of 4 x 0 x 1.5 m"):
        TASK.read(root)
    label.write_text("1 2 nan 4 2 1.5 0 car\n")
    with pytest.raises(BadInput, match="NaN"):
        TASK.read(root)
    label.write_text("car somewhere\n")
    with pytest.raises(BadInput, match="KITTI"):
        TASK.read(root)
    label.write_text("1 2 0 4 2 1.5 0 car\n")
    np.zeros((8, 6), "<f4").tofile(root / "points" / "000.bin")
    np.save(root / "points" / "009.npy", np.zeros((8, 6)))
    (root / "labels" / "009.txt").write_text("1 2 0 4 2 1.5 0 car\n")
    data = TASK.read(root)
    whole = [data.splits[s] for s in ("train", "val")]
    with pytest.raises(BadInput, match="points of 4 values, got 6"):
        [split[i] for split in whole for i in range(len(split))]


def test_kitti_boxes_land_where_they_are(tmp_path):
    path, calib = tmp_path / "0.txt", tmp_path / "c.txt"
    path.write_text(
        "Car 0.00 0 -1.57 1 2 3 4 1.50 1.60 4.00 2.00 1.70 10.00 -1.5707963\nDontCare -1 -1 -10 1 2 3 4 -1 -1 -1 -1000 -1000 -1000 -10\n"
    )
    boxes, names = read_labels(path)
    assert names == ["Car"]
    np.testing.assert_allclose(boxes[0], [10, -2, -1.7 + 0.75, 4, 1.6, 1.5, 0], atol=1e-5)
    calib.write_text("R0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: 0 -1 0 0 0 0 -1 -0.08 1 0 0 -0.27\n")
    np.testing.assert_allclose(read_labels(path, calib)[0][0, :3], [10.27, -2, -1.78 + 0.75], atol=1e-5)


def test_what_is_written_is_read_again(tmp_path):
    boxes = torch.tensor([[1.0, 2, 0, 4, 2, 1.5, 0.5], [3.0, 1, 0, 1, 1, 2, 0]])
    prediction = Boxes([boxes], [torch.tensor([0.3, 0.9])], [torch.tensor([0, 1])])
    paths = TASK.write(prediction, {"id": ["a/b.bin"]}, tmp_path, ["car", "person"])
    assert [p.name for p in paths] == ["a_b.json", "a_b.txt"]
    again, names = read_labels(paths[0])
    assert names == ["person", "car"]
    np.testing.assert_allclose(again, boxes.flip(0).numpy(), atol=1e-3)


def test_samples_hold_what_they_say():
    data = TASK.sample("street")
    sample = data.splits["val"][0]
    assert sample["points"].dtype == np.float32 and sample["points"].shape[1] == 4
    again = TASK.sample("street").splits["val"][0]
    assert np.array_equal(sample["points"], again["points"])
    assert not np.array_equal(sample["points"], TASK.sample("street", seed=1).splits["val"][0]["points"])
    for box in sample["boxes"]:  # every box holds points, on its near side
        d = sample["points"][:, :3] - box[:3]
        c, s = np.cos(box[6]), np.sin(box[6])
        local = np.stack([d[:, 0] * c + d[:, 1] * s, d[:, 1] * c - d[:, 0] * s, d[:, 2]], 1)
        inside = (np.abs(local) <= box[3:6] / 2 + 0.1).all(1)
        assert inside.sum() >= 3
    with pytest.raises(UnknownName):
        TASK.sample("roads")


def test_augmentation_moves_points_and_boxes_alike():
    rng = np.random.default_rng(0)
    box = np.array([[3.0, 1, 0, 4, 2, 1.5, 0.4, 1.0, 0.5]], dtype=np.float32)
    c, s = np.cos(0.4), np.sin(0.4)
    front = np.array([[3 + 2 * c, 1 + 2 * s, 0.2, 0.5]], dtype=np.float32)  # the middle of its front
    recipe = {"flip": 0.5, "rotation": 3.0, "scaling": (0.8, 1.2), "translation": 1.0}
    for _ in range(20):
        p, b = augment(front.copy(), box.copy(), recipe, rng)
        ahead = b[0, :2] + b[0, 3] / 2 * np.array([np.cos(b[0, 6]), np.sin(b[0, 6])])
        np.testing.assert_allclose(p[0, :2], ahead, atol=1e-4)
        assert p[0, 3] == 0.5 and -np.pi <= b[0, 6] <= np.pi
        assert np.hypot(*b[0, 7:]) == pytest.approx(np.hypot(1, 0.5) * b[0, 3] / 4, rel=1e-4)


def test_batches_are_padded():
    samples = [
        {"id": str(n), "points": torch.ones(n, 4), "boxes": torch.ones(m, 7), "label": torch.zeros(m).long()} for n, m in ((5, 1), (3, 2))
    ]
    batch = TASK.collate(samples)
    assert batch["points"].shape == (2, 5, 4) and batch["count"].tolist() == [5, 3] and batch["label"].tolist() == [[0, -1], [0, 0]]
    with pytest.raises(BadInput, match="one number of values"):
        TASK.collate([samples[0], {**samples[1], "points": torch.ones(3, 5)}])


def test_average_precision_of_known_lists():
    assert average_precision(np.array([0.9, 0.8]), np.array([True, True]), 2) == 1
    assert average_precision(np.array([0.9, 0.8]), np.array([False, True]), 1) == 0.5
    assert average_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]), 2) == pytest.approx(0.5 + 0.5 * 2 / 3)
    assert matched(np.array([[0.6, 0.0], [0.9, 0.55]]), np.array([0.9, 0.5]), 0.5).tolist() == [0, 1]
    assert matched(np.array([[0.6], [0.9]]), np.array([0.5, 0.9]), 0.5).tolist() == [-1, 0]


def test_scores_of_perfect_and_empty_predictions():
    data = TASK.sample("street")
    prepare, rng = TASK.transform({}), np.random.default_rng(0)
    batch = TASK.collate([prepare(data.splits["val"][i], rng) for i in range(3)])
    real = [batch["boxes"][i][batch["label"][i] >= 0] for i in range(3)]
    labels = [batch["label"][i][batch["label"][i] >= 0] for i in range(3)]
    perfect = Boxes(real, [torch.ones(len(r)) for r in real], labels)
    metrics, each = TASK.score([perfect], [batch])
    assert metrics["bev_ap"] == metrics["ap_3d"] == metrics["f1"] == 1 and metrics["yaw_error"] < 1e-3 and each["f1"].shape == (3,)
    nothing = Boxes([r[:0] for r in real], [r[:0, 0] for r in real], [n[:0] for n in labels])
    assert TASK.score([nothing], [batch])[0]["bev_ap"] == 0
    picture = TASK.draw(perfect, batch, data.names)
    assert picture.size[0] > 900 and len(np.unique(np.asarray(picture).reshape(-1, 3), axis=0)) > 10
    assert TASK.draw(nothing, batch, data.names).size == picture.size
    assert TASK.rows(perfect, batch, data.names)[0]["boxes"][0]["label"] in data.names
    assert [*TASK.details([perfect], [batch], data.names)]


def test_what_is_in_memory_is_taken_or_refused():
    assert TASK.is_single(CLOUD) and not TASK.is_single([CLOUD])
    assert TASK.from_memory(torch.from_numpy(CLOUD), 0)["points"].shape == (3, 4)
    for bad, match in [(CLOUD[:, :2], "3 or more"), (CLOUD * np.nan, "NaN"), ({"x": 1}, "dict with points")]:
        with pytest.raises(BadInput, match=match):
            TASK.from_memory(bad, 0)
    with pytest.raises(BadInput, match="sizes above zero"):
        TASK.transform({})({"points": CLOUD, "boxes": np.zeros((1, 7)), "label": [0]}, np.random.default_rng(0))


def test_the_rival_is_really_computed():
    from formarium.task import Data
    from formarium.tasks.lidar_detection.sample import Street

    small = Data("street", "lidar-detection", {"train": Street(0, 0, 10), "val": Street(0, 160, 4)}, {}, ("car", "pedestrian"))
    name, metrics = TASK.baseline(small)
    assert "clusters" in name and 0 < metrics["bev_ap"] < 0.9
