"""What lenses of classifiers share: features of every layer, the head applied anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from formarium.errors import BadInput
from formarium.features import Feature, trace
from formarium.model import Model, evaluating
from formarium.tasks.batches import joined, on, size_of, take

# features -----------------------------------------------------------------------------------------------------------


@dataclass
class Reading:
    """What a model made of n samples: pooled features by layer, float32 [n, channels], in the order of the forward; logits [n, classes]."""

    layers: dict[str, Tensor]
    logits: Tensor
    own_head: bool = True  # False where the model has no classes: the logits then are a linear probe's on its last features

    @property
    def predicted(self) -> Tensor:
        return self.logits.argmax(1)

    @property
    def probabilities(self) -> Tensor:
        return self.logits.double().softmax(1)

    def joint(self, at: str) -> Tensor:
        """The layers that match a glob side by side, [n, all their channels]."""
        found = [x for name, x in self.layers.items() if fnmatchcase(name, at)]
        return torch.cat(found, 1) if found else self.logits.new_empty(len(self.logits), 0)


def read(model: Model, batches: Sequence[Mapping[str, Any]], at: str | Sequence[str] = "*") -> Reading:
    """Pooled features of the layers that match, and logits, of every sample.

    A class token that doesn't know its image yet (at a tokeniser it is the same for all) says nothing: there the other tokens' mean stands.
    """
    pooled: dict[str, list[Tensor]] = {}
    means: dict[str, list[Tensor]] = {}
    logits = []
    with evaluating(model), torch.no_grad():
        for batch in batches:
            found = trace(model, on(model.device, batch), at=at if isinstance(at, str) else tuple(at))
            if classifies(found.output, batch):
                logits.append(_logits(found.output))
            for name, feature in found.items():
                pooled.setdefault(name, []).append(feature.pooled().float().cpu())
                if feature.prefix:
                    means.setdefault(name, []).append(feature.tokens[:, feature.prefix :].mean(1).float().cpu())
    layers = {name: torch.cat(parts) for name, parts in pooled.items()}
    for name, parts in means.items():
        if torch.equal(layers[name], layers[name][:1].expand_as(layers[name])):
            layers[name] = torch.cat(parts)
    if not logits:
        last = [x for name, x in layers.items() if name.startswith("features")] or [*layers.values()][-1:]
        return Reading(layers, probe_logits(torch.cat(last, 1), joined(batches, "label").numpy()), own_head=False)
    return Reading(layers, torch.cat(logits))


def classifies(out: Any, batch: Mapping[str, Any]) -> bool:
    """Whether a forward's output is logits of the classes that the batch's own labels count."""
    return isinstance(out, Tensor) and out.ndim == 2 and len(out) == size_of(batch) and "label_names" not in batch


def probe_logits(x: Tensor, label: np.ndarray, folds: int = 3) -> Tensor:
    """What a linear probe says of each sample when it is held out, log-probabilities [n, classes]: a stand-in for a head."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    found, place = np.unique(label, return_inverse=True)
    folds = min(folds, int(np.bincount(place).min()))
    made = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    said = np.full((len(x), int(label.max()) + 1), 1e-9)
    if folds >= 2 and len(found) >= 2:
        how = StratifiedKFold(folds, shuffle=True, random_state=0)
        said[:, found] += cross_val_predict(made, x.numpy(), label, cv=how, method="predict_proba")
    else:
        said[:, found] += np.bincount(place) / len(place)
    return torch.from_numpy(np.log(said)).float()


class ProbeHead:
    """A linear probe of the last features in a head's place, where a model has none: `head(features [n, channels]) -> logits`."""

    affine = whole = True

    def __init__(self, features: Tensor, label: np.ndarray):
        from sklearn.linear_model import LogisticRegression

        self.mean, self.scale = features.double().mean(0), features.double().std(0).clamp_min(1e-6)
        self.probe = LogisticRegression(max_iter=500).fit(((features.double() - self.mean) / self.scale).numpy(), label)
        self.classes = int(label.max()) + 1

    def __call__(self, features: Tensor) -> Tensor:
        said = self.probe.predict_log_proba(((features.double() - self.mean) / self.scale).numpy())
        out = torch.full((len(features), self.classes), -1e9)
        out[:, self.probe.classes_] = torch.from_numpy(said).float()
        return out


def _logits(out: Any) -> Tensor:
    if not isinstance(out, Tensor):
        raise BadInput("the model's output", expected="logits [batch, classes]", got=type(out).__name__)
    return out.detach().float().cpu()


def layer_names(model: Model, batches: Sequence[Mapping[str, Any]], at: str | Sequence[str] = "*", most: int = 16) -> list[str]:
    """The layers that match, in the order of the forward; of more than `most`, evenly spaced ones with the first and last among them."""
    names = [*read(model, [take(batches[0], range(min(2, size_of(batches[0]))))], at).layers]
    if len(names) <= most:
        return names
    return [names[i] for i in sorted({round(i * (len(names) - 1) / (most - 1)) for i in range(most)})]


# models -------------------------------------------------------------------------------------------------------------


def name_of(model: Model) -> str:
    return model.variant or type(model).__name__


def named(others: Sequence[Model] | Mapping[str, Model]) -> dict[str, Model]:
    if isinstance(others, Mapping):
        return dict(others)
    out: dict[str, Model] = {}
    for other in others:
        name, n = name_of(other), 2
        while name in out:
            name, n = f"{name_of(other)} ({n})", n + 1
        out[name] = other
    return out


def load_state(model: Model, state: Any, what: str) -> Model:
    """The model with a state dict (or the one in a .safetensors file) loaded."""
    if isinstance(state, (str, Path)):
        from safetensors.torch import load_file

        if not Path(state).is_file():
            raise BadInput(what, expected="a state dict or a .safetensors file", got=f"no file {state}")
        state = load_file(state)
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as e:
        raise BadInput(what, expected=f"a state dict of {name_of(model)}", got=str(e).splitlines()[-1].strip()) from None
    return model


# the head -----------------------------------------------------------------------------------------------------------


class Head:
    """A classifier's head, applied to other features than it was given: `head(features [n, channels]) -> logits [n, classes]`.

    The features replace what the taps at `at` ("features*") give, every token alike, so that the head pools them to just these. Where
    the head turns out to be affine in them (found by giving it unit vectors), its matrix is used from then on, which is exact and
    costs nothing; else each call runs the model. Where a head reads more of the tokens than their pooled vector, the tokens are
    shifted instead, so that unchanged features give the model's own logits; `whole` then is False.
    """

    def __init__(self, model: Model, batches: Sequence[Mapping[str, Any]], reading: Reading, at: str = "features*"):
        self.model, self.batches, self.at = model, batches, at
        self.widths = {name: x.shape[1] for name, x in reading.layers.items() if fnmatchcase(name, at)}
        if not self.widths:
            raise BadInput("taps", expected=f"one before the head ({at})", got=", ".join(reading.layers))
        features = reading.joint(at)
        self.whole = _same(self._run(features, shift=False), reading.logits)
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if self.whole:
            self._find_matrix(features, reading.logits)

    @property
    def affine(self) -> bool:
        return self.weight is not None

    def __call__(self, features: Tensor) -> Tensor:
        if self.weight is not None and self.bias is not None:
            return (features.double() @ self.weight + self.bias).float()
        return self._run(features.float(), shift=not self.whole)

    def _find_matrix(self, features: Tensor, logits: Tensor) -> None:
        scale = features.std(0).mean().item() or 1.0
        middle = features.mean(0, keepdim=True)
        answers = self._run(torch.cat([middle, middle + scale * torch.eye(features.shape[1])]), shift=False).double()
        weight = (answers[1:] - answers[0]) / scale
        bias = answers[0] - middle[0].double() @ weight
        few = features[:32] - middle  # also far from the features it knows: a saturating head is affine only near them
        far = torch.cat([few, middle + 10 * few, -10 * middle + few])
        if all(_same((x.double() @ weight + bias).float(), y) for x, y in [(features, logits), (far, self._run(far, shift=False))]):
            self.weight, self.bias = weight, bias

    def _run(self, features: Tensor, shift: bool) -> Tensor:
        """The model's answers where its features are these, [rows, channels]: row by row with its own sample where they are shifted."""
        out, at, turn = [], 0, 0
        with evaluating(self.model):
            while at < len(features):
                batch = self.batches[turn % len(self.batches)]
                rows = features[at : at + size_of(batch)]
                parts = dict(zip(self.widths, rows.split([*self.widths.values()], 1), strict=True))
                edit = {name: self._edit(part, shift) for name, part in parts.items()}
                batch = on(self.model.device, take(batch, range(len(rows))))
                out.append(_logits(trace(self.model, batch, at=tuple(self.widths), edit=edit).output))
                at, turn = at + len(rows), turn + 1
        return torch.cat(out)

    @staticmethod
    def _edit(rows: Tensor, shift: bool) -> Callable[[Feature], Tensor]:
        def edit(feature: Feature) -> Tensor:
            new = rows.to(feature.tokens)[:, None]
            return feature.tokens + (new - feature.pooled()[:, None]) if shift else new.expand_as(feature.tokens)

        return edit


def _same(a: Tensor, b: Tensor, tolerance: float = 1e-3) -> bool:
    return bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-6))
