"""What a run shares: whose head serves which task, what is refused before anything is computed, and what may change."""

import csv
import dataclasses
import json

import pytest
import torch
import transformers
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert import workspace as rooms
from effbert.config import (
    PRESETS,
    Budget,
    DistillConfig,
    PretrainConfig,
    SearchConfig,
    StudentArguments,
    TeacherArguments,
)
from effbert.data.tasks import Task, TaskSpec
from effbert.data.tokenizer import train_wordpiece
from effbert.engine import Phase
from effbert.errors import first_line
from effbert.mlm import MaskedPlan, masked_lm_loss, new_bert
from effbert.optim import TrainingArguments
from effbert.search import forecast
from effbert.student import distil_generally
from effbert.supernet import Supernet, supernet_config

SENTENCES = [f"the {a} cat {b} on the {c} mat." for a in ("old", "red") for b in ("sat", "ran") for c in ("big", "wet")]
ONE_EPOCH = TrainingArguments(num_train_epochs=1, per_device_train_batch_size=8)
SPEC = TaskSpec("t", "classification", ("no", "yes"), ("accuracy",), False)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(SENTENCES * 3, 60)


@pytest.fixture
def config(tmp_path, monkeypatch, tokenizer):
    """A run on a user's own task of two classes, with a BERT that tells them apart under the same names."""
    monkeypatch.setenv("EFFBERT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "corpus.txt").write_text("\n".join(SENTENCES * 2))
    write_rows(tmp_path / "train.csv", [(f"{s} {n}", "yes" if "red" in s else "no") for n in (1, 2) for s in SENTENCES])
    write_rows(tmp_path / "dev.csv", [(s, "yes" if "red" in s else "no") for s in SENTENCES])
    save_teacher(tmp_path / "bert", tokenizer, "ForSequenceClassification")
    return SearchConfig(
        output_dir="",
        task="own",
        train_file=str(tmp_path / "train.csv"),
        validation_file=str(tmp_path / "dev.csv"),
        text_columns=("text",),
        corpus=(str(tmp_path / "corpus.txt"),),
        teacher=str(tmp_path / "bert"),
        max_length=16,
        validation_share=0.25,
        device="cpu",
        student=StudentArguments(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=24),
        teacher_model=TeacherArguments(
            **{"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 32},
            vocab_size=60,
            pretraining=ONE_EPOCH,
            finetuning=ONE_EPOCH,
        ),
    )


def write_rows(path, rows):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])


def save_teacher(folder, tokenizer, head, **changes):
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 3, "hidden_size": 24, "intermediate_size": 32}
    sizes |= {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "id2label": {0: "no", 1: "yes"}}
    torch.manual_seed(0)
    model = getattr(transformers, f"Bert{head}")(transformers.BertConfig(**{**sizes, **changes}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def opened(config, folder, teachers=True):
    folder.mkdir(exist_ok=True)
    said = []
    workspace = rooms.open_workspace(config, folder, said.append)
    if teachers:
        rooms.open_teachers(workspace, said.append)
    return workspace, said


def refused(config, folder):
    with pytest.raises((ValueError, OSError)) as refusal:
        opened(config, folder, teachers=False)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_a_given_head_of_the_main_tasks_kind_is_used_as_it_is_and_its_encoder_is_the_general_teacher(
    config, tmp_path, tokenizer
):
    head = save_teacher(tmp_path / "two", tokenizer, "ForSequenceClassification", id2label={0: "YES", 1: "NO"})
    workspace, said = opened(dataclasses.replace(config, teacher=str(tmp_path / "two")), tmp_path / "run")
    assert workspace.general_teacher is workspace.teachers["own"] and said[-1].endswith("as it is")
    batch = workspace.plan(workspace.main_task.train, 4, "x", 0)[0]
    logits = workspace.teachers["own"].trace(*rooms.model_inputs(batch)).logits
    plain = head.eval()(batch.input_ids, batch.attention_mask, batch.token_type_ids).logits
    torch.testing.assert_close(logits, plain[:, [1, 0]])  # the task's order: no, yes
    assert not (tmp_path / "run" / "teacher").exists()


def test_a_further_task_never_gets_the_given_head_even_where_it_has_as_many_labels(config, tmp_path):
    workspace, _ = opened(config, tmp_path / "run", teachers=False)
    workspace.tasks["further"] = workspace.held_out["further"] = dataclasses.replace(
        workspace.main_task,
        raw=dataclasses.replace(workspace.main_task.raw, spec=dataclasses.replace(SPEC, name="further")),
    )
    rooms.open_teachers(workspace, lambda text: None)
    assert (tmp_path / "run" / "teacher" / "tasks" / "further" / "model.safetensors").exists()
    given, tuned = (workspace.teachers[name].model.classifier.weight for name in ("own", "further"))
    assert workspace.general_teacher is workspace.teachers["own"] and (given - tuned).abs().max() > 0.01


def test_a_head_of_another_kind_gives_way_to_one_that_is_fine_tuned(config, tmp_path):
    scores = [(sentence, index / 3) for index, sentence in enumerate(SENTENCES * 2)]
    write_rows(tmp_path / "scores.csv", scores)
    regression = {"train_file": str(tmp_path / "scores.csv"), "validation_file": str(tmp_path / "scores.csv")}
    config = dataclasses.replace(config, **regression, task_kind="regression")
    workspace, _ = opened(config, tmp_path / "run")
    teacher = workspace.teachers["own"]
    assert teacher.config.num_labels == 1 and workspace.general_teacher is not teacher
    assert workspace.general_teacher.trace(torch.tensor([[2, 5, 3]])).logits is None


@pytest.mark.parametrize(
    ("head", "labels", "kind", "fits"),
    [
        ("BertForSequenceClassification", 3, "classification", True),
        ("BertForSequenceClassification", 3, "regression", False),
        ("BertForSequenceClassification", 1, "regression", True),
        ("BertForSequenceClassification", 1, "classification", False),
        ("BertForSequenceClassification", 2, "spans", False),
        ("BertForQuestionAnswering", 2, "spans", True),
        ("BertForQuestionAnswering", 2, "classification", False),
        ("BertModel", 2, "classification", False),
        ("BertForMaskedLM", 2, "spans", False),
    ],
)
def test_a_head_answers_a_task_of_its_own_kind_alone(head, labels, kind, fits):
    given_config = transformers.BertConfig(architectures=[head], num_labels=labels)
    assert rooms.answers(given_config, dataclasses.replace(SPEC, kind=kind)) is fits


def test_a_spans_task_gets_a_head_of_two_outputs_over_any_other(config, tmp_path):
    context = "the old cat sat on the big mat."
    row = {"question": "who sat?", "context": context, "answers": {"text": ["cat"], "answer_start": [8]}}
    rows = Dataset.from_list([{"id": str(i), **row, "context": f"{context} {i}"} for i in range(8)])
    workspace, _ = opened(config, tmp_path / "run", teachers=False)
    spans = Task(TaskSpec("squad", "spans", (), ("f1", "exact_match"), True), rows, rows)
    task = rooms.encode_task(spans, workspace.tokenizer, 32)
    workspace.tasks["squad"] = workspace.held_out["squad"] = task
    teacher = rooms.tuned_teacher(workspace, config.teacher, "squad", lambda text: None, rooms.no_steps)
    batch = workspace.plan(task.train, 4, "x", 0)[0]
    assert teacher.trace(*rooms.model_inputs(batch)).logits.shape == (*batch.input_ids.shape, 2)


def test_a_runs_windows_are_those_of_its_settings(config, tmp_path):
    for name in ("train", "dev"):
        asked = {"question": "who ran?", "answers": [{"text": "red", "answer_start": 4}]}
        rows = [{"context": f"the red cat ran {n} " * 9, "qas": [{"id": str(n), **asked}]} for n in range(4)]
        (tmp_path / f"{name}-v1.1.json").write_text(json.dumps({"data": [{"paragraphs": rows}]}))
    own = {"task": "squad", "data_dir": str(tmp_path), "train_file": "", "validation_file": "", "text_columns": ()}
    config = dataclasses.replace(config, **own, doc_stride=3, max_query_length=1)
    workspace, said = opened(config, tmp_path / "run", teachers=False)
    train, rank, held = (
        len(rows)
        for rows in (workspace.main_task.train, workspace.main_task.validation, workspace.held_out["squad"].validation)
    )
    sizes = f"3 questions ({train} windows) to train on, 1 ({rank} windows) to rank on, 4 ({held} windows) held out"
    assert f"task squad: {sizes}" in said and min(train, rank, held) > 4
    for task in (workspace.main_task, workspace.held_out["squad"]):
        for windows in (task.train, task.validation):
            first, second = windows["input_ids"][:2]
            assert first[2] == second[2] == workspace.tokenizer.sep_token_id  # after a question of one token
            assert first[3 + 3 : -1] == second[3:-4] and len(first) == 16
    assert "doc_stride is 13" in refused(dataclasses.replace(config, doc_stride=13), tmp_path / "other")


def test_what_is_kept_is_read_back_and_a_checkpoint_left_beside_it_is_forgotten(config, tmp_path, monkeypatch):
    config = dataclasses.replace(config, teacher="")
    first, _ = opened(config, tmp_path / "run")
    left = [tmp_path / "run" / "teacher" / name for name in ("mlm.pt", "task-own.pt")]
    for path in left:
        path.write_bytes(b"left by a kill between keeping the model and forgetting its checkpoint")
    monkeypatch.setattr(rooms, "train", None)
    second, _ = opened(config, tmp_path / "run")
    assert not any(path.exists() for path in left)
    for mine, theirs in zip(first.teachers["own"].parameters(), second.teachers["own"].parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_teachers_tokenizer_is_the_same_file_whether_its_data_was_cached_or_encoded(config, tmp_path):
    config = dataclasses.replace(config, teacher="")
    for name in ("cold", "warm"):
        opened(config, tmp_path / name)
    for place in ("teacher/base", "teacher/tasks/own"):
        cold, warm = (tmp_path / name / place / "tokenizer.json" for name in ("cold", "warm"))
        assert cold.read_bytes() == warm.read_bytes()
        saved = json.loads(cold.read_text())
        assert saved["truncation"] is None and saved["padding"] is None


def change_config(config, **changes):
    path = f"{config.teacher}/config.json"
    with open(path) as file:
        content = json.load(file) | changes
    with open(path, "w") as file:
        json.dump(content, file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_position_embeddings": 12}, "at most 12 tokens: --max_length 16 is too long"),
        ({"vocab_size": 30}, "the teacher's vocabulary 30"),
        ({"pad_token_id": 4}, "pads with id 0 and the teacher with 4"),
        ({"num_hidden_layers": 3}, "--student.num_hidden_layers should be one of 1, 3"),
        ({"num_attention_heads": 4}, "--student.num_attention_heads 4"),
        ({"model_type": "distilbert"}, "cannot be the teacher"),
        ({"id2label": {"0": "no", "1": "maybe"}}, "--teacher_labels renames"),
    ],
)
def test_a_teacher_that_cannot_serve_is_refused_before_anything_is_computed(config, tmp_path, changes, message):
    change_config(config, **changes)
    assert message in refused(config, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir()) and not (tmp_path / "cache").exists()


def test_teacher_labels_must_be_as_many_as_the_teachers_logits(config, tmp_path):
    three = dataclasses.replace(config, teacher_labels=("no", "maybe", "yes"))
    assert "3 names" in refused(three, tmp_path / "run")
    alone = dataclasses.replace(config, teacher="", teacher_labels=("no", "yes"))
    assert "--teacher_labels" in refused(alone, tmp_path / "run")


def test_a_teacher_with_one_segment_sees_and_teaches_one_segment(config, tmp_path, tokenizer):
    save_teacher(tmp_path / "bert", tokenizer, "ForSequenceClassification", type_vocab_size=1)
    config = dataclasses.replace(config, text_columns=("text", "other"))
    for name in ("train", "dev"):
        path = tmp_path / f"{name}.csv"
        rows = [line.rsplit(",", 1) for line in path.read_text().splitlines()[1:]]
        path.write_text("text,other,label\n" + "".join(f"{text},a mat,{label}\n" for text, label in rows))
    assert any(tokenizer("a cat", "a mat")["token_type_ids"])
    workspace, _ = opened(config, tmp_path / "run", teachers=False)
    batch = workspace.plan(workspace.main_task.train, 8, "x", 0)[0]
    assert not batch.token_type_ids.any() and workspace.student_config().type_vocab_size == 1


@pytest.mark.parametrize("name", ["", "a/b", "..", "-x", "a b", "ä", "x\n"])
def test_a_task_name_that_is_no_folder_name_is_refused(config, tmp_path, name):
    assert "a task's name should be" in refused(dataclasses.replace(config, task=name), tmp_path / "run")


@pytest.mark.parametrize("name", ["builtin-topic", "MNLI", "sst2", "squad", "mnli-mm"])
def test_ones_own_rows_do_not_take_the_name_of_a_known_task(config, tmp_path, name):
    said = refused(dataclasses.replace(config, task=name), tmp_path / "run")
    assert said == f"--train_file is of your own task, {name} is a known one: give --task a name of yours"


def test_a_task_named_twice_is_refused(config, tmp_path, monkeypatch):
    task = Task(dataclasses.replace(SPEC, name="builtin-topic"), None, None)
    monkeypatch.setattr(rooms, "load_task", lambda name, data_dir=None, **own: task)
    given = {"train_file": "", "validation_file": "", "text_columns": (), "task": "builtin-topic"}
    twice = dataclasses.replace(config, **given, tasks=("Builtin_Topic",))
    assert "given twice" in refused(twice, tmp_path / "run")


def test_a_built_in_task_reads_no_data_dir_however_it_is_written(config, monkeypatch):
    monkeypatch.setattr(rooms, "load_task", lambda name, data_dir=None, **own: Task(SPEC, data_dir, None))
    known = dataclasses.replace(config, train_file="", validation_file="", text_columns=(), data_dir="glue")
    for name, expected in (("builtin_topic", None), ("Builtin-Next", None), ("mrpc", "glue")):
        (task,) = rooms.load_tasks(dataclasses.replace(known, task=name)).values()
        assert task.train == expected


@pytest.mark.parametrize(
    "setting",
    [{"validation_file": "dev.csv"}, {"text_columns": ("a",)}, {"label_column": "b"}, {"task_kind": "regression"}],
)
def test_settings_of_ones_own_rows_are_refused_where_there_are_none(config, setting):
    known = dataclasses.replace(config, train_file="", validation_file="", text_columns=(), task="builtin-topic")
    (name,) = setting
    with pytest.raises(ValueError, match=f"--{name} is of your own task: give its --train_file too"):
        rooms.load_tasks(dataclasses.replace(known, **setting))


@pytest.mark.parametrize("precision", ["medium", "high", "highest"])
def test_the_precision_of_products_is_the_runs(config, tmp_path, precision):
    torch.set_float32_matmul_precision("high" if precision != "high" else "highest")
    opened(dataclasses.replace(config, float32_matmul_precision=precision), tmp_path / "run", teachers=False)
    try:
        assert torch.get_float32_matmul_precision() == precision
        assert (torch.backends.mkldnn.matmul.fp32_precision == "bf16") == (precision == "medium")
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("name", ["foo", "cuda:99", "cuda:x", "meta", ""])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(ValueError, match=f"--device {name}"):
        rooms.pick_device(name)


def test_what_was_left_out_of_the_data_is_said(config, tmp_path, monkeypatch):
    noted = {
        name: dataclasses.replace(task, notes=("2 rows left out",)) for name, task in rooms.load_tasks(config).items()
    }
    monkeypatch.setattr(rooms, "load_tasks", lambda config: noted)
    said = []
    rooms.open_workspace(config, tmp_path, said.append)
    assert "task own: 2 rows left out" in said


def test_a_run_goes_on_over_the_same_inputs_and_stops_where_they_changed(config, tmp_path):
    run = tmp_path / "run"
    opened(config, run, teachers=False)
    opened(config, run, teachers=False)
    (tmp_path / "corpus.txt").write_text("the red cat ran.\n")
    assert refused(config, run) == "the corpus changed since this run began: use another --output_dir"
    (tmp_path / "corpus.txt").write_text("\n".join(SENTENCES * 2))
    with open(tmp_path / "train.csv", "a") as file:
        file.write("one more,no\n")
    assert refused(config, run).startswith("the rows of task own changed")
    change_config(config, layer_norm_eps=1e-5)
    assert refused(config, run).startswith("the teacher changed")
    (run / "inputs.json").write_text("{")
    assert f"{run / 'inputs.json'} is damaged: delete it" in refused(config, run)
    (run / "inputs.json").unlink()
    opened(config, run, teachers=False)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=40),
    share=st.floats(0.05, 0.9),
    limit=st.sampled_from([0, 10]),
    spans=st.booleans(),
)
def test_no_text_is_on_both_sides_of_the_ranking_split(texts, share, limit, spans):
    column = "context" if spans else "text_a"
    rows = Dataset.from_dict({column: texts, "row": list(range(len(texts)))})
    task = Task(dataclasses.replace(SPEC, kind="spans" if spans else "classification"), rows, rows)
    config = SearchConfig(output_dir="", validation_share=share, max_train_rows=limit)
    if len(set(texts)) == 1:
        with pytest.raises(ValueError, match="cannot be cut"):
            rooms.split_task(task, config)
        return
    try:
        split, held_out = rooms.split_task(task, config)
    except ValueError:
        assert limit  # the rows drawn were about one text
        return
    train, rank = split.train.to_list(), split.validation.to_list()
    assert train and rank and held_out.validation is rows
    assert not {row[column] for row in train} & {row[column] for row in rank}
    chosen = sorted(row["row"] for row in train + rank)
    assert len(set(chosen)) == len(chosen) == min(len(texts), limit or len(texts))
    assert rooms.split_task(task, config)[0].train.to_list() == train


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(4, 60), share=st.floats(0.05, 0.7))
def test_the_ranking_share_is_met_exactly_where_every_text_is_another(rows, share):
    data = Dataset.from_dict({"text_a": [str(row) for row in range(rows)]})
    split, _ = rooms.split_task(Task(SPEC, data, data), SearchConfig(output_dir="", validation_share=share))
    assert len(split.validation) == max(1, round(share * rows))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 60), share=st.floats(0.05, 0.9), limit=st.sampled_from([0, 7]))
def test_released_ranking_rows_are_the_last_of_the_file_and_teachers_learn_from_all(rows, share, limit):
    data = Dataset.from_dict({"text_a": ["the same"] * rows, "row": list(range(rows))})
    config = SearchConfig(output_dir="", validation_share=share, ranking_rows="released", max_train_rows=limit)
    count = min(rows, limit or rows)
    ranking = max(1, round(share * count))
    if ranking == count:
        with pytest.raises(ValueError, match=f"{count} training rows leave none to train on"):
            rooms.split_task(Task(SPEC, data, data), config)
        return
    split, whole = rooms.split_task(Task(SPEC, data, data), config)
    assert split.train["row"] == list(range(count - ranking))
    assert split.validation["row"] == list(reversed(range(count - ranking, count)))
    assert whole.train["row"] == list(range(count)) and whole.validation is data


@pytest.mark.parametrize("ranking_rows", ["drawn", "released"])
def test_teachers_learn_from_released_ranking_rows_and_from_no_others(config, tmp_path, monkeypatch, ranking_rows):
    monkeypatch.setattr(rooms, "answers", lambda given, spec: False)  # so that it is fine-tuned here
    seen, plan = [], rooms.Workspace.plan

    def spied(self, data, batch_size, name, *rest, **more):
        if name.startswith("teacher"):
            seen.append(len(data))
        return plan(self, data, batch_size, name, *rest, **more)

    monkeypatch.setattr(rooms.Workspace, "plan", spied)
    workspace, said = opened(dataclasses.replace(config, ranking_rows=ranking_rows), tmp_path / "run")
    released = ranking_rows == "released"
    assert seen == [16 if released else 12]  # of 16 rows a quarter ranks
    assert len(workspace.main_task.train) == 12 and len(workspace.main_task.validation) == 4
    line = "task own: 12 rows to train on, 4 to rank on, 8 held out"
    assert any(text == line + (", teachers and final rows on all" if released else "") for text in said)
    assert any(("held-out" if released else "ranking") + " rows after" in text for text in said)


def test_a_tasks_teacher_is_scored_after_steps_of_its_own():
    best = dataclasses.replace(ONE_EPOCH, load_best_model_at_end=True, eval_steps=50)
    found = TeacherArguments(finetuning=best, finetuning_eval_steps=("qqp=7", "qqp=250", "squad1.1=500"))
    steps = {task: found.finetuning_on(task).eval_steps for task in ("QQP", "mnli", "squad")}
    assert steps == {"QQP": 250, "mnli": 50, "squad": 500}
    assert TeacherArguments().finetuning_on("qqp") == TeacherArguments().finetuning
    for wrong in (
        {"finetuning": ONE_EPOCH},
        {"finetuning_eval_steps": ("qqp",)},
        {"finetuning_eval_steps": ("qqp=-1",)},
    ):
        with pytest.raises(ValueError, match="it should be TASK=N"):
            dataclasses.replace(found, **wrong)


def longer(config, epochs, **changes):
    """Released samples of uneven length, of which the supernet sees so many epochs."""
    supernet = dataclasses.replace(ONE_EPOCH, num_train_epochs=epochs)
    return dataclasses.replace(config, corpus_samples="released", supernet=supernet, **changes)


@pytest.fixture
def documents(tmp_path):
    texts = ["\n".join(["the old cat", *SENTENCES[n % 4 : n % 4 + n % 3]]) for n in range(30)]
    Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "documents.parquet")
    return (str(tmp_path / "documents.parquet"),)


@pytest.mark.parametrize("epochs, sets", [(1, 1), (3, 3), (7, 5)])
def test_each_epoch_has_released_samples_of_its_own_up_to_five_and_as_many_batches(
    config, tmp_path, documents, epochs, sets
):
    config = longer(config, epochs, corpus=documents, max_length=32)
    workspace, said = opened(config, tmp_path / "run", teachers=False)
    assert len(workspace.corpus) == sets
    assert any(line.startswith("corpus: 3 sets of 30 sequences") for line in said) == (sets == 3)
    for share, size in ((1.0, 4), (0.37, 4), (1.0, 7)):
        plans = [workspace.general_plan(share, size, epoch) for epoch in range(2 * sets)]
        rows = [sorted(tuple(ids[ids != 0].tolist()) for batch in plan for ids in batch.input_ids) for plan in plans]
        assert len({len(plan) for plan in plans}) == 1 and len(rows[0]) == round(share * 30)
        assert rows[:sets] == rows[sets:] and len({str(found) for found in rows}) == sets
    assert len({plan.tokens.real for plan in plans}) > 1 or sets == 1
    lines = forecast.lines_of_workspace(workspace, forecast.Rates(1.0, 1.0, 1.0, 1.0, 1.0, "test"))
    assert any(line.startswith("supernet") for line in lines)


def test_the_sets_are_part_of_what_a_run_reads(config, tmp_path, documents):
    opened(longer(config, 2, corpus=documents), tmp_path / "run", teachers=False)
    opened(longer(config, 2, corpus=documents), tmp_path / "run", teachers=False)
    assert "the corpus changed" in refused(longer(config, 3, corpus=documents), tmp_path / "run")


def test_a_supernet_learns_from_a_set_an_epoch(config, tmp_path, documents):
    config = longer(config, 3, corpus=documents, max_length=32)
    workspace, _ = opened(config, tmp_path / "run")
    layers = config.student.num_hidden_layers
    supernet = Supernet(supernet_config(workspace.student_config(), layers), [workspace.main_task.spec])
    (result,) = distil_generally(workspace, [supernet], config.supernet, [Phase(("supernet",), 0)])
    assert result.finished and result.tokens == sum(sum(one["length"]) for one in workspace.corpus)


def test_a_runs_sets_follow_its_longest_phase_on_text(config):
    four = dataclasses.replace(ONE_EPOCH, num_train_epochs=4)
    assert config.text_epochs == 1 and longer(config, 3).text_epochs == 3
    for stage in ("stage1", "stage2", "stage3", "final"):
        settings = dataclasses.replace(getattr(config, stage), general_phase=four)
        assert dataclasses.replace(config, **{stage: settings}).text_epochs == 4
    own = dataclasses.replace(config.teacher_model, pretraining=four)
    assert dataclasses.replace(config, teacher_model=own).text_epochs == 1
    assert dataclasses.replace(config, teacher_model=own, teacher="").text_epochs == 4
    assert PretrainConfig("", training=four).text_epochs == 4
    assert DistillConfig("", model=("efficientbert",), budget=Budget(general_phase=four)).text_epochs == 4
    assert PRESETS["paper"]().text_epochs == 10 and PRESETS["paper"]().corpus_samples == "released"


def test_masked_batches_hide_the_same_tokens_at_every_call_and_others_each_epoch(config, tmp_path):
    workspace, _ = opened(config, tmp_path / "run", teachers=False)
    plan = workspace.general_plan(1.0, 4, 0)
    first, again, later = (MaskedPlan(plan, workspace.tokenizer, 3, epoch) for epoch in (0, 0, 1))
    assert len(first) == len(plan) > 1
    for index in range(len(plan)):
        mine, plain = first[index], plan[index]
        for name in ("input_ids", "positions", "targets"):
            assert torch.equal(getattr(mine, name), getattr(again[index], name))
        assert torch.equal(mine.targets, plain.input_ids.flatten()[mine.positions]) and len(mine.targets) > 0
        assert mine.tokens == plain.tokens and not (mine.targets <= 4).any()
        kept = torch.ones(plain.input_ids.numel(), dtype=torch.bool).index_fill(0, mine.positions, False)
        assert torch.equal(mine.input_ids.flatten()[kept], plain.input_ids.flatten()[kept])
    assert any(first[i].positions.tolist() != later[i].positions.tolist() for i in range(len(plan)))


def test_the_masked_language_model_loss_is_that_of_transformers(config, tmp_path):
    workspace, _ = opened(config, tmp_path / "run", teachers=False)
    batch = MaskedPlan(workspace.general_plan(1.0, 4, 0), workspace.tokenizer, 3, 0)[0].to("cpu")
    model = new_bert(workspace.teacher_config, 0).eval()
    labels = torch.full((batch.input_ids.numel(),), -100).index_copy(0, batch.positions, batch.targets)
    expected = model(
        batch.input_ids, batch.attention_mask, batch.token_type_ids, labels=labels.view_as(batch.input_ids)
    ).loss
    torch.testing.assert_close(masked_lm_loss(model, batch), expected)
    nothing = dataclasses.replace(batch, positions=batch.positions[:0], targets=batch.targets[:0])
    assert masked_lm_loss(model, nothing).item() == 0


def test_an_error_is_told_in_one_line_also_where_it_says_nothing():
    assert first_line(ValueError("\n  a reason\nmore")) == "a reason"
    assert first_line(KeyError()) == "KeyError" and first_line(OSError("")) == "OSError"
