"""This version of the CPU kernels against another, in one process: did a change make them faster?

``python -m benchmarks.compare REVISION --shapes LSTM:35,20,650,650`` builds the kernels of a git
revision beside those of the working tree, for the widest instruction set of this machine, and times
them without Python in shuffled blocks. Both must have the same contract (csrc/rnnfast.h). Two
programs started one after the other differ by more than most changes bring; blocks of one do not.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Sequence
from pathlib import Path

from rnnfast import build_info

from .shapes import SUITES, Shape

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "compare"
MODES = ("forward", "backward", "training")


def build(revision: str) -> Path:
    """The program that holds both versions.

    Raises:
        subprocess.CalledProcessError: git does not know the revision, or it does not build.
    """
    archive = subprocess.run(
        ["git", "archive", revision, "csrc"], cwd=ROOT, stdout=subprocess.PIPE, check=True
    )
    before = BUILD / "before"
    shutil.rmtree(before, ignore_errors=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
        files.extractall(before, filter="data")
    for file in before.rglob("*.*"):
        os.utime(file)  # git says when it was committed, which may be before what make built last
    contract = Path("csrc/rnnfast.h")
    if (before / contract).read_text() != (ROOT / contract).read_text():
        sys.exit(
            f"{revision} has another {contract}; if its kernels can do with this tree's, commit "
            "them together on a branch, and name that"
        )
    program = BUILD / "program"
    configure = ["cmake", "-S", str(ROOT / "benchmarks/compare"), "-B", str(program)]
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "RNNFAST_BEFORE": before / "csrc",
        "RNNFAST_COMPARED_ISA": build_info()["isa"],
    }
    configure += [f"-D{name}={value}" for name, value in options.items()]
    make = ["cmake", "--build", str(program), "--target", "compare", "--parallel", "2"]
    for command in (configure, make):
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return program / "compare"


def main(arguments: Sequence[str] | None = None) -> int:
    summary, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(description=f"{summary}\n\n{details}")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("revision", help="the version to compare with, as git names it")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, default=SUITES["quick"])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args(arguments)
    try:
        program = build(options.revision)
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"error: cannot build both versions: {error}", file=sys.stderr)
        return 1
    print(f"{'':26} {'mode':9} {options.revision[:12]:>12} {'now':>10} {'faster':>8}  difference")
    for shape in options.shapes:
        for mode in options.modes:
            sizes = (shape.steps, shape.batch, shape.input_size, shape.hidden_size)
            command = [program, shape.cell, *sizes, mode, options.threads, options.rounds]
            done = subprocess.run(map(str, command), capture_output=True, text=True, check=True)
            before, now, ratio, difference = map(float, done.stdout.split())
            print(
                f"{shape!s:26} {mode:9} {before:9.3f} ms {now:7.3f} ms {ratio:7.3f}x"
                f"  {difference:.1e}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
