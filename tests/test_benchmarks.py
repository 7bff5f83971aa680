"""The benchmarks must not lie: harness, arithmetic and commands, checked on made-up numbers.

No test here measures how fast anything is.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made_up import made_up_run

from benchmarks import (
    compare,
    counts,
    halved,
    packed,
    peers,
    results,
    run,
    truncated,
)
from benchmarks.agreement import DisagreementError, check_agreement
from benchmarks.language_model import StepProblem
from benchmarks.layers import LayerProblem
from benchmarks.peaks import Peaks, floor
from benchmarks.shapes import MODES, SUITES, Shape, StepSize, radical_inverse
from benchmarks.timing import RestlessError, Timing, count_calls, ratio, time_candidates

WORD_LSTM = Shape("LSTM", 35, 20, 650, 650)


class FakeTime:
    """A clock that only calls and pauses move, and a diary of what happened."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.events.append("pause")

    def candidate(self, name, durations):
        """A call that takes the next of `durations`."""
        durations = iter(durations)

        def call():
            self.now += next(durations)
            self.events.append(name)

        return call


def time_fake(durations, **options):
    fake = FakeTime()
    candidates = {name: fake.candidate(name, values) for name, values in durations.items()}
    # Threads of this process that really run would ask for more pauses.
    clocks = {"clock": fake.clock, "sleep": fake.sleep, "cpu_clock": lambda: 0.0}
    timings = time_candidates(candidates, **clocks, **options)
    return timings, fake.events


# The harness


def test_every_block_follows_a_pause_and_an_untimed_call():
    durations = {"a": itertools.repeat(0.020), "b": itertools.repeat(0.020)}
    _, events = time_fake(durations, rounds=4, block_seconds=0.020)
    blocks = events[events.index("pause") :]
    assert [blocks[i] for i in range(0, len(blocks), 3)] == ["pause"] * 8
    for i in range(0, len(blocks), 3):
        assert blocks[i + 1] == blocks[i + 2] != "pause"


def test_each_round_has_every_candidate_once_in_changing_order():
    durations = {name: itertools.repeat(1.0) for name in "abc"}
    _, events = time_fake(durations, rounds=9, seed=1)
    names = events[events.index("pause") :][1::3]
    rounds = [tuple(names[i : i + 3]) for i in range(0, 27, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 2
    durations = {name: itertools.repeat(1.0) for name in "abc"}
    assert time_fake(durations, rounds=9, seed=1)[1] == events


def test_blocks_time_only_their_own_calls():
    # First call, two counting calls, then for each round an untimed call of 50 s and the timed one.
    durations = {
        "a": [9.0, 1.0, 1.0, 50.0, 1.0, 50.0, 3.0, 50.0, 2.0],
        "b": [9.0, 1.0, 1.0, 50.0, 6.0, 50.0, 8.0, 50.0, 7.0],
    }
    timings, _ = time_fake(durations, rounds=3)
    assert timings["a"] == Timing(1, (1.0, 3.0, 2.0))
    assert timings["b"] == Timing(1, (6.0, 8.0, 7.0))
    assert ratio(timings, "b", "a") == 3.5


@pytest.mark.parametrize(
    ("call_seconds", "calls"),
    [(0.003, 7), (0.0001, 200), (0.020, 1), (0.014, 1), (0.013, 2), (5.0, 1)],
)
def test_calls_fill_a_block(call_seconds, calls):
    fake = FakeTime()
    call = fake.candidate("a", itertools.chain([100.0], itertools.repeat(call_seconds)))
    assert count_calls(call, 0.020, fake.clock) == calls


def test_a_call_that_waits_for_its_core_does_not_set_the_count():
    fake = FakeTime()
    times = itertools.chain([100.0, 0.001, 0.001, 0.008], itertools.repeat(0.001))
    assert count_calls(fake.candidate("a", times), 0.020, fake.clock) == 20


def test_median_and_spread():
    timing = Timing(calls_per_block=2, block_seconds=(2.0, 20.0, 4.0, 6.0, 8.0))
    assert timing.call_seconds == (1.0, 10.0, 2.0, 3.0, 4.0)
    assert timing.median == 3.0
    assert timing.spread == pytest.approx((4.0 - 2.0) / 3.0)
    assert Timing(1, (5.0,)).spread == 0.0


@pytest.mark.parametrize(("spinning", "pauses"), [(0.0, 1), (0.0014, 1), (0.016, 2), (0.050, 5)])
def test_a_block_waits_for_spinning_threads(spinning, pauses):
    """Whose thread pool uses a core for `spinning` seconds after each call."""
    fake = FakeTime()
    used, call = 0.0, fake.candidate("a", itertools.repeat(0.020))
    stops = 0.0

    def spins_after():
        nonlocal stops
        call()
        stops = fake.now + spinning

    def sleep(seconds):
        nonlocal used
        used += min(max(stops - fake.now, 0.0), seconds)
        fake.sleep(seconds)

    time_candidates(
        {"a": spins_after},
        rounds=3,
        clock=fake.clock,
        sleep=sleep,
        cpu_clock=lambda: used,
    )
    assert fake.events[3:] == (["pause"] * pauses + ["a", "a"]) * 3


def test_threads_that_never_sleep_end_the_run():
    fake = FakeTime()
    with pytest.raises(RestlessError, match="still spin 2 s after"):
        time_candidates(
            {"a": fake.candidate("a", itertools.repeat(0.020))},
            clock=fake.clock,
            sleep=fake.sleep,
            cpu_clock=fake.clock,
        )


# Flops and floors


def test_flops():
    assert Shape("LSTM", 1, 1, 1, 1).flops("forward") == 16
    assert Shape("RNN", 1, 1, 128, 128).flops("forward") == 65_536
    assert WORD_LSTM.flops("forward") == 4_732_000_000
    assert WORD_LSTM.flops("training") == 14_196_000_000


def test_recurrent_traffic():
    assert WORD_LSTM.weight_bytes(itemsize=4) == 6_760_000
    assert WORD_LSTM.recurrent_traffic("forward", itemsize=4) == 236_600_000
    assert WORD_LSTM.recurrent_traffic("training", itemsize=4) == 473_200_000
    assert Shape("RNN", 3, 1, 1, 10).recurrent_traffic("forward", itemsize=8) == 2_400


def test_floor_is_the_larger_of_both():
    peaks = Peaks(2, "float32", flops=2e11, bandwidth={6_760_000: 1e11})
    by_flops = floor(WORD_LSTM, "forward", peaks)
    assert by_flops.flops_seconds == pytest.approx(0.02366)
    assert by_flops.bandwidth_seconds == pytest.approx(0.002366)
    assert (by_flops.seconds, by_flops.bound) == (by_flops.flops_seconds, "flops")
    by_bandwidth = floor(Shape("LSTM", 35, 1, 650, 650), "training", peaks)
    assert by_bandwidth.flops_seconds == pytest.approx(0.003549)
    assert by_bandwidth.bandwidth_seconds == pytest.approx(0.004732)
    assert (by_bandwidth.seconds, by_bandwidth.bound) == (
        by_bandwidth.bandwidth_seconds,
        "bandwidth",
    )


def test_shapes_are_read_back_as_printed():
    for shape in SUITES["full"]:
        assert Shape.parse(str(shape)) == shape
    assert set(SUITES["quick"]) < set(SUITES["full"])


def test_radical_inverse():
    assert [radical_inverse(n, 2) for n in range(5)] == [0, 0.5, 0.25, 0.75, 0.125]
    assert radical_inverse(7, 5) == pytest.approx(2 / 5 + 1 / 25)


def test_wide_shapes_reach_far_and_stay_cheap():
    for cell in ("LSTM", "RNN"):
        shapes = [shape for shape in SUITES["wide"] if shape.cell == cell]
        assert len(set(shapes)) == 20
        # The logarithms are spread evenly: each third of each range has its share.
        for sizes, (low, high) in zip(
            zip(*(dataclasses.astuple(shape)[1:] for shape in shapes), strict=True),
            ((1, 4000), (1, 256), (16, 2048), (16, 2048)),
            strict=True,
        ):
            assert low <= min(sizes) <= low * (high / low) ** (1 / 3)
            assert high / (high / low) ** (1 / 3) <= max(sizes) <= high
        assert max(shape.flops("forward") for shape in shapes) <= 40e9
        assert sum(shape.hidden_size % 16 != 0 for shape in shapes) > 10


@pytest.mark.parametrize(
    "text", ["GRU:1,1,1,1", "LSTM", "LSTM:1,2,3", "RNN:1,2,3,x", "RNN:1,0,3,4", "LSTMCell:2,1,3,4"]
)
def test_bad_shapes_are_refused(text):
    with pytest.raises(ValueError, match="shape"):
        Shape.parse(text)


# Agreement before timing


def test_agreement_allows_rounding_and_nothing_else():
    exact = torch.linspace(0.5, 1.5, 1000, dtype=torch.float64)
    rounded = exact.float()
    check_agreement("it", {"y": rounded}, {"y": rounded}, {"y": exact}, terms=100)
    for wrong_entry in (1.001, float("nan"), float("inf")):
        wrong = rounded.clone()
        wrong[500] = wrong_entry
        with pytest.raises(DisagreementError, match="it: y of rnnfast is off"):
            check_agreement("it", {"y": wrong}, {"y": rounded}, {"y": exact}, terms=100)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", ["LSTM", "RNN", "LSTMCell", "RNNCell"])
def test_a_wrong_layer_is_not_timed(cell, mode, dtype):
    problem = LayerProblem(Shape(cell, 1 if cell.endswith("Cell") else 7, 3, 5, 9), dtype)
    problem.check(mode)
    with torch.no_grad():
        list(problem.layers["rnnfast"].parameters())[1][0, 0] += 0.01  # weight_hh
    with pytest.raises(DisagreementError):
        problem.check(mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("cell", ["LSTM", "RNNCell"])
def test_in_bfloat16_both_of_ours_are_checked(cell, mode):
    shape = Shape(cell, 1 if cell.endswith("Cell") else 7, 3, 5, 9)
    for name, fault in (("rnnfast", 1.0), (results.OWN_FLOAT32, 0.01)):
        problem = LayerProblem(shape, torch.bfloat16)
        problem.check(mode)
        assert list(problem.calls(mode)) == ["torch", "rnnfast", results.OWN_FLOAT32]
        with torch.no_grad():
            list(problem.layers[name].parameters())[1].add_(fault)  # weight_hh
        with pytest.raises(DisagreementError, match=f" of {name} is off"):
            problem.check(mode)


@pytest.mark.parametrize("cell", ["LSTM", "RNNCell"])
def test_frozen_weights_are_checked_too(cell):
    problem = LayerProblem(Shape(cell, 1 if cell.endswith("Cell") else 7, 3, 5, 9), torch.float32)
    problem.check("forward")
    assert list(problem.calls("forward")) == ["torch", "rnnfast", results.OWN_FROZEN]
    assert list(problem.calls("training")) == ["torch", "rnnfast"]
    with torch.no_grad():
        list(problem.layers[results.OWN_FROZEN].parameters())[1].add_(0.01)  # weight_hh
    with pytest.raises(DisagreementError, match=f" of {results.OWN_FROZEN} is off"):
        problem.check("forward")


def test_forward_calls_record_no_gradient():
    problem = LayerProblem(Shape("RNN", 7, 3, 5, 9), torch.float32)
    for mode, records in (("forward", False), ("training", True)):
        with problem.context(mode):
            assert torch.is_grad_enabled() is records
    with problem.context("forward"):
        assert not problem.calls("forward")["rnnfast"]()[0].requires_grad


@pytest.mark.parametrize("cell", ["LSTM", "RNN"])
def test_language_model_steps_stay_together(cell):
    size = StepSize("tiny", cell, 2, 8, batch=3, bptt=4, vocabulary=11)
    problem = StepProblem(size, torch.float64)
    problem.check()
    assert size.tokens == 12
    before = problem.models["torch"].decoder.weight.detach().clone()
    for step in problem.calls().values():
        for _ in range(3):
            step()
    weights = [model.decoder.weight for model in problem.models.values()]
    assert not torch.equal(weights[0], before)
    # Three steps of a contracting model: a few hundred roundings in sequence, far below 1e-10.
    torch.testing.assert_close(*weights, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", peers.NAMES)
@pytest.mark.parametrize("cell", ["LSTM", "RNN"])
def test_peers_compute_the_same_layer(cell, name):
    """In a process of its own: with the peers loaded, this one crashed in unrelated tests."""
    for module in (name, "onnx"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed")
    command = [sys.executable, "-m", "tests.peer_layer", cell, name]
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("as torch.nn\n")


def test_peers_that_are_missing_are_named(capsys, monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        run.main(["--peers", "torch,openvino"])
    error = capsys.readouterr().err
    assert "--peers: openvino needs openvino: pip install '.[bench]'" in error


# Instruction counts


def test_counts_fail_above_the_margin_only():
    kept = {"same": 1000, "more": 1000, "a little more": 1000, "fewer": 1000}
    lines = counts.compare(
        {"same": 1000, "more": 1051, "a little more": 1050, "fewer": 900, "new": 5}, kept
    )
    assert [line.split()[0] for line in lines] == ["ok", "FAILED", "ok", "fewer,", "FAILED"]
    assert lines[1] == "FAILED more: 1,051 instructions, +5.1% on 1,000"


@pytest.mark.parametrize("may_skip", [True, False])
@pytest.mark.parametrize("lacks", ["valgrind", "counts"])
def test_counts_are_skipped_only_on_request(lacks, may_skip, capsys, monkeypatch):
    monkeypatch.setattr(counts.shutil, "which", lambda _: None if lacks == "valgrind" else "x")
    monkeypatch.setattr(counts, "compiler_of", lambda _: "Abacus 1.0")
    assert counts.main(["--may-skip"] * may_skip) == (0 if may_skip else 1)
    said = capsys.readouterr().out
    assert said.startswith("SKIPPED" if may_skip else "FAILED")
    assert ("valgrind" if lacks == "valgrind" else "Abacus 1.0") in said


# The command


def test_tiny_run_end_to_end(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "STEPS", (StepSize("tiny", "RNN", 1, 4, 2, 3, 5),))
    threads = torch.get_num_threads()
    path = tmp_path / "run.json"
    shapes = ["LSTM:2,1,3,16", "RNN:2,1,3,16", "LSTMCell:1,1,3,16", "RNNCell:1,1,3,16"]
    command = f"--shapes {' '.join(shapes)} --rounds 2 --threads 1 --lm --json {path}"
    try:
        assert run.main(command.split()) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out
    assert "LSTM 2, 1, 3, 16" in printed
    assert "tiny" in printed

    measured = results.load(path)
    assert [(str(layer.shape), layer.mode) for layer in measured.layers] == [
        (shape, mode) for shape in shapes for mode in MODES
    ]
    for compared in [*measured.layers, *measured.steps]:
        frozen = {results.OWN_FROZEN} if getattr(compared, "mode", "") == "forward" else set()
        assert set(compared.timings) == {"torch", "rnnfast"} | frozen
        for timing in compared.timings.values():
            assert len(timing.block_seconds) == 2
            assert min(timing.block_seconds) > 0
    assert measured.peaks.flops > 0
    assert set(measured.peaks.bandwidth) == {1024, 4096}
    environment = json.loads(path.read_text(encoding="utf-8"))["environment"]
    assert {"date", "cpu", "cores", "torch", "rnnfast"} <= set(environment)


def test_a_run_in_bfloat16_times_float32_too(tmp_path, capsys):
    path = tmp_path / "run.json"
    threads = torch.get_num_threads()
    command = f"--shapes LSTM:2,1,3,16 --rounds 2 --dtype bfloat16 --threads {threads}"
    assert run.main([*command.split(), "--json", str(path)]) == 0
    assert "than float32" in capsys.readouterr().out
    measured = results.load(path)
    for layer in measured.layers:
        assert set(layer.timings) == {"torch", "rnnfast", results.OWN_FLOAT32}
    assert set(measured.peaks.bandwidth) == {2048}
    assert measured.peaks.float32_flops > 0


def test_disagreement_ends_the_run(capsys, monkeypatch, tmp_path):
    def disagree(self, mode):
        raise DisagreementError("y is off")

    monkeypatch.setattr(LayerProblem, "check", disagree)
    monkeypatch.setattr(run, "measure_peaks", lambda *_: made_up_run().peaks)
    path = tmp_path / "run.json"
    threads = torch.get_num_threads()
    command = f"--shapes RNN:1,1,2,2 --threads {threads} --json {path}"
    assert run.main(command.split()) == 1
    assert capsys.readouterr().err.endswith("error: y is off\n")
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        "--shapes GRU:1,1,1,1",
        "--modes sideways",
        "--rounds 0",
        "--threads -1",
        "--json /no/such/x",
        "--peers torch,tensorflow",
        "--peers openvino",
        "--peers torch,openvino --dtype float64",
    ],
)
def test_wrong_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        run.main(arguments.split())
    option = arguments.split()[0].removeprefix("--").removesuffix("s")
    assert option in capsys.readouterr().err.splitlines()[-1]


def test_halved_end_to_end(capsys):
    assert halved.main(["--shapes", "LSTM:6,1,3,5", "RNN:6,1,3,5", "--rounds", "2"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["float32", "halved", "faster"]
    assert [line.split()[0] for line in lines] == ["LSTM:6,1,3,5", "RNN:6,1,3,5"]


def test_truncated_end_to_end(capsys):
    shapes = ["LSTM:7,2,3,5", "RNN:6,1,3,5"]
    assert truncated.main(["--shapes", *shapes, "--k", "3", "--rounds", "2"]) == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["loop", "one", "call", "faster"]
    assert [line.split()[0] for line in lines] == shapes


def test_a_loop_with_other_gradients_is_not_timed(monkeypatch):
    monkeypatch.setattr(truncated, "detached", lambda state: state)
    with pytest.raises(AssertionError, match="not close"):
        truncated.main(["--shapes", "LSTM:9,2,3,5", "--k", "3", "--rounds", "2"])


def test_packed_end_to_end(tmp_path, capsys):
    batches = ["LSTM:3,1..5,3,4,2", "RNN:2,2..2,3,4,1"]
    file = tmp_path / "packed.json"
    assert packed.main(["--batches", *batches, "--rounds", "2", "--json", str(file)]) == 0
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [b for b in batches for _ in range(2)]
    assert [line.split()[1] for line in lines[2:]] == ["100%", "100%"]
    stored = json.loads(file.read_text())
    assert stored["environment"]["rnnfast"]
    assert [row["batch"] for row in stored["rows"]] == [b for b in batches for _ in range(2)]
    assert {len(blocks) for row in stored["rows"] for blocks in row["seconds"].values()} == {2}


def test_packed_sequences_that_disagree_are_not_timed(monkeypatch):
    class Wrong(torch.nn.RNN):
        def forward(self, x):
            y, h = super().forward(x)
            return (y._replace(data=2 * y.data) if hasattr(y, "batch_sizes") else y), h

    monkeypatch.setattr(packed.rnnfast, "RNN", Wrong)
    with pytest.raises(AssertionError, match="not close"):
        packed.main(["--batches", "RNN:3,1..5,3,4,1", "--rounds", "2"])


@pytest.mark.parametrize("text", ["GRU:3,1..5,3,4,1", "RNN:3,5,3,4,1", "RNN:3,1..5,3,4,3"])
def test_what_is_no_batch_of_sequences(text):
    with pytest.raises(ValueError, match="is no batch"):
        packed.Batch.parse(text)


def test_comparing_with_an_older_revision_builds_it(tmp_path, monkeypatch):
    """Its files are as old as the commit, older than what was built for a newer one."""
    repository, built = tmp_path / "repository", tmp_path / "built"
    contract = repository / "csrc" / "rnnfast.h"
    contract.parent.mkdir(parents=True)
    contract.write_text("// a contract\n")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    old = {"GIT_COMMITTER_DATE": "2001-01-01T00:00:00Z"}
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "a"]):
        subprocess.run(["git", *command], cwd=repository, env=os.environ | old, check=True)
    monkeypatch.setattr(compare, "ROOT", repository)
    monkeypatch.setattr(compare, "BUILD", built)
    run = subprocess.run
    monkeypatch.setattr(
        compare.subprocess,
        "run",
        lambda command, **options: run(command, **options) if command[0] == "git" else None,
    )
    now = time.time()
    compare.build("HEAD")
    assert (built / "before" / "csrc" / "rnnfast.h").stat().st_mtime > now - 60
