"""lstm(), rnn() and their one-step cells: checked arguments, layers and directions over ops.

What torch.nn.LSTM and torch.nn.RNN compute, as functions of input, state and weights, with
truncation as one keyword more. The gate maths and its derivatives live below, in the operators.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import bptt, checks, cuda_direct, cuda_ops, direct, packed, projected, stack
from .bptt import Truncation
from .checks import LayerWeights
from .stack import Layer, State

cuda_ops.register()


def lstm(
    x: Tensor | PackedSequence,
    hx: tuple[Tensor, Tensor] | None,
    weights: Sequence[Tensor],
    *,
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    proj_size: int = 0,
    truncate: Truncation = None,
    memory: str = "normal",
    return_cells: bool = False,
) -> tuple:
    """A stack of LSTM layers (Hochreiter & Schmidhuber 1997) over whole sequences.

    Args:
        x: (T, B, I), (B, T, I) if batch_first, unbatched (T, I), or a PackedSequence.
        hx: (h_0, c_0) of shapes (L * D, B, P or H) and (L * D, B, H), without B if unbatched; None
            for zeros.
        weights: per layer and direction weight_ih (4H, I), weight_hh (4H, P or H), with `bias`
            bias_ih and bias_hh (4H,), with proj_size weight_hr (P, H). Gate order i, f, g, o.
        dropout: probability to zero an output on its way to the next layer, if `training`.
        truncate: k or (k1, k2) to truncate the backward pass (Williams & Peng 1990): losses are
            taken in blocks of k1 steps counted from time 0 and their gradient goes back over the
            block and the k2 - k1 steps before it. k is (k, k): as if the state were detached every
            k steps. The forward pass is the same. None is full BPTT (Werbos 1990).
        memory: "low" keeps h and c of every step for the backward pass, and not the gates, which
            are four times as large as either: they are computed again, which costs a third more
            arithmetic. Gradients are the same. With proj_size, what is projected is kept as well.
        return_cells: also return the cell state of every step.

    Returns:
        (y, (h_n, c_n)), with return_cells (y, (h_n, c_n), cells). y has the shape of x with
        D * (P or H) features; cells, of the last layer, has D * H features.

    float32 and float64 are computed as such; float16 in float32, rounded at the end. bfloat16
    weights and activations are multiplied as they are and added up in float32, and the cell state
    is float32 from the first step to the last. Where proj_size has no kernels (on CUDA, and with
    k2 > k1) bfloat16 is treated as float16 is.
    On CUDA both halves are, and h is rounded every step; float32 is TF32 there where
    torch.backends.cuda.matmul.allow_tf32 says so.
    Under torch.autocast input and state are cast to the weights' dtype, which is the result's.

    Raises ValueError, RuntimeError or TypeError where torch.nn.LSTM does: for shapes, dtypes and
    devices that don't fit, empty sequences, and devices without kernels. ValueError also for an
    unknown memory, and for truncate = (k1, k2) with k2 > k1 in a stack that is bidirectional, where
    no window is defined.
    """
    keep = checks.kept_with(memory)
    if num_layers == 1 and truncate is None and not (bidirectional or proj_size or return_cells):
        short = direct.sequence("lstm", x, hx, weights, bias, batch_first, keep)
        if short is not None:
            y, h_n, c_n, _ = short
            return y, (h_n, c_n)

    directions = 2 if bidirectional else 1
    groups = checks.group_weights("LSTM", weights, 4, num_layers, directions, bias, proj_size)
    y, state, cells = _run(
        "LSTM",
        _projected_layer if proj_size else _lstm_layer,
        x,
        hx if hx is None else checks.check_pair("LSTM", hx),
        groups,
        (groups[0][1].shape[1], groups[0][0].shape[0] // 4),
        directions,
        batch_first,
        dropout if training else 0.0,
        truncate,
        keep,
        return_cells,
    )
    return (y, state, cells) if return_cells else (y, state)


def rnn(
    x: Tensor | PackedSequence,
    hx: Tensor | None,
    weights: Sequence[Tensor],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    bidirectional: bool = False,
    truncate: Truncation = None,
) -> tuple[Tensor | PackedSequence, Tensor]:
    """A stack of simple RNN layers (Elman 1990) over whole sequences.

    hx: h_0 (L * D, B, H), (L * D, H) if unbatched; None for zeros. weights: per layer and direction
    weight_ih (H, I), weight_hh (H, H) and, with `bias`, bias_ih and bias_hh (H,). nonlinearity:
    "tanh" or "relu", anything else is a ValueError. Returns (y, h_n). All else as for `lstm`.
    """
    hx = hx if hx is None else (hx,)
    known = nonlinearity in ("tanh", "relu")
    if known and num_layers == 1 and truncate is None and not bidirectional:
        short = direct.sequence(nonlinearity, x, hx, weights, bias, batch_first)
        if short is not None:
            return short[:2]

    directions = 2 if bidirectional else 1
    groups = checks.group_weights("RNN", weights, 1, num_layers, directions, bias)
    y, state, _ = _run(
        "RNN",
        _rnn_layer(nonlinearity, ValueError),
        x,
        hx,
        groups,
        (groups[0][1].shape[1],),
        directions,
        batch_first,
        dropout if training else 0.0,
        truncate,
        "all",
        False,
    )
    return y, state[0]


def lstm_cell(
    x: Tensor,
    hx: tuple[Tensor, Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM layer: x (B, I) or (I,), hx (h, c) of (B, H) or (H,); gives (h, c).

    Weights, dtypes, devices and errors as for `lstm`; both biases or none.
    """
    short = direct.step("lstm", x, hx, (w_ih, w_hh, b_ih, b_hh))
    if short is not None:
        return short
    hx = hx if hx is None else checks.check_pair("LSTMCell", hx)
    return _step("LSTMCell", _lstm_layer, 4, x, hx, w_ih, w_hh, b_ih, b_hh)


def rnn_cell(
    x: Tensor,
    hx: Tensor | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of a simple RNN layer: x (B, I) or (I,), hx (B, H) or (H,); gives h of hx's shape.

    Weights, dtypes, devices and errors as for `rnn`, but an unknown nonlinearity is a RuntimeError,
    as in torch.nn.RNNCell; both biases or none.
    """
    layer = _rnn_layer(nonlinearity, RuntimeError)
    hx = hx if hx is None else (hx,)
    short = direct.step(nonlinearity, x, hx, (w_ih, w_hh, b_ih, b_hh))
    if short is not None:
        return short[0]
    return _step("RNNCell", layer, 1, x, hx, w_ih, w_hh, b_ih, b_hh)[0]


# Layers as stack.Layer has them, over the rows of packed sequences if batch_sizes are given. how:
# reverse, k1, k2 and keep.


def _lstm_layer(
    x: Tensor, state: State, w: LayerWeights, *how: Any, batch_sizes: Tensor | None = None
) -> tuple[Tensor, State, Tensor]:
    y, h, c, cells = direct.lstm_layer(x, *state, *w, *how, batch_sizes)
    return y, (h, c), cells


def _projected_layer(
    x: Tensor, state: State, w: LayerWeights, *how: Any, batch_sizes: Tensor | None = None
) -> tuple[Tensor, State, Tensor]:
    reverse, k1, k2, keep = how
    if _has_kernels(_projected_layer, x, k1, k2):
        results = direct.projected_layer(x, *state, *w, reverse, k1, keep, batch_sizes)
    else:
        results = projected.lstm_layer(x, *state, *w, reverse, k1, k2)
    y, h, c, cells = results
    return y, (h, c), cells


def _tanh_layer(
    x: Tensor, state: State, w: LayerWeights, *how: Any, batch_sizes: Tensor | None = None
) -> tuple[Tensor, State, None]:
    y, h = direct.rnn_layer(x, *state, *w, "tanh", *how[:3], batch_sizes)
    return y, (h,), None


def _relu_layer(
    x: Tensor, state: State, w: LayerWeights, *how: Any, batch_sizes: Tensor | None = None
) -> tuple[Tensor, State, None]:
    y, h = direct.rnn_layer(x, *state, *w, "relu", *how[:3], batch_sizes)
    return y, (h,), None


# On CUDA the directions of a layer run side by side.
_IN_ONE_LAUNCH = {
    _lstm_layer: cuda_direct.both("lstm"),
    _tanh_layer: cuda_direct.both("tanh"),
    _relu_layer: cuda_direct.both("relu"),
}


def _on_cuda(x: Tensor) -> bool:
    return x.is_cuda


def _has_kernels(layer: Layer, x: Tensor, k1: int, k2: int) -> bool:
    """Whether `layer` is an operator, and not torch's arithmetic."""
    return layer is not _projected_layer or (k1 == k2 and not _on_cuda(x))


def _rnn_layer(nonlinearity: str, error: type[Exception]) -> Layer:
    if nonlinearity == "tanh":
        return _tanh_layer
    if nonlinearity == "relu":
        return _relu_layer
    raise error(f"nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")


def _run(
    kind: str,
    layer: Layer,
    x: Tensor | PackedSequence,
    hx: Sequence[Tensor] | None,
    groups: list[LayerWeights],
    sizes: tuple[int, ...],
    directions: int,
    batch_first: bool,
    dropout: float,
    truncate: Truncation,
    keep: str,
    return_cells: bool,
) -> tuple[Tensor | PackedSequence, State, Tensor | PackedSequence | None]:
    """Check input and states, bring them to (T, B, I) and (B, size), run, and bring all back.

    sizes: the features of each tensor of a state. keep: what is kept for a gradient, if one may be
    asked for.
    """
    weight = groups[0][0]
    sequence = x if isinstance(x, PackedSequence) else None
    batched = True
    if sequence is not None:
        x = checks.check_input(kind, sequence.data, weight, (2,))
        T, B = len(sequence.batch_sizes), max(sequence.batch_sizes.tolist(), default=0)
    else:
        x = checks.check_input(kind, x, weight, (2, 3))
        if x.dim() == 2:
            batched = False
            x = x.unsqueeze(1)
        elif batch_first:
            x = x.transpose(0, 1)
        T, B = x.shape[:2]
    if T == 0:
        raise RuntimeError(f"{kind}: input has 0 time steps, expected at least 1")

    if hx is not None:
        states = _given_states(kind, hx, sequence, len(groups), B, batched, sizes, weight)
    grad = _needs_grad(x, () if hx is None else hx, groups)
    k1, k2 = _truncation(kind, truncate, T, directions, len(groups), grad)
    way = None if sequence is None else _way_of_packed(layer, x, directions, len(groups), k1, k2)

    # Where the layer is one operator, CUDA's kernels keep their sums in float32 themselves, and
    # need no zeros to begin with.
    by_kernels = _on_cuda(x) and _has_kernels(layer, x, k1, k2) and way in (None, "padding")
    if hx is None:
        zeros = (None if by_kernels else x.new_zeros(B, size) for size in sizes)
        states = [tuple(zeros)] * len(groups)

    dtype = x.dtype
    if not by_kernels or k1 != k2:
        x, states, groups = _as_computed(layer, x, states, groups, k1, k2)

    if not grad:
        keep = "cells" if return_cells else "nothing"
    args = (groups, directions, dropout, k1, k2, keep)
    if sequence is None:
        both = _IN_ONE_LAUNCH.get(layer) if _on_cuda(x) and directions == 2 else None
        y, finals, cells = _run_layers(layer, x, states, *args, both)
    elif way == "lengths":
        y, finals, cells = packed.by_length(
            lambda x, states: _run_layers(layer, x, states, *args),
            x,
            sequence.batch_sizes,
            states,
        )
    else:
        y, finals, cells = _run_layers(_PACKED[way](layer, sequence.batch_sizes), x, states, *args)

    if len(finals) == 1:
        state = tuple(s.unsqueeze(0) for s in finals[0])
    else:
        state = tuple(torch.stack(s) for s in zip(*finals, strict=True))
    y, state = y.to(dtype), tuple(s.to(dtype) for s in state)
    cells = torch.cat(cells, -1).to(dtype) if return_cells else None

    def shaped_like_input(steps: Tensor) -> Tensor | PackedSequence:
        if sequence is not None:
            return PackedSequence(
                steps, sequence.batch_sizes, sequence.sorted_indices, sequence.unsorted_indices
            )
        if not batched:
            return steps.squeeze(1)
        return steps.transpose(0, 1) if batch_first else steps

    if not batched:
        state = tuple(s.squeeze(1) for s in state)
    elif sequence is not None and sequence.unsorted_indices is not None:
        state = tuple(s.index_select(1, sequence.unsorted_indices) for s in state)
    return shaped_like_input(y), state, cells if cells is None else shaped_like_input(cells)


_PACKED = {
    "rows": lambda layer, batch_sizes: partial(layer, batch_sizes=batch_sizes),
    "padding": packed.over_padding,
    "segments": packed.over_segments,
}


def _way_of_packed(layer: Layer, x: Tensor, directions: int, rows: int, k1: int, k2: int) -> str:
    """How packed sequences run: a key of _PACKED, or "lengths" where layers can't one by one."""
    one_layer = rows == directions
    if k1 != k2 and not one_layer:
        return "lengths"
    if _has_kernels(layer, x, k1, k2):
        if not _on_cuda(x):
            return "rows"
        bounded, forward = layer is not _relu_layer, directions == 1
        # A graph would keep the addresses of places that are gone when it runs.
        capturing = x.is_cuda and torch.cuda.is_current_stream_capturing()
        if bounded and (forward or not k1) and not capturing:
            return "padding"
    return "segments" if k1 == k2 else "lengths"


def _given_states(
    kind: str,
    hx: Sequence[Tensor],
    sequence: PackedSequence | None,
    rows: int,
    B: int,
    batched: bool,
    sizes: tuple[int, ...],
    weight: Tensor,
) -> list[State]:
    """The state of each of the `rows` layers and directions, in the order of the packed rows."""
    lead = (rows, B) if batched else (rows,)
    hx = checks.check_states(kind, hx, [(*lead, size) for size in sizes], weight)
    if not batched:
        hx = [s.unsqueeze(1) for s in hx]
    elif sequence is not None and sequence.sorted_indices is not None:
        hx = [s.index_select(1, sequence.sorted_indices) for s in hx]
    return list(zip(*(s.unbind(0) for s in hx), strict=True))


def _truncation(
    kind: str, truncate: Truncation, T: int, directions: int, rows: int, grad: bool
) -> tuple[int, int]:
    """(k1, k2) of what is to be cut in T steps; (0, 0) if nothing is."""
    if truncate is None:
        return 0, 0
    k1, k2 = bptt.parse_truncate(truncate)
    if k2 > k1 and directions == 2 and rows > 2:
        raise ValueError(
            f"{kind}: truncate with k2 > k1 has no meaning for a bidirectional stack "
            f"of {rows // 2} layers, got k1={k1}, k2={k2}"
        )
    return bptt.parse_truncate(truncate, T) if grad else (0, 0)


def _run_layers(
    layer: Layer,
    x: Tensor,
    states: list[State],
    groups: list[LayerWeights],
    directions: int,
    dropout: float,
    k1: int,
    k2: int,
    keep: str,
    both: stack.BothDirections | None = None,
) -> tuple[Tensor, list[State], list[Tensor | None]]:
    """The whole stack on (T, B, I) or packed data; gives what stack.run gives."""
    if k2 > k1 and len(groups) > directions:
        k1, k2 = bptt.parse_truncate((k1, k2), len(x))  # by length, some may be too short to cut
        if k1:
            return stack.run_windows(layer, x, states, groups, dropout, k1, k2, keep)
    between = (lambda _, y: F.dropout(y, dropout, True)) if dropout else None
    return stack.run(layer, x, states, groups, directions, between, k1, k2, keep, both)


def _step(
    kind: str,
    layer: Layer,
    gates: int,
    x: Tensor,
    hx: Sequence[Tensor] | None,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
) -> State:
    """One step of one cell on (B, I) or (I,), as a sequence of length 1; gives the new state."""
    bias = b_ih is not None or b_hh is not None
    weights = (w_ih, w_hh, b_ih, b_hh) if bias else (w_ih, w_hh)
    group = checks.group_weights(kind, weights, gates, 1, 1, bias)[0]
    x = checks.check_input(kind, x, w_ih, (1, 2))
    hidden = w_hh.shape[1]
    states = 1 if gates == 1 else 2
    lead = x.shape[:-1]
    if hx is None:
        state = (x.new_zeros(*lead, hidden),) * states
    else:
        state = checks.check_states(kind, hx, [(*lead, hidden)] * states, w_ih, (1, 2))
    keep = "all" if _needs_grad(x, state, [group]) else "nothing"
    dtype = x.dtype
    if not _on_cuda(x):
        x, (state,), (group,) = _as_computed(layer, x, [state], [group])
    if not lead:
        x, state = x.unsqueeze(0), [s.unsqueeze(0) for s in state]
    final = layer(x.unsqueeze(0), state, group, False, 0, 0, keep)[1]
    if not lead:
        final = tuple(s.squeeze(0) for s in final)
    return tuple(s.to(dtype) for s in final)


def _needs_grad(x: Tensor, states: Sequence[Tensor], groups: list[LayerWeights]) -> bool:
    return torch.is_grad_enabled() and (
        x.requires_grad
        or any(w is not None and w.requires_grad for group in groups for w in group)
        or any(s.requires_grad for s in states)
    )


def _as_computed(
    layer: Layer,
    x: Tensor,
    states: list[State],
    groups: list[LayerWeights],
    k1: int = 0,
    k2: int = 0,
) -> tuple[Tensor, list[State], list[LayerWeights]]:
    """Input, states and weights in the dtypes `layer` computes with.

    On the CPU that is bfloat16 with cell states in float32. float32 stands in for float16, and for
    bfloat16 where torch computes a projected layer, and would round at every operation.
    """
    if x.dtype == torch.bfloat16 and not _on_cuda(x) and _has_kernels(layer, x, k1, k2):
        return x, [(h, *_float(cell)) for h, *cell in states], groups
    if x.dtype in checks.HALF_DTYPES:
        return x.float(), [_float(s) for s in states], [_float(group) for group in groups]
    return x, states, groups


def _float(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return tuple(t if t is None else t.float() for t in tensors)
