import numpy as np
import pytest
import torch
from PIL import Image

from formarium.errors import BadInput, MissingExtra, UnknownName
from formarium.task import task as task_of
from formarium.tasks.medical_classification import data as reading
from formarium.tasks.medical_classification import sample as samples
from formarium.tasks.medical_classification.data import Arrays, load, of_rank
from formarium.tasks.medical_classification.metrics import auc
from formarium.tasks.medical_classification.model import Labels, by_rank
from formarium.tasks.medical_classification.prepare import Prepare, resize, unit

TASK = task_of("medical-classification")
RNG = np.random.default_rng(0)


def picture(path, side=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(RNG.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(path)
    return path


def volume(path, shape=(10, 9, 7)):
    import nibabel

    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(RNG.random(shape, dtype=np.float32) * 1000, np.eye(4)), str(path))
    return path


@pytest.fixture
def mixed(tmp_path):
    for name in ("ill", "well"):
        for i in range(5):
            picture(tmp_path / name / f"{i}.png")
            volume(tmp_path / name / f"{i}.nii.gz")
    return tmp_path


@pytest.fixture(scope="module")
def small():
    """A few samples of both ranks, as the sample data has them."""
    values = [samples.fundus(np.random.default_rng(i), i % 2 == 1) for i in range(6)]
    values += [samples.oct_volume(np.random.default_rng(i), i % 2 == 1) for i in range(6)]
    return Arrays(values, [2] * 6 + [3] * 6, np.arange(12) % 2, [f"s{i}" for i in range(12)])


# files --------------------------------------------------------------------------------------------------------------


def test_every_format_gives_its_rank(tmp_path):
    import tifffile

    values = RNG.random((8, 9, 6), dtype=np.float32)
    tifffile.imwrite(tmp_path / "pages.tif", np.moveaxis(values, -1, 0))
    tifffile.imwrite(tmp_path / "one.tif", RNG.integers(0, 255, (8, 9), dtype=np.uint8))
    np.save(tmp_path / "v.npy", values)
    np.save(tmp_path / "i.npy", (values[..., :3] * 255).astype(np.uint8))
    np.savez(tmp_path / "v.npz", volume=values, other=np.zeros(3))
    np.save(tmp_path / "grey.npy", values[..., 0])
    np.save(tmp_path / "ct.npy", (values[..., 0] * 2000 - 1000).astype(np.int16))
    for name in ("pages.tif", "v.npy", "v.npz"):
        np.testing.assert_allclose(load(tmp_path / name)["volume"], values)
    assert load(volume(tmp_path / "v.nii.gz"))["volume"].shape == (10, 9, 7)
    assert load(volume(tmp_path / "slice.nii", (10, 9, 1)))["image"].shape == (10, 9, 3)
    for name in ("one.tif", "i.npy", "grey.npy", "ct.npy"):
        found = load(tmp_path / name)["image"]
        assert found.dtype == np.uint8 and found.shape == (8, 9, 3)
    assert load(tmp_path / "ct.npy")["image"].max() == 255


def test_dicom_needs_its_package_or_is_read(tmp_path):
    (tmp_path / "scan.dcm").write_bytes(b"no dicom")
    try:
        import pydicom  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtra, match="pydicom"):
            load(tmp_path / "scan.dcm")
    else:
        with pytest.raises(BadInput, match=r"scan\.dcm"):
            load(tmp_path / "scan.dcm")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.full((8, 8), np.nan), "NaN"),
        (np.zeros((2, 3, 4, 5, 6)), "shape"),
        (np.zeros((8, 8, 2)), "slices"),
        (np.zeros(5), "shape"),
        (np.zeros((4, 4), dtype=complex), "real numbers"),
    ],
)
def test_arrays_that_are_no_images(tmp_path, values, says):
    np.save(tmp_path / "a.npy", values)
    with pytest.raises(BadInput, match=says) as caught:
        load(tmp_path / "a.npy")
    assert "a.npy" in str(caught.value) and "\n" not in str(caught.value)


def test_pickled_arrays_are_refused_not_run(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{"x": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(BadInput, match=r"a\.npy"):
        load(tmp_path / "a.npy")


# folders ------------------------------------------------------------------------------------------------------------


def test_a_folder_of_both_ranks_is_split_by_class_and_rank(mixed):
    data = TASK.read(mixed)
    assert data.names == ["ill", "well"] and data.model_args == {"num_classes": 2}
    assert sorted(data.splits["val"].ranks) == [2, 2, 3, 3] and len(data.splits["train"]) == 16
    assert sorted(data.splits["val"].labels) == [0, 0, 1, 1]
    assert TASK.read(mixed).splits["val"].paths == data.splits["val"].paths
    assert "10 images and 10 volumes" in " ".join(data.notes)
    images = of_rank(data, 2)
    assert {*images.splits["train"].ranks} == {2} and "image" in images.splits["train"][0]


def test_one_rank_alone_is_refused_where_there_is_none(tmp_path):
    for name in ("a", "b"):
        for i in range(2):
            picture(tmp_path / name / f"{i}.png")
    with pytest.raises(BadInput, match="volumes"):
        of_rank(TASK.read(tmp_path), 3)
    with pytest.raises(BadInput, match="2 or 3"):
        of_rank(TASK.read(tmp_path), 4)


def test_corrupt_files_are_named(mixed):
    (mixed / "ill" / "broken.nii.gz").write_bytes(b"nothing")
    (mixed / "well" / "broken.png").write_bytes(b"nothing")
    notes = " ".join(TASK.read(mixed).notes)
    assert "2 files" in notes and "broken.nii.gz" in notes and "broken.png" in notes
    with pytest.raises(BadInput, match=r"broken\.nii\.gz"):
        TASK.read(mixed, strict=True)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nowhere", "no such path"),
        (lambda p: p, "an empty folder"),
        (lambda p: picture(p / "a.png"), "a file"),
        (lambda p: picture(p / "a.png").parent, "no class folders"),
        (lambda p: picture(p / "only" / "a.png").parent.parent, "one: only"),
        (lambda p: (picture(p / "a" / "1.png"), picture(p / "b" / "1.png"))[0].parent.parent, "at least two files"),
        (lambda p: [picture(p / n) for n in ("train/a/1.png", "val/a/1.png", "val/b/1.png")] and p, "none of b"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, make, says):
    with pytest.raises(BadInput, match=says) as caught:
        TASK.read(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_inputs_and_values_in_memory(mixed):
    assert sorted(TASK.inputs([mixed]).ranks) == [2] * 10 + [3] * 10
    with pytest.raises(BadInput, match="no such path"):
        TASK.inputs([mixed / "none.png"])
    assert TASK.from_memory(np.zeros((8, 8, 6), dtype=np.uint8), 0)["volume"].shape == (8, 8, 6)
    assert TASK.from_memory(torch.rand(1, 8, 8, 6), 0)["volume"].shape == (8, 8, 6)
    assert TASK.from_memory(torch.rand(3, 8, 9), 0)["image"].shape == (8, 9, 3)
    with pytest.raises(BadInput, match="an image, a volume"):
        TASK.from_memory("text", 3)


# batches ------------------------------------------------------------------------------------------------------------


def test_batches_of_one_rank_are_tensors_and_mixed_ones_lists(small):
    ready = TASK.transform({"size": 32, "depth": 16, "crop": 1.0})
    made = [ready(small[i], RNG) for i in range(12)]
    assert TASK.collate(made[:6])["image"].shape == (6, 3, 32, 32) and TASK.collate(made[6:])["image"].shape == (6, 1, 32, 32, 16)
    batch = TASK.collate([made[7], made[0], made[8], made[1]])
    parts = dict((int(part["rank"][0]), (index.tolist(), part)) for index, part in by_rank(batch))
    assert parts[2][0] == [1, 3] and parts[3][0] == [0, 2]
    assert parts[3][1]["image"].shape == (2, 1, 32, 32, 16) and parts[3][1]["id"] == [made[7]["id"], made[8]["id"]]
    assert parts[2][1]["label"].tolist() == [0, 1]


def test_intensities_and_sizes():
    assert unit(np.array([[[0, 255]]], dtype=np.uint8)).max() == 1
    np.testing.assert_allclose(unit(np.linspace(-1000, 1000, 64).reshape(4, 4, 4)).max(), 1)
    half = np.full((4, 4, 4), 0.5, dtype=np.float32)
    np.testing.assert_array_equal(unit(half), half)
    assert resize(half, (8, 6, 2)).shape == (8, 6, 2) and abs(resize(half, (8, 6, 2)) - 0.5).max() < 1e-6
    assert Prepare({"size": 8, "depth": 5})({"volume": half}, RNG)["image"].shape == (1, 8, 8, 5)


def test_augmentation_depends_on_its_generator_alone(small):
    recipe = {"crop_scale": (0.3, 1), "hflip": 0.5, "shift": 2, "intensity_scale": 0.2, "intensity_shift": 0.1}
    ready = TASK.transform({"size": 32, "depth": 16, "crop": 1.0}, recipe)
    for i in (0, 7):
        one, same, other = (ready(small[i], np.random.default_rng(s))["image"] for s in (1, 1, 2))
        assert (one == same).all() and (one != other).any() and one.min() >= 0 and one.max() <= 1


# scores -------------------------------------------------------------------------------------------------------------


def test_metrics_against_known_values():
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.65, 0.35], [0.2, 0.8]])
    batch = {"label": torch.tensor([0, 0, 1, 1]), "rank": torch.tensor([2, 2, 3, 3]), "id": [*"abcd"]}
    metrics, per_sample = TASK.score([Labels(probabilities, probabilities.argmax(1))], [batch])
    assert metrics["auc"] == 0.75 and metrics["accuracy"] == 0.75  # the textbook case of three pairs out of four
    assert metrics["f1"] == pytest.approx(2 / 3) and metrics["kappa"] == pytest.approx(0.5)
    assert metrics["accuracy_2d"] == 1 and metrics["accuracy_3d"] == 0.5 and per_sample["accuracy"].tolist() == [1, 1, 0, 1]


def test_auc_of_several_classes_skips_those_that_do_not_occur():
    p = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1]])
    assert auc(p, np.array([0, 1, 0])) == 1.0 and auc(p, np.array([0, 0, 0])) == 0.5


def test_the_baseline_is_computed_and_beats_chance(small):
    values = [samples.fundus(np.random.default_rng(100 + i), i % 2 == 1) for i in range(60)]
    held = Arrays(values, [2] * 60, np.arange(60) % 2, [str(i) for i in range(60)])
    data = samples.Data("x", "medical-classification", {"train": held, "val": held}, {"num_classes": 2}, samples.NAMES)
    name, metrics = TASK.baseline(data)
    assert "logistic" in name and metrics["auc"] > 0.7


# sample data, pictures ----------------------------------------------------------------------------------------------


def test_samples_follow_their_seed_and_show_what_they_say():
    for make in (samples.fundus, samples.oct_volume):
        one, same, other = (make(np.random.default_rng(s), True) for s in (3, 3, 4))
        assert (one == same).all() and (one != other).any()
    pairs = [[samples.oct_volume(np.random.default_rng(s), ill) for ill in (False, True)] for s in range(8)]
    assert all((ill[:, :, 3:13] < 0.15).sum() > (well[:, :, 3:13] < 0.15).sum() for well, ill in pairs)  # fluid is dark
    with pytest.raises(UnknownName, match="fundus"):
        TASK.sample("fundi")


def test_samples_can_be_written_and_read_as_a_folder(small, tmp_path):
    data = samples.Data("x", "medical-classification", {"train": small, "val": small}, {"num_classes": 2}, samples.NAMES)
    again = TASK.read(samples.write_folder(data, tmp_path / "eyes"))
    assert sorted(again.splits["train"].ranks) == [2] * 6 + [3] * 6
    volumes = of_rank(again, 3).splits["val"]
    assert np.abs(volumes[0]["volume"] - small[7]["volume"]).max() < 1e-6  # class "disease" comes first


def test_pictures_of_both_ranks(small):
    ready = TASK.transform({"size": 32, "depth": 16, "crop": 1.0})
    batch = TASK.collate([ready(small[i], RNG) for i in (0, 1, 6, 7)])
    prediction = Labels(torch.tensor([[0.9, 0.1]] * 4), torch.zeros(4, dtype=torch.int64))
    assert TASK.draw(prediction, batch, samples.NAMES).size[0] > 500
    shown, chosen = TASK.examples([prediction], [batch])
    assert len(shown.label) == len(chosen["image"]) == 4
    assert len(TASK.details([prediction], [batch], samples.NAMES)) == 2
    row = TASK.rows(prediction, batch, samples.NAMES)[2]
    assert row["label"] == "healthy" and row["rank"] == 3


def test_a_format_s_ending_is_found():
    assert reading.ending("a/B.NII.GZ") == ".nii.gz" and reading.ending("x.TIF") == ".tif"
