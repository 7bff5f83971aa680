"""What a training run tells, to people and to programs.

On a terminal a bar at the bottom shows where it is; elsewhere (a file, a pipe, a batch system)
plain lines at a fair distance. The log has everything, one JSON object a line.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from .checkpoint import CheckpointError, reason, write_atomically
from .evaluation import perplexity

SECONDS_BETWEEN_LINES = 5.0


@dataclass(frozen=True)
class StepReport:
    """A log entry on training: means over the steps since the one before.

    Attributes:
        step: steps taken since the beginning of the run.
        epoch: pass over the text, from 1.
        loss: cross-entropy in nats.
        grad_norm: global norm of the gradient of the last step, before clipping.
        tokens_per_second: of all processes together.
        lr: learning rate of the last step.
    """

    step: int
    epoch: int
    loss: float
    grad_norm: float
    tokens_per_second: float
    lr: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch}  loss {self.loss:.4f}  perplexity {perplexity(self.loss):.2f}  "
            f"{self.tokens_per_second:,.0f} tokens/s  gradient {self.grad_norm:.2f}  "
            f"lr {self.lr:.2g}"
        )


class Reporter:
    """Tells nobody anything: what the processes other than the first use, and the tests."""

    def begin(self, total_steps: int, step: int) -> None:
        """Training starts or goes on at `step`."""

    def step(self, report: StepReport) -> None:
        """A log entry is due."""

    def message(self, text: str) -> None:
        """A line to read."""

    def end(self) -> None:
        """Training is over; lines may follow."""


class PlainReporter(Reporter):
    """Lines of text, for anything that isn't a terminal."""

    def __init__(self, stream: TextIO):
        self._stream = stream
        self._total = 0
        self._next_line = 0.0

    def begin(self, total_steps: int, step: int) -> None:
        self._total = total_steps

    def step(self, report: StepReport) -> None:
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + SECONDS_BETWEEN_LINES
            self.message(f"step {report.step}/{self._total}  {report}")

    def message(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class TerminalReporter(Reporter):
    """A progress bar with messages above it."""

    def __init__(self, console: Console):
        self._console = console
        self._progress = Progress(
            TextColumn("{task.completed}/{task.total}"),
            BarColumn(bar_width=8),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=console,
            transient=True,
        )
        self._task: Any = None

    def begin(self, total_steps: int, step: int) -> None:
        self._task = self._progress.add_task("", total=total_steps, completed=step)
        self._progress.start()

    def step(self, report: StepReport) -> None:
        # Short enough for a terminal of 80 columns.
        figures = (
            f"loss {report.loss:.4f}  ppl {perplexity(report.loss):.2f}  "
            f"{report.tokens_per_second:,.0f} tokens/s  grad {report.grad_norm:.2f}"
        )
        self._progress.update(self._task, completed=report.step, description=figures)

    def message(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def end(self) -> None:
        self._progress.stop()


def make_reporter(stream: TextIO) -> Reporter:
    """The reporter that suits a stream."""
    console = Console(file=stream)
    return TerminalReporter(console) if console.is_terminal else PlainReporter(stream)


class TrainingLog:
    """log.jsonl: appended to, one JSON object a line, each with its `kind` and `step`."""

    def __init__(self, path: Path):
        self._path = path

    def add(self, kind: str, step: int, **values: float | int | str) -> None:
        """Appends an entry; what is not a finite number becomes null, as JSON has no other way.

        Raises:
            CheckpointError: the file can't be written.
        """
        entry = {"kind": kind, "step": step} | {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {reason(error)}") from error

    def forget_after(self, step: int) -> None:
        """Removes the entries of later steps: those a resumed run is about to take again."""
        if self._path.exists():
            kept = [entry for entry in read_log(self._path) if entry["step"] <= step]
            lines = "".join(json.dumps(entry) + "\n" for entry in kept)
            write_atomically(self._path, lines.encode())


def read_log(path: Path) -> list[dict[str, Any]]:
    """The entries of a log; a last line that a crash cut short is left out.

    Raises:
        CheckpointError: the file is missing, unreadable or damaged.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {reason(error)}") from error
    entries = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            entry["kind"], entry["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise CheckpointError(f"{path} is damaged in line {number}") from error
        entries.append(entry)
    return entries
