"""What a person at a terminal gets from a long job: a bar, and Ctrl-C that loses nothing."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

AT_ONCE = 1.0  # seconds within which a second signal is the same request: launchers pass a Ctrl-C on that the terminal sent already


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after the state was saved; the message says how to go on."""

    exit_code = 130


@contextmanager
def bar(shown: bool, what: str, steps: int, done: int) -> Iterator[Callable[[float], None]]:
    """A progress bar on stderr where that is a terminal (or in a notebook). Gives a function to call with the loss after each step."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not shown or not (console.is_terminal or console.is_jupyter):
        yield lambda loss: None
        return
    loss_column = TextColumn("loss {task.fields[loss]:.3f}")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), loss_column, TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        job = progress.add_task(what, total=steps, completed=done, loss=float("nan"))
        yield lambda loss: progress.update(job, advance=1, loss=loss)


@contextmanager
def interrupts() -> Iterator[Callable[[], bool]]:
    """Ctrl-C (or SIGTERM) is remembered, for the loop to ask for after its step; a second one doesn't wait."""
    first: float | None = None

    def on_signal(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None:
            first = time.monotonic()
        elif time.monotonic() - first > AT_ONCE:
            raise KeyboardInterrupt

    before = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, on_signal)
    except ValueError:  # not in the main thread: signals aren't ours
        yield lambda: False
        return
    try:
        yield lambda: first is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def command_to_go_on(directory: Path | None) -> str:
    """What a person types to go on from a checkpoint."""
    if directory is None:
        return "nothing was kept, since there is no run directory (out=)"
    program = Path(sys.argv[0])
    if program.name not in ("formarium", "__main__.py") or "formarium" not in sys.argv[0]:
        return f"go on with the same call of fit, with out={str(directory)!r} and resume=True"
    words = [w for w in sys.argv[1:] if w not in ("--resume", "--overwrite")]
    processes = os.environ.get("LOCAL_WORLD_SIZE")
    launcher = ["torchrun", "--nproc-per-node", processes, "-m", "formarium"] if processes else ["formarium"]
    return f"go on with: {shlex.join([*launcher, *words, '--resume'])}"
