"""Shapes to test the reference on, and its results by name.

A `Problem` is one shape with its torch module, inputs and upstream gradients; *results* are the
outputs and every gradient, by name, of one way to compute them. Everything is float64.
"""

from dataclasses import dataclass

import torch
from rnnfast import reference
from tolerance import assert_close


@dataclass(frozen=True)
class Problem:
    cell: str  # lstm, tanh or relu
    T: int = 7
    B: int = 3
    input_size: int = 5
    H: int = 4
    P: int = 0
    L: int = 1
    D: int = 1
    bias: bool = True

    def __str__(self):
        return "-".join(map(str, vars(self).values()))

    @property
    def lstm(self):
        return self.cell == "lstm"

    def module(self):
        torch.manual_seed(0)
        options = {
            "num_layers": self.L,
            "bias": self.bias,
            "bidirectional": self.D == 2,
            "dtype": torch.float64,
        }
        if self.lstm:
            return torch.nn.LSTM(self.input_size, self.H, proj_size=self.P, **options)
        return torch.nn.RNN(self.input_size, self.H, nonlinearity=self.cell, **options)

    def inputs(self):
        """x and the initial states, as leaves."""
        out = self.P or self.H
        shapes = [(self.T, self.B, self.input_size), (self.L * self.D, self.B, out)]
        if self.lstm:
            shapes.append((self.L * self.D, self.B, self.H))
        torch.manual_seed(1)
        return [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]

    def upstream(self):
        """Gradients of the outputs: dy, dh_n and, for the LSTM, dc_n and dcells."""
        out = self.P or self.H
        shapes = [(self.T, self.B, self.D * out), (self.L * self.D, self.B, out)]
        if self.lstm:
            shapes += [(self.L * self.D, self.B, self.H), (self.T, self.B, self.D * self.H)]
        torch.manual_seed(2)
        return [torch.randn(s, dtype=torch.float64) for s in shapes]


def forward_reference(p, arrays, reverse=False, dropout_masks=None):
    """Named outputs and the record, for arrays x, h0, [c0], *weights."""
    options = {
        "num_layers": p.L,
        "bidirectional": p.D == 2,
        "reverse": reverse,
        "dropout_masks": dropout_masks,
    }
    if p.lstm:
        x, h0, c0, *weights = arrays
        y, (h_n, c_n), cells, saved = reference.lstm(x, (h0, c0), weights, **options)
        return {"y": y, "h_n": h_n, "c_n": c_n, "cells": cells}, saved
    x, h0, *weights = arrays
    y, h_n, saved = reference.rnn(x, h0, weights, nonlinearity=p.cell, **options)
    return {"y": y, "h_n": h_n}, saved


def reference_results(p, upstream, truncate=None, reverse=False):
    """Outputs and gradients from the reference."""
    arrays = [t.detach().numpy() for t in (*p.inputs(), *p.module().parameters())]
    outputs, saved = forward_reference(p, arrays, reverse)
    upstream = [u.numpy() for u in upstream]
    if p.lstm:
        dx, dstate0, dweights = reference.lstm_backward(saved, *upstream, truncate=truncate)
    else:
        dx, dh0, dweights = reference.rnn_backward(saved, *upstream, truncate=truncate)
        dstate0 = (dh0,)
    return outputs | named_gradients(p, [dx, *dstate0, *dweights])


def named_gradients(p, gradients):
    names = ["dx", "dh0", "dc0"][: 3 if p.lstm else 2]
    names += [f"d{name}" for name, _ in p.module().named_parameters()]
    return dict(zip(names, gradients, strict=True))


def assert_same(p, actual, expected):
    assert actual.keys() >= expected.keys()
    # The layers of a stack follow each other as steps do; D*P inputs meet in the upper ones.
    terms = max(p.input_size, 2 * p.H) + p.H + p.T * p.B
    for name, value in expected.items():
        assert_close(actual[name], value, K=terms, T=p.L * max(p.T, 1), name=name)
