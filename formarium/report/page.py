"""The page of a comparison (or several), and of a lens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from formarium.report import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from formarium.lens import Report


@dataclass
class Section:
    """One comparison: its results as in results.json, and what only a page shows."""

    title: str = ""
    results: dict[str, Any] = field(default_factory=dict)
    folder: Path = field(default_factory=Path)
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    figures: dict[str, Figure] = field(default_factory=dict)
    picture: Image | None = None
    look: Report | None = None


def write(path: Path, title: str, sections: Sequence[Section], lead: str = "") -> Path:
    """report.html for one or more comparisons."""
    shown = [_section(s, path.parent) for s in sections]
    return _render(path, "comparison.html", title=title, lead=lead, sections=shown)


def write_look(path: Path, report: Report) -> Path:
    """A lens's report as a page."""
    return _render(path, "look.html", title=report.title, look=_look(report))


def _render(path: Path, template: str, **values: Any) -> Path:
    env = Environment(loader=PackageLoader("formarium.report"), autoescape=select_autoescape(), trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"count": count, "si": si, "number": number}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(env.get_template(template).render(**values), encoding="utf-8")
    return path


def _section(s: Section, beside: Path) -> dict[str, Any]:
    r = s.results
    rows, metric = r["candidates"], r["metric"]
    good = [row for row in rows if row["ok"]]
    drawn: dict[str, Figure] = {f"{metric} against latency": figures.pareto(rows, metric, r.get("higher_is_better", True))} if good else {}
    drawn |= s.figures
    curves = figures.learning_curves(s.curves, metric, rows) if good else None
    return {
        "title": s.title,
        "r": r,
        "metric": metric,
        "rows": rows,
        "tint": figures.colors(rows),
        "verdict": verdict(r),
        "charts": [(caption, Markup(figures.svg(f))) for caption, f in drawn.items()],
        "curves": Markup(figures.svg(curves)) if curves is not None else None,
        "picture": figures.png(s.picture) if s.picture is not None else None,
        "look": _look(s.look) if s.look is not None else None,
        "winner_path": (s.folder / "winner").as_posix(),
    }


def _look(report: Report) -> dict[str, Any]:
    return {
        "title": report.title,
        "findings": report.findings,
        "tables": report.tables,
        "figures": [(caption, Markup(figures.svg(f))) for caption, f in report.figures.items()],
    }


def verdict(r: Mapping[str, Any]) -> list[str]:
    """The outcome in sentences."""
    if r["winner"] is None:
        return ["No candidate could be fitted; the table says why."]
    best, metric = r["candidates"][0], r["metric"]
    low, high = best["intervals"].get(metric, (None, None))
    span = f" (95% interval {low:.3f} to {high:.3f})" if low is not None else ""
    said = [f"{best['variant']} comes first: {metric} {best['metrics'][metric]:.3f}{span}, {best['latency_ms']:.1f} ms a sample."]
    if lead := r.get("lead"):
        points = metric == "accuracy"
        gained, low, high = (f"{lead[k] * 100:+.1f}" if points else f"{lead[k]:+.3g}" for k in ("difference", "low", "high"))
        span = f"{low} to {high}"
        how = "a clear lead" if lead["clear"] else "within the noise of this held-out set"
        said.append(f"It is {gained}{' points' if points else ''} ahead of {lead['over']}: {how} ({span}).")
    base = r["baseline"]
    under = r["below_baseline"]
    said.append(
        f"{base['name'].capitalize()} reaches {base[metric]:.3f}; "
        + (f"not better: {', '.join(under)}." if under else "every candidate is better.")
    )
    if stopped := r.get("stopped"):
        said.append(f"Stopped early, behind the others when they were judged: {', '.join(stopped)}; their scores are those of that moment.")
    failed = [row["variant"] for row in r["candidates"] if not row["ok"]]
    if failed:
        said.append(f"Failed: {', '.join(failed)}.")
    return said


def count(value: Any) -> str:
    """1234567 -> 1.23 M."""
    return si(value, 1000)


def si(value: Any, base: int = 1000, unit: str = "") -> str:
    if value is None:
        return ""
    for letter in ("", "k", "M", "G", "T"):
        if abs(value) < base:
            return f"{value:.3g} {letter}{unit}".strip()
        value /= base
    return f"{value:.3g} P{unit}"


def number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
