"""``python -m tests.peer_layer LSTM openvino``: a peer computes what torch.nn computes.

And it shows if it does not. A script because the peers' libraries do not share a process well
with what other tests do.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch

from benchmarks import peers
from benchmarks.agreement import DisagreementError
from benchmarks.layers import LayerProblem
from benchmarks.results import OWN_FROZEN
from benchmarks.shapes import Shape


def wrong_layer(problem: LayerProblem) -> torch.nn.Module:
    """Gates in another order are a wrong layer. An RNN has one; there the bias is lost."""
    layer = copy.deepcopy(problem.layers["torch"])
    with torch.no_grad():
        if isinstance(layer, torch.nn.LSTM):
            rows = torch.cat([layer.weight_hh_l0[27:], layer.weight_hh_l0[:27]])
            layer.weight_hh_l0.copy_(rows)
        else:
            layer.bias_hh_l0.zero_()
    return layer


def main(cell: str, name: str) -> None:
    problem = LayerProblem(Shape(cell, 7, 3, 5, 9), torch.float32, other_peers=[name])
    problem.check("forward")
    assert list(problem.calls("forward")) == ["torch", "rnnfast", OWN_FROZEN, name]
    assert list(problem.calls("training")) == ["torch", "rnnfast"]
    problem.peers[name] = peers.open_peer(name, wrong_layer(problem), problem.x, threads=1)
    with pytest.raises(DisagreementError, match=f"of {name} is off by"):
        problem.check("forward")
    print(f"{name}: {cell} as torch.nn")


if __name__ == "__main__":
    main(*sys.argv[1:])
