"""Peak memory of one training step: ``python -m benchmarks.memory --shape LSTM:2000,32,256,256``.

What the process needs at most, above what it held before the call (parameters, input, upstream
gradient), as Linux counts resident pages. Each candidate runs in a process of its own, after one
small call that loads libraries and starts threads.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

import rnnfast
import torch

from .shapes import Shape

CANDIDATES = {"torch.nn": torch.nn, "rnnfast": rnnfast}


def _peak_mib() -> float:
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def measure(candidate: str, shape: Shape) -> float:
    """MiB at the peak of forward and backward, in this process."""

    def step(steps: int, batch: int) -> float:
        cell = getattr(CANDIDATES[candidate], shape.cell)
        module = cell(shape.input_size, shape.hidden_size)
        x = torch.randn(steps, batch, shape.input_size, requires_grad=True)
        upstream = torch.randn(steps, batch, shape.hidden_size)
        with open("/proc/self/clear_refs", "w") as peak:
            peak.write("5")
        before = _peak_mib()
        module(x)[0].backward(upstream)
        return _peak_mib() - before

    step(4, 2)
    return step(shape.steps, shape.batch)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", type=Shape.parse, default=Shape("LSTM", 2000, 32, 256, 256))
    parser.add_argument("--candidate", choices=CANDIDATES, help="this one alone, in this process")
    options = parser.parse_args(arguments)
    if options.candidate:
        print(measure(options.candidate, options.shape))
        return 0
    peaks = {}
    for candidate in CANDIDATES:
        command = [sys.executable, "-m", "benchmarks.memory", "--candidate", candidate]
        command += ["--shape", str(options.shape)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        peaks[candidate] = float(done.stdout)
        print(f"{candidate:9} {peaks[candidate]:8.0f} MiB")
    print(f"rnnfast needs {peaks['rnnfast'] / peaks['torch.nn']:.2f} of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
