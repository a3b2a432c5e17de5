"""The teacher: any BERT-like transformers encoder, read without changing it.

Queries and keys are caught by forward hooks on the encoder's own query and key Linears, hidden states and logits come
from its normal outputs, so attention can run in any implementation and is never materialised. A teacher must fit the
student: as many attention heads, and a number of layers that the student's divides.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from effbert.checkpoint import own_memory
from effbert.trace import Trace


def layer_map(teacher_layers: int, student_layers: int) -> list[int]:
    """For each student layer l its teacher layer (l + 1) · k - 1, k = teacher_layers / student_layers."""
    if teacher_layers % student_layers:
        fits = [n for n in range(1, teacher_layers + 1) if teacher_layers % n == 0]
        raise ValueError(
            f"a teacher of {teacher_layers} layers cannot be divided among {student_layers} student layers: "
            f"student layers that fit are {', '.join(map(str, fits))}"
        )
    interval = teacher_layers // student_layers
    return [(index + 1) * interval - 1 for index in range(student_layers)]


def check_shape(teacher_layers: int, teacher_heads: int, student_layers: int, student_heads: int) -> None:
    """ValueError where a student of this shape cannot learn from a teacher of that shape."""
    layer_map(teacher_layers, student_layers)
    if teacher_heads != student_heads:
        raise ValueError(
            f"the teacher has {teacher_heads} attention heads and the student {student_heads}: scores are compared "
            f"head by head, so set num_attention_heads to {teacher_heads}, with a hidden_size that it divides"
        )


class Teacher(nn.Module):
    """A frozen teacher whose `trace` gives hidden states, queries, keys and logits.

    model: a transformers encoder with `layer[i].attention.self.query` and `.key` (BERT, RoBERTa, ELECTRA and their
        relatives), bare or with a classification or question-answering head.
    columns: the order of the logits' columns, e.g. from `effbert.data.tasks.map_labels`; None keeps the model's own.
    """

    def __init__(self, model: nn.Module, columns: Sequence[int] | None = None):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.config = model.config
        self.columns = None if columns is None else list(columns)
        encoder = getattr(model, model.base_model_prefix, model)
        self.layers = [layer.attention.self for layer in _encoder_layers(encoder)]
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

    @torch.no_grad()
    def trace(self, input_ids, attention_mask=None, token_type_ids=None) -> Trace:
        """As `effbert.trace.Trace`; token_type_ids are dropped for a teacher with one segment."""
        if getattr(self.config, "type_vocab_size", 1) < 2:
            token_type_ids = None
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        output = self.model(**{k: v for k, v in inputs.items() if v is not None}, output_hidden_states=True)
        return Trace(tuple(output.hidden_states), self._take("query"), self._take("key"), self._logits(output))

    def _logits(self, output):
        if "start_logits" in output:
            return torch.stack((output.start_logits, output.end_logits), dim=-1)
        if "logits" not in output:
            return None
        return output.logits if self.columns is None else output.logits[..., self.columns]


def _encoder_layers(encoder: nn.Module) -> nn.ModuleList:
    layers = getattr(getattr(encoder, "encoder", None), "layer", None)
    usable = layers is not None and len(layers) > 0
    if not usable or not hasattr(getattr(getattr(layers[0], "attention", None), "self", None), "query"):
        raise ValueError(
            f"a {type(encoder).__name__} cannot be the teacher: its layers need attention.self.query and .key, "
            "as in BERT, RoBERTa and ELECTRA"
        )
    return layers


def read_config(folder: str | Path):
    """The transformers config of a teacher folder or hub name; FileNotFoundError where a folder lacks its files."""
    from transformers import AutoConfig

    path = Path(folder)
    if path.exists() or str(folder).startswith((".", "/", "~")):
        if not path.is_dir():
            raise FileNotFoundError(f"teacher {folder}: no such folder")
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"teacher {folder}: no config.json in this folder")
        if not any((path / name).exists() for name in WEIGHT_FILES):
            raise FileNotFoundError(f"teacher {folder}: no weights in this folder, one of {', '.join(WEIGHT_FILES)}")
    try:
        return AutoConfig.from_pretrained(folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"teacher {folder}: {str(error).splitlines()[0]}") from error


WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")


def load_model(folder: str | Path, head: str | None = None, **overrides) -> nn.Module:
    """A transformers model with its weights from safetensors; `head` None, "classification", "regression" or "spans".

    `overrides` go to the config, e.g. id2label for a head that is new. Pickled weights are refused.
    """
    import transformers

    read_config(folder)
    auto = {
        None: transformers.AutoModel,
        "classification": transformers.AutoModelForSequenceClassification,
        "regression": transformers.AutoModelForSequenceClassification,
        "spans": transformers.AutoModelForQuestionAnswering,
    }[head]
    try:
        model = auto.from_pretrained(folder, use_safetensors=True, attn_implementation="sdpa", **overrides)
    except Exception as error:
        raise ValueError(f"teacher {folder}: its weights cannot be read: {str(error).splitlines()[0]}") from error
    return own_memory(model)


def head_of(config) -> str | None:
    """Which head a saved model has: "classification", "spans" or None, from the class names in its config."""
    for name in config.architectures or ():
        if name.endswith("ForSequenceClassification"):
            return "classification"
        if name.endswith("ForQuestionAnswering"):
            return "spans"
    return None


def student_vocabulary(config) -> Mapping[str, int]:
    """What a student takes over from its teacher: vocabulary, padding, positions, segments.

    RoBERTa counts positions from pad_token_id + 1, so its table is that much longer than its texts.
    """
    roberta_like = config.model_type in ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm")
    offset = config.pad_token_id + 1 if roberta_like else 0
    return {
        "vocab_size": config.vocab_size,
        "pad_token_id": config.pad_token_id,
        "position_offset": offset,
        "max_position_embeddings": config.max_position_embeddings,
        "type_vocab_size": config.type_vocab_size,
        "fit_size": config.hidden_size,
    }
