"""The command `effbert`: errors are one line and status 2, Ctrl-C exits with 130; EFFBERT_TRACEBACK=1 shows more. Of
several processes that torchrun started, one says it; what they do not do together the first does, and the others wait
and end with its status."""

import os
import signal
import sys
from collections.abc import Callable


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    given = sys.argv[1:] if arguments is None else arguments

    def start() -> int:
        from effbert import parallel
        from effbert.cli import is_shared, run

        with parallel.joined() as world:
            if world.size == 1 or is_shared(given):
                return run(given, world)
            if not world.is_first:  # Ctrl-C is for the process that works: its status ends all
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            return world.on_first(_whole, given)

    return _ended(start, given)


def _whole(arguments: list[str]) -> int:
    """A command from its start to its exit status, with what it says of its errors."""
    from effbert.cli import run

    try:
        return _ended(lambda: run(arguments), arguments)
    except SystemExit as stop:  # after --help
        return stop.code or 0


def _ended(function: Callable[[], int], arguments: list[str]) -> int:
    """The exit status that function() returns, or that of the error it ends with, once that is told. arguments: of the
    command, which say whether what it did is kept when it is stopped."""
    try:
        return function()
    except KeyboardInterrupt:
        from effbert.cli import is_shared

        _tell("stopped; the same command goes on from here" if is_shared(arguments) else "stopped")
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError) as error:
        if os.environ.get("EFFBERT_TRACEBACK"):
            raise
        _tell(" ".join(str(error).split()))
        return 2
    except (RuntimeError, MemoryError) as error:
        from effbert.errors import first_line
        from effbert.memory import out_of_memory

        if os.environ.get("EFFBERT_TRACEBACK") or not out_of_memory(error):
            raise
        _tell(
            f"out of memory ({first_line(error)}): nothing already written was lost; take a smaller batch or population"
        )
        return 2


def _tell(text: str) -> None:
    from effbert.parallel import may_speak

    if may_speak():
        print(f"effbert: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
