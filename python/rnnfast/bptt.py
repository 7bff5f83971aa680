"""Truncated backpropagation through time: the arithmetic of its windows, and helpers to train on
streams longer than memory.

Truncation TBPTT(k1, k2) groups losses in blocks of k1 steps and lets the gradient of a block travel
through a window: the block and the k2 - k1 steps before it (Williams & Peng 1990, "An efficient
gradient-based algorithm for on-line training of recurrent network trajectories"). The functions of
the first half say where blocks and windows begin; they are pure and know no tensors. Those of the
second half serve the other meaning of the word, carrying the state from chunk to chunk:

    rows, state = batchify(tokens, batch_size=20), None
    for inputs, targets in chunks(rows, 35):
        logits, state = model(inputs, detach(state))
        ...
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

State = TypeVar("State")
Truncation = int | tuple[int, int] | None


def parse_truncate(truncate: Truncation, T: int | None = None) -> tuple[int, int]:
    """(k1, k2) for what a user gave as `truncate`: None, k for (k, k), or (k1, k2).

    (0, 0) means full BPTT. It stands for None and, when the number of steps T is given, for any
    truncation that would cut nothing in T steps. Raises TypeError for anything but integers and
    ValueError unless k2 >= k1 >= 1.
    """
    if truncate is None:
        return 0, 0
    pair = truncate if isinstance(truncate, (tuple, list)) else (truncate, truncate)
    if len(pair) != 2:
        raise ValueError(f"truncate must be None, k or (k1, k2), got {len(pair)} values")
    try:
        if any(isinstance(k, bool) for k in pair):
            raise TypeError
        k1, k2 = (operator.index(k) for k in pair)
    except TypeError:
        raise TypeError(
            f"truncate must be None, an int k or a pair of ints (k1, k2), got {truncate!r}"
        ) from None
    if not 1 <= k1 <= k2:
        raise ValueError(f"truncate must satisfy 1 <= k1 <= k2, got k1={k1}, k2={k2}")
    if T is not None and (T == 0 or window_begins(T, k1, k2)[-1] == 0):
        return 0, 0
    return k1, k2


def block_begins(T: int, k1: int, reverse: bool = False) -> list[int]:
    """The step, counted in processing order, at which each block of losses begins.

    Blocks are anchored at time 0, so the short block, if T is no multiple of k1, lies at the end of
    time: it is the last one forward and the first one a reverse direction meets.
    """
    if reverse:
        return [0, *range(T - (T - 1) // k1 * k1, T, k1)] if T else []
    return list(range(0, T, k1))


def window_begins(T: int, k1: int, k2: int, reverse: bool = False) -> list[int]:
    """The step, counted in processing order, at which the window of each block begins.

    A window that begins at 0 hands its gradient on to the initial state.
    """
    return [max(begin - (k2 - k1), 0) for begin in block_begins(T, k1, reverse)]


def detach(state: State) -> State:
    """The same state cut off from the graph that made it, so that a chunk's gradient stops there.

    State may be a tensor, None, or tuples, lists and dicts of these. Nothing is copied.
    """
    return _map(torch.Tensor.detach, state)


def reset(state: State, began: Tensor, initial: State | None = None, batch_dim: int = 1) -> State:
    """The state with the rows set back for which `began` says that a new document begins.

    state: as for `detach`; its tensors have the batch along batch_dim (1 for the (L * D, B, H) of
    torch.nn.RNN and LSTM, 0 for cells). began: bool (B,). initial: the state to set rows to, of the
    same structure, broadcast against it; None for zeros. Gradients pass through the kept rows and
    into `initial`. Raises TypeError for a mask that isn't bool, ValueError for a wrong shape.
    """
    if began.dtype != torch.bool:
        raise TypeError(f"began must be a bool tensor, got dtype {began.dtype}")
    if began.dim() != 1:
        raise ValueError(f"began must have shape (B,), got {tuple(began.shape)}")

    def reset_tensor(tensor: Tensor, start: Tensor | None = None) -> Tensor:
        if not 0 <= batch_dim < tensor.dim() or tensor.shape[batch_dim] != len(began):
            raise ValueError(
                f"began has {len(began)} rows, state has shape {tuple(tensor.shape)} "
                f"with the batch along dimension {batch_dim}"
            )
        mask = began.view(-1, *[1] * (tensor.dim() - batch_dim - 1))
        return torch.where(mask, tensor.new_zeros(()) if start is None else start, tensor)

    return _map(reset_tensor, state) if initial is None else _map(reset_tensor, state, initial)


def batchify(stream: Tensor, batch_size: int) -> Tensor:
    """Cut a stream (N,) into batch_size rows (B, N // B), each a contiguous piece of it.

    Step t + 1 of a row follows step t in the stream, so state carried along a row stays true. The
    N % B last elements, which fill no column, are dropped. Raises ValueError for a stream that
    isn't 1-D or has fewer elements than rows.
    """
    if stream.dim() != 1:
        raise ValueError(f"stream must be 1-D, got shape {tuple(stream.shape)}")
    if not 1 <= batch_size <= len(stream):
        raise ValueError(
            f"batch_size must be from 1 to the stream's length {len(stream)}, got {batch_size}"
        )
    columns = len(stream) // batch_size
    return stream[: batch_size * columns].view(batch_size, columns)


def chunks(rows: Tensor, length: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (inputs, targets), views of `length` columns each; targets are the inputs one step on.

    rows: (B, N), as `batchify` makes them. Together the chunks predict every column from
    start + 1 to N - 1 once; the last chunk may be shorter. start: the column to begin at, for
    resuming. Raises ValueError for rows that aren't 2-D, length < 1 or start < 0.
    """
    if rows.dim() != 2:
        raise ValueError(f"rows must have shape (B, N), got {tuple(rows.shape)}")
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if start < 0:
        raise ValueError(f"start must be at least 0, got {start}")
    return (
        (rows[:, t : min(t + length, rows.shape[1] - 1)], rows[:, t + 1 : t + 1 + length])
        for t in range(start, rows.shape[1] - 1, length)
    )


def _map(function: Any, state: Any, *others: Any) -> Any:
    """Apply `function` to the tensors of nested states that share one structure."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return function(state, *others)
    if isinstance(state, dict):
        return {k: _map(function, v, *(o[k] for o in others)) for k, v in state.items()}
    if isinstance(state, (tuple, list)):
        parts = [_map(function, *each) for each in zip(state, *others, strict=True)]
        if hasattr(state, "_fields"):
            return type(state)(*parts)
        return type(state)(parts)
    raise TypeError(f"state must hold tensors, tuples, lists or dicts, got {type(state).__name__}")
