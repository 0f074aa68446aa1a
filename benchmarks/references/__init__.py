"""Systems beside their authors' code: one module a system, that builds both from a clone of the authors' repository.

    git clone https://github.com/OWNER/NAME clones/OWNER/NAME    what a module's REPOSITORY says
    python benchmarks/speed.py --references clones               every system whose clone is there

A module has REPOSITORY = "OWNER/NAME" and `pairs(clone: Path) -> Iterator[Pair]`. Nothing of the authors' is kept here.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from formarium.authors import load_state
from formarium.engine.records import build, flatten, read_record


@dataclass(frozen=True)
class Pair:
    """Two callables that do the same work. name: variant and input size; mode: "forward" or "train" (a whole step, optimiser included)."""

    name: str
    mode: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]


def modules() -> dict[str, Any]:
    """The module of each system, by slug."""
    found = {m.name: importlib.import_module(f"{__name__}.{m.name}") for m in pkgutil.iter_modules(__path__)}
    return {name: module for name, module in found.items() if hasattr(module, "pairs")}


@contextmanager
def importing(*folders: Path, **stubs: Any) -> Iterator[None]:
    """The clone's folders first on the import path and stand-ins for packages that it imports and doesn't need here, for a while.

    stubs: dotted names with "__" for the dots -> a dict of what the module offers (anything else asked of it is an empty class).
    """
    before, known = list(sys.path), set(sys.modules)
    made = {name.replace("__", "."): offers for name, offers in stubs.items()}
    kept = {name: sys.modules.get(name) for name in made}
    for name, offers in made.items():
        sys.modules[name] = _stub(name, offers)
    sys.path[:0] = [str(f) for f in folders]
    try:
        yield
    finally:
        sys.path[:] = before
        for name, module in kept.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
        for name in [n for n in set(sys.modules) - known if _lies_in(sys.modules[n], folders)]:
            del sys.modules[name]  # another clone may have modules of the same names


def _lies_in(module: types.ModuleType, folders: tuple[Path, ...]) -> bool:
    """Whether a module, or a folder without __init__.py, is one of these folders'."""
    try:
        found = [getattr(module, "__file__", None) or "", *getattr(module, "__path__", ())]
    except KeyError:  # the package around it is gone already
        return True
    return any(str(path).startswith(str(folder)) for path in found for folder in folders)


def _stub(name: str, offers: dict[str, Any]) -> types.ModuleType:
    class Stub(types.ModuleType):
        __path__ = ()

        def __getattr__(self, attr: str) -> Any:
            if attr.startswith("__"):
                raise AttributeError(attr)
            return type(attr, (), {})

    made = Stub(name)
    for key, value in offers.items():
        setattr(made, key, value)
    return made


TO_TWO = {"to_2tuple": lambda n: n if isinstance(n, tuple) else (n, n), "trunc_normal_": nn.init.trunc_normal_}
TIMM: dict[str, Any] = {  # of its old layout, as much as backbones ask for; a DropPath of rate 0 is what both sides have here
    "timm": {},
    "timm__data": {"IMAGENET_DEFAULT_MEAN": (), "IMAGENET_DEFAULT_STD": (), "IMAGENET_INCEPTION_MEAN": (), "IMAGENET_INCEPTION_STD": ()},
    "timm__data__constants": {"IMAGENET_DEFAULT_MEAN": (), "IMAGENET_DEFAULT_STD": ()},
    "timm__data__transforms": {},
    "timm__models": {},
    "timm__models__helpers": {},
    "timm__models__layers": {"DropPath": lambda *a: nn.Identity(), **TO_TWO},
    "timm__models__layers__helpers": TO_TWO,
    "timm__layers": {"DropPath": lambda *a: nn.Identity(), **TO_TWO},
    "timm__models__registry": {"register_model": lambda f: f},
    "timm__models__resnet": {},
    "timm__models__vision_transformer": {"_cfg": lambda **k: k},
    "torchvision": {},
    "torchvision__transforms": {},
}


@dataclass
class Recorded:
    """Ours, as a parity record describes it and with its weights; the record's constructor of theirs, its inputs, its weights."""

    ours: Any
    constructor: dict[str, Any]
    inputs: tuple[Tensor, ...]
    state: dict[str, Tensor]

    def same(self, theirs: nn.Module, ours: Callable[[], Any] | None = None, other: Callable[[], Any] | None = None) -> nn.Module:
        """Theirs with the record's weights, after a look whether both say the same of the record's inputs."""
        own = theirs.state_dict()
        theirs.load_state_dict({k: v.reshape(own[k].shape) for k, v in self.state.items() if k in own}, strict=False)
        with torch.no_grad():
            a = flatten((ours or (lambda: self.ours.eval()(*self.inputs)))())
            b = flatten((other or (lambda: theirs.eval()(*self.inputs)))())
        for x, y in zip(a.values(), b.values(), strict=False):
            if x.shape == y.shape and not torch.allclose(x.float(), y.float(), atol=1e-3 * float(y.abs().max()) + 1e-6):
                raise SystemExit(f"{type(theirs).__name__} says something else than formarium: {(x - y).abs().max():.2g}")
        return theirs


def recorded(slug: str, name: str) -> Recorded:
    """Of tests/parity/SLUG/NAME.safetensors."""
    record = read_record(Path(__file__).resolve().parents[2] / "tests" / "parity" / slug / f"{name}.safetensors")
    ours = build(record)
    load_state(ours, record.state)
    return Recorded(ours, dict(record.header["reference"]["constructor"]), tuple(record.inputs.values()), record.state)


def both(name: str, ours: nn.Module, theirs: nn.Module, *inputs: Tensor, modes: tuple[str, ...] = ("forward", "train")) -> Iterator[Pair]:
    """The usual two pairs: a forward, and a training step on the mean of the output's squares."""
    if "forward" in modes:
        yield Pair(name, "forward", forward(ours, *inputs), forward(theirs, *inputs))
    if "train" in modes:
        yield Pair(name, "train", step(ours, lambda: squares(ours(*inputs))), step(theirs, lambda: squares(theirs(*inputs))))


def _stays(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self


@contextmanager
def on_cpu() -> Iterator[None]:
    """Where the authors' code moves tensors and modules to a GPU, they stay, for a while."""
    with mock.patch.object(Tensor, "cuda", _stays), mock.patch.object(nn.Module, "cuda", _stays):
        yield


def forward(model: nn.Module, *inputs: Any) -> Callable[[], Any]:
    """A forward in evaluation mode, without gradient."""
    return calling(model, lambda: model(*inputs))


def calling(model: nn.Module, call: Callable[[], Any]) -> Callable[[], Any]:
    """What else a model is asked, in the same way."""

    def run() -> Any:
        if model.training:  # it goes through all modules
            model.eval()
        with torch.inference_mode():
            return call()

    return run


def step(model: nn.Module, loss: Callable[[], Tensor], lr: float = 1e-5) -> Callable[[], Any]:
    """A training step: loss, backward, AdamW."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, fused=True)

    def run() -> Any:
        if not model.training:
            model.train()
        optimiser.zero_grad()
        loss().backward()
        optimiser.step()

    return run


def squares(out: Any) -> Tensor:
    """A scalar of every tensor in an output, to start a backward from."""
    if isinstance(out, Tensor):
        return out.float().square().mean() if out.is_floating_point() else out.new_zeros((), dtype=torch.float32)
    parts = out.values() if isinstance(out, dict) else out if isinstance(out, (list, tuple)) else ()
    return sum((squares(x) for x in parts), torch.zeros(()))
