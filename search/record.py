"""What a run's folder tells, finished or not: read, never written, and in milliseconds, while a search may go on in it.

The study is read by queries on its tables instead of through Optuna, which takes most of a second for a thousand
candidates and makes what is not there. A file that is not there yet is an empty entry; one that cannot be read is a
ValueError.
"""

import json
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from effbert.search.study import CONFIG_FILE, STUDY_FILE, Evaluation

STAGES = ("stage1", "stage2", "stage3")

_STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running", "WAITING": "running"}
_KEPT = ("number", "architecture", "key")
_TRIALS = """
    SELECT studies.study_name, trials.trial_id, trials.state, trial_values.value
    FROM trials JOIN studies USING (study_id) LEFT JOIN trial_values USING (trial_id)
"""
# A candidate's answers row by row are by far the longest attribute, and nothing here reads them.
_ATTRIBUTES = "SELECT trial_id, key, value_json FROM trial_user_attributes WHERE key <> 'hits'"
_RUNGS = "SELECT trial_id, intermediate_value FROM trial_intermediate_values ORDER BY trial_id, step"


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it.

    config: the settings it was begun with. stages: the candidates of each stage by number, open ones too. results:
    results.json, None before the end. agreement: agreement.json. final: the rows of the final table that are done.
    training: training.json of each supernet and teacher, by the folder it lies in. changed: when the newest of these
    was written, seconds since the epoch.
    """

    config: dict
    stages: dict[str, list[Evaluation]]
    results: dict | None
    agreement: list[dict]
    final: list[dict]
    training: dict[str, dict]
    changed: float


def read_record(folder: str | Path) -> Record:
    """What the run in `folder` has recorded so far; ValueError, in one line, where there is no run or a file of it is
    damaged."""
    folder = Path(folder)
    read: list[Path] = []

    def load(path: Path, kind: type):
        if not path.exists():
            return None
        read.append(path)
        return _json(path, kind)

    config = (load(folder / CONFIG_FILE, dict) or {}).get("effbert_run")
    if not isinstance(config, dict):
        raise ValueError(f"{folder} is no run: give the --output_dir of a search, a folder with its {CONFIG_FILE}")
    trainings = sorted(folder.glob("**/training.json"))
    study = folder / STUDY_FILE
    stages = dict.fromkeys(STAGES, ()) | (_candidates(study) if study.exists() else {})
    return Record(
        config=config,
        stages={name: sorted(found, key=lambda evaluation: evaluation.number) for name, found in stages.items()},
        results=load(folder / "results.json", dict),
        agreement=load(folder / "agreement.json", list) or [],
        final=[load(path, dict) for path in sorted((folder / "final").glob("*.json"))],
        training={path.parent.relative_to(folder).as_posix(): load(path, dict) for path in trainings},
        changed=max(path.stat().st_mtime for path in [*read, *([study] if study.exists() else [])]),
    )


def _candidates(path: Path) -> dict[str, list[Evaluation]]:
    """The candidates of every stage of a study, in no order; none where its tables are not made yet."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
            connection.execute("BEGIN")  # one moment for all queries
            if not connection.execute(
                "SELECT 1 FROM sqlite_master WHERE name = 'trial_intermediate_values'"
            ).fetchall():
                return {}
            trials, attributes, rungs = (
                connection.execute(query).fetchall() for query in (_TRIALS, _ATTRIBUTES, _RUNGS)
            )
    except sqlite3.Error as error:
        raise ValueError(f"{path}: cannot be read as a study: {error}") from None
    attrs: dict[int, dict] = {trial: {} for _, trial, _, _ in trials}
    values: dict[int, list[float]] = {trial: [] for _, trial, _, _ in trials}
    for trial, key, text in attributes:
        attrs[trial][key] = json.loads(text)
    for trial, value in rungs:
        values[trial].append(value)
    stages: dict[str, list[Evaluation]] = {}
    for stage, trial, state, value in trials:
        number, architecture, _ = (attrs[trial].pop(key, None) for key in _KEPT)
        finished = [value] if state == "COMPLETE" else []
        own = {**attrs[trial], "rungs": values[trial] + finished}
        evaluation = Evaluation(number, architecture, value if finished else None, _STATES[state], own)
        stages.setdefault(stage, []).append(evaluation)
    return stages


def _json(path: Path, kind: type):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: holds a {type(content).__name__}, a {kind.__name__} belongs there")
    return content
