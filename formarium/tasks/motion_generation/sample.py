"""Sample data: motions of a posed body, each with a caption that says what it does; drawn from a seed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.motion_generation.data import Arrays
from formarium.tasks.motion_generation.skeleton import BONES, JOINTS, multiply, pose, to_features

CAPTIONS = {
    "walk": ("a person walks forward", "someone is walking straight ahead"),
    "run": ("a person runs fast", "someone is jogging quickly"),
    "turn left": ("a person turns around to the left", "someone spins left on the spot"),
    "turn right": ("a person turns around to the right", "someone spins right on the spot"),
    "wave": ("a person waves with the right hand", "someone greets by waving a raised hand"),
    "jump": ("a person jumps up", "someone is hopping in place"),
    "squat": ("a person squats down", "someone bends the knees and crouches"),
    "raise arms": ("a person lifts both arms", "someone stretches the arms to the sides"),
}
COUNTS = {"train": 480, "val": 96}
LEG = float(BONES[4] + BONES[7])
STAND = 0.08 + LEG + 0.02  # height of the pelvis: hip drop, leg, the ankle's height


def sample(name: str, seed: int = 0) -> Data:
    """ "actions": eight actions (walk, run, turn left or right, wave, jump, squat, raise the arms), 32 to 40 frames at 20 a second,
    tempo, size and phase drawn anew; 480 motions and 96 held out. Two captions an action; `group` names the action."""
    if name != "actions":
        raise UnknownName("sample", name, ("actions",))
    return _made(seed)


@cache
def _made(seed: int) -> Data:
    rng = np.random.default_rng((seed, 23))
    splits = {
        split: Arrays([{**m, "id": f"{split} {i}: {m['caption']}"} for i, m in enumerate(motions(rng, n))]) for split, n in COUNTS.items()
    }
    return Data("actions", "motion-generation", {**splits}, {}, (), [], {"sample": "actions", "seed": seed})


def motions(rng: np.random.Generator, count: int) -> list[dict[str, Any]]:
    """Samples (motion, caption, group, id), the actions in turn."""
    found = []
    for i in range(count):
        action = [*CAPTIONS][i % len(CAPTIONS)]
        frames = int(rng.integers(32, 41))
        caption = CAPTIONS[action][rng.integers(2)]
        found.append({"motion": to_features(act(action, frames + 1, rng)), "caption": caption, "group": action, "id": f"motion {i}"})
    return found


def about(axis: int, angle: np.ndarray) -> np.ndarray:
    """Turns by `angle` [frames] about x, y or z."""
    q = np.zeros((*np.shape(angle), 4))
    q[..., 0], q[..., 1 + axis] = np.cos(angle / 2), np.sin(angle / 2)
    return q


def act(action: str, frames: int, rng: np.random.Generator) -> np.ndarray:
    """Joints [frames, 22, 3] of a body that does it, the floor at y = 0, starting at the origin facing z."""
    t = np.arange(frames) / 20
    tempo, size, phase = rng.uniform(0.9, 1.1), rng.uniform(0.85, 1.15), rng.uniform(0, 2 * np.pi)
    turn = np.zeros((frames, JOINTS, 4))
    turn[..., 0] = 1
    root = np.zeros((frames, 3))
    root[:, 1] = STAND
    turn[:, 16], turn[:, 17] = about(2, np.full(frames, 0.12)), about(2, np.full(frames, -0.12))  # arms hang
    if action in ("walk", "run"):
        rate, stride, speed = (0.95, 0.45, 1.1) if action == "walk" else (1.5, 0.75, 2.6)
        swing = 2 * np.pi * rate * tempo * t + phase
        root[:, 2] = speed * size * tempo * t
        root[:, 1] += 0.02 * size * np.cos(2 * swing)
        for hip, knee, shoulder, side in ((1, 4, 16, 1), (2, 5, 17, -1)):
            turn[:, hip] = about(0, -side * stride * size * np.sin(swing))
            turn[:, knee] = about(0, stride * (0.8 + 0.8 * side * np.cos(swing)))
            turn[:, shoulder] = multiply(about(0, side * stride * size * np.sin(swing)), turn[:, shoulder])
            turn[:, shoulder + 2] = about(0, np.full(frames, -0.4 if action == "walk" else -1.2))
    elif action in ("turn left", "turn right"):
        side = 1 if action == "turn left" else -1
        turn[:, 0] = about(1, side * size * 1.5 * tempo * t)
        step = np.sin(2 * np.pi * 1.5 * tempo * t + phase)
        for hip, knee, s in ((1, 4, 1), (2, 5, -1)):
            lift = 0.35 * np.maximum(s * step, 0)
            turn[:, hip], turn[:, knee] = about(0, -lift), about(0, 2 * lift)
    elif action == "wave":
        raised = np.minimum(t / 0.4, 1)
        turn[:, 17] = about(2, -0.12 - 1.5 * raised)
        turn[:, 19] = about(2, -1.3 * raised + 0.5 * size * np.sin(2 * np.pi * 1.6 * tempo * t + phase) * raised)
    elif action == "jump":
        height = np.sin(2 * np.pi * 0.9 * tempo * t + phase)
        bend = 0.6 * size * np.maximum(-height, 0)
        for hip, knee in ((1, 4), (2, 5)):
            turn[:, hip], turn[:, knee] = about(0, -bend), about(0, 2 * bend)
        root[:, 1] += 0.35 * size * np.maximum(height, 0) - LEG * (1 - np.cos(bend))
    elif action == "squat":
        bend = 0.55 * size * (1 - np.cos(2 * np.pi * 0.55 * tempo * t))
        for hip, knee in ((1, 4), (2, 5)):
            turn[:, hip], turn[:, knee] = about(0, -bend), about(0, 2 * bend)
        root[:, 1] -= LEG * (1 - np.cos(bend))
        turn[:, 3] = about(0, 0.4 * bend)
    else:
        lifted = 0.9 * size * (1 - np.cos(2 * np.pi * 0.6 * tempo * t))
        turn[:, 16], turn[:, 17] = about(2, 0.12 + lifted), about(2, -0.12 - lifted)
    turn[:, 6] = multiply(turn[:, 6], about(0, np.full(frames, rng.normal(0, 0.04))))  # nobody stands alike
    joints = pose(root, turn)
    if action != "jump":
        joints[..., 1] -= np.minimum(joints[:, [7, 8, 10, 11], 1].min(1), 0.02)[:, None] - 0.02
    return joints
