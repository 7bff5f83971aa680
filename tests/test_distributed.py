"""Data parallel training: two processes take the steps of one with twice the batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import rnnfast
import torch
from rnnfast import cli
from rnnfast.training.checkpoint import read_checkpoint
from tolerance import tolerance

T, B, H, STEPS = 8, 6, 10, 6
# A free port of its own for every run, so that tests can run side by side.
TORCHRUN = ["--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
TORCHRUN += ["-m", "rnnfast"]
FLAGS = [
    "--nhid",
    H,
    "--nlayers",
    2,
    "--bptt",
    T,
    "--dtype",
    "float64",
    "--optimizer",
    "sgd",
    "--lr",
    20,
]
FLAGS += ["--log-interval", 1, "--eval-interval", 3, "--reset-interval", 3]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("".join(chr(97 + n * n * n % 11) for n in range(12_000)))
    return path


def one_process(*arguments):
    return cli.main([str(argument) for argument in arguments])


def two_processes(*arguments):
    """The command line under torchrun, on the loopback interface."""
    path = os.pathsep.join(
        [str(Path(rnnfast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *TORCHRUN, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def log(directory, kind):
    entries = [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if entry["kind"] == kind]


def test_two_processes_train_like_one_with_twice_the_batch(text, tmp_path):
    flags = ["train", "--data", text, *FLAGS, "--max-steps", STEPS]
    assert one_process(*flags, "--batch-size", 2 * B, "--save", tmp_path / "one") == 0
    # The run of two is resumed in its course, so the carried states of both are stored.
    flags = [*flags, "--batch-size", B, "--save", tmp_path / "two"]
    for steps, resume in [(4, []), (STEPS, ["--resume"])]:
        process = two_processes(*flags, "--max-steps", steps, *resume)
        assert process.returncode == 0, process.stderr
        # Only the first process reports.
        assert process.stdout.count(f"step limit reached at step {steps}") == 1
        assert f"training    {steps} steps of {2 * B} x {T} tokens" in process.stdout
        assert "1 threads, 2 processes" in process.stdout

    # Sums over all rows are made of two halves: rounded differently, no more.
    allowed = tolerance(torch.float64, K=T * 2 * B * H, T=T * STEPS)
    for kind, name, count in [
        ("train", "loss", STEPS),
        ("train", "grad_norm", STEPS),
        ("valid", "loss", 2),
        ("test", "loss", 1),
    ]:
        values = {entry["step"]: entry[name] for entry in log(tmp_path / "two", kind)}
        expected = {entry["step"]: entry[name] for entry in log(tmp_path / "one", kind)}
        assert len(expected) == count
        # The interrupted run was validated and tested once more, where it was interrupted.
        values = {step: values[step] for step in expected}
        assert values == pytest.approx(expected, rel=allowed), (kind, name)
    # The test was of the best model, not of the last one, in both processes.
    assert read_checkpoint(tmp_path / "two" / "best.safetensors")[1]["step"] == 3
    assert len({entry["loss"] for entry in log(tmp_path / "one", "train")}) == STEPS
    tensors, _ = read_checkpoint(tmp_path / "two" / "last.safetensors")
    assert tensors["state.0"].shape == (2, 2 * B, H)
    assert tensors["random.cpu"].shape[0] == 2

    # A run belongs to as many processes as began it.
    assert one_process("train", "--save", tmp_path / "two", "--resume") == 1


def test_an_error_ends_all_processes_and_is_told(text, tmp_path):
    (tmp_path / "run.json").touch()
    process = two_processes("train", "--data", text, *FLAGS, "--save", tmp_path)
    assert process.returncode != 0
    errors = [line for line in process.stderr.splitlines() if line.startswith("rnnfast: error")]
    assert len(errors) >= 1
    assert "already holds a run" in errors[0]
