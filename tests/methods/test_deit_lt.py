from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import formarium
from formarium import create
from formarium.authors import authors_of, load_state
from formarium.authors.deit_lt import resnet_state
from formarium.catalogue import card
from formarium.engine.recipes import Recipe, recipe_for
from formarium.engine.records import replay
from formarium.errors import BadInput, UnknownName
from formarium.methods.deit_lt import (
    DeiTLT,
    ResNet,
    Student,
    Teacher,
    class_balanced_weights,
    class_counts,
    compare,
    distillation_loss,
    groups,
    long_tailed,
    paco_loss,
    shot_accuracy,
)
from formarium.task import task
from formarium.tasks.image_classification.trunks import ViT

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "deit_lt").glob("*.safetensors"))
BACKBONES = card("deit_lt").demo["backbones"]
COUNTS = (50, 40, 30, 20, 15, 10, 8, 6, 4, 2)


def plain(name: str):
    torch.manual_seed(0)
    return ViT(ViT.Config(image_size=32, patch_size=8, dim=48, depth=2, heads=3, num_classes=10)) if name == "vit" else create(name)


def small(**options) -> Student:
    torch.manual_seed(0)
    own = {"blocks": (1, 1, 1), "queue": 16, "contrast": 8, "teacher_size": 16, "counts": COUNTS, **options}
    trunk = {"image_size": 32, "patch_size": 8, "dim": 48, "depth": 2, "heads": 3, "distilled": True}
    return create("deit_lt_micro", trunk_config=trunk, **own)


@pytest.fixture(scope="module")
def digits():
    data = task("image-classification").sample("digits")
    return long_tailed(replace(data, splits={**data.splits, "val": [data.splits["val"][i] for i in range(64)]}), 0.05)


@pytest.mark.parametrize("path", [pytest.param(p, marks=pytest.mark.slow if "base" in p.stem else (), id=p.stem) for p in RECORDS])
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [("base_224", 10, 85815572), ("base_224", 100, 85953992), ("base_224", 1000, 87338192), ("small", 10, 21674132), ("tiny", 10, 5528660)],
)
def test_parameter_counts(name, classes, count):
    with torch.device("meta"):
        assert create(f"deit_lt_{name}", num_classes=classes).parameters_count == count
        assert sum(p.numel() for p in Teacher((5, 5, 5), 3, 10).parameters()) == 464154


def test_claim_rare_classes_weigh_more_and_equal_ones_the_same():
    weights = class_balanced_weights([5000, 2997, 645, 83, 50])
    assert float(weights.sum()) == pytest.approx(5) and (weights.diff() > 0).all()
    torch.testing.assert_close(class_balanced_weights([70] * 4), torch.ones(4))
    dist, teacher = torch.randn(6, 4), torch.randn(6, 4)
    for kind in ("hard", "soft"):
        even = distillation_loss(dist, teacher, kind, torch.ones(4))
        torch.testing.assert_close(even, distillation_loss(dist, teacher, kind))


def test_claim_with_the_labels_for_a_teacher_it_is_the_mean_of_two_cross_entropies():
    model = small(mixup=0.0, cutmix=0.0, label_smoothing=0.0)
    batch = model.example_batch(8)
    model.teacher.forward = lambda x: (F.one_hot(batch["label"], 10).float(), None)
    out = model.forward_batch(batch)
    cls, dist = (F.cross_entropy(x, batch["label"]) for x in out)
    torch.testing.assert_close(model.loss(batch).total, 0.5 * cls + 0.5 * dist)
    model.deferred.fill_(True)  # weights, whose sum is divided by
    w = model.weights[batch["label"]]
    dist = (F.cross_entropy(out.dist, batch["label"], reduction="none") * w).sum() / w.sum()
    torch.testing.assert_close(model.loss(batch).total, 0.5 * cls + 0.5 * dist)


def test_claim_each_term_moves_the_trunk_and_its_own_head():
    model = small().train()
    terms = model.loss(model.example_batch(8)).terms
    for term, own, other in (("base", "head", "head_distilled"), ("distillation", "head_distilled", "head")):
        model.zero_grad()
        terms[term].backward(retain_graph=True)
        grads = {n: p.grad for n, p in model.trunk.named_parameters()}
        assert grads[f"{own}.weight"].abs().sum() > 0 and grads["embed.weight"].abs().sum() > 0
        assert grads[f"{other}.weight"] is None or grads[f"{other}.weight"].abs().sum() == 0
        assert all(p.grad is None for p in model.teacher.parameters())


def test_mixing_ends_where_the_reweighting_starts_and_the_teacher_sees_what_the_student_sees():
    model = small(drw=0.5, mixup=0.8, cutmix=1.0).train()
    batch, seen = model.example_batch(8), []
    model.teacher.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model.loss(batch)
    model.deferred.fill_(True)
    model.loss(batch)
    inside = replace(model.config, out_of_distribution=False)
    model.deferred.fill_(False)
    model.config = inside
    model.loss(batch)
    plain_view = model.resized(model.normalise(batch["image"]))
    assert seen[0].shape == (8, 3, 16, 16) and not torch.allclose(seen[0], plain_view)
    torch.testing.assert_close(seen[1], plain_view)
    torch.testing.assert_close(seen[2], plain_view)


def test_the_stages_and_when_weights_come_in():
    model = small(drw=0.75, teacher_share=1.0)
    teacher, student = model.training_stages()
    assert (teacher.turns[0].loss, teacher.turns[0].train, student.turns[0].train) == (
        "teacher_loss",
        ("teacher.*",),
        ("trunk.*", "head_dist.*"),
    )
    on = []
    for step in range(1, 9):  # 4 of the teacher, 4 of the student
        model.after_step(step, 8)
        on.append(bool(model.deferred))
    assert on == [False] * 6 + [True] * 2
    assert [s.name for s in small(distillation="none").training_stages()] == ["student"]
    assert [s.name for s in create("deit_lt_micro").training_stages()] == ["student"]


def test_the_teachers_loss_and_its_uphill_step():
    model = small(rho=0.0).train()
    batch = model.example_batch(8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert not model.teacher.training  # it wakes up in its own loss only
    flat = model.teacher_loss(batch).total
    assert not torch.equal(model.queue, before["queue"]) and model.queue.shape == (16, 8)
    assert torch.equal(model.queue_label[:8], batch["label"]) and not model.teacher.training
    key = before["key.classifier.weight"]
    torch.testing.assert_close(model.key.classifier.weight, key)  # both started as one
    model.load_state_dict(before)
    model.config = replace(model.config, rho=0.5)
    torch.manual_seed(1)
    steep = model.teacher_loss(batch).total
    steep.backward()
    assert steep > flat and all(p.grad is not None for p in model.teacher.parameters())
    assert all(p.grad is None for p in model.trunk.parameters())


def test_paco_is_one_softmax_over_centres_and_images():
    torch.manual_seed(0)
    logits, anchors, others = torch.randn(3, 4), F.normalize(torch.randn(3, 5), dim=1), F.normalize(torch.randn(6, 5), dim=1)
    label, labels, prior = torch.tensor([0, 1, 0]), torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0.5, 0.3, 0.1, 0.1])
    total = 0.0
    for i in range(3):
        scores = torch.cat(
            [logits[i] + prior.log(), (anchors @ anchors[i])[[j for j in range(3) if j != i]] / 0.2, others @ anchors[i] / 0.2]
        )
        mine = [label[j] == label[i] for j in range(3) if j != i] + [x == label[i] for x in labels]
        weights = torch.tensor([float(c == label[i]) for c in range(4)] + [0.1 * float(m) for m in mine])
        total -= (weights * scores.log_softmax(0)).sum() / weights.sum() / 3
    torch.testing.assert_close(paco_loss(logits, anchors, others, label, labels, prior, 0.2, 0.1), total, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", BACKBONES)
def test_it_goes_on_models_of_the_catalogue(name):
    trunk = plain(name).eval()
    x = trunk.example(2)[0]
    before = trunk(x)
    model = DeiTLT(blocks=(1, 1, 1), queue=16, contrast=8, teacher_size=16).apply(trunk).eval()
    out = model(x)
    cosine = model.cosine(x)
    if name == "vit":  # it got a second token
        assert model.tokens and not hasattr(model, "head_dist") and (cosine < 1).all() and model.trunk.positions.shape[1] == 18
    else:
        torch.testing.assert_close(out.cls, before)
        torch.testing.assert_close(cosine, torch.ones(2))
    assert out.dist.shape == out.cls.shape == (2, 10)
    model.reconfigure(counts=COUNTS)
    model._meet()
    with torch.enable_grad():
        model.train().loss(model.example_batch(4)).total.backward()
    head = model.trunk.head_distilled if model.tokens else model.head_dist
    assert head.weight.grad.abs().sum() > 0
    batch = model.example_batch(3)
    said = model.eval().predict(batch)
    out = model.forward_batch(batch)
    torch.testing.assert_close(said.probabilities, ((out.cls + out.dist) / 2).softmax(-1))


@torch.no_grad()
def test_a_token_that_is_added_leaves_the_others_as_they_were():
    vit = plain("vit")
    model = DeiTLT().apply(vit)
    assert torch.equal(model.trunk.cls_token[:, :1], vit.cls_token) and torch.equal(model.trunk.positions[:, 2:], vit.positions[:, 1:])
    assert torch.equal(model.trunk.blocks[1].mlp.fc1.weight, vit.blocks[1].mlp.fc1.weight)


def test_long_tails(digits):
    counts = class_counts(digits)
    assert counts == (142, 103, 73, 52, 37, 27, 19, 13, 10, 7)
    assert groups(counts) == {"head": [0, 1], "medium": [2, 3, 4, 5], "tail": [6, 7, 8, 9]}
    assert groups((60, 50, 40, 30, 30, 30, 30, 20, 10, 9)) == {"head": [0, 1, 2], "medium": [3, 4, 5, 6], "tail": [7, 8, 9]}
    again = long_tailed(task("image-classification").sample("digits"), 0.05)
    assert again.splits["train"].indices == digits.splits["train"].indices
    assert again.splits["train"].indices != long_tailed(task("image-classification").sample("digits"), 0.05, seed=1).splits["train"].indices
    with pytest.raises(BadInput, match="factor"):
        long_tailed(digits, 0.0)


def test_a_fit_is_saved_and_loaded_with_its_teacher(tmp_path, digits):
    model = DeiTLT(blocks=(1, 1, 1), queue=16, contrast=8, teacher_size=16, drw=0.5).apply(plain("vit"))
    assert not model.has_teacher
    run = formarium.fit(model, digits, tmp_path / "run", recipe=Recipe(steps=6, batch_size=16), progress=False, validations=1)
    again = formarium.load(tmp_path / "run")
    assert again.has_teacher and again.config.counts == class_counts(digits) and bool(again.deferred)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), run.model.state_dict().values(), strict=True))
    table = shot_accuracy(again, digits)
    assert {*table} == {"mean", "cls", "dist"} and {*table["mean"]} == {"overall", "head", "medium", "tail", "cosine"}
    assert {*shot_accuracy(plain("pvt_micro"), digits)["mean"]} == {"overall", "head", "medium", "tail"}


def test_three_ways_to_train_side_by_side(digits):
    rows = compare(formarium.fit, plain("pvt_micro"), digits, recipe=Recipe(steps=4, batch_size=8))
    assert {*rows} == {"plain", "balanced", "deit_lt"} and all(0 <= r["tail"] <= 1 for r in rows.values())


def test_the_names_round_trip():
    model, other = create("deit_lt_micro"), create("deit_lt_micro")
    theirs = authors_of("deit_lt").export_state(model)
    assert {"cls_token", "dist_token", "pos_embed", "head.weight", "head_dist.bias", "blocks.3.attn.proj.weight"} <= {*theirs}
    load_state(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert {"net.stages.1.0.norm2.weight", "classifier.bias", "net.conv.weight"} == {
        *resnet_state({"layer2.0.bn2.weight": 0, "fc.bias": 0, "conv1.weight": 0})
    }


@torch.no_grad()
def test_a_narrowing_block_keeps_every_other_pixel_and_pads_channels():
    net = ResNet((1, 1, 1)).eval()
    block = net.stages[1][0]
    block.norm2.weight.zero_()
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2]) and out[:, :8].abs().max() == 0 and out[:, 24:].abs().max() == 0


def test_bad_input():
    with pytest.raises(BadInput, match="study"):
        create("deit_lt_micro").loss(create("deit_lt_micro").example_batch(2))
    with pytest.raises(BadInput, match="counts"):
        small(counts=(1, 2, 3))
    with pytest.raises(UnknownName, match="distillation"):
        DeiTLT(distillation="firm")
    with pytest.raises(UnknownName, match="option"):
        DeiTLT(counts=(1,))
    with pytest.raises(BadInput, match="already"):
        DeiTLT().apply(create("deit_lt_micro"))


@pytest.mark.slow
def test_claim_rare_classes_gain_and_the_whole_too_beside_plain_training():
    data = long_tailed(task("image-classification").sample("digits"), 0.02)  # 142 images of the first class, 2 of the last
    recipe = recipe_for("deit_lt_spectformer_micro")
    rows = {}
    for name in ("spectformer_micro", "deit_lt_spectformer_micro"):  # as many steps each
        run = formarium.fit(name, data, recipe=recipe, seed=1, progress=False, validations=1)
        rows[name] = shot_accuracy(run.model, data)
    plain, taught = rows["spectformer_micro"]["mean"], rows["deit_lt_spectformer_micro"]
    print(rows)
    assert taught["mean"]["tail"] > plain["tail"] and taught["mean"]["overall"] > plain["overall"]
    assert taught["dist"]["tail"] > plain["tail"] + 0.03 and taught["dist"]["tail"] > taught["cls"]["tail"] + 0.03
    assert taught["cls"]["head"] >= taught["dist"]["head"] and taught["mean"]["head"] > 0.9
