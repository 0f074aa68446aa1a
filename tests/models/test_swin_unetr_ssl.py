"""Pre-training of Swin UNETR's encoder, and taking over an encoder that others have pre-trained."""

from pathlib import Path

import numpy as np
import pytest
import torch

import formarium
from formarium import create
from formarium.authors import authors_of, load_state
from formarium.authors.swin_unetr import config
from formarium.engine.records import replay
from formarium.errors import BadCheckpoint, BadInput
from formarium.nn.volume_pretraining import pretext_losses
from formarium.task import Data
from formarium.task import task as task_of
from formarium.tasks.medical_segmentation.data import without_masks
from formarium.tasks.medical_segmentation.model import Rebuilt, Segmented
from formarium.tasks.medical_segmentation.sample import BRATS_REGIONS, Volumes, tumour

FOLDER = Path(__file__).parent.parent / "parity" / "swin_unetr"
RECORDS = sorted(FOLDER.glob("*_ssl*.safetensors"))
TASK = task_of("medical-segmentation")
F12 = {"feature_size": 12, "heads": (3, 6, 12, 24), "window": 7, "regions": (), "in_channels": 1, "out_channels": 2}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return create("swin_unetr_ssl_micro")


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters in (outcome.expected_parameters, None)


# an encoder that others have pre-trained ----------------------------------------------------------------------------


def released(feature_size=12, channels=1, seed=0):
    """What model_swinvit.pt holds, by names and shapes: the encoder as it was called then, a norm, the heads."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"patch_embed.proj.weight": (feature_size, channels, 2, 2, 2), "patch_embed.proj.bias": (feature_size,)}
    for stage, heads in enumerate((3, 6, 12, 24)):
        d = feature_size * 2**stage
        for j in range(2):
            block = f"layers{stage + 1}.0.blocks.{j}"
            shapes |= {f"{block}.norm{n}.{kind}": (d,) for n in (1, 2) for kind in ("weight", "bias")}
            shapes |= {f"{block}.attn.relative_position_bias_table": (13**3, heads)}
            shapes |= {f"{block}.attn.qkv.weight": (3 * d, d), f"{block}.attn.qkv.bias": (3 * d,)}
            shapes |= {f"{block}.attn.proj.weight": (d, d), f"{block}.attn.proj.bias": (d,)}
            shapes |= {f"{block}.mlp.fc1.weight": (4 * d, d), f"{block}.mlp.fc1.bias": (4 * d,)}
            shapes |= {f"{block}.mlp.fc2.weight": (d, 4 * d), f"{block}.mlp.fc2.bias": (d,)}
        down = f"layers{stage + 1}.0.downsample"
        shapes |= {f"{down}.reduction.weight": (2 * d, 8 * d), f"{down}.norm.weight": (8 * d,), f"{down}.norm.bias": (8 * d,)}
    width = 16 * feature_size
    shapes |= {"norm.weight": (width,), "norm.bias": (width,), "rotation_head.weight": (4, width), "rotation_head.bias": (4,)}
    shapes |= {"contrastive_head.weight": (512, width), "contrastive_head.bias": (512,)}
    shapes |= {"conv.0.weight": (width // 2, width, 3, 3, 3), "conv.0.bias": (width // 2,)}
    state = {f"module.{k}": 0.2 * torch.randn(s, generator=g) for k, s in shapes.items()}
    index = torch.zeros(343, 343, dtype=torch.int64)
    state |= {f"module.layers{i}.0.blocks.{j}.attn.relative_position_index": index for i in range(1, 5) for j in range(2)}
    return {"epoch": 100, "state_dict": state}


def test_the_released_encoder_is_what_monai_makes_of_it(tmp_path):
    nets = pytest.importorskip("monai.networks.nets")
    theirs = nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12).eval()
    weights, index = released(), theirs.swinViT.layers1[0].blocks[0].attn.relative_position_index
    for key in weights["state_dict"]:
        if key.endswith("index"):
            weights["state_dict"][key] = index.clone()
    theirs.load_from(weights)
    torch.save(weights, tmp_path / "model_swinvit.pt")
    torch.manual_seed(1)
    ours = create("swin_unetr_micro", **F12).eval()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    assert ours.load_encoder(tmp_path / "model_swinvit.pt") is ours
    x = torch.randn(1, 1, 64, 32, 32)
    with torch.no_grad():
        for a, b in zip(ours.encode(x), theirs.swinViT(x, True), strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    same = {k for k, v in ours.state_dict().items() if torch.equal(v, before[k])}
    assert same == {k for k in before if k.startswith(("encoders.", "decoders.", "head."))}


def test_an_encoder_of_one_channel_in_a_network_of_four(tmp_path):
    path = tmp_path / "model_swinvit.pt"
    torch.save(released(), path)
    one, four = create("swin_unetr_micro", **F12).load_encoder(path), create("swin_unetr_micro", **{**F12, "in_channels": 4})
    with pytest.raises(BadInput, match=r"expected 4 channels, got 1 \(load_encoder\(..., in_channels=1\) shares") as caught:
        four.load_encoder(path)
    assert "\n" not in str(caught.value)
    four.load_encoder(path, in_channels=1)
    x = torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(four.embed(x.expand(-1, 4, -1, -1, -1)), one.embed(x), atol=1e-5, rtol=1e-5)
    assert one.embed.weight.abs().sum() > 0 and torch.equal(four.stages[3].merge.reduction.weight, one.stages[3].merge.reduction.weight)
    back = create("swin_unetr_micro", **F12).load_encoder(four, in_channels=4)
    torch.testing.assert_close(back.embed.weight, one.embed.weight)


def test_an_encoder_that_does_not_fit_is_refused(tmp_path):
    weights = released()
    del weights["state_dict"]["module.layers3.0.blocks.1.attn.qkv.weight"]
    torch.save(weights, tmp_path / "cut.pt")
    model = create("swin_unetr_micro", **F12)
    with pytest.raises(BadCheckpoint, match=r"1 not in it: stages\.2\.blocks\.1\.attention\.qkv\.weight"):
        model.load_encoder(tmp_path / "cut.pt")
    torch.save(released(feature_size=24), tmp_path / "wide.pt")
    with pytest.raises(BadCheckpoint, match="of another shape"):
        model.load_encoder(tmp_path / "wide.pt")
    with pytest.raises(BadInput, match="merging = merging, got merging_before_2025"):
        model.load_encoder(create("swin_unetr_micro", **F12, merging="merging_before_2025"))
    with pytest.raises(BadCheckpoint, match="not in it"):  # a whole network is asked for
        model.load_authors(tmp_path / "wide.pt")


def test_what_the_released_code_saves_loads_whole_and_as_an_encoder(tmp_path):
    torch.manual_seed(0)
    trained = create("swin_unetr_ssl_micro", **{**F12, "out_channels": 0})
    theirs = authors_of("swin_unetr").export_state(trained)
    assert {"swinViT.patch_embed.proj.weight", "rotation_head.weight", "contrastive_head.bias", "conv.20.weight"} <= {*theirs}
    for prefix in ("swinViT.", "swin_vit."):  # as it was called first
        names = {f"module.{k.replace('swinViT.', prefix)}": v for k, v in theirs.items()}
        torch.save({"epoch": 1, "state_dict": names, "optimizer": {"state": {}}}, tmp_path / "model_final_epoch.pt")
        again = create("swin_unetr_ssl_micro", **{**F12, "out_channels": 0})
        again.load_authors(tmp_path / "model_final_epoch.pt")
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in trained.state_dict().items())
        whole = create("swin_unetr_micro", **F12).load_encoder(tmp_path / "model_final_epoch.pt")
        assert torch.equal(whole.stages[1].blocks[1].mlp.fc2.weight, trained.stages[1].blocks[1].mlp.fc2.weight)


# pre-training -------------------------------------------------------------------------------------------------------


def data(labelled=True, sides=(64, 32, 32)):
    cases = []
    for i in range(4):
        image, label = tumour(sides, np.random.default_rng(i))
        cases.append({"image": image, "label": label, "id": str(i)})
    args = {"in_channels": 4, "out_channels": 3, "regions": BRATS_REGIONS, "spatial_dims": 3}
    found = Data("four", "medical-segmentation", {"train": Volumes(cases[:3]), "val": Volumes(cases[3:])}, args, ["a", "b", "c"], [], {})
    return found if labelled else without_masks(found)


def test_without_output_channels_it_is_the_encoder_and_the_heads(encoder):
    assert not any(k.startswith(("encoders.", "decoders.", "head.")) for k in encoder.state_dict())
    out = encoder(torch.randn(2, 4, 64, 32, 32))
    assert out.turn.shape == (2, 4) and out.embedding.shape == (2, 512) and out.rebuilt.shape == (2, 4, 64, 32, 32)
    (stage,) = encoder.training_stages()
    assert [t.loss for t in stage.turns] == ["pretraining_loss"]


def test_pretraining_reaches_every_weight_and_looks_at_no_label(encoder):
    batch = {"image": torch.randn(2, 4, 64, 32, 32)}
    torch.manual_seed(3)
    losses = encoder.pretraining_loss(batch)
    losses.total.backward()
    assert [*losses.terms] == ["rotation", "contrast", "reconstruction"]
    torch.testing.assert_close(losses.total, sum(losses.terms.values()))
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())
    torch.manual_seed(3)
    assert torch.equal(encoder.pretraining_loss({**batch, "label": torch.ones(2, 64, 32, 32).long()}).total, losses.total)
    with pytest.raises(BadInput, match="two sides of one length"):
        encoder.pretraining_loss({"image": torch.randn(2, 4, 64, 64, 32)})


def test_each_view_is_turned_and_damaged_by_itself_and_the_target_is_whole(encoder, monkeypatch):
    from formarium.models.dense import swin_unetr

    seen = {}

    def answers(views):
        seen["views"] = views
        return type(encoder).answers(encoder, views)

    def losses(said, turns, whole, *rest):
        seen["turns"], seen["whole"] = turns, whole
        return pretext_losses(said, turns, whole, *rest)

    monkeypatch.setattr(encoder, "answers", answers)
    monkeypatch.setattr(swin_unetr, "pretext_losses", losses)
    image = torch.randn(4, 4, 64, 32, 32)
    torch.manual_seed(0)
    encoder.pretraining_loss({"image": image})
    turns, whole = seen["turns"], seen["whole"]
    assert turns.shape == (8,) and not torch.equal(turns[:4], turns[4:])
    lost = (seen["views"] != whole).float().flatten(1).mean(1)
    for i in range(8):
        assert torch.equal(whole[i], torch.rot90(image[i % 4], int(turns[i]), (-2, -1)))
    assert 0.05 < lost.mean() < 0.45 and lost.max() < 0.7 and lost.std() > 0.01


def test_pretraining_learns_to_tell_turns_and_to_rebuild():
    torch.manual_seed(0)
    model = create("swin_unetr_ssl_micro", spatial_dims=2, in_channels=1, window=(4, 4), pretraining="deconv").train()
    ramp = torch.linspace(-2, 2, 64).view(1, 1, 64, 1).expand(4, 1, 64, 64) + 0.1 * torch.randn(4, 1, 64, 64)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    terms = []
    for _ in range(40):
        losses = model.pretraining_loss({"image": ramp})
        optimiser.zero_grad()
        losses.total.backward()
        optimiser.step()
        terms.append({k: v.item() for k, v in losses.terms.items()})
    late = {k: sum(t[k] for t in terms[-5:]) / 5 for k in terms[0]}
    assert late["rotation"] < 0.5 * terms[0]["rotation"] and late["reconstruction"] < 0.7 * terms[0]["reconstruction"]


def test_a_run_on_volumes_without_masks_is_where_a_fit_with_masks_starts(tmp_path):
    how = {"progress": False, "steps": 2, "batch_size": 2, "validations": 1}
    run = formarium.fit("swin_unetr_ssl_micro", data(labelled=False), tmp_path / "pre", **how)
    assert {*run.summary} == {"reconstruction", "rotation"} and 0 < run.summary["reconstruction"] < 5
    assert {"rotation", "contrast", "reconstruction"} <= {*run.history[0]}
    pre = {k: v.clone() for k, v in run.model.state_dict().items()}
    tuned = formarium.fit(tmp_path / "pre", data(), tmp_path / "tuned", lr=1e-12, min_lr=0.0, weight_decay=0.0, **how)
    own = tuned.model.state_dict()
    shared = [k for k in pre if k.startswith(("embed", "stages."))]
    assert len(shared) > 100 and all(torch.allclose(own[k], pre[k], atol=1e-6) for k in shared)
    assert not any(k.startswith("ssl.") for k in own) and tuned.model.config.out_channels == 3
    assert {*own} == {*create("swin_unetr_micro").state_dict()} and 0 <= tuned.summary["dice"] <= 1
    again = formarium.load(tmp_path / "tuned")
    assert isinstance(again.predict({"image": torch.randn(1, 4, 64, 32, 32)}), Segmented)
    by_hand = create("swin_unetr_micro").load_encoder(formarium.load(tmp_path / "pre"))
    assert all(torch.equal(by_hand.state_dict()[k], pre[k]) for k in shared)


def test_both_in_one_fit():
    model = create("swin_unetr_micro", pretraining="deconv", pretraining_share=0.5)
    stages = model.training_stages()
    assert [(s.name, s.share, s.turns[0].loss) for s in stages] == [("pre-train", 0.5, "pretraining_loss"), ("fine-tune", 0.5, "loss")]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = formarium.fit(model, data(), steps=2, batch_size=2, validations=1, progress=False, weight_decay=0.0)
    moved = {k.split(".")[0] for k, v in run.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {"embed", "stages", "encoders", "decoders", "head", "ssl"} and "dice" in run.summary


def test_what_an_encoder_in_pretraining_predicts(encoder):
    batch = {"image": torch.randn(2, 4, 70, 20, 32), "id": ["a", "b"]}
    out = encoder.eval().predict(batch)
    assert isinstance(out, Rebuilt) and out.image.shape == out.whole.shape == (2, 4, 64, 32, 32)
    assert not torch.equal(out.damaged, out.whole) and {*TASK.score([out], [batch])[0]} == {"reconstruction", "rotation"}
    assert len(TASK.rows(out, batch, [])) == 2 and TASK.draw(out, batch).height > 400


def test_what_cannot_be_is_said(encoder):
    with pytest.raises(BadInput, match="volumes with masks"):
        formarium.fit("swin_unetr_micro", data(labelled=False), steps=1)
    with pytest.raises(BadInput, match="out_channels = 3, as the data has"):
        formarium.fit(encoder, data(), steps=1)
    with pytest.raises(BadInput, match="with pretraining given"):
        create("swin_unetr_micro", out_channels=0, regions=())
    with pytest.raises(BadInput, match="vae, deconv, large_kernel_deconv"):
        create("swin_unetr_micro", pretraining="pixels")
    with pytest.raises(BadInput, match="pretraining_share"):
        create("swin_unetr_micro", pretraining="vae", pretraining_share=1.0)
    with pytest.raises(BadInput, match=r"axes -3 \.\. -1"):
        create("swin_unetr_ssl_micro", turn_plane=(0, 1))
    assert config({"upsample": "deconv", "dim": 192, "in_channels": 1, "feature_size": 12}, {})["pretraining"] == "deconv"
    load_state(encoder, authors_of("swin_unetr").export_state(encoder))
