"""Where a student begins: with slices of a supernet, with another student's weights, or with fresh ones.

What the folder holds decides: a supernet gives the slices that an architecture uses, of a narrower student the first
channels and layers repeated (`Supernet.narrowed`); a student gives its own. Sizes are compared before weights are. The
projection is training's alone, so one to another teacher's width is begun anew.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from effbert.config import TextConfig
from effbert.data.tasks import TaskSpec, map_labels
from effbert.data.tokenizer import load_tokenizer
from effbert.errors import RUN_STARTS, first_line, refuse_run
from effbert.model import EffBertConfig, EffBertHeadModel, EffBertModel, EffBertPreTrainedModel, parse_architecture
from effbert.models import architecture_of, check_heads, model_fields, refuse_out_of_reach, sized_down
from effbert.supernet import Supernet, head_key, narrowed_inner_width, used_slices
from effbert.teacher import check_weights

SIZES = (
    "vocab_size", "embedding_size", "hidden_size", "intermediate_size", "num_attention_heads", "type_vocab_size",
    "max_position_embeddings", "position_offset", "combine", "neighbour_padding",
)  # fmt: skip
PROJECTION = "fit_dense."
MAY_LACK = ("pooler.", PROJECTION)  # a bare encoder has no pooler, a deployed one no projection
HEADS = ("heads.", "classifier.", "qa_outputs.")
BORROWED_HEADS = {"wnli": "qnli"}  # as published, where it goes by position: the supernet does not learn WNLI


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
        refuse_out_of_reach(teacher, given.num_hidden_layers, params)
        model = sized_down(teacher, given.num_hidden_layers, params)
    architecture = architecture_of(model)
    common["neighbour_padding"] = given.neighbour_padding
    if "(" not in model:
        fields = model_fields(model)
        if "combine" in fields and start:  # an imported supernet learnt with the released padding, and goes on with it
            fields["combine"] = read_student(start).combine
        check_heads(f"--model {model}", fields["hidden_size"], teacher.num_attention_heads)
        return EffBertConfig(**{**common, **fields})
    sizes = {name: getattr(given, name) for name in ("embedding_size", "hidden_size", "intermediate_size")}
    check_heads("the architecture (--student.hidden_size)", given.hidden_size, teacher.num_attention_heads)
    return EffBertConfig(**{**common, **sizes, "architecture": str(architecture)})


def read_student(folder: str) -> EffBertConfig:
    """The config of a saved student or supernet; ValueError or FileNotFoundError where a folder holds none."""
    path = Path(folder).expanduser()
    refuse_run(f"--start_from {folder}", path, RUN_STARTS)
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
        try:
            inner = narrowed_inner_width(saved, config.hidden_size)
        except ValueError as error:
            raise ValueError(f"--start_from {folder}: {error}") from None
        saved.hidden_size, saved.intermediate_size = config.hidden_size, inner
    names = SIZES if saved.embedding_size else tuple(name for name in SIZES if name != "neighbour_padding")
    other = [f"{name} {getattr(saved, name)}, not {getattr(config, name)}" for name in names
             if getattr(saved, name) != getattr(config, name)]  # fmt: skip
    if other:
        flag = "; give --student.neighbour_padding too" if "neighbour_padding" in other[-1] else ""
        told = "; ".join(other) + flag
        raise ValueError(f"--start_from {folder} does not fit the teacher and the model: it has {told}")


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


def fresh_projection(config: EffBertConfig, folder: str) -> str:
    """What there is to say where a model begins with a projection of its own, since that of the folder goes to another
    teacher's width; else ""."""
    width = read_student(folder).fit_size
    if width in (None, config.fit_size):
        return ""
    return (
        f"--start_from {folder}: its projection (fit_dense) is for a teacher of width {width}, this one has "
        f"{config.fit_size}: it begins with fresh weights"
    )


def load_start(model: EffBertPreTrainedModel, folder: str) -> None:
    """Give a student, with or without a head, or a supernet, the encoder weights that a folder has for it.

    ValueError as `start_weights`.
    """
    encoder = model.effbert if hasattr(model, "effbert") else model
    encoder.load_state_dict(start_weights(model.config, folder), strict=False)


@torch.no_grad()
def load_head(model: EffBertHeadModel, folder: str, task: TaskSpec) -> str:
    """Give a student the head that a supernet has learnt for a task, or for the one whose head a task borrows, label by
    label; the pooler is the encoder's. Returns that task's name, or "", and nothing is done, where the folder has no
    head of that kind with these labels."""
    known = {name: (kind, labels) for name, kind, labels in getattr(read_student(folder), "supernet_tasks", [])}
    name = next((name for name in (task.name, BORROWED_HEADS.get(task.name)) if name in known), "")
    if not name or known[name][0] != task.kind:
        return ""
    columns = slice(None)
    if task.kind == "classification":
        try:
            columns = map_labels(task.labels, dict(enumerate(known[name][1])), name)
        except ValueError:
            return ""
    supernet, _ = read_weights(Supernet, folder)
    head = supernet.heads[head_key(name)]
    model.head_layer.weight.copy_(head.weight[columns])
    model.head_layer.bias.copy_(head.bias[columns])
    return name


def start_weights(config: EffBertConfig, folder: str) -> dict[str, torch.Tensor]:
    """The encoder weights that a folder has for a model with this config, without a projection to another width.

    ValueError, in one line, where sizes, vocabulary or architecture are others, or a weight is missing.
    """
    check_start(config, folder)
    if read_student(folder).architectures == ["Supernet"]:
        supernet, lacking = read_weights(Supernet, folder)
        if narrows(supernet.config, config):
            times = config.num_hidden_layers // supernet.config.num_hidden_layers
            supernet = supernet.narrowed(config.hidden_size, times)
        architecture = parse_architecture(config.architecture)
        state = used_slices(supernet.effbert.state_dict(), architecture, supernet.config.intermediate_size)
    else:
        student, lacking = read_weights(EffBertModel, folder)
        state = student.state_dict()
    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in EffBertModel(config).state_dict().items()}
    state = {name: tensor for name, tensor in state.items() if name in wanted and name not in lacking}
    other = {name for name, tensor in state.items() if tensor.shape != wanted[name]}
    resized = {name for name in other if not name.startswith(PROJECTION)}
    missing = {name for name in wanted.keys() - state.keys() if not name.startswith(MAY_LACK)}
    if missing or resized:
        names = ", ".join(sorted(missing | resized))
        raise ValueError(f"--start_from {folder}: weights missing or of another size: {names}")
    return {name: tensor for name, tensor in state.items() if name not in other}


def read_weights(
    kind: type[EffBertPreTrainedModel], folder: str, where: str = "", may_lack: Sequence[str] = (*MAY_LACK, *HEADS)
) -> tuple[EffBertPreTrainedModel, set[str]]:
    """The model that a folder holds, and the names of its encoder's weights that the folder lacks, which are drawn.

    where: names the folder in errors, "" for that of --start_from. may_lack: parts of names that may be missing.
    ValueError, in one line, where weights cannot be read, or are not those that config.json asks for.
    """
    where = where or f"--start_from {folder}"
    try:
        model, found = kind.from_pretrained(
            Path(folder).expanduser(), use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True
        )
    except Exception as error:  # the layers below raise kinds of their own
        raise ValueError(f"{where}: its weights cannot be read: {first_line(error)}") from error
    check_weights(where, found, may_lack)
    return model, {name.removeprefix("effbert.") for name in found["missing_keys"]}
