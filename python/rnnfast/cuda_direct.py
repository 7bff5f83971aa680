"""The short way to the CUDA kernels: eager calls on plain tensors, past torch's dispatcher.

As `direct`, which hands CUDA tensors on to this and has asked `watched`. What fits is computed by
the methods `forward` and `backward` of `cuda_ops.Layers`, which do what its operators do; for the
rest the functions here give None, and the call goes the general way. A profiler watches: it sees
the operators, and with them more of the host's time than a layer takes without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled

from . import bidirectional, cuda_ops, ops
from ._native import core
from .cpu import GATES
from .cuda_ops import Layers
from .cuda_products import state_dtype
from .watched import PLAIN_TYPES
from .watched import watched as _watched

BothDirections = Callable[..., tuple[Tensor, list[tuple[Tensor, ...]], list[Tensor | None]]]
Results = tuple[Tensor, Tensor, Tensor | None, Tensor | None]  # y, h_n, c_n, c; RNNs have no c


def _layers_for(x: Tensor) -> Layers | None:
    return cuda_ops.layers if x.is_cuda else None


def sequence(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor] | None,
    weights: Sequence[Tensor],
    bias: bool,
    batch_first: bool,
    keep: str,
) -> Results | None:
    """A stack of one layer in one direction, as `direct.sequence` describes it."""
    if type(x) not in PLAIN_TYPES or (layers := _layers_for(x)) is None:
        return None
    swap = False
    if x.dim() == 3:
        swap = bool(batch_first)
        steps = x.transpose(0, 1) if swap else x
        T, B, I = steps.shape
        lead = (1, B)
    elif x.dim() == 2:
        steps, (T, I) = x, x.shape
        B, lead = 1, (1,)
    else:
        return None
    if len(weights) != (4 if bias else 2):
        return None
    weights = weights if bias else (*weights, None, None)
    rows, cut = (T, B, I), (0, 0)
    results = _run(layers, cell, steps, rows, states, lead, weights, False, cut, keep, "nothing")
    if results is None or not swap:
        return results
    y, *others = results
    return y.transpose(0, 1), *others


def step(
    cell: str, x: Tensor, states: Sequence[Tensor] | None, weights: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor | None] | None:
    """One step, as `direct.step` describes it: h and c."""
    if type(x) not in PLAIN_TYPES or (layers := _layers_for(x)) is None:
        return None
    if x.dim() not in (1, 2) or (weights[2] is None) != (weights[3] is None):
        return None
    *lead, I = x.shape
    B = lead[0] if lead else 1
    rows, cut = (1, B, I), (0, 0)
    results = _run(layers, cell, x, rows, states, lead, weights, False, cut, "all", "nothing")
    return results if results is None else results[1:3]


def layer(
    cell: str,
    x: Tensor,
    states: Sequence[Tensor | None],
    weights: Sequence[Tensor | None],
    reverse: bool,
    k1: int,
    k2: int,
    keep: str,
) -> Results | None:
    """One layer in one direction, with the operators' arguments; states may be None for zeros."""
    if type(x) not in PLAIN_TYPES or (layers := _layers_for(x)) is None or x.dim() != 3:
        return None
    lead, states = x.shape[1:2], None if states[0] is None else states
    cut, kept = (k1, k2), _kept_without_gradient(keep)
    return _run(layers, cell, x, x.shape, states, lead, weights, reverse, cut, keep, kept)


def both(cell: str) -> BothDirections:
    """The two directions of a layer side by side, as a stack of this cell wants them.

    States may be tuples of None for zeros. What does not fit goes to the operators of
    `bidirectional`.
    """
    general = bidirectional.lstm if cell == "lstm" else bidirectional.rnn(cell)

    def run(x, states, weights, k1, k2, keep):
        results = None if _watched() else _run_both(cell, x, states, weights, k1, k2, keep)
        if results is None:
            return general(
                x, [_filled(state, x, weights[0]) for state in states], weights, k1, k2, keep
            )
        y, *given = results
        cells = [None, None] if cell != "lstm" else given[2::3]
        finals = [given[n : n + 2] if cell == "lstm" else given[n : n + 1] for n in (0, 3)]
        return y, [tuple(final) for final in finals], cells

    return run


def _filled(state, x: Tensor, w) -> tuple[Tensor, ...]:
    """A state (B, H) for these weights, of zeros where it has None."""
    return tuple(x.new_zeros(x.shape[1], w[1].shape[1]) if s is None else s for s in state)


def _kept_without_gradient(keep: str) -> str:
    """Gates are for a gradient alone; a stack may have been asked for its cell states."""
    return "nothing" if keep == "nothing" else "cells"


def _run(
    layers, cell, x, rows, states, lead, weights, reverse, cut, keep, kept_without_gradient
) -> Results | None:
    """x in any shape that has `rows` T, B, I; states (*lead, H), or None for zeros; cut: k1, k2."""
    w_ih, w_hh, b_ih, b_hh = weights
    T, B, I = rows
    place = _place(x)
    x_shape, dtype, device, device_type = place
    if T == 0 or dtype not in cuda_ops.FORMATS or is_autocast_enabled(device_type):
        return None
    if w_ih is None or type(w_hh) not in PLAIN_TYPES or w_hh.dim() != 2:
        return None
    H = w_hh.shape[1]
    h0 = c0 = None
    if states is not None:
        if not isinstance(states, (tuple, list)) or len(states) != (2 if cell == "lstm" else 1):
            return None
        h0, c0 = states if cell == "lstm" else (*states, None)
        if h0 is None or (c0 is None and cell == "lstm"):
            return None
    state_shape, gates = (*lead, H), GATES[cell] * H
    biases = (gates,)
    given = (x, w_ih, w_hh, b_ih, b_hh, h0, c0)
    shapes = (x_shape, (gates, I), (gates, H), biases, biases, state_shape, state_shape)
    if not core.are_plain(given, shapes, dtype, device):
        return None
    sizes = (T, B, I, H)
    if not _needs_grad(given):
        kept = kept_without_gradient
        return layers.forward(cell, sizes, reverse, kept, x, h0, c0, *weights, state_shape)[:4]
    if keep == "nothing":
        return None  # the operator refuses when the gradient is asked for
    k1, k2 = ops.window(T, *cut)
    call = (layers, cell, sizes, reverse, k1, k2, keep, state_shape, place)
    return _apply(x, h0, c0, *weights, call)


def _run_both(cell, x, states, weights, k1, k2, keep) -> tuple[Tensor | None, ...] | None:
    """y (T, B, 2 * H) and h_n, c_n, c of either direction."""
    if type(x) not in PLAIN_TYPES or (layers := _layers_for(x)) is None or x.dim() != 3:
        return None
    w_hh, place = weights[0][1], _place(x)
    x_shape, dtype, device, device_type = place
    if type(w_hh) not in PLAIN_TYPES or w_hh.dim() != 2 or is_autocast_enabled(device_type):
        return None
    (T, B, I), H = x_shape, w_hh.shape[1]
    own = []
    for state, w in zip(states, weights, strict=True):
        h0, c0 = state if cell == "lstm" else (*state, None)
        own.append((h0, c0, *w))
    if T == 0 or dtype not in cuda_ops.FORMATS:
        return None
    given = (x, *own[0], *own[1])
    shapes = _shapes_of_direction(cell, B, I, H)
    if not core.are_plain(given, (x_shape, *shapes, *shapes), dtype, device):
        return None
    sizes = (T, B, I, H)
    if not _needs_grad(given):
        kept = _kept_without_gradient(keep)
        y, first, second = layers.forward_both(cell, sizes, kept, x, *own)
        return y, *first[:3], *second[:3]
    if keep == "nothing":
        return None
    k1, k2 = ops.window(T, k1, k2)
    return _apply_both(*given, (layers, cell, sizes, k1, k2, keep, place))


def _shapes_of_direction(cell, B, I, H) -> tuple[tuple[int, ...], ...]:
    """Of h0, c0, w_ih, w_hh, b_ih, b_hh."""
    rows = GATES[cell] * H
    return (B, H), (B, H), (rows, I), (rows, H), (rows,), (rows,)


def _place(x: Tensor) -> tuple[torch.Size, torch.dtype, torch.device, str]:
    """Its shape, dtype, device and type of device, read once, as each reading makes an object."""
    device = x.device
    return x.shape, x.dtype, device, "cuda" if x.is_cuda else device.type


def _needs_grad(tensors: Sequence[Tensor | None]) -> bool:
    if is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


# Autograd


class RnnfastCudaLayer(torch.autograd.Function):
    """What the operators' autograd formulas do, without dispatching."""

    @staticmethod
    def forward(ctx, x, h0, c0, w_ih, w_hh, b_ih, b_hh, call):
        layers, cell, sizes, reverse, _, _, keep, state_shape, _ = call
        y, h_n, c_n, c, gates = layers.forward(
            cell, sizes, reverse, keep, x, h0, c0, w_ih, w_hh, b_ih, b_hh, state_shape
        )
        ctx.set_materialize_grads(False)
        if keep != "cells":
            b_ih = b_hh = None
        ctx.save_for_backward(x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, c, gates)
        ctx.call = call
        return y, h_n, c_n, c

    @staticmethod
    def backward(ctx, *upstream):
        saved = ctx.saved_tensors
        need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih, need_b_hh, _ = (
            ctx.needs_input_grad
        )
        wants = (need_x, need_h0, need_c0, need_w_ih, need_w_hh, need_b_ih or need_b_hh)
        layers, cell, sizes, reverse, k1, k2, *_ = ctx.call
        short = _may_go_back(ctx, upstream, saved)
        dx, dh0, dc0, dw_ih, dw_hh, db = (layers.backward if short else ops.backward)(
            cell, sizes, reverse, k1, k2, upstream, saved, wants
        )
        db_ih, db_hh = db if need_b_ih else None, db if need_b_hh else None
        return dx, dh0, dc0, dw_ih, dw_hh, db_ih, db_hh, None


class RnnfastCudaLayerBothDirections(torch.autograd.Function):
    """The same for the two directions of a layer."""

    @staticmethod
    def forward(ctx, x, *own_and_call):
        first, second, (call,) = bidirectional.split(own_and_call, 6)
        layers, cell, sizes, _, _, keep, _ = call
        y, given, given_reverse = layers.forward_both(cell, sizes, keep, x, first, second)
        ctx.set_materialize_grads(False)
        saved = [x, y]
        for own, (_, _, c, gates) in ((first, given), (second, given_reverse)):
            biases = own[4:] if keep == "cells" else (None, None)
            saved += [*own[:4], *biases, c, gates]
        ctx.save_for_backward(*saved)
        ctx.call = call
        return y, *given[:3], *given_reverse[:3]

    @staticmethod
    def backward(ctx, dy, *upstream):
        (x, y, *saved), needs = ctx.saved_tensors, ctx.needs_input_grad
        layers, cell, sizes, k1, k2, *_ = ctx.call
        H = sizes[-1]
        both = bidirectional.split(upstream, 3)[:2], bidirectional.split(saved, 8)[:2]
        wants = [(needs[0], *needs[n : n + 4], needs[n + 4] or needs[n + 5]) for n in (1, 7)]
        if not _both_may_go_back(ctx, dy, x, y, *both):
            gradients = bidirectional.backward(cell, sizes, k1, k2, dy, x, y, *both, wants)
        else:
            dys = (None, None) if dy is None else (dy[..., :H], dy[..., H:])
            ys = y[..., :H], y[..., H:]
            upstreams, saved = both
            upstreams = [(dys[n], *upstreams[n]) for n in range(2)]
            saved = [(x, *saved[n][:6], ys[n], *saved[n][6:]) for n in range(2)]
            gradients = layers.backward_both(cell, sizes, k1, k2, upstreams, saved, wants)
        (dx, *first), (dx_reverse, *second) = gradients
        if dx is not None and dx_reverse is not None:
            dx = dx + dx_reverse
        results = [dx]
        for n, (*gradients, db) in ((1, first), (7, second)):
            results += [*gradients, db if needs[n + 4] else None, db if needs[n + 5] else None]
        return *results, None


# Function.apply looks for functorch and for tensors that left it, of which there are none here.
_apply = super(torch.autograd.Function, RnnfastCudaLayer).apply
_apply_both = super(torch.autograd.Function, RnnfastCudaLayerBothDirections).apply


def _may_go_back(ctx, upstream: tuple, saved: tuple) -> bool:
    """Whether these gradients may be computed here.

    Not where they are to be differentiated again, nor where hooks have put something else in the
    place of saved tensors.
    """
    _, cell, (_, _, I, H), *_, state, (x_shape, dtype, device, device_type) = ctx.call
    if is_grad_enabled() or _watched() or is_autocast_enabled(device_type):
        return False
    gates = GATES[cell] * H
    lead, rows = x_shape[:-1], (gates,)
    y = (*lead, H)
    dy, dh_n, dc_n, dc = upstream
    x, h0, c0, w_ih, w_hh, b_ih, b_hh, h, c, kept = saved
    tensors = (dy, dh_n, dc_n, x, h0, c0, w_ih, w_hh, b_ih, b_hh, h, kept)
    shapes = (y, state, state, x_shape, state, state, (gates, I), (gates, H), rows, rows, y)
    if not core.are_plain(tensors, (*shapes, (*lead, gates)), dtype, device):
        return False
    return c is None or core.are_plain((dc, c), (y, y), state_dtype(dtype), device)


def _both_may_go_back(ctx, dy, x, y, upstream, saved) -> bool:
    """The same for both directions."""
    _, cell, (T, B, I, H), *_, (x_shape, dtype, device, device_type) = ctx.call
    if is_grad_enabled() or _watched() or is_autocast_enabled(device_type):
        return False
    state, sequence, own = (B, H), (T, B, H), _shapes_of_direction(cell, B, I, H)
    both, gates = (T, B, 2 * H), (T, B, GATES[cell] * H)
    tensors, cells = [x, dy, y], []
    for (dh_n, dc_n, dc), (*given, c, kept) in zip(upstream, saved, strict=True):
        tensors += (*given, dh_n, dc_n, kept)
        cells += (dc, c)
    shapes = (x_shape, both, both, *(*own, state, state, gates) * 2)
    if not core.are_plain(tensors, shapes, dtype, device):
        return False
    return core.are_plain(cells, (sequence,) * 4, state_dtype(dtype), device)
