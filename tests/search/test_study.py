"""The study and its folder: commits, kill -9, resume, other configurations, foreign folders."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import sqlite3
from pathlib import Path
from types import SimpleNamespace
from wsgiref.util import setup_testing_defaults

import optuna_dashboard
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effbert.architecture import Architecture
from effbert.files import DiskFullError
from effbert.search import study as study_module
from effbert.search import workers as workers_module
from effbert.search.final import Row, is_finished
from effbert.search.run import tidy
from effbert.search.study import Evaluation, RunFolder, StorageLostError, Study
from effbert.search.workers import Workers

COUNT = 3
CONFIG = {"seed": 1, "teacher": {"learning_rate": 1e-4, "layers": [6, 96]}, "corpus": None}


def value_of(number):
    return 0.1 + (number * 7 % 5) / 3


def finished(stage):
    return [evaluation for evaluation in stage.evaluations() if evaluation.state != "running"]


def pending(stage):
    return [evaluation for evaluation in stage.evaluations() if evaluation.state == "running"]


def run_stage(stage, count):
    """A stage's loop: an open candidate first, then new ones; candidate 2 fails."""
    for number in range(len(finished(stage)), count):
        if not pending(stage):
            stage.begin(number, f"text {number}", f"key {number}")
        else:
            (there,) = pending(stage)
            assert there == Evaluation(number, f"text {number}", None, "running", there.attrs)
        if number == 2:
            stage.fail(number, "diverged")
        else:
            stage.complete(number, value_of(number), epochs=[{"accuracy": value_of(number)}], parameters=7)


def test_evaluations_come_back_in_order_with_exact_values_and_attributes(tmp_path):
    run_stage(Study(tmp_path).stage("stage1"), 4)
    evaluations = Study(tmp_path).stage("stage1").evaluations()
    assert [evaluation.number for evaluation in evaluations] == [0, 1, 2, 3]
    assert [evaluation.state for evaluation in evaluations] == ["complete", "complete", "failed", "complete"]
    assert [evaluation.value for evaluation in evaluations] == [value_of(0), value_of(1), None, value_of(3)]
    assert evaluations[1].attrs == {"epochs": [{"accuracy": value_of(1)}], "parameters": 7, "rungs": [value_of(1)]}
    assert evaluations[2].attrs == {"reason": "diverged", "rungs": []}
    assert evaluations[3].architecture == "text 3"


def test_a_candidate_is_pending_from_begin_until_it_has_a_value(tmp_path):
    stage = Study(tmp_path).stage("stage1")
    assert stage.evaluations() == [] and stage.best() is None
    stage.begin(0, "text", "key")
    reopened = Study(tmp_path).stage("stage1")
    assert pending(reopened) == [Evaluation(0, "text", None, "running", {"rungs": []})]
    assert reopened.best() is None
    reopened.complete(0, 0.5)
    assert pending(Study(tmp_path).stage("stage1")) == []


def test_several_are_open_and_their_rungs_are_kept_as_they_come(tmp_path):
    stage = Study(tmp_path).stage("stage1")
    for number in range(3):
        stage.begin(number, f"text {number}", f"key {number}")
        stage.report(number, 0, number / 10, seconds=1.5)
    stage.prune(1)
    stage.complete(2, 0.7)
    reopened = Study(tmp_path).stage("stage1").evaluations()
    assert [evaluation.state for evaluation in reopened] == ["running", "pruned", "complete"]
    assert [evaluation.attrs["rungs"] for evaluation in reopened] == [[0.0], [0.1], [0.2, 0.7]]
    assert [evaluation.value for evaluation in reopened] == [None, None, 0.7]
    assert reopened[1].attrs["seconds"] == 1.5 and stage.best().number == 2


def test_a_rung_value_that_is_not_finite_is_refused(tmp_path):
    stage = Study(tmp_path).stage("stage1")
    stage.begin(0, "text", "key")
    with pytest.raises(ValueError, match="its value is nan"):
        stage.report(0, 0, float("nan"))


def test_best_is_the_first_of_the_highest(tmp_path):
    stage = Study(tmp_path).stage("stage1")
    for number, value in enumerate([0.2, 0.9, None, 0.9]):
        stage.begin(number, str(number), str(number))
        stage.fail(number, "diverged") if value is None else stage.complete(number, value)
    assert stage.best().number == 1


def test_stages_do_not_see_each_other(tmp_path):
    study = Study(tmp_path)
    run_stage(study.stage("stage1"), 3)
    assert study.stage("stage2").evaluations() == []


def test_a_folder_may_have_any_name(tmp_path):
    folder = tmp_path / "a?b {c} %41 #d"
    folder.mkdir()
    run_stage(Study(folder).stage("stage1"), 1)
    assert os.listdir(folder) == ["study.db"]


def test_misuse_is_refused_and_changes_nothing(tmp_path):
    stage = Study(tmp_path).stage("stage1")
    stage.begin(0, "text", "key")
    with pytest.raises(ValueError, match="cannot begin candidate 0: it is running"):
        stage.begin(0, "text", "key")
    with pytest.raises(ValueError, match="candidate 1 is not open"):
        stage.complete(1, 0.5)
    with pytest.raises(ValueError, match="finite"):
        stage.complete(0, float("nan"))
    with pytest.raises(ValueError, match="'key' is kept already"):
        stage.complete(0, 0.5, key="other")
    assert [evaluation.number for evaluation in pending(stage)] == [0]
    stage.complete(0, 0.5)
    with pytest.raises(ValueError, match="candidate 0 is not open"):
        stage.complete(0, 0.6)
    with pytest.raises(ValueError, match="it is complete"):
        stage.begin(0, "text", "key")


class KillBeforeCommit:
    """A connection factory whose connections kill the process with SIGKILL instead of the n-th commit that writes."""

    def __init__(self, commits_left):
        self.left = commits_left

    def __call__(self, path, **kwargs):
        outer = self

        class Connection(sqlite3.Connection):
            def commit(self):
                outer.left -= self.in_transaction
                if outer.left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                super().commit()

        return sqlite3_connect(path, factory=Connection, **kwargs)


sqlite3_connect = sqlite3.connect


def _killed_run(folder, commits):
    study_module.sqlite3.connect = KillBeforeCommit(commits)
    run_stage(Study(folder).stage("stage1"), COUNT)


def kill_at(folder, commits):
    """Runs the stage in a process that dies at its n-th writing commit; False if it finished before."""
    process = multiprocessing.get_context("fork").Process(target=_killed_run, args=(folder, commits))
    process.start()
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


def assert_same_study(folder, undisturbed):
    stage = Study(folder).stage("stage1")
    run_stage(stage, COUNT)
    assert stage.evaluations() == undisturbed and pending(stage) == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run_stage(Study(folder).stage("stage1"), COUNT)
    return Study(folder).stage("stage1").evaluations()


@pytest.mark.parametrize("commits", [0, 1, 2])
def test_kill_9_while_the_study_is_made_leaves_one_that_resumes(tmp_path, undisturbed, commits):
    assert kill_at(tmp_path, commits)
    assert_same_study(tmp_path, undisturbed)


def test_kill_9_at_any_commit_leaves_a_study_that_resumes(tmp_path, undisturbed):
    made = tmp_path / "made"
    made.mkdir()
    Study(made).stage("stage1")
    died, commits, left = True, 0, set()
    while died:
        folder = shutil.copytree(made, tmp_path / str(commits))
        died = kill_at(folder, commits)
        stage = Study(folder).stage("stage1")
        left.add((len(finished(stage)), bool(pending(stage))))
        assert_same_study(folder, undisturbed)
        commits += 1
    assert left == {(done, open_) for done in range(COUNT) for open_ in (False, True)} | {(COUNT, False)}


def test_kill_9_again_and_again_in_the_same_folder_still_ends_the_same(tmp_path, undisturbed):
    deaths = 0
    while kill_at(tmp_path, 6):
        deaths += 1
        assert deaths < 40
    assert deaths > 0
    assert_same_study(tmp_path, undisturbed)


def test_a_file_that_is_no_study_is_one_line(tmp_path):
    (tmp_path / "study.db").write_bytes(b"something else\n" * 100)
    with pytest.raises(ValueError, match="cannot be used as a study: file is not a database") as caught:
        Study(tmp_path).stage("stage1")
    assert str(tmp_path / "study.db") in str(caught.value) and "\n" not in str(caught.value)


def test_a_full_disk_is_one_line_and_the_candidate_stays_pending(tmp_path, monkeypatch):
    Study(tmp_path).stage("stage1").begin(0, "text", "key")

    def connect(path, **kwargs):
        connection = sqlite3_connect(path, **kwargs)
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count = {pages}")
        return connection

    monkeypatch.setattr(study_module.sqlite3, "connect", connect)
    with pytest.raises(DiskFullError, match=r"study\.db: no space left on device") as caught:
        Study(tmp_path).stage("stage1").complete(0, 0.5, log="x" * 1_000_000)
    assert "\n" not in str(caught.value)
    monkeypatch.undo()
    assert pending(Study(tmp_path).stage("stage1")) == [Evaluation(0, "text", None, "running", {"rungs": []})]


def _deleted(path):
    path.unlink()


def _replaced(path):
    path.with_name("other").write_bytes(b"something else\n" * 1000)
    os.replace(path.with_name("other"), path)


def _overwritten(path):
    path.write_bytes(b"something else\n" * (path.stat().st_size // 15))


def _emptied(path):
    os.truncate(path, 0)


def _locked(path):
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    return holder


@pytest.mark.parametrize(
    "damage, reason",
    [
        (_deleted, "its file was deleted, moved or replaced"),
        (_replaced, "its file was deleted, moved or replaced"),
        (_overwritten, "file is not a database"),
        (_emptied, "no such table: studies"),
        (_locked, "database is locked"),
    ],
)
def test_a_study_that_fails_while_a_run_goes_on_is_one_line_and_goes_on_when_it_is_back(
    tmp_path, monkeypatch, damage, reason
):
    monkeypatch.setattr(study_module, "BUSY_SECONDS", 0.2)
    path, kept = tmp_path / "study.db", tmp_path / "kept.db"
    study = Study(tmp_path)
    stage = study.stage("stage1")
    run_stage(stage, 1)
    stage.begin(1, "text 1", "key 1")
    shutil.copy(path, kept)
    holder = damage(path)
    for attempt in (lambda: stage.complete(1, value_of(1)), lambda: stage.begin(2, "text 2", "key 2")):
        with pytest.raises(StorageLostError) as caught:
            attempt()
        said = str(caught.value)
        assert said.startswith(f"{path}: this run's study does not answer any more: {reason};")
        assert "when it is back, the same command goes on" in said and "\n" not in said
    study.close()
    if holder is not None:
        holder.close()
    else:
        os.replace(kept, path)
    again = Study(tmp_path).stage("stage1")
    assert [(e.number, e.state) for e in again.evaluations()] == [(0, "complete"), (1, "running")]
    run_stage(again, COUNT)
    assert [e.value for e in again.evaluations()] == [value_of(0), value_of(1), None]


def test_later_stages_say_too_that_the_study_is_gone(tmp_path):
    study = Study(tmp_path)
    study.reach()
    _overwritten(tmp_path / "study.db")
    for attempt in (study.reach, lambda: study.stage("stage2")):
        with pytest.raises(StorageLostError, match="does not answer any more: file is not a database"):
            attempt()


@pytest.mark.parametrize("module", ["study", "sampler", "partition"])
def test_optuna_and_sklearn_are_imported_only_where_they_are_used(module):
    source = Path(study_module.__file__).with_name(f"{module}.py").read_text()
    heavy = "(import|from) (optuna|sqlalchemy|sklearn)"
    assert not re.search(f"^{heavy}", source, re.MULTILINE)
    assert module == "sampler" or re.search(f"^ +{heavy}", source, re.MULTILINE)


def test_a_folder_is_made_and_opened_again_with_the_same_configuration(tmp_path):
    folder = tmp_path / "runs" / "demo"
    for _ in range(2):
        with RunFolder(folder, CONFIG) as run:
            assert run.path == folder
    assert json.loads((folder / "config.json").read_text())["effbert_run"] == CONFIG


def test_an_empty_folder_and_one_left_by_a_death_at_the_start_are_fine(tmp_path):
    (tmp_path / ".workers").mkdir()
    (tmp_path / ".workers" / "turn").touch()
    (tmp_path / ".partial-1-config.json").touch()
    with RunFolder(str(tmp_path), CONFIG):
        pass


def test_another_configuration_is_refused_with_each_difference_named(tmp_path):
    with RunFolder(tmp_path, CONFIG):
        pass
    other = {"seed": 1, "teacher": {"learning_rate": 4e-4, "layers": [6, 96]}, "task": "mrpc", "corpus": None}
    with pytest.raises(ValueError) as caught, RunFolder(tmp_path, other):
        pass
    message = str(caught.value)
    assert "teacher.learning_rate: 0.0001 there, 0.0004 here" in message
    assert "task: not set there, mrpc here" in message
    assert "--output_dir" in message and "seed" not in message and "corpus" not in message
    with RunFolder(tmp_path, CONFIG):
        pass


def test_many_differences_are_counted(tmp_path):
    with RunFolder(tmp_path, {str(i): 0 for i in range(20)}):
        pass
    with pytest.raises(ValueError, match="and 15 more"), RunFolder(tmp_path, {str(i): 1 for i in range(20)}):
        pass


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(max_size=3), json_values, max_size=4), st.dictionaries(st.text(max_size=3), json_values))
def test_unequal_configurations_always_have_a_difference_to_name(there, here):
    if there != here:
        assert study_module._differences(there, here)


@pytest.mark.parametrize("name", ["notes.txt", "config.json"])
def test_a_folder_that_holds_something_else_is_refused_and_left_alone(tmp_path, name):
    (tmp_path / name).write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=f"holds something else \\({name}\\)"), RunFolder(tmp_path, CONFIG):
        pass
    assert os.listdir(tmp_path) == [name]


def test_a_folder_that_cannot_be_made_or_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/effbert-run"):
        with pytest.raises(ValueError, match="cannot be used as --output_dir") as caught, RunFolder(path, CONFIG):
            pass
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(workers_module, "open", denied, raising=False)
    with pytest.raises(ValueError, match="permission denied"), RunFolder(tmp_path / "run", CONFIG):
        pass


def _hold(folder, ready):
    with RunFolder(folder, CONFIG):
        ready.set()
        signal.pause()


def test_a_second_process_joins_unless_its_configuration_differs(tmp_path):
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(60)
    with RunFolder(tmp_path, CONFIG) as run:
        (other,) = run.workers.others()
        assert f".{process.pid}." in other and not run.is_new
        run.abandon()
        assert (tmp_path / "config.json").exists()
    with pytest.raises(ValueError, match="seed: 1 there, 2 here"), RunFolder(tmp_path, CONFIG | {"seed": 2}):
        pass
    process.kill()
    process.join()
    with RunFolder(tmp_path, CONFIG) as run:
        assert run.workers.others() == []


def test_a_study_that_was_lost_is_told(tmp_path):
    said = []
    run_stage(Study(tmp_path).stage("stage1"), 1)
    (tmp_path / "stage1").mkdir()
    tidy(Study(tmp_path), SimpleNamespace(say=said.append))
    assert not said
    (tmp_path / "study.db").unlink()
    tidy(Study(tmp_path), SimpleNamespace(say=said.append))
    assert len(said) == 1 and "study.db has no candidate" in said[0] and "begin anew" in said[0]


def test_a_study_that_others_are_at_is_not_begun_anew(tmp_path):
    said, reporter = [], SimpleNamespace(say=lambda text: said.append(text))
    (tmp_path / "stage1").mkdir()
    with Workers(tmp_path) as first, Workers(tmp_path) as second:
        with pytest.raises(ValueError, match=r"study\.db has no candidate of this search, at which 1 "):
            tidy(Study(tmp_path, workers=second), reporter)
        first.leave()
        tidy(Study(tmp_path, workers=second), reporter)
        assert "begin anew" in said[-1]
        first.join()
        tidy(Study(tmp_path, workers=first), reporter)  # what the second begins anew is there at once
        assert "joining 1 other" in said[-1]


def test_a_final_row_of_another_winner_is_not_taken_for_this_one(tmp_path):
    row = Row("winner", Architecture.uniform("1_1", 2))
    file = tmp_path / "winner-0.json"
    assert not is_finished(file, row)
    file.write_text(json.dumps({"architecture": str(row.architecture), "plain_width": 0}))
    assert is_finished(file, row)
    assert not is_finished(file, Row("winner", Architecture.uniform("2_1", 2)))
    assert not is_finished(file, Row("plain BERT", row.architecture, 90))


def test_optuna_dashboard_opens_it(tmp_path):
    study = Study(tmp_path)
    stage = study.stage("stage1")
    for number in range(2):
        stage.begin(number, f"text {number}", f"key {number}")
        stage.report(number, 0, 0.25)
        stage.complete(number, 0.5 + number / 4, scores={"accuracy": 0.5})
    study.close()
    dashboard = optuna_dashboard.wsgi(f"sqlite:///{tmp_path / 'study.db'}")

    def get(path: str) -> dict:
        asked = {"PATH_INFO": path, "QUERY_STRING": "after=0", "REQUEST_METHOD": "GET"}
        setup_testing_defaults(asked)
        said: list[str] = []
        body = b"".join(dashboard(asked, lambda status, *rest: said.append(status)))
        assert said == ["200 OK"]
        return json.loads(body)

    (summary,) = get("/api/studies")["study_summaries"]
    assert summary["study_name"] == "stage1" and summary["directions"] == ["maximize"]
    trials = get(f"/api/studies/{summary['study_id']}")["trials"]
    assert [(trial["state"], trial["values"]) for trial in trials] == [("Complete", [0.5]), ("Complete", [0.75])]
    attrs = {entry["key"]: entry["value"] for entry in trials[1]["user_attrs"]}
    assert attrs["architecture"] == "text 1" and trials[1]["intermediate_values"][0]["value"] == 0.25
