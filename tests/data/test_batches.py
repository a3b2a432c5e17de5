import tracemalloc

import numpy as np
import pyarrow as pa
import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from hypothesis import given, settings
from hypothesis import strategies as st

from effbert.data.batches import BatchPlan, Rows, length_buckets, subset
from effbert.data.cache import cached

PAD = 7
FEATURES = Features(
    {"input_ids": List(Value("int32")), "token_type_ids": List(Value("int8")), "labels": Value("int64")}
)


def _dataset(lengths, first=0):
    columns = {
        "input_ids": [[first + i + 100] * length for i, length in enumerate(lengths)],
        "token_type_ids": [[0] + [1] * (length - 1) for length in lengths],
        "labels": [first + i for i in range(len(lengths))],
    }
    return Dataset.from_dict(columns, features=FEATURES)


lengths_lists = st.lists(st.integers(1, 70), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None)
@given(lengths_lists, st.integers(1, 9), st.none() | st.integers(0, 3))
def test_each_row_once_padded_to_the_bucket_of_its_longest_neighbour(lengths, batch_size, seed):
    plan = BatchPlan(_dataset(lengths), batch_size, pad_token_id=PAD, seed=seed, buckets=(16, 32, 70))
    seen, real, padded = [], 0, 0
    for batch in plan:
        width = batch.input_ids.shape[1]
        of_batch = np.array([lengths[i] for i in batch.indices])
        assert width == min(bucket for bucket in (16, 32, 70) if bucket >= of_batch.max())
        for row, i in enumerate(batch.indices):
            n = lengths[i]
            assert batch.input_ids[row].tolist() == [i + 100] * n + [PAD] * (width - n)
            assert batch.attention_mask[row].tolist() == [1] * n + [0] * (width - n)
            assert batch.token_type_ids[row].tolist() == [0] + [1] * (n - 1) + [0] * (width - n)
        assert batch.labels.tolist() == batch.indices.tolist()
        assert batch.tokens == of_batch.sum()
        seen += batch.indices.tolist()
        real, padded = real + batch.tokens, padded + batch.input_ids.numel()
    assert sorted(seen) == list(range(len(lengths)))
    assert len(plan) == -(-len(lengths) // batch_size)
    assert plan.tokens == (real, padded)


def test_an_epoch_depends_on_seed_name_and_number_only():
    rows = Rows(_dataset([5] * 50))

    def order(**given):
        plan = BatchPlan(rows, 8, pad_token_id=PAD, **{"seed": 1, "name": "a", "epoch": 0, **given})
        return [batch.indices.tolist() for batch in plan], plan[3].indices.tolist()

    first, fourth = order()
    assert order() == (first, fourth)
    assert fourth == first[3]
    assert all(order(**change)[0] != first for change in ({"seed": 2}, {"name": "b"}, {"epoch": 1}))


def test_similar_lengths_share_batches():
    lengths = np.random.default_rng(0).integers(2, 65, 4000).tolist()
    plan = BatchPlan(_dataset(lengths), 16, pad_token_id=PAD, seed=0, buckets=(16, 32, 48, 64))
    assert plan.tokens.real == sum(lengths)
    assert plan.tokens.padded < 1.3 * plan.tokens.real
    widths = [batch.input_ids.shape[1] for batch in plan]
    assert sorted(widths) != widths


def test_drop_last_keeps_full_batches_and_drops_other_rows_each_epoch():
    rows = Rows(_dataset([3] * 9 + [40]))
    dropped = set()
    for epoch in range(8):
        plan = BatchPlan(rows, 4, pad_token_id=PAD, seed=0, epoch=epoch, drop_last=True)
        kept = [i for batch in plan for i in batch.indices.tolist()]
        assert [len(batch.indices) for batch in plan] == [4, 4]
        dropped |= set(range(10)) - set(kept)
    assert len(dropped) > 3


def test_files_pieces_slices_and_selections_give_the_same_rows(tmp_path):
    parts = [_dataset([2, 9, 4]), _dataset([20, 1], first=3)]
    whole = concatenate_datasets(parts)
    stored = cached(("rows",), lambda: parts, tmp_path)
    for dataset, wanted in (
        (whole, [0, 1, 2, 3, 4]),
        (stored, [0, 1, 2, 3, 4]),
        (stored.select(range(1, 4)), [1, 2, 3]),
        (stored.select([4, 0, 3]), [4, 0, 3]),
        (stored.select(range(1, 5)).select([3, 0]), [4, 1]),
    ):
        batch = BatchPlan(dataset, 8, pad_token_id=PAD, buckets=(32,))[0]
        assert batch.labels.tolist() == wanted
        assert batch.input_ids[:, 0].tolist() == [i + 100 for i in wanted]


def test_floats_positions_and_absent_columns():
    features = Features({"input_ids": List(Value("int32")), "labels": Value("float32")})
    floats = Dataset.from_dict({"input_ids": [[1], [2, 3]], "labels": [0.5, 2.0]}, features=features)
    batch = BatchPlan(floats, 2, pad_token_id=PAD)[0]
    assert batch.labels.dtype == torch.float32
    assert batch.labels.tolist() == [0.5, 2.0]
    assert batch.token_type_ids.sum() == 0
    spans = Dataset.from_dict({"input_ids": [[1, 2, 3]], "start_positions": [1], "end_positions": [2]})
    batch = BatchPlan(spans, 2, pad_token_id=PAD)[0].to("cpu")
    assert (batch.labels, batch.start_positions.tolist(), batch.end_positions.tolist()) == (None, [1], [2])
    assert batch.end_positions.dtype == torch.int64


def test_buckets_cover_every_length():
    assert length_buckets(128) == (16, 32, 48, 64, 96, 128)
    assert length_buckets(50) == (16, 32, 48, 50)
    assert length_buckets(10) == (10,)
    with pytest.raises(ValueError, match="a row of 40 ids does not fit the longest bucket, 32"):
        BatchPlan(_dataset([40]), 2, pad_token_id=PAD, buckets=(16, 32))
    with pytest.raises(ValueError, match="no rows"):
        BatchPlan(_dataset([1]).select([]), 2, pad_token_id=PAD)
    with pytest.raises(ValueError, match="batch_size 0"):
        BatchPlan(_dataset([1]), 0, pad_token_id=PAD)


def test_subsets_take_the_first_or_last_rows():
    dataset = _dataset([1] * 10)
    assert subset(dataset, 3)["labels"] == [0, 1, 2]
    assert subset(dataset, 0.2, first=False)["labels"] == [8, 9]
    assert len(subset(dataset, 0.01)) == 1
    for bad in (0, 11, 0.0, 1.5):
        with pytest.raises(ValueError, match="of 10 rows"):
            subset(dataset, bad)


@pytest.mark.parametrize("longest", [3, 17, 50, 61])
def test_padding_never_exceeds_the_longest_row(longest):
    plan = BatchPlan(_dataset([1, longest, 2]), 2, pad_token_id=0)
    assert max(batch.input_ids.shape[1] for batch in plan) == longest


def test_a_plan_takes_a_few_bytes_a_row(tmp_path):
    rows = 100_000
    ids = pa.ListArray.from_arrays(np.arange(rows + 1, dtype=np.int32) * 2, np.arange(2 * rows, dtype=np.int32))
    table = pa.table({"input_ids": ids})
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    dataset = Dataset.from_file(str(tmp_path / "rows.arrow"))
    tracemalloc.start()
    try:
        plan = BatchPlan(dataset, 64, pad_token_id=0, seed=1)
        kept, peak = (amount / rows for amount in tracemalloc.get_traced_memory())
    finally:
        tracemalloc.stop()
    assert kept < 12 and peak < 24  # lengths, and the order twice at its peak; 4 bytes each
    batch = plan[7]
    assert batch.input_ids.tolist() == [[2 * row, 2 * row + 1] for row in batch.indices]
    assert sorted(row for batch in plan for row in batch.indices) == list(range(rows))
