"""verify: replay parity records, what a reference implementation computes on weights drawn from the tensors' names."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from formarium.authors import authors_of, load_state
from formarium.catalogue import cards, make_config, model_class, resolve
from formarium.errors import BadInput, FormariumError, UnknownName

TOLERANCE = 1e-4  # of the output's absmax, float32


@dataclass(frozen=True)
class Replayed:
    """One record's outcome. ok: None where nothing can replay it (why says so). worst: the largest difference over absmax."""

    system: str
    variant: str
    ok: bool | None
    worst: float | None
    parameters: int | None
    expected_parameters: int | None
    seconds: float
    why: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


# reading a record ---------------------------------------------------------------------------------------------------


def _random(name: str) -> np.random.RandomState:
    """The stream that belongs to a name (RandomState's streams are frozen, NEP 19)."""
    return np.random.RandomState(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little"))


def draw(name: str, shape: Sequence[int], rule: str) -> Tensor:
    """The float32 tensor that stands for a weight. rule: w weight (fan-in scaled), g gain, b bias, m mean, v variance."""
    r = torch.from_numpy(np.asarray(_random(name).standard_normal(tuple(shape)), dtype=np.float32).reshape(tuple(shape)))
    scales: dict[str, Callable[[Tensor], Tensor]] = {
        "w": lambda r: r / math.sqrt(max(1, math.prod(shape[1:]))),
        "g": lambda r: 1 + 0.1 * r,
        "b": lambda r: 0.1 * r,
        "m": lambda r: 0.1 * r,
        "v": lambda r: 1 + 0.1 * r.abs(),
    }
    return scales[rule](r)


def _input(how: Mapping[str, Any], stored: Tensor | None) -> Tensor:
    if how["make"] == "stored":
        assert stored is not None
        return stored
    rng, shape = _random("input:" + how["name"]), tuple(how["shape"])
    values = rng.standard_normal(shape) if how["make"] == "normal" else rng.random_sample(shape)
    return torch.from_numpy(values.astype(np.float32))


@dataclass
class Record:
    header: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, tuple[Tensor, int, list[int]]]  # path -> (flat sample, stride, full shape)
    state: dict[str, Tensor]


def read_header(path: Path) -> dict[str, Any]:
    """A record's header; BadInput where the file is no record."""
    try:
        with safe_open(str(path), "pt") as f:
            return json.loads(f.metadata()["record"])
    except Exception as e:
        raise BadInput(f"{path}", expected="a parity record (.safetensors with a `record` header)", got=f"{type(e).__name__}") from None


def read_record(path: Path) -> Record:
    header = read_header(path)
    with safe_open(str(path), "pt") as f:
        tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118 (not a dict)
    inputs = {n: _input(how, tensors.get("in." + n)) for n, how in header["inputs"].items()}
    state: dict[str, Tensor] = {}
    for name, (shape, rule, *dtype) in header["state"].items():
        if rule.startswith("alias:"):
            if (first := rule.removeprefix("alias:")) in state:
                state[name] = state[first]
        elif rule != "keep":
            state[name] = draw(name, shape, rule).to(getattr(torch, dtype[0]) if dtype else torch.float32)
    outputs = {o["path"]: (tensors["out." + o["path"]], o["stride"], o["shape"]) for o in header["outputs"]}
    return Record(header, inputs, outputs, state)


# replaying it -------------------------------------------------------------------------------------------------------


def verify(slugs: Sequence[str] = (), records: str | Path = "tests/parity") -> Iterator[Replayed]:
    """Replay every record under a folder (of the named systems only, where slugs are given), one outcome each, as they come.

    Raises BadInput where the folder isn't there or holds no record for what was asked, UnknownName for a slug nothing carries.
    """
    folder = Path(records)
    for slug in slugs:
        if slug not in cards():
            raise UnknownName("system", slug, cards())
    if not folder.is_dir():
        raise BadInput(f"{folder}", expected="a folder of parity records", got="no such folder", fix="give one with --records")
    paths = sorted(folder.rglob("*.safetensors"))
    chosen = [p for p in paths if not slugs or read_header(p)["system"] in slugs]
    if not chosen:
        wanted = f" of {', '.join(slugs)}" if slugs else ""
        raise BadInput(f"{folder}", expected=f"parity records{wanted}", got="none")
    return (replay(p) for p in chosen)


def replay(path: Path) -> Replayed:
    """Build what the record describes, load its weights strictly, run it, compare."""
    start = time.perf_counter()
    try:
        header = read_header(path)
    except BadInput as e:
        return Replayed(path.parent.name, path.stem, False, None, None, None, time.perf_counter() - start, str(e))
    system, variant, expected = header["system"], header["variant"], header["parameters"]

    def outcome(ok: bool | None, why: str = "", worst: float | None = None, parameters: int | None = None) -> Replayed:
        return Replayed(system, variant, ok, worst, parameters, expected, round(time.perf_counter() - start, 3), why)

    if system not in cards():
        return outcome(None, "no such system here")
    try:
        record = read_record(path)
        outputs, parameters = _run(record)
    except NoReplay:
        return outcome(None, "no replay")
    except FormariumError as e:
        return outcome(False, str(e))
    except Exception as e:  # a replay that breaks is a failed record, and the rest still run
        return outcome(False, f"{type(e).__name__}: {e}")
    worst, why = _compare(outputs, record.outputs)
    if parameters is not None and parameters != expected:
        why = why or f"{parameters} parameters, the reference has {expected}"
    return outcome(not why, why, worst, parameters)


class NoReplay(Exception):
    """Nothing in authors/ says how a record of this part is replayed."""


def _run(record: Record) -> tuple[dict[str, Tensor], int | None]:
    header = record.header
    try:
        authors = authors_of(header["system"])
    except ModuleNotFoundError:
        raise NoReplay from None
    with torch.no_grad():
        for pattern, part in authors.parts.items():
            if fnmatchcase(header["variant"], pattern):
                return flatten(part(header, record.inputs, record.state)), None
        model = build(record)
        load_state(model, record.state, source="the record")
        model.eval()
        torch.manual_seed(0)
        out = authors.call(model, record.inputs, header) if authors.call else model(*record.inputs.values())
    return flatten(out), sum(p.numel() for p in model.parameters())


def build(record: Record) -> Any:
    """The model that a record describes: the named variant's config, and over it what the constructor says."""
    header = record.header
    card, authors = cards()[header["system"]], authors_of(header["system"])
    if authors.config is None:
        raise NoReplay
    try:
        owner, variant = resolve(header["variant"])
        base = dict(variant.config) if owner is card else {}
    except UnknownName:
        variant, base = next(iter(card.variants.values())), {}
    values = {**base, **authors.config(dict(header["reference"]["constructor"]), header)}
    cls = model_class(card)
    with torch.random.fork_rng(devices=[]):
        model = cls(make_config(cls.Config, values))
    model.adopt(card, header["variant"], card.preprocessing_of(variant))
    return model


def flatten(out: Any, path: str = "") -> dict[str, Tensor]:
    """Tensors of a nested output by dotted path, as records name them; a NamedTuple by its fields, a lone tensor "out"."""
    if isinstance(out, Tensor):
        return {path or "out": torch.view_as_real(out) if out.is_complex() else out}
    if hasattr(out, "_asdict"):
        out = out._asdict()
    if isinstance(out, Mapping):
        pairs = [(str(k), v) for k, v in out.items()]
    elif isinstance(out, (list, tuple)):
        pairs = [(str(i), v) for i, v in enumerate(out)]
    else:
        return {}
    found: dict[str, Tensor] = {}
    for key, value in pairs:
        found |= flatten(value, f"{path}.{key}" if path else key)
    return found


def _compare(ours: Mapping[str, Tensor], theirs: Mapping[str, tuple[Tensor, int, list[int]]]) -> tuple[float | None, str]:
    worst, why = 0.0, ""
    for path, (sample, stride, shape) in theirs.items():
        if path not in ours:
            return None, f"no output {path!r} (there are: {', '.join(ours)})"
        mine = ours[path].detach()
        if [*mine.shape] != [*shape]:
            return None, f"output {path!r} has shape {[*mine.shape]}, the reference's {shape}"
        a, b = mine.reshape(-1)[::stride].double(), sample.double()
        scale = b.abs().max().item() or 1.0
        error = (a - b).abs().max().item() / scale if b.numel() else 0.0
        if not error <= TOLERANCE:  # also where it is NaN
            why = why or f"output {path!r} is off by {error:.2g} of its absmax"
        worst = error if error != error else max(worst, error)
    return worst, why
