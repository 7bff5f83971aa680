"""The project in two minutes: a language model learns, writes, and is timed beside torch.nn.

``python -m benchmarks.demo`` trains the default model on the default text for two minutes, lets it
write, and then times one training step of that very model with rnnfast's layers and with
torch.nn's, in turns in one process (see benchmarks/timing.py).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from rnnfast.bptt import chunks
from rnnfast.models import LanguageModel
from rnnfast.text import build_corpus
from rnnfast.training import RunDirectory, TrainSettings, train
from rnnfast.training.batches import text_rows, time_major
from rnnfast.training.loop import make_optimizer, train_step
from rnnfast.training.progress import read_log

from . import timing

MINUTES = 2.0
ROUNDS = 15
CANDIDATES = ("rnnfast", "torch")


class TrainingSteps:
    """Training of one model, a step a call, from where a run left it.

    Args:
        directory: of the run.
        backend: who computes the recurrent layers.
    """

    def __init__(self, directory: RunDirectory, backend: str) -> None:
        record, self.model = directory.open_model("best", backend=backend)
        self.settings = record.settings
        self.model.train()
        self._optimizer = make_optimizer(self.settings, self.model)
        corpus = build_corpus(self.settings.data, self.settings.level, vocabulary=record.vocabulary)
        self._rows = text_rows(corpus.train.tokens, self.settings.batch_size)
        self._state = None
        self._chunks = iter(())

    def __call__(self) -> float:
        """Takes a step and returns the loss before it."""
        chunk = next(self._chunks, None)
        if chunk is None:
            self._chunks = chunks(self._rows, self.settings.bptt)
            chunk = next(self._chunks)
        inputs, targets = (time_major(part, torch.device("cpu")) for part in chunk)
        loss, _, self._state = train_step(
            self.model, self._optimizer, inputs, targets, self._state, clip=self.settings.clip
        )
        return loss


def compare(directory: RunDirectory, rounds: int) -> list[str]:
    """Times a training step of each candidate; lines of a report."""
    steps = {name: TrainingSteps(directory, name) for name in CANDIDATES}
    losses = {name: step() for name, step in steps.items()}
    timings = timing.time_candidates(steps, rounds=rounds)
    model, settings = steps["rnnfast"].model, steps["rnnfast"].settings
    tokens = settings.batch_size * settings.bptt
    lines = [
        f"One training step of {describe(model)} on {settings.batch_size} x {settings.bptt} "
        f"tokens, {torch.get_num_threads()} threads, median of {rounds}:"
    ]
    for name, candidate in timings.items():
        lines.append(
            f"  {name:8} {candidate.median * 1e3:8.2f} ms  {tokens / candidate.median:10,.0f} "
            f"tokens/s  loss of the first step {losses[name]:.5f}"
        )
    ratio = timing.ratio(timings, "torch", "rnnfast")
    lines.append(f"  rnnfast takes {ratio:.2f} times as many steps in the same time")
    return lines


def describe(model: LanguageModel) -> str:
    """A model in words."""
    layers = model.recurrent
    return f"{layers.num_layers} x {layers.hidden_size} {layers.mode.partition('_')[0]}"


def perplexities(directory: RunDirectory) -> str:
    """The course of the validation perplexity in a line."""
    entries = [entry for entry in read_log(directory.log_file) if entry["kind"] == "valid"]
    return " -> ".join(f"{entry['perplexity']:.2f}" for entry in entries)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of training")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of timing")
    parser.add_argument("--data", action="append", default=[], help="text file to learn instead")
    parser.add_argument("--save", help="directory of the run (default: runs/1, 2, ...)")
    options = parser.parse_args(arguments)
    settings = TrainSettings(data=tuple(options.data), max_minutes=options.minutes)
    result = train(settings, options.save)
    if result.signal is not None:
        return 128 + result.signal
    directory = RunDirectory(result.directory)
    print(f"\nValidation perplexity: {perplexities(directory)}\n")
    print("\n".join(compare(directory, options.rounds)))
    print(f"\nMore of it: rnnfast generate {result.directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
