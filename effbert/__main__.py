"""The command `effbert`: errors are one line and status 2, Ctrl-C exits with 130; EFFBERT_TRACEBACK=1 shows more."""

import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    from effbert.cli import run

    try:
        return run(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("effbert: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError) as error:
        if os.environ.get("EFFBERT_TRACEBACK"):
            raise
        print(f"effbert: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
