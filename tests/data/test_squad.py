"""SQuAD: files in the official layout, answers through windows and back, with WordPiece and byte-level BPE."""

import json
import re
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import BertWordPieceTokenizer, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from effbert.data.squad import (
    _cut_questions,
    _dataset,
    _found,
    decode_spans,
    encode_spans,
    load_questions,
    load_validation,
    predict_spans,
    references,
)
from effbert.data.tasks import load_task
from effbert.metrics import EXACT, squad2_scores, squad_scores

REAL = Path(__file__).parents[3] / "shared" / "data"
WORDS = [
    "Ada",
    "wrote",
    "the",
    "first",
    "programme",
    "in",
    "1843,",
    "not",
    "Babbage.",
    "(Café",
    "Zoë)",
    "日本",
    "naïve",
]


def wordpiece() -> PreTrainedTokenizerFast:
    backend = BertWordPieceTokenizer(lowercase=True)
    backend.train_from_iterator(WORDS[:9], vocab_size=60, min_frequency=1, show_progress=False)
    return BertTokenizerFast(tokenizer_object=backend._tokenizer)


def byte_bpe(trim_offsets: bool) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<s>", "<pad>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([" ".join(WORDS[:9])] * 3, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=trim_offsets)
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=["input_ids", "attention_mask"], **names)


TOKENIZERS = {"wordpiece": wordpiece(), "bpe": byte_bpe(False), "bpe trimmed": byte_bpe(True)}


def example(context: str, text: str | None, start: int = 0, key: str = "q", question: str = "  Who wrote it?"):
    answers = {"text": [], "answer_start": []} if text is None else {"text": [text], "answer_start": [start]}
    return {"id": key, "question": question, "context": context, "answers": answers}


def oracle_logits(features, score=5.0):
    """Logits, padded by 3, of a model that knows the answer: one peak each, at CLS where the window has none."""
    starts, ends = [], []
    for window in features:
        start, end = (np.zeros(len(window["input_ids"]) + 3, np.float32) for _ in "se")
        start[window["start_positions"]] = end[window["end_positions"]] = score
        starts.append(start)
        ends.append(end)
    return starts, ends


@st.composite
def marked_contexts(draw):
    """A context with odd spacing, and an answer of whole words in it."""
    words = draw(st.lists(st.sampled_from(WORDS), min_size=1, max_size=60))
    first = draw(st.integers(0, len(words) - 1))
    last = min(len(words), first + draw(st.integers(1, 3)))
    blanks = draw(st.lists(st.sampled_from([" ", "  ", "\n", "\u00a0"]), min_size=len(words), max_size=len(words)))
    pieces = [word + blank for word, blank in zip(words, blanks, strict=True)]
    return "".join(pieces), "".join(pieces[first:last]).strip(), len("".join(pieces[:first]))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(marked=marked_contexts())
def test_answers_come_back_exactly_through_windows(name, marked):
    examples = _dataset([example("Nothing here.", None, key="other"), example(*marked)])
    features = encode_spans(examples, TOKENIZERS[name], max_length=96, doc_stride=20)
    for window in features:
        inside = [token for token, end in enumerate(window["offset_end"]) if end >= 0]
        assert len(window["input_ids"]) <= 96 and inside and window["input_ids"][0] == TOKENIZERS[name].cls_token_id
        if window["start_positions"]:
            context = examples[window["example_index"]]["context"]
            assert inside[0] <= window["start_positions"] <= window["end_positions"] <= inside[-1]
            start, end = (
                window["offset_start"][window["start_positions"]],
                window["offset_end"][window["end_positions"]],
            )
            assert context[start:end] == marked[1]
    assert any(window["start_positions"] for window in features)
    answers = decode_spans(*oracle_logits(features), features, examples, max_answer_length=48)
    assert answers["q"] == marked[1]


CONTEXT = " ".join(WORDS * 8)
QUESTIONS = ("Who?", "Who wrote it first, and when?", "wrote " * 40, "?", "日本 " * 20)  # the longer ones are cut


def windows_of(questions, name, **settings):
    """For each question the context's tokens in each of its windows, in a data set of several lengths; the features."""
    tokenizer = TOKENIZERS[name]
    rows = [example(CONTEXT, None, key=str(n), question=question) for n, question in enumerate(questions)]
    features = encode_spans(_dataset(rows), tokenizer, **settings)
    assert features["example_index"] == sorted(features["example_index"])
    whole = tokenizer(CONTEXT, add_special_tokens=False)["input_ids"]
    found = [[] for _ in rows]
    for window in features:
        ids, end = window["input_ids"], len(window["input_ids"]) - 1
        inside = [token for token, place in enumerate(window["offset_end"]) if place >= 0]
        before = len(ids) - 1 - ids[:-1][::-1].index(tokenizer.sep_token_id)  # the context begins after the middle SEP
        assert inside[0] in (before, before + 1)  # a blank of its own may come first
        found[window["example_index"]].append(ids[before:end])
    return found, whole, features


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("doc_stride", [1, 7, 45])
def test_windows_begin_a_stride_apart_and_cover_the_context_whatever_the_questions_length(name, doc_stride):
    special = TOKENIZERS[name].num_special_tokens_to_add(pair=True)
    settings = {"max_length": 64 + special - 3, "doc_stride": doc_stride}
    found, whole, features = windows_of(QUESTIONS, name, **settings)
    rooms = set()
    for windows in found:
        room = len(windows[0])
        assert len(windows) > 1 and all(len(window) == room for window in windows[:-1])
        assert windows == [whole[doc_stride * n :][:room] for n in range(len(windows))]
        last = doc_stride * (len(windows) - 1)
        assert last + len(windows[-1]) == len(whole) > last - doc_stride + room  # all of it, and no window too many
        rooms.add(room)
    assert len(rooms) > 2 and min(rooms) >= 45
    covered = {place for row in features for pair in zip(row["offset_start"], row["offset_end"], strict=True)
               for place in range(*pair)}  # fmt: skip
    assert covered == {place for place, letter in enumerate(CONTEXT) if not letter.isspace()}
    assert ("token_type_ids" in features.column_names) == (name == "wordpiece")


@pytest.mark.parametrize("name", TOKENIZERS)
def test_without_a_stride_neighbours_share_a_third_of_the_window_whatever_the_questions_length(name):
    found, whole, _ = windows_of(QUESTIONS, name, max_length=66)
    for windows in found:
        assert len(windows) > 1
        assert all(before[-22:] == after[:22] for before, after in pairwise(windows))
        assert len(whole) == sum(len(window) - 22 for window in windows) + 22


def test_windows_begin_as_in_berts_code():
    """Its loop, over the tokens of a context, with the published numbers."""
    tokenizer, context = TOKENIZERS["wordpiece"], " ".join(WORDS * 9)
    rows = [example(context, None, key=str(n), question="wrote " * n) for n in range(0, 80, 5)]
    features = encode_spans(_dataset(rows), tokenizer, max_length=128, doc_stride=32, max_query_length=62)
    whole, expected = tokenizer(context, add_special_tokens=False)["input_ids"], []
    for row in rows:
        question = tokenizer(row["question"], add_special_tokens=False)["input_ids"][:62]
        start, room = 0, 128 - len(question) - 3
        while start < len(whole):
            part = whole[start : start + room]
            expected.append([2, *question, 3, *part, 3])
            if start + len(part) == len(whole):
                break
            start += min(len(part), 32)
    assert (tokenizer.cls_token_id, tokenizer.sep_token_id) == (2, 3) and features["input_ids"] == expected


def test_a_long_question_is_cut_to_what_is_asked_for():
    tokenizer = TOKENIZERS["wordpiece"]
    rows = [example("Ada wrote it.", "Ada", question=question) for question in ("wrote Babbage " * 50, "the first")]
    for longest in (1, 9, 40):
        features = encode_spans(_dataset(rows), tokenizer, max_length=128, max_query_length=longest)
        uncut = [tokenizer(row["question"], add_special_tokens=False)["input_ids"] for row in rows]
        for window, question in zip(features, uncut, strict=True):
            assert window["input_ids"][1 : window["input_ids"].index(tokenizer.sep_token_id)] == question[:longest]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(question=st.text(st.sampled_from("aA wW日é'r, "), max_size=60), longest=st.integers(1, 12))
def test_a_cut_question_is_no_longer_than_asked_for_and_begins_the_whole_one(name, question, longest):
    (cut,) = _cut_questions([question], TOKENIZERS[name], longest)
    whole, kept = (TOKENIZERS[name](text, add_special_tokens=False)["input_ids"] for text in (question.strip(), cut))
    assert question.strip().startswith(cut) and len(kept) <= longest
    assert kept == whole or len(whole) > longest


def test_an_answer_cut_by_the_window_is_no_answer_there():
    context = " ".join(["wrote"] * 200)
    tokenizer = TOKENIZERS["wordpiece"]
    examples = _dataset([example(context, context)])
    features = encode_spans(examples, tokenizer, max_length=64, doc_stride=32)
    assert set(features["start_positions"]) == {0} and set(features["end_positions"]) == {0}


def test_a_long_question_is_cut_to_a_quarter_of_the_window():
    long = example("Ada wrote it.", "Ada", question="wrote " * 500)
    features = encode_spans(_dataset([long]), TOKENIZERS["wordpiece"], max_length=64)
    assert len(features) == 1
    assert features[0]["offset_end"].count(-1) == 16 + 3
    assert features[0]["start_positions"] == 18


def test_no_rows_make_no_windows():
    features = encode_spans(_dataset([]), TOKENIZERS["wordpiece"])
    assert len(features) == 0 and "offset_start" in features.column_names


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"doc_stride": -1}, "doc_stride is -1: it must be at least 0"),
        ({"max_query_length": -1}, "max_query_length is -1: it must be at least 0"),
        ({"doc_stride": 46}, "doc_stride is 46, but .* 45 tokens .* beside a question of 16 .*: give at most 45"),
        ({"doc_stride": 42, "max_query_length": 20}, "doc_stride is 42, but .*: give at most 41"),
        ({"doc_stride": 32, "max_query_length": 62}, "max_query_length is 62: .* hold 0 tokens .*: give at most 29"),
        ({"max_query_length": 40}, "max_query_length is 40: .* where 22 are needed: give at most 39"),
        ({"max_length": 6}, "max_length is 6: .* hold 2 tokens .*: give a greater one"),
    ],
)
def test_windows_that_would_leave_gaps_are_refused(settings, says):
    settings = {"max_length": 64, **settings}
    with pytest.raises(ValueError, match=says) as caught:
        encode_spans(_dataset([example("Ada", "Ada")]), TOKENIZERS["wordpiece"], **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("settings", [{"doc_stride": 45}, {"doc_stride": 1, "max_query_length": 60}])
def test_the_widest_that_is_advised_is_taken(settings):
    rows = [example(CONTEXT, None, question="wrote " * 200)]
    features = encode_spans(_dataset(rows), TOKENIZERS["wordpiece"], max_length=64, **settings)
    assert len(features) > 3 and {len(row) for row in features["input_ids"][:-1]} == {64}


def test_the_best_span_is_the_exact_maximum_over_all_spans():
    examples = _dataset([example(" ".join(WORDS), None)])
    features = encode_spans(examples, TOKENIZERS["wordpiece"], max_length=128)
    window, rng = features[0], np.random.default_rng(0)
    tokens = [token for token, end in enumerate(window["offset_end"]) if end >= 0]
    for _ in range(20):
        start, end = rng.normal(size=(2, 1, len(window["input_ids"])))
        spans = [(a, b) for a in tokens for b in tokens if a <= b < a + 4]
        a, b = max(spans, key=lambda span: start[0, span[0]] + end[0, span[1]])
        answer = decode_spans(start, end, features, examples, max_answer_length=4)["q"]
        assert answer == examples[0]["context"][window["offset_start"][a] : window["offset_end"][b]]


def test_no_answer_needs_version_2_and_a_margin_above_the_threshold():
    examples = _dataset([example("Ada wrote it.", "Ada")])
    features = encode_spans(examples, TOKENIZERS["wordpiece"])
    start, end = oracle_logits(features, score=1.0)
    start[0][0] = end[0][0] = 2.0
    decode = lambda **settings: decode_spans(start, end, features, examples, **settings)["q"]  # noqa: E731
    assert decode() == "Ada"
    assert decode(version2=True) == ""
    assert decode(version2=True, null_threshold=2.0) == "Ada"
    assert decode(version2=True, null_threshold=1.9) == ""


def test_one_window_sure_of_an_answer_outvotes_windows_without():
    """The null score is the smallest over the windows: a window that lacks the answer says nothing of the others."""
    examples = _dataset([example(" ".join(["wrote"] * 100 + ["Ada"]), "Ada", 600)])
    features = encode_spans(examples, TOKENIZERS["wordpiece"], max_length=64, doc_stride=32)
    assert len(features) > 1
    assert decode_spans(*oracle_logits(features), features, examples, version2=True) == {"q": "Ada"}


def test_logits_must_fit_the_windows():
    examples = _dataset([example("Ada wrote it.", "Ada")])
    features = encode_spans(examples, TOKENIZERS["wordpiece"])
    with pytest.raises(ValueError, match="0 and 0 rows of logits for 1 windows"):
        decode_spans([], [], features, examples)
    with pytest.raises(ValueError, match="2 logits for a window"):
        decode_spans([np.zeros(2)], [np.zeros(2)], features, examples)


def official(*questions, context="Ada wrote the first programme."):
    paragraph = {"context": context, "qas": list(questions)}
    return {"version": "x", "data": [{"title": "t", "paragraphs": [paragraph]}]}


GOOD = {"id": "1", "question": "Who?", "answers": [{"text": "Ada", "answer_start": 0}]}
NONE = {
    **{"id": "2", "question": "When?", "answers": [], "is_impossible": True},
    "plausible_answers": [{"text": "first", "answer_start": 14}],
}


def write(folder, version, content, split=None):
    for name in (split,) if split else ("train", "dev"):
        (folder / f"{name}-v{version}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["squad", "SQuAD1.1", "squad-v1.1"])
def test_version_1_files_load(name, tmp_path):
    write(tmp_path, "1.1", official(GOOD))
    task = load_task(name, tmp_path)
    assert task.spec.name == "squad" and task.spec.kind == "spans" and task.spec.metrics[0] == "f1"
    assert task.train[0] == example("Ada wrote the first programme.", "Ada", key="1", question="Who?")


@pytest.mark.parametrize("name", ["squad2.0", "squad_v2", "SQuAD-v2.0"])
def test_version_2_files_load_with_impossible_questions(name, tmp_path):
    write(tmp_path, "2.0", official(GOOD, NONE))
    task = load_task(name, tmp_path)
    assert task.spec.name == "squad2.0"
    assert references(task.validation) == {"1": ["Ada"], "2": []}


def test_by_name_gives_the_rows_of_the_files(tmp_path, monkeypatch):
    write(tmp_path, "2.0", official(GOOD, NONE))
    local = load_task("squad2.0", tmp_path)
    split = local.train.add_column("title", ["t", "t"])
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments[0])
        return {"train": split, "validation": split}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_task("squad_v2").validation[:] == local.validation[:]
    assert load_task("squad").spec.name == "squad"
    assert asked == ["rajpurkar/squad_v2", "rajpurkar/squad"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([], r"train-v1.1.json: not in the SQuAD layout, 'data' should be a list"),
        ({"data": [{"title": "t"}]}, r"data\[0\]: not in the SQuAD layout, 'paragraphs' should be a list"),
        (official({**GOOD, "answers": None}), r"data\[0\].paragraphs\[0\].qas\[0\]: .*'answers'"),
        (official({**GOOD, "answers": [{"text": "Ada", "answer_start": 4}]}), "none of its 1 first answers is at its"),
        (official({**GOOD, "answers": [{"text": "Ada", "answer_start": -30}]}), "none of its 1 first answers is at"),
        (official({**GOOD, "answers": [{"text": " ", "answer_start": 3}]}), r"qas\[0\].answers\[0\]: .* is empty"),
        (
            official({**GOOD, "answers": [{"text": "Ada", "answer_start": 2**31}]}),
            r"answers\[0\]: 'answer_start' .* 32 b",
        ),
        (official({**GOOD, "answers": [{"text": "Ada", "answer_start": True}]}), "'answer_start' should be a int"),
        (official({**GOOD, "question": "\ud83d?"}), r"qas\[0\]: 'question' holds \\ud83d, half of a character"),
        (official(GOOD, context="Ada \ude00"), r"train-v1.1.json: data\[0\].paragraphs\[0\]: 'context' holds \\ude00"),
        (official(GOOD, NONE), r"qas\[1\]: no answer, which only SQuAD 2.0 allows"),
        (official(), r"train-v1.1.json: there are no questions"),
        (official(GOOD, GOOD), r"train-v1.1.json: 1 ids are of several questions, such as '1': each needs its own$"),
    ],
)
def test_bad_layout_is_named_by_its_place(content, says, tmp_path):
    write(tmp_path, "1.1", official(GOOD))
    write(tmp_path, "1.1", content, "train")
    with pytest.raises(ValueError, match=says) as caught:
        load_task("squad", tmp_path)
    assert "\n" not in str(caught.value)


def test_training_questions_with_a_wrong_offset_are_left_out_and_counted(tmp_path):
    """Blanks and part-word offsets are no reason; validation questions stay, their answers' text is all that counts."""
    answers = [("Ada", 4), ("Ada  wrote", 0), ("rote the", 5), ("first", 500), ("first", -3)]
    rows = [
        {"id": str(n), "question": "?", "answers": [{"text": t, "answer_start": s}]} for n, (t, s) in enumerate(answers)
    ]
    write(tmp_path, "1.1", official(*rows))
    task = load_task("squad", tmp_path)
    assert task.train["id"] == ["1", "2"] and task.validation["id"] == ["0", "1", "2", "3", "4"]
    (note,) = task.notes
    assert note.endswith("train-v1.1.json: 3 of 5 questions left out: their first answer is not at its answer_start")
    assert encode_spans(task.validation, TOKENIZERS["wordpiece"])["start_positions"][4] == 0
    write(tmp_path, "1.1", official(GOOD))
    assert load_task("squad", tmp_path).notes == ()


@pytest.mark.parametrize(
    ("context", "text", "start"),
    [
        ("Ada wrote the first programme.", "programme.", 23),  # runs on behind the context
        ("Ada wrote it  ", "it", 11),  # into the blanks behind its text
        ("  Ada wrote it", "Ada", 1),  # begins in those before it
    ],
)
def test_an_answer_that_reaches_out_of_the_context_is_left_out(context, text, start, tmp_path):
    """No window could hold all of it, so that each would teach that there is no answer."""
    good = {**GOOD, "answers": [{"text": "Ada", "answer_start": context.index("Ada")}]}
    wrong = {"id": "2", "question": "?", "answers": [{"text": text, "answer_start": start}]}
    write(tmp_path, "1.1", official(good, wrong, context=context))
    assert load_task("squad", tmp_path).train["id"] == ["1"]


def berts_code_keeps(context: str, text: str, start: int) -> bool:
    """Its test of an answer; IndexError where the answer runs out of the context."""
    word = [len(context[: place + 1].split()) - 1 for place in range(len(context))]  # a blank is in the word before it
    touched = context.split()[word[start] : word[start + len(text) - 1] + 1]
    return " ".join(text.split()) in " ".join(touched)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["the", "cat", "sat", "(cat)", "on"]), min_size=1, max_size=6),
    st.sampled_from([" ", "\n", "  "]),
    st.sampled_from(["", " ", "\n "]),
    st.sampled_from(["cat", "sat", "cat sat", "the cat"]),
    st.integers(-4, 30),
)
def test_a_kept_answer_is_one_that_berts_code_keeps_and_a_window_teaches(words, blank, edge, text, start):
    context = edge + blank.join(words) + edge
    row = example(context, text, start)
    if _found(row):
        assert berts_code_keeps(context, text, start)
        (window,) = encode_spans(_dataset([row]), TOKENIZERS["wordpiece"])
        assert 0 < window["start_positions"] <= window["end_positions"]


def test_a_no_break_space_parts_words_in_answer_and_context_alike(tmp_path):
    answer = {"id": "1", "question": "?", "answers": [{"text": "10\u00a0km", "answer_start": 8}]}
    write(tmp_path, "1.1", official(answer, context="She ran 10\u00a0km away."))
    assert load_task("squad", tmp_path).train["id"] == ["1"]


def test_validation_and_questions_are_read_alone(tmp_path):
    write(tmp_path, "2.0", official(GOOD, NONE), "dev")
    assert references(load_validation("squad2.0", tmp_path)) == {"1": ["Ada"], "2": []}
    bare = {key: value for key, value in GOOD.items() if key != "answers"}
    write(tmp_path, "2.0", official(bare), "dev")
    with pytest.raises(ValueError, match=r"qas\[0\]: not in the SQuAD layout, 'answers'"):
        load_validation("squad2.0", tmp_path)
    assert load_questions(tmp_path / "dev-v2.0.json")["question"] == ["Who?"]
    write(tmp_path, "2.0", official(bare, NONE, {**bare, "question": "Who else?"}), "dev")
    with pytest.raises(ValueError, match=r"dev-v2\.0\.json: 1 ids are of several questions, such as '1'"):
        load_questions(tmp_path / "dev-v2.0.json")


def test_the_n_best_are_the_highest_spans_over_all_windows_each_text_once():
    examples = _dataset([example(" ".join(["wrote"] * 40 + ["Ada", "the", "first"]), None)])
    features = encode_spans(examples, TOKENIZERS["wordpiece"], max_length=64, doc_stride=24)
    rng = np.random.default_rng(0)
    start, end = ([rng.normal(size=len(window["input_ids"])) for window in features] for _ in "se")
    every: dict[str, float] = {}
    for window, s, e in zip(features, start, end, strict=True):
        tokens = [token for token, place in enumerate(window["offset_end"]) if place >= 0]
        for a in tokens:
            for b in tokens:
                if a <= b < a + 3:
                    text = examples[0]["context"][window["offset_start"][a] : window["offset_end"][b]]
                    every[text] = max(every.get(text, -np.inf), s[a] + e[b])
    wanted = sorted(every.items(), key=lambda item: -item[1])
    found = predict_spans(start, end, features, examples, max_answer_length=3, n_best=400)["q"]
    assert [text for text, _ in found.n_best] == [text for text, _ in wanted]
    assert [score for _, score in found.n_best] == pytest.approx([score for _, score in wanted])
    assert found.null == pytest.approx(min(s[0] + e[0] for s, e in zip(start, end, strict=True)))
    assert found.null_odds == pytest.approx(found.null - wanted[0][1])
    assert len(predict_spans(start, end, features, examples, n_best=2)["q"].n_best) == 2


def test_missing_and_broken_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_task("squad", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"train-v2.0.json: no such file"):
        load_task("squad2.0", tmp_path)
    write(tmp_path, "1.1", official(GOOD))
    (tmp_path / "dev-v1.1.json").write_text('{"data":\n [}')
    with pytest.raises(ValueError, match=r"dev-v1.1.json:2: not JSON"):
        load_task("squad", tmp_path)
    (tmp_path / "dev-v1.1.json").write_bytes(b'{"data":\n "\xff"}')
    with pytest.raises(ValueError, match=r"dev-v1.1.json:2: byte 0xff"):
        load_task("squad", tmp_path)


def real(path: str) -> Path:
    if not (REAL / path).exists():
        pytest.skip(f"no data at {REAL / path}")
    return REAL / path


@pytest.mark.shared
@pytest.mark.parametrize(("name", "rows"), [("squad", (10822, 1055)), ("squad2.0", (1050, 699))])
def test_the_real_files_load_whole(name, rows):
    task = load_task(name, real("squad"))
    assert (len(task.train), len(task.validation)) == rows
    impossible = sum(not accepted for accepted in references(task.validation).values())
    assert (impossible > 0) == (name == "squad2.0")
    assert task.notes == ()


@pytest.mark.shared
def test_the_scores_of_the_real_questions_by_hand():
    """321 of 699 have an answer; the model knows all of them, doubts every tenth and is sure of one that has none."""
    accepted = references(load_validation("squad2.0", real("squad")))
    known = [key for key, texts in accepted.items() if texts]
    none = [key for key, texts in accepted.items() if not texts]
    answers = {key: f"The {accepted[key][-1]}!" for key in known} | dict.fromkeys(none, "something")
    odds = dict.fromkeys(known, -1.0) | dict.fromkeys(known[::10], 0.5) | dict.fromkeys(none, 1.0) | {none[0]: -2.0}
    scores = squad2_scores(answers, odds, accepted)
    doubted = len(known[::10])
    assert (scores["HasAns_total"], scores["NoAns_total"], doubted) == (321, 378, 33)
    assert scores["HasAns_exact"] == scores["HasAns_f1"] == (321 - 33) / 321
    assert scores["NoAns_exact"] == scores["NoAns_f1"] == 377 / 378
    assert scores["exact"] == scores["f1"] == pytest.approx((321 - 33 + 377) / 699)
    assert scores["best_exact"] == scores["best_f1"] == pytest.approx(698 / 699)
    assert scores["best_exact_thresh"] == scores["best_f1_thresh"] == 0.5


@pytest.mark.shared
@pytest.mark.parametrize("name", ["squad", "squad2.0"])
def test_real_answers_come_back_exactly_from_bert_windows(name):
    """Exactly wherever the answer ends where words end; an answer cut out of a word grows to that word."""
    vocabulary = real("vocab/bert-base-uncased-vocab.txt")
    tokenizer = BertTokenizerFast(tokenizer_object=BertWordPieceTokenizer(str(vocabulary), lowercase=True)._tokenizer)
    examples = load_task(name, real("squad")).validation.select(range(400))
    features = encode_spans(examples, tokenizer, max_length=160, doc_stride=50)
    assert len(features) > 400
    answers = decode_spans(*oracle_logits(features), features, examples, version2=name == "squad2.0")
    whole_words = 0
    for row in examples:
        if not row["answers"]["text"]:
            assert answers[row["id"]] == ""
            continue
        text, start = row["answers"]["text"][0], row["answers"]["answer_start"][0]
        assert text in answers[row["id"]]
        around = row["context"][max(start - 1, 0) : start + 1], row["context"][start + len(text) - 1 :][:2]
        if not any(re.fullmatch(r"\w\w", edge) for edge in around):
            whole_words += 1
            assert answers[row["id"]] == text
    assert whole_words > 150
    assert squad_scores(answers, references(examples), name == "squad2.0")[EXACT[name == "squad2.0"]] > 0.98
