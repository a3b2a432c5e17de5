import pytest
from datasets import Dataset

from effbert.data.encode import encode_task
from effbert.data.tasks import Task, TaskSpec
from effbert.data.tokenizer import train_wordpiece

ONE, TWO = "the red fox runs over a hill", "a dog"


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([ONE, TWO] * 3, 100)


def _task(columns, kind="classification", labels=("no", "yes")):
    dataset = Dataset.from_dict(columns)
    return Task(TaskSpec("mine", kind, labels, ("accuracy",), "text_b" in columns), dataset, dataset)


def test_pairs_cut_the_longer_text_first(tokenizer, tmp_path):
    encoded = encode_task(_task({"text_a": [ONE], "text_b": [TWO], "label": [1]}), tokenizer, 9, tmp_path)
    assert encoded.spec.name == "mine"
    assert encoded.train.column_names == ["input_ids", "token_type_ids", "labels"]
    row = encoded.validation[0]
    assert tokenizer.decode(row["input_ids"]) == "[CLS] the red fox runs [SEP] a dog [SEP]"
    assert row["token_type_ids"] == [0] * 6 + [1] * 3
    assert row["labels"] == 1


def test_regression_keeps_floats_and_tokenizers_without_types_give_none(tokenizer, tmp_path):
    task = _task({"text_a": [ONE, TWO], "label": [0.5, 3.0]}, "regression", ())
    plain = train_wordpiece([ONE, TWO], 60)
    plain.model_input_names = ["input_ids", "attention_mask"]
    encoded = encode_task(task, plain, 16, tmp_path)
    assert encoded.train.column_names == ["input_ids", "labels"]
    assert encoded.train["labels"] == [0.5, 3.0]
    assert encoded.train.features["labels"].dtype == "float32"


def test_the_cache_tells_content_length_and_tokenizer_apart(tokenizer, tmp_path):
    task = _task({"text_a": [ONE], "label": [1]})
    rows = [
        encode_task(task, tokenizer, 16, tmp_path).train[0],
        encode_task(_task({"text_a": [TWO], "label": [1]}), tokenizer, 16, tmp_path).train[0],
        encode_task(_task({"text_a": [ONE], "label": [0]}), tokenizer, 16, tmp_path).train[0],
        encode_task(task, tokenizer, 5, tmp_path).train[0],
        encode_task(task, train_wordpiece([ONE, TWO], 40), 16, tmp_path).train[0],
    ]
    assert (
        len({str(row) for row in rows})
        == len(rows)
        == len([path for path in tmp_path.iterdir() if path.name != ".locks"])
    )


def test_spans_become_windows_with_positions(tokenizer, tmp_path):
    columns = {
        "id": ["q"],
        "question": ["a dog"],
        "context": ["over a hill the red fox runs"],
        "answers": [{"text": ["red fox"], "answer_start": [16]}],
    }
    train = encode_task(_task(columns, "spans", ()), tokenizer, 24, tmp_path).train
    row = train[0]
    assert {"input_ids", "start_positions", "end_positions"} <= set(train.column_names)
    answer = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
    assert tokenizer.decode(answer) == "red fox"


def test_windows_are_part_of_a_span_tasks_cache_and_nothing_to_other_tasks(tokenizer, tmp_path):
    answers = {"text": ["red fox"], "answer_start": [4]}
    columns = {"id": ["q"], "question": ["a dog"], "context": [f"{ONE} " * 9], "answers": [answers]}
    spans, plain = _task(columns, "spans", ()), _task({"text_a": [ONE], "label": [1]})
    windows = ({}, {"doc_stride": 5}, {"max_query_length": 1}, {"doc_stride": 5, "max_query_length": 1})
    trains = [encode_task(spans, tokenizer, 24, tmp_path, **more).train for more in windows]
    assert len({str(train[:]) for train in trains}) == len({train.cache_files[0]["filename"] for train in trains}) == 4
    whole, five, one, both = (train["input_ids"] for train in trains)
    assert both[0][3 + 5 : -1] == both[1][3:-6] and five[0][4 + 5 : -1] == five[1][4:-6]
    assert [ids.index(tokenizer.sep_token_id) for ids in (whole[0], one[0])] == [3, 2]
    files = {encode_task(plain, tokenizer, 24, tmp_path, **more).train.cache_files[0]["filename"] for more in windows}
    assert len(files) == 1


def test_empty_splits_and_too_short_lengths_are_refused(tokenizer, tmp_path):
    task = _task({"text_a": [ONE], "label": [1]})
    with pytest.raises(ValueError, match="max_length 2 leaves no room"):
        encode_task(task, tokenizer, 2, tmp_path)
    empty = Task(task.spec, task.train, task.validation.select(range(0)))
    with pytest.raises(ValueError, match="the validation split is empty"):
        encode_task(empty, tokenizer, 16, tmp_path)
