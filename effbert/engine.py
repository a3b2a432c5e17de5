"""The one training loop: teachers, supernet, candidates and final models all run through it, alone or many at once.

A phase is a model, the batches of each epoch, and a function from batch to loss. Everything random is keyed by (seed,
phase name, step), so a phase killed at any moment and started again gives the same numbers, and a model trained among
others the same as alone, up to last bits where each has several cores of a CPU. Models that train together take each
step in turn on the same batch; what all of them need of a batch, such as a teacher's outputs, is computed once for it.
On a CPU they share out its cores (effbert.threads). Several processes may train them, each on its part of every batch
(effbert.parallel).
"""

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from effbert import checkpoint, graphs, random
from effbert.data.batches import Batch
from effbert.kernels import gradients_in_place
from effbert.kernels.dispatch import current
from effbert.memory import out_of_memory
from effbert.optim import Optimizer, PartlyUsed, TrainingArguments
from effbert.pace import Standing
from effbert.parallel import ALONE, World
from effbert.threads import Team

CHECK_EVERY = 10  # steps between reads of the loss: a read waits for the device
LOSSES_KEPT = 24  # of those reads, evenly over a phase: what a curve on a page can show
DIVERGED = 10.0  # times the loss that a phase began with: more, in the mean of CHECK_EVERY steps, ends it
SAVING_SHARE = 0.05  # of the time may go into checkpoints


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
    """diverged: why the phase ended early (the loss not finite, or grown past DIVERGED), "" where it did not. steps:
    updates made. tokens: real tokens seen. seconds: time in the loop, of time shared with others an equal part, runs
    that were interrupted included up to their last checkpoint. loss: mean of the last epoch (NaN without steps).
    epochs: what `after_epoch` returned, epoch by epoch. best_step: updates made when `rank` was highest, 0 where the
    best is not asked for. losses: (share of the phase's steps that are done, loss) of the first step, and then of at
    most LOSSES_KEPT + 1 places, each the mean of the CHECK_EVERY steps before it, to four digits."""

    diverged: str = ""
    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: float = float("nan")
    epochs: list[dict] = field(default_factory=list)
    best_step: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether the phase ran to its end."""
        return not self.diverged


@dataclass(frozen=True)
class Trainee:
    """A model to train beside others. loss_of: (batch on the device, number of the batch in the phase, what is shared
    for the batch) -> 0-d loss, whose dropout is by `effbert.random`: others may run in other threads. after_epoch:
    called with the model in eval mode; its dict is kept. rank: where the arguments ask for the best weights, called
    with the model in eval mode; the first of the highest are the best. partly_used: the numbers of an update's batches
    -> which parameters they used in part only (effbert.optim.Optimizer). alike: loss_of does the same with every batch
    of a shape, whatever its number, in one forward pass, and so does `share`: on a GPU they may be recorded.
    step_bytes: what a step keeps for its backward pass, at most; 0 where it is not known."""

    model: nn.Module
    loss_of: Callable[[Batch, int, Any], torch.Tensor]
    phase: Phase
    after_epoch: Callable[[int], dict] | None = None
    rank: Callable[[], float] | None = None
    partly_used: Callable[[Sequence[int]], PartlyUsed] | None = None
    alike: bool = False
    step_bytes: int = 0


def train(
    model: nn.Module,
    plan_of: Callable[[int], Sequence[Batch]],
    loss_of: Callable[[Batch, int], torch.Tensor],
    arguments: TrainingArguments,
    phase: Phase,
    *,
    device: torch.device | str = "cpu",
    after_epoch: Callable[[int], dict] | None = None,
    rank: Callable[[], float] | None = None,
    on_step: Callable[[Standing], None] | None = None,
    partly_used: Callable[[Sequence[int]], PartlyUsed] | None = None,
    world: World = ALONE,
) -> TrainingResult:
    """`train_together` of one model, whose loss_of takes (batch on `device`, number of the batch in the phase)."""
    trainee = Trainee(model, lambda batch, number, _: loss_of(batch, number), phase, after_epoch, rank, partly_used)
    return train_together([trainee], plan_of, arguments, device=device, on_step=on_step, world=world)[0]


def train_together(
    trainees: Sequence[Trainee],
    plan_of: Callable[[int], Sequence[Batch]],
    arguments: TrainingArguments,
    *,
    share: Callable[[Batch], Any] | None = None,
    device: torch.device | str = "cpu",
    on_step: Callable[[Standing], None] | None = None,
    world: World = ALONE,
) -> list[TrainingResult]:
    """Train models in place over `arguments.num_train_epochs` epochs, step by step on the same batches.

    plan_of: epoch -> its batches, equally many each epoch. share: called once for a batch on `device`; its result goes
    to every loss_of. on_step: called after each step. A model whose loss or gradient is not finite, or whose
    loss grows past DIVERGED, ends its own phase; nothing is raised. With a checkpoint on disk a phase goes on from it,
    and the others catch up with it or it waits for them; the caller deletes the files (`forget`) once the outcome is
    safe elsewhere. Where memory does not hold all, half of them go first and the rest waits, on the CPU. With
    `arguments.load_best_model_at_end` each ends as it was when its `rank` was highest, which the first process asks.

    world: the processes that train these models, each with its part of the same batches as `plan_of`; the first of
    them writes the checkpoints, which all read. Dropout draws its own masks on each. There is no going by halves then:
    too little memory is an error.
    """
    if not trainees:
        return []
    together = _Together(trainees, plan_of, arguments, share, torch.device(device), world)
    with _Interrupts() as interrupts:
        try:
            together.run(interrupts, on_step)
        finally:
            together.team.close()
    return [learner.result() for learner in together.learners]


class _Interrupts:
    """Holds back Ctrl-C until the step or evaluation under way is done, so that the state saved is a whole one; a
    second Ctrl-C stops at once, or once what threads are at is done. Outside the main thread, where Python delivers
    no signals, it does nothing."""

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


class _Together:
    """Learners in lockstep: each takes the step that is due where it stands, the one furthest behind first."""

    def __init__(self, trainees, plan_of, arguments: TrainingArguments, share, device: torch.device, world: World):
        self.plan_of, self.arguments, self.share, self.device, self.world = plan_of, arguments, share, device, world
        self.plan = (0, plan_of(0)) if arguments.num_train_epochs else (0, ())
        apart = device.type == "cpu" and world.size == 1 and current() in ("auto", "eager")
        self.team = Team(len(trainees) if apart else 1, max(trainee.step_bytes for trainee in trainees))
        shared = arguments, len(self.plan[1]), device, world, self.team.pool is None
        self.learners = [_Learner(trainee, *shared) for trainee in trainees]
        stand = [(*learner.where, learner.step) for learner in self.learners]
        world.check_same(stand, f"{trainees[0].phase.fingerprint}: the processes see different checkpoints")
        self.width = len(self.learners)
        self.recorded = graphs.wanted() and world.size == 1 and all(trainee.alike for trainee in trainees)
        self.recorder: _Recorder | None = None
        self.save_every = max(trainee.phase.save_seconds for trainee in trainees)
        self.started = self.saved = time.monotonic()

    def run(self, interrupts: _Interrupts, on_step) -> None:
        """All phases, to their ends; in groups of `width`, which shrinks where memory does not suffice."""
        waiting = list(self.learners)
        while waiting:
            group, waiting = waiting[: self.width], waiting[self.width :]
            try:
                for learner in group:
                    learner.to(self.device)
                self.record(group)
                while running := [learner for learner in group if not learner.done]:
                    self.step(running, interrupts, on_step)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.width == 1 or self.world.size > 1:
                    raise
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # other lanes still work on what is moved now
                self.width = max(1, len(group) // 2)
                waiting = group + waiting
                for learner in group:
                    learner.drop_gradients()
            self.stop_recording(group)
            for learner in group:
                if waiting:
                    learner.to(torch.device("cpu"))
        for learner in self.learners:
            learner.to(self.device)
        if time.monotonic() - self.started > self.save_every:  # worth more than doing it again
            self.save(self.learners)

    def record(self, group: list["_Learner"]) -> None:
        """Begin to record the group's steps, where that can be done."""
        lanes = graphs.lanes(self.device, 1 + min(len(group), graphs.STREAMS)) if self.recorded else []
        if lanes:
            self.recorder = _Recorder(lanes[0], self.device)
            for number, learner in enumerate(group):
                learner.record_on(lanes[1 + number % (len(lanes) - 1)])

    def stop_recording(self, group: list["_Learner"]) -> None:
        """Forget what was recorded, and where it was."""
        if self.recorder is not None:
            self.recorder = None
            for learner in group:
                learner.record_on(None)

    def step(self, running: list["_Learner"], interrupts: _Interrupts, on_step) -> None:
        """One update of the learners that are furthest behind, and what is due after it."""
        begun = time.monotonic()
        where = min(learner.where for learner in running)
        due = [learner for learner in running if learner.where == where]
        epoch, position = where
        every = self.arguments.eval_steps
        if every and 0 < position < due[0].steps and position % every == 0:  # before what cannot be tried again
            for learner in due:
                learner.note_best()
            due = [learner for learner in due if not learner.diverged]
        if not due:
            return
        if position < due[0].steps:
            self.update(due, epoch, position)
            if on_step is not None:
                on_step(self.standing(due))
            if due[0].step % CHECK_EVERY == 0 or position + 1 == due[0].steps:
                for learner in due:
                    learner.check()
        else:
            self.team.each(due, _Learner.end_epoch)
        for learner in due:
            learner.seconds += (time.monotonic() - begun) / len(due)
        if self.world.any([interrupts.pending])[0]:
            self.save(self.learners)
            raise KeyboardInterrupt
        if due[0].step % CHECK_EVERY == 0 or position == due[0].steps:
            self.save_if_due(running)

    def standing(self, due: list["_Learner"]) -> Standing:
        """Where those are that took this step; no loss is read for it."""
        losses = tuple(learner.read_loss for learner in due if learner.read_loss is not None)
        return Standing(due[0].step, due[0].total, str(self.learners[0].phase.name[-1]), losses)

    def update(self, due: list["_Learner"], epoch: int, position: int) -> None:
        """Forward and backward of the batches of one accumulation group for each learner, then its optimiser."""
        plan = self.plan_for(epoch)
        accumulate = self.arguments.gradient_accumulation_steps
        group = range(position * accumulate, min((position + 1) * accumulate, len(plan)))
        for index in group:
            batch = plan[index]
            tokens = batch.tokens
            batch = batch.to(self.device) if self.recorder is None else self.recorder.batches.hold(batch)
            shared = self.look(batch)

            def learn(learner: _Learner, batch=batch, index=index, shared=shared, tokens=tokens) -> None:
                with learner.turn(self.recorder):
                    learner.learn(batch, index, shared, tokens, len(group))
                    if index == group[-1]:
                        learner.update()

            self.team.each(due, learn)
            for learner in due:
                learner.join()

    def look(self, batch: Batch) -> Any:
        """What all learners need of a batch."""
        if self.share is None:
            return None

        def read():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.bf16):
                return self.share(batch)

        if self.recorder is None:
            return read()
        with self.recorder.lane.after():
            return self.recorder.recordings.run(graphs.shape_of(batch), read)

    def plan_for(self, epoch: int) -> Sequence[Batch]:
        """The batches of an epoch, drawn once."""
        if self.plan[0] != epoch:
            self.plan = -1, ()  # two epochs' at once would take twice the memory
            plan, learner = self.plan_of(epoch), self.learners[0]
            if len(plan) != learner.batches:
                name = learner.phase.fingerprint
                raise ValueError(f"{name}: epoch {epoch} has {len(plan)} batches, not {learner.batches}")
            self.plan = epoch, plan
        return self.plan[1]

    def save_if_due(self, learners: list["_Learner"]) -> None:
        """Save where the last save is long enough ago."""
        if time.monotonic() - self.saved > self.save_every:
            self.save(learners)

    def save(self, learners: list["_Learner"]) -> None:
        """Write the checkpoints; the longer that takes, the longer until the next."""
        begun = time.monotonic()
        for learner in learners:
            learner.save()
        self.saved = time.monotonic()
        self.save_every = max(self.save_every, (self.saved - begun) / SAVING_SHARE)


class _Recorder:
    """What recorded learners have in common: the fixed places of batches, and the lane of what they share."""

    def __init__(self, lane: graphs.Lane, device: torch.device):
        self.lane, self.batches, self.recordings = lane, graphs.FixedBatches(device), graphs.Recordings(lane.record)


class _Learner:
    """A model in training: its position, optimiser, sums and records, and their checkpoint."""

    COUNTERS = (
        "epoch", "position", "step", "tokens", "loss_sum", "window_sum", "window_steps", "first_loss", "first_window",
        "early_sum", "late_loss", "last_loss", "records", "seconds",
    )  # fmt: skip

    def __init__(
        self, trainee: Trainee, arguments: TrainingArguments, batches: int, device: torch.device, world: World,
        alone: bool,
    ):  # fmt: skip
        """alone: no other thread of this process trains."""
        self.model, self.loss_of, self.phase = trainee.model, trainee.loss_of, trainee.phase
        self.after_epoch, self.rank, self.partly_used = trainee.after_epoch, trainee.rank, trainee.partly_used
        self.arguments, self.batches, self.device, self.world, self.alone = arguments, batches, device, world, alone
        self.steps = -(-batches // arguments.gradient_accumulation_steps)
        self.total = self.steps * arguments.num_train_epochs
        self.optimizer = Optimizer(self.model, arguments, self.total)
        self.epoch = self.position = self.step = self.tokens = self.window_steps = 0
        self.early = min(CHECK_EVERY, self.total) // 2  # steps of the first half of the first window
        self.loss_sum = self.window_sum = self.pending = torch.zeros((), dtype=torch.float64)
        self.first_loss = self.early_sum = torch.zeros((), dtype=torch.float64)
        self.late_loss = torch.full((), math.inf, dtype=torch.float64)
        self.pending_tokens, self.pending_numbers = 0, []
        self.last_loss = float("nan")
        self.first_window: float | None = None
        self.read_loss: float | None = None  # a batch's, in the mean of the steps before the last check
        self.records: list[dict] = []
        self.losses: list[tuple[float, float]] = []
        self.best: dict | None = None  # score, step and weights, on the CPU
        self.seconds, self.diverged = 0.0, ""
        self.lane = self.recordings = self.key = self.parts = None
        self.resume()
        if self.done:
            self.model.eval()

    @property
    def where(self) -> tuple[int, int]:
        """Epoch and step of the epoch that is due."""
        return self.epoch, self.position

    @property
    def done(self) -> bool:
        """Whether nothing is left of its phase."""
        return bool(self.diverged) or self.epoch >= self.arguments.num_train_epochs

    def learn(self, batch: Batch, index: int, shared, tokens: int, of: int) -> None:
        """Add the gradient of one batch, the `of`-th part of an update."""
        if not self.model.training:
            self.model.train()
        rank = () if self.world.is_first else ("rank", self.world.rank)  # else its rows would have rank 0's masks
        number = self.epoch * self.batches + index
        key = random.key(self.phase.seed, *self.phase.name, "step", self.epoch, index, *rank)
        if self.alone:  # for torch's own dropout, which models of others have
            torch.manual_seed(key)
        with random.seeded(key):
            if self.recordings is None:
                loss = self.add_gradient(batch, number, shared, of)
            else:
                self.key.fill_(random.drawn_key())
                self.parts.fill_(of)
                with random.dropout_key_in(self.key):
                    loss = self.recordings.run(
                        graphs.shape_of(batch), lambda: self.add_gradient(batch, number, shared, self.parts)
                    )
        self.pending_numbers.append(number)
        self.pending = self.pending.to(loss.device) + loss.double()
        self.pending_tokens += tokens

    def add_gradient(self, batch: Batch, number: int, shared, of: int | torch.Tensor) -> torch.Tensor:
        """Forward and backward; returns the loss, detached."""
        with gradients_in_place():
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.arguments.bf16):
                loss = self.loss_of(batch, number, shared)
            (loss / of).backward()
        return loss.detach()

    def update(self) -> None:
        """One step of the optimiser, and what it was worth."""
        self.world.add_up(self.optimizer.parameters, self.pending)
        if self.recordings is None:
            norm = self.optimizer.step(self.step, self.partly_used and self.partly_used(self.pending_numbers))
        else:
            self.optimizer.set_rate(self.step)
            norm = self.recordings.run("update", self.optimizer.apply)
        mean = self.pending + 0 * norm.double()  # a gradient that is not finite shows in the sums
        if self.step == 0:
            self.first_loss = mean
        if self.step < self.early:
            self.early_sum = self.early_sum.to(mean.device) + mean
        elif self.first_window is None and self.step:
            self.late_loss = torch.minimum(self.late_loss.to(mean.device), mean)
        self.loss_sum = self.loss_sum.to(mean.device) + mean
        self.window_sum = self.window_sum.to(mean.device) + mean
        self.tokens += self.pending_tokens
        self.drop_pending()
        self.step += 1
        self.position += 1
        self.window_steps += 1

    def record_on(self, lane: graphs.Lane | None) -> None:
        """Record steps on a lane from now on; None: no longer."""
        self.lane = lane
        self.recordings = self.key = self.parts = None
        if lane is not None:
            self.recordings = graphs.Recordings(lane.record)
            self.key = torch.zeros((), dtype=torch.int64, device=self.device)
            self.parts = torch.ones((), device=self.device)
        self.optimizer.keep_in_place(None if lane is None else self.device)

    def turn(self, recorder: _Recorder | None):
        """Inside, its work goes to its lane, after what the learners share."""
        return contextlib.nullcontext() if self.lane is None else self.lane.after(recorder.lane)

    def join(self) -> None:
        """What comes next waits for its lane."""
        if self.lane is not None:
            self.lane.join()

    def drop_gradients(self) -> None:
        """Forget what a step has added that was not completed."""
        self.optimizer.adamw.zero_grad(set_to_none=True)
        self.drop_pending()

    def drop_pending(self) -> None:
        """Begin the sums of an update anew."""
        self.pending, self.pending_tokens, self.pending_numbers = torch.zeros_like(self.pending), 0, []

    def check(self) -> None:
        """Read the loss of the steps since the last check; end the phase where it diverges from the mean of its first
        CHECK_EVERY steps, or of the first half of them, where that is less. Steps that the last of these windows lacks
        count as that mean, so that one odd batch is no divergence. The first window itself is judged by the phase's
        first loss, where steps compare: all of its second half are above. They do not where a step uses a part of a
        supernet, or another task than the one before: there the first half counts DIVERGED times, and what grows within
        it is not seen."""
        total = float(self.window_sum)
        self.check_finite(total)
        self.read_loss = total / (self.window_steps * self.arguments.gradient_accumulation_steps)
        if self.diverged or (self.window_steps < CHECK_EVERY and self.step < self.total):  # the end of an epoch
            return
        if self.first_window is None:
            if self.step > 1:
                self.keep_loss(1, float(self.first_loss) / self.arguments.gradient_accumulation_steps)
            begun, now = float(self.first_loss), float(self.late_loss) if self.partly_used is None else 0.0
            self.first_window = total / self.window_steps
            if self.early:
                early = float(self.early_sum) / self.early
                self.first_window = min(self.first_window, early if self.partly_used is None else DIVERGED * early)
        else:
            begun = self.first_window
            now = (total + (CHECK_EVERY - self.window_steps) * begun) / CHECK_EVERY
        self.keep_loss(self.step, self.read_loss)
        self.window_sum, self.window_steps = torch.zeros_like(self.window_sum), 0
        if math.inf > now > DIVERGED * begun > 0:
            self.diverged = f"loss grown from {begun:.3g} to {now:.3g} at step {self.step}"

    def keep_loss(self, step: int, loss: float) -> None:
        """Keep a loss that was read for the curve, where this step is one of its places."""
        every = CHECK_EVERY * math.ceil(self.total / CHECK_EVERY / LOSSES_KEPT)
        if step % every == 0 or step in (1, self.total):
            self.losses.append((float(f"{step / self.total:.4g}"), float(f"{loss:.4g}")))

    def check_finite(self, total: float) -> None:
        """End the phase where the loss of the steps since the last check is not finite."""
        if not math.isfinite(total):
            self.diverged = f"loss not finite at step {self.step}"

    def end_epoch(self) -> None:
        """Evaluate and note the epoch's loss."""
        self.note_best()
        self.model.eval()
        self.records.append(self.after_epoch(self.epoch) if self.after_epoch is not None else {})
        self.last_loss = float(self.loss_sum) / max(1, self.batches)
        self.loss_sum = torch.zeros_like(self.loss_sum)
        self.epoch, self.position = self.epoch + 1, 0
        if self.done and self.best is not None:
            self.model.load_state_dict(self.best["model"])

    def note_best(self) -> None:
        """Where the best is asked for: score the model, and keep its weights where it was never better. Of a model that
        is no longer finite there is no score."""
        if not self.arguments.load_best_model_at_end:
            return
        if self.window_steps:
            self.check_finite(float(self.window_sum))
        if self.diverged:
            return
        self.model.eval()
        score = self.world.on_first(self.rank)
        if self.best is None or score > self.best["score"]:
            weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self.model.state_dict().items()}
            self.best = {"score": score, "step": self.step, "model": weights}

    def result(self) -> TrainingResult:
        """What the phase came to."""
        best = 0 if self.best is None else self.best["step"]
        return TrainingResult(
            self.diverged, self.step, self.tokens, self.seconds, self.last_loss, self.records, best, self.losses
        )

    def to(self, device: torch.device) -> None:
        """Move the model and its optimiser's state."""
        self.model.to(device)
        for state in self.optimizer.adamw.state.values():
            for name, value in state.items():
                state[name] = value.to(device) if isinstance(value, torch.Tensor) else value

    def save(self) -> None:
        """Write the checkpoint, where the phase keeps one."""
        if self.phase.checkpoint is None or self.diverged or not self.world.is_first:
            return
        state = {name: getattr(self, name) for name in self.COUNTERS}
        state |= {"model": self.model.state_dict(), "optimizer": self.optimizer.adamw.state_dict(), "best": self.best}
        state["losses"] = self.losses
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
            self.best = state.get("best")
            self.losses = state.get("losses", [])  # not in checkpoints from before they were kept
        except (KeyError, ValueError, RuntimeError) as error:
            raise ValueError(f"checkpoint {path} does not fit this phase: delete it to restart this phase") from error


def forget(phases: Sequence[Phase]) -> None:
    """Delete the checkpoints of phases whose outcome is kept elsewhere."""
    for phase in phases:
        if phase.checkpoint is not None:
            phase.checkpoint.unlink(missing_ok=True)
