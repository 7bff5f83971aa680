"""explain(): what a pass will do on this machine and, on the CPU, the least time it can take.

The plan is the native core's own (csrc/cpu/plan.h), asked for with the sizes of the call; ceilings
are measured once per process. Plans for a GPU are put in words by `cuda_plan`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from . import bptt, checks, cuda_plan, modules, ops
from ._native import build_info, core, fma_peak, precision, read_bandwidth
from .cuda_plan import CudaExplanation, size
from .frozen import is_frozen

READINGS = 3  # of each ceiling: the best counts, as other programs may run meanwhile


@dataclass(frozen=True)
class LayerPlan:
    """One layer in one direction.

    Attributes:
        name: such as "layer 0" or "layer 1 reverse".
        cell: "lstm", "tanh" or "relu".
        T, B, I, H: steps, batch rows, input size, hidden units.
        P: the size of h: H, but for a projected LSTM.
        rows: of all steps: T * B, but for packed sequences.
        dtype: what is computed in.
        isa: the instruction set.
        threads: how many work on it; fewer than there are where more would not pay.
        split: "rows" if threads share the batch, "units" if they share the hidden units, "steps" if
            one thread computes the recurrence and the others project steps for it.
        packed: whether weights are packed (and kept); else they are read where they lie.
        frozen: whether their owner has promised to leave them as they are: `freeze`.
        chunk: steps whose inputs are projected together.
        tile: batch rows and sums that the inner loop keeps in registers.
        w_hh_bytes: all of W_hh, and of W_hr where h is projected: what a step reads.
        w_hh_bytes_per_thread: the part of it that each thread reads in every step.
        level: the memory that part stays in: "L1", "L2", "L3" or "memory".
        peak: floating-point operations per second that these threads reach, measured.
        bandwidth: bytes per second that those which compute the recurrence read from that level,
            measured.
    """

    name: str
    cell: str
    T: int
    B: int
    I: int
    H: int
    P: int
    rows: int
    dtype: torch.dtype
    isa: str
    threads: int
    split: str
    packed: bool
    frozen: bool
    chunk: int
    tile: tuple[int, int]
    w_hh_bytes: int
    w_hh_bytes_per_thread: int
    level: str
    peak: float
    bandwidth: float

    @property
    def readers(self) -> int:
        """Threads that compute the recurrence."""
        return 1 if self.split == "steps" else self.threads

    @property
    def arithmetic_seconds(self) -> float:
        """Multiplying and adding at the measured peak."""
        gates = 4 if self.cell == "lstm" else 1
        projected = self.P if self.P != self.H else 0
        return 2 * self.rows * self.H * (gates * (self.I + self.P) + projected) / self.peak

    @property
    def reading_seconds(self) -> float:
        """Reading W_hh in every step at the measured bandwidth."""
        return self.T * self.readers * self.w_hh_bytes_per_thread / self.bandwidth

    @property
    def floor_seconds(self) -> float:
        """The least time that the layer can take under this plan."""
        return max(self.arithmetic_seconds, self.reading_seconds)

    @property
    def bound(self) -> str:
        """What sets that floor: "arithmetic", or "reading" W_hh."""
        return "arithmetic" if self.arithmetic_seconds >= self.reading_seconds else "reading"

    def __str__(self) -> str:
        if self.threads == 1:
            work = "1 thread"
        elif self.split == "steps":
            work = f"{self.threads} threads share the projection, one computes the recurrence"
        else:
            what = "batch rows" if self.split == "rows" else "hidden units"
            work = f"{self.threads} threads share the {what}"
        weights = "packed, and kept for the next call" if self.packed else "read where they lie"
        if self.frozen:
            weights = "frozen, and packed once for all calls"
        part = size(self.w_hh_bytes_per_thread) if self.split == "units" else "all"
        place = "from memory" if self.level == "memory" else f"from the {self.level} cache"
        rows, sums = self.tile
        return "\n".join(
            (
                f"{self.name}: {self.cell}, T {self.T}, B {self.B}, I {self.I}, H {self.H}, "
                f"{f'P {self.P}, ' * (self.P != self.H)}"
                f"{f'{self.rows} packed rows, ' * (self.rows != self.T * self.B)}"
                f"{str(self.dtype).removeprefix('torch.')} on {self.isa}",
                f"  {work}; weights {weights}; projection of {self.chunk} steps at a time; "
                f"tiles of {rows} rows x {sums} sums",
                f"  W_hh {size(self.w_hh_bytes)}, of which a thread reads {part} a step {place}",
                f"  floor {_time(self.floor_seconds)}, bound by {self.bound}: "
                f"arithmetic {_time(self.arithmetic_seconds)} at {self.peak / 1e9:.0f} GFLOP/s, "
                f"reading {_time(self.reading_seconds)} at {self.bandwidth / 1e9:.0f} GB/s",
            )
        )


class Explanation(tuple):
    """The `LayerPlan` of every layer and direction, in the order of the weights; prints as text."""

    __slots__ = ()

    @property
    def floor_seconds(self) -> float:
        """The least time for all of them, one after the other."""
        return sum(plan.floor_seconds for plan in self)

    def __str__(self) -> str:
        lines = [str(plan) for plan in self]
        return "\n".join([*lines, f"floor of the forward pass: {_time(self.floor_seconds)}"])

    __repr__ = __str__


def explain(
    module: modules.LSTM | modules.RNN,
    x: Tensor | PackedSequence,
    gpu: Mapping[str, Any] | None = None,
) -> Explanation | CudaExplanation:
    """How `module` computes on `x`, and what bounds its time.

    Args:
        module: a rnnfast.LSTM or RNN.
        x: what it would be called with: (T, B, I), (B, T, I) if batch_first, unbatched (T, I), or
            a PackedSequence. Only its shape, dtype and device count; nothing is computed.
        gpu: a GPU to plan for, wherever module and x are: capability (90 for 9.0), multiprocessors,
            shared_bytes (that one block can have), largest_cluster (blocks; 1 where there are no
            clusters) and cooperative (whether it has cooperative launches).

    Returns:
        For the CPU a tuple of `LayerPlan`, one per layer and direction of the forward pass, to
        print or to read: threads and how they share the work, packing, chunk, tile, bytes of W_hh
        and the cache they fit, and the floor in seconds: the larger of flops over the measured FMA
        peak, and bytes of W_hh per step over the measured bandwidth of that cache.
        For x on a GPU, or with `gpu`, a tuple of `CudaPlan`, one per launch of a recurrence,
        forward and backward: how h is exchanged, blocks, tiling, where weights stay, memory.

    The CPU's first call measures for about a second; later ones only where another number of
    threads or another cache comes up. On the CPU float16 and bfloat16 are planned as float32, in
    which they are computed. Raises TypeError for other modules and arguments, NotImplementedError
    for what no kernel computes as one layer (on a GPU projections, packed sequences and the windows
    of a stack with k2 > k1; on the CPU projections that are truncated so) and for devices without
    kernels, RuntimeError or ValueError as the call would for x, for a build without CUDA kernels,
    and for a `gpu` that is not described so.
    """
    if not isinstance(module, (modules.LSTM, modules.RNN)):
        raise TypeError(f"module is {type(module).__name__}, but should be rnnfast.LSTM or RNN")
    batch_sizes = x.batch_sizes if isinstance(x, PackedSequence) else None
    x = x if batch_sizes is None else x.data
    if not isinstance(x, Tensor):
        raise TypeError(f"x is {type(x).__name__}, but should be a Tensor or a PackedSequence")
    weight, axes = module.weights()[0], (2, 3) if batch_sizes is None else (2,)
    x = checks.check_input(type(module).__name__, x, weight, axes)
    on_gpu = gpu is not None or x.device.type == "cuda"
    if not on_gpu and x.device.type not in ("cpu", "meta"):
        raise NotImplementedError(f"x is on {x.device}, but only CPU and CUDA plans are explained")
    T, B = (*x.shape[:-1], 1)[:2]
    if batch_sizes is not None:
        T, B = len(batch_sizes), int(batch_sizes[0]) if len(batch_sizes) else 0
        batch_sizes = ops._known(batch_sizes, x, B)
    elif module.batch_first and x.dim() == 3:
        T, B = B, T
    if T == 0:
        raise RuntimeError("x has 0 time steps, but should have at least 1")
    directions = 2 if module.bidirectional else 1
    cell = "lstm" if isinstance(module, modules.LSTM) else module.nonlinearity
    k1, k2 = bptt.parse_truncate(module.truncate, T)
    if module.proj_size and (on_gpu or k1 != k2):
        raise NotImplementedError(
            f"module has proj_size={module.proj_size}, for which there are no kernels on a GPU, "
            "nor for windows with k2 > k1"
        )
    if on_gpu and batch_sizes is not None:
        raise NotImplementedError("x is a PackedSequence, but only padded ones have plans on a GPU")
    if on_gpu:
        return _on_gpu(module, cell, T, B, x.dtype, cuda_plan.device_of(x.device.index or 0, gpu))
    dtype = torch.float32 if x.dtype in checks.HALF_DTYPES else x.dtype
    plans = []
    for layer in range(module.num_layers):
        I = weight.shape[1] if layer == 0 else directions * (module.proj_size or module.hidden_size)
        for direction in range(directions):
            name = f"layer {layer}{' reverse' if direction else ''}"
            sizes = (T, B, I, module.hidden_size)
            plans.append(
                _plan(name, cell, sizes, module.proj_size, batch_sizes, dtype, is_frozen(module))
            )
    return Explanation(plans)


def _on_gpu(
    module: modules.LSTM | modules.RNN, cell: str, T: int, B: int, dtype: torch.dtype, device: Any
) -> CudaExplanation:
    k1, k2 = bptt.parse_truncate(module.truncate, T)
    if k1 < k2:
        if module.num_layers > 1:
            raise NotImplementedError(
                f"module has truncate={module.truncate}, but the windows of a stack with k2 > k1 "
                "are not explained for a GPU"
            )
        if dtype in checks.HALF_DTYPES:
            dtype = torch.float32  # as `functional` computes it
    directions = 2 if module.bidirectional else 1
    plans = []
    for which in ("forward", "backward"):
        for layer in range(module.num_layers):
            I = module.hidden_size * directions if layer else module.input_size
            sizes = (T, B, I, module.hidden_size)
            plans += cuda_plan.layer_plans(
                device, layer, which, cell, sizes, (k1, k2), dtype, directions
            )
    return CudaExplanation(plans)


def _plan(
    name: str,
    cell: str,
    sizes: tuple[int, int, int, int],
    projection: int,
    batch_sizes: Tensor | None,
    dtype: torch.dtype,
    frozen: bool,
) -> LayerPlan:
    T, B, _, H = sizes
    gates, P = 4 if cell == "lstm" else 1, projection or H
    rows, address = T * B, 0
    if batch_sizes is not None:
        rows, address = int(batch_sizes.sum()), batch_sizes.data_ptr()
    plan = getattr(core, f"plan_forward_{precision(dtype)}")(
        gates, *sizes, torch.get_num_threads(), address, projection, frozen
    )
    threads, split = plan["threads"], plan["split"]
    w_hh = (gates * P + projection) * H * dtype.itemsize
    part = -(-w_hh // threads) if split == "units" else w_hh
    level = _level(part, w_hh)
    isa = build_info()["isa"]
    return LayerPlan(
        *(name, cell, *sizes, P, rows, dtype),
        *(isa, threads, split, plan["pack"], frozen, plan["chunk"]),
        tile=(plan["tile_rows"], 4 * plan["vector_width"]),
        w_hh_bytes=w_hh,
        w_hh_bytes_per_thread=part,
        level=level,
        peak=_peak(dtype, threads, isa),
        bandwidth=_bandwidth(level, 1 if split == "steps" else threads),
    )


def _level(of_each: int, of_all: int) -> str:
    """Where weights stay from step to step: caches of a core hold its part, the L3 cache all."""
    l1, l2, l3 = core.cache_bytes()
    if of_each <= l1:
        return "L1"
    if of_each <= l2:
        return "L2"
    return "L3" if of_all <= l3 else "memory"


@cache
def _peak(dtype: torch.dtype, threads: int, isa: str) -> float:
    return max(fma_peak(threads, dtype) for _ in range(READINGS))


@cache
def _bandwidth(level: str, threads: int) -> float:
    """Read by each thread from an array of its own that certainly lies in that level."""
    l1, l2, l3 = core.cache_bytes()
    sizes = {
        "L1": l1 // 2,
        "L2": l2 // 2,
        "L3": max(l3 // 2 // threads, 2 * l2),
        "memory": 4 * l3 // threads,
    }
    return max(read_bandwidth(sizes[level], threads) for _ in range(READINGS))


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"
