"""The operators on CUDA tensors: products by torch (cuBLAS), the recurrence by our kernels.

`Layers` is written against the extension module it is given and the tensors it gets, so the same
code runs on a GPU with `_cuda` and, in tests, on CPU tensors with the emulator of the kernels.
Everything is queued on torch's current stream and allocated by torch; nothing waits for the device.

Sums and cell states are float32 where the layer's dtype has 16 bits: c is kept in float32 then, and
c_n rounded to the layer's dtype at the end. float32 products use TF32 where
torch.backends.cuda.matmul.allow_tf32 says so, in the recurrence as in torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from . import _native, bidirectional
from .ops import _check, _expect, _kept_shapes, _wants_and_biases, window

_FORMATS = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}
_HALF = (torch.float16, torch.bfloat16)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and of the cell state of every step, c, in a layer of `dtype`."""
    return torch.float32 if dtype in _HALF else dtype


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _dense(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype or tensor.dtype).contiguous()


@dataclass(frozen=True)
class Recurrence:
    """What a direction asks of a launch.

    which: "forward" or "backward". cell: "lstm", "tanh" or "relu". like: a tensor of the layer's
    device and dtype. sizes: T, B, H, k1, k2. arrays: in the order of csrc/rnnfast.h.
    """

    which: str
    cell: str
    like: Tensor
    sizes: tuple[int, int, int, int, int]
    reverse: bool
    arrays: tuple[Tensor | None, ...]


def _operator(direction: Callable[..., Generator]) -> Callable[..., tuple]:
    """A method that computes one direction, from a generator that stops where it wants a launch.

    It yields its Recurrence, or None where there is nothing to launch, and returns the results.
    `Layers.run` takes two of them as far as the launch that they share.
    """

    @wraps(direction)
    def method(self, *args):
        return self.run(direction.__name__, [args])[0]

    method.direction = direction
    return method


class Layers:
    """A layer in one direction or in both, by the kernels of one extension module.

    native: `_cuda` or the emulator. method: "local", "cluster", "grid", "steps" or "gemm" to force
    how the recurrence runs, "" to let the planner choose. Arguments and results of the methods are
    those of the operators in ops.py.
    """

    def __init__(self, native: Any, method: str = "") -> None:
        self.native = native
        self.method = method
        self.plans = lru_cache(maxsize=1024)(self._new_plans)
        self._device = lru_cache(maxsize=None)(native.device_properties)

    def run(self, name: str, calls: Sequence[tuple]) -> list[tuple]:
        """The results of an operator's calls: one, or two of a layer's directions side by side."""
        device = next(arg for arg in calls[0] if isinstance(arg, Tensor)).device.type
        if torch.is_autocast_enabled(device):
            # It would hand our kernels products of another dtype than they were promised.
            with torch.autocast(device, enabled=False):
                return self.run(name, calls)
        directions = [getattr(type(self), name).direction(self, *call) for call in calls]
        recurrences = [next(direction) for direction in directions]
        if recurrences[0] is not None:
            self._launch(recurrences)
        return [_finished(direction) for direction in directions]

    @_operator
    def lstm_layer(self, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, k1, k2, keep):
        T, B, _, H = _check(4, x, w_ih, w_hh, b_ih, b_hh, {"h0": h0, "c0": c0})
        window(T, k1, k2)
        wide = state_dtype(x.dtype)
        c_shape, gates_shape = _kept_shapes(keep, T, B, H)
        c = x.new_empty(c_shape, dtype=wide)
        if T == 0 or B == 0:
            yield None
            gates = x.new_empty(gates_shape)
            return x.new_empty(T, B, H), h0.clone(), c0.clone(), c, gates
        h0, c0, w_hh = _dense(h0), _dense(c0, wide), _dense(w_hh)
        a = _project(x, w_ih, b_ih, b_hh)
        y, h_n, c_n = (
            torch.empty_like(a[..., :H], memory_format=torch.contiguous_format),
            *(
                x.new_empty(B, H),
                x.new_empty(B, H, dtype=wide),
            ),
        )
        gates = a if keep == "all" else None  # each gate takes the place of its pre-activation
        arrays = (a, w_hh, h0, c0, y, h_n, c_n, None if keep == "nothing" else c, gates)
        yield Recurrence("forward", "lstm", x, (T, B, H, T, T), reverse, arrays)
        gates = x.new_empty(0) if gates is None else gates.view(gates_shape)
        return y, h_n, c_n.to(x.dtype), c, gates

    @_operator
    def rnn_layer(self, x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, reverse, k1, k2):
        T, B, _, H = _check(1, x, w_ih, w_hh, b_ih, b_hh, {"h0": h0})
        window(T, k1, k2)
        cell = _cell(nonlinearity)
        if T == 0 or B == 0:
            yield None
            return x.new_empty(T, B, H), h0.clone()
        h0, w_hh = _dense(h0), _dense(w_hh)
        a = _project(x, w_ih, b_ih, b_hh)
        y, h_n = torch.empty_like(a), x.new_empty(B, H)
        arrays = (a, w_hh, h0, None, y, h_n, None, None, None)
        yield Recurrence("forward", cell, x, (T, B, H, T, T), reverse, arrays)
        return y, h_n

    @_operator
    def lstm_layer_backward(
        self, dy, dh_n, dc_n, dc, x, h0, c0, w_ih, w_hh, y, c, gates, reverse, k1, k2, *rest
    ):
        wants, biases = _wants_and_biases(*rest)
        states = {"h0": h0, "c0": c0, "dh_n": dh_n, "dc_n": dc_n}
        T, B, _, H = _check(4, x, w_ih, w_hh, *biases, states)
        wide = state_dtype(x.dtype)
        for name, tensor in {"dy": dy, "y": y}.items():
            _expect(name, tensor, (T, B, H), x)
        for name, tensor in {"dc": dc, "c": c}.items():
            _expect(name, tensor, (T, B, H), x.new_empty(0, dtype=wide))
        _expect("gates", gates, (T, B, 4, H), x)
        if T == 0 or B == 0:
            yield None
            dh0 = torch.zeros_like(h0) if dh_n is None else dh_n.clone()
            dc0 = torch.zeros_like(c0) if dc_n is None else dc_n.clone()
            dx, dw_ih, dw_hh, db = _no_gradients(x, w_ih, w_hh, *wants)
            return dx, dh0, dc0, dw_ih, dw_hh, db
        k1, k2 = window(T, k1, k2)
        da, dh0 = x.new_empty(T, B, 4 * H), x.new_empty(B, H)
        dc0 = x.new_empty(B, H, dtype=wide)
        if gates is None:
            gates = _gates(x, h0, w_ih, w_hh, *biases, y, reverse)
        dy, dh_n, w_hh, gates = _dense(dy), _dense(dh_n), _dense(w_hh), _dense(gates)
        dc_n, dc, c = _dense(dc_n, wide), _dense(dc, wide), _dense(c)
        arrays = (dy, dh_n, dc_n, dc, w_hh, _dense(c0, wide), None, c, gates, da, dh0, dc0)
        yield Recurrence("backward", "lstm", x, (T, B, H, k1, k2), reverse, arrays)
        dx, dw_ih, dw_hh, db = _products(da, x, h0, w_ih, y, reverse, *wants)
        return dx, dh0, dc0.to(x.dtype), dw_ih, dw_hh, db

    @_operator
    def rnn_layer_backward(
        self, dy, dh_n, x, h0, w_ih, w_hh, y, nonlinearity, reverse, k1, k2, *wants
    ):
        T, B, _, H = _check(1, x, w_ih, w_hh, None, None, {"h0": h0, "dh_n": dh_n})
        for name, tensor in {"dy": dy, "y": y}.items():
            _expect(name, tensor, (T, B, H), x)
        cell = _cell(nonlinearity)
        if T == 0 or B == 0:
            yield None
            dh0 = torch.zeros_like(h0) if dh_n is None else dh_n.clone()
            dx, dw_ih, dw_hh, db = _no_gradients(x, w_ih, w_hh, *wants)
            return dx, dh0, dw_ih, dw_hh, db
        k1, k2 = window(T, k1, k2)
        da, dh0 = x.new_empty(T, B, H), x.new_empty(B, H)
        dy, dh_n, w_hh, y = _dense(dy), _dense(dh_n), _dense(w_hh), _dense(y)
        arrays = (dy, dh_n, None, None, w_hh, None, y, None, None, da, dh0, None)
        yield Recurrence("backward", cell, x, (T, B, H, k1, k2), reverse, arrays)
        dx, dw_ih, dw_hh, db = _products(da, x, h0, w_ih, y, reverse, *wants)
        return dx, dh0, dw_ih, dw_hh, db

    def _launch(self, recurrences: list[Recurrence]) -> None:
        """Plan recurrences that differ in their direction alone, and queue them."""
        first = recurrences[0]
        x, index = first.like, first.like.device.index or 0
        number = number_format(x.dtype, self._device(index).capability)
        work = (first.which, first.cell, number, *first.sizes)
        plans = self.plans(self._device(index), len(recurrences), *work)
        kernel = getattr(self.native, f"{first.which}_{_FORMATS[x.dtype]}")
        stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
        shared = [recurrences] if len(plans) == 1 else [[each] for each in recurrences]
        for plan, together in zip(plans, shared, strict=True):
            if plan.method == "gemm":
                for each in together:
                    self._by_products(plan, each, index, stream)
                continue
            scratch = x.new_empty(plan.scratch_bytes, dtype=torch.uint8)
            addresses = [list(map(_address, each.arrays)) for each in together]
            reverse = [each.reverse for each in together]
            kernel(plan, reverse, addresses, _address(scratch), index, stream)

    def _by_products(self, plan: Any, one: Recurrence, index: int, stream: int) -> None:
        """A recurrence by a product of torch's and a launch of the cells for every step.

        The host must not fall behind: all that steps have in common is made before the first.
        """
        forward = one.which == "forward"
        if forward:
            _, w_hh, h0, _, outputs, *_ = one.arrays
            weights = w_hh.t()
        else:
            weights, outputs, dh0 = one.arrays[4], *one.arrays[9:11]
        B, wide = one.sizes[1], state_dtype(one.like.dtype)
        sums = outputs.new_empty(B, weights.shape[1], dtype=wide)
        multiply = _product_into(sums, weights)
        make = getattr(self.native, f"{one.which}_cells_{_FORMATS[one.like.dtype]}")
        addresses = list(map(_address, one.arrays))
        cells = make(plan, one.reverse, addresses, _address(sums), index, stream)
        vectors = outputs.unbind()
        if forward == one.reverse:
            vectors = vectors[::-1]
        if forward:
            multiply(h0)
        cells(0)  # going back, nothing comes before the first step
        for p in range(1, len(vectors)):
            multiply(vectors[p - 1])
            cells(p)
        if not forward:
            multiply(vectors[-1])
            dh0.copy_(sums)

    def _new_plans(self, device, directions, which, cell, number, *sizes) -> list[Any]:
        """The plans of the launches that follow each other; `cycles` are a step's, estimated.

        One for both directions, which then share the device, or one for each where that would
        take longer than two launches: weights that all of the device's registers and shared
        memory hold for one direction may be too many for two.
        """
        work = (device, which == "backward", cell, number, *sizes)
        together = self.native.plan(*work, directions, self.method)
        if directions == 1:
            return [together]
        alone = self.native.plan(*work, 1, self.method)
        return [alone, alone] if 2 * alone.cycles < together.cycles else [together]


def _finished(direction: Generator) -> tuple:
    try:
        next(direction)
    except StopIteration as end:
        return end.value
    raise AssertionError("a direction asks for one launch")


def _product_into(sums: Tensor, weights: Tensor) -> Callable[[Tensor], Any]:
    """A function that writes vectors (B, K) times weights (K, N) to `sums`, of these' dtype."""
    mm = torch.mm
    if weights.dtype == sums.dtype:
        return lambda vectors: mm(vectors, weights, out=sums)
    if weights.is_cuda and hasattr(torch.ops.aten.mm, "dtype_out"):  # torch 2.8 or newer
        dtype = sums.dtype
        return lambda vectors: mm(vectors, weights, out_dtype=dtype, out=sums)
    weights = weights.to(sums.dtype)
    return lambda vectors: mm(vectors.to(sums.dtype), weights, out=sums)


def number_format(dtype: torch.dtype, capability: int) -> str:
    """What the kernels compute in: the planner's name for it; NotImplementedError for others."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 and capability >= 80:
        return "tf32"
    try:
        return _FORMATS[dtype]
    except KeyError:
        raise NotImplementedError(
            f"rnnfast's CUDA kernels have no {dtype}; they compute in float32, float64, "
            "float16 and bfloat16"
        ) from None


def _cell(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity is {nonlinearity!r}, but should be 'tanh' or 'relu'")
    return nonlinearity


def _project(x: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """x W_ih^T + b_ih + b_hh over all steps: (T, B, G * H), dense."""
    biases = [b for b in (b_ih, b_hh) if b is not None]
    T, B, I = x.shape
    rows = x.reshape(T * B, I)
    if biases:
        a = torch.addmm(sum(biases[1:], biases[0]), rows, w_ih.t())
    else:
        a = torch.mm(rows, w_ih.t())
    return a.view(T, B, -1)


def _gates(x, h0, w_ih, w_hh, b_ih, b_hh, y, reverse):
    """The gates (T, B, 4, H) of an LSTM that has kept its h, not them: in two products."""
    T, B, H = y.shape
    a = _project(x, w_ih, b_ih, b_hh)
    first, later, before = _steps(reverse)
    a[first].addmm_(h0, w_hh.t())
    a[later].view((T - 1) * B, 4 * H).addmm_(y[before].reshape((T - 1) * B, H), w_hh.t())
    gates = a.view(T, B, 4, H)
    gates[:, :, :2].sigmoid_()
    gates[:, :, 2].tanh_()
    gates[:, :, 3].sigmoid_()
    return gates


def _steps(reverse: bool) -> tuple[int, slice, slice]:
    """The first step in processing order, the others, and those before the others."""
    return (-1, slice(-1), slice(1, None)) if reverse else (0, slice(1, None), slice(-1))


def _products(da, x, h0, w_ih, y, reverse, want_x, want_w_ih, want_w_hh, want_b):
    """dx, dw_ih, dw_hh, db from da (T, B, G * H): products and sums over all steps."""
    T, B, rows = da.shape
    flat = da.view(T * B, rows)
    dx = torch.mm(flat, w_ih).view(x.shape) if want_x else x.new_empty(0)
    dw_ih = torch.mm(flat.t(), x.reshape(T * B, x.shape[-1])) if want_w_ih else x.new_empty(0)
    dw_hh = db = x.new_empty(0)
    if want_w_hh:
        first, later, before = _steps(reverse)
        dw_hh = torch.mm(da[first].t(), h0)
        if T > 1:
            h_prev = y[before].reshape((T - 1) * B, -1)
            dw_hh = torch.addmm(dw_hh, da[later].reshape((T - 1) * B, rows).t(), h_prev)
    if want_b:
        db = flat.sum(0)
    return dx, dw_ih, dw_hh, db


def _no_gradients(x, w_ih, w_hh, want_x, want_w_ih, want_w_hh, want_b):
    """The same where there is no step or no batch row."""
    return (
        x.new_zeros(x.shape if want_x else (0,)),
        x.new_zeros(w_ih.shape if want_w_ih else (0,)),
        x.new_zeros(w_hh.shape if want_w_hh else (0,)),
        x.new_zeros((w_hh.shape[0],) if want_b else (0,)),
    )


def register() -> None:
    """Hands the operators of ops.py their CUDA kernels, where these were built."""
    if _native.cuda is None:
        return
    layers = Layers(_native.cuda)
    for name in ("lstm_layer", "rnn_layer", "lstm_layer_backward", "rnn_layer_backward"):
        torch.library.impl(f"rnnfast::{name}", "CUDA")(getattr(layers, name))
    for name, kernel in bidirectional.kernels(layers.run).items():
        torch.library.impl(f"rnnfast::bidirectional_{name}", "CUDA")(kernel)
