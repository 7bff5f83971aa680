"""What a run ran on: names of machine and software, and the machine's measured ceilings.

Stored in every result file, so that it explains itself.
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import rnnfast
import torch
from rnnfast import _native

from . import peers
from .peaks import ITEMSIZE, Peaks
from .shapes import Shape

CPUINFO = Path("/proc/cpuinfo")

# Another program on the machine can only lower a reading, so the best of several is the peak. Those
# of arithmetic, which every share is of, stand apart: what disturbs one is gone by the next.
READINGS = 3
SECONDS_APART = 0.2


def describe_environment(other_peers: Iterable[str] = ()) -> dict[str, Any]:
    """Processor, cores this process may use, versions, build of rnnfast, date in UTC."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peers": {name: peers.version(name) for name in other_peers},
        "rnnfast": build_info(),
        "variables": {
            name: value
            for name, value in sorted(os.environ.items())
            if name.startswith(("OMP_", "MKL_", "KMP_", "GOMP_", "RNNFAST_"))
        },
    }


def build_info() -> dict[str, Any]:
    """rnnfast's, without where on this machine it is installed."""
    info = rnnfast.build_info()
    return info | {"openmp": info["openmp"].split("/site-packages/")[-1]}


def cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def measure_peaks(shapes: Iterable[Shape], threads: int, dtype: str) -> Peaks:
    """Measures the FMA peak and the read bandwidth for the size of W_hh of every shape."""
    torch_dtype = getattr(torch, dtype)
    sizes = sorted({shape.weight_bytes(ITEMSIZE[dtype]) for shape in shapes})
    return Peaks(
        threads=threads,
        dtype=dtype,
        flops=_fma_peak(threads, torch_dtype),
        bandwidth={
            size: max(_native.read_bandwidth(size // threads, threads) for _ in range(READINGS))
            for size in sizes
        },
        float32_flops=_fma_peak(threads, torch.float32) if dtype == "bfloat16" else None,
    )


def _fma_peak(threads: int, dtype: torch.dtype) -> float:
    readings = []
    for _ in range(READINGS):
        time.sleep(SECONDS_APART)
        readings.append(_native.fma_peak(threads, dtype))
    return max(readings)
