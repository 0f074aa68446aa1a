from pathlib import Path

import numpy as np
import pytest
import torch

from formarium import create, trace
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.nn.image_boxes import to_corners
from formarium.nn.matching import sigmoid_focal
from formarium.task import task as task_of

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "vidt").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return create("vidt_micro").eval()


def plain(**changes):
    """Micro ViDT without what ViDT+ adds."""
    return create("vidt_micro", fusion=False, codes=False, iou_aware=False, token_label=False, **changes)


# what makes it ViDT ---------------------------------------------------------------------------------------------------


def test_claim_patches_never_read_detection_tokens(model):
    image, padding = model.example(2)
    with torch.no_grad():
        before, det = model.body(image, padding)
        kept = model.body.det_tokens.clone()
        model.body.det_tokens.add_(torch.randn_like(kept))
        after, other = model.body(image, padding)
        model.body.det_tokens.copy_(kept)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and not torch.equal(det, other)


def test_claim_detection_tokens_read_patches_in_the_last_stage_only(model):
    image, padding = model.example(1)
    read = [trace(model, (x, padding), at="body.stages.*.blocks.*") for x in (image, torch.randn_like(image))]
    q = model.config.queries
    for name, first in read[0].items():
        same = torch.equal(first.tokens[:, :q], read[1][name].tokens[:, :q])
        assert same != name.startswith("body.stages.3"), name
    blind = create("vidt_micro", cross_stages=()).eval()
    with torch.no_grad():
        assert torch.equal(blind.body(image, padding)[1], blind.body(torch.randn_like(image), padding)[1])


def test_claim_attention_is_linear_in_the_number_of_patches(model):
    from torch.utils.flop_counter import FlopCounterMode

    def flops(side):
        x = model.example(1, (side, side))
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model.body(*x)
        return counter.get_total_flops()

    assert flops(512) / flops(256) == pytest.approx(4, rel=0.05)


def test_padding_is_not_read_by_detection_tokens(model):
    image, padding = model.example(2)
    assert padding[1].any()
    other = image.clone()
    other[1, :, :, -4:] = 1  # in the padding, a whole patch from the picture
    with torch.no_grad():
        wide, narrow = (model.body(x, padding)[0][0] for x in (image, other))
    assert not torch.equal(wide, narrow)  # windows reach into it, as in the released model
    from formarium.nn.shifted_windows import sine_positions

    assert torch.isfinite(sine_positions(padding[:, ::16, ::16], 32)).all()


def test_each_layer_refines_the_last_ones_boxes(model):
    raw = model.raw(*model.example(2))
    assert raw.logits.shape == (2, 3, 12, 4) and raw.boxes.shape == (2, 3, 12, 4)
    assert raw.codes.shape == (2, 3, 12, 36) and raw.ious.shape == (2, 3, 12, 1)
    assert [tuple(t.shape[1:3]) for t in raw.tokens] == [(1, 1), (2, 2), (4, 4), (8, 8)]  # coarse to fine
    fixed = plain(refine=False).eval()
    assert len(fixed.box_heads) == 1 and fixed.raw(*fixed.example(1)).boxes.shape == (1, 3, 12, 4)


# learning -----------------------------------------------------------------------------------------------------------


def test_losses_of_the_last_layer_by_hand():
    torch.manual_seed(0)
    model = plain(decoder_layers=1).eval()
    batch = model.example_batch(1, objects=1)
    batch["labels"][:], batch["boxes"][:] = 2, torch.tensor([0.5, 0.5, 0.4, 0.2])
    raw = model.raw(model.prepared(batch), batch["padding"])
    losses = model.loss(batch).terms
    logits, boxes = raw.logits[0, -1], raw.boxes[0, -1]
    costs = []
    for q in range(len(boxes)):
        wanted = torch.zeros_like(logits)
        wanted[q, 2] = 1
        costs.append((losses["class"] - 2 * sigmoid_focal(logits, wanted).sum()).abs())
    q = int(torch.stack(costs).argmin())
    assert costs[q] < 1e-5
    assert losses["l1"].item() == pytest.approx(5 * (boxes[q] - batch["boxes"][0, 0]).abs().sum().item(), rel=1e-5)
    a, b = to_corners(boxes[q]), to_corners(batch["boxes"][0, 0])
    inner = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2])).clamp_min(0).prod()
    union = (a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - inner
    hull = (torch.maximum(a[2:], b[2:]) - torch.minimum(a[:2], b[:2])).prod()
    assert losses["giou"].item() == pytest.approx(2 * (1 - inner / union + (hull - union) / hull).item(), rel=1e-5)


def test_auxiliary_losses_reach_every_layer_and_can_be_left_out():
    model = create("vidt_micro")
    terms = model.loss(model.example_batch(2)).terms
    assert {*terms} == {"class", "l1", "giou", "iou_aware", "codes", "auxiliary", "token_focal", "token_dice"}
    alone = plain(aux_loss=False)
    assert {*alone.loss(alone.example_batch(2)).terms} == {"class", "l1", "giou"}


def test_pictures_without_objects_teach_that_there_is_nothing():
    model = create("vidt_micro")
    batch = model.example_batch(2)
    batch["labels"][:], batch["masks"][:] = -1, False
    losses = model.loss(batch)
    assert losses.terms["class"] > 0 and losses.terms["l1"] == losses.terms["codes"] == 0
    losses.total.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_student_is_drawn_to_its_teachers_tokens():
    torch.manual_seed(0)
    student, teacher = plain(), plain(dim=24, heads=(1, 2, 4, 8))
    student.distil_from(teacher)
    terms = student.loss(student.example_batch(2)).terms
    assert terms["distil"] > 0
    terms["distil"].backward()
    assert student.det_project[0].weight.grad.abs().sum() > 0 and all(p.grad is None for p in teacher.parameters())
    assert not any("teacher" in k for k in student.state_dict())
    twin = plain().distil_from(student)
    twin.load_state_dict(student.state_dict())
    assert twin.eval().loss(twin.example_batch(2)).terms["distil"] < 0.05
    with pytest.raises(BadInput, match="queries"):
        student.distil_from(plain(queries=5))


def test_batches_without_masks_or_boxes_are_refused():
    model = create("vidt_micro")
    batch = model.example_batch(2)
    with pytest.raises(BadInput, match="codes=False"):
        model.loss({k: v for k, v in batch.items() if k != "masks"})
    with pytest.raises(BadInput, match="annotated"):
        model.loss({k: v for k, v in batch.items() if k != "boxes"})
    with pytest.raises(BadInput, match="below 4"):
        model.loss({**batch, "labels": batch["labels"] + 5})
    loss = plain().loss({k: v for k, v in batch.items() if k != "masks"})
    assert torch.isfinite(loss.total)


# predicting ---------------------------------------------------------------------------------------------------------


def test_predictions_are_sorted_and_in_pixels_of_the_original(model):
    batch = model.example_batch(2)
    batch["original_size"] = batch["size"] * 3
    found = model.predict(batch)
    assert found.scores.shape == (2, 48) and (found.scores.diff(dim=1) <= 0).all()
    assert found.masks.shape == (2, 48, 24, 24) and found.masks.dtype == torch.bool
    single = model.predict({**batch, "original_size": batch["size"]})
    torch.testing.assert_close(found.boxes, single.boxes * 3)
    raw = model.raw(model.prepared(batch), batch["padding"])
    assert found.scores[0, 0] == raw.logits[0, -1].sigmoid().max()


def test_decoding_layers_can_be_dropped():
    torch.manual_seed(0)
    model = create("vidt_micro").eval()
    inputs = model.example(1)
    before = model.raw(*inputs)
    model.keep_layers(1)
    after = model.raw(*inputs)
    assert after.logits.shape[1] == 2 and torch.equal(after.logits[:, -1], before.logits[:, 1])
    assert torch.equal(after.boxes[:, -1], before.boxes[:, 1]) and model.config.decoder_layers == 1
    with pytest.raises(BadInput, match="0 to 1"):
        model.keep_layers(4)


def test_the_released_form_of_shared_heads_round_trips():
    from formarium.authors import load_state
    from formarium.authors.vidt import authors

    model = create("vidt_micro", refine=False)
    theirs = authors.export_state(model)
    assert {f"class_embed.{i}.weight" for i in range(3)} <= {*theirs} and "vector_embed.2.layers.0.weight" in theirs
    other = create("vidt_micro", refine=False)
    load_state(other, theirs)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.slow
def test_it_exports_to_onnx(tmp_path, model):
    from formarium.exporters import export

    assert export(model, tmp_path / "vidt.onnx").stat().st_size > 0  # which also compares outputs at other batch sizes


def test_at_first_every_class_is_unlikely():
    model = create("vidt_micro").eval()
    raw = model.raw(*model.example(2))
    assert raw.logits.sigmoid().mean().item() == pytest.approx(0.01, rel=1)
    assert model.no_weight_decay() == {"body.det_tokens", "body.det_positions"}


def test_it_learns():
    task = task_of("object-detection")
    data = task.sample("shapes")
    torch.manual_seed(0)
    model = create("vidt_micro")
    prepare = task.transform(model.preprocessing)
    batch = task.collate([prepare(data.splits["train"][i], np.random.default_rng(0)) for i in range(4)])
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    seen = []
    for _ in range(40):
        losses = model.loss(batch)
        optimiser.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        seen.append({k: v.item() for k, v in losses.terms.items()})
    assert all(seen[-1][k] < 0.8 * seen[0][k] for k in ("class", "l1", "giou", "codes", "token_dice"))
    model.eval()
    with torch.no_grad():
        metrics, _ = task.score([model.predict(batch)], [batch])
    assert metrics["found"] > 0.1
