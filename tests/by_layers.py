"""One layer through `cuda_ops.Layers`: on a GPU, or on the processor with the emulator."""

from __future__ import annotations

import torch
from one_layer import Case
from rnnfast.cuda_ops import Layers
from torch import Tensor


def by_layers(
    layers: Layers, case: Case, dtype: torch.dtype, device: str = "cpu", keep: str = "all"
) -> dict[str, Tensor]:
    """Outputs and gradients by name, as `one_layer.by_operator` gives them."""
    inputs = {name: value.to(device) for name, value in case.inputs(dtype).items()}
    upstream = {name: value.to(device) for name, value in case.cotangents(dtype).items()}
    k1, k2 = case.truncate or (0, 0)
    weights = [inputs["w_ih"], inputs["w_hh"]]
    biases = [inputs.get("b_ih"), inputs.get("b_hh")]
    options, wants = (case.reverse, k1, k2), (True,) * 4
    x, h0, c0 = inputs["x"], inputs["h0"], inputs.get("c0")
    if case.cell == "lstm":
        y, h_n, c_n, c, gates = layers.lstm_layer(x, h0, c0, *weights, *biases, *options, keep)
        dc = upstream.get("c")
        upstream["c"] = dc if dc is None else dc.to(c.dtype)
        dx, dh0, dc0, *dw = layers.lstm_layer_backward(
            *map(upstream.get, ("y", "h_n", "c_n", "c")),
            *(x, h0, c0, *weights, y, c, gates if keep == "all" else None, *options, *wants),
            *(() if keep == "all" else biases),
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
