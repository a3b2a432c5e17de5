"""Plain text for general distillation, as sequences of token ids. The one idea: sentences are packed whole into a
sequence while they fit, a sentence longer than a sequence runs on into the next, and so no token is lost; text goes
through in a stream, whatever its size, into one Arrow file."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from effbert.data.cache import cached, tokenizer_fingerprint
from effbert.data.sentences import split_sentences
from effbert.errors import first_line

if TYPE_CHECKING:
    from datasets import Dataset

_BATCH = 1000
_PIECE = 10_000


def load_corpus(
    source: str | Path | Sequence[str | Path],
    tokenizer,
    max_length: int,
    *,
    config: str | None = None,
    split: str = "train",
    text_column: str = "text",
    limit_tokens: int | None = None,
    cache_dir: str | Path | None = None,
) -> "Dataset":
    """Sequences of at most `max_length` ids, start and end tokens included, in columns `input_ids` and `length`.

    source: "builtin"; a UTF-8 text file with a paragraph a line, a folder of such .txt files, or several of either;
    or a data set that `datasets` loads by name or from a folder (parquet, json, ...), of which `config`, `split` and
    `text_column` choose the text. `limit_tokens` ends the corpus at the first sequence that reaches that many ids.
    Raises FileNotFoundError for a missing source, ValueError for one that is empty or not UTF-8 (file and offset).
    """
    if tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise ValueError("the tokenizer has no start and end tokens (cls, sep); a BERT tokenizer has both")
    if max_length < 3:
        raise ValueError(
            f"max_length {max_length} leaves no room for text between the start and end tokens; 3 is least"
        )
    if limit_tokens is not None and limit_tokens < 1:
        raise ValueError(f"limit_tokens {limit_tokens} leaves no text; give at least 1, or None for all")
    name, fingerprint, paragraphs = _open(source, config, split, text_column, cache_dir)

    def build() -> Iterator["Dataset"]:
        sequences = pack(_tokenize(paragraphs, tokenizer), tokenizer.cls_token_id, tokenizer.sep_token_id, max_length)
        return _pieces(_limited(sequences, limit_tokens), name)

    key = ("corpus", fingerprint, tokenizer_fingerprint(tokenizer), max_length, limit_tokens)
    return cached(key, build, cache_dir)


def sentences_of(source: str | Path | Sequence[str | Path], *, cache_dir: str | Path | None = None) -> Iterator[str]:
    """The sentences of a corpus in reading order, as `load_corpus` finds them; the same errors."""
    paragraphs = _open(source, None, "train", "text", cache_dir)[2]
    return (sentence for paragraph in paragraphs for sentence in split_sentences(paragraph))


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


def _open(source, config, split, text_column, cache_dir) -> tuple[str, str, Iterable[str]]:
    """Its name for messages, a hash of its content, and its paragraphs."""
    if isinstance(source, str) and source == "builtin":
        from effbert.data import builtin

        sentences = builtin.corpus_sentences(cache_dir)
        digest = hashlib.blake2b("\n".join(sentences).encode(), digest_size=16)
        return "builtin", digest.hexdigest(), sentences
    sources = [source] if isinstance(source, str | Path) else list(source)
    if not sources:
        raise ValueError("no corpus: the list of text files is empty")
    if len(sources) == 1 and not _text_files(sources[0]):
        return _open_dataset(str(sources[0]), config, split, text_column)
    files = []
    for given in sources:
        found = _text_files(given)
        if not found:
            raise FileNotFoundError(
                f"no text in {given}: give text files, folders of .txt files, or one data set alone"
            )
        files += found
    return ", ".join(map(str, sources)), _hash_files(files), _file_paragraphs(files)


def _text_files(given: str | Path) -> list[Path]:
    """The text files that a path names; none if it is no path, or a folder without .txt for `datasets` to judge."""
    path = Path(given).expanduser()
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = sorted(path.rglob("*.txt"))
        if not files and not any(path.rglob("*.*")):
            raise FileNotFoundError(f"no text in {given}: the folder holds no .txt file")
    elif isinstance(given, Path) or given.startswith((".", "/", "~")) or path.suffix == ".txt":
        raise FileNotFoundError(f"no corpus at {given}: no such file or folder")
    else:
        files = []
    for file in files:
        if file.stat().st_size == 0:
            raise ValueError(f"{file} is empty; a corpus file holds a paragraph a line")
    return files


def _open_dataset(name: str, config: str | None, split: str, text_column: str) -> tuple[str, str, Iterable[str]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        raise FileNotFoundError(
            f"no corpus {name!r}: not a path here, and `datasets` says: {first_line(error)}"
        ) from error
    if text_column not in dataset.column_names:
        raise ValueError(f"corpus {name!r} has no column {text_column!r}, only {', '.join(dataset.column_names)}")
    paragraphs = (
        line for rows in dataset.select_columns(text_column).iter(_BATCH) for text in rows[text_column]
        for line in (text or "").splitlines()
    )  # fmt: skip
    return name, f"{dataset._fingerprint}/{text_column}", paragraphs


def _hash_files(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "blake2b").digest())
    return digest.hexdigest()


def _file_paragraphs(files: list[Path]) -> Iterator[str]:
    for file in files:
        offset = 0
        with open(file, "rb") as handle:
            for number, line in enumerate(handle, 1):
                try:
                    yield line.decode("utf-8").removeprefix("\ufeff")
                except UnicodeDecodeError as error:
                    where = f"{file}, line {number}, byte {offset + error.start}"
                    raise ValueError(f"{where}: not UTF-8 text; convert the file to UTF-8") from error
                offset += len(line)


def _tokenize(paragraphs: Iterable[str], tokenizer) -> Iterator[list[int]]:
    """Ids of each sentence. The space in front makes byte-level tokenizers read it as the middle of a text."""
    sentences = (" " + sentence for paragraph in paragraphs for sentence in split_sentences(paragraph))
    while batch := list(islice(sentences, _BATCH)):
        ids = tokenizer(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )["input_ids"]
        yield from (sentence for sentence in ids if sentence)


def _limited(sequences: Iterable[list[int]], limit_tokens: int | None) -> Iterator[list[int]]:
    total = 0
    for sequence in sequences:
        yield sequence
        total += len(sequence)
        if limit_tokens is not None and total >= limit_tokens:
            return


def _pieces(sequences: Iterator[list[int]], name: str) -> Iterator["Dataset"]:
    from datasets import Dataset, Features, List, Value

    features = Features({"input_ids": List(Value("int32")), "length": Value("int32")})
    empty = True
    while piece := list(islice(sequences, _PIECE)):
        empty = False
        yield Dataset.from_dict({"input_ids": piece, "length": [len(ids) for ids in piece]}, features=features)
    if empty:
        raise ValueError(f"corpus {name} is empty: it holds no text beside white space")
