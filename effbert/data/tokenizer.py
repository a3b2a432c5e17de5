"""Tokenizers: train a WordPiece vocabulary, or load one that exists. The one idea: the trainer of `tokenizers` numbers
single characters in the order of a hash table that differs from process to process, and breaks ties by these numbers;
we hand it all characters, numbered, before it starts, so the same text gives the same vocabulary everywhere."""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from effbert.errors import first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

FILE = "tokenizer.json"
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_ALPHABET_LIMIT = 1000
_LEFT_BY_A_FILE = ("max_length", "stride", "truncation_strategy", "pad_to_multiple_of")  # as transformers' settings


def train_wordpiece(
    sentences: Iterable[str],
    vocab_size: int,
    *,
    lowercase: bool = True,
    min_frequency: int = 2,
    max_length: int = 512,
) -> "PreTrainedTokenizerFast":
    """A BERT tokenizer with at most `vocab_size` pieces learnt from `sentences`; ids 0 to 4 are `SPECIAL_TOKENS`.

    The result depends on the sentences alone, not on their order or the process. `max_length` is only recorded, as
    `model_max_length`. Raises ValueError if there is no text or `vocab_size` cannot hold the characters.
    """
    from tokenizers import decoders, models, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = _pipeline(models.WordPiece(unk_token="[UNK]"), lowercase)
    words = _count_words(sentences, tokenizer)
    if not words:
        raise ValueError("cannot train a vocabulary: the text has no words")
    alphabet, inner = _letters(words)
    first_pieces = [*SPECIAL_TOKENS, *alphabet, *inner]
    if vocab_size < len(first_pieces):
        raise ValueError(f"vocab_size {vocab_size} cannot hold the {len(first_pieces)} characters of this text")

    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        show_progress=False,
        special_tokens=first_pieces,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        continuing_subword_prefix="##",
    )
    tokenizer.train_from_iterator(_repeat(words), trainer)
    vocab = tokenizer.get_vocab()

    tokenizer = _pipeline(models.WordPiece(vocab, unk_token="[UNK]"), lowercase)
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def load_tokenizer(path_or_name: str | Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a local folder or of a model on the Hugging Face hub, `uncut`.

    Raises FileNotFoundError if there is none, ValueError if it lacks the tokens that mark padding, start and end.
    """
    from transformers import AutoTokenizer

    folder = Path(path_or_name).expanduser()
    looks_local = isinstance(path_or_name, Path) or str(path_or_name).startswith((".", "/", "~"))
    if looks_local and not folder.is_dir():
        raise FileNotFoundError(f"no tokenizer at {path_or_name}: no such folder")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder if folder.is_dir() else str(path_or_name))
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if folder.is_dir():
            reason = f"the folder should hold tokenizer.json or vocab.txt ({reason})"
        else:
            reason = f"no such folder here, and the Hugging Face hub gives none: {reason}"
        raise FileNotFoundError(f"no tokenizer at {path_or_name}: {reason}") from error
    missing = [name for name in ("pad", "cls", "sep") if getattr(tokenizer, f"{name}_token_id") is None]
    if missing:
        raise ValueError(f"the tokenizer at {path_or_name} has no {', '.join(missing)} token; a BERT tokenizer has all")
    return uncut(tokenizer)


def uncut(tokenizer: "PreTrainedTokenizerBase") -> "PreTrainedTokenizerBase":
    """`tokenizer`, rid of the truncation and padding that its file, or a call that asked for them, left in it: whoever
    reads its file with `tokenizers` alone would cut and fill texts by them."""
    if backend := getattr(tokenizer, "backend_tokenizer", None):
        _forget_lengths(backend)
        for name in _LEFT_BY_A_FILE:
            tokenizer.init_kwargs.pop(name, None)
    return tokenizer


def save_tokenizer(tokenizer: "PreTrainedTokenizerBase", folder: str | Path) -> None:
    """The files of a tokenizer, `uncut`, in a folder: the same whatever it encoded before."""
    uncut(tokenizer).save_pretrained(folder)


def copy_uncut(source: Path, target: Path) -> None:
    """The file tokenizer.json `source` as `target`, without truncation and padding; ValueError where it is none."""
    from tokenizers import Tokenizer

    try:
        backend = Tokenizer.from_file(str(source))
    except Exception as error:  # tokenizers raises no other kind
        raise ValueError(f"{source} is no tokenizer: {first_line(error)}") from error
    _forget_lengths(backend)
    backend.save(str(target))


def _forget_lengths(backend: "Tokenizer") -> None:
    backend.no_truncation()
    backend.no_padding()


def _pipeline(model, lowercase: bool):
    from tokenizers import Tokenizer, normalizers, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _count_words(sentences: Iterable[str], tokenizer) -> Counter[str]:
    words = Counter()
    for sentence in sentences:
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(sentence))
        words.update(word for word, _ in pieces)
    return words


def _letters(words: Counter[str]) -> tuple[list[str], list[str]]:
    counts = Counter()
    for word, count in words.items():
        for letter in word:
            counts[letter] += count
    alphabet = sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:_ALPHABET_LIMIT])
    known = set(alphabet)
    return alphabet, sorted({"##" + letter for word in words for letter in word[1:] if letter in known})


def _repeat(words: Counter[str], longest: int = 10_000) -> Iterator[str]:
    for word, count in sorted(words.items()):
        for start in range(0, count, longest):
            yield " ".join([word] * min(longest, count - start))
