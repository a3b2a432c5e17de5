import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effbert.data.corpus import load_corpus, pack
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
    corpus = load_corpus(text, tokenizer, 12, cache_dir=tmp_path / "cache")
    assert corpus.column_names == ["input_ids", "length"]
    assert corpus["length"] == [len(ids) for ids in corpus["input_ids"]]
    assert max(corpus["length"]) <= 12
    words = [i for ids in corpus["input_ids"] for i in ids[1:-1]]
    assert words == tokenizer(" ".join(LINES), add_special_tokens=False)["input_ids"]
    files = [text / "a.txt", str(text / "b.txt")]
    assert load_corpus(files, tokenizer, 12, cache_dir=tmp_path / "other").to_dict() == corpus.to_dict()
    assert (
        load_corpus(text, tokenizer, 12, limit_tokens=10**6, cache_dir=tmp_path / "cache").to_dict() == corpus.to_dict()
    )
    assert len(load_corpus(text, tokenizer, 12, limit_tokens=1, cache_dir=tmp_path / "cache")) == 1


def test_changed_text_is_read_again(text, tokenizer, tmp_path):
    before = load_corpus(text, tokenizer, 12, cache_dir=tmp_path)
    with open(text / "b.txt", "a") as file:
        file.write("\nThe first follows.")
    assert len(load_corpus(text, tokenizer, 12, cache_dir=tmp_path)) > len(before)


def test_a_data_set_of_the_datasets_library(text, tokenizer, tmp_path, monkeypatch):
    folder = tmp_path / "rows"
    folder.mkdir()
    rows = [{"id": i, "body": line} for i, line in enumerate(["\n".join(LINES[:2]), LINES[2]])]
    (folder / "train.json").write_text("\n".join(map(json.dumps, rows)))
    corpus = load_corpus(folder, tokenizer, 12, text_column="body", cache_dir=tmp_path / "cache")
    assert corpus.to_dict() == load_corpus(text, tokenizer, 12, cache_dir=tmp_path / "cache").to_dict()
    with pytest.raises(ValueError, match="no column 'text', only id, body"):
        load_corpus(folder, tokenizer, 12, cache_dir=tmp_path / "cache")


def test_missing_empty_and_undecodable_files_are_named(text, tokenizer, tmp_path):
    def load(source):
        return load_corpus(source, tokenizer, 12, cache_dir=tmp_path / "cache")

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
    with pytest.raises(ValueError, match="list of text files is empty"):
        load([])


def test_unusable_lengths_are_refused(text, tokenizer):
    with pytest.raises(ValueError, match="max_length 2"):
        load_corpus(text, tokenizer, 2)
    with pytest.raises(ValueError, match="limit_tokens 0"):
        load_corpus(text, tokenizer, 12, limit_tokens=0)
