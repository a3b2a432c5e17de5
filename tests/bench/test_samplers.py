"""The comparison of samplers: its space and threshold, its summary, its table of real candidates, bad input."""

import json

import numpy as np
import pytest

from effbert.architecture import Architecture, Dimensions
from effbert.bench import samplers
from effbert.bench.samplers import OBJECTIVE, ROWS, StructureIds, TableSpace, summary, synthetic, tabulated
from effbert.kernels.expression import STRUCTURES
from effbert.random import generator
from effbert.search.space import ArchitectureSpace

BASE = Architecture.uniform(STRUCTURES[0], 6)


def listed(count, layers=6, seed=0):
    """Different architectures of the coarse space with made-up values."""
    space = ArchitectureSpace("coarse", Dimensions(), 6, 15_000_000, 16_000_000)
    found = {}
    while len(found) < count:
        architecture = space.sample(generator(seed, "listed", len(found)))
        found[architecture.key] = Architecture(architecture.layers[:layers])
    return [{"architecture": str(one), "value": number / count} for number, one in enumerate(found.values())]


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_the_ids_are_those_of_the_fine_space():
    given = json.loads(OBJECTIVE.read_text())
    fine = ArchitectureSpace("fine", Dimensions(), 6, 15_000_000, 16_000_000, BASE)
    ids = StructureIds(given["costs"], 6, given["fixed"], given["band"])
    for number in range(200):
        rng = generator(0, "fine", number)
        drawn = ids.sample(rng)
        swapped = ids.mutate(drawn, rng)
        assert sum(a != b for a, b in zip(drawn, swapped, strict=True)) == 1
        for choice in (drawn, swapped, tuple(fine.encode(fine.sample(rng)).astype(int))):
            assert fine.band.low <= fine.band.total(choice) <= fine.band.high
            assert ids._fits(np.array(choice))


def test_the_threshold_is_near_the_quantile_over_all_of_the_space():
    problem = synthetic(OBJECTIVE, 20_000)
    assert problem.threshold == pytest.approx(1.8813, abs=0.05)
    assert problem.threshold_from == "the 99 % quantile of 20,000 uniform samples"


def test_a_summary_counts_from_one_and_leaves_out_what_is_not_there():
    runs = np.array([[1.0, np.nan, 3.0, 2.0], [np.nan, 0.0, 1.0, 1.0], [5.0, 0.0, 0.0, 0.0]])
    got = summary(runs, threshold=3.0)
    assert got["evaluations_to_top"] == [3, None, 1]
    assert got["evaluations_to_top_quartiles"] == [3, 3, None]
    assert got["best_so_far"]["mean"] == [None, 2.0, 3.0, 3.0]
    assert got["mean_after_80"] is None
    later = summary(np.concatenate([np.zeros((2, 80)), np.ones((2, 3))], axis=1), threshold=1.0)
    assert later["mean_after_80"] == 1.0 and later["evaluations_to_top_quartiles"] == [81, 81, 81]


def test_every_sampler_runs_on_the_synthetic_objective(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(samplers, "THRESHOLD_SAMPLES", 2_000)
    output = tmp_path / "deep" / "samplers.json"
    assert samplers.main(["--seeds", "2", "--evaluations", "24", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert list(result["samplers"]) == list(ROWS) and result["published"]["best_at_300"] == 2.53971
    curves = {name: row["best_so_far"]["mean"] for name, row in result["samplers"].items()}
    assert all(len(curve) == 24 and curve == sorted(curve) for curve in curves.values())
    assert curves["lanas"] == curves["random"] and curves["evolution"][:20] == curves["random"][:20]
    printed = capsys.readouterr().out
    assert "the 99 % quantile of 2,000 uniform samples" in printed
    assert all(name in printed for name in ROWS) and "recorded of the published sampler" in printed


def test_listed_candidates_are_all_that_is_proposed_and_failures_count_as_evaluations(tmp_path, capsys):
    entries = listed(30)
    entries[7]["value"] = None
    table = write(tmp_path / "table.json", entries)
    output = tmp_path / "out.json"
    assert samplers.main(["--table", str(table), "--seeds", "2", "--evaluations", "99", "--output", str(output)]) == 0
    result = json.loads(output.read_text())
    assert result["evaluations"] == 30 and result["threshold"] == pytest.approx(29 / 30)
    for row in result["samplers"].values():
        assert row["best_so_far"]["mean"][-1] == pytest.approx(29 / 30, abs=1e-4)
        assert all(1 <= reached <= 30 for reached in row["evaluations_to_top"])
    assert "the best 1 of the list" in capsys.readouterr().out


def test_a_mutation_is_one_of_the_nearest_listed():
    space = TableSpace([Architecture.parse(entry["architecture"]) for entry in listed(40)])
    differing = np.array([(space.encode(0) != space.encode(other)).sum() for other in range(40)])
    reached = {space.mutate(0, generator(0, number)) for number in range(200)}
    assert len(reached) == 8 and 0 not in reached
    assert max(differing[list(reached)]) <= min(differing[other] for other in range(1, 40) if other not in reached)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[", "table.json: Expecting"),
        ({"architecture": "x", "value": 1}, "needs a list of at least two"),
        ([{"architecture": str(BASE), "value": 1}] * 2, "listed twice"),
        ([{"architecture": str(BASE)}, {}], "entry 0: needs"),
        ([{"architecture": str(BASE), "value": "good"}, {}], "entry 0: value is 'good'; needs a finite number"),
        ([{"architecture": str(BASE), "value": 1}, {"architecture": "relu(", "value": 1}], "entry 1: architecture: "),
        ([{"architecture": str(BASE), "value": 1}, {"architecture": 5, "value": 1}], "entry 1: architecture: "),
        (
            [{"architecture": str(BASE), "value": 1}, {"architecture": str(Architecture(BASE.layers[:2])), "value": 1}],
            "one number of layers",
        ),
        (
            [{"architecture": str(Architecture.uniform(STRUCTURES[i], 6)), "value": None} for i in (0, 1)],
            "no entry has a value",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message) as caught:
        tabulated(write(tmp_path / "table.json", content))
    assert "\n" not in str(caught.value) and "--table" in str(caught.value)


def test_a_missing_file_and_counts_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"--objective .*none\.json.*checkout"):
        samplers.main(["--objective", str(tmp_path / "none.json")])
    with pytest.raises(ValueError, match=r"--table .*none\.json"):
        samplers.main(["--table", str(tmp_path / "none.json")])
    with pytest.raises(ValueError, match="--seeds 0 --evaluations 300: both must be at least 1"):
        samplers.main(["--seeds", "0"])
