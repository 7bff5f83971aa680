"""Large results ask for huge pages: memory that malloc takes from the system anew at every call."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import pytest
import rnnfast
import torch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")

LARGE = 40 << 20  # bytes, more than malloc keeps when they are freed


def wishes_huge_pages(tensor: torch.Tensor) -> bool:
    """What the system was told of the memory in the middle of a tensor."""
    address = tensor.data_ptr() + tensor.nbytes // 2
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(text, 16) for text in found.groups())
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


def test_others_do_not():
    """Else the tests below would show nothing. malloc's memory may have held packed weights."""
    memory = mmap.mmap(-1, LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    assert not wishes_huge_pages(torch.frombuffer(memory, dtype=torch.uint8))


@pytest.mark.parametrize("rows", [1, 400], ids=["steps", "rows"])
def test_saved_gates_and_states(rows):
    H = 64
    T = LARGE // (4 * H * 4 * rows)
    layer = rnnfast.LSTM(3, H)
    y, _ = layer(torch.randn(T, rows, 3))
    *_, gates = y.grad_fn.saved_tensors
    assert gates.nbytes >= LARGE - 4 * H * 4 * rows
    assert wishes_huge_pages(gates)


def test_y_and_its_gradient():
    H = 64
    rows = LARGE // (H * 4)
    x = torch.randn(1, rows, H, requires_grad=True)
    y, _ = rnnfast.RNN(H, H)(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert wishes_huge_pages(y)
    assert wishes_huge_pages(dx)


def test_weight_gradients():
    I = LARGE // (64 * 4)
    layer = rnnfast.RNN(I, 64)
    layer(torch.randn(2, 1, I))[0].sum().backward()
    assert wishes_huge_pages(layer.weight_ih_l0.grad)
