"""The command line. `main` answers what needs no model at once, and leaves the rest to the typer app."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of the `formarium` command: 0 for success, 1 where a check failed, 2 for input that can't be used, 130 after Ctrl-C."""
    from formarium.errors import FormariumError

    arguments = sys.argv[1:]
    try:
        if arguments[:1] == ["list"] and not {"--help", "-h"} & {*arguments}:
            from formarium.cli.listing import run

            sys.exit(run(arguments[1:]))
        from formarium.cli.app import app

        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except FormariumError as e:
        _stop(str(e), e.exit_code)
    except KeyboardInterrupt as e:
        _stop(str(e) or "stopped", 130)
    except BrokenPipeError:
        sys.stderr.close()  # `formarium list | head` has seen enough
        sys.exit(0)
    except Exception as e:
        if type(e).__module__.partition(".")[0] in ("click", "typer"):
            _usage(e)
        raise


def _stop(text: str, code: int) -> None:
    print(f"formarium: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(code)


def _usage(error: Exception) -> None:
    """What typer says of a command line it can't read, in one line; its own exits pass through."""
    if hasattr(error, "exit_code") and not hasattr(error, "format_message"):
        sys.exit(error.exit_code)
    if type(error).__name__ == "Abort":
        _stop("stopped", 130)
    context = getattr(error, "ctx", None)
    hint = f" (see: {context.command_path} --help)" if context is not None else ""
    _stop(error.format_message() + hint, getattr(error, "exit_code", 2))  # type: ignore[attr-defined]
