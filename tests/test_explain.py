"""explain(): the plan it tells is the native one, and its floors can be worked out by hand."""

from __future__ import annotations

import sys

import pytest
import rnnfast
import torch
from rnnfast import _native, explain
from torch.nn.utils.rnn import PackedSequence, pack_sequence

core = _native.core
module = sys.modules["rnnfast.explain"]  # the name is the function's


@pytest.fixture(autouse=True)
def ceilings(monkeypatch):
    """Ceilings that are numbers of ours, and caches of known size: nothing is measured."""
    monkeypatch.setattr(module, "_peak", lambda dtype, threads, isa: 2e10 * threads)
    bandwidths = {"L1": 8e9, "L2": 4e9, "L3": 2e9, "memory": 1e9}
    monkeypatch.setattr(module, "_bandwidth", lambda level, threads: bandwidths[level] * threads)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "sizes", [(100, 1, 30, 512), (7, 40, 65, 130), (1, 1, 8, 8), (3, 2, 16, 1)]
)
def test_the_plan_is_the_native_one(sizes, dtype, isa, threads):
    T, B, I, H = sizes
    for layer, gates in ((rnnfast.LSTM(I, H), 4), (rnnfast.RNN(I, H), 1)):
        (plan,) = explain(layer.to(dtype), torch.empty(T, B, I, dtype=dtype))
        native = getattr(core, f"plan_forward_{_native.precision(dtype)}")(gates, *sizes, threads)
        assert sizes == (plan.T, plan.B, plan.I, plan.H)
        assert (plan.isa, plan.dtype) == (isa, dtype)
        for ours, theirs in (("threads",) * 2, ("split",) * 2, ("packed", "pack"), ("chunk",) * 2):
            assert getattr(plan, ours) == native[theirs]
        assert plan.tile == (native["tile_rows"], 4 * native["vector_width"])
        assert plan.packed == (T * B >= 9)
        assert plan.w_hh_bytes == layer.weight_hh_l0.nbytes


def test_the_native_plan_is_what_runs():
    """Packing shows from outside: calls that pack are counted."""
    for T in range(1, 9):
        layer = rnnfast.LSTM(8, 8)
        x = torch.zeros(T, 1, 8)
        before = core.pool_state()
        with torch.no_grad():
            layer(x)
        after = core.pool_state()
        calls = after["reused"] + after["packed"] - before["reused"] - before["packed"]
        assert calls == explain(layer, x)[0].packed


@pytest.mark.parametrize(
    ("cell", "sizes", "gates"),
    [(rnnfast.LSTM, (100, 1, 8, 512), 4), (rnnfast.RNN, (100, 64, 128, 256), 1)],
)
def test_floors(cell, sizes, gates, two_threads):
    T, B, I, H = sizes
    (plan,) = explain(cell(I, H), torch.empty(T, B, I))
    assert plan.threads == 2
    seconds = 2 * T * B * gates * H * (I + H) / 4e10
    assert plan.arithmetic_seconds == pytest.approx(seconds)
    part = 4 * gates * H * H // (2 if plan.split == "units" else 1)
    assert plan.w_hh_bytes_per_thread == part
    assert plan.reading_seconds == pytest.approx(T * 2 * part / plan.bandwidth)
    assert plan.floor_seconds == max(plan.arithmetic_seconds, plan.reading_seconds)
    assert plan.bound == (
        "reading" if plan.reading_seconds > plan.arithmetic_seconds else "arithmetic"
    )


def test_the_cache_that_weights_fit(monkeypatch):
    caches = [32 << 10, 1 << 20, 8 << 20]
    monkeypatch.setattr(core, "cache_bytes", lambda: caches)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for H, level in (
            (32, "L1"),
            (90, "L1"),
            (91, "L2"),
            (512, "L2"),
            (513, "L3"),
            (2000, "memory"),
        ):
            (plan,) = explain(rnnfast.RNN(1, H), torch.empty(9, 1, 1))
            assert plan.level == level, H
    finally:
        torch.set_num_threads(before)


def test_every_layer_and_direction():
    layer = rnnfast.LSTM(10, 20, num_layers=2, bidirectional=True, batch_first=True)
    plans = explain(layer, torch.empty(3, 7, 10))
    assert [p.name for p in plans] == ["layer 0", "layer 0 reverse", "layer 1", "layer 1 reverse"]
    assert [p.I for p in plans] == [10, 10, 40, 40]
    assert {(p.T, p.B, p.H) for p in plans} == {(7, 3, 20)}
    assert plans.floor_seconds == pytest.approx(sum(p.floor_seconds for p in plans))


def test_projected_layers(two_threads):
    module = rnnfast.LSTM(10, 200, 2, proj_size=30, bidirectional=True)
    plans = explain(module, torch.empty(7, 3, 10))
    assert [p.I for p in plans] == [10, 10, 60, 60]
    assert {(p.H, p.P, p.rows) for p in plans} == {(200, 30, 21)}
    read = module.weight_hh_l0.nbytes + module.weight_hr_l0.nbytes
    assert {p.w_hh_bytes for p in plans} == {read}
    sums = 2 * 21 * 200 * (4 * (10 + 30) + 30)
    assert plans[0].arithmetic_seconds == pytest.approx(sums / plans[0].peak)
    assert "H 200, P 30, float32" in str(plans)


def test_packed_sequences(two_threads):
    """The longest sequence, which outlives the others, is shared out by units, a batch by rows."""

    def plan_for(hidden, *lengths):
        x = pack_sequence([torch.empty(n, 64) for n in lengths])
        (plan,) = explain(rnnfast.LSTM(64, hidden), x)
        assert (plan.T, plan.B, plan.rows) == (max(lengths), len(lengths), sum(lengths))
        assert f"{sum(lengths)} packed rows" in str(plan)
        return plan

    assert plan_for(512, 100, 2, 1).split == "units"
    assert plan_for(96, *range(60, 20, -1)).split == "rows"
    module = rnnfast.LSTM(64, 5)
    for sizes, message in ((torch.tensor([2, 1], dtype=torch.int32), "int32"), ([2, 2], "3 rows")):
        x = PackedSequence(torch.empty(3, 64), torch.as_tensor(sizes))
        with pytest.raises(RuntimeError, match=message):
            explain(module, x)
    with pytest.raises(NotImplementedError, match="x is a PackedSequence"):
        explain(module, pack_sequence([torch.empty(2, 64)]), gpu={})


def test_unbatched_relu_and_half():
    (plan,) = explain(rnnfast.RNN(4, 5, nonlinearity="relu").half(), torch.empty(6, 4).half())
    assert (plan.T, plan.B, plan.cell, plan.dtype) == (6, 1, "relu", torch.float32)


def test_text(two_threads):
    text = str(explain(rnnfast.LSTM(512, 512, num_layers=2), torch.empty(100, 1, 512)))
    first = text.splitlines()[:4]
    assert first[0].startswith("layer 0: lstm, T 100, B 1, I 512, H 512, float32 on ")
    assert "2 threads share the hidden units; weights packed" in first[1]
    assert "W_hh 4 MiB, of which a thread reads 2 MiB a step" in first[2]
    for word in ("floor ", "bound by ", "GFLOP/s", "GB/s"):
        assert word in first[3]
    assert text.splitlines()[-1].startswith("floor of the forward pass: ")


@pytest.mark.parametrize(
    ("layer", "x", "error", "words"),
    [
        (torch.nn.LSTM(3, 4), torch.empty(5, 1, 3), TypeError, "module is LSTM"),
        (torch.nn.Linear(3, 4), torch.empty(5, 3), TypeError, "module is Linear"),
        (rnnfast.LSTM(3, 4), [1, 2], TypeError, "x is list"),
        (rnnfast.LSTM(3, 4), torch.empty(5, 1, 2), RuntimeError, "expected input_size 3"),
        (rnnfast.LSTM(3, 4), torch.empty(3), ValueError, "1 dimensions"),
        (rnnfast.LSTM(3, 4), torch.empty(0, 1, 3), RuntimeError, "0 time steps"),
        (
            rnnfast.LSTM(3, 4, proj_size=2, truncate=(2, 3)),
            torch.empty(5, 1, 3),
            NotImplementedError,
            "proj_size=2",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes(layer, x, error, words):
    with pytest.raises(error, match=words):
        explain(layer, x)


def test_ceilings_are_measured_once(monkeypatch):
    monkeypatch.undo()
    calls = []
    module._peak.cache_clear()
    module._bandwidth.cache_clear()
    monkeypatch.setattr(module, "fma_peak", lambda *args: calls.append(args) or 1e9)
    monkeypatch.setattr(module, "read_bandwidth", lambda *args: calls.append(args) or 1e9)
    try:
        for _ in range(3):
            explain(rnnfast.LSTM(4, 4, num_layers=2), torch.empty(5, 1, 4))
        assert len(calls) == 2 * module.READINGS
    finally:
        module._peak.cache_clear()
        module._bandwidth.cache_clear()


def test_steps_that_threads_project_for_one(two_threads):
    """RNN 106,1,942,71: one thread reads W_hh, at the bandwidth of one."""
    (plan,) = explain(rnnfast.RNN(942, 71), torch.empty(106, 1, 942))
    assert (plan.threads, plan.split, plan.readers) == (2, "steps", 1)
    assert plan.reading_seconds == pytest.approx(106 * plan.w_hh_bytes / plan.bandwidth)
    assert "2 threads share the projection, one computes the recurrence" in str(plan)
