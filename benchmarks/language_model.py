"""A training step of a language model: what a user gains once everything else is paid for too.

Embedding, loss, clipping and optimiser are torch's in both candidates; only the recurrent stack is
swapped, by rnnfast.convert. Tokens are random: the time of a step does not depend on the text.
"""

from __future__ import annotations

import copy

import rnnfast
import torch
from rnnfast.bptt import detach
from rnnfast.models import LanguageModel
from rnnfast.models.language_model import State, cross_entropy

from .agreement import check_agreement
from .shapes import StepSize
from .timing import Call

CLIP_NORM = 0.25
LEARNING_RATE = 1e-3
CHUNKS = 8


def loss_of(
    model: LanguageModel, tokens: torch.Tensor, state: State | None
) -> tuple[torch.Tensor, State]:
    """Mean cross-entropy in nats of every next token, and the state after the chunk.

    tokens: (bptt + 1, batch), the last row is only a target. state: carried from the chunk before.
    """
    logits, state = model(tokens[:-1], state)
    return cross_entropy(logits, tokens[1:]), state


class StepProblem:
    """The same model and the same tokens for torch and for rnnfast."""

    def __init__(self, size: StepSize, dtype: torch.dtype, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.size = size
        torch_model = LanguageModel(
            size.vocabulary,
            cell=size.cell.lower(),
            emsize=size.hidden_size,
            nhid=size.hidden_size,
            nlayers=size.layers,
            backend="torch",
            dtype=dtype,
        )
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
        loss, _ = loss_of(model, self.tokens[0], None)
        parameters = dict(model.named_parameters())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        named_gradients = zip((f"d{name}" for name in parameters), gradients, strict=True)
        return {"loss": loss.detach(), **dict(named_gradients)}

    def _step(self, model: LanguageModel) -> Call:
        optimizer = getattr(torch.optim, self.size.optimizer)(model.parameters(), lr=LEARNING_RATE)
        state: State | None = None
        position = 0

        def step() -> None:
            nonlocal state, position
            loss, state = loss_of(model, self.tokens[position % CHUNKS], state)
            position += 1
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            state = detach(state)

        return step
