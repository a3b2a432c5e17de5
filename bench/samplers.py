"""How many evaluations each sampler needs: equal budgets, many seeds, on fitness that costs nothing to look up.

The one idea: a search is judged by what it found after so many evaluations, so every sampler gets the same number of
them and the same seeds. Two kinds of fitness: a synthetic one over the fine space, each of six layers with one of 16
linear structures within a band of parameters; or, with --table, a list of real candidates and their values, to which
the samplers are then confined.

    effbert bench samplers --seeds 20 --evaluations 300 --output samplers.json
    effbert bench samplers --table candidates.json

Shown for each sampler: the best value after 20, 40, 80, 150 and 300 evaluations and the mean value of evaluation 81 on,
averaged over seeds, and the evaluations until the first in the top 1 % of the space, median and quartiles over seeds,
rounded up to a seed's own count. Without noise: a real fitness has some, and every sampler loses by it.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from effbert.architecture import Architecture
from effbert.bench.measure import output_file
from effbert.flags import Parser, run_alone
from effbert.kernels.expression import ENCODING_LENGTH
from effbert.random import generator
from effbert.search.sampler import make_sampler
from effbert.search.space import Space

OBJECTIVE = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "partition_objective.json"
ROWS = {
    "random": ("random", None),
    "evolution": ("evolution", None),
    "lanas": ("lanas", None),
    "lanas, initial 12": ("lanas", 12),
    "predictor": ("predictor", None),
    "released": ("released", None),
}
CHECKPOINTS = (20, 40, 80, 150, 300)
AFTER = 80
TOP = 0.01
THRESHOLD_SAMPLES = 100_000
NEIGHBOURS = 8


@dataclass(frozen=True)
class Problem:
    """A space, the value of each of its candidates (None: it failed) and the value from which it is in the top 1 %."""

    name: str
    space: Space
    value: Callable[[Any], float | None]
    threshold: float
    threshold_from: str
    published: dict | None = None


def main(arguments: list[str] | None = None) -> int:
    """Print the table, write every curve where --output says. ValueError for a file that cannot be used."""
    parser = Parser(prog="effbert bench samplers", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=20, help="how many")
    parser.add_argument("--evaluations", type=int, default=300, help="budget of each run")
    parser.add_argument("--objective", type=Path, default=OBJECTIVE, help="the synthetic fitness; a checkout has it")
    parser.add_argument("--table", type=Path, help='real candidates: [{"architecture": text, "value": number}, ...]')
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.evaluations < 1:
        raise ValueError(f"--seeds {options.seeds} --evaluations {options.evaluations}: both must be at least 1")
    if options.output:
        output_file(options.output)
    problem = tabulated(options.table) if options.table else synthetic(options.objective)
    evaluations = min(options.evaluations, getattr(problem.space, "size", options.evaluations))
    print(f"{problem.name}, {evaluations} evaluations, {options.seeds} seeds")
    print(f"top 1 %: {problem.threshold:.4f} and above, {problem.threshold_from}")
    result = compare(problem, options.seeds, evaluations)
    print("\n".join(shown(result)))
    if options.output:
        options.output.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return 0


class StructureIds:
    """The fine space by ids alone: one of the 16 structures for each layer, `fixed` plus their `costs` in `band`.

    Drawn uniformly and changed in one layer, as `ArchitectureSpace` does, without building any expression.
    """

    def __init__(self, costs: list[float], num_layers: int, fixed: float, band: tuple[float, float]):
        self.costs, self.num_layers, self.fixed, self.band = np.array(costs), num_layers, fixed, band

    def sample(self, rng: np.random.Generator) -> tuple[int, ...]:
        while True:
            ids = rng.integers(len(self.costs), size=self.num_layers)
            if self._fits(ids):
                return tuple(ids.tolist())

    def mutate(self, ids: tuple[int, ...], rng: np.random.Generator) -> tuple[int, ...]:
        while True:
            changed = np.array(ids)
            changed[rng.integers(self.num_layers)] = rng.integers(len(self.costs))
            if tuple(changed.tolist()) != ids and self._fits(changed):
                return tuple(changed.tolist())

    def encode(self, ids: tuple[int, ...]) -> np.ndarray:
        return np.array(ids, dtype=np.float32)

    def key(self, ids: tuple[int, ...]) -> str:
        return str(ids)

    def _fits(self, ids: np.ndarray) -> bool:
        return self.band[0] <= self.fixed + self.costs[ids].sum() <= self.band[1]


def synthetic(path: Path, samples: int | None = None) -> Problem:
    """The objective of `path`: a value for each layer's structure, plus one for pairs of layers.

    samples: how many the threshold comes from, THRESHOLD_SAMPLES by default.
    """
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
        costs, fixed, band = given["costs"], given["fixed"], tuple(given["band"])
        table, pairs = given["table"], given["pairs"]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"--objective {path}: {error!r}; a checkout of the project has one under tests/fixtures"
        ) from error

    def value(ids: tuple[int, ...]) -> float:
        single = sum(row[i] for row, i in zip(table, ids, strict=True))
        return single + sum(weights[ids[a] // 4][ids[b] % 4] for a, b, weights in pairs)

    space, rng = StructureIds(costs, len(table), fixed, band), generator(0, "samplers", "threshold")
    samples = samples or THRESHOLD_SAMPLES
    values = [value(space.sample(rng)) for _ in range(samples)]
    source = f"the {100 * (1 - TOP):g} % quantile of {samples:,} uniform samples"
    name = "synthetic objective over the fine space"
    return Problem(name, space, value, float(np.quantile(values, 1 - TOP)), source, given.get("published"))


class TableSpace:
    """A list of architectures as a space; a candidate is its index. A mutation is one of the NEIGHBOURS nearest.

    Distance is the number of codes that differ, of each layer's node ids.
    """

    def __init__(self, architectures: list[Architecture]):
        self.size = len(architectures)
        layers = [[layer.canonical().prefix_ids(ENCODING_LENGTH) for layer in one.layers] for one in architectures]
        self._codes = np.array(layers, dtype=np.float32).reshape(self.size, -1)

    def sample(self, rng: np.random.Generator) -> int:
        return int(rng.integers(self.size))

    def mutate(self, index: int, rng: np.random.Generator) -> int:
        distance = (self._codes != self._codes[index]).sum(axis=1)
        distance[index] = distance.max() + 1
        nearest = np.argsort(distance, kind="stable")[: min(NEIGHBOURS, self.size - 1)]
        return int(rng.choice(nearest))

    def encode(self, index: int) -> np.ndarray:
        return self._codes[index]

    def key(self, index: int) -> str:
        return str(index)


def tabulated(path: Path) -> Problem:
    """The candidates of a JSON list of {"architecture": text, "value": number, or null where it failed}."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--table {path}: {error}") from error
    if not isinstance(given, list) or len(given) < 2:
        raise ValueError(f'--table {path}: needs a list of at least two {{"architecture": text, "value": number}}')
    rows = [_row(entry, f"--table {path}, entry {number}") for number, entry in enumerate(given)]
    architectures, values = [row[0] for row in rows], [row[1] for row in rows]
    if len({architecture.key for architecture in architectures}) < len(rows):
        raise ValueError(f"--table {path}: an architecture is listed twice; keep one value for each")
    if len({len(architecture.layers) for architecture in architectures}) > 1:
        raise ValueError(f"--table {path}: architectures of one number of layers are needed")
    finite = sorted((value for value in values if value is not None), reverse=True)
    if not finite:
        raise ValueError(f"--table {path}: no entry has a value")
    top = max(1, math.ceil(TOP * len(rows)))
    name = f"{len(rows):,} listed candidates"
    return Problem(name, TableSpace(architectures), values.__getitem__, finite[top - 1], f"the best {top} of the list")


def _row(entry: Any, where: str) -> tuple[Architecture, float | None]:
    if not isinstance(entry, dict) or not {"architecture", "value"} <= entry.keys():
        raise ValueError(f'{where}: needs {{"architecture": text, "value": number}}')
    value = entry["value"]
    if value is not None and (not isinstance(value, int | float) or not math.isfinite(value)):
        raise ValueError(f"{where}: value is {value!r}; needs a finite number, or null where the candidate failed")
    try:
        return Architecture.parse(entry["architecture"]), value
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: architecture: {error}") from error


def compare(problem: Problem, seeds: int, evaluations: int) -> dict:
    """Every row of ROWS on `problem`: JSON values, the curves as means and quartiles over seeds."""
    rows = {}
    for name, (sampler, initial) in ROWS.items():
        start = time.perf_counter()
        runs = np.array([run(problem, sampler, initial, seed, evaluations) for seed in range(seeds)])
        milliseconds = 1e3 * (time.perf_counter() - start) / runs.size
        rows[name] = {"sampler": sampler, "initial": initial, "ms_an_evaluation": round(milliseconds, 2)} | summary(
            runs, problem.threshold
        )
    return {
        "problem": problem.name,
        "seeds": seeds,
        "evaluations": evaluations,
        "threshold": problem.threshold,
        "threshold_from": problem.threshold_from,
        "published": problem.published,
        "samplers": rows,
    }


def run(problem: Problem, sampler: str, initial: int | None, seed: int, evaluations: int) -> np.ndarray:
    """[evaluations] values in the order of asking, NaN where a candidate failed."""
    made, values = make_sampler(sampler, problem.space, initial), []
    for number in range(evaluations):
        candidate = made.ask(generator(seed, "samplers", number))
        values.append(problem.value(candidate))
        made.tell(candidate, values[-1])
    return np.array(values, dtype=float)


def summary(runs: np.ndarray, threshold: float) -> dict:
    """Of `runs` [seeds, evaluations]; null where a number does not exist, such as a threshold never reached."""
    best = np.fmax.accumulate(runs, axis=1)
    reached = [int(np.argmax(row)) + 1 if row.any() else math.inf for row in runs >= threshold]
    quartiles = np.quantile(reached, (0.25, 0.5, 0.75), method="higher")
    later = runs[:, AFTER:]
    return {
        "best_so_far": {
            "mean": _plain(best.mean(axis=0)),
            "quartile_1": _plain(np.quantile(best, 0.25, axis=0)),
            "quartile_3": _plain(np.quantile(best, 0.75, axis=0)),
        },
        f"mean_after_{AFTER}": _plain([np.nanmean(later)])[0] if np.isfinite(later).any() else None,
        "evaluations_to_top": _plain(reached),
        "evaluations_to_top_quartiles": _plain(quartiles),
    }


def _plain(numbers) -> list[float | None]:
    return [round(float(number), 4) if math.isfinite(number) else None for number in numbers]


def shown(result: dict) -> list[str]:
    """Lines to print."""
    at = [count for count in CHECKPOINTS if count <= result["evaluations"]]
    lines = [f"{'best after':20}" + "".join(f"{count:8d}" for count in at) + "   mean 81 on   evaluations to top 1 %"]
    for name, row in result["samplers"].items():
        best = "".join(f"{_text(row['best_so_far']['mean'][count - 1], '.3f'):>8}" for count in at)
        first, median, third = (_text(number, ".0f") for number in row["evaluations_to_top_quartiles"])
        mean = _text(row[f"mean_after_{AFTER}"], ".3f")
        lines.append(f"{name:20}{best}{mean:>13}   {median} ({first} to {third})")
    if result["published"]:
        lines.append(f"recorded of the published sampler: {result['published']}")
    return lines


def _text(number: float | None, form: str) -> str:
    return "-" if number is None else format(number, form)


if __name__ == "__main__":
    run_alone(main, "bench.samplers")
