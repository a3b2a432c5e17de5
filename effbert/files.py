"""Writing files so that a reader sees the old content or the new, never half of one; and reading back a run's own.

Everything is written under a temporary name in the same folder, flushed to the disk, and renamed. A process killed in
between leaves a file whose name begins with `PARTIAL`: the next to write the same path on this machine removes it, and
`remove_partial` all that are in a folder.
"""

import errno
import functools
import glob
import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial-"


class DiskFullError(OSError):
    """The disk or the quota is full; the message is one line that names the path."""


def write_atomic(path: str | Path, data: bytes | str) -> None:
    """Replaces the file `path` by `data` (text as UTF-8), or leaves it as it was and raises OSError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def read_kept(path: Path, then: str, *names: str, delete: Path | None = None) -> dict:
    """The JSON object in a run's own file, which has `names`; ValueError where it is damaged, in one line that says to
    delete it (or `delete`) and what the same command does `then`."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict) or not content.keys() >= set(names):
        raise ValueError(f"{path} is damaged: delete {delete or 'it'}, and the same command {then}")
    return content


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`, with the same suffix; what the body wrote there becomes `path` at the end.

    The file and its folder are synced to the disk. If the body or the disk fails, `path` keeps its old content and the
    temporary file is removed; a full disk raises DiskFullError. The folder of `path` must exist.

    Hand torch.save an open file, not the path: given a path it does not say that the disk is full.
    """
    path = Path(path)
    temporary = temporary_name(path)
    with _nothing_left_behind(path, temporary):
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)


@contextmanager
def atomic_dir(path: str | Path) -> Iterator[Path]:
    """Yields a new empty folder beside `path`; it becomes `path` at the end, as in `atomic_path`.

    An existing folder is replaced as a whole, by two renames: a process killed between them leaves no `path`, and the
    folder must be written again.
    """
    path = Path(path)
    temporary, previous = temporary_name(path), temporary_name(path)
    with _nothing_left_behind(path, temporary):
        temporary.mkdir()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            _sync(Path(folder))
        _swap(temporary, path, previous)
        _sync(path.parent)
    _remove(previous)


def remove_partial(folder: str | Path) -> None:
    """Removes what killed processes left under `folder`. Only for a folder that no other process is writing to."""
    for leftover in list(Path(folder).rglob(f"{PARTIAL}*")):
        _remove(leftover)


def _swap(temporary: Path, path: Path, previous: Path) -> None:
    if path.exists():
        os.replace(path, previous)
    try:
        os.replace(temporary, path)
    except BaseException:
        if previous.exists():
            os.replace(previous, path)
        raise


def temporary_name(path: Path) -> Path:
    """A new name beside `path`, after what dead processes of this machine left of the same path was removed."""
    mine = f"{PARTIAL}{_machine()}-"
    for leftover in path.parent.glob(f"{mine}*-{glob.escape(path.name)}"):
        process = leftover.name.removeprefix(mine).partition("-")[0]
        if process.isdigit() and not _lives(int(process)):
            with suppress(OSError):  # somebody else's: not ours to remove
                _remove(leftover)
    return path.with_name(f"{mine}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")


@functools.cache
def _machine() -> str:
    """What tells apart the machines, or containers, whose process numbers are their own."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts += [os.readlink("/proc/self/ns/pid"), Path("/etc/machine-id").read_text()]
    return hashlib.blake2b("\n".join(parts).encode(), digest_size=4).hexdigest()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


@contextmanager
def _nothing_left_behind(path: Path, temporary: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _remove(temporary)
        if not _is_disk_full(error):
            raise
        full = DiskFullError(f"{path}: no space left on device; nothing already written was lost")
        full.errno = errno.ENOSPC
        raise full from error


def _is_disk_full(error: BaseException) -> bool:
    """torch and safetensors report a full disk with errors of their own, above or instead of the OSError."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    if isinstance(error, Exception) and os.strerror(errno.ENOSPC) in str(error):
        return True
    below = error.__cause__ or error.__context__
    return below is not None and _is_disk_full(below)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
