"""What W_hh at half the bytes brings: ``python -m benchmarks.halved --shapes LSTM:99,1,512,512``.

Times inference in float32 with and without `rnnfast.halved_recurrence`, each on weights of its own,
so that both keep their packed weights.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import rnnfast
import torch

from .shapes import Shape
from .timing import Call, time_candidates

LAYERS = {"LSTM": rnnfast.LSTM, "RNN": rnnfast.RNN}
SHAPES = [
    Shape(cell, steps, 1, inputs, hidden)
    for cell in LAYERS
    for steps, inputs, hidden in (
        *((100, 512, 512), (100, 1024, 1024)),
        *((100, 64, 512), (100, 64, 1024)),  # the recurrence nearly alone
        *((100, 256, 256), (1, 1024, 1024)),  # where little is to be had, or nothing
    )
]


def inference(shape: Shape, halved: bool) -> Call:
    module = LAYERS[shape.cell](shape.input_size, shape.hidden_size)
    x = torch.randn(shape.steps, shape.batch, shape.input_size)

    def call() -> object:
        with torch.no_grad(), rnnfast.halved_recurrence(halved):
            return module(x)

    return call


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=SHAPES)
    parser.add_argument("--rounds", type=int, default=15, help="blocks per candidate")
    options = parser.parse_args(arguments)
    print(f"{'':24} {'float32':>10} {'halved':>13} {'faster':>10}")
    for shape in options.shapes:
        times = time_candidates(
            {name: inference(shape, name == "halved") for name in ("float32", "halved")},
            rounds=options.rounds,
        )
        exact, halved = times["float32"].median, times["halved"].median
        print(f"{shape!s:24} {exact * 1e3:7.3f} ms {halved * 1e3:10.3f} ms {exact / halved:9.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
