"""Sound files as people have them: any rate, mono or stereo, and what is wrong with some of them. Shared by the tasks on speech."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from formarium.errors import BadInput, MissingExtra

FORMATS = (".wav", ".flac", ".ogg", ".mp3", ".aiff", ".aif")
SILENT = 1e-4  # of full scale (-80 dB): a file whose loudest sample is below it holds no sound


@dataclass(frozen=True)
class Clip:
    """audio: float32 [samples] in [-1, 1], one channel. rate: samples a second. notes: what was done to it, in words."""

    audio: np.ndarray
    rate: int
    notes: tuple[str, ...] = ()


def _soundfile() -> Any:
    try:
        import soundfile
    except ImportError:
        raise MissingExtra("soundfile", "audio") from None
    return soundfile


def load(path: str | Path) -> Clip:
    """A sound file as one channel at its own rate. BadInput for a file that can't be decoded."""
    sf = _soundfile()
    try:
        audio, rate = sf.read(str(path), dtype="float32", always_2d=True)
    except Exception as e:
        said = str(e).split("\n")[0]
        raise BadInput(str(path), expected=f"a sound file ({', '.join(FORMATS[:3])}, ...)", got=said or type(e).__name__) from None
    return one_channel(audio, int(rate), str(path))


def save(path: str | Path, audio: np.ndarray, rate: int) -> Path:
    """Write float [samples] as 16-bit PCM; what is louder than full scale is turned down as a whole, not clipped."""
    peak = float(np.abs(audio).max()) if audio.size else 0.0
    _soundfile().write(str(path), audio / peak * 0.99 if peak > 1 else audio, rate, subtype="PCM_16")
    return Path(path)


def one_channel(audio: np.ndarray, rate: int, name: str) -> Clip:
    """float [samples] or [samples, channels] as a Clip, channels averaged. BadInput where the values can't be sound."""
    if audio.ndim not in (1, 2) or (audio.ndim == 2 and audio.shape[1] > 32):
        raise BadInput(name, expected="sound as [samples] or [samples, channels]", got=f"{[*audio.shape]}")
    if not np.isfinite(audio).all():
        raise BadInput(name, expected="finite samples", got=f"{int((~np.isfinite(audio)).sum())} NaN or infinite")
    channels = 1 if audio.ndim == 1 else audio.shape[1]
    mono = audio if audio.ndim == 1 else audio.mean(1)
    notes = (f"{channels} channels averaged to one",) if channels > 1 else ()
    return Clip(np.ascontiguousarray(mono, dtype=np.float32), rate, notes)


def from_array(value: Any, index: int, rate: int | None = None) -> Clip:
    """What a person has in memory: an array or tensor [samples] or [samples, channels], float in [-1, 1] or int16."""
    name = f"input {index}"
    x = value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)
    if x.dtype == np.int16:
        x = x.astype(np.float32) / 32768
    if not np.issubdtype(x.dtype, np.floating):
        raise BadInput(name, expected="float samples in [-1, 1], or int16", got=str(x.dtype))
    if x.size and np.isfinite(x).all() and np.abs(x).max() > 8:
        raise BadInput(name, expected="float samples in [-1, 1]", got=f"values up to {np.abs(x).max():.3g}", fix="divide by full scale")
    return one_channel(x.astype(np.float32), rate or 0, name)


def prepared(clip: Clip, rate: int, name: str, shortest: float = 0.0) -> Clip:
    """A clip as a model takes it: at its rate, long enough, not silent. BadInput, one line, where it can't be.

    shortest: seconds. A clip of unknown rate (0) is taken to have the model's.
    """
    if clip.audio.size == 0:
        raise BadInput(name, expected="sound", got="no samples")
    if (problem := wrong(clip, shortest, rate)) is not None:
        raise BadInput(name, expected=problem[0], got=problem[1])
    if clip.rate in (0, rate):
        return Clip(clip.audio, rate, clip.notes)
    return Clip(resample(clip.audio, clip.rate, rate), rate, (*clip.notes, f"resampled from {clip.rate} to {rate} Hz"))


def wrong(clip: Clip, shortest: float, rate: int = 0) -> tuple[str, str] | None:
    """(what is expected, what came) where a clip holds nothing to work on, else None."""
    seconds = len(clip.audio) / (clip.rate or rate or 1)
    if seconds < shortest:
        return f"at least {shortest:g} s", f"{seconds:.3g} s"
    if not len(clip.audio) or np.abs(clip.audio).max() < SILENT:
        return "sound", "silence"
    return None


def resample(audio: np.ndarray, old: int, new: int) -> np.ndarray:
    """[..., samples] at another rate, by a polyphase filter (Kaiser window)."""
    from scipy.signal import resample_poly

    if old == new:
        return audio
    common = math.gcd(old, new)
    return resample_poly(audio, new // common, old // common, axis=-1).astype(np.float32)


# many files ---------------------------------------------------------------------------------------------------------


def files_of(paths: Sequence[str | Path]) -> list[str]:
    """Sound files that paths, folders and globs name. BadInput for what isn't there."""
    found: list[str] = []
    for entry in paths:
        p = Path(entry)
        if p.is_dir():
            inside = [str(f) for f in sorted(p.rglob("*")) if f.suffix.lower() in FORMATS]
            if not inside:
                raise BadInput(str(entry), expected=f"a folder with sound files ({', '.join(FORMATS[:3])}, ...)", got="none in it")
            found += inside
        elif p.is_file():
            found.append(str(p))
        elif hits := sorted(glob.glob(str(entry), recursive=True)):
            found += [h for h in hits if Path(h).is_file()]
        else:
            raise BadInput(str(entry), expected="a sound file, a folder or a glob", got="no such path")
    if not found:
        raise BadInput("sound files", expected="at least one", got="none")
    return found


def examine(paths: Sequence[str], shortest: float) -> dict[str, tuple[int, float, str]]:
    """path -> (rate, seconds, what is wrong with it or ""), decoding every file whole."""

    def one(path: str) -> tuple[int, float, str]:
        try:
            clip = load(path)
        except BadInput as e:
            return 0, 0.0, f"can't be decoded ({e.got})"
        problem = wrong(clip, shortest)
        seconds = len(clip.audio) / clip.rate
        return clip.rate, seconds, "" if problem is None else "silent" if problem[1] == "silence" else f"too short ({problem[1]})"

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(one, paths), strict=True))


def usable(paths: Sequence[str], shortest: float, strict: bool, name: str) -> tuple[set[str], list[str]]:
    """The files that can be used, and notes on the rest and on their rates. BadInput where none is left, or (strict) where one is bad."""
    seen = examine(sorted({*paths}), shortest)
    bad = {p: why for p, (_, _, why) in seen.items() if why}
    if bad and (strict or len(bad) == len(seen)):
        raise BadInput(f"{len(bad)} of {name}'s {len(seen)} sound files", expected="sound that decodes", got=few(_named(bad)))
    rates = sorted({rate for rate, _, why in seen.values() if not why})
    notes = [f"{len(bad)} sound files left out: {few(_named(bad))}"] if bad else []
    if len(rates) > 1:
        notes.append(f"sound at different rates ({few([f'{r} Hz' for r in rates])}); all is resampled to the model's")
    return {*seen} - {*bad}, notes


def _named(bad: dict[str, str]) -> list[str]:
    return [f"{os.path.basename(p)} {why}" for p, why in bad.items()]


def few(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def split(count: int, holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices to train on and to hold out, at least one of each. BadInput where there are fewer than two."""
    if count < 2:
        raise BadInput("recordings", expected="at least two, one to train on and one to test on", got=str(count))
    held = {*np.random.default_rng(seed).permutation(count)[: min(count - 1, max(1, round(holdout * count)))].tolist()}
    return [i for i in range(count) if i not in held], sorted(held)


SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
