"""Who computes the recurrent stack of a model: a name in, a torch module out.

All backends have torch.nn's constructor, parameters and results, so a model trained with one runs
with another: `rnnfast` is the fast one, `torch` the peer to compare with, `reference` the textbook
in NumPy.
"""

from __future__ import annotations

from torch import nn

BACKENDS = ("rnnfast", "torch", "reference")
CELLS = ("lstm", "rnn")
MEMORY = ("normal", "low")


def recurrent_class(cell: str, backend: str) -> type[nn.RNNBase]:
    """The class of a stack of recurrent layers.

    Args:
        cell: `lstm` or `rnn`.
        backend: `rnnfast`, `torch` or `reference`.

    Raises:
        ValueError: an unknown cell or backend.
    """
    if cell not in CELLS:
        raise ValueError(f"cell is {cell!r}; it must be one of {', '.join(CELLS)}")
    # The imports stand here so that each backend works where another can't be loaded.
    if backend == "rnnfast":
        from rnnfast.modules import LSTM, RNN

        return LSTM if cell == "lstm" else RNN
    if backend == "torch":
        return nn.LSTM if cell == "lstm" else nn.RNN
    if backend == "reference":
        from rnnfast.reference_modules import ReferenceLSTM, ReferenceRNN

        return ReferenceLSTM if cell == "lstm" else ReferenceRNN
    raise ValueError(f"backend is {backend!r}; it must be one of {', '.join(BACKENDS)}")
