"""The training loop: truncated backpropagation through time over one long text.

A chunk of `bptt` steps is read in every row, the gradient of its loss flows back to the chunk's
beginning and no further, and the state is carried to the next chunk as a constant: TBPTT(k1, k2)
with k1 = k2 = bptt (Williams & Peng 1990).

Everything the next step depends on is in the model, the optimiser, the random number generators,
the carried state and `Position`, and all five are in a checkpoint: a resumed run takes the very
steps, bit for bit, that it would have taken uninterrupted.
"""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from enum import Enum

import torch
from torch import Tensor, nn

from ..bptt import chunks, detach, reset
from ..models.language_model import LanguageModel, State, cross_entropy
from ..text.corpus import Corpus
from .batches import text_rows, time_major
from .checkpoint import (
    BEST,
    LAST,
    CheckpointError,
    RunDirectory,
    fill_model,
    model_tensors,
    read_checkpoint,
    write_checkpoint,
)
from .distributed import Engine
from .evaluation import Score, evaluate
from .interrupt import InterruptWish
from .progress import Reporter, StepReport, TrainingLog
from .schedule import Plateau, learning_rate
from .settings import SettingsError, TrainSettings
from .snapshot import (
    optimizer_from_tensors,
    optimizer_to_tensors,
    random_from_tensors,
    random_to_tensors,
    state_from_tensors,
    state_to_tensors,
)


class DivergenceError(ArithmeticError):
    """Loss or gradient is no longer finite; the message is one line for the user."""


class Stop(Enum):
    """Why training ended."""

    EPOCHS = "all epochs done"
    STEPS = "step limit reached"
    TIME = "time limit reached"
    INTERRUPT = "interrupted"


@dataclass
class Position:
    """Where in its course a training run is.

    Attributes:
        step: steps taken.
        epoch: passes over the text completed.
        column: the next chunk begins at this column of the rows.
        best_loss: lowest validation loss so far, that of the `best` checkpoint; None before any.
        plateau: what the learning rate depends on.
        interval_loss, interval_steps: sum and number of the losses not yet in the log.
    """

    step: int = 0
    epoch: int = 0
    column: int = 0
    best_loss: float | None = None
    plateau: Plateau = field(default_factory=Plateau)
    interval_loss: float = 0.0
    interval_steps: int = 0


def make_optimizer(settings: TrainSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The optimiser that the settings name: Adam (Kingma & Ba 2015), or plain SGD."""
    kind = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
    return kind(model.parameters(), lr=settings.lr, fused=True)


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,
    targets: Tensor,
    state: State | None,
    *,
    clip: float = 0.0,
) -> tuple[float, float, State]:
    """One step of truncated backpropagation through time.

    Args:
        model: a `LanguageModel`, or one wrapped for data parallel training.
        optimizer: of the model's parameters.
        inputs, targets: int64, shape (T, B).
        state: carried from the chunk before; None at the beginning of the text.
        clip: largest global norm of the gradient (Pascanu et al. 2013); 0 doesn't clip.

    Returns:
        the loss before the step, the norm of the gradient before clipping, and the state to carry.

    Raises:
        DivergenceError: the loss or the gradient isn't finite; no parameter has changed.
    """
    optimizer.zero_grad()
    logits, state = model(inputs, state)
    loss = cross_entropy(logits, targets)
    loss.backward()
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item()
    if not (math.isfinite(loss.item()) and math.isfinite(grad_norm)):
        raise DivergenceError(f"loss is {loss.item()} and gradient norm {grad_norm}")
    optimizer.step()
    return loss.item(), grad_norm, detach(state)


class Trainer:
    """One training run.

    Args:
        settings: what to compute.
        corpus: the text.
        model: on the device of this process.
        engine: this process among all.
        directory: where checkpoints and log go; None keeps nothing.
        reporter: who is told.
    """

    def __init__(
        self,
        settings: TrainSettings,
        corpus: Corpus,
        model: LanguageModel,
        *,
        engine: Engine | None = None,
        directory: RunDirectory | None = None,
        reporter: Reporter | None = None,
    ):
        self.settings = settings
        self.corpus = corpus
        self.model = model
        self.engine = engine or Engine()
        self.directory = directory
        self.reporter = reporter or Reporter()
        self.position = Position()
        self.state: State | None = None
        self.optimizer = make_optimizer(settings, model)
        self._parallel_model = self.engine.wrap(model)
        self._device = model.embedding.weight.device
        world_size = self.engine.world_size
        try:
            rows = text_rows(corpus.train.tokens, settings.batch_size * world_size)
        except ValueError as error:
            raise SettingsError(
                f"the training split is too short for batch_size {settings.batch_size}: {error}"
            ) from error
        self._rows = rows[self.engine.rank :: world_size]
        self._columns = rows.shape[1] - 1
        self.steps_per_epoch = -(-self._columns // settings.bptt)
        self.total_steps = settings.epochs * self.steps_per_epoch
        if settings.max_steps:
            self.total_steps = min(self.total_steps, settings.max_steps)
        self._log = None
        if directory is not None and self.engine.is_main:
            self._log = TrainingLog(directory.log_file)
        self._interval_tokens = 0
        self._interval_seconds = 0.0

    def run(self, wish: InterruptWish | None = None) -> tuple[Stop, Score]:
        """Trains until the settings or a wish end it, then saves and validates.

        Returns:
            why it ended, and how well the model it ended with predicts the validation split.

        Raises:
            DivergenceError: see `train_step`.
            CheckpointError: a file can't be written; the checkpoint before is intact.
        """
        wish = wish or InterruptWish()
        deadline = math.inf
        if self.settings.max_minutes:
            deadline = time.monotonic() + 60 * self.settings.max_minutes
        self.model.train()
        self.reporter.begin(self.total_steps, self.position.step)
        score = None
        try:
            stop = self._finished()
            while stop is None:
                interrupted, late = self._step(wish, deadline)
                score = None
                if self.position.step % self.settings.log_interval == 0:
                    self._report_interval()
                if self.position.step % self.settings.eval_interval == 0:
                    score = self._validate()
                    self.position.plateau.observe(score.loss)
                    self.save()
                stop = self._finished()
                if interrupted:
                    stop = Stop.INTERRUPT
                elif stop is None and late:
                    stop = Stop.TIME
            if score is None:
                # First of all the work is made safe: validation takes its time.
                self.save()
                # Outside the regular course, so the plateau must not hear of it: it would learn at
                # other moments than in a run that goes on.
                score = self._validate()
                self.save()
        finally:
            self.reporter.end()
        return stop, score

    def save(self) -> None:
        """Writes the `last` checkpoint."""
        if self.directory is None:
            return
        tensors, extra = optimizer_to_tensors(self.optimizer)
        tensors |= state_to_tensors(self.state, self.engine)
        tensors |= random_to_tensors(self._device, self.engine)
        if self.engine.is_main:
            write_checkpoint(
                self.directory.checkpoint_file(LAST),
                tensors | model_tensors(self.model),
                {"position": dataclasses.asdict(self.position), "optimizer": extra},
            )

    def resume(self) -> None:
        """Continues from the `last` checkpoint of the directory.

        Raises:
            CheckpointError: it is missing, damaged, or of another model.
        """
        file = self.directory.checkpoint_file(LAST)
        tensors, record = read_checkpoint(file)
        fill_model(self.model, tensors, file)
        try:
            stored = record["position"]
            self.position = Position(**stored | {"plateau": Plateau(**stored["plateau"])})
            optimizer_from_tensors(self.optimizer, tensors, record["optimizer"])
            self.state = state_from_tensors(tensors, self._device, self.engine)
            random_from_tensors(tensors, self._device, self.engine)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{file} is damaged: {error}") from error
        if self._log is not None:
            self._log.forget_after(self.position.step)

    def _finished(self) -> Stop | None:
        if self.position.epoch >= self.settings.epochs:
            return Stop.EPOCHS
        if self.position.step >= self.total_steps:
            return Stop.STEPS
        return None

    def _step(self, wish: InterruptWish, deadline: float) -> tuple[bool, bool]:
        """Takes a step and says whether any process was interrupted, and whether any is late."""
        position = self.position
        started = time.monotonic()
        lr = self._learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        inputs, targets = (
            time_major(part, self._device)
            for part in next(chunks(self._rows, self.settings.bptt, position.column))
        )
        try:
            loss, self._grad_norm, self.state = train_step(
                self._parallel_model,
                self.optimizer,
                inputs,
                targets,
                self.state,
                clip=self.settings.clip,
            )
        except DivergenceError as error:
            raise DivergenceError(
                f"training diverged at step {position.step + 1}: {error}; lower --lr or --clip"
            ) from error
        total_loss, interrupted, late = self.engine.sum(
            [loss, float(wish.signal is not None), float(time.monotonic() >= deadline)]
        )
        position.interval_loss += total_loss / self.engine.world_size
        position.interval_steps += 1
        position.step += 1
        self.state = reset(self.state, self._rows_to_reset())
        position.column += len(inputs)
        if position.column >= self._columns:
            position.epoch += 1
            position.column = 0
            # The text begins anew.
            self.state = None
        self._interval_tokens += inputs.numel() * self.engine.world_size
        self._interval_seconds += time.monotonic() - started
        self._lr = lr
        return interrupted > 0, late > 0

    def _rows_to_reset(self) -> Tensor:
        """The rows that forget their state before the next chunk: each once in `reset_interval`
        chunks, in turns."""
        interval = self.settings.reset_interval
        row = self.engine.rank + self.engine.world_size * torch.arange(
            len(self._rows), device=self._device
        )
        if interval == 0:
            return torch.zeros_like(row, dtype=torch.bool)
        return (row + self.position.step) % interval == 0

    def _learning_rate(self) -> float:
        return learning_rate(
            self.settings.schedule,
            self.settings.lr,
            self.position.step,
            self.total_steps,
            self.position.plateau,
        )

    def _report_interval(self) -> None:
        position = self.position
        # The last step of an epoch belongs to that epoch, not to the next.
        epoch = position.epoch + (position.column > 0)
        report = StepReport(
            step=position.step,
            epoch=epoch,
            loss=position.interval_loss / position.interval_steps,
            grad_norm=self._grad_norm,
            tokens_per_second=self._interval_tokens / self._interval_seconds,
            lr=self._lr,
        )
        position.interval_loss = 0.0
        position.interval_steps = 0
        self._interval_tokens = 0
        self._interval_seconds = 0.0
        self.reporter.step(report)
        if self._log is not None:
            self._log.add("train", **dataclasses.asdict(report))

    def _validate(self) -> Score:
        """Scores the validation split, and keeps the model if it is the best so far."""
        score = evaluate(
            self.model,
            self.corpus.valid,
            bptt=self.settings.bptt,
            engine=self.engine,
            max_tokens=self.settings.eval_tokens,
        )
        best = self.position.best_loss is None or score.loss < self.position.best_loss
        self.reporter.message(
            f"step {self.position.step}  validation {score}{'  (best)' if best else ''}"
        )
        if self._log is not None:
            self._log.add(
                "valid",
                self.position.step,
                loss=score.loss,
                perplexity=score.perplexity,
                bits_per_character=score.bits_per_character,
            )
        if best:
            self.position.best_loss = score.loss
            if self.directory is not None and self.engine.is_main:
                write_checkpoint(
                    self.directory.checkpoint_file(BEST),
                    model_tensors(self.model),
                    {"step": self.position.step, "loss": score.loss},
                )
        return score
