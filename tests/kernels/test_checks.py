"""Bad input to an op is refused in one line, before any work; good input passes, also fake, on meta and compiled."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effbert.kernels import checks
from effbert.kernels.expression import Expression, ExpressionError
from effbert.kernels.philox import Dropout

GELU = Expression.parse("linear1_2(gelu(linear1_2(x,wb1)),wb2)")
MUL = Expression.parse("linear1_2(relu(mul(linear1_2(x,wb1),x)),wb2)")
POST = Expression.parse("add(linear1_2(mul(linear1_2(x,wb1),x),wb2),x)")
BACKENDS = ("eager", "triton")


def zeros(*shape, dtype=torch.float32, device="cpu", **options):
    return torch.zeros(*shape, dtype=dtype, device=device, **options)


def arguments(op, **options):
    """Valid arguments of `op` by name: C 8, I 6, E 4, B 2, H 3, L 5, D 4, D' 7, W 9."""
    x, vector, heads, teacher = (zeros(*shape, **options) for shape in ((2, 5, 8), (8,), (2, 3, 5, 4), (2, 3, 5, 7)))
    mask = zeros(2, 5, dtype=torch.int64, device=options.get("device", "cpu"))
    dropout = Dropout(0.1, 3, 1)
    linears = dict(weight1=zeros(6, 8, **options), bias1=zeros(6, **options), weight2=zeros(8, 6, **options))
    f = dict(x=x, **linears, bias2=vector, expression=GELU, inner_width=4)
    attention = dict(query=heads, key=heads, value=heads, attention_mask=mask, dropout=dropout)
    teacher_heads = dict(teacher_query=teacher, teacher_key=teacher)
    states = dict(student_states=[x, x], teacher_states=[zeros(2, 5, 9, **options)] * 2)
    return {
        "dropout": dict(x=x, dropout=dropout),
        "mlp": f,
        "mlp_block": f | dict(norm_weight=vector, norm_bias=vector, eps=1e-5, dropout=dropout),
        "dropout_add_layer_norm": dict(x=x, residual=x, weight=vector, bias=vector, eps=1e-5, dropout=dropout),
        "attention": attention,
        "distill_attention": attention | teacher_heads | dict(mask="real"),
        "score_mse": dict(student_query=heads, student_key=heads, attention_mask=mask, mask="real") | teacher_heads,
        "projected_mse": states | dict(weight=zeros(9, 8, **options), bias=zeros(9, **options), attention_mask=mask),
        "soft_cross_entropy": dict(student_logits=x, teacher_logits=x, temperature=2.0, mask=zeros(2, 5, 8)),
    }[op]


OPS = (
    "dropout",
    "mlp",
    "mlp_block",
    "dropout_add_layer_norm",
    "attention",
    "distill_attention",
    "score_mse",
    "projected_mse",
    "soft_cross_entropy",
)
LOSSES = ("score_mse", "projected_mse", "soft_cross_entropy")
FIRST = {
    "attention": "query",
    "distill_attention": "query",
    "score_mse": "student_query",
    "soft_cross_entropy": "student_logits",
}


def check(op, backend="eager", **changes):
    getattr(checks, op)(backend, **arguments(op) | changes)


@pytest.fixture
def refused():
    def refused(error, message, op, backend="eager", **changes):
        with pytest.raises(error, match=message) as caught:
            check(op, backend, **changes)
        assert "\n" not in str(caught.value)

    return refused


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_valid_input_passes(op, backend):
    check(op, backend)
    for dtype in (torch.float16, torch.bfloat16):
        getattr(checks, op)(backend, **arguments(op, dtype=dtype))


@pytest.mark.parametrize("op", OPS)
def test_fake_and_meta_tensors_pass(op):
    with FakeTensorMode():
        check(op, "triton")
    given = arguments(op, device="meta")
    if op == "soft_cross_entropy":
        given["mask"] = given["mask"].to("meta")
    getattr(checks, op)("triton", **given)


@pytest.mark.parametrize("op", OPS)
def test_they_trace_as_part_of_one_graph(op):
    given = arguments(op)
    tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
    rest = {name: value for name, value in given.items() if name not in tensors}

    def function(tensors):
        getattr(checks, op)("triton", **tensors, **rest)
        return next(iter(tensors.values()), given.get("weight")) + 1

    torch._dynamo.reset()
    torch.compile(function, fullgraph=True, backend="eager")(tensors)


def test_a_trace_takes_a_changing_number_of_rows_and_refuses_what_eager_refuses():
    wide = arguments("mlp") | dict(weight1=zeros(9, 8), bias1=zeros(9), weight2=zeros(8, 9), expression=MUL)

    def function(x, inner_width):
        checks.mlp("triton", **wide | dict(x=x, inner_width=inner_width, combine="pad"))
        return x + 1

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    for rows in (1, 2, 3):
        assert compiled(zeros(rows, 8), 8).shape == (rows, 8)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="inner_width"):
        compiled(zeros(2, 8), 12)
    with pytest.raises(Exception, match="output_width"):  # the trace stops inside it, at the error it would raise
        compiled(zeros(2, 8), 4)


@pytest.mark.parametrize("op", OPS)
def test_a_non_floating_input_is_refused(op, refused):
    given = arguments(op)
    for dtype in (torch.int64, torch.bool, torch.complex64):
        if op == "projected_mse":
            refused(TypeError, "must be floating", op, student_states=[zeros(2, 5, 8, dtype=dtype)] * 2)
            refused(TypeError, "bias is .*must be floating", op, bias=zeros(9, dtype=dtype))
            refused(TypeError, "teacher state 0 is .*floating", op, teacher_states=[zeros(2, 5, 9, dtype=dtype)] * 2)
        else:
            first = FIRST.get(op, "x")
            refused(TypeError, f"{op}: the input is .* must be floating", op, **{first: given[first].to(dtype)})


@pytest.mark.parametrize("op", OPS)
def test_float64_is_for_eager_only(op, refused):
    given = arguments(op, dtype=torch.float64)
    getattr(checks, op)("eager", **given)
    changes = {name: value for name, value in given.items() if name not in ("attention_mask", "mask", "dropout")}
    refused(
        TypeError, r"float64; the fused kernels take float32, float16, bfloat16, use_backend", op, "triton", **changes
    )


@pytest.mark.parametrize(
    ("op", "name"),
    [
        *(("mlp", name) for name in ("weight1", "bias1", "weight2", "bias2")),
        *(("mlp_block", name) for name in ("weight2", "norm_weight", "norm_bias")),
        *(("dropout_add_layer_norm", name) for name in ("residual", "weight", "bias")),
        *((op, name) for op in ("attention", "distill_attention") for name in ("key", "value")),
    ],
)
def test_dtypes_agree_unless_autocast_is_on(op, name, refused):
    other = arguments(op)[name].bfloat16()
    refused(TypeError, f"{name} is bfloat16, .* float32: they must agree where autocast is off", op, **{name: other})
    with torch.autocast("cpu", torch.bfloat16):
        check(op, **{name: other})
        refused(TypeError, f"{name} is int64: it must be floating", op, **{name: other.long()})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", LOSSES)
def test_losses_take_mixed_dtypes(op, backend):
    mixed = {"score_mse": "teacher_key", "projected_mse": "weight", "soft_cross_entropy": "teacher_logits"}[op]
    check(op, backend, **{mixed: arguments(op)[mixed].half()})


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("mlp", "weight2"),
        ("mlp_block", "norm_bias"),
        ("dropout_add_layer_norm", "residual"),
        ("attention", "value"),
        ("attention", "attention_mask"),
        ("distill_attention", "teacher_key"),
        ("score_mse", "student_key"),
        ("score_mse", "attention_mask"),
        ("projected_mse", "bias"),
        ("projected_mse", "attention_mask"),
        ("soft_cross_entropy", "teacher_logits"),
        ("soft_cross_entropy", "mask"),
    ],
)
def test_all_tensors_are_on_one_device(op, name, refused):
    refused(ValueError, f"{op}: .* is on meta, .* on cpu", op, **{name: arguments(op)[name].to("meta")})


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("mlp", dict(weight1=zeros(6, 7)), r"weight1 is \[6, 7\], for x \[2, 5, 8\] it must be \[I, 8\]"),
        ("mlp", dict(weight1=zeros(8)), r"weight1 is \[8\]"),
        ("mlp", dict(bias1=zeros(4)), r"bias1 is \[4\], .* \[6\]"),
        ("mlp", dict(weight2=zeros(6, 8)), r"weight2 is \[6, 8\], it must be \[8, 6\]"),
        ("mlp", dict(bias2=zeros(6)), r"bias2 is \[6\], .* \[8\]"),
        ("mlp", dict(x=zeros(2, 7)), r"for x \[2, 7\] it must be \[I, 7\]"),
        ("mlp", dict(x=zeros(())), "scalar"),
        ("mlp_block", dict(norm_weight=zeros(7)), r"LayerNorm's weight is \[7\] and bias \[8\]"),
        ("mlp_block", dict(norm_bias=zeros(1)), r"both must be \[8\]"),
        ("mlp_block", dict(eps=-1.0), "eps is -1.0"),
        ("dropout_add_layer_norm", dict(residual=zeros(5, 8)), r"residual is \[5, 8\], .* \[2, 5, 8\]"),
        ("dropout_add_layer_norm", dict(weight=zeros(2, 8)), r"weight is \[2, 8\]"),
        ("attention", dict(query=zeros(2, 5, 4)), r"query is \[2, 5, 4\], it must be \[B, H, L, D\]"),
        ("attention", dict(value=zeros(2, 3, 5, 6)), r"query and key and value must have one shape, .*\[2, 3, 5, 6\]"),
        ("attention", dict(attention_mask=zeros(5, 2)), r"the mask is \[5, 2\], it must be \[2, 5\]"),
        ("attention", dict(attention_mask=zeros(2, 1, 1, 5)), r"must be \[2, 5\]"),
        ("distill_attention", dict(teacher_query=zeros(2, 2, 5, 7)), r"teacher_query .* must be \[2, 3, 5, D\]"),
        ("distill_attention", dict(teacher_key=zeros(2, 3, 5, 6)), "teacher_query and teacher_key must have one shape"),
        ("score_mse", dict(student_key=zeros(2, 3, 5, 5)), "student_query and student_key must have one shape"),
        ("score_mse", dict(teacher_query=zeros(2, 3, 6, 7)), r"teacher_query .* must be \[2, 3, 5, D\]"),
        ("score_mse", dict(attention_mask=zeros(2, 6)), r"the mask is \[2, 6\]"),
        ("projected_mse", dict(teacher_states=[zeros(2, 5, 9)]), "2 student states against 1 teacher states"),
        ("projected_mse", dict(student_states=[], teacher_states=[]), "0 student states against 0"),
        ("projected_mse", dict(student_states=[zeros(2, 5, 8), zeros(2, 5, 7)]), r"student state 1 is \[2, 5, 7\]"),
        ("projected_mse", dict(teacher_states=[zeros(2, 4, 9)] * 2), "other tokens"),
        ("projected_mse", dict(weight=zeros(8, 9)), r"weight is \[8, 9\] .* must be \[9, 8\] and \[9\]"),
        ("projected_mse", dict(bias=zeros(8)), r"bias \[8\]"),
        ("projected_mse", dict(attention_mask=zeros(2, 5, 1)), r"the mask is \[2, 5, 1\], it must be \[2, 5\]"),
        ("soft_cross_entropy", dict(teacher_logits=zeros(2, 5, 7)), r"teacher_logits are \[2, 5, 7\]"),
        ("soft_cross_entropy", dict(mask=zeros(2, 5)), r"the mask is \[2, 5\], it must be \[2, 5, 8\]"),
        ("dropout", dict(x=zeros(())), "scalar"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(op, changes, message, refused):
    for backend in BACKENDS:
        refused(ValueError, f"{op}: .*{message}|^{message}", op, backend, **changes)


def test_head_sizes_above_128_are_for_eager_only(refused):
    wide, long = zeros(2, 3, 5, 129), zeros(2, 3, 5, 128)
    for op in ("attention", "distill_attention"):
        changes = dict(query=wide, key=wide, value=wide)
        refused(ValueError, "head size 129: the fused kernels take at most 128", op, "triton", **changes)
        check(op, **changes)
        check(op, "triton", query=long, key=long, value=long)
    for op in ("distill_attention", "score_mse"):
        refused(ValueError, "head size 129", op, "triton", teacher_query=wide, teacher_key=wide)
        check(op, teacher_query=wide, teacher_key=wide)


def test_inner_width_is_a_slice_of_the_weights(refused):
    for op in ("mlp", "mlp_block"):
        for inner_width in (0, 7, -1):
            refused(ValueError, f"{op}: inner_width is {inner_width}, .* 1 to 6", op, inner_width=inner_width)
        check(op, inner_width=1)
        check(op, inner_width=6)


def test_widths_of_an_expression_must_work_out(refused):
    check("mlp", expression=MUL)  # x is cut to the inner width
    refused(ValueError, "wb2 takes 4 channels and gets 8", "mlp", expression=MUL, combine="pad")
    refused(ValueError, "wb2 takes 4 channels and gets 8", "mlp", expression=MUL, combine="pad_released")
    wide = dict(weight1=zeros(12, 8), bias1=zeros(12), weight2=zeros(8, 12), inner_width=12)
    refused(ValueError, "wb2 takes 12 channels and gets 8", "mlp", expression=POST, **wide)
    check("mlp", expression=POST, combine="pad", **wide)
    refused(TypeError, "the expression is str: Expression.parse reads it", "mlp", expression=str(GELU))


def test_widths_of_an_expression_are_worked_out_once(monkeypatch):
    calls = []
    worked_out = Expression.output_width
    monkeypatch.setattr(
        Expression, "output_width", lambda self, *widths: calls.append(widths) or worked_out(self, *widths)
    )
    expression = Expression.parse("linear1_2(tanh(linear1_2(x,wb1)),wb2)")
    for _ in range(3):
        check("mlp", expression=expression)
        check("mlp_block", expression=expression)
    assert calls == [(12, 12), (12, 6), (12, 4), (12, 3), (8, 4, "truncate")]
    check("mlp", expression=expression, inner_width=5)
    assert len(calls) == 10
    monkeypatch.setattr(checks, "_MEMO_LIMIT", 1)
    check("mlp", expression=expression, inner_width=6)
    assert len(checks._fitting) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("linear1_1(gelu(sigmoid(linear1_1(x,wb1))),wb2)", "an activation directly in the activation gelu"),
        ("add(linear1_2(gelu(linear1_2(x,wb1)),wb2),linear1_2(gelu(x),wb1))", "needs exactly one wb1 and one wb2"),
        ("linear(gelu(linear(x,wb1)),wb2)", "linear without its structure"),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "eager", "compile"])
def test_an_expression_that_the_checker_refuses_is_refused_by_every_backend(text, message, backend):
    for op in ("mlp", "mlp_block"):
        with pytest.raises(ExpressionError, match=message):
            check(op, backend, expression=Expression.parse(text))


@pytest.mark.parametrize("op", ["mlp", "mlp_block"])
def test_what_is_no_tensor_or_no_number_is_named(op, refused):
    refused(TypeError, f"^{op}: bias1 is a NoneType: it must be a tensor", op, bias1=None)
    refused(TypeError, f"^{op}: bias1 is a ndarray: it must be a tensor", op, bias1=np.zeros(8, np.float32))
    refused(TypeError, f"^{op}: inner_width is a Tensor: it must be an int", op, inner_width=torch.tensor(4))


@pytest.mark.parametrize(
    ("op", "changes", "message"),
    [
        ("mlp", dict(combine="cut"), "combine 'cut': one of 'truncate', 'pad', 'pad_released'"),
        ("score_mse", dict(mask="all"), "mask 'all': one of 'real', 'released'"),
        ("distill_attention", dict(mask="all"), "mask 'all'"),
        ("score_mse", dict(form="tiled"), "form 'tiled': one of 'auto', 'direct', 'gram'"),
        ("score_mse", dict(mask="released", form="gram"), "no scores to replace"),
        ("soft_cross_entropy", dict(temperature=0.0), "temperature is 0.0: it must be above 0"),
        ("soft_cross_entropy", dict(temperature=-1), "temperature is -1"),
        ("soft_cross_entropy", dict(temperature=float("nan")), "temperature is nan"),
    ],
)
def test_unknown_names_and_impossible_numbers_are_refused(op, changes, message, refused):
    refused(ValueError, message, op, **changes)


def test_score_mse_alone_needs_a_mask(refused):
    refused(TypeError, "score_mse: attention_mask is None", "score_mse", attention_mask=None)
    for op in ("attention", "distill_attention", "projected_mse"):
        check(op, attention_mask=None)
        refused(TypeError, f"{op}: the mask is a list: it must be a tensor", op, attention_mask=[[1]])


@pytest.mark.parametrize("op", ["dropout", "mlp_block", "dropout_add_layer_norm", "attention"])
def test_impossible_dropouts_are_refused(op, refused):
    for site in (-1, 2**31):
        refused(ValueError, f"{op}: the dropout site is {site}", op, dropout=Dropout(0.1, 3, site))
    for key in (-1, 2**63):
        refused(ValueError, f"{op}: the dropout key is {key}", op, dropout=Dropout(0.1, key, 1))
    refused(TypeError, f"{op}: dropout is a float: it must be a Dropout", op, dropout=0.1)
    check(op, dropout=Dropout(0.1, 2**63 - 1, 2**31 - 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_columns_are_too_few(backend, refused):
    refused(ValueError, r"the input is \[3, 0\]: it needs a column", "dropout", backend, x=zeros(3, 0))
    heads = zeros(2, 3, 5, 0)
    for op, names in (("score_mse", ("student_query", "student_key")), ("attention", ("query", "key", "value"))):
        refused(ValueError, "a head needs a column", op, backend, **dict.fromkeys(names, heads))


@pytest.mark.parametrize("op", ["dropout", "mlp_block", "dropout_add_layer_norm", "attention", "distill_attention"])
def test_dropout_is_a_probability_with_a_usable_key(op, refused):
    for p in (1.0, -0.1, float("nan")):
        refused(ValueError, f"{op}: dropout probability {p}", op, dropout=Dropout(p, 1, 2))
    check(op, dropout=None)
    check(op, dropout=Dropout(0.1, zeros((), dtype=torch.int64), 2))
    for key in (zeros(1, dtype=torch.int64), zeros(()), zeros((), dtype=torch.int64, device="meta")):
        refused(ValueError, "dropout key is .*: an int, or a 0-d int64 tensor on cpu", op, dropout=Dropout(0.1, key, 2))


def test_2_to_the_31_rows_are_refused(refused):
    rows = zeros(2**31, 8, device="meta")
    refused(ValueError, r"dropout: 2147483648 rows: they must be fewer than 2\*\*31", "dropout", x=rows)
    check("dropout", x=rows[1:])
    logits = dict(student_logits=rows, teacher_logits=rows, mask=None)
    refused(ValueError, "2147483648 rows", "soft_cross_entropy", **logits)
    heads = zeros(2**20, 2**6, 2**5, 4, device="meta")
    refused(ValueError, "2147483648 rows", "attention", query=heads, key=heads, value=heads, attention_mask=None)
    check("attention", query=heads[1:], key=heads[1:], value=heads[1:], attention_mask=None, dropout=None)


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("score_mse", "teacher_key"),
        ("distill_attention", "teacher_query"),
        ("soft_cross_entropy", "teacher_logits"),
        ("projected_mse", "teacher_states"),
    ],
)
def test_a_teacher_that_wants_a_gradient_is_for_eager_only(op, name, refused):
    given = arguments(op)[name]
    wanting = (
        [given[0], given[1].clone().requires_grad_()] if isinstance(given, list) else given.clone().requires_grad_()
    )
    refused(ValueError, "teacher tensor requires grad", op, "triton", **{name: wanting})
    check(op, "eager", **{name: wanting})
    with torch.no_grad():
        check(op, "triton", **{name: wanting})


def test_no_value_is_read():
    class Attributes(SimpleNamespace):
        """What a check may look at; anything else is an AttributeError."""

    x = zeros(2, 5, 8)
    seen = Attributes(
        shape=x.shape, dtype=x.dtype, device=x.device, dim=x.dim, numel=x.numel, is_floating_point=x.is_floating_point
    )
    seen.requires_grad = False
    checks.dropout("triton", seen, Dropout(0.1, 1, 2))
    checks.soft_cross_entropy("triton", seen, seen)
    checks.dropout_add_layer_norm("triton", seen, seen, zeros(8), zeros(8), 1e-5)
    checks.projected_mse("triton", [seen], [seen], zeros(8, 8), zeros(8))
