"""Turns a result file into the tables and the picture of the documentation.

``python -m benchmarks.report RESULT.json`` prints Markdown; with ``--write`` it replaces the text
between the two markers of a file, so that no number in the documentation is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import results, tables
from .results import Run

BEGIN = "<!-- benchmarks:begin -->"
END = "<!-- benchmarks:end -->"


class MarkerError(Exception):
    """A file has no place for the tables."""


def markdown(run: Run, detail: str = "summary") -> str:
    """The tables of a run in Markdown, with its caption first.

    Args:
        run: what was measured.
        detail: "summary" for one row per shape, "full" for one per shape and mode with all columns.
    """
    layer_table = {"summary": tables.summary_table, "full": tables.layer_table}[detail]
    parts = [tables.caption(run)]
    for table in (layer_table(run), tables.mean_table(run), tables.step_table(run)):
        if table.rows:
            parts.append(_markdown_table(table))
    return "\n\n".join([*parts, tables.legend(run)])


def _markdown_table(table: tables.Table) -> str:
    alignment = ["---" if column < table.labels else "--:" for column in range(len(table.headings))]
    lines = [table.headings, alignment, *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_between_markers(text: str, content: str, name: str) -> str:
    """`text` with everything between its two markers replaced by `content`.

    Raises:
        MarkerError: `text`, which is the file `name`, lacks a marker, repeats one, or has
            them in the wrong order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise MarkerError(f"{name}: expected one line {BEGIN} and after it one line {END}")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


def draw_chart(run: Run, path: Path) -> None:
    """Draws the ratio of every shape and mode as bars; the suffix of `path` picks the format."""
    # Only this needs matplotlib; its Figure draws to a file without choosing a display.
    from matplotlib.figure import Figure

    modes = list(dict.fromkeys(result.mode for result in run.layers))
    shapes = list(dict.fromkeys(result.shape for result in run.layers))
    height = 0.8 / len(modes)
    figure = Figure(figsize=(8, 1.2 + 0.42 * len(shapes)), layout="constrained")
    axes = figure.subplots()
    for index, mode in enumerate(modes):
        of_mode = [result for result in run.layers if result.mode == mode]
        rows = [
            shapes.index(result.shape) + (index - (len(modes) - 1) / 2) * height
            for result in of_mode
        ]
        bars = axes.barh(rows, [result.ratio for result in of_mode], height, label=mode)
        axes.bar_label(
            bars, [tables.times(result.ratio) for result in of_mode], padding=2, fontsize=7
        )
    axes.axvline(1, color="black", linewidth=1, zorder=0)
    axes.set_yticks(range(len(shapes)), [str(shape) for shape in shapes])
    axes.invert_yaxis()
    axes.set_xlabel("time of torch.nn / time of rnnfast (1: equal; longer bars: rnnfast is faster)")
    figure.suptitle(tables.caption(run), fontsize=8, wrap=True)
    axes.margins(x=0.08)
    figure.legend(loc="outside lower center", ncols=len(modes))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("result", type=Path, help="JSON written by benchmarks.run")
    parser.add_argument(
        "--write", type=Path, action="append", default=[], metavar="FILE",
        help="replace the text between the markers of FILE (may be given more than once)",
    )  # fmt: skip
    parser.add_argument(
        "--detail",
        choices=("summary", "full"),
        default="summary",
        help="columns of the layer table",
    )
    parser.add_argument("--chart", type=Path, metavar="FILE", help="draw the ratios as a picture")
    options = parser.parse_args(arguments)
    try:
        run = results.load(options.result)
        run.check_peak()
        content = markdown(run, options.detail)
        for path in options.write:
            text = replace_between_markers(path.read_text(encoding="utf-8"), content, str(path))
            path.write_text(text, encoding="utf-8")
        if options.chart:
            draw_chart(run, options.chart)
    except (
        results.ResultFileError,
        results.ImplausiblePeakError,
        MarkerError,
        OSError,
    ) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not options.write:
        print(content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
