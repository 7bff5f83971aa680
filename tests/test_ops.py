"""lstm_layer and rnn_layer against the textbook, over awkward sizes, layouts and options.

Sizes are chosen for the edges inside the kernels: sums are cut every 256 (float32) or 128 (float64)
terms, rows go by in blocks of 128, weight gradients in blocks of 512 or 256 steps and batch rows,
of 96 rows and 4 panels of columns, register tiles have 3 or 6 rows and 4 vectors of 2 to 16 lanes.
"""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from one_layer import (
    AXES,
    Case,
    assert_results,
    by_operator,
    by_reference,
    check,
    run_operator,
)
from pairwise import pairwise
from rnnfast import ops
from tolerance import assert_close

DTYPES = [torch.float64, torch.float32]
CELLS = ["lstm", "tanh", "relu"]

PAIRWISE = [Case(**choice) for choice in pairwise(cell=CELLS, **AXES)]

# (T, B, I, H)
EDGES = [
    (2, 131, 5, 7),  # two blocks of rows in the recurrence
    (129, 2, 3, 5),  # two blocks of rows in the projection, of terms in float64's weight gradients
    (3, 257, 2, 4),  # four blocks of rows, two or four of terms
    (2, 3, 128, 16),  # float64: whole pieces of sums, whole vectors
    (2, 3, 129, 16),  # one term more
    (2, 3, 256, 16),  # the same in float32
    (3, 3, 257, 16),
    (3, 5, 2, 258),
    (3, 4, 64, 64),
    (3, 4, 65, 63),
    (3, 7, 4, 130),  # sums over H and 4H in pieces
    (2, 3, 530, 3),  # dW_ih in more than eight panels of columns, whatever their width
    (
        3,
        7,
        129,
        20,
    ),  # gates leave lanes without work: the projection's columns are dense
    (2, 131, 129, 35),  # the same in two blocks of rows
    (2, 6, 15, 33),  # one tile of rows, two panels of RNN units in AVX-512
    # Below, too few uses of a weight to pack it.
    (1, 1, 300, 1),
    (1, 4, 128, 128),  # whole panels
    (2, 2, 129, 65),  # a last panel that is not full
    (4, 1, 31, 130),
    (1, 3, 0, 17),
    (1, 8, 40, 33),
    (1, 7, 16, 20),
    (2, 3, 33, 18),
    (8, 1, 20, 35),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_pairwise(case, dtype, isa):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", EDGES, ids=str)
@pytest.mark.parametrize(("cell", "reverse"), [("lstm", False), ("tanh", True)])
def test_edges_of_the_kernels(cell, reverse, sizes, dtype, isa):
    check(Case(cell, *sizes, reverse=reverse), dtype)


def test_pairs_are_covered():
    choices = {"a": [0, 1, 2], "b": [0, 1], "c": [0, 1, 2, 3], "d": [0, 1]}
    combinations = pairwise(**choices)
    assert len(combinations) < 3 * 2 * 4
    for a, b in itertools.combinations(choices, 2):
        met = {(c[a], c[b]) for c in combinations}
        assert met == set(itertools.product(choices[a], choices[b]))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    "upstream",
    [names for n in range(1, 5) for names in itertools.combinations(("y", "h_n", "c_n", "c"), n)],
    ids="+".join,
)
def test_any_outputs_may_get_a_gradient(upstream, reverse):
    check(Case("lstm", 5, 3, 2, 4, reverse=reverse, upstream=upstream), torch.float64)
    check(
        Case("lstm", 5, 3, 2, 4, reverse=reverse, upstream=upstream, truncate=(2, 3)), torch.float64
    )


@pytest.mark.parametrize("cell", CELLS)
def test_backward_without_any_gradient_is_zero(cell):
    case = Case(cell, 3, 2, 4, 5)
    inputs = case.inputs(torch.float64)
    states = [inputs["h0"], inputs["c0"]] if cell == "lstm" else [inputs["h0"]]
    weights = [inputs["w_ih"], inputs["w_hh"]]
    wants = [True] * 4
    if cell == "lstm":
        y, _, _, c, gates = ops.lstm_layer(
            inputs["x"], *states, *weights, None, None, False, 0, 0, "all"
        )
        gradients = torch.ops.rnnfast.lstm_layer_backward(
            *[None] * 4, inputs["x"], *states, *weights, y, c, gates, False, 0, 0, *wants
        )
    else:
        y, _ = ops.rnn_layer(inputs["x"], *states, *weights, None, None, cell, False, 0, 0)
        gradients = torch.ops.rnnfast.rnn_layer_backward(
            *[None] * 2, inputs["x"], *states, *weights, y, cell, False, 0, 0, *wants
        )
    assert all(not gradient.any() for gradient in gradients)


def no_steps(cell):
    return Case(cell, 0, 3, 2, 4)


@pytest.mark.parametrize("cell", CELLS)
def test_no_steps_hand_the_state_through(cell):
    check(no_steps(cell), torch.float64)


@pytest.mark.parametrize("cell", CELLS)
def test_no_steps_give_states_of_their_own(cell):
    inputs = no_steps(cell).inputs(torch.float64)
    assert run_operator(no_steps(cell), inputs)["h_n"].data_ptr() != inputs["h0"].data_ptr()


# Truncation


def windows(T):
    """Every (k1, k2) that means something on T steps, and some that reach beyond."""
    return [(k1, k2) for k1 in range(1, T + 2) for k2 in (*range(k1, T + 2), 2 * T + 3)]


@pytest.mark.parametrize("T", [1, 2, 5, 11])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_every_window(cell, reverse, T):
    for truncate in windows(T):
        check(Case(cell, T, 2, 2, 3, reverse=reverse, truncate=truncate), torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("truncate", [(3, 3), (3, 4), (3, 20), (7, 9), (1, 2)], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_more_windows_than_a_block_of_rows(cell, reverse, truncate, dtype, isa):
    # 19 * 40 / 7 rows and more; the last block is short.
    check(Case(cell, 40, 19, 3, 18, reverse=reverse, truncate=truncate), dtype)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_windows_that_cut_nothing_change_nothing(cell, reverse):
    case = {"cell": cell, "T": 12, "B": 3, "I": 2, "H": 5, "reverse": reverse}
    full = by_operator(Case(**case), torch.float64)
    for truncate in [(12, 12), (13, 13), (100, 200)]:
        got = by_operator(Case(**case, truncate=truncate), torch.float64)
        assert all(torch.equal(got[name], full[name]) for name in full)
    for truncate in [(3, 12), (4, 13), (5, 15), (1, 1000)]:  # the same sums in another order
        got = by_operator(Case(**case, truncate=truncate), torch.float64)
        assert_results(Case(**case), got, full)


# What is kept


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "sizes", [(1, 1, 1, 1), (3, 2, 4, 5), (9, 33, 3, 17), (300, 1, 2, 3), (2, 131, 3, 9)], ids=str
)
@pytest.mark.parametrize("reverse", [False, True])
def test_keeping_nothing_changes_no_bit(sizes, reverse, dtype, isa):
    case = Case("lstm", *sizes, reverse=reverse)
    inputs = case.inputs(dtype)
    kept, lean = (run_operator(case, inputs, keep) for keep in ("all", "nothing"))
    assert lean["c"].shape == (0,)
    for name in ("y", "h_n", "c_n"):
        assert torch.equal(kept[name], lean[name]), name


def test_gates_are_those_of_the_textbook():
    case = Case("lstm", 3, 2, 4, 5)
    inputs = case.inputs(torch.float64)
    weights = [inputs[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    gates = ops.lstm_layer(inputs["x"], inputs["h0"], inputs["c0"], *weights, False, 0, 0, "all")[4]
    assert gates.shape == (3, 2, 4, 5)
    i, f, g, o = gates.unbind(2)
    c = by_reference(case, torch.float64)["c"]
    c_prev = torch.cat((inputs["c0"][None], c[:-1]))
    assert_close(f * c_prev + i * g, c, K=9, T=3)
    assert_close(o * torch.tanh(c), by_reference(case, torch.float64)["y"], K=9, T=3)


def test_inputs_are_not_written_to():
    for cell in CELLS:
        case = Case(cell, 4, 3, 2, 5, truncate=(2, 3))
        inputs, cotangents = case.inputs(torch.float64), case.cotangents(torch.float64)
        leaves = {name: v.clone().requires_grad_() for name, v in inputs.items()}
        given = {name: v.clone() for name, v in cotangents.items()}
        outputs = run_operator(case, leaves)
        before = {name: v.detach().clone() for name, v in outputs.items()}
        torch.autograd.backward([outputs[n] for n in given], list(given.values()))
        assert all(torch.equal(leaves[name], v) for name, v in inputs.items())
        assert all(torch.equal(given[name], v) for name, v in cotangents.items())
        assert all(torch.equal(outputs[name], v) for name, v in before.items())


def test_scratch_memory_that_is_given_back():
    # Gradients of 300,000 initial states are more than is kept from call to call.
    case = Case("tanh", 1, 300_000, 1, 16)
    for _ in range(2):
        check(case, torch.float64)
        check(Case("tanh", 3, 2, 3, 4), torch.float64)


# Values that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cell", CELLS)
def test_not_finite_values_go_where_ieee_says(cell, value, isa, monkeypatch):
    case = Case(cell, 4, 3, 2, 18)
    finite = case.inputs
    for where in ("x", "h0", "w_ih", "w_hh", "b_ih"):

        def inputs(self, dtype, where=where):
            values = finite(dtype)
            values[where].view(-1)[1] = value
            return values

        monkeypatch.setattr(Case, "inputs", inputs)
        with np.errstate(all="ignore"):
            want = by_reference.__wrapped__(case, torch.float64)
        assert_results(case, by_operator(case, torch.float64), want)


def test_a_row_that_is_not_finite_leaves_the_others_alone(isa):
    for cell in CELLS:
        case = Case(cell, 9, 7, 3, 18)
        inputs = case.inputs(torch.float32)
        want = run_operator(case, inputs)
        inputs["x"][2, 4] = math.nan
        got = run_operator(case, inputs)
        others = torch.arange(7) != 4
        assert torch.equal(got["y"][:, others], want["y"][:, others])
        assert torch.equal(got["h_n"][others], want["h_n"][others])
        assert torch.equal(got["y"][:2], want["y"][:2])
        assert got["y"][2:, 4].isnan().all()


# Memory


def test_nothing_outside_of_the_arrays_is_touched():
    """Every array borders on a page that can't be touched: a stray access ends the process."""
    script = Path(__file__).with_name("guard_pages.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all inside" in done.stdout
