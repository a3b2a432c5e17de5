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
from effbert.data.batches import Batch
from effbert.kernels import gradients_in_place
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
    plan_of: Callable[[int], Sequence[Batch]],
    loss_of: Callable[[Batch, int], torch.Tensor],
    arguments: TrainingArguments,
    phase: Phase,
    *,
    device: torch.device | str = "cpu",
    after_epoch: Callable[[int], dict] | None = None,
    on_step: Callable[[int, int], None] | None = None,
) -> TrainingResult:
    """Train `model` in place over `arguments.num_train_epochs` epochs.

    plan_of: epoch -> its batches, equally many each epoch. loss_of: (batch on `device`, number of the batch in the
    phase) -> 0-d loss. after_epoch: called with the model in eval mode; its dict is kept. on_step: called with
    (step, total steps). A loss or gradient that is not finite ends the phase with finished=False; nothing is raised.
    With a checkpoint on disk the phase goes on from it; the caller deletes the file (`forget`) once the phase's outcome
    is safe elsewhere.
    """
    loop = _Loop(model, plan_of, loss_of, arguments, phase, torch.device(device))
    loop.resume()
    with _Interrupts() as interrupts:
        for epoch in range(loop.epoch, arguments.num_train_epochs):
            if not loop.run_epoch(plan_of(epoch), interrupts, on_step):
                return loop.result(finished=False)
            loop.end_epoch(after_epoch)
            loop.stop_if(interrupts)
        loop.model.eval()
        loop.save_if_due(finished=True)
    return loop.result(finished=True)


class _Interrupts:
    """Holds back Ctrl-C until the step or evaluation under way is done, so that the state saved is a whole one; a
    second Ctrl-C stops at once. Outside the main thread, where Python delivers no signals, it does nothing."""

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

    def __exit__(self, kind, *_):
        if self.main:
            signal.signal(signal.SIGINT, self.previous)
        if self.pending and kind is None:
            raise KeyboardInterrupt


class _Loop:
    """A running phase: its position, sums and records, one epoch at a time, and their checkpoint."""

    COUNTERS = ("epoch", "position", "step", "tokens", "loss_sum", "last_loss", "records", "seconds_before")

    def __init__(self, model, plan_of, loss_of, arguments: TrainingArguments, phase: Phase, device: torch.device):
        self.model, self.loss_of, self.arguments, self.phase, self.device = model, loss_of, arguments, phase, device
        self.batches = len(plan_of(0)) if arguments.num_train_epochs else 0
        self.steps = -(-self.batches // arguments.gradient_accumulation_steps)
        self.total = self.steps * arguments.num_train_epochs
        self.optimizer = Optimizer(model, arguments, self.total)
        self.epoch = self.position = self.step = self.tokens = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.last_loss = float("nan")
        self.records: list[dict] = []
        self.seconds_before = 0.0
        self.started = self.saved = time.monotonic()

    def run_epoch(self, plan: Sequence[Batch], interrupts: _Interrupts, on_step) -> bool:
        """The rest of this epoch; False where the loss or a gradient is no longer finite."""
        if len(plan) != self.batches:
            raise ValueError(
                f"{self.phase.fingerprint}: epoch {self.epoch} has {len(plan)} batches, not {self.batches}"
            )
        self.model.train()
        while self.position < self.steps:
            self.run_step(plan)
            if on_step is not None:
                on_step(self.step, self.total)
            if self.step % CHECK_EVERY == 0 or self.position == self.steps:
                if not torch.isfinite(self.loss_sum).item():
                    return False
                self.save_if_due()
            self.stop_if(interrupts)
        return True

    def run_step(self, plan: Sequence[Batch]) -> None:
        """One update: forward and backward of the batches of one accumulation group, then the optimiser."""
        accumulate = self.arguments.gradient_accumulation_steps
        group = range(self.position * accumulate, min((self.position + 1) * accumulate, self.batches))
        for index in group:
            torch.manual_seed(random.key(self.phase.seed, *self.phase.name, "step", self.epoch, index))
            batch = plan[index]
            self.tokens += batch.tokens
            with gradients_in_place():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.bf16):
                    loss = self.loss_of(batch.to(self.device), self.epoch * self.batches + index)
                (loss / len(group)).backward()
            self.loss_sum = self.loss_sum.to(loss.device) + loss.detach().double()
        norm = self.optimizer.step(self.step)
        self.loss_sum = self.loss_sum + 0 * norm.double()  # a gradient that is not finite shows in the sum
        self.step += 1
        self.position += 1

    def end_epoch(self, after_epoch) -> None:
        """Evaluate and note the epoch's loss."""
        self.model.eval()
        self.records.append(after_epoch(self.epoch) if after_epoch is not None else {})
        self.last_loss = float(self.loss_sum) / max(1, self.batches)
        self.loss_sum = torch.zeros((), dtype=torch.float64)
        self.epoch, self.position = self.epoch + 1, 0

    def stop_if(self, interrupts: _Interrupts) -> None:
        """Save and stop where Ctrl-C was pressed."""
        if interrupts.pending:
            self.save()
            raise KeyboardInterrupt

    def result(self, finished: bool) -> TrainingResult:
        """What the phase came to."""
        return TrainingResult(finished, self.step, self.tokens, self.seconds(), self.last_loss, self.records)

    def seconds(self) -> float:
        """Time in the loop, earlier runs up to their checkpoint included."""
        return self.seconds_before + time.monotonic() - self.started

    def save_if_due(self, finished: bool = False) -> None:
        """Save where the last save, or for a finished phase its start, is longer ago than the phase's save_seconds."""
        since = self.started if finished else self.saved
        if time.monotonic() - since > self.phase.save_seconds:
            self.save()

    def save(self) -> None:
        """Write the checkpoint, where the phase keeps one."""
        if self.phase.checkpoint is None:
            return
        self.saved = time.monotonic()
        state = {name: getattr(self, name) for name in self.COUNTERS} | {"seconds_before": self.seconds()}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.adamw.state_dict()}
        checkpoint.save(self.phase.checkpoint, self.phase.fingerprint, state)

    def resume(self) -> None:
        """Go on from the checkpoint, where there is one."""
        path = self.phase.checkpoint
        if path is None or not path.exists():
            return
        state = checkpoint.load(path, self.phase.fingerprint)
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.adamw.load_state_dict(state["optimizer"])
            for name in self.COUNTERS:
                setattr(self, name, state[name])
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"checkpoint {path} does not fit this phase: delete it to restart this phase") from error


def forget(phases: Sequence[Phase]) -> None:
    """Delete the checkpoints of phases whose outcome is kept elsewhere."""
    for phase in phases:
        if phase.checkpoint is not None:
            phase.checkpoint.unlink(missing_ok=True)
