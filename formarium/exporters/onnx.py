"""ONNX, by torch's exporter on top of torch.export; checked in onnxruntime."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formarium.errors import MissingExtra
from formarium.exporters import Plan, Run, as_text, from_text
from formarium.exporters.torch_export import program

INLINE = 1_800_000_000  # bytes of weights that still fit one protobuf file; beyond, they lie in a second file beside it


def require(check: bool) -> None:
    for package in ("onnx", "onnxscript", *(("onnxruntime",) if check else ())):
        if find_spec(package) is None:
            raise MissingExtra(package, "export")


def write(plan: Plan, path: Path) -> None:
    size = sum(t.numel() * t.element_size() for t in plan.network.state_dict().values())
    with _quiet():
        graph = torch.onnx.export(
            program(plan),
            dynamo=True,
            verbose=False,
            input_names=plan.inputs,
            output_names=plan.outputs,
        )
        assert graph is not None
        for name, dims in zip(plan.inputs, plan.open, strict=True):
            _rename(graph.model, name, dims)
        graph.model.metadata_props.update(as_text(plan.metadata))
        graph.save(str(path), external_data=size > INLINE)


def _rename(model: Any, name: str, dims: dict[int, str]) -> None:
    """Give an input's open dimensions their names, wherever else the graph mentions them."""
    value = next(v for v in model.graph.inputs if v.name == name)
    for dim, wanted in dims.items():
        old = value.shape[dim].value
        for other in [*model.graph.inputs, *model.graph.outputs, *(out for node in model.graph for out in node.outputs)]:
            if other.shape is None:
                continue
            for i, size in enumerate(other.shape):
                if getattr(size, "value", None) == old:
                    other.shape[i] = wanted


def runner(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(out) for out in session.run(None, feed)]

    return run


def metadata(path: Path) -> dict[str, Any]:
    if find_spec("onnx") is None:
        raise MissingExtra("onnx", "export")
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    return from_text({p.key: p.value for p in model.metadata_props})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's notices about what it doesn't need to say."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
