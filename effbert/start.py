"""Where a student begins: with slices of a supernet, with another student's weights, or with fresh ones.

What the folder holds decides: a supernet gives the slices that an architecture uses, of a narrower student the first
channels and layers repeated (`Supernet.narrowed`); a student gives its own. Sizes are compared before weights are.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from effbert.config import TextConfig
from effbert.data.tokenizer import load_tokenizer
from effbert.errors import first_line
from effbert.model import EffBertConfig, EffBertModel, EffBertPreTrainedModel, parse_architecture
from effbert.models import architecture_of, model_fields, sized_down
from effbert.supernet import Supernet, used_slices

SIZES = (
    "vocab_size", "embedding_size", "hidden_size", "intermediate_size", "num_attention_heads", "type_vocab_size",
    "max_position_embeddings", "position_offset", "combine", "neighbour_padding",
)  # fmt: skip
MAY_LACK = ("pooler.", "fit_dense.")  # a bare encoder has no pooler, a deployed one no projection


def model_config(
    config: TextConfig, model: str, start: str, params: int, teacher, vocabulary: Mapping[str, int]
) -> EffBertConfig:
    """What --model names: a published model, a plain BERT, "teacher" sized down to `params`, an architecture with the
    sizes of --student, or "" for the student in the folder `start`.

    teacher: its transformers config. vocabulary: what a student takes over from it (`student_vocabulary`).
    """
    given = config.student
    common = {
        "num_attention_heads": teacher.num_attention_heads,
        "hidden_dropout_prob": given.hidden_dropout_prob,
        "attention_probs_dropout_prob": given.attention_probs_dropout_prob,
        **vocabulary,
    }
    if not model:
        saved = read_student(start)
        if saved.architectures == ["Supernet"]:
            raise ValueError(f"--start_from {start} is a supernet, of which any model is slices: name one with --model")
        own = {name: getattr(saved, name) for name in ("architecture", *SIZES)}
        return EffBertConfig(**{**own, **common})
    if model == "teacher":
        if not params:
            raise ValueError("--model teacher needs --params: how many parameters are to be left of it")
        model = sized_down(teacher, given.num_hidden_layers, params)
    architecture = architecture_of(model)
    if "(" not in model:
        return EffBertConfig(**{**common, **model_fields(model)})
    sizes = {name: getattr(given, name) for name in ("embedding_size", "hidden_size", "intermediate_size")}
    return EffBertConfig(**{**common, **sizes, "architecture": str(architecture)})


def read_student(folder: str) -> EffBertConfig:
    """The config of a saved student or supernet; ValueError or FileNotFoundError where a folder holds none."""
    path = Path(folder).expanduser()
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"--start_from {folder}: no such folder, or no config.json in it")
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
        if kind == "effbert":
            return EffBertConfig.from_pretrained(path)
    except Exception as error:  # the layers below raise kinds of their own
        raise ValueError(f"--start_from {folder}: its config.json does not do: {first_line(error)}") from error
    raise ValueError(f"--start_from {folder}: a model of type {kind!r}, neither a student nor a supernet of effbert")


def check_start(config: EffBertConfig, folder: str) -> None:
    """ValueError, in one line, where a folder holds no weights for a model with this config."""
    saved = read_student(folder)
    if saved.architectures != ["Supernet"]:
        if saved.architecture != config.architecture:
            raise ValueError(f"--start_from {folder} is a student of another architecture: {saved.architecture}")
    elif config.num_hidden_layers % saved.num_hidden_layers:
        raise ValueError(
            f"--start_from {folder}: a supernet of {saved.num_hidden_layers} layers has no slices for "
            f"{config.num_hidden_layers}"
        )
    elif narrows(saved, config):
        saved.hidden_size = saved.intermediate_size = config.hidden_size
    other = [f"{name} {getattr(saved, name)}, not {getattr(config, name)}" for name in SIZES
             if getattr(saved, name) != getattr(config, name)]  # fmt: skip
    if other:
        raise ValueError(f"--start_from {folder} does not fit the teacher and the model: it has {'; '.join(other)}")


def check_tokens(folder: str, tokenizer) -> None:
    """ValueError where a folder has a tokenizer whose tokens are others than those of `tokenizer`, the teacher's."""
    path = Path(folder).expanduser()
    if not (path / "tokenizer_config.json").is_file():
        return  # an imported student: the sizes are all that can be compared
    own, wanted = load_tokenizer(path).get_vocab(), tokenizer.get_vocab()
    other = sum(wanted.get(token) != number for token, number in own.items())
    if other:
        raise ValueError(
            f"--start_from {folder}: {other:,} of its {len(own):,} tokens are not the teacher's: it learnt with "
            "another vocabulary"
        )


def narrows(supernet: EffBertConfig, config: EffBertConfig) -> bool:
    """Whether a model takes first channels, or layers repeatedly, of a supernet."""
    return config.hidden_size < supernet.hidden_size or config.num_hidden_layers > supernet.num_hidden_layers


def load_start(model: EffBertPreTrainedModel, folder: str) -> None:
    """Give a student, with or without a head, or a supernet, the encoder weights that a folder has for it.

    ValueError, in one line, where sizes, vocabulary or architecture are others, or a weight is missing.
    """
    check_start(model.config, folder)
    path, encoder = Path(folder).expanduser(), model.effbert if hasattr(model, "effbert") else model
    if read_student(folder).architectures == ["Supernet"]:
        supernet = Supernet.from_pretrained(path)
        if narrows(supernet.config, model.config):
            times = model.config.num_hidden_layers // supernet.config.num_hidden_layers
            supernet = supernet.narrowed(model.config.hidden_size, times)
        architecture = parse_architecture(model.config.architecture)
        state = used_slices(supernet.effbert.state_dict(), architecture, supernet.config.intermediate_size)
    else:
        state = EffBertModel.from_pretrained(path).state_dict()
    wanted = encoder.state_dict()
    missing = sorted(name for name in wanted.keys() - state.keys() if not name.startswith(MAY_LACK))
    resized = sorted(name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape)
    if missing or resized:
        raise ValueError(f"--start_from {folder}: weights missing or of another size: {', '.join(missing + resized)}")
    encoder.load_state_dict({name: state[name] for name in wanted.keys() & state.keys()}, strict=False)
