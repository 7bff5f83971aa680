"""RNN, LSTM, RNNCell and LSTMCell: torch.nn's modules, computed by rnnfast.

They subclass torch's, so that constructor, parameter names and order, initialisation, state_dict,
pickling and isinstance checks are torch's own; only `forward` differs. Weights are fetched by name
at every call: whatever stands under the name (a parameter, a parametrization, what functional_call
put there) is what computes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import checks, direct, functional
from .bptt import Truncation, parse_truncate


class _Sequence(torch.nn.RNNBase):
    """What RNN and LSTM share beside torch's own base: the keyword `truncate`."""

    truncate: Truncation = None  # also for modules that convert() or an older pickle made

    def __init__(self, *args: Any, truncate: Truncation = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.truncate = check_truncate(self, truncate)

    def flatten_parameters(self) -> None:
        """Do nothing: rnnfast has no use for weights in one piece of memory."""

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.truncate is None else f"{text}, truncate={self.truncate}"

    def weights(self) -> list[Tensor]:
        """The weights in the order of torch's all_weights, flat."""
        return _weights(self, self._flat_weights_names)


def _weights(module: torch.nn.Module, names: Iterable[str]) -> list[Tensor]:
    """What stands under these names.

    Straight from the dictionary where possible: Module finds a parameter only after Python has
    searched everywhere else, which for four weights takes as long as a step of a small layer.
    """
    try:
        return list(map(module._parameters.__getitem__, names))
    except KeyError:  # a parametrization, or what functional_call put there
        return [getattr(module, name) for name in names]


_CELL_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def check_truncate(module: torch.nn.RNNBase, truncate: Truncation) -> Truncation:
    """`truncate` as it is kept (a list becomes a tuple), known to be possible for this module."""
    k1, k2 = parse_truncate(truncate)
    if k2 > k1 and module.bidirectional and module.num_layers > 1:
        raise ValueError(
            f"truncate with k2 > k1 has no meaning for a bidirectional stack "
            f"of {module.num_layers} layers, got k1={k1}, k2={k2}"
        )
    return tuple(truncate) if isinstance(truncate, list) else truncate


class LSTM(_Sequence, torch.nn.LSTM):
    """torch.nn.LSTM with fused kernels and truncated backpropagation through time.

    Takes torch.nn.LSTM's arguments and two more keywords, truncate: k or (k1, k2), and memory:
    "normal" or "low", see `rnnfast.functional.lstm`, which also lists shapes, dtypes and errors.
    Same seed, same weights. On CUDA, and truncated with k2 > k1, proj_size > 0 is right but slow.
    Hochreiter & Schmidhuber 1997.
    """

    memory: str = "normal"  # also for modules that convert() or an older pickle made

    def __init__(self, *args: Any, memory: str = "normal", **kwargs: Any) -> None:
        checks.kept_with(memory)
        super().__init__(*args, **kwargs)
        self.memory = memory

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.memory == "normal" else f"{text}, memory={self.memory!r}"

    def forward(
        self, input: Tensor | PackedSequence, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor | PackedSequence, tuple[Tensor, Tensor]]:
        """(y, (h_n, c_n)) as torch.nn.LSTM gives them."""
        short = direct.module_sequence(self, "lstm", input, hx)
        if short is not None:
            y, h_n, c_n, _ = short
            return y, (h_n, c_n)
        return functional.lstm(
            input,
            hx,
            self.weights(),
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            proj_size=self.proj_size,
            truncate=self.truncate,
            memory=self.memory,
        )


class RNN(_Sequence, torch.nn.RNN):
    """torch.nn.RNN with fused kernels and truncated backpropagation through time.

    Takes torch.nn.RNN's arguments and one more keyword, truncate: k or (k1, k2), see
    `rnnfast.functional.lstm`, which also lists shapes, dtypes and errors. Same seed, same weights.
    Elman 1990.
    """

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None
    ) -> tuple[Tensor | PackedSequence, Tensor]:
        """(y, h_n) as torch.nn.RNN gives them."""
        states = hx if hx is None else (hx,)
        short = direct.module_sequence(self, None, input, states)
        if short is not None:
            return short[:2]
        return functional.rnn(
            input,
            hx,
            self.weights(),
            nonlinearity=self.nonlinearity,
            num_layers=self.num_layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
            truncate=self.truncate,
        )


class LSTMCell(torch.nn.LSTMCell):
    """torch.nn.LSTMCell with fused kernels: one step, (h, c) from input and (h, c)."""

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """(h, c) of shapes (B, H), or (H,) for unbatched input (I,)."""
        short = direct.module_step(self, "lstm", input, hx)
        if short is not None:
            return short
        return functional.lstm_cell(input, hx, *_weights(self, _CELL_WEIGHTS))


class RNNCell(torch.nn.RNNCell):
    """torch.nn.RNNCell with fused kernels: one step, h from input and h."""

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h of shape (B, H), or (H,) for unbatched input (I,)."""
        states = hx if hx is None else (hx,)
        short = direct.module_step(self, None, input, states)
        if short is not None:
            return short[0]
        return functional.rnn_cell(input, hx, *_weights(self, _CELL_WEIGHTS), self.nonlinearity)
