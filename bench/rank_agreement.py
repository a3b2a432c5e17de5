"""How far procedures agree about the ranks of one list of candidates, each of them run at several seeds.

    effbert bench rank-agreement FILE
    effbert bench rank-agreement FILE --write

FILE is JSON with "values": procedure -> for each of its seeds the values of all candidates, in one order. The first
procedure is the one that the others are held against; what it agrees with itself, at another seed, is the ceiling.
Kendall's tau-b, the mean over pairs of seeds, since one pair says little, with 95 % of resamplings of the candidates.
--write puts what is printed into the file, as "kendall".
"""

import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from effbert.files import write_atomic
from effbert.flags import Parser, run_alone
from effbert.random import generator

DRAWS = 2000
Values = dict[str, np.ndarray]  # [seeds, candidates] by procedure


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, with --write into the file too. ValueError for a file of another form."""
    parser = Parser(prog="effbert bench rank-agreement", allow_abbrev=False)
    parser.add_argument("file", type=Path, help='JSON file with "values"')
    parser.add_argument("--write", action="store_true", help="keep the result in the file")
    options = parser.parse_args(arguments)
    record = json.loads(options.file.read_text(encoding="utf-8"))
    found = agreement(read(record, options.file))
    for name, numbers in found.items():
        print(f"{name:60} {numbers['estimate']:6.3f} ({numbers['low']:.3f} to {numbers['high']:.3f})")
    if options.write:
        kept = {name: {end: _number(value) for end, value in numbers.items()} for name, numbers in found.items()}
        write_atomic(options.file, json.dumps(record | {"kendall": kept}, indent=1) + "\n")
    return 0


def _number(value: float) -> float | None:
    """For JSON, which has no NaN."""
    return value if np.isfinite(value) else None


def read(record: object, where: Path) -> Values:
    """The values as arrays; ValueError where they are not of one list of candidates."""
    given = record.get("values") if isinstance(record, dict) else None
    if not isinstance(given, dict) or not given:
        raise ValueError(f'{where}: it should have "values": procedure -> a list of values for each of its seeds')
    try:
        values = {name: np.array(seeds, dtype=float) for name, seeds in given.items()}
    except (TypeError, ValueError):
        raise ValueError(f"{where}: each seed of a procedure should have as many values, all of them numbers") from None
    shapes = {seeds.shape[1:] for seeds in values.values()}
    if not all(np.isfinite(seeds).all() for seeds in values.values()):
        raise ValueError(f"{where}: some candidates have no value: leave them out of all procedures")
    if len(shapes) > 1 or any(len(shape) != 1 or shape[0] < 2 for shape in shapes):
        raise ValueError(f"{where}: all procedures should have values of the same candidates, of 2 at least")
    return values


def agreement(values: Values) -> dict[str, dict[str, float]]:
    """Estimate and interval of every mean tau, and of what each procedure's lacks to the ceiling."""
    count, rng = next(iter(values.values())).shape[1], generator(0, "rank agreement")
    draws = [rng.integers(count, size=count) for _ in range(DRAWS)]
    drawn = [_measured({name: seeds[:, rows] for name, seeds in values.items()}) for rows in draws]
    found = {}
    for name, estimate in _measured(values).items():
        low, high = np.nanquantile([some[name] for some in drawn], (0.025, 0.975))
        found[name] = {"estimate": estimate, "low": float(low), "high": float(high)}
    return found


def _measured(values: Values) -> dict[str, float]:
    base, *others = values
    found = {
        f"{name} with itself": _mean(itertools.combinations(seeds, 2))
        for name, seeds in values.items()
        if len(seeds) > 1
    }
    ceiling = found.get(f"{base} with itself")
    for name in others:
        both = f"{name} with {base}"
        found[both] = _mean(itertools.product(values[name], values[base]))
        if ceiling is not None:
            found[f"{both}, less {base} with itself"] = found[both] - ceiling
            found[f"means over seeds: {both}"] = _mean([(values[name].mean(0), values[base].mean(0))])
    return found


def _mean(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> float:
    """The mean tau; NaN where one side of a pair is all the same."""
    return float(np.mean([kendalltau(*pair).statistic for pair in pairs]))


if __name__ == "__main__":
    run_alone(main, "bench.rank_agreement")
