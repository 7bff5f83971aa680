"""The planner of the CUDA kernels, a pure function of device and sizes."""

from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path

import pytest
from emulated import DEVICE, device, native

ROOT = Path(__file__).parents[1]

METHODS = ("local", "cluster", "grid", "resident", "resident_cluster", "steps", "gemm")
FORMATS = ("float32", "tf32", "float64", "float16", "bfloat16")
SIZES = list(itertools.product((1, 100), (1, 3, 16, 300), (1, 17, 64, 128, 700, 1024, 4096)))


def plan(T, B, H, *, backward=False, cell="lstm", number="bfloat16", method="", k=None, **options):
    directions = options.pop("directions", 1)
    sizes = (T, B, H, *(k or (T, T)), directions, method)
    return native.plan(device(**options), backward, cell, number, *sizes).as_dict()


def check(chosen, T, B, H, backward, cell, directions, properties):
    """What every plan keeps to, whatever the device."""
    assert 0 < chosen["cycles"] < float("inf")
    if chosen["method"] == "gemm":
        assert chosen["blocks"] == -(-B * H // 256)
        return
    gates = 4 if cell == "lstm" else 1
    rows, terms = (H, gates * H) if backward else (gates * H, H)
    block_rows = chosen["block_rows"]
    assert chosen["blocks"] * block_rows >= rows > (chosen["blocks"] - 1) * block_rows
    assert chosen["groups"] * chosen["group_columns"] >= chosen["columns"]
    assert (chosen["groups"] - 1) * chosen["group_columns"] < chosen["columns"]
    parts = [chosen[f"{place}_weight_bytes"] for place in ("register", "shared", "streamed")]
    assert min(parts) >= 0
    assert chosen["blocks"] * sum(parts) == chosen["weights_bytes"]
    assert parts[1] <= chosen["shared_bytes"]
    assert chosen["register_steps"] <= chosen["k_steps"]
    assert chosen["shared_bytes"] <= properties["shared_bytes"]
    if chosen["method"] == "local":
        assert chosen["blocks"] == 1
        assert parts[1:] == [0, 0]
        return
    assert chosen["k_steps"] * 8 * chosen["tile_terms"] >= terms
    if chosen["method"] == "cluster":
        assert 1 <= chosen["blocks"] <= properties["largest_cluster"]
    if chosen["method"] in ("grid", "resident"):
        assert properties["cooperative"]
        resident = chosen["blocks"] * chosen["groups"] * directions
        assert resident <= properties["multiprocessors"]
    if chosen["method"] == "resident":
        assert parts[1:] == [0, 0]
        assert chosen["pass_columns"] == chosen["group_columns"]
    if chosen["method"] == "steps":
        assert chosen["shared_tiles"] == 0


DEVICES = {
    "H200": {},
    "A100": {
        "capability": 80,
        "multiprocessors": 108,
        "shared_bytes": 166912,
        "largest_cluster": 1,
    },
    "T4": {"capability": 75, "multiprocessors": 40, "shared_bytes": 65536, "largest_cluster": 1},
    "slice": {"multiprocessors": 16},
    "tiny": {"multiprocessors": 1, "shared_bytes": 49152, "largest_cluster": 1},
    "not cooperative": {"cooperative": False},
}


@pytest.mark.parametrize("properties", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("number", FORMATS)
def test_what_every_plan_keeps_to(number, properties):
    described = device(**properties)
    properties = {name: getattr(described, name) for name in DEVICE}
    if number == "tf32" and properties["capability"] < 80:
        with pytest.raises(ValueError, match=r"TF32 needs compute capability 8\.0.* has 7\.5"):
            plan(1, 1, 1, number=number, **properties)
        return
    for (T, B, H), backward, cell in itertools.product(SIZES, (False, True), ("lstm", "tanh")):
        chosen = plan(T, B, H, backward=backward, cell=cell, number=number, **properties)
        check(chosen, T, B, H, backward, cell, 1, properties)
        assert chosen["tensor_cores"] == (
            properties["capability"] >= 80 and number not in ("float32", "float64")
        )


@pytest.mark.parametrize("method", METHODS)
def test_a_method_can_be_forced(method):
    assert plan(10, 8, 64, method=method, number="tf32")["method"] == method


@pytest.mark.parametrize("number", FORMATS)
def test_products_by_a_library_are_for_whole_sequences(number):
    assert plan(10, 8, 64, method="gemm", number=number, backward=True)["method"] == "gemm"
    with pytest.raises(ValueError, match="the method gemm cannot run"):
        plan(10, 8, 64, method="gemm", number=number, k=(2, 2), backward=True)


def test_large_layers_with_large_batches_leave_the_product_to_a_library():
    for number in FORMATS:
        assert plan(128, 256, 2048, number=number)["method"] == "gemm"
    for number in ("tf32", "bfloat16"):
        assert plan(128, 16, 512, number=number)["method"] == "resident"


def test_choices_are_near_the_best_that_was_timed():
    """On an H200, in docs/cuda_plans.json: little is lost."""
    rows = json.loads((ROOT / "docs" / "cuda_plans.json").read_text())["rows"]
    timed = {}
    for *problem, method, blocks, columns, us in rows:
        timed.setdefault(tuple(problem), {})[method, blocks, columns] = us
    ratios = []
    for (number, cell, which, H, B), times in timed.items():
        backward = which == "backward"
        estimates = {}
        for method in {method for method, *_ in times}:
            sizes = (160, B, H, 160, 160, 1, method)
            for found in native.plans(device(), backward, cell, number, *sizes):
                about = found.as_dict()
                key = method, about["blocks"], about["group_columns"]
                if key in times:
                    estimates[key] = about["cycles"]
        assert estimates.keys() == times.keys()
        ratios.append(times[min(estimates, key=estimates.get)] / min(times.values()))
    assert len(ratios) > 100
    assert statistics.fmean(ratios) < 1.02
    assert statistics.quantiles(ratios, n=10)[-1] < 1.05
    assert max(ratios) < 1.6  # a layer of B 256 for which two methods are near each other


def test_weights_stay_on_the_chip():
    for H, method in ((64, "local"), (768, "resident"), (1200, "grid")):
        chosen = plan(1024, 16, H)
        assert chosen["method"] == method
        assert chosen["streamed_weight_bytes"] == 0


def test_what_could_not_be_resident_falls_back_to_launches_for_every_step():
    with pytest.raises(ValueError, match="the method grid cannot run"):
        plan(10, 16, 768, method="grid", cooperative=False)
    # This size fits no block's shared memory: only a grid or launches for every step can do it,
    # and truncated windows are not for torch's products.
    sizes = {"shared_bytes": 65536, "largest_cluster": 1, "cooperative": False}
    for k, method in ((None, "gemm"), ((5, 5), "steps")):
        chosen = plan(10, 64, 2048, backward=True, k=k, **sizes)
        assert chosen["method"] == method
        assert "resident" in chosen["reason"]


def test_overlapping_windows_stay_in_one_group():
    for k in ((4, 8), (3, 5)):
        chosen = plan(64, 16, 256, backward=True, k=k)
        assert chosen["groups"] == 1
        assert chosen["columns"] == -(-64 // k[0]) * 16
    assert plan(64, 16, 256, backward=True, k=(4, 4))["columns"] == 16 * 16


def test_two_directions_share_the_device():
    one = plan(100, 32, 512, method="grid")
    two = plan(100, 32, 512, method="grid", directions=2)
    assert 2 * two["blocks"] * two["groups"] <= 132 >= one["blocks"] * one["groups"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capability": 70}, "compute capability 7.5, the device has 7.0"),
        ({"number": "int8"}, "unknown number format int8"),
        ({"cell": "gru"}, "unknown cell gru"),
        ({"method": "best"}, "method is 'best', but should be local, cluster, grid, resident"),
        ({"directions": 3}, "one or two directions"),
        ({"k": (3, 2)}, "truncation must satisfy"),
    ],
)
def test_mistakes(change, message):
    with pytest.raises(ValueError, match=message):
        plan(10, 3, 4, **change)


def test_more_than_a_kernel_counts():
    with pytest.raises(ValueError, match="more than a CUDA kernel counts"):
        plan(2**30, 1, 4)
