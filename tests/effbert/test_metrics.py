"""Metrics against their formulas, on whole splits, and where they are undefined."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.metrics import roc_auc_score

from effbert.metrics import compute, roc_auc, squad2_scores, squad_scores

BINARY = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, 1), min_size=n, max_size=n).map(np.array)] * 2)
)
FLOATS = st.integers(3, 30).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(-999, 999), min_size=n, max_size=n, unique=True)] * 2)
)


@settings(max_examples=40, deadline=None)  # the first example imports sklearn
@given(BINARY)
def test_class_metrics_follow_from_the_four_counts(sides):
    predictions, references = sides
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = compute(("accuracy", "f1", "mcc"), predictions, references)
    tp, tn = np.sum(predictions & references), np.sum((1 - predictions) & (1 - references))
    fp, fn = np.sum(predictions & (1 - references)), np.sum((1 - predictions) & references)
    assert scores["accuracy"] == pytest.approx((tp + tn) / len(references))
    assert scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn) if tp + fp + fn else 0.0)
    product = float((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scores["mcc"] == pytest.approx((tp * tn - fp * fn) / product**0.5 if product else 0.0)


@settings(max_examples=40, deadline=None)
@given(FLOATS)
def test_correlations_follow_their_formulas(sides):
    x, y = (np.array(side, np.float32) for side in sides)
    scores = compute(("pearson", "spearman"), x, y)
    assert scores["pearson"] == pytest.approx(np.corrcoef(x.astype(float), y.astype(float))[0, 1], abs=1e-9)
    ranks = [np.argsort(np.argsort(side)) for side in (x, y)]
    assert scores["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1], abs=1e-9)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(12)))
def test_the_order_of_rows_does_not_matter(order):
    x, y = np.arange(12) % 3, np.arange(12) % 2
    assert compute(("mcc",), x[list(order)], y[list(order)]) == pytest.approx(compute(("mcc",), x, y))


def test_the_area_counts_pairs_that_stand_in_the_right_order_wherever_the_threshold_lies():
    labels = np.array([0, 0, 1, 1, 1])
    margins = np.array([-9.0, -2.0, -3.0, -2.0, -1.0])  # every prediction is class 0
    right = [(b > a) + 0.5 * (a == b) for a in margins[labels == 0] for b in margins[labels == 1]]
    logits = np.stack([np.full(5, 4.0), 4.0 + margins], axis=1)
    assert roc_auc(logits, labels) == roc_auc(logits + 1.0, labels) == pytest.approx(np.mean(right)) != 0.5


def test_the_area_of_several_classes_is_the_mean_of_each_against_the_rest():
    rng = np.random.default_rng(0)
    labels, logits = rng.integers(0, 4, 200), rng.normal(size=(200, 4)) * 5
    expected = roc_auc_score(labels, softmax(logits, axis=1), multi_class="ovr", average="macro")
    assert roc_auc(logits, labels) == pytest.approx(expected)
    two = labels < 2  # the others are in no row
    areas = [roc_auc_score(labels[two] == c, softmax(logits[two], axis=1)[:, c]) for c in (0, 1)]
    assert roc_auc(logits[two], labels[two]) == pytest.approx(np.mean(areas))


@pytest.mark.parametrize(
    "logits", [np.zeros((4, 2)), np.full((4, 2), np.nan), np.array([[0.0, np.inf]] * 4), np.ones((4, 3), np.float32)]
)
def test_what_tells_nothing_apart_has_an_area_of_one_half_and_gives_no_warning(logits):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert roc_auc(logits, np.array([0, 1, 1, 0])) == 0.5
        assert roc_auc(logits, np.ones(4, np.int64)) == 0.5


def test_mcc_of_three_classes():
    perfect = np.array([0, 1, 2, 2, 1])
    assert compute(("mcc", "accuracy"), perfect, perfect) == pytest.approx({"mcc": 1.0, "accuracy": 1.0})


@pytest.mark.parametrize(
    "constant",
    [
        np.full(6, 0.1, np.float32),
        np.nextafter(np.full(6, 0.1, np.float32), np.tile(np.float32([0, 0.1, 1]), 2)),  # a rounding up, down, or none
        np.zeros(6),
        np.full(6, 1e6) + np.arange(6) * 1e-10,
    ],
)
def test_constant_sides_have_no_correlation_and_give_no_warning(constant):
    varied = np.arange(6.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sides in ((constant, varied), (varied, constant), (constant, constant), (constant[:1], varied[:1])):
            assert compute(("pearson", "spearman"), *sides) == {"pearson": 0.0, "spearman": 0.0}


@pytest.mark.parametrize(
    ("names", "predictions", "references", "says"),
    [
        (("rouge",), np.zeros(2), np.zeros(2), "unknown metric 'rouge'; choose from accuracy"),
        (("accuracy",), np.zeros(2, int), np.zeros(3, int), "equal shapes"),
        (("accuracy",), np.zeros((2, 2), int), np.zeros((2, 2), int), "equal shapes"),
        (("accuracy",), np.zeros(0, int), np.zeros(0, int), "N > 0"),
        (("accuracy",), np.zeros(2), np.zeros(2, int), "class indices, not float64"),
        (("pearson",), np.array([0.0, np.nan]), np.zeros(2), "finite"),
        (("f1",), np.array([0, 2]), np.array([0, 1]), "two classes"),
    ],
)
def test_bad_input_is_refused(names, predictions, references, says):
    with pytest.raises(ValueError, match=says):
        compute(names, predictions, references)


@pytest.mark.parametrize(
    ("prediction", "accepted", "exact", "f1", "of_1_1"),
    [
        ("The  Eiffel Tower!", ["eiffel tower"], 1, 1, None),
        ("a theatre", ["theatre"], 1, 1, None),
        ("thea", ["a"], 0, 0, None),
        ("Eiffel", ["the Eiffel Tower", "Paris"], 0, 2 / 3, None),
        ("in Paris, France", ["Paris", "Paris France"], 0, 4 / 5, None),
        ("red red blue", ["red blue blue"], 0, 2 / 3, None),
        ("U.S.", ["us"], 1, 1, None),
        ("", ["Paris"], 0, 0, None),
        ("the", ["Paris"], 0, 0, None),
        ("A", ["A"], 1, 1, (1, 0)),  # equal texts without a word: the script of 1.1 finds no word in common
        ("A", ["A", "Grade B"], 0, 0, (1, 0)),  # that of 2.0 drops answers without a word where there are others
        ("", [], 1, 1, ()),
        ("something", [], 0, 0, ()),
    ],
)
def test_squad_scores_of_one_question(prediction, accepted, exact, f1, of_1_1):
    found = squad_scores({"q": prediction}, {"q": accepted}, version2=True)
    assert found == pytest.approx({"exact": exact, "f1": f1})
    if of_1_1 != ():  # every question of 1.1 has an answer
        wanted = (exact, f1) if of_1_1 is None else of_1_1
        found = squad_scores({"q": prediction}, {"q": accepted}, version2=False)
        assert (found["exact_match"], found["f1"]) == pytest.approx(wanted)


def test_squad_scores_are_means_over_questions():
    scores = squad_scores({"a": "Paris", "b": "x", "c": ""}, {"c": [], "a": ["Paris"], "b": ["x y z"]}, version2=True)
    assert scores == pytest.approx({"exact": 2 / 3, "f1": (1 + 0.5 + 1) / 3})


@pytest.mark.parametrize("version2", [False, True])
def test_squad_ids_must_agree(version2):
    with pytest.raises(ValueError, match="2 questions, of which 1 lack an answer; 1 ids too many"):
        squad_scores({"a": "", "x": ""}, {"a": [], "b": []}, version2)
    with pytest.raises(ValueError, match="0 questions"):
        squad_scores({}, {}, version2)


def test_squad2_scores_by_hand():
    """Five questions, odds for no answer growing. Refusing all of them scores the two without an answer: 2 of 5.

    Accepting in turn, exact: a +1 = 3, b (half a match) +0 = 3, c (no answer, text given) -1 = 2, d (no answer, "") 2,
    e +1 = 3: the first best is 3, at a's odds. F1: 3, 3.5, 2.5, 2.5, 3.5: 3.5 at b's.
    """
    references = {"a": ["Paris"], "b": ["x y z"], "c": [], "d": [], "e": ["the end", "stop"]}
    predictions = {"a": "Paris!", "b": "x", "c": "here", "d": "", "e": "The Stop"}
    odds = {"e": 4.0, "d": 3.0, "c": 1.0, "b": -1.0, "a": -2.0}
    scores = squad2_scores(predictions, odds, references)
    assert scores == pytest.approx(
        {
            **{"exact": 3 / 5, "f1": 3.5 / 5, "total": 5},
            **{"HasAns_exact": 1 / 3, "HasAns_f1": 1.5 / 3, "HasAns_total": 3},
            **{"NoAns_exact": 1, "NoAns_f1": 1, "NoAns_total": 2},
            **{"best_exact": 3 / 5, "best_exact_thresh": -2, "best_f1": 3.5 / 5, "best_f1_thresh": -1},
        }
    )
    wide = squad2_scores(predictions, odds, references, null_threshold=4.0)
    assert (wide["exact"], wide["HasAns_exact"], wide["NoAns_exact"]) == pytest.approx((3 / 5, 2 / 3, 1 / 2))
    assert wide["best_f1"] == scores["best_f1"]


def test_squad2_thresholds_where_nothing_beats_refusing_and_parts_are_missing():
    none = squad2_scores({"a": "x", "b": ""}, {"a": 1.0, "b": -1.0}, {"a": [], "b": []})
    assert none["best_exact"] == none["exact"] == 1 and none["best_exact_thresh"] == 0
    assert not any(name.startswith("HasAns") for name in none)
    full = squad2_scores({"a": "x"}, {"a": 7.0}, {"a": ["x"]})
    assert full["exact"] == 0 and full["best_exact"] == 1 and full["best_exact_thresh"] == 7.0
    with pytest.raises(ValueError, match="1 answers and 0 null odds"):
        squad2_scores({"a": "x"}, {}, {"a": ["x"]})


@given(st.text(max_size=30), st.text(max_size=30))
def test_squad_scores_stay_within_bounds_and_exact_implies_f1(prediction, gold):
    scores = squad_scores({"q": prediction}, {"q": [gold]}, version2=True)
    assert 0 <= scores["f1"] <= 1 and (scores["exact"] == 0 or scores["f1"] == 1)
