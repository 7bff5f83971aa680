"""From plain loops to the library in five rungs that run: what does each of them bring, and why?

``python -m benchmarks.ladder`` compiles the rungs (benchmarks/ladder/), checks each of them against
the textbook in float64, and times them on one thread, in shuffled blocks of one process. All
compute the same LSTM layer forward in float32 with the same instruction set; the last is rnnfast.
docs/ladder.md explains them; its table is written with ``--json docs/ladder.json --write
docs/ladder.md``.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rnnfast
import torch
from rnnfast import reference

from . import report, results, tables, timing
from .agreement import DisagreementError, check_agreement
from .environment import describe_environment, measure_peaks
from .results import LayerResult, Run
from .shapes import Shape
from .timing import Call

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "ladder"

# Rows enough for the arithmetic to decide, with more weights than an L2 cache holds; and one row,
# as in real time, where reading those weights decides.
SHAPES = ("LSTM:35,20,650,650", "LSTM:100,1,512,512")

# In the order of the ladder. The last one is the library.
RUNGS = {
    "naive": "the formula, sum by sum: every addition waits for the one before",
    "blocked": "neighbouring sums make vectors; all rows use a block of weights while it is in L1",
    "packed": "sums stay in registers; a weight, once loaded, serves several rows",
    "fused": "cells are computed in vectors, on sums that never left the registers",
    "rnnfast": "packed weights are kept for the next call, on huge pages, and asked for in time",
}

THREADS = 1
ROUNDS = 7  # a call of the first rung takes seconds

LEGEND = (
    "T, B, I, H: steps, batch rows, input size, hidden size; ±: half the distance between the "
    "quartiles of the rounds; of peak: arithmetic rate over the measured peak of one thread; "
    "faster: time of the rung before over time of this one."
)


class Layer(ctypes.Structure):
    """ladder::Layer of benchmarks/ladder/layer.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in "TBIH"),
        *((name, ctypes.c_void_p) for name in ("x", "w_ih", "w_hh", "bias", "h0", "c0", "y", "c")),
    )


class BuildError(Exception):
    """The rungs could not be compiled."""


def build() -> ctypes.CDLL:
    """Compiles the rungs for the instruction set in use, and loads them.

    Raises:
        BuildError: there is no CMake or compiler, or it fails.
    """
    # CMake may have been installed by pip, beside a Python that is not on the path.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        raise BuildError("there is no cmake (pip install cmake)")
    isa = rnnfast.build_info()["isa"]
    directory = BUILD / isa
    configure = [cmake, "-S", ROOT / "benchmarks/ladder", "-B", directory]
    configure += ["-DCMAKE_BUILD_TYPE=Release", f"-DRNNFAST_LADDER_ISA={isa}"]
    make = [cmake, "--build", directory, "--target", "ladder", "--parallel", "2"]
    for command in (configure, make):
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            raise BuildError(f"{' '.join(map(str, command))} failed:\n{done.stdout}")
    return ctypes.CDLL(str(directory / "libladder.so"))


class LadderProblem:
    """One shape, and every rung as a call that computes it.

    Args:
        shape: of an LSTM layer.
        library: the compiled rungs.
        seed: of weights, states and input.
    """

    def __init__(self, shape: Shape, library: ctypes.CDLL, seed: int = 0) -> None:
        T, B, I, H = shape.steps, shape.batch, shape.input_size, shape.hidden_size
        generator = np.random.default_rng(seed)

        def uniform(bound: float, *sizes: int) -> np.ndarray:
            return generator.uniform(-bound, bound, sizes).astype(np.float32)

        bound = H**-0.5  # as torch.nn initialises
        self.shape = shape
        self.inputs = {
            "x": uniform(1, T, B, I),
            "w_ih": uniform(bound, 4 * H, I),
            "w_hh": uniform(bound, 4 * H, H),
            "bias": uniform(bound, 4 * H),
            "h0": uniform(1, B, H),
            "c0": uniform(1, B, H),
        }
        self.outputs = {
            name: {"y": np.empty((T, B, H), np.float32), "c": np.empty((B, H), np.float32)}
            for name in RUNGS
        }
        self.calls: dict[str, Call] = {
            name: self._library_call() if name == "rnnfast" else self._call(getattr(library, name))
            for name in RUNGS
        }

    def check(self) -> None:
        """Raises DisagreementError where a rung differs from the textbook by more than rounding."""
        textbook, exact = self._textbook(np.float32), self._textbook(np.float64)
        terms = self.shape.input_size + self.shape.hidden_size
        for name, call in self.calls.items():
            for array in self.outputs[name].values():
                array.fill(np.nan)
            call()
            computed = _tensors(self.outputs[name])
            check_agreement(str(self.shape), computed, textbook, exact, terms, whose=name)

    def _call(self, rung) -> Call:
        rung.restype = None
        arrays = {**self.inputs, **self.outputs[rung.__name__]}
        addresses = {name: array.ctypes.data for name, array in arrays.items()}
        shape = self.shape
        layer = Layer(shape.steps, shape.batch, shape.input_size, shape.hidden_size, **addresses)
        argument = ctypes.byref(layer)
        return lambda: rung(argument)

    def _library_call(self) -> Call:
        shape, outputs = self.shape, self.outputs["rnnfast"]
        x, w_ih, w_hh, bias, h0, c0 = _tensors(self.inputs).values()
        layer = rnnfast.LSTM(shape.input_size, shape.hidden_size)
        with torch.no_grad():
            weights = (w_ih, w_hh, bias, torch.zeros_like(bias))
            for parameter, values in zip(layer.parameters(), weights, strict=True):
                parameter.copy_(values)
        state = (h0[None], c0[None])

        def call() -> None:
            with torch.no_grad():
                y, (_, c_n) = layer(x, state)
            outputs.update(y=y.numpy(), c=c_n[0].numpy())

        return call

    def _textbook(self, dtype: type) -> dict[str, torch.Tensor]:
        x, w_ih, w_hh, bias, h0, c0 = (array.astype(dtype) for array in self.inputs.values())
        weights = (w_ih, w_hh, bias, np.zeros_like(bias))
        y, (_, c_n), _, _ = reference.lstm(x, (h0[None], c0[None]), weights)
        return _tensors({"y": y, "c": c_n[0]})


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def climb(shapes: Sequence[Shape], rounds: int, seed: int) -> Run:
    """Builds, checks and times the rungs.

    Raises:
        BuildError: they do not compile here.
        DisagreementError: one computes something else.
        RestlessError: threads of this process do not go to sleep.
    """
    library = build()
    torch.set_num_threads(THREADS)
    peaks = measure_peaks(shapes, THREADS, "float32")
    layers = []
    for shape in shapes:
        problem = LadderProblem(shape, library, seed)
        problem.check()
        timings = timing.time_candidates(problem.calls, rounds=rounds, seed=seed)
        layers.append(LayerResult(timings, shape, "forward"))
    settings = {
        "rounds": rounds,
        "block_seconds": timing.BLOCK_SECONDS,
        "pause_seconds": timing.PAUSE_SECONDS,
        "seed": seed,
    }
    return Run(describe_environment(), settings, peaks, layers, [])


def ladder_table(run: Run) -> tables.Table:
    """A row for each rung: what makes the difference, and for each shape how much of one."""
    headings = ["rung", "what makes the difference"]
    for result in run.layers:
        headings += [f"{_sizes(result.shape)}: ms", "GFLOP/s", "of peak", "faster"]
    rows = []
    for name, difference in RUNGS.items():
        row = [name, difference]
        for result in run.layers:
            rate = result.flops_per_second(name)
            row += [
                tables.time_and_spread(result.timings[name]),
                tables.significant(rate / 1e9),
                tables.percent(rate / run.peaks.flops),
                tables.times(timing.ratio(result.timings, _before(name), name)),
            ]
        rows.append(tuple(row))
    rows.append(_floor_row(run))
    return tables.Table("The ladder", tuple(headings), rows, labels=2)


def _floor_row(run: Run) -> tuple[str, ...]:
    """What the rungs lead up to: no program is faster."""
    row = ["floor", "arithmetic at the peak, or W_hh from its cache once a step"]
    for result in run.layers:
        seconds = run.floor(result).seconds
        rate = result.shape.flops("forward") / seconds
        row += [
            tables.milliseconds(seconds),
            tables.significant(rate / 1e9),
            tables.percent(rate / run.peaks.flops),
            tables.times(result.timings["rnnfast"].median / seconds),
        ]
    return tuple(row)


def _sizes(shape: Shape) -> str:
    return f"{shape.steps}, {shape.batch}, {shape.input_size}, {shape.hidden_size}"


def _before(name: str) -> str:
    """The rung below; the first one stands on the ground."""
    names = list(RUNGS)
    return names[max(names.index(name) - 1, 0)]


def markdown(run: Run) -> str:
    """The table of a run, its caption and what its headings mean."""
    return "\n\n".join([tables.caption(run), report.markdown_table(ladder_table(run)), LEGEND])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ladder", description=__doc__)
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, metavar="LSTM:T,B,I,H", help=" ".join(SHAPES)
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="blocks per rung")
    parser.add_argument("--seed", type=int, default=0, help="of inputs and block order")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every block time to OUT")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="replace the text between the markers of FILE"
    )
    options = parser.parse_args(arguments)
    try:
        shapes = [Shape.parse(text) for text in options.shapes]
    except ValueError as error:
        parser.error(str(error))
    for shape in shapes:
        if shape.cell != "LSTM":
            parser.error(f"shape {str(shape)!r}: every rung is an LSTM layer")
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}, expected at least 1")
    try:
        run = climb(shapes, options.rounds, options.seed)
        run.check_peak()
        content = markdown(run)
        print(content)
        if options.json:
            results.save(run, options.json)
        if options.write:
            report.write_between_markers(options.write, content)
    except (
        BuildError,
        DisagreementError,
        timing.RestlessError,
        results.ImplausiblePeakError,
        report.MarkerError,
        OSError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
