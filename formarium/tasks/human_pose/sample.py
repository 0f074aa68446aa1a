"""Sample data that is drawn from a seed: articulated figures on cluttered grounds, every joint's place known.

A figure is a kinematic chain seen from the front: a torso that leans, arms and legs that bend at their joints within human limits, a head
with two eyes and two ears. Limbs of the left side are warmer in colour than those of the right, so that the sides can be told apart. Some
joints are behind an obstacle (visibility 1).
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.human_pose.data import People
from formarium.tasks.human_pose.joints import JOINTS

HEIGHT, WIDTH = 144, 176


def sample(name: str, seed: int = 0) -> Data:
    """ "figures": 1 to 2 figures a picture, 800 people to train on and 200 to test on. UnknownName for others."""
    if name != "figures":
        raise UnknownName("sample", name, ["figures"])
    return _figures(seed)


@cache
def _figures(seed: int) -> Data:
    rng = np.random.default_rng([seed, 17])
    splits = {}
    for first, (split, count) in enumerate([("train", 800), ("val", 200)]):
        entries: list[dict[str, object]] = []
        image_id = 100_000 * first
        while len(entries) < count:
            image_id += 1
            picture, people = scene(rng)
            for joints, box in people[: count - len(entries)]:
                number = 100_000 * first + len(entries) + 1
                truth = {"id": number, "image_id": image_id, "category_id": 1, "bbox": [float(v) for v in box], "iscrowd": 0}
                truth |= {"area": float(box[2] * box[3]) * 0.5, "keypoints": [float(v) for v in joints.ravel()]}
                truth["num_keypoints"] = int((joints[:, 2] > 0).sum())
                entries.append({"image": picture, "id": f"figure {split} {number}", "box": box, "keypoints": joints, "truth": [truth]})
        splits[split] = People(entries)
    return Data("figures", "human-pose", {**splits}, {"num_joints": 17}, [*JOINTS], [], {"sample": "figures", "seed": seed})


def scene(rng: np.random.Generator) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
    """A picture uint8 [144, 176, 3] and its people: (joints float32 [17, 3], box float32 [4])."""
    picture = ground(rng)
    pen = ImageDraw.Draw(picture)
    count = int(rng.integers(1, 3))
    people = []
    for i in range(count):
        tall = rng.uniform(62, 100)
        x = WIDTH * (i + 0.5) / count + rng.uniform(-14, 14)
        joints = pose(rng, x, HEIGHT / 2 + rng.uniform(-10, 10), tall)
        paint(pen, joints, tall, rng)
        people.append((joints, tall))
    obstacle = None
    if rng.random() < 0.3:
        w, h = rng.uniform(10, 26, 2)
        left, top = rng.uniform(0, WIDTH - w), rng.uniform(0, HEIGHT - h)
        pen.rectangle((left, top, left + w, top + h), fill=_colour(rng))
        obstacle = (left, top, left + w, top + h)
    out = []
    for joints, tall in people:
        marked = np.concatenate([joints, np.full((17, 1), 2.0)], 1)
        if obstacle is not None:
            x, y = joints.T
            hidden = (x > obstacle[0]) & (x < obstacle[2]) & (y > obstacle[1]) & (y < obstacle[3])
            marked[hidden, 2] = 1
        outside = (joints < 0).any(1) | (joints > [WIDTH - 1, HEIGHT - 1]).any(1)
        marked[outside] = 0
        edge = 0.06 * tall
        left, top = np.maximum(joints.min(0) - edge, 0)
        right, bottom = np.minimum(joints.max(0) + edge, [WIDTH, HEIGHT])
        out.append((marked.astype(np.float32), np.array([left, top, right - left, bottom - top], dtype=np.float32)))
    return np.asarray(picture), out


def pose(rng: np.random.Generator, x: float, y: float, tall: float) -> np.ndarray:
    """float64 [17, 2]: joints of a figure `tall` pixels high whose hips are about (x, y). Its left side is on the picture's right."""

    def along(start: np.ndarray, degrees: float, length: float) -> np.ndarray:
        """From a joint, `length` of the height, at an angle from straight down, anticlockwise in the picture."""
        a = math.radians(degrees)
        return start + tall * length * np.array([math.sin(a), math.cos(a)])

    at = np.zeros((17, 2))
    lean = rng.uniform(-15, 15)
    hips, shoulders = np.array([x, y]), along(np.array([x, y]), 180 + lean, 0.29)
    across = np.array([math.cos(math.radians(lean)), math.sin(math.radians(lean))]) * tall
    head = along(shoulders, 180 + lean + rng.uniform(-15, 15), 0.13)
    up = (head - shoulders) / np.linalg.norm(head - shoulders)
    side = np.array([-up[1], up[0]])  # towards the picture's right, the figure's left
    at[0] = head
    for sign, eye, ear, shoulder, elbow, wrist, hip, knee, ankle in ((1, 1, 3, 5, 7, 9, 11, 13, 15), (-1, 2, 4, 6, 8, 10, 12, 14, 16)):
        at[eye] = head + tall * (0.028 * sign * side + 0.025 * up)
        at[ear] = head + tall * (0.06 * sign * side + 0.012 * up)
        at[shoulder] = shoulders + sign * 0.105 * across
        at[hip] = hips + sign * 0.06 * across
        arm = rng.uniform(-10, 130)
        at[elbow] = along(at[shoulder], sign * arm, 0.17)
        at[wrist] = along(at[elbow], sign * (arm + rng.uniform(-20, 110)), 0.15)
        leg = rng.uniform(-5, 45)
        at[knee] = along(at[hip], sign * leg, 0.23)
        at[ankle] = along(at[knee], sign * (leg - rng.uniform(-5, 55)), 0.22)
    return at


def paint(pen: ImageDraw.ImageDraw, at: np.ndarray, tall: float, rng: np.random.Generator) -> None:
    """Draw a figure: torso, limbs, head, eyes and ears."""

    def limb(a: int, b: int, colour: tuple[int, int, int], share: float) -> None:
        width = max(2, round(share * tall))
        pen.line((*at[a], *at[b]), fill=colour, width=width)
        for joint in (a, b):
            x, y = at[joint]
            pen.ellipse((x - width / 2, y - width / 2, x + width / 2, y + width / 2), fill=colour)

    shade = rng.uniform(0.75, 1.1)
    warm = tuple(int(v) for v in np.clip(np.array([215, 95, 60]) * shade + rng.uniform(-20, 20, 3), 0, 255))
    cool = tuple(int(v) for v in np.clip(np.array([60, 120, 215]) * shade + rng.uniform(-20, 20, 3), 0, 255))
    shirt = tuple(int(v) for v in np.clip(np.array([120, 170, 110]) * shade + rng.uniform(-30, 30, 3), 0, 255))
    skin = tuple(int(v) for v in np.clip(np.array([235, 200, 165]) * shade, 0, 255))
    for colour, joints in ((warm, (11, 13, 15)), (cool, (12, 14, 16))):
        limb(joints[0], joints[1], colour, 0.075)
        limb(joints[1], joints[2], colour, 0.06)
    pen.polygon([tuple(at[i]) for i in (5, 6, 12, 11)], fill=shirt, outline=shirt)
    pen.line((*at[0], *((at[5] + at[6]) / 2)), fill=skin, width=max(2, round(0.05 * tall)))
    radius = 0.062 * tall
    for ear, colour in ((3, warm), (4, cool)):
        x, y = at[ear]
        pen.ellipse((x - 0.022 * tall, y - 0.022 * tall, x + 0.022 * tall, y + 0.022 * tall), fill=colour)
    x, y = at[0]
    pen.ellipse((x - radius, y - radius * 1.15, x + radius, y + radius * 1.15), fill=skin)
    for eye in (1, 2):
        x, y = at[eye]
        pen.ellipse((x - 1.2, y - 1.2, x + 1.2, y + 1.2), fill=(30, 30, 40))
    pen.ellipse((at[0][0] - 1, at[0][1] - 1, at[0][0] + 1, at[0][1] + 1), fill=(150, 60, 60))
    for colour, joints in ((warm, (5, 7, 9)), (cool, (6, 8, 10))):
        limb(joints[0], joints[1], colour, 0.06)
        limb(joints[1], joints[2], colour, 0.05)


def ground(rng: np.random.Generator) -> Image.Image:
    """A smooth gradient with shapes and grain."""
    corners = rng.uniform(60, 200, (2, 2, 3)).astype(np.uint8)
    picture = Image.fromarray(corners).resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for _ in range(rng.integers(2, 7)):
        x, y, w, h = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT), rng.uniform(8, 40), rng.uniform(8, 40)
        (pen.rectangle if rng.random() < 0.5 else pen.ellipse)((x, y, x + w, y + h), fill=_colour(rng))
    values = np.asarray(picture).astype(np.float32) + rng.normal(0, 6, (HEIGHT, WIDTH, 1))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def _colour(rng: np.random.Generator) -> tuple[int, int, int]:
    grey = rng.uniform(50, 210)
    r, g, b = (int(v) for v in np.clip(grey + rng.uniform(-35, 35, 3), 0, 255))
    return r, g, b
