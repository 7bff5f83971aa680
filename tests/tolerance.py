"""How far two correct computations of the same quantity may lie apart: the one place that says so.

A pre-activation is a dot product of K terms. Summed in any order in arithmetic with machine epsilon
eps its error stays, but for vanishing probability, under LAMBDA * sqrt(K) * eps times the norms of
its operands (Higham & Mary, "A new approach to probabilistic rounding error analysis", 2019); the
worst case, K * eps, is never seen and would hide real mistakes. The gate maths that follows the dot
product adds about CELL_ROUNDINGS roundings more (exp, divisions, products; vector exp and tanh are
themselves off by a few units in the last place).

A recurrence commits such an error once a step and hands it on. A step multiplies what it is handed
by at most `growth`, the norm of the step's Jacobian (1 covers weights as torch initialises them).
The T errors are independent, so they add in quadrature, sqrt(1 + growth^2 + ... + growth^(2T-2)):
sqrt(T) for growth 1. Going back, the errors meet the transposed Jacobians and the same sum.

bfloat16 is a format for storage: products are exact and added up in float32, so what counts is
where a number is rounded to be stored. Going forward that is h, once a step: every h[t] is off by
at most half an eps of itself, and a pre-activation, whose weights have norm 1 at most, by LAMBDA
halves of an eps of the largest h. A step thus commits one such error and hands it on as any other:
STORED_FORWARD = 1. Going back four meet in a step: the rounding of da itself; that of the h which
da is multiplied with or derived from, which counts twice where an RNN takes 1 - h^2; and that of
the result. STORED_BACKWARD = 4. They are independent, so their number stands under the root; the
arithmetic in between adds what it does in float32. The cell state is not stored in bfloat16 between
steps.

Errors are measured against the largest magnitude of the expected tensor, since a small entry is a
difference of large terms and inherits their error. Where a whole tensor may come out small in that
way (a weight gradient of few entries, anything behind a saturated tanh, whose 1 - h^2 cancels) the
caller says the magnitude of the terms by `scale`; for gradients that is the largest of the
cotangents and of all gradients.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

LAMBDA = 2.0
CELL_ROUNDINGS = 16
STORED_FORWARD = 1
STORED_BACKWARD = 4


def _steps(T: int, growth: float) -> float:
    """1 + growth^2 + ... + growth^(2T-2)."""
    square = growth * growth
    return max(T, 1) if square == 1.0 else (square ** max(T, 1) - 1.0) / (square - 1.0)


def tolerance(dtype: torch.dtype, K: int = 1, T: int = 1, growth: float = 1.0) -> float:
    """Largest relative error of T recurrent steps over dot products of K terms.

    K counts the terms that meet in one sum: I + H for a forward pass, and for a weight gradient
    T * B as well (take the largest). dtype is the precision the result was computed in.
    """
    terms = max(K, 1) + CELL_ROUNDINGS
    return LAMBDA * torch.finfo(dtype).eps * math.sqrt(terms * _steps(T, growth))


def stored_tolerance(stored: int, K: int = 1, T: int = 1, growth: float = 1.0) -> float:
    """The same for arithmetic in float32 with results stored in bfloat16, `stored` times a step."""
    half_eps = torch.finfo(torch.bfloat16).eps / 2
    storing = LAMBDA * half_eps * math.sqrt(stored * _steps(T, growth))
    return storing + tolerance(torch.float32, K, T, growth)


def _as_float64(tensor: Any) -> np.ndarray:
    if isinstance(tensor, torch.Tensor):
        tensor = tensor.detach().cpu().to(torch.float64).numpy()
    return np.asarray(tensor, dtype=np.float64)


def _dtype_of(tensor: Any) -> torch.dtype:
    if isinstance(tensor, torch.Tensor):
        return tensor.dtype
    return torch.float64 if np.asarray(tensor).dtype == np.float64 else torch.float32


def assert_close(
    actual: Any,
    expected: Any,
    *,
    K: int = 1,
    T: int = 1,
    growth: float = 1.0,
    scale: float = 0.0,
    dtype: torch.dtype | None = None,
    stored: int = 0,
    name: str = "tensor",
) -> None:
    """Fail unless `actual` equals `expected` as closely as their arithmetic allows.

    Either may be a torch tensor or a numpy array of any dtype. dtype, the precision to allow for,
    defaults to the coarser of the two. NaN and Inf must stand in the same places. K, T and growth
    are those of `tolerance`; scale is the magnitude of the terms if larger than `expected`. stored:
    what was computed in float32 was stored in bfloat16 so many times a step.
    """
    if dtype is None:
        dtype = max((_dtype_of(actual), _dtype_of(expected)), key=lambda d: torch.finfo(d).eps)
    got, want = _as_float64(actual), _as_float64(expected)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[~finite], want[~finite], err_msg=name)
    assert np.isfinite(got[finite]).all(), f"{name}: not finite where it should be"
    if not finite.any():
        return
    relative = stored_tolerance(stored, K, T, growth) if stored else tolerance(dtype, K, T, growth)
    # Below the smallest normal number rounding is absolute; it matters in float16 alone.
    magnitude = max(np.abs(want[finite]).max(), scale, torch.finfo(dtype).smallest_normal)
    bound = relative * magnitude
    error = np.abs(got[finite] - want[finite]).max()
    assert error <= bound, f"{name}: off by {error:.3g}, allowed {bound:.3g}"
