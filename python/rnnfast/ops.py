"""The operators: one layer in one direction, forward and backward, registered with torch.

Each operator has a schema, a fake kernel (shapes only, for ``torch.compile`` and meta tensors), a
CPU kernel that checks the sizes and hands on to `cpu`, and an autograd formula that is again an
operator. Layouts are those of ``csrc/rnnfast.h``; nothing here stacks layers. With bfloat16 on the
CPU what belongs to the cell (c0, c_n, c, gates and their gradients) is float32. Eager calls on
plain CPU tensors, which need none of this, take the short way of `direct`.

keep, one of `KEEP`, says what an LSTM keeps of every step: "all" for a gradient, "cells" for one
that computes the gates again (it is given none, but the biases), "nothing" for none. What is not
kept comes out without elements.

batch_sizes, if given, says that sequences are packed: x is (N, I), the rows of all steps without
padding, and so for everything else that has steps. An int64 tensor (T,) on the CPU, as that of a
PackedSequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import cpu
from ._native import accumulator, precision
from .cpu import KEEP

__all__ = ["lstm_layer", "rnn_layer"]

_LSTM = (
    "(Tensor x, Tensor h0, Tensor c0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh,"
    " bool reverse, int k1, int k2, str keep, Tensor? batch_sizes=None)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor c, Tensor gates)"
)
_LSTM_BACKWARD = (
    "(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor? dc, Tensor x, Tensor h0, Tensor c0,"
    " Tensor w_ih, Tensor w_hh, Tensor y, Tensor c, Tensor? gates, bool reverse, int k1, int k2,"
    " bool want_x, bool want_w_ih, bool want_w_hh, bool want_b,"
    " Tensor? b_ih=None, Tensor? b_hh=None, Tensor? batch_sizes=None)"
    " -> (Tensor dx, Tensor dh0, Tensor dc0, Tensor dw_ih, Tensor dw_hh, Tensor db)"
)
_RNN = (
    "(Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, str nonlinearity,"
    " bool reverse, int k1, int k2, Tensor? batch_sizes=None) -> (Tensor y, Tensor h_n)"
)
_RNN_BACKWARD = (
    "(Tensor? dy, Tensor? dh_n, Tensor x, Tensor h0, Tensor w_ih, Tensor w_hh, Tensor y,"
    " str nonlinearity, bool reverse, int k1, int k2,"
    " bool want_x, bool want_w_ih, bool want_w_hh, bool want_b, Tensor? batch_sizes=None)"
    " -> (Tensor dx, Tensor dh0, Tensor dw_ih, Tensor dw_hh, Tensor db)"
)


_OF_THE_CELL = frozenset({"c0", "c", "gates", "dc", "dc_n"})


def _expect(
    name: str,
    tensor: Tensor | None,
    shape: tuple[int, ...],
    like: Tensor,
    cell_dtype: torch.dtype | None = None,
) -> None:
    """The kernels trust sizes, so an operator called directly with wrong ones must stop here.

    cell_dtype: of what belongs to the cell, where that is not x's.
    """
    if tensor is None:
        return
    if tensor.shape != shape:
        raise RuntimeError(f"{name} has shape {tuple(tensor.shape)}, but should have {shape}")
    expected = cell_dtype if cell_dtype and name in _OF_THE_CELL else like.dtype
    if tensor.dtype != expected:
        should = "they should be equal" if expected == like.dtype else f"it should be {expected}"
        raise RuntimeError(f"{name} is {tensor.dtype}, but x is {like.dtype}: {should}")
    if tensor.device != like.device:
        raise RuntimeError(f"{name} is on device {tensor.device}, but x is on {like.device}")


def _sizes(
    x: Tensor, h0: Tensor, w_hh: Tensor, batch_sizes: Tensor | None
) -> tuple[int, int, int, int]:
    """T, B, I, H."""
    axes, layout = (3, "(T, B, I)") if batch_sizes is None else (2, "(N, I)")
    if x.dim() != axes:
        raise RuntimeError(f"x has {x.dim()} dimensions, but should have {axes}: {layout}")
    if w_hh.dim() != 2:
        raise RuntimeError(f"w_hh has shape {tuple(w_hh.shape)}, but should have (G * H, H)")
    if batch_sizes is None:
        return *x.shape, w_hh.shape[-1]
    if batch_sizes.dim() != 1:
        raise RuntimeError(f"batch_sizes has {batch_sizes.dim()} dimensions, but should have 1")
    if h0.dim() != 2:
        raise RuntimeError(f"h0 has shape {tuple(h0.shape)}, but should have (B, H)")
    return len(batch_sizes), len(h0), x.shape[1], w_hh.shape[-1]


def _known(batch_sizes: Tensor | None, x: Tensor, B: int) -> Tensor | None:
    """batch_sizes as the kernels read them, which trust that they are of so many rows."""
    if batch_sizes is None:
        return None
    if batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise RuntimeError(
            f"batch_sizes is {batch_sizes.dtype} on {batch_sizes.device}, but should be "
            "torch.int64 on cpu"
        )
    rows = batch_sizes.tolist()
    if (
        rows[:1] != [B][: len(rows)]
        or rows != sorted(rows, reverse=True)
        or min(rows, default=1) < 1
    ):
        raise RuntimeError(
            f"batch_sizes is {rows}, but should begin with {B}, never grow and never be below 1"
        )
    if sum(rows) != len(x):
        raise RuntimeError(f"x has {len(x)} rows, but batch_sizes has {sum(rows)}")
    return batch_sizes.contiguous()


def _check(
    gates, x, w_ih, w_hh, b_ih, b_hh, states, cell_dtype=None, batch_sizes=None
) -> tuple[int, int, int, int]:
    T, B, I, H = _sizes(x, states["h0"], w_hh, batch_sizes)
    _expect("w_ih", w_ih, (gates * H, I), x)
    _expect("w_hh", w_hh, (gates * H, H), x)
    _expect("b_ih", b_ih, (gates * H,), x)
    _expect("b_hh", b_hh, (gates * H,), x)
    for name, state in states.items():
        _expect(name, state, (B, H), x, cell_dtype)
    return T, B, I, H


def window(T: int, k1: int, k2: int) -> tuple[int, int]:
    """Clips (k1, k2) to T steps without changing what they mean; (0, 0) is full BPTT."""
    if k1 == 0 and k2 == 0:
        return T, T
    if not 1 <= k1 <= k2:
        raise RuntimeError(
            f"k1 is {k1} and k2 is {k2}, but 1 <= k1 <= k2 should hold (or both be 0)"
        )
    if k1 >= T:
        return T, T
    return k1, min(k2, -(-T // k1) * k1)


def _check_nonlinearity(name: str) -> None:
    if name not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity is {name!r}, but should be 'tanh' or 'relu'")


def _kept_shapes(keep: str, *sequence: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of c and gates, where y is of this shape: (0,) for what is not kept."""
    if keep not in KEEP:
        raise ValueError(f"keep is {keep!r}, but should be {', '.join(map(repr, KEEP))}")
    *steps, H = sequence
    return (0,) if keep == "nothing" else sequence, (*steps, 4, H) if keep == "all" else (0,)


# Forward


def _lstm_layer_cpu(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, k1, k2, keep, batch_sizes=None):
    states = {"h0": h0, "c0": c0}
    sizes = _check(4, x, w_ih, w_hh, b_ih, b_hh, states, accumulator(x.dtype), batch_sizes)
    T, B, _, H = sizes
    window(T, k1, k2)
    precision(x.dtype)
    sequence = (*x.shape[:-1], H)
    kept_shapes = _kept_shapes(keep, *sequence)
    batch_sizes = _known(batch_sizes, x, B)
    if T == 0:
        y = x.new_empty(sequence)
        return y, h0.clone(), c0.clone(), *(c0.new_empty(shape) for shape in kept_shapes)
    y, h_n, c_n, *kept = cpu.forward(
        *("lstm", sizes, reverse, keep, x, h0, c0, w_ih, w_hh, b_ih, b_hh), batch_sizes=batch_sizes
    )
    return y, h_n, c_n, *(c0.new_empty(0) if k is None else k for k in kept)


def _rnn_layer_cpu(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, reverse, k1, k2, batch_sizes=None):
    sizes = _check(1, x, w_ih, w_hh, b_ih, b_hh, {"h0": h0}, batch_sizes=batch_sizes)
    T, B, _, H = sizes
    window(T, k1, k2)
    precision(x.dtype)
    _check_nonlinearity(nonlinearity)
    batch_sizes = _known(batch_sizes, x, B)
    if T == 0:
        return x.new_empty(*x.shape[:-1], H), h0.clone()
    return cpu.forward(
        *(nonlinearity, sizes, reverse, "nothing", x, h0, None, w_ih, w_hh, b_ih, b_hh),
        batch_sizes=batch_sizes,
    )[:2]


# Backward


def _gradients(x, h0, w_ih, w_hh, want_x, want_w_ih, want_w_hh, want_b):
    """dx, dw_ih, dw_hh, db: uninitialised where wanted, else without elements."""
    return (
        x.new_empty(x.shape if want_x else (0,)),
        x.new_empty(w_ih.shape if want_w_ih else (0,)),
        x.new_empty(w_hh.shape if want_w_hh else (0,)),
        x.new_empty(w_hh.shape[:1] if want_b else (0,)),
    )


def _wants_and_biases(
    want_x: bool,
    want_w_ih: bool,
    want_w_hh: bool,
    want_b: bool,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    batch_sizes: Tensor | None = None,
) -> tuple[tuple[bool, ...], tuple[Tensor | None, Tensor | None], Tensor | None]:
    """The end of lstm_layer_backward's schema: what is wanted, biases if gates are None, and
    batch_sizes."""
    return (want_x, want_w_ih, want_w_hh, want_b), (b_ih, b_hh), batch_sizes


def _wants_and_batch_sizes(
    want_x: bool,
    want_w_ih: bool,
    want_w_hh: bool,
    want_b: bool,
    batch_sizes: Tensor | None = None,
) -> tuple[tuple[bool, ...], Tensor | None]:
    """The same of rnn_layer_backward."""
    return (want_x, want_w_ih, want_w_hh, want_b), batch_sizes


def _lstm_layer_backward_cpu(
    dy, dh_n, dc_n, dc, x, h0, c0, w_ih, w_hh, y, c, gates, reverse, k1, k2, *rest
):
    wants, biases, batch_sizes = _wants_and_biases(*rest)
    states = {"h0": h0, "c0": c0, "dh_n": dh_n, "dc_n": dc_n}
    cell_dtype = accumulator(x.dtype)
    sizes = _check(4, x, w_ih, w_hh, *biases, states, cell_dtype, batch_sizes)
    T, B, _, H = sizes
    steps = x.shape[:-1]
    for name, tensor in {"dy": dy, "dc": dc, "y": y, "c": c}.items():
        _expect(name, tensor, (*steps, H), x, cell_dtype)
    _expect("gates", gates, (*steps, 4, H), x, cell_dtype)
    precision(x.dtype)
    batch_sizes = _known(batch_sizes, x, B)
    if T == 0:
        dx, dw_ih, dw_hh, db = _gradients(x, h0, w_ih, w_hh, *wants)
        dh0 = torch.zeros_like(h0) if dh_n is None else dh_n.clone()
        dc0 = torch.zeros_like(c0) if dc_n is None else dc_n.clone()
        return dx, dh0, dc0, dw_ih.zero_(), dw_hh.zero_(), db.zero_()
    return _cpu_gradients(
        *("lstm", sizes, reverse, *window(T, k1, k2), (dy, dh_n, dc_n, dc)),
        *((x, h0, c0, w_ih, w_hh, *biases, y, c, gates), wants, batch_sizes),
    )


def _rnn_layer_backward_cpu(dy, dh_n, x, h0, w_ih, w_hh, y, nonlinearity, reverse, k1, k2, *rest):
    wants, batch_sizes = _wants_and_batch_sizes(*rest)
    states = {"h0": h0, "dh_n": dh_n}
    sizes = _check(1, x, w_ih, w_hh, None, None, states, batch_sizes=batch_sizes)
    T, B, _, H = sizes
    for name, tensor in {"dy": dy, "y": y}.items():
        _expect(name, tensor, (*x.shape[:-1], H), x)
    precision(x.dtype)
    _check_nonlinearity(nonlinearity)
    batch_sizes = _known(batch_sizes, x, B)
    if T == 0:
        dx, dw_ih, dw_hh, db = _gradients(x, h0, w_ih, w_hh, *wants)
        dh0 = torch.zeros_like(h0) if dh_n is None else dh_n.clone()
        return dx, dh0, dw_ih.zero_(), dw_hh.zero_(), db.zero_()
    dx, dh0, _, dw_ih, dw_hh, db = _cpu_gradients(
        *(nonlinearity, sizes, reverse, *window(T, k1, k2), (dy, dh_n, None, None)),
        *((x, h0, None, w_ih, w_hh, None, None, y, None, None), wants, batch_sizes),
    )
    return dx, dh0, dw_ih, dw_hh, db


def _cpu_gradients(cell, sizes, reverse, k1, k2, upstream, saved, wants, batch_sizes):
    """As cpu.backward, in the terms of the schemas: an operator gives no None but empty tensors."""
    want_x, *want_rest = wants
    want_all = (want_x, True, cell == "lstm", *want_rest)
    gradients = cpu.backward(cell, sizes, reverse, k1, k2, upstream, saved, want_all, batch_sizes)
    return tuple(saved[0].new_empty(0) if d is None else d for d in gradients)


# Shapes alone


def _lstm_layer_fake(x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, k1, k2, keep, batch_sizes=None):
    # The CPU's kernels take a wider c0 than CUDA's do; which these are nothing here tells.
    wide = accumulator(x.dtype)
    states = {"h0": h0, "c0": c0}
    cell_dtype = wide if c0.dtype == wide else None
    _, B, _, H = _check(4, x, w_ih, w_hh, b_ih, b_hh, states, cell_dtype, batch_sizes)
    sequence = (*x.shape[:-1], H)
    c, gates = _kept_shapes(keep, *sequence)
    half = x.dtype in (torch.float16, torch.bfloat16)  # cell states are kept in float32 then
    return (
        x.new_empty(sequence),
        x.new_empty(B, H),
        c0.new_empty(B, H),
        x.new_empty(c, dtype=torch.float32 if half else x.dtype),
        c0.new_empty(gates),
    )


def _rnn_layer_fake(x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, reverse, k1, k2, batch_sizes=None):
    _, B, _, H = _check(1, x, w_ih, w_hh, b_ih, b_hh, {"h0": h0}, batch_sizes=batch_sizes)
    return x.new_empty(*x.shape[:-1], H), x.new_empty(B, H)


def _lstm_layer_backward_fake(
    dy, dh_n, dc_n, dc, x, h0, c0, w_ih, w_hh, y, c, gates, reverse, k1, k2, *rest
):
    wants, *_ = _wants_and_biases(*rest)
    dx, dw_ih, dw_hh, db = _gradients(x, h0, w_ih, w_hh, *wants)
    return dx, x.new_empty(h0.shape), c0.new_empty(c0.shape), dw_ih, dw_hh, db


def _rnn_layer_backward_fake(dy, dh_n, x, h0, w_ih, w_hh, y, nonlinearity, reverse, k1, k2, *rest):
    wants, _ = _wants_and_batch_sizes(*rest)
    dx, dw_ih, dw_hh, db = _gradients(x, h0, w_ih, w_hh, *wants)
    return dx, x.new_empty(h0.shape), dw_ih, dw_hh, db


# By the operators


def backward(cell, sizes, reverse, k1, k2, upstream, saved, wants, batch_sizes=None):
    """As cpu.backward, by the operators, which autograd sees: for what the short ways don't take.

    h0 and c0 among the saved tensors may be None for zeros, if no gradient is wanted of them.
    """
    T, B, I, H = sizes

    def shaped(tensor: Tensor | None, *shape: int) -> Tensor | None:
        return tensor if tensor is None else tensor.reshape(shape)

    dy, dh_n, dc_n, dc = upstream
    x, h0, c0, w_ih, w_hh, *biases, y, c, gates = saved
    if h0 is None:
        h0 = x.new_zeros(B, H)
        c0 = h0 if cell == "lstm" else None
    steps = (T, B) if batch_sizes is None else (len(x),)
    dy, dc, y, c = (shaped(sequence, *steps, H) for sequence in (dy, dc, y, c))
    states = dh_n, dc_n, h0, c0
    dh_n, dc_n, h0_rows, c0_rows = (shaped(state, B, H) for state in states)
    rest = (reverse, k1, k2, wants[0], *wants[3:])
    if cell == "lstm":
        gates = shaped(gates, *steps, 4, H)
        dx, dh0, dc0, *dweights = torch.ops.rnnfast.lstm_layer_backward(
            *(dy, dh_n, dc_n, dc, x.reshape(*steps, I), h0_rows, c0_rows, w_ih, w_hh, y, c, gates),
            *(*rest, *biases, batch_sizes),
        )
        dc0 = dc0.reshape(c0.shape)
    else:
        dc0 = None
        dx, dh0, *dweights = torch.ops.rnnfast.rnn_layer_backward(
            *(dy, dh_n, x.reshape(*steps, I), h0_rows, w_ih, w_hh, y, cell), *rest, batch_sizes
        )
    gradients = (dx.reshape(x.shape) if wants[0] else None, dh0.reshape(h0.shape), dc0, *dweights)
    return tuple(d if want else None for d, want in zip(gradients, wants, strict=True))


# Autograd


def _lstm_setup(ctx, inputs, output):
    x, h0, c0, w_ih, w_hh, *biases, ctx.reverse, ctx.k1, ctx.k2, ctx.keep, batch_sizes = inputs
    y, _, _, c, gates = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gates)
    instead_of_gates = (None, *biases) if ctx.keep == "cells" else (gates, None, None)
    ctx.save_for_backward(x, h0, c0, w_ih, w_hh, y, c, *instead_of_gates, batch_sizes)


def _lstm_autograd(ctx, dy, dh_n, dc_n, dc, _):
    if ctx.keep == "nothing":
        raise RuntimeError(
            "lstm_layer was called with keep='nothing', so it cannot be differentiated"
        )
    needs = ctx.needs_input_grad
    want_b = needs[5] or needs[6]
    x, h0, c0, w_ih, w_hh, y, c, gates, *biases_and_batch_sizes = ctx.saved_tensors
    dx, dh0, dc0, dw_ih, dw_hh, db = torch.ops.rnnfast.lstm_layer_backward(
        *(dy, dh_n, dc_n, dc, x, h0, c0, w_ih, w_hh, y, c, gates),
        *(ctx.reverse, ctx.k1, ctx.k2, needs[0], needs[3], needs[4], want_b),
        *biases_and_batch_sizes,
    )
    grads = (dx, dh0, dc0, dw_ih, dw_hh, db, db)
    return *_wanted(grads, needs), *(None,) * (len(needs) - len(grads))


def _rnn_setup(ctx, inputs, output):
    x, h0, w_ih, w_hh, _, _, ctx.nonlinearity, ctx.reverse, ctx.k1, ctx.k2, batch_sizes = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, h0, w_ih, w_hh, output[0], batch_sizes)


def _rnn_autograd(ctx, dy, dh_n):
    needs = ctx.needs_input_grad
    want_b = needs[4] or needs[5]
    *saved, batch_sizes = ctx.saved_tensors
    dx, dh0, dw_ih, dw_hh, db = torch.ops.rnnfast.rnn_layer_backward(
        *(dy, dh_n, *saved, ctx.nonlinearity, ctx.reverse, ctx.k1, ctx.k2),
        *(needs[0], needs[2], needs[3], want_b, batch_sizes),
    )
    grads = (dx, dh0, dw_ih, dw_hh, db, db)
    return *_wanted(grads, needs), *(None,) * (len(needs) - len(grads))


def _no_second_setup(ctx, inputs, output):
    pass


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "rnnfast's layers cannot be differentiated twice; for second derivatives use torch.nn's: "
        "rnnfast.revert(module)"
    )


def _wanted(grads, needs):
    return (grad if need else None for grad, need in zip(grads, needs, strict=False))


def _without_forward_mode(name: str):
    """The operator, refusing tangents: there is no formula, and torch would drop them silently."""
    operator = getattr(torch.ops.rnnfast, name).default

    def call(*args):
        if forward_ad._current_level >= 0 and any(
            isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None
            for arg in args
        ):
            raise NotImplementedError(
                f"rnnfast's {name} has no forward-mode derivative; use torch.nn's layers for it: "
                "rnnfast.revert(module)"
            )
        return operator(*args)

    return call


def _register(name: str, schema: str, cpu, fake) -> None:
    torch.library.define(f"rnnfast::{name}", schema)
    torch.library.impl(f"rnnfast::{name}", "CPU")(cpu)
    torch.library.register_fake(f"rnnfast::{name}")(fake)


_register("lstm_layer", _LSTM, _lstm_layer_cpu, _lstm_layer_fake)
_register("rnn_layer", _RNN, _rnn_layer_cpu, _rnn_layer_fake)
_register(
    "lstm_layer_backward", _LSTM_BACKWARD, _lstm_layer_backward_cpu, _lstm_layer_backward_fake
)
_register("rnn_layer_backward", _RNN_BACKWARD, _rnn_layer_backward_cpu, _rnn_layer_backward_fake)
torch.library.register_autograd("rnnfast::lstm_layer", _lstm_autograd, setup_context=_lstm_setup)
torch.library.register_autograd("rnnfast::rnn_layer", _rnn_autograd, setup_context=_rnn_setup)
for _backward in ("rnnfast::lstm_layer_backward", "rnnfast::rnn_layer_backward"):
    torch.library.register_autograd(
        _backward, _no_second_derivative, setup_context=_no_second_setup
    )

lstm_layer = _without_forward_mode("lstm_layer")
rnn_layer = _without_forward_mode("rnn_layer")
