"""Truncated BPTT of the reference against loops in torch that detach.

The loops work in processing order and run torch.nn step by step or chunk by chunk, so they share
nothing with the reference but the definition of TBPTT(k1, k2).
"""

import numpy as np
import pytest
import torch
from problems import Problem, assert_same, named_gradients, reference_results
from rnnfast import reference


def detached_gradients(p, module, inputs, upstream, k1, k2, reverse=False):
    """Gradients of a one-directional stack for inputs and weights: one loop for each block of
    losses, from the detached state that enters the block's window.
    """
    x, *state0 = inputs
    dy, dh_n, *rest = upstream
    order = list(range(p.T))[::-1] if reverse else list(range(p.T))

    def step(t, state):
        y, state = module(x[t : t + 1], tuple(state) if p.lstm else state[0])
        return y[0], list(state) if p.lstm else [state]

    entering = [state0]
    with torch.no_grad():
        for t in order:
            entering.append(step(t, entering[-1])[1])

    total = None
    for block in range(-(-p.T // k1)):
        positions = [i for i, t in enumerate(order) if t // k1 == block]
        begin = max(0, positions[0] - (k2 - k1))
        state = state0 if begin == 0 else entering[begin]
        loss = 0
        for i in range(begin, positions[-1] + 1):
            t = order[i]
            y, state = step(t, state)
            if i in positions:
                loss = loss + (y * dy[t]).sum()
                if p.lstm:
                    loss = loss + (state[1][-1] * rest[1][t]).sum()
        if positions[-1] == p.T - 1:
            loss = loss + sum((s * d).sum() for s, d in zip(state, [dh_n, *rest[:1]], strict=True))
        total = add_gradients(total, loss, [*inputs, *module.parameters()])
    return total


def add_gradients(total, loss, leaves):
    total = total or [torch.zeros_like(leaf) for leaf in leaves]
    part = torch.autograd.grad(loss, leaves, allow_unused=True)
    return [a if b is None else a + b for a, b in zip(total, part, strict=True)]


def detached_results(p, upstream, k1, k2, reverse=False):
    gradients = detached_gradients(p, p.module(), p.inputs(), upstream, k1, k2, reverse)
    return named_gradients(p, gradients)


WINDOWS = [
    *[(1, 1), (2, 2), (3, 3), (7, 7), (9, 9)],  # k1 = k2, also no divisor of T = 7, and above it
    *[(1, 2), (1, 7), (2, 3), (2, 6), (3, 4), (3, 5), (3, 8), (5, 6), (6, 7), (4, 40), (8, 9)],
]
STACKS = [
    Problem("lstm", B=2, input_size=3),
    Problem("lstm", B=2, input_size=3, L=3, bias=False),
    Problem("lstm", B=2, input_size=3, P=2, L=2),
    Problem("tanh", B=2, input_size=3),
    Problem("tanh", B=2, input_size=3, L=3),
    Problem("relu", B=2, input_size=3, L=2),
]


@pytest.mark.parametrize("p", STACKS, ids=str)
@pytest.mark.parametrize(("k1", "k2"), WINDOWS)
def test_truncation_matches_detaching_loop(p, k1, k2):
    upstream = p.upstream()
    actual = reference_results(p, upstream, (k1, k2))
    assert_same(p, actual, detached_results(p, upstream, k1, k2))


@pytest.mark.parametrize("p", STACKS, ids=str)
@pytest.mark.parametrize(("k1", "k2"), [(2, 2), (3, 3), (3, 5), (2, 9), (7, 7)])
def test_reverse_truncation_matches_detaching_loop(p, k1, k2):
    upstream = p.upstream()
    actual = reference_results(p, upstream, (k1, k2), reverse=True)
    assert_same(p, actual, detached_results(p, upstream, k1, k2, reverse=True))


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
@pytest.mark.parametrize(("k1", "k2"), [(3, 3), (3, 5), (1, 4), (2, 9)])
def test_bidirectional_layer_truncates_each_direction_by_itself(cell, k1, k2):
    p, one = Problem(cell, D=2), Problem(cell)
    upstream, inputs = p.upstream(), p.inputs()
    dx, dstates, dweights = 0, [], []
    for d in range(2):
        module = one.module()
        with torch.no_grad():
            weights = list(p.module().parameters())[4 * d : 4 * d + 4]
            for mine, theirs in zip(module.parameters(), weights, strict=True):
                mine.copy_(theirs)
        x, *state0 = inputs
        own = [x, *(s[d : d + 1].detach().requires_grad_() for s in state0)]
        dy, dh_n, *rest = (u.chunk(2, 0 if len(u) == 2 else -1)[d] for u in upstream)
        own_dx, *rest = detached_gradients(one, module, own, [dy, dh_n, *rest], k1, k2, d == 1)
        dx = dx + own_dx
        dstates.append(rest[:-4])
        dweights += rest[-4:]
    dstates = [torch.cat(s) for s in zip(*dstates, strict=True)]
    expected = named_gradients(p, [dx, *dstates, *dweights])
    assert_same(p, reference_results(p, upstream, (k1, k2)), expected)


def chunked_results(p, upstream, k):
    """Gradients of a bidirectional stack whose states are detached every k steps, in both
    directions: torch.nn on each chunk, from the states that enter it from its two sides.
    """
    module, inputs = p.module(), p.inputs()
    x, *state0 = inputs
    dy, *last = upstream
    run = {"lstm": torch.lstm, "tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[p.cell]

    def one_direction(source, state, weights):
        """y and the final state of one layer and direction over all of `source`."""
        if len(source) == 0:
            return None, state
        hx = state if p.lstm else state[0]
        y, *state = run(source, hx, weights, p.bias, 1, 0.0, False, False, False)
        return y, state

    def entering(chunk):
        """The states (L*D, B, .) that enter a chunk; reverse directions come from its end."""
        found, source = [], x
        for layer in range(p.L):
            outputs = []
            for d in range(2):
                state = [s[2 * layer + d : 2 * layer + d + 1] for s in state0]
                weights = module.all_weights[2 * layer + d]
                before = source[chunk.stop :].flip(0) if d else source[: chunk.start]
                found.append(one_direction(before, state, weights)[1])
                y, _ = one_direction(source.flip(0) if d else source, state, weights)
                outputs.append(y.flip(0) if d else y)
            source = torch.cat(outputs, -1)
        return [torch.cat(s) for s in zip(*found, strict=True)]

    total = None
    for begin in range(0, p.T, k):
        chunk = range(begin, min(begin + k, p.T))
        with torch.no_grad():
            state = entering(chunk)
        for now, first in zip(state, state0, strict=True):
            if chunk.start == 0:
                now[0::2] = first[0::2]
            if chunk.stop == p.T:
                now[1::2] = first[1::2]
        y, final = module(x[chunk.start : chunk.stop], tuple(state) if p.lstm else state[0])
        loss = (y * dy[chunk.start : chunk.stop]).sum()
        for s, d in zip(final if p.lstm else [final], last, strict=False):
            if chunk.stop == p.T:
                loss = loss + (s[0::2] * d[0::2]).sum()
            if chunk.start == 0:
                loss = loss + (s[1::2] * d[1::2]).sum()
        total = add_gradients(total, loss, [*inputs, *module.parameters()])
    return named_gradients(p, total)


@pytest.mark.parametrize("cell", ["lstm", "tanh", "relu"])
@pytest.mark.parametrize("k", [1, 2, 3, 7, 8])
def test_bidirectional_stack_detaches_both_directions(cell, k):
    p = Problem(cell, L=3, D=2)
    upstream = p.upstream()
    if p.lstm:
        upstream[3].zero_()
    assert_same(p, reference_results(p, upstream, k), chunked_results(p, upstream, k))


def test_windows_of_a_small_example():
    """Seven steps, k1 = 3, k2 = 5, by hand: (times as run, from the initial state, to the end)."""
    blocks = reference.blocks(7, 3)
    assert blocks == [range(0, 3), range(3, 6), range(6, 7)]
    forward = [reference.window_of(b, 7, 2, False) for b in blocks]
    assert [(list(w.steps), w.from_state0, w.to_final) for w in forward] == [
        ([0, 1, 2], True, False),
        ([1, 2, 3, 4, 5], False, False),
        ([4, 5, 6], False, True),
    ]
    backward = [reference.window_of(b, 7, 2, True) for b in blocks]
    assert [(list(w.steps), w.from_state0, w.to_final) for w in backward] == [
        ([4, 3, 2, 1, 0], False, True),
        ([6, 5, 4, 3], True, False),
        ([6], True, False),
    ]


@pytest.mark.parametrize("cell", ["lstm", "tanh", "relu"])
@pytest.mark.parametrize("D", [1, 2])
def test_truncation_longer_than_the_sequence_is_full_bptt(cell, D):
    p = Problem(cell, L=2, D=D)
    upstream = p.upstream()
    full, cut = (reference_results(p, upstream, truncate) for truncate in (None, 9))
    for name, value in full.items():
        np.testing.assert_array_equal(cut[name], value, err_msg=name)
