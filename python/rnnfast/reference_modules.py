"""The NumPy reference behind torch modules: the slow readable path, selectable as a backend.

`ReferenceRNN` and `ReferenceLSTM` are torch.nn's modules (same constructor, parameters and
results) whose arithmetic is `rnnfast.reference`, forward and backward. They let a whole model
train on the textbook, so that any result of the fast kernels can be questioned. They run on the
CPU in float32 or float64; each step is a few NumPy calls, so expect them to be slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from rnnfast import reference
from rnnfast.bptt import Truncation, parse_truncate
from rnnfast.checks import check_pair

Arrays = Sequence[np.ndarray]


class _ReferenceFunction(torch.autograd.Function):
    """One autograd node around the reference: x, the initial states and the weights go in."""

    @staticmethod
    def forward(ctx, module: _ReferenceModule, options: dict, x: Tensor, *tensors: Tensor):
        ctx.save_for_backward(x, *tensors)
        x, *arrays = (t.detach().numpy() for t in (x, *tensors))
        n = module._num_states
        y, state_n, ctx.saved = module._forward(x, arrays[:n], arrays[n:], **options)
        ctx.module, ctx.truncate = module, module.truncate
        return tuple(map(torch.from_numpy, (y, *state_n)))

    @staticmethod
    def backward(ctx, dy: Tensor, *dstate_n: Tensor):
        if torch.is_grad_enabled():
            # Gradients without a graph would count as constants, silently.
            raise RuntimeError(
                f"{type(ctx.module).__name__}: create_graph is True, expected False: "
                "the reference has no second derivative"
            )
        # The record aliases the inputs. Asking for them makes torch raise if one was changed in
        # place since the forward pass, or if the graph was freed.
        _ = ctx.saved_tensors
        dx, dstate0, dweights = ctx.module._backward(
            ctx.saved, dy.numpy(), [d.numpy() for d in dstate_n], ctx.truncate
        )
        return None, None, *map(torch.from_numpy, (dx, *dstate0, *dweights))


class _ReferenceModule(torch.nn.RNNBase):
    """What the two modules share: layouts, checks and dropout around the reference."""

    _num_states: ClassVar[int]

    def __init__(self, *args: Any, truncate: Truncation = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        k1, k2 = parse_truncate(truncate)
        if k2 > k1 and self.bidirectional and self.num_layers > 1:
            raise ValueError(
                f"truncate has k2 = {k2} > k1 = {k1}, expected k1 = k2 for {self.num_layers} "
                "bidirectional layers"
            )
        self.truncate = truncate

    def extra_repr(self) -> str:
        shown = "" if self.truncate is None else f", truncate={self.truncate}"
        return super().extra_repr() + shown

    def _dropout_masks(self, x: Tensor) -> Arrays | None:
        """The masks between layers, drawn as torch.nn draws them: one seed gives one result."""
        if not self.training or self.dropout == 0:
            return None
        units = (self.proj_size or self.hidden_size) * (2 if self.bidirectional else 1)
        ones = torch.ones(*x.shape[:2], units, dtype=x.dtype)
        layers = range(self.num_layers - 1)
        return [torch.nn.functional.dropout(ones, self.dropout).numpy() for _ in layers]

    def _check(self, x: Tensor, states: Sequence[Tensor]) -> None:
        """Shapes as torch.nn checks them, then what the reference itself asks for."""
        self.check_forward_args(x, tuple(states) if len(states) > 1 else states[0], None)
        name = type(self).__name__
        for t in (x, *states, *self._flat_weights):
            if t.device.type != "cpu" or t.dtype not in (torch.float32, torch.float64):
                raise RuntimeError(
                    f"{name}: found a tensor of {t.dtype} on {t.device}, expected torch.float32 or "
                    "torch.float64 on the cpu"
                )
            if t.dtype != x.dtype:
                raise RuntimeError(f"{name}: found a tensor of {t.dtype}, input has {x.dtype}")
        if x.shape[1 if self.batch_first else 0] == 0:
            raise RuntimeError(f"{name}: input has 0 time steps, expected at least 1")

    def _run(self, x: Tensor, states: Sequence[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """x and states (None for zeros) as the user gave them; y and final states likewise."""
        name = type(self).__name__
        if isinstance(x, PackedSequence):
            raise TypeError(f"{name}: input is a PackedSequence, expected a padded Tensor")
        if x.dim() not in (2, 3):
            raise ValueError(f"{name}: input has {x.dim()} dimensions, expected 2 or 3")
        self._update_flat_weights()
        batch_dim, batched = 0 if self.batch_first else 1, x.dim() == 3
        for state in states or ():
            if state.dim() != x.dim():
                raise RuntimeError(
                    f"{name}: hx has {state.dim()} dimensions, expected {x.dim()} as input has"
                )
        if not batched:
            x = x.unsqueeze(batch_dim)
            states = None if states is None else [state.unsqueeze(1) for state in states]
        if states is None:
            LD = self.num_layers * (2 if self.bidirectional else 1)
            sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: self._num_states]
            states = [x.new_zeros(LD, x.shape[batch_dim], size) for size in sizes]
        self._check(x, states)
        if self.batch_first:
            x = x.transpose(0, 1)
        options = {
            "num_layers": self.num_layers,
            "bidirectional": self.bidirectional,
            "dropout_masks": self._dropout_masks(x),
        }
        y, *state_n = _ReferenceFunction.apply(self, options, x, *states, *self._flat_weights)
        if self.batch_first:
            y = y.transpose(0, 1)
        if not batched:
            y, state_n = y.squeeze(batch_dim), [state.squeeze(1) for state in state_n]
        return y, state_n


class ReferenceRNN(_ReferenceModule, torch.nn.RNN):
    """torch.nn.RNN computed by `rnnfast.reference` (Elman 1990), with truncated BPTT.

    Takes torch.nn.RNN's arguments and `truncate`: None, k or (k1, k2) with k2 >= k1 >= 1
    (Williams & Peng 1990; see `rnnfast.reference.Window`), which changes gradients only. Shapes
    and errors are torch.nn.RNN's. Besides, raises TypeError for a PackedSequence, TypeError or
    ValueError for a bad truncate, and RuntimeError unless all tensors are float32 or all float64,
    on the CPU.
    """

    _num_states = 1

    def forward(self, input: Tensor, hx: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """input (T, B, I), (B, T, I) if batch_first, or (T, I); returns (y, h_n) as torch does."""
        y, (h_n,) = self._run(input, None if hx is None else [hx])
        return y, h_n

    def _forward(self, x: np.ndarray, state0: Arrays, weights: Arrays, **options: Any):
        options["nonlinearity"] = self.nonlinearity
        y, h_n, saved = reference.rnn(x, state0[0], weights, **options)
        return y, (h_n,), saved

    @staticmethod
    def _backward(saved: reference.Saved, dy: np.ndarray, dstate_n: Arrays, truncate: Truncation):
        dx, dh0, dweights = reference.rnn_backward(saved, dy, *dstate_n, truncate=truncate)
        return dx, (dh0,), dweights


class ReferenceLSTM(_ReferenceModule, torch.nn.LSTM):
    """torch.nn.LSTM computed by `rnnfast.reference` (Hochreiter & Schmidhuber 1997, Gers et al.
    2000), proj_size included, with truncated BPTT.

    `truncate`, shapes and errors are as for `ReferenceRNN`.
    """

    _num_states = 2

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """input as for `ReferenceRNN`; returns (y, (h_n, c_n)) as torch does."""
        states = None if hx is None else check_pair(type(self).__name__, hx)
        y, (h_n, c_n) = self._run(input, states)
        return y, (h_n, c_n)

    def _forward(self, x: np.ndarray, state0: Arrays, weights: Arrays, **options: Any):
        y, state_n, _, saved = reference.lstm(x, state0, weights, **options)
        return y, state_n, saved

    @staticmethod
    def _backward(saved: reference.Saved, dy: np.ndarray, dstate_n: Arrays, truncate: Truncation):
        return reference.lstm_backward(saved, dy, *dstate_n, truncate=truncate)
