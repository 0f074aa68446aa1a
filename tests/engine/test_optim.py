import pytest
import torch
from torch import nn

from formarium import create
from formarium.engine.optim import Averaged, clip, gradient_norm, layers, optimiser
from formarium.engine.recipes import Recipe, make_recipe
from formarium.errors import BadInput
from formarium.tasks.image_classification.trunks import ViT


def test_weight_decay_spares_vectors_biases_and_what_the_model_names():
    model = create("pvt_micro")
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, free = (
        {names[id(p)] for p in g["params"]}
        for g in sorted(optimiser(model, Recipe(weight_decay=0.3)).param_groups, key=lambda g: -g["weight_decay"])
    )
    assert {g["weight_decay"] for g in optimiser(model, Recipe(weight_decay=0.3)).param_groups} == {0.3, 0.0}
    assert decayed | free == {*names.values()} and not decayed & free
    assert "cls_token" in free and "head.weight" in decayed and "head.bias" in free
    assert all(p.ndim > 1 for n, p in model.named_parameters() if n in decayed)


def test_only_what_is_asked_for_is_trained():
    model = create("pvt_micro")
    model.head.bias.requires_grad_(False)
    groups = optimiser(model, Recipe(), ("head.*",)).param_groups
    assert [p is model.head.weight for g in groups for p in g["params"]] == [True]
    with pytest.raises(BadInput, match="globs that match"):
        optimiser(model, Recipe(), ("haed.*",))


def test_parameters_named_by_a_glob_get_their_share_of_the_rate():
    model = create("pvt_micro")
    groups = optimiser(model, make_recipe({"lr_shares": {"head.*": 0.1}}, model.task)).param_groups
    share = {id(p): g["scale"] for g in groups for p in g["params"]}
    assert share[id(model.head.weight)] == share[id(model.head.bias)] == 0.1
    assert all(share[id(p)] == 1.0 for n, p in model.named_parameters() if not n.startswith("head."))


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_each_optimiser_goes_downhill(name):
    model = create("pvt_micro")
    o = optimiser(model, Recipe(optimizer=name, lr=1e-2, weight_decay=0.0), ("head.bias",))
    for _ in range(5):
        o.zero_grad()
        (model.head.bias - 1).square().sum().backward()
        o.step()
    assert (model.head.bias > 0).all()


def test_clipping_by_norm_is_torchs():
    ours, theirs = ([nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(5))] for _ in range(2))
    for p, q in zip(ours, theirs, strict=True):
        p.grad = torch.randn_like(p) * 3
        q.grad = p.grad.clone()
    norm = gradient_norm(ours)
    clip(ours, 0.7, "norm", norm)
    assert torch.nn.utils.clip_grad_norm_(theirs, 0.7).item() == pytest.approx(norm.item())
    assert all(torch.allclose(p.grad, q.grad) for p, q in zip(ours, theirs, strict=True))


def test_adaptive_clipping_bounds_each_unit_by_its_own_weights():
    p, b, c = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(2, 3, 5, 5))
    p.grad, b.grad, c.grad = torch.tensor([[10.0] * 4, [0.001] * 4, [1.0] * 4]), torch.ones(4), torch.ones(2, 3, 5, 5)
    clip([p, b, c], 0.1, "agc", gradient_norm([p, b, c]))
    torch.testing.assert_close(c.grad, torch.full((2, 3, 5, 5), 0.1))
    ratio = p.grad.norm(dim=1) / p.detach().norm(dim=1)
    torch.testing.assert_close(ratio, torch.tensor([0.1, 0.001, 0.1]))
    assert b.grad.norm().item() == pytest.approx(0.1 * 1e-3)  # a vector is one unit, its norm at least 1e-3


def test_a_gradient_that_is_no_number_shows_in_the_norm():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.tensor([1.0, float("nan"), 1.0])
    assert not torch.isfinite(gradient_norm([p]))


def test_averages_follow_slowly_counters_at_once():
    model = nn.BatchNorm1d(2)
    averaged = Averaged(model, 0.9)
    with torch.no_grad():
        model.weight.add_(1)
        model.num_batches_tracked.add_(5)
    averaged.update(model, 1000)
    torch.testing.assert_close(averaged.values["weight"], torch.full((2,), 1.1))
    assert averaged.values["num_batches_tracked"] == 5
    averaged.update(model, 1)  # early on it follows faster: 2 / 11
    torch.testing.assert_close(averaged.values["weight"], torch.full((2,), 2 - 0.9 * 2 / 11))


def test_layers_decay_towards_the_input():
    model = ViT(ViT.Config(image_size=32, patch_size=8, dim=24, depth=3, heads=2, num_classes=3))
    depth, layer = layers(model)
    assert depth == len(model.blocks) and layer["blocks.0." + next(n for n, _ in model.blocks[0].named_parameters())] == 1
    assert all(layer[n] == depth + 1 for n, _ in model.named_parameters() if n.startswith(("head", "norm.")))
    assert all(layer[n] == 0 for n in ("cls_token", "positions") if n in layer)
    made = optimiser(model, Recipe(lr=1.0, layer_decay=0.5))
    scale = {id(p): g["scale"] for g in made.param_groups for p in g["params"]}
    assert all(scale[id(p)] == 0.5 ** (depth + 1 - layer[n]) for n, p in model.named_parameters() if p.requires_grad)
    assert {g["scale"] for g in optimiser(model, Recipe()).param_groups} == {1.0}
    stages = layers(create("pvt_micro", num_classes=3))[1]
    assert max(v for k, v in stages.items() if k.startswith("stages.1.embed")) == 1  # one block lies before
    with pytest.raises(BadInput, match="layer_decay"):
        make_recipe({"layer_decay": 1.5}, "image-classification")
