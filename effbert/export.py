"""Deploying a student: a transformers folder that also loads where effbert is missing, or an ONNX file.

The one idea: both come from the same plain model (`effbert.standalone`), which is compared with the student before it
is used, so what is handed out computes what was trained. A folder appears whole or not at all.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from effbert import card, standalone
from effbert.architecture import Architecture
from effbert.data import tokenizer
from effbert.errors import RUN_STUDENTS, first_line, first_of, refuse_run
from effbert.files import atomic_dir
from effbert.model import (
    EffBertConfig,
    EffBertForQuestionAnswering,
    EffBertForSequenceClassification,
    EffBertModel,
    EffBertPreTrainedModel,
    refuse_not_finite,
    without_pooler,
)
from effbert.random import generator
from effbert.teacher import check_vocabulary, learnt_length

STUDENTS = {
    kind.__name__: kind for kind in (EffBertForSequenceClassification, EffBertForQuestionAnswering, EffBertModel)
}
TOKENIZER_FILES = (
    tokenizer.FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
CODE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ExportConfig:
    """How a student is exported.

    Args:
        output_dir: Folder to write; it must not exist.
        format: transformers: config, weights, tokenizer, and the model's own code, which loads with
            trust_remote_code=True where effbert is missing. onnx: model.onnx, checked with ONNX Runtime. README.md
            says of either what it is and by which lines it is read.
        opset: ONNX operator set, 18 or later; 23 by default, the first with an attention operator.
        int8: Also write model_int8.onnx: weights of 8 bits, activations rounded as they come.
        task: Task whose validation splits the ONNX files are scored on, as effbert evaluate does.
        data_dir: Folder with the task's files, for GLUE and SQuAD.
        validation_file: Own rows to score on instead: CSV, TSV or JSON.
        text_columns: Columns of validation_file that hold the text, one or two.
        label_column: Column of validation_file that holds the label.
        max_length: Longest row to score on, in tokens; 0 for what the student learnt with, as its tokenizer says.
    """

    output_dir: str
    format: Literal["transformers", "onnx"] = "transformers"
    opset: int | None = None
    int8: bool = False
    task: str | None = None
    data_dir: str | None = None
    validation_file: str | None = None
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    max_length: int = 0

    def check(self) -> None:
        """ValueError for flags that do not go together, or a folder that exists."""
        if self.format != "onnx":
            given = {"opset": self.opset, "int8": self.int8, "task": self.task, "validation_file": self.validation_file}
            for name in (name for name, value in given.items() if value not in (None, False)):
                raise ValueError(f"--{name} is for ONNX files: add --format onnx, or leave it out")
        if self.task is not None and self.validation_file is not None:
            raise ValueError("--task and --validation_file exclude each other: give a known task, or your own rows")
        if self.max_length and self.task is None and self.validation_file is None:
            raise ValueError("--max_length is of rows to score on: name them with --task or --validation_file")
        if self.label_column != ExportConfig.label_column and self.validation_file is None:
            raise ValueError("--label_column is a column of --validation_file: give both, or neither")
        if self.data_dir is not None and self.task is None:
            raise ValueError("--data_dir is the folder of a known task: name it with --task")
        if bool(self.text_columns) != (self.validation_file is not None):
            raise ValueError("--validation_file and --text_columns go together: own rows, and where their text is")
        if self.max_length < 0:
            raise ValueError(f"--max_length {self.max_length}: it must be at least 0")
        target = Path(self.output_dir)
        if target.exists() or target.is_symlink():
            raise ValueError(f"{target} exists already: give --output_dir a folder that does not")


def export(source: str | Path, config: ExportConfig) -> list[str]:
    """Write the student of the folder `source` as `config` says; lines that tell what was written and measured.

    Raises ValueError or OSError, one line, before anything is written or with nothing left behind.
    """
    config.check()
    source, target = Path(source), Path(config.output_dir)
    if config.format == "onnx":
        from effbert import onnx_export

        onnx_export.check_installed()
        onnx_export.check_opset(config.opset)
    model = load_student(source)
    refuse_not_finite(model.state_dict(), source)
    known = card.read_scores(source)
    files = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    own = tokenizer.load_tokenizer(source) if files else None
    if own is not None:
        check_vocabulary(model.config, own, f"student {source}")
    longest = learnt_length(model.config, own)
    scored = config.task or config.validation_file
    splits, notes = onnx_export.load_rows(source, config, model) if scored else ({}, ())
    text = standalone.source(model.config)
    plain = standalone.plain_model(model, standalone.load(text))
    refuse_difference(largest_difference(model, plain), f"{standalone.FILE_NAME} for {source}", CODE_TOLERANCE)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_dir(target) as folder:
        for name in files:
            copy = tokenizer.copy_uncut if name == tokenizer.FILE else shutil.copyfile
            copy(source / name, folder / name)
        if config.format == "onnx":
            lines = [*onnx_export.write(folder, plain, config, splits), *notes]
        else:
            lines = _write_transformers(folder, model, text)
        written = sorted(path.name for path in folder.glob("*.onnx"))
        page = card.model_card(model, target.name, written, known, longest, tokenizer=bool(files))
        (folder / card.FILE_NAME).write_text(page, encoding="utf-8")
        if known:
            shutil.copyfile(source / card.SCORES, folder / card.SCORES)
    lines += without_pooler(model)
    if not files:
        lines.append(f"{source} holds no tokenizer, so {target} has none either")
    return [f"{target} is written", *lines]


def load_student(folder: str | Path) -> EffBertPreTrainedModel:
    """The student saved in `folder`, in evaluation mode, without the training-only projection.

    Raises ValueError or FileNotFoundError, one line, for a folder that holds no student or not all of its weights.
    """
    folder = Path(folder)
    kind = _saved_class(folder)
    try:
        config = EffBertConfig.from_pretrained(folder)
        config.architecture, config.fit_size = str(Architecture.parse(config.architecture)), None
        model, missing, unexpected, resized = _load(kind, folder, config)
        if kind is EffBertModel and missing == {"pooler.weight", "pooler.bias"}:
            model, missing, unexpected, resized = _load(kind, folder, config, add_pooling_layer=False)
    except Exception as error:  # the layers below raise kinds of their own
        raise ValueError(f"{folder} cannot be loaded: {first_line(error)}") from error
    unexpected = {name for name in unexpected if "fit_dense" not in name}
    other_size = "has, of another size than its config.json says,"
    for names, what in ((missing, "lacks"), (unexpected, "has, beyond the model's,"), (resized, other_size)):
        if names:
            raise ValueError(f"{folder} {what} the weights {first_of(names)}")
    return model.float().eval()


def _load(kind, folder: Path, config: EffBertConfig, **options):
    model, found = kind.from_pretrained(
        folder, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    resized = {name for name, *_ in found["mismatched_keys"]}
    return model, set(found["missing_keys"]), set(found["unexpected_keys"]), resized


def _saved_class(folder: Path) -> type[EffBertPreTrainedModel]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder; MODEL is one that a student was saved in, such as RUN/best")
    refuse_run(str(folder), folder, RUN_STUDENTS)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no effbert model: it has no config.json")
    try:
        saved = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind, names = saved.get("model_type"), saved.get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{folder}/config.json is no configuration: {first_line(error)}") from error
    if kind != "effbert":
        raise ValueError(f"{folder} is no effbert model: its config.json says model_type {kind!r}, not 'effbert'")
    if len(names) != 1 or names[0] not in STUDENTS:
        raise ValueError(
            f"{folder}/config.json has architectures {names}; one of {', '.join(STUDENTS)} can be exported"
        )
    return STUDENTS[names[0]]


def sample_inputs(config: EffBertConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Random input_ids, attention_mask and token_type_ids, int64 [B, L], for several B and L, padded and not."""
    rng = generator(0, "export")
    longest = config.max_position_embeddings - getattr(config, "position_offset", 0)
    for batch, length in ((1, 1), (3, 8), (2, 33), (5, 21), (1, 128)):
        length = min(length, longest)
        ids = rng.integers(config.vocab_size, size=(batch, length))
        segments = rng.integers(config.type_vocab_size, size=(batch, length))
        lengths = rng.integers(1, length + 1, size=batch)
        lengths[0] = length
        mask = (torch.arange(length)[None] < torch.from_numpy(lengths)[:, None]).long()
        ids = torch.from_numpy(ids) * mask + (config.pad_token_id or 0) * (1 - mask)
        yield ids, mask, torch.from_numpy(segments) * mask


@torch.inference_mode()
def largest_difference(model, other) -> float:
    """Largest absolute difference of two models' outputs on the sample inputs; infinite where one is not finite.

    Both take (input_ids, attention_mask, token_type_ids) and give outputs with a `to_tuple`, or a tuple of tensors.
    """
    worst = 0.0
    for inputs in sample_inputs(model.config):
        for a, b in zip(_tensors(model(*inputs)), _tensors(other(*inputs)), strict=True):
            difference = (a - b).abs().max().item()
            worst = max(worst, difference if difference == difference else float("inf"))
    return worst


def _tensors(output) -> tuple[torch.Tensor, ...]:
    values = output.to_tuple() if hasattr(output, "to_tuple") else output
    return tuple(value for value in values if isinstance(value, torch.Tensor))  # not the hidden states, a tuple


def refuse_difference(difference: float, what: str, tolerance: float) -> None:
    """ValueError where a difference is above what rounding explains."""
    if not difference <= tolerance:
        raise ValueError(f"{what}: outputs differ from the model's by {difference:.1e}, more than {tolerance:g}")


def _write_transformers(folder: Path, model: EffBertPreTrainedModel, text: str) -> list[str]:
    stem = standalone.FILE_NAME.removesuffix(".py")
    model.config.auto_map = {auto: f"{stem}.{name}" for auto, name in standalone.CLASSES.items()}
    model.save_pretrained(folder)
    (folder / standalone.FILE_NAME).write_text(text, encoding="utf-8")
    size = (folder / "model.safetensors").stat().st_size
    return [
        f"{type(model).__name__}, {size / 1e6:.1f} MB; without effbert: trust_remote_code=True",
    ]
