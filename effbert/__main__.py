"""The command `effbert`: errors are one line and status 2, Ctrl-C exits with 130; EFFBERT_TRACEBACK=1 shows more. Of
several processes that torchrun started, one says it."""

import os
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    from effbert import parallel
    from effbert.cli import run

    def tell(text: str) -> None:
        if parallel.may_speak():
            print(f"effbert: {text}", file=sys.stderr, flush=True)

    try:
        with parallel.joined() as world:
            return run(sys.argv[1:] if arguments is None else arguments, world)
    except KeyboardInterrupt:
        tell("stopped; the same command goes on from here")
        return 130
    except BrokenPipeError:
        return 141
    except (ValueError, OSError) as error:
        if os.environ.get("EFFBERT_TRACEBACK"):
            raise
        tell(" ".join(str(error).split()))
        return 2


if __name__ == "__main__":
    sys.exit(main())
