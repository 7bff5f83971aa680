"""An LSTM layer with a projection (proj_size), step by step in torch: right, readable, not fast.

For CUDA, and for windows that overlap (k2 > k1); all else has kernels (`projected_ops`).

h[t] = (o * tanh(c[t])) W_hr^T (Sak, Senior & Beaufays 2014, "Long short-term memory recurrent
neural network architectures for large scale acoustic modeling"). Autograd goes back through the
steps, and truncation is what its definition says: states are detached where a window begins. So
this file is also the shortest statement of TBPTT(k1, k2) there is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bptt


def lstm_layer(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    w_hr: Tensor,
    reverse: bool,
    k1: int,
    k2: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One layer in one direction.

    x (T, B, I), T >= 1; h0 (B, P), c0 (B, H); w_ih (4H, I), w_hh (4H, P), biases (4H,),
    w_hr (P, H). k1 = k2 = 0 is full BPTT. Gives y (T, B, P), h_n (B, P), c_n (B, H) and the cell
    state of every step c (T, B, H).
    """
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return lstm_layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, k1, k2)

    projection = F.linear(x, w_ih, b_ih).unbind(0)
    T = len(projection)
    time = range(T)[::-1] if reverse else range(T)

    k1, k2 = (k1, k2) if k1 else (T, T)
    blocks = bptt.block_begins(T, k1, reverse)
    ends = [*blocks[1:], T]
    entering = [
        (h0, c0)
    ]  # the states that enter each step; once they are known, the next block runs
    y: list[Tensor] = []
    c: list[Tensor] = []
    for window, block, end in zip(
        bptt.window_begins(T, k1, k2, reverse), blocks, ends, strict=True
    ):
        h, cell = entering[window] if window == 0 else bptt.detach(entering[window])
        for p in range(window, end):
            i, f, g, o = (projection[time[p]] + F.linear(h, w_hh, b_hh)).chunk(4, -1)
            cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
            h = F.linear(o.sigmoid() * cell.tanh(), w_hr)
            if p >= block:
                y.append(h)
                c.append(cell)
                entering.append((h, cell))
    order = [time[p] for p in range(T)]  # reversing twice is the identity: steps back in time order
    return torch.stack([y[p] for p in order]), h, cell, torch.stack([c[p] for p in order])
