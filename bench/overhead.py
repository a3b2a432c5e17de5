"""What an eager call costs on the host, forward and backward: our ops called directly, and as torch.library has them.

The one idea: nothing is computed. On tiny tensors of a CPU, with kernels noted down instead of started, what is left of
a call is the checks, the choice of a backend, the autograd function and every allocation: all that Python does but
Triton's own launcher. "registered" is the same op through the dispatcher, as torch.compile and fake tensors see it;
"eager" is PyTorch's form of the same tensors, its arithmetic included, for comparison.

    effbert bench overhead
    effbert bench overhead --output overhead.json --repeats 200
"""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from effbert import kernels
from effbert.bench.kernel_cases import QUICK, Case, Setting, all_cases
from effbert.bench.measure import machine, output_file, wall_time
from effbert.flags import Parser, run_alone
from effbert.kernels import dispatch, library
from effbert.kernels.launch import recording

CPU = torch.device("cpu")


def main(arguments: list[str] | None = None) -> int:
    """Print the table, write it where --output says. ValueError for bad arguments and without Triton."""
    parser = Parser(prog="effbert bench overhead", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=100, help="calls of each variant; default: 100")
    options = parser.parse_args(arguments)
    if options.repeats < 2:
        raise ValueError(f"--repeats {options.repeats}: a spread needs at least 2")
    missing = dispatch.why_not_triton(torch.device("meta"))
    if missing:
        raise ValueError(f"bench overhead calls the fused ops: {missing}")
    if options.output:
        output_file(options.output)
    rows = [row for case in all_cases(QUICK) if not case.parent_slices for row in measure(case, options.repeats)]
    print("\n".join(table(rows)))
    if options.output:
        options.output.write_text(json.dumps({**machine(CPU), "rows": rows}, indent=1), encoding="utf-8")
    return 0


def measure(case: Case, repeats: int) -> list[dict]:
    """One row a variant: milliseconds of a call and, of ours, how many kernels it would start."""
    op, setting = getattr(kernels, case.op), Setting.of(CPU)
    with recording("sm_90") as launches, patch.object(dispatch, "_why_not_on", lambda device: None):
        ours = call(case, partial(op, backend="triton"), setting)
        ours()
        count = len(launches)
        direct = wall_time(ours, repeats, CPU)
        with patch.object(library, "_PLAIN", ()):  # no tensor is plain enough for the direct path
            registered = wall_time(ours, repeats, CPU)
    eager = wall_time(call(case, case.rivals["eager"], setting), repeats, CPU)
    found = (("direct", direct, count), ("registered", registered, count), ("eager", eager, None))
    return [{"case": case.name, "variant": name, "launches": number, **asdict(time)} for name, time, number in found]


def call(case: Case, op: Callable, setting: Setting) -> Callable[[], object]:
    """One forward and backward of a case."""
    tensors = case.tensors(setting)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]

    def run():
        outputs = case.forward(op, tensors)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return torch.autograd.grad(outputs, wanted, [torch.empty_like(output) for output in outputs])

    return run


def table(rows: list[dict]) -> list[str]:
    """Microseconds of a call: median, half the distance of the quartiles."""
    lines = [f"{'case':34}{'variant':12}{'us':>9}{'+-':>7}{'launches':>10}"]
    for row in rows:
        half = 1e3 * (row["quartile_3_ms"] - row["quartile_1_ms"]) / 2
        count = "-" if row["launches"] is None else row["launches"]
        lines.append(f"{row['case']:34}{row['variant']:12}{1e3 * row['median_ms']:9.1f}{half:7.1f}{count:>10}")
    return lines


if __name__ == "__main__":
    run_alone(main, "bench.overhead")
