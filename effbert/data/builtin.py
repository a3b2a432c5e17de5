"""English text that every Python has on board: the docstrings of the standard library and the pages of `help()`.

The one idea: prose is what survives a strict test, sentence by sentence. Docstrings are read from source with `ast`,
nothing is imported or run but `pydoc_data.topics`, which is a table; examples, tables, signatures and headings are
dropped line by line, and of the rest only what reads as an English sentence is kept. Two labelled tasks come from it:
`builtin-topic` (which part of the library does a sentence document) and `builtin-next` (does the second sentence
follow the first). Validation documents are held out of training, and of the corpus too. The text differs a little
between Python versions, so the numbers of two machines compare only where their Python is the same.
"""

import ast
import hashlib
import re
import sys
import sysconfig
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from effbert.data.cache import cached
from effbert.data.sentences import split_sentences
from effbert.random import generator

if TYPE_CHECKING:
    from effbert.data.tasks import Task

METRICS = ("accuracy",)
PARTS = ("interface", "internet", "language", "system")

_MODULES = {
    "interface": "argparse cmd code codeop curses getopt getpass gettext idlelib locale optparse pdb pyrepl readline"
    " rlcompleter shlex tkinter tty turtle turtledemo webbrowser",
    "internet": "asynchat asyncore cgi cgitb email ftplib html http imaplib ipaddress mailbox mailcap mimetypes netrc"
    " nntplib nturl2path poplib smtpd smtplib socket socketserver ssl telnetlib urllib uuid wsgiref xmlrpc",
    "language": "__future__ abc annotationlib ast bisect builtins collections collections_abc contextlib contextvars"
    " copy copyreg dataclasses dis enum functools graphlib heapq help imp importlib inspect keyword opcode operator"
    " py_abc py_warnings reprlib symtable token tokenize types typing warnings weakref weakrefset",
    "system": "asyncio bz2 compression concurrent ctypes dbm filecmp fileinput fnmatch genericpath glob gzip io logging"
    " lzma multiprocessing ntpath os pathlib pipes platform posixpath pty pyio queue sched selectors shutil"
    " signal site stat subprocess sysconfig tarfile tempfile threading threading_local zipfile zipimport",
}
_TEST_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_VALIDATION_SHARE = 0.13
_TRAIN_ROWS, _VALIDATION_ROWS = 6000, 1000
_SEED = 0


@dataclass(frozen=True)
class Document:
    """The prose of one module or help page. `passages` are its docstrings in source order, each a run of sentences.

    part: one of `PARTS`, or "" where the module belongs to none of them.
    """

    name: str
    part: str
    passages: tuple[tuple[str, ...], ...]

    @property
    def sentences(self) -> tuple[str, ...]:
        return tuple(sentence for passage in self.passages for sentence in passage)


def documents(cache_dir: str | Path | None = None) -> list[Document]:
    """Every document of this Python's standard library, sorted by name; no passage occurs twice.

    Reading and cleaning the sources takes some seconds, so the result is cached under the hash of the sources. Raises
    ValueError where this Python has no sources (a zipped or stripped installation).
    """
    return list(_documents(str(cache_dir) if cache_dir is not None else None))


def corpus_sentences(cache_dir: str | Path | None = None) -> list[str]:
    """All sentences of the training documents, in reading order; those the tasks validate on stay unseen."""
    found = documents(cache_dir)
    validation = _validation_names(found)
    return [sentence for document in found if document.name not in validation for sentence in document.sentences]


def load_task(name: str, cache_dir: str | Path | None = None) -> "Task":
    """`builtin-topic` or `builtin-next`, split by document, with no sentence on both sides, classes balanced.

    At most 6000 training and 1000 validation rows, the same at every call for one Python.
    """
    from effbert.data.tasks import Task, TaskSpec

    makers = {"builtin-topic": (_topic_rows, PARTS, False), "builtin-next": (_next_rows, ("not_next", "next"), True)}
    if name not in makers:
        raise ValueError(f"unknown built-in task {name!r}; there are {' and '.join(makers)}")
    rows, labels, pair = makers[name]
    found = documents(cache_dir)
    validation = _validation_names(found)
    copies = Counter(text for document in found for text in {s.lower() for s in document.sentences})
    splits = [
        rows(
            [d for d in found if (d.name in validation) == held_out],
            copies,
            size,
            "validation" if held_out else "train",
        )
        for held_out, size in ((False, _TRAIN_ROWS), (True, _VALIDATION_ROWS))
    ]
    spec = TaskSpec(name=name, kind="classification", labels=labels, metrics=METRICS, pair=pair)
    return Task(spec, *(_task_dataset(split, pair) for split in splits))


def _validation_names(found: list[Document]) -> set[str]:
    """Documents held out of training: of each part about 13 % of the sentences."""
    names = set()
    for part in ("", *PARTS):
        members = [document for document in found if document.part == part]
        wanted = _VALIDATION_SHARE * sum(len(document.sentences) for document in members)
        taken = 0
        for i in generator(_SEED, "builtin", "validation", part).permutation(len(members)):
            size = len(members[i].sentences)
            if taken + size <= 1.2 * wanted:
                names.add(members[i].name)
                taken += size
    return names


def _topic_rows(found: list[Document], copies: Counter, size: int, split: str) -> list[tuple]:
    """(sentence, part) for sentences of at least six words that occur in one document only."""
    of_part = {part: [] for part in PARTS}
    for document in found:
        if document.part:
            usable = (s for s in document.sentences if copies[s.lower()] == 1 and len(s.split()) >= 6)
            of_part[document.part] += list({s.lower(): s for s in usable}.values())
    count = min(size // len(PARTS), *map(len, of_part.values()))
    rng = generator(_SEED, "builtin", "topic", split)
    rows = []
    for part, sentences in of_part.items():
        rows += [(sentences[i], PARTS.index(part)) for i in rng.permutation(len(sentences))[:count]]
    return [rows[i] for i in rng.permutation(len(rows))]


def _next_rows(found: list[Document], copies: Counter, size: int, split: str) -> list[tuple]:
    """(first, second, follows), where all sentences occur in one document only. A false second one is any sentence that
    never follows the first: in half of the cases one of the same document, else of another."""
    lines = [(d.name, s) for d in found for s in dict.fromkeys(d.sentences) if copies[s.lower()] == 1]
    follow = {pair for document in found for passage in document.passages for pair in pairwise(passage)}
    spans = {}
    for i, (name, _) in enumerate(lines):
        spans[name] = (spans.get(name, (i, i))[0], i + 1)
    document_of = {sentence: name for name, sentence in lines}
    pairs = sorted(pair for pair in follow if document_of.keys() >= set(pair))
    rng = generator(_SEED, "builtin", "next", split)
    rows = []
    for i, row in enumerate(rng.permutation(len(pairs))[: size // 2 * 2]):
        first, second = pairs[row]
        follows = i % 2
        if not follows:
            start, end = spans[document_of[first]]
            near = [s for _, s in lines[start:end] if s != first and (first, s) not in follow]
            if near and rng.random() < 0.5:
                second = near[rng.integers(len(near))]
            else:
                far = rng.integers(len(lines) - (end - start))
                second = lines[far if far < start else far + end - start][1]
        rows.append((first, second, follows))
    return rows


def _task_dataset(rows: list[tuple], pair: bool):
    from datasets import Dataset, Features, Value

    names = ("text_a", "text_b", "label") if pair else ("text_a", "label")
    features = {name: Value("string") for name in names[:-1]} | {"label": Value("int64")}
    columns = {name: [row[i] for row in rows] for i, name in enumerate(names)}
    return Dataset.from_dict(columns, features=Features(features))


@cache
def _documents(cache_dir: str | None) -> tuple[Document, ...]:
    sources = dict(_sources())
    if not sources:
        raise ValueError(f"no built-in text: this Python has no .py sources under {sysconfig.get_path('stdlib')}")
    digest = hashlib.blake2b(digest_size=16)
    for content in [Path(__file__).read_bytes(), sys.version.encode(), *sources.values()]:
        digest.update(hashlib.blake2b(content).digest())
    rows = cached(("builtin-documents", digest.hexdigest()), lambda: _as_dataset(_read(sources)), cache_dir)
    return tuple(
        Document(row["name"], row["part"], tuple(tuple(passage) for passage in row["passages"])) for row in rows
    )


def _as_dataset(found: list[Document]):
    from datasets import Dataset, Features, List, Value

    columns = {
        "name": [document.name for document in found],
        "part": [document.part for document in found],
        "passages": [[list(passage) for passage in document.passages] for document in found],
    }
    features = Features({"name": Value("string"), "part": Value("string"), "passages": List(List(Value("string")))})
    return Dataset.from_dict(columns, features=features)


def _sources() -> Iterator[tuple[str, bytes]]:
    """Module name and source of every module, tests aside (many installations come without them), sorted by name."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = ((path.relative_to(root).with_suffix("").parts, path) for path in root.rglob("*.py"))
    for parts, path in sorted(paths):
        if parts[0] != "pydoc_data" and not _TEST_FOLDERS.intersection(parts) and not parts[0].startswith("_sysconfig"):
            yield ".".join(part for part in parts if part != "__init__"), path.read_bytes()


def _read(sources: dict[str, bytes]) -> list[Document]:
    from pydoc_data.topics import topics

    texts = {f"help.{topic}": [page] for topic, page in topics.items()}
    texts |= {name: list(_docstrings(source)) for name, source in sources.items()}
    found, seen = [], set()
    for name, docstrings in sorted(texts.items()):
        passages = []
        for docstring in docstrings:
            passage = tuple(prose(docstring))
            if passage and passage not in seen:
                seen.add(passage)
                passages.append(passage)
        if passages:
            found.append(Document(name, _part(name), tuple(passages)))
    return found


def _part(name: str) -> str:
    top = name.split(".")[0]
    return next((part for part in PARTS if {top, top.lstrip("_")} & set(_MODULES[part].split())), "")


def _docstrings(source: bytes) -> Iterator[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # a few files are broken on purpose
            return
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if text := ast.get_docstring(node):
                yield text
        children = [child for name in ("body", "orelse", "handlers", "finalbody") for child in getattr(node, name, ())]
        stack.extend(child for child in reversed(children) if hasattr(child, "body"))


_RULE = re.compile(r"\s*([-=~*_^#+.`\"|<>]\s*){3,}$")
_TABLE = re.compile(r"\S(\s{3,}|\t)\S|^\s*[|+]|\|\s*$|::=")
_EXAMPLE = re.compile(r"\s*(>>>|\.\.\. |\$ |\.\. )")
_ITEM = re.compile(r"\s*([-*+o•]|\(?\d{1,2}[.)]|\(?[a-z]\)|@\w+( \w+)?:|:\w+( \w+)?:)\s+")
_LEAD = re.compile(r"^[\w.*]+(\([^()]*\))?(\s*->\s*[\w\[\], .]+?)?(\s*--?\s+|:\s+)")
_SIGNATURE = re.compile(r"^[\w.]+\(.*?\)\s*(->\s*[\w\[\], ]+)?\s*[.:]?\s*(?=[A-Z]|$)")
_ROLE = re.compile(r":(\w+:)?\w+:`~?([^`]*)`")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(\w[^*\n]*?\w|\w)\*{1,2}(?![\w*])")
_PLAIN = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "—": "-", "–": "-", "…": "...", "\u00a0": " "})
_WORD = re.compile(r"""["'(]*[A-Za-z][a-z]*(['-][A-Za-z]?[a-z]*)*["')]*[.,;:?!)"']*$|[AI][,.]?$""")
_COMMON = frozenset(
    "a an the this that these those it its he you we they i is are was were be been being has have had do does did can"
    " could may might must shall should will would not no and or but if then else when while where which who what how"
    " because so as than of in on at to from by with without for into over under about after before between through"
    " all any each every some same other more most only also such there here use used using returns return".split()
)


def prose(text: str) -> Iterator[str]:
    """The English sentences of a docstring or help page, in order, each on one line and ending in a mark."""
    for paragraph in _paragraphs(text):
        line = _SIGNATURE.sub("", _LEAD.sub("", _clean(paragraph)))
        for sentence in split_sentences(line):
            if sentence[-1] not in ".?!" and sentence[-2:] not in ('."', ".)", ".'", '!"', '?"'):
                sentence = sentence.rstrip(":;,-") + "."
            if _is_prose(sentence):
                yield sentence


def _clean(paragraph: str) -> str:
    paragraph = _ROLE.sub(r"\2", paragraph.translate(_PLAIN))
    paragraph = _EMPHASIS.sub(r"\1", paragraph).replace("``", "").replace("`", "'").replace(" -- ", " - ")
    return " ".join(paragraph.split())


def _paragraphs(text: str) -> Iterator[str]:
    """Runs of lines that belong together: examples, tables, rules and the headings above rules are left out."""
    lines, indent, in_example = [], 0, False
    for line in [*text.splitlines(), ""]:
        stripped = line.strip()
        depth = len(line) - len(line.lstrip())
        if _RULE.match(line):
            lines = []
            continue
        in_example = bool(stripped) and (in_example or bool(_EXAMPLE.match(line)))
        item = _ITEM.match(line)
        drop = not stripped or in_example or _TABLE.search(stripped)
        if lines and (drop or item or depth < indent):
            yield " ".join(lines)
            lines = []
        if not drop:
            indent = min(depth, indent) if lines else depth
            lines.append(line[item.end() :].strip() if item else stripped)


def _is_prose(sentence: str) -> bool:
    words = sentence.split()
    if not 4 <= len(words) <= 60 or not sentence.isascii() or re.search(r"[{}=|\\]|[<>^~@$%_#]{2}| : ", sentence):
        return False
    plain = sum(bool(_WORD.match(word)) for word in words)
    common = sum(word.strip("\"'().,;:?!").lower() in _COMMON for word in words)
    return plain >= 0.75 * len(words) and common >= max(1, 0.12 * len(words))
