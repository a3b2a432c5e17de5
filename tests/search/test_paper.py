"""The plan: its steps, what each is given, what a killed one leaves, and the table at its end."""

import dataclasses
import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import psutil
import pytest
from datasets import Dataset
from transformers import BertConfig, BertModel

from commands import Command, finished
from effbert.__main__ import main
from effbert.answers import Reading
from effbert.config import GLUE_TASKS, PRESETS, StudentArguments
from effbert.data.batches import subset
from effbert.data.encode import EncodedTask
from effbert.data.tasks import Task, TaskSpec
from effbert.parallel import World
from effbert.search import paper, report
from effbert.search.paper import PAPERS, PaperConfig, distillation, plan, pretraining, teacher_of
from effbert.workspace import split_task

ALONE = (paper.ALONE, paper.Reporter)


def smoke(folder, *more):
    small = ("--stage1.num_candidates", "2", "--stage2.num_candidates", "2", "--stage3.num_candidates", "2")
    fewer = ("--agreement_candidates", "0", "--corpus_tokens", "3000", "--max_train_rows", "120")
    return ["paper", "--preset", "smoke", "--output_dir", str(folder), *small, *fewer, *more]


def test_the_published_plan_has_all_tasks_and_each_its_own_settings(tmp_path):
    config = PAPERS["paper"]()
    assert config.tasks_at_last == (*GLUE_TASKS, "wnli", "squad", "squad2.0")
    assert (config.doc_stride, config.max_query_length) == (32, 62)
    assert (PAPERS["paper-fast"]().doc_stride, PAPERS["paper-fast"]().max_query_length) == (0, 0)
    given = paper.teaching(config, "squad"), paper.part(config, paper.DistillConfig, tmp_path, model=("x",))
    assert all((step.doc_stride, step.max_query_length) == (32, 62) for step in given)
    assert config.of_task("CoLA") == {"epochs": 50}
    assert (
        config.of_task("squad") == {"learning_rate": 1e-4, "eval_steps": 500} and given[0].finetuning.eval_steps == 500
    )
    tuning = paper.searching(config).teacher_model
    assert [tuning.finetuning_on(task).eval_steps for task in ("qqp", "mnli", "squad")] == [250, 50, 500]
    teachers = dataclasses.replace(config.teacher_model, finetuning_eval_steps=("qqp=7", "squad=8"))
    alone = dataclasses.replace(config, task="sst2", tasks=(), per_task=(), teacher_model=teachers)
    assert [paper.teaching(alone, task).finetuning.eval_steps for task in ("qqp", "squad", "wnli")] == [7, 8, 50]
    unknown = dataclasses.replace(teachers, finetuning_eval_steps=("qpq=3",))
    with pytest.raises(ValueError, match="finetuning_eval_steps 'qpq=3': that is no task"):
        dataclasses.replace(config, teacher_model=unknown)
    seldom = dataclasses.replace(config, per_task=("mnli.eval_steps=9",))
    assert paper.searching(seldom).teacher_model.finetuning_on("mnli").eval_steps == 9
    assert PAPERS["paper-fast"]().of_task("squad") == {"learning_rate": 1e-4}
    assert paper.searching(PAPERS["paper-fast"]()).teacher_model.finetuning_eval_steps == ()
    phases = config.distillation, config.teacher_model.finetuning, config.final.task_phase
    assert [(phase.load_best_model_at_end, phase.eval_steps) for phase in phases] == [(True, 50)] * 3
    with pytest.raises(ValueError, match=r"per_task qqp\.eval_steps=250: nothing is chosen by it: give --distillation"):
        dataclasses.replace(PAPERS["paper-fast"](), per_task=("qqp.eval_steps=250",))
    assert (config.pretraining.num_train_epochs, config.distillation.num_train_epochs) == (10, 10)
    names = [step.name for step in plan(config, paper.ALONE, paper.Reporter)]
    assert names[:3] == ["search", "text-slices", "text-fresh"]
    assert names[3:6] == ["teacher-wnli", "teacher-squad", "teacher-squad2.0"]
    assert len(names) == 6 + 11 + 6
    assert names[-6:] == ["results.json", "export", "evaluate.json", "glue.zip", "squad.json", "squad2.0.json"]


def test_the_published_search_has_the_rows_and_batches_of_its_scripts():
    config = PRESETS["paper"]()
    rows = Dataset.from_dict({"text_a": [str(row) for row in range(1000)], "row": list(range(1000))})
    spec = TaskSpec("mnli", "classification", ("no", "yes"), ("accuracy",), False)
    split, whole = split_task(Task(spec, rows, rows), config)
    encoded = EncodedTask(split, split.train, split.validation)
    for stage, (trains, ranks) in {
        config.stage1: (100, 10),
        config.stage2: (100, 10),
        config.stage3: (900, 100),
    }.items():
        assert subset(split.train, stage.task_share)["row"] == list(range(trains))
        assert sorted(encoded.ranked_on(stage.ranking_share).validation["row"]) == list(range(1000 - ranks, 1000))
    assert whole.train["row"] == list(range(1000))
    stages = config.stage1, config.stage2, config.stage3
    text = [config.supernet, *(stage.general_phase for stage in stages), config.final.general_phase]
    tasks = [config.teacher_model.finetuning, *(stage.task_phase for stage in stages), config.final.task_phase]
    assert [phase.per_device_train_batch_size for phase in text] == [256, 128, 128, 128, 256]
    assert [phase.per_device_train_batch_size for phase in tasks] == [32, 128, 128, 128, 32]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A plan that was killed in its search and again later, and what it said when it went on."""
    folder = tmp_path_factory.mktemp("plan") / "run"
    command = smoke(folder, "--per_task", "builtin-next.seeds=2")
    for made in ("search/supernet", "text-slices/results.json"):
        process = Command(command, quiet=True)
        while not (folder / made).exists() and process.poll() is None:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    return folder, finished(command)


def test_a_killed_plan_goes_on_to_its_table(killed, capsys):
    folder, said = killed
    assert "of 8 steps are done; now" in said
    after = said[said.index("now text-fresh") :]
    assert "linear" not in after and "general distillation of plain (bert-6x" in after
    for name in ("winner", "published", r"plain \(bert-6x\w+\)"):
        assert re.search(f"{name}, seed 1: .*accuracy", after) and re.search(f"{name}: accuracy .* over 2 seeds", after)
    assert all(step["done"] for step in json.loads((folder / "plan.json").read_text()))
    results = json.loads((folder / "results.json").read_text())
    assert [task["task"] for task in results["tasks"]] == ["builtin-topic", "builtin-next"]
    first, second = (task["models"] for task in results["tasks"])
    assert list(first) == ["winner", "published", "plain"] and first["winner"]["architecture"] == results["winner"]
    assert [len(model["seeds"]) for model in second.values()] == [2, 2, 2] and first["winner"]["spread"] is None
    lines = (folder / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == ["| teacher", "| winner", "| published", "| plain"]
    words = re.sub(r"<[^>]+>", " ", (folder / "report.html").read_text())
    assert "The search is finished, so is its plan." in words and "builtin-next accuracy" in words
    assert results["winner"].split(", ")[0] in html.unescape(words)
    whole = json.loads((folder / "evaluate.json").read_text())
    for task in results["tasks"]:
        metric = task["metric"]
        expected = {name: model["seeds"][0]["scores"][metric] for name, model in task["models"].items()}
        expected["teacher"] = task["teacher"]["scores"][metric]
        found = {name: splits["validation"][metric] for name, splits in whole[task["task"]].items()}
        assert found == pytest.approx(expected, abs=1e-9)
    assert sorted(path.name for path in (folder / "export").iterdir()) == ["builtinnext", "builtintopic"]
    assert (folder / "export" / "builtinnext" / "modeling_effbert.py").exists()
    assert (folder / "search" / "supernet" / "tokenizer_config.json").exists()
    assert (folder / "search" / "stage3" / "supernet" / "tokenizer_config.json").exists()
    before = (folder / "results.json").read_bytes()
    assert main(["paper", "--output_dir", str(folder), "--show"]) == 0
    assert capsys.readouterr().out.count("done") == 8
    for more in (("--rivals", "plain", "published"), ("--seeds", "2"), ("--distillation.num_train_epochs", "3")):
        assert main(smoke(folder, "--per_task", "builtin-next.seeds=2", *more)) == 2
        assert "holds a run with another configuration" in capsys.readouterr().err
    assert main(smoke(folder, "--per_task", "builtin-next.seeds=2")) == 0
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize("content", ["{bad", "{}"])
def test_a_finished_plans_damaged_winner_is_said_before_the_table_and_written_anew(killed, capsys, content):
    file = killed[0] / "winner.json"
    before = file.read_bytes()
    command = smoke(killed[0], "--per_task", "builtin-next.seeds=2")
    file.write_text(content)
    capsys.readouterr()
    assert main(command) == 2
    shown = capsys.readouterr()
    assert f"{file} is damaged: delete it, and the same command writes it anew\n" in shown.err
    assert "scores on" not in shown.out
    file.unlink()
    assert main(command) == 0
    assert json.loads(file.read_bytes())["winner"] == json.loads(before)["winner"]


def test_two_processes_share_a_plan_that_dies_and_goes_on(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "effbert"]
    command = [*run, *smoke(tmp_path / "run", "--tasks", "--rivals", "published")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run" / "winner.json").exists() and process.poll() is None:
        time.sleep(0.05)
    for one in [*psutil.Process(process.pid).children(recursive=True), process]:
        one.kill()
    process.wait()
    assert not (tmp_path / "run" / "results.json").exists()
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 6 steps are done; now text-slices" in done.stdout
    (task,) = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]
    assert list(task["models"]) == ["winner", "published"] and all(model["score"] for model in task["models"].values())
    assert (tmp_path / "run" / "export" / "builtintopic" / "modeling_effbert.py").exists()


def test_what_a_step_is_given(killed):
    config = PaperConfig(
        **{name: value for name, value in vars(PRESETS["smoke"]()).items() if name != "output_dir"},
        output_dir=str(killed[0]),
        per_task=("builtin-next.rows=50", "builtin-next.epochs=3", "builtin-next.learning_rate=0.5"),
    )
    slices, fresh = (pretraining(config, name) for name in ("text-slices", "text-fresh"))
    assert len(slices.model) == 2 and slices.start_from == (str(killed[0] / "search" / "supernet"),)
    assert len(fresh.model) == 1 and fresh.model[0].startswith("bert-6x") and fresh.start_from == ()
    assert fresh.training.num_train_epochs == config.supernet.num_train_epochs + slices.training.num_train_epochs
    own, main_task = distillation(config, "builtin-next", 6), distillation(config, "builtin-topic", 6)
    assert (own.max_train_rows, own.budget.task_phase.num_train_epochs) == (50, 3)
    assert own.budget.task_phase.learning_rate == 0.5 and own.budget.general_phase.num_train_epochs == 0
    assert main_task.max_train_rows == config.max_train_rows and own.teacher.endswith("tasks/builtin-next")
    assert [name.rpartition("/")[2] for name in own.start_from] == ["model-1", "model-2", "model"]


def distilled(folder, *tasks, models=("model-1", "model-2", "model-3")):
    """Folders as general distillation and the distillation on tasks leave them."""
    for place in ("text-slices/model-1", "text-slices/model-2", "text-fresh/model"):
        (folder / place).mkdir(parents=True, exist_ok=True)
    for task in tasks:
        for model in models:
            (folder / f"distil-{task}" / model).mkdir(parents=True)


def step(config, name, *more):
    (found,) = (step for step in plan(config, *ALONE, *more) if step.name == name)
    return found


def test_predictions_are_the_winners_and_the_diagnostic_set_its_mnli_students(tmp_path, monkeypatch, capsys):
    given = []
    for name in ("predict_glue", "predict_squad"):
        monkeypatch.setattr(paper, name, lambda *arguments, **more: given.append(arguments))
    distilled(tmp_path, "mnli", "sst2", "squad")
    config = PaperConfig(
        output_dir=str(tmp_path), final_tasks=("mnli", "SST-2", "squad1.1"), data_dir="DATA", predictions=True,
        max_length=64, doc_stride=16, max_query_length=20,
    )  # fmt: skip
    folders = {task: str(tmp_path / f"distil-{task}" / "model-1") for task in ("mnli", "sst2", "squad")}
    step(config, "glue.zip").start()
    ((models, file, data_dir, reading, _),) = given
    assert models == {"mnli": folders["mnli"], "sst2": folders["sst2"], "ax": folders["mnli"]}
    assert (file.name, data_dir) == ("glue.zip", "DATA")
    assert reading == Reading(device=config.device)  # each student reads texts as long as it learnt with
    step(config, "squad.json").start()
    assert given[1][:3] == (folders["squad"], "squad", tmp_path / "squad.json")
    windows = {"doc_stride": 16, "max_query_length": 20}
    assert given[1][4] == Reading()  # and in windows as it learnt with
    assert paper.reading_of(config, "squad1.1") == Reading(64, **windows)
    assert paper.reading_of(config, "mnli") == Reading(64)
    for name in ("glue.zip", "squad.json"):  # the stand-ins wrote nothing
        (tmp_path / f"{name}.left-out").unlink()
    for task in ("mnli", "squad"):
        (tmp_path / f"distil-{task}" / "model-1").rmdir()  # it diverged
    capsys.readouterr()
    for name in ("glue.zip", "squad.json", "export"):
        if name == "export":
            (tmp_path / "distil-sst2" / "model-1").rmdir()
        step(config, name).start()
        assert step(config, name).done
    assert given[2][0] == {"sst2": folders["sst2"]} and len(given) == 3
    said = capsys.readouterr().out
    assert "glue.zip lacks mnli: the winner diverged there" in said and "glue.zip lacks ax" in said
    assert "squad.json is left out: the winner diverged" in said and "export is left out" in said
    assert not (tmp_path / "export").exists()
    (tmp_path / "plan.json").write_text(json.dumps(paper.lines_of(tmp_path, plan(config, *ALONE))))
    assert main(["paper", "--output_dir", str(tmp_path), "--show"]) == 0
    assert capsys.readouterr().out.count("left out") == 3


def test_every_known_task_is_scored_on_whole_splits_for_teacher_and_students(tmp_path, monkeypatch, capsys):
    def scores(place, task, data_dir, reading, say):
        asked.append(place)
        say(f"{place} lacks a split")
        if len(asked) == 3:
            raise KeyboardInterrupt
        return {"validation": {"place": place, "data": data_dir, "length": reading.max_length}}

    asked = []
    monkeypatch.setattr(paper, "show", str)
    monkeypatch.setattr(paper, "content_hash", str)
    monkeypatch.setattr(paper, "evaluate_saved", scores)
    distilled(tmp_path, "rte", "mine")
    (tmp_path / "distil-rte" / "model-2").rmdir()
    (tmp_path / "teacher-rte" / "model").mkdir(parents=True)
    own = {"train_file": "a.csv", "validation_file": "b.csv", "text_columns": ("x",), "teacher": "BERT"}
    config = PaperConfig(
        output_dir=str(tmp_path), task="mine", final_tasks=("mine", "rte"), data_dir="DATA", max_length=64,
        per_task=("rte.max_length=32",), **own,
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        step(config, "evaluate.json").start()
    step(config, "evaluate.json").start()
    assert capsys.readouterr().out.count("lacks a split") == 1  # the teacher's, of all models
    assert len(asked) == len(set(asked)) + 1 == 4  # what was done before was kept
    assert not (tmp_path / "evaluate.json.unfinished").exists()
    found = json.loads((tmp_path / "evaluate.json").read_text())
    assert list(found) == ["rte"] and list(found["rte"]) == ["teacher", "winner", "plain"]
    teacher, plain = (str(tmp_path / place) for place in ("teacher-rte/model", "distil-rte/model-3"))
    assert found["rte"]["teacher"]["validation"] == {"place": teacher, "data": "DATA", "length": 32}
    assert found["rte"]["plain"]["validation"] == {"place": plain, "data": "DATA", "length": 0}
    assert paper.searching(config).data_dir == paper.of_one_task(config, "mine", {})["data_dir"] == ""  # own rows alone
    both = dataclasses.replace(config, tasks=("rte",))
    assert paper.searching(both).data_dir == "DATA" and "data_dir" not in paper.of_one_task(both, "rte", {})
    only = dataclasses.replace(config, final_tasks=("mine",), per_task=())
    assert [step.name for step in plan(only, *ALONE)][-1] == "export"


def test_a_rival_that_is_spelt_out_is_called_by_its_number(tmp_path, monkeypatch, capsys):
    spelt = ", ".join(["add(linear1_2(mul(gelu(linear1_2(max(x,tanh(x)),wb1)),x),wb2),swish(x))"] * 6)
    config = PaperConfig(
        output_dir=str(tmp_path), final_tasks=("rte",), data_dir="DATA", rivals=("published", spelt, "plain")
    )
    names = ["winner", *config.rivals]
    assert paper.said_as(config, names, ["a", "b", "c", "bert-6x24x96"]) == [
        "winner", "published", "rival 2", "plain (bert-6x24x96)",
    ]  # fmt: skip
    monkeypatch.setattr(paper, "teacher_of", lambda config, task: "teacher")
    monkeypatch.setattr(paper, "students", lambda config, task: {spelt: "spelt"})
    monkeypatch.setattr(paper, "content_hash", str)
    monkeypatch.setattr(paper, "evaluate_saved", lambda *given, **more: {"validation": {"accuracy": 0.5}})
    paper.evaluate(config, tmp_path / "evaluate.json", print)
    said = capsys.readouterr().out
    assert "rte validation, rival 2: " in said and "linear" not in said
    assert list(json.loads((tmp_path / "evaluate.json").read_text())["rte"]) == ["teacher", spelt]


def test_the_zip_is_made_by_one_worker_while_the_others_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "predict_glue", lambda *arguments: pytest.fail("another worker has made it"))
    config = PaperConfig(output_dir=str(tmp_path), final_tasks=("rte",), data_dir="GLUE", predictions=True)

    @contextmanager
    def turn(what):
        assert what == "glue.zip"
        (tmp_path / what).touch()  # while this one waited
        yield

    step(config, "glue.zip", turn).start()


def test_a_task_by_another_of_its_names_has_the_same_teacher_and_is_no_second_task(tmp_path):
    config = PaperConfig(output_dir=str(tmp_path), teacher="BERT", task="squad", tasks=("mrpc",))
    tuned = tmp_path / "search" / "teacher" / "tasks"
    for task in ("squad", "mrpc"):
        (tuned / task).mkdir(parents=True)
    assert teacher_of(config, "SQuAD1.1") == str(tuned / "squad") and teacher_of(config, "MRPC") == str(tuned / "mrpc")
    names = [step.name for step in plan(dataclasses.replace(config, final_tasks=("squad1.1", "squad2")), *ALONE)]
    assert "teacher-squad2.0" in names and "teacher-squad" not in names and "distil-squad" in names
    with pytest.raises(ValueError, match="name each once"):
        dataclasses.replace(config, final_tasks=("squad", "squad1.1"))
    shutil.rmtree(tuned)
    assert teacher_of(config, "squad1.1") == "BERT"  # as it is, where its head is for the main task
    with pytest.raises(ValueError, match="task mrpc has no teacher"):
        teacher_of(config, "mrpc")


def test_a_model_that_general_distillation_lost_is_left_out_of_the_tasks(tmp_path):
    config = PaperConfig(output_dir=str(tmp_path), teacher="BERT", task="rte")
    architecture = ", ".join(["linear1_2(gelu(linear1_2(x,wb1)),wb2)"] * 6)
    (tmp_path / "winner.json").write_text(json.dumps({"winner": architecture}))
    distilled(tmp_path, "rte", models=("model-1", "model-2"))
    (tmp_path / "text-slices" / "model-2").rmdir()  # the published architecture diverged
    own = distillation(dataclasses.replace(config, rivals=("published",)), "rte", 6)
    assert own.model == (architecture,) and own.start_from == (str(tmp_path / "text-slices" / "model-1"),)
    assert list(paper.students(config, "rte")) == ["winner", "plain"]
    scored = {"score": 0.5, "spread": None, "diverged": 0, "seeds": [{"parameters": 5, "flops": 7e6}]}
    teacher = {"scores": {"accuracy": 0.9}, "parameters": 9, "flops": 8e6}
    results = {
        "task": "rte",
        "metric": "accuracy",
        "teacher": teacher,
        "models": {"model-1": scored, "model-2": scored},
    }
    (tmp_path / "distil-rte" / "results.json").write_text(json.dumps(results))
    lines = report.markdown(report.plan_rows(paper.table_of(config))).splitlines()
    assert [line.split(" | ")[1] for line in lines[3:]] == ["0.5000", "diverged", "0.5000"]
    shutil.rmtree(tmp_path / "text-slices")
    shutil.rmtree(tmp_path / "text-fresh")
    with pytest.raises(ValueError, match="no model is left of general distillation"):
        distillation(config, "rte", 6)


RIVALS = ("tinybert4", "efficientbert-plus", "efficientbert-tiny", "efficientbert-plusplus", "efficientbert-tinybert6")


def test_rivals_begin_as_published_and_learn_with_those_of_their_depth(tmp_path):
    config = PaperConfig(output_dir=str(tmp_path), teacher="BERT", task="rte", rivals=RIVALS)
    names = [step.name for step in plan(config, *ALONE)]
    assert names[:5] == ["search", "text-slices", "text-fresh-4", "text-slices-12", "text-fresh"]
    assert names[5:8] == ["distil-rte", "distil-rte-4", "distil-rte-12"]
    architecture = ", ".join(["linear1_2(gelu(linear1_2(x,wb1)),wb2)"] * 6)
    (tmp_path / "winner.json").write_text(json.dumps({"winner": architecture}))
    members = {group: paper.members_of(config, group) for group in names[1:5]}
    assert members["text-slices"] == ["winner", "efficientbert-tiny"] and members["text-slices-12"] == [RIVALS[3]]
    assert pretraining(config, "text-slices-12").start_from == (str(tmp_path / "search" / "supernet"),)
    assert pretraining(config, "text-fresh-4").start_from == ()
    for place in ("text-slices/model-1", "text-slices/model-2", "text-slices-12/model"):
        (tmp_path / place).mkdir(parents=True)
    results = tmp_path / "text-slices-12" / "results.json"
    results.write_text(json.dumps({"models": {"model": {"architecture": architecture}}}))
    with pytest.raises(ValueError, match="text-slices-12 holds other models than this plan's"):
        distillation(config, "rte", 12)
    results.unlink()
    twelve = distillation(config, "rte", 12)
    assert (twelve.model, twelve.output_dir) == ((RIVALS[3],), str(tmp_path / "distil-rte-12"))
    six = distillation(config, "rte", 6)
    assert six.model == (architecture, RIVALS[1], RIVALS[2])
    assert six.start_from[1] == str(tmp_path / "search" / "stage3" / "supernet")  # no general distillation between
    for place in ("distil-rte/model-1", "distil-rte/model-3", "distil-rte-12/model"):
        (tmp_path / place).mkdir(parents=True)
    assert {name: path.rpartition("/")[2] for name, path in paper.students(config, "rte").items()} == {
        "winner": "model-1",
        "efficientbert-tiny": "model-3",
        "efficientbert-plusplus": "model",
    }
    step(config, "distil-rte-4").start()  # its only model diverged
    assert step(config, "distil-rte-4").done
    assert "no model of 4 layers" in (tmp_path / "distil-rte-4" / "results.json.left-out").read_text()


def test_rivals_that_cannot_be_are_refused(tmp_path):
    small = StudentArguments(hidden_size=192, intermediate_size=192)
    with pytest.raises(ValueError, match=r"rivals: efficientbert-plus is slices of .* --student gives other sizes"):
        PaperConfig(output_dir="", rivals=("efficientbert-plus",), student=small)
    with pytest.raises(ValueError, match="has not 6 layers, as --student"):
        PaperConfig(output_dir="", rivals=("linear1_2(gelu(linear1_2(x,wb1)),wb2)",))
    six = BertConfig(num_hidden_layers=6, hidden_size=12, intermediate_size=12, vocab_size=20)
    BertModel(six).save_pretrained(tmp_path / "teacher")
    with pytest.raises(ValueError, match="rivals: tinybert4 has 4 layers, of which the teacher's 6 are no multiple"):
        paper.begin(PaperConfig(output_dir="", rivals=("tinybert4",), teacher=str(tmp_path / "teacher")), [], print)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--student.num_attention_heads", "2"), "the teacher has 4 attention heads and the student 2"),
        (("--start_from", "nowhere"), "--start_from nowhere: no such folder"),
    ],
)
def test_what_the_search_would_refuse_is_refused_before_the_plan_has_begun(tmp_path, capsys, more, said):
    run = tmp_path / "run"
    assert main(smoke(run, *more)) == 2
    assert said in capsys.readouterr().err and not (run / "config.json").exists() and not (run / "plan.json").exists()


def test_a_model_that_diverged_has_its_place_in_the_table():
    costs = {"parameters": 5, "flops": 7e6}
    teacher = {"scores": {"accuracy": 0.9}, **costs}
    some = {"score": 0.5, "spread": None, "diverged": 1, "seeds": [costs]}
    none = {"score": None, "spread": None, "diverged": 2, "seeds": [costs]}
    tasks = [{"task": "rte", "metric": "accuracy", "teacher": teacher, "models": {"winner": some, "plain": none}}]
    lines = report.markdown(report.plan_rows(tasks)).splitlines()
    assert lines[3:] == ["| winner | 0.5000 (1 diverged) | 5 | 7 |", "| plain | diverged | 5 | 7 |"]


class Late(World):
    """A process that comes to a step when the first has done it."""

    def on_first(self, function, *arguments):
        return None  # of `done` too: it was not when the first asked

    def wait(self):
        pass


def test_a_process_that_is_late_takes_part_in_the_step_that_the_first_has_done(tmp_path, monkeypatch):
    started = []
    (tmp_path / "results.json").write_text(json.dumps({"tasks": []}))
    steps = [paper.Step("last", tmp_path / "results.json", lambda: started.append("last"))]
    monkeypatch.setattr(paper, "plan", lambda *arguments: steps)
    assert paper.run_paper(PaperConfig(output_dir=str(tmp_path)), world=Late(rank=1, size=2)) == {"tasks": []}
    assert started == ["last"]


def test_what_a_last_step_reads_is_looked_for_at_the_beginning(tmp_path):
    folder = tmp_path / "MNLI"
    folder.mkdir()
    rows = [f"{n}\t1\t1\tg\ta\tb\ta\tb\tone text\tanother\tneutral\tneutral" for n in range(9)]
    head = "index promptID pairID genre s1b s2b s1p s2p sentence1 sentence2 label1 gold_label".replace(" ", "\t")
    for name in ("train", "dev_matched"):
        (folder / f"{name}.tsv").write_text("\n".join([head, *rows]) + "\n")
    config = PaperConfig(output_dir=str(tmp_path / "run"), task="mnli", data_dir=str(tmp_path))
    (tmp_path / "run").mkdir()
    said = []
    paper.begin(config, plan(config, *ALONE), said.append)  # the matched rows alone will do
    assert len(said) == 1 and "validation_mismatched is left out" in said[0]
    (folder / "dev_matched.tsv").unlink()
    with pytest.raises(FileNotFoundError, match="dev_matched"):
        paper.begin(config, plan(config, *ALONE), said.append)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--predictions",), "the plan has none"),
        (("--per_task", "builtin-next.sedes=2"), "it should be TASK.NAME=VALUE"),
        (("--per_task", "builtin-next.seeds=two"), "'two' is no int"),
        (("--per_task", "mnli.seeds=2"), "mnli is none of the tasks"),
        (("--per_task", "builtin-next.seeds=0"), "it must be at least 1"),
        (("--per_task", "builtin-next.learning_rate=nan"), "it must be at least 0"),
        (("--distillation.num_train_epochs", "0"), "a student without task distillation has no score"),
        (("--final_tasks", "builtin-next", "Builtin-Next"), "final_tasks is"),
        (("--rivals", "plain", "plain"), "name each once"),
        (("--rivals", "winner"), "the winner not at all"),
        (("--rivals", "tinybert-6"), "unknown model 'tinybert-6'"),
        (("--rivals", "tinybert4"), "tinybert4 has 4 layers, of which the teacher's 6 are no multiple"),
        (("--doc_stride", "-1"), "doc_stride is -1: it must be at least 0"),
        (("--max_query_length", "-1"), "max_query_length is -1: it must be at least 0"),
        (("--preset", "small"), "--preset is given 2 times"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, capsys, more, said):
    assert main(smoke(tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "run").exists()


def test_a_missing_test_file_is_said_at_the_beginning(tmp_path, capsys):
    (tmp_path / "glue" / "RTE").mkdir(parents=True)
    more = ("--final_tasks", "rte", "--predictions", "--data_dir", str(tmp_path / "glue"), "--rivals", "published")
    assert main(smoke(tmp_path / "run", *more)) == 2
    assert "test.tsv" in capsys.readouterr().err and not (tmp_path / "run" / "search").exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--final_tasks", "builtin-topic", "mrpcc"), "unknown task 'mrpcc'"),
        (("--final_tasks", "mrpc", "--data_dir", "glue"), "data_dir glue: no such folder"),
        (("--rivals", "bert-6x30"), "the teacher's, 4, among which a width of 30 does not divide: nearest widths that"),
        (("--per_task", "builtin-topic.max_length=65"), "the teacher reads 64 tokens at most"),
        (("--final_tasks", "squad", "--doc_stride", "32"), "task squad: doc_stride is 32, but windows of max_length"),
    ],
)
def test_what_a_later_step_would_refuse_is_refused_before_anything_is_computed(tmp_path, capsys, more, said):
    assert main(smoke(tmp_path / "run", *more)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["[1]", "{bad"])
def test_a_damaged_plan_is_one_line(tmp_path, capsys, content):
    (tmp_path / "plan.json").write_text(content)
    assert main(["paper", "--output_dir", str(tmp_path), "--show"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"effbert: {tmp_path / 'plan.json'}: is no plan") and error.count("\n") == 1


def test_a_plan_that_has_not_begun_is_shown(tmp_path, capsys):
    assert main(smoke(tmp_path / "run", "--show")) == 0
    shown = capsys.readouterr().out
    assert shown.count("left") == 8 and "which has not begun" in " ".join(shown.split())
    assert not (tmp_path / "run").exists()
    assert main(["paper", "--show"]) == 2
    assert "--output_dir is missing" in capsys.readouterr().err


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(smoke(tmp_path)) == 2
    assert "holds something else" in capsys.readouterr().err and len(list(tmp_path.iterdir())) == 1
