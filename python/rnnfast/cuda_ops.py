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
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native, bidirectional
from .ops import (
    _check,
    _expect,
    _kept_shapes,
    _wants_and_batch_sizes,
    _wants_and_biases,
    window,
)

FORMATS = {
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
    if tensor is None:
        return None
    if dtype is not None and tensor.dtype is not dtype:
        tensor = tensor.to(dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


_raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)  # public ways make an object


def _current_stream(x: Tensor) -> int:
    if not x.is_cuda:
        return 0
    if _raw_stream is None:
        return torch.cuda.current_stream(x.device).cuda_stream
    return _raw_stream(x.get_device())


class Recurrence(NamedTuple):
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

    native: `_cuda` or the emulator. method: one of docs/cuda.md ("local", "cluster", "grid",
    "resident", "steps" or "gemm") to force how the recurrence runs, "" to let the planner choose.
    Arguments and results of the methods are those of the operators in ops.py.
    """

    def __init__(self, native: Any, method: str = "") -> None:
        self.native = native
        self.method = method
        self.plans = lru_cache(maxsize=1024)(self._new_plans)
        self._device = lru_cache(maxsize=None)(native.device_properties)
        self._launches = lru_cache(maxsize=1024)(self._new_launches)
        self._zeros = _Zeros()

    def forward(
        self, cell, sizes, reverse, keep, x, h0, c0, w_ih, w_hh, b_ih, b_hh, state_shape
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """y, h_n, c_n and, as `keep` says, c (T, B, H) and gates; as cpu.forward, on checked sizes.

        sizes: T, B, I, H, none of them 0. h0 and c0, of state_shape, may be None for zeros. What is
        not kept is None. Gates have the shape of y but 4 * H features.
        """
        T, B, _, H = sizes
        own = h0, c0, w_ih, w_hh, b_ih, b_hh
        arrays = self._forward_arrays(cell, sizes, keep, x, own, state_shape)
        self._launch("forward", cell, x, (T, B, H, T, T), (reverse,), (arrays,))
        return _given(arrays, x)

    def forward_both(self, cell, sizes, keep, x, first, second) -> tuple[Tensor, tuple, tuple]:
        """y (T, B, 2 * H) of both directions and, of each, h_n, c_n, c and gates as `forward`.

        first, second: h0, c0, w_ih, w_hh, b_ih, b_hh of the direction and of the reverse one.
        """
        T, B, _, H = sizes
        directions = [
            self._forward_arrays(cell, sizes, keep, x, own, (B, H)) for own in (first, second)
        ]
        self._launch("forward", cell, x, (T, B, H, T, T), (False, True), directions)
        (y, *given), (y_reverse, *given_reverse) = (_given(arrays, x) for arrays in directions)
        return torch.cat((y, y_reverse), -1), given, given_reverse

    def backward(
        self, cell, sizes, reverse, k1, k2, upstream, saved, wants
    ) -> tuple[Tensor | None, ...]:
        """dx, dh0, dc0, dw_ih, dw_hh and db where `wants` has True; as cpu.backward.

        Of the saved tensors h0 and c0 are None where `forward` was given None, if no gradient is
        wanted of them.
        """
        T, B, _, H = sizes
        arrays = self._backward_arrays(cell, sizes, reverse, upstream, saved)
        self._launch("backward", cell, saved[0], (T, B, H, k1, k2), (reverse,), (arrays,))
        return _gradients(arrays, sizes, reverse, saved, wants)

    def backward_both(
        self, cell, sizes, k1, k2, upstreams, saved, wants
    ) -> tuple[tuple[Tensor | None, ...], tuple[Tensor | None, ...]]:
        """The gradients of either direction, each as `backward`, dx the part that it brings.

        upstreams, saved and wants: those of the direction and those of the reverse one.
        """
        T, B, _, H = sizes
        directions = [
            self._backward_arrays(cell, sizes, reverse, upstreams[reverse], saved[reverse])
            for reverse in (False, True)
        ]
        x = saved[0][0]
        self._launch("backward", cell, x, (T, B, H, k1, k2), (False, True), directions)
        return tuple(
            _gradients(directions[reverse], sizes, reverse, saved[reverse], wants[reverse])
            for reverse in (False, True)
        )

    def _forward_arrays(self, cell, sizes, keep, x, own, state_shape) -> tuple[Tensor | None, ...]:
        _, B, _, H = sizes
        h0, c0, *weights = own
        wide = state_dtype(x.dtype)
        if h0 is None:
            h0 = self._zeros(x, B, H, x.dtype)
            c0 = self._zeros(x, B, H, wide) if cell == "lstm" else None
        else:
            h0, c0 = _dense(h0), _dense(c0, wide)
        return _forward_arrays(cell, keep, x, h0, c0, *weights, state_shape)

    def _backward_arrays(self, cell, sizes, reverse, upstream, saved) -> tuple[Tensor | None, ...]:
        T, B, _, H = sizes
        x, h0, c0, w_ih, w_hh, b_ih, b_hh, y, c, gates = saved
        if cell == "lstm":
            if gates is None:
                gates = _gates(x, h0, w_ih, w_hh, b_ih, b_hh, y, sizes, reverse)
            wide = state_dtype(x.dtype)
            c0 = self._zeros(x, B, H, wide) if c0 is None else _dense(c0, wide)
        state_shape = (B, H) if h0 is None else h0.shape
        return _backward_arrays(cell, upstream, w_hh, c0, y, c, gates, state_shape, (T, B))

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
            which, cell, like, sizes, *_ = recurrences[0]
            *_, reverse, arrays = zip(*recurrences, strict=True)
            self._launch(which, cell, like, sizes, reverse, arrays)
        return [_finished(direction) for direction in directions]

    @_operator
    def lstm_layer(
        self, x, h0, c0, w_ih, w_hh, b_ih, b_hh, reverse, k1, k2, keep, batch_sizes=None
    ):
        _refuse_packed(batch_sizes)
        T, B, _, H = _check(4, x, w_ih, w_hh, b_ih, b_hh, {"h0": h0, "c0": c0})
        window(T, k1, k2)
        wide = state_dtype(x.dtype)
        c_shape, gates_shape = _kept_shapes(keep, T, B, H)
        if T == 0 or B == 0:
            yield None
            kept = x.new_empty(c_shape, dtype=wide), x.new_empty(gates_shape)
            return x.new_empty(T, B, H), h0.clone(), c0.clone(), *kept
        states = (_dense(h0), _dense(c0, wide))
        arrays = _forward_arrays("lstm", keep, x, *states, w_ih, w_hh, b_ih, b_hh, (B, H))
        yield Recurrence("forward", "lstm", x, (T, B, H, T, T), reverse, arrays)
        y, h_n, c_n, c, gates = arrays[4:]
        gates = x.new_empty(0) if gates is None else gates.view(gates_shape)
        c = x.new_empty(0, dtype=wide) if c is None else c
        return y, h_n, c_n.to(x.dtype), c, gates

    @_operator
    def rnn_layer(
        self, x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, reverse, k1, k2, batch_sizes=None
    ):
        _refuse_packed(batch_sizes)
        T, B, _, H = _check(1, x, w_ih, w_hh, b_ih, b_hh, {"h0": h0})
        window(T, k1, k2)
        cell = _cell(nonlinearity)
        if T == 0 or B == 0:
            yield None
            return x.new_empty(T, B, H), h0.clone()
        weights = (w_ih, w_hh, b_ih, b_hh)
        arrays = _forward_arrays(cell, "nothing", x, _dense(h0), None, *weights, (B, H))
        yield Recurrence("forward", cell, x, (T, B, H, T, T), reverse, arrays)
        return arrays[4:6]

    @_operator
    def lstm_layer_backward(
        self, dy, dh_n, dc_n, dc, x, h0, c0, w_ih, w_hh, y, c, gates, reverse, k1, k2, *rest
    ):
        wants, biases, batch_sizes = _wants_and_biases(*rest)
        _refuse_packed(batch_sizes)
        states = {"h0": h0, "c0": c0, "dh_n": dh_n, "dc_n": dc_n}
        T, B, I, H = _check(4, x, w_ih, w_hh, *biases, states)
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
        if gates is None:
            gates = _gates(x, h0, w_ih, w_hh, *biases, y, (T, B, I, H), reverse)
        upstream, c0 = (dy, dh_n, dc_n, dc), _dense(c0, wide)
        arrays = _backward_arrays("lstm", upstream, w_hh, c0, y, c, gates, (B, H), (T, B))
        yield Recurrence("backward", "lstm", x, (T, B, H, k1, k2), reverse, arrays)
        da, dh0, dc0 = arrays[9:]
        gradients = _products(da, x, h0, w_ih, y, (T, B, I, H), reverse, *wants)
        dx, dw_ih, dw_hh, db = (x.new_empty(0) if d is None else d for d in gradients)
        return dx, dh0, dc0.to(x.dtype), dw_ih, dw_hh, db

    @_operator
    def rnn_layer_backward(
        self, dy, dh_n, x, h0, w_ih, w_hh, y, nonlinearity, reverse, k1, k2, *rest
    ):
        wants, batch_sizes = _wants_and_batch_sizes(*rest)
        _refuse_packed(batch_sizes)
        T, B, I, H = _check(1, x, w_ih, w_hh, None, None, {"h0": h0, "dh_n": dh_n})
        for name, tensor in {"dy": dy, "y": y}.items():
            _expect(name, tensor, (T, B, H), x)
        cell = _cell(nonlinearity)
        if T == 0 or B == 0:
            yield None
            dh0 = torch.zeros_like(h0) if dh_n is None else dh_n.clone()
            dx, dw_ih, dw_hh, db = _no_gradients(x, w_ih, w_hh, *wants)
            return dx, dh0, dw_ih, dw_hh, db
        k1, k2 = window(T, k1, k2)
        upstream = (dy, dh_n, None, None)
        arrays = _backward_arrays(cell, upstream, w_hh, None, y, None, None, (B, H), (T, B))
        yield Recurrence("backward", cell, x, (T, B, H, k1, k2), reverse, arrays)
        da, dh0, _ = arrays[9:]
        gradients = _products(da, x, h0, w_ih, y, (T, B, I, H), reverse, *wants)
        dx, dw_ih, dw_hh, db = (x.new_empty(0) if d is None else d for d in gradients)
        return dx, dh0, dw_ih, dw_hh, db

    def _launch(
        self,
        which: str,
        cell: str,
        like: Tensor,
        sizes: tuple[int, int, int, int, int],
        reverse: tuple[bool, ...],
        arrays: tuple[tuple[Tensor | None, ...], ...],
    ) -> None:
        """Queue recurrences, as of `Recurrence`, that differ in their direction alone."""
        dtype, stream = like.dtype, _current_stream(like)
        tf32 = dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32
        key = (which, cell, dtype, tf32, like.get_device(), len(reverse), sizes)
        index, kernel, launches = self._launches(*key)
        for plan, by_products, scratch_bytes, taken in launches:
            if by_products:
                for n in range(len(reverse))[taken]:
                    one = Recurrence(which, cell, like, sizes, reverse[n], arrays[n])
                    self._by_products(plan, one, index, stream)
                continue
            scratch = like.new_empty(scratch_bytes, dtype=torch.uint8)
            addresses = [[0 if a is None else a.data_ptr() for a in one] for one in arrays[taken]]
            kernel(plan, reverse[taken], addresses, scratch.data_ptr(), index, stream)

    def _new_launches(self, which, cell, dtype, tf32, device, directions, sizes) -> tuple:
        """The device's index, the kernel, and a launch's plan, needs, and directions, for each.

        tf32: whether torch allows it, which `number_format` sees too; here for the cache.
        """
        index = max(device, 0)  # -1 is the processor
        properties = self._device(index)
        work = (which, cell, number_format(dtype, properties.capability), *sizes)
        plans = self.plans(properties, directions, *work)
        shares = [slice(None)] if len(plans) == 1 else [slice(n, n + 1) for n in range(directions)]
        launches = [
            (plan, plan.method == "gemm", plan.scratch_bytes, taken)
            for plan, taken in zip(plans, shares, strict=True)
        ]
        return index, getattr(self.native, f"{which}_{FORMATS[dtype]}"), launches

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
        (T, B, *_), wide = one.sizes, state_dtype(one.like.dtype)
        sums = outputs.new_empty(B, weights.shape[1], dtype=wide)
        multiply = _product_into(sums, weights)
        make = getattr(self.native, f"{one.which}_cells_{FORMATS[one.like.dtype]}")
        addresses = list(map(_address, one.arrays))
        cells = make(plan, one.reverse, addresses, _address(sums), index, stream)
        vectors = outputs.view(T, B, -1).unbind()
        if forward == one.reverse:
            vectors = vectors[::-1]
        if forward:
            multiply(h0.view(B, -1))
        cells(0)  # going back, nothing comes before the first step
        for p in range(1, len(vectors)):
            multiply(vectors[p - 1])
            cells(p)
        if not forward:
            multiply(vectors[-1])
            dh0.view(B, -1).copy_(sums)

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


def _refuse_packed(batch_sizes: Tensor | None) -> None:
    if batch_sizes is not None:
        raise NotImplementedError(
            "batch_sizes is given, but rnnfast's CUDA kernels take padded sequences; "
            "the modules pad packed ones for them"
        )


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
        return FORMATS[dtype]
    except KeyError:
        raise NotImplementedError(
            f"rnnfast's CUDA kernels have no {dtype}; they compute in float32, float64, "
            "float16 and bfloat16"
        ) from None


def _cell(nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"nonlinearity is {nonlinearity!r}, but should be 'tanh' or 'relu'")
    return nonlinearity


class _Zeros:
    """The state that a layer begins with where none is given, filled once.

    A stream has its own, so that nobody reads zeros that another stream has yet to write. They are
    never freed, as a captured CUDA graph may read them whenever it runs; one that is being captured
    fills its own.
    """

    def __init__(self) -> None:
        self._kept: list[Tensor] = []
        self._newest: dict[tuple, Tensor] = {}
        self._views: dict[tuple, Tensor] = {}

    def __call__(self, x: Tensor, B: int, H: int, dtype: torch.dtype) -> Tensor:
        where = (x.device, _current_stream(x))
        key = (where, B, H, dtype)
        view = self._views.get(key)
        return self._new(x, where, key) if view is None else view

    def _new(self, x: Tensor, where: tuple, key: tuple) -> Tensor:
        _, B, H, dtype = key
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return x.new_zeros(B, H, dtype=dtype)
        size = B * H * dtype.itemsize
        with torch.inference_mode(False), torch.no_grad():
            zeros = self._newest.get(where)
            if zeros is None or len(zeros) < size:
                room = max(size, 2 * (0 if zeros is None else len(zeros)), 1 << 16)
                zeros = torch.zeros(room, dtype=torch.uint8, device=x.device)
                self._kept.append(zeros)
                self._newest[where] = zeros
            view = zeros[:size].view(dtype).view(B, H)
        if len(self._views) >= 1024:
            self._views.clear()
        self._views[key] = view
        return view


def _project(x: Tensor, w_ih: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """x W_ih^T + b_ih + b_hh over all steps: (..., G * H), dense."""
    bias = b_hh if b_ih is None else b_ih
    if b_ih is not None and b_hh is not None:
        bias = b_ih + b_hh
    if x.is_contiguous():
        return torch._C._nn.linear(x, w_ih, bias)
    *lead, I = x.shape
    return torch._C._nn.linear(x.reshape(-1, I), w_ih, bias).view(*lead, -1)


def _forward_arrays(cell, keep, x, h0, c0, w_ih, w_hh, b_ih, b_hh, state_shape) -> tuple:
    """What a recurrence forward is given and gives, as `Recurrence` has them; dense states."""
    a = _project(x, w_ih, b_ih, b_hh)
    y_shape = (*x.shape[:-1], w_hh.shape[1])
    y, h_n = x.new_empty(y_shape), x.new_empty(state_shape)
    if cell != "lstm":
        return a, _dense(w_hh), h0, None, y, h_n, None, None, None
    c_n = c0.new_empty(state_shape)
    c = None if keep == "nothing" else c0.new_empty(y_shape)
    gates = a if keep == "all" else None  # each gate takes the place of its pre-activation
    return a, _dense(w_hh), h0, c0, y, h_n, c_n, c, gates


def _backward_arrays(cell, upstream, w_hh, c0, y, c, gates, state_shape, rows) -> tuple:
    """The same going back; rows: T, B."""
    dy, dh_n, dc_n, dc = upstream
    dy, dh_n, w_hh = _dense(dy), _dense(dh_n), _dense(w_hh)
    da = w_hh.new_empty(*rows, w_hh.shape[0])
    dh0 = w_hh.new_empty(state_shape)
    if cell != "lstm":
        return dy, dh_n, None, None, w_hh, None, _dense(y), None, None, da, dh0, None
    wide = c0.dtype
    dc_n, dc = _dense(dc_n, wide), _dense(dc, wide)
    dc0 = c0.new_empty(state_shape)
    return dy, dh_n, dc_n, dc, w_hh, c0, None, _dense(c), _dense(gates), da, dh0, dc0


def _given(arrays, x: Tensor) -> tuple[Tensor | None, ...]:
    """Of what a recurrence forward gave: y, h_n, c_n in the dtype of x, c, gates."""
    y, h_n, c_n, c, gates = arrays[4:]
    if c_n is not None and c_n.dtype is not x.dtype:
        c_n = c_n.to(x.dtype)
    return y, h_n, c_n, c, gates


def _gradients(arrays, sizes, reverse, saved, wants) -> tuple[Tensor | None, ...]:
    """What follows from a recurrence backward: dx, dh0, dc0, dw_ih, dw_hh, db where wanted."""
    x, h0, _, w_ih, _, _, _, y, _, _ = saved
    want_x, want_h0, want_c0, *want_weights = wants
    da, dh0, dc0 = arrays[9:]
    dx, *dweights = _products(da, x, h0, w_ih, y, sizes, reverse, want_x, *want_weights)
    dc0 = dc0.to(x.dtype) if want_c0 else None
    return dx, dh0 if want_h0 else None, dc0, *dweights


def _gates(x, h0, w_ih, w_hh, b_ih, b_hh, y, sizes, reverse):
    """The gates (T, B, 4, H) of an LSTM that has kept its h, not them: in two products."""
    T, B, _, H = sizes
    a = _project(x, w_ih, b_ih, b_hh)
    flat, (first, later, before) = a.view(T * B, 4 * H), _steps(T, B, reverse)
    if h0 is not None:
        flat[first].addmm_(h0.reshape(B, H), w_hh.t())
    flat[later].addmm_(y.reshape(T * B, H)[before], w_hh.t())
    gates = a.view(T, B, 4, H)
    gates[:, :, :2].sigmoid_()
    gates[:, :, 2].tanh_()
    gates[:, :, 3].sigmoid_()
    return gates


def _steps(T: int, B: int, reverse: bool) -> tuple[slice, slice, slice]:
    """Of T * B rows: the first step's in processing order, the others, and those before these."""
    others = (T - 1) * B
    if reverse:
        return slice(others, None), slice(others), slice(B, None)
    return slice(B), slice(B, None), slice(others)


def _products(da, x, h0, w_ih, y, sizes, reverse, want_x, want_w_ih, want_w_hh, want_b):
    """dx, dw_ih, dw_hh, db from da (T, B, G * H): products and sums over all steps, or None.

    h0: None for zeros, which bring nothing to dw_hh.
    """
    T, B, I, H = sizes
    flat = da.view(T * B, da.shape[-1])
    dx = torch.mm(flat, w_ih).view(x.shape) if want_x else None
    dw_ih = torch.mm(flat.t(), x.reshape(T * B, I)) if want_w_ih else None
    dw_hh = None
    if want_w_hh:
        first, later, before = _steps(T, B, reverse)
        h_before = y.reshape(T * B, H)[before]
        if h0 is None:
            dw_hh = torch.mm(flat[later].t(), h_before)
        else:
            dw_hh = torch.mm(flat[first].t(), h0.reshape(B, H))
            if T > 1:
                dw_hh.addmm_(flat[later].t(), h_before)
    db = flat.sum(0) if want_b else None
    return dx, dw_ih, dw_hh, db


def _no_gradients(x, w_ih, w_hh, want_x, want_w_ih, want_w_hh, want_b):
    """The same where there is no step or no batch row."""
    return (
        x.new_zeros(x.shape if want_x else (0,)),
        x.new_zeros(w_ih.shape if want_w_ih else (0,)),
        x.new_zeros(w_hh.shape if want_w_hh else (0,)),
        x.new_zeros((w_hh.shape[0],) if want_b else (0,)),
    )


# Of the GPU, where its kernels were built.
layers = None if _native.cuda is None else Layers(_native.cuda)


def register() -> None:
    """Hands the operators of ops.py their CUDA kernels, where these were built."""
    if layers is None:
        return
    for name in ("lstm_layer", "rnn_layer", "lstm_layer_backward", "rnn_layer_backward"):
        torch.library.impl(f"rnnfast::{name}", "CUDA")(getattr(layers, name))
    for name, kernel in bidirectional.kernels(layers.run).items():
        torch.library.impl(f"rnnfast::bidirectional_{name}", "CUDA")(kernel)
