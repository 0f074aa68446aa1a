"""SUFO: github.com/adelaidehsu/path_model_evaluation (pyfunctions/feature_anaysis_utils.py), functions of numpy features; no weights.

A record holds what those functions give for stored features. Which function an output comes from, its name says.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from formarium.authors import Authors, State
from formarium.lenses.scores import macro_f1, per_class_accuracy
from formarium.nn.components import Components, centre
from formarium.nn.similarity import distances, spearman

Inputs = dict[str, Tensor]


def similarity(header: dict[str, Any], inputs: Inputs, state: State) -> dict[str, Tensor]:
    """compute_RSA over layers [layers, samples, channels], and what their notebooks do with the last layer."""
    tuned, plain = _pick(inputs, "finetuned", "ft", "first"), _pick(inputs, "pretrained", "un", "second")
    tuned2, plain2 = inputs.get("finetuned2", inputs.get("ft2")), inputs.get("pretrained2", inputs.get("un2"))
    options = header["reference"]["constructor"]
    metric = str(options.get("dis_flag", options.get("dis_metric", "euc")))
    paired = tuned2 is not None and plain2 is not None
    scores = [
        spearman(
            _geometry(tuned[i], tuned2[i] if paired else None, metric),  # type: ignore[index]
            _geometry(plain[i], plain2[i] if paired else None, "euc"),  # type: ignore[index]
        )
        for i in range(int(options.get("num_layers", len(tuned))))
    ]
    return {"rsa": torch.stack(scores), **components(header, {"features": tuned[-1]}, state)}


def components(header: dict[str, Any], inputs: Inputs, state: State) -> dict[str, Tensor]:
    """center, get_projection, low_rank_approx (which drops the k leading components), rank_1_approx of [samples, channels]."""
    features = _pick(inputs, "features", "x", "X", "A", "W", "finetuned")
    features = features[-1] if features.ndim == 3 else features
    centred = centre(features.double())
    found = Components.of(centred, centred=True)
    made: dict[str, Callable[[int], Tensor]] = {
        r"(?:without_top|low_rank(?:_approx)?_?)(\d+)": found.without_leading,
        r"(?:only_pc)(\d+)": lambda k: found.only(k - 1),
        r"(?:rank_?1(?:_approx)?_)(\d+)": found.only,
    }
    out = {"centred": centred, "centered": centred, "center": centred, "projection": found.project(2), "explained": found.explained}
    out |= {"abs_projection": out["projection"].abs(), "singular_values": found.s, "cumulative": found.explained.cumsum(0)}
    for said in header["outputs"]:
        for pattern, make in made.items():
            if match := re.fullmatch(pattern, said["path"]):
                out[said["path"]] = make(int(match[1]))
    return {k: v.to(features.dtype) for k, v in out.items()}


def geometry(header: dict[str, Any], inputs: Inputs, state: State) -> dict[str, Tensor]:
    """calculate_geometry of [samples, channels]: the upper triangle of the distances (or similarities), or distances pair by pair."""
    x, *rest = inputs.values()
    options = header["reference"]["constructor"]
    other = rest[0] if rest and options.get("flag", "tri") != "tri" else None
    value = _geometry(x, other, str(options.get("dis_metric", options.get("dis_flag", "euc"))))
    return {"geometry": value, "distances": value, "out": value}


def accuracy(header: dict[str, Any], inputs: Inputs, state: State) -> dict[str, Tensor]:
    """get_acc: macro-F1, to three digits as theirs, and each class's accuracy, of logits [samples, classes]."""
    logits, labels = _pick(inputs, "logits", "x"), _pick(inputs, "labels", "true_labels", "y").long()
    predicted = logits.argmax(1)
    f1 = torch.tensor(round(macro_f1(labels.numpy(), predicted.numpy()), 3), dtype=torch.float64)
    classes = torch.from_numpy(per_class_accuracy(labels.numpy(), predicted.numpy()))
    return {"f1_macro": f1, "macro_f1": f1, "per_class_acc": classes, "per_class_accuracy": classes}


def _geometry(x: Tensor, other: Tensor | None, metric: str) -> Tensor:
    if other is not None:
        return (x.double() - other.double()).norm(dim=1)
    if metric == "euc":
        return distances(x)
    # theirs is the similarity here, not a distance, and of the fine-tuned features only: the correlation then comes out negative
    return 1 - distances(F.normalize(x.double(), dim=1), "cosine")


def _pick(inputs: Inputs, *names: str) -> Tensor:
    found = [inputs[n] for n in names if n in inputs]
    return found[0] if found else next(iter(inputs.values()))


authors = Authors(
    parts={
        "sufo_rsa*": similarity,
        "sufo_*geometry*": geometry,
        "sufo_*distance*": geometry,
        "sufo_*project*": components,
        "sufo_*rank*": components,
        "sufo_*pca*": components,
        "sufo_*svd*": components,
        "sufo_*cent*": components,
        "sufo_*sparsi*": components,
        "sufo_*acc*": accuracy,
    }
)
