"""No arrow runs back: what may import or include what, as docs/design.md lays the rooms out."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "python" / "rnnfast"
CSRC = ROOT / "csrc"

# Lowest first. A room may import rooms above it in this list, and the packages beside it.
ROOMS = {
    "reference": {"numpy"},
    "_native": {"torch"},
    "cpu": {"torch"},
    "ops": {"torch"},
    "projected_ops": {"torch"},
    "bidirectional": {"torch"},
    "halved": set(),
    "watched": {"torch"},
    "cuda_products": {"torch"},
    "cuda_ops": {"torch"},
    "cuda_direct": {"torch"},
    "direct": {"torch"},
    "bptt": {"torch"},
    "checks": {"torch"},
    "stack": {"torch"},
    "packed": {"torch"},
    "projected": {"torch"},
    "functional": {"torch"},
    "modules": {"torch"},
    "convert": {"torch"},
    "frozen": {"torch"},
    "cuda_plan": {"torch"},
    "explain": {"torch"},
    "rnnfast": set(),  # the public names, __init__.py
    "reference_modules": {"numpy", "torch"},
    "text": {"numpy", "torch", "tokenizers"},
    "models": {"torch"},
    "training": {"torch", "safetensors", "rich", "matplotlib"},
    "cli": {"torch", "typer"},
    "__main__": set(),
}
RANK = {room: rank for rank, room in enumerate(ROOMS)}


def room_of(file: Path) -> str:
    name = file.relative_to(PACKAGE).with_suffix("").parts[0]
    return "rnnfast" if name == "__init__" else name


def imports_of(file: Path) -> set[str]:
    """The full names of all a file imports, at its top or inside of functions."""
    package = ("rnnfast", *file.relative_to(PACKAGE).parts[:-1])
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*base, *filter(None, [node.module])))
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def target(name: str) -> str:
    """The room that a name inside of the package stands in."""
    second = name.split(".")[1:2]
    return second[0] if second and second[0] in ROOMS else "rnnfast"


PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))


def relative(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_every_file_has_its_room():
    unknown = {room_of(file) for file in PYTHON_FILES} - ROOMS.keys()
    assert not unknown, f"say in ROOMS, and in docs/design.md, where {unknown} belong"
    assert {room_of(file) for file in PYTHON_FILES} == ROOMS.keys()


@pytest.mark.parametrize("file", PYTHON_FILES, ids=relative)
def test_python_imports_only_what_stands_below(file):
    room = room_of(file)
    for name in imports_of(file):
        first = name.split(".")[0]
        if first == "rnnfast":
            other = target(name)
            if name in ("rnnfast._core", "rnnfast._cuda"):
                assert room == "_native", "only _native loads the extensions"
            elif other != room:
                assert RANK[other] < RANK[room], f"{room} imports {other}, which stands above it"
        elif first not in sys.stdlib_module_names:
            assert first in ROOMS[room], f"{room} imports {first}"


def test_imports_are_seen():
    assert "rnnfast._native.core" in imports_of(PACKAGE / "cpu.py")
    assert "rnnfast.direct" in imports_of(PACKAGE / "functional.py")
    assert target("rnnfast.ops") == "ops"
    assert target("rnnfast.LSTM") == target("rnnfast") == "rnnfast"


# The native core

# Headers that are neither C++'s own nor ours, and the only files that may include them.
FOREIGN = {
    "pybind11/pybind11.h": {
        *("bindings.cpp", "cuda/bindings.h", "python/frozen.h", "python/layer.h"),
        *("python/plain.h", "python/tensor.h"),
    },
    "pybind11/stl.h": {
        *("bindings.cpp", "cuda/bindings.h", "python/frozen.cpp", "python/layer.cpp"),
    },
    "pybind11/gil_safe_call_once.h": {"python/tensor.cpp"},
    "dlfcn.h": {"bindings.cpp", "cuda/blas.h"},
    "omp.h": {"bindings.cpp", "cpu/team.cpp"},
    "pthread.h": {"cpu/team.cpp"},
    "unistd.h": {"cpu/plan.cpp"},
    "sys/mman.h": {"cpu/workspace.cpp"},
    "immintrin.h": {"cpu/fingerprint.cpp", "cpu/team.cpp", "cpu/simd.h"},
    "arm_neon.h": {"cpu/simd.h"},
    "cuda_runtime.h": {"cuda/platform.h"},
    "cuda_fp16.h": {"cuda/platform.h"},
    "cuda_bf16.h": {"cuda/platform.h"},
    "ucontext.h": {"emu/simt.cpp"},
    "setjmp.h": {"emu/simt.cpp"},
    "sanitizer/common_interface_defs.h": {"emu/simt.cpp"},
}
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh"))
INCLUDE = re.compile(r'^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)', re.MULTILINE)


def name_of(file: Path) -> str:
    return file.relative_to(CSRC).as_posix()


def includes_of(file: Path) -> tuple[set[str], set[str]]:
    """Our own headers, from csrc/, and all others."""
    own, others = set(), set()
    for quoted, angled in INCLUDE.findall(file.read_text()):
        if quoted:
            candidates = [file.parent / quoted, CSRC / quoted]
            (found, *_) = [path.resolve() for path in candidates if path.exists()]
            own.add(found.relative_to(CSRC.resolve()).as_posix())
        else:
            others.add(angled)
    return own, others


def is_standard(header: str) -> bool:
    """Whether it is a C++ standard library header: those alone have neither dot nor slash."""
    return "." not in header and "/" not in header


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_the_core_knows_neither_torch_nor_python(file):
    for header in includes_of(file)[1]:
        assert is_standard(header) or name_of(file) in FOREIGN.get(header, ()), (
            f"{name_of(file)} includes <{header}>"
        )


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_includes_point_down(file):
    room, own = file.parent.relative_to(CSRC).as_posix(), includes_of(file)[0]
    for header in own:
        assert header.endswith((".h", ".cuh")), f"{name_of(file)} includes {header}"
        other = Path(header).parent.as_posix()
        if name_of(file) == "bindings.cpp":
            continue
        # The contract, ".", stands below the backends; the emulator runs the CUDA kernels.
        below = {
            ".": {"."},
            "cpu": {".", "cpu"},
            "python": {".", "cpu", "python"},
            "cuda": {".", "cuda"},
            "emu": {".", "cuda", "emu"},
        }
        assert other in below[room], f"{name_of(file)} includes {header}"


def test_the_cell_needs_nothing():
    """So that it compiles for any device."""
    assert includes_of(CSRC / "cell.h") == (set(), set())


def compiled_per_isa() -> set[Path]:
    """kernels.cpp and all it includes."""
    reached, todo = set(), {CSRC / "cpu" / "kernels.cpp"}
    while todo:
        file = todo.pop()
        reached.add(file)
        todo |= {CSRC / header for header in includes_of(file)[0]} - reached
    return reached


def test_openmp_stands_in_one_source_that_is_compiled_once():
    with_pragmas = {name_of(file) for file in SOURCES if "pragma omp" in file.read_text()}
    assert with_pragmas == {"cpu/team.cpp"}
    names = {name_of(file) for file in compiled_per_isa()}
    assert {"cpu/forward.h", "cpu/backward.h", "cpu/tile.h", "cell.h"} <= names
    assert not names & {"cpu/team.cpp", "bindings.cpp", "cpu/peaks.h"}
    for file in compiled_per_isa():
        assert "omp.h" not in includes_of(file)[1]


def test_instruction_sets_are_asked_for_in_one_place():
    flag = re.compile(r"-m(avx|arch|fma|tune|cpu|sse)|/arch:")
    asking = {
        file.name
        for file in (ROOT / "CMakeLists.txt", ROOT / "pyproject.toml", *ROOT.glob("cmake/*.cmake"))
        if flag.search(file.read_text())
    }
    assert asking == {"isa.cmake"}
    isa = (ROOT / "cmake" / "isa.cmake").read_text()
    assert re.findall(r"csrc/\S+\.cpp", isa) == ["csrc/cpu/kernels.cpp"]


def test_the_build_needs_no_torch():
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needed = {re.split(r"[^\w-]", name)[0] for name in project["build-system"]["requires"]}
    assert needed == {"scikit-build-core", "pybind11"}
    for file in (ROOT / "CMakeLists.txt", *ROOT.glob("cmake/*.cmake")):
        assert "torch" not in file.read_text().lower()
