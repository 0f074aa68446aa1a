"""Ship a model as one file: a torch.export program (.pt2) or an ONNX graph.

The file takes what a person has and gives what the network says: an image classifier's takes images in [0, 1] (its normalisation is
inside) and gives logits. What else is needed to use it (class names, size, system, variant) is in the file as metadata.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from formarium.errors import BadInput, FormariumError, UnknownName
from formarium.model import Model

TOLERANCE = 1e-4  # of the output's absmax, float32
FORMATS = {"onnx": ("formarium.exporters.onnx", ".onnx"), "torch": ("formarium.exporters.torch_export", ".pt2")}
Run = Callable[[tuple[Tensor, ...]], list[Tensor]]


class ExportFailed(FormariumError):
    """The network can't be captured as a graph, or the file written doesn't compute what the model computes."""


class Shipped(nn.Module):
    """What is exported: the network in eval mode, on the CPU, in float32, with the task's normalisation in front of it."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval()
        self.normalises = hasattr(model, "normalise")

    def forward(self, *inputs: Tensor) -> Any:
        if self.normalises:
            inputs = (self.model.normalise(inputs[0]), *inputs[1:])
        return self.model(*inputs)

    def example(self, batch: int, size: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        """Random inputs as the file takes them."""
        inputs = self.model.example(batch) if size is None else self.model.example(batch, size=size)
        return (torch.rand_like(inputs[0]), *inputs[1:]) if self.normalises else inputs


@dataclass
class Plan:
    """One export: what is captured, with which dimensions left open, under which names, with which metadata."""

    network: Shipped
    example: tuple[Tensor, ...]
    inputs: list[str]
    outputs: list[str]
    open: list[dict[int, str]]  # for each input: dimension -> its name
    size_step: int  # height and width, where open, are multiples of this
    metadata: dict[str, Any] = field(default_factory=dict)


def export(
    model: Any,
    path: str | Path,
    format: str = "onnx",
    dynamic_batch: bool = True,
    dynamic_size: bool | str = "auto",
    check: bool = True,
) -> Path:
    """Write a model to a file that other programs run; returns its path.

    >>> export("runs/photos/winner", "model.onnx")

    model: a Model, a Run, a run directory, or the name of a variant (then with fresh weights).
    path: where to; the format's suffix (.onnx, .pt2) is added where it has none; a folder gets VARIANT.onnx.
    dynamic_batch: leave the batch size open. dynamic_size: leave height and width open: "auto" where the model says that it takes
        any size (`Model.dynamic_size`; where the graph can't follow, the file has one size and says why), True to insist, False for
        the size it was built for.
    check: run the file on other batch sizes (and sizes) and compare with the model. A file that doesn't agree within 1e-4 of the
        output's absmax is not kept.
    Raises ExportFailed (saying why), MissingExtra where onnx isn't installed, BadInput for a path whose suffix is another format's.
    """
    if format not in FORMATS:
        raise UnknownName("export format", format, FORMATS)
    if dynamic_size not in (True, False, "auto"):
        raise BadInput("dynamic_size", expected="True, False or 'auto'", got=repr(dynamic_size))
    writer = import_module(FORMATS[format][0])
    writer.require(check)
    network = Shipped(_model(model))
    target = _target(Path(path), format, network.model)
    step = _size_step(network.model, dynamic_size)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _export(network, target, writer, format, dynamic_batch, step, check)
    except ExportFailed as e:
        if dynamic_size != "auto" or not step:
            raise
        _export(network, target, writer, format, dynamic_batch, 0, check, fixed_because=str(e))
        warnings.warn(f"{target} takes one size only, {_sides(network.model)}: {e}", stacklevel=2)
    return target


def metadata(path: str | Path) -> dict[str, Any]:
    """What an exported file says of itself: system, variant, class names, size, mean and std, versions."""
    for module, suffix in FORMATS.values():
        if Path(path).suffix == suffix:
            if not Path(path).is_file():
                raise BadInput(f"{path}", expected="an exported file", got="no such file")
            return import_module(module).metadata(Path(path))
    raise BadInput(
        f"{path}", expected=f"a file of type {' or '.join(s for _, s in FORMATS.values())}", got=Path(path).suffix or "no suffix"
    )


def _export(
    network: Shipped, target: Path, writer: Any, format: str, dynamic_batch: bool, step: int, check: bool, fixed_because: str = ""
) -> None:
    plan = _plan(network, dynamic_batch, step)
    if fixed_because:
        plan.metadata["fixed_because"] = fixed_because
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".export-") as folder:  # a file that fails its check never gets its name
        written = Path(folder) / target.name
        try:
            writer.write(plan, written)
        except Exception as e:
            raise ExportFailed(_said(network.model, format, step, e)) from e
        if check:
            _check(network, writer.runner(written), _trials(network, plan, dynamic_batch, step), target.name)
        for part in Path(folder).iterdir():  # large graphs have their weights in a second file beside them
            os.replace(part, target.parent / part.name)


# what is exported ---------------------------------------------------------------------------------------------------


def _model(model: Any) -> Model:
    if isinstance(model, Model):
        return model
    if isinstance(getattr(model, "model", None), Model):  # a Run
        return model.model
    if isinstance(model, (str, Path)):
        if Path(model).is_dir():
            from formarium.engine import load

            return load(model)
        from formarium.catalogue import create

        return create(str(model))
    raise BadInput("what to export", expected="a model, a run, a run directory or a variant's name", got=type(model).__name__)


def _target(path: Path, format: str, model: Model) -> Path:
    suffix = FORMATS[format][1]
    if path.is_dir():
        return path / f"{model.variant or type(model).__name__.lower()}{suffix}"
    if path.suffix == "":
        return path.with_suffix(suffix)
    if path.suffix != suffix:
        other = next((name for name, (_, s) in FORMATS.items() if s == path.suffix), "")
        raise BadInput(f"{path}", expected=f"a path ending in {suffix}", got=path.suffix, fix=f'format="{other}"' if other else "")
    return path


def _size_step(model: Model, dynamic_size: bool | str) -> int:
    """Height and width may be any multiple of this; 0 where they are fixed."""
    declared = int(getattr(model, "dynamic_size", 0))
    if dynamic_size is True and not hasattr(model, "image_size"):
        raise BadInput("dynamic_size", expected="a model of images", got=type(model).__name__, fix="dynamic_size=False")
    return declared if dynamic_size == "auto" else (declared or 32) * bool(dynamic_size)


def _plan(network: Shipped, dynamic_batch: bool, step: int) -> Plan:
    model = network.model
    # traced on a batch of 2 and two unequal sides, so that no dimension is taken for a constant or for another one
    example = network.example(2, _other_size(model, step, 1)) if step else network.example(2)
    parameters = inspect.signature(model.forward).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][: len(example)]
    dims: list[dict[int, str]] = [{0: "batch"} if dynamic_batch else {} for _ in example]
    if step:
        dims[0] |= {2: "height", 3: "width"}
    with torch.no_grad():
        outputs = _names(network(*example))
    return Plan(network, example, names, outputs, dims, step, _metadata(model, outputs, dims, step))


def _other_size(model: Any, step: int, more: int) -> tuple[int, int]:
    height, width = model.image_size
    return height + -(-more * 17 // step) * step, width + -(-more * 35 // step) * step  # odd ones where any will do


def _sides(model: Any) -> str:
    return "x".join(map(str, model.image_size))


def _names(out: Any) -> list[str]:
    if isinstance(out, Tensor):
        return ["logits"]
    return [*out._fields] if hasattr(out, "_fields") else [f"map{i}" for i in range(len(out))]


def _metadata(model: Any, outputs: Sequence[str], dims: Sequence[dict[int, str]], step: int) -> dict[str, Any]:
    from formarium import __version__

    said: dict[str, Any] = {
        "system": model.card.slug if model.card else type(model).__name__,
        "variant": model.variant,
        "task": getattr(model, "task", ""),
        "outputs": [*outputs],
        "dynamic": sorted({name for d in dims for name in d.values()}),
        "config": model.config_dict(),
        "producer": f"formarium {__version__}, torch {torch.__version__}",
    }
    if hasattr(model, "image_size"):
        said |= {"size": [*model.image_size], "size_step": step, "input": "RGB in [0, 1], float32 [batch, channels, height, width]"}
    if hasattr(model, "normalise"):
        said |= {
            "normalisation": "inside the graph",
            **{k: [round(v, 6) for v in getattr(model, k).flatten().tolist()] for k in ("mean", "std")},
        }
    if names := list(getattr(model, "names", None) or ()):
        said["classes"] = names
    return said


def as_text(metadata: dict[str, Any]) -> dict[str, str]:
    """Metadata as both formats hold it: strings by string, JSON for all that isn't one."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}


def from_text(text: dict[str, str]) -> dict[str, Any]:
    def value(v: str) -> Any:
        try:
            return json.loads(v)
        except ValueError:
            return v

    return {k: value(v) for k, v in text.items()}


# the check ----------------------------------------------------------------------------------------------------------


def _trials(network: Shipped, plan: Plan, dynamic_batch: bool, step: int) -> list[tuple[Tensor, ...]]:
    """Inputs that differ from the traced ones in every dimension that was left open; the size it was built for among them."""
    batches = (3, 1) if dynamic_batch else (2, 2)
    trials = [network.example(batch) for batch in batches]
    if step:
        trials.append(network.example(batches[0], _other_size(network.model, step, 2)))
    return trials


def _check(network: Shipped, run: Run, trials: Sequence[tuple[Tensor, ...]], name: str) -> None:
    for inputs in trials:
        shape = " and ".join("x".join(map(str, x.shape)) for x in inputs)
        with torch.no_grad():
            expected = network(*inputs)
        expected = [expected] if isinstance(expected, Tensor) else [*expected]
        try:
            got = run(inputs)
        except Exception as e:
            raise ExportFailed(f"{name} doesn't run on an input of {shape}: {_first_line(e)}") from e
        for mine, theirs in zip(got, expected, strict=True):
            if mine.shape != theirs.shape:
                raise ExportFailed(f"{name} gives {[*mine.shape]} for an input of {shape}, the model gives {[*theirs.shape]}")
            error = (mine - theirs).abs().max().item() / (theirs.abs().max().item() or 1.0)
            if not error <= TOLERANCE:
                raise ExportFailed(f"{name} is off by {error:.2g} of the output's absmax for an input of {shape} (at most {TOLERANCE:g})")


def _said(model: Model, format: str, step: int, error: Exception) -> str:
    what = f"{model.variant or type(model).__name__} doesn't export to {format}"
    return f"{what}{' with height and width left open' * bool(step)}: {_first_line(error)}{' (dynamic_size=False fixes them)' * bool(step)}"


def _first_line(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None:  # exporters wrap the reason in reports of their own
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:400]
