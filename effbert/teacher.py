"""The teacher: any BERT-like transformers encoder, read without changing it.

Queries and keys are caught by forward hooks on the encoder's own query and key Linears, hidden states and logits come
from its normal outputs, so attention can run in any implementation; its probabilities are in memory only where
`effbert.kernels.eager.attention` has them too. A teacher must fit the student: as many attention heads, and a number of
layers that the student's divides. What can be told from its config is refused before any weights are read.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from effbert.checkpoint import own_memory
from effbert.data.encode import WINDOWS
from effbert.errors import RUN_STUDENTS, RUN_TEACHERS, first_line, first_of, refuse_run
from effbert.kernels.eager import by_onednn
from effbert.model import refuse_not_finite
from effbert.trace import Trace


def layer_map(teacher_layers: int, student_layers: int) -> list[int]:
    """For each student layer l its teacher layer (l + 1) · k - 1, k = teacher_layers / student_layers."""
    if teacher_layers % student_layers:
        fits = [n for n in range(1, teacher_layers + 1) if teacher_layers % n == 0]
        raise ValueError(
            f"a teacher of {teacher_layers} layers cannot be divided among {student_layers} student layers: "
            f"--student.num_hidden_layers should be one of {', '.join(map(str, fits))}"
        )
    interval = teacher_layers // student_layers
    return [(index + 1) * interval - 1 for index in range(student_layers)]


def check_shape(teacher_layers: int, teacher_heads: int, student_layers: int, student_heads: int) -> None:
    """ValueError where a student of this shape cannot learn from a teacher of that shape."""
    layer_map(teacher_layers, student_layers)
    if teacher_heads != student_heads:
        raise ValueError(
            f"the teacher has {teacher_heads} attention heads and the student {student_heads}: scores are compared "
            f"head by head, so give --student.num_attention_heads {teacher_heads}, and a --student.hidden_size "
            "that it divides"
        )


class Teacher(nn.Module):
    """A frozen teacher whose `trace` gives hidden states, queries, keys and logits.

    model: a transformers encoder with `layer[i].attention.self.query` and `.key` (BERT, RoBERTa, ELECTRA and their
        relatives), bare or with a classification or question-answering head.
    columns: which of the model's logits comes first, second, ..., as `effbert.data.tasks.map_labels` gives it; None
        keeps the model's own order.
    """

    def __init__(self, model: nn.Module, columns: Sequence[int] | None = None):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        moved = columns is not None and list(columns) != list(range(len(columns)))
        self.register_buffer("columns", torch.tensor(columns) if moved else None, persistent=False)
        self.layers = [layer.attention.self for layer in encoder_layers(self.encoder)]
        self._caught: dict[tuple[str, int], torch.Tensor] = {}
        for index, attention in enumerate(self.layers):
            attention.query.register_forward_hook(self._catch("query", index))
            attention.key.register_forward_hook(self._catch("key", index))

    def _catch(self, what, index):
        def hook(module, inputs, output):
            self._caught[what, index] = output

        return hook

    def _take(self, what):
        heads = self.config.num_attention_heads
        caught = (self._caught.pop((what, index)) for index in range(len(self.layers)))
        return tuple(x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in caught)

    @property
    def encoder(self) -> nn.Module:
        """The model without its head."""
        return getattr(self.model, self.model.base_model_prefix, self.model)

    @torch.no_grad()
    def trace(self, input_ids, attention_mask=None, token_type_ids=None, head: bool = True) -> Trace:
        """As `effbert.trace.Trace`; token_type_ids are dropped for a teacher with one segment. Without `head` the
        encoder alone runs, and there are no logits."""
        model = self.model if head else self.encoder
        if self.config._attn_implementation == "sdpa" and by_onednn(next(model.parameters())):
            self.model.set_attn_implementation("eager")
        inputs = _inputs(self.config, input_ids, attention_mask, token_type_ids)
        output = model(**inputs, output_hidden_states=True)
        logits = _logits(output)
        if logits is not None and self.columns is not None:
            logits = logits.index_select(-1, self.columns)
        return Trace(tuple(output.hidden_states), self._take("query"), self._take("key"), logits)


def logits_of(model: nn.Module, input_ids, attention_mask=None, token_type_ids=None) -> torch.Tensor:
    """What a transformers model with a head answers as it stands, [B, labels] or [B, L, 2], nothing frozen in it."""
    return _logits(model(**_inputs(model.config, input_ids, attention_mask, token_type_ids)))


def _inputs(config, input_ids, attention_mask, token_type_ids) -> dict[str, torch.Tensor]:
    if getattr(config, "type_vocab_size", 1) < 2:
        token_type_ids = None
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
    return {name: value for name, value in inputs.items() if value is not None}


def _logits(output) -> torch.Tensor | None:
    if "start_logits" in output:
        return torch.stack((output.start_logits, output.end_logits), dim=-1)
    return output.logits if "logits" in output else None


def encoder_layers(encoder: nn.Module) -> nn.ModuleList:
    """The layers of a BERT-like encoder; ValueError where it is of another kind."""
    layers = getattr(getattr(encoder, "encoder", None), "layer", None)
    usable = layers is not None and len(layers) > 0
    if not usable or not hasattr(getattr(getattr(layers[0], "attention", None), "self", None), "query"):
        raise ValueError(f"a {type(encoder).__name__} cannot be the teacher: {NEEDED}")
    return layers


NEEDED = "its layers need attention.self.query and .key, as in BERT, RoBERTa and ELECTRA"


def check_family(config) -> None:
    """ValueError where the encoder of a transformers config is not BERT-like; no weights are made or read."""
    from transformers import AutoModel

    try:
        with torch.device("meta"):
            encoder = AutoModel.from_config(config, attn_implementation="sdpa")
    except Exception as error:
        raise ValueError(
            f"a {config.model_type} model cannot be the teacher: {NEEDED} ({first_line(error)})"
        ) from error
    encoder_layers(encoder)


def longest_text(config) -> int:
    """Tokens that a model, or a student, has positions for; ValueError where its config does not say."""
    positions = getattr(config, "max_position_embeddings", None) or 0
    if positions < 1:
        raise ValueError(
            f"a {config.model_type} model cannot be read: its config should have max_position_embeddings, the longest "
            "text, as BERT's has"
        )
    offset = getattr(config, "position_offset", None)
    return positions - (position_offset(config) if offset is None else offset)


def position_offset(config) -> int:
    """The position of a text's first token: RoBERTa counts from pad_token_id + 1, so its table is that much longer than
    its texts."""
    return config.pad_token_id + 1 if config.model_type in ROBERTA_LIKE else 0


def learnt_length(config, tokenizer=None) -> int:
    """Tokens of the longest text that a model has positions for and its tokenizer, where there is one, is meant for: of
    a student as many as it learnt with."""
    longest = longest_text(config)
    return longest if tokenizer is None else min(tokenizer.model_max_length, longest)


def usual_length(config, tokenizer, kind: str) -> int:
    """Tokens of a text where nobody says how many: of our students and teachers as many as they learnt with, which a
    student's tokenizer and a teacher's config say; of others 128, or 384 for a task of kind "spans", and no more than
    tokenizer and positions allow."""
    if learnt := getattr(config, "learnt_length", 0):
        return learnt
    most = learnt_length(config, tokenizer)
    if config.model_type == "effbert" and tokenizer.model_max_length < 10**9:  # transformers' way to say nothing
        return most
    return min(384 if kind == "spans" else 128, most)


def usual_windows(config, kind: str, given: object = None) -> dict[str, int]:
    """How a task's contexts are cut (effbert.data.encode): as `given` says where it has numbers other than 0, else as
    the model learnt, which its config says; {} for a kind of task without contexts."""
    names = WINDOWS if kind == "spans" else ()
    return {name: getattr(given, name, 0) or getattr(config, name, 0) for name in names}


def check_texts(config, tokenizer, max_length: int, what: str = "teacher") -> None:
    """ValueError where a teacher cannot read texts of `max_length` ids from this tokenizer."""
    if max_length > longest_text(config):
        raise ValueError(
            f"the {what} reads texts of at most {longest_text(config)} tokens: --max_length {max_length} is too long"
        )
    check_vocabulary(config, tokenizer, what)


def check_vocabulary(config, tokenizer, what: str) -> None:
    """ValueError where a tokenizer is not that of a model with this config."""
    vocabulary = getattr(config, "vocab_size", 0)
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries and the {what}'s vocabulary {vocabulary}: "
            "they do not belong together"
        )
    if tokenizer.pad_token_id != config.pad_token_id:
        raise ValueError(
            f"the tokenizer pads with id {tokenizer.pad_token_id} and the {what} with {config.pad_token_id}: "
            "set pad_token_id in its config.json to the tokenizer's"
        )


def local_path(folder: str | Path) -> Path | str:
    """`folder` with ~ expanded; what is no path here and does not look like one stays a hub name."""
    path = Path(folder).expanduser()
    return path if path.exists() or str(folder).startswith((".", "/", "~")) else str(folder)


def read_config(folder: str | Path, what: str = "teacher"):
    """The transformers config of a folder or hub name; FileNotFoundError where a folder lacks its files. `what` names
    the model in errors."""
    from transformers import AutoConfig

    path = local_path(folder)
    if isinstance(path, Path):
        _check_files(path, f"{what} {folder}", RUN_TEACHERS if what == "teacher" else RUN_STUDENTS)
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:
        raise ValueError(f"{what} {folder}: {first_line(error)}") from error


WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def _check_files(path: Path, where: str, places: Sequence[str]) -> None:
    if not path.is_dir():
        raise FileNotFoundError(f"{where}: no such folder")
    refuse_run(where, path, places)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{where}: no config.json in this folder")
    if any((path / name).exists() for name in WEIGHT_FILES):
        return
    if any(path.glob("pytorch_model*.bin")):
        raise FileNotFoundError(
            f"{where}: only pickled weights in this folder, which may hold code and are not read: "
            "save it with safetensors"
        )
    raise FileNotFoundError(f"{where}: no weights in this folder, one of {', '.join(WEIGHT_FILES)}")


def content_hash(folder: str | Path) -> str:
    """What a teacher's files hold: a hash of config and weights, for a hub name its commit."""
    path = local_path(folder)
    if not isinstance(path, Path):
        return str(read_config(folder)._commit_hash)
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted([path / "config.json", *path.glob("model*.safetensors")]):
        with open(file, "rb") as handle:
            digest.update(file.name.encode() + hashlib.file_digest(handle, "blake2b").digest())
    return digest.hexdigest()


def load_model(folder: str | Path, head: str | None = None, what: str = "teacher") -> nn.Module:
    """A transformers model in fp32 with its weights from safetensors; `head` None, "classification", "regression" or
    "spans". ValueError where a weight is missing (a bare encoder may lack its pooler), of another size, not finite, or
    of a layer too many."""
    import transformers

    read_config(folder, what)
    auto = transformers.AutoModel if head is None else _auto_class(head)
    try:
        model, found = auto.from_pretrained(
            local_path(folder),
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as error:
        raise ValueError(f"{what} {folder}: its weights cannot be read: {first_line(error)}") from error
    check_weights(f"{what} {folder}", found, may_lack=("pooler.",) if head is None else ())
    refuse_not_finite(model.state_dict(), f"{what} {folder}")
    return own_memory(model)


def _auto_class(head: str):
    import transformers

    if head == "spans":
        return transformers.AutoModelForQuestionAnswering
    return transformers.AutoModelForSequenceClassification


_OF_LAYER = re.compile(r"(^|\.)(encoder\.layer|layers)\.\d+\.")  # heads of other tasks may be there, layers not


def check_weights(where: str, found: dict, may_lack: Sequence[str]) -> None:
    """ValueError, which lists them, where the weights of a folder are not those that its config.json asks for.

    found: what transformers says of loading them. may_lack: parts of names that may be missing.
    """
    missing = [name for name in found["missing_keys"] if not any(part in name for part in may_lack)]
    if missing:
        raise ValueError(f"{where}: its weights lack {first_of(missing)}, which its config.json asks for")
    resized = [name for name, *_ in found["mismatched_keys"]]
    if resized:
        raise ValueError(f"{where}: weights of another size than its config.json says: {first_of(resized)}")
    surplus = [name for name in found["unexpected_keys"] if _OF_LAYER.search(name)]
    if surplus:
        raise ValueError(f"{where}: its weights hold {first_of(surplus)}, which its config.json does not know")


def with_new_head(folder: str | Path, head: str, labels: Sequence[str]) -> nn.Module:
    """The encoder of `folder` under a fresh head, drawn from PyTorch's generator, whatever head it had before.

    head: as in `load_model`. labels: a name for each of its outputs.
    """
    encoder = load_model(folder)
    config = encoder.config
    config.id2label = dict(enumerate(labels))
    config.label2id = {name: index for index, name in enumerate(labels)}
    config.problem_type = "regression" if len(labels) == 1 else None
    model = _auto_class(head).from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    getattr(model, model.base_model_prefix).load_state_dict(encoder.state_dict(), strict=False)
    return model


def head_of(config) -> str | None:
    """Which head a saved model has: "classification", "spans" or None, from the class names in its config."""
    for name in config.architectures or ():
        if name.endswith("ForSequenceClassification"):
            return "classification"
        if name.endswith("ForQuestionAnswering"):
            return "spans"
    return None


ROBERTA_LIKE = (
    "roberta", "xlm-roberta", "xlm-roberta-xl", "camembert", "roberta-prelayernorm", "data2vec-text", "mpnet",
    "longformer", "ibert",
)  # fmt: skip


def student_vocabulary(config) -> Mapping[str, int]:
    """What a student takes over from its teacher: vocabulary, padding, positions, segments."""
    return {
        "vocab_size": config.vocab_size,
        "pad_token_id": config.pad_token_id,
        "position_offset": position_offset(config),
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "fit_size": config.hidden_size,
    }
