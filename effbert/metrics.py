"""Metrics over a whole split: predictions are collected first and scored once, never averaged over batches.

Every value is a fraction: 0 to 1, or -1 to 1 for the correlations and MCC; exact match and F1 of SQuAD too, which are
usually printed times 100. Where a score is undefined because predictions are constant it is 0.0, with no warning: a
candidate that learnt nothing should rank low, not stop a search.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

CLASS_METRICS = ("accuracy", "f1", "mcc")
SCORE_METRICS = ("pearson", "spearman")
EXACT = {False: "exact_match", True: "exact"}  # what the scripts of SQuAD 1.1 and 2.0 call it


def compute(spec_metrics: Sequence[str], predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """The named metrics of predictions against references, both of shape [N].

    accuracy, f1 and mcc take class indices; f1 is that of two classes with index 1 as the positive one, 0.0 where no
    positive is predicted or there is none; mcc is Matthews' correlation, 0.0 where either side is constant. pearson
    and spearman take floats and are computed in float64; 0.0 where either side is constant (up to rounding). Raises
    ValueError for an unknown name, other shapes, no rows, numbers that are not finite, or f1 of more than two classes.
    """
    predictions, references = np.asarray(predictions), np.asarray(references)
    if predictions.ndim != 1 or predictions.shape != references.shape or not predictions.size:
        raise ValueError(f"metrics need equal shapes [N > 0], not {predictions.shape} and {references.shape}")
    result = {}
    for name in spec_metrics:
        if name in CLASS_METRICS:
            result[name] = _class_metric(name, predictions, references)
        elif name in SCORE_METRICS:
            result[name] = _correlation(name, predictions, references)
        else:
            raise ValueError(f"unknown metric {name!r}; choose from {', '.join(CLASS_METRICS + SCORE_METRICS)}")
    return result


def roc_auc(logits: np.ndarray, labels: np.ndarray) -> float:
    """How well logits [N, C] tell classes [N] apart, wherever a threshold lies: `area` of their `log_odds`."""
    return area(log_odds(logits), labels)


def log_odds(logits: np.ndarray) -> np.ndarray:
    """Of each class against all others, float64 [N, C]."""
    from scipy.special import logsumexp

    logits = np.asarray(logits, np.float64)
    others = [logsumexp(np.delete(logits, number, axis=1), axis=1) for number in range(logits.shape[1])]
    return logits - np.stack(others, axis=1)


def area(odds: np.ndarray, labels: np.ndarray) -> float:
    """The area under the ROC curve of `log_odds` [N, C] for classes [N], mean of the classes that some rows have and
    others have not: how often a row of the class is ahead of one that is not, ties counting half.

    0.5 is chance, also for one class alone or odds that are not finite.
    """
    from scipy.stats import rankdata

    areas = []
    if not np.isfinite(odds).all():
        return 0.5
    for number in range(odds.shape[1]):
        of_class = labels == number
        inside = int(of_class.sum())
        outside = len(labels) - inside
        if inside and outside:
            ranks = rankdata(odds[:, number])[of_class].sum()
            areas.append((ranks - inside * (inside + 1) / 2) / (inside * outside))
    return float(np.mean(areas)) if areas else 0.5


def squad_scores(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], version2: bool
) -> dict[str, float]:
    """Exact match and token F1 by question id, each the best over the accepted answers, mean over the questions.

    Definition and names: those of the evaluation script of SQuAD 1.1 ("exact_match"), or of 2.0 ("exact"). Texts are
    compared in lower case without ASCII punctuation, without "a", "an", "the", and with single blanks. In 2.0 an answer
    of nothing else is none, and a question without accepted answers wants ""; in 1.1 it is an answer like others, and
    texts that share no word, not even where both are empty, have an F1 of 0. Raises ValueError where the ids differ or
    there are none.
    """
    scores = squad_by_question(predictions, references, version2)
    return {name: float(values.mean()) for name, values in scores.items()}


def squad_by_question(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], version2: bool
) -> dict[str, np.ndarray]:
    """The same of each question, [questions], in the order of the references."""
    scores = np.array(list(_by_question(predictions, references, version2).values()))
    return {EXACT[version2]: scores[:, 0], "f1": scores[:, 1]}


def squad2_scores(
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float],
    references: Mapping[str, Sequence[str]],
    null_threshold: float = 0.0,
) -> dict[str, float]:
    """All that the evaluation script of SQuAD 2.0 prints, under its names, as fractions; thresholds as they are.

    predictions: by question id, the best answer before anything is refused. null_odds: how far no answer is ahead of
    it; above `null_threshold` the answer is "". exact, f1: over all questions; HasAns_ and NoAns_: over those with and
    without an accepted answer (left out where there are none). best_exact, best_f1 and their _thresh: what the script's
    search finds: thresholds are tried from refusing every question on, along the sorted odds, and the first best one
    counts; where none beats refusing everything it is 0. Raises ValueError where ids differ or there are none.
    """
    if null_odds.keys() != predictions.keys():
        raise ValueError(f"{len(predictions)} answers and {len(null_odds)} null odds are not of the same questions")
    raw = _by_question(predictions, references, version2=True)
    refused = {key: odds > null_threshold for key, odds in null_odds.items()}
    scores = {key: (float(not references[key]),) * 2 if refused[key] else raw[key] for key in references}
    found = {"exact": _mean(scores, 0), "f1": _mean(scores, 1), "total": len(scores)}
    for name, wanted in (("HasAns", True), ("NoAns", False)):
        part = {key: score for key, score in scores.items() if bool(references[key]) == wanted}
        if part:
            found |= {f"{name}_exact": _mean(part, 0), f"{name}_f1": _mean(part, 1), f"{name}_total": len(part)}
    for place, name in enumerate(("exact", "f1")):
        found[f"best_{name}"], found[f"best_{name}_thresh"] = _best_threshold(
            {key: score[place] for key, score in raw.items()}, predictions, null_odds, references
        )
    return found


def _best_threshold(
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float],
    references: Mapping[str, Sequence[str]],
) -> tuple[float, float]:
    """(best mean score, its threshold): accept one question after the other, the surest answers first."""
    total = best = sum(not accepted for accepted in references.values())
    threshold = 0.0
    for key in sorted(null_odds, key=null_odds.__getitem__):
        total += scores[key] if references[key] else -bool(predictions[key])
        if total > best:
            best, threshold = total, null_odds[key]
    return best / len(scores), threshold


def _by_question(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], version2: bool
) -> dict[str, tuple[float, float]]:
    """Exact match and F1 of every question."""
    if predictions.keys() != references.keys() or not references:
        missing, extra = references.keys() - predictions.keys(), predictions.keys() - references.keys()
        raise ValueError(
            f"{len(references)} questions, of which {len(missing)} lack an answer; {len(extra)} ids too many"
        )
    scores = {}
    for key, accepted in references.items():
        words = _words(predictions[key])
        golds = [gold for gold in map(_words, accepted) if gold or not version2] or [[]]
        overlaps = [_overlap(words, gold, version2) for gold in golds]
        scores[key] = max(float(words == gold) for gold in golds), max(overlaps)
    return scores


def _mean(scores: Mapping[str, tuple[float, float]], place: int) -> float:
    return sum(score[place] for score in scores.values()) / len(scores)


def _class_metric(name: str, predictions: np.ndarray, references: np.ndarray) -> float:
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    for side in (predictions, references):
        if not np.issubdtype(side.dtype, np.integer):
            raise ValueError(f"{name} takes class indices, not {side.dtype}")
    if name == "accuracy":
        return float(accuracy_score(references, predictions))
    if name == "mcc":
        constant = np.ptp(predictions) == 0 or np.ptp(references) == 0
        return 0.0 if constant else float(matthews_corrcoef(references, predictions))
    if not {*np.unique(predictions), *np.unique(references)} <= {0, 1}:
        raise ValueError("f1 is that of two classes, 0 and 1")
    return float(f1_score(references, predictions, labels=[0, 1], pos_label=1, average="binary", zero_division=0.0))


def _correlation(name: str, predictions: np.ndarray, references: np.ndarray) -> float:
    from scipy.stats import pearsonr, spearmanr

    sides = predictions, references
    if not all(np.isfinite(side).all() for side in sides):
        raise ValueError(f"{name} needs finite numbers")
    if any(_constant(side) for side in sides):
        return 0.0
    return float((pearsonr if name == "pearson" else spearmanr)(*(side.astype(np.float64) for side in sides)).statistic)


def _constant(values: np.ndarray) -> bool:
    """Whether the spread is no more than two roundings a value, of the type that they came in; scipy warns at 1e-13."""
    unit = np.finfo(values.dtype).eps if np.issubdtype(values.dtype, np.floating) else 0.0
    values = values.astype(np.float64)
    bound = max(1e-13, 2 * unit * np.sqrt(values.size))
    return bool(np.linalg.norm(values - values.mean()) <= bound * abs(values.mean()))


def _words(text: str) -> list[str]:
    bare = text.lower().translate(dict.fromkeys(map(ord, string.punctuation)))
    return re.sub(r"\b(?:a|an|the)\b", " ", bare).split()


def _overlap(words: Sequence[str], gold: Sequence[str], version2: bool) -> float:
    if not words or not gold:
        return float(words == gold and version2)
    return 2 * (Counter(words) & Counter(gold)).total() / (len(words) + len(gold))
