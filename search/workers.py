"""Several processes in one run's folder: who is there, and what only one of them may do at a time.

The one idea: both are locks of the operating system on files in <run>/.workers, and such a lock ends with the process
that holds it, however that ends. A worker holds the file with its name for as long as it lives; the file `turn` is held
by the one that does what is done once: make the tokenizer, train a supernet, propose candidates, take some of them.
"""

import fcntl
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = ".workers"
JOINING, SHARING = "joining", "sharing out candidates"  # turns too short for a line to those that wait
_TURN = "turn"


class Workers:
    """This process as one of a run's workers: a context manager, or `join` and `leave`.

    name: of this worker, unique: its machine, its process number and four random digits.
    """

    def __init__(self, run_folder: str | Path, say: Callable[[str], None] = lambda text: None):
        self.folder, self.say = Path(run_folder) / FOLDER, say
        self.machine = platform.node() or "localhost"
        self.name = f"{self.machine}.{os.getpid()}.{secrets.token_hex(2)}"
        self._depth, self._turn, self._own = 0, None, None

    def __enter__(self) -> "Workers":
        self.join()
        return self

    def __exit__(self, *_) -> None:
        self.leave()

    def join(self) -> None:
        """Be seen by the others. OSError where the folder cannot be written or knows no locks."""
        with self.turn(JOINING):
            for file in self.folder.iterdir():
                if file.name != _TURN and _is_free(file):
                    file.unlink(missing_ok=True)  # it may have left meanwhile
            self._own = _locked(self.folder / self.name)

    def leave(self) -> None:
        """Be gone."""
        if self._own is not None:
            (self.folder / self.name).unlink(missing_ok=True)
            self._own.close()
            self._own = None

    def clear_away(self) -> None:
        """Remove <run>/.workers, after `leave`, unless another worker is in it."""
        with self.turn(JOINING):
            if not self.others():
                shutil.rmtree(self.folder)

    def others(self) -> list[str]:
        """Names of the other workers that live."""
        files = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        return [file.name for file in files if file.name not in (_TURN, self.name) and not _is_free(file)]

    def is_gone(self, name: str) -> bool:
        """Whether a worker of this machine is dead; False for one of another machine, of which nothing is known here.

        What a worker was that died elsewhere shows in the storage's heartbeats (effbert.search.study).
        """
        return name != self.name and self._is_near(name) and _is_free(self.folder / name)

    def is_here(self, name: str) -> bool:
        """Whether a worker lives on this machine; False for one of another machine, as `is_gone`."""
        return self._is_near(name) and not self.is_gone(name)

    def _is_near(self, name: str) -> bool:
        return name.rsplit(".", 2)[0] == self.machine

    @contextmanager
    def turn(self, what: str) -> Iterator[None]:
        """Wait until no other worker has its turn, and keep it while the body runs; inside a turn, go on in it.

        what: for the others to read while they wait.
        """
        if self._depth == 0:
            self._turn = self._taken_turn()
            self._turn.truncate(0)
            self._turn.write(f"{self.name}, {what}")
            self._turn.flush()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                self._turn.close()

    def _taken_turn(self):
        """The file of the turn, locked, and not one that was cleared away while this process waited for it."""
        path = self.folder / _TURN
        while True:
            if self._own is None:
                self.folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")
            self._wait_for(file)
            if _is_at(path, file):
                return file
            file.close()

    def _wait_for(self, file) -> None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            self._say_who(file.read())
            fcntl.flock(file, fcntl.LOCK_EX)

    def _say_who(self, holder: str) -> None:
        name, _, what = holder.partition(", ")
        if what not in ("", JOINING, SHARING):
            self.say(f"waiting for worker {name}: {what}")


def _locked(path: Path):
    """The open file, locked. The kernel drops the lock when the process ends, however it ends."""
    file = open(path, "a", encoding="utf-8")
    fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _is_at(path: Path, file) -> bool:
    """Whether the open file is the one that is there now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _is_free(path: Path) -> bool:
    """Whether nobody holds this file: it is not there, or its lock can be had."""
    try:
        with open(path, encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True
