"""Weights that stay as they are: packed once, and not looked at again.

A call that may not trust its weights either reads them where they lie, one step at a time, or reads
all of them to see whether a packed copy is still right: a tenth of a call of few steps. Runtimes
whose weights are constants save that, and so may whoever serves a finished model here.
"""

from __future__ import annotations

from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import modules
from ._native import core

Module = TypeVar("Module", bound=torch.nn.Module)

_SEQUENCES, _CELLS = (modules.LSTM, modules.RNN), (modules.LSTMCell, modules.RNNCell)
# What the core holds for every module. Not an attribute: copies and pickles would have it too.
_held: WeakKeyDictionary[torch.nn.Module, object] = WeakKeyDictionary()


def freeze(module: Module) -> Module:
    """Promise that the weights of every rnnfast module in `module` stay as they are; returns it.

    For inference on the CPU with one step or few at a time: results are the same but for rounding,
    and calls trust a packed copy of the weights, made by the first of them, which takes as much
    memory again until `thaw`. The promise holds for the memory of the weight matrices as they are
    now. Writes that torch counts (in place, an optimiser's, load_state_dict) end it for the layer,
    as do weights put in their place, moved or converted: it then computes as if never frozen. What
    torch does not see must not happen: writes through `.data`, through memory shared with NumPy or
    other processes, and to tensors of inference mode.

    Copies of the module are not frozen. Of no effect on other devices than the CPU, and on float16,
    which is converted at every call. Freezing twice renews the promise. Raises ValueError, and
    freezes nothing, where a weight is computed anew at every call (a parametrization), or is not
    contiguous.
    """
    found = [m for m in module.modules() if isinstance(m, _SEQUENCES + _CELLS)]
    layers = [_matrices(m) for m in found]
    for m, matrices in zip(found, layers, strict=True):
        _held.pop(m, None)
        if all(weight.is_cpu for layer in matrices for weight in layer):
            _held[m] = core.Frozen(matrices)
    return module


def thaw(module: Module) -> Module:
    """End what `freeze` promised for every module in `module`, and free the copies; returns it."""
    for m in module.modules():
        _held.pop(m, None)
    return module


def is_frozen(module: torch.nn.Module) -> bool:
    """Whether the promise is given for `module` itself, and nothing has ended it for any layer."""
    if module not in _held:
        return False
    try:
        layers = _matrices(module)
    except ValueError:  # a parametrization has come since
        return False
    return all(
        all(weight.is_cpu for weight in matrices) and core.is_frozen(*matrices)
        for matrices in layers
    )


def _matrices(module: torch.nn.Module) -> list[list[Tensor]]:
    """The weight matrices of every layer and direction; the biases are not packed."""
    layers = [""]
    if isinstance(module, torch.nn.RNNBase):
        directions = ("", "_reverse") if module.bidirectional else ("",)
        layers = [f"_l{n}{direction}" for n in range(module.num_layers) for direction in directions]
    projected = ("weight_hr",) if getattr(module, "proj_size", 0) else ()
    names = ("weight_ih", "weight_hh", *projected)
    return [[_constant(module, f"{name}{layer}") for name in names] for layer in layers]


def _constant(module: torch.nn.Module, name: str) -> Tensor:
    weight = module._parameters.get(name)
    if weight is None:
        raise ValueError(
            f"{name} of {type(module).__name__} is not a parameter, but computed anew at every "
            "call: take the parametrization off first"
        )
    if not weight.is_contiguous():
        raise ValueError(
            f"{name} of {type(module).__name__} has strides {weight.stride()}, but should be "
            "contiguous to be frozen"
        )
    return weight
