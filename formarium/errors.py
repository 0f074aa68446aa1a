"""Everything that can go wrong in a way a person can mend. Each error says what was expected, what came, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FormariumError(Exception):
    """Base of all errors that are the input's fault; the command line prints them as one line and exits with 2."""

    exit_code = 2


class BadInput(FormariumError, ValueError):
    """A value that can't be used: what it is, what was expected, what came, and how to mend it.

    >>> raise BadInput("image", expected="float [batch, 3, height, width]", got="float32 [3, 32, 32]", fix="add a batch dimension")
    """

    def __init__(self, what: str, *, expected: str = "", got: str = "", fix: str = ""):
        self.what, self.expected, self.got, self.fix = what, expected, got, fix
        parts = [what]
        if expected:
            parts.append(f"expected {expected}")
        if got:
            parts.append(f"got {got}")
        text = parts[0] + (": " + ", ".join(parts[1:]) if parts[1:] else "")
        super().__init__(text + (f" ({fix})" if fix else ""))


class UnknownName(FormariumError, LookupError):
    """A name that nothing carries; suggests the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = [*known]
        self.kind, self.name, self.near = kind, name, difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, self.near))}?" if self.near else f"known: {', '.join(sorted(known)[:12])}"
        super().__init__(f"no {kind} is called {name!r}; {hint}")


class BadCheckpoint(FormariumError):
    """A checkpoint that doesn't fit the model, or isn't safe to read."""


class RunExists(FormariumError):
    """The output directory already holds a run."""


class NoCandidates(FormariumError):
    """The limits leave no system to compare."""


class MissingExtra(FormariumError, ImportError):
    """A package that only some features need isn't installed."""

    def __init__(self, package: str, extra: str):
        self.package, self.extra = package, extra
        super().__init__(f"this needs {package}, which isn't installed: pip install 'formarium[{extra}]'")
