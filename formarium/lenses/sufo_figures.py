"""SUFO's figures, in matplotlib, drawn from plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito: told apart by all eyes
GREY = "#8a8f98"


def _axes(rows: int, columns: int, width: float, height: float, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = [*np.ravel(figure.subplots(rows, columns, squeeze=False, **options))]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _colours(stages: int) -> tuple[str, ...]:
    """Now is always of one colour, whether or not something stands before it."""
    return (COLOURS[1], COLOURS[0])[-stages:]


def _layer_axis(ax: Axes, layers: Sequence[str]) -> None:
    ax.set_xticks(range(len(layers)), [short(n) for n in layers], rotation=60, ha="right", fontsize=8)


def short(layer: str) -> str:
    """A layer's name as an axis has room for it."""
    return layer.replace("stages.", "s").replace("blocks.", "b").replace("branches.", "br")


def _limits(ax: Axes, low: float = 0.0, high: float = 1.0) -> None:
    ax.set_ylim(low - 0.02, high + 0.02)
    ax.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    ax.set_axisbelow(True)


def probes(layers: Sequence[str], scores: Mapping[str, Mapping[str, float]], lines: Mapping[str, float]) -> Figure:
    """Macro-F1 of a probe by layer, one line a stage, and levels to compare with."""
    figure, (ax,) = _axes(1, 1, 7, 3.6)
    for (stage, by), colour in zip(scores.items(), _colours(len(scores)), strict=True):
        ax.plot(range(len(layers)), [by[n] for n in layers], "o-", color=colour, label=f"probe, {stage} fine-tuning")
    for (name, level), dash in zip(lines.items(), ("--", ":"), strict=False):
        ax.axhline(level, color=GREY, linestyle=dash, label=name)
    _layer_axis(ax, layers)
    _limits(ax)
    ax.set_ylabel("macro-F1")
    ax.legend(fontsize=8, frameon=False)
    return figure


def similarity(layers: Sequence[str], measures: Mapping[str, Mapping[str, float]], matrix: np.ndarray, stage: str) -> Figure:
    """Each layer with itself before fine-tuning, by three measures; and all layers with all (CKA)."""
    figure, (left, right) = _axes(1, 2, 5.6, 4)
    for (name, by), colour, marker in zip(measures.items(), COLOURS, "os^", strict=False):
        left.plot(range(len(layers)), [by[n] for n in layers], f"{marker}-", color=colour, label=name.upper())
    _layer_axis(left, layers)
    _limits(left, min(0.0, min(min(by.values()) for by in measures.values())))
    left.set_ylabel(f"similarity, {stage} against now")
    left.legend(fontsize=8, frameon=False)
    _heat(right, matrix, layers, layers, stage, "now", figure)
    return figure


def pairs(layers: Sequence[str], others: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> Figure:
    """Layers of this model (down) with another's (across), one map a model."""
    columns = min(3, len(others))
    figure, axes = _axes(-(-len(others) // columns), columns, 5, 4)
    for ax in axes[len(others) :]:
        ax.set_visible(False)
    for ax, (name, (theirs, matrix)) in zip(axes, others.items(), strict=False):
        _heat(ax, matrix, layers, theirs, "this model", name, figure)
    return figure


def _heat(ax: Axes, values: np.ndarray, down: Sequence[str], across: Sequence[str], ylabel: str, xlabel: str, figure: Figure) -> None:
    image = ax.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    _layer_axis(ax, across)
    ax.set_yticks(range(len(down)), [short(n) for n in down], fontsize=8)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    figure.colorbar(image, ax=ax, label="CKA", shrink=0.8)


def planes(steps: Mapping[str, np.ndarray], label: np.ndarray, names: Sequence[str]) -> Figure:
    """Samples on the two leading components, one panel a step, coloured by class. Signs are arbitrary: turned to follow the last step."""
    columns = min(4, len(steps))
    rows = -(-len(steps) // columns)
    figure, axes = _axes(rows, columns, 3, 2.9)
    shown = [c for c in range(len(names)) if (label == c).any()]
    palette = matplotlib.colormaps["tab10" if len(shown) <= 10 else "nipy_spectral"]
    last = [*steps.values()][-1]
    for ax in axes[len(steps) :]:
        ax.set_visible(False)
    for ax, (step, plane) in zip(axes, steps.items(), strict=False):
        plane = np.pad(plane, ((0, 0), (0, max(0, 2 - plane.shape[1]))))
        turn = np.sign((plane * np.pad(last, ((0, 0), (0, max(0, 2 - last.shape[1]))))).sum(0))
        plane = plane * np.where(turn == 0, 1, turn)
        for j, c in enumerate(shown):
            colour = palette(j % 10 if len(shown) <= 10 else j / max(1, len(shown) - 1))
            ax.scatter(*plane[label == c].T, s=8, color=colour, label=str(names[c]), linewidths=0, alpha=0.8)
        ax.set_title(step, fontsize=9)
        ax.set_xticks([])
        ax.set_yticks([])
    if len(shown) <= 20:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right", fontsize=8, frameon=False, markerscale=2)
    return figure


def course(layers: Sequence[str], steps: Sequence[str], values: Mapping[str, np.ndarray]) -> Figure:
    """Separation of the classes and share of the first two components, steps (across) by layers (lines)."""
    titles = {"separation": "separation of the classes (silhouette)", "first_two": "variance in the first two components"}
    figure, axes = _axes(1, len(values), 5.4, 3.8)
    palette = matplotlib.colormaps["viridis"]
    for ax, (key, matrix) in zip(axes, values.items(), strict=True):
        for i, layer in enumerate(layers):
            colour = palette(0.9 * i / max(1, len(layers) - 1))
            ax.plot(range(len(steps)), matrix[:, i], "o-", markersize=3, color=colour, label=short(layer))
        ax.set_xticks(range(len(steps)), steps, rotation=45, ha="right", fontsize=8)
        ax.set_title(titles[key], fontsize=10)
        ax.grid(axis="y", color="#e3e5e8", linewidth=0.8)
    axes[-1].legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def explained(stages: Mapping[str, np.ndarray], without: Mapping[int, float], only: Sequence[float]) -> Figure:
    """Variance that the leading components explain; macro-F1 of the head without the k leading ones, and with only one."""
    figure, axes = _axes(1, 2 if without else 1, 5.4, 3.6)
    for (stage, share), colour in zip(stages.items(), _colours(len(stages)), strict=True):
        axes[0].plot(range(1, len(share) + 1), share, "o-", markersize=3, color=colour, label=stage)
    axes[0].axhline(0.95, color=GREY, linestyle=":", label="95%")
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_formatter("{x:g}")
    axes[0].set_xlabel("leading components")
    axes[0].set_ylabel("variance explained")
    _limits(axes[0])
    axes[0].legend(fontsize=8, frameon=False)
    if without:
        axes[1].plot([*without], [*without.values()], "o-", markersize=3, color=COLOURS[0], label="without the first k")
        axes[1].plot(range(1, len(only) + 1), only, "s", color=COLOURS[1], label="only component k")
        axes[1].set_xscale("symlog", linthresh=8)
        axes[1].xaxis.set_major_formatter("{x:g}")
        axes[1].set_xlabel("k")
        axes[1].set_ylabel("macro-F1 of the head")
        _limits(axes[1])
        axes[1].legend(fontsize=8, frameon=False)
    return figure


def samples(modes: Mapping[str, Sequence[tuple[np.ndarray, Mapping[str, Any]]]]) -> Figure:
    """Outliers as pictures, a row a mode: image [channels, height, width] in [0, 1], with what it is and what the model says."""
    figure, axes = _axes(len(modes), 1, 1.3 * max(len(row) for row in modes.values()) + 1, 1.75)
    for ax, (mode, row) in zip(axes, modes.items(), strict=True):
        pictures = [image[:3] if len(image) >= 3 else np.repeat(image[:1], 3, 0) for image, _ in row]
        height, width = pictures[0].shape[1:]
        gap = max(2, width // 10)
        strip = np.ones((3, height, len(row) * (width + gap) - gap), dtype=np.float32)
        for i, (picture, (_, said)) in enumerate(zip(pictures, row, strict=True)):
            at = i * (width + gap)
            strip[:, :, at : at + width] = picture.clip(0, 1)
            right = said["label"] == said["predicted"]
            text = _cut(said["label"]) if right else f"{_cut(said['label'])}\nsays {_cut(said['predicted'])}"
            mark = " *" if said["shared_by"] else ""
            where = (at + (width - 1) / 2, -0.5 - height * 0.05)
            ax.text(*where, text + mark, fontsize=7, color="#00785f" if right else "#be3c28", ha="center", va="bottom")
        ax.imshow(strip.transpose(1, 2, 0))
        ax.set_axis_off()
        ax.text(
            -gap, height / 2, mode.replace(", ", ",\n").replace(" from ", "\nfrom "), fontsize=8, weight="bold", ha="right", va="center"
        )
    return figure


def _cut(name: str, most: int = 14) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"
