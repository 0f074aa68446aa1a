"""The figures of a comparison, as matplotlib figures and as SVG for a page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from PIL.Image import Image

COLORS = ("#0f766e", "#b45309", "#1d4ed8", "#be123c", "#6d28d9", "#4d7c0f", "#0e7490", "#a21caf", "#57534e", "#92400e")
GREY = "#9ca3af"


def colors(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A colour for each candidate, the same in every figure: of many, the best have one each and the others are grey."""
    named = [r["variant"] for r in rows]
    if len(named) > len(COLORS):
        named = named[: len(COLORS)]  # rows stand best first
    tint = {name: COLORS[i] for i, name in enumerate(sorted(named))}
    return {r["variant"]: tint.get(r["variant"], GREY) for r in rows}


def pareto(rows: Sequence[Mapping[str, Any]], metric: str, higher_is_better: bool = True) -> Figure:
    """Score against latency, one point a candidate with its interval (hollow: stopped early); the line joins those that no other of
    the finished beats in both."""
    good = [r for r in rows if r["ok"] and r.get("latency_ms")]
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes, tint = figure.subplots(), colors(rows)
    sign = 1 if higher_is_better else -1
    best, front = float("-inf"), []
    finished = [r for r in good if not r.get("stopped")]
    for r in sorted(finished, key=lambda r: (r["latency_ms"], -sign * r["metrics"][metric])):
        if sign * r["metrics"][metric] > best:
            best = sign * r["metrics"][metric]
            front.append(r)
    axes.plot([r["latency_ms"] for r in front], [r["metrics"][metric] for r in front], color=GREY, lw=1.2, zorder=1)
    for r in good:
        x, y = r["latency_ms"], r["metrics"][metric]
        low, high = r["intervals"].get(metric, (y, y))
        axes.errorbar(
            x, y, yerr=[[max(0, y - low)], [max(0, high - y)]], fmt="o", color=tint[r["variant"]], ms=7, lw=1, capsize=2, zorder=2,
            markerfacecolor="white" if r.get("stopped") else None,
        )  # fmt: skip
        axes.annotate(_name(r["variant"]), (x, y), xytext=(7, 4), textcoords="offset points", fontsize=8.5, color=tint[r["variant"]])
    axes.set_xlabel("latency, ms (one sample)")
    axes.set_ylabel(metric)
    return _quiet(figure)


def learning_curves(curves: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Training loss (left) and the held-out metric (right) over the steps."""
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    (loss, held), tint = figure.subplots(1, 2), colors(rows)
    for name, history in curves.items():
        train = [(h["step"], h["loss"]) for h in history if h["split"] == "train"]
        val = [(h["step"], h[metric]) for h in history if h["split"] == "val" and metric in h]
        loss.plot(*zip(*_smooth(train), strict=True), color=tint[name], lw=1.2)
        held.plot(*zip(*val, strict=True), color=tint[name], lw=1.4, marker="o", ms=3, label=_name(name))
    loss.set_xlabel("step")
    loss.set_ylabel("training loss")
    held.set_xlabel("step")
    held.set_ylabel(f"held-out {metric}")
    held.legend(fontsize=8 if len(curves) <= 10 else 6, frameon=False, loc="lower right")
    return _quiet(figure)


def _smooth(points: Sequence[tuple[int, float]], window: int = 7) -> list[tuple[int, float]]:
    out = []
    for i, (step, _) in enumerate(points):
        around = [v for _, v in points[max(0, i - window) : i + 1]]
        out.append((step, sum(around) / len(around)))
    return out


def _name(variant: str) -> str:
    return variant.removesuffix("_micro")


def _quiet(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
        axes.tick_params(labelsize=8.5)
    return figure


def svg(figure: Figure) -> str:
    """The figure as inline SVG, on no background."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text[text.index("<svg") :], count=1)


def png(picture: Image) -> str:
    """A picture as a data address."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
