"""The short way past torch's dispatcher: same bits as the operators, and only where it is open."""

from __future__ import annotations

import copy
import itertools
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import one_layer
import pytest
import short_way
import torch
from one_layer import Case, by_operator
from pairwise import pairwise
from rnnfast import LSTM, _native, cpu, direct, ops
from short_way import (
    LAYER_AXES,
    MODULES,
    assert_equal,
    by_operators,
    every_module,
    flat,
    input_of,
    lstm_and_rnn,
    results,
    state_of,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile


@pytest.fixture
def ways(monkeypatch):
    """Grows by "short forward", "operator backward" and so on as kernels are called."""
    seen = []

    def noted(way):
        def wrapped(direction):
            def call(*args, **options):
                seen.append(f"{way} {direction}")
                return getattr(cpu, direction)(*args, **options)

            return call

        return SimpleNamespace(forward=wrapped("forward"), backward=wrapped("backward"))

    def examined(name):
        def call(*args):
            found = getattr(_native.core, name)(*args)
            if found is not None and found[0] is not None:  # it has computed, too
                seen.append("short forward")
            return found

        return call

    entries = ("run_layer", "run_sequence", "run_step")
    monkeypatch.setattr(direct, "core", SimpleNamespace(**{n: examined(n) for n in entries}))
    monkeypatch.setattr(direct, "cpu", noted("short"))
    monkeypatch.setattr(ops, "cpu", noted("operator"))
    return seen


# The same results


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
class TestSameBits(short_way.SameBits):
    pass


@pytest.mark.parametrize("flag", [1, 2.5, "yes", np.True_, 0, "", np.False_], ids=repr)
@pytest.mark.parametrize("option", ["batch_first", "bias"])
@lstm_and_rnn
def test_options_need_not_be_booleans(name, option, flag):
    """torch.nn's modules take for true what Python does."""
    plain, module = MODULES[name](**{option: bool(flag)}), MODULES[name](**{option: bool(flag)})
    module.load_state_dict(plain.state_dict())
    setattr(module, option, flag)
    x = input_of(name)
    assert_equal(results(module, x, None), results(plain, x, None))
    with torch.no_grad():
        assert_equal(flat(module(x)), flat(plain(x)))


LAYER_CASES = [Case(**choice) for choice in pairwise(**LAYER_AXES)]


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("case", LAYER_CASES, ids=str)
def test_a_layer_has_the_same_bits_in_any_layout(case, monkeypatch, ways):
    names = list(case.inputs(torch.float64))
    for count in (1, len(names) - 1, len(names)):
        for want in itertools.islice(itertools.combinations(names, count), 4):
            expected = by_operator(case, torch.float64, list(want))
            assert not any(way.startswith("short") for way in ways)
            ways.clear()
            with monkeypatch.context() as patch:
                short = SimpleNamespace(
                    lstm_layer=lambda *args: (*direct.lstm_layer(*args), None),
                    rnn_layer=direct.rnn_layer,
                )
                patch.setattr(one_layer, "ops", short)
                got = by_operator(case, torch.float64, list(want))
            assert ways == ["short forward", "short backward"]
            ways.clear()
            assert got.keys() == expected.keys()
            for key, value in expected.items():
                assert torch.equal(got[key], value), (key, want)


@pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch publishes no table"
)
def test_tensors_are_read_through_the_exchange_table_where_there_is_one(monkeypatch):
    """Reading attributes, which this forbids, is for torch versions that have none."""
    module, x = LSTM(3, 5), torch.randn(4, 2, 3)
    with torch.no_grad():
        want = flat(module(x))
        for attribute in ("data_ptr", "is_contiguous"):
            monkeypatch.setattr(
                torch.Tensor, attribute, lambda *_: pytest.fail("read by attributes"), raising=False
            )
        got = flat(module(x))
    monkeypatch.undo()
    assert_equal(got, want)


# Autograd


class TestAutograd(short_way.Autograd):
    @pytest.fixture
    def wants(self, monkeypatch):
        asked = []

        def backward(*args):
            *_, upstream, _, want, _ = args
            assert sum(gradient is not None for gradient in upstream) == 1
            asked.append(want)
            return cpu.backward(*args)

        monkeypatch.setattr(direct, "cpu", SimpleNamespace(forward=cpu.forward, backward=backward))
        return asked


@pytest.mark.parametrize("recording", [False, True])
@every_module
def test_results_may_be_written_on(name, recording):
    """As masks do on a carried state: h of a cell, and y where it is no saved tensor."""
    module, x = MODULES[name](), input_of(name)
    results = ("h", "c") if "Cell" in name else ("y", "h", "c")
    with torch.set_grad_enabled(recording):
        for index, result in zip(range(3), results, strict=False):
            outputs = flat(module(x))
            if index >= len(outputs) or (recording and result == "y"):
                continue
            others = [o.clone() for i, o in enumerate(outputs) if i != index]
            outputs[index].mul_(0)
            assert_equal([o for i, o in enumerate(outputs) if i != index], others)
            if recording:
                sum(o.sum() for o in outputs).backward()


@lstm_and_rnn
def test_inputs_that_were_not_used_have_no_gradient(name):
    module = MODULES[name]()
    x = input_of(name).requires_grad_()
    y, _ = module(x.detach())
    assert torch.autograd.grad(y.sum(), [x, module.weight_hh_l0], allow_unused=True)[0] is None
    with pytest.raises(RuntimeError, match="not have been used"):
        torch.autograd.grad(module(x.detach())[0].sum(), x)


@lstm_and_rnn
def test_a_graph_lives_once_unless_it_is_kept(name):
    module, x = MODULES[name](), input_of(name).requires_grad_()
    y = module(x)[0].sum()
    first, second = (torch.autograd.grad(y, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.filterwarnings("ignore:Error detected in RnnfastLayerBackward")
def test_anomaly_mode_names_the_layer():
    module, x = LSTM(3, 5), torch.full((4, 2, 3), float("nan"))
    with torch.autograd.detect_anomaly():
        loss = module(x)[0].sum()
        with pytest.raises(RuntimeError, match="RnnfastLayerBackward"):
            loss.backward()


@every_module
def test_autocast_casts_what_it_did(name):
    module, x = MODULES[name](), input_of(name)
    for given in (x, x.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            assert_equal(results(module, given, None), by_operators(results, module, given, None))


# What is in the place of a weight now computes


@lstm_and_rnn
def test_weights_may_be_replaced_at_any_time(name):
    module, x = MODULES[name](), input_of(name)
    theirs = (torch.nn.LSTM if name == "LSTM" else torch.nn.RNN)(3, 5)
    changes = {
        "in place": lambda m, w: m.weight_hh_l0.data.copy_(w),
        "data": lambda m, w: setattr(m.weight_hh_l0, "data", w.clone()),
        "parameter": lambda m, w: setattr(m, "weight_hh_l0", torch.nn.Parameter(w.clone())),
        "strided": lambda m, w: setattr(m.weight_hh_l0, "data", w.t().contiguous().t()),
    }
    theirs.load_state_dict(module.state_dict())
    for change in changes.values():
        module(x)
        weight = torch.randn_like(theirs.weight_hh_l0)
        for m in (module, theirs):
            change(m, weight)
        torch.testing.assert_close(module(x)[0], theirs(x)[0])


@every_module
def test_what_a_module_says_of_itself_may_change_at_any_time(name):
    x, bad = input_of(name), {"truncate": 0, "memory": "lower", "nonlinearity": "lstm"}
    changes = ["truncate"] * ("Cell" not in name) + ["memory"] * (name == "LSTM")
    changes += ["nonlinearity"] * ("RNN" in name)
    for change in changes:
        module = MODULES[name]()
        module(x)
        setattr(module, change, bad[change])
        with pytest.raises((ValueError, RuntimeError), match=change):
            module(x)
        setattr(module, change, [])
        with pytest.raises((ValueError, RuntimeError, TypeError)):
            module(x)


@pytest.mark.parametrize("name", ["RNN tanh", "RNNCell tanh"])
def test_a_nonlinearity_is_not_the_name_of_another_cell(name):
    """Not even where the weights would fit."""
    module = MODULES[name]()
    for key, parameter in module.named_parameters():
        rows = torch.randn(4 * len(parameter), *parameter.shape[1:])
        setattr(module, key, torch.nn.Parameter(rows))
    module.nonlinearity = "lstm"
    with pytest.raises((ValueError, RuntimeError), match=r"'tanh' or 'relu'|weight_hh"):
        module(input_of(name))


RESIZED = {
    "weight_ih_l0": [(20, 2), (19, 3), (60,)],
    "weight_hh_l0": [(20, 4), (5, 5), (), (100,)],
    "bias_ih_l0": [(19,), (1, 20), ()],
    "bias_hh_l0": [(0,), (21,)],
}


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("weight", RESIZED)
def test_sizes_are_looked_at_in_every_call(weight, ways):
    module, x = LSTM(3, 5), torch.randn(4, 2, 3)
    module(x)
    ways.clear()
    for shape in RESIZED[weight]:
        getattr(module, weight).data = torch.zeros(shape)
        for context in (torch.no_grad(), nullcontext()):
            with context, pytest.raises(RuntimeError, match=r"^LSTM: .*(shape|size)"):
                module(x)
    assert not ways  # no kernel ran


# Where the operators are needed


class TestWatched(short_way.Watched):
    pass


@pytest.mark.usefixtures("reading")
class TestUnusual(short_way.Unusual):
    pass


def test_a_profile_shows_the_operators():
    module, x = LSTM(3, 5), torch.randn(4, 2, 3)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        module(x)[0].sum().backward()
    names = {event.key for event in profiled.key_averages()}
    assert {"rnnfast::lstm_layer", "rnnfast::lstm_layer_backward"} <= names


@pytest.mark.usefixtures("reading")
@lstm_and_rnn
def test_unusual_weights_and_states_go_through_the_operators(name, ways):
    module, x = MODULES[name](), input_of(name)
    hx = state_of(name, (1, 2, 5))
    want = flat(module(x, hx))
    for parameter in module.parameters():
        negated = torch.nn.Parameter(torch._neg_view(-parameter.detach()))
        other = copy.deepcopy(module)
        key = next(k for k, p in module.named_parameters() if p is parameter)
        setattr(other, key, negated)
        ways.clear()
        assert_equal(flat(other(x, hx)), want)
        assert ways == ["operator forward"]
    lazy = tuple(torch._neg_view(-s) for s in flat(hx))
    ways.clear()
    assert_equal(flat(module(x, lazy if isinstance(hx, tuple) else lazy[0])), want)
    assert ways == ["operator forward"]


@pytest.mark.usefixtures("reading")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
@lstm_and_rnn
def test_tensors_without_memory_are_refused_as_by_the_operators(name, layout):
    module, x = MODULES[name](), torch.randn(4, 3)
    messages = []
    for run in (module, lambda given: by_operators(module, given)):
        with pytest.raises((RuntimeError, NotImplementedError)) as caught:
            run(getattr(x, layout)())
        messages.append((type(caught.value), str(caught.value)))
    assert messages[0] == messages[1]


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x: torch.vmap(f)(torch.stack((x, x.cos()))),
    "functionalize": lambda f, x: torch.func.functionalize(f)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@lstm_and_rnn
def test_transforms_meet_the_operators(name, transform, ways):
    module, x = MODULES[name]().requires_grad_(False), input_of(name)

    def transformed():
        try:
            return TRANSFORMS[transform](lambda x: module(x)[0], x)
        except RuntimeError as error:  # what torch can't transform
            return str(error)

    want, got = by_operators(transformed), transformed()
    assert got == want if isinstance(want, str) else torch.equal(got, want)
    assert not any(way.startswith("short") for way in ways)


@every_module
def test_tensors_a_transformation_does_not_touch_meet_the_operators_too(name, ways):
    module, x = MODULES[name]().requires_grad_(False), input_of(name)
    want = flat(module(x))[0]
    ways.clear()
    got = torch.vmap(lambda factor: factor * flat(module(x))[0])(torch.tensor([1.0, 2.0]))
    assert_equal(list(got), [want, 2 * want])
    assert ways == ["operator forward"]


def targets(graph_module):
    return {str(node.target) for node in graph_module.graph.nodes}


@lstm_and_rnn
def test_tracers_record_the_operators(name, ways):
    module, x = MODULES[name]().requires_grad_(False), input_of(name)
    operator = f"rnnfast.{'lstm' if name == 'LSTM' else 'rnn'}_layer.default"
    other = torch.randn_like(x)
    want = module(other)[0]
    for mode in ("real", "fake", "symbolic"):
        for pre_dispatch in (False, True):
            traced = make_fx(
                lambda x: module(x)[0],
                tracing_mode=mode,
                pre_dispatch=pre_dispatch,
                _allow_non_fake_inputs=True,
            )(x)
            assert operator in targets(traced)
            assert torch.equal(traced(other), want)

    graphs = []

    def backend(graph_module, _):
        graphs.append(graph_module)
        return graph_module

    torch.compiler.reset()
    with torch._dynamo.config.patch(allow_rnn=True):
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        assert torch.equal(compiled(x)[0], module(x)[0])
    assert operator in set().union(*map(targets, graphs))

    class Outer(torch.nn.Module):  # what is exported must be an ordinary module
        def __init__(self):
            super().__init__()
            self.inner = module

        def forward(self, x):
            return self.inner(x)[0]

    exported = torch.export.export(Outer(), (x,), strict=False)
    assert operator in targets(exported.graph_module)
    assert torch.equal(exported.module()(other), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@lstm_and_rnn
def test_a_jit_trace_computes_instead_of_remembering(name):
    module, x = MODULES[name]().requires_grad_(False), input_of(name)
    traced = torch.jit.trace(lambda x: module(x)[0], x)
    other = torch.randn_like(x)
    assert torch.equal(traced(other), module(other)[0])


def test_numpy_sees_what_was_computed():
    """Outputs own their memory: y, h_n and c_n of one step are equal, and not the same."""
    y, (h_n, c_n) = LSTM(3, 5).requires_grad_(False)(torch.randn(1, 1, 3))
    assert np.array_equal(y.numpy(), h_n.numpy())
    assert len({t.data_ptr() for t in (y, h_n, c_n)}) == 3


# The core's own functions


def arguments_of(entry, x, states, weights, grad):
    return {
        "run_layer": ("lstm", x, states, weights, False, "nothing", False, grad, 0, 0),
        "run_sequence": ("lstm", x, states, weights, True, False, False, grad),
        "run_step": ("lstm", x, states, weights, False, grad),
    }[entry]


def layer_of(entry):
    module = LSTM(3, 5)
    x, lead = (torch.randn(2, 3), (2,)) if entry == "run_step" else (torch.randn(4, 2, 3), (1, 2))
    states = state_of("LSTM", (*lead[-1:], 5) if entry == "run_layer" else (*lead, 5))
    return x, states, tuple(module.parameters())


every_entry = pytest.mark.parametrize("entry", ["run_layer", "run_sequence", "run_step"])
NO_TENSORS = [None, 1, "x", (), [], object(), torch.float32, np.zeros((4, 2, 3), np.float32)]


@pytest.mark.usefixtures("reading")
@every_entry
def test_anything_may_stand_in_the_place_of_a_tensor(entry):
    x, states, weights = layer_of(entry)
    run = getattr(_native.core, entry)
    assert run(*arguments_of(entry, x, states, weights, False)) is not None
    uninitialised = torch.nn.parameter.UninitializedParameter()
    five_axes, empty = torch.zeros(1, 1, 1, 1, 1), torch.zeros(0, 2, 3)
    for wrong in (*NO_TENSORS, uninitialised, five_axes, empty):
        given = [(wrong, states, weights)]
        given += [(x, s, weights) for s in (wrong, (states[0], wrong), (wrong, states[1]))]
        given += [(x, states, wrong)]
        given += [(x, states, (*weights[:i], wrong, *weights[i + 1 :])) for i in range(4)]
        for several in given:
            if wrong is None and (several[1] is None or several[2] is not weights):
                continue  # a state and biases may be absent
            assert run(*arguments_of(entry, *several, False)) is None
    assert run(
        *arguments_of(entry, x, states, (*weights[:2], None, weights[3]), False)
    ) is None or (entry == "run_layer")
    for count in (0, 1, 5, 9):
        with pytest.raises(ValueError, match="number of arguments"):
            run(*[None] * count)
    with pytest.raises(ValueError, match="unknown cell"):
        run("gru", *arguments_of(entry, x, states, weights, False)[1:])


@pytest.mark.parametrize("which", ["states", "weights"])
@every_entry
def test_a_list_may_change_while_it_is_read(entry, which, monkeypatch):
    """As another thread may do whenever reading a tensor lets it run."""
    x, states, weights = layer_of(entry)
    run = getattr(_native.core, entry)
    want = run(*arguments_of(entry, x, states, weights, False))
    first, *_ = changing = [*(states if which == "states" else weights)]
    others = []

    def is_neg(tensor):
        if tensor is first:
            count = len(changing)
            changing.clear()
            others.extend([1] * count for _ in range(20))  # where its items stood
        return False

    monkeypatch.setattr(torch.Tensor, "is_neg", is_neg, raising=False)
    given = (changing, weights) if which == "states" else (states, changing)
    got = run(*arguments_of(entry, x, *given, False))
    monkeypatch.undo()
    assert others
    assert_equal([t for t in got if t is not None], [t for t in want if t is not None])


@pytest.mark.usefixtures("reading")
@every_entry
def test_no_object_is_kept_or_lost(entry):
    x, states, weights = layer_of(entry)
    run = getattr(_native.core, entry)
    sparse, strided = x.to_sparse(), x.transpose(0, -1).contiguous().transpose(0, -1)
    objects = [x, sparse, strided, *states, *weights, None, torch.float32, torch.Tensor]

    def calls():
        for grad in (False, True):
            run(*arguments_of(entry, x, states, weights, grad))
            run(*arguments_of(entry, strided, states, weights, grad))
            run(*arguments_of(entry, sparse, states, weights, grad))
            run(*arguments_of(entry, x, states, (*weights[:3], x), grad))
            if entry != "run_layer":
                run(*arguments_of(entry, x, None, weights, grad))

    calls()
    before = [sys.getrefcount(o) for o in objects]
    for _ in range(100):
        calls()
    after = [sys.getrefcount(o) for o in objects]
    assert all(abs(a - b) < 50 for a, b in zip(after, before, strict=True))


def test_an_allocation_that_fails_is_an_error(monkeypatch):
    def new_empty(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    with torch.no_grad(), pytest.raises(MemoryError, match="no room"):
        LSTM(3, 5)(torch.randn(4, 2, 3))
