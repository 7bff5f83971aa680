"""A layer in both directions as one operator, so that a GPU can run the two side by side.

The operators take what those of `ops` take, once for each direction; names of the second one end in
_reverse, as torch.nn's parameters do. The outputs stand side by side in y, (T, B, 2 * H). On the
CPU, and for shapes alone, they are two calls of the operators in `ops`. On CUDA (`cuda_ops`) one
launch of the recurrence serves both directions; only there does `functional` call them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops

__all__ = ["lstm", "lstm_layer", "rnn", "rnn_layer"]

# What each direction has of its own, in and out.
LSTM = (
    "Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh",
    "Tensor h_n, Tensor c_n, Tensor c, Tensor gates",
)
LSTM_BACKWARD = (
    "Tensor? dh_n, Tensor? dc_n, Tensor? dc,"
    " Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor c, Tensor? gates,"
    " Tensor? b_ih, Tensor? b_hh",  # biases in the place of gates that were not kept
    "Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db",
)
RNN = ("Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh", "Tensor h_n")
RNN_BACKWARD = (
    "Tensor? dh_n, Tensor h0, Tensor w_ih, Tensor w_hh",
    "Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db",
)


def _twice(arguments: str) -> str:
    return f"{arguments}, {re.sub('(?=,|$)', '_reverse', arguments)}"


def split(args: Sequence[Any], each: int) -> tuple[Sequence[Any], Sequence[Any], Sequence[Any]]:
    """What belongs to the first direction, to the reverse one, and to neither."""
    return args[:each], args[each : 2 * each], args[2 * each :]


def _halves(name: str, sequence: Tensor | None, x: Tensor, w_hh: Tensor) -> Sequence[Tensor | None]:
    """Each direction's part of (T, B, 2 * H)."""
    ops._expect(name, sequence, (*x.shape[:2], 2 * w_hh.shape[-1]), x)
    return (None, None) if sequence is None else sequence.chunk(2, -1)


def _side_by_side(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.cat((first[0], second[0]), -1), *first[1:], *second[1:]


def _added(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return first[0] + second[0], *first[1:], *second[1:]


def _check_reverse(
    directions: tuple[str, str], first: Sequence[Any], second: Sequence[Any]
) -> None:
    """The second direction's arguments have the shapes of the first one's."""
    for argument, tensor, other in zip(directions[0].split(","), first, second, strict=True):
        if tensor is not None:
            name = argument.split()[-1]
            ops._expect(f"{name}_reverse", other, tuple(tensor.shape), tensor)


# Kernels

Calls = Sequence[tuple]
Run = Callable[[str, Calls], Sequence[Sequence[Tensor]]]


def kernels(run: Run) -> dict[str, Callable]:
    """Kernels of all operators here, by the names of those in `ops` that they are made of.

    run(name, calls): the results of two calls of that operator, which differ in their direction.
    """

    def lstm_layer(x, *args):
        first, second, options = split(args, 6)
        _check_reverse(LSTM, first, second)
        calls = (x, *first, False, *options), (x, *second, True, *options)
        return _side_by_side(*run("lstm_layer", calls))

    def rnn_layer(x, *args):
        first, second, (nonlinearity, *options) = split(args, 5)
        _check_reverse(RNN, first, second)
        calls = [(x, *first, nonlinearity, False, *options)]
        calls += [(x, *second, nonlinearity, True, *options)]
        return _side_by_side(*run("rnn_layer", calls))

    def lstm_layer_backward(dy, x, y, *args):
        first, second, options = split(args, 11)
        _check_reverse(LSTM_BACKWARD, first, second)
        w_hh, calls = first[6], []
        dys, ys = _halves("dy", dy, x, w_hh), _halves("y", y, x, w_hh)
        for n, (*upstream, h0, c0, w_ih, w_hh, c, gates, b_ih, b_hh) in enumerate((first, second)):
            saved = (x, h0, c0, w_ih, w_hh, ys[n], c, gates)
            calls.append((dys[n], *upstream, *saved, n == 1, *options, b_ih, b_hh))
        return _added(*run("lstm_layer_backward", calls))

    def rnn_layer_backward(dy, x, y, *args):
        first, second, (nonlinearity, *options) = split(args, 4)
        _check_reverse(RNN_BACKWARD, first, second)
        w_hh, calls = first[3], []
        dys, ys = _halves("dy", dy, x, w_hh), _halves("y", y, x, w_hh)
        for n, (dh_n, h0, w_ih, w_hh) in enumerate((first, second)):
            saved = (x, h0, w_ih, w_hh, ys[n])
            calls.append((dys[n], dh_n, *saved, nonlinearity, n == 1, *options))
        return _added(*run("rnn_layer_backward", calls))

    written = (lstm_layer, rnn_layer, lstm_layer_backward, rnn_layer_backward)
    return {kernel.__name__: kernel for kernel in written}


def _one_by_one(name: str, calls: Calls) -> list[Sequence[Tensor]]:
    return [getattr(torch.ops.rnnfast, name)(*call) for call in calls]


# Autograd


def _lstm_setup(ctx, inputs, output):
    *layers, (ctx.k1, ctx.k2, ctx.keep) = split(inputs[1:], 6)
    *results, _ = split(output[1:], 4)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(gates for *_, gates in results))
    saved = [inputs[0], output[0]]
    for (*states_and_weights, b_ih, b_hh), (_, _, c, gates) in zip(layers, results, strict=True):
        instead_of_gates = (None, b_ih, b_hh) if ctx.keep == "cells" else (gates, None, None)
        saved += [*states_and_weights, c, *instead_of_gates]
    ctx.save_for_backward(*saved)


def _lstm_autograd(ctx, dy, *upstream):
    if ctx.keep == "nothing":
        raise RuntimeError(
            "lstm_layer was called with keep='nothing', so it cannot be differentiated"
        )
    x, y, *saved = ctx.saved_tensors
    (first, second, _), (saved, others, _) = split(upstream, 4), split(saved, 8)
    needs = ctx.needs_input_grad
    wants = needs[0], needs[3] or needs[9], needs[4] or needs[10], any(needs[5:7] + needs[11:13])
    dx, *gradients = torch.ops.rnnfast.bidirectional_lstm_layer_backward(
        dy, x, y, *first[:3], *saved, *second[:3], *others, ctx.k1, ctx.k2, *wants
    )
    first, second, _ = split(gradients, 5)
    gradients = (dx, *first, first[-1], *second, second[-1])  # db is both biases'
    return *ops._wanted(gradients, needs), None, None, None


def _rnn_setup(ctx, inputs, output):
    first, second, (ctx.nonlinearity, ctx.k1, ctx.k2) = split(inputs[1:], 5)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], output[0], *first[:3], *second[:3])


def _rnn_autograd(ctx, dy, dh_n, dh_n_reverse):
    x, y, *saved = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wants = needs[0], needs[2] or needs[7], needs[3] or needs[8], any(needs[4:6] + needs[9:11])
    dx, *gradients = torch.ops.rnnfast.bidirectional_rnn_layer_backward(
        *(dy, x, y, dh_n, *saved[:3], dh_n_reverse, *saved[3:]),
        *(ctx.nonlinearity, ctx.k1, ctx.k2, *wants),
    )
    first, second, _ = split(gradients, 4)
    gradients = (dx, *first, first[-1], *second, second[-1])
    return *ops._wanted(gradients, needs), None, None, None


def _schema(shared: str, directions: tuple[str, str], options: str, result: str) -> str:
    inputs, outputs = map(_twice, directions)
    return f"({shared}, {inputs}, {options}) -> (Tensor {result}, {outputs})"


_CUT, _SEQUENCES = "int k1, int k2", "Tensor? dy, Tensor x, Tensor y"
_WANTS = "bool want_x, bool want_w_ih, bool want_w_hh, bool want_b"
_SCHEMAS = {
    "lstm_layer": _schema("Tensor x", LSTM, f"{_CUT}, str keep", "y"),
    "rnn_layer": _schema("Tensor x", RNN, f"str nonlinearity, {_CUT}", "y"),
    "lstm_layer_backward": _schema(_SEQUENCES, LSTM_BACKWARD, f"{_CUT}, {_WANTS}", "dx"),
    "rnn_layer_backward": _schema(
        _SEQUENCES, RNN_BACKWARD, f"str nonlinearity, {_CUT}, {_WANTS}", "dx"
    ),
}
_FORMULAS = {
    "lstm_layer": (_lstm_autograd, _lstm_setup),
    "rnn_layer": (_rnn_autograd, _rnn_setup),
    "lstm_layer_backward": (ops._no_second_derivative, ops._no_second_setup),
    "rnn_layer_backward": (ops._no_second_derivative, ops._no_second_setup),
}
for _name, _kernel in kernels(_one_by_one).items():
    ops._register(f"bidirectional_{_name}", _SCHEMAS[_name], _kernel, _kernel)
    _backward, _setup = _FORMULAS[_name]
    torch.library.register_autograd(
        f"rnnfast::bidirectional_{_name}", _backward, setup_context=_setup
    )

lstm_layer = ops._without_forward_mode("bidirectional_lstm_layer")
rnn_layer = ops._without_forward_mode("bidirectional_rnn_layer")


def backward(cell, sizes, k1, k2, dy, x, y, upstreams, saved, wants):
    """The gradients of either direction by the operators, which autograd sees, as
    `cuda_ops.Layers.backward_both` gives them; dx comes with the first.

    upstreams: dh_n, dc_n, dc of each direction. saved: h0, c0, w_ih, w_hh, b_ih, b_hh, c, gates of
    each; h0 and c0 may be None for zeros, if no gradient is wanted of them. wants: of each x, h0,
    c0, w_ih, w_hh and biases.
    """
    T, B, _, H = sizes
    zeros, lstm, args = x.new_zeros(B, H), cell == "lstm", []
    for (dh_n, dc_n, dc), (h0, c0, w_ih, w_hh, b_ih, b_hh, c, gates) in zip(
        upstreams, saved, strict=True
    ):
        h0, c0 = (zeros if state is None else state for state in (h0, c0))
        if lstm:
            gates = gates if gates is None else gates.view(T, B, 4, H)
            args += [dh_n, dc_n, dc, h0, c0, w_ih, w_hh, c, gates, b_ih, b_hh]
        else:
            args += [dh_n, h0, w_ih, w_hh]
    any_wants = [any(pair) for pair in zip(*wants, strict=True)]
    options = (k1, k2, any_wants[0], *any_wants[3:])
    if lstm:
        dx, *given = torch.ops.rnnfast.bidirectional_lstm_layer_backward(dy, x, y, *args, *options)
        given = split(given, 5)[:2]
    else:
        dx, *given = torch.ops.rnnfast.bidirectional_rnn_layer_backward(
            dy, x, y, *args, cell, *options
        )
        given = [(dh0, None, *rest) for dh0, *rest in split(given, 4)[:2]]
    both = ((dx, *given[0]), (None, *given[1]))
    return tuple(
        tuple(d if want else None for d, want in zip(gradients, each, strict=True))
        for gradients, each in zip(both, wants, strict=True)
    )


# For stacks: y, both directions' final states, and their cell states


def lstm(x, states, weights, k1, k2, keep):
    (state, state_reverse), (w, w_reverse) = states, weights
    y, *results = lstm_layer(x, *state, *w, *state_reverse, *w_reverse, k1, k2, keep)
    (h_n, c_n, c, _), (h_n_reverse, c_n_reverse, c_reverse, _), _ = split(results, 4)
    return y, [(h_n, c_n), (h_n_reverse, c_n_reverse)], [c, c_reverse]


def rnn(nonlinearity):
    def run(x, states, weights, k1, k2, keep):
        (state, state_reverse), (w, w_reverse) = states, weights
        y, *finals = rnn_layer(x, *state, *w, *state_reverse, *w_reverse, nonlinearity, k1, k2)
        return y, [(h_n,) for h_n in finals], [None, None]

    return run
