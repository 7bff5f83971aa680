"""Peak memory of one training step: ``python -m benchmarks.memory --shape LSTM:2000,32,256,256``.

What the process needs at most, above what it held before the call (parameters, input, upstream
gradient), as Linux counts resident pages. Each candidate runs in a process of its own, after one
small call that loads libraries and starts threads. What less memory costs in time is measured in
one process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

import rnnfast
import torch

from .shapes import Shape
from .timing import Call, time_candidates

CELLS = {"LSTM": torch.nn.LSTM, "RNN": torch.nn.RNN}


def candidates(shape: Shape) -> list[str]:
    """An RNN keeps nothing but its output, so there is nothing to be had with less."""
    return ["torch.nn", "rnnfast"] + ["rnnfast, low"] * (shape.cell == "LSTM")


def make_module(candidate: str, shape: Shape) -> torch.nn.Module:
    module = CELLS[shape.cell](shape.input_size, shape.hidden_size)
    if candidate == "torch.nn":
        return module
    return rnnfast.convert(module, memory="low" if candidate.endswith("low") else "normal")


def training_step(module: torch.nn.Module, steps: int, batch: int) -> Call:
    x = torch.randn(steps, batch, module.input_size, requires_grad=True)
    upstream = torch.randn(steps, batch, module.hidden_size)
    leaves = [x, *module.parameters()]
    return lambda: torch.autograd.grad(module(x)[0], leaves, upstream)


def _peak_mib() -> float:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(candidate: str, shape: Shape) -> float:
    """MiB at the peak of forward and backward, in this process."""

    def peak(steps: int, batch: int) -> float:
        step = training_step(make_module(candidate, shape), steps, batch)
        with open("/proc/self/clear_refs", "w") as counter:
            counter.write("5")
        before = _peak_mib()
        step()
        return _peak_mib() - before

    peak(4, 2)
    return peak(shape.steps, shape.batch)


def compare_times(shape: Shape, rounds: int) -> dict[str, float]:
    """Seconds of rnnfast's step in the median round; torch.nn's is for `benchmarks.run`."""
    calls = {
        name: training_step(make_module(name, shape), shape.steps, shape.batch)
        for name in candidates(shape)[1:]
    }
    return {name: timing.median for name, timing in time_candidates(calls, rounds=rounds).items()}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", type=Shape.parse, default=Shape("LSTM", 2000, 32, 256, 256))
    parser.add_argument("--candidate", help="this one alone, in this process: its peak in MiB")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; 0 does not time")
    options = parser.parse_args(arguments)
    if options.candidate:
        print(measure(options.candidate, options.shape))
        return 0
    peaks = {}
    for name in candidates(options.shape):
        command = [sys.executable, "-m", "benchmarks.memory", "--candidate", name]
        command += ["--shape", str(options.shape)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[name] = float(done.stdout)
        print(
            f"{name:12} {peaks[name]:6.0f} MiB, {peaks[name] / peaks['torch.nn']:.2f} of torch.nn's"
        )
    if options.rounds and "rnnfast, low" in peaks:
        times = compare_times(options.shape, options.rounds)
        for name, seconds in times.items():
            print(
                f"{name:12} {1e3 * seconds:6.0f} ms, {seconds / times['rnnfast']:.2f} of rnnfast's"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
