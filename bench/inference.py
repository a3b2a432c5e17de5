"""How fast small BERTs answer: ours beside BERT-base and its rivals, runtime by runtime, batch by batch.

    effbert bench inference --output inference.json --plot inference.svg
    effbert bench inference --models efficientbert bert-base --runtimes fp32 --batch_sizes 1 --lengths 128

The one idea: what a machine does meanwhile must hit all models alike. For each runtime, length and batch the models
take turns, round after round; a ratio is the median over rounds of BERT-base's time over the model's in the same round.
Each has a process of its own, whose peak of memory is the model's (effbert.bench.contenders). Memory beyond what the
libraries hold and the file have ratios too, BERT-base's over the model's at the same shape. A shape whose models are
all measured is kept in --output, so the same command goes on where it was stopped, and another one adds to it.

Weights are random, tokens are all real. A row without a time says why: it failed, its outputs were not finite, or one
call would take longer than --longest, judged by its last shape. The file is that of the model as it is saved in the
runtime's type, without a tokenizer. "gpu-..." runtimes have not been tried yet.
"""

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from effbert.bench.contenders import BASE, MODELS, RUNTIMES, Worker, default_runtimes, write_files, writer
from effbert.bench.measure import Spread, ceilings, cpu_name, described, machine, output_file
from effbert.files import write_atomic
from effbert.flags import Parser, run_alone
from effbert.search.figures import bars

SLOW_MS, SLOW_ROUNDS = 5000.0, 2  # a call that takes this long needs no warm-up, and gets so many rounds
STYLE = (
    "<style>text{font:10px sans-serif}.tick{text-anchor:end}.bar{fill:#9aa5b1}.ours{fill:#2563a8}</style>"
    '<rect width="100%" height="100%" fill="white"/>'
)


def main(arguments: list[str] | None = None) -> int:
    """Measure what is missing, write --output after each shape, print the table. ValueError for a file of another
    machine's results."""
    options = _options(arguments)
    settings = {"small": options.small, "threads": options.threads}
    torch.set_num_threads(options.threads)
    record = opened(options.output, settings)
    with tempfile.TemporaryDirectory() as scratch, writer() as pool:
        for runtime in options.runtimes:
            measure_runtime(runtime, options, record, Path(scratch), pool)
    print("\n".join(table(record["rows"])))
    if options.plot:
        write_atomic(options.plot, figure(record["rows"]))
    return 0


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="effbert bench inference", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--runtimes", nargs="+", choices=RUNTIMES, default=default_runtimes())
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--lengths", nargs="+", type=int, default=[32, 128, 384], help="in tokens, at most 512")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each model at a shape")
    parser.add_argument("--seconds", type=float, default=0.3, help="of calls in a turn; one call at least")
    parser.add_argument("--longest", type=float, default=60.0, help="seconds that a call may take")
    parser.add_argument("--small", action="store_true", help="narrow models, to try the command out")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--plot", type=Path, help="SVG file: how many times as fast as BERT-base")
    options = parser.parse_args(arguments)
    for name, low, high in (("batch_sizes", 1, None), ("lengths", 1, 512), ("threads", 1, None), ("rounds", 2, None)):
        given = getattr(options, name)
        for value in given if isinstance(given, list) else [given]:
            if value < low or (high is not None and value > high):
                above = f" and at most {high}" if high else ""
                raise ValueError(f"--{name} {value}: must be at least {low}{above}")
    for name in ("output", "plot"):
        path = getattr(options, name)
        if path is not None:
            output_file(path)
    beside = {*options.models} - {BASE}
    measured_before = options.output and options.output.exists()
    if options.plot and not measured_before and not (BASE in options.models and beside):
        raise ValueError(f"--plot draws other models beside {BASE}: --models must name both")
    return options


def opened(path: Path | None, settings: dict) -> dict:
    """The results of `path` so far, or an empty record; ValueError where they are another machine's or of other models.

    Where there is no path they are nowhere but in memory.
    """
    record = {"settings": settings, **environment(), "rows": []}
    if path is None or not path.exists():
        return record | {"path": path, "ceilings": described(ceilings(torch.device("cpu"), 384))}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        for name in ("settings", "device", "cpu", "versions"):
            if known[name] != record[name]:
                raise ValueError(f"its {name} {known[name]} and now {record[name]}")
        return known | {"path": path}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"--output {path} cannot be added to ({error}): name another file") from error


def environment() -> dict:
    """The machine and the versions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = machine(device)
    del found["threads"]
    for package in ("transformers", "onnx", "onnxruntime"):
        try:
            found["versions"][package] = version(package)
        except PackageNotFoundError:
            found["versions"][package] = None
    return found | {"cpu": _cpu()}


def _cpu() -> dict:
    return {
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
    }


def measure_runtime(runtime: str, options: argparse.Namespace, record: dict, scratch: Path, pool: Executor) -> None:
    """All shapes of a runtime that are not in the record yet, small ones first; the record is written after each."""
    shapes = sorted(
        ((b, n) for b in options.batch_sizes for n in options.lengths),
        key=lambda shape: (shape[0] * shape[1], shape[0]),
    )
    missing = [shape for shape in shapes if not set(options.models) <= _measured(record, runtime, *shape)]
    if not missing:
        return
    names = sorted(
        set(options.models).union(*(_measured(record, runtime, *shape) for shape in missing)), key=list(MODELS).index
    )
    with ExitStack() as stack:
        entries = [Entry(name) for name in names]
        for entry in entries:
            entry.try_to(lambda entry=entry: entry.start(pool, runtime, options, scratch))
            stack.callback(entry.close)
        for batch, length in missing:
            load = os.getloadavg()[0]
            run_rounds(entries, batch, length, options)
            rows = [entry.row(runtime, batch, length) | {"load": load} for entry in entries]
            with_ratios(rows, entries)
            record["rows"] = [row for row in record["rows"] if _key(row) != (runtime, batch, length)] + rows
            save(record)
            print(f"{runtime} {batch} x {length}: " + ", ".join(map(_brief, rows)), flush=True)


def _key(row: dict) -> tuple:
    return row["runtime"], row["batch_size"], row["length"]


def _measured(record: dict, runtime: str, batch: int, length: int) -> set[str]:
    """Models with a row at this shape; none where no row has a time, so that what was missing then is tried again."""
    rows = [row for row in record["rows"] if _key(row) == (runtime, batch, length)]
    return {row["model"] for row in rows} if any("median_ms" in row for row in rows) else set()


@dataclass
class Entry:
    """A model in the runtime at hand. rounds: milliseconds of the calls of each turn at the shape at hand. fault: why
    it has none, for good; skipped: why it has none at this shape."""

    name: str
    worker: Worker | None = None
    files: dict = field(default_factory=dict)
    rounds: list[list[float]] = field(default_factory=list)
    memory: dict = field(default_factory=dict)
    fault: str | None = None
    skipped: str | None = None
    ms_a_token: float = 0.0
    expected: float = 0.0

    def try_to(self, action) -> None:
        """Do it; what it raises becomes the fault."""
        try:
            action()
        except Exception as error:  # a row says why, and the others go on
            self.fault, self.rounds = " ".join(str(error).split()) or type(error).__name__, []

    def start(self, pool: Executor, runtime: str, options: argparse.Namespace, scratch: Path) -> None:
        """Write its file and start its process."""
        self.files = pool.submit(write_files, self.name, runtime, options.small, scratch).result()
        self.worker = Worker(self.name, runtime, options.small, options.threads, scratch)

    def begin(self, batch: int, length: int, options: argparse.Namespace, compiled: bool) -> None:
        """Forget the last shape, and warm up where a call is short or must be compiled."""
        self.rounds, self.memory, self.skipped = [], {}, None
        self.expected = self.ms_a_token * batch * length
        if self.fault or self._too_slow(batch, length, options.longest):
            return
        if compiled or self.expected < SLOW_MS:
            self.worker.timed(batch, length, 0.0)

    def _too_slow(self, batch: int, length: int, longest: float) -> bool:
        if self.expected > 1e3 * longest:
            self.skipped = f"about {self.expected / 1e3:.0f} s a call, above --longest {longest:g}"
        return self.skipped is not None

    def turn(self, batch: int, length: int, seconds: float) -> None:
        """One round."""
        if self.expected < SLOW_MS or len(self.rounds) < SLOW_ROUNDS:
            self.rounds.append(self.worker.timed(batch, length, seconds))
            self.memory = self.worker.memory()
            self.ms_a_token = statistics.median(self.rounds[-1]) / (batch * length)

    def row(self, runtime: str, batch: int, length: int) -> dict:
        """Its row for a record; times in milliseconds."""
        kind = RUNTIMES[runtime]
        found = {"model": self.name, "runtime": runtime, "batch_size": batch, "length": length}
        found |= {"dtype": "int8" if kind.int8 else str(kind.dtype).removeprefix("torch."), **self.files}
        why = self.fault or self.skipped
        if why:
            return found | {"not measured": why}
        spread = Spread.of([time for turn in self.rounds for time in turn])
        calls = sum(map(len, self.rounds))
        speed = {"sequences_per_second": 1e3 * batch / spread.median_ms}
        return found | asdict(spread) | speed | {"calls": calls, "rounds": len(self.rounds), **self.memory}

    def close(self) -> None:
        """End its process."""
        if self.worker is not None:
            self.worker.close()


def run_rounds(entries: Sequence[Entry], batch: int, length: int, options: argparse.Namespace) -> None:
    """All models in turns, `rounds` times."""
    for entry in entries:
        compiled = bool(entry.worker) and entry.worker.compiled
        entry.try_to(lambda entry=entry, compiled=compiled: entry.begin(batch, length, options, compiled))
    for _ in range(options.rounds):
        for entry in entries:
            if not entry.fault and not entry.skipped:
                entry.try_to(lambda entry=entry: entry.turn(batch, length, options.seconds))


def with_ratios(rows: Sequence[dict], entries: Sequence[Entry]) -> None:
    """Add to each row how many times as fast as BERT-base its model was, and how many times as small its memory and its
    file, each where both are known."""
    turns = {entry.name: [statistics.median(turn) for turn in entry.rounds] for entry in entries}
    base_row = next((row for row in rows if row["model"] == BASE), {})
    for row in rows:
        pairs = list(zip(turns.get(BASE, []), turns[row["model"]], strict=False))
        row["times_base"] = statistics.median(base / own for base, own in pairs) if pairs else None
        row["times_base_memory"] = _ratio(_memory(base_row), _memory(row))
        row["times_base_file"] = _ratio(base_row.get("file_bytes"), row.get("file_bytes"))


def _memory(row: dict) -> int | None:
    """Bytes at the peak beyond what the libraries hold."""
    return row["peak_memory"] - row["memory_without_model"] if "peak_memory" in row else None


def _ratio(base: int | None, own: int | None) -> float | None:
    """None where one is unknown, or so small that the system saw none of it."""
    return base / own if base and own and min(base, own) > 0 else None


def save(record: dict) -> None:
    """Write the record to its file, where it has one."""
    if record["path"] is not None:
        known = {name: value for name, value in record.items() if name != "path"}
        write_atomic(record["path"], json.dumps(known, indent=1) + "\n")


def _brief(row: dict) -> str:
    return f"{row['model']} {_cell(row)}"


def _cell(row: dict | None) -> str:
    if row is None or "median_ms" not in row:
        return "-"
    digits = 1 if row["median_ms"] < 100 else 0
    spread = (row["quartile_3_ms"] - row["quartile_1_ms"]) / 2
    return _with_ratio(f"{row['median_ms']:.{digits}f} ±{spread:.{digits}f}", row["times_base"])


def _with_ratio(text: str, ratio: float | None) -> str:
    return text if ratio is None else f"{text} ({ratio:.1f})"


def table(rows: Sequence[dict]) -> list[str]:
    """For each runtime its models: ms a call with half the distance of the quartiles, file, most memory of all shapes
    beyond what the libraries hold; each with BERT-base's over it."""
    lines = []
    for runtime in (name for name in RUNTIMES if any(row["runtime"] == name for row in rows)):
        here = [row for row in rows if row["runtime"] == runtime]
        shapes = sorted({(row["batch_size"], row["length"]) for row in here})
        title = f"ms a call ± half the quartiles' distance (times as fast as {BASE}) at batch x length"
        title += "; file and memory (times as small)"
        lines += ["", f"{RUNTIMES[runtime].what}: {title}"]
        heads = "".join(f"{f'{batch}x{length}':>19}" for batch, length in shapes)
        lines.append(f"{'':28}{heads}{'file MB':>14}{'memory MiB':>13}")
        reasons = {}
        for name in (name for name in MODELS if any(row["model"] == name for row in here)):
            own = {(row["batch_size"], row["length"]): row for row in here if row["model"] == name}
            cells = "".join(f"{_cell(own.get(shape)):>19}" for shape in shapes)
            lines.append(f"{name:28}{cells}{_file_cell(own.values()):>14}{_memory_cell(own.values()):>13}")
            reasons |= {(name, row["not measured"]): None for row in own.values() if "not measured" in row}
        lines += [f"  {name} not measured: {reason}" for name, reason in reasons]
    return lines[1:]


def _file_cell(rows: Iterable[dict]) -> str:
    """All shapes have one file; only those where BERT-base was measured too have a ratio."""
    known = (row for row in rows if "file_bytes" in row)
    row = max(known, key=lambda row: row.get("times_base_file") or 0, default=None)
    return _with_ratio(f"{row['file_bytes'] / 1e6:.1f}", row.get("times_base_file")) if row else "-"


def _memory_cell(rows: Iterable[dict]) -> str:
    """Of the shape that took most."""
    row = max((row for row in rows if "peak_memory" in row), key=_memory, default=None)
    return _with_ratio(f"{_memory(row) / 2**20:.0f}", row.get("times_base_memory")) if row else "-"


def figure(rows: Sequence[dict]) -> str:
    """Bars of how many times as fast as BERT-base each model is in each runtime, at the shape nearest to 1 x 128."""
    measured = [row for row in rows if row.get("times_base")]
    if not measured:
        raise ValueError(f"--plot: nothing was measured beside {BASE}")
    batch, length = min(
        {(row["batch_size"], row["length"]) for row in measured}, key=lambda shape: (shape[0], abs(shape[1] - 128))
    )
    drawn = []
    for row in measured:
        if (row["batch_size"], row["length"]) == (batch, length) and row["model"] != BASE:
            kind = "ours" if row["model"].startswith("efficientbert") else "other"
            value = f"{row['times_base']:.1f} times, {row['median_ms']:.1f} ms"
            drawn.append((f"{row['model']}, {row['runtime']}", value, [(row["times_base"], kind)]))
    title = f"Times as fast as {BASE} in the same runtime, batch {batch}, length {length}"
    svg = bars("inference", title, "Median of rounds in which all models took turns.", drawn)
    return svg.replace(">", f">{STYLE}", 1)


if __name__ == "__main__":
    run_alone(main, "bench.inference")
