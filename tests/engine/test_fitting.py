import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import formarium
from formarium import create, evaluate, fit
from formarium.engine import precision, runs
from formarium.engine.evaluation import interval
from formarium.engine.fitting import Diverged
from formarium.engine.loader import Order, parts, share
from formarium.engine.optim import Averaged, clip, learning_rate, optimiser
from formarium.engine.recipes import Recipe, make_recipe, recipe_for
from formarium.errors import BadCheckpoint, BadInput, RunExists, UnknownName
from formarium.model import Losses, Stage, Turn
from formarium.tasks.image_classification.model import ImageClassifier


def weights(run):
    return {k: v.clone() for k, v in run.model.state_dict().items()}


def equal(a, b):
    return all(torch.equal(a[k], b[k]) for k in a) and a.keys() == b.keys()


# learning and leaving a run -----------------------------------------------------------------------------------------


def test_it_learns_and_leaves_a_run_that_loads(data, tmp_path):
    run = fit("smt_micro", data, tmp_path / "run", steps=60, lr=2e-3, warmup_epochs=2, batch_size=24, snapshots=2, validations=3)
    assert run.summary["accuracy"] > 0.9
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {"config.json", "model.safetensors", "metrics.jsonl", "README.md", "snapshots"} <= names
    assert [*run.snapshots()] == [0, 30, 60] and any(n.startswith("events.") for n in names)
    again = formarium.load(tmp_path / "run")
    assert again.names == ["a", "b", "c", "d"] and not again.training and equal(weights(run), dict(again.state_dict()))
    assert evaluate(again, data).metrics == evaluate(run, data).metrics
    assert len(run.curve("accuracy", "val")) == 3 and run.curve("loss")[-1][0] == 60
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == run.history and [r["step"] for r in rows] == sorted(r["step"] for r in rows)


def test_the_seed_decides(data):
    one, same, other = (weights(fit("pvt_micro", data, steps=3, seed=s)) for s in (0, 0, 1))
    assert equal(one, same) and not equal(one, other)


def test_accumulating_equals_the_whole_batch(data):
    torch.manual_seed(0)
    whole, parted = create("pvt_micro", num_classes=4), create("pvt_micro", num_classes=4)
    parted.load_state_dict(whole.state_dict())
    kept = {"steps": 3, "batch_size": 24, "optimizer": "sgd", "lr": 0.1}
    a, b = weights(fit(whole, data, **kept)), weights(fit(parted, data, accumulate=3, **kept))
    for key in a:
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=1e-5)


def test_every_optimiser_ema_and_augmentation_runs(data):
    for over in ({"optimizer": "sgd"}, {"optimizer": "adam", "ema": 0.9}, {"clip_grad": 0.02, "clip_mode": "agc"}):
        run = fit("pvt_micro", data, steps=2, mixup=0.8, cutmix=1.0, label_smoothing=0.1, randaugment="rand-m9-mstd0.5-inc1", **over)
        assert np.isfinite(run.history[0]["loss"])


def test_drop_path_and_classes_reach_the_model(data):
    model = fit("pvt_micro", data, steps=1, drop_path=0.3).model
    assert model.config.drop_path == 0.3 and model.config.num_classes == 4


# interruption -------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
from tests.engine.conftest import bars
from formarium.task import Data
from formarium import fit
data = Data("bars", "image-classification", {{"train": bars(96, 0), "val": bars(40, 1)}}, {{"num_classes": 4}}, list("abcd"), [], {{}})
run = fit("pvt_micro", data, sys.argv[1], steps=14, batch_size=24, ema=0.9, drop_path=0.2, mixup=0.5, resume=True,
          checkpoint_seconds=0.0, validations=2, snapshots=1)
"""


def start(where, **env):
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(tests=root), str(where)], env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root,
    )  # fmt: skip


def step_of(where) -> int:
    rows = [*runs.read_metrics(where / runs.METRICS)]
    return rows[-1]["step"] if rows else 0


def test_killed_at_any_moment_and_resumed_it_ends_the_same(tmp_path):
    process = start(tmp_path / "whole")
    assert process.wait(120) == 0, process.stderr.read()
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    cut = tmp_path / "cut"
    for target in (2, 7):
        process = start(cut)
        deadline = time.monotonic() + 90
        while step_of(cut) < target and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (cut / "model.safetensors").exists()
    process = start(cut)
    assert process.wait(120) == 0, process.stderr.read()
    found = load_file(cut / "model.safetensors")
    assert all(torch.equal(found[k], expected[k]) for k in expected)
    histories = [[{k: v for k, v in r.items() if k != "seconds"} for r in runs.read_metrics(d / runs.METRICS)] for d in (cut, tmp_path / "whole")]
    assert histories[0] == histories[1]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    process = start(tmp_path / "run")
    deadline = time.monotonic() + 90
    while step_of(tmp_path / "run") < 2 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0 and re.search(r"stopped at step \d+ of 14; .*--resume goes on from there", said)
    assert (tmp_path / "run" / "checkpoint" / "state.pt").exists()


@pytest.mark.parametrize("processes", [2])
def test_two_processes_have_the_loss_curve_of_one(tmp_path, processes):
    script = tmp_path / "train.py"
    root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
    script.write_text(
        SCRIPT.format(tests=root).replace("ema=0.9, drop_path=0.2, mixup=0.5, ", "mixup=0.5, ").replace("snapshots=1", "snapshots=0")
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    one = subprocess.run([sys.executable, str(script), str(tmp_path / "one")], env=env, capture_output=True, text=True, timeout=120)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script), str(tmp_path / "two")]
    two = subprocess.run(command, env=env, capture_output=True, text=True, timeout=180)
    assert one.returncode == 0 and two.returncode == 0, two.stderr[-3000:]
    losses = [[r["loss"] for r in runs.read_metrics(tmp_path / d / runs.METRICS) if r["split"] == "train"] for d in ("one", "two")]
    assert len(losses[0]) == 14
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


# refusals -----------------------------------------------------------------------------------------------------------


def test_a_directory_with_another_run_is_refused(data, tmp_path):
    fit("pvt_micro", data, tmp_path / "run", steps=1)
    with pytest.raises(RunExists, match="--resume"):
        fit("pvt_micro", data, tmp_path / "run", steps=1)
    assert fit("pvt_micro", data, tmp_path / "run", steps=2, overwrite=True).config["steps"] == 2
    with pytest.raises(RunExists, match="another"):
        fit("pvt_micro", data, tmp_path / "run", steps=5, resume=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    with pytest.raises(RunExists, match="other files"):
        fit("pvt_micro", data, tmp_path / "mine", steps=1, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_a_finished_run_resumes_to_itself(data, tmp_path):
    first = fit("pvt_micro", data, tmp_path / "run", steps=2)
    again = fit("pvt_micro", data, tmp_path / "run", steps=2, resume=True)
    assert equal(weights(first), weights(again))


def test_wrong_arguments_are_said_in_one_line(data):
    with pytest.raises(UnknownName, match="'lr'"):
        fit("pvt_micro", data, steps=1, lrr=1e-3)
    with pytest.raises(BadInput, match="num_classes = 4"):
        fit(create("pvt_micro", num_classes=3), data, steps=1)
    with pytest.raises(BadInput, match="bfloat16"):
        fit("pvt_micro", data, steps=1, precision="int3")
    with pytest.raises(BadInput, match="positive"):
        fit("pvt_micro", data, batch_size=0)
    with pytest.raises(BadInput, match="no such split"):
        evaluate(create("pvt_micro", num_classes=4), data, split="test")


def test_a_loss_that_is_no_number_stops_the_fit(data, tmp_path):
    model = create("pvt_micro", num_classes=4)
    with torch.no_grad():
        model.head.weight.fill_(float("inf"))
    with pytest.raises(Diverged, match="at step 1"):
        fit(model, data, tmp_path / "run", steps=3)


def test_runs_that_cannot_be_loaded_say_why(data, tmp_path):
    with pytest.raises(BadInput, match="neither"):
        formarium.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"config\.json"):
        formarium.load(tmp_path / "empty")
    fit("pvt_micro", data, tmp_path / "run", steps=1)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["config"]["num_classes"] = 7
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadCheckpoint, match=r"head\.bias"):
        formarium.load(tmp_path / "run")


# stages and turns ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PairConfig:
    in_channels: int = 3
    num_classes: int = 4
    image_size: int = 32


class Pair(ImageClassifier):
    """Two stages: a codebook-like trunk alone, then trunk and critic in turns."""

    Config = PairConfig

    def __init__(self, config):
        super().__init__(config)
        self.trunk, self.critic = nn.Linear(3, 4), nn.Linear(3, 4)
        self.prepared = 0

    def forward(self, image):
        return self.trunk(image.mean((2, 3)))

    def training_stages(self):
        turns = (Turn("loss", ("trunk.*",)), Turn("loss_critic", ("critic.*",), repeats=3, recipe={"lr": 0.5, "optimizer": "sgd"}))
        return (Stage("first", (Turn("loss", ("trunk.*",)),)), Stage("second", turns, share=3, prepare="begin_second"))

    def begin_second(self):
        self.prepared += 1

    def loss_critic(self, batch):
        out = self.critic(batch["image"].mean((2, 3)))
        return Losses((out - 1).square().mean(), {"distance": (out - 1).square().mean()})


def test_stages_run_in_order_and_turns_move_their_own_parameters(data):
    model = Pair(PairConfig())
    model.adopt(formarium.card("pvt"), "pvt_micro", {"size": 32, "crop": 1.0})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = fit(model, data, steps=8, recipe=Recipe(lr=0.01, batch_size=24))
    trained = [r for r in run.history if r["split"] == "train"]
    assert model.prepared == 1 and "distance" not in trained[1] and "loss_critic.distance" in trained[2]
    assert trained[-1]["loss_critic.loss"] < trained[2]["loss_critic.loss"]
    assert all((model.state_dict()[k] != before[k]).any() for k in ("trunk.weight", "critic.weight"))


# the pieces ---------------------------------------------------------------------------------------------------------


def test_an_epoch_sees_each_sample_once_and_any_step_can_be_asked_for():
    order = Order(10, 3, seed=0)
    keys = [order.batch(s) for s in range(6)]
    assert order.per_epoch == 3 and len({i for k in keys[:3] for _, i in k}) == 9 and {e for k in keys[3:] for e, _ in k} == {1}
    assert order.batch(4) == keys[4] and Order(10, 3, seed=1).batch(4) != keys[4]
    assert len(Order(2, 64, 0).batch(5)) == 2


def test_shares_and_parts_cover_the_batch():
    batch = {"x": torch.arange(6), "id": [*"abcdef"]}
    assert sorted([*share(batch, 0, 2)["x"].tolist(), *share(batch, 1, 2)["x"].tolist()]) == [*range(6)]
    assert sum(w for _, w in parts(batch, 4)) == pytest.approx(1) and torch.cat([p["x"] for p, _ in parts(batch, 4)]).tolist() == [*range(6)]
    with pytest.raises(BadInput, match="4 processes"):
        share(batch, 0, 4)


def test_the_schedule_warms_up_and_ends_at_its_floor():
    recipe = Recipe(lr=1.0, min_lr=0.1, warmup_lr=0.0, warmup_epochs=1)
    rates = [learning_rate(recipe, s, 100, 10) for s in range(100)]
    assert rates[9] == pytest.approx(1.0) and rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=1e-3)


def test_weight_decay_spares_vectors_and_what_the_model_names():
    groups = optimiser(create("pvt_micro"), Recipe()).param_groups
    spared = {id(p) for p in groups[1]["params"]}
    model = create("pvt_micro")
    spared_names = {n for n, p in model.named_parameters() if p.ndim <= 1} | {"cls_token"}
    assert groups[1]["weight_decay"] == 0 and len(spared) == len(spared_names)
    with pytest.raises(BadInput, match="adamw"):
        optimiser(model, Recipe(optimizer="magic"))


def test_adaptive_clipping_bounds_each_unit():
    p = nn.Parameter(torch.ones(3, 4))
    p.grad = torch.tensor([[10.0] * 4, [0.001] * 4, [1.0] * 4])
    clip([p], 0.1, "agc")
    ratio = p.grad.norm(dim=1) / p.detach().norm(dim=1)
    assert ratio.max() <= 0.1 + 1e-6 and p.grad[1, 0].item() == pytest.approx(0.001)


def test_averages_follow_slowly():
    model = nn.Linear(2, 2)
    averaged = Averaged(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1)
    for step in range(200):
        averaged.update(model, step)
    torch.testing.assert_close(averaged.values["weight"], model.weight.detach())


def test_recipes_come_from_the_cards():
    card = formarium.card("pvt")
    published = recipe_for(card, card.variants["pvt_tiny"])
    assert published.epochs == 300 and published.augment["crop_scale"] == (0.08, 1.0)
    assert recipe_for(card, card.variants["pvt_tiny"], batch_size=512).lr == pytest.approx(published.lr / 2)
    assert recipe_for(card, card.variants["pvt_micro"]).augment == {"shift": 2}
    assert recipe_for(card, card.variants["pvt_large"]).drop_path == 0.3
    assert make_recipe(published.as_dict(), "image-classification") == published


def test_bootstrap_intervals_hold_the_mean():
    values = np.array([1.0] * 80 + [0.0] * 20)
    low, high = interval(values)
    assert low < 0.8 < high and high - low == pytest.approx(2 * 1.96 * 0.04, rel=0.2) and interval(values) == (low, high)


# precision ----------------------------------------------------------------------------------------------------------


def test_auto_takes_bfloat16_only_where_it_is_native(monkeypatch):
    monkeypatch.setattr(precision, "has_native_bf16", lambda device="cpu": True)
    assert precision.resolve("auto") == "bfloat16"
    monkeypatch.setattr(precision, "has_native_bf16", lambda device="cpu": False)
    assert precision.resolve("auto") == "float32" and precision.resolve("bf16") == "bfloat16"


@pytest.mark.parametrize("harm", [0.0, 0.02])
def test_auto_goes_back_to_float32_where_bfloat16_costs_too_much(data, monkeypatch, harm):
    from formarium.engine.fitting import Trainer

    monkeypatch.setattr("formarium.engine.fitting.resolve", lambda asked, device="cpu": "bfloat16")
    measured = {"float32": 0.9, "bfloat16": 0.9 - harm}
    plain = Trainer.measure
    monkeypatch.setattr(Trainer, "measure", lambda self, most, how=None: {"accuracy": measured[how]} if how else plain(self, most))
    run = fit("pvt_micro", data, steps=1, validations=1)
    assert run.config["precision"]["predict"] == ("float32" if harm else "bfloat16") == run.model.precision
    assert run.config["precision"]["train"] == "bfloat16"


# the hub ------------------------------------------------------------------------------------------------------------


def test_a_run_goes_to_the_hub_and_comes_back(data, tmp_path, monkeypatch):
    import huggingface_hub

    run = fit("pvt_micro", data, tmp_path / "run", steps=1)
    sent = {}

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            return f"hub/{repo_id}"

        def upload_folder(self, **kwargs):
            sent.update(kwargs)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert run.push_to_hub("me/bars") == "hub/me/bars"
    assert sent["folder_path"] == str(tmp_path / "run") and "checkpoint/*" in sent["ignore_patterns"]
    assert "library_name: formarium" in (tmp_path / "run" / "README.md").read_text()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, allow_patterns: str(tmp_path / "run"))
    assert equal(dict(formarium.load("me/bars").state_dict()), weights(run))
    assert equal(dict(formarium.load("hf://me/bars").state_dict()), weights(run))
