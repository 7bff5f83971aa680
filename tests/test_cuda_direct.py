"""The short way to the CUDA kernels: the operators' bits, and only where it is open.

CPU tensors and the emulator stand for a GPU's here: the operators' CPU kernels are replaced, and
the short way is told that these are its own.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import pytest
import torch
from emulated import native, operators
from one_layer import LAYOUTS, Case
from pairwise import pairwise
from rnnfast import cuda_direct, cuda_ops, direct, functional, ops
from test_direct import (
    MODULES,
    SEQUENCES,
    UNUSUAL,
    WATCHERS,
    WRONG,
    Operators,
    assert_equal,
    every_module,
    flat,
    input_of,
    lstm_and_rnn,
    results,
    state_of,
)
from torch.autograd.graph import saved_tensors_hooks

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@pytest.fixture
def method():
    """How a recurrence has to run; the planner's choice where a test does not say."""
    return ""


@pytest.fixture
def ways(method, monkeypatch):
    """Grows by "short forward", "operator backward" and so on as kernels are called."""
    seen = []

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


@pytest.fixture
def by_operators(monkeypatch):
    """A function that closes the short way while another one runs."""

    def run(function, *args):
        with monkeypatch.context() as patch:
            for module in (direct, cuda_direct):
                patch.setattr(module, "_watched", lambda: True)
            return function(*args)

    return run


# The same results


def assert_both_ways_agree(module, x, hx, ways, by_operators):
    ways.clear()
    short = results(module, x, hx)
    assert {way.split()[0] for way in ways} == {"short"}
    ways.clear()
    assert_equal(short, by_operators(results, module, x, hx))
    assert {way.split()[0] for way in ways} == {"operator"}
    ways.clear()
    with torch.no_grad():
        inferred = flat(module(x, hx))
        assert {way.split()[0] for way in ways} == {"short"}
        assert_equal(inferred, short[: len(inferred)])
        assert_equal(inferred, flat(by_operators(module, x, hx)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@every_module
def test_same_bits(name, batched, with_state, bias, dtype, ways, by_operators):
    module = MODULES[name](bias=bias, dtype=dtype)
    x = input_of(name, dtype)
    lead = (2,) if batched else ()
    shape = (*lead, 5) if "Cell" in name else (1, *lead, 5)
    hx = state_of(name, shape, dtype) if with_state else None
    assert_both_ways_agree(module, x if batched else x[..., 0, :], hx, ways, by_operators)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"num_layers": 3},
        {"bidirectional": True},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
        {"truncate": 2},
        {"truncate": (1, 3)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SEQUENCES)
def test_same_bits_with_options(name, dtype, options, ways, by_operators):
    if dtype == torch.bfloat16 and options.get("truncate") == (1, 3):
        pytest.skip("what stands for a GPU's tensors is cast as the CPU's")
    module = MODULES[name](**options, dtype=dtype)
    x = input_of(name, dtype)
    assert_both_ways_agree(module, x, None, ways, by_operators)
    rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
    batch = x.shape[0 if options.get("batch_first") else 1]
    hx = state_of(name, (rows, batch, 5), dtype)
    assert_both_ways_agree(module, x.flip(-1)[..., ::1], hx, ways, by_operators)


@pytest.mark.parametrize("method", ["gemm"])
@pytest.mark.parametrize("with_state", [True, False])
@every_module
def test_same_bits_where_torch_multiplies(name, with_state, ways, by_operators):
    """Step by step, whatever the shape of x and of the states."""
    for x, lead in ((input_of(name), (2,)), (input_of(name)[..., 0, :], ())):
        shape = (*lead, 5) if "Cell" in name else (1, *lead, 5)
        hx = state_of(name, shape) if with_state else None
        assert_both_ways_agree(MODULES[name](), x, hx, ways, by_operators)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_same_bits_with_little_memory(bidirectional, ways, by_operators):
    module, x = MODULES["LSTM"](memory="low", bidirectional=bidirectional), input_of("LSTM")
    for hx in (None, state_of("LSTM", (1 + bidirectional, 2, 5))):
        assert_both_ways_agree(module, x, hx, ways, by_operators)


LAYER_CASES = [
    (choice.pop("dtype"), choice.pop("keep"), Case(**choice))
    for choice in pairwise(
        dtype=DTYPES,
        keep=["all", "cells"],
        cell=["lstm", "tanh", "relu"],
        T=[1, 5],
        B=[1, 3],
        I=[1, 4],
        H=[1, 17],
        reverse=[False, True],
        biases=["both", "none", "input", "hidden"],
        layout=list(LAYOUTS),
        upstream=[("y",), ("h_n", "c_n"), ("y", "c"), ("y", "h_n", "c_n", "c")],
        truncate=[None, (1, 1), (2, 3), (7, 9)],
    )
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


@every_module
def test_gradients_nobody_needs_are_not_computed(name, ways, monkeypatch):
    module, wants = MODULES[name](), []
    backward = cuda_ops.Layers.backward

    def noted(self, *args):
        wants.append(args[-1])
        given = backward(self, *args)
        assert [gradient is not None for gradient in given] == list(args[-1])
        return given

    monkeypatch.setattr(cuda_ops.Layers, "backward", noted)
    leaves = {"x": input_of(name), **dict(module.named_parameters())}
    for index, (key, leaf) in enumerate(leaves.items()):
        for other in leaves.values():
            other.requires_grad_(other is leaf)
        flat(module(leaves["x"]))[0].sum().backward()
        assert [k for k, v in leaves.items() if v.grad is not None] == [key]
        leaf.grad = None
        want = [False] * 6
        want[{0: 0, 1: 3, 2: 4, 3: 5, 4: 5}[index]] = True
        assert wants.pop() == tuple(want)


@pytest.mark.parametrize("changed", ["x", "weight_ih_l0", "weight_hh_l0", "h0", "y"])
@lstm_and_rnn
def test_changes_between_forward_and_backward_are_noticed(name, changed, ways):
    module = MODULES[name]()
    x, hx = input_of(name).requires_grad_(), state_of(name, (1, 2, 5))
    y, _ = module(x, hx)
    loss = y.sum()
    named = {"x": x, "h0": flat(hx)[0], "y": y, **dict(module.named_parameters())}
    with torch.no_grad():
        named[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert ways == ["short forward"]


@lstm_and_rnn
def test_memory_exchanged_between_forward_and_backward_is_not_read_beyond_its_end(name, ways):
    module = MODULES[name]()
    loss = module(input_of(name))[0].sum()
    module.weight_hh_l0.data = torch.zeros(1, 1)  # what no version counter sees
    with pytest.raises(RuntimeError, match=r"w_hh|shape"):
        loss.backward()
    assert ways[:1] == ["short forward"]


@every_module
@pytest.mark.parametrize("through", ["x", "dy"])
def test_second_derivatives_are_refused(name, through, ways, by_operators):
    module, x = MODULES[name](), input_of(name).requires_grad_()

    def differentiate_twice():
        y = flat(module(x))[0]
        dy = torch.ones_like(y, requires_grad=True)
        (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
        assert dx.shape == x.shape
        torch.autograd.grad(dx.sum(), x if through == "x" else dy)

    with pytest.raises(RuntimeError, match="cannot be differentiated twice") as short:
        differentiate_twice()
    assert ways == ["short forward", "operator backward"]
    with pytest.raises(RuntimeError) as operator:
        by_operators(differentiate_twice)
    assert str(short.value) == str(operator.value)


@pytest.mark.parametrize("name", SEQUENCES)
def test_a_graph_of_the_gradient_changes_no_bit(name, ways):
    """Unbatched, too, and without a state: the operators get other shapes."""
    module = MODULES[name]()
    for x in (input_of(name), input_of(name)[:, 0]):
        leaves = [x.requires_grad_(), *module.parameters()]
        loss = flat(module(x))[0].square().sum()
        kept = torch.autograd.grad(loss, leaves, create_graph=True)
        assert_equal(kept, torch.autograd.grad(loss, leaves))


@every_module
def test_saved_tensors_hooks_see_all_and_may_move_it(name, ways):
    module, x = MODULES[name](), input_of(name)
    want, packed = results(module, x, None), []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.detach().numpy().copy()

    with saved_tensors_hooks(pack, torch.from_numpy):
        assert_equal(results(module, x, None), want)
    assert len(packed) >= 4


@pytest.mark.parametrize("wrong", WRONG)
@lstm_and_rnn
def test_hooks_that_give_something_else_back(name, wrong, ways):
    module, x = MODULES[name](), input_of(name).requires_grad_()
    with saved_tensors_hooks(lambda t: t.detach().clone(), WRONG[wrong]):
        y, _ = module(x)
        with pytest.raises((RuntimeError, NotImplementedError)):
            y.sum().backward()
    assert "short backward" not in ways


@every_module
def test_batched_gradients(name, ways):
    module, x = MODULES[name](), input_of(name).requires_grad_()
    y = flat(module(x))[0]
    dy = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)[0]
    for row, one in zip(batched, dy, strict=True):
        assert torch.equal(row, torch.autograd.grad(y, x, one, retain_graph=True)[0])


def test_threads_do_not_meet(ways):
    """The emulator runs one launch at a time; all around it is shared."""
    lock, run = threading.Lock(), cuda_ops.Layers._launch

    def launch(*args):
        with lock:
            run(*args)

    modules = [MODULES[name]() for name in SEQUENCES]
    x = torch.randn(4, 2, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_ops.Layers, "_launch", launch)
        want, got = [results(module, x, None) for module in modules], {}

        def work(index):
            for _ in range(5):
                got[index] = results(modules[index % len(modules)], x, None)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index in range(6):
        assert_equal(got[index], want[index % len(modules)])


@every_module
def test_nothing_is_recorded_without_need(name, ways):
    module, x = MODULES[name](), input_of(name)
    with torch.inference_mode():
        inferred = flat(module(x))
        assert all(output.is_inference() for output in inferred)
    with torch.no_grad():
        assert not any(output.requires_grad for output in flat(module(x)))
    frozen = module.requires_grad_(False)
    assert not any(output.requires_grad for output in flat(frozen(x)))
    assert set(ways) == {"short forward"}
    assert all(output.requires_grad for output in flat(frozen(x.requires_grad_())))


# Where the operators are needed


@pytest.mark.parametrize("watcher", WATCHERS)
@every_module
def test_watched_calls_go_through_the_operators(name, watcher, ways):
    module, x = MODULES[name](), input_of(name)
    want = results(module, x, None)
    ways.clear()
    with WATCHERS[watcher]():
        assert_equal(results(module, x, None), want)
    assert ways == ["operator forward", "operator backward"]
    ways.clear()
    module(x)
    assert ways == ["short forward"]


@every_module
def test_a_watcher_may_come_for_the_backward_pass(name, ways):
    module, x = MODULES[name](), input_of(name)
    want = results(module, x, None)
    with ExitStack() as stack:
        module.register_forward_hook(lambda *_: stack.enter_context(Operators()) and None)
        ways.clear()
        assert_equal(results(module, x, None), want)
    assert ways == ["short forward", "operator backward"]


@every_module
def test_autocast_changes_nothing_inside(name, ways):
    module, x = MODULES[name](), input_of(name)
    want = results(module, x, None)
    ways.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(results(module, x, None), want)
    assert {way.split()[0] for way in ways} == {"operator"}


@pytest.mark.parametrize("kind", UNUSUAL)
@every_module
def test_unusual_tensors_go_through_the_operators(name, kind, ways):
    module, x = MODULES[name](), input_of(name)
    want = flat(module(x))
    ways.clear()
    for got, expected in zip(flat(module(UNUSUAL[kind](x))), want, strict=True):
        assert torch.equal(got.as_subclass(torch.Tensor), expected)
    assert set(ways) == {"operator forward"}


@every_module
def test_a_tensor_that_left_a_transformation(name, ways):
    module, x, left = MODULES[name](), input_of(name), []
    torch.func.grad(lambda x: (left.append(x), x.sum())[1])(x)
    assert_equal(flat(module(left[0])), flat(module(x)))


# Mistakes


@pytest.mark.parametrize("recording", [True, False])
def test_mistakes_are_worded_by_the_general_way(recording, ways, by_operators):
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
