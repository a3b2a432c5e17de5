"""What a call costs on the host is measured of every op, on both paths, and nothing is started for it."""

import json

import pytest

from effbert.bench import overhead
from effbert.bench.kernel_cases import QUICK, all_cases
from effbert.kernels import dispatch, launch, library


def test_every_op_is_called_directly_and_as_registered_and_starts_nothing(tmp_path, monkeypatch, capsys):
    class Started:
        def __getitem__(self, grid):
            pytest.fail("a kernel was started")

    asked = []
    registered = library.FusedOp.__call__

    def noted(self, *args):
        asked.append(library._PLAIN)
        return registered(self, *args)

    monkeypatch.setattr(library.FusedOp, "__call__", noted)
    monkeypatch.setattr(launch, "_on_device_of", lambda args: Started()[0])
    output = tmp_path / "deep" / "overhead.json"
    assert overhead.main(["--repeats", "2", "--output", str(output)]) == 0
    record = json.loads(output.read_text())
    cases = [case.name for case in all_cases(QUICK) if not case.parent_slices]
    found = [(row["case"], row["variant"]) for row in record["rows"]]
    assert found == [(case, variant) for case in cases for variant in ("direct", "registered", "eager")]
    assert all(
        row["median_ms"] > 0 and (row["launches"] or 0) >= 2 * (row["variant"] != "eager") for row in record["rows"]
    )
    assert () in asked and library._PLAIN in asked and record["versions"]["torch"]
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(found)


def test_bad_arguments_and_a_missing_triton_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match=r"^--repeats 1: a spread needs at least 2$"):
        overhead.main(["--repeats", "1"])
    monkeypatch.setattr(dispatch, "why_not_triton", lambda device: "triton is not installed")
    with pytest.raises(ValueError, match=r"^bench overhead calls the fused ops: triton is not installed$"):
        overhead.main([])
