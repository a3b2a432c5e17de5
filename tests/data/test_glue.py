"""GLUE from generated files in the official layout, from `datasets` (faked at its door), and from the real files."""

from pathlib import Path

import datasets
import pytest

from effbert.data import glue
from effbert.data.tasks import load_task

REAL = Path(__file__).parents[3] / "shared" / "data" / "glue"

HEADERS = {
    "sst2": "sentence label",
    "mrpc": "Quality|#1 ID|#2 ID|#1 String|#2 String",
    "rte": "index sentence1 sentence2 label",
    "stsb": "index genre filename year old_index source1 source2 sentence1 sentence2 score",
    "wnli": "index sentence1 sentence2 label",
    "mnli": "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
    "sentence1 sentence2 label1 gold_label",
    "qnli": "index question sentence label",
    "qqp": "id qid1 qid2 question1 question2 is_duplicate",
}
FIRST, SECOND = 'He said "no', "Über uns  \u2028 ’tis"


def official_lines(key: str, codes: list[str]) -> list[str]:
    """A file of the task: one row a code, texts with an open quote, a line separator and letters beyond ASCII."""
    source = glue.TASKS[key]
    if key == "cola":
        return [f"gj04\t{code}\t*\t{FIRST} {n}" for n, code in enumerate(codes)]
    columns = HEADERS[key].split("|" if "|" in HEADERS[key] else " ")
    lines = ["\t".join(columns)]
    for n, code in enumerate(codes):
        row = dict.fromkeys(columns, str(n)) | {source.texts[0]: f"{FIRST} {n}", source.label: code}
        if source.spec.pair:
            row[source.texts[1]] = SECOND
        lines.append("\t".join(row[column] for column in columns))
    return lines


def write_task(root: Path, key: str, codes: list[str] | None = None, end: str = "\n") -> Path:
    source = glue.TASKS[key]
    folder = root / source.folder
    folder.mkdir(parents=True, exist_ok=True)
    lines = official_lines(key, codes or list(source.codes or ("0.000", "2.5", "5")))
    for file in ("train.tsv", source.splits["validation"].files[0]):
        (folder / file).write_bytes((end.join(lines) + end).encode())
    return folder


@pytest.mark.parametrize("key", glue.TASKS)
def test_official_files_give_rows_and_labels(key, tmp_path):
    write_task(tmp_path, key)
    task = load_task(glue.TASKS[key].spec.name, tmp_path)
    spec = task.spec
    assert task.train[:] == task.validation[:]
    assert task.train["text_a"] == [f"{FIRST} {n}" for n in range(len(task.train))]
    assert task.train.column_names == (["text_a", "text_b", "label"] if spec.pair else ["text_a", "label"])
    if spec.pair:
        assert set(task.train["text_b"]) == {SECOND}
    if spec.kind == "regression":
        assert task.train["label"] == [0.0, 2.5, 5.0]
    else:
        assert task.train["label"] == list(range(spec.num_labels))


def test_label_names_are_those_of_the_hub():
    labels = {key: source.spec.labels for key, source in glue.TASKS.items()}
    assert labels == {
        "cola": ("unacceptable", "acceptable"),
        "sst2": ("negative", "positive"),
        "mrpc": ("not_equivalent", "equivalent"),
        "rte": ("entailment", "not_entailment"),
        "stsb": (),
        "wnli": ("not_entailment", "entailment"),
        "mnli": ("entailment", "neutral", "contradiction"),
        "qnli": ("entailment", "not_entailment"),
        "qqp": ("not_duplicate", "duplicate"),
    }


def test_the_first_metric_ranks():
    first = {key: source.spec.metrics[0] for key, source in glue.TASKS.items()}
    assert first.pop("cola") == "mcc" and first.pop("stsb") == "pearson"
    assert set(first.values()) == {"accuracy"}
    assert all("f1" in glue.TASKS[key].spec.metrics for key in ("mrpc", "qqp"))


@pytest.mark.parametrize("name", ["SST-2", "sst2", "Sst_2"])
def test_case_and_hyphens_do_not_matter(name, tmp_path):
    write_task(tmp_path, "sst2")
    assert load_task(name, tmp_path).spec.name == "sst-2"


def test_data_dir_may_be_the_folder_of_the_task(tmp_path):
    assert len(load_task("mrpc", write_task(tmp_path, "mrpc")).train) == 2


def test_windows_line_ends_leave_no_trace(tmp_path):
    write_task(tmp_path, "sst2", end="\r\n")
    assert load_task("sst-2", tmp_path).train["label"] == [0, 1]


def test_columns_are_found_by_name_not_by_place(tmp_path):
    folder = write_task(tmp_path, "mnli")
    lines = official_lines("mnli", ["neutral"])
    wide = [lines[0].replace("label1", "label1\tlabel2"), lines[1].replace("\tneutral", "\tentailment\tneutral")]
    (folder / "dev_matched.tsv").write_text("\n".join(wide))
    assert load_task("mnli", tmp_path).validation["label"] == [1]


def test_a_qqp_row_cut_by_a_line_break_is_made_whole(tmp_path):
    folder = write_task(tmp_path, "qqp")
    rows = ['7\t1\t2\t"Was he real?', '"\tWas he?\t1', "8\t3\t4\tWhy?\tHow?\t0"]
    (folder / "train.tsv").write_text("\n".join([official_lines("qqp", [])[0], *rows]))
    train = load_task("qqp", tmp_path).train
    assert train["text_a"] == ['"Was he real? "', "Why?"]
    assert train["text_b"] == ["Was he?", "How?"]
    assert train["label"] == [1, 0]


@pytest.mark.parametrize(
    ("key", "line", "says"),
    [
        ("rte", "5\tone\tentailment", r"train.tsv:4: 3 columns, expected 4"),
        ("qqp", "7\t1\t2\tWhy?\t0", r"train.tsv:4: 5 columns, expected 6"),
        ("cola", "gj04\t1\t\tone\ttwo", r"train.tsv:3: 5 columns, expected 4"),
        ("mnli", "\t".join("abcdefghijk") + "\t-", r"train.tsv:5: unknown label '-'; .* entailment, neutral"),
        ("sst2", "fine\tpositive", r"train.tsv:4: unknown label 'positive'; known labels are 0, 1"),
        ("stsb", "\t".join("abcdefghi") + "\thigh", r"train.tsv:5: label 'high' should be a finite number"),
        ("stsb", "\t".join("abcdefghi") + "\tnan", r"train.tsv:5: label 'nan' should be a finite number"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(key, line, says, tmp_path):
    path = write_task(tmp_path, key) / "train.tsv"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ValueError, match=says) as caught:
        load_task(key, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "train.tsv: the file is empty"),
        (b"sentence\tlabel\n", "no rows below the header"),
        (b"text\tlabel\nfine\t1\n", r"train.tsv:1: no column 'sentence'; the header has text, label"),
        (b"sentence\tlabel\nfine\t1\ncaf\xe9\t1\n", r"train.tsv:3: byte 0xe9 at offset 25 is not UTF-8"),
    ],
)
def test_a_bad_file_is_named(content, says, tmp_path):
    path = write_task(tmp_path, "sst2") / "train.tsv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_task("sst-2", tmp_path)


def test_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_task("rte", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"neither RTE/ nor train.tsv"):
        load_task("rte", tmp_path)
    (write_task(tmp_path, "mnli") / "dev_matched.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"dev_matched.tsv: no such file"):
        load_task("mnli", tmp_path)


@pytest.mark.parametrize("key", glue.TASKS)
def test_by_name_gives_the_rows_of_the_files(key, tmp_path, monkeypatch):
    """The hub's columns, with its classes in reverse: labels must follow their names."""
    write_task(tmp_path, key)
    local, source = load_task(key, tmp_path), glue.TASKS[key]
    spec = source.spec
    columns = {column: local.train[f"text_{side}"] for column, side in zip(source.hub_texts, "ab", strict=False)}
    if spec.kind == "regression":
        columns["label"], label_type = local.train["label"], datasets.Value("float32")
    else:
        label_type = datasets.ClassLabel(names=list(reversed(spec.labels)))
        columns["label"] = [spec.num_labels - 1 - label for label in local.train["label"]]
    columns = {name: list(values) for name, values in columns.items()} | {"idx": list(range(len(local.train)))}
    types = {name: datasets.Value("string") for name in source.hub_texts}
    types |= {"label": label_type, "idx": datasets.Value("int32")}
    split = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return {"train": split, "validation_matched" if key == "mnli" else "validation": split}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    task = load_task(key)
    assert asked == [("nyu-mll/glue", key)]
    assert task.spec == local.spec
    assert task.train[:] == local.train[:] and task.train.features == local.train.features


TEST_HEADERS = HEADERS | {
    "cola": "index sentence",
    "sst2": "index sentence",
    "mrpc": "index|#1 ID|#2 ID|#1 String|#2 String",
    "qqp": "id question1 question2",
    "ax": "index sentence1 sentence2",
}
SPLITS = [(key, split) for key in [*glue.TASKS, "ax"] for split in glue.source_of(key).results]


def unlabelled_lines(key: str, rows: int = 3) -> list[str]:
    """A test file of the task in the official layout: numbered texts, no labels."""
    source = glue.source_of(key)
    header = TEST_HEADERS[key]
    columns = header.split("|" if "|" in header else " ")
    columns = [column for column in columns if column not in (source.label, "label1")]
    lines = ["\t".join(columns)]
    for n in range(rows):
        texts = dict(zip(source.texts, (f"{FIRST} {n}", SECOND), strict=False))
        row = dict.fromkeys(columns, "n/a") | {source.number: str(n)} | texts
        lines.append("\t".join(row[column] for column in columns))
    return lines


def write_test(root: Path, key: str, split: str = "test", folder: str | None = None) -> Path:
    source = glue.source_of(key)
    path = root / (folder or source.folder) / source.splits[split].files[0]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(unlabelled_lines(key)) + "\n")
    return path


@pytest.mark.parametrize(("key", "split"), SPLITS)
def test_official_test_files_give_numbered_rows_without_labels(key, split, tmp_path):
    write_test(tmp_path, key, split)
    rows = glue.load_split(key, split, tmp_path)
    pair = glue.source_of(key).spec.pair
    assert rows.column_names == ["text_a", *(["text_b"] if pair else []), "label", "index"]
    assert rows["text_a"] == [f"{FIRST} {n}" for n in range(3)]
    assert rows["label"] == [-1, -1, -1] and rows["index"] == [0, 1, 2]
    assert not pair or set(rows["text_b"]) == {SECOND}


def test_the_server_knows_eleven_files():
    files = [file for key in [*glue.TASKS, "ax"] for file in glue.source_of(key).results.values()]
    assert sorted(files) == sorted(
        f"{name}.tsv" for name in "AX CoLA MNLI-m MNLI-mm MRPC QNLI QQP RTE SST-2 STS-B WNLI".split()
    )


def test_mismatched_rows_of_mnli_are_a_split_of_their_own(tmp_path):
    folder = write_task(tmp_path, "mnli")
    (folder / "dev_mismatched.tsv").write_text("\n".join(official_lines("mnli", ["neutral"])))
    assert glue.load_split("mnli", "validation_mismatched", tmp_path)["label"] == [1]
    assert len(glue.load_split("MNLI", "validation", tmp_path)) == 3


@pytest.mark.parametrize(("folder", "name"), [("diagnostic", "diagnostic.tsv"), ("AX", "AX.tsv"), ("ax", "test.tsv")])
def test_the_diagnostic_set_is_found_in_every_official_place(folder, name, tmp_path):
    path = write_test(tmp_path, "ax", folder=folder)
    path.rename(path.with_name(name))
    assert glue.load_split("ax", "test", tmp_path)["index"] == [0, 1, 2]
    assert glue.load_split("ax", "test", tmp_path / folder)["index"] == [0, 1, 2]


def test_a_split_that_is_missing_or_bad_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds neither AX/ nor diagnostic.tsv or AX.tsv or test.tsv"):
        glue.load_split("ax", "test", tmp_path)
    path = write_test(tmp_path, "mnli", "test")
    with pytest.raises(FileNotFoundError, match=r"MNLI/test_mismatched.tsv: no such file"):
        glue.load_split("mnli", "test_mismatched", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"MNLI/dev_mismatched.tsv: no such file"):
        glue.load_split("mnli", "validation_mismatched", tmp_path)
    with pytest.raises(ValueError, match="task rte has no split 'test_mismatched'; it has train, validation, test"):
        glue.load_split("rte", "test_mismatched", tmp_path)
    with pytest.raises(ValueError, match="ax has test rows only"):
        load_task("ax", tmp_path)
    path.write_text(path.read_text().replace("\n1\t", "\none\t"))
    with pytest.raises(ValueError, match=r"test_matched.tsv:3: the row's number should be a whole number, not 'one'"):
        glue.load_split("mnli", "test", tmp_path)


@pytest.mark.parametrize(("key", "split"), SPLITS)
def test_test_rows_by_name_are_those_of_the_files(key, split, tmp_path, monkeypatch):
    write_test(tmp_path, key, split)
    local, source = glue.load_split(key, split, tmp_path), glue.source_of(key)
    columns = {column: local[f"text_{side}"][:] for column, side in zip(source.hub_texts, "ab", strict=False)}
    columns |= {"label": [-1] * 3, "idx": [0, 1, 2]}
    asked = []

    def load_dataset(*arguments):
        asked.append(arguments)
        return {source.splits[split].hub: datasets.Dataset.from_dict(columns)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert glue.load_split(key, split)[:] == local[:]
    assert asked == [("nyu-mll/glue", key)]


def test_data_that_cannot_be_fetched_says_so_in_one_line(monkeypatch):
    def load_dataset(*arguments):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(FileNotFoundError, match=r"nyu-mll/glue rte could not be fetched.*data_dir") as caught:
        load_task("rte")
    assert "\n" not in str(caught.value)


ROWS = {
    "cola": (7696, 855),
    "sst2": (60615, 6734),
    "mrpc": (3082, 342),
    "rte": (2241, 249),
    "stsb": (4660, 517),
    "wnli": (571, 64),
    "mnli": (10304, 1144),
    "qnli": (9908, 1100),
    "qqp": (26895, 2988),
}


@pytest.mark.shared
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no data at {REAL}")
@pytest.mark.parametrize("key", ROWS)
def test_the_real_files_load_whole(key):
    task = load_task(key, REAL)
    assert (len(task.train), len(task.validation)) == ROWS[key]
    for split in (task.train, task.validation):
        assert all(text.strip() for text in split["text_a"][:])
        if task.spec.kind == "regression":
            assert 0 <= min(split["label"][:]) <= max(split["label"][:]) <= 5
        else:
            assert set(split["label"][:]) == set(range(task.spec.num_labels))
