"""Parts of a data set by class, for methods that train on some of them at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass
class Chosen:
    """Some samples of a data set."""

    dataset: Any
    indices: list[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]


def labels_of(dataset: Any) -> np.ndarray:
    """Every sample's label, int [samples], without decoding an image where the data set knows them."""
    if isinstance(dataset, Chosen):
        return labels_of(dataset.dataset)[dataset.indices]
    known = getattr(dataset, "labels", None)
    return np.asarray(known if known is not None else [dataset[i]["label"] for i in range(len(dataset))])


def of_classes(dataset: Any, classes: Any) -> Chosen:
    """The samples whose label is among `classes`, in their order."""
    return Chosen(dataset, np.flatnonzero(np.isin(labels_of(dataset), [*classes])).tolist())
