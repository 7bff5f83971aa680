"""memory="low": gates are computed again, and nothing but memory and time tells.

The core adds up the same terms in the same order as it did going forward, so the gradients are
those of memory="normal" bit by bit, which the other tests hold to the textbook. That alone could
hide a mistake common to both, so a few cases meet the textbook here too.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from types import SimpleNamespace

import one_layer
import pytest
import torch
from one_layer import (
    AXES,
    Case,
    assert_results,
    by_operator,
    by_reference,
    run_operator,
)
from pairwise import pairwise
from rnnfast import LSTM, RNN, _native, convert, cpu, direct, functional, ops, revert
from rnnfast.cpu import KEEP
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.rnn import pack_padded_sequence

DTYPES = [torch.float32, torch.float64, torch.bfloat16]

PAIRWISE = [Case("lstm", **choice) for choice in pairwise(**AXES | {"T": [1, 2, 3, 17, 67]})]
# (T, B, I, H): several chunks of steps, sums in several pieces, too few rows to pack weights for.
EDGES = [(1100, 1, 3, 5), (40, 33, 5, 7), (3, 131, 300, 4), (5, 3, 2, 280), (2, 2, 129, 65)]
EDGES = [Case("lstm", *sizes) for sizes in EDGES]


def assert_identical(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*PAIRWISE, *EDGES], ids=str)
def test_gradients_are_the_same_bits(case, dtype, isa):
    assert_identical(by_operator(case, dtype, keep="cells"), by_operator(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("truncate", [None, (3, 3), (3, 7)], ids=str)
@pytest.mark.parametrize("sizes", [(9, 40, 33, 48), (30, 1, 20, 250)], ids=str)
def test_threads_change_no_bit(sizes, truncate, dtype, threads):
    case = Case("lstm", *sizes, truncate=truncate, reverse=True)
    got = by_operator(case, dtype, keep="cells")
    torch.set_num_threads(1)
    assert_identical(got, by_operator(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("truncate", [None, (2, 2), (2, 5)], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_against_the_textbook(reverse, truncate, dtype, isa):
    case = Case("lstm", 7, 5, 17, 33, reverse=reverse, truncate=truncate)
    got = by_operator(case, dtype, keep="cells")
    half = dtype == torch.bfloat16
    assert_results(case, got, by_reference(case, dtype), in_float32=half)


@pytest.mark.parametrize("what", ["x", "y", "w_ih", "w_hh", "b_ih", "b_hh", "h0"])
def test_the_gates_really_are_computed_from_these(what):
    """A change of any of them between the two passes changes the gradient of c0."""
    case = Case("lstm", 3, 2, 4, 5)
    i = case.inputs(torch.float64)
    head = [i[name] for name in ("x", "h0", "c0", "w_ih", "w_hh")]
    y, _, _, c, gates = ops.lstm_layer(*head, i["b_ih"], i["b_hh"], False, 0, 0, "cells")
    assert gates.shape == (0,)

    def dc0():
        wants, biases = (False,) * 4, (i["b_ih"], i["b_hh"])
        return torch.ops.rnnfast.lstm_layer_backward(
            *(torch.ones_like(y), None, None, None, *head, y, c, None, False, 0, 0),
            *(*wants, *biases),
        )[2]

    before = dc0()
    (i | {"y": y})[what].mul_(0.5)
    assert not torch.equal(dc0(), before)


def test_the_short_way_gives_the_same_bits(monkeypatch):
    seen = []

    class Noted:
        forward = staticmethod(cpu.forward)

        @staticmethod
        def backward(*args):
            seen.append(args[6][-1])
            return cpu.backward(*args)

    class Short:
        lstm_layer = staticmethod(lambda *args: (*direct.lstm_layer(*args), None))

    for case in PAIRWISE[:40]:
        if case.B == 0 or case.I == 0:
            continue
        want = by_operator(case, torch.float64, keep="cells")
        with monkeypatch.context() as patch:
            patch.setattr(one_layer, "ops", Short)
            patch.setattr(direct, "cpu", Noted)
            assert_identical(by_operator(case, torch.float64, keep="cells"), want)
        assert seen.pop() is None  # gates
        assert not seen


@pytest.mark.parametrize("keep", KEEP)
def test_what_is_kept(keep):
    case = Case("lstm", 5, 3, 4, 6)
    inputs = case.inputs(torch.float32)
    weights = [inputs[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh")]
    states = [inputs["h0"], inputs["c0"]]
    c, gates = ops.lstm_layer(inputs["x"], *states, *weights, False, 0, 0, keep)[3:]
    assert c.shape == ((0,) if keep == "nothing" else (5, 3, 6))
    assert gates.shape == ((5, 3, 4, 6) if keep == "all" else (0,))
    want = run_operator(case, inputs)
    assert_identical(
        {k: v for k, v in run_operator(case, inputs, keep).items() if k != "c"},
        {k: v for k, v in want.items() if k != "c"},
    )
    if keep != "nothing":
        assert torch.equal(c, want["c"])


# Modules


def results_of(module, x, **options):
    y, state = module(x, **options)
    data = y if torch.is_tensor(y) else y.data
    module.zero_grad()
    (data.square().sum() + sum(s.sin().sum() for s in state)).backward()
    return [data.detach(), *state, *(p.grad for p in module.parameters())]


OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True, "bias": False},
    {"truncate": 3},
    {"num_layers": 2, "truncate": (2, 5)},
    {"batch_first": True, "num_layers": 2, "dropout": 0.5},
    {"proj_size": 3},
]


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_modules_compute_the_same(options, dtype, ragged):
    module = LSTM(4, 5, dtype=dtype, **options)
    x = torch.randn(8, 8, 4).to(dtype)
    if ragged:
        first = module.batch_first
        x = pack_padded_sequence(x, [8, 8, 8, 6, 6, 3, 1, 1], batch_first=first)
    results = []
    for module.memory in ("normal", "low"):
        torch.manual_seed(1)
        results.append(results_of(module, x))
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_gradcheck(options):
    module = LSTM(3, 4, dtype=torch.float64, memory="low", **options)
    x = torch.randn(7, 2, 3, dtype=torch.float64, requires_grad=True)
    if "truncate" in options:  # not the derivative of anything
        y = module(x)[0]
        del module.memory
        want = torch.autograd.grad(module(x)[0].sum(), [x, *module.parameters()])
        for a, b in zip(torch.autograd.grad(y.sum(), [x, *module.parameters()]), want, strict=True):
            assert torch.equal(a, b)
        return
    names, weights = zip(*module.named_parameters(), strict=True)

    def run(x, *weights):
        y, state = torch.func.functional_call(module, dict(zip(names, weights, strict=True)), (x,))
        return y, *state

    assert torch.autograd.gradcheck(run, (x, *weights))


def saved_bytes(module, x):
    """Of all tensors kept between the passes, each storage counted once; and the gradients."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y, _ = module(x)
    return sum(kept.values()), y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("short", [True, False])
def test_less_is_saved(short, dtype, monkeypatch):
    T, B, I, H = 50, 4, 8, 16
    if not short:
        monkeypatch.setattr(direct, "_watched", lambda: True)
    module = LSTM(I, H, dtype=dtype)
    x = torch.randn(T, B, I).to(dtype)
    normal, _ = saved_bytes(module, x)
    module.memory = "low"
    low, y = saved_bytes(module, x)
    cell = torch.finfo(torch.promote_types(dtype, torch.float32)).bits // 8
    biases = 2 * 4 * H * dtype.itemsize
    assert normal - low == 4 * T * B * H * cell - biases
    parameters = sum(p.numel() for p in module.parameters())
    states = 2 * B * H * cell
    kept = T * B * ((I + H) * dtype.itemsize + H * cell)
    assert low <= kept + parameters * dtype.itemsize + states
    y.sum().backward()


def test_cell_states_alone_need_no_gates(monkeypatch):
    kept = []

    def recorded(*args, **options):
        kept.append(args[3])
        return cpu.forward(*args, **options)

    def unrecorded(*args):
        found = _native.core.run_layer(*args)
        if found[0] is not None:  # it has computed
            kept.append(args[5])
        return found

    monkeypatch.setattr(direct, "cpu", SimpleNamespace(forward=recorded))
    monkeypatch.setattr(direct, "core", SimpleNamespace(run_layer=unrecorded))
    module = LSTM(3, 4)
    x = torch.randn(5, 2, 3)
    for memory, grad in itertools.product(("normal", "low"), (False, True)):
        with torch.set_grad_enabled(grad):
            *_, cells = functional.lstm(x, None, module.weights(), memory=memory, return_cells=True)
        assert cells.shape == (5, 2, 4)
        assert kept.pop() == ("all" if grad and memory == "normal" else "cells")
        assert not kept


@pytest.mark.parametrize("changed", ["bias_ih_l0", "bias_hh_l0", "weight_ih_l0", "weight_hh_l0"])
def test_changes_between_forward_and_backward_are_noticed(changed):
    module = LSTM(3, 4, memory="low")
    loss = module(torch.randn(5, 2, 3))[0].sum()
    with torch.no_grad():
        getattr(module, changed).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# The keyword


@pytest.mark.parametrize("memory", ["lower", None, 1, [], True])
def test_a_bad_memory_is_an_error(memory):
    with pytest.raises(ValueError, match=r"memory must be 'normal' or 'low', got"):
        LSTM(3, 4, memory=memory)
    module = LSTM(3, 4)
    module.memory = memory
    for options in ({}, {"proj_size": 2}):
        with pytest.raises(ValueError, match="memory must be"):
            functional.lstm(
                torch.zeros(2, 2, 3),
                None,
                LSTM(3, 4, **options).weights(),
                memory=memory,
                **options,
            )
    with pytest.raises(ValueError, match="memory must be"):
        module(torch.zeros(2, 2, 3))
    plain = torch.nn.Sequential(torch.nn.LSTM(3, 4))
    with pytest.raises(ValueError, match="memory must be"):
        convert(plain, memory=memory)
    assert type(plain[0]) is torch.nn.LSTM
    with pytest.raises(TypeError, match="memory"):
        RNN(3, 4, memory="low")


def test_it_is_kept_in_copies_and_shown():
    module = LSTM(3, 4, truncate=2, memory="low")
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert copied.memory == "low"
        assert repr(copied) == "LSTM(3, 4, truncate=2, memory='low')"
    assert repr(LSTM(3, 4)) == "LSTM(3, 4)"
    assert LSTM(3, 4, memory="low").state_dict().keys() == torch.nn.LSTM(3, 4).state_dict().keys()


def test_modules_of_before_the_keyword():
    module = LSTM(3, 4)
    del module.__dict__["memory"]  # as an older pickle has it
    assert module.memory == "normal"
    assert module(torch.randn(2, 2, 3))[0].shape == (2, 2, 4)


def test_converting():
    model = torch.nn.ModuleList([torch.nn.LSTM(3, 4), torch.nn.RNN(3, 4), LSTM(3, 4)])
    convert(model, memory="low")
    assert [getattr(m, "memory", None) for m in model] == ["low", None, "normal"]
    revert(model)
    assert type(model[0]) is torch.nn.LSTM
    assert "memory" not in vars(model[0])
