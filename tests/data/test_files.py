"""A user's own task: four formats, the same rows; bad rows named by line."""

import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert.data.files import class_index, load_task

ROWS = [
    {"title": 'A "quoted", comma', "body": "ünï\u2028code", "topic": "sport"},
    {"title": "second", "body": "plain", "topic": "art"},
    {"title": "third", "body": "", "topic": "sport"},
]


def write(path, rows):
    """`rows` in the format of the suffix, with an extra column that nobody asks for."""
    rows = [{"id": n, **row} for n, row in enumerate(rows)]
    if path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".tsv":
        lines = [list(rows[0]), *([str(value) for value in row.values()] for row in rows)]
        path.write_bytes("\n".join("\t".join(line) for line in lines).encode())
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_every_format_gives_the_same_task(suffix, tmp_path):
    train, validation = write(tmp_path / f"a{suffix}", ROWS), write(tmp_path / f"b{suffix}", ROWS[1:])
    task = load_task("news", train, validation, ["title", "body"], "topic")
    assert task.spec.name == "news" and task.spec.kind == "classification" and task.spec.pair
    assert task.spec.labels == ("art", "sport") and task.spec.metrics[0] == "accuracy"
    assert task.train["text_a"] == [row["title"] for row in ROWS]
    assert task.train["text_b"] == [row["body"] for row in ROWS]
    assert task.train["label"] == [1, 0, 1] and task.validation["label"] == [0, 1]


def test_one_text_column_makes_no_pair(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    task = load_task("news", path, path, ["body"], "topic")
    assert not task.spec.pair and task.train.column_names == ["text_a", "label"]


def test_a_byte_order_mark_is_no_part_of_a_column_name(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"\xef\xbb\xbftext,label\none,a\ntwo,b\n")
    assert load_task("t", path, path, ["text"]).train["text_a"] == ["one", "two"]


def test_objects_under_data_and_labels_that_are_no_strings(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"data": [{"t": "x", "label": 1}, {"t": "y", "label": False}, {"t": "z", "label": 0}]}))
    assert load_task("t", path, path, ["t"]).spec.labels == ("0", "1", "False")


def test_whole_numbers_are_classes_and_fractions_must_be_asked_for(tmp_path):
    whole = write(tmp_path / "a.csv", [{"t": "x", "label": "3"}, {"t": "y", "label": "10"}])
    assert load_task("t", whole, whole, ["t"]).spec.labels == ("10", "3")
    scores = write(tmp_path / "b.csv", [{"t": "x", "label": "0.5"}, {"t": "y", "label": "1"}])
    with pytest.raises(ValueError, match=r"b.csv: labels are numbers like 0.5: scores or classes\?") as caught:
        load_task("t", scores, scores, ["t"])
    assert "--task_kind regression" in str(caught.value) and "in Python kind='regression'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert load_task("t", scores, scores, ["t"], kind="classification").spec.labels == ("0.5", "1")
    task = load_task("t", scores, scores, ["t"], kind="regression")
    assert task.spec.num_labels == 1 and task.spec.metrics == ("pearson", "spearman")
    assert task.train["label"] == [0.5, 1.0]


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(TEXT, st.sampled_from(["up", 'down, "out"'])), min_size=2, max_size=8))
def test_any_text_survives_csv_and_jsonl(tmp_path_factory, rows):
    rows = [{"t": text, "label": label} for text, label in [*rows, ("", "up"), ("", 'down, "out"')]]
    folder = tmp_path_factory.mktemp("any")
    for name in ("a.csv", "a.jsonl"):
        path = write(folder / name, rows)
        assert load_task("t", path, path, ["t"]).train["text_a"] == [row["t"] for row in rows]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".json", ".jsonl"])
def test_a_cell_may_be_as_long_as_the_file(suffix, tmp_path):
    rows = [{"t": "x" * 200_000, "label": "a"}, {"t": "\N{GRINNING FACE}", "label": "b"}]
    path = write(tmp_path / f"a{suffix}", rows)
    usual = csv.field_size_limit()
    assert load_task("t", path, path, ["t"]).train["text_a"] == [row["t"] for row in rows]
    assert csv.field_size_limit() == usual


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.csv", "t,label\nx,a\ny,b\nz\n", r"a.csv:4: 1 columns, expected 2"),
        ("a.csv", 't,label\n"x\ny",a\nz,b,c\n', r"a.csv:4: 3 columns, expected 2"),
        ("a.csv", 't,label\nx,a\n"y"z,b\n', r"a.csv:3: not a CSV row"),
        ("a.csv", 't,label\nx,a\n"y,b\n', r"a.csv:3: not a CSV row"),
        ("a.tsv", "t\tlabel\nx\ta\tb\n", r"a.tsv:2: 3 columns, expected 2"),
        ("a.csv", "t,t\nx,a\n", r"a.csv:1: a column name occurs twice"),
        ("a.csv", "text,label\nx,a\n", r"no column 't'; there are text, label"),
        ("a.csv", "t,label\nx,a\ny,\n", r"a.csv:3: column 'label' should hold a label"),
        ("a.csv", "t,label\nx,a\ny,\nz,b\nw,\n", r'a.csv:3: .* should hold a label, not "": rows without one: 2 of 4$'),
        (
            "a.jsonl",
            '{"t": "x", "label": null}',
            r"a.jsonl:1: .* should hold a label, not null: rows without one: 1 of 1$",
        ),
        ("a.csv", "t;label\nx;a\ny;b\n", r"no column 't'; there are t;label; the header seems to be separated by ';'"),
        ("a.csv", "t;label\nx, y;a\n", r"a.csv:2: 2 columns, expected 1; the header seems to be separated by ';'"),
        (
            "a.tsv",
            "t,label\nx,a\n",
            r"there are t,label; the header seems to be separated by ',': write commas in .csv",
        ),
        ("a.csv", "t\nx\n", r"no column 'label'; there are t$"),
        ("a.csv", "t,label\n", r"a.csv: there are no rows"),
        ("a.csv", " \n", r"a.csv: the file is empty"),
        ("a.csv", "t,label\nx,a\ny,a\n", r"every row has the label 'a'"),
        ("a.jsonl", '{"t": "x", "label": "a"}\n\n{"t": "y"}\n', r"a.jsonl:3: no column 'label'; there are t"),
        ("a.jsonl", '{"t": "x", "label": "a"}\n{"t": \n', r"a.jsonl:2: not JSON: .*column"),
        ("a.jsonl", "[1]\n", r"a.jsonl:1: should be an object"),
        ("a.json", '[{"t": "x",\n "label" "a"}]', r"a.json:2: not JSON"),
        ("a.json", '{"rows": []}', r"a.json: should hold a list"),
        ("a.json", '[{"t": 5, "label": "a"}]', r"a.json: row 1: column 't' should hold text, not 5"),
        ("a.json", "[" * 100_000, r"a.json:1: not JSON"),
        ("a.jsonl", '{"t": "x", "label": 1}\n{"t": "y", "label": %s}\n' % ("9" * 5000), r"a.jsonl:2: .*4300 digits"),
        ("a.json", '[{"t": "x", "label": NaN}]', r"a.json: row 1: column 'label' should hold a label, not NaN$"),
        ("a.jsonl", '{"t": "x", "label": -1e999}', r"a.jsonl:1: column 'label' should hold a label, not -Infinity$"),
        ("a.jsonl", r'{"t": "x \ud83d", "label": 1}', r"a.jsonl:1: column 't' holds \\ud83d, half of a character"),
        ("a.json", r'[{"t": "x", "label": "\udc00"}]', r"a.json: row 1: column 'label' holds \\udc00, half of a"),
        ("a.txt", "t,label\nx,a\n", r"a.txt: the suffix must say the format, one of .csv, .tsv, .json, .jsonl"),
    ],
)
def test_bad_content_is_named_by_file_and_line(name, content, says, tmp_path):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ValueError, match=says) as caught:
        load_task("t", path, path, ["t"])
    assert "\n" not in str(caught.value)


def test_a_label_that_train_lacks_is_named_by_line(tmp_path):
    train = write(tmp_path / "a.csv", ROWS)
    validation = write(tmp_path / "b.csv", [*ROWS, {"title": "x", "body": "y", "topic": "Art"}])
    with pytest.raises(ValueError, match=r"b.csv:5: unknown label 'Art'; known labels are art, sport"):
        load_task("t", train, validation, ["title"], "topic")


def test_a_score_that_is_no_number_is_named_by_line(tmp_path):
    train = write(tmp_path / "a.tsv", [{"t": "x", "label": "0.5"}, {"t": "y", "label": "inf"}])
    with pytest.raises(ValueError, match=r"a.tsv:3: label 'inf' should be a finite number"):
        load_task("t", train, train, ["t"], kind="regression")


def test_bytes_that_are_not_utf8_are_named_by_line_and_offset(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes(b"t,label\nx,a\n\xff,b\n")
    with pytest.raises(ValueError, match=r"a.csv:3: byte 0xff at offset 12 is not UTF-8"):
        load_task("t", path, path, ["t"])


def test_missing_file_and_bad_columns(tmp_path):
    path = write(tmp_path / "a.csv", ROWS)
    with pytest.raises(FileNotFoundError, match=r"b.csv: no such file"):
        load_task("t", path, tmp_path / "b.csv", ["title"], "topic")
    for columns in ([], ["title", "body", "id"]):
        with pytest.raises(ValueError, match="one or two"):
            load_task("t", path, path, columns, "topic")
    with pytest.raises(ValueError, match="different"):
        load_task("t", path, path, ["topic"], "topic")


def test_labels_may_be_written_in_other_case_where_one_alone_is_meant():
    labels = ("bad", "good", "Good")
    assert class_index("Good", labels[:2], "x", any_case=True) == class_index("good", labels, "x", any_case=True) == 1
    assert class_index("Good", labels, "x", any_case=True) == 2
    for label, known, any_case in (("GOOD", labels, True), ("Good", labels[:2], False)):
        with pytest.raises(ValueError, match=f"x: unknown label '{label}'; known labels are bad, good"):
            class_index(label, known, "x", any_case=any_case)
