import copy
from pathlib import Path

import numpy as np
import pytest
import torch

import formarium
from formarium import create
from formarium.authors import authors_of, load_state
from formarium.engine.records import replay
from formarium.engine.runs import save
from formarium.errors import BadInput, UnknownName
from formarium.methods.brain_predictivity import Neurons, brain_score, gabor_bank, predictivity, simulate
from formarium.methods.brainscore_crossvit import EPS, RATES, STEP, BrainScoreCrossViT, RobustClassifier, robustness
from formarium.nn.attacks import quarter_turns
from formarium.tasks.image_classification.trunks import ViT

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "brainscore_crossvit").glob("*.safetensors"))
BACKBONES = formarium.card("brainscore_crossvit").demo["backbones"]


@pytest.fixture
def model() -> RobustClassifier:
    torch.manual_seed(0)
    return create("brainscore_crossvit_micro").train()


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


def test_every_published_variant_has_the_published_parameters():
    card = formarium.card("brainscore_crossvit")
    with torch.device("meta"):
        for name, variant in card.published.items():
            assert create(name).parameters_count == variant.parameters, name


# the claim ----------------------------------------------------------------------------------------------------------


def test_claim_the_noise_stays_within_eps_and_raises_the_loss():
    torch.manual_seed(0)
    model = create("brainscore_crossvit_micro", eps=EPS, step=STEP).train()
    higher = 0
    for seed in range(12):
        batch = model.example_batch(4, seed)
        image = model.perturbed(batch)
        assert (image - batch["image"]).abs().max() <= EPS + 1e-6 and image.min() >= 0 and image.max() <= 1
        start = (batch["image"] + torch.empty_like(image).uniform_(-EPS, EPS)).clamp(0, 1)
        with torch.no_grad():
            higher += bool(model.trunk.loss({**batch, "image": image}).total >= model.trunk.loss({**batch, "image": start}).total)
    assert higher >= 11
    assert STEP > EPS and all(p.grad is None for p in model.parameters())


def test_claim_turns_are_uniform_over_four_angles():
    model = create("brainscore_crossvit_micro", adversarial=False).train()
    image = torch.rand(1, 3, 32, 32).repeat(4000, 1, 1, 1)
    torch.manual_seed(0)
    out = model.turned(image)
    angles = [quarter_turns(image[:1], torch.tensor([k]))[0] for k in range(4)]
    counts = np.array([sum(torch.equal(o, a) for o in out) for a in angles])
    assert counts.sum() == 4000 and (abs(counts - 1000) < 150).all()
    wide = torch.rand(50, 3, 16, 32)
    assert all(torch.equal(o, x) or torch.equal(o, x.flip(1, 2)) for o, x in zip(model.turned(wide), wide, strict=True))


def test_claim_with_eps_zero_the_update_is_ordinary_training(model):
    model = create("brainscore_crossvit_micro", eps=0.0, step=0.1, rotations=False).train()
    batch = model.example_batch(4)
    a, b = model.loss(batch).total, model.trunk.loss(batch).total
    assert torch.equal(a, b)
    plain = create("brainscore_crossvit_micro", adversarial=False, rotations=False).train()
    assert torch.equal(plain.loss(batch).total, plain.trunk.loss(batch).total)
    model.eval()
    assert torch.equal(model.loss(batch).total, model.trunk.loss(batch).total)


# pitfalls -----------------------------------------------------------------------------------------------------------


def test_pitfall_normalisation_happens_after_the_perturbation(model):
    seen = []
    model.trunk.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    batch = model.example_batch(2)
    model.loss({**batch, "image": torch.ones_like(batch["image"])})  # white: saturated above, noise can only darken
    low, high = (model.normalise(torch.full((1, 3, 1, 1), v)) for v in (1 - 0.1 - 1e-6, 1 + 1e-6))
    assert len(seen) == 2 and all((x >= low).all() and (x <= high).all() for x in seen)
    model.set_preprocessing({"mean": [0.5] * 3, "std": [0.25] * 3})
    assert torch.equal(model.trunk.mean, model.mean) and torch.equal(model.trunk.std, model.std)


def test_pitfall_the_learning_rate_is_piecewise_linear(model):
    model.begin()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-4)
    seen = []
    for step in range(13):
        seen.append((optimiser.step(), optimiser.param_groups[0]["lr"])[1])
        model.after_step(step + 1, 12)
    expected = [8e-5, 1.4e-4, 2e-4, 1.5e-4, 1e-4, 7.5e-5, 5e-5, 3.75e-5, 2.5e-5, 1.875e-5, 1.25e-5, 9.375e-6, 6.25e-6]
    assert seen == pytest.approx(expected) and len(RATES) == 7
    plain = create("brainscore_crossvit_micro", rates=())
    plain.begin()
    assert plain._schedule is None


def test_pitfall_timm_names_its_tokens_otherwise(model):
    theirs = authors_of("brainscore_crossvit").export_state(model)
    assert {"cls_token_0", "pos_embed_1", "head.0.weight", "blocks.0.fusion.0.attn.wq.weight"} <= {*theirs}
    other = create("brainscore_crossvit_micro")
    load_state(other, theirs)
    ibm = {k.replace("token_", "token.").replace("embed_", "embed.") if k[-2] == "_" else k: v for k, v in theirs.items()}
    load_state(create("brainscore_crossvit_micro"), ibm)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_greyscale_and_bad_options():
    model = create("brainscore_crossvit_micro", adversarial=False, rotations=False, grey=1.0).train()
    out = model.turned(torch.rand(3, 3, 8, 8))
    assert torch.allclose(out[:, 0], out[:, 2])
    for wrong in ({"eps": -1.0}, {"grey": 2.0}):
        with pytest.raises(BadInput):
            create("brainscore_crossvit_micro", **wrong)
    with pytest.raises(BadInput, match="already"):
        BrainScoreCrossViT().apply(model)


# on any backbone ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*BACKBONES, "vit"])
def test_any_backbone_trains_robustly_saves_and_loads(name, tmp_path):
    torch.manual_seed(0)
    vit = ViT.Config(image_size=32, patch_size=8, dim=32, depth=1, heads=2, num_classes=10)
    plain = ViT(vit) if name == "vit" else create(name, num_classes=10)
    model = BrainScoreCrossViT(eps=8).apply(plain).train()
    assert model.trunk is plain and model.config.step == pytest.approx(10 / 255)
    loss = model.loss(model.example_batch(3)).total
    loss.backward()
    assert loss.isfinite() and any(p.grad is not None for p in plain.parameters())
    save(model, tmp_path / "run")
    again = formarium.load(tmp_path / "run")
    x = model.example(2)[0]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), model.eval()(x))
        torch.testing.assert_close(model(x), plain(x))
    theirs = authors_of("brainscore_crossvit").export_state(model)
    load_state(again, theirs)


def test_a_fit_runs_by_name_and_measures_robustness():
    run = formarium.fit(
        "brainscore_crossvit_micro", "sample:digits", recipe="published", steps=3, batch_size=16, progress=False, validations=1
    )
    found = robustness(run.model, "sample:digits", eps=0.05, iterations=2, samples=40)
    assert {*found} == {"clean", "90", "180", "270", "fgsm", "pgd"} and all(0 <= v <= 1 for v in found.values())
    assert found["pgd"] <= found["clean"] and found == robustness(run.model, "sample:digits", eps=0.05, iterations=2, samples=40)
    with pytest.raises(BadInput):
        robustness(run.model, "sample:digits", iterations=0)


# neurons ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def neurons() -> Neurons:
    from formarium.task import task

    data = task("image-classification").sample("textures").splits["train"]
    images = torch.from_numpy(data.images[::8]).permute(0, 3, 1, 2).float() / 255
    return simulate(images, neurons=24)


def test_the_ceiling_is_what_a_perfect_model_reaches(neurons):
    clean = simulate(neurons.images, neurons=24, reliability=1.0)
    assert (clean.ceiling == 1).all() and np.allclose(neurons.ceiling, np.sqrt(0.6))
    r = [np.corrcoef(a, b)[0, 1] for a, b in zip(clean.responses.T, neurons.responses.T, strict=True)]
    assert abs(np.median(r) - np.sqrt(0.6)) < 0.05
    bank = gabor_bank(11)
    np.testing.assert_allclose(bank.mean((2, 3)), 0, atol=1e-12)
    with pytest.raises(BadInput):
        simulate(neurons.images, reliability=0)


@pytest.mark.parametrize("method", ["pls", "ridge"])
def test_features_that_hold_the_answer_beat_pixels_and_noise(neurons, method):
    rng = np.random.default_rng(0)
    clean = simulate(neurons.images, neurons=24, reliability=1.0).responses
    width = (clean @ rng.normal(size=(24, 40))) + 0.1 * rng.normal(size=(len(clean), 40))
    pixels = torch.nn.functional.avg_pool2d(neurons.images, 2).flatten(1).double().numpy()
    good, poor, none = (predictivity(x, neurons, method=method) for x in (width, pixels, rng.normal(size=(len(clean), 40))))
    assert good > 0.85 and good > poor + 0.1 and abs(none) < 0.2


def test_layers_of_a_model_have_scores(neurons):
    scores = brain_score(create("brainscore_crossvit_micro"), neurons, method="ridge")
    assert len(scores) >= 2 and all(np.isfinite(v) for v in scores.values())
    with pytest.raises(BadInput):
        brain_score(create("brainscore_crossvit_micro"), neurons, at="nothing")
    with pytest.raises(UnknownName):
        predictivity(np.zeros((len(neurons.images), 2)), neurons, method="lasso")
    with pytest.raises(BadInput):
        predictivity(np.zeros((3, 2)), neurons)


@pytest.mark.slow
def test_joint_training_stays_right_when_turned_and_attacked():
    torch.manual_seed(0)
    plain = formarium.fit("smt_micro", "sample:digits", steps=200, progress=False, validations=1)
    torch.manual_seed(0)
    made = BrainScoreCrossViT(eps=25.5).apply(copy.deepcopy(plain.model))  # from a trained network, as in the paper; fresh ones collapse
    how = {"lr": 2e-3, "weight_decay": 0.0, "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "hflip": 0.0}
    joint = formarium.fit(made, "sample:digits", steps=200, recipe="published", progress=False, validations=1, **how)
    a, b = (robustness(r.model, "sample:digits", eps=0.1, samples=200) for r in (plain, joint))
    assert all(b[k] > a[k] + 0.2 for k in ("90", "270")) and b["pgd"] > a["pgd"] + 0.2 and b["clean"] > 0.8, (a, b)
