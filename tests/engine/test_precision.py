import json

import pytest
import torch

import formarium
from formarium import create, fit
from formarium.engine import precision
from formarium.engine.fitting import Trainer
from formarium.errors import BadInput
from tests.engine import toys


@pytest.fixture
def native(monkeypatch):
    monkeypatch.setattr(precision, "has_native_bf16", lambda device="cpu": True)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(precision, "has_native_bf16", lambda device="cpu": False)


def test_auto_takes_bfloat16_only_where_it_is_native(native):
    assert precision.resolve("auto") == "bfloat16"


def test_auto_is_float32_elsewhere(emulated):
    assert precision.resolve("auto") == "float32" and precision.resolve("bf16-mixed") == "bfloat16"
    with pytest.raises(BadInput, match="auto, float32 or bfloat16"):
        precision.resolve("float8")


@pytest.mark.parametrize(
    ("flags", "seconds", "expected"),
    [
        ("avx2 fma", {}, False),  # never timed: it would take minutes where it is emulated
        ("avx512f avx512_bf16", {torch.bfloat16: 1.0, torch.float32: 2.0}, True),
        ("amx_bf16", {torch.bfloat16: 1.0, torch.float32: 2.0}, True),
        ("fp asimd bf16", {torch.bfloat16: 1.0, torch.float32: 2.0}, True),
        ("avx512_bf16", {torch.bfloat16: 3.0, torch.float32: 2.0}, False),  # says so, but isn't faster
    ],
)
def test_the_processor_is_asked_and_then_timed(monkeypatch, tmp_path, flags, seconds, expected):
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags : {flags}\n")
    monkeypatch.setattr(precision, "Path", lambda name: tmp_path / "cpuinfo")
    monkeypatch.setattr(precision.platform, "system", lambda: "Linux")
    monkeypatch.setattr(precision, "matmul_seconds", seconds.__getitem__)
    assert precision.has_native_bf16.__wrapped__("cpu") is expected


def test_matrix_products_are_timed_here():
    assert 0 < precision.matmul_seconds(torch.float32, n=64) < 1
    assert precision.has_native_bf16("cuda") is torch.cuda.is_available() and not precision.has_native_bf16("mps")


@pytest.mark.parametrize("harm", [0.0, 0.02])
def test_auto_goes_back_to_float32_where_bfloat16_costs_too_much(monkeypatch, tmp_path, native, harm):
    toys.register(monkeypatch)
    measured = {"float32": 0.9, "bfloat16": 0.9 + harm}  # an error: lower is better
    plain = Trainer.measure
    asked = []
    monkeypatch.setattr(
        Trainer, "measure", lambda self, most, how=None: asked.append(most) or {"error": measured[how]} if how else plain(self, most)
    )
    run = fit("toy_micro", toys.points(), tmp_path / "run", steps=1)
    said = json.loads((tmp_path / "run" / "config.json").read_text())["precision"]
    expected = "float32" if harm else "bfloat16"
    assert said == {
        "asked": "auto", "train": "bfloat16", "predict": expected, "metric": "error", "float32": 0.9, "bfloat16": 0.9 + harm, "samples": 17
    }  # fmt: skip
    assert asked == [512, 512] and run.model.precision == expected
    again = formarium.load(tmp_path / "run")
    assert precision.resolve_for(again, "auto") == expected and precision.resolve_for(again, "bfloat16") == "bfloat16"
    monkeypatch.setattr(precision, "has_native_bf16", lambda device="cpu": False)
    assert precision.resolve_for(again, "auto") == "float32"  # wherever it is loaded


def test_what_was_never_checked_stays_in_float32(monkeypatch, tmp_path, emulated):
    toys.register(monkeypatch)
    run = fit("toy_micro", toys.points(), steps=1)
    assert run.config["precision"] == {"asked": "auto", "train": "float32", "predict": "float32"}
    monkeypatch.setattr(precision, "has_native_bf16", lambda device="cpu": True)
    assert precision.resolve_for(run.model, "auto") == "float32" and precision.resolve_for(create("toy_micro"), "auto") == "bfloat16"


def test_a_fit_in_bfloat16_computes_in_it_and_keeps_float32_weights(monkeypatch):
    toys.register(monkeypatch)
    seen = set()

    def watched(self, x):
        out = self.body(x)
        seen.add((self.training, out.dtype))
        return out[:, 0]

    monkeypatch.setattr(toys.Toy, "forward", watched)
    run = fit("toy_micro", toys.points(), steps=2, precision="bfloat16", accumulate=2)
    assert seen == {(True, torch.bfloat16), (False, torch.bfloat16)}
    assert {p.dtype for p in run.model.parameters()} == {torch.float32} and run.config["precision"]["predict"] == "bfloat16"
    seen.clear()
    fit("toy_micro", toys.points(), steps=1, precision="float32")
    assert {d for _, d in seen} == {torch.float32}
