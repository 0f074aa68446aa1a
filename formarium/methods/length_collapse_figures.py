"""The figures of a length-collapse report, in matplotlib, from plain numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito: told apart by all eyes
GREY = "#8a8f98"


def _axes(columns: int = 1, width: float = 6.4, height: float = 3.8, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(columns * width, height), layout="constrained")
    axes = [*np.ravel(figure.subplots(1, columns, squeeze=False, **options))]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="#e3e5e8", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def _length_axis(ax: Axes, lengths: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [str(n) for n in lengths])
    ax.minorticks_off()
    ax.set_xlabel("tokens")


def cosine_figure(cut: Mapping[float, Mapping[int, Any]], as_is: Mapping[float, Mapping[str, Any]]) -> Figure:
    """Left the same texts cut (band: 5% to 95% of the pairs, without a temperature), right texts as they are, by length."""
    figure, axes = _axes(2 if as_is[1.0] else 1, sharey=True)
    for (t, by), colour in zip(cut.items(), COLOURS, strict=False):
        lengths = [*by]
        axes[0].plot(lengths, [s.cosine for s in by.values()], "o-", color=colour, label=f"temperature {t:g}")
        if t == 1.0:
            axes[0].fill_between(lengths, [s.low for s in by.values()], [s.high for s in by.values()], color=colour, alpha=0.12, lw=0)
            _length_axis(axes[0], lengths)
    axes[0].set_ylabel("cosine between different texts")
    axes[0].set_title("the same texts, cut", fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    if as_is[1.0]:
        for (_, by_bin), colour in zip(as_is.items(), COLOURS, strict=False):
            axes[1].plot(range(len(by_bin)), [s.cosine for s in by_bin.values()], "o-", color=colour)
        axes[1].set_xticks(range(len(as_is[1.0])), [f"{name}\n({s.texts})" for name, s in as_is[1.0].items()], fontsize=8)
        axes[1].set_xlabel("tokens (texts)")
        axes[1].set_title("texts as they are", fontsize=10)
    return figure


def filter_figure(cut: Mapping[float, Mapping[int, Any]], theory: Mapping[int, float]) -> Figure:
    """sigma_a (left) and the part of its own values that attention lets through (right), mean over layers, by length."""
    seen_values = all(s.passed for by in cut.values() for s in by.values())
    figure, axes = _axes(2 if seen_values else 1)
    panels = [(axes[0], "sigma", "sigma_a: the most it can let through")]
    panels += [(axes[1], "passed", "let through of its own values")] if seen_values else []
    for ax, key, label in panels:
        for (t, by), colour in zip(cut.items(), COLOURS, strict=False):
            ax.plot([*by], [np.mean(getattr(s, key)) for s in by.values()], "o-", color=colour, label=f"temperature {t:g}")
        _length_axis(ax, [*cut[1.0]])
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
    axes[0].plot([*theory], [*theory.values()], "--", color=GREY, label="independent normal scores")
    axes[0].legend(fontsize=8, frameon=False)
    return figure


def layer_figure(sigma: Mapping[int, Sequence[float]]) -> Figure:
    """sigma_a of every layer (rows) at every length (columns), with the numbers written in."""
    values = np.array([*sigma.values()]).T
    figure, (ax,) = _axes(1, 0.8 * len(sigma) + 2.2, 0.4 * len(values) + 1.4)
    ax.grid(False)
    image = ax.imshow(values, cmap="viridis", aspect="auto", vmin=0)
    for (row, column), value in np.ndenumerate(values):
        ax.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="white" if value < 0.6 * values.max() else "black")
    ax.set_xticks(range(len(sigma)), [str(n) for n in sigma])
    ax.set_yticks(range(len(values)), [str(i + 1) for i in range(len(values))])
    ax.set_xlabel("tokens")
    ax.set_ylabel("layer")
    figure.colorbar(image, label="sigma_a")
    return figure


def map_figure(embeddings: Mapping[int, Any]) -> Figure:
    """Embeddings of all lengths on their two main axes, one colour a length: where long texts lie, and how closely."""
    points = np.concatenate([e.numpy() for e in embeddings.values()])
    points = points - points.mean(0)
    _, _, axes_ = np.linalg.svd(points, full_matrices=False)
    flat = points @ axes_[:2].T
    figure, (ax,) = _axes(1, 5.6, 4.6)
    shades, start = plt_shades(len(embeddings)), 0
    for (length, e), shade in zip(embeddings.items(), shades, strict=True):
        part = flat[start : start + len(e)]
        start += len(e)
        ax.scatter(part[:, 0], part[:, 1], s=14, color=shade, label=f"{length} tokens", alpha=0.8, linewidths=0)
    ax.legend(fontsize=8, frameon=False)
    ax.set_xlabel("first principal axis")
    ax.set_ylabel("second")
    return figure


def plt_shades(count: int) -> list[Any]:
    import matplotlib

    return [*matplotlib.colormaps["viridis"](np.linspace(0.05, 0.9, count))]
