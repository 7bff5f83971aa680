"""The result of a run, as it is computed with and as it is stored.

The file holds what was measured: every block of every candidate. Medians, ratios and shares are
always computed from it, so that no table can say something else than the measurements.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .peaks import Floor, Peaks, floor
from .shapes import Shape, StepSize
from .timing import Timing, ratio

FORMAT = 1

# rnnfast in float32, timed in a run of bfloat16 beside rnnfast itself; and, forward in other runs,
# rnnfast with frozen weights, which are as constant as those of other peers.
OWN_FLOAT32, OWN_FROZEN = "rnnfast float32", "rnnfast frozen"
OWN = ("rnnfast", OWN_FLOAT32, OWN_FROZEN)

# Clock rates drift by some percent between the measurement of the peak and that of a layer.
HIGHEST_SHARE = 1.1


class ResultFileError(Exception):
    """A result file is missing, damaged, or of another format."""


class ImplausiblePeakError(Exception):
    """The measured peak can't be the machine's."""


@dataclass(frozen=True)
class Compared:
    """Timings of "torch", of some of OWN, and perhaps of other peers on the same work."""

    timings: dict[str, Timing]

    @property
    def ratio(self) -> float:
        """Time of torch over time of rnnfast: above 1 where rnnfast is faster."""
        return ratio(self.timings, "torch", "rnnfast")

    @property
    def best_peer(self) -> str:
        """The fastest candidate that is not rnnfast."""
        peers = self.timings.keys() - set(OWN)
        return min(sorted(peers), key=lambda name: self.timings[name].median)

    @property
    def ratio_to_best(self) -> float:
        """Time of the best peer over time of rnnfast."""
        return ratio(self.timings, self.best_peer, "rnnfast")

    @property
    def frozen_ratio_to_best(self) -> float:
        """The same for frozen weights."""
        return ratio(self.timings, self.best_peer, OWN_FROZEN)

    @property
    def ratio_to_float32(self) -> float:
        """Time of rnnfast in float32 over its time in bfloat16."""
        return ratio(self.timings, OWN_FLOAT32, "rnnfast")


@dataclass(frozen=True)
class LayerResult(Compared):
    """One layer shape in one mode."""

    shape: Shape
    mode: str

    def flops_per_second(self, candidate: str) -> float:
        """Arithmetic rate, counting only the operations the layer needs."""
        return self.shape.flops(self.mode) / self.timings[candidate].median


@dataclass(frozen=True)
class StepResult(Compared):
    """One training step of a language model."""

    size: StepSize

    def tokens_per_second(self, candidate: str) -> float:
        """Training speed in tokens learned from."""
        return self.size.tokens / self.timings[candidate].median


@dataclass(frozen=True)
class Run:
    """Everything one run measured."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    peaks: Peaks
    layers: list[LayerResult]
    steps: list[StepResult]

    def floor(self, result: LayerResult) -> Floor:
        """The floor of a layer on the machine of this run."""
        return floor(result.shape, result.mode, self.peaks)

    def check_peak(self) -> None:
        """Sees to it that no layer ran faster than the peak it is compared with.

        Raises:
            ImplausiblePeakError: rnnfast ran clearly above the measured peak, so every share of it
                and every floor of this run is worthless.
        """
        for result in self.layers:
            share = result.flops_per_second("rnnfast") / self.peaks.flops
            if share > HIGHEST_SHARE:
                raise ImplausiblePeakError(
                    f"{result.shape} {result.mode} ran at {share:.0%} of the measured peak of "
                    f"{self.peaks.flops / 1e9:.0f} GFLOP/s, so that peak is too low; measure again"
                )

    @property
    def other_peers(self) -> list[str]:
        """Peers besides torch that any layer was timed with."""
        names = dict.fromkeys(name for result in self.layers for name in result.timings)
        return [name for name in names if name not in ("torch", *OWN)]

    @property
    def has_own_float32(self) -> bool:
        """Whether rnnfast was timed in float32 too, as it is in a run of bfloat16."""
        return any(OWN_FLOAT32 in result.timings for result in self.layers)

    @property
    def has_frozen(self) -> bool:
        """Whether rnnfast was timed with frozen weights too."""
        return any(OWN_FROZEN in result.timings for result in self.layers)

    def geometric_means(self, of: str = "ratio") -> dict[tuple[str, str], float]:
        """Mean of a ratio of LayerResult by cell and mode, ordered as the results.

        Modes that are not timed with frozen weights have no mean of a ratio of those.
        """
        ratios: dict[tuple[str, str], list[float]] = {}
        for result in self.layers:
            if of.startswith("frozen") and OWN_FROZEN not in result.timings:
                continue
            of_kind = ratios.setdefault((result.shape.cell, result.mode), [])
            of_kind.append(getattr(result, of))
        return {key: statistics.geometric_mean(values) for key, values in ratios.items()}


def save(run: Run, path: Path) -> None:
    """Writes the run as JSON."""
    content = {"format": FORMAT, **dataclasses.asdict(run)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def load(path: Path) -> Run:
    """Reads what save() wrote.

    Raises:
        ResultFileError: there is no such file or it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ResultFileError(f"{path}: result format {content['format']!r}, expected {FORMAT}")
        return Run(
            environment=content["environment"],
            settings=content["settings"],
            peaks=_peaks(content["peaks"]),
            layers=[
                LayerResult(_timings(item), Shape(**item["shape"]), item["mode"])
                for item in content["layers"]
            ],
            steps=[
                StepResult(_timings(item), StepSize(**item["size"])) for item in content["steps"]
            ],
        )
    except OSError as error:
        raise ResultFileError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ResultFileError(f"{path}: not a result of benchmarks.run ({error!r})") from error


def _timings(item: dict[str, Any]) -> dict[str, Timing]:
    return {
        name: Timing(timing["calls_per_block"], tuple(timing["block_seconds"]))
        for name, timing in item["timings"].items()
    }


def _peaks(item: dict[str, Any]) -> Peaks:
    # JSON knows only strings as keys.
    bandwidth = {int(size): rate for size, rate in item["bandwidth"].items()}
    float32_flops = item.get("float32_flops")
    return Peaks(item["threads"], item["dtype"], item["flops"], bandwidth, float32_flops)
