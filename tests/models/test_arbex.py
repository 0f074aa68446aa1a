from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import formarium
from formarium import create
from formarium.authors import authors_of, load_state
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.image.arbex import (
    Anchors,
    ReliabilityAttention,
    anchor_loss,
    balance,
    centre_loss,
    classification_head,
    confidence,
    similarity,
)
from formarium.task import task

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "arbex").glob("*.safetensors"))


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = create("arbex_micro")
    torch.nn.init.normal_(made.anchors.points, std=0.1)
    return made.eval()


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters in (None, outcome.expected_parameters)


def opinions(batch=5, classes=8, anchors=3):
    g = torch.Generator().manual_seed(0)
    prob = torch.randn(batch, classes, generator=g).softmax(-1)
    return prob, torch.rand(batch, classes, anchors, generator=g) * 3, torch.randn(batch, classes, generator=g).softmax(-1)


def test_claim_the_corrected_distribution_sums_to_one_for_any_trust():
    prob, distances, attention = opinions()
    for trust in (0.0, 0.3, 1.0):
        out = balance(prob, distances, attention, trust)
        torch.testing.assert_close(out.corrected.sum(-1), torch.ones(5))
        torch.testing.assert_close(out.correction.sum(-1), torch.ones(5))
        assert (out.corrected >= 0).all()
    torch.testing.assert_close(balance(prob, distances, attention, 0.0).corrected, prob)


def test_claim_a_sure_distribution_stays_as_it_is_and_an_unsure_one_takes_the_correction():
    _, distances, attention = opinions()
    sure, unsure = torch.eye(8)[:5], torch.full((5, 8), 1 / 8)
    torch.testing.assert_close(confidence(sure), torch.ones(5, 1))
    torch.testing.assert_close(confidence(unsure), torch.zeros(5, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(balance(sure, distances, attention, 1.0).corrected, sure)
    out = balance(unsure, distances, attention, 1.0)
    torch.testing.assert_close(out.corrected, out.correction, atol=1e-6, rtol=1e-5)


def test_claim_on_an_anchor_of_a_class_it_is_most_similar_to_that_class():
    torch.manual_seed(0)
    anchors = Anchors(6, 2, 16)
    torch.nn.init.normal_(anchors.points)
    for k in range(6):
        said = similarity(anchors(anchors.points[k, 1][None]), delta=1.0)
        assert said.argmax() == k and torch.isclose(said.sum(), torch.tensor(1.0))


def test_claim_anchors_repel_and_only_their_distances_count():
    torch.manual_seed(0)
    points = torch.randn(4, 3, 16)
    flat = points.flatten(1)
    pairs = -((flat[None] - flat[:, None]) ** 2 / 4).sum() / 9  # sqrt(16) = 4
    torch.testing.assert_close(anchor_loss(points), pairs)
    torch.testing.assert_close(anchor_loss(points + torch.randn(16)), anchor_loss(points), rtol=1e-4, atol=1e-4)
    apart = points.clone()
    apart[0] += (points[0] - points[1]) * 0.5
    assert anchor_loss(apart) < anchor_loss(points)


def test_the_centre_loss_takes_the_nearest_anchor_of_the_own_class():
    distances = torch.tensor([[[3.0, 1.0], [0.1, 0.2]], [[5.0, 5.0], [2.0, 4.0]]])
    got = centre_loss(distances, torch.tensor([0, 1]), torch.tensor([[0.5], [1.0]]), 16)
    assert got == pytest.approx((1.0 * 0.5 + 2.0 * 1.0) / 2 / 4)


def test_gradients_stay_finite_where_the_formula_has_holes():
    anchors = Anchors(4, 2, 8)  # at zero
    at = torch.zeros(3, 8, requires_grad=True)
    prob = torch.eye(4)[:3].requires_grad_()
    distances = anchors(at)
    out = balance(prob, distances, torch.full((3, 4), 0.25), 0.5)
    (out.corrected.clamp_min(1e-12).log().sum() + distances.sum()).backward()
    assert all(torch.isfinite(t.grad).all() for t in (at, prob, anchors.points))


def test_attention_is_by_sample_or_as_released_over_the_batch():
    torch.manual_seed(0)
    x = torch.randn(4, 16)
    for over, same in (("sample", True), ("batch", False)):
        module = ReliabilityAttention(5, 2, 16, over=over).eval()
        alone = torch.cat([module(x[i : i + 1]) for i in range(4)])
        assert torch.allclose(module(x), alone, atol=1e-6) is same
        torch.testing.assert_close(module(x).sum(-1), torch.ones(4))


def test_the_head_normalises_after_its_relu():
    kinds = [type(m).__name__ for m in classification_head(16, (8, 4), 3, 0.5, True)]
    assert kinds == ["Linear", "ReLU", "BatchNorm1d", "Dropout"] * 2 + ["Linear"]
    assert [type(m).__name__ for m in classification_head(16, (8,), 3, 0.5, False)] == ["Linear", "ReLU", "Dropout", "Linear"]


@torch.no_grad()
def test_any_image_size_is_seen_at_the_models_own(model):
    image = torch.rand(2, 3, 32, 32)
    large = image.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(model(large), model(image))
    assert [tuple(m.shape) for m in model.pyramid(large)] == [(2, 8, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)]


@torch.no_grad()
def test_the_landmarks_ask_and_the_image_answers(model):
    fusion, image, landmarks = model.fusions[0], torch.randn(1, 8, 8, 8), torch.randn(1, 8, 8, 8)
    fusion.scale2.zero_()
    base = fusion.source_norm(image.permute(0, 2, 3, 1))
    torch.testing.assert_close(fusion(torch.zeros_like(image), landmarks), fusion(torch.zeros_like(image), 2 * landmarks))  # one answer
    assert not torch.allclose(fusion(image, landmarks), fusion(image, -landmarks))
    fusion.scale1.zero_()
    torch.testing.assert_close(fusion(image, landmarks), base)  # the residual is the normalised image map


@torch.no_grad()
def test_prediction_is_primary_or_corrected_with_the_trust_that_training_reached(model):
    batch = model.example_batch(4)
    paper = create("arbex_micro", correct=True).eval()
    paper.load_state_dict(model.state_dict())
    before = paper.predict(batch)
    torch.testing.assert_close(before.probabilities, before.primary)  # no trust yet
    for m in (model, paper):
        m.after_step(3, 4)
    half = paper.predict(batch)
    assert paper.trust == 0.75 and not torch.allclose(half.probabilities, half.primary)
    torch.testing.assert_close(half.probabilities.sum(-1), torch.ones(4))
    assert half.distances.shape == (4, 10, 3) and ((half.confidence >= -1e-6) & (half.confidence <= 1)).all()
    torch.testing.assert_close(model.predict(batch).probabilities, half.primary)  # as the authors' evaluation
    torch.testing.assert_close(model(model.normalise(batch["image"])).softmax(-1), half.primary)
    plain = create("arbex_micro", most_trust=0.0)
    plain.after_step(3, 4)
    assert plain.trust == 0


def test_the_objective_is_the_papers(model):
    batch = model.example_batch(6)
    model.trust.fill_(0.5)
    out = model.loss(batch)
    embedding = model.embedding(model.normalise(batch["image"]))
    said = model.reliability(embedding, model.head(embedding), 0.5)
    ce = F.nll_loss(said.corrected.log(), batch["label"])
    torch.testing.assert_close(out.terms["classification"], ce)
    torch.testing.assert_close(out.total, ce + 0.5 * (out.terms["anchor"] + out.terms["centre"]))
    soft = model.loss({**batch, "target": F.one_hot(batch["label"], 10).float()})
    torch.testing.assert_close(soft.total, out.total)
    only = create("arbex_micro", weights=(1.0, 0.0, 0.0)).eval()
    only.load_state_dict(model.state_dict())
    torch.testing.assert_close(only.loss(batch).total, ce)


def test_rare_classes_weigh_more(model):
    data = task("image-classification").sample("digits")
    full = data.splits["train"]
    chosen = np.concatenate([np.flatnonzero(full.labels == k)[: 4 if k == 3 else 40] for k in range(10)])
    rare = replace(full, images=full.images[chosen], labels=full.labels[chosen], ids=[full.ids[i] for i in chosen])
    model.study(replace(data, splits={"train": rare, "val": rare}))
    torch.testing.assert_close(model.class_weights[3], 10 * model.class_weights[0])
    assert float((model.class_weights[torch.as_tensor(rare.labels)]).mean()) == pytest.approx(1)


def test_frozen_backbones_stay_statistics_included():
    model = create("arbex_micro", frozen=("image", "landmark")).train()
    assert not model.image.training and not model.landmark.training and model.fusions.training
    globs = model.training_stages()[0].turns[0].train
    assert "cls_token" in globs and "fusions.*" in globs and not any(g.startswith(("image", "landmark")) for g in globs)


def test_the_released_layers_that_never_run_are_there_for_checkpoints():
    with torch.device("meta"):
        whole, bare = create("arbex"), create("arbex", unused_layers=False)
    assert whole.parameters_count == 45782326
    assert whole.parameters_count - bare.parameters_count == 196608 + 768 + 196608 + 1024 * 768 + 768 + 768 * 512 + 512 + 2 * (148**2 + 148)


@torch.no_grad()
def test_the_authors_number_of_heads_moves_the_scale_alone():
    a, b = create("arbex_micro", vit_heads=8), create("arbex_micro", vit_heads=8, scale_heads=4)
    assert a.parameters_count == b.parameters_count
    assert a.blocks[0].scale == 8**-0.5 and b.blocks[0].scale == 16**-0.5 and b.blocks[0].heads == 8


def test_their_four_checkpoints_are_one(model):
    theirs = authors_of("arbex").export_state(model)
    assert {"classifier.net.0.weight", "anchors.anchors", "self_attn.Q.weight", "ir.input_layer.0.weight", "vit.se_block.linear1.bias"} <= {
        *theirs
    }
    assert not {"trust", "class_weights"} & {*theirs}
    other = create("arbex_micro")
    load_state(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_bad_input():
    with pytest.raises(BadInput, match="multiple of 16"):
        create("arbex_micro", side=40)
    with pytest.raises(BadInput, match="attention_over"):
        create("arbex_micro", attention_over="time")
    with pytest.raises(BadInput, match="frozen"):
        create("arbex_micro", frozen=("head",))
    extractor = create("arbex_micro", num_classes=0).eval()
    assert extractor(extractor.example(2)[0]).shape == (2, 64)
    with pytest.raises(BadInput, match="extractor"):
        extractor.predict({"image": extractor.example(2)[0]})


def noisy_digits(rate: float, seed: int = 0):
    """Rare classes, and a share of the training labels made wrong; the held-out ones are clean."""
    data, rng = task("image-classification").sample("digits"), np.random.default_rng(seed)
    full = data.splits["train"]
    counts = np.linspace(140, 60, 10).astype(int)
    chosen = rng.permutation(np.concatenate([np.flatnonzero(full.labels == k)[: counts[k]] for k in range(10)]))
    labels = full.labels[chosen].copy()
    flipped = rng.random(len(labels)) < rate
    labels[flipped] = (labels[flipped] + rng.integers(1, 10, flipped.sum())) % 10
    train = replace(full, images=full.images[chosen], labels=labels, ids=[full.ids[i] for i in chosen])
    return replace(data, splits={"train": train, "val": data.splits["val"]})


@pytest.mark.slow
def test_balancing_keeps_the_accuracy_under_noisy_labels_and_knows_better_when_it_is_wrong():
    from sklearn.metrics import roc_auc_score

    data, found = noisy_digits(0.4), {}
    for most_trust in (1.0, 0.0):  # with balancing, and the same network without
        torch.manual_seed(0)
        run = formarium.fit(create("arbex_micro", most_trust=most_trust), data, epochs=8, progress=False, seed=0, validations=1)
        said = formarium.evaluate(run, data, bootstrap=0)
        right = torch.cat([p.label for p in said.predictions]) == torch.cat([b["label"] for b in said.batches])
        auroc = roc_auc_score(right.numpy(), torch.cat([p.confidence for p in said.predictions]).numpy())
        found[most_trust] = (said.metrics["accuracy"], auroc)
    (accuracy, knows), (plain_accuracy, plain_knows) = found[1.0], found[0.0]
    assert accuracy > 0.85 and accuracy > plain_accuracy - 0.02, found
    assert knows > plain_knows + 0.02, found
