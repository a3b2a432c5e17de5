"""A teacher's kept outputs: what comes back is what it said, in bf16; what no longer fits is made anew."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset

from effbert.data.batches import BatchPlan
from effbert.files import DiskFullError
from effbert.teacher import Teacher, layer_map
from effbert.teacher_cache import open_cache

SIZES = {"vocab_size": 60, "hidden_size": 24, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 4}
KINDS = {
    "classification": transformers.BertForSequenceClassification,
    "spans": transformers.BertForQuestionAnswering,
}


def teacher_of(kind="classification", seed=0):
    torch.manual_seed(seed)
    return Teacher(KINDS[kind](transformers.BertConfig(**SIZES, num_labels=3 if kind == "classification" else 2)))


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 40, 23)
    return Dataset.from_dict({"input_ids": [rng.integers(1, 60, length).astype(np.int32) for length in lengths]})


def inputs_of(batch):
    return batch.input_ids, batch.attention_mask, batch.token_type_ids


def opened(folder, teacher, rows, limit=1.0, say=None, layers=2):
    said = [] if say is None else say
    return open_cache(folder, teacher, rows, layers, inputs_of, 0, limit, said.append)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_comes_back_as_the_teacher_said_it(tmp_path, rows, kind):
    teacher = teacher_of(kind)
    cache = opened(tmp_path / "kept", teacher, rows)
    targets = layer_map(4, 2)
    for batch in BatchPlan(rows, 5, pad_token_id=0, seed=3, name="x"):
        said, kept = teacher.trace(*inputs_of(batch)), cache.trace(batch)
        real = batch.attention_mask.bool()
        expected = [said.hidden_states[0], *(said.hidden_states[target + 1] for target in targets)]
        assert len(kept.hidden_states) == 3 and len(kept.queries) == len(kept.keys) == 2
        for mine, its in zip(kept.hidden_states, expected, strict=True):
            torch.testing.assert_close(mine[real], its[real], rtol=2**-8, atol=1e-5)
            assert mine.dtype == torch.float32 and not mine[~real].any()
        for mine, its in ((kept.queries, said.queries), (kept.keys, said.keys)):
            for layer, target in enumerate(targets):
                assert mine[layer].shape == its[target].shape
                here, there = (heads.transpose(1, 2)[real] for heads in (mine[layer], its[target]))
                torch.testing.assert_close(here, there, rtol=2**-8, atol=1e-5)
        if kind == "spans":
            torch.testing.assert_close(kept.logits[real], said.logits[real], rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(kept.logits, said.logits, rtol=1e-4, atol=1e-5)


def test_it_is_made_once_and_its_size_is_said_before(tmp_path, rows):
    teacher, said, passes = teacher_of(), [], []
    teacher.encoder.register_forward_hook(lambda *_: passes.append(1))
    first = opened(tmp_path / "kept", teacher, rows, say=said)
    made = len(passes)
    again = opened(tmp_path / "kept", teacher, rows, say=said)
    assert made == len(passes) > 0 and len(said) == 1
    size = (tmp_path / "kept" / "values.bf16").stat().st_size
    assert f"23 rows take {size / 1e9:.3f} GB" in said[0]
    batch = BatchPlan(rows, 5, pad_token_id=0)[0]
    assert torch.equal(first.trace(batch).hidden_states[1], again.trace(batch).hidden_states[1])


def test_one_of_another_teacher_or_of_other_rows_is_made_anew(tmp_path, rows):
    said = []
    opened(tmp_path / "kept", teacher_of(), rows)
    other = teacher_of(seed=1)
    cache = opened(tmp_path / "kept", other, rows, say=said)
    assert "is of another teacher or other rows: made anew" in said[0]
    batch = BatchPlan(rows, 23, pad_token_id=0)[0]
    torch.testing.assert_close(cache.trace(batch).logits, other.trace(*inputs_of(batch)).logits, rtol=1e-4, atol=1e-5)
    said.clear()
    opened(tmp_path / "kept", other, rows.select(range(9)), say=said)
    assert "made anew" in said[0]
    said.clear()
    backwards = rows.select(range(8, -1, -1))  # as many rows, of as many tokens in all
    cache = opened(tmp_path / "kept", other, backwards, say=said)
    assert "made anew" in said[0]
    batch = BatchPlan(backwards, 9, pad_token_id=0)[0]
    torch.testing.assert_close(cache.trace(batch).logits, other.trace(*inputs_of(batch)).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_one_is_made_anew(tmp_path, rows, kind):
    teacher, batch, folder = teacher_of(kind), BatchPlan(rows, 23, pad_token_id=0)[0], tmp_path / "kept"
    whole = opened(folder, teacher, rows).trace(batch)
    logits = np.load(folder / "logits.npy")

    def damage(name, content):
        (folder / name).unlink() if content is None else (folder / name).write_bytes(content)

    values = (folder / "values.bf16").read_bytes()
    for name, content in (
        ("values.bf16", values[:1000]),
        ("values.bf16", values + b"\0\0"),
        ("values.bf16", b""),
        ("values.bf16", None),
        ("logits.npy", (folder / "logits.npy").read_bytes()[:-4]),
        ("logits.npy", b""),
        ("logits.npy", None),
    ):
        said = []
        damage(name, content)
        found = opened(folder, teacher, rows, say=said).trace(batch)
        assert said[0] == f"{folder} is damaged: made anew", (name, said)
        assert torch.equal(found.logits, whole.logits)
        assert torch.equal(found.hidden_states[1], whole.hidden_states[1])
    said = []
    np.save(folder / "logits.npy", logits[1:])
    opened(folder, teacher, rows, say=said)
    assert "is damaged" in said[0]


def test_one_that_would_be_too_large_is_not_made(tmp_path, rows):
    said = []
    assert opened(tmp_path / "kept", teacher_of(), rows, limit=1e-6, say=said) is None
    assert "more than --teacher_cache 1e-06: each batch asks the teacher" in said[0]
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("module, name", [(np, "save"), (os, "posix_fallocate")])
def test_a_disk_that_fills_up_is_one_line_and_leaves_nothing(tmp_path, rows, monkeypatch, module, name):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, name, full)
    with pytest.raises(DiskFullError, match="kept: no space left on device"):
        opened(tmp_path / "kept", teacher_of(), rows)
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import sys
sys.path[:0] = [sys.argv[1]]
from pathlib import Path
from datasets import Dataset
from test_teacher_cache import opened, teacher_of
rows = Dataset.from_dict({"input_ids": [[1] * 100] * 40})
folder = Path(sys.argv[2])
try:
    opened(folder / "kept", teacher_of(), rows)
except OSError as error:
    print(type(error).__name__, [path.name for path in folder.iterdir()])
"""


def test_a_small_disk_that_fills_up_does_not_end_the_process(tmp_path):
    """A mapped file without room behind it would: by a bus error, which nothing can catch."""
    mount = f"mount -t tmpfs -o size=512k none {tmp_path}"
    inside = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    if shutil.which("unshare") is None or subprocess.run([*inside, mount], capture_output=True).returncode:
        pytest.skip("no unshare here that may mount a small file system")
    command = f'{mount} && exec "$0" -c "$1" "$2" "$3"'
    given = [sys.executable, FULL_DISK, str(Path(__file__).parent), str(tmp_path)]
    done = subprocess.run([*inside, command, *given], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout == "DiskFullError []\n", done.stderr
