"""What a person sees while a search runs: one line for each finished thing, and on a terminal a live line below them
with stage, candidate, best so far and time left. Where the output is no terminal there are only the lines."""

import time

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


class Reporter:
    """Prints lines, and keeps the live line of the stage under way."""

    def __init__(self, console: Console | None = None):
        self.console = console or Console(highlight=False, soft_wrap=True)
        self.started = time.monotonic()
        self._live: Progress | None = None
        self._task = None

    def say(self, text: str) -> None:
        """One line, with the seconds since the start."""
        self.console.print(f"[dim]{time.monotonic() - self.started:6.0f} s[/dim]  {text}", markup=True)

    def start(self, stage: str, total: int, done: int = 0) -> None:
        """A stage of `total` units begins, `done` of which are there from an earlier run."""
        self.stage, self.total, self.done, self.first = stage, total, done, done
        self.stage_started = time.monotonic()
        if self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
            self._live = Progress(*columns, console=self.console, transient=True)
            self._live.start()
            self._task = self._live.add_task(stage, total=total, completed=done)

    def advance(self, text: str, best: str) -> None:
        """One unit is done; `text` says how it came out, `best` what is best so far."""
        self.done += 1
        left = self.time_left()
        self.say(f"{self.stage} {self.done}/{self.total}  {text}  best {best}  left {left}")
        if self._live is not None:
            description = f"{self.stage} {self.done}/{self.total}  best {best}  left {left}"
            self._live.update(self._task, completed=self.done, description=description)

    def time_left(self) -> str:
        """Estimate for this stage from the mean of the units done in this process."""
        measured = self.done - self.first
        if measured < 1:
            return "?"
        seconds = (time.monotonic() - self.stage_started) / measured * (self.total - self.done)
        return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"

    def stop(self) -> None:
        """The stage is over."""
        if self._live is not None:
            self._live.stop()
            self._live = None
