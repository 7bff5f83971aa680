"""Both directions of a layer in one launch: the CUDA kernels' own source on the emulator."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
from bidirectional_layer import by_bidirectional_operator, check, directions
from emulated import bidirectional_operators, device, emulating, native, run
from one_layer import Case
from rnnfast import bidirectional, checks, cuda_ops, functional, stack
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

METHODS = ["local", "cluster", "grid", "steps"]  # for every dtype
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SMALL = {"multiprocessors": 8, "shared_bytes": 131072}


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that torch hands out is full of NaN: nothing may be read before it is written."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def both(case, dtype, method="", seed=1, keep="all", **properties):
    with emulating(seed, **properties), bidirectional_operators(method):
        return by_bidirectional_operator(case, dtype, keep=keep)


CASES = [
    Case("lstm", 4, 9, 3, 20),
    Case("lstm", 6, 3, 2, 40, truncate=(2, 2), layout="strided"),
    Case("lstm", 7, 2, 3, 33, truncate=(2, 5), biases="input", upstream=("y", "c")),
    Case("tanh", 5, 17, 1, 65, biases="none"),
    Case("relu", 7, 2, 3, 34, truncate=(3, 3), layout="offset"),
    Case("tanh", 1, 1, 0, 35, upstream=("h_n",)),
    Case("lstm", 2, 3, 2, 20, upstream=("c_n",)),
]


# Every case by every method, every method with every dtype.
TURNS = [
    (case, method, DTYPES[(i + j) % 4])
    for (i, case), (j, method) in itertools.product(enumerate(CASES), enumerate(METHODS))
    if method in ("cluster", "steps")  # only these are for overlapping windows
    or case.truncate is None
    or len(set(case.truncate)) == 1
]
TURNS += [(CASES[n], "resident", DTYPES[2 + n % 2]) for n in (0, 1, 4)]  # for tensor cores
TURNS += [(case, "gemm", DTYPES[i % 4]) for i, case in enumerate(CASES) if case.truncate is None]


@pytest.mark.parametrize(("case", "method", "dtype"), TURNS, ids=str)
def test_results(case, method, dtype):
    """Those of the textbook, and bit for bit those of two launches, one for each direction."""
    results = both(case, dtype, method, **SMALL)
    check(case, results, dtype)
    with emulating(**SMALL):
        alone = [run(each, dtype, method) for each in directions(case)]
    alone[0]["dx"] = alone[0]["dx"] + alone[1].pop("dx")
    for got, want in zip(results, alone, strict=True):
        for name, value in want.items():
            assert torch.equal(got[name], value), name


@pytest.mark.parametrize("method", METHODS)
def test_results_do_not_depend_on_the_order_of_threads(method):
    overlapping = method in ("cluster", "steps")
    case = Case("lstm", 4, 9, 2, 20, truncate=(2, 3) if overlapping else (2, 2))
    first, *others = (both(case, torch.float32, method, seed, **SMALL) for seed in (1, 2, 3))
    for other in others:
        for got, want in zip(other, first, strict=True):
            for name, value in want.items():
                assert torch.equal(got[name], value), name


def launches():
    """How often each kernel was launched since this was last asked, without the problem's name."""
    counts = {}
    for what, count in native.take_launches().items():
        name = re.sub(
            r"rnnfast: CUDA recurrence (\w+) \(\w+\) of [^,]+, T \d+, B \d+, H \d+", r"\1", what
        )
        counts[name] = counts.get(name, 0) + count
    return counts


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_one_launch_serves_both_directions(cell, method):
    case = Case(cell, 5, 3, 2, 40, truncate=(2, 2))
    native.take_launches()
    with emulating(**SMALL):
        run(case, torch.float32, method)
        for_one = launches()
        both(case, torch.float32, method, **SMALL)
        assert launches() == for_one
    steps = method == "steps"
    assert for_one == {
        "forward, packing": 1,
        "forward": 5 if steps else 1,
        "backward, packing": 1,
        "backward": 3 if steps else 1,  # k2 steps, and one to the initial state
        "backward, initial state": 1,
    }


def test_two_launches_where_they_are_estimated_to_be_faster():
    # One direction's blocks can all be resident on this device, those of two cannot.
    properties = {"multiprocessors": 4, "shared_bytes": 65536, "largest_cluster": 1}
    case, described = Case("lstm", 3, 3, 2, 150), device(**properties)
    work = (described, False, "lstm", "bfloat16", 3, 3, 150, 3, 3)
    one, two = native.plan(*work, 1), native.plan(*work, 2)
    assert 2 * one.cycles < two.cycles
    plans = cuda_ops.Layers(native).plans(described, 2, "forward", *work[2:])
    assert [plan.as_dict() for plan in plans] == [one.as_dict()] * 2
    native.take_launches()
    check(case, both(case, torch.bfloat16, **properties), torch.bfloat16)
    assert launches()["forward"] == 2


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_nothing_to_do(cell):
    native.take_launches()
    for sizes in [(0, 3, 2, 4), (3, 0, 2, 4)]:
        case = Case(cell, *sizes, upstream=("h_n", "c_n"))
        first, second = both(case, torch.float32)
        assert first["h_n"].shape == second["dh0"].shape == (case.B, case.H)
        assert torch.equal(first["dh0"], case.cotangents(torch.float32)["h_n"])
        assert not first["dw_hh"].any()
    assert launches() == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gates_that_are_computed_again(dtype):
    case = Case("lstm", 7, 3, 3, 20, truncate=(2, 3))
    results = both(case, dtype, keep="cells")
    check(case, results, dtype)
    with emulating():
        alone = [run(each, dtype, keep="cells") for each in directions(case)]
    for name, value in alone[1].items():
        if name != "dx":
            assert torch.equal(results[1][name], value), name


@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_autocast_changes_nothing_inside(cell):
    """`functional` casts what goes in; products inside of an operator stay in the layer's dtype."""
    case = Case(cell, 3, 2, 4, 20, truncate=(2, 2))
    want, alone = both(case, torch.float32), run(case, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [*both(case, torch.float32), run(case, torch.float32)]
    for results, others in zip(got, [*want, alone], strict=True):
        for name, value in others.items():
            assert torch.equal(results[name], value), name


def layers(count, H=5, I=3):
    """States and weights of a bidirectional stack."""

    def filled(*shape):
        return (torch.randn(shape, dtype=torch.float64) / 2).requires_grad_()

    states, weights = [], []
    for i, _ in itertools.product(range(count), range(2)):
        shapes = [(4 * H, 2 * H if i else I), (4 * H, H), (4 * H,), (4 * H,)]
        weights.append(tuple(filled(*shape) for shape in shapes))
        states.append((filled(2, H), filled(2, H)))
    return states, weights


@pytest.mark.parametrize("truncate", [(0, 0), (2, 2)], ids=str)
def test_a_stack_is_that_of_two_calls_a_layer(truncate):
    states, weights = layers(3)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    leaves = [x, *itertools.chain(*states, *weights)]

    def results(both):
        between = lambda i, y: y * (i + 2)  # noqa: E731
        y, finals, cells = stack.run(
            *(functional._lstm_layer, x, states, weights, 2, between, *truncate, "all", both)
        )
        outputs = [y, *itertools.chain(*finals), *cells]
        return outputs, torch.autograd.grad(sum(o.square().sum() for o in outputs), leaves)

    want = results(None)
    native.take_launches()
    with emulating(), bidirectional_operators():
        got = results(bidirectional.lstm)
    counts = launches()
    assert counts["forward"] == counts["backward"] == 3
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(list(mine), list(theirs))


class Calls(TorchDispatchMode):
    """Notes the names of rnnfast's operators that are called."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "rnnfast":
            self.names.append(function._schema.name.split("::")[1])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("truncate", [None, 2], ids=str)
@pytest.mark.parametrize(("device", "prefix"), [("cuda", "bidirectional_"), ("cpu", "")])
def test_layers_on_cuda_call_it(device, prefix, truncate, monkeypatch):
    monkeypatch.setattr(checks, "KERNEL_DEVICES", {"cpu", "cuda"})
    calls = 2 if prefix else 4
    with FakeTensorMode(), torch.no_grad():

        def weights(rows):
            shapes = [((rows, I), (rows, 5), (rows,), (rows,)) for I in (3, 3, 10, 10)]
            return [torch.empty(size, device=device) for group in shapes for size in group]

        x = torch.empty(4, 2, 3, device=device)
        options = {"num_layers": 2, "bidirectional": True, "truncate": truncate}
        with Calls() as called:
            y, (h_n, c_n) = functional.lstm(x, None, weights(20), **options)
        assert called.names == [f"{prefix}lstm_layer"] * calls
        assert (y.shape, h_n.shape, c_n.shape) == ((4, 2, 10), (4, 2, 5), (4, 2, 5))
        assert y.device.type == device
        for nonlinearity in ("tanh", "relu"):
            with Calls() as called:
                y, h_n = functional.rnn(x, None, weights(5), nonlinearity=nonlinearity, **options)
            assert called.names == [f"{prefix}rnn_layer"] * calls
            assert (y.shape, h_n.shape) == ((4, 2, 10), (4, 2, 5))
