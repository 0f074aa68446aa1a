"""shrink: size, latency and accuracy before and after, and a run that loads as it was saved."""

import pytest
import torch

import formarium
from formarium.errors import BadInput, UnknownName
from formarium.methods.llm_int8 import LLMInt8


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("shrink") / "run"
    formarium.fit("smt_micro", data, out, steps=40, batch_size=24, lr=2e-3, warmup_epochs=2, progress=False)
    return out


def test_int8_takes_fewer_bytes_and_its_run_loads_as_it_was_saved(fitted, data, tmp_path):
    found = formarium.shrink(fitted, "llm_int8", data, out=tmp_path / "int8")
    assert found.after.bytes < found.before.bytes and found.after.parameters == found.before.parameters
    assert found.after.latency_ms > 0 and abs(found.after.metrics["accuracy"] - found.before.metrics["accuracy"]) < 0.1
    rows = {r["what"]: r for r in found.rows()}
    assert rows["bytes"]["ratio"] < 0.9
    assert rows["accuracy"]["difference"] == found.after.metrics["accuracy"] - found.before.metrics["accuracy"]
    again = formarium.load(tmp_path / "int8")
    assert again.changes == found.run.model.changes and again.changes[0]["method"] == "llm_int8"
    (image,) = again.example(2)
    assert torch.equal(again(image), found.run.model(image))
    assert formarium.load(fitted).changes == []  # the model that was given is as it was


def test_lgvit_keeps_to_the_share_of_blocks_asked_for(fitted, data, tmp_path):
    found = formarium.shrink(fitted, "lgvit", data, target=0.7, steps=30, out=tmp_path / "exits", exits=2, progress=False)
    model = formarium.load(tmp_path / "exits")
    assert model.config.threshold == found.run.model.threshold == model.threshold
    said = formarium.evaluate(model, data, bootstrap=0)
    layers = torch.cat([p.layers for p in said.predictions]).float().mean() / len(model.places)
    assert layers <= 0.85  # chosen on training samples
    assert found.after.parameters > found.before.parameters


def test_bad_input(fitted, data):
    with pytest.raises(UnknownName, match="method"):
        formarium.shrink(fitted, "ofbb", data)
    with pytest.raises(UnknownName, match="option"):
        formarium.shrink(fitted, "llm_int8", data, treshold=3.0)
    with pytest.raises(BadInput, match="target"):
        formarium.shrink(fitted, "llm_int8", data, target=0.5)
    with pytest.raises(BadInput, match="target"):
        formarium.shrink(fitted, "lgvit", data, target=1.5)
    with pytest.raises(BadInput, match="ready-made"):
        formarium.shrink(fitted, LLMInt8(), data, threshold=3.0)
    with pytest.raises(BadInput, match="can change"):
        formarium.shrink(fitted, LLMInt8(include=("nothing",)), data)
