"""Results that nobody measured, for tests of tables and pictures."""

from __future__ import annotations

from benchmarks.peaks import Peaks
from benchmarks.results import LayerResult, Run, StepResult
from benchmarks.shapes import Shape, StepSize
from benchmarks.timing import Timing


def constant_timing(seconds):
    return Timing(calls_per_block=2, block_seconds=(2 * seconds,) * 3)


def made_up_run():
    """LSTM twice and four times as fast, RNN three times, on a machine of 100 GFLOP/s."""
    lstm, rnn = Shape("LSTM", 5, 2, 3, 4), Shape("RNN", 5, 2, 3, 4)
    step = StepSize("word LSTM", "LSTM", 2, 8, batch=4, bptt=5, vocabulary=11)

    def compared(slow, fast):
        return {"torch": constant_timing(slow), "rnnfast": constant_timing(fast)}

    return Run(
        environment={
            "cpu": "Abacus",
            "torch": "2.0",
            "rnnfast": {"version": "1.0", "isa": "baseline"},
            "date": "2030-01-02T03:04:05+00:00",
        },
        settings={"rounds": 3},
        peaks=Peaks(threads=2, dtype="float32", flops=1e11, bandwidth={256: 1e10, 64: 1e10}),
        layers=[
            LayerResult(compared(0.2, 0.1), lstm, "forward"),
            LayerResult(compared(0.4, 0.1), lstm, "training"),
            LayerResult(compared(0.8, 0.1), Shape("LSTM", 6, 2, 3, 4), "forward"),
            LayerResult(compared(0.3, 0.1), rnn, "forward"),
        ],
        steps=[StepResult(compared(0.02, 0.01), step)],
    )
