"""Runs a torch.nn module and its rnnfast twin on the same inputs and compares all they compute."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from tolerance import assert_close
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def tensors(value: Any) -> list[Tensor]:
    """The tensors of nested results, in order; of a PackedSequence its data."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value or () for t in tensors(part)]


def leaves(value: Any) -> Any:
    """Nested inputs as new leaves that require grad, strides kept."""
    if isinstance(value, PackedSequence):
        return PackedSequence(leaves(value.data), *value[1:])
    if isinstance(value, Tensor):
        return value.detach().requires_grad_()
    return value if value is None else type(value)(leaves(part) for part in value)


def outputs_and_grads(
    function: Any, weights: list[Tensor], args: tuple, seed: int = 0
) -> dict[str, Tensor]:
    """Every output of function(*args) and the gradients, under random cotangents, of all inputs."""
    args = leaves(args)
    torch.manual_seed(seed)
    outputs = tensors(function(*args))
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]
    inputs = [*tensors(args), *weights]
    grads = torch.autograd.grad(outputs, inputs, cotangents)
    return {
        **{f"output {i}": y for i, y in enumerate(outputs)},
        **{f"gradient {i}": g for i, g in enumerate(grads)},
    }


def assert_agree(ours: torch.nn.Module, theirs: torch.nn.Module, *args: Any, seed: int = 0) -> None:
    """Fail unless outputs and gradients of inputs and weights agree within their arithmetic.

    Both modules see the same random numbers, so dropout may be on.
    """
    got = outputs_and_grads(ours, list(ours.parameters()), args, seed)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LSTM with projections is not supported with oneDNN")
        want = outputs_and_grads(theirs, list(theirs.parameters()), args, seed)
    assert got.keys() == want.keys()
    steps = len(got["output 0"].reshape(-1, got["output 0"].shape[-1]))  # T * B
    K = theirs.input_size + 2 * theirs.hidden_size + steps
    # Cotangents are of order one.
    gradients = [t for name, t in want.items() if name.startswith("gradient") and t.numel()]
    largest = max([1.0, *(t.abs().max().item() for t in gradients)])
    for name in got:
        T = max(steps, 1) * getattr(theirs, "num_layers", 1)
        assert got[name].dtype == want[name].dtype, name
        scale = largest if name.startswith("gradient") else 0.0
        assert_close(got[name], want[name], K=K, T=T, scale=scale, name=name)
