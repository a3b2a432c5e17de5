"""What a person sees while a search runs: one line for each finished thing, and on a terminal a live line below them
with what is being trained or searched, the best so far and the time left. Elsewhere there are only the lines, and what
takes long says now and then where it is (effbert.pace)."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from effbert.pace import Pace, Standing, time_text

PARTS = {"general": ", on text", "task": ", on the task", "tasks": ", on all tasks", "warm-up": ", warming up"}


class Reporter:
    """Prints lines, and keeps the live lines of the stage and of the training phase under way; use it in a `with`.
    Not `shown`, it is silent."""

    def __init__(self, console: Console | None = None, shown: bool = True):
        self.console = console or Console(highlight=False, soft_wrap=True, quiet=not shown)
        self.started = time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        silent = not (shown and self.console.is_terminal)
        self._live = Progress(*columns, console=self.console, transient=True, disable=silent)
        self._log, self._logged = logging.getLogger("effbert"), _Said(self)

    def __enter__(self) -> "Reporter":
        self._live.start()
        self._log_level = self._log.level
        self._log.setLevel(logging.INFO)
        self._log.addHandler(self._logged)
        return self

    def __exit__(self, *_) -> None:
        self._log.removeHandler(self._logged)
        self._log.setLevel(self._log_level)
        self._live.stop()

    def say(self, text: str) -> None:
        """One line, with the seconds since the start."""
        self.console.print(f"[dim]{time.monotonic() - self.started:6.0f} s[/dim]  {escape(text)}")

    def steps(self, what: str) -> Callable[[Standing], None]:
        """A live line for training phases that follow each other: call what it returns after every step."""
        line, phase = self._live.add_task(escape(what), total=None, visible=False), _PhaseLines(what)

        def on_step(at: Standing) -> None:
            self._live.update(line, completed=at.step, total=at.total, visible=at.step < at.total)
            for text in phase.lines(at, self._live.disable):
                self.say(text)

        return on_step

    def stage(self, name: str, total: int, done: int) -> "StageLine":
        """A stage of `total` candidates begins, `done` of which are there from an earlier run."""
        return StageLine(self, name, total, done)


class _PhaseLines:
    """What there is to say of training phases that follow each other: with which step one goes on that was begun
    before, and at its pace how far it is."""

    def __init__(self, what: str):
        self.what, self.last, self.pace = what, None, Pace()

    def lines(self, at: Standing, often: bool) -> Iterator[str]:
        """The lines due after a step; `often`, also how far it is."""
        what = self.what + PARTS.get(at.part, "")
        last, self.last = self.last, at
        if last is None or at.part != last.part or at.step < last.step or last.step == last.total:
            self.pace = Pace(at.step / at.total)
            if at.step > 1:
                yield f"{what}: goes on after step {at.step - 1:,} of {at.total:,}"
            return
        left = self.pace.left(at.step / at.total) if often else None
        if left is not None:
            yield f"{what}: step {at.step:,} of {at.total:,}{_losses(at.losses)}, {left} left"


def _losses(losses: Sequence[float]) -> str:
    """The losses of models that train together, from the least to the most."""
    ends = dict.fromkeys(f"{loss:.4f}" for loss in (min(losses), max(losses))) if losses else ()
    return f", loss {' to '.join(ends)}" if ends else ""


class _Said(logging.Handler):
    """Log records of the project, such as which backend its kernels run on, as lines of the reporter."""

    def __init__(self, reporter: Reporter):
        super().__init__(logging.INFO)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.say(record.getMessage())


class StageLine:
    """Candidates of one stage: a line for each that is done, with the best so far and the time left."""

    def __init__(self, reporter: Reporter, name: str, total: int, done: int):
        self.reporter, self.name, self.total, self.done, self.first = reporter, name, total, done, done
        self.started, self.best = time.monotonic(), "none"
        self._line = reporter._live.add_task(name, total=total, completed=done)

    def advance(self, text: str, best: str, done: int) -> None:
        """One more candidate is done, `done` in all; `text` says how it came out."""
        self.best = best
        self.done_one(text, done)

    def done_one(self, text: str, done: int) -> None:
        """The same for one that does not change what is best."""
        self.done = done
        state = f"{self.name} {self.done}/{self.total}"
        self.reporter.say(f"{state}  {text}  best {self.best}  left {self.time_left()}")
        self.reporter._live.update(self._line, completed=self.done, description=f"{state}  best {self.best}")

    def catch_up(self, done: int) -> None:
        """So many are done by all workers together."""
        self.done = done
        self.reporter._live.update(self._line, completed=done)

    def time_left(self) -> str:
        """For the rest of the stage, from the mean of the candidates done in this process."""
        each = (time.monotonic() - self.started) / max(1, self.done - self.first)
        return time_text(each * (self.total - self.done))

    def close(self) -> None:
        """The stage is over."""
        self.reporter._live.remove_task(self._line)
