"""The model card of an exported folder: its README.md.

The one idea: whoever gets the folder has nothing else, so the card says what it holds and by which lines it is read;
the lines are those that the tests run. Scores are what the student's folder says of itself (scores.json).
"""

import json
from collections.abc import Sequence
from pathlib import Path

from effbert.architecture import Architecture
from effbert.data.tasks import TaskSpec
from effbert.errors import first_line

FILE_NAME = "README.md"
SCORES = "scores.json"
PURPOSES = {"classes": "classifies texts", "score": "gives texts a score", "spans": "finds answers", "none": "encodes"}
PIPELINES = {"spans": "question-answering", "none": "feature-extraction"}
TRUST = """\
`trust_remote_code=True` lets transformers run `modeling_effbert.py` of this folder, the whole model in plain PyTorch.
The tokenizer runs no code: alone it is read with `trust_remote_code=False` too. Given neither, transformers asks, since
it looks at the model's configuration first."""


def scores_text(spec: TaskSpec, rows: int, scores: dict[str, float]) -> str:
    """What scores.json of a student's folder holds: its metrics on so many validation rows of a task."""
    return json.dumps({"task": spec.name, "pair": spec.pair, "rows": rows, "scores": scores}, indent=1)


def read_scores(folder: Path) -> dict | None:
    """What `scores_text` left in a student's folder, None where it left nothing; ValueError where it is damaged."""
    file = folder / SCORES
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        scores = {str(name): float(value) for name, value in found["scores"].items()}
        return {"task": str(found["task"]), "pair": bool(found["pair"]), "rows": int(found["rows"]), "scores": scores}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} holds no scores ({first_line(error)}): remove it") from error


def model_card(model, name: str, files: Sequence[str], scores: dict | None, longest: int, *, tokenizer: bool) -> str:
    """README.md of the exported folder `name`.

    model: the exported student. files: its ONNX files, none in transformers' format. scores: as `read_scores` gives
    them. longest: tokens of the longest text that it reads as it learnt to. tokenizer: whether the folder has one.
    """
    config, kind = model.config, _kind(model)
    layers = Architecture.parse(config.architecture).layers
    texts = _texts(kind, scores) if tokenizer else ""
    parts = [
        "---",
        f"library_name: {'onnx' if files else 'transformers'}",
        f"pipeline_tag: {PIPELINES.get(kind, 'text-classification')}",
        "tags: [effbert]",
        "---",
        f"# A small BERT of {len(layers)} layers that {PURPOSES[kind]}",
        "",
        f"{model.num_parameters():,} parameters, width {config.hidden_size}, {config.num_attention_heads} attention "
        f"heads, texts of at most {longest} tokens. Written by `effbert export`.",
        "",
        *(_labels(config) if kind == "classes" else ()),
        *(_scored(scores) if scores else ()),
        "```python",
        *(_onnx_lines(name, files[0], texts) if files else _torch_lines(model, kind, name, texts)),
        "```",
        "",
        *_remarks(files, tokenizer),
        "The feed-forward part of each layer (`linearN_D`: N stacked MLPs, of inner width 1/D):",
        "",
        *(f"{number}. `{layer}`" for number, layer in enumerate(layers, start=1)),
    ]
    return "\n".join(parts) + "\n"


def _kind(model) -> str:
    name = type(model).__name__
    if name == "EffBertForSequenceClassification":
        return "score" if model.config.num_labels == 1 else "classes"
    return "spans" if name == "EffBertForQuestionAnswering" else "none"


def _labels(config) -> list[str]:
    names = [f"{column} `{name}`" for column, name in sorted(config.id2label.items())]
    return [f"Labels, in the order of the logits: {', '.join(names)}.", ""]


def _scored(scores: dict) -> list[str]:
    values = ", ".join(f"{name} {value:.4f}" for name, value in scores["scores"].items())
    return [f"Task {scores['task']}: {values}, on {scores['rows']:,} validation rows.", ""]


def _texts(kind: str, scores: dict | None) -> str:
    if kind == "spans":
        return '"A question?", "A text."'
    return '"A text.", "Another."' if scores and scores["pair"] else '"A text."'


def _torch_lines(model, kind: str, name: str, texts: str) -> list[str]:
    heads = {"none": "AutoModel", "spans": "AutoModelForQuestionAnswering"}
    auto = heads.get(kind, "AutoModelForSequenceClassification")
    options = ", add_pooling_layer=False" if kind == "none" and model.pooler is None else ""
    lines = [
        f"from transformers import {auto}{', AutoTokenizer' if texts else ''}",
        "",
        f'folder = "{name}"  # this one',
        f"model = {auto}.from_pretrained(folder, trust_remote_code=True{options}).eval()",
    ]
    if texts:
        lines.append("tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)")
        lines.append(f'outputs = model(**tokenizer({texts}, truncation=True, return_tensors="pt"))')
    if texts and kind == "classes":
        lines.append("print(model.config.id2label[outputs.logits.argmax().item()])")
    return lines


def _onnx_lines(name: str, file: str, texts: str) -> list[str]:
    session = f'session = onnxruntime.InferenceSession(f"{{folder}}/{file}")'
    if not texts:
        return ["import onnxruntime", "", f'folder = "{name}"  # this one', session]
    return [
        "import onnxruntime",
        "from transformers import AutoTokenizer",
        "",
        f'folder = "{name}"  # this one',
        session,
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'inputs = tokenizer({texts}, truncation=True, return_token_type_ids=True, return_tensors="np")',
        "outputs = session.run(None, {node.name: inputs[node.name] for node in session.get_inputs()})",
    ]


def _remarks(files: Sequence[str], tokenizer: bool) -> list[str]:
    lines = [] if tokenizer else ["The student had no tokenizer, so this folder has none."]
    lines += [f"`{file}` is read alike." for file in files[1:]]
    lines += ["`export.json` says what was measured."] if files else [TRUST]
    return [*lines, ""]
