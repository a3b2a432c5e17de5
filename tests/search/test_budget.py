"""Halving: who goes on depends on values and keys alone; what samplers are told; agreement and paired differences."""

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effbert.config import SearchConfig, SearchStage
from effbert.evaluate import jackknife
from effbert.search.agreement import kendall, of_rungs, paired_difference
from effbert.search.budget import Rung, cut, fitness, ladder, survivors
from effbert.search.population import Outcome
from effbert.search.progress import Reporter
from effbert.search.stages import record
from effbert.search.study import Evaluation, Study

NINTHS = SearchStage(cohort=27, rungs=(1 / 9, 1 / 3, 1.0), general_share=0.02, task_share=0.1)


def test_a_share_of_1_is_all_and_not_one_row():
    stage = SearchStage(general_share=1, task_share=1, ranking_share=1)
    for name in ("general_share", "task_share", "ranking_share"):
        assert type(getattr(stage, name)) is float


def test_every_rung_costs_the_same_and_one_that_drops_nobody_is_left_out():
    assert ladder(NINTHS, 27) == [Rung(1 / 9, 27), Rung(1 / 3, 9), Rung(1.0, 3)]
    assert ladder(NINTHS, 3) == [Rung(1 / 9, 3), Rung(1.0, 1)]
    assert ladder(NINTHS, 1) == [Rung(1.0, 1)]
    assert ladder(SearchStage(cohort=5), 5) == [Rung(1.0, 5)]


@given(st.integers(1, 60), st.lists(st.floats(0.01, 0.99), max_size=4, unique=True))
def test_a_ladder_ends_with_the_whole_budget_and_loses_candidates_on_every_rung(cohort, shares):
    rungs = ladder(dataclasses.replace(NINTHS, rungs=(*sorted(shares), 1.0)), cohort)
    assert rungs[-1].share == 1 and rungs[0].places <= cohort and rungs[-1].places >= 1
    assert all(first.places > second.places for first, second in itertools.pairwise(rungs))


def test_both_phases_shrink_and_the_schedules_do_not_change():
    small = cut(NINTHS, 1 / 3)
    assert small.general_share == pytest.approx(0.02 / 3) and small.task_share == pytest.approx(0.1 / 3)
    assert small.task_phase == NINTHS.task_phase and small.general_phase == NINTHS.general_phase


@given(st.permutations(range(9)), st.lists(st.sampled_from([0.1, 0.2, 0.3]), min_size=9, max_size=9))
def test_survivors_do_not_depend_on_the_order_of_reporting(order, scores):
    keys = {number: f"key {7 * number % 9}" for number in range(9)}
    kept = survivors({number: scores[number] for number in order}, keys, 3)
    assert kept == survivors(dict(enumerate(scores)), keys, 3) and len(kept) == 3
    worst = min(scores[number] for number in kept)
    for number in set(range(9)) - set(kept):
        assert scores[number] <= worst
        if scores[number] == worst:
            assert keys[number] > min(keys[other] for other in kept if scores[other] == worst)


def evaluation(number, state, rungs, shares=None):
    shares = shares or list(NINTHS.rungs[-len(rungs) :] if state == "complete" else NINTHS.rungs[: len(rungs)])
    attrs = {"rungs": rungs, "shares": shares}
    return Evaluation(number, "text", rungs[-1] if state == "complete" else None, state, attrs)


def test_a_stopped_candidate_is_told_with_the_mean_gain_of_those_that_went_on():
    cohort = [
        evaluation(0, "complete", [0.5, 0.6, 0.8]),
        evaluation(1, "pruned", [0.5, 0.55]),
        evaluation(2, "pruned", [0.2]),
        evaluation(3, "failed", []),
    ]
    told = fitness(cohort, 3)
    assert told == {0: 0.8, 1: pytest.approx(0.55 + 0.2), 2: pytest.approx(0.2 + 0.075 + 0.2), 3: None}


@pytest.mark.parametrize("rungs", [(), (0.5,), (0.5, 0.5, 1.0), (0.0, 1.0), (1.0, 0.5), (0.5, 2.0)])
def test_rungs_that_make_no_ladder_are_refused(rungs):
    with pytest.raises(ValueError, match=r"rungs is .* it should rise"):
        SearchStage(rungs=rungs)


def test_settings_that_would_fail_later_are_refused_now():
    with pytest.raises(ValueError, match="initial_samples is 1: it must be at least 2"):
        SearchStage(initial_samples=1)
    with pytest.raises(ValueError, match="refit_every is 0: it must be at least 1"):
        SearchStage(refit_every=0)
    with pytest.raises(ValueError, match=r"stage3\.rungs is .* scored, not trained"):
        SearchConfig(output_dir="", stage3=SearchStage(rungs=(0.5, 1.0)))


def test_costs_of_a_rung_are_counted_once_though_a_commit_was_cut_short(tmp_path, monkeypatch):
    stage = Study(tmp_path).stage("stage1")
    stage.begin(0, "text", "key")
    line = Reporter().stage("stage1", 1, 0)
    outcomes = [Outcome(0.5, {"seconds": 10.0, "tokens": 100}), Outcome(0.6, {"seconds": 20.0, "tokens": 200})]

    class Killed(Exception):
        pass

    def die(*_):
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(stage._study._storage, "set_trial_intermediate_value", die)
        with pytest.raises(Killed):
            record(stage, stage.evaluations()[0], 0, 0.5, outcomes[0], line)
    record(stage, stage.evaluations()[0], 0, 0.5, outcomes[0], line)
    record(stage, stage.evaluations()[0], 1, 1.0, outcomes[1], line)
    (found,) = stage.evaluations()
    assert found.state == "complete" and (found.attrs["seconds"], found.attrs["tokens"]) == (30.0, 300)
    assert (found.attrs["shares"], found.attrs["rungs"]) == ([0.5, 1.0], [0.5, 0.6])


def test_an_empty_cohort_is_refused():
    with pytest.raises(ValueError, match="cohort is 0"):
        SearchStage(cohort=0)


def test_agreement_is_one_for_equal_ranks_and_its_interval_holds_the_estimate():
    scores = list(np.random.default_rng(0).normal(size=20))
    assert kendall(scores, [value * 2 + 1 for value in scores]).estimate == pytest.approx(1)
    assert kendall(scores, [-value for value in scores]).estimate == pytest.approx(-1)
    noisy = kendall(scores, scores + np.random.default_rng(1).normal(size=20))
    assert -1 < noisy.low < noisy.estimate < noisy.high < 1 and noisy.count == 20
    assert noisy == kendall(scores, scores + np.random.default_rng(1).normal(size=20))


@pytest.mark.parametrize(("count", "low"), [(6, 0.38), (12, 0.93), (100, 0.99)])
def test_a_perfect_order_of_few_candidates_is_not_certain(count, low):
    scores = list(range(count))
    same, reverse = kendall(scores, scores), kendall(scores, scores[::-1])
    assert (same.estimate, same.high) == (pytest.approx(1), pytest.approx(1)) and low - 0.02 < same.low < low + 0.02
    assert (reverse.low, reverse.high) == (pytest.approx(-1), pytest.approx(-same.low))
    few = kendall(scores[:5], scores[:5])
    assert few.estimate == pytest.approx(1) and np.isnan([few.low, few.high]).all()


def test_agreement_of_one_candidate_is_refused():
    with pytest.raises(ValueError, match="at least 2 candidates, not 1 and 1"):
        kendall([1.0], [1.0])


def test_rungs_agree_with_the_full_budget_among_those_that_reached_it():
    reached = [[0.1, 0.3, 0.5], [0.2, 0.2, 0.6], [0.3, 0.1, 0.7]]
    cohort = [evaluation(number, "complete", rungs) for number, rungs in enumerate(reached)]
    cohort += [evaluation(3, "pruned", [0.0, 0.1]), evaluation(4, "complete", [0.9]), evaluation(5, "failed", [])]
    cohort.append(evaluation(6, "complete", [0.4, 0.8], shares=[1 / 3, 1.0]))  # of a cohort too small for every rung
    found = of_rungs(cohort)
    estimates = {share: interval.estimate for share, interval in found.items()}
    assert estimates == {1 / 9: pytest.approx(1), 1 / 3: pytest.approx(0)}
    assert (found[1 / 9].count, found[1 / 3].count) == (3, 4) and of_rungs([]) == {}
    few = of_rungs(cohort[2:4])
    assert [(share, too_few.count) for share, too_few in few.items()] == [(1 / 9, 1), (1 / 3, 1)]
    assert all(np.isnan([too_few.estimate, too_few.low, too_few.high]).all() for too_few in few.values())


def answers(rng, right, labels):
    """Class indices that are those of the labels in a share `right` of the rows."""
    return np.where(rng.random(len(labels)) < right, labels, 1 - labels)


def parts_of(score, said, labels):
    return jackknife(lambda kept: score(said[kept], labels[kept]), labels)


SCORES = {
    "accuracy": lambda said, labels: float((said == labels).mean()),
    "mcc": lambda said, labels: float(np.corrcoef(said, labels)[0, 1]),
}


@pytest.mark.parametrize("metric", SCORES)
def test_intervals_of_differences_hold_what_they_should(metric):
    """Of 300 pairs of students, drawn from a world where the one is right more often, 95 % have the true difference in
    their interval."""
    rng, score, truth, draws = np.random.default_rng(0), SCORES[metric], [], []
    for _ in range(300):
        labels = (rng.random(200) < 0.4).astype(int)
        first = answers(rng, 0.8, labels)
        second = np.where(rng.random(200) < 0.7, first, answers(rng, 0.6, labels))
        values = score(first, labels), score(second, labels)
        truth.append(values[0] - values[1])
        draws.append(paired_difference(*values, [parts_of(score, said, labels) for said in (first, second)]))
    expected = np.mean(truth)
    held = sum(draw.low <= expected <= draw.high for draw in draws)
    assert 0.90 < held / len(draws) < 0.99
    assert all(draw.estimate == pytest.approx(found) for draw, found in zip(draws, truth, strict=True))


def test_paired_differences_are_surer_than_bare_ones():
    rng = np.random.default_rng(0)
    labels = np.zeros(400, int)
    first = rng.random(400) < 0.7
    second = first.copy()
    second[:20] = False  # the same answers but for a few rows
    parts = [parts_of(lambda hits, _: hits.mean(), hits, labels) for hits in (first, second)]
    difference = paired_difference(first.mean(), second.mean(), parts)
    assert difference.estimate == pytest.approx(first[:20].mean() / 20) and difference.low > 0
    unpaired = 1.96 * (2 * 0.7 * 0.3 / 400) ** 0.5
    assert difference.high - difference.low < unpaired
    with pytest.raises(ValueError, match="values without 40 and without 39 groups of rows do not pair"):
        paired_difference(0.5, 0.4, (parts[0], parts[1][:-1]))


def test_each_group_of_rows_is_left_out_once_and_has_its_share_of_every_label():
    labels, seen = np.random.default_rng(0).integers(3, size=410), []
    values = jackknife(lambda kept: seen.append(~kept) or kept.mean(), labels)
    assert len(values) == 40 and (np.sum(seen, axis=0) == 1).all()
    assert {int(group.sum()) for group in seen} == {10, 11}
    shares = np.array([[np.sum(labels[group] == label) for label in range(3)] for group in seen])
    assert (np.ptp(shares, axis=0) <= 2).all()
    assert len(jackknife(lambda kept: 0.0, labels[:5])) == 2 and jackknife(lambda kept: 0.0, labels[:3]) == []
