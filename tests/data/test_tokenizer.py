import json
import textwrap
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from effbert.data.tokenizer import SPECIAL_TOKENS, load_tokenizer, save_tokenizer, train_wordpiece

TEXT = ["The quick brown fox jumps over the lazy dog.", "Zwölf Boxkämpfer jagen Viktor.", "the fox, the dog & 12 more"]


def test_ids_text_and_types_are_those_of_bert():
    tokenizer = train_wordpiece(TEXT * 3, 200)
    assert tuple(tokenizer.convert_ids_to_tokens(range(5))) == SPECIAL_TOKENS
    one = tokenizer("The FOX", "a dog")
    assert tokenizer.convert_ids_to_tokens(one["input_ids"])[:3] == ["[CLS]", "the", "fox"]
    assert tokenizer.decode(one["input_ids"]) == "[CLS] the fox [SEP] a dog [SEP]"
    assert one["token_type_ids"] == [0] * 4 + [1] * (len(one["input_ids"]) - 4)
    assert tokenizer.unk_token_id not in tokenizer("Zwolf boxkampfer")["input_ids"]
    assert tokenizer("日")["input_ids"][1] == tokenizer.unk_token_id


def test_vocabulary_is_the_same_at_every_training_and_in_any_order():
    # The hash tables of the trainer are seeded anew each time, in one process as between two.
    lines = Path(textwrap.__file__).read_text().splitlines()
    vocabularies = [train_wordpiece(text, 600).get_vocab() for text in (lines, lines, lines[::-1], sorted(lines))]
    assert len(vocabularies[0]) == 600
    assert all(vocabulary == vocabularies[0] for vocabulary in vocabularies)


def test_saved_and_loaded_it_stays_the_same(tmp_path):
    tokenizer = train_wordpiece(TEXT, 150)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, PreTrainedTokenizerFast)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again(TEXT[0], TEXT[1]) == tokenizer(TEXT[0], TEXT[1])


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_it_encoded_leaves_nothing_in_its_files(tmp_path):
    tokenizer = train_wordpiece(TEXT, 150)
    save_tokenizer(tokenizer, tmp_path / "before")
    cut = {"truncation": "only_second", "max_length": 32, "stride": 3, "padding": "max_length"}
    tokenizer(["the fox"], [" ".join(TEXT)], **cut, return_overflowing_tokens=True)
    tokenizer.save_pretrained(tmp_path / "left")
    assert json.loads((tmp_path / "left" / "tokenizer.json").read_text())["truncation"]["strategy"] == "OnlySecond"
    save_tokenizer(tokenizer, tmp_path / "after")
    assert contents(tmp_path / "after") == contents(tmp_path / "before")
    load_tokenizer(tmp_path / "left").save_pretrained(tmp_path / "again")
    again = contents(tmp_path / "again")
    assert again["tokenizer.json"] == contents(tmp_path / "before")["tokenizer.json"]
    assert not {"max_length", "stride", "truncation_strategy"} & json.loads(again["tokenizer_config.json"]).keys()


def test_text_without_words_and_too_small_a_vocabulary_are_refused():
    with pytest.raises(ValueError, match="no words"):
        train_wordpiece(["", "  "], 100)
    with pytest.raises(ValueError, match="vocab_size 10 cannot hold"):
        train_wordpiece(TEXT, 10)


def test_folders_without_a_tokenizer_are_named_in_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{broken")
    for place in (tmp_path / "absent", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"no tokenizer at {place}") as caught:
            load_tokenizer(place)
        assert "\n" not in str(caught.value)
