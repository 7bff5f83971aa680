"""truncate=(k1, k2) gives the gradients of the loop one writes in torch.nn with detach()."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_torch import outputs_and_grads
from rnnfast.modules import LSTM, RNN
from tolerance import assert_close
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

T, B, IN, H = 11, 2, 3, 4
SEQUENCES = [(torch.nn.RNN, RNN), (torch.nn.LSTM, LSTM)]
EQUAL = [(1, 1), (2, 2), (3, 3), (4, 4), (10, 10), (11, 11), (30, 30)]
LONGER = [(1, 2), (1, 5), (2, 3), (3, 4), (3, 5), (3, 9), (4, 7), (5, 6), (5, 11), (7, 8), (10, 11)]
FULL = [(1, 11), (2, 12), (6, 13)]  # windows longer than need be


def pair(theirs, ours, *args, truncate, **kwargs):
    """(ours, theirs) with the same weights."""
    torch.manual_seed(0)
    theirs = theirs(*args, dtype=torch.float64, **kwargs)
    ours = ours(*args, dtype=torch.float64, truncate=truncate, **kwargs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def make_inputs(module):
    torch.manual_seed(1)
    rows = module.num_layers * (1 + module.bidirectional)
    h = torch.randn(rows, B, module.proj_size or H, dtype=torch.float64)
    x = torch.randn(T, B, IN, dtype=torch.float64)
    if isinstance(module, torch.nn.LSTM):
        return x, (h, torch.randn(rows, B, H, dtype=torch.float64))
    return x, h


def map_state(function, state):
    return function(state) if isinstance(state, torch.Tensor) else tuple(map(function, state))


def detach_loop(run, x, hx, k1, k2, reverse=False):
    """The loop by hand. run(x, state) -> (y, state) runs steps in one direction, from graph inputs.

    Every block of k1 steps, counted from time 0, is run with the k2 - k1 steps before it, from a
    state without history, unless that is the very first.
    """
    T = len(x)
    blocks = [(begin, min(begin + k1, T)) for begin in range(0, T, k1)]
    if reverse:
        x = x.flip(0)
        blocks = [(T - end, T - begin) for begin, end in reversed(blocks)]
    states = [hx]
    with torch.no_grad():
        for t in range(T):
            states.append(run(x[t : t + 1], states[-1])[1])
    ys = []
    for begin, end in blocks:
        window = max(begin - (k2 - k1), 0)
        y, state = run(x[window:end], states[window])
        ys.append(y[begin - window :])
    y = torch.cat(ys)
    return (y.flip(0) if reverse else y), state


def single(module, layer, reverse):
    """run() of one layer and direction of a torch.nn module."""
    suffix = f"_l{layer}" + "_reverse" * reverse
    names = [n for n, _ in module.named_parameters() if n.endswith(suffix)]
    inputs = getattr(module, names[0]).shape[1]
    kwargs = {"proj_size": module.proj_size} if module.proj_size else {}
    alone = type(module)(inputs, H, bias=module.bias, dtype=torch.float64, **kwargs)

    def run(x, state):
        weights = {n.replace(suffix, "_l0"): getattr(module, n) for n in names}
        y, state = torch.func.functional_call(alone, weights, (x, map_state(unsqueeze, state)))
        return y, map_state(squeeze, state)

    return run


def unsqueeze(tensor):
    return tensor.unsqueeze(0)


def squeeze(tensor):
    return tensor.squeeze(0)


def by_hand(module, x, hx, k1, k2):
    """module(x, hx) with the gradients of detach loops: one over a stack, or one per direction."""
    if not module.bidirectional:
        return detach_loop(module, x, hx, k1, k2)
    finals = []
    for layer in range(module.num_layers):
        ys = []
        for reverse in (False, True):
            row = 2 * layer + reverse
            state = map_state(lambda s, row=row: s[row], hx)
            y, state = detach_loop(single(module, layer, reverse), x, state, k1, k2, reverse)
            ys.append(y)
            finals.append(state)
        x = torch.cat(ys, -1)
    if isinstance(hx, tuple):
        return x, tuple(torch.stack(s) for s in zip(*finals, strict=True))
    return x, torch.stack(finals)


def assert_truncated(ours, theirs, k1, k2, inputs=None):
    inputs = inputs or make_inputs(theirs)
    got = outputs_and_grads(ours, list(ours.parameters()), inputs)
    weights = list(theirs.parameters())
    want = outputs_and_grads(lambda x, hx: by_hand(theirs, x, hx, k1, k2), weights, inputs)
    assert got.keys() == want.keys()
    for name in got:
        assert_close(got[name], want[name], K=IN + H + T * B, T=3 * T, scale=1.0, name=name)


@pytest.mark.parametrize(("k1", "k2"), EQUAL + LONGER + FULL)
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES)
def test_stacks(theirs, ours, num_layers, k1, k2):
    assert_truncated(*pair(theirs, ours, IN, H, num_layers, truncate=(k1, k2)), k1, k2)


@pytest.mark.parametrize(("k1", "k2"), EQUAL + LONGER + FULL)
@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES)
def test_two_directions(theirs, ours, k1, k2):
    assert_truncated(*pair(theirs, ours, IN, H, bidirectional=True, truncate=(k1, k2)), k1, k2)


@pytest.mark.parametrize(("k1", "k2"), EQUAL)
@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES)
def test_bidirectional_stacks(theirs, ours, k1, k2):
    kwargs = {"num_layers": 2, "bidirectional": True}
    assert_truncated(*pair(theirs, ours, IN, H, truncate=(k1, k2), **kwargs), k1, k2)


@pytest.mark.parametrize(("k1", "k2"), [(3, 3), (3, 5), (4, 9), (5, 11)])
@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_projection(kwargs, k1, k2):
    a, b = pair(torch.nn.LSTM, LSTM, IN, H, proj_size=2, truncate=(k1, k2), **kwargs)
    assert_truncated(a, b, k1, k2)


@pytest.mark.parametrize("kwargs", [{"bias": False}, {"nonlinearity": "relu"}], ids=str)
def test_without_bias_and_with_relu(kwargs):
    for k1, k2 in [(3, 3), (3, 5)]:
        a, b = pair(torch.nn.RNN, RNN, IN, H, 2, truncate=(k1, k2), **kwargs)
        assert_truncated(a, b, k1, k2)


@pytest.mark.parametrize("T", [1, 2, 3, 5, 6, 7, 12])
def test_lengths_around_a_window(T):
    a, b = pair(torch.nn.LSTM, LSTM, IN, H, 2, truncate=(3, 5))
    x, hx = make_inputs(b)
    assert_truncated(a, b, 3, 5, (torch.cat((x, x.cos()))[:T], hx))


@pytest.mark.parametrize("truncate", [3, (3, 5)])
@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES)
def test_empty_batch_and_unbatched_and_batch_first(theirs, ours, truncate):
    a, b = pair(theirs, ours, IN, H, 2, truncate=truncate)
    x, hx = make_inputs(b)
    assert a(x[:, :0])[0].shape == (T, 0, H)
    want = a(x, hx)[0]
    y = a(x[:, 0], map_state(lambda s: s[:, 0], hx))[0]
    assert_close(y, want[:, 0], K=IN + H, T=T)
    a.batch_first = True
    assert_close(a(x.transpose(0, 1), hx)[0].transpose(0, 1), want, K=IN + H, T=T)


@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES)
def test_one_number_is_both(theirs, ours):
    a, b = pair(theirs, ours, IN, H, 2, truncate=4)
    assert_truncated(a, b, 4, 4)


@pytest.mark.parametrize("truncate", [1, 3, (2, 3), (3, 9), (5, 50)])
@pytest.mark.parametrize("num_layers", [1, 2])
@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES)
def test_the_forward_pass_is_not_truncated(theirs, ours, num_layers, truncate):
    a, b = pair(theirs, ours, IN, H, num_layers, truncate=truncate)
    x, hx = make_inputs(b)
    y, state = a(x, hx)
    wanted, want = b(x, hx)
    assert_close(y, wanted, K=IN + H, T=T)
    for got, expected in zip(torch.stack([*state]), torch.stack([*want]), strict=True):
        assert_close(got, expected, K=IN + H, T=T)
    with torch.no_grad():
        assert_close(a(x, hx)[0], wanted, K=IN + H, T=T)


def test_gradient_stops_where_the_window_begins():
    """A loss on the last step, in the block of steps 9 and 10, with a window of steps 7 to 10."""
    module = LSTM(IN, H, num_layers=2, truncate=(3, 5))
    x = torch.randn(T, B, IN, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x)[0][-1].sum(), x)
    reached = gradient.abs().amax((1, 2)) > 0
    assert reached.tolist() == [t >= 7 for t in range(T)]


def test_dropout_uses_one_mask_in_all_windows():
    """Two layers by hand, the mask of the step riding along as further features of x."""
    k1, k2, p = 3, 5, 0.5
    a, b = pair(torch.nn.LSTM, LSTM, IN, H, 2, dropout=p, truncate=(k1, k2))
    first, second = single(b, 0, False), single(b, 1, False)
    torch.manual_seed(6)
    mask = F.dropout(torch.ones(T, B, H, dtype=torch.float64), p, True)

    def run(x_and_mask, state):
        x, mask = x_and_mask.split((IN, H), -1)
        y, lower = first(x, map_state(lambda s: s[0], state))
        y, upper = second(y * mask, map_state(lambda s: s[1], state))
        return y, tuple(torch.stack(pair) for pair in zip(lower, upper, strict=True))

    def masked(x, hx):
        return detach_loop(run, torch.cat((x, mask), -1), hx, k1, k2)

    inputs = make_inputs(b)
    got = outputs_and_grads(a, list(a.parameters()), inputs, seed=6)
    want = outputs_and_grads(masked, list(b.parameters()), inputs)
    for name in want:
        assert_close(got[name], want[name], K=IN + H + T * B, T=2 * T, scale=1.0, name=name)


@pytest.mark.parametrize("truncate", [2, 3, (2, 3), (3, 7), (4, 30)])
@pytest.mark.parametrize("kwargs", [{}, {"num_layers": 2}, {"bidirectional": True}], ids=str)
@pytest.mark.parametrize(("theirs", "ours"), SEQUENCES)
def test_packed_is_every_sequence_alone(theirs, ours, kwargs, truncate):
    a, b = pair(theirs, ours, IN, H, truncate=truncate, **kwargs)
    k1, k2 = (truncate, truncate) if isinstance(truncate, int) else truncate
    torch.manual_seed(2)
    lengths = [2, 9, 1, 9, 4, 3]
    sequences = [torch.randn(n, IN, dtype=torch.float64) for n in lengths]
    rows = b.num_layers * (1 + b.bidirectional)
    h = torch.randn(rows, len(lengths), H, dtype=torch.float64)
    hx = (h, h.cos()) if theirs is torch.nn.LSTM else h

    def in_one(*args):
        *xs, hx = args
        y, state = a(pack_sequence(xs, enforce_sorted=False), hx)
        return unpack_sequence(y), state

    def alone(*args):
        *xs, hx = args
        ys, states = [], []
        for i, x in enumerate(xs):
            state = map_state(lambda s, i=i: s[:, i : i + 1], hx)
            y, state = by_hand(b, x.unsqueeze(1), state, k1, k2)
            ys.append(y.squeeze(1))
            states.append(state)
        if isinstance(hx, tuple):
            return ys, tuple(torch.cat(s, 1) for s in zip(*states, strict=True))
        return ys, torch.cat(states, 1)

    got = outputs_and_grads(in_one, list(a.parameters()), (*sequences, hx))
    want = outputs_and_grads(alone, list(b.parameters()), (*sequences, hx))
    for name in want:
        assert_close(got[name], want[name], K=IN + H + 28, T=2 * T, scale=1.0, name=name)


def test_float32_too():
    a, b = pair(torch.nn.LSTM, LSTM, IN, H, 2, truncate=(3, 5))
    inputs = make_inputs(b)
    want = outputs_and_grads(lambda *args: by_hand(b, *args, 3, 5), list(b.parameters()), inputs)
    single_inputs = (inputs[0].float(), tuple(s.float() for s in inputs[1]))
    a.float()
    got = outputs_and_grads(a, list(a.parameters()), single_inputs)
    for name in want:
        assert got[name].dtype == torch.float32
        scale = max(1.0, want[name].abs().max().item())
        assert_close(got[name], want[name], K=IN + H + T * B, T=2 * T, scale=scale, name=name)
