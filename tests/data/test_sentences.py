from hypothesis import given
from hypothesis import strategies as st

from effbert.data.sentences import split_sentences


def test_splits_after_marks_and_keeps_abbreviations_together():
    text = 'It returns None, e.g. If nothing is left. Really? "Yes!" Then Mr. Smith (see Fig. 3) went home.'
    assert split_sentences(text) == [
        "It returns None, e.g. If nothing is left.",
        "Really?",
        '"Yes!"',
        "Then Mr. Smith (see Fig. 3) went home.",
    ]


@given(st.text(alphabet="ab AB.?!\"') \n1e"))
def test_no_character_is_lost(text):
    assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
