"""The planner, a pure function of sizes: how many threads share a recurrence, and by what."""

from __future__ import annotations

import itertools

import pytest
from rnnfast import _native

# AVX-512 float32 on a core with 32 KiB of L1 and 1 MiB of L2 cache.
ENGINE = {  # in the order of the arguments
    "vector_width": 16,
    "real_bytes": 4,
    "tile_rows": 6,
    "row_block": 128,
    "l1_bytes": 32 << 10,
    "l2_bytes": 1 << 20,
}


def plan(T, B, I, H, threads, gates=4, products_first=False, **engine):
    """The plan of a recurrence whose products are the projection of a forward pass."""
    machine = (ENGINE | engine).values()
    return _native.core.plan_recurrence(T, B, H, gates, H, I, *machine, threads, products_first)


@pytest.mark.parametrize("gates", [1, 4])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (1, 1, 16, 32), (10, 1, 8, 8), (1, 5, 10, 10)])
def test_small_problems_stay_on_the_calling_thread(sizes, gates):
    for threads in (1, 2, 4, 64):
        assert plan(*sizes, threads, gates)["threads"] == 1


@pytest.mark.parametrize("gates", [1, 4])
def test_threads_join_once_their_share_outweighs_waking_them(gates):
    """A single step: one thread up to some size, two from there on."""
    chosen = [plan(1, 1, H, H, 2, gates)["threads"] for H in range(16, 1024, 16)]
    assert chosen == sorted(chosen)
    assert set(chosen) == {1, 2}
    for H in range(16, 1024, 16):
        alone, shared = (plan(1, 1, H, H, threads, gates) for threads in (1, 256))
        assert shared["cycles"] <= alone["cycles"]


def test_few_sums_wait_for_each_other():
    """One row by a panel or less is bound by the FMA's latency: a second row hardly adds to it."""
    one, two = (plan(100, B, 1, 16, 1, gates=1)["cycles"] for B in (1, 2))
    assert one < two < 1.5 * one


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("gates", [1, 4])
def test_large_batches_are_shared_by_rows(gates, threads):
    chosen = plan(100, 256, 128, 128, threads, gates)
    assert (chosen["threads"], chosen["split"]) == (threads, "rows")


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("gates", [1, 4])
def test_one_row_of_many_units_is_shared_by_units(gates, threads):
    chosen = plan(100, 1, 1024, 2048, threads, gates)
    assert (chosen["threads"], chosen["split"]) == (threads, "units")


SIZES = list(itertools.product((1, 3, 100), (0, 1, 2, 7, 300), (1, 300), (1, 15, 16, 17, 700)))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_every_plan_keeps_to(sizes):
    T, B, I, H = sizes
    for gates, threads, first in itertools.product((1, 4), (1, 2, 3, 5, 64, 1000), (False, True)):
        chosen = plan(T, B, I, H, threads, gates, first)
        assert 1 <= chosen["threads"] <= threads
        if chosen["threads"] > 1:  # nobody is without work
            parts = {"rows": B, "units": -(-H // ENGINE["vector_width"]), "steps": T}
            assert chosen["threads"] <= parts[chosen["split"]]
        assert first or chosen["split"] != "steps"
        assert 0 <= chosen["own_share"] <= 1 / chosen["threads"]
        assert chosen == plan(T, B, I, H, threads, gates, first)
        assert 0 <= chosen["cycles"] < float("inf")
        assert chosen["pack"] == (T * B >= 9)
        assert 1 <= chosen["chunk"] <= T


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_more_threads_or_less_work_are_never_estimated_slower(sizes):
    def cycles(T, B, I, H, threads):
        return plan(T, B, I, H, threads)["cycles"]

    # Not from any number to any other: 4 threads may share what 3 can't.
    for fewer, more in ((1, 2), (2, 4), (4, 8), (8, 64)):
        assert cycles(*sizes, more) <= cycles(*sizes, fewer)
    for n in range(4):
        larger = [2 * size if n == m else size for m, size in enumerate(sizes)]
        for threads in (1, 4):
            assert cycles(*larger, threads) >= cycles(*sizes, threads)


def test_a_second_thread_is_taken_up_once_as_work_grows():
    for grows in range(4):
        counts = []
        for power in range(14):
            sizes = [4, 4, 16, 16]
            sizes[grows] = 2**power
            counts.append(plan(*sizes, 2)["threads"])
        assert counts == sorted(counts), f"size {grows}: {counts}"


def test_slices_that_fit_a_cache_are_worth_a_barrier():
    """Weights of 4 MiB: too much for the L2 cache of one core, not for four of them."""
    sizes = (100, 16, 512, 512)
    assert plan(*sizes, 4, l2_bytes=1 << 20)["split"] == "units"
    assert plan(*sizes, 4, l2_bytes=16 << 20)["split"] == "rows"


@pytest.mark.parametrize("number", ["float32", "float64", "bfloat16"])
def test_dense_columns_are_for_gates_that_leave_lanes(number, isa):
    def plan_forward(gates, T, B, I, H, threads=1):
        return getattr(_native.core, f"plan_forward_{number}")(gates, T, B, I, H, threads)

    width = plan_forward(4, 1, 1, 1, 1)["vector_width"]
    for I, more in itertools.product((1, 64, 1000), range(width + 1)):
        H = width + more
        chosen = plan_forward(4, 40, 9, I, H)
        saves = 4 * -(-H // width) > -(-4 * H // width)
        if I != 64:  # there it depends on how much is saved
            assert chosen["dense"] == (saves and I == 1000)
        assert saves or not chosen["dense"]
        assert not plan_forward(1, 40, 9, I, H)["dense"]
        assert not plan_forward(4, 2, 2, I, H)["dense"]  # nothing is packed
    assert plan_forward(4, 40, 9, 1000, width + 1)["dense"]
    assert not plan_forward(4, 40, 9, 10**6, 1000 * width + 1)["dense"]  # rows of 4 H sums
    for T, split in ((10, "units"), (5000, "steps")):
        H = 120 // width * width + 1
        assert plan_forward(4, T, 1, 1000, H)["dense"]
        shared = plan_forward(4, T, 1, 1000, H, threads=2)
        assert (shared["split"], shared["dense"]) == (split, split == "steps")


def test_one_thread_computes_a_recurrence_that_is_too_little_to_share():
    """One row and few units beside a large projection: an RNN as that of RNN 106,1,942,71."""
    for T, I, H, gates in ((106, 942, 71, 1), (300, 300, 50, 1), (106, 942, 71, 4)):
        chosen = plan(T, 1, I, H, 2, gates, products_first=True)
        assert (chosen["threads"], chosen["split"]) == (2, "steps")
        assert 0 < chosen["own_share"] < 0.5  # and helps with the rest
        assert plan(T, 1, I, H, 2, gates)["split"] != "steps"
    # Little to project: the others would have nothing to do.
    assert plan(300, 1, 8, 50, 2, 1, products_first=True)["threads"] == 1
    # Hardly more than the recurrence: that is all the first thread has time for.
    busy = plan(1000, 1, 64, 64, 2, 1, products_first=True)
    assert (busy["split"], busy["own_share"]) == ("steps", 0)
    # Much of both: units.
    assert plan(100, 1, 512, 512, 2, 4, products_first=True)["split"] == "units"


def test_a_chunk_of_shared_steps_has_rows_for_a_few_tiles_of_each_thread():
    for threads, chunk in ((2, 48), (3, 72)):
        chosen = plan(500, 1, 2000, 20, threads, 1, products_first=True)
        assert (chosen["threads"], chosen["split"], chosen["chunk"]) == (threads, "steps", chunk)


def test_a_chunk_is_a_block_of_rows_of_one_thread():
    for sizes, threads, chunk in (
        ((500, 1, 8, 8), 1, 128),
        ((500, 3, 8, 8), 1, 42),
        ((500, 200, 8, 8), 1, 1),
        ((20, 1, 8, 8), 1, 20),  # there are no more steps
        ((500, 40, 128, 128), 2, 6),  # 20 rows each
        ((500, 2, 1024, 1024), 2, 64),  # both rows, half of the units
    ):
        chosen = plan(*sizes, threads)
        assert chosen["threads"] == threads
        assert chosen["chunk"] == chunk, (sizes, chosen)
    assert plan(500, 1, 8, 8, 1, row_block=16)["chunk"] == 16
