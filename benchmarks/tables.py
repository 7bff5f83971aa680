"""The tables of a run as rows of text, for the terminal and for Markdown alike."""

from __future__ import annotations

from dataclasses import dataclass

from .results import LayerResult, Run
from .timing import Timing


@dataclass(frozen=True)
class Table:
    """Title, headings and rows; the first `labels` columns are words, the others numbers."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    labels: int = 1


def layer_table(run: Run) -> Table:
    """Every measured number of every shape and mode."""
    peers = run.other_peers
    headings = (
        "T, B, I, H", "mode", "torch.nn ms", *(f"{name} ms" for name in peers), "rnnfast ms",
        "GFLOP/s", "of peak", "floor ms", "bound", "of floor", "faster",
        *(["than best"] if peers else []),
    )  # fmt: skip
    rows = [_layer_row(run, result) for result in run.layers]
    return Table("One layer", headings, rows, labels=2)


def _layer_row(run: Run, result: LayerResult) -> tuple[str, ...]:
    ours = result.timings["rnnfast"]
    rate = result.flops_per_second("rnnfast")
    floor = run.floor(result)
    return (
        _shape_name(result),
        result.mode,
        time_and_spread(result.timings["torch"]),
        *(
            time_and_spread(result.timings[name]) if name in result.timings else ""
            for name in run.other_peers
        ),
        time_and_spread(ours),
        significant(rate / 1e9),
        percent(rate / run.peaks.flops),
        milliseconds(floor.seconds),
        floor.bound,
        percent(floor.seconds / ours.median),
        times(result.ratio),
        *([times(result.ratio_to_best)] if run.other_peers else []),
    )


def time_and_spread(timing: Timing) -> str:
    """Median in milliseconds, and half the distance between the quartiles."""
    return f"{milliseconds(timing.median)} ± {percent(timing.spread / 2)}"


def summary_table(run: Run) -> Table:
    """One row per shape: times and ratio of each mode side by side."""
    modes = list(dict.fromkeys(result.mode for result in run.layers))
    by_shape: dict[str, dict[str, LayerResult]] = {}
    for result in run.layers:
        by_shape.setdefault(_shape_name(result), {})[result.mode] = result
    # Only some modes are timed with more peers than torch.
    with_peers = {result.mode for result in run.layers if len(result.timings) > 2}
    headings = ["T, B, I, H"]
    for mode in modes:
        headings += [f"{mode}: torch.nn ms"] + ["best peer ms"] * (mode in with_peers)
        headings += ["rnnfast ms", "of floor", "faster"] + ["than best"] * (mode in with_peers)
    rows = []
    for name, results in by_shape.items():
        row = [name]
        for mode in modes:
            cells = 6 if mode in with_peers else 4
            row += _summary_cells(run, results[mode], cells) if mode in results else [""] * cells
        rows.append(tuple(row))
    return Table("One layer", tuple(headings), rows)


def _summary_cells(run: Run, result: LayerResult, cells: int) -> list[str]:
    ours = result.timings["rnnfast"].median
    best = milliseconds(result.timings[result.best_peer].median)
    share = percent(run.floor(result).seconds / ours)
    torch_time = milliseconds(result.timings["torch"].median)
    if cells == 4:
        return [torch_time, milliseconds(ours), share, times(result.ratio)]
    ratios = [times(result.ratio), times(result.ratio_to_best)]
    return [torch_time, best, milliseconds(ours), share, *ratios]


def mean_table(run: Run) -> Table:
    """Geometric mean of the ratios by cell and mode."""
    to_best = run.geometric_means(to_best=True)
    columns = ["faster"] + ["than best"] * bool(run.other_peers)
    rows = [
        (*kind, *[times(mean), times(to_best[kind])][: len(columns)])
        for kind, mean in run.geometric_means().items()
    ]
    return Table("Geometric means", ("cell", "mode", *columns), rows, labels=2)


def step_table(run: Run) -> Table:
    """Training steps of language models in tokens per second."""
    rows = []
    for result in run.steps:
        size = result.size
        rows.append(
            (
                size.name,
                f"{size.bptt}, {size.batch}, {size.vocabulary}",
                thousands(result.tokens_per_second("torch")),
                thousands(result.tokens_per_second("rnnfast")),
                times(result.ratio),
            )
        )
    headings = (
        "language model", "bptt, batch, vocabulary", "torch.nn tokens/s", "rnnfast tokens/s",
        "faster",
    )  # fmt: skip
    return Table("One training step", headings, rows, labels=2)


_LEGEND = (
    "T steps, B batch rows, I input size, H hidden size; ±: half the distance between the "
    "quartiles of the rounds; of peak: arithmetic rate of rnnfast over the measured peak; of "
    "floor: the least time that arithmetic and reading W_hh from cache allow, over the time of "
    "rnnfast; faster: time of torch.nn over time of rnnfast"
)


def legend(run: Run) -> str:
    """What the headings mean."""
    if not run.other_peers:
        return _LEGEND + "."
    peers = ", ".join(["torch.nn", *run.other_peers])
    return f"{_LEGEND}; than best: time of the fastest of {peers} over time of rnnfast."


def caption(run: Run) -> str:
    """One sentence on the machine, the software and the way of timing."""
    environment, settings, peaks = run.environment, run.settings, run.peaks
    build = environment["rnnfast"]
    peers = "".join(f"{name} {at}, " for name, at in environment.get("peers", {}).items())
    return (
        f"{environment['cpu']}, {_count(peaks.threads, 'thread')}, {peaks.dtype}, "
        f"torch {environment['torch']}, {peers}rnnfast {build['version']} with {build['isa']}, "
        f"{environment['date'][:10]}; measured peak "
        f"{significant(peaks.flops / 1e9)} GFLOP/s; "
        f"medians of {_count(settings['rounds'], 'round')}."
    )


def _shape_name(result: LayerResult) -> str:
    shape = result.shape
    return f"{shape.cell} {shape.steps}, {shape.batch}, {shape.input_size}, {shape.hidden_size}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def significant(value: float) -> str:
    """Three significant digits without an exponent."""
    if value == 0:
        return "0"
    digits = f"{value:#.3g}"
    return f"{float(digits):.0f}" if "e+" in digits else _plain(value, digits)


def _plain(value: float, digits: str) -> str:
    if "e-" not in digits:
        return digits.rstrip(".")
    decimals = int(digits.split("e-")[1]) + 2
    return f"{value:.{decimals}f}"


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds with three significant digits."""
    return significant(seconds * 1e3)


def percent(fraction: float) -> str:
    """A fraction in whole percent, with a digit more below ten."""
    value = 100 * fraction
    return f"{value:.0f}%" if value >= 10 else f"{value:.1f}%"


def times(value: float) -> str:
    """A ratio with two decimals."""
    return f"{value:.2f}x"


def thousands(value: float) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,.0f}"
