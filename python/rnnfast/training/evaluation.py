"""How well a model predicts a text: cross-entropy, perplexity, bits per character."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..bptt import chunks
from ..models.language_model import LanguageModel
from ..text.corpus import Split
from .batches import IGNORED, text_rows, time_major
from .distributed import Engine

# Rows cost context (each begins without any), so there are few, and none is shorter than this.
EVALUATION_ROWS = 16
SHORTEST_ROW = 256


@dataclass(frozen=True)
class Score:
    """How well a text was predicted.

    Attributes:
        loss: mean cross-entropy of a token, in nats.
        predictions: tokens predicted.
        characters_per_token: length of the text over its number of tokens.
    """

    loss: float
    predictions: int
    characters_per_token: float

    @property
    def perplexity(self) -> float:
        """exp(loss): of how many equally likely tokens the model would be as unsure."""
        return perplexity(self.loss)

    @property
    def bits_per_character(self) -> float:
        """The length in bits to which the model would compress a character of the text (a byte, at
        the byte level). Unlike perplexity it compares between levels, as long as nothing is
        unknown.
        """
        return self.loss / math.log(2) / self.characters_per_token

    def __str__(self) -> str:
        return (
            f"loss {self.loss:.4f}  perplexity {self.perplexity:.3f}  "
            f"bits per character {self.bits_per_character:.4f}"
        )


def perplexity(loss: float) -> float:
    """exp of a cross-entropy in nats; infinite where a float can't hold it."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


@torch.no_grad()
def evaluate(
    model: LanguageModel,
    split: Split,
    *,
    bptt: int,
    engine: Engine | None = None,
    max_tokens: int | None = None,
) -> Score:
    """Predicts a text with the state carried throughout.

    Args:
        model: put in evaluation mode meanwhile.
        split: the text.
        bptt: steps computed at once; no result depends on it but for rounding.
        engine: shares the rows among its processes.
        max_tokens: read no more than about so many tokens: the beginnings of the rows, which lie
            evenly over the text.

    Raises:
        ValueError: fewer than two tokens.
    """
    engine = engine or Engine()
    count = max(1, min(EVALUATION_ROWS, (len(split.tokens) - 1) // SHORTEST_ROW))
    rows = text_rows(split.tokens, count, keep_all=True)[engine.rank :: engine.world_size]
    if max_tokens is not None:
        rows = rows[:, : max(1, max_tokens // count) + 1]
    device = model.embedding.weight.device
    nats = 0.0
    predictions = 0
    was_training = model.training
    model.eval()
    try:
        state = None
        # With more processes than rows, some have none.
        for inputs, targets in chunks(rows, bptt) if len(rows) else ():
            # Any token will do where the text has ended: the prediction after it isn't counted.
            logits, state = model(time_major(inputs.clamp(min=0), device), state)
            losses = F.cross_entropy(
                logits.flatten(0, 1),
                time_major(targets, device).flatten(),
                reduction="sum",
                ignore_index=IGNORED,
            )
            nats += losses.item()
            predictions += int((targets != IGNORED).sum())
    finally:
        model.train(was_training)
    nats, predictions = engine.sum([nats, float(predictions)])
    return Score(nats / predictions, int(predictions), split.characters / len(split.tokens))
