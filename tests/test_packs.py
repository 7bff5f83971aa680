"""Packed weights kept from call to call: reused while weights stay as they are, and never after.

Every way weights can change is tried on a layer whose pack is kept, and what it gives then is
compared, bit for bit, with what it gives when nothing is kept.
"""

from __future__ import annotations

import copy
import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rnnfast
import torch
from one_layer import Case, by_operator
from rnnfast import _native, ops

core = _native.core
T, B, I, H = 7, 2, 40, 48  # enough uses of the weights to pack them


@pytest.fixture(autouse=True)
def empty_pool():
    """Every test begins and ends with nothing kept."""
    core.empty_pool()
    yield
    core.empty_pool()


def counts():
    """Calls so far that reused what was kept, and that packed."""
    state = core.pool_state()
    return state["reused"], state["packed"]


@torch.no_grad()
def run(layer, x):
    y, state = layer(x)
    return [y, *(state if isinstance(state, tuple) else (state,))]


def run_with_nothing_kept(layer, x):
    core.empty_pool()
    return run(layer, x)


def assert_identical(got, want):
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


def warm(layer, x):
    """Call until the last call reused what was kept."""
    for _ in range(3):
        reused, _ = counts()
        got = run(layer, x)
    assert counts()[0] > reused
    return got


def modules(**options):
    return {
        "lstm": rnnfast.LSTM(I, H, **options),
        "rnn": rnnfast.RNN(I, H, **options),
        "relu": rnnfast.RNN(I, H, nonlinearity="relu", **options),
        "stack": rnnfast.LSTM(I, H, num_layers=2, bidirectional=True, **options),
    }


@pytest.fixture(params=modules())
def layer(request):
    return modules()[request.param]


@pytest.fixture
def x():
    return torch.randn(T, B, I)


# What is reused


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_kept_pack_changes_no_bit(layer, x, dtype, isa, threads):
    layer, x = layer.to(dtype), x.to(dtype)
    want = run_with_nothing_kept(layer, x)
    for _ in range(3):
        assert_identical(run(layer, x), want)
    reused, packed = counts()
    run(layer, x)
    assert counts() == (reused + len(layer.all_weights), packed)


def test_weights_used_a_few_times_are_not_packed(layer):
    before = counts()
    run(layer, torch.randn(1, 1, I))
    assert counts() == before
    assert core.pool_state()["packs"] == 0


def test_threads_share_the_fingerprint():
    layer = rnnfast.LSTM(130, 200)  # several slabs
    x = torch.randn(20, 40, 130)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5, 1):
            torch.set_num_threads(count)
            run(layer, x)
    finally:
        torch.set_num_threads(threads)
    assert core.pool_state()["packs"] == 1
    reused, packed = counts()
    run(layer, x)
    assert counts() == (reused + 1, packed)


def test_dense_columns_are_packs_of_their_own():
    """One thread projects them without gaps between gates, two threads share them by gates."""
    width = core.plan_forward_float32(4, 1, 1, 1, 1, 1)["vector_width"]
    T, I, H = 10, 1000, 120 // width * width + 1
    if core.cache_bytes()[1] < 512 << 10:
        pytest.skip("so small an L2 cache has no room for the sums")
    plans = [core.plan_forward_float32(4, T, 1, I, H, count) for count in (1, 2)]
    assert [plan["dense"] for plan in plans] == [True, False]
    layer, x = rnnfast.LSTM(I, H), torch.randn(T, 1, I)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 1, 2, 1, 2):
            torch.set_num_threads(count)
            results.append(run(layer, x))
    finally:
        torch.set_num_threads(threads)
    for got in results[1:]:
        assert_identical(got, results[0])
    assert core.pool_state()["packs"] == 2


def test_calls_that_record_gradients_reuse_too(x):
    layer = rnnfast.LSTM(I, H)
    warm(layer, x)
    reused, packed = counts()
    layer(x)[0].sum().backward()
    assert counts() == (reused + 1, packed)


# How weights change


def in_place(layer):
    with torch.no_grad():
        layer.weight_hh_l0.add_(0.01)


def through_data(layer):
    layer.weight_ih_l0.data.mul_(1.5)


def through_shared_memory(layer):
    layer.weight_hh_l0.detach().numpy()[3, 5] += 1


def new_data(layer):
    layer.weight_hh_l0.data = torch.randn_like(layer.weight_hh_l0)


def optimiser_step(layer):
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(torch.randn(T, B, I))[0].square().sum().backward()
    optimiser.step()


def load_state_dict(layer):
    layer.load_state_dict(
        copy.deepcopy(
            type(layer)(I, H, layer.num_layers, bidirectional=layer.bidirectional)
        ).state_dict()
    )


def swapped_rows(layer):
    with torch.no_grad():
        layer.weight_hh_l0[[2, 9]] = layer.weight_hh_l0[[9, 2]]


def permuted(layer):
    with torch.no_grad():
        layer.weight_ih_l0.copy_(
            layer.weight_ih_l0.flatten()[torch.randperm(layer.weight_ih_l0.numel())].view(
                layer.weight_ih_l0.shape
            )
        )


def swapped_neighbours(layer):
    with torch.no_grad():
        layer.weight_hh_l0[0, [0, 1]] = layer.weight_hh_l0[0, [1, 0]]


def sums_kept(layer):
    """The same sum of bytes, and of numbers read as integers."""
    bits = layer.weight_hh_l0.detach().numpy().view(np.int32)
    bits[1, 1] += 1 << 20
    bits[2, 1] -= 1 << 20


CHANGES = [
    in_place,
    through_data,
    through_shared_memory,
    new_data,
    optimiser_step,
    load_state_dict,
    swapped_rows,
    permuted,
    swapped_neighbours,
    sums_kept,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_changed_weights_are_packed_anew(layer, x, change):
    before = warm(layer, x)
    change(layer)
    got = run(layer, x)
    assert_identical(got, run_with_nothing_kept(layer, x))
    assert not all(torch.equal(a, b) for a, b in zip(got, before, strict=True))


def test_other_bytes_are_other_weights(x):
    layer = rnnfast.LSTM(I, H)
    with torch.no_grad():
        layer.weight_hh_l0.zero_()
    warm(layer, x)
    with torch.no_grad():
        layer.weight_hh_l0.neg_()
    reused, packed = counts()
    run(layer, x)
    assert counts() == (reused, packed + 1)


def test_every_single_bit_counts(x):
    layer = rnnfast.RNN(I, H)
    generator = np.random.default_rng(0)
    for _ in range(60):
        for weight in (layer.weight_ih_l0, layer.weight_hh_l0):
            warm(layer, x)
            bits = weight.detach().numpy().view(np.int32).reshape(-1)
            # The lower bits of the mantissa need not show in the result: count instead.
            bits[generator.integers(bits.size)] ^= np.int32(1) << generator.integers(23)
            reused, packed = counts()
            got = run(layer, x)
            assert counts() == (reused, packed + 1)
            assert_identical(got, run_with_nothing_kept(layer, x))


def test_a_copy_and_its_original_are_apart(layer, x):
    warm(layer, x)
    twin = copy.deepcopy(layer)
    want = warm(twin, x)
    in_place(twin)
    assert_identical(run(twin, x), run_with_nothing_kept(twin, x))
    assert_identical(run(layer, x), want)


def test_replaced_parameters_count(layer, x):
    warm(layer, x)
    layer.weight_hh_l0 = torch.nn.Parameter(torch.randn_like(layer.weight_hh_l0))
    assert_identical(run(layer, x), run_with_nothing_kept(layer, x))


def test_a_cast_there_and_back(layer, x):
    warm(layer, x)
    layer.double()
    run(layer, x.double())
    through_data(layer)
    layer.float()
    assert_identical(run(layer, x), run_with_nothing_kept(layer, x))


def test_other_weights_at_the_same_address(x):
    """Freed and allocated again: the allocator hands the same memory out."""
    h0 = torch.zeros(B, H)
    w_ih = torch.randn(H, I)
    seen = set()
    again = 0
    for _ in range(40):
        w_hh = torch.randn(H, H) / 8
        again += w_hh.data_ptr() in seen
        seen.add(w_hh.data_ptr())
        args = (w_ih, w_hh, None, None, "tanh", False, 0, 0)
        got = [ops.rnn_layer(x, h0, *args)[0] for _ in range(2)]
        want = ops.rnn_layer(x, h0, w_ih.clone(), w_hh.clone(), *args[2:])[0]
        assert torch.equal(got[0], want)
        assert torch.equal(got[1], want)
        del w_hh, args
    assert again > 10


def test_other_weights_in_the_same_buffer(x):
    """The same address for certain, and other sizes too."""
    buffer = torch.zeros(4 * H * H)
    h0 = torch.zeros(B, H)
    for trial, gates in itertools.product(range(3), (1, 4)):
        w_hh = buffer[: gates * H * H].view(gates * H, H).normal_(std=0.2)
        w_ih = torch.randn(gates * H, I)
        for _ in range(2):
            if gates == 4:
                layer, before, after = ops.lstm_layer, (x, h0, h0, w_ih), (False, 0, 0, "nothing")
            else:
                layer, before, after = ops.rnn_layer, (x, h0, w_ih), ("tanh", False, 0, 0)
            got, want = (layer(*before, w, None, None, *after)[0] for w in (w_hh, w_hh.clone()))
            assert torch.equal(got, want), trial


# Training


def test_weights_that_change_every_call_are_left_alone(x):
    layer = rnnfast.RNN(I, H)
    for step in range(200):
        through_data(layer) if step % 2 else in_place(layer)
        got = run(layer, x)
        with torch.no_grad():
            want, _ = ops.rnn_layer(
                x, torch.zeros(B, H), *(w.clone() for w in layer.weights()), "tanh", False, 0, 0
            )
        assert torch.equal(got[0], want), step
        layer.weight_ih_l0.data.clamp_(-1, 1)
        layer.weight_hh_l0.data.clamp_(-1, 1)
    # And found again when they stay.
    for _ in range(64):
        run(layer, x)
    warm(layer, x)


def test_resting_packs_hold_no_memory(x):
    layer = rnnfast.LSTM(I, H)
    held = []
    for _ in range(100):
        in_place(layer)
        run(layer, x)
        held.append(core.pool_state()["bytes"])
    assert held.count(0) > 90


# Several threads


def test_threads_that_use_one_module(isa):
    layer = rnnfast.LSTM(64, 96, num_layers=2)
    inputs = [torch.randn(12, 3, 64) for _ in range(4)]
    want = [run(copy.deepcopy(layer), x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for change in (None, through_data, in_place):
            if change:
                change(layer)
                want = [run(copy.deepcopy(layer), x) for x in inputs]
            jobs = [
                (n, pool.submit(run, layer, x)) for _ in range(15) for n, x in enumerate(inputs)
            ]
            for n, job in jobs:
                assert_identical(job.result(timeout=60), want[n])


def test_calls_while_another_thread_writes_leave_nothing_wrong(x):
    """What such calls give is nobody's business; what they keep must be right."""
    layer = rnnfast.LSTM(I, 256)
    first, second = (torch.randn_like(layer.weight_hh_l0) / 16 for _ in range(2))
    weight = layer.weight_hh_l0.data

    def write():
        for _ in range(200):
            weight.copy_(second)
            weight.copy_(first)

    with ThreadPoolExecutor(3) as pool:
        writer = pool.submit(write)
        while not writer.done():
            run(layer, x)
        writer.result()
    for value in (first, second):
        weight.copy_(value)
        for _ in range(3):
            got = run(layer, x)
        fresh = copy.deepcopy(layer)
        assert_identical(got, run(fresh, x))


def test_a_forked_child_computes(x):
    layer = rnnfast.LSTM(I, H)
    want = warm(layer, x)
    child = os.fork()
    if child == 0:
        ok = False
        try:
            ok = all(torch.equal(a, b) for a, b in zip(run(layer, x), want, strict=True))
        finally:
            os._exit(not ok)
    assert os.waitpid(child, 0)[1] == 0


# Memory


def test_what_is_kept_is_bounded():
    most = core.pool_state()["most_bytes"]
    units = 2048
    layers = 0
    x, h0 = torch.zeros(9, 1, units), torch.zeros(1, units)
    weights = torch.zeros(most // (2 * units * units * 4) + 3, units, units)
    for w in weights:
        ops.rnn_layer(x, h0, w, w, None, None, "tanh", False, 0, 0)
        layers += 1
        state = core.pool_state()
        assert state["bytes"] <= most
        assert state["packs"] * 2 * units * units * 4 >= state["bytes"]
    assert state["packs"] == layers - 3
    core.empty_pool()
    assert core.pool_state()["bytes"] == 0


def test_how_many_are_kept_is_bounded():
    most = core.pool_state()["most_packs"]
    weights = torch.randn(most + 20, 4, 4)
    x, h0 = torch.randn(9, 1, 4), torch.zeros(1, 4)
    for w in weights:
        ops.rnn_layer(x, h0, w, w, None, None, "tanh", False, 0, 0)
    assert core.pool_state()["packs"] == most
    # The most recently used are those that stay.
    for w, kept in ((weights[-1], True), (weights[0], False)):
        reused, _ = counts()
        ops.rnn_layer(x, h0, w, w, None, None, "tanh", False, 0, 0)
        assert (counts()[0] > reused) == kept


# The hash


@pytest.fixture(params=[False, True], ids=["by the processor's instructions", "portable"])
def hash_of(request):
    return lambda array: core.hash_bytes(array.ctypes.data, array.nbytes, request.param)


@pytest.mark.parametrize("size", [0, 1, 2, 7, 8, 127, 128, 129, 1000])
def test_hash_sees_every_bit_and_every_length(size, hash_of):
    data = np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8)
    hashes = {hash_of(data)}
    for bit in range(8 * size):
        flipped = data.copy()
        flipped[bit // 8] ^= 1 << bit % 8
        hashes.add(hash_of(flipped))
    longer = np.zeros(size + 3, np.uint8)
    longer[:size] = data
    hashes |= {hash_of(longer[:n]) for n in range(size + 1, size + 4)}
    assert len(hashes) == 1 + 8 * size + 3


def test_hash_sees_order(hash_of):
    words = np.random.default_rng(0).integers(0, 2**63, 512, dtype=np.uint64)
    hashes = {hash_of(words)}
    for i, j in itertools.combinations(range(0, 512, 8), 2):
        swapped = words.copy()
        swapped[[i, j]] = swapped[[j, i]]
        hashes.add(hash_of(swapped))
    for shift in range(1, 512):
        hashes.add(hash_of(np.roll(words, shift)))
    assert len(hashes) == 1 + 64 * 63 // 2 + 511


@pytest.mark.parametrize("background", ["zeros", "weights"])
def test_hash_sees_a_few_signs(background, hash_of):
    """Few bits at the top of a word get lost in many hashes: what one changes, another undoes."""
    weights = torch.randn(4, 16, 2) if background == "weights" else torch.zeros(4, 16, 2)
    bits = weights.numpy().view(np.uint32)  # [:, 5] is what one lane takes, a word a step
    places = itertools.product(range(4), range(2), (0, 22, 23, 30, 31))
    flips = [(step, half, np.uint32(1) << np.uint32(bit)) for step, half, bit in places]
    hashes, tried = set(), 0
    for count in (0, 1, 2, 3, 4):
        for chosen in itertools.combinations(flips, count):
            for step, half, bit in chosen:
                bits[step, 5, half] ^= bit
            hashes.add(hash_of(bits))
            for step, half, bit in chosen:
                bits[step, 5, half] ^= bit
            tried += 1
    assert len(hashes) == tried


def test_hash_bits_are_even(hash_of):
    data = np.zeros(64, np.uint64)
    ones = np.zeros(64)
    for n in range(4096):
        data[n % 64] = n
        value = hash_of(data)
        ones += [(value >> bit) & 1 for bit in range(64)]
    assert np.abs(ones / 4096 - 0.5).max() < 0.05  # six standard deviations


@pytest.mark.parametrize("cell", ["lstm", "tanh", "relu"])
def test_gradients_with_kept_packs(cell):
    case = Case(cell, 9, 3, 20, 33)
    core.empty_pool()
    want = by_operator(case, torch.float32)
    for _ in range(3):
        got = by_operator(case, torch.float32)
        for name, value in want.items():
            assert torch.equal(got[name], value), name
