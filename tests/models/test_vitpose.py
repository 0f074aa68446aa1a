from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from formarium import create, trace
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.nn.heatmaps import gaussian_targets
from formarium.task import task as task_of
from formarium.tasks.human_pose.model import mirror

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "vitpose").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


def test_claim_every_block_sees_the_same_tokens_and_the_output_has_stride_4():
    for name in ("vitpose_small", "vitpose_small_simple"):
        model = create(name, depth=3).eval()
        read = trace(model, (torch.rand(1, 3, 256, 192),), at="blocks.*")
        assert {(f.tokens.shape[1], f.grid) for f in read.values()} == {(192, (16, 12))}
        assert read.output.shape == (1, 17, 64, 48)


def test_claim_the_simple_decoder_has_no_deconvolution():
    with torch.device("meta"):
        simple, classic = create("vitpose_base_simple"), create("vitpose_base")
    assert not any(isinstance(m, nn.ConvTranspose2d) for m in simple.modules())
    assert sum(isinstance(m, nn.ConvTranspose2d) for m in classic.modules()) == 2


def test_patches_are_padded_by_two_pixels():
    model = create("vitpose_small", depth=1).eval()
    assert model.embed.padding == (2, 2) and model.embed.stride == (16, 16)
    image = torch.zeros(1, 3, 256, 192)
    other = image.clone()
    other[..., 13, :] = 1  # the last row of the first patch row, 16 - 2 - 1
    change = [trace(model, (x,), at="tokens")["tokens"].map() for x in (image, other)]
    assert (change[0] - change[1]).abs().sum((0, 1, 3)).nonzero().flatten().tolist() == [0]


def test_the_class_tokens_place_is_added_to_every_patch():
    model = create("vitpose_micro").eval()
    image = torch.rand(1, 3, 64, 48)
    before = trace(model, (image,), at="tokens")["tokens"].tokens
    with torch.no_grad():
        model.positions[:, 0] += 1
    torch.testing.assert_close(trace(model, (image,), at="tokens")["tokens"].tokens, before + 1)


def test_the_loss_is_the_weighted_squared_error_over_joints():
    model = create("vitpose_micro").eval()
    batch = model.example_batch(3)
    maps = model.forward_batch(batch)
    stride = torch.tensor([47 / 23, 63 / 31])
    target, weight = gaussian_targets(batch["keypoints"] / stride, batch["visible"], (32, 24))
    each = [nn.functional.mse_loss(maps[:, j] * weight[:, j, None, None], target[:, j] * weight[:, j, None, None]) for j in range(17)]
    losses = model.loss(batch)
    torch.testing.assert_close(losses.total, sum(each) / 17)
    hidden = {**batch, "visible": torch.zeros_like(batch["visible"])}
    assert model.loss(hidden).total == 0


def test_prediction_maps_back_into_the_whole_picture():
    model = create("vitpose_micro").eval()
    model.flip_test = False
    points = torch.tensor([12.0, 20.0]).expand(1, 17, 2)
    maps, _ = gaussian_targets(points, torch.ones(1, 17), (32, 24))
    model.forward = lambda image: maps
    batch = {**model.example_batch(1), "centre": torch.tensor([[100.0, 50.0]]), "extent": torch.tensor([[46.0, 62.0]])}
    poses = model.predict(batch)
    torch.testing.assert_close(poses.keypoints[0, 0], torch.tensor([100 - 23 + 12 * 2.0, 50 - 31 + 20 * 2.0]), atol=0.1, rtol=0)
    assert poses.score.item() == pytest.approx(1, abs=1e-5)


def test_the_flip_test_makes_prediction_blind_to_mirrors():
    torch.manual_seed(0)
    model = create("vitpose_micro").eval()
    nn.init.normal_(model.head.final.weight, std=0.5)
    batch = model.example_batch(2)
    maps, mirrored = model.heatmaps(batch), model.heatmaps(mirror(batch))
    order = [0, *(j for i in range(1, 17, 2) for j in (i + 1, i))]
    torch.testing.assert_close(mirrored, maps[:, order].flip(-1), atol=1e-5, rtol=1e-4)


def test_a_student_takes_the_teachers_token_and_maps():
    teacher = create("vitpose_micro", knowledge="learn", dim=120).eval()
    stage = teacher.training_stages()[0]
    assert stage.turns[0].train == ("knowledge",)
    before = teacher(torch.zeros(1, 3, 64, 48))
    with torch.no_grad():
        teacher.knowledge += 1
        nn.init.normal_(teacher.head.final.weight, std=0.1)
    assert not torch.equal(teacher(torch.zeros(1, 3, 64, 48)), before)
    student = create("vitpose_micro", knowledge="use", knowledge_dim=120).distil_from(teacher)
    assert torch.equal(student.knowledge, teacher.knowledge) and not student.knowledge.requires_grad
    losses = student.loss(student.example_batch(2))
    assert losses.terms["teacher"] > 0 and losses.total == losses.terms["heatmap"] + losses.terms["teacher"]
    losses.total.backward()
    assert all(p.grad is None for p in teacher.parameters()) and student.knowledge_in.weight.grad is not None
    assert not any("teacher" in k for k in student.state_dict())
    with pytest.raises(BadInput, match="width 96"):
        create("vitpose_micro", knowledge="use").distil_from(teacher)


def test_heads_start_near_zero_and_blocks_as_usual():
    model = create("vitpose_small", depth=1)
    assert model.head.final.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert model.blocks[0].mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.no_weight_decay() == {"positions", "knowledge"}


def test_a_batch_without_keypoints_cannot_be_trained_on():
    model = create("vitpose_micro")
    batch = model.example_batch(2)
    del batch["keypoints"]
    with pytest.raises(BadInput, match="annotated"):
        model.loss(batch)


def test_it_learns():
    task = task_of("human-pose")
    data = task.sample("figures")
    torch.manual_seed(0)
    model = create("vitpose_micro")
    prepare = task.transform(model.preprocessing)
    samples = [prepare(data.splits["train"][i], np.random.default_rng(0)) for i in range(64)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(80):
        batch = task.collate([samples[j] for j in np.random.default_rng(step).permutation(64)[:16]])
        optimiser.zero_grad()
        model.loss(batch).total.backward()
        optimiser.step()
    batch = task.collate(samples)
    model.eval()
    with torch.no_grad():
        metrics, _ = task.score([model.predict(batch)], [batch])
        untrained, _ = task.score([create("vitpose_micro").eval().predict(batch)], [batch])
    assert metrics["pck"] > 0.5 > untrained["pck"]
