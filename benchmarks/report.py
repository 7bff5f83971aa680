"""Turns a result file into the tables and pictures of the documentation.

``python -m benchmarks.report RESULT.json`` prints Markdown; with ``--write`` it replaces the text
between the two markers of a file, so that no number in the documentation is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import pictures, results, tables
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
            parts.append(markdown_table(table))
    return "\n\n".join([*parts, tables.legend(run)])


def markdown_table(table: tables.Table) -> str:
    """A table in Markdown, numbers aligned to the right."""
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


def write_between_markers(path: Path, content: str) -> None:
    """Replaces the tables of a file; MarkerError where it has no place for them."""
    text = replace_between_markers(path.read_text(encoding="utf-8"), content, str(path))
    path.write_text(text, encoding="utf-8")


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
    parser.add_argument(
        "--pictures", type=Path, metavar="DIR", help="draw ratios.png and roofline.png into DIR"
    )
    options = parser.parse_args(arguments)
    try:
        run = results.load(options.result)
        run.check_peak()
        content = markdown(run, options.detail)
        for path in options.write:
            write_between_markers(path, content)
        if options.pictures:
            pictures.draw_all(run, options.pictures)
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
