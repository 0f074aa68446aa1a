from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from formarium import create
from formarium.errors import BadInput, MissingExtra, UnknownName
from formarium.exporters import ExportFailed, export, metadata
from formarium.exporters import onnx as onnx_export
from formarium.tasks.image_classification.model import ImageClassifier

FORMATS = [("onnx", ".onnx"), ("torch", ".pt2")]


class Tiny(ImageClassifier):
    """A classifier small enough to export in a second. `habit` is a way of not being exportable."""

    dynamic_size = True

    @dataclass(frozen=True)
    class Config:
        image_size: int = 8
        in_channels: int = 3
        num_classes: int = 4
        dense: bool = False
        habit: str = ""

    def __init__(self, config):
        super().__init__(config)
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, config.num_classes)
        self.names = ["a", "b", "c", "d"]

    def forward(self, image):
        if self.config.habit == "branches on values" and image.sum() > 0:
            image = image + 1
        if self.config.habit == "branches on size" and image.shape[2] != 8:
            image = F.interpolate(image, size=(8, 8))
        maps = F.gelu(self.conv(image))
        return (maps, maps[:, :, ::2, ::2]) if self.config.dense else self.head(maps.mean((2, 3)))


def tiny(**config) -> Tiny:
    torch.manual_seed(0)
    return Tiny(Tiny.Config(**config))


def run(path, image: torch.Tensor) -> list[np.ndarray]:
    if path.suffix == ".pt2":
        with torch.no_grad():
            out = torch.export.load(path).module()(image)
        return [o.numpy() for o in (out if isinstance(out, tuple) else (out,))]
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: image.numpy()})


@pytest.mark.parametrize(("format", "suffix"), FORMATS)
def test_the_file_takes_images_in_0_1_of_any_batch_and_size(format, suffix, tmp_path):
    model = tiny().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = export(model, tmp_path / "new folder" / "net", format=format)
    assert path == tmp_path / "new folder" / f"net{suffix}" and [*path.parent.iterdir()] == [path]
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    for shape in [(1, 3, 8, 8), (5, 3, 8, 8), (2, 3, 9, 31)]:
        image = torch.rand(shape)
        with torch.no_grad():
            expected = model.eval().predict({"image": image}).probabilities
        np.testing.assert_allclose(torch.from_numpy(run(path, image)[0]).softmax(-1), expected, atol=1e-6)
    said = metadata(path)
    assert said["classes"] == ["a", "b", "c", "d"] and said["system"] == "Tiny" and said["size"] == [8, 8]
    assert said["dynamic"] == ["batch", "height", "width"] and said["config"]["num_classes"] == 4
    assert said["mean"] == [0.485, 0.456, 0.406] and said["normalisation"] == "inside the graph"


def test_onnx_dimensions_have_names(tmp_path):
    import onnx

    graph = onnx.load(export(tiny(), tmp_path / "net.onnx")).graph
    dims = [[d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in (graph.input[0], graph.output[0])]
    assert dims == [["batch", 3, "height", "width"], ["batch", 4]]
    assert graph.input[0].name == "image" and graph.output[0].name == "logits"


@pytest.mark.parametrize(("format", "suffix"), FORMATS)
def test_fixed_dimensions_stay_fixed(format, suffix, tmp_path):
    path = export(tiny(), tmp_path / f"net{suffix}", format=format, dynamic_batch=False, dynamic_size=False)
    assert metadata(path)["dynamic"] == []
    assert run(path, torch.rand(2, 3, 8, 8))[0].shape == (2, 4)
    for shape in [(1, 3, 8, 8), (2, 3, 16, 8)]:
        with pytest.raises(Exception, match=r"(?i)guard|invalid"):
            run(path, torch.rand(shape))


@pytest.mark.parametrize(("format", "suffix"), FORMATS)
def test_a_dense_backbone_gives_its_maps(format, suffix, tmp_path):
    path = export(tiny(dense=True), tmp_path / f"net{suffix}", format=format)
    assert metadata(path)["outputs"] == ["map0", "map1"]
    assert [o.shape for o in run(path, torch.rand(3, 3, 10, 12))] == [(3, 6, 10, 12), (3, 6, 5, 6)]


def test_a_model_that_branches_on_its_size_gets_one_size_and_says_so(tmp_path):
    with pytest.warns(UserWarning, match="one size only, 8x8"):
        path = export(tiny(habit="branches on size"), tmp_path / "net.pt2", format="torch")
    assert metadata(path)["dynamic"] == ["batch"] and "Guard" in metadata(path)["fixed_because"]
    with pytest.raises(ExportFailed, match="Guard failed"):
        export(tiny(habit="branches on size"), tmp_path / "other.pt2", format="torch", dynamic_size=True)


@pytest.mark.parametrize(("format", "suffix"), FORMATS)
def test_what_can_not_be_captured_is_said_in_one_line(format, suffix, tmp_path):
    with pytest.raises(ExportFailed, match="Tiny doesn't export") as e:
        export(tiny(habit="branches on values"), tmp_path / f"net{suffix}", format=format)
    assert "\n" not in str(e.value)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(("format", "suffix"), FORMATS)
def test_a_file_that_computes_something_else_is_not_kept(format, suffix, tmp_path, monkeypatch):
    path = tmp_path / f"net{suffix}"
    path.write_text("what was there before")
    monkeypatch.setattr("formarium.exporters.TOLERANCE", -1.0)
    with pytest.raises(ExportFailed, match="off by"):
        export(tiny(), path, format=format, dynamic_size=False)
    assert path.read_text() == "what was there before" and [*tmp_path.iterdir()] == [path]
    export(tiny(), path, format=format, check=False)
    assert metadata(path)["system"] == "Tiny"


def test_what_can_be_exported(tmp_path):
    run_ = SimpleNamespace(model=tiny())
    assert export(run_, tmp_path / "a.pt2", format="torch").is_file()
    model = tiny()
    model.variant = "tiny_variant"
    assert export(model, tmp_path, format="torch").name == "tiny_variant.pt2"
    with pytest.raises(BadInput, match="a variant's name"):
        export(3, tmp_path / "a.pt2", format="torch")
    with pytest.raises(UnknownName, match="pvt_tiny"):
        export("pvt_tny", tmp_path / "a.pt2", format="torch")


def test_bad_arguments(tmp_path):
    with pytest.raises(UnknownName, match="onnx"):
        export(tiny(), tmp_path / "net", format="onxx")
    with pytest.raises(BadInput, match='format="torch"'):
        export(tiny(), tmp_path / "net.pt2")
    with pytest.raises(BadInput, match="dynamic_size"):
        export(tiny(), tmp_path / "net", dynamic_size="yes")
    with pytest.raises(BadInput, match="no such file"):
        metadata(tmp_path / "net.onnx")
    with pytest.raises(BadInput, match=r"\.onnx or \.pt2"):
        metadata(tmp_path / "net.pth")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_without_onnx_the_pip_command_is_named(package, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(MissingExtra, match=rf"needs {package}.*formarium\[export\]"):
        export(tiny(), tmp_path / "net.onnx")


@pytest.mark.slow
@pytest.mark.parametrize(("format", "suffix"), FORMATS)
def test_pvt_takes_other_sizes(format, suffix, tmp_path):
    model = create("pvt_micro", num_classes=3).eval()
    path = export(model, tmp_path / f"pvt{suffix}", format=format, dynamic_size=True)
    image = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = model(model.normalise(image))
    np.testing.assert_allclose(run(path, image)[0], expected, atol=1e-4)
