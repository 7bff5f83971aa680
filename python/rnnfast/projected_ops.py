"""The operators of a projected LSTM layer: one layer in one direction, forward and backward.

As those of `ops`, but that h is W_hr (o tanh(c)), of P numbers, not H (Sak, Senior & Beaufays 2014,
"Long short-term memory recurrent neural network architectures for large scale acoustic modeling").
They have kernels for the CPU alone, and truncation with k1 = k2 alone; `projected` is for the rest.
"""

from __future__ import annotations

import torch

from . import cpu, ops
from ._native import accumulator, precision

__all__ = ["lstm_layer"]

_LSTM = (
    "(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh,"
    " Tensor w_hr, bool reverse, int k, str keep, Tensor? batch_sizes=None)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor gates, Tensor m)"
)
_LSTM_BACKWARD = (
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor h0, Tensor c0,"
    " Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, Tensor w_hr, Tensor y, Tensor c,"
    " Tensor? gates, Tensor m, bool reverse, int k,"
    " bool want_x, bool want_w_ih, bool want_w_hh, bool want_w_hr, bool want_b,"
    " Tensor? batch_sizes=None)"
    " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor dw_hr, Tensor db)"
)


def _check(
    x, states, w_ih, w_hh, b_ih, b_hh, w_hr, batch_sizes, cell_dtype
) -> tuple[tuple[int, int, int, int], int]:
    """T, B, I, H; and P. As ops._check."""
    if w_hr.dim() != 2 or len(w_hr) > w_hr.shape[1]:
        raise RuntimeError(f"w_hr has shape {tuple(w_hr.shape)}, but should have (P, H), P <= H")
    P, H = w_hr.shape
    T, B, I, _ = ops._sizes(x, states["h0"], w_hh, batch_sizes)
    ops._expect("w_hr", w_hr, (P, H), x)
    ops._expect("w_ih", w_ih, (4 * H, I), x)
    ops._expect("w_hh", w_hh, (4 * H, P), x)
    ops._expect("b_ih", b_ih, (4 * H,), x)
    ops._expect("b_hh", b_hh, (4 * H,), x)
    for name, state in states.items():
        size = P if name in ("h0", "dh_n") else H
        ops._expect(name, state, (B, size), x, cell_dtype)
    return (T, B, I, H), P


def _lstm_layer_cpu(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, k, keep, batch_sizes=None):
    states = {"h0": h0, "c0": c0}
    weights = (w_ih, w_hh, b_ih, b_hh)
    sizes, P = _check(x, states, *weights, w_hr, batch_sizes, accumulator(x.dtype))
    T, B, _, H = sizes
    ops.window(T, k, k)
    precision(x.dtype)
    c_shape, gates_shape = ops._kept_shapes(keep, *x.shape[:-1], H)
    batch_sizes = ops._known(batch_sizes, x, B)
    if T == 0:
        kept = c0.new_empty(c_shape), c0.new_empty(gates_shape), x.new_empty(c_shape)
        return x.new_empty(*x.shape[:-1], P), h0.clone(), c0.clone(), *kept
    y, h_n, c_n, c, gates, m = cpu.forward(
        *("lstm", sizes, reverse, keep, x, h0, c0, *weights),
        batch_sizes=batch_sizes,
        w_hr=w_hr,
    )
    c, gates = (c0.new_empty(0) if kept is None else kept for kept in (c, gates))
    return y, h_n, c_n, c, gates, x.new_empty(0) if m is None else m


def _lstm_layer_backward_cpu(
    dy, dh_n, dc_n, dc, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, c, gates, m, reverse, k,
    want_x, want_w_ih, want_w_hh, want_w_hr, want_b, batch_sizes=None,
):  # fmt: skip
    states = {"h0": h0, "c0": c0, "dh_n": dh_n, "dc_n": dc_n}
    weights, wide = (w_ih, w_hh, b_ih, b_hh), accumulator(x.dtype)
    sizes, P = _check(x, states, *weights, w_hr, batch_sizes, wide)
    T, B, _, H = sizes
    steps = x.shape[:-1]
    for name, tensor in {"dy": dy, "y": y}.items():
        ops._expect(name, tensor, (*steps, P), x)
    for name, tensor in {"dc": dc, "c": c, "m": m}.items():
        ops._expect(name, tensor, (*steps, H), x, wide)
    ops._expect("gates", gates, (*steps, 4, H), x, wide)
    precision(x.dtype)
    batch_sizes = ops._known(batch_sizes, x, B)
    if T == 0:
        dx, dw_ih, dw_hh, db = ops._gradients(
            x, h0, w_ih, w_hh, want_x, want_w_ih, want_w_hh, want_b
        )
        dw_hr = w_hr.new_zeros(w_hr.shape if want_w_hr else (0,))
        dh0 = torch.zeros_like(h0) if dh_n is None else dh_n.clone()
        dc0 = torch.zeros_like(c0) if dc_n is None else dc_n.clone()
        return dx, dh0, dc0, dw_ih.zero_(), dw_hh.zero_(), dw_hr, db.zero_()
    *gradients, db, dw_hr = cpu.backward(
        *("lstm", sizes, reverse, *ops.window(T, k, k), (dy, dh_n, dc_n, dc)),
        (x, h0, c0, *weights, y, c, gates),
        (want_x, True, True, want_w_ih, want_w_hh, want_b),
        batch_sizes,
        (w_hr, m, want_w_hr),
    )
    return tuple(x.new_empty(0) if d is None else d for d in (*gradients, dw_hr, db))


def _lstm_layer_fake(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, k, keep, batch_sizes=None):
    states, weights = {"h0": h0, "c0": c0}, (w_ih, w_hh, b_ih, b_hh)
    wide = accumulator(x.dtype)
    (_, B, _, H), P = _check(x, states, *weights, w_hr, batch_sizes, wide)
    steps = x.shape[:-1]
    c, gates = ops._kept_shapes(keep, *steps, H)
    states = x.new_empty(B, P), c0.new_empty(B, H)
    return x.new_empty(*steps, P), *states, c0.new_empty(c), c0.new_empty(gates), x.new_empty(c)


def _lstm_layer_backward_fake(
    dy, dh_n, dc_n, dc, x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, y, c, gates, m, reverse, k,
    want_x, want_w_ih, want_w_hh, want_w_hr, want_b, batch_sizes=None,
):  # fmt: skip
    dx, dw_ih, dw_hh, db = ops._gradients(x, h0, w_ih, w_hh, want_x, want_w_ih, want_w_hh, want_b)
    dw_hr = w_hr.new_empty(w_hr.shape if want_w_hr else (0,))
    return dx, x.new_empty(h0.shape), c0.new_empty(c0.shape), dw_ih, dw_hh, dw_hr, db


# Autograd


def _setup(ctx, inputs, output):
    *tensors, ctx.reverse, ctx.k, ctx.keep, batch_sizes = inputs
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr = tensors
    y, _, _, c, gates, m = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates, m)
    computed_again = (b_ih, b_hh) if ctx.keep == "cells" else (None, None)
    gates = None if ctx.keep == "cells" else gates
    ctx.save_for_backward(x, h0, c0, w_ih, w_hh, *computed_again, w_hr, y, c, gates, m, batch_sizes)


def _autograd(ctx, dy, dh_n, dc_n, dc, _gates, _m):
    if ctx.keep == "nothing":
        raise RuntimeError(
            "lstm_layer was called with keep='nothing', so it cannot be differentiated"
        )
    need_x, _, _, need_w_ih, need_w_hh, need_b_ih, need_b_hh, need_w_hr, *rest = (
        ctx.needs_input_grad
    )
    *saved, batch_sizes = ctx.saved_tensors
    dx, dh0, dc0, dw_ih, dw_hh, dw_hr, db = torch.ops.rnnfast.projected_lstm_layer_backward(
        *(dy, dh_n, dc_n, dc, *saved, ctx.reverse, ctx.k),
        *(need_x, need_w_ih, need_w_hh, need_w_hr, need_b_ih or need_b_hh, batch_sizes),
    )
    gradients = (dx, dh0, dc0, dw_ih, dw_hh, db, db, dw_hr)
    return *ops._wanted(gradients, ctx.needs_input_grad), *(None for _ in rest)


_NAME, _BACKWARD_NAME = "projected_lstm_layer", "projected_lstm_layer_backward"
ops._register(_NAME, _LSTM, _lstm_layer_cpu, _lstm_layer_fake)
ops._register(_BACKWARD_NAME, _LSTM_BACKWARD, _lstm_layer_backward_cpu, _lstm_layer_backward_fake)
torch.library.register_autograd(f"rnnfast::{_NAME}", _autograd, setup_context=_setup)
torch.library.register_autograd(
    f"rnnfast::{_BACKWARD_NAME}",
    ops._no_second_derivative,
    setup_context=ops._no_second_setup,
)

lstm_layer = ops._without_forward_mode(_NAME)
