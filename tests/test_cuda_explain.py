"""explain() for a GPU: it tells what the planner chose, for a GPU that need not be there."""

from __future__ import annotations

import pytest
import rnnfast
import torch
from emulated import DEVICE, bidirectional_operators, device, emulating, native
from rnnfast import _native, cuda_ops, explain
from rnnfast.ops import window

A100 = DEVICE | {
    "capability": 80,
    "multiprocessors": 108,
    "shared_bytes": 166912,
    "largest_cluster": 1,
}


@pytest.fixture(autouse=True)
def planner(monkeypatch):
    """The emulator's planner is the same source as that of a build with CUDA."""
    monkeypatch.setattr(_native, "cuda", native)


def check(told, chosen):
    """A CudaPlan against the planner's own words."""
    for name in ("method", "directions", "blocks", "groups", "columns", "shared_bytes", "cycles"):
        assert getattr(told, name) == chosen[name], name
    assert told.scratch_bytes == chosen["scratch_bytes"]
    assert told.number_format == chosen["format"]
    block_rows = chosen["bundles"] * chosen["row_tiles"] * chosen["tile_rows"]
    assert told.block_rows == block_rows
    weights = told.register_weight_bytes + told.shared_weight_bytes + told.streamed_weight_bytes
    assert told.blocks * weights == chosen["weights_bytes"]


@pytest.mark.parametrize("gpu", [DEVICE, A100], ids=["H200", "A100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("truncate", [None, 10, (10, 25)], ids=str)
def test_the_plan_is_the_native_one(truncate, dtype, gpu):
    T, B, I, H = 40, 3, 30, 200
    module = rnnfast.LSTM(I, H, truncate=truncate).to(dtype)
    forward, backward = explain(module, torch.empty(T, B, I, dtype=dtype), gpu=gpu)
    # Overlapping windows of the 16-bit dtypes are computed in float32.
    computed = torch.float32 if isinstance(truncate, tuple) and dtype == torch.float16 else dtype
    number = str(computed).removeprefix("torch.")
    k1, k2 = window(T, *(truncate if isinstance(truncate, tuple) else (truncate or 0,) * 2))
    for told, windows in ((forward, (T, T)), (backward, (k1, k2))):
        work = (device(**gpu), told.which == "backward", "lstm", number, T, B, H, *windows)
        check(told, native.plan(*work).as_dict())
        assert (told.name, told.cell, told.dtype) == ("layer 0", "lstm", computed)
        assert (told.T, told.B, told.I, told.H) == (T, B, I, H)
    assert (forward.which, backward.which) == ("forward", "backward")


def test_what_is_told_is_what_runs():
    """Launches show from outside: the emulator counts them."""
    for bidirectional, properties in (
        (False, {"multiprocessors": 8}),
        (True, {"multiprocessors": 8}),
        (True, {"multiprocessors": 2, "shared_bytes": 16384, "largest_cluster": 1}),
        (False, {"multiprocessors": 1, "shared_bytes": 8192, "cooperative": False}),
    ):
        module = rnnfast.RNN(2, 100, bidirectional=bidirectional).half()
        x = torch.zeros(3, 9, 2, dtype=torch.float16)
        told = explain(module, x, gpu=DEVICE | properties)
        weights = [w.detach() for w in module.weights()]
        h0 = torch.zeros(9, 100, dtype=torch.float16)
        native.take_launches()
        with emulating(**properties):
            if bidirectional:
                with bidirectional_operators():
                    torch.ops.rnnfast.bidirectional_rnn_layer(
                        x, h0, *weights[:4], h0, *weights[4:], "tanh", 0, 0
                    )
            else:
                cuda_ops.Layers(native).rnn_layer(x, h0, *weights, "tanh", False, 0, 0)
        ran = [(what, n) for what, n in native.take_launches().items() if "packing" not in what]
        forward = [plan for plan in told if plan.which == "forward"]
        ((what, launches),) = ran
        assert f"({forward[0].method})" in what
        assert launches == sum(plan.launches for plan in forward)


def test_every_layer_and_direction():
    module = rnnfast.LSTM(10, 20, num_layers=2, bidirectional=True, batch_first=True)
    plans = explain(module, torch.empty(3, 7, 10), gpu=DEVICE)
    names = [f"layer {n}, both directions" for n in range(2)]
    assert [(p.name, p.which) for p in plans] == [
        (name, which) for which in ("forward", "backward") for name in names
    ]
    assert [p.I for p in plans] == [10, 40] * 2
    assert {(p.T, p.B, p.H, p.directions) for p in plans} == {(7, 3, 20, 2)}

    # Weights of one direction stay on the chip, those of two don't: they are launched one by one.
    module = rnnfast.LSTM(10, 2000, bidirectional=True, dtype=torch.bfloat16)
    plans = explain(module, torch.empty(100, 1, 10, dtype=torch.bfloat16), gpu=DEVICE)
    names = ["layer 0", "layer 0 reverse"]
    assert [p.name for p in plans if p.which == "forward"] == names
    assert {p.directions for p in plans if p.which == "forward"} == {1}


def test_tf32_where_torch_allows_it():
    module, x = rnnfast.LSTM(8, 64), torch.empty(5, 2, 8)
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        plan = explain(module, x, gpu=DEVICE)[0]
        old = explain(module, x, gpu=A100 | {"capability": 75})[0]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert (plan.number_format, old.number_format) == ("tf32", "float32")
    assert "float32 as TF32" in str(plan)
    assert explain(module, x, gpu=DEVICE)[0].number_format == "float32"


def test_of_the_gpu_that_x_is_on(monkeypatch):
    """Properties come from the device of x."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    asked = []

    class Native:
        plan = staticmethod(native.plan)

        @staticmethod
        def device_properties(index):
            asked.append(index)
            return device(multiprocessors=16)

    monkeypatch.setattr(_native, "cuda", Native)
    module = rnnfast.LSTM(3, 700, device="meta")
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(5, 2, 3, device="cuda:1")
        monkeypatch.setattr(
            type(module), "weights", lambda self: [torch.empty(2800, 3, device="cuda:1")]
        )
        told = explain(module, x)[0]
    assert asked == [1]
    work = (device(multiprocessors=16), False, "lstm", "float32", 5, 2, 700, 5, 5)
    check(told, native.plan(*work).as_dict())


def test_text():
    module = rnnfast.LSTM(512, 768, bidirectional=True).bfloat16()
    x = torch.empty(1024, 16, 512, dtype=torch.bfloat16)
    plan = explain(module, x, gpu=DEVICE)[0]
    first = str(plan).splitlines()
    assert first[0] == (
        "layer 0, both directions, forward: lstm, T 1024, B 16, I 512, H 768, bfloat16"
    )
    groups = f"2 directions of {plan.groups} group of {plan.blocks} blocks"
    rows = f"a block has {plan.block_rows} rows"
    assert first[1].startswith(f"  resident, 1 launch; {groups}; {rows}")
    assert "0 B from L2 every step" in first[3]
    slow = str(explain(module, x, gpu=DEVICE | {"cooperative": False, "largest_cluster": 1})[0])
    assert "steps, 1024 launches, as " in slow
    assert str(explain(module, x, gpu=DEVICE)).count("layer 0, both directions") == 2


def test_mistakes(monkeypatch):
    module, x = rnnfast.LSTM(3, 4), torch.empty(5, 1, 3)
    with pytest.raises(ValueError, match=r"gpu has \['capability'\], but should have \['cap.*'coo"):
        explain(module, x, gpu={"capability": 90})
    with pytest.raises(ValueError, match=r"need compute capability 7\.5, the device has 6\.0"):
        explain(module, x, gpu=DEVICE | {"capability": 60})
    stack = rnnfast.LSTM(3, 4, num_layers=2, truncate=(2, 3))
    with pytest.raises(NotImplementedError, match=r"truncate=\(2, 3\)"):
        explain(stack, x, gpu=DEVICE)
    assert explain(stack, x[:2], gpu=DEVICE)[0].T == 2  # where nothing is cut
    monkeypatch.setattr(_native, "cuda", None)
    monkeypatch.setattr(_native, "cuda_missing", "no module")
    with pytest.raises(RuntimeError, match=r"built without CUDA kernels \(no module\)"):
        explain(module, x, gpu=DEVICE)
