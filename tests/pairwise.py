"""Few combinations of many choices: every two choices of two kinds meet, not every n of n kinds.

Most mistakes need one or two conditions to show, so this finds nearly what the full product would
at a hundredth of its cost.
"""

from __future__ import annotations

from typing import Any


def pairwise(**choices: list) -> list[dict[str, Any]]:
    """Combinations, each one choice of every kind, that hold each pair of choices at least once."""
    options = {kind: [(kind, n) for n in range(len(listed))] for kind, listed in choices.items()}
    missing = {
        frozenset((a, b))
        for kind in options
        for other in options
        if kind < other
        for a in options[kind]
        for b in options[other]
    }
    combinations = []
    while missing:
        turn = len(combinations)
        picked = sorted(min(missing, key=sorted))
        for kind in sorted(options.keys() - {kind for kind, _ in picked}):
            picked.append(_newest(options[kind], picked, missing, turn))
        missing -= {frozenset((a, b)) for a in picked for b in picked}
        combinations.append({kind: choices[kind][n] for kind, n in sorted(picked)})
    return combinations


def _newest(options: list, picked: list, missing: set, turn: int) -> tuple[str, int]:
    """The option that brings most missing pairs; among equals another one every turn."""

    def news(option: tuple[str, int]) -> int:
        return sum(frozenset((option, other)) in missing for other in picked)

    return max(options, key=lambda option: (news(option), (option[1] + turn) % len(options)))
