import pytest

from formarium import create, fit, look
from formarium.errors import BadInput, UnknownName
from tests.engine import toys


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    toys.register(monkeypatch)


def test_a_lens_gets_the_split_snapshots_and_the_model_before(tmp_path):
    run = fit("toy_micro", toys.points(), tmp_path / "run", steps=4, snapshots=2)
    for model in (run, run.path, str(run.path)):
        numbers = look(model, "toylens", toys.points(), before="toy_micro", depth=3).numbers
        assert numbers == {"samples": 17, "before": True, "snapshots": [0, 2, 4], "depth": 3}
    model = create("toy_micro").train()
    numbers = look(model, toys.ToyLens(2), "sample:points", split="train").numbers
    assert numbers == {"samples": 48, "before": False, "snapshots": [], "depth": 2} and model.training


def test_what_cannot_be_looked_into_is_said(monkeypatch):
    with pytest.raises(UnknownName, match="toylens"):
        look("toy_micro", "toylense", toys.points())
    with pytest.raises(BadInput, match="a lens, got a model"):
        look("toy_micro", "toygan", toys.points())
    with pytest.raises(UnknownName, match=r"option of toylens is called 'dept'.*'depth'"):
        look("toy_micro", "toylens", toys.points(), dept=1)
    with pytest.raises(BadInput, match="ready-made lens"):
        look("toy_micro", toys.ToyLens(), toys.points(), depth=1)
    with pytest.raises(BadInput, match="no such split"):
        look("toy_micro", "toylens", toys.points(), split="test")
    monkeypatch.setattr(toys.ToyLens, "needs", lambda self, model: "it has no taps")
    with pytest.raises(BadInput, match=r"ToyLens on toy_micro: .*no taps"):
        look("toy_micro", "toylens", toys.points())
