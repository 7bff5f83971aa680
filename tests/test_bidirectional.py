"""The operators for a layer in both directions, on the CPU: two calls of those for one."""

from __future__ import annotations

import pytest
import torch
from bidirectional_layer import by_bidirectional_operator, check, directions
from one_layer import Case, by_operator
from rnnfast import bidirectional
from rnnfast._native import accumulator

CASES = [
    Case("lstm", 5, 3, 4, 6),
    Case("lstm", 7, 2, 1, 3, truncate=(2, 2), biases="input"),
    Case("lstm", 7, 2, 3, 5, truncate=(2, 3), upstream=("y",)),
    Case("lstm", 2, 3, 4, 5, upstream=("h_n", "c"), biases="none"),
    Case("lstm", 3, 0, 2, 4),
    Case("tanh", 5, 3, 4, 6),
    Case("relu", 9, 17, 0, 3, truncate=(3, 3), biases="hidden"),
    Case("tanh", 1, 1, 2, 4, upstream=("h_n",)),
    Case("tanh", 0, 2, 2, 4, upstream=("h_n",)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("keep", ["all", "cells"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_two_calls(case, keep, dtype):
    both = by_bidirectional_operator(case, dtype, keep=keep)
    if case.T:
        check(case, both, dtype)
    alone = [by_operator(each, dtype, keep=keep) for each in directions(case)]
    alone[0]["dx"] = alone[0]["dx"] + alone[1].pop("dx")
    for got, want in zip(both, alone, strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_bfloat16_with_cells_in_float32(case):
    results = by_bidirectional_operator(case, torch.bfloat16, accumulator(torch.bfloat16))
    check(case, results, torch.bfloat16, in_float32=True)


def arguments(cell, truncate=(2, 3), requires_grad=True, keep="all"):
    """Of the operator for a small layer, gradients wanted of all but some biases."""
    T, B, I, H, gates = 4, 2, 3, 5, 4 if cell == "lstm" else 1

    def filled(*shape):
        return torch.randn(shape, dtype=torch.float64, requires_grad=requires_grad)

    x, options = filled(T, B, I), (*truncate, keep) if cell == "lstm" else (cell, *truncate)
    layers = []
    for biases in ((filled(gates * H), filled(gates * H)), (None, filled(gates * H).detach())):
        states = [filled(B, H) for _ in range(2 if cell == "lstm" else 1)]
        layers += [*states, filled(gates * H, I), filled(gates * H, H), *biases]
    return x, *layers, *options


def operator_of(cell):
    name = "bidirectional_lstm_layer" if cell == "lstm" else "bidirectional_rnn_layer"
    return getattr(torch.ops.rnnfast, name).default


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize(("cell", "keep"), [("lstm", "all"), ("lstm", "cells"), ("relu", "all")])
def test_opcheck(cell, keep, requires_grad):
    args = arguments(cell, requires_grad=requires_grad, keep=keep)
    torch.library.opcheck(operator_of(cell), args)


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_opcheck_backward(cell):
    x, *rest = arguments(cell, requires_grad=False)
    operator = operator_of(cell)
    outputs = operator(x, *rest)
    wants = (True, False, True, True)
    if cell == "lstm":
        first, second, (k1, k2, _) = bidirectional.split(rest, 6)
        results, others, _ = bidirectional.split(outputs[1:], 4)
        upstream = (None, results[1], results[2])
        kept, reverse = (*results[2:], None, None), (others[2], None, *second[4:])
        each = (*upstream, *first[:4], *kept), (*upstream, *second[:4], *reverse)
        options = (k1, k2)
    else:
        first, second, options = bidirectional.split(rest, 5)
        each = (outputs[1], *first[:3]), (None, *second[:3])
    name = operator._schema.name.split("::")[1]
    backward = getattr(torch.ops.rnnfast, f"{name}_backward").default
    for dy in (None, outputs[0]):
        torch.library.opcheck(backward, (dy, x, outputs[0], *each[0], *each[1], *options, *wants))


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_gradcheck(cell):
    # Full BPTT: a truncated gradient is not that of the forward pass.
    args = arguments(cell, truncate=(0, 0))
    layer = bidirectional.lstm_layer if cell == "lstm" else bidirectional.rnn_layer

    def differentiable(*args):
        return [output for output in layer(*args) if output.requires_grad]

    torch.autograd.gradcheck(differentiable, args)


def test_mistakes():
    x, *rest = arguments("lstm")
    for at, name in ((6, "h0"), (8, "w_ih"), (9, "w_hh"), (10, "b_ih")):
        wrong = list(rest)
        wrong[at] = torch.zeros(3, 3, dtype=torch.float64)
        shape = tuple(rest[at - 6].shape)
        with pytest.raises(RuntimeError) as caught:
            bidirectional.lstm_layer(x, *wrong)
        assert str(caught.value) == f"{name}_reverse has shape (3, 3), but should have {shape}"
    y, each = torch.zeros(4, 2, 5, dtype=torch.float64), (None, rest[0], rest[2][:5], rest[3][:5])
    backward = torch.ops.rnnfast.bidirectional_rnn_layer_backward
    with pytest.raises(RuntimeError, match=r"y has shape \(4, 2, 5\), .* have \(4, 2, 10\)"):
        backward(None, x, y, *each, *each, "tanh", 0, 0, *(True,) * 4)
    rest[0] = rest[6] = rest[0].float()
    with pytest.raises(RuntimeError, match=r"h0 is torch\.float32, but x is torch\.float64"):
        bidirectional.lstm_layer(x, *rest)


def test_cannot_be_differentiated_where_nothing_was_kept():
    y = bidirectional.lstm_layer(*arguments("lstm", keep="nothing"))[0]
    with pytest.raises(RuntimeError, match="keep='nothing'"):
        y.sum().backward()


# torch's own forward mode scripts its decompositions, which it has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_neither_twice_nor_in_forward_mode(cell):
    layer = bidirectional.lstm_layer if cell == "lstm" else bidirectional.rnn_layer
    x, *rest = arguments(cell)
    (dx,) = torch.autograd.grad(layer(x, *rest)[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        dx.sum().backward()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            layer(dual, *rest)
