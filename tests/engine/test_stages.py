import pytest
import torch

from formarium import create, fit
from formarium.engine.stages import spans
from formarium.errors import BadInput
from formarium.model import Stage
from tests.engine import toys
from tests.engine.conftest import equal, weights


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    toys.register(monkeypatch)


def moved(run, prefix):
    first, last = (run.snapshots()[s] for s in (0, max(run.snapshots())))
    return [not torch.equal(first[k], last[k]) for k in first if k.startswith(prefix)]


def test_turns_alternate_each_with_its_own_optimiser_and_parameters():
    run = fit("toygan_micro", toys.points(), steps=300, batch_size=16, lr=1e-2, snapshots=1, weight_decay=0.0)
    assert run.model.calls.tolist() == [600, 300]  # the critic's two a step
    for name, expected in {"critic.0.weight": True, "critic.2.weight": True, "generator": True, "body": False}.items():
        assert {*moved(run, name)} == {expected}
    row = run.history[0]
    assert {"loss_critic.loss", "loss_critic.gap", "loss_critic.penalty", "loss_generator.loss", "loss_generator.lr"} <= row.keys()
    assert row["loss_critic.lr"] == pytest.approx(1e-2) and row["loss_generator.lr"] == pytest.approx(2e-2)
    assert row["loss"] == pytest.approx(row["loss_critic.loss"] + row["loss_generator.loss"])
    made = run.model.generator(torch.randn(256, 2)).mean()
    assert abs(made - 2.0) < 0.5  # where the data are
    assert all(p.requires_grad for p in run.model.parameters())


def test_stages_follow_one_another_after_what_they_prepare():
    run = fit("toytwostage_micro", toys.points(), steps=9, snapshots=3)
    kept = run.snapshots()
    assert [*kept] == [0, 3, 6, 9] and run.model.frozen
    assert not torch.equal(kept[0]["codes"], kept[3]["codes"]) and torch.equal(kept[3]["codes"], kept[9]["codes"])
    assert torch.equal(kept[0]["prior.weight"], kept[3]["prior.weight"]) and not torch.equal(
        kept[3]["prior.weight"], kept[6]["prior.weight"]
    )
    rates = [v for _, v in run.curve("lr")]
    assert rates[0] == rates[3] == max(rates)  # each stage has the schedule for itself


@pytest.mark.parametrize("slug", ["toy", "toygan", "toytwostage"])
def test_stopped_at_any_step_they_go_on_to_the_same(slug, tmp_path, monkeypatch):
    kept = {"steps": 7, "ema": 0.8, "swap": 1.0, "drop_path": 0.3, "validations": 3, "checkpoint_seconds": 0.0, "clip_grad": 1.0}
    whole = fit(f"{slug}_micro", toys.points(), tmp_path / "whole", **kept)
    from formarium.engine.fitting import Trainer

    one_step = Trainer.one_step
    for at in range(1, 7):
        calls = []

        def dying(self, *args, calls=calls, at=at):
            calls.append(0)
            if len(calls) > at:
                raise RuntimeError("the power is gone")
            return one_step(self, *args)

        monkeypatch.setattr(Trainer, "one_step", dying)
        with pytest.raises(RuntimeError, match="power"):
            fit(f"{slug}_micro", toys.points(), tmp_path / f"{at}", **kept)
        monkeypatch.setattr(Trainer, "one_step", one_step)
        torch.manual_seed(at)  # whatever else has drawn meanwhile
        again = fit(f"{slug}_micro", toys.points(), tmp_path / f"{at}", resume=True, **kept)
        assert equal(weights(whole), weights(again))
        rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.history] for run in (whole, again)]
        assert rows[0] == rows[1]


def test_spans_share_the_steps():
    stages = [Stage("a"), Stage("b", share=2.0), Stage("c")]
    assert spans(stages, 8) == [range(2), range(2, 6), range(6, 8)]
    assert sum(map(len, spans(stages, 11))) == 11
    with pytest.raises(BadInput, match="3 stages"):
        spans(stages, 2)


def test_models_made_elsewhere_must_come_from_the_catalogue():
    with pytest.raises(BadInput, match=r"formarium\.create"):
        fit(toys.Toy(toys.Config()), toys.points(), steps=1)
    assert fit(create("toy_micro"), toys.points(), steps=1).summary["error"] >= 0
