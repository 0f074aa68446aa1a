"""Errors of solutions and of equations, predictions as rows, and the trivial rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from formarium.errors import BadInput
from formarium.task import Data
from formarium.tasks.operator_learning.symbols import parse, right_hand_side, skeleton

SOLVED = 200  # samples whose written equations are solved for a score


def relative_l2(said: np.ndarray, true: np.ndarray) -> np.ndarray:
    """|said - true| / |true| over all but the first axis: float64 [samples]."""
    axes = tuple(range(1, true.ndim))
    return np.sqrt(((said - true) ** 2).sum(axes) / np.maximum((true**2).sum(axes), 1e-12))


def same_skeleton(said: Sequence[str], true: Sequence[str]) -> bool:
    try:
        return skeleton(said) == skeleton(true)
    except BadInput:
        return False


def integrated_error(words: Sequence[str], times: np.ndarray, true: np.ndarray) -> float:
    """The written equations solved from true[0]: how far from true float [times, dims], relative; 1 where they are no equations, or
    worse."""
    from scipy.integrate import solve_ivp

    limit = 100 * max(1.0, float(np.abs(true).max()))

    def runs_away(t: float, u: np.ndarray) -> float:
        return limit - float(np.abs(u).max())

    runs_away.terminal = True  # type: ignore[attr-defined]
    try:
        system = parse(words)
        if len(system) != true.shape[1]:
            return 1.0
        solved = solve_ivp(
            lambda t, u: right_hand_side(system, u[None], t)[0],
            *((times[0], times[-1]), true[0]),
            **{"t_eval": times, "events": runs_away, "rtol": 1e-4, "atol": 1e-6},
        )
    except (BadInput, KeyError, ValueError):
        return 1.0
    if solved.y.shape[1] != len(times) or not np.isfinite(solved.y).all():
        return 1.0
    return float(min(1.0, relative_l2(solved.y.T[None], true[None])[0]))


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """relative_l2 (of the solution, mean over samples; lower is better), r2 (of all values), and of samples whose equations are known:
    valid
    (share that are equations), skeleton (share with the right form), and integrated_error (of the first 200: the written equations solved
    from the first state asked for, relative L2, at most 1)."""
    errors, valid, form = [], [], []
    solved: list[float] = []
    off = size = 0.0
    centre = np.concatenate([b["target"].float().cpu().numpy().reshape(-1) for b in batches]).mean()
    for p, b in zip(predictions, batches, strict=True):
        said, true = p.solution.float().cpu().numpy().astype(np.float64), b["target"].float().cpu().numpy().astype(np.float64)
        errors.append(relative_l2(said, true))
        off, size = off + ((said - true) ** 2).sum(), size + ((true - centre) ** 2).sum()
        for i, words in enumerate(b.get("words", [])):
            if not words:
                continue
            valid.append(float(p.valid[i]))
            form.append(float(same_skeleton(p.words[i], words)))
            if true.shape[2] == b["dims"].shape[1] and len(solved) < SOLVED:  # an ODE's
                there = b["dims"][i].cpu().numpy()
                solved.append(integrated_error(p.words[i], b["query"][i].double().cpu().numpy(), true[i][:, there]))
    per_sample = {"relative_l2": np.concatenate(errors)}
    if valid:
        per_sample |= {"valid": np.array(valid), "skeleton": np.array(form)}
    metrics = {name: float(values.mean()) for name, values in per_sample.items()}
    if solved:
        metrics["integrated_error"] = float(np.mean(solved))
    return {**metrics, "r2": float(1 - off / max(size, 1e-12))}, per_sample


def rows(prediction: Any, batch: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """One dict a sample: id, t and u (the solution at the queries), equation, words, valid; relative_l2 where the truth is known."""
    said = prediction.solution.float().cpu().numpy()
    error = relative_l2(said, batch["target"].float().cpu().numpy()) if "target" in batch else None
    ids = batch.get("id") or [str(i) for i in range(len(said))]
    out = []
    for i, name in enumerate(ids):
        row = {"id": name, "equation": prediction.equation[i], "words": " ".join(prediction.words[i]), "valid": prediction.valid[i]}
        row |= {"t": batch["query"][i].tolist(), "u": np.round(said[i], 6).tolist()}
        out.append(row | ({"relative_l2": round(float(error[i]), 6)} if error is not None else {}))
    return out


def baseline(data: Data, seed: int = 0) -> tuple[str, dict[str, float]]:
    """The better of two on "val": the continuation of the training trajectory whose observed part is nearest, and the last observed state
    held."""
    from sklearn.neighbors import NearestNeighbors

    from formarium.tasks.operator_learning.data import Prepare

    prepare, rng = Prepare({}), np.random.default_rng(seed)
    train, val = ([prepare(data.splits[s][i], rng) for i in range(len(data.splits[s]))] for s in ("train", "val"))
    true = np.stack([s["target"] for s in val]).astype(np.float64)
    nearest = NearestNeighbors(n_neighbors=1).fit(np.stack([s["data"][:, 1:].ravel() for s in train]))
    found = nearest.kneighbors(np.stack([s["data"][:, 1:].ravel() for s in val]), return_distance=False)[:, 0]
    rivals = {"the nearest training trajectory": np.stack([train[j]["target"] for j in found]).astype(np.float64)}
    rivals["the last state held"] = np.stack([s["data"][-1:, 1:] for s in val]).astype(np.float64) + 0 * true
    errors = {name: float(relative_l2(said, true).mean()) for name, said in rivals.items()}
    best = min(errors, key=errors.__getitem__)
    return best, {"relative_l2": errors[best]}
