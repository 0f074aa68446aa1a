"""The perceptual distance of two images: how far apart VGG-19's features of them are (Johnson et al. 2016; before the activation, as in
ESRGAN, Wang et al. 2018). The network is built here; its ImageNet weights come from a file that the user names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from formarium.errors import BadInput

VGG19 = ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4))  # width and convolutions of each stage; maps are halved between two
LAYERS = {"conv1_2": 0.1, "conv2_2": 0.1, "conv3_4": 1.0, "conv4_4": 1.0, "conv5_4": 1.0}  # Real-ESRGAN's weights
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, RGB


class VGGFeatures(nn.Module):
    """VGG-19's convolutions, as far as the deepest layer asked for. Its parameters have torchvision's names (features.0.weight ...).

    layers: names as conv3_4, the fourth convolution of the third stage. Returns for an image [batch, 3, height, width] in [0, 1], sides
    16 or more, each layer's map before its activation.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, layers: tuple[str, ...] = tuple(LAYERS)):
        super().__init__()
        modules: list[nn.Module] = []
        self.names: dict[int, str] = {}
        channels = 3
        for stage, (width, count) in enumerate(VGG19, start=1):
            modules += [nn.MaxPool2d(2)] if stage > 1 else []
            for i in range(count):
                self.names[len(modules)] = f"conv{stage}_{i + 1}"
                modules += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
                channels = width
        unknown = [name for name in layers if name not in self.names.values()]
        if unknown or not layers:
            raise BadInput("layers", expected="conv1_1 .. conv5_4", got=", ".join(unknown) or "none")
        self.layers = layers
        last = max(i for i, name in self.names.items() if name in layers)
        self.features = nn.Sequential(*modules[: last + 1])
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(STD).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        x, found = (image - self.mean) / self.std, {}
        for i, module in enumerate(self.features):
            x = module(x)
            if self.names.get(i) in self.layers:
                found[self.names[i]] = x
        return found


class PerceptualDistance:
    """(made, truth), float [batch, 1 or 3, height, width] in [0, 1] -> the mean absolute difference of features, weighted layer by layer.

    It isn't a module: its weights are fixed, belong to no model and are saved with none. The truth gets no gradient; grey is taken as RGB.
    """

    def __init__(self, network: VGGFeatures, weights: Mapping[str, float] | None = None):
        self.network = network.eval().requires_grad_(False)
        self.weights = dict(weights or LAYERS)

    def __call__(self, made: Tensor, truth: Tensor) -> Tensor:
        self.network.to(made.device)
        with torch.no_grad():
            wanted = self.network(truth.expand(-1, 3, -1, -1))
        found = self.network(made.expand(-1, 3, -1, -1))
        distances = [weight * F.l1_loss(found[name], wanted[name]) for name, weight in self.weights.items()]
        return torch.stack(distances).sum()


def vgg19_perceptual(path: str | Path, weights: Mapping[str, float] | None = None) -> PerceptualDistance:
    """With the weights in torchvision's vgg19 file (vgg19-dcbb9e9d.pth, or the same tensors as .safetensors).

    Raises BadInput where there is no such file, or it holds something else.
    """
    state = read_vgg19(path)
    network = VGGFeatures(tuple(weights or LAYERS))
    own = network.state_dict()
    wrong = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
    if wrong:
        raise BadInput(str(path), expected="torchvision's vgg19 weights", got=f"a file without {wrong[0]} {[*own[wrong[0]].shape]}")
    network.load_state_dict({k: state[k] for k in own})
    return PerceptualDistance(network, weights)


def read_vgg19(path: str | Path) -> dict[str, Tensor]:
    """The file's tensors of VGG's convolutions by torchvision's names; a pickle that would run code is refused."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(str(path), expected="a file with torchvision's vgg19 weights", got="no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
        return {k: v for k, v in found.items() if re.fullmatch(r"features\.\d+\.(weight|bias)", k)}
    except Exception as e:
        reason = str(e).split("\n")[0]
        raise BadInput(str(path), expected="torchvision's vgg19 weights", got=f"{type(e).__name__}: {reason}") from None
