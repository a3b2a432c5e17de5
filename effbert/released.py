"""The authors' checkpoint naming: their parameter names in ours (students) and in transformers' (BERT teachers)."""

import re
from collections.abc import Mapping

import torch

STUDENT_NAMES = (
    (r"^encoder\.", "layers."),
    (r"\ball_ffn\b", "mlps"),
    (r"\bsegment_embeddings\b", "token_type_embeddings"),
    (r"\blayernorm\b", "norm"),
    (r"^cls_pooler\.dense\b", "pooler"),
)
TEACHER_NAMES = (
    (r"^embeddings\.token_embeddings\b", "embeddings.word_embeddings"),
    (r"\bsegment_embeddings\b", "token_type_embeddings"),
    (r"^encoder\.(\d+)\.", r"encoder.layer.\1."),
    (r"\battention\.(query|key|value)\b", r"attention.self.\1"),
    (r"\battention\.(dense|layernorm)\b", r"attention.output.\1"),
    (r"\bffn\.dense1\b", "intermediate.dense"),
    (r"\bffn\.(dense2|layernorm)\b", r"output.\1"),
    (r"\bdense2\b", "dense"),
    (r"\blayernorm\b", "LayerNorm"),
    (r"^cls_pooler\b", "pooler"),
)


def student_state(state: Mapping[str, torch.Tensor], prefix: str = "effbert.") -> dict[str, torch.Tensor]:
    """A released student or supernet state under the names of `effbert.model`; heads keep theirs (classifier...)."""
    return {_renamed(name, STUDENT_NAMES, prefix): tensor for name, tensor in state.items()}


def teacher_state(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A released BERT state under the names of transformers' BertForSequenceClassification."""
    return {_renamed(name, TEACHER_NAMES, "bert."): tensor for name, tensor in state.items()}


def _renamed(name: str, rules, prefix: str) -> str:
    if name.startswith("classifier"):
        return name
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return prefix + name
