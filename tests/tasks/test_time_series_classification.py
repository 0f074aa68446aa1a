import numpy as np
import pytest
import torch

from formarium.errors import BadInput, UnknownName
from formarium.task import task as task_of
from formarium.tasks.time_series_classification import shapelets
from formarium.tasks.time_series_classification.data import fit_length, read_ts, write_ts
from formarium.tasks.time_series_classification.model import Match, SeriesLabels
from formarium.tasks.time_series_classification.sample import CHANNEL, MOTIF, patterns

TASK = task_of("time-series-classification")
RNG = np.random.default_rng(0)


# files --------------------------------------------------------------------------------------------------------------


def archive(folder, name="Toy", lengths=(12,), classes=("a", "b"), count=6):
    x = [RNG.standard_normal((2, lengths[i % len(lengths)])).round(4) for i in range(count)]
    for part in ("TRAIN", "TEST"):
        write_ts(folder / f"{name}_{part}.ts", x, [i % len(classes) for i in range(count)], classes, name)
    return x


def test_a_ts_file_comes_back_as_it_was_written(tmp_path):
    x = archive(tmp_path)
    x[0][1, 3] = np.nan
    path = write_ts(tmp_path / "t.ts", x, [0, 1, 0, 1, 0, 1], ["with space", "b"])
    found = read_ts(path)
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(found.series, x, strict=True))
    assert found.names == ["with_space", "b"] and found.classes[:2] == ["with_space", "b"] and found.header["dimensions"] == "2"
    assert read_ts(write_ts(tmp_path / "u.ts", x, None, [])).classes == [""] * 6


def test_archives_are_read_with_their_own_test_part(tmp_path):
    x = archive(tmp_path)
    for path in (tmp_path, tmp_path / "Toy_TRAIN.ts"):
        data = TASK.read(path)
        assert data.names == ["a", "b"] and data.model_args == {"num_classes": 2, "channels": 2, "length": 12}
        np.testing.assert_allclose(data.splits["val"][3]["series"], x[3], atol=1e-6)
        assert data.splits["train"][1]["label"] == 1 and not data.notes
    (tmp_path / "Toy_TEST.ts").unlink()
    alone = TASK.read(tmp_path / "Toy_TRAIN.ts")
    assert {k: len(v) for k, v in alone.splits.items()} == {"train": 4, "val": 2}


def test_the_archives_tools_read_what_is_written(tmp_path):
    datasets = pytest.importorskip("aeon.datasets")
    x = archive(tmp_path)
    theirs, y = datasets.load_from_ts_file(str(tmp_path / "Toy_TRAIN.ts"))
    np.testing.assert_allclose(theirs, np.stack(x))
    assert list(y[:2]) == ["a", "b"]


def test_unequal_lengths_and_missing_values_are_said(tmp_path):
    archive(tmp_path, lengths=(12, 8))
    data = TASK.read(tmp_path)
    assert "8 to 12 points, padded" in data.notes[0] and (data.splits["train"][1]["series"][:, 8:] == 0).all()
    assert TASK.read(tmp_path, lengths="cut").model_args["length"] == 8
    stretched = TASK.read(tmp_path, lengths="stretch").splits["train"][1]["series"]
    short = read_ts(tmp_path / "Toy_TRAIN.ts").series[1]
    np.testing.assert_allclose(stretched[:, [0, -1]], short[:, [0, -1]], atol=1e-6)
    with pytest.raises(UnknownName, match="stretch"):
        TASK.read(tmp_path, lengths="stretched")
    x = np.arange(20.0).reshape(2, 10)
    x[0, 4] = np.nan
    write_ts(tmp_path / "gap.ts", [x] * 4, [0, 0, 1, 1], ["a", "b"])
    data = TASK.read(tmp_path / "gap.ts")
    assert "4 series filled" in data.notes[0] and data.splits["train"][0]["series"][0, 4] == 4
    assert fit_length(x, 5, "cut").shape == (2, 5)


def test_numpy_archives_and_timestamps(tmp_path):
    np.savez(tmp_path / "n.npz", x=RNG.standard_normal((8, 3, 9)), y=np.arange(8) % 2)
    assert TASK.read(tmp_path / "n.npz").model_args == {"num_classes": 2, "channels": 3, "length": 9}
    (tmp_path / "s.ts").write_text("@timeStamps true\n@classLabel true a b\n@data\n(0,1.5),(1,2.5):a\n(0,3),(1,4):b\n")
    assert read_ts(tmp_path / "s.ts").series[1].tolist() == [[3, 4]]


def write(path, text):
    path.write_text(text)
    return path


HEAD = "@problemName t\n@classLabel true a b\n@data\n"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "none.ts", "no such file"),
        (lambda p: p, "none in it"),
        (lambda p: write(p / "a.mat", "x"), "a .mat file"),
        (lambda p: write(p / "a.ts", ""), "no @data line"),
        (lambda p: write(p / "a.ts", HEAD), "got none"),
        (lambda p: write(p / "a.ts", "1,2,3\n"), "before @data"),
        (lambda p: write(p / "a.ts", HEAD + "1,x,3:a\n"), "line 4: expected numbers"),
        (lambda p: write(p / "a.ts", HEAD + "1,2:3,4:a\n1,2:b\n"), "line 5: expected 2 channels, got 1"),
        (lambda p: write(p / "a.ts", HEAD + "1,2:a\n1,2:a\n"), "one: a"),
        (lambda p: write(p / "a.ts", HEAD + "1,2:a\n1,2:c\n"), "expected classes a, b, got c"),
        (lambda p: write(p / "a.ts", HEAD + "1,2:a\n1,2:b\n"), "at least two series"),
        (lambda p: write(p / "a.ts", HEAD + "1,2:?,?:a\n1,2:1,2:b\n"), "a channel without any"),
        (lambda p: write(p / "a.ts", HEAD + "1,inf:a\n1,2:b\n"), "infinite"),
        (lambda p: write(p / "a.ts", "@classLabel false\n@data\n1,2\n3,4\n"), "series without one"),
        (lambda p: write(p / "a.npz", "no archive"), "an archive with x"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, make, says):
    with pytest.raises(BadInput, match=says) as caught:
        TASK.read(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_inputs_and_series_in_memory(tmp_path):
    archive(tmp_path)
    assert len(TASK.inputs([tmp_path / "Toy_TRAIN.ts"])) == 6 and "label" not in TASK.inputs([tmp_path])[0]
    assert len(TASK.inputs([str(tmp_path / "*.ts")])) == 12
    with pytest.raises(BadInput, match="no such path"):
        TASK.inputs([tmp_path / "x.ts"])
    assert TASK.from_memory(np.ones(7), 0)["series"].shape == (1, 7) and TASK.is_single(np.ones((2, 7)))
    assert TASK.from_memory(torch.ones(2, 7), 3)["id"] == "input 3" and not TASK.is_single(np.ones((4, 2, 7)))
    for bad, says in [
        (np.full(5, np.nan), "5 NaN"),
        (np.ones((2, 3, 4)), r"\[2, 3, 4\]"),
        ("abc", "str"),
        ({}, "empty"),
        (np.ones(0), "0"),
    ]:
        with pytest.raises(BadInput, match=says):
            TASK.from_memory(bad, 0)
    with pytest.raises(ValueError):
        TASK.collate([TASK.from_memory(np.ones((2, n)), 0) for n in (5, 6)])


# sample data --------------------------------------------------------------------------------------------------------


def test_motifs_are_where_they_are_said_to_be_and_nothing_else_tells():
    data = TASK.sample("motifs")
    train = data.splits["train"]
    shapes = patterns()
    for i in range(20):
        c, start = train.labels[i], train.starts[i]
        piece = train.x[i, CHANNEL[c], start : start + MOTIF]
        assert np.corrcoef(piece, shapes[c])[0, 1] > 0.8
    energy = np.stack([(train.x[train.labels == c] ** 2).mean((0, 2)) for c in range(3)])
    assert energy.std(0).max() < 0.05
    assert np.array_equal(TASK.sample("motifs").splits["val"].x, data.splits["val"].x)
    assert TASK.baseline(data)[1]["accuracy"] < 0.8
    with pytest.raises(UnknownName, match="motifs"):
        TASK.sample("motif")


@pytest.mark.parametrize(
    ("name", "channels", "length", "classes", "sizes"),
    [("basic-motions", 6, 100, 4, (40, 40)), ("japanese-vowels", 12, 29, 9, (270, 370)), ("gun-point", 1, 150, 2, (50, 150))],
)
def test_archives_that_aeon_ships(name, channels, length, classes, sizes):
    data = TASK.sample(name)
    assert data.model_args == {"num_classes": classes, "channels": channels, "length": length}
    assert (len(data.splits["train"]), len(data.splits["val"])) == sizes
    assert bool(data.notes) == (name == "japanese-vowels")


# shapelets ----------------------------------------------------------------------------------------------------------


def test_important_points_are_the_farthest_from_the_line_between_their_neighbours():
    x = np.zeros((2, 21))
    x[0, 5], x[0, 14] = 10, -6
    x[1, 10] = 3
    order = shapelets.important_points(x, 0.3)
    assert order.shape == (2, 4) and {*order[0, :2]} == {5, 14} and order[0, 0] == 5 and order[1, 0] == 10
    spans = shapelets.spans_of(x[:, None], 0.3)[0][0]
    assert spans[0].tolist() == [0, 20] and (spans[:, 0] < spans[:, 1]).all()
    assert len(shapelets.important_points(x, 0.01)[0]) == 3  # five at least, ends included


def test_distances_are_those_of_a_plain_search():
    x = RNG.standard_normal((5, 30)).cumsum(1)
    spans = np.array([[0, 9], [3, 7], [20, 29], [10, 29]])
    rough = np.concatenate([np.zeros((5, 1)), np.cumsum(np.diff(x, axis=1) ** 2, 1)], 1)
    own = rough[2, spans[:, 1] - 1] - rough[2, spans[:, 0]]
    for window in (1, 4, 60):
        found = shapelets.distances(x, rough, 2, spans, own, window)
        for k, (a, b) in enumerate(spans):
            piece, mine = x[2, a:b], np.sqrt((np.diff(x[2, a:b]) ** 2).sum() + 0.001)
            for j in range(5):
                reach = range(max(0, a - min(window, 30) + 1), min(30 - (b - a), a + min(window, 30 - b)) + 1)
                every = []
                for s in reach:
                    other = x[j, s : s + b - a]
                    theirs = np.sqrt((np.diff(other) ** 2).sum() + 0.001)
                    every.append(np.linalg.norm(piece - other) * max(mine, theirs) / min(mine, theirs))
                assert found[k, j] == pytest.approx(min(every), abs=1e-7)


def test_chunks_change_nothing(monkeypatch):
    x, label = RNG.standard_normal((8, 2, 25)), np.arange(8) % 2
    whole = shapelets.discover(x, label, 3, 10)
    monkeypatch.setattr(shapelets, "CHUNK", 1500)
    assert shapelets.discover(x, label, 3, 10) == whole


def test_information_gain_of_hand_made_distances():
    positive = np.array([True, True, False, False])
    gain, gap = shapelets.information_gain(np.array([[0, 1, 5, 6.0], [0, 5, 1, 6.0], [5, 6, 0, 1.0]]), positive)
    assert gain[0] == pytest.approx(1) and gain[1] == pytest.approx(0.311278) and gain[2] <= 0.32 and gap[0] == pytest.approx(5 / 3)
    released = shapelets.information_gain(RNG.random((5, 10)), np.arange(10) < 5, released=True)[0]
    assert ((released >= -1) & (released < 1)).all()
    assert (shapelets.information_gain(RNG.random((5, 9)), np.arange(9) < 3, released=True)[0] == -1).all()  # 1 of 3 is neither 0.2 nor 0.4


def test_the_best_ones_keep_apart_while_they_can():
    table = np.array([[0, 0, 10, 0.9, 0, 0], [1, 5, 12, 0.8, 0, 0], [2, 5, 12, 0.7, 0, 1], [3, 10, 20, 0.6, 0, 0]], dtype=float)
    assert shapelets.best_apart(table, 3)[:, 0].tolist() == [0, 2, 3]
    assert shapelets.best_apart(table, 4)[:, 3].min() == 0.6 and len(shapelets.best_apart(table, 9)) == 4


@pytest.mark.parametrize(
    ("x", "label", "says"),
    [
        (np.ones((4, 1, 4)), [0, 1, 0, 1], "at least 5 points"),
        (np.full((4, 1, 9), np.nan), [0, 1, 0, 1], "NaN"),
        (np.ones((4, 1, 9)), [1, 1, 1, 1], "two classes"),
    ],
)
def test_what_has_no_shapelets(x, label, says):
    with pytest.raises(BadInput, match=says):
        shapelets.discover(x, np.array(label), 2, 5)


# scores and pictures ------------------------------------------------------------------------------------------------


def said(probabilities, matches=None):
    p = torch.tensor(probabilities)
    return SeriesLabels(p, p.argmax(-1), matches or [[] for _ in probabilities])


def test_scores_against_hand_counted_ones():
    metrics, per_sample = TASK.score([said([[0.7, 0.3], [0.4, 0.6], [0.8, 0.2]])], [{"label": torch.tensor([0, 1, 1])}])
    assert metrics["accuracy"] == pytest.approx(2 / 3) and per_sample["accuracy"].tolist() == [1, 1, 0]
    assert metrics["log_loss"] == pytest.approx(-np.log([0.7, 0.6, 0.2]).mean(), rel=1e-6)
    assert metrics["macro_f1"] == pytest.approx(2 / 3)


def test_rows_and_pictures(tmp_path):
    batch = {"series": torch.randn(3, 2, 40), "label": torch.tensor([0, 1, 1]), "id": [*"xyz"]}
    p = said([[0.7, 0.3], [0.4, 0.6], [0.8, 0.2]], [[Match(1, 5, 12, 0, 0.25)], [], []])
    row = TASK.rows(p, batch, ["left", "right"])[0]
    assert row["label"] == "left" and row["matches"] == [{"channel": 1, "start": 5, "end": 12, "label": "left", "distance": 0.25}]
    assert min(TASK.draw(p, batch, ["left", "right"]).size) > 100
    assert len(TASK.details([p], [batch], ["left", "right"])) == 1
    shown, kept = TASK.examples([p], [batch])
    assert len(shown.matches) == len(kept["series"]) == 3 and len(TASK.write(p, batch, tmp_path, ["left", "right"])) == 3


def test_training_may_jitter_and_scale():
    sample = {"series": RNG.standard_normal((2, 50)).astype(np.float32), "label": 0, "id": "a"}
    plain = TASK.transform({})(sample, np.random.default_rng(0))["series"]
    moved = TASK.transform({}, {"jitter": 0.1, "scaling": 0.1})(sample, np.random.default_rng(0))["series"]
    assert np.array_equal(plain, sample["series"]) and moved.dtype == np.float32 and 0 < np.abs(moved - plain).max() < 2
