"""One process's side of data-parallel training: parts of a batch and what they weigh, buckets, devices, errors."""

import dataclasses

import datasets
import numpy as np
import pytest
import torch

from effbert import parallel, workspace
from effbert.__main__ import main
from effbert.data.batches import WHOLE, BatchPlan
from effbert.distill import LossWeights, distillation_losses
from effbert.engine import Phase, train
from effbert.optim import TrainingArguments
from effbert.parallel import ALONE, World
from effbert.trace import Trace

LENGTHS = [3, 9, 1, 6, 12, 2, 7]


def plans(rows: int, size: int, parts: int):
    data = datasets.Dataset.from_dict({"input_ids": [[1 + row] * LENGTHS[row % 7] for row in range(rows)]})
    common = {"pad_token_id": 0, "seed": 3, "name": "x", "epoch": 1}
    whole = BatchPlan(data, size * parts, **common)
    return whole, [BatchPlan(data, size, part=(number, parts), **common) for number in range(parts)]


@pytest.mark.parametrize("rows,size,parts", [(21, 2, 2), (21, 2, 3), (9, 4, 2), (2, 1, 4)])
def test_parts_make_up_the_batches_of_a_plan_of_larger_ones(rows, size, parts):
    whole, of_ranks = plans(rows, size, parts)
    for number, batch in enumerate(whole):
        found = [plan[number] for plan in of_ranks]
        counted = [part for part in found if part.shares.rows]
        assert np.concatenate([part.indices for part in counted]).tolist() == batch.indices.tolist()
        assert torch.equal(torch.cat([part.input_ids for part in counted]), batch.input_ids)
        sizes = [len(part.indices) if part.shares.rows else 0 for part in found]
        assert max(sizes) - min(sizes) <= 1 and all(len(part.indices) for part in found)
        assert all(part.tokens == batch.tokens for part in found) and batch.shares == WHOLE
        for share in zip(*(part.shares for part in found), strict=True):
            assert sum(share) == pytest.approx(1)
    assert all(len(plan) == len(whole) and plan.tokens == whole.tokens for plan in of_ranks)


def trace(seed: int, rows: int, length: int, width: int, outputs: tuple[int, ...]) -> Trace:
    torch.manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    heads = tuple(draw(rows, 2, length, 4) for _ in range(2))
    return Trace(tuple(draw(rows, length, width) for _ in range(3)), heads, heads[::-1], draw(rows, *outputs))


def rows_of(whole: Trace, rows: slice) -> Trace:
    fields = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    cut = {
        name: tuple(x[rows] for x in value) if isinstance(value, tuple) else value[rows]
        for name, value in fields.items()
    }
    return Trace(**cut)


@pytest.mark.parametrize("loss_mask", ["real", "released"])
@pytest.mark.parametrize("kind", [None, "classification", "regression", "spans"])
def test_losses_of_parts_add_up_to_that_of_the_batch(kind, loss_mask):
    whole, of_ranks = plans(7, 4, 2)
    batch, parts = whole[0], [plan[0] for plan in of_ranks]
    assert len({round(share, 6) for share in parts[0].shares}) == 3  # three counts, three shares
    length = batch.input_ids.shape[1]
    outputs = {"spans": (length, 2), "regression": (1,)}.get(kind, (3,))
    student, teacher = trace(0, 7, length, 6, outputs), trace(1, 7, length, 10, outputs)
    fit, labels = torch.nn.Linear(6, 10).double(), torch.linspace(0, 5, 7)
    weights = LossWeights(attention=0.7, hidden=2.0, prediction=3.0, loss_mask=loss_mask)
    expected = distillation_losses(student, teacher, fit, batch.attention_mask, weights, kind, labels).total
    total = 0.0
    for part, rows in zip(parts, (slice(0, 4), slice(4, 7)), strict=True):
        mine, theirs = rows_of(student, rows), rows_of(teacher, rows)
        total += distillation_losses(
            mine, theirs, fit, part.attention_mask, weights, kind, labels[rows], part.shares
        ).total
    torch.testing.assert_close(total, expected, rtol=1e-12 if kind != "regression" else 1e-6, atol=0)


def test_buckets_keep_types_apart_and_hold_no_more_than_they_may(monkeypatch):
    monkeypatch.setattr(parallel, "BUCKET", 10)
    sizes = [4, 6, 1, 30, 2]
    tensors = [torch.zeros(size) for size in sizes] + [torch.zeros(1, dtype=torch.float64)]
    found = [[tensor.numel() for tensor in bucket] for bucket in parallel.buckets(tensors)]
    assert found == [[4, 6], [1], [30], [2], [1]]
    assert list(parallel.buckets([])) == []


def test_one_process_alone_leaves_everything_as_it_is():
    parameter = torch.nn.Parameter(torch.ones(2))
    ALONE.add_up([parameter])
    ALONE.wait()
    ALONE.check_same(3, "never")
    assert parameter.grad is None and ALONE.any([True, False]) == [True, False]
    assert ALONE.on_first(divmod, 7, 2) == (3, 1) and ALONE.first_then_all(lambda: "here") == "here"


class Silent(World):
    """A rank of two that talks to nobody."""

    def any(self, flags):
        return list(flags)

    def add_up(self, parameters, *more):
        pass

    def check_same(self, value, message):
        pass


def test_each_rank_draws_dropout_of_its_own_and_the_first_that_of_a_process_alone():
    def drawn(world):
        model, found = torch.nn.Linear(1, 1), []

        def loss_of(batch, number):
            found.append(int(torch.randint(2**62, ())))
            return model.weight.sum()

        train(model, lambda epoch: plans(9, 2, 1)[0], loss_of, TrainingArguments(), Phase(("p",), 0), world=world)
        return found

    alone, first, second = (drawn(world) for world in (ALONE, Silent(0, 2), Silent(1, 2)))
    assert alone == first and len(set(first + second)) == 2 * len(alone) > 2


def test_every_process_has_a_gpu_of_its_own(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    second = World(rank=5, size=8, local_rank=1)
    assert workspace.pick_device("auto", second) == workspace.pick_device("cuda", second) == torch.device("cuda:1")
    assert workspace.pick_device("cpu", second) == torch.device("cpu") and chosen == [torch.device("cuda:1")] * 2
    assert workspace.pick_device("cuda:1") == chosen.pop() and workspace.pick_device("cuda") == torch.device("cuda")
    assert len(chosen) == 2
    with pytest.raises(ValueError, match="--device cuda:0: each of 8 processes needs a GPU of its own"):
        workspace.pick_device("cuda:0", second)
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU: PyTorch finds 2 here"):
        workspace.pick_device("auto", World(rank=2, size=3, local_rank=2))


def test_an_environment_that_names_processes_but_no_meeting_place_is_one_line(capsys, monkeypatch):
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["arch", "x"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "RANK" in lines[0]
