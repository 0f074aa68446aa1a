"""A synthesiser of speech for sample data: espeak-ng, driven in memory. Same text, voice and settings, same sound."""

from __future__ import annotations

import _ctypes
import ctypes
from threading import Lock
from typing import Any

import numpy as np

from formarium.errors import MissingExtra, UnknownName
from formarium.tasks.sound import resample

VOICES = ("en-us", "en", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
FEMALE, MALE = ("f1", "f2", "f3", "f4"), ("m1", "m2", "m3", "m4", "m7")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
# fmt: off
WORDS = (
    "water", "river", "mountain", "window", "garden", "silver", "yellow", "morning", "evening", "paper", "letter", "kitchen",
    "music", "number", "market", "summer", "winter", "candle", "bridge", "corner", "machine", "mirror", "orange", "pencil",
    "pocket", "ribbon", "saddle", "table", "valley", "village", "wagon", "welcome", "wonder", "honey", "open", "close", "carry",
    "follow", "listen", "answer", "remember", "travel", "borrow", "gather", "measure",
)
# fmt: on

_RATE, _VOLUME, _PITCH, _RANGE = 1, 2, 3, 4  # espeak's numbers for what can be set
_RETRIEVAL, _UTF8 = 1, 1
_lock = Lock()


class Synthesiser:
    """The library, freshly loaded: what it says follows from the calls so far and the seed alone.

    Its breath and flutter go on from one utterance to the next, and starting it anew doesn't reset them; unloading does.
    Use it as a context: `with Synthesiser() as voice: voice.say("one two")`. One at a time in a process.
    Raises MissingExtra where the package espeakng-loader isn't installed.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self.heard: list[np.ndarray] = []

    def __enter__(self) -> Synthesiser:
        try:
            import espeakng_loader
        except ImportError:
            raise MissingExtra("espeakng-loader", "audio") from None
        _lock.acquire()
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        self.made = self.lib.espeak_Initialize(_RETRIEVAL, 0, espeakng_loader.get_data_path().encode(), 0)
        kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
        self.callback = kind(self._hear)  # kept: the library calls it later
        self.lib.espeak_SetSynthCallback(self.callback)
        if hasattr(self.lib, "espeak_ng_SetRandSeed"):
            self.lib.espeak_ng_SetRandSeed(ctypes.c_long(self.seed + 1))
        return self

    def __exit__(self, *error: object) -> None:
        self.lib.espeak_Terminate()
        close = getattr(_ctypes, "dlclose", None) or getattr(_ctypes, "FreeLibrary", None)
        if close is not None:
            close(self.lib._handle)
        del self.lib
        _lock.release()

    def _hear(self, wave: ctypes._Pointer[ctypes.c_short], count: int, events: int) -> int:
        if wave and count > 0:
            self.heard.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    def say(self, text: str, voice: str = "en-us", speed: int = 150, pitch: int = 50, variation: int = 50, rate: int = 16000) -> np.ndarray:
        """Text as speech, float32 [samples] in [-1, 1] at `rate` Hz, silence at its ends cut off.

        voice: one of espeak's, with or without a speaker ("en-us", "en-us+f3"). speed: words a minute. pitch, variation: 0 to 99.
        """
        self.heard = []
        if self.lib.espeak_SetVoiceByName(voice.encode()):
            raise UnknownName("voice", voice, (*VOICES, *FEMALE, *MALE))
        for what, value in ((_RATE, speed), (_PITCH, pitch), (_RANGE, variation), (_VOLUME, 100)):
            self.lib.espeak_SetParameter(what, value, 0)
        encoded = text.encode()
        self.lib.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
        self.lib.espeak_Synchronize()
        wave = np.concatenate([np.zeros(0, np.int16), *self.heard]).astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(wave) > 0.01 * (np.abs(wave).max() if wave.size else 1))
        if loud.size:
            margin = self.made // 50  # 20 ms
            wave = wave[max(0, loud[0] - margin) : loud[-1] + margin]
        return resample(wave, self.made, rate)


def speaker(rng: np.random.Generator, voices: tuple[str, ...] = VOICES, kinds: tuple[str, ...] = (*FEMALE, *MALE)) -> dict[str, Any]:
    """A speaker by chance: arguments of `Synthesiser.say` for voice, pitch and variation."""
    voice = f"{voices[rng.integers(len(voices))]}+{kinds[rng.integers(len(kinds))]}"
    return {"voice": voice, "pitch": int(rng.integers(25, 75)), "variation": int(rng.integers(30, 70))}
