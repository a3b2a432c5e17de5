"""Ctrl-C while the libraries below are imported, which takes seconds: for a command one line and status 130, as later.

It ends the process at once, since an exception may be swallowed where C code imports, and nothing has been begun yet.
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_command() -> bool:
    """Whether this process is `effbert` or `python -m effbert`, and no program that imports it: while Python looks for
    the module that -m names, that stands in sys.argv."""
    name = sys.argv[0] if sys.argv else ""
    return name == "-m" or Path(name).name == "effbert"


@contextmanager
def one_line_if_stopped() -> Iterator[None]:
    """Inside, Ctrl-C ends a command with one line; elsewhere, and where SIGINT is ignored, nothing changes."""
    usual = signal.default_int_handler
    here = is_command() and threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not usual:
        yield
        return
    signal.signal(signal.SIGINT, _stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def _stop(number, frame) -> None:
    os.write(2, b"effbert: stopped\n")
    os._exit(130)
