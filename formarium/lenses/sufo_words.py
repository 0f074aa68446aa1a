"""SUFO's findings: sentences that a person can act on, from the numbers of a report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Numbers = Mapping[str, Any]
DOUBT = "the label: confidently called something else"


def overview(name: str, model: Numbers, counts: Mapping[str, int]) -> list[str]:
    """How good it is, its weakest class, and how it deals with uneven ones. counts: samples by class, of those that have any."""
    total, by_class = sum(counts.values()), model["class_accuracy"]
    weak, rare = min(by_class, key=by_class.__getitem__), min(counts, key=counts.__getitem__)
    out = [
        f"{name} gets {model['accuracy']:.1%} of {total} samples right (macro-F1 {model['macro_f1']:.3f}); "
        f"its weakest class is {weak!r} with {by_class[weak]:.0%} of {counts[weak]}."
    ]
    if max(counts.values()) >= 3 * counts[rare]:
        suffers = model["accuracy"] - by_class[rare] > 0.1
        advice = "sample classes evenly when fine-tuning, or collect more of it" if suffers else "it holds up"
        out.append(f"The classes are uneven: {rare!r} has {counts[rare]} of {total} samples and is {by_class[rare]:.0%} right; {advice}.")
    return out


def probes(layers: Sequence[str], found: Numbers, stage: str) -> list[str]:
    """Where the classes can first be read off; whether the head lags behind its features; what fine-tuning brought."""
    after = {layer: found["after"][layer]["macro_f1"] for layer in layers}
    best, last, own = max(after.values()), layers[-1], found["own_head"]
    early = next(layer for layer in layers if after[layer] >= best - 0.02)
    behind = len(layers) - 1 - layers.index(early)
    out = [
        f"A linear probe reads the classes off {early!r} (macro-F1 {after[early]:.3f}) as well as off any later layer ({best:.3f}): the "
        f"{behind} layers behind it add little here; a shallower variant, or freezing up to there, is worth a try."
        if behind > 1 and after[early] > found["largest_class"] + 0.1
        else f"What a linear probe can read of the classes grows up to {early!r} (macro-F1 {after[early]:.3f}; "
        f"always saying the largest class gives {found['largest_class']:.3f})."
    ]
    if after[last] > own + 0.03:
        out.append(
            f"A fresh linear probe on the last features beats the model's own head (macro-F1 {after[last]:.3f} against {own:.3f}): "
            "the features know more than the head says; train the head anew, with classes sampled evenly."
        )
    if "before" in found:
        gain = {layer: after[layer] - found["before"][layer]["macro_f1"] for layer in layers}
        most = max(gain, key=gain.__getitem__)
        said = f"gained most at {most!r} ({gain[most]:+.3f} macro-F1)" if gain[most] > 0.02 else "gained little at any layer"
        out.append(f"Since {stage!r} a probe {said}; on the last layer it went from {after[last] - gain[last]:.3f} to {after[last]:.3f}.")
    return out


def freezing(found: Numbers) -> list[str]:
    full = found["full"]["macro_f1"]
    enough = [k for k, v in found.items() if k != "full" and int(k) > 0 and v["macro_f1"] >= full - 0.02]
    if not enough:
        return [f"Every part has to move: with any of the blocks frozen, fine-tuning falls more than 0.02 short of macro-F1 {full:.3f}."]
    most = max(enough, key=int)
    return [
        f"With the first {most} blocks frozen, fine-tuning still reaches macro-F1 {found[most]['macro_f1']:.3f} ({full:.3f} in full): "
        "freeze them, it is cheaper."
    ]


def moved(layers: Sequence[str], rsa: Mapping[str, float], stage: str) -> list[str]:
    """Which layers fine-tuning moved, and which it could have left alone."""
    least = min(layers, key=rsa.__getitem__)
    out = [f"Fine-tuning moved {least!r} most: its geometry agrees with {stage!r} by RSA {rsa[least]:.2f}."]
    leading = next((i for i, layer in enumerate(layers) if rsa[layer] < 0.9), len(layers))
    if leading:
        out.append(
            f"The first {leading} of {len(layers)} layers hardly moved (RSA at least 0.9, up to {layers[leading - 1]!r}): "
            "they can be frozen in the next fine-tuning."
        )
    elif max(rsa.values()) < 0.9:
        out.append("No layer kept its geometry (all RSA below 0.9): this was training rather than fine-tuning.")
    return out


def alike(name: str, accuracy: float, pairs: Mapping[str, Numbers]) -> list[str]:
    """Which other model sees the samples alike, and which of the good ones would add most to an ensemble."""
    near = max(pairs, key=lambda n: pairs[n]["rsa"])
    out = [
        f"{near} sees the samples most like {name} (RSA {pairs[near]['rsa']:.2f} of the last features); "
        f"they agree on {pairs[near]['agreement']:.0%} of the predictions."
    ]
    good = [n for n in pairs if pairs[n]["accuracy"] >= accuracy - 0.05]
    if good:
        far = min(good, key=lambda n: pairs[n]["agreement"])
        said = f"Of the models about as good as {name}, {far} errs most on its own"
        out.append(f"{said} (same prediction on {pairs[far]['agreement']:.0%}): an ensemble of the two is worth a try.")
    return out


def dynamics(found: Numbers) -> list[str]:
    """When the classes came apart, and whether the space grew sparse."""
    steps, ends = found["steps"], [found["last"][s] for s in found["steps"]]
    first, now = ends[0], ends[-1]
    ends_at = f"silhouette {first['separation']:.2f} at first, {now['separation']:.2f} now"
    if now["separation"] <= first["separation"] + 0.02:
        text = f"Fine-tuning didn't pull the classes apart ({ends_at}): check the learning rate and the labels."
    elif now["separation"] < 0.05:
        text = (
            f"The classes still overlap in the last features ({ends_at}): train longer, or look at the outliers for labels that contradict."
        )
    else:
        shorter = "; a shorter training would do" if steps.index(found["apart_by"]) < len(steps) // 2 else ""
        text = f"The classes come apart in the last features by {found['apart_by']!r} ({ends_at}; nine tenths of the way by then){shorter}."
    sparse = "grew sparse" if now["components_95"] < first["components_95"] else "did not grow sparse"
    return [
        text,
        f"The feature space {sparse}: 95% of the variance lies in {now['components_95']} components now, in {first['components_95']} at "
        f"{steps[0]!r}; the first two carry {now['first_two']:.0%} ({first['first_two']:.0%}).",
    ]


def ablated(found: Numbers) -> list[str]:
    """How few components the prediction rests on, and which class the first one carries."""
    without = found["without"]
    whole = without["0"]["macro_f1"]
    gone = next((k for k, v in without.items() if v["macro_f1"] < 0.5 * whole), None)
    text = f"{found['components_95']} of {len(found['explained'])} components carry 95% of the last features' variance"
    if gone is not None:
        first, left = "one" if gone == "1" else gone, without[gone]["macro_f1"]
        text += f"; without the first {first} the head falls from macro-F1 {whole:.2f} to {left:.2f}"
    out = [f"{text}."]
    before, after = (without[k]["class_accuracy"] for k in ("0", "1"))
    hit = max(before, key=lambda n: before[n] - after[n])
    if before[hit] - after[hit] > 0.1:
        out.append(
            f"The first component carries {hit!r} above all: without it {after[hit]:.0%} of that class is right, not {before[hit]:.0%}."
        )
    if found["head"] == "reads more than the pooled features":
        out.append("This head reads more than the pooled features, so the ablation shows less than a component's whole weight.")
    return out


def hint(right: bool, probability: float, others_wrong: Sequence[bool]) -> str:
    """What a person should look for first in an outlier."""
    if not right and (probability >= 0.8 or (len(others_wrong) > 1 and all(others_wrong))):
        return DOUBT
    if not right:
        return "features of two classes"
    return "an unclear sample" if probability < 0.6 else "an extreme but right one"


def outliers(modes: Sequence[Numbers], others: int) -> list[str]:
    every = {s["id"]: s for m in modes for s in m["samples"]}
    out = []
    if doubtful := [s for s in every.values() if s["hint"] == DOUBT]:
        shown = ", ".join(f"{s['id']} (labelled {s['label']!r}, looks like {s['predicted']!r})" for s in doubtful[:3])
        out.append(f"Check the labels of {len(doubtful)} outliers that are called something else with confidence: {shown}.")
    if shared := [s for s in every.values() if others and len(s["shared_by"]) == others]:
        which = "both models" if others == 1 else f"all {others + 1} models"
        names = ", ".join(s["id"] for s in shared[:5])
        out.append(f"{len(shared)} of {len(every)} outliers are outliers of {which}, so they are peculiar themselves: {names}.")
    if not out:
        wrong = sum(s["label"] != s["predicted"] for s in every.values())
        out.append(f"{wrong} of the {len(every)} outliers are predicted wrongly; look at them for what they share.")
    return out


def counts(label: np.ndarray, names: Sequence[str]) -> dict[str, int]:
    """Samples by class name, of the classes that have any."""
    return {names[c]: int(n) for c, n in enumerate(np.bincount(label)) if n}
