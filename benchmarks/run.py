"""Times rnnfast against torch.nn in one process and prints every time beside its floor.

``python -m benchmarks.run --suite quick`` takes seconds, ``--suite full`` and ``--suite wide``
minutes. ``--peers torch,onnxruntime,openvino`` times forward passes of those libraries too
(``pip install .[bench]``). See benchmarks/timing.py for how the candidates are kept apart.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from . import peers, results, tables, timing
from .agreement import DisagreementError
from .environment import describe_environment, measure_peaks
from .language_model import StepProblem
from .layers import LayerProblem
from .peaks import ITEMSIZE
from .results import LayerResult, Run, StepResult
from .shapes import MODES, STEPS, SUITES, Shape

TABLE_WIDTH = 140
PEER_WIDTH = 24


def run_benchmarks(
    shapes: Sequence[Shape],
    modes: Sequence[str],
    *,
    language_models: bool,
    threads: int,
    dtype: str,
    rounds: int,
    seed: int,
    progress: Console,
    other_peers: Sequence[str] = (),
) -> Run:
    """Checks and times every shape in every mode, and the language models if asked.

    Raises:
        DisagreementError: candidates differ by more than rounding.
        RestlessError: threads of a candidate do not go to sleep.
    """
    torch.set_num_threads(threads)
    torch_dtype = getattr(torch, dtype)
    ceilings = measure_peaks(shapes, threads, dtype)
    layers, steps = [], []
    for shape in shapes:
        problem = LayerProblem(shape, torch_dtype, seed, other_peers, threads)
        for mode in modes:
            progress.print(f"{shape} {mode}", style="dim")
            problem.check(mode)
            with problem.context(mode):
                timings = timing.time_candidates(problem.calls(mode), rounds=rounds, seed=seed)
            layers.append(LayerResult(timings, shape, mode))
    for size in STEPS if language_models else ():
        progress.print(size.name, style="dim")
        step_problem = StepProblem(size, torch_dtype, seed)
        step_problem.check()
        timings = timing.time_candidates(step_problem.calls(), rounds=rounds, seed=seed)
        steps.append(StepResult(timings, size))
    settings = {
        "rounds": rounds,
        "block_seconds": timing.BLOCK_SECONDS,
        "pause_seconds": timing.PAUSE_SECONDS,
        "seed": seed,
    }
    return Run(describe_environment(other_peers), settings, ceilings, layers, steps)


def print_run(run: Run, console: Console) -> None:
    """Prints the caption and all tables that have rows."""
    console.print(tables.caption(run))
    for table in (tables.layer_table(run), tables.mean_table(run), tables.step_table(run)):
        if table.rows:
            console.print(_rich_table(table))
    console.print(tables.legend(run))


def _rich_table(table: tables.Table) -> RichTable:
    rich_table = RichTable(title=table.title, title_justify="left", box=box.SIMPLE_HEAD)
    for column, heading in enumerate(table.headings):
        justify = "left" if column < table.labels else "right"
        rich_table.add_column(heading, justify=justify, no_wrap=True)
    for row in table.rows:
        rich_table.add_row(*row)
    return rich_table


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; exits with status 2 and a message where it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=tuple(SUITES), default="quick", help="which shapes")
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="CELL:T,B,I,H",
        help="these shapes instead, for example LSTM:35,20,650,650",
    )
    parser.add_argument(
        "--modes", default=",".join(MODES), help="forward, training, or both with a comma between"
    )
    parser.add_argument(
        "--peers",
        default="torch",
        metavar="NAME,...",
        help=f"torch and any of {', '.join(peers.NAMES)}, with commas between",
    )
    parser.add_argument("--lm", action="store_true", help="language models too (as in full)")
    parser.add_argument(
        "--dtype", choices=tuple(ITEMSIZE), default="float32",
        help="with bfloat16 rnnfast is timed in float32 too",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, help="OpenMP threads; torch's default if left out")
    parser.add_argument("--rounds", type=int, default=timing.ROUNDS, help="blocks per candidate")
    parser.add_argument("--seed", type=int, default=0, help="of weights, inputs and block order")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every block time to OUT")
    options = parser.parse_args(arguments)

    if options.threads is None:
        options.threads = torch.get_num_threads()
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}, expected at least 1")
    options.modes = options.modes.split(",")
    unknown = [mode for mode in options.modes if mode not in MODES]
    if unknown:
        parser.error(f"--modes has {unknown[0]!r}, expected {' or '.join(MODES)}")
    first, *options.peers = options.peers.split(",")
    unknown = [name for name in options.peers if name not in peers.NAMES]
    if first != "torch" or unknown:
        parser.error(
            f"--peers has {(unknown or [first])[0]!r}, expected torch and after it any of "
            f"{', '.join(peers.NAMES)}"
        )
    if options.peers and options.dtype != "float32":
        parser.error(f"--peers has {options.peers[0]!r}, which is timed in float32 only")
    try:
        for name in options.peers:
            peers.require(name)
    except peers.MissingPeerError as error:
        parser.error(f"--peers: {error}")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no directory {options.json.parent}")
    try:
        shapes = [Shape.parse(text) for text in options.shapes or ()]
    except ValueError as error:
        parser.error(str(error))
    options.lm = options.lm or (options.suite == "full" and not options.shapes)
    options.shapes = shapes or SUITES[options.suite]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = parse_arguments(arguments)
    try:
        run = run_benchmarks(
            options.shapes,
            options.modes,
            language_models=options.lm,
            threads=options.threads,
            dtype=options.dtype,
            rounds=options.rounds,
            seed=options.seed,
            progress=Console(stderr=True),
            other_peers=options.peers,
        )
    except (DisagreementError, timing.RestlessError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        results.save(run, options.json)
    # Cells cut off by a narrow terminal or a pipe would lose digits; wrapped lines lose none.
    width = TABLE_WIDTH + PEER_WIDTH * (
        len(run.other_peers) + 2 * run.has_own_float32 + run.has_frozen
    )
    print_run(run, Console(width=max(Console().width, width)))
    try:
        run.check_peak()
    except results.ImplausiblePeakError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
