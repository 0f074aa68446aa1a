"""InkML, as CROHME has it: strokes and the truth of one formula; and strokes drawn as an image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from PIL import Image, ImageDraw

from formarium.errors import BadInput

LINE, MARGIN, SYMBOL, LARGEST = 2, 8, 36, (256, 1024)  # pixels: pen, border, a symbol's usual height, height and width at most


@dataclass(frozen=True)
class Ink:
    """strokes: float64 [points, 2] each, x to the right and y down, in any unit. truth: LaTeX, or "" where the file has none."""

    strokes: list[np.ndarray]
    truth: str = ""
    id: str = ""


def read_inkml(source: str | Path | bytes, what: str = "") -> Ink:
    """The strokes and truth of an InkML file (or its bytes). Raises BadInput where it isn't XML, isn't ink or holds no strokes."""
    what = what or (str(source) if not isinstance(source, bytes) else "ink")
    try:
        text = source if isinstance(source, bytes) else Path(source).read_bytes()
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as e:
        raise BadInput(what, expected="an InkML file", got=f"broken XML ({e})") from None
    except OSError as e:
        raise BadInput(what, expected="an InkML file", got=e.strerror or type(e).__name__) from None
    if _tag(root) != "ink":
        raise BadInput(what, expected="an InkML file, with <ink> around it all", got=f"<{_tag(root)}>")
    strokes = [_points(e.text or "", what) for e in root.iter() if _tag(e) == "trace"]
    strokes = [s for s in strokes if len(s)]
    if not strokes:
        raise BadInput(what, expected="at least one <trace>", got="none")
    said = {e.get("type", ""): (e.text or "").strip() for e in root if _tag(e) == "annotation"}
    return Ink(strokes, said.get("truth", ""), said.get("UI", ""))


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rsplit("}", 1)[-1]


def _points(text: str, what: str) -> np.ndarray:
    rows = [p.split()[:2] for p in text.replace("\n", " ").split(",") if p.strip()]
    try:
        points = np.array(rows, dtype=np.float64).reshape(-1, 2)
    except ValueError:
        raise BadInput(what, expected="traces of points `x y, x y, ...`", got=text.strip()[:40]) from None
    if not np.isfinite(points).all():
        raise BadInput(what, expected="finite points", got="NaN or infinite ones")
    return points


def write_inkml(ink: Ink, path: str | Path) -> None:
    """The strokes and truth as an InkML file that `read_inkml` takes."""
    root = ElementTree.Element("ink", xmlns="http://www.w3.org/2003/InkML")
    for kind, text in (("truth", ink.truth), ("UI", ink.id)):
        if text:
            ElementTree.SubElement(root, "annotation", type=kind).text = text
    for i, stroke in enumerate(ink.strokes):
        ElementTree.SubElement(root, "trace", id=str(i)).text = ", ".join(f"{x:g} {y:g}" for x, y in stroke)
    ElementTree.ElementTree(root).write(path, encoding="utf-8", xml_declaration=True)


def draw_ink(ink: Ink) -> np.ndarray:
    """Bright ink on dark paper, uint8 [height, width]: strokes scaled so that a usual one is SYMBOL pixels high, the whole within
    LARGEST."""
    points = np.concatenate(ink.strokes)
    low, extent = points.min(0), np.ptp(points, axis=0)
    sizes = [max(np.ptp(s, axis=0)) for s in ink.strokes]
    usual = float(np.median([s for s in sizes if s > 0])) if any(s > 0 for s in sizes) else 1.0
    room = np.array(LARGEST[::-1]) - 2 * MARGIN
    scale = min(SYMBOL / usual, *(room / np.maximum(extent, 1e-9)))
    width, height = (np.ceil(extent * scale).astype(int) + 2 * MARGIN).tolist()
    page = Image.new("L", (4 * width, 4 * height))  # drawn large and shrunk, for smooth edges
    pen = ImageDraw.Draw(page)
    for stroke in ink.strokes:
        xy = [tuple(p) for p in 4 * ((stroke - low) * scale + MARGIN)]
        r = 2 * LINE
        if len(xy) > 1:
            pen.line(xy, fill=255, width=4 * LINE, joint="curve")
        pen.ellipse((xy[0][0] - r, xy[0][1] - r, xy[0][0] + r, xy[0][1] + r), fill=255)
    return np.asarray(page.resize((width, height), Image.Resampling.BOX)).copy()
