"""The operators as torch sees them: derivatives, schemas, fake kernels, and their consumers."""

from __future__ import annotations

import copy
import itertools

import pytest
import rnnfast
import torch
from one_layer import Case, by_operator, run_operator
from rnnfast import functional, ops
from rnnfast.cpu import KEEP
from tolerance import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

CELLS = ["lstm", "tanh", "relu"]
SMALL = (3, 2, 2, 3)  # T, B, I, H


def leaves(case):
    """The inputs in float64, each requiring its gradient."""
    return {name: v.requires_grad_() for name, v in case.inputs(torch.float64).items()}


def as_function(case):
    """The operator as a function of its tensors alone, in the order of case.inputs."""
    names = list(case.inputs(torch.float64))

    def function(*tensors):
        return tuple(run_operator(case, dict(zip(names, tensors, strict=True))).values())

    return function


# Derivatives

VARIANTS = [
    *({"reverse": r, "biases": b} for r in (False, True) for b in ("both", "none")),
    {"biases": "input"},
    {"biases": "hidden", "reverse": True},
    # Windows of the whole sequence are the only ones whose gradient is the derivative.
    {"truncate": (3, 3)},
    {"truncate": (3, 5), "reverse": True},
    {"truncate": (1, 3)},
    {"truncate": (2, 4), "reverse": True},
]


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: " ".join(map(str, v.values())))
def test_gradcheck(cell, variant):
    case = Case(cell, *SMALL, **variant)
    assert torch.autograd.gradcheck(as_function(case), tuple(leaves(case).values()))


@pytest.mark.parametrize("cell", CELLS)
def test_a_graph_that_is_kept_gives_the_same_twice(cell):
    case = Case(cell, 4, 3, 2, 5, truncate=(2, 3))
    inputs = leaves(case)
    outputs, cotangents = run_operator(case, inputs), case.cotangents(torch.float64)
    first, second = (
        torch.autograd.grad(
            [outputs[name] for name in cotangents],
            list(inputs.values()),
            list(cotangents.values()),
            retain_graph=True,
        )
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("truncate", [None, (2, 2), (2, 3)])
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_any_inputs_may_be_frozen(cell, truncate):
    case = Case(cell, 4, 3, 2, 5, truncate=truncate)
    full = by_operator(case, torch.float64)
    names = list(case.inputs(torch.float64))
    for count in range(1, len(names)):
        for want in itertools.combinations(names, count):
            got = by_operator(case, torch.float64, list(want))
            for name in got:
                assert torch.equal(got[name], full[name]), (name, want)


def test_what_is_not_wanted_is_not_computed():
    case = Case("lstm", 4, 3, 2, 5)
    i = case.inputs(torch.float64)
    states = (i["h0"], i["c0"])
    weights = (i["w_ih"], i["w_hh"])
    y, _, _, c, gates = ops.lstm_layer(
        i["x"], *states, *weights, i["b_ih"], i["b_hh"], False, 0, 0, "all"
    )
    for wants in itertools.product((False, True), repeat=4):
        gradients = torch.ops.rnnfast.lstm_layer_backward(
            *(y, None, None, None, i["x"], *states, *weights, y, c, gates, False, 0, 0, *wants)
        )
        dx, _, _, dw_ih, _, db = gradients  # dw_hh may be a by-product of db
        computed = tuple(gradient.numel() > 0 for gradient in (dx, dw_ih, db))
        assert computed == (wants[0], wants[1], wants[3])


class BackwardCalls(TorchDispatchMode):
    """Keeps the last four arguments of every backward operator: what was wanted of it."""

    def __init__(self):
        super().__init__()
        self.wants = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "layer_backward" in func.name():
            self.wants.append(args[-4:])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cell", CELLS)
def test_of_frozen_inputs_nothing_is_wanted(cell):
    case = Case(cell, 4, 3, 2, 5)
    for name, want in {
        "x": (True, False, False, False),
        "w_ih": (False, True, False, False),
        "w_hh": (False, False, True, False),
        "b_ih": (False, False, False, True),
        "b_hh": (False, False, False, True),
        "h0": (False, False, False, False),
    }.items():
        with BackwardCalls() as calls:
            by_operator(case, torch.float64, [name])
        assert calls.wants == [want]


def test_nothing_requires_grad_nothing_is_recorded():
    for cell in CELLS:
        case = Case(cell, *SMALL)
        inputs = case.inputs(torch.float64)
        assert not any(v.requires_grad for v in run_operator(case, inputs).values())
        with torch.no_grad():
            outputs = run_operator(case, leaves(case))
        assert not any(v.requires_grad for v in outputs.values())
        with torch.inference_mode():
            assert torch.equal(run_operator(case, inputs)["y"], outputs["y"])


def test_gates_are_not_differentiable():
    inputs = list(leaves(Case("lstm", *SMALL)).values())
    gates = ops.lstm_layer(*inputs, False, 0, 0, "all")[4]
    assert not gates.requires_grad


def test_what_was_not_kept_can_not_be_differentiated():
    inputs = list(leaves(Case("lstm", *SMALL)).values())
    y = ops.lstm_layer(*inputs, False, 0, 0, "nothing")[0]
    with pytest.raises(RuntimeError, match="keep='nothing'"):
        y.sum().backward()


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("changed", ["x", "w_ih", "w_hh", "h0", "y"])
def test_changes_between_forward_and_backward_are_noticed(cell, changed):
    case = Case(cell, *SMALL)
    inputs = leaves(case)
    outputs = run_operator(case, inputs)
    loss = outputs["y"].sum()
    with torch.no_grad():
        (inputs | outputs)[changed].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_bias_gradients_do_not_share_memory():
    case = Case("lstm", *SMALL)
    inputs = leaves(case)
    run_operator(case, inputs)["y"].sum().backward()
    b_ih, b_hh = inputs["b_ih"].grad, inputs["b_hh"].grad
    assert torch.equal(b_ih, b_hh)
    assert b_ih.data_ptr() != b_hh.data_ptr()


def test_gradients_add_up_over_calls():
    case = Case("tanh", 4, 3, 2, 5)
    inputs = leaves(case)
    for _ in range(2):
        run_operator(case, inputs)["y"].sum().backward()
    once = leaves(case)
    run_operator(case, once)["y"].sum().backward()
    for name, value in inputs.items():
        assert torch.equal(value.grad, 2 * once[name].grad)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("through", ["x", "dy"])
def test_second_derivatives_are_refused(cell, through):
    case = Case(cell, *SMALL)
    inputs = leaves(case)
    y = run_operator(case, inputs)["y"]
    dy = torch.ones_like(y, requires_grad=through == "dy")

    def differentiate_twice():
        (dx,) = torch.autograd.grad(y, inputs["x"], dy, create_graph=True)
        torch.autograd.grad(dx.sum(), inputs["x"] if through == "x" else dy)

    with pytest.raises(RuntimeError, match=r"(?i)twice|double|second"):
        differentiate_twice()


# Schemas and fake kernels


def operator_calls(requires_grad):
    """(operator, arguments) of all four, with and without windows, biases and what is optional."""
    for cell, truncate, biases in itertools.product(
        ("lstm", "tanh"), (None, (2, 3)), ("both", "none")
    ):
        case = Case(cell, *SMALL, truncate=truncate, biases=biases, reverse=biases == "none")
        i = {n: v.requires_grad_(requires_grad) for n, v in case.inputs(torch.float64).items()}
        k = case.truncate or (0, 0)
        bias = (i.get("b_ih"), i.get("b_hh"))
        states = (i["h0"], i["c0"]) if cell == "lstm" else (i["h0"],)
        weights = (i["w_ih"], i["w_hh"])
        head = (i["x"], *states, *weights)
        detached = [v.detach() for v in head]
        wants = (True, biases == "both", False, biases == "both")
        if cell == "lstm":
            for keep in ("all", "cells", "nothing")[: 2 if requires_grad else 3]:
                yield torch.ops.rnnfast.lstm_layer.default, (*head, *bias, case.reverse, *k, keep)
            y, _, _, c, gates = ops.lstm_layer(*detached, None, None, case.reverse, *k, "all")
            tail = (*detached, y, c, gates, case.reverse, *k, *wants)
            biases = (b if b is None else b.detach() for b in bias)
            lean = (*detached, y, c, None, case.reverse, *k, *wants, *biases)
            backward = torch.ops.rnnfast.lstm_layer_backward.default
            yield backward, (y, None, None, c, *tail)
            yield backward, (None, y[0], y[0], None, *tail)
            yield backward, (y, None, None, c, *lean)
        else:
            yield torch.ops.rnnfast.rnn_layer.default, (*head, *bias, cell, case.reverse, *k)
            y, _ = ops.rnn_layer(*detached, None, None, cell, case.reverse, *k)
            tail = (*detached, y, cell, case.reverse, *k, *wants)
            yield torch.ops.rnnfast.rnn_layer_backward.default, (y, y[0].clone(), *tail)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck(requires_grad):
    for operator, arguments in operator_calls(requires_grad):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (3, 0, 3, 4), (3, 2, 0, 4), (5, 3, 2, 4)])
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_fake_kernels_give_the_shapes_of_real_ones(cell, sizes):
    case = Case(cell, *sizes)
    inputs = case.inputs(torch.float32)
    real = run_operator(case, inputs)
    fake = run_operator(case, {name: v.to("meta") for name, v in inputs.items()})
    for name, value in real.items():
        assert (fake[name].shape, fake[name].dtype) == (value.shape, value.dtype), name
        assert fake[name].device.type == "meta"
    if cell == "lstm":
        given = list(inputs.values())
        for keep in KEEP:
            kept = ops.lstm_layer(*given, False, 0, 0, keep)[3:]
            shapes = ops.lstm_layer(*(v.to("meta") for v in given), False, 0, 0, keep)[3:]
            assert [v.shape for v in kept] == [v.shape for v in shapes]


# What builds on them

MODULES = [
    (rnnfast.LSTM, {"num_layers": 2}),
    (rnnfast.RNN, {"bidirectional": True, "nonlinearity": "relu"}),
    (rnnfast.LSTM, {"truncate": (2, 3)}),
    (rnnfast.LSTM, {"memory": "low"}),
]


def loss_and_gradients(run, module, x):
    y, _ = run(x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])]


def assert_same_results(got, want, T):
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, K=50, T=T)


@pytest.fixture
def module_and_input(request):
    cls, options = request.param
    return cls(3, 4, dtype=torch.float64, **options), torch.randn(
        5, 2, 3, dtype=torch.float64, requires_grad=True
    )


@pytest.mark.parametrize("module_and_input", MODULES, indirect=True)
def test_functional_call(module_and_input):
    module, x = module_and_input
    other = {name: torch.rand_like(p) for name, p in module.named_parameters()}
    got, _ = torch.func.functional_call(module, other, x)
    module.load_state_dict(other)
    assert torch.equal(got, module(x)[0])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("module_and_input", MODULES, indirect=True)
def test_activation_checkpointing(module_and_input, reentrant):
    module, x = module_and_input

    def run(x):
        return checkpoint(module, x, use_reentrant=reentrant)

    y, _ = run(x)
    y.square().sum().backward()
    got = [y, x.grad, *(p.grad for p in module.parameters())]
    want = loss_and_gradients(module, module, x)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("module_and_input", MODULES, indirect=True)
def test_compile_module(module_and_input):
    """dynamo refuses subclasses of torch.nn.RNN and LSTM unless it is told otherwise."""
    module, x = module_and_input
    torch.compiler.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
        got = loss_and_gradients(compiled, module, x)
    assert_same_results(got, loss_and_gradients(module, module, x), T=10)


def test_compile_functions_and_other_lengths():
    module = rnnfast.LSTM(3, 4, dtype=torch.float64)
    weights = module.weights()
    cell = rnnfast.LSTMCell(3, 4, dtype=torch.float64)

    def run(x):
        y, (h, c) = functional.lstm(x, None, weights)
        return cell(x[0], (h[0], c[0]))[0] + y[-1], None

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for T, B in ((5, 2), (7, 3), (9, 4)):
        x = torch.randn(T, B, 3, dtype=torch.float64, requires_grad=True)
        got = loss_and_gradients(compiled, module, x)
        assert_same_results(got, loss_and_gradients(run, module, x), T=10)


# torch's own forward mode scripts its decompositions, which it has deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("module", [rnnfast.LSTM(3, 4), rnnfast.RNN(3, 4)], ids=["lstm", "rnn"])
@pytest.mark.parametrize("trainable", [False, True])
def test_forward_mode_is_refused_rather_than_dropped(module, trainable):
    module = copy.deepcopy(module).requires_grad_(trainable)
    x = torch.randn(5, 2, 3)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: module(x)[0], (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        module(x)  # no tangent is given, so none is lost
        with pytest.raises(NotImplementedError, match="forward-mode"):
            module(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
