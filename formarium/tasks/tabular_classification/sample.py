"""Sample data: tables of the prior, and scikit-learn's iris, wine and breast cancer tables."""

from __future__ import annotations

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.tabular_classification.data import TABLES, Drawn, Table, Tables, episodes, held_out
from formarium.tasks.tabular_classification.prior import IGNORED, Prior

SMALL = Prior()
PUBLISHED = Prior(rows=1024, features=100, classes=10, context=(32, 1000))
REAL = {"iris": "load_iris", "wine": "load_wine", "breast-cancer": "load_breast_cancer"}
SPLITS = 5  # ways to divide a real table into context and query rows


def sample(name: str, seed: int = 0) -> Data:
    """ "prior": tables of 128 rows, up to 32 columns and 5 classes, another 60 of them held out. "prior-published": the same at the
    published size (1024 rows, 100 columns, 10 classes). "iris", "wine", "breast-cancer": trained on the small prior, tested on five
    splits of the table, half of its rows labelled."""
    if name in ("prior", "prior-published"):
        prior = SMALL if name == "prior" else PUBLISHED
        held = [s for s in (Drawn(prior, 160, seed, TABLES)[i] for i in range(72)) if s["label"][0] != IGNORED] if name == "prior" else []
        val = Tables(held[:60]) if held else Drawn(prior, 20, seed, TABLES)
        names = [str(i) for i in range(prior.classes)]
        splits = {"train": Drawn(prior, TABLES, seed), "val": val}
        return Data(name, "tabular-classification", splits, {}, names, [], {"sample": name, "seed": seed})
    if name not in REAL:
        raise UnknownName("sample", name, ["prior", "prior-published", *REAL])
    table = real(name)
    tables = [episodes(table, held_out(table.label, 0.5, seed + i), f"{name} split {i}", seed)[0][0] for i in range(SPLITS)]
    splits = {"train": Drawn(SMALL, TABLES, seed), "val": Tables(tables)}
    return Data(name, "tabular-classification", splits, {}, table.names, [], {"sample": name, "seed": seed})


def real(name: str) -> Table:
    """One of scikit-learn's tables."""
    import sklearn.datasets

    found = getattr(sklearn.datasets, REAL[name])()
    x = found.data.astype(np.float32)
    return Table(x, found.target.astype(np.int64), [*map(str, found.target_names)], [*found.feature_names], np.zeros(x.shape[1], bool), [])
