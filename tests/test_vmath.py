"""The vector exp, sigmoid and tanh keep the errors that csrc/cpu/vmath.h states.

Measured in ulp of the exact result, which comes from arithmetic with at least 11 bits more. The
argument runs over every exponent, both signs, with mantissas drawn at random, and densely over the
range where the functions are neither constant nor linear.
"""

from __future__ import annotations

import numpy as np
import pytest
from rnnfast import _native

EXACT = {"exp": np.exp, "sigmoid": lambda x: 1 / (1 + np.exp(-x)), "tanh": np.tanh}
LARGEST_ULP = {"exp": 2, "sigmoid": 3, "tanh": 4}
WIDER = {np.float32: np.float64, np.float64: np.longdouble}
FUNCTIONS = pytest.mark.parametrize("function", list(EXACT))
PRECISIONS = pytest.mark.parametrize("real", [np.float32, np.float64], ids=lambda r: r.__name__)


def evaluate(function, x):
    y = np.empty_like(x)
    run = getattr(_native.core, f"evaluate_{x.dtype.name}")
    run(function, x.size, x.ctypes.data, y.ctypes.data)
    return y


def exact(function, x):
    wider = WIDER[x.dtype.type]
    if np.finfo(wider).eps > np.finfo(x.dtype).eps / 2**10:
        pytest.skip("this platform has no floating-point type wider than float64")
    with np.errstate(all="ignore"):
        return EXACT[function](x.astype(wider))


def ulp_of(value, real):
    """The distance between neighbours in `real` around each value, denormals included."""
    info = np.finfo(real)
    exponent = np.frexp(np.maximum(np.abs(value), info.tiny))[1] - 1
    return np.ldexp(value.dtype.type(info.eps), exponent)


def check(function, x, largest):
    y, value = evaluate(function, x), exact(function, x)
    info = np.finfo(x.dtype)
    # A result beyond the largest number may be infinity, or the largest number itself.
    too_large = value > info.max
    assert (y[too_large] >= info.max).all()
    fits = ~too_large
    if function == "sigmoid":  # denormal results may be zero
        tiny = value < info.tiny
        assert (y[tiny] >= 0).all()
        assert (y[tiny] <= info.tiny).all()
        fits &= ~tiny
    x, y, value = x[fits], y[fits], value[fits]
    error = np.abs(y - value) / ulp_of(value, x.dtype)
    worst = error.argmax()  # a NaN counts as the largest
    assert error[worst] <= largest, f"{function}({x[worst]!r}) is off by {error[worst]:.2f} ulp"


def every_exponent(real, count):
    """`count` numbers of each exponent and sign, from the least denormal to the largest number."""
    info = np.finfo(real)
    bits = np.uint32 if real is np.float32 else np.uint64
    mantissa_bits = bits(info.nmant)
    rng = np.random.default_rng(0)
    exponents = np.arange((1 << info.iexp) - 1, dtype=bits)[:, None] << mantissa_bits
    mantissas = rng.integers(0, 1 << info.nmant, (len(exponents), count), dtype=bits)
    mantissas[:, 0], mantissas[:, 1] = 0, (1 << info.nmant) - 1
    positive = (exponents | mantissas).ravel().view(real)
    return np.concatenate((positive, -positive))


@PRECISIONS
@FUNCTIONS
def test_error_over_all_exponents(function, real, isa):
    check(function, every_exponent(real, 400 if real is np.float32 else 40), LARGEST_ULP[function])


@PRECISIONS
@FUNCTIONS
def test_error_where_the_functions_bend(function, real, isa):
    rng = np.random.default_rng(1)
    ends = np.log(np.finfo(real).tiny) - 40, np.log(np.finfo(real).max) + 1
    for low, high in ((-2, 2), (-20, 20), ends):
        x = rng.uniform(low, high, 50_000).astype(real)
        check(function, x, LARGEST_ULP[function])


@PRECISIONS
def test_error_at_the_ends_of_exp(real, isa):
    top, bottom = np.log(np.finfo(real).max), np.log(np.finfo(real).smallest_subnormal)
    for end in (top, bottom):
        around = [end]
        for direction in (-np.inf, np.inf):
            x = end
            for _ in range(50):
                x = np.nextafter(x, real(direction))
                around.append(x)
        check("exp", np.array(around, real), LARGEST_ULP["exp"])


LIMITS = {  # at -infinity, infinity, -0, 0
    "exp": (0.0, np.inf, 1.0, 1.0),
    "sigmoid": (0.0, 1.0, 0.5, 0.5),
    "tanh": (-1.0, 1.0, -0.0, 0.0),
}


@PRECISIONS
@FUNCTIONS
def test_special_values(function, real, isa):
    special = np.array([-np.inf, np.inf, -0.0, 0.0], real)
    y, want = evaluate(function, special), np.array(LIMITS[function], real)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(np.signbit(y), np.signbit(want))
    nan = np.array([np.nan, -np.nan, 1.0], real)
    assert (np.isnan(evaluate(function, nan)) == [True, True, False]).all()


@PRECISIONS
@FUNCTIONS
def test_limits_are_reached_and_never_passed(function, real, isa):
    """Bounded as the exact function is, and equal to its limit once that is the nearest number."""
    x = np.geomspace(1, np.finfo(real).max, 3000, dtype=np.longdouble).astype(real)
    for sign, limit in zip((-1, 1), LIMITS[function], strict=False):
        y, value = evaluate(function, sign * x), exact(function, sign * x)
        assert (sign * y <= sign * limit).all()
        if np.isfinite(limit):
            # An eighth of an ulp, because the ulp halves below a power of two.
            reached = np.abs(value - limit) < ulp_of(np.array(limit, value.dtype), real) / 8
        else:
            reached = value > 2 * value.dtype.type(np.finfo(real).max)
        assert reached[-2000:].all()
        assert (y[reached] == limit).all()


@PRECISIONS
def test_tanh_is_odd(real, isa):
    x = every_exponent(real, 20)
    np.testing.assert_array_equal(evaluate("tanh", -x), -evaluate("tanh", x))


@PRECISIONS
@FUNCTIONS
def test_a_result_depends_on_its_argument_alone(function, real, isa):
    """Not on the lane, nor on what stands beside it; and no more than `count` are written."""
    rng = np.random.default_rng(2)
    x = rng.uniform(-5, 5, 40).astype(real)
    whole = evaluate(function, x)
    run = getattr(_native.core, f"evaluate_{x.dtype.name}")
    for count in range(40):
        for start in (0, 1, 3):
            part = np.full(50, np.nan, real)
            part[start : start + count] = x[:count]
            y = np.full(50, 77, real)
            at = start * x.itemsize
            run(function, count, part.ctypes.data + at, y.ctypes.data + at)
            np.testing.assert_array_equal(y[start : start + count], whole[:count])
            assert (y[:start] == 77).all()
            assert (y[start + count :] == 77).all()


def test_unknown_functions_are_refused():
    with pytest.raises(ValueError, match="unknown function sinh"):
        evaluate("sinh", np.zeros(1, np.float32))
