"""What is reported of benchmarks: tables, pictures and files, from made-up numbers."""

from __future__ import annotations

import dataclasses

import pytest
from made_up import constant_timing, made_up_run

from benchmarks import (
    pictures,
    report,
    results,
    tables,
)
from benchmarks.peaks import Peaks


def test_geometric_means_by_cell_and_mode():
    means = made_up_run().geometric_means()
    assert list(means) == [("LSTM", "forward"), ("LSTM", "training"), ("RNN", "forward")]
    # Ratios 2 and 8, then 4 and 3 alone.
    assert list(means.values()) == pytest.approx([4.0, 4.0, 3.0])


def test_full_table_row():
    row = tables.layer_table(made_up_run()).rows[0]
    # 2 T B G H (I + H) = 2240 flops in 0.1 s; floor 5 * 256 bytes at 10 GB/s.
    assert row == (
        "LSTM 5, 2, 3, 4", "forward", "200 ± 0.0%", "100 ± 0.0%", "0.0000224", "0.0%",
        "0.000128", "bandwidth", "0.0%", "2.00x",
    )  # fmt: skip


def test_summary_puts_modes_side_by_side():
    table = tables.summary_table(made_up_run())
    assert len(table.headings) == 9
    assert all(len(row) == 9 for row in table.rows)
    assert table.rows[0][4] == "2.00x"
    assert table.rows[0][8] == "4.00x"
    assert table.rows[2] == ("RNN 5, 2, 3, 4", "300", "100", "0.0%", "3.00x", "", "", "", "")


def run_with_peers():
    """The made-up run with OpenVINO forward: 0.15 s for the first shape, the best peer there."""
    run = made_up_run()
    timings = {"torch": constant_timing(0.2), "openvino": constant_timing(0.15)}
    timings["rnnfast"] = constant_timing(0.1)
    first = dataclasses.replace(run.layers[0], timings=timings)
    return dataclasses.replace(run, layers=[first, *run.layers[1:]])


def test_tables_of_peers():
    run = run_with_peers()
    assert run.layers[0].best_peer == "openvino"
    assert run.layers[1].best_peer == "torch"
    table = tables.layer_table(run)
    assert table.headings[2:5] == ("torch.nn ms", "openvino ms", "rnnfast ms")
    assert table.headings[-2:] == ("faster", "than best")
    assert table.rows[0][2:5] == ("200 ± 0.0%", "150 ± 0.0%", "100 ± 0.0%")
    assert table.rows[0][-2:] == ("2.00x", "1.50x")
    assert table.rows[1][3] == ""
    assert table.rows[1][-2:] == ("4.00x", "4.00x")
    assert all(len(row) == len(table.headings) for row in table.rows)
    summary = tables.summary_table(run)
    assert summary.rows[0][:7] == ("LSTM 5, 2, 3, 4", "200", "150", "100", "0.0%", "2.00x", "1.50x")
    assert summary.rows[0][7:] == ("400", "100", "0.0%", "4.00x")
    assert all(len(row) == len(summary.headings) for row in summary.rows)
    # Ratios to the best: 1.5 and 8; training 4.
    assert tables.mean_table(run).rows[0] == ("LSTM", "forward", "4.00x", "3.46x")
    assert "the fastest of torch.nn, openvino" in tables.legend(run)
    assert "fastest" not in tables.legend(made_up_run())


def test_tables_of_frozen_weights():
    run = run_with_peers()
    timings = {**run.layers[0].timings, results.OWN_FROZEN: constant_timing(0.05)}
    first = dataclasses.replace(run.layers[0], timings=timings)
    run = dataclasses.replace(run, layers=[first, *run.layers[1:]])
    assert run.other_peers == ["openvino"]
    table = tables.layer_table(run)
    assert table.headings[4:6] == ("rnnfast ms", "rnnfast frozen ms")
    assert table.headings[-2:] == ("than best", "frozen")
    assert table.rows[0][-2:] == ("1.50x", "3.00x")
    assert table.rows[1][-2:] == ("4.00x", "")
    means = tables.mean_table(run)
    assert means.headings[-1] == "frozen"
    # Training is not timed with frozen weights, nor are here the other layers forward.
    assert [row[-1] for row in means.rows] == ["3.00x", "", ""]
    assert "promised to stay" in tables.legend(run)


def run_in_bfloat16():
    """The made-up run in bfloat16, twice as fast as its own float32."""
    run = made_up_run()
    layers = [
        dataclasses.replace(
            result, timings={**result.timings, results.OWN_FLOAT32: constant_timing(0.2)}
        )
        for result in run.layers
    ]
    peaks = Peaks(2, "bfloat16", flops=1e11, bandwidth={128: 1e10, 32: 1e10}, float32_flops=5e10)
    return dataclasses.replace(run, layers=layers, peaks=peaks)


def test_tables_of_bfloat16(tmp_path):
    run = run_in_bfloat16()
    assert run.other_peers == []
    assert {result.best_peer for result in run.layers} == {"torch"}
    table = tables.layer_table(run)
    assert table.headings[2:5] == ("torch.nn ms", "rnnfast float32 ms", "rnnfast ms")
    # The floor reads W_hh as it is stored: 5 * 128 bytes at 10 GB/s.
    assert table.rows[0] == (
        "LSTM 5, 2, 3, 4", "forward", "200 ± 0.0%", "200 ± 0.0%", "100 ± 0.0%", "0.0000224",
        "0.0%", "0.0000640", "bandwidth", "0.0%", "2.00x", "2.00x",
    )  # fmt: skip
    summary = tables.summary_table(run)
    assert summary.headings[3:7] == ("of peak", "of floor", "faster", "than float32")
    ratios = ("2.00x", "2.00x")
    assert summary.rows[0][:7] == ("LSTM 5, 2, 3, 4", "200", "100", "0.0%", "0.0%", *ratios)
    assert all(len(row) == len(summary.headings) for row in summary.rows)
    assert tables.mean_table(run).rows[0] == ("LSTM", "forward", "4.00x", "2.00x")
    assert "measured peak 100 GFLOP/s, in float32 50.0 GFLOP/s;" in tables.caption(run)
    assert "than float32: " in tables.legend(run)
    assert "than float32" not in tables.legend(made_up_run())
    results.save(run, tmp_path / "run.json")
    assert results.load(tmp_path / "run.json") == run


def test_step_table_is_in_tokens_per_second():
    (row,) = tables.step_table(made_up_run()).rows
    assert row == ("word LSTM", "5, 4, 11", "1,000", "2,000", "2.00x")


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.01234, "0.0123"), (0.00001234, "0.0000123"), (1, "1.00"), (24.06, "24.1"),
     (217.6, "218"), (999.6, "1000"), (1234, "1230")],
)  # fmt: skip
def test_significant_digits(value, text):
    assert tables.significant(value) == text


def test_saved_runs_are_read_back(tmp_path):
    results.save(made_up_run(), tmp_path / "run.json")
    assert results.load(tmp_path / "run.json") == made_up_run()


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 99}', "\N{SNOWMAN}"])
def test_other_files_are_refused(tmp_path, capsys, content):
    path = tmp_path / "run.json"
    path.write_text(content, encoding="utf-16" if content == "\N{SNOWMAN}" else "utf-8")
    assert report.main([str(path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {path}: ")
    assert captured.err.count("\n") == 1


def test_report_replaces_only_the_text_between_markers(tmp_path, capsys):
    results.save(made_up_run(), tmp_path / "run.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"# Top\n{report.BEGIN}\nold\n{report.END}\nbottom\n", encoding="utf-8")
    for _ in range(2):
        assert report.main([str(tmp_path / "run.json"), "--write", str(readme)]) == 0
        text = readme.read_text(encoding="utf-8")
        assert text.startswith(f"# Top\n{report.BEGIN}\nAbacus, 2 threads, float32, torch 2.0, ")
        assert text.endswith(f"\n{report.END}\nbottom\n")
        assert "old" not in text
        assert text.count("| LSTM 5, 2, 3, 4 |") == 1
    assert capsys.readouterr().out == ""
    assert report.main([str(tmp_path / "run.json")]) == 0
    assert capsys.readouterr().out.strip() in text


@pytest.mark.parametrize(
    "text",
    ["", report.BEGIN, f"{report.END}{report.BEGIN}", f"{report.BEGIN}{report.BEGIN}{report.END}"],
)
def test_files_without_a_place_for_the_tables_are_left_alone(tmp_path, capsys, text):
    results.save(made_up_run(), tmp_path / "run.json")
    readme = tmp_path / "README.md"
    readme.write_text(text, encoding="utf-8")
    assert report.main([str(tmp_path / "run.json"), "--write", str(readme)]) == 1
    assert readme.read_text(encoding="utf-8") == text
    assert capsys.readouterr().err.startswith(f"error: {readme}: expected one line")


def test_a_peak_below_what_was_reached_is_reported(tmp_path, capsys):
    sound = made_up_run()
    sound.check_peak()
    # The first layer does 2240 flops in 0.1 s.
    too_low = dataclasses.replace(sound, peaks=dataclasses.replace(sound.peaks, flops=2e4))
    with pytest.raises(results.ImplausiblePeakError, match="112% of the measured peak"):
        too_low.check_peak()
    results.save(too_low, tmp_path / "run.json")
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}{report.END}", encoding="utf-8")
    assert report.main([str(tmp_path / "run.json"), "--write", str(readme)]) == 1
    assert "too low" in capsys.readouterr().err
    assert readme.read_text(encoding="utf-8") == f"{report.BEGIN}{report.END}"


def test_the_roofline_has_a_ceiling_for_each_format():
    pytest.importorskip("matplotlib")
    for axes in pictures.draw_roofline(run_in_bfloat16()).axes:
        levels = {line.get_label(): tuple(line.get_ydata()) for line in axes.lines}
        assert levels["100 GFLOP/s, bfloat16"] == (100, 100)
        assert levels["50 GFLOP/s, float32"] == (50, 50)


@pytest.mark.parametrize(
    "make", [made_up_run, run_with_peers, run_in_bfloat16], ids=lambda make: make.__name__
)
def test_pictures_show_every_layer(make):
    pytest.importorskip("matplotlib")
    run = make()
    bars = [bar for axes in pictures.draw_ratios(run).axes for bar in axes.patches]
    ends = [bar.get_x() + bar.get_width() for bar in bars]
    assert sorted(ends) == pytest.approx(sorted(result.ratio for result in run.layers))
    for axes in pictures.draw_roofline(run).axes:
        mode = axes.get_title()
        reached = {line.get_ydata()[0] for line in axes.lines if len(line.get_ydata()) == 1}
        for result in run.layers:
            if result.mode == mode:
                assert result.flops_per_second("rnnfast") / 1e9 in reached


def test_pictures_are_written_beside_the_tables(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    results.save(run_with_peers(), tmp_path / "run.json")
    assert report.main([str(tmp_path / "run.json"), "--pictures", str(tmp_path)]) == 0
    assert "| LSTM 5, 2, 3, 4 |" in capsys.readouterr().out
    for name in ("ratios.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
