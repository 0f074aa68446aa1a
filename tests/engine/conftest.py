import numpy as np
import pytest

from formarium.task import Data
from formarium.tasks.image_classification.data import Arrays


def bars(count: int, seed: int) -> Arrays:
    """Images with a bright bar in one of four places: learnt in a few steps."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 4, count)
    images = rng.integers(0, 60, (count, 32, 32, 3), dtype=np.uint8)
    for image, at in zip(images, label, strict=True):
        image[8 * at : 8 * at + 8] += 150
    return Arrays(images, label, [f"bar {i}" for i in range(count)])


def bars_data() -> Data:
    splits = {"train": bars(96, 0), "val": bars(40, 1)}
    return Data("bars", "image-classification", splits, {"num_classes": 4}, ["a", "b", "c", "d"], [], {"sample": "bars"})


@pytest.fixture(scope="session")
def data() -> Data:
    return bars_data()


def weights(run):
    return {k: v.clone() for k, v in run.model.state_dict().items()}


def equal(a, b):
    import torch

    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
