"""Every op of the library at the published shapes, forward and backward, on meta tensors, to note down its launches.

The one idea: meta tensors have shapes, strides and types but no memory, so any machine can ask which kernels an op
would start on a GPU, with which arguments (effbert.kernels.launch), and compile exactly those.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from effbert.architecture import PUBLISHED, Architecture
from effbert.bench import costs
from effbert.bench.hardware import GPUS
from effbert.kernels import dispatch as ops
from effbert.kernels.aot import check
from effbert.kernels.expression import STRUCTURES, Expression
from effbert.kernels.launch import Launch, recording
from effbert.kernels.library import gradients_in_place
from effbert.kernels.philox import Dropout
from effbert.search.space import random_expression


@dataclass(frozen=True)
class Precision:
    """Types of an op's data and of its parameters, and which of a GPU's peak rates bounds the products."""

    data: torch.dtype
    parameters: torch.dtype
    rate: str


# "autocast" is what training runs: bf16 data, fp32 parameters, gradients added to `.grad` in place.
PRECISIONS = {
    "bf16": Precision(torch.bfloat16, torch.bfloat16, "bf16"),
    "fp16": Precision(torch.float16, torch.float16, "fp16"),
    "fp32": Precision(torch.float32, torch.float32, "fp32"),
    "tf32": Precision(torch.float32, torch.float32, "tf32"),
    "autocast": Precision(torch.bfloat16, torch.float32, "bf16"),
}

# Head sizes of student and teacher that attention and score losses are built for. The first three are the reduced set.
HEAD_SIZES = (
    (45, 64),  # the published pair
    (128, 128),  # the most that a head may have
    (30, 64),  # spilled most in bf16; rows of 360 elements allow loads that heads of 30 begin inside of
    (16, 16),  # the least that a matrix product takes
    (16, 32),
    (32, 32),
    (32, 64),
    (64, 64),
    (64, 128),
    (96, 96),  # padded to 128
    (128, 64),  # a student wider than its teacher
)
ODD_HEAD_SIZES = (  # of score_mse: heads of both models begin at odd addresses
    (63, 39),
    (105, 7),
    (121, 113),
)
REDUCED_HEAD_SIZES = HEAD_SIZES[:3]


@dataclass(frozen=True)
class Case:
    """One op at one shape. run(precision): forward and backward on meta tensors. cost(itemsize): its least cost."""

    op: str
    shape: str
    run: Callable[[Precision], None]
    cost: Callable[[int], costs.Passes]
    expression: str = ""


def cases(drawn: int | None = None, reduced: bool = False) -> list[Case]:
    """Every op at the published shapes: 64×128 tokens of 540, 12 heads of 45, a teacher of 768 with 12 heads of 64.

    drawn: expressions from the search's sampler beside the published six, each of the next linear structure; 24 by
    default, so all 16 occur. Attention and score losses come with all HEAD_SIZES. reduced: two of the published
    expressions, none drawn by default, length 128 and REDUCED_HEAD_SIZES alone.
    """
    published = Architecture.parse(PUBLISHED).layers
    mixing = published[4]  # multiplies h with x
    if reduced:
        published = published[0], mixing
    drawn = (0 if reduced else 24) if drawn is None else drawn
    rng = np.random.default_rng(0)
    expressions = [*published, *(random_expression(STRUCTURES[i % len(STRUCTURES)], rng) for i in range(drawn))]
    found = [case for expression in expressions for case in mlp_cases(expression)]
    found += mlp_cases(mixing, 256, 256)[1:]  # narrow enough for the whole block in one kernel
    few, many = 1024, 32768  # rows that every architecture gives to separate kernels, or to those of whole rows
    found += [case for expression in published for case in mlp_cases(expression, rows=few)[1:]]
    found += mlp_cases(mixing, rows=many)[1:]
    if not reduced:
        found += mlp_cases(mixing, 768, 3072, "pad")
    found += _row_cases()
    for batch, length in ((64, 128),) if reduced else ((64, 128), (16, 512), (128, 64)):
        for size, teacher in REDUCED_HEAD_SIZES if reduced else HEAD_SIZES:
            found += _attention_cases(batch, length, size=size, teacher=teacher)
        for size, teacher in () if reduced else ODD_HEAD_SIZES:
            pair = _attention_cases(batch, length, size=size, teacher=teacher)
            found += [case for case in pair if case.op == "score_mse"]
    found = list({(case.op, case.shape, case.expression): case for case in found}.values())  # pairs share students
    return [*found, _projection_case(), *_logit_cases()]


def mlp_cases(
    expression: Expression, hidden: int = 540, intermediate: int = 540, combine: str = "truncate", rows: int = 8192
) -> list[Case]:
    """`mlp` and `mlp_block` of one expression; `combine` as in effbert.kernels.eager."""
    inner = expression.structure.inner_width(intermediate)
    shapes = ((intermediate, hidden), (intermediate,), (hidden, intermediate), (hidden,), (hidden,), (hidden,))

    def tensors(precision):
        return _tensor(precision.data, rows, hidden), *(_tensor(precision.parameters, *shape) for shape in shapes)

    def mlp(precision):
        _backward(ops.mlp(*tensors(precision)[:5], expression, inner, combine))

    def block(precision):
        _backward(ops.mlp_block(*tensors(precision), expression, inner, 1e-5, Dropout(0.1, 1, 0), combine))

    shape, text = f"{rows}x{hidden} inner {inner}", str(expression)
    return [
        Case("mlp", shape, mlp, lambda itemsize: costs.mlp(rows, hidden, inner, itemsize), text),
        Case("mlp_block", shape, block, lambda itemsize: costs.mlp_block(rows, hidden, inner, itemsize), text),
    ]


def _row_cases(rows: int = 8192, hidden: int = 540) -> Iterator[Case]:
    def dropout(precision):
        _backward(ops.dropout(_tensor(precision.data, rows, hidden), Dropout(0.1, 1, 0)))

    def norm(precision):
        x, residual = _tensor(precision.data, rows, hidden), _tensor(precision.data, rows, hidden)
        weight, bias = _tensor(precision.parameters, hidden), _tensor(precision.parameters, hidden)
        _backward(ops.dropout_add_layer_norm(x, residual, weight, bias, 1e-5, Dropout(0.1, 1, 0)))

    shape = f"{rows}x{hidden}"
    yield Case("dropout", shape, dropout, lambda itemsize: costs.dropout(rows, hidden, itemsize))
    yield Case(
        "dropout_add_layer_norm", shape, norm, lambda itemsize: costs.dropout_add_layer_norm(rows, hidden, itemsize)
    )


def _attention_cases(batch: int, length: int, heads: int = 12, size: int = 45, teacher: int = 64) -> Iterator[Case]:
    sizes = batch, heads, length, size
    shape = f"{batch}x{heads}x{length}x{size}"
    mask = torch.empty(batch, length, dtype=torch.int64, device="meta")
    dropout = Dropout(0.1, 1, 0)

    def head(precision, width=size, grad=True):  # a view of [B, L, H, D], as a model has it
        return _tensor(precision.data, batch, length, heads, width, grad=grad).transpose(1, 2)

    def attention(precision):
        _backward(ops.attention(*(head(precision) for _ in range(3)), mask, dropout))

    def distill_attention(precision):
        student, target = [head(precision) for _ in range(3)], [head(precision, teacher, False) for _ in range(2)]
        _backward(*ops.distill_attention(*student, *target, mask, dropout))

    yield Case("attention", shape, attention, lambda itemsize: costs.attention(*sizes, itemsize))
    yield Case(
        "distill_attention",
        f"{shape} teacher {teacher}",
        distill_attention,
        lambda itemsize: costs.distill_attention(*sizes, teacher, itemsize),
    )
    for form, masking in (("direct", "real"), ("gram", "real"), ("direct", "released")):

        def score_mse(precision, form=form, masking=masking):
            student, target = [head(precision) for _ in range(2)], [head(precision, teacher, False) for _ in range(2)]
            _backward(ops.score_mse(*student, *target, mask, masking, form))

        yield Case(
            "score_mse",
            f"{shape} teacher {teacher} {form} {masking}",
            score_mse,
            lambda itemsize: costs.score_mse(*sizes, teacher, itemsize),
        )


def _projection_case(pairs: int = 7, batch: int = 64, length: int = 128, hidden: int = 540, width: int = 768) -> Case:
    def run(precision):
        states = [_tensor(precision.data, batch, length, hidden) for _ in range(pairs)]
        targets = [_tensor(precision.data, batch, length, width, grad=False) for _ in range(pairs)]
        linear = [_tensor(precision.parameters, *shape) for shape in ((width, hidden), (width,))]
        mask = torch.empty(batch, length, dtype=torch.int64, device="meta")
        _backward(ops.projected_mse(states, targets, *linear, mask))

    def cost(itemsize):
        return costs.projected_mse(pairs, batch * length, hidden, width, itemsize)

    return Case("projected_mse", f"{pairs} pairs {batch * length}x{hidden} to {width}", run, cost)


def _logit_cases() -> Iterator[Case]:
    """Three classes, spans over 512 positions, and the vocabulary for the 15 % of 8192 tokens that are predicted."""
    for rows, classes, masked in ((64, 3, False), (64, 512, True), (1229, 30522, False)):

        def run(precision, rows=rows, classes=classes, masked=masked):
            mask = torch.empty(rows, classes, dtype=torch.int64, device="meta") if masked else None
            student, target = (_tensor(precision.data, rows, classes, grad=grad) for grad in (True, False))
            _backward(ops.soft_cross_entropy(student, target, 2.0, mask))

        yield Case(
            "soft_cross_entropy",
            f"{rows}x{classes}{' masked' if masked else ''}",
            run,
            lambda itemsize, rows=rows, classes=classes: costs.soft_cross_entropy(rows, classes, itemsize),
        )


def _tensor(dtype: torch.dtype, *shape: int, grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def _backward(*results: torch.Tensor) -> None:
    torch.autograd.backward(results, [torch.empty_like(result) for result in results])


def record(case: Case, architecture: str, precision: str) -> list[Launch]:
    """The launches of the case's forward and backward on `architecture`, in a precision of PRECISIONS.

    ValueError where nothing can be built for it, as aot.check says.
    """
    check(architecture)
    multiprocessors = next(gpu.multiprocessors for gpu in GPUS if gpu.architecture == architecture)
    training = precision == "autocast"
    with contextlib.ExitStack() as stack:
        launches = stack.enter_context(recording(architecture, multiprocessors))
        stack.enter_context(ops.use_backend("triton"))
        stack.enter_context(_tf32(precision == "tf32"))
        stack.enter_context(torch.autocast("cpu", torch.bfloat16, enabled=training))
        if training:
            stack.enter_context(gradients_in_place())
        case.run(PRECISIONS[precision])
    return launches


@contextlib.contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    switch = torch.backends.cuda.matmul
    before, switch.fp32_precision = switch.fp32_precision, "tf32" if allowed else "ieee"
    try:
        yield
    finally:
        switch.fp32_precision = before
