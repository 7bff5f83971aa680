"""Threads: the same bits for every number of them, one pool, and no trouble with Python's own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import threadpoolctl
import torch
from one_layer import Case, by_operator, run_operator
from rnnfast import _native, ops

VECTOR_BYTES = {"baseline": 16, "avx2": 32, "avx512": 64, "avx512bf16": 64}
SHARED_BY = {  # (T, B, I, H) by what the planner shares between threads
    "nothing": (3, 2, 4, 5),
    "rows": (20, 40, 33, 96),
    "units": (20, 1, 150, 800),
    "steps": (400, 1, 900, 20),
    "rows, of few steps": (8, 16, 150, 200),  # going back, weights are read where they lie
}


def plans(case, dtype, threads):
    """The plans of forward and backward for the instruction set in use."""
    element = max(dtype.itemsize, 4)  # bfloat16 is multiplied in pairs
    terms = element // dtype.itemsize
    width = VECTOR_BYTES[_native.build_info()["isa"]] // element
    machine = (width, element, 6, 128, 48 << 10, 2 << 20)
    T, B, I, H, G = case.T, case.B, case.I, case.H, case.gates
    k1, k2 = case.truncate or (T, T)

    def plan(first, steps, rows, gates, *counts):
        counts = (-(-count // terms) for count in counts)
        sizes = (steps, rows, H, gates, *counts)
        return _native.core.plan_recurrence(*sizes, *machine, threads, first)

    forward = plan(True, T, B, G, H, I)
    backward = plan(False, k2, -(-T // k1) * B, 1, G * H, G * (2 * I + H))
    return forward, backward


@cache
def on_one_thread(case, dtype, isa):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return by_operator(case, dtype)
    finally:
        torch.set_num_threads(before)


def assert_identical(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert torch.equal(got[name], want[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
@pytest.mark.parametrize("truncate", [None, (3, 3), (3, 7)], ids=str)
@pytest.mark.parametrize("shared_by", SHARED_BY)
def test_every_number_of_threads_gives_the_same_bits(
    shared_by, truncate, cell, dtype, isa, threads
):
    case = Case(cell, *SHARED_BY[shared_by], truncate=truncate, reverse=cell == "tanh")
    want = on_one_thread(case, dtype, isa)
    for _ in range(2):
        assert_identical(by_operator(case, dtype), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "tanh"])
def test_the_planner_shares_what_this_file_supposes(cell, dtype, isa):
    for threads in (2, 5):
        for plan in plans(Case(cell, *SHARED_BY["nothing"]), dtype, threads):
            assert plan["threads"] == 1
        for split in ("rows", "units"):
            for plan in plans(Case(cell, *SHARED_BY[split]), dtype, threads):
                assert (plan["threads"], plan["split"]) == (threads, split)
        forward, _ = plans(Case(cell, *SHARED_BY["steps"]), dtype, threads)
        assert (forward["threads"] > 1, forward["split"]) == (True, "steps")


def test_keeping_nothing_changes_no_bit_either(threads):
    for sizes in SHARED_BY.values():
        case = Case("lstm", *sizes)
        want = on_one_thread(case, torch.float32, _native.build_info()["isa"])
        lean = run_operator(case, case.inputs(torch.float32), keep="nothing")
        assert torch.equal(lean["y"], want["y"])
        assert torch.equal(lean["c_n"], want["c_n"])


def test_several_python_threads_at_once():
    cases = [Case(cell, *sizes) for cell in ("lstm", "tanh") for sizes in SHARED_BY.values()]
    isa = _native.build_info()["isa"]
    want = {case: on_one_thread(case, torch.float32, isa) for case in cases}
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with ThreadPoolExecutor(4) as pool:
            jobs = [(case, pool.submit(by_operator, case, torch.float32)) for case in 4 * cases]
            for case, job in jobs:
                assert_identical(job.result(timeout=60), want[case])
    finally:
        torch.set_num_threads(before)


# The pool


def test_there_is_one_openmp_runtime_and_it_is_torchs():
    on_one_thread(Case("lstm", *SHARED_BY["nothing"]), torch.float32, None)
    (runtime,) = [
        Path(library["filepath"]).resolve()
        for library in threadpoolctl.threadpool_info()
        if library["user_api"] == "openmp"
    ]
    assert runtime == Path(_native.build_info()["openmp"]).resolve()
    if "lib" in {path.name for path in Path(torch.__file__).parent.iterdir()}:
        bundled = list((Path(torch.__file__).parent / "lib").glob("*omp*.so*"))
        assert not bundled or runtime in [path.resolve() for path in bundled]


@pytest.fixture(scope="module")
def own_process():
    """What tests/process_threads.py found out."""
    if not Path("/proc/self/task").exists():
        pytest.skip("counting threads needs /proc")
    script = Path(__file__).with_name("process_threads.py")
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_set_num_threads_governs(own_process):
    assert own_process["one"] == 0
    assert own_process["three"] == 2


@pytest.mark.parametrize("when", ["before the fork", "in a fork", "in a fork of a fork"])
def test_forks_compute(own_process, when):
    assert own_process[when]
    assert own_process["after the fork"]


def test_data_loader_workers_compute(own_process):
    assert own_process["in workers"] == [True] * 4


# Python's threads


def ticks_during(function):
    """How often another Python thread got its turn while the function ran."""
    began, ended = threading.Event(), threading.Event()

    def run():
        began.set()
        function()
        ended.set()

    thread = threading.Thread(target=run)
    thread.start()
    began.wait()
    ticks = 0
    while not ended.is_set():
        time.sleep(0.001)
        ticks += 1
    thread.join()
    return ticks


def test_other_python_threads_go_on():
    case = Case("lstm", 120, 64, 256, 256)
    inputs = case.inputs(torch.float32)
    states, weights = (inputs["h0"], inputs["c0"]), (inputs["w_ih"], inputs["w_hh"])
    y, _, _, c, gates = ops.lstm_layer(
        inputs["x"], *states, *weights, None, None, False, 0, 0, "all"
    )
    saved = (inputs["x"], *states, *weights, y, c, gates)

    def backward():
        torch.ops.rnnfast.lstm_layer_backward(y, None, None, None, *saved, False, 0, 0, *[True] * 4)

    # One or two are possible before the call and after it.
    assert ticks_during(lambda: run_operator(case, inputs)) >= 5
    assert ticks_during(backward) >= 5


@pytest.fixture
def flushing():
    """A function that sets whether this thread flushes denormals; undone at the end."""
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor can't flush denormals")
    yield torch.set_flush_denormal
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("shared_by", ["rows", "units", "steps"])
def test_workers_flush_denormals_where_the_caller_does(shared_by, flushing, threads):
    T, B, I, H = SHARED_BY[shared_by]
    x, h0 = torch.zeros(T, B, I), torch.zeros(B, H)
    x[:, :, 0] = 2**-100
    w_ih, w_hh = torch.full((H, I), 2**-30), torch.zeros(H, H)
    for flush in (True, False, True, False):
        flushing(flush)
        y, _ = ops.rnn_layer(x, h0, w_ih, w_hh, None, None, "relu", False, 0, 0)
        flushing(False)
        expected = 0 if flush else 2**-130
        assert (y == expected).all()
