from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import formarium
from formarium import create
from formarium.authors import authors_of, load_state
from formarium.engine.records import replay
from formarium.errors import BadInput, UnknownName
from formarium.features import trace
from formarium.methods.lgvit import (
    EarlyExit,
    GlobalAggregation,
    LGViT,
    LocalPerception,
    default_heads,
    default_places,
    sparse,
    speed_accuracy,
)
from formarium.task import task

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "lgvit").glob("*.safetensors"))


@pytest.fixture
def model() -> EarlyExit:
    torch.manual_seed(0)
    return create("lgvit_micro").eval()


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


@pytest.mark.parametrize(("name", "count"), [("vit", 100686468), ("deit", 101380104), ("swin", 96356924)])
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert create(f"lgvit_{name}_base").parameters_count == count


@torch.no_grad()
def test_claim_above_one_it_is_the_full_model_and_at_zero_the_first_exit(model):
    x = model.example(3)[0]
    every = model(x)
    model.threshold = 1.1
    for i in range(3):
        logits, layers, place = model.answer(x[i : i + 1])
        torch.testing.assert_close(logits, every.logits[i : i + 1], rtol=1e-4, atol=1e-5)
        assert (layers, place) == (6, -1)
    model.threshold = 0.0
    ran = []
    for number, block in enumerate(model.trunk.blocks):
        block.register_forward_pre_hook(lambda m, a, number=number: ran.append(number))
    logits, layers, place = model.answer(x[:1])
    torch.testing.assert_close(logits, every.exits[0, :1], rtol=1e-4, atol=1e-5)
    assert (layers, place) == (2, 0) and ran == [0, 1]  # the other four blocks never ran


@torch.no_grad()
def test_claim_fewer_layers_with_a_lower_threshold(model):
    batch = model.example_batch(16)
    means = []
    for threshold in (0.0, 0.12, 0.15, 0.2, 1.1):
        model.threshold = threshold
        means.append(model.predict(batch).layers.float().mean().item())
    assert means == sorted(means) and means[0] == 2 and means[-1] == 6


def test_claim_a_local_head_sees_three_by_three_and_a_global_one_the_strided_grid():
    torch.manual_seed(0)
    x = torch.randn(1, 64, 16)
    local, wide = LocalPerception(16, True).eval(), GlobalAggregation(16, 2)
    other = x.clone()
    other[0, 3 * 8 + 3] += 1
    moved = (local(x, (8, 8)) - local(other, (8, 8))).abs().sum(-1)[0].view(8, 8) > 1e-6
    assert moved.nonzero().tolist() == [[r, c] for r in (2, 3, 4) for c in (2, 3, 4)]
    torch.testing.assert_close(wide(x, (8, 8)), wide(other, (8, 8)))  # row 3, column 3 isn't on the grid
    assert sparse(x, (8, 8), 3).shape == (1, 9, 16)


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["entropy", "patience", "patient_and_confident"])
def test_other_ways_to_leave(model, strategy):
    model.strategy, model.patience = strategy, 2
    model.threshold = 100.0
    said = model.predict(model.example_batch(4))
    if strategy == "entropy":  # always surer than that
        assert (said.exit == 0).all()
    else:  # two exits in a row at least
        assert (said.exit != 0).all()


def test_the_first_stage_alternates_and_the_second_moves_the_exits_alone(model):
    model.train()
    batch = model.example_batch(4)
    assert {*model.loss(batch).terms} == {"final"}
    model.after_step(1, 10)
    weighted = model.loss(batch)
    out = model(model.normalise(batch["image"]))
    assert {*weighted.terms} == {"final", "exits"} and len(out.exits) == 4
    stage = model.training_stages()[1]
    assert stage.turns[0].train == ("exits.*",)
    model.freeze_trunk()
    model.train()
    assert not model.trunk.training and model.exits.training
    losses = model.distillation(batch)
    losses.total.backward()
    assert all(p.grad is None for p in model.trunk.parameters()) and all(p.grad is not None for p in model.exits.parameters())


def test_the_weights_of_the_first_stage_are_the_layers_numbers(model):
    model.after_step(1, 1)
    batch = model.example_batch(4)
    out = model(model.normalise(batch["image"]))
    ce = [F.cross_entropy(x, batch["label"]) for x in out.exits]
    wanted = (2 * ce[0] + 3 * ce[1] + 4 * ce[2] + 5 * ce[3] + 6 * F.cross_entropy(out.logits, batch["label"])) / 20
    torch.testing.assert_close(model.loss(batch).total, wanted)


@pytest.mark.parametrize("name", ["pvt_micro", "cswin_micro", "smt_micro", "tnt_micro", "efficientvit_micro", "iformer_micro"])
def test_it_goes_on_models_of_the_catalogue(name):
    torch.manual_seed(0)
    trunk = create(name).eval()
    x = trunk.example(2)
    with torch.no_grad():
        before = trunk(*x)
        if len([*trace(trunk, x, at="*blocks.*")]) < 3:
            pytest.skip("too few blocks")
        model = LGViT(exits=2).apply(trunk).eval()
        torch.testing.assert_close(model(*x).logits, before, rtol=1e-4, atol=1e-5)
        model.threshold = 0.0
        said = model.predict(model.example_batch(2))
    assert (said.layers < len(model.places)).all()
    losses = model.train().distillation(model.example_batch(4))
    assert torch.isfinite(losses.total)


def test_a_fit_is_saved_and_loaded_whole(tmp_path):
    data = task("image-classification").sample("digits")
    data = replace(data, splits={**data.splits, "val": [data.splits["val"][i] for i in range(8)]})  # answered one by one
    run = formarium.fit("lgvit_micro", data, tmp_path / "run", steps=8, progress=False, validations=1)
    assert int(run.model.steps) == 8
    again = formarium.load(tmp_path / "run")
    x = again.example(2)
    with torch.no_grad():
        torch.testing.assert_close(again(*x).exits, run.model.eval()(*x).exits)
    other = LGViT(exits=(1, 2)).apply(create("pvt_micro", num_classes=10))
    run = formarium.fit(other, data, tmp_path / "other", steps=4, lr=1e-3, batch_size=32, progress=False, validations=1)
    assert [*formarium.load(tmp_path / "other").config.exits] == [1, 2]


@pytest.mark.parametrize("variant", ["lgvit_micro", "swin"])
def test_the_authors_names_round_trip(variant):
    torch.manual_seed(0)
    small = {"trunk": "swin", "trunk_config": {"image_size": 32, "dim": 16, "depths": (2, 2, 4, 2), "heads": (1, 2, 2, 4), "window": 4}}
    own = {**small, "exits": (4, 5, 7, 9), "heads": ("conv1_1", "conv2_1", "attention_r1", "attention_r2"), "num_classes": 7}
    model, other = (create("lgvit_micro") if variant == "lgvit_micro" else create("lgvit_swin_base", **own) for _ in range(2))
    theirs = authors_of("lgvit").export_state(model)
    assert all(k.startswith(("deit.", "swin.", "classifier")) for k in theirs)
    load_state(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_defaults_are_the_papers():
    assert default_places(12, 8) == (4, 5, 6, 7, 8, 9, 10, 11)
    assert default_heads(8) == ("conv1_1",) * 2 + ("conv2_1",) * 2 + ("attention_r2",) * 2 + ("attention_r3",) * 2
    assert default_heads(4) == ("conv1_1", "conv2_1", "attention_r2", "attention_r3") and default_heads(2) == ("conv1_1", "attention_r2")


def test_bad_input():
    with pytest.raises(BadInput, match="already"):
        LGViT().apply(create("lgvit_micro"))
    with pytest.raises(BadInput, match="classifier"):
        LGViT().apply(create("pvt_tiny_pyramid"))
    with pytest.raises(UnknownName, match="strategy"):
        LGViT(strategy="hope")
    with pytest.raises(BadInput, match="exits"):
        create("lgvit_micro", exits=(2, 9), heads=())


@pytest.mark.slow
def test_it_learns_and_saves_layers_at_little_cost():
    run = formarium.fit("smt_micro", "sample:digits", epochs=8, progress=False, seed=0, validations=1)
    early = LGViT(exits=3).apply(run.model)
    run = formarium.fit(early, "sample:digits", epochs=10, lr=1e-3, batch_size=64, progress=False, seed=0, validations=1)
    rows = {r["threshold"]: r for r in speed_accuracy(run.model, "sample:digits", thresholds=(0.0, 0.8, 1.1))}
    assert rows[1.1]["accuracy"] > 0.95 and rows[1.1]["blocks"] == 1.0  # logistic regression: 0.953
    assert rows[0.8]["blocks"] < 0.7 and rows[0.8]["accuracy"] > rows[1.1]["accuracy"] - 0.02
    assert rows[0.0]["blocks"] == 0.4 and rows[0.0]["accuracy"] < rows[0.8]["accuracy"]
