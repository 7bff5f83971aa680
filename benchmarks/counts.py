"""Instruction counts of five small cases: a slower inner loop shows without a quiet machine.

``python -m benchmarks.counts`` runs tests/native/counted.cpp under callgrind, which counts what the
kernel alone executes, and compares with benchmarks/counts.json. A count more than MARGIN above the
kept one fails. Where the change is wanted, ``python -m benchmarks.counts --accept`` keeps the new
counts; commit the file and say why.

Counts are a property of the machine code: exact from run to run, and from machine to machine, since
valgrind shows every program the same processor with the same caches. They hold for one compiler, so
they are kept by compiler. The instruction set is AVX2, the widest that valgrind knows. What they
can't see is how long an instruction takes, waits for memory, and threads: timing is benchmarks.run.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

KEPT = Path(__file__).with_suffix(".json")
PROGRAM = Path("build/native/plain/counted")
ISA = "avx2"
MARGIN = 0.05

# Cell, T, B, I, H, mode: a streaming step; one row, so matrix-vector products; a batch of full
# register tiles; sizes with remainders everywhere; the other cell.
CASES = (
    "lstm 1 1 128 128 forward",
    "lstm 20 1 64 96 forward",
    "lstm 10 12 64 64 training",
    "lstm 7 5 33 47 training",
    "tanh 20 16 48 64 training",
)


class CountError(Exception):
    """Nothing could be counted, or there is nothing to compare it with."""


class CannotCompareError(CountError):
    """This machine has no valgrind, or no counts are kept for its compiler."""


def count(program: Path, case: str) -> int:
    """Instructions that the kernel executes in one case."""
    command = ["valgrind", "--tool=callgrind", "--toggle-collect=measured"]
    command += ["--callgrind-out-file=/dev/null", str(program), *case.split()]
    environment = {**os.environ, "RNNFAST_ISA": ISA}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = re.search(r"Collected : (\d+)", done.stderr)
    if done.returncode or not found or not int(found[1]):
        raise CountError(f"{' '.join(command)} gave no count:\n{done.stderr}")
    return int(found[1])


def compiler_of(program: Path) -> str:
    """Name and version of what compiled `program`."""
    if not program.exists():
        raise CountError(f"there is no {program}: run make native")
    command = [str(program), "--compiler"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def compare(counts: dict[str, int], kept: dict[str, int]) -> list[str]:
    """A line for each case; those that fail begin with "FAILED"."""
    lines = []
    for case, number in counts.items():
        if case not in kept:
            lines.append(f"FAILED {case}: {number:,} instructions, and none kept to compare with")
            continue
        before = kept[case]
        more, fewer = number > before * (1 + MARGIN), number < before * (1 - MARGIN)
        verdict = "FAILED" if more else "fewer, accept?" if fewer else "ok"
        change = f"{number / before - 1:+.1%} on {before:,}"
        lines.append(f"{verdict} {case}: {number:,} instructions, {change}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 1 where a count is too high or can't be had."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.counts", description=__doc__)
    parser.add_argument("--program", type=Path, default=PROGRAM, help=f"default: {PROGRAM}")
    parser.add_argument("--accept", action="store_true", help="keep the new counts")
    parser.add_argument(
        "--may-skip",
        action="store_true",
        help="without valgrind, or with a compiler no counts are kept for: say so, and succeed",
    )
    options = parser.parse_args(arguments)
    all_kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    try:
        if not shutil.which("valgrind"):
            raise CannotCompareError("valgrind is not installed (apt-get install valgrind)")
        compiler = compiler_of(options.program)
        if compiler not in all_kept and not options.accept:
            raise CannotCompareError(
                f"no counts are kept for {compiler}, only for {', '.join(all_kept) or 'nothing'}; "
                f"take them on the commit you trust with --accept"
            )
        counts = {case: count(options.program, case) for case in CASES}
    except CannotCompareError as error:
        print(f"{'SKIPPED' if options.may_skip else 'FAILED'} instruction counts: {error}")
        return 0 if options.may_skip else 1
    except CountError as error:
        print(f"FAILED instruction counts: {error}")
        return 1
    if options.accept:
        kept = json.dumps({**all_kept, compiler: counts}, indent=1)
        KEPT.write_text(kept + "\n", encoding="utf-8")
        print(f"kept the counts of {compiler} in {KEPT}")
        return 0
    lines = compare(counts, all_kept[compiler])
    print("\n".join(lines))
    if any(line.startswith("FAILED") for line in lines):
        print("If the change is wanted: make native, python -m benchmarks.counts --accept, commit.")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
