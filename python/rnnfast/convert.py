"""convert() puts rnnfast under an existing model, revert() takes it out again.

A torch.nn.LSTM and a rnnfast.LSTM hold the same things and differ in what `forward` does. So a
module is converted by exchanging its class in place: identity, parameters, buffers, hooks, names
and the optimiser's references stay as they are, and a module used in two places stays one module.
"""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch
from torch.nn.utils import parametrize

from . import checks, modules
from .bptt import Truncation

Module = TypeVar("Module", bound=torch.nn.Module)

_FAST = {
    torch.nn.RNN: modules.RNN,
    torch.nn.LSTM: modules.LSTM,
    torch.nn.RNNCell: modules.RNNCell,
    torch.nn.LSTMCell: modules.LSTMCell,
}
_TORCH = {fast: slow for slow, fast in _FAST.items()}


def convert(module: Module, *, truncate: Truncation = None, memory: str = "normal") -> Module:
    """Let every torch.nn.RNN, LSTM, RNNCell and LSTMCell in `module` compute with rnnfast.

    Works in place on `module` itself and everything inside it, and returns it. truncate, if given,
    is set on the RNNs and LSTMs converted (cells have one step and nothing to truncate), memory on
    the LSTMs. Classes of your own derived from torch's are left alone, as their forward may be
    theirs; so are modules already of rnnfast. Raises TypeError or ValueError for a bad truncate or
    memory, and then changes nothing.
    """
    found = _find(module, _FAST)
    sequences = [m for m in found if isinstance(m, torch.nn.RNNBase)]
    checks.kept_with(memory)
    kept = [modules.check_truncate(m, truncate) for m in sequences]
    for m in found:
        _exchange(m, _FAST)
    for m, value in zip(sequences, kept, strict=True):
        m.truncate = value
        if isinstance(m, torch.nn.LSTM):
            m.memory = memory
    return module


def revert(module: Module) -> Module:
    """Undo `convert`: every rnnfast module in `module` becomes torch.nn's. In place; returns it.

    torch.nn can't truncate: `truncate` is dropped where it is set, with a UserWarning, since
    gradients are those of full BPTT from then on. So is `memory`, which changes no result.
    """
    for m in _find(module, _TORCH):
        _exchange(m, _TORCH)
        m.__dict__.pop("memory", None)
        if m.__dict__.pop("truncate", None) is not None:
            warnings.warn(
                "revert: torch.nn can't truncate, gradients are of full BPTT now", stacklevel=2
            )
    return module


def _find(module: torch.nn.Module, table: dict[type, type]) -> list[torch.nn.Module]:
    return [m for m in module.modules() if _plain_class(m) in table]


def _plain_class(module: torch.nn.Module) -> type:
    """A module's class, seen through the one that torch.nn.utils.parametrize puts before it."""
    cls = type(module)
    return cls.__base__ if parametrize.is_parametrized(module) else cls


def _exchange(module: torch.nn.Module, table: dict[type, type]) -> None:
    cls = type(module)
    new = table[_plain_class(module)]
    if cls not in table:  # parametrized: its class holds the properties that compute the weights
        own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        new = type(cls.__name__, (new,), own)
    module.__class__ = new
