"""Argument checks of the functional layer: every user mistake is caught here, before any kernel.

Exceptions have the type torch.nn raises for the same mistake; messages say which argument, what it
has and what it should be. The tests that pass are plain comparisons, as they run on every call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _native

# Devices the operators have kernels for; meta tensors go through the operators' shape functions.
KERNEL_DEVICES = frozenset({"cpu", "meta"} | ({"cuda"} if _native.cuda else set()))
KERNEL_DTYPES = frozenset({torch.float32, torch.float64})
# On the CPU computed in float32 and rounded on the way out.
HALF_DTYPES = frozenset({torch.float16, torch.bfloat16})

# What `memory` may be, and what an LSTM then keeps for a backward pass (`cpu.KEEP`).
MEMORY = {"normal": "all", "low": "cells"}

# w_ih, w_hh, b_ih, b_hh (None without bias), and w_hr where there is a projection.
LayerWeights = tuple[Tensor | None, ...]


def kept_with(memory: str) -> str:
    """What an LSTM keeps for a backward pass with this `memory`."""
    try:
        return MEMORY[memory]
    except (KeyError, TypeError):
        raise ValueError(f"memory must be 'normal' or 'low', got {memory!r}") from None


def shape(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def group_weights(
    kind: str,
    weights: Sequence[Tensor],
    gates: int,
    num_layers: int,
    directions: int,
    bias: bool,
    proj_size: int = 0,
) -> list[LayerWeights]:
    """Sort a flat list of weights by layer and direction, checked against each other."""
    names = (
        ["weight_ih", "weight_hh"] + ["bias_ih", "bias_hh"] * bias + ["weight_hr"] * (proj_size > 0)
    )
    count = len(names)
    if num_layers < 1 or len(weights) != count * num_layers * directions:
        raise RuntimeError(
            f"{kind}: weights has {len(weights)} tensors, expected "
            f"{count * num_layers * directions} ({', '.join(names)} "
            f"for {num_layers} layers x {directions} directions)"
        )
    for position, weight in enumerate(weights):
        if not isinstance(weight, Tensor):
            raise TypeError(
                f"{kind}: weights[{position}] must be a Tensor, got {type(weight).__name__}"
            )
    first = weights[0]
    if first.dim() != 2 or first.shape[0] % gates or not first.shape[0]:
        raise RuntimeError(
            f"{kind}: weights[0] (weight_ih) has shape {shape(first)}, "
            f"expected ({gates} * hidden_size, input_size)"
        )
    rows, inputs = first.shape
    hidden = rows // gates
    out = proj_size or hidden
    expected = (
        [(rows, inputs), (rows, out)]
        + [(rows,), (rows,)] * bias
        + [(out, hidden)] * (proj_size > 0)
    )
    dtype, device = first.dtype, first.device
    groups = []
    for begin in range(0, len(weights), count):
        if begin == count * directions:
            expected[0] = (rows, out * directions)
        group = weights[begin : begin + count]
        for weight, size, name in zip(group, expected, names, strict=True):
            if weight.shape != size:
                raise RuntimeError(
                    f"{kind}: {name} of layer {begin // (count * directions)} has shape "
                    f"{shape(weight)}, expected {size}"
                )
            if weight.dtype != dtype:
                raise RuntimeError(
                    f"{kind}: {name} has dtype {weight.dtype}, expected {dtype} as weight_ih"
                )
            if weight.device != device:
                raise RuntimeError(
                    f"{kind}: {name} is on device {weight.device}, expected {device} as weight_ih"
                )
        if bias:
            groups.append(tuple(group))
        else:
            groups.append((group[0], group[1], None, None, *group[2:]))
    if device.type not in KERNEL_DEVICES:
        built = ""
        if device.type == "cuda":
            built = f" ({_native.cuda_missing}; reinstall with nvcc 12.4 or newer on PATH)"
        raise RuntimeError(
            f"{kind}: rnnfast has no kernels for device {device}{built}; move module and input "
            "to the cpu, or use torch.nn there (rnnfast.revert(module))"
        )
    if dtype not in KERNEL_DTYPES and dtype not in HALF_DTYPES:
        raise RuntimeError(
            f"{kind}: weights have dtype {dtype}, expected float32, float64, bfloat16 or float16"
        )
    return groups


def like_weights(kind: str, name: str, tensor: Tensor, weight: Tensor, error: type) -> Tensor:
    """`tensor`, known to be of the weights' device and dtype; under autocast it is cast to it."""
    if tensor.device != weight.device:
        raise RuntimeError(
            f"{kind}: {name} is on device {tensor.device}, expected {weight.device} as the weights"
        )
    if tensor.dtype != weight.dtype:
        if tensor.is_floating_point() and autocast_enabled(weight.device):
            return tensor.to(weight.dtype)
        raise error(
            f"{kind}: {name} has dtype {tensor.dtype}, weights have {weight.dtype}; "
            f"use {name}.to({weight.dtype}) or module.to({tensor.dtype})"
        )
    return tensor


def autocast_enabled(device: torch.device) -> bool:
    """Whether torch.autocast is on for this device; it doesn't know meta tensors."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def check_input(kind: str, x: Tensor, weight: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The input, known to have one of the numbers of dimensions and to fit weight_ih of layer 0."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{kind}: input must be a Tensor, got {type(x).__name__}")
    if x.dim() not in dims:
        raise ValueError(
            f"{kind}: input has {x.dim()} dimensions {shape(x)}, "
            f"expected {' or '.join(map(str, dims))}"
        )
    x = like_weights(kind, "input", x, weight, ValueError)
    if x.shape[-1] != weight.shape[1]:
        raise RuntimeError(
            f"{kind}: input.size(-1) is {x.shape[-1]}, expected input_size {weight.shape[1]}"
        )
    return x


def check_states(
    kind: str,
    states: Sequence[Tensor],
    shapes: Sequence[tuple[int, ...]],
    weight: Tensor,
    dims: tuple[int, ...] | None = None,
) -> list[Tensor]:
    """The initial states (h_0,) or (h_0, c_0), known to have these shapes and the weights' dtype.

    dims: numbers of dimensions outside of which the mistake is a ValueError, as in torch's cells.
    """
    checked = []
    for i, (state, expected) in enumerate(zip(states, shapes, strict=True)):
        name = "hx" if len(shapes) == 1 else f"hx[{i}]"
        if not isinstance(state, Tensor):
            raise TypeError(f"{kind}: {name} must be a Tensor, got {type(state).__name__}")
        if state.shape != expected:
            error = ValueError if dims and state.dim() not in dims else RuntimeError
            raise error(f"{kind}: {name} has shape {shape(state)}, expected {expected}")
        checked.append(like_weights(kind, name, state, weight, RuntimeError))
    return checked


def check_pair(kind: str, hx: Sequence[Tensor]) -> Sequence[Tensor]:
    """hx of an LSTM, known to be two things."""
    if isinstance(hx, (tuple, list)) and len(hx) == 2:
        return hx
    got = f"{len(hx)} values" if isinstance(hx, (tuple, list)) else type(hx).__name__
    raise RuntimeError(f"{kind}: hx must be a pair (h_0, c_0), got {got}")
