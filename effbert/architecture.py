"""What a candidate is: one expression a layer; its text, its parameters and its FLOPs, by formula.

The one idea: a candidate costs what the slices it uses cost, and those follow from the linear structure of each layer
alone, so counting needs no model. A plain BERT is the case of one full-width stack a layer and a direct token table.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from effbert.kernels.expression import ACTIVATIONS, Expression, ExpressionError, Structure, parse_architecture_text

PUBLISHED = (
    "tanh(linear4_2(gelu(linear4_2(x,wb1)),wb2)), "
    "elu(linear2_1(gelu(linear2_1(x,wb1)),wb2)), "
    "sigmoid(linear1_2(relu(linear1_2(x,wb1)),wb2)), "
    "linear2_2(gelu(linear2_2(max(x,tanh(x)),wb1)),wb2), "
    "linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2), "
    "leaky_relu(linear2_3(gelu(linear2_3(x,wb1)),wb2))"
)


@dataclass(frozen=True)
class Architecture:
    """One expression a layer, first layer first."""

    layers: tuple[Expression, ...]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("an architecture needs at least one layer")

    @classmethod
    def parse(cls, text: str) -> "Architecture":
        """Read `expr1, expr2, ...` and check every layer; ExpressionErrors name the layer, counted from 1."""
        layers = parse_architecture_text(text)
        for number, layer in enumerate(layers, start=1):
            try:
                layer.check()
            except ExpressionError as error:
                raise ExpressionError(f"layer {number}: {error}") from None
        return cls(layers)

    @classmethod
    def uniform(cls, structure: Structure | str, num_layers: int, activation: str = "gelu") -> "Architecture":
        """The plain MLP `linearN_D(activation(linearN_D(x,wb1)),wb2)` in every layer."""
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
        plain = Expression.parse(f"linear({activation}(linear(x,wb1)),wb2)", structured=False)
        return cls((plain.with_structure(_structure(structure)),) * num_layers)

    def __str__(self) -> str:
        return ", ".join(map(str, self.layers))

    @property
    def key(self) -> str:
        """Canonical text: equal for architectures that differ only in the argument order of add, mul and max."""
        return ", ".join(layer.key for layer in self.layers)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The linear structure of each layer."""
        return tuple(layer.structure for layer in self.layers)

    def with_structures(self, structures: Sequence[Structure | str]) -> "Architecture":
        """The same expressions with these linear structures, one a layer; ValueError for another number of them."""
        if len(structures) != len(self.layers):
            raise ValueError(f"{len(structures)} structures for {len(self.layers)} layers; give one a layer")
        pairs = zip(self.layers, structures, strict=True)
        return Architecture(tuple(layer.with_structure(_structure(structure)) for layer, structure in pairs))

    def repeat(self, times: int) -> "Architecture":
        """Each layer `times` times in place, as the 12-layer variant is made from 6 (a, a, b, b, ...)."""
        return Architecture(tuple(layer for layer in self.layers for _ in range(times)))


@dataclass(frozen=True)
class Dimensions:
    """The sizes that every candidate of a search shares; the defaults are the published 6×540 model's.

    The functions here take any object with these attributes, for example a transformers config.

    `embedding_size`: width of the token table; the next token, itself and the previous one, concatenated, are mapped to
    `hidden_size` by one linear. None is a direct table of `hidden_size`, as in BERT and the published 768-wide variant.
    `intermediate_size`: inner width of an MLP at ratio 1. `fit_size`: the teacher's width, to which the training-only
    projection maps hidden states; None for no projection.
    """

    vocab_size: int = 30522
    embedding_size: int | None = 128
    hidden_size: int = 540
    intermediate_size: int = 540
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    fit_size: int | None = 768

    def __post_init__(self) -> None:
        for name, size in vars(self).items():
            if size is not None and size < 1:
                raise ValueError(f"{name} {size}: must be at least 1")


@dataclass(frozen=True)
class _Parts:
    embeddings: int
    attention: int
    mlp: tuple[int, ...]
    fit_dense: int
    pooler: int
    hidden_size: int

    @property
    def total(self) -> int:
        """The deployed encoder: embeddings, attention and MLPs; no projection, pooler or head."""
        return self.embeddings + self.attention + sum(self.mlp)

    @property
    def total_with_projection(self) -> int:
        """The encoder as it is trained, with `fit_dense`; what the search's parameter band counts."""
        return self.total + self.fit_dense


@dataclass(frozen=True)
class Parameters(_Parts):
    """Parameters by part, biases and LayerNorms included: `attention` over all layers, `mlp` one entry a layer.

    `pooler` (one hidden_size × hidden_size linear) and `head` are in neither total.
    """

    def head(self, num_labels: int) -> int:
        """A linear from hidden_size to `num_labels` (2 for question answering)."""
        return _linear(self.hidden_size, num_labels)


@dataclass(frozen=True)
class Flops(_Parts):
    """FLOPs of one forward pass over one sequence by part, 2 for each multiply-add.

    Linears and the two products of attention are counted; elementwise ops, softmax, LayerNorm and table look-ups are
    not. `fit_dense` maps the embedding output and every layer's output, as in training. The pooler reads one token.
    `pooler` and `head` are in neither total.
    """

    def head(self, num_labels: int, tokens: int = 1) -> int:
        """A linear from hidden_size to `num_labels`, on one token, or on all of them for question answering."""
        return _products(tokens, self.hidden_size, num_labels)


def count_parameters(architecture: Architecture, dims: Dimensions) -> Parameters:
    """Parameters that `architecture` uses at these sizes: of the supernet's MLPs only its own slices."""
    hidden = dims.hidden_size
    norm = 2 * hidden
    tokens = dims.vocab_size * (dims.embedding_size or hidden)
    to_hidden = _linear(3 * dims.embedding_size, hidden) if dims.embedding_size else 0
    positions = (dims.max_position_embeddings + dims.type_vocab_size) * hidden
    return Parameters(
        embeddings=tokens + to_hidden + positions + norm,
        attention=len(architecture.layers) * (4 * _linear(hidden, hidden) + norm),
        mlp=tuple(mlp_parameters(structure, dims) for structure in architecture.structures),
        fit_dense=_linear(hidden, dims.fit_size) if dims.fit_size else 0,
        pooler=_linear(hidden, hidden),
        hidden_size=hidden,
    )


def mlp_parameters(structure: Structure, dims: Dimensions) -> int:
    """Parameters of one layer's MLPs: both linears and the LayerNorm of every stack."""
    hidden, inner = dims.hidden_size, structure.inner_width(dims.intermediate_size)
    return structure.stacks * (_linear(hidden, inner) + _linear(inner, hidden) + 2 * hidden)


def count_flops(architecture: Architecture, dims: Dimensions, sequence_length: int) -> Flops:
    """FLOPs of one forward pass over one sequence of `sequence_length` tokens; see `Flops` for what is counted."""
    hidden, length, num_layers = dims.hidden_size, sequence_length, len(architecture.layers)
    scores_and_context = 2 * _products(length, hidden, length)
    inner_widths = [s.stacks * s.inner_width(dims.intermediate_size) for s in architecture.structures]
    return Flops(
        embeddings=_products(length, 3 * dims.embedding_size, hidden) if dims.embedding_size else 0,
        attention=num_layers * (4 * _products(length, hidden, hidden) + scores_and_context),
        mlp=tuple(2 * _products(length, hidden, width) for width in inner_widths),
        fit_dense=(num_layers + 1) * _products(length, hidden, dims.fit_size) if dims.fit_size else 0,
        pooler=_products(1, hidden, hidden),
        hidden_size=hidden,
    )


def bert_parameters(
    vocab_size: int = 30522,
    hidden_size: int = 768,
    intermediate_size: int = 3072,
    num_layers: int = 12,
    max_position_embeddings: int = 512,
    type_vocab_size: int = 2,
    fit_size: int | None = None,
) -> Parameters:
    """Parameters of a plain BERT; the defaults are BERT-base's, 109,482,240 with its pooler."""
    dims = Dimensions(
        vocab_size=vocab_size,
        embedding_size=None,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        max_position_embeddings=max_position_embeddings,
        type_vocab_size=type_vocab_size,
        fit_size=fit_size,
    )
    return count_parameters(Architecture.uniform("1_1", num_layers), dims)


def bert_flops(
    sequence_length: int,
    hidden_size: int = 768,
    intermediate_size: int = 3072,
    num_layers: int = 12,
    fit_size: int | None = None,
) -> Flops:
    """FLOPs of a plain BERT over one sequence; the defaults are BERT-base's."""
    dims = Dimensions(
        embedding_size=None, hidden_size=hidden_size, intermediate_size=intermediate_size, fit_size=fit_size
    )
    return count_flops(Architecture.uniform("1_1", num_layers), dims, sequence_length)


def attention_head_size(hidden_size: int, num_attention_heads: int) -> int:
    """Channels of one head; ValueError, with the head counts that fit, unless the heads share hidden_size evenly."""
    if num_attention_heads < 1 or hidden_size % num_attention_heads:
        fitting = [heads for heads in range(1, 65) if hidden_size % heads == 0]
        raise ValueError(
            f"hidden_size {hidden_size} does not divide into {num_attention_heads} attention heads; "
            f"head counts that fit: {', '.join(map(str, fitting))}"
        )
    return hidden_size // num_attention_heads


def _structure(structure: Structure | str) -> Structure:
    return structure if isinstance(structure, Structure) else Structure.parse(structure)


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def _products(rows: int, inner: int, columns: int) -> int:
    return 2 * rows * inner * columns
