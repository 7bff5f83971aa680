"""Projected LSTM layers: the operators against the textbook, and the modules' way to them.

Modules are compared with torch.nn's in test_functional.py, and truncated ones with loops in
test_tbptt.py.
"""

from __future__ import annotations

import pytest
import torch
from one_layer import LAYOUTS, Case, assert_results, by_operator, by_reference, check, laid_out
from pairwise import pairwise
from rnnfast import LSTM, _native, functional, projected, projected_ops
from short_way import by_operators, flat
from test_threads import assert_identical, on_one_thread

AXES = {
    "I": [0, 1, 5, 130],
    "reverse": [False, True],
    "biases": ["both", "none", "input", "hidden"],
    "layout": list(LAYOUTS),
    "upstream": [("y",), ("h_n", "c_n"), ("y", "c"), ("y", "h_n", "c_n", "c")],
    "truncate": [None, (1, 1), (2, 2), (5, 5)],
}
# H, P: whole vectors and not, to one number and to all, sums in pieces.
SIZES = [(1, 1), (3, 2), (16, 16), (17, 4), (40, 33), (65, 17), (129, 128), (300, 20)]
LENGTHS = [(1,), (4, 4, 4), (7, 2, 2, 1), (9, 8, 5, 5, 5, 1), tuple(range(40, 0, -1))]


def padded(T, B, sizes, **options):
    return Case("lstm", T, B, H=sizes[0], P=sizes[1], **options)


def packed(lengths, sizes, **options):
    T, B = max(lengths), len(lengths)
    return padded(T, B, sizes, lengths=lengths, **options)


CASES = [
    padded(**choice)
    for choice in pairwise(T=[1, 2, 3, 17], B=[0, 1, 3, 17, 131], sizes=SIZES, **AXES)
] + [packed(**choice) for choice in pairwise(lengths=LENGTHS, sizes=SIZES, **AXES)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_textbook(case, dtype, isa):
    check(case, dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_bfloat16(sizes, reverse, isa):
    """What is projected is rounded as well, once more a step: LAMBDA leaves room for it."""
    for case in (
        padded(7, 3, sizes, I=5, reverse=reverse),
        packed((9, 8, 5, 1), sizes, I=5, reverse=reverse, truncate=(2, 2)),
    ):
        want = by_reference(case, torch.bfloat16)
        got = by_operator(case, torch.bfloat16)
        assert_results(case, got, want, in_float32=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gates_computed_again_are_the_same_bits(dtype):
    for case in (
        padded(7, 3, (40, 33), I=5),
        padded(7, 3, (40, 33), I=5, truncate=(2, 2), reverse=True),
        packed((9, 8, 5, 1), (17, 4), I=5),
    ):
        assert_identical(by_operator(case, dtype, keep="cells"), by_operator(case, dtype))


# Rows of a step are shared out, or units, or the projection of steps.
SHARED = [padded(20, 40, (96, 40), I=33), padded(20, 1, (800, 300), I=150)]
SHARED += [padded(150, 1, (40, 20), I=900)]
SHARED += [packed((60, *range(20, 8, -1)), (96, 40), I=33, truncate=(3, 3), reverse=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_every_number_of_threads_gives_the_same_bits(case, dtype, threads):
    want = on_one_thread(case, dtype, _native.build_info()["isa"])
    for _ in range(2):
        assert_identical(by_operator(case, dtype), want)


def values_of(case, dtype=torch.float64):
    values = case.inputs(dtype) | {"b_ih": None, "b_hh": None}
    names = ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh", "w_hr")
    return [values[name] for name in names]


@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck_and_opcheck(reverse):
    case = packed((4, 2, 1), (5, 3), I=2, reverse=reverse, biases="none")
    args = [v if v is None else v.requires_grad_() for v in values_of(case)]
    for keep in ("all", "cells"):
        options = (reverse, 0, keep, case.batch_sizes)

        def run(*tensors, options=options):
            given = iter(tensors)
            tensors = (a if a is None else next(given) for a in args)
            return projected_ops.lstm_layer(*tensors, *options)[:4]

        assert torch.autograd.gradcheck(run, [a for a in args if a is not None])
        operator = torch.ops.rnnfast.projected_lstm_layer.default
        torch.library.opcheck(operator, (*args, *options))


def test_weights_that_change_are_packed_anew():
    """The fingerprint covers W_hr too."""
    module, x = LSTM(6, 40, proj_size=17), torch.randn(9, 3, 6)
    with torch.no_grad():
        module(x)
        before = _native.core.pool_state()
        y = module(x)[0]
        assert _native.core.pool_state()["reused"] == before["reused"] + 1
        module.weight_hr_l0.data[3, 5] += 1
        changed = module(x)[0]
        assert not torch.equal(changed, y)
        _native.core.empty_pool()
        assert torch.equal(changed, module(x)[0])


# Which way


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_both_ways_give_the_same_bits(dtype, layout, monkeypatch):
    module, called = LSTM(6, 9, 2, bidirectional=True, proj_size=4, dtype=dtype), []
    operator = projected_ops.lstm_layer
    monkeypatch.setattr(
        projected_ops, "lstm_layer", lambda *args: called.append(1) or operator(*args)
    )
    x = laid_out(torch.randn(5, 3, 6, dtype=dtype), layout)
    with torch.no_grad():
        got = flat(module(x))
        assert not called
        want = by_operators(lambda: flat(module(x)))
        assert called
    assert all(map(torch.equal, got, want))


def test_unusual_tensors_go_through_the_operator(monkeypatch):
    class Subclass(torch.Tensor):
        pass

    called = []
    operator = projected_ops.lstm_layer
    monkeypatch.setattr(
        projected_ops, "lstm_layer", lambda *args: called.append(1) or operator(*args)
    )
    module, x = LSTM(6, 9, proj_size=4).requires_grad_(False), torch.randn(5, 3, 6)
    want = module(x)[0]
    assert not called
    negated = torch.complex(x, -x).conj().imag  # x, to be negated twice
    for unusual in (x.as_subclass(Subclass), negated):
        called.clear()
        assert torch.equal(module(unusual)[0].as_subclass(torch.Tensor), want)
        assert called


@pytest.mark.parametrize("truncate", [None, 3, (3, 5)])
@pytest.mark.parametrize("on_cuda", [False, True])
def test_the_loop_is_for_what_has_no_kernels(truncate, on_cuda, monkeypatch):
    looped = []
    loop = projected.lstm_layer
    monkeypatch.setattr(projected, "lstm_layer", lambda *args: looped.append(1) or loop(*args))
    monkeypatch.setattr(functional, "_on_cuda", lambda _: on_cuda)
    module = LSTM(4, 7, proj_size=3, truncate=truncate)
    for x in (
        torch.randn(9, 2, 4),
        torch.nn.utils.rnn.pack_sequence([torch.randn(9, 4), torch.randn(5, 4)]),
    ):
        looped.clear()
        module(x)
        assert bool(looped) == (on_cuda or truncate == (3, 5))


# Mistakes

SHAPES = {"x": (3, 2, 4), "h0": (2, 3), "c0": (2, 5), "w_ih": (20, 4), "w_hh": (20, 3)}
SHAPES |= {"b_ih": (20,), "b_hh": (20,), "w_hr": (3, 5)}
MISTAKES = {
    "w_hr 1-D": ({"w_hr": (5,)}, "w_hr has shape .5,., but should have .P, H."),
    "P above H": ({"w_hr": (6, 5)}, "w_hr has shape .6, 5., but should have .P, H., P <= H"),
    "h0 of H": ({"h0": (2, 5)}, "h0 has shape .2, 5., but should have .2, 3."),
    "c0 of P": ({"c0": (2, 3)}, "c0 has shape .2, 3., but should have .2, 5."),
    "w_hh of H": ({"w_hh": (20, 5)}, "w_hh has shape .20, 5., but should have .20, 3."),
    "w_ih": ({"w_ih": (20, 5)}, "w_ih has shape .20, 5., but should have .20, 4."),
    "x 2-D": ({"x": (3, 4)}, "x has 2 dimensions, but should have 3"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_shapes(mistake, monkeypatch):
    changes, message = MISTAKES[mistake]
    monkeypatch.setattr(_native.core, "forward", lambda *_: pytest.fail("the kernel ran"))
    args = [torch.zeros(shape) for shape in (SHAPES | changes).values()]
    with pytest.raises(RuntimeError, match=message):
        projected_ops.lstm_layer(*args, False, 0, "all")


def test_wrong_dtype():
    args = [torch.zeros(shape) for shape in SHAPES.values()]
    args[-1] = args[-1].double()
    with pytest.raises(RuntimeError, match=r"w_hr is torch\.float64, but x is torch\.float32"):
        projected_ops.lstm_layer(*args, False, 0, "all")


def test_what_keeps_nothing_has_no_gradient():
    args = [torch.zeros(shape, requires_grad=True) for shape in SHAPES.values()]
    y = projected_ops.lstm_layer(*args, False, 0, "nothing")[0]
    with pytest.raises(RuntimeError, match="keep='nothing'"):
        y.sum().backward()
