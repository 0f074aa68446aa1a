from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from formarium import create
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.image.uni4eye import (
    gradient_map,
    hide,
    masked_error,
    patch_entropy,
    patchify,
    sine_positions,
    unpatchify,
    unshuffle,
)
from formarium.task import task as task_of

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "uni4eye").glob("*.safetensors"))


def mixed_batch(model, count=4):
    two, three = model.example_batch(count, rank=2), model.example_batch(count, rank=3)
    joined = {k: torch.cat([two[k], three[k]]) for k in ("label", "rank")}
    return {**joined, "image": [*two["image"], *three["image"]], "id": [str(i) for i in range(2 * count)]}


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters in (None, outcome.expected_parameters)


def test_claim_volumes_reach_every_block_and_their_own_projection_alone():
    model = create("uni4eye_micro")
    model.loss(model.example_batch(2, rank=3)).total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.blocks.named_parameters() if not n.endswith("qkv.bias"))
    assert model.embed3.weight.grad.abs().sum() > 0 and model.embed2.weight.grad is None
    both = create("uni4eye_micro")
    both.pretraining_loss(mixed_batch(both)).total.backward()
    silent = [n for n, p in both.named_parameters() if p.grad is None]
    assert all(n.startswith("head.") for n in silent)


def test_claim_the_loss_sees_hidden_patches_only():
    prediction, target = torch.rand(2, 6, 5, requires_grad=True), torch.rand(2, 6, 5)
    mask = torch.tensor([[1.0, 0, 0, 1, 0, 1], [0, 0, 1, 1, 1, 0]])
    masked_error(prediction, target, mask).backward()
    assert (prediction.grad[mask == 0] == 0).all() and (prediction.grad[mask == 1] != 0).all()


def test_claim_unshuffling_undoes_hiding():
    tokens = torch.randn(3, 8, 5)
    keep, mask, restore = hide(torch.rand(3, 8), 0.75)
    visible = tokens.gather(1, keep[..., None].expand(-1, -1, 5))
    back = unshuffle(visible, torch.full((1, 1, 5), 7.0), restore)
    assert keep.shape == (3, 2) and (mask.sum(1) == 6).all()
    torch.testing.assert_close(back[mask == 0], tokens[mask == 0])
    assert (back[mask == 1] == 7).all()


@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (2, 1, 8, 12, 8)])
def test_gradient_targets_ignore_a_constant_and_intensities_do_not(shape):
    x = torch.rand(shape)
    torch.testing.assert_close(gradient_map(x + 0.3), gradient_map(x), atol=1e-5, rtol=0)
    assert (patchify(x + 0.3, 4) - patchify(x, 4)).min() > 0.29
    assert gradient_map(x).shape == x.shape


def test_gradients_are_sobels_of_every_slice():
    x = torch.rand(2, 3, 9, 11)
    side = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]) / 4
    y = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="replicate").view(6, 1, 11, 13), torch.stack([side, side.T])[:, None])
    torch.testing.assert_close(gradient_map(x), y.square().sum(1).sqrt().view(x.shape))
    volume = torch.rand(1, 1, 8, 8, 5)
    torch.testing.assert_close(gradient_map(volume)[..., 2], gradient_map(volume[..., 2]))
    edge = torch.zeros(1, 1, 6, 6)
    edge[..., 3:] = 1
    assert gradient_map(edge).max() == 1


@pytest.mark.parametrize("shape", [(2, 3, 16, 24), (2, 1, 8, 12, 8)])
def test_patches_are_what_the_convolution_sees(shape):
    x, rank = torch.rand(shape), len(shape) - 2
    torch.testing.assert_close(unpatchify(patchify(x, 4), tuple(n // 4 for n in shape[2:]), 4), x)
    model = create("uni4eye_micro", patch_size=4)
    conv = model.embed2 if rank == 2 else model.embed3
    theirs = conv(x.expand(-1, 3, *shape[2:])).flatten(2).transpose(1, 2)  # a grey volume three times over
    torch.testing.assert_close(model.embedded(x), theirs, atol=1e-5, rtol=1e-4)


def test_positions_tell_every_place_of_a_volume():
    table = sine_positions((4, 4, 2), 64)
    assert table.shape == (32, 64) and torch.cdist(table, table).fill_diagonal_(9).min() > 0.5
    released = create("uni4eye_micro", patch_size=8, volume_positions="zero", decoder_depth=0).eval()
    volume = torch.rand(1, 1, 32, 32, 16)
    moved = volume.flip(2, 3, 4)  # other patches in other places: with no positions only their contents count
    with torch.no_grad():
        swapped = torch.cat([volume[:, :, 8:16], volume[:, :, :8], volume[:, :, 16:]], 2)
        torch.testing.assert_close(released(swapped), released(volume), atol=1e-4, rtol=1e-4)
        assert not torch.allclose(released(moved), released(volume), atol=1e-3)


def test_low_entropy_patches_stay_visible():
    image = torch.full((1, 3, 32, 32), 0.5)
    image[..., 16:] = torch.rand(1, 3, 32, 16)
    entropy = patch_entropy(patchify(image, 8), 3)
    assert entropy.min() == 0 and entropy.max() == 1 and (entropy.view(4, 4)[:, :2] == 0).all()
    model = create("uni4eye_micro", patch_size=8, entropy_masking=True, mask_ratio=0.5)
    mask = model.encode(image, model.noise(image)).mask.view(4, 4)
    assert (mask[:, :2] == 0).all() and (mask[:, 2:] == 1).all()
    assert (patch_entropy(patchify(torch.zeros(1, 3, 16, 16), 8), 3) == 0).all()  # and not 0 / 0


def test_a_batch_of_both_ranks_is_predicted_in_its_order():
    model = create("uni4eye_micro").eval()
    batch = mixed_batch(model, 2)
    order = [3, 0, 2, 1]
    shuffled = {k: [v[i] for i in order] if isinstance(v, list) else v[order] for k, v in batch.items()}
    with torch.no_grad():
        one, other = model.predict(batch).probabilities, model.predict(shuffled).probabilities
    torch.testing.assert_close(other, one[order])
    with pytest.raises(BadInput, match="one rank"):
        model.forward_batch(batch)


def test_training_has_two_stages_and_one_without_decoders():
    assert [s.name for s in create("uni4eye_micro").training_stages()] == ["pre-train", "fine-tune"]
    assert [s.name for s in create("uni4eye_micro", decoder_depth=0).training_stages()] == ["fine-tune"]
    assert [s.name for s in create("uni4eye_micro", pretraining_share=1.0).training_stages()] == ["pre-train"]
    assert [s.name for s in create("uni4eye_micro", num_classes=0).training_stages()] == ["pre-train"]


def test_the_released_dynamic_head_mixes_patches_and_is_for_images():
    model = create("uni4eye_micro", patch_size=8, dynamic_head=True, gradient_branch=False).eval()
    batch = model.example_batch(2)
    losses = model.pretraining_loss({**batch, "source": torch.tensor([0, 3])})
    assert torch.isfinite(losses.total) and [*losses.terms] == ["intensity_2d"]
    with pytest.raises(BadInput, match="images of 16 patches"):
        model.pretraining_loss(model.example_batch(2, rank=3))


def test_wrong_inputs_are_refused():
    model = create("uni4eye_micro")
    for bad in (torch.rand(1, 3, 30, 32), torch.rand(1, 2, 32, 32, 16), torch.rand(3, 32, 32), torch.rand(1, 1, 32, 32, 10)):
        with pytest.raises(BadInput):
            model(bad)
    with pytest.raises(BadInput, match="pool"):
        create("uni4eye_micro", pool="max")
    with pytest.raises(BadInput, match="decoders"):
        create("uni4eye_micro", decoder_depth=0).reconstruct(torch.rand(1, 3, 32, 32))


def test_reconstruction_learns():
    torch.manual_seed(0)
    model = create("uni4eye_micro")
    ramp = torch.linspace(0, 1, 32).expand(8, 3, 32, 32) * torch.rand(8, 1, 1, 1)
    batch = {"image": ramp, "rank": torch.full((8,), 2), "id": [""] * 8}
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    errors = []
    for _ in range(40):
        loss = model.pretraining_loss(batch).total
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        errors.append(loss.item())
    assert errors[-1] < 0.5 * errors[0]
    shown = model.reconstruct(model.normalise(ramp))
    assert shown.intensity.shape == ramp.shape == shown.gradient.shape and 0.4 < shown.hidden.mean() < 0.8


@pytest.mark.slow
def test_pre_training_alone_raises_a_linear_probe_of_both_ranks():
    import formarium
    from formarium.engine.probing import linear_probe

    torch.manual_seed(0)
    model = create("uni4eye_micro", pretraining_share=1.0, pool="mean")  # of the patches: no loss of pre-training asks for the class token
    before = {name: linear_probe(model, f"sample:{name}") for name in ("fundus", "oct")}
    run = formarium.fit(model, "sample:eyes", out=None, progress=False, steps=400, validations=1)
    gains = {name: linear_probe(run, f"sample:{name}") - was for name, was in before.items()}
    assert min(gains.values()) > 0 and sum(gains.values()) > 0.04, gains
    network = run.model.eval()
    for name in before:
        samples = task_of("medical-classification").sample(name).splits["val"]
        ready = task_of("medical-classification").transform(network.preprocessing)
        rng = np.random.default_rng(0)
        x = network.normalise(task_of("medical-classification").collate([ready(samples[i], rng) for i in range(100)])["image"])
        rebuilt = network.reconstruct(x)
        hidden = rebuilt.hidden.expand_as(x) == 1
        error = (rebuilt.intensity - x)[hidden].square().mean()
        mean = x.flatten(1).mean(1).view(-1, *(1,) * (x.ndim - 1)).expand_as(x)
        assert error < 0.5 * (mean - x)[hidden].square().mean(), name  # the variance about each sample's mean
