"""Every op of the library, forward and backward, at the published shapes: fused against eager against torch.compile.

    python -m effbert.bench.kernels --output kernels.json               on a GPU: all ops, all variants
    python -m effbert.bench.kernels --output kernels.json --quick       tiny shapes, also on a CPU
    python -m effbert.bench.kernels --output kernels.json --ops mlp_block,score_mse --passes eager
    python -m effbert.bench.kernels --warm-up                           compile the fused kernels, measure nothing

The one idea: all variants of an op run side by side in one process on the same tensors, and a fused kernel whose
results are wrong gets no time. The rivals are what people run: PyTorch's own dropout and attention, products in bf16,
losses in fp32. Rows that could not be measured stay, with the reason.
"""

import argparse
import contextlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from effbert import kernels
from effbert.bench.costs import Ceilings
from effbert.bench.kernel_cases import DROPOUT, QUICK, SEED, Case, Setting, Sizes, chosen_cases
from effbert.bench.measure import (
    Spread,
    captured,
    ceilings,
    described,
    device_to_measure,
    event_time,
    extra_memory,
    kernel_time,
    machine,
    output_file,
    wall_time,
)
from effbert.files import write_atomic
from effbert.flags import Parser, run_alone
from effbert.kernels import eager

SIX_LAYERS = "mlp_block, six layers"
NO_GPU = "not available: no GPU"
LOSS_FLOOR = 1e-4  # a loss may be off by this share of itself beyond what the rule allows
FLOOR = 4.0  # outputs and gradients: by so many units of roundoff of the inputs' dtype at the largest value

NOTES = (
    "warm: calls follow each other without a wait, so a variant without graph includes what the host adds; "
    "cold: L2 is overwritten before each call; kernels: what the kernels of a call last, without gaps",
    "+graph: one call (forward and backward) captured as a CUDA graph by this benchmark, alike for all variants; "
    "max-autotune therefore runs as max-autotune-no-cudagraphs",
    "eager: PyTorch's own dropout and scaled_dot_product_attention, products in the inputs' dtype, losses in fp32; "
    "compile: torch.compile of the same; reference: effbert.kernels.eager (counter-based masks, losses all in fp32)",
    "score_mse flex: FlexAttention has no sum of squares, but with the logarithm of the squared difference as score_mod"
    " its log-sum-exp is the logarithm of a row's sum; no mask, scales rounded into Q, values of width 16",
    "triton separate: a block's stages in kernels of their own, as candidates train, in place of effbert.kernels."
    "row_block",
    "roofline: effbert.bench.costs at the ceilings measured here; percent of it: by the cold time",
)


@dataclass(frozen=True)
class Variant:
    """One way to run a case. kind: "rival" (a name of the case's), "reference", "compile" (of its first rival),
    "triton", or "separate" (the same under `kernels.few_compilations`)."""

    name: str
    kind: str
    graph: bool = False
    mode: str | None = None

    @property
    def is_fused(self) -> bool:
        """Whether it runs our kernels."""
        return self.kind in ("triton", "separate")


@dataclass(frozen=True)
class Result:
    """What came of a variant of a case; times are None where it was not measured, and `reason` says why.

    error: largest error of outputs and gradients as a share of what the rule allows (above 1 is wrong), None where the
    variant draws its own dropout. launches: kernels, copies and fills a call. extra_bytes: peak memory of a call.
    """

    case: str
    variant: str
    warm: Spread | None = None
    cold: Spread | None = None
    kernels_ms: float | None = None
    launches: float | None = None
    extra_bytes: int | None = None
    error: float | None = None
    reason: str | None = None


@dataclass(frozen=True)
class Target:
    """What has to be reached: `variant` at least `ratio` times as good as `rival` in `quantity`."""

    case: str
    variant: str
    rival: str
    ratio: float
    quantity: str = "warm"


TRITON, TRITON_GRAPH = Variant("triton", "triton"), Variant("triton+graph", "triton", graph=True)
SEPARATE = Variant("triton separate", "separate"), Variant("triton separate+graph", "separate", graph=True)
PASSES = ("eager", "compile")
MAX_AUTOTUNE = "max-autotune-no-cudagraphs"

TARGETS = (
    Target(SIX_LAYERS, "triton+graph", "eager+graph", 2.3),
    Target(SIX_LAYERS, "triton+graph", "compile max-autotune+graph", 1.4),
    Target(SIX_LAYERS, "triton+graph", "eager", 4.0),
    Target("score_mse L=128", "triton+graph", "eager+graph", 6.0),
    Target("score_mse L=512", "triton+graph", "eager+graph", 12.0),
    Target("score_mse L=512", "triton", "eager", 10.0, "memory"),
    Target("projected_mse", "triton+graph", "eager+graph", 1.8),
    Target("projected_mse", "triton+graph", "bf16+graph", 1.1),
)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print each row as it comes, keep the record up to date; 1 where a fused kernel is wrong or fails."""
    options = _options(arguments)
    sizes = QUICK if options.quick else Sizes()
    chosen = chosen_cases(sizes, options.ops)
    if options.warm_up:
        return warm_up(chosen, Setting.of(device_to_measure()))
    output_file(options.output)
    run = Run(chosen, sizes, device_to_measure())
    for result in run.results(options.passes):
        write_atomic(options.output, json.dumps(run.record(), indent=1))
        print(run.line(result), flush=True)
    print("\n" + run.summary())
    return int(run.failed)


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="effbert bench kernels", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, help="JSON file, rewritten after each row")
    parser.add_argument("--ops", help="comma-separated names; default: all")
    parser.add_argument("--quick", action="store_true", help="tiny shapes and few repeats")
    parser.add_argument(
        "--passes",
        nargs="+",
        choices=PASSES,
        default=PASSES,
        help="eager: beside eager PyTorch; compile: beside what is compiled first, which takes minutes; default: both",
    )
    parser.add_argument("--warm-up", action="store_true", help="compile the fused kernels and measure nothing")
    options = parser.parse_args(arguments)
    if bool(options.output) == options.warm_up:
        parser.error("one of --output FILE and --warm-up is needed")
    return options


def warm_up(cases: Sequence[Case], setting: Setting) -> int:
    """One call of each case's fused kernels, which compiles them, of a block's separate ones too; 1 where one fails."""
    failed = 0
    for case in cases:
        try:
            problem = Problem(case, setting)
            problem.call(problem.forward(TRITON))()
            if case.op == "mlp_block":
                with kernels.few_compilations():
                    problem.call(problem.forward(TRITON))()
        except Exception as error:
            failed = 1
            print(f"{case.name}: {_first_line(error)}", file=sys.stderr)
    return failed


class Run:
    """Cases measured on one device, and the record of them."""

    def __init__(self, cases: Sequence[Case], sizes: Sizes, device: torch.device):
        self.cases, self.sizes, self.device = cases, sizes, device
        self.setting = Setting.of(device)
        on_gpu = device.type == "cuda"
        self.machine = machine(device)
        self.ceilings: Ceilings = ceilings(device, 8192 if on_gpu else 256)
        self.rows: list[Result] = []

    def results(self, passes: Sequence[str] = PASSES) -> Iterator[Result]:
        """All rows of these passes, the quick and the most telling first, so that an early end loses the least."""
        for chosen, select in self._rounds(passes):
            for case in chosen:
                for result in measure(case, select(case), self.setting, self.sizes.repeats):
                    self.rows.append(result)
                    yield result
            yield from self._sums()

    def _rounds(self, passes: Sequence[str]) -> Iterator[tuple[Sequence[Case], Callable[[Case], list[Variant]]]]:
        """Cases, and which variants of them. With torch.compile the six layers come first, tuned as far as it goes: a
        target asks for that. Alone, this pass has its own rows of the fused kernels, so that it compares in one run."""
        if "eager" in passes:
            yield self.cases, _plain_variants
        if "compile" in passes:
            if "eager" not in passes:
                yield self.cases, lambda case: [TRITON, TRITON_GRAPH]
            tuned = partial(_compiled_variants, mode=MAX_AUTOTUNE)
            yield self.layers, tuned
            yield self.cases, partial(_compiled_variants, mode=None)
            yield [case for case in self.cases if case not in self.layers], tuned

    @property
    def layers(self) -> list[Case]:
        """Those of the six published layers that are among the cases."""
        return [case for case in self.cases if case.op == "mlp_block" and not case.parent_slices]

    def _sums(self) -> Iterator[Result]:
        """The six published layers added up, for every variant that all six have and that has no sum yet."""
        layers = [case.name for case in self.layers]
        known = {row.variant for row in self.rows if row.case == SIX_LAYERS}
        for variant in dict.fromkeys(row.variant for row in self.rows if row.case in layers):
            rows = [row for row in self.rows if row.case in layers and row.variant == variant]
            if variant in known or len(rows) < len(layers):
                continue
            result = _sum(rows, variant)
            self.rows.append(result)
            yield result

    @property
    def failed(self) -> bool:
        """Whether a row of the fused kernels is missing on a machine that has a GPU."""
        return any(row.reason and row.reason != NO_GPU and row.variant.startswith("triton") for row in self.rows)

    def roofline_ms(self, name: str) -> float:
        """Least time of a case, or of the six layers, at the ceilings of this device."""
        names = {case.name for case in self.layers} if name == SIX_LAYERS else {name}
        passes = [case.cost(self.setting.dtype.itemsize) for case in self.cases if case.name in names]
        return 1e3 * sum(cost.seconds(self.ceilings, self.setting.precision) for cost in passes)

    def percent_of_roofline(self, row: Result) -> float | None:
        """Of the cold time, or of the only one there is."""
        spread = row.cold or row.warm
        return 100 * self.roofline_ms(row.case) / spread.median_ms if spread else None

    def value(self, case: str, variant: str, quantity: str) -> float | None:
        """Median milliseconds ("warm", "cold") or extra bytes ("memory") of a row, None where it has none."""
        for row in self.rows:
            if (row.case, row.variant) == (case, variant):
                if quantity == "memory":
                    return row.extra_bytes
                spread = getattr(row, quantity)
                return spread.median_ms if spread else None
        return None

    def ratio(self, case: str, variant: str, rival: str, quantity: str = "warm") -> float | None:
        """How many times less `variant` takes than `rival`."""
        ours, theirs = (self.value(case, name, quantity) for name in (variant, rival))
        return theirs / ours if ours and theirs is not None else None

    def ratios(self) -> dict[str, dict[str, float]]:
        """For each case: every rival's warm time over that of the fused kernels, with and without graph."""
        found: dict[str, dict[str, float]] = {}
        for row in self.rows:
            ours = "triton+graph" if row.variant.endswith("+graph") else "triton"
            ratio = self.ratio(row.case, ours, row.variant)
            if row.variant != ours and ratio is not None:
                found.setdefault(row.case, {})[f"{row.variant} / {ours}"] = round(ratio, 3)
        return found

    def targets(self) -> list[dict]:
        """Each target with what was reached (None where it was not measured); no op may be slower than eager."""
        names = dict.fromkeys(case.name for case in self.cases)
        never_slower = [
            Target(name, f"triton{graph}", f"eager{graph}", 1.0) for name in names for graph in ("", "+graph")
        ]
        found = []
        for target in (*TARGETS, *never_slower):
            if target.case in names or target.case == SIX_LAYERS:
                reached = self.ratio(target.case, target.variant, target.rival, target.quantity)
                met = None if reached is None else reached >= target.ratio
                found.append(asdict(target) | {"reached": reached, "met": met})
        return found

    def record(self) -> dict:
        """All of it, for a JSON file."""
        about = {
            case.name: {
                "op": case.op,
                "shape": case.shape,
                "bytes": case.cost(self.setting.dtype.itemsize).total.bytes,
                "flops": case.cost(self.setting.dtype.itemsize).total.flops,
                "roofline_ms": self.roofline_ms(case.name),
            }
            for case in self.cases
        }
        return {
            **self.machine,
            "dtype": str(self.setting.dtype).removeprefix("torch."),
            "seed": SEED,
            "dropout": DROPOUT,
            "sizes": asdict(self.sizes),
            "notes": NOTES,
            "ceilings": described(self.ceilings),
            "cases": about,
            "rows": [asdict(row) | {"percent_of_roofline": self.percent_of_roofline(row)} for row in self.rows],
            "ratios": self.ratios(),
            "targets": self.targets(),
        }

    def line(self, row: Result) -> str:
        """One row of the table."""
        start = f"{row.case:<32} {row.variant:<28}"
        if row.reason:
            return f"{start} {row.reason}"
        times = "".join(f" {name} {_spread(spread):<20}" for name, spread in (("warm", row.warm), ("cold", row.cold)))
        more = [f"{self.percent_of_roofline(row):.1f} % of roofline"]
        if row.kernels_ms is not None:
            more.append(f"kernels {1e3 * row.kernels_ms:.1f} µs in {row.launches:.0f}")
        if row.extra_bytes is not None:
            more.append(f"{row.extra_bytes / 2**20:.1f} MiB")
        if row.error is not None:
            more.append(f"error {row.error:.2f} of allowed")
        return f"{start}{times} {', '.join(more)}"

    def summary(self) -> str:
        """Ceilings, ratios and targets as text."""
        lines = [f"{name}: {value:.4g}" for name, value in described(self.ceilings).items()]
        for case, by_rival in self.ratios().items():
            lines.append(f"{case}: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in by_rival.items()))
        for target in self.targets():
            if target["reached"] is None and target["ratio"] == 1:
                continue
            reached = "not measured" if target["reached"] is None else f"{target['reached']:.2f}"
            met = {None: "", True: "met", False: "MISSED"}[target["met"]]
            what = f"{target['case']}: {target['rival']} / {target['variant']} ({target['quantity']})"
            lines.append(f"{what} at least {target['ratio']:g}: {reached} {met}".rstrip())
        return "\n".join(lines)


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "-"
    half = 1e3 * (spread.quartile_3_ms - spread.quartile_1_ms) / 2
    return f"{1e3 * spread.median_ms:.1f} ± {half:.1f} µs"


def _sum(rows: list[Result], variant: str) -> Result:
    missing = [row for row in rows if row.reason]
    if missing:
        return Result(SIX_LAYERS, variant, reason=missing[0].reason)

    def total(name):
        values = [getattr(row, name) for row in rows]
        if None in values:
            return None
        if isinstance(values[0], Spread):
            return Spread(*(sum(getattr(value, part) for value in values) for part in Spread.__dataclass_fields__))
        return sum(values)

    times = {name: total(name) for name in ("warm", "cold", "kernels_ms", "launches")}
    errors = [row.error for row in rows if row.error is not None]
    return Result(SIX_LAYERS, variant, **times, error=max(errors, default=None))


def _plain_variants(case: Case) -> list[Variant]:
    found = [Variant(name, "rival") for name in case.rivals]
    if case.rivals["eager"] is not getattr(eager, case.op):
        found.append(Variant("reference", "reference"))
    found += [Variant(f"{name}+graph", "rival", graph=True) for name in case.rivals]
    separate = SEPARATE if case.op == "mlp_block" else ()
    return [*found, TRITON, TRITON_GRAPH, *separate]


def _compiled_variants(case: Case, mode: str | None) -> list[Variant]:
    if case.parent_slices:
        return []
    name = "compile max-autotune" if mode else "compile"
    found = [Variant(name, "compile", False, mode), Variant(f"{name}+graph", "compile", True, mode)]
    for name in () if mode else case.compiled_rivals:
        found += [Variant(name, "rival"), Variant(f"{name}+graph", "rival", graph=True)]
    return found


class Problem:
    """A case's tensors on a device, its calls, and the errors of their results against float64."""

    def __init__(self, case: Case, setting: Setting):
        self.case, self.setting = case, setting
        self.tensors = case.tensors(setting)
        self._compiled: dict[str | None, Callable] = {}
        reference = partial(case.forward, getattr(eager, case.op))
        with torch.no_grad():
            self.gradients = [self._incoming(output) for output in _outputs(reference(self.tensors))]
        self.plain = self._results(reference, self.tensors)
        self.exact = self._results(reference, [_wide(tensor) for tensor in self.tensors])

    def _incoming(self, output: torch.Tensor) -> torch.Tensor:
        if output.dim() == 0:
            return torch.ones_like(output)
        return torch.randn(output.shape, generator=self.setting.generator, device=output.device).to(output.dtype)

    def _results(self, forward: Callable, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        outputs = _outputs(forward(tensors))
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        incoming = [gradient.to(output.dtype) for gradient, output in zip(self.gradients, outputs, strict=True)]
        return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, wanted, incoming)]

    def forward(self, variant: Variant) -> Callable[[list[torch.Tensor]], object]:
        """The case's results as `variant` computes them, from its tensors."""
        if variant.kind != "compile":
            return partial(self.case.forward, _op(self.case, variant))
        if variant.mode not in self._compiled:
            torch._dynamo.reset()
            eager_forward = partial(self.case.forward, self.case.rivals["eager"])
            self._compiled[variant.mode] = torch.compile(
                lambda tensors: eager_forward(tensors), fullgraph=True, dynamic=False, mode=variant.mode
            )
        return self._compiled[variant.mode]

    def error(self, forward: Callable) -> float:
        """Largest error of outputs and gradients as a share of what is allowed: twice the reference's in the same
        dtype, plus a floor; inf where a result is not finite.
        """
        worst = 0.0
        for mine, plain, exact in zip(self._results(forward, self.tensors), self.plain, self.exact, strict=True):
            largest = exact.abs().max().item()
            floor = LOSS_FLOOR if exact.dim() == 0 else FLOOR * torch.finfo(self.setting.dtype).eps
            allowed = 2 * (plain.double() - exact).abs().max().item() + floor * largest
            error = (mine.double() - exact).abs().max().item()
            worst = max(worst, error / allowed if math.isfinite(error) else math.inf)
        return worst

    def call(self, forward: Callable) -> Callable[[], object]:
        """One forward and backward."""
        wanted = [tensor for tensor in self.tensors if tensor.requires_grad]
        if not self.case.parent_slices:
            return lambda: torch.autograd.grad(_outputs(forward(self.tensors)), wanted, self.gradients)

        def add_to_parents():
            self.tensors[0].grad = None  # x is no parameter: its gradient goes on, it is not summed
            with kernels.gradients_in_place():
                torch.autograd.backward(_outputs(forward(self.tensors)), self.gradients)

        return add_to_parents


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.detach().double().requires_grad_(tensor.requires_grad)


def _outputs(results) -> tuple[torch.Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


def measure(case: Case, variants: list[Variant], setting: Setting, repeats: int) -> Iterator[Result]:
    """One row a variant. What cannot be measured says why; a fused kernel with a wrong result is not timed."""
    try:
        problem = Problem(case, setting)
    except Exception as error:
        yield from (Result(case.name, variant.name, reason=_first_line(error)) for variant in variants)
        return
    for variant in variants:
        try:
            with kernels.few_compilations() if variant.kind == "separate" else contextlib.nullcontext():
                result = _measure(problem, variant, repeats)
            yield result
        except Exception as error:
            yield Result(case.name, variant.name, reason=_first_line(error))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _measure(problem: Problem, variant: Variant, repeats: int) -> Result:
    case, on_gpu = problem.case, problem.setting.device.type == "cuda"
    reason = unavailable(variant, problem.setting.device)
    if reason:
        return Result(case.name, variant.name, reason=reason)
    forward = problem.forward(variant)
    own_dropout = case.has_dropout and variant.kind in ("rival", "compile")
    error = None if own_dropout else problem.error(forward)
    if variant.is_fused and error > 1:
        return Result(case.name, variant.name, error=error, reason=f"wrong: error {error:.3g} times what is allowed")
    call = problem.call(forward)
    if not on_gpu:
        return Result(case.name, variant.name, wall_time(call, repeats, problem.setting.device), error=error)
    more = {}
    if variant.graph:
        call = captured(call)
    else:
        kernels_ms, launches = kernel_time(call)
        more = dict(kernels_ms=kernels_ms, launches=launches, extra_bytes=extra_memory(call))
    warm, cold = (event_time(call, repeats, cold) for cold in (False, True))
    return Result(case.name, variant.name, warm, cold, error=error, **more)


def unavailable(variant: Variant, device: torch.device) -> str | None:
    """Why a variant is not even tried."""
    return NO_GPU if device.type != "cuda" and (variant.graph or variant.is_fused) else None


def _op(case: Case, variant: Variant) -> Callable:
    if variant.is_fused:
        return partial(getattr(kernels, case.op), backend="triton")
    if variant.kind == "reference":
        return getattr(eager, case.op)
    return (case.rivals | case.compiled_rivals)[variant.name.removesuffix("+graph")]


if __name__ == "__main__":
    run_alone(main, "bench.kernels")
