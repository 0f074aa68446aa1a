"""How much clearer the separated voices are than the mixture, files of them, and the trivial rival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from formarium.nn.separation import best_order, pit_si_sdr
from formarium.task import Data, file_stem
from formarium.tasks import sound


def ratios(estimates: Tensor, references: Tensor) -> Tensor:
    """Mean SI-SDR over the speakers of each mixture in dB, in the best order, float [batch]; both inputs [batch, speakers, samples]."""
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as ratio

    n = references.shape[1]
    pairs = ratio(
        estimates[:, :, None].expand(-1, -1, n, -1).contiguous(), references[:, None].expand(-1, n, -1, -1).contiguous(), zero_mean=True
    )
    return best_order(pairs)[0]


def score(predictions: Sequence[Any], batches: Sequence[Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """si_sdr_improvement: SI-SDR of the voices minus that of the mixture taken for each of them, in dB; si_sdr: the first alone."""
    after, before = [], []
    for p, b in zip(predictions, batches, strict=True):
        sources, mixture = b["sources"].float().cpu(), b["mixture"].float().cpu()
        after.append(ratios(p.sources.float().cpu(), sources))
        before.append(ratios(mixture[:, None].expand_as(sources), sources))
    found = {"si_sdr_improvement": torch.cat(after) - torch.cat(before), "si_sdr": torch.cat(after)}
    return {k: v.mean().item() for k, v in found.items()}, {k: v.numpy() for k, v in found.items()}


def rows(prediction: Any, batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """id, seconds, each speaker's loudness in dB of full scale; si_sdr where the sources are known, note where something was done."""
    out = []
    known = pit_si_sdr(prediction.sources.float().cpu(), batch["sources"].float().cpu())[0].tolist() if "sources" in batch else None
    for i, name in enumerate(batch["id"]):
        voices = prediction.sources[i].float()
        level = 10 * voices.square().mean(-1).clamp_min(1e-12).log10()
        row = {
            "id": name,
            "seconds": round(voices.shape[-1] / int(batch["rate"][i]), 3),
            "levels_db": [round(x, 1) for x in level.tolist()],
        }
        if known is not None:
            row["si_sdr"] = round(known[i], 2)
        out.append(row | ({"note": batch["notes"][i]} if batch["notes"][i] else {}))
    return out


def write(prediction: Any, batch: Mapping[str, Any], folder: Path) -> list[Path]:
    paths = []
    for i, name in enumerate(batch["id"]):
        for j, voice in enumerate(prediction.sources[i].float().cpu().numpy()):
            paths.append(sound.save(folder / f"{file_stem(name)}_speaker{j + 1}.wav", voice, int(batch["rate"][i])))
    return paths


def baseline(data: Data) -> tuple[str, dict[str, float]]:
    """The mixture itself, for every speaker."""
    held, found = data.splits["val"], []
    for i in range(len(held)):
        s = held[i]
        sources = torch.from_numpy(s["sources"]).float()[None]
        found.append(ratios(torch.from_numpy(s["mixture"]).float()[None, None].expand_as(sources), sources))
    return "the mixture itself", {"si_sdr_improvement": 0.0, "si_sdr": torch.cat(found).mean().item()}
