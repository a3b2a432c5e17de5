"""What the kernel benchmarks run: every op at the published shapes (or tiny ones), its rivals and its least cost."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from effbert.architecture import PUBLISHED, Architecture
from effbert.bench import costs, rivals
from effbert.bench.costs import Passes
from effbert.kernels import Dropout, Expression, eager

SEED = 0
EPS = 1e-5
DROPOUT = 0.1
KEY = 0x1234567890ABCDE


@dataclass(frozen=True)
class Sizes:
    """Shapes of all cases; the defaults are the published ones."""

    batch: int = 64
    length: int = 128
    long_batch: int = 16
    long_length: int = 512
    hidden: int = 540
    heads: int = 12
    teacher_hidden: int = 768
    pairs: int = 7
    logits: tuple[tuple[int, int], ...] = ((64, 3), (1229, 30522))
    repeats: int = 50

    @property
    def rows(self) -> int:
        """Tokens of a batch."""
        return self.batch * self.length


QUICK = Sizes(2, 8, 1, 16, 24, 2, 32, 2, ((4, 3), (3, 50)), 3)


@dataclass(frozen=True)
class Setting:
    """Where the tensors live, their dtype, and the stream of random numbers that fills them."""

    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator

    @classmethod
    def of(cls, device: torch.device) -> "Setting":
        """bf16 on a GPU, fp32 on a CPU; the same numbers each time."""
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        return cls(device, dtype, torch.Generator(device).manual_seed(SEED))

    @property
    def precision(self) -> str:
        """Name of the matrix-product rate in `Ceilings`."""
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    def random(self, *shape: int, grad: bool = True, scale: float = 1.0) -> torch.Tensor:
        """Normal numbers of standard deviation `scale`."""
        x = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return x.to(self.dtype).requires_grad_(grad)

    def ones(self, *shape: int) -> torch.Tensor:
        """A mask that keeps everything."""
        return torch.ones(shape, dtype=torch.int64, device=self.device)


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    tensors(setting): its inputs; those that require grad get gradients. forward(op, tensors): the results, with `op` a
    function of the signature of effbert.kernels.eager. cost(itemsize): its least cost. rivals: what people run, by
    name, "eager" first; compiled_rivals: those that compile themselves first. parent_slices: weights are slices of a
    supernet's, and their gradients are added to `.grad`.
    """

    name: str
    op: str
    shape: str
    tensors: Callable[[Setting], list[torch.Tensor]]
    forward: Callable[[Callable, list[torch.Tensor]], torch.Tensor | tuple[torch.Tensor, ...]]
    cost: Callable[[int], Passes]
    rivals: dict[str, Callable]
    has_dropout: bool = False
    parent_slices: bool = False
    compiled_rivals: dict[str, Callable] = field(default_factory=dict)


def all_cases(sizes: Sizes) -> list[Case]:
    """Every op, the most telling first."""
    layers = Architecture.parse(PUBLISHED).layers
    return [
        *(_block_case(sizes, number, layer) for number, layer in enumerate(layers, start=1)),
        _score_case(sizes, sizes.batch, sizes.length),
        _score_case(sizes, sizes.long_batch, sizes.long_length),
        _projection_case(sizes),
        _distill_attention_case(sizes),
        _norm_case(sizes),
        _attention_case(sizes),
        *(_logit_case(rows, classes) for rows, classes in sizes.logits),
        _block_case(sizes, 1, layers[0], parent_slices=True),
        _mlp_case(sizes, layers[1]),
        _dropout_case(sizes),
    ]


def chosen_cases(sizes: Sizes, ops: str | None) -> list[Case]:
    """The cases of the comma-separated `ops`, all where it is None; ValueError names what is unknown."""
    cases = all_cases(sizes)
    known = dict.fromkeys(case.op for case in cases)
    wanted = list(known) if ops is None else ops.split(",")
    unknown = [op for op in wanted if op not in known]
    if unknown:
        raise ValueError(f"--ops {ops}: no such op {', '.join(unknown)}; known: {', '.join(known)}")
    return [case for case in cases if case.op in wanted]


def _linears(setting: Setting, hidden: int, inner: int) -> list[torch.Tensor]:
    weight1, weight2 = ((inner, hidden), hidden**-0.5), ((hidden, inner), inner**-0.5)
    shapes = weight1, ((inner,), 0.1), weight2, ((hidden,), 0.1)
    return [setting.random(*shape, scale=scale) for shape, scale in shapes]


def _block_case(sizes: Sizes, number: int, expression: Expression, parent_slices: bool = False) -> Case:
    hidden, rows, structure = sizes.hidden, sizes.rows, expression.structure
    inner = structure.inner_width(hidden)
    count = 6

    def tensors(setting):
        found = [setting.random(sizes.batch, sizes.length, hidden)]
        for _ in range(structure.stacks):
            found += _linears(setting, hidden, hidden if parent_slices else inner)
            found += [setting.random(hidden), setting.random(hidden)]
        return found

    def forward(op, tensors):
        x, *weights = tensors
        for stack in range(structure.stacks):
            block = weights[count * stack : count * (stack + 1)]
            x = op(x, *block, expression, inner, EPS, Dropout(DROPOUT, KEY, stack))
        return x

    return Case(
        name=f"mlp_block layer {number}{' of a supernet' if parent_slices else ''}",
        op="mlp_block",
        shape=f"{rows}x{hidden}, {structure.stacks} stacked, inner {inner}, {expression}",
        tensors=tensors,
        forward=forward,
        cost=lambda itemsize: costs.mlp_block(rows, hidden, inner, itemsize) * structure.stacks,
        rivals={"eager": rivals.mlp_block},
        has_dropout=True,
        parent_slices=parent_slices,
    )


def _mlp_case(sizes: Sizes, expression: Expression) -> Case:
    inner = expression.structure.inner_width(sizes.hidden)
    return Case(
        name="mlp",
        op="mlp",
        shape=f"{sizes.rows}x{sizes.hidden}, inner {inner}, {expression}",
        tensors=lambda setting: [
            setting.random(sizes.batch, sizes.length, sizes.hidden),
            *_linears(setting, sizes.hidden, inner),
        ],
        forward=lambda op, tensors: op(*tensors, expression, inner),
        cost=lambda itemsize: costs.mlp(sizes.rows, sizes.hidden, inner, itemsize),
        rivals={"eager": eager.mlp},
    )


def _norm_case(sizes: Sizes) -> Case:
    shape = sizes.batch, sizes.length, sizes.hidden
    return Case(
        name="dropout_add_layer_norm",
        op="dropout_add_layer_norm",
        shape=f"{sizes.rows}x{sizes.hidden}",
        tensors=lambda setting: [setting.random(*size) for size in (shape, shape, shape[2:], shape[2:])],
        forward=lambda op, tensors: op(*tensors, EPS, Dropout(DROPOUT, KEY, 0)),
        cost=lambda itemsize: costs.dropout_add_layer_norm(sizes.rows, sizes.hidden, itemsize),
        rivals={"eager": rivals.dropout_add_layer_norm},
        has_dropout=True,
    )


def _dropout_case(sizes: Sizes) -> Case:
    return Case(
        name="dropout",
        op="dropout",
        shape=f"{sizes.rows}x{sizes.hidden}",
        tensors=lambda setting: [setting.random(sizes.batch, sizes.length, sizes.hidden)],
        forward=lambda op, tensors: op(*tensors, Dropout(DROPOUT, KEY, 0)),
        cost=lambda itemsize: costs.dropout(sizes.rows, sizes.hidden, itemsize),
        rivals={"eager": rivals.dropout},
        has_dropout=True,
    )


def _heads(setting: Setting, batch: int, length: int, heads: int, size: int, grad: bool = True) -> torch.Tensor:
    """[B, H, L, D] as a model has it: a view of [B, L, H, D]."""
    return setting.random(batch, length, heads, size, grad=False).transpose(1, 2).requires_grad_(grad)


def _attention_case(sizes: Sizes) -> Case:
    shape = sizes.batch, sizes.heads, sizes.length, sizes.hidden // sizes.heads
    like = sizes.batch, sizes.length, sizes.heads, shape[3]
    return Case(
        name="attention",
        op="attention",
        shape="x".join(map(str, shape)),
        tensors=lambda setting: [*(_heads(setting, *like) for _ in range(3)), setting.ones(*like[:2])],
        forward=lambda op, tensors: op(*tensors, Dropout(DROPOUT, KEY, 0)),
        cost=lambda itemsize: costs.attention(*shape, itemsize),
        rivals={"eager": rivals.attention},
        has_dropout=True,
    )


def _distill_attention_case(sizes: Sizes) -> Case:
    shape = sizes.batch, sizes.heads, sizes.length, sizes.hidden // sizes.heads
    like, teacher = (sizes.batch, sizes.length, sizes.heads), sizes.teacher_hidden // sizes.heads
    return Case(
        name="distill_attention",
        op="distill_attention",
        shape=f"{'x'.join(map(str, shape))}, teacher {teacher}",
        tensors=lambda setting: [
            *(_heads(setting, *like, shape[3]) for _ in range(3)),
            *(_heads(setting, *like, teacher, grad=False) for _ in range(2)),
            setting.ones(*like[:2]),
        ],
        forward=lambda op, tensors: op(*tensors, Dropout(DROPOUT, KEY, 0)),
        cost=lambda itemsize: costs.distill_attention(*shape, teacher, itemsize),
        rivals={"eager": rivals.distill_attention},
        has_dropout=True,
    )


def _score_case(sizes: Sizes, batch: int, length: int) -> Case:
    shape = batch, sizes.heads, length, sizes.hidden // sizes.heads
    like, teacher = (batch, length, sizes.heads), sizes.teacher_hidden // sizes.heads
    return Case(
        name=f"score_mse L={length}",
        op="score_mse",
        shape=f"{'x'.join(map(str, shape))}, teacher {teacher}",
        tensors=lambda setting: [
            *(_heads(setting, *like, shape[3]) for _ in range(2)),
            *(_heads(setting, *like, teacher, grad=False) for _ in range(2)),
            setting.ones(*like[:2]),
        ],
        forward=lambda op, tensors: op(*tensors),
        cost=lambda itemsize: costs.score_mse(*shape, teacher, itemsize),
        rivals={
            "eager": rivals.materialised_score_mse,
            "gram": partial(eager.score_mse, form="gram"),
        },
        compiled_rivals={"flex": rivals.flex_score_mse},
    )


def _projection_case(sizes: Sizes) -> Case:
    like, pairs = (sizes.batch, sizes.length), sizes.pairs
    student, teacher = sizes.hidden, sizes.teacher_hidden

    def tensors(setting):
        states = [setting.random(*like, student) for _ in range(pairs)]
        targets = [setting.random(*like, teacher, grad=False) for _ in range(pairs)]
        return [*states, *targets, setting.random(teacher, student, scale=student**-0.5), setting.random(teacher)]

    return Case(
        name="projected_mse",
        op="projected_mse",
        shape=f"{pairs} pairs of {sizes.rows}x{student} to {teacher}",
        tensors=tensors,
        forward=lambda op, tensors: op(tensors[:pairs], tensors[pairs : 2 * pairs], *tensors[2 * pairs :]),
        cost=lambda itemsize: costs.projected_mse(pairs, sizes.rows, student, teacher, itemsize),
        rivals={"eager": rivals.projected_mse, "bf16": rivals.low_precision_projected_mse},
    )


def _logit_case(rows: int, classes: int) -> Case:
    return Case(
        name=f"soft_cross_entropy C={classes}",
        op="soft_cross_entropy",
        shape=f"{rows}x{classes}",
        tensors=lambda setting: [setting.random(rows, classes), setting.random(rows, classes, grad=False)],
        forward=lambda op, tensors: op(*tensors, 2.0),
        cost=lambda itemsize: costs.soft_cross_entropy(rows, classes, itemsize),
        rivals={"eager": eager.soft_cross_entropy},
    )
