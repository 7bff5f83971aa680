"""TBPTT in one call against a loop: ``python -m benchmarks.truncated --shapes LSTM:2100,1,99,99``.

Both go back over the whole sequence through windows of k steps with the same kernels: ours with
truncate=k, where all windows are rows of one batch, and a loop that detaches the state after each
window, as one writes by hand. The forward passes are not timed. Gradients are compared before.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import rnnfast
import torch
from torch import Tensor

from .shapes import Shape
from .timing import Call, ratio, time_candidates

LAYERS = {"LSTM": rnnfast.LSTM, "RNN": rnnfast.RNN}
SHAPES = [
    Shape(cell, 2100, batch, hidden, hidden)
    for cell in LAYERS
    for batch in (1, 8)
    for hidden in (128, 256, 512)
]


def detached(state: object) -> object:
    return tuple(part.detach() for part in state) if isinstance(state, tuple) else state.detach()


def output_of_loop(module: torch.nn.Module, x: Tensor, k: int) -> Tensor:
    """y (T, B, H), through no more than k steps of which a gradient goes back."""
    state, outputs = None, []
    for window in x.split(k):
        y, state = module(window, state)
        state = detached(state)
        outputs.append(y)
    return torch.cat(outputs)


def backward_calls(shape: Shape, k: int) -> dict[str, Call]:
    """A backward pass in one call and through the loop, over graphs that are kept."""
    torch.manual_seed(0)
    layer = LAYERS[shape.cell]
    whole = layer(shape.input_size, shape.hidden_size, truncate=k)
    plain = layer(shape.input_size, shape.hidden_size)
    plain.load_state_dict(whole.state_dict())
    x = torch.randn(shape.steps, shape.batch, shape.input_size)
    dy = torch.randn(shape.steps, shape.batch, shape.hidden_size)
    outputs = {"one call": (whole, whole(x)[0]), "loop": (plain, output_of_loop(plain, x, k))}

    def call_of(module: torch.nn.Module, y: Tensor) -> Call:
        weights = list(module.parameters())
        return lambda: torch.autograd.grad(y, weights, dy, retain_graph=True)

    return {name: call_of(*output) for name, output in outputs.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=SHAPES)
    parser.add_argument("--k", type=int, default=35, help="steps of a window")
    parser.add_argument("--rounds", type=int, default=9, help="blocks per candidate")
    options = parser.parse_args(arguments)
    print(f"{'':24} {'loop':>10} {'one call':>13} {'faster':>10}")
    for shape in options.shapes:
        calls = backward_calls(shape, options.k)
        for one, other in zip(calls["one call"](), calls["loop"](), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
        times = time_candidates(calls, rounds=options.rounds)
        loop, one_call = (1e3 * times[name].median for name in ("loop", "one call"))
        faster = ratio(times, "loop", "one call")
        print(f"{shape!s:24} {loop:7.2f} ms {one_call:10.2f} ms {faster:9.2f}x")
    return 0


if __name__ == "__main__":
    sys.exit(main())
