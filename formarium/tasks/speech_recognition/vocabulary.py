"""Text and tokens. A vocabulary is a tuple of symbols, the first of them CTC's blank; its symbols say how text is cut.

characters   single letters and a space: "c", "a", "t", " "
words        whole words, and no space among them
pieces       SentencePiece units, where "▁" stands for the space before a word: "▁the", "re", "s"
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from formarium.errors import BadInput

BLANK, WORD_START = "<blank>", "▁"
ENGLISH = (BLANK, " ", "'", *"abcdefghijklmnopqrstuvwxyz")
_DROPPED = re.compile(r"[.,?!;:\"\u201c\u201d()\[\]\u2026\u2014\u2013-]+")


def normalised(text: str) -> str:
    """Lower case, without punctuation (apostrophes stay), one space between words."""
    return " ".join(_DROPPED.sub(" ", text.lower().replace("\u2019", "'")).split())


def kind(symbols: Sequence[str]) -> str:
    """ "characters", "words" or "pieces"."""
    if any(WORD_START in s for s in symbols):
        return "pieces"
    return "words" if " " not in symbols and any(len(s) > 1 for s in symbols[1:]) else "characters"


def encode(text: str, symbols: Sequence[str], source: str = "text") -> list[int]:
    """A transcript's tokens. BadInput, naming them, where it has characters or words that the vocabulary lacks."""
    index = {s: i for i, s in enumerate(symbols) if i}
    how = kind(symbols)
    if how == "pieces":
        return _pieces(WORD_START + text.replace(" ", WORD_START), index, source)
    parts = text.split(" ") if how == "words" else [*text]
    unknown = sorted({p for p in parts if p not in index})
    if unknown:
        raise BadInput(
            source,
            expected=f"{how} of the vocabulary ({len(symbols) - 1} of them)",
            got=" ".join(map(repr, unknown[:8])),
            fix='change the text, or read it with vocabulary="auto"',
        )
    return [index[p] for p in parts]


def _pieces(text: str, index: dict[str, int], source: str) -> list[int]:
    """The longest piece that fits, from left to right."""
    longest, out, at = max(map(len, index)), [], 0
    while at < len(text):
        size = next((n for n in range(min(longest, len(text) - at), 0, -1) if text[at : at + n] in index), 0)
        if not size:
            raise BadInput(source, expected=f"text of the vocabulary's {len(index)} pieces", got=repr(text[at]))
        out.append(index[text[at : at + size]])
        at += size
    return out


def decode(tokens: Iterable[int], symbols: Sequence[str]) -> str:
    """The text of tokens (without blanks); one that the vocabulary has no symbol for is written <number>."""
    parts = [symbols[t] if t < len(symbols) else f"<{t}>" for t in tokens]
    text = (" " if kind(symbols) == "words" else "").join(parts)
    return " ".join(text.replace(WORD_START, " ").split())


def symbols_of(size: int, given: Sequence[str] = ()) -> tuple[str, ...]:
    """The symbols of a model that has so many: those given, English letters where they number as many, else numbers."""
    if given:
        return tuple(given)
    return ENGLISH if size == len(ENGLISH) else (BLANK, *(f"<{i}>" for i in range(1, size)))


def chosen(vocabulary: str | Sequence[str], texts: Sequence[str]) -> tuple[str, ...]:
    """The symbols that an option of `read` asks for: "english", "auto" (the characters there are), "words" (the words there are),
    or the symbols themselves, with or without the blank."""
    if not isinstance(vocabulary, str):
        given = tuple(map(str, vocabulary))
        return given if given[:1] == (BLANK,) else (BLANK, *given)
    if vocabulary == "english":
        return ENGLISH
    if vocabulary == "auto":
        return (BLANK, *sorted({" ", *"".join(texts)}))
    if vocabulary == "words":
        return (BLANK, *sorted({w for t in texts for w in t.split()}))
    raise BadInput("vocabulary", expected="english, auto, words or a list of symbols", got=repr(vocabulary))
