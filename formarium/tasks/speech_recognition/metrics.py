"""The word error rate, transcripts as plain rows, and the trivial rival."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from formarium.task import Data, file_stem


def rates(said: Sequence[str], meant: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """wer: wrong, missing and surplus words over the words there are; cer: the same of characters; exact: the share of utterances that
    are right as a whole (with one value a sample, for bootstrapping; the other two are ratios of sums)."""
    from torchmetrics.functional.text import char_error_rate, word_error_rate

    exact = [float(s == m) for s, m in zip(said, meant, strict=True)]
    found = {
        "wer": float(word_error_rate([*said], [*meant])),
        "cer": float(char_error_rate([*said], [*meant])),
        "exact": sum(exact) / len(exact),
    }
    return found, {"exact": exact}


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    return rates([t for p in predictions for t in p.text], [t for b in batches for t in b["text"]])


def rows(prediction: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """id, text, seconds, log_probability, and where there is something to say of the sound, note."""
    out = []
    for i, name in enumerate(batch["id"]):
        row = {
            "id": name,
            "text": prediction.text[i],
            "seconds": round(float(batch["seconds"][i]), 3),
            "log_probability": round(float(prediction.log_probability[i]), 3),
        }
        out.append(row | ({"note": batch["notes"][i]} if batch["notes"][i] else {}))
    return out


def write(prediction: Any, batch: Mapping[str, Any], folder: Path) -> list[Path]:
    """name.txt, the transcript, and name.json, the row."""
    paths = []
    for row in rows(prediction, batch):
        stem = file_stem(row["id"])
        for suffix, content in ((".txt", row["text"] + "\n"), (".json", json.dumps(row, indent=2))):
            paths.append(folder / f"{stem}{suffix}")
            paths[-1].write_text(content, encoding="utf-8")
    return paths


def baseline(data: Data) -> tuple[str, dict[str, float]]:
    """Whatever is said, the transcript that training has most often."""
    heard = _texts(data.splits["train"])
    most = Counter(heard).most_common(1)[0][0]
    meant = _texts(data.splits["val"])
    return "the most frequent transcript", rates([most] * len(meant), meant)[0]


def _texts(dataset: Any) -> list[str]:
    return list(dataset.texts) if getattr(dataset, "texts", None) else [dataset[i]["text"] for i in range(len(dataset))]
