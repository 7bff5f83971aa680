"""One layer in one direction on the CPU: allocates the outputs and calls the native core.

The two callers, the registered operators (`ops`) and the short way past torch's dispatcher
(`direct`), have checked what a kernel must be able to trust: every tensor is an ordinary one of the
same dtype, in the CPU's memory, and of the shape `Sizes` implies. (With bfloat16 whatever belongs
to the cell, c0 and its like, is float32.) Nothing is copied unless it is not contiguous. For a
small layer each allocation takes as long as the arithmetic, so none is made that nobody asked for.

Packed sequences come with their batch_sizes (T,), int64 and dense: the number of running sequences
at each step, which begins with B and never grows. Where shapes say (T, B, ...) there are then the N
rows of all steps, (N, ...).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._native import accumulator, core, precision

GATES = {"lstm": 4, "tanh": 1, "relu": 1}  # by the names the core has for its cells
# What an LSTM may keep of every step beside h: nothing, c, or c and the gates. A gradient needs c;
# gates that were not kept are computed again. An RNN needs h alone.
KEEP = ("nothing", "cells", "all")

Sizes = tuple[int, int, int, int]  # T, B, I, H

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
_BACKWARD = {dtype: f"layer_backward_{precision(dtype)}" for dtype in _DTYPES}


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _address(tensor: Tensor | None) -> int:
    """Where a tensor's elements begin; 0 stands for an absent or empty one."""
    return 0 if tensor is None else tensor.data_ptr()


def forward(
    cell: str,
    sizes: Sizes,
    reverse: bool,
    keep: str,
    x: Tensor,
    h0: Tensor,
    c0: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    halve_w_hh: bool = False,
    batch_sizes: Tensor | None = None,
    w_hr: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """y, h_n, c_n and, as `keep` says, c (T, B, H) and gates (T, B, 4, H); T >= 1.

    x is (T, B, I) and states are (B, H), or the same elements with other leading axes (an unbatched
    sequence, a single step, a stack of one layer): y and the final states then have the same. What
    an RNN does not have is None, and c0 tells: it is None too. halve_w_hh is for float32 alone.

    w_hr (P, H) makes it a projected LSTM: y, h0, h_n and the columns of w_hh are of size P, and m,
    (T, B, H) as c, which is what was projected, comes last of six.
    """
    states, weights = (h0, c0), (w_ih, w_hh, b_ih, b_hh)
    rest = (halve_w_hh, _address(batch_sizes), w_hr)
    return core.forward(cell, sizes, reverse, keep, x, *states, *weights, *rest)


def backward(
    cell: str,
    sizes: Sizes,
    reverse: bool,
    k1: int,
    k2: int,
    upstream: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    saved: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    batch_sizes: Tensor | None = None,
    projection: tuple[Tensor, Tensor | None, bool] | None = None,
) -> tuple[Tensor | None, ...]:
    """dx, dh0, dc0, dw_ih, dw_hh and db where `wants` has True, None elsewhere; T >= 1.

    1 <= k1 <= k2 as the core takes them. upstream: dy, dh_n, dc_n, dc, None for zeros. saved: x,
    h0, c0, w_ih, w_hh, b_ih, b_hh, y, c, gates, with the leading axes they had going forward. An
    LSTM's gates may be None, and only then are its biases needed: gates are computed again.

    projection: w_hr, m, and whether dw_hr is wanted, which then comes last of seven; k1 = k2.
    """
    T, B, I, H = sizes
    dy, dh_n, dc_n, dc = map(_dense, upstream)
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, c, gates = map(_dense, saved)
    want_x, want_h0, want_c0, want_w_ih, want_w_hh, want_b = wants
    w_hr, m, want_w_hr = projection or (None, None, False)
    w_hr, m, P = _dense(w_hr), _dense(m), w_hh.shape[1]
    rows = GATES[cell] * H
    dx = x.new_empty(*x.shape) if want_x else None
    dh0 = x.new_empty(*h0.shape) if want_h0 else None
    dc0 = c0.new_empty(*c0.shape) if want_c0 else None
    dw_ih = x.new_empty(rows, I) if want_w_ih else None
    dw_hh = x.new_empty(rows, P) if want_w_hh or want_b else None  # db comes with dw_hh
    dw_hr = x.new_empty(P, H) if want_w_hr else None
    db = x.new_empty(rows) if want_b else None
    steps = T * B if batch_sizes is None else len(x)
    da = x.new_empty(steps, rows) if k1 < T else None
    da_windows = x.new_empty(2, -(-T // k1) * B, rows) if k2 > k1 else None
    total = accumulator(x.dtype)
    da_sums = x.new_empty(steps, rows, dtype=total) if k2 > k1 and total != x.dtype else None
    getattr(core, _BACKWARD[x.dtype])(
        cell, T, B, I, H, reverse, torch.get_num_threads(), k1, k2,
        _address(dy), _address(dh_n), _address(dc_n), _address(dc),
        x.data_ptr(), w_ih.data_ptr(), w_hh.data_ptr(), h0.data_ptr(), _address(c0),
        y.data_ptr(), _address(c), _address(gates),
        _address(dx), _address(dw_ih), _address(dw_hh), _address(db),
        _address(dh0), _address(dc0), _address(da), _address(da_windows),
        _address(da_sums), _address(b_ih), _address(b_hh), _address(batch_sizes),
        0 if w_hr is None else P, _address(w_hr), _address(m), _address(dw_hr),
    )  # fmt: skip
    gradients = dx, dh0, dc0, dw_ih, dw_hh if want_w_hh else None, db
    return gradients if projection is None else (*gradients, dw_hr)
