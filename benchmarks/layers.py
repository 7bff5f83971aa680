"""The single layer in torch.nn, rnnfast and peers, forward and training, as calls to be timed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager

import rnnfast
import torch

from . import peers
from .agreement import check_agreement, check_peer
from .results import OWN_FLOAT32, OWN_FROZEN
from .shapes import GATES, Shape, is_step
from .timing import Call

LAYERS = {
    "torch": {name: getattr(torch.nn, name) for name in GATES},
    "rnnfast": {name: getattr(rnnfast, name) for name in GATES},
}


class LayerProblem:
    """One shape: the same weights, input x (T, B, I) and output gradient dy (T, B, H) for all.

    A module for one step gets x (B, I), dy (B, H) and the state a loop over steps would carry.
    rnnfast stands here a second time: in bfloat16 as float32 on the same numbers, in other dtypes
    forward, with frozen weights, which other peers' are too.

    Args:
        shape: of the layer.
        dtype: of all arrays; other peers know float32 only.
        seed: of weights and inputs.
        other_peers: names from peers.NAMES, for forward passes of layers.
        threads: of those peers; torch and rnnfast use torch's number.
    """

    def __init__(
        self,
        shape: Shape,
        dtype: torch.dtype,
        seed: int = 0,
        other_peers: Sequence[str] = (),
        threads: int = 1,
    ) -> None:
        torch.manual_seed(seed)
        self.shape = shape
        self.layers = {
            name: classes[shape.cell](shape.input_size, shape.hidden_size, dtype=dtype)
            for name, classes in LAYERS.items()
        }
        self.layers["rnnfast"].load_state_dict(self.layers["torch"].state_dict())
        if dtype == torch.bfloat16:
            self.layers[OWN_FLOAT32] = copy.deepcopy(self.layers["rnnfast"]).float()
        else:
            self.layers[OWN_FROZEN] = rnnfast.freeze(copy.deepcopy(self.layers["rnnfast"]))
        self.x = torch.randn(shape.steps, shape.batch, shape.input_size, dtype=dtype)
        self.dy = torch.randn(shape.steps, shape.batch, shape.hidden_size, dtype=dtype)
        if is_step(shape.cell):
            self.x, self.dy = self.x[0], self.dy[0]
            other_peers = ()  # which have layers only
        self.states = torch.rand(2, shape.batch, shape.hidden_size, dtype=dtype)
        self.peers = {
            name: peers.open_peer(name, self.layers["torch"], self.x, threads)
            for name in other_peers
        }

    def calls(self, mode: str) -> dict[str, Call]:
        """The calls to be timed in a `context`: torch, rnnfast in one way or two, other peers."""
        make = {"forward": self._forward_call, "training": self._training_call}[mode]
        calls = {name: make(layer) for name, layer in self._layers(mode).items()}
        if mode == "forward":
            calls |= {name: peer.run for name, peer in self.peers.items()}
        return calls

    @staticmethod
    def context(mode: str) -> AbstractContextManager:
        """What calls are timed in: forward without gradients, as a loop that serves would be.

        Entering it at every call would take 2 us, a fifth of a step of a small layer.
        """
        return torch.set_grad_enabled(mode == "training")

    def _layers(self, mode: str) -> dict[str, torch.nn.Module]:
        without = OWN_FROZEN if mode == "training" else None
        return {name: layer for name, layer in self.layers.items() if name != without}

    def check(self, mode: str) -> None:
        """Raises DisagreementError where results differ by more than rounding."""
        layers = self._layers(mode)
        computed = {name: self._results(layer, mode) for name, layer in layers.items()}
        exact = self._results(copy.deepcopy(self.layers["torch"]).double(), mode)
        # The longest sums: a gate over its inputs, dh over gates, a weight gradient over rows.
        terms = self.shape.input_size + self.shape.hidden_size
        if mode == "training":
            terms += self.shape.gates * self.shape.hidden_size + self.shape.steps * self.shape.batch
        what = f"{self.shape} {mode}"
        for name in ("rnnfast", OWN_FROZEN):
            if name in computed:
                check_agreement(what, computed[name], computed["torch"], exact, terms, whose=name)
        if OWN_FLOAT32 in computed:
            trusted = self._results(copy.deepcopy(self.layers["torch"]).float(), mode)
            check_agreement(what, computed[OWN_FLOAT32], trusted, exact, terms, whose=OWN_FLOAT32)
        if mode == "forward":
            for name, peer in self.peers.items():
                check_peer(what, name, peer.outputs(), exact)

    def _state(self, dtype: torch.dtype) -> tuple:
        """The state as an argument, if there is to be one."""
        h, c = self.states.to(dtype)
        return {"LSTMCell": ((h, c),), "RNNCell": (h,)}.get(self.shape.cell, ())

    def _results(self, layer: torch.nn.Module, mode: str) -> dict[str, torch.Tensor]:
        dtype = _dtype(layer)
        x, dy = self.x.detach().to(dtype), self.dy.to(dtype)
        if mode == "forward":
            with torch.no_grad():
                return _named_outputs(layer(x, *self._state(dtype)))
        x.requires_grad_()
        outputs = layer(x, *self._state(dtype))
        y = _flat(outputs)[0]
        inputs = {"x": x, **dict(layer.named_parameters())}
        gradients = torch.autograd.grad(y, list(inputs.values()), dy)
        named_gradients = zip((f"d{name}" for name in inputs), gradients, strict=True)
        return {**_named_outputs(outputs), **dict(named_gradients)}

    def _forward_call(self, layer: torch.nn.Module) -> Call:
        dtype = _dtype(layer)
        arguments = (self.x.to(dtype), *self._state(dtype))
        return lambda: layer(*arguments)

    def _training_call(self, layer: torch.nn.Module) -> Call:
        dtype = _dtype(layer)
        x = self.x.to(dtype, copy=True).requires_grad_()
        dy = self.dy.to(dtype)
        arguments = (x, *self._state(dtype))
        gives_pair = self.shape.cell != "RNNCell"
        parameters = list(layer.parameters())
        # In training every step changes the weights, so nothing derived from them may be kept from
        # the step before. Writing one entry of each in place makes that so, at no more cost than a
        # call; it is done for both candidates.
        first_entries = [parameter.detach().view(-1)[:1] for parameter in parameters]

        def call() -> object:
            torch._foreach_mul_(first_entries, 1.0)
            outputs = layer(*arguments)
            y = outputs[0] if gives_pair else outputs
            return torch.autograd.grad(y, [x, *parameters], dy)

        return call


def _dtype(layer: torch.nn.Module) -> torch.dtype:
    return next(layer.parameters()).dtype


def _flat(outputs: torch.Tensor | tuple) -> list[torch.Tensor]:
    """What a module gives, y first: (y, h), (y, (h, c)), (h, c) or h alone."""
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    return [tensor for part in outputs for tensor in _flat(part)]


def _named_outputs(outputs: torch.Tensor | tuple) -> dict[str, torch.Tensor]:
    return {
        name: value.detach()
        for name, value in zip(("y", "h_n", "c_n"), _flat(outputs), strict=False)
    }
