"""The rungs of the ladder are right, and its command says what it finds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from made_up import constant_timing, made_up_run
from rnnfast import _native

from benchmarks import ladder, report, results
from benchmarks.agreement import DisagreementError
from benchmarks.results import LayerResult
from benchmarks.shapes import Shape

AWKWARD = [
    (1, 1, 1, 1), (3, 7, 5, 3), (5, 3, 17, 16), (3, 2, 65, 33), (2, 130, 3, 5), (14, 9, 31, 40),
    (9, 20, 64, 64), (20, 1, 130, 17),
]  # fmt: skip


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Where the rungs are compiled, once for each instruction set."""
    return tmp_path_factory.mktemp("ladder")


@pytest.fixture
def rungs(built, monkeypatch):
    """Compiles and loads the rungs."""
    monkeypatch.setattr(ladder, "BUILD", built)
    return ladder.build


@pytest.mark.parametrize("isa", dict.fromkeys(["baseline", _native.build_info()["isa"]]))
def test_every_rung_is_right(isa, rungs):
    with _native.using_isa(isa):
        library = rungs()
        for sizes in AWKWARD:
            ladder.LadderProblem(Shape("LSTM", *sizes), library).check()


@pytest.mark.parametrize("name", ladder.RUNGS)
def test_a_wrong_rung_is_not_timed(name, rungs):
    problem = ladder.LadderProblem(Shape("LSTM", 7, 3, 5, 9), rungs())
    right = problem.calls[name]

    def wrong():
        right()
        problem.outputs[name]["y"][3, 1, 2] += 0.01

    for fault in (wrong, lambda: None):
        problem.calls[name] = fault
        with pytest.raises(DisagreementError, match=f"y of {name} is off"):
            problem.check()


def test_ladder_end_to_end(tmp_path, capsys, rungs):
    path, page = tmp_path / "ladder.json", tmp_path / "ladder.md"
    page.write_text(f"# Top\n{report.BEGIN}\nold\n{report.END}\nbottom\n", encoding="utf-8")
    shapes = "LSTM:2,3,4,5 LSTM:3,1,8,16"
    command = f"--shapes {shapes} --rounds 2 --json {path} --write {page}"
    threads = torch.get_num_threads()
    try:
        assert ladder.main(command.split()) == 0
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out.strip()
    assert page.read_text() == f"# Top\n{report.BEGIN}\n{printed}\n{report.END}\nbottom\n"
    measured = results.load(path)
    assert [str(layer.shape) for layer in measured.layers] == shapes.split()
    for layer in measured.layers:
        assert list(layer.timings) == list(ladder.RUNGS)
        assert all(len(timing.block_seconds) == 2 for timing in layer.timings.values())
    assert ladder.markdown(measured) == printed


def test_ladder_table_compares_with_the_rung_before():
    seconds = dict(zip(ladder.RUNGS, (0.4, 0.1, 0.05, 0.04, 0.02), strict=True))
    timings = {name: constant_timing(value) for name, value in seconds.items()}
    layer = LayerResult(timings, Shape("LSTM", 5, 2, 3, 4), "forward")
    rows = ladder.ladder_table(dataclasses.replace(made_up_run(), layers=[layer, layer])).rows
    # 2240 flops, on a machine of 100 GFLOP/s.
    assert rows[1][2:6] == ("100 ± 0.0%", "0.0000224", "0.0%", "4.00x")
    # The floor is 5 * 256 bytes at 10 GB/s.
    assert rows[5][2:5] == ("0.000128", "17.5", "18%")
    assert [row[5] for row in rows[:5]] == ["1.00x", "4.00x", "2.00x", "1.25x", "2.00x"]
    assert all(row[2:6] == row[6:] for row in rows)


@pytest.mark.parametrize("wrong", ["--shapes RNN:1,1,1,1", "--shapes LSTM:1", "--rounds 0"])
def test_ladder_refuses_wrong_arguments(wrong, capsys):
    with pytest.raises(SystemExit, match="2"):
        ladder.main(wrong.split())
    option = wrong.split()[0].removeprefix("--").removesuffix("s")
    assert option in capsys.readouterr().err.splitlines()[-1]


def test_a_ladder_that_does_not_compile_is_reported(built, monkeypatch, capsys):
    monkeypatch.setattr(ladder, "BUILD", built / "not")
    monkeypatch.setattr(ladder, "ROOT", built / "nowhere")
    assert ladder.main([]) == 1
    assert "failed:\nCMake Error" in capsys.readouterr().err
