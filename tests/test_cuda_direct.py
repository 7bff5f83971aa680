"""The short way to the CUDA kernels: the operators' bits, and only where it is open.

CPU tensors and the emulator stand for a GPU's here: the operators' CPU kernels are replaced, and
the short way is told that these are its own.
"""

from __future__ import annotations

import threading
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import short_way
import torch
from emulated import native, operators
from one_layer import Case
from pairwise import pairwise
from rnnfast import cuda_direct, cuda_ops, direct, functional, ops
from short_way import (
    LAYER_AXES,
    MODULES,
    assert_both_ways_agree,
    assert_equal,
    by_operators,
    every_module,
    input_of,
    results,
    state_of,
)
from torch.nn.utils.rnn import pack_sequence

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture
def method():
    """How a recurrence has to run; the planner's choice where a test does not say."""
    return ""


@pytest.fixture
def ways(method, monkeypatch):
    """Grows by "short forward", "operator backward" and so on as kernels are called."""
    seen, lock = [], threading.Lock()

    class Noted(cuda_ops.Layers):
        def forward(self, *args):
            seen.append("short forward")
            return super().forward(*args)

        def backward(self, *args):
            seen.append("short backward")
            return super().backward(*args)

        def forward_both(self, *args):
            seen.append("short forward")
            return super().forward_both(*args)

        def backward_both(self, *args):
            seen.append("short backward")
            return super().backward_both(*args)

        def run(self, name, calls):
            seen.append(f"operator {'backward' if name.endswith('backward') else 'forward'}")
            return super().run(name, calls)

        def _launch(self, *args):
            with lock:  # the emulator runs one launch at a time
                super()._launch(*args)

    layers, none = Noted(native, method), lambda *_: None
    monkeypatch.setattr(cuda_direct, "_layers_for", lambda x: layers if x.is_cpu else None)
    not_for_cuda = {name: none for name in ("run_layer", "run_sequence", "run_step")}
    monkeypatch.setattr(direct, "core", SimpleNamespace(**not_for_cuda))
    monkeypatch.setattr(functional, "_on_cuda", lambda x: x.is_cpu)
    with operators(layers):
        yield seen


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that torch hands out is full of NaN: nothing may be read before it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# The same results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestSameBits(short_way.SameBits):
    @pytest.fixture(autouse=True)
    def computed_alike_with_a_gradient_and_without(self, request):
        given = request.node.callspec.params
        if given["dtype"] == torch.bfloat16 and given.get("options") == {"truncate": (1, 3)}:
            pytest.skip("windows that overlap are computed in float32, but only for a gradient")


@pytest.mark.parametrize("method", ["gemm"])
@pytest.mark.parametrize("with_state", [True, False])
@every_module
def test_same_bits_where_torch_multiplies(name, with_state, ways):
    """Step by step, whatever the shape of x and of the states."""
    for x, lead in ((input_of(name), (2,)), (input_of(name)[..., 0, :], ())):
        shape = (*lead, 5) if "Cell" in name else (1, *lead, 5)
        hx = state_of(name, shape) if with_state else None
        assert_both_ways_agree(MODULES[name](), x, hx, ways)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_same_bits_with_little_memory(bidirectional, ways):
    module, x = MODULES["LSTM"](memory="low", bidirectional=bidirectional), input_of("LSTM")
    for hx in (None, state_of("LSTM", (1 + bidirectional, 2, 5))):
        assert_both_ways_agree(module, x, hx, ways)


LAYER_CASES = [
    (choice.pop("dtype"), choice.pop("keep"), Case(**choice))
    for choice in pairwise(dtype=DTYPES, keep=["all", "cells"], **LAYER_AXES)
]


def of_layer(case, dtype, keep, module):
    """Outputs and gradients by name; module: ops, or direct in its place."""
    inputs = {name: v.detach().requires_grad_() for name, v in case.inputs(dtype).items()}
    k1, k2 = case.truncate or (0, 0)
    weights = [inputs["w_ih"], inputs["w_hh"], inputs.get("b_ih"), inputs.get("b_hh")]
    states = [inputs[name] for name in ("h0", "c0") if name in inputs]
    if case.cell == "lstm":
        options = (case.reverse, k1, k2, keep)
        given = module.lstm_layer(inputs["x"], *states, *weights, *options)[:4]
    else:
        options = (case.cell, case.reverse, k1, k2)
        given = module.rnn_layer(inputs["x"], *states, *weights, *options)
    outputs = dict(zip(case.outputs, given, strict=True))
    cotangents = {name: v.to(outputs[name].dtype) for name, v in case.cotangents(dtype).items()}
    gradients = torch.autograd.grad(
        [outputs[name] for name in cotangents], list(inputs.values()), list(cotangents.values())
    )
    return [*given, *gradients]


@pytest.mark.parametrize(("dtype", "keep", "case"), LAYER_CASES, ids=str)
def test_a_layer_has_the_same_bits_in_any_layout(case, keep, dtype, ways):
    want = of_layer(case, dtype, keep, ops)
    assert ways == ["operator forward", "operator backward"]
    ways.clear()
    got = of_layer(case, dtype, keep, direct)
    assert ways == ["short forward", "short backward"]
    assert [g.dtype for g in got] == [w.dtype for w in want]
    assert_equal(got, want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_no_state_is_a_state_of_zeros(cell, dtype, ways):
    """Which are shared, and nobody writes on."""
    case = Case(cell, 4, 3, 2, 5)
    inputs = case.inputs(dtype)
    weights = [inputs[name].requires_grad_() for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    zeros = [torch.zeros(1, 3, 5, dtype=dtype)] * (2 if cell == "lstm" else 1)

    def run(states):
        outputs = direct.sequence(cell, inputs["x"], states, weights, True, False)
        loss = sum(o.square().sum() for o in outputs[:3] if o is not None)
        return [*filter(lambda o: o is not None, outputs), *torch.autograd.grad(loss, weights)]

    want = run(zeros)
    for _ in range(2):
        got = run(None)
        assert_equal(got, want)
        for output in got[1:3]:  # not y, which is saved
            output.detach().fill_(7)
    assert set(ways) == {"short forward", "short backward"}


def test_zeros_are_kept_and_grow():
    zeros, x = cuda_ops._Zeros(), torch.empty(0)
    with torch.inference_mode():
        small = zeros(x, 2, 3, torch.float32)
    assert not small.is_inference()
    large = zeros(x, 300, 400, torch.float64)
    assert zeros(x, 2, 3, torch.float32) is small
    for given, shape in (
        (small, (2, 3)),
        (large, (300, 400)),
        (zeros(x, 7, 5, torch.half), (7, 5)),
    ):
        assert given.shape == shape
        assert not given.any()
    assert len(zeros._kept) == 2  # the small one lies in what came first


# Autograd


@pytest.mark.usefixtures("ways")
class TestAutograd(short_way.Autograd):
    saves = 4

    @pytest.fixture
    def wants(self, ways, monkeypatch):
        asked, backward = [], cuda_ops.Layers.backward

        def noted(self, *args):
            asked.append(args[-1])
            given = backward(self, *args)
            assert [gradient is not None for gradient in given] == list(args[-1])
            return given

        monkeypatch.setattr(cuda_ops.Layers, "backward", noted)
        return asked


# Where the operators are needed


class TestWatched(short_way.Watched):
    pass


@pytest.mark.usefixtures("ways")
class TestUnusual(short_way.Unusual):
    pass


@every_module
def test_autocast_changes_nothing_inside(name, ways):
    module, x = MODULES[name](), input_of(name)
    want = results(module, x, None)
    ways.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(results(module, x, None), want)
    assert {way.split()[0] for way in ways} == {"operator"}


# Mistakes


@pytest.mark.parametrize("recording", [True, False])
def test_mistakes_are_worded_by_the_general_way(recording, ways):
    x, weights = torch.randn(4, 2, 3), [torch.randn(s) for s in ((20, 3), (20, 5), (20,), (20,))]
    h = torch.zeros(1, 2, 5)
    calls = {
        "x": (x[..., :2], None, weights),
        "x dimensions": (x[None], None, weights),
        "x dtype": (x.double(), None, weights),
        "no tensor": (3, None, weights),
        "steps": (x[:0], None, weights),
        "states": (x, (h[:, :1], h), weights),
        "state dimensions": (x, (h[0], h[0]), weights),
        "one state": (x, (h,), weights),
        "a state alone": (x, h, weights),
        "state dtype": (x, (h, h.double()), weights),
        "no state": (x, (h, None), weights),
        "weights": (x, None, [*weights[:1], weights[1][:, :4], *weights[2:]]),
        "bias": (x, None, [*weights[:3], weights[3][:19]]),
        "count": (x, None, weights[:3]),
        "weight dtype": (x, None, [*weights[:3], weights[3].double()]),
        "no weight": (x, None, [None, *weights[1:]]),
        "device": (x.to("meta"), None, weights),
    }
    for what, call in calls.items():
        with nullcontext() if recording else torch.no_grad():
            with pytest.raises(Exception, match="LSTM") as short:
                functional.lstm(*call)
            with pytest.raises(type(short.value)) as general:
                by_operators(functional.lstm, *call)
        assert str(short.value) == str(general.value), what
    assert not ways  # no kernel ran


def test_nobody_to_compute_is_the_operators_answer(ways):
    """Where there are no rows, and no steps of an operator."""
    for case in (Case("lstm", 3, 0, 2, 4), Case("tanh", 0, 3, 2, 4)):
        of_layer(case, torch.float32, "all", direct)
    assert set(ways) == {"operator forward", "operator backward"}


# Packed sequences


@pytest.mark.parametrize("truncate", [None, 2])
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("name", ["LSTM", "RNN tanh", "RNN relu"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_packed_sequences(dtype, name, bidirectional, truncate, request):
    options = {"num_layers": 2, "bidirectional": bidirectional, "truncate": truncate}
    module = MODULES[name](**options, dtype=dtype)
    sequences = [torch.randn(n, 3, dtype=dtype) for n in (2, 5, 1, 5)]
    leaves = [s.requires_grad_() for s in sequences]

    def run():
        y, state = module(pack_sequence(leaves, enforce_sorted=False))
        loss = y.data.cos().sum() + sum(s.sin().sum() for s in short_way.flat(state))
        return y.data, *short_way.flat(state), *torch.autograd.grad(loss, leaves)

    want = run()  # by the CPU's kernels
    seen = request.getfixturevalue("ways")
    got = run()
    calls = seen.count("short forward")
    if (truncate and bidirectional) or "relu" in name:
        assert calls > (4 if bidirectional else 2)
    else:
        assert calls == (4 if bidirectional else 2)
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 0.05}[dtype]
    for ours, expected in zip(got, want, strict=True):
        torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)
