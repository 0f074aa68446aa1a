import json

import numpy as np
import pytest
import torch

from formarium.errors import BadInput, UnknownName
from formarium.nn.tiling import sliding_window, window_weight
from formarium.task import task as task_of
from formarium.tasks.medical_segmentation.metrics import dice, hausdorff95
from formarium.tasks.medical_segmentation.model import Rebuilt, Segmented, central, region_masks
from formarium.tasks.medical_segmentation.prepare import Prepare, normalised
from formarium.tasks.medical_segmentation.sample import organs, tumour

nib = pytest.importorskip("nibabel")
TASK = task_of("medical-segmentation")
RNG = np.random.default_rng(0)
AFFINE = np.array([[0, -1.2, 0, 10], [2.0, 0, 0, -20], [0, 0, 3.0, 5], [0, 0, 0, 1.0]])


def save(path, values, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(values), affine), str(path))
    return path


def brats(root, count=3, sides=(12, 10, 8)):
    for i in range(count):
        image, label = tumour(sides, np.random.default_rng(i))
        for c, name in enumerate(("t1", "t1ce", "t2", "flair")):
            save(root / f"case{i}" / f"case{i}_{name}.nii.gz", image[c])
        save(root / f"case{i}" / f"case{i}_seg.nii.gz", label.astype(np.uint8))
    return root


def plain(root, count=3, sides=(12, 10, 8), mask=None):
    for i in range(count):
        image, label = organs(sides, np.random.default_rng(i))
        label[0, 0, :4] = (0, 1, 2, 3)
        save(root / "images" / f"{i}.nii.gz", image[0])
        save(root / "labels" / f"{i}.nii.gz", (label if mask is None else mask(label)).astype(np.int16))
    return root


# reading and writing ------------------------------------------------------------------------------------------------


def test_brats_folders_are_read_with_their_regions(tmp_path):
    data = TASK.read(brats(tmp_path))
    assert data.model_args == {"in_channels": 4, "spatial_dims": 3, "out_channels": 3, "regions": ((1, 4), (1, 2, 4), (4,))}
    sample = data.splits["train"][0]
    assert sample["image"].shape == (4, 12, 10, 8) and {*np.unique(sample["label"])} <= {0, 1, 2, 4} and len(data.splits["val"]) == 1
    np.testing.assert_allclose(sample["affine"], AFFINE)
    assert data.names[1] == "whole tumour"


def test_images_and_labels_are_read_as_classes_named_by_dataset_json(tmp_path):
    (plain(tmp_path) / "dataset.json").write_text(json.dumps({"labels": {"0": "background", "1": "liver", "2": "kidney", "3": "spleen"}}))
    data = TASK.read(tmp_path)
    assert data.model_args == {"in_channels": 1, "spatial_dims": 3, "out_channels": 4, "regions": ()}
    assert data.names == ["liver", "kidney", "spleen"]


def test_channels_last_and_slices(tmp_path):
    for i in range(2):
        save(tmp_path / "images" / f"{i}.nii", RNG.random((6, 7, 5, 2)).astype(np.float32))
        save(tmp_path / "labels" / f"{i}.nii", np.ones((6, 7, 5), dtype=np.uint8))
    assert TASK.read(tmp_path).splits["train"][0]["image"].shape == (2, 6, 7, 5)
    for i in range(2):
        save(tmp_path / "flat" / "images" / f"{i}.nii", RNG.random((6, 7)).astype(np.float32))
        save(tmp_path / "flat" / "labels" / f"{i}.nii", np.ones((6, 7), dtype=np.uint8))
    assert TASK.read(tmp_path / "flat").model_args["spatial_dims"] == 2


def test_folders_without_masks_are_for_pretraining(tmp_path):
    for path in (plain(tmp_path / "a") / "labels").iterdir():
        path.unlink()
    data = TASK.read(tmp_path / "a")
    assert data.model_args == {"in_channels": 1, "spatial_dims": 3} and data.names == [] and "label" not in data.splits["train"][0]
    with pytest.raises(BadInput, match="expected a mask"):
        TASK.read(tmp_path / "a", masks=True)
    (plain(tmp_path / "b") / "labels" / "1.nii.gz").unlink()  # where some have one, it is asked for
    assert sum(len(s) for s in TASK.read(tmp_path / "b").splits.values()) == 2
    data = TASK.read(tmp_path / "b", masks=False)
    assert sum(len(s) for s in data.splits.values()) == 3 and "out_channels" not in data.model_args
    for i in range(3):
        save(tmp_path / "flat" / f"{i}.nii.gz", np.full((4, 5, 6), i + 1.0, np.float32))
    assert len(TASK.read(tmp_path / "flat", masks=False).splits["train"]) == 2


def test_what_is_written_has_the_labels_and_the_affine_of_the_image(tmp_path):
    case = TASK.inputs([brats(tmp_path, 1) / "case0"])[0]
    assert "label" not in case
    batch = TASK.collate([TASK.transform({"channels": 4})(case, RNG)])
    label = torch.randint(0, 5, (1, 12, 10, 8), dtype=torch.int16)
    (path,) = TASK.write(Segmented(label, torch.zeros(1, 3, 12, 10, 8, dtype=torch.bool)), batch, tmp_path)
    again = nib.load(str(path))
    np.testing.assert_array_equal(np.asarray(again.dataobj), label[0].numpy())
    np.testing.assert_allclose(again.affine, AFFINE, atol=1e-5)
    assert path.name == "case0.nii.gz"


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: p / "nowhere", "no such path"),
        (lambda p: p, "no NIfTI file"),
        (lambda p: save(p / "a.nii", np.zeros((3, 3, 3), np.float32)), "a file"),
        (lambda p: save(p / "a.nii", np.zeros((3, 3, 3), np.float32)).parent, "1 NIfTI files"),
        (lambda p: plain(p, 1), "at least two"),
        (lambda p: plain(p, 2, mask=lambda x: x[:-1]), "the image's shape"),
        (lambda p: plain(p, 2, mask=lambda x: x - 1), "whole numbers from 0"),
        (lambda p: plain(p, 2, mask=lambda x: 0 * x), "only zeros"),
        (lambda p: plain(p, 2, mask=lambda x: 300 * x), "below 256"),
        (lambda p: _garbage(plain(p, 2)), "a NIfTI file"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(tmp_path, make, says):
    with pytest.raises(BadInput, match=says) as caught:
        TASK.read(make(tmp_path))
    assert "\n" not in str(caught.value)


def _garbage(root):
    for i in range(2):
        (root / "images" / f"{i}.nii.gz").write_bytes(b"not a volume")
    return root


def test_broken_cases_are_left_out_and_named(tmp_path):
    plain(tmp_path, 4)
    (tmp_path / "images" / "1.nii.gz").write_bytes(b"cut")
    data = TASK.read(tmp_path)
    assert "1.nii.gz" in data.notes[0] and sum(len(s) for s in data.splits.values()) == 3
    with pytest.raises(BadInput, match=r"1\.nii\.gz"):
        TASK.read(tmp_path, strict=True)
    with pytest.raises(BadInput, match="no such path"):
        TASK.inputs([tmp_path / "none.nii"])


def test_a_network_refuses_other_channels_and_labels():
    image, label = tumour((12, 10, 8), RNG)
    with pytest.raises(BadInput, match="1 channels"):
        Prepare({"channels": 1})({"image": image, "label": label, "id": "x"}, RNG)
    with pytest.raises(BadInput, match="got 4"):
        Prepare({"regions": ((1, 2),)})({"image": image, "label": np.full((12, 10, 8), 4), "id": "x"}, RNG)
    with pytest.raises(BadInput, match="labels 0, 1, 2"):
        Prepare({"classes": 3})({"image": image, "label": np.full((12, 10, 8), 3), "id": "x"}, RNG)
    with pytest.raises(BadInput, match="an array"):
        TASK.from_memory([1, 2], 0)


# preparation --------------------------------------------------------------------------------------------------------


def test_channels_are_normalised_over_their_non_zero_voxels():
    image = RNG.random((2, 5, 6, 7)) * 50 + 10
    image[:, :2] = 0
    out = normalised(image)
    assert (out[:, :2] == 0).all() and abs(out[:, 2:].mean((1, 2, 3))).max() < 1e-5 and abs(out[:, 2:].std((1, 2, 3)) - 1).max() < 1e-5


def test_training_crops_have_one_shape_and_image_and_label_stay_together():
    label = RNG.integers(0, 3, (20, 9, 12))
    sample = {"image": label[None].astype(np.float32) + 5, "label": label, "id": "x"}
    prepare = Prepare({"classes": 3}, {"patch": (16, 16, 8), "flip": 0.5, "foreground": 0.5})
    for seed in range(8):
        out = prepare(sample, np.random.default_rng(seed))
        assert out["image"].shape == (1, 16, 16, 8) and out["label"].shape == (16, 16, 8)
        means = [out["image"][0][(out["label"] == v) & (out["image"][0] != 0)] for v in range(3)]
        assert all(m.std() < 1e-5 for m in means) and means[0][0] < means[1][0] < means[2][0]


# a sliding window ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sides", "weighting"), [((20, 17, 9), "gaussian"), ((8, 8, 8), "constant"), ((5, 12, 30), "gaussian")])
def test_the_sliding_window_gives_monais_numbers(sides, weighting):
    inferers = pytest.importorskip("monai.inferers")
    net = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 3, padding=1), torch.nn.ReLU())
    x = torch.randn(2, 2, *sides)
    with torch.no_grad():
        theirs = inferers.sliding_window_inference(x, (8, 8, 8), 4, net, overlap=0.6, mode=weighting)
        ours = sliding_window(net, x, (8, 8, 8), 0.6, weighting)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_pointwise_network_is_the_same_whole_and_by_windows_in_two_dimensions():
    x = torch.randn(1, 2, 37, 21)
    torch.testing.assert_close(sliding_window(torch.exp, x, (16, 16), 0.25), x.exp(), atol=1e-5, rtol=1e-5)
    weight = window_weight((9, 9), "gaussian")
    assert weight.argmax() == 40 and weight.min() > 0


# scores -------------------------------------------------------------------------------------------------------------


def test_dice_and_hausdorff_by_hand():
    a, b = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    a[5:10, 5:10] = b[8:13, 5:10] = True
    assert dice(a, b) == pytest.approx(2 * 10 / 50) and hausdorff95(a, b) == 3 and hausdorff95(a, b, (2.0, 1.0)) == 6
    empty = np.zeros_like(a)
    assert dice(empty, empty) == 1 and hausdorff95(empty, empty) == 0
    assert dice(a, empty) == 0 and hausdorff95(a, empty) == pytest.approx(np.hypot(20, 20))


@pytest.mark.parametrize("spacing", [None, (1.0, 2.0, 0.5)])
def test_scores_are_monais(spacing):
    metrics = pytest.importorskip("monai.metrics")
    for seed in range(4):
        rng = np.random.default_rng(seed)
        a, b = (tumour((16, 14, 12), rng)[1] > 0 for _ in range(2))
        if seed == 3:
            a[0] = b[:, 0] = True  # at the image's edge
        one, two = (torch.from_numpy(m[None, None]).float() for m in (a, b))
        theirs = metrics.compute_hausdorff_distance(one, two, include_background=True, percentile=95, spacing=spacing)
        assert hausdorff95(a, b, spacing) == pytest.approx(float(theirs), rel=1e-5)
        assert dice(a, b) == pytest.approx(float(metrics.compute_dice(one, two)), rel=1e-6)


def test_scores_rows_and_pictures_of_a_perfect_prediction():
    data = TASK.sample("tumours")
    prepare = TASK.transform({"channels": 4, "regions": data.model_args["regions"]})
    batch = TASK.collate([prepare(data.splits["val"][i], RNG) for i in range(2)])
    mask = region_masks(batch["label"], data.model_args["regions"])
    prediction = Segmented(batch["label"].short(), mask)
    metrics, per_sample = TASK.score([prediction], [batch])
    assert metrics["dice"] == 1 and metrics["hausdorff95"] == 0 and len(per_sample["dice_2"]) == 2
    row = TASK.rows(prediction, batch, data.names)[0]
    assert row["dice whole tumour"] == 1
    assert row["whole tumour (ml)"] == pytest.approx(float(mask[0, 1].sum()) * 1.5**3 / 1000, abs=1e-3)
    assert TASK.draw(prediction, batch, data.names).width > 600


def test_pretraining_is_scored_by_what_it_rebuilds(tmp_path):
    whole = torch.randn(2, 4, 32, 16, 16)
    prediction = Rebuilt(whole + 0.5, whole * 0, whole, torch.tensor([1, 3]), torch.tensor([1, 2]))
    metrics, per_sample = TASK.score([prediction], [{"id": ["a", "b"], "image": whole}])
    assert metrics == {"reconstruction": pytest.approx(0.5), "rotation": 0.5} and [*per_sample["rotation"]] == [1, 0]
    row = TASK.rows(prediction, {"id": ["a", "b"]}, [])[1]
    assert row == {"id": "b", "reconstruction": 0.5, "turned": "180 degrees", "said": "270 degrees"}
    assert TASK.draw(prediction, {"image": whole}).width > 600
    with pytest.raises(BadInput, match="with masks first"):
        TASK.write(prediction, {}, tmp_path)
    segmented = Segmented(torch.zeros(1, 4, 4, 4, dtype=torch.int16), torch.zeros(1, 3, 4, 4, 4, dtype=torch.bool))
    with pytest.raises(BadInput, match="their masks"):
        TASK.score([segmented], [{"image": whole[:1]}])


def test_the_middle_of_a_volume():
    x = torch.arange(6.0).view(1, 1, 6, 1).repeat(1, 1, 1, 2)
    assert central(x, (2, 2))[0, 0, :, 0].tolist() == [2, 3]
    assert central(x, (8, 4))[0, 0, :, 1].tolist() == [0, 0, 1, 2, 3, 4, 5, 0]


# sample data --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in TASK.samples if n != "tumours_unlabelled"])
def test_samples_come_from_their_seed_and_hold_every_label(name):
    data = TASK.sample(name)
    sample = data.splits["train"][0]
    assert sample["label"].shape == sample["image"].shape[1:] and sample["image"].ndim == data.model_args["spatial_dims"] + 1
    assert {*np.unique(sample["label"])} == ({0, 1, 2, 3} if name == "organs" else {0, 1, 2, 4})
    assert len(data.splits["train"]) == 40 and len(data.splits["val"]) == 10
    with pytest.raises(UnknownName, match="tumours"):
        TASK.sample("tumour")


def test_unlabelled_volumes_are_the_labelled_ones_without_masks():
    data, whole = TASK.sample("tumours_unlabelled"), TASK.sample("tumours")
    assert data.model_args == {"in_channels": 4, "spatial_dims": 3} and data.names == [] and len(data.splits["val"]) == 10
    sample = data.splits["train"][3]
    assert "label" not in sample and np.array_equal(sample["image"], whole.splits["train"][3]["image"])
    assert "label" in whole.splits["train"][3] and whole.source["sample"] == "tumours"
    out = TASK.transform({"channels": 4}, {"patch": (32, 32, 16), "flip": 0.5, "foreground": 0.7})(sample, RNG)
    assert out["image"].shape == (4, 32, 32, 16)
    assert {*TASK.collate([out, out])} == {"id", "image", "affine"}


def test_labelled_crops_are_what_they_were_before_masks_could_lack():
    raw = TASK.sample("tumours").splits["train"][0]
    how = {"patch": (32, 32, 16), "flip": 0.5, "foreground": 0.0, "intensity_scale": 0.1}
    with_mask, without = (
        TASK.transform({"channels": 4}, how)(s, np.random.default_rng(3)) for s in (raw, {k: v for k, v in raw.items() if k != "label"})
    )
    np.testing.assert_array_equal(with_mask["image"], without["image"])


def test_tumour_regions_are_nested():
    _, label = tumour((64, 40, 40), np.random.default_rng(5))
    tc, wt, et = region_masks(torch.from_numpy(label[None]), ((1, 4), (1, 2, 4), (4,)))[0]
    assert (et <= tc).all() and (tc <= wt).all() and wt.sum() > tc.sum() > et.sum() > 0
