"""Training: what a run computes, and that no accident loses what it has computed."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import math
import os
import resource
import signal
import threading

import pytest
import torch
from rich.console import Console
from rnnfast.bptt import chunks
from rnnfast.models import LanguageModel
from rnnfast.training import (
    CheckpointError,
    RunDirectory,
    Score,
    SettingsError,
    TrainSettings,
    interrupt,
    loop,
    train,
)
from rnnfast.training import checkpoint as checkpoint_module
from rnnfast.training import run as run_module
from rnnfast.training.batches import IGNORED, text_rows, time_major
from rnnfast.training.checkpoint import read_checkpoint, write_atomically
from rnnfast.training.interrupt import InterruptWish
from rnnfast.training.loop import DivergenceError, Stop, train_step
from rnnfast.training.plot import plot_run
from rnnfast.training.progress import (
    PlainReporter,
    Reporter,
    StepReport,
    TerminalReporter,
    TrainingLog,
    make_reporter,
    read_log,
)
from rnnfast.training.schedule import (
    COSINE_END,
    PLATEAU_FACTOR,
    PLATEAU_PATIENCE,
    Plateau,
    learning_rate,
)
from rnnfast.training.settings import resumed_settings

# 900 training tokens: 4 rows of 224 predictions, 28 chunks of 8.
STEPS_PER_EPOCH = 28


@pytest.fixture
def settings(tmp_path):
    """A small run on a text that can be learned."""
    text = tmp_path / "text"
    text.write_text(
        "".join("abcdefgh"[n * n % 8 : 1 + n * n % 8 + n % 3] for n in range(999))[:1000]
    )
    return TrainSettings(
        data=(str(text),),
        emsize=12,
        nhid=12,
        nlayers=2,
        dropout=0.2,
        bptt=8,
        batch_size=4,
        lr=1e-2,
        max_steps=12,
        eval_interval=5,
        log_interval=3,
    )


def run(settings, directory, **options):
    """Trains without a word."""
    return train(settings, directory, stream=io.StringIO(), **options)


def last(directory):
    """Tensors and record of the newest checkpoint."""
    return read_checkpoint(RunDirectory(directory).checkpoint_file("last"))


def entries(directory, kind):
    """What the log says of one kind, but for what a clock has measured."""
    return [
        {key: value for key, value in entry.items() if key != "tokens_per_second"}
        for entry in read_log(RunDirectory(directory).log_file)
        if entry["kind"] == kind
    ]


def assert_same_course(one, other):
    """Two runs have gone through the same steps, to the last bit, and stand where they can take the
    same next one."""
    (tensors, record), (others, other_record) = last(one), last(other)
    assert tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name
    for part in (record, other_record):
        # A validation where a run was interrupted may find a model that is better still.
        del part["position"]["best_loss"]
    assert record == other_record
    assert entries(one, "train") == entries(other, "train")


class StopAt(Reporter):
    """Sends this process a signal when a log entry of a step is due."""

    def __init__(self, step, number=signal.SIGINT):
        self._step = step
        self._number = number

    def step(self, report):
        if report.step == self._step:
            os.kill(os.getpid(), self._number)


VARIANTS = [
    {},
    {"model": "rnn", "optimizer": "sgd", "lr": 0.1, "tied": True},
    {"schedule": "cosine", "dtype": "float64", "nlayers": 1, "level": "byte"},
    {"backend": "reference", "level": "word", "data_words": True},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=["lstm-adam", "rnn-sgd-tied", "cosine", "word"])
def test_a_resumed_run_takes_the_same_steps_bit_for_bit(settings, tmp_path, changes, monkeypatch):
    changes = dict(changes)
    if changes.pop("data_words", False):
        words = tmp_path / "words"
        words.write_text("a b c d\nb c a\n" * 80)
        changes["data"] = (str(words),)
    # Stops within an epoch, between two log entries' steps and between two validations.
    settings = dataclasses.replace(settings, max_steps=34, **changes)
    run(settings, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "make_reporter", lambda stream: StopAt(18))
        result = run(settings, tmp_path / "parts")
    assert result.stop is Stop.INTERRUPT
    assert result.signal == signal.SIGINT
    position = last(tmp_path / "parts")[1]["position"]
    # The signal comes while step 18 is reported, and the loop looks after step 19.
    assert position["step"] == 19
    assert position["interval_steps"] == 1
    assert run(settings, tmp_path / "parts", resume=True).stop is Stop.STEPS
    assert_same_course(tmp_path / "whole", tmp_path / "parts")


def test_a_run_stopped_at_the_end_of_an_epoch_resumes(settings, tmp_path):
    settings = dataclasses.replace(settings, max_steps=STEPS_PER_EPOCH + 2)
    run(settings, tmp_path / "whole")
    result = run(dataclasses.replace(settings, max_steps=STEPS_PER_EPOCH), tmp_path / "parts")
    assert result.stop is Stop.STEPS
    tensors, record = last(tmp_path / "parts")
    assert record["position"]["epoch"] == 1
    assert "state.0" not in tensors
    run(settings, tmp_path / "parts", resume=True)
    assert_same_course(tmp_path / "whole", tmp_path / "parts")


def test_a_finished_run_is_resumed_without_a_step(settings, tmp_path):
    run(settings, tmp_path / "run")
    before = last(tmp_path / "run")
    assert run(settings, tmp_path / "run", resume=True).stop is Stop.STEPS
    assert last(tmp_path / "run")[1] == before[1]


def test_the_seed_decides_the_run(settings, tmp_path):
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        run(dataclasses.replace(settings, seed=seed), tmp_path / name)
    assert_same_course(tmp_path / "a", tmp_path / "b")
    assert entries(tmp_path / "a", "train") != entries(tmp_path / "c", "train")


def test_all_epochs_are_trained_and_the_text_is_learned(settings, tmp_path):
    settings = dataclasses.replace(settings, epochs=3, max_steps=0, dropout=0.0)
    result = run(settings, tmp_path / "run")
    assert result.stop is Stop.EPOCHS
    assert last(tmp_path / "run")[1]["position"]["step"] == 3 * STEPS_PER_EPOCH
    losses = [entry["loss"] for entry in entries(tmp_path / "run", "train")]
    assert losses[0] > 1.9
    assert losses[-1] < 1.6
    assert result.test.loss < 1.6
    assert result.valid.loss == entries(tmp_path / "run", "valid")[-1]["loss"]
    assert len(result.sample) == run_module.SAMPLE_LENGTH
    assert {entry["epoch"] for entry in entries(tmp_path / "run", "train")} == {1, 2, 3}


def test_a_time_limit_ends_the_run_after_a_step(settings, tmp_path):
    settings = dataclasses.replace(settings, max_minutes=1e-9)
    result = run(settings, tmp_path / "run")
    assert result.stop is Stop.TIME
    assert last(tmp_path / "run")[1]["position"]["step"] == 1


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(settings, tmp_path, monkeypatch):
    # Validations at steps 5, 10, 15 and 17.
    losses = iter([2.0, 1.0, 3.0, 1.0])
    monkeypatch.setattr(loop, "evaluate", lambda *a, **k: Score(next(losses), 10, 1.0))
    run(dataclasses.replace(settings, max_steps=17), tmp_path / "run")
    best, record = read_checkpoint(RunDirectory(tmp_path / "run").checkpoint_file("best"))
    assert (record["step"], record["loss"]) == (10, 1.0)
    tensors, record = last(tmp_path / "run")
    assert record["position"]["best_loss"] == 1.0
    assert not torch.equal(best["model.decoder.bias"], tensors["model.decoder.bias"])


def test_the_rate_of_a_run_falls_when_its_validation_stops_improving(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "evaluate", lambda *a, **k: Score(1.0, 10, 1.0))
    settings = dataclasses.replace(settings, eval_interval=1, log_interval=1, max_steps=6)
    run(settings, tmp_path / "run")
    lr = settings.lr
    # The first validation brings a lowest loss, and the three after it none lower.
    assert [entry["lr"] for entry in entries(tmp_path / "run", "train")] == 4 * [lr] + 2 * [lr / 2]


def test_a_run_is_saved_before_its_last_validation(settings, tmp_path, monkeypatch):
    def give_up(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "evaluate", give_up)
    with pytest.raises(KeyboardInterrupt):
        run(dataclasses.replace(settings, max_steps=4), tmp_path / "run")
    assert last(tmp_path / "run")[1]["position"]["step"] == 4


def test_rows_forget_their_state_in_turns(settings, tmp_path):
    fresh = []
    for steps in range(1, 6):
        changed = dataclasses.replace(settings, max_steps=steps, reset_interval=3)
        run(changed, tmp_path / str(steps))
        state = last(tmp_path / str(steps))[0]["state.1"]
        fresh.append([row for row in range(4) if not state[:, row].any()])
    assert fresh == [[2], [1], [0, 3], [2], [1]]
    run(dataclasses.replace(settings, reset_interval=0), tmp_path / "never")
    assert last(tmp_path / "never")[0]["state.1"].all()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish_and_a_later_one_acts_as_before(number, monkeypatch):
    received = []
    before = signal.signal(number, lambda *arguments: received.append(number))
    try:
        with InterruptWish() as wish:
            assert wish.signal is None
            os.kill(os.getpid(), number)
            assert wish.signal == number
            # The same wish, told by two.
            os.kill(os.getpid(), signal.SIGTERM)
            assert wish.signal == number
            assert not received
            monkeypatch.setattr(interrupt, "SECONDS_OF_ONE_WISH", -1.0)
            os.kill(os.getpid(), number)
            assert received == [number]
        os.kill(os.getpid(), number)
        assert received == [number, number]
    finally:
        signal.signal(number, before)


def test_a_run_in_another_thread_leaves_signals_alone(settings, tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(settings, tmp_path / "run")))
    thread.start()
    thread.join()
    assert results[0].stop is Stop.STEPS


def no_space(*arguments):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_content(tmp_path, monkeypatch, call):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(checkpoint_module.os, call, no_space)
    with pytest.raises(
        CheckpointError, match=r"cannot write .*file: No space left on device; what"
    ):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_write_that_the_system_cuts_short_leaves_the_old_content(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            write_atomically(path, b"new" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_that_fills_up_while_training_loses_no_checkpoint(settings, tmp_path, monkeypatch):
    run(settings, tmp_path / "run")
    before = last(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module.os, "fsync", no_space)
        with pytest.raises(CheckpointError, match="No space left on device"):
            run(dataclasses.replace(settings, max_steps=40), tmp_path / "run", resume=True)
    after = last(tmp_path / "run")
    assert before[1] == after[1]
    assert all(torch.equal(before[0][name], after[0][name]) for name in before[0])
    run(dataclasses.replace(settings, max_steps=40), tmp_path / "run", resume=True)
    run(dataclasses.replace(settings, max_steps=40), tmp_path / "whole")
    assert_same_course(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("kept", [0, 4, 8, 300, -1])
def test_a_truncated_checkpoint_is_refused(settings, tmp_path, kept):
    run(settings, tmp_path / "run")
    for name in ("last", "best"):
        file = RunDirectory(tmp_path / "run").checkpoint_file(name)
        file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"last\.safetensors is truncated or damaged"):
        run(dataclasses.replace(settings, max_steps=20), tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match=r"best\.safetensors is truncated or damaged"):
        RunDirectory(tmp_path / "run").open_model("best")


def test_checkpoints_of_another_format_or_kind_are_refused(settings, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_module, "FORMAT", 99)
        run(settings, tmp_path / "later")
    with pytest.raises(CheckpointError, match=r"run\.json has format 99; this version reads 1"):
        RunDirectory(tmp_path / "later").read_record()
    with pytest.raises(CheckpointError, match=r"last\.safetensors has format 99"):
        last(tmp_path / "later")
    run(settings, tmp_path / "run")
    run(dataclasses.replace(settings, nhid=13), tmp_path / "other")
    target = RunDirectory(tmp_path / "run").checkpoint_file("last")
    target.write_bytes(RunDirectory(tmp_path / "other").checkpoint_file("last").read_bytes())
    with pytest.raises(CheckpointError, match=r"does not fit the model that run\.json describes"):
        run(settings, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"format": 1}', '{"format": 1, "settings": 3}']
)
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        RunDirectory(tmp_path).read_record()


def test_only_the_same_run_can_be_resumed(settings, tmp_path):
    with pytest.raises(CheckpointError, match=r"is not a run: it has no run\.json"):
        run(settings, tmp_path / "none", resume=True)
    run(settings, tmp_path / "run")
    with pytest.raises(CheckpointError, match="already holds a run"):
        run(settings, tmp_path / "run")
    text = tmp_path / "text"
    text.write_text(text.read_text()[::-1])
    with pytest.raises(
        CheckpointError, match=r"run was trained on another text than .*text now is"
    ):
        run(settings, tmp_path / "run", resume=True)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(record | {"world_size": 2}))
    text.write_text(text.read_text()[::-1])
    with pytest.raises(CheckpointError, match="is trained by 2 processes, not 1"):
        run(settings, tmp_path / "run", resume=True)


def test_a_run_goes_where_it_can_be_written(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = dataclasses.replace(settings, data=("text",))
    assert str(run(settings, None).directory) == "runs/1"
    assert str(run(settings, None).directory) == "runs/2"
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot make directory file: File exists"):
        run(settings, "file")
    # The text is found from elsewhere, too.
    stored = RunDirectory(tmp_path / "runs" / "1").read_record().settings
    assert stored.data == (str(tmp_path / "text"),)
    monkeypatch.chdir("/")
    run(
        dataclasses.replace(settings, max_steps=13, data=(str(tmp_path / "text"),)),
        tmp_path / "runs" / "1",
        resume=True,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"level": "line"}, "level is 'line'; it must be one of char, byte, word"),
        ({"model": "gru"}, "model is 'gru'"),
        ({"bptt": 0}, "bptt is 0; it must be at least 1"),
        ({"lr": 0.0}, "lr is 0.0; it must be above 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"clip": -1.0}, "clip is -1.0"),
        ({"clip": math.nan}, "clip is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"device": "toaster"}, "device is 'toaster'; it must be cpu or cuda"),
        ({"device": "meta"}, "device is 'meta'; it must be cpu or cuda"),
        ({"emsize": 5, "tied": True}, "emsize is 5 and nhid is 12"),
        ({"bidirectional": True}, "bidirectional makes no sense"),
        ({"batch_size": 900}, "too short for batch_size 900: 900 tokens are too few for 900 rows"),
    ],
)
def test_settings_out_of_range_are_refused(settings, tmp_path, changes, message):
    with pytest.raises(SettingsError, match=message):
        run(dataclasses.replace(settings, **changes), tmp_path / "run")


def test_settings_survive_json(settings):
    record = json.loads(json.dumps(settings.to_json()))
    assert TrainSettings.from_json(record) == settings
    with pytest.raises(SettingsError, match="unknown settings: wings"):
        TrainSettings.from_json(record | {"wings": 2})


def test_a_resumed_run_keeps_its_settings_but_for_how_far_it_goes(settings):
    assert resumed_settings(settings, {"epochs": 99, "nhid": 12}).epochs == 99
    with pytest.raises(SettingsError, match="nhid is 13, but the run to resume has 12"):
        resumed_settings(settings, {"nhid": 13})
    with pytest.raises(SettingsError, match="epochs is 0"):
        resumed_settings(settings, {"epochs": 0})


def test_a_diverging_run_stops_and_keeps_its_checkpoint(settings, tmp_path):
    settings = dataclasses.replace(
        settings, model="rnn", nonlinearity="relu", optimizer="sgd", lr=1e20, clip=0.0
    )
    with pytest.raises(DivergenceError, match=r"diverged at step \d+: loss is .*; lower --lr"):
        run(settings, tmp_path / "run")
    tensors, _ = last(tmp_path / "run")
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def step_once(clip):
    torch.manual_seed(0)
    model = LanguageModel(5, emsize=4, nhid=4, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tokens = torch.tensor([[0, 1], [2, 3], [4, 0]])
    loss, norm, state = train_step(model, optimizer, tokens[:-1], tokens[1:], None, clip=clip)
    moved = math.sqrt(
        sum(
            ((parameter - old) ** 2).sum().item()
            for parameter, old in zip(model.parameters(), before, strict=True)
        )
    )
    return loss, norm, moved, state


def test_clipping_bounds_the_step_and_reports_the_norm_before():
    loss, norm, moved, state = step_once(clip=0.0)
    assert moved == pytest.approx(norm, rel=1e-12)
    assert not any(part.requires_grad for part in state)
    clipped = step_once(clip=norm / 10)
    assert clipped[:2] == (loss, norm)
    # torch divides by the norm plus 1e-6.
    assert clipped[2] == pytest.approx(norm / 10, rel=1e-5)
    assert step_once(clip=norm * 10)[2] == pytest.approx(norm, rel=1e-12)


@pytest.mark.parametrize("length", [5, 6, 7, 8, 9, 21])
@pytest.mark.parametrize("keep_all", [False, True])
def test_rows_predict_every_token_once_in_its_place(length, keep_all):
    rows = text_rows(torch.arange(length, dtype=torch.int32), 4, keep_all=keep_all)
    pairs = []
    for inputs, targets in chunks(rows, 2):
        inputs, targets = (time_major(part, torch.device("cpu")) for part in (inputs, targets))
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.is_contiguous()
        kept = targets != IGNORED
        assert torch.equal(inputs[kept] + 1, targets[kept])
        pairs += targets[kept].tolist()
    predictions = length - 1 if keep_all else (length - 1) // 4 * 4
    assert sorted(pairs) == list(range(1, predictions + 1))


def test_a_text_with_fewer_predictions_than_rows_is_refused():
    with pytest.raises(ValueError, match="4 tokens are too few for 4 rows; at least 5 are needed"):
        text_rows(torch.arange(4), 4)


def test_the_rate_halves_when_validation_stops_improving():
    plateau = Plateau()
    losses = [3.0, 2.0] + [2.5] * PLATEAU_PATIENCE + [1.0] + [1.0] * PLATEAU_PATIENCE
    factors = []
    for loss in losses:
        plateau.observe(loss)
        factors.append(plateau.factor)
    once, twice = PLATEAU_FACTOR, PLATEAU_FACTOR**2
    waiting = PLATEAU_PATIENCE - 1
    assert factors == [1, 1] + [1] * waiting + [once] + [once] + [once] * waiting + [twice]
    assert learning_rate("plateau", 0.1, 5, 10, plateau) == 0.1 * twice
    assert learning_rate("constant", 0.1, 5, 10, plateau) == 0.1


def test_the_cosine_falls_from_the_rate_to_its_end():
    rates = [learning_rate("cosine", 2.0, step, 10, Plateau()) for step in range(12)]
    assert rates[0] == 2.0
    assert rates[5] == pytest.approx(2 * (1 + COSINE_END) / 2)
    assert rates[10] == rates[11] == pytest.approx(2 * COSINE_END)
    assert rates == sorted(rates, reverse=True)


def test_the_log_is_json_lines_that_survive_accidents(tmp_path):
    log = TrainingLog(tmp_path / "log.jsonl")
    for step in (1, 2, 3):
        log.add("train", step, loss=float(step))
    log.add("valid", 3, loss=math.inf)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"kind": "train", "step": 1, "loss": 1.0},
        {"kind": "train", "step": 2, "loss": 2.0},
        {"kind": "train", "step": 3, "loss": 3.0},
        {"kind": "valid", "step": 3, "loss": None},
    ]
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"kind": "train", "st')
    assert len(read_log(tmp_path / "log.jsonl")) == 4
    log.forget_after(2)
    assert [entry["step"] for entry in read_log(tmp_path / "log.jsonl")] == [1, 2]
    (tmp_path / "log.jsonl").write_text('nonsense\n{"kind": "train", "step": 1}\n')
    with pytest.raises(CheckpointError, match=r"log\.jsonl is damaged in line 1"):
        read_log(tmp_path / "log.jsonl")
    with pytest.raises(CheckpointError, match=r"cannot read .*none: No such file"):
        read_log(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"cannot write .*: Is a directory"):
        TrainingLog(tmp_path).add("train", 1)


REPORT = StepReport(
    step=20, epoch=1, loss=math.log(8), grad_norm=0.5, tokens_per_second=1234.5, lr=0.002
)


def test_lines_are_plain_where_there_is_no_terminal():
    stream = io.StringIO()
    reporter = make_reporter(stream)
    assert isinstance(reporter, PlainReporter)
    reporter.begin(100, 0)
    for _ in range(3):
        reporter.step(REPORT)
    reporter.end()
    # Soon after one another, so all but the first are left out.
    assert stream.getvalue() == (
        "step 20/100  epoch 1  loss 2.0794  perplexity 8.00  1,234 tokens/s  gradient 0.50  "
        "lr 0.002\n"
    )


def test_a_bar_is_shown_on_a_terminal():
    stream = io.StringIO()
    reporter = TerminalReporter(Console(file=stream, force_terminal=True, width=80))
    reporter.begin(100, 10)
    reporter.step(REPORT)
    reporter.message("step 20  validation [loss] 1.0")
    reporter.end()
    shown = stream.getvalue()
    assert "20/100" in shown
    assert "loss 2.0794  ppl 8.00  1,234 tokens/s  grad 0.50" in shown
    assert "validation [loss] 1.0" in shown


def test_the_report_says_what_is_trained(settings, tmp_path):
    stream = io.StringIO()
    train(settings, tmp_path / "run", stream=stream)
    report = stream.getvalue()
    model, _ = RunDirectory(tmp_path / "run").open_model("best")[::-1]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    vocabulary = RunDirectory(tmp_path / "run").read_record().vocabulary
    for part in (
        "tokens      900 train, 50 valid, 50 test",
        f"vocabulary  {len(vocabulary)} (char), 0.00% of the validation tokens unknown",
        "model       2 x 12 lstm, embedding 12",
        f"parameters  {parameters:,}",
        "backend     rnnfast, ISA ",
        "step 5  validation loss ",
        "step limit reached at step 12",
        "test loss ",
        "sample:\n",
    ):
        assert part in report


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_the_loss_curve_is_a_picture(settings, tmp_path, suffix, magic):
    run(settings, tmp_path / "run")
    output = plot_run(tmp_path / "run", tmp_path / f"curve{suffix}")
    assert output.read_bytes().startswith(magic)
    assert plot_run(tmp_path / "run") == tmp_path / "run" / "loss.png"


def test_what_can_not_be_drawn_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot read .*log\.jsonl: No such file"):
        plot_run(tmp_path)
    (tmp_path / "log.jsonl").write_text('{"kind": "train", "step": 1, "loss": null}\n')
    with pytest.raises(CheckpointError, match="has no losses in its log yet"):
        plot_run(tmp_path)
    with pytest.raises(CheckpointError, match=r"its suffix must be one of \.png, \.pdf, \.svg"):
        plot_run(tmp_path, tmp_path / "curve.txt")
