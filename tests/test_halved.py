"""Recurrent weights rounded to bfloat16: the sums of the same layer with such weights."""

from __future__ import annotations

import threading

import pytest
import rnnfast
import torch
from rnnfast import halved_recurrence

# One row and many, single steps (whose weights are not packed), odd sizes, several blocks of terms.
SIZES = [(1, 1, 3, 5), (2, 2, 7, 33), (7, 3, 4, 17), (9, 1, 40, 300), (3, 130, 5, 64), (5, 1, 1, 1)]
LAYERS = {"lstm": rnnfast.LSTM, "tanh": rnnfast.RNN, "relu": rnnfast.RNN}


def layer(cell: str, inputs: int, hidden: int, dtype=torch.float32, **options):
    if cell != "lstm":
        options["nonlinearity"] = cell
    return LAYERS[cell](inputs, hidden, dtype=dtype, **options)


@torch.no_grad()
def rounded(module):
    """The same layer with its recurrent weights rounded for good."""
    copy = type(module)(module.input_size, module.hidden_size)
    if isinstance(module, rnnfast.RNN):
        copy.nonlinearity = module.nonlinearity
    copy.load_state_dict(module.state_dict())
    copy.weight_hh_l0.copy_(module.weight_hh_l0.bfloat16())
    return copy


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("cell", LAYERS)
def test_gives_what_rounded_weights_give(cell, sizes, isa, threads):
    T, B, I, H = sizes
    module, x = layer(cell, I, H), torch.randn(T, B, I)
    with torch.no_grad():
        copy = rounded(module)
        if T * B >= 5:  # halved weights are packed: those of the copy must be, for the same order
            rnnfast.freeze(copy)
        expected = copy(x)[0]
        with halved_recurrence():
            y = module(x)[0]
        exact = module(x)[0]
    if H % 2 == 0 or T * B < 5:
        assert torch.equal(y, expected)
    else:  # the last term of an odd row is rounded once more
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    if T > 1 and H > 1:
        assert not torch.equal(y, exact)


def test_packs_of_both_kinds_are_kept_apart():
    module, x = layer("lstm", 64, 96), torch.randn(20, 1, 64)
    with torch.no_grad():
        exact = module(x)[0]
        with halved_recurrence():
            halved = module(x)[0]
        for _ in range(3):
            assert torch.equal(module(x)[0], exact)
            with halved_recurrence():
                assert torch.equal(module(x)[0], halved)


def test_stacks_and_directions():
    module = rnnfast.LSTM(6, 10, num_layers=2, bidirectional=True)
    x = torch.randn(9, 3, 6)
    copy = rnnfast.LSTM(6, 10, num_layers=2, bidirectional=True)
    copy.load_state_dict(module.state_dict())
    with torch.no_grad():
        for name, weight in copy.named_parameters():
            if name.startswith("weight_hh"):
                weight.copy_(weight.bfloat16())
        expected = copy(x)[0]
        with halved_recurrence():
            assert torch.equal(module(x)[0], expected)


def test_not_where_a_gradient_is_recorded():
    module, x = layer("tanh", 8, 16), torch.randn(12, 2, 8)
    expected = module(x)[0]
    expected.sum().backward()
    gradient = module.weight_hh_l0.grad.clone()
    module.zero_grad()
    with halved_recurrence():
        y = module(x)[0]
        y.sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(module.weight_hh_l0.grad, gradient)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_not_other_dtypes(dtype):
    module, x = layer("lstm", 8, 16, dtype), torch.randn(12, 2, 8, dtype=dtype)
    with torch.no_grad():
        expected = module(x)[0]
        with halved_recurrence():
            assert torch.equal(module(x)[0], expected)


def test_nests_ends_with_errors_and_holds_for_its_thread_alone():
    module, x = layer("lstm", 8, 16), torch.randn(12, 1, 8)
    seen = []
    with torch.no_grad():
        exact = module(x)[0]

        def elsewhere():
            with torch.no_grad():
                seen.append(module(x)[0])

        with halved_recurrence():
            halved = module(x)[0]
            with halved_recurrence(False):
                assert torch.equal(module(x)[0], exact)
            with pytest.raises(KeyError), halved_recurrence(False):
                raise KeyError
            assert torch.equal(module(x)[0], halved)
            thread = threading.Thread(target=elsewhere)
            thread.start()
            thread.join()
        assert torch.equal(seen[0], exact)
        assert not torch.equal(halved, exact)
        assert torch.equal(module(x)[0], exact)


def test_compiled_calls_are_left_alone():
    module, x = layer("tanh", 8, 16), torch.randn(12, 1, 8)
    weights = [w.detach() for w in module.parameters()]

    def run(x):
        return rnnfast.functional.rnn(x, None, weights)[0]

    compiled = torch.compile(run, backend="aot_eager")
    exact = run(x)
    with halved_recurrence():
        assert torch.equal(compiled(x), exact)
        assert not torch.equal(run(x), exact)
