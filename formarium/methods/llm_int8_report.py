"""Which features of a model are outliers: the analysis of LLM.int8() (section 4) on a person's model and data, as a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from formarium.errors import BadInput
from formarium.lens import Report, Table
from formarium.nn.int8 import Int8Linear

Inputs = Any  # a tensor, a tuple, a dict, or a list of those
LAYERS, POSITIONS = 0.25, 0.06  # the paper's definition: outlying in a quarter of the layers and 6% of the positions


@dataclass
class Layer:
    """What came into one linear layer, over all batches."""

    peak: Tensor  # float [features]: the largest magnitude
    hits: Tensor  # int64 [features]: tokens with magnitude >= threshold
    tokens: int = 0
    columns: int = 0  # multiplied in floating point, summed over calls
    calls: int = 0


def outlier_report(model: nn.Module, data: Inputs, threshold: float, before: nn.Module | None = None) -> Report:
    batches = list(as_batches(data))
    if not batches:
        raise BadInput("data", expected="one or more batches that the model's forward takes", got="none")
    layers, outputs = watch_inputs(model, batches, threshold)
    if not layers:
        raise BadInput(type(model).__name__, expected="a forward that calls linear layers", got="one that calls none")
    width = Counter(len(found.peak) for found in layers.values()).most_common(1)[0][0]
    stream = {n: found for n, found in layers.items() if len(found.peak) == width}
    share = torch.stack([found.hits / max(1, found.tokens) for found in stream.values()])  # layers, features
    peaks = torch.stack([found.peak for found in stream.values()])
    touched = (share > 0).float().mean(0)
    systematic = ((share >= POSITIONS).float().mean(0) >= LAYERS).nonzero().squeeze(1).tolist()
    any_ = touched.nonzero().squeeze(1)
    worst = any_[peaks.amax(0)[any_].argsort(descending=True)].tolist()[:20]
    in_int8 = 1 - sum(f.columns for f in layers.values()) / max(1, sum(f.calls * len(f.peak) for f in layers.values()))

    features = [
        {
            "feature": f,
            "magnitude": round(peaks[:, f].max().item(), 2),
            "layers": round(touched[f].item(), 3),
            "positions": round(share[:, f].mean().item(), 4),
            "systematic": f in systematic,
        }
        for f in worst
    ]
    per_layer = {
        name: {
            "outliers": int((found.hits > 0).sum()),
            "features": len(found.peak),
            "magnitude": round(found.peak.max().item(), 2),
            "positions": round(found.hits.max().item() / max(1, found.tokens), 4),
            "feature": int(found.peak.argmax()),
        }
        for name, found in layers.items()
    }
    numbers: dict[str, Any] = {
        "threshold": threshold,
        "tokens": max(found.tokens for found in layers.values()),
        "width": width,
        "int8_share": in_int8,
        "systematic": systematic,
        "features": features,
        "layers": per_layer,
    }
    findings = _words(numbers, len(layers), sum(v["outliers"] > 0 for v in per_layer.values()))
    if before is not None:
        numbers["agreement"] = agreement(outputs, watch_inputs(before, batches, threshold)[1])
        near = numbers["agreement"]
        findings.append(
            f"Its outputs differ from those in floating point by {near['relative']:.2%} (root mean square); the lowest cosine of "
            f"a sample's output is {near['cosine_min']:.5f}, the mean {near['cosine_mean']:.5f}."
        )
    tables = [
        Table(["layer", "outlier features", "of", "largest magnitude", "of feature", "share of tokens"],
              [[n, v["outliers"], v["features"], v["magnitude"], v["feature"], v["positions"]] for n, v in per_layer.items()],
              f"Inputs of linear layers: features with a magnitude of {threshold:g} or more")]  # fmt: skip
    if features:
        rows = [[*f.values()] for f in features]
        caption = f"The largest outlier features of the layers that are {width} wide"
        tables.insert(0, Table(["feature", "largest magnitude", "share of layers", "share of tokens", "systematic"], rows, caption))
    figures = {"Largest magnitude by layer and feature": magnitude_figure([*stream], peaks, worst[:12], threshold)}
    return Report("Outlier features", findings, numbers, tables, figures)


def _words(numbers: Mapping[str, Any], layers: int, touched: int) -> list[str]:
    threshold, features = numbers["threshold"], numbers["features"]
    out = [
        f"{touched} of {layers} linear layers get inputs of magnitude {threshold:g} or more; "
        f"{numbers['int8_share']:.3%} of the input features are multiplied in 8 bits, the rest in floating point."
    ]
    if features:
        named = ", ".join(f"{f['feature']} (up to {f['magnitude']:g}, in {f['layers']:.0%} of the layers)" for f in features[:6])
        out.append(f"Outlier features of the {numbers['width']} wide layers: {named}.")
    if numbers["systematic"]:
        systematic = ", ".join(map(str, numbers["systematic"]))
        out.append(f"Systematic by the paper's definition (a quarter of the layers, 6% of the tokens): {systematic}.")
    else:
        out.append(
            "None is systematic by the paper's definition (a quarter of the layers, 6% of the tokens): so below some 6.7 billion weights."
        )
    return out


def watch_inputs(model: nn.Module, batches: Sequence[Any], threshold: float) -> tuple[dict[str, Layer], list[Tensor]]:
    """What the linear layers of a model get, by layer, and the model's outputs. Its mode is left as it was."""
    found: dict[str, Layer] = {}
    outputs, was, mask = [], model.training, [None]
    with _hooks(model, found, threshold, mask), torch.no_grad():
        model.eval()
        try:
            for batch in batches:
                mask[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
                outputs.append(first_tensor(_run(model, batch)))
        finally:
            model.train(was)
    return found, outputs


@contextmanager
def _hooks(model: nn.Module, found: dict[str, Layer], threshold: float, mask: list[Any]) -> Iterator[None]:
    def hook(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if mask[0] is not None and mask[0].shape == x.shape[:-1]:
                x = x[mask[0].bool()]
            size = x.reshape(-1, x.shape[-1]).abs()
            layer = found.setdefault(
                name, Layer(size.new_zeros(size.shape[1], dtype=torch.float32), size.new_zeros(size.shape[1], dtype=torch.int64))
            )
            hits = (size >= threshold).sum(0)
            layer.peak = torch.maximum(layer.peak, size.amax(0).float())
            layer.hits += hits
            layer.tokens += len(size)
            layer.columns += int((hits > 0).sum())
            layer.calls += 1

        return see

    handles = [m.register_forward_pre_hook(hook(n)) for n, m in model.named_modules() if isinstance(m, (nn.Linear, Int8Linear))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def as_batches(data: Inputs) -> Iterable[Any]:
    """Batches out of one batch or a list (or loader) of them."""
    return [data] if isinstance(data, (Tensor, tuple, Mapping)) else data


def _run(model: Any, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        return model.forward_batch(batch) if hasattr(model, "forward_batch") else model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def first_tensor(out: Any) -> Tensor:
    """The first tensor of whatever a forward gives."""
    while not isinstance(out, Tensor):
        out = next(iter(out.values())) if isinstance(out, Mapping) else out[0]
    return out


def agreement(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> dict[str, float]:
    """How near outputs are: root-mean-square difference over root mean square, and cosines sample by sample."""
    a, b = (torch.cat([t.float().flatten(1) for t in ts]) if len({t[0].numel() for t in ts}) == 1 else None for ts in (ours, theirs))
    if a is None or b is None:  # outputs of several sizes: each batch by itself, flat
        a, b = (nn.utils.rnn.pad_sequence([t.float().flatten() for t in ts], batch_first=True) for ts in (ours, theirs))
    cosine = torch.cosine_similarity(a, b, dim=1)
    relative = ((a - b).norm() / b.norm().clamp(min=1e-12)).item()
    return {"relative": relative, "cosine_min": cosine.min().item(), "cosine_mean": cosine.mean().item()}


def magnitude_figure(names: Sequence[str], peaks: Tensor, features: Sequence[int], threshold: float) -> Figure:
    """Left the largest magnitude of every feature in every layer, right the outliers among them over the layers."""
    figure = Figure(figsize=(11, max(3.2, 0.16 * len(names) + 1.2)), layout="constrained")
    everything, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    image = everything.imshow(
        peaks.clamp(min=1e-3).numpy(), aspect="auto", cmap="magma", interpolation="nearest", vmin=0, vmax=max(threshold * 1.5, 1)
    )
    everything.set_xlabel("feature")
    step = max(1, len(names) // 24)
    everything.set_yticks(range(0, len(names), step), [names[i] for i in range(0, len(names), step)], fontsize=6)
    figure.colorbar(image, ax=everything, label="largest magnitude")
    for f in features:
        lines.plot(range(len(names)), peaks[:, f].numpy(), lw=1.2, label=str(f))
    lines.axhline(threshold, color="#8a8f98", ls="--", lw=1)
    lines.set_ylim(0, max(threshold * 1.2, float(peaks.max()) * 1.05))
    lines.set_xlabel("linear layer, in the order of the forward pass")
    lines.set_ylabel("largest magnitude")
    lines.spines[["top", "right"]].set_visible(False)
    if features:
        lines.legend(title="feature", fontsize=7, frameon=False, ncols=2)
    return figure
