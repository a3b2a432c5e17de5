"""A whole search: it ends in a model that transformers loads, resumes after any death, and repeats itself exactly."""

import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import effbert  # noqa: F401  (registers the model type)
from commands import Command, finished
from effbert.__main__ import main
from effbert.data.tasks import load_task
from effbert.search import population
from effbert.search import run as search_run
from effbert.search.record import read_record
from effbert.search.run import machine, surroundings, surroundings_of
from effbert.search.study import Study

COMMAND = ["search", "--preset", "smoke", "--output_dir"]
KILLS = 2
WORKERS = 3


def start(folder: Path, *more: str) -> Command:
    return Command([*COMMAND, str(folder), *more])


def finish(folder: Path, *more: str) -> str:
    return finished([*COMMAND, str(folder), *more])


def outcome(folder: Path) -> dict:
    """All that must not depend on what happened on the way: candidates, winner, final scores, every weight kept."""
    results = json.loads((folder / "results.json").read_text())
    study = Study(folder)
    stages = {
        name: [(e.number, e.architecture, e.value, e.state, e.attrs["rungs"]) for e in study.stage(name).evaluations()]
        for name in ("stage1", "stage2", "stage3", "agreement")
    }
    final = [(row["row"], row["repeat"], row["architecture"], row["scores"]) for row in results["results"]]
    weights = {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.rglob("*.safetensors")
    }
    assert len(weights) == 6  # teacher and its two tasks, both supernets, the winner
    return {"winner": results["winner"], "stages": stages, "final": final, "weights": weights}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    return folder, finish(folder)


def test_the_table_has_every_row_and_the_budgets_were_kept(undisturbed):
    folder, output = undisturbed
    results = json.loads((folder / "results.json").read_text())
    assert [line["row"] for line in results["table"]] == ["teacher", "winner", "published", "plain BERT", "random 1"]
    for line in results["table"]:
        assert line["parameters"] > 0 and line["flops"] > 0 and line["latency_ms"] > 0
        assert line["row"] in output
    stages = outcome(folder)["stages"]
    assert [len(stages[name]) for name in ("stage1", "stage2", "stage3")] == [3, 3, 4]
    winner, plain = (next(line for line in results["table"] if line["row"] == row) for row in ("winner", "plain BERT"))
    assert plain["parameters"] == pytest.approx(winner["parameters"], rel=0.01)


def test_halving_gives_the_whole_budget_to_the_best_of_each_cohort(undisturbed):
    for name in ("stage1", "stage2"):
        first, second, third = outcome(undisturbed[0])["stages"][name]
        assert sorted([first[3], second[3]]) == ["complete", "pruned"] and third[3] == "complete"
        kept, stopped = sorted([first, second], key=lambda e: e[3])
        assert kept[4][0] >= stopped[4][0] and len(kept[4]) == 2 and len(stopped[4]) == 1
        assert len(third[4]) == 1  # alone in its cohort: nothing to halve


def test_shared_weights_are_compared_with_training_alone(undisturbed):
    stages = outcome(undisturbed[0])["stages"]
    assert [(e[0], e[1]) for e in stages["agreement"]] == [(e[0], e[1]) for e in stages["stage3"][:2]]
    entries = json.loads((undisturbed[0] / "agreement.json").read_text())
    counts = {entry["stage"]: (entry["candidates"], entry["kendall"] is None) for entry in entries}
    assert len(entries) == 3 and counts["stage1"] == counts["stage2"] == (1, True) and counts["stage3"][0] == 2


def test_what_trained_has_loss_curves_and_the_machine_is_kept(undisturbed):
    folder = undisturbed[0]
    record = read_record(folder)
    assert record.machine == {name: record.results[name] for name in machine()}
    assert all(row["losses"]["task"] for row in record.final if row["row"] != "teacher")
    phases = {name: [phase for phase, kept in found.items() if kept] for name, found in record.losses.items() if found}
    assert phases == {"supernet": ["general"], "stage3/supernet": ["general", "tasks"]}
    for candidate in [*record.stages["stage1"], *record.stages["stage2"]]:
        last = candidate.attrs["shares"][-1]
        assert {kept[-1][0] for kept in candidate.attrs["losses"].values() if kept} == {last}
    page = (folder / "report.html").read_text()
    for figure in ("stage1-losses-task", "stage2-losses-task", "stage3-supernet-losses-tasks", "final-losses-task"):
        assert f'id="{figure}-title"' in page


def test_stages_hand_over_what_they_found(undisturbed):
    from effbert.architecture import Architecture

    stages = outcome(undisturbed[0])["stages"]
    complete = {name: [e for e in found if e[3] == "complete"] for name, found in stages.items()}
    best = {name: max(found, key=lambda e: e[2])[1] for name, found in complete.items()}
    assert stages["stage2"][0][1] == best["stage1"] and stages["stage3"][0][1] == best["stage2"]
    coarse = Architecture.parse(best["stage1"])
    for _, text, *_ in stages["stage2"]:
        assert Architecture.parse(text).structures == coarse.structures
    chosen = [layer.without_structure().key for layer in Architecture.parse(best["stage2"]).layers]
    for _, text, *_ in stages["stage3"]:
        assert [layer.without_structure().key for layer in Architecture.parse(text).layers] == chosen


def test_the_saved_winner_scores_what_the_table_says(undisturbed):
    folder, _ = undisturbed
    results = json.loads((folder / "results.json").read_text())
    model = AutoModelForSequenceClassification.from_pretrained(folder / "best").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "best")
    task = load_task("builtin-topic")
    assert [model.config.id2label[i] for i in range(4)] == list(task.spec.labels)
    hits = []
    for start_row in range(0, len(task.validation), 100):
        rows = task.validation[start_row : start_row + 100]
        batch = tokenizer(rows["text_a"], truncation=True, max_length=32, padding=True, return_tensors="pt")
        with torch.no_grad():
            predicted = model(**batch).logits.argmax(-1).numpy()
        hits.append(predicted == np.array(rows["label"]))
    winner = next(line for line in results["table"] if line["row"] == "winner")
    assert np.concatenate(hits).mean() == pytest.approx(winner["score"], abs=1e-9)
    assert model.num_parameters() == winner["parameters"]
    assert model.config.fit_size is None
    card = (folder / "best" / "README.md").read_text()
    assert f"{winner['score']:.4f}" in card and results["layers"][0] in card


def test_a_run_in_the_place_of_a_model_is_refused_with_the_models_in_it(undisturbed, tmp_path, capsys):
    run = undisturbed[0]
    best, tasks = run / "best", run / "teacher" / "tasks" / "builtin-topic"
    evaluate, new = ("--task", "builtin-topic"), ("--output_dir", str(tmp_path / "new"))
    distill = ("distill", "--model", "bert-2x16", *evaluate, *new, "--corpus", "builtin")
    (tmp_path / "r.csv").write_text("text\na b\n")
    own = ("--predict_file", str(tmp_path / "r.csv"), "--text_columns", "text", "--output", str(tmp_path / "o.csv"))
    starts = f"{run / 'supernet'}, {run / 'stage3' / 'supernet'}, {best}"
    teachers = f"{tasks.with_name('builtin-next')}, {tasks}, {run / 'teacher' / 'base'}"
    for command, what, inside in (
        (("evaluate", str(run), *evaluate), f"model {run}", best),
        (("predict", str(run), *own), f"model {run}", best),
        (("export", str(run), *new), str(run), best),
        ((*distill, "--teacher", str(run)), f"teacher {run}", teachers),
        ((*distill, "--teacher", str(tasks), "--start_from", str(run)), f"--start_from {run}", starts),
    ):
        assert main(list(command)) == 2
        said = f"effbert: {what} is the folder of a run: give a model in it, {inside}\n"
        assert capsys.readouterr().err == said
    assert os.listdir(tmp_path) == ["r.csv"]


def test_the_same_command_again_computes_nothing(undisturbed):
    folder, _ = undisturbed
    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    before, results = outcome(folder), (folder / "results.json").read_bytes()
    finish(folder)
    assert outcome(folder) == before and (folder / "results.json").read_bytes() == results
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def test_a_result_that_is_damaged_is_written_anew(undisturbed, tmp_path):
    results = json.loads((undisturbed[0] / "results.json").read_text())
    same = {name: value for name, value in results.items() if name not in surroundings()}
    file = tmp_path / "results.json"
    assert surroundings_of(file, same) == {}
    for damaged in ("{", "[]", json.dumps(results | {"winner": "another"})):
        file.write_text(damaged)
        assert surroundings_of(file, same) == {}
    file.write_text(json.dumps(results))
    assert surroundings_of(file, same) == {name: results[name] for name in surroundings()}


def test_another_configuration_in_the_same_folder_names_the_difference(undisturbed):
    folder, _ = undisturbed
    process = start(folder, "--seed", "5")
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert "seed: 0 there, 5 here" in output and len(output.strip().splitlines()) == 1


def test_stopped_in_every_way_it_ends_as_if_undisturbed(undisturbed, tmp_path):
    folder, chance = tmp_path / "run", random.Random(7)
    stop_by_ctrl_c(folder)
    move_the_study_away(folder, tmp_path / "away.db")
    for _ in range(KILLS):
        process = start(folder)
        for _ in range(chance.randint(5, 14)):
            if not process.stdout.readline():
                break
        time.sleep(chance.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    finish(folder)
    assert outcome(folder) == outcome(undisturbed[0])


def stop_by_ctrl_c(folder: Path) -> None:
    """Ctrl-C while the supernet learns: one line and 130."""
    process = start(folder)
    for line in process.stdout:
        if "supernet: general distillation" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "goes on from here" in rest and "Traceback" not in rest


def move_the_study_away(folder: Path, away: Path) -> None:
    """A storage that is gone in mid-run is one line and 2; what it held comes back with it."""
    process = start(folder)
    for line in process.stdout:
        if "stage1 1/3" in line:
            break
    os.rename(folder / "study.db", away)
    rest = process.communicate(timeout=300)[0]
    said = rest.splitlines()[-1]
    assert process.returncode == 2 and said.startswith(
        f"effbert: {folder / 'study.db'}: this run's study does not answer"
    )
    assert "the same command goes on" in said and "Traceback" not in rest
    os.replace(away, folder / "study.db")
    assert any(e.state != "running" for e in Study(folder).stage("stage1").evaluations())


def test_three_workers_that_are_killed_end_like_one_that_is_not(undisturbed, tmp_path):
    folder = tmp_path / "run"
    chance = random.Random(3)
    workers = [start(folder) for _ in range(WORKERS)]
    for _ in range(KILLS):
        victim = workers.pop(chance.randrange(WORKERS))
        for _ in range(chance.randint(4, 12)):
            if not victim.stdout.readline():
                break
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        victim.stdout.close()
        workers.append(start(folder))
    outputs = [worker.communicate(timeout=600)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0] * WORKERS, outputs
    assert any("waiting for worker" in output or "other workers" in output for output in outputs)
    assert outcome(folder) == outcome(undisturbed[0])
    finish(folder)  # alone, which sweeps up what the killed ones were writing
    assert not list(folder.rglob(".partial-*"))


def test_the_first_stage_is_in_the_study_before_its_folder_is_there(undisturbed, tmp_path, monkeypatch):
    """Who joins meanwhile would else take it for a search whose storage was lost."""
    folder, seen = tmp_path / "run", []
    shutil.copytree(undisturbed[0], folder)
    for name in ("stage1", "study.db", "results.json"):
        (shutil.rmtree if (folder / name).is_dir() else os.unlink)(folder / name)

    def stop(*_):
        seen.append(("stage1" in Study(folder).reach(), (folder / "stage1").exists()))
        raise KeyboardInterrupt

    monkeypatch.setattr(search_run, "trained_candidates", stop)
    assert main([*COMMAND, str(folder)]) == 130 and seen == [(True, False)]


def test_with_another_winner_of_stage_2_the_shared_supernet_is_made_anew(undisturbed, tmp_path, monkeypatch, capsys):
    """As where the storage was lost, and stage 2 comes out otherwise the second time."""
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    (folder / "study.db").unlink()
    noted, weights = folder / "stage3" / "architecture.json", folder / "stage3" / "supernet" / "model.safetensors"
    before, first = weights.read_bytes(), json.loads(noted.read_text())["architecture"]
    scored = population.outcome

    def reversed_outcome(*given):
        found = scored(*given)
        return found if found.value is None else dataclasses.replace(found, value=1 - found.value)

    monkeypatch.setattr(population, "outcome", reversed_outcome)
    assert main([*COMMAND, str(folder)]) == 0
    assert json.loads(noted.read_text())["architecture"] != first and weights.read_bytes() != before
    assert "is of another winner of stage 2: made anew" in "".join(capsys.readouterr())
    assert main([*COMMAND, str(folder)]) == 0
    assert "made anew" not in "".join(capsys.readouterr())


def test_a_damaged_file_is_one_line_and_the_run_goes_on_without_it(undisturbed, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    (folder / "results.json").unlink()
    os.truncate(folder / "stage3" / "supernet" / "model.safetensors", 1000)
    os.truncate(folder / "teacher.json", 20)
    os.truncate(folder / "final" / "winner-0.json", 20)
    for name in ("stage3/supernet", "teacher.json", "final/winner-0.json"):
        capsys.readouterr()
        assert main([*COMMAND, str(folder)]) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert str(folder / name) in line and "delete" in line
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
    assert main([*COMMAND, str(folder)]) == 0
    assert outcome(folder) == outcome(undisturbed[0])


def test_a_damaged_checkpoint_is_one_line_and_loses_nothing(undisturbed, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(undisturbed[0], folder)
    shutil.rmtree(folder / "supernet")
    (folder / "supernet.pt").write_bytes(b"PK\x03\x04 half a checkpoint")
    process = start(folder)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2 and "supernet.pt" in output.splitlines()[-1] and "Traceback" not in output
    assert (folder / "results.json").exists()
