"""Stacks of layers and directions over one-layer operators, and their truncation with k2 > k1.

A `Layer` runs one layer in one direction; LSTM, RNN, projected LSTM and packed sequences differ
only in the Layer they hand in. A state is a tuple: (h, c) for an LSTM, (h,) for an RNN.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import bptt
from .checks import LayerWeights

State = tuple[Tensor, ...]
Between = Callable[[int, Tensor], Tensor]
# Both directions of a layer: x, states, weights, k1, k2, keep to y (T, B, 2 * P), finals, cells.
BothDirections = Callable[..., tuple[Tensor, list[State], list[Tensor | None]]]


class Layer(Protocol):
    """One layer in one direction.

    x (T, B, I), state (B, P) and (B, H), (k1, k2) as the operators take them. Gives the outputs
    (T, B, P), the final state and the cell state of every step (T, B, H): None for an RNN, and of
    no meaning when `keep` is "nothing". keep: as the operators take it.
    """

    def __call__(
        self, x: Tensor, state: State, w: LayerWeights, reverse: bool, k1: int, k2: int, keep: str
    ) -> tuple[Tensor, State, Tensor | None]: ...


def run(
    layer: Layer,
    x: Tensor,
    states: list[State],
    weights: list[LayerWeights],
    directions: int,
    between: Between | None,
    k1: int,
    k2: int,
    keep: str,
    both: BothDirections | None = None,
) -> tuple[Tensor, list[State], list[Tensor | None]]:
    """Run all layers and directions.

    between(i, y), if given, is applied to the outputs of layer i on their way to layer i + 1.
    both, if given, runs the two directions of a layer in the place of two calls of `layer`.
    Gives the last layer's outputs (T, B, D * P), the final states in the order of `states`, and the
    last layer's cell states, one tensor per direction.
    """
    finals = []
    for i in range(0, len(weights), directions):
        if i and between is not None:
            x = between(i // directions - 1, x)
        if both is not None:
            x, pair, cells = both(x, states[i : i + 2], weights[i : i + 2], k1, k2, keep)
            finals += pair
            continue
        y, final, c = layer(x, states[i], weights[i], False, k1, k2, keep)
        finals.append(final)
        cells = [c]
        if directions == 2:
            y_reverse, final, c = layer(x, states[i + 1], weights[i + 1], True, k1, k2, keep)
            finals.append(final)
            cells.append(c)
            y = torch.cat((y, y_reverse), -1)
        x = y
    return x, finals, cells


def run_windows(
    layer: Layer,
    x: Tensor,
    states: list[State],
    weights: list[LayerWeights],
    dropout: float,
    k1: int,
    k2: int,
    keep: str,
) -> tuple[Tensor, list[State], list[Tensor | None]]:
    """Run a unidirectional stack under TBPTT(k1, k2), k2 > k1, that cuts something; as `run`.

    With k2 > k1 the window of a block is one for all layers: gradient that a window of layer 2
    hands down must not go on through another window of layer 1, so no operator on one layer can do
    it. The states are computed first, without gradient. Then every window runs from its state as a
    sequence of its own, all full windows side by side as one batch, and keeps the outputs of its
    block. Windows that begin at step 0 are not cut at all and run as one common sequence. The price
    is k2 / k1 times the steps.
    """
    T, B = x.shape[:2]
    begins = bptt.window_begins(T, k1, k2)
    head = next(j for j, begin in enumerate(begins) if begin > 0)  # blocks before it aren't cut
    full = T // k1 - head  # cut blocks of k1 steps; a shorter one may follow
    warm = k2 - k1  # steps of a window before its block

    # One mask per step and row, the same in the pass for the states and in every window.
    masks = [
        F.dropout(x.new_ones(T, B, w[1].shape[1]), dropout, True)
        for w in (weights[:-1] if dropout else ())
    ]
    entering = _states_entering(layer, x, states, weights, masks, begins[head:])

    def run_on(select: Callable[[Tensor], Tensor], states: list[State]):
        picked = [select(mask) for mask in masks]
        between = (lambda i, y: y * picked[i]) if picked else None
        return run(layer, select(x), states, weights, 1, between, 0, 0, keep)

    def side_by_side(sequence: Tensor) -> Tensor:
        """The full windows of (T, B, F) as (k2, full * B, F)."""
        begin = begins[head]
        steps = sequence[begin : begin + (full - 1) * k1 + k2]
        return steps.unfold(0, k2, k1).permute(3, 0, 1, 2).flatten(1, 2)

    def in_a_row(windows: Tensor) -> Tensor:
        """The blocks of (k2, full * B, F) as (full * k1, B, F)."""
        return windows[warm:].unflatten(1, (full, B)).transpose(0, 1).flatten(0, 1)

    y, finals, (c,) = run_on(lambda sequence: sequence[: head * k1], states)
    ys, cs = [y], [c]
    if full:
        y, finals, (c,) = run_on(
            side_by_side, [tuple(s[:full].flatten(0, 1) for s in state) for state in entering]
        )
        finals = [tuple(s[-B:] for s in final) for final in finals]
        ys.append(in_a_row(y))
        cs.append(c if c is None else in_a_row(c))
    if T % k1:
        y, finals, (c,) = run_on(
            lambda sequence: sequence[begins[-1] :],
            [tuple(s[-1] for s in state) for state in entering],
        )
        ys.append(y[warm:])
        cs.append(c if c is None else c[warm:])
    return torch.cat(ys), finals, [None if c is None else torch.cat(cs)]


@torch.no_grad()
def _states_entering(
    layer: Layer,
    x: Tensor,
    states: list[State],
    weights: list[LayerWeights],
    masks: list[Tensor],
    begins: list[int],
) -> list[State]:
    """For each layer the states that enter the steps `begins`, all > 0: (len(begins), B, ...)."""
    x = x[: begins[-1]]
    before = [begin - 1 for begin in begins]
    entering = []
    for i, (state, w) in enumerate(zip(states, weights, strict=True)):
        y, _, c = layer(x, state, w, False, 0, 0, "cells")
        entering.append((y[before],) if c is None else (y[before], c[before]))
        x = y * masks[i][: len(y)] if i < len(masks) else y
    return entering
