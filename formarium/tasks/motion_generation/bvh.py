"""BVH, the animators' text format: a skeleton, and each frame's root position and joint turns in degrees.

A joint's node stands where its bone begins, so that every bone turns by itself, also where several begin at one joint.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from formarium.errors import BadInput
from formarium.tasks.motion_generation.skeleton import (
    DIRECTIONS,
    FPS,
    JOINTS,
    NAMES,
    PARENTS,
    between,
    facing,
    inverse,
    matrices,
    multiply,
    rotate,
)  # fmt: skip


def write_bvh(path: str | Path, joints: np.ndarray, fps: float = FPS) -> Path:
    """Joints [frames, 22, 3] in metres as a BVH file in centimetres; bones have their mean length over the motion."""
    joints = np.asarray(joints, np.float64) * 100
    lengths = np.zeros(JOINTS)
    lengths[1:] = np.linalg.norm(joints[:, 1:] - joints[:, list(PARENTS[1:])], axis=-1).mean(0)
    offsets = DIRECTIONS * lengths[:, None]
    whole = np.zeros((len(joints), JOINTS, 4))  # each bone's turn in the world
    whole[:, 0] = inverse(facing(joints, 0))
    for child in range(1, JOINTS):
        bone = joints[:, child] - joints[:, PARENTS[child]]
        whole[:, child] = multiply(whole[:, 0], between(DIRECTIONS[child], rotate(inverse(whole[:, 0]), bone)))
    lines, order = ["HIERARCHY"], []

    def node(joint: int, depth: int) -> None:
        pad, children = "  " * depth, [c for c in range(JOINTS) if PARENTS[c] == joint]
        lines.append(f"{pad}{'JOINT' if depth else 'ROOT'} {NAMES[joint]}")
        at = offsets[PARENTS[joint]] if joint and PARENTS[joint] else np.zeros(3)
        channels = "3 Zrotation Xrotation Yrotation" if depth else "6 Xposition Yposition Zposition Zrotation Xrotation Yrotation"
        lines.extend([f"{pad}{{", f"{pad}  OFFSET {_numbers(at)}", f"{pad}  CHANNELS {channels}"])
        order.append(joint)
        for child in children:
            node(child, depth + 1)
        if not children:
            lines.extend([f"{pad}  End Site", f"{pad}  {{", f"{pad}    OFFSET {_numbers(offsets[joint])}", f"{pad}  }}"])
        lines.append(f"{pad}}}")

    node(0, 0)
    turns = [multiply(inverse(whole[:, PARENTS[j]]), whole[:, j]) if j else whole[:, 0] for j in order]
    rows = np.concatenate([joints[:, 0], *(_euler(q) for q in turns)], 1)
    lines += ["MOTION", f"Frames: {len(joints)}", f"Frame Time: {1 / fps:.6f}", *(_numbers(row) for row in rows)]
    path = Path(path)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _numbers(values: np.ndarray) -> str:
    return " ".join(f"{v:.5f}" for v in values)


def _euler(q: np.ndarray) -> np.ndarray:
    """Degrees about z, then x, then y (each about the axes turned so far), [frames, 3]."""
    m = matrices(q)
    x = np.arcsin(np.clip(m[:, 2, 1], -1, 1))
    locked = np.abs(m[:, 2, 1]) > 1 - 1e-9
    z = np.where(locked, np.arctan2(m[:, 1, 0], m[:, 0, 0]), np.arctan2(-m[:, 0, 1], m[:, 1, 1]))
    y = np.where(locked, 0.0, np.arctan2(-m[:, 2, 0], m[:, 2, 2]))
    return np.degrees(np.stack([z, x, y], 1))


def read_bvh(path: str | Path) -> tuple[list[str], np.ndarray, float]:
    """Any BVH file: names of its nodes (an end site is called after its joint, "... end"), positions float64 [frames, nodes, 3] in the
    file's unit, frames a second. Raises BadInput for a file that isn't whole."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    head, _, tail = text.partition("MOTION")
    try:
        names, parents, offsets, channels = _hierarchy(head)
        lines = [line for line in tail.strip().splitlines() if line.strip()]
        frames, seconds = int(lines[0].split(":")[1]), float(lines[1].split(":")[1])
        values = np.array([[float(v) for v in line.split()] for line in lines[2:]])
        if values.shape != (frames, sum(map(len, channels))):
            raise ValueError(f"{frames} frames of {sum(map(len, channels))} numbers expected, {values.shape} found")
    except (ValueError, IndexError, KeyError) as e:
        raise BadInput(str(path), expected="a whole BVH file", got=f"{type(e).__name__}: {e}") from None
    positions, whole, at = np.zeros((frames, len(names), 3)), np.zeros((frames, len(names), 4)), 0
    for i, parent in enumerate(parents):
        offset, turn = np.broadcast_to(offsets[i], (frames, 3)).copy(), np.tile([1.0, 0, 0, 0], (frames, 1))
        for channel in channels[i]:
            axis = "XYZ".index(channel[0].upper())
            if channel.lower().endswith("position"):
                offset[:, axis] = values[:, at] + (offsets[i][axis] if parent >= 0 else 0)
            else:
                half = np.radians(values[:, at]) / 2
                q = np.zeros((frames, 4))
                q[:, 0], q[:, 1 + axis] = np.cos(half), np.sin(half)
                turn = multiply(turn, q)
            at += 1
        if parent < 0:
            positions[:, i], whole[:, i] = offset, turn
        else:
            positions[:, i], whole[:, i] = positions[:, parent] + rotate(whole[:, parent], offset), multiply(whole[:, parent], turn)
    return names, positions, 1 / max(seconds, 1e-6)


def _hierarchy(head: str) -> tuple[list[str], list[int], list[np.ndarray], list[list[str]]]:
    names: list[str] = []
    parents: list[int] = []
    offsets: list[np.ndarray] = []
    channels: list[list[str]] = []
    stack: list[int] = []
    for line in head.splitlines():
        words = line.split()
        if not words:
            continue
        if words[0] in ("ROOT", "JOINT", "End"):
            names.append(f"{names[stack[-1]]} end" if words[0] == "End" else " ".join(words[1:]))
            parents.append(stack[-1] if stack else -1)
            offsets.append(np.zeros(3))
            channels.append([])
        elif words[0] == "{":
            stack.append(len(names) - 1)
        elif words[0] == "}":
            stack.pop()
        elif words[0] == "OFFSET":
            offsets[-1] = np.array([float(v) for v in words[1:4]])
        elif words[0] == "CHANNELS":
            channels[-1] = words[2 : 2 + int(words[1])]
    if not names or stack:
        raise ValueError("no skeleton")
    return names, parents, offsets, channels


def joints_of(names: list[str], positions: np.ndarray) -> np.ndarray:
    """Joints [frames, 22, 3] in metres from a file that `write_bvh` wrote. Raises BadInput for another skeleton."""
    if [n for n in names if not n.endswith(" end")] != _order():
        raise BadInput("BVH skeleton", expected="HumanML3D's 22 joints, as write_bvh writes them", got=", ".join(names[:5]) + " ...")
    out = np.zeros((len(positions), JOINTS, 3))
    for joint, name in enumerate(NAMES):
        children = [c for c in range(JOINTS) if PARENTS[c] == joint]
        out[:, joint] = positions[:, names.index(NAMES[children[0]] if children else f"{name} end")]
    return out / 100


def _order(joint: int = 0) -> list[str]:
    return [NAMES[joint], *(n for c in range(JOINTS) if PARENTS[c] == joint for n in _order(c))]
