import sysconfig
from collections import Counter
from itertools import pairwise

import pytest

from effbert.data import builtin
from effbert.data.corpus import load_corpus
from effbert.data.tokenizer import train_wordpiece


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def test_prose_drops_code_tables_headings_and_keeps_sentences():
    text = """
Title of the page
=================

fold(values, start=0) -> int

   Return the sum of all *values*, see :meth:`~Thing.fold` for more.  The
   "start" is added.

   >>> fold([1, 2])
   3

   x = fold(y); z[0] += 1

Name      Meaning
a         the first of the columns

- If it is empty, the result is zero.
- path: The file that is read.

Use this as in the following:
    for a in b: print(a)
"""
    assert list(builtin.prose(text)) == [
        "Return the sum of all values, see Thing.fold for more.",
        'The "start" is added.',
        "If it is empty, the result is zero.",
        "The file that is read.",
        "Use this as in the following: for a in b: print(a).",
    ]


def test_documents_are_sorted_unique_and_much(cache_dir):
    documents = builtin.documents(cache_dir)
    names = [document.name for document in documents]
    assert names == sorted(set(names))
    assert {document.part for document in documents} <= {"", *builtin.PARTS}
    assert sum(len(sentence.split()) for document in documents for sentence in document.sentences) > 150_000
    passages = [passage for document in documents for passage in document.passages]
    assert len(passages) == len(set(passages))


def test_the_cached_documents_equal_those_read_from_source(cache_dir):
    sources = dict(builtin._sources())
    few = {name: sources[name] for name in ("json", "textwrap", "heapq")}
    stored = {document.name: document for document in builtin.documents(cache_dir)}
    read = [document for document in builtin._read(few) if document.name in few]
    assert len(read) == 3
    assert all(document == stored[document.name] for document in read)


@pytest.mark.parametrize("name", ["builtin-topic", "builtin-next"])
def test_tasks_are_balanced_repeatable_and_share_no_sentence_between_splits(name, cache_dir):
    task = builtin.load_task(name, cache_dir)
    columns = ("text_a", "text_b") if task.spec.pair else ("text_a",)
    sentences = []
    for split in (task.train, task.validation):
        assert set(split.column_names) == {*columns, "label"}
        counts = Counter(split["label"])
        assert sorted(counts) == list(range(len(task.spec.labels)))
        assert len(set(counts.values())) == 1
        sentences.append({text.lower() for column in columns for text in split[column]})
    assert not sentences[0] & sentences[1]
    assert len(task.validation) >= 500
    again = builtin.load_task(name, cache_dir)
    assert again.train.to_list() == task.train.to_list()
    assert again.validation.to_list() == task.validation.to_list()


def test_next_is_true_to_the_documents(cache_dir):
    follows = {
        pair for document in builtin.documents(cache_dir) for passage in document.passages for pair in pairwise(passage)
    }
    for row in builtin.load_task("builtin-next", cache_dir).train:
        assert ((row["text_a"], row["text_b"]) in follows) == (row["label"] == 1)


def test_the_corpus_holds_no_validation_text(cache_dir):
    corpus = set(builtin.corpus_sentences(cache_dir))
    assert corpus.issuperset(builtin.load_task("builtin-topic", cache_dir).train["text_a"])
    for name, columns in (("builtin-topic", ("text_a",)), ("builtin-next", ("text_a", "text_b"))):
        validation = builtin.load_task(name, cache_dir).validation
        assert not corpus.intersection(text for column in columns for text in validation[column])


def test_topic_can_be_learnt_from_words(cache_dir):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    task = builtin.load_task("builtin-topic", cache_dir)
    words = TfidfVectorizer()
    model = LogisticRegression(max_iter=300).fit(words.fit_transform(task.train["text_a"]), task.train["label"])
    assert model.score(words.transform(task.validation["text_a"]), task.validation["label"]) > 0.45


def test_builtin_corpus_packs_every_training_sentence(cache_dir):
    sentences = builtin.corpus_sentences(cache_dir)
    tokenizer = train_wordpiece(sentences[:2000], 1000)
    (corpus,) = load_corpus("builtin", tokenizer, 64, cache_dir=cache_dir, limit_tokens=20_000)
    assert 20_000 <= sum(corpus["length"]) < 20_064
    assert tokenizer.decode(corpus[0]["input_ids"]).startswith("[CLS] " + sentences[0].lower()[:10])


def test_a_python_without_sources_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match=r"no \.py sources under"):
        builtin.documents(tmp_path / "cache")


def test_unknown_builtin_task():
    with pytest.raises(ValueError, match="builtin-topic and builtin-next"):
        builtin.load_task("builtin-other")
