"""Pictures of separated voices: the mixture's spectrum, and under it each speaker's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from formarium.nn.audio import decibels, power_spectrogram
from formarium.nn.separation import pit_si_sdr

WIDE, HIGH, CAPTION, PAD = 220, 70, 18, 10
INK, FAINT = (40, 44, 52), (120, 126, 134)


def draw(prediction: Any, batch: Mapping[str, Any], most: int = 8) -> Image.Image:
    """Up to 8 mixtures, one a column: its spectrum (low tones at the bottom), each voice's, and the SI-SDR where the sources are known."""
    count, speakers = min(most, len(batch["id"])), prediction.sources.shape[1]
    columns = min(4, count)
    lines, tall = -(-count // columns), (1 + speakers) * (HIGH + 4) + CAPTION + PAD
    sheet = Image.new("RGB", (columns * (WIDE + PAD) + PAD, lines * tall + PAD), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    ratio = pit_si_sdr(prediction.sources.float().cpu(), batch["sources"].float().cpu())[0].tolist() if "sources" in batch else None
    for i in range(count):
        x, y = PAD + (i % columns) * (WIDE + PAD), PAD + (i // columns) * tall
        mixture = batch["mixture"][i].float().cpu()
        top = mixture.abs().max().clamp_min(1e-6)
        for j, wave in enumerate([mixture, *prediction.sources[i].float().cpu()]):
            sheet.paste(_spectrum(wave / top), (x, y + j * (HIGH + 4)))
            pen.text((x + 4, y + j * (HIGH + 4) + 2), "mixture" if j == 0 else f"speaker {j}", "white", font)
        text = str(batch["id"][i])[-28:] + (f"  {ratio[i]:.1f} dB" if ratio else "")
        pen.text((x, y + (1 + speakers) * (HIGH + 4)), text, INK, font)
    return sheet


def _spectrum(wave: torch.Tensor) -> Image.Image:
    if wave.numel() <= 256:
        wave = torch.nn.functional.pad(wave, (0, 257 - wave.numel()))
    db = decibels(power_spectrogram(wave, 256, 64, 256), range_db=None)
    values = ((db + 30) / 70).clamp(0, 1).numpy().T[::-1]
    colours = np.stack([values**0.7 * 255, values**1.6 * 220, 70 + values * 60], -1)
    return Image.fromarray(colours.astype(np.uint8)).resize((WIDE, HIGH), Image.Resampling.BILINEAR)
