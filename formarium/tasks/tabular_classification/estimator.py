"""TabPFNClassifier: a prior-fitted network as a scikit-learn classifier. `fit` only keeps the table, `predict` is a forward pass.

>>> TabPFNClassifier().fit(x, y).predict_proba(x_new)
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import column_or_1d
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from formarium.catalogue import cards, create, resolve
from formarium.errors import BadInput, UnknownName
from formarium.model import Model

QUERIES = 2000  # rows of a forward
SMALL = 1_000_000  # parameters up to which "auto" is float64


class TabPFNClassifier(ClassifierMixin, BaseEstimator):
    """Classifies rows of small tables by a trained network that sees the labelled rows as its context.

    model: a run directory, a Hub repository, a model (e.g. `create("tabpfn_released")` after `load_authors`), or "tabpfn_micro", the small
        network whose weights come with the package (trained in minutes on small tables: fine for a first try).
    ensemble: views of the table that a prediction averages; more are slower and a little better. seed: of their order.
    subsample_features: tables with more columns than the network takes: a random choice of them, instead of an error.
    many_rows: more than 1024 labelled rows, for which the network wasn't trained, instead of an error.
    precision: "float32", "float64" (a row's probabilities then don't depend on its company, to 1e-9), or "auto": float64 for small
    networks.

    X: numbers, NaN where a value is missing; or a data frame, whose text and category columns become numbers in the order of their names
    (a category that `fit` hasn't seen counts as missing). y: any labels, from 2 classes to as many as the network has outputs.
    """

    def __init__(
        self,
        model: Any = "tabpfn_micro",
        ensemble: int = 3,
        seed: int = 0,
        subsample_features: bool = False,
        many_rows: bool = False,
        precision: str = "auto",
    ):
        self.model = model
        self.ensemble = ensemble
        self.seed = seed
        self.subsample_features = subsample_features
        self.many_rows = many_rows
        self.precision = precision

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def fit(self, X: Any, y: Any) -> TabPFNClassifier:
        """Keep the labelled rows. Raises BadInput (a ValueError) for one class, or more rows, columns or classes than the network takes."""
        if self.ensemble < 1:
            raise BadInput("ensemble", expected="at least 1", got=str(self.ensemble))
        if self.precision not in ("auto", "float32", "float64"):
            raise UnknownName("precision", str(self.precision), ("auto", "float32", "float64"))
        self.categories_ = _categories(X)
        X, y = validate_data(self, _encoded(X, self.categories_), y, dtype=np.float64, ensure_all_finite="allow-nan")
        y = column_or_1d(y, warn=True)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        network = network_of(self.model)
        if len(self.classes_) < 2:
            raise BadInput("y", expected="at least two classes", got="one class")
        if len(self.classes_) > network.config.max_classes:
            raise BadInput("y", expected=f"at most {network.config.max_classes} classes", got=str(len(self.classes_)))
        if X.shape[1] > network.config.num_features and not self.subsample_features:
            most = f"at most {network.config.num_features} columns"
            raise BadInput("X", expected=most, got=str(X.shape[1]), fix="choose some, or pass subsample_features=True")
        if len(X) > 1024 and not self.many_rows:
            raise BadInput("X", expected="at most 1024 labelled rows", got=str(len(X)), fix="choose some, or pass many_rows=True")
        double = self.precision == "float64" or (self.precision == "auto" and network.parameters_count <= SMALL)
        self.network_ = copy.deepcopy(network).double() if double else copy.deepcopy(network).float()
        self.network_.eval()
        self.X_, self.y_ = X, codes
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities [rows, classes], in the order of `classes_`."""
        import torch

        check_is_fitted(self)
        X = validate_data(self, _encoded(X, self.categories_), dtype=np.float64, ensure_all_finite="allow-nan", reset=False)
        settings = {"ensemble": self.ensemble, "seed": self.seed, "subsample_features": self.subsample_features}
        out = []
        with torch.no_grad():
            for start in range(0, len(X), QUERIES):
                table = np.concatenate([self.X_, X[start : start + QUERIES]]), self.y_
                logits = self.network_.logits_of([table], [len(self.classes_)], **settings)[0]
                out.append(logits.double().softmax(-1).cpu().numpy())
        return np.concatenate(out)

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row."""
        probabilities = self.predict_proba(X)
        return self.classes_[probabilities.argmax(1)]


def network_of(model: Any) -> Any:
    """A trained network from what `model` may be. Raises BadInput where it can't classify tables, or has no trained weights."""
    import formarium

    if not isinstance(model, Model):
        try:
            card, variant = resolve(str(model))
        except UnknownName:
            model = formarium.load(model)
        else:
            weights = Path(formarium.__file__).parent.joinpath(*card.module.split(".")[1:-1], f"{variant.name}.npz")
            if not weights.is_file():
                fix = "give a run directory, or a model after load_authors"
                raise BadInput(f"{variant.name}", expected="trained weights", got="a name only", fix=fix)
            model = create(variant.name)
            load_packed(model, weights)
    if not hasattr(model, "logits_of"):
        known = [c.slug for c in cards().values() if c.task == "tabular-classification"]
        raise BadInput("model", expected=f"an in-context classifier of tables ({', '.join(known)})", got=type(model).__name__)
    return model


def load_packed(model: Model, path: Path) -> None:
    """Load weights that were packed as float16."""
    import torch

    with np.load(path) as found:
        model.load_state_dict({k: torch.from_numpy(found[k].astype(np.float32)) for k in found.files})


def pack(model: Model, path: Path) -> None:
    """Write a model's weights as float16, for `load_packed`."""
    np.savez_compressed(path, **{k: v.detach().cpu().numpy().astype(np.float16) for k, v in model.state_dict().items()})


def _categories(X: Any) -> dict[Any, list[str]]:
    """The categories of each column of a data frame that holds no numbers, in the order of their names."""
    if not (hasattr(X, "columns") and hasattr(X, "dtypes") and hasattr(X, "iloc")):
        return {}
    import pandas as pd

    return {c: sorted(X[c].dropna().astype(str).unique()) for c in X.columns if not pd.api.types.is_numeric_dtype(X[c])}


def _encoded(X: Any, categories: dict[Any, list[str]]) -> Any:
    """A data frame with its categories as numbers; anything else as it is."""
    if not categories or not hasattr(X, "columns"):
        return X
    X = X.copy()
    for column, names in categories.items():
        if column in X.columns:
            number = {name: float(i) for i, name in enumerate(names)}
            missing = X[column].isna().to_numpy()
            codes = [np.nan if m else number.get(v, np.nan) for v, m in zip(X[column].astype(str), missing, strict=True)]
            X[column] = np.array(codes, dtype=float)
    return X
