"""Timing of several candidates in one process without billing one for the habits of another.

Alternating single calls would be wrong here: the thread pool of one library keeps spinning for some
milliseconds after its call returns (ONNX Runtime's for about fifty) and takes the cores from the
next one. So each candidate runs in blocks; before each block there are pauses until this process
uses no processor time any more, and then one untimed call, which wakes the candidate's own threads
and fills the caches with its data. The order of the blocks is shuffled anew in every round, so
that no candidate always has the same one before it.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

Call = Callable[[], object]

BLOCK_SECONDS = 0.020
PAUSE_SECONDS = 0.015
ROUNDS = 9

# Threads of this process that used less than this share of one core in a pause are asleep.
RESTING_SHARE = 0.1
LONGEST_REST_SECONDS = 2.0


class RestlessError(Exception):
    """Threads of this process keep spinning, so no candidate has the machine to itself."""


@dataclass(frozen=True)
class Timing:
    """What one candidate took.

    Attributes:
        calls_per_block: calls in each timed block.
        block_seconds: duration of every block in seconds, in the order of the rounds.
    """

    calls_per_block: int
    block_seconds: tuple[float, ...]

    @property
    def call_seconds(self) -> tuple[float, ...]:
        """Seconds per call, one value for each round."""
        return tuple(seconds / self.calls_per_block for seconds in self.block_seconds)

    @property
    def median(self) -> float:
        """Seconds per call in the median round."""
        return statistics.median(self.call_seconds)

    @property
    def spread(self) -> float:
        """Distance between the quartiles of the rounds as a fraction of the median."""
        if len(self.block_seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.call_seconds, n=4, method="inclusive")
        return (high - low) / self.median


def time_candidates(
    candidates: Mapping[str, Call],
    *,
    rounds: int = ROUNDS,
    block_seconds: float = BLOCK_SECONDS,
    pause_seconds: float = PAUSE_SECONDS,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
    cpu_clock: Callable[[], float] = time.process_time,
) -> dict[str, Timing]:
    """Times every candidate once in each round.

    Args:
        candidates: a name and a call without arguments for each candidate.
        rounds: blocks per candidate.
        block_seconds: length a block aims at; a slower call is timed once per block.
        pause_seconds: idle time before each block, once or until all threads are asleep.
        seed: of the order of the blocks.
        clock: seconds, only differences count.
        sleep: pauses for that many seconds.
        cpu_clock: processor seconds of this process.

    Raises:
        RestlessError: threads of a candidate do not go to sleep.
    """
    generator = random.Random(seed)
    order = list(candidates)
    calls_per_block = {
        name: count_calls(candidate, block_seconds, clock) for name, candidate in candidates.items()
    }
    blocks: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            rest(pause_seconds, sleep, cpu_clock)
            candidates[name]()
            blocks[name].append(time_block(candidates[name], calls_per_block[name], clock))
    return {name: Timing(calls_per_block[name], tuple(blocks[name])) for name in candidates}


def rest(
    pause_seconds: float, sleep: Callable[[float], None], cpu_clock: Callable[[], float]
) -> None:
    """Pauses, again and again while threads of this process are running."""
    for _ in range(max(1, round(LONGEST_REST_SECONDS / pause_seconds))):
        start = cpu_clock()
        sleep(pause_seconds)
        if cpu_clock() - start <= RESTING_SHARE * pause_seconds:
            return
    raise RestlessError(
        f"threads of this process still spin {LONGEST_REST_SECONDS:g} s after the last call; "
        f"see OMP_WAIT_POLICY and KMP_BLOCKTIME"
    )


def count_calls(call: Call, block_seconds: float, clock: Callable[[], float]) -> int:
    """How many calls fill a block, at least one."""
    call()  # The first call ever allocates, packs weights and starts threads.
    calls = 1
    # A quarter of a block is long enough to be free of the clock's resolution. The shorter of two
    # times: a call whose thread waits for a core, for milliseconds, would make blocks of few calls,
    # in which such a wait is all there is.
    while (elapsed := min(time_block(call, calls, clock) for _ in range(2))) < block_seconds / 4:
        calls *= 2
    return max(1, round(block_seconds * calls / elapsed))


def time_block(call: Call, calls: int, clock: Callable[[], float]) -> float:
    """Seconds that `calls` calls take one after the other, with the garbage collector held off."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        for _ in range(calls):
            call()
        return clock() - start
    finally:
        if collecting:
            gc.enable()


def ratio(timings: Mapping[str, Timing], baseline: str, candidate: str) -> float:
    """How many times faster `candidate` is than `baseline`, by their medians."""
    return timings[baseline].median / timings[candidate].median
