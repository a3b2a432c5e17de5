"""What the arguments of every op must be, checked before any work, alike for all backends.

One function for each op of effbert.kernels.eager, with the backend's name before the op's own arguments. The one idea:
only attributes are read (shape, dtype, device, requires_grad), never a value, so a check costs about a microsecond,
works on fake and meta tensors and under torch.compile, and never waits for the device. Whatever is wrong is said in one
line, as ValueError (shapes, numbers, names) or TypeError (dtypes), with what would be right.

A mask may have any dtype. Where autocast is on for the device, x and the weights may differ in dtype.
"""

from collections.abc import Sequence

import torch

from effbert.kernels.expression import Expression
from effbert.kernels.launch import DTYPES, autocast_kind
from effbert.kernels.philox import Dropout

FUSED = "triton"
MAX_HEAD_SIZE = 128
MAX_ROWS = 2**31
MASKS = ("real", "released")
FORMS = ("auto", "direct", "gram")
COMBINES = ("truncate", "pad", "pad_released")
_WEIGHTS = ("weight1", "bias1", "weight2", "bias2")
_BLOCK_WEIGHTS = (*_WEIGHTS, "norm_weight", "norm_bias")
_MEMO_LIMIT = 4096

# Expressions that fit: (identity, C, E, combine) -> the expression, held so that its identity stays its own. Hashing
# the tree itself would take longer than all other checks of an op.
_fitting: dict[tuple[int, int, int, str], Expression] = {}


def dropout(backend: str, x: torch.Tensor, dropout: Dropout | None) -> None:
    """x [..., C], floating."""
    _check_floating("dropout", backend, x)
    _check_rows("dropout", x)
    if dropout is not None:
        _check_dropout("dropout", x, dropout)


def mlp(
    backend: str,
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    expression: Expression,
    inner_width: int,
    combine: str = "truncate",
) -> None:
    """x [..., C], weight1 [I, C], bias1 [I], weight2 [C, I], bias2 [C], 1 <= inner_width <= I, a fitting expression."""
    _check_alike("mlp", backend, x, (weight1, bias1, weight2, bias2), _WEIGHTS)
    _check_mlp("mlp", x, weight1, bias1, weight2, bias2, expression, inner_width, combine)


def mlp_block(
    backend: str,
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
) -> None:
    """As `mlp`, with norm_weight and norm_bias [C]."""
    weights = (weight1, bias1, weight2, bias2, norm_weight, norm_bias)
    _check_alike("mlp_block", backend, x, weights, _BLOCK_WEIGHTS)
    _check_mlp("mlp_block", x, weight1, bias1, weight2, bias2, expression, inner_width, combine)
    _check_norm("mlp_block", x, norm_weight, norm_bias, eps)
    if dropout is not None:
        _check_dropout("mlp_block", x, dropout)


def dropout_add_layer_norm(
    backend: str,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float,
    dropout: Dropout | None = None,
) -> None:
    """x and residual [..., C], weight and bias [C]."""
    name = "dropout_add_layer_norm"
    _check_alike(name, backend, x, (residual, weight, bias), ("residual", "weight", "bias"))
    _check_rows(name, x)
    if residual.shape != x.shape:
        raise ValueError(f"{name}: residual is {_size(residual)}, it must be as x, {_size(x)}")
    _check_norm(name, x, weight, bias, eps)
    if dropout is not None:
        _check_dropout(name, x, dropout)


def attention(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: Dropout | None = None,
) -> None:
    """query, key and value [B, H, L, D], attention_mask [B, L]."""
    _check_attention("attention", backend, query, key, value, attention_mask, dropout)


def distill_attention(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    teacher_query: torch.Tensor,
    teacher_key: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropout: Dropout | None = None,
    mask: str = "real",
) -> None:
    """As `attention`, with teacher_query and teacher_key [B, H, L, D'] of any floating dtype."""
    name = "distill_attention"
    _check_choice(name, "mask", mask, MASKS)
    _check_attention(name, backend, query, key, value, attention_mask, dropout)
    _check_teacher_heads(name, backend, query, teacher_query, teacher_key)


def score_mse(
    backend: str,
    student_query: torch.Tensor,
    student_key: torch.Tensor,
    teacher_query: torch.Tensor,
    teacher_key: torch.Tensor,
    attention_mask: torch.Tensor,
    mask: str = "real",
    form: str = "auto",
) -> None:
    """Student [B, H, L, D], teacher [B, H, L, D'], attention_mask [B, L]; each tensor of any floating dtype."""
    _check_choice("score_mse", "mask", mask, MASKS)
    _check_choice("score_mse", "form", form, FORMS)
    if mask == "released" and form == "gram":
        raise ValueError("the Gram form has no scores to replace at -100: use form='direct' with mask='released'")
    _check_floating("score_mse", backend, student_query)
    _check_heads("score_mse", backend, student_query, (student_query, student_key), ("student_query", "student_key"))
    _check_loss_tensor("score_mse", backend, student_query, student_key, "student_key")
    _check_teacher_heads("score_mse", backend, student_query, teacher_query, teacher_key)
    _check_present("score_mse", attention_mask)
    _check_mask("score_mse", student_query, attention_mask)


def projected_mse(
    backend: str,
    student_states: Sequence[torch.Tensor],
    teacher_states: Sequence[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> None:
    """As many student states [..., C] as teacher states [..., W], at least one; weight [W, C], bias [W]; the mask has
    the leading dimensions. Each tensor of any floating dtype.
    """
    name, pairs = "projected_mse", len(student_states)
    if pairs != len(teacher_states) or not pairs:
        found = f"{pairs} student states against {len(teacher_states)} teacher states"
        raise ValueError(f"{name}: {found}: there must be as many of both, at least one")
    first, target = student_states[0], teacher_states[0]
    _check_floating(name, backend, first)
    _check_rows(name, first)
    student_shape, teacher_shape = first.shape, target.shape
    _check_states(name, backend, first, student_states, student_shape, "student")
    _check_states(name, backend, first, teacher_states, teacher_shape, "teacher")
    if student_shape[:-1] != teacher_shape[:-1]:
        raise ValueError(f"{name}: student states are {_size(first)}, the teacher's {_size(target)}: other tokens")
    _check_loss_tensor(name, backend, first, weight, "weight")
    _check_loss_tensor(name, backend, first, bias, "bias")
    if weight.shape != (teacher_shape[-1], student_shape[-1]) or bias.shape != teacher_shape[-1:]:
        shapes = f"weight is {_size(weight)} and bias {_size(bias)}"
        raise ValueError(
            f"{name}: {shapes}, for states of {student_shape[-1]} and {teacher_shape[-1]} channels they must be "
            f"[{teacher_shape[-1]}, {student_shape[-1]}] and [{teacher_shape[-1]}]"
        )
    if backend == FUSED:
        _refuse_teacher_gradient(name, teacher_states)
    if attention_mask is not None:
        _check_mask_shape(name, first, attention_mask, student_shape[:-1])


def soft_cross_entropy(
    backend: str,
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    temperature: float = 1.0,
    mask: torch.Tensor | None = None,
    mean_over_kept: bool = True,
) -> None:
    """Logits and mask of one shape [..., C], temperature above 0; each tensor of logits of any floating dtype."""
    name = "soft_cross_entropy"
    _check_floating(name, backend, student_logits)
    _check_rows(name, student_logits)
    _check_loss_tensor(name, backend, student_logits, teacher_logits, "teacher_logits")
    if teacher_logits.shape != student_logits.shape:
        raise ValueError(f"{name}: teacher_logits are {_size(teacher_logits)}, the student's {_size(student_logits)}")
    if not temperature > 0:
        raise ValueError(f"{name}: temperature is {temperature}: it must be above 0")
    if backend == FUSED:
        _refuse_teacher_gradient(name, (teacher_logits,))
    if mask is not None:
        _check_mask_shape(name, student_logits, mask, student_logits.shape)


def _check_floating(op: str, backend: str, x: torch.Tensor, name: str = "the input") -> None:
    if backend == FUSED and x.dtype not in DTYPES:
        fused = ", ".join(_short(dtype) for dtype in DTYPES)
        raise TypeError(f"{op}: {name} is {_short(x.dtype)}; the fused kernels take {fused}, use_backend('eager') more")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name} is {_short(x.dtype)}: it must be floating")


def _check_alike(op: str, backend: str, x: torch.Tensor, others: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    """x and the others are floating, on one device, and of one dtype unless autocast is on there."""
    _check_floating(op, backend, x)
    dtype, device = x.dtype, x.device
    for other in others:
        if getattr(other, "dtype", None) != dtype or other.device != device:
            _check_unlike(op, backend, x, others, names)
            return


def _check_unlike(op, backend, x, others, names) -> None:
    dtype, device = x.dtype, x.device
    for other, name in zip(others, names, strict=True):
        if not hasattr(other, "is_floating_point"):
            raise TypeError(f"{op}: {name} is a {type(other).__name__}: it must be a tensor")
        if other.device != device:
            raise ValueError(f"{op}: {name} is on {other.device}, x on {device}: they must be on one device")
        _check_floating(op, backend, other, name)
        if other.dtype != dtype and not torch.is_autocast_enabled(autocast_kind(device)):
            found = f"{name} is {_short(other.dtype)}, x {_short(dtype)}"
            raise TypeError(f"{op}: {found}: they must agree where autocast is off")


def _check_rows(op: str, x: torch.Tensor) -> None:
    if x.dim() == 0:
        raise ValueError(f"{op}: the input is a scalar: it must have at least one dimension")
    if not x.shape[-1]:
        raise ValueError(f"{op}: the input is {_size(x)}: it needs a column at least")
    numel = x.numel()
    if numel >= MAX_ROWS and numel // x.shape[-1] >= MAX_ROWS:
        raise ValueError(f"{op}: {numel // x.shape[-1]} rows: they must be fewer than 2**31; give them in parts")


def _check_mlp(op, x, weight1, bias1, weight2, bias2, expression, inner_width, combine) -> None:
    _check_rows(op, x)
    _check_choice(op, "combine", combine, COMBINES)
    width, shape1 = x.shape[-1], weight1.shape
    if len(shape1) != 2 or shape1[1] != width:
        raise ValueError(f"{op}: weight1 is {_size(weight1)}, for x {_size(x)} it must be [I, {width}]")
    intermediate = shape1[0]
    if bias1.shape != (intermediate,):
        raise ValueError(f"{op}: bias1 is {_size(bias1)}, for weight1 {_size(weight1)} it must be [{intermediate}]")
    if weight2.shape != (width, intermediate):
        raise ValueError(f"{op}: weight2 is {_size(weight2)}, it must be [{width}, {intermediate}]")
    if bias2.shape != (width,):
        raise ValueError(f"{op}: bias2 is {_size(bias2)}, for x {_size(x)} it must be [{width}]")
    if isinstance(inner_width, (torch.Tensor, float)):
        raise TypeError(f"{op}: inner_width is a {type(inner_width).__name__}: it must be an int")
    if not 1 <= inner_width <= intermediate:
        raise ValueError(f"{op}: inner_width is {inner_width}, for weight1 {_size(weight1)} 1 to {intermediate}")
    _check_expression(op, expression, width, inner_width, combine)


def _check_expression(op: str, expression: Expression, width: int, inner_width: int, combine: str) -> None:
    """The search's checker takes it, and W1 and W2 get the widths they take; remembered for each expression. While
    torch.compile traces, which would trace the checker too, only the widths are looked at."""
    compiling = torch.compiler.is_compiling()
    known = None if compiling else (id(expression), width, inner_width, combine)
    if known in _fitting:
        return
    if not isinstance(expression, Expression):
        raise TypeError(f"{op}: the expression is {type(expression).__name__}: Expression.parse reads it from text")
    if not compiling:
        expression.check()
    expression.output_width(width, inner_width, "truncate" if combine == "truncate" else "pad")
    if not compiling:
        if len(_fitting) >= _MEMO_LIMIT:
            _fitting.clear()
        _fitting[known] = expression


def _check_norm(op: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> None:
    vector = x.shape[-1:]
    if weight.shape != vector or bias.shape != vector:
        found = f"weight is {_size(weight)} and bias {_size(bias)}"
        raise ValueError(f"{op}: LayerNorm's {found}, for x {_size(x)} both must be [{vector[0]}]")
    if not eps >= 0:
        raise ValueError(f"{op}: eps is {eps}: it must not be negative")


def _check_dropout(op: str, x: torch.Tensor, dropout: Dropout) -> None:
    if not isinstance(dropout, tuple) or len(dropout) != 3:
        raise TypeError(f"{op}: dropout is a {type(dropout).__name__}: it must be a Dropout(p, key, site), or None")
    p, key, site = dropout
    if not 0 <= p < 1:
        raise ValueError(f"{op}: dropout probability {p}: it must be at least 0 and below 1")
    if isinstance(key, torch.Tensor) and (key.dtype != torch.int64 or key.dim() or key.device != x.device):
        found = f"{_short(key.dtype)} {_size(key)} on {key.device}"
        raise ValueError(f"{op}: the dropout key is {found}: an int, or a 0-d int64 tensor on {x.device}")
    if not isinstance(key, torch.Tensor) and not 0 <= key < 2**63:
        raise ValueError(f"{op}: the dropout key is {key}: it must be at least 0 and below 2**63")
    if not 0 <= site < 2**31:
        raise ValueError(f"{op}: the dropout site is {site}: it must be at least 0 and below 2**31")


def _check_attention(op, backend, query, key, value, attention_mask, dropout) -> None:
    _check_alike(op, backend, query, (key, value), ("key", "value"))
    _check_heads(op, backend, query, (query, key, value), ("query", "key", "value"))
    if attention_mask is not None:
        _check_mask(op, query, attention_mask)
    if dropout is not None:
        _check_dropout(op, query, dropout)


def _check_heads(op, backend, like: torch.Tensor, tensors: Sequence[torch.Tensor], names: Sequence[str]) -> None:
    """All have the shape of the first, and it is [B, H, L, D] with the batch, heads and length of `like`."""
    first = tensors[0]
    shape = first.shape
    if len(shape) != 4 or (first is not like and shape[:3] != like.shape[:3]):
        wanted = "[B, H, L, D]" if first is like else f"[{', '.join(map(str, like.shape[:3]))}, D]"
        raise ValueError(f"{op}: {names[0]} is {_size(first)}, it must be {wanted}")
    if not shape[3]:
        raise ValueError(f"{op}: {names[0]} is {_size(first)}: a head needs a column at least")
    for other in tensors:
        if other.shape != shape:
            raise ValueError(f"{op}: {' and '.join(names)} must have one shape, not {', '.join(map(_size, tensors))}")
    if backend == FUSED and shape[3] > MAX_HEAD_SIZE:
        raise ValueError(
            f"{op}: head size {shape[3]}: the fused kernels take at most {MAX_HEAD_SIZE}, use_backend('eager') any"
        )
    _check_rows(op, first)


def _check_teacher_heads(op, backend, query, teacher_query, teacher_key) -> None:
    _check_heads(op, backend, query, (teacher_query, teacher_key), ("teacher_query", "teacher_key"))
    _check_loss_tensor(op, backend, query, teacher_query, "teacher_query")
    _check_loss_tensor(op, backend, query, teacher_key, "teacher_key")
    if backend == FUSED:
        _refuse_teacher_gradient(op, (teacher_query, teacher_key))


def _check_states(op, backend, first, states: Sequence[torch.Tensor], shape: Sequence[int], of: str) -> None:
    dtype, device = first.dtype, first.device
    for index, state in enumerate(states):
        if state.shape != shape:
            raise ValueError(f"{op}: {of} state {index} is {_size(state)}, the first is {_size(states[0])}")
        if state.dtype != dtype or state.device != device:
            _check_loss_tensor(op, backend, first, state, f"{of} state {index}")


def _check_loss_tensor(op: str, backend: str, first: torch.Tensor, other: torch.Tensor, name: str) -> None:
    """A tensor of a loss: floating, of a dtype of its own, on the device of the first."""
    if other.dtype != first.dtype:
        _check_floating(op, backend, other, name)
    if other.device != first.device:
        raise ValueError(f"{op}: {name} is on {other.device}, the student on {first.device}: one device, please")


def _refuse_teacher_gradient(op: str, teacher: Sequence[torch.Tensor]) -> None:
    for tensor in teacher:
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{op}: a teacher tensor requires grad, and the fused kernels have no gradient for it: "
                "detach() it, or use_backend('eager')"
            )


def _check_present(op: str, attention_mask: torch.Tensor | None) -> None:
    if attention_mask is None:
        raise TypeError(f"{op}: attention_mask is None: it must be a tensor [B, L], all ones where all tokens are real")


def _check_mask(op: str, query: torch.Tensor, attention_mask: torch.Tensor) -> None:
    batch, _, length, _ = query.shape
    _check_mask_shape(op, query, attention_mask, (batch, length))


def _check_mask_shape(op: str, x: torch.Tensor, mask: torch.Tensor, shape: Sequence[int]) -> None:
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"{op}: the mask is a {type(mask).__name__}: it must be a tensor")
    if mask.shape != shape:
        raise ValueError(f"{op}: the mask is {_size(mask)}, it must be [{', '.join(map(str, shape))}]")
    if mask.device != x.device:
        raise ValueError(f"{op}: the mask is on {mask.device}, the input on {x.device}: one device, please")


def _check_choice(op: str, name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{op}: {name} {value!r}: one of {', '.join(map(repr, choices))}")


def _size(tensor: torch.Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
