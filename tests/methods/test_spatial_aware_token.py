import tomllib
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import formarium
from formarium import create
from formarium.authors import authors_of, load_state
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.features import trace
from formarium.methods import spatial_aware_token
from formarium.methods.spatial_aware_token import (
    SAT,
    PooledConvolution,
    area_loss,
    foreground,
    gated_attention,
    gated_block,
    mean_map,
    normalisation_loss,
    smoothing_kernel,
)
from formarium.task import task
from formarium.tasks.image_classification.trunks import ViT

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "spatial_aware_token").glob("*.safetensors"))
CARD = tomllib.loads(Path(spatial_aware_token.__file__).with_suffix(".toml").read_text())


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = create("spatial_aware_token_micro")
    for p in made.parameters():  # so that gates differ by place
        if p.requires_grad and p.ndim > 1:
            p.data.mul_(4)
    return made.eval()


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


@pytest.mark.parametrize(("name", "count"), [("tiny", 5870609), ("small", 22357841), ("small_imagenet", 25123441), ("base", 87182801)])
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert create(f"spatial_aware_token_{name}").parameters_count == count


def qkv(heads=3, tokens=7, width=4):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, tokens, width, generator=g) for _ in range(3)]


def test_claim_gated_rows_sum_to_the_mass_that_the_gates_leave():
    q, k, v = qkv()
    m = foreground(q[:, :, :1], k)
    attention = (q @ k.transpose(-2, -1) / 2).softmax(-1) * m[:, None]
    torch.testing.assert_close(gated_attention(q, k, v, m), attention @ v)
    assert (attention.sum(-1) < 1).all()
    torch.testing.assert_close(gated_attention(q, k, v, torch.ones_like(m)), F.scaled_dot_product_attention(q, k, v))
    rows = (q[:, :, :1] @ k.transpose(-2, -1) / 2).sigmoid()
    assert not torch.allclose(m, rows.mean(1))  # heads are averaged before the sigmoid
    ones = torch.ones(2, 3, 7, 1)
    torch.testing.assert_close(gated_attention(q, k, ones, m), attention.sum(-1, keepdim=True))


@torch.no_grad()
def test_claim_gates_of_one_leave_the_plain_vit(model, monkeypatch):
    x = model.example(2)[0]
    gated = model(x)
    monkeypatch.setattr(spatial_aware_token, "foreground", lambda q, k: torch.ones(k.shape[0], 1, k.shape[2]))
    open_ = model(x)
    own = model.trunk
    tokens, grid = own.embedded(x)
    token = (model.spatial_token + model.spatial_position).expand(2, -1, -1)
    y = torch.cat([tokens, token], 1)  # the released order: the spatial token last
    for block in own.blocks:
        y = y + block.attention(block.norm1(y))
        y = y + block.mlp(block.norm2(y))
    patches = own.norm(y)[:, 1:-1].transpose(1, 2).unflatten(2, grid)
    torch.testing.assert_close(open_.logits, nn.Conv2d.forward(model.classifier, patches).mean((2, 3)), rtol=1e-4, atol=1e-4)
    assert (open_.map == 1).all() and not torch.allclose(gated.logits, open_.logits, atol=1e-3)


def test_claim_the_area_loss_does_not_mind_which_image_has_the_foreground():
    maps = torch.rand(4, 14, 14)
    moved = maps.clone()
    moved[0, :5, :5], moved[3, 2:7, 2:7] = maps[3, 2:7, 2:7], maps[0, :5, :5]
    torch.testing.assert_close(area_loss(maps, 0.25), area_loss(moved, 0.25))
    assert area_loss(torch.full((2, 3, 3), 0.25), 0.25) == 0


def test_the_map_is_the_mean_over_the_gated_blocks_alone(model, monkeypatch):
    seen = []
    monkeypatch.setattr(spatial_aware_token, "foreground", lambda q, k: (seen.append(foreground(q, k)), seen[-1])[1])
    out = model(model.example(2)[0])
    assert len(seen) == 3  # of four blocks
    torch.testing.assert_close(out.map, torch.stack([m[:, 0, 2:].unflatten(1, (14, 14)) for m in seen]).mean(0))


def test_the_classification_loss_teaches_the_gates(model, monkeypatch):
    gates = []

    def watch(q, k):
        gates.append(foreground(q, k))
        gates[-1].retain_grad()
        return gates[-1]

    monkeypatch.setattr(spatial_aware_token, "foreground", watch)
    F.cross_entropy(model(model.example(2)[0]).logits, torch.tensor([0, 1])).backward()
    assert len(gates) == 3 and all(m.grad.abs().sum() > 0 for m in gates) and model.spatial_token.grad.abs().sum() > 0


def test_the_pooled_convolution_is_the_mean_of_the_whole_one():
    torch.manual_seed(0)
    x, layer = torch.randn(2, 8, 5, 7, requires_grad=True), PooledConvolution(8, 3)
    mean = nn.Conv2d.forward(layer, x).mean((2, 3))
    torch.testing.assert_close(layer(x), mean)
    a, b = (torch.autograd.grad(y.square().sum(), (x, layer.weight)) for y in (layer(x), mean))
    torch.testing.assert_close(a, b)


def test_the_smoothing_kernel_and_the_normalisation_loss():
    kernel = smoothing_kernel()
    torch.testing.assert_close(kernel[0, 0, :2, :2], torch.tensor([[0.0026285, 0.0460116], [0.0460116, 0.8054397]]), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(kernel.sum(), torch.tensor(1.0))
    sure, unsure = torch.zeros(1, 8, 8), torch.full((1, 8, 8), 0.5)
    assert normalisation_loss(sure, kernel) == 0 and normalisation_loss(unsure, kernel) > 0.24
    model = create("spatial_aware_token_micro")
    assert not model.kernel.requires_grad and "kernel" in dict(model.named_parameters())


def test_the_objective_is_the_sum_of_its_three_parts(model):
    batch = model.example_batch(4)
    losses, out = model.loss(batch), model(model.normalise(batch["image"]))
    wanted = F.cross_entropy(out.logits, batch["label"]) + (out.map.mean() - 0.25).abs() + normalisation_loss(out.map, model.kernel)
    torch.testing.assert_close(losses.total, wanted)
    first, second = model.training_stages()
    assert first.turns[0].loss == "classification" and second.turns[0].loss == "loss" and first.share == 0.3
    assert {*model.classification(batch).terms} == {"classification"}
    assert len(create("spatial_aware_token_micro", warm_up=0.0).training_stages()) == 1


@torch.no_grad()
def test_other_image_sizes_and_taps(model):
    out = model(torch.randn(1, 3, 48, 72))
    assert out.map.shape == (1, 12, 18) and out.logits.shape == (1, 4)
    read = trace(model, model.example(2), at="trunk.blocks.*")
    assert all(f.prefix == 2 and f.map().shape == (2, 48, 14, 14) for f in read.values()) and len(read) == 6
    said = model.predict(model.example_batch(3))
    assert said.box.shape == (3, 4) and (said.box[:, 2:] > said.box[:, :2]).all() and said.box.max() <= 56
    torch.testing.assert_close(said.probabilities.sum(-1), torch.ones(3))
    before = said.box
    model.threshold = 0.9
    assert not torch.equal(model.predict(model.example_batch(3)).box, before)


@pytest.mark.parametrize("name", CARD["demo"]["backbones"])
def test_it_goes_on_models_of_the_catalogue(name):
    torch.manual_seed(0)
    trunk = create(name, num_classes=4).eval()
    x = trunk.example(2)[0]
    with torch.no_grad():
        before = trunk(x)
    model = SAT(area=0.3).apply(trunk).eval()
    assert model.task == "object-localisation" and model.config.trunk == name
    with torch.no_grad():
        for query in model.queries:
            query.query.weight.zero_()
        torch.testing.assert_close(model(x).logits, before, rtol=1e-3, atol=1e-4)  # a query that knows nothing changes nothing
        for query in model.queries:
            nn.init.normal_(query.query.weight)
            nn.init.normal_(query.kv.weight)
        out = model(x)
    assert out.map.shape[1] * out.map.shape[2] >= 16 and out.map.min() >= 0 and out.map.max() <= 1
    assert not torch.allclose(out.logits, before, atol=1e-3)
    losses = model.train().loss(model.example_batch(4))
    losses.total.backward()
    assert all(q.query.weight.grad.abs().sum() > 0 and q.token.grad is not None for q in model.queries)


def test_the_classification_loss_reaches_every_query():
    for name in CARD["demo"]["backbones"]:
        model = SAT().apply(create(name)).train()
        model.classification(model.example_batch(4)).total.backward()
        assert all(q.query.weight.grad.abs().sum() > 0 for q in model.queries), name


def test_a_vit_keeps_its_weights_and_gets_the_papers_classifier():
    torch.manual_seed(0)
    trunk = ViT(ViT.Config(image_size=32, patch_size=8, dim=32, depth=4, heads=2, num_classes=5, distilled=True))
    model = SAT(gated=2).apply(trunk)
    assert not hasattr(model.trunk, "head") and torch.equal(model.trunk.blocks[3].mlp.fc1.weight, trunk.blocks[3].mlp.fc1.weight)
    assert model.prefix == 2 and model(model.example(2)[0]).logits.shape == (2, 5)


def test_a_fit_is_saved_and_loaded_whole(tmp_path):
    for name in ("spatial_aware_token_micro", "pvt_micro"):
        start = name if name.startswith("spatial") else SAT(warm_up=0.5).apply(create(name, num_classes=4))
        run = formarium.fit(
            start, "sample:textured-objects", tmp_path / name, steps=2, lr=1e-3, batch_size=4, progress=False, validations=1
        )
        again = formarium.load(tmp_path / name)
        x = again.example(2)[0]
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(x), run.model.eval()(x))


def test_the_authors_names_round_trip():
    torch.manual_seed(0)
    model, other = create("spatial_aware_token_micro"), create("spatial_aware_token_micro")
    theirs = authors_of("spatial_aware_token").export_state(model)
    assert {"cls_token", "loc_token", "loc_embed", "weight", "head.weight", "blocks.3.attn.proj.bias", "patch_embed.proj.weight"} <= {
        *theirs
    }
    load_state(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    deit = {k: v for k, v in theirs.items() if not k.startswith(("loc_", "weight", "head"))}
    deit |= {"head.weight": torch.zeros(1000, 48), "head.bias": torch.zeros(1000)}
    load_state(create("spatial_aware_token_micro"), deit, skip=("classifier.*", "spatial_*", "kernel"))


def test_maps_of_several_grids_are_averaged_on_the_finest():
    fine, coarse = torch.rand(2, 8, 8), torch.full((2, 2, 2), 0.5)
    torch.testing.assert_close(mean_map([coarse, fine]), (fine + 0.5) / 2)


def test_a_gated_block_is_the_block_with_less_mass():
    torch.manual_seed(0)
    block = create("spatial_aware_token_micro").trunk.blocks[0].eval()
    x = torch.randn(2, 11, 48)
    y, m = gated_block(block, x, (3, 3), 1)
    assert y.shape == x.shape and m.shape == (2, 11) and ((m > 0) & (m < 1)).all()
    assert not torch.allclose(y, block(x, (3, 3)))
    torch.testing.assert_close(gated_block(block, x, (3, 3), 1, gate=False)[0], block(x, (3, 3)))
    asked = create("spatial_aware_token_micro", gated=1, mapped=3).eval()
    assert asked(asked.example(1)[0]).map.shape == (1, 14, 14)


def test_bad_input():
    with pytest.raises(BadInput, match="already"):
        SAT().apply(create("spatial_aware_token_micro"))
    with pytest.raises(BadInput, match="classifier"):
        SAT().apply(create("pvt_tiny_pyramid"))
    with pytest.raises(BadInput, match="16 places"):
        SAT().apply(create("arbex_micro"))
    with pytest.raises(BadInput, match="warm_up"):
        SAT(warm_up=1.0).apply(create("pvt_micro"))
    with pytest.raises(BadInput, match="gated"):
        create("spatial_aware_token_micro", gated=9)


@pytest.mark.slow
def test_it_learns_where_from_labels_alone():
    run = formarium.fit("spatial_aware_token_micro", "sample:textured-objects", progress=False, seed=0, validations=1)
    seen = formarium.evaluate(run, "sample:textured-objects").metrics
    rival = task("object-localisation").baseline(task("object-localisation").sample("textured-objects"))[1]
    assert seen["accuracy"] > 0.9 and seen["gt_known_loc"] > rival["gt_known_loc"] + 0.1
