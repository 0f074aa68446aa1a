"""Sample data: spoken digits, synthesised from a seed."""

from __future__ import annotations

from functools import cache

import numpy as np

from formarium.errors import UnknownName
from formarium.task import Data
from formarium.tasks.speech_recognition.data import Spoken
from formarium.tasks.speech_recognition.vocabulary import ENGLISH
from formarium.tasks.spoken import DIGITS, Synthesiser, speaker

RATE = 16000
COUNTS = {"train": 400, "val": 100}


def sample(name: str, seed: int = 0) -> Data:
    """ "digits": 400 utterances to train on and 100 held out, of one to three digits each ("three seven one"), spelt in English letters.

    The voices are espeak-ng's: seven accents times nine speakers, at 110 to 150 words a minute and any pitch, with noise 20 to 40 dB
    below the speech. 16 kHz, made in a few seconds; the same seed gives the same sound.
    """
    if name != "digits":
        raise UnknownName("sample", name, ("digits",))
    return _digits(seed)


@cache
def _digits(seed: int) -> Data:
    rng, splits = np.random.default_rng(seed), {}
    with Synthesiser(seed) as voice:
        for split, count in COUNTS.items():
            texts = [" ".join(DIGITS[d] for d in rng.integers(0, 10, rng.integers(1, 4))) for _ in range(count)]
            waves = [voice.say(t, speed=int(rng.integers(110, 150)), rate=RATE, **speaker(rng)) for t in texts]
            splits[split] = Spoken([_noisy(w, rng) for w in waves], RATE, texts, ENGLISH, [f"{split} {i}" for i in range(count)])
    args = {"vocabulary_size": len(ENGLISH), "vocabulary": ENGLISH}
    return Data("digits", "speech-recognition", {**splits}, args, ENGLISH, [], {"sample": "digits", "seed": seed})


def _noisy(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    level = np.sqrt((wave**2).mean()) * 10 ** (-rng.uniform(20, 40) / 20)
    return (wave + level * rng.standard_normal(len(wave))).astype(np.float32)
