"""bfloat16 weights and activations, added up in float32, with a float32 cell state.

The tolerance is derived in tolerance.py from where numbers are rounded to be stored. Sharper are
the results that are not rounded: after a single step the cell state holds the products in float32,
so an element too many or too few shows there.
"""

from __future__ import annotations

import math

import pytest
import torch
from one_layer import (
    Case,
    assert_results,
    by_operator,
    by_reference,
    differentiate,
    run_operator,
)
from rnnfast import LSTM, RNN, LSTMCell, RNNCell, functional, ops
from rnnfast.cpu import KEEP
from tolerance import STORED_BACKWARD, STORED_FORWARD, assert_close
from torch.nn.utils.rnn import pack_padded_sequence

BF16 = torch.bfloat16
SIZES = [
    (1, 1, 1, 1),
    (3, 7, 5, 3),
    (5, 3, 17, 16),
    (3, 2, 65, 33),
    (2, 130, 3, 5),
    (2, 1, 3, 2),
    (7, 5, 129, 17),
    (6, 3, 2, 129),
    (20, 13, 70, 66),
]
WAYS = [
    {},
    {"reverse": True, "layout": "offset"},
    {"truncate": (1, 1), "biases": "none"},
    {"truncate": (2, 3), "layout": "strided", "reverse": True},
]


CASES = [Case(cell, *sizes, **way) for cell in ("lstm", "tanh") for sizes in SIZES for way in WAYS]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_against_the_textbook(case, isa):
    assert_results(case, by_operator(case, BF16), by_reference(case, BF16), in_float32=True)


# A relu's derivative jumps where its pre-activation passes zero, which rounding h can make it do:
# beyond one step its gradients have no tolerance.
@pytest.mark.parametrize("T", [1, 9])
def test_relu(T, isa):
    case = Case("relu", T, 5, 33, 17)
    want = by_reference(case, BF16)
    got = by_operator(case, BF16)
    names = want if T == 1 else ("y", "h_n")
    assert_results(case, {n: got[n] for n in names}, {n: want[n] for n in names}, in_float32=True)


@pytest.mark.parametrize("I", [0, 1, 2, 3, 17, 129])
@pytest.mark.parametrize("H", [1, 2, 3, 17, 129])
@pytest.mark.parametrize("B", [1, 7])
def test_products_are_added_up_in_float32(B, H, I, isa):
    """One step's cell state and what it hands back are float32 throughout."""
    case = Case("lstm", 1, B, I, H, upstream=("h_n", "c_n"))
    inputs = case.inputs(BF16)
    inputs["c0"] = inputs["c0"].float()
    got, want = differentiate(case, inputs, case.cotangents(BF16)), by_reference(case, BF16)
    for name in ("c", "c_n"):
        assert_close(got[name], want[name], K=I + H, dtype=torch.float32, name=name)
    assert_close(got["dc0"], want["dc0"], K=I + H, dtype=torch.float32, scale=2.0)
    assert torch.equal(got["c"][0], got["c_n"])
    # h is the same, rounded once: to one of the two neighbours of the exact value.
    error = (got["y"].double() - want["y"]).abs()
    assert (error <= (2**-9 + 1e-5) * 2 * want["y"].abs() + 1e-6).all()


def test_the_cell_state_is_not_rounded_between_steps(isa):
    """Steps of 2^-10 onto 1: in bfloat16 the sum would never leave 1."""
    T, B, H = 512, 1, 16
    w_ih, w_hh = torch.zeros(4 * H, 1, dtype=BF16), torch.zeros(4 * H, H, dtype=BF16)
    b = torch.zeros(4, H)
    b[0], b[1], b[2] = 30.0, 30.0, math.atanh(2**-10)
    b = b.flatten().to(BF16)
    step = math.tanh(b[2 * H].item())
    x, h0, c0 = torch.zeros(T, B, 1, dtype=BF16), torch.zeros(B, H, dtype=BF16), torch.ones(B, H)
    for keep in KEEP:
        y, h_n, c_n, _, _ = ops.lstm_layer(x, h0, c0, w_ih, w_hh, b, None, False, 0, 0, keep)
        assert_close(c_n, torch.full((B, H), 1 + T * step), T=T, dtype=torch.float32)
        assert (y.dtype, h_n.dtype, c_n.dtype) == (BF16, BF16, torch.float32)


def test_weight_gradients_are_rounded_once(isa):
    """4,096 equal terms of a sum: added up in bfloat16 it would stop growing at 256 of them."""
    T, B, H = 2048, 2, 3
    x, h0 = torch.ones(T, B, 1, dtype=BF16), torch.zeros(B, H, dtype=BF16)
    weights = [torch.zeros(H, size, dtype=BF16, requires_grad=True) for size in (1, H)]
    bias = torch.zeros(H, dtype=BF16, requires_grad=True)
    y, _ = ops.rnn_layer(x, h0, *weights, bias, None, "tanh", False, 0, 0)
    d_ih, d_b = torch.autograd.grad(y.float().sum(), (weights[0], bias))
    assert torch.equal(d_ih, torch.full((H, 1), T * B, dtype=BF16))
    assert torch.equal(d_b, torch.full((H,), T * B, dtype=BF16))


def test_windows_that_overlap_are_added_up_before_rounding(isa):
    """TBPTT(1, k): a step's gradient is a sum of k windows' shares, here of one and of crumbs."""
    T, k, H = 64, 64, 4
    x, h0 = torch.zeros(T, 1, 1, dtype=BF16), torch.zeros(1, H, dtype=BF16)
    w_ih = torch.zeros(H, 1, dtype=BF16)
    # h[t] stays 0, so dh[t-1] = da[t] W_hh; W_hh = 1 hands a loss's gradient back undiminished.
    w_hh = torch.eye(H, dtype=BF16)
    bias = torch.zeros(H, dtype=BF16, requires_grad=True)
    y, _ = ops.rnn_layer(x, h0, w_ih, w_hh, bias, None, "tanh", False, 1, k)
    (d_b,) = torch.autograd.grad(y.float().sum(), bias)
    assert torch.equal(d_b, torch.full((H,), T * (T + 1) / 2).to(BF16))


def test_rounding_is_to_nearest_even(isa):
    """h = relu(x1 + x2): bfloat16 rounds the sum as torch does, ties and overflow included."""
    pairs = torch.randn(4000, 2).exp() * torch.exp2(torch.randint(-120, 120, (4000, 1)))
    pairs[:64] = 1.0
    pairs[:64, 1] = torch.arange(64) * 2.0**-9  # ties, above even and above odd numbers
    pairs[64:66] = torch.tensor([[3.3e38, 1e37], [torch.inf, 1.0]])
    pairs = pairs.to(BF16)
    w_ih, w_hh = torch.ones(1, 2, dtype=BF16), torch.zeros(1, 1, dtype=BF16)
    h0 = torch.zeros(len(pairs), 1, dtype=BF16)
    y, _ = ops.rnn_layer(pairs[None], h0, w_ih, w_hh, None, None, "relu", False, 0, 0)
    assert torch.equal(y[0, :, 0], pairs.float().sum(1).to(BF16))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("cell", ["lstm", "tanh", "relu"])
@pytest.mark.parametrize(("B", "I", "H"), [(2, 3, 5), (9, 17, 33), (7, 1, 1)])
def test_what_is_not_finite_stays_in_its_row(B, I, H, cell, value, isa):
    """An odd row's last pair must not see the row behind it, nor a gradient another row's input."""
    case = Case(cell, 4, B, I, H)
    inputs, cotangents = case.inputs(BF16), case.cotangents(BF16)
    clean = differentiate(case, inputs, cotangents)
    for row in (0, B - 1):
        spoiled = {name: v.clone() for name, v in inputs.items()}
        spoiled["x"][1, row] = value
        got = differentiate(case, spoiled, cotangents)
        others = [b for b in range(B) if b != row]
        for name in ("y", "h_n", "dh0", "dx"):
            axis = 1 if got[name].dim() == 3 else 0
            index = torch.tensor(others)
            kept = got[name].index_select(axis, index)
            assert torch.equal(kept, clean[name].index_select(axis, index)), name
        assert torch.equal(got["y"][0], clean["y"][0])
        if math.isnan(value):
            assert got["y"][1:, row].isnan().all()


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_without_saving_the_outputs_are_the_same(cell, isa):
    case = Case(cell, 9, 5, 17, 33)
    kept, dropped = (run_operator(case, case.inputs(BF16), keep) for keep in ("all", "nothing"))
    for name in ("y", "h_n", "c_n"):
        assert name not in kept or torch.equal(kept[name], dropped[name])


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_opcheck(cell):
    case = Case(cell, 3, 2, 5, 3)
    inputs = {name: v.requires_grad_() for name, v in case.inputs(BF16).items()}
    weights = [inputs[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    if cell == "lstm":
        c0 = inputs["c0"].detach().float().requires_grad_()
        args = (inputs["x"], inputs["h0"], c0, *weights, False, 0, 0, "all")
    else:
        args = (inputs["x"], inputs["h0"], *weights, cell, False, 0, 0)
    name = "lstm_layer" if cell == "lstm" else "rnn_layer"
    torch.library.opcheck(getattr(torch.ops.rnnfast, name).default, args)


def test_a_cell_state_in_bfloat16_is_an_error():
    inputs = Case("lstm", 2, 2, 3, 4).inputs(BF16)
    args = [inputs[name] for name in ("x", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh")]
    with pytest.raises(RuntimeError, match=r"c0 is torch.bfloat16.*should be torch.float32"):
        ops.lstm_layer(*args, False, 0, 0, "all")


# Modules


def in_float64(module):
    """The same weights in a float64 module."""
    options = {"nonlinearity": module.nonlinearity} if isinstance(module, RNN) else {}
    exact = type(module)(
        module.input_size,
        module.hidden_size,
        module.num_layers,
        bidirectional=module.bidirectional,
        dtype=torch.float64,
        **options,
    )
    exact.load_state_dict(module.state_dict())
    return exact


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("cls", [LSTM, RNN])
def test_modules(cls, bidirectional, ragged):
    module = cls(5, 9, num_layers=2, bidirectional=bidirectional, dtype=BF16)
    exact = in_float64(module)
    results = []
    x = torch.randn(7, 3, 5).to(BF16)
    for net, dtype in ((module, BF16), (exact, torch.float64)):
        x_own = x.to(dtype).requires_grad_()
        given = pack_padded_sequence(x_own, [7, 4, 4]) if ragged else x_own
        y, state = net(given)
        y = y.data if ragged else y
        state = state if cls is LSTM else (state,)
        loss = y.double().sum() + sum(s.double().square().sum() for s in state)
        leaves = [x_own, *net.parameters()]
        gradients = torch.autograd.grad(loss, leaves)
        assert all(t.dtype == dtype for t in (y, *state, *gradients))
        results.append(((y, *state), gradients))
    (got, got_gradients), (want, want_gradients) = results
    # The layers of a stack follow each other as steps do; c_n is rounded when it is handed out.
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, K=27, T=14, stored=STORED_FORWARD)
    scale = max(g.abs().max().item() for g in want_gradients)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        assert_close(a, b, K=60, T=14, scale=scale, stored=STORED_BACKWARD)


@pytest.mark.parametrize("cls", [LSTMCell, RNNCell])
@pytest.mark.parametrize("given", [False, True])
def test_cells(cls, given):
    cell, exact = cls(17, 33, dtype=BF16), cls(17, 33, dtype=torch.float64)
    exact.load_state_dict(cell.state_dict())
    x = torch.randn(4, 17).to(BF16)
    state = torch.randn(4, 33).to(BF16) if given else None
    pair = (state, state) if given and cls is LSTMCell else state
    double = (
        None
        if pair is None
        else tuple(s.double() for s in pair)
        if cls is LSTMCell
        else state.double()
    )
    got, want = cell(x, pair), exact(x.double(), double)
    for a, b in zip(*((r,) if torch.is_tensor(r) else r for r in (got, want)), strict=True):
        assert a.dtype == BF16
        assert_close(a, b, K=50, stored=STORED_FORWARD)


@pytest.mark.parametrize("truncate", [3, (2, 5)])
def test_truncated_stacks_and_their_cell_states(truncate):
    module = LSTM(5, 9, num_layers=2, dtype=BF16)
    exact = in_float64(module)
    results = []
    x = torch.randn(11, 3, 5).to(BF16)
    for net, dtype in ((module, BF16), (exact, torch.float64)):
        y, _, cells = functional.lstm(
            x.to(dtype), None, net.weights(), num_layers=2, truncate=truncate, return_cells=True
        )
        assert y.dtype == cells.dtype == dtype
        gradients = torch.autograd.grad(y.double().sum() + cells.double().sum(), net.weights())
        results.append(((y, cells), gradients))
    (got, got_gradients), (want, want_gradients) = results
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, K=27, T=22, stored=STORED_FORWARD)
    scale = max(g.abs().max().item() for g in want_gradients)
    for a, b in zip(got_gradients, want_gradients, strict=True):
        assert_close(a, b, K=60, T=22, scale=scale, stored=STORED_BACKWARD)
