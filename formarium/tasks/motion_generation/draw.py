"""Pictures of motions: stick figures, as strips and as animations."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from formarium.tasks.motion_generation.skeleton import FPS, PARENTS

INK, LEFT, RIGHT, SPINE, FLOOR = (40, 44, 52), (0, 110, 160), (200, 90, 40), (70, 74, 82), (225, 228, 232)
COLOURS = {**dict.fromkeys((1, 4, 7, 10, 13, 16, 18, 20), LEFT), **dict.fromkeys((2, 5, 8, 11, 14, 17, 19, 21), RIGHT)}
_VIEW = np.array([[np.cos(0.7), 0, -np.sin(0.7)], [0, 1, 0]])  # from the front, half turned to the side
_VIEW = np.vstack([_VIEW, [np.sin(0.7), 0, np.cos(0.7)]])


def figure(pen: ImageDraw.ImageDraw, joints: np.ndarray, left: float, floor: float, scale: float, centre: np.ndarray) -> None:
    """One pose, joints [22, 3], its `centre` [3] at x = left and y = 0 at y = floor, `scale` pixels a metre."""
    seen = (joints - centre * np.array([1, 0, 1])) @ _VIEW.T
    x, y = left + seen[:, 0] * scale, floor - seen[:, 1] * scale - seen[:, 2] * scale * -0.25
    for child in np.argsort(seen[:, 2]):
        if (parent := PARENTS[child]) >= 0:
            pen.line((x[parent], y[parent], x[child], y[child]), COLOURS.get(int(child), SPINE), 3)
    pen.ellipse((x[15] - 5, y[15] - 6, x[15] + 5, y[15] + 4), outline=SPINE, width=2)


def draw(prediction: Any, batch: Mapping[str, Any], most: int = 8, poses: int = 8) -> Image.Image:
    """Up to `most` motions, a line each: the caption and `poses` poses at even distances in time, each about where the body is."""
    count, wide, high = min(most, len(prediction.joints)), 84, 150
    sheet = Image.new("RGB", (170 + poses * wide, count * high), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    captions = batch.get("caption") or [""] * count
    for i in range(count):
        frames = max(int(prediction.length[i]), 1)
        joints = prediction.joints[i, :frames].float().cpu().numpy()
        floor = (i + 1) * high - 18
        text = "\n".join(textwrap.wrap(str(captions[i]), 22)[:5])
        pen.multiline_text((8, i * high + 16), f"{text}\n{frames / FPS:.1f} s", INK, font)
        pen.line((165, floor, sheet.width - 5, floor), FLOOR, 2)
        for k, t in enumerate(np.linspace(0, frames - 1, poses).round().astype(int)):
            figure(pen, joints[t], 165 + (k + 0.5) * wide, floor, 62, joints[t, 0])
    return sheet


def write_gif(joints: np.ndarray, path: Path, caption: str = "", fps: int = FPS, side: int = 220) -> Path:
    """An animation of joints [frames, 22, 3]; the floor moves under the body."""
    frames, font = [], ImageFont.load_default(size=12)
    for pose in joints:
        picture = Image.new("RGB", (side, side), "white")
        pen, floor = ImageDraw.Draw(picture), side - 34
        for k in range(-4, 5):  # marks on the floor, half a metre apart along x and z
            for mark in ((k * 0.5 - pose[0, 0] % 0.5, -pose[0, 2] % 0.5 - 0.25), (-pose[0, 0] % 0.5 - 0.25, k * 0.5 - pose[0, 2] % 0.5)):
                seen = np.array([mark[0], 0, mark[1]]) @ _VIEW.T
                x, y = side / 2 + seen[0] * 90, floor + seen[2] * 22
                pen.ellipse((x - 2, y - 1, x + 2, y + 1), fill=FLOOR)
        figure(pen, pose, side / 2, floor, 90, pose[0])
        pen.multiline_text((6, 4), "\n".join(textwrap.wrap(caption, 34)[:2]), INK, font)
        frames.append(picture)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=round(1000 / fps), loop=0)
    return Path(path)
