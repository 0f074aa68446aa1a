import json

import numpy as np
import pytest
import torch

import formarium
from formarium import create, evaluate, fit
from formarium.engine import runs
from formarium.engine.recipes import Recipe
from formarium.errors import BadInput, RunExists, UnknownName
from tests.engine import toys
from tests.engine.conftest import equal, weights


def test_it_learns_and_leaves_a_run_that_loads(data, tmp_path):
    run = fit("smt_micro", data, tmp_path / "run", steps=60, lr=2e-3, warmup_epochs=2, batch_size=24, snapshots=2, validations=3)
    assert run.summary["accuracy"] > 0.9
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "model.safetensors", "metrics.jsonl", "README.md", "snapshots"} <= names
    assert not any(n.endswith(".part") for n in names) and any(n.startswith("events.") for n in names)
    assert [*run.snapshots()] == [0, 30, 60] and equal(run.snapshots()[60], weights(run))
    again = formarium.load(tmp_path / "run")
    assert again.names == ["a", "b", "c", "d"] and not again.training and equal(weights(run), dict(again.state_dict()))
    assert evaluate(again, data).metrics == evaluate(run, data).metrics
    assert len(run.curve("accuracy", "val")) == 3 and run.curve("loss")[-1][0] == 60
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == run.history and [r["step"] for r in rows] == sorted(r["step"] for r in rows)


def test_tensorboard_reads_what_was_logged(data, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = fit("pvt_micro", data, tmp_path / "run", steps=3, batch_size=8)
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    assert [round(e.value, 5) for e in events.Scalars("train/loss")] == [round(v, 5) for _, v in run.curve("loss")]
    assert events.Scalars("val/accuracy")[-1].step == 3


def test_the_seed_decides(data):
    one, same, other = (weights(fit("pvt_micro", data, steps=3, seed=s, drop_path=0.2)) for s in (0, 0, 1))
    assert equal(one, same) and not equal(one, other)


def test_workers_change_nothing(data):
    one, two = (weights(fit("pvt_micro", data, steps=2, batch_size=16, workers=n)) for n in (0, 1))
    assert equal(one, two)


def test_accumulating_equals_the_whole_batch(data):
    torch.manual_seed(0)
    whole, parted = create("pvt_micro", num_classes=4), create("pvt_micro", num_classes=4)
    parted.load_state_dict(whole.state_dict())
    kept = {"steps": 3, "batch_size": 25, "optimizer": "sgd", "lr": 0.1, "clip_grad": 1.0, "label_smoothing": 0.1, "mixup": 0.5}
    a, b = fit(whole, data, **kept), fit(parted, data, accumulate=3, **kept)
    for key, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[key], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose([v for _, v in a.curve("loss")], [v for _, v in b.curve("loss")], rtol=1e-5)


def test_every_optimiser_and_augmentation_runs(data):
    for over in ({"optimizer": "sgd"}, {"optimizer": "adam", "ema": 0.9}, {"clip_grad": 0.02, "clip_mode": "agc"}):
        run = fit("pvt_micro", data, steps=2, mixup=0.8, cutmix=1.0, label_smoothing=0.1, randaugment="rand-m9-mstd0.5-inc1", **over)
        assert np.isfinite(run.history[0]["loss"])


def test_drop_path_and_classes_reach_the_model(data):
    model = fit("pvt_micro", data, steps=1, drop_path=0.3).model
    assert model.config.drop_path == 0.3 and model.config.num_classes == 4
    with pytest.raises(BadInput, match=r"formarium\.create"):
        fit(create("pvt_micro", num_classes=4), data, steps=1, drop_path=0.3)


def test_the_averaged_weights_are_the_model(monkeypatch, tmp_path):
    toys.register(monkeypatch)
    plain = fit("toy_micro", toys.points(), steps=12, snapshots=12)
    averaged = fit("toy_micro", toys.points(), tmp_path / "run", steps=12, ema=0.9, snapshots=1)
    values = {k: v.clone() for k, v in plain.snapshots()[0].items()}
    for step in range(1, 13):
        decay = min(0.9, (1 + step) / (10 + step))
        values = {k: torch.lerp(v, plain.snapshots()[step][k], 1 - decay) for k, v in values.items()}
    for key, value in weights(averaged).items():
        torch.testing.assert_close(value, values[key])
    assert equal(weights(averaged), averaged.snapshots()[12]) and equal(
        weights(averaged), dict(formarium.load(tmp_path / "run").state_dict())
    )
    assert averaged.summary == evaluate(averaged, toys.points()).metrics != plain.summary


@pytest.mark.slow
def test_compiled_it_learns_the_same(monkeypatch):
    toys.register(monkeypatch)
    plain, compiled = (fit("toy_micro", toys.points(), steps=12, compile=c) for c in (False, True))
    np.testing.assert_allclose([v for _, v in plain.curve("loss")], [v for _, v in compiled.curve("loss")], rtol=1e-3)


def test_compiling_reaches_the_forward_and_leaves_no_trace(data, monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f: lambda *args: calls.append(len(args[0])) or f(*args))
    run = fit("pvt_micro", data, steps=1, batch_size=24, compile=True)
    assert calls[0] == 24 and "forward" not in vars(run.model)


# where it starts from -----------------------------------------------------------------------------------------------


def test_it_goes_on_from_the_weights_of_a_run(monkeypatch, tmp_path):
    toys.register(monkeypatch)
    first = fit("toy_micro", toys.points(), tmp_path / "first", steps=5)
    kept = weights(first)
    second = fit(tmp_path / "first", toys.points(), steps=1, snapshots=1)
    assert equal(second.snapshots()[0], kept) and not equal(weights(second), kept)
    third = fit(first, toys.points(), steps=1, snapshots=1)
    assert equal(third.snapshots()[0], kept) and equal(weights(first), kept)  # a run isn't changed by what starts from it
    model = create("toy_micro")
    assert fit(model, toys.points(), steps=1).model is model


def test_other_data_get_another_head(data, tmp_path):
    fit("pvt_micro", data, tmp_path / "run", steps=1)
    run = fit(tmp_path / "run", "sample:digits", steps=1, snapshots=1, batch_size=8, validations=1)
    start = run.snapshots()[0]
    saved = formarium.load(tmp_path / "run").state_dict()
    assert start["head.weight"].shape[0] == 10
    assert all(torch.equal(start[k], v) for k, v in saved.items() if not k.startswith("head."))


# refusals -----------------------------------------------------------------------------------------------------------


def test_a_directory_with_another_run_is_refused(monkeypatch, tmp_path):
    toys.register(monkeypatch)
    fit("toy_micro", toys.points(), tmp_path / "run", steps=1)
    with pytest.raises(RunExists, match="--resume"):
        fit("toy_micro", toys.points(), tmp_path / "run", steps=1)
    (tmp_path / "run" / "snapshots").mkdir()
    assert fit("toy_micro", toys.points(), tmp_path / "run", steps=2, overwrite=True).config["steps"] == 2
    assert not (tmp_path / "run" / "snapshots").exists()
    with pytest.raises(RunExists, match="another recipe"):
        fit("toy_micro", toys.points(), tmp_path / "run", steps=5, resume=True)


@pytest.mark.parametrize("holds", [{"thesis.txt": "precious"}, {"config.json": '{"model_type": "bert"}', "model.safetensors": ""}])
def test_a_directory_that_is_no_run_is_never_touched(monkeypatch, tmp_path, holds):
    toys.register(monkeypatch)
    for name, text in holds.items():
        (tmp_path / name).write_text(text)
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(RunExists, match="no run"):
            fit("toy_micro", toys.points(), tmp_path, steps=1, **how)
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == holds
    with pytest.raises(BadInput, match="a file"):
        fit("toy_micro", toys.points(), next(tmp_path.iterdir()), steps=1)


def test_a_finished_run_resumes_to_itself(monkeypatch, tmp_path):
    toys.register(monkeypatch)
    first = fit("toy_micro", toys.points(), tmp_path / "run", steps=2, resume=True)  # begins where there is nothing yet
    again = fit("toy_micro", toys.points(), tmp_path / "run", steps=2, resume=True)
    assert equal(weights(first), weights(again)) and again.history == first.history and again.summary == first.summary


def test_wrong_arguments_are_said_in_one_line(data, monkeypatch):
    toys.register(monkeypatch)
    with pytest.raises(UnknownName, match="'lr'"):
        fit("pvt_micro", data, steps=1, lrr=1e-3)
    with pytest.raises(UnknownName, match="pvt_micro"):
        fit("pvt_mikro", data, steps=1)
    with pytest.raises(BadInput, match="num_classes = 4"):
        fit(create("pvt_micro", num_classes=3), data, steps=1)
    with pytest.raises(BadInput, match="bfloat16"):
        fit("pvt_micro", data, steps=1, precision="int3")
    with pytest.raises(BadInput, match="data for toy"):
        fit("pvt_micro", toys.points(), steps=1)
    with pytest.raises(BadInput, match="a model, got a lens"):
        fit("toylens", toys.points(), steps=1)
    with pytest.raises(BadInput, match="no such split"):
        fit("toy_micro", formarium.task.Data("half", "toy", {"train": toys.Points.make(3, 0)}), steps=1)
    with pytest.raises(BadInput, match="published or demo"):
        fit("pvt_micro", data, steps=1, recipe="secret")
    with pytest.raises(BadInput, match="seed"):
        fit("pvt_micro", data, steps=1, seed=-1)
    assert fit("toy_micro", "sample:points", steps=1, recipe=Recipe(batch_size=4), lr=0.5).config["recipe"]["lr"] == 0.5


# numbers that are none ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gradient_only", [False, True])
def test_a_loss_that_is_no_number_stops_the_fit_and_keeps_the_last_good_state(monkeypatch, tmp_path, gradient_only):
    toys.register(monkeypatch)
    monkeypatch.setattr(toys.ToyNaN, "gradient_only", gradient_only)
    what = "the gradient of loss" if gradient_only else "loss"
    with pytest.raises(formarium.errors.FormariumError, match=f"^{what} is (nan|inf) at step 3 .*the checkpoint of step 2 is kept$"):
        fit("toynan_micro", toys.points(), tmp_path / "run", steps=6, checkpoint_seconds=0)
    with pytest.warns(UserWarning, match="step 2 of 6"):
        kept = formarium.load(tmp_path / "run")
    assert all(v.isfinite().all() for v in kept.state_dict().values())
    assert [r["step"] for r in runs.read_metrics(tmp_path / "run" / "metrics.jsonl") if r["split"] == "train"] == [1, 2]


def test_stopped_at_a_step_it_is_whole_and_goes_on_as_if_it_had_never_stopped(data, tmp_path):
    how = {"steps": 6, "batch_size": 8, "progress": False}
    straight = formarium.fit("efficientvit_micro", data, tmp_path / "a", **how)
    stopped = formarium.fit("efficientvit_micro", data, tmp_path / "b", until=2, **how)
    assert stopped.config["stopped_at"] == 2 and stopped.summary["accuracy"] >= 0
    assert formarium.load(tmp_path / "b").variant == "efficientvit_micro"
    again = formarium.fit("efficientvit_micro", data, tmp_path / "b", until=2, resume=True, **how)
    assert again.config["stopped_at"] == 2
    formarium.fit("efficientvit_micro", data, tmp_path / "b", until=4, resume=True, **how)
    whole = formarium.fit("efficientvit_micro", data, tmp_path / "b", resume=True, **how)
    assert "stopped_at" not in whole.config and not (tmp_path / "b" / "checkpoint" / "state.pt").exists()
    for (name, x), y in zip(straight.model.state_dict().items(), whole.model.state_dict().values(), strict=True):
        assert torch.equal(x, y), name
    with pytest.raises(BadInput, match="until"):
        formarium.fit("efficientvit_micro", data, until=0, **how)
