"""The loss curve of a run as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from .checkpoint import CheckpointError, write_atomically
from .progress import read_log

FORMATS = (".png", ".pdf", ".svg")


def plot_run(directory: Path, output: Path | None = None) -> Path:
    """Draws training and validation loss over the steps of a run.

    Args:
        directory: of the run.
        output: the picture; its suffix (.png, .pdf, .svg) is its format. None is loss.png in the
            run.

    Returns:
        where the picture is.

    Raises:
        ImportError: matplotlib isn't installed.
        CheckpointError: the run has no log to draw, or the picture can't be written.
    """
    output = output or directory / "loss.png"
    if output.suffix not in FORMATS:
        raise CheckpointError(
            f"cannot draw {output}: its suffix must be one of {', '.join(FORMATS)}"
        )
    entries = read_log(directory / "log.jsonl")
    curves = {kind: curve(entries, kind) for kind in ("train", "valid")}
    if not any(steps for steps, _ in curves.values()):
        raise CheckpointError(f"{directory} has no losses in its log yet")
    write_atomically(output, draw(curves, directory.name, output.suffix[1:]))
    return output


def curve(entries: list[dict[str, Any]], kind: str) -> tuple[list[int], list[float]]:
    """Steps and losses of the log entries of one kind, but for losses that weren't finite."""
    points = [
        (entry["step"], entry["loss"])
        for entry in entries
        if entry["kind"] == kind and entry.get("loss") is not None
    ]
    return [step for step, _ in points], [loss for _, loss in points]


def draw(curves: dict[str, tuple[list[int], list[float]]], title: str, format: str) -> bytes:
    """The picture as the content of a file."""
    try:
        # Not pyplot: it would look for a display and keep global state.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'rnnfast[cli]'") from error
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    (train_steps, train_losses), (valid_steps, valid_losses) = curves["train"], curves["valid"]
    axes.plot(train_steps, train_losses, linewidth=1, alpha=0.7, label="training")
    axes.plot(valid_steps, valid_losses, marker="o", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="cross-entropy, nats per token", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    content = io.BytesIO()
    figure.savefig(content, format=format, dpi=120)
    return content.getvalue()
