"""What nvcc says each CUDA kernel needs, against what the planner and the launches count on.

A block of 256 threads leaves a thread at most 255 of a multiprocessor's 65,536 registers. Nothing
may spill: the weights that should stay in registers would be read from memory every step.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NVCC = shutil.which("nvcc")
FORMATS = {"float32": "float", "float64": "double", "float16": "Float16", "bfloat16": "BFloat16"}
FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "--fmad=false", "-Xptxas", "-v"]
ENTRY = re.compile(
    r"Compiling entry function '(\w+)' for '(sm_\w+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
    r"Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
    re.DOTALL,
)
# Kernels of one number format: packing and recurrence (through L2 or shared memory; on tensor cores
# for one tile of columns or two) for each pass, engine and number of gates; resident ones, in four
# shapes through L2 and up to two through a cluster, for each pass and number of gates; local ones
# and their packing; the gradient of the initial state, and cells for products by a library. float64
# has no tensor cores here.
KERNELS = {"float32": 97, "float64": 42, "float16": 91, "bfloat16": 91}


def architectures() -> list[str]:
    """Those the build makes machine code for, as its CMake file says."""
    text = (ROOT / "cmake" / "cuda.cmake").read_text()
    (newest,) = re.findall(
        r"VERSION_LESS 12\.8.*?else\(\)\n.*?default_architectures (.*?)\)", text, re.S
    )
    return [name.removesuffix("-real") for name in newest.split() if not name.endswith("virtual")]


def test_flags_are_those_of_the_build():
    build = (ROOT / "cmake" / "cuda.cmake").read_text()
    assert " ".join(FLAGS[1:4]) in build


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cuda")
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures()]

    def compile_one(name: str) -> str:
        command = [NVCC, *FLAGS, *targets, f"-DRNNFAST_REAL={FORMATS[name]}", "-c"]
        command += [ROOT / "csrc" / "cuda" / "kernels.cu", "-o", folder / f"{name}.o"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FORMATS, pool.map(compile_one, FORMATS), strict=True))


@pytest.mark.skipif(not NVCC, reason="needs nvcc")
@pytest.mark.parametrize("name", FORMATS)
def test_resources(name, reports):
    kernels = ENTRY.findall(reports[name])
    assert {architecture for _, architecture, *_ in kernels} == {f"sm_{a}" for a in architectures()}
    assert len(kernels) == KERNELS[name] * len(architectures())
    assert any("recur" in kernel for kernel, *_ in kernels)
    for kernel, architecture, frame, stores, loads, registers, shared in kernels:
        where = f"{kernel} for {architecture}"
        assert int(stores) == int(loads) == 0, f"{where} spills {stores} and {loads} bytes"
        assert int(frame) == 0, f"{where} keeps {frame} bytes in local memory"
        assert int(registers) <= 255, where
        assert not shared, (
            f"{where} has {shared} bytes of shared memory the planner knows nothing of"
        )
