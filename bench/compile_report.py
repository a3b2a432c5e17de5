"""What the fused kernels cost on GPUs that are not here: each is compiled for them, and the numbers are judged.

The one idea: what an op launches is noted down instead of started (effbert.bench.meta_cases), and exactly that is
compiled ahead of time. A spill, a low-precision matrix product without matrix instructions, a block that does not fit
on chip or a kernel that does not compile fails the report; asynchronous products that wait for each other are told.

    effbert bench compile-report                      all architectures and types, published and drawn expressions
    effbert bench compile-report --reduced            a small part of it, in a minute or two
    effbert bench compile-report --candidates 1000    how many compilations a search needs, and how long one takes
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from effbert import kernels
from effbert.architecture import Dimensions
from effbert.bench.hardware import GPUS, LIMITS, blocks_per_multiprocessor
from effbert.bench.measure import output_file
from effbert.bench.meta_cases import PRECISIONS, Case, cases, mlp_cases, record
from effbert.flags import Parser, run_alone
from effbert.kernels import aot
from effbert.kernels.expression import STRUCTURES, Expression
from effbert.kernels.launch import Launch
from effbert.search.space import ArchitectureSpace


def main(arguments: list[str] | None = None) -> int:
    """Print the report, write it where --output says; 1 where a kernel fails it. ValueError for bad arguments."""
    options = _parser().parse_args(arguments)
    if options.candidates is not None:
        architectures, dtypes = ("sm_90",), ("autocast",)
    elif options.reduced:
        architectures, dtypes = ("sm_90", "gfx942"), ("bf16",)
    else:
        architectures, dtypes = tuple(aot.TARGETS), tuple(PRECISIONS)
    architectures = _chosen(options.architectures, aot.TARGETS, "architecture") or architectures
    dtypes = _chosen(options.dtypes, PRECISIONS, "dtype") or dtypes
    if options.output:
        output_file(options.output)
    if options.candidates is not None:
        result = search_compilations(options.candidates, architectures[0], dtypes[0])
        text, failed = json.dumps(result, indent=1), False
    else:
        result = report(cases(options.expressions, options.reduced), architectures, dtypes)
        text, failed = table(result), bool(result["problems"])
    if options.output:
        options.output.write_text(json.dumps(result, indent=1), encoding="utf-8")
    print(text)
    return int(failed)


def _parser() -> Parser:
    parser = Parser(prog="effbert bench compile-report", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--reduced", action="store_true", help="sm_90 and gfx942, bf16, few expressions")
    parser.add_argument("--architectures", help=f"comma-separated, of {', '.join(aot.TARGETS)}; default: all")
    parser.add_argument("--dtypes", help=f"comma-separated, of {', '.join(PRECISIONS)}; default: all")
    parser.add_argument(
        "--expressions", type=_count, help="drawn ones beside the published six; default: 24, 0 if reduced"
    )
    parser.add_argument("--candidates", type=_count, help="instead: count what a search of so many compiles")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of things")
    return int(text)


def _chosen(text: str | None, known: Iterable[str], what: str) -> list[str]:
    names = [] if text is None else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}: one of {', '.join(known)}")
    return names


def report(cases: list[Case], architectures: Sequence[str], dtypes: Sequence[str]) -> dict:
    """Compile what the cases launch: {"cases": op rows, "kernels": one row a compilation, "problems": lines, ...}."""
    found: dict[str, list] = {"cases": [], "kernels": [], "problems": []}
    for architecture in architectures:
        for dtype in dtypes:
            begun = time.perf_counter()
            rows = _compile(cases, architecture, dtype, found)
            seconds = time.perf_counter() - begun
            print(f"{architecture} {dtype}: {rows} compilations, {seconds:.0f} s", file=sys.stderr)
    gpus = [asdict(gpu) for gpu in GPUS if gpu.architecture in architectures]
    limits = {architecture: asdict(LIMITS[architecture]) for architecture in architectures}
    return {"versions": versions(), "gpus": gpus, "limits": limits, **found}


def versions() -> dict[str, str]:
    """Of what decides the numbers."""
    import triton

    return {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}


def _compile(cases: list[Case], architecture: str, dtype: str, found: dict[str, list]) -> int:
    launches = [(case, launch) for case in cases for launch in record(case, architecture, dtype)]
    failures: list[aot.BuildError] = []
    built = aot.build_all([launch for _, launch in launches], architecture, failures=failures)
    found["problems"] += [f"{failure} ({dtype})" for failure in failures]
    users: dict[str, list[Case]] = {}
    kernels_of: dict[int, Counter] = {}
    for case, launch in launches:
        key = aot.compilation_key(launch, architecture)
        users.setdefault(key, []).append(case)
        kernels_of.setdefault(id(case), Counter())[key] += 1
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        serialised = dict(zip(built, pool.map(aot.serialises, (one for one, _ in built.values())), strict=True))
    for key, (one, _) in built.items():
        row = kernel_row(one, dtype, users[key], serialised[key])
        found["kernels"].append(row)
        found["problems"] += problems(row)
    found["cases"] += [case_row(case, architecture, dtype, kernels_of.get(id(case), Counter())) for case in cases]
    return len(built)


def kernel_row(built: aot.Built, dtype: str, users: list[Case], serialised: bool = False) -> dict:
    """One compilation: the compiler's numbers and what they let a multiprocessor hold at once. serialised: as
    `aot.serialises` finds it."""
    blocks = blocks_per_multiprocessor(built)
    return {
        "architecture": built.architecture,
        "dtype": dtype,
        "kernel": built.name,
        "ops": sorted({case.op for case in users}),
        "first_case": f"{users[0].op} {users[0].shape} {users[0].expression}".strip(),
        "registers": built.registers,
        "stack": built.stack,
        "shared": built.shared,
        "tensor_memory": built.tensor_memory,
        "warps": built.warps,
        "blocks_per_multiprocessor": blocks,
        "warps_per_multiprocessor": blocks * built.warps,
        "products": list(built.products),
        "matrix_instructions": list(built.matrix_instructions),
        "serialised": serialised,
        "seconds": round(built.seconds, 3),
        "key": built.key,
    }


def problems(row: dict) -> Iterator[str]:
    """What makes a kernel fail the report, a line each."""
    where = f"{row['kernel']} ({row['architecture']} {row['dtype']}, {row['first_case']})"
    if row["stack"]:
        yield f"{where}: {row['stack']} bytes spilled"
    products = [product for product in row["products"] if product != "fp32"]
    if products and not row["matrix_instructions"]:
        yield f"{where}: {', '.join(products)} products without matrix instructions"
    if not row["blocks_per_multiprocessor"]:
        needs = f"{row['registers']} registers, {row['shared']} bytes shared, {row['warps']} warps"
        yield f"{where}: a block does not fit ({needs})"


def case_row(case: Case, architecture: str, dtype: str, launches: Counter) -> dict:
    """One op: its least bytes and FLOPs, forward and backward, and their time on each GPU of the architecture."""
    passes = case.cost(PRECISIONS[dtype].data.itemsize)
    return {
        "architecture": architecture,
        "dtype": dtype,
        "op": case.op,
        "shape": case.shape,
        "expression": case.expression,
        "launches": sum(launches.values()),
        "kernels": dict(launches),
        "bytes": passes.total.bytes,
        "flops": passes.total.flops,
        "roofline_us": {
            gpu.name: round(1e6 * passes.seconds(gpu.ceilings, PRECISIONS[dtype].rate), 2)
            for gpu in GPUS
            if gpu.architecture == architecture
        },
    }


def table(result: dict) -> str:
    """The report as text: ops with their costs, kernels by op with ranges over their compilations, then what fails."""
    lines = _columns(
        ("arch", "dtype", "op", "shape", "cases", "launches", "MB", "GFLOP", "roofline us"), _op_lines(result["cases"])
    )
    lines.append("")
    header = ("arch", "dtype", "kernel", "built", "regs", "stack", "shared", "blocks", "warps", "matrix", "ops")
    lines += _columns(header, _kernel_lines(result["kernels"]))
    count = len(result["kernels"])
    lines.append("")
    waiting = [row for row in result["kernels"] if row["serialised"]]
    if waiting:
        lines.append(f"products that wait for each other, in {len(waiting)} compilations:")
        lines += [f"{row['kernel']} ({row['architecture']} {row['dtype']}, {row['first_case']})" for row in waiting]
    if result["problems"]:
        lines += [f"problems: {len(result['problems'])}, in {count} compilations", *result["problems"]]
    else:
        lines.append(f"{count} compilations: no spills, matrix instructions in every low-precision product, all fit")
    return "\n".join(lines)


def _op_lines(rows: list[dict]) -> Iterator[tuple]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["architecture"], row["dtype"], row["op"], row["shape"]), []).append(row)
    for key, group in groups.items():
        roofline = ", ".join(f"{gpu} {_number(time)}" for gpu, time in group[0]["roofline_us"].items())
        sizes = f"{group[0]['bytes'] / 1e6:.1f}", f"{group[0]['flops'] / 1e9:.1f}"
        yield (*key, len(group), _range(row["launches"] for row in group), *sizes, roofline)


def _kernel_lines(rows: list[dict]) -> Iterator[tuple]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["architecture"], row["dtype"], row["kernel"]), []).append(row)
    columns = ("registers", "stack", "shared", "blocks_per_multiprocessor", "warps_per_multiprocessor")
    for key, group in groups.items():
        matrix, ops = (
            ", ".join(sorted({name for row in group for name in row[column]}))
            for column in ("matrix_instructions", "ops")
        )
        ranges = (_range(row[column] for row in group) for column in columns)
        yield (*key, len(group), *ranges, matrix or "-", ops)


def _range(values: Iterable[int]) -> str:
    values = sorted(values)
    return str(values[0]) if values[0] == values[-1] else f"{values[0]}-{values[-1]}"


def _number(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _columns(header: tuple, rows: Iterable[tuple]) -> list[str]:
    rows = [tuple(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def search_compilations(count: int, architecture: str = "sm_90", dtype: str = "autocast", timed: int = 24) -> dict:
    """How many compilations `count` drawn 6-layer candidates need for their MLP blocks, and the seconds of one.

    Candidates come from the coarse stage's sampler with the published band. {"compilations": {candidates: how many} as
    a search trains them, under `kernels.few_compilations`, "with_row_blocks": the same where the kernels of whole rows
    are used too, "by_kernel": {name: how many} of the former, "seconds": median over `timed` of these, drawn, compiled
    anew on one thread}.
    """
    space = ArchitectureSpace("coarse", Dimensions(), 6, 15_000_000, 16_000_000)
    rng = np.random.default_rng(0)
    first: dict[str, Launch] = {}
    more: set[str] = set()
    seen: set[str] = set()
    growth, both = {}, {}
    marks = {1, count, *(10**power for power in range(1, 7))}
    for number in range(1, count + 1):
        for expression in space.sample(rng).layers:
            text = str(expression.with_structure(STRUCTURES[expression.structure.divisor - 1]))
            if text not in seen:
                seen.add(text)
                block = mlp_cases(Expression.parse(text))[1]
                with kernels.few_compilations():
                    separate = record(block, architecture, dtype)
                for launch in separate:
                    first.setdefault(aot.compilation_key(launch, architecture), launch)
                more |= {aot.compilation_key(launch, architecture) for launch in record(block, architecture, dtype)}
        if number in marks:
            growth[number], both[number] = len(first), len(more | first.keys())
    names = Counter(launch.name for launch in first.values())
    sample = rng.permutation(sorted(first))[:timed]
    seconds = [aot.build(first[key], architecture, anew=True).seconds for key in sample]
    return {
        "versions": versions(),
        "architecture": architecture,
        "dtype": dtype,
        "candidates": count,
        "distinct_mlps": len(seen),
        "compilations": growth,
        "with_row_blocks": both,
        "by_kernel": dict(names.most_common()),
        "timed": len(seconds),
        "seconds": {"median": statistics.median(seconds), "longest": max(seconds)} if seconds else {},
    }


if __name__ == "__main__":
    run_alone(main, "bench.compile_report")
