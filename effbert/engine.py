"""The one training loop: teachers, supernet, candidates and final models all run through `train`.

A phase is a model, the batches of each epoch, and a function from batch to loss. Everything random is keyed by
(seed, phase name, step), so a phase killed at any moment and started again gives the same numbers.
"""

import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from effbert import checkpoint, random
from effbert.data.batches import Batch, BatchPlan
from effbert.optim import Optimizer, TrainingArguments

CHECK_EVERY = 10  # steps between reads of the loss: a read waits for the device


@dataclass(frozen=True)
class Phase:
    """What identifies a run of the loop and where its state is kept.

    name: e.g. ("stage1", 3, "task"); it keys the randomness and, with `settings`, the checkpoint.
    checkpoint: file for the state in mid-phase, written every `save_seconds`; None keeps none.
    """

    name: tuple[str | int, ...]
    seed: int
    checkpoint: Path | None = None
    settings: str = ""
    save_seconds: float = 30.0

    @property
    def fingerprint(self) -> str:
        """The phase's name, seed and settings in one string."""
        return " ".join(map(str, [*self.name, f"seed={self.seed}", self.settings])).strip()

    def sub(self, *name: str | int) -> "Phase":
        """This phase with further parts of a name, and a checkpoint file of its own."""
        path = self.checkpoint and self.checkpoint.with_name(f"{self.checkpoint.stem}-{'-'.join(map(str, name))}.pt")
        return Phase((*self.name, *name), self.seed, path, self.settings, self.save_seconds)


@dataclass
class TrainingResult:
    """finished: False where the loss became non-finite. steps: updates made. tokens: real tokens seen. seconds: time in
    the loop, interrupted runs included up to their last checkpoint. loss: mean of the last epoch (NaN without steps).
    epochs: what `after_epoch` returned, epoch by epoch."""

    finished: bool = True
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = float("nan")
    epochs: list[dict] = field(default_factory=list)


def train(
    model: nn.Module,
    plan_of: Callable[[int], BatchPlan],
    loss_of: Callable[[Batch, int], torch.Tensor],
    arguments: TrainingArguments,
    phase: Phase,
    *,
    device: torch.device | str = "cpu",
    after_epoch: Callable[[int], dict] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainingResult:
    """Train `model` in place over `arguments.num_train_epochs` epochs.

    plan_of: epoch -> its batches. loss_of: (batch on `device`, number of the batch in the phase) -> 0-d loss.
    after_epoch: called with the model in eval mode; its dict is kept. on_step: called with (step, total steps).
    A non-finite loss ends the phase with finished=False; nothing is raised. With a checkpoint on disk the phase goes on
    from it; the caller deletes the file (`forget`) once the phase's outcome is safe elsewhere.
    """
    plans = [plan_of(epoch) for epoch in range(arguments.num_train_epochs)]
    accumulate = arguments.gradient_accumulation_steps
    steps_of = [-(-len(plan) // accumulate) for plan in plans]
    total = sum(steps_of)
    optimizer = Optimizer(model, arguments, total)
    state = _Loop(model, optimizer, phase)
    state.resume()
    with _Interrupts() as interrupts:
        return _epochs(model, plans, steps_of, loss_of, state, device, after_epoch, on_step, interrupts)


def _epochs(model, plans, steps_of, loss_of, state, device, after_epoch, on_step, interrupts) -> TrainingResult:
    for epoch, plan in enumerate(plans):
        if epoch < state.epoch:
            continue
        model.train()
        for position in range(state.position, steps_of[epoch]):
            _step(plan, epoch, position, sum(map(len, plans[:epoch])), loss_of, state, device)
            if on_step is not None:
                on_step(state.step, sum(steps_of))
            if state.step % CHECK_EVERY == 0 or state.position == steps_of[epoch]:
                if not torch.isfinite(state.loss_sum).item():
                    return state.result(finished=False)
                state.save_if_due()
            if interrupts.pending:
                state.save()
                raise KeyboardInterrupt
        model.eval()
        state.end_epoch(after_epoch(epoch) if after_epoch is not None else {}, len(plan))
    model.eval()
    state.save_if_due(finished=True)
    return state.result(finished=True)


def _step(plan, epoch, position, batches_before, loss_of, state, device) -> None:
    """One update: the batches of one accumulation group, forward and backward, then the optimiser."""
    arguments, phase = state.optimizer.arguments, state.phase
    first = position * arguments.gradient_accumulation_steps
    group = range(first, min(first + arguments.gradient_accumulation_steps, len(plan)))
    for index in group:
        torch.manual_seed(random.key(phase.seed, *phase.name, "step", epoch, index))
        batch = plan[index]
        state.tokens += batch.tokens
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=arguments.bf16):
            loss = loss_of(batch.to(device), batches_before + index)
        (loss / len(group)).backward()
        state.loss_sum = state.loss_sum.to(loss.device) + loss.detach().double()
    state.optimizer.step(state.step)
    state.step += 1
    state.position = position + 1


class _Interrupts:
    """Holds back Ctrl-C until the step under way is done, so that the state saved is a whole one; a second Ctrl-C stops
    at once. Outside the main thread, where Python delivers no signals, it does nothing."""

    def __init__(self):
        self.pending = False

    def __enter__(self):
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number, frame):
        if self.pending:
            raise KeyboardInterrupt
        self.pending = True

    def __exit__(self, *error):
        if self.main:
            signal.signal(signal.SIGINT, self.previous)


class _Loop:
    """Position, sums and records of a running phase, and their checkpoint."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, phase: Phase):
        self.model, self.optimizer, self.phase = model, optimizer, phase
        self.epoch = self.position = self.step = self.tokens = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.last_loss = float("nan")
        self.records: list[dict] = []
        self.seconds_before = 0.0
        self.started = self.saved = time.monotonic()

    @property
    def seconds(self) -> float:
        return self.seconds_before + time.monotonic() - self.started

    def end_epoch(self, record: dict, batches: int) -> None:
        self.last_loss = float(self.loss_sum) / max(1, batches)
        self.records.append(record)
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.epoch, self.position = self.epoch + 1, 0

    def result(self, finished: bool) -> TrainingResult:
        return TrainingResult(finished, self.step, self.tokens, self.seconds, self.last_loss, self.records)

    def save_if_due(self, finished: bool = False) -> None:
        """Save where the last save, or for a finished phase its start, is longer ago than the phase's save_seconds."""
        since = self.started if finished else self.saved
        if time.monotonic() - since > self.phase.save_seconds:
            self.save()

    def save(self) -> None:
        if self.phase.checkpoint is None:
            return
        self.saved = time.monotonic()
        counters = ("epoch", "position", "step", "tokens", "loss_sum", "last_loss", "records")
        state = {name: getattr(self, name) for name in counters}
        state |= {
            "seconds_before": self.seconds,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.adamw.state_dict(),
        }
        checkpoint.save(self.phase.checkpoint, self.phase.fingerprint, state)

    def resume(self) -> None:
        if self.phase.checkpoint is None or not self.phase.checkpoint.exists():
            return
        state = checkpoint.load(self.phase.checkpoint, self.phase.fingerprint)
        self.model.load_state_dict(state.pop("model"))
        self.optimizer.adamw.load_state_dict(state.pop("optimizer"))
        for name, value in state.items():
            setattr(self, name, value)


def forget(phases: Sequence[Phase]) -> None:
    """Delete the checkpoints of phases whose outcome is kept elsewhere."""
    for phase in phases:
        if phase.checkpoint is not None:
            phase.checkpoint.unlink(missing_ok=True)
