"""SQuAD 1.1 and 2.0: rows, sliding windows over long contexts, and answers read back out of logits.

Everything hangs on character offsets into the context. A window keeps, for each of its tokens, the stretch of context
that the token covers, so any tokenizer that reports offsets (WordPiece, byte-level BPE) works alike, and an answer is
always cut from the original text, never put together from tokens.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from effbert.data.files import inner, parse_json, read_text, refuse_half
from effbert.data.glue import fetch
from effbert.data.tasks import Task, TaskSpec, plain_name
from effbert.metrics import EXACT

if TYPE_CHECKING:
    import datasets
    from transformers import BatchEncoding, PreTrainedTokenizerBase

NAMES = ("squad", "squad2.0")
HUB = {"squad": "rajpurkar/squad", "squad2.0": "rajpurkar/squad_v2"}
VERSIONS = {
    **dict.fromkeys(("squad", "squad1.1", "squadv1", "squadv1.1"), "1.1"),
    **dict.fromkeys(("squad2", "squad2.0", "squadv2", "squadv2.0"), "2.0"),
}
LONGEST_QUESTION = 64  # tokens kept of a question, unless said otherwise; never more than a quarter of the window
MOST_SHARED = 128  # tokens that neighbouring windows share, unless said otherwise; never more than a third of them


def load_task(name: str, data_dir: str | PathLike[str] | None = None) -> Task:
    """SQuAD from `data_dir` (holding train-v1.1.json and dev-v1.1.json, or -v2.0) or, without it, by `datasets` name.

    Training questions whose first answer is not where its offset says are left out and counted in the task's notes, as
    BERT's own code does; a validation question stays, since it is scored by its answers' text alone. Raises ValueError
    for an unknown name; FileNotFoundError or ValueError, with the place, for missing or bad files; FileNotFoundError
    where the data cannot be fetched.
    """
    spec = spec_of(name)
    if data_dir is None:
        splits = fetch(HUB[spec.name])
        train, validation = (splits[split].to_list() for split in ("train", "validation"))
        where = "the training split"
    else:
        path = _path(spec, data_dir, "train")
        train, validation = _read(path, spec.name == NAMES[1]), _read_validation(spec, data_dir)
        where = str(path)
    kept = [row for row in train if _found(row)]
    if not kept:
        raise ValueError(f"{where}: none of its {len(train)} first answers is at its answer_start")
    notes = ()
    if len(kept) < len(train):
        notes = (
            f"{where}: {len(train) - len(kept):,} of {len(train):,} questions left out: their first answer is not at "
            "its answer_start",
        )
    return Task(spec, _dataset(kept), _dataset(validation), notes)


def load_validation(name: str, data_dir: str | PathLike[str] | None = None) -> datasets.Dataset:
    """The validation questions of `load_task` alone: no other file is read."""
    spec = spec_of(name)
    if data_dir is None:
        return _dataset(fetch(HUB[spec.name])["validation"].to_list())
    return _dataset(_read_validation(spec, data_dir))


def load_questions(path: str | PathLike[str]) -> datasets.Dataset:
    """The questions of any file in the SQuAD layout, to be answered; answers may be absent, and stay unread."""
    return _dataset(_read(Path(path), version2=True, answers=False))


def spec_of(name: str) -> TaskSpec:
    """What SQuAD 1.1 or 2.0 asks; ValueError for an unknown name."""
    if plain_name(name) not in VERSIONS:
        raise ValueError(f"unknown SQuAD task {name!r}; choose from {', '.join(NAMES)}")
    version2 = VERSIONS[plain_name(name)] == "2.0"
    return TaskSpec(NAMES[version2], "spans", (), ("f1", EXACT[version2]), True)


def _path(spec: TaskSpec, data_dir: str | PathLike[str], split: str) -> Path:
    if not Path(data_dir).is_dir():
        raise FileNotFoundError(f"data_dir {data_dir}: no such folder")
    return inner(Path(data_dir), "squad") / f"{split}-v{VERSIONS[plain_name(spec.name)]}.json"


def _read_validation(spec: TaskSpec, data_dir: str | PathLike[str]) -> list[dict[str, Any]]:
    return _read(_path(spec, data_dir, "dev"), spec.name == NAMES[1])


def _found(row: Mapping[str, Any]) -> bool:
    """Whether the first answer can be learnt where its offset says, blanks around it aside: it lies within the context,
    and the words that it touches hold its text.

    The test of BERT's code, but for two things. There an offset on the blank after a word counts as that word, here
    nothing but what the answer touches counts, since that is what is learnt. And there some Unicode blanks part the
    words of an answer but not those of the context, so that an answer with a no-break space is never found.
    """
    if not row["answers"]["text"]:
        return True
    context, words = row["context"], row["answers"]["text"][0].split()
    start, end = _stretch(row["answers"])
    if start < len(context) - len(context.lstrip()) or end > len(context.rstrip()):
        return False
    touched = [word.group() for word in re.finditer(r"\S+", context) if word.start() < end and word.end() > start]
    return " ".join(words) in " ".join(touched)


def _stretch(answers: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    """First character of the first answer and the one behind its last, as its offset says, blanks around it aside."""
    text, start = answers["text"][0], answers["answer_start"][0]
    return start + len(text) - len(text.lstrip()), start + len(text.rstrip())


def references(dataset: datasets.Dataset) -> dict[str, list[str]]:
    """The accepted answers by question id, [] where the context holds none; see `effbert.metrics.squad_scores`."""
    return {key: list(answers["text"]) for key, answers in zip(dataset["id"], dataset["answers"], strict=True)}


def encode_spans(
    dataset: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int = 384,
    doc_stride: int = 0,
    max_query_length: int = 0,
) -> datasets.Dataset:
    """Question and context as windows of at most `max_length` tokens, which begin `doc_stride` tokens of context apart.

    doc_stride is BERT's: how many tokens neighbours share depends on the question's length; with 0 they share 128 (a
    third of `max_length` if that is less) whatever it is. The question is cut to `max_query_length` tokens, special
    ones not counted (BERT's code does not count them, EfficientBERT's counts two); 0: 64, or a quarter of `max_length`.

    One row a window, not padded: input_ids; token_type_ids if the tokenizer makes them; start_positions and
    end_positions, the first and last token of the first answer, both 0 (the CLS token) where this window does not hold
    all of it; example_index, the row of `dataset`; offset_start and offset_end, the characters of the context that
    each token covers, surrounding blanks excluded, -1 outside the context and for blanks. Raises ValueError for a
    tokenizer without offsets or without CLS in front, and as `check_windows` does.
    """
    from datasets import Dataset, Features, List, Value, concatenate_datasets

    if not tokenizer.is_fast:
        raise ValueError(f"{type(tokenizer).__name__} reports no character offsets: use its fast version for spans")
    check_windows(max_length, tokenizer.num_special_tokens_to_add(pair=True), doc_stride, max_query_length)
    longest = max_query_length or _usual_question(max_length)
    types = {"input_ids": List(Value("int32"))}
    if "token_type_ids" in tokenizer.model_input_names:
        types["token_type_ids"] = List(Value("int8"))
    types |= {name: Value("int32") for name in ("start_positions", "end_positions", "example_index")}
    types |= {name: List(Value("int32")) for name in ("offset_start", "offset_end")}
    parts = []
    for first in range(0, max(len(dataset), 1), 1000):
        examples = dataset.select(range(first, min(first + 1000, len(dataset)))).to_list()
        windows = _windows(examples, first, tokenizer, max_length, doc_stride, longest)
        columns = {name: [] for name in types}
        for window in windows:
            for name, column in columns.items():
                column.append(window[name])
        parts.append(Dataset.from_dict(columns, features=Features(types)))
    return concatenate_datasets(parts)


def check_windows(max_length: int, special_tokens: int, doc_stride: int = 0, max_query_length: int = 0) -> None:
    """ValueError, one line, where the windows of `encode_spans` would leave gaps beside the longest question, or hold
    no more context than they share."""
    for name, value in (("doc_stride", doc_stride), ("max_query_length", max_query_length)):
        if value < 0:
            raise ValueError(f"{name} is {value}: it must be at least 0")
    longest = max_query_length or _usual_question(max_length)
    room, least = max_length - longest - special_tokens, doc_stride or _usually_shared(max_length) + 1
    if room >= least:
        return
    beside = f"beside a question of {longest} tokens and {special_tokens} special ones"
    windows = f"windows of max_length {max_length} hold {max(room, 0)} tokens of context {beside}"
    if doc_stride and room > 0:
        raise ValueError(f"doc_stride is {doc_stride}, but {windows}: give at most {room}")
    name, value, right = "max_length", max_length, "a greater one"
    if max_query_length:
        name, value, right = "max_query_length", longest, f"at most {max(1, max_length - special_tokens - least)}"
    raise ValueError(f"{name} is {value}: {windows}, where {least} are needed: give {right}")


def _usual_question(max_length: int) -> int:
    return min(LONGEST_QUESTION, max_length // 4)


def _usually_shared(max_length: int) -> int:
    return min(MOST_SHARED, max_length // 3)


@dataclass(frozen=True)
class Prediction:
    """What the logits say to one question.

    n_best: texts with their scores (start + end logit), best first, no text twice; empty where no window holds context.
    null: the score of no answer, the smallest CLS score (start + end at token 0) over the windows.
    """

    n_best: tuple[tuple[str, float], ...]
    null: float

    @property
    def text(self) -> str:
        """The best span's text; "" where there is none."""
        return self.n_best[0][0] if self.n_best else ""

    @property
    def null_odds(self) -> float:
        """How much no answer is ahead of the best span, in logits."""
        return self.null - (self.n_best[0][1] if self.n_best else -np.inf)

    def answer(self, version2: bool, null_threshold: float = 0.0) -> str:
        """The text, or with `version2` "" where no answer is ahead by more than the threshold."""
        return "" if version2 and self.null_odds > null_threshold else self.text


def decode_spans(
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    features: datasets.Dataset,
    examples: datasets.Dataset,
    *,
    max_answer_length: int = 30,
    null_threshold: float = 0.0,
    version2: bool = False,
) -> dict[str, str]:
    """The best answer of each question by id; "" for none (where `version2`, or where a question has no window).

    As `predict_spans`; with `version2` the answer is "" where no answer is ahead of the best span by more than
    `null_threshold` (Devlin et al. 2018, section 4.3).
    """
    found = predict_spans(start_logits, end_logits, features, examples, max_answer_length=max_answer_length)
    return {key: prediction.answer(version2, null_threshold) for key, prediction in found.items()}


def predict_spans(
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    features: datasets.Dataset,
    examples: datasets.Dataset,
    *,
    max_answer_length: int = 30,
    n_best: int = 1,
) -> dict[str, Prediction]:
    """What the logits say to each question, by id.

    start_logits, end_logits: one row a window of `features` (as `encode_spans` made them from `examples`), each at
    least as long as the window, so padded batches serve as they are. The spans are the `n_best` of highest start + end
    over all windows and all spans of 1 to `max_answer_length` tokens of context, the exact maxima. Raises ValueError
    for another number of rows, or rows that are too short.
    """
    if not len(start_logits) == len(end_logits) == len(features):
        raise ValueError(f"{len(start_logits)} and {len(end_logits)} rows of logits for {len(features)} windows")
    spans: dict[int, list[tuple[float, int, int]]] = {}  # example index -> (score, first and last character)
    null: dict[int, float] = {}
    for start, end, window in zip(start_logits, end_logits, features, strict=True):
        example = window["example_index"]
        starts, ends = np.asarray(window["offset_start"]), np.asarray(window["offset_end"])
        if min(len(start), len(end)) < len(starts):
            raise ValueError(f"{min(len(start), len(end))} logits for a window of {len(starts)} tokens")
        null[example] = min(null.get(example, np.inf), float(start[0]) + float(end[0]))
        spans.setdefault(example, []).extend(
            (score, int(starts[first]), int(ends[last]))
            for score, first, last in _best_spans(start, end, starts >= 0, max_answer_length, n_best)
        )
    return {
        example["id"]: Prediction(_texts(spans.get(index, []), example["context"], n_best), null.get(index, np.inf))
        for index, example in enumerate(examples)
    }


def _texts(spans: list[tuple[float, int, int]], context: str, n_best: int) -> tuple[tuple[str, float], ...]:
    """The best spans as text, each text once; of equal scores the first."""
    found: dict[str, float] = {}
    for score, first, last in sorted(spans, key=lambda span: -span[0]):
        found.setdefault(context[first:last], score)
    return tuple(list(found.items())[:n_best])


def _best_spans(
    start: np.ndarray, end: np.ndarray, context: np.ndarray, longest: int, count: int
) -> list[tuple[float, int, int]]:
    """The `count` highest start + end with start <= end < start + longest over tokens where `context`, best first."""
    length = len(context)
    start = np.where(context, np.asarray(start, np.float64)[:length], -np.inf)
    end = np.where(context, np.asarray(end, np.float64)[:length], -np.inf)
    reach = np.lib.stride_tricks.sliding_window_view(np.append(end, np.full(longest - 1, -np.inf)), longest)
    total = (start[:, None] + reach).ravel()
    best = [int(total.argmax())] if count == 1 else np.argsort(-total, kind="stable")[:count].tolist()
    spans = ((float(total[place]), *divmod(place, longest)) for place in best)
    return [(score, first, first + more) for score, first, more in spans if score > -np.inf]


def _windows(
    examples: Sequence[Mapping[str, Any]],
    first_index: int,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    doc_stride: int,
    longest_question: int,
) -> Iterator[dict[str, Any]]:
    """The windows of `examples` in their order. The tokenizer takes one number of shared tokens a call, so questions
    that leave their windows the same share are encoded together."""
    if not examples:
        return
    questions = _cut_questions([example["question"] for example in examples], tokenizer, longest_question)
    found: list[list[dict[str, Any]]] = [[] for _ in examples]
    for shared, rows in _rows_by_share(questions, tokenizer, max_length, doc_stride).items():
        encoded = tokenizer(
            [questions[row] for row in rows],
            [examples[row]["context"] for row in rows],
            truncation="only_second",
            max_length=max_length,
            stride=shared,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding=False,
        )
        for window, place in enumerate(encoded["overflow_to_sample_mapping"]):
            row = rows[place]
            found[row].append(_window(encoded, window, examples[row], first_index + row, tokenizer))
    for windows in found:
        yield from windows


def _rows_by_share(
    questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, doc_stride: int
) -> dict[int, list[int]]:
    """Tokens that neighbouring windows share -> the questions for which they do."""
    if not doc_stride:
        return {_usually_shared(max_length): list(range(len(questions)))}
    room, rows = max_length - tokenizer.num_special_tokens_to_add(pair=True), {}
    for row, ids in enumerate(tokenizer(list(questions), add_special_tokens=False)["input_ids"]):
        shared = max(0, room - len(ids) - doc_stride)  # a cut question may have become a token longer
        rows.setdefault(shared, []).append(row)
    return rows


def _window(
    encoded: BatchEncoding, window: int, example: Mapping[str, Any], index: int, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    """One row of `encode_spans`, of the example that is row `index` of the data set."""
    input_ids = encoded["input_ids"][window]
    if tokenizer.cls_token_id is None or input_ids[0] != tokenizer.cls_token_id:
        raise ValueError(f"{type(tokenizer).__name__} puts no CLS token first, which stands for 'no answer here'")
    inside = [part == 1 for part in encoded.sequence_ids(window)]
    offsets = _context_offsets(encoded["offset_mapping"][window], inside, example["context"])
    start, end = _positions(offsets, example["context"], example["answers"])
    return {
        "input_ids": input_ids,
        "token_type_ids": encoded["token_type_ids"][window] if "token_type_ids" in encoded else None,
        "start_positions": start,
        "end_positions": end,
        "example_index": index,
        "offset_start": offsets[:, 0],
        "offset_end": offsets[:, 1],
    }


def _cut_questions(questions: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int) -> list[str]:
    """The questions' first `longest` tokens as text; of a character that is several tokens all or none."""
    questions = [question.strip() for question in questions]
    offsets = tokenizer(list(questions), add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [q[: o[longest][0]].rstrip() if len(o) > longest else q for q, o in zip(questions, offsets, strict=True)]


def _context_offsets(offsets: Sequence[tuple[int, int]], inside: Sequence[bool], context: str) -> np.ndarray:
    """[tokens, 2]; byte-level tokenizers may count the blank before a word to the word, so blanks are taken off."""
    result = np.full((len(offsets), 2), -1, np.int32)
    for token, (start, end) in enumerate(offsets):
        if inside[token]:
            piece = context[start:end]
            if piece.strip():
                result[token] = start + len(piece) - len(piece.lstrip()), start + len(piece.rstrip())
    return result


def _positions(offsets: np.ndarray, context: str, answers: Mapping[str, Sequence[Any]]) -> tuple[int, int]:
    """First and last token of the first answer, or (0, 0) where the window does not hold all of it."""
    tokens = np.flatnonzero(offsets[:, 0] >= 0)
    if not answers["text"] or not len(tokens):
        return 0, 0
    start, end = _stretch(answers)
    if offsets[tokens[0], 0] > start or offsets[tokens[-1], 1] < end:
        return 0, 0
    covering = tokens[(offsets[tokens, 0] < end) & (offsets[tokens, 1] > start)]
    return (int(covering[0]), int(covering[-1])) if len(covering) else (0, 0)


def _read(path: Path, version2: bool, answers: bool = True) -> list[dict[str, Any]]:
    content, rows = parse_json(path, read_text(path)), []
    for a, article in enumerate(_part(content, "data", list, f"{path}")):
        for p, paragraph in enumerate(_part(article, "paragraphs", list, f"{path}: data[{a}]")):
            where = f"{path}: data[{a}].paragraphs[{p}]"
            context = _part(paragraph, "context", str, where)
            for q, question in enumerate(_part(paragraph, "qas", list, where)):
                rows.append(_row(question, context, version2, f"{where}.qas[{q}]", answers))
    if not rows:
        raise ValueError(f"{path}: there are no questions")
    again = [key for key, count in Counter(row["id"] for row in rows).items() if count > 1]
    if again:
        raise ValueError(
            f"{path}: {len(again):,} ids are of several questions, such as {again[0]!r}: each needs its own"
        )
    return rows


def _row(question: Any, context: str, version2: bool, where: str, answers: bool) -> dict[str, Any]:
    texts, starts = [], []
    for number, answer in enumerate(_part(question, "answers", list, where) if answers else ()):
        place = f"{where}.answers[{number}]"
        text, start = _part(answer, "text", str, place), _part(answer, "answer_start", int, place)
        if not text.strip():
            raise ValueError(f"{place}: the answer is empty")
        if not -(2**31) <= start < 2**31:
            raise ValueError(f"{place}: 'answer_start' should be a place in the context, and has more than 32 bits")
        texts.append(text)
        starts.append(start)
    if not texts and not version2:
        raise ValueError(f"{where}: no answer, which only SQuAD 2.0 allows")
    return {
        "id": _part(question, "id", str, where),
        "question": _part(question, "question", str, where),
        "context": context,
        "answers": {"text": texts, "answer_start": starts},
    }


def _part(content: Any, key: str, kind: type, where: str) -> Any:
    """`content[key]`, which must be a `kind`, and text that can be written."""
    value = content.get(key) if isinstance(content, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{where}: not in the SQuAD layout, {key!r} should be a {kind.__name__}")
    if kind is str:
        refuse_half(value, f"{where}: {key!r}")
    return value


def _dataset(rows: Sequence[Mapping[str, Any]]) -> datasets.Dataset:
    from datasets import Dataset, Features, List, Value

    answers = {"text": List(Value("string")), "answer_start": List(Value("int32"))}
    types = {"id": Value("string"), "question": Value("string"), "context": Value("string"), "answers": answers}
    return Dataset.from_dict({name: [row[name] for row in rows] for name in types}, features=Features(types))
