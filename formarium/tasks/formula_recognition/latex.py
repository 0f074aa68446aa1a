"""LaTeX formulas as tokens: the CROHME vocabulary, reading what people write into it, and checks of structure.

A normal form has every argument in braces, `x ^ { 2 }`, and no token that leaves no ink but structure (`\\left`, `\\mathrm`, spaces).
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from formarium.errors import BadInput

PAD, SOS, EOS = 0, 1, 2
SPECIAL = ("<pad>", "<sos>", "<eos>")
_CROHME = (
    r"! ( ) + , - . / 0 1 2 3 4 5 6 7 8 9 < = > A B C E F G H I L M N P R S T V X Y [ \Delta \Pi \alpha \beta \cdot \cdots "
    r"\cos \div \exists \forall \frac \gamma \geq \in \infty \int \lambda \ldots \leq \lim \limits \log \mu \neq \phi \pi \pm "
    r"\prime \rightarrow \sigma \sin \sqrt \sum \tan \theta \times \{ \} ] ^ _ a b c d e f g h i j k l m n o p q r s t u v w "
    r"x y z { | }"
)
CROHME = tuple(_CROHME.split())
STRUCTURE = ("^", "_", "{")  # tokens without ink of their own

_TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|\S")
_SAME = {
    **{r"\lt": "<", r"\gt": ">", r"\le": r"\leq", r"\ge": r"\geq", r"\ne": r"\neq", r"\to": r"\rightarrow", r"\dots": r"\ldots"},
    **{r"\cdotp": r"\cdot", r"\vert": "|", r"\mid": "|", r"\lbrack": "[", r"\rbrack": "]", r"\lbrace": r"\{", r"\rbrace": r"\}"},
}
_NOTHING = {
    *(r"\left", r"\right", r"\big", r"\Big", r"\bigg", r"\Bigg", r"\displaystyle", r"\textstyle", r"\quad", r"\qquad", "$"),
    *(r"\,", r"\;", r"\:", r"\!", r"\ ", r"\mathrm", r"\mathit", r"\mathbf", r"\mathcal", r"\rm", r"\mbox", r"\text", r"\hbox"),
}
_ARGUMENTS = {r"\frac": 2, r"\dfrac": 2, r"\tfrac": 2, r"\sqrt": 1, "^": 1, "_": 1}


def tokenize(text: str, what: str = "formula") -> list[str]:
    """A formula as people write it (with or without $, spaces, optional braces) as tokens in normal form.

    Raises BadInput for braces that don't balance, a command without its argument, or nothing at all.
    """
    raw = [_SAME.get(t, t) for t in _TOKEN.findall(text) if t not in _NOTHING]
    tokens = [t for word in raw for t in (["^", "{", r"\prime", "}"] if word == "'" else [word])]
    if not tokens:
        raise BadInput(what, expected="a LaTeX formula", got="nothing")
    check_braces(tokens, what)
    out, at = _sequence(tokens, 0, what, len(tokens))
    assert at == len(tokens)
    return out


def _sequence(tokens: Sequence[str], at: int, what: str, end: int) -> tuple[list[str], int]:
    out: list[str] = []
    while at < end and tokens[at] != "}":
        piece, at = _atom(tokens, at, what, end)
        out += piece
    return out, at


def _atom(tokens: Sequence[str], at: int, what: str, end: int) -> tuple[list[str], int]:
    """The tokens of one symbol with its arguments, or of one group, and where the next begins."""
    token = tokens[at]
    if token == "{":  # braces that only group leave no trace
        inside, after = _sequence(tokens, at + 1, what, end)
        return inside, after + 1
    out, at = [r"\frac" if token in (r"\dfrac", r"\tfrac") else token], at + 1
    if token == r"\sqrt" and at < end and tokens[at] == "[":
        close = at + 1 + _closing(tokens[at + 1 :], "[", "]", what)
        index, _ = _sequence(tokens, at + 1, what, close)
        out, at = [*out, "[", *index, "]"], close + 1
    for _ in range(_ARGUMENTS.get(token, 0)):
        if at >= end or tokens[at] == "}":
            raise BadInput(what, expected=f"an argument after {token}", got="none", fix="write it in braces")
        piece, at = _atom(tokens, at, what, end)
        out += ["{", *piece, "}"]
    return out, at


def _closing(tokens: Sequence[str], opening: str, closing: str, what: str) -> int:
    depth = 1
    for i, token in enumerate(tokens):
        depth += (token == opening) - (token == closing)
        if not depth:
            return i
    raise BadInput(what, expected=f"{closing} for every {opening}", got="one that never closes")


def check_braces(tokens: Sequence[str], what: str = "formula") -> None:
    """Raise BadInput unless { and } balance."""
    depth = 0
    for token in tokens:
        depth += (token == "{") - (token == "}")
        if depth < 0:
            raise BadInput(what, expected="balanced braces", got="a } that nothing opened")
    if depth:
        raise BadInput(what, expected="balanced braces", got=f"{depth} {{ never closed")


def check_structure(tokens: Sequence[str], what: str = "formula") -> None:
    """Raise BadInput unless braces balance and every ^, _, \\frac and \\sqrt has its arguments in braces."""
    check_braces(tokens, what)
    for i, token in enumerate(tokens):
        if token not in _ARGUMENTS:
            continue
        at = i + 1
        if token == r"\sqrt" and tokens[at : at + 1] == ["["]:
            at += 2 + _closing(tokens[at + 1 :], "[", "]", what)
        for _ in range(_ARGUMENTS[token]):
            if tokens[at : at + 1] != ["{"]:
                raise BadInput(what, expected=f"{{ after {token}", got=" ".join(tokens[at : at + 1]) or "the end")
            at += 2 + _closing(tokens[at + 1 :], "{", "}", what)


def is_well_formed(tokens: Sequence[str]) -> bool:
    """Whether the tokens are a formula that LaTeX can set."""
    try:
        check_structure([*tokens])
    except BadInput:
        return False
    return bool(tokens)


def to_ids(tokens: Sequence[str], vocabulary: Sequence[str], what: str = "formula") -> list[int]:
    """Token ids: the vocabulary's place + 3. Raises BadInput naming the tokens that aren't in it."""
    index = {t: i + len(SPECIAL) for i, t in enumerate(vocabulary)}
    unknown = [*dict.fromkeys(t for t in tokens if t not in index)]
    if unknown:
        shown = ", ".join(unknown[:6]) + (f" and {len(unknown) - 6} more" if len(unknown) > 6 else "")
        raise BadInput(what, expected=f"tokens of the vocabulary of {len(vocabulary)}", got=shown, fix='or read it with vocabulary="data"')
    return [index[t] for t in tokens]


def to_tokens(ids: Sequence[int], vocabulary: Sequence[str]) -> list[str]:
    """The words of ids, special ones as <pad>, <sos>, <eos>."""
    words = (*SPECIAL, *vocabulary)
    return [words[int(i)] for i in ids]


def skeleton(tokens: Sequence[str]) -> list[str]:
    """The formula's structure with every symbol as one and the same: what an expression's layout is, whatever it says."""
    kept = {*STRUCTURE, "}", *_ARGUMENTS, "[", "]"}
    return [t if t in kept else "x" for t in tokens]
