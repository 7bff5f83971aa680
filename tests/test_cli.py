"""The command line: what it prints where, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rnnfast import __main__ as program
from rnnfast import cli
from rnnfast.training import RunDirectory
from rnnfast.training.checkpoint import read_checkpoint

SMALL = ["--nhid", "8", "--nlayers", "1", "--bptt", "8", "--batch-size", "4", "--max-steps", "6"]
SMALL += ["--eval-interval", "3"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("the cat sat on the mat\nthe dog sat on the cat\n" * 20)
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """A finished run, not to be changed."""
    directory = tmp_path_factory.mktemp("runs") / "trained"
    assert cli.main(["train", "--data", str(text), "--save", str(directory), *SMALL]) == 0
    return directory


@pytest.fixture
def run(trained, tmp_path):
    """A copy of the finished run, to do anything with."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def rnnfast(capfd):
    """Runs a command line in this process; returns its status, standard output and error."""

    def call(*arguments):
        status = cli.main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return call


def refused(result, message, status=1):
    """An error is one line on standard error and nothing else."""
    assert result[0] == status
    assert result[1] == ""
    assert result[2].count("\n") == 1
    assert re.search(message, result[2]), result[2]


def test_training_tells_what_it_does(rnnfast, text, tmp_path):
    status, out, err = rnnfast("train", "--data", text, "--save", tmp_path / "run", *SMALL)
    assert (status, err) == (0, "")
    for part in ("parameters  ", "vocabulary  ", "tokens  ", "backend     rnnfast, ISA "):
        assert part in out
    assert re.search(r"test loss \d", out)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "log.jsonl", "last.safetensors", "best.safetensors"}


@pytest.mark.parametrize(
    "flags",
    [
        "--model rnn --nonlinearity relu --level byte --optimizer sgd --lr 0.1 --clip 0",
        "--level word --vocab-size 5 --tied --dropout 0.1 --schedule cosine --epochs 1",
        "--model lstm --memory low",
        "--backend torch --dtype float64 --emsize 4 --seed 3 --device cpu --max-minutes 1",
        "--backend reference --eval-tokens 10 --log-interval 1",
    ],
)
def test_every_flag_of_train_is_stored_with_the_run(rnnfast, text, tmp_path, flags):
    arguments = [*SMALL, *flags.split()]
    status, _, err = rnnfast("train", "--data", text, "--save", tmp_path / "run", *arguments)
    assert (status, err) == (0, "")
    settings = RunDirectory(tmp_path / "run").read_record().settings.to_json()
    flag = None
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument[2:].replace("-", "_")
            if flag == "tied":
                assert settings["tied"] is True
        else:
            assert str(settings[flag]) in (argument, f"{argument}.0")
    assert rnnfast("generate", tmp_path / "run", "--length", 5)[0] == 0


@pytest.mark.parametrize("arguments", [[], ["--help"], ["train", "--help"]])
def test_help_is_printed(rnnfast, arguments):
    status, out, err = rnnfast(*arguments)
    assert (status, err) == (0, "")
    assert "Usage: rnnfast" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "No such command 'fly'"),
        (["train", "--wings"], "No such option: --wings"),
        (["train", "--model", "gru"], "Invalid value for '--model'"),
        (["train", "--bptt", "many"], "Invalid value for '--bptt'"),
        (["train", "extra"], "unexpected extra argument"),
        (["eval"], "Missing argument 'RUN'"),
        (["generate", "run", "--length"], "--length"),
    ],
)
def test_a_wrong_command_line_is_one_line(rnnfast, arguments, message):
    refused(rnnfast(*arguments), message, status=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--bidirectional"], "bidirectional makes no sense for a language model"),
        (["--tied", "--emsize", "3"], "tied weights need emsize == nhid; emsize is 3"),
        (["--lr", "0"], r"lr is 0\.0; it must be above 0"),
        (["--dropout", "1.5"], r"dropout is 1\.5"),
        (["--nhid", "0"], "nhid is 0; it must be at least 1"),
        (["--device", "cuda:99"], "device is 'cuda:99'|CUDA"),
        (["--resume"], "--resume needs --save RUN"),
        (["--data", "no-such-file"], "cannot read data file .*no-such-file: No such file"),
        (["--data", "/"], "cannot read data file /: Is a directory"),
        (["--data", "/dev/null"], "data file /dev/null is empty"),
        (["--batch-size", "100000"], "too short for batch_size 100000"),
    ],
)
def test_settings_that_can_not_be_are_one_line(
    rnnfast, text, tmp_path, monkeypatch, flags, message
):
    monkeypatch.chdir(tmp_path)
    refused(rnnfast("train", "--data", text, *flags), message)


def test_a_text_that_is_not_utf8_is_refused_but_at_the_byte_level(rnnfast, tmp_path):
    (tmp_path / "latin").write_bytes(b"d\xe9j\xe0 vu " * 100)
    arguments = ["train", "--data", tmp_path / "latin", "--save", tmp_path / "run", *SMALL]
    refused(rnnfast(*arguments), r"latin is not UTF-8 text \(byte 1 is 0xe9\)")
    assert rnnfast(*arguments, "--level", "byte")[0] == 0


def test_a_run_is_not_overwritten(rnnfast, text, run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    refused(rnnfast("train", "--data", text, "--save", run), "run already holds a run; --resume")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_run_is_resumed_with_its_own_settings(rnnfast, run):
    status, out, err = rnnfast("train", "--save", run, "--resume", "--max-steps", 9)
    assert (status, err) == (0, "")
    assert "step limit reached at step 9" in out
    refused(
        rnnfast("train", "--save", run, "--resume", "--nhid", 9),
        "nhid is 9, but the run to resume has 8 and keeps it",
    )
    refused(
        rnnfast("train", "--save", run / "none", "--resume"), r"none is not a run: it has no run"
    )


def test_a_run_can_not_go_where_nothing_can_be_written(rnnfast, text, tmp_path):
    (tmp_path / "file").touch()
    refused(
        rnnfast("train", "--data", text, "--save", tmp_path / "file" / "run", *SMALL),
        "cannot make directory .*: Not a directory",
    )


def test_eval_scores_the_test_split_or_a_text(rnnfast, run, text):
    status, out, err = rnnfast("eval", run)
    assert (status, err) == (0, "")
    logged = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    test_loss = next(entry["loss"] for entry in logged if entry["kind"] == "test")
    assert f"loss {test_loss:.4f}  perplexity " in out
    assert out.count("\n") == 1
    status, out, err = rnnfast("eval", run, "--data", text, "--data", text, "--backend", "torch")
    assert (status, err) == (0, "")
    assert f"tokens {2 * len(text.read_text()):,}  unknown 0.00%" in out


def test_eval_of_what_can_not_be_scored_is_one_line(rnnfast, run, text, tmp_path):
    refused(rnnfast("eval", tmp_path), r"is not a run: it has no run\.json")
    refused(rnnfast("eval", run, "--data", tmp_path / "none"), "cannot read data file .*none")
    (tmp_path / "one").write_text("a")
    refused(rnnfast("eval", run, "--data", tmp_path / "one"), "a text of 1 tokens predicts nothing")
    for name, content in [("best", b""), ("last", (run / "last.safetensors").read_bytes()[:-9])]:
        (run / f"{name}.safetensors").write_bytes(content)
        refused(rnnfast("eval", run, "--checkpoint", name), "is truncated or damaged")
    (run / "best.safetensors").unlink()
    refused(rnnfast("eval", run), r"there is no checkpoint .*best\.safetensors")


def test_eval_notices_that_the_text_of_the_run_has_changed(rnnfast, run, text, tmp_path):
    changed = tmp_path / "text"
    changed.write_text(text.read_text()[:-20] + "x" * 20)
    record = json.loads((run / "run.json").read_text())
    record["settings"]["data"] = [str(changed)]
    (run / "run.json").write_text(json.dumps(record))
    refused(rnnfast("eval", run), "is no longer the text that .* was trained on")


def test_generate_prints_the_text_alone(rnnfast, run):
    arguments = ["generate", run, "--length", 30, "--seed", 4]
    status, out, err = rnnfast(*arguments, "--prime", "the cat")
    assert (status, err) == (0, "")
    assert out.startswith("the cat")
    assert len(out) in (37, 38)
    assert out.endswith("\n")
    assert rnnfast(*arguments, "--prime", "the cat")[1] == out
    assert rnnfast(*arguments[:-1], 5, "--prime", "the cat")[1] != out
    assert rnnfast(*arguments)[1] != out


def test_generate_without_a_seed_tells_the_one_it_took(rnnfast, run):
    status, out, err = rnnfast("generate", run, "--length", 40)
    assert status == 0
    seed = re.fullmatch(r"rnnfast: seed (\d+)\n", err).group(1)
    assert rnnfast("generate", run, "--length", 40, "--seed", seed)[1] == out


def test_generate_marks_several_samples_on_standard_error(rnnfast, run):
    arguments = ["generate", run, "--length", 9, "--seed", 1, "--num-samples", 3]
    status, out, err = rnnfast(*arguments, "--temperature", 0, "--prime", "a")
    assert status == 0
    assert err.splitlines() == [f"rnnfast: sample {number} of 3" for number in (1, 2, 3)]
    # At temperature zero all are the same.
    assert len(out) % 3 == 0
    assert out == 3 * out[: len(out) // 3]


def test_generate_limits_what_is_drawn(rnnfast, run):
    arguments = ["generate", run, "--length", 40, "--seed", 1]
    greedy = rnnfast(*arguments, "--temperature", 0)[1]
    assert rnnfast(*arguments, "--top-k", 1)[1] == greedy
    assert rnnfast(*arguments, "--top-p", 1e-9)[1] == greedy
    assert rnnfast(*arguments)[1] != greedy


def test_generate_tells_of_an_unknown_prime(rnnfast, run):
    status, out, err = rnnfast("generate", run, "--prime", "Zt", "--seed", 1, "--length", 3)
    assert status == 0
    assert out.startswith("\N{REPLACEMENT CHARACTER}t")
    assert err == "rnnfast: 1 of the 2 tokens of --prime are unknown to the model\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "-1"], r"temperature is -1\.0"),
        (["--top-k", "0"], "top_k is 0"),
        (["--top-p", "2"], r"top_p is 2\.0"),
        (["--length", "-1"], "length is -1"),
        (["--num-samples", "0"], "num_samples is 0"),
        (["--device", "toaster"], "device is 'toaster'"),
        (["--checkpoint", "best", "--seed", "-1"], "seed is -1; it must be at least 0"),
    ],
)
def test_generate_refuses_values_out_of_range(rnnfast, run, flags, message):
    refused(rnnfast("generate", run, "--seed", "1", *flags), message)


def test_a_byte_model_writes_bytes(rnnfast, text, tmp_path):
    arguments = ["--data", text, "--save", tmp_path / "run", "--level", "byte", *SMALL]
    assert rnnfast("train", *arguments)[0] == 0
    flags = ["--seed", "1", "--temperature", "50", "--length", "200", "--prime", b"\xff"]
    result = subprocess.run(
        [sys.executable, "-m", "rnnfast", "generate", tmp_path / "run", *flags],
        capture_output=True,
        check=True,
        env=environment(),
    )
    # So hot that all 256 bytes come, and UTF-8 would have made more of 200 of them.
    assert len(result.stdout) in (201, 202)
    assert result.stdout[:1] == b"\xff"
    assert result.stderr == b""


def test_info_says_what_was_built(rnnfast):
    status, out, err = rnnfast("info")
    assert (status, err) == (0, "")
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())
    assert {"version", "compiler", "isa", "isas_built", "openmp", "torch", "threads"} <= set(lines)


def test_plot_draws_the_loss(rnnfast, run, tmp_path):
    status, out, err = rnnfast("plot", run)
    assert (status, out, err) == (0, f"{run / 'loss.png'}\n", "")
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    refused(rnnfast("plot", tmp_path), r"cannot read .*log\.jsonl")
    refused(rnnfast("plot", run, "--output", tmp_path / "none" / "x.png"), "cannot write .*x.png")


def test_errors_come_with_their_traceback_on_demand(monkeypatch, tmp_path):
    monkeypatch.setenv("RNNFAST_TRACEBACK", "1")
    with pytest.raises(ValueError, match="is not a run"):
        cli.main(["eval", str(tmp_path)])


@pytest.mark.parametrize("missing", ["typer", "safetensors", "rich"])
def test_a_missing_extra_is_one_line(monkeypatch, capsys, missing):
    # A module that stands as None in sys.modules is one that can not be found.
    for name in list(sys.modules):
        if name.startswith(("rnnfast.cli", "rnnfast.training", "rich")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert program.main() == 1
    captured = capsys.readouterr()
    assert captured.err == (
        f"rnnfast: the command line needs {missing}: pip install 'rnnfast[cli]'\n"
    )
    assert captured.out == ""


def test_a_missing_library_of_one_command_is_one_line(monkeypatch, rnnfast, text, run, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(rnnfast("plot", run), r"plots need matplotlib: pip install 'rnnfast\[cli\]'")
    refused(
        rnnfast("train", "--data", text, "--save", tmp_path / "word", "--level", "word"),
        r"word vocabularies need the tokenizers library: pip install 'rnnfast\[cli\]'",
    )


def environment():
    """This process's environment, with the package it tests and one thread."""
    import rnnfast

    path = os.pathsep.join(
        [str(Path(rnnfast.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def started(*arguments, **options):
    """The program in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "rnnfast", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        **options,
    )


def test_ctrl_c_saves_and_evaluates_and_the_run_goes_on(rnnfast, text, tmp_path):
    flags = ["--nhid", 8, "--bptt", 8, "--batch-size", 4, "--epochs", 100000, "--log-interval", 1]
    process = started("train", "--data", text, "--save", tmp_path / "run", *flags)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 60
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == ""
    step = int(re.search(r"interrupted at step (\d+); run saved in", out).group(1))
    assert re.search(r"test loss \d", out)
    assert "sample:\n" in out
    _, record = read_checkpoint(tmp_path / "run" / "last.safetensors")
    assert record["position"]["step"] == step
    resumed = rnnfast("train", "--save", tmp_path / "run", "--resume", "--max-steps", step + 1)
    assert resumed[0] == 0
    assert f"step limit reached at step {step + 1}" in resumed[1]


def test_a_full_disk_is_one_line_and_loses_nothing(run):
    before = {path.name: path.read_bytes() for path in run.iterdir()}

    def limit():
        # The system refuses to write more than this into a file: less than a checkpoint.
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))

    process = started("train", "--save", run, "--resume", "--max-steps", "9", preexec_fn=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.count("\n") == 1
    assert re.search(r"error: cannot write .*\.safetensors: File too large; what was there", err)
    after = {path.name: path.read_bytes() for path in run.iterdir()}
    assert before.keys() == after.keys()
    assert all(before[name] == after[name] for name in before if name.endswith("safetensors"))


def test_a_reader_that_goes_away_is_no_error(run):
    process = started("generate", run, "--seed", "1", "--length", "2000")
    process.stdout.close()
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=60) == 1
