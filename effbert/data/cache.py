"""Data sets kept on disk between runs as Arrow files. The one idea: an entry is named by the hash of everything it
depends on and appears by one atomic rename, so it is either whole or absent, whatever kills the process or races it."""

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset

_FORMAT = "1"
_FILE = "data.arrow"
_LOCKS = ".locks"


def default_cache_dir() -> Path:
    """`$EFFBERT_CACHE`, else `$XDG_CACHE_HOME/effbert`, else `~/.cache/effbert`."""
    if own := os.environ.get("EFFBERT_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "effbert"


def cached(
    key_parts: Sequence[str | int | float | bool | None],
    build: "Callable[[], Dataset | Iterable[Dataset]]",
    cache_dir: str | Path | None = None,
) -> "Dataset":
    """The data set named by `key_parts`, memory-mapped; built and written first if it is not there.

    `build` returns it whole, or as an iterable of pieces with equal features, written one by one so that memory stays
    bounded (at least one piece, which may have no rows). Several processes of a machine may ask at once: one builds,
    the others wait for it, all read the same file; what a killed one left is removed. Raises ValueError, one line, if
    the cache cannot be written.
    """
    from datasets import Dataset

    def alone() -> "Iterator[tuple[Dataset]]":
        pieces = build()
        return ((piece,) for piece in ([pieces] if isinstance(pieces, Dataset) else pieces))

    return cached_together(key_parts, 1, alone, cache_dir)[0]


def cached_together(
    key_parts: Sequence[str | int | float | bool | None],
    count: int,
    build: "Callable[[], Iterable[Sequence[Dataset]]]",
    cache_dir: str | Path | None = None,
) -> "list[Dataset]":
    """`cached` for `count` data sets that are made in one go: `build` returns pieces that each hold the next rows of
    every one. They appear together, a file each."""
    from datasets import Dataset

    root = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = root / hashlib.blake2b(json.dumps([_FORMAT, *key_parts]).encode(), digest_size=16).hexdigest()
    if not (folder / _FILE).is_file():
        with _alone(folder):
            if not (folder / _FILE).is_file():
                _write(folder, count, build())
    return [Dataset.from_file(str(folder / name)) for name in _files(count)]


def _files(count: int) -> list[str]:
    return [_FILE, *(f"data-{number}.arrow" for number in range(1, count))]


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of all that decides which ids a tokenizer gives: its pieces, rules and special tokens, and the side that
    is cut; not of where it was loaded from."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        rules = json.loads(backend.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), _settings(tokenizer)]
    special = {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())}
    parts = [rules, special, list(tokenizer.model_input_names)]
    if tokenizer.truncation_side != "right":  # left out where it is as ever, so that entries stay valid
        parts.append(tokenizer.truncation_side)
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _settings(tokenizer) -> dict:
    """What a slow tokenizer was made with, such as its casing, without its folder and the length of its texts."""
    elsewhere = ("name_or_path", "is_local", "local_files_only", "model_max_length")
    found = tokenizer.init_kwargs.items()
    return {name: value for name, value in found if name not in elsewhere and not name.endswith("_file")}


def dataset_fingerprint(dataset: "Dataset") -> str:
    """A hash of the column names, types and values of a data set, wherever it came from."""
    digest = hashlib.blake2b(repr(sorted(dataset.features.items())).encode(), digest_size=16)
    columns = sorted(dataset.column_names)
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        for batch in table.select(columns).combine_chunks().to_batches():
            digest.update(batch.serialize())
    return digest.hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """While no other process of this machine builds `folder`; a killed one leaves the lock to the next."""
    from filelock import FileLock

    with _one_line_errors(folder.parent):
        (folder.parent / _LOCKS).mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / _LOCKS / folder.name, fallback_to_soft=False)  # a soft one outlives its process
        try:
            lock.acquire()
        except OSError as error:
            if error.errno != errno.ENOSYS:
                raise
            raise OSError("its file system has no file locks") from error
    try:
        for leftover in folder.parent.glob(f"{folder.name}.tmp-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        lock.release()


def _write(folder: Path, count: int, pieces: "Iterable[Sequence[Dataset]]") -> None:
    root = folder.parent
    with _one_line_errors(root):
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=root))
    try:
        _write_arrow([temporary / name for name in _files(count)], pieces, root)
        with _one_line_errors(root):
            _flush(temporary)
            try:
                os.rename(temporary, folder)
            except OSError:
                if not (folder / _FILE).is_file():  # else another process was faster with the same content
                    raise
            _flush(root)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_arrow(paths: list[Path], pieces: "Iterable[Sequence[Dataset]]", root: Path) -> None:
    import pyarrow as pa

    writers, schema = [], None
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for together in pieces:
            with _one_line_errors(root):
                if not writers:
                    schema = together[0].features.arrow_schema
                    writers = [pa.ipc.new_stream(file, schema) for file in files]
                for writer, piece in zip(writers, together, strict=True):
                    flat = piece if piece._indices is None else piece.flatten_indices()
                    writer.write_table(flat.data.table.cast(schema))
        if not writers:
            raise ValueError("a data set to be cached came without pieces")
        with _one_line_errors(root):
            for writer, file in zip(writers, files, strict=True):
                writer.close()
                file.flush()
                os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _one_line_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"cannot write the data cache {root}: {reason}; set EFFBERT_CACHE elsewhere") from error
