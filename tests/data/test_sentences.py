import pytest
from hypothesis import given
from hypothesis import strategies as st

from effbert.data import sentences
from effbert.data.sentences import split_sentences


def test_splits_after_marks_and_keeps_abbreviations_together():
    text = 'It returns None, e.g. If nothing is left. Really? "Yes!" Then Mr. Smith (see Fig. 3) went home.'
    assert split_sentences(text) == [
        "It returns None, e.g. If nothing is left.",
        "Really?",
        '"Yes!"',
        "Then Mr. Smith (see Fig. 3) went home.",
    ]


class Counted:
    """A pattern, and how many characters it was given to look at."""

    def __init__(self, pattern):
        self.pattern, self.characters = pattern, 0

    def search(self, text, start=0, end=None):
        end = len(text) if end is None else end
        self.characters += end - start
        return self.pattern.search(text, start, end)


def test_a_run_of_initials_is_not_read_again_at_each_of_them(monkeypatch):
    counted = Counted(sentences._ABBREVIATION)
    monkeypatch.setattr(sentences, "_ABBREVIATION", counted)
    text = "Smith, J. K. " * 500
    assert split_sentences(f"Really? {text}") == ["Really?", text.strip()]
    assert 0 < counted.characters < 4 * len(text)


@pytest.mark.parametrize("word", ["approx", "a.k.a", "U.S.A", "Prof", "x", "no"])
def test_an_abbreviation_is_known_wherever_it_stands(word):
    for before in ("", "It is. ", "It is ", "It is (", "a" * 40 + " ", "\n"):
        text = f"{before}{word}. Then more"
        assert split_sentences(text)[-1].endswith(f"{word}. Then more"), text
    assert split_sentences(f"Say x{word}. Then") == [f"Say x{word}.", "Then"]


@given(st.text(alphabet="ab AB.?!\"') \n1e"))
def test_no_character_is_lost(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
