"""One door to all tasks, and label names as the only thing that joins two models."""

import sys
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import effbert.data
from effbert.data.tasks import TaskSpec, load_task, map_labels


def one_line(caught) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_num_labels_is_the_width_of_the_head():
    assert TaskSpec("a", "classification", ("x", "y", "z"), ("accuracy",), False).num_labels == 3
    assert TaskSpec("a", "regression", (), ("pearson",), True).num_labels == 1
    assert TaskSpec("a", "spans", (), ("f1",), True).num_labels == 2


def test_unknown_task_lists_the_choices():
    with pytest.raises(ValueError) as caught:
        load_task("mrcp")
    message = one_line(caught)
    for choice in ("'mrcp'", "builtin-topic", "builtin-next", "sst-2", "mnli", "squad2.0", "train_file"):
        assert choice in message


def test_builtin_names_go_to_the_builtin_tasks(monkeypatch):
    fake = SimpleNamespace(load_task=lambda name: f"loaded {name}")
    monkeypatch.setitem(sys.modules, "effbert.data.builtin", fake)
    monkeypatch.setattr(effbert.data, "builtin", fake, raising=False)
    assert load_task("builtin-topic") == "loaded builtin-topic"
    assert load_task("Builtin_Next") == "loaded builtin-next"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "builtin-topic", "data_dir": "x"}, "leave data_dir out"),
        ({"name": "mine", "train_file": "a.csv"}, "validation_file"),
        ({"name": "mine", "train_file": "a.csv", "validation_file": "b.csv", "data_dir": "x"}, "exclude each other"),
        ({"name": "mrpc", "validation_file": "b.csv"}, "train_file"),
        ({"name": "mrpc", "text_columns": ["a"]}, "train_file"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, says):
    with pytest.raises(ValueError, match=says) as caught:
        load_task(**arguments)
    one_line(caught)


def test_a_known_name_with_own_files_is_the_own_task(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"t": "one", "label": "a"}\n{"t": "two", "label": "b"}\n')
    task = load_task("mrpc", train_file=file, validation_file=file, text_columns=["t"])
    assert task.spec.labels == ("a", "b") and not task.spec.pair


LABEL_SETS = st.lists(st.text("abcde_", min_size=1, max_size=6), min_size=2, max_size=6, unique=True)


@given(LABEL_SETS, st.data())
def test_mapped_columns_carry_the_same_names(labels, data):
    teacher = data.draw(st.permutations(labels))
    columns = map_labels(labels, dict(enumerate(name.upper() for name in teacher)), "teacher")
    assert [teacher[column] for column in columns] == labels


def test_labels_that_differ_by_case_alone_are_compared_exactly():
    assert map_labels(("a", "A"), {0: "A", 1: "a"}, "teacher") == [1, 0]


def test_string_columns_of_a_config_file_are_understood():
    assert map_labels(("no", "yes"), {"0": "YES", "1": "No"}, "teacher") == [1, 0]


def test_other_label_sets_show_both():
    with pytest.raises(ValueError) as caught:
        map_labels(("entailment", "not_entailment"), {0: "yes", 1: "no"}, "teacher t/")
    message = one_line(caught)
    assert "{entailment, not_entailment}" in message and "teacher t/ has {yes, no}" in message
    with pytest.raises(ValueError, match="a, b, c"):
        map_labels(("a", "b", "c"), {0: "a", 1: "b"}, "teacher")


def test_generic_names_ask_for_teacher_labels():
    with pytest.raises(ValueError, match=r"LABEL_0, LABEL_1.*--teacher_labels") as caught:
        map_labels(("no", "yes"), {0: "LABEL_0", 1: "LABEL_1"}, "teacher")
    one_line(caught)


@pytest.mark.parametrize("bad", [{0: "no", 2: "yes"}, {0: "no", 1: "no"}])
def test_columns_must_be_distinct_and_without_gaps(bad):
    with pytest.raises(ValueError, match="distinct names"):
        map_labels(("no", "yes"), bad, "teacher")
