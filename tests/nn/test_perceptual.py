import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from formarium.errors import BadInput
from formarium.nn.perceptual import LAYERS, VGGFeatures, vgg19_perceptual


def state_of(layers=("conv2_2",)):
    torch.manual_seed(0)
    return VGGFeatures(layers).state_dict()


def test_maps_are_those_before_the_activation_by_torchvisions_names():
    with torch.device("meta"):
        names = VGGFeatures().state_dict()
    assert [*names][-1] == "features.34.bias" and len(names) == 32
    assert (len(names["features.0.bias"]), len(names["features.19.bias"])) == (64, 512)
    network = VGGFeatures(("conv1_2", "conv2_1"))
    x = torch.rand(1, 3, 16, 20)
    with torch.no_grad():
        found = network(x)
        y = (x - network.mean) / network.std
        first, _, second, _, pool, third = network.features
        before = second(first(y).relu())
        torch.testing.assert_close(found["conv1_2"], before)
        torch.testing.assert_close(found["conv2_1"], third(nn.functional.max_pool2d(before.relu(), 2)))
    assert isinstance(pool, nn.MaxPool2d) and (found["conv1_2"] < 0).any()
    with pytest.raises(BadInput, match="conv5_4"):
        VGGFeatures(("conv6_1",))


def test_weights_are_read_from_torchvisions_file_or_its_absence_is_said(tmp_path):
    layers = {"conv1_2": 0.1, "conv2_2": 1.0}
    state = {**state_of(), "classifier.0.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "vgg19.pth")
    save_file(state, tmp_path / "vgg19.safetensors")
    made, truth = torch.rand(2, 3, 16, 16, requires_grad=True), torch.rand(2, 3, 16, 16)
    distances = [vgg19_perceptual(tmp_path / f"vgg19.{kind}", layers) for kind in ("pth", "safetensors")]
    values = [d(made, truth) for d in distances]
    assert values[0] == values[1] > 0 and distances[0](truth, truth) == 0
    values[0].backward()
    assert made.grad.abs().sum() > 0 and all(p.grad is None for p in distances[0].network.parameters())
    assert distances[0](truth[:, :1], truth[:, 1:2]) > 0  # grey
    with pytest.raises(BadInput, match="no such file"):
        vgg19_perceptual(tmp_path / "other.pth")
    with pytest.raises(BadInput, match=r"without features\.10"):
        vgg19_perceptual(tmp_path / "vgg19.pth", {**layers, "conv3_4": 1.0})
    (tmp_path / "broken.pth").write_bytes(b"nothing")
    with pytest.raises(BadInput, match="torchvision's vgg19 weights") as caught:
        vgg19_perceptual(tmp_path / "broken.pth")
    assert "\n" not in str(caught.value)


def test_layers_weigh_as_published():
    assert LAYERS == {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1, "conv4_4": 1, "conv5_4": 1}
