"""Finds better tiles on the GPU at hand and writes them to a file of rules, which EFFBERT_TILES then puts in force.

    effbert kernels tune --output tiles.json --minutes 30      (or python -m effbert.bench.tune)
    EFFBERT_TILES=tiles.json effbert search ...

The one idea: hill climbing (effbert.bench.climb) on the benchmark's own cases, with nothing but what users have. A tile
on trial is put in force by a file of rules and runs every case whose kernels ask for it; it is kept where all results
are right and forward and backward take at least 2 % less time. The output is rewritten after every trial, so stopping
the command loses nothing; it begins with the rules that EFFBERT_TILES names, so it can go on from an earlier file.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from effbert.bench.climb import Tile, Tuned, Unusable, rules_of, search
from effbert.bench.kernel_cases import Case, Setting, Sizes, chosen_cases
from effbert.bench.kernels import Problem, Variant
from effbert.bench.measure import captured, device_to_measure, event_time, machine
from effbert.errors import first_line
from effbert.files import write_atomic
from effbert.flags import Parser, run_alone
from effbert.kernels import aot, tiles
from effbert.kernels.dispatch import why_not_triton
from effbert.kernels.launch import architecture, multiprocessors, recording
from effbert.kernels.tiles import Question, Rule

Timer = Callable[[Callable[[], object]], float]


def main(arguments: list[str] | None = None) -> int:
    """Tune and write the file. ValueError with one line where no GPU can run the kernels, or for an unknown op."""
    options = _parser().parse_args(arguments)
    cases = chosen_cases(Sizes(), options.ops)
    device = device_to_measure()
    if device.type != "cuda":
        raise ValueError("no GPU: tiles are tuned on the GPU that they are for, and PyTorch finds none here")
    setting = Setting.of(device)
    reason = why_not_triton(device)
    if reason:
        raise ValueError(f"nothing can be tuned: {reason}")
    tune(cases, setting, options.output, 60 * options.minutes)
    return 0


def _parser() -> Parser:
    parser = Parser(prog="effbert kernels tune", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, required=True, help="file of rules: a new one, or that of EFFBERT_TILES")
    parser.add_argument("--minutes", type=float, default=30, help="no trial begins later (default: 30)")
    parser.add_argument("--ops", help="comma-separated names; default: all")
    return parser


def graph_time(call: Callable[[], object]) -> float:
    """Median milliseconds of a call, replayed as a CUDA graph: launched one by one, the host would be what is timed."""
    return event_time(captured(call), 30, cold=False).median_ms


def tune(
    cases: Sequence[Case],
    setting: Setting,
    output: Path,
    seconds: float,
    timer: Timer = graph_time,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Improve the tiles that `cases` ask for, until nothing is better or `seconds` of `clock` have passed.

    timer(call): milliseconds of a call. FileExistsError where `output` exists and is not the file of EFFBERT_TILES.
    """
    named, end = os.environ.get(tiles.ENVIRONMENT), clock() + seconds
    earlier = tiles.read_rules(named) if named else ()
    if output.exists() and not (named and output.samefile(named)):
        raise FileExistsError(f"{output} exists: choose a new --output, or go on from it: {tiles.ENVIRONMENT}={output}")
    output.parent.mkdir(parents=True, exist_ok=True)
    found: dict[Question, Tuned] = {}

    def out_of_time():
        return clock() >= end

    try:
        with tempfile.TemporaryDirectory() as folder:
            runner = Runner(setting, earlier, Path(folder), timer)
            for case in cases:
                if out_of_time():
                    runner.left_out[case.name] = "no time left"
                else:
                    runner.add(case)
            _write(output, runner, found)
            for tuned in search(runner.starts, runner.measure, out_of_time):
                if tuned.tile != found.get(tuned.question, tuned).tile:
                    print(tuned, flush=True)
                found[tuned.question] = tuned
                _write(output, runner, found)
    finally:
        if named:
            os.environ[tiles.ENVIRONMENT] = named
        else:
            os.environ.pop(tiles.ENVIRONMENT, None)
        tiles.forget()
    print(_summary(output, runner, found))


def _write(output: Path, runner: "Runner", found: dict[Question, Tuned]) -> None:
    record = runner.about | {
        "left_out": runner.left_out,
        "tuned": [
            asdict(tuned) | {"question": question._asdict(), "cases": runner.asking_cases(question)}
            for question, tuned in found.items()
        ],
        "rules": runner.rules({question: tuned.tile for question, tuned in found.items()}),
    }
    write_atomic(output, json.dumps(record, indent=1))


def _summary(output: Path, runner: "Runner", found: dict[Question, Tuned]) -> str:
    better = sum(tuned.tile != tuned.start for tuned in found.values())
    trials = sum(tuned.trials for tuned in found.values())
    unusable = sum(sum(tuned.unusable.values()) for tuned in found.values())
    lines = [f"{output}: {better} better tiles for {len(found)} of {len(runner.starts)} questions, {trials} trials"]
    lines += [f"unusable: {unusable}"] if unusable else []
    return "\n".join([*lines, *(f"left out: {name}: {reason}" for name, reason in runner.left_out.items())])


class Runner:
    """Runs cases on a device with tiles on trial, each set of them in a file of rules in `folder`.

    starts: the tile in force for each question that the cases ask. left_out: cases that are not run, with the reason.
    about: the machine and the dtype of the cases.
    """

    def __init__(self, setting: Setting, earlier: Sequence[Rule], folder: Path, timer: Timer):
        from triton.errors import TritonError

        self.setting, self.earlier, self.folder, self.timer = setting, earlier, folder, timer
        self.about = machine(setting.device) | {"dtype": str(setting.dtype).removeprefix("torch.")}
        self.architecture = architecture(setting.device)
        self.table = (*earlier, *tiles.RULES)
        self.starts: dict[Question, Tile] = {}
        self.left_out: dict[str, str] = {}
        self._asking: dict[Question, list[Problem]] = {}
        self._accepted: set[str] = set()
        self._files = 0
        self._errors = (TritonError, aot.BuildError, torch.OutOfMemoryError)

    def add(self, case: Case) -> None:
        """Run a case as things are and note what it asks; where it cannot run, note why."""
        tiles.forget()
        try:
            problem = Problem(case, self.setting)
            self._run(problem, may_spill=True)
        except (Unusable, RuntimeError, ValueError, *self._errors) as error:
            self.left_out[case.name] = first_line(error)
            return
        for question in tiles.asked():
            tile = tiles.answer(self.table, question)
            if tile:  # else the table says that this kernel is not used
                self.starts[question] = tile
                self._asking.setdefault(question, []).append(problem)

    def asking_cases(self, question: Question) -> list[str]:
        """Names of the cases whose kernels ask `question`."""
        return [problem.case.name for problem in self._asking[question]]

    def rules(self, answers: Mapping[Question, Tile]) -> list[dict]:
        """Contents of a file that puts `answers` in force and leaves the rest as it was."""
        return [asdict(rule) for rule in (*rules_of(self.starts | answers, self.table), *self.earlier)]

    def measure(self, answers: Mapping[Question, Tile], question: Question) -> float:
        """Milliseconds of all cases that ask `question`, with `answers` in force; raises Unusable."""
        self._files += 1  # answers are remembered by the name of the file
        path = self.folder / f"{self._files}.json"
        path.write_text(json.dumps({"rules": self.rules(answers)}), encoding="utf-8")
        os.environ[tiles.ENVIRONMENT] = str(path)
        try:
            return sum(self._run(problem) for problem in self._asking[question])
        except self._errors as error:
            raise Unusable(type(error).__name__) from error

    def _run(self, problem: Problem, may_spill: bool = False) -> float:
        forward = problem.forward(Variant("triton", "triton"))
        call = problem.call(forward)
        if self.architecture in aot.TARGETS:
            self._build(call, may_spill)
        if problem.error(forward) > 1:
            raise Unusable("wrong result")
        return self.timer(call)

    def _build(self, call: Callable[[], object], may_spill: bool) -> None:
        """Compile what a call launches, all of it at once and before it runs; raises Unusable where registers spill."""
        with recording(self.architecture, multiprocessors(self.setting.device)) as launches:
            call()
        keys = [aot.compilation_key(launch, self.architecture) for launch in launches]
        new = [launch for launch, key in zip(launches, keys, strict=True) if key not in self._accepted]
        built = aot.build_all(new, self.architecture)
        if not may_spill and any(one.stack for one, _ in built.values()):
            raise Unusable("spills")
        self._accepted.update(keys)


if __name__ == "__main__":
    run_alone(main, "bench.tune")
