"""Runs the kernels on arrays that border on pages which may not be touched.

A program of its own, because a stray access ends the process. Every array a kernel is given, inputs
and those the operators allocate, ends exactly where such a page begins, or begins where one ends.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from one_layer import Case, assert_results, by_operator, by_reference
from rnnfast import _native

libc = ctypes.CDLL(None, use_errno=True)
_kept = []  # a mapping must outlive the tensors in it


def guarded(shape: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> torch.Tensor:
    """An uninitialised tensor between two pages without access."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    size = count * dtype.itemsize
    room = math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE
    pages = mmap.mmap(-1, room + 2 * mmap.PAGESIZE)
    _kept.append(pages)
    start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    for page in (start, start + mmap.PAGESIZE + room):
        if libc.mprotect(ctypes.c_void_p(page), ctypes.c_size_t(mmap.PAGESIZE), 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = mmap.PAGESIZE + (room - size if at_end else 0)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=offset).view(shape)


class Guarded(Case):
    """A case whose inputs and cotangents are guarded."""

    at_end = True

    def inputs(self, dtype):
        return {name: self._guard(v) for name, v in super().inputs(dtype).items()}

    def cotangents(self, dtype):
        return {name: self._guard(v) for name, v in super().cotangents(dtype).items()}

    def _guard(self, value):
        return guarded(value.shape, value.dtype, self.at_end).copy_(value)


def new_empty(self, *shape, **options):
    """In the place of Tensor.new_empty, with which the operators allocate."""
    shape = tuple(shape[0]) if shape and not isinstance(shape[0], int) else shape
    return guarded(shape, options.get("dtype", self.dtype), Guarded.at_end)


SIZES = [(1, 1, 1, 1), (3, 7, 5, 3), (5, 3, 17, 16), (3, 2, 65, 33), (2, 130, 3, 5)]


def main() -> None:
    torch.Tensor.new_empty = new_empty
    for Guarded.at_end in (True, False):
        for isa in _native.build_info()["isas_available"]:
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                for cell in ("lstm", "tanh"):
                    for sizes in SIZES:
                        for reverse, truncate in ((False, None), (True, (1, 1)), (False, (2, 3))):
                            options = {"reverse": reverse, "truncate": truncate}
                            case = Guarded(cell, *sizes, **options)
                            print(isa, case, flush=True)  # the last line tells where it ended
                            with _native.using_isa(isa):
                                got = by_operator(case, dtype)
                                by_operator(case, dtype, ["x"])  # scratch is laid out differently
                                if cell == "lstm":  # likewise where gates are computed again
                                    by_operator(case, dtype, keep="cells")
                            half = dtype == torch.bfloat16
                            assert_results(case, got, by_reference(case, dtype), in_float32=half)
                            del got
                            _kept.clear()  # a process may have so many mappings only
    print("all inside")


if __name__ == "__main__":
    main()
