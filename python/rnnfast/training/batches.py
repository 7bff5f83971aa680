"""A long text laid out as rows that are read side by side."""

from __future__ import annotations

import torch
from torch import Tensor

#: stands behind the end of the text; as a target it adds nothing to the loss.
IGNORED = -100


def text_rows(tokens: Tensor, rows: int, *, keep_all: bool = False) -> Tensor:
    """Stretches of equal length, each with the first token of the next, for `rnnfast.bptt.chunks`.

    Unlike the rows of `rnnfast.bptt.batchify`, these overlap by one token, so that no token goes
    unpredicted at the seams: with `keep_all` the perplexity is that of the whole text.

    Args:
        tokens: shape (N,).
        rows: number of rows B.
        keep_all: fill the last row up with `IGNORED`; otherwise drop what doesn't divide evenly.

    Returns:
        shape (B, columns + 1): every row makes `columns` predictions.

    Raises:
        ValueError: fewer than one prediction for each row.
    """
    predictions = len(tokens) - 1
    if predictions < rows:
        raise ValueError(
            f"{len(tokens)} tokens are too few for {rows} rows; at least {rows + 1} are needed"
        )
    columns = -(-predictions // rows) if keep_all else predictions // rows
    missing = max(rows * columns - predictions, 0)
    tokens = torch.nn.functional.pad(tokens, (0, missing), value=IGNORED)
    return tokens[: rows * columns + 1].unfold(0, columns + 1, columns)


def time_major(chunk: Tensor, device: torch.device) -> Tensor:
    """A chunk (B, T) of rows as the models want it: int64, shape (T, B), contiguous."""
    return chunk.T.contiguous().to(device, torch.int64)
