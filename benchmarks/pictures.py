"""The pictures of a run: how much faster than whom, and how close to the machine's limits."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from . import tables
from .peaks import ITEMSIZE
from .results import LayerResult, Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "LSTM": "tab:blue",
    "RNN": "tab:orange",
    "LSTMCell": "tab:cyan",
    "RNNCell": "tab:olive",
}
DPI = 90


def draw_all(run: Run, directory: Path) -> None:
    """Writes ratios.png and roofline.png."""
    draw_ratios(run).savefig(directory / "ratios.png", dpi=DPI)
    draw_roofline(run).savefig(directory / "roofline.png", dpi=DPI)


def draw_ratios(run: Run) -> Figure:
    """Time of torch.nn over time of rnnfast as bars from 1, with a mark for the best peer."""
    modes, shapes = _modes(run), list(dict.fromkeys(result.shape for result in run.layers))
    figure, panels = _panels(run, len(modes), height=1.4 + 0.2 * len(shapes))
    for axes, mode in zip(panels, modes, strict=True):
        results = [result for result in run.layers if result.mode == mode]
        rows = [shapes.index(result.shape) for result in results]
        ratios = [result.ratio for result in results]
        bars = axes.barh(
            rows,
            [ratio - 1 for ratio in ratios],
            left=1,
            color=[COLORS[result.shape.cell] for result in results],
        )
        if run.other_peers:
            to_best = [result.ratio_to_best for result in results]
            axes.plot(to_best, rows, "k|", markersize=7, label="best peer / rnnfast")
        axes.set_xscale("log")
        low, high = min([0.8, *ratios]), max([1.25, *ratios])
        if run.other_peers:
            low = min(low, *to_best)
        axes.set_xlim(low / 1.1, high * 1.5)
        ticks = [tick for tick in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if low / 1.1 <= tick <= high]
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        for bar, row, ratio in zip(bars, rows, ratios, strict=True):
            end = max(ratio, 1) * 1.04
            height = bar.get_height() / 2
            axes.text(end, row + height / 4, tables.times(ratio), fontsize=7, va="center")
        axes.axvline(1, color="black", linewidth=1)
        axes.set_yticks(range(len(shapes)), [_words(shape) for shape in shapes], fontsize=7)
        axes.set_ylim(len(shapes) - 0.4, -0.6)
        axes.set_xlabel("torch.nn time / rnnfast time", fontsize=8)
        axes.set_title(mode, fontsize=9)
    if run.other_peers:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", fontsize=8)
    for axes in panels[1:]:
        axes.set_yticklabels([])
    return figure


def draw_roofline(run: Run) -> Figure:
    """Arithmetic rate of every layer over its arithmetic per byte of W_hh, under the ceilings.

    A ring is the ceiling of a layer: the FMA peak, or the bandwidth measured for the size of its
    W_hh. A line joins it to what rnnfast reached, a dot. Layers of equal intensity, which is to say
    of equal batch size where I = H, stand side by side.
    """
    modes = _modes(run)
    figure, panels = _panels(run, len(modes), height=4.2)
    for axes, mode in zip(panels, modes, strict=True):
        results = [result for result in run.layers if result.mode == mode]
        xs = _side_by_side([_intensity(run, result) for result in results])
        _draw_ceilings(axes, run, min(xs) / 2, max(xs) * 2)
        for result, x in zip(results, xs, strict=True):
            color = COLORS[result.shape.cell]
            reached = result.flops_per_second("rnnfast") / 1e9
            ceiling = result.shape.flops(mode) / run.floor(result).seconds / 1e9
            axes.plot([x, x], [reached, ceiling], color=color, linewidth=0.7)
            axes.plot(x, ceiling, "o", markersize=5, markerfacecolor="none", color=color)
            axes.plot(x, reached, "o", markersize=4, color=color)
            axes.plot(x, result.flops_per_second("torch") / 1e9, "x", markersize=4, color="gray")
        axes.set(xscale="log", yscale="log")
        axes.set_title(mode, fontsize=9)
        axes.set_xlabel("flops per byte of W_hh that is read", fontsize=8)
    panels[0].set_ylabel("GFLOP/s", fontsize=8)
    for cell in dict.fromkeys(result.shape.cell for result in run.layers):
        panels[0].plot([], [], "o", color=COLORS[cell], label=f"{cell} by rnnfast")
    panels[0].plot([], [], "o", markerfacecolor="none", color="black", label="its ceiling")
    panels[0].plot([], [], "x", color="gray", label="torch.nn")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8
    )
    return figure


def _side_by_side(xs: list[float]) -> list[float]:
    """The same values, equal ones spread a little around theirs."""
    places = []
    for n, x in enumerate(xs):
        rank, count = xs[:n].count(x), xs.count(x)
        places.append(x * 1.09 ** (rank - (count - 1) / 2))
    return places


def _draw_ceilings(axes: Axes, run: Run, low: float, high: float) -> None:
    """The FMA peak, and the highest and the lowest bandwidth that any size of W_hh had.

    For bfloat16 its own peak, and that of float32 below it.
    """
    peak = run.peaks.flops / 1e9
    label = f"{peak:.0f} GFLOP/s"
    if run.peaks.float32_flops:
        label += f", {run.peaks.dtype}"
        below = run.peaks.float32_flops / 1e9
        float32_label = f"{below:.0f} GFLOP/s, float32"
        axes.plot([low, high], [below, below], ":", color="black", linewidth=1, label=float32_label)
    axes.plot([low, high], [peak, peak], color="black", linewidth=1, label=label)
    sizes = sorted(run.peaks.bandwidth, key=run.peaks.bandwidth.__getitem__)
    for size, line in {sizes[-1]: "-.", sizes[0]: "--"}.items():
        bandwidth = run.peaks.bandwidth[size] / 1e9
        xs = [low, min(peak / bandwidth, high)]
        if xs[0] < xs[1]:
            label = f"{bandwidth:.0f} GB/s, W_hh of {size / 1024:,.0f} KiB"
            ys = [x * bandwidth for x in xs]
            axes.plot(xs, ys, line, color="black", linewidth=0.7, label=label)


def _intensity(run: Run, result: LayerResult) -> float:
    traffic = result.shape.recurrent_traffic(result.mode, ITEMSIZE[run.peaks.dtype])
    return result.shape.flops(result.mode) / traffic


def _modes(run: Run) -> list[str]:
    return list(dict.fromkeys(result.mode for result in run.layers))


def _words(shape: object) -> str:
    return str(shape).replace(":", " ").replace(",", ", ")


def _panels(run: Run, count: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of one panel a mode, with the run's caption."""
    # Only this needs matplotlib; its Figure draws to a file without choosing a display.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    panels = list(figure.subplots(1, count, squeeze=False)[0])
    figure.suptitle(tables.caption(run), fontsize=7, wrap=True)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=7)
    return figure, panels
