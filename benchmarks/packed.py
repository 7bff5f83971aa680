"""Sequences of unequal length: ``python -m benchmarks.packed --batches LSTM:32,5..60,128,256,1``.

A batch is CELL:rows,shortest..longest,input size,hidden size,directions, its lengths drawn with the
same chance each. Packed sequences by rnnfast and torch.nn are timed beside padded ones by both,
forward, and forward and backward; that packed outputs and gradients agree is checked before.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import rnnfast
import torch
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

from .environment import describe_environment
from .timing import Call, Timing, ratio, time_candidates

LIBRARIES = {"torch": torch.nn, "rnnfast": rnnfast}


@dataclass(frozen=True)
class Batch:
    """Sequences of `shortest` to `longest` steps, and the layer that reads them."""

    cell: str
    rows: int
    shortest: int
    longest: int
    input_size: int
    hidden_size: int
    directions: int

    @classmethod
    def parse(cls, text: str) -> Batch:
        """From the notation above; ValueError if it is something else."""
        found = re.fullmatch(r"(LSTM|RNN):(\d+),(\d+)\.\.(\d+),(\d+),(\d+),([12])", text)
        if not found:
            raise ValueError(f"{text!r} is no batch such as LSTM:32,5..60,128,256,1")
        cell, *sizes = found.groups()
        return cls(cell, *map(int, sizes))

    def __str__(self) -> str:
        sizes = f"{self.input_size},{self.hidden_size},{self.directions}"
        return f"{self.cell}:{self.rows},{self.shortest}..{self.longest},{sizes}"

    @property
    def lengths(self) -> list[int]:
        draw = random.Random(0)
        return [draw.randint(self.shortest, self.longest) for _ in range(self.rows)]

    @property
    def share(self) -> float:
        """Steps over those of the padded batch."""
        return sum(self.lengths) / (self.rows * max(self.lengths))


BATCHES = [
    Batch(cell, *sizes)
    for cell in ("LSTM", "RNN")
    for sizes in (
        (32, 5, 60, 128, 256, 1),
        (64, 5, 60, 256, 256, 2),
        (16, 10, 40, 300, 650, 1),
        (128, 1, 30, 64, 64, 2),
        (8, 100, 400, 128, 128, 1),
    )
]


def calls_of(batch: Batch, training: bool) -> dict[str, Call]:
    """The four candidates; RuntimeError unless packed results agree."""
    torch.manual_seed(0)
    x = pack_sequence([torch.randn(n, batch.input_size) for n in batch.lengths], False)
    calls, results, weights = {}, {}, None
    for name, library in LIBRARIES.items():
        sizes = batch.input_size, batch.hidden_size
        module = getattr(library, batch.cell)(*sizes, bidirectional=batch.directions == 2)
        weights = weights or module.state_dict()
        module.load_state_dict(weights)

        def packed(module=module) -> torch.Tensor:
            return module(x)[0].data

        def padded(module=module) -> torch.Tensor:
            return module(pad_packed_sequence(x)[0])[0]

        def run(output, module=module) -> Sequence[torch.Tensor]:
            with torch.set_grad_enabled(training):
                y = output()
                if not training:
                    return (y,)
                return y, *torch.autograd.grad(y.sum(), list(module.parameters()))

        calls[name] = lambda run=run, output=packed: run(output)
        calls[f"{name} padded"] = lambda run=run, output=padded: run(output)
        results[name] = calls[name]()
    for one, other in zip(*results.values(), strict=True):
        size = other.abs().max().item()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * size)
    return calls


def faster(times: Mapping[str, Timing]) -> tuple[float, float]:
    """Times of packed torch.nn, and of the best of all others, over that of packed rnnfast."""
    others = times.keys() - {"rnnfast"}
    best = min(sorted(others), key=lambda name: times[name].median)
    return ratio(times, "torch", "rnnfast"), ratio(times, best, "rnnfast")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", nargs="+", type=Batch.parse, default=BATCHES)
    parser.add_argument("--rounds", type=int, default=9, help="blocks per candidate")
    parser.add_argument("--json", type=Path, help="also write every block's time here")
    options = parser.parse_args(arguments)
    names = [f"{name}{padded}" for name in LIBRARIES for padded in ("", " padded")]
    columns = (*names, "faster", "than best")
    print(f"{'':28} {'steps':>5} {'mode':8} " + " ".join(f"{name:>14}" for name in columns))
    rows = []
    for batch in options.batches:
        for mode in ("forward", "training"):
            times = time_candidates(calls_of(batch, mode == "training"), rounds=options.rounds)
            medians = " ".join(f"{times[name].median * 1e3:11.2f} ms" for name in names)
            ratios = " ".join(f"{value:13.2f}x" for value in faster(times))
            print(f"{batch!s:28} {batch.share:5.0%} {mode:8} {medians} {ratios}", flush=True)
            blocks = {name: list(timing.call_seconds) for name, timing in times.items()}
            rows.append({"batch": str(batch), "mode": mode, "seconds": blocks})
    if options.json:
        options.json.write_text(
            json.dumps({"environment": describe_environment(), "rows": rows}, indent=1) + "\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
