"""The demonstration runs, and its two candidates do the same work."""

from __future__ import annotations

import re

from benchmarks import demo


def test_the_demonstration_trains_writes_and_compares(tmp_path, capsys):
    text = tmp_path / "text"
    text.write_text("the cat sat on the mat\n" * 200)
    arguments = ["--minutes", "0.01", "--rounds", "2", "--data", str(text)]
    assert demo.main([*arguments, "--save", str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "sample:\n" in out
    assert re.search(r"Validation perplexity: \d+\.\d\d", out)
    losses = re.findall(r"(rnnfast|torch) +[\d.]+ ms +[\d,]+ tokens/s  loss .* (\d\.\d+)\n", out)
    assert [name for name, _ in losses] == ["rnnfast", "torch"]
    # One unit of the last digit shown, where rounding falls differently.
    assert abs(float(losses[0][1]) - float(losses[1][1])) < 2e-5
    assert re.search(r"rnnfast takes \d+\.\d\d times as many steps", out)
