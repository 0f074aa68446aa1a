import json

import numpy as np
import pytest
import torch

from formarium.errors import BadInput, UnknownName
from formarium.task import Data, task
from formarium.tasks.point_cloud_registration.data import check_motion, estimate_normals, read_motion, thin
from formarium.tasks.point_cloud_registration.metrics import icp, rotation_error
from formarium.tasks.point_cloud_registration.model import Registered
from formarium.tasks.point_cloud_registration.sample import Bumps, rotation

TASK = task("point-cloud-registration")


def motion(seed=0):
    rng = np.random.default_rng(seed)
    m = np.eye(4)
    m[:3, :3], m[:3, 3] = rotation(rng), rng.standard_normal(3)
    return m


def batch_of(count=3):
    data, prepare, rng = TASK.sample("bumps"), TASK.transform({}), np.random.default_rng(0)
    return TASK.collate([prepare(data.splits["val"][i], rng) for i in range(count)])


def write_pair(folder, form=".npy", normals=True):
    folder.mkdir(parents=True, exist_ok=True)
    pair = TASK.sample("bumps").splits["train"][0]
    for side in ("source", "target"):
        values = np.concatenate([pair[side], pair[f"{side}_normals"]], 1) if normals else pair[side]
        if form == ".npy":
            np.save(folder / f"{side}.npy", values)
        elif form == ".ply":
            names = ("x", "y", "z", "nx", "ny", "nz")[: values.shape[1]]
            head = "".join(f"property float {n}\n" for n in names)
            text = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(values)}\n{head}end_header\n"
            (folder / f"{side}.ply").write_bytes(text.encode() + values.astype("<f4").tobytes())
        else:
            np.savetxt(folder / f"{side}.xyz", values)
    np.savetxt(folder / "transform.txt", pair["transform"])
    return pair


@pytest.mark.parametrize("form", [".npy", ".ply", ".xyz"])
def test_folders_of_pairs_are_read(tmp_path, form):
    for i in range(5):
        pair = write_pair(tmp_path / f"pair{i}", form)
    if form == ".npy":  # these columns have other names: normals come by position in text files only
        np.save(tmp_path / "pair0" / "source.npy", pair["source"])
    data = TASK.read(tmp_path)
    assert (len(data.splits["train"]), len(data.splits["val"])) == (4, 1)
    sample = data.splits["train"][0]
    np.testing.assert_allclose(sample["target"], pair["target"], atol=1e-5)
    np.testing.assert_allclose(sample["transform"], pair["transform"], atol=1e-5)
    if form != ".npy":
        np.testing.assert_allclose(sample["target_normals"], pair["target_normals"], atol=1e-4)
    assert np.linalg.norm(sample["source_normals"], axis=1) == pytest.approx(1, abs=1e-5)


def test_pairs_side_by_side_and_lists_and_splits(tmp_path):
    pair = write_pair(tmp_path / "a" / "one", ".xyz")
    for i in range(2):
        for side in ("src", "tgt"):
            np.save(tmp_path / f"{i}_{side}.npy", pair["source" if side == "src" else "target"])
        (tmp_path / f"{i}.json").write_text(json.dumps({"transform": pair["transform"].tolist()}))
    assert len(TASK.read(tmp_path).splits["val"]) == 1
    entries = [{"source": "0_src.npy", "target": "0_tgt.npy", "transform": pair["transform"].tolist(), "id": "x"}] * 3
    (tmp_path / "pairs.json").write_text(json.dumps(entries))
    assert TASK.read(tmp_path).splits["val"][0]["id"] == "x"
    for split in ("train", "val"):
        for i in range(2):
            write_pair(tmp_path / "given" / split / f"p{i}", ".xyz")
    data = TASK.read(tmp_path / "given")
    assert (len(data.splits["train"]), len(data.splits["val"])) == (2, 2)


def test_what_cannot_be_used_says_so(tmp_path):
    def refused(match, call):
        with pytest.raises(BadInput, match=match) as e:
            call()
        assert "\n" not in str(e.value)

    refused("no such path", lambda: TASK.read(tmp_path / "none"))
    refused("0 files of points, no pair", lambda: TASK.read(tmp_path))
    write_pair(tmp_path / "one", ".xyz")
    refused("at least two pairs", lambda: TASK.read(tmp_path))
    write_pair(tmp_path / "two", ".xyz")
    (tmp_path / "two" / "transform.txt").write_text("1 2 3")
    refused("4x4 numbers", lambda: TASK.read(tmp_path))
    np.savetxt(tmp_path / "two" / "transform.txt", 2 * np.eye(4))
    refused("scales, mirrors", lambda: TASK.read(tmp_path))
    (tmp_path / "two" / "transform.txt").unlink()
    refused("two: expected a motion", lambda: TASK.read(tmp_path))
    (tmp_path / "pairs.json").write_text('[{"source": 1}]')
    refused("pairs.json", lambda: TASK.read(tmp_path))
    refused("two by two", lambda: TASK.inputs([tmp_path / "one" / "source.xyz"]))
    refused("got none", lambda: TASK.inputs([]))
    refused("NaN", lambda: TASK.from_memory((np.full((30, 3), np.nan), np.zeros((30, 3))), 0))
    refused("at least 20 points", lambda: TASK.from_memory((np.zeros((5, 3)), np.zeros((30, 3))), 0))
    refused("target: expected points", lambda: TASK.from_memory({"source": np.random.rand(30, 3)}, 0))
    refused("aren't zero", lambda: TASK.from_memory((np.zeros((30, 6)), np.zeros((30, 3))), 0))
    refused("with NaN", lambda: TASK.transform({})({"source": np.full((9, 3), np.nan)}, np.random.default_rng(0)))
    with pytest.raises(UnknownName):
        TASK.sample("hills")


def test_inputs_come_two_by_two_or_as_folders(tmp_path):
    pair = write_pair(tmp_path / "one", ".xyz")
    found = TASK.inputs([tmp_path / "one" / "source.xyz", tmp_path / "one" / "target.xyz"])
    assert len(found) == 1 and "transform" not in found[0]
    assert len(TASK.inputs([tmp_path])) == len(TASK.inputs([tmp_path / "one"])) == 1
    sample = TASK.from_memory((torch.from_numpy(pair["source"]), pair["target"]), 3)
    assert sample["id"] == "input 3" and sample["source_normals"].shape == pair["source"].shape
    assert TASK.is_single((pair["source"], pair["target"])) and not TASK.is_single([(pair["source"], pair["target"])])


def test_normals_of_a_plane_and_a_sphere():
    rng = np.random.default_rng(0)
    plane = np.concatenate([rng.uniform(-1, 1, (300, 2)), np.full((300, 1), 2.0)], 1)
    np.testing.assert_allclose(estimate_normals(plane), np.tile([0, 0, -1], (300, 1)), atol=1e-5)  # towards the origin
    ball = rng.standard_normal((3000, 3))
    ball /= np.linalg.norm(ball, axis=1, keepdims=True)
    assert ((estimate_normals(ball) * -ball).sum(1) > 0.95).mean() > 0.99


def test_thinning():
    points = np.random.default_rng(0).uniform(0, 1, (2000, 3)).astype(np.float32)
    normals = np.tile(np.array([0, 0, 1], dtype=np.float32), (2000, 1))
    thinned, kept = thin(points, normals, 0.25, 0, np.random.default_rng(0))
    assert len(thinned) <= 125 and np.linalg.norm(kept, axis=1) == pytest.approx(1)
    assert len(thin(points, normals, 0.0, 100, np.random.default_rng(0))[0]) == 100


def test_samples_and_augmentation_keep_the_truth():
    sample = TASK.sample("bumps").splits["val"][0]
    for recipe in (None, {"noise": 0.0, "rotation": 1}):
        out = TASK.transform({}, recipe)(sample, np.random.default_rng(5))
        m = out["transform"]
        moved = out["source"] @ m[:3, :3].T + m[:3, 3]
        distance, near = torch.cdist(moved, out["target"]).min(1)
        close = distance < 0.05
        assert 0.4 < close.float().mean() <= 1
        agree = ((out["source_normals"] @ m[:3, :3].T) * out["target_normals"][near]).sum(1)
        assert agree[close].median() > 0.9
    again = TASK.sample("bumps").splits["val"][0]
    assert np.array_equal(sample["source"], again["source"])
    assert rotation_error(torch.from_numpy(sample["transform"])[:3, :3], torch.eye(3)) > 5


def test_scores_of_right_and_wrong_motions():
    batch = batch_of()
    source = [batch["source"][i, : int(batch["source_count"][i])] for i in range(3)]
    truth = batch["transform"]
    target = [s @ m[:3, :3].T + m[:3, 3] for s, m in zip(source, truth, strict=True)]
    ones = [torch.ones(len(s)) for s in source]
    metrics, each = TASK.score([Registered(truth, source, target, ones)], [batch])
    assert metrics["registration_recall"] == metrics["inlier_ratio"] == metrics["feature_matching_recall"] == 1
    assert metrics["rre"] < 0.01 and metrics["rte"] < 1e-4 and each["rre"].shape == (3,)
    off = truth.clone()
    off[:, 0, 3] += 0.5
    wrong = [t + torch.tensor([0.2, 0, 0]) * (torch.arange(len(t)) % 4 > 0)[:, None] for t in target]
    metrics = TASK.score([Registered(off, source, wrong, ones)], [batch])[0]
    assert metrics["registration_recall"] == 0 and metrics["rte"] == pytest.approx(0.5, abs=1e-4)
    assert metrics["inlier_ratio"] == pytest.approx(0.25, abs=0.01) and metrics["feature_matching_recall"] == 1
    empty = [s[:0] for s in source]
    metrics = TASK.score([Registered(truth, empty, empty, [o[:0] for o in ones])], [batch])[0]
    assert metrics["inlier_ratio"] == 0 and metrics["matches"] == 0


@pytest.mark.parametrize("degrees", [0.01, 1.0, 90.0, 179.0])
def test_rotation_error(degrees):
    a = torch.tensor(degrees).deg2rad()
    turn = torch.tensor([[a.cos(), -a.sin(), 0], [a.sin(), a.cos(), 0], [0, 0, 1]])
    base = torch.from_numpy(motion()[:3, :3]).float()
    assert rotation_error(base @ turn, base).item() == pytest.approx(degrees, rel=1e-2)


def test_writing_and_drawing(tmp_path):
    batch = batch_of(2)
    source = [batch["source"][i, :60] for i in range(2)]
    prediction = Registered(batch["transform"], source, source, [torch.ones(60)] * 2)
    paths = TASK.write(prediction, batch, tmp_path)
    assert len(paths) == 6
    np.testing.assert_allclose(read_motion(paths[0]), batch["transform"][0].numpy(), atol=1e-6)
    np.testing.assert_allclose(read_motion(paths[1]), batch["transform"][0].numpy(), atol=1e-5)
    assert np.load(paths[2])["source"].shape == (60, 3)
    picture = np.asarray(TASK.draw(prediction, batch))
    assert picture.shape[1] > 900 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 5
    empty = Registered(batch["transform"], [s[:0] for s in source], [s[:0] for s in source], [torch.ones(0)] * 2)
    assert TASK.draw(empty, batch).size[0] == picture.shape[1]
    assert TASK.rows(empty, batch, ())[0]["correspondences"] == 0
    assert [*TASK.details([prediction], [batch], ())]


def test_motions_may_be_three_rows():
    m = motion()
    np.testing.assert_allclose(check_motion(m[:3], "m"), m, atol=1e-6)


def test_the_rival_registers_what_is_nearly_in_place_and_not_what_is_turned():
    target = torch.from_numpy(TASK.sample("bumps").splits["val"][0]["target"])
    angle = torch.tensor(0.15)
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0], [0, 0, 1]])
    found, near = icp((target - 0.1) @ turn, target)
    torch.testing.assert_close(found[:3, :3], turn, atol=1e-3, rtol=0)
    assert torch.equal(near, torch.arange(len(target)))
    far = Data("far", TASK.name, {"val": Bumps(0, 0, 4)})
    name, metrics = TASK.baseline(far)
    assert "ICP" in name and metrics["registration_recall"] < 0.5
