"""A training step of a language model: what a user gains once everything else is paid for too.

Embedding, loss, clipping and optimiser are torch's in both candidates; only the recurrent stack is
swapped, by rnnfast.convert. Tokens are random: the time of a step does not depend on the text.
"""

from __future__ import annotations

import copy

import rnnfast
import torch
from torch.nn import functional

from .agreement import check_agreement
from .shapes import StepSize
from .timing import Call

CLIP_NORM = 0.25
LEARNING_RATE = 1e-3
CHUNKS = 8


class LanguageModel(torch.nn.Module):
    """Embedding, a stack of torch.nn.LSTM or RNN, and a softmax layer over the vocabulary."""

    def __init__(self, size: StepSize) -> None:
        super().__init__()
        layer = {"LSTM": torch.nn.LSTM, "RNN": torch.nn.RNN}[size.cell]
        self.embedding = torch.nn.Embedding(size.vocabulary, size.hidden_size)
        self.recurrent = layer(size.hidden_size, size.hidden_size, num_layers=size.layers)
        self.decoder = torch.nn.Linear(size.hidden_size, size.vocabulary)

    def loss(self, tokens: torch.Tensor, state: object) -> tuple[torch.Tensor, object]:
        """Mean cross-entropy of every next token.

        Args:
            tokens: (bptt + 1, batch), the last row is only a target.
            state: carried from the chunk before, None at the start.

        Returns:
            The loss in nats and the state after the chunk.
        """
        hidden, state = self.recurrent(self.embedding(tokens[:-1]), state)
        return functional.cross_entropy(
            self.decoder(hidden).flatten(0, 1), tokens[1:].flatten()
        ), state


class StepProblem:
    """The same model and the same tokens for torch and for rnnfast."""

    def __init__(self, size: StepSize, dtype: torch.dtype, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.size = size
        torch_model = LanguageModel(size).to(dtype)
        self.models = {
            "torch": torch_model,
            "rnnfast": rnnfast.convert(copy.deepcopy(torch_model)),
        }
        self.tokens = torch.randint(size.vocabulary, (CHUNKS, size.bptt + 1, size.batch))

    def calls(self) -> dict[str, Call]:
        """The training step to be timed for torch and for rnnfast."""
        return {name: self._step(model) for name, model in self.models.items()}

    def check(self) -> None:
        """Raises DisagreementError where loss or gradients differ by more than rounding."""
        models = {**self.models, "exact": copy.deepcopy(self.models["torch"]).double()}
        computed = {name: self._results(model) for name, model in models.items()}
        size = self.size
        terms = max(size.vocabulary, size.tokens) + size.layers * 10 * size.hidden_size
        check_agreement(size.name, computed["rnnfast"], computed["torch"], computed["exact"], terms)

    def _results(self, model: LanguageModel) -> dict[str, torch.Tensor]:
        loss, _ = model.loss(self.tokens[0], None)
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        named_gradients = zip((f"d{name}" for name in parameters), gradients, strict=True)
        return {"loss": loss.detach(), **dict(named_gradients)}

    def _step(self, model: LanguageModel) -> Call:
        optimizer = getattr(torch.optim, self.size.optimizer)(model.parameters(), lr=LEARNING_RATE)
        state: object = None
        position = 0

        def step() -> None:
            nonlocal state, position
            loss, state = model.loss(self.tokens[position % CHUNKS], state)
            position += 1
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            state = _detach(state)

        return step


def _detach(state: torch.Tensor | tuple[torch.Tensor, ...]) -> object:
    if isinstance(state, tuple):
        return tuple(part.detach() for part in state)
    return state.detach()
