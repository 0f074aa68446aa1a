import numpy as np
import pytest
import torch

import formarium
from formarium import create, evaluate
from formarium.engine import evaluation
from formarium.engine.evaluation import interval, predict_all, resampled_means
from formarium.errors import BadInput
from tests.engine import toys


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    toys.register(monkeypatch)


def test_the_whole_split_counts_whatever_the_batch_size():
    model = create("toy_micro", drop_path=0.5).train()
    with torch.no_grad():
        found = evaluate(model, toys.points(), batch_size=5)
        model.eval()
        x = torch.from_numpy(np.stack([s["x"] for s in toys.points().splits["val"]]))
        expected = (model(x) - x.sum(1)).square()
    assert found.samples == 17 == len(found.per_sample["error"]) and [len(b["id"]) for b in found.batches] == [5, 5, 5, 2]
    np.testing.assert_allclose(found.per_sample["error"], expected.numpy(), rtol=1e-5)
    assert found.metrics["error"] == pytest.approx(float(expected.mean()), rel=1e-5)
    assert evaluate(model, toys.points(), "train", bootstrap=0).samples == 48


def test_the_models_mode_and_the_random_state_are_left_alone():
    for mode in (True, False):
        model = create("toy_micro", drop_path=0.5).train(mode)
        state = torch.get_rng_state()
        found = evaluate(model, toys.points())
        assert model.training is mode and torch.equal(torch.get_rng_state(), state)
        assert not found.predictions[0].value.requires_grad and all(p.grad is None for p in model.parameters())
        assert torch.equal(evaluate(model, toys.points()).predictions[0].noise, found.predictions[0].noise)  # what it draws has the seed
        assert not torch.equal(evaluate(model, toys.points(), seed=1).predictions[0].noise, found.predictions[0].noise)
    (
        model.body[0].weight.sum() + evaluate(model, toys.points()).predictions[0].value.sum()
    ).backward()  # nothing is out of bounds for autograd


def test_what_it_holds_on_to_is_bounded(monkeypatch):
    monkeypatch.setattr(evaluation, "KEPT", 2 * 5 * 16)
    monkeypatch.setattr(toys.task, "scored", ("x",), raising=False)
    found = evaluate("toy_micro", toys.points(), batch_size=5)
    assert [[*b] for b in found.batches] == [["x", "id"], ["x", "id"], ["x"], ["x"]] and len(found.per_sample["error"]) == 17


def test_intervals_hold_the_mean_and_have_a_seed():
    values = np.array([1.0] * 80 + [0.0] * 20)
    low, high = interval(values)
    assert low < 0.8 < high and high - low == pytest.approx(2 * 1.96 * 0.04, rel=0.2)
    assert interval(values) == (low, high) != interval(values, seed=1)
    both = resampled_means(np.stack([values, 1 - values]), 250, 0)
    assert both.shape == (2, 250) and np.allclose(both.sum(0), 1)  # all rows are resampled alike
    found = evaluate("toy_micro", toys.points())
    assert found.intervals["error"][0] < found.metrics["error"] < found.intervals["error"][1]


def test_they_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = [low < 0.7 < high for low, high in (interval(rng.random(200) < 0.7, 400, seed=i) for i in range(200))]
    assert 0.9 < np.mean(hits) < 0.99


def test_what_cannot_be_scored_is_said(data):
    with pytest.raises(BadInput, match="expected train or val, got no such split"):
        evaluate("toy_micro", toys.points(), split="test")
    with pytest.raises(BadInput, match="at least one sample"):
        evaluate("toy_micro", formarium.task.Data("nothing", "toy", {"val": toys.Points()}))
    with pytest.raises(BadInput, match="num_classes = 4, as the data has, got a model with 3"):
        evaluate(create("pvt_micro", num_classes=3), data)
    with pytest.raises(BadInput, match="data for toy"):
        evaluate("pvt_micro", toys.points())
    with pytest.raises(BadInput, match="batch_size"):
        predict_all(create("toy_micro"), toys.points().splits["val"], batch_size=0)
