from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import formarium
from formarium import create
from formarium.authors import authors_of, load_state
from formarium.authors.phikon_v2 import to_huggingface
from formarium.engine.records import replay
from formarium.errors import BadInput, UnknownName
from formarium.features import taps
from formarium.models.image.phikon_v2 import ABMIL, Config, PhikonSlides, PhikonV2, dinov2_losses, fold_of

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "phikon_v2").glob("*.safetensors"))
SLOW = [pytest.param(p, marks=[pytest.mark.slow] if p.stem.endswith("large") else [], id=p.stem) for p in RECORDS]


@pytest.fixture
def slides() -> PhikonSlides:
    torch.manual_seed(0)
    return create("phikon_v2_micro").eval()


@pytest.fixture
def tiles() -> PhikonV2:
    torch.manual_seed(0)
    return create("phikon_v2_tile_micro").train()


@pytest.mark.parametrize("path", SLOW)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters in (None, outcome.expected_parameters)


# slides -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_claim_neither_the_order_of_tiles_nor_padding_counts(slides):
    batch = slides.example_batch(3)
    p = slides.predict(batch).probabilities
    order = torch.randperm(8)
    real = batch["mask"][0].sum()
    mixed = {**batch, "tiles": batch["tiles"][:, order], "mask": batch["mask"][:, order]}
    torch.testing.assert_close(slides.predict(mixed).probabilities, p)
    padded = {**batch, "tiles": torch.cat([batch["tiles"], torch.rand(3, 5, 3, 32, 32)], 1)}
    padded["mask"] = torch.cat([batch["mask"], torch.zeros(3, 5, dtype=torch.bool)], 1)
    out = slides.predict(padded)
    torch.testing.assert_close(out.probabilities, p)
    assert not out.attention[:, 8:].any() and real == 8
    torch.testing.assert_close(out.attention.sum(1), torch.ones(3))


@torch.no_grad()
def test_claim_the_ensemble_is_the_mean_of_its_members(slides):
    batch = slides.example_batch(4)
    logits, attention = slides.forward_batch(batch)
    assert logits.shape == (4, 3, 1) and attention.shape == (4, 3, 8)
    said = slides.predict(batch)
    torch.testing.assert_close(said.probabilities[:, 1], logits[..., 0].sigmoid().mean(1))
    three = create("phikon_v2_abmil_micro", num_classes=3)
    p = three.predict(three.example_batch(2)).probabilities
    assert p.shape == (2, 3) and torch.allclose(p.sum(1), torch.ones(2))


def test_a_member_never_learns_from_its_own_fold():
    model = create("phikon_v2_abmil_micro").train()
    batch = model.example_batch(1)
    model.loss(batch).total.backward()
    left_out = fold_of("example 0", 5)
    moved = [any(p.grad is not None and p.grad.abs().max() > 0 for p in m.parameters()) for m in model.members]
    assert moved == [m != left_out for m in range(5)]
    batch = {**model.example_batch(40), "patient": ["one"] * 20 + ["two"] * 20}  # a patient's slides share a fold
    learns = model.learns_from(batch)
    assert (learns[:20] == learns[0]).all() and (learns.sum(1) == 4).all()


def test_attention_is_gated_and_padding_gets_none():
    torch.manual_seed(0)
    pool = ABMIL(Config(level="slide", features=6, attention=4, slide_hidden=(5,)), 6, 1)
    x, mask = torch.randn(2, 7, 6), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    logits, attention = pool(x, mask)
    h = x @ pool.embed[0].weight.T + pool.embed[0].bias
    score = (torch.tanh(pool.value(h)) * torch.sigmoid(pool.gate(h))) @ pool.weight.weight[0] + pool.weight.bias
    expected = torch.softmax(score[0, :4], 0)
    torch.testing.assert_close(attention[0, :4], expected)
    torch.testing.assert_close(logits[0], pool.out(torch.relu(pool.hidden[0](expected @ h[0, :4]))))
    cold = ABMIL(Config(level="slide", features=6, attention=4, slide_hidden=(5,), attention_temperature=0.1), 6, 1)
    cold.load_state_dict(pool.state_dict())
    assert cold(x, mask)[1].max() > attention.max()
    with pytest.raises(BadInput, match="slide_dropout"):
        ABMIL(Config(slide_hidden=(5,), slide_dropout=(0.1, 0.2)), 6, 1)
    with pytest.raises(UnknownName):
        ABMIL(Config(activation="swish!"), 6, 1)


def test_slides_learn_on_frozen_features(slides):
    slides.train()
    slides.start_probe()
    slides.loss(slides.example_batch(6)).total.backward()
    assert all(p.grad is None for p in slides.encoder.parameters()) and slides.members[0].value.weight.grad is not None
    assert not slides.encoder.training and not slides.pretraining.teacher.training


def test_bags_of_the_wrong_kind_are_refused(slides):
    with pytest.raises(BadInput, match="bags of tile images"):
        slides.predict(create("phikon_v2_abmil_micro").example_batch(2))
    with pytest.raises(BadInput, match="real tile"):
        x, mask = slides.example(2)
        slides(x, torch.zeros_like(mask))
    with pytest.raises(UnknownName):
        create("phikon_v2_micro", centring="none")


# the encoder --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_extractor_gives_features_and_needs_classes_to_classify():
    model = create("phikon_v2_vit_small_masked", dim=48, depth=1, heads=3).eval()
    assert model(torch.rand(2, 3, 224, 224)).shape == (2, 48)
    assert model.tokens_of(torch.rand(1, 3, 96, 64)).shape == (1, 1 + 24, 48)
    with pytest.raises(BadInput, match="num_classes"):
        model.predict({"image": torch.rand(1, 3, 32, 32)})
    with pytest.raises(BadInput, match="multiples of 16"):
        model(torch.rand(1, 3, 40, 32))
    assert create("phikon_v2_tile_micro", dense=True)(torch.rand(1, 3, 64, 32))[0].shape == (1, 64, 8, 4)


@torch.no_grad()
def test_pitfall_masked_patches_lose_their_pixels_but_not_their_place(tiles):
    tiles.eval()
    image, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 16, dtype=torch.bool)
    mask[0, [2, 5]] = True
    other = image.clone()
    other[..., 0:8, 16:24] = torch.rand(3, 8, 8)  # patch 2
    torch.testing.assert_close(tiles.tokens_of(image, mask), tiles.tokens_of(other, mask))
    assert not torch.allclose(tiles.tokens_of(image), tiles.tokens_of(other))
    hidden = tiles.tokens_of(image, mask)[0, 1:]
    assert not torch.allclose(hidden[2], hidden[5])
    with pytest.raises(BadInput, match="mask"):
        tiles(image, mask[:, :4])


@torch.no_grad()
def test_pitfall_the_position_offset_matters_at_local_crops():
    model = create("phikon_v2_vit_small_masked", dim=48, depth=1, heads=3)
    with_offset = model.encoder.positions_on((6, 6))
    model.encoder.config = replace(model.encoder.config, resize_offset=0.0)
    without = model.encoder.positions_on((6, 6))
    assert with_offset.shape == without.shape == (1, 37, 48) and (with_offset - without).abs().max() > 1e-4
    torch.testing.assert_close(with_offset[:, 0], without[:, 0])
    assert model.encoder.positions_on((14, 14)) is model.encoder.positions


def test_registers_swiglu_and_chunked_checkpoints():
    made = dict(level="tile", image_size=32, patch_size=8, dim=48, depth=2, heads=3, num_classes=0)
    model = PhikonV2(Config(**made, registers=4, ffn="swiglu", qkv_bias=False, out_bias=False, mlp_bias=False)).eval()
    assert model.tokens_of(torch.rand(1, 3, 32, 32)).shape == (1, 1 + 4 + 16, 48)
    assert model.encoder.blocks[0].mlp.out.weight.shape == (48, 128)  # two thirds of 192, already a multiple of 8
    assert {*taps(model)} >= {"encoder.tokens", "encoder.blocks.0", "features"}
    plain = create("phikon_v2_vit_small_masked", dim=48, depth=2, heads=3)
    theirs = authors_of("phikon_v2").export_state(plain)
    chunked = {k.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1."): v for k, v in theirs.items()}
    again = create("phikon_v2_vit_small_masked", dim=48, depth=2, heads=3)
    load_state(again, chunked)
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), again.state_dict().values(), strict=True))


@torch.no_grad()
def test_pitfall_hub_checkpoints_have_other_names():
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    theirs = Dinov2Model(Dinov2Config(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=64, patch_size=16)).eval()
    model = create("phikon_v2_vit_small_masked", dim=48, depth=2, heads=3, image_size=64).eval()
    load_state(model, theirs.state_dict())
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(image), theirs(image).last_hidden_state[:, 0], rtol=1e-4, atol=1e-4)
    files = to_huggingface(model)  # as the checkpoints on the Hub have them
    assert {"encoder.layer.1.attention.attention.query.weight", "encoder.layer.0.layer_scale1.lambda1", "layernorm.bias"} <= {*files}
    again = create("phikon_v2_vit_small_masked", dim=48, depth=2, heads=3, image_size=64).eval()
    load_state(again, {f"dinov2.{k}": v for k, v in files.items()})
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_pitfall_a_training_checkpoint_gives_the_teacher_and_an_extractor_starts_pretraining(tiles):
    theirs = authors_of("phikon_v2").export_state(tiles)
    assert "teacher.backbone.blocks.0.ls1.gamma" in theirs and "student.dino_head.last_layer.weight_v" in theirs
    with torch.no_grad():
        theirs["teacher.backbone.norm.weight"] = theirs["teacher.backbone.norm.weight"] + 1
    extractor = create("phikon_v2_tile_micro", pretraining=False, num_classes=0)
    load_state(extractor, {k: v for k, v in theirs.items() if not k.startswith("head.")})
    assert torch.equal(extractor.encoder.norm.weight, torch.full((64,), 2.0))
    bare = authors_of("phikon_v2").export_state(extractor)
    assert "blocks.0.attn.qkv.weight" in bare
    load_state(tiles, bare, skip=("head.*",))
    assert torch.equal(tiles.pretraining.teacher.norm.weight, torch.full((64,), 2.0))


# DINOv2 -------------------------------------------------------------------------------------------------------------


def test_claim_no_gradient_reaches_the_teacher_which_averages_the_student(tiles):
    tiles.start_pretraining()
    out = tiles.pretraining_loss(tiles.example_batch(4))
    assert {*out.terms} == {"dino_local", "dino_global", "koleo", "ibot"}
    torch.testing.assert_close(out.total, sum(out.terms.values()))
    out.total.backward()
    assert all(p.grad is None for p in [*tiles.pretraining.teacher.parameters(), *tiles.pretraining.teacher_head.parameters()])
    before = tiles.pretraining.teacher.blocks[0].mlp.fc1.weight.clone()
    student = tiles.encoder.blocks[0].mlp.fc1.weight
    with torch.no_grad():
        student.add_(1.0)
    tiles._before = ()
    tiles.after_step(1, 100)
    torch.testing.assert_close(tiles.pretraining.teacher.blocks[0].mlp.fc1.weight, 0.95 * before + 0.05 * student, rtol=1e-4, atol=1e-5)
    assert float(tiles.pretraining.progress) == pytest.approx(1 / 80)
    assert not tiles.pretraining.teacher.training


def test_pitfall_learning_rates_fall_layer_by_layer_and_prototypes_wait(tiles):
    rate = tiles.rate_of
    assert rate("norm.weight") == 1 and rate("blocks.1.norm1.weight") == pytest.approx(0.9)
    assert rate("blocks.0.norm1.weight") == pytest.approx(0.9**2)
    assert rate("cls_token") == pytest.approx(0.9**3) and rate("embed.weight") == pytest.approx(0.5 * 0.9**3)
    tiles.start_pretraining()
    optimiser = torch.optim.AdamW([*tiles.encoder.parameters(), *tiles.pretraining.head.parameters()], lr=1e-2, weight_decay=0.01)
    own = {n: p.detach().clone() for n, p in tiles.encoder.named_parameters()}
    prototypes = tiles.pretraining.head.direction.detach().clone()
    tiles.pretraining_loss(tiles.example_batch(4)).total.backward()
    optimiser.step()
    assert optimiser.param_groups[0]["weight_decay"] == pytest.approx(0.04)  # the schedule's, from its start
    moved = {n: p.detach() - own[n] for n, p in tiles.encoder.named_parameters()}
    tiles.after_step(1, 1000)
    for name, p in tiles.encoder.named_parameters():
        torch.testing.assert_close(p.detach() - own[name], rate(name) * moved[name], atol=1e-6, rtol=1e-3)
    assert torch.equal(tiles.pretraining.head.direction, prototypes)
    tiles.pretraining.progress.fill_(0.5)
    tiles._remember()
    assert all(p is not tiles.pretraining.head.direction for p, _, _ in tiles._before)
    optimiser.step()
    assert optimiser.param_groups[0]["weight_decay"] == pytest.approx(0.22)
    tiles.start_probe()
    assert torch.equal(tiles.encoder.norm.weight, tiles.pretraining.teacher.norm.weight) and tiles._schedule is None


def test_unmasked_patches_and_heads_of_their_own():
    torch.manual_seed(0)
    model = create("phikon_v2_tile_micro", separate_heads=True, local_crops=0).train()
    model.start_pretraining()
    out = model.pretraining_loss(model.example_batch(3))
    assert out.terms["dino_local"] == 0 and out.terms["ibot"] > 0
    out.total.backward()
    assert model.pretraining.patch_head.direction.grad is not None
    masks = torch.zeros(4, 6, dtype=torch.bool)
    masks[1, :2] = True
    said = torch.randn(2, 2, 5).softmax(-1), torch.randn(2, 5).softmax(-1), torch.randn(2, 2, 5), torch.randn(3, 2, 5), torch.randn(2, 5)
    a = dinov2_losses(*said, torch.randn(2, 2, 7), masks)
    assert a.total.isfinite() and a.terms["ibot"] > 0


def test_two_equal_runs_agree(tiles):
    from copy import deepcopy

    batch, totals = tiles.example_batch(3), []
    for _ in range(2):
        other = deepcopy(tiles)
        other.start_pretraining()
        torch.manual_seed(5)
        totals.append(other.pretraining_loss(batch).total.item())
    assert totals[0] == totals[1]


def test_a_fit_goes_through_both_stages_and_loads_again(tmp_path):
    torch.manual_seed(0)
    model = create("phikon_v2_tile_micro", num_classes=10)
    run = formarium.fit(model, "sample:digits", tmp_path / "run", steps=4, batch_size=8, recipe="demo", progress=False, validations=1)
    assert {*run.history[0]} >= {"ibot", "koleo", "dino_local"} and "cross_entropy" in run.history[-2]
    again = formarium.load(tmp_path / "run")
    image = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(image), run.model.eval()(image))
    assert isinstance(again, PhikonV2)


def test_abmil_learns_what_the_mean_hides():
    from formarium.task import task

    torch.manual_seed(0)
    data = task("slide-classification").sample("feature-bags")
    run = formarium.fit("phikon_v2_abmil_micro", data, steps=90, lr=4e-3, progress=False, validations=1)
    _, rival = task("slide-classification").baseline(data)
    assert run.summary["auc"] > max(0.85, rival["auc"] + 0.03), (run.summary, rival)
    batches = [task("slide-classification").collate([data.splits["val"][i] for i in range(120)])]
    with torch.no_grad():
        members = run.model.probabilities(run.model.forward_batch(batches[0])[0])[..., 1]
    from formarium.tasks.slide_classification.metrics import auc

    label = batches[0]["label"].numpy()
    each = [auc(np.stack([1 - m, m], 1), label) for m in members.T.double().numpy()]
    assert run.summary["auc"] >= np.mean(each) - 1e-6
    key = torch.tensor(np.concatenate([data.splits["val"][i]["key"] for i in range(1, 120, 2)]))
    attention = torch.cat([run.model.predict(batches[0]).attention[i][batches[0]["mask"][i]] for i in range(1, 120, 2)])
    assert attention[key].mean() > 3 * attention[~key].mean()


@pytest.mark.slow
def test_pretraining_teaches_the_encoder():
    from formarium.engine.probing import linear_probe

    torch.manual_seed(0)
    model = create("phikon_v2_tile_micro", num_classes=10)
    before = linear_probe(model, "sample:textures")
    run = formarium.fit(model, "sample:textures", steps=150, batch_size=48, recipe="demo", progress=False, validations=1)
    after = linear_probe(run.model, "sample:textures")
    assert after > before + 0.04, (before, after)
    losses = [r for r in run.history if "ibot" in r]
    assert losses[-1]["dino_local"] + losses[-1]["dino_global"] < np.log(64)
    assert run.model.encoder.norm.weight.std() >= 0


@torch.no_grad()
def test_the_class_token_alone_is_the_same_as_among_all(tiles):
    tiles.eval()
    image = torch.rand(2, 3, 32, 40)
    torch.testing.assert_close(tiles.class_token(image), tiles.tokens_of(image)[:, 0])
    every = formarium.trace(tiles, image)
    torch.testing.assert_close(every.output, tiles(image))
    assert every["encoder.blocks.1"].tokens.shape == (2, 21, 64)
