"""The study on disk: what a search has evaluated, and the folder it lives in.

One Optuna study per stage, in SQLite (`<output_dir>/study.db`). A candidate is one trial: its architecture text is
committed, in the transaction that creates the trial, before its evaluation begins, and each value as soon as it is
there. So a process killed anywhere leaves candidates that were begun and not finished, and the next run goes on with
those under the same numbers.
"""

import fcntl
import json
import math
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from effbert.files import PARTIAL, DiskFullError, write_atomic

STUDY_FILE = "study.db"
CONFIG_FILE = "config.json"
LOCK_FILE = ".lock"

_CONFIG_KEY = "effbert_run"
_MAX_DIFFERENCES = 5
_NUMBER, _ARCHITECTURE, _KEY, _REASON, _RUNGS = "number", "architecture", "key", "reason", "rungs"
_KEPT = (_NUMBER, _ARCHITECTURE, _KEY, _RUNGS)


@dataclass(frozen=True)
class Evaluation:
    """One candidate of a stage.

    number: the candidate's number in its stage, from 0. architecture: its text. state: "complete" (with a finite
    value), "pruned" (it did not get the whole budget), "failed" (attrs["reason"] says why) or "running". attrs: JSON
    values kept beside it; attrs["rungs"] its values on the rungs it was evaluated on, in their order.
    """

    number: int
    architecture: str
    value: float | None
    state: str
    attrs: dict


class Study:
    """The stages of one run."""

    def __init__(self, output_dir: str | Path):
        self.output_dir = Path(output_dir)
        self._storage = None

    def stage(self, name: str) -> "StageStudy":
        """The study of one stage, made if it is not there. ValueError where study.db is no study."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        where = self.output_dir / STUDY_FILE
        with _errors_in_one_line(where):
            self._storage = self._storage or self._open()
            study = optuna.create_study(
                study_name=name,
                storage=self._storage,
                sampler=optuna.samplers.RandomSampler(),
                direction="maximize",
                load_if_exists=True,
            )
        return StageStudy(study, where)

    def _open(self):
        from optuna.storages import RDBStorage

        path = (self.output_dir / STUDY_FILE).resolve()
        # Connected by path, since a URL would give a meaning to ? and {} in a folder's name.
        connect = partial(sqlite3.connect, path, check_same_thread=False)
        return RDBStorage(f"sqlite:///{STUDY_FILE}", engine_kwargs={"creator": connect})


class StageStudy:
    """The candidates of one stage: each is begun, may report values on rungs, and is completed, pruned or failed."""

    def __init__(self, study, where: str | Path):
        self._study, self._where = study, where

    def evaluations(self) -> list[Evaluation]:
        """All candidates, by number."""
        return sorted((_evaluation(trial) for trial in self._trials()), key=lambda evaluation: evaluation.number)

    def best(self) -> Evaluation | None:
        """The complete candidate with the highest value, the first of equals; None if there is none."""
        complete = [evaluation for evaluation in self.evaluations() if evaluation.state == "complete"]
        return max(complete, key=lambda evaluation: (evaluation.value, -evaluation.number), default=None)

    def begin(self, number: int, architecture_text: str, key: str) -> None:
        """Commit a candidate before its evaluation starts. ValueError if the number is taken."""
        for other in self.evaluations():
            if other.number == number:
                raise ValueError(f"{self._where}: cannot begin candidate {number}: it is {other.state}")
        import optuna

        attrs = {_NUMBER: number, _ARCHITECTURE: architecture_text, _KEY: key}
        with _errors_in_one_line(self._where):
            self._study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.RUNNING, user_attrs=attrs))

    def report(self, number: int, rung: int, value: float, **attrs) -> None:
        """Commit the value of an open candidate on a rung, finite, higher is better, and JSON values beside it."""
        _check_finite(number, value)
        trial = self._running_trial(number)
        with _errors_in_one_line(self._where):
            self._set(trial, number, attrs)
            self._study._storage.set_trial_intermediate_value(trial._trial_id, rung, float(value))

    def complete(self, number: int, value: float, **attrs) -> None:
        """Commit the value of an open candidate, finite, higher is better; attrs are JSON values to keep beside it."""
        _check_finite(number, value)
        self._finish(number, "COMPLETE", attrs, float(value))

    def prune(self, number: int, **attrs) -> None:
        """Commit that an open candidate gets no more budget."""
        self._finish(number, "PRUNED", attrs)

    def fail(self, number: int, reason: str, **attrs) -> None:
        """Commit that an open candidate gave no value, and why."""
        self._finish(number, "FAIL", {**attrs, _REASON: reason})

    def _finish(self, number: int, state: str, attrs: dict, value: float | None = None) -> None:
        from optuna.trial import TrialState

        trial = self._running_trial(number)
        with _errors_in_one_line(self._where):
            self._set(trial, number, attrs)
            self._study.tell(trial.number, value, state=TrialState[state])

    def _set(self, trial, number: int, attrs: dict) -> None:
        for name, attr in attrs.items():
            if name in _KEPT:
                raise ValueError(f"candidate {number}: {name!r} is kept already; name the attribute otherwise")
            json.dumps(attr)
        for name, attr in attrs.items():
            self._study._storage.set_trial_user_attr(trial._trial_id, name, attr)

    def _running_trial(self, number: int):
        for trial in self._trials():
            if trial.user_attrs[_NUMBER] == number and not trial.state.is_finished():
                return trial
        raise ValueError(f"{self._where}: candidate {number} is not open; begin it first")

    def _trials(self) -> list:
        with _errors_in_one_line(self._where):
            return self._study.get_trials(deepcopy=False)


class RunFolder:
    """An output directory claimed by one run: a context manager that holds its lock until it is left.

    The folder is made if need be, and config.json (the configuration, JSON values) written into it. ValueError, in one
    line, where the folder cannot be made or written, holds something else, holds a run with another configuration (the
    differences are named), or another process is running in it. A process that dies releases the lock.
    """

    def __init__(self, output_dir: str | Path, config: dict):
        self.path = Path(output_dir)
        config = json.loads(json.dumps(config, default=str))
        try:
            self._refuse_foreign()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _locked(self.path / LOCK_FILE)
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be used as --output_dir: {(error.strerror or str(error)).lower()}"
            ) from error
        try:
            self._settle(config)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def abandon(self) -> None:
        """Empty the folder again, if this call began the run: its input would not do, and nothing is lost by it."""
        if self.is_new:
            for entry in self.path.iterdir():
                if entry.name != LOCK_FILE:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def close(self) -> None:
        """Release the lock."""
        self._lock.close()

    def _refuse_foreign(self) -> None:
        if self.path.is_dir() and self._stored() is None:
            for entry in sorted(os.listdir(self.path)):
                if entry != LOCK_FILE and not entry.startswith(PARTIAL):
                    raise ValueError(
                        f"{self.path} holds something else ({entry}); give an empty or a new folder as --output_dir"
                    )

    def _stored(self) -> dict | None:
        try:
            content = json.loads((self.path / CONFIG_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return content.get(_CONFIG_KEY) if isinstance(content, dict) else None

    def _settle(self, config: dict) -> None:
        stored = self._stored()
        self.is_new = stored is None
        if self.is_new:
            write_atomic(self.path / CONFIG_FILE, json.dumps({_CONFIG_KEY: config}, indent=2) + "\n")
        elif stored != config:
            raise ValueError(
                f"{self.path} holds a run with another configuration: {_differences(stored, config)}; "
                "use another --output_dir or the same configuration"
            )


def _check_finite(number: int, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"candidate {number}: its value is {value}; a candidate without a finite value has failed")


def _evaluation(trial) -> Evaluation:
    attrs = {name: attr for name, attr in trial.user_attrs.items() if name not in _KEPT}
    state = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed", "RUNNING": "running"}[trial.state.name]
    value = trial.value if state == "complete" else None
    rungs = [trial.intermediate_values[rung] for rung in sorted(trial.intermediate_values)]
    attrs[_RUNGS] = rungs + [value] * (value is not None)
    return Evaluation(trial.user_attrs[_NUMBER], trial.user_attrs[_ARCHITECTURE], value, state, attrs)


@contextmanager
def _errors_in_one_line(where: str | Path) -> Iterator[None]:
    """A database's errors become one line each: DiskFullError, or ValueError for a file that is no study."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.DBAPIError, RuntimeError) as error:
        cause = error.__cause__ or error
        reason = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        if "disk is full" in reason:
            raise DiskFullError(f"{where}: no space left on device; nothing already written was lost") from error
        raise ValueError(f"{where}: cannot be used as a study: {reason}") from error


def _locked(path: Path):
    """The open lock file. The kernel drops the lock when the process ends, however it ends."""
    lock = open(path, "a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip()
        lock.close()
        raise ValueError(
            f"{path.parent}: another process{f' ({holder})' if holder else ''} is running in it; "
            "wait for it or use another --output_dir"
        ) from None
    lock.truncate(0)
    lock.write(f"pid {os.getpid()}")
    lock.flush()
    return lock


def _differences(there: dict, here: dict) -> str:
    old, new = dict(_flat(there)), dict(_flat(here))
    names = [name for name in {**old, **new} if old.get(name, _Absent) != new.get(name, _Absent)]
    told = [f"{name}: {old.get(name, 'not set')} there, {new.get(name, 'not set')} here" for name in names]
    more = len(told) - _MAX_DIFFERENCES
    return ", ".join(told[:_MAX_DIFFERENCES]) + (f", and {more} more" if more > 0 else "")


class _Absent:
    """Differs from every JSON value."""


def _flat(config: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
