"""Packed sequences: each as if it were alone, in one call a layer and direction.

`Case.lengths` packs the sequences of a case; the textbook computes them one by one. Modules are
compared with torch.nn's in test_functional.py, and truncated ones with loops in test_tbptt.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from against_torch import assert_agree
from one_layer import Case, assert_results, by_operator, by_reference, check, laid_out, run_operator
from pairwise import pairwise
from rnnfast import LSTM, RNN, _native, direct, functional, halved_recurrence, ops
from short_way import by_operators, flat
from test_threads import assert_identical, on_one_thread
from tolerance import assert_close
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

FALLING = tuple(1 + (149 - b) // 25 for b in range(150))  # two blocks of rows, which end within one
LENGTHS = [(1,), (1, 1), (4, 4, 4), (7, 2, 2, 1), (9, 8, 5, 5, 5, 1), (30, 3, 3, 2), FALLING]
CELLS = ["lstm", "tanh", "relu"]


def case_of(cell, lengths, I, H, **options):
    return Case(cell, max(lengths), len(lengths), I, H, lengths=lengths, **options)


PAIRWISE = [
    case_of(**choice)
    for choice in pairwise(
        cell=CELLS,
        lengths=LENGTHS,
        I=[0, 1, 5, 130],
        H=[1, 17, 40],
        reverse=[False, True],
        biases=["both", "none", "input", "hidden"],
        layout=["dense", "offset", "transposed", "strided", "expanded"],
        upstream=[("y",), ("h_n", "c_n"), ("y", "c"), ("y", "h_n", "c_n", "c")],
        truncate=[None, (1, 1), (2, 2), (2, 3), (3, 11), (6, 6)],
    )
]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_every_sequence_is_as_if_alone(case, dtype, isa):
    check(case, dtype)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_bfloat16(lengths, reverse, isa):
    for cell, truncate in (("lstm", None), ("lstm", (2, 3)), ("tanh", (2, 2))):
        case = case_of(cell, lengths, 7, 19, reverse=reverse, truncate=truncate)
        want = by_reference(case, torch.bfloat16)
        assert_results(case, by_operator(case, torch.bfloat16), want, in_float32=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("truncate", [None, (2, 2), (2, 5)])
@pytest.mark.parametrize("reverse", [False, True])
def test_gates_computed_again_are_the_same_bits(reverse, truncate, dtype):
    for lengths in LENGTHS:
        case = case_of("lstm", lengths, 5, 19, reverse=reverse, truncate=truncate)
        assert_identical(by_operator(case, dtype, keep="cells"), by_operator(case, dtype))


# Rows of one step are shared out, or units, or the projection of steps; sequences fall in length,
# or one outlives the others.
SHARED = [
    (tuple(range(40, 0, -1)), 33, 96),
    ((60, *range(20, 8, -1)), 33, 96),
    ((60, 2), 150, 400),
    ((150, 20), 900, 40),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("truncate", [None, (3, 3), (3, 7)], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("shared", SHARED, ids=lambda shared: f"{len(shared[0])}x{shared[2]}")
def test_every_number_of_threads_gives_the_same_bits(shared, reverse, truncate, dtype, threads):
    cell = "tanh" if reverse else "lstm"
    case = case_of(cell, *shared, reverse=reverse, truncate=truncate)
    want = on_one_thread(case, dtype, _native.build_info()["isa"])
    for _ in range(2):
        assert_identical(by_operator(case, dtype), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_padding_gives_the_same_bits(cell, dtype, isa):
    """Going forward, where a row's sums know nothing of the rows beside it."""
    case = case_of(cell, (9, 8, 5, 5, 5, 1), 6, 33)
    inputs = case.inputs(dtype)
    padded = inputs["x"].new_full((case.T, case.B, case.I), 7.0)
    for b in range(case.B):
        padded[: case.lengths[b], b] = inputs["x"][case.rows_of(b)]
    got = run_operator(case, inputs)
    want = run_operator(Case(cell, case.T, case.B, case.I, case.H), inputs | {"x": padded})
    for b, length in enumerate(case.lengths):
        assert torch.equal(got["y"][case.rows_of(b)], want["y"][:length, b])
        assert torch.equal(got["h_n"][b], want["y"][length - 1, b])
        if cell == "lstm":
            assert torch.equal(got["c_n"][b], want["c"][length - 1, b])


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("reverse", [False, True])
def test_gradcheck(cell, reverse):
    case = case_of(cell, (4, 2, 1), 2, 3, reverse=reverse)
    inputs = case.inputs(torch.float64)

    def run(*values):
        return tuple(run_operator(case, dict(zip(inputs, values, strict=True))).values())

    assert torch.autograd.gradcheck(run, [v.requires_grad_() for v in inputs.values()])


def test_opcheck():
    case = case_of("lstm", (4, 2, 1), 2, 3)
    x, h0, c0, w_ih, w_hh, b_ih, b_hh = (
        v.requires_grad_() for v in case.inputs(torch.float64).values()
    )
    sizes, cut = case.batch_sizes, (False, 2, 3)
    lstm, rnn = torch.ops.rnnfast.lstm_layer.default, torch.ops.rnnfast.rnn_layer.default
    for keep in ("all", "cells"):
        torch.library.opcheck(lstm, (x, h0, c0, w_ih, w_hh, b_ih, b_hh, *cut, keep, sizes))
    weights = w_ih[:3], w_hh[:3], b_ih[:3], b_hh[:3]
    weights = [w.detach().requires_grad_() for w in weights]
    torch.library.opcheck(rnn, (x, h0, *weights, "tanh", *cut, sizes))


# Modules

MODULES = [(torch.nn.LSTM, LSTM), (torch.nn.RNN, RNN)]


def sentences(dtype=torch.float32, features=12):
    generator = torch.Generator().manual_seed(3)
    lengths = [int(n) for n in torch.randint(1, 40, (30,), generator=generator)]
    return pack_sequence([torch.randn(n, features, dtype=dtype) for n in lengths], False)


@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("theirs", "ours"), MODULES)
def test_a_batch_of_sentences(theirs, ours, bidirectional, num_layers):
    a = ours(12, 33, num_layers, bidirectional=bidirectional)
    b = theirs(12, 33, num_layers, bidirectional=bidirectional)
    b.load_state_dict(a.state_dict())
    assert_agree(a, b, sentences())


# Padded, for a GPU, or in segments: as when the rows are taken as they are. Here by CPU kernels.


def packed_by(way, monkeypatch):
    monkeypatch.setattr(functional, "_way_of_packed", lambda *_: way)


@pytest.mark.parametrize("way", ["padding", "segments"])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("theirs", "ours"), MODULES)
def test_other_ways(theirs, ours, bidirectional, num_layers, with_state, way, monkeypatch):
    packed_by(way, monkeypatch)
    options = {"num_layers": num_layers, "bidirectional": bidirectional, "dtype": torch.float64}
    a, b = ours(3, 5, **options), theirs(3, 5, **options)
    b.load_state_dict(a.state_dict())
    for lengths in ([1], [4, 4], [2, 9, 1, 9, 4]):
        x = pack_sequence([torch.randn(n, 3, dtype=torch.float64) for n in lengths], False)
        h = torch.randn(num_layers * (1 + bidirectional), len(lengths), 5, dtype=torch.float64)
        state = (h, h.cos()) if ours is LSTM else h
        assert_agree(a, b, x, *[state] * with_state)


@pytest.mark.parametrize("ours", [LSTM, RNN])
@pytest.mark.parametrize(
    ("truncate", "way"),
    [(1, "padding"), (3, "padding"), ((2, 5), "padding"), (1, "segments"), (3, "segments")],
)
def test_other_ways_truncated(truncate, way, ours, monkeypatch):
    module, x = ours(12, 5, truncate=truncate), sentences(torch.float64)
    module.double()

    def run():
        y, state = module(x)
        loss = y.data.cos().sum() + sum(s.sin().sum() for s in flat(state))
        return y.data, *flat(state), *torch.autograd.grad(loss, list(module.parameters()))

    want = run()
    packed_by(way, monkeypatch)
    for got, expected in zip(run(), want, strict=True):
        assert_close(got, expected, K=1000, T=40, scale=expected.abs().max().item())


CUDA_WAYS = [
    # layer, directions, layers, k1, k2
    (functional._lstm_layer, 1, 2, 0, 0, "padding"),
    (functional._tanh_layer, 2, 2, 0, 0, "padding"),
    (functional._lstm_layer, 1, 2, 3, 3, "padding"),
    (functional._lstm_layer, 1, 1, 3, 5, "padding"),
    (functional._lstm_layer, 2, 1, 3, 3, "segments"),
    (functional._relu_layer, 1, 1, 0, 0, "segments"),
    (functional._projected_layer, 1, 1, 0, 0, "segments"),
    (functional._lstm_layer, 2, 1, 3, 5, "lengths"),
    (functional._relu_layer, 1, 1, 3, 5, "lengths"),
    (functional._lstm_layer, 1, 2, 3, 5, "lengths"),
]


@pytest.mark.parametrize(("layer", "directions", "layers", "k1", "k2", "way"), CUDA_WAYS)
def test_the_way_on_cuda(layer, directions, layers, k1, k2, way, monkeypatch):
    monkeypatch.setattr(functional, "_on_cuda", lambda _: True)
    args = (layer, torch.empty(0), directions, directions * layers, k1, k2)
    assert functional._way_of_packed(*args) == way


@pytest.mark.parametrize("truncate", [None, 5])
@pytest.mark.parametrize("ours", [LSTM, RNN])
def test_both_ways_give_the_same_bits(ours, truncate):
    module, x = ours(12, 33, 2, bidirectional=True, truncate=truncate), sentences()

    def run():
        y, state = module(x)
        loss = y.data.cos().sum() + sum(s.sin().sum() for s in flat(state))
        return y.data, *flat(state), *torch.autograd.grad(loss, list(module.parameters()))

    for got, want in zip(run(), by_operators(run), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("ours", [LSTM, RNN])
def test_a_layer_and_direction_is_one_call(ours, grad, monkeypatch):
    calls = []

    class Core:
        def __getattr__(self, name):
            function = getattr(_native.core, name)
            return lambda *args: (calls.append(name), function(*args))[1]

    monkeypatch.setattr(direct, "core", Core())
    module, x = ours(12, 5, 3, bidirectional=True), sentences()
    with torch.set_grad_enabled(grad):
        module(x)
    assert calls == 6 * ["run_layer"]


def test_weights_of_half_the_bytes():
    module, x = LSTM(12, 34), sentences()
    rounded = LSTM(12, 34)
    rounded.load_state_dict(module.state_dict())
    with torch.no_grad():
        rounded.weight_hh_l0.copy_(rounded.weight_hh_l0.bfloat16())
        with halved_recurrence():
            got = module(x)
        assert torch.equal(got[0].data, rounded(x)[0].data)
        assert not torch.equal(got[0].data, module(x)[0].data)


def test_cell_states_of_every_step():
    module, x = LSTM(12, 5, bidirectional=True), sentences()
    y, (_, c_n), cells = functional.lstm(
        x, None, module.weights(), bidirectional=True, return_cells=True
    )
    c, lengths = pad_packed_sequence(cells)
    assert cells.data.shape == y.data.shape
    for b, length in enumerate(lengths):
        assert torch.equal(c[length - 1, b, :5], c_n[0, b])
        assert torch.equal(c[0, b, 5:], c_n[1, b])


def test_data_that_is_part_of_something_larger():
    module, x = LSTM(12, 5), sentences()
    inside = x._replace(data=laid_out(x.data, "strided"))  # among NaN
    assert torch.equal(module(inside)[0].data, module(x)[0].data)


# Mistakes

MISTAKES = {
    "int32": (torch.tensor([2, 1], dtype=torch.int32), "batch_sizes is torch.int32 on cpu"),
    "2-D": (torch.tensor([[2, 1]]), "batch_sizes has 2 dimensions, but should have 1"),
    "begins with fewer": (torch.tensor([1, 1, 1]), r"should begin with 2"),
    "begins with more": (torch.tensor([3]), r"should begin with 2"),
    "grows": (torch.tensor([2, 0, 1]), "never grow"),
    "none": (torch.tensor([2, 1, 0]), "never be below 1"),
    "rows too few": (torch.tensor([2, 2]), "x has 3 rows, but batch_sizes has 4"),
    "rows too many": (torch.tensor([2]), "x has 3 rows, but batch_sizes has 2"),
}


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
@pytest.mark.parametrize("mistake", MISTAKES)
def test_wrong_batch_sizes(mistake, cell, monkeypatch):
    sizes, message = MISTAKES[mistake]
    monkeypatch.setattr(_native.core, "forward", lambda *_: pytest.fail("the kernel ran"))
    gates = 4 if cell == "lstm" else 1
    x, h, w_ih, w_hh = (torch.zeros(s) for s in ((3, 4), (2, 5), (5 * gates, 4), (5 * gates, 5)))
    args = (w_ih, w_hh, None, None)
    if cell == "lstm":
        call = partial(ops.lstm_layer, x, h, h, *args, False, 0, 0, "all", sizes)
    else:
        call = partial(ops.rnn_layer, x, h, *args, "tanh", False, 0, 0, sizes)
    with pytest.raises(RuntimeError, match=message):
        call()


def test_padded_input_with_batch_sizes():
    case = case_of("tanh", (2, 1), 4, 5)
    inputs = case.inputs(torch.float32)
    with pytest.raises(RuntimeError, match=r"x has 3 dimensions, but should have 2: \(N, I\)"):
        run_operator(case, inputs | {"x": torch.zeros(2, 2, 4)})


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("sizes", [[2, 1, 2], [2, 2, 0, 1], [1, 2, 2]], ids=str)
@pytest.mark.parametrize("ours", [LSTM, RNN])
def test_the_core_trusts_no_batch_sizes(ours, sizes, grad):
    """A PackedSequence made by hand goes the short way, past the operators' checks."""
    module, x = ours(4, 5), PackedSequence(torch.zeros(5, 4), torch.tensor(sizes))
    message = "never grow|none more than the one before"
    with torch.set_grad_enabled(grad), pytest.raises((RuntimeError, ValueError), match=message):
        module(x)


@pytest.mark.parametrize("ours", [LSTM, RNN])
def test_batch_sizes_that_change_before_the_gradient_is_asked_for(ours):
    """More rows than were saved must not be read."""
    module, sizes = ours(4, 5), torch.tensor([2, 1])
    y = module(PackedSequence(torch.zeros(3, 4), sizes))[0].data
    sizes[1] = 2
    with pytest.raises(RuntimeError, match="x has 3 rows, but batch_sizes has 4"):
        y.sum().backward()
