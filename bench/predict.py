"""What every op should take on a GPU that is not here, fused and eager, by one count: what kernels move and multiply.

The one idea: both run on meta tensors and every kernel they would start is noted down, PyTorch's by its dispatcher,
ours by `effbert.kernels.launch`. A kernel then lasts as long as its bytes (each tensor it touches, once) at a share of
the memory bandwidth, or its FLOPs at a share of the peak rate, whichever is longer, plus a fixed time for its start in
a CUDA graph. The three assumed numbers are the same for both sides and printed with the result. Caches, tails and the
host are left out, so the ratios mean more than the times, and neither is a measurement. Once is once: what a program of
effbert.kernels.row_block writes and reads back a stage later is one write, as a tensor is one read that a kernel of
PyTorch's goes through twice. Of a published block that is at most 18 MB forward and 27 MB backward, less than an L2 of
50 MB holds. Meta tensors know no fused attention of PyTorch's: attention is therefore predicted for the fused form
alone, and distill_attention's rival is materialised. torch.compile is not predicted.

    effbert bench predict --gpu H200
    effbert bench predict --gpu B200 --output predicted.json

Cases and targets are those of `effbert bench kernels`, with bf16 inputs and parameters.
"""

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from effbert import kernels
from effbert.bench.costs import Cost
from effbert.bench.hardware import GPUS, Gpu, gpu_named
from effbert.bench.kernel_cases import Case, Setting, Sizes, all_cases
from effbert.bench.kernels import SIX_LAYERS, TARGETS
from effbert.bench.measure import output_file
from effbert.flags import Parser
from effbert.kernels.dispatch import why_not_triton
from effbert.kernels.launch import Launch, recording


@dataclass(frozen=True)
class Assumptions:
    """Shares of a data sheet's bandwidth and matrix rate that kernels of these sizes reach; microseconds a start."""

    bandwidth: float = 0.75
    products: float = 0.45
    start_us: float = 1.5


@dataclass(frozen=True)
class Prediction:
    """Microseconds of one variant of a case, and what was counted: kernels, bytes, FLOPs."""

    case: str
    variant: str
    microseconds: float
    roofline_us: float
    kernels: int
    bytes: int
    flops: int


def main(arguments: list[str] | None = None) -> int:
    """Print the table, write it where --output says. ValueError for an unknown GPU."""
    parser = Parser(prog="effbert bench predict", allow_abbrev=False)
    parser.add_argument("--gpu", default="H200", help=f"one of {', '.join(gpu.name for gpu in GPUS)}")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.output:
        output_file(options.output)
    gpu, assumptions = gpu_named(options.gpu), Assumptions()
    missing = why_not_triton(torch.device("meta"))
    if missing:
        raise ValueError(f"bench predict counts what the fused kernels launch: {missing}")
    rows = predictions(all_cases(Sizes()), gpu, assumptions)
    print(f"Predicted, not measured: {gpu.name}, bf16, forward and backward in one CUDA graph; {assumptions}")
    print("\n".join(table(rows)))
    if options.output:
        result = {"gpu": gpu.name, "assumptions": asdict(assumptions), "rows": [asdict(row) for row in rows]}
        options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    return 0


def predictions(cases: Iterable[Case], gpu: Gpu, assumptions: Assumptions) -> list[Prediction]:
    """One row for the fused form and each rival of every case; last, the sums over the six published layers."""
    rows = [row for case in cases for row in _predict(case, gpu, assumptions)]
    layers = [row for row in rows if row.case.startswith("mlp_block layer") and "supernet" not in row.case]
    for variant in dict.fromkeys(row.variant for row in layers):
        same = [row for row in layers if row.variant == variant]
        numbers = ("microseconds", "roofline_us", "kernels", "bytes", "flops")
        rows.append(Prediction(SIX_LAYERS, variant, *(sum(getattr(row, name) for row in same) for name in numbers)))
    return rows


def table(rows: list[Prediction]) -> list[str]:
    """Lines: times, ratio of each variant to the fused form, the target where there is one, percent of the roofline."""
    fused = {row.case: row.microseconds for row in rows if row.variant == "triton"}
    wanted = {
        (target.case, target.rival.removesuffix("+graph")): target.ratio
        for target in TARGETS
        if target.rival.endswith("+graph") and target.quantity == "warm"
    }
    lines = [f"{'case':34}{'variant':10}{'us':>9}{'kernels':>9}{'MB':>9}{'roofline':>10}{'ratio':>8}{'wanted':>8}"]
    for row in rows:
        target = wanted.get((row.case, row.variant))
        lines.append(
            f"{row.case:34}{row.variant:10}{row.microseconds:9.1f}{row.kernels:9d}{row.bytes / 1e6:9.1f}"
            f"{row.roofline_us / row.microseconds:10.0%}{row.microseconds / fused[row.case]:8.2f}"
            f"{target if target else '-':>8}"
        )
    return lines


def seconds(costs: Iterable[Cost], gpu: Gpu, assumptions: Assumptions) -> float:
    """Time of kernels one after the other, bf16 products."""
    bandwidth = gpu.ceilings.bytes_per_second * assumptions.bandwidth
    rate = gpu.ceilings.flops_per_second["bf16"] * assumptions.products
    return sum(assumptions.start_us * 1e-6 + max(cost.bytes / bandwidth, cost.flops / rate) for cost in costs)


def eager_costs(run: Callable[[], object]) -> list[Cost]:
    """What each kernel costs that PyTorch would start for `run`, a function of meta tensors."""
    with _Counting() as counting:
        run()
    return counting.costs


def fused_costs(run: Callable[[], object], gpu: Gpu) -> list[Cost]:
    """The same of `run` through our ops: what each Triton kernel costs, and each of PyTorch's that is left."""
    with (
        recording(gpu.architecture, gpu.multiprocessors) as launches,
        kernels.use_backend("triton"),
        _Counting() as counting,
    ):
        run()
    return counting.costs + [launch_cost(launch) for launch in launches]


def launch_cost(launch: Launch) -> Cost:
    """Bytes of every tensor it reads or writes, once, and the FLOPs of its products."""
    given, products = launch.arguments, _PRODUCTS.get(launch.name)
    flag, names = _UNREAD.get(launch.name, (None, ()))
    unread = () if given.get(flag) else names
    moved = _bytes(value for name, value in given.items() if name not in unread)
    return Cost(moved, products(given) if products else 0)


def _predict(case: Case, gpu: Gpu, assumptions: Assumptions) -> list[Prediction]:
    roofline = case.cost(2).seconds(gpu.ceilings, "bf16") * 1e6
    setting = _MetaSetting(torch.device("meta"), torch.bfloat16, None)
    found = {"triton": fused_costs(_call(case, setting, getattr(kernels, case.op)), gpu)}
    rivals = {name: rival for name, rival in case.rivals.items() if name != "flex" and case.op != "attention"}
    found |= {name: eager_costs(_call(case, setting, rival)) for name, rival in rivals.items()}
    return [
        Prediction(
            case.name, name, seconds(costs, gpu, assumptions) * 1e6, roofline, len(costs),
            sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs),
        )
        for name, costs in found.items()
    ]  # fmt: skip


class _MetaSetting(Setting):
    def random(self, *shape, grad=True, scale=1.0):
        return torch.empty(shape, dtype=self.dtype, device=self.device, requires_grad=grad)


def _call(case: Case, setting: Setting, op: Callable) -> Callable[[], object]:
    tensors = case.tensors(setting)
    if case.parent_slices:
        for tensor in tensors[1:]:
            tensor.grad = torch.empty_like(tensor)

    wanted = [tensor for tensor in tensors if tensor.requires_grad]

    def run():
        with kernels.gradients_in_place() if case.parent_slices else contextlib.nullcontext():
            outputs = case.forward(op, tensors)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            gradients = [torch.empty_like(output) for output in outputs]
            if case.parent_slices:
                torch.autograd.backward(outputs, gradients)
            else:
                torch.autograd.grad(outputs, wanted, gradients)

    return run


class _Counting(TorchDispatchMode):
    """Notes the cost of every PyTorch op that starts a kernel: neither a view nor an allocation."""

    def __init__(self):
        super().__init__()
        self.costs: list[Cost] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not _is_free(func):
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            self.costs.append(Cost(_bytes((*args, *kwargs.values(), out)), flops))
            if (
                func._overloadpacket is torch.ops.aten.native_layer_norm_backward
            ):  # weight and bias: a kernel of their own
                self.costs.append(Cost(_bytes(args[:2]), 0))
        return out


def _is_free(func) -> bool:
    schema = func._schema
    views = any(value.alias_info and not value.alias_info.is_write for value in schema.returns)
    return views or func._overloadpacket.__name__ in ("empty", "empty_like", "empty_strided", "new_empty", "detach")


def _bytes(values) -> int:
    """Bytes of the tensors among (nested) values, each memory once; of a broadcast one, what there is of it."""
    found = {id(leaf): leaf for leaf in tree_leaves(list(values)) if isinstance(leaf, torch.Tensor)}
    return sum(_elements(tensor) * tensor.dtype.itemsize for tensor in found.values())


def _elements(tensor: torch.Tensor) -> int:
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def _layer(arguments) -> int:
    return 2 * arguments["rows"] * arguments["cols"] * arguments["depth"]


def _row_block(arguments, products: int) -> int:
    """`products` of all rows, channels and inner width."""
    return 2 * products * arguments["rows"] * arguments["channels"] * arguments["X_UNIT"] * arguments["width"]


def _pairs(arguments) -> int:
    """One product of all pairs of `projected_mse`: d is [pairs, rows, W], `packed` [W, C and padding]."""
    (pairs, rows, width), students = arguments["d"].shape, arguments.get("students", arguments.get("gradients"))
    return 2 * pairs * rows * width * students[0].shape[-1]


def _scores(arguments, gram: bool) -> int:
    query, teacher = arguments["student_query"], arguments["teacher_query"]
    (batch, heads, length, size), both = query.shape, query.shape[3] + teacher.shape[3]
    inner = length * (2 * both**2 + 2 * both * size) if gram else length**2 * (both + 2 * size)
    return 2 * batch * heads * inner


def _attention(arguments, products: int) -> int:
    """`products` with the student's head size; with a teacher, its scores too."""
    batch, heads, length, size = arguments["q"].shape
    teacher = arguments["tq"]
    columns = products * size + (0 if teacher is None else teacher.shape[3])
    return 2 * batch * heads * length**2 * columns


# FLOPs of the matrix products of a launch, from its arguments.
_PRODUCTS: dict[str, Callable[[dict], int]] = {
    "linear_fwd_kernel": _layer,
    "linear_dgrad_kernel": _layer,
    "linear_gradients_kernel": lambda given: (
        (4 + 2 * given["INPUT"]) * given["rows"] * given["inner"] * given["channels"]
    ),
    "row_block_fwd_kernel": partial(_row_block, products=2),
    "row_block_bwd_kernel": lambda given: _row_block(given, products=1 + given["FINISHES"]),
    "projected_mse_fwd_kernel": _pairs,
    "projected_mse_dgrad_kernel": _pairs,
    "projected_mse_wgrad_kernel": _pairs,
    "score_mse_direct_fwd_kernel": partial(_scores, gram=False),
    "score_mse_gram_fwd_kernel": partial(_scores, gram=True),
    "attention_fwd_kernel": partial(_attention, products=2),
    "attention_bwd_kernel": partial(_attention, products=5),
}
# Kernel -> a flag, and the tensors that it neither reads nor writes unless that flag is set.
_UNREAD: dict[str, tuple[str, tuple[str, ...]]] = {
    **{name: ("USES_X", ("x", "dx")) for name in ("linear_fwd_kernel", "linear_dgrad_kernel", "slot_bwd_kernel")},
    "linear_gradients_kernel": ("INPUT", ("w", "added", "dx")),
    "row_block_bwd_kernel": ("FINISHES", ("w1",)),
}
