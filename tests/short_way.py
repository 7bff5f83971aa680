"""What holds for both short ways past torch's dispatcher, for CPU and for CUDA tensors.

Tests that are the same for both are methods here; `test_direct.py` and `test_cuda_direct.py`
inherit them, each with its own fixture `ways`: a list that grows by "short forward", "operator
backward" and so on as kernels are called.
"""

from __future__ import annotations

import threading
from contextlib import ExitStack

import pytest
import torch
from one_layer import LAYOUTS
from rnnfast import LSTM, RNN, LSTMCell, RNNCell, cuda_direct, direct
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

MODULES = {
    "LSTM": lambda **o: LSTM(3, 5, **o),
    "RNN tanh": lambda **o: RNN(3, 5, **o),
    "RNN relu": lambda **o: RNN(3, 5, nonlinearity="relu", **o),
    "LSTMCell": lambda **o: LSTMCell(3, 5, **o),
    "RNNCell tanh": lambda **o: RNNCell(3, 5, **o),
    "RNNCell relu": lambda **o: RNNCell(3, 5, nonlinearity="relu", **o),
}
SEQUENCES = [name for name in MODULES if "Cell" not in name]
every_module = pytest.mark.parametrize("name", MODULES)
lstm_and_rnn = pytest.mark.parametrize("name", ["LSTM", "RNN tanh"])

# What a layer may meet, for `pairwise`.
LAYER_AXES = {
    "cell": ["lstm", "tanh", "relu"],
    "T": [1, 5],
    "B": [1, 3],
    "I": [1, 4],
    "H": [1, 17],
    "reverse": [False, True],
    "biases": ["both", "none", "input", "hidden"],
    "layout": list(LAYOUTS),
    "upstream": [("y",), ("h_n", "c_n"), ("y", "c"), ("y", "h_n", "c_n", "c")],
    "truncate": [None, (1, 1), (2, 3), (7, 9)],
}


def by_operators(function, *args):
    """What the function gives while the short ways are closed."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (direct, cuda_direct):
            patch.setattr(module, "_watched", lambda: True)
        return function(*args)


def flat(value):
    """The tensors of a nested tuple."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in flat(part)]


def input_of(name, dtype=torch.float32):
    return torch.randn((2, 3) if "Cell" in name else (4, 2, 3), dtype=dtype)


def state_of(name, shape, dtype=torch.float32):
    state = torch.randn(shape, dtype=dtype)
    return (state, state.cos()) if "LSTM" in name else state


def results(module, x, hx):
    """Outputs and the gradients of everything, from leaves of their own."""
    x = x.detach().requires_grad_()
    states = [s.detach().requires_grad_() for s in flat(hx)] if hx is not None else []
    given = None if hx is None else tuple(states) if isinstance(hx, tuple) else states[0]
    outputs = flat(module(x, given))
    loss = sum((o * torch.linspace(0.5, 1.5, o.numel()).view(o.shape)).sum() for o in outputs)
    gradients = torch.autograd.grad(loss, [x, *states, *module.parameters()])
    return [*(o.detach() for o in outputs), *gradients]


def assert_equal(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


def assert_both_ways_agree(module, x, hx, ways):
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


class SameBits:
    """To be inherited with a parameter dtype."""

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("with_state", [True, False])
    @pytest.mark.parametrize("batched", [True, False])
    @every_module
    def test_same_bits(self, name, batched, with_state, bias, dtype, ways):
        module = MODULES[name](bias=bias, dtype=dtype)
        x = input_of(name, dtype)
        lead = (2,) if batched else ()
        shape = (*lead, 5) if "Cell" in name else (1, *lead, 5)
        hx = state_of(name, shape, dtype) if with_state else None
        assert_both_ways_agree(module, x if batched else x[..., 0, :], hx, ways)

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
    @pytest.mark.parametrize("name", SEQUENCES)
    def test_same_bits_with_options(self, name, dtype, options, ways):
        module = MODULES[name](**options, dtype=dtype)
        x = input_of(name, dtype)
        assert_both_ways_agree(module, x, None, ways)
        rows = options.get("num_layers", 1) * (1 + options.get("bidirectional", False))
        batch = x.shape[0 if options.get("batch_first") else 1]
        hx = state_of(name, (rows, batch, 5), dtype)
        assert_both_ways_agree(module, x.flip(-1)[..., ::1], hx, ways)


# What a hook may put in the place of a saved tensor.
WRONG = {
    "shape": lambda t: t[..., :1],
    "dtype": lambda t: t.double(),
    "device": lambda t: t.to("meta"),
    "layout": lambda t: t.to_sparse(),
}


class Autograd:
    """To be inherited with a fixture `wants`: grows by which gradients each backward is to give."""

    saves = 5  # at least as many tensors for the backward pass

    @every_module
    def test_gradients_nobody_needs_are_not_computed(self, name, wants):
        module = MODULES[name]()
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
    def test_changes_between_forward_and_backward_are_noticed(self, name, changed, ways):
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
    def test_memory_exchanged_between_forward_and_backward_is_not_read_beyond_its_end(
        self, name, ways
    ):
        module = MODULES[name]()
        loss = module(input_of(name))[0].sum()
        module.weight_hh_l0.data = torch.zeros(1, 1)  # what no version counter sees
        with pytest.raises(RuntimeError, match=r"w_hh|shape"):
            loss.backward()
        assert ways[:1] == ["short forward"]

    @every_module
    @pytest.mark.parametrize("through", ["x", "dy"])
    def test_second_derivatives_are_refused(self, name, through, ways):
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

    @every_module
    def test_a_graph_of_the_gradient_changes_no_bit(self, name, ways):
        """Unbatched, too, and without a state: the operators get other shapes."""
        module = MODULES[name]()
        for x in (input_of(name), input_of(name)[..., 0, :]):
            leaves = [x.requires_grad_(), *module.parameters()]
            loss = flat(module(x))[0].square().sum()
            ways.clear()
            kept = torch.autograd.grad(loss, leaves, create_graph=True)
            assert_equal(kept, torch.autograd.grad(loss, leaves))
            assert ways == ["operator backward", "short backward"]

    @every_module
    def test_saved_tensors_hooks_see_all_and_may_move_it(self, name):
        module, x = MODULES[name](), input_of(name)
        want, packed = results(module, x, None), []

        def pack(tensor):
            packed.append(tensor.shape)
            return tensor.detach().numpy().copy()

        with saved_tensors_hooks(pack, torch.from_numpy):
            assert_equal(results(module, x, None), want)
        assert len(packed) >= self.saves

    @pytest.mark.parametrize("wrong", WRONG)
    @lstm_and_rnn
    def test_hooks_that_give_something_else_back(self, name, wrong, ways):
        module, x = MODULES[name](), input_of(name).requires_grad_()
        with saved_tensors_hooks(lambda t: t.detach().clone(), WRONG[wrong]):
            y, _ = module(x)
            with pytest.raises((RuntimeError, NotImplementedError)):
                y.sum().backward()
        assert "short backward" not in ways

    @every_module
    def test_batched_gradients(self, name):
        module, x = MODULES[name](), input_of(name).requires_grad_()
        y = flat(module(x))[0]
        dy = torch.randn(3, *y.shape)
        batched = torch.autograd.grad(y, x, dy, is_grads_batched=True, retain_graph=True)[0]
        for row, one in zip(batched, dy, strict=True):
            assert torch.equal(row, torch.autograd.grad(y, x, one, retain_graph=True)[0])

    def test_threads_do_not_meet(self):
        modules = [MODULES[name]() for name in SEQUENCES]
        x = torch.randn(4, 2, 3)
        want, got = [results(module, x, None) for module in modules], {}

        def work(index):
            for _ in range(20):
                got[index] = results(modules[index % len(modules)], x, None)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for index in range(6):
            assert_equal(got[index], want[index % len(modules)])

    @every_module
    def test_nothing_is_recorded_without_need(self, name, ways):
        """Inference comes first: nothing it leaves behind may be of use to inference only."""
        module, x = MODULES[name](), input_of(name)
        with torch.inference_mode():
            inferred = flat(module(x))
            assert all(output.is_inference() for output in inferred)
            given = inferred[0][..., :3]
            assert_equal(flat(module(given)), flat(module(given.clone())))
        with torch.no_grad():
            assert not any(output.requires_grad for output in flat(module(x)))
        frozen = module.requires_grad_(False)
        assert not any(output.requires_grad for output in flat(frozen(x)))
        assert set(ways) == {"short forward"}
        assert all(output.requires_grad for output in flat(frozen(x.requires_grad_())))


class Functions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


WATCHERS = {
    "dispatch mode": Operators,
    "function mode": Functions,
    "default device": lambda: torch.device("cpu"),
    "forward mode": forward_ad.dual_level,
    "profiler": lambda: profile(activities=[ProfilerActivity.CPU]),
    "autograd profiler": torch.autograd.profiler.profile,
}


class Watched:
    """Calls that somebody wants to see need the operators."""

    @pytest.mark.parametrize("watcher", WATCHERS)
    @every_module
    def test_watched_calls_go_through_the_operators(self, name, watcher, ways):
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
    def test_a_watcher_may_come_for_the_backward_pass(self, name, ways):
        module, x = MODULES[name](), input_of(name)
        want = results(module, x, None)
        with ExitStack() as stack:
            module.register_forward_hook(lambda *_: stack.enter_context(Operators()) and None)
            ways.clear()
            assert_equal(results(module, x, None), want)
        assert ways == ["short forward", "operator backward"]


class Subclass(torch.Tensor):
    pass


UNUSUAL = {
    "subclass": lambda x: x.as_subclass(Subclass),
    "parameter of a subclass": lambda x: torch.nn.Parameter(x.as_subclass(Subclass)),
    "lazy negation": lambda x: torch._neg_view(-x),
}


class Unusual:
    """Tensors whose address does not lead to their elements, or that want to see operators."""

    @pytest.mark.parametrize("kind", UNUSUAL)
    @every_module
    def test_unusual_tensors_go_through_the_operators(self, name, kind, ways):
        module, x = MODULES[name](), input_of(name)
        want = flat(module(x))
        ways.clear()
        for got, expected in zip(flat(module(UNUSUAL[kind](x))), want, strict=True):
            assert torch.equal(got.as_subclass(torch.Tensor), expected)
        assert ways == ["operator forward"]

    @every_module
    def test_a_tensor_that_left_a_transformation(self, name):
        module, x, left = MODULES[name](), input_of(name), []
        torch.func.grad(lambda x: (left.append(x), x.sum())[1])(x)
        assert_equal(flat(module(left[0])), flat(module(x)))
