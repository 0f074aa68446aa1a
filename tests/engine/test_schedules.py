import math

import pytest
import torch

import formarium
from formarium.engine.recipes import Recipe
from formarium.engine.schedules import Plateau, learning_rate, momentum
from formarium.errors import BadInput, UnknownName


def rates(steps=100, per_epoch=10, **recipe):
    return [learning_rate(Recipe(**{"lr": 1.0, "min_lr": 0.0, **recipe}), s, steps, per_epoch) for s in range(steps)]


def torchs(make, steps):
    """What torch's own scheduler gives, step by step."""
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler, out = make(optimiser), []
    for _ in range(steps):
        out.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        scheduler.step()
    return out


def test_a_cosine_warms_up_and_ends_at_its_floor():
    found = rates(min_lr=0.1, warmup_lr=0.0, warmup_epochs=1)
    assert found[0] == pytest.approx(0.1) and found[9] == pytest.approx(1.0)
    assert found[:10] == sorted(found[:10]) and found[10:] == sorted(found[10:], reverse=True)
    assert found[55] == pytest.approx(0.55) and found[-1] == pytest.approx(0.1, abs=1e-3)
    assert learning_rate(Recipe(lr=1.0, warmup_epochs=50), 4, 10, 10) == pytest.approx(1.0)  # at most half of the steps


@pytest.mark.parametrize(
    ("recipe", "make"),
    [
        ({}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100)),
        ({"schedule": "constant"}, lambda o: torch.optim.lr_scheduler.ConstantLR(o, factor=1.0)),
        ({"schedule": "poly", "power": 0.9}, lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 100, 0.9)),
        (
            {"schedule": "step", "milestones": (0.5, 0.8), "factor": 0.5},
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [50, 80], 0.5),
        ),
        (
            {"schedule": "exponential", "factor": 0.95},
            lambda o: torch.optim.lr_scheduler.StepLR(o, 10, 0.95),  # once an epoch
        ),
    ],
    ids=["cosine", "constant", "poly", "step", "exponential"],
)
def test_schedules_are_torchs(recipe, make):
    assert rates(**recipe) == pytest.approx(torchs(make, 100), abs=1e-12)


def test_noam_is_the_inverse_square_root_and_its_extension_holds_the_peak():
    found = rates(schedule="noam", power=0.5, warmup_epochs=2)
    assert found[19] == 1.0 and found[80] == pytest.approx(math.sqrt(20 / 80))
    held = rates(schedule="noam", power=1.0, warmup_epochs=2, hold_epochs=4)
    assert held[19:61] == [1.0] * 42 and held[80] == pytest.approx(20 / (80 - 40))


def test_wsd_is_stable_and_then_decays():
    found = rates(schedule="wsd", warmup_epochs=1, decay_share=0.2)
    assert found[9:81] == [1.0] * 72 and found[90] == pytest.approx(0.5) and found[80:] == sorted(found[80:], reverse=True)


def test_one_cycle_moves_rate_and_momentum_against_each_other():
    recipe = Recipe(lr=1.0, min_lr=0.0, warmup_lr=0.1, warmup_epochs=4, schedule="one_cycle", cycle_momentum=(0.95, 0.85))
    rate, beta = ([f(recipe, s, 100, 10) for s in range(100)] for f in (learning_rate, momentum))
    assert rate[39] == pytest.approx(1.0) and beta[39] == pytest.approx(0.85)
    assert rate[:40] == sorted(rate[:40]) and rate[40:] == sorted(rate[40:], reverse=True)
    assert beta[-1] == pytest.approx(0.95, abs=1e-3) and beta[:40] == sorted(beta[:40], reverse=True)
    assert momentum(Recipe(), 3, 100, 10) is None


def test_a_plateau_is_torchs():
    recipe, metrics = Recipe(schedule="plateau", factor=0.5, patience=2), [3.0, 2.0, 2.5, 2.4, 2.2, 1.9, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimiser, "min", factor=0.5, patience=2, threshold=0.0)
    ours = Plateau(recipe, higher_is_better=False)
    for epoch, metric in enumerate(metrics, start=1):
        ours.see(metric, epoch)
        theirs.step(metric)
        assert ours.scale == optimiser.param_groups[0]["lr"]
    assert ours.scale == 0.125
    later = Plateau(recipe.with_(hold_epochs=9), higher_is_better=False)
    for epoch, metric in enumerate(metrics, start=1):
        later.see(metric, epoch)
    assert later.scale == 0.25  # without the cut after epoch 5


def test_a_fit_cuts_its_rate_on_a_plateau_and_resumes_to_the_same(tmp_path):
    how = {
        "schedule": "plateau",
        "patience": 0,
        "factor": 0.5,
        "lr": 1e-9,
        "min_lr": 0.0,
        "warmup_epochs": 0,
        "epochs": 4,
        "batch_size": 64,
    }
    whole = formarium.fit("pvt_micro", "sample:digits", tmp_path / "whole", **how)
    cut = [row["lr"] for row in whole.history if row["split"] == "train"]
    assert cut[0] == 1e-9 and cut[-1] <= 5e-10  # nothing gets better at such a rate
    steps = whole.config["steps"]
    formarium.fit("pvt_micro", "sample:digits", tmp_path / "parts", until=steps // 2 + 3, **how)
    parts = formarium.fit("pvt_micro", "sample:digits", tmp_path / "parts", resume=True, **how)
    same = [(a, b) for a, b in zip(whole.model.state_dict().values(), parts.model.state_dict().values(), strict=True)]
    assert all(torch.equal(a, b) for a, b in same)
    assert [r["lr"] for r in parts.history if r["split"] == "train"][-1] == cut[-1]


def test_a_schedule_that_cannot_be_is_told():
    with pytest.raises(UnknownName, match="schedule"):
        Recipe().with_(schedule="cosin")
    for bad in ({"schedule": "step"}, {"schedule": "step", "milestones": (250000,)}):
        with pytest.raises(BadInput, match="milestones"):
            Recipe().with_(**bad)
    with pytest.raises(BadInput, match="factor"):
        Recipe().with_(factor=0)
