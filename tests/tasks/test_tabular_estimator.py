import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_breast_cancer, load_iris, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from formarium import create
from formarium.errors import BadInput, UnknownName
from formarium.tasks.tabular_classification.estimator import TabPFNClassifier


@parametrize_with_checks([TabPFNClassifier()])
def test_scikit_learn_takes_it_for_one_of_its_own(estimator, check):
    check(estimator)


def test_it_beats_the_majority_far_on_iris_and_gives_probabilities():
    x, y = load_iris(return_X_y=True)
    names = load_iris().target_names[y]
    a, b, c, d = train_test_split(x, names, test_size=0.5, stratify=names, random_state=0)
    model = TabPFNClassifier().fit(a, c)
    assert model.score(b, d) > 0.85 and model.classes_.tolist() == ["setosa", "versicolor", "virginica"]
    p = model.predict_proba(b)
    np.testing.assert_allclose(p.sum(1), 1)
    np.testing.assert_allclose(model.predict_proba(b[:3]), p[:3], atol=1e-9)
    assert cross_val_score(TabPFNClassifier(ensemble=1), x, y, cv=3).mean() > 0.8


@pytest.mark.parametrize("load", [load_wine, load_breast_cancer])
def test_it_comes_near_logistic_regression_on_tables_of_many_columns(load):
    x, y = load(return_X_y=True)
    told, rival = [], []
    for seed in range(3):
        a, b, c, d = train_test_split(x, y, test_size=0.5, stratify=y, random_state=seed)
        told.append(TabPFNClassifier().fit(a, c).score(b, d))
        rival.append(make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(a, c).score(b, d))
    assert np.mean(told) > np.mean(rival) - 0.04 and np.mean(told) > 0.93


def test_data_frames_with_text_and_missing_values():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"size": rng.standard_normal(80), "colour": rng.choice(["red", "blue"], 80)})
    y = (frame["colour"] == "red").to_numpy()
    frame.loc[3, "colour"] = None
    frame.loc[7, "size"] = np.nan
    model = TabPFNClassifier().fit(frame[:60], y[:60])
    assert model.score(frame[60:], y[60:]) > 0.9 and model.feature_names_in_.tolist() == ["size", "colour"]
    new = pd.DataFrame({"size": [0.1], "colour": ["green"]})  # not seen by fit: counts as missing
    assert np.isfinite(model.predict_proba(new)).all()


def test_another_precision_and_more_views_say_nearly_the_same():
    x, y = load_iris(return_X_y=True)
    a, b = (TabPFNClassifier(precision=p).fit(x[::2], y[::2]).predict_proba(x[1::2]) for p in ("float32", "float64"))
    np.testing.assert_allclose(a, b, atol=1e-4)
    other = TabPFNClassifier(ensemble=8, seed=3).fit(x[::2], y[::2]).predict(x[1::2])
    assert (other == y[1::2]).mean() > 0.85


@pytest.mark.parametrize(
    ("make", "x", "y", "says"),
    [
        ({}, np.ones((4, 2)), [1, 1, 1, 1], "two classes"),
        ({}, np.random.rand(22, 2), [*range(11)] * 2, "at most 10 classes"),
        ({}, np.random.rand(20, 33), [0, 1] * 10, "at most 32 columns, got 33"),
        ({}, np.random.rand(1026, 2), [0, 1] * 513, "at most 1024 labelled rows"),
        ({"model": "tabpfn_released"}, np.random.rand(4, 2), [0, 1, 0, 1], "trained weights"),
        ({"model": "no/such-run/here"}, np.random.rand(4, 2), [0, 1, 0, 1], "expected a run directory"),
        ({"model": create("pvt_micro")}, np.random.rand(4, 2), [0, 1, 0, 1], "an in-context classifier"),
        ({"ensemble": 0}, np.random.rand(4, 2), [0, 1, 0, 1], "at least 1"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_line(make, x, y, says):
    with pytest.raises(BadInput, match=says) as caught:
        TabPFNClassifier(**make).fit(x, y)
    assert "\n" not in str(caught.value)


def test_more_than_it_was_made_for_where_asked():
    rng = np.random.default_rng(0)
    wide, y = rng.standard_normal((40, 40)), np.arange(40) % 2
    assert TabPFNClassifier(subsample_features=True, ensemble=1).fit(wide, y).predict(wide).shape == (40,)
    long = rng.standard_normal((1100, 2))
    assert TabPFNClassifier(many_rows=True, ensemble=1).fit(long, long[:, 0] > 0).score(long[:50], long[:50, 0] > 0) > 0.85
    with pytest.raises(UnknownName, match="float32"):
        TabPFNClassifier(precision="float16").fit(wide, y)


def test_a_model_in_memory_does_as_well():
    x, y = load_iris(return_X_y=True)
    assert TabPFNClassifier(model=create("tabpfn_micro"), ensemble=1).fit(x, y).predict_proba(x).shape == (150, 3)
