"""Several workers: turns, who lives and who is dead, candidates taken, taken over and never counted twice; storages."""

import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from effbert.config import SearchConfig, SearchStage, as_dict, published, without_password
from effbert.files import PARTIAL
from effbert.search import record
from effbert.search import study as study_module
from effbert.search.population import Evaluator, Outcome
from effbert.search.progress import Reporter
from effbert.search.record import read_record
from effbert.search.stages import run_cohort
from effbert.search.study import RunFolder, StorageLostError, Study, TakenOver, engine_settings
from effbert.search.workers import Workers

FORK = multiprocessing.get_context("fork")


def opened(folder, workers=None, storage="", run_id=""):
    return Study(folder, storage, run_id, workers).stage("stage1")


def running(stage):
    return [evaluation.number for evaluation in stage.evaluations() if evaluation.state == "running"]


def _hold_turn(folder, ready, seconds):
    with Workers(folder) as workers, workers.turn("the supernet"):
        ready.set()
        time.sleep(seconds)
        (folder / "made").touch()


def test_a_turn_waits_for_the_one_before_and_says_for_whom(tmp_path):
    ready, said = FORK.Event(), []
    process = FORK.Process(target=_hold_turn, args=(tmp_path, ready, 0.5))
    process.start()
    assert ready.wait(60)
    workers = Workers(tmp_path, said.append)
    with workers.turn("the supernet"), workers.turn("the supernet"):
        assert (tmp_path / "made").exists()
    process.join()
    (line,) = said
    assert f".{process.pid}." in line and line.endswith(": the supernet")


def test_who_joins_a_run_is_told_for_whom_it_waits(tmp_path):
    with RunFolder(tmp_path, {}):
        ready, said = FORK.Event(), []
        process = FORK.Process(target=_hold_turn, args=(tmp_path, ready, 0.5))
        process.start()
        assert ready.wait(60)
        with RunFolder(tmp_path, {}, said.append):
            assert (tmp_path / "made").exists()
        process.join()
    assert len(said) == 1 and said[0].endswith(": the supernet")


def test_a_worker_that_leaves_or_begins_the_run_while_another_joins_is_no_error(tmp_path, monkeypatch):
    listed = Path.iterdir

    def slowly(folder):
        if folder == tmp_path:
            (tmp_path / "config.json").write_text('{"effbert_run": {}}')
        entries = list(listed(folder))
        for entry in entries:
            if entry.name.startswith("dead"):
                entry.unlink()
        return iter(entries)

    (tmp_path / ".workers").mkdir()
    (tmp_path / ".workers" / "dead.1.abcd").touch()
    monkeypatch.setattr(Path, "iterdir", slowly)
    with RunFolder(tmp_path, {}) as run:
        assert not run.is_new


def test_a_turn_ends_with_its_holder_however_it_ends(tmp_path):
    ready = FORK.Event()
    process = FORK.Process(target=_hold_turn, args=(tmp_path, ready, 600))
    process.start()
    assert ready.wait(60)
    workers = Workers(tmp_path)
    (other,) = workers.others()
    assert not workers.is_gone(other)
    process.kill()
    with workers.turn("the supernet"):
        assert workers.others() == [] and workers.is_gone(other)
    assert not (tmp_path / "made").exists()
    process.join()


def test_nothing_is_known_here_of_a_worker_of_another_machine(tmp_path):
    workers = Workers(tmp_path)
    assert not workers.is_gone("elsewhere.example.org.123.abcd")
    assert workers.is_gone(f"{workers.machine}.123.abcd") and not workers.is_gone(workers.name)


def test_a_candidate_is_one_workers_until_it_has_reported(tmp_path):
    with Workers(tmp_path) as first, Workers(tmp_path) as second:
        one, two = opened(tmp_path, first), opened(tmp_path, second)
        for number in range(4):
            one.begin(number, f"text {number}", f"key {number}")
        assert one.take(range(4), 3) == [0, 1, 2]
        assert two.take(range(4), 3) == [3]
        with pytest.raises(TakenOver, match="candidate 0 is another worker's by now"):
            two.complete(0, 0.5)
        one.report(0, 0, 0.25)
        assert two.take([0], 1) == [0]
        two.complete(0, 0.75)
        assert one.evaluations()[0].value == 0.75 and one.evaluations()[0].attrs["rungs"] == [0.25, 0.75]


def test_what_another_worker_reports_while_one_waits_for_its_turn_is_not_trained_again(tmp_path):
    """Seen as due before the turn and reported by then, a candidate waits for the next rung, not for this one."""
    settings = SearchStage(cohort=2, rungs=(0.5, 1.0))
    members = [(number, published(6)) for number in range(2)]
    trained = []

    class Late(Workers):
        waiting = False

        @contextmanager
        def turn(self, what):
            if self.waiting:
                self.waiting = False
                one.report(0, 0, 0.25)
                one.report(1, 0, 0.5)
            with super().turn(what):
                yield

    def evaluate(group, share):
        for number, _ in group:
            trained.append((number, share))
            yield number, Outcome(0.75, {"parameters": 1})

    with Workers(tmp_path) as first, Late(tmp_path) as second, Reporter() as reporter:
        one, two = opened(tmp_path, first), opened(tmp_path, second)
        for number, _ in members:
            one.begin(number, "text", f"key {number}")
        assert one.take(range(2), 2) == [0, 1]
        second.waiting = True
        keys = SimpleNamespace(key=str)
        run_cohort(two, members, keys, settings, Evaluator(len, evaluate), reporter.stage("stage1", 2, 0), second)
        assert trained == [(1, 1.0)]
        assert [evaluation.state for evaluation in two.evaluations()] == ["pruned", "complete"]


def _take_and_die(folder, taken):
    with Workers(folder) as workers:
        taken.put(opened(folder, workers).take(range(3), 2))
        taken.close()
        taken.join_thread()
        os.kill(os.getpid(), signal.SIGKILL)


def test_the_candidates_of_a_dead_worker_are_taken_by_another(tmp_path):
    with Workers(tmp_path) as workers:
        stage = opened(tmp_path, workers)
        for number in range(3):
            stage.begin(number, "text", f"key {number}")
        stage.take([0], 1)
        stage.report(0, 0, 0.5, seconds=2.0)
        taken = FORK.Queue()
        process = FORK.Process(target=_take_and_die, args=(tmp_path, taken))
        process.start()
        assert taken.get(timeout=60) == [0, 1]
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert stage.take(range(3), 3) == [0, 1, 2]
        assert stage.evaluations()[0].attrs == {"rungs": [0.5], "seconds": 2.0}


def test_without_heartbeats_a_worker_elsewhere_is_taken_for_dead_and_its_late_result_is_not_counted(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(study_module, "HEARTBEAT_SECONDS", 1)
    monkeypatch.setattr(study_module, "GRACE_SECONDS", 2)
    with Workers(tmp_path) as here, Workers(tmp_path) as there:
        there.machine, there.name = "elsewhere", "elsewhere.1.abcd"
        far_study = Study(tmp_path, workers=there)
        near, far = opened(tmp_path, here), far_study.stage("stage1")
        far.begin(0, "text", "key")
        assert far.take([0], 1) == [0]
        time.sleep(4)
        assert near.take([0], 1) == []  # it beats
        far_study.close()
        deadline = time.monotonic() + 60
        while not near.take([0], 1):
            assert time.monotonic() < deadline
            time.sleep(0.5)
        with pytest.raises(TakenOver):
            far.complete(0, 0.1)
        near.complete(0, 0.9)
        (found,) = near.evaluations()
        assert (found.state, found.value) == ("complete", 0.9)
        assert read_candidates(tmp_path) == [(0, "complete", 0.9)]


def read_candidates(folder, storage=""):
    """As the report reads them."""
    (folder / "config.json").write_text('{"effbert_run": {}}')
    return [(e.number, e.state, e.value) for e in read_record(folder, storage).stages["stage1"]]


def test_a_death_between_failing_a_stale_candidate_and_its_retry_loses_nothing(tmp_path):
    from optuna.trial import TrialState

    with Workers(tmp_path) as workers:
        stage = opened(tmp_path, workers)
        stage.begin(0, "text", "key")
        stage.take([0], 1)
        (trial,) = stage._study.get_trials()
        stage._storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)
        assert running(stage) == [0]
        assert opened(tmp_path, workers).take([0], 1) == [0]
        assert read_candidates(tmp_path) == [(0, "running", None)]


def test_a_clock_that_jumps_takes_no_candidate_from_a_worker_that_lives(tmp_path):
    """An hour forward, as after a sleep of the machine: all heartbeats are old at once."""
    with Workers(tmp_path) as first, Workers(tmp_path) as second:
        one, two = opened(tmp_path, first), opened(tmp_path, second)
        for number in range(2):
            one.begin(number, "text", f"key {number}")
        one.take([0], 1)
        two.take([1], 1)
        with sqlite3.connect(tmp_path / "study.db") as database:
            changed = database.execute("UPDATE trial_heartbeats SET heartbeat = datetime(heartbeat, '-1 hour')")
            assert changed.rowcount == 2
        assert opened(tmp_path, second).take([0, 1], 2) == []
        one.complete(0, 0.5)
        two.complete(1, 0.25)
        assert [found.value for found in one.evaluations()] == [0.5, 0.25]


def test_a_storage_that_cannot_be_reached_is_one_line_without_the_password(tmp_path):
    url = "postgresql+psycopg://me:secret@127.0.0.1:1/none"
    pytest.importorskip("psycopg", reason="needs psycopg, the PostgreSQL driver")
    with pytest.raises(ValueError, match="cannot be used as a study") as caught:
        opened(tmp_path, storage=url)
    message = str(caught.value)
    assert "me:***@127.0.0.1:1/none" in message and "secret" not in message and "\n" not in message


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("no url", "--storage is not the URL of a database"),
        ("nodatabase://x", "nodatabase://x: cannot be used as a study: Can't load plugin"),
        ("oracle://x", "oracle://x: needs a driver that is not installed"),
    ],
)
def test_a_storage_that_is_none_is_one_line(tmp_path, url, message):
    with pytest.raises(ValueError, match=message) as caught:
        opened(tmp_path, storage=url)
    assert "\n" not in str(caught.value)


def test_the_storage_of_another_search_is_refused(tmp_path):
    url = f"sqlite:///{tmp_path}/shared.db"
    opened(tmp_path, storage=url, run_id="one").begin(0, "text", "key")
    assert len(opened(tmp_path, storage=url, run_id="one").evaluations()) == 1
    with pytest.raises(ValueError, match=r"shared\.db: holds the stage1 of another search"):
        opened(tmp_path, storage=url, run_id="two")
    Study(tmp_path, url, "one").reach()
    with pytest.raises(ValueError, match="of another search"):
        Study(tmp_path, url, "two").reach()


def test_a_database_with_the_studies_of_something_else_is_refused_and_left_alone(tmp_path):
    import optuna

    url = f"sqlite:///{tmp_path}/shared.db"
    other = optuna.create_study(study_name="prices", storage=url)
    other.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(ValueError, match=r"shared\.db: holds the prices of another search"):
        Study(tmp_path, url, "one").reach()
    assert optuna.load_study(study_name="prices", storage=url).user_attrs == {}


def test_what_another_worker_is_writing_is_no_part_of_the_record(tmp_path):
    (tmp_path / "config.json").write_text('{"effbert_run": {}}')
    for name, text in (("supernet", '{"seconds": 1.0}'), (f"{PARTIAL}0a-teacher", '{"sec')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text(text)
    assert read_record(tmp_path).training == {"supernet": {"seconds": 1.0}}


@pytest.mark.parametrize("named", [False, True])
def test_sqlite_waits_for_another_worker_whether_its_file_is_named_or_not(tmp_path, named):
    url = f"sqlite:///{tmp_path}/study.db" if named else ""
    opened(tmp_path, storage=url)
    for engine in (Study(tmp_path, url)._open().engine, record._engine(tmp_path, url)):
        with engine.connect() as connection:
            assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 1000 * study_module.BUSY_SECONDS


def test_a_failed_start_leaves_its_storage_to_the_corrected_one(tmp_path, capsys):
    from effbert.__main__ import main

    url = f"sqlite:///{tmp_path}/kept.db"
    command = ["search", "--preset", "smoke", "--output_dir", str(tmp_path / "run"), "--storage", url]
    for _ in range(2):
        assert main([*command, "--corpus", "none.txt"]) == 2
        assert "none.txt" in capsys.readouterr().err


def test_a_run_keeps_its_storage_without_the_password_and_refuses_another_one(tmp_path):
    def config(url):
        return as_dict(SearchConfig(output_dir="", storage=url))

    with RunFolder(tmp_path, config("postgresql://me:secret@host/name")):
        pass
    assert "secret" not in (tmp_path / "config.json").read_text()
    with RunFolder(tmp_path, config("postgresql://me:changed@host/name")) as run:
        assert run.id
    with pytest.raises(ValueError, match="storage"), RunFolder(tmp_path, config("postgresql://host/other")):
        pass
    assert without_password("sqlite:////a/b.db") == "sqlite:////a/b.db"
    assert "secret" not in without_password("postgresql://host/name?password=secret&sslpassword=secret&user=me")


def test_a_relative_storage_is_one_file_wherever_a_worker_starts(tmp_path, monkeypatch):
    def config(url):
        return as_dict(SearchConfig(output_dir="", storage=url))

    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    with RunFolder(tmp_path / "run", config("sqlite:///rel.db?timeout=5")) as run:
        first = run.id
    monkeypatch.chdir(tmp_path / "below")
    for url in ("sqlite:///../rel.db?timeout=5", f"sqlite:///{tmp_path}/rel.db?timeout=5"):
        with RunFolder(tmp_path / "run", config(url)) as run:
            assert run.id == first
    there, here = f"storage: sqlite:///{tmp_path}/rel.db", f"sqlite:///{tmp_path}/below/rel.db"
    with pytest.raises(ValueError, match=rf"{there}.* there, {here}"):
        RunFolder(tmp_path / "run", config("sqlite:///rel.db?timeout=5"))


@pytest.mark.parametrize(
    "url",
    [
        "",
        "sqlite:////a/../b.db",
        "sqlite:///file:/a/b.db?uri=true",
        "sqlite:////a/:memory:/b.db",
        "postgresql+psycopg://me:secret@host/name",
    ],
)
def test_other_storages_stay_as_they_are_given(url):
    assert SearchConfig(output_dir="", storage=url).storage == url


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///file:a?mode=memory&uri=true"])
def test_a_storage_that_no_other_worker_finds_is_refused(url):
    with pytest.raises(ValueError, match=f"^--storage {re.escape(url)} keeps the study in one process's memory"):
        SearchConfig(output_dir="", storage=url)


def test_a_postgresql_that_is_gone_without_a_word_is_given_up(tmp_path):
    patient = engine_settings("postgresql+psycopg://me@host/name")["connect_args"]
    assert patient["connect_timeout"] == 60 and patient["keepalives_idle"] < 60
    own = engine_settings("postgresql://me@host/name?connect_timeout=5")["connect_args"]
    assert own == {name: value for name, value in patient.items() if name != "connect_timeout"}
    assert engine_settings("postgresql+pg8000://me@host/name")["connect_args"] == {}


class Server:
    """A PostgreSQL of this test's own in `folder`, stopped and started at will."""

    def __init__(self, folder, as_user):
        self.folder, self.as_user = folder, as_user
        self.url = f"postgresql+psycopg://effbert@/postgres?host={folder}"

    def start(self):
        self.process = subprocess.Popen(
            ["postgres", "-D", self.folder / "data", "-k", self.folder, "-c", "listen_addresses="],
            cwd="/", stderr=subprocess.DEVNULL, **self.as_user,
        )  # fmt: skip
        _await(self.url)

    def stop(self):
        self.process.send_signal(signal.SIGINT)  # a fast shutdown: it does not wait for connections to end
        self.process.wait(60)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A running one."""
    pytest.importorskip("psycopg", reason="needs psycopg, the PostgreSQL driver")
    if not (shutil.which("initdb") and shutil.which("postgres")):
        pytest.skip("needs PostgreSQL's initdb and postgres in PATH")
    folder = tmp_path_factory.mktemp("pg")
    as_user = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        as_user = {"user": "nobody"}
        for path in (folder, *folder.parents):
            if path == path.parent or path.owner() != "root" or str(path) == "/tmp":
                break
            path.chmod(path.stat().st_mode | 0o055)
        shutil.chown(folder, "nobody")
    made = subprocess.run(
        ["initdb", "-D", folder / "data", "-U", "effbert", "--auth=trust"],
        cwd="/",
        capture_output=True,
        text=True,
        **as_user,
    )
    if made.returncode:
        pytest.skip(f"initdb does not work here: {made.stderr.strip().splitlines()[-1]}")
    found = Server(folder, as_user)
    try:
        found.start()
        yield found
    finally:
        found.stop()


@pytest.fixture
def postgresql(server):
    """Its URL."""
    return server.url


def _await(url):
    import sqlalchemy

    engine, deadline = sqlalchemy.create_engine(url), time.monotonic() + 60
    while True:
        try:
            engine.connect().close()
            return engine.dispose()
        except sqlalchemy.exc.OperationalError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_real_postgresql_holds_a_study(tmp_path, postgresql):
    with Workers(tmp_path) as first, Workers(tmp_path) as second:
        one, two = (opened(tmp_path, workers, postgresql, "this") for workers in (first, second))
        for number in range(3):
            one.begin(number, f"text {number}", f"key {number}")
        assert (one.take(range(3), 2), two.take(range(3), 2)) == ([0, 1], [2])
        one.report(0, 0, 0.25, hits="x" * 100_000, scores={"accuracy": 0.25})
        two.complete(2, 0.5)
        one.fail(1, "diverged")
        assert two.take([0], 1) == [0]
        two.prune(0)
        expected = [(0, "pruned", None), (1, "failed", None), (2, "complete", 0.5)]
        assert [(e.number, e.state, e.value) for e in one.evaluations()] == expected
        assert read_candidates(tmp_path, postgresql) == expected
    with pytest.raises(ValueError, match="holds the stage1 of another search"):
        opened(tmp_path, storage=postgresql, run_id="other")


def test_a_real_postgresql_that_stops_is_one_line_and_goes_on_when_it_answers_again(tmp_path, server):
    study = Study(tmp_path, server.url, "stopped")
    stage = study.stage("stopping")
    for number in range(2):
        stage.begin(number, f"text {number}", f"key {number}")
    assert stage.take([0, 1], 2) == [0, 1]
    stage.complete(0, 0.5)
    server.stop()
    try:
        for attempt in (lambda: stage.complete(1, 0.25), stage.evaluations, lambda: study.stage("further")):
            with pytest.raises(StorageLostError) as caught:
                attempt()
            said = str(caught.value)
            assert (
                said.startswith(f"{without_password(server.url)}: this run's study does not answer any more: ")
                and "\n" not in said
            )
            assert said.endswith("when it is back, the same command goes on from its last commit")
        with pytest.raises(ValueError, match="cannot be used as a study"):
            Study(tmp_path, server.url, "stopped").reach()
    finally:
        server.start()
    stage.complete(1, 0.25)
    again = Study(tmp_path, server.url, "stopped").stage("stopping")
    assert [(e.number, e.state, e.value) for e in again.evaluations()] == [(0, "complete", 0.5), (1, "complete", 0.25)]
    study.close()


def test_a_turn_is_of_the_file_that_is_there(tmp_path, monkeypatch):
    first, second = Workers(tmp_path), Workers(tmp_path)
    first.join()
    real, cleared = Workers._wait_for, []

    def late(workers, file):
        if workers is second and not cleared:  # has opened the file, and not locked it yet
            first.leave()
            cleared.append(first.clear_away())
        real(workers, file)

    monkeypatch.setattr(Workers, "_wait_for", late)
    with second:
        assert cleared and {file.name for file in (tmp_path / ".workers").iterdir()} == {"turn", second.name}
