"""The operators on CUDA tensors: `cuda_products`, by torch, and the recurrence, by our kernels.

`Layers` is written against the extension module it is given and the tensors it gets, so the same
code runs on a GPU with `_cuda` and, in tests, on CPU tensors with the emulator of the kernels.
Everything is queued on torch's current stream and allocated by torch; nothing waits for the device.

float32 products use TF32 where torch.backends.cuda.matmul.allow_tf32 says so, in the recurrence as
in torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import lru_cache, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _native, bidirectional, cuda_products
from .cuda_products import state_dtype
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


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


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
    "resident", "resident_cluster", "steps" or "gemm") to force how the recurrence runs, "" to let
    the planner choose.
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
        return cuda_products.given(arrays, x)

    def forward_both(self, cell, sizes, keep, x, first, second) -> tuple[Tensor, tuple, tuple]:
        """y (T, B, 2 * H) of both directions and, of each, h_n, c_n, c and gates as `forward`.

        first, second: h0, c0, w_ih, w_hh, b_ih, b_hh of the direction and of the reverse one.
        """
        T, B, _, H = sizes
        directions = [
            self._forward_arrays(cell, sizes, keep, x, own, (B, H)) for own in (first, second)
        ]
        self._launch("forward", cell, x, (T, B, H, T, T), (False, True), directions)
        (y, *given), (y_reverse, *given_reverse) = (
            cuda_products.given(arrays, x) for arrays in directions
        )
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
        return cuda_products.gradients(arrays, sizes, reverse, saved, wants)

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
            cuda_products.gradients(
                directions[reverse], sizes, reverse, saved[reverse], wants[reverse]
            )
            for reverse in (False, True)
        )

    def _forward_arrays(self, cell, sizes, keep, x, own, state_shape) -> tuple[Tensor | None, ...]:
        """As `cuda_products.forward_arrays`; the states in `own` may be None for zeros."""
        _, B, _, H = sizes
        h0, c0, *weights = own
        if h0 is None:
            h0 = self._zeros(x, B, H, x.dtype)
            c0 = self._zeros(x, B, H, state_dtype(x.dtype)) if cell == "lstm" else None
        return cuda_products.forward_arrays(cell, keep, x, h0, c0, *weights, state_shape)

    def _backward_arrays(self, cell, sizes, reverse, upstream, saved) -> tuple[Tensor | None, ...]:
        """As `cuda_products.backward_arrays`; the cell state may be None for zeros."""
        _, B, _, H = sizes
        x, h0, c0, *others = saved
        if c0 is None and cell == "lstm":
            c0 = self._zeros(x, B, H, state_dtype(x.dtype))
        saved = (x, h0, c0, *others)
        return cuda_products.backward_arrays(cell, sizes, reverse, upstream, saved)

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
        sizes = _check(4, x, w_ih, w_hh, b_ih, b_hh, {"h0": h0, "c0": c0})
        T, B, _, H = sizes
        window(T, k1, k2)
        wide = state_dtype(x.dtype)
        c_shape, gates_shape = _kept_shapes(keep, T, B, H)
        if T == 0 or B == 0:
            yield None
            kept = x.new_empty(c_shape, dtype=wide), x.new_empty(gates_shape)
            return x.new_empty(T, B, H), h0.clone(), c0.clone(), *kept
        own = (h0, c0, w_ih, w_hh, b_ih, b_hh)
        arrays = self._forward_arrays("lstm", sizes, keep, x, own, (B, H))
        yield Recurrence("forward", "lstm", x, (T, B, H, T, T), reverse, arrays)
        y, h_n, c_n, c, gates = cuda_products.given(arrays, x)
        gates = x.new_empty(0) if gates is None else gates.view(gates_shape)
        c = x.new_empty(0, dtype=wide) if c is None else c
        return y, h_n, c_n, c, gates

    @_operator
    def rnn_layer(
        self, x, h0, w_ih, w_hh, b_ih, b_hh, nonlinearity, reverse, k1, k2, batch_sizes=None
    ):
        _refuse_packed(batch_sizes)
        sizes = _check(1, x, w_ih, w_hh, b_ih, b_hh, {"h0": h0})
        T, B, _, H = sizes
        window(T, k1, k2)
        cell = _cell(nonlinearity)
        if T == 0 or B == 0:
            yield None
            return x.new_empty(T, B, H), h0.clone()
        own = (h0, None, w_ih, w_hh, b_ih, b_hh)
        arrays = self._forward_arrays(cell, sizes, "nothing", x, own, (B, H))
        yield Recurrence("forward", cell, x, (T, B, H, T, T), reverse, arrays)
        return cuda_products.given(arrays, x)[:2]

    @_operator
    def lstm_layer_backward(
        self, dy, dh_n, dc_n, dc, x, h0, c0, w_ih, w_hh, y, c, gates, reverse, k1, k2, *rest
    ):
        wants, biases, batch_sizes = _wants_and_biases(*rest)
        _refuse_packed(batch_sizes)
        states = {"h0": h0, "c0": c0, "dh_n": dh_n, "dc_n": dc_n}
        sizes = _check(4, x, w_ih, w_hh, *biases, states)
        T, B, _, H = sizes
        for name, tensor in {"dy": dy, "y": y}.items():
            _expect(name, tensor, (T, B, H), x)
        for name, tensor in {"dc": dc, "c": c}.items():
            _expect(name, tensor, (T, B, H), x.new_empty(0, dtype=state_dtype(x.dtype)))
        _expect("gates", gates, (T, B, 4, H), x)
        if T == 0 or B == 0:
            yield None
            dh0 = torch.zeros_like(h0) if dh_n is None else dh_n.clone()
            dc0 = torch.zeros_like(c0) if dc_n is None else dc_n.clone()
            dx, dw_ih, dw_hh, db = cuda_products.no_gradients(x, w_ih, w_hh, *wants)
            return dx, dh0, dc0, dw_ih, dw_hh, db
        k1, k2 = window(T, k1, k2)
        saved = (x, h0, c0, w_ih, w_hh, *biases, y, c, gates)
        arrays = self._backward_arrays("lstm", sizes, reverse, (dy, dh_n, dc_n, dc), saved)
        yield Recurrence("backward", "lstm", x, (T, B, H, k1, k2), reverse, arrays)
        wants = (wants[0], True, True, *wants[1:])
        gradients = cuda_products.gradients(arrays, sizes, reverse, saved, wants)
        return tuple(x.new_empty(0) if d is None else d for d in gradients)

    @_operator
    def rnn_layer_backward(
        self, dy, dh_n, x, h0, w_ih, w_hh, y, nonlinearity, reverse, k1, k2, *rest
    ):
        wants, batch_sizes = _wants_and_batch_sizes(*rest)
        _refuse_packed(batch_sizes)
        sizes = _check(1, x, w_ih, w_hh, None, None, {"h0": h0, "dh_n": dh_n})
        T, B, _, H = sizes
        for name, tensor in {"dy": dy, "y": y}.items():
            _expect(name, tensor, (T, B, H), x)
        cell = _cell(nonlinearity)
        if T == 0 or B == 0:
            yield None
            dh0 = torch.zeros_like(h0) if dh_n is None else dh_n.clone()
            dx, dw_ih, dw_hh, db = cuda_products.no_gradients(x, w_ih, w_hh, *wants)
            return dx, dh0, dw_ih, dw_hh, db
        k1, k2 = window(T, k1, k2)
        saved = (x, h0, None, w_ih, w_hh, None, None, y, None, None)
        arrays = self._backward_arrays(cell, sizes, reverse, (dy, dh_n, None, None), saved)
        yield Recurrence("backward", cell, x, (T, B, H, k1, k2), reverse, arrays)
        wants = (wants[0], True, False, *wants[1:])
        dx, dh0, _, *dweights = cuda_products.gradients(arrays, sizes, reverse, saved, wants)
        return tuple(x.new_empty(0) if d is None else d for d in (dx, dh0, *dweights))

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
        """A recurrence by a product of cuBLAS's and a launch of the cells for every step.

        The host must not fall behind. So the steps are queued by the core, with torch's handle;
        where it doesn't find cuBLAS, by torch.mm, with all that steps have in common made before.
        """
        forward = one.which == "forward"
        if forward:
            _, w_hh, h0, _, outputs, *_ = one.arrays
            weights = w_hh.t()
        else:
            weights, outputs, dh0 = one.arrays[4], *one.arrays[9:11]
        (T, B, *_), wide = one.sizes, state_dtype(one.like.dtype)
        sums = outputs.new_empty(B, weights.shape[1], dtype=wide)
        addresses = list(map(_address, one.arrays))
        if self.native.has_products():
            run = getattr(self.native, f"{one.which}_by_products_{FORMATS[one.like.dtype]}")
            handle = _blas_handle(index) if outputs.is_cuda else 0
            run(plan, one.reverse, addresses, _address(sums), index, stream, handle)
            if not forward:
                dh0.view(B, -1).copy_(sums)
            return
        multiply = _product_into(sums, weights)
        make = getattr(self.native, f"{one.which}_cells_{FORMATS[one.like.dtype]}")
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


def _blas_handle(index: int) -> int:
    """torch's for this device, its current stream and what torch allows products to do."""
    with torch.cuda.device(index):
        return torch.cuda.current_blas_handle()


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
