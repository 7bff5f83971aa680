"""The tables of a run as rows of text, for the terminal and for Markdown alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .results import OWN_FLOAT32, OWN_FROZEN, LayerResult, Run
from .timing import Timing


@dataclass(frozen=True)
class Table:
    """Title, headings and rows; the first `labels` columns are words, the others numbers."""

    title: str
    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    labels: int = 1


# A heading, and what stands below it for a layer.
Column = tuple[str, Callable[[LayerResult], str]]


def layer_table(run: Run) -> Table:
    """Every measured number of every shape and mode."""

    def candidate(name: str) -> Column:
        heading = {"torch": "torch.nn"}.get(name, name) + " ms"
        return (
            heading,
            lambda result: time_and_spread(result.timings[name]) if name in result.timings else "",
        )

    columns: list[Column] = [
        ("T, B, I, H", _shape_name),
        ("mode", lambda result: result.mode),
        candidate("torch"),
        *(candidate(name) for name in run.other_peers),
        *([candidate(OWN_FLOAT32)] if run.has_own_float32 else []),
        candidate("rnnfast"),
        *([candidate(OWN_FROZEN)] if run.has_frozen else []),
        ("GFLOP/s", lambda result: significant(result.flops_per_second("rnnfast") / 1e9)),
        _share_of_peak(run),
        ("floor ms", lambda result: milliseconds(run.floor(result).seconds)),
        ("bound", lambda result: run.floor(result).bound),
        _share_of_floor(run),
        *_ratios(run, bool(run.other_peers)),
    ]
    rows = [tuple(cell(result) for _, cell in columns) for result in run.layers]
    return Table("One layer", tuple(heading for heading, _ in columns), rows, labels=2)


def _share_of_peak(run: Run) -> Column:
    return "of peak", lambda r: percent(r.flops_per_second("rnnfast") / run.peaks.flops)


def _share_of_floor(run: Run) -> Column:
    return "of floor", lambda r: percent(run.floor(r).seconds / r.timings["rnnfast"].median)


def _ratios(run: Run, with_peers: bool) -> list[Column]:
    return [
        ("faster", lambda result: times(result.ratio)),
        *([("than best", lambda result: times(result.ratio_to_best))] if with_peers else []),
        *([("frozen", _frozen_ratio)] if with_peers and run.has_frozen else []),
        *(
            [("than float32", lambda result: times(result.ratio_to_float32))]
            if run.has_own_float32
            else []
        ),
    ]


def _frozen_ratio(result: LayerResult) -> str:
    return times(result.frozen_ratio_to_best) if OWN_FROZEN in result.timings else ""


def time_and_spread(timing: Timing) -> str:
    """Median in milliseconds, and half the distance between the quartiles."""
    return f"{milliseconds(timing.median)} ± {percent(timing.spread / 2)}"


def summary_table(run: Run) -> Table:
    """One row per shape: times and ratios of each mode side by side."""
    by_shape: dict[str, dict[str, LayerResult]] = {}
    for result in run.layers:
        by_shape.setdefault(_shape_name(result), {})[result.mode] = result
    columns = {
        mode: _summary_columns(run, mode)
        for mode in dict.fromkeys(result.mode for result in run.layers)
    }
    headings = ["T, B, I, H"]
    for mode, (first, *rest) in columns.items():
        headings += [f"{mode}: {first[0]}", *(heading for heading, _ in rest)]
    rows = []
    for name, results in by_shape.items():
        row = [name]
        for mode, cells in columns.items():
            row += [cell(results[mode]) if mode in results else "" for _, cell in cells]
        rows.append(tuple(row))
    return Table("One layer", tuple(headings), rows)


def _summary_columns(run: Run, mode: str) -> list[Column]:
    # Only some modes are timed with more peers than torch.
    names = {name for result in run.layers if result.mode == mode for name in result.timings}
    with_peers = not names.isdisjoint(run.other_peers)

    def time(result: LayerResult, name: str) -> str:
        return milliseconds(result.timings[name].median)

    return [
        ("torch.nn ms", lambda result: time(result, "torch")),
        *([("best peer ms", lambda r: time(r, r.best_peer))] if with_peers else []),
        ("rnnfast ms", lambda result: time(result, "rnnfast")),
        *([_share_of_peak(run)] if run.has_own_float32 else []),
        _share_of_floor(run),
        *_ratios(run, with_peers),
    ]


def mean_table(run: Run) -> Table:
    """Geometric means of the ratios by cell and mode."""
    columns = {
        "faster": "ratio",
        **({"than best": "ratio_to_best"} if run.other_peers else {}),
        **({"frozen": "frozen_ratio_to_best"} if run.other_peers and run.has_frozen else {}),
        **({"than float32": "ratio_to_float32"} if run.has_own_float32 else {}),
    }
    means = [run.geometric_means(of) for of in columns.values()]
    rows = [
        (*kind, *(times(mean[kind]) if kind in mean else "" for mean in means))
        for kind in run.geometric_means()
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
    parts = [_LEGEND]
    if run.other_peers:
        peers = ", ".join(["torch.nn", *run.other_peers])
        parts.append(f"than best: time of the fastest of {peers} over time of rnnfast")
        if run.has_frozen:
            parts.append(
                "frozen: the same with weights promised to stay, as those of the peers are"
            )
    if run.has_own_float32:
        parts.append("than float32: time of rnnfast in float32 over its time in bfloat16")
    return "; ".join(parts) + "."


def caption(run: Run) -> str:
    """One sentence on the machine, the software and the way of timing."""
    environment, settings, peaks = run.environment, run.settings, run.peaks
    build = environment["rnnfast"]
    beside = ""
    if peaks.float32_flops:
        beside = f", in float32 {significant(peaks.float32_flops / 1e9)} GFLOP/s"
    peers = "".join(f"{name} {at}, " for name, at in environment.get("peers", {}).items())
    return (
        f"{environment['cpu']}, {_count(peaks.threads, 'thread')}, {peaks.dtype}, "
        f"torch {environment['torch']}, {peers}rnnfast {build['version']} with {build['isa']}, "
        f"{environment['date'][:10]}; measured peak "
        f"{significant(peaks.flops / 1e9)} GFLOP/s{beside}; "
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
