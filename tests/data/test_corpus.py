import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from commands import Command
from effbert.data import corpus as module
from effbert.data.batches import Rows
from effbert.data.corpus import cut_pair, in_order, load_corpus, pack, pair_up, sentences_of
from effbert.data.tokenizer import train_wordpiece

LINES = [
    "The first sentence is here. A second one follows it.",
    "",
    "Another paragraph, a little longer than that one.",
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(LINES, 120)


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("\n".join(LINES[:2]), encoding="utf-8-sig")
    (folder / "b.txt").write_text(LINES[2], encoding="utf-8")
    return folder


def only_set(*arguments, **settings):
    (found,) = load_corpus(*arguments, **settings)
    return found


@given(st.lists(st.lists(st.integers(10, 99), min_size=1, max_size=25), max_size=12), st.integers(3, 16))
def test_packing_loses_no_token_and_breaks_no_sentence_that_fits(sentences, max_length):
    packed = list(pack(sentences, 1, 2, max_length))
    assert all(row[0] == 1 and row[-1] == 2 and 3 <= len(row) <= max_length for row in packed)
    assert [i for row in packed for i in row[1:-1]] == [i for sentence in sentences for i in sentence]
    starts, position = set(), 0
    for row in packed:
        starts.add(position)
        position += len(row) - 2
    position = 0
    for sentence in sentences:
        if len(sentence) <= max_length - 2 and position not in starts:
            assert not starts.intersection(range(position + 1, position + len(sentence)))
        position += len(sentence)


def test_packing_fills_each_sequence_before_the_next():
    assert [len(row) - 2 for row in pack([[5]] * 10, 1, 2, 6)] == [4, 4, 2]
    assert [len(row) - 2 for row in pack([[5] * 3, [6] * 2, [7] * 9], 1, 2, 6)] == [3, 2, 4, 4, 1]


def test_a_folder_its_files_and_a_long_limit_give_the_same_text(text, tokenizer, tmp_path):
    corpus = only_set(text, tokenizer, 12, cache_dir=tmp_path / "cache")
    assert corpus.column_names == ["input_ids", "length"]
    assert corpus["length"] == [len(ids) for ids in corpus["input_ids"]]
    assert max(corpus["length"]) <= 12
    words = [i for ids in corpus["input_ids"] for i in ids[1:-1]]
    assert words == tokenizer(" ".join(LINES), add_special_tokens=False)["input_ids"]
    files = [text / "a.txt", str(text / "b.txt")]
    assert only_set(files, tokenizer, 12, cache_dir=tmp_path / "other").to_dict() == corpus.to_dict()
    assert only_set(text, tokenizer, 12, limit_tokens=10**6, cache_dir=tmp_path / "cache").to_dict() == corpus.to_dict()
    assert len(only_set(text, tokenizer, 12, limit_tokens=1, cache_dir=tmp_path / "cache")) == 1


def test_changed_text_is_read_again(text, tokenizer, tmp_path):
    before = only_set(text, tokenizer, 12, cache_dir=tmp_path)
    with open(text / "b.txt", "a") as file:
        file.write("\nThe first follows.")
    assert len(only_set(text, tokenizer, 12, cache_dir=tmp_path)) > len(before)


def test_a_data_set_of_the_datasets_library(text, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"id": i, "body": line} for i, line in enumerate(["\n".join(LINES[:2]), LINES[2]])]
    (folder / "train.json").write_text("\n".join(map(json.dumps, rows)))
    corpus = only_set(folder, tokenizer, 12, text_column="body", cache_dir=tmp_path / "cache")
    assert corpus.to_dict() == only_set(text, tokenizer, 12, cache_dir=tmp_path / "cache").to_dict()
    with pytest.raises(ValueError, match="no column 'text', only id, body"):
        only_set(folder, tokenizer, 12, cache_dir=tmp_path / "cache")


def test_missing_empty_and_undecodable_files_are_named(text, tokenizer, tmp_path):
    def load(source):
        return only_set(source, tokenizer, 12, cache_dir=tmp_path / "cache")

    for absent in (
        tmp_path / "absent",
        str(tmp_path / "absent.txt"),
        "absent.txt",
        [text / "a.txt", tmp_path / "absent"],
    ):
        with pytest.raises(FileNotFoundError, match=r"no corpus at .*absent"):
            load(absent)
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.txt file"):
        load(tmp_path / "bare")
    (text / "c.txt").write_bytes(b"Good line.\nBad \xff line.\n")
    with pytest.raises(ValueError, match=r"c\.txt, line 2, byte 15: not UTF-8"):
        load(text)
    (text / "c.txt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.txt is empty"):
        load(text)
    (text / "c.txt").write_bytes(b" \n\t\n")
    with pytest.raises(ValueError, match=r"c\.txt is empty: it holds no text"):
        load(text / "c.txt")
    with pytest.raises(ValueError, match="no corpus: give at least one source"):
        load([])


def test_unusable_lengths_are_refused(text, tokenizer):
    with pytest.raises(ValueError, match="max_length 2"):
        only_set(text, tokenizer, 2)
    with pytest.raises(ValueError, match="limit_tokens 0"):
        only_set(text, tokenizer, 12, limit_tokens=0)
    for samples, sets in (("packed", 2), ("released", 0)):
        with pytest.raises(ValueError, match=f"sets {sets} of {samples} samples: at least 1"):
            load_corpus(text, tokenizer, 12, samples=samples, sets=sets)


def ids_of(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def inner(corpus) -> list[int]:
    return [i for ids in corpus["input_ids"] for i in ids[1:-1]]


def test_a_file_is_read_as_what_it_is_and_a_folder_of_two_kinds_refused(tokenizer, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": line, "source": "x"}) + "\n" for line in LINES))
    table = tmp_path / "rows.csv"
    table.write_text("text,n\n" + "".join(f'"{line}",1\n' for line in LINES))
    text = tmp_path / "plain" / "lines.txt"
    text.parent.mkdir()
    text.write_text("\n".join(LINES))
    (text.parent / "README.md").write_text("about it")
    expected = load_corpus(text.parent, tokenizer, 16)[0]["input_ids"][:]
    for same in (text, rows, table):
        assert load_corpus(same, tokenizer, 16)[0]["input_ids"][:] == expected
    with pytest.raises(ValueError, match="no column 'words', only text, source"):
        load_corpus(rows, tokenizer, 16, text_column="words")
    parquet(text.parent / "more" / "shard.parquet", LINES)
    with pytest.raises(ValueError, match=r"2 kinds, lines\.txt and shard\.parquet among them") as caught:
        load_corpus(text.parent, tokenizer, 16)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_corpus("nowhere.jsonl", tokenizer, 16)
    parquet(tmp_path / "tables" / "shard.parquet", LINES)
    shutil.copy(rows, tmp_path / "tables")
    with pytest.raises(ValueError, match="2 kinds"):
        load_corpus(tmp_path / "tables", tokenizer, 16)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", b"", "a.csv is empty"),
        ("a.json", b"", "a.json is empty"),
        ("a.json", b"{", "cannot be read as json"),
        ("a.csv", "text\ncaf\u00e9\n".encode("latin-1"), "utf-8"),
        ("a.jsonl", b'{"text": 5}\n', "holds 5, which is no text"),
    ],
)
def test_a_table_that_does_not_do_is_one_line(name, content, says, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=says) as caught:
        load_corpus(tmp_path / name, tokenizer, 16)
    assert "\n" not in str(caught.value) and not isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'{"text": "it begins well"}\n{"text": \n', "cannot be read"),
        ("a.csv", "text\ncaf\u00e9\n".encode("latin-1"), "utf-8"),
    ],
)
def test_a_damaged_table_is_one_line_of_the_command(name, content, says, tmp_path):
    (tmp_path / name).write_bytes(content)
    corpus = str(tmp_path / name)
    command = Command(["search", "--preset", "smoke", "--output_dir", str(tmp_path / "run"), "--corpus", corpus])
    lines = command.communicate(300)[0].splitlines()
    (line,) = [line for line in lines if "training a WordPiece vocabulary" not in line]  # what it does, on stdout
    assert command.returncode == 2 and line.startswith("effbert: corpus ") and corpus in line and says in line


def test_numbers_and_missing_values_of_a_csv_are_text(tokenizer, tmp_path):
    (tmp_path / "a.csv").write_text("text\n12\nNA\n\nnull\n3.50\n")
    (tmp_path / "a.txt").write_text("12\nNA\nnull\n3.50\n")
    found, expected = (load_corpus(tmp_path / name, tokenizer, 16)[0]["input_ids"][:] for name in ("a.csv", "a.txt"))
    assert found == expected


def parquet(path: Path, texts: list[str], **more) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, **more}), path)
    return path


@pytest.fixture
def wikipedia(tmp_path):
    """A folder as that of wikimedia/wikipedia: a card that names the configs, shards of articles with their titles."""
    root = tmp_path / "wikipedia"
    shards = [f"20231101.en/train-0000{n}-of-00002.parquet" for n in range(2)]
    parquet(root / shards[0], ["\n\n".join(LINES)], title=["One"])
    parquet(root / shards[1], [LINES[0], ""], title=["Two", "Three"])
    parquet(root / "20231101.de/train-00000-of-00001.parquet", ["Ein Satz."], title=["Eins"])
    configs = [
        {"config_name": name, "data_files": [{"split": "train", "path": f"{name}/train-*"}]}
        for name in ("20231101.de", "20231101.en")
    ]
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return root


def test_a_config_of_a_data_set_is_streamed_from_its_parquet_files(wikipedia, tokenizer, tmp_path):
    corpus = only_set(f"{wikipedia}:20231101.en", tokenizer, 12, cache_dir=tmp_path / "cache")
    assert inner(corpus) == ids_of(" ".join([*LINES, LINES[0]]), tokenizer)
    assert list(sentences_of(f"{wikipedia}:20231101.de")) == ["Ein Satz."]
    with pytest.raises(FileNotFoundError, match=r"no corpus .*wikipedia.*Config name is missing.*20231101.en"):
        only_set(wikipedia, tokenizer, 12)
    with pytest.raises(FileNotFoundError, match=r"no corpus .*:20231101.fr'"):
        only_set(f"{wikipedia}:20231101.fr", tokenizer, 12)
    shard = wikipedia / "20231101.en" / "train-00001-of-00002.parquet"
    alone = only_set(shard, tokenizer, 12, cache_dir=tmp_path / "cache")
    assert inner(alone) == ids_of(LINES[0], tokenizer)
    shard.write_bytes(b"no parquet")
    with pytest.raises(OSError, match=r"corpus .*20231101.en' cannot be read to its end: ") as caught:
        only_set(f"{wikipedia}:20231101.en", tokenizer, 12, cache_dir=tmp_path / "cache")
    assert "\n" not in str(caught.value)


def test_names_on_the_hub_are_asked_for_with_config_and_revision(wikipedia, tokenizer, tmp_path, monkeypatch):
    """The parquet branch that the hub makes of a data set has a folder a config and a folder a split."""
    books = parquet(tmp_path / "books" / "plain_text" / "train" / "0000.parquet", LINES).parents[2]
    folders = {"wikimedia/wikipedia": wikipedia, "bookcorpus/bookcorpus": books}
    asked = []
    real = datasets.load_dataset_builder

    def builder(path, **settings):
        asked.append((path, settings))
        return real(str(folders[path]), name=settings["name"])

    monkeypatch.setattr(datasets, "load_dataset_builder", builder)
    names = ("wikimedia/wikipedia:20231101.en", "bookcorpus/bookcorpus@refs/convert/parquet")
    corpus = only_set(names, tokenizer, 12, cache_dir=tmp_path / "cache")
    assert inner(corpus) == ids_of(" ".join([*LINES, LINES[0], *LINES]), tokenizer)
    assert asked == [
        ("wikimedia/wikipedia", {"name": "20231101.en", "revision": None}),
        ("bookcorpus/bookcorpus", {"name": None, "revision": "refs/convert/parquet"}),
    ]


def test_several_sources_are_read_one_after_the_other(text, tokenizer, tmp_path):
    shard = parquet(tmp_path / "shard.parquet", [LINES[2]])
    corpus = only_set([text / "b.txt", str(shard), text], tokenizer, 12, cache_dir=tmp_path / "cache")
    assert inner(corpus) == ids_of(" ".join([LINES[2], LINES[2], *LINES]), tokenizer)
    other = only_set([text, text / "b.txt", str(shard)], tokenizer, 12, cache_dir=tmp_path / "cache")
    assert inner(other) == ids_of(" ".join([*LINES, LINES[2], LINES[2]]), tokenizer)


@pytest.fixture
def long_text(tmp_path):
    rng = np.random.default_rng(0)
    words = " ".join(LINES).replace(".", "").split()
    path = tmp_path / "long.txt"
    path.write_text("\n".join(" ".join(rng.choice(words, 15)).capitalize() + "." for _ in range(400)))
    return path


def arrows(sets) -> list[bytes]:
    return [Path(one.cache_files[0]["filename"]).read_bytes() for one in sets]


@pytest.mark.parametrize("samples, sets", [("packed", 1), ("released", 1), ("released", 3)])
def test_the_files_are_the_same_byte_for_byte_whatever_the_number_of_processes(
    samples, sets, long_text, tokenizer, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(module, "_DOCUMENTS", 3)
    said = []
    monkeypatch.setattr(module, "_SAY_SECONDS", 0.0)
    settings = {"samples": samples, "sets": sets, "say": said.append}
    made = [
        load_corpus(long_text, tokenizer, 32, num_proc=n, cache_dir=tmp_path / f"{n}", **settings) for n in (1, 2, 3)
    ]
    assert len(made[0]) == sets and len(made[0][0].data.table.column("length").chunks) > 5
    assert arrows(made[0]) == arrows(made[1]) == arrows(made[2]) and len(set(arrows(made[0]))) == sets
    if samples == "packed":
        assert inner(made[0][0]) == ids_of(long_text.read_text(), tokenizer)
    tokenizer("a b c", truncation=True, max_length=3)  # leaves its truncation in the tokenizer
    again = load_corpus(long_text, tokenizer, 32, num_proc=1, cache_dir=tmp_path / "again", **settings)
    assert arrows(again) == arrows(made[0])
    assert len(said) % 4 == 0 and said[-1] == f"corpus: {sum(sum(one['length']) for one in made[0]):,} tokens so far"


def test_each_set_has_other_samples_of_the_same_documents(long_text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_DOCUMENTS", 7)
    settings = {"samples": "released", "num_proc": 1, "cache_dir": tmp_path}
    sets = load_corpus(long_text, tokenizer, 32, sets=5, **settings)
    assert [len(one) for one in sets] == [20] * 5
    lines = long_text.read_text().splitlines()
    documents = [" ".join(map(str, ids_of(" ".join(lines[n : n + 20]), tokenizer))) for n in range(0, 400, 20)]
    for one in sets:
        firsts = [ids[1 : ids.index(tokenizer.sep_token_id)] for ids in one["input_ids"]]
        assert all(" ".join(map(str, ids)) in document for ids, document in zip(firsts, documents, strict=True))
    assert len({str(one["input_ids"][:]) for one in sets}) == 5
    for fewer in (1, 2):
        assert arrows(load_corpus(long_text, tokenizer, 32, sets=fewer, **settings)) == arrows(sets)[:fewer]


def test_a_limit_takes_the_same_documents_of_every_set(tmp_path, tokenizer):
    """Documents of 1 to 4 tokens: the sets reach a number of tokens at different rows."""
    corpus = parquet(tmp_path / "short.parquet", ["the\n" + "first " * (n % 4 + 1) for n in range(60)])
    settings = {"samples": "released", "sets": 4, "num_proc": 1, "cache_dir": tmp_path / "cache"}
    whole = load_corpus(corpus, tokenizer, 32, **settings)
    for limit in (100, 200, 300):
        sets = load_corpus(corpus, tokenizer, 32, limit_tokens=limit, **settings)
        rows = len(sets[0])
        assert sum(sets[0]["length"]) >= limit > sum(sets[0]["length"][:-1])
        assert [one.to_dict() for one in sets] == [one.select(range(rows)).to_dict() for one in whole]
    reached = {int(np.searchsorted(np.cumsum(one["length"]), 200)) for one in whole}
    assert len(reached) > 1


@pytest.mark.parametrize("samples", ["packed", "released"])
def test_a_limit_takes_the_first_sequences(samples, long_text, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(module, "_DOCUMENTS", 3)
    settings = {"samples": samples, "num_proc": 2, "cache_dir": tmp_path}
    whole = only_set(long_text, tokenizer, 32, **settings).to_dict()
    for limit in (1, 100, 101, 300):
        part = only_set(long_text, tokenizer, 32, limit_tokens=limit, **settings).to_dict()
        rows = len(part["length"])
        assert sum(part["length"]) >= limit > sum(part["length"][:-1])
        assert part == {name: column[:rows] for name, column in whole.items()}


def test_released_samples_are_a_pair_a_document(long_text, tokenizer, tmp_path):
    corpus = only_set(long_text, tokenizer, 32, samples="released", cache_dir=tmp_path)
    lines = long_text.read_text().splitlines()
    documents = [ids_of(" ".join(lines[n : n + 20]), tokenizer) for n in range(0, 400, 20)]
    assert len(corpus) == len(documents) == 20 and corpus.column_names == ["input_ids", "token_type_ids", "length"]
    text_of = [" ".join(map(str, document)) for document in documents]
    for number, row in enumerate(corpus):
        first, second = (
            [i for i, segment in zip(row["input_ids"], row["token_type_ids"], strict=True) if segment == side]
            for side in (0, 1)
        )
        assert first[0] == tokenizer.cls_token_id and first[-1] == second[-1] == tokenizer.sep_token_id
        assert (len(first), len(second)) == (1 + 15 + 1, 14 + 1)
        assert " ".join(map(str, first[1:-1])) in text_of[number]
        assert any(" ".join(map(str, second[:-1])) in text for n, text in enumerate(text_of) if n != number)
    batch = Rows(corpus).batch(np.arange(2), 32, tokenizer.pad_token_id)
    assert batch.token_type_ids.tolist() == corpus["token_type_ids"][:2]
    plain = train_wordpiece(LINES, 120)
    plain.model_input_names = ["input_ids", "attention_mask"]
    unmarked = only_set(long_text, plain, 32, samples="released", cache_dir=tmp_path)
    assert unmarked.column_names == ["input_ids", "length"] and unmarked["input_ids"][:] == corpus["input_ids"][:]


def documents_of(source, text_column: str = "text") -> list[str]:
    (found,) = module._open(source, "train", text_column, None)
    return list(module._documents(found.rows(), found.titled))


SHORT = [f"Record {n}." for n in range(45)]
TWENTIES = [" ".join(SHORT[:20]), " ".join(SHORT[20:40]), " ".join(SHORT[40:])]


@pytest.mark.parametrize("column", ["title", "URL"])
def test_an_article_with_a_title_or_an_address_is_a_document_however_short(column, tokenizer, tmp_path):
    articles = parquet(tmp_path / "articles.parquet", [*SHORT, "", "Two\n\nparagraphs."], **{column: ["x"] * 47})
    assert documents_of(articles) == [*SHORT, "Two paragraphs."]
    settings = {"samples": "released", "num_proc": 1, "cache_dir": tmp_path / "cache"}
    assert len(only_set(articles, tokenizer, 32, **settings)) == 46


def test_sentences_are_joined_twenty_to_a_document_numbered_or_not(tmp_path):
    for name, more in (("bare", {}), ("numbered", {"id": list(range(45))})):
        assert documents_of(parquet(tmp_path / f"{name}.parquet", SHORT, **more)) == TWENTIES
    rows = [json.dumps({"id": n, "title": text}) for n, text in enumerate(SHORT)]
    (tmp_path / "titles.jsonl").write_text("\n".join(rows))
    assert documents_of(tmp_path / "titles.jsonl", "title") == TWENTIES
    (tmp_path / "lines.txt").write_text("\n\n".join(SHORT))
    assert documents_of(tmp_path / "lines.txt") == TWENTIES


def test_without_titles_a_data_set_is_articles_or_lines_as_a_whole(tmp_path, monkeypatch):
    """One record in a hundred with several lines is a slip in a set of sentences, two are articles."""
    lines = [f"Line {n}." for n in range(100)]
    slip, articles = ([*lines[:40], *["Of\ntwo."] * times, *lines[40 + times :]] for times in (1, 2))
    flat = " ".join(slip).split()
    found = [set(), set()]
    for size in (1, 7, 1000):  # records read at once
        monkeypatch.setattr(module, "_ROWS", size)
        for which, texts in enumerate((slip, articles)):
            found[which].add(tuple(documents_of(parquet(tmp_path / f"{which}.parquet", texts))))
    ((joined,), (whole,)) = found
    assert len(joined) == 6 and " ".join(joined).split() == flat
    assert whole == tuple(" ".join(text.split()) for text in articles)


def test_the_first_thousand_records_decide_for_all(tmp_path):
    late = parquet(tmp_path / "late.parquet", ["One."] * 1000 + ["Of\ntwo."] * 100)
    assert len(documents_of(late)) == 1200 // 20
    early = parquet(tmp_path / "early.parquet", ["Of\ntwo."] * 100 + ["One."] * 1000)
    assert len(documents_of(early)) == 1100


def test_no_document_runs_on_from_one_source_into_the_next(tokenizer, tmp_path):
    (tmp_path / "lines.txt").write_text("\n".join(SHORT))
    articles = parquet(tmp_path / "articles.parquet", SHORT, title=SHORT)
    settings = {"samples": "released", "num_proc": 1, "cache_dir": tmp_path / "cache"}
    assert len(only_set([tmp_path / "lines.txt", articles, tmp_path / "lines.txt"], tokenizer, 32, **settings)) == 51


def test_samples_of_articles_and_of_lines_are_cached_apart(tokenizer, tmp_path, monkeypatch):
    articles = parquet(tmp_path / "articles.parquet", SHORT, title=SHORT)
    settings = {"samples": "released", "num_proc": 1, "cache_dir": tmp_path / "cache"}
    assert len(only_set(articles, tokenizer, 32, **settings)) == 45
    monkeypatch.setattr(module, "_TITLES", ())
    assert len(only_set(articles, tokenizer, 32, **settings)) == 3


def test_blocks_hold_a_thousand_documents_and_never_one_alone():
    assert [len(block) for block in module._blocks(["x"] * 3001)] == [1000, 1000, 1001]
    assert [len(block) for block in module._blocks(["x"] * 2002)] == [1000, 1000, 2]


@given(st.integers(0, 60), st.integers(0, 60), st.integers(2, 50))
def test_pairs_are_cut_from_the_longer_side_until_they_fit(first, second, room):
    a, b = first, second
    while a + b > room:
        if a > b:
            a -= 1
        else:
            b -= 1
    assert cut_pair(first, second, room) == (a, b)


def test_what_is_cut_goes_from_both_ends_at_even_odds():
    rng = np.random.default_rng(0)
    documents = [list(range(100, 300)), list(range(1000, 1200)), list(range(2000, 2200))]
    starts, partners = [], []
    for _ in range(300):
        (ids, first), *_ = pair_up(documents, 1, 2, 128, rng)
        assert first == 65 and len(ids) == 128
        starts.append(ids[1] - 100)
        partners.append(ids[65] // 1000)
    assert abs(np.mean(starts) - 68.5) < 2  # half of the 137 that go
    assert 100 < partners.count(1) < 200 and set(partners) == {1, 2}


def test_one_document_has_no_other(tokenizer, tmp_path):
    (tmp_path / "short.txt").write_text("\n".join(LINES * 3))
    with pytest.raises(ValueError, match="released samples pair documents, and this text has 1, of 20 lines"):
        only_set(tmp_path / "short.txt", tokenizer, 12, samples="released", cache_dir=tmp_path / "cache")
    with pytest.raises(ValueError, match="samples 'all': one of packed, released"):
        only_set(tmp_path / "short.txt", tokenizer, 12, samples="all")
    with pytest.raises(ValueError, match=r"max_length 4 .* 5 is least"):
        only_set(tmp_path / "short.txt", tokenizer, 4, samples="released")


@pytest.mark.parametrize("last", ["\u200b", LINES[0]])
def test_a_last_block_without_a_pair_gives_no_samples(last, tokenizer, tmp_path, monkeypatch):
    """What is no blank may still be nothing to a tokenizer."""
    monkeypatch.setattr(module, "_DOCUMENTS", 4)
    settings = {"samples": "released", "num_proc": 1, "cache_dir": tmp_path / "cache"}
    texts = [f"{LINES[0]} {number}" for number in range(4)]
    short = only_set(parquet(tmp_path / "short.parquet", texts, title=["t"] * 4), tokenizer, 32, **settings)
    more = parquet(tmp_path / "more.parquet", [*texts, "\u200b", last], title=["t"] * 6)
    for sets in (1, 2):
        found = load_corpus(more, tokenizer, 32, sets=sets, **settings)
        assert [len(each) for each in found] == [4] * sets and found[0]["input_ids"] == short["input_ids"]
    front = parquet(tmp_path / "front.parquet", ["\u200b"] * 4 + texts, title=["t"] * 8)
    assert len(only_set(front, tokenizer, 32, **settings)) == 4


def square(number: int) -> int:
    return number * number


def test_no_more_chunks_are_read_than_processes_can_hold():
    read = []

    def chunks():
        for number in range(50):
            read.append(number)
            yield number

    for place, result in enumerate(in_order(square, chunks(), 2)):
        assert result == place**2 and len(read) <= place + 1 + 2 * 2
    assert len(read) == 50


def test_memory_does_not_grow_with_the_text(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_CHUNK_CHARACTERS", 2**13)
    peaks = []
    for copies in (1, 10):
        path = tmp_path / f"{copies}.txt"
        path.write_text((" ".join(LINES) + "\n") * 400 * copies)
        tracemalloc.start()
        only_set(path, tokenizer, 64, num_proc=1, cache_dir=tmp_path / "cache")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 2 * peaks[0]


def end(number: int) -> None:
    os._exit(1)


def test_a_process_that_was_killed_is_one_line():
    with pytest.raises(OSError, match="a process that tokenises the corpus was killed") as caught:
        list(in_order(end, range(9), 2))
    assert "\n" not in str(caught.value)


SLEEPERS = """
import os, sys, time
from effbert.data.corpus import in_order
def sleep(number):
    os.write(1, f"{os.getpid()}\\n".encode())  # at once: two of print's writes could mingle
    time.sleep(120)
list(in_order(sleep, range(4), 2))
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_processes_end_with_the_one_that_started_them():
    root = Path(__file__).parents[2]
    parent = subprocess.Popen([sys.executable, "-c", SLEEPERS], cwd=root, stdout=subprocess.PIPE, text=True)
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(alive, workers))
