"""The study: what a search has evaluated, and the folder it lives in.

One Optuna study per stage, in a database: SQLite (`<output_dir>/study.db`) or any that Optuna's RDBStorage takes. A
candidate is one trial: its architecture text is committed, in the transaction that creates the trial, before its
evaluation begins, and each value as soon as it is there. It waits until a worker takes it and is running while that
worker trains it on a rung; a worker that dies leaves it to the others, or to the next start, under the same number.
Workers on this machine are known to be dead by their locks, others by the storage's heartbeats.
"""

import json
import math
import secrets
import shutil
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from effbert.config import without_password
from effbert.errors import first_line
from effbert.files import PARTIAL, DiskFullError, write_atomic
from effbert.search.workers import FOLDER, JOINING, Workers

STUDY_FILE = "study.db"
CONFIG_FILE = "config.json"
GIVEN_PATHS = ("teacher", "start_from")  # settings whose content a run compares, not their spelling
HEARTBEAT_SECONDS = 15
GRACE_SECONDS = 90  # without a heartbeat for so long, a worker is taken for dead
BUSY_SECONDS = 60.0  # SQLite waits so long for another worker's commit
SILENCE = {  # libpq's names: a server that is gone without a word is given up after a minute
    "connect_timeout": 60, "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3,
    "tcp_user_timeout": 60_000,
}  # fmt: skip

_CONFIG_KEY, _ID_KEY = "effbert_run", "id"
_MAX_DIFFERENCES = 5
_NUMBER, _ARCHITECTURE, _KEY, _REASON, _RUNGS, _WORKER = (
    "number", "architecture", "key", "reason", "rungs", "worker"
)  # fmt: skip
KEPT = (_NUMBER, _ARCHITECTURE, _KEY, _RUNGS, _WORKER)


class TakenOver(Exception):
    """Another worker has gone on with a candidate, since this one was taken for dead: its result here is too much."""


class StorageLostError(OSError):
    """The storage of a run that goes on has failed; the message is one line that names it and says how to go on."""


@dataclass(frozen=True)
class Evaluation:
    """One candidate of a stage.

    number: the candidate's number in its stage, from 0. architecture: its text. state: "complete" (with a finite
    value), "pruned" (it did not get the whole budget), "failed" (attrs["reason"] says why) or "running" (open, in
    training or waiting for a worker). attrs: JSON values kept beside it; attrs["rungs"] its values on the rungs it was
    evaluated on, in their order.
    """

    number: int
    architecture: str
    value: float | None
    state: str
    attrs: dict


class Study:
    """The stages of one run.

    storage: the URL of a database, SQLAlchemy's way; "" for SQLite in output_dir. run_id: what tells this run from
    others; a database that holds another one's stages is refused. workers: this process among the run's workers.

    What fails once the storage was reached, here or in a stage, raises StorageLostError: every commit before it counts.
    """

    def __init__(self, output_dir: str | Path, storage: str = "", run_id: str = "", workers: Workers | None = None):
        self.output_dir, self.run_id, self.workers = Path(output_dir), run_id, workers or Workers(output_dir)
        self.url = storage
        self.where = without_password(storage) if storage else str(self.output_dir / STUDY_FILE)
        self._storage, self._heart = None, None

    def reach(self) -> set[str]:
        """Find out whether the storage can be used, and is not another run's; makes no stage. Returns the names of the
        stages that it has. ValueError as `stage`."""
        import optuna

        with _errors_in_one_line(self.where, self._storage is not None):
            self._storage = self._storage or self._open()
            begun = optuna.get_all_study_summaries(self._storage)
        for study in begun:
            self._refuse_foreign(study.study_name, study.user_attrs.get("run"), study.n_trials)
        return {study.study_name for study in begun}

    def stage(self, name: str) -> "StageStudy":
        """The study of one stage, made if it is not there. ValueError where the storage cannot be reached, is no study,
        or is another run's."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with _errors_in_one_line(self.where, self._storage is not None):
            self._storage = self._storage or self._open()
            study = optuna.create_study(
                study_name=name,
                storage=self._storage,
                sampler=optuna.samplers.RandomSampler(),
                direction="maximize",
                load_if_exists=True,
            )
            owner = study.user_attrs.get("run")
            trials = len(study.get_trials(deepcopy=False)) if owner is None else 0
        self._refuse_foreign(name, owner, trials)
        if self.run_id and owner is None:
            with _errors_in_one_line(self.where):
                study.set_user_attr("run", self.run_id)
        self._heart = self._heart or Heart(self._storage)
        return StageStudy(study, self.where, self.workers, self._heart)

    def _refuse_foreign(self, name: str, owner: str | None, trials: int) -> None:
        """A study without a run is one of this run's own, killed before its first candidate, if it is empty."""
        if self.run_id and owner != self.run_id and (owner is not None or trials):
            raise ValueError(f"{self.where}: holds the {name} of another search: give --storage a database of its own")

    def close(self) -> None:
        """No more heartbeats."""
        if self._heart is not None:
            self._heart.stop()

    def _open(self):
        from optuna.exceptions import ExperimentalWarning
        from optuna.storages import RDBStorage, RetryHeartbeatStaleTrialCallback

        if self.url:
            url, engine = self.url, engine_settings(self.url)
        else:
            # Connected by path, since a URL would give a meaning to ? and {} in a folder's name.
            path = (self.output_dir / STUDY_FILE).resolve()
            url = f"sqlite:///{STUDY_FILE}"
            engine = {"creator": partial(sqlite3.connect, path, check_same_thread=False, timeout=BUSY_SECONDS)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            return RDBStorage(
                url,
                engine_kwargs=engine,
                heartbeat_interval=HEARTBEAT_SECONDS,
                grace_period=GRACE_SECONDS,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True),
            )


class Heart:
    """The heartbeats of all trials that this process holds, from one thread that starts with the first."""

    def __init__(self, storage):
        self._storage, self._trials = storage, set()
        self._stopped, self._thread = threading.Event(), None

    def begin(self, trial_id: int) -> None:
        """Beat for a trial, the first time at once."""
        self._storage.record_heartbeat(trial_id)
        self._trials.add(trial_id)
        if self._thread is None:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()

    def end(self, trial_id: int) -> None:
        """Beat for it no more."""
        self._trials.discard(trial_id)

    def stop(self) -> None:
        """End the thread."""
        self._stopped.set()

    def _beat(self) -> None:
        while not self._stopped.wait(HEARTBEAT_SECONDS):
            for trial_id in tuple(self._trials):
                try:
                    self._storage.record_heartbeat(trial_id)
                except Exception as error:  # a missed beat is no harm, and what is broken shows at the next commit
                    warnings.warn(f"no heartbeat: {first_line(error)}", stacklevel=1)


class StageStudy:
    """The candidates of one stage: each is begun, taken by a worker, may report values on rungs, and is completed,
    pruned or failed. What ends or reports a candidate raises TakenOver where another worker has it by now."""

    def __init__(self, study, where: str, workers: Workers, heart: Heart):
        self._study, self._where, self._workers, self._heart = study, where, workers, heart
        self._storage = study._storage
        self._held: dict[int, int] = {}  # number -> trial id

    def evaluations(self) -> list[Evaluation]:
        """All candidates, by number."""
        return [_evaluation(trial) for _, trial in sorted(self._newest().items())]

    def best(self) -> Evaluation | None:
        """The complete candidate with the highest value, the first of equals; None if there is none."""
        complete = [evaluation for evaluation in self.evaluations() if evaluation.state == "complete"]
        return max(complete, key=lambda evaluation: (evaluation.value, -evaluation.number), default=None)

    def begin(self, number: int, architecture_text: str, key: str, **attrs) -> None:
        """Commit a candidate before its evaluation starts, JSON values beside it. ValueError if the number is taken."""
        for other in self.evaluations():
            if other.number == number:
                raise ValueError(f"{self._where}: cannot begin candidate {number}: it is {other.state}")
        import optuna

        attrs = {**attrs, _NUMBER: number, _ARCHITECTURE: architecture_text, _KEY: key}
        with _errors_in_one_line(self._where):
            self._study.add_trial(optuna.trial.create_trial(state=optuna.trial.TrialState.WAITING, user_attrs=attrs))

    def take(self, wanted: Sequence[int], most: int) -> list[int]:
        """The first `most` of the candidates `wanted` that nobody trains, and no others: they are this worker's until
        they have reported or ended."""
        from optuna.trial import TrialState

        self.free_abandoned()
        newest, taken = self._newest(), []
        for number in wanted:
            trial = newest.get(number)
            if len(taken) < most and trial is not None and trial.state == TrialState.WAITING:
                with _errors_in_one_line(self._where):
                    self._storage.set_trial_user_attr(trial._trial_id, _WORKER, self._workers.name)
                    self._heart.begin(trial._trial_id)
                    self._storage.set_trial_state_values(trial._trial_id, TrialState.RUNNING)
                self._held[number] = trial._trial_id
                taken.append(number)
        return taken

    def free_abandoned(self) -> None:
        """Let candidates wait again whose worker is dead. One of this machine that lives keeps its own whatever its
        heartbeats say: where the clock jumps, or the machine sleeps, they are old for all at once."""
        import optuna

        with _errors_in_one_line(self._where), warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            stale = set(self._storage._get_stale_trial_ids(self._study._study_id))
            for trial in self._newest().values():
                worker = trial.user_attrs.get(_WORKER, "")
                if trial.state != optuna.trial.TrialState.RUNNING:
                    continue
                if self._workers.is_gone(worker):
                    self._storage.set_trial_state_values(trial._trial_id, optuna.trial.TrialState.WAITING)
                elif trial._trial_id in stale and self._workers.is_here(worker):
                    self._storage.record_heartbeat(trial._trial_id)
            optuna.storages.fail_stale_trials(self._study)
            retry = self._storage.get_heartbeat_stale_trial_callback()
            for trial in self._newest().values():
                if _is_abandoned(trial):  # failed as stale by a worker that died before it could add another
                    retry(self._study, trial)

    def note(self, number: int, **attrs) -> None:
        """Commit JSON values beside an open candidate that nobody trains yet."""
        with self._open_trial(number) as trial_id:
            self._set(trial_id, number, attrs)

    def report(self, number: int, rung: int, value: float, **attrs) -> None:
        """Commit the value of an open candidate on a rung, finite, higher is better, and JSON values beside it. It
        waits then, for whoever takes it for the next rung."""
        from optuna.trial import TrialState

        _check_finite(number, value)
        with self._open_trial(number) as trial_id:
            self._set(trial_id, number, attrs)
            self._storage.set_trial_state_values(trial_id, TrialState.WAITING)  # first: killed here, it is done again
            self._storage.set_trial_intermediate_value(trial_id, rung, float(value))

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

        with self._open_trial(number) as trial_id:
            self._set(trial_id, number, attrs)
            self._storage.set_trial_state_values(trial_id, TrialState[state], None if value is None else [value])

    def _set(self, trial_id: int, number: int, attrs: dict) -> None:
        for name, attr in attrs.items():
            if name in KEPT:
                raise ValueError(f"candidate {number}: {name!r} is kept already; name the attribute otherwise")
            json.dumps(attr)
        for name, attr in attrs.items():
            self._storage.set_trial_user_attr(trial_id, name, attr)

    @contextmanager
    def _open_trial(self, number: int) -> Iterator[int]:
        """The trial of an open candidate that this worker holds or nobody does; after the body it is held no more."""
        from optuna.exceptions import UpdateFinishedTrialError

        held, trial = self._held.get(number), self._newest().get(number)
        if trial is None or (trial.state.is_finished() and held is None):
            raise ValueError(f"{self._where}: candidate {number} is not open; begin it first")
        here = trial.user_attrs.get(_WORKER) == self._workers.name or trial.state.name != "RUNNING"
        if held not in (None, trial._trial_id) or not here:
            self._release(number)
            raise TakenOver(f"candidate {number} is another worker's by now")
        with _errors_in_one_line(self._where):
            try:
                yield trial._trial_id
            except UpdateFinishedTrialError:
                self._release(number)
                raise TakenOver(f"candidate {number} is another worker's by now") from None
        self._release(number)

    def _release(self, number: int) -> None:
        self._heart.end(self._held.pop(number, -1))

    def _newest(self) -> dict[int, object]:
        """The trials that count, by candidate: of one that was retried the newest."""
        with _errors_in_one_line(self._where):
            return {trial.user_attrs[_NUMBER]: trial for trial in self._study.get_trials(deepcopy=False)}


class RunFolder:
    """An output directory that this process joins as a worker: a context manager, until it is left.

    The folder is made if need be, and config.json (the configuration, JSON values, and an id) written into it.
    ValueError, in one line, where the folder cannot be made or written, holds something else, or holds a run with
    another configuration (the differences are named). say: gets a line where another worker has to be waited for.
    by_content: names of the configuration's paths that may be spelt otherwise, since what they hold is compared
    (`effbert.workspace.check_inputs`). id: of the run. workers: this process and those beside it.
    """

    def __init__(
        self,
        output_dir: str | Path,
        config: dict,
        say: Callable[[str], None] = lambda text: None,
        by_content: Sequence[str] = (),
    ):
        self.path, self.by_content = Path(output_dir), by_content
        config = json.loads(json.dumps(config, default=str))
        self._abandoned = False
        try:
            self._refuse_foreign()
            self._made = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self.workers = Workers(self.path, say)
            self.workers.join()
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be used as --output_dir: {(error.strerror or str(error)).lower()}"
            ) from error
        try:
            with self.workers.turn(JOINING):
                self._settle(config)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def abandon(self) -> None:
        """Empty the folder again, if this call began the run and no other has joined: its input would not do, and
        nothing is lost by it. What is left of it goes as this call leaves, folders too that it made."""
        if self.is_new and not self.workers.others():
            self._abandoned = True
            for entry in self.path.iterdir():
                if entry.name != FOLDER:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()

    def close(self) -> None:
        """Leave."""
        self.workers.leave()
        if self._abandoned:
            with suppress(OSError):  # another has joined since
                self.workers.clear_away()
                for folder in self._made:
                    folder.rmdir()

    def _refuse_foreign(self) -> None:
        there = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        if self._stored() is None:  # asked last: another worker may be making config.json
            for entry in there:
                if entry != FOLDER and not entry.startswith(PARTIAL):
                    raise ValueError(
                        f"{self.path} holds something else ({entry}); give an empty or a new folder as --output_dir"
                    )

    def _stored(self) -> dict | None:
        try:
            content = json.loads((self.path / CONFIG_FILE).read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return None
        return content if isinstance(content, dict) and isinstance(content.get(_CONFIG_KEY), dict) else None

    def _settle(self, config: dict) -> None:
        stored = self._stored()
        self.is_new = stored is None
        if self.is_new:
            stored = {_CONFIG_KEY: config, _ID_KEY: secrets.token_hex(8)}
            write_atomic(self.path / CONFIG_FILE, json.dumps(stored, indent=2) + "\n")
        differences = _differences(stored[_CONFIG_KEY], config, self.by_content)
        if differences:
            raise ValueError(
                f"{self.path} holds a run with another configuration: {differences}; "
                "use another --output_dir or the same configuration"
            )
        self.id = stored.get(_ID_KEY, "")


def _check_finite(number: int, value: float) -> None:
    if not math.isfinite(value):
        raise ValueError(f"candidate {number}: its value is {value}; a candidate without a finite value has failed")


def _is_abandoned(trial) -> bool:
    """Whether a trial was failed by heartbeats alone: no reason stands beside it."""
    return trial.state.name == "FAIL" and _REASON not in trial.user_attrs


def _evaluation(trial) -> Evaluation:
    rungs = [trial.intermediate_values[rung] for rung in sorted(trial.intermediate_values)]
    return evaluation_of(
        trial.user_attrs, trial.state.name, trial.value if trial.state.name == "COMPLETE" else None, rungs
    )


def evaluation_of(user_attrs: dict, state: str, value: float | None, rungs: list[float]) -> Evaluation:
    """A candidate from what the storage says of its newest trial: Optuna's name of the state, values on rungs."""
    states = {"COMPLETE": "complete", "PRUNED": "pruned", "RUNNING": "running", "WAITING": "running"}
    state = states.get(state) or ("failed" if _REASON in user_attrs else "running")  # FAIL, perhaps by heartbeats alone
    finished = [value] if state == "complete" else []
    attrs = {name: attr for name, attr in user_attrs.items() if name not in KEPT}
    attrs[_RUNGS] = rungs + finished
    return Evaluation(user_attrs[_NUMBER], user_attrs[_ARCHITECTURE], value if finished else None, state, attrs)


def engine_settings(url: str) -> dict:
    """SQLAlchemy's settings for a database's URL: SQLite waits for other workers, a lost connection is made anew, and a
    silent PostgreSQL given up, unless the URL says when."""
    from sqlalchemy.engine import make_url

    connect = {}
    if url.startswith("sqlite"):
        connect = {"timeout": BUSY_SECONDS}
    elif url.startswith(("postgresql:", "postgresql+psycopg")):
        connect = {name: value for name, value in SILENCE.items() if name not in make_url(url).query}
    return {"pool_pre_ping": True, "connect_args": connect}


@contextmanager
def _errors_in_one_line(where: str, reached: bool = True) -> Iterator[None]:
    """A database's errors become one line each: DiskFullError; StorageLostError where it was `reached` before, or else
    ValueError, for one out of reach or no study."""
    import optuna
    import sqlalchemy.exc

    try:
        yield
    except ImportError as error:
        raise ValueError(f"{where}: needs a driver that is not installed: {first_line(error)}") from error
    except (optuna.exceptions.StorageInternalError, sqlalchemy.exc.SQLAlchemyError, RuntimeError, KeyError) as error:
        cause = error.__cause__ or error
        cause = getattr(cause, "orig", None) or cause
        reason = first_line(cause)
        if "disk is full" in reason:
            raise DiskFullError(f"{where}: no space left on device; nothing already written was lost") from error
        if not reached:
            raise ValueError(f"{where}: cannot be used as a study: {reason}") from error
        if getattr(cause, "sqlite_errorname", "") == "SQLITE_READONLY_DBMOVED":
            reason = "its file was deleted, moved or replaced"
        raise StorageLostError(
            f"{where}: this run's study does not answer any more: {reason}; when it is back, the same command goes on "
            "from its last commit"
        ) from error


def _differences(there: dict, here: dict, but: Sequence[str] = ()) -> str:
    old, new = dict(_flat(there)), dict(_flat(here))
    names = [name for name in {**old, **new} if old.get(name, _Absent) != new.get(name, _Absent) and name not in but]
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
