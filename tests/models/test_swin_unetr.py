from pathlib import Path

import pytest
import torch

from formarium import create
from formarium.authors import authors_of, load_state
from formarium.authors.swin_unetr import config
from formarium.engine.records import replay
from formarium.errors import BadInput
from formarium.models.dense.swin_unetr import OCTANTS
from formarium.tasks.medical_segmentation.model import compose, dice_loss, region_masks

FOLDER = Path(__file__).parent.parent / "parity" / "swin_unetr"
RECORDS = sorted(p for p in FOLDER.glob("*.safetensors") if "_ssl" not in p.stem)  # of pre-training: test_swin_unetr_ssl.py
TINY = {"in_channels": 1, "out_channels": 2, "feature_size": 12}


@pytest.fixture(scope="module")
def micro():
    torch.manual_seed(0)
    return create("swin_unetr_micro").eval()


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.stem)
def test_the_reference_computes_the_same(path):
    outcome = replay(path)
    assert outcome.ok, outcome.why
    assert outcome.parameters == outcome.expected_parameters


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, (96, 32, 32)),
        ({"use_v2": True, "downsample": "mergingv2"}, (64, 32, 32)),
        ({"spatial_dims": 2, "in_channels": 3}, (96, 160)),
        ({"spatial_dims": 2, "use_v2": True, "norm_name": ("group", {"num_groups": 4}), "patch_norm": True}, (64, 96)),
        ({"norm_name": ("instance", {"affine": True}), "window_size": (3, 5, 7), "depths": (1, 3, 1, 2), "qkv_bias": False}, (64, 32, 32)),
        ({"norm_name": "batch", "normalize": False, "mlp_ratio": 2.0, "num_heads": (2, 4, 4, 8)}, (64, 32, 32)),
    ],
)
def test_monai_computes_the_same_with_every_option(options, size):
    nets = pytest.importorskip("monai.networks.nets")
    torch.manual_seed(0)
    theirs = nets.SwinUNETR(**{**TINY, **options}).eval()
    ours = create("swin_unetr_micro", **config({**TINY, **options}, {})).eval()
    load_state(ours, theirs.state_dict())
    assert sum(p.numel() for p in theirs.parameters()) == ours.parameters_count
    x = torch.randn(1, {**TINY, **options}["in_channels"], *size)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-4, rtol=1e-4)
    back = authors_of("swin_unetr").export_state(ours)
    assert {k for k in theirs.state_dict() if not k.endswith("relative_position_index")} == {*back}


def test_claim_five_resolutions_and_widths(micro):
    with torch.no_grad():
        maps = micro.encode(torch.randn(1, 4, 64, 32, 32))
    assert [tuple(m.shape[1:]) for m in maps] == [(4 * 2**i, 64 >> (i + 1), 32 >> (i + 1), 32 >> (i + 1)) for i in range(5)]
    for m in maps:
        torch.testing.assert_close(m.mean(1), torch.zeros_like(m[:, 0]), atol=1e-4, rtol=0)


def test_claim_windows_are_apart_until_the_shifted_block_connects_them(micro):
    plain, shifted = micro.stages[0].blocks
    x = torch.randn(1, 8, 8, 8, 4)
    other = x.clone()
    other[0, 3, 3, 3, 0] += 1  # the last voxel of the first window
    with torch.no_grad():
        changes = [(b(x) - b(other)).abs().sum(-1)[0] > 1e-7 for b in (plain, shifted)]
    assert changes[0][:4, :4, :4].all() and changes[0].sum() == 64
    assert changes[1][2:6, 2:6, 2:6].all() and changes[1].sum() == 64


def test_octants_before_2025_are_two_of_them_twice():
    assert {*OCTANTS["merging"]} == {*OCTANTS["mergingv2"]} and len({*OCTANTS["merging"]}) == 8
    assert len({*OCTANTS["merging_before_2025"]}) == 6
    image = torch.randn(1, 4, 64, 32, 32)
    torch.manual_seed(0)
    models = [create("swin_unetr_micro", merging=m).eval() for m in ("merging", "merging_before_2025")]
    models[1].load_state_dict(models[0].state_dict())
    with torch.no_grad():
        assert not torch.allclose(models[0](image), models[1](image))


def test_the_dice_loss_is_monais_and_right_by_hand():
    p, g = torch.rand(2, 3, 4, 5, 6), (torch.rand(2, 3, 4, 5, 6) > 0.5).float()
    by_hand = (1 - 2 * (p * g).sum((2, 3, 4)) / ((p**2).sum((2, 3, 4)) + g.sum((2, 3, 4)))).mean()
    torch.testing.assert_close(dice_loss(p, g), by_hand, atol=1e-5, rtol=0)
    losses = pytest.importorskip("monai.losses")
    torch.testing.assert_close(dice_loss(p, g), losses.DiceLoss(squared_pred=True)(p, g), atol=1e-6, rtol=0)
    logits, label = torch.randn(2, 3, 4, 5, 6), torch.randint(3, (2, 1, 4, 5, 6))
    theirs = losses.DiceCELoss(to_onehot_y=True, softmax=True, squared_pred=True)(logits, label)
    model = create("swin_unetr_2d", in_channels=1, out_channels=3, feature_size=12)
    model.forward_batch = lambda batch: batch["image"]
    torch.testing.assert_close(model.loss({"image": logits, "label": label[:, 0]}).total, theirs)


def test_regions_and_labels_are_each_others_inverse():
    regions = ((1, 4), (1, 2, 4), (4,))
    label = torch.tensor([0, 1, 2, 4]).repeat(2, 5, 3)
    assert torch.equal(compose(region_masks(label, regions), regions).long(), label)


def test_any_size_is_segmented_by_a_sliding_window(micro):
    for sides in ((70, 41, 33), (20, 20, 20)):
        with torch.no_grad():
            out = micro.predict({"image": torch.randn(2, 4, *sides)})
        assert out.label.shape == (2, *sides) and out.mask.shape == (2, 3, *sides)
        assert {*out.label.unique().tolist()} <= {0, 1, 2, 4}


def test_classes_are_exclusive():
    model = create("swin_unetr_micro", regions=(), out_channels=3, cross_entropy=1.0).eval()
    with torch.no_grad():
        out = model.predict({"image": torch.randn(1, 4, 64, 32, 32)})
    assert out.mask.shape[1] == 2 and (out.mask.sum(1) <= 1).all() and torch.equal(out.mask.any(1), out.label > 0)


def test_sizes_it_cannot_take_are_refused(micro):
    with pytest.raises(BadInput, match="multiples of 32"):
        micro(torch.randn(1, 4, 65, 32, 32))
    with pytest.raises(BadInput, match="at least 64"):
        micro(torch.randn(1, 4, 32, 32, 32))
    with pytest.raises(BadInput, match="four stages"):
        create("swin_unetr_micro", depths=(2, 2))
    with pytest.raises(BadInput, match="Hyena"):
        config({**TINY, "use_hyena": True}, {})


@pytest.mark.slow
def test_it_beats_the_best_threshold():
    import formarium
    from formarium.task import task

    run = formarium.fit("swin_unetr_micro", "sample:tumours", progress=False)
    baseline = task("medical-segmentation").baseline(task("medical-segmentation").sample("tumours"))[1]
    assert formarium.evaluate(run, "sample:tumours").metrics["dice"] > baseline["dice"] + 0.1
