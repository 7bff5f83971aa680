"""The single layer in torch.nn and in rnnfast, forward and training, as calls to be timed."""

from __future__ import annotations

import copy

import rnnfast
import torch

from .agreement import check_agreement
from .shapes import Shape
from .timing import Call

LAYERS = {
    "torch": {"LSTM": torch.nn.LSTM, "RNN": torch.nn.RNN},
    "rnnfast": {"LSTM": rnnfast.LSTM, "RNN": rnnfast.RNN},
}


class LayerProblem:
    """One shape: the same weights, input x (T, B, I) and output gradient dy (T, B, H) for both."""

    def __init__(self, shape: Shape, dtype: torch.dtype, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.shape = shape
        self.layers = {
            name: classes[shape.cell](shape.input_size, shape.hidden_size, dtype=dtype)
            for name, classes in LAYERS.items()
        }
        self.layers["rnnfast"].load_state_dict(self.layers["torch"].state_dict())
        self.x = torch.randn(shape.steps, shape.batch, shape.input_size, dtype=dtype)
        self.dy = torch.randn(shape.steps, shape.batch, shape.hidden_size, dtype=dtype)

    def calls(self, mode: str) -> dict[str, Call]:
        """The call to be timed for torch and for rnnfast."""
        make = {"forward": self._forward_call, "training": self._training_call}[mode]
        return {name: make(layer) for name, layer in self.layers.items()}

    def check(self, mode: str) -> None:
        """Raises DisagreementError where rnnfast and torch differ by more than rounding."""
        layers = {**self.layers, "exact": copy.deepcopy(self.layers["torch"]).double()}
        computed = {name: self._results(layer, mode) for name, layer in layers.items()}
        # The longest sums: a gate over its inputs, dh over gates, a weight gradient over rows.
        terms = self.shape.input_size + self.shape.hidden_size
        if mode == "training":
            terms += self.shape.gates * self.shape.hidden_size + self.shape.steps * self.shape.batch
        check_agreement(
            f"{self.shape} {mode}",
            computed["rnnfast"],
            computed["torch"],
            computed["exact"],
            terms,
        )

    def _results(self, layer: torch.nn.Module, mode: str) -> dict[str, torch.Tensor]:
        dtype = next(layer.parameters()).dtype
        x, dy = self.x.detach().to(dtype), self.dy.to(dtype)
        if mode == "forward":
            with torch.no_grad():
                return _named_outputs(*layer(x))
        x.requires_grad_()
        y, state = layer(x)
        inputs = {"x": x, **dict(layer.named_parameters())}
        gradients = torch.autograd.grad(y, list(inputs.values()), dy)
        named_gradients = zip((f"d{name}" for name in inputs), gradients, strict=True)
        return {**_named_outputs(y, state), **dict(named_gradients)}

    def _forward_call(self, layer: torch.nn.Module) -> Call:
        def call() -> object:
            with torch.no_grad():
                return layer(self.x)

        return call

    def _training_call(self, layer: torch.nn.Module) -> Call:
        x = self.x.clone().requires_grad_()
        parameters = list(layer.parameters())
        # In training every step changes the weights, so nothing derived from them may be kept from
        # the step before. Writing one entry of each in place makes that so, at no more cost than a
        # call; it is done for both candidates.
        first_entries = [parameter.detach().view(-1)[:1] for parameter in parameters]

        def call() -> object:
            torch._foreach_mul_(first_entries, 1.0)
            y, _ = layer(x)
            return torch.autograd.grad(y, [x, *parameters], self.dy)

        return call


def _named_outputs(
    y: torch.Tensor, state: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
) -> dict[str, torch.Tensor]:
    states = state if isinstance(state, tuple) else (state,)
    return {
        name: value.detach() for name, value in zip(("y", "h_n", "c_n"), (y, *states), strict=False)
    }
