"""What the planner of the CUDA kernels (csrc/cuda/plan.h) chose for a layer, in words.

The planner is a pure function of sizes and of a device's properties, so it can be asked about a GPU
that is not there, if rnnfast was built with its CUDA kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from . import _native
from .cuda_ops import Layers, number_format
from .ops import window

PROPERTIES = ("capability", "multiprocessors", "shared_bytes", "largest_cluster", "cooperative")


@dataclass(frozen=True)
class CudaPlan:
    """One pass over one layer, in one direction or in both side by side.

    Attributes:
        name: such as "layer 0", "layer 1 reverse" or "layer 1, both directions".
        which: "forward" or "backward".
        cell: "lstm", "tanh" or "relu".
        T, B, I, H: steps, batch rows, input size, hidden units.
        dtype: of the tensors.
        number_format: what is multiplied: "tf32", or the dtype's name.
        method: who hands h to whom: "local", "cluster", "grid", "resident", "resident_cluster",
            "steps" or "gemm"; docs/cuda.md says what they are.
        reason: why there is a launch for every step; else empty.
        launches: of the recurrence: 1, or with "steps" and "gemm" one a step.
        directions, groups, blocks: a launch has this many directions, each of them groups that own
            columns, each of them blocks that own rows of weights.
        columns: batch rows; backward those of all truncation windows.
        group_columns, pass_columns: columns of a group, and of them those multiplied at once.
        block_rows: rows of weights of a block.
        tile: rows, columns and terms of what a warp multiplies in a step over the terms.
        register_weight_bytes, shared_weight_bytes, streamed_weight_bytes: a block's weights that
            stay in registers or shared memory, or come from the L2 cache in every step.
        shared_bytes: all the shared memory of a block.
        scratch_bytes: device memory of the call, packed weights included.
        cycles: of a step, as the planner estimates them from the times of plans on an H200.
    """

    name: str
    which: str
    cell: str
    T: int
    B: int
    I: int
    H: int
    dtype: torch.dtype
    number_format: str
    method: str
    reason: str
    launches: int
    directions: int
    groups: int
    blocks: int
    columns: int
    group_columns: int
    pass_columns: int
    block_rows: int
    tile: tuple[int, int, int]
    register_weight_bytes: int
    shared_weight_bytes: int
    streamed_weight_bytes: int
    shared_bytes: int
    scratch_bytes: int
    cycles: float

    def __str__(self) -> str:
        numbers = str(self.dtype).removeprefix("torch.")
        if self.number_format == "tf32":
            numbers += " as TF32"
        launches = _count(self.launches, "launch", "es") + (
            f", as {self.reason}" * bool(self.reason)
        )
        groups = _count(self.groups, "group") + " of " + _count(self.blocks, "block")
        if self.directions == 2:
            groups = f"2 directions of {groups}"
        head = (
            f"{self.name}, {self.which}: {self.cell}, T {self.T}, B {self.B}, I {self.I}, "
            f"H {self.H}, {numbers}"
        )
        if self.method == "gemm":
            products = f"  gemm, {launches}; a product by torch before each"
            return f"{head}\n{products}; about {self.cycles:.0f} cycles a step"
        rows, columns, terms = self.tile
        tiles = [f"  tiles of {rows} rows x {columns} columns x {terms} terms"]
        if self.method == "local" and self.group_columns < columns:
            tiles = []  # no tensor cores for so few
        passes = "" if self.pass_columns >= self.group_columns else f", {self.pass_columns} at once"
        places = (
            f"{size(self.register_weight_bytes)} in registers",
            f"{size(self.shared_weight_bytes)} in shared memory",
            f"{size(self.streamed_weight_bytes)} from L2 every step",
        )
        return "\n".join(
            (
                head,
                f"  {self.method}, {launches}; {groups}; a block has {self.block_rows} rows of "
                f"weights and {self.group_columns} of {self.columns} columns{passes}",
                *tiles,
                f"  a block's weights: {', '.join(places)}",
                f"  shared memory {size(self.shared_bytes)} a block, scratch "
                f"{size(self.scratch_bytes)}; about {self.cycles:.0f} cycles a step",
            )
        )


class CudaExplanation(tuple):
    """The `CudaPlan` of every launch of a recurrence: all layers forward, then all backward."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self))

    __repr__ = __str__


def device_of(index: int, gpu: Mapping[str, Any] | None) -> Any:
    """The planner's description of the GPU number `index`, or of the one that `gpu` describes."""
    native = _native.cuda
    if native is None:
        raise RuntimeError(
            f"rnnfast was built without CUDA kernels ({_native.cuda_missing}), so there is no plan "
            "for a GPU; reinstall with nvcc 12.4 or newer on PATH"
        )
    if gpu is None:
        return native.device_properties(index)
    if set(gpu) != set(PROPERTIES):
        raise ValueError(f"gpu has {sorted(gpu)}, but should have {sorted(PROPERTIES)}")
    return native.Device(**gpu)


def layer_plans(
    device: Any,
    layer: int,
    which: str,
    cell: str,
    sizes: tuple[int, int, int, int],
    truncate: tuple[int, int],
    dtype: torch.dtype,
    directions: int,
) -> list[CudaPlan]:
    """The launches of a layer's pass; sizes: T, B, I, H; truncate: (k1, k2), (0, 0) for none."""
    T, B, _, H = sizes
    k1, k2 = (T, T) if which == "forward" else window(T, *truncate)
    number = number_format(dtype, device.capability)
    plans = Layers(_native.cuda).plans(device, directions, which, cell, number, T, B, H, k1, k2)
    names = ["", " reverse"] if len(plans) == 2 else [", both directions" * (directions == 2)]
    steps = T if which == "forward" else k2 + 1  # one more brings the initial state's gradient
    launches = {"steps": steps, "gemm": T}
    told = []
    for name, plan in zip(names, (plan.as_dict() for plan in plans), strict=True):
        told.append(
            CudaPlan(
                *(f"layer {layer}{name}", which, cell, *sizes, dtype, number),
                launches=launches.get(plan["method"], 1),
                tile=(plan["tile_rows"], plan["tile_columns"], plan["tile_terms"]),
                **{name: plan[name] for name in _AS_THEY_ARE},
            )
        )
    return told


_AS_THEY_ARE = (
    *("method", "reason", "directions", "groups", "blocks", "columns", "group_columns"),
    *("pass_columns", "block_rows", "register_weight_bytes", "shared_weight_bytes"),
    *("streamed_weight_bytes", "shared_bytes", "scratch_bytes", "cycles"),
)


def _count(count: int, of: str, plural: str = "s") -> str:
    return f"{count} {of}{plural * (count != 1)}"


def size(count: int) -> str:
    """Bytes, for people."""
    for unit, scale in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"
