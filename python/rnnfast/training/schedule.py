"""How the learning rate falls.

By default when validation stops improving: that needs no knowledge of how long training will last,
    so it suits runs that are interrupted, resumed and prolonged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

PLATEAU_FACTOR = 0.5
PLATEAU_PATIENCE = 3
COSINE_END = 0.05


@dataclass
class Plateau:
    """Halves a factor each time `PLATEAU_PATIENCE` validations in a row bring no new lowest loss.

    Attributes:
        factor: of the learning rate.
        lowest: validation loss so far; None before the first.
        waited: validations since the lowest.
    """

    factor: float = 1.0
    lowest: float | None = None
    waited: int = 0

    def observe(self, loss: float) -> None:
        """Takes a validation loss into account."""
        if self.lowest is None or loss < self.lowest:
            self.lowest = loss
            self.waited = 0
            return
        self.waited += 1
        if self.waited == PLATEAU_PATIENCE:
            self.factor *= PLATEAU_FACTOR
            self.waited = 0


def learning_rate(schedule: str, lr: float, step: int, total_steps: int, plateau: Plateau) -> float:
    """The learning rate of a step.

    Args:
        schedule: `plateau`, `cosine` (Loshchilov & Hutter 2017, without restarts) or `constant`.
        lr: the rate at the beginning.
        step: steps taken so far.
        total_steps: steps planned.
        plateau: what validation has shown so far.
    """
    if schedule == "plateau":
        return lr * plateau.factor
    if schedule == "cosine":
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / total_steps, 1.0)))
        return lr * (COSINE_END + (1 - COSINE_END) * cosine)
    return lr
