"""The functional layer: what it refuses and how, packed sequences, projections, dtypes, states."""

from __future__ import annotations

import warnings

import pytest
import torch
from against_torch import assert_agree, leaves, tensors
from rnnfast import _native, checks, functional
from rnnfast.modules import LSTM, RNN, LSTMCell, RNNCell
from tolerance import assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence

SEQUENCES = [(torch.nn.RNN, RNN), (torch.nn.LSTM, LSTM)]
DOUBLE = torch.float64


def pair(theirs, ours, *args, **kwargs):
    """(ours, theirs) with the same weights."""
    ours, theirs = ours(*args, **kwargs), theirs(*args, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def zeros(*shape, **kwargs):
    return torch.zeros(*shape, **kwargs)


def twice(tensor):
    return (tensor, tensor)


# Calls torch.nn refuses too, with the same type of exception: (input, hx, what the message names).
# hx is given for h_0 of one layer and one direction, H = 4; an LSTM gets it as h_0 and c_0.
SEQUENCE_MISTAKES = {
    "input 1-D": (zeros(3), None, r"1 dimensions.*expected 2 or 3"),
    "input 4-D": (zeros(1, 2, 2, 3), None, r"4 dimensions.*expected 2 or 3"),
    "input size": (zeros(5, 2, 9), None, r"size\(-1\) is 9, expected input_size 3"),
    "input size, unbatched": (zeros(5, 9), None, r"is 9, expected input_size 3"),
    "input float64": (zeros(5, 2, 3, dtype=DOUBLE), None, r"input has dtype.*64.*float32.*to\("),
    "input integer": (zeros(5, 2, 3, dtype=torch.long), None, r"input has dtype torch.int64"),
    "input device": (zeros(5, 2, 3, device="meta"), None, r"input is on device meta, expected cpu"),
    "no steps": (zeros(0, 2, 3), None, r"0 time steps, expected at least 1"),
    "no steps, unbatched": (zeros(0, 3), None, r"0 time steps"),
    "hx 2-D": (zeros(5, 2, 3), zeros(1, 4), r"hx.*shape \(1, 4\), expected \(1, 2, 4\)"),
    "hx 3-D, unbatched": (zeros(5, 3), zeros(1, 1, 4), r"shape \(1, 1, 4\), expected \(1, 4\)"),
    "hx layers": (zeros(5, 2, 3), zeros(2, 2, 4), r"shape \(2, 2, 4\), expected \(1, 2, 4\)"),
    "hx batch": (zeros(5, 2, 3), zeros(1, 3, 4), r"shape \(1, 3, 4\), expected \(1, 2, 4\)"),
    "hx size": (zeros(5, 2, 3), zeros(1, 2, 5), r"shape \(1, 2, 5\), expected \(1, 2, 4\)"),
    "hx dtype": (zeros(5, 2, 3), zeros(1, 2, 4, dtype=DOUBLE), r"hx.*dtype torch.float64"),
    "hx device": (zeros(5, 2, 3), zeros(1, 2, 4, device="meta"), r"hx.*is on device meta"),
}
CELL_MISTAKES = {
    "input 3-D": (zeros(1, 2, 3), None, r"3 dimensions.*expected 1 or 2"),
    "input 0-D": (zeros(()), None, r"0 dimensions.*expected 1 or 2"),
    "input size": (zeros(2, 9), None, r"is 9, expected input_size 3"),
    "hx 3-D": (zeros(2, 3), zeros(1, 2, 4), r"shape \(1, 2, 4\), expected \(2, 4\)"),
    "hx size": (zeros(2, 3), zeros(2, 5), r"shape \(2, 5\), expected \(2, 4\)"),
    "hx batch": (zeros(2, 3), zeros(3, 4), r"shape \(3, 4\), expected \(2, 4\)"),
    "hx 1-D": (zeros(2, 3), zeros(4), r"shape \(4,\), expected \(2, 4\)"),
    "hx dtype": (zeros(2, 3), zeros(2, 4, dtype=DOUBLE), r"hx.*dtype torch.float64"),
    "input device": (zeros(2, 3, device="meta"), None, r"input is on device meta"),
}


def assert_same_mistake(ours, theirs, x, hx, message):
    if hx is not None and isinstance(theirs, (torch.nn.LSTM, torch.nn.LSTMCell)):
        hx = twice(hx)
    with pytest.raises(Exception, match=message) as caught:
        ours(x, hx)
    assert str(caught.value).startswith(type(ours).__name__ + ": ")
    assert "\n" not in str(caught.value)
    with pytest.raises(type(caught.value)) as torchs:
        theirs(x, hx)
    assert type(caught.value) is type(torchs.value)


@pytest.mark.parametrize("case", SEQUENCE_MISTAKES)
@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES)
def test_sequence_mistakes(theirs, ours, case):
    assert_same_mistake(ours(3, 4), theirs(3, 4), *SEQUENCE_MISTAKES[case])


@pytest.mark.parametrize("case", CELL_MISTAKES)
@pytest.mark.parametrize(
    ("theirs", "ours"), [(torch.nn.RNNCell, RNNCell), (torch.nn.LSTMCell, LSTMCell)]
)
def test_cell_mistakes(theirs, ours, case):
    assert_same_mistake(ours(3, 4), theirs(3, 4), *CELL_MISTAKES[case])


def test_mistakes_in_packed_input():
    sequences = pack_sequence([zeros(4, 3), zeros(2, 3)])
    for module, state in ((RNN(3, 4), lambda t: t), (LSTM(3, 4), twice)):
        for shape in ((1, 3, 4), (1, 4), (2, 2, 4)):
            with pytest.raises(RuntimeError, match=r"expected \(1, 2, 4\)"):
                module(sequences, state(zeros(*shape)))
        with pytest.raises(RuntimeError, match="expected input_size 3"):
            module(pack_sequence([zeros(4, 5), zeros(2, 5)]))
        with pytest.raises(ValueError, match="input has dtype"):
            module(sequences.to(DOUBLE))
        empty = PackedSequence(zeros(0, 3), zeros(0, dtype=torch.long))
        with pytest.raises(RuntimeError, match="0 time steps"):
            module(empty)


@pytest.mark.parametrize("bad", [None, [1, 2], 3.0])
def test_things_that_are_no_tensors(bad):
    x = zeros(5, 2, 3)
    for module in (RNN(3, 4), LSTM(3, 4)):
        with pytest.raises(TypeError, match="input must be a Tensor"):
            module(bad)
    if bad is not None:
        with pytest.raises(TypeError, match="hx must be a Tensor"):
            RNN(3, 4)(x, bad)
    with pytest.raises(TypeError, match=r"hx\[1\] must be a Tensor"):
        LSTM(3, 4)(x, (zeros(1, 2, 4), bad))


@pytest.mark.parametrize("bad", [zeros(1, 2, 4), (zeros(1, 2, 4),), (zeros(1, 2, 4),) * 3, 3])
def test_hx_of_an_lstm_is_a_pair(bad):
    with pytest.raises(RuntimeError, match=r"LSTM: hx must be a pair \(h_0, c_0\)"):
        LSTM(3, 4)(zeros(5, 2, 3), bad)
    with pytest.raises(RuntimeError, match=r"LSTMCell: hx must be a pair"):
        LSTMCell(3, 4)(zeros(2, 3), bad)


def test_c_0_is_checked_like_h_0():
    with pytest.raises(RuntimeError, match=r"hx\[1\] has shape \(1, 2, 5\), expected \(1, 2, 4\)"):
        LSTM(3, 4)(zeros(5, 2, 3), (zeros(1, 2, 4), zeros(1, 2, 5)))
    projected = LSTM(3, 4, proj_size=2)
    with pytest.raises(RuntimeError, match=r"hx\[0\] has shape \(1, 2, 4\), expected \(1, 2, 2\)"):
        projected(zeros(5, 2, 3), twice(zeros(1, 2, 4)))


def lstm_weights(**replaced):
    weights = {"w_ih": zeros(16, 3), "w_hh": zeros(16, 4), "b_ih": zeros(16), "b_hh": zeros(16)}
    return list({**weights, **replaced}.values())


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        (lstm_weights()[:3], RuntimeError, r"weights has 3 tensors, expected 4 \(weight_ih, "),
        ([], RuntimeError, r"weights has 0 tensors, expected 4"),
        (lstm_weights(w_ih=zeros(16)), RuntimeError, r"weight_ih\) has shape \(16,\), expected"),
        (lstm_weights(w_ih=zeros(15, 3)), RuntimeError, r"expected \(4 \* hidden_size, input_size"),
        (lstm_weights(w_ih=zeros(0, 3)), RuntimeError, r"expected \(4 \* hidden_size, input_size"),
        (
            lstm_weights(w_hh=zeros(16, 5)),
            RuntimeError,
            r"weight_hh of layer 0 has shape \(16, 5\)",
        ),
        (lstm_weights(w_hh=zeros(12, 4)), RuntimeError, r"expected \(16, 4\)"),
        (lstm_weights(b_ih=zeros(4)), RuntimeError, r"bias_ih of layer 0 .*\(4,\), expected \(16,"),
        (
            lstm_weights(b_hh=zeros(16, dtype=DOUBLE)),
            RuntimeError,
            r"bias_hh has dtype torch.float64",
        ),
        (lstm_weights(b_hh=zeros(16, device="meta")), RuntimeError, r"bias_hh is on device meta"),
        (lstm_weights(b_ih=None), TypeError, r"weights\[2\] must be a Tensor, got NoneType"),
    ],
)
def test_mistakes_in_weights(weights, error, message):
    with pytest.raises(error, match=message):
        functional.lstm(zeros(5, 2, 3), None, weights)


def test_mistakes_in_weights_of_upper_layers():
    layers = [*lstm_weights(), *lstm_weights()]
    with pytest.raises(RuntimeError, match=r"weight_ih of layer 1 .*\(16, 3\), expected \(16, 4\)"):
        functional.lstm(zeros(5, 2, 3), None, layers, num_layers=2)
    with pytest.raises(RuntimeError, match="8 tensors, expected 16"):
        functional.lstm(zeros(5, 2, 3), None, layers, num_layers=2, bidirectional=True)
    with pytest.raises(RuntimeError, match="weights has 8 tensors"):
        functional.lstm(zeros(5, 2, 3), None, layers, num_layers=0)


def test_unknown_nonlinearity():
    weights = [zeros(4, 3), zeros(4, 4)]
    with pytest.raises(ValueError, match="nonlinearity must be 'tanh' or 'relu', got 'gelu'"):
        functional.rnn(zeros(5, 2, 3), None, weights, bias=False, nonlinearity="gelu")
    with pytest.raises(RuntimeError, match="nonlinearity must be"):
        functional.rnn_cell(zeros(2, 3), None, *weights, nonlinearity="gelu")


def test_weights_of_a_dtype_without_kernels():
    module = LSTM(3, 4, dtype=torch.complex64)
    with pytest.raises(RuntimeError, match=r"dtype torch.complex64, expected float32, float64"):
        module(zeros(5, 2, 3, dtype=torch.complex64))


@pytest.mark.parametrize("device", ["cuda", "xpu"])
@pytest.mark.parametrize("cls", [RNN, LSTM, RNNCell, LSTMCell])
def test_device_without_kernels(cls, device, monkeypatch):
    """Fake tensors stand in for the device, so that this runs without one."""
    monkeypatch.setattr(checks, "KERNEL_DEVICES", {"cpu", "meta"})
    monkeypatch.setattr(_native, "cuda_missing", "no module named _cuda")
    module = cls(3, 4)
    with FakeTensorMode():
        weights = {n: torch.empty(p.shape, device=device) for n, p in module.named_parameters()}
        x = torch.empty(2, 3, device=device)
        with pytest.raises(RuntimeError, match=rf"no kernels for device {device}.*cpu.*torch\.nn"):
            torch.func.functional_call(module, weights, (x,))


def test_meta_tensors_give_shapes():
    module = LSTM(3, 4, num_layers=2, bidirectional=True, device="meta")
    y, (h, c) = module(torch.empty(5, 2, 3, device="meta"))
    assert y.is_meta
    assert (y.shape, h.shape, c.shape) == ((5, 2, 8), (4, 2, 4), (4, 2, 4))
    y, _ = LSTM(3, 4, proj_size=2, device="meta")(torch.empty(5, 2, 3, device="meta"))
    assert y.shape == (5, 2, 2)


# Packed sequences


def packed(lengths, enforce_sorted=False):
    torch.manual_seed(1)
    return pack_sequence([torch.randn(n, 3, dtype=DOUBLE) for n in lengths], enforce_sorted)


@pytest.mark.parametrize("lengths", [[1], [4, 4, 4], [2, 5, 1, 5, 3], [1, 9, 2]])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES)
def test_packed(theirs, ours, num_layers, bidirectional, lengths):
    kwargs = {"num_layers": num_layers, "bidirectional": bidirectional, "dtype": DOUBLE}
    a, b = pair(theirs, ours, 3, 4, **kwargs)
    x = packed(lengths)
    assert_agree(a, b, x)
    hx = torch.randn(num_layers * (1 + bidirectional), len(lengths), 4, dtype=DOUBLE)
    assert_agree(a, b, x, (hx, hx.cos()) if theirs is torch.nn.LSTM else hx)
    x = packed(sorted(lengths, reverse=True), enforce_sorted=True)
    assert_agree(a, b, x, (hx, hx.cos()) if theirs is torch.nn.LSTM else hx)
    got, want = a(x)[0], b(x)[0]
    for field in ("batch_sizes", "sorted_indices", "unsorted_indices"):
        x, y = getattr(got, field), getattr(want, field)
        assert x is y or torch.equal(x, y)


@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES)
def test_packed_dropout_is_torch_dropout_under_the_same_seed(theirs, ours):
    a, b = pair(theirs, ours, 3, 4, num_layers=3, dropout=0.4, dtype=DOUBLE)
    assert_agree(a, b, packed([2, 5, 1, 5, 3]), seed=5)


def test_short_sequences_do_not_run_on():
    """An unstable RNN overflows at step 200, which must not touch a sequence of 3 steps."""
    a, b = pair(torch.nn.RNN, RNN, 1, 1, nonlinearity="relu", bias=False)
    for module in (a, b):
        torch.nn.init.constant_(module.weight_hh_l0, 3.0)
    x = pack_padded_sequence(torch.ones(200, 2, 1), [200, 3])
    want = []
    for module in (b, a):
        h = module(x)[1][0, 1]
        want.append([h, *torch.autograd.grad(h, list(module.parameters()))])
        assert all(t.isfinite().all() for t in want[-1])
    for got, expected in zip(*want, strict=True):
        assert torch.equal(got, expected)


# Projections


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_projection(num_layers, bidirectional, bias):
    kwargs = {"proj_size": 2, "bias": bias, "bidirectional": bidirectional, "dtype": DOUBLE}
    a, b = pair(torch.nn.LSTM, LSTM, 3, 5, num_layers, **kwargs)
    rows = num_layers * (1 + bidirectional)
    hx = (torch.randn(rows, 4, 2, dtype=DOUBLE), torch.randn(rows, 4, 5, dtype=DOUBLE))
    assert_agree(a, b, torch.randn(6, 4, 3, dtype=DOUBLE), hx)
    assert_agree(a, b, packed([3, 6, 1, 6]), hx)


def test_projection_weights_are_checked():
    weights = [*lstm_weights(w_hh=zeros(16, 2)), zeros(3, 4)]
    with pytest.raises(RuntimeError, match=r"weight_hr of layer 0 .*\(3, 4\), expected \(2, 4\)"):
        functional.lstm(zeros(5, 2, 3), None, weights, proj_size=2)


# Cell states of every step


@pytest.mark.parametrize("proj_size", [0, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_cells_of_every_step(bidirectional, proj_size):
    """cells[t] is what c_n is when the sequence ends (or, in reverse, begins) at t."""
    module = LSTM(
        3, 4, num_layers=2, bidirectional=bidirectional, proj_size=proj_size, dtype=DOUBLE
    )
    x = torch.randn(5, 2, 3, dtype=DOUBLE)
    kwargs = {"num_layers": 2, "bidirectional": bidirectional, "proj_size": proj_size}
    with torch.no_grad():
        y, (_, c_n), cells = functional.lstm(x, None, module.weights(), return_cells=True, **kwargs)
    assert cells.shape == (5, 2, 4 * (1 + bidirectional))
    assert torch.equal(cells[-1, :, :4], c_n[-1 - bidirectional])
    if bidirectional:
        assert torch.equal(cells[0, :, 4:], c_n[-1])
    else:
        for t in range(5):
            assert_close(cells[t], module(x[: t + 1])[1][1][-1], K=8, T=5)
    assert torch.equal(y, module(x)[0])
    transposed = functional.lstm(
        x.transpose(0, 1), None, module.weights(), return_cells=True, batch_first=True, **kwargs
    )[2]
    assert torch.equal(transposed, cells.transpose(0, 1))
    alone = functional.lstm(x[:, 0], None, module.weights(), return_cells=True, **kwargs)[2]
    assert_close(alone, cells[:, 0], K=8, T=5)
    sequences = pack_padded_sequence(x, [5, 5])
    ragged = functional.lstm(sequences, None, module.weights(), return_cells=True, **kwargs)[2]
    assert_close(ragged.data.view(cells.shape), cells, K=8, T=5)


# dtypes


@pytest.mark.parametrize(
    ("cls", "options"),
    [*((cls, {}) for cls in (RNN, LSTM, RNNCell, LSTMCell)), (LSTM, {"proj_size": 4})],
)
def test_float16_is_computed_in_float32_and_rounded_once(cls, options):
    dtype = torch.float16
    hidden = 6 if options else 4
    module = cls(3, hidden, **options).to(dtype)
    exact = cls(3, hidden, **options)
    exact.load_state_dict(module.state_dict())
    x = torch.randn(2, 3).to(dtype)
    states = 1 if "RNN" in cls.__name__ else 2
    rows = 1 if "Cell" not in cls.__name__ else 2
    hx = [torch.randn(rows, size).to(dtype) for size in (4, hidden)[:states]]
    x, hx = leaves((x, hx))
    args = [x, hx[0] if states == 1 else hx]
    got = tensors(module(*args))
    want = tensors(exact(x.float(), hx[0].float() if states == 1 else [h.float() for h in hx]))
    for y, z in zip(got, want, strict=True):
        assert y.dtype == dtype
        assert torch.equal(y, z.to(dtype))
    inputs = [x, *module.parameters()]
    for p, g in zip(inputs, torch.autograd.grad(sum(y.sum() for y in got), inputs), strict=True):
        assert g.dtype == dtype
        assert g.shape == p.shape


@pytest.mark.parametrize("proj_size", [0, 2])
def test_autocast_casts_to_the_dtype_of_the_weights(proj_size):
    module = LSTM(3, 4, proj_size=proj_size)
    x = torch.randn(5, 2, 3)
    hx = (torch.randn(1, 2, proj_size or 4), torch.randn(1, 2, 4))
    want = module(x.bfloat16().float(), tuple(h.bfloat16().float() for h in hx))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = module(x.bfloat16(), tuple(h.bfloat16() for h in hx))
        with pytest.raises(ValueError, match=r"input has dtype torch\.int64"):
            module(x.long())
    for y, z in zip(tensors(got), tensors(want), strict=True):
        assert y.dtype == torch.float32
        assert torch.equal(y, z)


def test_no_grad_and_frozen_weights():
    module = LSTM(3, 4, num_layers=2).requires_grad_(False)
    x = torch.randn(5, 2, 3)
    assert not module(x)[0].requires_grad
    x.requires_grad_()
    y, (h, c) = module(x)
    assert y.requires_grad
    assert h.requires_grad
    assert c.requires_grad
    assert torch.autograd.grad(y.sum(), x, retain_graph=True)[0].abs().min() > 0
    with torch.no_grad():
        assert torch.equal(module(x)[0], y)
    hx = leaves((torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)))
    (gradient,) = torch.autograd.grad(module(x.detach(), hx)[0].sum(), hx[1])
    assert gradient.abs().min() > 0


def test_nothing_is_warned_about():
    """torch.nn warns about projections without oneDNN and about weights not in one chunk."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LSTM(3, 4, proj_size=2)(zeros(5, 2, 3))
        LSTM(3, 4, num_layers=2)(pack_sequence([zeros(2, 3)]))
