"""The CUDA kernels on the emulator, as the module `native`, on a device that tests choose.

`make test` builds it (`make emulator`); it is no part of the package.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from one_layer import Case
from rnnfast import cuda_ops
from torch import Tensor

_BUILT = Path(__file__).parents[1] / "build" / "emulator"
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
    "largest_cluster": 8,
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


def run(case: Case, dtype: torch.dtype, method: str = "") -> dict[str, Tensor]:
    """Outputs and gradients of a layer by name, as `one_layer.by_operator` gives them."""
    layers = cuda_ops.Layers(native, method)
    inputs, upstream = case.inputs(dtype), case.cotangents(dtype)
    k1, k2 = case.truncate or (0, 0)
    weights = [inputs["w_ih"], inputs["w_hh"]]
    biases = [inputs.get("b_ih"), inputs.get("b_hh")]
    options, wants = (case.reverse, k1, k2), (True,) * 4
    x, h0, c0 = inputs["x"], inputs["h0"], inputs.get("c0")
    if case.cell == "lstm":
        y, h_n, c_n, c, gates = layers.lstm_layer(x, h0, c0, *weights, *biases, *options, True)
        dc = upstream.get("c")
        upstream["c"] = dc if dc is None else dc.to(c.dtype)
        dx, dh0, dc0, *dw = layers.lstm_layer_backward(
            *map(upstream.get, ("y", "h_n", "c_n", "c")),
            *(x, h0, c0, *weights, y, c, gates, *options, *wants),
        )
        results = {
            "y": y,
            "h_n": h_n,
            "c_n": c_n,
            "c": c.to(dtype),
            "dx": dx,
            "dh0": dh0,
            "dc0": dc0,
        }
    else:
        y, h_n = layers.rnn_layer(x, h0, *weights, *biases, case.cell, *options)
        dx, dh0, *dw = layers.rnn_layer_backward(
            *map(upstream.get, ("y", "h_n")), x, h0, *weights, y, case.cell, *options, *wants
        )
        results = {"y": y, "h_n": h_n, "dx": dx, "dh0": dh0}
    results |= {"dw_ih": dw[0], "dw_hh": dw[1]}
    return results | {f"d{name}": dw[2] for name in ("b_ih", "b_hh") if name in inputs}
