"""LLM.int8() (Dettmers et al., NeurIPS 2022, arXiv 2208.07339): linear layers in 8 bits, after training and without data.

Weights are stored as int8 with a scale a row, half of what 16 bits take. Inputs are quantised row by row as they come; the few features
whose magnitude reaches a threshold (the emergent outliers of large transformers) are multiplied in floating point (nn/int8.py). So
everything a transformer multiplies by a weight is 8-bit but for those, and the output layer, embeddings and norms are left alone.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from formarium.errors import BadCheckpoint, BadInput
from formarium.lens import Report
from formarium.method import Method, remember
from formarium.methods.llm_int8_report import Inputs, outlier_report
from formarium.nn.int8 import Int8Linear, pack

OUTPUT_LAYERS = ("lm_head", "*.lm_head", "embed_out", "head", "heads", "heads.*", "classifier", "classifier.*", "cls.predictions.*")


class LLMInt8(Method):
    """Replace linear layers by int8 ones.

    threshold: magnitude from which an input feature is an outlier; the paper's is 6.0, and 0 turns the decomposition off.
    include, exclude: globs over module names; by default everything but output layers, which the paper leaves in 16 bits.
    """

    def __init__(self, threshold: float = 6.0, include: Sequence[str] = ("*",), exclude: Sequence[str] = OUTPUT_LAYERS):
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not threshold >= 0:
            raise BadInput("threshold", expected="a number, 0 or more (the paper's is 6.0; 0 turns outliers off)", got=repr(threshold))
        self.threshold, self.include, self.exclude = float(threshold), tuple(include), tuple(exclude)

    def needs(self, model: Any) -> str:
        if self.linears(model):
            return ""
        if any(isinstance(m, Int8Linear) for m in model.modules()):
            return "its linear layers are int8 already"
        return "no linear layer whose name include= and exclude= let through"

    def linears(self, model: nn.Module) -> dict[str, nn.Module]:
        """The layers it would replace, by name: those whose weight is shared with another module (a tied output layer) aside."""
        owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
        return {
            name: m
            for name, m in model.named_modules()
            if (weight := _weight(m)) is not None
            and owners[id(weight)] == 1
            and weight.is_floating_point()
            and any(fnmatchcase(name, p) for p in self.include)
            and not any(fnmatchcase(name, p) for p in self.exclude)
        }

    def apply(self, model: Any, data: Any = None) -> Any:
        """The same model, changed in place, layer by layer, so that at no time two copies of it are in memory. `data` isn't needed.

        Raises BadInput where there is nothing to replace, or where a weight isn't finite.
        """
        if reason := self.needs(model):
            raise BadInput(f"LLMInt8 on {type(model).__name__}", expected="a model with linear layers", got=reason)
        for name, layer in self.linears(model).items():
            weight = _weight(layer)
            assert weight is not None
            if not weight.is_meta and not torch.isfinite(weight).all():
                raise BadInput(f"{name}.weight", expected="finite values", got="NaN or infinite ones")
            new = Int8Linear.of(_as_linear(layer, weight.detach()), layer.bias, self.threshold)  # type: ignore[arg-type]
            _put(model, name, new.pack().train(layer.training))
        for module in model.modules():  # torch's fused encoder layer would read the weights and pass the int8 layers by
            if isinstance(module, nn.TransformerEncoderLayer):
                module.activation_relu_or_gelu = 0
        remember(model, "llm_int8", threshold=self.threshold, include=[*self.include], exclude=[*self.exclude])
        return model

    def report(self, model: Any, data: Inputs, before: Any = None) -> Report:
        """Outliers in the inputs of a model's linear layers (float or int8): which features, in which layers, how large.

        data: a tensor, a tuple, a dict of `forward`'s keywords (padding under `attention_mask` isn't counted), a task's batch, or a list of
        such. before: the same model in floating point; then the report says how near the outputs are, too.
        """
        return outlier_report(model, data, self.threshold or 6.0, before)


def _weight(module: nn.Module) -> Tensor | None:
    """The weight of a linear layer, whichever way round it is stored."""
    if isinstance(module, nn.Linear) and not isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return module.weight
    if type(module).__name__ == "Conv1D" and getattr(module, "nf", None) is not None:  # GPT-2's linear layer in transformers
        return module.weight  # type: ignore[return-value]
    return None


def _as_linear(module: nn.Module, weight: Tensor) -> Tensor:
    return weight if isinstance(module, nn.Linear) else weight.t().contiguous()


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


# bytes --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of a model's tensors. linear: of linear layers (with their biases), int8 or float. half: what those would take in 16 bits."""

    linear: int
    half: int
    other: int

    @property
    def total(self) -> int:
        return self.linear + self.other

    @property
    def of_half(self) -> float:
        return self.linear / max(1, self.half)


def memory(model: nn.Module) -> Memory:
    """What a model's weights take, each tensor counted once."""
    linear, half, counted = 0, 0, set()
    for module in model.modules():
        if isinstance(module, Int8Linear):
            half += 2 * module.codes.numel() + (2 * module.bias.numel() if module.bias is not None else 0)
        elif _weight(module) is not None:
            half += 2 * sum(p.numel() for p in module.parameters(recurse=False))
        else:
            continue
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        linear += sum(t.numel() * t.element_size() for t in own if id(t) not in counted)
        counted |= {id(t) for t in own}
    rest = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return Memory(linear, half, sum(t.numel() * t.element_size() for i, t in rest.items() if i not in counted))


# files --------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | Path) -> None:
    """Write an int8 model's state dict to a safetensors file, with what `load` must know of it. Tensors under two names are written
    once."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Int8Linear)}
    if not layers:
        raise BadInput(type(model).__name__, expected="a model with int8 layers", got="none", fix="LLMInt8().apply(model) first")
    kept: dict[tuple[int, ...], str] = {}
    aliases, tensors = {}, {}
    for name, t in model.state_dict().items():
        place = (t.data_ptr(), t.storage_offset(), *t.shape, -1, *t.stride())
        if t.numel() and place in kept:
            aliases[name] = kept[place]
        else:
            kept[place] = name
            tensors[name] = t.detach().cpu().contiguous()
    said = {n: {"threshold": m.threshold, "dtype": str(m.dtype).removeprefix("torch.")} for n, m in layers.items()}
    save_file(tensors, path, {"format": "pt", "llm_int8": json.dumps({"layers": said, "aliases": aliases})})


def load(model: nn.Module, path: str | Path) -> nn.Module:
    """Put a saved int8 model's weights into a model of the same architecture in floating point (fresh weights will do, on `meta`, too);
    returns it, changed in place. Nothing is quantised again.

    Raises BadCheckpoint where the file isn't one that `save` wrote or doesn't fit, naming what doesn't.
    """
    said, state = _read(Path(path))
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    for name, options in said["layers"].items():
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise BadCheckpoint(f"{path} doesn't fit {type(model).__name__}: it has no {name}") from None
        weight = None if isinstance(old, Int8Linear) else _weight(old)
        if weight is None and not isinstance(old, Int8Linear):
            raise BadCheckpoint(f"{path} doesn't fit {type(model).__name__}: {name} is no linear layer there but a {type(old).__name__}")
        out, into = state[f"{name}.codes"].shape
        biased = f"{name}.bias" in state
        dtype = getattr(torch, options["dtype"])
        _put(model, name, Int8Linear(into, out, biased, options["threshold"], dtype, device).train(old.training))
    own = model.state_dict()
    missing, left = sorted({*own} - {*state}), sorted({*state} - {*own})
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or left or shapes:
        said_ = [f"{len(names)} {what}: {', '.join(names[:6])}" for what, names in
                 (("not in it", missing), ("not in the model", left), ("of another shape", shapes)) if names]  # fmt: skip
        raise BadCheckpoint(f"{path} doesn't fit {type(model).__name__}: {'; '.join(said_)}")
    if device.type == "meta":
        model.load_state_dict(state, assign=True)
    else:
        _take_dtypes(model, state)
        model.load_state_dict(state)
    pack(model)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
    return model


def _take_dtypes(model: nn.Module, state: dict[str, Tensor]) -> None:
    """What was saved in half precision comes back in half precision."""
    for name, t in (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)):
        if name in state and t.dtype != state[name].dtype:
            t.data = t.data.to(state[name].dtype)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(path), "pt") as f:
            said = json.loads((f.metadata() or {}).get("llm_int8", "null"))
            state = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as e:
        raise BadCheckpoint(f"{path} can't be read: {e}") from None
    if said is None:
        raise BadCheckpoint(f"{path} holds no int8 model; expected a file that formarium.methods.llm_int8.save wrote")
    return said, {**state, **{alias: state[name] for alias, name in said["aliases"].items()}}
