import numpy as np
import pytest
import torch
from PIL import Image

from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks.motion_generation import bvh, skeleton
from formarium.tasks.motion_generation.data import Prepare, as_features, collate
from formarium.tasks.motion_generation.metrics import descriptor, frechet, joint_error
from formarium.tasks.motion_generation.model import Motions
from formarium.tasks.motion_generation.sample import CAPTIONS, act, motions
from formarium.tasks.motion_generation.text import word_vectors

TASK = task_of("motion-generation")
RNG = np.random.default_rng(0)


def joints_of(action="walk", frames=33, seed=0):
    return act(action, frames, np.random.default_rng(seed))


# the skeleton -------------------------------------------------------------------------------------------------------


def test_quaternions_turn_as_matrices_do():
    from scipy.spatial.transform import Rotation

    q = RNG.standard_normal((5, 4))
    q /= np.linalg.norm(q, axis=1, keepdims=True)
    r, v = Rotation.from_quat(q[:, [1, 2, 3, 0]]), RNG.standard_normal((5, 3))
    np.testing.assert_allclose(skeleton.rotate(q, v), r.apply(v), atol=1e-12)
    np.testing.assert_allclose(skeleton.matrices(q), r.as_matrix(), atol=1e-12)
    p = q[::-1]
    both = Rotation.from_quat(p[:, [1, 2, 3, 0]]) * r
    np.testing.assert_allclose(skeleton.rotate(skeleton.multiply(p, q), v), both.apply(v), atol=1e-12)
    u = RNG.standard_normal((5, 3))
    u, v = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (u, v))
    np.testing.assert_allclose(skeleton.rotate(skeleton.between(u, v), u), v, atol=1e-12)
    np.testing.assert_allclose(
        skeleton.rotate(skeleton.between(np.array([1.0, 0, 0]), np.array([-1.0, 0, 0])), np.array([1.0, 0, 0])), [-1, 0, 0]
    )


@pytest.mark.parametrize("action", CAPTIONS)
def test_features_and_joints_are_one_motion(action):
    joints = joints_of(action)
    features = skeleton.to_features(joints)
    again = skeleton.to_joints(features)
    assert features.shape == (32, 263) and again.shape == (32, 22, 3) and again[0, 0, [0, 2]].tolist() == [0, 0]
    far = lambda j: np.linalg.norm(j[:, :, None] - j[:, None], axis=-1)  # noqa: E731
    np.testing.assert_allclose(far(again), far(joints[:-1]), atol=1e-5)  # the same poses
    np.testing.assert_allclose(np.diff(again[:, 0, 1]), np.diff(joints[:-1, 0, 1]), atol=1e-5)
    step = lambda j: np.linalg.norm(np.diff(j[:, 0, [0, 2]], axis=0), axis=1)  # noqa: E731
    np.testing.assert_allclose(step(again), step(joints[:-1]), atol=1e-5)


def test_features_do_not_depend_on_where_a_motion_starts_or_faces():
    joints = joints_of("run")
    turn = np.array([np.cos(0.6), 0, np.sin(0.6), 0])
    moved = skeleton.rotate(turn, joints) + np.array([3.0, 0, -2])
    np.testing.assert_allclose(skeleton.to_features(moved), skeleton.to_features(joints), atol=1e-5)


def test_the_parts_of_the_features():
    features = skeleton.to_features(joints_of("turn left", 41))
    assert features[:, 0].mean() < -0.01 < 0.01 < skeleton.to_features(joints_of("turn right", 41))[:, 0].mean()  # what turns it back
    six = features[:, 67:193].reshape(40, 21, 2, 3)
    np.testing.assert_allclose(np.linalg.norm(six, axis=-1), 1, atol=1e-5)  # two columns of a rotation
    np.testing.assert_allclose((six[..., 0, :] * six[..., 1, :]).sum(-1), 0, atol=1e-5)
    assert {*np.unique(features[:, 259:])} <= {0.0, 1.0} and skeleton.to_features(joints_of("wave"))[:, 259:].all()
    assert skeleton.to_features(joints_of("walk"))[:, 2].mean() > 0.03  # metres a frame, forward


def test_bones_keep_their_length():
    joints = joints_of("squat")
    for child in range(1, 22):
        length = np.linalg.norm(joints[:, child] - joints[:, skeleton.PARENTS[child]], axis=1)
        np.testing.assert_allclose(length, skeleton.BONES[child], atol=1e-9)


# files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action", ["run", "turn left", "wave"])
def test_bvh_holds_the_motion(tmp_path, action):
    joints = joints_of(action)
    names, positions, fps = bvh.read_bvh(bvh.write_bvh(tmp_path / "a.bvh", joints))
    assert names[0] == "pelvis" and fps == pytest.approx(20, rel=1e-3) and len(names) == 22 + 5
    np.testing.assert_allclose(bvh.joints_of(names, positions), joints, atol=1e-4)


def test_a_bvh_of_another_skeleton_is_read_but_not_taken_for_ours(tmp_path):
    text = (
        "HIERARCHY\nROOT hip\n{\n OFFSET 0 0 0\n CHANNELS 6 Xposition Yposition Zposition Zrotation Xrotation Yrotation\n JOINT knee\n {\n"
        "  OFFSET 0 -4 0\n  CHANNELS 3 Zrotation Xrotation Yrotation\n  End Site\n  {\n   OFFSET 0 -3 0\n  }\n }\n}\n"
        "MOTION\nFrames: 2\nFrame Time: 0.05\n1 2 3 0 0 0 0 0 0\n1 2 3 90 0 0 0 0 0\n"
    )
    path = tmp_path / "b.bvh"
    path.write_text(text)
    names, positions, _ = bvh.read_bvh(path)
    assert names == ["hip", "knee", "knee end"]
    np.testing.assert_allclose(positions[0], [[1, 2, 3], [1, -2, 3], [1, -5, 3]], atol=1e-9)
    np.testing.assert_allclose(positions[1], [[1, 2, 3], [5, 2, 3], [8, 2, 3]], atol=1e-9)  # a quarter turn about z
    with pytest.raises(BadInput, match="22 joints"):
        bvh.joints_of(names, positions)
    path.write_text(text[:-12])
    with pytest.raises(BadInput, match="whole BVH"):
        bvh.read_bvh(path)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "new_joint_vecs").mkdir()
    (tmp_path / "texts").mkdir()
    for i, m in enumerate(motions(np.random.default_rng(1), 6)):
        np.save(tmp_path / "new_joint_vecs" / f"{i:06}.npy", m["motion"])
        lines = [f"{m['caption']}#a/DET#0.0#0.0", f"the start of it, {m['group']}#a/DET#0.2#1.0"]
        (tmp_path / "texts" / f"{i:06}.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_a_humanml3d_folder(folder):
    data = TASK.read(folder)
    assert {k: len(v) for k, v in data.splits.items()} == {"train": 10, "val": 2}
    whole, part = data.splits["train"][0], data.splits["train"][1]
    assert part["caption"].startswith("the start") and len(part["motion"]) == 16 and "#" not in whole["caption"]
    np.testing.assert_array_equal(part["motion"], whole["motion"][4:20])
    (folder / "train.txt").write_text("000000\n000001\n000004\n")
    (folder / "val.txt").write_text("000002\n")
    assert {k: len(v) for k, v in TASK.read(folder).splits.items()} == {"train": 6, "val": 2}


def test_what_cannot_be_used_is_left_out_and_said(folder):
    (folder / "texts" / "000003.txt").unlink()
    np.save(folder / "new_joint_vecs" / "000002.npy", np.zeros((30, 7)))
    notes = " ".join(TASK.read(folder).notes)
    assert "000003" in notes and "000002" in notes


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nowhere", "no such path"),
        (lambda p: p, "none in it"),
        (lambda p: (np.save(p / "a.npy", joints_of()), p)[1], "1 without any"),
        (lambda p: (np.save(p / "a.npy", joints_of()), (p / "a.txt").write_text("walks"), p)[2], "1 in all"),
        (lambda p: (np.save(p / "a.npy", joints_of()[:5]), (p / "a.txt").write_text("walks"), p)[2], "at least 8 frames"),
        (lambda p: (np.save(p / "a.npy", np.full((20, 263), np.nan)), (p / "a.txt").write_text("walks"), p)[2], "NaN"),
        (lambda p: ((p / "a.npy").write_bytes(b"no"), (p / "a.txt").write_text("walks"), p)[2], "ValueError|EOFError"),
    ],
)
def test_bad_folders_are_refused_in_one_line(tmp_path, make, says):
    with pytest.raises(BadInput, match=says) as caught:
        TASK.read(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_inputs_are_captions_files_of_them_and_motions(tmp_path):
    (tmp_path / "wishes.txt").write_text("a person walks # 24\n\nsomeone jumps\n")
    np.save(tmp_path / "m.npy", joints_of())
    given = TASK.inputs(["turn around", str(tmp_path / "wishes.txt")])
    prepare = Prepare({"max_length": 40})
    batch = collate([prepare(given[i], RNG) for i in range(len(given))])
    assert batch["caption"] == ["turn around", "a person walks", "someone jumps"] and batch["length"].tolist() == [40, 24, 40]
    assert TASK.inputs([tmp_path / "m.npy"])[0]["motion"].shape == (32, 263)
    assert TASK.from_memory({"caption": "hop"}, 3)["id"] == "input 3"
    for wrong in ("walk # soon", "# 12", str(tmp_path / "none.txt")):
        with pytest.raises(BadInput):
            TASK.inputs([wrong])
    for value in (3, {"text": "walk"}):
        with pytest.raises(BadInput):
            TASK.from_memory(value, 0)
    with pytest.raises(BadInput, match="1 to 40"):
        prepare({"caption": "x", "length": 99}, RNG)
    with pytest.raises(BadInput, match="263"):
        as_features(np.zeros((20, 21, 3)), "a")
    with pytest.raises(BadInput, match="none at all"):
        collate([prepare({"caption": "x"}, RNG), prepare({"caption": "x", "motion": joints_of()}, RNG)])


def test_long_motions_give_windows():
    motion = skeleton.to_features(joints_of(frames=60))
    fixed, random = Prepare({"max_length": 20}), Prepare({"max_length": 20}, {})
    np.testing.assert_array_equal(fixed({"motion": motion}, RNG)["motion"], motion[:20])
    starts = {random({"motion": motion}, np.random.default_rng(i))["motion"].tobytes() for i in range(10)}
    assert len(starts) > 3


# captions, sample data, scores --------------------------------------------------------------------------------------


def test_captions_are_bags_of_fixed_words():
    a, b, c, d = word_vectors(["A person walks.", "walks a person", "a person jumps", ""], 64)
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert np.linalg.norm(a) == pytest.approx(8, rel=1e-4) and not d.any() and 0.3 < a @ c / 64 < 0.95
    np.testing.assert_allclose(word_vectors(["walks"], 3), word_vectors(["Walks"], 3))


def test_samples_are_the_same_each_time_and_every_action_is_there():
    data = TASK.sample("actions")
    assert data is TASK.sample("actions") and {s["group"] for s in data.splits["val"].samples} == {*CAPTIONS}
    again = motions(np.random.default_rng((0, 23)), 3)
    np.testing.assert_array_equal(again[2]["motion"], data.splits["train"][2]["motion"])
    seen = {s["motion"].tobytes() for s in data.splits["train"].samples}
    assert not any(s["motion"].tobytes() in seen for s in data.splits["val"].samples)
    with pytest.raises(UnknownName, match="actions"):
        TASK.sample("action")


def example(count=16):
    found = motions(np.random.default_rng(5), count)
    batch = collate([Prepare({"max_length": 40})(m, RNG) for m in found])
    joints = torch.from_numpy(skeleton.to_joints(batch["motion"].numpy()))
    return Motions(batch["motion"], joints, batch["length"], batch["motion"]), batch


def test_true_motions_score_best_and_shuffled_ones_by_chance():
    truth, batch = example(64)
    metrics, per_sample = TASK.score([truth], [batch])
    assert (
        metrics["r_precision"] == 1
        and metrics["frechet"] < 1e-6
        and metrics["reconstruction_mm"] == 0
        and len(per_sample["r_precision"]) == 64
    )
    other = truth._replace(motion=truth.motion.roll(1, 0), length=batch["length"])
    worse, _ = TASK.score([other], [{**batch, "length": torch.full((64,), 32)}])
    assert worse["r_precision"] < 0.2 and worse["matching_distance"] > 2 * metrics["matching_distance"]


def test_scores_against_known_values():
    a, b = RNG.standard_normal((4000, 2)), RNG.standard_normal((4000, 2)) * 2 + 3
    assert frechet(a, b) == pytest.approx(2 * 9 + 2 * 1, rel=0.05)  # |mean|^2 + sum (1 - 2)^2
    motion = skeleton.to_features(joints_of())
    moved = motion.copy()
    moved[:, 4:7] += np.array([0.3, 0, 0.4], np.float32)  # the first joint, half a metre
    assert joint_error(motion, moved) == pytest.approx(500 / 22, rel=1e-3) and descriptor(motion).shape == (201,)


def test_the_baseline_is_deaf():
    name, metrics = TASK.baseline(TASK.sample("actions"))
    assert name == "a training motion at random" and metrics["r_precision"] < 0.3 and metrics["frechet"] < 1


def test_files_and_pictures(tmp_path):
    truth, batch = example(2)
    paths = TASK.write(truth, batch, tmp_path)
    assert sorted({p.suffix for p in paths}) == [".bvh", ".gif", ".npy"] and all(p.is_file() for p in paths)
    frames = int(batch["length"][0])
    assert np.load(paths[0]).shape == (frames, 22, 3) and np.load(paths[1]).shape == (frames, 263)
    with Image.open(paths[3]) as gif:
        assert gif.n_frames == frames
    row = TASK.rows(truth, batch, [])[0]
    assert row["caption"] == batch["caption"][0] and row["frames"] == frames and row["travels"] > 0.5  # it walks
    sheet = TASK.draw(truth, batch)
    assert sheet.width > 400 and sheet.getextrema()[0][0] < 100
