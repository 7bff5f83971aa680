"""The check that comes before every timing: a kernel that is wrong must not be fast.

The yardstick is torch, or the textbook, in float64. Two correct programs in the same precision
differ from it by rounding only, and rounding errors of independent origin add up like a random
walk: a sum of n terms carries a relative error near u*sqrt(n) (u: unit roundoff; Higham & Mary
2019). How far the recurrence amplifies that depends on the weights, and the error of a trusted
program in the same precision measures it. So the error allowed is a small multiple of the larger of
the two. Errors are compared in the 2-norm over a whole tensor: a single wrong entry among a million
of equal size is 1e-3, far above what rounding leaves in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

# Errors of two programs that sum in different orders are two draws of one distribution; over the
# thousands of entries of a tensor their norms differ by far less than this factor.
SAFETY = 4.0

# Peers approximate exp and tanh more or less well, which is their business; a gate in the wrong
# place or a missing bias moves results by far more than this.
PEER_ERROR = 1e-4

Tensors = Mapping[str, torch.Tensor]


class DisagreementError(Exception):
    """A candidate computed something else."""


def check_agreement(
    what: str,
    computed: Tensors,
    trusted: Tensors,
    exact: Tensors,
    terms: int,
    whose: str = "rnnfast",
) -> None:
    """Compares every named tensor of a candidate with float64.

    Args:
        what: the thing compared, for the error message.
        computed: results of the candidate by name.
        trusted: results of torch, or of the textbook, in the same precision.
        exact: the same in float64.
        terms: the longest sum that any result goes through.
        whose: the candidate, for the error message.

    Raises:
        DisagreementError: an error is larger than rounding explains, or is NaN.
    """
    for name, value in exact.items():
        unit_roundoff = torch.finfo(computed[name].dtype).eps / 2
        allowed = SAFETY * max(
            relative_error(trusted[name], value), unit_roundoff * math.sqrt(terms)
        )
        error = relative_error(computed[name], value)
        if not error <= allowed:
            raise DisagreementError(
                f"{what}: {name} of {whose} is off by {error:.2g} relative to float64, "
                f"rounding explains at most {allowed:.2g}"
            )


def check_peer(what: str, peer: str, values: Tensors, exact: Tensors) -> None:
    """Sees to it that a peer computes the same layer.

    Args:
        what: the thing compared, for the error message.
        peer: the name of the peer, for the error message.
        values: its results by name.
        exact: results of torch in float64, by the same names.

    Raises:
        DisagreementError: a result is off by more than PEER_ERROR, or is NaN.
    """
    for name, value in exact.items():
        error = relative_error(values[name], value)
        if not error <= PEER_ERROR:
            raise DisagreementError(
                f"{what}: {name} of {peer} is off by {error:.2g} relative to float64, "
                f"so it does not compute this layer"
            )


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of the exact result (over 1 where that is zero)."""
    norm = torch.linalg.vector_norm(exact).item()
    return torch.linalg.vector_norm(value.double() - exact).item() / (norm or 1.0)
