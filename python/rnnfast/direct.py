"""The short way to the core: eager calls on plain CPU tensors, past torch's dispatcher.

A step of a small layer takes the core some microseconds; dispatching an operator with Python
kernels, and its autograd formula, takes several times that. Here one pass over the arguments sees
whether anything needs that machinery (`_watched`, `_plain`), or anything is wrong. If so, the call
goes the general way: through the operators of `ops`, and for the functional layer through checks
that word the error. Both ways compute by the same functions of `cpu`: same bits, same gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._C import (
    _functorch,
    _get_tracing_state,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch.autograd import forward_ad, profiler

from . import cpu, ops
from .cpu import GATES, Sizes
from .halved import is_wished

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # w_ih, w_hh, b_ih, b_hh
Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # y, h_n, c_n, c; RNNs have no c
# What x.shape says of a call: T, B, and the axes of a state before its last.
Axes = Callable[[torch.Size], tuple[int, int, tuple[int, ...]]]


# Where the short way is open


def _watched() -> bool:
    """Whether something is active that wants to see, record or replace operator calls."""
    return (
        torch.compiler.is_compiling()
        or _len_torch_dispatch_stack() > 0
        or _len_torch_function_stack() > 0
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _get_tracing_state() is not None
        or profiler._is_profiler_enabled
    )


_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter})
_DTYPES = frozenset({torch.float32, torch.float64})


def _plain(tensor: object, dtype: torch.dtype) -> bool:
    """Whether data_ptr() leads to a CPU tensor's very elements, of this dtype.

    RuntimeError from a tensor that has no storage, such as a sparse one. A lazy negation
    (z.conj().imag) and lazy zeros are not there to be read; nor are the elements of an empty
    tensor.
    """
    return (
        type(tensor) in _PLAIN_TYPES
        and tensor.dtype is dtype
        and tensor.is_cpu
        and not tensor.is_neg()
        and tensor.data_ptr() != 0
    )


class _Unusual(Exception):
    """The arguments are for the general way to handle, or to refuse."""


def _of_layer(shape: torch.Size) -> tuple[int, int, tuple[int, ...]]:
    T, B, _ = shape
    return T, B, (B,)


def _of_sequence(shape: torch.Size) -> tuple[int, int, tuple[int, ...]]:
    if len(shape) == 2:
        return shape[0], 1, (1,)
    T, B, _ = shape
    return T, B, (1, B)


def _of_cell(shape: torch.Size) -> tuple[int, int, tuple[int, ...]]:
    if len(shape) == 1:
        return 1, 1, ()
    B, _ = shape
    return 1, B, (B,)


def _examine(
    cell: str, x: Tensor, states: Sequence[Tensor] | None, weights: Weights, axes: Axes
) -> tuple[Sizes, Tensor, Tensor | None, bool]:
    """(T, B, I, H), h0, c0, and whether a gradient may be asked for.

    Raises _Unusual, ValueError or RuntimeError unless every tensor is plain and fits the others.
    """
    if type(x) not in _PLAIN_TYPES or x.dtype not in _DTYPES or _watched():
        raise _Unusual
    if states is None:
        given = (x, *weights)
    elif type(states) in (tuple, list):
        given = (x, *states, *weights)
    else:
        raise _Unusual
    dtype = x.dtype
    needs_grad = False
    recording = torch.is_grad_enabled()
    for tensor in given:
        if tensor is not None:
            if not _plain(tensor, dtype):
                raise _Unusual
            if recording and tensor.requires_grad:
                needs_grad = True

    shape = x.shape
    T, B, lead = axes(shape)
    I = shape[-1]
    w_ih, w_hh, b_ih, b_hh = weights
    rows, H = w_hh.shape
    state_shape = (*lead, H)
    lstm = cell == "lstm"
    if states is None:
        h0 = x.new_zeros(*state_shape)
        c0 = h0 if lstm else None
    elif lstm:
        h0, c0 = states
    else:
        (h0,), c0 = states, None
    if (
        rows != GATES[cell] * H
        or w_ih.shape != (rows, I)
        or (b_ih is not None and b_ih.shape != (rows,))
        or (b_hh is not None and b_hh.shape != (rows,))
        or h0 is None
        or h0.shape != state_shape
        or (lstm and (c0 is None or c0.shape != state_shape))
    ):
        raise _Unusual
    return (T, B, I, H), h0, c0, needs_grad


def _run(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: Weights,
    axes: Axes,
    reverse: bool = False,
    k1: int = 0,
    k2: int = 0,
    keep: str = "all",
    cells: bool = False,
) -> Results | None:
    """One layer in one direction; None if the call has to go the general way.

    keep: what an LSTM keeps if a gradient may be asked for. cells: c is wanted even if none may.
    """
    try:
        sizes, h0, c0, needs_grad = _examine(cell, x, states, weights, axes)
    except (_Unusual, ValueError, RuntimeError):
        return None
    if needs_grad:
        if keep == "nothing":
            return None  # the operator refuses when the gradient is asked for
        k1, k2 = ops.window(sizes[0], k1, k2)
        return _apply(x, h0, c0, *weights, cell, sizes, reverse, k1, k2, keep)
    keep = "cells" if cells else "nothing"
    return cpu.forward(cell, sizes, reverse, keep, x, h0, c0, *weights, is_wished())[:4]


# For the functional layer, which goes its own general way where these give None


def sequence(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    bias: bool,
    batch_first: bool,
    keep: str = "all",
) -> Results | None:
    """A stack of one layer in one direction, as a module's arguments describe it.

    x (T, B, I), (B, T, I) if batch_first, or (T, I); states (1, B, H) or (1, H), None for zeros;
    weights w_ih, w_hh and, with `bias`, b_ih and b_hh. keep: as the operators take it, of effect
    only if a gradient may be asked for.
    """
    if len(weights) != (4 if bias else 2):
        return None
    w_ih, w_hh, b_ih, b_hh = weights if bias else (*weights, None, None)
    if bias and (b_ih is None or b_hh is None):
        return None
    swap = batch_first and type(x) in _PLAIN_TYPES and x.dim() == 3
    steps = x.transpose(0, 1) if swap else x
    results = _run(cell, steps, states, (w_ih, w_hh, b_ih, b_hh), _of_sequence, keep=keep)
    if swap and results is not None:
        return results[0].transpose(0, 1), *results[1:]
    return results


def step(cell: str, x: Tensor, states: Sequence[Tensor] | None, weights: Weights) -> Results | None:
    """One step: x (B, I) or (I,), states (B, H) or (H,), None for zeros; both biases or none."""
    if (weights[2] is None) != (weights[3] is None):
        return None
    return _run(cell, x, states, weights, _of_cell)


# For stacks: the operators' signatures


def lstm_layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, k1, k2, keep):
    """y, h_n, c_n and, unless `keep` is "nothing", c: as ops.lstm_layer."""
    weights = (w_ih, w_hh, b_ih, b_hh)
    options = (reverse, k1, k2, keep, keep != "nothing")
    results = _run("lstm", x, (h0, c0), weights, _of_layer, *options)
    if results is None:
        return ops.lstm_layer(x, h0, c0, *weights, reverse, k1, k2, keep)[:4]
    return results


def rnn_layer(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, reverse, k1, k2):
    """y and h_n: as ops.rnn_layer."""
    weights = (w_ih, w_hh, b_ih, b_hh)
    results = _run(nonlinearity, x, (h0,), weights, _of_layer, reverse, k1, k2)
    if results is None:
        return ops.rnn_layer(x, h0, *weights, nonlinearity, reverse, k1, k2)
    return results[:2]


# Autograd


class RnnfastLayer(torch.autograd.Function):
    """What the operators' autograd formulas do, without dispatching."""

    @staticmethod
    def forward(ctx, x, h0, c0, w_ih, w_hh, b_ih, b_hh, cell, sizes, reverse, k1, k2, keep):
        y, h_n, c_n, c, gates = cpu.forward(
            cell, sizes, reverse, keep, x, h0, c0, w_ih, w_hh, b_ih, b_hh
        )
        ctx.set_materialize_grads(False)
        biases = (b_ih, b_hh) if keep == "cells" else (None, None)
        ctx.save_for_backward(x, h0, c0, w_ih, w_hh, *biases, y, c, gates)
        ctx.call = (cell, sizes, reverse, k1, k2)
        ctx.x_shape, ctx.state_shape = x.shape, h0.shape
        return y, h_n, c_n, c

    @staticmethod
    def backward(ctx, *upstream):
        saved = ctx.saved_tensors
        need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh, *_ = (
            ctx.needs_input_grad
        )
        wants = (need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih or need_b_hh)
        short = _may_go_back(ctx, upstream, saved)
        gradients = (cpu.backward if short else _by_operator)(*ctx.call, upstream, saved, wants)
        *gradients, db = gradients
        return *gradients, db if need_b_ih else None, db if need_b_hh else None, *(None,) * 6


# Function.apply looks for functorch and for tensors that left it, of which there are none here.
_apply = super(torch.autograd.Function, RnnfastLayer).apply


def _may_go_back(ctx, upstream: tuple, saved: tuple) -> bool:
    """Whether the core may compute these gradients.

    Not where they are to be differentiated again, nor where hooks have put something else in the
    place of saved tensors.
    """
    if torch.is_grad_enabled() or _watched():
        return False
    cell, (T, B, I, H), *_ = ctx.call
    state, y, c, rows = ctx.state_shape, (*ctx.x_shape[:-1], H), (T, B, H), GATES[cell] * H
    dtype = saved[0].dtype
    shapes = (y, state, state, c)
    shapes += (ctx.x_shape, state, state, (rows, I), (rows, H), (rows,), (rows,))
    shapes += (y, c, (T, B, 4, H))
    try:
        for tensor, shape in zip((*upstream, *saved), shapes, strict=True):
            if tensor is not None and not (_plain(tensor, dtype) and tensor.shape == shape):
                return False
    except RuntimeError:
        return False
    return True


def _by_operator(cell, sizes, reverse, k1, k2, upstream, saved, wants):
    """As cpu.backward, by the operators."""
    T, B, I, H = sizes

    def shaped(tensor: Tensor | None, *shape: int) -> Tensor | None:
        return tensor if tensor is None else tensor.reshape(shape)

    dy, dh_n, dc_n, dc = upstream
    x, h0, c0, w_ih, w_hh, *biases, y, c, gates = saved
    dy, y = shaped(dy, T, B, H), shaped(y, T, B, H)
    states = dh_n, dc_n, h0, c0
    dh_n, dc_n, h0_rows, c0_rows = (shaped(state, B, H) for state in states)
    rest = (reverse, k1, k2, wants[0], *wants[3:])
    if cell == "lstm":
        dx, dh0, dc0, *dweights = torch.ops.rnnfast.lstm_layer_backward(
            *(dy, dh_n, dc_n, dc, x.reshape(T, B, I), h0_rows, c0_rows, w_ih, w_hh, y, c, gates),
            *(*rest, *biases),
        )
        dc0 = dc0.reshape(c0.shape)
    else:
        dc0 = None
        dx, dh0, *dweights = torch.ops.rnnfast.rnn_layer_backward(
            *(dy, dh_n, x.reshape(T, B, I), h0_rows, w_ih, w_hh, y, cell), *rest
        )
    gradients = (dx.reshape(x.shape) if wants[0] else None, dh0.reshape(h0.shape), dc0, *dweights)
    return tuple(d if want else None for d, want in zip(gradients, wants, strict=True))
