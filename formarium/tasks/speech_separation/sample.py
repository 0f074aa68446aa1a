"""Sample data: voices that talk at once, synthesised from a seed, so that what each says is known."""

from __future__ import annotations

from functools import cache

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.speech_separation.data import Mixed
from formarium.tasks.spoken import VOICES, WORDS, Synthesiser

RATE, SAMPLES = 8000, 8000  # one second each
UTTERANCES = {"train": 80, "val": 20}  # of each kind of voice
MIXTURES = {"train": 320, "val": 60}
KINDS = ((("m1", "m2", "m3", "m7"), (15, 40)), (("f1", "f2", "f3", "f4"), (60, 85)), (("f5",), (90, 99)))  # speakers and their pitch


def sample(name: str, seed: int = 0) -> Data:
    """ "voices": 320 mixtures of a low and a high voice to train on, 60 held out; "three-voices": a third, very high one with them.

    The voices are espeak-ng's, saying three words each, at 8 kHz for one second, 2.5 dB at most above or below one another. No utterance
    of a held-out mixture is in a training one. Made in a few seconds; the same seed gives the same sound.
    """
    speakers = {"voices": 2, "three-voices": 3}
    if name not in speakers:
        raise UnknownName("sample", name, speakers)
    return _mixtures(name, speakers[name], seed)


@cache
def _mixtures(name: str, speakers: int, seed: int) -> Data:
    rng, splits = np.random.default_rng(seed), {}
    with Synthesiser(seed) as voice:
        for split, count in UTTERANCES.items():
            said = [np.stack([_utterance(voice, kind, rng) for _ in range(count)]) for kind in KINDS[:speakers]]
            n = MIXTURES[split]
            parts = np.stack([s[rng.integers(0, count, n)] for s in said], 1)  # n speakers samples
            parts = parts * 10 ** (rng.uniform(-2.5, 2.5, (n, speakers, 1)) / 20)
            splits[split] = Mixed(parts.astype(np.float32), RATE, [f"{split} {i}" for i in range(n)])
    return Data(name, "speech-separation", {**splits}, {"speakers": speakers}, (), [], {"sample": name, "seed": seed})


def _utterance(voice: Synthesiser, kind: tuple, rng: np.random.Generator) -> np.ndarray:
    """Three words from a random point on, one second, all of the same loudness."""
    names, (low, high) = kind
    text = " ".join(rng.choice(WORDS, 3))
    spoken = f"{VOICES[rng.integers(len(VOICES))]}+{names[rng.integers(len(names))]}"
    wave = voice.say(text, spoken, speed=int(rng.integers(140, 190)), pitch=int(rng.integers(low, high)), rate=RATE)
    wave = np.pad(wave, (0, max(0, SAMPLES - len(wave))))
    start = int(rng.integers(0, len(wave) - SAMPLES + 1))
    piece = wave[start : start + SAMPLES]
    return 0.08 * piece / (np.sqrt((piece**2).mean()) + 1e-6)
