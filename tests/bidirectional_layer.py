"""A layer in both directions, computed by the bidirectional operators; results of each by name."""

from __future__ import annotations

from dataclasses import asdict

import torch
from one_layer import Case, assert_results, by_reference
from rnnfast import bidirectional
from torch import Tensor


class Reverse(Case):
    """The other direction of a case: the same x, and states, weights and gradients of its own."""

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        values = super().inputs(dtype)
        return {name: v if name == "x" else -v for name, v in values.items()}

    def cotangents(self, dtype: torch.dtype) -> dict[str, Tensor]:
        return {name: -v for name, v in super().cotangents(dtype).items()}


def directions(case: Case) -> tuple[Case, Case]:
    return case, Reverse(**asdict(case) | {"reverse": True})


Results = tuple[dict[str, Tensor], dict[str, Tensor]]


def by_bidirectional_operator(
    case: Case, dtype: torch.dtype, cell_dtype: torch.dtype | None = None, keep: str = "all"
) -> Results:
    """Outputs and gradients of both directions; dx, which they share, stands with the first.

    cell_dtype: that of c0, where the operator takes another than x's.
    """
    lstm = case.cell == "lstm"
    cells = {"c0", "c_n", "c"}
    x, ordered, leaves, upstream = None, [], [], []
    for each in directions(case):
        inputs = {
            name: (v.to(cell_dtype or v.dtype) if name in cells else v).detach().requires_grad_()
            for name, v in each.inputs(dtype).items()
        }
        x = x if leaves else inputs["x"]
        leaves.append({name: v for name, v in inputs.items() if name != "x"})
        names = ["h0", *["c0"] * lstm, "w_ih", "w_hh", "b_ih", "b_hh"]
        ordered += [inputs.get(name) for name in names]
        upstream.append(each.cotangents(dtype))

    k1, k2 = case.truncate or (0, 0)
    if lstm:
        y, *rest = bidirectional.lstm_layer(x, *ordered, k1, k2, keep)
        names = ("h_n", "c_n", "c", "gates")
    else:
        y, *rest = bidirectional.rnn_layer(x, *ordered, case.cell, k1, k2)
        names = ("h_n",)
    parts = bidirectional.split(rest, len(names))[:2]
    outputs = [
        {"y": half} | dict(zip(names, part, strict=True))
        for half, part in zip(y.chunk(2, -1), parts, strict=True)
    ]

    wanted = [name for name in ("h_n", "c_n", "c") if name in case.upstream and name in outputs[0]]
    into = [each[name] for each in outputs for name in wanted]
    given = [each[name] for each in upstream for name in wanted]
    if "y" in case.upstream:
        into, given = [y, *into], [torch.cat([each["y"] for each in upstream], -1), *given]
    given = [g.to(output.dtype) for g, output in zip(given, into, strict=True)]
    dx, *gradients = torch.autograd.grad(into, [x, *leaves[0].values(), *leaves[1].values()], given)

    results = []
    for each, inputs in zip(outputs, leaves, strict=True):
        result = {name: v.detach() for name, v in each.items() if name != "gates"}
        result |= {f"d{name}": gradients.pop(0) for name in inputs}
        results.append({name: v.to(dtype) for name, v in result.items()})
    results[0]["dx"] = dx
    return tuple(results)


def check(case: Case, results: Results, dtype: torch.dtype, **options) -> None:
    """Both directions against the textbook."""
    first, second = (dict(by_reference(each, dtype)) for each in directions(case))
    first["dx"] = first["dx"] + second.pop("dx")
    for got, want in zip(results, (first, second), strict=True):
        assert_results(case, got, want, **options)
