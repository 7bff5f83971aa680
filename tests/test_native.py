"""The checks of `make native` themselves: that they see what they are there to see."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

SYMBOLS = Path(__file__).parent / "native" / "symbols.py"
COMPILER = shutil.which("g++")

# A weak function under a name of its own, and the same under one that any object may define.
OWN = "template <class T> __attribute__((noinline)) T twice(T x) { return x + x; }"
SOURCE = """
namespace rnnfast::cpu {
%s
namespace avx2 {
%s
int kept(int x) { return %s(x); }
}
extern const int kernels_avx2;
const int kernels_avx2 = 1;
}
"""


@pytest.fixture(scope="module")
def symbols():
    spec = importlib.util.spec_from_file_location("symbols", SYMBOLS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(COMPILER is None, reason="needs g++ to make an object to look at")
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_code_that_could_be_merged_is_found(tmp_path, symbols, where):
    directory = tmp_path / "kernels_avx2.dir"
    directory.mkdir()
    source = SOURCE % (("", OWN, "twice") if where == "inside" else (OWN, "", "cpu::twice"))
    (directory / "x.cpp").write_text(source)
    path = str(directory / "x.o")
    subprocess.run([COMPILER, "-std=c++17", "-c", "-o", path, directory / "x.cpp"], check=True)
    found = symbols.foreign_symbols("nm", path)
    assert found == ([] if where == "inside" else ["int rnnfast::cpu::twice<int>(int)"])


def test_an_object_of_no_instruction_set_is_refused(symbols):
    with pytest.raises(SystemExit, match="expected an object in a directory kernels_ISA"):
        symbols.foreign_symbols("nm", "x.o")
