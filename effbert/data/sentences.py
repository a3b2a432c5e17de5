"""Sentences from running text. The one idea: a full stop ends a sentence only when white space and something that can
open a sentence follow it, and the word before it is no known abbreviation."""

import re

_BOUNDARY = re.compile(r"""(?<![.!?…])([.!?…]+["'”’)\]]*)\s+(?=["'“‘(\[]?[A-Z0-9À-ÖØ-Þ])""")
_ABBREVIATION = re.compile(
    r"(?:^|[\s(\[\"'“‘])(?:[A-Za-z]|e\.g|i\.e|a\.k\.a|cf|etc|vs|viz|ca|al|approx|resp|no|vol|pp|fig|eq|sec|ch|"
    r"mr|mrs|ms|dr|st|prof|rev|gen|col|capt|sgt|lt|jr|sr|inc|ltd|corp|co|u\.s|u\.k|u\.s\.a)\.$",
    re.IGNORECASE,
)
_LONGEST = 16  # characters that an abbreviation, what is before it and its full stop never exceed


def split_sentences(text: str) -> list[str]:
    """The sentences of one paragraph, in order, stripped; together they hold every non-space character of `text`."""
    sentences, start = [], 0
    for match in _BOUNDARY.finditer(text):
        end = match.end(1)
        # from the blank before the sentence, which stands for ^, but not from far back: each boundary would read it all
        if _ABBREVIATION.search(text, max(0, start - 1, end - _LONGEST), end):
            continue
        sentences.append(text[start:end].strip())
        start = match.end()
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]
