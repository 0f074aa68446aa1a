import numpy as np
import pytest
import torch
from PIL import Image

from formarium import create, predict
from formarium.engine.prediction import predictions
from formarium.errors import BadInput
from tests.engine import toys


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = create("pvt_micro", num_classes=4)
    made.names = ["a", "b", "c", "d"]
    return made


def test_the_same_picture_in_any_form_gives_the_same_rows(model, data, tmp_path):
    images = [data.splits["val"][i]["image"] for i in range(5)]
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.glob("*.png"))
    rows = predict(model, paths, batch_size=2)
    assert [r["id"] for r in rows] == [p.name for p in paths] and {r["label"] for r in rows} <= {*"abcd"}
    assert rows[3] == predict(model, str(paths[3]))[0]
    forms = [
        images,
        np.stack(images),
        [Image.fromarray(x) for x in images],
        [torch.from_numpy(x).permute(2, 0, 1) / 255 for x in images],
        torch.stack([torch.from_numpy(x).permute(2, 0, 1) / 255 for x in images]),
        [x.astype(np.uint16) * 257 for x in images],
        [{"image": x} for x in images],
        (x for x in images),
        data.splits["val"],
        str(tmp_path),
    ]
    for form in forms:
        found = predict(model, form, batch_size=3)[:5]
        assert [r["top"] for r in found] == [r["top"] for r in rows]
    assert predict(model, images[0])[0]["id"] == "input 0"
    assert sum(len(rows) for rows, _, _ in predictions(model, images, batch_size=2)) == 5


def test_grey_and_odd_sizes_are_fine(model):
    rows = predict(model, [np.zeros((17, 90), np.uint8), np.zeros((32, 32, 1), np.float32), torch.rand(3, 100, 40)])
    assert len(rows) == 3 and all(0.25 <= r["probability"] <= 1 for r in rows)


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([], "at least one"),
        (3, "paths, or samples in memory"),
        ([np.zeros((4, 4, 7), np.uint8)], r"1 or 3 channels, got uint8 \[4, 4, 7\]"),
        ([np.zeros((0, 4, 3), np.uint8)], r"\[0, 4, 3\]"),
        ([np.zeros((4, 4, 3), np.int64)], "int64"),
        ([torch.full((3, 8, 8), 7.0)], r"values in \[0, 1\], got 7 to 7"),
        ([torch.full((3, 8, 8), float("nan"))], r"values in \[0, 1\]"),
        ([object()], "got object"),
        ("no/such/file.png", "no such path"),
    ],
)
def test_inputs_that_cannot_be_are_said(model, inputs, said):
    with pytest.raises(BadInput, match=said):
        predict(model, inputs)


class Pictures(list):
    def __getitem__(self, i):
        image = super().__getitem__(i)
        if image is None:
            raise OSError(f"picture {i} is cut short")
        return {"image": image, "id": f"picture {i}"}


def test_a_sample_that_cannot_be_read_is_named_and_the_others_go_on(model):
    pictures = Pictures([np.zeros((32, 32, 3), np.uint8), None, np.full((32, 32, 3), 200, np.uint8)])
    rows = predict(model, pictures)
    assert [r["id"] for r in rows] == ["picture 0", "1", "picture 2"] and "picture 1 is cut short" in rows[1]["error"]
    for ask in (
        lambda: predict(model, pictures, strict=True),
        lambda: predictions(model, pictures),
        lambda: predict(model, Pictures([None])),
    ):
        with pytest.raises(BadInput, match=r"1 of the inputs: .*cut short"):
            ask()


def test_samples_of_several_sizes_come_in_batches_by_size_and_rows_in_order(monkeypatch):
    toys.register(monkeypatch)
    seen = []

    def collate(samples):
        x = np.stack([s["x"] for s in samples])
        seen.append(x.shape)
        return {"x": torch.from_numpy(x[:, :4]), "id": [s["id"] for s in samples]}

    monkeypatch.setattr(toys.task, "collate", collate, raising=False)
    monkeypatch.setattr(toys.task, "transform", lambda preprocessing, recipe=None: lambda sample, rng: sample, raising=False)
    samples = [{"x": np.ones(4 + i % 2, np.float32), "id": str(i)} for i in range(5)]
    rows = predict("toy_micro", samples)
    assert [r["id"] for r in rows] == [*"01234"] and seen == [(3, 4), (2, 5)]
