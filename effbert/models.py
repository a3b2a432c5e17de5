"""The named models: the published students and the baselines that are distilled the same way.

All take the teacher's vocabulary and train with a projection to its width. Where they start is another matter: the
published students from a supernet's slices, the narrow ones from its first channels (`Supernet.narrowed`).
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from effbert.architecture import PUBLISHED, Architecture, Dimensions, count_parameters
from effbert.kernels.expression import ExpressionError

PLUS = "efficientbert-plus"
_PUBLISHED = Architecture.parse(PUBLISHED)
_NAME = re.compile(r"[a-z][a-z0-9-]+")
_PLAIN = re.compile(r"bert-(\d+)x(\d+)(?:x(\d+))?")


def _plain(layers: int, hidden: int, intermediate: int) -> dict:
    """A plain BERT: one gelu MLP a layer, a token table of the hidden width without neighbours."""
    return {
        "architecture": str(Architecture.uniform("1_1", layers)),
        "embedding_size": None,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
    }


def _published(hidden: int, times: int = 1) -> dict:
    return {"architecture": str(_PUBLISHED.repeat(times)), "hidden_size": hidden, "intermediate_size": hidden}


# What a model sets in an EffBertConfig; sizes that it leaves out are efficientbert's.
MODELS: Mapping[str, dict] = {
    "efficientbert": _published(540),
    "efficientbert-tiny": _published(360),
    PLUS: _published(540),  # efficientbert, but begun from the weights that stage 3 shared among tasks
    "efficientbert-plusplus": _published(360, times=2),
    "efficientbert-tinybert6": _published(768) | {"embedding_size": None, "intermediate_size": 3072, "combine": "pad"},
    "tinybert4": _plain(4, 312, 1200),
    "tinybert6": _plain(6, 768, 3072),
}


def model_fields(name: str) -> dict:
    """What a named model sets in an EffBertConfig: one of MODELS, or bert-LAYERSxHIDDEN[xINTERMEDIATE], a plain BERT of
    any size, four times as wide inside where that is left out. ValueError, with the names, for another one."""
    if name in MODELS:
        return dict(MODELS[name])
    found = _PLAIN.fullmatch(name)
    if not found:
        raise ValueError(f"unknown model {name!r}: one of {', '.join(MODELS)}, or a plain BERT such as bert-6x312")
    layers, hidden = int(found[1]), int(found[2])
    if 0 in (layers, hidden) or found[3] == "0":
        raise ValueError(f"model {name!r}: layers and widths must be at least 1")
    return _plain(layers, hidden, int(found[3] or 4 * hidden))


def refuse_plus_without_start(models: Iterable[str], start_from: Sequence[str]) -> None:
    """ValueError where efficientbert-plus is to begin with fresh weights, which would make it efficientbert."""
    if PLUS in models and not start_from:
        raise ValueError(
            f"{PLUS} is efficientbert begun with the weights that a search's stage 3 shares: give --start_from "
            "RUN/stage3/supernet"
        )


def is_name(text: str) -> bool:
    """Whether a text is a name, of a model that is known or not, and spells out no architecture."""
    return bool(_NAME.fullmatch(text))


def architecture_of(text: str) -> Architecture:
    """The architecture of a named model, or that which the text spells out."""
    if not is_name(text):
        return Architecture.parse(text)
    try:
        return Architecture.parse(model_fields(text)["architecture"])
    except ValueError as error:
        raise ExpressionError(f"{text!r} is no expression, and {error}") from None


def dimensions(name: str) -> Dimensions:
    """The sizes of a named model, with BERT's vocabulary and a projection to 768."""
    fields = model_fields(name)
    return Dimensions(**{size: fields[size] for size in ("hidden_size", "intermediate_size")},
                      embedding_size=fields.get("embedding_size", Dimensions.embedding_size))  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a model is counted by. head: "classification", "spans", or None for an encoder; longest: its longest text,
    in tokens."""

    architecture: Architecture
    dims: Dimensions
    num_labels: int = 3
    head: str | None = "classification"
    longest: int = 512


def sizes_of(text: str) -> Sizes:
    """Of a named model, of the folder of a saved student, supernet or BERT, or of an architecture that the text spells
    out, with efficientbert's. ValueError or FileNotFoundError, one line, where it is none of these."""
    spelt = not text or "(" in text or text in MODELS or _PLAIN.fullmatch(text)
    if not spelt and ("/" in text or text.startswith((".", "~")) or Path(text).is_dir()):
        return _saved_sizes(Path(text).expanduser())
    return Sizes(architecture_of(text), dimensions(text) if is_name(text) else Dimensions())


def _saved_sizes(folder: Path) -> Sizes:
    from effbert.teacher import head_of, longest_text, read_config

    config = read_config(folder, "model")
    if config.model_type == "effbert":
        architecture = Architecture.parse(config.architecture)
    elif config.model_type == "bert":
        architecture = Architecture.uniform("1_1", config.num_hidden_layers)
    else:
        raise ValueError(f"model {folder} is of type {config.model_type}: students of effbert and BERT can be counted")
    dims = Dimensions(**{field.name: getattr(config, field.name, None) for field in dataclasses.fields(Dimensions)})
    return Sizes(architecture, dims, config.num_labels, head_of(config), longest_text(config))


def check_heads(label: str, hidden_size: int, heads: int) -> None:
    """ValueError, with the nearest widths that do, where a teacher's heads do not share a model's width evenly.
    `label` names the model."""
    if hidden_size % heads:
        below = hidden_size // heads * heads
        widths = " and ".join(str(width) for width in (below, below + heads) if width)
        raise ValueError(
            f"{label}: its attention heads are as many as the teacher's, {heads}, among which a width of {hidden_size} "
            f"does not divide: nearest widths that do: {widths}"
        )


def sized_down(teacher, num_layers: int, parameters: int) -> str:
    """The plain BERT, by name, that a teacher becomes when all its widths shrink in proportion: of `num_layers`, and of
    the hidden width, a multiple of its heads, at which it has closest to so many parameters without pooler and head."""
    sizes = _parameters_by_width(teacher, num_layers)
    hidden = min(sizes, key=lambda hidden: abs(sizes[hidden] - parameters))
    return f"bert-{num_layers}x{hidden}x{_inner_width(teacher, hidden)}"


def refuse_out_of_reach(teacher, num_layers: int, parameters: int) -> None:
    """ValueError where no width of `sized_down` has so few or so many parameters."""
    sizes = _parameters_by_width(teacher, num_layers)
    (narrowest, least), (widest, most) = min(sizes.items()), max(sizes.items())
    if not least <= parameters <= most:
        raise ValueError(
            f"--params {parameters:,}: the teacher sized down to {num_layers} layers has from {least:,} (width "
            f"{narrowest}) to {most:,} (width {widest})"
        )


def _parameters_by_width(teacher, num_layers: int) -> dict[int, int]:
    heads, found = teacher.num_attention_heads, {}
    for hidden in range(heads, teacher.hidden_size + 1, heads):
        dims = Dimensions(
            vocab_size=teacher.vocab_size, embedding_size=None, hidden_size=hidden, fit_size=None,
            intermediate_size=_inner_width(teacher, hidden), type_vocab_size=teacher.type_vocab_size,
            max_position_embeddings=teacher.max_position_embeddings,
        )  # fmt: skip
        found[hidden] = count_parameters(Architecture.uniform("1_1", num_layers), dims).total
    return found


def _inner_width(teacher, hidden: int) -> int:
    return round(teacher.intermediate_size / teacher.hidden_size * hidden)
