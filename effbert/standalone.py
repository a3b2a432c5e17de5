"""A student as one file of plain PyTorch that needs torch and transformers alone.

The one idea: an architecture and its sizes are known when it is exported, so its model can be written down as a person
would: a class for each form of MLP, its expression as ordinary code, its slices and paddings as numbers. The modules
have the names of `effbert.model`, so one safetensors file serves both.
"""

import importlib.abc
import importlib.util
from collections.abc import Iterator, Sequence
from string import Template
from types import ModuleType

from effbert.architecture import Architecture
from effbert.kernels.eager import FILL
from effbert.kernels.expression import BINARY, Expression, ExpressionError, Node
from effbert.model import EffBertConfig, EffBertModel, EffBertPreTrainedModel

FILE_NAME = "modeling_effbert.py"
CLASSES = {
    "AutoConfig": "EffBertConfig",
    "AutoModel": "EffBertModel",
    "AutoModelForSequenceClassification": "EffBertForSequenceClassification",
    "AutoModelForQuestionAnswering": "EffBertForQuestionAnswering",
}
_FIELDS = (
    "vocab_size",
    "embedding_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
    "position_offset",
    "neighbour_padding",
    "combine",
)
_CALLS = {
    "gelu": 'F.gelu({}, approximate="tanh")',
    "sigmoid": "torch.sigmoid({})",
    "tanh": "torch.tanh({})",
    "relu": "F.relu({})",
    "leaky_relu": "F.leaky_relu({}, 0.01)",
    "elu": "F.elu({})",
    "swish": "F.silu({})",
}
_OPERATORS = {"add": "+", "mul": "*"}
_LONGEST = 96  # columns of a statement; a longer one is cut into several


def source(config: EffBertConfig) -> str:
    """The text of `modeling_effbert.py` for a student of this config; ExpressionError where its widths do not fit."""
    layers = Architecture.parse(config.architecture).layers
    forms = {expression: f"MLP{number}" for number, expression in enumerate(dict.fromkeys(layers), start=1)}
    mlps = "\n\n\n".join(_form(name, expression, config) for expression, name in forms.items())
    stacks = "".join(f"    ({forms[expression]}, {expression.structure.stacks}),\n" for expression in layers)
    header = _HEADER.substitute(layers=len(layers), hidden=config.hidden_size, heads=config.num_attention_heads)
    parts = [header, _config_class(config, layers), _embeddings(config), _ATTENTION]
    parts += [_PAD] if " pad(" in mlps or "(pad(" in mlps else []
    parts += [_MLP, mlps, _LAYERS.substitute(stacks=stacks), _MODELS]
    return "\n\n\n".join(part.rstrip("\n") for part in parts) + "\n"


class _Text(importlib.abc.InspectLoader):
    """Imports a module from its text."""

    def __init__(self, text: str):
        self.text = text

    def get_source(self, fullname: str) -> str:
        return self.text


def load(text: str) -> ModuleType:
    """The module that `source` wrote, imported without a file."""
    spec = importlib.util.spec_from_loader("modeling_effbert", _Text(text))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def plain_model(model: EffBertPreTrainedModel, module: ModuleType):
    """A copy of `model`, without fit_dense, made of the module's plain classes, in evaluation mode."""
    config = module.EffBertConfig.from_dict(model.config.to_dict())
    encoder = {"add_pooling_layer": model.pooler is not None} if isinstance(model, EffBertModel) else {}
    plain = getattr(module, type(model).__name__)(config, **encoder)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "fit_dense" not in name})
    return plain.eval()


def statements(expression: Expression, hidden: int, inner: int, combine: str) -> list[str]:
    """The body of `f(self, x)` for x [..., hidden], which returns [..., hidden]; `inner` channels lie between.

    Raises ExpressionError where widths do not meet, as in linear1_2(mul(linear1_2(x,wb1),x),wb2) with combine="pad".
    """
    expression.output_width(hidden, inner, "truncate" if combine == "truncate" else "pad")
    slots, writer = expression.slots(), _Writer({"x": hidden, "h": inner, "y": hidden}, combine)
    first = writer.statement("h = self.dense1({})", slots.pre)
    if slots.post == Node("y"):
        return [*first, *writer.statement("return self.dense2({})", slots.mid)]
    second = writer.statement("y = self.dense2({})", slots.mid)
    return [*first, *second, *writer.statement("return {}", slots.post)]


class _Writer:
    """Elementwise trees as Python. `widths`: channels of the leaves; `names`: parts that have a line of their own."""

    def __init__(self, widths: dict[str, int], combine: str):
        self.widths, self.combine, self.names = widths, combine, {}

    def statement(self, frame: str, tree: Node) -> Iterator[str]:
        """`frame` with the tree in its braces, after a line for each part without which it would be too long."""
        while len(text := frame.format(self.text(tree))) > _LONGEST:
            texts = {part: self.text(part) for part in self._unnamed(tree) if part != tree}
            part = max((part for part in texts if len(texts[part]) < _LONGEST - 10), key=lambda part: len(texts[part]))
            name = f"part{len(self.names) + 1}"
            yield f"{name} = {texts[part]}"
            self.names[part] = name
        yield text

    def _unnamed(self, node: Node) -> Iterator[Node]:
        if node.args and node not in self.names:
            yield node
            for arg in node.args:
                yield from self._unnamed(arg)

    def width(self, node: Node) -> int:
        """Channels of a tree before anything above it cuts or fills it."""
        if not node.args:
            return self.widths[node.op]
        return (min if self.combine == "truncate" else max)(map(self.width, node.args))

    def text(self, node: Node, cut: int | None = None, nested: bool = False) -> str:
        """The tree as an expression of its own width, or of its first `cut` channels; `nested` in an operator.

        Every op here acts on each channel alone, so what is cut at the top is cut at the leaves instead.
        """
        if node in self.names or not node.args:
            leaf = self.names.get(node, node.op)
            return leaf if cut in (None, self.width(node)) else f"{leaf}[..., :{cut}]"
        if node.op not in BINARY:
            return _CALLS[node.op].format(self.text(node.args[0], cut))
        a, b = (self._operand(arg, node, cut) for arg in node.args)
        if node.op == "max":
            return f"torch.maximum({a}, {b})"
        return f"({a} {_OPERATORS[node.op]} {b})" if nested else f"{a} {_OPERATORS[node.op]} {b}"

    def _operand(self, arg: Node, parent: Node, cut: int | None) -> str:
        own = self.width(parent)
        if self.combine == "truncate":
            return self.text(arg, cut or own, nested=parent.op in _OPERATORS)
        if self.width(arg) == own:
            return self.text(arg, nested=parent.op in _OPERATORS)
        return f"pad({self.text(arg)}, {own - self.width(arg)}, {FILL[self.combine][parent.op]!r})"


def _form(name: str, expression: Expression, config: EffBertConfig) -> str:
    inner = expression.structure.inner_width(config.intermediate_size)
    try:
        lines = statements(expression, config.hidden_size, inner, config.combine)
    except ExpressionError as error:
        raise ExpressionError(f"{expression} with combine={config.combine!r}: {error}") from None
    body = "\n".join(f"        {line}" for line in lines)
    return f'class {name}(MLP):\n    """{expression}"""\n\n    inner_size = {inner}\n\n    def f(self, x):\n{body}'


def _config_class(config: EffBertConfig, layers: Sequence[Expression]) -> str:
    texts = [f'        "{layer}, "' for layer in layers[:-1]] + [f'        "{layers[-1]}"']
    lines = ["    architecture: str = (", *texts, "    )"]
    for name in _FIELDS:
        value = getattr(config, name)
        kind = {"float": "float | int"}.get(type(value).__name__, type(value).__name__)
        if name in ("embedding_size", "pad_token_id"):
            kind = "int | None"
        lines.append(f"    {name}: {kind} = " + (f'"{value}"' if isinstance(value, str) else repr(value)))
    return _CONFIG + "\n".join(lines)


def _embeddings(config: EffBertConfig) -> str:
    neighbours = bool(config.embedding_size)
    mask = "        x = x * attention_mask[:, :, None].to(x.dtype)  # a padded neighbour adds nothing\n"
    return _EMBEDDINGS.substitute(
        doc=_NEIGHBOURS_DOC if neighbours else "Token ids [B, L] to [B, L, C]: tokens, positions and segments.",
        width="config.embedding_size" if neighbours else "config.hidden_size",
        dense=_NEIGHBOURS_DENSE if neighbours else "",
        mix=(mask if config.neighbour_padding == "zero" else "") + _NEIGHBOURS_MIX if neighbours else "",
    )


_NEIGHBOURS_DOC = (
    "Token ids [B, L] to [B, L, C]: next, current and previous token through one Linear; positions, segments."
)
_NEIGHBOURS_DENSE = "        self.dense = nn.Linear(3 * config.embedding_size, config.hidden_size)\n"
_NEIGHBOURS_MIX = """\
        following = F.pad(x[:, 1:], (0, 0, 0, 1))
        previous = F.pad(x[:, :-1], (0, 0, 1, 0))
        x = self.dense(torch.cat((following, x, previous), dim=-1))
"""

_HEADER = Template('''\
"""A small BERT: $layers layers, each with the MLPs that were found for it. Written by `effbert export`.

    AutoModelForSequenceClassification.from_pretrained(FOLDER, trust_remote_code=True)

Shapes: B sequences, L positions, C = $hidden channels, H = $heads heads. attention_mask [B, L], 1 = keep.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)
''')

_CONFIG = '''\
class EffBertConfig(PretrainedConfig):
    """The sizes of this model; `architecture`: the MLP of each layer as it was found."""

    model_type = "effbert"

'''

_EMBEDDINGS = Template('''\
WRITTEN_FOR = ("architecture", "embedding_size", "hidden_size", "intermediate_size", "neighbour_padding", "combine")


class Embeddings(nn.Module):
    """$doc"""

    def __init__(self, config):
        super().__init__()
        self.token_embeddings = nn.Embedding(config.vocab_size, $width, padding_idx=config.pad_token_id)
${dense}\
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.longest = config.max_position_embeddings - config.position_offset

    def refuse_too_long(self, length, position_ids):
        if length > self.longest and position_ids.max() >= self.position_embeddings.num_embeddings:
            raise ValueError(f"{length} tokens are too many: the model has positions for {self.longest}")

    def forward(self, input_ids, attention_mask, token_type_ids, position_ids):
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            self.refuse_too_long(input_ids.shape[1], position_ids)
        x = self.token_embeddings(input_ids)
${mix}\
        x = x + self.position_embeddings(position_ids) + self.token_type_embeddings(token_type_ids)
        return self.dropout(self.norm(x))
''')

_ATTENTION = '''\
class Attention(nn.Module):
    """Self-attention with residual and LayerNorm; x [B, L, C], keep [B, 1, L, L]."""

    def __init__(self, config):
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.query = nn.Linear(size, size)
        self.key = nn.Linear(size, size)
        self.value = nn.Linear(size, size)
        self.dense = nn.Linear(size, size)
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.dropout_of_scores = config.attention_probs_dropout_prob

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, keep):
        query, key, value = self.split(self.query(x)), self.split(self.key(x)), self.split(self.value(x))
        p = self.dropout_of_scores if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=keep, dropout_p=p)
        return self.norm(x + self.dropout(self.dense(context.transpose(1, 2).flatten(2))))
'''

_PAD = '''\
def pad(x, missing, value):
    """x [..., n] with `missing` channels of a value behind it; -1e10 is below what half precision holds."""
    return F.pad(x, (0, missing), value=max(value, torch.finfo(x.dtype).min))
'''

_MLP = '''\
class MLP(nn.Module):
    """LayerNorm(x + Dropout(f(x))) for x [B, L, C]; each form below has its own f and inner size."""

    inner_size = 0

    def __init__(self, config):
        super().__init__()
        self.dense1 = nn.Linear(config.hidden_size, self.inner_size)
        self.dense2 = nn.Linear(self.inner_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x):
        return self.norm(x + self.dropout(self.f(x)))
'''

_LAYERS = Template("""\
# for each layer: the form of its MLPs, and how many are stacked
LAYERS = (
${stacks})
""")

_MODELS = '''\
class Layer(nn.Module):
    """Attention, then the stacked MLPs."""

    def __init__(self, config, form, stacks):
        super().__init__()
        self.attention = Attention(config)
        self.mlps = nn.ModuleList(form(config) for _ in range(stacks))

    def forward(self, x, keep):
        x = self.attention(x, keep)
        for mlp in self.mlps:
            x = mlp(x)
        return x


class EffBertPreTrainedModel(PreTrainedModel):
    """What the classes below share: config class, weight initialisation, saving and loading."""

    config_class = EffBertConfig
    base_model_prefix = "effbert"
    _supports_sdpa = True

    def refuse_attentions(self, asked):
        if self.config.output_attentions if asked is None else asked:
            raise ValueError("output_attentions=True: attention is fused and keeps no probabilities: leave it out")

    def returned_states(self, states, asked):
        return states if (self.config.output_hidden_states if asked is None else asked) else None

    def returned(self, output, as_dict):
        return output if (self.config.return_dict if as_dict is None else as_dict) else output.to_tuple()


class EffBertModel(EffBertPreTrainedModel):
    """The encoder, with a pooler: tanh(Linear(first token))."""

    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config)
        for name in WRITTEN_FOR:
            given, written = getattr(config, name), getattr(EffBertConfig, name)
            if given != written:
                raise ValueError(f"config.json says {name} = {given!r}, but this code is written for {written!r}")
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, form, stacks) for form, stacks in LAYERS)
        self.pooler = nn.Linear(config.hidden_size, config.hidden_size) if add_pooling_layer else None
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.token_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.token_embeddings = value

    def states(self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None):
        """Hidden states [B, L, C]: the embeddings', then every layer's."""
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + self.config.position_offset
        keep = attention_mask.bool()[:, None, None, :].expand(-1, -1, input_ids.shape[1], -1)
        states = [self.embeddings(input_ids, attention_mask, token_type_ids, position_ids)]
        for layer in self.layers:
            states.append(layer(states[-1], keep))
        return tuple(states)

    def pool(self, x):
        return torch.tanh(self.pooler(x[:, 0]))

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        **kwargs,
    ):
        self.refuse_attentions(output_attentions)
        states = self.states(input_ids, attention_mask, token_type_ids, position_ids)
        output = BaseModelOutputWithPooling(
            last_hidden_state=states[-1],
            pooler_output=self.pool(states[-1]) if self.pooler is not None else None,
            hidden_states=self.returned_states(states, output_hidden_states),
        )
        return self.returned(output, return_dict)


class EffBertForSequenceClassification(EffBertPreTrainedModel):
    """Classification with config.num_labels classes, or regression with one, from the pooled first token."""

    def __init__(self, config):
        if config.num_labels == 1 and config.problem_type is None:
            config.problem_type = "regression"  # else a pipeline takes the one logit for a probability's
        super().__init__(config)
        self.effbert = EffBertModel(config)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self,
        input_ids,
        attention_mask=None,
        token_type_ids=None,
        position_ids=None,
        labels=None,
        output_hidden_states=None,
        output_attentions=None,
        return_dict=None,
        **kwargs,
    ):
        self.refuse_attentions(output_attentions)
        states = self.effbert.states(input_ids, attention_mask, token_type_ids, position_ids)
        logits = self.classifier(self.effbert.pool(states[-1]))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=self.returned_states(states, output_hidden_states)
        )
        return self.returned(output, return_dict)


class EffBertForQuestionAnswering(EffBertPreTrainedModel):
    """Start and end logits of the answer over the positions."""

    def __init__(self, config):
        super().__init__(config)
        self.effbert = EffBertModel(config, add_pooling_layer=False)
        self.qa_outputs = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

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
        return_dict=None,
        **kwargs,
    ):
        self.refuse_attentions(output_attentions)
        states = self.effbert.states(input_ids, attention_mask, token_type_ids, position_ids)
        start, end = self.qa_outputs(states[-1]).unbind(dim=-1)
        loss = self.loss_function(start, end, start_positions, end_positions)
        output = QuestionAnsweringModelOutput(
            loss=loss,
            start_logits=start,
            end_logits=end,
            hidden_states=self.returned_states(states, output_hidden_states),
        )
        return self.returned(output, return_dict)
'''
