"""Killed, stopped and split among processes: always the same training."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from formarium import fit
from formarium.engine import runs
from formarium.engine.progress import command_to_go_on
from tests.engine.conftest import bars_data

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from formarium import fit
from formarium.engine.fitting import Interrupted
from tests.engine.conftest import bars_data
try:
    fit("pvt_micro", bars_data(), sys.argv[1], resume=True, **eval(sys.argv[2]))
except Interrupted as e:
    print(e)
    sys.exit(e.exit_code)
"""
STEPS = 14
FIT = {
    "steps": STEPS, "batch_size": 24, "ema": 0.9, "drop_path": 0.2, "mixup": 0.5, "clip_grad": 1.0, "repeated_augmentation": 2,
    "checkpoint_seconds": 0.0, "validations": 2, "snapshots": 1,
}  # fmt: skip


def start(where, launcher=(), **changes):
    script = Path(where).parent / "train.py"
    script.write_text(SCRIPT)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, str(script), str(where), repr({**FIT, **changes})]
    return subprocess.Popen(command, env=env, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_step(process, where, step):
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if any(row["step"] >= step for row in runs.read_metrics(where / runs.METRICS)):
            return
        time.sleep(0.002)


def rows(where):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in runs.read_metrics(where / runs.METRICS)]


def test_killed_and_stopped_at_any_moment_it_goes_on_to_the_same_weights(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    process = start(cut)
    fit("pvt_micro", bars_data(), whole, **FIT)
    wait_for_step(process, cut, 2)
    time.sleep(random.random() * 0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (cut / runs.WEIGHTS).exists()

    process = start(cut, checkpoint_seconds=1000.0)  # goes on, and has its next checkpoint from Ctrl-C
    wait_for_step(process, cut, 8)
    process.send_signal(signal.SIGINT)
    said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert f"of {STEPS}; go on with the same call of fit" in said and "resume=True" in said
    step = int(said.split("stopped at step ")[1].split()[0])
    assert 8 <= step < STEPS
    assert torch.load(cut / runs.STATE, weights_only=True)["step"] == step == rows(cut)[-1]["step"]
    assert "Traceback" not in errors and "\x1b" not in errors  # no bar where there is no terminal

    run = fit("pvt_micro", bars_data(), cut, resume=True, **FIT)
    assert not (cut / runs.STATE).exists() and not [*cut.rglob("*.part")]
    for file in (runs.WEIGHTS, f"snapshots/{STEPS}.safetensors"):
        found, expected = load_file(cut / file), load_file(whole / file)
        assert found.keys() == expected.keys() and all(torch.equal(found[k], expected[k]) for k in expected)
    assert rows(cut) == rows(whole) and run.config["seconds"] > 0


def test_two_processes_have_the_loss_curve_of_one(tmp_path):
    same = {"drop_path": 0.0, "steps": 8, "accumulate": 2, "cutmix": 1.0}
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start(tmp_path / "two", launcher, **same)
    one = fit("pvt_micro", bars_data(), tmp_path / "one", **{**FIT, **same})
    _, errors = process.communicate(timeout=180)
    assert process.returncode == 0, errors[-3000:]
    two = runs.load_run(tmp_path / "two")
    losses = [[v for _, v in run.curve("loss")] for run in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 8
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    for key, value in one.model.state_dict().items():
        torch.testing.assert_close(value, two.model.state_dict()[key], rtol=1e-3, atol=1e-4)
    assert one.summary.keys() == two.summary.keys() and two.config["data"]["sizes"] == {"train": 96, "val": 40}
    assert len([p for p in (tmp_path / "two").iterdir() if p.name.startswith("events.")]) == 1  # only the first process writes


def test_the_command_to_go_on_is_the_one_that_was_given(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["/env/bin/formarium", "fit", "pvt_micro", "my photos", "--out", "runs/a", "--overwrite"])
    assert command_to_go_on(Path("runs/a")) == "go on with: formarium fit pvt_micro 'my photos' --out runs/a --resume"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(sys, "argv", ["/env/formarium/__main__.py", "fit", "pvt_micro", "photos", "--resume"])
    assert command_to_go_on(Path("a")) == "go on with: torchrun --nproc-per-node 2 -m formarium fit pvt_micro photos --resume"
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert command_to_go_on(Path("a")) == "go on with the same call of fit, with out='a' and resume=True"
    assert "nothing was kept" in command_to_go_on(None)
