"""Semantic FPN and UPerNet: any backbone serves, sizes, windows, released names, learning."""

import pytest
import torch

import formarium
from formarium.authors import authors_of, load_state
from formarium.catalogue import cards, model_class
from formarium.errors import BadInput, UnknownName

BACKBONES = [
    c.micro.name
    for c in cards().values()
    if c.kind == "model" and c.task == "image-classification" and c.micro and hasattr(model_class(c), "pyramid")
]


@pytest.mark.parametrize("backbone", BACKBONES)
def test_any_backbone_serves_by_name(backbone):
    torch.manual_seed(0)
    model = formarium.create("semantic_fpn_micro", backbone=backbone, num_classes=3)
    batch = model.example_batch(2)
    model.loss(batch).total.backward()
    idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and n.startswith(("neck", "decoder"))]
    assert not idle
    with torch.no_grad():
        assert model.eval()(torch.randn(1, 3, 50, 70)).shape == (1, 3, 50, 70)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_plain_trunks_serve(name):
    own = {"image_size": 64, "patch_size": 8 if name == "vit" else 4, "dim": 24, "heads": 2} | (
        {"depth": 2} if name == "vit" else {"depths": (1, 1), "heads": (2, 4)}
    )
    model = formarium.create("semantic_fpn_micro", backbone=name, backbone_config=own).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 6, 64, 64)


def test_the_published_sizes():
    """PVT's paper (table 5) gives 17.0, 28.2, 48.0 and 65.1 million."""
    for name, variant in formarium.card("semantic_fpn").published.items():
        if "million_parameters" in variant.published:
            with torch.device("meta"):
                count = formarium.create(name).parameters_count
            assert round(count / 1e6, 1) == variant.published["million_parameters"], name


def test_larger_pictures_go_window_by_window():
    torch.manual_seed(0)
    model = formarium.create("semantic_fpn_micro").eval()
    batch = model.example_batch(1)
    big = {**batch, "image": torch.rand(1, 3, 200, 150)}
    seen = []
    model.neck.register_forward_pre_hook(lambda m, maps: seen.append(maps[0][0].shape))
    with torch.no_grad():
        said = model.predict(big)
    assert said.label.shape == (1, 200, 150) and len(seen) >= 1 and all(max(s[2:]) <= 128 // 4 for s in seen)


def test_released_names_go_both_ways():
    for name in ("semantic_fpn_micro", "upernet_micro"):
        for norm in ("group", "batch"):
            model = formarium.create(name, norm=norm).eval()
            theirs = authors_of("semantic_fpn").export_state(model)
            assert {"decode_head.conv_seg.weight"} <= {*theirs} and not any(k.startswith("decoder") for k in theirs)
            assert any(k.endswith({"batch": "bn.weight", "group": "gn.weight"}[norm]) for k in theirs)
            other = formarium.create(name, norm=norm).eval()
            load_state(other, theirs)
            (image,) = model.example()
            assert torch.equal(model(image), other(image))
    assert "decode_head.scale_heads.3.4.conv.weight" in authors_of("semantic_fpn").export_state(formarium.create("semantic_fpn_pvt_tiny"))


def test_an_authors_backbone_checkpoint_is_taken(tmp_path):
    from safetensors.torch import save_file

    source = formarium.create("pvt_micro", dense=True)
    state = {k: v.contiguous() for k, v in authors_of("pvt").export_state(source).items()}
    save_file(state, tmp_path / "pvt.safetensors")
    model = formarium.create("semantic_fpn_micro", backbone="pvt_micro").load_backbone(tmp_path / "pvt.safetensors")
    assert all(torch.equal(v, source.state_dict()[k]) for k, v in model.backbone.state_dict().items())


def test_bad_input():
    with pytest.raises(UnknownName, match="head"):
        formarium.create("semantic_fpn_micro", head="upper")
    with pytest.raises(BadInput, match="image backbone"):
        formarium.create("semantic_fpn_micro", backbone="vdt_micro")
    with pytest.raises(UnknownName):
        formarium.create("semantic_fpn_micro", backbone="pvt_tinyy")


def test_it_learns(tmp_path):
    run = formarium.fit("semantic_fpn_micro", "sample:mosaics", steps=40, progress=False, validations=1)
    assert run.summary["pixel_accuracy"] > 0.28  # six classes; the colour rival has 0.29 with all its data
    losses = [v for _, v in run.curve("loss")]
    assert losses[-1] < 0.85 * losses[0]
