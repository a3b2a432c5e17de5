"""The meaning of every fused op, in plain PyTorch: any dtype, any device, gradients by autograd.

Each function here is what a kernel of the same name must compute; the tests of every backend compare with it. Losses
are accumulated in at least fp32 and returned as 0-d tensors on the device of their inputs, without a host sync.

Shapes: B sequences, L positions, H heads, D head size, C hidden size, I intermediate size, E inner width (E <= I),
W teacher width. `attention_mask` is [B, L], 1 = keep.
"""

from collections.abc import Sequence
from functools import wraps

import torch
import torch.nn.functional as F

from effbert.kernels import philox
from effbert.kernels.expression import Expression, Node
from effbert.kernels.launch import autocast_kind
from effbert.kernels.philox import Dropout

RELEASED_SCORE_FLOOR = -100.0
RELEASED_MASK = -10000.0

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.01),
    "elu": F.elu,
    "swish": F.silu,
}
BINARY = {"add": torch.add, "mul": torch.mul, "max": torch.maximum}
FILL = {
    "pad": {"add": 0.0, "mul": 1.0, "max": -1e10},
    "pad_released": {"add": 0.0, "mul": 1.0, "max": 1 / -1e10},
}


def binary(op: str, a: torch.Tensor, b: torch.Tensor, combine: str = "truncate") -> torch.Tensor:
    """add, mul or max of a [..., n] and b [..., m].

    `combine` says what unequal widths do: "truncate" cuts both to the smaller, "pad" fills the smaller with the op's
    neutral value, "pad_released" does so with the released value for max (1/-1e10, a slip for -1e10).
    """
    if a.shape[-1] != b.shape[-1]:
        if combine == "truncate":
            width = min(a.shape[-1], b.shape[-1])
            a, b = a[..., :width], b[..., :width]
        else:
            width = max(a.shape[-1], b.shape[-1])
            fill = max(FILL[combine][op], torch.finfo(a.dtype).min)  # -1e10 is below what half precision holds
            a, b = (F.pad(t, (0, width - t.shape[-1]), value=fill) for t in (a, b))
    return BINARY[op](a, b)


def mlp(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    expression: Expression,
    inner_width: int,
    combine: str = "truncate",
) -> torch.Tensor:
    """One candidate MLP f(x) for x [..., C].

    weight1 [I, C] and bias1 [I] give their first `inner_width` outputs, weight2 [C, I] takes its first `inner_width`
    inputs; so a candidate uses slices of its parent's weights.
    """
    linears = {
        "wb1": lambda h: F.linear(h, weight1[:inner_width], bias1[:inner_width]),
        "wb2": lambda h: F.linear(h, weight2[:, :inner_width], bias2),
    }

    def value(node: Node) -> torch.Tensor:
        if node.op == "x":
            return x
        if node.op == "linear":
            return linears[node.args[1].op](value(node.args[0]))
        if node.op in BINARY:
            return binary(node.op, value(node.args[0]), value(node.args[1]), combine)
        return ACTIVATIONS[node.op](value(node.args[0]))

    return value(expression.root)


def dropout(x: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    """Dropout of x [..., C] with inverse scaling; x itself where `dropout` is None."""
    return philox.apply(x, dropout)


def dropout_add_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """LayerNorm(residual + Dropout(x)) over the last dimension; x and residual [..., C], weight and bias [C]."""
    return F.layer_norm(residual + philox.apply(x, dropout), weight.shape, weight, bias, eps)


def mlp_block(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    norm_weight: torch.Tensor,
    norm_bias: torch.Tensor,
    expression: Expression,
    inner_width: int,
    eps: float,
    dropout: Dropout | None = None,
    combine: str = "truncate",
) -> torch.Tensor:
    """LayerNorm(x + Dropout(f(x))) with f as in `mlp`; x [..., C]."""
    y = mlp(x, weight1, bias1, weight2, bias2, expression, inner_width, combine)
    return dropout_add_layer_norm(y, x, norm_weight, norm_bias, eps, dropout)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """softmax(QKᵀ/√D) V for query, key, value [B, H, L, D] -> [B, H, L, D]; masked keys get no weight, and a sequence
    without any other key gets zeros.

    With dropout the probabilities [B, H, L, L] are formed, because their mask comes from Philox; without it this is
    scaled_dot_product_attention, except on a CPU where fp32 products may be rounded to bf16: its small blocks are up to
    12 times slower by oneDNN.
    """
    keep = None if attention_mask is None else attention_mask.bool()[:, None, None, :]
    without = dropout is None or philox.threshold(dropout.p) == 0
    if without and not by_onednn(query):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=keep)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    if keep is None:
        return philox.apply(torch.softmax(scores, dim=-1), dropout) @ value
    p = torch.softmax(scores.masked_fill(~keep, torch.finfo(scores.dtype).min), dim=-1)
    return p @ value * keep.any(dim=-1, keepdim=True) if without else philox.apply(p, dropout, keep) @ value


_TAKEN = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


def by_onednn(x: torch.Tensor) -> bool:
    """Whether PyTorch's switch gives products with x, of fp32 on a CPU, to oneDNN, which may round them to bf16; False
    in what is compiled, and below AVX-512, where it takes none."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32 or not _TAKEN:
        return False
    return torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def distill_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    teacher_query: torch.Tensor,
    teacher_key: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    mask: str = "real",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of `attention`, and the `score_mse` of its queries and keys; without a mask all tokens are real."""
    everything = query.new_ones(query.shape[0], query.shape[2]) if attention_mask is None else attention_mask
    loss = score_mse(query, key, teacher_query, teacher_key, everything, mask)
    return attention(query, key, value, attention_mask, dropout), loss


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _without_autocast(loss):
    """A loss is computed in the precision of its widened inputs, also where the caller runs under autocast."""

    @wraps(loss)
    def run(*args, **kwargs):
        first = next(iter(args or kwargs.values()))
        device = first.device if isinstance(first, torch.Tensor) else first[0].device
        with torch.autocast(autocast_kind(device), enabled=False):
            return loss(*args, **kwargs)

    return run


@_without_autocast
def score_mse(
    student_query: torch.Tensor,
    student_key: torch.Tensor,
    teacher_query: torch.Tensor,
    teacher_key: torch.Tensor,
    attention_mask: torch.Tensor,
    mask: str = "real",
    form: str = "auto",
) -> torch.Tensor:
    """Mean squared difference of the raw attention scores QKᵀ/√D of student [B, H, L, D] and teacher [B, H, L, D'].

    Tokens are real where attention_mask [B, L] is not 0; what stands at others has no influence.
    mask "real": only pairs of real tokens count, in the sum and in the mean (H · Σ_b length_b²).
    mask "released": the published form; masked keys contribute 0, a score at or below -100 is replaced by 0 on its own
    side, and the mean runs over all B · H · L² entries.

    form "direct" forms the scores [B, H, L, L]; form "gram" never does: with Q̃ = [Q_S, -Q_T] and K̃ = [K_S, K_T]
    (scales folded into Q, masked rows zero) the sum is ⟨Q̃ᵀQ̃, K̃ᵀK̃⟩. In fp32 the Gram value loses about
    1e-7 · (Σ A_S² + Σ A_T²) / N absolutely to cancellation, and its gradient error is about 2.3 times the direct one.
    The replacement at -100 needs the scores themselves, so "released" is always direct. "auto" takes the form with
    fewer counted operations (`gram_is_cheaper`), and the direct one where products may be rounded (`by_onednn`).
    """
    if mask not in ("real", "released"):
        raise ValueError(f"mask {mask!r}: one of 'real', 'released'")
    if form not in ("auto", "direct", "gram"):
        raise ValueError(f"form {form!r}: one of 'auto', 'direct', 'gram'")
    if mask == "released" and form == "gram":
        raise ValueError("the Gram form has no scores to replace at -100: use form='direct' with mask='released'")
    student_query, student_key, teacher_query, teacher_key = (
        _wide(t) for t in (student_query, student_key, teacher_query, teacher_key)
    )
    student_query = student_query * student_query.shape[-1] ** -0.5
    teacher_query = teacher_query * teacher_query.shape[-1] ** -0.5
    if mask == "released":
        return _released_score_mse(student_query, student_key, teacher_query, teacher_key, attention_mask)

    heads, length = student_query.shape[1:3]
    real = attention_mask != 0
    count = heads * (real.sum(dim=1).to(student_query.dtype) ** 2).sum()
    student_query, student_key, teacher_query, teacher_key = (
        t.masked_fill(~real[:, None, :, None], 0.0) for t in (student_query, student_key, teacher_query, teacher_key)
    )
    if form == "auto":
        cheaper = gram_is_cheaper(length, student_query.shape[-1], teacher_query.shape[-1])
        form = "gram" if cheaper and not by_onednn(student_query) else "direct"
    if form == "direct":
        # both sides are zero in masked rows of Q and K, so nothing else needs masking
        scores = student_query @ student_key.transpose(-1, -2)
        target = teacher_query @ teacher_key.transpose(-1, -2)
        return (scores - target).square().sum() / count
    queries = torch.cat((student_query, -teacher_query), dim=-1)
    keys = torch.cat((student_key, teacher_key), dim=-1)
    return ((queries.transpose(-1, -2) @ queries) * (keys.transpose(-1, -2) @ keys)).sum() / count


def _released_score_mse(student_query, student_key, teacher_query, teacher_key, attention_mask):
    masked_keys = (attention_mask == 0).to(student_query.dtype)[:, None, None, :] * RELEASED_MASK

    def scores(query, key):
        raw = query @ key.transpose(-1, -2) + masked_keys
        return torch.where(raw <= RELEASED_SCORE_FLOOR, torch.zeros_like(raw), raw)

    return F.mse_loss(scores(student_query, student_key), scores(teacher_query, teacher_key))


def gram_is_cheaper(length: int, student_head_size: int, teacher_head_size: int) -> bool:
    """Whether the Gram form needs fewer multiply-adds, forward and backward, than the direct one, a sequence and head.

    Direct: student and teacher scores, then two products with the L×L difference for dQ_S and dK_S. Gram: two Gram
    matrices of side D + D', then their products with Q̃ and K̃ for the student's columns.
    """
    both = student_head_size + teacher_head_size
    direct = length**2 * both + 2 * length**2 * student_head_size
    gram = 2 * length * both**2 + 2 * length * both * student_head_size
    return gram < direct


@_without_autocast
def projected_mse(
    student_states: Sequence[torch.Tensor],
    teacher_states: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Σ over pairs of MSE(x Wᵀ + b, t): x [B, L, C] of the student, t [B, L, W] of the teacher, weight [W, C].

    With an attention_mask only real tokens count, in each sum and mean; without one, all positions (published form).
    """
    if len(student_states) != len(teacher_states):
        raise ValueError(f"{len(student_states)} student states against {len(teacher_states)} teacher states")
    total = None
    for x, target in zip(student_states, teacher_states, strict=True):
        squared = (F.linear(_wide(x), _wide(weight), _wide(bias)) - _wide(target)).square()
        if attention_mask is None:
            loss = squared.mean()
        else:
            real = attention_mask.to(squared.dtype)
            loss = (squared.sum(dim=-1) * real).sum() / (real.sum() * squared.shape[-1])
        total = loss if total is None else total + loss
    return total


@_without_autocast
def soft_cross_entropy(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    mean_over_kept: bool = True,
) -> torch.Tensor:
    """-mean over rows and classes of softmax(z_T / t) · log_softmax(z_S / t), for logits [B, C].

    The mean divides by B · C, as published. With `mask` [B, C] (1 = keep) the other classes get no probability on
    either side, and the mean divides by the number of kept classes, or by all B · C where `mean_over_kept` is False
    (the published form for spans).
    """
    student, teacher = _wide(student_logits), _wide(teacher_logits)
    if mask is not None:
        blocked = (1 - mask.to(student.dtype)) * RELEASED_MASK
        student, teacher = student + blocked, teacher + blocked
    product = torch.softmax(teacher / temperature, dim=-1) * torch.log_softmax(student / temperature, dim=-1)
    count = mask.sum() if mask is not None and mean_over_kept else product.numel()
    return -product.sum() / count
