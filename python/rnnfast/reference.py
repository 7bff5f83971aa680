"""The textbook: LSTM and RNN, forward, backward and truncated backward, in plain NumPy.

This file is the oracle every kernel is tested against and the page to read first. It favours
the shortest path from formula to code: one step is one function, time is a Python loop, nothing
is fused or recomputed. It imports NumPy and the standard library only.

Words. T steps, B batch rows, I inputs, H hidden units, P projected units (P = H without a
projection), L layers, D directions, G gates a cell (LSTM 4: i, f, g, o; RNN 1). `d` before a
name is the gradient of the loss with respect to it: da, dh, dc. The *state* of a cell is what
it hands to its next step, kept as a tuple whose first entry is h: (h,) for the RNN, (h, c) for
the LSTM. So one loop serves every cell. All arrays are time-major; dtype follows the inputs.

Reading order: a step and its backward step (`lstm_step`, `rnn_step`); a layer, which is a loop
over steps (`layer_forward`); how far gradient may travel (`Window`) and the loop back
(`window_backward`); stacks of layers; last the public `lstm` and `rnn` and their backwards.

Sources: Elman 1990 (Finding structure in time), the simple RNN. Hochreiter & Schmidhuber 1997
(Long short-term memory), the cell state. Gers, Schmidhuber & Cummins 2000 (Learning to forget),
the forget gate. Sak, Senior & Beaufays 2014, the projection W_hr. Schuster & Paliwal 1997, two
directions. Werbos 1990 (Backpropagation through time: what it does and how to do it).
Williams & Peng 1990 (An efficient gradient-based algorithm for on-line training of recurrent
network trajectories), truncation with k1 and k2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from operator import index
from typing import NamedTuple

import numpy as np

State = tuple[np.ndarray, ...]
Truncation = None | int | tuple[int, int]

# ---- A step ----


class Weights(NamedTuple):
    """The weights of one layer and direction: w_ih (G*H, I), w_hh (G*H, P), biases (G*H,).

    w_hr (P, H) only for an LSTM with a projection. The same record holds their gradients.
    """

    w_ih: np.ndarray
    w_hh: np.ndarray
    b_ih: np.ndarray | None = None
    b_hh: np.ndarray | None = None
    w_hr: np.ndarray | None = None


def sigmoid(a: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-a)), written so that exp never overflows and small values keep their digits."""
    e = np.exp(-np.abs(a))
    return np.where(a >= 0, 1, e) / (1 + e)


def preactivation(x: np.ndarray, h_prev: np.ndarray, w: Weights) -> np.ndarray:
    """a = x W_ih^T + b_ih + h[t-1] W_hh^T + b_hh for x (B, I), h_prev (B, P); gives (B, G*H)."""
    a = x @ w.w_ih.T + h_prev @ w.w_hh.T
    return a if w.b_ih is None else a + w.b_ih + w.b_hh


class LSTMStep(NamedTuple):
    """What an LSTM step saves for its backward step; each (B, H)."""

    i: np.ndarray
    f: np.ndarray
    g: np.ndarray
    o: np.ndarray
    c: np.ndarray
    c_prev: np.ndarray


def lstm_step(x: np.ndarray, state: State, w: Weights) -> tuple[State, LSTMStep]:
    """One LSTM step (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000).

    x (B, I), state (h (B, P), c (B, H)). Returns the next state and what backward needs.

        i, f, o = sigmoid(a_i, a_f, a_o);  g = tanh(a_g)
        c[t] = f * c[t-1] + i * g;  h[t] = o * tanh(c[t]),  then  @ W_hr^T  with a projection
    """
    h_prev, c_prev = state
    a_i, a_f, a_g, a_o = np.split(preactivation(x, h_prev, w), 4, axis=-1)
    i, f, g, o = sigmoid(a_i), sigmoid(a_f), np.tanh(a_g), sigmoid(a_o)
    c = f * c_prev + i * g
    h = o * np.tanh(c)
    if w.w_hr is not None:
        h = h @ w.w_hr.T
    return (h, c), LSTMStep(i, f, g, o, c, c_prev)


def lstm_step_backward(dstate: State, step: LSTMStep, w: Weights) -> tuple[np.ndarray, State]:
    """The gradient of `lstm_step`: from (dh, dc) of step t to da (B, 4H) and (dh, dc) of t-1.

    dh and dc are complete: everything that uses h[t] or c[t] outside this step is summed in them.
    """
    dh, dc = dstate
    i, f, g, o, c, c_prev = step
    if w.w_hr is not None:
        dh = dh @ w.w_hr
    tanh_c = np.tanh(c)
    do = dh * tanh_c
    dc = dc + dh * o * (1 - tanh_c**2)
    di, df, dg = dc * g, dc * c_prev, dc * i
    da = np.concatenate([di * i * (1 - i), df * f * (1 - f), dg * (1 - g**2), do * o * (1 - o)], -1)
    return da, (da @ w.w_hh, dc * f)


def rnn_step(
    x: np.ndarray, state: State, w: Weights, nonlinearity: str = "tanh"
) -> tuple[State, np.ndarray]:
    """One simple-RNN step (Elman 1990): h[t] = phi(a), phi = tanh or relu.

    x (B, I), state (h (B, H),). Returns the next state and h[t], which is all backward needs.
    """
    a = preactivation(x, state[0], w)
    h = np.tanh(a) if nonlinearity == "tanh" else np.maximum(a, 0)
    return (h,), h


def rnn_step_backward(
    dstate: State, h: np.ndarray, w: Weights, nonlinearity: str = "tanh"
) -> tuple[np.ndarray, State]:
    """The gradient of `rnn_step`: from (dh,) of step t to da (B, H) and (dh,) of step t-1."""
    (dh,) = dstate
    da = dh * (1 - h**2) if nonlinearity == "tanh" else np.where(h <= 0, 0, dh)
    return da, (da @ w.w_hh,)


class Cell(NamedTuple):
    """A cell is its gates, its step and its backward step; the loops know nothing else of it."""

    gates: int
    step: Callable
    step_backward: Callable


LSTM_CELL = Cell(4, lstm_step, lstm_step_backward)
RNN_CELLS = {
    phi: Cell(1, partial(rnn_step, nonlinearity=phi), partial(rnn_step_backward, nonlinearity=phi))
    for phi in ("tanh", "relu")
}

# ---- A layer ----


class LayerRecord(NamedTuple):
    """What one layer and direction saves for backward: its input, and a record of every step."""

    x: np.ndarray  # (T, B, I)
    h_prev: np.ndarray  # (T, B, P): the hidden state that entered step t
    steps: list  # T entries, what cell.step saved
    weights: Weights
    reverse: bool


def layer_forward(
    cell: Cell, x: np.ndarray, state0: State, w: Weights, reverse: bool = False
) -> tuple[State, State, LayerRecord]:
    """Run one layer over x (T, B, I) from state0, each entry (B, .).

    Returns the state of every step, each entry (T, B, .) in time order, so the first entry is the
    output y; the final state; and the record for backward. `reverse` runs t = T-1 .. 0.
    """
    T = len(x)
    state = state0
    states = tuple(np.empty((T, *s.shape), s.dtype) for s in state0)
    record = LayerRecord(x, np.empty_like(states[0]), [None] * T, w, reverse)
    for t in reversed(range(T)) if reverse else range(T):
        record.h_prev[t] = state[0]
        state, record.steps[t] = cell.step(x[t], state, w)
        for every, s in zip(states, state, strict=True):
            every[t] = s
    return states, state, record


# ---- How far gradient travels, and the way back ----


def truncation(truncate: Truncation, T: int) -> tuple[int, int]:
    """(k1, k2) for the keyword `truncate`: None is full BPTT, an int k means (k, k).

    Raises TypeError for what is not an integer and ValueError unless k2 >= k1 >= 1.
    """
    if truncate is None:
        return max(T, 1), max(T, 1)
    k1, k2 = map(index, truncate if isinstance(truncate, (tuple, list)) else (truncate, truncate))
    if not 1 <= k1 <= k2:
        raise ValueError(f"truncate is {truncate}, expected k2 >= k1 >= 1")
    return k1, k2


def blocks(T: int, k1: int) -> list[range]:
    """The times 0 .. T-1 in blocks of k1; only the block with the highest times may be short."""
    # Zero steps are one empty block: the gradient of the final state still has to reach state0.
    return [range(start, min(start + k1, T)) for start in range(0, max(T, 1), k1)]


class Window(NamedTuple):
    """The steps that the losses of one block may reach (Williams & Peng 1990).

    TBPTT(k1, k2): the losses of a block of k1 steps go back through the block itself and the
    k2 - k1 steps run before it. The state entering the window is a constant, unless the window
    begins with the first step that was run: then gradient goes on to state0. The gradient of the
    final state belongs to the block that was run last. The forward pass is never truncated.
    So k1 = k2 = k is the usual "detach the state every k steps".
    """

    steps: range  # times, in the order they were run
    from_state0: bool
    to_final: bool


def window_of(block: range, T: int, before: int, reverse: bool) -> Window:
    """The window of a block: the block and `before` = k2 - k1 steps that were run before it."""
    if reverse:
        stop = min(T, block.stop + before)
        return Window(range(stop - 1, block.start - 1, -1), stop == T, block.start == 0)
    start = max(0, block.start - before)
    return Window(range(start, block.stop), start == 0, block.stop == T)


class LayerGradient(NamedTuple):
    """The gradient of one layer and direction, summed over windows as they are processed."""

    da: np.ndarray  # (T, B, G*H)
    dh: np.ndarray  # (T, B, P)
    dstate0: State  # each (B, .)


def window_backward(
    cell: Cell,
    record: LayerRecord,
    gradient: LayerGradient,
    window: Window,
    dstates: State,
    dstate_n: State,
) -> np.ndarray:
    """Backpropagation through time (Werbos 1990) through one window of one layer.

    dstates is the gradient that reaches each step's state from outside the layer, each entry
    (T, B, .); dstate_n the gradient of the final state, each (B, .). Adds to `gradient`, and
    returns the window's own dx (T, B, I): its losses go on in the layer below.
    """
    dx = np.zeros_like(record.x)
    dstate = dstate_n if window.to_final else tuple(map(np.zeros_like, dstate_n))
    for t in reversed(window.steps):
        dstate = tuple(d + outside[t] for d, outside in zip(dstate, dstates, strict=True))
        dh = dstate[0]
        da, dstate = cell.step_backward(dstate, record.steps[t], record.weights)
        dx[t] = da @ record.weights.w_ih
        gradient.da[t] += da
        gradient.dh[t] += dh
    if window.from_state0:
        for total, d in zip(gradient.dstate0, dstate, strict=True):
            total += d
    return dx


def weight_gradients(record: LayerRecord, gradient: LayerGradient) -> Weights:
    """The weights are shared by all steps, so their gradient is a sum over steps and batch rows.

    da is linear in the losses, so its sum over windows is all that is needed here:
    dW_ih = sum da[t]^T x[t];  dW_hh = sum da[t]^T h[t-1];  db = sum da[t];
    dW_hr = sum dh[t]^T (o tanh(c))[t].
    """
    w, da, dh = record.weights, gradient.da, gradient.dh
    rows = ((0, 1), (0, 1))
    dw_ih, dw_hh = np.tensordot(da, record.x, rows), np.tensordot(da, record.h_prev, rows)
    db = None if w.b_ih is None else da.sum((0, 1))
    dw_hr = None
    if w.w_hr is not None:
        dw_hr = np.zeros_like(w.w_hr)
        for t, step in enumerate(record.steps):
            dw_hr += dh[t].T @ (step.o * np.tanh(step.c))
    # Two arrays for the two biases: a caller may scale one gradient in place.
    return Weights(dw_ih, dw_hh, db, None if db is None else db.copy(), dw_hr)


# ---- A stack of layers ----


class Saved(NamedTuple):
    """What a forward pass hands to its backward; layer l, direction d stands at index l*D + d."""

    cell: Cell
    records: list[LayerRecord]
    state0: State  # each (L*D, B, .)
    num_layers: int
    dropout_masks: Sequence  # L-1 entries, each (T, B, D*P) or 1


def stack_forward(
    cell: Cell,
    x: np.ndarray,
    state0: State,
    weights: list[Weights],
    directions: Sequence[bool],
    dropout_masks: Sequence,
) -> tuple[State, State, Saved]:
    """Run a stack; `directions` holds one `reverse` flag for each direction of a layer.

    A layer reads the outputs of all directions of the layer below, side by side, times that
    layer's dropout mask. Returns the last layer's states, each (T, B, D*.), the final states of
    all layers, each (L*D, B, .), and the record.
    """
    D = len(directions)
    L = len(weights) // D
    finals, records = [], []
    for layer in range(L):
        runs = []
        for k, reverse in enumerate(directions, start=layer * D):
            runs.append(layer_forward(cell, x, tuple(s[k] for s in state0), weights[k], reverse))
        states = tuple(np.concatenate(s, -1) for s in zip(*(run[0] for run in runs), strict=True))
        finals += [run[1] for run in runs]
        records += [run[2] for run in runs]
        if layer < L - 1:
            x = states[0] * dropout_masks[layer]
    state_n = tuple(np.stack(s) for s in zip(*finals, strict=True))
    return states, state_n, Saved(cell, records, state0, L, dropout_masks)


def stack_backward(
    saved: Saved, dstates: State, dstate_n: State, truncate: Truncation = None
) -> tuple[np.ndarray, State, list[Weights]]:
    """Go back through a stack, block by block; returns dx, dstate0 and the weight gradients.

    dstates is the gradient of the last layer's states, each (T, B, D*.); dstate_n that of the
    final states of all layers, each (L*D, B, .). The losses of a block go down through all layers
    inside that block's window, as if the states of all layers were detached where it begins.
    With two directions the windows extend to opposite sides; a lower layer would then have to
    serve both, so several bidirectional layers with k2 > k1 are refused (ValueError).
    """
    records, L = saved.records, saved.num_layers
    D, T = len(records) // L, len(records[0].x)
    k1, k2 = truncation(truncate, T)
    if L > 1 and D > 1 and k2 > k1:
        raise ValueError(
            f"truncate has k2 = {k2} > k1 = {k1}, expected k1 = k2 for {L} bidirectional layers"
        )
    dstate0 = tuple(map(np.zeros_like, saved.state0))
    gradients = []
    for k, record in enumerate(records):
        da = np.zeros((*record.x.shape[:2], len(record.weights.w_hh)), record.x.dtype)
        dh = np.zeros_like(record.h_prev)
        gradients.append(LayerGradient(da, dh, tuple(s[k] for s in dstate0)))
    dx = np.zeros_like(records[0].x)
    for block in blocks(T, k1):
        d_above = tuple(map(np.zeros_like, dstates))
        for own, every in zip(d_above, dstates, strict=True):
            own[block.start : block.stop] = every[block.start : block.stop]
        for layer in reversed(range(L)):
            d_below = np.zeros_like(records[layer * D].x)
            for d in range(D):
                k = layer * D + d
                d_below += window_backward(
                    saved.cell,
                    records[k],
                    gradients[k],
                    window_of(block, T, k2 - k1, records[k].reverse),
                    tuple(np.split(s, D, -1)[d] for s in d_above),
                    tuple(s[k] for s in dstate_n),
                )
            if layer > 0:
                # Only y reaches the layer above; the rest of the state stays in its layer.
                zeros = map(np.zeros_like, d_above[1:])
                d_above = (d_below * saved.dropout_masks[layer - 1], *zeros)
        dx += d_below
    return dx, dstate0, list(map(weight_gradients, records, gradients))


# ---- The public functions ----


def _shaped(name: str, value, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """The value as an array of that shape and dtype; None means zeros."""
    value = np.zeros(shape, dtype) if value is None else np.asarray(value, dtype)
    if value.shape != shape:
        raise ValueError(f"{name} has shape {value.shape}, expected {shape}")
    return value


def _group(weights: list[np.ndarray], count: int) -> list[Weights]:
    """Split a flat list w_ih, w_hh, [b_ih, b_hh], [w_hr], w_ih, ... into `count` records."""
    each, left = divmod(len(weights), count)
    if left or each not in (2, 3, 4, 5):
        raise ValueError(
            f"weights has {len(weights)} arrays, expected 2 to 5 for each of {count} layers and "
            "directions: w_ih, w_hh, [b_ih, b_hh], [w_hr]"
        )
    groups = []
    for k in range(0, len(weights), each):
        w_ih, w_hh, *rest = weights[k : k + each]
        b_ih, b_hh = rest[:2] if each >= 4 else (None, None)
        groups.append(Weights(w_ih, w_hh, b_ih, b_hh, rest[-1] if each % 2 else None))
    return groups


def _forward(cell, x, state0, weights, num_layers, bidirectional, reverse, dropout_masks):
    """Check and complete the arguments that `lstm` and `rnn` share, then run the stack."""
    if bidirectional and reverse:
        raise ValueError("reverse and bidirectional are both True, expected at most one")
    directions = (False, True) if bidirectional else (reverse,)
    dtype = np.result_type(*map(np.asarray, (x, *weights)))
    dtype = dtype if dtype.kind == "f" else np.dtype(np.float64)
    x = np.asarray(x, dtype)
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}, expected (T, B, I)")
    groups = _group([np.asarray(w, dtype) for w in weights], num_layers * len(directions))
    rows, P = groups[0].w_hh.shape
    state0 = tuple(
        _shaped(name, s, (len(groups), x.shape[1], size), dtype)
        for name, s, size in zip(("h0", "c0"), state0, (P, rows // cell.gates), strict=False)
    )
    masks = [1] * (num_layers - 1) if dropout_masks is None else dropout_masks
    if len(masks) != num_layers - 1:
        raise ValueError(f"dropout_masks has {len(masks)} arrays, expected {num_layers - 1}")
    masks = [np.asarray(mask, dtype) for mask in masks]
    return stack_forward(cell, x, state0, groups, directions, masks)


def _backward(saved, dstates, dstate_n, truncate):
    """Complete the gradients that are None, go back, and flatten the weight gradients."""
    x, L = saved.records[0].x, saved.num_layers
    D = len(saved.records) // L
    dstates = tuple(
        _shaped(name, d, (*x.shape[:2], D * s.shape[-1]), x.dtype)
        for name, d, s in zip(("dy", "dcells"), dstates, saved.state0, strict=False)
    )
    dstate_n = tuple(
        _shaped(name, d, s.shape, x.dtype)
        for name, d, s in zip(("dh_n", "dc_n"), dstate_n, saved.state0, strict=False)
    )
    dx, dstate0, dweights = stack_backward(saved, dstates, dstate_n, truncate)
    return dx, dstate0, [dw for group in dweights for dw in group if dw is not None]


def lstm(
    x: np.ndarray,
    hx: tuple[np.ndarray, np.ndarray] | None,
    weights: Sequence[np.ndarray],
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    reverse: bool = False,
    dropout_masks: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], np.ndarray, Saved]:
    """LSTM over a sequence (Hochreiter & Schmidhuber 1997, Gers et al. 2000).

    x (T, B, I); hx is (h0 (L*D, B, P), c0 (L*D, B, H)) or None for zeros; weights is torch's flat
    order, for each layer and direction w_ih (4H, I or D*P), w_hh (4H, P), [b_ih, b_hh (4H,)],
    [w_hr (P, H)], so that biases and projection are used where given. reverse runs the single
    direction from t = T-1 to 0. dropout_masks are L-1 arrays (T, B, D*P), already scaled by
    1 / (1 - p), that multiply the outputs of all layers but the last.

    Returns y (T, B, D*P), (h_n (L*D, B, P), c_n (L*D, B, H)), the last layer's cell states of
    every step (T, B, D*H), and the record for `lstm_backward`. The record keeps references to the
    inputs: do not change them in place in between. Raises ValueError for shapes that do not fit.
    """
    h0, c0 = (None, None) if hx is None else hx
    (y, cells), state_n, saved = _forward(
        LSTM_CELL, x, (h0, c0), weights, num_layers, bidirectional, reverse, dropout_masks
    )
    return y, state_n, cells, saved


def lstm_backward(
    saved: Saved,
    dy: np.ndarray | None,
    dh_n: np.ndarray | None = None,
    dc_n: np.ndarray | None = None,
    dcells: np.ndarray | None = None,
    truncate: Truncation = None,
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray], list[np.ndarray]]:
    """The gradient of `lstm` by BPTT (Werbos 1990), truncated if asked (Williams & Peng 1990).

    dy, dh_n, dc_n and dcells have the shapes of the outputs of `lstm`; None counts as zero.
    truncate is None (full), k, or (k1, k2); see `Window`. Returns dx, (dh0, dc0) and the weight
    gradients, each shaped and ordered as the inputs. Raises ValueError for shapes that do not fit,
    a bad truncate, and for k2 > k1 in a bidirectional stack of several layers.
    """
    return _backward(saved, (dy, dcells), (dh_n, dc_n), truncate)


def rnn(
    x: np.ndarray,
    hx: np.ndarray | None,
    weights: Sequence[np.ndarray],
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    reverse: bool = False,
    dropout_masks: Sequence[np.ndarray] | None = None,
) -> tuple[np.ndarray, np.ndarray, Saved]:
    """Simple RNN over a sequence (Elman 1990); nonlinearity is "tanh" or "relu".

    As `lstm` without cell states and projection: hx is h0 (L*D, B, H) or None, weights are w_ih
    (H, I or D*H), w_hh (H, H), [b_ih, b_hh (H,)]. Returns y (T, B, D*H), h_n (L*D, B, H) and the
    record for `rnn_backward`. Raises ValueError for shapes that do not fit.
    """
    if nonlinearity not in RNN_CELLS:
        raise ValueError(f"nonlinearity is {nonlinearity!r}, expected 'tanh' or 'relu'")
    cell = RNN_CELLS[nonlinearity]
    (y,), (h_n,), saved = _forward(
        cell, x, (hx,), weights, num_layers, bidirectional, reverse, dropout_masks
    )
    return y, h_n, saved


def rnn_backward(
    saved: Saved,
    dy: np.ndarray | None,
    dh_n: np.ndarray | None = None,
    truncate: Truncation = None,
) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """The gradient of `rnn`, as `lstm_backward`: returns dx, dh0 and the weight gradients."""
    dx, (dh0,), dweights = _backward(saved, (dy,), (dh_n,), truncate)
    return dx, dh0, dweights
