"""What the authors' checkpoints call things, and how their code is called, system by system.

A module `authors/SLUG.py` holds one `Authors` object called `authors`. With it `load_authors` reads the released weights, and `verify`
replays parity records.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from formarium.errors import BadCheckpoint

if TYPE_CHECKING:
    from formarium.model import Model

State = dict[str, Tensor]
_HOLE = re.compile(r"\{(\w+)([+-]\d+)?\}")


@dataclass(frozen=True)
class Rename:
    """One rule between their names and ours, read either way: ("block{i+1}.{j}.attn.q", "stages.{i}.blocks.{j}.attention.q").

    A hole stands for an integer; `{i+1}` on one side and `{i}` on the other says how they differ. The rule holds for whole
    dotted names and for prefixes of them.
    """

    theirs: str
    ours: str

    def apply(self, name: str, forward: bool = True) -> str | None:
        source, target = (self.theirs, self.ours) if forward else (self.ours, self.theirs)
        match = _pattern(source).match(name)
        if not match:
            return None
        shift = {m[1]: int(m[2] or 0) for m in _HOLE.finditer(source)}
        values = {hole: int(match[hole]) - shift[hole] for hole in shift}
        return _HOLE.sub(lambda m: str(values[m[1]] + int(m[2] or 0)), target) + name[match.end() :]


_patterns: dict[str, re.Pattern[str]] = {}


def _pattern(template: str) -> re.Pattern[str]:
    if template not in _patterns:
        pieces, at, seen = [], 0, set()
        for m in _HOLE.finditer(template):
            pieces.append(re.escape(template[at : m.start()]))
            pieces.append(f"(?P={m[1]})" if m[1] in seen else rf"(?P<{m[1]}>\d+)")
            seen.add(m[1])
            at = m.end()
        pieces.append(re.escape(template[at:]))
        _patterns[template] = re.compile("".join(pieces) + r"(?=\.|$)")
    return _patterns[template]


@dataclass(frozen=True)
class Authors:
    """How one system's released weights and code relate to ours.

    names: rename rules, tried in order, the first match wins; a name no rule matches stays as it is.
    config: (their constructor's arguments, header) -> our Config fields, all of them, for replaying a record.
    call: (model, inputs by name, header) -> outputs shaped as the record's (tensor, dict, tuple; nested); by default model(*inputs).
    ignore: globs over their names that we build ourselves (index tables, masks, cached buffers).
    to_ours / to_theirs: whole-state changes that renaming can't say (fused projections, transposes), after / before the renaming.
    variant: (constructor, header) -> the catalogue's variant a record is an instance of, where its name alone doesn't say.
    parts: record-name glob -> (header, inputs, state) -> outputs, for records of a part (a loss, a module) rather than the model.
    """

    names: Sequence[tuple[str, str]] = ()
    config: Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]] | None = None
    call: Callable[[Any, dict[str, Tensor], dict[str, Any]], Any] | None = None
    ignore: Sequence[str] = ()
    to_ours: Callable[[State, Any], State] | None = None
    to_theirs: Callable[[State, Any], State] | None = None
    parts: Mapping[str, Callable[[dict[str, Any], dict[str, Tensor], State], Any]] = field(default_factory=dict)

    def rename(self, name: str, forward: bool = True) -> str:
        for theirs, ours in self.names:
            renamed = Rename(theirs, ours).apply(name, forward)
            if renamed is not None:
                return renamed
        return name

    def import_state(self, state: Mapping[str, Tensor], model: Model) -> State:
        """Their state dict under our names."""
        kept = {k: v for k, v in state.items() if not any(fnmatchcase(k, p) for p in self.ignore)}
        ours = {self.rename(k): v for k, v in kept.items()}
        return self.to_ours(ours, model) if self.to_ours else ours

    def export_state(self, model: Model) -> State:
        """Our state dict under their names (without what `ignore` says they compute themselves)."""
        state = dict(model.state_dict())
        if self.to_theirs:
            state = self.to_theirs(state, model)
        return {self.rename(k, forward=False): v for k, v in state.items()}


def authors_of(slug: str) -> Authors:
    """The Authors object of a system."""
    return import_module(f"formarium.authors.{slug}").authors


def vit_config(theirs: Mapping[str, Any]) -> dict[str, Any]:
    """The plain ViT's Config (tasks/image_classification/trunks) of the arguments that timm's and its descendants' have for it."""
    size = theirs.get("img_size", 224)
    return {
        "image_size": tuple(size) if isinstance(size, (list, tuple)) else size,
        "patch_size": theirs.get("patch_size", 16),
        "dim": theirs.get("embed_dim", 768),
        "depth": theirs.get("depth", 12),
        "heads": theirs.get("num_heads", 12),
        "mlp_ratio": theirs.get("mlp_ratio", 4),
        "qkv_bias": theirs.get("qkv_bias", True),
        "norm_eps": theirs.get("norm_eps", 1e-6),
    }


def load_state(model: Model, state: Mapping[str, Tensor], skip: Sequence[str] = (), source: str = "checkpoint") -> None:
    """Load the authors' state dict strictly: no key left over or missing, every shape equal.

    Raises BadCheckpoint naming what doesn't fit.
    """
    if model.card is None:
        raise BadCheckpoint(f"{type(model).__name__} was not made by create(), so whose checkpoint it takes is unknown")
    ours = authors_of(model.card.slug).import_state(state, model)
    own = model.state_dict()

    def skipped(name: str) -> bool:
        return any(fnmatchcase(name, p) for p in skip)

    counters = [k for k in own if k.endswith("num_batches_tracked")]  # records and old checkpoints lack them; eval never reads them
    missing = [k for k in own if k not in ours and not skipped(k) and k not in counters]
    left = [k for k in ours if k not in own and not skipped(k)]
    shapes = [k for k in own if k in ours and ours[k].shape != own[k].shape and not skipped(k)]
    problems = [
        *_said("not in it", missing),
        *_said("not in the model", left),
        *_said("of another shape", [f"{k} {[*ours[k].shape]} for {[*own[k].shape]}" for k in shapes]),
    ]
    if problems:
        hint = f'; to leave them as initialised: skip=("{shapes[0].split(".")[0]}.*",)' if shapes and not (missing or left) else ""
        raise BadCheckpoint(f"{source} doesn't fit {model.variant or model.card.slug}: {'; '.join(problems)}{hint}")
    fitting = {k: v.to(own[k].dtype) for k, v in ours.items() if k in own and not skipped(k)}
    model.load_state_dict(fitting, strict=False)


def _said(what: str, names: Sequence[str], most: int = 6) -> list[str]:
    if not names:
        return []
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return [f"{len(names)} {what}: {', '.join(names[:most])}{more}"]


def load_authors(model: Model, path: str | Path, skip: Sequence[str] = ()) -> None:
    """Read a released checkpoint file into the model; see Model.load_authors."""
    load_state(model, read_checkpoint(path), skip=skip, source=str(path))


def read_checkpoint(path: str | Path) -> State:
    """The state dict in a .safetensors or torch file, out of whatever it is wrapped in ("state_dict", "model", "module." ...).

    Torch files are read with weights_only=True: one that would run code is refused, never executed.
    """
    path = Path(path)
    if not path.is_file():
        raise BadCheckpoint(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as e:
            raise BadCheckpoint(f"{path} is not a safetensors file: {e}") from None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        reason = str(e).split("\n")[0]
        raise BadCheckpoint(
            f"{path} can't be read safely ({type(e).__name__}: {reason}); expected .safetensors or a torch file that holds tensors only"
        ) from None
    return _unwrap(found, path)


def _unwrap(found: Any, path: Path) -> State:
    for key in ("state_dict_ema", "model_ema", "state_dict", "model", "net", "params_ema", "params"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not found or not all(isinstance(v, Tensor) for v in found.values()):
        raise BadCheckpoint(f"{path} holds no state dict (names to tensors)")
    while found and all(k.startswith("module.") for k in found):
        found = {k.removeprefix("module."): v for k, v in found.items()}
    return found
