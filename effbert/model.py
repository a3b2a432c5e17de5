"""The student: a BERT whose MLPs follow an architecture, as a transformers model.

A layer is post-LayerNorm attention followed by the stacked MLPs that its expression and linear structure describe. The
same modules serve a standalone model, whose weights have exactly the used sizes, and the supernet, whose weights are
full and of which a candidate runs slices: every forward takes the architecture to run, by default the config's own.

Shapes: B sequences, L positions, C hidden_size, H heads.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)
from transformers.utils import can_return_tuple

from effbert import kernels, random
from effbert.architecture import PUBLISHED, Architecture, attention_head_size
from effbert.errors import first_of
from effbert.kernels import Dropout
from effbert.trace import ScoreTargets, Trace

SITES_PER_LAYER = 8  # dropout sites: 0 embeddings, then per layer attention scores, attention output, the MLPs


@lru_cache(maxsize=4096)
def parse_architecture(text: str) -> Architecture:
    """`Architecture.parse`, remembered."""
    return Architecture.parse(text)


class EffBertConfig(PreTrainedConfig):
    """Configuration of a student.

    architecture: one expression a layer, joined by ", "; num_hidden_layers follows from it.
    embedding_size: width of the token table, of which three neighbours are concatenated and projected; None for a table
        of hidden_size without neighbours.
    intermediate_size: MLP width at ratio 1.
    fit_size: teacher width, for the training-only projection; None in a deployed model.
    position_offset: position id of the first token (0; pad_token_id + 1 with a RoBERTa vocabulary).
    neighbour_padding: what a masked neighbour contributes to an embedding: "zero", or "released" for its token's row.
    combine: what add, mul and max do with unequal widths: "truncate", "pad", "pad_released" (effbert.kernels.eager).
    """

    model_type = "effbert"

    architecture: str = PUBLISHED
    vocab_size: int = 30522
    embedding_size: int | None = 128
    hidden_size: int = 540
    num_attention_heads: int = 12
    intermediate_size: int = 540
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    pad_token_id: int | None = 0
    position_offset: int = 0
    fit_size: int | None = None
    neighbour_padding: str = "zero"
    combine: str = "truncate"

    def __post_init__(self, **kwargs):
        kwargs.pop("num_hidden_layers", None)
        kwargs.pop("auto_map", None)  # of an exported folder's own code, which these classes do not save again
        super().__post_init__(**kwargs)
        attention_head_size(self.hidden_size, self.num_attention_heads)
        if self.neighbour_padding not in ("zero", "released"):
            raise ValueError(f"neighbour_padding {self.neighbour_padding!r}: one of 'zero', 'released'")
        if self.combine not in ("truncate", "pad", "pad_released"):
            raise ValueError(f"combine {self.combine!r}: one of 'truncate', 'pad', 'pad_released'")
        self.num_hidden_layers = len(parse_architecture(self.architecture).layers)


class Embeddings(nn.Module):
    """Token ids [B, L] to [B, L, C]: next, current and previous token through one Linear, positions, segments.

    ValueError where a sequence goes beyond the position table. A graph that is compiled, exported or traced does not
    ask: it serves every length.
    """

    def __init__(self, config: EffBertConfig):
        super().__init__()
        self.config = config
        width = config.embedding_size or config.hidden_size
        self.token_embeddings = nn.Embedding(config.vocab_size, width, padding_idx=config.pad_token_id)
        self.dense = nn.Linear(3 * width, config.hidden_size) if config.embedding_size else None
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def _refuse_too_long(self, length: int, position_ids: torch.Tensor) -> None:
        """ValueError for ids beyond the table. They are read, which waits for a GPU, only where the length is too much:
        a caller's own may repeat."""
        size = self.position_embeddings.num_embeddings
        longest = size - self.config.position_offset
        if length > longest and position_ids.max() >= size:
            raise ValueError(f"{length} tokens are too many: the model has positions for {longest}")

    def forward(self, input_ids, attention_mask, token_type_ids, position_ids):
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self._refuse_too_long(input_ids.shape[1], position_ids)
        x = self.token_embeddings(input_ids)
        if self.dense is not None:
            if self.config.neighbour_padding == "zero":
                x = x * attention_mask[:, :, None].to(x.dtype)
            following = F.pad(x[:, 1:], (0, 0, 0, 1))
            previous = F.pad(x[:, :-1], (0, 0, 1, 0))
            x = self.dense(torch.cat((following, x, previous), dim=-1))
        return self.norm(x + self.position_embeddings(position_ids) + self.token_type_embeddings(token_type_ids))


class Attention(nn.Module):
    """Self-attention with dropout, residual and LayerNorm; also gives the queries and keys [B, H, L, C / H], and where
    there is a target (teacher's query, key, which scores count) the score loss."""

    def __init__(self, config: EffBertConfig):
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.dense = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)

    def _heads(self, x):
        return x.unflatten(-1, (self.config.num_attention_heads, -1)).transpose(1, 2)

    def forward(self, x, attention_mask, dropout, target=None):
        query, key, value = (self._heads(linear(x)) for linear in (self.query, self.key, self.value))
        on_scores = dropout(self.config.attention_probs_dropout_prob, 0)
        if target is None:
            context, loss = kernels.attention(query, key, value, attention_mask, on_scores), None
        else:
            *teacher, counted = target
            context, loss = kernels.distill_attention(query, key, value, *teacher, attention_mask, on_scores, counted)
        y = self.dense(context.transpose(1, 2).flatten(2))
        y = kernels.dropout_add_layer_norm(
            y, x, self.norm.weight, self.norm.bias, self.norm.eps, dropout(self.config.hidden_dropout_prob, 1)
        )
        return y, query, key, loss


class MLP(nn.Module):
    """One of a layer's stacked MLPs; `width` is its inner width, of which a candidate may use the first part."""

    def __init__(self, config: EffBertConfig, width: int):
        super().__init__()
        self.config = config
        self.dense1 = nn.Linear(config.hidden_size, width)
        self.dense2 = nn.Linear(width, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x, expression, inner_width, dropout):
        return kernels.mlp_block(
            x,
            self.dense1.weight,
            self.dense1.bias,
            self.dense2.weight,
            self.dense2.bias,
            self.norm.weight,
            self.norm.bias,
            expression,
            inner_width,
            self.norm.eps,
            dropout,
            self.config.combine,
        )


class Layer(nn.Module):
    """Attention, then the stacked MLPs: as many and as wide as the layer's structure says at most."""

    def __init__(self, config: EffBertConfig, structure):
        super().__init__()
        self.config = config
        self.attention = Attention(config)
        width = structure.inner_width(config.intermediate_size)
        self.mlps = nn.ModuleList(MLP(config, width) for _ in range(structure.stacks))

    def forward(self, x, attention_mask, expression, dropout, target=None):
        x, query, key, loss = self.attention(x, attention_mask, dropout, target)
        inner_width = expression.structure.inner_width(self.config.intermediate_size)
        for index, mlp in enumerate(self.mlps[: expression.structure.stacks]):
            x = mlp(x, expression, inner_width, dropout(self.config.hidden_dropout_prob, 2 + index))
        return x, query, key, loss


class EffBertPreTrainedModel(PreTrainedModel):
    """What all student classes share: config class, weight initialisation, saving and loading."""

    config_class = EffBertConfig
    base_model_prefix = "effbert"
    _supports_sdpa = True

    def _init_weights(self, module: nn.Module) -> None:
        padding = getattr(module, "padding_idx", None)
        if padding is not None and self.config.neighbour_padding == "released":
            module.padding_idx = None  # else its row would be zero, for good, since it gets no gradient
        super()._init_weights(module)
        if padding is not None:
            module.padding_idx = padding

    def refuse_attentions(self, asked: bool | None) -> None:
        """ValueError where attention probabilities are asked for, by `asked` or else by the config: none are kept."""
        if self.config.output_attentions if asked is None else asked:
            raise ValueError("output_attentions=True: attention is fused and keeps no probabilities: leave it out")

    def returned_states(self, states: tuple, asked: bool | None) -> tuple | None:
        """The hidden states where they are asked for, by `asked` or else by the config; None otherwise."""
        return states if (self.config.output_hidden_states if asked is None else asked) else None


class EffBertModel(EffBertPreTrainedModel):
    """The bare encoder, with an optional pooler and the training-only projection where the config has a fit_size."""

    def __init__(self, config: EffBertConfig, add_pooling_layer: bool = True):
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.architecture = parse_architecture(config.architecture)
        self.layers = nn.ModuleList(Layer(config, expression.structure) for expression in self.architecture.layers)
        self.fit_dense = nn.Linear(config.hidden_size, config.fit_size) if config.fit_size else None
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.token_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.token_embeddings = value

    def _dropout(self, key, base):
        if key is None:
            return lambda p, site: None
        return lambda p, site: Dropout(p, key, base + site) if p else None

    def trace(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        architecture=None,
        position_ids=None,
        targets: ScoreTargets | None = None,
    ) -> Trace:
        """Hidden states, queries and keys for token ids [B, L]; attention_mask [B, L], 1 = keep. With `targets`, score
        losses too.

        In training mode dropout is on; its key for this step is `effbert.random.dropout_key`.
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + self.config.position_offset
        key = random.dropout_key() if self.training else None
        # after the draw, which ends a graph in training: integers of a local beyond it torch.compile takes for symbols
        architecture = architecture or self.architecture

        x = self.embeddings(input_ids, attention_mask, token_type_ids, position_ids)
        embedding_dropout = self._dropout(key, 0)(self.config.hidden_dropout_prob, 0)
        x = kernels.dropout(x, embedding_dropout)
        states, queries, keys, losses = [x], [], [], []
        for index, (layer, expression) in enumerate(zip(self.layers, architecture.layers, strict=True)):
            dropout = self._dropout(key, 1 + index * SITES_PER_LAYER)
            target = (targets.queries[index], targets.keys[index], targets.mask) if targets else None
            x, query, key_, loss = layer(x, attention_mask, expression, dropout, target)
            states.append(x)
            queries.append(query)
            keys.append(key_)
            losses.append(loss)
        return Trace(tuple(states), tuple(queries), tuple(keys), score_losses=tuple(losses) if targets else ())

    def pool(self, x: torch.Tensor) -> torch.Tensor:
        """tanh(Linear(first token)) for x [B, L, C] -> [B, C]."""
        return torch.tanh(self.pooler(x[:, 0]))

    @can_return_tuple
    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        output_hidden_states=None,
        output_attentions=None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """last_hidden_state [B, L, C], pooler_output [B, C] where there is a pooler."""
        self.refuse_attentions(output_attentions)
        states = self.trace(input_ids, attention_mask, token_type_ids, position_ids=position_ids).hidden_states
        return BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=self.pool(states[-1]) if self.pooler is not None else None,
            hidden_states=self.returned_states(states, output_hidden_states),
        )


class EffBertHeadModel(EffBertPreTrainedModel):
    """An encoder with one linear head; subclasses say what the head reads, and its name among the weights."""

    pooled = True
    head_name = "classifier"

    def __init__(self, config: EffBertConfig):
        super().__init__(config)
        self.effbert = EffBertModel(config, add_pooling_layer=self.pooled)
        self.add_module(self.head_name, nn.Linear(config.hidden_size, config.num_labels))
        self.post_init()

    @property
    def head_layer(self) -> nn.Linear:
        """The linear head."""
        return getattr(self, self.head_name)

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [B, num_labels], or [B, L, num_labels] where the head is not pooled, for x [B, L, C]."""
        return self.head_layer(self.effbert.pool(x) if self.pooled else x)

    def trace(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        head: bool = True,
        targets: ScoreTargets | None = None,
    ) -> Trace:
        """The encoder's trace, with logits unless `head` is False."""
        trace = self.effbert.trace(input_ids, attention_mask, token_type_ids, targets=targets)
        return replace(trace, logits=self.head(trace.hidden_states[-1])) if head else trace

    def _run(self, input_ids, attention_mask, token_type_ids, position_ids):
        states = self.effbert.trace(input_ids, attention_mask, token_type_ids, position_ids=position_ids).hidden_states
        return self.head(states[-1]), states


class EffBertForSequenceClassification(EffBertHeadModel):
    """Classification with config.num_labels classes, or regression with one."""

    def __init__(self, config: EffBertConfig):
        if config.num_labels == 1 and config.problem_type is None:
            config.problem_type = "regression"  # else a pipeline takes the one logit for a probability's
        super().__init__(config)

    @can_return_tuple
    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        labels=None,
        output_hidden_states=None,
        output_attentions=None,
        **kwargs,
    ) -> SequenceClassifierOutput:
        """logits [B, num_labels]; with labels also transformers' loss for config.problem_type: cross entropy of classes
        [B], squared error of numbers [B], binary cross entropy of several labels [B, num_labels]."""
        self.refuse_attentions(output_attentions)
        logits, states = self._run(input_ids, attention_mask, token_type_ids, position_ids)
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=self.returned_states(states, output_hidden_states)
        )


class EffBertForQuestionAnswering(EffBertHeadModel):
    """Extractive question answering: start and end logits over the positions."""

    pooled = False
    head_name = "qa_outputs"

    @can_return_tuple
    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        start_positions=None,
        end_positions=None,
        output_hidden_states=None,
        output_attentions=None,
        **kwargs,
    ) -> QuestionAnsweringModelOutput:
        """start_logits, end_logits [B, L]; with positions [B] also the mean of the two cross entropies, to which a
        position beyond L adds nothing."""
        self.refuse_attentions(output_attentions)
        logits, states = self._run(input_ids, attention_mask, token_type_ids, position_ids)
        start, end = logits.unbind(dim=-1)
        loss = self.loss_function(start, end, start_positions, end_positions)
        return QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=self.returned_states(states, output_hidden_states),
        )


def new_student(config: EffBertConfig, kind: str, labels: Sequence[str] = ()) -> EffBertHeadModel:
    """A student with the head of a task: `kind` "classification" with its `labels`, "regression" or "spans"."""
    names = list(labels) or [f"LABEL_{index}" for index in range(num_outputs(kind))]
    config.id2label, config.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    return (EffBertForQuestionAnswering if kind == "spans" else EffBertForSequenceClassification)(config)


def num_outputs(kind: str, labels: Sequence[str] = ()) -> int:
    """Width of a task's head: its labels, 1 for regression, 2 (start, end) for spans."""
    return {"regression": 1, "spans": 2}.get(kind) or len(labels)


def refuse_not_finite(weights: Mapping[str, torch.Tensor], source: object) -> None:
    """ValueError that names those of the weights of `source` that hold a NaN or an infinity."""
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ValueError(f"{source} has weights that are not finite: {first_of(broken)}")


def without_pooler(model: nn.Module) -> list[str]:
    """A line that says how an encoder without a pooler is loaded; none for any other model."""
    if not isinstance(model, EffBertModel) or model.pooler is not None:
        return []
    return ["it has no pooler: load it with add_pooling_layer=False, else pooler_output is of fresh weights"]


def register() -> None:
    """Make the Auto classes of transformers know the model type "effbert"."""
    from transformers import AutoConfig, AutoModel, AutoModelForQuestionAnswering, AutoModelForSequenceClassification

    AutoConfig.register("effbert", EffBertConfig, exist_ok=True)
    AutoModel.register(EffBertConfig, EffBertModel, exist_ok=True)
    AutoModelForSequenceClassification.register(EffBertConfig, EffBertForSequenceClassification, exist_ok=True)
    AutoModelForQuestionAnswering.register(EffBertConfig, EffBertForQuestionAnswering, exist_ok=True)
