"""The CUDA kernels on the emulator, as the module `native`, on a device that tests choose.

`make test` builds it (`make emulator`); it is no part of the package. The environment variable
RNNFAST_EMULATOR names another folder to take it from, such as one built with sanitizers.
"""

from __future__ import annotations

import os
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from by_layers import by_layers
from one_layer import Case
from rnnfast import bidirectional, cuda_ops
from torch import Tensor

_BUILT = Path(
    os.environ.get("RNNFAST_EMULATOR", Path(__file__).parents[1] / "build" / "emulator")
).resolve()
sys.path.append(str(_BUILT))
try:
    import _emulated as native
except ImportError as error:
    raise ImportError(
        f"no emulator of the CUDA kernels in {_BUILT}: run `make emulator`"
    ) from error

DEVICE = {
    "capability": 90,
    "multiprocessors": 132,
    "shared_bytes": 232448,
    "largest_cluster": 16,
    "cooperative": True,
}


def device(**properties) -> native.Device:
    """An H200, or what else the properties make of it."""
    return native.Device(**(DEVICE | properties))


@contextmanager
def emulating(seed: int = 1, **properties):
    """The emulator with a device like this, its threads taking turns in the order of this seed."""
    native.set_device(device(**properties))
    native.set_seed(seed)
    try:
        yield
    finally:
        native.set_device(device())


def run(case: Case, dtype: torch.dtype, method: str = "", keep: str = "all") -> dict[str, Tensor]:
    """Outputs and gradients of a layer by name, as `one_layer.by_operator` gives them."""
    return by_layers(cuda_ops.Layers(native, method), case, dtype, keep=keep)


@contextmanager
def operators(layers: cuda_ops.Layers):
    """All operators on CPU tensors run their CUDA kernels on the emulator."""
    kernels = {name: getattr(layers, name) for name in bidirectional.kernels(layers.run)}
    for name, kernel in bidirectional.kernels(layers.run).items():
        kernels[f"bidirectional_{name}"] = kernel
    library = torch.library.Library("rnnfast", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # that there are kernels for the CPU
        for name, kernel in kernels.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


@contextmanager
def bidirectional_operators(method: str = ""):
    """The same, by layers of their own."""
    layers = cuda_ops.Layers(native, method)
    with operators(layers):
        yield layers
