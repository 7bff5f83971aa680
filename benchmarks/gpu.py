"""What gpu_check.sh runs on the GPU: small cases for compute-sanitizer, and measurements.

Candidates are timed with device events, in blocks in shuffled order within one process, each block
about the same time; the median block counts. Both sides compute in the same math mode. Results are
written after every point, so that running out of time loses nothing.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rnnfast
import torch

from . import environment

ROUNDS = 5
BLOCK_MS = 8.0
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODULES = {"lstm": (rnnfast.LSTM, torch.nn.LSTM), "rnn": (rnnfast.RNN, torch.nn.RNN)}


def milliseconds(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Device time of a call of each candidate, interleaved; median of ROUNDS blocks."""

    def block(call: Callable[[], Any], count: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(count):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    counts = {}
    for name, call in calls.items():
        block(call, 2)
        counts[name] = max(1, min(100, round(BLOCK_MS / max(block(call, 1), 1e-3))))
    taken = {name: [] for name in calls}
    for _ in range(ROUNDS):
        for name in random.sample(list(calls), len(calls)):
            calls[name]()
            taken[name].append(block(calls[name], counts[name]))
    return {name: statistics.median(times) for name, times in taken.items()}


def ceilings() -> dict[str, float]:
    """Copy bandwidth in TB/s, bytes read and written; bf16 and fp32 matrix products in TFLOP/s."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    copy = milliseconds({"copy": lambda: target.copy_(source)})["copy"]
    results = {"copy TB/s": 2 * source.nbytes / copy / 1e9}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        n = 8192 if dtype == torch.bfloat16 else 4096
        a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
        product = milliseconds({"mm": lambda a=a, b=b: a @ b})["mm"]
        results[f"{name} TFLOP/s"] = 2 * n**3 / product / 1e9
    return results


def points() -> list[dict[str, Any]]:
    """The shapes with targets of their own first; then the grid, coarse to fine."""
    named = [
        {"name": "H768", "cell": "lstm", "math": "bf16", "H": 768, "B": 16, "T": 1024},
        {"name": "H768", "cell": "lstm", "math": "fp16", "H": 768, "B": 16, "T": 1024},
        {
            "name": "stack",
            "cell": "lstm",
            "math": "bf16",
            "H": 512,
            "B": 32,
            "T": 512,
            "L": 2,
            "D": 2,
        },
    ]
    sizes = list(itertools.product((64, 256, 1024, 128, 512, 2048), (1, 16, 256, 64)))
    grid = [
        {"name": "grid", "cell": cell, "math": math_mode, "H": H, "B": B, "T": T}
        for (H, B), T, math_mode, cell in itertools.product(
            sizes, (128, 1024), ("bf16", "fp16", "fp32", "tf32"), ("lstm", "rnn")
        )
        if B * T * H <= 2**27
    ]
    random.Random(0).shuffle(grid)  # where time runs out, a fair sample is left
    return named + grid


def measure(point: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of ours and torch's, forward and forward + backward, and our plan."""
    dtype = torch.float32 if point["math"] == "tf32" else DTYPES[point["math"]]
    allow = point["math"] == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
    H, T, B = point["H"], point["T"], point["B"]
    x = torch.randn(T, B, H, device="cuda", dtype=dtype, requires_grad=True)
    options = {"num_layers": point.get("L", 1), "bidirectional": point.get("D", 1) == 2}
    pair = zip(("ours", "torch"), MODULES[point["cell"]], strict=True)
    modules = {name: cls(H, H, device="cuda", dtype=dtype, **options) for name, cls in pair}

    def forward(module):
        with torch.no_grad():
            return module(x)[0]

    def train(module):
        y = module(x)[0]
        y.backward(torch.ones_like(y))

    calls = {"forward": forward, "forward + backward": train}
    results = {}
    for what, call in calls.items():
        taken = milliseconds({n: lambda m=m, c=call: c(m) for n, m in modules.items()})
        results[what] = taken | {"us a step": 1e3 * taken["ours"] / T}
    return point | results


def truncated() -> dict[str, Any]:
    """Backward of TBPTT(64, 64) over T = 16,384, B = 16 against a detach loop over torch.nn."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    T, B, H, k = 16_384, 16, 256, 64
    x = torch.randn(T, B, H, device="cuda", dtype=torch.bfloat16)
    ours = rnnfast.LSTM(H, H, device="cuda", dtype=torch.bfloat16, truncate=k)
    theirs = torch.nn.LSTM(H, H, device="cuda", dtype=torch.bfloat16)

    def loop():
        state, ys = None, []
        for chunk in x.split(k):
            y, state = theirs(chunk, state)
            state = tuple(s.detach() for s in state)
            ys.append(y)
        return torch.cat(ys)

    outputs = {"ours": ours(x)[0], "torch": loop()}
    gradient = torch.ones_like(outputs["ours"])
    calls = {
        name: lambda y=y: y.backward(gradient, retain_graph=True) for name, y in outputs.items()
    }
    return {"name": "tbptt", "backward": milliseconds(calls)}


def sentences() -> dict[str, Any]:
    """A layer in both directions over packed sentences of 5 to 60 words."""
    H, D, B = 256, 2, 64
    lengths = [random.Random(n).randint(5, 60) for n in range(B)]
    words = [torch.randn(n, H, device="cuda", dtype=torch.bfloat16) for n in lengths]
    x = torch.nn.utils.rnn.pack_sequence(words, enforce_sorted=False)
    options = {"bidirectional": D == 2, "device": "cuda", "dtype": torch.bfloat16}
    pair = zip(("ours", "torch"), MODULES["lstm"], strict=True)
    modules = {name: cls(H, H, **options) for name, cls in pair}

    def forward(module):
        with torch.no_grad():
            return module(x)[0]

    def train(module):
        y = module(x)[0].data
        y.backward(torch.ones_like(y))

    calls = {"forward": forward, "forward + backward": train}
    timed = {
        what: milliseconds({n: lambda m=m, c=call: c(m) for n, m in modules.items()})
        for what, call in calls.items()
    }
    return {"name": "packed", "B": B, "H": H, "D": D, "lengths": lengths} | timed


def bench(out: Path, seconds: float) -> None:
    """Measure until the time is up, writing as it goes."""
    until = time.monotonic() + seconds
    results = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "build": environment.build_info(),
        "points": [],
        "errors": [],
    }

    def attempt(what: Any, call: Callable[[], Any], keep: Callable[[Any], Any]) -> None:
        try:
            keep(call())
        except Exception as error:
            results["errors"].append({"what": what, "error": f"{type(error).__name__}: {error}"})
        out.write_text(json.dumps(results, indent=1))

    attempt("ceilings", ceilings, lambda value: results.update(ceilings=value))
    work = points()
    for n, point in enumerate(work):
        if time.monotonic() > until:
            break
        if n == 3:
            attempt("tbptt", truncated, lambda value: results.update(tbptt=value))
            attempt("packed", sentences, lambda value: results.update(packed=value))
        attempt(point, lambda p=point: measure(p), results["points"].append)
    results["points left out"] = len(work) - len(results["points"]) - len(results["errors"])
    out.write_text(json.dumps(results, indent=1))


def small(without: list[str]) -> None:
    """Few, small calls of every method and dtype, forward and backward, for compute-sanitizer."""
    from by_layers import by_layers
    from one_layer import Case, assert_results, by_reference
    from rnnfast import _native, cuda_ops

    for method, dtype in itertools.product(
        ("local", "cluster", "grid", "resident", "resident_cluster", "steps"),
        (torch.bfloat16, torch.float32),
    ):
        if method in without or ("resident" in method and dtype == torch.float32):
            continue  # the latter is for tensor cores
        case = Case("lstm", 3, 3, 2, 40, truncate=(2, 2))
        results = by_layers(cuda_ops.Layers(_native.cuda, method), case, dtype, "cuda")
        assert_results(case, results, by_reference(case, dtype))
        print(method, dtype, "ok", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    timed = commands.add_parser("bench", help="measure, writing JSON")
    timed.add_argument("--out", type=Path, required=True)
    timed.add_argument("--seconds", type=float, default=100)
    few = commands.add_parser("small", help="small cases of every method")
    few.add_argument("--without", nargs="*", default=[], metavar="METHOD")
    arguments = parser.parse_args()
    if arguments.command == "bench":
        bench(arguments.out, arguments.seconds)
    else:
        small(arguments.without)


if __name__ == "__main__":
    main()
