"""One layer in one direction, computed by the operators and by the textbook; results by name.

Sizes here may be extreme (one unit that reads 130 inputs), where weights and inputs of unit size
would saturate every gate and so hide mistakes behind derivatives of zero. Inputs are therefore
scaled so that pre-activations stay of order one whatever the sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from rnnfast import ops, projected_ops, reference
from rnnfast._native import accumulator
from tolerance import STORED_BACKWARD, STORED_FORWARD, assert_close
from torch import Tensor

INPUTS = ("x", "h0", "c0", "w_ih", "w_hh", "w_hr")
BIASES = {"both": ("b_ih", "b_hh"), "none": (), "input": ("b_ih",), "hidden": ("b_hh",)}


@dataclass(frozen=True)
class Case:
    """Sizes, options and memory layout of one call; hashable, so that results can be kept."""

    cell: str  # lstm, tanh or relu
    T: int
    B: int
    I: int
    H: int
    reverse: bool = False
    biases: str = "both"
    truncate: tuple[int, int] | None = None
    layout: str = "dense"
    upstream: tuple[str, ...] = ("y", "h_n", "c_n", "c")  # the outputs that get a gradient
    lengths: tuple[int, ...] | None = None  # of B packed sequences, the longest, of T, first
    P: int = 0  # of an LSTM whose h is projected to so many numbers

    def __str__(self) -> str:
        shown = [self.cell, f"{self.T}x{self.B}x{self.I}x{self.H}"]
        shown += ["reverse"] * self.reverse + [f"k{self.truncate}"] * bool(self.truncate)
        shown += [f"packed {self.lengths}"] * bool(self.lengths)
        shown += [f"projected {self.P}"] * bool(self.P)
        shown += [f"{self.biases} biases", self.layout, "+".join(self.upstream) or "nothing"]
        return " ".join(shown).replace(", ", ",")

    @property
    def gates(self) -> int:
        return 4 if self.cell == "lstm" else 1

    @property
    def batch_sizes(self) -> Tensor | None:
        """The number of running sequences at each step, if packed."""
        if self.lengths is None:
            return None
        return torch.tensor([sum(t < n for n in self.lengths) for t in range(self.T)])

    @property
    def steps(self) -> tuple[int, ...]:
        """The leading axes of whatever has steps."""
        return (self.T, self.B) if self.lengths is None else (sum(self.lengths),)

    def rows_of(self, b: int) -> Tensor:
        """Where the steps of packed sequence b stand among the rows of all steps."""
        begins = self.batch_sizes.cumsum(0) - self.batch_sizes
        return begins[: self.lengths[b]] + b

    @property
    def outputs(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what the layer gives."""
        shapes = {"y": (*self.steps, self.P or self.H), "h_n": (self.B, self.P or self.H)}
        cells = {"c_n": (self.B, self.H), "c": (*self.steps, self.H)}
        return shapes | cells if self.cell == "lstm" else shapes

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Names and values of what the layer reads, laid out as the case says."""
        generator = torch.Generator().manual_seed(1)
        GH, bound = self.gates * self.H, 1 / math.sqrt(self.H)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1

        x = uniform(*self.steps, self.I) * math.sqrt(3 * self.H / max(self.I, 1))
        values = {"x": x, "h0": uniform(self.B, self.P or self.H)}
        if self.cell == "lstm":
            values["c0"] = 2 * uniform(self.B, self.H)
        values["w_ih"] = uniform(GH, self.I) * bound
        values["w_hh"] = uniform(GH, self.P or self.H) * (
            1 / math.sqrt(self.P) if self.P else bound
        )
        for name in BIASES[self.biases]:
            values[name] = uniform(GH)
        if self.P:
            values["w_hr"] = uniform(self.P, self.H) * 2 * bound
        return {name: laid_out(v.to(dtype), self.layout, name) for name, v in values.items()}

    def cotangents(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Gradients of those outputs that get one."""
        generator = torch.Generator().manual_seed(2)
        values = {}
        for name, shape in self.outputs.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            values[name] = laid_out(value, self.layout, name)
        return {name: value for name, value in values.items() if name in self.upstream}


LAYOUTS = ("dense", "offset", "transposed", "strided", "expanded")

# What a layer on the CPU may meet, for `pairwise`.
AXES = {
    "T": [1, 2, 3, 17],
    "B": [0, 1, 2, 3, 17, 131],
    "I": [0, 1, 2, 3, 17, 130],
    "H": [1, 2, 3, 17, 65, 129],
    "reverse": [False, True],
    "biases": ["both", "none", "input", "hidden"],
    "layout": list(LAYOUTS),
    "upstream": [("y",), ("h_n", "c_n"), ("y", "c"), ("y", "h_n", "c_n", "c")],
    "truncate": [None, (1, 1), (2, 2), (2, 3), (3, 11)],
}


def laid_out(value: Tensor, layout: str, name: str = "") -> Tensor:
    """The same values in other memory; "expanded" repeats the first row of a state or a gradient.

    What lies between and around the elements is NaN, so a kernel that reads it shows.
    """
    if layout == "offset":  # begins in the middle of an allocation, at an odd element
        around = value.new_full([size + 3 for size in value.shape], math.nan)
        around[tuple(slice(1, 1 + size) for size in value.shape)] = value
        return around[tuple(slice(1, 1 + size) for size in value.shape)]
    if layout == "transposed":
        return (
            value.permute(*range(value.dim())[::-1]).contiguous().permute(*range(value.dim())[::-1])
        )
    if layout == "strided":  # every second element along every dimension
        around = value.new_full([2 * size for size in value.shape], math.nan)
        around[(slice(None, None, 2),) * value.dim()] = value
        return around[(slice(None, None, 2),) * value.dim()]
    if layout == "expanded" and name in ("h0", "c0", "y", "h_n", "c_n", "c"):
        return value[:1].expand(value.shape)  # what a learned initial state and y.sum() bring
    return value


def run_operator(case: Case, inputs: dict[str, Tensor], keep: str = "all") -> dict[str, Tensor]:
    """The outputs by name; LSTM gates left out."""
    k1, k2 = case.truncate or (0, 0)
    weights = [inputs["w_ih"], inputs["w_hh"], inputs.get("b_ih"), inputs.get("b_hh")]
    if case.cell == "lstm":
        # With bfloat16 whatever belongs to the cell is float32.
        states = [inputs["h0"], inputs["c0"].to(accumulator(inputs["x"].dtype))]
        if case.P:
            args = (inputs["w_hr"], case.reverse, k1, keep, case.batch_sizes)
            results = projected_ops.lstm_layer(inputs["x"], *states, *weights, *args)
            return dict(zip(("y", "h_n", "c_n", "c"), results, strict=False))
        y, h_n, c_n, c, _ = ops.lstm_layer(
            inputs["x"], *states, *weights, case.reverse, k1, k2, keep, case.batch_sizes
        )
        return {"y": y, "h_n": h_n, "c_n": c_n, "c": c}
    options = (case.cell, case.reverse, k1, k2, case.batch_sizes)
    y, h_n = ops.rnn_layer(inputs["x"], inputs["h0"], *weights, *options)
    return {"y": y, "h_n": h_n}


def by_operator(
    case: Case, dtype: torch.dtype, want: list[str] | None = None, keep: str = "all"
) -> dict[str, Tensor]:
    """Every output, and the gradient "d..." of every input (or of those in `want`)."""
    return differentiate(case, case.inputs(dtype), case.cotangents(dtype), want, keep)


def differentiate(
    case: Case,
    inputs: dict[str, Tensor],
    cotangents: dict[str, Tensor],
    want: list[str] | None = None,
    keep: str = "all",
) -> dict[str, Tensor]:
    """As `by_operator`, on inputs and gradients of the outputs that are there already."""
    want = list(inputs) if want is None else want
    inputs = {name: v.detach().requires_grad_(name in want) for name, v in inputs.items()}
    outputs = run_operator(case, inputs, keep)
    gradients = torch.autograd.grad(
        [outputs[name] for name in cotangents],
        [inputs[name] for name in want],
        [value.to(outputs[name].dtype) for name, value in cotangents.items()],
    )
    results = {name: output.detach() for name, output in outputs.items()}
    return results | {f"d{name}": g for name, g in zip(want, gradients, strict=True)}


@cache
def by_reference(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same in float64, from inputs rounded to `dtype`."""
    inputs = {name: v.double() for name, v in case.inputs(dtype).items()}
    upstream = {name: v.double() for name, v in case.cotangents(dtype).items()}
    if case.lengths is None:
        return _reference(case, inputs, upstream)
    results = {}
    for b in range(case.B):  # each sequence by itself
        rows = case.rows_of(b)

        def of_sequence(values: dict[str, Tensor], b=b, rows=rows) -> dict[str, Tensor]:
            own = {"x": rows, "y": rows, "c": rows, "h0": [b], "c0": [b], "h_n": [b], "c_n": [b]}
            taken = {name: v[own[name]] if name in own else v for name, v in values.items()}
            return {n: v.unsqueeze(1) if n in ("x", "y", "c") else v for n, v in taken.items()}

        alone = _reference(case, of_sequence(inputs), of_sequence(upstream))
        for name, value in alone.items():
            if name in ("x", "y", "c", "dx"):
                steps = results.setdefault(name, value.new_empty(*case.steps, value.shape[-1]))
                steps[rows] = value.squeeze(1)
            elif name in ("h_n", "c_n", "dh0", "dc0"):
                states = results.setdefault(name, value.new_empty(case.B, value.shape[-1]))
                states[b] = value[0]
            else:
                results[name] = results.get(name, 0) + value
    return results


def _reference(
    case: Case, inputs: dict[str, Tensor], upstream: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Outputs and gradients of (T, B, I), not packed."""
    inputs = {name: v.numpy() for name, v in inputs.items()}
    upstream = {name: v.numpy() for name, v in upstream.items()}
    weights = [inputs["w_ih"], inputs["w_hh"]]
    if BIASES[case.biases]:
        zeros = torch.zeros(case.gates * case.H, dtype=torch.float64).numpy()
        weights += [inputs.get("b_ih", zeros), inputs.get("b_hh", zeros)]
    if case.P:
        weights.append(inputs["w_hr"])
    h0 = inputs["h0"][None]
    dy, dc = upstream.get("y"), upstream.get("c")
    final = [upstream[name][None] if name in upstream else None for name in ("h_n", "c_n")]
    if case.cell == "lstm":
        y, (h_n, c_n), c, saved = reference.lstm(
            inputs["x"], (h0, inputs["c0"][None]), weights, reverse=case.reverse
        )
        outputs = {"y": y, "h_n": h_n[0], "c_n": c_n[0], "c": c}
        dx, dstates, dweights = reference.lstm_backward(saved, dy, *final, dc, case.truncate)
    else:
        y, h_n, saved = reference.rnn(
            inputs["x"], h0, weights, nonlinearity=case.cell, reverse=case.reverse
        )
        outputs = {"y": y, "h_n": h_n[0]}
        dx, dh0, dweights = reference.rnn_backward(saved, dy, final[0], case.truncate)
        dstates = (dh0,)
    named = dict(zip(("dh0", "dc0"), (d[0] for d in dstates), strict=False)) | {"dx": dx}
    names = ["dw_ih", "dw_hh", *(["db_ih", "db_hh"] if BIASES[case.biases] else []), "dw_hr"]
    named |= dict(zip(names, dweights, strict=False))
    gradients = {f"d{name}": named[f"d{name}"] for name in inputs}
    return {name: torch.from_numpy(v) for name, v in (outputs | gradients).items()}


def assert_results(
    case: Case, got: dict[str, Tensor], want: dict[str, Tensor], in_float32: bool = False
) -> None:
    """Outputs and gradients equal as far as their arithmetic allows.

    in_float32: they were computed in float32 and stored in bfloat16.
    """
    assert got.keys() == want.keys()
    # Cotangents are of order one.
    sizes = [v.abs().max().item() for name, v in want.items() if name[0] == "d" and v.numel()]
    scale = max([1.0, *(size for size in sizes if math.isfinite(size))])
    forward = case.I + case.H + case.P
    backward = forward + case.gates * case.H + case.T * case.B
    for name, value in want.items():
        assert got[name].shape == value.shape, name
        gradient = name in {f"d{key}" for key in (*INPUTS, "b_ih", "b_hh")}
        K = backward if gradient else forward
        stored = (STORED_BACKWARD if gradient else STORED_FORWARD) if in_float32 else 0
        options = {"K": K, "T": case.T, "scale": scale * gradient, "stored": stored}
        assert_close(got[name], value, **options, name=name)


def check(case: Case, dtype: torch.dtype) -> None:
    """Operator against textbook, forward and backward."""
    assert_results(case, by_operator(case, dtype), by_reference(case, dtype))
