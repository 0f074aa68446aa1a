"""HumanML3D's skeleton of 22 joints and its 263 features a frame (Guo et al., CVPR 2022), both ways, in numpy.

Joints are metres, y up. Features of a frame: the root's turning about y (half angle, radians a frame), its speed along x and z in its own
frame, its height; 21 joints relative to the root, turned to face z; 21 rotations, six numbers each; 22 joint velocities, turned likewise;
four foot contacts. The motion is the integral of the first three, so it starts at the origin facing z; features have one frame fewer than
joints. Quaternions are (w, x, y, z).
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

NAMES = (
    *("pelvis", "left_hip", "right_hip", "spine1", "left_knee", "right_knee", "spine2", "left_ankle", "right_ankle", "spine3", "left_foot"),
    *("right_foot", "neck", "left_collar", "right_collar", "head", "left_shoulder", "right_shoulder", "left_elbow", "right_elbow"),
    *("left_wrist", "right_wrist"),
)
PARENTS = (-1, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 13, 14, 16, 17, 18, 19)
CHAINS = ((0, 2, 5, 8, 11), (0, 1, 4, 7, 10), (0, 3, 6, 9, 12, 15), (9, 14, 17, 19, 21), (9, 13, 16, 18, 20))
_X, _Y, _Z = np.eye(3)
DIRECTIONS = np.stack([0 * _X, _X, -_X, _Y, -_Y, -_Y, _Y, -_Y, -_Y, _Y, _Z, _Z, _Y, _X, -_X, _Z, *[-_Y] * 6])  # of each bone at rest
JOINTS, DIM, FPS = 22, 263, 20
PARTS = (slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 67), slice(67, 193), slice(193, 259), slice(259, 263))
FEET = (7, 10, 8, 11)  # left ankle and foot, right ankle and foot
STILL = 0.002  # squared metres a frame


# quaternions --------------------------------------------------------------------------------------------------------


def multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    w1, x1, y1, z1 = np.moveaxis(a, -1, 0)
    w2, x2, y2, z2 = np.moveaxis(b, -1, 0)
    parts = (
        w1 * w2 - x1 * x2 - y1 * y2 - z1 * z2,
        w1 * x2 + x1 * w2 + y1 * z2 - z1 * y2,
        w1 * y2 - x1 * z2 + y1 * w2 + z1 * x2,
        w1 * z2 + x1 * y2 - y1 * x2 + z1 * w2,
    )
    return np.stack(parts, -1)


def inverse(q: np.ndarray) -> np.ndarray:
    """Of unit quaternions."""
    return q * np.array([1.0, -1, -1, -1])


def rotate(q: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Vectors [..., 3] turned by unit quaternions [..., 4]."""
    w, a, b, c = (q[..., i] for i in range(4))
    x, y, z = (v[..., i] for i in range(3))
    tx, ty, tz = 2 * (b * z - c * y), 2 * (c * x - a * z), 2 * (a * y - b * x)
    return np.stack([x + w * tx + b * tz - c * ty, y + w * ty + c * tx - a * tz, z + w * tz + a * ty - b * tx], -1)


def between(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The shortest turns from directions u to v, [..., 3] each; where they are opposite, half a turn about y."""
    u, v = np.broadcast_arrays(u, v)
    w = np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1) + (u * v).sum(-1)
    q = np.concatenate([w[..., None], np.cross(u, v)], -1)
    size = np.linalg.norm(q, axis=-1, keepdims=True)
    return np.where(size > 1e-8, q / np.maximum(size, 1e-8), np.array([0.0, 0, 1, 0]))


def matrices(q: np.ndarray) -> np.ndarray:
    """Rotation matrices [..., 3, 3]; their columns are the turned axes."""
    return np.stack([rotate(q, np.broadcast_to(axis, (*q.shape[:-1], 3))) for axis in np.eye(3)], -1)


# joints to features -------------------------------------------------------------------------------------------------


def facing(joints: np.ndarray, smooth: float = 20.0) -> np.ndarray:
    """The turn of each frame that makes the body face z, float [frames, 4]; hips and shoulders say where it faces. smooth: deviation, in
    frames, of the Gaussian that forward directions are smoothed with (0: none)."""
    across = joints[:, 2] - joints[:, 1] + joints[:, 17] - joints[:, 16]  # left to right
    forward = np.cross(np.array([0.0, 1, 0]), across)
    forward[:, 1] = 0
    forward /= np.maximum(np.linalg.norm(forward, axis=1, keepdims=True), 1e-8)
    if smooth:
        from scipy.ndimage import gaussian_filter1d

        forward = gaussian_filter1d(forward, smooth, axis=0, mode="nearest")
        forward /= np.maximum(np.linalg.norm(forward, axis=1, keepdims=True), 1e-8)
    return between(forward, np.array([0.0, 0, 1]))


def local_rotations(joints: np.ndarray, turn: np.ndarray) -> np.ndarray:
    """Each bone's turn relative to the one before it in its chain, float [frames, 22, 4]; every chain starts from the root's turn."""
    out = np.zeros((len(joints), JOINTS, 4))
    out[:, 0] = turn
    for chain in CHAINS:
        so_far = turn
        for parent, child in pairwise(chain):
            bone = joints[:, child] - joints[:, parent]
            bone = bone / np.maximum(np.linalg.norm(bone, axis=1, keepdims=True), 1e-8)
            out[:, child] = multiply(inverse(so_far), between(DIRECTIONS[child], bone))
            so_far = multiply(so_far, out[:, child])
    return out


def to_features(joints: np.ndarray) -> np.ndarray:
    """Joints [frames + 1, 22, 3], at least 2 frames, the floor at y = 0, to features float32 [frames, 263]. Where a motion starts and
    faces at first doesn't matter: it is moved to the origin and turned to face z."""
    joints = np.asarray(joints, np.float64)
    joints = rotate(facing(joints[:1], 0)[:, None], joints - joints[0, 0] * np.array([1, 0, 1]))
    step = np.diff(joints, axis=0)
    feet = (step[:, FEET] ** 2).sum(-1) < STILL
    turn = facing(joints)
    turn[0] = (1, 0, 0, 0)  # smoothing moves it; the integral starts at none
    rotations = matrices(local_rotations(joints, turn))[..., :2]  # the first two columns, one after the other
    six = np.swapaxes(rotations, -1, -2).reshape(len(joints), JOINTS, 6)
    local = joints - joints[:, :1] * np.array([1, 0, 1])
    local = rotate(turn[:, None], local)
    spin = np.arcsin(np.clip(multiply(turn[1:], inverse(turn[:-1]))[:, 2:3], -1, 1))
    speed = rotate(turn[1:], step[:, 0])[:, [0, 2]]
    velocity = rotate(turn[:-1, None], step)
    parts = (spin, speed, local[:-1, 0, 1:2], local[:-1, 1:], six[:-1, 1:], velocity, feet)
    return np.concatenate([p.reshape(len(step), -1) for p in parts], 1).astype(np.float32)


# features to joints -------------------------------------------------------------------------------------------------


def to_joints(features: np.ndarray) -> np.ndarray:
    """Features [..., frames, 263] to joints float32 [..., frames, 22, 3], starting at the origin facing z."""
    f = np.asarray(features, np.float64)
    angle = np.cumsum(np.concatenate([np.zeros_like(f[..., :1, 0]), f[..., :-1, 0]], -1), -1)
    turn = np.stack([np.cos(angle), np.zeros_like(angle), np.sin(angle), np.zeros_like(angle)], -1)
    step = np.zeros((*f.shape[:-1], 3))
    step[..., 1:, 0], step[..., 1:, 2] = f[..., :-1, 1], f[..., :-1, 2]
    root = np.cumsum(rotate(inverse(turn), step), -2)
    root[..., 1] = f[..., 3]
    local = f[..., 4:67].reshape(*f.shape[:-1], JOINTS - 1, 3)
    others = rotate(inverse(turn)[..., None, :], local) + root[..., None, :] * np.array([1, 0, 1])
    return np.concatenate([root[..., None, :], others], -2).astype(np.float32)


# a body to pose -----------------------------------------------------------------------------------------------------

BONES = np.array(
    [0, 0.1, 0.1, 0.12, 0.4, 0.4, 0.13, 0.42, 0.42, 0.06, 0.14, 0.14, 0.21, 0.12, 0.12, 0.12, 0.12, 0.12, 0.27, 0.27, 0.25, 0.25]
)
REST = DIRECTIONS.copy()  # a natural stand: hips a little down, collars up, head upright
REST[1], REST[2] = (0.6, -0.8, 0), (-0.6, -0.8, 0)
REST[13], REST[14] = (0.7, 0.7, 0), (-0.7, 0.7, 0)
REST[16], REST[17] = (0.97, -0.24, 0), (-0.97, -0.24, 0)
REST[15] = (0, 0.95, 0.3)


def pose(root: np.ndarray, rotations: np.ndarray) -> np.ndarray:
    """Forward kinematics of the resting body: root positions [frames, 3] and each joint's turn relative to its parent's [frames, 22, 4],
    which moves the bones below it, to joints [frames, 22, 3]."""
    joints, so_far = np.zeros((len(root), JOINTS, 3)), np.zeros((len(root), JOINTS, 4))
    joints[:, 0], so_far[:, 0] = root, rotations[:, 0]
    for child in range(1, JOINTS):
        parent = PARENTS[child]
        bone = REST[child] / np.linalg.norm(REST[child]) * BONES[child]
        joints[:, child] = joints[:, parent] + rotate(so_far[:, parent], np.broadcast_to(bone, (len(root), 3)))
        so_far[:, child] = multiply(so_far[:, parent], rotations[:, child])
    return joints
