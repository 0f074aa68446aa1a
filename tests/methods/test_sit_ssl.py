from pathlib import Path

import pytest
import torch

from formarium import create
from formarium.authors import authors_of, load_state
from formarium.catalogue import card
from formarium.engine.records import replay
from formarium.errors import BadInput, UnknownName
from formarium.methods.sit_ssl import SiT, contrastive_loss, corrupt, features, masked_difference
from formarium.task import task as task_of

RECORDS = sorted((Path(__file__).parent.parent / "parity" / "sit_ssl").glob("*.safetensors"))
BACKBONES = card("sit_ssl").demo["backbones"]


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters in (None, outcome.expected_parameters)


@pytest.mark.parametrize("name", ["sit_ssl_tiny", "sit_ssl_small", "sit_ssl_base"])
def test_published_sizes(name):
    with torch.device("meta"):
        model = create(name)
    said = card("sit_ssl").variants[name].published
    assert model.parameters_count == said["parameters"]
    assert model.trunk.parameters_count == said["backbone_parameters"]


# corruption ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("filler", ["zeros", "noise", "elsewhere"])
def test_half_of_the_pixels_is_corrupted_and_the_others_stay(filler):
    clean = torch.randn(6, 3, 48, 32)
    out, mask = corrupt(clean, 0.5, filler)
    share = mask.mean((1, 2, 3))
    assert mask.shape == (6, 1, 48, 32) and (share >= 0.5).all() and (share < 0.62).all()  # one more rectangle at most
    kept = (mask == 0).expand_as(clean)
    assert torch.equal(out[kept], clean[kept])
    assert (out[~kept] == 0).all() if filler == "zeros" else (out[~kept] != clean[~kept]).float().mean() > 0.6


def test_swapped_rectangles_hold_another_image_at_the_same_place():
    clean, others = torch.randn(8, 3, 32, 32), torch.randn(8, 3, 32, 32)
    out, mask = corrupt(clean, others=others, swap=1.0, swap_share=0.3)
    assert torch.equal(out, torch.where(mask == 1, others, clean)) and (mask.mean((1, 2, 3)) >= 0.3).all()
    assert (mask.mean((1, 2, 3)) < 0.42).all()
    half = [(corrupt(clean, others=others, generator=torch.Generator().manual_seed(s))[0] == 0).any(1).any(-1).any(-1) for s in range(8)]
    assert 0.25 < torch.stack(half).float().mean() < 0.75  # the others are blanked


def test_claim_aligned_corruption_touches_whole_patches():
    _, mask = corrupt(torch.randn(4, 3, 32, 32), align=4)
    patches = mask.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert (patches.amin(-1) == patches.amax(-1)).all()
    _, mask = corrupt(torch.randn(4, 3, 32, 32), align=1)
    patches = mask.unfold(2, 4, 4).unfold(3, 4, 4).flatten(4)
    assert (patches.amin(-1) != patches.amax(-1)).any()


def test_corruption_depends_on_its_generator_alone():
    clean = torch.randn(4, 3, 32, 32)
    one, same, other = (corrupt(clean, others=clean.flip(0), generator=torch.Generator().manual_seed(s))[0] for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


# the claim ----------------------------------------------------------------------------------------------------------


def test_claim_reconstruction_has_no_gradient_where_nothing_was_corrupted():
    clean, rebuilt = torch.randn(2, 3, 16, 16), torch.randn(2, 3, 16, 16, requires_grad=True)
    mask = (torch.rand(2, 1, 16, 16) < 0.5).float()
    masked_difference(rebuilt, clean, mask).backward()
    hidden = mask.expand_as(clean) == 1
    assert (rebuilt.grad[~hidden] == 0).all() and (rebuilt.grad[hidden] != 0).all()


def test_claim_the_contrast_is_the_same_with_the_views_exchanged():
    student, teacher = torch.randn(8, 16), torch.randn(8, 16)
    exchanged = contrastive_loss(student.roll(4, 0), teacher.roll(4, 0))
    torch.testing.assert_close(contrastive_loss(student, teacher), exchanged)
    assert contrastive_loss(student, student.roll(4, 0)) < contrastive_loss(student, teacher)


def test_claim_the_teacher_follows_without_a_gradient():
    model = create("sit_ssl_micro", momentum=0.9)
    model.start_teacher()
    assert not [*model.teacher.parameters()]
    before = {k: v.clone() for k, v in model.teacher.trunk.named_buffers()}
    model.pretraining_loss(model.example_batch(4)).total.backward()
    assert torch.equal(before["cls_token"], model.trunk.cls_token)
    with torch.no_grad():
        for p in model.trunk.parameters():
            p.add_(1)
    model.after_step(1, 100)  # at the start the momentum is the config's
    now = dict(model.teacher.trunk.named_buffers())
    for name, p in model.trunk.named_parameters():
        torch.testing.assert_close(now[name], 0.9 * before[name] + 0.1 * p.detach())
    model.after_step(50, 100)  # at the end of pre-training nearly 1
    last = {k: v.clone() for k, v in model.teacher.trunk.named_buffers()}
    assert (last["cls_token"] - model.trunk.cls_token).abs().min() > 0.85
    model.after_step(51, 100)
    assert torch.equal(last["cls_token"], dict(model.teacher.trunk.named_buffers())["cls_token"])


def test_the_teacher_drops_nothing_and_its_batch_norms_are_its_own():
    model = create("sit_ssl_micro", trunk_config={"image_size": 32, "patch_size": 8, "dim": 32, "depth": 2, "heads": 2, "drop_path": 0.5})
    image = torch.randn(4, 3, 32, 32)
    model.train()
    torch.testing.assert_close(model.teacher(image), model.teacher(image))
    assert model.trunk.blocks[1].drop.rate == 0.5
    assert model.project[1].num_batches_tracked == 0 and model.teacher.project[1].num_batches_tracked == 2


# any backbone -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_of_the_card_pre_trains_and_classifies(name):
    torch.manual_seed(0)
    plain = create(name, num_classes=4)
    model = SiT(head_hidden=32, out_dim=16, reconstruction_weight=5.0).apply(plain)
    batch = model.example_batch(6)
    losses = model.pretraining_loss(batch)
    losses.total.backward()
    assert losses.terms["reconstruction"] > 0 and {*losses.terms} == {"contrastive", "reconstruction"}
    blocks = [p for n, p in model.trunk.named_parameters() if "blocks" in n]
    assert sum(p.grad is not None for p in blocks) > 0.8 * len(blocks)
    model.eval()
    with torch.no_grad():
        assert model.pretext(batch["image"]).reconstruction.shape == batch["image"].shape
        torch.testing.assert_close(model.predict(batch).probabilities, plain.eval().predict(batch).probabilities)
    again = create("sit_ssl_micro", **{k: v for k, v in model.config_dict().items()})
    again.load_state_dict(model.state_dict())


def test_a_vit_gets_sit_s_head_and_keeps_its_weights():
    vit = create("sit_ssl_micro").trunk
    model = SiT(head_hidden=16).apply(_vit())
    assert model.head[0].in_features == 64 and not hasattr(model.trunk, "head") and vit is not model.trunk
    feature = features(model.trunk, torch.rand(2, 3, 16, 16), model.place)
    assert feature.prefix == 1 and feature.grid == (4, 4)


def _vit():
    from formarium.tasks.image_classification.trunks import ViT

    return ViT(ViT.Config(image_size=16, patch_size=4, dim=32, depth=1, heads=2, num_classes=3))


def test_what_it_cannot_wrap_it_says():
    with pytest.raises(BadInput, match="already"):
        SiT().apply(create("sit_ssl_micro"))
    with pytest.raises(UnknownName, match="temperature"):
        SiT(temprature=0.1)
    with pytest.raises(UnknownName, match="zeros"):
        create("sit_ssl_micro", fillers=("zero",))
    with pytest.raises(BadInput, match="num_classes"):
        create("sit_ssl_micro", num_classes=0).predict({"image": torch.rand(1, 3, 32, 32)})


def test_stages():
    assert [(s.name, s.share) for s in create("sit_ssl_micro").training_stages()] == [("pre-train", 0.5), ("fine-tune", 0.5)]
    assert [s.name for s in create("sit_ssl_micro", pretext=False).training_stages()] == ["fine-tune"]
    assert [s.name for s in create("sit_ssl_micro", num_classes=0).training_stages()] == ["pre-train"]


@pytest.mark.parametrize("options", [{"num_classes": 0}, {"pretext": False, "num_classes": 5}])
def test_authors_names_round_trip(options):
    model = create("sit_ssl_micro", **options)
    theirs = authors_of("sit_ssl").export_state(model)
    assert ("backbone.pos_embed" if model.config.pretext else "head.2.weight") in theirs
    other = create("sit_ssl_micro", **options)
    load_state(other, theirs)
    mine, its = (dict(m.named_parameters()) for m in (model, other))
    assert all(torch.equal(mine[k], its[k]) for k in mine)


def test_reconstruction_learns():
    torch.manual_seed(0)
    model = create("sit_ssl_micro", reconstruction_weight=1.0)
    image = torch.rand(12, 3, 1, 1).expand(-1, -1, 32, 32) * torch.linspace(0.2, 1, 32)
    batch = {"image": image.contiguous()}
    optimiser = torch.optim.AdamW(model.parameters(), 3e-3)
    errors = []
    for step in range(25):
        losses = model.pretraining_loss(batch)
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        model.after_step(step + 1, 100)
        errors.append(losses.terms["reconstruction"].item())
    assert sum(errors[-3:]) < 0.75 * sum(errors[:3])


@pytest.mark.slow
def test_pre_training_alone_raises_a_linear_probe_and_rebuilds_better_than_the_mean_pixel():
    import formarium
    from formarium.engine.probing import linear_probe

    torch.manual_seed(0)
    model = create("sit_ssl_micro", num_classes=10, pretraining_share=1.0)
    before = linear_probe(model, "sample:digits")
    run = formarium.fit(model, "sample:digits", out=None, progress=False, steps=400)
    assert linear_probe(run, "sample:digits") > before + 0.08
    network = run.model.eval()
    data = task_of("image-classification").sample("digits").splits["val"]
    clean = network.normalise(torch.from_numpy(data.images[:128]).movedim(-1, 1).float() / 255)
    broken, mask = corrupt(clean, align=8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        rebuilt = network.pretext(broken).reconstruction
    assert masked_difference(rebuilt, clean, mask) < 0.9 * masked_difference(clean.mean((2, 3), keepdim=True).expand_as(clean), clean, mask)
