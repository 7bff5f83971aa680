"""Times plans of the CUDA kernels on a GPU, and fits the planner's costs to the times.

    python -m benchmarks.gpu_plans measure --out docs/cuda_plans.json --seconds 60
    python -m benchmarks.gpu_plans fit docs/cuda_plans.json
    python -m benchmarks.gpu_plans table docs/cuda_plans.json

A step's time is the difference of two launches, of 160 and of 32 steps, so that packing and
launching do not count. Of each problem the plans that are estimated to be fast are timed, and their
neighbours. `fit` prints what csrc/cuda/plan.cpp has as `Costs`, in its order, and what choosing by
them costs; `table` the fastest plans, as docs/cuda.md shows them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rnnfast import _native

STEPS = 32, 160
FORMATS = {
    "bfloat16": (torch.bfloat16, torch.float32),
    "float32": (torch.float32, torch.float32),
    "tf32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
}
# How many of the fastest of each are timed.
METHODS = {"local": 3, "cluster": 2, "grid": 4, "resident": 4, "resident_cluster": 3}
COUNTS = (
    *("items", "trips", "tiles", "input_bytes", "traffic_bytes", "streamed_bytes"),
    *("partial_bytes", "cells", "pushes", "occupied", "handed_bytes", "memory"),
    *("peers", "blocks", "backward", "rounded"),
)
Problem = tuple[str, str, str, int, int]  # format, cell, pass, H, B


def problems() -> list[Problem]:
    """All that are timed if there is time, those of a few sizes first."""
    passes, sizes = ("forward", "backward"), (64, 128, 256, 512, 1024, 2048)
    every = itertools.product(
        ("bfloat16", "float32", "tf32"), ("lstm", "tanh"), passes, sizes, (1, 16, 64, 256)
    )
    first = list(
        itertools.product(("bfloat16",), ("lstm", "tanh"), passes, (64, 256, 768), (1, 16))
    )
    rest = [*every, *itertools.product(("float64",), ("lstm",), passes, (64, 512), (1, 64))]
    rest = [problem for problem in rest if problem not in first]
    random.Random(0).shuffle(rest)
    return first + rest


def plans(device: Any, problem: Problem, T: int, method: str) -> list[tuple[Any, dict[str, Any]]]:
    """All plans of a method for T steps, always in the same order."""
    number, cell, which, H, B = problem
    try:
        found = _native.cuda.plans(
            device, which == "backward", cell, number, T, B, H, T, T, 1, method
        )
    except ValueError:
        return []
    return [(plan, plan.as_dict()) for plan in found]


def candidates(device: Any, problem: Problem) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """Pairs of plans for the two numbers of steps, and what they are."""
    chosen = []
    for method, most in METHODS.items():
        short, long = (plans(device, problem, T, method) for T in STEPS)
        both = [(a, b, about) for (a, _), (b, about) in zip(short, long, strict=True)]
        both.sort(key=lambda pair: pair[2]["cycles"])
        chosen += both[:most]
        if both and method in ("cluster", "grid"):
            best = both[0][2]
            for same, other in (("blocks", "group_columns"), ("group_columns", "blocks")):
                chosen += [
                    pair
                    for pair in both
                    if pair[2][same] == best[same] and pair[2][other] != best[other]
                ][:2]
    least = min((about["cycles"] for *_, about in chosen), default=math.inf)
    timed = set()
    for pair in chosen:
        about = pair[2]
        key = about["method"], about["blocks"], about["group_columns"]
        if key not in timed and about["cycles"] <= 5 * least:
            timed.add(key)
            yield pair


class Arrays:
    """Arrays of a recurrence by their addresses, cut from memory that is there: what is read is
    small random numbers, what is written nobody reads."""

    def __init__(self) -> None:
        self.read, self.written = {}, {}
        for dtype in {dtype for pair in FORMATS.values() for dtype in pair}:
            count = 2**29 if dtype.itemsize < 8 else 2**27
            self.read[dtype] = (torch.rand(count, device="cuda") * 0.2 - 0.1).to(dtype)
            self.written[dtype] = torch.empty_like(self.read[dtype])

    def of(self, problem: Problem, T: int) -> list[int]:
        """In the order of csrc/rnnfast.h."""
        number, cell, which, H, B = problem
        dtype, wide = FORMATS[number]
        lstm, used = cell == "lstm", {}

        def take(memory: dict, count: int, dtype: torch.dtype = dtype) -> int:
            begin = used.get((id(memory), dtype), 0)
            used[id(memory), dtype] = begin + -(-count // 64) * 64
            return memory[dtype][begin : begin + count].data_ptr()

        def given(count: int, *dtype: torch.dtype, wanted: bool = True) -> int:
            return take(self.read, count, *dtype) if wanted else 0

        def result(count: int, *dtype: torch.dtype, wanted: bool = True) -> int:
            return take(self.written, count, *dtype) if wanted else 0

        state, steps, gates = B * H, T * B * H, 4 if lstm else 1
        weights = gates * H * H
        if which == "forward":
            return [
                *(given(gates * steps), given(weights), given(state)),
                *(given(state, wide, wanted=lstm), result(steps), result(state)),
                *(result(state, wide, wanted=lstm), result(steps, wide, wanted=lstm)),
                result(4 * steps, wanted=lstm),
            ]
        return [
            *(given(steps), 0, 0, 0, given(weights), given(state, wide, wanted=lstm)),
            *(given(steps, wanted=not lstm), given(steps, wide, wanted=lstm)),
            *(given(4 * steps, wanted=lstm), result(gates * steps), result(state)),
            result(state, wide, wanted=lstm),
        ]


def microseconds(launch: Callable[[], None]) -> float:
    """Least device time of three launches, after one that is not timed."""
    launch()
    times = []
    for _ in range(3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        launch()
        end.record()
        end.synchronize()
        times.append(1e3 * begin.elapsed_time(end))
    return min(times)


def measure(out: Path, seconds: float) -> None:
    """Time plans until the time is up; the JSON is written after every problem."""
    until, arrays = time.monotonic() + seconds, Arrays()
    device, stream = _native.cuda.device_properties(0), torch.cuda.current_stream().cuda_stream
    properties = ("capability", "multiprocessors", "shared_bytes", "largest_cluster", "cooperative")
    results = {
        "gpu": torch.cuda.get_device_name(),
        "device": {name: getattr(device, name) for name in properties},
        "columns": ["format", "cell", "pass", "H", "B", "method", "blocks", "group_columns", "us"],
        "rows": [],
    }
    for problem in problems():
        if time.monotonic() > until:
            break
        number, _, which, *_ = problem
        kernel = getattr(_native.cuda, f"{which}_{'float32' if number == 'tf32' else number}")
        for *pair, about in candidates(device, problem):
            times = []
            for plan, T in zip(pair, STEPS, strict=True):
                scratch = torch.empty(plan.scratch_bytes, dtype=torch.uint8, device="cuda")
                arguments = (plan, [False], [arrays.of(problem, T)], scratch.data_ptr(), 0, stream)
                times.append(microseconds(partial(kernel, *arguments)))
            step = (times[1] - times[0]) / (STEPS[1] - STEPS[0])
            what = about["method"], about["blocks"], about["group_columns"]
            results["rows"].append([*problem, *what, round(step, 3)])
        out.write_text(json.dumps(results).replace("], [", "],\n["))


def read(path: Path) -> tuple[Any, dict[Problem, list[tuple[dict[str, Any], float]]]]:
    """The device, and by problem the plans that were timed and microseconds of a step."""
    results = json.loads(path.read_text())
    device = _native.cuda.Device(**results["device"])
    timed: dict[Problem, list] = {}
    for *problem, method, blocks, group_columns, us in results["rows"]:
        about = next(
            about
            for _, about in plans(device, tuple(problem), STEPS[1], method)
            if (about["blocks"], about["group_columns"]) == (blocks, group_columns)
        )
        timed.setdefault(tuple(problem), []).append((about, us))
    return device, timed


def nonnegative(a: np.ndarray) -> np.ndarray:
    """x >= 0 for which a x is near to ones, by coordinate descent; outliers weigh less."""
    x = np.zeros(a.shape[1])
    weights = np.ones(len(a))
    for _ in range(400):
        for n in range(a.shape[1]):
            column = a[:, n]
            scale = (weights * column) @ column
            if scale > 0:
                x[n] = max(0.0, x[n] + (weights * column) @ (1 - a @ x) / scale)
        weights = 1 / (np.abs(1 - a @ x) + 0.05)
    return x


def counted(about: dict[str, Any]) -> np.ndarray:
    """What a step's estimate is the sum of, before each count has its cost."""
    return about["counts"]["turns"] * np.array([about["counts"][name] for name in COUNTS])


class Choices:
    """For each problem the plans that were timed, and which of them costs would choose."""

    def __init__(self, timed: dict[Problem, list[tuple[dict[str, Any], float]]]) -> None:
        self.problems = [
            (
                [engine_of(number, about["method"]) for about, _ in rows],
                np.array([counted(about) for about, _ in rows]),
                np.array([about["cycles"] for about, _ in rows]),
                np.array([us for _, us in rows]),
            )
            for (number, *_), rows in timed.items()
        ]

    def loss(self, costs: dict[str, np.ndarray]) -> float:
        """Mean ratio of the time of the plan with the least estimate to the least time."""
        ratios = []
        for engines, counts, cycles, us in self.problems:
            estimates = [
                count @ costs[engine] if engine in costs else own  # local's are made of no counts
                for engine, count, own in zip(engines, counts, cycles, strict=True)
            ]
            ratios.append(us[np.argmin(estimates)] / us.min())
        return statistics.fmean(ratios)

    def refined(self, costs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Costs near these by which better plans are chosen, one cost after the other."""
        costs, least = {engine: own.copy() for engine, own in costs.items()}, self.loss(costs)
        for factor in (1.2, 0.8, 1.1, 0.9):
            for own in costs.values():
                for n in np.flatnonzero(own):
                    before, own[n] = own[n], own[n] * factor
                    loss = self.loss(costs)
                    if loss < least:
                        least = loss
                    else:
                        own[n] = before
        return costs


def fit(path: Path, clock_mhz: float = 1980) -> None:
    """Print costs in cycles for each engine; and how good a choice they are."""
    _, timed = read(path)
    engines: dict[str, list[tuple[dict[str, Any], float]]] = {}
    for (number, *_), rows in timed.items():
        for about, us in rows:
            engines.setdefault(engine_of(number, about["method"]), []).append((about, us))
    local = engines.pop("local")
    relative = {
        engine: np.array([counted(about) / (us * clock_mhz) for about, us in rows])
        for engine, rows in engines.items()
    }
    costs = {engine: nonnegative(a) for engine, a in relative.items()}
    for own in costs.values():
        own[own < 1e-7] = 0
    costs = Choices(timed).refined(costs)
    for engine, a in relative.items():
        rounded = (float(f"{cost:.3g}") for cost in costs[engine])
        print(engine, dict(zip(COUNTS, rounded, strict=True)))
        print_spread(a @ costs[engine])
    print("local, by the planner's own formula")
    print_spread([about["cycles"] / (us * clock_mhz) for about, us in local])
    print("chosen by the planner, over the best that was timed:", *regrets(timed))


def print_spread(ratios: Iterable[float]) -> None:
    """How far estimates are from times."""
    off = sorted(abs(math.log(max(ratio, 1e-9))) for ratio in ratios)
    median, most = off[len(off) // 2], off[len(off) * 9 // 10]
    print(f"  {len(off)} plans; off by {median:.0%} (median), {most:.0%} (nine in ten)")


def engine_of(number: str, method: str) -> str:
    """Whose costs a plan has."""
    if method in ("local", "resident", "resident_cluster"):
        return method
    return {"float32": "FMA", "float64": "float64"}.get(number, "tensor cores")


def regrets(timed: dict[Problem, list[tuple[dict[str, Any], float]]]) -> tuple[float, float]:
    """Mean and largest ratio of the time of the plan with the least estimate to the least time."""
    ratios = [
        min(rows, key=lambda row: row[0]["cycles"])[1] / min(us for _, us in rows)
        for rows in timed.values()
    ]
    return statistics.fmean(ratios), max(ratios)


def table(path: Path) -> None:
    """Print every problem's fastest plan as Markdown: microseconds of a step, and the method."""
    batches, fastest = (1, 16, 64, 256), {}
    for *layer, B, method, _, _, us in json.loads(path.read_text())["rows"]:
        at = tuple(layer), B
        fastest[at] = min(fastest.get(at, (math.inf, "")), (us, method))
    print("| | " + " | ".join(f"B {B}" for B in batches) + " |")
    print("| --- |" + " --: |" * len(batches))
    for layer in sorted({layer for layer, _ in fastest}):
        number, cell, which, H = layer
        found = (fastest.get((layer, B)) for B in batches)
        cells = ("" if one is None else f"{one[0]:.2f} {one[1]}" for one in found)
        name = {"lstm": "LSTM", "tanh": "RNN"}[cell]
        print(f"| {name} {number}, {which}, H {H} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("measure", help="time plans, writing JSON; needs a GPU")
    timed.add_argument("--out", type=Path, required=True)
    timed.add_argument("--seconds", type=float, default=60)
    fitted = commands.add_parser("fit", help="costs that explain the times; needs no GPU")
    fitted.add_argument("path", type=Path)
    shown = commands.add_parser("table", help="the fastest plans, as Markdown")
    shown.add_argument("path", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(arguments.out, arguments.seconds)
    elif arguments.command == "fit":
        fit(arguments.path)
    else:
        table(arguments.path)


if __name__ == "__main__":
    main()
