"""The plain model as an ONNX file: written, compared with PyTorch in ONNX Runtime, quantised, scored.

The one idea: nothing is believed of a file that was not run. The published 6×540 architecture with one text of 128
tokens (512) on one CPU core in ONNX Runtime 1.32, median: opset 18 takes 57 (301) ms; opset 23, where attention is one
operator, 54 (257), in int8 39 (194). The fusions of onnxruntime.transformers.optimizer are not used: at opset 18 they
find no attention and take 56 (304) ms; from opset 20 on they put the exact gelu in the place of the tanh form, which
moved logits by 1.7e-4. A session with disabled_optimizers=["SkipLayerNormFusion"] takes 48 (229) at opset 23. Written
in the arrangement of `effbert.inference` (one product for queries, keys and values, padded heads, the last layer for
the first token alone) it took 53 ms where this one took 47, eight texts 418 and 393, 384 tokens 166 and 170, so the
plain model stays.
"""

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from effbert.errors import first_line
from effbert.evaluate import evaluate
from effbert.export import ExportConfig, largest_difference, refuse_difference, sample_inputs
from effbert.teacher import check_texts, usual_length, usual_windows

if TYPE_CHECKING:
    from effbert.data.encode import EncodedTask

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
OLDEST_OPSET, DEFAULT_OPSET = 18, 23
TOLERANCE = 1e-4
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def check_installed() -> None:
    """ValueError, naming the package, where one that ONNX files need is missing."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ValueError(
                f"ONNX files need the package {name} ({first_line(error)}): pip install 'effbert[onnx]'"
            ) from error


def check_opset(opset: int | None) -> None:
    """ValueError for an operator set that the model cannot be written in."""
    import onnx

    newest = onnx.defs.onnx_opset_version()
    if opset is not None and opset < OLDEST_OPSET:
        raise ValueError(f"--opset {opset} is too old for this model: {OLDEST_OPSET} is the oldest that works")
    if opset is not None and opset > newest:
        raise ValueError(f"--opset {opset} is unknown to onnx {onnx.__version__}: {OLDEST_OPSET} to {newest}")


@dataclass(frozen=True)
class Rows:
    """The rows of one split to score on, which `encoded` has as its validation split. columns: for every label of the
    task its column in the logits, then those of other labels. max_length: of a row, in tokens."""

    encoded: "EncodedTask"
    columns: list[int] | None
    max_length: int

    def scores(self, model: "OnnxModel") -> dict[str, float]:
        """The task's metrics on these rows."""

        def logits(batch):
            outputs = model(batch.input_ids, batch.attention_mask, batch.token_type_ids)
            together = torch.stack(outputs, dim=-1) if len(outputs) == 2 else outputs[0]
            return together if self.columns is None else together[:, self.columns]

        return evaluate(logits, self.encoded, pad_token_id=model.config.pad_token_id or 0)

    def __len__(self) -> int:
        return len(self.encoded.raw.validation)


def load_rows(source: Path, config: ExportConfig, model) -> tuple[dict[str, Rows], tuple[str, ...]]:
    """The validation splits of `config`'s task by name, as ids of the tokenizer in `source`, and a line for each that
    is not there; ValueError where they do not fit."""
    from effbert.data import files
    from effbert.data.encode import EncodedTask, encode_split
    from effbert.data.tasks import Task, load_validation
    from effbert.data.tokenizer import load_tokenizer

    kind, notes = _kind(model), ()
    if config.validation_file is not None:
        if kind not in ("classification", "regression"):
            raise ValueError(
                f"--validation_file has rows with labels or scores, but {source} is for {kind or 'no task'}"
            )
        names = [label for _, label in sorted(model.config.id2label.items())] if kind == "classification" else []
        spec = files.own_spec("own", config.text_columns, config.label_column, names)
        rows = files.load_split(spec, config.validation_file, config.text_columns, config.label_column, f"{source} has")
        splits = {"validation": rows}
    else:
        spec, splits, notes = load_validation(config.task, config.data_dir)
    if spec.kind != kind:
        raise ValueError(f"task {spec.name} asks for {spec.kind}, but {source} is for {kind or 'no task'}")
    columns = _columns(spec, model.config.id2label, source) if kind == "classification" else None
    tokenizer = load_tokenizer(source)
    longest = config.max_length or usual_length(model.config, tokenizer, kind)
    check_texts(model.config, tokenizer, longest, "model")
    found = {}
    for name, rows in splits.items():
        encoded = encode_split(rows, spec, tokenizer, longest, **usual_windows(model.config, kind), name=name)
        alone = EncodedTask(Task(spec, rows, rows), encoded, encoded)  # its training rows are not scored on
        found[name] = Rows(alone, columns, longest)
    return found, notes


def _kind(model) -> str | None:
    kinds = {"EffBertForQuestionAnswering": "spans", "EffBertForSequenceClassification": "classification"}
    kind = kinds.get(type(model).__name__)
    return "regression" if kind == "classification" and model.config.num_labels == 1 else kind


def _columns(spec, id2label: dict[int, str], source: Path) -> list[int]:
    from effbert.data.tasks import map_labels

    known = {label.casefold() for label in spec.labels}
    others = [label for label in id2label.values() if label.casefold() not in known]
    try:
        return map_labels([*spec.labels, *others], id2label, str(source))
    except ValueError as error:
        names = ", ".join(id2label.values())
        raise ValueError(
            f"task {spec.name} has labels {', '.join(spec.labels)}, but {source} has {names}: "
            "every label of the task must be one of the model's"
        ) from error


def write(folder: Path, plain, config: ExportConfig, splits: Mapping[str, Rows]) -> list[str]:
    """Write model.onnx, with int8 model_int8.onnx, the config and export.json, where each split to score on has its
    scores under its name; lines that say what was measured."""
    opset = config.opset or DEFAULT_OPSET
    to_onnx(plain, folder / "model.onnx", opset)
    models = {"fp32": _run(folder / "model.onnx", plain.config, opset)}
    difference = largest_difference(plain, models["fp32"])
    refuse_difference(difference, f"opset {opset} in ONNX Runtime", TOLERANCE)
    record = {"class": type(plain).__name__, "architecture": plain.config.architecture, "opset": opset}
    record |= {"inputs": INPUTS, "outputs": list(outputs(plain)), "difference_from_pytorch": difference}
    lines = [f"opset {opset}: outputs differ from PyTorch's by {difference:.1e} at most"]
    if config.int8:
        quantise(folder / "model.onnx", folder / "model_int8.onnx")
        models["int8"] = _run(folder / "model_int8.onnx", plain.config, opset)
        record["int8_difference"] = largest_difference(plain, models["int8"])
        lines.append(f"int8: outputs differ by {record['int8_difference']:.1e} at most, on random input")
    record["bytes"] = {path.name: path.stat().st_size for path in sorted(folder.glob("*.onnx"))}
    lines += [f"{name}: {size / 1e6:.1f} MB" for name, size in record["bytes"].items()]
    record["validation"] = None
    for split, rows in splits.items():
        scores = {name: rows.scores(model) for name, model in models.items()}
        what = {"task": rows.encoded.spec.name, "rows": len(rows), "max_length": rows.max_length}
        record[split] = {**what, **scores}
        lines += [f"{name}: {_shown(values)} on {len(rows)} {split} rows" for name, values in scores.items()]
        if config.int8:
            change = {name: scores["int8"][name] - value for name, value in scores["fp32"].items()}
            record[split]["change"] = change
            lines.append(f"int8 changes {', '.join(f'{name} by {value:+.4f}' for name, value in change.items())}")
    if not splits:
        lines.append("accuracy was not measured: --task or --validation_file says on which rows")
    plain.config.save_pretrained(folder)
    (folder / "export.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return lines


def _shown(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items())


def outputs(plain) -> tuple[str, ...]:
    """Names of what a plain model gives."""
    kind = type(plain).__name__
    if kind == "EffBertModel":
        return ("last_hidden_state", "pooler_output") if plain.pooler is not None else ("last_hidden_state",)
    return ("start_logits", "end_logits") if kind == "EffBertForQuestionAnswering" else ("logits",)


class _Named(nn.Module):
    """A plain model with three tensors in and a tuple of tensors out."""

    def __init__(self, plain):
        super().__init__()
        self.plain, self.names = plain, outputs(plain)

    def forward(self, input_ids, attention_mask, token_type_ids):
        found = self.plain(input_ids, attention_mask, token_type_ids, return_dict=True)
        return tuple(found[name] for name in self.names)


def to_onnx(plain, path: Path, opset: int) -> None:
    """Write `path`, one file, with a free batch and length; ValueError where torch cannot write this opset."""
    import onnx

    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length")}
    inputs = next(sample for sample in sample_inputs(plain.config) if min(sample[0].shape) > 1)
    try:
        with _quiet():
            program = torch.onnx.export(
                _Named(plain),
                inputs,
                dynamo=True,
                opset_version=opset,
                input_names=INPUTS,
                output_names=outputs(plain),
                dynamic_shapes=dict.fromkeys(INPUTS, axes),
                verbose=False,
            )
    except Exception as error:  # the exporter's kinds have no common base
        why = first_line(error.__cause__ or error)  # the exporter's own says which of its steps it was
        raise ValueError(f"torch {torch.__version__} cannot write opset {opset}: {why}") from error
    proto = program.model_proto
    written = next(entry.version for entry in proto.opset_import if not entry.domain)
    if written != opset:
        raise ValueError(f"torch {torch.__version__} cannot write opset {opset}: try --opset {DEFAULT_OPSET}")
    graph = proto.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        del part.metadata_props[:]  # traces with the paths of this machine, a fifth of a small model's file
    onnx.save(proto, path)


class OnnxModel:
    """An ONNX file in ONNX Runtime on the CPU: int64 tensors [B, L] in, a tuple of float32 tensors out."""

    def __init__(self, path: Path, config, disabled_optimizers: Sequence[str] = ()):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"], disabled_optimizers=disabled_optimizers
        )
        self.config = config

    def __call__(self, input_ids, attention_mask, token_type_ids) -> tuple[torch.Tensor, ...]:
        given = (input_ids, attention_mask, token_type_ids)
        found = self.session.run(None, {name: value.numpy() for name, value in zip(INPUTS, given, strict=True)})
        return tuple(map(torch.from_numpy, found))


def _run(path: Path, config, opset: int) -> OnnxModel:
    """The file, loaded and run once; ValueError where this ONNX Runtime cannot."""
    import onnxruntime

    try:
        model = OnnxModel(path, config)
        model(*next(sample_inputs(config)))
    except Exception as error:  # ONNX Runtime raises a kind for each of its codes
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} cannot run opset {opset}: {first_line(error)}; try --opset "
            f"{OLDEST_OPSET}"
        ) from error
    return model


def quantise(source: Path, target: Path) -> None:
    """Write `target`: the linears' weights and the tables of `source` in int8, activations rounded as they come.

    Weights keep 7 of the 8 bits, with a scale for each channel: on CPUs without VNNI instructions the sum of two
    products of 8 bits does not fit its 16.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporters' progress and advice, kept off the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
