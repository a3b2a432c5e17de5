"""Commands of effbert in processes of their own, forked from one that has imported it: six seconds less for each."""

import atexit
import multiprocessing
import os
import signal
import subprocess
import threading
from collections.abc import Sequence

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["effbert.search.paper"])
_begun: list["Command"] = []

CHILD = """
import os, sys
with open(os.devnull, "wb") as nowhere:
    for stream in (1, 2):
        os.dup2(nowhere.fileno() if writer is None else writer.fileno(), stream)
if writer is not None:
    writer.close()
sys.stdout, sys.stderr = (open(stream, "w", buffering=1, encoding="utf-8", closefd=False) for stream in (1, 2))
os.environ.clear()
os.environ.update(environment)
os.chdir(folder)
sys.argv = ["effbert", *arguments]
from effbert.__main__ import main
exec(before)
sys.exit(main(arguments))
"""
KILLED_BEFORE = """
import signal
def killed(source, target, replace=os.replace):
    if os.path.basename(target) == {name!r}:
        print("killed before", target, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
os.replace = killed
"""


class Command:
    """`effbert ARGUMENTS` under way, to be used as a subprocess.Popen, in this process's environment and folder.

    before: Python to run in it first. quiet: what it prints is dropped. stdout: what it prints, errors too, or None.
    """

    def __init__(self, arguments: Sequence[str], before: str = "", quiet: bool = False):
        reader, writer = (None, None) if quiet else _server.Pipe(duplex=False)
        environment = {**os.environ, "COLUMNS": "200"}
        given = {"arguments": [str(argument) for argument in arguments], "writer": writer, "before": before}
        given |= {"environment": environment, "folder": os.getcwd()}
        self.process = _server.Process(target=exec, args=(CHILD, given))
        self.process.start()
        _begun.append(self)
        self.stdout = None
        if not quiet:
            writer.close()
            self.stdout = open(os.dup(reader.fileno()), encoding="utf-8")
            reader.close()

    @property
    def returncode(self) -> int | None:
        """The exit status, minus the signal that ended it; None while it runs."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.process.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, once it has ended; subprocess.TimeoutExpired where that takes longer."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("effbert", timeout)
        return self.process.exitcode

    def communicate(self, timeout: float) -> tuple[str, None]:
        """All that it still prints, until it ends; it is killed where that takes longer."""
        late = threading.Timer(timeout, self.process.kill)
        late.start()
        try:
            text = self.stdout.read()
            self.process.join()
        finally:
            late.cancel()
            self.stdout.close()
        return text, None


@atexit.register
def _end_all() -> None:
    """What a failed test left behind would else be waited for."""
    for command in _begun:
        command.send_signal(signal.SIGKILL)


def finished(arguments: Sequence[str], timeout: float = 600) -> str:
    """What a command prints that ends well."""
    command = Command(arguments)
    text = command.communicate(timeout)[0]
    assert command.returncode == 0, text
    return text


def killed_before(name: str, arguments: Sequence[str]) -> None:
    """Run a command that is killed at the moment before a file or folder of this name is there."""
    command = Command(arguments, KILLED_BEFORE.format(name=name))
    text = command.communicate(300)[0]
    assert command.returncode == -signal.SIGKILL and "killed before" in text, text
