"""A student arranged for inference: the same outputs, from fewer and larger steps.

What differs from the model that is trained: queries, keys and values are one product, with heads padded by zeros to a
width that vector units take whole; a head that reads the first token alone spares the others the last layer's MLPs;
what is masked is left out of every product but those of attention; the projection of training is gone. On a CPU
activations in fp32 are written in exponentials, which PyTorch vectorises far better than tanh, and run in place; half
precision is widened where the CPU has no products for it. On a GPU the MLP blocks are the fused kernels.

Shapes: B sequences, L positions, T real tokens of the batch, C hidden size, H heads, D their padded width.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_outputs import (
    BaseModelOutputWithPooling,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
)

from effbert import kernels
from effbert.kernels import eager
from effbert.kernels.expression import Expression, Node
from effbert.model import MLP, Attention, EffBertHeadModel, EffBertModel, EffBertPreTrainedModel, parse_architecture

HALVES = (torch.bfloat16, torch.float16)
HEAD_MULTIPLE = 16  # floats: two vectors of AVX2, one of AVX-512; half of it is what flash attention on a GPU asks for
GELU_1, GELU_3 = 1.5957691216057308, 0.07135481282962426  # gelu(x) = x · sigmoid(x · (GELU_1 + GELU_3 · x²))


def half_is_native() -> bool:
    """Whether this CPU's products in bf16 are worth asking for. Below AVX-512 oneDNN has none, and PyTorch's own loop
    made 128 × 540 × 540 in 10 ms where fp32 took 1.0, in fp16 8.3 (Zen 3, one core)."""
    return torch.backends.cpu.get_cpu_capability() not in ("AVX2", "NO AVX")


class InferenceModel(nn.Module):
    """A trained student for inference only, with copies of its weights; `config` is the student's.

    Called as the student is: input_ids [B, L], attention_mask [B, L] with 1 = keep, token_type_ids, position_ids, and
    by name return_dict; ValueError for labels, hidden states (never returned, whatever the config says) or attentions,
    and for more tokens than positions. It returns the student's own kind of output in the student's dtype, without a
    loss. Where a token is masked last_hidden_state is zero, and a span's logits are those of a zero vector; the student
    has other numbers there, which nobody reads. Make it on the device it runs on: weights in bf16 or fp16 are kept in
    fp32 on a CPU without products for them. ValueError for a model that is no student.
    """

    def __init__(self, model: EffBertPreTrainedModel):
        super().__init__()
        if not isinstance(model, (EffBertModel, EffBertHeadModel)):
            raise ValueError(f"a {type(model).__name__} is no student: give an EffBertModel, bare or with a head")
        self.config, self.narrowed = model.config, None
        model = copy.deepcopy(model)
        if model.device.type == "cpu" and model.dtype in HALVES and not half_is_native():
            self.narrowed = model.dtype
            model.float()
        encoder = model.effbert if isinstance(model, EffBertHeadModel) else model
        self.embeddings = encoder.embeddings
        self.pooler = encoder.pooler
        self.head = model.head_layer if isinstance(model, EffBertHeadModel) else None
        expressions = parse_architecture(model.config.architecture).layers
        self.layers = nn.ModuleList(
            _Layer(layer, expression) for layer, expression in zip(encoder.layers, expressions, strict=True)
        )
        self.eval().requires_grad_(False)

    @torch.inference_mode()
    def forward(
        self, input_ids, attention_mask=None, token_type_ids=None, position_ids=None, *, return_dict=None, **others
    ):
        asked = [name for name, value in others.items() if value is not None and value is not False]
        if asked:
            raise ValueError(f"InferenceModel has no {', '.join(asked)}: call the student that it was made from")
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            found, wanted = list(attention_mask.shape), list(input_ids.shape)
            raise ValueError(f"the attention_mask is {found}, it must be as input_ids, {wanted}")
        keep = None if attention_mask is None or bool(attention_mask.all()) else attention_mask.bool()
        tokens = _Tokens(input_ids, keep, first=self.pooler is not None)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        types = torch.zeros_like(input_ids) if token_type_ids is None else token_type_ids
        if position_ids is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)
            position_ids = positions[None] + self.config.position_offset
        x = tokens.pack(self.embeddings(input_ids, mask, types, position_ids).flatten(0, 1))
        first_alone = self.head is not None and self.pooler is not None
        for index, layer in enumerate(self.layers):
            x = layer(x, tokens, first_alone and index == len(self.layers) - 1)
        output = self._output(x, tokens)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return output if as_dict else output.to_tuple()

    def _typed(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.narrowed is None else x.to(self.narrowed)

    def _output(self, x: torch.Tensor, tokens: "_Tokens"):
        """x: [B, C] of the first tokens for a head that reads those, else [T, C]."""
        if self.head is not None and self.pooler is not None:
            return SequenceClassifierOutput(logits=self._typed(self.head(torch.tanh(self.pooler(x)))))
        x = tokens.unpack(x)
        if self.head is not None:
            start, end = self._typed(self.head(x)).unbind(-1)
            return QuestionAnsweringModelOutput(start_logits=start, end_logits=end)
        pooled = None if self.pooler is None else self._typed(torch.tanh(self.pooler(x[:, 0])))
        return BaseModelOutputWithPooling(last_hidden_state=self._typed(tokens.cleared(x)), pooler_output=pooled)


class _Tokens:
    """Which of B × L positions are computed: the real ones, and with `first` each sequence's first, which a pooler
    reads even where it is masked. index: [T] of these, None where all are; keep: [B, L], None where all are real."""

    def __init__(self, input_ids: torch.Tensor, keep: torch.Tensor | None, first: bool):
        self.shape, self.keep = input_ids.shape, keep
        self.index = self.attention_mask = None
        if keep is not None:
            computed = keep.clone()
            computed[:, 0] |= first
            self.index = computed.flatten().nonzero()[:, 0]
            self.attention_mask = keep[:, None, None, :]

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """[B · L, n] to [T, n]."""
        return x if self.index is None else x.index_select(0, self.index)

    def unpack(self, x: torch.Tensor) -> torch.Tensor:
        """[T, n] to [B, L, n], zero where there is padding."""
        if self.index is not None:
            x = x.new_zeros(self.shape[0] * self.shape[1], x.shape[1]).index_copy_(0, self.index, x)
        return x.unflatten(0, self.shape)

    def cleared(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, L, n] with zeros where a token is masked, in place."""
        return x if self.keep is None else x.masked_fill_(~self.keep[..., None], 0)


class _Layer(nn.Module):
    def __init__(self, layer, expression: Expression):
        super().__init__()
        self.attention = _Attention(layer.attention)
        self.mlps = nn.ModuleList(_MLP(mlp, expression) for mlp in layer.mlps)

    def forward(self, x: torch.Tensor, tokens: _Tokens, first_alone: bool) -> torch.Tensor:
        """x [T, C]; of `first_alone` only the first token of each sequence, [B, C], comes back."""
        x = self.attention(x, tokens, first_alone)
        for mlp in self.mlps:
            x = mlp(x)
        return x


class _Attention(nn.Module):
    """Self-attention with residual and LayerNorm, from one product for queries, keys and values."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.heads, self.norm = attention.config.num_attention_heads, attention.norm
        size = attention.config.hidden_size // self.heads
        self.scale, self.width = size**-0.5, -(-size // HEAD_MULTIPLE) * HEAD_MULTIPLE
        parts = (attention.query, attention.key, attention.value)
        self.inner = _linear(
            torch.cat([self._padded(part.weight) for part in parts]),
            torch.cat([self._padded(part.bias) for part in parts]),
        )
        self.dense = _linear(self._padded(attention.dense.weight.t()).t(), attention.dense.bias)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """[H · size, ...] to [H · D, ...], with zeros behind each head."""
        heads = x.unflatten(0, (self.heads, -1))
        rest = heads.new_zeros(self.heads, self.width - heads.shape[1], *heads.shape[2:])
        return torch.cat((heads, rest), dim=1).flatten(0, 1)

    def forward(self, x: torch.Tensor, tokens: _Tokens, first_alone: bool) -> torch.Tensor:
        inner = tokens.unpack(self.inner(x)).unflatten(-1, (3, self.heads, self.width))
        query, key, value = inner.permute(2, 0, 3, 1, 4)  # [B, H, L, D] each
        if first_alone:
            query, x = query[:, :, :1], tokens.unpack(x)[:, 0]
        context = F.scaled_dot_product_attention(query, key, value, tokens.attention_mask, scale=self.scale)
        context = context.transpose(1, 2).flatten(2).flatten(0, 1)
        y = self.dense(context if first_alone else tokens.pack(context))
        return F.layer_norm(y.add_(x), self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)


class _MLP(nn.Module):
    """One MLP block with residual and LayerNorm."""

    def __init__(self, mlp: MLP, expression: Expression):
        super().__init__()
        self.dense1, self.dense2, self.norm = mlp.dense1, mlp.dense2, mlp.norm
        self.expression, self.combine = expression, mlp.config.combine

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.device.type != "cpu":
            norm, width = self.norm, self.dense1.out_features
            weights = (self.dense1.weight, self.dense1.bias, self.dense2.weight, self.dense2.bias)
            return kernels.mlp_block(
                x, *weights, norm.weight, norm.bias, self.expression, width, norm.eps, None, self.combine
            )
        y, own = self._value(self.expression.root, x)
        y = y.add_(x) if own else y + x
        return F.layer_norm(y, self.norm.normalized_shape, self.norm.weight, self.norm.bias, self.norm.eps)

    def _value(self, node: Node, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        """What a node is for x, and whether it is a tensor of its own, free to be written over."""
        if node.op == "x":
            return x, False
        if node.op == "linear":
            dense = self.dense1 if node.args[1].op == "wb1" else self.dense2
            return dense(self._value(node.args[0], x)[0]), True
        if node.op in ("add", "mul", "max"):
            first, second = (self._value(argument, x)[0] for argument in node.args)
            return eager.binary(node.op, first, second, self.combine), True
        value, own = self._value(node.args[0], x)
        if x.dtype in HALVES:
            return eager.ACTIVATIONS[node.op](value), True
        return ACTIVATIONS[node.op](value if own else value.clone()), True


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight, linear.bias = nn.Parameter(weight.detach().contiguous()), nn.Parameter(bias.detach().clone())
    return linear


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(torch.mul(x, x).mul_(GELU_3).add_(GELU_1).mul_(x).sigmoid_())


def _tanh(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2).sigmoid_().mul_(2).sub_(1)


def _elu(x: torch.Tensor) -> torch.Tensor:
    below = x.clamp(max=0).exp_().sub_(1)
    return x.clamp_(min=0).add_(below)


# In place, on a CPU. Near 0 tanh and elu keep their absolute error, 1e-7 in fp32, but not their relative one.
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": _gelu,
    "sigmoid": torch.sigmoid_,
    "tanh": _tanh,
    "relu": torch.relu_,
    "leaky_relu": lambda x: F.leaky_relu_(x, 0.01),
    "elu": _elu,
    "swish": lambda x: F.silu(x, inplace=True),
}
