"""Packed sequences: a Layer over rows of unequal length, from a Layer over rows of equal length.

The data of a PackedSequence lies step after step, longest sequence first. The CPU's kernels take
it as it is; this file is for those that don't.

`over_padding`, for a GPU: a step that is there anyway costs nothing more for the rows of sequences
that have ended. Each direction has its padding where sequences are over, so that all of them begin
at the first step, and what runs on is dropped.

`over_segments`: wherever the number of running sequences stays the same for a while the data is an
ordinary (T, B, I) tensor in place. So a layer runs segment by segment, between which sequences
leave (or, in reverse, enter) the batch with their states. No state runs on past the end of its
sequence, and any step may be the first. The price is one operator call per segment: at most one
more than there are distinct lengths, times the blocks if truncated.

`by_length`, for whole stacks that are cut with k2 > k1.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from . import bptt
from .checks import LayerWeights
from .stack import Layer, State

Result = tuple[Tensor, list[State], list[Tensor | None]]  # as stack.run gives it


def over_padding(layer: Layer, batch_sizes: Tensor) -> Layer:
    """The Layer that runs `layer` on packed data (N, I) instead of (T, B, I), padded.

    Of a cell whose states stay finite whatever runs on, or else gradients of weights may become
    0 * inf. The state may hold None, if `layer` takes it for zeros. Truncation is understood
    forward in time only: in reverse, blocks would be counted from the padding.
    """
    T, B = len(batch_sizes), int(batch_sizes[0])
    lengths = (batch_sizes > torch.arange(B)[:, None]).sum(1)
    time = torch.arange(T).repeat_interleave(batch_sizes)
    row = torch.cat([torch.arange(int(n)) for n in batch_sizes])
    places = {}  # of the packed rows, and of those with a sequence's last step, among T * B

    def places_in(reverse: bool, device: torch.device) -> tuple[Tensor, Tensor]:
        if reverse not in places:
            begins = T - lengths if reverse else torch.zeros_like(lengths)
            ends = begins if reverse else lengths - 1
            both = (begins[row] + time) * B + row, ends * B + torch.arange(B)
            places[reverse] = tuple(p.to(device, non_blocking=True) for p in both)
        return places[reverse]

    def run(
        x: Tensor, state: State, w: LayerWeights, reverse: bool, k1: int, k2: int, keep: str
    ) -> tuple[Tensor, State, Tensor | None]:
        rows, last = places_in(reverse, x.device)
        padded = x.new_zeros(T * B, x.shape[1]).index_copy(0, rows, x).view(T, B, -1)
        keep = "cells" if keep == "nothing" else keep  # for the last ones
        y, final, c = layer(padded, state, w, reverse, k1, k2, keep)
        y = y.flatten(0, 1)
        h_n, y = y.index_select(0, last), y.index_select(0, rows)
        if c is None:
            return y, (h_n,), None
        c = c.flatten(0, 1)
        c_n = c.index_select(0, last).to(final[1].dtype)
        return y, (h_n, c_n), c.index_select(0, rows)

    return run


def over_segments(layer: Layer, batch_sizes: Tensor) -> Layer:
    """The Layer that runs `layer` on packed data (N, I) instead of (T, B, I), in segments.

    Truncation is understood with k1 = k2 only: windows are blocks then, and cutting segments at
    their borders does it.
    """
    batch_sizes = batch_sizes.tolist()

    def run(
        x: Tensor, state: State, w: LayerWeights, reverse: bool, k1: int, k2: int, keep: str
    ) -> tuple[Tensor, State, Tensor | None]:
        segments = _segments(batch_sizes, k1)
        parts = x.split([steps * rows for _, steps, rows in segments])
        pieces = list(zip(parts, segments, strict=True))
        running = tuple(s[:0] for s in state) if reverse else state
        left: list[State] = []  # final states of sequences that ended, the longest last
        ys, cs = [], []
        for part, (begin, steps, rows) in reversed(pieces) if reverse else pieces:
            border = k1 and begin and begin % k1 == 0
            if reverse:
                running = tuple(
                    torch.cat((r, s[len(r) : rows])) for r, s in zip(running, state, strict=True)
                )
            else:
                left.append(tuple(r[rows:] for r in running))
                running = tuple(r[:rows] for r in running)
                if border:
                    running = bptt.detach(running)
            y, running, c = layer(part.unflatten(0, (steps, rows)), running, w, reverse, 0, 0, keep)
            if reverse and border:
                running = bptt.detach(running)
            ys.append(y.flatten(0, 1))
            if keep != "nothing" and c is not None:
                cs.append(c.flatten(0, 1))
        final = tuple(torch.cat(s) for s in zip(running, *reversed(left), strict=True))
        order = slice(None, None, -1 if reverse else 1)
        return torch.cat(ys[order]), final, torch.cat(cs[order]) if cs else None

    return run


def by_length(
    run: Callable[[Tensor, list[State]], Result],
    data: Tensor,
    batch_sizes: Tensor,
    states: list[State],
) -> Result:
    """Run sequences of equal length together, one such group after the other.

    run(x, states) is given x (T, B, I). This is right for any truncation: the blocks of each
    direction begin where they would for the sequence alone.
    """
    padded, lengths = pad_packed_sequence(PackedSequence(data, batch_sizes))
    T = len(padded)
    results: list[Result] = []
    row = 0
    for length, group in groupby(lengths.tolist()):
        rows = slice(row, row + len(list(group)))
        row = rows.stop
        y, finals, cells = run(
            padded[:length, rows], [tuple(s[rows] for s in state) for state in states]
        )
        cells = [None if c is None else _pad_time(c, T) for c in cells]
        results.append((_pad_time(y, T), finals, cells))

    def pack(groups: list[Tensor]) -> Tensor:
        return pack_padded_sequence(torch.cat(groups, 1), lengths).data

    ys, finals, cells = zip(*results, strict=True)
    return (
        pack(ys),
        [
            tuple(torch.cat(s) for s in zip(*groups, strict=True))
            for groups in zip(*finals, strict=True)
        ],
        [None if cs[0] is None else pack(cs) for cs in zip(*cells, strict=True)],
    )


def _pad_time(sequence: Tensor, T: int) -> Tensor:
    return F.pad(sequence, (0, 0, 0, 0, 0, T - len(sequence)))


def _segments(batch_sizes: list[int], k1: int) -> list[tuple[int, int, int]]:
    """(begin, steps, rows) of the stretches of constant batch that cross no block's border."""
    segments = []
    for (rows, _), steps in groupby(
        range(len(batch_sizes)), key=lambda t: (batch_sizes[t], t // k1 if k1 else 0)
    ):
        stretch = list(steps)
        segments.append((stretch[0], len(stretch), rows))
    return segments
