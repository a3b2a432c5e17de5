"""Plain text for general distillation, as sequences of token ids. The one idea: text goes through in a stream of
chunks, each of which alone decides its sequences; so memory does not grow with the text, chunks can be shared out among
processes, and the result is the same however many there are. It ends up in an Arrow file, one for each set of samples.

Two ways to cut text into sequences. "packed", ours: sentences are packed whole into a sequence while they fit, a
sentence longer than a sequence runs on into the next, and no token is lost. "released": the samples that the published
models were trained on, told from the data scripts released with them. A document (an article, or 20 lines of a book)
gives one sample, whatever its length: segment A from it, segment B from another document, the longer one cut at a
random end until both fit. The scripts' probability of a shorter sample changes nothing there, since they make a
document one sentence. Of a long document most is left unread. As there, several sets of samples are drawn from the same
documents, for the epochs to take in turn. Unlike there, B comes from the same thousand documents instead of all, and
the 20 lines are counted without blank ones.

What is an article and what a line is told of each source as a whole. The records of a data set are articles, however
short, where it has a column `title` or `url`, as Wikipedia has and BooksCorpus, a sentence a record, has not. Where it
has neither, they are articles if more than one in a hundred of its first thousand records has several lines, since a
stray line break does not make an article of a sentence; else every line is a line of a book. In a text file, too, every
line is one, and blank lines and ends of files mean nothing, so articles belong in a data set. No document runs on from
one source into the next.
"""

import hashlib
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from effbert.data.cache import cached_together, tokenizer_fingerprint
from effbert.data.sentences import split_sentences
from effbert.data.tokenizer import uncut
from effbert.errors import first_line
from effbert.random import generator

if TYPE_CHECKING:
    from datasets import Dataset

Row = tuple[str, ...]  # the lines of one record: of a file one line, of a data set all lines of one text
Samples = Literal["packed", "released"]

SAMPLE_SETS = 5
"""Sets of samples that the published models were trained on (`--epochs_to_generate 5` in create_pretrain_data.sh of
github.com/cheneydon/efficient-bert); epoch e takes set e modulo their number."""

_ROWS = 1000  # records read at once
_CHUNK_CHARACTERS, _BATCH_CHARACTERS = 2**20, 2**17  # of a process's share, and of what it tokenises at once
_LINES, _DOCUMENTS = 20, 1000  # lines a document where records are lines; documents among which B is drawn
_TITLES = ("title", "url")  # columns, in any case, of which one says that each record is an article
_LOOK, _STRAY = 1000, 0.01  # without them: records looked at, and the share of them that may have several lines by slip
_RULE = 2  # which of the ways to tell documents apart made a file of released samples
_PROCESSES = 16  # unless told otherwise: each takes some 50 MB
_SAY_SECONDS = 60.0


class Source(NamedTuple):
    """Text that was found: its name for messages, a hash of its content, its records, which can be read again, and
    whether a column says that they are articles."""

    name: str
    fingerprint: str
    rows: Callable[[], Iterator[Row]]
    titled: bool = False


class Sequences(NamedTuple):
    """N sequences laid end to end: input_ids and, or None, token_type_ids [sum of lengths]; lengths [N]; all int32."""

    input_ids: np.ndarray
    token_type_ids: np.ndarray | None
    lengths: np.ndarray


def load_corpus(
    source: str | Path | Sequence[str | Path],
    tokenizer,
    max_length: int,
    *,
    samples: Samples = "packed",
    split: str = "train",
    text_column: str = "text",
    sets: int = 1,
    limit_tokens: int | None = None,
    num_proc: int = 0,
    cache_dir: str | Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> "list[Dataset]":
    """Sets of sequences of at most `max_length` ids, special tokens included, in columns `input_ids`, `length` and, for
    "released" with a tokenizer that marks segments, `token_type_ids`.

    source: one or several, read one after the other, of "builtin"; a UTF-8 text file with a paragraph a line, or a
    folder of such .txt files; a parquet, JSON or CSV file, or a folder that `datasets` reads (parquet, json, ...); or
    the name of a data set on the hub as NAME, NAME:CONFIG or NAME:CONFIG@REVISION, which is streamed, never downloaded
    whole. Of data sets `split` and `text_column` choose the text. samples: as this file says at its top; the draws
    depend on the text alone. sets: of "released" samples, each with draws of its own; "packed" has one. limit_tokens:
    end at the first sequence that reaches that many ids. num_proc: processes that tokenise, 0 for one a core, 16 at
    most. say: told once a minute how far it is.

    All sets have as many rows, since a document gives one to each, and all end with the document at which the first
    reaches limit_tokens: so every epoch has as many batches, and a share of a set is the same documents in each.

    Raises FileNotFoundError for a missing source, ValueError for one that is empty, not UTF-8 (file and offset), or a
    folder of text and tables.
    """
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError("the tokenizer has no start and end tokens (cls, sep); a BERT tokenizer has both")
    least = {"packed": 3, "released": 5}
    if samples not in least:
        raise ValueError(f"samples {samples!r}: one of {', '.join(least)}")
    if max_length < least[samples]:
        raise ValueError(
            f"max_length {max_length} leaves no room for text between the special tokens; {least[samples]} is least"
        )
    if limit_tokens is not None and limit_tokens < 1:
        raise ValueError(f"limit_tokens {limit_tokens} leaves no text; give at least 1, or None for all")
    if sets < 1 or (sets > 1 and samples == "packed"):
        raise ValueError(f"sets {sets} of {samples} samples: at least 1, and 1 of packed ones, which draw nothing")
    if num_proc < 0:
        raise ValueError(f"num_proc {num_proc}: it must be at least 0")
    sources = _open(source, split, text_column, cache_dir)
    prints = [found.fingerprint for found in sources]

    def build() -> Iterator[list["Dataset"]]:
        work = _Work(tokenizer, max_length, samples, sets)
        if samples == "packed":
            chunks = _chunks(chain.from_iterable(found.rows() for found in sources), _CHUNK_CHARACTERS)
        else:
            chunks = _blocks(chain.from_iterable(_documents(found.rows(), found.titled) for found in sources))
        pieces = in_order(work, enumerate(chunks), num_proc or _cores())
        return _datasets(_limited(pieces, limit_tokens), ", ".join(found.name for found in sources), say)

    key = ("corpus", samples, *prints, tokenizer_fingerprint(tokenizer), max_length, limit_tokens)
    if samples == "released":
        key = (*key, sets, _RULE, *(found.titled for found in sources))
    return cached_together(key, sets, build, cache_dir)


def check_corpus(source: str | Path | Sequence[str | Path]) -> None:
    """FileNotFoundError or ValueError as `load_corpus`, for what can be told of files without reading them."""
    for given in [source] if isinstance(source, str | Path) else source:
        if given != "builtin":
            _text_files(given)


def sentences_of(source: str | Path | Sequence[str | Path], *, cache_dir: str | Path | None = None) -> Iterator[str]:
    """The sentences of a corpus in reading order, as `load_corpus` finds them; the same errors."""
    sources = _open(source, "train", "text", cache_dir)
    rows = chain.from_iterable(found.rows() for found in sources)
    return (sentence for row in rows for line in row for sentence in split_sentences(line))


def pack(sentences: Iterable[list[int]], cls_token_id: int, sep_token_id: int, max_length: int) -> Iterator[list[int]]:
    """Sequences `cls ... sep` of at most `max_length` ids that hold every id of `sentences`, in order."""
    room = max_length - 2
    body: list[int] = []
    for sentence in sentences:
        if body and len(body) + len(sentence) > room:
            yield [cls_token_id, *body, sep_token_id]
            body = []
        body = body + sentence
        while len(body) > room:
            yield [cls_token_id, *body[:room], sep_token_id]
            body = body[room:]
    if body:
        yield [cls_token_id, *body, sep_token_id]


def pair_up(
    documents: Sequence[Sequence[int] | np.ndarray],
    cls_token_id: int,
    sep_token_id: int,
    max_length: int,
    rng: np.random.Generator,
) -> Iterator[tuple[list[int], int]]:
    """The released sample of each of two or more documents: (`cls A sep B sep` of at most `max_length` ids, the number
    of them that are in segment 0). B is another of the documents, each as likely."""
    for number, first in enumerate(documents):
        other = int(rng.integers(len(documents) - 1))
        second = documents[other + (other >= number)]
        lengths = cut_pair(len(first), len(second), max_length - 3)
        a, b = (_cut(ids, length, rng) for ids, length in zip((first, second), lengths, strict=True))
        yield [cls_token_id, *a, sep_token_id, *b, sep_token_id], len(a) + 2


def cut_pair(first: int, second: int, room: int) -> tuple[int, int]:
    """What is left of two lengths once the longer one (of equal ones the second) lost one until both fit in `room`."""
    second = min(second, max(room // 2, room - first))
    return min(first, room - second), second


def _cut(ids: Sequence[int], length: int, rng: np.random.Generator) -> Sequence[int]:
    """`length` neighbours of `ids`, where each that goes is taken from the front or the back with even odds."""
    start = int(rng.binomial(len(ids) - length, 0.5))
    return ids[start : start + length]


def in_order(work: Callable, chunks: Iterable, num_proc: int) -> Iterator:
    """work(chunk) for each chunk, in order, by `num_proc` processes; no more than 2 · num_proc chunks are under way.

    A single chunk, or one process, is worked on here. OSError, one line, where a process was killed.
    """
    chunks = iter(chunks)
    first = list(islice(chunks, 2))
    chunks = chain(first, chunks)
    if num_proc == 1 or len(first) < 2:
        yield from map(work, chunks)
        return
    fork = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    pool = ProcessPoolExecutor(num_proc, mp_context=fork, initializer=_begin, initargs=(work, os.getpid()))
    waiting: deque = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_do, chunk))
            if len(waiting) == 2 * num_proc:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool as error:
        raise OSError("a process that tokenises the corpus was killed (out of memory?); use fewer of them") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    """Those that this process may use, `_PROCESSES` at most."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, _PROCESSES)


_work: Callable | None = None  # of a process that `in_order` started


def _begin(work: Callable, parent: int) -> None:
    global _work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _work = work
    threading.Thread(target=_follow, args=(parent,), daemon=True).start()


def _follow(parent: int) -> None:
    """End with the process that started this one: a killed one cannot say so."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _do(chunk):
    return _work(chunk)


@dataclass(frozen=True)
class _Work:
    """A chunk of text, with its number, to the sequences of each set."""

    tokenizer: object
    max_length: int
    samples: Samples
    sets: int

    def __call__(self, numbered: tuple[int, list[str]]) -> list[Sequences]:
        number, texts = numbered
        special = self.tokenizer.cls_token_id, self.tokenizer.sep_token_id, self.max_length
        if self.samples == "packed":
            sentences = (sentence for text in texts for sentence in split_sentences(text))
            packed = list(pack(_tokenize(sentences, self.tokenizer), *special))
            return [Sequences(_flat(packed), None, _lengths(packed))]
        documents = [np.array(ids, np.int32) for ids in _tokenize(texts, self.tokenizer)]
        if len(documents) < 2:
            if number or len(texts) >= _DOCUMENTS:  # another block may have a pair
                return [self._pairs(()) for _ in range(self.sets)]
            raise ValueError(
                f"released samples pair documents, and this text has {len(documents)}, of {_LINES} lines or an article "
                "each: use packed samples"
            )
        draws = [generator(0, "released samples", number, "set", which) for which in range(self.sets)]
        return [self._pairs(pair_up(documents, *special, draw)) for draw in draws]

    def _pairs(self, pairs: Iterable[tuple[list[int], int]]) -> Sequences:
        pairs, types = list(pairs), None
        ids = [ids for ids, _ in pairs]
        if "token_type_ids" in self.tokenizer.model_input_names:
            types = _flat([[0] * first + [1] * (len(ids) - first) for ids, first in pairs])
        return Sequences(_flat(ids), types, _lengths(ids))


def _flat(lists: list[list[int]]) -> np.ndarray:
    return np.fromiter(chain.from_iterable(lists), np.int32)


def _lengths(lists: list[list[int]]) -> np.ndarray:
    return np.fromiter(map(len, lists), np.int32, len(lists))


def _tokenize(texts: Iterable[str], tokenizer) -> Iterator[list[int]]:
    """Ids of each text that has any. The space in front makes byte-level tokenizers read it as the middle of a text."""
    encode = _encoder(tokenizer)
    for batch in _chunks(((" " + text,) for text in texts), _BATCH_CHARACTERS):
        yield from (ids for ids in encode(batch) if ids)


def _encoder(tokenizer) -> Callable[[list[str]], Iterable[list[int]]]:
    """Texts to ids without special tokens; past the wrapper of a fast tokenizer, which takes as long as the ids."""
    if not tokenizer.is_fast:
        return lambda texts: tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    backend = uncut(tokenizer).backend_tokenizer
    return lambda texts: (found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=False))


def _chunks(rows: Iterable[Row], characters: int) -> Iterator[list[str]]:
    """The lines, in lists of about so many characters."""
    lines: list[str] = []
    size = 0
    for row in rows:
        lines += row
        size += sum(map(len, row)) + 1
        if size >= characters:
            yield lines
            lines, size = [], 0
    if lines:
        yield lines


def _documents(rows: Iterator[Row], titled: bool) -> Iterator[str]:
    """The documents of one source: its records where it is `titled` or enough of the first have several lines, else
    every `_LINES` lines and what is left."""
    first = [] if titled else list(islice(rows, _LOOK))
    articles = titled or sum(len(row) > 1 for row in first) > _STRAY * len(first)
    rows = chain(first, rows)
    if articles:
        return (" ".join(row) for row in rows)
    lines = chain.from_iterable(rows)
    return iter(lambda: " ".join(islice(lines, _LINES)), "")


def _blocks(documents: Iterable[str]) -> Iterator[list[str]]:
    """Lists of `_DOCUMENTS`, the last one of at least two where there are two."""
    documents = iter(documents)
    block = list(islice(documents, _DOCUMENTS))
    while block:
        following = list(islice(documents, _DOCUMENTS))
        if len(following) == 1:
            block, following = block + following, []
        yield block
        block = following


def _limited(pieces: Iterable[list[Sequences]], limit_tokens: int | None) -> Iterator[list[Sequences]]:
    """The pieces up to the row at which the first set reaches the limit, the same row in every set."""
    total = 0
    for piece in pieces:
        ends = total + np.cumsum(piece[0].lengths, dtype=np.int64)
        if limit_tokens is not None and len(ends) and ends[-1] >= limit_tokens:
            yield [_first(part, 1 + int(np.searchsorted(ends, limit_tokens))) for part in piece]
            return
        yield piece
        total += int(piece[0].lengths.sum())


def _first(piece: Sequences, rows: int) -> Sequences:
    ids = int(piece.lengths[:rows].sum())
    types = None if piece.token_type_ids is None else piece.token_type_ids[:ids]
    return Sequences(piece.input_ids[:ids], types, piece.lengths[:rows])


def _datasets(pieces: Iterable[list[Sequences]], name: str, say: Callable[[str], None]) -> Iterator[list["Dataset"]]:
    tokens, last = 0, time.monotonic()
    for piece in pieces:
        if not len(piece[0].lengths):
            continue
        yield [_dataset(part) for part in piece]
        tokens += sum(len(part.input_ids) for part in piece)
        if time.monotonic() - last >= _SAY_SECONDS:
            say(f"corpus: {tokens:,} tokens so far")
            last = time.monotonic()
    if not tokens:
        raise ValueError(f"corpus {name} is empty: it holds no text beside white space")


def _dataset(piece: Sequences) -> "Dataset":
    import pyarrow as pa
    from datasets import Dataset

    offsets = pa.array(np.concatenate(([0], np.cumsum(piece.lengths))).astype(np.int32))
    columns = {"input_ids": pa.ListArray.from_arrays(offsets, pa.array(piece.input_ids))}
    if piece.token_type_ids is not None:
        columns["token_type_ids"] = pa.ListArray.from_arrays(offsets, pa.array(piece.token_type_ids.astype(np.int8)))
    columns["length"] = pa.array(piece.lengths)
    return Dataset(pa.table(columns))


def _open(source, split: str, text_column: str, cache_dir) -> list[Source]:
    given = [source] if isinstance(source, str | Path) else list(source)
    if not given:
        raise ValueError("no corpus: give at least one source")
    return [_open_one(one, split, text_column, cache_dir) for one in given]


def _open_one(given: str | Path, split: str, text_column: str, cache_dir) -> Source:
    if given == "builtin":
        from effbert.data import builtin

        sentences = builtin.corpus_sentences(cache_dir)
        digest = hashlib.blake2b("\n".join(sentences).encode(), digest_size=16)
        return Source("builtin", digest.hexdigest(), lambda: ((sentence,) for sentence in sentences))
    files = _text_files(given)
    if files:
        return Source(str(given), _hash_files(files), lambda: _file_lines(files))
    return _open_dataset(given, split, text_column)


def _text_files(given: str | Path) -> list[Path]:
    """The text files that a path names; none if it is no path, or one for `datasets` to judge."""
    path = Path(given).expanduser()
    if path.is_file():
        files = [] if path.suffix in _FORMATS else [path]
    elif path.is_dir():
        files = sorted(path.rglob("*.txt"))
        _refuse_mixture(given, [*files[:1], *(file for file in sorted(path.rglob("*")) if file.suffix in _TABLES)])
        if not files and not any(path.rglob("*.*")):
            raise FileNotFoundError(f"no text in {given}: the folder holds no .txt file")
    elif _meant_as_path(given) and not Path(_parts(given).name).expanduser().is_dir():
        raise FileNotFoundError(f"no corpus at {given}: no such file or folder")
    else:
        files = []
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty; a corpus file holds a paragraph a line")
    return files


_FORMATS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}  # of single files: their reader
_TABLES = (".parquet", ".arrow", ".jsonl", ".csv")  # never the small files that lie beside text, as .json may


def _refuse_mixture(given: str | Path, files: list[Path]) -> None:
    """ValueError where files of a folder are of several kinds, of which one alone would be read."""
    kinds = {file.suffix: file.name for file in reversed(files)}
    if len(kinds) > 1:
        raise ValueError(
            f"corpus {given} holds files of {len(kinds)} kinds, {' and '.join(sorted(kinds.values()))} among them, of "
            "which one would be read: put each kind into a folder of its own, and give them all as sources"
        )


def _meant_as_path(given: str | Path) -> bool:
    return isinstance(given, Path) or given.startswith((".", "/", "~")) or given.endswith((".txt", *_FORMATS))


class _Parts(NamedTuple):
    """A data set's name or folder, and "" or what of it: NAME:CONFIG@REVISION."""

    name: str
    config: str
    revision: str


def _parts(given: str | Path) -> _Parts:
    """A path that exists is a name, whatever it is spelt like."""
    if Path(given).expanduser().exists():
        return _Parts(str(given), "", "")
    name, _, revision = str(given).partition("@")
    name, _, config = name.partition(":")
    return _Parts(name, config, revision)


def _open_dataset(given: str | Path, split: str, text_column: str) -> Source:
    from datasets import load_dataset_builder

    parts = _parts(given)
    path = Path(parts.name).expanduser()
    if path.is_file():
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
        arguments = {"path": _FORMATS[path.suffix], "data_files": {split: str(path)}}
        if path.suffix == ".csv":
            # numbers are text, and so is a line "NA"
            arguments |= {"converters": {text_column: str}, "keep_default_na": False}
    elif path.is_dir():
        arguments = {"path": str(path), "name": parts.config or None}
    else:
        arguments = {"path": parts.name, "name": parts.config or None, "revision": parts.revision or None}
    try:
        builder = load_dataset_builder(**arguments)
        dataset = builder.as_streaming_dataset(split)
        dataset = dataset if dataset.column_names else dataset._resolve_features()
    except Exception as error:  # down to those of the HTTP client
        if path.is_file():
            raise ValueError(f"corpus {given} cannot be read as {arguments['path']}: {first_line(error)}") from error
        raise FileNotFoundError(
            f"no corpus {str(given)!r}: not a path here, and `datasets` says: {' '.join(str(error).split())[:200]}"
        ) from error
    if text_column not in dataset.column_names:
        columns = ", ".join(dataset.column_names)
        raise ValueError(f"corpus {str(given)!r} has no column {text_column!r}, only {columns}")
    files = builder.config.data_files[split]
    if path.exists():
        fingerprint = _hash_files([Path(file) for file in files])
    else:  # these name the commit
        fingerprint = hashlib.blake2b(repr([list(files), files.origin_metadata]).encode(), digest_size=16).hexdigest()

    def rows() -> Iterator[Row]:
        try:
            for batch in dataset.select_columns(text_column).iter(_ROWS):
                for text in batch[text_column]:
                    if not isinstance(text, str | None):
                        raise ValueError(f"its column {text_column!r} holds {text!r}, which is no text")
                    if lines := tuple(line for line in (text or "").splitlines() if line.strip()):
                        yield lines
        except (OSError, ValueError, RuntimeError) as error:
            raise OSError(f"corpus {str(given)!r} cannot be read to its end: {first_line(error)}") from error

    reader = "".join(f"/{name}" for name in ("converters", "keep_default_na") if name in arguments)
    titled = any(column.lower() in _TITLES for column in dataset.column_names if column != text_column)
    return Source(str(given), f"{fingerprint}/{text_column}{reader}", rows, titled)


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "blake2b").digest())
    return digest.hexdigest()


def _file_lines(files: list[Path]) -> Iterator[Row]:
    for file in files:
        offset = 0
        with open(file, "rb") as handle:
            for number, line in enumerate(handle, 1):
                try:
                    text = line.decode("utf-8").removeprefix("\ufeff").strip()
                except UnicodeDecodeError as error:
                    where = f"{file}, line {number}, byte {offset + error.start}"
                    raise ValueError(f"{where}: not UTF-8 text; convert the file to UTF-8") from error
                if text:
                    yield (text,)
                offset += len(line)
