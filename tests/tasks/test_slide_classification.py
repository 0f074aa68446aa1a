import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks.slide_classification.data import Bags, Prepare, collate, read_bag, write_bags
from formarium.tasks.slide_classification.draw import examples, places
from formarium.tasks.slide_classification.metrics import auc, balanced_accuracy
from formarium.tasks.slide_classification.model import SlideLabels
from formarium.tasks.slide_classification.sample import RINGS, section

TASK = task_of("slide-classification")
RNG = np.random.default_rng(0)


def bag(tiles=5, width=6):
    return RNG.normal(size=(tiles, width)).astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    for i in range(12):
        np.savez(tmp_path / f"s{i}.npz", features=bag(4 + i), coords=np.arange(2 * (4 + i)).reshape(-1, 2))
    rows = [[f"s{i}", "tumour" if i % 2 else "normal", f"p{i // 2 % 4 + 4 * (i % 2)}"] for i in range(12)]
    table(tmp_path, rows, ["slide", "label", "patient"])
    return tmp_path


def table(root, rows, header=("slide", "label")):
    with open(root / "labels.csv", "w", newline="") as f:
        csv.writer(f).writerows([header, *rows])


# bags ---------------------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_bag(tmp_path):
    x, xy = bag(), np.arange(10).reshape(5, 2)
    np.savez(tmp_path / "a.npz", features=x, coords=xy)
    np.save(tmp_path / "b.npy", x)
    torch.save({"features": torch.from_numpy(x), "coords": torch.from_numpy(xy)}, tmp_path / "c.pt")
    torch.save(torch.from_numpy(x)[None], tmp_path / "d.pt")
    np.save(tmp_path / "e.npy", np.concatenate([np.zeros((5, 1)), xy, x], 1))
    for name in ("a.npz", "b.npy", "c.pt", "d.pt"):
        np.testing.assert_allclose(read_bag(tmp_path / name)["features"], x)
    np.testing.assert_array_equal(read_bag(tmp_path / "c.pt")["coords"], xy)
    owkin = read_bag(tmp_path / "e.npy", metadata=3)
    np.testing.assert_allclose(owkin["features"], x, rtol=1e-6)
    np.testing.assert_array_equal(owkin["coords"], xy)


def test_h5_bags_where_the_package_is_there(tmp_path):
    h5py = pytest.importorskip("h5py")
    x = bag()
    with h5py.File(tmp_path / "a.h5", "w") as f:
        f["features"], f["coords"] = x[None], np.ones((5, 2))
    np.testing.assert_allclose(read_bag(tmp_path / "a.h5")["features"], x)


class Evil:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: p.with_suffix(".npz").write_bytes(b"no"), "can't be read"),
        (lambda p: np.save(p.with_suffix(".npy"), np.zeros(4)), "not empty"),
        (lambda p: np.save(p.with_suffix(".npy"), np.full((2, 3), np.nan)), "NaN"),
        (lambda p: np.savez(p.with_suffix(".npz"), features=bag(), coords=np.zeros((2, 2))), "coords"),
        (lambda p: torch.save(Evil(), p.with_suffix(".pt")), "can't be read"),
        (lambda p: np.save(p.with_suffix(".npy"), np.array([object()]), allow_pickle=True), "can't be read"),
    ],
)
def test_a_file_that_holds_no_bag_is_named(tmp_path, make, said):
    make(tmp_path / "x")
    with pytest.raises(BadInput, match=said):
        read_bag(next(p for p in tmp_path.iterdir()))


# folders ------------------------------------------------------------------------------------------------------------


def test_a_folder_is_split_by_patient_and_seed(folder):
    data, again = TASK.read(folder), TASK.read(folder)
    assert data.names == ["normal", "tumour"] and data.model_args == {"num_classes": 2, "features": 6}
    train, val = data.splits["train"], data.splits["val"]
    assert {*train.patients}.isdisjoint(val.patients) and len(train) + len(val) == 12 and {*val.labels} == {0, 1}
    assert val.ids == again.splits["val"].ids
    assert train[0]["features"].shape[1] == 6 and train[0]["patient"] == train.patients[0]


def test_a_table_may_say_the_splits_and_leave_things_out(folder):
    rows = [[f"s{i}.svs", i % 2, "train" if i < 6 else "val"] for i in range(10)] + [["gone", 1, "train"], ["s10", "", "val"]]
    table(folder, rows, ["slide_id", "target", "split"])
    data = TASK.read(folder)
    assert [len(data.splits[s]) for s in ("train", "val")] == [6, 4] and data.names == ["0", "1"]
    notes = " ".join(data.notes)
    assert "without a file: gone" in notes and "without label: s10" in notes and "not in the table: s11" in notes
    with pytest.raises(BadInput, match="gone"):
        TASK.read(folder, strict=True)


def test_parquet_tables_and_labels_elsewhere(folder, tmp_path_factory):
    import pandas as pd

    other = tmp_path_factory.mktemp("labels") / "mine.parquet"
    pd.DataFrame({"slide": [f"s{i}" for i in range(8)], "label": [i % 2 for i in range(8)]}).to_parquet(other)
    assert sum(len(s) for s in TASK.read(folder, labels=other).splits.values()) == 8


def test_folders_of_tile_images_and_of_classes(tmp_path):
    for i in range(8):
        where = tmp_path / f"slide{i}"
        where.mkdir()
        for t in range(3):
            Image.fromarray(RNG.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(where / f"x{t * 16}_y{i}.png")
    table(tmp_path, [[f"slide{i}", "ab"[i % 2]] for i in range(8)])
    data = TASK.read(tmp_path)
    one = data.splits["train"][0]
    assert data.model_args["features"] == 0 and one["tiles"].shape == (3, 16, 16, 3) and one["coords"][:, 0].tolist() == [0, 16, 32]
    (tmp_path / "labels.csv").unlink()
    with pytest.raises(BadInput, match=r"labels.csv"):
        TASK.read(tmp_path)
    for i in range(6):
        (tmp_path / "by" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "by" / "ab"[i % 2] / f"s{i}.npy", bag())
    assert TASK.read(tmp_path / "by").names == ["a", "b"]


def widen(folder):
    np.save(folder / "s0.npy", bag(3, 7))
    (folder / "s0.npz").unlink()
    table(folder, [[f"s{i}", i % 2] for i in range(12)])


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda f: table(f, [["s1", "x"], ["s2", "x"]]), "two classes"),
        (lambda f: table(f, [["nobody", "x"]]), "names of the slides"),
        (lambda f: table(f, [["s1", "x"], ["s1", "y"]]), "twice"),
        (lambda f: table(f, [["s1", "x"]], ["slide", "colour"]), "label"),
        (lambda f: table(f, [["s1", "x", "later"]], ["slide", "label", "split"]), "split of s1"),
        (lambda f: widen(f), "one width"),
        (lambda f: [p.unlink() for p in f.glob("*.npz")], "got none"),
    ],
)
def test_bad_folders_get_one_clear_line(folder, spoil, said):
    spoil(folder)
    with pytest.raises(BadInput, match=said) as e:
        for seed in range(8):  # the odd slide must be looked at
            TASK.read(folder, seed=seed)
    assert "\n" not in str(e.value)


def test_no_folder_or_a_file(tmp_path):
    with pytest.raises(BadInput, match="no such path"):
        TASK.read(tmp_path / "x")
    (tmp_path / "f").write_text("")
    with pytest.raises(BadInput, match="a file"):
        TASK.read(tmp_path / "f")


def test_inputs_and_memory(folder):
    assert len(TASK.inputs([folder])) == 12 and TASK.inputs([folder / "s3.npz"]).ids == ["s3"]
    with pytest.raises(BadInput):
        TASK.inputs([folder / "labels.csv"])
    assert TASK.is_single(bag()) and TASK.is_single({}) and not TASK.is_single([bag(), bag()])
    one = TASK.from_memory(RNG.random((2, 8, 8, 3)), 4)
    assert one["tiles"].dtype == np.uint8 and one["id"] == "input 4" and one["coords"].shape == (2, 2)
    assert TASK.from_memory(torch.from_numpy(bag()), 0)["features"].shape == (5, 6)
    for bad in (np.zeros(3), np.full((2, 3), np.inf), np.full((1, 4, 4, 3), 7.0)):
        with pytest.raises(BadInput):
            TASK.from_memory(bad, 0)


def test_what_is_written_is_read_again(tmp_path):
    data = TASK.sample("feature-bags")
    small = type(data)("few", data.task, {k: _first(v, 4) for k, v in data.splits.items()}, data.model_args, data.names)
    again = TASK.read(write_bags(small, tmp_path / "bags"))
    np.testing.assert_allclose(again.splits["train"][1]["features"], small.splits["train"][1]["features"])
    rings = TASK.sample("ring-tiles")
    small = type(rings)("few", rings.task, {k: _first(v, 2) for k, v in rings.splits.items()}, rings.model_args, rings.names)
    again = TASK.read(write_bags(small, tmp_path / "tiles"))
    assert sorted(map(bytes, again.splits["val"][1]["tiles"])) == sorted(map(bytes, small.splits["val"][1]["tiles"]))
    extracted = TASK.read(write_bags(small, tmp_path / "features", extract=lambda t: t.reshape(len(t), -1)[:, :9]))
    assert extracted.model_args["features"] == 9


def _first(dataset, n):
    return type(dataset)(dataset.samples[:n])


# batches ------------------------------------------------------------------------------------------------------------


def test_bags_are_padded_and_training_takes_some_tiles():
    prepare = Prepare({"size": 8}, {"tiles_per_slide": 3, "turns": True})
    samples = [{"features": bag(n), "label": n % 2, "id": f"s{n}"} for n in (2, 5)]
    batch = collate([prepare(s, np.random.default_rng(0)) for s in samples])
    assert batch["features"].shape == (2, 3, 6) and batch["mask"].tolist() == [[True, True, False], [True] * 3]
    assert not batch["features"][0, 2].any() and batch["label"].tolist() == [0, 1]
    tiles = {"tiles": RNG.integers(0, 255, (4, 8, 8, 3), dtype=np.uint8), "id": "t"}
    turned = Prepare({"size": 8}, {"turns": True})(tiles, np.random.default_rng(1))["tiles"]
    assert turned.shape == (4, 3, 8, 8) and turned.min() >= 0 and turned.max() <= 1
    plain = Prepare({"size": 8}, None)(tiles, RNG)["tiles"]
    np.testing.assert_allclose(plain, tiles["tiles"].transpose(0, 3, 1, 2) / 255, rtol=1e-6)
    assert Prepare({"size": 4}, None)(tiles, RNG)["tiles"].shape == (4, 3, 4, 4)
    with pytest.raises(BadInput, match="tiles_per_slide"):
        Prepare({}, {"tiles_per_slide": 0})
    with pytest.raises(BadInput, match="one width"):
        collate([{"features": bag(2, width), "coords": np.zeros((2, 2)), "id": "a"} for width in (3, 4)])


# metrics ------------------------------------------------------------------------------------------------------------


def test_metrics_against_known_values():
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]])
    assert auc(p, np.array([0, 0, 1, 1])) == 0.75 and auc(p, np.zeros(4)) == 0.5
    three = np.eye(3)[[0, 1, 2, 2]] * 0.8 + 0.05
    assert auc(three, np.array([0, 1, 2, 1])) == pytest.approx((1 + 0.75 + 5 / 6) / 3)
    assert balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 0, 0])) == 0.75
    assert balanced_accuracy(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1])) == 0.75
    prediction, batch = said(p), {"label": torch.tensor([0, 0, 1, 1])}
    metrics, each = TASK.score([prediction], [batch])
    assert metrics["auc"] == 0.75 and metrics["accuracy"] == 0.75 and len(each["accuracy"]) == 4
    assert metrics["log_loss"] == pytest.approx(-np.log([0.9, 0.6, 0.35, 0.8]).mean())


def said(p, tiles=4):
    p = torch.tensor(p, dtype=torch.float32)
    attention = torch.zeros(len(p), tiles)
    attention[:, :2] = torch.tensor([0.75, 0.25])
    return SlideLabels(p, p.argmax(1), attention)


def batch_of(n=2, tiles=4, images=True):
    mask = torch.ones(n, tiles, dtype=torch.bool)
    mask[0, 3:] = False
    x = {"tiles": torch.rand(n, tiles, 3, 8, 8)} if images else {"features": torch.rand(n, tiles, 3)}
    coords = torch.tensor([[0, 0], [64, 0], [0, 64], [64, 64]]).float()[None].repeat(n, 1, 1)
    return {**x, "mask": mask, "coords": coords, "label": torch.zeros(n, dtype=torch.int64), "id": [f"s/{i}" for i in range(n)]}


def test_rows_files_and_pictures(tmp_path):
    prediction = said([[0.8, 0.2], [0.3, 0.7]])
    row = TASK.rows(prediction, batch_of(), ["no", "yes"])[0]
    assert row["label"] == "no" and row["tiles"][0] == {"tile": 0, "x": 0.0, "y": 0.0, "attention": 0.75} and len(row["tiles"]) == 3
    json.dumps(row)
    paths = TASK.write(prediction, batch_of(), tmp_path, ["no", "yes"])
    assert sorted(p.suffix for p in paths) == [".csv", ".csv", ".json", ".json"]
    lines = paths[-2].read_text().splitlines()
    assert lines[0] == "x,y,attention" and len(lines) == 4
    for images in (True, False):
        assert min(TASK.draw(prediction, batch_of(images=images), ["no", "yes"]).size) >= 200
    assert places(np.zeros((5, 2))).tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1]]
    assert places(np.array([[512, 0], [0, 256], [256, 256]])).tolist() == [[2, 0], [0, 1], [1, 1]]
    assert TASK.details([prediction], [{"label": torch.tensor([0, 1])}], ["no", "yes"])
    assert examples([prediction, prediction], [{"label": 0}, batch_of()])[1]["id"] == ["s/0", "s/1"]


# sample data --------------------------------------------------------------------------------------------------------


def test_sample_data_keep_what_they_promise():
    rings = TASK.sample("ring-tiles")
    for split, count in (("train", 200), ("val", 120)):
        assert len(rings.splits[split]) == count
        for s in rings.splits[split].samples:
            low, high = RINGS[s["label"]]
            assert low <= s["rings"].sum() <= high and s["tiles"].shape == (16, 32, 32, 3)
    assert section().shape == (512, 512, 3)
    one = rings.splits["train"][1]
    assert TASK.sample("ring-tiles") is rings
    first, other = (TASK.sample("feature-bags", seed).splits["train"][0]["features"] for seed in (0, 1))
    assert first.shape != other.shape or not np.array_equal(first, other)
    assert len({s["id"] for s in rings.splits["val"].samples}) == 120 and one["label"] == 1
    with pytest.raises(UnknownName):
        TASK.sample("camelyon")


@pytest.mark.parametrize("name", ["ring-tiles", "feature-bags"])
def test_the_baseline_is_better_than_chance_and_far_from_perfect(name):
    called, metrics = TASK.baseline(TASK.sample(name))
    assert called == "mean pooling and logistic regression" and 0.5 < metrics["auc"] < 0.9 and {*metrics} == {"auc", "balanced_accuracy"}


def test_bags_without_labels():
    assert "label" not in Bags([], [], None).__dict__ or Bags([], []).labels is None
