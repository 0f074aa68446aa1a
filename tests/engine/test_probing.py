"""The linear probe: what it finds, that it changes nothing, what it refuses."""

import pytest
import torch

import formarium
from formarium.engine.probing import linear_probe
from formarium.errors import BadInput


def test_a_probe_finds_more_than_chance_in_random_features_and_changes_nothing():
    torch.manual_seed(0)
    model = formarium.create("smt_micro", num_classes=10).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = linear_probe(model, "sample:digits", samples=300)
    assert 0.3 < first <= 1
    assert linear_probe(model, "sample:digits", samples=300) == first
    assert model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_bad_input():
    model = formarium.create("smt_micro", num_classes=10)
    with pytest.raises(BadInput, match="tap"):
        linear_probe(model, "sample:digits", at="nowhere*", samples=100)
    with pytest.raises(BadInput, match="split"):
        linear_probe(model, "sample:digits", split="other")
