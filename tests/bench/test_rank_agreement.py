"""Agreement of procedures over seeds: means of pairwise tau, what is recorded, and files of another form."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import kendalltau

from effbert.bench import rank_agreement

RECORD = Path(rank_agreement.__file__).parent / "results" / "cpu-rank-agreement-sst2.json"


def test_the_mean_over_pairs_of_seeds_is_that_of_scipys_tau_ties_too(monkeypatch):
    monkeypatch.setattr(rank_agreement, "DRAWS", 50)
    rng = np.random.default_rng(0)
    values = {"base": rng.integers(0, 6, (3, 12)).astype(float), "other": rng.integers(0, 6, (2, 12)).astype(float)}
    found = rank_agreement.agreement(values)
    (one, two, three), (four, five) = values["base"], values["other"]
    ceiling = np.mean([kendalltau(*pair).statistic for pair in ((one, two), (one, three), (two, three))])
    across = np.mean([kendalltau(a, b).statistic for a in (one, two, three) for b in (four, five)])
    assert found["base with itself"]["estimate"] == pytest.approx(ceiling)
    assert found["other with itself"]["estimate"] == pytest.approx(kendalltau(four, five).statistic)
    assert found["other with base"]["estimate"] == pytest.approx(across)
    assert found["other with base, less base with itself"]["estimate"] == pytest.approx(across - ceiling)
    means = kendalltau(values["other"].mean(0), values["base"].mean(0)).statistic
    assert found["means over seeds: other with base"]["estimate"] == pytest.approx(means)
    assert all(numbers["low"] <= numbers["high"] for numbers in found.values())


def test_equal_orders_agree_by_one_and_are_kept_in_the_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rank_agreement, "DRAWS", 20)
    file = tmp_path / "values.json"
    file.write_text(json.dumps({"what": "x", "values": {"a": [[1, 2, 3, 4]], "b": [[10, 20, 30, 40]]}}))
    assert rank_agreement.main([str(file)]) == 0 and "kendall" not in json.loads(file.read_text())
    assert rank_agreement.main([str(file), "--write"]) == 0
    record = json.loads(file.read_text())
    assert record["what"] == "x" and record["kendall"]["b with a"]["estimate"] == 1.0
    assert capsys.readouterr().out.count("b with a ") == 2


def test_what_is_recorded_follows_from_the_recorded_values(monkeypatch):
    monkeypatch.setattr(rank_agreement, "DRAWS", 5)
    record = json.loads(RECORD.read_text())
    found = rank_agreement.agreement(rank_agreement.read(record, RECORD))
    assert {name: numbers["estimate"] for name, numbers in found.items()} == pytest.approx(
        {name: numbers["estimate"] for name, numbers in record["kendall"].items()}
    )


@pytest.mark.parametrize(
    "values",
    [None, {}, [1], {"a": [[1, 2], [3]]}, {"a": [[1, 2]], "b": [[1, 2, 3]]}, {"a": [[1, None]]}, {"a": [[1]]}],
)
def test_another_form_is_one_line(tmp_path, values):
    file = tmp_path / "values.json"
    file.write_text(json.dumps({"values": values}))
    with pytest.raises(ValueError, match=f"^{file}: ") as refusal:
        rank_agreement.main([str(file)])
    assert "\n" not in str(refusal.value)


def test_what_is_no_object_is_one_line_and_what_cannot_be_ranked_is_null_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_agreement, "DRAWS", 5)
    file = tmp_path / "values.json"
    file.write_text("[]")
    with pytest.raises(ValueError, match=f"^{file}: it should have"):
        rank_agreement.main([str(file)])
    file.write_text(json.dumps({"values": {"a": [[1, 1, 1], [1, 1, 1]]}}))
    rank_agreement.main([str(file), "--write"])
    kept = json.loads(file.read_text(), parse_constant=pytest.fail)["kendall"]
    assert kept == {"a with itself": {"estimate": None, "low": None, "high": None}}
