"""Equations as prefix tokens: trees, numbers as sign, mantissa and exponent, validity, evaluation, skeletons and their noise.

A system of equations du_i/dt = f_i(u) is its right-hand sides in prefix order with `|` between them, e.g. `mul + N200 E-2 u_0 | neg u_1`.
An equation that has u_t or u_tt in it is its whole left-hand side, with 0 on the right. Fluids in two dimensions (PROSE-FD) have words of
their own: names of fields and operators on them, and behind `--` what holds at the boundary, e.g. `add dt c mul U D c -- c neumann`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from formarium.errors import BadInput

BOS, EOS, PAD, PLACEHOLDER = range(4)
SPECIAL = ("<BOS>", "<EOS>", "<PAD>", "<PLACEHOLDER>")
BETWEEN, BOUNDARY = "|", "--"
LARGEST_INT, LARGEST_EXPONENT = 10, 10
OPERATORS: dict[str, tuple[int, Callable[..., np.ndarray]]] = {
    "add": (2, np.add),
    "sub": (2, np.subtract),
    "mul": (2, np.multiply),
    "div": (2, np.divide),
    "pow": (2, np.power),
    "neg": (1, np.negative),
    "inv": (1, np.reciprocal),
    "sin": (1, np.sin),
    "cos": (1, np.cos),
    "exp": (1, np.exp),
    "pow2": (1, np.square),
    "pow3": (1, lambda x: x**3),
}
FIELD_OPERATORS = ("dt", "dx", "dy", "dz", "D", "D2", "diverg")  # derivatives by time and place, gradient, Laplacian, divergence
FIELDS = ("u", "U", "v", "V", "h", "x", "X", "b", "rho", "p", "eta", "f", "F", "c", "zeta", "sigma", "w", "g")
CONDITIONS = ("periodic", "dirichlet", "neumann", "dirichlet_irreg")
ARGUMENTS = {**{name: count for name, (count, _) in OPERATORS.items()}, **dict.fromkeys(FIELD_OPERATORS, 1)}
_MANTISSA, _EXPONENT, _VARIABLE = re.compile(r"N\d+$"), re.compile(r"E-?\d+$"), re.compile(r"(u_\d+|x_\d+|t|u_t{1,2}|u_x{1,4})$")


@dataclass(frozen=True)
class Node:
    """An operator over its children, or a leaf: a variable's name, a number, or <PLACEHOLDER> for a number nobody knows."""

    value: str | float
    children: tuple[Node, ...] = ()

    def infix(self) -> str:
        a = [c.infix() for c in self.children]
        signs = {"add": "+", "sub": "-", "mul": "*", "div": "/", "pow": "**"}
        if self.value in signs:
            return f"({a[0]} {signs[str(self.value)]} {a[1]})"
        wraps = {"neg": f"-({''.join(a)})", "inv": f"1/({''.join(a)})", "pow2": f"({''.join(a)})**2", "pow3": f"({''.join(a)})**3"}
        if self.value in wraps:
            return wraps[str(self.value)]
        if a:
            return f"{self.value}({a[0]})"
        return f"{self.value:g}" if isinstance(self.value, (int, float)) else "c" if self.value == SPECIAL[PLACEHOLDER] else str(self.value)

    def evaluate(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """The tree's value where variables have these values; KeyError for a variable that has none, and for operators on fields."""
        if self.children:
            with np.errstate(all="ignore"):
                return OPERATORS[str(self.value)][1](*(c.evaluate(values) for c in self.children))
        if isinstance(self.value, (int, float)):
            return np.full_like(next(iter(values.values())), self.value, dtype=np.float64)
        return values[self.value]


def vocabulary(dims: int = 3, precision: int = 2, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """All words, special ones first: operators, integers to 10, `dims` state variables, and numbers with precision + 1 digits."""
    integers = [str(i) for i in range(-LARGEST_INT, LARGEST_INT + 1)]
    numbers = ["+", "-", *(f"N{i:0{precision + 1}d}" for i in range(10 ** (precision + 1)))]
    exponents = [f"E{i}" for i in range(-LARGEST_EXPONENT, LARGEST_EXPONENT + 1)]
    words = [*SPECIAL, BETWEEN, *OPERATORS, *integers, *(f"u_{i}" for i in range(dims)), *extra, *numbers, *exponents]
    return tuple(dict.fromkeys(words))


def fluid_vocabulary(dims: int = 5, precision: int = 2, largest: int = 20) -> tuple[str, ...]:
    """The words of PROSE-FD in the order of its released weights, which is alphabetic, special words twice (the later ones are used)."""
    integers = [str(i) for i in range(-largest, largest + 1)]
    others = ["CONSTANT", "rand", BETWEEN, BOUNDARY, "INT+", "INT-", "FLOAT+", "FLOAT-"]
    named = [f"{letter}_{i}" for letter in "uv" for i in range(dims)]
    plain = {*OPERATORS, *FIELD_OPERATORS, *FIELDS, *CONDITIONS, *integers, *others, *named} - {"exp"}
    numbers = ["+", "-", *(f"N{i:0{precision + 1}d}" for i in range(10 ** (precision + 1)))]
    numbers += [f"E{i}" for i in range(-LARGEST_EXPONENT, LARGEST_EXPONENT + 1)]
    return (*SPECIAL, *sorted(plain), *SPECIAL, *sorted(numbers))


def digits(words: Sequence[str]) -> int:
    """How many digits a vocabulary's mantissas have (0 where it has none)."""
    return next((len(w) - 1 for w in words if _MANTISSA.match(w)), 0)


def encode_number(value: float, digits: int = 3) -> list[str]:
    """Sign, mantissa of `digits` digits, exponent: 2.5 is + N250 E-2. Integers to 10 are words of their own."""
    if float(value).is_integer() and abs(value) <= LARGEST_INT:
        return [str(int(value))]
    mantissa, exponent = f"{abs(value):.{digits - 1}e}".split("e")
    power = int(exponent) - (digits - 1)
    if not -LARGEST_EXPONENT <= power <= LARGEST_EXPONENT:
        if power > 0:
            raise BadInput("number", expected=f"below 1e{LARGEST_EXPONENT}", got=f"{value:g}")
        return ["0"]
    return ["+" if value >= 0 else "-", "N" + mantissa.replace(".", ""), f"E{power}"]


def rounded(value: float, digits: int = 3) -> float:
    """The number that `encode_number` can say."""
    return _parse(encode_number(value, digits), 0, "number")[0].value  # type: ignore[return-value]


def encode(system: Sequence[Node], digits: int = 3) -> list[str]:
    """A system's words, components divided by |."""
    words: list[str] = []
    for i, tree in enumerate(system):
        words += [BETWEEN] * bool(i) + _prefix(tree, digits)
    return words


def _prefix(node: Node, digits: int) -> list[str]:
    if isinstance(node.value, (int, float)):
        return encode_number(node.value, digits)
    return [node.value, *(w for c in node.children for w in _prefix(c, digits))]


def parse(words: Sequence[str], what: str = "equation") -> list[Node]:
    """The trees of a system's words. Raises BadInput: an unknown symbol, an operator without its arguments, words that belong nowhere."""
    system, at = [], 0
    while True:
        tree, at = _parse(words, at, what)
        system.append(tree)
        if at == len(words):
            return system
        if words[at] != BETWEEN:
            raise BadInput(what, expected=f"{BETWEEN} or the end after a whole tree", got=str(words[at]))
        at += 1


def _parse(words: Sequence[str], at: int, what: str) -> tuple[Node, int]:
    if at >= len(words):
        raise BadInput(what, expected="an operator's argument", got="the end")
    word = words[at]
    if word in ARGUMENTS:
        children, at = [], at + 1
        for _ in range(ARGUMENTS[word]):
            child, at = _parse(words, at, what)
            children.append(child)
        return Node(word, tuple(children)), at
    if word in ("+", "-"):
        number = words[at + 1 : at + 3]
        if len(number) < 2 or not _MANTISSA.match(number[0]) or not _EXPONENT.match(number[1]):
            raise BadInput(what, expected=f"a mantissa and an exponent after {word}", got=" ".join(number) or "the end")
        return Node(float(f"{word}{int(number[0][1:])}e{int(number[1][1:])}")), at + 3
    if _VARIABLE.match(word) or word in FIELDS or word == SPECIAL[PLACEHOLDER]:
        return Node(word), at + 1
    try:
        value = float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadInput(what, expected=f"operators ({', '.join(OPERATORS)}), variables u_0 ..., numbers", got=f"the unknown symbol {word!r}")
    return Node(value), at + 1


def read_words(text: str | Sequence[str], digits: int, what: str = "equation") -> list[str]:
    """Words of an equation as people write it in prefix order (a string with spaces or commas, or a list); its numbers encoded."""
    words = [w for w in re.split(r"[\s,]+", text) if w] if isinstance(text, str) else [str(w) for w in text]
    words, held = divided(words)
    for variable, condition in zip(held[1::2], held[2::2], strict=False):
        if variable not in FIELDS or condition not in CONDITIONS:
            raise BadInput(what, expected=f"fields and {', '.join(CONDITIONS)} behind {BOUNDARY}", got=f"{variable} {condition}")
    if held and len(held) % 2 == 0:
        raise BadInput(what, expected=f"a condition for every field behind {BOUNDARY}", got=" ".join(held[1:]) or "nothing")
    return encode(parse(words, what), digits) + held


def divided(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The equations' words, and what holds at the boundary (from -- on; empty where nothing is said)."""
    at = [*words].index(BOUNDARY) if BOUNDARY in words else len(words)
    return [*words[:at]], [*words[at:]]


def skeleton(words: Sequence[str]) -> list[str]:
    """The same with <PLACEHOLDER> for every number."""

    def bare(node: Node) -> Node:
        if isinstance(node.value, (int, float)):
            return Node(SPECIAL[PLACEHOLDER])
        return Node(node.value, tuple(bare(c) for c in node.children))

    words, held = divided(words)
    return encode([bare(t) for t in parse(words)]) + held


def is_valid(words: Sequence[str], dims: int | None = None) -> bool:
    """Whether the words are whole trees, as many as `dims`, with no number left open and variables of these dimensions only."""
    try:
        system = parse(words)
    except BadInput:
        return False
    known = {f"u_{i}" for i in range(dims)} if dims is not None else None
    return (dims is None or len(system) == dims) and all(_closed(t, known) for t in system)


def _closed(node: Node, known: set[str] | None) -> bool:
    if isinstance(node.value, str) and not node.children:
        return node.value != SPECIAL[PLACEHOLDER] and (known is None or node.value in known or node.value == "t")
    return all(_closed(c, known) for c in node.children)


def right_hand_side(system: Sequence[Node], states: np.ndarray, t: np.ndarray | float = 0.0) -> np.ndarray:
    """f(u) of states float [..., dims]: float [..., len(system)]."""
    values = {f"u_{i}": states[..., i] for i in range(states.shape[-1])}
    values["t"] = np.broadcast_to(np.asarray(t, dtype=np.float64), states.shape[:-1])
    return np.stack([np.broadcast_to(tree.evaluate(values), states.shape[:-1]) for tree in system], -1)


def infix(words: Sequence[str]) -> str:
    """The equations for a person: `du_0/dt = ..., du_1/dt = ...`, or `... = 0`; the words themselves where they are no equations."""
    try:
        system = parse(words)
    except BadInput:
        return " ".join(words)
    return ", ".join(f"{t.infix()} = 0" if whole(t) else f"du_{i}/dt = {t.infix()}" for i, t in enumerate(system))


def whole(tree: Node) -> bool:
    """Whether a tree is an equation's whole left-hand side: it has a derivative by time in it."""
    return tree.value in ("u_t", "u_tt", *FIELD_OPERATORS) or any(whole(c) for c in tree.children)


def terms(tree: Node) -> list[Node]:
    """A sum's terms, subtracted ones negated."""
    if tree.value == "add":
        return terms(tree.children[0]) + terms(tree.children[1])
    if tree.value == "sub":
        return terms(tree.children[0]) + [Node("neg", (t,)) for t in terms(tree.children[1])]
    return [tree]


def total(parts: Sequence[Node]) -> Node:
    out = parts[0]
    for part in parts[1:]:
        out = Node("sub", (out, part.children[0])) if part.value == "neg" else Node("add", (out, part))
    return out


def disturb(words: Sequence[str], rng: np.random.Generator, add: float = 0.15, drop: float = 0.15) -> list[str]:
    """A skeleton as somebody guesses it: with chance `add` a product of two variables too many, with chance `drop` a term too few."""
    system, draw = parse(words), rng.random()
    which = int(rng.integers(len(system)))
    parts = terms(system[which])
    if draw < add:
        u, v = (Node(f"u_{rng.integers(len(system))}") for _ in range(2))
        parts.append(Node("mul", (Node(SPECIAL[PLACEHOLDER]), Node("mul", (u, v)))))
    elif draw < add + drop and len(parts) > 1:
        parts.pop(int(rng.integers(len(parts))))
    system[which] = total(parts)
    return encode(system)


def to_ids(words: Sequence[str], vocabulary: Sequence[str], what: str = "equation") -> list[int]:
    """Raises BadInput naming the words that the vocabulary lacks."""
    index = {w: i for i, w in enumerate(vocabulary)}
    unknown = [*dict.fromkeys(w for w in words if w not in index)]
    if unknown:
        raise BadInput(what, expected=f"symbols of the vocabulary of {len(vocabulary)}", got=f"the unknown {', '.join(unknown[:6])}")
    return [index[w] for w in words]
