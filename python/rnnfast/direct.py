"""The short way to the core: eager calls on plain CPU tensors, past torch's dispatcher.

A step of a small layer takes the core some microseconds; dispatching an operator with Python
kernels, and its autograd formula, takes several times that. Here one pass over the arguments sees
whether anything needs that machinery (`watched`), or anything is wrong. If so, the call
goes the general way: through the operators of `ops`, and for the functional layer through checks
that word the error. Both ways compute by the same functions of `cpu`: same bits, same gradients.
CUDA tensors are handed on to `cuda_direct`, which does the same for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter

import torch
from torch import Tensor, is_grad_enabled

from . import cpu, cuda_direct, ops, projected_ops
from ._native import accumulator, core
from .cpu import GATES
from .halved import is_wished
from .watched import PLAIN_TYPES
from .watched import watched as _watched

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # w_ih, w_hh, b_ih, b_hh
Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # y, h_n, c_n, c; RNNs have no c


def _record(
    found, cell, x, weights, reverse=False, k1=0, k2=0, keep="all", batch_sizes=None
) -> Results | None:
    """The same call with its gradient; `found` is what the core's function gave for it."""
    if keep == "nothing":
        return None  # the operator refuses when the gradient is asked for
    _, sizes, h0, c0 = found
    k1, k2 = ops.window(sizes[0], k1, k2)
    return _apply(x, h0, c0, *weights, cell, sizes, reverse, k1, k2, keep, batch_sizes)


def _as_x(c_n: Tensor | None, x: Tensor) -> Tensor | None:
    return c_n if c_n is None or c_n.dtype is x.dtype else c_n.to(x.dtype)


# The core's functions below see whether every tensor is plain, and fits; if so, they compute, or
# give sizes and states where a gradient may be asked for. Else they give None; if `cuda_direct` has
# no use for the tensors either, so do these, for the functional layer to go the general way.


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
    if _watched():
        return None
    return _sequence(cell, x, states, weights, bias, batch_first, keep)


def _sequence(cell, x, states, weights, bias, batch_first, keep) -> Results | None:
    found = core.run_sequence(
        cell, x, states, weights, bias, batch_first, is_wished(), is_grad_enabled()
    )
    if found is None:
        return cuda_direct.sequence(cell, x, states, weights, bias, batch_first, keep)
    if found[0] is not None:
        return found
    swap = batch_first and x.dim() == 3
    steps = x.transpose(0, 1) if swap else x
    results = _record(found, cell, steps, weights if bias else (*weights, None, None), keep=keep)
    if results is None:
        return None
    y, h_n, c_n, c = results
    return y.transpose(0, 1) if swap else y, h_n, _as_x(c_n, x), c


def step(
    cell: str, x: Tensor, states: Sequence[Tensor] | None, weights: Weights
) -> tuple[Tensor, Tensor | None] | None:
    """One step: h and c of shape (B, H) or (H,); c is None for an RNN.

    x (B, I) or (I,), states (B, H) or (H,), None for zeros; both biases or none.
    """
    return None if _watched() else _step(cell, x, states, weights)


def _step(cell, x, states, weights) -> tuple[Tensor, Tensor | None] | None:
    found = core.run_step(cell, x, states, weights, is_wished(), is_grad_enabled())
    if found is None:
        return cuda_direct.step(cell, x, states, weights)
    h, _, c, _ = found
    if h is None:  # h_n rather than y, which is saved: callers may write on what they get
        _, h, c, _ = _record(found, cell, x, weights)
        c = _as_x(c, x)
    return h, c


# For modules: the same with the arguments that they hold. They are taken from the module's own
# dictionary, as every attribute goes through Module.__getattr__'s slot, five times as slowly.

_RNN_CELLS = {"tanh": "tanh", "relu": "relu"}  # by nonlinearity
_MATRICES, _BIASES = ("weight_ih", "weight_hh"), ("bias_ih", "bias_hh")
_LAYER_MATRICES = itemgetter(*(f"{name}_l0" for name in _MATRICES))
_LAYER_WEIGHTS = itemgetter(*(f"{name}_l0" for name in (*_MATRICES, *_BIASES)))
_CELL_WEIGHTS = itemgetter(*_MATRICES, *_BIASES)


def module_sequence(
    module: torch.nn.RNNBase, cell: str | None, x: Tensor, states: Sequence[Tensor] | None
) -> Results | None:
    """What `module` computes, if that is one layer in one direction without more ado.

    cell: None for the one that its nonlinearity says.
    """
    if _watched():
        return None
    own = module.__dict__
    try:
        cell = cell or _RNN_CELLS[own["nonlinearity"]]
        if (
            own["num_layers"] != 1
            or own["bidirectional"]
            or own["proj_size"]
            or own.get("truncate") is not None
            or own.get("memory", "normal") != "normal"
        ):
            return None
        bias = own["bias"]
        weights = (_LAYER_WEIGHTS if bias else _LAYER_MATRICES)(own["_parameters"])
    except (KeyError, TypeError):  # a parametrization stands there, or what is no nonlinearity
        return None
    return _sequence(cell, x, states, weights, bias, own["batch_first"], "all")


def module_step(
    module: torch.nn.RNNCellBase, cell: str | None, x: Tensor, states: Sequence[Tensor] | None
) -> tuple[Tensor, Tensor | None] | None:
    """What `module` computes; cell as above."""
    if _watched():
        return None
    own = module.__dict__
    try:
        cell = cell or _RNN_CELLS[own["nonlinearity"]]
        weights = _CELL_WEIGHTS(own["_parameters"])
    except (KeyError, TypeError):
        return None
    return _step(cell, x, states, weights)


# For stacks: the operators' signatures; on CUDA states may be None for zeros


def _layer(cell, x, states, weights, reverse, k1, k2, keep, batch_sizes=None) -> Results | None:
    if _watched():
        return None
    kept = "nothing" if keep == "nothing" else "cells"
    address, steps = 0, 0
    if batch_sizes is not None:
        if not _plain(batch_sizes, torch.int64) or not batch_sizes.is_contiguous():
            return None
        address, steps = batch_sizes.data_ptr(), len(batch_sizes)
    found = core.run_layer(
        *(cell, x, states, weights, reverse, kept, is_wished(), is_grad_enabled(), address, steps)
    )
    if found is None:
        if batch_sizes is not None:
            return None
        return cuda_direct.layer(cell, x, states, weights, reverse, k1, k2, keep)
    if found[0] is not None:
        return found
    return _record(found, cell, x, weights, reverse, k1, k2, keep, batch_sizes)


def lstm_layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, k1, k2, keep, batch_sizes=None):
    """y, h_n, c_n and, unless `keep` is "nothing", c: as ops.lstm_layer."""
    weights = (w_ih, w_hh, b_ih, b_hh)
    results = _layer("lstm", x, (h0, c0), weights, reverse, k1, k2, keep, batch_sizes)
    if results is None:
        if h0 is None:
            h0 = c0 = x.new_zeros(x.shape[1], w_hh.shape[1])
        return ops.lstm_layer(x, h0, c0, *weights, reverse, k1, k2, keep, batch_sizes)[:4]
    return results


def rnn_layer(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, reverse, k1, k2, batch_sizes=None):
    """y and h_n: as ops.rnn_layer."""
    weights = (w_ih, w_hh, b_ih, b_hh)
    results = _layer(nonlinearity, x, (h0,), weights, reverse, k1, k2, "all", batch_sizes)
    if results is None:
        h0 = x.new_zeros(x.shape[1], w_hh.shape[1]) if h0 is None else h0
        return ops.rnn_layer(x, h0, *weights, nonlinearity, reverse, k1, k2, batch_sizes)
    return results[:2]


def projected_layer(x, h0, c0, w_ih, w_hh, b_ih, b_hh, w_hr, reverse, k, keep, batch_sizes=None):
    """y, h_n, c_n and c: as projected_ops.lstm_layer, which is called where a gradient may be asked
    for, too."""
    weights = (w_ih, w_hh, b_ih, b_hh)
    if keep == "nothing" and batch_sizes is None and x.dim() == 3 and w_hr.dim() == 2:
        (T, B, I), (P, H) = x.shape, w_hr.shape
        dtype, rows = x.dtype, GATES["lstm"] * H
        expected = (
            *(((T, B, I), dtype), ((B, P), dtype), ((B, H), accumulator(dtype))),
            *(((rows, I), dtype), ((rows, P), dtype), ((rows,), dtype), ((rows,), dtype)),
            ((P, H), dtype),
        )
        given = (x, h0, c0, *weights, w_hr)
        if P <= H and not _watched() and _are_plain(given, expected):
            sizes = (T, B, I, H)
            return cpu.forward("lstm", sizes, reverse, keep, x, h0, c0, *weights, w_hr=w_hr)[:4]
    args = (x, h0, c0, *weights, w_hr, reverse, k, keep, batch_sizes)
    return projected_ops.lstm_layer(*args)[:4]


# Autograd


class RnnfastLayer(torch.autograd.Function):
    """What the operators' autograd formulas do, without dispatching."""

    @staticmethod
    def forward(
        ctx, x, h0, c0, w_ih, w_hh, b_ih, b_hh, cell, sizes, reverse, k1, k2, keep, batch_sizes
    ):
        y, h_n, c_n, c, gates = cpu.forward(
            *(cell, sizes, reverse, keep, x, h0, c0, w_ih, w_hh, b_ih, b_hh),
            batch_sizes=batch_sizes,
        )
        ctx.set_materialize_grads(False)
        biases = (b_ih, b_hh) if keep == "cells" else (None, None)
        ctx.save_for_backward(x, h0, c0, w_ih, w_hh, *biases, y, c, gates)
        ctx.call, ctx.batch_sizes = (cell, sizes, reverse, k1, k2), batch_sizes
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
        *gradients, db = (cpu.backward if short else ops.backward)(
            *ctx.call, upstream, saved, wants, ctx.batch_sizes
        )
        return *gradients, db if need_b_ih else None, db if need_b_hh else None, *(None,) * 7


# Function.apply looks for functorch and for tensors that left it, of which there are none here.
_apply = super(torch.autograd.Function, RnnfastLayer).apply


def _plain(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether data_ptr() leads to a CPU tensor's very elements, of this dtype.

    RuntimeError from a tensor that has no storage, such as a sparse one. A lazy negation
    (z.conj().imag) and lazy zeros are not there to be read; nor are the elements of an empty
    tensor.
    """
    return (
        type(tensor) in PLAIN_TYPES
        and tensor.dtype is dtype
        and tensor.is_cpu
        and not tensor.is_neg()
        and tensor.data_ptr() != 0
    )


def _are_plain(tensors, expected) -> bool:
    """Whether tensors are None or plain, each with its expected shape and dtype."""
    try:
        return all(
            tensor is None or (_plain(tensor, dtype) and tensor.shape == shape)
            for tensor, (shape, dtype) in zip(tensors, expected, strict=True)
        )
    except RuntimeError:
        return False


def _may_go_back(ctx, upstream: tuple, saved: tuple) -> bool:
    """Whether the core may compute these gradients.

    Not where they are to be differentiated again, nor where hooks have put something else in the
    place of saved tensors, nor where batch_sizes have changed meanwhile.
    """
    if torch.is_grad_enabled() or _watched():
        return False
    cell, (T, B, I, H), *_ = ctx.call
    if ctx.batch_sizes is not None:
        rows = (T, ctx.x_shape[0])
        if (len(ctx.batch_sizes), int(ctx.batch_sizes.sum())) != rows:
            return False
    dtype = saved[0].dtype
    of_cell = accumulator(dtype)
    steps = (T, B) if ctx.batch_sizes is None else ctx.x_shape[:1]
    y, state, c, rows = (*ctx.x_shape[:-1], H), ctx.state_shape, (*steps, H), GATES[cell] * H
    expected = (  # upstream, then saved
        *((y, dtype), (state, dtype), (state, of_cell), (c, of_cell)),
        *((ctx.x_shape, dtype), (state, dtype), (state, of_cell)),
        *(((rows, I), dtype), ((rows, H), dtype), ((rows,), dtype), ((rows,), dtype)),
        *((y, dtype), (c, of_cell), ((*steps, 4, H), of_cell)),
    )
    return _are_plain((*upstream, *saved), expected)
