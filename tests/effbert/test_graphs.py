"""Recorded steps: without a GPU the operations that a step launches are noted down and repeated on the same tensors, as
a CUDA graph does, whatever Python would do by then; with one they are CUDA graphs."""

import contextlib
import copy
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from effbert import engine, graphs
from effbert.data.batches import Batch
from effbert.distill import LossWeights
from effbert.engine import Phase, Trainee, train_together
from effbert.optim import TrainingArguments
from effbert.step import Lesson

SHAPES = [(4, 8), (4, 12), (4, 8), (4, 8), (2, 12), (4, 12), (4, 8), (4, 12), (2, 8), (4, 12)]


class Noted(TorchDispatchMode):
    """Notes the operations that run inside; refuses those that read a value on the host."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a recorded step read a value on the host")
        result = operation(*args, **(kwargs or {}))
        self.operations.append((operation, args, kwargs or {}, result))
        return result

    def replay(self):
        with torch.no_grad():
            for operation, args, kwargs, result in self.operations:
                again = operation(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.detach().copy_(new)


class NotedLane:
    """A lane of the CPU."""

    recorded = 0

    @contextlib.contextmanager
    def after(self, *others):
        yield

    def join(self):
        pass

    def record(self, function):
        NotedLane.recorded += 1
        with pytest.MonkeyPatch.context() as patch, Noted() as noted:
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            result = function()
        return result, noted.replay


@pytest.fixture
def noted(monkeypatch):
    """Steps on the CPU are recorded by noting operations down; gives the class, which counts the recordings."""
    monkeypatch.setattr(NotedLane, "recorded", 0)
    monkeypatch.setattr(graphs, "lanes", lambda device, count: [NotedLane() for _ in range(count)])
    return NotedLane


@pytest.mark.parametrize("failures", [1, 2])
def test_a_recording_that_lacks_memory_is_tried_again_without_what_is_kept_for_reuse(failures, monkeypatch):
    done = []

    class Graph:
        def capture_begin(self, **options):
            done.append("begin")

        def capture_end(self):
            done.append("end")

        def replay(self):
            done.append("replay")

    def function():
        if done.count("begin") <= failures:
            raise torch.OutOfMemoryError("no memory")
        return 7

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: done.append("empty"))
    lane = object.__new__(graphs.Lane)
    lane.pool = None
    if failures == 1:
        result, replay = lane.record(function)
        replay()
        assert result == 7 and done == ["begin", "end", "empty", "begin", "end", "replay", "replay"]
    else:
        with pytest.raises(torch.OutOfMemoryError):
            lane.record(function)
        assert done == ["begin", "end", "empty", "begin", "end"]


def batches(epoch, device="cpu"):
    draw = np.random.default_rng(epoch)
    found = []
    for rows, length in SHAPES:
        lengths = draw.integers(3, length + 1, rows)
        ids = draw.integers(1, 200, (rows, length))
        mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
        found.append(
            Batch(
                torch.from_numpy(ids * mask),
                torch.from_numpy(mask),
                torch.zeros(rows, length, dtype=torch.int64),
                torch.from_numpy(draw.integers(0, 3, rows)),
                None,
                None,
                np.arange(rows),
                int(lengths.sum()),
            )
        )
    return found


def trained(parity, names, device="cpu", accumulate=1, **changes):
    """Students of the recorded supernet after two epochs of task distillation, dropout on, and their results."""
    supernet = parity.supernet(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    lesson = Lesson(parity.teacher().to(device).trace_of, LossWeights(), 6, "classification")
    students = [supernet.extract(parity.architectures[name], "mnli").to(device) for name in names]

    def trace_of(student):
        return lambda batch, number, targets: student.trace(
            batch.input_ids, batch.attention_mask, batch.token_type_ids, targets=targets
        )

    trainees = [
        Trainee(
            student,
            lesson.shared_loss(trace_of(student), student.effbert.fit_dense),
            Phase(("graphs", number), 0),
            alike=True,
        )
        for number, student in enumerate(students)
    ]
    arguments = TrainingArguments(
        learning_rate=1e-3, num_train_epochs=2, gradient_accumulation_steps=accumulate, **changes
    )
    results = train_together(trainees, batches, arguments, share=lesson.teacher_of, device=device)
    return students, results


@pytest.fixture(autouse=True)
def teacher_takes_batches(monkeypatch):
    from effbert.teacher import Teacher

    def trace_of(self, batch):
        return self.trace(batch.input_ids, batch.attention_mask, batch.token_type_ids)

    monkeypatch.setattr(Teacher, "trace_of", trace_of, raising=False)


def assert_same(first, second, tolerance):
    for mine, theirs in zip(first[0], second[0], strict=True):
        for (name, one), (_, other) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=name)
    for mine, theirs in zip(first[1], second[1], strict=True):
        assert mine.loss == pytest.approx(theirs.loss, rel=1e-5) and mine.steps == theirs.steps


@pytest.mark.parametrize("accumulate", [1, 3])
def test_recorded_steps_train_as_steps_that_are_not(parity, noted, accumulate):
    names = ["random0", "released_head"]
    with graphs.launches():
        plain = trained(parity, names, accumulate=accumulate)
    assert noted.recorded == 0
    recorded = trained(parity, names, accumulate=accumulate)
    # four shapes for the teacher and for each of two students, and an update of each
    assert noted.recorded == 4 * 3 + 2
    assert_same(recorded, plain, 2e-6)
    with graphs.launches():
        before = trained(parity, names, accumulate=accumulate, max_grad_norm=1e-3)
    with pytest.raises(AssertionError):
        assert_same(recorded, before, 2e-6)


def test_stacks_that_an_architecture_has_not_stay_as_they_were(parity, noted):
    supernet, architecture = parity.supernet(), parity.architectures["random0"]
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    lesson = Lesson(parity.teacher().trace_of, LossWeights(), 6, "classification")

    def trace_of(batch, number, targets):
        inputs = batch.input_ids, batch.attention_mask, batch.token_type_ids
        return supernet.trace(*inputs, architecture, "mnli", targets)

    trainee = Trainee(supernet, lesson.shared_loss(trace_of, supernet.effbert.fit_dense), Phase((), 0), alike=True)
    train_together([trainee], batches, TrainingArguments(learning_rate=1e-3), share=lesson.teacher_of)
    assert noted.recorded > 0 and all(parameter.grad is None for parameter in supernet.parameters())
    changed = {name for name, value in supernet.state_dict().items() if not torch.equal(value, before[name])}
    for index, layer in enumerate(architecture.layers):
        for stack in range(4):
            name = f"effbert.layers.{index}.mlps.{stack}.dense1.weight"
            assert (name in changed) == (stack < layer.structure.stacks)


def test_nothing_is_recorded_where_steps_differ(parity, noted):
    trainee = Trainee(torch.nn.Linear(2, 1), lambda batch, number, _: torch.zeros((), requires_grad=True), Phase((), 0))
    assert not trainee.alike
    together = engine._Together([trainee], batches, TrainingArguments(), None, torch.device("cpu"), engine.ALONE)
    assert not together.recorded


def test_too_little_memory_forgets_recordings_and_goes_on_by_halves(parity, noted, monkeypatch):
    with graphs.launches():
        plain = trained(parity, ["random0", "released_head"])
    learn, failed = engine._Learner.learn, []

    def once(self, *args):
        if self.step == 6 and not failed and self.phase.name[1] == 1:
            failed.append(copy.copy(self.recordings.known))
            raise torch.OutOfMemoryError("simulated")
        return learn(self, *args)

    monkeypatch.setattr(engine._Learner, "learn", once)
    assert_same(trained(parity, ["random0", "released_head"]), plain, 2e-6)
    assert failed and any(failed[0].values())


def test_a_step_that_reads_a_value_cannot_be_recorded(noted):
    recordings = graphs.Recordings(noted().record)
    value = torch.ones(())
    assert recordings.run("x", lambda: float(value)) == 1.0
    with pytest.raises(RuntimeError, match="read a value"):
        recordings.run("x", lambda: float(value))


def test_a_variable_turns_recording_off(parity, noted, monkeypatch):
    monkeypatch.setenv(graphs.ENVIRONMENT, "0")
    trained(parity, ["random0"])
    assert noted.recorded == 0


@pytest.mark.gpu
def test_cuda_graphs_train_as_launches_do(parity):
    """Up to what rounding becomes in Adam: a recorded step keeps its mask, and attention may take another kernel."""
    with graphs.launches():
        plain = trained(parity, ["random0", "released_head"], "cuda")
    assert_same(trained(parity, ["random0", "released_head"], "cuda"), plain, 1e-3)


READS_A_VALUE = """
import torch
from effbert import graphs
(lane,) = graphs.lanes(torch.device("cuda"), 1)
value = torch.ones((), device="cuda")
with lane.after():
    lane.record(lambda: float(value))
"""


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_is_one_line():
    """In a process of its own: what a broken capture leaves behind is nobody's concern then."""
    done = subprocess.run([sys.executable, "-c", READS_A_VALUE], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(rf"ValueError: a step cannot be recorded \(.*set {graphs.ENVIRONMENT}=0", done.stderr), done.stderr
