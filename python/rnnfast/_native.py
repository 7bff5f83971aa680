"""Loads the native core, and says what it can do.

torch is imported first on purpose: its wheel brings the OpenMP runtime, and the core then binds to
that one instead of a second, so that there is one thread pool and ``torch.set_num_threads`` governs
it.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch  # before _core: see above

if TYPE_CHECKING:
    from collections.abc import Iterator

try:
    from . import _core as core
except ImportError as error:  # the package runs without, up to the first call that needs it
    _reason = str(error)

    class _Missing:
        def __getattr__(self, name: str) -> Any:
            raise RuntimeError(
                f"rnnfast's native core could not be loaded ({_reason}); "
                "reinstall rnnfast with a C++17 compiler at hand: pip install --force-reinstall ."
            )

    core = _Missing()

try:
    from . import _cuda as cuda

    cuda_missing = None
except ImportError as error:  # built where nvcc was found; all else works without
    cuda, cuda_missing = None, str(error)

_SUFFIX = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}


def precision(dtype: torch.dtype) -> str:
    """The name the core gives to ``dtype``; NotImplementedError where it has no kernels for it."""
    try:
        return _SUFFIX[dtype]
    except KeyError:
        raise NotImplementedError(
            f"rnnfast's kernels compute in bfloat16, float32 and float64, not in {dtype}"
        ) from None


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """What kernels for ``dtype`` add up in, and keep cell states in."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


def build_info() -> dict[str, Any]:
    """What was built and what is in use.

    Returns:
        ``version``, ``compiler``, ``isas_built`` and ``isas_available`` (slowest first), ``isa``
        (the one in use; the environment variable ``RNNFAST_ISA`` forces one), ``openmp`` (the
        library file the thread pool comes from), ``cuda_architectures`` (of the CUDA kernels, as
        CMake writes them; none where they were not built).
    """
    return core.build_info() | {"cuda_architectures": cuda.architectures.split() if cuda else []}


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """Runs the body with the kernels of instruction set ``name``, process-wide: for tests."""
    before = core.build_info()["isa"]
    core.use_isa(name)
    try:
        yield
    finally:
        core.use_isa(before)


def fma_peak(threads: int, dtype: torch.dtype = torch.float32) -> float:
    """FLOP/s that ``threads`` threads reach on independent FMAs; takes tens of milliseconds.

    For bfloat16: on independent products of pairs, added up in float32.
    """
    return getattr(core, f"fma_peak_{precision(dtype)}")(threads)


def read_bandwidth(bytes: int, threads: int) -> float:
    """Bytes/s that ``threads`` threads read together, each from ``bytes`` of its own."""
    return core.read_bandwidth(bytes, threads)
