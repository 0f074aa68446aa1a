from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import formarium
from formarium import create
from formarium.authors import authors_of, load_state
from formarium.catalogue import card
from formarium.engine.recipes import Recipe
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.features import trace
from formarium.methods.path_ensemble import Ensemble, PathEnsemble, high_frequency_share, influence, prune, removal, stream_of
from formarium.task import task

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "path_ensemble").glob("*.safetensors"))
BACKBONES = card("path_ensemble").demo["backbones"]


@pytest.fixture
def model() -> Ensemble:
    torch.manual_seed(0)
    return create("path_ensemble_micro").eval()


def scaled(model: Ensemble) -> Ensemble:
    with torch.no_grad():
        model.scales.add_(0.3 * torch.randn_like(model.scales))
    return model


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == 5717416


@pytest.mark.parametrize(("name", "dim", "count"), [("tiny", 192, 5717416), ("small", 384, 22050664), ("base", 768, 86567656)])
def test_parameter_counts_grow_by_a_vector_a_path(name, dim, count):
    with torch.device("meta"):
        assert create(f"path_ensemble_deit_{name}").parameters_count == count
        assert create(f"path_ensemble_deit_{name}", scale=True).parameters_count == count + 25 * dim


@torch.no_grad()
def test_claim_the_paths_sum_up_to_what_the_last_norm_reads(model):
    x = model.example(2)[0]
    paths = model.paths(x)
    assert paths.paths.shape[0] == model.count == 9 and model.kinds[:3] == ["embedding", "attention", "feed-forward"]
    stream = trace(model.trunk, x, at="blocks.3")["blocks.3"].tokens
    torch.testing.assert_close(paths.paths.sum(0), stream, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(paths.paths[0], trace(model.trunk, x, at="tokens")["tokens"].tokens)
    assert torch.equal(model(x), model.trunk(x)) and torch.equal(paths.logits, model.trunk(x))


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
def test_claim_it_is_the_plain_model_on_every_backbone(name):
    torch.manual_seed(0)
    trunk = create(name).eval()
    x = trunk.example(2)[0]
    plain = trunk(x)
    model = PathEnsemble().apply(trunk).eval()
    paths = model.paths(x)
    assert torch.equal(model(x), plain) and model.count > 1
    torch.testing.assert_close(paths.paths.sum(0), paths.ensemble, rtol=1e-5, atol=1e-5)
    scaled(model)
    changed = model(x)
    assert not torch.allclose(changed, plain, atol=1e-5)
    with torch.enable_grad():
        losses = model.train().loss(model.example_batch(4))
        losses.total.backward()
    assert model.scales.grad.abs().sum() > 0
    model.keep[:] = False  # an empty ensemble: every image gets the same answer
    torch.testing.assert_close(*model.eval()(x).unbind(0), rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_claim_what_leaves_the_ensemble_still_feeds_later_paths(model):
    x = model.example(2)[0]
    before = model.paths(x).paths
    model.keep[3] = False
    scaled(model)
    assert torch.equal(model.paths(x).paths, before)
    wanted = torch.einsum("pbc,pc->bc", before[:, :, 0], model.weights())
    torch.testing.assert_close(model(x), model.trunk.head(model.trunk.norm(wanted)), rtol=1e-4, atol=1e-5)
    assert model.weights()[3].abs().max() == 0


def test_claim_the_gradient_of_a_scale_is_the_upstream_one_times_its_path(model):
    x = model.example(2)[0]
    paths = model.paths(x)
    end = paths.ensemble[:, 0].detach().requires_grad_()
    model.trunk.head(model.trunk.norm(end)).square().sum().backward()
    model(x).square().sum().backward()
    wanted = (end.grad * paths.paths[:, :, 0]).sum(1)
    torch.testing.assert_close(model.scales.grad, wanted, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_common_factor_is_invisible_behind_the_norm(model):
    x = model.example(2)[0]
    plain = model(x)
    model.scales.mul_(3.0)
    torch.testing.assert_close(model(x), plain, rtol=1e-3, atol=1e-4)


def test_prefixes_learn_from_the_whole_which_does_not(model):
    scaled(model)
    batch = model.example_batch(4)
    image = model.normalise(batch["image"])
    whole, prefixes = model.prefix_logits(image)
    paths, weights = model.paths(image).paths, model.weights()
    torch.testing.assert_close(whole, model(image))
    assert model.depths() == [1, 2, 3]
    for depth, logits in zip(model.depths(), prefixes, strict=True):
        part = torch.einsum("pbc,pc->bc", paths[: 1 + 2 * depth, :, 0], weights[: 1 + 2 * depth])
        torch.testing.assert_close(logits, model.trunk.head(model.trunk.norm(part)), rtol=1e-4, atol=1e-5)
    losses = model.loss(batch)
    kl = [(whole.softmax(-1) * (whole.log_softmax(-1) - p.log_softmax(-1))).sum(-1).mean() for p in prefixes]
    torch.testing.assert_close(losses.total, F.cross_entropy(whole, batch["label"]) + 0.5 * torch.stack(kl).mean())
    (grad,) = torch.autograd.grad(losses.terms["self_distillation"], model.scales)
    assert grad[7:].abs().max() == 0 and grad[0].abs().max() > 0  # the last block is in no prefix, so nothing of the teacher moves


def test_drop_path_makes_the_paths_of_training_random():
    torch.manual_seed(0)
    model = create("path_ensemble_micro", trunk_config={**create("path_ensemble_micro").config.trunk_config, "drop_path": 0.5}).train()
    x = model.example(4)[0]
    assert (model.paths(x).paths[-1] == 0).flatten(1).all(1).any() or not torch.equal(model.paths(x).paths, model.paths(x).paths)
    assert model.no_weight_decay() >= {"scales", "trunk.cls_token"}


@torch.no_grad()
def test_pruning_drops_what_hurts_and_no_more(model):
    batches = [model.example_batch(16, seed=i) for i in range(2)]
    torch.nn.init.normal_(model.trunk.head.weight)
    accuracy, loss = removal(model, batches)
    rows = influence(model, batches)
    assert len(accuracy) == 10 and [r["kind"] for r in rows] == model.kinds
    assert rows[4]["loss"] == pytest.approx(float(loss[5] - loss[0]))
    dropped = prune(model, batches, share=0.25, by="loss")
    assert len(dropped) <= 2 and dropped[0]["gain"] == pytest.approx(float((loss[0] - loss[1:]).max()))
    assert int((~model.keep).sum()) == len(dropped)
    after = removal(model, batches)[1]
    assert after[0] < loss[0] and after[1 + dropped[0]["path"]] == pytest.approx(float(after[0]), abs=1e-6)
    plain, own = high_frequency_share(model, model.example(2)[0])
    assert 0 < plain < 1 and 0 < own < 1
    with pytest.raises(BadInput, match="accuracy"):
        prune(model, batches, by="luck")


def test_a_fit_prunes_and_is_saved_and_loaded_whole(tmp_path):
    data = task("image-classification").sample("digits")
    data = replace(data, splits={k: [v[i] for i in range(64)] for k, v in data.splits.items()})
    trunk = create("cswin_micro", num_classes=10)
    model = PathEnsemble().apply(trunk)
    assert [s.name for s in model.training_stages()] == ["train", "prune and fine-tune"]
    run = formarium.fit(model, data, tmp_path / "run", recipe=Recipe(steps=8, batch_size=16), progress=False, validations=1)
    again = formarium.load(tmp_path / "run")
    assert torch.equal(again.keep, run.model.keep) and again.branches == (2, 2)
    x = again.example(2)[0]
    with torch.no_grad():
        assert torch.equal(again(x), run.model.eval()(x)) and not torch.equal(again(x), again.trunk(x))


def test_the_names_of_the_base_network_round_trip(model):
    theirs = authors_of("path_ensemble").export_state(model)
    assert {"blocks.0.attn.qkv.weight", "blocks.3.mlp.fc2.bias", "cls_token", "head.weight", "norm.bias", "patch_embed.proj.bias"} <= {
        *theirs
    }
    other = create("path_ensemble_micro")
    load_state(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_bad_input():
    assert "branches follow" in stream_of(create("crossvit_micro")).why
    with pytest.raises(BadInput, match="branches follow"):
        PathEnsemble().apply(create("crossvit_micro"))
    with pytest.raises(BadInput, match="already"):
        PathEnsemble().apply(create("path_ensemble_micro"))
    with pytest.raises(BadInput, match="prune"):
        PathEnsemble(prune=1.5)
    with pytest.raises(BadInput, match="branches"):
        create("path_ensemble_micro", branches=(2,) * 7)


@pytest.mark.slow
def test_it_learns_and_costs_nothing():
    recipe = Recipe(epochs=14, lr=2e-3, warmup_epochs=1, augment={"shift": 2})
    run = formarium.fit("path_ensemble_smt_micro", "sample:digits", recipe=recipe, progress=False, seed=0, validations=1)
    assert run.summary["accuracy"] > 0.96  # logistic regression: 0.953
