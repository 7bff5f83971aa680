"""One JSON of all that gpu_check.sh left in a folder, and a short table; standard library only."""

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any


def gather(folder: Path) -> None:
    """One JSON of all parts, and the table."""
    everything: dict[str, Any] = {"parts": (folder / "parts.txt").read_text().splitlines()}
    for name in ("bench", "sync"):
        try:
            everything[name] = json.loads((folder / f"{name}.json").read_text())
        except (OSError, ValueError) as error:
            everything[name] = {"error": str(error)}
    (folder / "gpu_check.json").write_text(json.dumps(everything, indent=1))
    for line in everything["parts"]:
        print(line)
    for name, value in everything["sync"].items():
        print(f"{name:20} {value}")
    results = everything["bench"]
    for name, value in results.get("ceilings", {}).items():
        print(f"{name:20} {value:.1f}")
    whats = ("forward", "forward + backward")
    points = results.get("points", [])
    for point in (point for point in points if point["name"] != "grid"):
        label = f"{point['cell']} {point['math']} H {point['H']} B {point['B']} T {point['T']}"
        for what in whats:
            ours, theirs = point[what]["ours"], point[what]["torch"]
            step = point[what]["us a step"]
            print(f"{label:32} {what:18} {theirs / ours:6.2f}x  {step:8.2f} us a step")
    if "tbptt" in results:
        taken = results["tbptt"]["backward"]
        print(f"{'TBPTT 64 over 16,384':32} {'backward':18} {taken['torch'] / taken['ours']:6.2f}x")
    for what in whats if "packed" in results else ():
        taken = results["packed"][what]
        print(f"{'packed sentences':32} {what:18} {taken['torch'] / taken['ours']:6.2f}x")
    grid = [point for point in points if point["name"] == "grid"]
    for what in whats:
        ratios = [point[what]["torch"] / point[what]["ours"] for point in grid]
        if ratios:
            mean = math.exp(statistics.fmean(map(math.log, ratios)))
            level = sum(ratio >= 1 for ratio in ratios) / len(ratios)
            print(f"grid, {len(ratios)} points, {what}: {mean:.2f}x, {level:.0%} at 1.0x or more")
    for error in results.get("errors", [])[:10]:
        print("error:", error)


if __name__ == "__main__":
    gather(Path(sys.argv[1]))
