"""What a layer on CUDA computes besides its recurrence: products over all steps, by torch (cuBLAS).

`forward_arrays` and `backward_arrays` make what a recurrence is given, with the products that come
before it, and allocate what it gives: everything in the order of csrc/rnnfast.h, dense, and in the
dtypes that the kernels take. `given` and `gradients` make a layer's results of it, with the
products that come after it. In between `cuda_ops` launches the recurrence.

Sums and cell states are float32 where the layer's dtype has 16 bits: c is kept in float32 then, and
c_n rounded to the layer's dtype at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

_HALF = (torch.float16, torch.bfloat16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of the cell state of every step, c, in a layer of `dtype`."""
    return torch.float32 if dtype in _HALF else dtype


# Before the recurrence


def forward_arrays(
    cell, keep, x, h0, c0, w_ih, w_hh, b_ih, b_hh, state_shape
) -> tuple[Tensor | None, ...]:
    """What a recurrence forward is given and gives; `keep` as in ops.py, c0 None for RNNs."""
    h0, c0 = _dense(h0), _dense(c0, state_dtype(x.dtype))
    a = _project(x, w_ih, b_ih, b_hh)
    y_shape = (*x.shape[:-1], w_hh.shape[1])
    y, h_n = x.new_empty(y_shape), x.new_empty(state_shape)
    if cell != "lstm":
        return a, _dense(w_hh), h0, None, y, h_n, None, None, None
    c_n = c0.new_empty(state_shape)
    c = None if keep == "nothing" else c0.new_empty(y_shape)
    gates = a if keep == "all" else None  # each gate takes the place of its pre-activation
    return a, _dense(w_hh), h0, c0, y, h_n, c_n, c, gates


def backward_arrays(cell, sizes, reverse, upstream, saved) -> tuple[Tensor | None, ...]:
    """The same going back; gates that were not kept are computed again.

    upstream: dy, dh_n, dc_n and dc, of which each may be None. saved: x, h0, c0, w_ih, w_hh, b_ih,
    b_hh, y, c and gates; h0 may be None for zeros, and biases are read only if gates are None.
    """
    T, B, _, H = sizes
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, c, gates = saved
    if cell == "lstm" and gates is None:
        gates = _gates(x, h0, w_ih, w_hh, b_ih, b_hh, y, sizes, reverse)
    dy, dh_n, dc_n, dc = upstream
    dy, dh_n, w_hh = _dense(dy), _dense(dh_n), _dense(w_hh)
    state_shape = (B, H) if h0 is None else h0.shape
    da = w_hh.new_empty(T, B, w_hh.shape[0])
    dh0 = w_hh.new_empty(state_shape)
    if cell != "lstm":
        return dy, dh_n, None, None, w_hh, None, _dense(y), None, None, da, dh0, None
    wide = state_dtype(x.dtype)
    c0, dc_n, dc = _dense(c0, wide), _dense(dc_n, wide), _dense(dc, wide)
    dc0 = c0.new_empty(state_shape)
    return dy, dh_n, dc_n, dc, w_hh, c0, None, _dense(c), _dense(gates), da, dh0, dc0


# After the recurrence


def given(arrays, x: Tensor) -> tuple[Tensor | None, ...]:
    """Of what a recurrence forward gave: y, h_n, c_n in the dtype of x, c, gates."""
    y, h_n, c_n, c, gates = arrays[4:]
    if c_n is not None and c_n.dtype is not x.dtype:
        c_n = c_n.to(x.dtype)
    return y, h_n, c_n, c, gates


def gradients(arrays, sizes, reverse, saved, wants) -> tuple[Tensor | None, ...]:
    """What follows from a recurrence backward: dx, dh0, dc0, dw_ih, dw_hh, db where wanted."""
    x, h0, _, w_ih, _, _, _, y, _, _ = saved
    want_x, want_h0, want_c0, *want_weights = wants
    da, dh0, dc0 = arrays[9:]
    dx, *dweights = _products(da, x, h0, w_ih, y, sizes, reverse, want_x, *want_weights)
    dc0 = dc0.to(x.dtype) if want_c0 else None
    return dx, dh0 if want_h0 else None, dc0, *dweights


def no_gradients(x, w_ih, w_hh, want_x, want_w_ih, want_w_hh, want_b) -> tuple[Tensor, ...]:
    """dx, dw_ih, dw_hh, db where there is no step or no batch row; empty where not wanted."""
    return (
        x.new_zeros(x.shape if want_x else (0,)),
        x.new_zeros(w_ih.shape if want_w_ih else (0,)),
        x.new_zeros(w_hh.shape if want_w_hh else (0,)),
        x.new_zeros((w_hh.shape[0],) if want_b else (0,)),
    )


# The products


def _project(x: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """x W_ih^T + b_ih + b_hh over all steps: (..., G * H), dense."""
    bias = b_hh if b_ih is None else b_ih
    if b_ih is not None and b_hh is not None:
        bias = b_ih + b_hh
    if x.is_contiguous():
        return torch._C._nn.linear(x, w_ih, bias)
    *lead, I = x.shape
    return torch._C._nn.linear(x.reshape(-1, I), w_ih, bias).view(*lead, -1)


def _gates(x, h0, w_ih, w_hh, b_ih, b_hh, y, sizes, reverse):
    """The gates (T, B, 4, H) of an LSTM that has kept its h, not them: in two products."""
    T, B, _, H = sizes
    a = _project(x, w_ih, b_ih, b_hh)
    flat, (first, later, before) = a.view(T * B, 4 * H), _steps(T, B, reverse)
    if h0 is not None:
        flat[first].addmm_(h0.reshape(B, H), w_hh.t())
    flat[later].addmm_(y.reshape(T * B, H)[before], w_hh.t())
    gates = a.view(T, B, 4, H)
    gates[:, :, :2].sigmoid_()
    gates[:, :, 2].tanh_()
    gates[:, :, 3].sigmoid_()
    return gates


def _products(da, x, h0, w_ih, y, sizes, reverse, want_x, want_w_ih, want_w_hh, want_b):
    """dx, dw_ih, dw_hh, db from da (T, B, G * H): products and sums over all steps, or None.

    h0: None for zeros, which bring nothing to dw_hh.
    """
    T, B, I, H = sizes
    flat = da.view(T * B, da.shape[-1])
    dx = torch.mm(flat, w_ih).view(x.shape) if want_x else None
    dw_ih = torch.mm(flat.t(), x.reshape(T * B, I)) if want_w_ih else None
    dw_hh = None
    if want_w_hh:
        first, later, before = _steps(T, B, reverse)
        h_before = y.reshape(T * B, H)[before]
        if h0 is None:
            dw_hh = torch.mm(flat[later].t(), h_before)
        else:
            dw_hh = torch.mm(flat[first].t(), h0.reshape(B, H))
            if T > 1:
                dw_hh.addmm_(flat[later].t(), h_before)
    db = flat.sum(0) if want_b else None
    return dx, dw_ih, dw_hh, db


def _steps(T: int, B: int, reverse: bool) -> tuple[slice, slice, slice]:
    """Of T * B rows: the first step's in processing order, the others, and those before these."""
    others = (T - 1) * B
    if reverse:
        return slice(others, None), slice(others), slice(B, None)
    return slice(B), slice(B, None), slice(others)


def _dense(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    if tensor is None:
        return None
    if dtype is not None and tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()
