"""What the machine can do at best and the floor that sets for a shape.

A time means little without the time that no program could beat. Two limits are known in advance:
the arithmetic at the rate of fused multiply-adds on registers, and reading W_hh once per step from
the cache it fits in. The floor is the larger of the two.
"""

from __future__ import annotations

from dataclasses import dataclass

from .shapes import Shape

ITEMSIZE = {"float32": 4, "float64": 8, "bfloat16": 2}


@dataclass(frozen=True)
class Peaks:
    """Ceilings of the machine for one number of threads and one dtype.

    Attributes:
        threads: OpenMP threads that were used.
        dtype: "float32", "float64" or "bfloat16", whose peak is that of products of pairs.
        flops: floating-point operations per second, every FMA counted as two.
        bandwidth: bytes of W_hh -> bytes per second at which all threads together read it again and
            again, each thread its own part, as they do where hidden units are split over threads.
        float32_flops: beside bfloat16's peak that of float32, else None.
    """

    threads: int
    dtype: str
    flops: float
    bandwidth: dict[int, float]
    float32_flops: float | None = None


@dataclass(frozen=True)
class Floor:
    """The least time a call can take, in seconds, by arithmetic and by reads of W_hh."""

    flops_seconds: float
    bandwidth_seconds: float

    @property
    def seconds(self) -> float:
        return max(self.flops_seconds, self.bandwidth_seconds)

    @property
    def bound(self) -> str:
        """The resource that sets the floor."""
        return "flops" if self.flops_seconds >= self.bandwidth_seconds else "bandwidth"


def floor(shape: Shape, mode: str, peaks: Peaks) -> Floor:
    """The floor of one call of `shape` in `mode`."""
    itemsize = ITEMSIZE[peaks.dtype]
    bandwidth = peaks.bandwidth[shape.weight_bytes(itemsize)]
    return Floor(
        flops_seconds=shape.flops(mode) / peaks.flops,
        bandwidth_seconds=shape.recurrent_traffic(mode, itemsize) / bandwidth,
    )
