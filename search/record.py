"""What a run's folder tells, finished or not: read, never written, and in milliseconds, while a search may go on in it.

The study is read by queries on its tables instead of through Optuna, which takes most of a second for a thousand
candidates and makes what is not there. A file that is not there yet is an empty entry; one that cannot be read is a
ValueError.
"""

import json
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from effbert.config import without_password
from effbert.errors import first_line
from effbert.files import PARTIAL
from effbert.search.study import BUSY_SECONDS, CONFIG_FILE, STUDY_FILE, Evaluation, engine_settings, evaluation_of

FIRST_SUPERNET = "supernet-stage1"  # of the text that the candidates alone learn from
STAGES, AGREEMENT = ("stage1", "stage2", "stage3"), "agreement"  # the last: stage 3's candidates trained alone
LOSSES = "losses"  # what is kept as a curve: of a candidate, of a row, and as a file's stem beside a supernet's weights
PLAN, WINNER = "plan.json", "winner.json"  # of a plan (effbert paper), whose search is in its folder search/

_TRIALS = """
    SELECT studies.study_name, trials.trial_id, trials.state, trial_values.value
    FROM trials JOIN studies USING (study_id) LEFT JOIN trial_values USING (trial_id)
    ORDER BY trials.trial_id
"""
# Studies begun before they had "jackknife" hold a candidate's answers row by row, by far the longest attribute.
_ATTRIBUTES = "SELECT trial_id, key, value_json FROM trial_user_attributes WHERE key <> 'hits'"
_RUNGS = "SELECT trial_id, intermediate_value FROM trial_intermediate_values ORDER BY trial_id, step"

LOSSES_FILE, MACHINE_FILE = f"{LOSSES}.json", "machine.json"


def losses_file(losses: dict[str, list[tuple[float, float]]]) -> dict[str, str]:
    """The file that keeps the losses of a supernet's phases beside its weights, and its text."""
    return {LOSSES_FILE: json.dumps(losses)}


@dataclass(frozen=True)
class Plan:
    """The plan that a search is part of.

    steps: how many it has, and left: how many of them are left. winner: the architecture that the search found, "" in
    the search. results: its results.json, {} before that is there; "tasks" is what `report.plan_rows` takes."""

    steps: int
    left: int
    winner: str
    results: dict


@dataclass(frozen=True)
class Record:
    """A run as its folder tells it.

    config: the settings it was begun with. stages: the candidates of each stage by number, open ones too. results:
    results.json, None before the end. agreement: agreement.json. final: the rows of the final table that are done.
    training: training.json of each supernet and teacher, by the folder it lies in. losses: of each supernet, by folder
    too, those of its phases by name, as TrainingResult's. machine: on what the run was begun, {} of older ones.
    changed: when the newest of these was written, seconds since the epoch. plan: what the search is part of.
    """

    config: dict
    stages: dict[str, list[Evaluation]]
    results: dict | None
    agreement: list[dict]
    final: list[dict]
    training: dict[str, dict]
    losses: dict[str, dict]
    machine: dict
    changed: float
    plan: Plan | None = None


def read_record(folder: str | Path, storage: str = "") -> Record:
    """What the run in `folder`, or the search of the plan in it, has recorded so far; ValueError, in one line, where
    there is no run or a file of it is damaged. storage: URL of its database, if not the one that its configuration
    tells."""
    folder = Path(folder)
    if _steps(folder) is not None:
        folder = folder / "search"
    plan = folder.resolve().parent if folder.resolve().name == "search" else None
    read: list[Path] = []

    def load(path: Path, kind: type):
        if not path.exists():
            return None
        read.append(path)
        return _json(path, kind)

    config = (load(folder / CONFIG_FILE, dict) or {}).get("effbert_run")
    if not isinstance(config, dict):
        raise ValueError(f"{folder} is no run: give the --output_dir of a search, a folder with its {CONFIG_FILE}")
    if "run" in config:
        raise ValueError(f"{folder} is a run of another command: give the --output_dir of a search, or of a plan")
    trainings = training_files(folder)
    storage, study = storage or config.get("storage", ""), folder / STUDY_FILE
    where, engine = without_password(storage) if storage else str(study), _engine(folder, storage)
    stages = dict.fromkeys(STAGES, ()) | ({} if engine is None else _candidates(engine, where))
    return Record(
        config=config,
        stages={name: sorted(found, key=lambda evaluation: evaluation.number) for name, found in stages.items()},
        results=load(folder / "results.json", dict),
        agreement=load(folder / "agreement.json", list) or [],
        final=[load(path, dict) for path in sorted((folder / "final").glob("*.json"))],
        training={path.parent.relative_to(folder).as_posix(): load(path, dict) for path in trainings},
        losses={
            path.parent.relative_to(folder).as_posix(): load(path.with_name(LOSSES_FILE), dict) or {}
            for path in trainings
        },
        machine=load(folder / MACHINE_FILE, dict) or {},
        plan=None if plan is None else _plan(plan, load),
        changed=max(path.stat().st_mtime for path in [*read, *([study] if study.exists() else [])]),
    )


def _plan(folder: Path, load: Callable) -> Plan | None:
    steps = _steps(folder)
    if steps is None:
        return None
    left = sum(state_of(folder / step["result"]) == "left" for step in steps)
    winner, results = (load(folder / name, dict) or {} for name in (WINNER, "results.json"))
    return Plan(len(steps), left, winner.get("winner", ""), results)


def _steps(folder: Path) -> list[dict] | None:
    """The steps of the plan in a folder; None where what lies there is no plan."""
    try:
        steps = json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = isinstance(steps, list) and all(isinstance(step, dict) and "result" in step for step in steps)
    return steps if found else None


def saved_plan(folder: Path) -> list[dict]:
    """The steps of the plan in a folder; ValueError, in one line, where its file is damaged."""
    steps = _steps(folder)
    if steps is None:
        raise ValueError(f"{folder / PLAN}: is no plan of effbert paper: the command that began it writes it anew")
    return steps


def left_out(result: Path) -> Path:
    """The note beside a step's result that there will be none, and why."""
    return result.with_name(f"{result.name}.left-out")


def state_of(result: Path) -> str:
    """Of a step, by its result: "done", "left out" or "left"."""
    return "done" if result.exists() else "left out" if left_out(result).exists() else "left"


def training_files(folder: Path) -> list[Path]:
    """training.json of everything that is done; not of what another worker is writing, or a dead one left. A folder
    that another worker removes meanwhile holds none: os.walk passes it over, where a glob raises."""
    paths = (Path(root, "training.json") for root, _, files in os.walk(folder) if "training.json" in files)
    return sorted(p for p in paths if not any(part.startswith(PARTIAL) for part in p.relative_to(folder).parts))


def _candidates(engine, where: str) -> dict[str, list[Evaluation]]:
    """The candidates of every stage of a study, in no order; none where its tables are not made yet."""
    from sqlalchemy import inspect, text
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with engine.connect() as connection:
            if not inspect(connection).has_table("trial_intermediate_values"):
                return {}
            trials, attributes, rungs = (
                connection.execute(text(query)).fetchall() for query in (_TRIALS, _ATTRIBUTES, _RUNGS)
            )
    except SQLAlchemyError as error:
        reason = first_line(getattr(error, "orig", None) or error)
        hint = "; give effbert report --storage the URL with its password" if "***" in where else ""
        raise ValueError(f"{where}: cannot be read as a study: {reason}{hint}") from None
    finally:
        engine.dispose()
    attrs: dict[int, dict] = {trial: {} for _, trial, _, _ in trials}
    values: dict[int, list[float]] = {trial: [] for _, trial, _, _ in trials}
    for trial, key, value in attributes:
        if trial in attrs:  # not one that was begun since the first query
            attrs[trial][key] = json.loads(value)
    for trial, value in rungs:
        if trial in values:
            values[trial].append(value)
    newest = {(stage, attrs[trial]["number"]): (trial, state, value) for stage, trial, state, value in trials}
    stages: dict[str, list[Evaluation]] = {}
    for (stage, _), (trial, state, value) in newest.items():
        finished = value if state == "COMPLETE" else None
        stages.setdefault(stage, []).append(evaluation_of(attrs[trial], state, finished, values[trial]))
    return stages


def _engine(folder: Path, storage: str):
    """The run's database, for reading: `storage`, or the SQLite file in its folder; None where that is not there."""
    from sqlalchemy import create_engine
    from sqlalchemy.exc import SQLAlchemyError

    try:
        if storage:
            _refuse_missing(storage)
            return create_engine(storage, **engine_settings(storage))
        path = folder / STUDY_FILE
        uri = f"{path.resolve().as_uri()}?mode=ro"
        if not path.exists():
            return None
        return create_engine("sqlite://", creator=lambda: sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS))
    except (ImportError, SQLAlchemyError) as error:
        raise ValueError(f"{without_password(storage)}: cannot be read as a study: {first_line(error)}") from None


def _refuse_missing(storage: str) -> None:
    """ValueError for the URL of an SQLite file that is not there: opening it would make one."""
    from sqlalchemy.engine import make_url

    url = make_url(storage)
    if url.get_backend_name() == "sqlite" and url.database and not Path(url.database).exists():
        raise ValueError(f"--storage {without_password(storage)}: no study there: {url.database} does not exist")


def _json(path: Path, kind: type):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: holds a {type(content).__name__}, a {kind.__name__} belongs there")
    return content
