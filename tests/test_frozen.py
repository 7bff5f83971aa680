"""Frozen weights: packed once and trusted, for as long as torch sees nobody write them."""

from __future__ import annotations

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import rnnfast
import torch
from rnnfast import _native, freeze, thaw
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_sequence

core = _native.core
I, H = 40, 48


@pytest.fixture(autouse=True)
def nothing_kept():
    core.empty_pool()
    yield
    assert state() == (0, 0), "a test has left frozen weights behind"
    core.empty_pool()


def state():
    """Frozen copies of weights, and their bytes."""
    pool = core.pool_state()
    return pool["frozen_packs"], pool["frozen_bytes"]


def flat(results):
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for part in results if part is not None for tensor in flat(part)]


@torch.no_grad()
def run(module, x):
    return flat(module(x))


def assert_identical(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def modules(dtype=torch.float32):
    return {
        "lstm": rnnfast.LSTM(I, H, dtype=dtype),
        "tanh": rnnfast.RNN(I, H, dtype=dtype),
        "relu": rnnfast.RNN(I, H, nonlinearity="relu", bias=False, dtype=dtype),
        "stack": rnnfast.LSTM(I, H, num_layers=2, bidirectional=True, dtype=dtype),
        "projected": rnnfast.LSTM(I, H, proj_size=20, dtype=dtype),
    }


@pytest.fixture(params=modules())
def layer(request):
    return modules()[request.param]


@pytest.fixture
def x():
    return torch.randn(7, 2, I)


# What is computed


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", modules())
def test_the_same_bits(name, dtype, isa, threads):
    layer, x = modules(dtype)[name], torch.randn(7, 2, I, dtype=dtype)
    want = run(layer, x)
    freeze(layer)
    for _ in range(3):
        assert_identical(run(layer, x), want)
    thaw(layer)
    assert_identical(run(layer, x), want)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("name", ["lstm", "tanh", "relu", "projected"])
def test_single_steps_are_those_of_a_sequence(name, rows, isa, threads):
    """Their weights are not packed, unless they are frozen."""
    layer, x = modules()[name], torch.randn(10, rows, I)
    want = run(layer, x)[0]
    freeze(layer)
    with torch.no_grad():
        states, got = None, []
        for step in x:
            y, states = layer(step[None], states)
            got.append(y)
    assert state()[0] == 1
    assert torch.equal(torch.cat(got), want)
    thaw(layer)


@pytest.mark.parametrize("cell", ["LSTM", "RNN"])
def test_cells(cell):
    module, layer = getattr(rnnfast, f"{cell}Cell")(I, H), getattr(rnnfast, cell)(I, H)
    weights = {f"{name}_l0": weight for name, weight in module.state_dict().items()}
    layer.load_state_dict(weights)
    x = torch.randn(2, I)
    want = run(layer, x.expand(5, 2, I))[0][0]
    freeze(module)
    for _ in range(2):
        assert torch.equal(run(module, x)[0], want)
    assert state()[0] == 1
    thaw(module)


def test_packed_sequences_and_gradients(x):
    layer = rnnfast.LSTM(I, H)
    packed = pack_sequence([x[:, 0], x[:4, 1]])
    want = run(layer, packed)
    grads = torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters()))
    freeze(layer)
    assert_identical(run(layer, packed), want)
    assert_identical(torch.autograd.grad(layer(x)[0].sum(), list(layer.parameters())), grads)
    thaw(layer)


def test_halved_steps():
    layer = rnnfast.LSTM(I, H)
    rounded = copy.deepcopy(layer)
    with torch.no_grad():
        rounded.weight_hh_l0.copy_(rounded.weight_hh_l0.bfloat16())
    x = torch.randn(1, 1, I)
    freeze(layer), freeze(rounded)
    states = (torch.randn(1, 1, H), torch.randn(1, 1, H))
    with torch.no_grad(), rnnfast.halved_recurrence():
        got = flat(layer(x, states))
    with torch.no_grad():
        assert_identical(got, flat(rounded(x, states)))
        assert not torch.equal(got[0], layer(x, states)[0])
    thaw(layer), thaw(rounded)


# What is trusted


def test_the_weights_are_not_looked_at(layer, x):
    freeze(layer)
    want = run(layer, x)
    copies = state()
    assert copies[0] == len(layer.all_weights)
    for weights in layer.all_weights:
        for weight in weights[:2]:
            weight.data.zero_()  # breaks the promise behind torch's back
    assert_identical(run(layer, x), want)
    assert state() == copies
    thaw(layer)
    assert_identical(run(layer, x), run(copy.deepcopy(layer), x))


def in_place(layer):
    with torch.no_grad():
        layer.weight_hh_l0.add_(0.01)


def on_a_view(layer):
    with torch.no_grad():
        layer.weight_ih_l0[3, 5:7] = 2


def optimiser_step(layer):
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(7, 2, I))[0].square().sum().backward()
    optimiser.step()


def load_state_dict(layer):
    layer.load_state_dict({name: w + 0.1 for name, w in layer.state_dict().items()})


def load_by_assignment(layer):
    layer.load_state_dict({name: w + 0.1 for name, w in layer.state_dict().items()}, assign=True)


def new_data(layer):
    layer.weight_hh_l0.data = torch.randn_like(layer.weight_hh_l0)


def new_data_again_and_again(layer):
    """Memory that is freed is handed out again, but not that of frozen weights."""
    for _ in range(50):
        new_data(layer)


def new_parameter(layer):
    layer.weight_hh_l0 = torch.nn.Parameter(torch.randn_like(layer.weight_hh_l0))


def there_and_back(layer):
    layer.bfloat16().float()


CHANGES = [
    in_place,
    on_a_view,
    optimiser_step,
    load_state_dict,
    load_by_assignment,
    new_data,
    new_data_again_and_again,
    new_parameter,
    there_and_back,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_torch_sees_ends_the_promise(layer, x, change):
    freeze(layer)
    before = run(layer, x)
    change(layer)
    got = run(layer, x)
    assert_identical(got, run(copy.deepcopy(layer), x))
    assert not torch.equal(got[0], before[0])
    freeze(layer)
    copies = state()[0]
    assert_identical(run(layer, x), got)
    assert state()[0] == copies + len(layer.all_weights)
    thaw(layer)


def test_a_change_of_one_layer_is_no_change_of_others(x):
    layer = freeze(rnnfast.LSTM(I, H, num_layers=2))
    run(layer, x)
    in_place(layer)
    core.empty_pool()
    run(layer, x)
    assert core.pool_state()["packs"] == 1  # that of the first layer, by its fingerprint
    thaw(layer)


# How long it lasts


def test_copies_go_with_the_promise(layer, x):
    freeze(layer)
    run(layer, x)
    packs, size = state()
    assert packs == len(layer.all_weights)
    matrices = sum(weight.nbytes for weights in layer.all_weights for weight in weights[:2])
    assert size >= matrices
    thaw(layer)
    assert state() == (0, 0)
    freeze(layer)
    assert state() == (0, 0)
    run(layer, x)
    assert state() == (packs, size)
    freeze(layer)
    assert state() == (0, 0)


def test_a_module_that_goes_takes_its_copies_along(x):
    layer = freeze(rnnfast.LSTM(I, H))
    run(layer, x)
    assert state()[0] == 1
    del layer
    gc.collect()
    assert state() == (0, 0)


def test_shared_weights_are_frozen_as_long_as_one_module_says_so(x):
    one, other = rnnfast.RNN(I, H), rnnfast.RNN(I, H)
    other.weight_ih_l0, other.weight_hh_l0 = one.weight_ih_l0, one.weight_hh_l0
    other.bias_ih_l0, other.bias_hh_l0 = one.bias_ih_l0, one.bias_hh_l0
    freeze(one), freeze(other)
    want = run(one, x)
    thaw(one)
    other.weight_hh_l0.data.zero_()
    now = run(other, x)  # packed under the other's name
    assert not torch.equal(now[0], want[0])
    other.weight_hh_l0.data.fill_(1)
    assert_identical(run(one, x), now)
    thaw(other)
    assert not torch.equal(run(one, x)[0], now[0])


def test_copies_and_pickles_are_not_frozen(layer, x):
    freeze(layer)
    want = run(layer, x)
    packs = state()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_identical(run(twin, x), want)
        for weights in twin.all_weights:
            weights[1].data.mul_(0.5)
        assert not torch.equal(run(twin, x)[0], want[0])
        assert state() == packs
    assert layer.state_dict().keys() == copy.deepcopy(layer).state_dict().keys()
    thaw(layer)


def test_calls_at_the_same_time_read_one_copy():
    layer, x = rnnfast.LSTM(I, 200), torch.randn(3, 1, I)
    want = run(layer, x.repeat(3, 1, 1))[0][:3]
    freeze(layer)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: run(layer, x)[0], range(400)):
            assert torch.equal(got, want)
    assert state()[0] == 1
    thaw(layer)


def test_thawed_while_calls_are_running():
    layer, x = rnnfast.LSTM(I, 200), torch.randn(9, 1, I)
    want = run(layer, x)[0]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda _: run(layer, x)[0], range(400))
        for _ in range(100):
            thaw(freeze(layer))
        for got in results:
            assert torch.equal(got, want)


# Models, and what cannot be frozen


def test_all_modules_of_a_model(x):
    model = torch.nn.ModuleDict({"encoder": rnnfast.LSTM(I, H), "cell": rnnfast.RNNCell(I, H)})
    model["other"] = torch.nn.LSTM(I, H)
    assert freeze(model) is model
    run(model["encoder"], x), run(model["cell"], x[0])
    assert state()[0] == 2
    assert thaw(model) is model


def test_weights_computed_at_every_call_are_refused():
    model = torch.nn.Sequential(rnnfast.RNN(I, H), rnnfast.RNN(H, H))
    parametrizations.weight_norm(model[1], "weight_hh_l0")
    with pytest.raises(ValueError, match=r"weight_hh_l0 of .*RNN.* is not a parameter"):
        freeze(model)
    run(model[0], torch.randn(1, 1, I))
    assert state() == (0, 0)


def test_weights_with_gaps_are_refused():
    layer = rnnfast.RNN(H, H)
    layer.weight_ih_l0 = torch.nn.Parameter(torch.randn(H, H).t())
    with pytest.raises(ValueError, match=r"weight_ih_l0 of RNN has strides \(1, 48\)"):
        freeze(layer)


def test_other_devices_are_left_alone():
    layer = freeze(rnnfast.LSTM(I, H, device="meta"))
    assert state() == (0, 0)
    assert "kept for the next call" in str(
        rnnfast.explain(layer, torch.empty(7, 2, I, device="meta"))
    )


def test_float16_is_converted_at_every_call(x):
    layer = rnnfast.LSTM(I, H).half()
    want = run(layer, x.half())
    freeze(layer)
    assert_identical(run(layer, x.half()), want)
    assert state() == (0, 0)
    thaw(layer)


def test_tensors_of_inference_mode(x):
    """They have no version counter; the promise is all there is."""
    with torch.inference_mode():
        layer = freeze(rnnfast.LSTM(I, H))
        want = flat(layer(x))
        assert_identical(flat(layer(x)), want)
    assert state()[0] == 1
    thaw(layer)


def test_explain_says_so():
    layer, x = rnnfast.LSTM(I, H), torch.randn(1, 1, I)
    (plan,) = rnnfast.explain(layer, x)
    assert not plan.packed
    assert "read where they lie" in str(plan)
    (plan,) = rnnfast.explain(freeze(layer), x)
    assert plan.packed
    assert "frozen, and packed once for all calls" in str(plan)
    in_place(layer)
    (plan,) = rnnfast.explain(layer, x)
    assert not plan.frozen
    assert not plan.packed
    freeze(layer)
    parametrizations.weight_norm(layer, "weight_hh_l0")
    assert not rnnfast.explain(layer, x)[0].frozen
    thaw(layer)
