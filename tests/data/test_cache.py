import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, BertJapaneseTokenizer

from effbert.data.cache import cached, cached_together, dataset_fingerprint, default_cache_dir, tokenizer_fingerprint
from effbert.data.tokenizer import train_wordpiece

ROWS = {"ids": [[1, 2], [], [3]], "name": ["a", "b", "c"]}


def entries(folder: Path) -> list[str]:
    """Names in a cache folder beside its locks."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".locks")


def _never():
    raise AssertionError("built again")


def test_built_once_and_read_back_memory_mapped(tmp_path):
    built = cached(("rows", 1), lambda: Dataset.from_dict(ROWS), tmp_path)
    again = cached(("rows", 1), _never, tmp_path)
    assert built.to_dict() == again.to_dict() == ROWS
    assert again.cache_files
    assert cached(("rows", 2), lambda: Dataset.from_dict({"x": [1]}), tmp_path).to_dict() == {"x": [1]}


def test_pieces_are_joined_and_selections_respected(tmp_path):
    whole = Dataset.from_dict(ROWS)
    joined = cached(("pieces",), lambda: (whole.select([i]) for i in (2, 0)), tmp_path)
    assert joined["name"] == ["c", "a"]
    shuffled = cached(("shuffled",), lambda: whole.select([2, 0, 1]), tmp_path)
    assert shuffled["ids"] == [[3], [1, 2], []]


def test_several_made_in_one_go_are_a_file_each_that_appear_together(tmp_path):
    whole = Dataset.from_dict(ROWS)

    def pieces():
        for index in range(3):
            assert not [name for name in entries(tmp_path) if ".tmp-" not in name]
            yield [whole.select([index]), whole.select([2 - index])]

    forth, back = cached_together(("both",), 2, pieces, tmp_path)
    assert (forth["name"], back["name"]) == (["a", "b", "c"], ["c", "b", "a"])
    assert [data.to_dict() for data in cached_together(("both",), 2, _never, tmp_path)] == [
        forth.to_dict(),
        back.to_dict(),
    ]
    with pytest.raises(ValueError):
        cached_together(("uneven",), 2, lambda: [[whole]], tmp_path)
    assert len(entries(tmp_path)) == 1


def test_a_failed_or_killed_write_leaves_nothing_that_is_read(tmp_path):
    def breaks():
        yield Dataset.from_dict(ROWS)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cached(("rows",), breaks, tmp_path)
    assert not entries(tmp_path)

    kill = (
        "import os, signal, sys; from datasets import Dataset; from effbert.data.cache import cached\n"
        "def pieces():\n    yield Dataset.from_dict({'name': ['half']})\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "cached(('rows',), pieces, sys.argv[1])"
    )
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", kill, str(tmp_path)], cwd=root).returncode == -9
    assert entries(tmp_path)
    assert cached(("rows",), lambda: Dataset.from_dict(ROWS), tmp_path)["name"] == ["a", "b", "c"]
    assert len(entries(tmp_path)) == 1 and ".tmp-" not in entries(tmp_path)[0]


ASK = """
import sys, time
from datasets import Dataset
from effbert.data.cache import cached
def build():
    print("built", flush=True)
    time.sleep(float(sys.argv[2]))
    return Dataset.from_dict({"name": [sys.argv[3]]})
print(cached(("race",), build, sys.argv[1])["name"][0])
"""


def ask(folder: Path, seconds: float, name: str) -> subprocess.Popen:
    arguments = [sys.executable, "-c", ASK, str(folder), str(seconds), name]
    return subprocess.Popen(arguments, cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_builds_and_the_other_waits_for_it(tmp_path):
    first = ask(tmp_path, 1.0, "first")
    assert first.stdout.readline() == "built\n"
    assert cached(("race",), _never, tmp_path)["name"] == ["first"]
    assert first.communicate(timeout=60)[0] == "first\n"
    assert len(entries(tmp_path)) == 1


def test_a_killed_builder_leaves_the_lock_to_the_next(tmp_path):
    first = ask(tmp_path, 60.0, "first")
    assert first.stdout.readline() == "built\n"
    first.kill()
    first.wait(timeout=60)
    assert cached(("race",), lambda: Dataset.from_dict({"name": ["second"]}), tmp_path)["name"] == ["second"]


def test_an_unwritable_place_and_a_full_disk_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot write the data cache .*file") as caught:
        cached(("rows",), lambda: Dataset.from_dict(ROWS), tmp_path / "file")
    assert "\n" not in str(caught.value)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ValueError, match="No space left on device; set EFFBERT_CACHE"):
        cached(("rows",), lambda: Dataset.from_dict(ROWS), tmp_path)
    assert entries(tmp_path) == ["file"]


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def unknown(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    with pytest.raises(ValueError, match=r"cannot write the data cache .*: its file system has no file locks; set EFF"):
        cached(("rows",), _never, tmp_path)


def test_errors_of_the_builder_pass_through(tmp_path):
    def missing():
        raise FileNotFoundError("no such text")
        yield

    with pytest.raises(FileNotFoundError, match="no such text"):
        cached(("rows",), missing, tmp_path)


def test_the_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("EFFBERT_CACHE", "/a")
    assert default_cache_dir() == Path("/a")
    monkeypatch.delenv("EFFBERT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert default_cache_dir() == Path("/b/effbert")


def test_tokenizer_fingerprint_sees_vocabulary_and_rules_but_not_use():
    text = ["some words to learn from", "Some More"] * 4
    one, same = train_wordpiece(text, 40), train_wordpiece(text, 40)
    before = tokenizer_fingerprint(one)
    one(text, truncation=True, max_length=4, padding=True)
    assert tokenizer_fingerprint(one) == before == tokenizer_fingerprint(same)
    assert tokenizer_fingerprint(train_wordpiece(text, 32)) != before
    assert tokenizer_fingerprint(train_wordpiece(text, 40, lowercase=False)) != before


def test_tokenizer_fingerprint_sees_which_side_is_cut():
    tokenizer = train_wordpiece(["some words to learn from"] * 4, 40)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.truncation_side = "left"
    assert tokenizer_fingerprint(tokenizer) != before


def test_tokenizer_fingerprint_sees_the_casing_of_a_slow_tokenizer_but_not_its_folder(tmp_path):
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nfox\nFox\n")
    basic = {"word_tokenizer_type": "basic", "subword_tokenizer_type": "wordpiece"}
    found = set()
    for lowercase in (True, False):
        first = BertJapaneseTokenizer(tmp_path / "vocab.txt", do_lower_case=lowercase, **basic)
        first.save_pretrained(tmp_path / "one")
        AutoTokenizer.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
        loaded = [AutoTokenizer.from_pretrained(tmp_path / name) for name in ("one", "two")]
        (fingerprint,) = {tokenizer_fingerprint(tokenizer) for tokenizer in (first, *loaded)}
        found.add(fingerprint)
    assert len(found) == 2
    first.truncation_side = "left"
    assert tokenizer_fingerprint(first) not in found


def test_dataset_fingerprint_is_of_the_content_alone(tmp_path):
    dataset = Dataset.from_dict(ROWS)
    other_way = Dataset.from_dict({"name": ["x", *ROWS["name"]], "ids": [[9], *ROWS["ids"]]}).select([1, 2, 3])
    stored = cached(("rows",), lambda: (dataset.select([i]) for i in range(3)), tmp_path)
    assert dataset_fingerprint(dataset) == dataset_fingerprint(other_way) == dataset_fingerprint(stored)
    assert dataset_fingerprint(dataset) != dataset_fingerprint(dataset.select([0, 2, 1]))
    assert dataset_fingerprint(dataset) != dataset_fingerprint(dataset.remove_columns("name"))
